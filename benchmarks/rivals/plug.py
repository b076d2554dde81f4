"""How the rivals are plugged into kdlib's training loop: each says what of a micro-batch its paper compares.

A rival is a class made of `(pair, student, config)`, with the modules it trains in `beside` and `kd(whole)`, a `[] tensor`:
its loss as the mean over its own positions, as its paper takes it. `RivalObjective` puts next-token cross-entropy beside it.
"""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.rivals import dskd, gold, mined, uld
from kdlib.data.windowing import IGNORE
from kdlib.losses import divergences
from kdlib.models import forward
from kdlib.models.head import Head
from kdlib.training import terms


@dataclasses.dataclass(frozen=True)
class Whole:
    """One micro-batch, every position of both models, flattened: P of the student's, Q of the teacher's, with padding.

    `student_hidden` `[P, D]`, `student_logits` `[P, V]`, `teacher_hidden` `[Q, E]`; `batch` as from `batching.collate`.
    """

    batch: object
    student_hidden: torch.Tensor
    student_logits: torch.Tensor
    teacher_hidden: torch.Tensor

    def by_window(self, side):
        """The flat positions of a side that have a label, for each window, in order."""
        labels = self.batch.labels if side == "student" else self.batch.teacher_labels
        windows = getattr(self.batch, f"{side}_windows").flatten()
        rows = (labels.flatten() != IGNORE).nonzero().squeeze(1)
        ordered = rows[windows[rows].argsort(stable=True)]
        return ordered.split(torch.bincount(windows[rows], minlength=len(self.batch.window_ids) + 1)[1:].tolist())


class WholeTeacher:
    """A `kdlib.models.teacher.Teacher` that gives its last hidden states at all positions, `[Q, E]`."""

    def __init__(self, teacher):
        self.model = teacher.model

    @torch.no_grad()
    def __call__(self, batch):
        read = batch.teacher_ids, batch.teacher_windows, batch.teacher_packed
        return forward.last_hidden(self.model, *read).flatten(0, 1)


class Uld:
    """ULD over positions paired by their number in the window."""

    def __init__(self, pair, student, config):
        self.adapters = torch.nn.ModuleDict()
        self.teacher_head = pair.teacher.head

    def kd(self, whole):
        pairs = zip(whole.by_window("student"), whole.by_window("teacher"), strict=True)
        ours, theirs = (torch.cat(rows) for rows in zip(*(uld.index_pairs(*pair) for pair in pairs), strict=True))
        student = divergences.log_softmax(whole.student_logits[ours]).exp()
        teacher = divergences.log_softmax(self.teacher_head.decode(whole.teacher_hidden[theirs])).exp()
        return uld.sorted_distance(student, teacher).mean()


class Gold:
    """GOLD's hybrid over the spans that both tokenizations delimit."""

    def __init__(self, pair, student, config):
        self.adapters = torch.nn.ModuleDict()
        self.teacher_head, student_head = pair.teacher.head, Head(student, pair.student_reader.vocabulary)
        self.student_ids = student_head.columns(torch.from_numpy(pair.shared.student_ids))
        self.teacher_ids = self.teacher_head.columns(torch.from_numpy(pair.shared.teacher_ids))

    def kd(self, whole):
        batch = whole.batch
        spans = (
            (batch.student_span_ends > batch.student_rows) & (batch.teacher_span_ends > batch.teacher_rows)
        ).nonzero()[:, 0]
        ours = self._merged(
            whole.student_logits, batch.labels, batch.student_rows[spans], batch.student_span_ends[spans]
        )
        teacher_logits = self.teacher_head.decode(whole.teacher_hidden)
        columns = self.teacher_head.columns(batch.teacher_labels)
        theirs = self._merged(teacher_logits, columns, batch.teacher_rows[spans], batch.teacher_span_ends[spans])
        return gold.hybrid(ours, theirs, self.student_ids, self.teacher_ids).mean()

    @staticmethod
    def _merged(logits, labels, firsts, stops):
        """`gold.merged` of spans whose tokens are predicted by the rows `firsts` to `stops`."""
        log_probs = divergences.log_softmax(logits)
        nats = F.nll_loss(log_probs, labels.flatten(), ignore_index=IGNORE, reduction="none")
        until = F.pad(nats.cumsum(0, dtype=torch.float64), (1, 0))  # sums of many rows, differences of few
        return gold.merged(log_probs[firsts], (until[firsts + 1] - until[stops]).to(log_probs.dtype))


class Dskd:
    """DSKD with cross-model attention; its projectors learn at `projector_learning_rate`."""

    def __init__(self, pair, student, config):
        self.student, self.teacher, self.temperature = student, pair.teacher.model, config.kd_temperature
        self.head, self.teacher_head = Head(student, pair.student_reader.vocabulary), pair.teacher.head
        widths = student.config.hidden_size, pair.teacher.config.hidden_size
        self.adapters = torch.nn.ModuleDict({"rival": dskd.Projectors(*widths)})

    def kd(self, whole):
        ours = self._side(whole, "student", whole.student_hidden, whole.batch.labels, self.student)
        theirs = self._side(whole, "teacher", whole.teacher_hidden, whole.batch.teacher_labels, self.teacher)
        logits = whole.student_logits[torch.cat(whole.by_window("student"))], self.teacher_head.decode(theirs.states)
        heads = self.head.weight, self.teacher_head.weight
        return sum(dskd.losses(self.adapters["rival"], ours, theirs, *logits, *heads, self.temperature).values())

    @staticmethod
    def _side(whole, side, hidden, labels, model):
        parts = whole.by_window(side)
        rows = torch.cat(parts)
        embed = model.get_input_embeddings().weight.detach()
        ids, labels = getattr(whole.batch, f"{side}_ids").flatten()[rows], labels.flatten()[rows]
        return dskd.Side(hidden[rows], embed[ids], embed[labels], labels, list(map(len, parts)))


class MinEd:
    """MinED; alignments of windows are made once and kept, as the paper makes them before training."""

    def __init__(self, pair, student, config):
        self.adapters = torch.nn.ModuleDict()
        self.teacher_head, self.num_student = pair.teacher.head, pair.student_reader.vocabulary.num_rows
        if "mined" not in pair.buckets:  # seconds for two vocabularies, and every run asks
            tokens = [reader.vocabulary.tokens for reader in (pair.student_reader, pair.teacher.reader)]
            bare = [[(token or b"").replace(b" ", b"") for token in side] for side in tokens]
            pair.buckets["mined"] = mined.edit_distances(*bare), mined.nearest(tokens[1], tokens[0]), {}
        self.costs, self.student_of, self.known = pair.buckets["mined"]

    def kd(self, whole):
        batch, ours, theirs = whole.batch, whole.by_window("student"), whole.by_window("teacher")
        chosen, matched = [], []
        for place, left, right in zip(batch.window_ids, ours, theirs, strict=True):
            if place not in self.known:
                self.known[place] = self._aligned(batch.student_ids.flatten()[left], batch.teacher_ids.flatten()[right])
            against, fits = self.known[place]
            chosen.append(right[against])
            matched.append(fits)
        rows, matched = torch.cat(ours), torch.cat(matched)
        theirs = whole.teacher_hidden.new_zeros(len(rows), self.teacher_head.num_rows)
        theirs[matched] = self.teacher_head.decode(whole.teacher_hidden[torch.cat(chosen)[matched]])
        target = torch.from_numpy(self.student_of)
        return mined.loss(whole.student_logits[rows], theirs, target, matched, batch.labels.flatten()[rows]).mean()

    def _aligned(self, student_ids, teacher_ids):
        """For each student token the place of the teacher token it stands against, and whether the two match."""
        if not len(student_ids) or not len(teacher_ids):
            return torch.zeros(len(student_ids), dtype=torch.long), torch.zeros(len(student_ids), dtype=torch.bool)
        student_ids, teacher_ids = student_ids.numpy(), teacher_ids.numpy()
        matches = mined.warp(self.costs[student_ids[:, None], teacher_ids[None]])
        against = np.array([match[0] for match in matches])
        fits = np.array([len(match) == 1 for match in matches]) & (self.student_of[teacher_ids[against]] == student_ids)
        return torch.from_numpy(against), torch.from_numpy(fits)


RIVALS = {"ULD": Uld, "GOLD hybrid": Gold, "DSKD-CMA": Dskd, "MinED": MinEd}


class RivalObjective(torch.nn.Module):
    """`lm_weight` next-token cross-entropy and `kd_weight` a rival's loss: what `kdlib.training.loop.TrainLoop` asks of
    an objective, for steps of one micro-batch and vocabularies without gaps.
    """

    def __init__(self, rival, pair, student, config):
        super().__init__()
        self.student, self.config = student, config
        self.head = Head(student, pair.student_reader.vocabulary)
        self.rival = rival(pair, student, config)
        self.adapters = self.rival.adapters
        self.terms = {"lm": terms.LM["lm"], "kd": terms.KD["first_token"]["kd"]}
        self.chunk_sizes = None

    def weights(self, progress=1.0):
        return {"lm": self.config.lm_weight, "kd": self.config.kd_weight}

    def teacher_request(self, weights):
        return {}

    def forward(self, batch, signal, counts, weights, measure=False):
        hidden = forward.last_hidden(self.student, batch.student_ids, batch.student_windows, batch.student_packed)
        hidden = hidden.flatten(0, 1)
        logits = self.head.decode(hidden)
        nats = divergences.cross_entropy(divergences.log_softmax(logits), batch.labels.flatten())
        found = {
            "lm": divergences.token_mean(nats, counts["labels"]),
            "kd": self.rival.kd(Whole(batch, hidden, logits, signal)),
        }
        return sum(weights[name] * value for name, value in found.items()), found, {}

    def total(self, parts, weights):
        weighted = {name: weights[name] * parts[name] for name in self.terms}
        loss = sum(weighted.values())
        return loss, {name: value / loss for name, value in weighted.items()}
