"""A run that is cut off anywhere and gone on with is the run it would have been; anything else is refused or told."""

import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from clocks import Ticks
from families import tiny_model, unigram
from processes import together

from kdlib import cli, demo, environment, files
from kdlib.config import Config
from kdlib.evaluation import scoring
from kdlib.report import html
from kdlib.session import checkpoint, experiment, inputs, run_folder, session
from kdlib.training import loop

HOUSE = Path(__file__).parent.parent

TIMED = {"elapsed_s", "left_s", "memory", "session", "tokens_per_s"}
PLAN = {"max_steps": 12, "eval_steps": 3, "batch_size": 2, "grad_accumulation": 2}


def distil(settings, out, cut_at=None, **how):
    """Drive a run; break off after the `cut_at`-th train record of this session, or go to its end."""
    found, seen = [], 0
    run = session.distill(Config.from_dict(settings), out, **how)
    for record in run:
        found.append(record)
        seen += record["kind"] == "train"
        if seen == cut_at:
            run.close()
            break
    return found


def untimed(out):
    return [{k: v for k, v in r.items() if k not in TIMED} for r in files.read_records(out / "records.jsonl")]


def state_of(out):
    """Bytes of everything that a run came to."""
    path, *_ = checkpoint.newest(out / "checkpoints")
    kept = {file.name: file.read_bytes() for file in path.glob("*.safetensors")}
    return kept | {f"student/{file.name}": file.read_bytes() for file in (out / "student").glob("*.safetensors")}


@pytest.fixture
def with_dropout(settings, tmp_path):
    """Settings with a student that draws random numbers at every step."""
    return {**settings, **PLAN, "student": student_with_dropout(tmp_path / "student")}


def student_with_dropout(folder):
    """Saves a student and returns its folder."""
    tokenizer = unigram()
    model = tiny_model(tokenizer, 16)
    model.config.attention_dropout = 0.2
    demo.save(model, tokenizer, folder)
    return str(folder)


CONFIGS = {
    "accumulation": {"control": "off"},
    "everything": {
        "preset": "documents", "use_ema": True, "ema_decay": 0.9, "balance": "auto", "control": "short", "share_steps": 4,
        "kd_method": "projector",
    },
    "epochs": {"max_length": 32, "max_steps": 0, "epochs": 2.3, "batch_size": 22, "grad_accumulation": 1, "control": "full"},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_cut_off_anywhere_ends_as_if_it_never_was(with_dropout, tmp_path, monkeypatch, name):
    """At five places, one after the other: weights, optimizer, average, exported student and records are the same to the
    last byte.
    """
    settings, places, wanted, told = uncut(with_dropout, tmp_path, monkeypatch, name)
    check_cut(settings, tmp_path / "cut", [b - a for a, b in zip([0, *places], places, strict=False)], wanted, told)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_cut_off_once_ends_as_if_it_never_was(with_dropout, tmp_path, monkeypatch, name):
    """Each of the five places by itself."""
    settings, places, wanted, told = uncut(with_dropout, tmp_path, monkeypatch, name)
    for place in places:
        check_cut(settings, tmp_path / f"cut_{place}", [place], wanted, told)


def uncut(values, folder, monkeypatch, name):
    """The settings of CONFIGS, five places to cut a run, and what it comes to without."""
    monkeypatch.setattr(experiment.Experiment, "_step_cost_ratio", lambda self: 1.4)
    settings = Config.from_dict({**values, **CONFIGS[name]}).to_dict()
    whole = distil(settings, folder / "whole")
    assert whole[-1]["kind"] == "verdict"
    num_steps = sum(r["kind"] == "train" for r in whole)
    wanted = state_of(folder / "whole")
    assert {"student.safetensors", "optimizer.safetensors", "random.safetensors", "student/model.safetensors"} <= set(
        wanted
    )
    places = sorted(random.Random(name).sample(range(1, num_steps), 5))
    return settings, places, wanted, untimed(folder / "whole")


@pytest.mark.parametrize("control", ["full", "short"])
def test_a_run_cut_off_between_two_students_goes_on_with_the_second(with_dropout, tmp_path, monkeypatch, control):
    """At the test scores of the first, when its checkpoint is the newest one and the control has not begun."""
    monkeypatch.setattr(experiment.Experiment, "_step_cost_ratio", lambda self: 1.4)
    settings = {**with_dropout, "control": control, "repeats": 2}
    distil(settings, tmp_path / "whole")
    run = session.distill(Config.from_dict(settings), tmp_path / "cut")
    for record in run:
        if (record["kind"], record.get("split"), record["step"]) == ("eval", "test", settings["max_steps"]):
            run.close()
            break
    assert distil(settings, tmp_path / "cut")[0]["resumed"] == "step-00000012"
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "whole")
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_may_be_cut_off_at_any_of_its_records(with_dropout, tmp_path, monkeypatch):
    """Every one of them, of every student, evaluation and test. Only the best weights may be older in the last checkpoint:
    where the cut was right before the last evaluation, that is done again and not saved again.
    """
    monkeypatch.setattr(experiment.Experiment, "_step_cost_ratio", lambda self: 1.4)
    settings = {**with_dropout, "control": "short", "repeats": 2, "max_steps": 10, "use_ema": True, "eval_steps": 2}
    settings |= {"early_stopping_patience": 2, "learning_rate": 0.1}
    assert distil(settings, tmp_path / "whole", clock=Ticks())[-1]["kind"] == "verdict"
    wanted, told = state_of(tmp_path / "whole"), untimed(tmp_path / "whole")
    wanted = {name: data for name, data in wanted.items() if not name.startswith("best_")}
    for number in range(1, len(told) + 1):
        out = tmp_path / f"cut{number}"
        run = session.distill(Config.from_dict(settings), out, Ticks())
        cut = [next(run), *itertools.islice(run, number)]
        run.close()
        assert [record["kind"] for record in cut[1:]] == [record["kind"] for record in told[:number]], cut[-1]
        assert distil(settings, out, clock=Ticks())[-1]["kind"] == "verdict"
        assert untimed(out) == told, number
        ended = state_of(out)
        assert {name: ended[name] for name in wanted} == wanted, number
        shutil.rmtree(out)


def test_what_is_recorded_does_not_depend_on_how_long_it_takes(with_dropout, tmp_path):
    """On a slow machine the plan is told (to whoever drives the run, not on the disk) and checkpoints come oftener."""
    settings = {**with_dropout, "control": "off", "max_steps": 5, "use_ema": True, "eval_steps": 2}
    plans, told, ended = [], [], []
    for look_s in (0.0, 0.01, 40.0):
        found = distil(settings, tmp_path / f"run{look_s}", clock=Ticks(look_s))
        plans.append([r["step"] for r, after in itertools.pairwise(found) if after["kind"] == "plan"])
        told.append(untimed(tmp_path / f"run{look_s}"))
        ended.append(state_of(tmp_path / f"run{look_s}"))
    assert plans == [[], [], [1]]
    assert told[0] == told[1] == told[2]
    assert ended[0] == ended[1] == ended[2]


def test_the_best_weights_may_lie_before_the_cut(settings, tmp_path):
    """At a rate at which a run falls apart, what is exported was learned in the session before."""
    settings = {**settings, **PLAN, "learning_rate": 5.0, "eval_steps": 1, "control": "off"}
    whole = distil(settings, tmp_path / "whole")
    assert whole[-1]["exported"]["step"] < 6
    distil(settings, tmp_path / "cut", 6)
    assert distil(settings, tmp_path / "cut")[-1]["exported"] == whole[-1]["exported"]
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")


def check_cut(settings, out, cuts, wanted, told):
    for number, cut in enumerate(cuts):
        found = distil(settings, out, cut)
        assert files.read_json(out / "status.json")["state"] == "paused"
        assert found[0]["session"] == number + 1
    last = distil(settings, out)
    assert (last[0]["session"], last[-1]["kind"]) == (len(cuts) + 1, "verdict")
    assert untimed(out) == told
    ended = state_of(out)
    assert ended.keys() == wanted.keys()
    assert [name for name in wanted if ended[name] != wanted[name]] == []
    assert [name for name in (out / "checkpoints").iterdir() if not checkpoint.read(name)] == []


@pytest.fixture
def begun(settings, tmp_path):
    """A run that was broken off after its fourth step, and its settings."""
    settings = {**settings, **PLAN, "control": "off", "save_steps": 2}
    distil(settings, tmp_path / "run", 4)
    return settings, tmp_path / "run"


def copy_with(folder, source, change):
    """A copy of a model folder in which `change(model, tokenizer)` was done."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    demo.save(*change(model, tokenizer), folder)
    return str(folder)


def nudged(model, tokenizer):
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 2] += 1e-3
    return model, tokenizer


def renamed_token(model, tokenizer):
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core["model"]["vocab"][-1][0] = "▁zebra"
    return model, transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(core)), pad_token=tokenizer.pad_token
    )


def other_text(tmp_path, settings):
    lines = (tmp_path.parent / settings["dataset"]).read_text().splitlines()
    (tmp_path / "other.jsonl").write_text("\n".join([json.dumps({"text": "A new first line."}), *lines[1:]]) + "\n")
    return str(tmp_path / "other.jsonl")


OTHERS = {
    "config": (lambda t, s: {"kd_weight": 0.9, "seed": 5}, r"kd_weight was 0.6 and is 0.9; seed was 0 and is 5"),
    "plan": (lambda t, s: {"max_steps": 13}, "max_steps was 12 and is 13"),
    "batch": (lambda t, s: {"batch_size": 4}, "a step had 4 windows .* and has 8"),
    "student": (lambda t, s: {"student": copy_with(t / "s", s["student"], nudged)}, "the student's weights"),
    "teacher": (lambda t, s: {"teacher": copy_with(t / "t", s["teacher"], nudged)}, "the teacher's weights"),
    "tokenizer": (lambda t, s: {"student": copy_with(t / "k", s["student"], renamed_token)}, "the student's tokenizer"),
    "text": (lambda t, s: {"dataset": other_text(t, s)}, "the text .*the tokenization of the text"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_and_the_difference_told(begun, tmp_path, what):
    settings, out = begun
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    change, message = OTHERS[what]
    with pytest.raises(ValueError, match=message) as told:
        distil({**settings, **change(tmp_path, settings)}, out)
    assert "Start a new --out" in str(told.value)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_decides_nothing_may_change_and_folders_may_move(begun, tmp_path):
    """The rule of `identity`: another place, another split of the batch, other cadences. The result is what it would be."""
    settings, out = begun
    for name in ("student", "teacher"):
        shutil.copytree(settings[name], tmp_path / "moved" / name)
    moved = {name: str(tmp_path / "moved" / name) for name in ("student", "teacher")}
    harmless = {"batch_size": 1, "grad_accumulation": 4, "log_steps": 2, "save_steps": 5, "time_budget": "11h",
                "keep_checkpoints": 1, "share_steps": 0, "early_stopping_patience": 50}  # fmt: skip
    last = distil({**settings, **moved, **harmless}, out)
    assert last[-1]["kind"] == "verdict"
    distil(settings, tmp_path / "whole")
    ended, wanted = (
        safetensors.torch.load_file(run / "student" / "model.safetensors") for run in (out, tmp_path / "whole")
    )
    for name, tensor in wanted.items():
        torch.testing.assert_close(ended[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_same_text_in_another_place_is_the_same_input(settings, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed.jsonl"
    moved.parent.mkdir()
    shutil.copy(settings["dataset"], moved)
    known, found = (inputs.load(Config.from_dict({**settings, "dataset": str(path)})).identity
                    for path in (settings["dataset"], moved))  # fmt: skip
    assert found == known
    with open(moved, "a") as file:
        file.write(json.dumps({"text": "One more."}) + "\n")
    assert inputs.load(Config.from_dict({**settings, "dataset": str(moved)})).identity["text"] != known["text"]


def test_other_versions_are_told_and_go_on(begun, monkeypatch):
    settings, out = begun
    real = environment.describe
    monkeypatch.setattr(
        environment, "describe", lambda *a: {**real(*a), "versions": {**real(*a)["versions"], "kdlib": "9.9"}}
    )
    found = distil(settings, out)
    assert found[0]["notes"] == ["kdlib was 0.1.0 and is 9.9"]
    assert found[-1]["kind"] == "verdict"


def test_a_broken_checkpoint_is_told_and_the_one_before_is_taken(begun, tmp_path):
    settings, out = begun
    newest = out / "checkpoints" / "step-00000004"
    (newest / "optimizer.safetensors").write_bytes((newest / "optimizer.safetensors").read_bytes()[:-3])
    found = distil(settings, out)
    assert found[0]["resumed"] == "step-00000002"
    (alert,) = [r for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"]
    assert (alert["sign"], alert["part"], alert["step"]) == ("checkpoint", "step-00000004", 2)
    assert "optimizer.safetensors has" in alert["meaning"]
    steps = [r["step"] for r in files.read_records(out / "records.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, 13))
    distil(settings, tmp_path / "whole")
    assert state_of(out) == state_of(tmp_path / "whole")


def test_signs_that_build_up_over_two_sessions_are_told_once(settings, tmp_path):
    """An alert that needs twenty records; cut off amid them, and after it."""
    settings = {**settings, "kd_weight": 50.0, "lm_weight": 0.01, "batch_size": 4, "control": "off", "max_steps": 30}
    for name, cuts in (("whole", []), ("amid", [10]), ("after", [25])):
        for cut in cuts:
            distil(settings, tmp_path / name, cut)
        distil(settings, tmp_path / name)
    told = [r for r in untimed(tmp_path / "whole") if r["kind"] == "alert"]
    assert ("dominance", 20) in [(r["sign"], r["step"]) for r in told]
    for name in ("amid", "after"):
        assert [r for r in untimed(tmp_path / name) if r["kind"] == "alert"] == told


def test_where_no_checkpoint_is_whole_nothing_is_begun(begun):
    settings, out = begun
    for path in (out / "checkpoints").glob("*/manifest.json"):
        path.unlink()
    with pytest.raises(
        ValueError, match=r"no valid checkpoint to resume from \(step-00000004: manifest.json is missing; step-"
    ):
        distil(settings, out)


def test_a_run_cut_off_before_its_first_checkpoint_begins_anew(settings, tmp_path):
    run = session.distill(Config.from_dict({**settings, "control": "off"}), tmp_path / "run")
    next(run)
    run.close()
    assert "nothing was saved yet" in files.read_json(tmp_path / "run" / "status.json")["reason"]
    found = distil({**settings, "control": "off"}, tmp_path / "run")
    assert (found[0]["resumed"], found[0]["session"], found[-1]["kind"]) == (None, 2, "verdict")


def test_a_run_goes_on_in_another_folder(begun, tmp_path):
    """As on Kaggle: the first session's output is mounted read-only. A run folder, or one of its checkpoints."""
    settings, out = begun
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    found = distil(settings, tmp_path / "next", resume=str(out))
    assert (found[0]["resumed"], found[0]["session"]) == ("step-00000004", 2)
    again = distil(settings, tmp_path / "again", resume=str(out / "checkpoints" / "step-00000002"))
    assert again[0]["resumed"] == "step-00000002"
    assert untimed(tmp_path / "next") == untimed(tmp_path / "again")
    assert state_of(tmp_path / "next") == state_of(tmp_path / "again")
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(ValueError, match="holds no run"):
        distil(settings, tmp_path / "third", resume=str(tmp_path))
    with pytest.raises(ValueError, match="holds another run"):
        distil(settings, tmp_path / "next", resume=str(out))


def test_a_complete_run_tells_its_verdict_again(begun):
    settings, out = begun
    verdict = distil(settings, out)[-1]
    before = (out / "records.jsonl").read_bytes()
    assert distil(settings, out) == [verdict]
    assert (out / "records.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"kd_weight was 0\.6 and is 0\.1"):
        distil({**settings, "kd_weight": 0.1}, out)
    with pytest.raises(ValueError, match="holds another run; give a new folder"):
        distil(settings, out, resume="never")


def test_two_processes_never_work_on_one_folder(begun, tmp_path):
    """The lock of another process is respected, and gone when that is killed."""
    settings, out = begun
    hold = "import sys, time; from kdlib.session.run_folder import RunFolder; "
    hold += "folder = RunFolder(sys.argv[1]); folder.acquire();"
    hold += "print(1, flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", hold, str(out)], stdout=subprocess.PIPE, cwd=HOUSE, text=True)
    with owner:
        owner.stdout.readline()
        with pytest.raises(ValueError, match="another process uses --out"):
            distil(settings, out)
        owner.kill()
    assert distil(settings, out)[-1]["kind"] == "verdict"
    assert not (out / ".lock").exists()


def test_a_session_that_nobody_drives_gives_way(settings, tmp_path):
    """In a notebook an error in the loop's body leaves the generator alive; the cell is simply run again."""
    settings = {**settings, "control": "off"}
    kept = session.distill(Config.from_dict(settings), tmp_path / "run")
    for record in kept:
        if record["kind"] == "train":
            break
    found = distil(settings, tmp_path / "run")
    assert (found[0]["session"], found[0]["resumed"], found[-1]["kind"]) == (2, "step-00000001", "verdict")
    kept.close()
    assert files.read_json(tmp_path / "run" / "status.json")["state"] == "complete"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_session_with_everything_saved(settings, tmp_path, number):
    former = signal.getsignal(number)
    settings, found = {**settings, "control": "off", "max_steps": 9}, []
    for record in session.distill(Config.from_dict(settings), tmp_path / "run"):
        found.append(record)
        if record["kind"] == "train" and record["step"] == 3:
            os.kill(os.getpid(), number)
    assert (found[-1]["kind"], found[-1]["step"]) == ("paused", 3)
    assert number.name in found[-1]["reason"]
    assert signal.getsignal(number) is former
    assert files.read_json(tmp_path / "run" / "status.json")["state"] == "paused"
    assert distil(settings, tmp_path / "run")[0]["step"] == 3


def test_a_signal_within_an_evaluation_does_not_wait_for_its_end(settings, tmp_path, monkeypatch):
    """The evaluation is done by the next session, and everything is as if nothing had happened."""
    settings = {**settings, **PLAN, "control": "off", "batch_size": 2}
    real, calls, when = scoring._Accumulator.add_text, itertools.count(), [None]

    def interrupted(self, *given):
        if next(calls) == when[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        real(self, *given)

    monkeypatch.setattr(scoring._Accumulator, "add_text", interrupted)
    distil(settings, tmp_path / "whole")
    when[0] = 2 * next(calls) - next(calls) // 3  # two thirds through the second run
    found = distil(settings, tmp_path / "run")
    assert found[-1]["kind"] == "paused"
    assert distil(settings, tmp_path / "run")[-1]["kind"] == "verdict"
    assert untimed(tmp_path / "run") == untimed(tmp_path / "whole")
    assert state_of(tmp_path / "run") == state_of(tmp_path / "whole")


def test_a_second_interrupt_stops_at_once_and_keeps_the_last_checkpoint(settings, tmp_path, monkeypatch):
    settings = {**settings, "control": "off", "max_steps": 9, "save_steps": 2}
    real = loop.TrainLoop._gradients

    def impatient(self, *given):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *given)

    monkeypatch.setattr(loop.TrainLoop, "_gradients", impatient)
    with pytest.raises(KeyboardInterrupt):
        distil(settings, tmp_path / "run")
    status = files.read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["reason"]) == ("paused", "interrupted immediately; resumes from step-00000004")
    monkeypatch.setattr(loop.TrainLoop, "_gradients", real)
    assert distil(settings, tmp_path / "run")[-1]["kind"] == "verdict"


def test_a_process_that_ends_saves_a_run_left_in_the_middle(settings, tmp_path):
    """As a notebook's kernel does when it is shut down while the generator waits for its next turn."""
    code = (
        "import json, sys, torch; torch.set_num_threads(1); from kdlib import Config, cli, distill; cli.quiet();"
        "run = distill(Config.from_dict(json.loads(sys.argv[1])), sys.argv[2]);"
        "[next(run) for _ in range(8)]; sys.stdout.write('left')"
    )
    words = [sys.executable, "-c", code, json.dumps({**settings, "control": "off"}), str(tmp_path / "run")]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=HOUSE, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, "left"), ran.stderr
    status = files.read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "paused"
    assert checkpoint.newest(tmp_path / "run" / "checkpoints")[0].name in status["reason"]


def test_a_full_disk_pauses_the_run_with_its_last_checkpoint(settings, tmp_path, monkeypatch):
    settings, free = {**settings, "control": "off", "max_steps": 9, "save_steps": 2}, [10**12]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    found = []
    for record in session.distill(Config.from_dict(settings), tmp_path / "run"):
        found.append(record)
        free[0] = 10**12 if record.get("step", 0) < 5 else 10**6
    assert found[-1]["kind"] == "paused"
    assert "the disk is full (a checkpoint needs" in found[-1]["reason"]
    assert "resumes from step-00000004" in found[-1]["reason"]
    assert files.read_json(tmp_path / "run" / "status.json")["state"] == "paused"
    free[0] = 10**12
    assert distil(settings, tmp_path / "run")[0]["step"] == 4


def test_a_status_is_written_even_where_not_a_byte_is_free(tmp_path, monkeypatch):
    folder = run_folder.RunFolder(tmp_path)
    folder.status("running", step=1)

    def full(path, text, writer=0):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_text", full)
    folder.status("paused", step=2)
    assert folder.last_status() == {"state": "paused", "step": 2}
    with pytest.raises(OSError, match="No space"):
        run_folder.RunFolder(tmp_path / "new").status("paused")


def drive(settings, out, stop_at):
    """One of several processes; at a step the second one is asked to stop."""
    cli.quiet()
    html.write_report = lambda folder: None
    for record in session.distill(Config.from_dict(settings), out):
        if record["kind"] == "train" and record["step"] == stop_at and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)


def launch(settings, out, stop_at=0):
    """Two real processes. The state that the run is left in."""
    together(2, drive, settings, out, stop_at)
    return files.read_json(out / "status.json")["state"]


def test_two_processes_are_saved_and_gone_on_with(with_dropout, tmp_path):
    """Two that are cut off, by a signal to one of them, and gone on with by two end as two that never were. One process may
    go on with what two began, where a step stays what it was.
    """
    settings = {**with_dropout, "control": "off", "max_steps": 8, "grad_accumulation": 1, "use_ema": True}
    settings |= {"preset": "documents", "save_steps": 3}
    assert launch(settings, tmp_path / "whole") == "complete"
    assert launch(settings, tmp_path / "cut", stop_at=5) == "paused"
    assert checkpoint.newest_name(tmp_path / "cut" / "checkpoints") == "step-00000005"
    shutil.copytree(tmp_path / "cut", tmp_path / "alone")
    assert launch(settings, tmp_path / "cut") == "complete"
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"a step had 4 windows .* and has 2"):
        distil(settings, tmp_path / "alone")
    assert distil({**settings, "batch_size": 4}, tmp_path / "alone")[-1]["kind"] == "verdict"
