"""What is being done now and how far it is, shown on stderr: bars in a terminal, a line every few seconds elsewhere."""

import io
import sys
import threading
import weakref

import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
FIRST_LINE_S = 2.0
"""Seconds to the first line outside a terminal, longer than a refusal takes."""


class Progress:
    """Shows one bar for the phase under way and one for the training. A thread keeps their clocks moving, so that a long
    piece of work is never silent. `every_s`: seconds between lines outside a terminal.
    """

    def __init__(self, phase, every_s=5.0):
        self.is_terminal, self.every_s = sys.stderr.isatty(), every_s
        self.phase_bar, self.training_bar, self.phase, self.training = None, None, "", ""
        self.ended, self.lock = threading.Event(), threading.RLock()
        self(phase, 0, 0)
        how = {"name": "kdlib-progress", "daemon": True}
        self.thread = threading.Thread(target=_keep_moving, args=(weakref.ref(self), self.ended), **how)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __call__(self, phase, done, total):
        """Shows that `done` of `total` pieces of a phase are done; a total of 0 is unknown, an empty phase is none."""
        with self.lock:
            if phase != self.phase:
                self._end_phase()
                below = 1 if self.training_bar is not None else 0
                self.phase, self.phase_bar = phase, self._bar(phase, total, below, leave=False) if phase else None
            if self.phase_bar is not None:
                _set(self.phase_bar, done, total)

    def train(self, name, step, last_step, more):
        """Shows the same of a training, whose bar stays between phases; `more` stands behind it."""
        with self.lock:
            self._end_phase()
            if name != self.training:
                self._end_training()
                self.training, self.training_bar = name, self._bar(name, last_step, 0)
            self.training_bar.set_postfix_str(more, refresh=False)
            _set(self.training_bar, step, last_step)
            if step == last_step:
                self._end_training()

    def say(self, text):
        """Writes lines on stdout, between the bars."""
        with self.lock:
            self._end_phase()
            tqdm.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self):
        """Removes the bars and ends the thread."""
        self.ended.set()
        self.thread.join()
        self._end_phase()
        self._end_training()

    def _bar(self, name, total, place, leave=True):
        shown = {
            "bar_format": BAR if total else "{desc} [{elapsed}]",
            "mininterval": 0.3,
            "leave": leave,
            "position": place,
        }
        return tqdm.tqdm(
            total=total or None, desc=name, file=sys.stderr if self.is_terminal else io.StringIO(), **shown
        )

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
        """Shows how far everything is, now; the seconds until that is due again."""
        with self.lock:
            for bar in (self.training_bar, self.phase_bar):
                if bar is not None and not self.ended.is_set():
                    self._show(bar)
        return 1.0 if self.is_terminal else self.every_s


def _keep_moving(reference, ended):
    """Refreshes a `Progress` until it ends or nobody holds it any more."""
    wait_s = FIRST_LINE_S
    while not ended.wait(wait_s):
        shown = reference()
        if shown is None:
            return
        wait_s = shown.refresh()
        del shown


def _set(bar, done, total):
    bar.total, bar.n = total or None, done
    bar.update(0)
