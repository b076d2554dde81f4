"""Does it help, and more than the known ways? Every method at the same wall-clock, tuned alike, over seeds, texts and pairs.

    make bench-quality     or     python -m benchmarks.quality [--data FOLDER] [--only WORD ...] [--table]

Settings are in `benchmarks.settings`, methods with their grids in `benchmarks.methods`. A method's number of steps is what
the time of STEPS steps of `first_token` is worth to it, by processor seconds taken in turn with plain training, once a
setting; so another load on the machine favours nobody. The first cells of a method's grid, and then those around the best so
far until it is better than all around it, are trained at a seed for tuning and judged on validation text, from scratch the
best three at a second seed too. The best is then trained at SEEDS, and its best weights by validation text are judged on
test text.

Every finished run is a line of `benchmarks/results/quality.jsonl`, and a run that is there is not made again, here or on
another machine. At the end, and with `--table` at once, the table is printed and `docs/quality.png` is drawn.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks import quality_table, settings, variants
from benchmarks.methods import CORE, EQUAL_STEPS, METHODS, PLAIN, UNIT
from kdlib import cli, clock, files
from kdlib.config import PRESETS, Config
from kdlib.evaluation import scoring
from kdlib.models import devices, loading
from kdlib.models.head import Head
from kdlib.session import run_folder
from kdlib.training.loop import TrainLoop

STEPS = {"pretrained": 300, "scratch": 600}
"""Of `first_token`, by how the student begins: from scratch it learns slowly at first."""
TUNING, SEEDS = (100, 101), (0, 1, 2)
AGAIN = {"pretrained": 1, "scratch": 3}
"""How many of the best cells are compared at the second seed for tuning too, where there is more than one: from scratch a
cell may be 0.08 bits per byte better at one seed than at the next.
"""
EVALUATIONS = 8
TIMED, WARM = 24, 2
RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
EVERY = "default pretrained, stories pretrained, peps pretrained"
SCRATCH = EVERY.replace("pretrained", "scratch")
ORDER = [
    (EVERY, "core"), (EVERY, "rivals"), (SCRATCH, "core"), (EVERY, "ours parts mixed"), (SCRATCH, "rivals"),
    ("default pretrained", "search"),
]  # fmt: skip
"""Settings and beginnings of the student with groups of methods, the most telling ones first."""


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--data", type=Path, default=settings.FOLDER, help="folder of real text and models")
    options.add_argument(
        "--only", nargs="*", default=[], help="methods, settings or beginnings whose name is one of these"
    )
    options.add_argument("--table", action="store_true", help="make no run; print the table of what is there")
    options.add_argument("--out", type=Path, default=RESULTS)
    options = options.parse_args()
    cli.quiet()
    torch.set_num_threads(1)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    study = Study(options.out, options.data)
    if not options.table:
        study.run(chosen(options.only))
    print(quality_table.table(study.known))
    quality_table.draw(study.known, Path(__file__).parent.parent / "docs" / "quality.png")


def chosen(only):
    """`(setting, beginning, method)` in the order in which they are measured."""
    jobs = [
        (*cell.split(), name)
        for cells, groups in ORDER
        for cell in cells.split(", ")
        for name, method in METHODS.items()
        if method.group in groups.split() or ("core" in groups and name in CORE)
    ]
    jobs = list(dict.fromkeys(jobs))
    unknown = [name for name in only if not any(name in job for job in jobs)]
    if unknown:
        raise SystemExit(f"no method, setting or beginning is called {', '.join(unknown)}")
    for place in range(3):
        wanted = {name for name in only if any(job[place] == name for job in jobs)}
        jobs = [job for job in jobs if not wanted or job[place] in wanted]
    return jobs


class Study:
    """The records so far, and how more are made."""

    def __init__(self, path, data):
        self.path, self.data, self.made = path, data, {}
        self.known = files.read_records(path) if path.exists() else []

    def run(self, jobs):
        """Make what is missing, with a line after each run that says how long the rest will take."""
        jobs = [job for job in jobs if self.setting(job[0])]
        started, done = time.monotonic(), 0
        for place, job in enumerate(jobs):
            for record in self.missing(*job):
                self.known.append(record)
                run_folder.Records(self.path).append(record)
                done += 1
                each = (time.monotonic() - started) / done
                left = sum(self.num_missing(*later) for later in jobs[place:])
                print(said(record), f"| {left} left, {each * left / 60:.0f} min", flush=True)

    def setting(self, name):
        """The setting of a name, made once; None, with a line, where its data is not there."""
        if name not in self.made:
            self.made[name] = settings.SETTINGS[name](self.data)
            if self.made[name] is None:
                print(f"{name}: skipped, {self.data} has no such data", flush=True)
            elif not self.of(self.made[name], what="setting"):
                self.note(described(self.made[name]))
        return self.made[name]

    def note(self, record):
        self.known.append(record)
        run_folder.Records(self.path).append(record)

    def of(self, setting, **facts):
        """The records of a setting's present text that have these values."""
        facts = {"setting": setting.name, "text": setting.text, **facts}
        return [record for record in self.known if all(record.get(k) == v for k, v in facts.items())]

    def cost(self, setting, name, which="ratio"):
        """Processor time of a method's step (`ratio`), or of what comes `before` its first, in steps of plain training;
        measured where it is not known.
        """
        if METHODS[name].changes.get("kd_method") == "none":
            return {"ratio": 1.0, "before": 0.0}[which]
        if not self.of(setting, what="cost", method=name):
            self.note(
                {"what": "cost", "setting": setting.name, "text": setting.text, "method": name, **cost(setting, name)}
            )
        return self.of(setting, what="cost", method=name)[0].get(which, 0.0)

    def num_steps(self, setting, kind, name):
        if name == EQUAL_STEPS:
            return STEPS[kind]
        budget = STEPS[kind] * self.cost(setting, UNIT)
        return round((budget - self.cost(setting, name, "before")) / self.cost(setting, name))

    def tried(self, setting, kind, name):
        """`{cell as json: (validation score or None, config changes)}` of what is to be tried of a method, as far as it is
        known: its first cells on top of its base's best one, and those around each that was the best so far.
        """
        method, below = METHODS[name], self.best_cell(setting, kind, METHODS[name].base) if METHODS[name].base else {}
        if below is None:
            return {}
        runs = self.of(setting, what="run", kind=kind, method=name, seed=TUNING[0])
        known = {json.dumps(run["cell"]): run["validation"] for run in runs}
        cells = [{**below, **cell} for cell in method.cells()]
        while True:
            found = {json.dumps(cell): (known.get(json.dumps(cell)), cell) for cell in cells}
            if any(score is None for score, _ in found.values()):
                return found
            _, best = min(found.values(), key=mildest)
            more = [cell for cell in method.beside(best) if json.dumps(cell) not in found]
            if not more:
                return found
            cells += more

    def finalists(self, setting, kind, name):
        """`[(validation scores by seed for tuning, config changes)]` of the best cells, if all were tried."""
        found = list(self.tried(setting, kind, name).values())
        if not found or any(score is None for score, _ in found):
            return []
        best = sorted(found, key=mildest)[: AGAIN[kind]]
        if len(best) == 1:
            return [([score], cell) for score, cell in best]
        again = self.of(setting, what="run", kind=kind, method=name, seed=TUNING[1])
        again = {json.dumps(run["cell"]): run["validation"] for run in again}
        return [([score, again.get(json.dumps(cell))], cell) for score, cell in best]

    def best_cell(self, setting, kind, name):
        """The cell with the best validation score at the seeds for tuning, if all were tried."""
        found = self.finalists(setting, kind, name)
        if not found or any(None in scores for scores, _ in found):
            return None
        return min(((sum(scores), cell) for scores, cell in found), key=mildest)[1]

    def missing(self, name, kind, method):
        """Make the runs of a method that are not there: its base's first, then its grid, then its best cell at SEEDS."""
        setting = self.setting(name)
        if METHODS[method].base:
            yield from self.missing(name, kind, METHODS[method].base)
        make = functools.partial(train, setting, kind, method)
        while left := [cell for score, cell in self.tried(setting, kind, method).values() if score is None]:
            yield make(left[0], TUNING[0], self.num_steps(setting, kind, method))
        while left := [cell for scores, cell in self.finalists(setting, kind, method) if None in scores]:
            yield make(left[0], TUNING[1], self.num_steps(setting, kind, method))
        cell = self.best_cell(setting, kind, method)
        for seed in SEEDS:
            if not self.of(setting, what="run", kind=kind, method=method, cell=cell, seed=seed):
                yield make(cell, seed, self.num_steps(setting, kind, method))

    def num_missing(self, name, kind, method):
        """How many runs of its own a method lacks, at least."""
        setting = self.setting(name)
        cell, tried = self.best_cell(setting, kind, method), self.tried(setting, kind, method).values()
        runs = self.of(setting, what="run", kind=kind, method=method, cell=cell) if cell else []
        seeds = sum(run["seed"] in SEEDS for run in runs)
        cells = sum(score is None for score, _ in tried) if tried else len(METHODS[method].cells())
        return cells + len(SEEDS) - seeds


def mildest(scored):
    """What `(score, cell)` are ordered by: where scores are equal (nothing was learned) the cell with less of everything."""
    score, cell = scored
    return score, cell.get("kd_weight", 0.0), cell["learning_rate"]


def described(setting):
    """The record of a setting: what the table says of it."""
    pair, test = setting.inputs.pair, setting.inputs.test
    teacher = test.teacher_score
    before = evaluate_text(setting.trained(), pair, test)
    return {
        "what": "setting", "setting": setting.name, "text": setting.text, "about": setting.about,
        "teacher": round(teacher.bits_per_byte, 4), "trained_before": round(before.bits_per_byte, 4),
        "coverage": round(setting.inputs.alignment["coverage"], 4), "shared_tokens": len(pair.shared),
        "num_bytes": teacher.num_bytes.tolist(),
    }  # fmt: skip


def started(setting, kind, name, cell, seed, num_steps):
    """`(training, objective)` of a method."""
    method = METHODS[name]
    base = {k: v for k, v in setting.config.to_dict().items() if k not in PRESETS.get(method.changes.get("preset"), ())}
    config = Config.from_dict({**base, "seed": seed, "share_steps": 0, **method.changes, **cell})
    loaded, student = setting.inputs, setting.student(kind, seed)
    torch.manual_seed(seed)
    objective, teacher = method.make(setting, config, student)
    windows = [variants.by_index(window) for window in loaded.train] if method.by_index else loaded.train
    layout = loaded.pair.pads, loaded.pair.max_row_width
    machine = devices.accelerator("fp32", cpu=True)
    return TrainLoop(objective, teacher, windows, num_steps, config, machine, clock.Clock(), *layout), objective


def train(setting, kind, name, cell, seed, num_steps):
    """Train one student; its record holds the test score of its best weights by validation."""
    training, objective = started(setting, kind, name, cell, seed, num_steps)
    loaded, marks = setting.inputs, {round(num_steps * (i + 1) / EVALUATIONS) for i in range(EVALUATIONS)}
    before, weights, best_step = time.process_time(), loading.cpu_state_dict(objective.student), 0
    best = evaluate_text(objective.student, loaded.pair, loaded.validation).bits_per_byte
    for record in training:
        if record.step in marks:
            averaged = [training.average.module] if training.average else []
            for model in (objective.student, *averaged):
                found = evaluate_text(model, loaded.pair, loaded.validation).bits_per_byte
                if found < best:
                    best, weights, best_step = found, loading.cpu_state_dict(model), record.step
    loading.load_cpu_state_dict(objective.student, weights)
    score = scoring.evaluate_student(objective.student, objective.head, loaded.test)
    return {
        "what": "run", "setting": setting.name, "text": setting.text, "kind": kind, "method": name, "cell": cell,
        "seed": seed, "steps": num_steps, "best_step": best_step,
        "cpu_s": round(time.process_time() - before, 1),
        "validation": round(best, 5), **{key: round(value, 5) for key, value in score.summary().items()},
        **({} if seed in TUNING else {"bits": [round(value, 1) for value in score.bits]}),
    }  # fmt: skip


def evaluate_text(model, pair, held_out):
    """The student's score without what needs the teacher."""
    batches = [_without_pairs(batch) for batch in held_out.batches]
    head = Head(model, pair.student_reader.vocabulary)
    return scoring.evaluate_student(model, head, dataclasses.replace(held_out, batches=batches))


def _without_pairs(batch):
    return dataclasses.replace(batch, student_rows=batch.student_rows[:0])


def cost(setting, name):
    """`{ratio, step_s}` and, where something comes first, `before`: processor seconds of TIMED steps of a method to those
    of plain training, a step of each in turn on the same windows, the first WARM not counted; before that the method takes
    as many steps for itself.
    """
    cell = METHODS[name].cells()[0]
    for _ in started(setting, "scratch", name, cell, 0, TIMED)[0]:
        pass
    seconds = {}
    plain = METHODS[PLAIN].cells()[0]
    running = {
        key: iter(started(setting, "scratch", key, at, 0, TIMED)[0]) for key, at in ((PLAIN, plain), (name, cell))
    }
    for _ in range(TIMED):
        for key, steps in running.items():
            before = time.process_time()
            next(steps)
            seconds.setdefault(key, []).append(time.process_time() - before)
    whole = {key: sum(values[WARM:]) for key, values in seconds.items()}
    middle = statistics.median(seconds[name][WARM:])
    found = {"ratio": round(whole[name] / whole[PLAIN], 3), "step_s": round(middle, 4)}
    if METHODS[name].make is variants.from_cache:
        _, spent = setting.kept[variants.kept_as({**METHODS[name].changes, **cell})]
        found["before"] = round(spent * (TIMED - WARM) / whole[PLAIN], 1)
    return found


def said(record):
    cell = ", ".join(f"{key} {value}" for key, value in record["cell"].items())
    return (
        f"{record['setting']}/{record['kind']} {record['method']} ({cell}) seed {record['seed']}: {record['steps']} steps, "
        f"best {record['best_step']}, validation {record['validation']:.4f}, test {record['bits_per_byte']:.4f}, "
        f"{record['cpu_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
