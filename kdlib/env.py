"""The machine and its folders: what is installed, where caches lie."""

import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = ("kdlib", "torch", "transformers", "datasets", "accelerate", "safetensors", "tokenizers", "numpy")


def cache_folder():
    """Where kdlib keeps what it can make again: `$KDLIB_CACHE`, else `kdlib` in the user's cache folder."""
    named = os.environ.get("KDLIB_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlib"


def is_main_process():
    """Whether this process speaks for the run, under any launcher that sets RANK (accelerate, torchrun) or none."""
    return os.environ.get("RANK", "0") == "0"


def describe(devices=()):
    """Versions and machine of this run, for `env.json`. `devices` are the names of the accelerators in use."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "image": os.environ.get("KAGGLE_DOCKER_IMAGE"),
        "devices": list(devices),
        "versions": versions,
    }
