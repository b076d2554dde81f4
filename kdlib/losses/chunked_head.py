"""An output head and the losses behind it, in chunks of rows: value and gradient from one chunk of logits, so that nothing
of size [N, V] is ever kept. Plain PyTorch.

Products want many rows at a time, the passes of the losses over the logits want few that fit a processor's cache: a
*chunk* of rows is decoded at once, and its losses are worked off in *blocks*. A block's gradient takes the place of its
logits.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from kdlib import memory

TARGET = 2.0**4
"""Where float16 is used, the largest entry of a gradient before a product: hidden states of some thousands still fit."""
CACHE_BYTES = 3 * 2**18
"""Size of a block's logits on a processor: a few such tensors fit its cache."""
CHUNK_BYTES = {"cpu": 36 * 2**20, "cuda": 512 * 2**20}
"""Logits of student and teacher that `auto` decodes at once, or, where a teacher's own head makes them wide ..."""
FULL_ROWS = 96
"""... so many rows: fewer wait for the heads to be read (LOG.md) ..."""
FREE_SHARE = 0.1
"""... but at most this share of the memory that is free."""
MIN_ROWS = 16


@dataclasses.dataclass(frozen=True)
class Block:
    """A stretch of rows, the first of which have a teacher signal: `known` are their places among all rows that have one.
    `more` are the places, among all such, of the rows that they are compared with besides one for each.
    """

    rows: slice
    known: slice
    more: slice = dataclasses.field(default_factory=lambda: slice(0, 0))

    @property
    def others(self):
        """The places of all that the block is compared with: first a row for each known one, then the more."""
        return slice(self.known.start + self.more.start, self.known.stop + self.more.stop)


def chunk_sizes(num_columns, device, chunk_size="auto"):
    """`(chunk, block)`: rows decoded at once, and rows whose losses are worked off at once. `num_columns` counts the
    student's logits of a row and what they are compared with.
    """
    kind = torch.device(device).type
    if chunk_size == "auto":
        wanted = max(FULL_ROWS, int(CHUNK_BYTES.get(kind, CHUNK_BYTES["cuda"]) / (4 * num_columns)))
        chunk_size = max(MIN_ROWS, min(wanted, int(FREE_SHARE * memory.free(device) / (4 * num_columns))))
    block = max(1, CACHE_BYTES // (2 * num_columns)) if kind == "cpu" else chunk_size
    return chunk_size, min(block, chunk_size)


def plan_blocks(may_begin, known, chunk_size, block_size, more=None):
    """`(order, chunks)` of rows that come in the order of the text: `order` `[N]` says in which order to take them, the
    known ones of each block first, `chunks` are the lists of `Block`s for `chunked_head_losses`.

    `may_begin` `[N]`: a block may begin at this row (a span is never cut; a longer one makes a longer block); `known`
    `[N]`: the row has a teacher signal; `more`, one number for each of these: how many rows it is compared with besides.
    """
    before = np.append(0, np.cumsum(np.zeros(int(known.sum()), dtype=np.int64) if more is None else more)).tolist()
    cuts = np.append(np.flatnonzero(may_begin), len(may_begin))
    order, chunks, at, told = [], [], 0, 0
    while at < len(may_begin):
        last = np.searchsorted(cuts, at + block_size, side="right") - 1
        end = int(cuts[last]) if cuts[last] > at else int(cuts[last + 1])
        here = np.arange(at, end)
        order += [here[known[at:end]], here[~known[at:end]]]
        now = told + int(known[at:end].sum())
        block = Block(slice(at, end), slice(told, now), slice(before[told], before[now]))
        if not chunks or end - chunks[-1][0].rows.start > chunk_size:
            chunks.append([])
        chunks[-1].append(block)
        at, told = end, now
    return np.concatenate([np.zeros(0, dtype=np.int64), *order]), chunks


def chunked_head_losses(hidden_ND, weight_VD, bias_V, chunks, block_losses, weights, teacher_logits=None, extra=()):
    """`(total, parts)` of losses on the logits `hidden @ weight.T + bias`.

    `chunks` are lists of `Block`s that together cover all rows. `block_losses(logits, other, block)` gives the parts of one
    block, `[P]`, each already a share of the whole step; its logits `[n, V]` are float32. `teacher_logits(others)` gives what a
    chunk's known rows are compared with, `[m, U]` (a teacher's logits), or is None; `other` is the block's piece of it.
    `weights` are P floats; `total` is the weighted sum over all blocks and parts, the only thing to call backward on.
    `extra` are the tensors behind `teacher_logits` that want a gradient too (a projector's weight).

    The gradient is made in the forward pass, a chunk at a time, and only scaled in the backward one. It is kept in
    float32; where the products run in half precision each chunk's is lifted to that format's range first, so that a
    loss scaler, which acts later, finds nothing lost.
    """
    if not torch.is_grad_enabled():
        parts = hidden_ND.new_zeros(len(weights), dtype=torch.float32)
        for chunk in chunks:
            logits, others = _decode(hidden_ND, weight_VD, bias_V, chunk, teacher_logits)
            parts += sum(block_losses(*_piece(logits, others, chunk, block), block).float() for block in chunk)
        return (parts * parts.new_tensor(weights)).sum(), parts
    return _HeadLosses.apply(chunks, block_losses, weights, teacher_logits, hidden_ND, weight_VD, bias_V, *extra)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, chunks, block_losses, weights, teacher_logits, hidden, weight, bias, *extra):
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        into = [
            torch.zeros_like(tensor, dtype=torch.float32) if tensor is not None and tensor.requires_grad else None
            for tensor in (hidden, None, bias, *extra)
        ]
        if weight.requires_grad:  # in float32 the first chunk overwrites it
            make = torch.empty_like if chunks and compute == torch.float32 else torch.zeros_like
            into[1] = make(weight, dtype=torch.float32)
        parts = hidden.new_zeros(len(weights), dtype=torch.float32)
        most = max((chunk[-1].rows.stop - chunk[0].rows.start for chunk in chunks), default=0)
        room = hidden.new_empty(most, len(weight)) if compute == torch.float32 else None  # one for all chunks
        for chunk in chunks:
            with torch.enable_grad():
                logits, others = _decode(hidden, weight, bias, chunk, teacher_logits, room)
                for block in chunk:
                    parts += _losses_to_gradients(logits, others, chunk, block, block_losses, weights, bool(extra))
                if extra:
                    gradient, lift = _lifted(others.detach(), compute)
                    found = torch.autograd.grad(others, extra, gradient)
                    for total, gradient in zip(into[3:], found, strict=True):
                        total += gradient.float() / lift
            _add_products(logits, hidden, weight, chunk, into, compute)
            del others  # before the next chunk's come
        ctx.gradients = into
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in (hidden, weight, bias, *extra)]
        ctx.mark_non_differentiable(parts)
        return (parts * parts.new_tensor(weights)).sum(), parts

    @staticmethod
    def backward(ctx, scale, _):
        gradients, ctx.gradients = ctx.gradients, None
        # times 1 would be a pass over the head; a card would have to be waited for to know
        whole = scale.device.type == "cpu" and scale == 1.0
        scaled = [
            g if g is None else (g if whole else g.mul_(scale)).to(d)
            for g, d in zip(gradients, ctx.dtypes, strict=True)
        ]
        return None, None, None, None, *scaled


def _decode(hidden, weight, bias, chunk, teacher_logits, room=None):
    """A chunk's logits in float32, without gradient, and what its known rows are compared with."""
    rows = slice(chunk[0].rows.start, chunk[-1].rows.stop)
    with torch.no_grad():
        if room is None:
            logits = F.linear(hidden[rows], weight, bias).float()
        else:
            logits = torch.mm(hidden[rows], weight.T, out=room[: rows.stop - rows.start])
            logits = logits if bias is None else logits.add_(bias)
    others = teacher_logits(slice(chunk[0].others.start, chunk[-1].others.stop)) if teacher_logits is not None else None
    return logits, others if others is None else others.float()


def _piece(logits, others, chunk, block):
    """Views of the block's rows of a chunk."""
    first, start = chunk[0].rows.start, chunk[0].others.start
    ours = logits[block.rows.start - first : block.rows.stop - first].detach()
    theirs = None if others is None else others[block.others.start - start : block.others.stop - start].detach()
    return ours, theirs


def _losses_to_gradients(logits, others, chunk, block, block_losses, weights, into_others):
    """The block's parts; its logits (and what they are compared with, where that learns) become their gradients."""
    ours, theirs = _piece(logits, others, chunk, block)
    leaves = [ours.requires_grad_()]
    if into_others:
        leaves.append(theirs.requires_grad_())
    found = block_losses(ours, theirs, block).float()
    gradients = torch.autograd.grad((found * found.new_tensor(weights)).sum(), leaves, materialize_grads=True)
    with torch.no_grad():
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.copy_(gradient)
    return found.detach()


def _add_products(gradient, hidden, weight, chunk, into, compute):
    """Add the chunk's share of the gradients of hidden states, head and bias, with products of the dtype `compute`."""
    into_hidden, into_weight, into_bias = into[:3]
    rows = slice(chunk[0].rows.start, chunk[-1].rows.stop)
    if into_bias is not None:
        into_bias += gradient.sum(dim=0)
    gradient, lift = _lifted(gradient, compute)
    with torch.autocast(gradient.device.type, enabled=False):
        gradient, states = gradient.to(compute), hidden[rows].to(compute)
        if into_hidden is not None:
            into_hidden[rows] = (gradient @ weight.to(compute)).float() / lift
        if into_weight is not None and compute == torch.float32:
            into_weight.addmm_(gradient.T, states, beta=float(rows.start > 0))
        elif into_weight is not None:
            into_weight += (gradient.T @ states).float() / lift


def _lifted(gradient, compute):
    """The gradient times a power of two that brings it into the range of `compute`, and that factor."""
    if compute != torch.float16:
        return gradient, 1.0
    lift = torch.exp2(torch.floor(torch.log2(TARGET / gradient.abs().amax().clamp_min(1e-30))))
    return gradient * lift, lift
