"""What is being done now and how far it is, shown on stderr: bars in a terminal, a line every few seconds elsewhere."""

import io
import sys
import threading

import tqdm

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
FIRST_LINE_S = 2.0
"""Outside a terminal: seconds to the first line, longer than a refusal takes."""


class Progress:
    """Shows one bar for the phase under way and one for the training. A thread keeps their clocks moving, so that a long
    piece of work is never silent. `every_s`: seconds between lines outside a terminal.
    """

    def __init__(self, phase, every_s=5.0):
        self.is_terminal, self.every_s = sys.stderr.isatty(), every_s
        self.phase_bar, self.training_bar, self.phase, self.training = None, None, "", ""
        self.ended, self.lock = threading.Event(), threading.RLock()
        self(phase, 0, 0)
        self.thread = threading.Thread(target=self._keep_moving, name="kdlib-progress", daemon=True)
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
                self.phase, self.phase_bar = phase, self._bar(phase, total, leave=False) if phase else None
            if self.phase_bar is not None:
                _set(self.phase_bar, done, total)

    def train(self, name, step, last_step, more):
        """Shows the same of a training, whose bar stays between phases; `more` stands behind it."""
        with self.lock:
            self._end_phase()
            if name != self.training:
                self._end_training()
                self.training, self.training_bar = name, self._bar(name, last_step)
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

    def _bar(self, name, total, leave=True):
        shown = BAR if total else "{desc} [{elapsed}]"
        file = sys.stderr if self.is_terminal else io.StringIO()
        return tqdm.tqdm(total=total or None, desc=name, bar_format=shown, mininterval=0.3, leave=leave, file=file)

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

    def _keep_moving(self):
        wait_s = 1.0 if self.is_terminal else FIRST_LINE_S
        while not self.ended.wait(wait_s):
            wait_s = wait_s if self.is_terminal else self.every_s
            with self.lock:
                for bar in (self.training_bar, self.phase_bar):
                    if bar is not None and not self.ended.is_set():
                        self._show(bar)


def _set(bar, done, total):
    bar.total, bar.n = total or None, done
    bar.update(0)
