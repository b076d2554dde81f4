"""Checks of how well a teacher, a student and a text fit each other, for `kdlib doctor`."""

import math

import numpy as np

from kdlib.config import KD_METHODS, Config
from kdlib.data import batching
from kdlib.evaluation import scoring
from kdlib.losses import partial_tokens
from kdlib.models import trie
from kdlib.models.pair import IncompatiblePairError
from kdlib.report.findings import Finding

LOW_SHARE = 0.5
"""Share of the student's vocabulary, or of its positions, below which a check warns."""
BEST_METHOD = "byte_prefix"
"""Distillation method with the best results on every measured pair (RESULTS.md)."""
SAVED = (0.10, 0.13)
"""Gain of `BEST_METHOD` over plain training in equal time, for a pretrained student, as a share of its gap to the teacher
in bits per byte (RESULTS.md).
"""
MAX_LEFT_OUT = 0.02
"""Share of aligned positions left out because of different segmentations, above which to warn."""
MAX_EMPTY_ROWS = 0.1
"""Share of output-head rows without a token above which the tokenizer may be a smaller model's."""


def findings_of(config, loaded, scores, sampled=False):
    """Returns the `Finding`s about a pair.

    `loaded`: `session.inputs.Inputs`. `scores`: the `scoring.Score`s of `teacher` and `student` on the validation text.
    `sampled`: the text is the doctor's built-in sample, not the user's.
    """
    pair, alignment = loaded.pair, loaded.alignment
    text = "a sample" if sampled else "your text"
    findings = [_data(key, report) for key, report in loaded.reports.items()]
    findings += [_shared(pair.shared), _coverage(alignment["coverage"], text)]
    findings += [_one_to_one(pair.sample, text), _faithful(alignment), _rows("student", pair.head)]
    findings += [_rows("teacher", pair.teacher.head)] if pair.teacher.head else []
    findings += [_cuts(pair), _marks("student", pair.student_reader), _marks("teacher", pair.teacher.reader)]
    findings += _context(config.max_length, pair)
    findings += [_ids(side, loaded, score, config.check_teacher, sampled) for side, score in scores.items()]
    findings += [_method(name, pair, config) for name in KD_METHODS if name != "none"]
    return [*findings, _advice(config), _prospect(pair, **scores)]


def _finding(name, value, warning="", remedy="", meaning="", number=None):
    """Returns a `warning` if there is a text for it, else an `ok` finding."""
    return Finding("pair", name, value, "warning" if warning else "ok", warning or meaning, remedy, number)


def _data(key, report):
    warning, remedy = " ".join(report.unused_lines()), ""
    if warning:
        remedy = "correct these records, or leave them out" if report.num_skipped else ""
        remedy = remedy or ("raise --max-length" if report.cut else "check that the student can do without these parts")
    return _finding(key, " ".join(report.used_lines()), warning, remedy, number=report.num_records)


def _context(max_length, pair):
    """Warns of windows that are longer than a model's context. The teacher's windows are cut at its own."""
    contexts = {"student": pair.student_reader.context, "teacher": pair.teacher.reader.context}
    value = f"max_length {max_length}; " + ", ".join(
        f"{side} {size:,} tokens" for side, size in contexts.items() if size
    )
    if contexts["student"] and max_length > contexts["student"]:
        warning = "the student was not trained on windows of this length"
        return [_finding("context", value, warning, f"--max-length {contexts['student']}")]
    return [_finding("context", value)] if any(contexts.values()) else []


def _shared(shared):
    student_share, teacher_share = shared.student_share, shared.teacher_share
    value = f"{len(shared):,} tokens: {student_share:.1%} of the student's, {teacher_share:.1%} of the teacher's"
    warning = (
        "most of the student's tokens have no equal in the teacher's vocabulary" if student_share < LOW_SHARE else ""
    )
    return _finding("shared vocabulary", value, warning, number=student_share)


def _coverage(coverage, text):
    warning = "only byte_prefix can use the other positions" if coverage < LOW_SHARE else ""
    return _finding("aligned positions", f"{coverage:.1%} of the student's on {text}", warning, number=coverage)


def _one_to_one(windows, text):
    """Reports the share of common spans that are a single token in both tokenizations."""
    lengths = _span_lengths(windows)
    share = float((lengths == 1).all(axis=1).mean()) if len(lengths) else 0.0
    return _finding("one-to-one spans", f"{share:.1%} on {text}", number=share)


def _span_lengths(windows):
    """Returns the student and teacher tokens in each common span, `[spans, 2]`."""
    pairs = [(w.student_span_ends - w.student_rows, w.teacher_span_ends - w.teacher_rows) for w in windows]
    lengths = np.concatenate([np.zeros((0, 2), np.int64), *(np.stack(pair, axis=1) for pair in pairs)])
    return lengths[lengths[:, 0] > 0]


def _faithful(alignment):
    shares = {side: alignment[f"faithful_{side}"] for side in ("student", "teacher")}
    value = ", ".join(f"{share:.1%} of the {side}'s tokens" for side, share in shares.items())
    warning = "a normalizer changes the text (case, accents, white space); the other tokens have no teacher signal"
    share = min(shares.values())
    return _finding("text preserved", value, "" if share == 1.0 else warning, number=share)


def _rows(side, head):
    rows, tokens = len(head.module.weight), head.num_rows - len(head.vocabulary.gaps)
    empty = rows - tokens
    warning = "they get no probability; so many may mean that the tokenizer belongs to a smaller model of the family"
    return _finding(
        f"{side}'s head", f"{empty:,} of {rows:,} rows have no token", warning if empty > MAX_EMPTY_ROWS * rows else "",
        meaning="they get no probability" if empty else "", number=empty,
    )  # fmt: skip


def _marks(side, reader):
    """Reports a tokenizer's BOS and EOS, and the special tokens that it adds to a text."""
    tokenizer = reader.tokenizer
    prefix, suffix = ("".join(tokenizer.convert_ids_to_tokens(list(ids))) for ids in (reader.prefix, reader.suffix))
    bos, eos = tokenizer.bos_token or "no BOS", tokenizer.eos_token or "no EOS"
    value = f"{bos}, {eos}; adds {prefix or 'nothing'} before a text, {suffix or 'nothing'} after it"
    if side == "student" and not reader.eos:
        warning = "without an end-of-text token the student does not learn where a text ends"
        return _finding(f"{side}'s BOS and EOS", value, warning, "set eos_token in its tokenizer_config.json")
    return _finding(f"{side}'s BOS and EOS", value)


def _ids(side, loaded, score, check_teacher, sampled):
    """Checks that a model beats the unigram cross-entropy of the text; otherwise its tokenizer may be another model's.

    The built-in sample is too short for unigram counts, so its baseline is the uniform distribution.
    """
    pair = loaded.pair
    vocabulary = (pair.teacher.reader if side == "teacher" else pair.student_reader).vocabulary
    nats = math.log(score.perplexity)
    if sampled:
        baseline, baseline_name = math.log(vocabulary.num_rows), "uniform cross-entropy"
    else:
        baseline = scoring.unigram_cross_entropy(vocabulary, side, loaded.train, loaded.validation)
        baseline_name = "unigram cross-entropy"
    value = f"{nats:.2f} nats per token{' on a sample' if sampled else ''}, {baseline_name} {baseline:.2f}"
    warning = ""
    if side == "student" and not nats <= baseline:
        warning = f"above the {baseline_name}: expected for random weights, otherwise its tokenizer is another model's"
    if side == "teacher":
        try:
            scoring.check_tokenizers_fit(nats, baseline)
        except IncompatiblePairError as error:
            if check_teacher:
                return Finding("pair", "teacher's ids", value, "error", error.problem, error.remedy, nats)
            warning = f"{error.problem}; check_teacher is off, so training continues"
    return _finding(f"{side}'s ids", value, warning, number=nats)


def _method(name, pair, config):
    """Reports how much signal one distillation method has on the sample windows."""
    title = f"kd {name}" + (", chosen" if config.kd_method == name else "")
    if name == "projector":
        width, num_shared = pair.teacher.config.hidden_size, len(pair.shared)
        value = f"{num_shared:,} shared tokens to initialize a map from {width} to {pair.head.width} dimensions"
        warning = "fewer tokens than dimensions: they do not determine the initial map" if num_shared < width else ""
        return _finding(title, value, warning)
    rows = sum(len(window.student_rows) for window in pair.sample)
    if name == "chunk_likelihood":
        share = len(_span_lengths(pair.sample)) / max(1, rows)
        return _finding(title, f"{share:.1%} of the aligned positions begin a common span", number=share)
    if name == "byte_prefix":
        return _inside(title, pair)
    buckets = trie.buckets_of(pair, name)
    shares = {}
    for side, bucket_of in (("student", buckets.student), ("teacher", buckets.teacher)):
        labels = np.concatenate([getattr(w, f"{side}_labels")[getattr(w, f"{side}_rows")] for w in pair.sample])
        shares[side] = float((bucket_of[labels[labels >= 0]] < buckets.num - 1).mean()) if rows else 0.0
    value = "{student:.1%} of the student's and {teacher:.1%} of the teacher's next tokens are outside the tail bucket"
    low = min(shares.values()) < LOW_SHARE and config.kd_method == name
    warning = "most of the teacher's probability falls into one tail bucket" if low else ""
    return _finding(title, value.format(**shares), warning, number=min(shares.values()))


def _advice(config):
    """Recommends the method and weights with the best results."""
    value = f"{BEST_METHOD}, kd_weight {Config.kd_weight:g}, lm_weight {Config.lm_weight:g}"
    chosen = config.kd_method, config.kd_weight, config.lm_weight
    if chosen == (BEST_METHOD, Config.kd_weight, Config.lm_weight):
        return _finding("recommended", f"{value}, as chosen")
    return _finding("recommended", value, "best on every measured pair; chosen are {}, {:g}, {:g}".format(*chosen))


def _prospect(pair, teacher, student):
    """Estimates the gain over plain training in equal time from the gap between the scores of teacher and student."""
    ours, theirs = student.bits_per_byte, teacher.bits_per_byte
    value = f"student at {ours:.2f} bits per byte, teacher at {theirs:.2f}"
    if theirs >= ours:
        warning = "the teacher is no better than the student on this text: plain training is likely to do as well"
        return _finding("expected gain", value, warning, number=0.0)
    if math.log(student.perplexity) > math.log(pair.student_reader.vocabulary.num_rows) - 1.0:
        value += "; the student is close to random weights, so most of its early progress is plain language modelling"
        meaning = (
            "0.11 to 0.28 bits per byte in equal time on the three small pairs that were trained from scratch. "
            "kd_weight 0.9 with lm_weight 0.1 was best on two of them; contrastive_weight 0.15 "
            "added 0.02 to 0.03 (RESULTS.md)"
        )
        return _finding("expected gain", value, meaning=meaning)
    low, high = (share * (ours - theirs) for share in SAVED)
    meaning = "over plain training in equal time, if this pair is like the three measured ones (RESULTS.md)"
    return _finding("expected gain", f"{value}; {low:.2f} to {high:.2f} better", meaning=meaning, number=low)


def _inside(title, pair):
    """Reports the share of the student's positions for which `byte_prefix` has a signal."""
    batches, tries = [batching.collate([window]) for window in pair.sample], trie.tries_of(pair)
    buckets = trie.buckets_of(pair, "byte_prefix")
    agreeing = sum(int(partial_tokens.agreement_mask(buckets, batch).sum()) for batch in batches)
    partial = [partial_tokens.PartialTokens.build(tries, batch) for batch in batches]
    inside_teacher, inside_student = (
        sum(len(getattr(p, name)) for p in partial) for name in ("positions", "inner_positions")
    )
    total = max(1, sum(window.num_positions for window in pair.sample))
    shares = [count / total for count in (agreeing + inside_teacher, inside_teacher, inside_student)]
    value = (
        "{:.1%} of the student's positions have a signal, {:.1%} inside a teacher token; "
        "{:.1%} more inside a student token"
    )
    return _finding(title, value.format(*shares), number=shares[0])


def _cuts(pair):
    """Reports how often the teacher would teach its own segmentation of the text, before and after merging buckets."""
    spellings = trie.spellings_of(pair)
    separate, merged = trie.unjoined_buckets(pair), trie.buckets_of(pair, "byte_prefix")
    (before, total), (after, _) = (
        trie.count_conflicts(pair.sample, buckets, spellings) for buckets in (separate, merged)
    )
    before, after = (sum(counts.values()) / max(1, total) for counts in (before, after))
    value = f"the tokenizers differ at {before:.1%} of the aligned positions; "
    value += f"{separate.num - merged.num} buckets are merged, {after:.1%} left out"
    warning = (
        "positions are left out where the teacher would teach its own segmentation" if after > MAX_LEFT_OUT else ""
    )
    return _finding("segmentation", value, warning, number=before)
