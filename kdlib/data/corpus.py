"""Loads documents from files, folders and Hugging Face datasets, and splits off held-out documents.

A record is a text in a field, or a conversation in `messages`. A dataset that does not load, or a file with an unknown
suffix, is an error.
"""

import dataclasses
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from pathlib import Path

TEXTS, TABLES = (".txt", ".md"), (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = TEXTS + TABLES
"""Suffixes of supported files: plain texts, and tables of records. All but .parquet may be followed by .gz."""
ABOUT_TEXT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog)(?![a-z])", re.IGNORECASE)
ABOUT_JSON = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "dataset-metadata.json", "state.json")
"""Files that describe a dataset and are not loaded; those of ABOUT_TEXT only if there are tables too."""
BLOCK_CHARS = 8_000
MIN_DOCUMENTS = 20


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a conversation: then `messages` is a tuple of (role, content) and `text` is empty. `source` is the
    file and record of a conversation, for error messages.
    """

    text: str
    messages: tuple = ()
    source: str = dataclasses.field(default="", compare=False)

    @property
    def key(self):
        """Hash of the content, as a number in [0, 1)."""
        content = self.text or json.dumps(self.messages)
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big") / 2**48


def read_documents(source, text_field="text"):
    """Loads all documents of `source`: a comma-separated list of files, folders, patterns and Hugging Face ids.

    The suffix decides how a file is read (`SUFFIXES`). In a text, form feeds separate documents. A text with fewer than
    20 is cut into blocks of about 8,000 characters at blank lines, so that some can be held out. A table has one record
    per row, line or list element. Raises ValueError if a source is missing, unreadable or empty.
    """
    documents = []
    for part in filter(None, (part.strip() for part in source.split(","))):
        part_documents = _read_source(part, text_field)
        if not part_documents:
            raise ValueError(f"{part} contains no text")
        documents += part_documents
    if not documents:
        raise ValueError(f"dataset {source!r} contains no text")
    return documents


def suffix_of(path):
    """Returns the file's suffix from `SUFFIXES`, ignoring case and a .gz ending; empty if it has none of them."""
    name = Path(path).name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def is_text(path):
    """Returns whether a path is a supported file, by its name; hidden files and those of `ABOUT_JSON` are not."""
    name = Path(path).name.lower()
    return bool(suffix_of(name)) and not name.startswith(".") and name not in ABOUT_JSON and Path(path).is_file()


def files_in(folder):
    """Returns the supported files of a folder and its subfolders, sorted. Skips hidden folders, and text files like
    README or LICENSE if there are tables.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if is_text(path))
    paths = [path for path in paths if not any(name[0] == "." for name in path.relative_to(folder).parts)]
    has_tables = any(suffix_of(path) in TABLES for path in paths)
    return [path for path in paths if not (has_tables and suffix_of(path) in TEXTS and ABOUT_TEXT.match(path.name))]


def split_documents(documents, held_out=0.1):
    """Splits documents into `(train, validation, test)`. About `held_out` of the distinct documents, chosen by a hash
    of their content, are held out, half for each split. Duplicates stay in one split.
    """
    keys = sorted({document.key for document in documents})
    if len(keys) < 4:
        raise ValueError(f"the dataset has {len(keys)} distinct documents; at least 4 are needed to hold some out")
    rank = {key: i for i, key in enumerate(keys[: max(2, round(held_out * len(keys)))])}
    splits = [], [], []
    for document in documents:
        splits[1 + rank[document.key] % 2 if document.key in rank else 0].append(document)
    return splits


def halve(documents):
    """Splits held-out documents into `(validation, test)` by content. Duplicates stay in one split."""
    rank = {key: i for i, key in enumerate(sorted({document.key for document in documents}))}
    if len(rank) < 2:
        raise ValueError(f"eval_dataset has {len(rank)} distinct document; at least 2 are needed (validation and test)")
    return [[document for document in documents if rank[document.key] % 2 == half] for half in (0, 1)]


def _read_source(part, text_field):
    path = Path(os.path.expanduser(part))
    if os.path.isdir(path):
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _from_rows(_load_saved(path), text_field, part)
        files = files_in(path)
        if not files:
            raise ValueError(f"folder {part} has no file that ends in {' '.join(SUFFIXES)}{_describe_files(path)}")
    elif os.path.isfile(path):
        files = [path]
    elif any(mark in part for mark in "*?["):
        files = [Path(p) for p in sorted(glob.glob(str(path)))]
        if not files:
            raise ValueError(f"no file matches {part}")
    elif suffix_of(part) or part.startswith((".", "/", "~")) or "\\" in part or part.count("/") > 1:
        raise ValueError(f"no such file or folder: {part}")
    else:
        return _from_rows(_load_from_hub(part), text_field, part)
    return [document for file in files for document in _read_file(file, text_field)]


def _describe_files(folder, max_names=5):
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    remainder = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return f"; it has {', '.join(names[:max_names])}{remainder}" if names else ""


def _read_file(path, text_field):
    suffix = suffix_of(path)
    if not suffix:
        raise ValueError(
            f"cannot read {path}: its name must end in {' '.join(SUFFIXES)} (or in .gz after one of these)"
        )
    if suffix == ".parquet":
        return _from_rows(_load_parquet(path), text_field, path)
    content = _content(path)
    if suffix in TEXTS:
        return [Document(text) for text in _split_text(content)]
    if suffix in (".csv", ".tsv"):
        return _from_rows(_load_csv(content, path, text_field, "," if suffix == ".csv" else "\t"), text_field, path)
    return _from_rows((_json_lines if suffix == ".jsonl" else _json)(content, path), text_field, path)


def _content(path):
    """Reads the text of a file, and decompresses it if its name ends in .gz."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        content = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a valid gzip file: {error}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if "\0" in content:
        raise ValueError(f"{path} is not UTF-8 text (NUL at character {content.index(chr(0))}); convert it first")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _split_text(content):
    documents = [text for text in content.split("\f") if text.strip()]
    if len(documents) >= MIN_DOCUMENTS:
        return documents
    blocks = []
    for text in documents:
        block = ""
        for paragraph in text.split("\n\n"):
            if len(block) + len(paragraph) > BLOCK_CHARS and block:
                blocks.append(block)
                block = ""
            block += ("\n\n" if block else "") + paragraph
        blocks.append(block)
    pieces = [block[i : i + 2 * BLOCK_CHARS] for block in blocks for i in range(0, len(block), 2 * BLOCK_CHARS)]
    return [piece for piece in pieces if piece.strip()]


def _json(content, path):
    """Parses a .json file: a list of objects, one object, or one object per line."""
    try:
        value = json.loads(content) if content.strip() else []
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # after the first object
            return _json_lines(content, path)
        raise ValueError(f"{path} is not JSON: {error}") from None
    rows = value if isinstance(value, list) else [value]
    return [_object(row, f"{path} record {number}") for number, row in enumerate(rows, start=1)]


def _json_lines(content, path):
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None
            rows.append(_object(row, f"{path} line {number}"))
    return rows


def _object(row, record):
    if not isinstance(row, dict):
        raise ValueError(f"{record} is a {type(row).__name__}; expected an object with fields")
    return row


def _load_csv(content, path, text_field, delimiter):
    """Parses a .csv or .tsv file whose first row names the fields. The text field is never converted to numbers."""
    import pyarrow.csv

    data = content.encode()
    try:
        return pyarrow.csv.read_csv(
            pyarrow.BufferReader(data),
            pyarrow.csv.ReadOptions(block_size=min(len(data) + 1, 2**31 - 1)),  # records must fit in one block
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(column_types={text_field: pyarrow.string()}, strings_can_be_null=False),
        ).to_pylist()
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise ValueError(f"{path} is not a valid table: {_first_line(error)}") from None


def _from_rows(rows, text_field, source):
    documents = []
    for number, row in enumerate(rows, start=1):
        record = f"{source} record {number}"
        if row.get("messages"):
            _check_characters(row["messages"], record)
            documents.append(Document("", _messages(row["messages"], record), record))
            continue
        if text_field not in row:
            fields = ", ".join(row) or "no fields"
            raise ValueError(f"{record} has no field {text_field!r}; it has {fields}; set --text-field")
        text = row[text_field]
        if not isinstance(text, str):
            raise ValueError(f"{record}: field {text_field!r} is {type(text).__name__}, expected a string")
        _check_characters(text, record)
        if text.strip():
            documents.append(Document(text))
    return documents


def _check_characters(value, record):
    """Raises ValueError for a lone surrogate, which tokenizers reject, or for messages that are not a list."""
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"{record}: messages is {type(value).__name__}, expected a list of messages")
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError as error:
        surrogate = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{record} contains the lone surrogate {surrogate}; repair the text first") from None


def _messages(messages, record):
    turns = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        role, content = fields.get("role"), fields.get("content")
        is_blank_answer = role == "assistant" and isinstance(content, str) and not content.strip()
        if not isinstance(role, str) or not isinstance(content, str) or is_blank_answer:
            raise ValueError(
                f"{record}: a message needs a role and a content that is a string, not blank for an answer"
            )
        turns.append((role, content))
    if "assistant" not in [role for role, _ in turns]:
        raise ValueError(f"{record}: messages contain no answer (role assistant), so there is no training target")
    return tuple(turns)


def _load_parquet(path):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{path} is not a valid parquet file: {_first_line(error)}") from None


def _load_saved(path):
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - any failure of the loader becomes a one-line error
        raise ValueError(f"{path} is not a valid saved dataset: {_first_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded["train"] if "train" in loaded else loaded[next(iter(loaded))]
    return loaded


def _load_from_hub(part):
    import datasets

    name, _, configuration = part.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # noqa: BLE001 - any failure of the loader becomes a one-line error
        reason = f"loading it from the Hugging Face Hub failed: {_first_line(error)}"
        raise ValueError(f"dataset {part!r}: no such file or folder, and {reason}") from None


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
