"""The table of the real pair's study, from records written out; and one run of it on a toy pair."""

import json
import sys

import pytest

from benchmarks import real_pair


def run(method, seed, bits, rate=1e-4, steps=30, validation=1.0):
    values = {"method": method, "rate": rate, "seed": seed, "steps": steps, "validation": validation}
    return {**values, "test": sum(bits) / 300, "bits": bits, "num_bytes": [100, 200]}


def test_a_gain_is_the_mean_over_seeds_of_bits_saved_on_the_same_text():
    plain = [run("none", 0, [100.0, 300.0]), run("none", 1, [110.0, 310.0])]
    distilled = [run("byte_prefix", 0, [90.0, 280.0]), run("byte_prefix", 1, [70.0, 290.0])]
    text = real_pair.gain_text(plain, distilled)  # 30 and 60 of 300 bytes: 0.1 and 0.2, so the standard error is 0.05
    assert text == f"+0.1500 ({0.15 - 12.706 * 0.05:+.4f} to {0.15 + 12.706 * 0.05:+.4f})"
    assert real_pair.gain_text(plain[:1], distilled[:1]) == "+0.1000"


def test_the_table_has_a_row_for_each_method_rate_and_number_of_steps():
    records = [run("byte_prefix", 0, [90.0, 280.0]), run("none", 0, [100.0, 300.0]), run("none", 1, [100.0, 300.0])]
    lines = real_pair.table([*records, run("none", 0, [1.0, 2.0], rate=2e-4)]).splitlines()
    assert [line.split(" | ")[:5] for line in lines[2:]] == [
        ["| none", "0.0001", "30", "0", "2"], ["| byte_prefix", "0.0001", "30", "0", "1"],
        ["| none", "0.0002", "30", "0", "1"],
    ]  # fmt: skip
    assert "+0.1000" in lines[3] and lines[2].endswith("|  |")
    adapted = [{**record, "lora_rank": 16} for record in records]
    assert real_pair.table(adapted).splitlines()[2:] == [
        line.replace("| 30 | 0 |", "| 30 | 16 |") for line in lines[2:4]
    ]


@pytest.mark.slow
def test_a_study_of_a_toy_pair_makes_no_run_twice(settings, tmp_path, monkeypatch, capsys):
    out = tmp_path / "runs.jsonl"
    words = [settings["teacher"], settings["student"], settings["dataset"], "--out", str(out), "--steps", "2"]
    words += ["--seeds", "0", "1", "--max-length", "64", "--eval-tokens", "60", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["real_pair", *words])
    real_pair.main()
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["method"], r["seed"]) for r in records] == [
        ("none", 0),
        ("byte_prefix", 0),
        ("none", 1),
        ("byte_prefix", 1),
    ]
    assert all(len(r["losses"]) == 2 and r["test"] > 0 for r in records)
    monkeypatch.setattr(real_pair, "train", lambda *_: pytest.fail("trained again"))
    real_pair.main()
    assert "| byte_prefix | 0.0001 | 2 | 0 | 2 |" in capsys.readouterr().out
