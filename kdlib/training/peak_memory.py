"""Predicts peak training memory before the first step.

The memory of a step is measured, not derived. Forward and backward passes run over a few of the longest windows, as
many as fill a chunk of the head, and over twice as many. The peak is recorded between each parameter's gradient and the
next. From there on each of these peaks grows linearly with the number of windows, so it can be extrapolated to a full
micro-batch. The prediction is the highest of them, or an update of the weights.
"""

import math

from kdlib import memory
from kdlib.data import batching
from kdlib.data.dataset import longest_windows
from kdlib.training import optimizer, seeds

PHASE = "predicting peak memory, passes"
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
    """Returns the peak bytes in use of a `loop.TrainLoop`, infinite if even the measured passes run out of memory.

    The sum of the bytes in use now, the optimizer state still to be allocated, and the larger of one update and the
    passes over the longest micro-batch with their gradients. Leaves random states and gradients as they were. Calls
    `on_progress(phase, done, total)` before each pass.
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


def _additional_bytes(training, used, on_progress):
    trained = [p for p in training.objective.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    state, update = optimizer.memory_of(training.optimizer.optimizer)
    accumulated = gradients if training.config.effective_batch > training.micro_batch else 0
    passes = accumulated + _passes_peak(training, used + accumulated, bool(accumulated), on_progress)
    return round(state + max(passes, gradients + update))


def _passes_peak(training, used, accumulates, on_progress):
    """Returns the peak bytes of passes over the longest micro-batch. `used`: bytes in use before. `accumulates`:
    gradients exist before the pass. If one pass can hold the full micro-batch, no pass over fewer windows is measured.
    """
    objective = training.objective
    objective.train()
    longest = longest_windows(training.windows, training.micro_batch)
    with seeds.preserve_rng_state(training.accelerator.device):
        try:
            on_progress(PHASE, 0, 3)
            points = {1: _points(training, longest[-1:])}  # sets the chunk size, and leaves gradients
            few = min(len(longest), -(-objective.chunk_sizes[0] // len(longest[-1].student_ids)))
            many = min(len(longest), 2 * few)
            counts = {few, many} if many < len(longest) else {many}
            for count in sorted(counts if accumulates else counts - {1}):
                if not accumulates:
                    objective.zero_grad()
                on_progress(PHASE, len(points), 1 + len(counts))
                points[count] = _points(training, longest[-count:])
        finally:
            objective.zero_grad()
    return _peak(few, many, len(longest), used, zip(points.get(few, points[many]), points[many], strict=True))


def _peak(few, many, num_windows, used, points):
    """Returns the bytes at the highest point among those with at least LIVE_SHARE of the most live bytes. Elsewhere,
    memory cached by the allocator was live at another point, and would be counted twice.
    """
    heights = [_extrapolate(few, many, num_windows, used, *point) for point in points]
    most = max(live for live, _ in heights)
    return max(live + cached for live, cached in heights if live >= LIVE_SHARE * most)


def _extrapolate(few, many, num_windows, used, at_few, at_many):
    """Returns `(live, cached)` bytes at one point of a micro-batch of `num_windows`, from `(live, other bytes in use)`
    with `few` and with `many` windows. Other bytes beyond those `used` before are cached by the allocator and grow
    alike.
    """
    cached = [max(0, other - used) for _, other in (at_few, at_many)]
    growth = (num_windows - many) / max(1, many - few)
    return tuple(last + max(0, last - first) * growth for first, last in ((at_few[0], at_many[0]), cached))


def _points(training, windows):
    """Returns the peaks `(live bytes, other bytes in use)` of the passes over some windows: one for the teacher, one
    for the objective, and one up to each parameter's gradient.
    """
    objective, device = training.objective, training.accelerator.device
    weights, measure = objective.weights(), 0 < training.config.share_steps <= training.num_steps
    counts = dict.fromkeys(("labels", "aligned", "spans"), 1)
    batch = batching.collate(windows, *training.layout).to(device)
    points = []
    trained = [p for p in objective.parameters() if p.requires_grad]
    with (
        memory.AllocationTracker(device) as tracker,
        memory.gradient_checkpointing_enabled(objective.student, training.gradient_checkpointing),
    ):
        hooks = [p.register_post_accumulate_grad_hook(lambda _: points.append(tracker.mark())) for p in trained]
        try:
            signal = training.teacher(batch, **objective.teacher_request(weights)) if training.teacher else None
            points.append(tracker.mark())
            with training.accelerator.autocast():
                loss, *_ = objective(batch, signal, counts, weights, measure)
            points.append(tracker.mark())
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return points
