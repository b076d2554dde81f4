"""Where two tokenizations of one text have read the same bytes.

A *boundary* is a place between two characters where a token ends. Positions of student and teacher are comparable where
both end at the same byte: both then predict the text that starts there. Never by index.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenSpans:
    """The bytes that each token of one tokenization covers. All arrays have one entry a token.

    `ends` int64: bytes of the text read once this token is read. `boundary` bool: the token ends between two characters
    and is the last that ends there. `faithful` bool: the token's own bytes are exactly the bytes of the text it covers,
    so a normaliser changed nothing. Each token covers what lies between the end before it and its own.
    """

    ends: np.ndarray
    boundary: np.ndarray
    faithful: np.ndarray


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Comparable positions, in order of the text.

    `student[i]` and `teacher[i]` are token positions whose next-token distributions start at byte `ends[i]`.
    `usable[i]`: the next token of either side is faithful, so the two distributions speak of the same bytes.
    """

    student: np.ndarray
    teacher: np.ndarray
    ends: np.ndarray
    usable: np.ndarray

    def __len__(self):
        return len(self.ends)


def token_spans(text, ids, offsets, vocabulary):
    """The `TokenSpans` of one tokenization without special tokens, in time linear in the text.

    `offsets` are the tokenizer's `(start, end)` character offsets. Where the tokens' bytes put end to end are the text
    (with or without one space the tokenizer adds in front), the ends are counted from the bytes and nothing else is
    believed. Otherwise a normaliser changed the text, and the ends are the offsets, with every token checked against the
    bytes it claims.
    """
    data = text.encode()
    said = [vocabulary.tokens[i] for i in ids]
    ends = _counted_ends(data, said, vocabulary.adds_space)
    if ends is not None:
        alone, faithful = np.ones(len(said), bool), np.ones(len(said), bool)
    else:
        ends, alone = _claimed_ends(text, offsets)
        faithful = _agrees(data, said, ends, vocabulary.adds_space)
    return TokenSpans(ends, alone & _between_characters(data, ends) & _last_with_its_end(ends), faithful)


def align(student, teacher):
    """The `Alignment` of two `TokenSpans` of the same text. Position 0 (nothing read yet) and non-text are left out."""
    ours = np.flatnonzero(student.boundary)
    theirs = np.flatnonzero(teacher.boundary)
    ends, left, right = np.intersect1d(
        student.ends[ours], teacher.ends[theirs], assume_unique=True, return_indices=True
    )
    usable = _next_is_faithful(student, ours[left]) & _next_is_faithful(teacher, theirs[right])
    return Alignment(ours[left], theirs[right], ends, usable)


def _counted_ends(data, said, adds_space):
    if any(token is None for token in said):
        return None
    joined = b"".join(said)
    extra = len(joined) - len(data)
    if joined != data and not (adds_space and joined == b" " + data):
        return None
    return np.maximum(np.cumsum([len(token) for token in said], dtype=np.int64) - extra, 0)


def _claimed_ends(text, offsets):
    """Ends in bytes by the tokenizer's word, and whether each token is the last of the characters it touches."""
    claimed = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    byte_at = np.zeros(len(text) + 1, dtype=np.int64)
    np.cumsum([len(char.encode()) for char in text], out=byte_at[1:])
    ends = np.maximum.accumulate(byte_at[claimed[:, 1]])
    alone = np.ones(len(claimed), dtype=bool)
    alone[:-1] = byte_at[claimed[1:, 0]] >= ends[:-1]
    return ends, alone


def _agrees(data, said, ends, adds_space):
    """Whether each token says exactly the bytes that it covers."""
    starts = np.append(0, ends)[:-1]
    covered = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    return np.array(
        [
            token == bytes_ or (adds_space and start == 0 and token == b" " + bytes_)
            for token, bytes_, start in zip(said, covered, starts, strict=True)
        ],
        dtype=bool,
    )


def _between_characters(data, ends):
    """Whether no UTF-8 continuation byte follows."""
    return (np.frombuffer(data + b"\0", dtype=np.uint8)[ends] & 0xC0) != 0x80


def _last_with_its_end(ends):
    return (np.diff(ends, append=-1) != 0) & (ends > 0)


def _next_is_faithful(side, positions):
    return np.append(side.faithful, False)[positions + 1]
