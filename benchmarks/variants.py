"""Ways of kd that no config of kdlib asks for, for the quality study: mixtures of its own ways, other weights of positions,
features averaged over spans, a narrower projector, fewer shared tokens; and its teacher cache. Each is made of
`(setting, config, student)` and gives `(objective, teacher)`.
"""

import dataclasses
import math
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

from kdlib.losses import divergences
from kdlib.models import forward, teacher_cache
from kdlib.models.projector import TeacherToStudentProjector
from kdlib.session import cache_writer, inputs
from kdlib.training import terms
from kdlib.training.objective import Objective


class Mixed(Objective):
    """An `Objective` with parts on logits that its config does not name: `more` holds `{name: share of the kd weight}`,
    which kd has less.
    """

    more = None

    def weights(self, progress=1.0):
        names = [name for name, part in self.terms.items() if name not in self.more]
        weights = {name: self.phase_factor(name, progress) for name in names}
        weights = {
            n: f * (getattr(self.config, f"{n}_weight") if self.terms[n].trains_student else 1.0)
            for n, f in weights.items()
        }
        weights |= {name: share * self.config.kd_weight for name, share in self.more.items()}
        return {**weights, "kd": weights["kd"] - sum(weights[name] for name in self.more)}


class WithChunks(Mixed):
    """kd half by buckets, half by the likelihood of spans."""

    def teacher_request(self, weights):
        return {**super().teacher_request(weights), "spans": True}


class WithProjector(Mixed):
    """kd half by buckets, half by a projected teacher: rows are compared with the teacher's logits and, behind these, the
    projected ones.
    """

    def _teacher_logits(self, signal, row_order=None):
        buckets, projector, head = super()._teacher_logits(signal, row_order), self.adapters["projector"], self.head
        return lambda known: torch.cat([buckets(known), head.decode(projector(signal.hidden[known]))], dim=1)


def with_chunks(setting, config, student):
    objective = _mixed(WithChunks, setting.inputs.pair, config, student, {"chunks": 0.5})
    objective.terms["chunks"] = terms.KD["chunk_likelihood"]["kd"]
    return objective, setting.inputs.pair.teacher


def weighted_by(weight):
    """kd with every aligned position's value times `weight(objective, rows)` `[m]`, without gradient."""

    def make(setting, config, student):
        objective = inputs.make_objective(setting.inputs.pair, config, student)
        part = objective.terms["kd"]

        def values(objective, rows):
            with torch.no_grad():
                factor = weight(objective, rows)
            return factor * part.fn(objective, rows)

        objective.terms["kd"] = dataclasses.replace(part, fn=values)
        return objective, setting.inputs.pair.teacher

    return make


def unsure_student(objective, rows):
    """`2 (1 - p(label))` of the student: more where it does not know the text yet."""
    return 2.0 * (1.0 - _label_probabilities(rows.log_probs()[: rows.num_aligned], rows.labels[: rows.num_aligned]))


def right_teacher(objective, rows):
    """`2 q` of the bucket of the label: more where the teacher agrees with the text."""
    buckets = divergences.bucket_log_probs(
        divergences.log_softmax(rows.teacher_logits), objective.teacher_buckets, objective.buckets.num
    )
    labels = rows.labels[: rows.num_aligned]
    return 2.0 * _label_probabilities(buckets, objective.student_buckets[labels.clamp_min(0)])


def sure_teacher(objective, rows):
    """`2 (1 - H / ln V)` of the teacher's distribution with entropy H over its V tokens: more where it is sure."""
    log_probs = divergences.log_softmax(rows.teacher_logits)
    entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    return 2.0 * (1.0 - entropy / math.log(log_probs.shape[-1]))


def _label_probabilities(log_probs, labels):
    return log_probs.gather(1, labels.clamp_min(0)[:, None])[:, 0].exp()


def from_cache(setting, config, student):
    """kdlib's own teacher cache. `setting.kept` says by `kept_as` what writing the training text took, in processor
    seconds.
    """
    pair, name = setting.inputs.pair, kept_as(config.to_dict())
    if name not in setting.kept:
        folder = Path(tempfile.mkdtemp(prefix="kdlib-cache-"))
        passing = cache_writer.cache_teacher(config, folder / "cache")
        next(passing)
        before = time.process_time()
        for _ in passing:
            pass
        held = [sum(map(len, part.windows)) for part in (setting.inputs.validation, setting.inputs.test)]
        share = len(setting.inputs.train) / (len(setting.inputs.train) + sum(held))
        teacher = teacher_cache.CachedTeacher([folder / "cache"])
        setting.kept[name] = (
            dataclasses.replace(pair, teacher=teacher, buckets={}),
            share * (time.process_time() - before),
        )
    cached, _ = setting.kept[name]
    return inputs.make_objective(cached, config, student), cached.teacher


def kept_as(changes):
    """What a cache is known by among those of its setting: what it must hold for a config with these changes."""
    return changes["kd_method"], changes.get("kd_top_k", 0), changes.get("contrastive_weight", 0.0) > 0


def by_index(window):
    """The window with student position i paired with teacher position i, as if the tokens were the same."""
    rows = np.arange(min(len(window.student_ids), len(window.teacher_ids)) - 1)
    return dataclasses.replace(
        window, student_rows=rows, teacher_rows=rows, student_span_ends=rows, teacher_span_ends=rows
    )


def with_projector(setting, config, student):
    pair = setting.inputs.pair
    objective = _mixed(WithProjector, pair, config, student, {"projected": 0.5})
    theirs = pair.teacher.shared_rows(pair.shared)
    objective.adapters["projector"] = TeacherToStudentProjector(theirs.shape[1], objective.head.width)
    objective.adapters["projector"].start_from(objective.head.rows(torch.from_numpy(pair.shared.student_ids)), theirs)
    width = pair.teacher.num_columns
    first, second = terms.KD["projector"].values()
    objective.terms |= {
        "kd": _on_columns(objective.terms["kd"], slice(None, width)),
        "projected": _on_columns(first, slice(width, None)),
        "projector": _on_columns(second, slice(width, None)),
    }
    return objective, pair.teacher


def _mixed(kind, pair, config, student, more):
    objective = inputs.make_objective(pair, config, student)
    objective.__class__, objective.more = kind, more  # the same tensors and parts, with more beside
    return objective


def _on_columns(part, columns):
    """The part as it is, fed with some columns of what the rows are compared with."""

    def values(objective, rows):
        return part.fn(objective, dataclasses.replace(rows, teacher_logits=rows.teacher_logits[:, columns]))

    return dataclasses.replace(part, fn=values)


class LowRank(torch.nn.Module):
    """The closed form of a `TeacherToStudentProjector`, cut to its largest `rank` singular values, as two matrices."""

    def __init__(self, whole, rank):
        super().__init__()
        left, values, right = torch.linalg.svd(whole.weight.detach(), full_matrices=False)
        self.up = torch.nn.Parameter(left[:, :rank] * values[:rank].sqrt())
        self.down = torch.nn.Parameter(values[:rank, None].sqrt() * right[:rank])

    def forward(self, teacher_hidden_ND):
        return F.linear(F.linear(teacher_hidden_ND.to(self.down.dtype), self.down), self.up)


def low_rank(rank):
    """`projector` with a matrix of that rank."""

    def make(setting, config, student):
        pair = setting.inputs.pair
        objective = inputs.make_objective(pair, config, student)
        objective.adapters["projector"] = LowRank(objective.adapters["projector"], rank)
        return objective, pair.teacher

    return make


def half_shared(setting, config, student):
    """Every second token that both vocabularies hold counts as one that only one of them does."""
    pair, shared = setting.inputs.pair, setting.inputs.pair.shared
    half = dataclasses.replace(shared, student_ids=shared.student_ids[::2], teacher_ids=shared.teacher_ids[::2])
    pair = dataclasses.replace(pair, shared=half, buckets={})
    return inputs.make_objective(pair, config, student), pair.teacher


def span_averages(setting, config, student):
    """Features of layers as the mean over the tokens since the aligned position before, on both sides."""
    pair = setting.inputs.pair
    objective = averaged(inputs.make_objective)(pair, config, student)
    objective.forward = averaged(objective.forward)
    teacher = averaged(pair.teacher)
    teacher.model = pair.teacher.model
    return objective, teacher


def averaged(call):
    """The call, with `span_means` of what it reads of layers."""

    def within(*args, **kwargs):
        with mock.patch.object(forward, "read", _read_averages):
            return call(*args, **kwargs)

    return within


def _read_averages(model, ids, windows, rows, rows_by_window, taps, spots=None, read=forward.read):
    whole = read(model, ids, windows, torch.arange(ids.numel()), rows_by_window, taps, spots)
    return dataclasses.replace(
        whole, layers=tuple(span_means(layer, windows.flatten(), rows) for layer in whole.layers)
    )


def span_means(values, windows, rows):
    """Means `[N, D]` of `values` `[P, D]` over positions `(row before, row]` of `rows` `[N]`, window by window; the first
    row of each window, numbered by `windows` `[P]`, stands for itself.
    """
    before = torch.cat([rows[:1] - 1, rows[:-1]])
    first = torch.ones_like(rows, dtype=torch.bool)
    first[1:] = windows[rows[1:]] != windows[rows[:-1]]
    before = torch.where(first, rows - 1, before)
    lengths = rows - before
    span_of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    offsets = torch.arange(len(span_of)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    picked = values[before[span_of] + 1 + offsets]
    sums = values.new_zeros(len(rows), values.shape[1]).index_add(0, span_of, picked)
    return sums / lengths[:, None].to(values.dtype)
