"""Useful tokens a second and peak memory of one whole optimizer step at the true shapes, every way on the same windows.

    OMP_NUM_THREADS=1 python -m benchmarks.step [--ways "ce-only;..."] [--repeats 2] [--depth 2] [--answer 0.5]
    OMP_NUM_THREADS=1 python -m benchmarks.step --growth [--ways ...] [--depth 2]
    python -m benchmarks.step --figure FOLDER

Teacher as Qwen3-0.6B, student as SmolLM2-135M, random weights (`--depth`: that many layers of each), in float32 on a
processor, under the trainer's own autocast on a card. Random tokens, lengths as instructions have them (`World`), a label on
every token (`--answer`: on the last share of each window), 85 % of them aligned. A *step* is everything up to the changed
weights. Tokens a second are those of the student's windows; *computed* are all that went through it, padding included.

Each way is timed in a process of its own, in turn with *floor* (the teacher's body and a plain step: the least a live step
could cost) and *ce-only*, after one whole round that does not count (memory is touched there for the first time): *to floor*
and *to ce-only* are medians of the rounds' ratios by the time that the process really ran, which neighbours disturb less,
the first with the least and the greatest; *by the clock* says the first again by wall-clock; *to naive* is the quotient of
what both are to the floor. Memory comes from another process that runs only this way: its highest resident size (a card's
allocations) over what it held before, which is the models it needs, and AdamW's moments.

Every finished measurement is a line in `--out`, and one that is there is not made again. The ways of other projects that are
not installed are left out (`benchmarks/peers.py` says how to install them). `--growth` measures few layers on more or longer
windows and other shapes, `--figure` draws what it found.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.ways import WAYS, World
from kdlib import files
from kdlib.session import run_folder

COLUMNS = [
    "way", "tokens a second", "seconds", "to floor", "by the clock", "to ce-only", "to naive", "computed a token",
    "peak MB above", "peak GB in all",
]  # fmt: skip
BESIDE = ("floor", "ce-only")
"""Ways that are timed in turn with every other one."""
SELDOM = ("TRL GOLD ULD, by position", "ours cached, projector")
"""Ways that are measured when they are asked for."""
TEACHERS = {
    "Qwen3-0.6B": {},
    "Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
    "Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_attention_heads": 32},
}
GROWTH = {
    "windows": {num: {"num_windows": num} for num in (2, 4, 8, 16)},
    "tokens in each of 4 windows": {length: {"num_windows": 4, "length": length} for length in (64, 128, 256, 384)},
    "student's vocabulary": {size: {"student": {"vocab_size": size}} for size in (16_384, 49_152, 131_072)},
    "teacher's shape": {name: {"teacher": shape} for name, shape in TEACHERS.items()},
}
GROWING = ["floor", "ours live, projector", "ours live, first_token", "eager, projector", "TRL GOLD ULD"]


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--ways", help="names separated by ; (default: all that are installed)")
    options.add_argument("--repeats", type=int, default=2)
    options.add_argument("--depth", type=int, default=0, help="layers of both models; 0: all (2 with --growth)")
    options.add_argument("--windows", type=int, default=8)
    options.add_argument("--answer", type=float, default=1.0)
    options.add_argument("--limit", type=int, default=900, help="seconds for one measurement")
    options.add_argument("--out", default="benchmarks/out/step.jsonl")
    options.add_argument("--growth", action="store_true")
    options.add_argument("--figure", metavar="FOLDER")
    options.add_argument("--one", help="a measurement as JSON, made in this process and printed")
    options = options.parse_args()
    if options.one:
        asked = json.loads(options.one)
        measure = {"time": time_of, "memory": memory_of}[asked["what"]]
        print(json.dumps(measure(asked["way"], World(**asked["world"]), asked["repeats"])))
        return
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if options.figure:
        draw(files.read_records(out), Path(options.figure))
    elif options.growth:
        growth(options, Measured(out, options.limit))
    else:
        table(options, Measured(out, options.limit))


class Measured:
    """Measurements in processes of their own, kept in a file: `measured(what, way, world, repeats)`."""

    def __init__(self, out, limit):
        self.out, self.limit = out, limit
        self.known = files.read_records(out) if out.exists() else []

    def __call__(self, what, way, world, repeats):
        asked = {"what": what, "way": way, "world": dataclasses.asdict(world), "repeats": repeats}
        for record in self.known:
            if all(record[name] == value for name, value in asked.items()):
                return record
        try:
            found = in_own_process(asked, self.limit)
        except subprocess.TimeoutExpired:
            return {"failed": f"over {self.limit} s"}
        except subprocess.CalledProcessError as error:
            return {"failed": f"exit status {error.returncode}"}
        run_folder.Records(self.out).append({**asked, **found, "load": os.getloadavg()[0]})
        return found


def in_own_process(asked, limit):
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.step", "--one", json.dumps(asked)]
    out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, timeout=limit).stdout
    return json.loads(out.splitlines()[-1])


def time_of(name, world, repeats):
    """`seconds` of every step of a way and of those BESIDE it, run in turn on the same models."""
    steps = [WAYS[each](world) for each in (*BESIDE, name)]
    for step in steps:
        step(world.windows)
    rounds = [[seconds(world, step) for step in steps] for _ in range(repeats)]
    return {f"{each}_s": list(taken) for each, taken in zip((*BESIDE, "way"), zip(*rounds, strict=True), strict=True)}


def memory_of(name, world, repeats):
    """Peak bytes of a way above what it keeps and in all, its seconds when alone, and the tokens its student computed."""
    step, computed = WAYS[name](world), []
    step(world.brief)
    ctypes.CDLL(None).malloc_trim(0)  # what is freed and held by the allocator would count as there before
    world.student_model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    cuda = world.accelerator.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    page = os.sysconf("SC_PAGE_SIZE")
    before = torch.cuda.memory_allocated() if cuda else int(Path("/proc/self/statm").read_text().split()[1]) * page
    taken = [seconds(world, step) for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tokens = sum(len(window.student_ids) for window in world.windows)
    figures = {"way_s": taken, "tokens": tokens, "computed": sum(computed) / repeats}
    return {**figures, "above_bytes": peak - before, "peak_bytes": peak}


def seconds(world, step):
    """`[by the clock, by the processor]` of one step."""
    started = time.perf_counter(), time.process_time()
    step(world.windows)
    if world.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return [time.perf_counter() - started[0], time.process_time() - started[1]]


def ways_of(options, default):
    """The ways that were asked for, or the `default` ones as far as they are installed."""
    if options.ways:
        return options.ways.split(";")
    try:
        import trl  # noqa: F401
    except ImportError as problem:
        print(f"TRL is left out: {problem}", file=sys.stderr)
        return [name for name in default if "TRL" not in name]
    return list(default)


def table(options, measured):
    """Print a row a way as soon as it is measured, and all of them again with what each is to the others."""
    started, depth = time.perf_counter(), {"num_hidden_layers": options.depth} if options.depth else {}
    world = World(options.windows, answer=options.answer, teacher=depth, student=depth)
    head = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"
    print(head, flush=True)
    found, to_floor = [], {}
    for way in ways_of(options, [name for name in WAYS if name not in SELDOM]):
        kept = measured("memory", way, world, 1)
        timed = kept if "failed" in kept else measured("time", way, world, options.repeats)
        found.append((way, timed, kept))
        if "failed" not in timed:
            to_floor[way] = statistics.median(ratios(timed, "floor"))
        print(row(*found[-1], to_floor), flush=True)
    minutes = (time.perf_counter() - started) / 60
    print("", head, *[row(*each, to_floor) for each in found], f"\n{minutes:.0f} minutes", sep="\n", flush=True)


def ratios(timed, beside, clock=1):
    """Of a way's step to the one `beside` it in each round, by the processor (1) or by the clock (0)."""
    return [own[clock] / other[clock] for own, other in zip(timed["way_s"], timed[f"{beside}_s"], strict=True)]


def row(way, timed, kept, to_floor):
    """One way's row; `to_floor` holds its ratio and those of the others that were measured."""
    if "failed" in timed:
        return f"| {way} | {timed['failed']} |" + " |" * (len(COLUMNS) - 2)
    middle, rounds = statistics.median(own for own, _ in timed["way_s"]), ratios(timed, "floor")
    cells = [
        way, f"{kept['tokens'] / middle:.1f}", f"{middle:.2f}",
        f"{to_floor[way]:.3f} ({min(rounds):.3f} to {max(rounds):.3f})",
        f"{statistics.median(ratios(timed, 'floor', 0)):.3f}", f"{statistics.median(ratios(timed, 'ce-only')):.3f}",
        f"{to_floor[way] / to_floor['naive original']:.3f}" if "naive original" in to_floor else "",
        f"{kept['computed'] / kept['tokens']:.2f}", f"{kept['above_bytes'] / 1e6:.0f}",
        f"{kept['peak_bytes'] / 1e9:.2f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def growth(options, measured):
    """Print processor seconds and peak megabytes of few layers, a row for each way and size."""
    depth = {"num_hidden_layers": options.depth or 2}
    print(
        "| grows | to | way | tokens a processor second | processor seconds | peak MB above |\n|---|---|---|---|---|---|",
        flush=True,
    )
    for grows, sizes in GROWTH.items():
        for size, changes in sizes.items():
            shapes = {side: {**depth, **changes.get(side, {})} for side in ("teacher", "student")}
            world = World(**{"answer": options.answer, **changes, **shapes})
            for way in ways_of(options, GROWING):
                found = measured("memory", way, world, options.repeats)
                if "failed" in found:
                    print(f"| {grows} | {size} | {way} | {found['failed']} | | |", flush=True)
                    continue
                best = min(own for _, own in found["way_s"])
                figures = f"{found['tokens'] / best:.1f} | {best:.2f} | {found['above_bytes'] / 1e6:.0f}"
                print(f"| {grows} | {size} | {way} | {figures} |", flush=True)


def draw(found, folder):
    """Write `growth.png`: processor seconds and peak megabytes against each size, a line a way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(GROWTH), figsize=(4 * len(GROWTH), 6), squeeze=False, layout="constrained")
    for column, (grows, sizes) in enumerate(GROWTH.items()):
        for way in WAYS:
            points = [(str(size), point(found, way, changes)) for size, changes in sizes.items()]
            points = [(size, *point) for size, point in points if point]
            for line, name in enumerate(("processor seconds", "peak MB above the models")):
                if points:
                    axes[line][column].plot([p[0] for p in points], [p[1 + line] for p in points], "o-", label=way)
                axes[line][column].set(xlabel=grows, ylabel=name, yscale="log")
                axes[line][column].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
                axes[line][column].yaxis.set_minor_formatter(lambda value, _: f"{value:,.0f}")
    axes[0][0].legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "growth.png", dpi=110)


def point(found, way, changes):
    """`(seconds, megabytes)` of a way at these changes, as measured last; None where it was not."""
    for record in reversed(found):
        world = {key: value for key, value in record["world"].items() if key != "answer"}
        plain = {
            side: {k: v for k, v in world[side].items() if k != "num_hidden_layers"} for side in ("teacher", "student")
        }
        asked = {"num_windows": 8, "length": 0, "teacher": {}, "student": {}, **changes}
        few = world["student"].get("num_hidden_layers")
        if record["what"] == "memory" and record["way"] == way and few and {**world, **plain} == asked:
            return min(own for _, own in record["way_s"]), record["above_bytes"] / 1e6
    return None


if __name__ == "__main__":
    main()
