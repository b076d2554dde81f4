"""Windows -> batches: their order, and how they are packed into rows with little padding."""

import dataclasses
import heapq

import numpy as np
import torch

from kdlib.data.dataset import window_lengths
from kdlib.data.windowing import IGNORE

POOL_STEPS = 64
"""Optimizer steps per length-sorted pool: larger pools waste less padding, smaller ones shuffle better."""
WIDE_ROW = 2048
"""Row width at which attention costs as much as the rest of a layer; measured for SmolLM2-135M on a CPU."""
MIN_GAIN = 1.02
"""Windows are packed if one window per row would cost more than this factor; less is within the estimate's error."""


@dataclasses.dataclass
class Batch:
    """Windows packed into rows and padded on the right: R rows of S student tokens, Q rows of T teacher tokens.

    `student_ids`, `student_windows`, `labels`, `student_scored` are `[R, S]`. `teacher_ids`, `teacher_windows`,
    `teacher_labels`, `teacher_scored` are `[Q, T]`. `*_windows` hold the window number of each position, from 1; 0 is
    padding. Labels are already shifted. `student_rows` and `teacher_rows` `[N]` are the aligned positions as indices
    into the flattened ones, by window; the student's ascend. `student_span_ends` and `teacher_span_ends` `[N]` are the
    exclusive ends of the spans that start there.
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
    student_row_slices: tuple
    """`(row, start, stop)` of each window."""
    teacher_row_slices: tuple
    rows_by_window: tuple
    """Number of aligned positions in each window."""
    window_ids: tuple
    """Indices of the windows within their split."""
    order: tuple
    """Index of each window in the list given to `collate`."""
    batch_id: object = dataclasses.field(default_factory=object, compare=False)
    """Identifies a batch and its copies on other devices."""
    host_copy: object = dataclasses.field(default=None, compare=False)
    """This batch in host memory, or None if it is there."""

    @property
    def student_mask(self):
        """Attention mask: 1 for tokens, 0 for padding."""
        return (self.student_windows > 0).long()

    @property
    def teacher_mask(self):
        return (self.teacher_windows > 0).long()

    @property
    def student_packed(self):
        """Whether any row holds several windows."""
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
        """Number of tokens including padding."""
        return self.student_ids.numel()

    @property
    def num_teacher_computed(self):
        return self.teacher_ids.numel()

    def spans_of(self, side):
        """Returns `(labels, starts, ends)` of one side's spans in flat positions, as arrays. Copies nothing from a GPU."""
        batch = self.host_copy or self
        labels = batch.labels if side == "student" else batch.teacher_labels
        tensors = labels.flatten(), getattr(batch, f"{side}_rows"), getattr(batch, f"{side}_span_ends")
        return tuple(tensor.numpy() for tensor in tensors)

    @property
    def inner_rows(self):
        """The teacher's flat positions inside the spans, that is after their first position, span by span: `[M]`."""
        _, starts, ends = self.spans_of("teacher")
        sizes = np.maximum(ends - starts - 1, 0)
        rows = np.arange(sizes.sum()) + np.repeat(starts + 1 - np.cumsum(sizes) + sizes, sizes)
        return torch.from_numpy(rows).to(self.teacher_ids.device, non_blocking=True)

    def to(self, device):
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {n: v.to(device, non_blocking=True) for n, v in fields.items() if isinstance(v, torch.Tensor)}
        return dataclasses.replace(self, host_copy=self.host_copy or self, **tensors)


def computed_per_token(counts, teacher):
    """Returns tokens with padding per real token, by side. `counts` are sums of the `num_*` properties of `Batch`."""
    sides = ("student", "teacher") if teacher else ("student",)
    return {side: counts[f"{side}_computed"] / counts[f"{side}_tokens"] for side in sides}


def batch_order(windows, per_step, seed, epoch):
    """Returns the window indices of one epoch, `[steps][per_step]`; deterministic for a seed.

    Windows are shuffled, then grouped by student and teacher length within pools of at most `POOL_STEPS` steps, then
    the steps are shuffled. There are at least two pools, so that steps differ between epochs. Windows that do not fill
    a step are skipped in this epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    lengths = np.array([window_lengths(windows, side) for side in ("student", "teacher")])
    num_steps = len(windows) // per_step
    steps = rng.permutation(len(windows))[: num_steps * per_step].reshape(num_steps, per_step)
    pools = np.array_split(steps, max(2, -(-num_steps // POOL_STEPS)))
    steps = np.concatenate([_group_by_length(pool.flatten(), per_step, lengths).reshape(pool.shape) for pool in pools])
    return steps[rng.permutation(num_steps)].tolist()


def _group_by_length(indices, per_step, lengths):
    """Orders indices so that the windows of a step have similar `lengths` `[2, windows]` on both sides: splits
    recursively by the side with the larger relative spread, and sorts a step by length for its micro-batches.
    """
    own_lengths = lengths[:, indices]
    if len(indices) <= per_step:
        return indices[np.argsort(own_lengths.sum(axis=0), kind="stable")]
    side = np.argmax(own_lengths.std(axis=1) / own_lengths.mean(axis=1))
    ordered = indices[np.argsort(own_lengths[side], kind="stable")]
    middle = len(indices) // per_step // 2 * per_step
    return np.concatenate([_group_by_length(half, per_step, lengths) for half in (ordered[:middle], ordered[middle:])])


def pack_rows(lengths, max_row_width):
    """Packs windows of the given lengths into rows: returns one list of window indices per row. Packed rows are at most
    `max_row_width` wide; 0 gives each window a row of its own. For each number of rows, windows are packed longest
    first into the emptiest row. The packing with the lowest `_cost` is returned.
    """
    longest, total = max(lengths), sum(lengths)
    best_rows, best_cost = [[i] for i in range(len(lengths))], _cost(len(lengths), longest) / MIN_GAIN
    for num_rows in range(len(lengths) - 1, 0, -1):
        min_width = max(longest, -(-total // num_rows))
        if min_width > max_row_width or _cost(num_rows, min_width) >= best_cost:
            continue
        rows, width = _fill_rows(lengths, num_rows)
        if width <= max_row_width and _cost(num_rows, width) < best_cost:
            best_rows, best_cost = rows, _cost(num_rows, width)
    return best_rows


def _cost(num_rows, width):
    """Estimates the cost of a forward pass: tokens computed, weighted by the share of attention at this row width."""
    return num_rows * width * (1.0 + width / WIDE_ROW)


def _fill_rows(lengths, num_rows):
    """Packs windows longest first, each into the emptiest row. Returns `(rows, width)`."""
    rows, widths = [[] for _ in range(num_rows)], [(0, row) for row in range(num_rows)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        width, row = heapq.heappop(widths)
        rows[row].append(i)
        heapq.heappush(widths, (width + lengths[i], row))
    return rows, max(widths)[0]


def collate(windows, student_pad=0, teacher_pad=0, max_row_width=(0, 0)):
    """Collates windows into a `Batch`. `max_row_width`: maximum width of packed rows for student and teacher; 0 gives
    each window a row of its own.
    """
    student_rows = pack_rows([len(window.student_ids) for window in windows], max_row_width[0])
    order = tuple(i for row in student_rows for i in row)
    windows, index = [windows[i] for i in order], iter(range(len(order)))
    student_rows = [[next(index) for _ in row] for row in student_rows]
    teacher_rows = pack_rows([len(window.teacher_ids) for window in windows], max_row_width[1])
    student, student_slices = _collate_side(windows, "student", student_rows, student_pad)
    teacher, teacher_slices = _collate_side(windows, "teacher", teacher_rows, teacher_pad)
    rows_by_window, ids = zip(*((len(window.student_rows), window.window_id) for window in windows), strict=True)
    tensors = map(torch.from_numpy, (*student, *teacher))
    return Batch(*tensors, student_slices, teacher_slices, rows_by_window, ids, order)


def _collate_side(windows, side, rows, pad):
    """Returns one side's arrays in the order of `Batch`, and the `(row, start, stop)` of each window."""
    ids, labels, scored, aligned, span_ends = (
        [getattr(window, f"{side}_{name}") for window in windows]
        for name in ("ids", "labels", "scored", "rows", "span_ends")
    )
    slices = [None] * len(windows)
    for row, members in enumerate(rows):
        start = 0
        for i in members:
            slices[i] = row, start, start + len(ids[i])
            start += len(ids[i])
    shape = len(rows), max(stop for _, _, stop in slices)
    fills = (pad, np.int64), (0, np.int64), (IGNORE, np.int64), (False, bool)
    arrays = [np.full(shape, fill, dtype=dtype) for fill, dtype in fills]
    for i, (row, start, stop) in enumerate(slices):
        for array, values in zip(arrays, (ids[i], i + 1, labels[i], scored[i]), strict=True):
            array[row, start:stop] = values
    offsets = [row * shape[1] + start for row, start, _ in slices]
    for positions in (aligned, span_ends):
        arrays.append(np.concatenate([values + offset for values, offset in zip(positions, offsets, strict=True)]))
    return arrays, tuple(slices)
