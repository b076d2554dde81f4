"""Checks of the machine: CPUs, memory, disk, versions, and what its GPUs can really compute.

`describe` and `list_gpus` collect plain data; `check_machine` derives its findings from that data alone.
"""

import dataclasses
import re
import sys

import torch

from kdlib import environment, memory
from kdlib.report.findings import Finding

PYTHONS = (3, 10), (3, 13)
AT_LEAST = {"torch": (2, 6), "transformers": (5, 0)}
LITTLE_BYTES = 2 * 2**30
"""Free CPU memory below which most models fail to load."""
TRITON = (7, 0)
"""Lowest compute capability that Triton supports."""
GPUS_OF = {"T4": 2}
"""Number of GPUs in Kaggle's accelerators with more than one."""
RETIRED = {"P100": "Kaggle retired the P100 on 2026-09-15 and provides two T4s instead"}
OLD_BUILDS = "pip install torch --index-url https://download.pytorch.org/whl/cu126"
"""Builds that still include kernels for sm_60; torch 2.15 is the first release without them."""


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU as torch reports it, and the result of `probe`.

    `capability`: compute capability, such as `(7, 5)`. `kernels`: value of `torch.cuda.get_arch_list()`. `bf16`: native
    bfloat16, not emulated. `failed`: the operation that failed, or an empty string.
    """

    name: str
    memory_bytes: int
    capability: tuple
    kernels: tuple
    bf16: bool
    failed: str = ""

    @property
    def sm(self):
        return "sm_{}{}".format(*self.capability)


def list_gpus():
    """Returns the `Gpu`s of this machine, each tested by `probe`."""
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        kernels, capability = tuple(torch.cuda.get_arch_list()), (properties.major, properties.minor)
        gpus.append(Gpu(properties.name, properties.total_memory, capability, kernels, bf16, probe(f"cuda:{index}")))
    return gpus


def probe(device):
    """Runs operations of training on a device. Returns the failed operation and its error, or an empty string.

    A matrix product alone is no proof: cuBLAS supports more GPUs than torch has kernels for.
    """
    for name, run in OPERATIONS.items():
        try:
            value = run(device)
        except RuntimeError as error:
            return f"{name} failed: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"
        if value != OPERATIONS_GIVE:
            return f"{name} returned {value}, expected {OPERATIONS_GIVE}"
    return ""


def _product(device):
    return (torch.full((2, 8), 0.5, device=device) @ torch.ones(8, 2, device=device))[0, 0].item()


def _reduction(device):
    return torch.arange(1, 9, device=device, dtype=torch.float32).softmax(dim=0).sum().mul(4).round().item()


def _backward(device):
    values = torch.full((2, 4), 2.0, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(values.square().mean(dim=1).sum(), values)
    return gradient.sum().div(2).item()


def _half(device):
    values = torch.ones(4, 4, device=device, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad((values @ values).float().sum(), values)
    return gradient.float().mean().div(2).item()


OPERATIONS = {
    "a matrix product": _product,
    "a reduction": _reduction,
    "a backward pass": _backward,
    "a backward pass in half precision": _half,
}
OPERATIONS_GIVE = 4.0


def has_kernels(capability, kernels):
    """Whether one of torch's `kernels` (`sm_75`, `sm_90a`, `compute_90`) runs on a GPU of this compute capability.

    An `sm` binary runs on the same major version with an equal or higher minor one, with suffix `a` on exactly its own
    version. `compute` (PTX) runs on all later GPUs.
    """
    for kernel in kernels:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", kernel)
        if not match:
            continue
        version, exact = (int(match[2]), int(match[3])), match[4] == "a"
        same = version == tuple(capability) if exact else version[0] == capability[0] and version[1] <= capability[1]
        if same or (match[1] == "compute" and not exact and version <= tuple(capability)):
            return True
    return False


def describe():
    """Returns the facts that `check_machine` needs, except the GPUs."""
    return {
        **environment.describe(),
        "python": sys.version_info[:3],
        "memory_free": memory.free("cpu"),
        "memory_total": memory.usage("cpu")["total_bytes"],
        "disk_free": environment.free_bytes("."),
        "disk_reserve": environment.disk_reserve_bytes(),
        "on_kaggle": environment.on_kaggle(),
    }


def check_machine(facts, gpus, config, requested=""):
    """Returns the `Finding`s of a machine, from the `facts` of `describe` and the `gpus` of `list_gpus`.

    `requested`: Kaggle's name of the requested accelerator, or an empty string.
    """
    findings = [_check_python(facts["python"]), _check_versions(facts["versions"]), *_check_host(facts)]
    if requested:
        findings.append(_check_accelerator(requested, gpus))
    if not gpus:
        findings.append(_no_gpu(facts["on_kaggle"]))
    for gpu in dict.fromkeys(gpus):
        findings += _check_gpu(gpu, [i for i, other in enumerate(gpus) if other == gpu], config)
    if len(gpus) > 1:
        findings.append(_check_teacher_device(len(gpus), config))
    return findings


def _finding(*args, **kwargs):
    return Finding("machine", *args, **kwargs)


def _check_python(version):
    value = ".".join(map(str, version))
    low, high = (".".join(map(str, limit)) for limit in PYTHONS)
    if version[:2] < PYTHONS[0]:
        return _finding("Python", value, "error", "kdlib does not support this version", f"use Python {low} to {high}")
    if version[:2] > PYTHONS[1]:
        return _finding("Python", value, "warning", f"kdlib is tested on Python {low} to {high}")
    return _finding("Python", value)


def _check_versions(versions):
    old = [
        name
        for name, minimum in AT_LEAST.items()
        if not versions[name] or tuple(map(int, re.findall(r"\d+", versions[name])[:2])) < minimum
    ]
    value = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if not old:
        return _finding("packages", value)
    required = " ".join(f'"{name}>={AT_LEAST[name][0]}.{AT_LEAST[name][1]}"' for name in old)
    return _finding("packages", value, "error", f"{' and '.join(old)} too old for kdlib", f"pip install -U {required}")


def _check_host(facts):
    free, total, disk = (facts[name] for name in ("memory_free", "memory_total", "disk_free"))
    yield _finding("CPUs", str(facts["processors"]), number=facts["processors"])
    value, problem = f"{gib(free)} free of {gib(total)}", ()
    if free < LITTLE_BYTES:
        problem = "warning", "little CPU memory is free, but models are loaded through it", "end other programs"
    yield _finding("memory", value, *problem, number=free)
    value, problem = f"{gib(disk)} free in this folder", ()
    if disk <= facts["disk_reserve"]:
        meaning = f"less than the reserve of {gib(facts['disk_reserve'])}: no checkpoint would be written"
        problem = "error", meaning, "free disk space, or run in another folder"
    yield _finding("disk", value, *problem, number=disk)
    if facts["image"]:
        yield _finding("image", facts["image"])


def _check_accelerator(requested, gpus):
    """Checks whether the GPUs are those of the requested accelerator."""
    name = re.sub(r"^Nvidia(Tesla)?", "", requested)
    model = (re.match(r"[A-Za-z]+\d+", name) or [name])[0]  # T4 of T4Highmem
    if not gpus:
        return _finding(
            "accelerator", f"requested {requested}, found no GPU", "error", "everything would run on the CPU",
            "choose the accelerator in the notebook's settings, or set enable_gpu and machine_shape in "
            "kernel-metadata.json; outside Kaggle, install a torch build with CUDA",
        )  # fmt: skip
    value = f"requested {requested}, found " + ", ".join(
        f"{gpus.count(gpu)} x {gpu.name}" for gpu in dict.fromkeys(gpus)
    )
    if all(model.lower() in re.sub(r"\W", "", gpu.name).lower() for gpu in gpus):
        if len(gpus) < GPUS_OF.get(model, 1):
            return _finding("accelerator", value, "warning", f"on Kaggle {requested} has {GPUS_OF[model]} GPUs")
        return _finding("accelerator", value)
    reason = f"{RETIRED[model]}. " if model in RETIRED else ""
    effects = [] if any(gpu.bf16 for gpu in gpus) else ["trains in fp16 (amp_dtype auto)"]
    effects += ["puts the teacher on the second GPU (teacher_device auto)"] if len(gpus) > 1 else []
    effect = f" kdlib {' and '.join(effects)}." if effects else ""
    return _finding("accelerator", value, "warning", f"{reason}This is not the requested GPU.{effect}")


def _no_gpu(on_kaggle):
    meaning = "training runs on the CPU in fp32, which suits the demo and small models; the doctor measures its speed"
    remedy = "choose GPU T4 x2 under Settings, Accelerator" if on_kaggle else ""
    return _finding("GPU", "none visible to torch", "warning", meaning, remedy, number=0)


def _check_gpu(gpu, indices, config):
    label = f"GPU{'s' * (len(indices) > 1)} {', '.join(map(str, indices))}"
    each = " each" * (len(indices) > 1)
    yield _finding(label, f"{gpu.name}, {gib(gpu.memory_bytes)}{each}, {gpu.sm}", number=gpu.memory_bytes)
    yield _check_kernels(gpu, f"kernels, {label}")
    yield _check_precision(gpu, f"precision, {label}", config.amp_dtype)
    supported = gpu.capability >= TRITON
    meaning = "kdlib never needs it" if supported else f"requires sm_{TRITON[0]}{TRITON[1]}; kdlib never needs it"
    yield _finding(f"Triton, {label}", "supported" if supported else "not supported", "ok", meaning)


def _check_kernels(gpu, name):
    listed = has_kernels(gpu.capability, gpu.kernels)
    build = f"this torch is built for {' '.join(gpu.kernels) or 'no GPU'}"
    is_old = gpu.capability < TRITON
    remedy = f"{OLD_BUILDS} (a build with sm_60, before torch 2.15)" if is_old else "install a torch build for this GPU"
    remedy += ", or choose another accelerator"
    if gpu.failed:
        reason = f"; {build}, without {gpu.sm}" if not listed else ""
        return _finding(name, "do not work", "error", f"{gpu.failed}{reason}", remedy if not listed else (
            "restart the session; if the error persists, reinstall torch for the GPU driver (see nvidia-smi)"
        ))  # fmt: skip
    if not listed:
        return _finding(name, "work in a short test", "warning", f"{build}, and {gpu.sm} is not among them", remedy)
    return _finding(name, f"a reduction and a backward pass work on {gpu.sm}")


def _check_precision(gpu, name, amp_dtype):
    if amp_dtype == "bf16" and not gpu.bf16:
        meaning = "the GPU has no native bf16; torch emulates it slowly"
        return _finding(name, "bf16 (configured)", "warning", meaning, "set amp_dtype to auto")
    if amp_dtype != "auto":
        return _finding(name, f"{amp_dtype} (configured)")
    if gpu.bf16:
        return _finding(name, "bf16")
    meaning = (
        "the GPU has no native bf16 (torch may report emulated support). Weights stay in fp32 with a loss scaler; the "
        "first steps may be skipped until its scale fits"
    )
    return _finding(name, "fp16", "warning", meaning)


def _check_teacher_device(count, config):
    if config.teacher_device != "auto":
        return _finding("teacher device", f"{config.teacher_device} (configured)")
    idle = f"; {count - 2} other GPUs stay idle" if count > 2 else ""
    meaning = f"the teacher prefetches a batch there while the student trains on the first GPU{idle}"
    return _finding("teacher device", "second GPU", "warning" if idle else "ok", meaning)


def gib(size):
    """Formats a number of bytes."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
