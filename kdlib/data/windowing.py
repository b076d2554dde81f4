"""Windows: pieces of text that fit in one row of a batch, cut at common boundaries of both tokenizations.

Labels are shifted only here: `labels[i]` is the token after position i, or IGNORE if it is not a target.
"""

import dataclasses

import numpy as np

from kdlib.align.boundaries import Alignment, align

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Window:
    """A piece of text that fits in one row of a batch, tokenized by both tokenizers.

    `*_labels` are shifted. `student_rows[i]` and `teacher_rows[i]` are aligned positions. The text from there up to the
    next common boundary is a *span* if it is a target and both sides' tokens are faithful. Positions up to the
    exclusive `*_span_ends[i]` predict its tokens; without a span, the end equals the row. `*_scored` marks positions
    whose labels cover the same `num_bytes` bytes on both sides, for bits per byte. `num_positions` counts student
    positions that predict text. `document` is the index of the document, `window_id` that of the window within its
    split.
    """

    student_ids: np.ndarray
    student_labels: np.ndarray
    student_scored: np.ndarray
    teacher_ids: np.ndarray
    teacher_labels: np.ndarray
    teacher_scored: np.ndarray
    student_rows: np.ndarray
    teacher_rows: np.ndarray
    student_span_ends: np.ndarray
    teacher_span_ends: np.ndarray
    num_bytes: int
    num_positions: int
    document: int
    window_id: int = 0


def empty(document):
    """Returns a `Window` of a document without any tokens."""
    ids, mask = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
    return Window(ids, ids, mask, ids, ids, mask, ids, ids, ids, ids, 0, 0, document)


def cut_windows(document, student, teacher, student_reader, teacher_reader, max_length, number=0):
    """Cuts one document into `Window`s. `student` and `teacher` are its two `Encoded`s, `number` its index.

    A text is cut at common boundaries, so nothing is tokenized twice and no token is split. Each window starts with the
    tokenizer's prefix, and the last one ends with the student's EOS token. A conversation is one window, truncated to
    `max_length`, with no tokens added to its chat template. Raises ValueError if `max_length` leaves no room for text.
    """
    pairs = align(student, teacher)
    prefixes = [reader.prefix_of(document) for reader in (student_reader, teacher_reader)]
    max_student = max_length - len(prefixes[0]) - (0 if document.messages else len(student_reader.eos))
    max_teacher = (teacher_reader.context or 10**9) - len(prefixes[1])
    if max_student < 1 or max_teacher < 1:
        raise ValueError(f"max_length {max_length} leaves no room for text beside the special tokens; raise it")
    if document.messages:
        ranges = [((0, min(len(student), max_student)), (0, min(len(teacher), max_teacher)))]
    else:
        ranges = _token_ranges(student, teacher, pairs, max_student, max_teacher)
    windows = []
    for (s0, s1), (t0, t1) in ranges:
        eos = student_reader.eos if s1 == len(student) and not document.messages else []
        low, high = np.searchsorted(pairs.student, [s0, s1])
        high = min(high, int(np.searchsorted(pairs.teacher, t1)))
        rows = slice(low, max(low, high))
        local = Alignment(pairs.student[rows] - s0, pairs.teacher[rows] - t0, pairs.ends[rows], pairs.usable[rows])
        windows.append(_window(student.cut(s0, s1), teacher.cut(t0, t1), local, *prefixes, eos, number))
    return windows


def _token_ranges(student, teacher, pairs, max_student, max_teacher):
    """Returns the token ranges `((s0, s1), (t0, t1))` of a text's windows, each as long as possible."""
    # candidate cuts, as the first token after the cut on each side; the end of the text is one of them
    left = np.concatenate([[0], pairs.student[pairs.usable] + 1, [len(student)]])
    right = np.concatenate([[0], pairs.teacher[pairs.usable] + 1, [len(teacher)]])
    ranges, start = [], 0
    while start < len(left) - 1:
        fits_student = np.searchsorted(left, left[start] + max_student, "right")
        fits_teacher = np.searchsorted(right, right[start] + max_teacher, "right")
        end = int(min(fits_student, fits_teacher)) - 1
        if end > start and left[end] > left[start] and right[end] > right[start]:
            ranges.append(((int(left[start]), int(left[end])), (int(right[start]), int(right[end]))))
        start = max(end, start + 1)  # text up to a common boundary that is too far away is skipped
    return ranges


def _window(student, teacher, pairs, student_prefix, teacher_prefix, eos, number):
    learned = pairs.usable & np.append(student.learn, False)[pairs.student + 1]
    learned &= (pairs.student + 1 < len(student)) & (pairs.teacher + 1 < len(teacher))
    (student_scored, teacher_scored), num_bytes = _scored(student, teacher, pairs.ends)
    targets = student.learn & student.is_text
    has_span = _has_span(student, teacher, pairs)[learned]
    rows = pairs.student[learned], pairs.teacher[learned]
    next_rows = np.append(pairs.student[1:], 0)[learned], np.append(pairs.teacher[1:], 0)[learned]
    student_ends, teacher_ends = (np.where(has_span, end, row) for end, row in zip(next_rows, rows, strict=True))
    return Window(
        *_shifted(student, student_scored, student_prefix, eos),
        *_shifted(teacher, teacher_scored, teacher_prefix, []),
        student_rows=rows[0] + len(student_prefix),
        teacher_rows=rows[1] + len(teacher_prefix),
        student_span_ends=student_ends + len(student_prefix),
        teacher_span_ends=teacher_ends + len(teacher_prefix),
        num_bytes=num_bytes,
        num_positions=int(targets[1:].sum()),
        document=number,
    )


def _has_span(student, teacher, pairs):
    """Returns whether a span starts at each common boundary: all tokens up to the next one are faithful text and
    targets.
    """
    has_span = np.zeros(len(pairs), dtype=bool)
    is_valid = student.faithful & student.is_text & student.learn, teacher.faithful & teacher.is_text
    if len(pairs) > 1:
        num_invalid = [np.append(0, np.cumsum(~side)) for side in is_valid]  # before each token
        sides = zip(num_invalid, (pairs.student, pairs.teacher), strict=True)
        has_span[:-1] = np.all([np.diff(count[end + 1]) == 0 for count, end in sides], axis=0)
    return has_span


def _scored(student, teacher, boundaries):
    """Returns `([student mask, teacher mask], num_bytes)`: target text tokens between common boundaries, and their
    bytes.

    Nothing is scored between two boundaries if the sides cover different numbers of bytes there, because a chat
    template or a normaliser removed some.
    """
    segments, masks, num_bytes = [], [], []
    for side in (student, teacher):
        segment = np.searchsorted(boundaries, side.ends)  # 0 before the first boundary, len(boundaries) after the last
        masks.append(side.learn & side.is_text & (segment > 0) & (segment < len(boundaries)))
        lengths = np.where(masks[-1], side.lengths, 0)
        num_bytes.append(np.bincount(segment, lengths, minlength=len(boundaries) + 1).astype(np.int64))
        segments.append(segment)
    is_same = num_bytes[0] == num_bytes[1]
    scored = [mask & is_same[segment] for mask, segment in zip(masks, segments, strict=True)]
    return scored, int(num_bytes[0][is_same].sum())


def _shifted(encoded, scored, prefix, suffix):
    """Returns ids, labels and scored positions of one side of a window; position i refers to the token at i + 1."""
    ids = np.concatenate([prefix, encoded.ids, suffix]).astype(np.int64)
    is_target = np.concatenate([np.zeros(len(prefix), bool), encoded.learn, np.ones(len(suffix), bool)])
    is_scored = np.concatenate([np.zeros(len(prefix), bool), scored, np.zeros(len(suffix), bool)])
    return ids, labels_of(ids, np.append(is_target[1:], False)), np.append(is_scored[1:], False)


def labels_of(ids, learned):
    """Returns labels: the following token at positions with `learned`, else IGNORE."""
    return np.where(learned, np.append(ids[1:], 0), IGNORE)
