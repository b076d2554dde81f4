"""Files of a run folder that other tools read: JSON written beside and renamed, records appended a line each."""

import json
import math
import os
from pathlib import Path


def write_text(path, text):
    """Write a whole file or nothing: beside the target, flushed to the disk, then renamed over it."""
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path, value):
    """Write one JSON value, whole or not at all. Numbers that JSON has no word for (nan, inf) become null."""
    write_text(path, json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


class Records:
    """The file `records.jsonl`: one JSON object a line, in the order they happened."""

    def __init__(self, path):
        self.path = Path(path)

    def append(self, record):
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(_plain(record), ensure_ascii=False) + "\n")


def read_records(path):
    """All whole records of a file; a last line cut off by a kill is left out. ValueError names any other bad line."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path} line {number} is not JSON: {line[:60]!r}") from None
    return records


def _plain(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class RunFolder:
    """The files of one run. Nothing is written before `open`."""

    def __init__(self, path):
        self.path = Path(path)
        self.records = Records(self.path / "records.jsonl")

    def refuse_foreign(self):
        """Raise ValueError where this folder can't take a new run: it holds one, holds other files, or can't be written."""
        path = self.path
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {path} is a file; give a folder")
        if path.exists() and any(path.iterdir()):
            held = "another run" if (path / "config.json").exists() else "other files"
            raise ValueError(f"--out {path} holds {held}; give a new folder (nothing was changed)")
        parent = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
        if not os.access(parent, os.W_OK):
            raise ValueError(f"--out {path} can't be written: {parent} is read-only")

    def open(self, config, env):
        """Create the folder with `config.json` and `env.json`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "config.json", config)
            write_json(self.path / "env.json", env)
        except OSError as error:
            raise ValueError(f"--out {self.path} can't be written: {error.strerror or error}") from None

    def status(self, state, **facts):
        """Write `status.json`: `state` is running, paused, complete or failed."""
        write_json(self.path / "status.json", {"state": state, **facts})
