"""State of all random number generators that a run may use."""

import random

import accelerate
import numpy as np
import torch


def rng_state(accelerator):
    """Returns the states of all random number generators of all processes: `{"kind.process": tensor}`."""
    version, numbers, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries use it
    own = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if accelerator.device.type == "cuda":
        own |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    processes = accelerate.utils.gather_object([own])
    return {f"{kind}.{i}": state for i, states in enumerate(processes) for kind, state in states.items()}


def preserve_rng_state(device):
    """Returns a context that restores the random states of the CPU and of this device at its end."""
    device = torch.device(device)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def set_rng_state(rng_state, accelerator):
    """Restores the states of this process. A process without saved states keeps its own."""
    suffix = f".{accelerator.process_index}"
    own = {key.removesuffix(suffix): state for key, state in rng_state.items() if key.endswith(suffix)}
    if not own:
        return
    torch.set_rng_state(own["torch"])
    version, *numbers = own["python"].tolist()
    random.setstate((version, tuple(numbers), own["python_gauss"].tolist()[0] if len(own["python_gauss"]) else None))
    *keys, position, has_gauss = own["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, own["numpy_gauss"].item())
    np.random.set_state(state)  # noqa: NPY002
    for i in range(torch.cuda.device_count() if accelerator.device.type == "cuda" else 0):
        if f"cuda{i}" in own:
            torch.cuda.set_rng_state(own[f"cuda{i}"], i)
