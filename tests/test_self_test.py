"""The self-test: every check can fail, and one that fails stops no other. Stand-ins take the place of runs and cards."""

import json
import math
import types

import pytest
import torch

from kdlib import cli, demo, doctor, files, machine, memory, self_test
from kdlib.models import devices, forward, loading
from kdlib.report.findings import Finding
from kdlib.session import cache_writer, session

LOSSES = [3.0, 2.8, 2.7, 2.6, 2.5, 2.4]
VERDICT = {"kind": "verdict", "bits_per_byte": {"distilled": 2.0, "ce_only": 2.1, "teacher": 1.9}, "gain": 0.1}


def trained(factor=1.0, micro_batch=8, resumed="step-00000003"):
    """Records of a run whose losses are `factor` times those of LOSSES."""
    facts = {"kind": "train", "micro_batch": micro_batch, "skipped": ""}
    steps = [{**facts, "loss": factor * loss, "step": step + 1} for step, loss in enumerate(LOSSES)]
    return [{"kind": "start", "resumed": resumed}, *steps]


def running(*found):
    """A stand-in for `session.distill`: a generator of these records."""

    def distill(config, out, clock=None):
        yield from found

    return distill


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def now(self):
        self.seconds += 0.5
        return self.seconds


@pytest.fixture(autouse=True)
def _nothing_to_let_go(request, monkeypatch):
    if not request.node.get_closest_marker("slow"):
        monkeypatch.setattr(memory, "release_memory", lambda: None)


@pytest.fixture(params=[False, True], ids=["cpu", "cuda"])
def bench(request, tmp_path, monkeypatch):
    """A bench with or without a card, whose reference run has LOSSES."""
    return stand_in(tmp_path, monkeypatch, request.param)


def stand_in(tmp_path, monkeypatch, cuda):
    made = self_test.Bench(tmp_path, cuda, Clock())
    made.reference, made.reserved = trained(), 2**30
    monkeypatch.setattr(demo, "is_ready", lambda folder: True)
    monkeypatch.setattr(demo, "prepare", lambda *_, **__: [])
    monkeypatch.setattr(cache_writer, "cache_teacher", lambda *_: [])
    monkeypatch.setattr(session, "distill", running(*trained(), VERDICT))
    monkeypatch.setattr(machine, "list_gpus", list)
    for name, value in {
        "max_memory_allocated": 2**20, "reset_peak_memory_stats": None, "set_per_process_memory_fraction": None,
        "is_bf16_supported": True, "device_count": 2, "get_device_properties": types.SimpleNamespace(total_memory=2**34),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    return made


def outcome(name, bench):
    return self_test._outcome(self_test.CHECKS[name], bench)


def test_the_machine_fails_where_the_doctor_finds_something_wrong(bench, monkeypatch):
    monkeypatch.setattr(doctor, "diagnose", lambda config: [Finding("machine", "Python", "3.11.7")])
    assert outcome("machine", bench)[0] == "ok"
    wrong = Finding("machine", "kernels, GPU 0", "do not work", "error", "", "install another torch")
    monkeypatch.setattr(doctor, "diagnose", lambda config: [wrong])
    assert outcome("machine", bench)[:2] == ("failed", "kernels, GPU 0: do not work")


def test_the_demo_fails_without_a_verdict_or_a_number(bench, monkeypatch):
    assert outcome("demo to its verdict", bench)[0] == "ok"
    for last in ({"kind": "paused"}, {**VERDICT, "bits_per_byte": {"distilled": math.nan, "ce_only": 2.0}}):
        monkeypatch.setattr(session, "distill", running(*trained(), last))
        state, text, _ = outcome("demo to its verdict", bench)
        assert (state, text.startswith(f"the run ended with {last['kind']}")) == ("failed", True)


def test_the_demo_fails_where_the_card_was_not_used(tmp_path, monkeypatch):
    bench = stand_in(tmp_path, monkeypatch, cuda=True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    assert outcome("demo to its verdict", bench)[:2] == ("failed", "the run did not use the GPU")


COMPARED = {
    "fp16 with a loss scaler": (0.04, 0.06),
    "bf16": (0.04, 0.06),
    "live = cached loss": (5e-4, 2e-3),
    "teacher on another device": (5e-5, 2e-4),
}
"""Differences of losses that pass and that fail."""


@pytest.mark.parametrize("name", COMPARED)
def test_losses_that_differ_too_much_or_are_no_numbers_fail(tmp_path, monkeypatch, name):
    bench = stand_in(tmp_path, monkeypatch, cuda=True)
    passes, fails = COMPARED[name]
    for found, state in (
        (trained(1 + passes), "ok"),
        (trained(1 - passes), "ok"),
        (trained(1 + fails), "failed"),
        (trained(1 - fails), "failed"),
        (trained(math.nan), "failed"),
        (trained()[:-1], "failed"),
    ):
        monkeypatch.setattr(session, "distill", running(*found))
        assert outcome(name, bench)[0] == state, found


def test_the_teacher_goes_to_a_second_card_where_there_is_one(tmp_path, monkeypatch):
    bench = stand_in(tmp_path, monkeypatch, cuda=True)
    assert outcome("teacher on another device", bench)[2]["device"] == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert outcome("teacher on another device", bench)[2]["device"] == "cpu"


def test_what_this_machine_has_not_is_skipped_with_a_reason(tmp_path, monkeypatch):
    bench = stand_in(tmp_path, monkeypatch, cuda=False)
    for name in ("fp16 with a loss scaler", "teacher on another device", "out of memory, real"):
        state, text, _ = outcome(name, bench)
        assert (state, "CUDA GPU" in text) == ("skipped", True)
    card = stand_in(tmp_path, monkeypatch, cuda=True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert outcome("bf16", card)[:2] == ("skipped", "the GPU has no native bf16")
    monkeypatch.setattr(demo, "is_ready", lambda folder: False)
    assert outcome("live = cached loss", bench)[:2] == (
        "skipped", "the demo models are missing because the demo check failed",
    )  # fmt: skip


def test_lack_of_memory_fails_where_nothing_was_halved_or_losses_change(bench, monkeypatch):
    name, real = "out of memory, injected", forward.read
    for found, state, words in (
        (trained(micro_batch=4), "ok", "micro-batch 8 to 4"),
        (trained(), "failed", "stayed at 8"),
        (trained(1.001, micro_batch=4), "failed", "more than 0.0001"),
    ):
        monkeypatch.setattr(session, "distill", running(*found))
        got, text, _ = outcome(name, bench)
        assert (got, words in text) == (state, True)
        assert forward.read is real


def test_the_injected_error_comes_once_and_in_training_only(bench, monkeypatch):
    monkeypatch.setattr(forward, "read", lambda model: "read")
    raised = []

    def distill(config, out, clock=None):
        for training in (False, *[True] * 9):
            try:
                forward.read(types.SimpleNamespace(training=training))
            except torch.OutOfMemoryError:
                raised.append(training)
        yield from trained(micro_batch=4)

    monkeypatch.setattr(session, "distill", distill)
    assert outcome("out of memory, injected", bench)[0] == "ok" and raised == [True]


def test_a_cards_memory_is_capped_until_it_runs_out_and_then_given_back(tmp_path, monkeypatch):
    bench, caps, ooms = stand_in(tmp_path, monkeypatch, cuda=True), [], [0]
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", caps.append)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_ooms": ooms[0]})
    state, text, _ = outcome("out of memory, real", bench)
    assert (state, text) == ("failed", "memory did not run out at 30% of the 1024 MiB that were reserved")
    assert caps == [part for share in self_test.SHARES for part in (share / 16, 1.0)]

    def short(found):
        def distill(config, out, clock=None):
            ooms[0] += caps[-1] < 0.5 / 16
            yield from found

        return distill

    monkeypatch.setattr(session, "distill", short(trained(micro_batch=2)))
    state, text, numbers = outcome("out of memory, real", bench)
    assert (state, numbers["share"], numbers["met"], "micro-batch 8 to 2" in text) == ("ok", 0.45, 1, True)
    monkeypatch.setattr(session, "distill", short(trained(1.001)))
    assert outcome("out of memory, real", bench)[0] == "failed"

    def broken(config, out, clock=None):
        raise MemoryError("no room for a single window")
        yield

    monkeypatch.setattr(session, "distill", broken)
    assert outcome("out of memory, real", bench)[:2] == ("failed", "MemoryError: no room for a single window")
    assert caps[-1] == 1.0


@pytest.mark.parametrize("factor", [1.0, 1.001, 1.1])
def test_a_resumed_run_fails_with_other_weights_or_from_the_beginning(bench, monkeypatch, factor):
    made = torch.nn.Linear(2, 2)
    other = torch.nn.Linear(2, 2)
    other.load_state_dict({name: factor * tensor for name, tensor in made.state_dict().items()})
    monkeypatch.setattr(loading, "load_model", lambda path, role: other if "cut" in path else made)
    allowed = 1.01 if bench.cuda else 1.0
    assert outcome("cut and resume", bench)[0] == ("ok" if factor <= allowed else "failed")
    monkeypatch.setattr(session, "distill", running(*trained(resumed=None)))
    assert outcome("cut and resume", bench)[:2] == ("failed", "the second session started at step 0")


def test_a_peak_that_was_predicted_badly_fails(bench, monkeypatch):
    for told, state in ((100, "ok"), (86, "ok"), (114, "ok"), (84, "failed"), (117, "failed")):
        found = {"predicted": told * 2**20, "peak": 100 * 2**20, "used": 0}
        monkeypatch.setattr(bench, "process", lambda *words, found=found: found)
        assert outcome("predicted peak", bench)[0] == state, told
    monkeypatch.setattr(bench, "process", lambda *words: {"predicted": 120.0, "peak": 100.0, "reserved": 110.0})
    assert outcome("predicted peak", bench)[0] == "ok"


def test_a_product_that_is_wrong_fails(tmp_path, monkeypatch):
    bench = stand_in(tmp_path, monkeypatch, cuda=False)
    assert outcome("product of true shape", bench)[0] == "ok"
    monkeypatch.setattr(devices, "teacher_dtype", lambda *_: torch.float32)
    monkeypatch.setattr(torch, "ones", torch.zeros)
    assert outcome("product of true shape", bench)[:2] == ("failed", "a sum of 576 ones returned 0")


def test_a_step_far_over_the_floor_fails(bench, monkeypatch):
    for step_s, state in ((1.9, "ok"), (2.1, "failed"), (math.nan, "failed")):
        by_clock, by_processor = ((step_s, 1.0), (9.9, step_s))
        found = {"way_s": [by_clock if bench.cuda else by_processor] * 2, "floor_s": [[1.0, 1.0], [1.2, 1.1]]}
        monkeypatch.setattr(bench, "process", lambda *words, found=found: found)
        assert outcome("step to floor", bench)[0] == state, step_s


def test_a_notebook_that_did_not_end_well_fails(bench, monkeypatch, tmp_path):
    for state, wanted in (("complete", "ok"), ("paused", "failed")):
        (tmp_path / "run").mkdir(exist_ok=True)
        status = {"state": state, "reason": "why", "step": 12, "session_s": 3.0}
        files.write_json(tmp_path / "run" / "status.json", status)
        monkeypatch.setattr(bench, "notebook", lambda name, parameters: tmp_path)
        assert outcome("distill notebook", bench)[0] == wanted


def test_a_process_that_fails_or_takes_too_long_fails_its_check(bench, monkeypatch):
    for code, words in (
        ("raise ValueError('no card')", "exit status 1: ValueError: no card"),
        ("while True: pass", "timed out"),
    ):
        monkeypatch.setattr(self_test, "MIN_S", 1.0 if "while" in code else 60.0)
        bench.left_s = 0.0
        with pytest.raises(self_test.Failed, match=words):
            bench._run([self_test.sys.executable, "-c", code], ".", None)


def test_benchmarks_on_a_processor_have_one_thread(bench, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(
        bench, "_run", lambda command, room, environment: json.dumps(environment.get("OMP_NUM_THREADS"))
    )
    assert bench.process("benchmarks.step") == (None if bench.cuda else "1")


def test_without_a_checkout_or_papermill_a_check_is_skipped(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(self_test.importlib.util, "find_spec", lambda name: None)
    assert outcome("distill notebook", bench)[:2] == ("skipped", "requires papermill and ipykernel")
    monkeypatch.setattr(self_test, "checkout", lambda: tmp_path)
    for name in ("predicted peak", "step to floor"):
        assert outcome(name, bench)[:2] == ("skipped", "benchmarks require a checkout of kdlib")


def fine(bench):
    return "well", {"number": 1.0}


def broken(bench):
    raise KeyError("a line\nand another")


def wrong(bench):
    raise self_test.Failed("2 is not 1")


@pytest.fixture
def three(monkeypatch):
    monkeypatch.setattr(self_test, "CHECKS", {"one": broken, "two": wrong, "three": fine})


def test_a_check_that_fails_stops_no_other(three, tmp_path):
    results = [result for _, result in self_test.run(tmp_path, Clock()) if result]
    assert [(result.name, result.state) for result in results] == [
        ("one", "failed"),
        ("two", "failed"),
        ("three", "ok"),
    ]
    assert [result.text for result in results] == ["KeyError: 'a line\\nand another'", "2 is not 1", "well"]
    assert all(result.seconds > 0 for result in results)


def test_no_check_begins_after_the_limit(three, tmp_path, monkeypatch):
    monkeypatch.setattr(self_test, "LIMIT_S", {"cuda": 1.2, "cpu": 1.2})
    results = [result for _, result in self_test.run(tmp_path, Clock()) if result]
    assert [result.state for result in results] == ["failed", "skipped", "skipped"]
    assert results[-1].text == "the limit of 1 s is reached"


def test_the_command_prints_checks_a_page_and_the_path_of_the_numbers(three, tmp_path, capsys, monkeypatch):
    assert cli.main(["doctor", "--self-test", "--out", str(tmp_path / "out")]) == 1
    out = capsys.readouterr().out
    assert out.startswith("one ...\n  failed, ") and "\nkdlib " in out and "1 ok, 2 failed, 0 skipped" in out
    told = json.loads((tmp_path / "out" / "self_test.json").read_text())
    assert [result["state"] for result in told["results"]] == ["failed", "failed", "ok"]
    assert told["results"][-1]["numbers"] == {"number": 1.0} and told["env"]["versions"]["torch"]
    assert (tmp_path / "out" / "self_test.txt").read_text() in out
    monkeypatch.setattr(self_test, "CHECKS", {"three": fine})
    assert cli.main(["doctor", "--self-test"]) == 0
    assert "JSON: " in capsys.readouterr().out


def test_the_command_refuses_what_it_does_not_know(three, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for words, match in (
        (["--out", str(tmp_path)], "is not empty; give a new folder"),
        (["--batch-size", "2"], "--self-test takes --out DIR only, got batch_size"),
        (["config.json"], "--self-test takes --out DIR only, got config.json"),
    ):
        assert cli.main(["doctor", "--self-test", *words]) == 2
        assert match in capsys.readouterr().err


@pytest.mark.slow
def test_this_machine_passes(tmp_path, capsys):
    assert cli.main(["doctor", "--self-test", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
