"""What `kdlib doctor --show N` and `kdlib.preview` show of the training text."""

import json

import pytest

import kdlib
from kdlib import cli
from kdlib.config import Config
from kdlib.evaluation import preview

TALK = [{"role": "user", "content": "What is <b>?"}, {"role": "assistant", "content": "A café."}]


@pytest.fixture
def chat(settings, tmp_path):
    """Four documents; the second one is too long to have a window."""
    long = [{"role": "user", "content": "word " * 400}, TALK[1]]
    rows = [{"messages": TALK}, {"messages": long}, {"prompt": "2 + 2 = ", "completion": "4"}, {"text": "One."}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config.from_dict({**settings, "dataset": str(tmp_path / "chat.jsonl"), "max_length": 120})


def test_targets_of_both_sides_are_marked(chat):
    conversation, completion, text = kdlib.preview(chat, 5)
    assert conversation.source.endswith("chat.jsonl line 1") and completion.source.endswith("line 3")
    for example, before, target in (
        (conversation, "What is <b>?", "A café."), (completion, "2 + 2 = ", "4"), (text, "", "ne."),
    ):  # fmt: skip
        for side, runs in example.sides.items():
            assert [learned for _, learned in runs] == [False, True, False][: len(runs)], side
            assert before.strip() in runs[0][0] and target in runs[1][0]
    assert len(kdlib.preview(chat, 1)) == 1


def test_it_is_text_with_colours_or_marks_and_html(chat):
    shown = preview.preview(chat, 1)
    ((before, _), (target, _), *_) = shown[0].student
    plain, coloured, page = repr(shown), shown.text(colours=True), shown._repr_html_()
    assert f"{before}⟦{target}⟧" in plain and "\033" not in plain
    assert f"\033[2m{before}\033[0m\033[32m{target}\033[0m" in coloured
    assert "What is &lt;b&gt;?" in page and "<b>?" not in page
    assert page.count(preview.STYLES[True]) == 2


def test_what_is_left_out_is_shown_first(chat, tmp_path):
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [TALK[0], {**TALK[1], "<weight>": 1}]}))
    shown = preview.preview(chat, 1)
    assert repr(shown).startswith("Left out: the message field <weight> in 1 record (first: ")
    assert shown._repr_html_().startswith("<p>Left out: the message field &lt;weight&gt; in 1 record")


def test_the_command_needs_no_models(chat, capsys, monkeypatch):
    monkeypatch.setattr("kdlib.models.loading.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    flags = [f"--{name}={getattr(chat, name)}" for name in ("teacher", "student", "dataset", "max_length")]
    assert cli.main(["doctor", *flags, "--show", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- student") == shown.count("--- teacher") == 2
    for count in ("0", "all", "-1"):
        assert cli.main(["doctor", *flags, "--show", count]) == 2
        assert f"--show takes a number of documents, got '{count}'" in capsys.readouterr().err
