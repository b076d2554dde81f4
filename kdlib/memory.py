"""How much memory is in use, how much there is, and what to do when there was too little."""

import gc
import os
import weakref
from pathlib import Path

import accelerate
import torch


def usage(device):
    """`{"used_bytes", "total_bytes"}` of a device: all of the card's for CUDA, this process's and the host's for a CPU."""
    if torch.device(device).type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return {"used_bytes": total - free, "total_bytes": total}
    page = os.sysconf("SC_PAGE_SIZE")
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[1]) * page if statm.exists() else None
    return {"used_bytes": used, "total_bytes": page * os.sysconf("SC_PHYS_PAGES")}


def free(device):
    """Bytes that can still be allocated on a device."""
    if torch.device(device).type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    known = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return known[0] if known else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def saved_bytes(forward, known=()):
    """Bytes that `forward()` leaves to its backward pass, each tensor's storage once; those of `known` tensors not."""
    left_out = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept = weakref.WeakSet()

    def pack(tensor):
        held = _Held(tensor)
        kept.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        made = forward()
    storages = {held.tensor.untyped_storage().data_ptr(): held.tensor.untyped_storage().nbytes() for held in kept}
    del made
    return sum(size for place, size in storages.items() if place not in left_out)


class _Held:
    """A tensor that only an autograd graph holds: gone when the graph is."""

    def __init__(self, tensor):
        self.tensor = tensor


def ran_out(error):
    """Whether an exception says that there was no memory left, on a card or in the host."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or accelerate.utils.memory.should_reduce_batch_size(error)


def let_go():
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
