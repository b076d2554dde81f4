"""Findings of the doctor about a run's peak memory, time and disk space, predicted or measured before the run."""

import math

from kdlib import clock, environment
from kdlib.machine import gib
from kdlib.models.teacher_cache import holds_all
from kdlib.report.findings import Finding
from kdlib.session import checkpoint, time_budget
from kdlib.session.arm import DISTILLED, Arm
from kdlib.session.first_pass import MIN_EPOCHS

ADAPTER_RANK = 16
"""Rank of the adapters whose memory is compared with that of training in full."""
SESSION = "11h"
"""Length of a session if `time_budget` is empty. Kaggle's limit is 12 hours."""


def peak_finding(predicted, available, total, gradient_checkpointing, config, micro_batch=None):
    """Compares the `predicted` peak with the `total` memory and with the `available` part of it, in bytes.
    `micro_batch` is a number of windows predicted to fit, if any.
    """
    value = f"more than {gib(total)}" if math.isinf(predicted) else f"{gib(predicted)} of {gib(total)}"
    remedy = ""
    if predicted > total:
        state, remedy = "error", remedies(micro_batch, config)
        meaning = (
            "a step does not fit. A run halves its batch if GPU memory runs out; if RAM runs out, it may be killed"
        )
    elif predicted > available:
        state, remedy = "error", f"end the other programs, or {remedies(micro_batch, config)}"
        meaning = f"other programs leave {gib(available)} of it"
    elif gradient_checkpointing:
        state, reason = "warning", "as set" if config.gradient_checkpointing == "on" else "it would not fit otherwise"
        meaning = f"gradient checkpointing is on ({reason}): the same result, a step takes about a third longer"
    else:
        state = "ok"
        meaning = f"no gradient checkpointing is needed (gradient_checkpointing {config.gradient_checkpointing})"
    return Finding("memory", "predicted peak", value, state, meaning, remedy, predicted)


def adapters_finding(predicted, with_adapters, available):
    """Compares training in full with adapters of rank ADAPTER_RANK, frozen and in 4 bits. All in bytes."""
    flags = f"--lora-rank {ADAPTER_RANK}", f"--lora-rank {ADAPTER_RANK} --student-quantization 4bit"
    names = "in full", f"LoRA of rank {ADAPTER_RANK}", "QLoRA"
    peaks = predicted, *with_adapters
    fits = ["fits" if peak <= available else "does not fit" for peak in peaks]
    value = "; ".join(
        f"{name} {gib(peak) if math.isfinite(peak) else 'too much'}, {fit}"
        for name, peak, fit in zip(names, peaks, fits, strict=True)
    )
    meaning = f"estimated; {flags[0]} for LoRA, {flags[1]} for QLoRA"
    return Finding("memory", "ways to train", value, "ok", meaning)


def remedies(micro_batch, config):
    """Returns how to reduce the memory of `config`. `micro_batch` is a number of windows predicted to fit, if any."""
    if micro_batch:
        accumulation, rest = divmod(config.effective_batch, micro_batch)
        same = "" if rest else ", with the same result"
        return f"--batch-size {micro_batch} --grad-accumulation {accumulation} is predicted to fit{same}"
    options = []
    if config.batch_size > 1:
        options.append("a smaller batch_size with a larger grad_accumulation")
    if config.gradient_checkpointing == "off":
        options.append("gradient_checkpointing auto")
    options.append(f"max_length below {config.max_length}")
    if not config.cached:
        options.append("a teacher cache (kdlib cache, then teacher_cache: no teacher in memory)")
        if config.teacher_quantization == "none":
            options.append("teacher_quantization 8bit or 4bit (needs bitsandbytes)")
    if not config.lora_rank:
        options.append(f"lora_rank {ADAPTER_RANK} (trains adapters only; needs peft)")
    if config.optimizer == "adamw":
        options.append("optimizer adamw_8bit (needs bitsandbytes)")
    return f"{', '.join(options)}, or a smaller student"


def teacher_gpu_finding(device, used_bytes, total_bytes):
    """Reports the memory used on the teacher's own GPU."""
    value = f"{gib(used_bytes)} of {gib(total_bytes)} in use on {device}"
    meaning = "measured after scoring the held-out text; the teacher's peak in training is not predicted"
    return Finding("memory", "teacher's GPU", value, "ok", meaning, number=used_bytes)


def speed_finding(step_s, per_step, count):
    value = f"{1 / step_s:.2f} ({per_step / step_s:,.0f} tokens per second)"
    meaning = f"{count} steps, timed after a warm-up step, and scaled to {per_step:,.0f} tokens, the mean of this text"
    return Finding("sessions", "steps per second", value, "ok", meaning, number=1 / step_s)


def numbers_finding(steps, scaled):
    """Reports steps with NaN or infinite losses or gradients; `scaled`: a gradient scaler is in use."""
    bad = [step.skipped for step in steps if step.skipped]
    value = f"{len(steps) - len(bad)} of {len(steps)} steps"
    if not bad:
        return Finding("sessions", "finite numbers", value)
    if scaled and all("at loss scale" in reason for reason in bad):
        meaning = "the gradient scaler is calibrating; steps with too large a gradient are skipped meanwhile"
        return Finding("sessions", "finite numbers", value, "warning", meaning)
    return Finding(
        "sessions", "finite numbers", value, "error", bad[-1], "check these documents, or try amp_dtype fp32"
    )


def halved_finding(micro_batch, config):
    meaning = "out of memory: the step was repeated with smaller micro-batches, as a run does, with the same result"
    remedy = f"--batch-size {micro_batch} --grad-accumulation {config.effective_batch // micro_batch} avoids the retry"
    return Finding("memory", "micro-batch", f"{micro_batch} of {config.batch_size}", "warning", meaning, remedy)


def plan_findings(config, step_s, per_step, known, read_s=0.0):
    """Reports the hours and sessions of a run of `max_steps` steps of `step_s` seconds and `per_step` tokens. `known`
    is a `TimeBudget` with measured costs, `read_s` the seconds of the teacher's first pass.
    """
    steps = config.max_steps
    eval_steps = time_budget.eval_steps(config)
    arm = Arm(DISTILLED, 0, steps, steps, steps, train_s=step_s)
    save = known.expected("save")
    interval_s = config.save_steps * step_s or max(checkpoint.SAVE_EVERY_S, save / checkpoint.SAVE_SHARE)
    costs = {**known.costs, "step": step_s}
    # a session that has just finished its start
    session = time_budget.TimeBudget(
        known.seconds, known.clock, known.clock.now() - known.expected("start"), costs, known.guesses
    )
    left = read_s + time_budget.seconds_left(config, eval_steps, arm, session.expected, save / interval_s)
    plan = time_budget.make_plan(left, session, 1, 1 / step_s, round(steps * per_step))
    control = {"full": "a control of the same length", "short": "10% more for the control", "off": "no control"}
    repeats = f", {config.repeats} times" if config.repeats > 1 else ""
    meaning = (
        f"{control[config.control]}{repeats}, an evaluation every {eval_steps} steps, checkpoints; without loading"
    )
    value = f"{steps:,} steps, {clock.format_duration(left)}"
    num_sessions, on_kaggle = plan["sessions_needed"], environment.on_kaggle()
    return [
        Finding("sessions", "whole run", value, "ok", meaning, number=left),
        sessions_finding(num_sessions, config.time_budget, session.seconds, on_kaggle),
    ]


def teacher_passes_finding(config, passes, read_s=0.0):
    """Reports how often the teacher processes each training text, or None if there is no live teacher. `read_s` are the
    seconds of its first pass, if the run writes a cache.
    """
    if not config.needs_teacher or config.cached:
        return None
    name, value = "teacher passes", f"{passes:.1f} times over each text"
    if passes < MIN_EPOCHS or not holds_all(config):
        return Finding("sessions", name, value, number=passes)
    if read_s:
        meaning = f"one pass of about {clock.format_duration(read_s)} before training; then the teacher is freed"
        return Finding("sessions", name, f"once, for {passes:.1f} epochs", "ok", meaning, number=passes)
    meaning = (
        "with a cache one pass is enough: 0.003 to 0.029 bits per byte better in the same time, including the cache's own, "
        "and 0.03 to 0.08 with a student from scratch (RESULTS.md)"
    )
    return Finding("sessions", name, value, "warning", meaning, "--teacher-cache auto", passes)


def sessions_finding(needed, setting, seconds, on_kaggle):
    """Reports the number of sessions `needed`, of `seconds` each; `setting` is `time_budget` of the config."""
    length = f"{clock.format_duration(seconds)} each"
    if needed is None:
        meaning = "loading, saving, an evaluation and the reserve take the whole session, so no training would be done"
        remedy = "a longer time_budget, or fewer eval_tokens"
        return Finding("sessions", "sessions", f"too short: {length}", "error", meaning, remedy)
    value = f"{needed} of {length}"
    if not setting and on_kaggle:
        meaning = "time_budget is empty; a session that reaches Kaggle's limit usually loses its files"
        return Finding("sessions", "sessions", value, "warning", meaning, f"--time-budget {SESSION}", needed)
    value += "" if setting else " (time_budget is empty: a session has no limit)"
    if needed > 1:
        return Finding("sessions", "sessions", value, "warning", "the same command resumes the run", number=needed)
    return Finding("sessions", "sessions", value, number=1)


def disk_finding(sizes, config, free, reserve, cache_bytes=0):
    """Compares the disk space of checkpoints with the `free` space. `sizes` are bytes by group of one checkpoint, which
    also has the best weights of each arm. A new checkpoint is complete before an old one is removed.
    """
    student = sizes["student"]
    num_best = (1 if config.control == "off" else 2) * (2 if config.repeats > 1 else 1)
    one = sum(sizes.values()) + num_best * student + checkpoint.OVERHEAD_BYTES
    counts = (2, config.keep_checkpoints + 1)
    least, most = (count * one + 2 * student + reserve + cache_bytes for count in counts)
    value = f"{gib(most)} at most, {gib(free)} free in this folder"
    meaning = f"{config.keep_checkpoints} checkpoints of {gib(one)}, one being written, the student twice, a reserve"
    meaning += f", {gib(cache_bytes)} of teacher cache" if cache_bytes else ""
    state, remedy = "ok", ""
    if least > free:
        state, remedy = "error", "give --out a folder on a larger disk"
        meaning += f"; at least {gib(least)} are needed"
    elif most > free:
        state = "warning"
        meaning += f"; old checkpoints will be removed sooner, for which {gib(least)} are enough"
    return Finding("sessions", "disk for checkpoints", value, state, meaning, remedy, most)
