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
