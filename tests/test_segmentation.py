"""A perfect teacher is a fixed point: certain of a text in its own tokens, it teaches nothing to a student that is certain
of the text in its own.
"""

import collections
import dataclasses
import functools
import itertools
import types

import numpy as np
import pytest
import torch
from families import reader as family
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shared import DATA
from test_shared import reader as real_reader
from test_shared import text as real_text

from kdlib.align import vocab
from kdlib.config import KD_METHODS, Config
from kdlib.data import batching, tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.evaluation import pair_report
from kdlib.losses import partial_tokens
from kdlib.losses.teacher_signal import TeacherSignal
from kdlib.models import forward, teacher, teacher_cache, trie
from kdlib.models.head import Head
from kdlib.models.pair import Pair
from kdlib.session import inputs

METHODS = [name for name in KD_METHODS if name != "none"]
BY_BUCKETS = ("shared_vocab", "first_token", "byte_prefix")
WIDTH, SURE = 64, 2000.0
CODE = (
    "def total(values):\n    s = 0\n    for v in values:\n        s += v\n\n    return s\n\n\nclass A:\n\n    x = 1\n"
)
PROSE = "The cats sat down. “Is there none?” asked Emma.\n\nShe looked, and the dogs had gone – nothing was left.\n"
JAPANESE = "東京は日本の首都です。\n\n「はい」と言った。The end 😀👩‍👩‍👧.\n"
TEXTS = [Document(text) for text in (CODE, PROSE, JAPANESE)]
NAMES = ("byte_level", "unigram", "sentencepiece_bpe", "byte_level_lower")
REAL = [
    ("gpt2", "mistral-v1-32k"),
    pytest.param(("gpt2", "cl100k"), marks=pytest.mark.slow),
    pytest.param(("cl100k", "gpt2"), marks=pytest.mark.slow),
]


def cut(ours, theirs, documents, max_length=96):
    """The windows of documents."""
    windows = []
    for number, document in enumerate(documents):
        coded = [tokenize.encode(document, each) for each in (ours, theirs)]
        windows += windowing.cut_windows(document, *coded, ours, theirs, max_length, number)
    return windows


def pair_of(ours, theirs, windows, width=WIDTH):
    """A pair of two readers whose buckets these windows join; the rows of its heads are random directions."""
    sides = []
    for seed, each in enumerate((ours, theirs)):
        model = tiny_model(each.tokenizer, width, 1, seed=seed)
        weight = model.get_output_embeddings().weight
        weight.data = torch.nn.functional.normalize(torch.randn_like(weight), dim=-1)
        sides.append(model)
    student, larger = sides
    shared = vocab.shared_vocabulary(ours.vocabulary, theirs.vocabulary)
    head = Head(student, ours.vocabulary)
    return Pair(teacher.Teacher(larger, theirs), student, ours, head, shared, (0, 0), text=windows)


def certain(model, labels):
    """Last hidden states that give every label a probability of 1."""
    states = SURE * model.get_output_embeddings().weight.detach()[labels.clamp_min(0)]
    return torch.where(labels[..., None] < 0, 0.0, states)


def objective_of(pair, config):
    """Made once for a pair and a way."""
    key = config.kd_method, config.kd_divergence
    if key not in pair.buckets:
        pair.buckets[key] = inputs.make_objective(pair, config)
    made, pair.buckets[key].config = pair.buckets[key], config
    return made


def told(pair, config, batch, states, theirs):
    """`(kd, gradient at the student's states)` of last hidden states of both sides, the teacher's flat."""
    made = objective_of(pair, config)
    hidden, inner = theirs[batch.teacher_rows], theirs[batch.inner_rows]
    if config.kd_method == "projector":  # one that has learned all there is
        hidden = states.detach().flatten(0, 1)[batch.student_rows]
        made.adapters["projector"] = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        made.adapters["projector"].weight.data = torch.eye(WIDTH)
    signal = TeacherSignal(hidden, torch.zeros(batch.num_aligned), partial_hidden=inner)
    if made.teacher_head and config.teacher_cache == "auto":
        signal = in_short(pair, config, batch, signal)
    counts = {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, "read", lambda *_: forward.Features(states, (), (), (), None))
        loss, parts, _ = made(batch, signal, counts)
    (gradient,) = torch.autograd.grad(loss, states)
    return parts["kd"].item(), gradient


def in_short(pair, config, batch, signal):
    """The signal as a cache holds it."""
    wanted, head = teacher_cache.settings_of(config, len(pair.shared)), pair.teacher.head
    buckets = trie.buckets_of(pair, config.kd_method)
    top = teacher_cache.topk_spec(pair, buckets, wanted).select(head.decode(signal.hidden).log_softmax(-1))
    said = None
    if config.kd_method == "byte_prefix":
        tries, bucket_of = trie.tries_of(pair), head.by_column(buckets.teacher)
        said = partial_tokens.PartialTokens.build(tries, batch).top_k_outcomes(
            tries, signal, head.decode, bucket_of, teacher_cache.INSIDE_K, 1.0
        )
    return TeacherSignal(None, signal.span_log_probs, top, partial_topk=said)


def learned(pair, windows, method, **changes):
    """`(kd, largest gradient)` of a student and a teacher that are certain of the windows, each in its own tokens."""
    values = {"kd_method": method, "lm_weight": 0.0, "kd_weight": 1.0, "teacher_cache": "live", **changes}
    batch = batching.collate(windows, *pair.pads)
    states = certain(pair.student, batch.labels).requires_grad_()
    theirs = certain(pair.teacher.model, batch.teacher_labels).flatten(0, 1)
    kd, gradient = told(pair, Config.from_dict(values), batch, states, theirs)
    return abs(kd), gradient.abs().max().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", list(itertools.permutations(NAMES, 2)), ids=" ".join)
def test_a_perfect_teacher_teaches_nothing(names, method):
    readers = [family(name) for name in names]
    windows = cut(*readers, TEXTS)
    pair = pair_of(*readers, windows)
    assert max(learned(pair, windows, method)) < 1e-4
    if method in BY_BUCKETS:
        assert max(learned(pair, windows, method, teacher_cache="auto")) < 1e-4
        assert max(learned(pair, windows, method, kd_top_k=4, kd_divergence="jsd", kd_temperature=2.0)) < 1e-3


def test_partings_are_counted_at_boundaries_and_inside_tokens():
    """Teacher's token 3 is spelled 1, 2 in the student's tokens and lies in the bucket of 1."""
    buckets = vocab.Buckets(np.arange(6), np.array([0, 1, 2, 1, 4, 5]), np.arange(5))
    spellings = [(), (), (), (1, 2), (), ()], [()] * 6

    def window(pieces, whole):
        ours = np.array([0, *pieces, 0]), np.array([1]), np.array([1 + len(pieces)])
        theirs = np.array([0, whole, 0]), np.array([1]), np.array([2])
        names = [f"{side}_{name}" for side in ("student", "teacher") for name in ("labels", "rows", "span_ends")]
        return types.SimpleNamespace(**dict(zip(names, ours + theirs, strict=True)))

    text = [window([1, 4], 3), window([1, 4], 3), window([1, 2], 3), window([2, 1], 3), window([2], 2)]
    assert trie.count_conflicts(text, buckets, spellings) == ({(2, 4): 2, (2, 1): 1}, 5)
    assert trie.count_buckets(text, buckets).tolist() == [0, 4, 2, 0, 0, 0]


LETTERS = st.text(st.sampled_from("  \n\n\tabcdefTt.:()'“é東"), min_size=8, max_size=80)


@functools.cache
def stranger(names):
    """A pair whose buckets another text joined."""
    readers = [family(name) for name in names]
    return pair_of(*readers, cut(*readers, TEXTS[:1]))


@settings(max_examples=40, deadline=None)
@given(LETTERS, st.sampled_from(list(itertools.permutations(NAMES[:3], 2))), st.sampled_from(BY_BUCKETS))
def test_nor_on_a_text_that_joined_no_buckets(text, names, method):
    pair = stranger(names)
    windows = cut(pair.student_reader, pair.teacher.reader, [Document("the " + text)])
    if sum(len(window.student_rows) for window in windows):
        assert max(learned(pair, windows, method)) < 1e-4


@pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")
@pytest.mark.parametrize("names", REAL, ids=lambda names: " ".join(names))
def test_nor_do_real_tokenizers_on_code_and_prose(names):
    readers = [real_reader(name) for name in names]
    texts = [real_text(name, 4000) for name in ("python_peps.txt", "standardebooks_emma.txt")]
    windows = cut(*readers, [Document(text) for text in (*texts, CODE, JAPANESE)])
    pair = pair_of(*readers, windows)
    for method in ("first_token", "byte_prefix", "shared_vocab"):
        assert max(learned(pair, windows[:6], method)) < 1e-4
    apart = trie.unjoined_buckets(pair)
    found, total = trie.count_conflicts(windows, apart, trie.spellings_of(pair))
    left, _ = trie.count_conflicts(windows, trie.buckets_of(pair, "byte_prefix"), trie.spellings_of(pair))
    assert sum(found.values()) > 0.01 * total
    assert sum(left.values()) < 0.75 * sum(found.values())
    assert max(left.values()) < max(found.values())
    said = pair_report._cuts(dataclasses.replace(pair, sample=windows))
    assert said.number == sum(found.values()) / total


# a world of ten texts, of which both models know all that can be known

BEGINNING = "def read(path):\n    with open(path) as file:\n        return"
WORLD = {
    " file.read()\n The end.": 3, " file.read()\n\n    done.": 2, ":\n        the cat.": 2, ": the cat, and.": 1,
    "ing the first item.": 1, "\n    return file.": 2, "\n        return file, file.": 1, "\n\nThe end.": 1,
    " the dogs.": 1, " the dog looked.": 1,
}  # fmt: skip


def conditionals(texts, chances, num):
    """`{ids read: distribution of the next}` of texts, as lists of ids, that come with these chances."""
    found = collections.defaultdict(lambda: torch.zeros(num, dtype=torch.float64))
    for ids, chance in zip(texts, chances, strict=True):
        for i in range(1, len(ids)):
            found[tuple(ids[:i])][ids[i]] += chance
    return {read: sums / sums.sum() for read, sums in found.items()}


def in_the_world(names, method):
    """`{what the student has read: expected gradient}` of a student that knows the world, by a teacher that does; and what
    it has read where the teacher has read what the very same texts begin with.
    """
    readers, chances = [family(name) for name in names], np.array(list(WORLD.values()), float)
    windows = cut(*readers, [Document(BEGINNING + text) for text in WORLD], 400)
    assert len(windows) == len(WORLD)
    width = -(-max(each.vocabulary.num_rows for each in readers) // 4) * 4
    pair = pair_of(*readers, windows * 2, width)
    sides = [(pair.student, "student"), (pair.teacher.model, "teacher")]
    texts = {side: [getattr(window, f"{side}_ids").tolist() for window in windows] for _, side in sides}
    known = {}
    for model, side in sides:
        weight = model.get_output_embeddings().weight
        weight.data = torch.eye(*weight.shape)
        known[side] = conditionals(texts[side], chances / chances.sum(), len(weight))

    def states(side):
        made = torch.zeros(1, len(ids[side]), width)
        for i in range(len(ids[side])):
            if (said := known[side].get(tuple(ids[side][: i + 1]))) is not None:
                made[0, i, : len(said)] = (said + 1e-12).log()
        return made

    expected, alike = {}, set()
    config = Config.from_dict({"kd_method": method, "lm_weight": 0.0, "kd_weight": 1.0, "teacher_cache": "live"})
    for window, chance in zip(windows, chances / chances.sum(), strict=True):
        ids = {side: getattr(window, f"{side}_ids").tolist() for _, side in sides}
        batch = batching.collate([window])
        _, gradient = told(pair, config, batch, states("student").requires_grad_(), states("teacher")[0])
        for i, row in enumerate(gradient[0] * chance * batch.num_aligned):
            read = tuple(ids["student"][: i + 1])
            expected[read] = expected.get(read, 0.0) + row
        for ours, theirs in zip(window.student_rows, window.teacher_rows, strict=True):
            read = {"student": ids["student"][: ours + 1], "teacher": ids["teacher"][: theirs + 1]}
            same = [{n for n, text in enumerate(texts[side]) if text[: len(read[side])] == read[side]} for side in read]
            if same[0] == same[1]:
                alike.add(tuple(read["student"]))
    return {read: gradient.abs().max().item() for read, gradient in expected.items()}, alike, windows


@pytest.mark.parametrize("names", list(itertools.permutations(NAMES[:3], 2)), ids=" ".join)
def test_where_the_two_know_the_same_the_students_own_view_is_the_least(names):
    """In expectation over the texts, wherever teacher and student stand behind the same texts' beginnings. Elsewhere the
    teacher's cut tells it what is to come: that is left.
    """
    expected, alike, windows = in_the_world(names, "first_token")
    assert len(alike) > 30
    assert max(expected[read] for read in alike) < 1e-5
    off = [read for read, gradient in expected.items() if gradient > 1e-4]
    assert len(off) <= 4
    inside, _, _ = in_the_world(names, "byte_prefix")
    rows = {tuple(w.student_ids[: row + 1].tolist()) for w in windows for row in w.student_rows}
    assert max(inside[read] for read in alike if read in rows) < 0.05
