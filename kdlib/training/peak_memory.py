"""Predicts peak training memory before the first step.

The memory of a step is measured, not derived. One forward and backward pass runs over a fraction of the longest
micro-batch, with chunks of the head that are smaller by the same fraction. The peak is recorded between each
parameter's gradient and the next. All of it grows in proportion to the windows, except gradients and casts of weights,
whose sizes are known. The prediction is the highest of these peaks at the full micro-batch, or an update of the weights.
"""

import dataclasses
import math

import torch

from kdlib import memory
from kdlib.data import batching
from kdlib.data.dataset import longest_windows
from kdlib.models import devices
from kdlib.training import optimizer, seeds

PHASE = "predicting peak memory"
MEASURED_SHARE = {"cpu": 1 / 4, "cuda": 1 / 2}
"""Share of the micro-batch that is measured. Passes cost little on a GPU, where the allocator's cache adds noise."""
ADAPTER_BYTES = 16
"""Bytes of an adapter's weight with its gradient and AdamW's state."""
NF4_BYTES = 0.5 + 4 / 64
"""Bytes of a weight in 4 bits, with a scale for 64 of them (Dettmers et al. 2023, arXiv 2305.14314)."""
LIVE_SHARE = 1 / 3
"""Predicted / measured with gradient checkpointing: 1.25 with all points, 0.86 to 0.99 with the point of most live
bytes.
"""


def fit(training, total_bytes, on_progress=lambda phase, done, total: None):
    """Returns the `predicted_bytes` of a `loop.TrainLoop`. If they exceed `total_bytes`, switches gradient
    checkpointing on, provided that the student's class supports it.
    """
    predicted = predicted_bytes(training, on_progress)
    if (
        predicted > total_bytes
        and not training.gradient_checkpointing
        and memory.can_recompute(training.objective.student)
    ):
        training.gradient_checkpointing = True
        predicted = predicted_bytes(training, on_progress)
    return predicted


def predicted_bytes(training, on_progress=lambda phase, done, total: None):
    """Returns the peak bytes in use of a `loop.TrainLoop`, infinite if even the measured pass runs out of memory.

    The sum of the bytes in use now, the optimizer state still to be allocated, and the larger of one update and the
    passes over the longest micro-batch with their gradients. Leaves random states and gradients as they were. Calls
    `on_progress(phase, done, total)` before the pass.
    """
    if training.accelerator.device.type == "cuda":
        memory.release_memory()  # memory cached by the allocator would count as used
    used = memory.usage(training.accelerator.device)["used_bytes"] or 0
    try:
        return used + _additional_bytes(training, used, on_progress)
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        error.__traceback__ = None
        memory.release_memory()
        return math.inf


def predicted_with_adapters(training, rank, on_progress=lambda phase, done, total: None):
    """Returns the peak bytes of the same training with adapters of a rank, on frozen weights and on 4-bit ones: those of
    the passes of training in full, without its gradients and optimizer state. Infinite if memory runs out.
    """
    objective, device = training.objective, training.accelerator.device
    student, head = objective.student, objective.head.weight
    used = memory.usage(device)["used_bytes"] or 0
    on_progress(PHASE, 0, 1)
    try:
        points, scale = _measure(training)
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        return math.inf, math.inf
    head_bytes = _num_bytes([head])  # the gradient of the head is among the fixed bytes
    points = [
        _Point(p.live - p.gradients - head_bytes * (p.fixed > 0), p.other, fixed=p.fixed - head_bytes * (p.fixed > 0))
        for p in points
    ]
    weights = [m.weight for m in student.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head]
    adapters = rank * sum(sum(weight.shape) for weight in weights) * ADAPTER_BYTES
    frozen_size = devices.compute_dtype(training.accelerator).itemsize
    unused = (4 - frozen_size) * sum(weight.numel() for weight in student.parameters())
    lora = used + _peak(points, scale, used, False) + adapters - unused
    return lora, lora - (frozen_size - NF4_BYTES) * sum(weight.numel() for weight in weights)


def _additional_bytes(training, used, on_progress):
    gradients = _num_bytes(p for p in training.objective.parameters() if p.requires_grad)
    state, update = optimizer.memory_of(training.optimizer.optimizer)
    accumulates = training.config.effective_batch > training.micro_batch
    accumulated = gradients if accumulates else 0
    on_progress(PHASE, 0, 1)
    points, scale = _measure(training)
    passes = accumulated + _peak(points, scale, used, accumulates)
    return round(state + max(passes, gradients + update))


@dataclasses.dataclass(frozen=True)
class _Point:
    """Memory at one point of a pass, in bytes: the most live bytes since the point before, and all `other` bytes in use
    on the device then.

    Of the live bytes, `gradients` are those of parameters whose gradient is complete, `last_gradient` of the one that
    was completed last, and `fixed` the rest that does not depend on the number of windows.
    """

    live: float
    other: float
    gradients: float = 0
    last_gradient: float = 0
    fixed: float = 0


def _measure(training):
    """Returns the `_Point`s of a pass over part of the longest micro-batch, and the full one's size relative to it."""
    objective, device = training.objective, training.accelerator.device
    longest = longest_windows(training.windows, training.micro_batch)
    count = math.ceil(MEASURED_SHARE.get(device.type, 1 / 2) * len(longest))
    scale, sizes = len(longest) / count, objective.plan_chunk_sizes()
    objective.train()
    objective.chunk_sizes = tuple(max(1, round(size / scale)) for size in sizes)
    try:
        with seeds.preserve_rng_state(device):
            return _points(training, longest[-count:]), scale
    finally:
        objective.chunk_sizes = sizes
        objective.zero_grad()


def _peak(points, scale, used, accumulates):
    """Returns the bytes at the highest point of a pass that is `scale` times as large, among the points with at least
    LIVE_SHARE of the most live bytes. Elsewhere, memory cached by the allocator was live at another point, and would be
    counted twice. Other bytes beyond those `used` before are cached by the allocator and grow alike. `accumulates`:
    gradients of a former pass exist already, and are not counted.
    """
    heights = []
    for point in points:
        growing = max(0, point.live - point.gradients - point.fixed)
        gradients = point.last_gradient if accumulates else point.gradients
        heights.append((gradients + point.fixed + scale * growing, scale * max(0, point.other - used)))
    most = max(live for live, _ in heights)
    return max(live + cached for live, cached in heights if live >= LIVE_SHARE * most)


def _points(training, windows):
    """Returns the `_Point`s of the passes over some windows: one for the teacher, one for the objective, and one up to
    each parameter's gradient.
    """
    objective, device = training.objective, training.accelerator.device
    weights, measure = objective.weights(), 0 < training.config.share_steps <= training.num_steps
    measure &= any(term.reads != "logits" for term in objective.terms.values())  # of logits it needs little, but time
    counts = dict.fromkeys(("labels", "aligned", "spans"), 1)
    batch = batching.collate(windows, *training.layout).to(device)
    head = objective.head.weight
    fixed = _num_bytes([head] if head.requires_grad else []) + _cast_bytes(
        training.accelerator, objective.student, head
    )
    trained = [p for p in objective.parameters() if p.requires_grad]
    points, complete = [], 0

    def add_point(parameter):
        nonlocal complete
        is_untied = parameter is head and parameter is not objective.student.get_input_embeddings().weight
        size = 0 if is_untied else _num_bytes([parameter])  # the head's own gradient is fixed from the forward pass on
        complete += size
        points.append(_Point(*tracker.mark(), complete, size, fixed))

    with (
        memory.AllocationTracker(device) as tracker,
        memory.gradient_checkpointing_enabled(objective.student, training.gradient_checkpointing),
    ):
        hooks = [p.register_post_accumulate_grad_hook(add_point) for p in trained]
        try:
            signal = training.teacher(batch, **objective.teacher_request(weights)) if training.teacher else None
            points.append(_Point(*tracker.mark()))
            with training.accelerator.autocast():
                loss, *_ = objective(batch, signal, counts, weights, measure)
            points.append(_Point(*tracker.mark(), fixed=fixed))
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return points


def _cast_bytes(accelerator, student, head):
    """Returns the bytes of the copies of weights in lower precision that autocast keeps, except the head's."""
    dtype = devices.compute_dtype(accelerator)
    linear = [m.weight for m in student.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head]
    linear = [weight for weight in linear if weight.is_floating_point()]  # quantised ones are not copied
    return sum(weight.numel() * dtype.itemsize for weight in linear if weight.dtype != dtype)


def _num_bytes(parameters):
    return sum(p.numel() * p.element_size() for p in parameters)
