import numpy as np
import pytest
from families import FAMILIES, byte_level, reader

from kdlib.align import vocab
from kdlib.data import tokenize


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_say_what_the_tokenizer_decodes(family):
    """The bytes of a plain word's tokens, put together, are that word (with the space that the family puts in front)."""
    used = reader(family)
    ids = used.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    said = b"".join(used.vocabulary.tokens[i] for i in ids)
    assert said == (b" the cat" if used.vocabulary.adds_space else b"the cat")


def test_families_differ_in_the_space_they_put_in_front():
    spaces = {name: reader(name).vocabulary.adds_space for name in FAMILIES}
    assert [name for name, adds in sorted(spaces.items()) if not adds] == [
        "byte_level", "byte_level_lower", "byte_level_trimmed",
    ]  # fmt: skip


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_special_tokens_say_nothing(family):
    used = reader(family)
    assert used.tokenizer.all_special_ids
    assert all(used.vocabulary.tokens[i] is None for i in used.tokenizer.all_special_ids)


def test_byte_pieces_say_their_byte():
    for family in ("unigram", "sentencepiece_bpe"):
        used = reader(family)
        assert used.vocabulary.tokens[used.tokenizer.get_vocab()["<0xE2>"]] == b"\xe2"


def test_a_leading_space_is_part_of_a_token():
    ours, theirs = reader("unigram").vocabulary, reader("byte_level").vocabulary
    shared = vocab.shared_vocabulary(ours, theirs)
    pairs = {ours.tokens[i]: theirs.tokens[j] for i, j in zip(shared.student_ids, shared.teacher_ids, strict=True)}
    assert all(a == b for a, b in pairs.items())
    assert b" the" in pairs
    assert b" " in pairs


def test_shared_vocabulary_is_one_to_one_and_complete():
    ours, theirs = reader("sentencepiece_bpe").vocabulary, reader("byte_level").vocabulary
    shared = vocab.shared_vocabulary(ours, theirs)
    assert len(set(shared.student_ids)) == len(set(shared.teacher_ids)) == len(shared)
    both = {t for t in ours.tokens if t} & {t for t in theirs.tokens if t}
    assert {ours.tokens[i] for i in shared.student_ids} == both
    assert shared.student_share == pytest.approx(len(both) / sum(t is not None for t in ours.tokens))
    assert shared.teacher_share == pytest.approx(len(both) / sum(t is not None for t in theirs.tokens))


def test_a_real_piece_goes_before_the_byte_piece_of_the_same_byte():
    ours = reader("unigram")
    pieces = ours.tokenizer.get_vocab()
    shared = vocab.shared_vocabulary(ours.vocabulary, reader("byte_level").vocabulary)
    assert "e" in pieces
    assert pieces["e"] in shared.student_ids
    assert pieces["<0x65>"] not in shared.student_ids


def test_ids_without_a_token_are_gaps():
    tokenizer = byte_level()
    tokenizer.add_tokens(["one"])
    vocabulary = vocab.read_vocabulary(tokenizer)
    assert vocabulary.gaps == ()
    assert vocabulary.tokens[-1] == b"one"
    assert vocabulary.num_rows == len(tokenizer)


def test_a_tokenizer_without_a_fast_form_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match=r"Slow has no fast implementation.*tokenizer\.json"):
        vocab.read_vocabulary(Slow())


def say(*tokens):
    return vocab.Vocabulary(tuple(tokens), (), False)


def test_tail_buckets_hold_shared_tokens_apart_and_the_rest_together():
    student, teacher = say(b"a", b"b", b"ab", None), say(b"b", b"a", b"abc")
    buckets = vocab.tail_buckets(student, teacher, vocab.shared_vocabulary(student, teacher))
    assert buckets.student.tolist() == [0, 1, 2, 2]
    assert buckets.teacher.tolist() == [1, 0, 2]
    assert buckets.num == 3


def test_joined_buckets_hold_chains_and_never_the_tail():
    buckets = vocab.Buckets(np.arange(7), np.arange(7)[::-1], np.arange(10, 16))
    found = vocab.merge_buckets(buckets, [(1, 3), (2, 3), (0, 6), (5, 4)])
    assert found.student.tolist() == [0, 1, 1, 1, 2, 2, 3]
    assert found.teacher.tolist() == [3, 2, 2, 1, 1, 1, 0]
    assert found.student_ids.tolist() == [10, 11, 14]
    assert (found.num, found.tail) == (4, 3)


def test_prefix_buckets_follow_first_tokens_through_both_vocabularies():
    """The teacher's "abc" begins with the student's "ab", which begins with the shared "a"."""
    student, teacher = say(b"a", b"b", b"ab", None), say(b"b", b"a", b"abc", b"\xff")
    shared = vocab.shared_vocabulary(student, teacher)
    student_first = np.array([1, 0, 2, -1])  # of the teacher's b, a, abc, \xff
    teacher_first = np.array([1, 0, 1, -1])  # of the student's a, b, ab, special
    buckets = vocab.prefix_buckets(student, teacher, shared, student_first, teacher_first)
    assert buckets.student.tolist() == [0, 1, 0, 2]
    assert buckets.teacher.tolist() == [1, 0, 0, 2]


@pytest.mark.parametrize(("ours", "theirs"), [("unigram", "byte_level"), ("byte_level", "sentencepiece_bpe")])
def test_prefix_buckets_join_tokens_to_a_shared_prefix_of_their_bytes(ours, theirs):
    ours, theirs = reader(ours), reader(theirs)
    shared = vocab.shared_vocabulary(ours.vocabulary, theirs.vocabulary)
    first = (
        tokenize.first_tokens(ours, theirs.vocabulary.tokens),
        tokenize.first_tokens(theirs, ours.vocabulary.tokens),
    )
    buckets = vocab.prefix_buckets(ours.vocabulary, theirs.vocabulary, shared, *first)
    root = [ours.vocabulary.tokens[i] for i in shared.student_ids]
    joined = 0
    for vocabulary, found in ((ours.vocabulary, buckets.student), (theirs.vocabulary, buckets.teacher)):
        for token, bucket in zip(vocabulary.tokens, found, strict=True):
            if bucket < len(shared):
                assert token.startswith(root[bucket])
                joined += token != root[bucket]
    assert joined > 20


def test_first_tokens_read_in_the_middle_of_a_text():
    ours = reader("unigram")
    found = tokenize.first_tokens(ours, [b" the", b"the", None, b"\xe2\x80", "東".encode()])
    assert ours.vocabulary.tokens[found[0]] == b" the"
    assert b"the".startswith(ours.vocabulary.tokens[found[1]])
    assert found[2] == found[3] == -1
    assert "東".encode().startswith(ours.vocabulary.tokens[found[4]])
