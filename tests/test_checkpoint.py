"""Checkpoints: whole or not at all; damage of any kind is found, named, and costs no more than one of them."""

import errno
import json
import os
import pickle
import random
import shutil

import pytest
import torch

from kdlib import files
from kdlib.files import read_json, write_json
from kdlib.session import checkpoint

GROUPS = {
    "student": {"weight": torch.randn(7, 5), "scale": torch.tensor(2.5), "one": torch.ones(1)},
    "optimizer": {"0.exp_avg": torch.randn(7, 5), "0.step": torch.tensor(3.0)},
    "random": {"torch.0": torch.arange(50, dtype=torch.uint8)},
}
FACTS = {"legs": [{"best": 0.1 + 0.2}], "list": [1, None, "x"], "nested": {"a": {"b": 1e-300}}}


def moved(step):
    """GROUPS with the step added to every floating point number."""
    return {
        name: {key: t + step if t.is_floating_point() else t for key, t in group.items()}
        for name, group in GROUPS.items()
    }


@pytest.fixture
def folder(tmp_path):
    """Two whole checkpoints, of steps 100 and 200."""
    for step in (100, 200):
        checkpoint.write(tmp_path / "checkpoints", step, moved(step), {**FACTS, "step": step}, keep=3)
    return tmp_path / "checkpoints"


def test_what_is_written_is_read(folder):
    path, groups, facts, broken = checkpoint.newest(folder)
    assert (path.name, facts, broken) == ("step-00000200", {**FACTS, "step": 200}, {})
    assert groups.keys() == GROUPS.keys()
    for name, tensors in GROUPS.items():
        for key in tensors:
            wanted = moved(200)[name][key]
            assert groups[name][key].dtype == wanted.dtype
            assert torch.equal(groups[name][key], wanted)


def test_the_same_state_makes_the_same_bytes(folder, tmp_path):
    first = checkpoint.write(tmp_path / "a", 1, GROUPS, FACTS)
    second = checkpoint.write(tmp_path / "b", 1, GROUPS, FACTS)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_only_the_newest_are_kept(folder):
    for step in (300, 400):
        checkpoint.write(folder, step, GROUPS, FACTS, keep=2)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000300", "step-00000400"]


def test_a_checkpoint_that_is_there_stays(folder):
    before = (folder / "step-00000200" / "state.json").read_bytes()
    checkpoint.write(folder, 200, GROUPS, {"other": 1}, keep=2)
    assert (folder / "step-00000200" / "state.json").read_bytes() == before


def damage(chance, folder):
    """Do one bad thing to the newest checkpoint; what was done and to which file."""
    target, other = folder / "step-00000200", folder / "step-00000100"
    file = chance.choice(sorted(target.iterdir()))
    kind = chance.choice(["truncate", "flip", "empty", "delete", "swap with another file", "swap with the one before"])
    data = file.read_bytes()
    if kind == "truncate":
        file.write_bytes(data[: chance.randrange(1, len(data))])
    elif kind == "flip":
        place = chance.randrange(len(data))
        file.write_bytes(data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "delete":
        file.unlink()
    else:
        second = other / file.name
        if kind == "swap with another file":
            second = chance.choice([path for path in sorted(target.iterdir()) if path != file])
        changed = second.read_bytes()
        second.write_bytes(data)
        file.write_bytes(changed)
        assert changed != data or file.name == "random.safetensors"
        if second.parent == other:  # the one before must stay whole for the test
            second.write_bytes(changed)
    return kind, file.name, file.exists() and file.read_bytes() == data


def test_a_hundred_kinds_of_damage_are_found_and_named(folder, tmp_path):
    """The damaged one is passed over and told, the one before is used; what came out as it was is read as it was."""
    chance, seen = random.Random(0), {}
    for case in range(100):
        here = tmp_path / f"case{case}"
        shutil.copytree(folder, here)
        kind, name, same = damage(chance, here)
        path, groups, facts, broken = checkpoint.newest(here)
        if same:
            assert path.name == "step-00000200"
            continue
        harmless = name == "manifest.json" and path.name == "step-00000200"  # a flipped space between two JSON words
        if harmless:
            assert json.loads((here / path.name / name).read_bytes()) == json.loads(
                (folder / path.name / name).read_bytes()
            )
            continue
        assert path.name == "step-00000100", (kind, name)
        assert facts["step"] == 100
        assert torch.equal(groups["student"]["weight"], GROUPS["student"]["weight"] + 100)
        ((bad, what),) = broken.items()
        assert bad.name == "step-00000200"
        assert name in what or kind == "swap with another file"
        seen[kind] = seen.get(kind, 0) + 1
        shutil.rmtree(here)
    assert len(seen) == 6
    assert sum(seen.values()) >= 95


def test_a_pickle_with_code_in_it_is_not_run(folder, tmp_path):
    """Neither as it is, nor with a manifest that vouches for it."""

    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    newest = folder / "step-00000200"
    (newest / "optimizer.safetensors").write_bytes(pickle.dumps(Trap()))
    assert checkpoint.newest(folder)[0].name == "step-00000100"
    torch.save({"x": Trap()}, newest / "optimizer.safetensors")
    listed = read_json(newest / "manifest.json")
    listed.pop("sha256")
    listed["files"]["optimizer.safetensors"] = {
        "bytes": (newest / "optimizer.safetensors").stat().st_size,
        "sha256": checkpoint._hash(newest / "optimizer.safetensors"),
    }
    write_json(newest / "manifest.json", {**listed, "sha256": checkpoint._hash_of(listed)})
    path, _, _, broken = checkpoint.newest(folder)
    assert path.name == "step-00000100"
    assert "optimizer.safetensors can't be read" in broken[newest]
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_under_another_name_is_broken(folder):
    os.replace(folder / "step-00000200", folder / "step-00000300")
    path, _, _, broken = checkpoint.newest(folder)
    assert path.name == "step-00000100"
    assert "belongs to another checkpoint" in broken[folder / "step-00000300"]


def test_another_format_is_refused_with_a_reason(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    with pytest.raises(ValueError, match="has format 2, this kdlib reads 3"):
        checkpoint.newest(folder)


def test_a_write_that_fails_leaves_everything_as_it_was(folder, monkeypatch):
    """At any of its files, and at the rename."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    calls = {"left": 0}
    real = files._sync

    def full(path, flags):
        calls["left"] -= 1
        if calls["left"] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, flags)

    monkeypatch.setattr(files, "_sync", full)
    for left in range(4):
        calls["left"] = left
        with pytest.raises(OSError, match="No space left"):
            checkpoint.write(folder, 300, GROUPS, FACTS, keep=1)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_room_is_looked_for_before_anything_is_written(folder, monkeypatch):
    """Older checkpoints but the newest go first; the newest stays whatever happens."""
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(
        OSError, match=r"a checkpoint needs 1 MB and 5 MB are kept in reserve, but only 1 MB are free"
    ) as told:
        checkpoint.write(folder, 300, GROUPS, FACTS, keep=3, reserve_bytes=5 * 2**20)
    assert told.value.errno == errno.ENOSPC
    assert [path.name for path in folder.iterdir()] == ["step-00000200"]
    assert checkpoint.newest(folder)[0].name == "step-00000200"


def test_what_a_kill_left_is_removed(folder):
    (folder / "step-00000300.tmp").mkdir()
    (folder / "step-00000300.tmp" / "student.safetensors").write_bytes(b"half")
    assert checkpoint.newest(folder)[0].name == "step-00000200"
    checkpoint.write(folder, 300, GROUPS, FACTS, keep=3)
    assert not list(folder.glob("*.tmp"))


def test_a_writer_tells_what_went_wrong_when_it_is_waited_for(tmp_path):
    class Still:
        def now(self):
            return 0.0

    writer = checkpoint.BackgroundWriter(Still())
    (tmp_path / "checkpoints").write_text("in the way")
    writer.start(tmp_path / "checkpoints", 1, GROUPS, FACTS)
    with pytest.raises(FileExistsError):
        writer.wait()
    writer.wait()
    writer.start(tmp_path / "others", 1, GROUPS, FACTS)
    writer.close()
    assert checkpoint.newest(tmp_path / "others")[0].name == "step-00000001"
