"""Time budget of a session, remaining time of a run, and stop signals."""

import math
import signal
import threading

from kdlib.clock import date

RESERVE_SHARE = 0.02
"""Share of a session kept unused for unforeseen delays."""
SAFETY_FACTOR = 1.25
"""Factor on every measured cost."""
FINAL_SHARE = 0.25
"""Largest share of a session, after its start, reserved to evaluate and export the student at its end."""
COST_DECAY = 0.97
"""Factor by which a high measured cost decays with every cheaper measurement."""
SHORT_CONTROL_FRACTION = 0.1
"""Fraction of the planned steps at which a short control is compared."""
CONTROL_SHARE = {"full": 1.0, "short": SHORT_CONTROL_FRACTION, "off": 0.0}
"""Wall-clock time of a control, as a share of the distilled student's."""
GUESSED_BYTES_PER_S, GUESSED_S = 50e6, {"save": 1.0, "export": 3.0, "conclude": 5.0}
"""Disk speed and fixed seconds per task, used until they are measured."""


class TimeBudget:
    """Time budget of a session of `seconds` since `started`. `costs` are measured seconds by task, else `guesses`."""

    def __init__(self, seconds, clock, started, costs=(), guesses=()):
        self.seconds, self.clock, self.started = seconds, clock, started
        self.costs, self.guesses = dict(costs), dict(guesses)

    def record(self, task, seconds):
        """Records the duration of a task. The cost of a task is a decaying maximum of its durations."""
        self.costs[task] = max(seconds, COST_DECAY * self.costs.get(task, 0.0))

    def used(self):
        return self.clock.now() - self.started

    def left(self):
        return self.seconds - self.used()

    def reserve(self):
        """Returns the seconds kept unused: a share of the session, plus two of the longest steps."""
        return 0.0 if math.isinf(self.seconds) else RESERVE_SHARE * self.seconds + 2.0 * self.expected("step")

    def expected(self, task):
        """Returns the expected seconds of a task: measured, guessed, or 0."""
        return self.costs.get(task, self.guesses.get(task, 0.0))

    def cost(self, *tasks):
        """Returns the seconds to set aside for all `tasks`."""
        return SAFETY_FACTOR * sum(map(self.expected, tasks))

    def fits(self, *tasks):
        """Returns whether all `tasks` and the reserve fit into the rest of the session."""
        return self.left() >= self.cost(*tasks) + self.reserve()

    def final_tasks(self):
        """Returns the tasks for which the end of a session is reserved: a save, plus an evaluation and an export if
        they take at most `FINAL_SHARE` of the session after its start. A shorter session trains instead.
        """
        optional = ["evaluate", "export"]
        return ["save"] + optional * (self.cost(*optional) <= FINAL_SHARE * (self.seconds - self.cost("start")))

    def training_seconds(self):
        """Returns the seconds of a session available for training and its evaluations."""
        return self.seconds - self.cost("start", *self.final_tasks()) - self.reserve()


def num_steps(config, num_windows, per_step):
    """Returns the planned number of optimizer steps: `max_steps`, or as many as `epochs` over the windows need."""
    return config.max_steps or max(1, round(config.epochs * num_windows / per_step))


def eval_steps(config):
    """Returns the number of optimizer steps between two evaluations of a run of `max_steps`."""
    return config.eval_steps or max(1, round(config.max_steps / 20))


def guessed_costs(num_weights):
    """Returns guessed seconds of saving, exporting and finishing a run whose student has `num_weights` weights. A
    checkpoint holds six copies of them (weights, two moments, average, best weights).
    """
    copies = {"save": 6, "export": 1, "conclude": 1}
    return {task: fixed + copies[task] * 4 * num_weights / GUESSED_BYTES_PER_S for task, fixed in GUESSED_S.items()}


def seconds_left(config, eval_steps, arm, expected, saving_share=0.0):
    """Returns the seconds to the end of the run, extrapolated from the mean step time of the `arm` in training.

    `expected(task)` returns the seconds of `evaluate`, `test` and `conclude`. `saving_share` is the share of the
    training time that checkpoints take.
    """
    control_share = CONTROL_SHARE[config.control]
    distilled = arm.train_s / max(1, arm.step) * arm.last_step
    own = distilled * (1.0 - arm.step / arm.last_step)
    if arm.name == "distilled":
        own += control_share * distilled
    else:
        distilled /= control_share
    training = own + (config.repeats - 1 - arm.repeat) * distilled * (1.0 + control_share)
    evaluations = math.ceil(config.max_steps / eval_steps) * training / max(distilled, 1e-9)
    tests = (2.0 if config.control == "short" else 1.0) * training / max(distilled, 1e-9)
    rest = evaluations * expected("evaluate") + tests * expected("test") + expected("conclude")
    return training * (1.0 + saving_share) + rest


def make_plan(left_s, budget, num_sessions, steps_per_s, num_tokens):
    """Returns the plan as in `status.json`: seconds of work left, total number of sessions, and estimated date of
    completion if sessions follow each other at once. `sessions_needed` is None if a session is too short to make
    progress.

    `budget` is the `TimeBudget` of the current session, which is number `num_sessions`.
    """
    per_session = budget.training_seconds()
    now = max(0.0, budget.left() - budget.cost(*budget.final_tasks()) - budget.reserve())
    later = math.ceil(max(0.0, left_s - now) / per_session) if per_session > 0 else None
    restart_s = 0.0 if not later else later * budget.cost("start")
    return {
        "left_s": left_s,
        "steps_per_s": steps_per_s,
        "tokens_left": num_tokens,
        "sessions_needed": None if later is None and left_s > now else num_sessions + (later or 0),
        "finish": date(left_s + restart_s),
    }


class StopSignals:
    """Handlers of SIGTERM and SIGINT, active from `listen` to `ignore`. A signal sets `reason`, and the session stops
    at the next safe point. A second SIGINT raises KeyboardInterrupt. Outside the main thread nothing is installed.
    """

    def __init__(self):
        self.reason = ""
        self.previous_handlers = {}
        self.num_sigint = 0

    def listen(self):
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGTERM, signal.SIGINT)
            self.previous_handlers = {number: signal.signal(number, self._handle) for number in signals}

    def ignore(self):
        if threading.current_thread() is threading.main_thread():
            for number, handler in self.previous_handlers.items():
                signal.signal(number, handler)
            self.previous_handlers = {}

    def _handle(self, number, frame):
        self.num_sigint += number == signal.SIGINT
        if self.num_sigint > 1:
            raise KeyboardInterrupt
        self.reason = self.reason or f"asked to stop ({signal.Signals(number).name})"
