"""Divergences between student and teacher, and cross-entropy, per position, in nats. Averaging happens once, in
`token_mean`.

Every function takes unnormalised logits; a constant added to a row changes nothing. Softmax and sums are in float32 (or
float64 where that comes in). Shape suffixes: N positions, V and U vocabularies.
"""

import math

import torch
import torch.nn.functional as F

LN2 = math.log(2.0)
SKEW = 0.1
EMPTY = 1e-30


def log_probs(logits_NV, temperature=1.0):
    """Log-softmax of `logits / temperature` over the last dimension, at least in float32."""
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.log_softmax(wide / temperature, dim=-1)


def forward_kl(student_NV, teacher_NV):
    """KL(teacher || student) per position, nats: mass-covering. Hinton et al. 2015, arXiv 1503.02531, section 2."""
    return _kl(log_probs(teacher_NV), log_probs(student_NV))


def reverse_kl(student_NV, teacher_NV):
    """KL(student || teacher) per position, nats: mode-seeking. Gu et al. 2023 (MiniLLM), arXiv 2306.08543, eq. 1."""
    return _kl(log_probs(student_NV), log_probs(teacher_NV))


def jsd(student_NV, teacher_NV):
    """Jensen-Shannon divergence per position, nats, between 0 and ln 2: the mean of both sides' KL to their even
    mixture. Lin 1991, doi 10.1109/18.61115, eq. 4.1 with equal weights.
    """
    student, teacher = log_probs(student_NV), log_probs(teacher_NV)
    middle = torch.logaddexp(student, teacher) - LN2
    return 0.5 * (_kl(teacher, middle) + _kl(student, middle))


def skew_forward_kl(student_NV, teacher_NV):
    """KL(teacher || 0.1 teacher + 0.9 student) per position, nats: bounded where the student gives a token nothing.
    Ko et al. 2024 (DistiLLM), arXiv 2402.03898, eq. 4, with their alpha of 0.1.
    """
    student, teacher = log_probs(student_NV), log_probs(teacher_NV)
    return _kl(teacher, _mixture(teacher, student))


def skew_reverse_kl(student_NV, teacher_NV):
    """KL(student || 0.1 student + 0.9 teacher) per position, nats. Ko et al. 2024, arXiv 2402.03898, section 3.1."""
    student, teacher = log_probs(student_NV), log_probs(teacher_NV)
    return _kl(student, _mixture(student, teacher))


DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
}


def distillation(student_NV, teacher_NV, divergence="forward_kl", temperature=1.0):
    """`T^2 * divergence(student / T, teacher / T)` per position: with T^2 the gradient keeps its size as T grows.
    Hinton et al. 2015, section 2.
    """
    return temperature**2 * DIVERGENCES[divergence](student_NV / temperature, teacher_NV / temperature)


def bucket_log_probs(log_probs_NV, bucket_of_V, num_buckets):
    """Log of the probability that falls into each bucket, `[N, num_buckets]`; `bucket_of_V[v]` is the bucket of token v.
    An empty bucket gets log 1e-30.
    """
    sums = log_probs_NV.new_zeros(len(log_probs_NV), num_buckets)
    sums = sums.scatter_add(1, bucket_of_V.expand(log_probs_NV.shape), log_probs_NV.exp())
    return (sums + EMPTY).log()


def bucket_divergence(student_NV, teacher_NU, student_buckets, teacher_buckets, num_buckets, divergence, temperature):
    """`T^2 * divergence` between what student and teacher give to each bucket of tokens, per position, nats.

    V and U are the two vocabularies; `student_buckets` `[V]` and `teacher_buckets` `[U]` say which of the `num_buckets`
    a token belongs to. Probabilities are those of the *whole* softmax on either side, so the buckets are proper
    distributions, and the result is a lower bound of the full divergence (data-processing inequality).
    """
    student = bucket_log_probs(log_probs(student_NV, temperature), student_buckets, num_buckets)
    teacher = bucket_log_probs(log_probs(teacher_NU, temperature), teacher_buckets, num_buckets)
    return temperature**2 * DIVERGENCES[divergence](student, teacher)


def cross_entropy(logits_NV, labels_N, smoothing=0.0):
    """`-(1 - s) log p(label) - s mean_v log p(v)` per position, nats; 0 where the label is -100. Labels are already the
    *next* token of each row (`data` shifts them). Szegedy et al. 2015, arXiv 1512.00567, section 7.
    """
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return F.cross_entropy(wide, labels_N, ignore_index=-100, label_smoothing=smoothing, reduction="none")


def token_mean(values_N, num_positions):
    """The one place where positions become a scalar: their sum over the number of valid positions *of the whole
    optimizer step* (all micro-batches, all processes), so that splitting a step changes nothing.
    """
    return values_N.sum() / max(1, num_positions)


def _kl(p_log_NV, q_log_NV):
    return F.kl_div(q_log_NV, p_log_NV, reduction="none", log_target=True).sum(dim=-1)


def _mixture(main, other):
    return torch.logaddexp(main + math.log(SKEW), other + math.log(1.0 - SKEW))
