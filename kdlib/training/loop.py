"""The training loop: a generator that yields one record per optimizer step, with a state that can be saved and
restored.
"""

import contextlib
import dataclasses
import itertools
import math

import torch

from kdlib import memory
from kdlib.data import batching
from kdlib.models import loading
from kdlib.training import ema, optimizer, seeds


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """Record of one optimizer step.

    `parts`: unweighted loss terms, means per position in nats. `weights`: their weights. `shares`: fractions of `loss`.
    `step_s`: seconds. `grad_shares`: each term's share of the sum of the terms' gradient norms, measured at the student
    (`Objective.forward`); None if not measured. `figures`: metrics (`kd_covered`: the teacher's probability that
    `kd_top_k` keeps; `kd_positions`: share of learned positions with a signal, by `byte_prefix`; `routing_0`, ...:
    mean weight of each tapped teacher layer). `skipped`: why this step changed no weight, or empty. `micro_batch`:
    windows per forward pass. `computed_per_token`: by side, tokens computed with padding per token without.
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
    """Yields endless lists of windows, one per optimizer step, in a different order each epoch. Skips the first
    `start`.

    Raises ValueError if all windows together do not fill one step of all processes.
    """
    if len(windows) < per_step:
        raise ValueError(f"{len(windows)} windows do not fill one optimizer step of {per_step}; lower the batch size")
    first_epoch, num_done = divmod(start, len(windows) // per_step)
    for epoch in itertools.count(first_epoch):
        order = batching.batch_order(windows, per_step, seed, epoch)
        for indices in order[num_done if epoch == first_epoch else 0 :]:
            yield [windows[i] for i in indices]


class TrainLoop:
    """Training of a student: an iterable that yields a `StepRecord` after each of `num_steps` optimizer steps.

    It can be stopped after any step, and resumed by another object from its `state_tensors` and `state_values`.

    `teacher` maps a batch to a `TeacherSignal`, or is None. A `prefetch.PrefetchingTeacher` computes each batch while
    the student learns from the one before. `windows` are the training windows; `pads` and `max_row_width` are passed to
    `batching.collate`. A step's loss and gradient are means over its positions, independent of micro-batches and
    processes. If memory runs out, the step is repeated with half the micro-batch. `gradient_checkpointing` recomputes
    layers in the backward pass.

    A step with a non-finite loss or gradient changes no weight. Raises FloatingPointError after `non_finite_steps` of
    them in a row.
    """

    def __init__(
        self, objective, teacher, windows, num_steps, config, accelerator, clock, pads=(0, 0), max_row_width=(0, 0)
    ):
        self.objective, self.teacher, self.windows, self.num_steps = objective, teacher, windows, num_steps
        self.config, self.accelerator, self.clock, self.layout = config, accelerator, clock, (*pads, max_row_width)
        self.prefetches = hasattr(teacher, "prefetch")
        self.prepared, self.optimizer = accelerator.prepare(objective, optimizer.make_optimizer(objective, config))
        self.scheduler = optimizer.make_schedule(self.optimizer.optimizer, num_steps, config.warmup)
        self.average = ema.average(objective.student, config.ema_decay) if config.use_ema else None
        targets = config.target_shares()
        self.balance = optimizer.Balance(targets) if targets else None
        self.step, self.consecutive_skips, self.micro_batch = 0, 0, config.batch_size
        self.collated = (None, None, None)
        self.gradient_checkpointing = config.gradient_checkpointing == "on"

    def __iter__(self):
        per_step = self.config.effective_batch * self.accelerator.num_processes
        self.objective.train()
        try:
            steps = steps_of(self.windows, per_step, self.config.seed, self.step)
            for windows, next_windows in itertools.pairwise(steps):
                if self.step >= self.num_steps:
                    return
                record = self._step(windows, next_windows)
                yield record
                if self.consecutive_skips >= self.config.non_finite_steps:
                    raise FloatingPointError(self._describe_failure(record))
        finally:
            if self.prefetches:
                self.teacher.cancel()

    def _step(self, windows, next_windows):
        start = self.clock.now()
        weights = self._weights(self.step / self.num_steps)
        measure = self.config.share_steps > 0 and (self.step + 1) % self.config.share_steps == 0
        counts, results = self._gradients_that_fit(windows, weights, measure, next_windows)
        lr = self.scheduler.get_last_lr()[0]
        norm = _clip(self.objective, self.config.max_grad_norm, self.accelerator, self.optimizer)
        values, grad_sq_norms = (_sum_results([pair[i] for pair in results], self.accelerator) for i in (0, 1))
        parts = {name: value for name, value in values.items() if name in self.objective.terms}
        figures = {name: value for name, value in values.items() if name not in parts}
        loss, shares = self.objective.total(parts, weights)
        skipped = _describe_non_finite(parts, norm, self.accelerator.scaler)
        self._update(skipped)
        if self.balance and not skipped:
            self.balance.update(parts)
        self.step += 1
        self.consecutive_skips = self.consecutive_skips + 1 if skipped else 0
        if skipped:
            skipped += f" (documents {', '.join(map(str, sorted({window.document for window in windows})))})"
        return StepRecord(
            self.step, loss, parts, shares, lr, norm, counts["student_tokens"], self.clock.now() - start, weights,
            figures, _norm_shares(grad_sq_norms), skipped, self.micro_batch,
            batching.computed_per_token(counts, self.teacher and self.teacher.model),
        )  # fmt: skip

    def _weights(self, progress):
        """Returns the weights of a step at `progress`, a fraction of the plan."""
        weights = self.objective.weights(progress)
        if self.balance is None:
            return weights
        return self.balance.weights(weights, {name: self.objective.phase_factor(name, progress) for name in weights})

    def _gradients_that_fit(self, *args):
        """Returns `_gradients`, with a micro-batch that fits into memory."""
        while True:
            try:
                with memory.gradient_checkpointing_enabled(self.objective.student, self.gradient_checkpointing):
                    return self._gradients(*args)
            except Exception as error:
                if not memory.is_out_of_memory(error) or self.accelerator.num_processes > 1:
                    raise
                if self.micro_batch == 1:
                    raise MemoryError(
                        "a single window does not fit into memory; lower max_length, use a smaller model or a larger GPU"
                    ) from error
            self.micro_batch = (self.micro_batch + 1) // 2
            self.optimizer.zero_grad()
            memory.release_memory()

    def _gradients(self, windows, weights, measure, next_windows):
        """Accumulates the gradients of a full step. Returns `(counts, results of each micro-batch)`."""
        accelerator, request = self.accelerator, self.objective.teacher_request(weights)
        batches = self._batches(windows)
        counts = _counts(batches, accelerator)
        upcoming = [(batch, request) for batch in batches[1:]]
        upcoming += self._first_request(next_windows) if self.prefetches else []
        results = []
        for i, batch in enumerate(batches):
            batch = batch.to(accelerator.device)
            signal = self.teacher(batch, **request) if self.teacher else None
            if self.prefetches and i < len(upcoming):
                self.teacher.prefetch(upcoming[i][0], **upcoming[i][1])
            is_last = i == len(batches) - 1  # processes synchronise gradients once per step
            with contextlib.nullcontext() if is_last else accelerator.no_sync(self.prepared):
                loss, values, grad_sq_norms = self.prepared(batch, signal, counts, weights, measure)
                # gradients are averaged over processes, but each loss is already a share of the full step
                accelerator.backward(loss * accelerator.num_processes)
            results.append(({name: value.detach() for name, value in values.items()}, grad_sq_norms))
        return counts, results

    def _batches(self, windows):
        """Returns this process's micro-batches; the same objects as last time if nothing changed."""
        if self.collated[0] is not windows or self.collated[1] != self.micro_batch:
            batches = _own_share(windows, self.config.batch_size, self.micro_batch, self.accelerator, self.layout)
            self.collated = windows, self.micro_batch, batches
        return self.collated[2]

    def _first_request(self, next_windows):
        """Returns `[(first micro-batch, teacher request)]` of the next step; [] after the last step."""
        if self.step + 1 >= self.num_steps:
            return []
        weights = self._weights((self.step + 1) / self.num_steps)
        return [(self._batches(next_windows)[0], self.objective.teacher_request(weights))]

    def _update(self, skipped):
        """Steps the optimizer, the schedule and the average. A skipped step changes no weight."""
        if skipped:
            self.optimizer.zero_grad()
            self.optimizer.optimizer.step()  # without gradients: only so that the scheduler does not warn
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
                raise  # some weights may be updated and others not: only a checkpoint is consistent
            error.__traceback__ = None
            memory.release_memory()
            self.optimizer.step()

    def _num_updates(self):
        """Returns the number of updates of the optimizer's first weight, which every implementation updates first."""
        first = self.optimizer.param_groups[0]["params"][0]
        return int(self.optimizer.state.get(first, {}).get("step", 0))

    def _describe_failure(self, record):
        names = [name for name, tensor in self.objective.named_parameters() if not tensor.isfinite().all()]
        weights = f"; non-finite weights: {', '.join(names[:3])}" if names else ""
        return (
            f"{self.consecutive_skips} steps in a row had a non-finite loss or gradient, the last one: {record.skipped}"
            f"{weights}; lower learning_rate, or look at these documents"
        )

    def is_finite(self):
        """Returns whether every trained weight is finite."""
        trained = (weight for weight in self.objective.parameters() if weight.requires_grad)
        return all(bool(weight.isfinite().all()) for weight in trained)

    def state_tensors(self):
        """Returns the tensors of the state as CPU copies, `{group: {name: tensor}}`. Every process must call it."""
        groups = {
            "student": loading.cpu_state_dict(self.objective.student),
            "adapters": loading.cpu_state_dict(self.objective.adapters),
            "optimizer": optimizer.state_tensors(self.optimizer.optimizer),
            "random": seeds.rng_state(self.accelerator),
        }
        if self.average:
            groups["average"] = loading.cpu_state_dict(self.average.module)
        return {group: tensors for group, tensors in groups.items() if tensors}

    def state_values(self):
        """Returns the rest of the training state, as JSON values."""
        scaler = self.accelerator.scaler
        groups = self.optimizer.optimizer.state_dict()["param_groups"]
        return {
            "step": self.step,
            "consecutive_skips": self.consecutive_skips,
            "micro_batch": self.micro_batch if self.micro_batch < self.config.batch_size else None,
            "num_processes": self.accelerator.num_processes,
            "chunk_sizes": self.objective.chunk_sizes,
            "balance": self.balance and self.balance.values,
            "num_averaged": self.average and int(self.average.n_averaged),
            "scheduler": self.scheduler.state_dict(),
            "scaler": scaler and scaler.state_dict(),
            "groups": [{name: value for name, value in group.items() if name != "params"} for group in groups],
        }

    def load_state(self, tensors, values):
        """Loads another object's `state_tensors` and `state_values`."""
        loading.load_cpu_state_dict(self.objective.student, tensors["student"])
        loading.load_cpu_state_dict(self.objective.adapters, tensors.get("adapters", {}))
        optimizer.load_state(self.optimizer.optimizer, tensors.get("optimizer", {}), values["groups"])
        self.scheduler.load_state_dict(values["scheduler"])
        if self.accelerator.scaler is not None and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        if self.average:
            loading.load_cpu_state_dict(self.average.module, tensors["average"])
            self.average.n_averaged.fill_(values["num_averaged"])
        if self.balance:
            self.balance.values = dict(values["balance"])
        self.step, self.consecutive_skips = values["step"], values["consecutive_skips"]
        self.micro_batch = min(values["micro_batch"] or self.config.batch_size, self.config.batch_size)
        self.objective.chunk_sizes = values["chunk_sizes"] and tuple(values["chunk_sizes"])
        seeds.set_rng_state(tensors["random"], self.accelerator)


def _own_share(windows, batch_size, micro_batch, accelerator, layout):
    """Returns this process's micro-batches of a step, in order."""
    blocks = range(accelerator.process_index, len(windows) // batch_size, accelerator.num_processes)
    own = [window for i in blocks for window in windows[i * batch_size : (i + 1) * batch_size]]
    return [batching.collate(own[i : i + micro_batch], *layout) for i in range(0, len(own), micro_batch)]


def _counts(batches, accelerator):
    """Returns the number of positions of each kind in the full step, over all micro-batches and processes."""
    names = ("labels", "aligned", "spans", "student_tokens", "student_computed", "teacher_tokens", "teacher_computed")
    own = [sum(getattr(batch, f"num_{name}") for batch in batches) for name in names]
    totals = accelerator.reduce(torch.tensor(own, device=accelerator.device), "sum").tolist()
    return dict(zip(names, totals, strict=True))


def _sum_results(results, accelerator):
    """Sums dicts of tensors `[]` over micro-batches and processes. Returns floats, with one transfer from the device."""
    names = list(results[0])
    if not names:
        return {}
    own = torch.stack([torch.stack([values[name].float() for name in names]) for values in results]).sum(dim=0)
    return dict(zip(names, accelerator.reduce(own, "sum").tolist(), strict=True))


def _norm_shares(grad_sq_norms):
    norms = {name: math.sqrt(square) for name, square in grad_sq_norms.items()}
    total = sum(norms.values())
    return {name: norm / total for name, norm in norms.items()} if total else None


def _describe_non_finite(parts, norm, scaler):
    """Returns which loss terms or gradients are not finite, or an empty string. The same in every process."""
    names = sorted(name for name, value in parts.items() if not math.isfinite(value))
    if names:
        return f"{', '.join(names)} not finite"
    if not math.isfinite(norm):
        return "gradient not finite" + ("" if scaler is None else f" at loss scale {scaler.get_scale():.0f}, lowered")
    return ""


def _clip(objective, limit, accelerator, optimizer):
    """Clips the gradients of student and adapters, each by its own norm. Returns the student's norm before clipping, or
    the adapters' if that is not finite.
    """
    accelerator.unscale_gradients(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(objective.student.parameters(), limit))
    if len(objective.adapters):
        adapter_norm = float(torch.nn.utils.clip_grad_norm_(objective.adapters.parameters(), limit))
        norm = norm if math.isfinite(adapter_norm) else adapter_norm
    return norm
