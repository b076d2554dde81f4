"""Conversations rendered by a chat template, the character ranges of their contents, thoughts and tool calls in the
rendered text, and its tokens.

Ranges come from rendering the template with placeholders instead of contents, and are verified against the real text.
Contents are never searched for, because a short one may also occur in the template's own text.
"""

import dataclasses
import datetime
import itertools
import json
import operator
import re

import numpy as np

from kdlib import clock

THOUGHT, THOUGHTS = "reasoning_content", ("reasoning_content", "thinking", "reasoning")
"""The field of a message's thoughts, and the names under which chat templates read it."""
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
    for the current one (`2026-07-26`; empty: the current one). `learn_thinking`: thoughts are training targets.
    """

    arguments: tuple = ()
    date: str = ""
    learn_thinking: bool = True

    @classmethod
    def of(cls, config):
        arguments = tuple(config.template_arguments().items())
        return cls(arguments, config.template_date or clock.today(), config.learn_thinking)

    def arguments_for(self, tokenizer, tools=()):
        """Returns the arguments of `apply_chat_template`. The date replaces the function that returns the current one."""
        arguments = dict(self.arguments)
        if self.date and prints_date(tokenizer):
            arguments["chat_template"] = _date_macro(self.date) + tokenizer.get_chat_template(tools=tools or None)
        return arguments | ({"tools": list(tools)} if tools else {})

    def key_for(self, tokenizer):
        """Returns a text that is equal if a tokenizer's template is rendered equally."""
        return repr((self.arguments, self.date if prints_date(tokenizer) else "", self.learn_thinking))


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
    """The content, or the thoughts, of one message in a rendered conversation: characters `[start, end)`.

    `base` is the offset of its first rendered character in the shared byte count, in which the untrimmed contents
    follow each other with one byte between. `turn_end` is the exclusive end of an answer's turn.
    """

    start: int
    end: int
    base: int
    is_answer: bool
    turn_end: int


@dataclasses.dataclass(frozen=True)
class Target:
    """Template text that a model writes, around thoughts or as tool calls: characters `[start, end)`. `turn_end` as in
    `Content`.
    """

    start: int
    end: int
    turn_end: int


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A rendered conversation: its text, `Content`s and `Target`s in order, and names of what the template leaves out."""

    text: str
    contents: list
    targets: list
    left_out: tuple


@dataclasses.dataclass(frozen=True)
class Part:
    """A text of a conversation: the content or the thoughts (`field`) of the message with index `turn`. A template may
    leave out `optional` ones.
    """

    turn: int
    role: str
    field: str
    text: str
    optional: bool


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

    def render(self, turns, **arguments):
        """Renders a conversation, a list of dicts; without a chat template, as one line per message."""
        if not self.tokenizer.chat_template:
            end = {"assistant": self.tokenizer.eos_token or ""}
            lines = ((turn["role"], turn["content"].strip()) for turn in turns)
            return "".join(f"{role.capitalize()}: {text}{end.get(role, '')}\n" for role, text in lines)
        if any(THOUGHT in turn for turn in turns):
            read = re.findall(r"[.'\"](\w+)", str(self.tokenizer.chat_template))  # as message.name or message["name"]
            name = next((name for name in THOUGHTS if name in read), THOUGHT)
            turns = [{name if key == THOUGHT else key: value for key, value in turn.items()} for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(turns, tokenize=False, **self.arguments, **arguments)
        except Exception as error:  # noqa: BLE001 - a template is a program and may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise RejectedConversation(f"{self} rejects this conversation: {reason}") from None


class Conversation:
    """A document rendered by a tokenizer's chat template: `turns` as the template gets them, their `parts` and `text`.

    Fields of messages and tools whose absence does not change the text are in `left_out`, not in `turns`.
    """

    def __init__(self, document, tokenizer, rendering):
        extras = document.extras or ({},) * len(document.messages)
        messages = zip(document.messages, extras, strict=True)
        self.turns = [{"role": role, "content": content, **fields} for (role, content), fields in messages]
        self.parts = list(_parts(self.turns))
        self.template = Template(tokenizer, rendering.arguments_for(tokenizer, document.tools))
        self.text, self.left_out = self.template.render(self.turns), []
        for name in dict.fromkeys(name for fields in extras for name in fields):
            without = [{key: value for key, value in turn.items() if key != name} for turn in self.turns]
            if _is_rendered_as(self.text, self.template, without):
                self.turns, self.left_out = without, [*self.left_out, name]
        if document.tools:
            without = Template(tokenizer, rendering.arguments_for(tokenizer))
            if _is_rendered_as(self.text, without, self.turns):
                self.template, self.left_out = without, [*self.left_out, "tools"]
        self.stem = "kdlib"
        while self.stem in self.text or self.stem in json.dumps(self.turns):
            self.stem += "x"
        self.placeholders = {i: f"{self.stem}{i}z" for i, part in enumerate(self.parts) if self._is_text(part)}

    def _is_text(self, part):
        return part.field in self.turns[part.turn] and bool(part.text.strip())

    def is_answer(self, index):
        return self.parts[index].role == "assistant" and self.parts[index].field == "content"

    def render(self, placeholders):
        """Renders the conversation with `placeholders` instead of parts. Raises `RejectedConversation` unless each occurs
        once, or never if its part is optional.
        """
        turns = [dict(turn) for turn in self.turns]
        for index, placeholder in placeholders.items():
            turns[self.parts[index].turn][self.parts[index].field] = placeholder
        rendered = self.template.render(turns)
        for index, placeholder in placeholders.items():
            if rendered.count(placeholder) != 1 and not (self.parts[index].optional and placeholder not in rendered):
                raise self.changed(index)
        return rendered

    def render_plain(self, turn, stop):
        """Renders the first `stop` messages, with a placeholder as the only text of message `turn`. Returns the texts
        before and after it.
        """
        placeholder = f"{self.stem}z"
        plain = {"role": self.turns[turn]["role"], "content": placeholder}
        around = self.template.render([*self.turns[:turn], plain, *self.turns[turn + 1 : stop]]).split(placeholder)
        if len(around) != 2:
            raise self.changed(next(i for i, part in enumerate(self.parts) if part.turn == turn))
        return around

    def changed(self, index):
        role = self.parts[index].role
        article = "an" if role == "assistant" else "a"
        return RejectedConversation(f"{self.template} drops or changes {article} {role} message")


def locate_contents(document, tokenizer, rendering=Rendering()):
    """Renders a conversation with its tokenizer's chat template. Returns `Rendered`.

    The first `document.prompt_length` messages hold nothing to learn. Blank contents are skipped, and so are contents
    that the template moves behind a later answer. Raises `RejectedConversation` if the template rejects the conversation,
    or drops or changes a content that is not optional.
    """
    conversation = Conversation(document, tokenizer, rendering)
    text, parts = conversation.text, conversation.parts
    ranges = _locate_all(conversation)
    if ranges is None:
        ranges = {index: _locate(conversation, index) for index in conversation.placeholders}
        ranges = {index: found for index, found in ranges.items() if found}
    left_out = [*conversation.left_out, *_absent(conversation, ranges)]
    base, contents = 1, []
    ending = _ending(conversation, ranges)
    ranges = _in_order(conversation, ranges)
    for index, part in enumerate(parts):
        if index in ranges:
            start, end = ranges[index]
            first = base + len(part.text[: _num_trimmed(part.text, text[start:end])].encode())
            is_learned = part.role == "assistant" and part.turn >= document.prompt_length
            tail = _common_length(ending, text[end : end + len(ending)]) if is_learned else 0
            is_learned = is_learned and (part.field == "content" or rendering.learn_thinking)
            contents.append(Content(start, end, first, is_learned, end + tail))
        base += len(part.text.encode()) + 1
    targets = []
    for turn, message in enumerate(conversation.turns):
        if message["role"] == "assistant" and turn >= document.prompt_length:
            found, is_complete = _targets(conversation, turn, ranges, ending, rendering.learn_thinking)
            targets += found
            left_out += [] if is_complete else ["tool_calls as training targets"]
    return Rendered(text, contents, targets, tuple(dict.fromkeys(left_out)))


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


def _parts(turns):
    """Yields the `Part`s of a conversation, in the order in which a model writes them."""
    for index, turn in enumerate(turns):
        if THOUGHT in turn:
            yield Part(index, turn["role"], THOUGHT, turn[THOUGHT], True)
        is_optional = turn["role"] == "tool" or "tool_calls" in turn
        yield Part(index, turn["role"], "content", turn["content"], is_optional)


def _is_rendered_as(text, template, turns):
    try:
        return template.render(turns) == text
    except RejectedConversation:
        return False


def _absent(conversation, ranges):
    """Yields names of optional contents that the template leaves out. Thoughts of earlier turns are not counted."""
    for index, placeholder in conversation.placeholders.items():
        part = conversation.parts[index]
        is_missing = index not in ranges and part.field == "content"
        if is_missing and conversation.render({index: placeholder}) == conversation.text:
            yield "results of tools" if part.role == "tool" else "the content of messages with tool_calls"


def _locate_all(conversation):
    """Locates all parts with one rendering, by depth-first search over the ways in which each may be trimmed. Returns
    `{index: (start, end)}`, or None if the template text depends on the parts.
    """
    text, placeholders = conversation.text, conversation.placeholders
    rendered = conversation.render(placeholders)
    present = [index for index in placeholders if placeholders[index] in rendered]
    order = sorted(present, key=lambda index: rendered.index(placeholders[index]))
    separators = re.split("|".join(placeholders[index] for index in order), rendered) if order else [rendered]
    stack = [(len(separators[0]), ())] if text.startswith(separators[0]) else []
    while stack:
        cursor, ranges = stack.pop()
        if len(ranges) == len(order):
            if cursor == len(text):
                return dict(zip(order, ranges, strict=True))
            continue
        separator = separators[len(ranges) + 1]
        forms = _trimmed_forms(conversation.parts[order[len(ranges)]].text)
        for form in reversed(forms):  # the longest is popped first
            if text.startswith(form + separator, cursor):
                end = cursor + len(form)
                stack.append((end + len(separator), (*ranges, (cursor, end))))
    return None


def _locate(conversation, index):
    """Locates one part, `(start, end)`, from a rendering with the real other parts. Returns None for an optional part
    that is left out, and for the result of a tool that the template changes, for example to JSON.

    The text around the placeholder must surround the part too. If the part changes the template text on one side, the
    other side decides. The template may keep only the end of the part, like templates that drop earlier reasoning.
    """
    part, text, placeholder = conversation.parts[index], conversation.text, conversation.placeholders[index]
    content, rendered = part.text, conversation.render({index: placeholder})
    if rendered == text:
        return None
    before, _, after = rendered.partition(placeholder)
    start, end = len(before), len(text) - len(after)
    fits_before, fits_after = text.startswith(before), text.endswith(after)
    if fits_before and fits_after and text[start:end].strip():
        num_trimmed = _num_trimmed(content, text[start:end])
        if num_trimmed >= 0 and content.startswith(text[start:end], num_trimmed):
            return start, end
    for form in _trimmed_forms(content) if placeholder in rendered else ():
        if fits_after and text.endswith(form, 0, max(0, end)):
            return end - len(form), end
        if fits_before and text.startswith(form, start):
            return start, start + len(form)
    if part.role == "tool":
        return None
    raise conversation.changed(index)


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


def _in_order(conversation, ranges):
    """Returns the ranges in order, without parts that were moved. Raises `RejectedConversation` for moved answers."""
    kept, cursor = {}, 0
    for index, (start, end) in sorted(ranges.items()):
        later_answers = [ranges[i][0] for i in ranges if i > index and conversation.is_answer(i)]
        if start >= cursor and end <= min(later_answers, default=len(conversation.text)):
            kept[index], cursor = (start, end), end
        elif conversation.parts[index].role == "assistant":
            raise conversation.changed(index)
    return kept


def _ending(conversation, ranges):
    """Returns the template text after the last answer of a conversation that ends with it."""
    calls = [turn for turn, message in enumerate(conversation.turns) if "tool_calls" in message]
    answers = {
        conversation.parts[index].turn: end for index, (_, end) in ranges.items() if conversation.is_answer(index)
    }
    last = max([*calls, *answers], default=None)
    if last is None:
        return ""
    if last == len(conversation.turns) - 1 and last not in calls:
        return conversation.text[answers[last] :]
    return conversation.render_plain(last, last + 1)[1]


def _targets(conversation, turn, ranges, ending, learn_thinking):
    """Returns `(Target`s of one assistant message, whether its tool calls are among them if it has any)`."""
    located = {part.field: ranges[i] for i, part in enumerate(conversation.parts) if part.turn == turn and i in ranges}
    thought, content = located.get(THOUGHT), located.get("content")
    has_calls = "tool_calls" in conversation.turns[turn]
    if not (has_calls or (thought and learn_thinking)):
        return [], True
    start, end = _turn_edges(conversation, turn)
    targets = []
    if thought and learn_thinking:
        first = thought[0] if start is None else min(start, thought[0])
        last = content[0] if content else thought[1]
        targets.append(Target(first, last, last))
    if has_calls:
        first = content[1] if content else thought[1] if thought else start
        if end is None or first is None or first >= end:
            return targets, False
        tail = _common_length(ending, conversation.text[end : end + len(ending)])
        targets.append(Target(first, end, end + tail))
    return targets, True


def _turn_edges(conversation, turn):
    """Returns `(start, end)` of what a model writes as an assistant message, without the end of the turn; None for an
    edge that is not verified.

    A rendering with a plain content instead must surround it: of the whole conversation, or else of its beginning up to
    this message. If it begins otherwise, the text up to here with the generation prompt decides.
    """
    text, turns, template = conversation.text, conversation.turns, conversation.template
    for stop in dict.fromkeys([len(turns), turn + 1]):
        try:
            before, after = conversation.render_plain(turn, stop)
            whole = text if stop == len(turns) else template.render(turns[:stop])
            prompt = before if whole.startswith(before) else template.render(turns[:turn], add_generation_prompt=True)
        except RejectedConversation:
            continue
        end = len(whole) - len(after)
        if whole.endswith(after) and text.startswith(whole[:end]):
            return (len(prompt) if text.startswith(prompt) and len(prompt) < end else None), end
    return None, None


def _common_length(first, second):
    return sum(itertools.takewhile(bool, map(operator.eq, first, second)))
