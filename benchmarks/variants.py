"""Mixtures of kdlib's own ways of kd that no config asks for, for the quality study: kd by one way, half of its weight by
another.
"""

import dataclasses

import torch

from kdlib import inputs, parts
from kdlib.objective import Objective
from kdlib.projector import TeacherToStudentProjector


class Mixed(Objective):
    """An `Objective` with parts on logits that its config does not name: `more` holds `{name: share of the kd weight}`."""

    more = None

    def weights(self, progress=1.0):
        names = [name for name, part in self.parts.items() if name not in self.more]
        weights = {name: self.phase_factor(name, progress) for name in names}
        weights = {
            n: f * (getattr(self.config, f"{n}_weight") if self.parts[n].student else 1.0) for n, f in weights.items()
        }
        weights |= {name: share * self.config.kd_weight for name, share in self.more.items()}
        return {**weights, "kd": weights["kd"] - sum(weights[name] for name in self.more)}


class WithChunks(Mixed):
    """kd half by buckets, half by the likelihood of spans."""

    def wants(self, weights):
        return {**super().wants(weights), "spans": True}


class WithProjector(Mixed):
    """kd half by buckets, half by a projected teacher: rows are compared with the teacher's logits and, behind these, the
    projected ones.
    """

    def _compared(self, signal):
        buckets, projector, head = super()._compared(signal), self.beside["projector"], self.head
        return lambda known: torch.cat([buckets(known), head.decode(projector(signal.hidden[known]))], dim=1)


def with_chunks(pair, config, student):
    """`(objective, teacher)` of `WithChunks`."""
    objective = _mixed(WithChunks, pair, config, student, {"chunks": 0.5})
    objective.parts["chunks"] = parts.KD["chunk_likelihood"]["kd"]
    return objective, pair.teacher


def with_projector(pair, config, student):
    """`(objective, teacher)` of `WithProjector`."""
    objective = _mixed(WithProjector, pair, config, student, {"projected": 0.5})
    theirs = pair.teacher.shared_rows(pair.shared)
    objective.beside["projector"] = TeacherToStudentProjector(theirs.shape[1], objective.head.width)
    objective.beside["projector"].start_from(objective.head.rows(torch.from_numpy(pair.shared.student_ids)), theirs)
    width = pair.teacher.num_columns
    first, second = parts.KD["projector"].values()
    objective.parts |= {
        "kd": _on_columns(objective.parts["kd"], slice(None, width)),
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
        return part.values(objective, dataclasses.replace(rows, other=rows.other[:, columns]))

    return dataclasses.replace(part, values=values)
