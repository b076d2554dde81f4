"""The optimizer, its learning rate schedule, the curriculum and balance of loss weights, and the memory of a step."""

import math

import torch

from kdlib.models import devices

RAMP = 0.05
"""Fraction of the plan over which the curriculum raises a term's weight from 0."""


def make_optimizer(objective, config):
    """Returns AdamW over the student (weight decay on matrices only) and its adapters, which have their own rate."""
    student = [p for p in objective.student.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in student if p.ndim >= 2],
            "lr": config.learning_rate,
            "weight_decay": config.weight_decay,
        },
        {"params": [p for p in student if p.ndim < 2], "lr": config.learning_rate, "weight_decay": 0.0},
    ]
    adapters = list(objective.adapters.parameters())
    groups.append({"params": adapters, "lr": config.projector_learning_rate, "weight_decay": 0.0})
    optimizer_class = torch.optim.AdamW
    if config.optimizer == "adamw_8bit":
        optimizer_class = devices.bitsandbytes("optimizer", config.optimizer, "adamw").optim.AdamW8bit
    return optimizer_class([group for group in groups if group["params"]], betas=(0.9, 0.95))


def make_schedule(optimizer, num_steps, warmup):
    """Returns the scheduler of `learning_rate_factor`: one factor for all groups, stepped once per optimizer step."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, num_steps, warmup))


def learning_rate_factor(step, num_steps, warmup=0.05, floor=0.1):
    """Returns the factor on the peak rate for optimizer step `step` (0-based) of `num_steps`: linear warm-up, then a
    cosine.

    The first step has the factor `1 / warmup_steps`, the last one is near `floor`, and later steps have `floor`.
    """
    warmup_steps = max(1, round(warmup * num_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step + 1 - warmup_steps) / max(1, num_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


def state_tensors(optimizer):
    """Returns CPU copies of the state of every parameter, in their order: `{"index.name": tensor}`."""
    return {
        f"{index}.{name}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for index, p in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(p, {}).items()
    }


def load_state(optimizer, tensors, groups):
    """Loads another optimizer's `state_tensors` and its groups (without their `params`)."""
    state = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        is_count = tensor.ndim == 0 and not tensor.is_floating_point()  # bitsandbytes keeps step counts as plain ints
        state.setdefault(int(index), {})[name] = tensor.item() if is_count else tensor
    own_groups = optimizer.state_dict()["param_groups"]
    groups = [{**group, "params": own["params"]} for group, own in zip(groups, own_groups, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def memory_of(optimizer):
    """Returns `(state, update)`: bytes of optimizer state still to be allocated, and temporary bytes of one update."""
    new = [p for p in _parameters(optimizer) if p not in optimizer.state]
    groups = [[p.numel() * p.element_size() for p in group["params"]] for group in optimizer.param_groups]
    largest = max(map(max, groups))
    if not isinstance(optimizer, torch.optim.AdamW):
        state = sum(2 * (p.numel() + 4 * p.numel() // 256 if p.numel() >= 4096 else 4 * p.numel()) for p in new)
        return state, largest
    fused_groups = _parameters(optimizer)[0].is_cuda  # on a GPU, all parameters of a group are updated together
    return sum(2 * 4 * p.numel() for p in new), max(map(sum, groups)) if fused_groups else 2 * largest


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def ramp(progress, start):
    """Returns the curriculum's factor on the weight of a term that starts at the fraction `start` of the plan.

    0 before `start`, 1 from `start + RAMP` on, smooth in between (`3x^2 - 2x^3`). A term that starts at 0 has the
    factor 1 from the first step on.
    """
    if start <= 0.0:
        return 1.0
    x = min(1.0, max(0.0, (progress - start) / RAMP))
    return x * x * (3.0 - 2.0 * x)


class Balance:
    """Weights that keep each term's share of the loss at a target, from running means of the terms' values.

    `targets` maps terms to shares; only ratios between active terms count. The first active term (lm) keeps its
    configured weight and scales the others, so that the total still falls with that term. The state is `values`, plain
    floats.
    """

    DECAY = 0.95

    def __init__(self, targets):
        self.targets = targets
        self.values = {}

    def update(self, parts):
        """Updates the running means with the unweighted values of one step."""
        for name in self.targets:
            if name in parts:
                self.values[name] = self.DECAY * self.values.get(name, parts[name]) + (1 - self.DECAY) * parts[name]

    def weights(self, weights, factors):
        """Returns the weights of the next step. `weights` include the curriculum's `factors`.

        A term without a target, or without a value yet, keeps its weight.
        """
        ready = [n for n in weights if weights[n] > 0 and self.values.get(n, 0.0) > 0 and self.targets.get(n, 0.0) > 0]
        if len(ready) < 2:
            return weights
        first = ready[0]
        unit = weights[first] * self.values[first] / (self.targets[first] * factors[first])
        return {**weights, **{n: unit * self.targets[n] * factors[n] / self.values[n] for n in ready}}
