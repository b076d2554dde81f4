import json

import datasets
import pytest

from kdlib import corpus


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
    plain, chat = corpus.read_documents(str(tmp_path / "a.jsonl"), "body")
    assert (plain.text, plain.messages) == ("plain", ())
    assert (chat.text, chat.messages) == ("", (("user", "Hi"), ("assistant", "Ho")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\nnope\n', "line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "line 1 holds a list"),
        ("a.jsonl", '{"body": "x"}\n', "record 1 has no field 'text'; it has body; set --text-field"),
        ("a.jsonl", '{"text": 3}\n', "field 'text' is int, expected a text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', "hold no answer"),
        ("a.jsonl", '{"messages": [{"role": "assistant"}]}\n', "needs a role and a content"),
        ("a.jsonl", "", "holds no text"),
        ("a.txt", " \n\n ", "holds no text"),
        ("a.txt", b"\xff\xfe\x00x", "is not UTF-8 text"),
        ("a.parquet", "nonsense", "is not a parquet file"),
    ],
)
def test_what_does_not_load_is_an_error_that_names_it(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        corpus.read_documents(str(tmp_path / name))


@pytest.mark.parametrize("source", ["nowhere.txt", "./nowhere", "nowhere", "*.nothing"])
def test_a_missing_file_is_named(source):
    with pytest.raises(ValueError, match=r"no such file or folder|no file matches"):
        corpus.read_documents(source)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="holds no file that ends in"):
        corpus.read_documents(str(tmp_path))


def test_an_id_that_the_loader_refuses_is_told_in_one_line(monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"dataset 'owner/name' does not load: no route$"):
        corpus.read_documents("owner/name")


def test_an_id_goes_to_the_loader_with_its_configuration(monkeypatch):
    asked = []

    def load(name, configuration, split):
        asked.append((name, configuration, split))
        return [{"text": "hello"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert corpus.read_documents("owner/name:small")[0].text == "hello"
    assert asked == [("owner/name", "small", "train")]


def test_documents_are_held_out_by_their_content():
    documents = [corpus.Document(f"Text {i}") for i in range(200)]
    train, validation, test = corpus.split_documents(documents)
    assert len(validation) == len(test) == 10
    assert len({d.text for d in train + validation + test}) == 200
    again = corpus.split_documents(documents[::-1])
    assert {d.text for d in test} == {d.text for d in again[2]}


def test_too_few_documents_are_refused():
    with pytest.raises(ValueError, match="3 different documents, too few to hold any out"):
        corpus.split_documents([corpus.Document(str(i)) for i in range(3)])
    with pytest.raises(ValueError, match="eval_dataset has 1 document"):
        corpus.halve([corpus.Document("x")])


def test_copies_of_a_document_stay_on_one_side():
    documents = [corpus.Document(f"Text {i % 50}") for i in range(200)]
    train, validation, test = corpus.split_documents(documents)
    held = {d.text for d in validation} | {d.text for d in test}
    assert held
    assert not held & {d.text for d in train}
    assert not {d.text for d in validation} & {d.text for d in test}
