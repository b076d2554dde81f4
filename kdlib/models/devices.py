"""The arithmetic that a card really has, and the one place where an `Accelerator` is made."""

import contextlib
import logging

import accelerate
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

STATES = PartialState, AcceleratorState, GradientState
"""accelerate keeps device, arithmetic and accumulation in these classes, once per process."""


class Accelerator(accelerate.Accelerator):
    """An `accelerate.Accelerator` with a state of its own.

    The first `accelerate.Accelerator` of a process fixes device and arithmetic for all later ones. Here every object gets
    a new state, and older objects keep theirs. `prepare` and `autocast` read the state of the process, so each selects the
    state of its object first.
    """

    def __init__(self, **settings):
        before = _selected()
        _select(({}, {}, {}))
        try:
            super().__init__(**settings)
        except BaseException:
            _select(before)
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
    """Make `states` those of the process. In a launch of several processes the first one stays: it holds their group."""
    for kind, state in zip(STATES, states, strict=True):
        if kind is not PartialState or not _launched():
            kind._shared_state = state


def _launched():
    """Whether a launcher (torchrun, accelerate) started this process."""
    return accelerate.utils.get_int_from_env(["LOCAL_RANK"], -1) != -1


def accelerator(amp_dtype, cpu=False):
    """Returns a new `Accelerator` for the machine's card, or for its processor (`cpu`), with the arithmetic that it really
    has. Processes of one launch share a device: there `cpu` is ignored.
    """
    cpu = cpu and not _launched()
    cuda = torch.cuda.is_available() and not (cpu or accelerate.utils.parse_flag_from_env("ACCELERATE_USE_CPU"))
    if amp_dtype == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        amp_dtype = "bf16" if bf16 else "fp16" if cuda else "fp32"
    if amp_dtype == "fp16" and not cuda:
        raise ValueError("amp_dtype fp16 needs a CUDA card; use auto or fp32 on a CPU")
    return Accelerator(mixed_precision="no" if amp_dtype == "fp32" else amp_dtype, cpu=cpu)


@contextlib.contextmanager
def temporary_accelerator(amp_dtype, cpu=False):
    """Returns a context with an `accelerator`. At its end accelerate's state is what it was before, unless another one was
    made meanwhile.
    """
    before = _selected()
    made = accelerator(amp_dtype, cpu)
    try:
        yield made
    finally:
        if AcceleratorState._shared_state is made.states[1]:
            _select(before)


def any_process(accelerator, flags):
    """For each of these truths whether any process holds it."""
    if accelerator.num_processes == 1:
        return flags
    counted = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [bool(count) for count in accelerator.reduce(counted, "sum").tolist()]


def bitsandbytes(key, value, default):
    """The optional package of 8 and 4 bit arithmetic; ValueError that names the setting which wants it."""
    try:
        import bitsandbytes as package
    except Exception as error:  # noqa: BLE001 - built for another card, it raises whatever it likes
        why = str(error).strip().splitlines()[0:1] or [type(error).__name__]
        raise ValueError(
            f"{key} {value} needs bitsandbytes ({why[0][:200]}): pip install bitsandbytes, or set {key} to {default}"
        ) from None
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it tells of a cast at every product
    return package


def teacher_device(wanted, accelerator):
    """The device of a teacher beside it; `wanted` as in the config. ValueError where the machine has no such card."""
    own = torch.device(accelerator.device)
    count = torch.cuda.device_count()
    if wanted == "auto":
        wanted = "cuda:1" if own.type == "cuda" and count > 1 and accelerator.num_processes == 1 else own
    there = torch.device(wanted)
    if there.type == "cuda" and (there.index or 0) >= count:
        raise ValueError(f"teacher_device is {wanted}, and this machine has {count} cards; use auto or cpu")
    return own if (there.type, there.index or 0) == (own.type, own.index or 0) else there


def teacher_dtype(accelerator, device="cuda"):
    """What a teacher on `device` is loaded in beside it: no half precision on a CPU, which is slow at it."""
    if torch.device(device).type == "cpu" and torch.device(accelerator.device).type != "cpu":
        return torch.float32
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
