"""Files and folders that are replaced whole or not at all, at whatever instant the process is killed."""

import os
import signal
import subprocess
import sys

import pytest

from kdlib import environment, files

CHILD = """
import os, signal, sys
from kdlib import files

path, kind, kill_at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0

def dying(real):
    def call(*arguments, **more):
        global calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)
    return call

for module, names in ((os, ("replace", "fsync", "open", "unlink", "rmdir")),):
    for name in names:
        setattr(module, name, dying(getattr(module, name)))
with files.atomic(path) as beside:
    if kind == "folder":
        beside.mkdir()
        for name in ("weights", "card"):
            (beside / name).write_text("new " + name)
    else:
        beside.write_text("new")
"""


def content(path):
    if path.is_dir():
        return {inner.name: inner.read_text() for inner in path.iterdir()}
    return path.read_text() if path.exists() else None


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("begun", [False, True], ids=["new", "replaced"])
def test_a_kill_at_any_call_leaves_the_old_or_the_new(kind, begun, tmp_path):
    """And the next writer ends with the new and nothing beside it. Only a folder that is being replaced may be absent for an
    instant: then it lies beside, and comes back.
    """
    path = tmp_path / "there" / "student"
    old, new = (
        ({"weights": "old"}, {"weights": "new weights", "card": "new card"}) if kind == "folder" else ("old", "new")
    )

    def start():
        if not begun:
            return
        path.parent.mkdir(exist_ok=True)
        if kind == "folder":
            files.remove(path)
            path.mkdir()
            (path / "weights").write_text("old")
        else:
            path.write_text("old")

    for kill_at in range(1, 100):
        files.remove(path.parent)
        start()
        command = [sys.executable, "-c", CHILD, str(path), kind, str(kill_at)]
        ended = subprocess.run(command, env=environment.child_environment(), check=False).returncode
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
        former = path.with_name("student.old")
        assert content(path) in ([old, new] if begun else [None, new]) or (kind == "folder" and content(former) == old)
        files.recover(path)
        assert content(path) in ([old, new] if begun else [None, new])
        with files.atomic(path) as beside:
            if kind == "folder":
                beside.mkdir()
                for name, text in new.items():
                    (beside / name).write_text(text)
            else:
                beside.write_text(new)
        assert content(path) == new
        assert [each.name for each in path.parent.iterdir()] == ["student"]
    assert kill_at > 4
    assert content(path) == new


def test_what_raises_leaves_everything_as_it_was(tmp_path):
    path = tmp_path / "student"
    path.mkdir()
    (path / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="half-way"), files.atomic(path) as beside:
        beside.mkdir()
        (beside / "weights").write_text("new")
        raise RuntimeError("half-way")
    assert [each.name for each in tmp_path.iterdir()] == ["student"]
    assert content(path) == {"weights": "old"}


def test_the_former_folder_comes_back_if_the_new_one_can_not_take_its_place(tmp_path, monkeypatch):
    path, real = tmp_path / "student", os.replace
    path.mkdir()
    (path / "weights").write_text("old")

    def failing(source, target):
        if str(source).endswith(".tmp"):
            raise OSError("the disk is gone")
        real(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="the disk is gone"), files.atomic(path) as beside:
        beside.mkdir()
    assert [each.name for each in tmp_path.iterdir()] == ["student"]
    assert content(path) == {"weights": "old"}


def test_the_second_of_two_writers_finds_the_folder_done(tmp_path):
    path = tmp_path / "teacher"
    with pytest.raises(OSError, match=r"not empty|exists"), files.atomic(path, writer=1, replace=False) as slow:
        slow.mkdir()
        (slow / "config").write_text("slow")
        with files.atomic(path, writer=2, replace=False) as fast:
            fast.mkdir()
            (fast / "config").write_text("fast")
    assert content(path) == {"config": "fast"}
    assert [each.name for each in tmp_path.iterdir()] == ["teacher"]


def test_a_copy_of_what_is_read_only_can_be_changed(tmp_path):
    source = tmp_path / "mounted"
    (source / "inner").mkdir(parents=True)
    (source / "inner" / "file").write_text("x")
    (source / "inner" / "file").chmod(0o444)
    (source / "inner").chmod(0o555)
    files.copy(source, tmp_path / "mine")
    (source / "inner").chmod(0o755)
    assert (tmp_path / "mine" / "inner").stat().st_mode & 0o200
    assert (tmp_path / "mine" / "inner" / "file").stat().st_mode & 0o200
