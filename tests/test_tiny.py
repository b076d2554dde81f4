"""The embedded default: text that every Python has, split without leaks, made the same every time."""

import json

import pytest
from families import LINES

from kdlib import demo


@pytest.fixture(scope="module")
def texts():
    return demo.docstrings()


def test_the_standard_library_has_enough_to_say(texts):
    assert len(texts) > 200
    assert sum(map(len, texts.values())) > 1_000_000
    assert not any("/test/" in f"/{module}" or "site-packages" in module for module in texts)
    assert "Return" in texts["json/__init__.py"] or "JSON" in texts["json/__init__.py"]


def test_no_docstring_stands_in_two_modules(texts):
    seen = [part for text in texts.values() for part in {text}]
    assert len(set(seen)) == len(seen)


def test_held_out_modules_are_seen_by_nobody_and_the_students_text_is_scarce(texts):
    teacher, student, held = map(set, demo.split(texts))
    assert not teacher & held
    assert student < teacher
    assert teacher | held == set(texts.values())
    assert 200_000 <= sum(map(len, student)) < 300_000
    assert 50_000 < sum(map(len, held)) < 400_000


def test_tokenizers_are_made_the_same_every_time(texts):
    """On a quarter of the text; and on a few lines, where the trainer has characters to spare."""
    lines = demo.split(texts)[0][::4]
    for make, size in ((demo.unigram, demo.STUDENT["vocab"]), (demo.byte_level_bpe, demo.TEACHER["vocab"])):
        first, second = (json.loads(make(lines, size).backend_tokenizer.to_str()) for _ in range(2))
        assert first == second
    assert len({demo.unigram(LINES, 400).backend_tokenizer.to_str() for _ in range(9)}) == 1


def test_a_half_made_default_is_never_taken_for_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "docstrings", lambda *_: {f"m{i}.py": LINES[i % 6] + f" {i}" for i in range(400)})
    monkeypatch.setitem(demo.TEACHER, "vocab", 320)
    monkeypatch.setitem(demo.STUDENT, "vocab", 400)
    making = demo.prepare(tmp_path, steps=3)
    for _what, done, _total in making:
        if done == 2:
            break
    making.close()
    assert not demo.is_ready(tmp_path)
    told = list(demo.prepare(tmp_path, steps=3))
    assert demo.is_ready(tmp_path)
    assert [(done, total) for what, done, total in told if "teacher" in what] == [(1, 3), (2, 3), (3, 3)]
    home = demo.folder(tmp_path)
    assert {p.name for p in home.iterdir()} == {"teacher", "student", "train.jsonl", "held_out.jsonl", "complete.json"}
    config = demo.config(tmp_path, max_steps=7)
    assert (config.max_steps, config.control, config.kd_method) == (7, "full", "byte_prefix")


def test_of_two_processes_one_makes_the_default_and_the_other_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "docstrings", lambda *_: {f"m{i}.py": LINES[i % 6] + f" {i}" for i in range(400)})
    monkeypatch.setitem(demo.TEACHER, "vocab", 320)
    monkeypatch.setitem(demo.STUDENT, "vocab", 400)
    monkeypatch.setattr(demo, "WAIT_S", 0.01)
    first, second = demo.prepare(tmp_path, steps=2), demo.prepare(tmp_path, steps=2)
    assert next(first)[0] == "reading the standard library's docstrings"
    assert [next(second)[0] for _ in range(2)] == ["waiting for another process to build the demo"] * 2
    assert len(list(first)) == 3
    assert list(second) == []
    assert demo.is_ready(tmp_path)


def test_a_small_form_takes_as_much_text_as_it_is_given_from_all_over(texts):
    some = demo.docstrings(150_000)
    size = sum(map(len, some.values()))
    assert 150_000 <= size < 150_000 + max(map(len, texts.values()))
    assert len(some) < len(texts) / 3
    assert len({module.split("/")[0][0] for module in some}) > 5  # not the first letters of the alphabet
    assert some == demo.docstrings(150_000)


def test_a_small_form_is_made_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_CACHE", str(tmp_path))
    monkeypatch.setattr(demo, "docstrings", lambda chars: {f"m{i}.py": LINES[i % 6] + f" {i}" for i in range(400)})
    monkeypatch.setitem(demo.TEACHER, "vocab", 320)
    monkeypatch.setitem(demo.STUDENT, "vocab", 400)
    config = demo.demo_config(2, 5000, 10_000, max_steps=9)
    assert config.max_steps == 9
    assert str(tmp_path) in config.teacher
    monkeypatch.setattr(demo, "prepare", None)
    assert demo.demo_config(2, 5000, 10_000, max_steps=9) == config
