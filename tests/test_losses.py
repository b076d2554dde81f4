"""Every divergence against sums written out in plain Python floats (float64), and the laws it must obey."""

import math

import pytest
import torch

from kdlib import losses

STUDENT = [1.3, -0.4, 0.2, 2.1, -3.0]
TEACHER = [0.1, 1.9, -1.2, 0.7, 0.3]


def softmax(logits, temperature=1.0):
    weights = [math.exp(x / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


ORACLES = {
    "forward_kl": lambda s, t: kl(t, s),
    "reverse_kl": lambda s, t: kl(s, t),
    "jsd": lambda s, t: sum(
        0.5 * b * math.log(b / (0.5 * a + 0.5 * b)) + 0.5 * a * math.log(a / (0.5 * a + 0.5 * b))
        for a, b in zip(s, t, strict=True)
    ),
    "skew_forward_kl": lambda s, t: kl(t, [0.1 * b + 0.9 * a for a, b in zip(s, t, strict=True)]),
    "skew_reverse_kl": lambda s, t: kl(s, [0.1 * a + 0.9 * b for a, b in zip(s, t, strict=True)]),
}
NAMES = sorted(losses.DIVERGENCES)


def rows(values, requires_grad=False):
    return torch.tensor([values], dtype=torch.float64, requires_grad=requires_grad)


def divergence(name, student, teacher, temperature=1.0):
    """Of logits."""
    made = [losses.log_probs(logits, temperature) for logits in (student, teacher)]
    return losses.distillation(*made, name, temperature)


def bucket_divergence(student, teacher, student_buckets, teacher_buckets, num, name, temperature):
    """Of logits."""
    pairs = (student, student_buckets), (teacher, teacher_buckets)
    told = [losses.bucket_log_probs(losses.log_probs(made, temperature), own, num) for made, own in pairs]
    return losses.distillation(*told, name, temperature)


def test_every_divergence_has_an_oracle():
    assert sorted(ORACLES) == NAMES


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_is_the_written_out_sum_times_temperature_squared(name, temperature):
    found = divergence(name, rows(STUDENT), rows(TEACHER), temperature)
    student, teacher = softmax(STUDENT, temperature), softmax(TEACHER, temperature)
    assert found.item() == pytest.approx(temperature**2 * ORACLES[name](student, teacher), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_written_out_sum(name):
    student = rows(STUDENT, requires_grad=True)
    divergence(name, student, rows(TEACHER), 1.7).sum().backward()

    def value(shifted):
        return 1.7**2 * ORACLES[name](softmax(shifted, 1.7), softmax(TEACHER, 1.7))

    for i, found in enumerate(student.grad[0].tolist()):
        up, down = list(STUDENT), list(STUDENT)
        up[i] += 1e-6
        down[i] -= 1e-6
        assert found == pytest.approx((value(up) - value(down)) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_is_zero_when_student_equals_teacher(name):
    assert divergence(name, rows(TEACHER), rows(TEACHER)).item() == pytest.approx(0.0, abs=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_is_never_negative_and_blind_to_a_constant(name):
    student, teacher = 5 * torch.randn(500, 7, dtype=torch.float64), 5 * torch.randn(500, 7, dtype=torch.float64)
    found = divergence(name, student, teacher)
    assert found.shape == (500,)
    assert (found >= -1e-12).all()
    moved = divergence(name, student + 100.0, teacher - 30.0)
    torch.testing.assert_close(moved, found, rtol=1e-9, atol=1e-12)


def test_jsd_is_at_most_ln_2_and_reached_by_disjoint_rows():
    found = divergence("jsd", rows([60.0, -60.0]), rows([-60.0, 60.0]))
    assert found.item() == pytest.approx(math.log(2.0), rel=1e-9)


def test_skewed_divergences_are_bounded_where_the_other_side_gives_nothing():
    assert divergence("skew_forward_kl", rows([0.0, -200.0]), rows([-200.0, 0.0])).item() < math.log(10) + 1e-9
    assert divergence("skew_reverse_kl", rows([0.0, -200.0]), rows([-200.0, 0.0])).item() < math.log(10) + 1e-9
    assert divergence("forward_kl", rows([0.0, -200.0]), rows([-200.0, 0.0])).item() > 190


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_logits_are_summed_in_float32(name):
    student, teacher = torch.randn(64, 300).half(), torch.randn(64, 300).half()
    found = divergence(name, student, teacher)
    exact = divergence(name, student.double(), teacher.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)


OURS, THEIRS, NUM = [0, 1, 2, 2, 3], [1, 0, 3, 2], 4
"""Buckets of five student and four teacher tokens; asymmetric, with a tail (3) on both sides."""


def collapsed(probs, buckets):
    return [sum(p for p, b in zip(probs, buckets, strict=True) if b == i) for i in range(NUM)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_buckets_compare_sums_of_probabilities(name, temperature):
    teacher = [0.4, -1.0, 2.0, 0.9]
    buckets = torch.tensor(OURS), torch.tensor(THEIRS), NUM
    found = bucket_divergence(rows(STUDENT), rows(teacher), *buckets, name, temperature)
    student, other = softmax(STUDENT, temperature), softmax(teacher, temperature)
    expected = ORACLES[name](collapsed(student, OURS), collapsed(other, THEIRS))
    assert found.item() == pytest.approx(temperature**2 * expected, rel=1e-10)


def test_bucket_gradient_passes_gradcheck():
    student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    teacher, buckets = torch.randn(3, 4, dtype=torch.float64), (torch.tensor(OURS), torch.tensor(THEIRS), NUM)
    assert torch.autograd.gradcheck(lambda s: bucket_divergence(s, teacher, *buckets, "forward_kl", 2.0), student)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
def test_buckets_bound_the_full_divergence_from_below(name):
    student, teacher = 3 * torch.randn(1000, 9, dtype=torch.float64), 3 * torch.randn(1000, 9, dtype=torch.float64)
    buckets = torch.tensor([0, 1, 2, 3, 4, 5, 5, 5, 5])
    bound = bucket_divergence(student, teacher, buckets, buckets, 6, name, 1.0)
    full = divergence(name, student, teacher)
    assert (bound <= full + 1e-12).all()
    assert (bound < full - 1e-3).float().mean() > 0.9


def test_a_bucket_that_is_empty_on_both_sides_adds_nothing():
    own = torch.arange(5)
    found = bucket_divergence(rows(STUDENT), rows(TEACHER), own, own, 6, "forward_kl", 1.0)
    assert found.item() == pytest.approx(kl(softmax(TEACHER), softmax(STUDENT)), rel=1e-12)


def test_cross_entropy_is_written_out_and_ignores_minus_100():
    logits, labels = torch.tensor([STUDENT, TEACHER, STUDENT], dtype=torch.float64), torch.tensor([3, -100, 0])
    p = softmax(STUDENT)
    found = losses.cross_entropy(losses.log_probs(logits), labels).tolist()
    assert found == pytest.approx([-math.log(p[3]), 0.0, -math.log(p[0])], rel=1e-12)


def test_label_smoothing_spreads_over_the_whole_vocabulary():
    found = losses.cross_entropy(losses.log_probs(rows(STUDENT)), torch.tensor([3]), smoothing=0.1).item()
    p = softmax(STUDENT)
    mean = sum(-math.log(x) for x in p) / len(p)
    assert found == pytest.approx(0.9 * -math.log(p[3]) + 0.1 * mean, rel=1e-12)


def test_token_mean_divides_by_the_positions_of_the_whole_step():
    values = torch.tensor([1.0, 2.0, 4.0])
    assert losses.token_mean(values, 14).item() == pytest.approx(0.5)
    parts = losses.token_mean(values[:1], 14) + losses.token_mean(values[1:], 14)
    assert parts.item() == pytest.approx(0.5)


@pytest.mark.parametrize("length", [64, 512])
def test_a_mean_divergence_does_not_grow_with_length(length):
    student, teacher = rows(STUDENT).expand(length, -1), rows(TEACHER).expand(length, -1)
    found = losses.token_mean(divergence("forward_kl", student, teacher), length)
    assert found.item() == pytest.approx(kl(softmax(TEACHER), softmax(STUDENT)), rel=1e-9)
