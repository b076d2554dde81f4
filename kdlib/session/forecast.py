"""What was foretold or measured of a run, against what there is: its memory, its time, its room on the disk."""

import math

from kdlib import clock, environment
from kdlib.machine import gib
from kdlib.models.teacher_cache import holds_all
from kdlib.report.findings import Finding
from kdlib.session import checkpoint, plan, time_budget
from kdlib.session.arm import DISTILLED, Arm
from kdlib.session.checkpoint_schedule import SAVE_EVERY_S, SAVE_SHARE
from kdlib.session.first_pass import READINGS

SESSION = "11h"
"""Length of a session where `time_budget` is empty: what Kaggle's 12 hours leave."""


def peak_finding(predicted, there, total, gradient_checkpointing, config, fits=None):
    """The peak that is `predicted` against the `total` memory and what of it other programs leave, `there`. `fits`: windows
    in one pass that are foretold to fit, if any are.
    """
    said = f"more than {gib(total)}" if math.isinf(predicted) else f"{gib(predicted)} of {gib(total)}"
    if predicted > total:
        means = (
            "a step does not fit. A run halves its batch when a card runs out; a host that runs out may end it unasked"
        )
        return Finding("memory", "peak, foretold", said, "wrong", means, remedies(fits, config), predicted)
    if predicted > there:
        means, remedy = (
            f"other programs leave {gib(there)} of it",
            f"end what else runs there, or {remedies(fits, config)}",
        )
        return Finding("memory", "peak, foretold", said, "wrong", means, remedy, predicted)
    if gradient_checkpointing:
        why = "as set" if config.gradient_checkpointing == "on" else "it would not fit otherwise"
        means = f"layers are made anew in the backward pass ({why}): the same result, a step takes about a third longer"
        return Finding("memory", "peak, foretold", said, "note", means, number=predicted)
    means = f"every layer keeps what its backward pass needs (gradient_checkpointing {config.gradient_checkpointing})"
    return Finding("memory", "peak, foretold", said, "ok", means, number=predicted)


def remedies(micro_batch, config):
    """What takes less memory than `config` does; `micro_batch`: windows in one pass that are foretold to fit, if any are."""
    if micro_batch:
        times, rest = divmod(config.effective_batch, micro_batch)
        same = "" if rest else ", with the same result"
        return f"--batch-size {micro_batch} --grad-accumulation {times} is foretold to fit{same}"
    wanted = []
    if config.batch_size > 1:
        wanted.append("a smaller batch_size with a larger grad_accumulation")
    if config.gradient_checkpointing == "off":
        wanted.append("gradient_checkpointing auto")
    wanted.append(f"max_length below {config.max_length}")
    if not config.cached:
        wanted.append("a teacher cache (kdlib cache, then teacher_cache: no teacher in memory)")
        if config.teacher_quantization == "none":
            wanted.append("teacher_quantization 8bit or 4bit (needs bitsandbytes)")
    if config.optimizer == "adamw":
        wanted.append("optimizer adamw_8bit (needs bitsandbytes)")
    return f"{', '.join(wanted)}, or a smaller student"


def apart_finding(device, used_bytes, total_bytes):
    """What is in use where the teacher has a card for itself."""
    said = f"{gib(used_bytes)} of {gib(total_bytes)} in use on {device}"
    means = "read after it had scored the held-out text; what its passes take in training is not foretold"
    return Finding("memory", "teacher's card", said, "ok", means, number=used_bytes)


def speed_finding(step_s, per_step, count):
    said = f"{1 / step_s:.2f} ({per_step / step_s:,.0f} tokens a second)"
    means = f"{count} real steps, timed after a first one, for a step of {per_step:,.0f} tokens: the mean of this text"
    return Finding("sessions", "steps a second", said, "ok", means, number=1 / step_s)


def numbers_finding(steps, scaled):
    """Whether the losses and gradients that were seen are numbers; `scaled`: a loss scaler is at work."""
    bad = [step.skipped for step in steps if step.skipped]
    said = f"{len(steps) - len(bad)} of {len(steps)} steps"
    if not bad:
        return Finding("sessions", "finite numbers", said)
    if scaled and all("at loss scale" in why for why in bad):
        means = "the loss scaler is finding its scale; steps with too large a gradient are skipped meanwhile"
        return Finding("sessions", "finite numbers", said, "note", means)
    remedy = "look at these documents, or try amp_dtype fp32"
    return Finding("sessions", "finite numbers", said, "wrong", bad[-1], remedy)


def halved_finding(micro_batch, config):
    means = "memory ran out, and the step was taken in smaller parts: a run does the same, with the same result"
    times = config.effective_batch // micro_batch
    remedy = f"--batch-size {micro_batch} --grad-accumulation {times} spares the attempt"
    return Finding("memory", "windows in one pass", f"{micro_batch} of {config.batch_size}", "note", means, remedy)


def plan_findings(config, step_s, per_step, known, read_s=0.0):
    """Hours and sessions of a plan of `max_steps`, one taking `step_s`; `known`: a `Budget` that has seen what evaluations
    and the start cost.
    """
    steps = config.max_steps
    every = plan.eval_steps(config)
    arm = Arm(DISTILLED, 0, steps, steps, steps, train_s=step_s)
    save = known.expected("save")
    between = config.save_steps * step_s or max(SAVE_EVERY_S, save / SAVE_SHARE)
    costs = {**known.costs, "step": step_s}
    # a session that has just been through its start
    session = time_budget.TimeBudget(
        known.seconds, known.clock, known.clock.now() - known.expected("start"), costs, known.guesses
    )
    left = read_s + plan.seconds_left(config, every, arm, session.expected, save / between)
    told = plan.outlook(left, session, 1, 1 / step_s, round(steps * per_step))
    control = {"full": "the control as long again", "short": "a tenth more for the control", "off": "no control"}
    more = f", {config.repeats} times" if config.repeats > 1 else ""
    means = f"{control[config.control]}{more}, an evaluation every {every} steps, checkpoints; loading not counted"
    made = [
        Finding(
            "sessions", "the whole plan", f"{steps:,} steps, {clock.format_duration(left)}", "ok", means, number=left
        )
    ]
    return made + [
        sessions_finding(told["sessions_needed"], config.time_budget, session.seconds, environment.on_kaggle())
    ]


def readings_finding(config, readings, read_s=0.0):
    """How often the teacher reads each training text in a plan; None where none is asked. `read_s`: the seconds of its
    reading first, where it does.
    """
    if not config.needs_teacher or config.cached:
        return None
    said = f"{readings:.1f} times"
    if readings < READINGS or not holds_all(config):
        return Finding("sessions", "teacher reads a text", said, number=readings)
    if read_s:
        said, means = f"once, for {said}", f"about {clock.format_duration(read_s)} before training; then it is let go"
        return Finding("sessions", "teacher reads a text", said, "ok", means, number=readings)
    means = (
        "from a cache it does so once: 0.005 to 0.016 bits per byte better in the same time, the cache's own counted, where "
        "it was measured, and 0.03 to 0.08 with a student from scratch (RESULTS.md)"
    )
    return Finding("sessions", "teacher reads a text", said, "note", means, "--teacher-cache auto", readings)


def sessions_finding(needed, given, seconds, on_kaggle):
    """The sessions `needed` of so many `seconds`; `given`: the time budget in the config."""
    each = f"{clock.format_duration(seconds)} each"
    if needed is None:
        means = "loading, saving, an evaluation and the margin take a whole session: none would get anything done"
        remedy = "a longer time_budget, or fewer eval_tokens"
        return Finding("sessions", "sessions", f"too short: {each}", "wrong", means, remedy)
    if not given and on_kaggle:
        means = "time_budget is empty, and a session that Kaggle ends by itself loses its files, as a rule"
        return Finding("sessions", "sessions", f"{needed} of {each}", "note", means, f"--time-budget {SESSION}", needed)
    each += "" if given else " (time_budget is empty: a run then has no end)"
    if needed > 1:
        means = "the same command goes on in the next one"
        return Finding("sessions", "sessions", f"{needed} of {each}", "note", means, number=needed)
    return Finding("sessions", "sessions", f"1 of {each}", number=1)


def disk_finding(sizes, config, free, reserve, read=0):
    """Room for checkpoints: `sizes` are the bytes of what is in one, by group. The best weights of the students that are
    compared are in it too, and a new one is whole before the last of the old ones goes. `read`: bytes of what the teacher
    says, where the run keeps that.
    """
    student = sizes["student"]
    best = (1 if config.control == "off" else 2) * (2 if config.repeats > 1 else 1)
    one = sum(sizes.values()) + best * student + checkpoint.OVERHEAD_BYTES
    least, whole = (count * one + 2 * student + reserve + read for count in (2, config.keep_checkpoints + 1))
    said = f"{gib(whole)} at most, {gib(free)} free in this folder"
    means = f"{config.keep_checkpoints} checkpoints of {gib(one)}, one being written, the student twice, a reserve"
    means += f", {gib(read)} of what the teacher says" if read else ""
    if least > free:
        remedy = "give --out a folder on a larger disk"
        return Finding(
            "sessions", "disk for checkpoints", said, "wrong", f"{means}; at least {gib(least)}", remedy, whole
        )
    if whole > free:
        means += f"; old checkpoints will go sooner, for which {gib(least)} are enough"
        return Finding("sessions", "disk for checkpoints", said, "note", means, number=whole)
    return Finding("sessions", "disk for checkpoints", said, "ok", means, number=whole)
