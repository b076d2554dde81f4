"""Aligns two tokenizations of one text by bytes.

A *boundary* is a byte offset between two characters at which a token ends. Positions of student and teacher are aligned
if both have a boundary at the same byte, because both then predict the text that starts there.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class TokenSpans:
    """The bytes that each token of a tokenization covers, as arrays with one entry per token.

    `ends` int64: exclusive end of the token in bytes of the text. A token covers the bytes from the previous end to its
    own. `boundary` bool: the token ends between two characters and is the last one that ends there. `faithful` bool:
    the token's own bytes equal the bytes that it covers, so no normaliser changed them.
    """

    ends: np.ndarray
    boundary: np.ndarray
    faithful: np.ndarray


@dataclasses.dataclass(frozen=True)
class Alignment:
    """Aligned positions, in text order.

    `student[i]` and `teacher[i]` are token positions whose next-token distributions start at byte `ends[i]`.
    `usable[i]`: the next tokens of both sides are faithful, so both distributions are about the same bytes.
    """

    student: np.ndarray
    teacher: np.ndarray
    ends: np.ndarray
    usable: np.ndarray

    def __len__(self):
        return len(self.ends)


def token_spans(text, ids, offsets, vocabulary):
    """Computes the `TokenSpans` of a tokenization without special tokens, in time linear in the text.

    `offsets` are the tokenizer's `(start, end)` character offsets. They are used only if the concatenated tokens differ
    from the text (ignoring one leading space that the tokenizer adds), because a normaliser changed it. Each token is
    then compared with the bytes that it covers.
    """
    data = text.encode()
    tokens = [vocabulary.tokens[i] for i in ids]
    ends = _ends_from_bytes(data, tokens, vocabulary.adds_space)
    if ends is not None:
        is_separate, faithful = np.ones(len(tokens), bool), np.ones(len(tokens), bool)
    else:
        ends, is_separate = _ends_from_offsets(text, offsets)
        faithful = _is_faithful(data, tokens, ends, vocabulary.adds_space)
    return TokenSpans(ends, is_separate & _between_characters(data, ends) & _last_at_its_end(ends), faithful)


def align(student, teacher):
    """Computes the `Alignment` of two `TokenSpans` of the same text, without byte 0 and without template tokens."""
    student_positions, teacher_positions = np.flatnonzero(student.boundary), np.flatnonzero(teacher.boundary)
    ends, left, right = np.intersect1d(
        student.ends[student_positions], teacher.ends[teacher_positions], assume_unique=True, return_indices=True
    )
    student_positions, teacher_positions = student_positions[left], teacher_positions[right]
    usable = _next_is_faithful(student, student_positions) & _next_is_faithful(teacher, teacher_positions)
    return Alignment(student_positions, teacher_positions, ends, usable)


def _ends_from_bytes(data, tokens, adds_space):
    """Returns the ends by counting the tokens' bytes, or None if these are not the text."""
    if any(token is None for token in tokens):
        return None
    joined = b"".join(tokens)
    if joined != data and not (adds_space and joined == b" " + data):
        return None
    return np.maximum(np.cumsum([len(token) for token in tokens], dtype=np.int64) - (len(joined) - len(data)), 0)


def _ends_from_offsets(text, offsets):
    """Returns the ends by the tokenizer's offsets, and whether each token shares no character with the next one."""
    offsets = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    byte_at = np.zeros(len(text) + 1, dtype=np.int64)
    np.cumsum([len(char.encode()) for char in text], out=byte_at[1:])
    ends = np.maximum.accumulate(byte_at[offsets[:, 1]])
    is_separate = np.ones(len(offsets), dtype=bool)
    is_separate[:-1] = byte_at[offsets[1:, 0]] >= ends[:-1]
    return ends, is_separate


def _is_faithful(data, tokens, ends, adds_space):
    starts = np.append(0, ends)[:-1]
    covered = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    return np.array(
        [
            token == span or (adds_space and start == 0 and token == b" " + span)
            for token, span, start in zip(tokens, covered, starts, strict=True)
        ],
        dtype=bool,
    )


def _between_characters(data, ends):
    """Returns whether no UTF-8 continuation byte follows."""
    return (np.frombuffer(data + b"\0", dtype=np.uint8)[ends] & 0xC0) != 0x80


def _last_at_its_end(ends):
    return (np.diff(ends, append=-1) != 0) & (ends > 0)


def _next_is_faithful(side, positions):
    return np.append(side.faithful, False)[positions + 1]
