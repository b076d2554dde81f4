import dataclasses
import json

import pytest

from kdlib import cli, clock, config, files
from kdlib.config import Config, parse_flag
from kdlib.session import run_folder

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
        ({"zzzzz": 1}, "unknown key 'zzzzz'; have teacher, teacher_cache, student"),
        ({"batch_size": "eight"}, "batch_size takes a whole number, got 'eight'"),
        ({"batch_size": 2.5}, "batch_size takes a whole number, got 2.5"),
        ({"batch_size": True}, "batch_size takes a whole number, got True"),
        ({"batch_size": 0}, "batch_size is 0; it must lie between 1 and"),
        ({"learning_rate": float("nan")}, "learning_rate takes a number, got nan"),
        ({"kd_method": "shared_vocabulary"}, r"unknown kd_method .*; have .* did you mean 'shared_vocab'\?"),
        ({"kd_divergence": "kl"}, "unknown kd_divergence 'kl'; have forward_kl"),
        ({"control": "ful"}, r"did you mean 'full'\?"),
        ({"teacher_device": "gpu1"}, "unknown teacher_device 'gpu1'; have auto, cpu, cuda:0, cuda:1, ..."),
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
    for name, _ in config.flags():
        assert f"--{name} " in cli.config_help()


def test_durations_for_people():
    assert [clock.format_duration(s) for s in (8.2, 200, 7500)] == ["8 s", "3 min 20 s", "2 h 05 min"]


def test_json_is_written_beside_and_renamed(tmp_path, monkeypatch):
    target = tmp_path / "status.json"
    files.write_json(target, {"state": "running"})
    renamed = []
    monkeypatch.setattr(run_folder.os, "replace", lambda a, b: renamed.append((a.name, b.name)))
    files.write_json(target, {"state": "complete"})
    assert renamed == [("status.json.tmp", "status.json")]
    assert files.read_json(target) == {"state": "running"}


def test_records_are_lines_and_a_torn_last_one_is_left_out(tmp_path):
    file = run_folder.Records(tmp_path / "records.jsonl")
    file.append({"kind": "train", "loss": float("nan")})
    file.append({"kind": "eval", "text": "ü"})
    with open(file.path, "a") as torn:
        torn.write('{"kind": "tra')
    assert files.read_records(file.path) == [{"kind": "train", "loss": None}, {"kind": "eval", "text": "ü"}]


def test_a_bad_line_in_the_middle_is_named(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"kind": 1}\nnonsense\n{"kind": 2}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        files.read_records(tmp_path / "records.jsonl")


def test_a_preset_stands_for_its_values_and_those_beside_it_win():
    found = Config.from_dict({"preset": "documents", "kd-temperature": 2.0})
    assert (found.kd_temperature, found.label_smoothing, found.use_curriculum, found.kd_weight) == (
        2.0,
        0.1,
        True,
        0.47,
    )
    assert Config.from_dict(found.to_dict()) == found
    with pytest.raises(ValueError, match="unknown preset 'document'; have documents; did you mean 'documents'"):
        Config.from_dict({"preset": "document"})


def test_balance_takes_off_auto_or_shares():
    assert Config().target_shares() is None
    assert sum(Config(balance="auto").target_shares().values()) == pytest.approx(1.004)
    assert Config(balance="kd=0.5, lm=0.25").target_shares() == {"kd": 0.5, "lm": 0.25}
    with pytest.raises(ValueError, match="expected off, auto, or shares like"):
        Config(balance="on")
    with pytest.raises(ValueError, match="balance names 'kdd'; did you mean 'kd'"):
        Config(balance="kdd=1")
    with pytest.raises(ValueError, match="a share is above 0"):
        Config(balance="kd=-1")


def test_the_control_config_has_no_teacher():
    control = Config.from_dict({"preset": "documents", "balance": "auto", "kd_top_k": 5}).control_config()
    assert not control.needs_teacher
    assert (control.lm_weight, control.label_smoothing, control.use_curriculum, control.balance) == (
        1.0,
        0.1,
        False,
        "off",
    )
    assert Config(kd_method="none", layerwise_weight=0.1).needs_teacher


def test_the_chunk_size_is_a_number_or_auto():
    assert Config().loss_chunk_size == parse_flag("loss_chunk_size", "auto") == "auto"
    assert parse_flag("loss_chunk_size", "64") == 64
    for wrong in ("some", 2.5, True):
        with pytest.raises(ValueError, match="loss_chunk_size takes a whole number or auto"):
            Config(loss_chunk_size=wrong)
    with pytest.raises(ValueError, match="must lie between 1"):
        Config(loss_chunk_size=0)
    with pytest.raises(ValueError, match="takes a whole number or auto"):
        parse_flag("loss_chunk_size", "much")


def test_top_k_of_likelihoods_is_refused():
    with pytest.raises(ValueError, match="compares none"):
        Config(kd_method="chunk_likelihood", kd_top_k=8)


def test_template_arguments_are_literals_or_strings():
    text = "enable_thinking=false, n=3,names=['a', 'b'],date_string=26 Jul 2024, note=a, b,none=None,empty="
    assert Config(template_kwargs=text).template_arguments() == {
        "enable_thinking": False, "n": 3, "names": ["a", "b"], "date_string": "26 Jul 2024", "note": "a, b", "none": None,
        "empty": "",
    }  # fmt: skip
    assert Config().template_arguments() == {}
    for wrong in ("thinking", "=1", "a b=1"):
        with pytest.raises(ValueError, match=r"expected name=value, like enable_thinking=false"):
            Config(template_kwargs=wrong)
    with pytest.raises(ValueError, match=r"template_kwargs sets tools, which kdlib sets itself$"):
        Config(template_kwargs="x=1,tools=[]")
    with pytest.raises(ValueError, match="sets strftime_now, which kdlib sets itself; set template_date"):
        Config(template_kwargs="strftime_now=x")


def test_the_date_of_templates_is_a_date():
    assert Config(template_date="2024-02-29").template_date == "2024-02-29"
    with pytest.raises(ValueError, match="unknown template_date '26 Jul'; have a date, as 2026-07-26"):
        Config(template_date="26 Jul")
    with pytest.raises(ValueError, match="template_date '2023-02-29' is no date: day is out of range"):
        Config(template_date="2023-02-29")
