"""How well a model knows held-out text, in units that can be compared across tokenizers."""

import dataclasses
import math

import numpy as np
import torch

from kdlib.align import vocab
from kdlib.data import batching
from kdlib.data.dataset import WindowDataset
from kdlib.data.windowing import IGNORE
from kdlib.evaluation.breakdown import Breakdown
from kdlib.losses import chunked_head, divergences, features
from kdlib.losses.teacher_signal import TeacherSignal
from kdlib.models import loading
from kdlib.models.pair import IncompatiblePairError

LN2 = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class Score:
    """What one model makes of held-out windows.

    `bits_per_byte` over the bytes that both tokenizations cover alike; `perplexity` per token of its own tokenizer (exp
    of the plain token loss); `kl_to_teacher` in nats and `top1_agreement` in [0, 1] at aligned positions, None without a
    teacher. `bits` and `num_bytes` hold the sums by document, for intervals; `retention` those of `Breakdown.to_dict` where
    the text asks for them.
    """

    bits_per_byte: float
    perplexity: float
    kl_to_teacher: float | None
    top1_agreement: float | None
    bits: np.ndarray
    num_bytes: np.ndarray
    retention: dict | None = None

    def to_dict(self):
        """Plain values that `from_dict` makes the same score of, even from JSON, where a NaN became null."""
        return {**dataclasses.asdict(self), "bits": self.bits.tolist(), "num_bytes": self.num_bytes.tolist()}

    @classmethod
    def from_dict(cls, values):
        figures = {name: _numbers(values[name]) for name in ("bits_per_byte", "perplexity")}
        bits, num_bytes = np.array(values["bits"], dtype=np.float64), np.array(values["num_bytes"])
        kept = values["retention"] and _numbers(values["retention"])
        return cls(**{**values, **figures, "bits": bits, "num_bytes": num_bytes, "retention": kept})

    def summary(self):
        """The four figures of an `eval` record."""
        names = ("bits_per_byte", "perplexity", "kl_to_teacher", "top1_agreement")
        return {name: getattr(self, name) for name in names}


def _numbers(value):
    """Plain values with NaN in place of null."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return math.nan if value is None else value


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out windows in batches, with the `TeacherSignal`s at their aligned positions (on the CPU, made once: the teacher
    does not change): last hidden states that `teacher_head` decodes, or top tokens where that is None. `windows` are those
    of each batch, in its order; `pads` and `widest` as for `batching.collate`. `buckets` are the `vocab.tail_buckets` of the
    pair; `same[j]` is the student id with the bytes of teacher column j, or -1. `teacher_score`: the teacher's own `Score`.
    `times_seen` `[ids]`: how often each of the student's tokens stands in the training text; where it is given, scores
    tell their retention.
    """

    batches: list
    windows: list
    signals: list
    teacher_head: object
    student_buckets: torch.Tensor
    teacher_buckets: torch.Tensor
    num_buckets: int
    same: torch.Tensor
    pads: tuple
    widest: tuple
    teacher_score: Score
    times_seen: torch.Tensor | None = None

    def halved(self):
        """The same text in batches half as large; None where each holds one window already."""
        if max(map(len, self.windows)) == 1:
            return None
        batches, groups, signals = [], [], []
        for whole, windows, signal in zip(self.batches, self.windows, self.signals, strict=True):
            rows, middle = torch.arange(whole.num_aligned).split(whole.rows_by_window), (len(windows) + 1) // 2
            for half in (slice(0, middle), slice(middle, None)):
                if windows[half]:
                    batches.append(batching.collate(windows[half], *self.pads, self.widest))
                    groups.append([windows[half][i] for i in batches[-1].order])
                    signals.append(signal.rows(torch.cat([rows[half][i] for i in batches[-1].order])))
        return dataclasses.replace(self, batches=batches, windows=groups, signals=signals)


def prepare_held_out(
    windows, teacher, student_head, shared, batch_size, pads=(0, 0), widest=(0, 0), times_seen=None, chunk_size="auto",
    on_batch=lambda done, total: None,
):  # fmt: skip
    """Prepares held-out `windows` for `evaluate_student` by one pass of the `teacher` over them, which scores it as well (it
    agrees with itself). `on_batch` is called before every batch; what it raises ends the pass.
    """
    ordered = sorted(windows, key=lambda window: len(window.student_ids))
    groups = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    batches = [batching.collate(group, *pads, widest) for group in groups]
    groups = [[group[i] for i in batch.order] for group, batch in zip(groups, batches, strict=True)]
    buckets = vocab.tail_buckets(student_head.vocabulary, teacher.reader.vocabulary, shared)
    ours, theirs, same = student_head.by_column(buckets.student), None, None
    if teacher.head is None:
        signals, score = [], teacher.known and Score.from_dict(teacher.known)
        for done, batch in enumerate(batches):
            on_batch(done, len(batches))
            signals.append(teacher(batch).to("cpu"))
    else:
        theirs = teacher.head.by_column(buckets.teacher)
        same = teacher.head.by_column(vocab.same_ids(teacher.reader.vocabulary, shared))
        signals, score = _read_live(teacher, batches, groups, times_seen is not None, chunk_size, on_batch)
    return HeldOut(
        batches, groups, signals, teacher.student_side_head, ours, theirs, buckets.num, same, pads, widest, score, times_seen
    )  # fmt: skip


@torch.no_grad()
def _read_live(teacher, batches, groups, retention, chunk_size, on_batch):
    """The `TeacherSignal` of each batch and the `Score` of a live teacher."""
    chunk_size, _ = chunked_head.chunk_sizes(teacher.head.num_rows, teacher.model.device, chunk_size)
    tally, signals = _Tally(groups, Breakdown() if retention else None), []
    for done, (batch, windows) in enumerate(zip(batches, groups, strict=True)):
        on_batch(done, len(batches))
        states, moved = teacher.states(batch), batch.to(teacher.model.device)
        of_window = (batch.teacher_windows * batch.teacher_scored).flatten()
        tally.add_text(teacher.head, states, moved.teacher_labels.flatten(), of_window, windows, chunk_size)
        signals.append(TeacherSignal(states[moved.teacher_rows].to("cpu", copy=True)))
    return signals, dataclasses.replace(tally.score(), kl_to_teacher=0.0, top1_agreement=1.0)


@torch.no_grad()
def evaluate_student(model, head, held_out, chunk_size="auto", on_batch=lambda done, total: None):
    """The `Score` of a student (in evaluation mode for the time of the call) on a `HeldOut`. `on_batch` is called before
    every batch; what it raises ends the evaluation.
    """
    columns = head.num_rows + (held_out.teacher_head.num_rows if held_out.teacher_head else 0)
    chunk_size, _ = chunked_head.chunk_sizes(columns, model.device, chunk_size)
    was_training = model.training
    model.eval()
    told = None if held_out.times_seen is None else Breakdown(held_out.times_seen)
    tally = _Tally(held_out.windows, told)
    try:
        parts = zip(held_out.batches, held_out.windows, held_out.signals, strict=True)
        for done, (batch, windows, signal) in enumerate(parts):
            on_batch(done, len(held_out.batches))
            moved = batch.to(model.device)
            states = loading.last_hidden(model, moved.student_ids, moved.student_windows, batch.student_packed)
            states = states.flatten(0, 1)
            of_window = batch.student_windows * batch.student_scored
            tally.add_text(head, states, moved.labels.flatten(), of_window.flatten(), windows, chunk_size)
            places = features.restart_positions(moved.student_windows).flatten()
            for first in range(0, len(moved.student_rows), chunk_size):
                part = slice(first, first + chunk_size)
                rows = moved.student_rows[part]
                at = moved.labels.flatten()[rows], places[rows]
                tally.add_pairs(head, states[rows], signal.rows(part), held_out, *at)
    finally:
        model.train(was_training)
    return tally.score()


def times_seen(vocabulary, windows, side="student"):
    """How often each of one side's tokens is to be predicted in some windows, int64 `[ids]`."""
    counts = np.zeros(vocabulary.num_rows, dtype=np.int64)
    for labels in WindowDataset.from_list(windows).labels(side):
        counts += np.bincount(labels, minlength=len(counts))
    return counts


def unigram_cross_entropy(vocabulary, side, train, held_out):
    """How one side (`teacher`, `student`) would read held-out text, in nats a token, if it knew nothing but how frequent its
    tokens are in the training windows (each counted once more than seen).
    """
    counts = 1.0 + times_seen(vocabulary, train, side)
    held = np.concatenate([getattr(window, f"{side}_labels") for group in held_out.windows for window in group])
    return -float(np.log(counts / counts.sum())[held[held != IGNORE]].mean())


class _Tally:
    """Sums over batches."""

    def __init__(self, groups, retention=None):
        self.retention = retention
        self.documents = sorted({w.document for group in groups for w in group})
        self.place = {document: i for i, document in enumerate(self.documents)}
        self.nats = np.zeros(len(self.documents))
        self.bytes = np.zeros(len(self.documents), dtype=np.int64)
        self.token_nats, self.num_tokens = 0.0, 0
        self.kl, self.agreed, self.num_pairs = 0.0, 0, 0

    def add_text(self, head, states, labels, of_window, windows, chunk_size):
        """Token losses of a batch: all of them for the perplexity, the scored ones for the bits. `of_window` (on the CPU)
        says in which window a position is scored, counted from 1; 0 in none.
        """
        rows = (labels != IGNORE).nonzero().squeeze(1)
        nats = torch.zeros(len(labels), dtype=torch.float64)
        for chunk in rows.split(chunk_size):
            logs, columns = divergences.log_softmax(head.decode(states[chunk])), head.columns(labels[chunk])
            nats[chunk.cpu()] = divergences.cross_entropy(logs, columns).double().cpu()
            if self.retention:
                self.retention.add_text(logs, columns)
        self.token_nats += float(nats.sum())
        self.num_tokens += len(rows)
        by_window = nats.new_zeros(len(windows) + 1).index_add(0, of_window, nats)[1:]
        for window, value in zip(windows, by_window.tolist(), strict=True):
            self.nats[self.place[window.document]] += value
            self.bytes[self.place[window.document]] += window.num_bytes

    def add_pairs(self, head, states, signal, held_out, labels, places):
        """Divergence and agreement at aligned positions, from the student's last hidden `states` and what the teacher says;
        `labels` and `places` as for `Breakdown.add_pairs`. From a cache the divergence is over the teacher's likeliest
        tokens and one tail: a lower bound that is close.
        """
        logits = head.decode(states)
        ours = divergences.bucket_log_probs(
            divergences.log_softmax(logits), held_out.student_buckets.to(logits.device), held_out.num_buckets
        )
        if held_out.teacher_head is None:
            top = signal.topk.to(logits.device)
            ours, theirs, best = (
                divergences.gather_with_tail(ours, held_out.student_buckets.to(logits.device)[head.columns(top.ids)]),
                top.log_probs,
                top.best,
            )
        else:
            theirs, best = self._decoded(signal.hidden, held_out, logits.device)
        kl, agreed = divergences.forward_kl(ours, theirs), head.columns(best) == logits.argmax(dim=-1)
        self.kl += float(kl.double().sum())
        self.agreed += int(agreed.sum())
        self.num_pairs += len(logits)
        if self.retention:
            self.retention.add_pairs(labels, places, theirs, kl, agreed)

    @staticmethod
    def _decoded(hidden, held_out, device):
        """The live teacher's log-probabilities of buckets, and the student id of its likeliest token."""
        head = held_out.teacher_head
        logits = head.decode(hidden.to(head.weight.device, head.weight.dtype)).to(device).float()
        theirs = divergences.bucket_log_probs(
            divergences.log_softmax(logits), held_out.teacher_buckets.to(device), held_out.num_buckets
        )
        return theirs, held_out.same.to(device)[logits.argmax(dim=-1)]

    def score(self):
        pairs = max(1, self.num_pairs)
        return Score(
            bits_per_byte=float(self.nats.sum() / LN2 / max(1, self.bytes.sum())),
            perplexity=math.exp(min(700.0, self.token_nats / max(1, self.num_tokens))),
            kl_to_teacher=self.kl / pairs if self.num_pairs else None,
            top1_agreement=self.agreed / pairs if self.num_pairs else None,
            bits=self.nats / LN2,
            num_bytes=self.bytes.copy(),
            retention=self.retention and self.retention.to_dict(),
        )


def check_teacher(teacher, train, held_out):
    """Refuse a teacher that reads held-out text worse than the bare frequencies of its tokens: its ids are not its own."""
    check_tokenizers_fit(
        math.log(held_out.teacher_score.perplexity),
        unigram_cross_entropy(teacher.reader.vocabulary, "teacher", train, held_out),
    )


def check_tokenizers_fit(nats, frequencies):
    """Raise `IncompatiblePairError` where a teacher reads at more nats a token than by the bare frequencies of its tokens, or at none that
    are a number.
    """
    if not math.isfinite(nats):
        raise IncompatiblePairError(
            "what the teacher says of this text is no number: its arithmetic overflows",
            "set --amp-dtype fp32, or take another teacher",
        )
    if nats > frequencies:
        raise IncompatiblePairError(
            f"the teacher reads this text at {nats:.2f} nats a token, worse than the bare frequencies of its tokens "
            f"({frequencies:.2f}): its tokenizer is probably another model's, or it never learned such text",
            "check the folder, or set --check-teacher false",
        )
