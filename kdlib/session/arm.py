"""One student of a run, from its start weights to its scores: what is known of it, and how it is scored."""

import dataclasses
import functools

from kdlib import memory
from kdlib.evaluation import scoring
from kdlib.losses import chunked_head
from kdlib.models import loading
from kdlib.session import alerts

DISTILLED, CONTROL = "distilled", "ce_only"
TASKS = {"validation": "evaluate", "test": "test"}
"""What a `Budget` calls the scoring of a split."""


@dataclasses.dataclass
class Arm:
    """One student in training: which it is, how far it goes, and what it came to.

    `num_steps` is the plan its learning rate is fitted to, `last_step` where it stops, `compare_step` where it is set
    against the other leg; `step` where it is, `evaluated` the last step that was scored. `best_weights` are those of the
    best validation score so far, `best_averaged` says whether they are a running average. `at_compare` and `at_end` are
    test scores of the best weights up to there. `gradient_checkpointing`: whether `gradient_checkpointing auto` turned it on, None where
    it was not asked yet.
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
    watch: alerts.Watch = dataclasses.field(default_factory=alerts.Watch)

    @property
    def done(self):
        return self.at_end is not None

    def of(self, record):
        """Whether a record tells of this leg."""
        return (record.get("run"), record.get("repeat")) == (self.name, self.repeat)

    def facts(self):
        """Plain values that `from_facts` makes the same leg of, but for its weights and its watch."""
        kept = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        kept = {name: value for name, value in kept.items() if name not in ("best_weights", "watch")}
        return {**kept, **{name: kept[name] and kept[name].to_dict() for name in ("at_compare", "at_end")}}

    @classmethod
    def from_facts(cls, facts, best_weights, records):
        """The leg, its watch having seen all `records` again."""
        scores = {name: facts[name] and scoring.Score.from_dict(facts[name]) for name in ("at_compare", "at_end")}
        arm = cls(**{**facts, **scores}, best_weights=best_weights)
        for record in records:
            if arm.of(record) and record["kind"] in ("train", "eval") and not record.get("asked"):
                list(arm.watch.see(record))
        return arm


class Scorer:
    """Scores the pair's models on validation and test text. Where memory runs out, batches are halved for good.

    `chunk` and `halvings` are what a later session needs to get the same numbers to the last bit. `on_progress(phase, done,
    total)` is called before every batch, and may raise; the `budget` is told what a batch and a whole split take.
    """

    def __init__(self, loaded, chunk, budget, halvings=0, on_progress=lambda phase, done, total: None):
        self.pair, self.chunk, self.budget, self.on_progress = loaded.pair, chunk, budget, on_progress
        self.held_out = {"validation": loaded.validation, "test": loaded.test}
        self.batch_at, self.halvings = None, 0
        for _ in range(halvings):
            self._halve()

    @classmethod
    def of(cls, loaded, config, device, facts, budget, on_progress):
        """The scorer of a run, as the `facts` of its checkpoint (or none) have it."""
        if facts and facts["config"]["loss_chunk_size"] != config.loss_chunk_size:
            facts["chunk"] = facts["course"]["training"]["rows_at_once"] = None
        columns = loaded.pair.head.num_rows + loaded.pair.teacher.num_columns
        chunk = facts.get("chunk") or chunked_head.chunk_sizes(columns, device, config.loss_chunk_size)[0]
        return cls(loaded, chunk, budget, facts.get("halvings", 0), on_progress)

    def teacher(self, split):
        """The teacher's score, which is known since the held-out text was prepared."""
        return self.held_out[split].teacher_score

    def student(self, split, model=None):
        """The score of a student (default: the pair's, as it is now)."""
        model = self.pair.student if model is None else model
        head = loading.Head(model, self.pair.student_reader.vocabulary)
        while True:
            text, started, self.batch_at = self.held_out[split], self.budget.clock.now(), None
            try:
                on_batch = functools.partial(self._next_batch, f"scoring the student on {split} text")
                score = scoring.evaluate_student(model, head, text, self.chunk, on_batch)
                ended = self.budget.clock.now()
                self.budget.record("batch", ended - self.batch_at)
                self.budget.record(TASKS[split], ended - started)
                return score
            except Exception as error:
                if not memory.is_out_of_memory(error) or text.halved() is None:
                    raise
            memory.release_memory()
            self._halve()

    def student_with(self, weights, split):
        """The score of the pair's student with other weights, which it has for this long only."""
        now = loading.cpu_state_dict(self.pair.student)
        try:
            loading.load_cpu_state_dict(self.pair.student, weights)
            return self.student(split)
        finally:
            loading.load_cpu_state_dict(self.pair.student, now)

    def _next_batch(self, phase, done, total):
        now = self.budget.clock.now()
        if self.batch_at is not None:
            self.budget.record("batch", now - self.batch_at)
        self.batch_at = now
        self.on_progress(phase, done, total)

    def _halve(self):
        self.halvings += 1
        self.held_out = {split: text.halved() or text for split, text in self.held_out.items()}
