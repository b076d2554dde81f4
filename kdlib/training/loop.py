"""The loop: a generator that yields one record per optimizer step, and all that it needs to go on elsewhere."""

import contextlib
import dataclasses
import itertools
import math

import torch

from kdlib import memory
from kdlib.data import batching
from kdlib.models import loading
from kdlib.training import ema, optimizer, schedule, seeds


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `parts` are means per position in nats, unweighted, `weights` what each was taken times, `shares`
    fractions of `loss`, `step_s` seconds.

    `grad_shares`: what each part's weighted gradient is of the sum of all parts' gradient norms, where they touch the
    student (`Objective.forward`); None where it was not measured. `figures`: values that are no losses (`kd_covered`: the
    teacher's probability that `kd_top_k` keeps; `kd_positions`: the share of learned positions with a signal, by
    `inside_tokens`; `routing_0`, ...: mean weight of each tapped teacher layer). `skipped`: why this step changed nothing,
    or empty.
    `micro_batch`: windows in one forward pass. `computed_per_token`: by side, tokens with padding for each one without.
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
    micro_batch: int
    computed_per_token: dict


def steps_of(windows, per_step, seed, start=0):
    """Endless lists of windows, one an optimizer step; epoch after epoch, each in its own order. The first `start` are
    passed over. ValueError where all windows together do not fill one step (of all processes): there would never be one.
    """
    if len(windows) < per_step:
        raise ValueError(f"{len(windows)} windows do not fill one optimizer step of {per_step}; lower the batch size")
    first, passed = divmod(start, len(windows) // per_step)
    for epoch in itertools.count(first):
        order = batching.batch_order(windows, per_step, seed, epoch)
        for indices in order[passed if epoch == first else 0 :]:
            yield [windows[i] for i in indices]


class TrainLoop:
    """A student in training: iterate over it for a `StepRecord` after each of `num_steps` optimizer steps. It may be left
    after any of them, and gone on with by another object, elsewhere, that was given its `tensors` and `facts`.

    `objective` is an `Objective`; `teacher` maps a batch to a `TeacherSignal`, or is None where no part needs one; one that
    works ahead (`prefetch.PrefetchingTeacher`) is asked for each batch while the student learns from the one before; `windows` are the
    training windows, `pads` and `widest` as for `batching.collate`. A step's loss and gradient are means over its positions,
    however it is cut into micro-batches and processes; where memory runs out, it is taken again with half the micro-batch.
    Where `gradient_checkpointing` is set, layers are made anew in the backward pass.

    A step whose loss or gradient is no number changes no weight; FloatingPointError after `non_finite_steps` in a row.
    """

    def __init__(self, objective, teacher, windows, num_steps, config, accelerator, clock, pads=(0, 0), widest=(0, 0)):
        self.objective, self.teacher, self.windows, self.num_steps = objective, teacher, windows, num_steps
        self.config, self.accelerator, self.clock, self.layout = config, accelerator, clock, (*pads, widest)
        self.asks = hasattr(teacher, "ask")
        self.prepared, self.optimizer = accelerator.prepare(objective, optimizer.make_optimizer(objective, config))
        self.scheduler = optimizer.make_schedule(self.optimizer.optimizer, num_steps, config.warmup)
        self.average = ema.average(objective.student, config.ema_decay) if config.use_ema else None
        targets = config.target_shares()
        self.balance = schedule.Balance(targets) if targets else None
        self.step, self.in_a_row, self.micro_batch = 0, 0, config.batch_size
        self.collated = (None, None, None)
        self.gradient_checkpointing = config.gradient_checkpointing == "on"

    def __iter__(self):
        per_step = self.config.effective_batch * self.accelerator.num_processes
        self.objective.train()
        try:
            for taken, coming in itertools.pairwise(steps_of(self.windows, per_step, self.config.seed, self.step)):
                if self.step >= self.num_steps:
                    return
                record = self._step(taken, coming)
                yield record
                if self.in_a_row >= self.config.non_finite_steps:
                    raise FloatingPointError(self._no_way_on(record))
        finally:
            if self.asks:
                self.teacher.cancel()

    def _step(self, taken, coming):
        """One optimizer step on these windows; those of the next one are `coming`."""
        started = self.clock.now()
        weights = self._weights(self.step / self.num_steps)
        measure = self.config.share_steps > 0 and (self.step + 1) % self.config.share_steps == 0
        counts, found = self._gradients_that_fit(taken, weights, measure, coming)
        lr = self.scheduler.get_last_lr()[0]
        norm = _clip(self.objective, self.config.max_grad_norm, self.accelerator, self.optimizer)
        values, squares = (_summed([pair[side] for pair in found], self.accelerator) for side in (0, 1))
        parts = {name: value for name, value in values.items() if name in self.objective.parts}
        figures = {name: value for name, value in values.items() if name not in parts}
        total, shares = self.objective.total(parts, weights)
        skipped = _no_number(parts, norm, self.accelerator.scaler)
        self._update(skipped)
        if self.balance and not skipped:
            self.balance.update(parts)
        self.step += 1
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if skipped:
            skipped += f" (documents {_documents(taken)})"
        return StepRecord(
            self.step, total, parts, shares, lr, norm, counts["student_tokens"], self.clock.now() - started, weights,
            figures, _norm_shares(squares), skipped, self.micro_batch,
            batching.computed_per_token(counts, self.teacher and self.teacher.model),
        )  # fmt: skip

    def _weights(self, progress):
        """The weights of a step at `progress` of the plan."""
        weights = self.objective.weights(progress)
        if self.balance is None:
            return weights
        return self.balance.weights(weights, {name: self.objective.phase_factor(name, progress) for name in weights})

    def _gradients_that_fit(self, *what):
        """`_gradients`, in micro-batches that the memory has room for."""
        while True:
            try:
                with memory.gradient_checkpointing_enabled(self.objective.student, self.gradient_checkpointing):
                    return self._gradients(*what)
            except Exception as error:
                if not memory.is_out_of_memory(error) or self.accelerator.num_processes > 1:
                    raise
                if self.micro_batch == 1:
                    raise MemoryError(
                        "the memory has no room for a single window; lower max_length, take a smaller model or a "
                        "larger card"
                    ) from error
            self.micro_batch = (self.micro_batch + 1) // 2
            self.optimizer.zero_grad()
            memory.release_memory()

    def _gradients(self, taken, weights, measure, coming):
        """`(counts, found)`: the gradients of a whole step are in place; what each micro-batch came to."""
        accelerator, teacher_request = self.accelerator, self.objective.teacher_request(weights)
        batches = self._batches(taken)
        counts = _counts(batches, accelerator)
        later = [(batch, teacher_request) for batch in batches[1:]] + (self._first_of(coming) if self.asks else [])
        found = []
        for i, batch in enumerate(batches):
            batch = batch.to(accelerator.device)
            signal = self.teacher(batch, **teacher_request) if self.teacher else None
            if self.asks and i < len(later):
                self.teacher.prefetch(later[i][0], **later[i][1])
            syncing = i == len(batches) - 1  # processes exchange gradients once a step
            with contextlib.nullcontext() if syncing else accelerator.no_sync(self.prepared):
                loss, values, squares = self.prepared(batch, signal, counts, weights, measure)
                # gradients are averaged over processes, and ours are already shares of the whole step
                accelerator.backward(loss * accelerator.num_processes)
            found.append(({name: value.detach() for name, value in values.items()}, squares))
        return counts, found

    def _batches(self, taken):
        """The micro-batches of this process, in order; the same objects where they were the last to be made."""
        if self.collated[0] is not taken or self.collated[1] != self.micro_batch:
            share = _own_share(taken, self.config.batch_size, self.micro_batch, self.accelerator, self.layout)
            self.collated = taken, self.micro_batch, share
        return self.collated[2]

    def _first_of(self, coming):
        """The next step's first micro-batch and what its teacher will be asked for, in a list; [] after the last step."""
        if self.step + 1 >= self.num_steps:
            return []
        return [
            (self._batches(coming)[0], self.objective.teacher_request(self._weights((self.step + 1) / self.num_steps)))
        ]

    def _update(self, skipped):
        """Let the optimizer, the schedule and the average take their step; a skipped one changes no weight."""
        if skipped:
            self.optimizer.zero_grad()
            self.optimizer.optimizer.step()  # without gradients it does nothing but count as a step before the schedule's
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.update()
        else:
            self._step_optimizer()
        self.scheduler.step()
        self.optimizer.zero_grad()
        if self.average and not skipped:
            self.average.update_parameters(self.objective.student)

    def _step_optimizer(self):
        before = self._num_updates()
        try:
            self.optimizer.step()
        except Exception as error:
            if not memory.is_out_of_memory(error) or self._num_updates() != before:
                raise  # some weights have had their step and some have not: only a checkpoint is whole
            error.__traceback__ = None
            memory.release_memory()
            self.optimizer.step()

    def _num_updates(self):
        """How often the optimizer's first weight was updated: the one that every implementation begins with."""
        first = self.optimizer.param_groups[0]["params"][0]
        return int(self.optimizer.state.get(first, {}).get("step", 0))

    def _no_way_on(self, record):
        """Why no step is a number any more, and what to do."""
        bad = [name for name, tensor in self.objective.named_parameters() if not tensor.isfinite().all()]
        weights = f"; weights are no numbers either: {', '.join(bad[:3])}" if bad else ""
        return (
            f"{self.in_a_row} steps in a row had a loss or gradient that is no number, the last one: {record.skipped}"
            f"{weights}; lower learning_rate, or look at these documents"
        )

    def is_finite(self):
        """Whether every trained weight is a number."""
        return all(bool(tensor.isfinite().all()) for tensor in self.objective.parameters())

    def tensors(self):
        """`{group: {name: tensor}}`: copies on the CPU of all that another object needs to go on. Every process must ask."""
        kept = {
            "student": loading.cpu_state_dict(self.objective.student),
            "beside": loading.cpu_state_dict(self.objective.beside),
            "optimizer": optimizer.tensors_of(self.optimizer.optimizer),
            "random": seeds.rng_state(self.accelerator),
        }
        if self.average:
            kept["average"] = loading.cpu_state_dict(self.average.module)
        return {group: tensors for group, tensors in kept.items() if tensors}

    def facts(self):
        """The same, of what is no tensor: plain values."""
        scaler = self.accelerator.scaler
        groups = self.optimizer.optimizer.state_dict()["param_groups"]
        return {
            "step": self.step,
            "in_a_row": self.in_a_row,
            "micro_batch": self.micro_batch if self.micro_batch < self.config.batch_size else None,
            "num_processes": self.accelerator.num_processes,
            "rows_at_once": self.objective.rows_at_once,
            "balance": self.balance and self.balance.values,
            "num_averaged": self.average and int(self.average.n_averaged),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            "groups": [{name: value for name, value in group.items() if name != "params"} for group in groups],
        }

    def restore(self, tensors, facts):
        """Go on from another's `tensors` and `facts`."""
        loading.load_cpu_state_dict(self.objective.student, tensors["student"])
        loading.load_cpu_state_dict(self.objective.beside, tensors.get("beside", {}))
        optimizer.put_back(self.optimizer.optimizer, tensors.get("optimizer", {}), facts["groups"])
        self.scheduler.load_state_dict(facts["scheduler"])
        if self.accelerator.scaler is not None and facts["scaler"]:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        if self.average:
            loading.load_cpu_state_dict(self.average.module, tensors["average"])
            self.average.n_averaged.fill_(facts["num_averaged"])
        if self.balance:
            self.balance.values = dict(facts["balance"])
        self.step, self.in_a_row = facts["step"], facts["in_a_row"]
        self.micro_batch = min(facts["micro_batch"] or self.config.batch_size, self.config.batch_size)
        self.objective.rows_at_once = facts["rows_at_once"] and tuple(facts["rows_at_once"])
        seeds.set_rng_state(tensors["random"], self.accelerator)


def _own_share(windows, batch_size, micro_batch, accelerator, layout):
    """The micro-batches of this process, in order."""
    blocks = range(accelerator.process_index, len(windows) // batch_size, accelerator.num_processes)
    mine = [window for i in blocks for window in windows[i * batch_size : (i + 1) * batch_size]]
    return [batching.collate(mine[i : i + micro_batch], *layout) for i in range(0, len(mine), micro_batch)]


def _counts(batches, accelerator):
    """Positions of the whole step over all micro-batches and processes."""
    names = ("labels", "aligned", "spans", "student_tokens", "student_computed", "teacher_tokens", "teacher_computed")
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
