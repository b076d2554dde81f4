"""Bad signs in a run's records, seen as they come: each is a record of kind `alert` with what it means and what to try."""

import collections
import math

RECENT = 20
"""Train records that a sign must hold over, on the mean."""
DOMINANT = 0.8
STALE_EVALUATIONS = 5
PLATEAU = 0.2
"""Fraction of the plan over which the loss must still fall, by at least half a percent."""


class Watch:
    """Looks at the records of one leg; `see(record)` gives the alerts that this record raises, each sign once.

    A sign that comes from steps without a number is told at the first such step and at every tenth after it. In records from
    a file NaN and infinity are null, which is a sign of nothing.
    """

    def __init__(self, micro_batch=None):
        self.micro_batch = micro_batch
        self.raised = set()
        self.recent = collections.deque(maxlen=RECENT)
        self.parts = collections.deque()
        self.best, self.stale, self.num_skipped, self.in_a_row = math.inf, 0, 0, 0

    def see(self, record):
        """Alerts (dicts) for a `train` or `eval` record of this leg."""
        signs = self._of_training(record) if record["kind"] == "train" else self._of_evaluation(record)
        known = {"run": record["run"], "repeat": record["repeat"], "step": record["step"]}
        told = []
        for sign, part, meaning, advice in signs:
            if (sign, part) not in self.raised or sign == "non_finite":
                self.raised.add((sign, part))
                told.append(
                    {"kind": "alert", **known, "sign": sign, "part": part, "meaning": meaning, "advice": advice}
                )
        return told

    def _of_training(self, record):
        if (record["micro_batch"] or math.inf) < (self.micro_batch or 0):
            yield (
                "memory", str(record["micro_batch"]),
                f"memory ran out: {record['micro_batch']} windows at once instead of {self.micro_batch}, with as many more "
                "forward passes; a step stays what it was",
                "lower batch_size and raise grad_accumulation by as much, to be spared the search",
            )  # fmt: skip
        self.micro_batch = record["micro_batch"] or self.micro_batch
        if record["skipped"]:
            yield from self._skipped(record)
            return
        self.in_a_row = 0
        self.recent.append(record)
        progress = _number(record["step"]) / (record["last_step"] or math.nan)
        if _number(record["parts"].get("layerwise")) > 2.0:
            yield (
                "layerwise", "layerwise", f"layerwise is {record['parts']['layerwise']:.2f}; 1 - cosine can't exceed 2",
                "this is a fault of kdlib: please report it with config.json",
            )  # fmt: skip
        if len(self.recent) == RECENT:
            yield from self._lasting(progress)
        yield from self._plateau(record, progress)

    def _lasting(self, progress):
        """Signs that must hold over the recent records."""
        names = list(self.recent[-1]["shares"])
        for name in names if len(names) > 1 and progress > 0.1 else ():
            share = sum(_number(r["shares"].get(name, 0.0)) for r in self.recent) / RECENT
            if share > DOMINANT:
                yield (
                    "dominance", name, f"{name} makes up {share:.0%} of the loss",
                    "look at its share of the gradient, which is what competes; where that is as high, lower "
                    f"{name}_weight, raise another or set balance auto",
                )  # fmt: skip
        loss = sum(_number(r["loss"]) for r in self.recent) / RECENT
        if progress > 0.2 and loss > 15:
            yield (
                "high_loss", None, f"the loss is {loss:.1f} after a fifth of the plan",
                "lower learning_rate, or kd_temperature (the divergence grows with its square)",
            )  # fmt: skip

    def _plateau(self, record, progress):
        """No fall of the mean loss from one tenth of the plan to the next, by the weights of now and the parts that are in
        both: a part that the curriculum brings in is no plateau.
        """
        if math.isnan(progress):
            return
        width = max(RECENT, round(PLATEAU / 2 * record["last_step"]))
        self.parts.append((record["step"], record["parts"]))
        while self.parts[0][0] <= record["step"] - 2 * width:
            self.parts.popleft()
        now_and_then = record["step"] % max(1, width // 10) == 0 and ("plateau", None) not in self.raised
        if now_and_then and 0.3 < progress < 0.9 and record["step"] > 2 * width and len(self.parts) > RECENT:
            middle = record["step"] - width
            weights = {
                name: w
                for name, w in record["weights"].items()
                if name in self.parts[0][1] and name in record["shares"]
            }
            losses = [
                (step > middle, sum(_number(w) * _number(parts[name]) for name, w in weights.items()))
                for step, parts in self.parts
            ]
            old, new = ([loss for late, loss in losses if late == side] for side in (False, True))
            before, now = sum(old) / max(1, len(old)), sum(new) / max(1, len(new))
            if old and new and now > 0.995 * before:
                yield (
                    "plateau", None, f"the loss stays at {now:.3f} (it was {before:.3f} {width} steps ago)",
                    "the student may have learned what it can at this rate; let it end early, or give more text",
                )  # fmt: skip

    def _skipped(self, record):
        self.num_skipped += 1
        self.in_a_row += 1
        if "loss scale" in record["skipped"] and self.in_a_row < 5:
            return  # a loss scaler finds its factor this way
        if self.num_skipped % 10 == 1 or self.in_a_row == 5:
            yield (
                "non_finite", None, f"step {record['step']} changed nothing: {record['skipped']}; {self.num_skipped} so far",
                "lower learning_rate, look at the documents named, or set amp_dtype fp32",
            )  # fmt: skip

    def _of_evaluation(self, record):
        value = _number(record["bits_per_byte"])
        self.stale = 0 if value < self.best else self.stale + 1
        self.best = min(self.best, value)
        if self.stale >= STALE_EVALUATIONS:
            yield (
                "no_improvement", None, f"validation has not improved for {self.stale} evaluations (best {self.best:.4f})",
                "the student learns its text by heart; the best weights are kept. More text, or fewer steps",
            )  # fmt: skip
        if _number(record.get("progress", 0.0)) > 0.5 and _number(record["perplexity"]) > 1000:
            yield (
                "high_perplexity", None, f"perplexity is {record['perplexity']:.0f} after half of the plan",
                "raise lm_weight or learning_rate; is the text in a language the student's tokenizer knows?",
            )  # fmt: skip


def _number(value):
    """A value to compare with: null is NaN, which is neither above nor below anything."""
    return math.nan if value is None else value
