"""Loads documents from files, folders and Hugging Face datasets, and splits off held-out documents.

A dataset that does not load, or a file with an unknown suffix, is an error. A record that cannot be used is skipped and
counted.
"""

import glob
import itertools
import json
import os
import re
from pathlib import Path

from kdlib.data.records import PAIRS, Document, Fields, Report, UnusableRecord, to_document
from kdlib.environment import first_line

TEXTS, TABLES = (".txt", ".md"), (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SUFFIXES = TEXTS + TABLES
"""Suffixes of supported files: plain texts, and tables of records."""
BINARY = (".parquet", ".arrow")
PACKED = {".gz": "gzip", ".zst": "zstd"}
"""Suffixes of compression, after one of `SUFFIXES` that is not in `BINARY`."""
TRAINING = re.compile(r"(^|[^a-z])train(ing)?([^a-z]|$)", re.IGNORECASE)
HELD_OUT = re.compile(r"(^|[^a-z])(test(ing)?|val|valid|validation|dev|eval|evaluation)([^a-z]|$)", re.IGNORECASE)
"""File or folder names of the splits of a dataset."""
ABOUT_TEXT = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog)(?![a-z])", re.IGNORECASE)
ABOUT_JSON = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "dataset-metadata.json", "state.json")
"""Files that describe a dataset and are not loaded; those of ABOUT_TEXT only if there are tables too."""
BLOCK_CHARS = 8_000
MIN_DOCUMENTS = 20
BLANK = object()


class Documents(list):
    """Documents, with the `records.Report` of how they were read."""

    def __init__(self, documents, report):
        super().__init__(documents)
        self.report = report


def read_documents(source, fields=Fields(), max_bad_records=0.05, split="train"):  # noqa: B008 - frozen
    """Loads all documents of `source`: a comma-separated list of files, folders, patterns and Hugging Face ids.

    The suffix decides how a file is read (`SUFFIXES`). In a text, form feeds separate documents. A text with fewer than
    20 is cut into blocks of about 8,000 characters at blank lines, so that some can be held out. A table has one record
    per row, line or list element; `fields` name theirs (`records.to_document`). `split` is the one of a dataset on the
    Hub or stored by `datasets`. Raises ValueError if a source is missing, unreadable or empty, or if more than a share
    `max_bad_records` of its records cannot be used.
    """
    documents = Documents([], Report())
    for part in filter(None, (part.strip() for part in source.split(","))):
        report = Report()
        documents += _read_source(part, fields, split, report)
        report.check(part, max_bad_records)
        documents.report.add(report)
    documents.report.check(f"dataset {source!r}", max_bad_records)
    return documents


def documents_of(config, key="dataset"):
    """Returns the `Documents` of a config key, `dataset` or `eval_dataset`; of `dataset` at most `max_documents`."""
    fields = Fields(config.text_field, config.prompt_field, config.completion_field)
    documents = read_documents(getattr(config, key), fields, config.max_bad_records, config.dataset_split)
    if key == "eval_dataset" or not 0 < config.max_documents < len(documents):
        return documents
    chosen = sorted(sorted(range(len(documents)), key=lambda i: documents[i].key)[: config.max_documents])
    documents.report.choice = f"Uses {len(chosen):,} of them (max_documents)."
    return Documents([documents[i] for i in chosen], documents.report)


def suffix_of(path):
    """Returns the file's suffix from `SUFFIXES`, ignoring case and one of `PACKED`; empty if it has none of them."""
    path = Path(str(path).lower())
    suffix = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return suffix if suffix in SUFFIXES and not (suffix in BINARY and path.suffix in PACKED) else ""


def is_text(path):
    """Returns whether a path is a supported file, by its name; hidden files and those of `ABOUT_JSON` are not."""
    name = Path(path).name.lower()
    return bool(suffix_of(name)) and not name.startswith(".") and name not in ABOUT_JSON and Path(path).is_file()


def files_in(folder):
    """Returns the supported files of a folder and its subfolders, sorted.

    Skips hidden folders, text files like README or LICENSE if there are tables, and the files of other splits if some
    names say that they are for training.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if is_text(path))
    paths = [path for path in paths if not any(name[0] == "." for name in path.relative_to(folder).parts)]
    has_tables = any(suffix_of(path) in TABLES for path in paths)
    paths = [path for path in paths if not (has_tables and suffix_of(path) in TEXTS and ABOUT_TEXT.match(path.name))]
    names = {path: str(path.relative_to(folder)) for path in paths}
    if any(TRAINING.search(name) for name in names.values()):
        paths = [path for path in paths if TRAINING.search(names[path]) or not HELD_OUT.search(names[path])]
    return paths


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


def _read_source(part, fields, split, report):
    path = Path(os.path.expanduser(part))
    if os.path.isdir(path):
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _from_rows(_load_saved(path, split), fields, part, report)
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
        return _from_rows(_load_from_hub(part, split), fields, part, report)
    return [document for file in files for document in _read_file(file, fields, report)]


def _describe_files(folder, max_names=5):
    names = sorted(path.name for path in folder.rglob("*") if path.is_file())
    remainder = f" and {len(names) - max_names} more" if len(names) > max_names else ""
    return f"; it has {', '.join(names[:max_names])}{remainder}" if names else ""


def _read_file(path, fields, report):
    suffix = suffix_of(path)
    if not suffix:
        raise ValueError(
            f"cannot read {path}: its name must end in {' '.join(SUFFIXES)}, or in {' '.join(PACKED)} after one of these "
            f"but {' '.join(BINARY)}"
        )
    if suffix in BINARY:
        return _from_rows((_load_parquet if suffix == ".parquet" else _load_arrow)(path), fields, path, report)
    content = _content(path)
    if suffix in TEXTS:
        texts = _split_text(content)
        report.forms["texts"] += len(texts)
        return [Document(text) for text in texts]
    if suffix in (".csv", ".tsv"):
        rows = _load_csv(content, path, fields, "," if suffix == ".csv" else "\t")
        return _from_rows(rows, fields, path, report)
    unit = "line" if suffix == ".jsonl" else "record"
    return _from_rows((_json_lines if suffix == ".jsonl" else _json)(content, path), fields, path, report, unit)


def _content(path):
    """Reads the text of a file, and decompresses it if its name says so."""
    packed = PACKED.get(path.suffix.lower())
    try:
        content = _unpack(path, packed) if packed else path.read_bytes()
        content = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or first_line(error)}") from None
    if "\0" in content:
        raise ValueError(f"{path} is not UTF-8 text (NUL at character {content.index(chr(0))}); convert it first")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _unpack(path, kind):
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        try:
            return pyarrow.CompressedInputStream(file, kind).read()
        except OSError as error:
            raise ValueError(f"{path} is not a valid {kind} file: {first_line(error)}") from None


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
    return value if isinstance(value, list) else [value]


def _json_lines(content, path):
    """Returns the value of each line, an `UnusableRecord` if it is not JSON, and BLANK if it is empty."""
    rows = []
    for line in content.split("\n"):
        try:
            rows.append(json.loads(line) if line.strip() else BLANK)
        except (ValueError, RecursionError) as error:
            rows.append(UnusableRecord(f"not JSON ({getattr(error, 'msg', None) or 'nested too deeply'})"))
    return rows


def _load_csv(content, path, fields, delimiter):
    """Parses a .csv or .tsv file whose first row names the fields. Fields of text are never converted to numbers."""
    import pyarrow.csv

    data = content.encode()
    names = {fields.text, fields.prompt, fields.completion, "prompt", "completion", "chosen", *itertools.chain(*PAIRS)}
    types = dict.fromkeys(names, pyarrow.string())
    try:
        return pyarrow.csv.read_csv(
            pyarrow.BufferReader(data),
            pyarrow.csv.ReadOptions(block_size=min(len(data) + 1, 2**31 - 1)),  # records must fit in one block
            pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        ).to_pylist()
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise ValueError(f"{path} is not a valid table: {first_line(error)}") from None


def _from_rows(rows, fields, source, report, unit="record"):
    """Converts records to documents, and counts them in `report`. BLANK is no record."""
    documents = []
    for number, row in enumerate(rows, start=1):
        if row is BLANK:
            continue
        name = f"{source} {unit} {number}"
        try:
            if isinstance(row, UnusableRecord):
                raise row
            form, document = to_document(row, fields, name)
        except UnusableRecord as error:
            report.skip(str(error), name)
        else:
            report.forms[form] += 1
            for part in document.left_out:
                report.leave_out(part, name)
            documents.append(document)
    return documents


def _load_parquet(path):
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:
        raise ValueError(f"{path} is not a valid parquet file: {first_line(error)}") from None


def _load_arrow(path):
    import datasets

    try:
        return datasets.Dataset.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - any failure of the loader becomes a one-line error
        raise ValueError(f"{path} is not a valid arrow file: {first_line(error)}") from None


def _load_saved(path, split):
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - any failure of the loader becomes a one-line error
        raise ValueError(f"{path} is not a valid saved dataset: {first_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(f"{path} has no split {split!r}; it has {', '.join(loaded)}; set --dataset-split")
        loaded = loaded[split]
    return loaded


def _load_from_hub(part, split):
    import datasets

    name, _, configuration = part.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except Exception as error:  # noqa: BLE001 - any failure of the loader becomes a one-line error
        reason = f"loading it from the Hugging Face Hub failed: {first_line(error)}"
        raise ValueError(f"dataset {part!r}: no such file or folder, and {reason}") from None
