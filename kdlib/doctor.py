"""Checks before a run: machine, model pair, memory and speed, measured with the code of the run itself.

Nothing is written except the cached tokenized text, which the run reuses.
"""

import contextlib
import dataclasses
import math
import tempfile
from pathlib import Path

from kdlib import environment, machine, memory
from kdlib.clock import Clock, parse_duration
from kdlib.config import Config
from kdlib.data.dataset import WindowDataset, window_lengths
from kdlib.data.records import Document
from kdlib.evaluation import pair_report
from kdlib.models import devices, teacher_cache
from kdlib.models.pair import IncompatiblePairError
from kdlib.models.prefetch import PrefetchingTeacher
from kdlib.report.findings import Finding, Findings, markdown, overall_state, sentence, text, to_json
from kdlib.session import cache_writer, checkpoint, first_pass, forecast, inputs, time_budget
from kdlib.session.arm import Scorer
from kdlib.training import peak_memory, seeds
from kdlib.training.loop import TrainLoop

__all__ = ["Finding", "diagnose", "markdown", "overall_state", "run_checks", "sentence", "text", "to_json"]

NUM_STEPS, PATIENCE_S = 6, 60.0
"""Optimizer steps to time after a warm-up step, and seconds after which no further step starts."""
READ_TOKENS = 2048
"""Maximum number of held-out tokens to score. A run may score many more in each evaluation."""
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


def diagnose(config=None, requested="", clock=None):
    """Runs all checks of `run_checks` and returns their `Findings`."""
    *_, (_, findings) = run_checks(config, requested, clock)
    return Findings(findings)


def run_checks(config=None, requested="", clock=None, on_progress=lambda phase, done, total: None):
    """Runs all checks in order. Yields `(next stage, findings so far)`; the last stage is an empty string.

    Without models in `config`, only the machine is checked. Without a `dataset`, built-in sentences replace it.
    `requested` is Kaggle's name of the requested accelerator. Checks end early if the next ones cannot run.
    `on_progress(phase, done, total)` is called before each batch. Raises ValueError for input that `distill` refuses.
    """
    config, clock = config or Config(), clock or Clock()
    has_models = config.teacher or config.cached or config.student or config.dataset
    if has_models:
        config.replace(dataset=config.dataset or "sentences").require_inputs()
    yield "checking the machine", []
    gpus = machine.list_gpus()
    findings = machine.check_machine(machine.describe(), gpus, config, requested)
    if has_models and not any(gpu.failed for gpu in gpus):
        yield "loading teacher, student and text", findings
        with devices.temporary_accelerator(config.amp_dtype) as accelerator:
            examination, errors = _load(config, accelerator, clock, on_progress)
            findings = findings + errors
            if examination:
                with examination.resources:
                    yield from _run_stages(examination, findings)
                return
    yield "", findings


def _run_stages(examination, findings):
    for stage, check in (
        ("scoring held-out text with both models", examination.check_pair),
        ("predicting peak memory", examination.check_memory),
        ("timing optimizer steps", examination.check_sessions),
    ):
        if any(finding.group == "memory" and finding.state == "error" for finding in findings):
            break  # steps that do not fit may crash the process
        yield stage, findings
        try:
            findings = findings + check()
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            findings = findings + [_out_of_memory(stage, examination.config)]
    yield "", findings


def _load(config, accelerator, clock, on_progress):
    """Returns `(Examination, [])`, or `(None, findings)` if the models cannot be used."""
    teacher_device = devices.teacher_device(config.teacher_device, accelerator)
    dtype, started, phases = devices.teacher_dtype(accelerator, teacher_device), clock.now(), {}
    documents = None if config.dataset else _sentences(config)
    tokens = config.eval_tokens if config.cached else min(config.eval_tokens, READ_TOKENS)  # a cache needs its own text

    def record_phase(phase, done, total):
        phases.setdefault(phase, clock.now())
        on_progress(phase, done, total)

    try:
        changed = config.replace(check_teacher=False, eval_tokens=tokens)
        loaded = inputs.load(changed, accelerator.device, dtype, teacher_device, documents, record_phase)
    except IncompatiblePairError as error:
        return None, [
            Finding("pair", "teacher, student and text", "incompatible", "error", error.problem, error.remedy)
        ]
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        return None, [_out_of_memory("loading teacher, student and text", config)]
    now = clock.now()
    scored_at = min((at for phase, at in phases.items() if phase.startswith("the teacher reads")), default=now)
    return Examination(config, loaded, accelerator, clock, now - started, now - scored_at, on_progress), []


def _sentences(config):
    """Returns `(train, validation, test)` documents, long enough for full windows and for one optimizer step."""

    def document(number):
        start = number % len(SENTENCES)
        content = f"{number}. " + " ".join(SENTENCES[start:] + SENTENCES[:start]) + "\n"
        return Document(content * (1 + 8 * config.max_length // len(content)))

    train = [document(number) for number in range(max(8, config.effective_batch))]
    return train, [document(len(train))], [document(len(train) + 1)]


class Examination:
    """Checks of a loaded pair. Loading took `load_s` seconds, including `teacher_s` for scoring held-out text."""

    def __init__(self, config, loaded, accelerator, clock, load_s, teacher_s, on_progress):
        self.on_progress, self.teacher_s = on_progress, teacher_s
        self.loaded, self.accelerator, self.clock, self.load_s = loaded, accelerator, clock, load_s
        self.windows, self.cache_s, self.cache_bytes, self.resources = loaded.train, 0.0, 0, contextlib.ExitStack()
        self.per_step = config.effective_batch * accelerator.num_processes
        self.sampled = not config.dataset
        self.planned = bool(config.dataset or config.max_steps)
        steps = time_budget.num_steps(config, len(loaded.train), self.per_step)
        self.config = config.replace(max_steps=steps)
        guesses = time_budget.guessed_costs(loaded.pair.student.num_parameters())
        self.budget = time_budget.TimeBudget(
            parse_duration(config.time_budget or forecast.SESSION), clock, clock.now(), (), guesses
        )

    def check_pair(self):
        """Scores validation text with both models and returns the findings about the pair."""
        scorer = Scorer(self.loaded, self.config.loss_chunk_size, self.budget, on_progress=self.on_progress)
        started = self.clock.now()
        scores = {"teacher": scorer.teacher_score("validation"), "student": scorer.score_student("validation")}
        self._estimate_costs(self.clock.now() - started)
        return pair_report.findings_of(self.config, self.loaded, scores, self.sampled)

    def _estimate_costs(self, student_s):
        """Scales the measured times to the held-out text of a run, which is longer than the text scored here.

        At its start, a run scores all held-out text with the teacher and the test text with the student.
        """
        scored = [_num_tokens(text) for text in (self.loaded.validation, self.loaded.test)]
        planned = num_eval_tokens(self.config, self.loaded.held_out_tokens)
        validation, test = (size / scored[0] for size in planned)
        evaluation_s = self.budget.expected("evaluate")
        self.budget.costs |= {"evaluate": validation * evaluation_s, "test": test * evaluation_s}
        loading = self.load_s + self.teacher_s * (sum(planned) / sum(scored) - 1.0)
        self.budget.record("start", loading + test * student_s)

    def check_memory(self):
        """Predicts the peak memory of training and compares it with the available memory."""
        if not self.sampled and first_pass.should_cache_first(self.config, len(self.loaded.train), self.per_step):
            self._cache_first_windows()
        with seeds.preserve_rng_state(self.accelerator.device):
            self.training = self._make_training()
        device = self.accelerator.device
        total, used = memory.usage(device)["total_bytes"], memory.usage(device)["used_bytes"] or 0
        if self.config.gradient_checkpointing == "auto":
            predicted = peak_memory.fit(self.training, total, self.on_progress)
        else:
            predicted = peak_memory.predicted_bytes(self.training, self.on_progress)
        available, recomputes = min(total, used + memory.free(device)), self.training.gradient_checkpointing
        fitting = self._fitting_micro_batch(available) if predicted > available else None
        findings = [forecast.peak_finding(predicted, available, total, recomputes, self.config, fitting)]
        if not self.config.lora_rank:
            with_adapters = peak_memory.predicted_with_adapters(self.training, forecast.ADAPTER_RANK, self.on_progress)
            findings.append(forecast.adapters_finding(predicted, with_adapters, available))
        teacher = self.loaded.pair.teacher
        if isinstance(teacher, PrefetchingTeacher) and teacher.model.device.type == "cuda":
            findings.append(forecast.teacher_gpu_finding(teacher.model.device, **memory.usage(teacher.model.device)))
        return findings

    def _cache_first_windows(self):
        """Replaces the teacher by a cache of the first windows, as a run does, and extrapolates time and size."""
        few, folder = self.loaded.train[: self.per_step * (NUM_STEPS + 2)], tempfile.TemporaryDirectory()
        part, started = dataclasses.replace(self.loaded, train=few), self.clock.now()
        out = Path(self.resources.enter_context(folder))
        writer = cache_writer.CacheWriter(self.config, part, out, self.clock, [], (0, 1), self.on_progress)
        records = writer.run(math.inf, started)
        plan, seconds = next(records), [self.clock.now() - started for _ in records]  # after each shard and at the end
        positions = WindowDataset.from_list(self.loaded.train).total("student_rows")
        self.cache_bytes = round(plan["bytes_a_position"] * positions)
        train_s = seconds[len(writer.facts["shards"]["train"]) - 1]
        self.cache_s = seconds[-1] + (len(self.loaded.train) / len(few) - 1.0) * train_s
        self.windows, self.loaded.pair.teacher = few, teacher_cache.CachedTeacher([folder.name])
        self.loaded.pair.buckets.pop("tries", None)  # these hold the live teacher's head
        memory.release_memory()

    def _make_training(self):
        """Returns the `TrainLoop` of the distilled student with all loss terms enabled."""
        config, pair = self.config.replace(use_curriculum=False), self.loaded.pair
        objective = inputs.make_objective(pair, config)
        teacher = pair.teacher if config.needs_teacher else None
        return TrainLoop(
            objective, teacher, self.windows, max(config.max_steps, NUM_STEPS + 2), config, self.accelerator,
            self.clock, pair.pads, pair.max_row_width,
        )  # fmt: skip

    def _fitting_micro_batch(self, available):
        """Returns the first halved micro-batch whose predicted peak fits into `available` bytes, or None."""
        while self.training.micro_batch > 1:
            self.training.micro_batch //= 2
            if peak_memory.predicted_bytes(self.training) <= available:
                return self.training.micro_batch
        return None

    def check_sessions(self):
        """Times optimizer steps and forecasts the run time, the number of sessions and the size of checkpoints."""
        with seeds.preserve_rng_state(self.accelerator.device):
            steps = self._timed_steps()
        counted = steps[1:]
        seconds, tokens = sum(step.step_s for step in counted), sum(step.num_tokens for step in counted)
        per_step = float(window_lengths(self.loaded.train).mean()) * self.per_step
        step_s = max(seconds, 1e-9) / max(1, tokens) * per_step
        findings = [
            forecast.speed_finding(step_s, per_step, len(counted)),
            forecast.numbers_finding(steps, self.accelerator.scaler is not None),
        ]
        if steps[-1].micro_batch < self.config.batch_size:
            findings.append(forecast.halved_finding(steps[-1].micro_batch, self.config))
        if self.planned:
            readings = self.config.max_steps * self.per_step / len(self.loaded.train) * self.config.repeats
            findings += filter(None, [forecast.teacher_passes_finding(self.config, readings, self.cache_s)])
            findings += forecast.plan_findings(self.config, step_s, per_step, self.budget, self.cache_s)
        sizes = {name: checkpoint.size_of(tensors) for name, tensors in self.training.state_tensors().items()}
        disk = environment.free_bytes("."), environment.disk_reserve_bytes()
        return [*findings, forecast.disk_finding(sizes, self.config, *disk, self.cache_bytes)]

    def _timed_steps(self):
        steps, started = [], self.clock.now()
        for step in self.training:
            steps.append(step)
            self.on_progress("timing optimizer steps", len(steps), NUM_STEPS + 1)
            is_slow = self.clock.now() - started > PATIENCE_S
            if len(steps) > NUM_STEPS or (is_slow and len(steps) > 1):
                break
        return steps


def num_eval_tokens(config, available):
    """Returns how many of the `available` validation and test tokens a run scores."""
    factors = {"validation": 1, "test": inputs.TEST_FACTOR}
    return [min(available[split], factor * config.eval_tokens) for split, factor in factors.items()]


def _num_tokens(held_out):
    return sum(batch.num_student_tokens for batch in held_out.batches)


def _out_of_memory(stage, config):
    return Finding(
        "memory", "available memory", f"exceeded while {stage}", "error", "", forecast.remedies(None, config)
    )
