"""SIGKILL at any instant: the run goes on from its last whole checkpoint, and ends as if nothing had happened."""

import itertools
import os
import random
import shutil
import signal
import sys
import time

import pytest
import torch
from processes import CONTEXT

from kdlib import files
from kdlib.config import Config
from kdlib.report import html
from kdlib.session import checkpoint, session, time_budget

SAVE_STEPS = 3
READ_FIRST = {"max_length": 160, "batch_size": 8, "max_steps": 12, "eval_steps": 4, "save_steps": 3, "control": "off"}
"""Changes of a run that writes its teacher cache first, and a student at a pause and at its end."""


def drive(settings, out, by_the_clock, figures=True):
    """In a process of its own: the run, to its end. `by_the_clock`: saves behind the training, as often as they come."""
    torch.set_num_threads(1)
    if not figures:
        html.write_report = lambda folder: None
    if by_the_clock:
        checkpoint.SAVE_EVERY_S, checkpoint.SAVE_SHARE = 0.05, 1.0
    for _ in session.distill(Config.from_dict(settings), out):
        pass


def killed(settings, out, by_the_clock, chance, aimed):
    """Start the run in a process and kill it: at a random instant, or (`aimed`) while a checkpoint is half-written. Whether
    it was still running.
    """
    process = CONTEXT.Process(target=drive, args=(settings, out, by_the_clock))
    process.start()
    begun = time.monotonic()
    while not (out / "status.json").exists() and process.is_alive() and time.monotonic() - begun < 60:
        time.sleep(0.002)
    if aimed:
        skipped = chance.randrange(4)
        while process.is_alive() and skipped >= 0:
            skipped -= any((out / "checkpoints").glob("*.tmp"))
            time.sleep(chance.random() * 0.002)
    else:
        process.join(chance.random() * 2.5)
    was_running = process.is_alive()
    process.kill()
    process.join()
    return was_running


def to_its_end(*arguments):
    """The run in a process of its own, which nobody kills."""
    process = CONTEXT.Process(target=drive, args=(*arguments, False))
    process.start()
    process.join()
    assert process.exitcode == 0


def check_what_is_left(out, by_the_clock):
    """The newest checkpoint is whole, and no more than one interval of the recorded steps is lost. The steps lost."""
    path, groups, facts, broken = checkpoint.newest(out / "checkpoints")
    assert broken == {}
    recorded = files.read_records(out / "records.jsonl") if (out / "records.jsonl").exists() else []
    done = max((r["step"] for r in recorded if r["kind"] == "train"), default=0)
    if path is None:
        assert done <= SAVE_STEPS
        return done
    assert set(groups) >= {"student", "optimizer", "random"}
    saved = facts["course"]["training"]["step"]
    assert path.name == checkpoint.folder_name(saved)
    if not by_the_clock:
        assert done - saved <= SAVE_STEPS
    return done - saved


def kill_many_times(settings, folder, count, num_steps=90):
    """`count` kills over as many runs as it takes, half of them into a save; every run that ends is compared with one that
    was never killed. Counts of what happened.
    """
    chance = random.Random(0)
    settings = {**settings, "control": "off", "max_steps": num_steps, "save_steps": SAVE_STEPS, "eval_steps": 4}
    settings = Config.from_dict(settings).to_dict()
    to_its_end(settings, folder / "whole", False)
    wanted = (folder / "whole" / "student" / "model.safetensors").read_bytes()
    seen = {"kills": 0, "into a save": 0, "most steps lost": 0, "runs ended": 0}
    number = 0
    while seen["kills"] < count:
        number += 1
        assert number <= 3 + count // 2, f"no way to kill it any more: {seen}"
        by_the_clock = number % 2 == 0
        values = {**settings, "save_steps": 0} if by_the_clock else settings
        out = folder / f"run{number}"
        for _ in range(8):
            if not killed(values, out, by_the_clock, chance, aimed=seen["kills"] % 2 == 0):
                break
            seen["kills"] += 1
            seen["into a save"] += any((out / "checkpoints").glob("*.tmp"))
            lost = check_what_is_left(out, by_the_clock)
            seen["most steps lost"] = max(seen["most steps lost"], 0 if by_the_clock else lost)
        to_its_end(values, out, by_the_clock)
        assert files.read_json(out / "status.json")["state"] == "complete"
        assert (out / "student" / "model.safetensors").read_bytes() == wanted
        steps = [r["step"] for r in files.read_records(out / "records.jsonl") if r["kind"] == "train"]
        assert steps == list(range(1, num_steps + 1))
        seen["runs ended"] += 1
    return seen


def test_a_killed_run_goes_on(settings, tmp_path):
    seen = kill_many_times(settings, tmp_path, 8, num_steps=45)
    assert seen["into a save"] > 0


@pytest.mark.slow
def test_a_run_killed_a_hundred_times_goes_on(settings, tmp_path, capsys):
    seen = kill_many_times(settings, tmp_path, 100)
    assert seen["into a save"] >= 25
    with capsys.disabled():
        sys.stdout.write(f"\n{seen}\n")


def drive_to_a_call(settings, out, kill_at, pause_at):
    """The run in a process of its own, killed before its `kill_at`th rename of a file or folder (0: never), or paused after
    step `pause_at` (0: never).
    """
    torch.set_num_threads(1)
    real, calls = os.replace, itertools.count(1)

    def dying(source, target):
        if next(calls) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(source, target)

    os.replace = dying
    for record in session.distill(Config.from_dict(settings), out):
        if record["kind"] == "train" and record["step"] == pause_at:
            time_budget.TimeBudget.fits = lambda budget, *tasks: "step" not in tasks
            session.Session._describe_time = lambda session: "no time is left"


def in_a_process(*arguments):
    process = CONTEXT.Process(target=drive_to_a_call, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def killed_at_calls(settings, folder, places):
    """Kills before the given renames (None: all) of a run that begins and of one that goes on; each is then driven to its
    end and compared. How many kills there were, and what the last rename before each was of.
    """
    settings = Config.from_dict({**settings, **READ_FIRST}).to_dict()
    assert in_a_process(settings, folder / "whole", 0, 0) == 0
    assert in_a_process(settings, folder / "paused", 0, 4) == 0
    wanted, kills = (folder / "whole" / "student" / "model.safetensors").read_bytes(), 0
    for begun in (False, True):
        for kill_at in places or itertools.count(1):
            out = folder / "run"
            shutil.rmtree(out, ignore_errors=True)
            if begun:
                shutil.copytree(folder / "paused", out)
            ended = in_a_process(settings, out, kill_at, 0)
            if ended == 0:
                break
            assert ended == -signal.SIGKILL
            kills += 1
            assert in_a_process(settings, out, 0, 0) == 0
            assert files.read_json(out / "status.json")["state"] == "complete"
            assert (out / "student" / "model.safetensors").read_bytes() == wanted, (begun, kill_at)
            assert not [path for path in out.rglob("*") if path.suffix in (".tmp", ".old")], (begun, kill_at)
            assert (out / "verdict.json").exists() and (out / "report.html").exists()
            assert not (out / "teacher_cache").exists()
    return kills


@pytest.mark.slow
def test_a_kill_before_any_rename_costs_nothing(settings, tmp_path, capsys):
    kills = killed_at_calls(settings, tmp_path, None)
    assert kills > 30
    with capsys.disabled():
        sys.stdout.write(f"\n{kills} kills\n")
