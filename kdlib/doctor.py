"""Will it work here? Machine, pair, memory and speed are looked at before a run, by what the run itself uses.

Nothing is written but the tokenized text, which `windows` keeps for the run to find.
"""

import contextlib
import dataclasses
import math
import tempfile
from pathlib import Path

from kdlib import environment, machine, memory
from kdlib.clock import Clock, parse_duration
from kdlib.config import Config
from kdlib.data.corpus import Document
from kdlib.data.dataset import WindowDataset, window_lengths
from kdlib.evaluation import pair_report
from kdlib.models import devices, teacher_cache
from kdlib.models.pair import IncompatiblePairError
from kdlib.models.prefetch import PrefetchingTeacher
from kdlib.report.findings import Finding, markdown, overall_state, sentence, text, to_json
from kdlib.session import cache_writer, checkpoint, first_pass, forecast, inputs, plan, time_budget
from kdlib.session.arm import Scorer
from kdlib.training import peak_memory, seeds
from kdlib.training.loop import TrainLoop

__all__ = ["Finding", "diagnose", "markdown", "overall_state", "run_checks", "sentence", "text", "to_json"]

NUM_STEPS, PATIENCE_S = 6, 60.0
"""Optimizer steps that are timed after a first one, and seconds after which no further one is begun."""
READ_TOKENS = 2048
"""Held-out tokens that are read here, where a run may read many more in each evaluation."""
SENTENCES = (
    "The old lighthouse keeper wrote down the weather every evening, and nobody ever asked him to.",
    "In 1987 the city council spent 4,250,000 dollars on a bridge that was opened three years late.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return sum(values) / len(values)\n",
    "Photosynthesis turns carbon dioxide and water into sugar; the energy for it comes from light.",
    "“Where have you been?” she asked. “We waited for you until the café closed – at half past ten!”",
    "Elle n'a pas répondu tout de suite: elle regardait par la fenêtre, où la neige commençait à tomber.",
    "To install it, run the first command; if it fails, check that your version is at least 3.10.",
    "The theorem holds for every x > 0, because f(x) = x^2 + 1 is continuous and never reaches zero.",
)


def diagnose(config=None, asked="", clock=None):
    """All `Finding`s of `run_checks`, at once."""
    *_, (_, found) = run_checks(config, asked, clock)
    return found


def run_checks(config=None, asked="", clock=None, on_progress=lambda phase, done, total: None):
    """Look at everything, one thing after the other: a generator of `(what comes next, findings so far)`; the last time
    nothing comes next.

    Without models named in `config` the machine is all there is. Without a `dataset` a few sentences stand for it. `asked`:
    the accelerator that was asked for, by Kaggle's name. It ends early where nothing further can be looked at. ValueError
    for what `distill` would not begin with: something that is not there, or that is refused. `on_progress(phase, done,
    total)` is called before every batch and every piece of work that takes long.
    """
    config, clock = config or Config(), clock or Clock()
    named = config.teacher or config.cached or config.student or config.dataset
    if named:
        config.replace(dataset=config.dataset or "sentences").require_inputs()
    yield "looking at the machine", []
    cards = machine.cards()
    found = machine.findings_of(machine.describe(), cards, config, asked)
    if named and not any(card.failed for card in cards):
        yield "loading teacher, student and text", found
        with devices.temporary_accelerator(config.amp_dtype) as accelerator:
            look, refused = _look(config, accelerator, clock, on_progress)
            found = found + refused
            if look:
                with look.rest:
                    yield from _stages_of(look, found)
                return
    yield "", found


def _stages_of(look, found):
    for coming, one in (
        ("reading held-out text with both", look.pair),
        ("watching passes to foretell the memory", look.memory),
        ("taking optimizer steps, which are forgotten", look.sessions),
    ):
        if any(finding.group == "memory" and finding.state == "wrong" for finding in found):
            break  # steps that do not fit may take the whole process with them
        yield coming, found
        try:
            found = found + one()
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            found = found + [_no_room(coming, look.config)]
    yield "", found


def _look(config, accelerator, clock, on_progress):
    """`(Examination, findings)`: of what was loaded, or None and why it can't be looked at."""
    there = devices.teacher_device(config.teacher_device, accelerator)
    dtype, started, phases = devices.teacher_dtype(accelerator, there), clock.now(), {}
    documents = None if config.dataset else _sentences(config)
    few = config.eval_tokens if config.cached else min(config.eval_tokens, READ_TOKENS)  # a cache is for one text

    def timed(phase, done, total):
        phases.setdefault(phase, clock.now())
        on_progress(phase, done, total)

    try:
        changed = config.replace(check_teacher=False, eval_tokens=few)
        loaded = inputs.load(changed, accelerator.device, dtype, there, documents, timed)
    except IncompatiblePairError as error:
        return None, [Finding("pair", "teacher, student and text", "do not fit", "wrong", error.problem, error.remedy)]
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        return None, [_no_room("loading teacher, student and text", config)]
    now = clock.now()
    reading = min((at for phase, at in phases.items() if phase.startswith("the teacher reads")), default=now)
    return Examination(config, loaded, accelerator, clock, now - started, now - reading, on_progress), []


def _sentences(config):
    """Documents that fill whole windows, enough of them for a step and for held-out text."""

    def document(number):
        turn = number % len(SENTENCES)
        said = f"{number}. " + " ".join(SENTENCES[turn:] + SENTENCES[:turn]) + "\n"
        return Document(said * (1 + 8 * config.max_length // len(said)))

    train = [document(number) for number in range(max(8, config.effective_batch))]
    return train, [document(len(train))], [document(len(train) + 1)]


class Examination:
    """What a run would start from, loaded in `load_s` seconds, of which the teacher read held-out text for `teacher_s`."""

    def __init__(self, config, loaded, accelerator, clock, load_s, teacher_s, on_progress):
        self.on_progress, self.teacher_s = on_progress, teacher_s
        self.loaded, self.accelerator, self.clock, self.load_s = loaded, accelerator, clock, load_s
        self.windows, self.read_s, self.read_bytes, self.rest = loaded.train, 0.0, 0, contextlib.ExitStack()
        self.per_step = config.effective_batch * accelerator.num_processes
        self.sampled = not config.dataset
        self.planned = bool(config.dataset or config.max_steps)
        steps = plan.num_steps(config, len(loaded.train), self.per_step)
        self.config = config.replace(max_steps=steps)
        guesses = plan.guessed_costs(loaded.pair.student.num_parameters())
        self.budget = time_budget.TimeBudget(
            parse_duration(config.time_budget or forecast.SESSION), clock, clock.now(), (), guesses
        )

    def pair(self):
        """Both models read the validation text; what they and their tokenizers are to each other."""
        scorer = Scorer(self.loaded, self.config.loss_chunk_size, self.budget, on_progress=self.on_progress)
        started = self.clock.now()
        scores = {"teacher": scorer.teacher("validation"), "student": scorer.student("validation")}
        self._know_costs(self.clock.now() - started)
        return pair_report.findings_of(self.config, self.loaded, scores, self.sampled)

    def _know_costs(self, student_s):
        """What evaluations and the start of a run take: it reads more held-out text than was read here, by the student in
        `student_s`. Loading lets the teacher read all of it once; the student is scored on the test.
        """
        read = [_num_tokens(text) for text in (self.loaded.validation, self.loaded.test)]
        wanted = wanted_tokens(self.config, self.loaded.held_out_tokens)
        longer, test = (size / read[0] for size in wanted)
        one = self.budget.expected("evaluate")
        self.budget.costs |= {"evaluate": longer * one, "test": test * one}
        loading = self.load_s + self.teacher_s * (sum(wanted) / sum(read) - 1.0)
        self.budget.record("start", loading + test * student_s)

    def memory(self):
        """The height that training will reach, against what there is."""
        if not self.sampled and first_pass.should_cache_first(self.config, len(self.loaded.train), self.per_step):
            self._read_first()
        with seeds.preserve_rng_state(self.accelerator.device):
            self.training = self._training()
        device = self.accelerator.device
        total, used = memory.usage(device)["total_bytes"], memory.usage(device)["used_bytes"] or 0
        if self.config.gradient_checkpointing == "auto":
            predicted = peak_memory.fit(self.training, total, self.on_progress)
        else:
            predicted = peak_memory.predicted_bytes(self.training, self.on_progress)
        there, again = min(total, used + memory.free(device)), self.training.gradient_checkpointing
        fits = self._that_fits(there) if predicted > there else None
        made = [forecast.peak_finding(predicted, there, total, again, self.config, fits)]
        teacher = self.loaded.pair.teacher
        if isinstance(teacher, PrefetchingTeacher) and teacher.model.device.type == "cuda":
            made.append(forecast.apart_finding(teacher.model.device, **memory.usage(teacher.model.device)))
        return made

    def _read_first(self):
        """As a run does: the teacher reads, here the windows of the steps to come, and is let go."""
        few, folder = self.loaded.train[: self.per_step * (NUM_STEPS + 2)], tempfile.TemporaryDirectory()
        part, started = dataclasses.replace(self.loaded, train=few), self.clock.now()
        out = Path(self.rest.enter_context(folder))
        passing = cache_writer.CacheWriter(self.config, part, out, self.clock, [], (0, 1), self.on_progress)
        running = passing.run(math.inf, started)
        told, seconds = next(running), [self.clock.now() - started for _ in running]  # after each shard, and all
        positions = WindowDataset.from_list(self.loaded.train).total("student_rows")
        self.read_bytes = round(told["bytes_a_position"] * positions)
        learned, more = seconds[len(passing.facts["shards"]["train"]) - 1], len(self.loaded.train) / len(few) - 1.0
        self.read_s = seconds[-1] + more * learned
        self.windows, self.loaded.pair.teacher = few, teacher_cache.CachedTeacher([folder.name])
        self.loaded.pair.buckets.pop("tries", None)  # these hold the live teacher's head
        memory.release_memory()

    def _training(self):
        """The `TrainLoop` of the distilled student, with all its parts on from the first step."""
        config, pair = self.config.replace(use_curriculum=False), self.loaded.pair
        objective = inputs.make_objective(pair, config)
        teacher = pair.teacher if config.needs_teacher else None
        return TrainLoop(
            objective, teacher, self.windows, max(config.max_steps, NUM_STEPS + 2), config, self.accelerator,
            self.clock, pair.pads, pair.widest,
        )  # fmt: skip

    def _that_fits(self, there):
        """The largest micro-batch below the config's, by halves, that is foretold to fit; None where none does."""
        while self.training.micro_batch > 1:
            self.training.micro_batch //= 2
            if peak_memory.predicted_bytes(self.training) <= there:
                return self.training.micro_batch
        return None

    def sessions(self):
        """Steps taken and timed; what the whole plan then takes, and its checkpoints."""
        with seeds.preserve_rng_state(self.accelerator.device):
            steps = self._timed()
        counted = steps[1:]
        seconds, tokens = sum(step.step_s for step in counted), sum(step.num_tokens for step in counted)
        lengths = window_lengths(self.loaded.train)
        per_step = float(lengths.mean()) * self.per_step
        step_s = max(seconds, 1e-9) / max(1, tokens) * per_step
        made = [
            forecast.speed_finding(step_s, per_step, len(counted)),
            forecast.numbers_finding(steps, self.accelerator.scaler is not None),
        ]
        if steps[-1].micro_batch < self.config.batch_size:
            made.append(forecast.halved_finding(steps[-1].micro_batch, self.config))
        if self.planned:
            readings = self.config.max_steps * self.per_step / len(self.loaded.train) * self.config.repeats
            made += [found for found in (forecast.readings_finding(self.config, readings, self.read_s),) if found]
            made += forecast.plan_findings(self.config, step_s, per_step, self.budget, self.read_s)
        sizes = {name: checkpoint.size_of(tensors) for name, tensors in self.training.tensors().items()}
        room = environment.free_bytes("."), environment.disk_reserve_bytes()
        return made + [forecast.disk_finding(sizes, self.config, *room, self.read_bytes)]

    def _timed(self):
        steps, started = [], self.clock.now()
        for step in self.training:
            steps.append(step)
            self.on_progress("taking optimizer steps", len(steps), NUM_STEPS + 1)
            late = self.clock.now() - started > PATIENCE_S
            if len(steps) > NUM_STEPS or (late and len(steps) > 1):
                break
        return steps


def wanted_tokens(config, there):
    """Tokens of validation and test text that a run reads, of those that are `there`."""
    return [
        min(there[name], factor * config.eval_tokens)
        for name, factor in (("validation", 1), ("test", inputs.TEST_FACTOR))
    ]


def _num_tokens(held_out):
    return sum(batch.num_student_tokens for batch in held_out.batches)


def _no_room(doing, config):
    return Finding("memory", "room", f"ran out while {doing}", "wrong", "", forecast.remedies(None, config))
