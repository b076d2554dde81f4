"""A run that is stopped by a signal at any time ends as one that never was."""

import itertools
import signal

import pytest
from test_resume import state_of, student_with_dropout, untimed

from kdlib import files
from kdlib.config import Config
from kdlib.evaluation import scoring
from kdlib.report import html
from kdlib.session import session


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    monkeypatch.setattr(html, "write_report", lambda folder: None)


@pytest.fixture
def plan(settings, tmp_path):
    """Twelve steps of a student with dropout and an average, evaluated every fourth step."""
    return {
        **settings, "student": student_with_dropout(tmp_path / "student"), "max_steps": 12, "eval_steps": 4, "use_ema": True,
        "ema_decay": 0.9, "control": "off", "early_stopping_patience": 3, "learning_rate": 0.1,
    }  # fmt: skip


def distil(plan, out, stop_at=0):
    """Returns the records of a session that gets a signal after the train record of step `stop_at`."""
    records = []
    for record in session.distill(Config.from_dict(plan), out):
        records.append(record)
        if record["kind"] == "train" and record["step"] == stop_at:
            signal.raise_signal(signal.SIGTERM)
    return records


def test_a_pause_changes_nothing(plan, tmp_path):
    """Also where an evaluation or the end is due at that step."""
    distil(plan, tmp_path / "plain")
    for step in (3, 4, 9):
        last = distil(plan, tmp_path / "cut", step)[-1]
        assert (last["kind"], last["reason"]) == ("paused", f"asked to stop (SIGTERM); resumes from step-{step:08d}")
        assert files.read_json(tmp_path / "cut" / "status.json")["state"] == "paused"
    assert distil(plan, tmp_path / "cut")[-1]["kind"] == "verdict"
    assert untimed(tmp_path / "cut") == untimed(tmp_path / "plain")
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "plain")


def test_a_pause_does_not_wait_for_the_end_of_an_evaluation(plan, tmp_path, monkeypatch):
    """A signal in the second of its eight batches is heeded before the third."""
    real, calls = scoring._Accumulator.add_text, itertools.count(1)

    def stop_meanwhile(self, *given):
        if next(calls) == 18:
            signal.raise_signal(signal.SIGTERM)
        real(self, *given)

    monkeypatch.setattr(scoring._Accumulator, "add_text", stop_meanwhile)
    last = distil(plan, tmp_path / "run")[-1]
    assert (last["kind"], last["step"], next(calls)) == ("paused", 4, 19)
