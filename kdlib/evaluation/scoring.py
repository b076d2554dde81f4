"""Scores of models on held-out text, in units that are comparable across tokenizers."""

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
from kdlib.models import forward
from kdlib.models.pair import IncompatiblePairError

LN2 = math.log(2.0)
METRICS = ("bits_per_byte", "perplexity", "kl_to_teacher", "top1_agreement")


@dataclasses.dataclass(frozen=True)
class Score:
    """Metrics of one model on held-out windows.

    `bits_per_byte` counts the bytes that both tokenizations cover. `perplexity` is per token of the model's tokenizer.
    `kl_to_teacher` (nats) and `top1_agreement` (in [0, 1]) are means over aligned positions, None without a teacher.
    `bits` and `num_bytes` are sums by document, for intervals. `retention`: `Breakdown.to_dict`, if computed.
    """

    bits_per_byte: float
    perplexity: float
    kl_to_teacher: float | None
    top1_agreement: float | None
    bits: np.ndarray
    num_bytes: np.ndarray
    retention: dict | None = None

    def to_dict(self):
        """Returns plain values for `from_dict`, which also restores a NaN that JSON stored as null."""
        return {**dataclasses.asdict(self), "bits": self.bits.tolist(), "num_bytes": self.num_bytes.tolist()}

    @classmethod
    def from_dict(cls, values):
        metrics = {name: _null_to_nan(values[name]) for name in ("bits_per_byte", "perplexity")}
        bits, num_bytes = np.array(values["bits"], dtype=np.float64), np.array(values["num_bytes"])
        retention = values["retention"] and _null_to_nan(values["retention"])
        return cls(**{**values, **metrics, "bits": bits, "num_bytes": num_bytes, "retention": retention})

    def summary(self):
        """Returns the four metrics of an `eval` record."""
        return {name: getattr(self, name) for name in METRICS}


def _null_to_nan(value):
    if isinstance(value, dict):
        return {key: _null_to_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_null_to_nan(item) for item in value]
    return math.nan if value is None else value


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out windows in batches, with the teacher's signal at their aligned positions.

    `windows` lists each batch's windows in batch order. `signals`: a `TeacherSignal` per batch, on the CPU: last hidden
    states for `teacher_head`, or top-k log-probabilities if that is None. `student_buckets`, `teacher_buckets`: bucket
    of each head column (`vocab.tail_buckets`). `same[j]`: the student id with the bytes of teacher column j, or -1.
    `pads`, `max_row_width`: arguments of `batching.collate`. `times_seen` `[ids]`: training count of each student
    token; scores have a `retention` only with it.
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
    max_row_width: tuple
    teacher_score: Score
    times_seen: torch.Tensor | None = None

    def halved(self):
        """Returns the same text in batches of half the size, or None if each batch is a single window."""
        if max(map(len, self.windows)) == 1:
            return None
        batches, groups, signals = [], [], []
        for full_batch, windows, signal in zip(self.batches, self.windows, self.signals, strict=True):
            rows, middle = (
                torch.arange(full_batch.num_aligned).split(full_batch.rows_by_window),
                (len(windows) + 1) // 2,
            )
            for half in (slice(0, middle), slice(middle, None)):
                if windows[half]:
                    batches.append(batching.collate(windows[half], *self.pads, self.max_row_width))
                    groups.append([windows[half][i] for i in batches[-1].order])
                    signals.append(signal.rows(torch.cat([rows[half][i] for i in batches[-1].order])))
        return dataclasses.replace(self, batches=batches, windows=groups, signals=signals)


def prepare_held_out(
    windows, teacher, student_head, shared, batch_size, pads=(0, 0), max_row_width=(0, 0), times_seen=None,
    chunk_size="auto", on_batch=lambda done, total: None,
):  # fmt: skip
    """Returns the `HeldOut` of some windows: runs the teacher over them once, which also gives the teacher's score.

    Calls `on_batch` before every batch; an exception raised there ends the pass.
    """
    ordered = sorted(windows, key=lambda window: len(window.student_ids))
    groups = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    batches = [batching.collate(group, *pads, max_row_width) for group in groups]
    groups = [[group[i] for i in batch.order] for group, batch in zip(groups, batches, strict=True)]
    buckets = vocab.tail_buckets(student_head.vocabulary, teacher.reader.vocabulary, shared)
    student_buckets, teacher_buckets, same = student_head.by_column(buckets.student), None, None
    if teacher.head is None:
        signals, score = [], teacher.score and Score.from_dict(teacher.score)
        for done, batch in enumerate(batches):
            on_batch(done, len(batches))
            signals.append(teacher(batch).to("cpu"))
    else:
        teacher_buckets = teacher.head.by_column(buckets.teacher)
        same = teacher.head.by_column(vocab.same_ids(teacher.reader.vocabulary, shared))
        signals, score = _evaluate_teacher(teacher, batches, groups, times_seen is not None, chunk_size, on_batch)
    return HeldOut(
        batches, groups, signals, teacher.student_side_head, student_buckets, teacher_buckets, buckets.num, same, pads,
        max_row_width, score, times_seen,
    )  # fmt: skip


@torch.no_grad()
def _evaluate_teacher(teacher, batches, groups, with_breakdown, chunk_size, on_batch):
    """Returns a live teacher's `TeacherSignal` for each batch, and its `Score`."""
    chunk_size, _ = chunked_head.chunk_sizes(teacher.head.num_rows, teacher.model.device, chunk_size)
    sums, signals = _Accumulator(groups, Breakdown() if with_breakdown else None), []
    for done, (batch, windows) in enumerate(zip(batches, groups, strict=True)):
        on_batch(done, len(batches))
        states, on_device = teacher.states(batch), batch.to(teacher.model.device)
        window_ids = (batch.teacher_windows * batch.teacher_scored).flatten()
        sums.add_text(teacher.head, states, on_device.teacher_labels.flatten(), window_ids, windows, chunk_size)
        signals.append(TeacherSignal(states[on_device.teacher_rows].to("cpu", copy=True)))
    return signals, dataclasses.replace(sums.score(), kl_to_teacher=0.0, top1_agreement=1.0)


@torch.no_grad()
def evaluate_student(model, head, held_out, chunk_size="auto", on_batch=lambda done, total: None):
    """Returns the `Score` of a student on a `HeldOut`, with the student in evaluation mode during the call.

    Calls `on_batch` before every batch; an exception raised there ends the evaluation.
    """
    columns = head.num_rows + (held_out.teacher_head.num_rows if held_out.teacher_head else 0)
    chunk_size, _ = chunked_head.chunk_sizes(columns, model.device, chunk_size)
    was_training = model.training
    model.eval()
    sums = _Accumulator(held_out.windows, None if held_out.times_seen is None else Breakdown(held_out.times_seen))
    try:
        items = zip(held_out.batches, held_out.windows, held_out.signals, strict=True)
        for done, (batch, windows, signal) in enumerate(items):
            on_batch(done, len(held_out.batches))
            on_device = batch.to(model.device)
            states = forward.last_hidden(model, on_device.student_ids, on_device.student_windows, batch.student_packed)
            states, labels = states.flatten(0, 1), on_device.labels.flatten()
            window_ids = (batch.student_windows * batch.student_scored).flatten()
            sums.add_text(head, states, labels, window_ids, windows, chunk_size)
            positions = features.restart_positions(on_device.student_windows).flatten()
            for first in range(0, len(on_device.student_rows), chunk_size):
                chunk = slice(first, first + chunk_size)
                rows = on_device.student_rows[chunk]
                sums.add_pairs(head, states[rows], signal.rows(chunk), held_out, labels[rows], positions[rows])
    finally:
        model.train(was_training)
    return sums.score()


def times_seen(vocabulary, windows, side="student"):
    """Returns how often each of one side's tokens is a label in some windows, int64 `[ids]`."""
    counts = np.zeros(vocabulary.num_rows, dtype=np.int64)
    for labels in WindowDataset.from_list(windows).labels(side):
        counts += np.bincount(labels, minlength=len(counts))
    return counts


def unigram_cross_entropy(vocabulary, side, train, held_out):
    """Returns the unigram cross-entropy of held-out text, in nats per token of one side (`teacher` or `student`), with
    add-one smoothed counts from the training windows.
    """
    counts = 1.0 + times_seen(vocabulary, train, side)
    labels = np.concatenate([getattr(window, f"{side}_labels") for group in held_out.windows for window in group])
    return -float(np.log(counts / counts.sum())[labels[labels != IGNORE]].mean())


class _Accumulator:
    """Sums over batches, for a `Score`."""

    def __init__(self, groups, breakdown=None):
        self.breakdown = breakdown
        documents = sorted({window.document for group in groups for window in group})
        self.index_of = {document: i for i, document in enumerate(documents)}
        self.nats = np.zeros(len(documents))
        self.bytes = np.zeros(len(documents), dtype=np.int64)
        self.token_nats, self.num_tokens = 0.0, 0
        self.kl, self.agreed, self.num_pairs = 0.0, 0, 0

    def add_text(self, head, states, labels, window_ids, windows, chunk_size):
        """Adds a batch's token losses: all for the perplexity, the scored ones for the bits. `window_ids` (on the CPU):
        1-based window in which a position is scored, or 0.
        """
        rows = (labels != IGNORE).nonzero().squeeze(1)
        nats = torch.zeros(len(labels), dtype=torch.float64)
        for chunk in rows.split(chunk_size):
            log_probs, columns = divergences.log_softmax(head.decode(states[chunk])), head.columns(labels[chunk])
            nats[chunk.cpu()] = divergences.cross_entropy(log_probs, columns).double().cpu()
            if self.breakdown:
                self.breakdown.add_text(log_probs, columns)
        self.token_nats += float(nats.sum())
        self.num_tokens += len(rows)
        by_window = nats.new_zeros(len(windows) + 1).index_add(0, window_ids, nats)[1:]
        for window, value in zip(windows, by_window.tolist(), strict=True):
            self.nats[self.index_of[window.document]] += value
            self.bytes[self.index_of[window.document]] += window.num_bytes

    def add_pairs(self, head, states, signal, held_out, labels, positions):
        """Adds divergence and agreement at aligned positions. `states`: the student's last hidden states; `labels` and
        `positions` as for `Breakdown.add_pairs`. With a cache, the KL is over the teacher's top-k and one tail bucket:
        a lower bound.
        """
        logits = head.decode(states)
        buckets = held_out.student_buckets.to(logits.device)
        student = divergences.bucket_log_probs(divergences.log_softmax(logits), buckets, held_out.num_buckets)
        if held_out.teacher_head is None:
            top_k = signal.topk.to(logits.device)
            student = divergences.gather_with_tail(student, buckets[head.columns(top_k.ids)])
            teacher, best = top_k.log_probs, top_k.best
        else:
            teacher, best = self._decode_teacher(signal.hidden, held_out, logits.device)
        kl, agreed = divergences.forward_kl(student, teacher), head.columns(best) == logits.argmax(dim=-1)
        self.kl += float(kl.double().sum())
        self.agreed += int(agreed.sum())
        self.num_pairs += len(logits)
        if self.breakdown:
            self.breakdown.add_pairs(labels, positions, teacher, kl, agreed)

    @staticmethod
    def _decode_teacher(hidden, held_out, device):
        """Returns the live teacher's bucket log-probabilities, and the student id of its most likely token."""
        head = held_out.teacher_head
        logits = head.decode(hidden.to(head.weight.device, head.weight.dtype)).to(device).float()
        buckets = held_out.teacher_buckets.to(device)
        log_probs = divergences.bucket_log_probs(divergences.log_softmax(logits), buckets, held_out.num_buckets)
        return log_probs, held_out.same.to(device)[logits.argmax(dim=-1)]

    def score(self):
        return Score(
            bits_per_byte=float(self.nats.sum() / LN2 / max(1, self.bytes.sum())),
            perplexity=math.exp(min(700.0, self.token_nats / max(1, self.num_tokens))),
            kl_to_teacher=self.kl / self.num_pairs if self.num_pairs else None,
            top1_agreement=self.agreed / self.num_pairs if self.num_pairs else None,
            bits=self.nats / LN2,
            num_bytes=self.bytes.copy(),
            retention=self.breakdown and self.breakdown.to_dict(),
        )


def check_teacher(teacher, train, held_out):
    """Raises `IncompatiblePairError` if the teacher does not beat the unigram cross-entropy of the held-out text."""
    check_tokenizers_fit(
        math.log(held_out.teacher_score.perplexity),
        unigram_cross_entropy(teacher.reader.vocabulary, "teacher", train, held_out),
    )


def check_tokenizers_fit(nats, unigram):
    """Raises `IncompatiblePairError` if the loss `nats` is not finite, or exceeds the `unigram` cross-entropy."""
    if not math.isfinite(nats):
        raise IncompatiblePairError(
            "the teacher's loss on this text is not finite: its arithmetic overflows",
            "set --amp-dtype fp32, or use another teacher",
        )
    if nats > unigram:
        raise IncompatiblePairError(
            f"the teacher's loss on this text is {nats:.2f} nats per token, above the unigram cross-entropy "
            f"({unigram:.2f}): its tokenizer is probably another model's, or it was never trained on such text",
            "check the folder, or set --check-teacher false",
        )
