"""The command line: `kdlib demo | doctor | distill | cache | evaluate | report`."""

import json
import os
import sys
import traceback
from pathlib import Path

import kdlib.config
from kdlib.clock import Clock, format_duration
from kdlib.config import Config
from kdlib.progress import Progress

USAGE = """kdlib distils a large language model into a small one with a different tokenizer.

  kdlib demo --out DIR [--key value ...]                      distil two built-in small models, offline, on a CPU
  kdlib doctor [CONFIG.json] [--key value ...] [--json]       check machine, models, memory and run time; exit status 1
                                                              if the run would fail
  kdlib doctor [CONFIG.json] --show N                         print N documents as both models read them, targets marked
  kdlib doctor --self-test [--out DIR]                        test kdlib on this machine with small models
  kdlib distill [CONFIG.json] --out DIR [--key value ...]     start a run (student, control, verdict) or resume it
  kdlib cache [CONFIG.json] --out DIR [--key value ...]       write a teacher cache for a run with the same keys; then
                                                              distill ... --teacher-cache DIR needs no teacher
  kdlib evaluate --teacher T --student S --dataset D [--json] compare any two models on a text
  kdlib report DIR                                            redraw the figures and report.html of a run

T, S and D are Hugging Face ids or local paths. The same command resumes a paused or interrupted run (--resume auto).
--resume never requires a new folder; --resume DIR resumes the run or checkpoint in DIR. An incomplete cache is resumed
too: --resume A,B adopts shards of other writers, --writer 2/3 makes this the second of three writers. Without models,
doctor checks the machine only; --accelerator NvidiaTeslaT4 names the accelerator that was requested from Kaggle.
Keys of distill, demo, cache and doctor, with their defaults:
"""
OPTIONS = ("out", "json", "help", "resume", "writer", "accelerator", "self_test", "show")
"""Command-line options that are not config keys."""


def main(arguments=None):
    """Runs one command and returns its exit status: 0 success, 1 failure, 2 invalid input (one line on stderr)."""
    arguments, command = list(sys.argv[1:] if arguments is None else arguments), ""
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help") or "--help" in arguments:
            print(USAGE + config_help())
            return 0
        command = arguments.pop(0)
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}{kdlib.config.nearest(command, COMMANDS)}")
        positional, flags = _parse(arguments)
        return COMMANDS[command](positional, flags)
    except ValueError as error:
        print(f"kdlib: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader closed the pipe, as in `kdlib --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("kdlib: interrupted", file=sys.stderr)
        return 1
    except Exception:  # noqa: BLE001 - the command ends here; a run has written its status.json
        traceback.print_exc()
        advice = "see status.json" if command in ("demo", "distill") else "this is a bug of kdlib, please report it"
        print(f"kdlib: {command} failed with the error above; {advice}", file=sys.stderr)
        return 1


def config_help():
    """Returns help text for all config keys: default values, and the docstrings of `Config`'s fields."""
    docs = kdlib.config.docstrings()
    presets = ", ".join(kdlib.config.PRESETS)
    return "\n".join([
        f"  --preset NAME\n      Named set of values ({presets}). Explicit keys override it.",
        *(f"  --{name} {field.default!r}\n      {docs[name]}" for name, field in kdlib.config.flags()),
    ])  # fmt: skip


def demo(positional, flags):
    out, resume = _out(positional, flags)
    with Progress("loading libraries") as progress:
        import torch

        from kdlib import demo as builtin
        from kdlib import environment

        torch.set_num_threads(1)  # models of this size are slower with more threads
        cache = environment.cache_folder()
        config = builtin.config(cache, **flags)
        _check_out(out, resume)
        quiet()
        clock = Clock()
        if not builtin.is_ready(cache):
            progress.say("First run: training a small teacher, kept in the cache folder (about two minutes).")
            for phase, done, total in builtin.prepare(cache, clock):
                progress(phase, done, total)
        return _run_session(config, out, clock, resume, progress)


def doctor(positional, flags):
    if flags.pop("self_test", False):
        return _self_test(positional, flags)
    as_json, accelerator, count = flags.pop("json", False), flags.pop("accelerator", ""), flags.pop("show", "")
    config = _config("doctor", positional, flags)
    if count:
        return _preview(config, count)
    with Progress("loading libraries") as progress:
        from kdlib import doctor

        quiet()
        for stage, findings in doctor.run_checks(config, accelerator, on_progress=progress):  # noqa: B007 - cumulative
            progress(stage, 0, 0)
    print(json.dumps(doctor.to_json(findings), indent=2) if as_json else doctor.text(findings))
    return 1 if doctor.overall_state(findings) == "error" else 0


def _preview(config, count):
    from kdlib.evaluation.preview import preview

    if not count.isdigit() or not int(count):
        raise ValueError(f"--show takes a number of documents, got {count!r}")
    config.require_inputs()
    quiet()
    print(preview(config, int(count)).text(colours=sys.stdout.isatty()))
    return 0


def _self_test(positional, flags):
    from kdlib import self_test

    out, results = flags.pop("out", None), []
    if positional or flags:
        raise ValueError(f"--self-test takes --out DIR only, got {' '.join([*positional, *flags])}")
    quiet()
    for line in self_test.lines(out, results):
        print(line, flush=True)
    return 1 if any(result.state == "failed" for result in results) else 0


def distill(positional, flags):
    out, resume = _out([], flags)
    config = _config("distill", positional, flags)
    config.require_inputs()
    with Progress("loading libraries") as progress:
        _check_out(out, resume)
        quiet()
        return _run_session(config, out, Clock(), resume, progress)


def cache(positional, flags):
    other_caches = [path for path in flags.pop("resume", "auto").split(",") if path not in ("", "auto")]
    writer = _writer(flags.pop("writer", "1/1"))
    out, _ = _out([], flags)
    config = _config("cache", positional, flags)
    config.require_inputs()
    with Progress("loading libraries") as progress:
        from kdlib.session.cache_writer import cache_teacher

        quiet()
        for record in cache_teacher(config, out, Clock(), other_caches, writer, progress):
            if record["kind"] == "plan":
                progress.say("\n".join(record["data"]))
                progress.say(
                    f"{record['positions']:,} token positions, {record['bytes_a_position']:.0f} bytes each: "
                    f"{record['bytes'] / 1e6:,.1f} MB in {record['shards']} shards, {record['missing']} missing."
                )
            elif record["kind"] != "shard":
                progress.say(_cache_summary(record, out))
    return 0


def _cache_summary(record, out):
    if record["kind"] == "paused":
        return f"Paused: {record['reason']}; {record['missing']} shards are missing. Run the same command to resume."
    if record["missing"]:
        return f"This writer is done; other writers still have to write {record['missing']} shards."
    return f"The cache is complete. To train with it: kdlib distill ... --teacher-cache {out}"


def _writer(text):
    """Parses `1/3` to `(0, 3)`: index and number of writers."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--writer takes INDEX/COUNT, such as 1/3, 2/3 or 3/3; got {text!r}")
    return int(index) - 1, int(count)


def evaluate(positional, flags):
    as_json = flags.pop("json", None) is not None
    if positional:
        raise ValueError(f"evaluate takes --teacher, --student and --dataset; got {positional[0]!r}")
    config = Config.from_dict(flags)
    with Progress("loading libraries") as progress:
        from kdlib import compare

        quiet()
        comparison = compare.compare(config, progress)
    print(json.dumps(comparison, indent=2) if as_json else "\n".join(compare.text_lines(comparison)))
    return 0


def report(positional, flags):
    from kdlib.report.html import write_report

    if len(positional) != 1 or flags:
        raise ValueError("report takes one run folder: kdlib report DIR")
    print(write_report(Path(positional[0])))
    return 0


COMMANDS = {command.__name__: command for command in (demo, doctor, distill, cache, evaluate, report)}


def quiet():
    """Disables the progress bars and warnings of transformers."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def _run_session(config, out, clock, resume, progress):
    """Runs one session and shows its progress and verdict."""
    from kdlib.session.run_folder import RunFolder
    from kdlib.session.session import distill

    try:
        for record in distill(config, out, clock, resume, on_progress=progress):
            _show(record, config, out, progress)
    except KeyboardInterrupt:
        status = RunFolder(out).last_status()
        if status.get("state") != "paused":
            raise
        progress.say(f"Paused: {status['reason']}.")
    return 0


def _show(record, config, out, progress):
    from kdlib.environment import is_main_process

    if not is_main_process():
        return
    if record["kind"] == "start":
        progress.say("\n".join(_start_lines(record)))
    elif record["kind"] == "reading" and record["phase"] != "shard" and record["text"]:
        progress.say(record["text"])
    elif record["kind"] == "train":
        name = "control" if record["run"] == "ce_only" else record["run"]
        details = f"loss {record['loss']:.3f}, {format_duration(record['left_s'])} left for the run"
        progress.train(f"{name} {record['repeat'] + 1}/{config.repeats}", record["step"], record["last_step"], details)
    elif record["kind"] == "alert":
        progress.say(f"{record['run']}, step {record['step']}: {record['meaning']}. Try: {record['advice']}.")
    elif record["kind"] == "plan":
        progress.say(_plan_line(record))
    elif record["kind"] == "verdict":
        progress.say("\n".join(_verdict_lines(record, out)))
    elif record["kind"] == "paused":
        progress.say(f"Paused: {record['reason']}.")


def _start_lines(start):
    alignment = start["alignment"]
    if start["resumed"]:
        yield f"Session {start['session']} resumes from {start['resumed']}."
    yield from start["data"]
    for note in start["notes"]:
        yield f"Changed since the last session: {note}. Results will not be bit-identical to an unchanged run."
    yield (
        f"{start['num_windows']} windows, {start['max_steps']} steps. {alignment['coverage']:.0%} of the student's "
        f"tokens have teacher signal; {alignment['shared_student']:.0%} of its vocabulary is shared with the teacher."
    )
    for side in ("student", "teacher"):
        faithful = alignment[f"faithful_{side}"]
        if faithful < 1.0:
            yield (
                f"The {side}'s tokenizer changes the text: only {faithful:.1%} of its tokens are the bytes of the text. "
                "Only these are used for distillation."
            )


def _plan_line(plan):
    sessions = plan["sessions_needed"]
    total = "all in this session" if sessions == plan["session"] else f"{sessions} sessions in total"
    total = "sessions too short to finish; increase time_budget" if sessions is None else total
    return (
        f"Plan: {plan['steps_per_s']:.2f} steps/s, {plan['tokens_left']:,} tokens and "
        f"{format_duration(plan['left_s'])} remaining, {total}; earliest finish {plan['finish']}."
    )


def _verdict_lines(verdict, out):
    names = {"teacher": "teacher", "student_before": "student before", "ce_only": "control", "distilled": "distilled"}
    yield ""
    for key, name in names.items():
        value = verdict["bits_per_byte"][key]
        if value is not None:
            yield f"  {name:16}{value:8.4f} bits per byte"
    yield f"\n{verdict['sentence']}\n"
    yield f"Student: {out / 'student'}   Report: {out / 'report.html'}"


def _parse(arguments):
    """Returns `(positional, flags)`: values parsed by the type of their key; hyphens equal underscores."""
    keys = [*(name for name, _ in kdlib.config.flags()), "preset"]
    positional, flags = [], {}
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--"):
            positional.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name not in keys and name not in OPTIONS:
            raise ValueError(f"unknown key {argument!r}{kdlib.config.nearest(name, [*keys, *OPTIONS], '--')}")
        if name in ("json", "self_test"):
            flags[name] = True
            continue
        if not equals:
            if not arguments:
                raise ValueError(f"{argument} needs a value")
            value = arguments.pop(0)
        flags[name] = value if name in OPTIONS else kdlib.config.parse_flag(name, value)
    return positional, flags


def _config(command, positional, flags):
    """Returns the `Config` of an optional file, overridden by flags."""
    if len(positional) > 1:
        raise ValueError(f"{command} takes one CONFIG.json, got {' '.join(positional)}")
    base = Config.from_json(positional[0]).to_dict() if positional else {}
    return Config.from_dict({**base, **flags})


def _out(positional, flags):
    if positional:
        raise ValueError(f"unexpected {positional[0]!r}; options are written --key value")
    if "out" not in flags:
        raise ValueError("--out DIR is missing: the folder of the run")
    flags.pop("json", None)
    if flags.pop("writer", None):
        raise ValueError("--writer is for kdlib cache")
    return Path(flags.pop("out")), flags.pop("resume", "auto")


def _check_out(out, resume):
    from kdlib.session.run_folder import RunFolder

    folder = RunFolder(out)
    folder.check_usable(may_hold_run=resume == "auto" or (resume != "never" and not folder.can_resume()))


if __name__ == "__main__":
    sys.exit(main())
