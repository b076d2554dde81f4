"""How much memory is in use, and how much there is."""

import os
from pathlib import Path

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
