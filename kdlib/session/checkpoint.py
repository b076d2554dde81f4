"""Checkpoints: all that a run needs to go on, whole or not at all.

`step-00000400/` holds groups of tensors as `.safetensors`, everything else in `state.json`, and in `manifest.json` the
size and SHA-256 of each. A folder is made beside, flushed to the disk and renamed; one whose files do not agree with its
manifest is broken. Nothing here can run code while it is read.
"""

import collections.abc
import concurrent.futures
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import safetensors.torch

from kdlib import environment, files, memory
from kdlib.files import FULL, read_json, write_json

FORMAT = 2
"""Goes up when a checkpoint of before can no longer be gone on with."""
MANIFEST, STATE = "manifest.json", "state.json"
OVERHEAD_BYTES = 2**20


class Broken(Exception):
    """A checkpoint that is not whole; the text says which file and how."""


def folder_name(step):
    return f"step-{step:08d}"


def write(folder, step, groups, facts, keep=1, reserve_bytes=0):
    """Write a checkpoint of `step` below `folder` and remove all but the newest `keep`; its path.

    `groups` maps names to `{name: tensor}`, `facts` is a plain value. A checkpoint of this step that is there already stays:
    nothing whole is ever taken away before something newer is whole. Raises OSError (ENOSPC) before anything is written
    where the disk has not room for it and `reserve_bytes` more, after older checkpoints but the newest one were given up.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / folder_name(step)).exists():
        return folder / folder_name(step)
    clean(folder)
    _make_room(folder, sum(size_of(tensors) for tensors in groups.values()) + OVERHEAD_BYTES, reserve_bytes)
    try:
        with files.atomic(folder / folder_name(step)) as beside:
            beside.mkdir()
            for name, tensors in groups.items():
                safetensors.torch.save_file(tensors, beside / f"{name}.safetensors")
            (beside / STATE).write_text(json.dumps(facts), encoding="utf-8")
            written = {
                path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(beside.iterdir())
            }
            listed = {"format": FORMAT, "step": step, "files": written}
            write_json(beside / MANIFEST, {**listed, "sha256": _hash_of(listed)})
    except safetensors.SafetensorError as error:
        if _is_full(folder):
            raise OSError(errno.ENOSPC, f"no room for checkpoint {folder_name(step)}", str(folder)) from error
        raise
    keep_last(folder, keep)
    return folder / folder_name(step)


class Groups(collections.abc.Mapping):
    """The groups of tensors of a checkpoint by name, `{name: tensor}` each, loaded when asked for: all at once may take more
    memory than the run.
    """

    def __init__(self, files):
        self.files = files

    def __getitem__(self, name):
        return safetensors.torch.load_file(self.files[name])

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)


def read(path):
    """`(Groups, facts)` of a checkpoint; `Broken` where any file is not as it was written."""
    path = Path(path)
    listed = _checked_manifest(path)
    groups = {}
    for name, written in listed["files"].items():
        file = path / name
        if not file.is_file():
            raise Broken(f"{name} is missing")
        if file.stat().st_size != written["bytes"]:
            raise Broken(f"{name} has {file.stat().st_size} bytes, not {written['bytes']}")
        if _hash(file) != written["sha256"]:
            raise Broken(f"{name} was changed after it was written")
        if file.suffix == ".safetensors":
            try:
                with safetensors.safe_open(file, framework="pt"):
                    groups[file.stem] = file
            except (safetensors.SafetensorError, OSError) as error:
                raise Broken(f"{name} can't be read: {error}") from None
    if listed["format"] != FORMAT:
        raise ValueError(
            f"checkpoint {path.name} has format {listed['format']}, this kdlib reads {FORMAT}; go on with the kdlib that "
            "wrote it, or start a new --out"
        )
    try:
        return Groups(groups), read_json(path / STATE)
    except (OSError, ValueError) as error:
        raise Broken(f"{STATE} can't be read: {error}") from None


def newest(folder):
    """`(path, groups, facts, broken)` of the newest whole checkpoint below `folder`, all None where there is none; `broken`
    tells of newer ones that are not whole, `{path: what is wrong}`.
    """
    broken = {}
    for path in sorted(Path(folder).glob("step-????????"), reverse=True):
        try:
            return path, *read(path), broken
        except Broken as error:
            broken[path] = str(error)
    return None, None, None, broken


def newest_name(folder):
    """Name of the newest checkpoint there is, whole as far as its name tells; None where there is none."""
    return max((path.name for path in Path(folder).glob("step-????????")), default=None)


def set_aside(path):
    """Rename a broken checkpoint, so that it is not taken for one again; it goes with the next one that is written."""
    aside = path.with_name(path.name + ".broken")
    files.remove(aside)
    os.replace(path, aside)


def copy_checkpoint(path, folder):
    """Copy a checkpoint into another folder of checkpoints, whole or not at all."""
    files.copy(path, Path(folder) / path.name)


def keep_last(folder, count):
    """Remove all but the newest `count` checkpoints in `folder`, and what is left of broken ones."""
    for old in sorted(Path(folder).glob("step-????????"))[:-count]:
        shutil.rmtree(old)
    for broken in Path(folder).glob("step-????????.broken"):
        shutil.rmtree(broken)


def clean(folder):
    """Remove what a kill left half-written."""
    for beside in Path(folder).glob("step-????????.tmp"):
        files.remove(beside)


def size_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class BackgroundWriter:
    """Writes checkpoints behind the training, one at a time. `copies` (`backup.BackupUploader`) are given each that is whole, and
    give up what they keep where the disk is full.
    """

    def __init__(self, clock, copies=None):
        self.clock, self.copies = clock, copies
        self.pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdlib-checkpoint")
        self.pending = None
        self.write_s = 0.0

    def start(self, folder, step, groups, *more):
        """Begin to `write`, once the one before is whole. Where the host's memory is short it is waited for: training goes
        on in the room that the copies take.
        """
        self.wait()
        try:
            self.pending = self.pool.submit(self._write, (folder, step, groups, *more))
        except RuntimeError:  # the interpreter is shutting down and begins no more threads
            self._write((folder, step, groups, *more))
        if memory.free("cpu") < 2 * sum(map(size_of, groups.values())):
            self.wait()

    def wait(self):
        """Wait until nothing is being written; raises what went wrong with it."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def pop_alerts(self, place):
        """Alerts of the copies, at `place()`."""
        return self.copies.pop_alerts(place) if self.copies else []

    def close(self):
        self.pool.shutdown(wait=True)
        if self.copies:
            self.copies.close()

    def _write(self, arguments):
        started = self.clock.now()
        try:
            path = write(*arguments)
        except OSError as error:
            if not (self.copies and error.errno in FULL and self.copies.cancel()):
                raise
            path = write(*arguments)
        if self.copies:
            self.copies.offer(path)
        self.write_s = self.clock.now() - started


def _make_room(folder, num_bytes, reserve_bytes):
    for keep in (None, 1):
        if keep:
            keep_last(folder, keep)
        free = environment.free_bytes(folder)
        if free >= num_bytes + reserve_bytes:
            return
    raise OSError(
        errno.ENOSPC,
        f"a checkpoint takes {num_bytes / 2**20:.0f} MB and {reserve_bytes / 2**20:.0f} MB are kept in reserve, but only "
        f"{free / 2**20:.0f} MB are free",
        str(folder),
    )


def _checked_manifest(path):
    try:
        listed = json.loads((path / MANIFEST).read_bytes())
        written = listed.pop("sha256")
        whole = written == _hash_of(listed) and path.name == folder_name(listed["step"])
    except FileNotFoundError:
        raise Broken(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Broken(f"{MANIFEST} can't be read") from None
    if not whole:
        raise Broken(f"{MANIFEST} was changed after it was written, or belongs to another checkpoint")
    return listed


def _hash_of(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _is_full(folder):
    return environment.free_bytes(folder) < OVERHEAD_BYTES
