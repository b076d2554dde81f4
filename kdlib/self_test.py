"""Self-test on this machine with runs of small models: `kdlib doctor --self-test`, `python -m benchmarks.gpu_check`.

The results of the runs must agree. A failed check does not stop the others.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import kdlib
from kdlib import demo, doctor, files, machine, memory
from kdlib.clock import Clock, date, format_duration
from kdlib.config import Config
from kdlib.environment import child_environment, describe, num_processors
from kdlib.models import devices, forward, loading
from kdlib.session import cache_writer, session

LIMIT_S = {"cuda": 480.0, "cpu": 1800.0}
"""Seconds after which no further check starts. Two idle CPU cores need about three minutes for all checks."""
GPU_DEMO, CPU_DEMO = (
    {"steps": 200, "student_chars": 30_000, "chars": 700_000},
    {"steps": 25, "student_chars": 30_000, "chars": 120_000},
)
"""Sizes of the demo on a machine with and without a GPU: training steps of the teacher, characters of text."""
DEMO = {"max_length": 96, "eval_tokens": 2000, "check_teacher": False, "control": "full"}
SHORT = {
    "max_length": 64, "batch_size": 8, "max_steps": 6, "eval_steps": 6, "eval_tokens": 300, "control": "off",
    "check_teacher": False, "kd_method": "first_token", "kd_top_k": 1024, "teacher_cache": "live",
    "amp_dtype": "fp32",
}  # fmt: skip
"""Settings of the reference run, which most checks repeat with one change."""
CUT_AT, OOM_AT = 3, 5
"""The step after which a run is interrupted; the training forward pass that runs out of memory."""
EXACT, HALF, CACHED, PEAK, STEP = 1e-4, 0.05, 1e-3, 0.15, 2.0
"""Relative tolerances of losses (fp32, fp16 or bf16, teacher cache in fp16) and of the predicted peak; and the maximum
ratio of a step's time to its matrix products alone ("floor").
"""
WEIGHTS = {"cuda": 1e-2, "cpu": 0.0}
"""Relative tolerance of a resumed run's weights. GPUs may sum in another order; CPUs must agree exactly."""
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3)
"""Limits of GPU memory, as fractions of the memory reserved by the reference run."""
MIN_S, MAX_S = 30.0, {"cuda": 240.0, "cpu": 900.0}
"""Minimum and maximum timeout of a subprocess."""
STEP_GFLOP = 1515
"""Floating-point operations of one step of FULL_SIZE (transformers, student head, projector), counted by hand."""
FULL_SIZE = {"num_windows": 2, "length": 384, "answer": 1.0, "teacher": {}, "student": {}}
REDUCED = {
    "num_windows": 2, "length": 64, "answer": 1.0, "teacher": {"num_hidden_layers": 2, "vocab_size": 8192},
    "student": {"num_hidden_layers": 2, "vocab_size": 4096},
}  # fmt: skip
PRODUCT = {"cuda": (768, 576, 49_152), "cpu": (256, 576, 4096)}


class Failed(Exception):
    """Raised if a check fails; the message gives the reason."""


class Skipped(Exception):
    """Raised if a check cannot run on this machine; the message gives the reason."""


class Bench:
    """Shared state of the checks: folder, device, demo models and the reference run."""

    def __init__(self, folder, cuda, clock):
        self.folder, self.cuda, self.clock, self.left_s = folder, cuda, clock, math.inf
        self.device = "cuda" if cuda else "cpu"

    def config(self, **changes):
        """Returns the `Config` of SHORT with changes. Requires that the demo check has built the models."""
        if not demo.is_ready(self.folder / "cache"):
            raise Skipped("the demo models are missing because the demo check failed")
        return demo.config(self.folder / "cache", **{**SHORT, **changes})

    def distil(self, name, **changes):
        """Runs SHORT with changes in the folder `name` and returns the records."""
        return list(session.distill(self.config(**changes), self.folder / name, self.clock))

    @functools.cached_property
    def reference(self):
        """Records of the reference run."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        records = self.distil("reference")
        self.reserved = torch.cuda.max_memory_reserved() if self.cuda else 0
        return records

    def compare_losses(self, records, tolerance):
        """Returns the largest relative difference from the reference losses. Raises Failed above `tolerance`."""
        values, expected = losses(records), losses(self.reference)
        if len(values) != len(expected) or not all(map(math.isfinite, values)):
            raise Failed(f"losses {_format(values)}, expected {_format(expected)}")
        error = max(abs(a - b) / abs(b) for a, b in zip(values, expected, strict=True))
        if error > tolerance:
            raise Failed(
                f"losses {_format(values)} differ by {error:.2g} from {_format(expected)}, more than {tolerance:g}"
            )
        return error

    def process(self, *arguments):
        """Runs a module of the checkout in a process and returns its last output line, parsed as JSON."""
        if not (checkout() / "benchmarks" / "peak.py").exists():
            raise Skipped("benchmarks require a checkout of kdlib")
        one_thread = {} if self.cuda else {"OMP_NUM_THREADS": "1"}  # small models are slower with more threads
        out = self._run([sys.executable, "-W", "ignore", "-m", *arguments], checkout(), child_environment(**one_thread))
        return json.loads(out.splitlines()[-1])

    def notebook(self, name, parameters):
        """Runs a notebook with papermill and an empty cache, and returns its working folder."""
        path = checkout() / "notebooks" / f"{name}.ipynb"
        missing = [package for package in ("papermill", "ipykernel") if not importlib.util.find_spec(package)]
        if missing or not path.exists():
            raise Skipped(f"requires {' and '.join(missing) or 'a checkout of kdlib'}")
        folder = self.folder / name
        folder.mkdir()
        variables = {"KDLIB_CACHE": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}
        arguments = [str(path), "out.ipynb", "--no-progress-bar", "-y", json.dumps(parameters)]
        self._run([sys.executable, "-m", "papermill", *arguments], folder, child_environment(**variables))
        return folder

    def _run(self, command, folder, environment):
        limit = max(MIN_S, min(self.left_s, MAX_S[self.device]))
        try:
            result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"timed out after {limit:.0f} s") from None
        if result.returncode:
            raise Failed(f"exit status {result.returncode}: {(result.stderr.strip().splitlines() or [''])[-1][:300]}")
        return result.stdout


def checkout():
    """Returns the parent folder of `kdlib`; in a checkout it also contains benchmarks and notebooks."""
    return Path(kdlib.__file__).resolve().parent.parent


def losses(records):
    """Returns the losses of all training records."""
    return [record["loss"] for record in records if record["kind"] == "train"]


def _format(values):
    return " ".join(f"{value:.4f}" for value in values)


def check_machine(bench):
    errors = [finding for finding in doctor.diagnose(Config()) if finding.state == "error"]
    if errors:
        raise Failed("; ".join(f"{finding.name}: {finding.value}" for finding in errors))
    gpus = [dataclasses.asdict(gpu) for gpu in machine.list_gpus()]
    names = [
        f"{g['name']} sm_{g['capability'][0]}{g['capability'][1]} bf16 {'yes' if g['bf16'] else 'no'}" for g in gpus
    ]
    versions = {name: version for name, version in describe()["versions"].items() if version}
    devices_text = ", ".join(names) or f"no GPU, {num_processors()} CPUs"
    return f"{devices_text}; {', '.join(f'{name} {version}' for name, version in versions.items())}", {
        "cards": gpus, "versions": versions, "processors": num_processors(),
    }  # fmt: skip


def check_demo(bench):
    plan, started = GPU_DEMO if bench.cuda else CPU_DEMO, bench.clock.now()
    for _progress in demo.prepare(bench.folder / "cache", bench.clock, **plan):
        pass
    prepared_s = bench.clock.now() - started
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    steps = {"max_steps": 120, "eval_steps": 20} if bench.cuda else {"max_steps": 12, "eval_steps": 6}
    config = demo.config(bench.folder / "cache", **DEMO, **steps)
    *records, verdict = session.distill(config, bench.folder / "demo", bench.clock)
    bits = verdict.get("bits_per_byte", {})
    if verdict["kind"] != "verdict" or not all(map(math.isfinite, bits.values())):
        raise Failed(f"the run ended with {verdict['kind']}, bits per byte {bits}")
    used = torch.cuda.max_memory_allocated() if bench.cuda else 0
    if bench.cuda and not used:
        raise Failed("the run did not use the GPU")
    times = [record["step_s"] for record in records if record["kind"] == "train" and "step_s" in record]
    numbers = {"bits_per_byte": bits, "gain": verdict["gain"], "prepared_s": prepared_s, "allocated_bytes": used}
    return (
        f"{len(losses(records))} steps to the verdict; {bits['distilled']:.3f} bits per byte, "
        f"control {bits['ce_only']:.3f}; preparation {prepared_s:.0f} s", {**numbers, "step_s": times},
    )  # fmt: skip


def check_notebook(bench):
    reduced = {
        "small": {**DEMO, "max_steps": 12, "eval_steps": 6, "share_steps": 6}, "teacher_steps": CPU_DEMO["steps"],
        "text_chars": CPU_DEMO["chars"],
    }  # fmt: skip
    folder = bench.notebook("distill", {} if bench.cuda else reduced)
    status = files.read_json(folder / "run" / "status.json")
    if status["state"] != "complete":
        raise Failed(f"the run is {status['state']}: {status['reason']}")
    return f"complete, {status['step']} steps", {"step": status["step"], "session_s": status["session_s"]}


def check_fp16(bench):
    if not bench.cuda:
        raise Skipped("a loss scaler requires a CUDA GPU")
    return _check_half_precision(bench, "fp16")


def check_bf16(bench):
    if bench.cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Skipped("the GPU has no native bf16")
    return _check_half_precision(bench, "bf16")


def _check_half_precision(bench, amp_dtype):
    records = bench.distil(amp_dtype, amp_dtype=amp_dtype)
    error = bench.compare_losses(records, HALF)
    skipped = sum(bool(record["skipped"]) for record in records if record["kind"] == "train")
    return f"losses within {error:.2g} of fp32 (allowed {HALF:g}), {skipped} steps skipped", {
        "apart": error, "skipped": skipped, "losses": losses(records),
    }  # fmt: skip


def check_cache(bench):
    config = bench.config()
    for _record in cache_writer.cache_teacher(config, bench.folder / "teacher-cache", bench.clock):
        pass
    error = bench.compare_losses(bench.distil("cached", teacher_cache=str(bench.folder / "teacher-cache")), CACHED)
    return f"losses within {error:.2g} of the live teacher's (allowed {CACHED:g})", {"apart": error}


def check_teacher_device(bench):
    if not bench.cuda:
        raise Skipped("requires a CUDA GPU")
    device = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    error = bench.compare_losses(bench.distil("elsewhere", teacher_device=device), EXACT)
    return f"teacher on {device}: losses within {error:.2g} (allowed {EXACT:g})", {"apart": error, "device": device}


def check_out_of_memory(bench):
    expected, original, count = bench.reference, forward.read, itertools.count(1)

    def read(model, *args, **kwargs):
        if model.training and next(count) == OOM_AT:
            raise torch.OutOfMemoryError("injected by the self-test")
        return original(model, *args, **kwargs)

    forward.read = read
    try:
        records = bench.distil("out-of-memory")
    finally:
        forward.read = original
    error = bench.compare_losses(records, EXACT)
    before, after = (_micro_batch(run) for run in (expected, records))
    if after >= before:
        raise Failed(f"the micro-batch stayed at {after}: the error was not handled")
    return f"micro-batch {before} to {after}, losses within {error:.2g} (allowed {EXACT:g})", {"apart": error}


def check_real_out_of_memory(bench):
    """Limits GPU memory below that of the reference run until it runs out."""
    if not bench.cuda:
        raise Skipped("requires a CUDA GPU")
    expected, total = bench.reference, torch.cuda.get_device_properties(0).total_memory
    for share in SHARES:
        memory.release_memory()
        before = _num_ooms()
        torch.cuda.set_per_process_memory_fraction(share * bench.reserved / total)
        try:
            records = bench.distil(f"capped-{share}")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        if num_ooms := _num_ooms() - before:
            error = bench.compare_losses(records, EXACT)
            first, last = (_micro_batch(run) for run in (expected, records))
            return (
                f"limited to {share:.0%} of {bench.reserved / 2**20:.0f} MiB, ran out {num_ooms} times, micro-batch "
                f"{first} to {last}, losses within {error:.2g} (allowed {EXACT:g})",
                {"apart": error, "share": share, "met": num_ooms},
            )  # fmt: skip
    raise Failed(f"memory did not run out at {share:.0%} of the {bench.reserved / 2**20:.0f} MiB that were reserved")


def _num_ooms():
    """Returns how often torch's allocator has raised OutOfMemoryError."""
    return torch.cuda.memory_stats().get("num_ooms", 0)


def _micro_batch(records):
    return [record["micro_batch"] for record in records if record["kind"] == "train"][-1]


def check_cut_and_resume(bench):
    bench.reference  # noqa: B018 - runs it if needed
    run = session.distill(bench.config(), bench.folder / "cut", bench.clock)
    for record in run:
        if record["kind"] == "train" and record["step"] == CUT_AT:
            break
    run.close()
    first, *_ = bench.distil("cut")
    if not first.get("resumed"):
        raise Failed("the second session started at step 0")
    resumed, expected = (
        loading.load_model(str(bench.folder / name / "student"), "student").state_dict()
        for name in ("cut", "reference")
    )
    error = max(float((resumed[name] - expected[name]).norm() / expected[name].norm()) for name in expected)
    allowed = WEIGHTS[bench.device]
    if not error <= allowed:
        raise Failed(f"weights differ by {error:.2g} from those of the uninterrupted run, more than {allowed:g}")
    return f"weights within {error:.2g} (allowed {allowed:g})", {"apart": error}


def check_peak(bench):
    shape = {} if bench.cuda else {"length": 64, "width": 256, "layers": 4}
    arguments = ["--steps", "2", "--shape", json.dumps(shape), *(["--cuda"] if bench.cuda else [])]
    result = bench.process("benchmarks.peak", *arguments)
    predicted, used, reserved = result["predicted"], result["peak"], result.get("reserved", result["peak"])
    mib = [f"{size / 2**20:.0f} MiB" for size in (predicted, used, reserved)]
    text = f"predicted {mib[0]}, used {mib[1]}{f', reserved {mib[2]}' if bench.cuda else ''}: {predicted / used:.3f}"
    if not (1 - PEAK) * used <= predicted <= (1 + PEAK) * reserved:
        raise Failed(f"{text}, off by more than {PEAK:.0%}")
    return f"{text} (allowed 1 +- {PEAK:g})", {**result, "ratio": predicted / used}


def check_product(bench):
    """Times a matrix product with the shape of the student's head (smaller on a CPU)."""
    accelerator = devices.accelerator("auto")
    dtype, (rows, width, columns) = devices.teacher_dtype(accelerator, accelerator.device), PRODUCT[bench.device]
    left, right = (
        torch.ones(shape, device=accelerator.device, dtype=dtype) for shape in ((rows, width), (width, columns))
    )
    repeats, total = 20, 0.0
    for repeat in range(repeats + 3):
        if repeat == 3:
            total = float((left @ right)[0, 0])  # synchronizes with the device
            started = bench.clock.now()
        product = left @ right
    total += float(product[0, 0])
    seconds = (bench.clock.now() - started) / repeats
    if total != 2.0 * width:
        raise Failed(f"a sum of {width} ones returned {total / 2:g}")
    tflops = 2 * rows * width * columns / max(seconds, 1e-9) / 1e12
    return f"{tflops:.2f} TFLOP/s in {str(dtype).removeprefix('torch.')}, {rows} x {width} x {columns}", {
        "tflops": tflops, "seconds": seconds,
    }  # fmt: skip


def check_step(bench):
    shapes = FULL_SIZE if bench.cuda else REDUCED
    options = {"what": "time", "way": "ours live, projector", "world": shapes, "repeats": 3}
    result = bench.process("benchmarks.step", "--one", json.dumps(options))
    clock = 0 if bench.cuda else 1  # on a CPU, process time: other programs disturb it less
    step_s, floor_s = (min(seconds[clock] for seconds in result[name]) for name in ("way_s", "floor_s"))
    text = f"{step_s:.3f} s, floor {floor_s:.3f} s: {step_s / floor_s:.2f} (allowed {STEP:g})"
    tflops = STEP_GFLOP / step_s / 1e3 if bench.cuda else None
    text += f", {tflops:.2f} TFLOP/s" if tflops else ", reduced shapes"
    if not step_s <= STEP * floor_s:
        raise Failed(text)
    return text, {**result, "tflops": tflops}


CHECKS = {
    "machine": check_machine,
    "demo to its verdict": check_demo,
    "fp16 with a loss scaler": check_fp16,
    "bf16": check_bf16,
    "live = cached loss": check_cache,
    "teacher on another device": check_teacher_device,
    "out of memory, injected": check_out_of_memory,
    "out of memory, real": check_real_out_of_memory,
    "cut and resume": check_cut_and_resume,
    "predicted peak": check_peak,
    "product of true shape": check_product,
    "step to floor": check_step,
    "distill notebook": check_notebook,
}


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
    files.write_json(path, {"env": describe(), "results": values})
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
