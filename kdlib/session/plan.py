"""How long a run still takes, and over how many sessions."""

import math

from kdlib import clock

SHORT = 0.1
"""Fraction of the plan at which a short control is compared."""
CONTROL_SHARE = {"full": 1.0, "short": SHORT, "off": 0.0}
"""Wall-clock of a control, as a share of the distilled run's."""
GUESS_BYTES_PER_S, GUESSED_S = 50e6, {"save": 1.0, "export": 3.0, "conclude": 5.0}
"""What saving and ending take before anything was measured: speed of a disk, and seconds besides."""


def num_steps(config, num_windows, per_step):
    """Optimizer steps of the whole plan: as the config says, or as its epochs over so many windows need."""
    return config.max_steps or max(1, round(config.epochs * num_windows / per_step))


def eval_steps(config):
    """Optimizer steps between two evaluations of a plan of `max_steps`."""
    return config.eval_steps or max(1, round(config.max_steps / 20))


def guessed_costs(num_weights):
    """Seconds to save a run whose student has so many weights (with two moments, an average, the best), and to end it."""
    times = {"save": 6, "export": 1, "conclude": 1}
    return {task: seconds + times[task] * 4 * num_weights / GUESS_BYTES_PER_S for task, seconds in GUESSED_S.items()}


def seconds_left(config, eval_steps, arm, expected, saving=0.0):
    """Seconds to the end of the run, from the mean step of the `arm` in training: steps, evaluations, tests, the end.

    `expected(task)` gives the seconds of `evaluate`, `test` and `conclude`; `saving` is the share of the training time that
    checkpoints take.
    """
    control = CONTROL_SHARE[config.control]
    distilled = arm.train_s / max(1, arm.step) * arm.last_step
    own = distilled * (1.0 - arm.step / arm.last_step)
    if arm.name == "distilled":
        own += control * distilled
    else:
        distilled /= control
    training = own + (config.repeats - 1 - arm.repeat) * distilled * (1.0 + control)
    evaluations = math.ceil(config.max_steps / eval_steps) * training / max(distilled, 1e-9)
    tests = (2.0 if config.control == "short" else 1.0) * training / max(distilled, 1e-9)
    rest = evaluations * expected("evaluate") + tests * expected("test") + expected("conclude")
    return training * (1.0 + saving) + rest


def outlook(left_s, session, num_sessions, steps_per_s, num_tokens):
    """The plan for people and programs: `left_s` seconds of work, sessions needed in all (None where one of them would be
    over before anything is done), and the date at which it would be done if they followed each other at once.

    `session` is the `Budget` of this session, which is number `num_sessions`.
    """
    each = session.per_session()
    now = max(0.0, session.left() - session.cost(*session.final_tasks()) - session.reserve())
    later = math.ceil(max(0.0, left_s - now) / each) if each > 0 else None
    waiting = 0.0 if not later else later * session.cost("start")
    return {
        "left_s": left_s,
        "steps_per_s": steps_per_s,
        "tokens_left": num_tokens,
        "sessions_needed": None if later is None and left_s > now else num_sessions + (later or 0),
        "finish": clock.date(left_s + waiting),
    }
