"""What goes wrong on a real machine, injected: no memory left, numbers that are none. The run goes on, or says why not."""

import dataclasses
import itertools

import pytest
import torch

from kdlib import files, memory
from kdlib.config import Config
from kdlib.evaluation import scoring
from kdlib.models import forward
from kdlib.session import checkpoint, session
from kdlib.training import loop, terms

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
SETTINGS = {"control": "off", "max_steps": 6, "eval_steps": 2, "batch_size": 8, "save_steps": 2}


def distil(settings, out, **changes):
    return list(session.distill(Config.from_dict({**settings, **SETTINGS, **changes}), out))


def failing(real, error, calls, when=lambda *given: True):
    """`real`, but for the calls of these numbers among those that `when` is true of: there it raises."""
    count = itertools.count(1)

    def call(*given, **named):
        if when(*given) and next(count) in calls:
            raise error
        return real(*given, **named)

    return call


def same_run(found, wanted):
    """The same losses, gradients and scores, to 1e-5."""
    for kind, names in (("train", ("loss", "grad_norm")), ("eval", ("bits_per_byte", "kl_to_teacher"))):
        ours, theirs = ([r for r in records if r["kind"] == kind] for records in (found, wanted))
        assert len(ours) == len(theirs) > 0
        for a, b in zip(ours, theirs, strict=True):
            assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-5, abs=1e-7)
            assert a.get("num_tokens") == b.get("num_tokens")


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_a_step_that_runs_out_of_memory_is_taken_in_smaller_pieces(settings, tmp_path, monkeypatch, where):
    """At the third step, in the forward pass, in the backward pass, or before the optimizer's update."""
    wanted = distil(settings, tmp_path / "whole")

    def in_training(model, *_):
        return model.training

    if where == "forward":
        monkeypatch.setattr(forward, "read", failing(forward.read, OUT_OF_MEMORY, {4, 6}, in_training))
    elif where == "backward":
        monkeypatch.setattr(torch.Tensor, "backward", failing(torch.Tensor.backward, OUT_OF_MEMORY, {4, 6}))
    else:
        monkeypatch.setattr(torch.optim.AdamW, "step", failing(torch.optim.AdamW.step, OUT_OF_MEMORY, {3}))
    found = distil(settings, tmp_path / "run")
    same_run(found, wanted)
    sizes = [r["micro_batch"] for r in found if r["kind"] == "train"]
    alerts = [(r["sign"], r["step"]) for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"]
    if where == "optimizer":
        assert (sizes, alerts) == ([8] * 6, [])
    else:
        assert (sizes, alerts) == ([8, 8, 2, 2, 2, 2], [("memory", 3)])


def test_memory_that_runs_out_within_an_update_is_no_step_to_go_on_from(settings, tmp_path, monkeypatch):
    """Some weights have moved and some have not: the last checkpoint is the state to go back to."""
    real = torch.optim.AdamW.step
    calls = itertools.count(1)

    def half(self, *given):
        result = real(self, *given)
        if next(calls) == 5:
            raise OUT_OF_MEMORY
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(torch.OutOfMemoryError):
        distil(settings, tmp_path / "run")
    assert files.read_json(tmp_path / "run" / "status.json")["state"] == "failed"
    monkeypatch.setattr(torch.optim.AdamW, "step", real)
    found = distil(settings, tmp_path / "run")
    assert (found[0]["resumed"], found[-1]["kind"]) == ("step-00000004", "verdict")


def test_an_evaluation_that_runs_out_of_memory_is_taken_in_smaller_batches(settings, tmp_path, monkeypatch):
    wanted = distil(settings, tmp_path / "whole")
    monkeypatch.setattr(
        scoring._Accumulator, "add_pairs", failing(scoring._Accumulator.add_pairs, OUT_OF_MEMORY, {2, 4, 9})
    )
    found = distil(settings, tmp_path / "run")
    same_run(found, wanted)
    _, _, facts, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert facts["halvings"] == 3


def test_no_room_for_a_single_window_fails_with_advice(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "backward", failing(torch.Tensor.backward, OUT_OF_MEMORY, range(3, 99)))
    with pytest.raises(MemoryError, match="a single window does not fit into memory; lower max_length"):
        distil(settings, tmp_path / "run")
    status = files.read_json(tmp_path / "run" / "status.json")
    assert (status["state"], "lower max_length" in status["reason"]) == ("failed", True)


def test_another_error_is_no_lack_of_memory():
    assert memory.is_out_of_memory(OUT_OF_MEMORY)
    assert memory.is_out_of_memory(MemoryError())
    assert memory.is_out_of_memory(
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
    )
    assert not memory.is_out_of_memory(RuntimeError("shapes do not fit"))
    assert not memory.is_out_of_memory(ValueError("CUDA out of memory."))


def poisoned(where, value, steps):
    """`loop.TrainLoop._gradients` that puts `value` where it is asked to, at some steps (counted from 1)."""
    real = loop.TrainLoop._gradients

    def gradients(self, *given):
        weight = next(p for p in self.objective.student.parameters() if p.ndim == 2)
        now = self.step + 1 in steps
        before = weight.detach().clone()
        if now and where == "parameter":
            with torch.no_grad():
                weight[3, 1] = value
        made = real(self, *given)
        if now and where == "gradient":
            weight.grad[3, 1] = value
        if now and where == "parameter" and len(steps) == 1:
            with torch.no_grad():
                weight.copy_(before)
        return made

    return gradients


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient", "parameter"])
def test_one_step_without_a_number_changes_nothing(settings, tmp_path, monkeypatch, where, value):
    """The step is told and counted, every weight and every moment stays, and the next step is as good as any."""
    if where == "loss":
        calls = itertools.count(1)

        def broken(objective, rows):
            return terms.next_token(objective, rows) * (value if next(calls) == 4 else 1.0)  # one predicts the memory

        monkeypatch.setitem(terms.LM, "lm", dataclasses.replace(terms.LM["lm"], fn=broken))
    else:
        monkeypatch.setattr(loop.TrainLoop, "_gradients", poisoned(where, value, {3}))
    states, real = {}, loop.TrainLoop._update

    def seen(self, skipped):
        before = self.state_tensors()
        real(self, skipped)
        states[self.step + 1] = before, self.state_tensors()

    monkeypatch.setattr(loop.TrainLoop, "_update", seen)
    found = distil(settings, tmp_path / "run", loss_chunk_size=10**6, use_ema=True)
    skipped = [r["step"] for r in found if r["kind"] == "train" and r["skipped"]]
    assert skipped == [3]
    assert [(r["sign"], r["step"]) for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"] == [
        ("non_finite", 3)
    ]
    for group in ("student", "optimizer", "average"):
        for name, tensor in states[3][0][group].items():
            assert torch.equal(tensor.nan_to_num(), states[3][1][group][name].nan_to_num()), name
    assert any(not torch.equal(t, states[4][1]["student"][name]) for name, t in states[4][0]["student"].items())
    assert found[-1]["kind"] == "verdict"
    assert all(torch.isfinite(t).all() for t in states[6][1]["student"].values())


@pytest.mark.parametrize("where", ["gradient", "parameter"])
def test_no_number_any_more_stops_the_run_at_a_state_that_can_be_gone_on_with(settings, tmp_path, monkeypatch, where):
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainLoop, "_gradients", poisoned(where, float("nan"), range(4, 99)))
        with pytest.raises(FloatingPointError, match="3 steps in a row"):
            distil(settings, tmp_path / "run", max_steps=20, non_finite_steps=3)
    status = files.read_json(tmp_path / "run" / "status.json")
    assert status["state"] == "failed"
    assert ("non-finite weights: student.model.embed_tokens.weight" in status["reason"]) == (where == "parameter")
    path, groups, _, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert path.name == {"gradient": "step-00000006", "parameter": "step-00000002"}[where]
    assert all(torch.isfinite(tensor).all() for tensor in groups["student"].values())
    found = distil(settings, tmp_path / "run", max_steps=20, non_finite_steps=3)
    assert found[-1]["kind"] == "verdict"


def test_too_little_memory_is_told_before_the_first_step(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "usage", lambda device: {"used_bytes": 3 * 2**20, "total_bytes": 3 * 2**20 + 1000})
    found = distil(settings, tmp_path / "run", max_steps=1)
    (alert,) = [r for r in found if r["kind"] == "alert" and r["sign"] != "teacher_passed"]
    assert (alert["sign"], alert["step"]) == ("memory", 0)
    assert next(r for r in found if r["kind"] == "train")["memory"]["predicted_bytes"] > 3 * 2**20 + 1000
