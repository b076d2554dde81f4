"""How a teacher and a student fit each other, and a text: facts about the two, from what a run starts from."""

import math

import numpy as np

from kdlib.config import KD_METHODS, Config
from kdlib.data import batching
from kdlib.evaluation import scoring
from kdlib.losses import partial_tokens
from kdlib.models import trie
from kdlib.models.pair import IncompatiblePairError
from kdlib.report.findings import Finding

FEW = 0.5
"""Share of the student's vocabulary, or of its positions, below which there is little to carry over."""
BEST = "inside_tokens"
"""The way to distil that was the best on every pair (RESULTS.md, "Quality against every known way")."""
SAVED = (0.10, 0.13)
"""Bits per byte that it saved there over plain training in the same time, as a share of those between teacher and student,
where the student was trained before.
"""
MUCH_LEFT = 0.02
"""Share of the common positions left out because the two cut the text apart there, above which it is worth a note."""
ODD_ROWS = 0.1
"""Share of a head's rows without a token above which the tokenizer may be a smaller relative's."""


def findings_of(config, loaded, scores, sampled=False):
    """The `Finding`s of the pair in a run's `inputs.Inputs`; `scores`: `scoring.Score` of `teacher` and `student` on its
    validation text. `sampled`: the text is the examination's own, not the user's.
    """
    pair, told = loaded.pair, loaded.alignment
    text = "a sample" if sampled else "your text"
    made = [_shared(pair.shared), _coverage(told["coverage"], text), _one_to_one(pair.sample, text), _faithful(told)]
    made += [_rows("student", pair.head)] + ([_rows("teacher", pair.teacher.head)] if pair.teacher.head else [])
    made += [_cuts(pair), _marks("student", pair.student_reader), _marks("teacher", pair.teacher.reader)]
    made += [_ids(side, loaded, score, config.check_teacher, sampled) for side, score in scores.items()]
    made += [_method(name, pair, config) for name in KD_METHODS if name != "none"]
    return [*made, _advice(config), _prospect(pair, **scores)]


def _found(*given, **more):
    return Finding("pair", *given, **more)


def _shared(shared):
    ours, theirs = shared.student_share, shared.teacher_share
    said = f"{len(shared):,} tokens: {ours:.1%} of the student's, {theirs:.1%} of the teacher's"
    if ours < FEW:
        means = "most of the student's tokens have no equal on the other side"
        return _found("shared vocabulary", said, "note", means, number=ours)
    return _found("shared vocabulary", said, number=ours)


def _coverage(coverage, text):
    said = f"{coverage:.1%} of the student's on {text}"
    if coverage < FEW:
        means = "elsewhere the teacher has read other bytes, which only inside_tokens can use"
        return _found("common positions", said, "note", means, number=coverage)
    return _found("common positions", said, number=coverage)


def _one_to_one(windows, text):
    """Of the spans that both tokenizations delimit, those that are one token on either side."""
    spans = _spans(windows)
    share = float((spans == 1).all(axis=1).mean()) if len(spans) else 0.0
    return _found("spans of one token each", f"{share:.1%} on {text}", number=share)


def _spans(windows):
    """Tokens of the student and of the teacher in each common span, `[spans, 2]`."""
    lengths = [(w.student_span_ends - w.student_rows, w.teacher_span_ends - w.teacher_rows) for w in windows]
    found = np.concatenate([np.zeros((0, 2), np.int64), *(np.stack(both, axis=1) for both in lengths)])
    return found[found[:, 0] > 0]


def _faithful(told):
    shares = {side: told[f"faithful_{side}"] for side in ("student", "teacher")}
    said = ", ".join(f"{share:.1%} of the {side}'s tokens" for side, share in shares.items())
    if min(shares.values()) == 1.0:
        return _found("text left as it is", said, number=1.0)
    means = "a normaliser changes the text (case, accents, white space); the other tokens give and take no signal"
    return _found("text left as it is", said, "note", means, number=min(shares.values()))


def _rows(side, head):
    """Rows of the output head that stand for no token."""
    rows, tokens = len(head.module.weight), head.num_rows - len(head.vocabulary.gaps)
    said = f"{rows - tokens:,} of {rows:,} rows have no token"
    if rows - tokens > ODD_ROWS * rows:
        means = "they get no probability; that they are so many may mean that the tokenizer is a smaller relative's"
        return _found(f"{side}'s head", said, "note", means, number=rows - tokens)
    means = "they get no probability" if rows > tokens else ""
    return _found(f"{side}'s head", said, "ok", means, number=rows - tokens)


def _marks(side, reader):
    """What a tokenizer has and adds around a text."""
    used, name = reader.tokenizer, f"{side}'s BOS and EOS"
    front, behind = ("".join(used.convert_ids_to_tokens(list(ids))) for ids in (reader.prefix, reader.suffix))
    bos, eos = used.bos_token or "no BOS", used.eos_token or "no EOS"
    said = f"{bos}, {eos}; it puts {front or 'nothing'} in front of a text, {behind or 'nothing'} behind it"
    if side == "student" and not reader.eos:
        means = "without an end-of-text token the student does not learn where a text ends"
        return _found(name, said, "note", means, "set eos_token in its tokenizer_config.json")
    return _found(name, said)


def _ids(side, loaded, score, refused, sampled):
    """Whether a model reads the text better than its tokens' bare frequencies: else its ids may not be its own. A few
    sentences have no frequencies worth the name: there it has to beat an even guess.
    """
    pair = loaded.pair
    vocabulary = (pair.teacher.reader if side == "teacher" else pair.student_reader).vocabulary
    nats = math.log(score.perplexity)
    if sampled:
        bare, against = math.log(vocabulary.num_rows), "an even guess"
    else:
        bare, against = (
            scoring.unigram_cross_entropy(vocabulary, side, loaded.train, loaded.validation),
            "bare frequencies",
        )
    said = f"reads {'a sample ' if sampled else ''}at {nats:.2f} nats a token, {against} at {bare:.2f}"
    name = f"{side}'s ids"
    if side == "student":
        if nats <= bare:
            return _found(name, said, number=nats)
        means = f"it knows less than {against}: right for new weights, else its tokenizer is another model's"
        return _found(name, said, "note", means, number=nats)
    try:
        scoring.check_tokenizers_fit(nats, bare)
    except IncompatiblePairError as error:
        if refused:
            return _found(name, said, "wrong", error.problem, error.remedy, number=nats)
        return _found(name, said, "note", f"{error.problem}; check_teacher is off, so this is let through", number=nats)
    return _found(name, said, number=nats)


def _method(name, pair, config):
    """What one way to distil has to work with, on the sample."""
    shown = f"kd {name}" + (", chosen" if config.kd_method == name else "")
    if name == "projector":
        wide, known = pair.teacher.config.hidden_size, len(pair.shared)
        said = f"{known:,} shared tokens to start a map from {wide} to {pair.head.width} dimensions"
        if known < wide:
            return _found(shown, said, "note", "fewer tokens than dimensions: the start is not determined by them")
        return _found(shown, said)
    rows = sum(len(window.student_rows) for window in pair.sample)
    if name == "chunk_likelihood":
        share = len(_spans(pair.sample)) / max(1, rows)
        return _found(shown, f"{share:.1%} of the common positions begin a span of text to compare", number=share)
    if name == "inside_tokens":
        return _inside(shown, pair)
    buckets = trie.buckets_of(pair, name)
    held = {}
    for side, of in (("student", buckets.student), ("teacher", buckets.teacher)):
        labels = np.concatenate([getattr(w, f"{side}_labels")[getattr(w, f"{side}_rows")] for w in pair.sample])
        held[side] = float((of[labels[labels >= 0]] < buckets.num - 1).mean()) if rows else 0.0
    said = "tells apart {student:.1%} of the student's next tokens, {teacher:.1%} of the teacher's".format(**held)
    least = min(held.values())
    if least < FEW and config.kd_method == name:
        means = "most of what is said falls into one tail bucket"
        return _found(shown, said, "note", means, number=least)
    return _found(shown, said, number=least)


def _advice(config):
    """The way to distil that the study found the best, where it is not the one of the config."""
    said = f"{BEST}, kd_weight {Config.kd_weight:g}, lm_weight {Config.lm_weight:g}"
    chosen = config.kd_method, config.kd_weight, config.lm_weight
    if chosen == (BEST, Config.kd_weight, Config.lm_weight):
        return _found("advised", f"{said}, as chosen")
    means = "the best on every pair that was measured; chosen are {}, {:g}, {:g}".format(*chosen)
    return _found("advised", said, "note", means)


def _prospect(pair, teacher, student):
    """What distilling may save over plain training in the same time, from how far teacher and student are apart."""
    ours, theirs = student.bits_per_byte, teacher.bits_per_byte
    said = f"student at {ours:.2f} bits per byte, teacher at {theirs:.2f}"
    if theirs >= ours:
        means = "the teacher knows this text no better than the student: plain training is likely to do as well"
        return _found("to be gained", said, "note", means, number=0.0)
    if math.log(student.perplexity) > math.log(pair.student_reader.vocabulary.num_rows) - 1.0:
        means = (
            "0.11 to 0.28 bits per byte in the same time as plain training on the three small pairs that were measured "
            "from scratch; kd_weight 0.9 beside lm_weight 0.1 was the best on two of them, and contrastive_weight 0.15 "
            "added 0.02 to 0.03 (RESULTS.md)"
        )
        said += "; a student that knows next to nothing yet learns to read first"
        return _found("to be gained", said, "ok", means)
    low, high = (share * (ours - theirs) for share in SAVED)
    means = (
        "in the same time as plain training, if this pair is like the three small ones that were measured (RESULTS.md)"
    )
    return _found("to be gained", f"{said}; {low:.2f} to {high:.2f} better", "ok", means, number=low)


def _inside(shown, pair):
    """What share of the student's positions `inside_tokens` has a signal for, on the sample."""
    batches, tries = [batching.collate([window]) for window in pair.sample], trie.tries_of(pair)
    agreeing = sum(
        int(partial_tokens.agreeing(trie.buckets_of(pair, "inside_tokens"), batch).sum()) for batch in batches
    )
    walks = [partial_tokens.PartialTokens.build(tries, batch) for batch in batches]
    ours, theirs = (sum(len(getattr(each, name)) for each in walks) for name in ("positions", "inner"))
    shares = [count / max(1, sum(w.num_positions for w in pair.sample)) for count in (agreeing + ours, ours, theirs)]
    said = (
        "{:.1%} of the student's positions have a signal, {:.1%} inside a teacher's token; {:.1%} more inside its own"
    )
    return _found(shown, said.format(*shares), number=shares[0])


def _cuts(pair):
    """How often the two tokenizers cut the sample's text so that a certain teacher would teach its own cut, and what is left
    of that.
    """
    spellings = trie.spellings_of(pair)
    apart, joined = trie.buckets_apart(pair), trie.buckets_of(pair, "inside_tokens")
    (before, total), (after, _) = (trie.partings(pair.sample, each, spellings) for each in (apart, joined))
    before, after = (sum(found.values()) / max(1, total) for found in (before, after))
    said = f"they part at {before:.1%} of the common positions"
    said += f"; {apart.num - joined.num} buckets are joined, {after:.1%} left out"
    if after > MUCH_LEFT:
        means = "there the teacher would teach its own way to cut the text, so nothing is learned from it"
        return _found("other cuts of the text", said, "note", means, number=before)
    return _found("other cuts of the text", said, number=before)
