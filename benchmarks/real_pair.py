"""Does the default help a real pair? kdlib's default beside plain training, at equal steps, over learning rates and seeds.

    python -m benchmarks.real_pair TEACHER STUDENT DATASET --out FILE.jsonl [--methods none byte_prefix] [--rates ...]
        [--seeds ...] [--steps N]

Loads the pair once and scores every student after its last step on validation and test text. Every finished run is a line
of FILE, and a run that is there is not made again. `--table` prints means over seeds and the gain over plain training with
its interval: Student's t over seeds, paired by seed. It says nothing of other texts: a tenth of a small data set is held
out, often a document or two.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.quality import evaluate_text
from kdlib import cli, clock, files
from kdlib.config import Config
from kdlib.models import devices, loading
from kdlib.session import inputs, run_folder
from kdlib.training.loop import TrainLoop

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantiles of Student's t by the number of seeds."""


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("teacher")
    options.add_argument("student")
    options.add_argument("dataset")
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--methods", nargs="+", default=["none", "byte_prefix"])
    options.add_argument("--rates", nargs="+", type=float, default=[1e-4])
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=30)
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--max-length", type=int, default=256)
    options.add_argument("--eval-tokens", type=int, default=2000)
    options.add_argument("--lora-rank", type=int, default=0)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    options.add_argument("--table", action="store_true", help="train nothing; print the table of the runs in FILE")
    options = options.parse_args()
    cli.quiet()
    torch.set_num_threads(options.threads)
    known = files.read_records(options.out) if options.out.exists() else []
    if not options.table:
        run(options, known)
    print(table(known))


def run(options, known):
    base = {
        "teacher": options.teacher, "student": options.student, "dataset": options.dataset,
        "batch_size": options.batch_size, "max_length": options.max_length, "eval_tokens": options.eval_tokens,
        "max_steps": options.steps, "share_steps": 0, "check_teacher": False, "lora_rank": options.lora_rank,
    }  # fmt: skip
    jobs = [(m, r, s) for r in options.rates for s in options.seeds for m in options.methods]
    jobs = [job for job in jobs if (*job, options.steps, options.lora_rank) not in set(map(key, known))]
    if not jobs:
        return
    loaded = inputs.load(Config.from_dict(base))
    before = loading.cpu_state_dict(loaded.pair.student)
    teacher, records = ReusedSignals(loaded.pair.teacher), run_folder.Records(options.out)
    for method, rate, seed in jobs:
        changes = {"kd_method": method, "learning_rate": rate, "seed": seed}
        trained = train(loaded, before, teacher, Config.from_dict({**base, **changes}))
        record = {"method": method, "rate": rate, "seed": seed, "steps": options.steps}
        record |= {"lora_rank": options.lora_rank, **trained}
        records.append(record)
        known.append(record)
        print(json.dumps({k: v for k, v in record.items() if k not in ("bits", "num_bytes", "losses")}), flush=True)


class ReusedSignals:
    """A live teacher that keeps its signals in memory: runs of one seed read the same batches."""

    def __init__(self, teacher):
        self.teacher, self.model, self.signals, self.num_read = teacher, teacher.model, {}, 0

    def __call__(self, batch, **request):
        name = batch.teacher_ids.numpy().tobytes(), repr(request)
        if name not in self.signals:
            self.signals[name] = self.teacher(batch, **request)
            self.num_read += 1
        return self.signals[name]


def train(loaded, before, teacher, config):
    """Trains one student from `before`, and returns its scores after the last step.

    `step_cpu_s` is the median of the processor seconds of a step, None where the teacher's signals were reused.
    """
    pair, start, num_read = loaded.pair, time.monotonic(), teacher.num_read
    loading.load_cpu_state_dict(pair.student, before)
    torch.manual_seed(config.seed)
    objective = inputs.make_objective(pair, config, pair.student)
    loop = TrainLoop(
        objective, teacher if config.needs_teacher else None, loaded.train, config.max_steps, config,
        devices.accelerator("fp32", cpu=True), clock.Clock(), pair.pads, pair.max_row_width,
    )  # fmt: skip
    losses, step_seconds, before_step = [], [], time.process_time()
    for record in loop:
        losses.append(record.parts["lm"])
        step_seconds.append(time.process_time() - before_step)
        print(f"  {config.kd_method} {record.step}/{config.max_steps} {record.step_s:.1f} s", flush=True)
        before_step = time.process_time()
    live = not config.needs_teacher or teacher.num_read > num_read
    validation, test = (evaluate_text(pair.student, pair, split) for split in (loaded.validation, loaded.test))
    return {
        "validation": round(validation.bits_per_byte, 5), "test": round(test.bits_per_byte, 5),
        "wall_s": round(time.monotonic() - start, 1),
        "step_cpu_s": round(float(np.median(step_seconds)), 3) if live else None,
        "losses": [round(loss, 4) for loss in losses],
        "bits": [round(float(value), 1) for value in test.bits], "num_bytes": test.num_bytes.tolist(),
    }  # fmt: skip


def key(record):
    return *(record[name] for name in ("method", "rate", "seed", "steps")), record.get("lora_rank", 0)


def table(records):
    """Returns the Markdown table of all runs: a row for each method, rate, number of steps and rank of adapters, or 0."""
    lines = ["| method | rate | steps | rank | seeds | validation | test | gain over plain (95 %) |", "|" + "---|" * 8]
    by_cell = {}
    for record in records:
        method, rate, seed, steps, rank = key(record)
        by_cell.setdefault((steps, rank, rate, method != "none", method), {})[seed] = record
    for (steps, rank, rate, _, method), runs in sorted(by_cell.items()):
        plain = by_cell.get((steps, rank, rate, False, "none"), {})
        seeds = sorted(runs.keys() & plain.keys())
        means = " | ".join(f"{np.mean([run[split] for run in runs.values()]):.4f}" for split in ("validation", "test"))
        gain = "" if method == "none" or not seeds else gain_text([plain[s] for s in seeds], [runs[s] for s in seeds])
        lines.append(f"| {method} | {rate:g} | {steps} | {rank} | {len(runs)} | {means} | {gain} |")
    return "\n".join(lines)


def gain_text(base, runs):
    """Returns the mean of the bits per byte saved over `base` on test text, with its interval for several seeds."""
    saved = [(sum(b["bits"]) - sum(r["bits"])) / sum(r["num_bytes"]) for b, r in zip(base, runs, strict=True)]
    if len(saved) not in T_95:
        return f"{np.mean(saved):+.4f}"
    half = T_95[len(saved)] * np.std(saved, ddof=1) / len(saved) ** 0.5
    return f"{np.mean(saved):+.4f} ({np.mean(saved) - half:+.4f} to {np.mean(saved) + half:+.4f})"


if __name__ == "__main__":
    main()
