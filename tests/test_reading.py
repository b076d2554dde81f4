"""A run that has its teacher read once first: when, how it goes on, what it learns, what it owes the control."""

import json
import os
import shutil
import signal
import time

import pytest
import safetensors.torch
import torch
from clocks import Ticks
from families import byte_level, tiny_model
from processes import together

from kdlib import cli, demo, environment, files, kaggle
from kdlib.config import Config
from kdlib.models import loading, teacher_cache
from kdlib.session import cache_writer, experiment, finish, first_pass, inputs, run_folder, session


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_POSITIONS", 300)


@pytest.fixture
def config(settings):
    """Some 70 windows, which 40 steps of 4 go over more than twice."""
    changes = {"max_length": 96, "batch_size": 4, "max_steps": 40, "eval_steps": 20, "control": "off"}
    return Config.from_dict({**settings, "teacher_cache": "auto", **changes})


def weights(out):
    return (out / "student" / "model.safetensors").read_bytes()


def status(out):
    return files.read_json(out / "status.json")


def kinds(found):
    return [(r["kind"], r.get("phase")) for r in found if r["kind"] in ("reading", "start", "verdict", "paused")]


def stopped(run, after):
    """Drive a run until the record of that kind was yielded so often, then leave it as a killed process would."""
    seen = 0
    for record in run:
        seen += (record["kind"], record.get("phase")) == after[:2]
        if seen == after[2]:
            run.close()
            return


def test_it_learns_as_from_a_cache_that_was_written_before(config, tmp_path):
    found = list(session.distill(config, tmp_path / "auto", Ticks()))
    shards = [record for record in found if record.get("phase") == "shard"]
    phases = [("reading", "plan"), *[("reading", "shard")] * len(shards), ("reading", "complete")]
    assert kinds(found) == [*phases, ("start", None), ("verdict", None)]
    assert len(shards) > 3
    assert not (tmp_path / "auto" / "teacher_cache").exists()  # nobody needs it any more
    list(cache_writer.cache_teacher(config, tmp_path / "cache"))
    list(session.distill(config.replace(teacher_cache=str(tmp_path / "cache")), tmp_path / "cached"))
    assert weights(tmp_path / "auto") == weights(tmp_path / "cached")
    live = config.replace(teacher_cache="live")
    list(session.distill(live, tmp_path / "live"))
    assert weights(tmp_path / "auto") != weights(tmp_path / "live")
    assert files.read_json(tmp_path / "auto" / "config.json")["teacher_cache"] == "auto"


@pytest.mark.parametrize(
    "changes", [{"max_steps": 20}, {"layerwise_weight": 0.1}, {"kd_method": "none"}], ids=lambda each: next(iter(each))
)
def test_the_teacher_stays_where_a_cache_would_not_pay(config, tmp_path, changes):
    made = session.Session(config.replace(**changes), tmp_path / "run", Ticks())
    assert made.first_pass.writer is None
    assert made.experiment.pair.teacher.model is not None


def test_twice_is_enough(config):
    assert config.teacher_cache == "auto"
    assert first_pass.should_cache_first(config.replace(max_steps=10), 20, 4)
    assert not first_pass.should_cache_first(config.replace(max_steps=10), 21, 4)
    assert first_pass.should_cache_first(config.replace(max_steps=10, repeats=2), 40, 4)
    assert not first_pass.should_cache_first(config.replace(max_steps=10, teacher_cache="live"), 20, 4)


@pytest.mark.parametrize("elsewhere", [False, True], ids=["in place", "elsewhere"])
@pytest.mark.parametrize("after", [("reading", "shard", 2), ("train", None, 25)], ids=["reading", "training"])
def test_cut_anywhere_it_goes_on_and_ends_the_same(config, tmp_path, after, elsewhere, monkeypatch):
    list(session.distill(config, tmp_path / "whole"))
    stopped(session.distill(config, tmp_path / "cut"), after)
    left = status(tmp_path / "cut")
    assert left["state"] == "paused"
    held = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "teacher_cache").glob("*.safetensors")}
    assert len(held) >= 2
    out, resume = (tmp_path / "next", str(tmp_path / "cut")) if elsewhere else (tmp_path / "cut", "auto")
    asked = []
    monkeypatch.setattr(loading, "load_model", noting(loading.load_model, asked))
    (tmp_path / "cut" / "teacher_cache" / "train-00009.safetensors.0.tmp").touch()  # as a kill leaves it
    run = session.distill(config, out, resume=resume)
    first = next(run)
    assert elsewhere != bool(list((out / "teacher_cache").glob("*.tmp")))
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut" / "teacher_cache").glob("*.safetensors")}
    assert held.items() <= kept.items()  # nothing was read again
    if after[0] == "train":
        assert (first["kind"], first["resumed"]) == ("start", left["reason"].split()[-1])
        assert asked == ["student"]
        assert held.keys() <= {path.name for path in (out / "teacher_cache").iterdir()}  # the mounted run may vanish
    else:
        assert (first["phase"], asked[0]) == ("plan", "teacher")
        assert first["missing"] + len(held) == first["shards"]
    list(run)
    assert weights(out) == weights(tmp_path / "whole")
    assert not (out / "teacher_cache").exists()


def noting(call, asked):
    def load_model(name, role, *args, **kwargs):
        asked.append(role)
        return call(name, role, *args, **kwargs)

    return load_model


def test_a_session_that_ends_while_the_teacher_reads_says_what_is_kept(config, tmp_path):
    run = session.distill(config, tmp_path / "run")
    assert next(run)["phase"] == "plan"
    assert next(run)["phase"] == "shard"
    signal.raise_signal(signal.SIGTERM)
    last = list(run)[-1]
    assert (last["kind"], last["step"]) == ("paused", 0)
    told = status(tmp_path / "run")
    assert told["state"] == "paused"
    assert told["reason"] == "asked to stop (SIGTERM); the teacher cache written so far is kept"
    assert told["shards_read"] == 1
    assert told["read_s"] > 0
    assert run_folder.RunFolder(tmp_path / "run").can_resume()


def test_a_budget_that_is_over_ends_it_between_two_shards(config, tmp_path):
    """Each look at this clock is a second later, so that some shards fit into a minute, and not all."""
    found = list(session.distill(config.replace(time_budget="60s"), tmp_path / "run", Ticks(1.0)))
    assert kinds(found)[-1] == ("paused", None)
    read = status(tmp_path / "run")["shards_read"]
    assert 0 < read < found[0]["shards"]
    assert "time budget" in found[-1]["reason"]
    later = list(session.distill(config, tmp_path / "run"))
    assert later[0]["missing"] == found[0]["shards"] - read
    assert later[-1]["kind"] == "verdict"
    assert status(tmp_path / "run")["read_s"] > 10


def test_what_was_read_for_another_plan_makes_room(config, tmp_path):
    """Nothing was learned yet, so the run begins anew, and its own cache with it."""
    stopped(session.distill(config, tmp_path / "run", Ticks()), ("reading", "shard", 12))
    other = config.replace(kd_top_k=7)
    list(session.distill(other, tmp_path / "run", Ticks()))
    list(session.distill(other, tmp_path / "fresh", Ticks()))
    assert weights(tmp_path / "run") == weights(tmp_path / "fresh")
    assert status(tmp_path / "run")["read_s"] == pytest.approx(status(tmp_path / "fresh")["read_s"], rel=0.1)


def test_a_cache_that_was_lost_is_read_again(config, tmp_path):
    list(session.distill(config, tmp_path / "whole"))
    stopped(session.distill(config, tmp_path / "cut"), ("train", None, 25))
    next((tmp_path / "cut" / "teacher_cache").glob("train-*.safetensors")).unlink()
    before, run = status(tmp_path / "cut"), session.distill(config, tmp_path / "cut")
    found = [next(run)]
    assert status(tmp_path / "cut")["step"] == before["step"] == 25  # where its checkpoint stands
    found += run
    assert kinds(found)[:2] == [("reading", "plan"), ("reading", "shard")]
    assert next(r for r in found if r["kind"] == "start")["resumed"]
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


def test_another_teacher_is_refused(config, tmp_path, pair):
    stopped(session.distill(config, tmp_path / "run"), ("train", None, 25))
    shutil.copytree(pair / "teacher", tmp_path / "other")
    held = safetensors.torch.load_file(tmp_path / "other" / "model.safetensors")
    held = {name: weight + 0.01 for name, weight in held.items()}
    safetensors.torch.save_file(held, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the teacher's weights"):
        next(session.distill(config.replace(teacher=str(tmp_path / "other")), tmp_path / "run"))
    shutil.copytree(pair / "teacher", tmp_path / "same")  # the same one, elsewhere
    run = session.distill(config.replace(teacher=str(tmp_path / "same")), tmp_path / "run")
    assert [next(run)["phase"], next(run)["phase"], next(run)["kind"]] == ["plan", "complete", "start"]


def test_the_live_teacher_cannot_go_on_with_it(config, tmp_path):
    stopped(session.distill(config, tmp_path / "run"), ("train", None, 25))
    with pytest.raises(ValueError, match="live, or a cache"):
        next(session.distill(config.replace(teacher_cache="live"), tmp_path / "run"))


def test_a_mounted_run_that_has_only_read_is_gone_on_with(config, tmp_path, monkeypatch):
    mounts = tmp_path / "input"
    stopped(session.distill(config, mounts / "before" / "run"), ("reading", "shard", 2))
    monkeypatch.setattr(environment, "mounts", lambda: mounts)
    assert kaggle.find_previous_output(tmp_path / "run") == str(mounts / "before" / "run")


def test_the_control_gets_the_time_in_which_the_teacher_read(config, tmp_path, monkeypatch):
    """30 s of reading over 60 steps are half a second a step: 3.5 for a plain one's 1."""

    class Steps:
        gradient_checkpointing, prepared = False, torch.nn.Linear(1, 1)

        def __init__(self, objective, *_, **__):
            self.step_s = 3.0 if "kd" in objective.terms else 1.0

        def __iter__(self):
            return iter([type("Record", (), {"step_s": self.step_s})] * 1000)

    made = session.Session(
        config.replace(teacher_cache="live", control="full", max_steps=60), tmp_path / "run", Ticks()
    )
    plan = made.experiment
    plan.read_s = 30.0
    plan.arms.append(plan._new_arm("distilled", 0))
    monkeypatch.setattr(experiment, "TrainLoop", Steps)
    plan._make_fit = lambda training: None
    assert plan._step_cost_ratio() == pytest.approx(3.5)
    arm = plan._new_arm("ce_only", 0)
    assert (arm.num_steps, arm.compare_step) == (210, 210)
    plan.arms[0].step, plan.arms[0].train_s = 20, 7.0
    assert plan._place_of(plan.arms[0])["elapsed_s"] == pytest.approx(17.0)
    arm.step, arm.train_s = 20, 7.0
    assert plan._place_of(arm)["elapsed_s"] == 7.0


def test_the_verdict_says_what_reading_took(config, tmp_path):
    list(session.distill(config.replace(control="short"), tmp_path / "run"))
    told = files.read_json(tmp_path / "run" / "verdict.json")
    assert told["read_s"] == status(tmp_path / "run")["read_s"] > 0
    assert "pass over the text before training took" in (tmp_path / "run" / "report.html").read_text()
    trained = [r for r in files.read_records(tmp_path / "run" / "records.jsonl") if r["kind"] == "train"]
    assert trained[5]["elapsed_s"] > 6 / 40 * told["read_s"]


def test_inputs_take_auto_as_the_teacher_itself(config):
    assert inputs.load(config).pair.teacher.model is not None
    with pytest.raises(ValueError, match="teacher is missing"):
        Config(teacher_cache="auto", student="s", dataset="d").require_inputs()
    assert json.loads(json.dumps(config.to_dict()))["teacher_cache"] == "auto"


def no_room_for_a_cache(folder):
    return environment.disk_reserve_bytes() + (10**9 if "checkpoints" in str(folder) else 100)


def test_without_room_on_the_disk_the_teacher_is_read_live(config, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "free_bytes", no_room_for_a_cache)
    found = list(session.distill(config, tmp_path / "run"))
    assert (found[0]["phase"], found[0]["text"][:24]) == ("skipped", "The teacher runs during ")
    assert found[1]["kind"] == "start"
    list(session.distill(config.replace(teacher_cache="live"), tmp_path / "live"))
    assert weights(tmp_path / "run") == weights(tmp_path / "live")


def test_begun_with_a_live_teacher_it_goes_on_with_it(config, tmp_path, monkeypatch):
    """As where the disk had no room: the signal stays what it was."""
    with monkeypatch.context() as full:
        full.setattr(environment, "free_bytes", no_room_for_a_cache)
        stopped(session.distill(config, tmp_path / "run"), ("train", None, 25))
    found = session.distill(config, tmp_path / "run")
    first = next(found)
    assert (first["kind"], bool(first["resumed"])) == ("start", True)


def test_the_report_looks_inside_a_teacher_that_was_let_go(config, tmp_path):
    list(session.distill(config, tmp_path / "run"))
    told = files.read_json(tmp_path / "run" / "figures" / "inside.json")
    assert "without" not in told
    assert set(told["attention"]) == {"teacher", "student_before", "distilled"}


def test_people_are_told(config, tmp_path, capsys):
    flags = [f"--{name}={value}" for name, value in config.to_dict().items() if value != getattr(Config(), name)]
    assert cli.main(["distill", *flags, "--out", str(tmp_path / "run")]) == 0
    told = capsys.readouterr()
    assert "outputs are cached first (1.4 MB in" in told.out
    assert "distilled 1/1: 100%" in told.err


def drive(values, out):
    teacher_cache.SHARD_POSITIONS = 300
    for _ in session.distill(Config.from_dict(values), out):
        pass


def drive_behind(values, out):
    """As `drive`, with a second process that comes to the verdict when the first one has done with everything."""
    if os.environ["RANK"] == "1":
        conclude = finish.finish_run

        def late(*arguments):
            until = time.monotonic() + 60
            while time.monotonic() < until and status(out)["state"] != "complete":
                time.sleep(0.05)
            time.sleep(1.0)
            return conclude(*arguments)

        finish.finish_run = late
    drive(values, out)


def test_two_processes_read_a_half_each_and_learn_what_one_does(config, tmp_path):
    """And neither loses what the teacher said before it has done."""
    values = {**config.to_dict(), "batch_size": 2}
    together(2, drive_behind, values, tmp_path / "two")
    drive(config.to_dict(), tmp_path / "one")
    losses = {}
    for name in ("one", "two"):
        found = files.read_records(tmp_path / name / "records.jsonl")
        losses[name] = [r["loss"] for r in found if r["kind"] == "train"]
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    assert status(tmp_path / "two")["shards_read"] > 3
    assert not (tmp_path / "two" / "teacher_cache").exists()


def test_tokenizers_without_partial_tokens_are_cached_too(settings, tmp_path):
    """Of one tokenizer on both sides no token lies inside another, so these tensors of a shard are empty."""
    demo.save(tiny_model(byte_level(), 16, seed=7), byte_level(), tmp_path / "student")
    changes = {"student": str(tmp_path / "student"), "teacher_cache": "auto", "max_steps": 0, "epochs": 3.0}
    found = list(session.distill(Config.from_dict({**settings, **changes, "control": "off"}), tmp_path / "run"))
    assert [record["phase"] for record in found if record["kind"] == "reading"][-1] == "complete"
    assert found[-1]["kind"] == "verdict"
