"""The loop: a generator that yields one record per optimizer step."""

import contextlib
import dataclasses
import itertools

import torch

from kdlib import data, schedule


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `parts` are means per position in nats, `shares` fractions of `loss`, `step_s` seconds."""

    step: int
    loss: float
    parts: dict
    shares: dict
    lr: float
    grad_norm: float
    num_tokens: int
    step_s: float


def make_optimizer(objective, config):
    """AdamW over the student (decay on matrices only) and, at its own rate, the projector."""
    trained = [p for p in objective.student.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim >= 2],
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trained if p.ndim < 2], "lr": config.learning_rate, "weight_decay": 0.0},
    ]
    if objective.projector is not None:
        beside = list(objective.projector.parameters())
        groups.append({"params": beside, "lr": config.projector_learning_rate, "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95))


def make_schedule(optimizer, num_steps, warmup):
    """One factor for all groups, counted in optimizer steps of the whole plan."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule.learning_rate_factor(step, num_steps, warmup)
    )


def steps_of(windows, per_step, seed):
    """Endless lists of windows, one an optimizer step; epoch after epoch, each in its own order. ValueError where all
    windows together do not fill one step (of all processes): there would never be one.
    """
    if len(windows) < per_step:
        raise ValueError(f"{len(windows)} windows do not fill one optimizer step of {per_step}; lower the batch size")
    for epoch in itertools.count():
        for indices in data.batch_order(windows, per_step, seed, epoch):
            yield [windows[i] for i in indices]


def train(objective, teacher, windows, num_steps, config, accelerator, clock, pads=(0, 0)):
    """Train for `num_steps` optimizer steps; yields a `StepRecord` after each. The caller may break off at any of them.

    `objective` is an `Objective`; `teacher` maps a batch to a `TeacherSignal`, or is None where no part needs one;
    `windows` are the training windows, `pads` the padding ids of student and teacher. A step's loss and gradient are
    means over its positions, however it is cut into micro-batches and processes.
    """
    optimizer = make_optimizer(objective, config)
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    scheduler = make_schedule(optimizer.optimizer, num_steps, config.warmup)
    per_step = config.batch_size * config.grad_accumulation * accelerator.num_processes
    stream = steps_of(windows, per_step, config.seed)
    objective.train()
    for step in range(1, num_steps + 1):
        started = clock.now()
        batches = _own_share(next(stream), config, accelerator, pads)
        counts = _counts(batches, accelerator)
        parts = {}
        for i, batch in enumerate(batches):
            batch = batch.to(accelerator.device)
            signal = teacher(batch) if teacher else None
            syncing = i == len(batches) - 1  # processes exchange gradients once a step
            with contextlib.nullcontext() if syncing else accelerator.no_sync(prepared):
                loss, values = prepared(batch, signal, counts)
                # gradients are averaged over processes, and ours are already shares of the whole step
                accelerator.backward(loss * accelerator.num_processes)
            for name, value in values.items():
                parts[name] = parts.get(name, 0.0) + value.detach()
        lr = scheduler.get_last_lr()[0]
        norm = _clip(objective, config.max_grad_norm, accelerator, optimizer)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        parts = {name: accelerator.reduce(value, "sum").item() for name, value in parts.items()}
        total, shares = objective.total(parts)
        yield StepRecord(step, total, parts, shares, lr, float(norm), counts["tokens"], clock.now() - started)


def _own_share(windows, config, accelerator, pads):
    """The micro-batches of this process, in order."""
    size = config.batch_size
    mine = range(accelerator.process_index, len(windows) // size, accelerator.num_processes)
    return [data.collate(windows[i * size : (i + 1) * size], *pads) for i in mine]


def _counts(batches, accelerator):
    """Positions of the whole step over all micro-batches and processes."""
    own = [sum(getattr(batch, name) for batch in batches) for name in ("num_labels", "num_aligned", "num_tokens")]
    whole = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
    return dict(zip(("labels", "aligned", "tokens"), whole, strict=True))


def _clip(objective, limit, accelerator, optimizer):
    """Clip student and projector each by its own norm; the student's norm before clipping."""
    accelerator.unscale_gradients(optimizer)
    if objective.projector is not None:
        torch.nn.utils.clip_grad_norm_(objective.projector.parameters(), limit)
    return torch.nn.utils.clip_grad_norm_(objective.student.parameters(), limit)
