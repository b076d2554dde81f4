"""Divergences between student and teacher, likelihoods of spans, and cross-entropy, per position, in nats. Averaging
happens once, in `token_mean`.

Formulas take *log-probabilities*, which `log_probs` makes of logits, once for all of them. Softmax and sums are in float32
(or float64 where that comes in). Shape suffixes: N positions, V and U vocabularies, K kept tokens, C spans.
"""

import math

import torch
import torch.nn.functional as F

LN2 = math.log(2.0)
SKEW = 0.1
TINY = 1e-30
SURE = -1e-6
"""Log-probability above which an outcome counts as certain: closer to 0 float32 can't tell its opposite from nothing."""


def at_least_float32(tensor):
    """The tensor in float32, or in float64 where it comes in that."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def log_softmax(logits_NV, temperature=1.0):
    """Log-softmax of `logits / temperature` over the last dimension, at least in float32."""
    logits_NV = at_least_float32(logits_NV)
    return F.log_softmax(logits_NV if temperature == 1.0 else logits_NV / temperature, dim=-1)


def forward_kl(student_NV, teacher_NV):
    """KL(teacher || student) per position, nats: mass-covering. Hinton et al. 2015, arXiv 1503.02531, section 2."""
    return _kl(teacher_NV, student_NV)


def reverse_kl(student_NV, teacher_NV):
    """KL(student || teacher) per position, nats: mode-seeking. Gu et al. 2023 (MiniLLM), arXiv 2306.08543, eq. 1."""
    return _kl(student_NV, teacher_NV)


def jsd(student_NV, teacher_NV):
    """Jensen-Shannon divergence per position, nats, between 0 and ln 2: the mean of both sides' KL to their even
    mixture. Lin 1991, doi 10.1109/18.61115, eq. 4.1 with equal weights.
    """
    middle = torch.logaddexp(student_NV, teacher_NV) - LN2
    return 0.5 * (_kl(teacher_NV, middle) + _kl(student_NV, middle))


def skew_forward_kl(student_NV, teacher_NV):
    """KL(teacher || 0.1 teacher + 0.9 student) per position, nats: bounded where the student gives a token nothing.
    Ko et al. 2024 (DistiLLM), arXiv 2402.03898, eq. 4, with their alpha of 0.1.
    """
    return _kl(teacher_NV, _mixture(teacher_NV, student_NV))


def skew_reverse_kl(student_NV, teacher_NV):
    """KL(student || 0.1 student + 0.9 teacher) per position, nats. Ko et al. 2024, arXiv 2402.03898, section 3.1."""
    return _kl(student_NV, _mixture(student_NV, teacher_NV))


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def tempered_divergence(student_NV, teacher_NV, divergence="forward_kl", temperature=1.0):
    """`T^2 * divergence` of log-probabilities that were made at temperature T: with T^2 the gradient keeps its size as T
    grows. Hinton et al. 2015, section 2.
    """
    return temperature**2 * DIVERGENCES[divergence](student_NV, teacher_NV)


def bucket_log_probs(log_probs_NV, bucket_of_V, num_buckets):
    """Log of the probability that falls into each bucket, `[N, num_buckets]`; `bucket_of_V[v]` is the bucket of token v.
    An empty bucket gets log 1e-30. Comparing buckets in place of tokens bounds any divergence from below (data-processing
    inequality), since either side's whole softmax is in them.
    """
    sums = log_probs_NV.new_zeros(len(log_probs_NV), num_buckets)
    sums = sums.scatter_add(1, bucket_of_V.expand(log_probs_NV.shape), log_probs_NV.exp())
    return (sums + TINY).log()


def top_k_with_tail(student_NV, teacher_NV, k):
    """The k likeliest tokens of either side, each once, and one more for all others: `(student, teacher, covered)`, the
    first two log-probabilities `[N, 2k + 1]` (an id that both sides name stands there once, its second place is empty:
    log 1e-30 on both sides), `covered` `[N]` the teacher's probability on the kept tokens.

    Two top-64 sets share about 24 ids; counted twice they would be no distribution. Nothing is renormalised, so a
    divergence of the two is a lower bound of the full one, and equals it at k = V.
    """
    k = min(k, student_NV.shape[-1])
    with torch.no_grad():
        both = torch.cat([teacher_NV.topk(k, dim=-1).indices, student_NV.topk(k, dim=-1).indices], dim=-1)
        both = both.sort(dim=-1).values
        again = F.pad(both[:, 1:] == both[:, :-1], (1, 0))
    student, teacher = gather_with_tail(student_NV, both, again), gather_with_tail(teacher_NV, both, again)
    return student, teacher, teacher[:, :-1].exp().sum(dim=-1)


def gather_with_tail(log_probs_NV, ids_NK, again_NK=None):
    """Log-probabilities of the tokens `ids_NK` and, last, of all others together: `[N, K + 1]`. Where `again_NK` is true an
    id stands there a second time and its place is empty (log 1e-30).
    """
    kept = log_probs_NV.gather(1, ids_NK)
    if again_NK is not None:
        kept = kept.masked_fill(again_NK, math.log(TINY))
    rest = log_probs_NV.exp().scatter(1, ids_NK, 0.0).sum(dim=-1, keepdim=True)
    return torch.cat([kept, (rest + TINY).log()], dim=-1)


def segment_log_softmax(logs_F, owner_F, num, temperature=1.0):
    """Log-softmax of `logs / temperature` over the entries of each of `num` owners: distributions of different lengths, one
    behind the other. `owner_F` `[F]` says whose an entry is.
    """
    scaled = logs_F / temperature
    top = torch.full_like(scaled[:1], -torch.inf).expand(num)
    top = top.scatter_reduce(0, owner_F, scaled.detach(), "amax")
    sums = scaled.new_zeros(num).index_add(0, owner_F, (scaled - top[owner_F]).exp())
    return scaled - (top + sums.log())[owner_F]


def span_log_probs(token_nats_N, span_of_N, num_spans):
    """Log-likelihood `[C]` of spans from their tokens' cross-entropies in nats; `span_of_N` is -1 for tokens outside."""
    inside = span_of_N >= 0
    sums = token_nats_N.new_zeros(num_spans)
    return -sums.index_add(0, span_of_N[inside], token_nats_N[inside])


def span_divergence(student_C, teacher_C, divergence="forward_kl", temperature=1.0):
    """Approximate likelihood matching: how far apart the two models' log-likelihoods of the same text are, per span, nats.
    Minixhofer et al. 2025, arXiv 2503.20083, section 3: a divergence of two outcomes, this text (`p^(1/T)`) and any other.

    Times T, so that its size stays the same as T grows (for large T it tends to `a log(a / b) - a + b` with a and b the
    nats that teacher and student spend on the span); the paper has no such factor.
    """
    return temperature * DIVERGENCES[divergence](
        _two_outcomes(student_C / temperature), _two_outcomes(teacher_C / temperature)
    )


def cross_entropy(log_probs_NV, labels_N, smoothing=0.0):
    """`-(1 - s) log p(label) - s mean_v log p(v)` per position, nats; 0 where the label is -100. Labels are already the
    *next* token of each row (`windowing` shifts them). Szegedy et al. 2015, arXiv 1512.00567, section 7.
    """
    nats = F.nll_loss(log_probs_NV, labels_N, ignore_index=-100, reduction="none")
    if not smoothing:
        return nats
    spread = -log_probs_NV.mean(dim=-1).masked_fill(labels_N == -100, 0.0)
    return (1.0 - smoothing) * nats + smoothing * spread


def one_minus_cosine(student_ND, teacher_ND):
    """`1 - cos` of the angle between two vectors, per position, in [0, 2]: blind to their lengths. Sun et al. 2019 (PKD),
    arXiv 1908.09355, eq. 8, normalise in the same sense.
    """
    return 1.0 - F.cosine_similarity(student_ND, teacher_ND, dim=-1)


def info_nce(student_ND, teacher_ND, temperature):
    """`-log` of the share that a student vector gives to the teacher vector of its own row among all N, by cosine over
    `temperature`; per position, nats: ln N where all look alike. van den Oord et al. 2018, arXiv 1807.03748, eq. 4.
    """
    alike = F.normalize(at_least_float32(student_ND), dim=-1) @ F.normalize(at_least_float32(teacher_ND), dim=-1).T
    return -log_softmax(alike, temperature).diagonal()


def token_mean(values_N, num_positions):
    """The one place where positions become a scalar: their sum over the number of valid positions *of the whole
    optimizer step* (all micro-batches, all processes), so that splitting a step changes nothing.
    """
    return values_N.sum() / max(1, num_positions)


def _kl(p_log_NV, q_log_NV):
    return F.kl_div(q_log_NV, p_log_NV, reduction="none", log_target=True).sum(dim=-1)


def _mixture(main, other):
    return torch.logaddexp(main + math.log(SKEW), other + math.log(1.0 - SKEW))


def _two_outcomes(log_prob_C):
    """`[C, 2]`: log p and log(1 - p), the latter without cancellation (Maechler 2012, log1mexp)."""
    this = log_prob_C.clamp_max(SURE)
    near = this > -LN2
    small = torch.log(-torch.expm1(torch.where(near, this, -LN2)))
    large = torch.log1p(-torch.exp(torch.where(near, -LN2, this)))
    return torch.stack([this, torch.where(near, small, large)], dim=-1)
