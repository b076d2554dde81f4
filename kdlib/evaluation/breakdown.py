"""Where a student says what its teacher says, and whether it is as sure as it is right: sums over held-out positions, by
kind of position.
"""

import torch

EDGES = {
    "frequency": (0, 1, 10, 100, 1000, 10_000),
    "position": (0, 8, 16, 32, 64, 128, 256, 512, 1024),
    "entropy": (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0),
    "confidence": tuple(i / 10 for i in range(10)),
}
"""Where each bin begins. `frequency`: how often the token that comes next stands in the training text; `position`: tokens
of the window read before; `entropy`: of the teacher's distribution, nats; `confidence`: the model's probability of its
likeliest token."""


class Breakdown:
    """Sums by bin, filled while a model is scored. `times_seen` `[ids]`: how often each of the student's tokens stands in
    the training text; None where a model's agreement with the teacher is not asked for.
    """

    def __init__(self, times_seen=None):
        self.times_seen = times_seen
        kinds = ("frequency", "position", "entropy") if times_seen is not None else ()
        self.sums = {kind: _empty(kind, ("num", "kl", "agreed")) for kind in kinds}
        self.sums["confidence"] = _empty("confidence", ("num", "confidence", "right"))

    def add_text(self, logs_NV, columns_N):
        """Positions with a label: log-probabilities, and the column of what came next."""
        best, place = logs_NV.max(dim=-1)
        sure = best.exp()
        self._add("confidence", sure, num=torch.ones_like(sure), confidence=sure, right=(place == columns_N))

    def add_pairs(self, labels_N, places_N, teacher_NB, kl_N, agreed_N):
        """Aligned positions: the student's next token (an id), tokens read before, the teacher's
        log-probabilities of buckets, divergence in nats, whether both find the same token likeliest.
        """
        values = {"num": torch.ones_like(kl_N), "kl": kl_N, "agreed": agreed_N}
        entropy = -(teacher_NB.exp() * teacher_NB).nan_to_num(0.0).sum(dim=-1)
        self._add("entropy", entropy, **values)
        self._add("position", places_N, **values)
        self._add("frequency", self.times_seen.to(labels_N.device)[labels_N], **values)

    def _add(self, kind, where, **values):
        edges = torch.tensor(EDGES[kind][1:], device=where.device, dtype=torch.float64)
        bins = torch.bucketize(where.double(), edges, right=True)
        for name, value in values.items():
            summed = torch.zeros(len(edges) + 1, dtype=torch.float64, device=where.device)
            self.sums[kind][name] += summed.index_add(0, bins, value.double()).cpu()

    def to_dict(self):
        """`{kind: {"from": where bins begin, "num": positions, ...: sums}}`; bins above the last position are left out."""
        return {kind: _told(kind, sums) for kind, sums in self.sums.items()}


def calibration_error(told):
    """How far confidence and correctness lie apart on average, in [0, 1]: the expected calibration error of Guo et al. 2017,
    arXiv 1706.04599, eq. 3, over ten bins of equal width. None where nothing is told.
    """
    if told is None:
        return None
    sums = told["confidence"]
    apart = (abs(sure - right) for sure, right in zip(sums["confidence"], sums["right"], strict=True))
    return sum(apart) / max(1.0, sum(sums["num"]))


def merge(several):
    """The sums of several runs on the same text as one; None where one of them has none."""
    if None in several:
        return None
    return {kind: _added([each[kind] for each in several]) for kind in several[0]}


def _added(tables):
    return {
        name: tables[0][name]
        if name == "from"
        else [sum(values) for values in zip(*(t[name] for t in tables), strict=True)]
        for name in tables[0]
    }


def _empty(kind, names):
    return {name: torch.zeros(len(EDGES[kind]), dtype=torch.float64) for name in names}


def _told(kind, sums):
    return {"from": list(EDGES[kind])} | {
        name: [round(value, 6) for value in values.tolist()] for name, values in sums.items()
    }
