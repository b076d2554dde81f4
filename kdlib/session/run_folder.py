"""The folder of a run: its files, its lock, its records."""

import contextlib
import fcntl
import os
from pathlib import Path

from kdlib import files

LEFT_BY_A_KILL = {".lock", "config.json.tmp"}
"""All that there may be of a run that was killed before its `config.json` was whole."""


class Records:
    """The file `records.jsonl`: one JSON object a line, in the order they happened."""

    def __init__(self, path):
        self.path = Path(path)

    def append(self, record):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(files.json_text(record) + "\n")

    def position(self):
        """Bytes written so far, now safe on the disk: where a checkpoint stands among the records."""
        if not self.path.exists():
            return 0
        with open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    def cut(self, position):
        """Forget what was written after `position`: steps that were lost, and will be taken again. A file that is shorter
        ends with its last whole line.
        """
        if self.path.exists():
            text = self.path.read_bytes()[:position]
            os.truncate(self.path, text.rfind(b"\n") + 1)


class RunFolder:
    """The files of one run. Nothing is written before `open`."""

    def __init__(self, path):
        self.path = Path(path)
        self.records = Records(self.path / "records.jsonl")
        self.checkpoints, self.cache = self.path / "checkpoints", self.path / "teacher_cache"
        self.lock = None

    def holds_run(self):
        """Whether a run was begun here: its `config.json` is one of ours (a model's folder has one too)."""
        try:
            return "kd_method" in files.read_json(self.path / "config.json")
        except (OSError, ValueError, TypeError):
            return False

    def has_begun(self):
        """Whether anything can be gone on with: a checkpoint, a verdict, or a part of a teacher cache of its own."""
        whole = (self.path / "verdict.json", self.cache / "cache.json")
        return self.holds_run() and (any(self.checkpoints.glob("step-*")) or any(path.exists() for path in whole))

    def refuse_foreign(self, may_hold_run=False):
        """Raise ValueError where this folder can't take a run: it holds one, holds other files, or can't be written."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {path} is a file; give a folder")
        filled = path.exists() and {file.name for file in path.iterdir()} - LEFT_BY_A_KILL
        if filled and not (may_hold_run and self.holds_run()):
            held = "another run" if self.holds_run() else "other files"
            raise ValueError(f"--out {path} holds {held}; give a new folder (nothing was changed)")
        parent = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"--out {path} can't be written: {parent} is read-only")

    def acquire(self):
        """Make this process the only one that works on the folder; ValueError where another does. The lock goes with its
        owner, however that ends.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            while self.lock is None:
                with contextlib.ExitStack() as stack:
                    file = stack.enter_context(open(self._lock_path, "a"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if self._lock_path.exists() and os.path.samestat(os.fstat(file.fileno()), self._lock_path.stat()):
                        self.lock = file  # else its owner has just removed it: the next to come would not see ours
                        stack.pop_all()
        except BlockingIOError:
            raise ValueError(f"another process works on --out {self.path}; wait for it, or give a new folder") from None
        except OSError as error:
            raise ValueError(f"--out {self.path} can't be written: {error.strerror or error}") from None

    def release(self):
        """Let other processes have the folder."""
        if self.lock is not None:
            with contextlib.suppress(OSError):
                self._lock_path.unlink(missing_ok=True)
            self.lock.close()
            self.lock = None

    @property
    def _lock_path(self):
        return self.path / ".lock"

    def open(self, config, env):
        """Write `config.json` and `env.json` of the session that begins."""
        try:
            files.settle(self.path / "student")
            files.write_json(self.path / "config.json", config)
            files.write_json(self.path / "env.json", env)
            self.records.path.touch()
        except OSError as error:
            raise ValueError(f"--out {self.path} can't be written: {error.strerror or error}") from None

    def status(self, state, **facts):
        """Write `status.json`: `state` is running, paused, complete or failed. On a full disk, over the old one."""
        path = self.path / "status.json"
        value = {"state": state, **facts}
        try:
            files.write_json(path, value)
        except OSError as error:
            if error.errno not in files.FULL or not path.exists():
                raise
            path.write_text(files.json_text(value), encoding="utf-8")

    def last_status(self):
        """What `status.json` says, empty where there is none that can be read."""
        return files.read_known(self.path / "status.json")
