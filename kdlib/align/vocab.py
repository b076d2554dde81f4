"""What each token of a vocabulary says, in bytes, and which tokens two vocabularies share.

A token's byte string is what it adds to the text: `b" the"` with its space for byte-level and SentencePiece pieces. The
leading-space mark is part of it, so " a" is never taken for "a".
"""

import dataclasses
import functools
import json
import re

import numpy as np

MARK = "\u2581"  # SentencePiece's sign for a space
FIRST_CJK = 0x2E80  # from here on BERT's pre-tokenizer sets characters apart without a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of one tokenizer.

    `tokens[i]` is the byte string of id i, or None for a special, unused or unknown token. `num_rows` is one more than
    the highest id that has a token: output-head rows from there on are padding. `gaps` are the ids below it without a
    token. `adds_space`: the tokenizer puts a space before the text it is given.
    """

    tokens: tuple
    gaps: tuple
    adds_space: bool

    @property
    def num_rows(self):
        return len(self.tokens)

    @functools.cached_property
    def lengths(self):
        """Bytes of every token, int64 `[num_rows]`; 0 for tokens that say nothing."""
        return np.array([len(token or b"") for token in self.tokens], dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class SharedVocabulary:
    """Pairs of ids with the same byte string: `student_ids[i]` and `teacher_ids[i]`, int64, sorted by student id."""

    student_ids: np.ndarray
    teacher_ids: np.ndarray
    student_share: float
    """Share of the student's tokens that the teacher has too."""
    teacher_share: float

    def __len__(self):
        return len(self.student_ids)


def read_vocabulary(tokenizer):
    """The `Vocabulary` of a fast Hugging Face tokenizer (byte-level BPE, SentencePiece BPE or Unigram, WordPiece).

    Raises ValueError for a tokenizer that has no fast form, since nothing then tells which bytes a token covers.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} has no fast form, so its byte offsets are unknown; "
            "load a tokenizer that has a tokenizer.json"
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = tokenizer.get_vocab()
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    silent = {entry["id"] for entry in spec["added_tokens"] if entry["special"]}
    silent |= set(tokenizer.all_special_ids)
    unknown = spec["model"].get("unk_token")
    if isinstance(spec["model"].get("unk_id"), int):
        silent.add(spec["model"]["unk_id"])
    elif unknown in pieces:
        silent.add(pieces[unknown])
    say = _reader(spec)
    tokens = [None] * (max(pieces.values(), default=-1) + 1)
    for piece, index in pieces.items():
        if index not in silent:
            tokens[index] = piece.encode() if index in added else say(piece)
    filled = set(pieces.values())
    gaps = tuple(index for index in range(len(tokens)) if index not in filled)
    return Vocabulary(tuple(tokens), gaps, _adds_space(spec))


def shared_vocabulary(student, teacher):
    """The `SharedVocabulary` of two `Vocabulary`s, one to one.

    Where several ids of one side say the same bytes the first stands for them; for a single byte the last, because
    SentencePiece lists its byte pieces (used only for what no piece says) before the pieces.
    """
    ours, theirs = _first_ids(student), _first_ids(teacher)
    both = sorted((index, theirs[token]) for token, index in ours.items() if token in theirs)
    pairs = np.array(both, dtype=np.int64).reshape(-1, 2)
    spoken = [max(1, sum(token is not None for token in side.tokens)) for side in (student, teacher)]
    return SharedVocabulary(pairs[:, 0], pairs[:, 1], len(both) / spoken[0], len(both) / spoken[1])


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A partition of both vocabularies into buckets that can be compared.

    `student[i]` and `teacher[j]` are the bucket of each id, int64 in `[0, num)`; the last one is the tail. `student_ids`
    `[num - 1]`: a student's token of each of the others, which stands for it.
    """

    student: np.ndarray
    teacher: np.ndarray
    student_ids: np.ndarray

    @property
    def num(self):
        return len(self.student_ids) + 1

    @property
    def tail(self):
        return len(self.student_ids)


def same_ids(teacher, shared):
    """For each id of the teacher's `Vocabulary` the student id with the same bytes, or -1: int64 `[teacher.num_rows]`."""
    same = np.full(teacher.num_rows, -1, dtype=np.int64)
    same[shared.teacher_ids] = shared.student_ids
    return same


def tail_buckets(student, teacher, shared):
    """`Buckets` of two `Vocabulary`s: one for every shared token, and the tail for all others."""
    ours = np.full(student.num_rows, len(shared), dtype=np.int64)
    theirs = np.full(teacher.num_rows, len(shared), dtype=np.int64)
    ours[shared.student_ids] = theirs[shared.teacher_ids] = np.arange(len(shared))
    return Buckets(ours, theirs, shared.student_ids)


def prefix_buckets(student, teacher, shared, student_first, teacher_first):
    """`Buckets` of two `Vocabulary`s: one for every shared token, joined by the tokens of one side only for which the
    other side would read that token first. The tail holds what begins with no shared token: special tokens, torn
    characters.

    `student_first[j]` is the student's first token in the bytes of teacher token j, `teacher_first[i]` the other way
    round; -1 for none. Where that token is not shared either, its own first token decides, and so on: the bytes get
    shorter at every turn, so this ends.
    """
    buckets = tail_buckets(student, teacher, shared)
    tail = buckets.tail
    sides = (
        (student, buckets.student, teacher_first, buckets.teacher),
        (teacher, buckets.teacher, student_first, buckets.student),
    )
    loose = [
        (len(vocabulary.tokens[index]), side, index)
        for side, (vocabulary, own, first, _) in enumerate(sides)
        for index in np.flatnonzero((own == tail) & (first >= 0))
    ]
    for _, side, index in sorted(loose):
        _, own, first, other = sides[side]
        own[index] = other[first[index]]
    return buckets


def joined(buckets, pairs):
    """The `Buckets` with the two of each pair made one, and so on along chains of pairs. Nothing is joined with the tail."""
    lowest = np.arange(buckets.num)

    def root(bucket):
        while lowest[bucket] != bucket:
            lowest[bucket] = bucket = lowest[lowest[bucket]]
        return bucket

    for pair in pairs:
        first, second = sorted(map(root, pair))
        if second != buckets.tail:
            lowest[second] = first
    roots, number = np.unique([root(bucket) for bucket in range(buckets.num)], return_inverse=True)
    return Buckets(number[buckets.student], number[buckets.teacher], buckets.student_ids[roots[:-1]])


def _first_ids(vocabulary):
    ids = {}
    for index, token in enumerate(vocabulary.tokens):
        if token and (token not in ids or len(token) == 1):
            ids[token] = index
    return ids


def _reader(spec):
    """The function piece -> bytes for this tokenizer's alphabet."""
    parts = [part["type"] for part in _flat(spec.get("decoder"), "decoders")]
    parts += [part["type"] for part in _flat(spec.get("pre_tokenizer"), "pretokenizers")]
    if "ByteLevel" in parts:
        return _byte_level
    if spec["model"]["type"] == "WordPiece":
        prefix = spec["model"].get("continuing_subword_prefix") or "##"
        return functools.partial(_word_piece, prefix=prefix)
    fallback = bool(spec["model"].get("byte_fallback")) or "ByteFallback" in parts
    suffix = spec["model"].get("end_of_word_suffix") or ""
    return functools.partial(_sentence_piece, fallback=fallback, suffix=suffix)


def _byte_level(piece):
    try:
        return bytes(_BYTE_OF[char] for char in piece)
    except KeyError:
        return piece.encode()


def _word_piece(piece, prefix):
    if piece.startswith(prefix):
        return piece[len(prefix) :].encode()
    starts_word = piece[:1].isalnum() and ord(piece[0]) < FIRST_CJK
    return (" " + piece if starts_word else piece).encode()


def _sentence_piece(piece, fallback, suffix):
    byte = _BYTE_PIECE.fullmatch(piece) if fallback else None
    if byte:
        return bytes([int(byte[1], 16)])
    if suffix and piece.endswith(suffix):
        piece = piece[: -len(suffix)]
    return piece.replace(MARK, " ").encode()


def _adds_space(spec):
    for part in _flat(spec.get("normalizer"), "normalizers"):
        if part["type"] == "Prepend" and part.get("prepend") in (MARK, " "):
            return True
    for part in _flat(spec.get("pre_tokenizer"), "pretokenizers"):
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return True
        if part["type"] == "ByteLevel" and part.get("add_prefix_space"):
            return True
    return spec["model"]["type"] == "WordPiece"


def _flat(part, children):
    """A stage of a tokenizer.json as a list of its parts, `Sequence`s opened."""
    if not part:
        return []
    if part["type"] == "Sequence":
        return [inner for child in part[children] for inner in _flat(child, children)]
    return [part]


def _byte_alphabet():
    """GPT-2's printable stand-ins: character -> byte. Bytes that print stand for themselves, the others move up from
    U+0100 in order.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
