"""Two tokenizations of one text: comparable exactly where both have read the same bytes."""

import itertools

import numpy as np
import pytest
from families import FAMILIES, LOSSLESS, reader
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdlib.align import boundaries, vocab

PIECES = st.one_of(
    st.sampled_from(
        ["the", " the", "The cat", "  ", "   ", "\t", "\r\n", "\n\n\n", "\n    ", "é", "e\u0301", "ﬁ", "Ⅳ", "①", "😀",
         "👩‍👩‍👧", "🇫🇷", "東京", "नमस्ते", "ß", "İ", "“", "…", "--", "x1y2", "<s>", "\u00a0", "\u200b",
         "\u0300", "▁", "Ġ", "<0x41>", ""]
    ),
    st.text(max_size=6),
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=12).map("".join).filter(lambda text: "\ud800" not in text)


def spans_of(name, text):
    used = reader(name)
    coded = used.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return coded["input_ids"], boundaries.token_spans(
        text, coded["input_ids"], coded["offset_mapping"], used.vocabulary
    )


def is_utf8(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def has_special(text):
    return any(mark in text for mark in ("<s>", "</s>", "<unk>", "<|endoftext|>", "[", "▁", "<0x"))


@pytest.mark.parametrize("pair", list(itertools.combinations(LOSSLESS, 2)), ids="-".join)
@given(text=TEXTS)
@settings(max_examples=150, deadline=None)
def test_lossless_pairs_agree_exactly_where_their_bytes_do(pair, text):
    """Against the slow way: put the tokens' bytes together and compare every prefix with every prefix."""
    if has_special(text):
        return
    read = []
    for name in pair:
        ids, _ = spans_of(name, text)
        said, tokens = b"", reader(name).vocabulary.tokens
        last = {}
        for position, i in enumerate(ids):
            said += tokens[i]
            last[said] = position
        space = reader(name).vocabulary.adds_space and said != text.encode()
        read.append({prefix[1:] if space else prefix: position for prefix, position in last.items()})
    ours, theirs = read
    expected = sorted(
        (len(prefix), ours[prefix], theirs[prefix])
        for prefix in ours.keys() & theirs.keys()
        if prefix and is_utf8(prefix)
    )
    found = boundaries.align(spans_of(pair[0], text)[1], spans_of(pair[1], text)[1])
    assert list(zip(found.ends.tolist(), found.student.tolist(), found.teacher.tolist(), strict=True)) == expected


@pytest.mark.parametrize("name", sorted(FAMILIES))
@given(text=TEXTS)
@example(text="")
@example(text="   ")
@example(text="ﬁne İstanbul ①\u0301")
@settings(max_examples=150, deadline=None)
def test_boundaries_lie_between_characters_and_faithful_tokens_are_the_text(name, text):
    ids, found = spans_of(name, text)
    data, tokens = text.encode(), reader(name).vocabulary.tokens
    assert (np.diff(found.ends) >= 0).all()
    assert (found.ends <= len(data)).all()
    ends = found.ends[found.boundary]
    assert (np.diff(ends) > 0).all()
    for end in ends:
        assert is_utf8(data[:end])
    starts = np.append(0, found.ends)[:-1]
    for start, end, i in zip(
        starts[found.faithful], found.ends[found.faithful], np.array(ids)[found.faithful], strict=True
    ):
        assert tokens[i] in (data[start:end], b" " + data[start:end] if start == 0 else data[start:end])
    if name in LOSSLESS and not has_special(text):
        assert found.faithful.all()


@pytest.mark.parametrize("pair", list(itertools.product(["byte_level", "word_piece", "unigram_nfkc"], sorted(FAMILIES))),
                         ids="-".join)  # fmt: skip
@given(text=TEXTS)
@settings(max_examples=80, deadline=None)
def test_usable_pairs_predict_the_same_bytes(pair, text):
    ids, spans = zip(*(spans_of(name, text) for name in pair), strict=True)
    found = boundaries.align(*spans)
    mirrored = boundaries.align(*reversed(spans))
    assert found.student.tolist() == mirrored.teacher.tolist()
    data = text.encode()
    for side, positions in enumerate((found.student, found.teacher)):
        tokens = reader(pair[side]).vocabulary.tokens
        assert (spans[side].ends[positions] == found.ends).all()
        for position, end in zip(positions[found.usable], found.ends[found.usable], strict=True):
            assert data[end:].startswith(tokens[ids[side][position + 1]])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_tokenization_agrees_with_itself_everywhere(name):
    _, found = spans_of(name, "The cat sat on the mat.")
    same = boundaries.align(found, found)
    assert same.student.tolist() == same.teacher.tolist() == np.flatnonzero(found.boundary).tolist()
    assert len(same) > 5


def test_index_pairs_are_not_what_comes_out():
    text = "Return the first item of the list; raise ValueError if there is none."
    found = boundaries.align(spans_of("byte_level", text)[1], spans_of("unigram", text)[1])
    assert (found.student != found.teacher).any()


def test_a_split_character_has_one_boundary():
    text = "a😀b"
    ids, found = spans_of("byte_level", text)
    assert len(ids) > 3
    assert found.ends[found.boundary].tolist() == [1, 5, 6]


def test_of_several_tokens_that_end_alike_the_last_is_the_boundary():
    """It has read all of them: an empty piece between two others."""
    vocabulary = vocab.Vocabulary((b"a", b"", b"b"), (), False)
    found = boundaries.token_spans("ab", [0, 1, 2], [(0, 1), (1, 1), (1, 2)], vocabulary)
    assert found.ends.tolist() == [1, 1, 2]
    assert found.boundary.tolist() == [False, True, True]


def test_a_lower_casing_tokenizer_gives_no_signal_where_it_changed_the_text():
    text = "the QUICK the"
    ids, found = spans_of("byte_level_lower", text)
    tokens = reader("byte_level_lower").vocabulary.tokens
    unfaithful = b"".join(tokens[i] for i, ok in zip(ids, found.faithful, strict=True) if not ok)
    assert unfaithful == b"quick"
    ours = boundaries.align(spans_of("byte_level", text)[1], found)
    assert len(ours) > ours.usable.sum() > 0
    assert not any(text[end].isupper() for end in ours.ends[ours.usable])


def test_white_space_at_the_edges_of_trimmed_offsets_is_not_lost():
    text = "x\n\n    y   z"
    plain, trimmed = spans_of("byte_level_trimmed", text)[1], spans_of("byte_level", text)[1]
    assert boundaries.align(plain, trimmed).ends[-1] == len(text)


def test_a_large_document_aligns_as_its_parts_do():
    line = "The naïve cat sat on the mat — and 東京 looked on. 😀\n"
    once, often = ([spans_of(name, line * n)[1] for name in ("byte_level", "unigram_nfkc")] for n in (1, 1700))
    assert len(boundaries.align(*often)) == 1700 * len(boundaries.align(*once)) > 10_000
