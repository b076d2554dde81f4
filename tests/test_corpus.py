import csv
import gzip
import io
import json

import datasets
import pytest

from kdlib.config import Config
from kdlib.data import corpus, records

ROWS = [{"id": 1, "text": 'One, with a comma and "quotes".'}, {"id": 2, "text": "Two\nlines."}, {"id": 3, "text": "3"}]


def as_csv(delimiter):
    made = io.StringIO()
    writer = csv.DictWriter(made, ["id", "text"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return made.getvalue()


FORMS = {
    "a.jsonl": "\n".join(map(json.dumps, ROWS)),
    "lines.json": "\n".join(map(json.dumps, ROWS)) + "\n",
    "list.json": json.dumps(ROWS, indent=2),
    "a.csv": as_csv(","),
    "a.CSV": as_csv(","),
    "a.tsv": as_csv("\t"),
}


def test_text_with_form_feeds_is_many_documents(tmp_path):
    (tmp_path / "a.txt").write_text("\f".join(f"Document {i}." for i in range(25)))
    assert [d.text for d in corpus.read_documents(str(tmp_path / "a.txt"))] == [f"Document {i}." for i in range(25)]


def test_one_long_text_is_cut_at_blank_lines_and_nothing_is_lost(tmp_path):
    text = "\n\n".join(f"Paragraph {i}. " + "word " * 300 for i in range(60))
    (tmp_path / "a.txt").write_text(text)
    documents = corpus.read_documents(str(tmp_path / "a.txt"))
    assert len(documents) > 5
    assert "\n\n".join(d.text for d in documents) == text


def test_files_of_every_form_say_the_same(tmp_path):
    rows = [{"text": f"Text number {i}."} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(tmp_path / "b.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path / "splits"))
    expected = [row["text"] for row in rows]
    for name in ("a.jsonl", "b.parquet", "saved", "splits", "a.json*"):
        assert [d.text for d in corpus.read_documents(str(tmp_path / name))] == expected


def test_several_files_and_folders_add_up(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "more" / "b.jsonl").write_text('{"text": "two"}\n')
    (tmp_path / "more" / "c.txt").write_text("three")
    both = corpus.read_documents(f"{tmp_path / 'a.jsonl'}, {tmp_path / 'more'}")
    assert [d.text for d in both] == ["one", "two", "three"]


def test_another_field_and_conversations(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"body": "plain"}\n{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\n'
    )
    plain, chat = corpus.read_documents(str(tmp_path / "a.jsonl"), records.Fields(text="body"))
    assert (plain.text, plain.messages) == ("plain", ())
    assert (chat.text, chat.messages) == ("", (("user", "Hi"), ("assistant", "Ho")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\nnope\n',
            r"1 of 2 records of .*: 1 not JSON \(Expecting value\) \(first: .*a.jsonl line 2\)",
        ),
        ("a.jsonl", "[1]\n", "1 not an object with fields but a list"),
        ("a.jsonl", "[" * 100_000, r"1 not JSON \(nested too deeply\)"),
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "\\ud800 y"}\n',
            r"1 with the lone surrogate \\ud800 \(first: .*a.jsonl line 2\)",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "assistant", "content": "\\udfff"}]}\n',
            r"1 with the lone surrogate \\udfff",
        ),
        ("a.jsonl", '{"messages": 5}\n', "1 whose messages are a int, not a list"),
        ("a.jsonl", '{"messages": {"role": "assistant"}}\n', "1 whose messages are a dict, not a list"),
        ("a.jsonl", '{"text": null}\n', "1 whose text is null, not a string"),
        ("a.json", '[{"text": "x"}, null]', "1 not an object with fields but a NoneType"),
        ("a.jsonl", '{"text": "x"}\n\nnull\n', r"1 not an object .* a NoneType \(first: .*a.jsonl line 3\)"),
        ("a.json", '[{"text": "x"}, 3]', "1 not an object with fields but a int"),
        (
            "a.json",
            '{"data": [{"text": "x"}]}',
            r"1 without a known form \(fields: data\); name the fields with --text-field",
        ),
        ("a.json", '[{"text": "x"}', "a.json is not JSON"),
        ("a.json", '{"text": "x"}\n{"text"\n', r"1 not JSON \(Expecting ':' delimiter\)"),
        ("a.json", " \n", "a.json contains no text"),
        ("a.csv", "", "a.csv is not a valid table: Empty CSV file"),
        ("a.csv", "id,text\n", "a.csv contains no text"),
        ("a.csv", "id,body\n1,x\n", r"1 without a known form \(fields: id, body\)"),
        ("a.csv", "id,text\n1,x,y\n", "a.csv is not a valid table: CSV parse error"),
        ("a.csv", b"id,text\n1,\xe9t\xe9\n", r"a.csv is not UTF-8 text \(byte 10\)"),
        ("a.txt", b"M\0Z\0", r"is not UTF-8 text \(NUL at character 1\)"),
        ("a.txt", b"", "a.txt contains no text"),
        ("a.txt.gz", b"nonsense", "is not a valid gzip file"),
        ("a.txt.gz", gzip.compress(b"much text" * 99, mtime=0)[:-12], "is not a valid gzip file"),
        (
            "a.pdf",
            b"%PDF",
            "cannot read .*a.pdf: its name must end in .txt .md .jsonl .json .csv .tsv .parquet .arrow, or in .gz .zst",
        ),
        ("corpus", "words", "corpus: its name must end in"),
        ("a.jsonl", '{"body": "x"}\n', r"1 without a known form \(fields: body\)"),
        ("a.jsonl", '{"text": 3}\n', "1 whose text is int, not a string"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "1 without an answer"),
        ("a.jsonl", '{"messages": [{"role": "assistant"}]}\n', "1 with a message whose content is null"),
        ("a.jsonl", "", "contains no text"),
        ("a.txt", " \n\n ", "contains no text"),
        ("a.txt", b"\xff\xfe\x00x", "is not UTF-8 text"),
        ("a.parquet", "nonsense", "is not a parquet file"),
    ],
)
def test_what_does_not_load_is_an_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as refused:
        corpus.read_documents(str(tmp_path / name))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_a_table_is_read_as_records_and_never_as_one_text(tmp_path, name, packed):
    content = FORMS[name].encode("utf-8-sig")
    path = tmp_path / (name + ".gz" * packed)
    path.write_bytes(gzip.compress(content, mtime=0) if packed else content)
    assert [d.text for d in corpus.read_documents(str(path))] == [row["text"] for row in ROWS]
    assert [d.text for d in corpus.read_documents(str(tmp_path))] == [row["text"] for row in ROWS]


def test_one_object_is_one_record(tmp_path):
    (tmp_path / "a.json").write_text('{\n "text": "one"\n}')
    assert [d.text for d in corpus.read_documents(str(tmp_path / "a.json"))] == ["one"]


def test_a_record_of_a_csv_may_be_longer_than_a_block_of_its_reader(tmp_path):
    text = "word " * 500_000
    (tmp_path / "a.csv").write_text(f"text,id\nshort,1\n{text},2\n")
    assert corpus.read_documents(str(tmp_path / "a.csv"))[1].text == text


def test_a_text_of_digits_is_a_text(tmp_path):
    (tmp_path / "a.csv").write_text("id,text\n1,007\n2,1.50\n")
    assert [d.text for d in corpus.read_documents(str(tmp_path / "a.csv"))] == ["007", "1.50"]


def test_a_text_may_be_packed(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"One\r\ntext.", mtime=0))
    assert [d.text for d in corpus.read_documents(str(tmp_path / "a.txt.gz"))] == ["One\ntext."]


def test_of_a_mixed_folder_the_known_files_are_read(tmp_path):
    for name, content in {
        "a.txt": "one",
        "b.bin": "\0",
        "c.pdf": "%PDF",
        ".hidden.txt": "no",
        ".git/x.txt": "no",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "folder.txt").mkdir()
    assert [d.text for d in corpus.read_documents(str(tmp_path))] == ["one"]


@pytest.mark.parametrize("table", ["train.csv", "train.jsonl"])
def test_what_is_about_a_data_set_is_no_part_of_it(tmp_path, table):
    about = ["README.md", "README_en.md", "LICENSE.txt", "licence.txt", "dataset_infos.json", "dataset-metadata.json"]
    for name in about:
        (tmp_path / name).write_text("{}")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / table).write_text({"c": "text\none\n", "j": '{"text": "one"}\n'}[table[6]])
    (tmp_path / "noticeable.txt").write_text("two")
    assert [d.text for d in corpus.read_documents(str(tmp_path))] == ["one", "two"]
    (tmp_path / "more" / table).unlink()
    texts = [d.text for d in corpus.read_documents(str(tmp_path))]
    assert sorted(texts) == ["two", *["{}"] * 4]  # without tables they may be all there is


def test_a_folder_without_a_known_file_is_refused_by_name(tmp_path):
    for i in range(7):
        (tmp_path / f"{i}.bin").write_text("x")
    with pytest.raises(ValueError, match=r"ends in .*; it has 0.bin, 1.bin, 2.bin, 3.bin, 4.bin and 2 more$"):
        corpus.read_documents(str(tmp_path))


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    assert [d.text for d in corpus.read_documents("~/a.txt")] == ["one"]
    assert [d.text for d in corpus.read_documents("~/*.txt")] == ["one", "two"]
    with pytest.raises(ValueError, match=r"no such file or folder: ~/c\.txt"):
        corpus.read_documents("~/c.txt")


@pytest.mark.parametrize("kind", ["arrow", "dict"])
def test_a_saved_data_set_that_is_broken_is_told_in_one_line(tmp_path, kind):
    (tmp_path / {"arrow": "dataset_info.json", "dict": "dataset_dict.json"}[kind]).write_text("{}")
    with pytest.raises(ValueError, match="is not a valid saved dataset") as refused:
        corpus.read_documents(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "source", ["nowhere.txt", "nowhere.csv.gz", "./nowhere", "~/nowhere", "a/b/c", "nowhere", "*.nothing"]
)
def test_a_missing_file_is_named(source):
    with pytest.raises(ValueError, match=r"no such file or folder|no file matches"):
        corpus.read_documents(source)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="has no file that ends in"):
        corpus.read_documents(str(tmp_path))


def test_an_id_that_the_loader_refuses_is_told_in_one_line(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    said = "no such file or folder, and loading it from the Hugging Face Hub failed: no route"
    for name in ("owner/name", "imdb"):
        with pytest.raises(ValueError, match=f"^dataset '{name}': {said}$"):
            corpus.read_documents(name)


def test_an_id_goes_to_the_loader_with_its_configuration(monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return [{"text": "hello"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    for name in ("owner/name:small", "imdb"):
        assert corpus.read_documents(name)[0].text == "hello"
    assert asked == [("owner/name", "small", "train"), ("imdb", None, "train")]


def test_documents_are_held_out_by_their_content():
    documents = [corpus.Document(f"Text {i}") for i in range(200)]
    train, validation, test = corpus.split_documents(documents)
    assert len(validation) == len(test) == 10
    assert len({d.text for d in train + validation + test}) == 200
    again = corpus.split_documents(documents[::-1])
    assert {d.text for d in test} == {d.text for d in again[2]}


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="3 distinct documents; at least 4 are needed"):
        corpus.split_documents([corpus.Document(str(i)) for i in range(3)])
    with pytest.raises(ValueError, match="eval_dataset has 1 distinct document"):
        corpus.halve([corpus.Document("x")])


def test_copies_of_a_document_stay_on_one_side():
    documents = [corpus.Document(f"Text {i % 50}") for i in range(200)]
    train, validation, test = corpus.split_documents(documents)
    held = {d.text for d in validation} | {d.text for d in test}
    assert held
    assert not held & {d.text for d in train}
    assert not {d.text for d in validation} & {d.text for d in test}


def test_a_part_of_a_data_set_is_chosen_by_content(tmp_path):
    """The same documents in their order, wherever they stand; held-out text has no limit."""
    rows = [f'{{"text": "Text {i}."}}\n' for i in range(100)]
    (tmp_path / "a.jsonl").write_text("".join(rows))
    (tmp_path / "b.jsonl").write_text("".join(reversed(rows)))
    config = Config(dataset=str(tmp_path / "a.jsonl"), eval_dataset=str(tmp_path / "a.jsonl"), max_documents=30)
    part, other = (corpus.documents_of(config.replace(dataset=str(tmp_path / name))) for name in ("a.jsonl", "b.jsonl"))
    assert len(part) == 30 and list(part) == list(reversed(other))
    assert part.report.lines() == ["Read 100 texts.", "Uses 30 of them (max_documents)."]
    assert [d for d in corpus.documents_of(config.replace(max_documents=0)) if d in set(part)] == list(part)
    for limit in (0, 100, 1000):
        whole = corpus.documents_of(config.replace(max_documents=limit))
        assert len(whole) == 100 and not whole.report.choice
    assert len(corpus.documents_of(config, "eval_dataset")) == 100
