"""Which part of the objective is fed what. One row in PARTS is one part."""

import dataclasses

import torch

from kdlib import fused, losses, models
from kdlib.data import IGNORE


@dataclasses.dataclass(frozen=True)
class Rows:
    """One chunk of rows as the parts see it.

    `student` `[n, Vs]`: logits; `labels` `[n]`: columns of the logits, IGNORE where nothing is learned; `hidden` `[m, Dt]`:
    the teacher's last hidden states of the first m rows, those with a teacher signal; `projected` `[m, Vs]`: those states
    through projector and head, where there is a projector.
    """

    student: torch.Tensor
    labels: torch.Tensor
    hidden: torch.Tensor
    projected: torch.Tensor | None

    @property
    def aligned(self):
        return self.student[: len(self.hidden)]


@dataclasses.dataclass(frozen=True)
class Part:
    """A part: its values per position from the `Rows` of a chunk, its weight in a config, the positions it counts
    (`labels` or `aligned`). Without `student` it trains only its own weights and stays out of the student's total.
    """

    values: object
    weight: object
    counts: str
    student: bool = True


def _lm(objective, rows):
    return losses.cross_entropy(rows.student, rows.labels, objective.config.label_smoothing)


def _kd_projector(objective, rows):
    return objective.divergence(rows.aligned, rows.projected.detach())


def _kd_buckets(objective, rows):
    config, head = objective.config, objective.teacher_head
    with torch.no_grad():
        teacher = head.decode(rows.hidden.to(head.weight.device, head.weight.dtype)).to(rows.student.device)
    buckets = objective.student_buckets, objective.teacher_buckets, objective.num_buckets
    return losses.bucket_divergence(rows.aligned, teacher, *buckets, config.kd_divergence, config.kd_temperature)


def _projector(objective, rows):
    return losses.cross_entropy(rows.projected, rows.labels[: len(rows.hidden)])


LM = {"lm": Part(_lm, lambda config: config.lm_weight, "labels")}
KD = {
    "none": {},
    "shared_vocab": {"kd": Part(_kd_buckets, lambda config: config.kd_weight, "aligned")},
    "shared_prefix": {"kd": Part(_kd_buckets, lambda config: config.kd_weight, "aligned")},
    "projector": {
        "kd": Part(_kd_projector, lambda config: config.kd_weight, "aligned"),
        "projector": Part(_projector, lambda config: 1.0, "aligned", student=False),
    },
}


class Objective(torch.nn.Module):
    """The student with everything that is trained beside it. `forward` gives the loss of one micro-batch.

    The student learns through its logits only: what a part makes of the head or the projector by itself reaches the
    projector's weight and nothing else. `projector` is None but for `kd_method` projector; `buckets` (`vocab.Buckets`)
    and the teacher's live `teacher_head` are for `shared_vocab` and `shared_prefix`. An `nn.Module`, so that a
    distributed wrapper sees all it has to sync.
    """

    def __init__(self, student, head, config, projector=None, teacher_head=None, buckets=None):
        super().__init__()
        self.student = student
        self.head = head
        self.config = config
        self.projector = projector
        self.teacher_head = teacher_head
        self.parts = {**LM, **KD[config.kd_method]}
        if buckets is not None:
            self.num_buckets = buckets.num
            self.register_buffer("student_buckets", head.by_column(buckets.student), persistent=False)
            self.register_buffer("teacher_buckets", teacher_head.by_column(buckets.teacher), persistent=False)

    def divergence(self, student, teacher):
        return losses.distillation(student, teacher, self.config.kd_divergence, self.config.kd_temperature)

    def forward(self, batch, signal, counts):
        """`(loss, parts)` of one micro-batch: `loss` to call backward on, `parts` unweighted `[]` tensors by name, for the
        record only.

        `counts` holds `labels` and `aligned`, the positions of the whole optimizer step: losses of its micro-batches add
        up to those of the step.
        """
        hidden = models.last_hidden(self.student, batch.student_ids, batch.student_mask).flatten(0, 1)
        labels = self.head.columns(batch.labels.flatten())
        known = hidden.new_zeros(0, 1) if signal is None else signal.hidden
        rows = self._rows(batch, labels, len(known))
        labels = labels[rows]

        def losses_of(logits, start):
            states = known[start : start + len(logits)]
            projected = self.head.decode(self.projector(states)) if self.projector is not None else None
            chunk = Rows(logits, labels[start : start + len(logits)], states, projected)
            values = [losses.token_mean(part.values(self, chunk), counts[part.counts]) for part in self.parts.values()]
            return torch.stack(values).float()

        weights = [part.weight(self.config) for part in self.parts.values()]
        extra = () if self.projector is None else tuple(self.projector.parameters())
        loss, parts = fused.head_losses(
            hidden[rows], self.head.weight, self.head.bias, losses_of, weights, self.config.loss_chunk_size, extra
        )
        return loss, dict(zip(self.parts, parts, strict=True))

    def _rows(self, batch, labels, num_known):
        """Flat positions that take part: first those with a teacher signal, in its order, then those with a label only."""
        if not num_known:
            return (labels != IGNORE).nonzero().squeeze(1)
        alone = labels != IGNORE
        alone[batch.student_rows] = False
        return torch.cat([batch.student_rows, alone.nonzero().squeeze(1)])

    def total(self, parts):
        """The student's loss and each part's share of it, from unweighted parts (floats)."""
        weighted = {n: p.weight(self.config) * parts[n] for n, p in self.parts.items() if p.student}
        loss = sum(weighted.values())
        return loss, {name: value / loss if loss else 0.0 for name, value in weighted.items()}
