"""Progress on stderr: never silent, and nothing left over."""

import gc
import io
import sys
import threading

from kdlib import progress
from kdlib.progress import Progress


class Screen(io.StringIO):
    """A stream that says when something was written to it."""

    def __init__(self, is_terminal=False):
        super().__init__()
        self.is_terminal, self.written = is_terminal, threading.Event()

    def isatty(self):
        return self.is_terminal

    def write(self, text):
        super().write(text)
        self.written.set()


def watched(monkeypatch, first_line_s=60.0, is_terminal=False):
    """stderr as a `Screen`."""
    made = Screen(is_terminal)
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(progress, "FIRST_LINE_S", first_line_s)
    return made


def next_line(screen):
    screen.written.clear()
    assert screen.written.wait(30)
    return screen.getvalue().splitlines()[-1]


def test_a_long_piece_of_work_is_never_silent(monkeypatch):
    """Lines come although nobody calls: with the phase, and with the time left where the number of pieces is known."""
    screen = watched(monkeypatch, 0.001)
    with Progress("loading the teacher", every_s=0.001) as shown:
        assert next_line(screen).startswith("loading the teacher [00:0")
        shown("the teacher reads", 3, 12)
        while not next_line(screen).startswith("the teacher reads:  25%|"):
            pass
        shown.train("distilled 1/1", 5, 10, "loss 2.5")
        while "distilled 1/1:  50%|" not in next_line(screen):
            pass
        assert "loss 2.5" in screen.getvalue()
    assert not shown.thread.is_alive()


def test_one_that_nobody_holds_ends(monkeypatch):
    screen = watched(monkeypatch, 0.001)
    shown = Progress("loading", every_s=0.001)
    next_line(screen)
    thread = shown.thread
    del shown
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


def test_what_ends_at_once_shows_nothing(monkeypatch):
    screen = watched(monkeypatch)
    with Progress("loading") as shown:
        shown("reading the text", 0, 0)
    assert screen.getvalue() == ""


def test_a_training_leaves_its_last_line(monkeypatch, capsys):
    screen = watched(monkeypatch)
    with Progress("loading") as shown:
        shown.train("control 1/1", 1, 2, "")
        shown.say("Plan: two steps.")
        shown.train("control 1/1", 2, 2, "")
    assert capsys.readouterr().out == "Plan: two steps.\n"
    (line,) = screen.getvalue().splitlines()
    assert "control 1/1: 100%" in line and "2/2" in line


def test_a_terminal_has_bars_that_go(monkeypatch):
    screen = watched(monkeypatch, is_terminal=True)
    with Progress("loading the teacher") as shown:
        shown("reading", 1, 4)
    assert "reading: " in screen.getvalue()
    assert "\n" not in screen.getvalue()
    assert screen.getvalue().rstrip("\r").rsplit("\r", 1)[-1].strip() == ""
