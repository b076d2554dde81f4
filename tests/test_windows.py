"""Tokenized text on the disk: the same windows as made by hand, made once, and never taken for whole before they are."""

import dataclasses
import errno
import itertools
import os
import signal
import warnings

import datasets
import datasets.arrow_writer
import numpy as np
import pyarrow as pa
import pytest
import transformers
from families import FAMILIES, LINES, reader

from kdlib import environment as env
from kdlib.data import batching, chat, dataset, tokenize, windowing
from kdlib.data.corpus import Document

CHAT = Document("", (("user", "The cat sat?"), ("assistant", "Yes, on the mat.")))
DOCUMENTS = [Document(f"{line} Number {i}.") for i, line in enumerate(LINES)] + [CHAT, Document("é"), CHAT]
PAIR = reader("unigram"), reader("byte_level")


def by_hand(documents=DOCUMENTS, ours=PAIR[0], theirs=PAIR[1], max_length=24, rendering=None):
    made = []
    for number, document in enumerate(documents):
        coded = tokenize.encode(document, ours), tokenize.encode(document, theirs)
        made += windowing.cut_windows(document, *coded, ours, theirs, max_length, number)
    made = [window for window in made if (window.student_labels >= 0).any()]
    return [dataclasses.replace(window, window_id=place) for place, window in enumerate(made)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    return tmp_path / "kdlib"


@pytest.fixture
def two_processes(monkeypatch):
    monkeypatch.setattr(env, "num_processors", lambda: 2)
    monkeypatch.setattr(dataset, "PARALLEL_CHARS", 1)


def build_windows(documents=DOCUMENTS, ours=PAIR[0], theirs=PAIR[1], max_length=24, rendering=chat.Rendering()):  # noqa: B008
    return dataset.build_windows(documents, ours, theirs, max_length, rendering)


def assert_same(found, wanted):
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        for field in dataclasses.fields(windowing.Window):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert np.array_equal(a, b), field.name
            assert type(a) is type(b), field.name
            assert getattr(a, "dtype", None) == getattr(b, "dtype", None), field.name


@pytest.fixture
def read(monkeypatch):
    """How many documents were read, by either tokenizer."""
    seen, real = [], tokenize.encode
    monkeypatch.setattr(tokenize, "encode", lambda *given: seen.append(given) or real(*given))
    return seen


@pytest.mark.parametrize("theirs", FAMILIES)
def test_windows_are_what_the_documents_are_cut_into(theirs, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 200)
    assert_same(build_windows(theirs=reader(theirs)), by_hand(theirs=reader(theirs)))


def test_several_processes_make_the_same_windows(two_processes, cache, monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 200)
    environment = os.environ
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    found = build_windows()
    assert os.environ is environment
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert_same(found, by_hand())
    assert found.digest() == dataset.WindowDataset.from_list(by_hand()).digest()
    assert len(list(cache.glob("*/windows_*_of_00002.arrow"))) == 2


def test_a_second_start_reads_nothing_again(read, cache):
    first = build_windows()
    assert len(read) == 2 * len(DOCUMENTS)
    assert_same(build_windows(), first)
    assert len(read) == 2 * len(DOCUMENTS)
    assert {path.name for path in cache.glob("*/*")} == {"lock", "whole.json", "windows.arrow"}


def other(tokenizer, change):
    core = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)
    change(made)
    return made


CHANGES = {
    "text": lambda: {"documents": [Document(LINES[0])] + DOCUMENTS[1:]},
    "order": lambda: {"documents": DOCUMENTS[::-1]},
    "where documents end": lambda: {"documents": [Document(DOCUMENTS[0].text[:-1]), *DOCUMENTS[1:]]},
    "conversation": lambda: {"documents": DOCUMENTS[:-1] + [Document("", (("assistant", "The cat sat?"),))]},
    "length": lambda: {"max_length": 25},
    "context": lambda: {"theirs": dataclasses.replace(PAIR[1], context=77)},
    "other teacher": lambda: {"theirs": reader("byte_level_trimmed")},
    "sides": lambda: {"ours": PAIR[1], "theirs": PAIR[0]},
    "prefix": lambda: {"ours": dataclasses.replace(PAIR[0], prefix=[])},
    "template": lambda: {"ours": dataclasses.replace(PAIR[0], tokenizer=other(
        PAIR[0].tokenizer, lambda t: setattr(t, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")))},
    "template arguments": lambda: {"rendering": chat.Rendering((("note", "x"),))},
    "added token": lambda: {"ours": dataclasses.replace(PAIR[0], tokenizer=other(
        PAIR[0].tokenizer, lambda t: t.add_tokens(["<new>"])))},
    "special token": lambda: {"ours": dataclasses.replace(PAIR[0], tokenizer=other(
        PAIR[0].tokenizer, lambda t: setattr(t, "eos_token", "<s>")))},
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_name_tells_whatever_decides_the_windows(change, read):
    build_windows()
    read.clear()
    changed = CHANGES[change]()
    found = build_windows(**changed)
    assert len(read) == 2 * len(DOCUMENTS)
    assert_same(found, by_hand(**changed))


def test_the_name_tells_the_format_and_the_libraries(monkeypatch):
    how = {"student": PAIR[0], "teacher": PAIR[1], "max_length": 24, "rendering": chat.Rendering()}
    keys = [dataset._key(DOCUMENTS, **how)]
    again = dataclasses.replace(PAIR[0], tokenizer=other(PAIR[0].tokenizer, lambda t: None))
    assert dataset._key(list(DOCUMENTS), **{**how, "student": again}) == keys[0]
    keys.append(dataset._key([dataclasses.replace(DOCUMENTS[0], prompt_length=1), *DOCUMENTS[1:]], **how))
    monkeypatch.setattr(dataset, "FORMAT", 0)
    keys.append(dataset._key(DOCUMENTS, **how))
    for library in ("tokenizers", "transformers"):
        monkeypatch.setattr(
            dataset.importlib.metadata, "version", lambda name, new=library: "9" if name == new else "1"
        )
        keys.append(dataset._key(DOCUMENTS, **how))
    assert len(set(keys)) == 5


def test_the_name_does_not_tell_where_a_document_comes_from(read):
    build_windows()
    read.clear()
    build_windows([dataclasses.replace(document, source="a.jsonl record 1") for document in DOCUMENTS])
    assert read == []


def test_a_pass_that_is_killed_is_made_again(cache, monkeypatch):
    """In a process of its own, by SIGKILL, when some windows lie in the file: half-made files are left, and cleared away."""
    monkeypatch.setattr(dataset, "BATCH_CHARS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        real, calls = windowing.cut_windows, itertools.count()
        windowing.cut_windows = lambda *given: (
            os.kill(os.getpid(), signal.SIGKILL) if next(calls) == 9 else real(*given)
        )
        build_windows()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    left = {path.name for path in cache.glob("*/*")}
    assert {"lock", "documents.arrow"} < left
    assert not left & {"whole.json", "windows.arrow"}
    assert_same(build_windows(), by_hand())
    assert {path.name for path in cache.glob("*/*")} == {"lock", "whole.json", "windows.arrow"}


def test_a_worker_that_is_killed_hangs_nothing_and_leaves_nothing(two_processes, cache, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(windowing, "cut_windows", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
        with pytest.raises(RuntimeError, match="abruptly died"):
            build_windows()
    assert {path.name for path in cache.glob("*/*")} == {"lock"}
    assert_same(build_windows(), by_hand())


@pytest.mark.parametrize("damage", ["shortened", "lost", "not Arrow", "not JSON"])
def test_files_that_are_not_whole_are_made_again(cache, read, damage):
    build_windows()
    (file,) = cache.glob("*/windows.arrow")
    if damage == "shortened":
        os.truncate(file, file.stat().st_size // 2)
    elif damage == "lost":
        file.unlink()
    elif damage == "not Arrow":
        file.write_bytes(b"x" * file.stat().st_size)
    else:
        (file.parent / "whole.json").write_text("{")
    read.clear()
    assert_same(build_windows(), by_hand())
    assert len(read) == 4 * len(DOCUMENTS)  # ours, and those by hand


def test_a_full_disk_is_told_and_the_windows_are_made_in_memory(cache, monkeypatch):
    with monkeypatch.context() as patched:
        real = pa.RecordBatchStreamWriter.write_table
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        class Full(pa.RecordBatchStreamWriter):
            def write_table(self, *given):
                if self.schema_names == dataset.SCHEMA.names:
                    raise full
                return real(self, *given)

        def writer(stream, schema):
            made = Full(stream, schema)
            made.schema_names = schema.names
            return made

        patched.setattr(datasets.arrow_writer.pa, "RecordBatchStreamWriter", writer)
        with pytest.warns(UserWarning, match=r"cannot cache the tokenized text .*\(No space left on device\)"):
            found = build_windows()
    assert {path.name for path in cache.glob("*/*")} == {"lock"}
    assert_same(found, by_hand())


@pytest.mark.parametrize("several", [False, True])
def test_a_cache_that_takes_nothing_is_told(cache, several, request):
    if several:
        request.getfixturevalue("two_processes")
    cache.write_text("in the way")
    with pytest.warns(UserWarning, match=r"cannot cache the tokenized text in .*kdlib "):
        found = build_windows()
    assert_same(found, by_hand())
    assert [window.window_id for window in found] == list(range(len(found)))


@pytest.mark.parametrize("several", [False, True])
def test_a_rejected_document_has_no_window_and_a_reason(cache, several, request, monkeypatch):
    if several:
        request.getfixturevalue("two_processes")
    monkeypatch.setattr(dataset, "BATCH_CHARS", 100)
    rude = other(PAIR[0].tokenizer, lambda t: setattr(t, "chat_template", "Hello"))
    named = [dataclasses.replace(each, source=f"a.jsonl record {i}") for i, each in enumerate(DOCUMENTS, start=1)]
    first = 1 + DOCUMENTS.index(CHAT)
    found = build_windows(named, ours=dataclasses.replace(PAIR[0], tokenizer=rude))
    conversations = {i for i, document in enumerate(DOCUMENTS) if document.messages}
    assert set(found.problems) == conversations and min(conversations) == first - 1
    assert all(reason.startswith("rejected: the chat template of ") for reason in found.problems.values())
    assert found.problems[first - 1].endswith("drops or changes a user message")
    kept = [window for window in by_hand() if window.document not in conversations]
    assert_same(list(found), [dataclasses.replace(window, window_id=i) for i, window in enumerate(kept)])
    assert found.total("student_ids") == sum(len(window.student_ids) for window in found)


def test_a_conversation_whose_answer_is_too_far_has_no_window_and_a_reason(cache):
    far = Document("", (("user", "word " * 60), ("assistant", "Yes.")))
    found = build_windows([*DOCUMENTS, far])
    assert found.problems[len(DOCUMENTS)] == "without a training target in its first 24 tokens"
    assert len(found) == len(build_windows(DOCUMENTS))


def test_who_waited_for_another_process_takes_what_that_one_made(monkeypatch, read):
    real = dataset.fcntl.flock

    def waited(file, how):
        monkeypatch.setattr(dataset.fcntl, "flock", real)
        build_windows()

    monkeypatch.setattr(dataset.fcntl, "flock", waited)
    assert len(build_windows()) > 0
    assert len(read) == 2 * len(DOCUMENTS)


def test_numbers_over_all_windows_are_those_of_each(monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 200)
    found, each = build_windows(), by_hand()
    for side in ("student", "teacher"):
        lengths = [len(getattr(w, f"{side}_ids")) for w in each]
        assert dataset.window_lengths(found, side).tolist() == dataset.window_lengths(each, side).tolist() == lengths
    assert found.column("document").tolist() == [w.document for w in each]
    assert found.total("student_rows") == sum(len(w.student_rows) for w in each)
    assert found.total("num_bytes") == sum(w.num_bytes for w in each)
    assert found.total("num_positions") == sum(w.num_positions for w in each)
    for side in ("student", "teacher"):
        wanted = np.concatenate([getattr(w, f"{side}_labels") for w in each])
        assert np.concatenate(list(found.labels(side))).tolist() == wanted[wanted != windowing.IGNORE].tolist()
        coded = [
            tokenize.encode(d, PAIR[side == "teacher"]) for i, d in enumerate(DOCUMENTS) if i not in found.problems
        ]
        assert found.total(f"{side}_text") == sum(int(c.is_text.sum()) for c in coded)
        assert found.total(f"{side}_faithful") == sum(int((c.faithful & c.is_text).sum()) for c in coded)


def test_what_a_normaliser_changed_is_counted():
    lower = reader("byte_level_lower")
    found = build_windows([Document("THE QUICK BROWN FOX jumps"), Document("The cat sat.")], theirs=lower)
    assert 0 < found.total("teacher_faithful") < found.total("teacher_text")
    assert found.total("student_faithful") == found.total("student_text")


def test_a_sequence_in_every_way(monkeypatch):
    monkeypatch.setattr(dataset, "BATCH_CHARS", 200)
    found, each = build_windows(), by_hand()
    assert_same(list(found), each)
    assert_same(found[3:40:5], each[3:40:5])
    assert_same([found[-1], found[np.int64(7)]], [each[-1], each[7]])
    for place in (len(each), -len(each) - 1):
        with pytest.raises(IndexError):
            found[place]
    assert batching.batch_order(found, 4, 3, 1) == batching.batch_order(each, 4, 3, 1)


def test_the_hash_is_of_the_content_and_not_of_its_pieces(monkeypatch):
    each = by_hand()
    wanted = dataset.WindowDataset.from_list(each).digest()
    for size in (1, 7):
        pieces = [pa.table(dataset.table_of(each[i : i + size])) for i in range(0, len(each), size)]
        assert dataset.WindowDataset(pa.concat_tables(pieces)).digest() == wanted
    assert build_windows().digest() == wanted
    ids, labels = each[5].student_ids.copy(), each[5].student_labels.copy()
    ids[1] += 1
    labels[np.flatnonzero(labels != windowing.IGNORE)[0]] = windowing.IGNORE
    moved = [np.append(each[4].student_ids, each[5].student_ids[0]), each[5].student_ids[1:]]
    moved_labels = [np.append(each[4].student_labels, each[5].student_labels[0]), each[5].student_labels[1:]]
    for changes in (
        {5: {"student_ids": ids}},
        {5: {"student_labels": labels}},
        {5: {"teacher_ids": each[5].teacher_ids[::-1]}},
        {4 + i: {"student_ids": moved[i], "student_labels": moved_labels[i]} for i in (0, 1)},
    ):
        changed = [dataclasses.replace(w, **changes.get(i, {})) for i, w in enumerate(each)]
        assert dataset.WindowDataset.from_list(changed).digest() != wanted


def test_text_that_makes_no_window_is_an_empty_sequence(monkeypatch):
    monkeypatch.setattr(windowing, "cut_windows", lambda *given: [])
    for documents in ([Document("é")], []):
        for _ in range(2):
            found = build_windows(documents)
            assert (len(found), list(found), dataset.window_lengths(found).tolist(), found.total("num_bytes")) == (
                0,
                [],
                [],
                0,
            )
            assert list(found.labels("teacher")) == []


def test_only_what_takes_long_shows_a_bar(capfd, monkeypatch):
    datasets.enable_progress_bars()
    build_windows()
    assert capfd.readouterr().err == ""
    assert not datasets.are_progress_bars_disabled()
    monkeypatch.setattr(dataset, "PROGRESS_CHARS", 10)
    build_windows(max_length=30)
    assert "Tokenizing the dataset (cached)" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "1")
    build_windows(max_length=31)
    assert capfd.readouterr().err == ""
