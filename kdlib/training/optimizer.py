"""What turns gradients into steps: the optimizer, its learning rate over the plan, its state and the memory that takes."""

import torch

from kdlib.models import devices
from kdlib.training import schedule


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
    make = torch.optim.AdamW
    if config.optimizer == "adamw_8bit":
        make = devices.bitsandbytes("optimizer", config.optimizer, "adamw").optim.AdamW8bit
    return make([group for group in groups if group["params"]], betas=(0.9, 0.95))


def make_schedule(optimizer, num_steps, warmup):
    """One factor for all groups, counted in optimizer steps of the whole plan."""
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule.learning_rate_factor(step, num_steps, warmup)
    )


def tensors_of(optimizer):
    """Copies on the CPU of the state of every parameter, in their order: `{"index.name": tensor}`."""
    return {
        f"{index}.{name}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for index, p in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(p, {}).items()
    }


def put_back(optimizer, tensors, groups):
    """Go on from another's `tensors_of` and groups (without their `params`)."""
    state = {}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        counts = tensor.ndim == 0 and not tensor.is_floating_point()  # bitsandbytes counts steps in plain numbers
        state.setdefault(int(index), {})[name] = tensor.item() if counts else tensor
    made = optimizer.state_dict()["param_groups"]
    groups = [{**group, "params": own["params"]} for group, own in zip(groups, made, strict=True)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def memory_of(optimizer):
    """`(state, update)`: bytes of state that an optimizer has still to make, and what one update takes beside it."""
    new = [p for p in _parameters(optimizer) if p not in optimizer.state]
    groups = [[p.numel() * p.element_size() for p in group["params"]] for group in optimizer.param_groups]
    largest = max(map(max, groups))
    if not isinstance(optimizer, torch.optim.AdamW):
        state = sum(2 * (p.numel() + 4 * p.numel() // 256 if p.numel() >= 4096 else 4 * p.numel()) for p in new)
        return state, largest
    at_once = _parameters(optimizer)[0].is_cuda  # there all parameters of a group are updated together
    return sum(2 * 4 * p.numel() for p in new), max(map(sum, groups)) if at_once else 2 * largest


def _parameters(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]
