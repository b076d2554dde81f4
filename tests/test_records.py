"""What the usual forms of records are read as, and what of them cannot be used."""

import json

import datasets
import numpy as np
import pyarrow
import pytest
import transformers
from families import byte_level, unigram

from kdlib import clock, demo, files
from kdlib.align import vocab
from kdlib.config import Config
from kdlib.data import corpus, records, tokenize
from kdlib.data.records import Fields
from kdlib.evaluation import pair_report, preview
from kdlib.session import cache_writer, inputs, session

USER, ANSWER = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURN = (("user", "2 + 2?"), ("assistant", "4"))
WITH_SYSTEM = (("system", "Be brief."), *TURN)
EARLIER = [USER, {"role": "assistant", "content": "Five."}, {"role": "user", "content": "Sure?"}]
EARLIER_TURNS = (("user", "2 + 2?"), ("assistant", "Five."), ("user", "Sure?"), ("assistant", "4"))


def text(content, prompt_length=0):
    return records.Document(content, prompt_length=prompt_length)


def chat(messages, prompt_length=0):
    return records.Document("", messages, prompt_length=prompt_length)


READ = {
    "text": ({"text": "One."}, "texts", text("One.")),
    "text beside other columns": ({"id": 3, "text": "One.", "meta": {"a": None}}, "texts", text("One.")),
    "messages": ({"messages": [USER, ANSWER]}, "conversations", chat(TURN)),
    "messages of a tool": (
        {"messages": [USER, {"role": "tool", "content": "4"}, ANSWER]},
        "conversations", chat((TURN[0], ("tool", "4"), TURN[1])),
    ),
    "messages before the text": ({"text": "no", "messages": [USER, ANSWER]}, "conversations", chat(TURN)),
    "messages as JSON": ({"messages": json.dumps([USER, ANSWER])}, "conversations", chat(TURN)),
    "contents of parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": x} for x in ("2 + ", "2?")]}, ANSWER]},
        "conversations", chat(TURN),
    ),
    "a system column": ({"system": "Be brief.", "messages": [USER, ANSWER]}, "conversations", chat(WITH_SYSTEM)),
    "two system messages": ({"system": "no", "messages": [SYSTEM, USER, ANSWER]}, "conversations", chat(WITH_SYSTEM)),
    "a blank system column": ({"system": "", "messages": [USER, ANSWER]}, "conversations", chat(TURN)),
    "null messages beside a text": ({"messages": None, "text": "One."}, "texts", text("One.")),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]},
        "ShareGPT conversations", chat(TURN),
    ),
    "ShareGPT with a system": (
        {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "2 + 2?"},
                           {"from": "gpt", "value": "4"}]},
        "ShareGPT conversations", chat(WITH_SYSTEM),
    ),
    "conversations with roles": ({"conversations": [USER, ANSWER]}, "ShareGPT conversations", chat(TURN)),
    "conversation, one": ({"conversation": [USER, ANSWER]}, "ShareGPT conversations", chat(TURN)),
    "prompt and completion": (
        {"prompt": "2 + 2 = ", "completion": "4"}, "prompts and completions", text("2 + 2 = 4", 8),
    ),
    "prompt and completion of messages": (
        {"prompt": [USER], "completion": [ANSWER]}, "prompts and completions", chat(TURN, 1),
    ),
    "prompt with a system column": (
        {"system": "Be brief.", "prompt": EARLIER, "completion": [ANSWER]},
        "prompts and completions", chat((WITH_SYSTEM[0], *EARLIER_TURNS), 4),
    ),
    "prompt with an earlier answer": (
        {"prompt": EARLIER, "completion": [ANSWER]}, "prompts and completions", chat(EARLIER_TURNS, 3),
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "2 + 2", "output": "4"}, "Alpaca instructions",
        chat((("user", "Add.\n\n2 + 2"), ("assistant", "4"))),
    ),
    "Alpaca without an input": (
        {"instruction": "2 + 2?", "input": "", "output": "4"}, "Alpaca instructions", chat(TURN),
    ),
    "Alpaca with a null input": ({"instruction": "2 + 2?", "input": None, "output": "4"}, "Alpaca instructions", chat(TURN)),
    "Alpaca with its text": (
        {"instruction": "2 + 2?", "input": "", "output": "4", "text": "Below is"}, "Alpaca instructions", chat(TURN),
    ),
    "Dolly": (
        {"instruction": "Add.", "context": "2 + 2", "response": "4", "category": "x"}, "Dolly instructions",
        chat((("user", "Add.\n\n2 + 2"), ("assistant", "4"))),
    ),
    "question and answer": ({"question": "2 + 2?", "answer": "4"}, "questions and answers", chat(TURN)),
    "a text with a question": ({"text": "One.", "question": "2 + 2?", "answer": "4"}, "texts", text("One.")),
    "OpenOrca": (
        {"id": "a", "system_prompt": "Be brief.", "question": "2 + 2?", "response": "4"}, "questions and responses",
        chat(WITH_SYSTEM),
    ),
    "MetaMath": ({"query": "2 + 2?", "response": "4", "type": "x"}, "queries and responses", chat(TURN)),
    "problem and solution": ({"problem": "2 + 2?", "solution": "4"}, "problems and solutions", chat(TURN)),
    "FLAN": ({"inputs": "2 + 2?", "targets": "4"}, "inputs and targets", chat(TURN)),
    "chosen messages": (
        {"chosen": [USER, ANSWER], "rejected": [USER, EARLIER[1]]}, "preferences (the chosen answers)", chat(TURN),
    ),
    "prompt, and chosen messages with it": (
        {"prompt": "2 + 2?", "chosen": [USER, ANSWER], "rejected": []}, "preferences (the chosen answers)", chat(TURN),
    ),
    "prompt and chosen messages": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [ANSWER]}, "preferences (the chosen answers)", chat(TURN, 1),
    ),
    "prompt and chosen text": (
        {"prompt": "2 + 2 = ", "chosen": "4", "rejected": "5"}, "preferences (the chosen answers)", text("2 + 2 = 4", 8),
    ),
    "chosen text": ({"chosen": "Human: 2?", "rejected": "no"}, "preferences (the chosen answers)", text("Human: 2?")),
}  # fmt: skip
UNUSABLE = {
    "blank text": ({"text": " \n"}, "whose text is blank"),
    "null text": ({"text": None}, "whose text is null, not a string"),
    "a list of texts": ({"text": ["One."]}, "whose text is list, not a string"),
    "no field": ({}, r"without a known form \(fields: no fields\)"),
    "other fields": ({"body": "x", "n": 1}, r"without a known form \(fields: body, n\); name the fields with --text-field"),
    "no answer": ({"messages": [USER]}, r"without an answer \(role assistant\)"),
    "an answer in the prompt only": ({"prompt": EARLIER, "completion": [USER]}, "without an answer"),
    "a blank answer": ({"messages": [USER, {"role": "assistant", "content": " "}]}, "with a blank answer"),
    "a null content": ({"messages": [{"role": "user", "content": None}, ANSWER]}, "whose content is null, not a string"),
    "a tool call without a name": (
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]}, ANSWER]},
        "with a tool call without a name",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "with a content of type image",
    ),
    "no role": ({"messages": [{"content": "x"}, ANSWER]}, "with a message without a role"),
    "a message that is text": ({"messages": ["x", ANSWER]}, "with a message that is a str, not an object"),
    "messages that are no JSON": ({"messages": "[x"}, "whose messages are a string that is not JSON"),
    "no messages": ({"messages": []}, "whose messages are empty"),
    "a stranger": (
        {"conversations": [{"from": "function_call", "value": "x"}, {"from": "gpt", "value": "4"}]},
        "with a message from 'function_call'",
    ),
    "a stranger without a name": (
        {"conversations": [{"from": ["gpt"], "value": "4"}]}, r"with a message from \['gpt'\]",
    ),
    "an answer that is a record": ({"question": "x", "answer": {"text": ["4"]}}, "whose answer is dict, not a string"),
    "half a surrogate": ({"text": "\ud800"}, r"with the lone surrogate \\ud800"),
    "half a surrogate in an answer": ({"question": "x", "answer": "\udfff"}, r"with the lone surrogate \\udfff"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_the_usual_forms(name):
    row, form, document = READ[name]
    assert records.to_document(row, Fields(), "a 1") == (form, document)
    assert records.to_document(row, Fields(), "a 1")[1].source == "a 1"


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_used_says_why(name):
    row, reason = UNUSABLE[name]
    with pytest.raises(records.UnusableRecord, match=reason):
        records.to_document(row, Fields(), "a 1")


def test_fields_may_be_named():
    row = {"ask": "2 + 2 = ", "say": "4", "text": "no", "messages": [USER, ANSWER], "body": "One."}
    form, document = records.to_document(row, Fields(prompt="ask", completion="say"), "a")
    assert (form, document) == ("records with ask and say", text("2 + 2 = 4", 8))
    assert records.to_document(row, Fields(text="body"), "a") == ("texts in body", text("One."))
    assert records.to_document({"prompt": "a ", "say": "b"}, Fields(completion="say"), "a")[1] == text("a b", 2)
    with pytest.raises(records.UnusableRecord, match="without the field say"):
        records.to_document({"ask": "x"}, Fields(prompt="ask", completion="say"), "a")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_few_bad_records_are_skipped_counted_and_named(tmp_path):
    rows = [READ["question and answer"][0]] * 70 + [READ["ShareGPT"][0]] * 25
    rows[10:10] = [{"question": "x", "answer": ""}, {"question": "y", "answer": " "}, {"messages": [USER]}]
    documents = corpus.read_documents(write(tmp_path / "a.jsonl", rows))
    assert len(documents) == 95
    assert documents.report.lines() == [
        "Read 70 questions and answers.",
        "Read 25 ShareGPT conversations.",
        f"Skipped 3 records: 2 whose answer is blank (first: {tmp_path / 'a.jsonl'} line 11); "
        f"1 without an answer (role assistant) (first: {tmp_path / 'a.jsonl'} line 13).",
    ]
    assert documents.report.to_dict()["skipped"]["whose answer is blank"] == {
        "count": 2,
        "examples": [f"{tmp_path / 'a.jsonl'} line 11", f"{tmp_path / 'a.jsonl'} line 12"],
    }


def test_too_many_bad_records_are_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "One."}] * 9 + [{"text": ""}])
    with pytest.raises(
        ValueError, match=r"^1 of 10 records of .*a.jsonl cannot be used: 1 whose text is blank"
    ) as error:
        corpus.read_documents(path)
    assert str(error.value).endswith("line 10). At most 5% may be skipped (max_bad_records)")
    assert len(corpus.read_documents(path, max_bad_records=0.1)) == 9
    other = write(tmp_path / "b.jsonl", [{"text": "One."}] * 90)
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be used"):  # a large source does not hide a bad one
        corpus.read_documents(f"{other},{path}")


def test_only_the_commonest_reasons_are_printed(tmp_path):
    rows = [{f"field{i}": "x"} for i in range(9)] + [{"text": ""}] * 2
    documents = corpus.read_documents(write(tmp_path / "a.jsonl", [{"text": "One."}, *rows]), max_bad_records=1.0)
    _, line = documents.report.lines()
    assert line.startswith("Skipped 11 records: 2 whose text is blank (first: ") and line.endswith(
        "; 5 for other reasons."
    )
    assert line.count("without a known form") == 4
    assert len(documents.report.to_dict()["skipped"]) == 10


def test_compressed_and_arrow_files(tmp_path):
    content = b'{"text": "One."}\n{"text": "Two."}\n'
    for suffix, kind in corpus.PACKED.items():
        with pyarrow.output_stream(str(tmp_path / f"a.jsonl{suffix}"), compression=kind) as file:
            file.write(content)
        found = corpus.read_documents(str(tmp_path / f"a.jsonl{suffix}"))
        assert [document.text for document in found] == ["One.", "Two."]
    (tmp_path / "bad.jsonl.zst").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a valid zstd file"):
        corpus.read_documents(str(tmp_path / "bad.jsonl.zst"))
    datasets.Dataset.from_list([{"text": "One."}]).save_to_disk(str(tmp_path / "saved"))
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    assert corpus.read_documents(str(arrow.rename(tmp_path / "b.arrow")))[0].text == "One."
    (tmp_path / "c.arrow").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="is not a valid arrow file"):
        corpus.read_documents(str(tmp_path / "c.arrow"))


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train.jsonl", "test.jsonl", "validation.jsonl"], ["train.jsonl"]),
        (["data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"], ["data/train-00000-of-00001.jsonl"]),
        (["train/a.jsonl", "dev/a.jsonl", "more.jsonl"], ["more.jsonl", "train/a.jsonl"]),
        (["test.jsonl"], ["test.jsonl"]),
        (["latest.jsonl", "contest.jsonl", "training.jsonl"], ["contest.jsonl", "latest.jsonl", "training.jsonl"]),
    ],
)
def test_of_a_folder_with_splits_the_training_files_are_read(tmp_path, names, read):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"text": name}])
    assert [document.text for document in corpus.read_documents(str(tmp_path))] == read


def test_a_split_may_be_named(tmp_path, monkeypatch):
    splits = {name: datasets.Dataset.from_list([{"text": name}]) for name in ("train", "train_sft")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert corpus.read_documents(str(tmp_path / "saved"), split="train_sft")[0].text == "train_sft"
    with pytest.raises(ValueError, match="has no split 'test'; it has train, train_sft; set --dataset-split"):
        corpus.read_documents(str(tmp_path / "saved"), split="test")
    monkeypatch.setattr(datasets, "load_dataset", lambda name, configuration, split: [{"text": split}])
    assert corpus.read_documents("owner/name", split="train[:10%]")[0].text == "train[:10%]"


def reader_of(tokenizer):
    return tokenize.wrap_tokenizer(tokenizer, vocab.read_vocabulary(tokenizer))


@pytest.mark.parametrize("make", [byte_level, unigram])
def test_of_a_text_only_what_follows_the_prompt_is_learned(make):
    """As with trl's completion-only loss: the tokens of the prompt by itself have no labels."""
    tokenizer = make()
    prompt, completion = "What is the capital of France? ", "It is Paris."
    encoded = tokenize.encode(records.Document(prompt + completion, prompt_length=len(prompt)), reader_of(tokenizer))
    ids = tokenizer(prompt + completion, add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == ids
    offsets = tokenizer(prompt + completion, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    np.testing.assert_array_equal(encoded.learn, [start >= len(prompt) for start, _ in offsets])
    learned = "".join(
        (prompt + completion)[start:end] for (start, end), on in zip(offsets, encoded.learn, strict=True) if on
    )
    assert learned.strip() == completion


def test_of_a_conversation_only_answers_after_the_prompt_are_learned():
    tokenizer = byte_level()
    reader = reader_of(tokenizer)
    whole, last = (tokenize.encode(chat(EARLIER_TURNS, length), reader) for length in (0, 3))
    np.testing.assert_array_equal(whole.ids, last.ids)

    def learned(encoded):
        return tokenizer.decode(encoded.ids[encoded.learn])

    assert "Five." in learned(whole) and learned(whole).count("4") == 1
    assert "Five." not in learned(last) and learned(last).startswith("4")
    assert learned(whole).endswith(learned(last))


GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{% if messages|length > 3 %}{{ raise_exception('too long') }}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
)


def test_a_system_message_that_a_template_rejects_goes_in_front_of_the_users():
    document = chat((("system", "Be brief."), *TURN), 2)
    assert records.merge_system(document) == chat((("user", "Be brief.\n\n2 + 2?"), TURN[1]), 1)
    assert records.merge_system(chat((("system", " "), *TURN))) == chat(TURN)
    for messages in (TURN, (("system", "x"), TURN[1]), (("system", "x"),)):
        assert records.merge_system(chat(messages)) is None


def test_rejected_conversations_are_counted_and_named(settings, tmp_path):
    """One side's template has no system role: both read it merged. Two records can be read by neither."""
    student = transformers.AutoTokenizer.from_pretrained(settings["student"])
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["student"])
    student.chat_template = GEMMA
    demo.save(model, student, tmp_path / "student")
    rows = [{"messages": [SYSTEM, USER, {"role": "assistant", "content": f"It is {i}."}]} for i in range(98)]
    rows[40:40] = [{"messages": [*EARLIER, {"role": "assistant", "content": f"No, {i}."}]} for i in range(2)]
    write(tmp_path / "chat.jsonl", rows)
    config = Config.from_dict(
        {**settings, "student": str(tmp_path / "student"), "dataset": str(tmp_path / "chat.jsonl"), "max_length": 200,
         "eval_tokens": 60, "batch_size": 4, "max_steps": 1}
    )  # fmt: skip
    loaded = inputs.load(config)
    report = loaded.reports["dataset"]
    assert (report.num_records, report.num_rejected) == (100, 2)
    (reason,) = report.num_skipped
    assert reason.startswith("rejected: the chat template of") and reason.endswith(
        "rejects this conversation: too long"
    )
    assert report.examples[reason][0].endswith("chat.jsonl line 41") or report.examples[reason][0].endswith("line 42")
    with pytest.raises(
        ValueError, match=r"2 of 100 records of .*chat.jsonl cannot be used: 2 rejected: the chat template"
    ):
        inputs.load(config.replace(max_bad_records=0.01))
    records_on_disk = list(session.distill(config, tmp_path / "run"))
    assert records_on_disk[-1]["kind"] == "verdict"
    assert files.read_json(tmp_path / "run" / "data.json")["dataset"]["skipped"][reason]["count"] == 2
    assert "Records of dataset that were skipped: 2 rejected: " in (tmp_path / "run" / "report.html").read_text()


def test_targets_beyond_a_window_are_counted_and_a_length_is_named(settings, tmp_path):
    """Every tenth conversation has an answer that is cut."""

    def answer(i):
        return {"role": "assistant", "content": f"It is {i}. " + "word " * (60 if i % 10 == 0 else 2)}

    write(tmp_path / "chat.jsonl", [{"messages": [USER, answer(i)]} for i in range(100)])
    values = {**settings, "dataset": str(tmp_path / "chat.jsonl"), "max_length": 64, "eval_tokens": 60, "batch_size": 4}
    config = Config.from_dict({**values, "max_steps": 1})
    loaded = inputs.load(config)
    note = loaded.reports["dataset"].cut
    train = loaded.train
    documents = corpus.split_documents(corpus.documents_of(config))[0]
    encoded = [tokenize.encode(document, loaded.pair.student_reader) for document in documents]
    num_prefix = len(loaded.pair.student_reader.prefix_of(documents[0]))
    cut = [int(each.learn[64 - num_prefix :].sum()) for each in encoded]
    share = sum(cut) / sum(int(each.learn.sum()) for each in encoded)
    longest = num_prefix + max(map(len, encoded))
    assert 0 < sum(count > 0 for count in cut) <= 10 and train.total("cut_targets") == sum(cut)
    assert note == (
        f"{share:.1%} of the targets lie beyond max_length 64, in {sum(count > 0 for count in cut)} conversations, and are "
        f"not trained on; --max-length {longest} holds 99% of the documents."
    )
    assert loaded.reports["dataset"].lines()[-1] == note
    assert inputs.load(config.replace(max_length=longest)).reports["dataset"].cut == ""
    assert inputs.load(Config.from_dict(settings)).reports["dataset"].cut == ""
    far = {"messages": [{"role": "user", "content": "word " * 300}, USER, answer(0)]}
    write(tmp_path / "chat.jsonl", [{"messages": [USER, answer(i)]} for i in range(96)] + [far] * 4)
    note = inputs.load(config).reports["dataset"].cut
    assert int(note.split("--max-length ")[1].split()[0]) > 300


def test_parts_that_are_not_read_are_counted_and_named(tmp_path):
    weighted = {"messages": [{**USER, "weight": 0, "name": ""}, {**ANSWER, "weight": 1, "id": None, "lang": "en"}]}
    text_with_tools = {"text": "One.", "tools": [{"name": "add"}]}
    rows = [{"messages": [USER, ANSWER]}, weighted, weighted, text_with_tools, {"text": "Two.", "tools": []}]
    report = corpus.read_documents(f"{write(tmp_path / 'a.jsonl', rows)},{write(tmp_path / 'b.jsonl', rows)}").report
    assert report.unused_lines() == [
        f"Left out: the message field weight in 4 records (first: {tmp_path / 'a.jsonl'} line 2); the message field lang "
        f"in 4 records (first: {tmp_path / 'a.jsonl'} line 2); tools in 2 records (first: {tmp_path / 'a.jsonl'} line 4)."
    ]
    assert report.num_records == 10
    left_out = report.to_dict()["left_out"]
    assert left_out["tools"] == {
        "count": 2,
        "examples": [f"{tmp_path / name} line 4" for name in ("a.jsonl", "b.jsonl")],
    }
    assert len(left_out["the message field lang"]["examples"]) == records.EXAMPLES
    many = [{"messages": [USER, {**ANSWER, **{f"field{i}": 1 for i in range(7)}}]}]
    (line,) = corpus.read_documents(write(tmp_path / "c.jsonl", many)).report.unused_lines()
    assert line.count("in 1 record (first: ") == records.MAX_REASONS and line.endswith("; other parts (2).")


DATED = "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def dated(settings, tmp_path):
    """A run on conversations whose template prints the current date."""
    student = transformers.AutoTokenizer.from_pretrained(settings["student"])
    model = transformers.AutoModelForCausalLM.from_pretrained(settings["student"])
    student.chat_template = DATED
    demo.save(model, student, tmp_path / "student")
    rows = [{"messages": [USER, {"role": "assistant", "content": f"It is {i}."}]} for i in range(60)]
    for row in rows:
        row["messages"][1] |= {"thinking": "Hm.", "weight": 1}
    write(tmp_path / "chat.jsonl", rows)
    changed = {"student": str(tmp_path / "student"), "dataset": str(tmp_path / "chat.jsonl"), "max_length": 100}
    return Config.from_dict(
        {**settings, **changed, "eval_tokens": 60, "batch_size": 4, "max_steps": 3, "control": "off"}
    )


def test_later_sessions_print_the_date_of_the_first(dated, tmp_path, monkeypatch):
    def on(date):
        for module in (clock, session):
            monkeypatch.setattr(module, "today", lambda: date)

    on("2026-02-03")
    run = session.distill(dated, tmp_path / "run")
    while next(run)["kind"] != "train":
        pass
    run.close()
    assert files.read_json(tmp_path / "run" / "config.json")["template_date"] == "2026-02-03"
    on("2026-02-04")
    assert list(session.distill(dated, tmp_path / "run"))[-1]["kind"] == "verdict"
    assert list(session.distill(dated, tmp_path / "run"))[-1]["kind"] == "verdict"  # a complete run
    with pytest.raises(ValueError, match="template_date was '2026-02-03' and is '2026-02-05'"):
        list(session.distill(dated.replace(template_date="2026-02-05"), tmp_path / "run"))
    on("2026-02-05")
    assert files.read_json(tmp_path / "run" / "config.json")["template_date"] == "2026-02-03"
    with pytest.warns(UserWarning, match="prints the current date.* set template_date"):
        next(cache_writer.cache_teacher(dated, tmp_path / "cache"))


def test_what_templates_leave_out_is_in_the_reports_of_a_run(dated, tmp_path):
    assert list(session.distill(dated, tmp_path / "run"))[-1]["kind"] == "verdict"
    left_out = files.read_json(tmp_path / "run" / "data.json")["dataset"]["left_out"]
    sides = [f"reasoning_content (not in the {side}'s chat template)" for side in ("student", "teacher")]
    assert {part: entry["count"] for part, entry in left_out.items()} == dict.fromkeys(
        ["the message field weight", *sides], 60
    )
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Left out of dataset: the message field weight in 60 records; " in page
    shown = preview.preview(dated, 1).notes
    assert f"; {sides[0]} in 50 records (first: {tmp_path / 'chat.jsonl'} line 1); " in shown[0]
    findings = [finding for finding in doctor_findings(dated) if finding.name == "dataset"]
    assert sides[1] in findings[0].meaning and "check that the student" in findings[0].remedy


def doctor_findings(config):
    loaded = inputs.load(config)
    return [pair_report._data(key, report) for key, report in loaded.reports.items()]


def test_a_run_whose_templates_print_no_date_stores_none(settings, tmp_path):
    config = Config.from_dict({**settings, "max_steps": 1, "control": "off"})
    run = session.distill(config, tmp_path / "run")
    assert next(run)["kind"] == "start"
    run.close()
    assert files.read_json(tmp_path / "run" / "config.json")["template_date"] == ""
