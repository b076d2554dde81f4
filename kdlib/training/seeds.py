"""The state of every random number generator that a run may draw from."""

import random

import accelerate
import numpy as np
import torch


def rng_state(accelerator):
    """States of every random number generator in use, of every process: `{"kind.process": tensor}`."""
    version, numbers, gauss = random.getstate()
    _, keys, place, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - whatever libraries draw from
    own = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor([version, *numbers], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), place, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
    }
    if accelerator.device.type == "cuda":
        own |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    every = accelerate.utils.gather_object([own])
    return {f"{kind}.{process}": state for process, one in enumerate(every) for kind, state in one.items()}


def preserve_rng_state(device):
    """A context in which random numbers for a CPU or this device are drawn, and afterwards were not."""
    device = torch.device(device)
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def set_rng_state(rng_state, accelerator):
    """Put back the states of this process; one that did not exist when they were taken keeps its own."""
    mark = f".{accelerator.process_index}"
    own = {key.removesuffix(mark): state for key, state in rng_state.items() if key.endswith(mark)}
    if not own:
        return
    torch.set_rng_state(own["torch"])
    version, *numbers = own["python"].tolist()
    random.setstate((version, tuple(numbers), own["python_gauss"].tolist()[0] if len(own["python_gauss"]) else None))
    *keys, place, has_gauss = own["numpy"].tolist()
    state = ("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, own["numpy_gauss"].item())
    np.random.set_state(state)  # noqa: NPY002
    for i in range(torch.cuda.device_count() if accelerator.device.type == "cuda" else 0):
        if f"cuda{i}" in own:
            torch.cuda.set_rng_state(own[f"cuda{i}"], i)
