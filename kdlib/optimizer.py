"""What turns gradients into steps: the optimizer, and its learning rate over the plan."""

import torch

from kdlib import schedule


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
