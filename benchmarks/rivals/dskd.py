"""Dual-space distillation with cross-model attention (DSKD-CMA). Zhang et al. 2024, arXiv 2406.17328, section 3.

Shapes of one window: S labelled student positions, T labelled teacher positions, D and E the widths of student and teacher,
V and U their vocabularies. The form is that of the authors' release: a position is compared in the student's space only
where the projected teacher names the right token, and softened divergences have no T^2.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F


class Projectors(torch.nn.Module):
    """The three learned maps: the student's query to the teacher's keys (`2D -> 2E`), the teacher's states to the student's
    width (`E -> D`) and the student's to the teacher's (`D -> E`).
    """

    def __init__(self, student_width, teacher_width):
        super().__init__()
        self.query = torch.nn.Linear(2 * student_width, 2 * teacher_width)
        self.to_student = torch.nn.Linear(teacher_width, student_width)
        self.to_teacher = torch.nn.Linear(student_width, teacher_width)


@dataclasses.dataclass(frozen=True)
class Side:
    """One model at its labelled positions: last hidden `states` `[n, d]`, embeddings `inputs` and `targets` `[n, d]` of the
    token read and of the token to come, `labels` `[n]`; `by_window` says how many of the positions lie in each window.
    """

    states: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    by_window: list


def attended(query_SE, keys_TE, to_student_TD, to_teacher_SE, num_student, num_teacher):
    """Cross-model attention within each window: the teacher's values as each student position sees them `[S, D]`, and the
    student's as each teacher position does `[T, E]`. One score for both ways, `query . key / sqrt(width)`. Positions come
    window by window, `num_student` and `num_teacher` of them in each.
    """
    sides = (query_SE, to_teacher_SE), (keys_TE, to_student_TD)
    split = [[t.split(n) for t in side] for side, n in zip(sides, (num_student, num_teacher), strict=True)]
    there, back = [], []
    for query, ours, key, theirs in zip(*split[0], *split[1], strict=True):
        scores = query @ key.T / math.sqrt(key.shape[-1])
        there.append(scores.softmax(dim=1) @ theirs)
        back.append(scores.T.softmax(dim=1) @ ours)
    return torch.cat(there), torch.cat(back)


def softened_kl(student_NV, teacher_NV, temperature):
    """KL(teacher || student) of logits, both softened, per position, nats."""
    ours, theirs = (F.log_softmax(side / temperature, dim=-1) for side in (student_NV, teacher_NV))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)


def losses(projectors, student, teacher, student_logits_SV, teacher_logits_TU, student_head, teacher_head, temperature):
    """`{name: [] tensor}`, means over labelled positions in nats: `projector` (the projected teacher's cross-entropy),
    `student_space` (its divergence from the student, through the student's fixed head) and `teacher_space` (the
    student's states in the teacher's space, through the teacher's head); section 3.1, with the attention of section 3.2.

    `student` and `teacher` are `Side`s, heads matrices `[V, D]` and `[U, E]`. The value vectors hold the embedding of the
    token to come, as published.
    """
    index = torch.cat([teacher.inputs, teacher.targets], dim=-1)
    query = projectors.query(torch.cat([student.inputs, student.targets], dim=-1).detach())
    value = teacher.states / teacher.states.std() + teacher.targets / teacher.targets.std()
    values = projectors.to_student(value), projectors.to_teacher(student.states)
    moved, back = attended(query, index / index.std(), *values, student.by_window, teacher.by_window)
    told = moved @ student_head.detach().T
    right = (told.argmax(dim=-1) == student.labels).to(told.dtype)
    of_student = softened_kl(student_logits_SV, told.detach(), temperature) * right
    of_teacher = softened_kl(back @ teacher_head.detach().T, teacher_logits_TU, temperature)
    return {
        "projector": F.cross_entropy(told, student.labels),
        "student_space": of_student.mean(),
        "teacher_space": of_teacher.mean(),
    }
