"""Where the text comes from: files, folders, Hugging Face data sets; and which documents are held out.

A record is a text in a field, or a conversation in `messages`. A data set that does not load is an error, never an
empty one; so is a file whose name does not say that it is text or records.
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
"""Suffixes of files that are read: texts as they are, tables as records. A .gz may follow all but .parquet."""
ABOUT_TEXT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog)(?![a-z])", re.IGNORECASE)
ABOUT_JSON = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "dataset-metadata.json", "state.json")
"""Files that describe a data set and are no part of it: the former only next to tables."""
BLOCK_CHARS = 8_000
MIN_DOCUMENTS = 20


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, or a conversation: `messages` is a tuple of (role, content) and `text` then stays empty. `source` names the
    file and record of a conversation, for error messages.
    """

    text: str
    messages: tuple = ()
    source: str = dataclasses.field(default="", compare=False)

    @property
    def key(self):
        """A number in [0, 1) that depends on the content alone."""
        content = self.text or json.dumps(self.messages)
        return int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big") / 2**48


def read_documents(source, text_field="text"):
    """All documents of `source`: a file, folder, pattern, Hugging Face id, or several of these separated by commas.

    The suffix says how a file is read (`SUFFIXES`): a text holds documents separated by form feeds; one that holds fewer
    than 20 is cut into blocks of about 8,000 characters at blank lines, so that some can be held out. A table holds a
    record in each row, line or element of a list. Raises ValueError that names what is wrong.
    """
    documents = []
    for part in filter(None, (part.strip() for part in source.split(","))):
        read = _read_source(part, text_field)
        if not read:
            raise ValueError(f"{part} holds no text")
        documents += read
    if not documents:
        raise ValueError(f"dataset {source!r} holds no text")
    return documents


def suffix_of(path):
    """The one of `SUFFIXES` that a file's name ends in, in any case and before a .gz; empty where it has none of them."""
    name = Path(path).name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")


def is_text(path):
    """Whether a path is a file of texts or records, by its name; hidden files and those of `ABOUT_JSON` are none."""
    name = Path(path).name.lower()
    return bool(suffix_of(name)) and not name.startswith(".") and name not in ABOUT_JSON and Path(path).is_file()


def files_in(folder):
    """Files of a folder and of those below it that are read as its text, sorted. Those in hidden folders are left out, and
    next to tables a README or a licence.
    """
    known = sorted(path for path in Path(folder).rglob("*") if is_text(path))
    known = [path for path in known if not any(name[0] == "." for name in path.relative_to(folder).parts)]
    tables = any(suffix_of(path) in TABLES for path in known)
    return [path for path in known if not (tables and suffix_of(path) in TEXTS and ABOUT_TEXT.match(path.name))]


def split_documents(documents, held_out=0.1):
    """`(train, validation, test)`: about `held_out` of the different documents, chosen by their content, half for
    choosing and half for the verdict. Copies of a document stay together.
    """
    keys = sorted({document.key for document in documents})
    if len(keys) < 4:
        raise ValueError(f"the dataset has {len(keys)} different documents, too few to hold any out; give more text")
    held = {key: place for place, key in enumerate(keys[: max(2, round(held_out * len(keys)))])}
    parts = [], [], []
    for document in documents:
        parts[1 + held[document.key] % 2 if document.key in held else 0].append(document)
    return parts


def halve(documents):
    """`(validation, test)` of documents that are all held out, by content; copies stay together."""
    keys = {key: place for place, key in enumerate(sorted({document.key for document in documents}))}
    if len(keys) < 2:
        raise ValueError(f"eval_dataset has {len(keys)} document; at least 2 are needed (one chooses, one judges)")
    return [[document for document in documents if keys[document.key] % 2 == half] for half in (0, 1)]


def _read_source(part, text_field):
    path = Path(os.path.expanduser(part))
    if os.path.isdir(path):
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _from_rows(_load_saved(path), text_field, part)
        files = files_in(path)
        if not files:
            raise ValueError(f"folder {part} holds no file that ends in {' '.join(SUFFIXES)}{_names_in(path)}")
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


def _names_in(folder, most=5):
    """What a folder holds instead, for a message."""
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"; it holds {', '.join(names[:most])}{more}" if names else ""


def _read_file(path, text_field):
    suffix = suffix_of(path)
    if not suffix:
        raise ValueError(
            f"{path} is not read: its name must end in {' '.join(SUFFIXES)} (or in .gz after one of these)"
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
    """The text of a file, unpacked where its name ends in .gz."""
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
        content = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a gzip file that can be read: {error}") from None
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
    """Records of a .json file: a list of objects, one object, or an object a line."""
    try:
        value = json.loads(content) if content.strip() else []
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # behind the first object
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


def _object(row, place):
    if not isinstance(row, dict):
        raise ValueError(f"{place} holds a {type(row).__name__}; expected an object with fields")
    return row


def _load_csv(content, path, text_field, delimiter):
    """Records of a .csv or .tsv file, whose first row names the fields; the text is never taken for a number."""
    import pyarrow.csv

    data = content.encode()
    try:
        return pyarrow.csv.read_csv(
            pyarrow.BufferReader(data),
            pyarrow.csv.ReadOptions(block_size=min(len(data) + 1, 2**31 - 1)),  # a record must not be longer
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(column_types={text_field: pyarrow.string()}, strings_can_be_null=False),
        ).to_pylist()
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise ValueError(f"{path} is not a table that can be read: {_first_line(error)}") from None


def _from_rows(rows, text_field, source):
    documents = []
    for number, row in enumerate(rows, start=1):
        place = f"{source} record {number}"
        if row.get("messages"):
            _check_characters(row["messages"], place)
            documents.append(Document("", _messages(row["messages"], source, number), place))
            continue
        if text_field not in row:
            fields = ", ".join(row) or "no fields"
            raise ValueError(f"{place} has no field {text_field!r}; it has {fields}; set --text-field")
        text = row[text_field]
        if not isinstance(text, str):
            raise ValueError(f"{place}: field {text_field!r} is {type(text).__name__}, expected a text")
        _check_characters(text, place)
        if text.strip():
            documents.append(Document(text))
    return documents


def _check_characters(value, place):
    """Raise ValueError where a text holds half of a surrogate pair, which no tokenizer takes; or messages are no list."""
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"{place}: messages is {type(value).__name__}, expected a list of messages")
    try:
        (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"{place} holds {half}, half of a character; repair the text first") from None


def _messages(messages, source, number):
    turns = []
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        no_answer = role == "assistant" and isinstance(content, str) and not content.strip()
        if not isinstance(role, str) or not isinstance(content, str) or no_answer:
            raise ValueError(f"{source} record {number}: a message needs a role and a content that is text")
        turns.append((role, content))
    if "assistant" not in [role for role, _ in turns]:
        raise ValueError(f"{source} record {number}: messages hold no answer (role assistant), so nothing is learned")
    return tuple(turns)


def _load_parquet(path):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {_first_line(error)}") from None


def _load_saved(path):
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - any failure of the loader is told in one line
        raise ValueError(f"{path} is not a saved data set that can be read: {_first_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded["train"] if "train" in loaded else loaded[next(iter(loaded))]
    return loaded


def _load_from_hub(part):
    import datasets

    name, _, configuration = part.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # noqa: BLE001 - any failure of the loader is told in one line
        raise ValueError(
            f"dataset {part!r}: no such file or folder here, and the Hugging Face hub does not load it: {_first_line(error)}"
        ) from None


def _first_line(error):
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
