"""The arithmetic that a card really has."""

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


def teacher_dtype(accelerator):
    """What a teacher is loaded in beside it."""
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
