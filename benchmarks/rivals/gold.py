"""The hybrid loss of GOLD: tokens of both vocabularies compared directly, all others by ULD, over merged spans.

Patino et al. 2025, "Unlocking On-Policy Distillation for Any Model Family" (GOLD, in TRL's experimental trainers), with the
defaults of its configuration: JSD with beta 0.5, weights by the share of the teacher's vocabulary that is shared. Shapes: N
spans that both tokenizations delimit, V and U the vocabularies of student and teacher, S the tokens that both have.
"""

import math

import torch

from benchmarks.rivals.uld import sorted_distance

SMALL = 1e-8
"""Probabilities below count as this where a logarithm is taken."""


def merged(log_probs_NV, rest_N):
    """Log-probabilities of a span's first token, each times the likelihood of the tokens that follow in the text: `rest`
    `[N]`, log-likelihood in nats, 0 for a span of one token. Rows of longer spans do not add up to 1.
    """
    return log_probs_NV + rest_N[:, None]


def generalised_jsd(student_NS, teacher_NS, beta):
    """`beta KL(q || m) + (1 - beta) KL(p || m)` with `m = beta q + (1 - beta) p` for student p and teacher q, given as
    log-probabilities that need not add up to 1; per position, nats. Agarwal et al. 2023 (GKD), arXiv 2306.13649, eq. 1.
    """
    student, teacher = (side.clamp_min(math.log(SMALL)) for side in (student_NS, teacher_NS))
    middle = torch.logaddexp(student + math.log(1.0 - beta), teacher + math.log(beta))
    to_teacher = (teacher.exp() * (teacher - middle)).sum(dim=-1)
    to_student = (student.exp() * (student - middle)).sum(dim=-1)
    return beta * to_teacher + (1.0 - beta) * to_student


def hybrid(student_NV, teacher_NU, student_ids_S, teacher_ids_S, beta=0.5):
    """GOLD's loss per span, `[N]`, from (merged) log-probabilities: generalised JSD over the shared tokens `(student_ids[i],
    teacher_ids[i])` times their share of the teacher's vocabulary, and ULD's sorted distance over all others times the rest.
    """
    share = len(teacher_ids_S) / teacher_NU.shape[-1]
    matched = generalised_jsd(student_NV[:, student_ids_S], teacher_NU[:, teacher_ids_S], beta)
    loose = [_without(side, ids).exp() for side, ids in ((student_NV, student_ids_S), (teacher_NU, teacher_ids_S))]
    return share * matched + (1.0 - share) * sorted_distance(*loose)


def _without(values_NV, ids):
    keep = torch.ones(values_NV.shape[-1], dtype=torch.bool, device=values_NV.device)
    keep[ids] = False
    return values_NV[:, keep]
