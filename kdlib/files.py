"""Atomic replacement of files and folders that survives a kill of the process, and JSON files."""

import contextlib
import errno
import json
import math
import os
import shutil
from pathlib import Path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk."""


@contextlib.contextmanager
def atomic(path, writer=0, replace=True):
    """Yields a temporary path for a file or folder that replaces `path` at the end of the block, after a flush to disk.

    If the block raises, `path` stays unchanged. Leftovers of an earlier kill are recovered first. `writer` numbers
    concurrent writers of the same path. With `replace=False`, raises OSError if another writer has finished the folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path, writer)
    recover(path, writer) if replace else remove(temporary)
    try:
        yield temporary
        _flush(temporary)
        _replace(temporary, path) if replace else os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    _flush_folder(path.parent)


def write_text(path, text, writer=0):
    """Writes a text file atomically; `writer` as for `atomic`."""
    with atomic(path, writer) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value, writer=0):
    """Writes `json_text` of a value atomically."""
    write_text(path, json_text(value, indent=2) + "\n", writer)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_json_or_empty(path):
    """Loads a JSON object; returns an empty dict if the file is missing, truncated or holds another type."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def json_text(value, indent=None):
    """Serializes a value as JSON. NaN and infinity become null."""
    return json.dumps(_finite(value), indent=indent, ensure_ascii=False)


def read_records(path):
    """Loads the records of a JSON Lines file; an empty list if it is missing.

    A truncated last line is ignored. Raises ValueError for any other invalid line.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else []
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path} line {number} is not JSON: {line[:60]!r}") from None
    return records


def recover(path, writer=0):
    """Removes leftovers of a killed `atomic`. Restores the old folder if the kill came between the two renames."""
    path = Path(path)
    remove(_temporary_path(path, writer))
    old = _old_path(path)
    if old.exists() and not path.exists():
        os.replace(old, path)
    remove(old)


def remove(path):
    """Removes a file or folder if it exists."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy(source, path, writer=0):
    """Copies a file or folder to `path`, replacing it atomically."""
    with atomic(path, writer) as temporary:
        _copy(Path(source), temporary)


def _copy(source, target):
    """Copies contents without permissions, so that copies of read-only files are writable."""
    if source.is_dir():
        target.mkdir()
        for entry in source.iterdir():
            _copy(entry, target / entry.name)
    else:
        shutil.copyfile(source, target)


def _temporary_path(path, writer):
    return path.with_name(f"{path.name}.{writer}.tmp" if writer else f"{path.name}.tmp")


def _old_path(path):
    return path.with_name(f"{path.name}.old")


def _replace(temporary, path):
    if not (path.is_dir() and temporary.is_dir()):
        os.replace(temporary, path)
        return
    old = _old_path(path)  # a rename cannot replace a folder that is not empty
    os.replace(path, old)
    try:
        os.replace(temporary, path)
    except OSError:
        os.replace(old, path)
        raise
    shutil.rmtree(old)


def _flush(path):
    if path.is_dir():
        for entry in path.iterdir():
            _flush(entry)
        _flush_folder(path)
    else:
        _sync(path, os.O_RDWR)


def _flush_folder(path):
    if os.name != "nt":  # Windows cannot open folders
        _sync(path, os.O_RDONLY)


def _sync(path, flags):
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _finite(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
