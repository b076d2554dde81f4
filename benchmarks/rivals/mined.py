"""Token alignment by minimum edit distance (MinED). Wan et al. 2024 (FuseLLM), arXiv 2401.10491, section 3.3.

The two token sequences of a text are aligned by dynamic time warping over the edit distances of their tokens; where one
token stands against one and they match, the teacher's logits are carried over by a map that gives each teacher token the
student token nearest to it; elsewhere the target is the text itself. In the form of DSKD's baseline (arXiv 2406.17328).
"""

import numpy as np
import torch
import torch.nn.functional as F

FAR = -1e5
"""Logit of a student token that no teacher token maps to."""


def edit_distances(first, second):
    """Levenshtein distances in bytes of every byte string of `first` to every one of `second`, int64 `[A, B]`. None counts
    as the empty string. One row at a time, over all of `second` at once.
    """
    second = [token or b"" for token in second]
    widest = max(map(len, second), default=0)
    padded = np.full((len(second), widest), -1, dtype=np.int64)
    for row, token in zip(padded, second, strict=True):
        row[: len(token)] = list(token)
    lengths = np.array([len(token) for token in second], dtype=np.int64)
    found = np.empty((len(first), len(second)), dtype=np.int64)
    for place, token in enumerate(first):
        before = np.tile(np.arange(widest + 1), (len(second), 1))
        for i, byte in enumerate(token or b"", 1):
            now = np.empty_like(before)
            now[:, 0] = i
            for j in range(1, widest + 1):
                cheaper = np.minimum(before[:, j], now[:, j - 1]) + 1
                now[:, j] = np.minimum(cheaper, before[:, j - 1] + (padded[:, j - 1] != byte))
            before = now
        found[place] = before[np.arange(len(second)), lengths]
    return found


def warp(costs_ST):
    """Dynamic time warping through costs `[S, T]`: for each of the S the list of the T it stands against, in order. Of equal
    ways the diagonal is taken first, then a step of S.
    """
    num, other = costs_ST.shape
    total = np.full((num + 1, other + 1), np.inf)
    total[0, 0] = 0.0
    for diagonal in range(num + other - 1):  # cells of one antidiagonal do not depend on each other
        i = np.arange(max(0, diagonal - other + 1), min(num, diagonal + 1))
        j = diagonal - i
        best = np.minimum(np.minimum(total[i, j], total[i, j + 1]), total[i + 1, j])
        total[i + 1, j + 1] = costs_ST[i, j] + best
    matches, i, j = [[] for _ in range(num)], num - 1, other - 1
    while True:
        matches[i].insert(0, j)
        if i == j == 0:
            return matches
        move = int(np.argmin([total[i, j], total[i, j + 1], total[i + 1, j]]))
        i, j = (i - (move < 2), j - (move != 1))


def nearest(teacher_tokens, student_tokens):
    """The student id nearest to each teacher token, int64 `[len(teacher_tokens)]`: the one with the same bytes, else the
    first with the least edit distance; -1 for a token that says nothing.
    """
    known = [i for i, token in enumerate(student_tokens) if token]
    same = {student_tokens[i]: i for i in reversed(known)}
    found = np.array([same.get(token, -1) if token else -1 for token in teacher_tokens], dtype=np.int64)
    loose = [j for j, token in enumerate(teacher_tokens) if token and found[j] < 0]
    distances = edit_distances([teacher_tokens[j] for j in loose], [student_tokens[i] for i in known])
    for j, row in zip(loose, distances, strict=True):
        found[j] = known[int(row.argmin())]
    return found


def carried(teacher_NU, student_of_U, num_student):
    """Teacher logits `[N, U]` on student tokens `[N, V]`: the largest of those that map to one, FAR for none."""
    kept = student_of_U >= 0
    target = teacher_NU.new_full((len(teacher_NU), num_student), FAR)
    return target.scatter_reduce(1, student_of_U[kept].expand(len(teacher_NU), -1), teacher_NU[:, kept], "amax")


def loss(student_NV, teacher_NU, student_of_U, matched_N, labels_N):
    """KL(target || student) per position, nats, `[N]`: the target is the carried teacher where `matched`, else the label.

    `student_NV` and `teacher_NU` are logits of the same rows; rows without a match may hold anything of the teacher.
    """
    ours = F.log_softmax(student_NV, dim=-1)
    theirs = F.log_softmax(carried(teacher_NU, student_of_U, student_NV.shape[-1]), dim=-1)
    to_teacher = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
    return torch.where(matched_N, to_teacher, F.nll_loss(ours, labels_N, reduction="none"))
