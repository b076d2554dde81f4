"""The machine and its folders: what is installed, where caches lie. No fact about the machine raises: one that the system
does not give has a value that stands in nobody's way.
"""

import contextlib
import importlib.metadata
import math
import os
import platform
import shutil
import sys
from pathlib import Path

from kdlib import __version__

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "safetensors", "tokenizers", "numpy")


def cache_folder():
    """Where kdlib keeps what it can make again: `$KDLIB_CACHE`, else `kdlib` in the user's cache folder."""
    named = os.environ.get("KDLIB_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlib"


def variable(name):
    """An environment variable, None where it is not set or empty."""
    return os.environ.get(name) or None


def of_a_process(**more):
    """The environment of a process of ours: that of this one, its modules found where this one finds them."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **more}


def is_main_process():
    """Whether this process speaks for the run, under any launcher that sets RANK (accelerate, torchrun) or none."""
    return os.environ.get("RANK", "0") == "0"


def on_kaggle():
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


MOUNTS = Path("/kaggle/input")


def in_batch_kernel():
    """Whether this is a Kaggle kernel that nobody sits in front of."""
    return os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"


def mounts():
    """Where Kaggle mounts a kernel's inputs; `$KDLIB_KAGGLE_INPUT` where the layout is rebuilt elsewhere."""
    return Path(os.environ.get("KDLIB_KAGGLE_INPUT") or MOUNTS)


def session_age_s(processes=None):
    """Seconds since the session began: on Kaggle since the machine's first process, elsewhere 0 (it begins with the run).
    `$KDLIB_PROC` stands for `/proc` where a kernel's machine is rebuilt elsewhere.
    """
    if not on_kaggle():
        return 0.0
    processes = processes or Path(os.environ.get("KDLIB_PROC") or "/proc")
    try:
        started = int((processes / "1" / "stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float((processes / "uptime").read_text().split()[0]) - started)
    except (OSError, ValueError, IndexError, AttributeError, ZeroDivisionError):
        return 0.0


KEPT_BYTES = 20 * 10**9
"""Of what lies in a kernel's working folder Kaggle keeps no more."""


def free_bytes(folder):
    """Bytes that a folder still takes: what its disk has free; on Kaggle no more than it keeps of the working folder.
    Infinite where the system does not tell.
    """
    try:
        free = shutil.disk_usage(folder).free
    except (OSError, AttributeError):
        free = math.inf
    with contextlib.suppress(OSError):  # the working folder was removed
        if on_kaggle() and Path(folder).resolve().is_relative_to(Path.cwd()):
            free = min(free, KEPT_BYTES - _size_of(Path.cwd()))
    return free


def _size_of(folder):
    """Bytes of all files below a folder. Others may write and remove files meanwhile: what has vanished counts nothing."""
    size, folders = 0, [folder]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        size += entry.stat(follow_symlinks=False).st_size
    return size


def disk_reserve_bytes():
    """What a checkpoint leaves free on the disk: on Kaggle room for the notebook and its report, which are written last."""
    return (1024 if on_kaggle() else 16) * 2**20


def num_processors():
    """Processors that this process may use; 1 where the system does not tell."""
    try:
        return len(os.sched_getaffinity(0)) or 1
    except (OSError, AttributeError):
        return os.cpu_count() or 1


@contextlib.contextmanager
def single_tokenizer_thread():
    """For processes forked meanwhile: they would hang on the threads of the tokenizers library, which a fork loses."""
    environment, before = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    environment["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003 - datasets puts a copy in its place
        del environment["TOKENIZERS_PARALLELISM"]
        if before is not None:
            environment["TOKENIZERS_PARALLELISM"] = before


def describe(devices=()):
    """Versions and machine of this run, for `env.json`. `devices` are the names of the accelerators in use."""
    versions = {"kdlib": __version__}  # a notebook may carry it, with nothing installed
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": num_processors(),
        "image": os.environ.get("KAGGLE_DOCKER_IMAGE"),
        "devices": list(devices),
        "versions": versions,
    }
