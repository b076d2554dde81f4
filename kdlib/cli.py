"""The command line: `kdlib demo | doctor | distill | cache | evaluate | report`."""

import json
import os
import sys
import traceback
from pathlib import Path

import kdlib.config
from kdlib import keys
from kdlib.clock import Clock, format_duration
from kdlib.config import Config
from kdlib.progress import Progress

USAGE = """kdlib distils a large language model into a small one that has another tokenizer.

  kdlib demo --out DIR [--key value ...]                      the embedded default, from nothing, on a CPU
  kdlib doctor [CONFIG.json] [--key value ...] [--json]       will it work here? machine, pair, memory, hours; 1 if not
  kdlib doctor --self-test [--out DIR]                        run kdlib's own checks on this machine, with small models
  kdlib distill [CONFIG.json] --out DIR [--key value ...]     one run: student, control, verdict; or the next session of it
  kdlib cache [CONFIG.json] --out DIR [--key value ...]       the teacher's part of a run, once: the same keys, then
                                                              distill ... --teacher-cache DIR needs no teacher
  kdlib evaluate --teacher T --student S --dataset D [--json] compare any two models on a text
  kdlib report DIR                                            draw the figures and report.html of a run again

T, S and D are Hugging Face ids or local paths. A run that was paused or cut off goes on when the same command is given
again (--resume auto); --resume never wants a new folder, --resume DIR goes on with the run or checkpoint in DIR. So does a
cache: --resume A,B takes over parts that others wrote, --writer 2/3 makes this the second of three that share the work.
doctor looks at the machine alone where no models are named; --accelerator NvidiaTeslaT4 tells it what was asked for.
Keys of distill, demo, cache and doctor, with their defaults:
"""
PLAIN = ("out", "json", "help", "resume", "writer", "accelerator", "self_test")


def main(arguments=None):
    """Run one command; the exit status: 0 done, 1 the run failed, 2 bad input (one line on stderr)."""
    words, command = list(sys.argv[1:] if arguments is None else arguments), ""
    try:
        if not words or words[0] in ("-h", "--help", "help") or "--help" in words:
            print(USAGE + keys.told())
            return 0
        command = words.pop(0)
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}{kdlib.config.nearest(command, COMMANDS)}")
        positional, flags = _parse(words)
        return COMMANDS[command](positional, flags)
    except ValueError as error:
        print(f"kdlib: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our lines has seen enough, as in `kdlib --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("kdlib: stopped", file=sys.stderr)
        return 1
    except Exception:  # noqa: BLE001 - it is over; the status.json of a run says so
        traceback.print_exc()
        why = (
            ", status.json says why"
            if command in ("demo", "distill")
            else "; it is a mistake of kdlib's, please report it"
        )
        print(f"kdlib: {command} failed; the lines above say where{why}", file=sys.stderr)
        return 1


def demo(positional, flags):
    out, wanted = _out(positional, flags)
    with Progress("loading libraries") as progress:
        import torch

        from kdlib import demo as tiny
        from kdlib import environment

        torch.set_num_threads(1)  # at this size more threads only wait for each other, badly where a core is busy
        cache = environment.cache_folder()
        config = tiny.config(cache, **flags)
        _check_out(out, wanted)
        quiet()
        clock = Clock()
        if not tiny.is_ready(cache):
            progress.say("The first time, a small teacher is trained and kept in the cache folder (two minutes or so).")
            for phase, done, total in tiny.prepare(cache, clock):
                progress(phase, done, total)
        return _drive(config, out, clock, wanted, progress)


def doctor(positional, flags):
    if flags.pop("self_test", False):
        return _self_test(positional, flags)
    as_json, asked = flags.pop("json", False), flags.pop("accelerator", "")
    config = _config("doctor", positional, flags)
    with Progress("loading libraries") as progress:
        from kdlib import doctor

        quiet()
        for coming, found in doctor.run_checks(config, asked, on_progress=progress):  # noqa: B007 - the last ones are all
            progress(coming, 0, 0)
    print(json.dumps(doctor.to_json(found), indent=2) if as_json else doctor.text(found))
    return 1 if doctor.overall_state(found) == "wrong" else 0


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
    out, wanted = _out([], flags)
    config = _config("distill", positional, flags)
    config.require_inputs()
    with Progress("loading libraries") as progress:
        _check_out(out, wanted)
        quiet()
        return _drive(config, out, Clock(), wanted, progress)


def cache(positional, flags):
    others = [part for part in flags.pop("resume", "auto").split(",") if part not in ("", "auto")]
    writer = _writer(flags.pop("writer", "1/1"))
    out, _ = _out([], flags)
    config = _config("cache", positional, flags)
    config.require_inputs()
    with Progress("loading libraries") as progress:
        from kdlib.session.cache_writer import write

        quiet()
        for record in write(config, out, Clock(), others, writer, progress):
            if record["kind"] == "plan":
                progress.say(
                    f"{record['positions']:,} positions of text, {record['bytes_a_position']:.0f} bytes each: "
                    f"{record['bytes'] / 1e6:,.1f} MB in {record['shards']} shards, {record['missing']} of them to write."
                )
            elif record["kind"] != "shard":
                progress.say(_cache_end(record, out))
    return 0


def _cache_end(record, out):
    if record["kind"] == "paused":
        return f"Paused: {record['reason']}; {record['missing']} shards are missing. The same command goes on."
    if record["missing"]:
        return f"This writer is done; {record['missing']} shards are for others to write."
    return f"The cache is complete. Learn from it: kdlib distill ... --teacher-cache {out}"


def _writer(text):
    """`(0, 3)` of `1/3`."""
    index, _, count = text.partition("/")
    if not (index.isdigit() and count.isdigit() and 1 <= int(index) <= int(count)):
        raise ValueError(f"--writer takes which one this is of how many, as 1/3 to 3/3; got {text!r}")
    return int(index) - 1, int(count)


def evaluate(positional, flags):
    as_json = flags.pop("json", None) is not None
    if positional:
        raise ValueError(f"evaluate takes --teacher, --student and --dataset; got {positional[0]!r}")
    config = Config.from_dict(flags)
    with Progress("loading libraries") as progress:
        from kdlib import compare

        quiet()
        found = compare.compare(config, progress)
    print(json.dumps(found, indent=2) if as_json else "\n".join(compare.told(found)))
    return 0


def report(positional, flags):
    from kdlib.report.html import write_report

    if len(positional) != 1 or flags:
        raise ValueError("report takes one run folder: kdlib report DIR")
    print(write_report(Path(positional[0])))
    return 0


COMMANDS = {each.__name__: each for each in (demo, doctor, distill, cache, evaluate, report)}


def quiet():
    """Keep transformers from drawing its own progress bars between ours."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def _drive(config, out, clock, wanted, progress):
    """Run the session and show it: a bar for everything that takes long, then the verdict."""
    from kdlib.session.run_folder import RunFolder
    from kdlib.session.session import distill

    try:
        for record in distill(config, out, clock, wanted, on_progress=progress):
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
    elif record["kind"] == "reading" and record["phase"] != "shard" and record["told"]:
        progress.say(record["told"])
    elif record["kind"] == "train":
        name = "control" if record["run"] == "ce_only" else record["run"]
        more = f"loss {record['loss']:.3f}, whole run {format_duration(record['left_s'])} left"
        progress.train(f"{name} {record['repeat'] + 1}/{config.repeats}", record["step"], record["last_step"], more)
    elif record["kind"] == "alert":
        progress.say(f"{record['run']}, step {record['step']}: {record['meaning']}. Try: {record['advice']}.")
    elif record["kind"] == "plan":
        progress.say(_plan_line(record))
    elif record["kind"] == "verdict":
        progress.say("\n".join(_verdict_lines(record, out)))
    elif record["kind"] == "paused":
        progress.say(f"Paused: {record['reason']}.")


def _start_lines(start):
    told = start["alignment"]
    if start["resumed"]:
        yield f"Session {start['session']} goes on from {start['resumed']}."
    for note in start["notes"]:
        yield f"Not as before: {note}. The run goes on, but not to the last bit as it would have."
    yield (
        f"{start['num_windows']} windows of text, {start['max_steps']} steps. {told['coverage']:.0%} of the student's "
        f"tokens get signal from the teacher; {told['shared_student']:.0%} of its vocabulary is the teacher's too."
    )
    for side in ("student", "teacher"):
        if told[f"faithful_{side}"] < 1.0:
            yield (
                f"The {side}'s tokenizer changes the text: {told[f'faithful_{side}']:.1%} of its tokens are the bytes that "
                "stand there, and only those give and take signal."
            )


def _plan_line(plan):
    sessions = plan["sessions_needed"]
    over = "this session" if sessions == plan["session"] else f"{sessions} sessions in all"
    over = "more sessions than can be told: one is over before anything is done" if sessions is None else over
    return (
        f"Plan: {plan['steps_per_s']:.2f} steps a second, {plan['tokens_left']:,} tokens and "
        f"{format_duration(plan['left_s'])} to go, {over}; done on {plan['finish']} at the earliest."
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


def _parse(words):
    """`(positional, flags)`: flags by config key, hyphens and underscores alike, values by the key's type."""
    names = [*(name for name, _ in kdlib.config.flags()), "preset"]
    positional, flags = [], {}
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            positional.append(word)
            continue
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in names and name not in PLAIN:
            raise ValueError(f"unknown key {word!r}{kdlib.config.nearest(name, [*names, *PLAIN], '--')}")
        if name in ("json", "self_test"):
            flags[name] = True
            continue
        if not given:
            if not words:
                raise ValueError(f"{word} needs a value")
            value = words.pop(0)
        flags[name] = value if name in PLAIN else kdlib.config.parse_flag(name, value)
    return positional, flags


def _config(command, positional, flags):
    """The `Config` of a file, if one is given, and of the keys beside it."""
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


def _check_out(out, wanted):
    from kdlib.session.run_folder import RunFolder

    folder = RunFolder(out)
    folder.refuse_foreign(may_hold_run=wanted == "auto" or (wanted != "never" and not folder.has_begun()))


if __name__ == "__main__":
    sys.exit(main())
