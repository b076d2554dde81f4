"""Windows of a dataset, tokenized once and cached as memory-mapped Arrow files in the cache folder of `datasets`.

Files hold only what cannot be derived, six to eight bytes per byte of text. The folder name is a hash of everything
that determines the content. A cache is used only if all its files are complete.
"""

import collections.abc
import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdlib import environment
from kdlib.data import chat, tokenize, windowing
from kdlib.data.records import Document, merge_system
from kdlib.files import read_json, write_json

FORMAT = 5
"""Increment when `tokenize`, `chat`, `windowing`, `boundaries` or `vocab` produce different windows for the same text.
"""
PARALLEL_CHARS, PROGRESS_CHARS, BATCH_CHARS = 1_500_000, 3_000_000, 250_000
"""Characters per process, characters from which a progress bar is shown, and characters per batch of a file."""

LISTS = ("student_ids", "teacher_ids", "student_rows", "teacher_rows", "student_span_ends", "teacher_span_ends")
MARKS = ("student_learned", "teacher_learned", "student_scored", "teacher_scored")
NUMBERS = ("num_bytes", "num_positions", "document")
COUNTS = ("student_faithful", "student_text", "teacher_faithful", "teacher_text", "cut_targets", "document_tokens")
"""Numbers of a document, stored with its first window: faithful text tokens and all text tokens by side, targets of a
conversation beyond its window, and the student's tokens with their prefix.
"""
SCHEMA = pa.schema(
    [(name, pa.list_(pa.int32())) for name in LISTS]
    + [(name, pa.list_(pa.bool_())) for name in MARKS]
    + [(name, pa.int64()) for name in NUMBERS + COUNTS]
    + [("problem", pa.string()), ("left_out", pa.string())]
)
DOCUMENT = pa.schema(
    [(name, pa.large_string()) for name in ("text", "messages", "source", "extras", "tools")]
    + [(name, pa.int64()) for name in ("prompt_length", "number")]
)
"""Schema of the documents file, which the tokenizing processes read."""


class WindowDataset(collections.abc.Sequence):
    """Sequence of `windowing.Window`s backed by an Arrow table; a window is built on access.

    `problems` says why documents have no window, by index, and `problem_lengths` counts their tokens. Their rows in the
    table are no windows. `left_out` names parts of documents that a chat template leaves out, by index.
    """

    def __init__(self, table):
        self.left_out = _left_out(table)
        self.problems, self.problem_lengths, table = _split_problems(table)
        self._batches = [batch for batch in table.to_batches() if batch.num_rows]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        self._columns = {}

    @classmethod
    def from_list(cls, windows):
        """Converts a sequence of windows."""
        return windows if isinstance(windows, cls) else cls(pa.table(table_of(windows)))

    def __len__(self):
        return int(self._starts[-1])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        batch = int(np.searchsorted(self._starts, index, "right")) - 1
        row = self._batches[batch].slice(index - self._starts[batch], 1)
        arrays = {name: _values(row.column(name)).astype(np.int64) for name in LISTS}
        arrays |= {name: _values(row.column(name)) for name in MARKS}
        for side in ("student", "teacher"):
            arrays[f"{side}_labels"] = windowing.labels_of(arrays[f"{side}_ids"], arrays.pop(f"{side}_learned"))
        numbers = {name: row.column(name)[0].as_py() for name in NUMBERS}
        return windowing.Window(**arrays, **numbers, window_id=index)

    def column(self, name):
        """Returns one number per window, int64: the column's value, or the length of its lists."""
        if name not in self._columns:
            columns = (batch.column(name) for batch in self._batches)
            arrays = [_numbers(column.value_lengths() if name in LISTS else column) for column in columns]
            self._columns[name] = np.concatenate([np.zeros(0, np.int64), *arrays])
        return self._columns[name]

    def total(self, name):
        """Returns the sum of `column`."""
        return int(self.column(name).sum())

    def labels(self, side):
        """Yields the labels of one side (`student` or `teacher`), one array per batch of windows."""
        for ids, learned in zip(self._flat(f"{side}_ids"), self._flat(f"{side}_learned"), strict=True):
            yield np.append(ids[1:], 0)[learned]

    def digest(self):
        """Returns a hash of the token ids of both sides, of the targets, and of the window boundaries."""
        digest = hashlib.sha256()
        for name in ("student_ids", "student_learned", "teacher_ids"):
            for batch in self._batches:
                digest.update(_numbers(batch.column(name).value_lengths()).tobytes())
            for array in self._flat(name):
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def _flat(self, name):
        return (_values(batch.column(name)) for batch in self._batches)


def _split_problems(table):
    """Returns `({document: problem}, their lengths in tokens, table without these rows)`; copies nothing."""
    if "problem" not in table.column_names or table["problem"].null_count == len(table):
        return {}, np.zeros(0, np.int64), table
    rows = np.flatnonzero(table["problem"].is_valid().to_numpy())
    problems = {table["document"][int(row)].as_py(): table["problem"][int(row)].as_py() for row in rows}
    edges = itertools.pairwise([-1, *rows.tolist(), len(table)])
    lengths = _numbers(table["document_tokens"])[rows]
    return problems, lengths, pa.concat_tables([table.slice(start + 1, stop - start - 1) for start, stop in edges])


def _left_out(table):
    """Returns `{document: [part, ...]}` of the documents of which a chat template leaves something out."""
    if "left_out" not in table.column_names or table["left_out"].null_count == len(table):
        return {}
    rows = np.flatnonzero(table["left_out"].is_valid().to_numpy()).tolist()
    return {table["document"][row].as_py(): json.loads(table["left_out"][row].as_py()) for row in rows}


def window_lengths(windows, side="student"):
    """Returns the number of tokens of each window on one side, int64."""
    if isinstance(windows, WindowDataset):
        return windows.column(f"{side}_ids")
    return np.array([len(getattr(window, f"{side}_ids")) for window in windows], dtype=np.int64)


def longest_windows(windows, count):
    """Returns the `count` windows with most student tokens, longest last."""
    return [windows[i] for i in np.argsort(window_lengths(windows), kind="stable")[-count:]]


def sample_windows(windows, num_tokens):
    """Yields a fixed random sample of windows with about `num_tokens` student tokens in total."""
    total, lengths = 0, window_lengths(windows)
    for index in np.random.default_rng(0).permutation(len(windows)):
        if total >= num_tokens:
            return
        yield windows[index]
        total += lengths[index]


def table_of(windows, counts=(), problems=None, left_out=None):
    """Converts windows to `{column: Arrow array}`. `counts` `[len(windows)][len(COUNTS)]`: as in COUNTS (default: zeros).
    `problems`: why a row is no window, or None. `left_out`: parts that a template leaves out of a document, as JSON.
    """
    columns = {name: _lists([getattr(w, name) for w in windows], np.int32) for name in LISTS}
    for side in ("student", "teacher"):
        labels = [getattr(w, f"{side}_labels") for w in windows]
        columns[f"{side}_learned"] = _lists([row != windowing.IGNORE for row in labels], bool)
        columns[f"{side}_scored"] = _lists([getattr(w, f"{side}_scored") for w in windows], bool)
    for name in NUMBERS:
        columns[name] = pa.array([getattr(w, name) for w in windows], pa.int64())
    counts = np.array(counts, np.int64).reshape(-1, len(COUNTS))
    counts = counts if len(counts) else np.zeros((len(windows), len(COUNTS)), np.int64)
    columns |= {name: pa.array(counts[:, i]) for i, name in enumerate(COUNTS)}
    for name, texts in (("problem", problems), ("left_out", left_out)):
        columns[name] = pa.array(texts or [None] * len(windows), pa.string())
    return {name: columns[name] for name in SCHEMA.names}


def build_windows(documents, student, teacher, max_length, rendering=chat.Rendering()):  # noqa: B008 - frozen
    """Tokenizes `documents` with two `tokenize.TextTokenizer`s and cuts them into a `WindowDataset`, in order.
    `rendering`: settings of both chat templates.

    Uses the cache if it has the windows. If the cache folder is not writable, they are built in memory, with a warning.
    """
    import datasets

    settings = {"student": student, "teacher": teacher, "max_length": max_length, "rendering": rendering}
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "kdlib" / f"windows-{_key(documents, **settings)}"
    try:
        table = _load(folder)
        return WindowDataset(_build(folder, documents, settings) if table is None else table)
    except OSError as error:
        warnings.warn(
            f"cannot cache the tokenized text in {folder.parent} ({error.strerror or error}); it is kept in memory and "
            "will be tokenized again at the next start. Set HF_DATASETS_CACHE to a writable folder with free space",
            stacklevel=2,
        )
    batches = (_document_columns(batch) for batch in _batched(documents))
    tables = (_tokenize_batch(batch, **settings) for batch in batches)
    return WindowDataset(pa.concat_tables([SCHEMA.empty_table(), *tables]))


def _key(documents, student, teacher, max_length, rendering):
    """Returns a hash of everything that determines the windows."""
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
    digest = hashlib.sha256(repr((FORMAT, versions, max_length)).encode())
    for reader in (student, teacher):
        tokenizer = reader.tokenizer
        special = sorted(map(repr, tokenizer.special_tokens_map.items())), tokenizer.all_special_ids
        template = tokenizer.chat_template, rendering.key_for(tokenizer)
        settings = (*template, *special), reader.prefix, reader.eos, reader.context
        digest.update(json.dumps([tokenizer.backend_tokenizer.to_str(), *map(repr, settings)]).encode())
    for document in documents:
        content = document.content.encode()
        digest.update(f"{bool(document.messages)} {document.prompt_length} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def _load(folder):
    """Returns the cached table of a folder, or None if it is missing or incomplete."""
    try:
        files = read_json(folder / "whole.json")
        if any((folder / name).stat().st_size != size for name, size in files.items()):
            return None
        maps = [pa.memory_map(str(folder / name)) for name in files]
        tables = [pa.ipc.open_stream(file).read_all().replace_schema_metadata(None) for file in maps]
        return pa.concat_tables([SCHEMA.empty_table(), *tables])
    except (FileNotFoundError, ValueError):  # JSON and Arrow errors are ValueErrors
        return None


def _build(folder, documents, settings):
    """Builds the table in its folder and returns it. One process builds at a time; the others wait."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (table := _load(folder)) is not None:
            return table
        try:
            _clear(folder)
            _write_documents(folder / "documents.arrow", documents)
            rows = datasets.Dataset.from_file(str(folder / "documents.arrow"))
            with _map_environment(_num_chars(documents), len(documents)) as num_processes:
                rows.map(
                    _tokenize_batch, batched=True, batch_size=_batch_size(documents), fn_kwargs=settings,
                    remove_columns=rows.column_names, features=datasets.Features.from_arrow_schema(SCHEMA),
                    cache_file_name=str(folder / "windows.arrow"), num_proc=num_processes, new_fingerprint=folder.name,
                    desc="Tokenizing the dataset (cached)",
                )  # fmt: skip
            files = sorted(folder.glob("windows*.arrow"))
            for path in files:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            (folder / "documents.arrow").unlink()
            write_json(folder / "whole.json", {path.name: path.stat().st_size for path in files})
        except BaseException:
            _clear(folder)
            raise
    return _load(folder)


@contextlib.contextmanager
def _map_environment(num_chars, num_documents):
    """Yields the number of processes for `datasets.map` (None: this one), with warnings and progress bars configured."""
    import datasets

    num_processes = min(environment.num_processors(), num_documents, num_chars // PARALLEL_CHARS)
    show_progress = num_chars >= PROGRESS_CHARS and environment.is_main_process()
    were_disabled = datasets.are_progress_bars_disabled()
    with warnings.catch_warnings(), environment.single_tokenizer_thread():
        # Python 3.12 warns about fork in a process with threads; these children use nothing that a thread may lock
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        if not show_progress:
            datasets.disable_progress_bars()
        try:
            yield num_processes if num_processes > 1 else None
        finally:
            if not were_disabled:
                datasets.enable_progress_bars()


def _tokenize_batch(batch, student, teacher, max_length, rendering):
    windows, counts, problems, left_out = [], [], [], []
    for row in zip(*(batch[name] for name in DOCUMENT.names), strict=True):
        text, messages, source, extras, tools, prompt_length, number = row
        messages, extras, tools = tuple(map(tuple, json.loads(messages))), json.loads(extras), json.loads(tools)
        document, parts = Document(text, messages, source, prompt_length, tuple(extras), tuple(tools)), []
        problem = f"without a training target in its first {max_length} tokens"
        cut, first_counts = [], [0] * len(COUNTS)
        try:
            document, sides = _encode_both(document, (student, teacher), rendering)
        except chat.RejectedConversation as error:
            problem = f"rejected: {error.reason}"
        else:
            cut = windowing.cut_windows(document, *sides, student, teacher, max_length, number)
            cut = [window for window in cut if (window.student_labels != windowing.IGNORE).any()]
            masks = [mask for side in sides for mask in (side.faithful & side.is_text, side.is_text)]
            kept = sum(int((window.student_labels != windowing.IGNORE).sum()) for window in cut)
            num_tokens = len(student.prefix_of(document)) + len(sides[0])
            parts = [f"{part} (not in the {name}'s chat template)" for name, part in _left_out_of(sides)]
            num_cut = int(sides[0].learn.sum()) - kept if document.messages else 0
            first_counts = [*(int(mask.sum()) for mask in masks), num_cut, num_tokens]
        windows += cut or [windowing.empty(number)]
        counts += [first_counts] + [[0] * len(COUNTS)] * (len(cut) - 1)
        problems += [None] * len(cut) or [problem]
        left_out += [json.dumps(parts) if parts else None] + [None] * (len(cut) - 1)
    return pa.table(table_of(windows, counts, problems, left_out), SCHEMA)


def _left_out_of(sides):
    """Returns `(side, part)` of what each side's template leaves out."""
    return [(name, part) for name, side in zip(("student", "teacher"), sides, strict=True) for part in side.left_out]


def _encode_both(document, readers, rendering):
    """Returns `(document, its two Encodeds)`. If a template rejects the system message, both sides read it merged."""
    try:
        return document, [tokenize.encode(document, reader, rendering) for reader in readers]
    except chat.RejectedConversation:
        merged = merge_system(document)
        if merged is None:
            raise
        return merged, [tokenize.encode(merged, reader, rendering) for reader in readers]


def _batched(documents):
    """Yields lists of `(number, document)`."""
    size = _batch_size(documents)
    for start in range(0, len(documents), size):
        yield list(enumerate(documents[start : start + size], start))


def _batch_size(documents):
    return min(1000, max(1, BATCH_CHARS * len(documents) // max(1, _num_chars(documents))))


def _num_chars(documents):
    return sum(len(d.text) + sum(len(content) for _, content in d.messages) for d in documents)


def _document_columns(batch):
    return {
        "text": [document.text for _, document in batch],
        "messages": [json.dumps(document.messages) for _, document in batch],
        "source": [document.source for _, document in batch],
        "extras": [json.dumps(document.extras) for _, document in batch],
        "tools": [json.dumps(document.tools) for _, document in batch],
        "prompt_length": [document.prompt_length for _, document in batch],
        "number": [number for number, _ in batch],
    }


def _write_documents(path, documents):
    """Writes the documents to a file that several processes can read."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, DOCUMENT) as stream:
        for batch in _batched(documents):
            stream.write_table(pa.table(_document_columns(batch), DOCUMENT))


def _clear(folder):
    for path in folder.iterdir():
        if path.name != "lock":
            path.unlink()


def _lists(rows, dtype):
    """Converts rows of different lengths to an Arrow array of lists."""
    ends = np.cumsum([0] + [len(row) for row in rows], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


def _values(lists):
    """Returns the concatenated entries of an Arrow array of lists."""
    return _numbers(lists.flatten())


def _numbers(column):
    return column.to_numpy(zero_copy_only=False)
