"""The machine: processors, memory, disk, versions, and what its cards really can.

What was looked up (`describe`, `cards`) is plain data, and what it means (`findings_of`) is told from that alone.
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
"""Free memory of the host below which hardly a model loads."""
TRITON = (7, 0)
"""Compute capability from which Triton works."""
CARDS_OF = {"T4": 2}
"""Cards in one of Kaggle's accelerators, where these are several."""
RETIRED = {"P100": "Kaggle retired the P100 on 2026-09-15 and gives two T4s in its place"}
OLD_BUILDS = "pip install torch --index-url https://download.pytorch.org/whl/cu126"
"""Builds that still have kernels for sm_60; torch 2.15 is the first without them."""


@dataclasses.dataclass(frozen=True)
class Card:
    """What torch says of a card, and what came of trying it.

    `capability` as `(7, 5)`; `kernels` as `torch.cuda.get_arch_list()` gives them; `bf16`: it computes in bfloat16 by
    itself, not by emulation; `failed`: what it could not do (`probe`), or empty.
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


def cards():
    """The `Card`s of this machine, each tried out."""
    found = []
    for index in range(torch.cuda.device_count()):
        told = torch.cuda.get_device_properties(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        kernels, capability = tuple(torch.cuda.get_arch_list()), (told.major, told.minor)
        found.append(Card(told.name, told.total_memory, capability, kernels, bf16, probe(f"cuda:{index}")))
    return found


def probe(device):
    """Run on a device what training runs; what failed and how, or empty. A product alone would not tell: it comes from a
    library that knows more cards than torch has kernels for.
    """
    for what, run in OPERATIONS.items():
        try:
            value = run(device)
        except RuntimeError as error:
            return f"{what} ended in: {(str(error).strip().splitlines() or [type(error).__name__])[0][:200]}"
        if value != OPERATIONS_GIVE:
            return f"{what} gave {value}, not {OPERATIONS_GIVE}"
    return ""


def _product(device):
    return (torch.full((2, 8), 0.5, device=device) @ torch.ones(8, 2, device=device))[0, 0].item()


def _reduction(device):
    return torch.arange(1, 9, device=device, dtype=torch.float32).softmax(dim=0).sum().mul(4).round().item()


def _backward(device):
    given = torch.full((2, 4), 2.0, device=device, requires_grad=True)
    (gradient,) = torch.autograd.grad(given.square().mean(dim=1).sum(), given)
    return gradient.sum().div(2).item()


def _half(device):
    given = torch.ones(4, 4, device=device, dtype=torch.float16, requires_grad=True)
    (gradient,) = torch.autograd.grad((given @ given).float().sum(), given)
    return gradient.float().mean().div(2).item()


OPERATIONS = {
    "a matrix product": _product,
    "a reduction": _reduction,
    "a backward pass": _backward,
    "a backward pass in half precision": _half,
}
OPERATIONS_GIVE = 4.0


def has_kernels(capability, kernels):
    """Whether one of torch's `kernels` (`sm_75`, `sm_90a`, `compute_90`) runs on a card: binaries on the same major version
    from their minor one on (with an `a` on theirs alone), `compute` on all later cards.
    """
    for kernel in kernels:
        told = re.fullmatch(r"(sm|compute)_(\d+)(\d)([a-z]?)", kernel)
        if not told:
            continue
        version, exact = (int(told[2]), int(told[3])), told[4] == "a"
        same = version == tuple(capability) if exact else version[0] == capability[0] and version[1] <= capability[1]
        if same or (told[1] == "compute" and not exact and version <= tuple(capability)):
            return True
    return False


def describe():
    """What `findings_of` asks of the machine besides its cards."""
    return {
        **environment.describe(),
        "python": sys.version_info[:3],
        "memory_free": memory.free("cpu"),
        "memory_total": memory.usage("cpu")["total_bytes"],
        "disk_free": environment.free_bytes("."),
        "disk_reserve": environment.disk_reserve_bytes(),
        "on_kaggle": environment.on_kaggle(),
    }


def findings_of(told, found, config, asked=""):
    """The `Finding`s of a machine: `told` by `describe`, with the `Card`s that were `found`. `asked`: the accelerator that
    was asked for by Kaggle's name, or empty.
    """
    made = [_python(told["python"]), *_versions(told["versions"]), *_host(told)]
    if asked:
        made.append(_asked(asked, found))
    if not found:
        made.append(_no_card(told["on_kaggle"]))
    for card in dict.fromkeys(found):
        made += _card(card, [i for i, other in enumerate(found) if other == card], config)
    if len(found) > 1:
        made.append(_teachers_card(len(found), config))
    return made


def _found(*given, **more):
    return Finding("machine", *given, **more)


def _python(version):
    said = ".".join(map(str, version))
    low, high = (".".join(map(str, end)) for end in PYTHONS)
    if version[:2] < PYTHONS[0]:
        return _found("Python", said, "wrong", "kdlib does not run on it", f"take Python {low} to {high}")
    if version[:2] > PYTHONS[1]:
        return _found("Python", said, "note", f"kdlib is tested on Python {low} to {high}")
    return _found("Python", said)


def _versions(versions):
    old = [
        name
        for name, least in AT_LEAST.items()
        if not versions[name] or tuple(map(int, re.findall(r"\d+", versions[name])[:2])) < least
    ]
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    if not old:
        return [_found("packages", said)]
    wanted = " ".join(f'"{name}>={AT_LEAST[name][0]}.{AT_LEAST[name][1]}"' for name in old)
    return [_found("packages", said, "wrong", f"{' and '.join(old)} too old for kdlib", f"pip install -U {wanted}")]


def _host(told):
    free, total, disk = (told[name] for name in ("memory_free", "memory_total", "disk_free"))
    yield _found("processors", str(told["processors"]), number=told["processors"])
    said = f"{gib(free)} free of {gib(total)}"
    if free < LITTLE_BYTES:
        less = "little is free: models are loaded through this memory", "end what else runs here"
        yield _found("memory", said, "note", *less, number=free)
    else:
        yield _found("memory", said, number=free)
    said = f"{gib(disk)} free in this folder"
    if disk <= told["disk_reserve"]:
        less = f"less than the {gib(told['disk_reserve'])} that are kept in reserve: no checkpoint would be written"
        yield _found("disk", said, "wrong", less, "free some room, or run in another folder", number=disk)
    else:
        yield _found("disk", said, number=disk)
    if told["image"]:
        yield _found("image", told["image"])


def _asked(asked, found):
    """Whether the cards are the ones that were asked for."""
    model = re.sub(r"^Nvidia(Tesla)?", "", asked)
    wanted = (re.match(r"[A-Za-z]+\d+", model) or [model])[0]  # T4 of T4Highmem
    there = ", ".join(f"{found.count(card)} x {card.name}" for card in dict.fromkeys(found))
    if not found:
        return _found(
            "accelerator", f"asked for {asked}, no card is there", "wrong", "everything would run on the processor",
            "choose the accelerator in the notebook's settings, or set enable_gpu and machine_shape in "
            "kernel-metadata.json; outside Kaggle, install a torch that is built for CUDA",
        )  # fmt: skip
    said = f"asked for {asked}, got {there}"
    if all(wanted.lower() in re.sub(r"\W", "", card.name).lower() for card in found):
        less = CARDS_OF.get(wanted, 1) - len(found)
        if less > 0:
            return _found("accelerator", said, "note", f"on Kaggle {asked} means {CARDS_OF[wanted]} cards")
        return _found("accelerator", said)
    why = f"{RETIRED[wanted]}. " if wanted in RETIRED else ""
    lost = [] if any(card.bf16 for card in found) else ["trains in fp16 (amp_dtype auto)"]
    lost += ["puts the teacher on the second card (teacher_device auto)"] if len(found) > 1 else []
    does = f" kdlib {' and '.join(lost)}." if lost else ""
    return _found("accelerator", said, "note", f"{why}This is another card than the one asked for.{does}")


def _no_card(on_kaggle):
    means = (
        "everything runs on the processor, in fp32. That is right for the demo and for small models; how long it takes "
        "with these is measured under steps a second"
    )
    remedy = "choose GPU T4 x2 under Settings, Accelerator" if on_kaggle else ""
    return _found("card", "none that torch can use", "note", means, remedy, number=0)


def _card(card, places, config):
    named = f"card{'s' * (len(places) > 1)} {', '.join(map(str, places))}"
    each = " each" * (len(places) > 1)
    yield _found(named, f"{card.name}, {gib(card.memory_bytes)}{each}, {card.sm}", number=card.memory_bytes)
    yield _kernels(card, f"kernels, {named}")
    yield _arithmetic(card, f"arithmetic, {named}", config.amp_dtype)
    possible = card.capability >= TRITON
    told = "kdlib never needs it" if possible else f"it needs sm_{TRITON[0]}{TRITON[1]}; kdlib never needs it"
    yield _found(f"Triton, {named}", "possible" if possible else "not possible", "ok", told)


def _kernels(card, name):
    known = has_kernels(card.capability, card.kernels)
    built = f"this torch is built for {' '.join(card.kernels) or 'no card'}"
    old = card.capability < TRITON
    mend = f"{OLD_BUILDS} (a build that still has sm_60, before torch 2.15)" if old else "install a torch built for it"
    mend += ", or choose another accelerator"
    if card.failed:
        why = f"; {built}, which leaves {card.sm} out" if not known else ""
        return _found(name, "do not work", "wrong", f"{card.failed}{why}", mend if not known else (
            "restart the session; where it stays, reinstall torch for the machine's driver (nvidia-smi names it)"
        ))  # fmt: skip
    if not known:
        return _found(name, "work so far", "note", f"{built}, and {card.sm} is not among them", mend)
    return _found(name, f"a reduction and a backward pass run, {card.sm} is served")


def _arithmetic(card, name, amp_dtype):
    if amp_dtype == "bf16" and not card.bf16:
        means = "the card has no units for it: torch says yes and emulates it"
        return _found(name, "bf16, as set", "note", means, "set amp_dtype to auto")
    if amp_dtype != "auto":
        return _found(name, f"{amp_dtype}, as set")
    if card.bf16:
        return _found(name, "bf16")
    means = (
        "the card has no bf16 units (torch may say otherwise: it emulates them). Weights stay in fp32 and a loss scaler "
        "watches; the first steps may be skipped until it has found its scale"
    )
    return _found(name, "fp16", "note", means)


def _teachers_card(count, config):
    if config.teacher_device != "auto":
        return _found("teacher's place", f"{config.teacher_device}, as set")
    idle = f"; the other {count - 2} cards stay idle" if count > 2 else ""
    means = f"it works a batch ahead there while the student learns on the first{idle}"
    return _found("teacher's place", "second card", "note" if idle else "ok", means)


def gib(size):
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.1f} MiB"
