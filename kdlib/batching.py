"""Windows -> batches: in which order, and side by side with padding."""

import dataclasses

import numpy as np
import torch

from kdlib.data import IGNORE


@dataclasses.dataclass
class Batch:
    """Windows side by side, padded on the right. B windows, S and T tokens of student and teacher, N aligned positions.

    `student_ids student_mask labels` `[B, S]`, `teacher_ids teacher_mask teacher_labels` `[B, T]`; `student_rows`,
    `teacher_rows` `[N]` index the flattened `[B * S]` and `[B * T]` positions, in ascending order, and `student_stops`,
    `teacher_stops` `[N]` end the spans that start there. Labels are shifted.
    """

    student_ids: torch.Tensor
    student_mask: torch.Tensor
    labels: torch.Tensor
    teacher_ids: torch.Tensor
    teacher_mask: torch.Tensor
    teacher_labels: torch.Tensor
    student_rows: torch.Tensor
    teacher_rows: torch.Tensor
    student_stops: torch.Tensor
    teacher_stops: torch.Tensor
    rows_by_window: tuple
    """How many of the N aligned positions lie in each window."""
    places: tuple
    """Which windows of their split these are."""

    @property
    def num_labels(self):
        return int((self.labels != IGNORE).sum())

    @property
    def num_aligned(self):
        return len(self.student_rows)

    @property
    def num_spans(self):
        return int((self.student_stops > self.student_rows).sum())

    @property
    def num_tokens(self):
        return int(self.student_mask.sum())

    def to(self, device):
        every = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {n: v.to(device, non_blocking=True) for n, v in every.items() if isinstance(v, torch.Tensor)}
        return Batch(**{**every, **tensors})


def batch_order(windows, per_step, seed, epoch):
    """The windows' indices of one epoch as optimizer steps of `per_step` each: `[steps][per_step]`, the same for a seed.

    Shuffled, then windows of similar length are put together within pools of sixteen steps (less padding), then the
    steps are shuffled. What does not fill a step is left for another epoch's shuffle.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(windows))
    lengths = np.array([len(w.student_ids) for w in windows])
    pool = 16 * per_step
    pools = [order[i : i + pool] for i in range(0, len(order), pool)]
    order = np.concatenate([p[np.argsort(lengths[p], kind="stable")] for p in pools])
    num_steps = len(order) // per_step
    steps = order[: num_steps * per_step].reshape(num_steps, per_step)
    return steps[random.permutation(num_steps)].tolist()


def collate(windows, student_pad=0, teacher_pad=0):
    """Put windows side by side as a `Batch`, padded on the right."""
    student_ids, student_mask = _padded([w.student_ids for w in windows], student_pad)
    teacher_ids, teacher_mask = _padded([w.teacher_ids for w in windows], teacher_pad)
    labels, _ = _padded([w.student_labels for w in windows], IGNORE)
    teacher_labels, _ = _padded([w.teacher_labels for w in windows], IGNORE)
    places = [
        np.concatenate([getattr(w, name) + i * ids.shape[1] for i, w in enumerate(windows)])
        for name, ids in (
            ("student_rows", student_ids),
            ("teacher_rows", teacher_ids),
            ("student_stops", student_ids),
            ("teacher_stops", teacher_ids),
        )
    ]
    arrays = (student_ids, student_mask, labels, teacher_ids, teacher_mask, teacher_labels, *places)
    return Batch(
        *(torch.from_numpy(array) for array in arrays),
        tuple(len(w.student_rows) for w in windows),
        tuple(w.place for w in windows),
    )


def _padded(rows, fill):
    """Rows of different lengths as one `[B, L]` array and its 0/1 mask."""
    width = max(len(row) for row in rows)
    out = np.full((len(rows), width), fill, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
        mask[i, : len(row)] = 1
    return out, mask
