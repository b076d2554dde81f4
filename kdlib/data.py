"""Text -> windows: documents, each tokenizer's own ids of them, windows cut where both have read the same bytes.

The only place that shifts labels: `labels[i]` is the token that follows position i, or IGNORE where nothing is learned.
"""

import dataclasses
import functools

import numpy as np

from kdlib import align, chat

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

    @functools.cached_property
    def marks(self):
        """`(special, added)`: ids of the special tokens, and of all tokens that were added to the vocabulary; without the
        one for unknown text, unless it also ends a text.
        """
        added = self.tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        unknown = {self.tokenizer.unk_token_id} - {self.tokenizer.eos_token_id}
        return special - unknown, set(added) - unknown

    def prefix_of(self, document):
        """Ids in front of each window of a document: what a chat template renders is complete."""
        return [] if document.messages and self.tokenizer.chat_template else self.prefix


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
    None, for bytes that are no whole characters, and where the tokenizer makes other bytes of it. int64
    `[len(byte_strings)]`.
    """
    found = np.full(len(byte_strings), -1, dtype=np.int64)
    tokens, space = reader.vocabulary.tokens, reader.vocabulary.adds_space
    for index, lead, ids in _in_a_text(reader, byte_strings):
        said = [tokens[i] or b"" for i in ids]
        read, start = 0, 1 + bool(space and b"".join(said[:2])[:2] == b" " + lead)
        for i, part in zip(ids, said, strict=True):
            if read == start:
                found[index] = i if part and byte_strings[index].startswith(part) else -1
                break
            read += len(part)
    return found


def spellings(reader, byte_strings):
    """For each byte string the tokens that the tokenizer reads it as, in the middle of a text, as a tuple of ids; () for
    None, for bytes that are no whole characters, and where the tokenizer makes other bytes of it.
    """
    found = [()] * len(byte_strings)
    for index, _, ids in _in_a_text(reader, byte_strings):
        said = [reader.vocabulary.tokens[i] or b"" for i in ids]
        for start in range(1, min(3, len(ids)) + 1):  # the lead, with or without a space that the tokenizer adds
            if b"".join(said[start:]) == byte_strings[index]:
                found[index] = tuple(ids[start:])
                break
    return found


def _in_a_text(reader, byte_strings):
    """`(index, lead, ids)` of each byte string that is whole characters: its tokens behind a lead of one byte, which keeps
    tokenizers from treating it as a text's start. The lead is a line break; for white space, which many tokenizers would
    read together with it, a letter.
    """
    asked = []
    for index, token in enumerate(byte_strings):
        if token:
            try:
                text = token.decode()
            except UnicodeDecodeError:
                continue
            asked.append((index, "a" if text.lstrip(" \t")[:1] in ("", "\n", "\r") else "\n", text))
    texts = [lead + text for _, lead, text in asked]
    coded = reader.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return [(index, lead.encode(), ids) for (index, lead, _), ids in zip(asked, coded, strict=True)]


def encode(document, reader):
    """One document through one tokenizer, as `Encoded`.

    A conversation goes through the tokenizer's own chat template and is tokenized at once, so its ids are those of
    `apply_chat_template`. Only contents are text; in the shared count of bytes they follow each other, one byte apart.
    Answers (role `assistant`) are learned, with all that the template puts behind them up to the last special token of
    their turn. Raises ValueError that names the record if the template does not take the conversation.
    """
    if document.messages:
        return _encode_chat(document, reader)
    coded = reader.tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(coded["input_ids"], dtype=np.int64)
    spans = align.spans(document.text, coded["input_ids"], coded["offset_mapping"], reader.vocabulary)
    every = np.ones(len(ids), dtype=bool)
    lengths = np.diff(spans.ends, prepend=0)
    return Encoded(ids, spans.ends, spans.boundary, spans.faithful, lengths, every, every)


def _encode_chat(document, reader):
    try:
        text, contents = chat.lay_out(document.messages, reader.tokenizer)
    except ValueError as error:
        raise ValueError(f"{document.source}: {error}" if document.source else str(error)) from None
    tokens = chat.tokenize(text, contents, reader)
    made = Encoded(tokens.ids, *(np.zeros(len(tokens.ids), kind) for kind in (int, bool, bool, int, bool, bool)))
    for content in contents:
        _encode_content(made, tokens, content, text, reader)
    return made


def _encode_content(made, tokens, content, text, reader):
    """Fill in one content of a conversation: its tokens, the boundary in front of them, the end mark behind them."""
    first, after = np.searchsorted(tokens.ends, [content.start, content.end], "right")
    if first and not made.is_text[first - 1]:
        made.ends[first - 1], made.boundary[first - 1] = content.base, True  # has read up to the content's first byte
    if first < after:
        run, start = slice(first, after), min(int(tokens.starts[first]), content.start)
        blanks = len(text[start : content.start].encode())  # the first token may begin with blanks of the template
        offsets = np.stack([tokens.starts[run], tokens.ends[run]], axis=1) - start
        spans = align.spans(text[start : content.end], tokens.ids[run].tolist(), offsets, reader.vocabulary)
        ends = np.maximum(spans.ends - blanks, 0)
        made.ends[run], made.boundary[run], made.faithful[run] = ends + content.base, spans.boundary, spans.faithful
        made.lengths[run] = np.diff(ends, prepend=0)
        made.faithful[first] &= not blanks
        made.is_text[run], made.learn[run] = True, content.is_answer
    special, added = reader.marks
    tail = _tail(tokens, after, content.turn_end, text)
    ends = [i for i in tail if tokens.ids[i] in special] or [i for i in tail if tokens.ids[i] in added]
    if ends:
        made.learn[after : ends[-1] + 1] = True


def _tail(tokens, first, turn_end, text):
    """The tokens from `first` on that lie in a turn; blanks behind it, which some special tokens take in, do not count."""
    tail = []
    for i in range(first, len(tokens.ids)):
        start = int(tokens.starts[i])
        if start + len(text[start : tokens.ends[i]].rstrip()) > turn_end:
            break
        tail.append(i)
    return tail


def cut_windows(document, student, teacher, student_reader, teacher_reader, max_length, number=0):
    """The `Window`s of one document: `student` and `teacher` are its two `Encoded`s.

    A text is cut where both tokenizations have read the same bytes, so nothing is tokenised twice and no token is torn;
    each window starts with what the tokenizer puts before a text, and the last one ends with the student's
    end-of-text. A conversation is one window, cut off at `max_length`, with nothing around what its chat template renders.
    """
    pairs = align.align(student, teacher)
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
        near = align.Alignment(pairs.student[rows] - s0, pairs.teacher[rows] - t0, pairs.ends[rows], pairs.usable[rows])
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
