"""A look inside a pair: how two tokenizations of a text meet, where teacher and students look, which layers are alike.

What is found is plain values, written as `figures/inside.json` and drawn by `charts`.
"""

import itertools

import numpy as np
import torch

from kdlib.data import corpus, tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.losses import features
from kdlib.models import hooks, loading, teacher_cache

SHOWN_SPANS, SHOWN_CHARS = 24, 240
"""How much of a text is shown: spans of an attention map, characters of an alignment."""
COMPARED_POSITIONS = 512
"""Aligned positions on which layers are compared."""
MANY = 4
"""Spans of so many tokens or more on a side are counted together."""
COVERAGE_BINS = 20


def look(config, inputs, students):
    """What is told of a run's `inputs.Inputs`; `students`: weights by name. A teacher that was let go is loaded again. Where
    a model can't be watched, or the memory has no room, `without` says why.
    """
    pair = inputs.pair
    windows = [window for group in inputs.test.windows for window in group if len(window.student_rows) > 1]
    if not windows:
        return {"spans": [], "sizes": sizes(pair.sample), "coverage": coverage(inputs.train),
                "without": "no held-out window has an aligned position to show"}  # fmt: skip
    window = _shown(windows)
    readers = pair.student_reader, pair.teacher.reader
    told = {
        "spans": spans(window, *readers)[: SHOWN_SPANS + 1],
        "sizes": sizes(pair.sample),
        "coverage": coverage(inputs.train),
    }
    if pair.teacher.model is None and config.cached:
        return {**told, "without": "the teacher came from its cache, which keeps none of its layers"}
    try:
        teacher = pair.teacher.model or _loaded_again(config, pair)
        told |= {"attention": {"teacher": attention_map(teacher, window, "teacher")}, "similarity": {}}
        theirs = layer_states(teacher, windows, "teacher")
        for name, weights in students.items():
            loading.load_cpu_state_dict(pair.student, weights)
            told["attention"][name] = attention_map(pair.student, window, "student")
            ours = layer_states(pair.student, windows, "student")
            told["similarity"][name] = [[round(cka(a, b), 4) for b in theirs] for a in ours]
    except Exception as error:  # noqa: BLE001 - a look at models of any kind, on a run that is complete
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        told["without"] = f"the models could not be watched: {reason}".splitlines()[0]
    return told


def _loaded_again(config, pair):
    dtype = getattr(torch, pair.teacher.identity["teacher_dtype"].removeprefix("torch."))
    return loading.load_model(config.teacher, "teacher", dtype, pair.student.device, config.teacher_quantization)


def sentence(config):
    """The spans of the beginning of a config's text, both tokenizers having read it: nothing but tokenizers is loaded."""
    student = loading.load_reader(config.student, "student")
    if config.cached:
        teacher = teacher_cache.CachedTeacher(teacher_cache.folders_of(config.teacher_cache)).reader
    else:
        teacher = loading.load_reader(config.teacher, "teacher")
    text = next(iter(corpus.read_documents(config.dataset, config.text_field))).text
    document = Document(_beginning(text, SHOWN_CHARS))
    windows = windowing.cut_windows(
        document,
        tokenize.encode(document, student),
        tokenize.encode(document, teacher),
        student,
        teacher,
        4 * SHOWN_CHARS,
    )
    return spans(windows[0], student, teacher) if windows else []


def spans(window, student, teacher):
    """The pieces of a window that both tokenizations delimit: `[{"student": [text of each token], "teacher": [...]}]`. What
    stands between two positions where both have read the same bytes is one piece.
    """
    ours = _pieces(student, window.student_ids, window.student_rows)
    theirs = _pieces(teacher, window.teacher_ids, window.teacher_rows)
    return [{"student": a, "teacher": b} for a, b in zip(ours, theirs, strict=True)]


def _pieces(reader, ids, rows):
    """The texts of one side's tokens, in a list for each piece, torn characters as their bytes; what the tokenizer put
    around the text is left out.
    """
    vocabulary, last = reader.vocabulary, len(ids)
    if reader.eos and ids[-1] == reader.eos[-1]:
        last -= len(reader.eos)
    texts = [(vocabulary.tokens[index] or b"").decode("utf-8", "backslashreplace") for index in ids]
    first = (
        len(reader.prefix) if list(ids[: len(reader.prefix)]) == reader.prefix else 0
    )  # a chat template may write none
    edges = [first, *(int(row) + 1 for row in rows), last]
    return [texts[start:stop] for start, stop in itertools.pairwise(edges)]


def sizes(windows):
    """Shares of spans by their tokens: `[MANY][MANY]`, row i: i + 1 of the student's tokens, column j: j + 1 of the
    teacher's; the last row and column are for so many or more.
    """
    counts = np.zeros((MANY, MANY))
    for window in windows:
        ours, theirs = window.student_span_ends - window.student_rows, window.teacher_span_ends - window.teacher_rows
        known = ours > 0
        np.add.at(counts, (np.minimum(ours[known], MANY) - 1, np.minimum(theirs[known], MANY) - 1), 1)
    return (counts / max(1, counts.sum())).round(5).tolist()


def coverage(windows):
    """How many training windows have which share of their positions with teacher signal, in bins of equal width."""
    shares = windows.column("student_rows") / np.maximum(1, windows.column("num_positions"))
    return np.histogram(shares, bins=COVERAGE_BINS, range=(0.0, 1.0))[0].tolist()


def attention_map(model, window, side):
    """Attention between the first spans of a window `[K, K]`: the mean of `features.span_map` over all heads and all
    layers that are attentions.
    """
    rows = torch.from_numpy(getattr(window, f"{side}_rows")[: SHOWN_SPANS + 1]).to(model.device)
    layers = range(model.config.num_hidden_layers)
    seen = _watched(model, getattr(window, f"{side}_ids")[: int(rows[-1]) + 1], attention_of=layers)
    if not seen.attention:
        raise ValueError(f"no layer of {type(model).__name__} is an attention that can be watched")
    maps = []
    for layer in sorted(seen.attention):  # in a hybrid model some layers are none
        query, key, _, scaling = seen.attention[layer]
        maps.append(features.span_map(query[0][:, rows], key[0], rows, scaling).exp()[1:, 1:].cpu())
    return [[round(x, 4) for x in row] for row in torch.stack(maps).double().mean(dim=0).tolist()]


def layer_states(model, windows, side):
    """Each layer's output at the aligned positions of some windows, centred by nothing: a list of float64 `[N, D]`."""
    found, count = [], 0
    for window in windows:
        if count >= COMPARED_POSITIONS:
            break
        rows = torch.from_numpy(getattr(window, f"{side}_rows"))[: COMPARED_POSITIONS - count]
        seen = _watched(model, getattr(window, f"{side}_ids"), layers=range(model.config.num_hidden_layers))
        found.append([seen.layers[i][0][rows.to(model.device)].double().cpu() for i in sorted(seen.layers)])
        count += len(rows)
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def cka(ours_ND, theirs_NE):
    """How alike two layers see the same N positions, 1 for the same up to rotation and scale, about 0 for unrelated ones:
    linear centred kernel alignment, Kornblith et al. 2019, arXiv 1905.00414, with the unbiased estimate of Nguyen et al.
    2021, arXiv 2010.15327, eq. 3, since positions may be fewer than dimensions.
    """
    grams = [states @ states.T for states in (ours_ND, theirs_NE)]
    a, b = (gram.fill_diagonal_(0.0) for gram in grams)
    scale = (_alike(a, a) * _alike(b, b)) ** 0.5
    return float(_alike(a, b) / scale) if scale > 0 else 0.0


def _alike(a, b):
    num = len(a)
    sums = a.sum(dim=1), b.sum(dim=1)
    crossed = (a * b).sum() + sums[0].sum() * sums[1].sum() / ((num - 1) * (num - 2))
    return float(crossed - 2.0 / (num - 2) * (sums[0] @ sums[1])) / (num * (num - 3))


@torch.no_grad()
def _watched(model, ids, layers=(), attention_of=()):
    """The `hooks.Seen` of one forward pass over `ids`, the model in evaluation mode for so long."""
    was_watched, was_training = model.config._attn_implementation == hooks.WATCHED_SDPA, model.training
    hooks.watch_attention(model, bool(attention_of) or was_watched)
    model.eval()
    try:
        with hooks.watch(model, tuple(layers), tuple(attention_of)) as seen:
            model.base_model(input_ids=torch.from_numpy(ids)[None].to(model.device), use_cache=False)
    finally:
        model.train(was_training)
        hooks.watch_attention(model, was_watched)
    return seen


def _shown(windows):
    """The held-out window whose beginning is shown: one that has enough spans, the longest else."""
    enough = [window for window in windows if len(window.student_rows) > SHOWN_SPANS]
    return max(enough or windows, key=lambda window: (len(window.student_rows), -window.place))


def _beginning(text, size):
    """The beginning of a text up to its last whole word."""
    cut = text.strip()[:size]
    return cut[: cut.rindex(" ")] if len(text.strip()) > size and " " in cut.strip() else cut
