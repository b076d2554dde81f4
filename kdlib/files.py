"""Files and folders that are replaced whole or not at all, whenever the process is killed."""

import contextlib
import os
import shutil
from pathlib import Path


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
