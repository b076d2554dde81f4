"""What the self-test checks: real runs of small models, and what must agree between them."""

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import torch

import kdlib
from kdlib import demo, doctor, files, machine, memory
from kdlib.config import Config
from kdlib.environment import describe, num_processors, of_a_process
from kdlib.models import devices, loading
from kdlib.session import cache_writer, session

CARD, PROCESSOR = (
    {"steps": 200, "student_chars": 30_000, "chars": 700_000},
    {"steps": 25, "student_chars": 30_000, "chars": 120_000},
)
"""The embedded default on a machine with a card and on one without: steps of its teacher, characters of text."""
DEMO = {"max_length": 96, "eval_tokens": 2000, "check_teacher": False, "control": "full"}
SHORT = {
    "max_length": 64, "batch_size": 8, "max_steps": 6, "eval_steps": 6, "eval_tokens": 300, "control": "off",
    "check_teacher": False, "kd_method": "shared_prefix", "kd_top_k": 1024, "teacher_cache": "live", "amp_dtype": "fp32",
}  # fmt: skip
"""The run that most checks repeat with one change. A teacher cache holds all tokens that both vocabularies have."""
CUT_AT, RUNS_OUT_AT = 3, 5
"""The step behind which a run is cut off; the forward pass in training that runs out of memory."""
EXACT, HALF, CACHED, PEAK, STEP = 1e-4, 0.05, 1e-3, 0.15, 2.0
"""Tolerances: of losses in fp32, of losses in fp16 and bf16, of losses from a teacher cache (it keeps fp16), of the
predicted peak, all relative; and of a live step to the floor, as a ratio.
"""
WEIGHTS = {"cuda": 1e-2, "cpu": 0.0}
"""Tolerance of a resumed run's weights, of each tensor's norm: a card may add in another order, a processor may not."""
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3)
"""Caps on a card's memory, as shares of what the reference reserved."""
MIN_S, MAX_S = 30.0, {"cuda": 240.0, "cpu": 900.0}
"""A process of a check may take what is left of the time, within these limits."""
STEP_GFLOP = 1515
"""A whole step of TRUE: both bodies, the student's head and the projector's; counted, not measured."""
TRUE = {"num_windows": 2, "length": 384, "answer": 1.0, "teacher": {}, "student": {}}
REDUCED = {
    "num_windows": 2, "length": 64, "answer": 1.0, "teacher": {"num_hidden_layers": 2, "vocab_size": 8192},
    "student": {"num_hidden_layers": 2, "vocab_size": 4096},
}  # fmt: skip
PRODUCT = {"cuda": (768, 576, 49_152), "cpu": (256, 576, 4096)}


class Failed(Exception):
    """The check found what must not be; the text says what."""


class Skipped(Exception):
    """The check cannot be made here; the text says why."""


class Bench:
    """What checks share: a folder, the device, the embedded default and the run that others are compared with."""

    def __init__(self, folder, cuda, clock):
        self.folder, self.cuda, self.clock, self.left_s = folder, cuda, clock, math.inf
        self.device = "cuda" if cuda else "cpu"

    def config(self, **changes):
        """The `Config` of SHORT with changes. The embedded default is made by the check of the demo."""
        if not demo.is_ready(self.folder / "cache"):
            raise Skipped("the embedded default is missing: the demo failed")
        return demo.config(self.folder / "cache", **{**SHORT, **changes})

    def distil(self, name, **changes):
        """Records of a run of SHORT with changes, in a folder of its own."""
        return list(session.distill(self.config(**changes), self.folder / name, self.clock))

    @functools.cached_property
    def reference(self):
        """Records of the run of SHORT."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        found = self.distil("reference")
        self.reserved = torch.cuda.max_memory_reserved() if self.cuda else 0
        return found

    def compared(self, found, tolerance):
        """The largest relative difference of losses from the reference's; Failed over the tolerance."""
        ours, theirs = losses(found), losses(self.reference)
        if len(ours) != len(theirs) or not all(map(math.isfinite, ours)):
            raise Failed(f"losses {_listed(ours)}, expected {_listed(theirs)}")
        apart = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
        if apart > tolerance:
            raise Failed(f"losses {_listed(ours)} are {apart:.2g} from {_listed(theirs)}, more than {tolerance:g}")
        return apart

    def process(self, *words):
        """The last line of what a module of the checkout prints, as JSON. It runs in a process of its own."""
        if not (checkout() / "benchmarks" / "peak.py").exists():
            raise Skipped("benchmarks are in a checkout of kdlib only")
        one_thread = {} if self.cuda else {"OMP_NUM_THREADS": "1"}  # as benchmarks are run: more would wait busily
        out = self._run([sys.executable, "-W", "ignore", "-m", *words], checkout(), of_a_process(**one_thread))
        return json.loads(out.splitlines()[-1])

    def notebook(self, name, parameters):
        """Run a notebook by papermill from an empty cache; the folder that it ran in."""
        path = checkout() / "notebooks" / f"{name}.ipynb"
        missing = [package for package in ("papermill", "ipykernel") if not importlib.util.find_spec(package)]
        if missing or not path.exists():
            raise Skipped(f"{' and '.join(missing) or 'a checkout of kdlib'} is not here")
        room = self.folder / name
        room.mkdir()
        values = {"KDLIB_CACHE": str(room / "cache"), "PYTHONWARNINGS": "ignore"}
        words = [str(path), "out.ipynb", "--no-progress-bar", "-y", json.dumps(parameters)]
        self._run([sys.executable, "-m", "papermill", *words], room, of_a_process(**values))
        return room

    def _run(self, command, room, environment):
        limit = max(MIN_S, min(self.left_s, MAX_S[self.device]))
        try:
            ran = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {limit:.0f} s") from None
        if ran.returncode:
            raise Failed(f"exit status {ran.returncode}: {(ran.stderr.strip().splitlines() or [''])[-1][:300]}")
        return ran.stdout


def checkout():
    """The folder that holds `kdlib`: with benchmarks and notebooks, where it is a checkout."""
    return Path(kdlib.__file__).resolve().parent.parent


def losses(found):
    """The losses of a run's optimizer steps."""
    return [record["loss"] for record in found if record["kind"] == "train"]


def _listed(values):
    return " ".join(f"{value:.4f}" for value in values)


def check_machine(bench):
    findings = doctor.diagnose(Config())
    wrong = [finding for finding in findings if finding.state == "wrong"]
    if wrong:
        raise Failed("; ".join(f"{finding.name}: {finding.value}" for finding in wrong))
    cards = [dataclasses.asdict(card) for card in machine.cards()]
    told = [
        f"{c['name']} sm_{c['capability'][0]}{c['capability'][1]} bf16 {'yes' if c['bf16'] else 'no'}" for c in cards
    ]
    versions = {name: version for name, version in describe()["versions"].items() if version}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    where = ", ".join(told) or f"no card, {num_processors()} processors"
    return f"{where}; {named}", {"cards": cards, "versions": versions, "processors": num_processors()}


def check_demo(bench):
    plan, started = CARD if bench.cuda else PROCESSOR, bench.clock.now()
    for _progress in demo.prepare(bench.folder / "cache", bench.clock, **plan):
        pass
    prepared_s = bench.clock.now() - started
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
    steps = {"max_steps": 120, "eval_steps": 20} if bench.cuda else {"max_steps": 12, "eval_steps": 6}
    config = demo.config(bench.folder / "cache", **DEMO, **steps)
    *found, verdict = session.distill(config, bench.folder / "demo", bench.clock)
    bits = verdict.get("bits_per_byte", {})
    if verdict["kind"] != "verdict" or not all(map(math.isfinite, bits.values())):
        raise Failed(f"the run ended with {verdict['kind']}, bits per byte {bits}")
    used = torch.cuda.max_memory_allocated() if bench.cuda else 0
    if bench.cuda and not used:
        raise Failed("the run did not use the card")
    times = [record["step_s"] for record in found if record["kind"] == "train" and "step_s" in record]
    numbers = {"bits_per_byte": bits, "gain": verdict["gain"], "prepared_s": prepared_s, "allocated_bytes": used}
    return (
        f"{len(losses(found))} steps to the verdict; {bits['distilled']:.3f} bits per byte, control {bits['ce_only']:.3f}; "
        f"preparation {prepared_s:.0f} s", {**numbers, "step_s": times},
    )  # fmt: skip


def check_notebook(bench):
    reduced = {
        "small": {**DEMO, "max_steps": 12, "eval_steps": 6, "share_steps": 6}, "teacher_steps": PROCESSOR["steps"],
        "text_chars": PROCESSOR["chars"],
    }  # fmt: skip
    room = bench.notebook("distill", {} if bench.cuda else reduced)
    status = files.read_json(room / "run" / "status.json")
    if status["state"] != "complete":
        raise Failed(f"the run is {status['state']}: {status['reason']}")
    return f"complete, {status['step']} steps", {"step": status["step"], "session_s": status["session_s"]}


def check_fp16(bench):
    if not bench.cuda:
        raise Skipped("a loss scaler needs a CUDA card")
    return _half(bench, "fp16")


def check_bf16(bench):
    if bench.cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise Skipped("the card has no bf16 units")
    return _half(bench, "bf16")


def _half(bench, amp_dtype):
    found = bench.distil(amp_dtype, amp_dtype=amp_dtype)
    apart = bench.compared(found, HALF)
    skipped = sum(bool(record["skipped"]) for record in found if record["kind"] == "train")
    return f"losses within {apart:.2g} of fp32 (allowed {HALF:g}), {skipped} steps skipped", {
        "apart": apart, "skipped": skipped, "losses": losses(found),
    }  # fmt: skip


def check_cache(bench):
    config = bench.config()
    for _record in cache_writer.write(config, bench.folder / "teacher-cache", bench.clock):
        pass
    found = bench.distil("cached", teacher_cache=str(bench.folder / "teacher-cache"))
    apart = bench.compared(found, CACHED)
    return f"losses within {apart:.2g} of the live teacher's (allowed {CACHED:g})", {"apart": apart}


def check_teacher_elsewhere(bench):
    if not bench.cuda:
        raise Skipped("needs a CUDA card")
    there = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    apart = bench.compared(bench.distil("elsewhere", teacher_device=there), EXACT)
    return f"teacher on {there}: losses within {apart:.2g} (allowed {EXACT:g})", {"apart": apart, "device": there}


def check_out_of_memory(bench):
    wanted, real, count = bench.reference, loading.read, itertools.count(1)

    def read(model, *given, **options):
        if model.training and next(count) == RUNS_OUT_AT:
            raise torch.OutOfMemoryError("injected by the self-test")
        return real(model, *given, **options)

    loading.read = read
    try:
        found = bench.distil("out-of-memory")
    finally:
        loading.read = real
    apart = bench.compared(found, EXACT)
    before, after = (_micro_batch(run) for run in (wanted, found))
    if after >= before:
        raise Failed(f"the micro-batch stayed at {after}: no lack of memory was seen")
    return f"micro-batch {before} to {after}, losses within {apart:.2g} (allowed {EXACT:g})", {"apart": apart}


def check_real_out_of_memory(bench):
    """The card's memory is capped below what the reference reserved, lower until it runs out."""
    if not bench.cuda:
        raise Skipped("needs a CUDA card")
    wanted, total = bench.reference, torch.cuda.get_device_properties(0).total_memory
    for share in SHARES:
        memory.release_memory()
        before = _num_ooms()
        torch.cuda.set_per_process_memory_fraction(share * bench.reserved / total)
        try:
            found = bench.distil(f"capped-{share}")
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        if met := _num_ooms() - before:
            apart = bench.compared(found, EXACT)
            first, last = (_micro_batch(run) for run in (wanted, found))
            return (
                f"capped at {share:.0%} of {bench.reserved / 2**20:.0f} MiB, ran out {met} times, micro-batch {first} to "
                f"{last}, losses within {apart:.2g} (allowed {EXACT:g})", {"apart": apart, "share": share, "met": met},
            )  # fmt: skip
    raise Failed(f"memory did not run out at {share:.0%} of the {bench.reserved / 2**20:.0f} MiB that were reserved")


def _num_ooms():
    """How often torch's allocator has raised OutOfMemoryError."""
    return torch.cuda.memory_stats().get("num_ooms", 0)


def _micro_batch(found):
    return [record["micro_batch"] for record in found if record["kind"] == "train"][-1]


def check_cut_and_resume(bench):
    whole = bench.folder / "reference" / "student"
    bench.reference  # noqa: B018 - made where it was not
    running = session.distill(bench.config(), bench.folder / "cut", bench.clock)
    for record in running:
        if record["kind"] == "train" and record["step"] == CUT_AT:
            break
    running.close()
    first, *_ = bench.distil("cut")
    if not first.get("resumed"):
        raise Failed("the second session began at step 0")
    ours, theirs = (
        loading.load_model(str(p), "student").state_dict() for p in (bench.folder / "cut" / "student", whole)
    )
    apart = max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)
    allowed = WEIGHTS[bench.device]
    if not apart <= allowed:
        raise Failed(f"weights are {apart:.2g} from those of the run that was not cut off, more than {allowed:g}")
    return f"weights within {apart:.2g} (allowed {allowed:g})", {"apart": apart}


def check_peak(bench):
    shape = {} if bench.cuda else {"length": 64, "width": 256, "layers": 4}
    words = ["--steps", "2", "--shape", json.dumps(shape), *(["--cuda"] if bench.cuda else [])]
    found = bench.process("benchmarks.peak", *words)
    told, taken, held = found["told"], found["taken"], found.get("reserved", found["taken"])
    mib = [f"{size / 2**20:.0f} MiB" for size in (told, taken, held)]
    text = f"predicted {mib[0]}, taken {mib[1]}{f', reserved {mib[2]}' if bench.cuda else ''}: {told / taken:.3f}"
    if not (1 - PEAK) * taken <= told <= (1 + PEAK) * held:
        raise Failed(f"{text}, off by more than {PEAK:.0%}")
    return f"{text} (allowed 1 +- {PEAK:g})", {**found, "ratio": told / taken}


def check_product(bench):
    """A matrix product of the shape of the student's head: true on a card, smaller on a processor."""
    made = devices.accelerator("auto")
    dtype, (rows, width, columns) = devices.teacher_dtype(made, made.device), PRODUCT[bench.device]
    left, right = (torch.ones(shape, device=made.device, dtype=dtype) for shape in ((rows, width), (width, columns)))
    repeats, total = 20, 0.0
    for repeat in range(repeats + 3):
        if repeat == 3:
            total = float((left @ right)[0, 0])  # waits for the device
            started = bench.clock.now()
        product = left @ right
    total += float(product[0, 0])
    seconds = (bench.clock.now() - started) / repeats
    if total != 2.0 * width:
        raise Failed(f"a sum of {width} ones is {total / 2:g}")
    tflops = 2 * rows * width * columns / max(seconds, 1e-9) / 1e12
    return f"{tflops:.2f} TFLOP/s in {str(dtype).removeprefix('torch.')}, {rows} x {width} x {columns}", {
        "tflops": tflops, "seconds": seconds,
    }  # fmt: skip


def check_step(bench):
    world = TRUE if bench.cuda else REDUCED
    asked = {"what": "time", "way": "ours live, projector", "world": world, "repeats": 3}
    found = bench.process("benchmarks.step", "--one", json.dumps(asked))
    clock = 0 if bench.cuda else 1  # a processor's own seconds: other programs disturb them less
    step_s, floor_s = (min(seconds[clock] for seconds in found[name]) for name in ("way_s", "floor_s"))
    text = f"{step_s:.3f} s, floor {floor_s:.3f} s: {step_s / floor_s:.2f} (allowed {STEP:g})"
    tflops = STEP_GFLOP / step_s / 1e3 if bench.cuda else None
    text += f", {tflops:.2f} TFLOP/s" if tflops else ", reduced shapes"
    if not step_s <= STEP * floor_s:
        raise Failed(text)
    return text, {**found, "tflops": tflops}


CHECKS = {
    "machine": check_machine,
    "demo to its verdict": check_demo,
    "fp16 with a loss scaler": check_fp16,
    "bf16": check_bf16,
    "live = cached loss": check_cache,
    "teacher on another device": check_teacher_elsewhere,
    "out of memory, injected": check_out_of_memory,
    "out of memory, real": check_real_out_of_memory,
    "cut and resume": check_cut_and_resume,
    "predicted peak": check_peak,
    "product of true shape": check_product,
    "step to floor": check_step,
    "distill notebook": check_notebook,
}
