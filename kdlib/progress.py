"""Progress on stderr: bars in a terminal, a line every few seconds otherwise."""

import io
import sys
import threading
import weakref

import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
FIRST_LINE_S = 2.0
"""Seconds until the first line outside a terminal. Input errors are reported sooner."""


class Progress:
    """Progress display with one bar for the current phase and one for training, refreshed by a background thread.

    `every_s`: seconds between lines outside a terminal.
    """

    def __init__(self, phase, every_s=5.0):
        self.is_terminal, self.every_s = sys.stderr.isatty(), every_s
        self.phase_bar, self.training_bar, self.phase, self.training = None, None, "", ""
        self.ended, self.lock = threading.Event(), threading.RLock()
        self(phase, 0, 0)
        args = weakref.ref(self), self.ended
        self.thread = threading.Thread(target=_refresh_until_ended, args=args, name="kdlib-progress", daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __call__(self, phase, done, total):
        """Shows `done` of `total` items of a phase. A total of 0 is unknown; an empty phase removes the bar."""
        with self.lock:
            if phase != self.phase:
                self._end_phase()
                position = 1 if self.training_bar is not None else 0
                self.phase, self.phase_bar = phase, self._bar(phase, total, position, leave=False) if phase else None
            if self.phase_bar is not None:
                _set(self.phase_bar, done, total)

    def train(self, name, step, last_step, details):
        """Shows the step of a training run, with `details` after its bar."""
        with self.lock:
            self._end_phase()
            if name != self.training:
                self._end_training()
                self.training, self.training_bar = name, self._bar(name, last_step, 0)
            self.training_bar.set_postfix_str(details, refresh=False)
            _set(self.training_bar, step, last_step)
            if step == last_step:
                self._end_training()

    def say(self, text):
        """Prints lines to stdout, between the bars."""
        with self.lock:
            self._end_phase()
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        """Removes the bars and stops the thread."""
        self.ended.set()
        self.thread.join()
        self._end_phase()
        self._end_training()

    def _bar(self, name, total, position, leave=True):
        return tqdm.tqdm(
            total=total or None, desc=name, file=sys.stderr if self.is_terminal else io.StringIO(), leave=leave,
            position=position, bar_format=BAR if total else "{desc} [{elapsed}]", mininterval=0.3,
        )  # fmt: skip

    def _show(self, bar):
        if self.is_terminal:
            bar.refresh()
        else:
            sys.stderr.write(f"{bar}\n")
            sys.stderr.flush()

    def _end_phase(self):
        if self.phase_bar is not None:
            self.phase_bar.close()
        self.phase, self.phase_bar = "", None

    def _end_training(self):
        if self.training_bar is not None:
            self._show(self.training_bar)
            self.training_bar.close()
        self.training, self.training_bar = "", None

    def refresh(self):
        """Redraws the bars and returns the seconds until the next refresh."""
        with self.lock:
            for bar in (self.training_bar, self.phase_bar):
                if bar is not None and not self.ended.is_set():
                    self._show(bar)
        return 1.0 if self.is_terminal else self.every_s


def _refresh_until_ended(reference, ended):
    """Refreshes a `Progress` until it is closed or garbage-collected."""
    wait_s = FIRST_LINE_S
    while not ended.wait(wait_s):
        display = reference()
        if display is None:
            return
        wait_s = display.refresh()
        del display


def _set(bar, done, total):
    bar.total, bar.n = total or None, done
    bar.update(0)
