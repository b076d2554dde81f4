"""The ways that `benchmarks.step` compares do the same work where they say so."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks import step, ways

SMALL = {"num_hidden_layers": 1, "initializer_range": 0.3}
STUDENT = {
    "vocab_size": 90, "hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "num_key_value_heads": 1,
    **SMALL,
}  # fmt: skip
TEACHER = {
    "vocab_size": 130, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, **SMALL,
}  # fmt: skip
HERE = [name for name in ways.WAYS if "TRL" not in name]


def world(**changes):
    return ways.World(**{"num_windows": 3, "teacher": TEACHER, "student": STUDENT, **changes})


def loss_of(name, made):
    return ways.WAYS[name](made)(made.windows)


@torch.no_grad()
def by_hand(made):
    """Cross-entropy and KL to the projected teacher, one window at a time, without padding."""
    weight, ce, kd = ways._projector(made).weight, [], []
    for window in made.windows:
        ids, teacher_ids = (torch.from_numpy(each)[None] for each in (window.student_ids, window.teacher_ids))
        logits = made.student_model(input_ids=ids).logits[0]
        states = made.teacher_model.base_model(input_ids=teacher_ids).last_hidden_state[0, window.teacher_rows]
        projected = states @ weight.T @ made.student_model.get_output_embeddings().weight.T
        ce.append(F.cross_entropy(logits, torch.from_numpy(window.student_labels), reduction="none")[:-1])
        theirs, ours = projected.softmax(-1), logits[window.student_rows].softmax(-1)
        kd.append((theirs * (theirs / ours).log()).sum(-1))
    return float(torch.cat(ce).mean()), float(torch.cat(kd).mean())


@pytest.fixture(scope="module")
def losses():
    made = world()
    return {**{name: loss_of(name, made) for name in HERE}, "by hand": by_hand(made)}


def test_every_way_learns_something(losses):
    assert all(np.isfinite(losses[name]) and losses[name] > 0.1 for name in HERE)


def test_ways_that_say_the_same_have_the_same_loss(losses):
    ce, kd = losses["by hand"]
    assert kd > 0.1
    assert losses["floor"] == losses["ce-only"] == pytest.approx(ce, rel=1e-5)
    assert losses["ours live, projector"] == pytest.approx(0.5 * ce + 0.5 * kd, rel=1e-5)
    assert losses["eager, projector"] == pytest.approx(0.5 * ce + 0.5 * kd, rel=1e-5)


def test_lengths_are_those_of_instructions():
    lengths = np.array(ways.spread_lengths(1000))
    assert lengths.mean() == pytest.approx(113, abs=1)
    assert np.quantile(lengths, 0.9) == pytest.approx(175, abs=2)
    assert lengths.max() <= 384


def test_answers_are_learned_and_aligned_alone():
    whole, half = world(num_windows=20).windows, world(num_windows=20, answer=0.5).windows
    for window, aligned, learned in ((whole, 0.85, 1.0), (half, 0.425, 0.5)):
        tokens = sum(len(each.student_ids) for each in window)
        assert sum(len(each.student_rows) for each in window) / tokens == pytest.approx(aligned, abs=0.03)
        assert sum((each.student_labels >= 0).sum() for each in window) / tokens == pytest.approx(learned, abs=0.03)
    assert all((each.student_labels[each.student_rows] >= 0).all() for each in half)


def test_bytes_end_together_at_aligned_tokens_only():
    for window in world(num_windows=5).windows:
        ours, theirs = (side.tolist() for side in ways._byte_ends(window))
        assert ours == sorted(set(ours)) and theirs == sorted(set(theirs))
        common = sorted(set(ours) & set(theirs))[:-1]  # the last ends with the text
        assert [ours[row] for row in window.student_rows] == [theirs[row] for row in window.teacher_rows] == common


def test_a_row_is_told_by_its_rounds():
    timed = {
        "way_s": [[2.0, 2.0], [6.0, 3.0]],
        "floor_s": [[1.0, 1.0], [2.0, 2.0]],
        "ce-only_s": [[1.0, 0.5], [1.0, 1.5]],
    }
    kept = {"tokens": 100, "computed": 150, "above_bytes": 2e6, "peak_bytes": 3e9}
    told = step.row("ours", timed, kept, {"ours": 1.75, "naive original": 7.0})
    assert told == "| ours | 25.0 | 4.00 | 1.750 (1.500 to 2.000) | 2.500 | 3.000 | 0.250 | 1.50 | 2 | 3.00 |"
