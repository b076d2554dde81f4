"""The loop: a generator that yields one record per optimizer step."""

import contextlib
import dataclasses
import itertools
import math

import torch

from kdlib import batching, schedule


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `parts` are means per position in nats, unweighted, `weights` what each was taken times, `shares`
    fractions of `loss`, `step_s` seconds.

    `grad_shares`: what each part's weighted gradient is of the sum of all parts' gradient norms, where they touch the
    student (`Objective.forward`); None where it was not measured. `figures`: values that are no losses (`kd_covered`: the
    teacher's probability that `kd_top_k` keeps; `routing_0`, ...: mean weight of each tapped teacher layer). `skipped`: why
    this step changed nothing, or empty.
    """

    step: int
    loss: float
    parts: dict
    shares: dict
    lr: float
    grad_norm: float
    num_tokens: int
    step_s: float
    weights: dict
    figures: dict
    grad_shares: dict | None
    skipped: str


def make_optimizer(objective, config):
    """AdamW over the student (decay on matrices only) and, at a rate of its own, what is trained beside it."""
    trained = [p for p in objective.student.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim >= 2],
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in trained if p.ndim < 2], "lr": config.learning_rate, "weight_decay": 0.0},
    ]
    beside = list(objective.beside.parameters())
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
        for indices in batching.batch_order(windows, per_step, seed, epoch):
            yield [windows[i] for i in indices]


def train(objective, teacher, windows, num_steps, config, accelerator, clock, pads=(0, 0)):
    """Train for `num_steps` optimizer steps; yields a `StepRecord` after each. The caller may break off at any of them.

    `objective` is an `Objective`; `teacher` maps a batch to a `TeacherSignal`, or is None where no part needs one;
    `windows` are the training windows, `pads` the padding ids of student and teacher. A step's loss and gradient are
    means over its positions, however it is cut into micro-batches and processes.

    A step whose loss or gradient is no number changes no weight; FloatingPointError after `non_finite_steps` in a row.
    """
    optimizer = make_optimizer(objective, config)
    prepared, optimizer = accelerator.prepare(objective, optimizer)
    scheduler = make_schedule(optimizer.optimizer, num_steps, config.warmup)
    per_step = config.batch_size * config.grad_accumulation * accelerator.num_processes
    stream = steps_of(windows, per_step, config.seed)
    targets = config.target_shares()
    balance = schedule.Balance(targets) if targets else None
    in_a_row = 0
    objective.train()
    for step in range(1, num_steps + 1):
        started = clock.now()
        taken = next(stream)
        weights = _weights(objective, balance, (step - 1) / num_steps)
        batches = _own_share(taken, config, accelerator, pads)
        counts = _counts(batches, accelerator)
        measure = config.share_steps > 0 and step % config.share_steps == 0
        found = []
        for i, batch in enumerate(batches):
            batch = batch.to(accelerator.device)
            signal = teacher(batch, **objective.wants(weights)) if teacher else None
            syncing = i == len(batches) - 1  # processes exchange gradients once a step
            with contextlib.nullcontext() if syncing else accelerator.no_sync(prepared):
                loss, values, squares = prepared(batch, signal, counts, weights, measure)
                # gradients are averaged over processes, and ours are already shares of the whole step
                accelerator.backward(loss * accelerator.num_processes)
            found.append(({name: value.detach() for name, value in values.items()}, squares))
        lr = scheduler.get_last_lr()[0]
        norm = _clip(objective, config.max_grad_norm, accelerator, optimizer)
        values, squares = (_summed([pair[side] for pair in found], accelerator) for side in (0, 1))
        parts = {name: value for name, value in values.items() if name in objective.parts}
        figures = {name: value for name, value in values.items() if name not in parts}
        total, shares = objective.total(parts, weights)
        skipped = _no_number(parts, norm, accelerator.scaler)
        if skipped and accelerator.scaler is None:
            optimizer.zero_grad()  # without gradients the step changes nothing; a loss scaler sees to it by itself
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if balance and not skipped:
            balance.update(parts)
        in_a_row = in_a_row + 1 if skipped else 0
        if skipped:
            skipped += f" (documents {_documents(taken)})"
        yield StepRecord(
            step, total, parts, shares, lr, norm, counts["tokens"], clock.now() - started, weights, figures,
            _norm_shares(squares), skipped,
        )  # fmt: skip
        if in_a_row >= config.non_finite_steps:
            raise FloatingPointError(
                f"{in_a_row} steps in a row had a loss or gradient that is no number, the last one: {skipped}; "
                "lower learning_rate, or look at these documents"
            )


def _weights(objective, balance, progress):
    """The weights of a step at `progress` of the plan."""
    weights = objective.weights(progress)
    if balance is None:
        return weights
    return balance.weights(weights, {name: objective.phase_factor(name, progress) for name in weights})


def _own_share(windows, config, accelerator, pads):
    """The micro-batches of this process, in order."""
    size = config.batch_size
    mine = range(accelerator.process_index, len(windows) // size, accelerator.num_processes)
    return [batching.collate(windows[i * size : (i + 1) * size], *pads) for i in mine]


def _counts(batches, accelerator):
    """Positions of the whole step over all micro-batches and processes."""
    names = ("labels", "aligned", "spans", "tokens")
    own = [sum(getattr(batch, f"num_{name}") for batch in batches) for name in names]
    whole = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
    return dict(zip(names, whole, strict=True))


def _summed(found, accelerator):
    """Tensors `[]` by name, added up over micro-batches and processes, as floats. One transfer from the device."""
    names = list(found[0])
    if not names:
        return {}
    own = torch.stack([torch.stack([values[name].float() for name in names]) for values in found]).sum(dim=0)
    return dict(zip(names, accelerator.reduce(own, "sum").tolist(), strict=True))


def _norm_shares(squares):
    norms = {name: math.sqrt(square) for name, square in squares.items()}
    whole = sum(norms.values())
    return {name: norm / whole for name, norm in norms.items()} if whole else None


def _no_number(parts, norm, scaler):
    """Which part of the step, or its gradient, is not finite; empty where all is well. The same on every process."""
    bad = sorted(name for name, value in parts.items() if not math.isfinite(value))
    if bad:
        return f"{', '.join(bad)} not finite"
    if not math.isfinite(norm):
        return "gradient not finite" + ("" if scaler is None else f" at loss scale {scaler.get_scale():.0f}, lowered")
    return ""


def _documents(windows):
    return ", ".join(map(str, sorted({window.document for window in windows})))


def _clip(objective, limit, accelerator, optimizer):
    """Clip the student and what is trained beside it, each by its own norm; the student's norm before clipping. Not finite
    where either is not.
    """
    accelerator.unscale_gradients(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(objective.student.parameters(), limit))
    if len(objective.beside):
        beside = float(torch.nn.utils.clip_grad_norm_(objective.beside.parameters(), limit))
        norm = norm if math.isfinite(beside) else beside
    return norm
