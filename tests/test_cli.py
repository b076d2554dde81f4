"""Bad input: one line that names it, exit status 2, nothing written. Good input: the files of the contract."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import tokenizers
import torch
import transformers
from families import byte_level, tiny_model, word_piece

from kdlib import cli, demo


def flags(settings, **changes):
    values = {**settings, **changes}
    return [
        word
        for name, value in values.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def is_progress(line):
    """Whether a line is one of those that a long piece of work shows: here that of a busy machine."""
    return re.fullmatch(r"(loading|reading|tokenizing|the teacher|fingerprinting) .*\[.*\]", line) is not None


def refused(capsys, words, match, out):
    before = sorted(str(p) for p in out.parent.rglob("*"))
    assert cli.main([*words, "--out", str(out)]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(match, said), said
    assert [line for line in said.splitlines() if not is_progress(line)] == said.splitlines()[-1:]
    assert sorted(str(p) for p in out.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kd_wight": 1}, r"unknown key '--kd-wight'; did you mean '--kd_weight'\?"),
        ({"batch_size": "many"}, "batch_size takes a whole number, got 'many'"),
        ({"kd_method": "magic"}, "unknown kd_method 'magic'"),
        ({"dataset": "missing.txt"}, "no such file or folder: missing.txt"),
        ({"dataset": None}, "dataset is missing"),
        ({"text_field": "body"}, r"without the field body or a known form \(fields: text\)"),
        ({"teacher": "nowhere"}, "teacher 'nowhere': cannot load its configuration"),
        ({"batch_size": 400}, "the training text makes .* windows of 48 tokens, one optimizer step takes 400"),
        ({"amp_dtype": "fp16"}, "amp_dtype fp16 needs a CUDA GPU"),
        ({"check_teacher": "true"}, "above the unigram cross-entropy"),
    ],
)
def test_bad_input_is_told_in_one_line(capsys, settings, tmp_path, changes, match):
    if "fp16" in match and torch.cuda.is_available():
        pytest.skip("this machine has a card")
    refused(capsys, ["distill", *flags(settings, **changes)], match, tmp_path / "out")


def test_empty_text_is_refused(capsys, settings, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    changed = flags(settings, dataset=tmp_path / "empty.txt")
    refused(capsys, ["distill", *changed], "contains no text", tmp_path / "out")


def test_text_shorter_than_a_window_is_refused(capsys, settings, tmp_path):
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": f"Hi {i}"}) + "\n" for i in range(6)))
    changed = flags(settings, dataset=tmp_path / "short.jsonl", batch_size=8)
    refused(capsys, ["distill", *changed], "the training text makes 4 windows", tmp_path / "out")


def test_an_encoder_as_teacher_is_refused(capsys, settings, tmp_path):
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    byte_level().save_pretrained(tmp_path / "bert")
    changed = flags(settings, teacher=tmp_path / "bert")
    refused(capsys, ["distill", *changed], "is a BertForMaskedLM; expected a causal language model", tmp_path / "out")


def test_a_model_folder_without_tokenizer_is_refused(capsys, settings, tmp_path):
    tiny_model(byte_level()).save_pretrained(tmp_path / "bare")
    changed = flags(settings, student=tmp_path / "bare")
    refused(capsys, ["distill", *changed], "student .* cannot load its tokenizer", tmp_path / "out")


def test_tokenizers_with_nothing_in_common_are_refused(capsys, settings, tmp_path):
    words = {word: i for i, word in enumerate(["<unk>", "猫", "犬", "鳥"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    foreign = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
    demo.save(tiny_model(foreign), foreign, tmp_path / "foreign")
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<unk>": 0, "cat": 1, "dog": 2, "mat": 3}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    english = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
    demo.save(tiny_model(english), english, tmp_path / "english")
    changed = flags(settings, teacher=tmp_path / "english", student=tmp_path / "foreign")
    refused(capsys, ["distill", *changed], "no token in common", tmp_path / "out")


def test_a_folder_that_holds_something_is_refused(capsys, settings, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    refused(capsys, ["distill", *flags(settings)], "holds other files; give a new folder", tmp_path / "notes")
    (tmp_path / "notes" / "config.json").write_text('{"model_type": "llama"}')
    refused(capsys, ["distill", *flags(settings)], "holds other files; give a new folder", tmp_path / "notes")
    (tmp_path / "notes" / "config.json").write_text('{"kd_method": "projector"}')
    never = ["distill", *flags(settings), "--resume", "never"]
    refused(capsys, never, "holds another run; give a new folder", tmp_path / "notes")
    (tmp_path / "file").write_text("x")
    refused(capsys, ["distill", *flags(settings)], "is a file; give a folder", tmp_path / "file")


def test_a_read_only_folder_is_refused(capsys, settings, tmp_path, monkeypatch):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    if os.geteuid() == 0:  # root may write anywhere: say what the system says to others
        monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(locked))
    refused(capsys, ["distill", *flags(settings)], "can't be written: .* is read-only", locked / "out")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["distil"], r"unknown command 'distil'; did you mean 'distill'\?"),
        (["distill"], "--out DIR is missing"),
        (["distill", "--out"], "--out needs a value"),
        (["distill", "a.json", "b.json", "--out", "x"], "takes one CONFIG.json"),
        (["distill", "missing.json", "--out", "x"], "cannot read the config missing.json: No such file"),
        (["demo", "extra", "--out", "x"], "unexpected 'extra'"),
        (["report"], "report takes one run folder"),
        (["report", "missing"], "missing is not a run folder"),
        (["evaluate", "--teacher", "x"], "student is missing"),
    ],
)
def test_bad_commands_are_told_in_one_line(capsys, words, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    said = capsys.readouterr().err
    assert len([line for line in said.splitlines() if not is_progress(line)]) == 1
    assert match.replace("\\", "") in said
    assert not list(tmp_path.iterdir())


def test_help_lists_every_key(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "--kd_method 'byte_prefix'" in said
    assert "Weight of the distillation loss; " in said


def test_distill_writes_exactly_the_files_of_the_contract(capsys, settings, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**settings, "max_steps": 99}))
    out = tmp_path / "run"
    assert cli.main(["distill", str(config), "--max-steps", "3", "--out", str(out)]) == 0
    assert {p.name for p in out.iterdir()} == {
        "config.json", "data.json", "env.json", "records.jsonl", "status.json", "checkpoints", "student", "verdict.json",
        "report.html", "figures",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["max_steps"] == 3
    status = json.loads((out / "status.json").read_text())
    assert {k: status[k] for k in ("state", "step", "max_steps", "sessions")} == {
        "state": "complete", "step": 3, "max_steps": 3, "sessions": 1,
    }  # fmt: skip
    said = capsys.readouterr()
    assert "bits per byte" in said.out
    assert "control" in said.err
    assert "left" in said.err


def test_a_preset_is_a_flag_and_keys_beside_it_win(capsys, settings, tmp_path):
    words = flags(settings, preset="documents", kd_temperature=2, control="off", max_steps=2)
    assert cli.main(["distill", *words, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["kd_temperature"], config["use_curriculum"], config["layerwise_weight"]) == (2.0, True, 0.27)
    refused(
        capsys, ["distill", *flags(settings, preset="paper")], "unknown preset 'paper'; have documents", tmp_path / "no"
    )


def test_a_tokenizer_that_changes_the_text_is_told(capsys, settings, tmp_path):
    tokenizer = word_piece()
    demo.save(tiny_model(tokenizer), tokenizer, tmp_path / "lower")
    changed = flags(settings, student=tmp_path / "lower", control="off")
    assert cli.main(["distill", *changed, "--out", str(tmp_path / "run")]) == 0
    assert "The student's tokenizer changes the text" in capsys.readouterr().out
    assert "changes the text: only" in (tmp_path / "run" / "report.html").read_text()


def test_evaluate_compares_two_models_on_a_text(capsys, settings, monkeypatch):
    words = flags({k: settings[k] for k in ("teacher", "student", "dataset", "max_length")})
    assert cli.main(["evaluate", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["teacher"]["kl_to_teacher"] == 0.0
    assert found["student"]["bits_per_byte"] > 1.0
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["evaluate", *words]) == 0
    said = capsys.readouterr()
    assert f"{found['student']['bits_per_byte']:.4f}" in said.out
    assert "both write samples" in said.err
    assert cli.main(["evaluate", *words[:5], "nowhere.jsonl"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("kdlib: no such file")


def test_a_failure_of_the_doctor_points_at_no_run(capsys, settings, monkeypatch):
    from kdlib import doctor

    monkeypatch.setattr(doctor, "run_checks", None)
    assert cli.main(["doctor", *flags({k: settings[k] for k in ("teacher", "student", "dataset")})]) == 1
    told = capsys.readouterr().err
    assert "kdlib: doctor failed" in told
    assert "status.json" not in told


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, ZeroDivisionError])
def test_a_failure_while_training_exits_1_and_says_why(capsys, settings, tmp_path, monkeypatch, kind):
    from kdlib.session import experiment

    def break_down(*_, **__):
        raise kind("the card is on fire")

    monkeypatch.setattr(experiment, "TrainLoop", break_down)
    assert cli.main(["distill", *flags(settings), "--out", str(tmp_path / "run")]) == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", f"{kind.__name__}: the card is on fire")


@pytest.mark.parametrize(("signals", "step"), [(["SIGINT"], 3), (["SIGTERM"], 3), (["SIGINT", "SIGINT"], 1)])
def test_a_command_that_is_asked_to_stop_says_where_it_goes_on(capsys, settings, tmp_path, monkeypatch, signals, step):
    """By the signal that Ctrl-C sends, once or twice: exit status 0, and the same command goes on."""
    from kdlib.training import loop

    real = loop.TrainLoop._gradients

    def interrupted(self, *given):
        if self.step == 2:
            for name in signals:
                os.kill(os.getpid(), getattr(signal, name))
        return real(self, *given)

    words = ["distill", *flags(settings, control="off"), "--out", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainLoop, "_gradients", interrupted)
        assert cli.main(words) == 0
    assert re.search(f"Paused: .*; resumes from step-0000000{step}.$", capsys.readouterr().out.strip())
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert f"Session 2 resumes from step-0000000{step}." in said
    assert "Student: " in said
    assert cli.main(words) == 0
    assert "Student: " in capsys.readouterr().out


def test_a_plan_over_several_sessions_is_told():
    told = {"steps_per_s": 2.5, "tokens_left": 1_234_567, "left_s": 5000.0, "finish": "2026-11-23", "session": 1}
    assert cli._plan_line({**told, "sessions_needed": 3}) == (
        "Plan: 2.50 steps/s, 1,234,567 tokens and 1 h 23 min remaining, 3 sessions in total; "
        "earliest finish 2026-11-23."
    )
    assert "remaining, all in this session;" in cli._plan_line({**told, "sessions_needed": 1})
    assert "sessions too short to finish" in cli._plan_line({**told, "sessions_needed": None})


def test_the_command_runs_as_a_process(tmp_path):
    def run(*words):
        return subprocess.run([sys.executable, "-m", "kdlib.cli", *words], capture_output=True, text=True, cwd=tmp_path)

    assert run("--help").returncode == 0
    wrong = run("distill", "--kd-metod", "x", "--out", "y")
    assert wrong.returncode == 2
    assert wrong.stderr == "kdlib: unknown key '--kd-metod'; did you mean '--kd_method'?\n"


def test_a_reader_that_has_seen_enough_is_no_failure():
    command = f"{sys.executable} -m kdlib.cli --help | head -n 1"
    ran = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("kdlib distils")
