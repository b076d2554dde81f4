"""Arms of an experiment (the distilled student and its control), and the scorer of students."""

import dataclasses
import functools

from kdlib import memory
from kdlib.evaluation import scoring
from kdlib.losses import chunked_head
from kdlib.models import loading
from kdlib.models.head import Head
from kdlib.session import alerts

DISTILLED, CONTROL = "distilled", "ce_only"
TASKS = {"validation": "evaluate", "test": "test"}
"""Task of a `TimeBudget` for scoring each split."""


@dataclasses.dataclass
class Arm:
    """Progress and results of one training run of an experiment.

    The learning rate schedule covers `num_steps`, training ends at `last_step`, and the arms are compared at
    `compare_step`. `step` is the current step, `evaluated` the last evaluated one. `best_weights` have the best
    validation score so far; `best_averaged` tells whether they are an average. `at_compare` and `at_end` are test
    scores of the best weights until then. `gradient_checkpointing` is the decision under `auto`, or None before it.
    """

    name: str
    repeat: int
    num_steps: int
    last_step: int
    compare_step: int
    step: int = 0
    evaluated: int = -1
    best: float = float("inf")
    best_step: int = 0
    best_averaged: bool = False
    best_weights: dict | None = None
    since_best: int = 0
    num_tokens: int = 0
    gradient_checkpointing: bool | None = None
    predicted_bytes: int | None = None
    train_s: float = 0.0
    compare_s: float = 0.0
    at_compare: scoring.Score | None = None
    at_end: scoring.Score | None = None
    monitor: alerts.AlertMonitor = dataclasses.field(default_factory=alerts.AlertMonitor)

    @property
    def done(self):
        return self.at_end is not None

    def owns(self, record):
        """Returns whether a record belongs to this arm."""
        return (record.get("run"), record.get("repeat")) == (self.name, self.repeat)

    def to_dict(self):
        """Returns the JSON state, without weights and monitor."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values = {name: value for name, value in values.items() if name not in ("best_weights", "monitor")}
        return {**values, **{name: values[name] and values[name].to_dict() for name in ("at_compare", "at_end")}}

    @classmethod
    def from_dict(cls, values, best_weights, records, monitor):
        """Returns the arm of a `to_dict`. Its `monitor` is restored by replaying the run's `records`."""
        scores = {name: values[name] and scoring.Score.from_dict(values[name]) for name in ("at_compare", "at_end")}
        arm = cls(**{**values, **scores}, best_weights=best_weights, monitor=monitor)
        for record in records:
            if arm.owns(record) and record["kind"] in ("train", "eval"):
                arm.monitor.update(record)
        return arm


class Scorer:
    """Scorer of models on validation and test text. If memory runs out, it halves its batches permanently.

    A later session needs the same `chunk` and `halvings` to reproduce scores exactly. `on_progress(phase, done, total)`
    is called before every batch, and may raise. The durations of batches and splits are recorded in `budget`.
    """

    def __init__(self, loaded, chunk, budget, halvings=0, on_progress=lambda phase, done, total: None):
        self.pair, self.chunk, self.budget, self.on_progress = loaded.pair, chunk, budget, on_progress
        self.held_out = {"validation": loaded.validation, "test": loaded.test}
        self.batch_started, self.halvings = None, 0
        for _ in range(halvings):
            self._halve()

    @classmethod
    def for_run(cls, loaded, config, device, facts, budget, on_progress):
        """Returns the scorer of a run, with the settings of its checkpoint's `facts`, if any."""
        if facts and facts["config"]["loss_chunk_size"] != config.loss_chunk_size:
            facts["chunk"] = facts["course"]["training"]["chunk_sizes"] = None
        columns = loaded.pair.head.num_rows + loaded.pair.teacher.num_columns
        chunk = facts.get("chunk") or chunked_head.chunk_sizes(columns, device, config.loss_chunk_size)[0]
        return cls(loaded, chunk, budget, facts.get("halvings", 0), on_progress)

    def teacher_score(self, split):
        return self.held_out[split].teacher_score

    def score_student(self, split, model=None):
        """Returns the score of `model` (default: the pair's student with its current weights)."""
        model = self.pair.student if model is None else model
        head = Head(model, self.pair.student_reader.vocabulary)
        while True:
            text, started, self.batch_started = self.held_out[split], self.budget.clock.now(), None
            try:
                on_batch = functools.partial(self._on_batch, f"scoring the student on {split} text")
                score = scoring.evaluate_student(model, head, text, self.chunk, on_batch)
                ended = self.budget.clock.now()
                self.budget.record("batch", ended - self.batch_started)
                self.budget.record(TASKS[split], ended - started)
                return score
            except Exception as error:
                if not memory.is_out_of_memory(error) or text.halved() is None:
                    raise
            memory.release_memory()
            self._halve()

    def score_student_with(self, weights, split):
        """Returns the score of the pair's student with other weights, and restores its own afterwards."""
        own_weights = loading.cpu_state_dict(self.pair.student)
        try:
            loading.load_cpu_state_dict(self.pair.student, weights)
            return self.score_student(split)
        finally:
            loading.load_cpu_state_dict(self.pair.student, own_weights)

    def _on_batch(self, phase, done, total):
        now = self.budget.clock.now()
        if self.batch_started is not None:
            self.budget.record("batch", now - self.batch_started)
        self.batch_started = now
        self.on_progress(phase, done, total)

    def _halve(self):
        self.halvings += 1
        self.held_out = {split: text.halved() or text for split, text in self.held_out.items()}
