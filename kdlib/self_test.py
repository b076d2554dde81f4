"""Checks kdlib on this machine with real runs of small models: `kdlib doctor --self-test`, `python -m benchmarks.gpu_check`.

Every check does what a run does, and compares what must agree. A check that fails does not stop the others.
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
"""No check begins later than this. Two processor cores need three minutes, if nothing else runs on them."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of one check. `state`: `ok`, `failed` or `skipped`; `text` is for people, `numbers` for programs."""

    name: str
    state: str
    text: str
    seconds: float
    numbers: dict


def run(folder, clock=None):
    """Make all CHECKS in `folder`: a generator of `(name, None)` before each and `(name, Result)` after it."""
    clock, threads = clock or Clock(), torch.get_num_threads()
    bench, started = Bench(Path(folder), torch.cuda.is_available(), clock), clock.now()
    torch.set_num_threads(threads if bench.cuda else 1)  # as `kdlib demo`
    try:
        for name, check in CHECKS.items():
            yield name, None
            begun = clock.now()
            bench.left_s = LIMIT_S[bench.device] - (begun - started)
            state, text, numbers = _outcome(check, bench)
            yield name, Result(name, state, text, round(clock.now() - begun, 2), numbers)
    finally:
        torch.set_num_threads(threads)


def _outcome(check, bench):
    """`(state, text, numbers)` of a check."""
    try:
        if bench.left_s <= 0.0:
            raise Skipped(f"{LIMIT_S[bench.device]:.0f} s are over")
        text, numbers = check(bench)
        return "ok", text, numbers
    except Skipped as why:
        return "skipped", str(why), {}
    except Failed as why:
        return "failed", str(why), {}
    except Exception as error:  # noqa: BLE001 - whatever it is, the next check is to be made
        error.__traceback__ = None  # it holds models
        reason = str(error).strip().splitlines()[:1] or ["no reason was given"]
        return "failed", f"{type(error).__name__}: {reason[0][:300]}", {}
    finally:
        memory.release_memory()


def page(results):
    """One page of text for a report."""
    lines = [f"kdlib {kdlib.__version__} self-test, {date()}"]
    for result in results:
        lines += [f"{result.state:8}{result.name:28}{result.seconds:7.1f} s  {result.text}"]
    counts = {state: sum(result.state == state for result in results) for state in ("ok", "failed", "skipped")}
    seconds = sum(result.seconds for result in results)
    lines += [", ".join(f"{count} {state}" for state, count in counts.items()) + f" in {format_duration(seconds)}"]
    return "\n".join(lines)


def write(results, folder):
    """Write `self_test.json` and `self_test.txt` into a folder; the path of the first."""
    path = Path(folder) / "self_test.json"
    files.write_json(
        path, {"env": environment.describe(), "results": [dataclasses.asdict(result) for result in results]}
    )
    files.write_text(path.with_suffix(".txt"), page(results) + "\n")
    return path


def lines(out, results):
    """Run the self-test in `out`, a new or empty folder (None: a temporary one): a generator of lines of progress and, at
    the end, of the page and the path of the JSON file. Each `Result` is appended to `results`.
    """
    folder = Path(out or tempfile.mkdtemp(prefix="kdlib-self-test-"))
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--out {folder} holds files; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name, result in run(folder):
        if result is None:
            yield f"{name} ..."
        else:
            yield f"  {result.state}, {result.seconds:.1f} s: {result.text}"
            results.append(result)
    yield f"\n{page(results)}\n\nJSON: {write(results, folder)}"
