"""The training text as each model reads it, with its targets marked."""

import dataclasses
import html
import itertools

import numpy as np

from kdlib.data import chat, corpus
from kdlib.data.dataset import build_windows
from kdlib.data.windowing import IGNORE
from kdlib.models import loading, teacher_cache

MAX_DOCUMENTS = 50
"""Documents that are tokenized to find some with a window."""
LEARNED, PROMPT, RESET = "\033[32m", "\033[2m", "\033[0m"
MARKS = "⟦", "⟧"
"""Around targets where there are no colours."""
STYLES = {True: "background:#009E7340", False: "opacity:.6"}


@dataclasses.dataclass(frozen=True)
class Example:
    """The first window of one document. `student` and `teacher` are lists of `(text, is a training target)`."""

    source: str
    student: list
    teacher: list

    @property
    def sides(self):
        return {"student": self.student, "teacher": self.teacher}


class Preview(list):
    """`Example`s that a notebook shows with their targets coloured. `notes` are lines on what is not used."""

    def __init__(self, examples, notes=()):
        super().__init__(examples)
        self.notes = list(notes)

    def __repr__(self):
        return self.text()

    def text(self, colours=False):
        """Returns the examples for a terminal. Targets are green in `colours`, and within `MARKS` otherwise."""
        lines = [*self.notes, ""] if self.notes else []
        for example in self:
            lines.append(f"{example.source or 'text'}:")
            for side, runs in example.sides.items():
                parts = (
                    _coloured(*run) if colours else MARKS[0] + run[0] + MARKS[1] if run[1] else run[0] for run in runs
                )
                lines += [f"--- {side}", "".join(parts), ""]
        return "\n".join(lines)

    def _repr_html_(self):
        parts = [f"<p>{html.escape(note)}</p>" for note in self.notes]
        for example in self:
            parts.append(f"<p><b>{html.escape(example.source or 'text')}</b></p>")
            for side, runs in example.sides.items():
                spans = (f'<span style="{STYLES[learned]}">{html.escape(text)}</span>' for text, learned in runs)
                parts.append(f'<div>{side}<pre style="white-space:pre-wrap">{"".join(spans)}</pre></div>')
        return "".join(parts)


def preview(config, count=3):
    """Returns a `Preview` of the first `count` documents that have a window. Loads the tokenizers, but no models."""
    documents, readers = corpus.documents_of(config), load_readers(config)
    report, documents = documents.report, documents[:MAX_DOCUMENTS]
    first_windows, windows = {}, build_windows(documents, *readers, config.max_length, chat.Rendering.of(config))
    for number, parts in windows.left_out.items():
        for part in parts:
            report.leave_out(part, documents[number].source)
    for window in windows:
        first_windows.setdefault(window.document, window)
    examples = (
        Example(
            documents[number].source,
            *(_runs(reader, window, side) for reader, side in zip(readers, ("student", "teacher"), strict=True)),
        )
        for number, window in itertools.islice(first_windows.items(), count)
    )
    return Preview(examples, report.unused_lines())


def load_readers(config):
    """Returns the `tokenize.TextTokenizer`s of student and teacher, also of a teacher cache."""
    student = loading.load_reader(config.student, "student")
    if config.cached:
        return student, teacher_cache.CachedTeacher(teacher_cache.folders_of(config.teacher_cache)).reader
    return student, loading.load_reader(config.teacher, "teacher")


def _runs(reader, window, side):
    """Returns `[(text, is a target)]` of one side. Incomplete characters become escaped bytes."""
    ids, labels = getattr(window, f"{side}_ids"), getattr(window, f"{side}_labels")
    is_target = np.append(False, labels[:-1] != IGNORE)
    tokens, names = reader.vocabulary.tokens, reader.tokenizer.convert_ids_to_tokens(ids.tolist())
    pieces = [tokens[i] if tokens[i] is not None else name.encode() for i, name in zip(ids, names, strict=True)]
    groups = itertools.groupby(zip(pieces, is_target, strict=True), key=lambda pair: bool(pair[1]))
    return [(b"".join(piece for piece, _ in group).decode("utf-8", "backslashreplace"), key) for key, group in groups]


def _coloured(text, learned):
    return f"{LEARNED if learned else PROMPT}{text}{RESET}"
