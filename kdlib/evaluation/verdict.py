"""The answer: did distillation beat plain training for the same wall-clock, by how much, and how sure is that."""

import dataclasses
import math

import numpy as np

from kdlib.evaluation import breakdown

CONFIDENCE = 0.95
HELPED, NOT_HELPED, UNCLEAR = "helped", "did not help", "unclear"


def gain_interval(control_bits, distilled_bits, num_bytes):
    """`(gain, low, high)` in bits per byte, positive where the distilled student is better.

    `control_bits` and `distilled_bits` `[R, D]`: bits spent on each of D held-out documents by R independent pairs of
    runs; `num_bytes` `[D]`. The gain is the mean over runs of total bits saved over total bytes. The interval adds two
    variances: of the mean over runs (where R > 1), and over documents, by the linearised ratio estimator (Cochran 1977,
    Sampling Techniques, eq. 2.46); Student's t with Satterthwaite's degrees of freedom.
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
        variance = num_documents / (num_documents - 1) * (residual**2).sum() / total**2
        terms.append((variance, num_documents - 1))
    spread = sum(variance for variance, _ in terms)
    if not terms:
        return gain, -math.inf, math.inf
    if spread == 0.0:
        return gain, gain, gain
    freedom = spread**2 / sum(variance**2 / df for variance, df in terms)
    half = t_quantile(freedom) * math.sqrt(spread)
    return gain, gain - half, gain + half


def t_quantile(freedom, confidence=CONFIDENCE):
    """The x with `P(|t| <= x) = confidence` for Student's t, any positive degrees of freedom; error below 1e-3.

    The density is integrated in u = atan(x / sqrt(df)), where it is a power of a cosine on a finite interval.
    """
    u = np.linspace(0.0, math.pi / 2, 200_001)
    density = np.cos(u) ** (freedom - 1.0)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(math.sqrt(freedom) * math.tan(np.interp(confidence, area / area[-1], u)))


def judge(control, gain, low, high):
    """`helped`, `did not help` or `unclear`, from the interval of the gain; without a control nothing can be said."""
    if control == "off":
        return UNCLEAR
    if low > 0:
        return HELPED
    return NOT_HELPED if high < 0 else UNCLEAR


def make_verdict(control, scores, pairs):
    """The content of `verdict.json`.

    `scores` maps `teacher student_before ce_only distilled` to a test `Score` (or None where there is none); `pairs` are
    the test `Score`s `(ce_only, distilled)` of every repeat, both at the wall-clock where they are compared.
    """
    verdict = {
        "bits_per_byte": {name: score and score.bits_per_byte for name, score in scores.items()},
        "perplexity": {name: score and score.perplexity for name, score in scores.items()},
        "kl_to_teacher": {name: score and score.kl_to_teacher for name, score in scores.items()},
        "top1_agreement": {name: score and score.top1_agreement for name, score in scores.items()},
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
        found = {"gain": None, "interval": None, "helped": None, "answer": UNCLEAR, "gain_by_run": []}
        return {
            **verdict,
            **found,
            "sentence": "No control was trained (control: off), so nothing tells whether it helped.",
        }
    bits = np.array([[ce.bits, distilled.bits] for ce, distilled in pairs])
    num_bytes = pairs[0][0].num_bytes
    gain, low, high = gain_interval(bits[:, 0], bits[:, 1], num_bytes)
    answer = judge(control, gain, low, high)
    by_run = ((bits[:, 0] - bits[:, 1]).sum(axis=1) / num_bytes.sum()).tolist()
    found = {
        "gain": gain,
        "interval": [low, high],
        "helped": {HELPED: True, NOT_HELPED: False, UNCLEAR: None}[answer],
        "answer": answer,
        "gain_by_run": by_run,
    }
    return {**verdict, **found, "sentence": _sentence(control, answer, gain, low, high, len(pairs))}


def _sentence(control, answer, gain, low, high, num_runs):
    where = "at equal wall-clock" if control == "full" else "at a tenth of the plan, at equal wall-clock"
    about = f"{num_runs} seeds and the held-out documents" if num_runs > 1 else "the held-out documents of one seed"
    interval = f"95 % interval {low:+.4f} to {high:+.4f} over {about}"
    if answer == UNCLEAR:
        return f"Unclear: {gain:+.4f} bits per byte {where} against plain training, and the {interval} holds 0."
    word = "helped" if answer == HELPED else "did not help"
    return f"Distillation {word}: {gain:+.4f} bits per byte saved {where} against plain training ({interval})."


def mean_score(scores):
    """One `Score` for several runs on the same documents: every figure is the mean over the runs."""
    first = scores[0]
    figures = {name: _mean([getattr(score, name) for score in scores]) for name in first.summary()}
    bits, told = (
        np.mean([score.bits for score in scores], axis=0),
        breakdown.merge([score.retention for score in scores]),
    )
    return dataclasses.replace(first, bits=bits, retention=told, **figures)


def _mean(values):
    return None if None in values else float(np.mean(values))
