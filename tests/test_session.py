"""A whole run, small: its records, its verdict, its student, its report."""

import dataclasses
import importlib.metadata
import itertools
import json
import os
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from clocks import Ticks
from processes import together

from kdlib import environment, files
from kdlib.config import Config
from kdlib.evaluation import scoring
from kdlib.report import html
from kdlib.session import checkpoint, experiment, inputs, session, time_budget
from kdlib.training import terms


@pytest.fixture(scope="module")
def run(tmp_path_factory, pair):
    """A finished run with a full control and two repeats, by a clock of its own: `(folder, records)`."""
    out = tmp_path_factory.mktemp("run") / "out"
    config = Config(
        teacher=str(pair / "teacher"), student=str(pair / "student"), dataset=str(pair / "text.jsonl"), max_length=48,
        batch_size=4, max_steps=6, eval_steps=2, learning_rate=1e-2, check_teacher=False, eval_tokens=400, control="full",
        repeats=2,
    )  # fmt: skip
    return out, list(session.distill(config, out, Ticks()))


def test_the_generator_yields_what_is_on_disk(run):
    out, yielded = run
    assert (yielded[0]["kind"], yielded[-1]["kind"]) == ("start", "verdict")
    assert yielded[0]["alignment"] == yielded[-1]["alignment"]
    assert json.loads(json.dumps(yielded[1:-1])) == files.read_records(out / "records.jsonl")


def test_train_records_have_the_fields_of_the_contract(run):
    trained = [r for r in run[1] if r["kind"] == "train"]
    fields = "step loss parts shares lr grad_norm num_tokens tokens_per_s elapsed_s left_s memory".split()  # noqa: SIM905
    assert all(set(fields) <= set(r) for r in trained)
    assert [r["step"] for r in trained if r["run"] == "distilled" and r["repeat"] == 0] == [1, 2, 3, 4, 5, 6]
    assert all(0 < r["memory"]["used_bytes"] < r["memory"]["total_bytes"] for r in trained)
    assert all(set(r["parts"]) == {"lm"} and r["shares"] == {"lm": 1.0} for r in trained if r["run"] == "ce_only")
    assert {r["run"] for r in trained} == {"distilled", "ce_only"}


def test_time_left_falls_to_what_the_verdict_takes(run):
    """At every step, in both students of both repeats."""
    left = [r["left_s"] for r in run[1] if r["kind"] == "train"]
    assert left[-1] == pytest.approx(time_budget.GUESSED_S["conclude"], abs=0.1)
    assert all(before > after for before, after in itertools.pairwise(left))


def test_eval_records_have_the_fields_of_the_contract_and_the_last_step_is_evaluated(run):
    scored = [r for r in run[1] if r["kind"] == "eval"]
    assert all({"step", "bits_per_byte", "perplexity", "kl_to_teacher", "top1_agreement"} <= set(r) for r in scored)
    steps = [r["step"] for r in scored if (r["run"], r["repeat"], r["split"]) == ("distilled", 1, "validation")]
    assert steps == [0, 2, 4, 6]
    for repeat in (0, 1):
        last = max(r["step"] for r in run[1] if r["kind"] == "train" and (r["run"], r["repeat"]) == ("ce_only", repeat))
        validated = [
            r["step"] for r in scored if (r["run"], r["repeat"], r["split"]) == ("ce_only", repeat, "validation")
        ]
        assert validated[-1] == last


def test_both_students_start_from_the_same_weights(run):
    first = [r["bits_per_byte"] for r in run[1] if r["kind"] == "eval" and r["step"] == 0 and r["split"] == "validation"
             and r["run"] != "teacher"]  # fmt: skip
    assert len(first) == 4
    assert len(set(first)) == 1


def test_the_verdict_is_the_difference_of_the_test_scores(run):
    out, yielded = run
    found = files.read_json(out / "verdict.json")
    tests = {
        (r["run"], r["repeat"]): r["bits_per_byte"] for r in yielded if r["kind"] == "eval" and r["split"] == "test"
    }
    gains = [tests["ce_only", repeat] - tests["distilled", repeat] for repeat in (0, 1)]
    assert found["gain_by_run"] == pytest.approx(gains)
    assert found["gain"] == pytest.approx(sum(gains) / 2)
    assert found["interval"][0] <= found["gain"] <= found["interval"][1]
    assert found["num_runs"] == 2
    assert set(found["bits_per_byte"]) == {"teacher", "student_before", "ce_only", "distilled"}
    assert 0 < found["alignment"]["coverage"] <= 1


def test_the_student_on_disk_is_the_one_with_the_best_validation_score(run, pair):
    out, yielded = run
    best = min((r for r in yielded if r["kind"] == "eval" and r["split"] == "validation" and r["run"] == "distilled"),
               key=lambda r: r["bits_per_byte"])  # fmt: skip
    exported = files.read_json(out / "verdict.json")["exported"]
    assert (exported["repeat"], exported["step"]) == (best["repeat"], best["step"])
    config = Config(
        teacher=str(pair / "teacher"), student=str(out / "student"), dataset=str(pair / "text.jsonl"), max_length=48,
        check_teacher=False, eval_tokens=400,
    )  # fmt: skip
    loaded = inputs.load(config)
    score = scoring.evaluate_student(loaded.pair.student, loaded.pair.head, loaded.validation)
    assert score.bits_per_byte == pytest.approx(best["bits_per_byte"], rel=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(out / "student")("The cat")["input_ids"]
    card = (out / "student" / "README.md").read_text()
    assert files.read_json(out / "verdict.json")["sentence"] in card


def test_the_test_score_is_that_of_the_best_weights_not_the_last(settings, tmp_path):
    """With a rate at which a run falls apart; the score is checked against the exported student's, on the test text."""
    config = Config.from_dict({**settings, "learning_rate": 5.0, "max_steps": 6, "eval_steps": 1, "control": "off"})
    found = list(session.distill(config, tmp_path / "run"))
    validated = [
        r["bits_per_byte"]
        for r in found
        if r["kind"] == "eval" and r["split"] == "validation" and r["run"] != "teacher"
    ]
    assert min(validated) < validated[-1]
    (tested,) = [r for r in found if r["kind"] == "eval" and (r["run"], r["split"]) == ("distilled", "test")]
    loaded = inputs.load(config.replace(student=str(tmp_path / "run" / "student")))
    score = scoring.evaluate_student(loaded.pair.student, loaded.pair.head, loaded.test)
    assert tested["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    other = scoring.evaluate_student(loaded.pair.student, loaded.pair.head, loaded.validation)
    assert abs(other.bits_per_byte - score.bits_per_byte) > 1e-3


def test_the_newest_checkpoint_holds_the_best_weights_of_the_run(run):
    _, groups, _, broken = checkpoint.newest(run[0] / "checkpoints")
    exported = safetensors.torch.load_file(run[0] / "student" / "model.safetensors")
    assert not broken
    best = groups[f"best_{2 * files.read_json(run[0] / 'verdict.json')['exported']['repeat']}"]
    assert all(torch.equal(exported[name], tensor) for name, tensor in best.items())


def test_env_names_versions_and_machine(run):
    told = files.read_json(run[0] / "env.json")
    assert told["versions"]["torch"].startswith(("2.", "3."))
    assert told["versions"]["kdlib"] == "0.1.0"
    assert told["processors"] >= 1


def test_env_names_the_version_of_a_kdlib_that_is_not_installed(monkeypatch):
    def not_installed(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", not_installed)
    told = environment.describe()["versions"]
    assert (told["kdlib"], told["torch"]) == ("0.1.0", None)


def test_the_report_stands_alone_and_tells_the_verdict(run):
    page = (run[0] / "report.html").read_text()
    verdict = files.read_json(run[0] / "verdict.json")
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/png;base64,") == 24
    assert "http://" not in page
    assert "https://" not in page
    for text in (f"{verdict['bits_per_byte']['distilled']:.4f}", "prefers-color-scheme: dark", "What to trust"):
        assert text in page
    figures = {p.name for p in (run[0] / "figures").glob("*.png")}
    assert {"learning_curves.png", "loss_shares.png", "gain.png", "bits_per_byte.png"} <= figures


def test_a_report_can_be_drawn_of_a_run_that_is_not_finished(run, tmp_path):
    for name in ("config.json", "env.json", "status.json", "records.jsonl"):
        (tmp_path / name).write_text((run[0] / name).read_text())
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "reason": "<b>full disk</b>", "step": 3,
                                                      "max_steps": 12, "elapsed_s": 100.0}))  # fmt: skip
    lines = (tmp_path / "records.jsonl").read_text().splitlines(keepends=True)
    for kept in (1, 4, 9):
        (tmp_path / "records.jsonl").write_text("".join(lines[:kept]))
        page = html.write_report(tmp_path).read_text()
        assert "The run is failed. &lt;b&gt;full disk" in page


def drive(settings, out, **changes):
    return list(session.distill(Config.from_dict({**settings, **changes}), out))


def test_a_short_control_compares_both_at_a_tenth_of_the_plan(settings, tmp_path):
    found = drive(settings, tmp_path / "run", control="short", max_steps=20)
    verdict = found[-1]
    assert verdict["steps"]["distilled"] == 2
    steps = [r["step"] for r in found if r["kind"] == "train" and r["run"] == "ce_only"]
    assert steps[-1] == verdict["steps"]["ce_only"] < 20
    assert "at a tenth of the plan" in verdict["sentence"]
    assert "their difference is not a gain" in (tmp_path / "run" / "report.html").read_text()
    tests = [r["step"] for r in found if r["kind"] == "eval" and (r["run"], r["split"]) == ("distilled", "test")]
    assert tests == [2, 20]


def test_without_a_control_nothing_is_claimed(settings, tmp_path):
    found = drive(settings, tmp_path / "run", control="off")
    assert {r["run"] for r in found if r["kind"] == "train"} == {"distilled"}
    assert found[-1]["helped"] is None
    assert "it is unknown whether distillation helped" in (tmp_path / "run" / "report.html").read_text()


def test_patience_ends_a_run_that_no_longer_improves(settings, tmp_path):
    found = drive(settings, tmp_path / "run", control="off", learning_rate=0.0, max_steps=50, eval_steps=2,
                  early_stopping_patience=3)  # fmt: skip
    assert max(r["step"] for r in found if r["kind"] == "train") == 6
    assert found[-1]["kind"] == "verdict"


def test_a_control_gets_the_time_that_was_used_not_the_time_that_was_planned(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.Experiment, "_step_cost_ratio", lambda self: 2.0)
    found = drive(settings, tmp_path / "run", learning_rate=0.0, max_steps=50, eval_steps=2, early_stopping_patience=3)
    steps = {
        run: max(r["step"] for r in found if r["kind"] == "train" and r["run"] == run)
        for run in ("distilled", "ce_only")
    }
    assert steps == {"distilled": 6, "ce_only": 12}
    assert found[-1]["steps"] == steps


def test_epochs_give_the_plan_where_no_steps_are_named(settings, tmp_path):
    drive(settings, tmp_path / "run", control="off", max_steps=0, epochs=0.5)
    windows = len(inputs.load(Config.from_dict(settings)).train)
    assert files.read_json(tmp_path / "run" / "config.json")["max_steps"] == round(0.5 * windows / 2)


def test_a_run_that_is_broken_off_says_so(settings, tmp_path):
    steps = session.distill(Config.from_dict(settings), tmp_path / "run")
    for record in steps:
        if record["kind"] == "train":
            break
    steps.close()
    status = files.read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["reason"]) == ("paused", "stopped by the caller; resumes from step-00000001")


def test_a_run_does_the_same_twice(settings, tmp_path):
    """Same seed: same losses, same student, byte for byte (the control's length is timed, and may differ)."""
    first, second = (drive(settings, tmp_path / name, control="off") for name in ("a", "b"))
    losses = [[r["loss"] for r in found if r["kind"] == "train"] for found in (first, second)]
    assert losses[0] == losses[1]
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_the_control_gets_the_steps_that_fit_into_the_same_time(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment.Experiment, "_step_cost_ratio", lambda self: 2.5)
    found = drive(settings, tmp_path / "run", max_steps=4, eval_steps=2)
    assert max(r["step"] for r in found if r["kind"] == "train" and r["run"] == "ce_only") == 10


def test_the_cost_of_a_step_is_measured_in_turn(settings, monkeypatch, tmp_path):
    """A clock by which a distilled step takes 3 s and a plain one 1 s gives 3."""

    class Record:
        def __init__(self, step_s):
            self.step_s = step_s

    class Steps:
        gradient_checkpointing, prepared = False, torch.nn.Linear(1, 1)

        def __init__(self, objective, *_, **__):
            self.step_s = 3.0 if "kd" in objective.terms else 1.0

        def __iter__(self):
            return (Record(self.step_s) for _ in itertools.count())

    monkeypatch.setattr(experiment, "TrainLoop", Steps)
    made = session.Session(Config.from_dict({**settings, "kd_method": "first_token"}), tmp_path / "run", Fake())
    made.experiment.arms.append(made.experiment._new_arm("distilled", 0))
    assert made.experiment._step_cost_ratio() == 3.0


class Fake:
    def now(self):
        return 0.0


def by_the_command(settings, out):
    """As its users launch it: the command in two processes, which says its end once."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    launched = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "kdlib.cli",
         "distill", *flags, "--out", str(out)],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr[-2000:]
    assert launched.stdout.count("Student: ") == 1


def by_the_library(settings, out):
    together(2, drive, settings, out)


ALL = {"preset": "documents", "balance": "auto", "share_steps": 2, "kd_method": "byte_prefix"}


@pytest.mark.parametrize(("launch", "more"), [(by_the_command, {}), (by_the_library, ALL)], ids=["kd", "all"])
def test_two_processes_do_what_one_does(settings, tmp_path, launch, more):
    """Real processes: the same effective batch gives the same losses, gradient norms and student."""
    plan = {**settings, "control": "off", "max_steps": 3, **more}
    launch({**plan, "batch_size": 2}, tmp_path / "two")
    one = [r for r in drive(plan, tmp_path / "one", batch_size=4) if r["kind"] == "train"]
    two = [r for r in files.read_records(tmp_path / "two" / "records.jsonl") if r["kind"] == "train"]
    assert len(one) == len(two) == 3
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        assert b["num_tokens"] == a["num_tokens"]
        assert b["parts"] == pytest.approx(a["parts"], rel=1e-4)
        assert b["grad_shares"] == (a["grad_shares"] and pytest.approx(a["grad_shares"], rel=1e-3))
        assert b["figures"] == pytest.approx(a["figures"], rel=1e-4)
    assert any(a["grad_shares"] for a in one) == bool(more)


@pytest.mark.pictures
def test_a_run_with_every_part_tells_what_drove_it(settings, tmp_path):
    """The preset, three phases long, with a control: records, figures, the report, and a control that knows no teacher."""
    found = drive({**settings, "preset": "documents", "share_steps": 4, "kd_top_k": 30}, tmp_path / "run", max_steps=24)
    trained = [r for r in found if r["kind"] == "train" and r["run"] == "distilled"]
    assert set(trained[0]["shares"]) == {"lm", "kd"}
    everything = {"lm", "kd", "layerwise", "attention", "attention_alignment", "routing_feature", "contrastive"}
    assert set(trained[-1]["shares"]) == set(trained[-1]["weights"]) == everything
    assert [r["step"] for r in trained if r["grad_shares"]] == [4, 8, 12, 16, 20, 24]
    assert {"kd_covered", "routing_0", "routing_1"} <= set(trained[-1]["figures"])
    assert all(r["skipped"] == "" for r in trained)
    control = [r for r in found if r["kind"] == "train" and r["run"] == "ce_only"]
    assert all(set(r["parts"]) == {"lm"} and r["weights"] == {"lm": 1.0} for r in control)
    drawn = {path.name for path in (tmp_path / "run" / "figures").glob("*.png")}
    assert {"gradient_shares.png", "routing.png"} <= drawn


def test_an_alert_is_a_record_on_disk_and_a_line_of_the_report(settings, tmp_path):
    changes = {"kd_weight": 50.0, "lm_weight": 0.01, "batch_size": 4, "control": "off"}
    found = drive(settings, tmp_path / "run", max_steps=30, **changes)
    alerts = [r for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"]
    assert [(r["sign"], r["part"], r["run"]) for r in alerts if r["sign"] == "dominance"] == [
        ("dominance", "kd", "distilled")
    ]
    assert [
        r
        for r in files.read_records(tmp_path / "run" / "records.jsonl")
        if r["kind"] == "alert" and r["sign"] != "teacher_passed"
    ] == alerts
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(f"step {r['step']}: " in page for r in alerts)
    assert "kd makes up" in page


def test_too_many_steps_without_a_number_fail_the_run_and_keep_its_best_student(settings, tmp_path, monkeypatch):
    calls = itertools.count(1)

    def broken(objective, rows):
        return terms.next_token(objective, rows) * (float("nan") if next(calls) > 5 else 1.0)  # one predicts the memory

    monkeypatch.setitem(terms.LM, "lm", dataclasses.replace(terms.LM["lm"], fn=broken))
    plan = Config.from_dict({**settings, "non_finite_steps": 3, "max_steps": 20, "control": "off", "eval_steps": 2})
    told = []
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        for record in session.distill(plan, tmp_path / "run"):
            told.append(record)
    status = files.read_json(tmp_path / "run" / "status.json")
    assert (status["state"], "3 steps in a row" in status["reason"]) == ("failed", True)
    assert [(r["step"], r["sign"]) for r in told if r["kind"] == "alert" and r["sign"] != "teacher_passed"] == [
        (5, "non_finite")
    ]
    assert [r["step"] for r in told if r["kind"] == "train" and r["skipped"]] == [5, 6, 7]
    assert [r["loss"] for r in files.read_records(tmp_path / "run" / "records.jsonl") if r.get("skipped")] == [None] * 3
    path, groups, _, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert path.name == "step-00000007"
    assert all(tensor.isfinite().all() for tensors in groups.values() for tensor in tensors.values())
    assert "The run is failed" in html.write_report(tmp_path / "run").read_text()
