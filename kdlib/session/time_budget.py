"""What still fits into a session, and being asked to stop."""

import math
import signal
import threading

MARGIN = 0.02
"""Share of a session that is left over for what nobody foresaw."""
SAFETY = 1.25
"""Factor on every cost that was measured."""
FINAL_SHARE = 0.25
"""Largest share of a session, after its start, that is kept free to evaluate and export the student at its end."""
FORGET = 0.97
"""A cost that was once high counts this much less with every cheaper one."""


class TimeBudget:
    """A session of so many seconds, counted from `started`, and what each kind of task was seen to cost; `guesses` stand in
    for what was not seen yet.
    """

    def __init__(self, seconds, clock, started, costs=(), guesses=()):
        self.seconds, self.clock, self.started = seconds, clock, started
        self.costs, self.guesses = dict(costs), dict(guesses)

    def record(self, task, seconds):
        """Note what a task took. A cost is the highest of late."""
        self.costs[task] = max(seconds, FORGET * self.costs.get(task, 0.0))

    def used(self):
        return self.clock.now() - self.started

    def left(self):
        return self.seconds - self.used()

    def reserve(self):
        """Seconds that are planned for nothing: a share of the session, and two steps of the longest kind."""
        return 0.0 if math.isinf(self.seconds) else MARGIN * self.seconds + 2.0 * self.expected("step")

    def expected(self, task):
        """Seconds that a task will take, as far as is known."""
        return self.costs.get(task, self.guesses.get(task, 0.0))

    def cost(self, *tasks):
        """Seconds to set aside for these tasks."""
        return SAFETY * sum(map(self.expected, tasks))

    def fits(self, *tasks):
        """Whether these tasks, one after the other, are done before the session ends, with the margin left over."""
        return self.left() >= self.cost(*tasks) + self.reserve()

    def final_tasks(self):
        """Tasks for which the end of a session is kept free: a save, and an evaluation and export where they take at most
        FINAL_SHARE of the session after its start. A shorter session trains instead.
        """
        shown = ["evaluate", "export"]
        return ["save"] + shown * (self.cost(*shown) <= FINAL_SHARE * (self.seconds - self.cost("start")))

    def per_session(self):
        """Seconds of a session that go into training and its evaluations: not into the start, the end or the margin."""
        return self.seconds - self.cost("start", *self.final_tasks()) - self.reserve()


class StopSignals:
    """From `listen` to `ignore`, SIGTERM and SIGINT are a wish to stop, granted where it is safe; a second SIGINT raises
    KeyboardInterrupt at once. In a thread other than the main one nothing is changed.
    """

    def __init__(self):
        self.asked = ""
        self.former = {}
        self.num_sigint = 0

    def listen(self):
        if threading.current_thread() is threading.main_thread():
            self.former = {number: signal.signal(number, self._hear) for number in (signal.SIGTERM, signal.SIGINT)}

    def ignore(self):
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.former.items():
                signal.signal(number, handler)
            self.former = {}

    def _hear(self, number, frame):
        self.num_sigint += number == signal.SIGINT
        if self.num_sigint > 1:
            raise KeyboardInterrupt
        self.asked = self.asked or f"asked to stop ({signal.Signals(number).name})"
