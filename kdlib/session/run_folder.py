"""Folder of a run: its files, its lock and its records."""

import contextlib
import fcntl
import os
from pathlib import Path

from kdlib import files

LEFTOVERS = {".lock", "config.json.tmp"}
"""Files of a run that was killed before its `config.json` was complete."""


class Records:
    """File `records.jsonl`: one JSON object per line, in chronological order."""

    def __init__(self, path):
        self.path = Path(path)

    def append(self, record):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(files.json_text(record) + "\n")

    def position(self):
        """Flushes the file to disk and returns its size in bytes."""
        if not self.path.exists():
            return 0
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def truncate(self, position):
        """Removes records of lost steps, written after byte `position`, and an incomplete last line."""
        if self.path.exists():
            content = self.path.read_bytes()[:position]
            os.truncate(self.path, content.rfind(b"\n") + 1)


class RunFolder:
    """Files of one run. Nothing is written before `open`."""

    def __init__(self, path):
        self.path = Path(path)
        self.records = Records(self.path / "records.jsonl")
        self.checkpoints, self.cache = self.path / "checkpoints", self.path / "teacher_cache"
        self.lock = None

    def holds_run(self):
        """Returns whether `config.json` belongs to a run (a model's folder has a `config.json` too)."""
        try:
            return "kd_method" in files.read_json(self.path / "config.json")
        except (OSError, ValueError, TypeError):
            return False

    def can_resume(self):
        """Returns whether the folder has a checkpoint, a verdict, or part of the run's own teacher cache."""
        paths = (self.path / "verdict.json", self.cache / "cache.json")
        return self.holds_run() and (any(self.checkpoints.glob("step-*")) or any(path.exists() for path in paths))

    def check_usable(self, may_hold_run=False):
        """Raises ValueError if the folder holds a run or other files, or is not writable."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {path} is a file; give a folder")
        names = path.exists() and {file.name for file in path.iterdir()} - LEFTOVERS
        if names and not (may_hold_run and self.holds_run()):
            content = "another run" if self.holds_run() else "other files"
            raise ValueError(f"--out {path} holds {content}; give a new folder (nothing was changed)")
        parent = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"--out {path} can't be written: {parent} is read-only")

    def acquire(self):
        """Locks the folder until the process ends. Raises ValueError if another process holds the lock."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            while self.lock is None:
                with contextlib.ExitStack() as stack:
                    file = stack.enter_context(open(self._lock_path, "a"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._lock_path.exists() and os.path.samestat(os.fstat(file.fileno()), self._lock_path.stat()):
                        self.lock = file  # else the previous owner has just removed the file that was locked
                        stack.pop_all()
        except BlockingIOError:
            raise ValueError(f"another process uses --out {self.path}; wait for it, or give a new folder") from None
        except OSError as error:
            raise ValueError(f"--out {self.path} can't be written: {error.strerror or error}") from None

    def release(self):
        """Unlocks the folder."""
        if self.lock is not None:
            with contextlib.suppress(OSError):
                self._lock_path.unlink(missing_ok=True)
            self.lock.close()
            self.lock = None

    @property
    def _lock_path(self):
        return self.path / ".lock"

    def open(self, config, env, data):
        """Writes `config.json`, `env.json` and, unless it is empty, `data.json` at the start of a session."""
        try:
            files.recover(self.path / "student")
            files.write_json(self.path / "config.json", config)
            files.write_json(self.path / "env.json", env)
            if data:
                files.write_json(self.path / "data.json", data)
            self.records.path.touch()
        except OSError as error:
            raise ValueError(f"--out {self.path} can't be written: {error.strerror or error}") from None

    def status(self, state, **facts):
        """Writes `status.json` (`state`: running, paused, complete or failed), in place if the disk is full."""
        path = self.path / "status.json"
        value = {"state": state, **facts}
        try:
            files.write_json(path, value)
        except OSError as error:
            if error.errno not in files.DISK_FULL or not path.exists():
                raise
            path.write_text(files.json_text(value), encoding="utf-8")

    def last_status(self):
        """Returns the content of `status.json`, or {} if it can't be read."""
        return files.read_json_or_empty(self.path / "status.json")
