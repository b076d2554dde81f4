"""Files and folders that are replaced whole or not at all, whenever the process is killed."""

import contextlib
import errno
import json
import math
import os
import shutil
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors that say a disk is full."""


@contextlib.contextmanager
def atomic(path, writer=0, replace=True):
    """Yields the path beside `path` to write a file or a folder to; on leaving the block it is flushed to the disk and takes
    the place of `path`, whatever is there. If the block raises, `path` stays as it was.

    What an earlier kill left is settled first. `writer` numbers concurrent writers of the same path. Without `replace` a
    folder that another writer has finished meanwhile stays, with an OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path, writer)
    settle(path, writer) if replace else remove(beside)
    try:
        yield beside
        _flush(beside)
        _replace(beside, path) if replace else os.replace(beside, path)
    except BaseException:
        remove(beside)
        raise
    _flush_folder(path.parent)


def write_text(path, text, writer=0):
    """Writes a text file whole or not at all; `writer` as for `atomic`."""
    with atomic(path, writer) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path, value, writer=0):
    """Writes one JSON value, whole or not at all, as `json_text` has it."""
    write_text(path, json_text(value, indent=2) + "\n", writer)


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_known(path):
    """The object in a JSON file of a run at any age; empty where the file is missing, half written or something else."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def json_text(value, indent=None):
    """One JSON value as text. Numbers that JSON has no word for (nan, inf) become null."""
    return json.dumps(_plain(value), indent=indent, ensure_ascii=False)


def read_records(path):
    """All whole records of a file, none where it is missing: a run that has just begun has none. A last line cut off by a
    kill is left out. ValueError names any other bad line.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n") if Path(path).exists() else []
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path} line {number} is not JSON: {line[:60]!r}") from None
    return records


def settle(path, writer=0):
    """Removes what a killed `atomic` left beside `path`, and brings the former folder back if the kill came between the two
    renames that replace one folder by another.
    """
    path = Path(path)
    remove(_beside(path, writer))
    former = _former(path)
    if former.exists() and not path.exists():
        os.replace(former, path)
    remove(former)


def remove(path):
    """Removes a file or folder; nothing happens if there is none."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def copy(source, path, writer=0):
    """Copies a file or a folder to `path`, replacing what is there."""
    with atomic(path, writer) as beside:
        _copy(Path(source), beside)


def _copy(source, target):
    """Copies contents alone: what is mounted read-only becomes writable."""
    if source.is_dir():
        target.mkdir()
        for inner in source.iterdir():
            _copy(inner, target / inner.name)
    else:
        shutil.copyfile(source, target)


def _beside(path, writer):
    return path.with_name(f"{path.name}.{writer}.tmp" if writer else f"{path.name}.tmp")


def _former(path):
    return path.with_name(f"{path.name}.old")


def _replace(beside, path):
    if not (path.is_dir() and beside.is_dir()):
        os.replace(beside, path)
        return
    former = _former(path)  # no system renames a folder over one that is not empty
    os.replace(path, former)
    try:
        os.replace(beside, path)
    except OSError:
        os.replace(former, path)
        raise
    shutil.rmtree(former)


def _flush(path):
    if path.is_dir():
        for inner in path.iterdir():
            _flush(inner)
        _flush_folder(path)
    else:
        _sync(path, os.O_RDWR)


def _flush_folder(path):
    if os.name != "nt":  # Windows opens no folders
        _sync(path, os.O_RDONLY)


def _sync(path, flags):
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(value):
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
