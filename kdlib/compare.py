"""Comparison of any two models on a text: quality of each, and agreement between them."""

import itertools
import math
import statistics

from kdlib.clock import Clock
from kdlib.evaluation import breakdown, samples
from kdlib.models import devices
from kdlib.session import inputs, time_budget
from kdlib.session.arm import Scorer

TITLES = {
    "frequency": "count of the next token in this text",
    "position": "position in the document (tokens)",
    "entropy": "teacher's entropy (nats)",
}
COLUMN_WIDTH = 12


def compare(config, on_progress=lambda phase, done, total: None):
    """Compares the config's teacher and student on its dataset, all of it held out. Returns JSON-compatible values.

    `teacher`, `student`: metrics of both models, with `calibration_error`. `retention`: results of `Breakdown`, with
    token frequencies in this text. `documents`: sizes and bits per byte. `samples`: continuations of the same openings,
    with repetition metrics. `alignment`: alignment of the tokenizers. `data`: what was read, as lines of text. Raises
    ValueError for invalid input. `on_progress(phase, done, total)` is called before each piece of work.
    """
    accelerator, clock = devices.accelerator(config.amp_dtype), Clock()
    teacher_device = devices.teacher_device(config.teacher_device, accelerator)
    dtype = devices.teacher_dtype(accelerator, teacher_device)
    loaded = inputs.load_for_evaluation(config, accelerator.device, dtype, teacher_device, on_progress)
    budget = time_budget.TimeBudget(math.inf, clock, clock.now())
    scorer = Scorer.for_run(loaded, config, accelerator.device, {}, budget, on_progress)
    scores = {"teacher": scorer.teacher_score("test"), "student": scorer.score_student("test")}
    metrics = {
        name: {**score.summary(), "calibration_error": breakdown.calibration_error(score.retention)}
        for name, score in scores.items()
    }
    sizes, bits = scores["student"].num_bytes.tolist(), {name: score.bits.tolist() for name, score in scores.items()}
    documents = [
        {"num_bytes": size, **{name: bits[name][i] / size for name in bits}} for i, size in enumerate(sizes) if size
    ]
    return {
        **metrics, "data": loaded.data_lines(), "alignment": loaded.alignment,
        "retention": {name: scores[name].retention for name in scores}, "documents": documents,
        "samples": _samples(loaded, on_progress),
    }  # fmt: skip


def _samples(loaded, on_progress):
    """Returns continuations by both models of the same openings, with repetition metrics."""
    pair, count = loaded.pair, itertools.count()
    openings = samples.openings(loaded.test, pair.student_reader.tokenizer, samples.NUM_OPENINGS)
    models = {
        "teacher": (pair.teacher.model, pair.teacher.reader),
        "student": (pair.student, pair.student_reader),
    }
    result = {"openings": openings}
    for name, (model, reader) in models.items():
        continuations = []
        for text in openings:
            on_progress("both write samples", next(count), 2 * len(openings))
            continuations.append(samples.continue_text(model, reader, text))
        texts = [sample.text for sample in continuations]
        result[name] = {
            "texts": texts, "repeated": samples.repeated(texts), "distinct_2": samples.distinct(texts),
            "recut": samples.recut_share(continuations),
        }  # fmt: skip
    return result


def text_lines(comparison):
    """Yields the lines of a `compare` result for a terminal."""
    yield from comparison["data"]
    headers = (("bits per byte", 15), ("perplexity", 12), ("KL to teacher", 15), ("top-1 agreement", 17))
    yield " " * 10 + "".join(f"{header:>{width}}" for header, width in headers) + "   calibration error"
    for name in ("teacher", "student"):
        score = comparison[name]
        yield (
            f"{name:10}{score['bits_per_byte']:15.4f}{score['perplexity']:12.2f}{score['kl_to_teacher']:15.4f}"
            f"{score['top1_agreement']:17.1%}{score['calibration_error']:20.1%}"
        )
    yield f"{comparison['alignment']['coverage']:.1%} of the student's tokens have an aligned teacher position."
    for kind in ("frequency", "position", "entropy"):
        yield from _bin_table(TITLES[kind], comparison["retention"]["student"][kind])
    student, teacher = ([document[name] for document in comparison["documents"]] for name in ("student", "teacher"))
    teacher_better = sum(ours > theirs for ours, theirs in zip(student, teacher, strict=True))
    yield (
        f"\n{len(student)} documents: student {min(student):.3f} to {max(student):.3f} bits per byte, "
        f"median {statistics.median(student):.3f}; teacher median {statistics.median(teacher):.3f}, "
        f"better on {teacher_better}."
    )
    yield "\n".join(["", *_sample_lines(comparison["samples"])])


def _bin_table(title, sums):
    """Yields positions, agreement and divergence for all non-empty bins."""
    used = [i for i, num in enumerate(sums["num"]) if num]
    yield f"\n{title + ', from':44}" + "".join(f"{sums['from'][i]:>{COLUMN_WIDTH}g}" for i in used)
    yield f"{'  positions':44}" + "".join(f"{sums['num'][i]:>{COLUMN_WIDTH},.0f}" for i in used)
    yield f"{'  top-1 agreement':44}" + "".join(
        f"{sums['agreed'][i] / sums['num'][i]:>{COLUMN_WIDTH}.1%}" for i in used
    )
    yield f"{'  KL to teacher (nats)':44}" + "".join(
        f"{sums['kl'][i] / sums['num'][i]:>{COLUMN_WIDTH}.3f}" for i in used
    )


def _sample_lines(written):
    openings = written["openings"]
    for name in ("teacher", "student"):
        metrics = {
            "repeated 4-grams": written[name]["repeated"],
            "distinct-2": written[name]["distinct_2"],
            "recut tokens": written[name]["recut"],
        }
        text = ", ".join(f"{metric} {'-' if value is None else f'{value:.0%}'}" for metric, value in metrics.items())
        yield f"{name} samples: {text} ({len(openings)} openings, greedy decoding)"
    if openings:
        yield f"  ... {openings[0]!r}"
        yield from (f"  {name}: {written[name]['texts'][0]!r}" for name in ("teacher", "student"))
