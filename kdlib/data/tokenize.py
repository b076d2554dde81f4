"""Text -> tokens: each tokenizer's own ids of a document or a conversation, and what of them is learned."""

import dataclasses
import functools

import numpy as np

from kdlib.align import boundaries
from kdlib.data import chat


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
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

    `ends`, `boundary`, `faithful` as in `boundaries.Spans`, in bytes of the text that both tokenizers share; a mark of
    a chat template has `is_text` false and stands at the byte of the content that follows it. `lengths`: bytes it covers.
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


def wrap_tokenizer(tokenizer, vocabulary, context=0):
    """The `TextTokenizer` of a tokenizer: finds what it adds in front of a text by looking at one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return TextTokenizer(tokenizer, vocabulary, full[:start], eos, context, tuple(full[start + len(bare) :]))


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
    spans = boundaries.token_spans(document.text, coded["input_ids"], coded["offset_mapping"], reader.vocabulary)
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
        spans = boundaries.token_spans(text[start : content.end], tokens.ids[run].tolist(), offsets, reader.vocabulary)
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
