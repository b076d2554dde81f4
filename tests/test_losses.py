"""Every divergence against sums written out in plain Python floats (float64), and the laws it must obey."""

import math

import pytest
import torch

from kdlib.losses import divergences

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
NAMES = sorted(divergences.DIVERGENCES)


def rows(values, requires_grad=False):
    return torch.tensor([values], dtype=torch.float64, requires_grad=requires_grad)


def divergence(name, student, teacher, temperature=1.0):
    """Of logits."""
    made = [divergences.log_softmax(logits, temperature) for logits in (student, teacher)]
    return divergences.tempered_divergence(*made, name, temperature)


def bucket_divergence(student, teacher, student_buckets, teacher_buckets, num, name, temperature):
    """Of logits."""
    pairs = (student, student_buckets), (teacher, teacher_buckets)
    told = [divergences.bucket_log_probs(divergences.log_softmax(made, temperature), own, num) for made, own in pairs]
    return divergences.tempered_divergence(*told, name, temperature)


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
    found = divergences.cross_entropy(divergences.log_softmax(logits), labels).tolist()
    assert found == pytest.approx([-math.log(p[3]), 0.0, -math.log(p[0])], rel=1e-12)


def test_label_smoothing_spreads_over_the_whole_vocabulary():
    found = divergences.cross_entropy(divergences.log_softmax(rows(STUDENT)), torch.tensor([3]), smoothing=0.1).item()
    p = softmax(STUDENT)
    mean = sum(-math.log(x) for x in p) / len(p)
    assert found == pytest.approx(0.9 * -math.log(p[3]) + 0.1 * mean, rel=1e-12)


def test_token_mean_divides_by_the_positions_of_the_whole_step():
    values = torch.tensor([1.0, 2.0, 4.0])
    assert divergences.token_mean(values, 14).item() == pytest.approx(0.5)
    parts = divergences.token_mean(values[:1], 14) + divergences.token_mean(values[1:], 14)
    assert parts.item() == pytest.approx(0.5)


@pytest.mark.parametrize("length", [64, 512])
def test_a_mean_divergence_does_not_grow_with_length(length):
    student, teacher = rows(STUDENT).expand(length, -1), rows(TEACHER).expand(length, -1)
    found = divergences.token_mean(divergence("forward_kl", student, teacher), length)
    assert found.item() == pytest.approx(kl(softmax(TEACHER), softmax(STUDENT)), rel=1e-9)


def top_k_by_hand(student, teacher, k):
    """Probabilities of the kept ids and of all others, each once."""
    best = [sorted(range(len(p)), key=lambda i, p=p: -p[i])[:k] for p in (student, teacher)]
    kept = sorted({*best[0], *best[1]})
    return [[*(p[i] for i in kept), sum(x for i, x in enumerate(p) if i not in kept)] for p in (student, teacher)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_top_k_keeps_each_likely_token_once_and_a_tail(name, k):
    made = [divergences.log_softmax(rows(values)) for values in (STUDENT, TEACHER)]
    student, teacher, covered = divergences.top_k_with_tail(*made, k)
    expected = top_k_by_hand(softmax(STUDENT), softmax(TEACHER), k)
    kept, tail = sum(expected[1][:-1]), [p for p in expected if p[-1] > 0]
    assert covered.item() == pytest.approx(kept, rel=1e-12)
    assert student.exp().sum().item() == pytest.approx(1.0, rel=1e-12)
    assert teacher.exp().sum().item() == pytest.approx(1.0, rel=1e-12)
    if len(tail) == 2:
        assert divergences.DIVERGENCES[name](student, teacher).item() == pytest.approx(
            ORACLES[name](*expected), rel=1e-9
        )


@pytest.mark.parametrize("name", NAMES)
def test_top_k_with_tail_is_a_lower_bound_in_a_thousand_cases_and_equal_at_all(name):
    made = [divergences.log_softmax(3 * torch.randn(1000, 12, dtype=torch.float64)) for _ in range(2)]
    full = divergences.DIVERGENCES[name](*made)
    before = torch.zeros(1000, dtype=torch.float64)
    for k in (1, 3, 6):
        student, teacher, _ = divergences.top_k_with_tail(*made, k)
        bound = divergences.DIVERGENCES[name](student, teacher)
        assert (bound <= full + 1e-12).all()
        assert (bound >= before - 1e-12).all()  # more tokens can only tell more
        before = bound
    for k in (12, 500):
        student, teacher, covered = divergences.top_k_with_tail(*made, k)
        torch.testing.assert_close(divergences.DIVERGENCES[name](student, teacher), full, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(covered, torch.ones(1000, dtype=torch.float64))


def test_top_k_gradient_passes_gradcheck():
    teacher = divergences.log_softmax(torch.randn(3, 7, dtype=torch.float64))

    def divergence(logits):
        student, other, _ = divergences.top_k_with_tail(divergences.log_softmax(logits), teacher, 2)
        return divergences.forward_kl(student, other)

    assert torch.autograd.gradcheck(divergence, torch.randn(3, 7, dtype=torch.float64, requires_grad=True))


def test_spans_add_up_their_tokens():
    nats = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    found = divergences.span_log_probs(nats, torch.tensor([0, -1, 2, 2, 0]), 3)
    assert found.tolist() == [-8.5, 0.0, -6.0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 20.0])
def test_span_divergence_is_that_of_two_coins_times_temperature(name, temperature):
    ours, theirs = [-0.3, -7.0, -2.5], [-0.4, -3.0, -2.5]
    found = divergences.span_divergence(
        *(torch.tensor(x, dtype=torch.float64) for x in (ours, theirs)), name, temperature
    )
    for value, a, b in zip(found.tolist(), ours, theirs, strict=True):
        p, q = math.exp(a / temperature), math.exp(b / temperature)
        assert value == pytest.approx(temperature * ORACLES[name]([p, 1 - p], [q, 1 - q]), rel=1e-6, abs=1e-12)
    assert found[2].item() == pytest.approx(0.0, abs=1e-12)


def test_span_divergence_keeps_its_size_as_the_temperature_grows():
    """For large T the coins become rates: a log(a / b) - a + b with the nats a of the teacher and b of the student."""
    ours, theirs = torch.tensor([-7.0], dtype=torch.float64), torch.tensor([-3.0], dtype=torch.float64)
    found = divergences.span_divergence(ours, theirs, "forward_kl", 1e4).item()
    assert found == pytest.approx(3.0 * math.log(3.0 / 7.0) - 3.0 + 7.0, rel=1e-3)


def test_span_divergence_of_certain_and_impossible_spans_is_finite_and_passes_gradcheck():
    ours = torch.tensor([0.0, -200.0, -1e-9, -0.5], requires_grad=True)
    found = divergences.span_divergence(ours, torch.tensor([-200.0, 0.0, 0.0, -0.7]))
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(ours.grad).all()
    wide = torch.tensor([-0.1, -0.6, -0.8, -9.0], dtype=torch.float64, requires_grad=True)
    theirs = torch.tensor([-0.9, -0.2, -0.8, -3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: divergences.span_divergence(x, theirs, "forward_kl", 2.0), wide)


def test_one_minus_cosine_is_written_out_and_blind_to_length():
    ours, theirs = [1.0, 2.0, -1.0], [0.5, -1.0, 3.0]
    dot = sum(a * b for a, b in zip(ours, theirs, strict=True))
    lengths = math.sqrt(sum(a * a for a in ours)) * math.sqrt(sum(b * b for b in theirs))
    found = divergences.one_minus_cosine(rows(ours), 7.0 * rows(theirs)).item()
    assert found == pytest.approx(1.0 - dot / lengths, rel=1e-12)
    assert divergences.one_minus_cosine(rows(ours), 3.0 * rows(ours)).item() == pytest.approx(0.0, abs=1e-12)
    assert divergences.one_minus_cosine(rows(ours), -rows(ours)).item() == pytest.approx(2.0, rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: divergences.one_minus_cosine(x, rows(theirs)), rows(ours, requires_grad=True)
    )


def test_info_nce_is_written_out_and_ln_n_where_nothing_differs():
    ours, theirs = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found = divergences.info_nce(ours, theirs, 0.5)
    for i in range(4):
        cosines = [1.0 - divergences.one_minus_cosine(ours[i : i + 1], theirs[j : j + 1]).item() for j in range(4)]
        weights = [math.exp(c / 0.5) for c in cosines]
        assert found[i].item() == pytest.approx(-math.log(weights[i] / sum(weights)), rel=1e-9)
    assert divergences.info_nce(ours, theirs[:1].expand(4, 3), 0.5).tolist() == pytest.approx([math.log(4)] * 4)
    assert (divergences.info_nce(10 * torch.eye(4), torch.eye(4), 0.01) < 1e-4).all()
    assert torch.autograd.gradcheck(lambda x: divergences.info_nce(x, theirs, 0.5), ours.requires_grad_())
