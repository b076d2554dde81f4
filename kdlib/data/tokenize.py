"""Text -> tokens: a document or conversation as ids of one tokenizer, with byte offsets and training targets."""

import dataclasses
import functools

import numpy as np

from kdlib.align import boundaries
from kdlib.data import chat


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer with its `Vocabulary`, and the ids that it adds before a text (`prefix`) and that end it (`eos`)."""

    tokenizer: object
    vocabulary: object
    prefix: list
    eos: list
    context: int = 0
    """The model's context length in tokens; 0 if unknown."""
    suffix: tuple = ()
    """Ids that the tokenizer appends to a text. kdlib drops them, because a text continues in the next window."""

    @functools.cached_property
    def special_ids(self):
        """`(special, added)`: ids of the special tokens and of all added tokens, without the unknown token, unless it
        is also the EOS token.
        """
        added = self.tokenizer.added_tokens_decoder
        special = {index for index, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        unknown = {self.tokenizer.unk_token_id} - {self.tokenizer.eos_token_id}
        return special - unknown, set(added) - unknown

    def prefix_of(self, document):
        """Returns the ids before each window of a document: none if a chat template renders it."""
        return [] if document.messages and self.tokenizer.chat_template else self.prefix


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One document tokenized by one tokenizer, as arrays with one entry per token.

    `ends`, `boundary`, `faithful`: as in `boundaries.TokenSpans`, in bytes of the text that both tokenizers share. A
    token of the chat template has `is_text` false, and ends at the byte where the next content starts. `lengths`: bytes
    covered. `learn`: the token is a target (text, or the end of an answer).
    """

    ids: np.ndarray
    ends: np.ndarray
    boundary: np.ndarray
    faithful: np.ndarray
    lengths: np.ndarray
    is_text: np.ndarray
    learn: np.ndarray
    left_out: tuple = ()
    """Names of what the chat template leaves out of the document."""

    def __len__(self):
        return len(self.ids)

    def cut(self, start, end):
        names = [field.name for field in dataclasses.fields(self) if field.name != "left_out"]
        return Encoded(*(getattr(self, name)[start:end] for name in names), self.left_out)


def wrap_tokenizer(tokenizer, vocabulary, context=0):
    """Builds a `TextTokenizer`; finds the prefix and suffix ids by tokenizing a sample text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    start = next((i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare), 0)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return TextTokenizer(tokenizer, vocabulary, full[:start], eos, context, tuple(full[start + len(bare) :]))


def first_tokens(reader, byte_strings):
    """Returns the id of each byte string's first token in the middle of a text, int64 `[len(byte_strings)]`; -1 for
    None, for incomplete characters, and if the tokenizer changes the bytes.
    """
    first_ids = np.full(len(byte_strings), -1, dtype=np.int64)
    tokens, adds_space = reader.vocabulary.tokens, reader.vocabulary.adds_space
    for index, lead, ids in _tokenize_mid_text(reader, byte_strings):
        pieces = [tokens[i] or b"" for i in ids]
        offset, start = 0, 1 + bool(adds_space and b"".join(pieces[:2])[:2] == b" " + lead)
        for i, piece in zip(ids, pieces, strict=True):
            if offset == start:
                first_ids[index] = i if piece and byte_strings[index].startswith(piece) else -1
                break
            offset += len(piece)
    return first_ids


def spellings(reader, byte_strings):
    """Tokenizes each byte string in the middle of a text: a tuple of ids, or () if `first_tokens` gives -1."""
    sequences = [()] * len(byte_strings)
    for index, _, ids in _tokenize_mid_text(reader, byte_strings):
        pieces = [reader.vocabulary.tokens[i] or b"" for i in ids]
        for start in range(1, min(3, len(ids)) + 1):  # skips the lead, and a space that the tokenizer may add
            if b"".join(pieces[start:]) == byte_strings[index]:
                sequences[index] = tuple(ids[start:])
                break
    return sequences


def _tokenize_mid_text(reader, byte_strings):
    """Returns `(index, lead, ids)` of each byte string of complete characters, tokenized after a one-byte lead. The
    lead keeps tokenizers from treating the string as the start of a text. It is a line break, or a letter before white
    space, which many tokenizers would merge with a line break.
    """
    entries = []
    for index, byte_string in enumerate(byte_strings):
        if byte_string:
            try:
                text = byte_string.decode()
            except UnicodeDecodeError:
                continue
            entries.append((index, "a" if text.lstrip(" \t")[:1] in ("", "\n", "\r") else "\n", text))
    texts = [lead + text for _, lead, text in entries]
    sequences = reader.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return [(index, lead.encode(), ids) for (index, lead, _), ids in zip(entries, sequences, strict=True)]


def encode(document, reader, rendering=chat.Rendering()):  # noqa: B008 - frozen
    """Tokenizes one document with one tokenizer. Returns `Encoded`. `rendering`: settings of chat templates.

    A conversation is rendered with the tokenizer's own chat template and tokenized as one string, so its ids equal
    those of `apply_chat_template`. Only contents are text; in the shared byte count they follow each other with one
    byte between. Targets are answers (role `assistant`), their thoughts and tool calls, and the template text after them,
    up to the last special token of their turn. Tool calls and template text around thoughts are not shared. In a text, a
    token is a target unless it begins in the prompt (`Document.prompt_length`). Raises `chat.RejectedConversation` with
    the record's name.
    """
    if document.messages:
        return _encode_chat(document, reader, rendering)
    encoding = reader.tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = encoding["input_ids"]
    _check_rows(ids, document, reader)
    spans = boundaries.token_spans(document.text, ids, encoding["offset_mapping"], reader.vocabulary)
    starts = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:, 0]
    lengths, is_text = np.diff(spans.ends, prepend=0), np.ones(len(ids), dtype=bool)
    arrays = spans.ends, spans.boundary, spans.faithful, lengths, is_text, starts >= document.prompt_length
    return Encoded(np.array(ids, dtype=np.int64), *arrays)


def _encode_chat(document, reader, rendering):
    try:
        rendered = chat.locate_contents(document, reader.tokenizer, rendering)
    except chat.RejectedConversation as error:
        raise chat.RejectedConversation(error.reason, document.source) from None
    text, contents = rendered.text, rendered.contents
    tokens = chat.tokenize(text, contents, reader)
    _check_rows(tokens.ids, document, reader)
    arrays = (np.zeros(len(tokens.ids), kind) for kind in (int, bool, bool, int, bool, bool))
    encoded = Encoded(tokens.ids, *arrays, rendered.left_out)
    for content in contents:
        _encode_content(encoded, tokens, content, text, reader)
    for target in rendered.targets:
        first, after = np.searchsorted(tokens.starts, target.start), np.searchsorted(tokens.ends, target.end, "right")
        encoded.learn[first:after] = True
        _learn_turn_end(encoded, tokens, after, target.turn_end, text, reader)
    return encoded


def _check_rows(ids, document, reader):
    """Raises `chat.RejectedConversation` for a special token that the model has no row for."""
    unknown = [index for index in ids if index >= reader.vocabulary.num_rows]
    if unknown:
        token = reader.tokenizer.convert_ids_to_tokens(int(unknown[0]))
        raise chat.RejectedConversation(f"the model has no row for the special token {token}", document.source)


def _encode_content(encoded, tokens, content, text, reader):
    """Fills in one content of a conversation: its tokens, the boundary before them, and the end-of-turn target."""
    first, after = np.searchsorted(tokens.ends, [content.start, content.end], "right")
    if first and not encoded.is_text[first - 1]:
        encoded.ends[first - 1], encoded.boundary[first - 1] = content.base, True
    if first < after:
        run, start = slice(first, after), min(int(tokens.starts[first]), content.start)
        num_blanks = len(text[start : content.start].encode())  # the first token may begin with blanks of the template
        offsets = np.stack([tokens.starts[run], tokens.ends[run]], axis=1) - start
        spans = boundaries.token_spans(text[start : content.end], tokens.ids[run].tolist(), offsets, reader.vocabulary)
        ends = np.maximum(spans.ends - num_blanks, 0)
        encoded.ends[run], encoded.lengths[run] = ends + content.base, np.diff(ends, prepend=0)
        encoded.boundary[run], encoded.faithful[run] = spans.boundary, spans.faithful
        encoded.faithful[first] &= not num_blanks
        encoded.is_text[run], encoded.learn[run] = True, content.is_answer
    _learn_turn_end(encoded, tokens, after, content.turn_end, text, reader)


def _learn_turn_end(encoded, tokens, after, turn_end, text, reader):
    """Makes the tokens from `after` to the last special token of the turn targets."""
    special, added = reader.special_ids
    tail = _turn_tail(tokens, after, turn_end, text)
    ends = [i for i in tail if tokens.ids[i] in special] or [i for i in tail if tokens.ids[i] in added]
    if ends:
        encoded.learn[after : ends[-1] + 1] = True


def _turn_tail(tokens, first, turn_end, text):
    """Returns the indices of the tokens from `first` to the end of the turn, ignoring blanks that special tokens
    absorb.
    """
    tail = []
    for i in range(first, len(tokens.ids)):
        start = int(tokens.starts[i])
        if start + len(text[start : tokens.ends[i]].rstrip()) > turn_end:
            break
        tail.append(i)
    return tail
