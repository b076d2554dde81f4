"""The arithmetic that a card really has."""

import contextlib
import logging

import accelerate
import torch


def accelerator(amp_dtype):
    """The `Accelerator` of the machine, with the arithmetic that its card really has."""
    cuda = torch.cuda.is_available()
    if amp_dtype == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        amp_dtype = "bf16" if bf16 else "fp16" if cuda else "fp32"
    if amp_dtype == "fp16" and not cuda:
        raise ValueError("amp_dtype fp16 needs a CUDA card; use auto or fp32 on a CPU")
    return accelerate.Accelerator(mixed_precision="no" if amp_dtype == "fp32" else amp_dtype)


def agreed(accelerator, flags):
    """For each of these truths whether any process holds it."""
    if accelerator.num_processes == 1:
        return flags
    counted = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [bool(count) for count in accelerator.reduce(counted, "sum").tolist()]


@contextlib.contextmanager
def passing_accelerator(amp_dtype):
    """The `accelerator` for a while. accelerate lets a process have one arithmetic only: afterwards it may choose again,
    unless it had chosen before.
    """
    chosen = accelerate.state.is_initialized()
    try:
        yield accelerator(amp_dtype)
    finally:
        if not chosen:
            accelerate.state.AcceleratorState._reset_state()


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
