"""Conversations rendered by a chat template, the character ranges of their contents in the rendered text, and its
tokens.

Ranges come from rendering the template with placeholders instead of contents, and are verified against the real text.
Contents are never searched for, because a short one may also occur in the template's own text.
"""

import dataclasses
import datetime
import itertools
import operator
import re

import numpy as np

from kdlib import clock

DIRECTIVES = [f"%{letter}" for letter in (*"aAbBdjmyYHIMpSGuUVwWcxX", "-d", "-m", "-H", "-I", "%")]
"""Directives of `strftime` that a chat template can use."""
LEADS = ("\n", ".", "x", "")
"""Prefixes for a piece of a text, so that tokenizers that mark the start of a text do not mark the piece's."""


class RejectedConversation(ValueError):
    """A conversation that a chat template rejects, drops or changes. `reason` does not name the record."""

    def __init__(self, reason, source=""):
        super().__init__(f"{source}: {reason}" if source else reason)
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Rendering:
    """Settings of chat templates: `arguments` as `((name, value), ...)`, and the `date` that a template prints if it asks
    for the current one (`2026-07-26`; empty: the current one).
    """

    arguments: tuple = ()
    date: str = ""

    @classmethod
    def of(cls, config):
        return cls(tuple(config.template_arguments().items()), config.template_date or clock.today())

    def arguments_for(self, tokenizer):
        """Returns the arguments of `apply_chat_template`. The date replaces the function that returns the current one."""
        arguments = dict(self.arguments)
        if self.date and prints_date(tokenizer):
            arguments["chat_template"] = _date_macro(self.date) + tokenizer.get_chat_template()
        return arguments

    def key_for(self, tokenizer):
        """Returns a text that is equal if a tokenizer's template is rendered equally."""
        return repr((self.arguments, self.date if prints_date(tokenizer) else ""))


def _date_macro(date):
    """Returns a template macro `strftime_now` that formats a fixed date."""
    moment = datetime.datetime.fromisoformat(date)
    values = {directive: moment.strftime(directive) for directive in DIRECTIVES}
    replaced = "".join(f".replace({directive!r}, {value!r})" for directive, value in values.items())
    # the line break after the last tag is removed, and the template starts at the start of a line
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro %}\n"


def prints_date(tokenizer):
    """Returns whether a tokenizer's chat template asks for the current date."""
    return "strftime_now" in str(tokenizer.chat_template)


@dataclasses.dataclass(frozen=True)
class Content:
    """The content of one message in a rendered conversation: characters `[start, end)`.

    `base` is the offset of its first rendered character in the shared byte count, in which the untrimmed contents
    follow each other with one byte between. `turn_end` is the exclusive end of an answer's turn.
    """

    start: int
    end: int
    base: int
    is_answer: bool
    turn_end: int


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Token ids of a text and their characters `[start, end)`. A gap between tokens belongs to the next token."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with its arguments."""

    tokenizer: object
    arguments: dict

    def __str__(self):
        return f"the chat template of {self.tokenizer.name_or_path or type(self.tokenizer).__name__}"

    def render(self, messages):
        """Renders a conversation; without a chat template, as one line per message."""
        if not self.tokenizer.chat_template:
            end = {"assistant": self.tokenizer.eos_token or ""}
            return "".join(f"{role.capitalize()}: {text.strip()}{end.get(role, '')}\n" for role, text in messages)
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **self.arguments)
        except Exception as error:  # noqa: BLE001 - a template is a program and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RejectedConversation(f"{self} rejects this conversation: {reason}") from None


def locate_contents(messages, tokenizer, prompt_length=0, rendering=Rendering()):
    """Renders a conversation with its tokenizer's chat template. Returns `(text, contents)`, `Content`s in order.

    The first `prompt_length` messages hold no answers to learn. Blank contents are skipped, and so are contents that
    the template moves behind a later answer. Raises `RejectedConversation` if the template rejects the conversation,
    or drops or changes a content.
    """
    template = Template(tokenizer, rendering.arguments_for(tokenizer))
    text = template.render(messages)
    placeholders = _placeholders(messages, text)
    ranges = _locate_all(messages, placeholders, text, template) or {
        index: _locate(messages, placeholders, index, text, template) for index in placeholders
    }
    base, contents = 1, []
    ending = _ending(messages, placeholders, ranges, text, template)
    ranges = _in_order(messages, ranges, text, template)
    for index, (role, content) in enumerate(messages):
        if index in ranges:
            start, end = ranges[index]
            first = base + len(content[: _num_trimmed(content, text[start:end])].encode())
            is_answer = role == "assistant" and index >= prompt_length
            tail = _common_length(ending, text[end : end + len(ending)]) if is_answer else 0
            contents.append(Content(start, end, first, is_answer, end + tail))
        base += len(content.encode()) + 1
    return text, contents


def tokenize(text, contents, reader):
    """Tokenizes a rendered conversation as one string. If a token crosses the edge of a content, the text is also cut
    at that content's edges. The first token of a content may begin with blanks of the template. Returns `Tokens`.
    """
    cuts = {0, len(text)}
    while True:
        edges = sorted(cuts)
        parts = [_tokenize_piece(text, *piece, reader) for piece in itertools.pairwise(edges)]
        tokens = Tokens(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Tokens)))
        crossed = [content for content in contents if _has_crossed_edge(content, tokens, text)]
        if not crossed:
            return tokens
        cuts |= {edge for content in crossed for edge in (content.start, content.end)}


def _has_crossed_edge(content, tokens, text):
    first, after = np.searchsorted(tokens.ends, [content.start, content.end], "right")
    if after < len(tokens.ids) and tokens.starts[after] < content.end:
        return True
    return first < after and bool(text[tokens.starts[first] : content.start].strip())


def _tokenize_piece(text, start, end, reader):
    """Tokenizes `text[start:end]`. A piece after the start of the text is tokenized as if in the middle of one."""
    for lead in LEADS if start and reader.vocabulary.adds_space else ("",):
        encoding = reader.tokenizer(
            lead + text[start:end], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2) - len(lead)
        ends = np.maximum.accumulate(offsets[:, 1])
        first = int(np.searchsorted(ends, 0, "right")) if lead else 0
        if not len(offsets[first:]) or not lead or offsets[first, 0] >= 0:
            break
    starts = np.minimum(offsets[:, 0], np.append(0, ends)[:-1])[first:]
    return Tokens(np.array(encoding["input_ids"], dtype=np.int64)[first:], starts + start, ends[first:] + start)


def _placeholders(messages, text):
    """Returns `{index: placeholder}` for the messages that are not blank. Placeholders occur nowhere in the text."""
    stem = "kdlib"
    while stem in text or any(stem in content for _, content in messages):
        stem += "x"
    return {index: f"{stem}{index}z" for index, (_, content) in enumerate(messages) if content.strip()}


def _render_placeholders(messages, placeholders, template):
    """Renders the conversation with `placeholders` instead of contents. Raises
    `RejectedConversation` unless each occurs once.
    """
    replaced = [(role, placeholders.get(index, content)) for index, (role, content) in enumerate(messages)]
    rendered = template.render(replaced)
    for index, placeholder in placeholders.items():
        if rendered.count(placeholder) != 1:
            raise _changed(messages, index, template)
    return rendered


def _locate_all(messages, placeholders, text, template):
    """Locates all contents with one rendering, by depth-first search over the ways in which each may be trimmed.
    Returns `{index: (start, end)}`, or None if the template text depends on the contents.
    """
    rendered = _render_placeholders(messages, placeholders, template)
    order = sorted(placeholders, key=lambda index: rendered.index(placeholders[index]))
    separators = re.split("|".join(placeholders.values()), rendered)
    stack = [(len(separators[0]), ())] if text.startswith(separators[0]) else []
    while stack:
        cursor, ranges = stack.pop()
        if len(ranges) == len(order):
            if cursor == len(text):
                return dict(zip(order, ranges, strict=True))
            continue
        separator = separators[len(ranges) + 1]
        for form in reversed(_trimmed_forms(messages[order[len(ranges)]][1])):  # the longest is popped first
            if text.startswith(form + separator, cursor):
                end = cursor + len(form)
                stack.append((end + len(separator), (*ranges, (cursor, end))))
    return None


def _locate(messages, placeholders, index, text, template):
    """Locates one content, `(start, end)`, from a rendering with the real other contents.

    The text around the placeholder must surround the content too. If the content changes the template text on one side,
    the other side decides. The template may keep only the end of the content, like templates that drop earlier
    reasoning.
    """
    content, placeholder = messages[index][1], placeholders[index]
    before, after = _render_placeholders(messages, {index: placeholder}, template).split(placeholder)
    start, end = len(before), len(text) - len(after)
    fits_before, fits_after = text.startswith(before), text.endswith(after)
    if fits_before and fits_after and text[start:end].strip():
        num_trimmed = _num_trimmed(content, text[start:end])
        if num_trimmed >= 0 and content.startswith(text[start:end], num_trimmed):
            return start, end
    for form in _trimmed_forms(content):
        if fits_after and text.endswith(form, 0, max(0, end)):
            return end - len(form), end
        if fits_before and text.startswith(form, start):
            return start, start + len(form)
    raise _changed(messages, index, template)


def _trimmed_forms(content):
    """Returns the content and its variants with blanks trimmed at the edges, longest first."""
    core = content.strip()
    lead, trail = content[: content.index(core)], content[content.index(core) + len(core) :]
    leads = dict.fromkeys([lead, lead.lstrip(" "), lead.lstrip("\n"), ""])
    trails = dict.fromkeys([trail, trail.rstrip(" "), trail.rstrip("\n"), ""])
    return sorted((a + core + b for a in leads for b in trails), key=len, reverse=True)


def _num_trimmed(content, part):
    """Returns the number of characters of a content before `part`, its end up to trailing blanks."""
    return len(content.rstrip()) - len(part.rstrip())


def _in_order(messages, ranges, text, template):
    """Returns the ranges in message order, without contents that were moved. Raises
    `RejectedConversation` for moved answers.
    """
    kept, cursor = {}, 0
    for index, (start, end) in sorted(ranges.items()):
        later_answers = [ranges[i][0] for i in ranges if i > index and messages[i][0] == "assistant"]
        if start >= cursor and end <= min(later_answers, default=len(text)):
            kept[index], cursor = (start, end), end
        elif messages[index][0] == "assistant":
            raise _changed(messages, index, template)
    return kept


def _ending(messages, placeholders, ranges, text, template):
    """Returns the template text after the last answer of a conversation that ends with it."""
    last = max((index for index in ranges if messages[index][0] == "assistant"), default=None)
    if last is None:
        return ""
    if last == len(messages) - 1:
        return text[ranges[last][1] :]
    placeholder = placeholders[last]
    return _render_placeholders(messages[: last + 1], {last: placeholder}, template).split(placeholder)[1]


def _common_length(first, second):
    return sum(itertools.takewhile(bool, map(operator.eq, first, second)))


def _changed(messages, index, template):
    role = messages[index][0]
    article = "an" if role == "assistant" else "a"
    return RejectedConversation(f"{template} drops or changes {article} {role} message")
