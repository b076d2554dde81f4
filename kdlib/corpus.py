"""Where the text comes from: files, folders, Hugging Face data sets; and which documents are held out.

A record is a text in a field, or a conversation in `messages`. A data set that does not load is an error, never an
empty one.
"""

import dataclasses
import glob
import hashlib
import json
import os
from pathlib import Path

SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
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

    A .txt file holds documents separated by form feeds; one that holds fewer than 20 is cut into blocks of about
    8,000 characters at blank lines, so that some can be held out. Raises ValueError that names what is wrong.
    """
    documents = []
    for part in filter(None, (part.strip() for part in source.split(","))):
        documents += _read_source(part, text_field)
    if not documents:
        raise ValueError(f"dataset {source!r} holds no text")
    return documents


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
    path = Path(part)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and not p.name.startswith("."))
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _from_rows(_load_saved(path), text_field, part)
        if not files:
            raise ValueError(f"folder {part} holds no file that ends in {' '.join(SUFFIXES)}")
    elif path.is_file():
        files = [path]
    elif any(mark in part for mark in "*?["):
        files = [Path(p) for p in sorted(glob.glob(part))]
        if not files:
            raise ValueError(f"no file matches {part}")
    elif path.suffix in SUFFIXES or part.startswith((".", "/", "~")) or os.sep not in part:
        raise ValueError(f"no such file or folder: {part}")
    else:
        return _from_rows(_load_from_hub(part), text_field, part)
    return [document for file in files for document in _read_file(file, text_field)]


def _read_file(path, text_field):
    if path.suffix == ".parquet":
        return _from_rows(_load_parquet(path), text_field, path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from None
    if path.suffix == ".jsonl":
        return _from_rows(_json_lines(content, path), text_field, path)
    return [Document(text) for text in _split_text(content)]


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


def _json_lines(content, path):
    rows = []
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path} line {number} holds a {type(row).__name__}; expected an object a line")
            rows.append(row)
    return rows


def _from_rows(rows, text_field, source):
    documents = []
    for number, row in enumerate(rows, start=1):
        if row.get("messages"):
            documents.append(Document("", _messages(row["messages"], source, number), f"{source} record {number}"))
            continue
        if text_field not in row:
            fields = ", ".join(row) or "no fields"
            raise ValueError(f"{source} record {number} has no field {text_field!r}; it has {fields}; set --text-field")
        text = row[text_field]
        if not isinstance(text, str):
            raise ValueError(
                f"{source} record {number}: field {text_field!r} is {type(text).__name__}, expected a text"
            )
        if text.strip():
            documents.append(Document(text))
    return documents


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
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file that can be read: {str(error).splitlines()[0]}") from None


def _load_saved(path):
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded["train"] if "train" in loaded else loaded[next(iter(loaded))]
    return loaded


def _load_from_hub(part):
    import datasets

    name, _, configuration = part.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split="train")
    except Exception as error:  # noqa: BLE001 - any failure of the loader is told in one line
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"dataset {part!r} does not load: {reason}") from None
