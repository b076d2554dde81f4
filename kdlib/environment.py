"""Facts about the machine: environment variables, processors, disk space, installed versions, Kaggle.

No function raises if the system does not provide a fact; each returns a harmless default instead.
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
    """Returns the folder for reproducible files: `$KDLIB_CACHE`, or `kdlib` in the user's cache folder."""
    if folder := os.environ.get("KDLIB_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kdlib"


def variable(name):
    """Returns an environment variable, or None if it is unset or empty."""
    return os.environ.get(name) or None


def set_if_unset(name, value):
    """Sets an environment variable that is unset or empty, unless `value` is None."""
    if value and not variable(name):
        os.environ[name] = value


def first_line(error):
    """Returns the first line of an error's message, or the name of its class if it has none."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


def child_environment(**variables):
    """Returns the environment for a child process with this process's module search path, updated by `variables`."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), **variables}


def is_main_process():
    """Whether this is rank 0, under any launcher that sets RANK (accelerate, torchrun) or none."""
    return os.environ.get("RANK", "0") == "0"


def on_kaggle():
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


MOUNTS = Path("/kaggle/input")


def in_batch_kernel():
    """Whether this is a Kaggle kernel in a non-interactive batch session."""
    return os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch"


def mounts():
    """Returns the folder of a kernel's inputs; `$KDLIB_KAGGLE_INPUT` overrides it."""
    return Path(os.environ.get("KDLIB_KAGGLE_INPUT") or MOUNTS)


def session_age_s(processes=None):
    """Returns the seconds since the machine started; 0 outside Kaggle. `$KDLIB_PROC` overrides `/proc`."""
    if not on_kaggle():
        return 0.0
    processes = processes or Path(os.environ.get("KDLIB_PROC") or "/proc")
    try:
        started = int((processes / "1" / "stat").read_text().rsplit(")", 1)[1].split()[19]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, float((processes / "uptime").read_text().split()[0]) - started)
    except (OSError, ValueError, IndexError, AttributeError, ZeroDivisionError):
        return 0.0


KAGGLE_OUTPUT_BYTES = 20 * 10**9
"""Maximum size of a kernel's output; Kaggle discards more."""


def free_bytes(folder):
    """Returns the bytes that can be written to a folder; infinite if unknown. Kaggle limits its working folder."""
    try:
        free = shutil.disk_usage(folder).free
    except (OSError, AttributeError):
        free = math.inf
    with contextlib.suppress(OSError):  # the working folder was removed
        if on_kaggle() and Path(folder).resolve().is_relative_to(Path.cwd()):
            free = min(free, KAGGLE_OUTPUT_BYTES - _folder_bytes(Path.cwd()))
    return free


def _folder_bytes(folder):
    """Returns the bytes of all files below a folder, skipping files that other processes remove meanwhile."""
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
    """Returns the disk space that checkpoints must leave free: on Kaggle, room for the notebook and its report."""
    return (1024 if on_kaggle() else 16) * 2**20


def num_processors():
    """Returns the number of CPUs that this process may use; 1 if unknown."""
    try:
        return len(os.sched_getaffinity(0)) or 1
    except (OSError, AttributeError):
        return os.cpu_count() or 1


@contextlib.contextmanager
def single_tokenizer_thread():
    """Disables the threads of the tokenizers library inside the block: forked processes would deadlock on them."""
    environment, before = os.environ, os.environ.get("TOKENIZERS_PARALLELISM")
    environment["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        os.environ = environment  # noqa: B003 - datasets replaces it by a copy
        del environment["TOKENIZERS_PARALLELISM"]
        if before is not None:
            environment["TOKENIZERS_PARALLELISM"] = before


def describe(devices=()):
    """Returns versions and machine for `env.json`. `devices`: names of the accelerators in use."""
    versions = {"kdlib": __version__}  # not from metadata: a notebook may carry kdlib without installing it
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
