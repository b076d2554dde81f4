import dataclasses
import json

import pytest

from kdlib import budget, config, records
from kdlib.config import Config

SPEC_KEYS = {
    "teacher", "student", "dataset", "text_field", "max_length",
    "batch_size", "grad_accumulation", "epochs", "max_steps", "learning_rate",
    "projector_learning_rate", "warmup", "kd_method", "kd_divergence", "kd_temperature",
    "kd_weight", "lm_weight", "label_smoothing", "loss_chunk_size", "amp_dtype",
    "eval_steps", "log_steps", "early_stopping_patience", "control", "seed",
}  # fmt: skip


def test_keys_keep_their_names():
    assert {name for name, _ in config.flags()} >= SPEC_KEYS


def test_json_round_trip(tmp_path):
    made = Config(teacher="a", student="b", dataset="c", kd_weight=0.25, control="off")
    (tmp_path / "c.json").write_text(json.dumps(made.to_dict()))
    assert Config.from_json(tmp_path / "c.json") == made


def test_is_frozen_and_flat():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 3
    assert all(isinstance(value, (str, int, float, bool)) for value in Config().to_dict().values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kd_wieght": 1.0}, r"unknown key 'kd_wieght'; did you mean 'kd_weight'\?"),
        ({"zzzzz": 1}, "unknown key 'zzzzz'; have teacher, student"),
        ({"batch_size": "eight"}, "batch_size takes a whole number, got 'eight'"),
        ({"batch_size": 2.5}, "batch_size takes a whole number, got 2.5"),
        ({"batch_size": True}, "batch_size takes a whole number, got True"),
        ({"batch_size": 0}, "batch_size is 0; it must lie between 1 and"),
        ({"learning_rate": float("nan")}, "learning_rate takes a number, got nan"),
        ({"kd_method": "shared_vocabulary"}, r"unknown kd_method .*; have .* did you mean 'shared_vocab'\?"),
        ({"kd_divergence": "kl"}, "unknown kd_divergence 'kl'; have forward_kl"),
        ({"control": "ful"}, r"did you mean 'full'\?"),
        ({"check_teacher": 1}, "check_teacher takes true or false, got 1"),
        ({"lm_weight": 0.0, "kd_weight": 0.0}, "nothing would be learned"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(values, message):
    with pytest.raises(ValueError, match=message) as caught:
        Config.from_dict(values)
    assert "\n" not in str(caught.value)


def test_hyphens_and_whole_numbers_are_accepted():
    assert Config.from_dict({"kd-weight": 1}).kd_weight == 1.0


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [("batch_size", "8", 8), ("max_steps", "1e3", 1000), ("learning_rate", "3e-4", 3e-4), ("check_teacher", "No", False),
     ("teacher", "7", "7")],
)  # fmt: skip
def test_flags_are_read_by_their_type(name, text, value):
    assert config.parse_flag(name, text) == value


@pytest.mark.parametrize(("name", "text"), [("batch_size", "many"), ("check_teacher", "maybe"), ("learning_rate", "")])
def test_flags_that_mean_nothing_are_refused(name, text):
    with pytest.raises(ValueError, match=f"{name} takes"):
        config.parse_flag(name, text)


def test_every_key_is_explained():
    from kdlib import cli

    for name, _ in config.flags():
        assert f"--{name} " in cli._keys()


def test_durations_for_people():
    assert [budget.spoken(s) for s in (8.2, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 05 min"]


def test_json_is_written_beside_and_renamed(tmp_path, monkeypatch):
    target = tmp_path / "status.json"
    records.write_json(target, {"state": "running"})
    renamed = []
    monkeypatch.setattr(records.os, "replace", lambda a, b: renamed.append((a.name, b.name)))
    records.write_json(target, {"state": "complete"})
    assert renamed == [("status.json.tmp", "status.json")]
    assert records.read_json(target) == {"state": "running"}


def test_records_are_lines_and_a_torn_last_one_is_left_out(tmp_path):
    file = records.Records(tmp_path / "records.jsonl")
    file.append({"kind": "train", "loss": float("nan")})
    file.append({"kind": "eval", "text": "ü"})
    with open(file.path, "a") as torn:
        torn.write('{"kind": "tra')
    assert records.read_records(file.path) == [{"kind": "train", "loss": None}, {"kind": "eval", "text": "ü"}]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"kind": 1}\nnonsense\n{"kind": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        records.read_records(tmp_path / "records.jsonl")
