"""The average of the weights against a sum written out by hand; awkward shapes; which of both students is kept."""

import copy
import dataclasses
import math

import pytest
import safetensors.torch
import torch

from kdlib.config import Config
from kdlib.session import arm, checkpoint, session
from kdlib.training import ema


class Odd(torch.nn.Module):
    """A scalar `[]`, a `[1]`, a matrix, a tied weight and buffers of several types."""

    def __init__(self):
        super().__init__()
        self.scalar = torch.nn.Parameter(torch.tensor(1.5))
        self.one = torch.nn.Parameter(torch.tensor([0.25]))
        self.matrix = torch.nn.Linear(3, 2)
        self.tied = torch.nn.Linear(3, 2, bias=False)
        self.tied.weight = self.matrix.weight
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(3))


def test_the_average_is_the_sum_by_hand():
    """In float64: w_1, then d w + (1 - d) w_n with d = min(decay, (1 + n) / (10 + n)), n averaged before."""
    model, decay = Odd().double(), 0.5
    average = ema.average(model, decay)
    wanted = None
    for step in range(40):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
            model.count += 1
            model.mean += 0.5
        average.update_parameters(model)
        now = {name: p.detach().clone() for name, p in model.named_parameters()}
        d = 0.0 if wanted is None else min(decay, (1 + step) / (10 + step))
        wanted = {name: d * wanted[name] + (1 - d) * p if wanted else p for name, p in now.items()}
        for name, p in average.module.named_parameters():
            torch.testing.assert_close(p, wanted[name], rtol=1e-12, atol=1e-12)
    assert average.module.tied.weight is average.module.matrix.weight
    assert (int(average.module.count), float(average.module.mean[0])) == (40, 20.0)


def test_the_start_is_soon_forgotten():
    """After 2,000 steps at 0.9999 the first weights are nothing of the average; without the warm-up they are 82 %."""
    left = math.prod(ema.decay_at(n, 0.9999) for n in range(1, 2000))
    assert left < 1e-20
    assert pytest.approx(0.82, abs=0.01) == 0.9999**2000
    assert ema.decay_at(10**7, 0.9999) == 0.9999
    assert ema.decay_at(100, 0.9) == 0.9


def test_the_student_itself_is_not_touched():
    model = Odd()
    before = copy.deepcopy(model.state_dict())
    average = ema.average(model, 0.9)
    average.update_parameters(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(p.requires_grad for p in average.parameters())


@pytest.mark.parametrize("worse", ["raw", "average"])
def test_both_students_are_scored_and_the_better_one_is_kept(settings, tmp_path, monkeypatch, worse):
    """Whichever of them is worse by a bit, it is the other that is exported."""
    real = arm.Scorer.score_student

    def student(self, split, model=None):
        score = real(self, split, model)
        spoilt = split == "validation" and (model is None or model is self.pair.student) == (worse == "raw")
        return dataclasses.replace(score, bits_per_byte=score.bits_per_byte + spoilt)

    monkeypatch.setattr(arm.Scorer, "score_student", student)
    changes = {"use_ema": True, "ema_decay": 0.7, "max_steps": 30, "eval_steps": 10, "control": "off"}
    found = list(session.distill(Config.from_dict({**settings, **changes}), tmp_path / "run"))
    scores = [r for r in found if r["kind"] == "eval" and r["split"] == "validation" and r["run"] == "distilled"]
    assert [(r["step"], r["averaged"]) for r in scores] == [
        (0, False), (10, False), (10, True), (20, False), (20, True), (30, False), (30, True),
    ]  # fmt: skip
    assert (found[-1]["exported"]["step"], found[-1]["exported"]["averaged"]) == (30, worse == "raw")
    _, groups, _, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    exported = safetensors.torch.load_file(tmp_path / "run" / "student" / "model.safetensors")
    kept = groups["average" if worse == "raw" else "student"]
    assert all(torch.equal(exported[name], tensor) for name, tensor in kept.items())
    assert any(not torch.equal(tensor, groups["average"][name]) for name, tensor in groups["student"].items())
