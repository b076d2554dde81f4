"""How much memory training will take at its height, told before its first step.

A step's memory is not derived but watched: forward and backward passes over a few of the longest windows, as many as fill a
chunk of the head, and over twice as many; every tensor counted while it lives, the highest point noted between one
parameter's gradient and the next. From there on each of these points grows linearly with the number of windows, so each is
known for a whole micro-batch. The highest of them, or an update of the weights, is the peak.
"""

import math

from kdlib import memory
from kdlib.data import batching
from kdlib.data.dataset import longest_windows
from kdlib.training import optimizer, seeds

PHASE = "predicting peak memory, passes"
LIVELY = 1 / 3
"""Measured: with all points told / taken is 1.25 where layers are made anew, with the liveliest alone 0.86 to 0.99."""


def fit(training, total_bytes, on_progress=lambda phase, done, total: None):
    """The `predicted_bytes` of a `loop.TrainLoop`. Where they are more than there is, the student's layers are made anew in
    the backward pass from now on (`TrainLoop.gradient_checkpointing`), if its class can.
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
    """Bytes in use at the height of a `loop.TrainLoop`: what is in use now, the optimizer's state that is still to come,
    and the higher of an update and of the passes over the longest micro-batch, gradients included. Infinite where not even
    the passes that are watched find room. No random number is used up, and no gradient stays. `on_progress(phase, done,
    total)` is called before each of them.
    """
    if training.accelerator.device.type == "cuda":
        memory.release_memory()  # what its allocator keeps for later would count as used
    now = memory.usage(training.accelerator.device)["used_bytes"] or 0
    try:
        return now + _more_bytes(training, now, on_progress)
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        error.__traceback__ = None
        memory.release_memory()
        return math.inf


def _more_bytes(training, now, on_progress):
    """What there will be at the height of a training beside what there is now."""
    trained = [p for p in training.objective.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    state, update = optimizer.memory_of(training.optimizer.optimizer)
    held = gradients if training.config.effective_batch > training.micro_batch else 0  # from one pass to the next
    passes = held + _highest(training, now + held, bool(held), on_progress)
    return round(state + max(passes, gradients + update))


def _highest(training, before, accumulates, on_progress):
    """Bytes at the highest point of the passes over the longest micro-batch; `before`: what is in use besides. With
    `accumulates` gradients are there before them. Where one pass holds the whole micro-batch, none over fewer windows
    is watched.
    """
    objective = training.objective
    objective.train()
    longest = longest_windows(training.windows, training.micro_batch)
    with seeds.preserve_rng_state(training.accelerator.device):
        try:
            on_progress(PHASE, 0, 3)
            found = {
                1: _points(training, longest[-1:])
            }  # the size of a chunk is known from here on, and gradients are there
            few = min(len(longest), -(-objective.rows_at_once[0] // len(longest[-1].student_ids)))
            more = min(len(longest), 2 * few)
            counts = {few, more} if more < len(longest) else {more}
            for count in sorted(counts if accumulates else counts - {1}):
                if not accumulates:
                    objective.zero_grad()
                on_progress(PHASE, len(found), 1 + len(counts))
                found[count] = _points(training, longest[-count:])
        finally:
            objective.zero_grad()
    return _top(few, more, len(longest), before, zip(found.get(few, found[more]), found[more], strict=True))


def _top(few, more, whole, before, points):
    """Bytes at the highest of all points where at least LIVELY of the most is alive: what an allocator keeps where there is
    less was alive elsewhere, and would be counted twice.
    """
    heights = [_height(few, more, whole, before, *point) for point in points]
    most = max(alive for alive, _ in heights)
    return max(alive + kept for alive, kept in heights if alive >= LIVELY * most)


def _height(few, more, whole, before, less, much):
    """`(alive, kept)` bytes at one point of a micro-batch of `whole` windows, from `(alive, in use beside)` of `few` windows
    and of `more`. What is more in use beside than there was `before` is what an allocator keeps: it grows with its blocks.
    """
    kept = [max(0, beside - before) for _, beside in (less, much)]
    growth = (whole - more) / max(1, more - few)
    return tuple(last + max(0, last - first) * growth for first, last in ((less[0], much[0]), kept))


def _points(training, windows):
    """Where the passes over some windows stand highest, `(bytes alive, bytes in use beside)` each: while the teacher runs,
    while the objective does, and up to each parameter's gradient.
    """
    objective, device = training.objective, training.accelerator.device
    weights, measure = objective.weights(), 0 < training.config.share_steps <= training.num_steps
    counts = dict.fromkeys(("labels", "aligned", "spans"), 1)
    batch = batching.collate(windows, *training.layout).to(device)
    points = []
    trained = [p for p in objective.parameters() if p.requires_grad]
    with (
        memory.AllocationTracker(device) as tally,
        memory.gradient_checkpointing_enabled(objective.student, training.gradient_checkpointing),
    ):
        hooks = [p.register_post_accumulate_grad_hook(lambda _: points.append(tally.mark())) for p in trained]
        try:
            signal = training.teacher(batch, **objective.teacher_request(weights)) if training.teacher else None
            points.append(tally.mark())
            with training.accelerator.autocast():
                loss, *_ = objective(batch, signal, counts, weights, measure)
            points.append(tally.mark())
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    return points
