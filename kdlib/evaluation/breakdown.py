"""Agreement with the teacher and calibration on held-out positions, as sums over bins of several kinds."""

import torch

EDGES = {
    "frequency": (0, 1, 10, 100, 1000, 10_000),
    "position": (0, 8, 16, 32, 64, 128, 256, 512, 1024),
    "entropy": (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0),
    "confidence": tuple(i / 10 for i in range(10)),
}
"""Lower edges of the bins. `frequency`: training count of the next token; `position`: index in its window; `entropy`:
of the teacher's distribution, in nats; `confidence`: the model's probability of its most likely token."""


class Breakdown:
    """Sums by bin over scored positions. `times_seen` `[ids]`: training count of each student token, or None to collect
    confidence only.
    """

    def __init__(self, times_seen=None):
        self.times_seen = times_seen
        kinds = ("frequency", "position", "entropy") if times_seen is not None else ()
        self.sums = {kind: _zeros(kind, ("num", "kl", "agreed")) for kind in kinds}
        self.sums["confidence"] = _zeros("confidence", ("num", "confidence", "right"))

    def add_text(self, log_probs_NV, columns_N):
        """Adds positions with a label. `columns_N`: vocabulary column of the label."""
        best, predicted = log_probs_NV.max(dim=-1)
        confidence, right = best.exp(), predicted == columns_N
        self._add("confidence", confidence, num=torch.ones_like(confidence), confidence=confidence, right=right)

    def add_pairs(self, labels_N, positions_N, teacher_NB, kl_N, agreed_N):
        """Adds aligned positions: the student's next token id, its position, the teacher's bucket log-probabilities,
        the divergence in nats, and whether both models have the same most likely token.
        """
        values = {"num": torch.ones_like(kl_N), "kl": kl_N, "agreed": agreed_N}
        entropy = -(teacher_NB.exp() * teacher_NB).nan_to_num(0.0).sum(dim=-1)
        self._add("entropy", entropy, **values)
        self._add("position", positions_N, **values)
        self._add("frequency", self.times_seen.to(labels_N.device)[labels_N], **values)

    def _add(self, kind, key_N, **values):
        edges = torch.tensor(EDGES[kind][1:], device=key_N.device, dtype=torch.float64)
        bins = torch.bucketize(key_N.double(), edges, right=True)
        for name, value in values.items():
            sums = torch.zeros(len(edges) + 1, dtype=torch.float64, device=key_N.device)
            self.sums[kind][name] += sums.index_add(0, bins, value.double()).cpu()

    def to_dict(self):
        """Returns `{kind: {"from": lower edges, "num": positions by bin, ...: sums by bin}}`."""
        return {
            kind: {"from": list(EDGES[kind])}
            | {name: [round(x, 6) for x in sums.tolist()] for name, sums in table.items()}
            for kind, table in self.sums.items()
        }


def calibration_error(retention):
    """Returns the expected calibration error in [0, 1] over ten bins of equal width (Guo et al. 2017, arXiv 1706.04599,
    eq. 3), or None if `retention` (`Breakdown.to_dict`) is None.
    """
    if retention is None:
        return None
    sums = retention["confidence"]
    gaps = (abs(confidence - right) for confidence, right in zip(sums["confidence"], sums["right"], strict=True))
    return sum(gaps) / max(1.0, sum(sums["num"]))


def merge(breakdowns):
    """Sums the `to_dict` values of several runs on the same text; returns None if one of them is None."""
    if None in breakdowns:
        return None
    return {kind: _merge_tables([breakdown[kind] for breakdown in breakdowns]) for kind in breakdowns[0]}


def _merge_tables(tables):
    return {
        name: values if name == "from" else [sum(bins) for bins in zip(*(table[name] for table in tables), strict=True)]
        for name, values in tables[0].items()
    }


def _zeros(kind, names):
    return {name: torch.zeros(len(EDGES[kind]), dtype=torch.float64) for name in names}
