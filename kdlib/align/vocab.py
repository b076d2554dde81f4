"""Byte strings of the tokens of a vocabulary, and the tokens that two vocabularies share.

A token's byte string is what it adds to the text, including a leading space: `b" the"`. So " a" never matches "a".
"""

import dataclasses
import functools
import json
import re

import numpy as np

SPACE_SYMBOL = "\u2581"  # SentencePiece writes it for a space
FIRST_CJK = 0x2E80  # BERT's pre-tokenizer splits characters from here on without a space
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The tokens of one tokenizer.

    `tokens[i]` is the byte string of id i, or None for a special, unused or unknown token. `num_rows` is one more than
    the highest id with a token; rows of the output head from there on are padding. `gaps` are lower ids without a
    token. `adds_space`: the tokenizer prepends a space to its input.
    """

    tokens: tuple
    gaps: tuple
    adds_space: bool

    @property
    def num_rows(self):
        return len(self.tokens)

    @functools.cached_property
    def lengths(self):
        """Length of every token in bytes, int64 `[num_rows]`; 0 for tokens without bytes."""
        return np.array([len(token or b"") for token in self.tokens], dtype=np.int64)


@dataclasses.dataclass(frozen=True)
class SharedVocabulary:
    """Pairs of ids with the same byte string: `student_ids[i]` and `teacher_ids[i]`, int64, sorted by student id."""

    student_ids: np.ndarray
    teacher_ids: np.ndarray
    student_share: float
    """Fraction of the student's tokens that the teacher also has."""
    teacher_share: float

    def __len__(self):
        return len(self.student_ids)


def read_vocabulary(tokenizer):
    """Reads the `Vocabulary` of a fast Hugging Face tokenizer (byte-level BPE, SentencePiece BPE or Unigram,
    WordPiece).

    Raises ValueError for a tokenizer without a fast implementation, because its byte offsets are unknown.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"{type(tokenizer).__name__} has no fast implementation, so its byte offsets are unknown; "
            "load a tokenizer that has a tokenizer.json"
        )
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = tokenizer.get_vocab()
    added_ids = {entry["id"] for entry in spec["added_tokens"]}
    special_ids = {entry["id"] for entry in spec["added_tokens"] if entry["special"]} | set(tokenizer.all_special_ids)
    unknown = spec["model"].get("unk_token")
    if isinstance(spec["model"].get("unk_id"), int):
        special_ids.add(spec["model"]["unk_id"])
    elif unknown in pieces:
        special_ids.add(pieces[unknown])
    decode = _piece_decoder(spec)
    tokens = [None] * (max(pieces.values(), default=-1) + 1)
    for piece, index in pieces.items():
        if index not in special_ids:
            tokens[index] = piece.encode() if index in added_ids else decode(piece)
    used_ids = set(pieces.values())
    gaps = tuple(index for index in range(len(tokens)) if index not in used_ids)
    return Vocabulary(tuple(tokens), gaps, _adds_space(spec))


def shared_vocabulary(student, teacher):
    """Matches two `Vocabulary`s one to one. Returns `SharedVocabulary`.

    Of several ids with the same bytes, the first is used. For a single byte it is the last, because SentencePiece lists
    its byte-fallback pieces before the ordinary ones.
    """
    student_ids, teacher_ids = _ids_by_token(student), _ids_by_token(teacher)
    pairs = sorted((index, teacher_ids[token]) for token, index in student_ids.items() if token in teacher_ids)
    pairs = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    num_tokens = [max(1, sum(token is not None for token in side.tokens)) for side in (student, teacher)]
    return SharedVocabulary(pairs[:, 0], pairs[:, 1], len(pairs) / num_tokens[0], len(pairs) / num_tokens[1])


@dataclasses.dataclass(frozen=True)
class Buckets:
    """A partition of both vocabularies into comparable buckets.

    `student[i]` and `teacher[j]` are the bucket of each id, int64 in `[0, num)`; the last bucket is the tail.
    `student_ids` `[num - 1]`: one student token that represents each bucket but the tail.
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
    """Returns the student id with the same bytes for each teacher id, or -1: int64 `[teacher.num_rows]`."""
    same = np.full(teacher.num_rows, -1, dtype=np.int64)
    same[shared.teacher_ids] = shared.student_ids
    return same


def tail_buckets(student, teacher, shared):
    """Builds `Buckets` with one bucket per shared token, and the tail for all other tokens."""
    student_buckets = np.full(student.num_rows, len(shared), dtype=np.int64)
    teacher_buckets = np.full(teacher.num_rows, len(shared), dtype=np.int64)
    student_buckets[shared.student_ids] = teacher_buckets[shared.teacher_ids] = np.arange(len(shared))
    return Buckets(student_buckets, teacher_buckets, shared.student_ids)


def prefix_buckets(student, teacher, shared, student_first, teacher_first):
    """Builds `Buckets` with one bucket per shared token, which also holds the unshared tokens that start with it: those
    that the other side tokenizes with this token first. The tail holds the rest: special tokens, incomplete characters.

    `student_first[j]` is the student's first token in the bytes of teacher token j, `teacher_first[i]` the reverse; -1
    for none. If that token is not shared either, its own first token decides, and so on with ever shorter bytes.
    """
    buckets = tail_buckets(student, teacher, shared)
    tail = buckets.tail
    sides = (
        (student, buckets.student, teacher_first, buckets.teacher),
        (teacher, buckets.teacher, student_first, buckets.student),
    )
    unassigned = [
        (len(vocabulary.tokens[index]), side, index)
        for side, (vocabulary, own, first, _) in enumerate(sides)
        for index in np.flatnonzero((own == tail) & (first >= 0))
    ]
    for _, side, index in sorted(unassigned):
        _, own, first, other = sides[side]
        own[index] = other[first[index]]
    return buckets


def merge_buckets(buckets, pairs):
    """Merges the two buckets of each pair, transitively (union-find). Nothing is merged with the tail."""
    parent = np.arange(buckets.num)

    def root(bucket):
        while parent[bucket] != bucket:
            parent[bucket] = bucket = parent[parent[bucket]]
        return bucket

    for pair in pairs:
        first, second = sorted(map(root, pair))
        if second != buckets.tail:
            parent[second] = first
    roots, new_index = np.unique([root(bucket) for bucket in range(buckets.num)], return_inverse=True)
    return Buckets(new_index[buckets.student], new_index[buckets.teacher], buckets.student_ids[roots[:-1]])


def _ids_by_token(vocabulary):
    ids = {}
    for index, token in enumerate(vocabulary.tokens):
        if token and (token not in ids or len(token) == 1):
            ids[token] = index
    return ids


def _piece_decoder(spec):
    """Returns the function that maps this tokenizer's pieces to bytes."""
    stages = [stage["type"] for stage in _flatten(spec.get("decoder"), "decoders")]
    stages += [stage["type"] for stage in _flatten(spec.get("pre_tokenizer"), "pretokenizers")]
    if "ByteLevel" in stages:
        return _byte_level
    if spec["model"]["type"] == "WordPiece":
        prefix = spec["model"].get("continuing_subword_prefix") or "##"
        return functools.partial(_word_piece, prefix=prefix)
    fallback = bool(spec["model"].get("byte_fallback")) or "ByteFallback" in stages
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
    """Returns the bytes of a SentencePiece piece. `fallback`: pieces like `<0x0A>` are bytes. `suffix` marks the end of a
    word and is dropped.
    """
    byte = _BYTE_PIECE.fullmatch(piece) if fallback else None
    if byte:
        return bytes([int(byte[1], 16)])
    if suffix and piece.endswith(suffix):
        piece = piece[: -len(suffix)]
    return piece.replace(SPACE_SYMBOL, " ").encode()


def _adds_space(spec):
    for stage in _flatten(spec.get("normalizer"), "normalizers"):
        if stage["type"] == "Prepend" and stage.get("prepend") in (SPACE_SYMBOL, " "):
            return True
    for stage in _flatten(spec.get("pre_tokenizer"), "pretokenizers"):
        if stage["type"] == "Metaspace" and stage.get("prepend_scheme", "always") != "never":
            return True
        if stage["type"] == "ByteLevel" and stage.get("add_prefix_space"):
            return True
    return spec["model"]["type"] == "WordPiece"


def _flatten(stage, key):
    """Returns a stage of a tokenizer.json as a list, with nested `Sequence`s (children under `key`) flattened."""
    if not stage:
        return []
    if stage["type"] == "Sequence":
        return [inner for child in stage[key] for inner in _flatten(child, key)]
    return [stage]


def _byte_alphabet():
    """Returns GPT-2's map from characters to bytes: printable bytes map to themselves, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
