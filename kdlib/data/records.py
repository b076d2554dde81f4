"""Records of a dataset in their usual forms, and the documents that they hold.

The names of fields are those of trl's dataset formats, of ShareGPT, of Alpaca and of common question-answer sets.
"""

import collections
import dataclasses
import hashlib
import json
import typing

ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "chatgpt": "assistant", "model": "assistant", "system": "system",
}  # fmt: skip
"""Roles of ShareGPT conversations."""
SYSTEM = ("system", "system_prompt")
PAIRS = {
    ("instruction", "input", "output"): "Alpaca instructions",
    ("instruction", "output"): "instructions with an output",
    ("instruction", "context", "response"): "Dolly instructions",
    ("instruction", "response"): "instructions with a response",
    ("question", "answer"): "questions and answers",
    ("question", "response"): "questions and responses",
    ("query", "response"): "queries and responses",
    ("query", "answer"): "queries and answers",
    ("problem", "solution"): "problems and solutions",
    ("prompt", "response"): "prompts and responses",
    ("input", "output"): "inputs and outputs",
    ("inputs", "targets"): "inputs and targets",
}
"""Fields of one question and its answer: the last one is the answer, the others form the question."""
READ_FIELDS = {"role", "content", "from", "value"}
NAME_FIELDS = ("name", "tool_call_id")
THOUGHT_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Message fields that are read: of THOUGHT_FIELDS the first one with text, and `tool_calls`. Others are counted as left
out, unless they are null or empty."""
EMPTY = (None, "", [], {})
EXAMPLES = 3
"""Records that are named for each reason why records, or parts of them, are not used."""
MAX_REASONS = 5
"""Reasons that are printed; `Report.to_dict` has all."""


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a conversation: then `messages` is a tuple of (role, content) and `text` is empty.

    `extras` has one dict per message, or is empty: `reasoning_content`, `tool_calls`, `name` and `tool_call_id`, as chat
    templates read them. `tools` are JSON schemas. `prompt_length`: the characters of the text, or the messages, that come
    before the training targets. Neither `source`, which names file and record for error messages, nor `left_out`, which
    names the parts of the record that are not read, belongs to a document's identity.
    """

    text: str
    messages: tuple = ()
    source: str = dataclasses.field(default="", compare=False, repr=False)
    prompt_length: int = 0
    extras: tuple = ()
    tools: tuple = ()
    left_out: tuple = dataclasses.field(default=(), compare=False, repr=False)

    @property
    def content(self):
        """The text, or the conversation as JSON."""
        has_more = self.extras or self.tools
        return self.text or json.dumps([self.messages, self.extras, self.tools] if has_more else self.messages)

    @property
    def key(self):
        """Hash of the content, as a number in [0, 1)."""
        return int.from_bytes(hashlib.sha256(self.content.encode()).digest()[:6], "big") / 2**48


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of record fields (config keys `text_field`, `prompt_field` and `completion_field`)."""

    text: str = "text"
    prompt: str = ""
    completion: str = ""


def merge_system(document):
    """Returns the document with its system message in front of the first user message, or None if it has no such two.

    Templates without a system role, as Gemma's, describe this as the way to give one.
    """
    if [role for role, _ in document.messages[:2]] != ["system", "user"]:
        return None
    (_, system), (_, user), *rest = document.messages
    messages = (("user", f"{system}\n\n{user}" if system.strip() else user), *rest)
    changes = {"messages": messages, "prompt_length": max(0, document.prompt_length - 1)}
    return dataclasses.replace(document, **changes, extras=document.extras[1:])


class Message(typing.NamedTuple):
    """A message as it was read. `unread` names its fields that hold something and are not read."""

    role: str
    content: str
    extras: dict = {}  # noqa: RUF012 - never changed
    unread: tuple = ()


class UnusableRecord(ValueError):
    """A record that holds no training text. The message is the reason; it is the same for similar records."""


class Report:
    """Counts of what was read: records by form, unusable records by reason, and records of which something is left out
    by what it is, with their first sources.

    `choice` is a sentence about the documents that are used, `cut` one about targets that are not; both may be empty.
    """

    def __init__(self):
        self.forms, self.num_skipped, self.left_out = (collections.Counter() for _ in range(3))
        self.examples = {}
        self.num_rejected, self.choice, self.cut = 0, "", ""

    @property
    def num_records(self):
        return self.forms.total() + self.num_skipped.total() - self.num_rejected

    def add(self, other):
        """Adds the counts of another report."""
        self.forms += other.forms
        self.num_rejected += other.num_rejected
        self.num_skipped += other.num_skipped
        self.left_out += other.left_out
        for reason, sources in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + sources)[:EXAMPLES]

    def skip(self, reason, source):
        self._count(self.num_skipped, reason, source)

    def leave_out(self, part, source):
        """Counts a record that is used without a part of it."""
        self._count(self.left_out, part, source)

    def _count(self, counter, reason, source):
        counter[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(source)

    def reject(self, reason, source):
        """Skips a record that was counted by its form already."""
        self.num_rejected += 1
        self.skip(reason, source)

    def check(self, source, max_bad_records):
        """Raises ValueError if there are no documents, or if the share of unusable records exceeds `max_bad_records`."""
        num_bad = self.num_skipped.total()
        if num_bad and num_bad > max_bad_records * self.num_records:
            share = f"{num_bad:,} of {self.num_records:,} records of {source} cannot be used"
            raise ValueError(
                f"{share}: {'; '.join(self._reasons())}. At most {max_bad_records:.0%} may be skipped (max_bad_records)"
            )
        if self.forms.total() == self.num_rejected:
            raise ValueError(f"{source} contains no text")

    def lines(self):
        """Returns what was read and what is not used as lines of text."""
        return [*self.used_lines(), *self.unused_lines()]

    def used_lines(self):
        read = [f"Read {count:,} {form}." for form, count in self.forms.most_common()]
        return [*read, *filter(None, [self.choice])]

    def unused_lines(self):
        num_bad = self.num_skipped.total()
        skipped = f"Skipped {num_bad:,} {_noun(num_bad)}: {'; '.join(self._reasons())}." if num_bad else ""
        return [line for line in (skipped, self.left_out_line(), self.cut) if line]

    def left_out_line(self):
        """Returns a line on the parts of records that are not used, or an empty string."""
        parts = self.left_out.most_common()
        texts = [
            f"{part} in {count:,} {_noun(count)} (first: {self.examples[part][0]})"
            for part, count in parts[:MAX_REASONS]
        ]
        texts += [f"other parts ({len(parts) - MAX_REASONS})"] if len(parts) > MAX_REASONS else []
        return f"Left out: {'; '.join(texts)}." if texts else ""

    def to_dict(self):
        skipped, left_out = (
            {reason: {"count": count, "examples": self.examples[reason]} for reason, count in counter.most_common()}
            for counter in (self.num_skipped, self.left_out)
        )
        lines = {"choice": self.choice, "cut": self.cut}
        return {"forms": dict(self.forms), "skipped": skipped, "left_out": left_out, **lines}

    def _reasons(self):
        reasons = self.num_skipped.most_common()
        for reason, count in reasons[:MAX_REASONS]:
            yield f"{count:,} {reason} (first: {self.examples[reason][0]})"
        if others := sum(count for _, count in reasons[MAX_REASONS:]):
            yield f"{others:,} for other reasons"


def _noun(count):
    return "record" if count == 1 else "records"


def to_document(row, fields, source):
    """Returns `(form, Document)` of a record, a mapping. Raises `UnusableRecord`."""
    if not isinstance(row, dict):
        raise UnusableRecord(f"not an object with fields but a {type(row).__name__}")
    form, document = _convert(row, fields)
    tools = _tools(row.get("tools")) if document.messages else ()
    left_out = (*document.left_out, *(("tools",) if row.get("tools") and not tools else ()))
    document = dataclasses.replace(document, source=source, tools=tools, left_out=left_out)
    _check_characters(document)
    return form, document


def _convert(row, fields):
    if fields.prompt or fields.completion:
        names = fields.prompt or "prompt", fields.completion or "completion"
        return f"records with {names[0]} and {names[1]}", _prompt_and_completion(row, *names)
    if fields.text != "text" and fields.text in row:
        return f"texts in {fields.text}", _text(row, fields.text)
    if row.get("messages"):
        return "conversations", _conversation(_messages(row["messages"]), row)
    for name in ("conversations", "conversation"):
        if row.get(name):
            return "ShareGPT conversations", _conversation(_messages(row[name]), row)
    if row.get("chosen"):
        return "preferences (the chosen answers)", _preference(row)
    if "prompt" in row and "completion" in row:
        return "prompts and completions", _prompt_and_completion(row, "prompt", "completion")
    names = next((names for names in PAIRS if all(name in row for name in names)), None)
    if names and (fields.text not in row or names[0] == "instruction"):
        return PAIRS[names], _question_and_answer(row, names)
    if fields.text in row:
        return "texts", _text(row, fields.text)
    if "messages" in row:
        raise UnusableRecord("whose messages are empty")
    names = ", ".join(row) or "no fields"
    form = "a known form" if fields.text == "text" else f"the field {fields.text} or a known form"
    raise UnusableRecord(
        f"without {form} (fields: {names}); name the fields with --text-field, or with --prompt-field and "
        "--completion-field"
    )


def _text(row, name):
    return Document(_string(row, name))


def _string(row, name):
    """Returns the text of a field, or raises `UnusableRecord` if it is not text or blank."""
    if name not in row:
        raise UnusableRecord(f"without the field {name}")
    if not isinstance(row[name], str):
        kind = "null" if row[name] is None else type(row[name]).__name__
        raise UnusableRecord(f"whose {name} is {kind}, not a string")
    if not row[name].strip():
        raise UnusableRecord(f"whose {name} is blank")
    return row[name]


def _question_and_answer(row, names):
    *question, answer = names
    parts = [_string(row, question[0])]
    parts += [_string(row, name) for name in question[1:] if row[name]]
    return _conversation((Message("user", "\n\n".join(parts)), Message("assistant", _string(row, answer))), row)


def _prompt_and_completion(row, prompt, completion):
    """Two strings are one text without a chat template, two lists of messages one conversation, as in trl."""
    if isinstance(row.get(prompt), list) or isinstance(row.get(completion), list):
        before = _messages(row.get(prompt))
        return _conversation((*before, *_messages(row.get(completion))), row, len(before))
    first = _string(row, prompt)
    return Document(first + _string(row, completion), prompt_length=len(first))


def _preference(row):
    if isinstance(row["chosen"], str):
        return _prompt_and_completion(row, "prompt", "chosen") if row.get("prompt") else _text(row, "chosen")
    chosen, prompt = _messages(row["chosen"]), row.get("prompt")
    if any(message.role == "user" for message in chosen) or not prompt:
        return _conversation(chosen, row)
    before = (Message("user", _string(row, "prompt")),) if isinstance(prompt, str) else _messages(prompt)
    return _conversation((*before, *chosen), row, len(before))


def _conversation(messages, row, prompt_length=0):
    system = next((row[name] for name in SYSTEM if isinstance(row.get(name), str) and row[name].strip()), "")
    if system and messages and messages[0].role != "system":
        messages, prompt_length = (Message("system", system), *messages), prompt_length + 1 if prompt_length else 0
    if not any(message.role == "assistant" for message in messages[prompt_length:]):
        raise UnusableRecord("without an answer (role assistant)")
    unread = dict.fromkeys(name for message in messages for name in message.unread)
    left_out = tuple(f"the message field {name}" for name in unread)
    extras = tuple(message.extras for message in messages) if any(message.extras for message in messages) else ()
    pairs = tuple(message[:2] for message in messages)
    return Document("", pairs, prompt_length=prompt_length, extras=extras, left_out=left_out)


def _messages(value):
    """Returns a list of messages, or its JSON, as a tuple of `Message`s."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise UnusableRecord("whose messages are a string that is not JSON") from None
    if not isinstance(value, list):
        raise UnusableRecord(f"whose messages are {_kind(value)}, not a list")
    return tuple(_message(message) for message in value)


def _message(message):
    if not isinstance(message, dict):
        raise UnusableRecord(f"with a message that is {_kind(message)}, not an object")
    role, content = message.get("role"), message.get("content")
    if "from" in message:
        role, content = ROLES.get(str(message["from"])), message.get("value")
        if role is None:
            raise UnusableRecord(f"with a message from {message['from']!r}")
    extras, unread = _extras(message)
    if content is None and "tool_calls" in extras:
        content = ""
    if isinstance(content, list):
        content = _join_parts(content)
    if not isinstance(role, str):
        raise UnusableRecord("with a message without a role")
    if not isinstance(content, str):
        raise UnusableRecord(f"with a message whose content is {_kind(content)}, not a string")
    if role == "assistant" and not content.strip() and "tool_calls" not in extras:
        raise UnusableRecord("with a blank answer")
    return Message(role, content, extras, unread)


def _extras(message):
    """Returns `(fields beside role and content, as chat templates read them; names of fields that are not read)`."""
    texts = {name: value for name, value in message.items() if isinstance(value, str) and value.strip()}
    extras = {name: texts[name] for name in NAME_FIELDS if name in texts}
    thought = next((name for name in THOUGHT_FIELDS if name in texts), None)
    if thought:
        extras[THOUGHT_FIELDS[0]] = texts[thought]
    if message.get("tool_calls"):
        extras["tool_calls"] = _tool_calls(message["tool_calls"])
    is_read = {*READ_FIELDS, *extras} - {THOUGHT_FIELDS[0]} | {thought}
    return extras, tuple(name for name, value in message.items() if name not in is_read and value not in EMPTY)


def _tool_calls(value):
    """Returns tool calls, or their JSON, in the form that chat templates read: with a function and its arguments."""
    value, calls = _parse(value), []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UnusableRecord("with a tool call without a name")
        arguments = function.get("arguments") or {}
        parsed = _parse(arguments)
        arguments = _without_nulls(arguments) if isinstance(arguments, dict) else parsed
        form = {"type": "function", **call} if "function" in call else {"id": call.get("id"), "type": "function"}
        form["function"] = {"name": function["name"], "arguments": arguments}
        calls.append({name: value for name, value in form.items() if value is not None})
    return calls


def _tools(value):
    """Returns JSON schemas of tools, or of their JSON, as a tuple; empty if they are anything else."""
    value = _parse(value)
    is_valid = isinstance(value, list) and all(isinstance(tool, dict) for tool in value)
    return tuple(_without_nulls(value)) if is_valid else ()


def _parse(value):
    """Parses a string of JSON. Returns other values unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _without_nulls(value):
    """Returns a JSON value without the null fields of its objects, which tables add."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _join_parts(parts):
    """Joins contents of type `text`. Raises `UnusableRecord` for images and other types."""
    texts = []
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UnusableRecord(f"with a content of type {kind}")
        texts.append(part["text"])
    return "".join(texts)


def _kind(value):
    return "null" if value is None else f"a {type(value).__name__}"


def _check_characters(document):
    """Raises `UnusableRecord` for a lone surrogate, which tokenizers reject."""
    try:
        extras = json.dumps([document.extras, document.tools], ensure_ascii=False, default=str)
        "".join((document.text, *(content for _, content in document.messages), extras)).encode()
    except UnicodeEncodeError as error:
        raise UnusableRecord(f"with the lone surrogate \\u{ord(error.object[error.start]):04x}") from None
