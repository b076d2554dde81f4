"""Sums by kind of position, against counts made one position at a time."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from families import reader
from test_evaluate import small  # noqa: F401 - a fixture

from kdlib.evaluation import breakdown, scoring, verdict


def bin_of(kind, value):
    return max(i for i, low in enumerate(breakdown.EDGES[kind]) if value >= low)


def by_hand(student, teacher, windows, shared, times):
    """The same sums in float64, a window and a position at a time."""
    sums = {kind: {} for kind in breakdown.EDGES}
    ours, theirs = reader("unigram").vocabulary, reader("byte_level").vocabulary
    for window in windows:
        with torch.no_grad():
            q = student(torch.from_numpy(window.student_ids)[None]).logits[0].double().softmax(-1)
            p = teacher.model(torch.from_numpy(window.teacher_ids)[None]).logits[0].double().softmax(-1)
        for row, label in enumerate(window.student_labels):
            if label >= 0:
                sure = float(q[row].max())
                add(sums, "confidence", sure, num=1, confidence=sure, right=int(q[row].argmax()) == label)
        for row, other in zip(window.student_rows, window.teacher_rows, strict=True):
            ps, qs = p[other][shared.teacher_ids], q[row][shared.student_ids]
            ps, qs = (torch.cat([each, (1 - each.sum(0, True)).clamp(min=1e-30)]) for each in (ps, qs))
            kl, entropy = float((ps * (ps / qs).log()).sum()), -float((ps * ps.log()).sum())
            agreed = theirs.tokens[int(p[other].argmax())] == ours.tokens[int(q[row].argmax())]
            told = {"num": 1, "kl": kl, "agreed": agreed}
            add(sums, "entropy", entropy, **told)
            add(sums, "position", int(row), **told)
            add(sums, "frequency", times[window.student_labels[row]], **told)
    return sums


def add(sums, kind, value, **told):
    for name, amount in told.items():
        row = sums[kind].setdefault(name, [0.0] * len(breakdown.EDGES[kind]))
        row[bin_of(kind, value)] += amount


def test_every_sum_is_the_one_counted_by_hand(small):  # noqa: F811
    student, head, teacher, windows, _, shared = small
    for model in (student, teacher.model):
        model.lm_head.weight.data.mul_(9.0)  # surer than chance, so that every kind has several bins
    held_out = scoring.prepare_held_out(windows, teacher, head, shared, 2)
    times = np.arange(student.config.vocab_size) * 911 % 1500  # every frequency occurs
    score = scoring.evaluate_student(
        student, head, dataclasses.replace(held_out, times_seen=torch.from_numpy(times)), 5
    )
    expected = by_hand(student, teacher, windows, shared, times)
    for kind, sums in expected.items():
        assert score.retention[kind]["from"] == list(breakdown.EDGES[kind])
        for name, values in sums.items():
            assert score.retention[kind][name] == pytest.approx(values, rel=1e-4, abs=1e-4), (kind, name)
        assert sum(map(bool, sums["num"])) > 1, f"the test needs more than one bin of {kind}"


def test_agreement_and_divergence_are_those_of_the_score(small):  # noqa: F811
    student, head, _, _, held_out, _ = small
    times = torch.zeros(student.config.vocab_size, dtype=torch.long)
    score = scoring.evaluate_student(student, head, dataclasses.replace(held_out, times_seen=times))
    told = score.retention["position"]
    assert sum(told["kl"]) / sum(told["num"]) == pytest.approx(score.kl_to_teacher, rel=1e-4)
    assert sum(told["agreed"]) / sum(told["num"]) == pytest.approx(score.top1_agreement)


def test_nothing_is_told_where_nothing_was_asked(small):  # noqa: F811
    student, head, _, _, held_out, _ = small
    assert scoring.evaluate_student(student, head, held_out).retention is None
    assert held_out.teacher_score.retention is None


def test_the_teacher_tells_its_calibration_alone(small):  # noqa: F811
    _, head, teacher, windows, _, shared = small
    seen = torch.zeros(400, dtype=torch.long)
    score = scoring.prepare_held_out(windows, teacher, head, shared, 2, times_seen=seen).teacher_score
    assert set(score.retention) == {"confidence"}
    assert sum(score.retention["confidence"]["num"]) == sum((w.teacher_labels >= 0).sum() for w in windows)


def test_calibration_error_is_the_mean_gap_weighted_by_positions():
    sums = {"from": [0.0, 0.1], "num": [3.0, 1.0], "confidence": [0.15, 0.9], "right": [0.0, 0.5]}
    assert breakdown.calibration_error({"confidence": sums}) == pytest.approx((0.15 + 0.4) / 4)
    assert breakdown.calibration_error(None) is None


def test_several_runs_add_up():
    one = {"position": {"from": [0, 8], "num": [1.0, 2.0], "kl": [0.5, 0.25], "agreed": [1.0, 0.0]}}
    assert breakdown.merge([one, one]) == {
        "position": {"from": [0, 8], "num": [2.0, 4.0], "kl": [1.0, 0.5], "agreed": [2.0, 0.0]}
    }
    assert breakdown.merge([one, None]) is None
    score = scoring.Score(1.0, 2.0, None, None, np.array([1.0]), np.array([1]), one)
    assert verdict.mean_score([score, score]).retention["position"]["num"] == [2.0, 4.0]


def test_probabilities_of_zero_have_no_part_in_the_entropy():
    told = breakdown.Breakdown(torch.zeros(4, dtype=torch.long))
    logs = torch.tensor([[0.5, 0.5, 0.0]]).log()
    told.add_pairs(torch.tensor([1]), torch.tensor([0]), logs, torch.tensor([0.0]), torch.tensor([True]))
    assert math.log(2) > 0.5  # it falls into the bin from 0.5 nats
    assert told.to_dict()["entropy"]["num"] == [0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
