"""Ways of kd, single parts and teacher caches against plain training at the settings of `kdlib demo`, untuned, over seeds.

    python -m benchmarks.equal_steps [--study methods|parts|cache] [--data FOLDER] [--seeds 3] [--steps 600] [--out FILE]

`methods` compares the ways of kd, at equal steps and at equal wall-clock; `parts` adds one part at a time to the default,
at equal steps; `cache` sets runs from a teacher cache against the live teacher, at equal steps. `benchmarks.quality` is the
larger study, tuned and with rivals.

Settings: `default` is the embedded default of `kdlib demo`. With `--data` (a folder with `texts/` and `models/`, as
described in RESULTS.md) `stories` adds a real pretrained teacher with its own SentencePiece tokenizer. Every finished run
is a line in `--out`, and a run that is there is not made again. Prints the table of RESULTS.md.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

import accelerate
import numpy as np
import torch

from kdlib import budget, cache, cli, env, evaluate, inputs, records, signals, tiny, verdict
from kdlib.config import PRESETS, Config
from kdlib.train import Training

EVALUATIONS = 10
AS_MEASURED = {"kd_method": "shared_prefix", "kd_weight": 0.5, "lm_weight": 0.5}
"""What the default was when RESULTS.md's tables were made."""
PLAIN = {"kd_method": "none", "lm_weight": 1.0}
METHODS = {
    "shared_prefix": {"kd_method": "shared_prefix"},
    "shared_vocab": {"kd_method": "shared_vocab"},
    "projector": {"kd_method": "projector"},
    "index pairs (the classic mistake)": {"kd_method": "shared_prefix"},
}

PARTS = {
    "shared_prefix": {},
    **{
        f"+ {name} {weight}": {f"{name}_weight": weight}
        for name, weight in (
            ("layerwise", 0.27),
            ("attention", 0.1),
            ("attention_alignment", 0.1),
            ("routing_feature", 0.1),
            ("contrastive", 0.05),
        )
    },
    "kd_top_k 64": {"kd_top_k": 64},
    "kd_temperature 2": {"kd_temperature": 2.0},
    "chunk_likelihood": {"kd_method": "chunk_likelihood"},
    "preset documents": {"preset": "documents"},
    "all parts, balance auto": {
        "preset": "documents",
        "balance": "auto",
        "kd_temperature": 1.0,
        "label_smoothing": 0.0,
    },
}
CACHE = {"shared_prefix": {}, **{f"from a cache of {k}": {"kd_top_k": k} for k in (16, 64, 256)}}
STUDIES = {"methods": METHODS, "parts": PARTS, "cache": CACHE}


@dataclasses.dataclass
class Setting:
    """A pair with its text; `student(seed)` makes a fresh student."""

    name: str
    config: object
    inputs: object
    student: object
    caches: dict = dataclasses.field(default_factory=dict)


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--study", choices=STUDIES, default="methods")
    options.add_argument("--data")
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--steps", type=int, default=600)
    options.add_argument("--out")
    options = options.parse_args()
    cli.quiet()
    out = Path(options.out or f"benchmarks/out/{options.study}.jsonl")
    out.parent.mkdir(parents=True, exist_ok=True)
    done = records.read_records(out) if out.exists() else []
    for make in (default_setting, *([stories_setting] if options.data else [])):
        setting = make(options.data)
        known = [record for record in done if record["setting"] == setting.name and record["steps"] == options.steps]
        for record in measure(setting, options.steps, range(options.seeds), known, options.study):
            records.Records(out).append(record)
            known.append(record)
            print(json.dumps({k: v for k, v in record.items() if k not in ("bits", "num_bytes")}), flush=True)
        print(table(setting, known, options.study), flush=True)


def default_setting(_):
    cache = env.cache_folder()
    if not tiny.is_ready(cache):
        for _ in tiny.prepare(cache):
            pass
    config = tiny.config(cache, **AS_MEASURED)
    loaded = inputs.load(config)
    return Setting("default", config, loaded, _fresh(loaded))


def stories_setting(data):
    """The real stories260k teacher (512 pieces) and a student with a byte-level BPE of 2,048 tokens, on 200 kB."""
    data = Path(data)
    stories = json.loads((data / "texts/tinystories_1000.json").read_text(encoding="utf-8"))
    stories = [story if isinstance(story, str) else story["text"] for story in stories]
    folder = Path(tempfile.mkdtemp(prefix="kdlib-stories-"))
    count = int(np.searchsorted(np.cumsum([len(story) for story in stories]), 200_000))
    tiny.write_jsonl(folder / "train.jsonl", stories[:count])
    tiny.write_jsonl(folder / "held_out.jsonl", stories[-150:])
    tokenizer = tiny.byte_level_bpe(stories[:-150], 2048)
    torch.manual_seed(0)
    tiny.save(tiny.llama(tokenizer, **tiny.STUDENT), tokenizer, folder / "student")
    config = tiny.config(env.cache_folder(), **AS_MEASURED).replace(
        teacher=str(data / "models/stories260k"),
        student=str(folder / "student"),
        dataset=str(folder / "train.jsonl"),
        eval_dataset=str(folder / "held_out.jsonl"),
    )
    loaded = inputs.load(config)
    return Setting("stories", config, loaded, _fresh(loaded))


def measure(setting, steps, seeds, known, study):
    """Every run of a setting that is not known yet; yields its record."""
    methods = STUDIES[study]
    have = {(record["method"], record["seed"]) for record in known}
    runs = {record["method"]: record for record in known}
    for seed in seeds:
        for name, changes in {"plain, equal steps": PLAIN, **methods}.items():
            if (name, seed) not in have:
                runs[name] = run(setting, name, seed, steps, steps, changes)
                yield runs[name]
        if study == "methods" and ("plain, equal wall-clock", seed) not in have:
            # as many steps as the slowest method's time allows, by the medians of this machine
            slowest = max(runs[name]["step_s"] for name in methods)
            longer = round(steps * slowest / runs["plain, equal steps"]["step_s"])
            yield run(setting, "plain, equal wall-clock", seed, steps, longer, PLAIN)


def run(setting, name, seed, steps, num_steps, changes):
    """Train one student; its record holds the test score of its best weights by validation."""
    config = Config.from_dict({**_without(setting.config, changes), "seed": seed, **changes})
    loaded = setting.inputs
    windows = [by_index(window) for window in loaded.train] if name.startswith("index") else loaded.train
    student = setting.student(seed)
    torch.manual_seed(seed)
    pair = cached(setting, config) if name.startswith("from a cache") else loaded.pair
    objective = inputs.make_objective(pair, config, student)
    teacher = pair.teacher if config.needs_teacher else None
    machine = accelerate.Accelerator(cpu=True)
    best, score, best_step, seconds = float("inf"), None, 0, []
    for record in Training(objective, teacher, windows, num_steps, config, machine, budget.Clock(), loaded.pair.pads):
        seconds.append(record.step_s)
        if record.step % max(1, num_steps // EVALUATIONS) == 0 or record.step == num_steps:
            found = evaluate.evaluate_student(student, objective.head, loaded.validation).bits_per_byte
            if found < best:
                best, best_step = found, record.step
                score = evaluate.evaluate_student(student, objective.head, loaded.test)
    return {
        "setting": setting.name, "method": name, "seed": seed, "steps": steps, "num_steps": num_steps,
        "best_step": best_step, "step_s": statistics.median(seconds), "train_s": sum(seconds), **score.summary(),
        "bits": score.bits.tolist(), "num_bytes": score.num_bytes.tolist(),
    }  # fmt: skip


def cached(setting, config):
    """The setting's pair with a cached teacher in place of the live one; the cache is written where there is none."""
    if config.kd_top_k not in setting.caches:
        folder = tempfile.mkdtemp(prefix="kdlib-cache-")
        for _ in cache.write(config, Path(folder) / "cache"):
            pass
        teacher = signals.CachedTeacher([Path(folder) / "cache"])
        setting.caches[config.kd_top_k] = dataclasses.replace(setting.inputs.pair, teacher=teacher)
    return setting.caches[config.kd_top_k]


def _without(config, changes):
    """The config's values without those that a preset is to set."""
    values = config.to_dict()
    return {key: value for key, value in values.items() if key not in PRESETS.get(changes.get("preset"), ())}


def by_index(window):
    """The window with student position i paired with teacher position i, as if the tokens were the same."""
    rows = np.arange(min(len(window.student_ids), len(window.teacher_ids)) - 1)
    return dataclasses.replace(window, student_rows=rows, teacher_rows=rows, student_stops=rows, teacher_stops=rows)


def table(setting, known, study):
    """The setting's rows for RESULTS.md: means over seeds, and the gain over each control with its interval."""
    by_method = {}
    controls = {"plain, equal steps": "gain at equal steps"}
    controls |= (
        {"plain, equal wall-clock": "at equal wall-clock"}
        if study == "methods"
        else {"shared_prefix": "over shared_prefix"}
    )
    for record in sorted(known, key=lambda r: r["seed"]):
        by_method.setdefault(record["method"], []).append(record)
    teacher = evaluate.evaluate_teacher(setting.inputs.pair.teacher, setting.inputs.test)
    lines = [
        f"\n### {setting.name}: teacher at {teacher.bits_per_byte:.4f} bits per byte, "
        f"coverage {setting.inputs.alignment['coverage']:.1%}\n",
        f"| method | steps | ms a step | bits per byte | KL to teacher | top-1 | {' | '.join(controls.values())} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, runs in by_method.items():
        figure = {
            k: np.mean([r[k] for r in runs]) for k in ("bits_per_byte", "kl_to_teacher", "top1_agreement", "step_s")
        }
        gains = [
            "" if method.startswith("plain") or method == control else gain(runs, by_method[control])
            for control in controls
        ]
        lines.append(
            f"| {method} | {np.mean([r['num_steps'] for r in runs]):.0f} | {1e3 * figure['step_s']:.0f} "
            f"| {figure['bits_per_byte']:.4f} | {figure['kl_to_teacher']:.3f} | {figure['top1_agreement']:.1%} "
            f"| {' | '.join(gains)} |"
        )
    return "\n".join(lines) + "\n"


def gain(runs, control):
    """`+0.1 (low to high)`: bits per byte saved against the control, paired by seed, over seeds and documents."""
    pairs = [(c, r) for c in control for r in runs if c["seed"] == r["seed"]]
    control_bits, bits = (np.array([pair[side]["bits"] for pair in pairs]) for side in (0, 1))
    mean, low, high = verdict.gain_interval(control_bits, bits, np.array(pairs[0][0]["num_bytes"]))
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def _fresh(loaded):
    tokenizer = loaded.pair.student_reader.tokenizer

    def student(seed):
        torch.manual_seed(seed)
        return tiny.llama(tokenizer, **tiny.STUDENT).eval()

    return student


if __name__ == "__main__":
    main()
