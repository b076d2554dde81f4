"""Second copies, with the real clients of Kaggle (both versions) and of the Hub, each in the process that sends, against
servers of our own.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
import warnings
from pathlib import Path

import pytest

pytest.importorskip("kagglesdk", reason="the client needs Python 3.11")

from copy_servers import KEY
from kaggle_server import files_of, wait_until

from kdlib import environment
from kdlib.clock import Clock
from kdlib.config import Config
from kdlib.session import backup, checkpoint, session

# what is taken, and when


def test_every_so_many_checkpoints_are_taken(tmp_path, run, monkeypatch):
    taken = []
    run.copies.interval = 3
    monkeypatch.setattr(run.copies, "_send", lambda folder: taken.append(folder.name) or "")
    for step in range(1, 8):
        run.save(step)
        run.sent()
    assert taken == ["step-00000003", "step-00000006"]
    assert list(run.copies.staging.iterdir()) == []


def test_training_goes_on_while_a_copy_is_sent_and_the_newest_waits(kaggle, run):
    kaggle.hold = threading.Event()
    run.save(1)
    wait_until(lambda: run.copies.process)
    for step in (2, 3, 4):
        run.save(step)  # returns, and keep_last removes the ones before
    assert [path.name for path in run.folder.checkpoints.iterdir()] == ["step-00000004"]
    assert sorted(path.name for path in run.copies.staging.iterdir()) == ["step-00000001", "step-00000004"]
    kaggle.hold.set()
    run.sent()
    versions = kaggle.versions["ann/run-copy"]
    assert [run.holds(folder, step) for step, folder in zip((1, 4), versions, strict=True)] == [True, True]


def test_files_are_linked_and_copied_where_links_fail(run, monkeypatch):
    run.folder.records.append({"kind": "train"})
    path = run.folder.checkpoints / "step-00000001"
    path.mkdir(parents=True)
    (path / "a.safetensors").write_bytes(b"weights")
    kept = run.copies._stage(path) / "checkpoints" / path.name / "a.safetensors"
    assert kept.samefile(path / "a.safetensors")

    def refuses(*paths):
        raise OSError(errno.EPERM, "no links here")

    shutil.rmtree(run.copies.staging)
    monkeypatch.setattr(os, "link", refuses)
    kept = run.copies._stage(path) / "checkpoints" / path.name / "a.safetensors"
    assert not kept.samefile(path / "a.safetensors") and kept.read_bytes() == b"weights"


def test_what_a_kill_left_goes_with_the_next(run):
    (run.copies.staging / "step-00000009").mkdir(parents=True)
    run.save(1)
    run.sent()
    assert list(run.copies.staging.iterdir()) == []


def test_a_full_disk_costs_the_copy_and_not_the_checkpoint(kaggle, run, monkeypatch):
    kaggle.hold = threading.Event()
    run.save(1)
    wait_until(lambda: kaggle.calls and run.copies.process)
    tried = []

    def full_at_first(folder, step):
        tried.append(run.copies.staging.exists())
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, "no room")
        return folder / f"step-{step:08d}"

    monkeypatch.setattr(checkpoint, "write", full_at_first)
    monkeypatch.setattr(run.copies, "offer", lambda path: tried.append(path.name))
    writer = checkpoint.BackgroundWriter(Clock(), run.copies)
    writer._write((run.folder.checkpoints, 2))
    assert tried == [True, False, "step-00000002"]
    assert run.copies.thread is None and "checkpoints come first" in run.pop_alerts()[0]["meaning"]
    writer.pool.shutdown()
    kaggle.hold.set()


def test_the_end_waits_a_bounded_time(kaggle, run, monkeypatch):
    kaggle.hold = threading.Event()
    run.save(1)
    wait_until(lambda: kaggle.calls and run.copies.process)
    process = run.copies.process
    monkeypatch.setattr(backup, "WAIT_S", 0.2)
    with pytest.warns(
        UserWarning, match=r"second copy to kaggle:ann/run-copy failed: the upload was unfinished 0\.2 s"
    ):
        run.copies.close()
    assert process.poll() is not None and not run.copies.staging.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.copies.was_reported = False
        run.copies.close()  # not even where warnings are errors
    kaggle.hold.set()


def test_the_end_waits_for_what_is_being_sent(kaggle, run):
    run.save(1)
    run.copies.close()
    assert run.holds(kaggle.versions["ann/run-copy"][0], 1)


# the start


@pytest.mark.parametrize(
    "where", ["kaggle:ann/run", "kaggle:run-copy", "s3:ann/run-copy", "hub:ann", "kaggle:ann/Run_Copy"]
)
def test_a_wrong_place_is_named(where):
    with pytest.raises(ValueError, match=r"have kaggle:OWNER/NAME .* or hub:OWNER/NAME"):
        Config(second_copy=where)
    with pytest.raises(ValueError, match="second_copy_saves is 0"):
        Config(second_copy_saves=0)


def test_no_credentials_or_no_client_is_told_at_the_start(settings, tmp_path, kaggle, monkeypatch):
    monkeypatch.delenv("KAGGLE_KEY")
    config = Config(**settings, second_copy="kaggle:ann/run-copy")
    with pytest.raises(ValueError) as told:
        session.Session(config, tmp_path / "out", Clock())
    assert "set KAGGLE_API_TOKEN or KAGGLE_USERNAME and KAGGLE_KEY in the environment" in str(told.value)
    assert "\n" not in str(told.value) and not (tmp_path / "out").exists()
    monkeypatch.setitem(backup.NEEDS, "kaggle", ("kaggle", "no_such_client"))
    with pytest.raises(ValueError, match="pip install no_such_client, or leave second_copy empty"):
        session.Session(config, tmp_path / "out", Clock())


def test_credentials_come_from_the_notebooks_secrets_too(notebook_secrets, monkeypatch):
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("KAGGLE_USERNAME", "ann")
    notebook_secrets |= {"KAGGLE_KEY": "k", "HF_TOKEN": "h"}
    assert backup.credentials("kaggle") == {"KAGGLE_USERNAME": "ann", "KAGGLE_KEY": "k"}
    assert backup.credentials("hub") == {"HF_TOKEN": "h"}
    monkeypatch.setenv("HF_TOKEN", "mine")
    assert backup.credentials("hub") == {"HF_TOKEN": "mine"}


# a run


def state_of(out):
    path, *_ = checkpoint.newest(out / "checkpoints")
    return {name: content for name, content in files_of(out / "student").items() if name.endswith("safetensors")} | {
        file.name: file.read_bytes() for file in path.glob("*.safetensors")
    }


@pytest.mark.parametrize("place", ["kaggle", "hub"])
def test_a_run_goes_on_with_its_copy_and_ends_with_the_same_bytes(settings, tmp_path, request, monkeypatch, place):
    server = request.getfixturevalue(place)
    plan = {**settings, "max_steps": 8, "save_steps": 1, "keep_checkpoints": 1, "control": "off"}
    plain = Config.from_dict(plan)
    list(session.distill(plain, tmp_path / "whole"))
    where = {"kaggle": "kaggle:ann/run-copy", "hub": "hub:ann/run"}[place]
    config = plain.replace(second_copy=where, second_copy_saves=3)
    driven = session.distill(config, tmp_path / "cut")
    seen = 0
    with contextlib.closing(driven):
        for record in driven:
            seen += record["kind"] == "train"
            if seen == 5:
                break
    mounted = server.versions["ann/run-copy"][-1] if place == "kaggle" else server.folder
    assert checkpoint.newest_name(mounted / "checkpoints") == "step-00000003"
    assert not (tmp_path / "cut" / backup.FOLDER).exists()
    shutil.rmtree(tmp_path / "cut")
    (first, *_) = list(session.distill(plain, tmp_path / "next", resume=str(mounted)))
    assert (first["resumed"], first["session"]) == ("step-00000003", 2)
    assert state_of(tmp_path / "next") == state_of(tmp_path / "whole")


def test_a_run_whose_copies_fail_is_the_same_run(settings, tmp_path, kaggle):
    plan = Config.from_dict({**settings, "save_steps": 1, "control": "off"})
    list(session.distill(plan, tmp_path / "plain"))
    kaggle.puts = [400] * 99
    config = plan.replace(second_copy="kaggle:ann/run-copy", second_copy_saves=1)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        told = list(session.distill(config, tmp_path / "out"))
    alerts = [record for record in told if record["kind"] == "alert" and record["sign"] == "second_copy"]
    said = [str(warning.message) for warning in warned if "second copy" in str(warning.message)]
    assert len(alerts) + len(said) == 1
    assert state_of(tmp_path / "out") == state_of(tmp_path / "plain")
    assert json.loads((tmp_path / "out" / "status.json").read_text())["state"] == "complete"
    assert not any(KEY.encode() in content for content in files_of(tmp_path / "out").values())


def test_the_process_that_sends_finds_what_this_one_finds(monkeypatch):
    monkeypatch.setattr("sys.path", ["", "/elsewhere"])
    assert environment.child_environment(A="1")["PYTHONPATH"] == f"{Path.cwd()}{os.pathsep}/elsewhere"
