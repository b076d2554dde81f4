"""Losses on the logits of an output head, computed in chunks of rows. Each chunk's logits give both the losses and
their gradient, so no tensor of size [N, V] is ever stored. Plain PyTorch.

Matrix products are fastest with many rows, the loss formulas with few rows that fit the CPU cache. So a *chunk* of rows
is decoded at once, and its losses are computed in smaller *blocks*. A block's gradient overwrites its logits.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from kdlib import memory

TARGET = 2.0**4
"""Largest gradient entry before a float16 product: leaves headroom for hidden states of a few thousand."""
CACHE_BYTES = 3 * 2**18
"""Size of a block's logits on a CPU: a few such tensors fit its cache."""
CHUNK_BYTES = {"cpu": 36 * 2**20, "cuda": 512 * 2**20}
"""Size of the student and teacher logits of one chunk with `chunk_size="auto"` ..."""
FULL_ROWS = 96
"""... but at least this many rows, because fewer rows are bound by reading the head's weights (LOG.md) ..."""
FREE_SHARE = 0.1
"""... and at most this share of the free memory."""
MIN_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Block:
    """Contiguous rows, of which the first ones are aligned, that is have a teacher signal.

    `aligned` are the positions of these rows among all aligned rows. Each is compared with one teacher row. `extra` are
    the positions of the block's additional teacher rows among all additional ones.
    """

    rows: slice
    aligned: slice
    extra: slice = dataclasses.field(default_factory=lambda: slice(0, 0))

    @property
    def teacher_rows(self):
        """All teacher rows of the block: one per aligned row, then the extra ones."""
        return slice(self.aligned.start + self.extra.start, self.aligned.stop + self.extra.stop)


def chunk_sizes(num_columns, device, chunk_size="auto"):
    """Returns `(chunk_size, block_size)` in rows. `num_columns` is the number of student plus teacher logits per row."""
    kind = torch.device(device).type
    if chunk_size == "auto":
        num_rows = max(FULL_ROWS, int(CHUNK_BYTES.get(kind, CHUNK_BYTES["cuda"]) / (4 * num_columns)))
        chunk_size = max(MIN_ROWS, min(num_rows, int(FREE_SHARE * memory.free(device) / (4 * num_columns))))
    block_size = max(1, CACHE_BYTES // (2 * num_columns)) if kind == "cpu" else chunk_size
    return chunk_size, min(block_size, chunk_size)


def plan_blocks(may_start, is_aligned, chunk_size, block_size, num_extra=None):
    """Splits rows, given in text order, into chunks of blocks. Returns `(order, chunks)`.

    `order` `[N]` is a permutation of the rows that puts the aligned rows of each block first. `chunks` are lists of
    `Block`s. `may_start` `[N]`: a block may start at this row, so that spans are never split. `is_aligned` `[N]`: the
    row has a teacher signal. `num_extra`: additional teacher rows of each aligned row.
    """
    num_aligned = int(is_aligned.sum())
    extra_starts = np.append(0, np.cumsum(np.zeros(num_aligned, int) if num_extra is None else num_extra)).tolist()
    cuts = np.append(np.flatnonzero(may_start), len(may_start))
    order, chunks, start, first_aligned = [], [], 0, 0
    while start < len(may_start):
        last = np.searchsorted(cuts, start + block_size, side="right") - 1
        end = int(cuts[last]) if cuts[last] > start else int(cuts[last + 1])
        rows, mask = np.arange(start, end), is_aligned[start:end]
        order += [rows[mask], rows[~mask]]
        next_aligned = first_aligned + int(mask.sum())
        extra = slice(extra_starts[first_aligned], extra_starts[next_aligned])
        if not chunks or end - chunks[-1][0].rows.start > chunk_size:
            chunks.append([])
        chunks[-1].append(Block(slice(start, end), slice(first_aligned, next_aligned), extra))
        start, first_aligned = end, next_aligned
    return np.concatenate([np.zeros(0, dtype=np.int64), *order]), chunks


def chunked_head_losses(
    hidden_ND, weight_VD, bias_V, chunks, block_losses, weights, teacher_logits=None, extra=(), transform=lambda z: z
):
    """Computes losses on the logits `transform(hidden @ weight.T + bias)`. Returns `(total, terms)`.

    `chunks` are lists of `Block`s that together cover all rows. `block_losses(logits, teacher, block)` returns the loss
    terms of one block, `[P]`, already divided by the counts of the optimizer step. Its `logits` `[n, V]` are float32.
    `teacher_logits(rows)` returns the teacher logits `[m, U]` of a slice of teacher rows; `teacher` is the block's part
    of them, or None. `weights` are P floats. `total` is the weighted sum over blocks and terms; call backward only on
    it. `transform` maps logits elementwise. `extra` are tensors behind `teacher_logits` that also need a gradient (a
    projector's weight).

    Gradients are computed in the forward pass, chunk by chunk, in float32. The backward pass only scales them. If
    products run in float16, each chunk's gradient is first scaled into its range: the loss scaler acts too late for
    that.
    """
    if not torch.is_grad_enabled():
        terms = hidden_ND.new_zeros(len(weights), dtype=torch.float32)
        for chunk in chunks:
            student, teacher = _decode(hidden_ND, weight_VD, bias_V, chunk, teacher_logits)
            for block in chunk:
                logits, teacher_rows = _block_views(student, teacher, chunk, block)
                terms += block_losses(transform(logits), teacher_rows, block).float()
        return (terms * terms.new_tensor(weights)).sum(), terms
    return _HeadLosses.apply(
        chunks, lambda logits, *rest: block_losses(transform(logits), *rest), weights, teacher_logits, hidden_ND, weight_VD,
        bias_V, *extra,
    )  # fmt: skip


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunks, block_losses, weights, teacher_logits, hidden, weight, bias, *extra):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        gradients = [
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and tensor.requires_grad else None
            for tensor in (hidden, None, bias, *extra)
        ]
        if weight.requires_grad:  # in float32 the first chunk overwrites it
            allocate = torch.empty_like if chunks and dtype == torch.float32 else torch.zeros_like
            gradients[1] = allocate(weight, dtype=torch.float32)
        terms = hidden.new_zeros(len(weights), dtype=torch.float32)
        max_rows = max((chunk[-1].rows.stop - chunk[0].rows.start for chunk in chunks), default=0)
        buffer = hidden.new_empty(max_rows, len(weight)) if dtype == torch.float32 else None  # shared by all chunks
        for chunk in chunks:
            with torch.enable_grad():
                student, teacher = _decode(hidden, weight, bias, chunk, teacher_logits, buffer)
                for block in chunk:
                    terms += _losses_to_gradients(student, teacher, chunk, block, block_losses, weights, bool(extra))
                if extra:
                    upstream, scale = _scaled_for_dtype(teacher.detach(), dtype)
                    extra_gradients = torch.autograd.grad(teacher, extra, upstream)
                    for total, gradient in zip(gradients[3:], extra_gradients, strict=True):
                        total += gradient.float() / scale
            _add_products(student, hidden, weight, chunk, gradients, dtype)
            del teacher  # frees it before the next chunk allocates
        ctx.gradients = gradients
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in (hidden, weight, bias, *extra)]
        ctx.mark_non_differentiable(terms)
        return (terms * terms.new_tensor(weights)).sum(), terms

    @staticmethod
    def backward(ctx, scale, _):
        gradients, ctx.gradients = ctx.gradients, None
        # Scaling by 1 would cost a pass over the head. On a GPU, testing for 1 would cost a synchronisation.
        is_one = scale.device.type == "cpu" and scale == 1.0
        scaled = [
            gradient if gradient is None else (gradient if is_one else gradient.mul_(scale)).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *scaled


def _decode(hidden, weight, bias, chunk, teacher_logits, buffer=None):
    """Returns a chunk's student logits, without gradient, and its teacher logits or None; both in float32."""
    rows = slice(chunk[0].rows.start, chunk[-1].rows.stop)
    with torch.no_grad():
        if buffer is None:
            logits = F.linear(hidden[rows], weight, bias).float()
        else:
            logits = torch.mm(hidden[rows], weight.T, out=buffer[: rows.stop - rows.start])
            logits = logits if bias is None else logits.add_(bias)
    teacher_rows = slice(chunk[0].teacher_rows.start, chunk[-1].teacher_rows.stop)
    return logits, None if teacher_logits is None else teacher_logits(teacher_rows).float()


def _block_views(student, teacher, chunk, block):
    """Returns detached views of one block's rows of a chunk's logits."""
    first, first_teacher = chunk[0].rows.start, chunk[0].teacher_rows.start
    student = student[block.rows.start - first : block.rows.stop - first].detach()
    rows = slice(block.teacher_rows.start - first_teacher, block.teacher_rows.stop - first_teacher)
    return student, None if teacher is None else teacher[rows].detach()


def _losses_to_gradients(student, teacher, chunk, block, block_losses, weights, needs_teacher_gradient):
    """Returns the block's loss terms. Overwrites its logits (and its teacher logits, if needed) with their gradients."""
    student, teacher = _block_views(student, teacher, chunk, block)
    leaves = [student.requires_grad_()]
    if needs_teacher_gradient:
        leaves.append(teacher.requires_grad_())
    terms = block_losses(student, teacher, block).float()
    gradients = torch.autograd.grad((terms * terms.new_tensor(weights)).sum(), leaves, materialize_grads=True)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.copy_(gradient)
    return terms.detach()


def _add_products(gradient, hidden, weight, chunk, gradients, dtype):
    """Adds the chunk's gradients of hidden states, head weight and bias, using matrix products in `dtype`."""
    hidden_gradient, weight_gradient, bias_gradient = gradients[:3]
    rows = slice(chunk[0].rows.start, chunk[-1].rows.stop)
    if bias_gradient is not None:
        bias_gradient += gradient.sum(dim=0)
    gradient, scale = _scaled_for_dtype(gradient, dtype)
    with torch.autocast(gradient.device.type, enabled=False):
        gradient, states = gradient.to(dtype), hidden[rows].to(dtype)
        if hidden_gradient is not None:
            hidden_gradient[rows] = (gradient @ weight.to(dtype)).float() / scale
        if weight_gradient is not None and dtype == torch.float32:
            weight_gradient.addmm_(gradient.T, states, beta=float(rows.start > 0))
        elif weight_gradient is not None:
            weight_gradient += (gradient.T @ states).float() / scale


def _scaled_for_dtype(gradient, dtype):
    """Returns the gradient times a power of two that brings it into the range of `dtype`, and that factor."""
    if dtype != torch.float16:
        return gradient, 1.0
    scale = torch.exp2(torch.floor(torch.log2(TARGET / gradient.abs().amax().clamp_min(1e-30))))
    return gradient * scale, scale
