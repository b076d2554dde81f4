"""Divergences between student and teacher, span likelihoods, and cross-entropy, per position, in nats.

Formulas take log-probabilities from `log_softmax`, in float32 (float64 for float64 inputs). Only `token_mean` averages.
Shape suffixes: N positions, V vocabulary, K kept tokens, C spans, D hidden width, F entries of all segments.
"""

import math

import torch
import torch.nn.functional as F

LN2 = math.log(2.0)
SKEW = 0.1
TINY = 1e-30
MAX_LOG_PROB = -1e-6
"""Upper clamp of a log-probability: closer to 0, float32 cannot represent the probability of the other outcome."""


def at_least_float32(tensor):
    """Converts to float32, but leaves float64 unchanged."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def log_softmax(logits_NV, temperature=1.0):
    """Computes the log-softmax of `logits / temperature` over the last dimension, at least in float32."""
    logits_NV = at_least_float32(logits_NV)
    return F.log_softmax(logits_NV if temperature == 1.0 else logits_NV / temperature, dim=-1)


def forward_kl(student_NV, teacher_NV):
    """KL(teacher || student) per position, nats: mass-covering. Hinton et al. 2015, arXiv 1503.02531, section 2."""
    return _kl(teacher_NV, student_NV)


def reverse_kl(student_NV, teacher_NV):
    """KL(student || teacher) per position, nats: mode-seeking. Gu et al. 2023 (MiniLLM), arXiv 2306.08543, eq. 1."""
    return _kl(student_NV, teacher_NV)


def jsd(student_NV, teacher_NV):
    """Jensen-Shannon divergence per position, nats, in [0, ln 2]: the mean KL of both models to their even mixture. Lin
    1991, doi 10.1109/18.61115, eq. 4.1 with equal weights.
    """
    mixture = torch.logaddexp(student_NV, teacher_NV) - LN2
    return 0.5 * (_kl(teacher_NV, mixture) + _kl(student_NV, mixture))


def skew_forward_kl(student_NV, teacher_NV):
    """KL(teacher || 0.1 teacher + 0.9 student) per position, nats: bounded even if the student's probability is zero.
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
    """Computes `T^2 * divergence` of log-probabilities at temperature T. The factor T^2 keeps the gradient's scale as T
    grows. Hinton et al. 2015, section 2.
    """
    return temperature**2 * DIVERGENCES[divergence](student_NV, teacher_NV)


def bucket_log_probs(log_probs_NV, bucket_of_V, num_buckets):
    """Sums probabilities by bucket and returns their logs, `[N, num_buckets]`; `bucket_of_V[v]` is the bucket of token
    v. An empty bucket gets log 1e-30. Buckets cover the full softmax, so a divergence between buckets is a lower bound
    of the one between tokens (data-processing inequality).
    """
    sums = log_probs_NV.new_zeros(len(log_probs_NV), num_buckets)
    sums = sums.scatter_add(1, bucket_of_V.expand(log_probs_NV.shape), log_probs_NV.exp())
    return (sums + TINY).log()


def top_k_with_tail(student_NV, teacher_NV, k):
    """Reduces both distributions to the union of their top-k tokens and a tail. Returns `(student, teacher, covered)`.

    `student` and `teacher` are log-probabilities `[N, 2k + 1]`. An id in both top-k sets is kept once; its duplicate
    gets log 1e-30 on both sides. `covered` `[N]` is the teacher's probability of the kept tokens. Nothing is
    renormalised, so a divergence of the two is a lower bound of the full one, with equality at k = V.
    """
    k = min(k, student_NV.shape[-1])
    with torch.no_grad():
        ids = torch.cat([teacher_NV.topk(k, dim=-1).indices, student_NV.topk(k, dim=-1).indices], dim=-1)
        ids = ids.sort(dim=-1).values
        is_duplicate = F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    student, teacher = (gather_with_tail(log_probs, ids, is_duplicate) for log_probs in (student_NV, teacher_NV))
    return student, teacher, teacher[:, :-1].exp().sum(dim=-1)


def gather_with_tail(log_probs_NV, ids_NK, is_duplicate_NK=None):
    """Gathers log-probabilities of the tokens `ids_NK` and appends that of all other tokens together: `[N, K + 1]`.
    Entries with `is_duplicate_NK` get log 1e-30.
    """
    kept = log_probs_NV.gather(1, ids_NK)
    if is_duplicate_NK is not None:
        kept = kept.masked_fill(is_duplicate_NK, math.log(TINY))
    tail = log_probs_NV.exp().scatter(1, ids_NK, 0.0).sum(dim=-1, keepdim=True)
    return torch.cat([kept, (tail + TINY).log()], dim=-1)


def segment_log_softmax(logs_F, owner_F, num, temperature=1.0):
    """Computes the log-softmax of `logs / temperature` within each of `num` segments of a flat tensor. `owner_F` `[F]`
    is the segment of each entry.
    """
    scaled = logs_F / temperature
    maxima = torch.full_like(scaled[:1], -torch.inf).expand(num)
    maxima = maxima.scatter_reduce(0, owner_F, scaled.detach(), "amax")
    sums = scaled.new_zeros(num).index_add(0, owner_F, (scaled - maxima[owner_F]).exp())
    return scaled - (maxima + sums.log())[owner_F]


def span_log_probs(token_nats_N, span_of_N, num_spans):
    """Sums token cross-entropies (nats) to span log-likelihoods `[C]`; `span_of_N` is -1 for tokens outside spans."""
    sums = token_nats_N.new_zeros(num_spans + 1)  # the last one is for tokens outside
    return -sums.index_add(0, torch.where(span_of_N < 0, num_spans, span_of_N), token_nats_N)[:-1]


def span_divergence(student_C, teacher_C, divergence="forward_kl", temperature=1.0):
    """Approximate likelihood matching: divergence of the two models' likelihoods of the same span, per span, nats.
    Minixhofer et al. 2025, arXiv 2503.20083, section 3: two outcomes, this text (`p^(1/T)`) and any other.

    The factor T, which the paper lacks, keeps the scale as T grows. For large T it tends to `a log(a / b) - a + b`,
    with a and b the teacher's and student's nats.
    """
    return temperature * DIVERGENCES[divergence](
        _two_outcomes(student_C / temperature), _two_outcomes(teacher_C / temperature)
    )


def cross_entropy(log_probs_NV, labels_N, smoothing=0.0):
    """`-(1 - s) log p(label) - s mean_v log p(v)` per position, nats; 0 if the label is -100. Labels are already
    shifted (by `windowing`) to the next token of each row. Szegedy et al. 2015, arXiv 1512.00567, section 7.
    """
    nats = F.nll_loss(log_probs_NV, labels_N, ignore_index=-100, reduction="none")
    if not smoothing:
        return nats
    uniform_nats = -log_probs_NV.mean(dim=-1).masked_fill(labels_N == -100, 0.0)
    return (1.0 - smoothing) * nats + smoothing * uniform_nats


def one_minus_cosine(student_ND, teacher_ND):
    """`1 - cos` of the angle between two vectors, per position, in [0, 2]: ignores their lengths. Sun et al. 2019
    (PKD), arXiv 1908.09355, eq. 8, normalise in the same sense.
    """
    return 1.0 - F.cosine_similarity(student_ND, teacher_ND, dim=-1)


def info_nce(student_ND, teacher_ND, temperature):
    """InfoNCE per position, nats: cross-entropy of picking the teacher vector of the same row among all N, with logits
    `cosine / temperature`; ln N if all are alike. van den Oord et al. 2018, arXiv 1807.03748, eq. 4.
    """
    cosines = F.normalize(at_least_float32(student_ND), dim=-1) @ F.normalize(at_least_float32(teacher_ND), dim=-1).T
    return -log_softmax(cosines, temperature).diagonal()


def token_mean(values_N, num_positions):
    """Reduces positions to a scalar: their sum divided by the number of valid positions of the *entire optimizer step*
    (all micro-batches, all processes). Splitting a step into micro-batches therefore changes nothing.
    """
    return values_N.sum() / max(1, num_positions)


def _kl(p_log_NV, q_log_NV):
    return F.kl_div(q_log_NV, p_log_NV, reduction="none", log_target=True).sum(dim=-1)


def _mixture(skewed, other):
    return torch.logaddexp(skewed + math.log(SKEW), other + math.log(1.0 - SKEW))


def _two_outcomes(log_prob_C):
    """Returns log p and log(1 - p), `[C, 2]`, the latter without cancellation (Maechler 2012, log1mexp)."""
    log_p = log_prob_C.clamp_max(MAX_LOG_PROB)
    is_likely = log_p > -LN2
    likely = torch.log(-torch.expm1(torch.where(is_likely, log_p, -LN2)))
    unlikely = torch.log1p(-torch.exp(torch.where(is_likely, -LN2, log_p)))
    return torch.stack([log_p, torch.where(is_likely, likely, unlikely)], dim=-1)
