"""An output head and the losses behind it, in chunks of rows: value and gradient from one chunk of logits, so that nothing
of size [N, V] is ever kept. Plain PyTorch.
"""

import torch
import torch.nn.functional as F

TARGET = 2.0**10


def head_losses(hidden_ND, weight_VD, bias_V, losses_of, weights, chunk_size, extra=()):
    """`(total, parts)` of losses on the logits `hidden @ weight.T + bias`.

    `losses_of(logits, start)` gives the parts of one chunk, `[P]` in float32, each already a share of the whole step; its
    logits `[n, V]` are float32 rows `start` to `start + n`. `weights` are P floats; `total` is the weighted sum over all
    chunks and parts, the only thing to call backward on. `extra` are tensors that `losses_of` uses by itself and that
    want a gradient too (a projector's weight).

    The gradient is made in the forward pass, a chunk at a time, and only scaled in the backward one. It is kept in
    float32; where the products run in half precision each chunk's is lifted to that format's range first, so that a
    loss scaler, which acts later, finds nothing lost.
    """
    if not torch.is_grad_enabled():
        parts = sum(losses_of(_logits(chunk, weight_VD, bias_V), i) for i, chunk in _chunks(hidden_ND, chunk_size))
        return (parts * parts.new_tensor(weights)).sum(), parts
    return _HeadLosses.apply(losses_of, weights, chunk_size, hidden_ND, weight_VD, bias_V, *extra)


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, losses_of, weights, chunk_size, hidden, weight, bias, *extra):
        into_hidden = torch.zeros_like(hidden, dtype=torch.float32) if hidden.requires_grad else None
        into_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
        into_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and bias.requires_grad else None
        into_extra = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in extra]
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        parts = 0.0
        for start, chunk in _chunks(hidden, chunk_size):
            with torch.enable_grad():
                logits = _logits(chunk, weight, bias).detach().requires_grad_()
                found = losses_of(logits, start)
                total = (found * found.new_tensor(weights)).sum()
                gradient, *others = torch.autograd.grad(total, [logits, *extra], allow_unused=True)
            parts = parts + found.detach()
            for into, other in zip(into_extra, others, strict=True):
                if other is not None:
                    into += other
            if gradient is not None:
                _add_products(gradient, chunk, weight, start, into_hidden, into_weight, into_bias, compute)
        ctx.gradients = into_hidden, into_weight, into_bias, *into_extra
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in (hidden, weight, bias, *extra)]
        ctx.mark_non_differentiable(parts)
        return (parts * parts.new_tensor(weights)).sum(), parts

    @staticmethod
    def backward(ctx, scale, _):
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [g if g is None else g.mul_(scale).to(d) for g, d in zip(gradients, ctx.dtypes, strict=True)]
        return None, None, None, *scaled


def _chunks(hidden, size):
    return [(start, hidden[start : start + size]) for start in range(0, max(1, len(hidden)), size)]


def _logits(hidden, weight, bias):
    return F.linear(hidden.detach(), weight.detach(), None if bias is None else bias.detach()).float()


def _add_products(gradient, chunk, weight, start, into_hidden, into_weight, into_bias, compute):
    """Add the chunk's share of the three gradients, with products of the dtype `compute`."""
    if into_bias is not None:
        into_bias += gradient.sum(dim=0)
    lift = 1.0
    if compute == torch.float16:
        largest = gradient.abs().amax().clamp_min(1e-30)
        lift = torch.exp2(torch.floor(torch.log2(TARGET / largest)))
        gradient = gradient * lift
    with torch.autocast(gradient.device.type, enabled=False):
        gradient, chunk = gradient.to(compute), chunk.to(compute)
        if into_hidden is not None:
            into_hidden[start : start + len(chunk)] = (gradient @ weight.to(compute)).float() / lift
        if into_weight is not None and compute == torch.float32:
            into_weight.addmm_(gradient.T, chunk)
        elif into_weight is not None:
            into_weight += (gradient.T @ chunk).float() / lift
