"""Alerts: warning signs in a run's records. Each alert record says what a sign means and what to try."""

import collections
import math

RECENT = 20
"""Number of train records over which the mean of a sign is taken."""
DOMINANT = 0.8
STALE_EVALUATIONS = 5
PLATEAU = 0.2
"""Fraction of the planned steps over which the loss must fall by at least half a percent."""


class AlertMonitor:
    """Monitor of the records of one arm. `update(record)` returns the alerts of a record; each sign is reported once.

    Skipped steps (NaN or infinite loss) are reported at the first such step and at every tenth after it. In records
    from a file NaN and infinity are null, and raise no alert. `teacher_bits`: the teacher's bits per byte on validation
    text, if it teaches this arm.
    """

    def __init__(self, micro_batch=None, teacher_bits=-math.inf):
        self.micro_batch, self.teacher_bits = micro_batch, teacher_bits
        self.raised = set()
        self.recent = collections.deque(maxlen=RECENT)
        self.parts = collections.deque()
        self.best, self.stale, self.num_skipped, self.consecutive_skips = math.inf, 0, 0, 0

    def update(self, record):
        """Returns the alerts (dicts) of a `train` or `eval` record."""
        signs = self._check_train(record) if record["kind"] == "train" else self._check_eval(record)
        place = {"run": record["run"], "repeat": record["repeat"], "step": record["step"]}
        alerts = []
        for sign, part, meaning, advice in signs:
            if (sign, part) not in self.raised or sign == "non_finite":
                self.raised.add((sign, part))
                text = {"sign": sign, "part": part, "meaning": meaning, "advice": advice}
                alerts.append({"kind": "alert", **place, **text})
        return alerts

    def _check_train(self, record):
        if (record["micro_batch"] or math.inf) < (self.micro_batch or 0):
            yield (
                "memory", str(record["micro_batch"]),
                f"out of memory: the micro-batch was reduced from {self.micro_batch} to {record['micro_batch']} windows, "
                "with more forward passes per optimizer step; the result is the same",
                "lower batch_size and raise grad_accumulation by the same factor",
            )  # fmt: skip
        self.micro_batch = record["micro_batch"] or self.micro_batch
        if record["skipped"]:
            yield from self._check_skipped(record)
            return
        self.consecutive_skips = 0
        self.recent.append(record)
        progress = _to_float(record["step"]) / (record["last_step"] or math.nan)
        if _to_float(record["parts"].get("layerwise")) > 2.0:
            yield (
                "layerwise", "layerwise", f"layerwise is {record['parts']['layerwise']:.2f}; 1 - cosine can't exceed 2",
                "this is a bug in kdlib: please report it with config.json",
            )  # fmt: skip
        if len(self.recent) == RECENT:
            yield from self._check_recent(progress)
        yield from self._check_plateau(record, progress)

    def _check_recent(self, progress):
        names = list(self.recent[-1]["shares"])
        for name in names if len(names) > 1 and progress > 0.1 else ():
            share = sum(_to_float(r["shares"].get(name, 0.0)) for r in self.recent) / RECENT
            if share > DOMINANT:
                yield (
                    "dominance", name, f"{name} makes up {share:.0%} of the loss",
                    "compare its share of the gradient; if that is as high, "
                    f"lower {name}_weight, raise another weight or set balance auto",
                )  # fmt: skip
        loss = sum(_to_float(r["loss"]) for r in self.recent) / RECENT
        if progress > 0.2 and loss > 15:
            yield (
                "high_loss", None, f"the loss is {loss:.1f} after 20% of the planned steps",
                "lower learning_rate, or kd_temperature (the divergence grows with its square)",
            )  # fmt: skip

    def _check_plateau(self, record, progress):
        """Compares the mean loss of two consecutive tenths of the planned steps. Both use the current weights, and only
        the loss terms present in both: a term added by the curriculum is no plateau.
        """
        if math.isnan(progress):
            return
        width = max(RECENT, round(PLATEAU / 2 * record["last_step"]))
        self.parts.append((record["step"], record["parts"]))
        while self.parts[0][0] <= record["step"] - 2 * width:
            self.parts.popleft()
        is_due = record["step"] % max(1, width // 10) == 0 and ("plateau", None) not in self.raised
        if is_due and 0.3 < progress < 0.9 and record["step"] > 2 * width and len(self.parts) > RECENT:
            middle = record["step"] - width
            weights = {
                name: weight
                for name, weight in record["weights"].items()
                if name in self.parts[0][1] and name in record["shares"]
            }
            losses = [
                (step > middle, sum(_to_float(weight) * _to_float(parts[name]) for name, weight in weights.items()))
                for step, parts in self.parts
            ]
            old, new = ([loss for is_new, loss in losses if is_new == half] for half in (False, True))
            before, now = sum(old) / max(1, len(old)), sum(new) / max(1, len(new))
            if old and new and now > 0.995 * before:
                yield (
                    "plateau", None, f"the loss stays at {now:.3f} (it was {before:.3f} {width} steps ago)",
                    "the student may have converged at this learning rate; use fewer steps or more text",
                )  # fmt: skip

    def _check_skipped(self, record):
        self.num_skipped += 1
        self.consecutive_skips += 1
        if "loss scale" in record["skipped"] and self.consecutive_skips < 5:
            return  # the gradient scaler is calibrating
        if self.num_skipped % 10 == 1 or self.consecutive_skips == 5:
            yield (
                "non_finite", None, f"step {record['step']} was skipped: {record['skipped']}; {self.num_skipped} so far",
                "lower learning_rate, check the documents named, or set amp_dtype fp32",
            )  # fmt: skip

    def _check_eval(self, record):
        bits_per_byte = _to_float(record["bits_per_byte"])
        self.stale = 0 if bits_per_byte < self.best else self.stale + 1
        self.best = min(self.best, bits_per_byte)
        if self.stale >= STALE_EVALUATIONS:
            yield (
                "no_improvement", None, f"validation has not improved for {self.stale} evaluations (best {self.best:.4f})",
                "likely overfitting: the best weights are kept. Use more text or fewer steps",
            )  # fmt: skip
        if bits_per_byte < self.teacher_bits:
            yield (
                "teacher_passed", None,
                f"the student is better than its teacher on validation text ({bits_per_byte:.4f} against "
                f"{self.teacher_bits:.4f} bits per byte), which may hold it back from here on",
                "adapt the teacher to this text first (Large students in the docs), lower kd_weight, or train without it",
            )  # fmt: skip
        if _to_float(record.get("progress", 0.0)) > 0.5 and _to_float(record["perplexity"]) > 1000:
            yield (
                "high_perplexity", None, f"perplexity is {record['perplexity']:.0f} after half of the planned steps",
                "raise lm_weight or learning_rate; check that the student's tokenizer supports the language of the text",
            )  # fmt: skip


def _to_float(value):
    """Maps null to NaN, which compares false with any number."""
    return math.nan if value is None else value
