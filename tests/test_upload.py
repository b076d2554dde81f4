"""Sending copies, by the real clients of Kaggle (both versions) and the Hub, in a process of their own, to our servers."""

import re

import pytest

pytest.importorskip("kagglesdk", reason="the client needs Python 3.11")

from copy_servers import KEY, Run
from kaggle_server import CLIENTS

from kdlib.session import upload

BOTH = pytest.mark.parametrize("version", ["2.2.4", "2.2.5"])


# Kaggle


@BOTH
def test_the_first_copy_makes_a_private_data_set_and_later_ones_its_versions(kaggle, run, monkeypatch, version):
    monkeypatch.syspath_prepend(str(CLIENTS[version]))
    kaggle.unready = 1
    for step in (1, 2, 3):
        run.save(step)
        run.sent()
    assert run.pop_alerts() == []
    versions = kaggle.versions["ann/run-copy"]
    assert [run.holds(folder, step) for step, folder in enumerate(versions, start=1)] == [True] * 3
    methods = [method for method, _ in kaggle.calls]
    assert (methods.count("CreateDataset"), methods.count("CreateDatasetVersion")) == (1, 2)
    assert not any(KEY.encode() in content for content in kaggle.sent)


@BOTH
def test_an_upload_that_fails_is_told_once_and_tried_again_with_the_next_checkpoint(kaggle, run, monkeypatch, version):
    monkeypatch.syspath_prepend(str(CLIENTS[version]))
    run.copies.interval = 2
    kaggle.puts = [200, 400]
    for step in (1, 2):
        run.save(step)
        run.sent()
    assert kaggle.versions == {}  # rather nothing than a data set with a file missing
    (alert,) = run.pop_alerts()
    assert (alert["kind"], alert["sign"], alert["part"]) == ("alert", "second_copy", "kaggle:ann/run-copy")
    says = {"2.2.4": "2 of 4 files|3 of 4 files", "2.2.5": "Upload unsuccessful"}[version]
    assert re.search(says, alert["meaning"])
    run.save(3)
    run.sent()
    assert run.holds(kaggle.versions["ann/run-copy"][0], 3)
    assert run.pop_alerts() == []


@pytest.mark.parametrize("listed", ["folders", "archives"])
@pytest.mark.parametrize("lost", ["records.jsonl", "checkpoints.tar"])
def test_a_file_that_got_lost_on_the_way_is_missed(kaggle, run, listed, lost):
    kaggle.listed, kaggle.loses = listed, lost
    run.save(1)
    run.sent()
    assert "is missing there" in run.pop_alerts()[0]["meaning"]
    kaggle.loses = ""
    run.save(2)
    run.sent()
    assert run.copies.overdue is False


def test_a_public_data_set_gets_nothing(kaggle, run):
    (kaggle.folder / "theirs").mkdir()
    kaggle.versions["ann/run-copy"], kaggle.private = [kaggle.folder / "theirs"], False
    run.save(1)
    run.sent()
    assert "is public" in run.pop_alerts()[0]["meaning"]
    assert kaggle.sent == []


def test_a_failure_tells_no_credential(kaggle, run):
    kaggle.faults["GetDataset"] = ["500"]
    run.save(1)
    run.sent()
    assert KEY not in str(run.pop_alerts())
    run.copies.problem, run.copies.was_reported = "", False
    run.copies._record_failure(f"PUT https://storage.example/path/{KEY}?signature=abc\n said {KEY}")
    assert run.pop_alerts()[0]["meaning"].endswith("failed: PUT https://storage.example/... said ...")


# the Hub


def test_the_hub_holds_the_newest_copy_in_one_commit_each(tmp_path, hub):
    run = Run(tmp_path / "run", "hub:ann/run")
    for step in (1, 2):
        run.save(step)
        run.sent()
        assert run.pop_alerts() == []
        assert run.holds(hub.folder, step)
    assert hub.commits == ["step-00000001", "step-00000002"]
    assert [(told["name"], told.get("private", told.get("visibility"))) for told in hub.created[:1]] == [
        ("run", "private")
    ]


def test_a_hub_that_fails_is_told_without_the_token(tmp_path, hub):
    run = Run(tmp_path / "run", "hub:ann/run")
    hub.faults = [403]
    run.save(1)
    run.sent()
    (alert,) = run.pop_alerts()
    assert "403" in alert["meaning"] and "hf_abcdefgh" not in alert["meaning"]
    hub.loses = "records.jsonl"
    run.copies.problem, run.copies.was_reported = "", False
    run.save(2)
    run.sent()
    assert "records.jsonl is missing there" in run.pop_alerts()[0]["meaning"]
    hub.private = False
    run.copies.problem, run.copies.was_reported = "", False
    run.save(3)
    run.sent()
    assert "is public" in run.pop_alerts()[0]["meaning"] and len(hub.commits) == 1


def test_sizes_are_compared():
    sent = {"config.json": 3, "checkpoints/step-1/a": 5}
    upload.compare(sent, {"config.json": 3, "checkpoints/step-1/a": 5, "more": 1})
    upload.compare(sent, {"config.json": 3, "checkpoints.tar": 99}, ["checkpoints.tar"])
    for there in (
        {"config.json": 3},
        {"config.json": 3, "checkpoints.tar": 9},
        {"config.json": 2, "checkpoints/step-1/a": 5},
    ):
        with pytest.raises(SystemExit, match=r"is missing there|has 2 of 3 bytes there"):
            upload.compare(sent, there)
