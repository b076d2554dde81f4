"""Checkpoints of a run: atomic writes, checksums, and the schedule that decides when one is due.

`step-00000400/` holds groups of tensors as `.safetensors`, other values in `state.json`, and the size and SHA-256 of
each file in `manifest.json`. A folder is written under a temporary name, flushed and renamed. Reading never runs code.
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
from kdlib.files import DISK_FULL, read_json, write_json

FORMAT = 2
"""Version of the checkpoint format. It goes up when older checkpoints can no longer be resumed."""
MANIFEST, STATE = "manifest.json", "state.json"
OVERHEAD_BYTES = 2**20
SAVE_EVERY_S, SAVE_SHARE = 120.0, 0.02
"""Least seconds between checkpoints if `save_steps` is 0, and the largest share of the time that they may take."""


class CorruptCheckpoint(Exception):
    """A checkpoint with a missing or changed file; the message names the file."""


def folder_name(step):
    return f"step-{step:08d}"


def write(folder, step, groups, facts, keep=1, reserve_bytes=0):
    """Writes a checkpoint of `step` below `folder`, removes all but the newest `keep` and returns its path.

    `groups` is `{name: {name: tensor}}`, `facts` is JSON. An existing checkpoint of this step is kept. If the disk
    lacks room for the checkpoint and `reserve_bytes` more, older checkpoints except the newest are removed first. If
    that is not enough, OSError (ENOSPC) is raised before anything is written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / folder_name(step)
    if path.exists():
        return path
    clean(folder)
    _make_room(folder, sum(size_of(tensors) for tensors in groups.values()) + OVERHEAD_BYTES, reserve_bytes)
    try:
        with files.atomic(path) as temporary:
            temporary.mkdir()
            for name, tensors in groups.items():
                safetensors.torch.save_file(tensors, temporary / f"{name}.safetensors")
            (temporary / STATE).write_text(json.dumps(facts), encoding="utf-8")
            entries = {
                file.name: {"bytes": file.stat().st_size, "sha256": _hash(file)} for file in sorted(temporary.iterdir())
            }
            manifest = {"format": FORMAT, "step": step, "files": entries}
            write_json(temporary / MANIFEST, {**manifest, "sha256": _hash_of(manifest)})
    except safetensors.SafetensorError as error:
        if environment.free_bytes(folder) < OVERHEAD_BYTES:
            raise OSError(errno.ENOSPC, f"no room for checkpoint {path.name}", str(folder)) from error
        raise
    keep_last(folder, keep)
    return path


class Groups(collections.abc.Mapping):
    """Tensor groups of a checkpoint, `{name: {name: tensor}}`, each loaded on access to limit peak memory."""

    def __init__(self, files):
        self.files = files

    def __getitem__(self, name):
        return safetensors.torch.load_file(self.files[name])

    def __iter__(self):
        return iter(self.files)

    def __len__(self):
        return len(self.files)


def read(path):
    """Returns `(Groups, facts)` of a checkpoint. Raises `CorruptCheckpoint` if a file differs from the manifest."""
    path = Path(path)
    manifest = _read_manifest(path)
    groups = {}
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise CorruptCheckpoint(f"{name} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise CorruptCheckpoint(f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}")
        if _hash(file) != entry["sha256"]:
            raise CorruptCheckpoint(f"{name} was changed after it was written")
        if file.suffix == ".safetensors":
            try:
                with safetensors.safe_open(file, framework="pt"):
                    groups[file.stem] = file
            except (safetensors.SafetensorError, OSError) as error:
                raise CorruptCheckpoint(f"{name} can't be read: {error}") from None
    if manifest["format"] != FORMAT:
        raise ValueError(
            f"checkpoint {path.name} has format {manifest['format']}, this kdlib reads {FORMAT}; resume it with the kdlib "
            "that wrote it, or start a new --out"
        )
    try:
        return Groups(groups), read_json(path / STATE)
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{STATE} can't be read: {error}") from None


def newest(folder):
    """Returns `(path, groups, facts, errors)` of the newest valid checkpoint below `folder`; the first three are None
    if there is none. `errors` is `{path: message}` for newer, corrupt checkpoints.
    """
    errors = {}
    for path in sorted(Path(folder).glob("step-????????"), reverse=True):
        try:
            return path, *read(path), errors
        except CorruptCheckpoint as error:
            errors[path] = str(error)
    return None, None, None, errors


def newest_name(folder):
    """Returns the name of the newest checkpoint, without reading it, or None."""
    return max((path.name for path in Path(folder).glob("step-????????")), default=None)


def set_aside(path):
    """Renames a corrupt checkpoint, so that it is ignored. The next write removes it."""
    aside = path.with_name(path.name + ".broken")
    files.remove(aside)
    os.replace(path, aside)


def copy_checkpoint(path, folder):
    """Copies a checkpoint atomically into another folder of checkpoints."""
    files.copy(path, Path(folder) / path.name)


def keep_last(folder, count):
    """Removes all but the newest `count` checkpoints in `folder`, and all corrupt ones that were set aside."""
    for old in sorted(Path(folder).glob("step-????????"))[:-count]:
        shutil.rmtree(old)
    for corrupt in Path(folder).glob("step-????????.broken"):
        shutil.rmtree(corrupt)


def clean(folder):
    """Removes checkpoints that a killed process left incomplete."""
    for temporary in Path(folder).glob("step-????????.tmp"):
        files.remove(temporary)


def size_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


class BackgroundWriter:
    """Writer of checkpoints in a background thread, one at a time. `uploader` (`backup.BackupUploader`) is offered each
    finished checkpoint, and frees its files if the disk is full.
    """

    def __init__(self, clock, uploader=None):
        self.clock, self.uploader = clock, uploader
        self.pool = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdlib-checkpoint")
        self.pending = None
        self.write_s = 0.0

    def start(self, *arguments):
        """Starts `write(*arguments)` after the previous write. If RAM is short, waits until the copies are written."""
        self.wait()
        try:
            self.pending = self.pool.submit(self._write, arguments)
        except RuntimeError:  # the interpreter is shutting down and starts no more threads
            self._write(arguments)
        _, _, groups, *_ = arguments
        if memory.free("cpu") < 2 * sum(map(size_of, groups.values())):
            self.wait()

    def wait(self):
        """Waits for the pending write, and raises its error."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def pop_alerts(self, get_place):
        """Returns new alerts of the uploader, located at `get_place()`."""
        return self.uploader.pop_alerts(get_place) if self.uploader else []

    def close(self):
        self.pool.shutdown(wait=True)
        if self.uploader:
            self.uploader.close()

    def _write(self, arguments):
        started = self.clock.now()
        try:
            path = write(*arguments)
        except OSError as error:
            if not (self.uploader and error.errno in DISK_FULL and self.uploader.cancel()):
                raise
            path = write(*arguments)
        if self.uploader:
            self.uploader.offer(path)
        self.write_s = self.clock.now() - started


class CheckpointSchedule:
    """Schedule that writes an `experiment` to a `run_folder.RunFolder` with a `BackgroundWriter`.

    `folder` is None in a process that does not write. `run_identity` is stored in each checkpoint. `step` is the step
    of the last checkpoint, `total_s` the time that all checkpoints took.
    """

    def __init__(self, experiment, run_identity, folder, writer, has_checkpoint):
        self.experiment, self.run_identity, self.folder, self.writer = experiment, run_identity, folder, writer
        self.config, self.clock, self.budget = experiment.config, experiment.clock, experiment.budget
        self.has_checkpoint, self.step, self.saved_at, self.total_s = has_checkpoint, None, self.clock.now(), 0.0

    def is_due(self, arm):
        """Returns whether a checkpoint is due at the current step of `arm`."""
        if not arm.step or arm.done or not self.experiment.evaluations_done(arm):
            return arm.done
        if self.config.save_steps:
            return arm.step % self.config.save_steps == 0
        return not self.has_checkpoint or self.clock.now() - self.saved_at >= self.interval_s()

    def interval_s(self):
        return max(SAVE_EVERY_S, self.budget.expected("save") / SAVE_SHARE)

    def start(self):
        """Copies the state now and writes it in the background.

        Waits for the first checkpoint, to measure its cost and to detect errors early. Also waits for every checkpoint
        under `save_steps`, so that no more steps than that can be lost.
        """
        started = self.clock.now()
        self.writer.wait()
        experiment = self.experiment
        if experiment.training is None or self.step == experiment.step:
            return
        if not experiment.training.is_finite():
            return  # a checkpoint with NaN weights must not replace an older one
        groups = experiment.groups()
        if self.folder:
            facts = {
                **self.run_identity,
                "course": experiment.facts(),
                "chunk": experiment.scorer.chunk,
                "halvings": experiment.scorer.halvings,
                "records_bytes": self.folder.records.position(),
            }
            copied_s = self.clock.now() - started
            keep, reserve = self.config.keep_checkpoints, environment.disk_reserve_bytes()
            self.writer.start(self.folder.checkpoints, experiment.step, groups, facts, keep, reserve)
            if not self.has_checkpoint or self.config.save_steps:
                self.writer.wait()
            self.budget.record("save", copied_s + self.writer.write_s)
        self.has_checkpoint, self.step, self.saved_at = True, experiment.step, self.clock.now()
        self.total_s += self.saved_at - started

    def flush(self):
        """Saves the current step, waits for the write, and returns its folder name, or "" if nothing was saved."""
        self.start()
        self.writer.wait()
        return folder_name(self.step) if self.step == self.experiment.step else ""


def _make_room(folder, num_bytes, reserve_bytes):
    for keep in (None, 1):
        if keep:
            keep_last(folder, keep)
        free = environment.free_bytes(folder)
        if free >= num_bytes + reserve_bytes:
            return
    raise OSError(
        errno.ENOSPC,
        f"a checkpoint needs {num_bytes / 2**20:.0f} MB and {reserve_bytes / 2**20:.0f} MB are kept in reserve, but only "
        f"{free / 2**20:.0f} MB are free",
        str(folder),
    )


def _read_manifest(path):
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        checksum = manifest.pop("sha256")
        is_valid = checksum == _hash_of(manifest) and path.name == folder_name(manifest["step"])
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CorruptCheckpoint(f"{MANIFEST} can't be read") from None
    if not is_valid:
        raise CorruptCheckpoint(f"{MANIFEST} was changed after it was written, or belongs to another checkpoint")
    return manifest


def _hash_of(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
