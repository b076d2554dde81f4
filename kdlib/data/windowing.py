"""Windows: stretches of text short enough for one row of a batch, cut where both tokenizers have read the same bytes.

The only place that shifts labels: `labels[i]` is the token that follows position i, or IGNORE where nothing is learned.
"""

import dataclasses

import numpy as np

from kdlib.align.boundaries import Alignment, align

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of text short enough for one row of a batch, as both models read it.

    `student_labels` and `teacher_labels` are shifted. `student_rows[i]` and `teacher_rows[i]` are comparable positions.
    Where both sides say the text from there up to their next common boundary, and learn it, that text is a *span*: its
    tokens are predicted by the rows up to (without) `student_span_ends[i]` and `teacher_span_ends[i]`; elsewhere these are the rows
    themselves.
    `*_scored` marks the rows whose labels make up exactly the same `num_bytes` bytes on both sides (for bits per byte).
    `num_positions` counts the student positions that predict text, `document` numbers the document, `place` the
    window within its split.
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
    place: int = 0


def cut_windows(document, student, teacher, student_reader, teacher_reader, max_length, number=0):
    """The `Window`s of one document: `student` and `teacher` are its two `Encoded`s.

    A text is cut where both tokenizations have read the same bytes, so nothing is tokenised twice and no token is torn;
    each window starts with what the tokenizer puts before a text, and the last one ends with the student's
    end-of-text. A conversation is one window, cut off at `max_length`, with nothing around what its chat template renders.
    """
    pairs = align(student, teacher)
    prefixes = [reader.prefix_of(document) for reader in (student_reader, teacher_reader)]
    room = max_length - len(prefixes[0]) - (0 if document.messages else len(student_reader.eos))
    teacher_room = (teacher_reader.context or 10**9) - len(prefixes[1])
    if room < 1 or teacher_room < 1:
        raise ValueError(f"max_length {max_length} leaves no room for text beside the tokenizer's own marks")
    if document.messages:
        cuts = [((0, min(len(student), room)), (0, min(len(teacher), teacher_room)))]
    else:
        cuts = _cuts(student, teacher, pairs, room, teacher_room)
    windows = []
    for (s0, s1), (t0, t1) in cuts:
        eos = student_reader.eos if s1 == len(student) and not document.messages else []
        low, high = np.searchsorted(pairs.student, [s0, s1])
        high = min(high, int(np.searchsorted(pairs.teacher, t1)))
        rows = slice(low, max(low, high))
        near = Alignment(pairs.student[rows] - s0, pairs.teacher[rows] - t0, pairs.ends[rows], pairs.usable[rows])
        ours, theirs = student.cut(s0, s1), teacher.cut(t0, t1)
        windows.append(_window(ours, theirs, near, *prefixes, eos, number))
    return windows


def _cuts(student, teacher, pairs, room, teacher_room):
    """Ranges of tokens `((s0, s1), (t0, t1))` of the windows of a text, as long as fits."""
    # places to cut, as (first student token after, first teacher token after); the end of the text is one of them
    left = np.concatenate([[0], pairs.student[pairs.usable] + 1, [len(student)]])
    right = np.concatenate([[0], pairs.teacher[pairs.usable] + 1, [len(teacher)]])
    cuts, at = [], 0
    while at < len(left) - 1:
        fits = (
            np.searchsorted(left, left[at] + room, "right"),
            np.searchsorted(right, right[at] + teacher_room, "right"),
        )
        end = int(min(fits)) - 1
        if end > at and left[end] > left[at] and right[end] > right[at]:
            cuts.append(((int(left[at]), int(left[end])), (int(right[at]), int(right[end]))))
        at = max(end, at + 1)  # where no common boundary is near enough the stretch fits no window and is left out
    return cuts


def _window(student, teacher, pairs, student_prefix, teacher_prefix, eos, number):
    learned = pairs.usable & np.append(student.learn, False)[pairs.student + 1]
    learned &= (pairs.student + 1 < len(student)) & (pairs.teacher + 1 < len(teacher))
    (ours, theirs), num_bytes = _scored(student, teacher, pairs.ends)
    targets = student.learn & student.is_text
    whole = _spans(student, teacher, pairs)[learned]
    ends = np.append(pairs.student[1:], 0)[learned], np.append(pairs.teacher[1:], 0)[learned]
    rows = pairs.student[learned], pairs.teacher[learned]
    ours_stop, theirs_stop = (np.where(whole, end, row) for end, row in zip(ends, rows, strict=True))
    return Window(
        *_shifted(student, ours, student_prefix, eos),
        *_shifted(teacher, theirs, teacher_prefix, []),
        student_rows=rows[0] + len(student_prefix),
        teacher_rows=rows[1] + len(teacher_prefix),
        student_span_ends=ours_stop + len(student_prefix),
        teacher_span_ends=theirs_stop + len(teacher_prefix),
        num_bytes=num_bytes,
        num_positions=int(targets[1:].sum()),
        document=number,
    )


def _spans(student, teacher, pairs):
    """For each common boundary: do both sides say the bytes up to the next one, as text, and does the student learn it?"""
    whole = np.zeros(len(pairs), dtype=bool)
    told = student.faithful & student.is_text & student.learn, teacher.faithful & teacher.is_text
    ends = pairs.student, pairs.teacher
    if len(pairs) > 1:
        silent = [np.append(0, np.cumsum(~side)) for side in told]  # tokens that don't count, before each place
        whole[:-1] = np.all([np.diff(n[end + 1]) == 0 for n, end in zip(silent, ends, strict=True)], axis=0)
    return whole


def _scored(student, teacher, boundaries):
    """`((student's, teacher's), bytes)`: the tokens that are learned text between common boundaries, and the bytes that
    they cover. Between two boundaries where one side covers fewer bytes nothing is scored: there a template trimmed a
    content, or a normaliser ate its end.
    """
    stretches, counted, covered = [], [], []
    for side in (student, teacher):
        stretch = np.searchsorted(boundaries, side.ends)  # 0 before the first boundary, len(boundaries) after the last
        counted.append(side.learn & side.is_text & (stretch > 0) & (stretch < len(boundaries)))
        lengths = np.where(counted[-1], side.lengths, 0)
        covered.append(np.bincount(stretch, lengths, minlength=len(boundaries) + 1).astype(np.int64))
        stretches.append(stretch)
    same = covered[0] == covered[1]
    scored = [mask & same[stretch] for mask, stretch in zip(counted, stretches, strict=True)]
    return scored, int(covered[0][same].sum())


def _shifted(encoded, scored, prefix, suffix):
    """Ids, labels and scored rows of one side of a window; row i speaks of the token at i + 1."""
    ids = np.concatenate([prefix, encoded.ids, suffix]).astype(np.int64)
    target = np.concatenate([np.zeros(len(prefix), bool), encoded.learn, np.ones(len(suffix), bool)])
    score = np.concatenate([np.zeros(len(prefix), bool), scored, np.zeros(len(suffix), bool)])
    return ids, labels_of(ids, np.append(target[1:], False)), np.append(score[1:], False)


def labels_of(ids, learned):
    """The labels of the rows of a window: the token that follows where it is `learned`, else IGNORE."""
    return np.where(learned, np.append(ids[1:], 0), IGNORE)
