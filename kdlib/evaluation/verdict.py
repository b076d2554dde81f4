"""The verdict: whether distillation beat plain training in equal wall-clock time, by how much, with an interval."""

import dataclasses
import math

import numpy as np

from kdlib.evaluation import breakdown
from kdlib.evaluation.scoring import METRICS

CONFIDENCE = 0.95
HELPED, NOT_HELPED, UNCLEAR = "helped", "did not help", "unclear"


def gain_interval(control_bits, distilled_bits, num_bytes):
    """Returns `(gain, low, high)` in bits per byte, positive if the distilled student is better.

    `control_bits` and `distilled_bits` `[R, D]`: bits on each of D held-out documents for R independent pairs of runs;
    `num_bytes` `[D]`. The gain is the mean over runs of total bits saved over total bytes. The interval adds two
    variances: of the mean over runs (if R > 1), and over documents, by the linearised ratio estimator (Cochran 1977,
    Sampling Techniques, eq. 2.46). It uses Student's t with Satterthwaite's degrees of freedom.
    """
    saved = np.atleast_2d(control_bits) - np.atleast_2d(distilled_bits)
    num_runs, num_documents = saved.shape
    total = num_bytes.sum()
    by_run = saved.sum(axis=1) / total
    gain = float(by_run.mean())
    terms = []
    if num_runs > 1:
        terms.append((by_run.var(ddof=1) / num_runs, num_runs - 1))
    if num_documents > 1:
        residual = saved.mean(axis=0) - gain * num_bytes
        terms.append((num_documents / (num_documents - 1) * (residual**2).sum() / total**2, num_documents - 1))
    variance = sum(term for term, _ in terms)
    if not terms:
        return gain, -math.inf, math.inf
    if variance == 0.0:
        return gain, gain, gain
    degrees = variance**2 / sum(term**2 / df for term, df in terms)
    half_width = t_quantile(degrees) * math.sqrt(variance)
    return gain, gain - half_width, gain + half_width


def t_quantile(degrees, confidence=CONFIDENCE):
    """Returns the x with `P(|t| <= x) = confidence` for Student's t with any positive `degrees` of freedom.

    The error is below 1e-3. With u = atan(x / sqrt(degrees)), the density is a power of a cosine on a finite interval.
    """
    u = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(u) ** (degrees - 1.0)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(degrees) * math.tan(np.interp(confidence, area / area[-1], u)))


def judge(control, gain, low, high):
    """Returns `helped`, `did not help` or `unclear` from the interval of the gain; `unclear` without a control."""
    if control == "off":
        return UNCLEAR
    if low > 0:
        return HELPED
    return NOT_HELPED if high < 0 else UNCLEAR


def make_verdict(control, scores, pairs):
    """Returns the content of `verdict.json`.

    `scores` maps `teacher student_before ce_only distilled` to a test `Score` or None. `pairs`: the test `Score`s
    `(ce_only, distilled)` of every repeat, both after equal wall-clock time.
    """
    verdict = {
        **{metric: {name: score and getattr(score, metric) for name, score in scores.items()} for metric in METRICS},
        "calibration_error": {
            name: score and breakdown.calibration_error(score.retention) for name, score in scores.items()
        },
        "retention": {name: score and score.retention for name, score in scores.items()},
        "control": control,
        "num_runs": len(pairs),
        "num_documents": len(scores["distilled"].num_bytes),
        "num_bytes": int(scores["distilled"].num_bytes.sum()),
        "confidence": CONFIDENCE,
    }
    if control == "off":
        sentence = "No control was trained (control: off), so it is unknown whether distillation helped."
        unknown = {"gain": None, "interval": None, "helped": None, "answer": UNCLEAR, "gain_by_run": []}
        return {**verdict, **unknown, "sentence": sentence}
    bits = np.array([[ce.bits, distilled.bits] for ce, distilled in pairs])
    num_bytes = pairs[0][0].num_bytes
    gain, low, high = gain_interval(bits[:, 0], bits[:, 1], num_bytes)
    answer = judge(control, gain, low, high)
    return {
        **verdict,
        "gain": gain,
        "interval": [low, high],
        "helped": {HELPED: True, NOT_HELPED: False, UNCLEAR: None}[answer],
        "answer": answer,
        "gain_by_run": ((bits[:, 0] - bits[:, 1]).sum(axis=1) / num_bytes.sum()).tolist(),
        "sentence": _sentence(control, answer, gain, low, high, len(pairs)),
    }


def _sentence(control, answer, gain, low, high, num_runs):
    condition = "at equal wall-clock" if control == "full" else "at a tenth of the plan, at equal wall-clock"
    sample = f"{num_runs} seeds and the held-out documents" if num_runs > 1 else "the held-out documents of one seed"
    interval = f"95 % interval {low:+.4f} to {high:+.4f} over {sample}"
    if answer == UNCLEAR:
        return f"Unclear: {gain:+.4f} bits per byte {condition} against plain training, and the {interval} contains 0."
    return f"Distillation {answer}: {gain:+.4f} bits per byte saved {condition} against plain training ({interval})."


def mean_score(scores):
    """Returns one `Score` for several runs on the same documents: metrics are means over the runs."""
    metrics = {name: _mean([getattr(score, name) for score in scores]) for name in METRICS}
    bits = np.mean([score.bits for score in scores], axis=0)
    retention = breakdown.merge([score.retention for score in scores])
    return dataclasses.replace(scores[0], bits=bits, retention=retention, **metrics)


def _mean(values):
    return None if None in values else float(np.mean(values))
