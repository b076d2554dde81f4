"""Self-test on this machine with runs of small models: `kdlib doctor --self-test`, `python -m benchmarks.gpu_check`.

A failed check does not stop the others.
"""

import dataclasses
import tempfile
from pathlib import Path

import torch

import kdlib
from kdlib import environment, files, memory
from kdlib.clock import Clock, date, format_duration
from kdlib.self_checks import CHECKS, Bench, Failed, Skipped

LIMIT_S = {"cuda": 480.0, "cpu": 1800.0}
"""Seconds after which no further check starts. Two idle CPU cores need about three minutes for all checks."""


@dataclasses.dataclass(frozen=True)
class Result:
    """Result of one check. `state`: `ok`, `failed` or `skipped`. `text` is for people, `numbers` for programs."""

    name: str
    state: str
    text: str
    seconds: float
    numbers: dict


def run(folder, clock=None):
    """Runs all CHECKS in `folder`. Yields `(name, None)` before and `(name, Result)` after each."""
    clock, threads = clock or Clock(), torch.get_num_threads()
    bench, started = Bench(Path(folder), torch.cuda.is_available(), clock), clock.now()
    torch.set_num_threads(threads if bench.cuda else 1)  # as in `kdlib demo`
    try:
        for name, check in CHECKS.items():
            yield name, None
            check_started = clock.now()
            bench.left_s = LIMIT_S[bench.device] - (check_started - started)
            state, text, numbers = _outcome(check, bench)
            yield name, Result(name, state, text, round(clock.now() - check_started, 2), numbers)
    finally:
        torch.set_num_threads(threads)


def _outcome(check, bench):
    try:
        if bench.left_s <= 0.0:
            raise Skipped(f"the limit of {LIMIT_S[bench.device]:.0f} s is reached")
        text, numbers = check(bench)
        return "ok", text, numbers
    except Skipped as reason:
        return "skipped", str(reason), {}
    except Failed as reason:
        return "failed", str(reason), {}
    except Exception as error:  # noqa: BLE001 - the next check must run
        error.__traceback__ = None  # it references models
        reason = str(error).strip().splitlines()[:1] or ["no message"]
        return "failed", f"{type(error).__name__}: {reason[0][:300]}", {}
    finally:
        memory.release_memory()


def summary(results):
    """Formats all results as a text table."""
    lines = [f"kdlib {kdlib.__version__} self-test, {date()}"]
    for result in results:
        lines += [f"{result.state:8}{result.name:28}{result.seconds:7.1f} s  {result.text}"]
    counts = {state: sum(result.state == state for result in results) for state in ("ok", "failed", "skipped")}
    seconds = sum(result.seconds for result in results)
    lines += [", ".join(f"{count} {state}" for state, count in counts.items()) + f" in {format_duration(seconds)}"]
    return "\n".join(lines)


def write(results, folder):
    """Writes `self_test.json` and `self_test.txt` to a folder and returns the path of the first."""
    path = Path(folder) / "self_test.json"
    values = [dataclasses.asdict(result) for result in results]
    files.write_json(path, {"env": environment.describe(), "results": values})
    files.write_text(path.with_suffix(".txt"), summary(results) + "\n")
    return path


def lines(out, results):
    """Runs the self-test in `out`, a new or empty folder (None: a temporary one), and appends to `results`.

    Yields lines of progress, then the summary and the path of the JSON file.
    """
    folder = Path(out or tempfile.mkdtemp(prefix="kdlib-self-test-"))
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in run(folder):
        if result is None:
            yield f"{name} ..."
        else:
            yield f"  {result.state}, {result.seconds:.1f} s: {result.text}"
            results.append(result)
    yield f"\n{summary(results)}\n\nJSON: {write(results, folder)}"
