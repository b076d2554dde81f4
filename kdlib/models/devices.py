"""Devices and dtypes. The only module that creates an `Accelerator`."""

import contextlib
import logging

import accelerate
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

from kdlib.environment import first_line

STATES = PartialState, AcceleratorState, GradientState
"""Classes in which accelerate keeps device, precision and accumulation, once per process."""


class Accelerator(accelerate.Accelerator):
    """An `accelerate.Accelerator` with its own state.

    The first `accelerate.Accelerator` of a process fixes device and precision for all later ones. Here every object has
    its own state. `prepare` and `autocast` read the state of the process, so they select that of their object first.
    """

    def __init__(self, **settings):
        previous = _selected()
        _select(({}, {}, {}))
        try:
            super().__init__(**settings)
        except BaseException:
            _select(previous)
            raise
        self.states = _selected()

    def prepare(self, *objects, **options):
        _select(self.states)
        return super().prepare(*objects, **options)

    def autocast(self, **options):
        _select(self.states)
        return super().autocast(**options)


def _selected():
    return tuple(kind._shared_state for kind in STATES)


def _select(states):
    """Sets the states of the process. With a launcher the PartialState stays, because it holds the process group."""
    for kind, state in zip(STATES, states, strict=True):
        if kind is not PartialState or not _launched():
            kind._shared_state = state


def _launched():
    """Returns whether a launcher (torchrun, accelerate) started this process."""
    return accelerate.utils.get_int_from_env(["LOCAL_RANK"], -1) != -1


def accelerator(amp_dtype, cpu=False):
    """Returns a new `Accelerator` for the GPU, or for the CPU (`cpu`), with a precision that the hardware supports.

    With a launcher all processes share a device type, so `cpu` is ignored.
    """
    cpu = cpu and not _launched()
    cuda = torch.cuda.is_available() and not (cpu or accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU"))
    if amp_dtype == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        amp_dtype = "bf16" if bf16 else "fp16" if cuda else "fp32"
    if amp_dtype == "fp16" and not cuda:
        raise ValueError("amp_dtype fp16 needs a CUDA GPU; use auto or fp32 on a CPU")
    return Accelerator(mixed_precision="no" if amp_dtype == "fp32" else amp_dtype, cpu=cpu)


@contextlib.contextmanager
def temporary_accelerator(amp_dtype, cpu=False):
    """Provides an `accelerator`, and restores accelerate's state at the end unless a later one was created."""
    previous = _selected()
    temporary = accelerator(amp_dtype, cpu)
    try:
        yield temporary
    finally:
        if AcceleratorState._shared_state is temporary.states[1]:
            _select(previous)


def any_process(accelerator, flags):
    """Returns for each boolean whether it is true in any process."""
    if accelerator.num_processes == 1:
        return flags
    counts = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [bool(count) for count in accelerator.reduce(counts, "sum").tolist()]


def bitsandbytes(key, value, default):
    """Imports the optional package bitsandbytes. Raises ValueError that names the setting which needs it."""
    try:
        import bitsandbytes as package
    except Exception as error:  # noqa: BLE001 - a build for other hardware raises various errors
        raise ValueError(
            f"{key} {value} needs bitsandbytes ({first_line(error)}): pip install bitsandbytes, or set {key} to {default}"
        ) from None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs every cast
    return package


def teacher_device(name, accelerator):
    """Returns the teacher's device; `name` is the config's. Raises ValueError if the machine has no such GPU."""
    own = torch.device(accelerator.device)
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda:1" if own.type == "cuda" and count > 1 and accelerator.num_processes == 1 else own
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"teacher_device is {name}, but this machine has {count} GPUs; use auto or cpu")
    return own if (device.type, device.index or 0) == (own.type, own.index or 0) else device


def teacher_dtype(accelerator, device="cuda"):
    """Returns the dtype of a teacher on `device`: float32 on a CPU beside a GPU, since half precision is slow there."""
    if torch.device(device).type == "cpu" and torch.device(accelerator.device).type != "cpu":
        return torch.float32
    return compute_dtype(accelerator)


def compute_dtype(accelerator):
    """Returns the dtype in which autocast computes matrix products."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
