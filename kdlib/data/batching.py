"""Windows -> batches: in which order, and laid out in rows so that little padding is computed."""

import dataclasses
import heapq

import numpy as np
import torch

from kdlib.data.dataset import window_lengths
from kdlib.data.windowing import IGNORE

POOL_STEPS = 64
"""Optimizer steps among which windows of similar length are put together: more waste less padding, fewer mix better."""
WIDE_ROW = 2048
"""Width of a row at which attention takes as long as all else in a layer; its cost per token grows with the width. Measured
for SmolLM2-135M's layers on a processor (a masked row of 904 tokens costs 1.36 times as much per token as one of 113)."""
ONE_A_ROW = 1.02
"""Several windows share rows where one a row would cost this much more: less is within the estimate's error."""


@dataclasses.dataclass
class Batch:
    """Windows laid out in rows, one or several a row, padded on the right. R rows of S tokens of the student, Q rows of T
    tokens of the teacher, N aligned positions.

    `student_ids student_windows labels student_scored` `[R, S]`, `teacher_ids teacher_windows teacher_labels teacher_scored`
    `[Q, T]`: `*_windows` say which window a position belongs to, k for the k-th of the batch (from 1), 0 for padding; labels
    are shifted. `student_rows`, `teacher_rows` `[N]` index the flattened positions, window by window, the student's in
    ascending order, and `student_span_ends`, `teacher_span_ends` `[N]` end the spans that start there.
    """

    student_ids: torch.Tensor
    student_windows: torch.Tensor
    labels: torch.Tensor
    student_scored: torch.Tensor
    student_rows: torch.Tensor
    student_span_ends: torch.Tensor
    teacher_ids: torch.Tensor
    teacher_windows: torch.Tensor
    teacher_labels: torch.Tensor
    teacher_scored: torch.Tensor
    teacher_rows: torch.Tensor
    teacher_span_ends: torch.Tensor
    student_positions: tuple
    """Where each window lies: `(row, first position, position after its last)`."""
    teacher_positions: tuple
    rows_by_window: tuple
    """How many of the N aligned positions lie in each window."""
    places: tuple
    """Which windows of their split these are."""
    order: tuple
    """Which of the windows that were given is the first here, the second, ..."""
    stamp: object = dataclasses.field(default_factory=object, compare=False)
    """Tells a batch, and its copies on other devices, from any other."""

    @property
    def student_mask(self):
        """1 where there is a token, 0 for padding."""
        return (self.student_windows > 0).long()

    @property
    def teacher_mask(self):
        return (self.teacher_windows > 0).long()

    @property
    def student_packed(self):
        """Whether windows share rows."""
        return len(self.order) > len(self.student_ids)

    @property
    def teacher_packed(self):
        return len(self.order) > len(self.teacher_ids)

    @property
    def num_labels(self):
        return int((self.labels != IGNORE).sum())

    @property
    def num_aligned(self):
        return len(self.student_rows)

    @property
    def num_spans(self):
        return int((self.student_span_ends > self.student_rows).sum())

    @property
    def num_student_tokens(self):
        return int(self.student_mask.sum())

    @property
    def num_teacher_tokens(self):
        return int(self.teacher_mask.sum())

    @property
    def num_student_computed(self):
        """Tokens with padding."""
        return self.student_ids.numel()

    @property
    def num_teacher_computed(self):
        return self.teacher_ids.numel()

    def spans_of(self, side):
        """`(labels, first positions, stops)` of a side's spans, flat, as numpy arrays."""
        labels = self.labels if side == "student" else self.teacher_labels
        found = labels.flatten(), getattr(self, f"{side}_rows"), getattr(self, f"{side}_span_ends")
        return tuple(tensor.cpu().numpy() for tensor in found)

    @property
    def inner_rows(self):
        """The teacher's flat positions inside the spans, between their first position and their end, span by span: `[M]`."""
        firsts, sizes = self.teacher_rows + 1, (self.teacher_span_ends - self.teacher_rows - 1).clamp_min(0)
        span_of = torch.repeat_interleave(sizes)
        return torch.arange(len(span_of), device=sizes.device) + (firsts - sizes.cumsum(0) + sizes)[span_of]

    def to(self, device):
        every = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {n: v.to(device, non_blocking=True) for n, v in every.items() if isinstance(v, torch.Tensor)}
        return Batch(**{**every, **tensors})


def computed_per_token(counts, teacher):
    """Tokens computed for each real one, by side: the student's, and the teacher's where one is run. `counts` holds what
    a `Batch` counts, by name.
    """
    sides = ("student", "teacher") if teacher else ("student",)
    return {side: counts[f"{side}_computed"] / counts[f"{side}_tokens"] for side in sides}


def batch_order(windows, per_step, seed, epoch):
    """The windows' indices of one epoch as optimizer steps of `per_step` each: `[steps][per_step]`, the same for a seed.

    Shuffled; then windows that are about as long as each other, for student and teacher, are put together within pools of
    at most `POOL_STEPS` steps (two pools at least, so that each epoch has other steps), then the steps are shuffled. What
    does not fill a step is left for another epoch's shuffle.
    """
    random = np.random.default_rng([seed, epoch])
    lengths = np.array([window_lengths(windows, side) for side in ("student", "teacher")])
    num_steps = len(windows) // per_step
    steps = random.permutation(len(windows))[: num_steps * per_step].reshape(num_steps, per_step)
    pools = np.array_split(steps, max(2, -(-num_steps // POOL_STEPS)))
    steps = np.concatenate([_alike(pool.flatten(), per_step, lengths).reshape(pool.shape) for pool in pools])
    return steps[random.permutation(num_steps)].tolist()


def _alike(indices, per_step, lengths):
    """Indices ordered so that each step's windows are alike in both `lengths` `[2, windows]`: halved by the side on which
    they differ more, and the halves in the same way, down to a step, which is sorted for its micro-batches.
    """
    both = lengths[:, indices]
    if len(indices) <= per_step:
        return indices[np.argsort(both.sum(axis=0), kind="stable")]
    ordered = indices[np.argsort(both[np.argmax(both.std(axis=1) / both.mean(axis=1))], kind="stable")]
    middle = len(indices) // per_step // 2 * per_step
    return np.concatenate([_alike(half, per_step, lengths) for half in (ordered[:middle], ordered[middle:])])


def pack_rows(lengths, widest):
    """Which windows of these lengths share a row: lists of indices, one a row. One a row where `widest` is 0; else rows that
    several share are at most so wide.

    For each number of rows the longest window goes first, and always into the emptiest row; of these layouts, and one
    window a row, the one with the least `_cost` is taken.
    """
    alone = [[i] for i in range(len(lengths))]
    longest, total = max(lengths), sum(lengths)
    best, least = alone, _cost(len(lengths), longest) / ONE_A_ROW
    for num_rows in range(len(lengths) - 1, 0, -1):
        bound = max(longest, -(-total // num_rows))
        if bound > widest or _cost(num_rows, bound) >= least:
            continue
        rows, width = _shared(lengths, num_rows)
        if width <= widest and _cost(num_rows, width) < least:
            best, least = rows, _cost(num_rows, width)
    return best


def _cost(num_rows, width):
    """What a model's pass over so many rows costs: the tokens computed, each dearer the wider its row, by attention."""
    return num_rows * width * (1.0 + width / WIDE_ROW)


def _shared(lengths, num_rows):
    """`(rows, width)`: the longest windows first, each into the emptiest row."""
    rows, fill = [[] for _ in range(num_rows)], [(0, row) for row in range(num_rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        size, row = heapq.heappop(fill)
        rows[row].append(i)
        heapq.heappush(fill, (size + lengths[i], row))
    return rows, max(fill)[0]


def collate(windows, student_pad=0, teacher_pad=0, widest=(0, 0)):
    """Lay windows out as a `Batch`, padded on the right. `widest`: how wide rows that several windows share may be, for
    student and teacher; 0: each window has a row of its own.
    """
    ours = pack_rows([len(w.student_ids) for w in windows], widest[0])
    order = tuple(i for row in ours for i in row)
    windows, place = [windows[i] for i in order], iter(range(len(order)))
    student, student_positions = _side(windows, "student", [[next(place) for _ in row] for row in ours], student_pad)
    theirs = pack_rows([len(w.teacher_ids) for w in windows], widest[1])
    teacher, teacher_positions = _side(windows, "teacher", theirs, teacher_pad)
    by_window, places = tuple(len(w.student_rows) for w in windows), tuple(w.place for w in windows)
    return Batch(
        *map(torch.from_numpy, (*student, *teacher)), student_positions, teacher_positions, by_window, places, order
    )


def _side(windows, side, rows, pad):
    """One side's arrays of a `Batch`, in its order, and the spots of the windows; `rows` as from `pack_rows`."""
    ids, labels, scored, ends, stops = (
        [getattr(window, f"{side}_{name}") for window in windows]
        for name in ("ids", "labels", "scored", "rows", "span_ends")
    )
    spots = [None] * len(windows)
    for row, members in enumerate(rows):
        filled = 0
        for k in members:
            spots[k] = row, filled, filled + len(ids[k])
            filled += len(ids[k])
    shape = len(rows), max(stop for _, _, stop in spots)
    fills = (pad, np.int64), (0, np.int64), (IGNORE, np.int64), (False, bool)
    whole = [np.full(shape, fill, dtype=dtype) for fill, dtype in fills]
    for k, (row, start, stop) in enumerate(spots):
        for array, values in zip(whole, (ids[k], k + 1, labels[k], scored[k]), strict=True):
            array[row, start:stop] = values
    firsts = [row * shape[1] + start for row, start, _ in spots]
    flat = [np.concatenate([at + first for at, first in zip(each, firsts, strict=True)]) for each in (ends, stops)]
    return (*whole, *flat), tuple(spots)
