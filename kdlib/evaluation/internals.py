"""Internals of a pair: alignment of the tokenizations, attention maps, and similarity of layers.

The results are plain values, written to `figures/inside.json` and drawn by `report.figures`.
"""

import itertools

import numpy as np
import torch

from kdlib.data import corpus, tokenize, windowing
from kdlib.data.records import Document
from kdlib.evaluation.preview import load_readers
from kdlib.losses import features
from kdlib.models import hooks, loading
from kdlib.report.spans import AlignedSpans

SHOWN_SPANS, SHOWN_CHARS = 24, 240
"""Spans in an attention map, and characters in a displayed alignment."""
MAX_POSITIONS = 512
"""Aligned positions for the similarity of layers."""
MAX_SPAN_TOKENS = 4
"""Token count of a span from which longer spans share one bin."""
COVERAGE_BINS = 20


def look(config, inputs, students):
    """Returns the content of `inside.json` for a run.

    `inputs`: `session.inputs.Inputs`. `students`: state dicts by name. Reloads a teacher that was released. If a model
    cannot be observed, or memory runs out, `without` gives the reason.
    """
    pair = inputs.pair
    result = {"spans": [], "sizes": sizes(pair.sample), "coverage": coverage(inputs.train)}
    windows = [window for group in inputs.test.windows for window in group if len(window.student_rows) > 1]
    if not windows:
        return {**result, "without": "no held-out window has an aligned position to show"}
    window = _window_to_show(windows)
    result["spans"] = spans(window, pair.student_reader, pair.teacher.reader)[: SHOWN_SPANS + 1]
    if pair.teacher.model is None and config.cached:
        return {**result, "without": "the teacher cache contains no hidden layers"}
    try:
        teacher = pair.teacher.model or _reload_teacher(config, pair)
        result |= {"attention": {"teacher": attention_map(teacher, window, "teacher")}, "similarity": {}}
        teacher_layers = layer_states(teacher, windows, "teacher")
        for name, weights in students.items():
            loading.load_cpu_state_dict(pair.student, weights)
            result["attention"][name] = attention_map(pair.student, window, "student")
            layers = layer_states(pair.student, windows, "student")
            result["similarity"][name] = [[round(cka(a, b), 4) for b in teacher_layers] for a in layers]
    except Exception as error:  # noqa: BLE001 - the run is complete, and models of any kind may fail here
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        result["without"] = f"the models could not be observed: {reason}".splitlines()[0]
    return result


def _reload_teacher(config, pair):
    dtype = getattr(torch, pair.teacher.identity["teacher_dtype"].removeprefix("torch."))
    return loading.load_model(config.teacher, "teacher", dtype, pair.student.device, config.teacher_quantization)


def align_sentence(config):
    """Returns the `AlignedSpans` of the first characters of a config's text. Loads the tokenizers, but no models."""
    student, teacher = load_readers(config)
    text = corpus.documents_of(config)[0].text
    document = Document(_truncate(text, SHOWN_CHARS))
    encodings = tokenize.encode(document, student), tokenize.encode(document, teacher)
    windows = windowing.cut_windows(document, *encodings, student, teacher, 4 * SHOWN_CHARS)
    return AlignedSpans(spans(windows[0], student, teacher) if windows else [])


def spans(window, student, teacher):
    """Returns the token texts of each span between aligned positions: `[{"student": [...], "teacher": [...]}]`."""
    student_spans = _split_tokens(student, window.student_ids, window.student_rows)
    teacher_spans = _split_tokens(teacher, window.teacher_ids, window.teacher_rows)
    return [{"student": a, "teacher": b} for a, b in zip(student_spans, teacher_spans, strict=True)]


def _split_tokens(reader, ids, rows):
    """Returns the token texts of each span, without special tokens. Incomplete characters become escaped bytes."""
    vocabulary, end = reader.vocabulary, len(ids)
    if reader.eos and ids[-1] == reader.eos[-1]:
        end -= len(reader.eos)
    texts = [(vocabulary.tokens[index] or b"").decode("utf-8", "backslashreplace") for index in ids]
    has_prefix = list(ids[: len(reader.prefix)]) == reader.prefix  # a chat template may write none
    edges = [len(reader.prefix) if has_prefix else 0, *(int(row) + 1 for row in rows), end]
    return [texts[start:stop] for start, stop in itertools.pairwise(edges)]


def sizes(windows):
    """Returns the shares of spans with i + 1 student tokens (rows) and j + 1 teacher tokens (columns). The last row and
    column include longer spans.
    """
    counts = np.zeros((MAX_SPAN_TOKENS, MAX_SPAN_TOKENS))
    for window in windows:
        student = window.student_span_ends - window.student_rows
        teacher = window.teacher_span_ends - window.teacher_rows
        bins = [np.minimum(lengths[student > 0], MAX_SPAN_TOKENS) - 1 for lengths in (student, teacher)]
        np.add.at(counts, tuple(bins), 1)
    return (counts / max(1, counts.sum())).round(5).tolist()


def coverage(windows):
    """Returns a histogram of the training windows by their share of aligned positions, with bins of equal width."""
    shares = windows.column("student_rows") / np.maximum(1, windows.column("num_positions"))
    return np.histogram(shares, bins=COVERAGE_BINS, range=(0.0, 1.0))[0].tolist()


def attention_map(model, window, side):
    """Returns attention between a window's first spans, `[K][K]`: mean of `features.span_map` over heads and layers.

    Raises ValueError if no layer is an attention layer that can be observed.
    """
    rows = torch.from_numpy(getattr(window, f"{side}_rows")[: SHOWN_SPANS + 1]).to(model.device)
    layers = range(len(hooks.decoder_layers(model)))
    seen = _observe(model, getattr(window, f"{side}_ids")[: int(rows[-1]) + 1], attention_of=layers)
    if not seen.attention:
        raise ValueError(f"no layer of {type(model).__name__} is an attention layer that can be observed")
    maps = []
    for layer in sorted(seen.attention):  # not all layers of a hybrid model
        query, key, _, scaling = seen.attention[layer]
        maps.append(features.span_map(query[0][:, rows], key[0], rows, scaling).exp()[1:, 1:].cpu())
    return [[round(x, 4) for x in row] for row in torch.stack(maps).double().mean(dim=0).tolist()]


def layer_states(model, windows, side):
    """Returns each layer's output at the aligned positions of the first windows, a list of float64 `[N, D]`."""
    states, count = [], 0
    for window in windows:
        if count >= MAX_POSITIONS:
            break
        rows = torch.from_numpy(getattr(window, f"{side}_rows"))[: MAX_POSITIONS - count]
        layers = range(len(hooks.decoder_layers(model)))
        seen = _observe(model, getattr(window, f"{side}_ids"), layers=layers)
        states.append([seen.layers[i][0][rows.to(model.device)].double().cpu() for i in sorted(seen.layers)])
        count += len(rows)
    return [torch.cat(layer) for layer in zip(*states, strict=True)]


def cka(student_ND, teacher_NE):
    """Returns the linear centred kernel alignment of two layers over N positions.

    It is 1 if they are equal up to rotation and scale, and about 0 if they are unrelated: Kornblith et al. 2019, arXiv
    1905.00414. Uses the unbiased estimate of Nguyen et al. 2021, arXiv 2010.15327, eq. 3, for few positions.
    """
    a, b = (gram.fill_diagonal_(0.0) for gram in (states @ states.T for states in (student_ND, teacher_NE)))
    scale = (_hsic(a, a) * _hsic(b, b)) ** 0.5
    return float(_hsic(a, b) / scale) if scale > 0 else 0.0


def _hsic(a, b):
    """Returns the unbiased Hilbert-Schmidt independence criterion of two Gram matrices without their diagonals."""
    num = len(a)
    sums = a.sum(dim=1), b.sum(dim=1)
    trace = (a * b).sum() + sums[0].sum() * sums[1].sum() / ((num - 1) * (num - 2))
    return float(trace - 2.0 / (num - 2) * (sums[0] @ sums[1])) / (num * (num - 3))


@torch.no_grad()
def _observe(model, ids, layers=(), attention_of=()):
    """Returns the `hooks.Watched` of one forward pass over `ids` in evaluation mode."""
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


def _window_to_show(windows):
    """Returns a window with enough spans, or else the one with the most."""
    long_windows = [window for window in windows if len(window.student_rows) > SHOWN_SPANS]
    return max(long_windows or windows, key=lambda window: (len(window.student_rows), -window.window_id))


def _truncate(text, size):
    """Returns at most `size` characters of a text, up to the end of a word."""
    start = text.strip()[:size]
    return start[: start.rindex(" ")] if len(text.strip()) > size and " " in start.strip() else start
