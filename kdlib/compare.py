"""Any two models on a text: what each knows, and how much the one kept of the other."""

import itertools
import math
import statistics

from kdlib.clock import Clock
from kdlib.evaluation import breakdown, samples
from kdlib.models import devices
from kdlib.session import inputs, time_budget
from kdlib.session.arm import Scorer

TITLES = {
    "frequency": "times the next token stands in this text",
    "position": "tokens read before it",
    "entropy": "teacher's entropy (nats)",
}
WIDE = 12


def compare(config, on_progress=lambda phase, done, total: None):
    """What the config's teacher and student make of its data set, all of it held-out text, on the machine's card where it
    has one: plain values. `on_progress(phase, done, total)` is called before every piece of work.

    `teacher`, `student`: the four figures of a score and the `calibration_error`; `retention` as from `Breakdown`, whose
    `frequency` counts in this very text; `documents`: bits per byte of each, with its size; `samples`: what both write after
    the same beginnings, with the shares of repeated 4-grams and of recut tokens, and distinct-2;
    `alignment`. ValueError for a wrong input.
    """
    machine, clock = devices.accelerator(config.amp_dtype), Clock()
    away = devices.teacher_device(config.teacher_device, machine)
    dtype = devices.teacher_dtype(machine, away)
    loaded = inputs.load_for_evaluation(config, machine.device, dtype, away, on_progress)
    scorer = Scorer.of(
        loaded, config, machine.device, {}, time_budget.TimeBudget(math.inf, clock, clock.now()), on_progress
    )
    scores = {"teacher": scorer.teacher("test"), "student": scorer.student("test")}
    told = {
        name: {**score.summary(), "calibration_error": breakdown.calibration_error(score.retention)}
        for name, score in scores.items()
    }
    sizes, bits = scores["student"].num_bytes.tolist(), {name: score.bits.tolist() for name, score in scores.items()}
    documents = [
        {"num_bytes": size, **{name: bits[name][i] / size for name in bits}} for i, size in enumerate(sizes) if size
    ]
    kept = {name: score.retention for name, score in scores.items()}
    written = _samples(loaded, on_progress)
    return {
        **told,
        "alignment": loaded.alignment,
        "retention": kept,
        "documents": documents,
        "samples": written,
    }


def _samples(loaded, on_progress):
    """What both models write after the same beginnings."""
    pair, done = loaded.pair, itertools.count()
    beginnings = samples.openings(loaded.test, pair.student_reader.tokenizer, samples.NUM_OPENINGS)
    models = {
        "teacher": (pair.teacher.model, pair.teacher.reader),
        "student": (pair.student, pair.student_reader),
    }
    written = {"openings": beginnings}
    for name, (model, reader) in models.items():
        found = []
        for text in beginnings:
            on_progress("both write samples", next(done), 2 * len(beginnings))
            found.append(samples.continue_text(model, reader, text))
        texts = [sample.text for sample in found]
        written[name] = {
            "texts": texts,
            "repeated": samples.repeated(texts),
            "distinct_2": samples.distinct(texts),
            "recut": samples.recut_share(found),
        }
    return written


def told(found):
    """The lines that a terminal shows of it."""
    heads = (("bits per byte", 15), ("perplexity", 12), ("KL to teacher", 15), ("top-1 agreement", 17))
    yield " " * 10 + "".join(f"{head:>{width}}" for head, width in heads) + "  calibration off by"
    for name in ("teacher", "student"):
        score = found[name]
        yield (
            f"{name:10}{score['bits_per_byte']:15.4f}{score['perplexity']:12.2f}{score['kl_to_teacher']:15.4f}"
            f"{score['top1_agreement']:17.1%}{score['calibration_error']:20.1%}"
        )
    yield f"{found['alignment']['coverage']:.1%} of the student's tokens have a comparable teacher position."
    for kind in ("frequency", "position", "entropy"):
        yield from _over_bins(TITLES[kind], found["retention"]["student"][kind])
    values = [document["student"] for document in found["documents"]]
    ceiling = [document["teacher"] for document in found["documents"]]
    worse = sum(ours > theirs for ours, theirs in zip(values, ceiling, strict=True))
    yield (
        f"\n{len(values)} documents: student {min(values):.3f} to {max(values):.3f} bits per byte, median "
        f"{statistics.median(values):.3f}; the teacher's {statistics.median(ceiling):.3f}; it knows {worse} of them better."
    )
    yield "\n".join(["", *_written(found["samples"])])


def _over_bins(title, sums):
    """Positions, agreement and divergence over the bins that hold anything."""
    used = [i for i, num in enumerate(sums["num"]) if num]
    yield f"\n{title + ', from':44}" + "".join(f"{sums['from'][i]:>{WIDE}g}" for i in used)
    yield f"{'  positions':44}" + "".join(f"{sums['num'][i]:>{WIDE},.0f}" for i in used)
    yield f"{'  top-1 agreement':44}" + "".join(f"{sums['agreed'][i] / sums['num'][i]:>{WIDE}.1%}" for i in used)
    yield f"{'  KL to teacher (nats)':44}" + "".join(f"{sums['kl'][i] / sums['num'][i]:>{WIDE}.3f}" for i in used)


def _written(told):
    for name in ("teacher", "student"):
        measures = {
            "words in fours said before": told[name]["repeated"],
            "distinct-2": told[name]["distinct_2"],
            "tokens its tokenizer would cut otherwise": told[name]["recut"],
        }
        said = ", ".join(f"{what} {'-' if value is None else f'{value:.0%}'}" for what, value in measures.items())
        yield f"{name} writes: {said} ({len(told['openings'])} beginnings, greedily)"
    if told["openings"]:
        yield f"  ... {told['openings'][0]!r}"
        yield from (f"  {name}: {told[name]['texts'][0]!r}" for name in ("teacher", "student"))
