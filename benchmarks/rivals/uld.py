"""Universal logit distillation (ULD). Boizard et al. 2024, arXiv 2402.12030.

Shapes: N paired positions, V and U the vocabularies of student and teacher.
"""

import numpy as np
import torch
import torch.nn.functional as F


def sorted_distance(student_NV, teacher_NU):
    """`sum_i |p_(i) - q_(i)|` of two rows of probabilities, each sorted from the likeliest down, the shorter filled up with
    zeros: the Wasserstein distance where moving mass from any token to any other costs 1 (section 3.2, eq. 5). `[N]`, no
    unit, in [0, 2]; which token is which plays no part.
    """
    student, teacher = descending(student_NV), descending(teacher_NU)
    width = max(student.shape[-1], teacher.shape[-1])
    student, teacher = (F.pad(side, (0, width - side.shape[-1])) for side in (student, teacher))
    return (student - teacher).abs().sum(dim=-1)


def descending(values_NV):
    """Each row from the largest value down. On a processor numpy finds the order, several times as fast as torch."""
    if values_NV.device.type != "cpu":
        return values_NV.sort(dim=-1, descending=True).values
    found = values_NV.detach().numpy()
    if not values_NV.requires_grad:
        return torch.from_numpy(np.sort(found, axis=-1)).flip(-1)
    return values_NV.gather(1, torch.from_numpy(found.argsort(axis=-1)).flip(-1))


def index_pairs(student_rows, teacher_rows):
    """The i-th labelled position of one side with the i-th of the other, as far as both go: the paper cuts both sequences to
    the length of the shorter (section 4.1).
    """
    both = min(len(student_rows), len(teacher_rows))
    return student_rows[:both], teacher_rows[:both]
