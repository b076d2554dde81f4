"""The windows of a whole text, made once and kept: rows of memory-mapped Arrow files in the cache folder of `datasets`.

A file holds only what can't be made again from the rest, six to eight bytes for each byte of text. It is named by all that
decides its content, so it is found again or it is another one; and it counts only when it is whole.
"""

import collections.abc
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa

from kdlib import environment
from kdlib.data import tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.files import read_json, write_json

FORMAT = 3
"""Goes up when what is made of the same text changes, in `tokenize`, `chat`, `windowing`, `boundaries` or `vocab`."""
PARALLEL_CHARS, SHOWN_CHARS, BATCH_CHARS = 1_500_000, 3_000_000, 250_000
"""Text for each process beyond the first; text that takes so long that a bar is shown; text in one batch of a file."""

LISTS = ("student_ids", "teacher_ids", "student_rows", "teacher_rows", "student_span_ends", "teacher_span_ends")
MARKS = ("student_learned", "teacher_learned", "student_scored", "teacher_scored")
NUMBERS = ("num_bytes", "num_positions", "document")
COUNTS = ("student_faithful", "student_text", "teacher_faithful", "teacher_text")
"""Of a document, with its first window: text tokens that are the bytes that stand there, and all of them."""
SCHEMA = pa.schema(
    [(name, pa.list_(pa.int32())) for name in LISTS]
    + [(name, pa.list_(pa.bool_())) for name in MARKS]
    + [(name, pa.int64()) for name in NUMBERS + COUNTS]
)
DOCUMENT = pa.schema([(name, pa.large_string()) for name in ("text", "messages", "source")] + [("number", pa.int64())])
"""A document on its way to the processes that tokenize it."""


class WindowDataset(collections.abc.Sequence):
    """`windowing.Window`s as rows of an Arrow table: one is made when it is asked for."""

    def __init__(self, table):
        self._batches = [batch for batch in table.to_batches() if batch.num_rows]
        self._starts = np.cumsum([0] + [batch.num_rows for batch in self._batches])
        self._columns = {}

    @classmethod
    def from_list(cls, windows):
        """Any sequence of windows as one of these."""
        return windows if isinstance(windows, cls) else cls(pa.table(table_of(windows)))

    def __len__(self):
        return int(self._starts[-1])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        which = int(np.searchsorted(self._starts, place, "right")) - 1
        row = self._batches[which].slice(place - self._starts[which], 1)
        held = {name: _values(row.column(name)) for name in LISTS + MARKS}
        labels = {
            f"{side}_labels": windowing.labels_of(held[f"{side}_ids"].astype(np.int64), held.pop(f"{side}_learned"))
            for side in ("student", "teacher")
        }
        numbers = {name: row.column(name)[0].as_py() for name in NUMBERS}
        lists = {name: array.astype(np.int64) if name in LISTS else array for name, array in held.items()}
        return windowing.Window(**lists, **labels, **numbers, place=place)

    def column(self, name):
        """One number a window, int64: what stands in a column, or how many entries its lists have."""
        if name not in self._columns:
            columns = (batch.column(name) for batch in self._batches)
            counts = [_numbers(column.value_lengths() if name in LISTS else column) for column in columns]
            self._columns[name] = np.concatenate([np.zeros(0, np.int64), *counts])
        return self._columns[name]

    def total(self, name):
        """The sum of a column."""
        return int(self.column(name).sum())

    def labels(self, side):
        """The labels of one side (`student` or `teacher`), an array for some windows at a time."""
        for ids, learned in zip(self._flat(f"{side}_ids"), self._flat(f"{side}_learned"), strict=True):
            yield np.append(ids[1:], 0)[learned]

    def digest(self):
        """A hash of the content: of the tokens of both sides, which are learned, and where windows begin."""
        digest = hashlib.sha256()
        for name in ("student_ids", "student_learned", "teacher_ids"):
            for batch in self._batches:
                digest.update(_numbers(batch.column(name).value_lengths()).tobytes())
            for array in self._flat(name):
                digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def _flat(self, name):
        return (_values(batch.column(name)) for batch in self._batches)


def window_lengths(windows, side="student"):
    """Tokens of each of some windows on one side, int64."""
    if isinstance(windows, WindowDataset):
        return windows.column(f"{side}_ids")
    return np.array([len(getattr(window, f"{side}_ids")) for window in windows], dtype=np.int64)


def longest_windows(windows, count):
    """The `count` windows with most student tokens, the longest last."""
    return [windows[i] for i in np.argsort(window_lengths(windows), kind="stable")[-count:]]


def spread(windows, num_tokens):
    """Yields windows of about `num_tokens` student tokens, spread over the documents; the same ones every time."""
    size, lengths = 0, window_lengths(windows)
    for index in np.random.default_rng(0).permutation(len(windows)):
        if size >= num_tokens:
            return
        yield windows[index]
        size += lengths[index]


def table_of(windows, counts=()):
    """`{column: Arrow array}` of some windows; `counts` `[len(windows)][4]` as in COUNTS (default: none)."""
    made = {name: _lists([getattr(w, name) for w in windows], np.int32) for name in LISTS}
    for side in ("student", "teacher"):
        labels = [getattr(w, f"{side}_labels") for w in windows]
        made[f"{side}_learned"] = _lists([row != windowing.IGNORE for row in labels], bool)
        made[f"{side}_scored"] = _lists([getattr(w, f"{side}_scored") for w in windows], bool)
    for name in NUMBERS:
        made[name] = pa.array([getattr(w, name) for w in windows], pa.int64())
    counts = (
        np.array(counts, np.int64).reshape(-1, len(COUNTS)) if len(counts) else np.zeros((len(windows), len(COUNTS)))
    )
    made |= {name: pa.array(counts[:, i].astype(np.int64)) for i, name in enumerate(COUNTS)}
    return {name: made[name] for name in SCHEMA.names}


def build_windows(documents, student, teacher, max_length):
    """The `WindowDataset` of all `documents` (`windowing.cut_windows` of each, in order) as two `tokenize.TextTokenizer`s read them.

    What was made before is found again. Where the cache folder takes nothing they are made in memory, with a warning.
    """
    import datasets

    how = {"student": student, "teacher": teacher, "max_length": max_length}
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "kdlib" / f"windows-{_key(documents, **how)}"
    try:
        table = _kept(folder)
        return WindowDataset(_make(folder, documents, how) if table is None else table)
    except OSError as error:
        warnings.warn(
            f"the cache folder {folder.parent} does not take the tokenized text ({error.strerror or error}); it is kept in "
            "memory, and made again at the next start",
            stacklevel=2,
        )
    batches = (_document_columns(batch) for batch in _batched(documents))
    return WindowDataset(pa.concat_tables([SCHEMA.empty_table(), *(_read(batch, **how) for batch in batches)]))


def _key(documents, student, teacher, max_length):
    """A hash of all that decides what the windows are."""
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
    digest = hashlib.sha256(repr((FORMAT, versions, max_length)).encode())
    for reader in (student, teacher):
        used = reader.tokenizer
        marks = used.chat_template, sorted(map(repr, used.special_tokens_map.items())), used.all_special_ids
        facts = [used.backend_tokenizer.to_str(), *map(repr, (marks, reader.prefix, reader.eos, reader.context))]
        digest.update(json.dumps(facts).encode())
    for document in documents:
        piece = document.text.encode() if not document.messages else json.dumps(document.messages).encode()
        digest.update(f"{bool(document.messages)} {len(piece)} ".encode() + piece)
    return digest.hexdigest()[:32]


def _kept(folder):
    """The table that lies whole in a folder; None where there is none."""
    try:
        files = read_json(folder / "whole.json")
        if any((folder / name).stat().st_size != size for name, size in files.items()):
            return None
        maps = [pa.memory_map(str(folder / name)) for name in files]
        tables = [pa.ipc.open_stream(file).read_all().replace_schema_metadata(None) for file in maps]
        return pa.concat_tables([SCHEMA.empty_table(), *tables])
    except (FileNotFoundError, ValueError):  # of JSON and of Arrow
        return None


def _make(folder, documents, how):
    """Make the table in its folder; one process at a time, the others wait for it."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (table := _kept(folder)) is not None:
            return table
        try:
            _clear(folder)
            _write_documents(folder / "documents.arrow", documents)
            given = datasets.Dataset.from_file(str(folder / "documents.arrow"))
            with _mapping(_num_chars(documents), len(documents)) as num_processes:
                given.map(
                    _read, batched=True, batch_size=_batch_size(documents), fn_kwargs=how, remove_columns=given.column_names,
                    features=datasets.Features.from_arrow_schema(SCHEMA), cache_file_name=str(folder / "windows.arrow"),
                    num_proc=num_processes, new_fingerprint=folder.name, desc="Tokenizing the text, once",
                )  # fmt: skip
            files = sorted(folder.glob("windows*.arrow"))
            for file in files:
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
            (folder / "documents.arrow").unlink()
            write_json(folder / "whole.json", {file.name: file.stat().st_size for file in files})
        except BaseException:
            _clear(folder)
            raise
    return _kept(folder)


@contextlib.contextmanager
def _mapping(num_chars, num_documents):
    """The number of processes to read a text with (None: this one), and the surroundings they need meanwhile."""
    import datasets

    num_processes = min(environment.num_processors(), num_documents, num_chars // PARALLEL_CHARS)
    shown = num_chars >= SHOWN_CHARS and environment.is_main_process()
    hidden = datasets.are_progress_bars_disabled()
    with warnings.catch_warnings(), environment.single_tokenizer_thread():
        # Python 3.12 warns of any fork beside threads; these children touch nothing that a thread may hold
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        if not shown:
            datasets.disable_progress_bars()
        try:
            yield num_processes if num_processes > 1 else None
        finally:
            if not hidden:
                datasets.enable_progress_bars()


def _read(batch, student, teacher, max_length):
    """The table of the windows of some documents."""
    windows, counts = [], []
    for text, messages, source, number in zip(*(batch[name] for name in DOCUMENT.names), strict=True):
        document = Document(text, tuple(map(tuple, json.loads(messages))), source)
        ours, theirs = (tokenize.encode(document, reader) for reader in (student, teacher))
        cut = windowing.cut_windows(document, ours, theirs, student, teacher, max_length, number)
        told = [int(n) for side in (ours, theirs) for n in ((side.faithful & side.is_text).sum(), side.is_text.sum())]
        windows += cut
        counts += ([told] + [[0] * len(COUNTS)] * len(cut))[: len(cut)]
    return pa.table(table_of(windows, counts), SCHEMA)


def _batched(documents):
    """`(number, document)`s in lists."""
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
        "number": [number for number, _ in batch],
    }


def _write_documents(path, documents):
    """The documents as a file that several processes can read."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, DOCUMENT) as stream:
        for batch in _batched(documents):
            stream.write_table(pa.table(_document_columns(batch), DOCUMENT))


def _clear(folder):
    for left in folder.iterdir():
        if left.name != "lock":
            left.unlink()


def _lists(rows, dtype):
    """Rows of different lengths as an Arrow array of lists."""
    ends = np.cumsum([0] + [len(row) for row in rows], dtype=np.int32)
    values = np.concatenate([np.zeros(0, dtype), *rows]).astype(dtype)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(values))


def _values(lists):
    """All entries of an Arrow array of lists."""
    return _numbers(lists.flatten())


def _numbers(column):
    return column.to_numpy(zero_copy_only=False)
