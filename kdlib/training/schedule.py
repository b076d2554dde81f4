"""What depends on how far the plan has come."""

import math


def learning_rate_factor(step, num_steps, warmup=0.05, floor=0.1):
    """Factor on the peak rate for optimizer step `step` (0-based) of `num_steps`: linear warm-up, then a cosine.

    The first step already learns (factor `1 / warmup_steps`), the last one ends near `floor`; beyond the plan it stays
    at `floor`.
    """
    warmup_steps = max(1, round(warmup * num_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step + 1 - warmup_steps) / max(1, num_steps - warmup_steps))
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


RAMP = 0.05
"""Fraction of the plan over which a part of the curriculum comes in."""


def ramp(progress, start):
    """Factor on the weight of a part that begins at the fraction `start` of the plan: 0 before, 1 from `start` + 0.05 on,
    smooth in between (3x^2 - 2x^3). A part that begins at 0 is whole from the first step.
    """
    if start <= 0.0:
        return 1.0
    x = min(1.0, max(0.0, (progress - start) / RAMP))
    return x * x * (3.0 - 2.0 * x)


class Balance:
    """Weights that keep each part's share of the loss at a target, from running means of the parts' values.

    `targets` maps parts to shares; only ratios between parts that are on count. The weight of the first part that is on
    (lm) stays the configured one and scales the others, so the total still falls as that part falls. The state is
    `values`, plain floats: a checkpoint can hold it.
    """

    MEMORY = 0.95

    def __init__(self, targets):
        self.targets = targets
        self.values = {}

    def update(self, parts):
        """Take in the unweighted values of one step."""
        for name in self.targets:
            if name in parts:
                self.values[name] = self.MEMORY * self.values.get(name, parts[name]) + (1 - self.MEMORY) * parts[name]

    def weights(self, weights, factors):
        """The weights of the next step. `weights`: what the config and the curriculum give; `factors`: the curriculum's part
        of that. A part without a target, or not seen yet, keeps what it has.
        """
        ready = [n for n in weights if weights[n] > 0 and self.values.get(n, 0.0) > 0 and self.targets.get(n, 0.0) > 0]
        if len(ready) < 2:
            return weights
        first = ready[0]
        unit = weights[first] * self.values[first] / (self.targets[first] * factors[first])
        return {**weights, **{n: unit * self.targets[n] * factors[n] / self.values[n] for n in ready}}
