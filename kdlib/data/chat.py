"""Conversations as a chat template renders them, where their contents stand in the rendered text, and its tokens.

Every place comes from rendering the template with placeholders in the place of contents, and is then verified against the
real text. A content is never searched for: a short one may also stand in a mark of the template.
"""

import dataclasses
import itertools
import re

import numpy as np

LEADS = ("\n", ".", "x", "")
"""Texts in front of a piece of a text, so that a tokenizer that marks a text's start does not mark the piece's."""


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of one message in a rendered conversation: its characters `[start, end)`.

    `base` is the byte of its first rendered character in the shared count of bytes: there the contents of all messages
    follow each other, one byte apart, as they are before any template trims them. `is_answer`: the role is `assistant`.
    The turn of an answer ends before character `turn_end`.
    """

    start: int
    end: int
    base: int
    is_answer: bool
    turn_end: int


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Ids of a text, and the characters `[start, end)` of each; what no token claims belongs to the one that follows."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def lay_out(messages, tokenizer):
    """Returns `(text, contents)`: a conversation as its tokenizer's chat template renders it, and the `Content`s in order.

    A content that is blank, and one that the template moves behind an answer that it comes before, is not among them.
    Raises ValueError if the template refuses the conversation, or leaves out or changes a content.
    """
    text = _render(messages, tokenizer)
    marks = _placeholders(messages, text)
    places = _all_places(messages, marks, text, tokenizer) or {
        index: _place(messages, marks, index, text, tokenizer) for index in marks
    }
    base, contents = 1, []
    ending = _ending(messages, marks, places, text, tokenizer)
    ordered = _in_order(messages, places, text, tokenizer)
    for index, (role, content) in enumerate(messages):
        if index in ordered:
            start, end = ordered[index]
            first = base + len(content[: _skipped(content, text[start:end])].encode())
            tail = _common(ending, text[end : end + len(ending)]) if role == "assistant" else 0
            contents.append(Content(start, end, first, role == "assistant", end + tail))
        base += len(content.encode()) + 1
    return text, contents


def tokenize(text, contents, reader):
    """The `Tokens` of a conversation, tokenized at once if no token reaches over the edge of a content; else the text is
    cut at the edges of that content. Blanks of the template may begin the first token of a content.
    """
    cuts = {0, len(text)}
    while True:
        edges = sorted(cuts)
        parts = [_tokenize_piece(text, *piece, reader) for piece in itertools.pairwise(edges)]
        tokens = Tokens(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Tokens)))
        torn = [content for content in contents if _is_torn(content, tokens, text)]
        if not torn:
            return tokens
        cuts |= {edge for content in torn for edge in (content.start, content.end)}


def _is_torn(content, tokens, text):
    first, after = np.searchsorted(tokens.ends, [content.start, content.end], "right")
    if after < len(tokens.ids) and tokens.starts[after] < content.end:
        return True
    return first < after and bool(text[tokens.starts[first] : content.start].strip())


def _tokenize_piece(text, start, end, reader):
    """The `Tokens` of `text[start:end]`; a piece that does not begin the text is read as in the middle of one."""
    for lead in LEADS if start and reader.vocabulary.adds_space else ("",):
        coded = reader.tokenizer(
            lead + text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        claimed = np.array(coded["offset_mapping"], dtype=np.int64).reshape(-1, 2) - len(lead)
        ends = np.maximum.accumulate(claimed[:, 1])
        first = int(np.searchsorted(ends, 0, "right")) if lead else 0
        if not len(claimed[first:]) or not lead or claimed[first, 0] >= 0:
            break
    starts = np.minimum(claimed[:, 0], np.append(0, ends)[:-1])[first:]
    return Tokens(np.array(coded["input_ids"], dtype=np.int64)[first:], starts + start, ends[first:] + start)


def _render(messages, tokenizer):
    """The text of a conversation; without a chat template one line for each message."""
    if not tokenizer.chat_template:
        end = {"assistant": tokenizer.eos_token or ""}
        return "".join(f"{role.capitalize()}: {text.strip()}{end.get(role, '')}\n" for role, text in messages)
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # noqa: BLE001 - a template is a program, and its author chooses what it raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the chat template of {_name(tokenizer)} refuses this conversation: {reason}") from None


def _placeholders(messages, text):
    """A placeholder for each message that is not blank, `{index: placeholder}`; they occur in no content and no mark."""
    stem = "kdlib"
    while stem in text or any(stem in content for _, content in messages):
        stem += "x"
    return {index: f"{stem}{index}z" for index, (_, content) in enumerate(messages) if content.strip()}


def _shown(messages, marks, tokenizer):
    """The conversation with `marks`, `{index: placeholder}`, in the place of contents. Each stands in it exactly once."""
    changed = [(role, marks.get(index, content)) for index, (role, content) in enumerate(messages)]
    shown = _render(changed, tokenizer)
    for index, mark in marks.items():
        if shown.count(mark) != 1:
            raise _changed(messages, index, tokenizer)
    return shown


def _all_places(messages, marks, text, tokenizer):
    """`{index: (start, end)}` of all contents by one rendering; None if the template's marks depend on the contents."""
    shown = _shown(messages, marks, tokenizer)
    order = sorted(marks, key=lambda index: shown.index(marks[index]))
    between = re.split("|".join(marks.values()), shown)
    reached = [(len(between[0]), ())] if text.startswith(between[0]) else []
    while reached:
        cursor, spans = reached.pop()
        if len(spans) == len(order):
            if cursor == len(text):
                return dict(zip(order, spans, strict=True))
            continue
        behind = between[len(spans) + 1]
        for form in reversed(_forms(messages[order[len(spans)]][1])):  # the longest is taken from the stack first
            if text.startswith(form + behind, cursor):
                end = cursor + len(form)
                reached.append((end + len(behind), (*spans, (cursor, end))))
    return None


def _place(messages, marks, index, text, tokenizer):
    """`(start, end)` of one content, from a rendering in which all other contents are real.

    What stands before and behind the placeholder stands on both sides of the content, or, if the content changes what the
    template writes on one side of it, on the other side alone. Between both, the template may have kept the end of the
    content only, as templates do that drop the thoughts of earlier turns.
    """
    content = messages[index][1]
    before, behind = _shown(messages, {index: marks[index]}, tokenizer).split(marks[index])
    start, end = len(before), len(text) - len(behind)
    starts, ends = text.startswith(before), text.endswith(behind)
    if starts and ends and text[start:end].strip():
        skipped = _skipped(content, text[start:end])
        if skipped >= 0 and content.startswith(text[start:end], skipped):
            return start, end
    for form in _forms(content):
        if ends and text.endswith(form, 0, max(0, end)):
            return end - len(form), end
        if starts and text.startswith(form, start):
            return start, start + len(form)
    raise _changed(messages, index, tokenizer)


def _forms(content):
    """The content, and what is left of it where a template trims blanks at its edges, the longest first."""
    core = content.strip()
    lead, trail = content[: content.index(core)], content[content.index(core) + len(core) :]
    leads = dict.fromkeys([lead, lead.lstrip(" "), lead.lstrip("\n"), ""])
    trails = dict.fromkeys([trail, trail.rstrip(" "), trail.rstrip("\n"), ""])
    return sorted((a + core + b for a in leads for b in trails), key=len, reverse=True)


def _skipped(content, part):
    """Characters of a content before `part`, which is its end or lacks only blanks behind it."""
    return len(content.rstrip()) - len(part.rstrip())


def _in_order(messages, places, text, tokenizer):
    """The places that follow each other as the messages do. Two texts are compared in the order of the messages; a content
    that is not learned and stands elsewhere is left out.
    """
    kept, cursor = {}, 0
    for index, (start, end) in sorted(places.items()):
        answers = [places[k][0] for k in places if k > index and messages[k][0] == "assistant"]
        if start >= cursor and end <= min(answers, default=len(text)):
            kept[index], cursor = (start, end), end
        elif messages[index][0] == "assistant":
            raise _changed(messages, index, tokenizer)
    return kept


def _ending(messages, marks, places, text, tokenizer):
    """What the template writes behind the last answer where the conversation ends with it."""
    last = max((index for index in places if messages[index][0] == "assistant"), default=None)
    if last is None:
        return ""
    if last == len(messages) - 1:
        return text[places[last][1] :]
    return _shown(messages[: last + 1], {last: marks[last]}, tokenizer).split(marks[last])[1]


def _common(first, second):
    """How many characters two texts have in common at their beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _changed(messages, index, tokenizer):
    role = messages[index][0]
    article = "an" if role == "assistant" else "a"
    return ValueError(f"the chat template of {_name(tokenizer)} leaves out or changes {article} {role} message")


def _name(tokenizer):
    return tokenizer.name_or_path or type(tokenizer).__name__
