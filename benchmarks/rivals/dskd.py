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
    token read and of the token to come, `labels` `[n]`, and `window` `[n]`, which window a position belongs to.
    """

    states: torch.Tensor
    inputs: torch.Tensor
    targets: torch.Tensor
    labels: torch.Tensor
    window: torch.Tensor


def alignment(query_SE, keys_TE, student_window_S, teacher_window_T):
    """Scores `[S, T]` of cross-model attention, `query . key / sqrt(width)` (eq. 7), -1e5 between different windows."""
    scores = query_SE @ keys_TE.T / math.sqrt(keys_TE.shape[-1])
    return scores.masked_fill(student_window_S[:, None] != teacher_window_T[None], -1e5)


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
    scores = alignment(query, index / index.std(), student.window, teacher.window)
    value = teacher.states / teacher.states.std() + teacher.targets / teacher.targets.std()
    moved = scores.softmax(dim=-1) @ projectors.to_student(value)
    told = moved @ student_head.detach().T
    right = (told.argmax(dim=-1) == student.labels).to(told.dtype)
    back = scores.T.softmax(dim=-1) @ projectors.to_teacher(student.states)
    of_student = softened_kl(student_logits_SV, told.detach(), temperature) * right
    of_teacher = softened_kl(back @ teacher_head.detach().T, teacher_logits_TU, temperature)
    return {
        "projector": F.cross_entropy(told, student.labels),
        "student_space": of_student.mean(),
        "teacher_space": of_teacher.mean(),
    }
