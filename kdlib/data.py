"""Text -> windows: documents, each tokenizer's own ids of them, windows cut where both have read the same bytes.

The only place that shifts labels: `labels[i]` is the token that follows position i, or IGNORE where nothing is learned.
"""

import dataclasses

import numpy as np

from kdlib import align

IGNORE = -100


@dataclasses.dataclass(frozen=True)
class Reader:
    """A tokenizer with its vocabulary, and what it puts around a text: `prefix` and `eos` are lists of ids."""

    tokenizer: object
    vocabulary: object
    prefix: list
    eos: list
    context: int = 0
    """Tokens the model can read at once; 0: unknown."""
    suffix: tuple = ()
    """Ids that the tokenizer puts behind a text by itself. kdlib leaves them out: a text goes on in the next window."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One document as one tokenizer reads it; arrays with one entry a token.

    `ends`, `boundary`, `faithful` as in `align.Spans`, in bytes of the text that both tokenizers share; a mark of a chat
    template has `is_text` false and stands at the byte of the content that follows it. `lengths`: bytes it covers.
    `learn`: the token is a target (text, or the end of an answer).
    """

    ids: np.ndarray
    ends: np.ndarray
    boundary: np.ndarray
    faithful: np.ndarray
    lengths: np.ndarray
    is_text: np.ndarray
    learn: np.ndarray

    def __len__(self):
        return len(self.ids)

    def cut(self, start, end):
        return Encoded(*(getattr(self, field.name)[start:end] for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Window:
    """A stretch of text short enough for one row of a batch, as both models read it.

    `student_labels` and `teacher_labels` are shifted. `student_rows[i]` and `teacher_rows[i]` are comparable positions.
    Where both sides say the text from there up to their next common boundary, and learn it, that text is a *span*: its
    tokens are predicted by the rows up to (without) `student_stops[i]` and `teacher_stops[i]`; elsewhere these are the rows
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
    student_stops: np.ndarray
    teacher_stops: np.ndarray
    num_bytes: int
    num_positions: int
    document: int
    place: int = 0


def make_reader(tokenizer, vocabulary, context=0):
    """The `Reader` of a tokenizer: finds what it adds in front of a text by looking at one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return Reader(tokenizer, vocabulary, full[:start], eos, context, tuple(full[start + len(bare) :]))


def first_tokens(reader, byte_strings):
    """For each byte string the id of the first token that the tokenizer reads in it, in the middle of a text; -1 for
    None, for bytes that are no whole characters, and where the tokenizer makes other bytes of it.

    int64 `[len(byte_strings)]`. Read after a line break, which keeps tokenizers from treating it as a text's start.
    """
    found = np.full(len(byte_strings), -1, dtype=np.int64)
    tokens, space = reader.vocabulary.tokens, reader.vocabulary.adds_space
    for index, ids in _after_a_line_break(reader, byte_strings):
        said = [tokens[i] or b"" for i in ids]
        read, start = 0, 2 if space and said and b"".join(said[:2])[:2] == b" \n" else 1
        for i, part in zip(ids, said, strict=True):
            if read == start:
                found[index] = i if part and byte_strings[index].startswith(part) else -1
                break
            read += len(part)
    return found


def spellings(reader, byte_strings):
    """For each byte string the tokens that the tokenizer reads it as, in the middle of a text, as a tuple of ids; () for
    None, for bytes that are no whole characters, and where the tokenizer makes other bytes of it. Read after a line break.
    """
    found = [()] * len(byte_strings)
    for index, ids in _after_a_line_break(reader, byte_strings):
        said = [reader.vocabulary.tokens[i] or b"" for i in ids]
        for start in range(1, min(3, len(ids)) + 1):  # the line break, with or without a space that the tokenizer adds
            if b"".join(said[start:]) == byte_strings[index] and b"".join(said[:start]).strip(b" ") == b"\n":
                found[index] = tuple(ids[start:])
                break
    return found


def _after_a_line_break(reader, byte_strings):
    """`(index, ids)` of each byte string that is whole characters, the ids with those of the line break in front of it."""
    asked, texts = [], []
    for index, token in enumerate(byte_strings):
        if token:
            try:
                texts.append("\n" + token.decode())
                asked.append(index)
            except UnicodeDecodeError:
                continue
    coded = reader.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return zip(asked, coded, strict=True)


def encode(document, reader):
    """One document through one tokenizer, as `Encoded`.

    A conversation goes through the tokenizer's own chat template, each content is tokenised by itself, and only contents
    are text; in the shared count of bytes they lie behind each other, one byte apart. Answers (role `assistant`) are
    learned, with the special token that ends them.
    """
    if not document.messages:
        return _encode_text(document.text, 0, True, reader)
    pieces = _chat_pieces(document.messages, reader.tokenizer)
    parts = [
        _encode_marks(text, answer, reader) if base is None else _encode_text(text, base, answer, reader)
        for text, base, answer in pieces
    ]
    for part, (_, base, _) in zip(parts, pieces[1:], strict=False):
        if base is not None and len(part) and not part.is_text[-1]:
            part.ends[-1], part.boundary[-1] = base, True  # has read up to the content's first byte
    return Encoded(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Encoded)))


def _encode_text(text, base, learn, reader):
    coded = reader.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(coded["input_ids"], dtype=np.int64)
    spans = align.spans(text, coded["input_ids"], coded["offset_mapping"], reader.vocabulary)
    every = np.ones(len(ids), dtype=bool)
    lengths = np.diff(spans.ends, prepend=0)
    return Encoded(ids, spans.ends + base, spans.boundary, spans.faithful, lengths, every, every & learn)


def _encode_marks(text, after_answer, reader):
    """Marks of a chat template; the first of them is learned where it is the special token that ends an answer."""
    ids = np.array(reader.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    never = np.zeros(len(ids), dtype=bool)
    learn = never.copy()
    learn[:1] = after_answer and len(ids) and int(ids[0]) in reader.tokenizer.all_special_ids
    zeros = np.zeros(len(ids), dtype=np.int64)
    return Encoded(ids, zeros, never.copy(), never.copy(), zeros.copy(), never, learn)


def _chat_pieces(messages, tokenizer):
    """A conversation as (text, base, answer) in order: base is None for marks of the template, else the shared byte
    where this content starts.
    """
    if tokenizer.chat_template:
        turns = [{"role": role, "content": content} for role, content in messages]
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    else:
        end = {"assistant": tokenizer.eos_token or ""}
        rendered = "".join(f"{role.capitalize()}: {text.strip()}{end.get(role, '')}\n" for role, text in messages)
    pieces, cursor, base, answer = [], 0, 1, False
    for role, content in messages:
        content = content.strip()
        start = rendered.find(content, cursor)
        if start < 0:
            raise ValueError(f"the chat template of {tokenizer.name_or_path} leaves out or changes a {role} message")
        if start > cursor:
            pieces.append((rendered[cursor:start], None, answer))
        answer = role == "assistant"
        pieces.append((content, base, answer))
        base += len(content.encode()) + 1
        cursor = start + len(content)
    if cursor < len(rendered):
        pieces.append((rendered[cursor:], None, answer))
    return pieces


def cut_windows(document, student, teacher, student_reader, teacher_reader, max_length, number=0):
    """The `Window`s of one document: `student` and `teacher` are its two `Encoded`s.

    A text is cut where both tokenizations have read the same bytes, so nothing is tokenised twice and no token is torn;
    each window starts with what the tokenizer puts before a text, and the last one ends with the student's
    end-of-text. A conversation is one window, cut off at `max_length`.
    """
    pairs = align.align(student, teacher)
    room = max_length - len(student_reader.prefix) - (0 if document.messages else len(student_reader.eos))
    teacher_room = (teacher_reader.context or 10**9) - len(teacher_reader.prefix)
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
        near = align.Alignment(pairs.student[rows] - s0, pairs.teacher[rows] - t0, pairs.ends[rows], pairs.usable[rows])
        ours, theirs = student.cut(s0, s1), teacher.cut(t0, t1)
        windows.append(_window(ours, theirs, near, student_reader.prefix, teacher_reader.prefix, eos, number))
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
    # both sides score the bytes after their first common boundary and up to their last
    first, last = (pairs.ends[0], pairs.ends[-1]) if len(pairs) else (0, 0)
    ours, num_bytes = _scored(student, first, last)
    theirs, their_bytes = _scored(teacher, first, last)
    if num_bytes != their_bytes:  # a normaliser ate text at the end of a content: nothing here to compare
        ours, theirs, num_bytes = ours & False, theirs & False, 0
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
        student_stops=ours_stop + len(student_prefix),
        teacher_stops=theirs_stop + len(teacher_prefix),
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


def _scored(encoded, first, last):
    """The tokens whose end lies in `(first, last]` and that are learned text, and the bytes they cover."""
    counts = encoded.learn & encoded.is_text & (encoded.ends > first) & (encoded.ends <= last)
    return counts, int(encoded.lengths[counts].sum())


def _shifted(encoded, scored, prefix, suffix):
    """Ids, labels and scored rows of one side of a window; row i speaks of the token at i + 1."""
    ids = np.concatenate([prefix, encoded.ids, suffix]).astype(np.int64)
    target = np.concatenate([np.zeros(len(prefix), bool), encoded.learn, np.ones(len(suffix), bool)])
    score = np.concatenate([np.zeros(len(prefix), bool), scored, np.zeros(len(suffix), bool)])
    return ids, labels_of(ids, np.append(target[1:], False)), np.append(score[1:], False)


def labels_of(ids, learned):
    """The labels of the rows of a window: the token that follows where it is `learned`, else IGNORE."""
    return np.where(learned, np.append(ids[1:], 0), IGNORE)
