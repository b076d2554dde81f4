"""Will it work here? Every finding in every state it knows, from plain facts about machines that are not here and from
small models that are; and what is foretold of time against what a run says of itself.
"""

import contextlib
import dataclasses
import json
import math
import types

import accelerate
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from families import byte_level, byte_level_lower, tiny_model, unigram, word_piece
from test_cli import flags
from test_memory import limited
from test_time import World

from kdlib import cli, demo, doctor, machine, memory, progress
from kdlib.align import vocab
from kdlib.clock import Clock, format_duration
from kdlib.config import Config
from kdlib.data import tokenize
from kdlib.evaluation import pair_report, scoring
from kdlib.models import devices
from kdlib.models.head import Head
from kdlib.report import findings
from kdlib.report.findings import Finding
from kdlib.session import cache_writer, checkpoint, forecast, inputs, session, time_budget
from kdlib.training import loop

GIB = 2**30
CU128 = ("sm_70", "sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
T4 = machine.Gpu("Tesla T4", int(14.6 * GIB), (7, 5), CU128, False)
A100 = machine.Gpu("NVIDIA A100-SXM4-40GB", int(39.4 * GIB), (8, 0), CU128, True)
P100 = machine.Gpu("Tesla P100-PCIE-16GB", int(15.9 * GIB), (6, 0), ("sm_60", *CU128), False)
DEAD = "a reduction failed: CUDA error: no kernel image is available for execution on the device"
TOLD = {
    "python": (3, 12, 4), "versions": {"kdlib": None, "torch": "2.10.0+cu128", "transformers": "5.16.0"}, "processors": 4,
    "memory_free": 20 * GIB, "memory_total": 29 * GIB, "disk_free": 19 * GIB, "disk_reserve": GIB, "image": None,
    "on_kaggle": False,
}  # fmt: skip


def machines(cards, asked="", told=(), **config):
    """Findings by name."""
    found = machine.check_machine({**TOLD, **dict(told)}, cards, Config.from_dict(config), asked)
    assert {finding.group for finding in found} == {"machine"}
    return {finding.name: finding for finding in found}


def test_two_t4s_train_in_fp16_with_the_teacher_on_the_second():
    found = machines([T4, T4], "NvidiaTeslaT4")
    assert {name: f.state for name, f in found.items()} == {
        "Python": "ok", "packages": "ok", "CPUs": "ok", "memory": "ok", "disk": "ok", "accelerator": "ok",
        "GPUs 0, 1": "ok", "kernels, GPUs 0, 1": "ok", "precision, GPUs 0, 1": "warning", "Triton, GPUs 0, 1": "ok",
        "teacher device": "ok",
    }  # fmt: skip
    assert found["GPUs 0, 1"].value == "Tesla T4, 14.6 GiB each, sm_75"
    assert found["precision, GPUs 0, 1"].value == "fp16"
    assert "no native bf16 (torch may report emulated" in found["precision, GPUs 0, 1"].meaning
    assert found["Triton, GPUs 0, 1"].value == "supported"
    assert found["teacher device"].value == "second GPU"
    assert found["accelerator"].value == "requested NvidiaTeslaT4, found 2 x Tesla T4"


def test_a_p100_that_became_two_t4s_is_said_out_loud():
    told = machines([T4, T4], "NvidiaTeslaP100")["accelerator"]
    assert (told.state, told.value) == ("warning", "requested NvidiaTeslaP100, found 2 x Tesla T4")
    for words in ("retired the P100 on 2026-09-15", "fp16 (amp_dtype auto)", "second GPU (teacher_device auto)"):
        assert words in told.meaning


def test_any_other_card_than_the_one_asked_for_is_said():
    told = machines([T4], "NvidiaTeslaA100")["accelerator"]
    assert told.state == "warning" and "not the requested GPU" in told.meaning and "second GPU" not in told.meaning
    assert "kdlib" not in machines([A100], "NvidiaL4")["accelerator"].meaning
    assert machines([A100], "NvidiaTeslaA100")["accelerator"].state == "ok"
    for asked, name in (
        ("NvidiaTeslaT4Highmem", "Tesla T4"),
        ("NvidiaL4X1", "NVIDIA L4"),
        ("NvidiaRtxPro6000", "RTX PRO 6000"),
    ):
        cards = [dataclasses.replace(T4, name=name)] * (2 if "T4" in name else 1)
        assert machines(cards, asked)["accelerator"].state == "ok"
    single = machines([T4], "NvidiaTeslaT4")["accelerator"]
    assert (single.state, single.meaning) == ("warning", "on Kaggle NvidiaTeslaT4 has 2 GPUs")
    assert "accelerator" not in machines([T4])


def test_a_p100_without_kernels_does_not_work_and_a_build_is_named():
    found = machines([dataclasses.replace(P100, kernels=CU128, failed=DEAD)])
    told = found["kernels, GPU 0"]
    assert (told.state, told.value) == ("error", "do not work")
    assert "no kernel image" in told.meaning and "sm_70 sm_75" in told.meaning and "without sm_60" in told.meaning
    assert "whl/cu126" in told.remedy and "before torch 2.15" in told.remedy
    assert found["Triton, GPU 0"].value == "not supported" and "never needs it" in found["Triton, GPU 0"].meaning
    assert "teacher device" not in found


def test_a_p100_with_kernels_works_in_fp16():
    found = machines([P100], "NvidiaTeslaP100")
    assert found["accelerator"].state == found["kernels, GPU 0"].state == "ok"
    assert (found["precision, GPU 0"].value, found["Triton, GPU 0"].value) == ("fp16", "not supported")


def test_kernels_that_are_not_listed_but_run_are_told():
    told = machines([dataclasses.replace(P100, kernels=CU128)])["kernels, GPU 0"]
    assert (told.state, "sm_60 is not among them" in told.meaning) == ("warning", True)
    newer = dataclasses.replace(A100, capability=(11, 0), failed=DEAD)
    assert "cu126" not in machines([newer])["kernels, GPU 0"].remedy
    odd = machines([dataclasses.replace(T4, failed="a backward pass returned 3.0, expected 4.0")])["kernels, GPU 0"]
    assert odd.state == "error" and "restart" in odd.remedy and "without" not in odd.meaning


def test_an_a100_computes_in_bf16():
    found = machines([A100])
    assert {f.state for f in found.values()} == {"ok"}
    assert found["precision, GPU 0"].value == "bf16"


def test_arithmetic_that_was_set_is_told():
    emulated = machines([T4], amp_dtype="bf16")["precision, GPU 0"]
    assert (emulated.state, emulated.remedy) == ("warning", "set amp_dtype to auto")
    assert machines([T4], amp_dtype="fp32")["precision, GPU 0"].value == "fp32 (configured)"
    assert machines([A100], amp_dtype="bf16")["precision, GPU 0"].state == "ok"


def test_cards_that_differ_are_told_apart_and_idle_ones_too():
    found = machines([T4, A100, T4])
    assert {"GPUs 0, 2", "GPU 1"} <= set(found)
    assert found["teacher device"].state == "warning" and "1 other GPUs stay idle" in found["teacher device"].meaning
    assert machines([T4, T4], teacher_device="cpu")["teacher device"].value == "cpu (configured)"


def test_no_card_means_the_processor():
    found = machines([])
    assert (found["GPU"].state, found["GPU"].remedy, "accelerator" in found) == ("warning", "", False)
    assert "CPU in fp32" in found["GPU"].meaning
    assert "T4 x2" in machines([], told={"on_kaggle": True})["GPU"].remedy
    asked = machines([], "NvidiaTeslaT4")["accelerator"]
    assert asked.state == "error" and "enable_gpu" in asked.remedy


@pytest.mark.parametrize(
    ("told", "name", "state", "words"),
    [
        ({"python": (3, 9, 1)}, "Python", "error", "use Python 3.10 to 3.13"),
        ({"python": (3, 14, 0)}, "Python", "warning", "tested on Python 3.10 to 3.13"),
        ({"python": (3, 13, 9)}, "Python", "ok", ""),
        ({"versions": {"torch": "2.5.1", "transformers": "5.0.0"}}, "packages", "error", 'pip install -U "torch>=2.6"'),
        ({"versions": {"torch": "2.6.0", "transformers": None}}, "packages", "error", '"transformers>=5.0"'),
        ({"versions": {"torch": "2.10.0", "transformers": "5.0.0rc1"}}, "packages", "ok", ""),
        ({"memory_free": GIB}, "memory", "warning", "little CPU memory is free"),
        ({"disk_free": GIB}, "disk", "error", "no checkpoint would be written"),
        ({"image": "gcr.io/x@sha256:1"}, "image", "ok", ""),
    ],
)
def test_the_machine_around_the_cards(told, name, state, words):
    found = machines([A100], told=told)[name]
    assert found.state == state
    assert words in found.meaning + found.remedy


@pytest.mark.parametrize(
    ("capability", "kernels", "runs"),
    [
        ((7, 5), CU128, True),
        ((6, 0), CU128, False),
        ((6, 1), ("sm_60",), True),
        ((8, 9), ("sm_80", "sm_90"), True),
        ((8, 0), ("sm_86",), False),
        ((9, 0), ("sm_90a",), True),
        ((9, 1), ("sm_90a",), False),
        ((10, 3), ("sm_100",), True),
        ((11, 0), CU128, False),
        ((11, 0), ("sm_90", "compute_90"), True),
        ((7, 5), ("compute_80",), False),
        ((11, 0), ("compute_90a",), False),
        ((9, 0), ("gfx90a", ""), False),
    ],
)
def test_which_kernels_run_on_which_card(capability, kernels, runs):
    assert machine.has_kernels(capability, kernels) == runs


def test_the_probe_really_runs_what_training_runs(monkeypatch):
    assert machine.probe("cpu") == ""
    assert "a matrix product failed" in machine.probe("meta")

    def none(*given, **named):
        raise RuntimeError("CUDA error: no kernel image is available\nCUDA kernel errors might be ...")

    for owner, name, what in (
        (torch.Tensor, "softmax", "a reduction"),
        (torch.autograd, "grad", "a backward pass"),
        (torch.Tensor, "float", "a backward pass in half precision"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, none)
            assert machine.probe("cpu") == f"{what} failed: CUDA error: no kernel image is available"
    monkeypatch.setattr(torch.autograd, "grad", lambda *given: (torch.zeros(2, 4),))
    assert machine.probe("cpu") == "a backward pass returned 0.0, expected 4.0"


def test_what_torch_says_of_cards_is_taken_over(monkeypatch):
    """bf16 by emulation is none."""
    told = types.SimpleNamespace(name="Tesla T4", total_memory=5, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: told)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75"])
    asked = []
    monkeypatch.setattr(machine, "probe", lambda device: asked.append(device) or "no")
    assert machine.list_gpus() == [machine.Gpu("Tesla T4", 5, (7, 5), ("sm_75",), False, "no")] * 2
    assert asked == ["cuda:0", "cuda:1"]


FOUND = [
    Finding("machine", "card", "a | b", "ok", "fine", number=1.5),
    Finding("pair", "ids", "<s>", "warning", "long " * 40, "do this"),
]


def test_findings_are_shown_as_text():
    lines = findings.text(FOUND).split("\n")
    assert lines[:2] == ["Machine", "  ok       card  a | b"]
    assert max(map(len, lines)) <= findings.WIDTH
    assert lines[2] == " " * 17 + "fine"
    assert " " * 17 + "Remedy: do this" in lines
    assert lines[-1] == "This works, with warnings: ids."
    assert findings.text(FOUND[:1]).endswith("\n\nThis works.")
    bad = Finding("memory", "peak", "9 GiB", "error", "", "less")
    assert findings.text([*FOUND, bad]).endswith("This will not work yet: peak. Apply the remedies above.")


def test_findings_are_shown_as_a_table():
    lines = findings.markdown(FOUND).split("\n")
    assert "| ok | card | a \\| b | fine |" in lines
    assert any(
        line.startswith("| **warning** | ids | &lt;s> | long") and "**Remedy:** do this |" in line for line in lines
    )
    assert all(line.replace("\\|", "").count("|") == 5 for line in lines[:-2])


def test_findings_are_plain_values():
    told = findings.to_json([*FOUND, Finding("memory", "x", "inf", number=math.inf)])
    assert (told["state"], told["sessions"]) == ("warning", [])
    assert told["machine"] == [
        {"name": "card", "value": "a | b", "state": "ok", "meaning": "fine", "remedy": "", "number": 1.5}
    ]
    assert told["memory"][0]["number"] is None
    assert [findings.overall_state(FOUND[:k]) for k in range(3)] == ["ok", "ok", "warning"]
    for state, remedy in (("error", ""), ("bad", "x")):
        with pytest.raises(AssertionError):
            Finding("pair", "x", "y", state, "", remedy)


@pytest.fixture(autouse=True)
def _no_card_here(monkeypatch):
    """As on a machine without one, whatever runs the tests."""
    monkeypatch.setattr(machine, "list_gpus", lambda: []) if torch.cuda.is_available() else None


def examined(settings, **changes):
    """Findings by name."""
    found = doctor.diagnose(Config.from_dict({**settings, **changes}))
    return {finding.name: finding for finding in found}


def test_the_pair_by_hand(settings):
    config = Config.from_dict({**settings, "max_steps": 4})
    found, loaded = examined(settings), inputs.load(config)
    pair = loaded.pair
    ours, theirs = (set(filter(None, side.vocabulary.tokens)) for side in (pair.student_reader, pair.teacher.reader))
    both = len(ours & theirs)
    assert found["shared vocabulary"].value.startswith(f"{both} tokens: ")
    assert found["shared vocabulary"].number == both / sum(t is not None for t in pair.student_reader.vocabulary.tokens)
    windows = pair.sample
    positions = sum(w.num_positions for w in loaded.train)
    assert found["aligned positions"].number == sum(len(w.student_rows) for w in loaded.train) / positions
    spans = [
        (a1 - a0, b1 - b0)
        for w in windows
        for a0, a1, b0, b1 in zip(w.student_rows, w.student_span_ends, w.teacher_rows, w.teacher_span_ends, strict=True)
        if a1 > a0
    ]
    assert found["one-to-one spans"].number == pytest.approx(spans.count((1, 1)) / len(spans))
    assert 0 < spans.count((1, 1)) < len(spans)
    assert found["kd chunk_likelihood"].number == len(spans) / sum(len(w.student_rows) for w in windows)
    shared = set(pair.shared.student_ids.tolist())
    labels = [w.student_labels[row] for w in windows for row in w.student_rows]
    ours = sum(label in shared for label in labels) / len(labels)
    assert found["kd shared_vocab"].value.startswith(f"{ours:.1%} of the student's and ")
    teachers = set(pair.shared.teacher_ids.tolist())
    labels = [w.teacher_labels[row] for w in windows for row in w.teacher_rows]
    theirs = sum(label in teachers for label in labels) / len(labels)
    assert found["kd shared_vocab"].number == pytest.approx(min(ours, theirs))
    assert f"from {24} to {16} dimensions" in found["kd projector"].value
    assert "kd byte_prefix, chosen" in found
    assert found["text preserved"].number == 1.0


def test_every_finding_of_a_small_pair(settings):
    found = examined(settings)
    assert {name: f.state for name, f in found.items() if f.group != "machine"} == {
        "dataset": "ok", "context": "ok", "ways to train": "ok",
        "shared vocabulary": "ok", "aligned positions": "ok", "one-to-one spans": "ok",
        "text preserved": "ok", "segmentation": "warning",
        "student's head": "ok", "teacher's head": "ok", "student's BOS and EOS": "ok",
        "teacher's BOS and EOS": "ok", "teacher's ids": "warning", "student's ids": "warning", "kd projector": "ok",
        "kd shared_vocab": "ok", "kd first_token": "ok", "kd byte_prefix, chosen": "ok", "kd chunk_likelihood": "ok",
        "recommended": "ok", "expected gain": "warning",
        "predicted peak": "ok", "steps per second": "ok", "finite numbers": "ok", "whole run": "ok", "sessions": "ok",
        "teacher passes": "ok",
        "disk for checkpoints": "ok",
    }  # fmt: skip
    assert found["student's head"].value.startswith("0 of ")
    assert found["student's BOS and EOS"].value == "<s>, </s>; adds <s> before a text, nothing after it"
    assert "no BOS, <|endoftext|>; adds nothing before" in found["teacher's BOS and EOS"].value
    assert "check_teacher is off" in found["teacher's ids"].meaning


def test_what_may_be_gained_is_a_share_of_what_lies_between(settings):
    config = Config.from_dict(settings)
    loaded = inputs.load(config)
    told = lambda bits, perplexity: types.SimpleNamespace(bits_per_byte=bits, perplexity=perplexity)  # noqa: E731
    found = {
        name: pair_report._prospect(loaded.pair, told(theirs, 9.0), told(ours, perplexity))
        for name, theirs, ours, perplexity in (
            ("apart", 1.5, 2.5, 9.0), ("same", 2.5, 2.5, 9.0), ("new", 1.5, 7.0, loaded.pair.head.num_rows),
        )
    }  # fmt: skip
    low, high = pair_report.SAVED
    assert found["apart"].number == pytest.approx(low)
    assert found["apart"].value.endswith(f"; {low:.2f} to {high:.2f} better")
    assert (found["same"].state, found["same"].number) == ("warning", 0.0)
    assert found["new"].number is None
    assert "close to random weights" in found["new"].value
    assert pair_report._advice(config).state == "ok"
    for changes in ({"kd_method": "projector"}, {"kd_weight": 0.3}, {"lm_weight": 0.5}):
        assert pair_report._advice(config.replace(**changes)).state == "warning"


def test_a_teacher_that_reads_a_text_again_is_better_read_from_a_cache(settings):
    settings = {**settings, "max_steps": 200, "teacher_cache": "live"}
    config, told = Config.from_dict(settings), examined({**settings, "repeats": 2})["teacher passes"]
    steps = config.max_steps * config.batch_size
    assert told.number == pytest.approx(2 * steps / len(inputs.load(config).train))
    assert told.remedy == "--teacher-cache auto"
    assert forecast.teacher_passes_finding(config, 1.9).state == "ok"
    assert forecast.teacher_passes_finding(config.replace(attention_weight=0.1), 5.0).state == "ok"
    for changes in ({"teacher_cache": "cache"}, {"kd_method": "none"}):
        assert forecast.teacher_passes_finding(config.replace(**changes), 5.0) is None


def test_a_run_whose_teacher_reads_first_is_looked_at_without_it(settings, monkeypatch, tmp_path):
    """Memory and time are those of steps from a cache; the reading itself is part of the plan's time."""
    settings, seen, told = {**settings, "max_steps": 200, "teacher_cache": "auto"}, [], {}
    monkeypatch.setattr(doctor, "TrainLoop", noting(doctor.TrainLoop, seen))
    plan_findings = forecast.plan_findings
    monkeypatch.setattr(
        forecast, "plan_findings", lambda *given: told.update(read_s=given[-1]) or plan_findings(*given)
    )
    found = examined(settings)
    assert [teacher.model for teacher in seen] == [None]
    assert found["teacher passes"].value.startswith("once, for ")
    assert found["steps per second"].state == "ok"
    assert told["read_s"] > 0
    assert "of teacher cache" in found["disk for checkpoints"].meaning
    live = examined(settings, teacher_cache="live")
    assert seen[-1].model is not None
    assert live["whole run"].number > 0
    more = found["disk for checkpoints"].number - live["disk for checkpoints"].number
    list(cache_writer.cache_teacher(Config.from_dict(settings), tmp_path / "cache"))
    assert more == pytest.approx(sum(p.stat().st_size for p in (tmp_path / "cache").glob("train-*")), rel=0.1)
    with_reading, without = (
        plan_findings(Config.from_dict(settings), 1.0, 8, time_budget.TimeBudget(1e6, Clock(), 0.0), read_s)[0].number
        for read_s in (50.0, 0.0)
    )
    assert with_reading == pytest.approx(without + 50.0)


def test_only_the_reading_of_training_text_is_longer_in_the_run(settings, monkeypatch):
    """A few windows in 7 s and held-out text in 2 and 3 s: the rest of the windows at the same pace."""
    config = Config.from_dict({**settings, "max_steps": 200, "teacher_cache": "auto", "batch_size": 4})
    loaded, clock = inputs.load(config), types.SimpleNamespace(time=0.0)
    clock.now = lambda: clock.time

    def run(self, seconds, started):
        yield {"bytes_a_position": 1.0}
        for kind, took in (("shard", 7.0), ("shard", 2.0), ("shard", 3.0), ("complete", 0.0)):
            clock.time += took
            yield {"kind": kind}

    monkeypatch.setattr(cache_writer.CacheWriter, "run", run)
    monkeypatch.setattr(doctor.teacher_cache, "CachedTeacher", lambda folders: None)
    examination = doctor.Examination(config, loaded, devices.accelerator("fp32"), clock, 5.0, 3.0, lambda *_: None)
    with examination.resources:
        examination._cache_first_windows()
    few = 4 * (doctor.NUM_STEPS + 2)
    assert examination.cache_s == pytest.approx(7.0 * len(loaded.train) / few + 2.0 + 3.0)


def noting(kind, seen):
    def made(objective, teacher, *rest):
        seen.append(teacher)
        return kind(objective, teacher, *rest)

    return made


def test_rows_without_a_token_are_counted():
    tokenizer = unigram()
    vocabulary = vocab.read_vocabulary(tokenizer)
    for more, state in ((0, "ok"), (30, "ok"), (200, "warning")):
        head = Head(tiny_model(tokenizer, vocab_size=len(tokenizer) + more), vocabulary)
        found = pair_report._rows("student", head)
        assert (found.state, found.number) == (state, more)
        assert found.value == f"{more} of {len(tokenizer) + more} rows have no token"
    gaps = dataclasses.replace(vocabulary, gaps=(7, 9))
    assert pair_report._rows("student", Head(tiny_model(tokenizer), gaps)).number == 2


def test_marks_around_a_text():
    def marks(side, tokenizer):
        return pair_report._marks(side, tokenize.wrap_tokenizer(tokenizer, vocab.read_vocabulary(tokenizer)))

    found = marks("student", word_piece())
    assert found.value == "no BOS, no EOS; adds [CLS] before a text, [SEP] after it"
    assert (found.state, found.remedy) == ("warning", "set eos_token in its tokenizer_config.json")
    assert marks("teacher", word_piece()).state == marks("student", byte_level()).state == "ok"


def test_little_in_common_is_told():
    few = vocab.SharedVocabulary(np.arange(5), np.arange(5), 0.04, 0.02)
    assert pair_report._shared(few).state == "warning"
    assert pair_report._shared(few).value == "5 tokens: 4.0% of the student's, 2.0% of the teacher's"
    assert (pair_report._coverage(0.3, "your text").state, pair_report._coverage(0.6, "a sample").state) == (
        "warning",
        "ok",
    )
    assert pair_report._one_to_one([], "a sample").number == 0.0
    rows, ours, theirs = np.array([0, 1, 4]), np.array([1, 1, 6]), np.array([1, 1, 5])  # the second begins no span
    window = types.SimpleNamespace(
        student_rows=rows, teacher_rows=rows, student_span_ends=ours, teacher_span_ends=theirs
    )
    assert pair_report._span_lengths([window]).tolist() == [[1, 1], [2, 1]]
    assert pair_report._one_to_one([window], "a sample").number == 0.5


def test_a_tokenizer_that_changes_the_text_is_told(settings, tmp_path):
    demo.save(tiny_model(byte_level_lower()), byte_level_lower(), tmp_path / "lower")
    told = examined(settings, teacher=str(tmp_path / "lower"))["text preserved"]
    assert told.state == "warning" and told.number < 1.0 and "% of the teacher's" in told.value


def score(nats):
    return scoring.Score(1.0, math.exp(nats), None, None, np.zeros(1), np.zeros(1))


@pytest.mark.parametrize(
    ("side", "nats", "refused", "state", "words"),
    [
        ("teacher", 3.0, True, "ok", ""),
        ("teacher", 9.0, True, "error", "probably another model's"),
        ("teacher", 9.0, False, "warning", "check_teacher is off"),
        ("teacher", math.nan, True, "error", "not finite"),
        ("student", 3.0, True, "ok", ""),
        ("student", 9.0, True, "warning", "expected for random weights"),
    ],
)
@pytest.mark.parametrize("sampled", [False, True])
def test_whether_ids_are_the_models_own(settings, side, nats, refused, state, words, sampled):
    loaded = inputs.load(Config.from_dict(settings))
    found = pair_report._ids(side, loaded, score(nats), refused, sampled)
    assert found.state == state and words in found.meaning
    if sampled:
        reader = loaded.pair.teacher.reader if side == "teacher" else loaded.pair.student_reader
        assert f"uniform cross-entropy {math.log(reader.vocabulary.num_rows):.2f}" in found.value
        return
    counts, held = np.ones(1000), []
    for window in loaded.train:
        for label in getattr(window, f"{side}_labels"):
            counts[label] += label >= 0
    counts = counts[
        : (loaded.pair.teacher.reader if side == "teacher" else loaded.pair.student_reader).vocabulary.num_rows
    ]
    for group in loaded.validation.windows:
        held += [label for window in group for label in getattr(window, f"{side}_labels") if label >= 0]
    bare = -sum(math.log(counts[label] / counts.sum()) for label in held) / len(held)
    assert f"unigram cross-entropy {bare:.2f}" in found.value


def test_a_method_with_little_to_go_by_is_told(settings):
    config = Config.from_dict({**settings, "kd_method": "shared_vocab"})
    pair = inputs.load(config).pair
    pair.buckets["shared_vocab"] = vocab.Buckets(np.full(1000, 3), np.zeros(1000, np.int64), np.arange(3))
    told = pair_report._method("shared_vocab", pair, config)
    assert (told.name, told.state, told.number) == ("kd shared_vocab, chosen", "warning", 0.0)
    assert pair_report._method("shared_vocab", pair, Config()).state == "ok"
    pair.shared = vocab.SharedVocabulary(np.arange(23), np.arange(23), 0.1, 0.1)
    assert pair_report._method("projector", pair, config).state == "warning"  # the teacher is 24 wide


@pytest.mark.parametrize(
    ("predicted", "there", "gradient_checkpointing", "way", "state", "words"),
    [
        (9, 12, False, "auto", "ok", "no gradient checkpointing"),
        (13, 15, False, "auto", "error", "a smaller batch_size"),
        (math.inf, 15, False, "off", "error", "gradient_checkpointing auto"),
        (9, 12, True, "auto", "warning", "it would not fit otherwise"),
        (9, 12, True, "on", "warning", "as set"),
        (9, 8, True, "auto", "error", "other programs leave 8.0 GiB"),
    ],
)
def test_the_height_against_what_there_is(predicted, there, gradient_checkpointing, way, state, words):
    config = Config(gradient_checkpointing=way)
    found = forecast.peak_finding(predicted * GIB, there * GIB, 12 * GIB, gradient_checkpointing, config)
    assert found.state == state and words in found.meaning + found.remedy
    assert found.value == ("more than 12.0 GiB" if math.isinf(predicted) else f"{predicted:.1f} GiB of 12.0 GiB")


def test_the_ways_to_train_and_what_each_takes():
    found = forecast.adapters_finding(20 * GIB, (9 * GIB, 5 * GIB), 8 * GIB)
    assert found.value == "in full 20.0 GiB, does not fit; LoRA of rank 16 9.0 GiB, does not fit; QLoRA 5.0 GiB, fits"
    assert "--lora-rank 16 --student-quantization 4bit for QLoRA" in found.meaning
    assert forecast.adapters_finding(math.inf, (math.inf, math.inf), GIB).value.startswith("in full too much, does not")


def test_a_window_longer_than_the_students_context_is_warned_of(settings):
    found = examined({**settings, "max_length": 600})["context"]
    assert (found.state, found.remedy) == ("warning", "--max-length 512")
    assert found.value == "max_length 600; student 512 tokens, teacher 512 tokens"


def test_what_takes_less_memory():
    every = forecast.remedies(None, Config(gradient_checkpointing="off"))
    for words in ("batch_size", "gradient_checkpointing auto", "max_length below 384", "cache", "8bit", "adamw_8bit"):
        assert words in every
    spent = Config(batch_size=1, teacher_cache="x", optimizer="adamw_8bit", lora_rank=4)
    assert forecast.remedies(None, spent) == "max_length below 384, or a smaller student"
    assert "lora_rank 16" in forecast.remedies(None, spent.replace(lora_rank=0))
    assert "quantization" not in forecast.remedies(None, Config(teacher_quantization="8bit"))
    told = "--batch-size 2 --grad-accumulation {} is predicted to fit{}"
    assert forecast.remedies(2, Config(batch_size=8, grad_accumulation=3)) == told.format(12, ", with the same result")
    assert forecast.remedies(2, Config(batch_size=5)) == told.format(2, "")


def test_a_batch_that_fits_is_found(settings, monkeypatch):
    """By halves, each foretold; and a run with it is told to fit."""
    settings = {**settings, "batch_size": 8, "loss_chunk_size": 8, "gradient_checkpointing": "off"}
    limited(monkeypatch, 10**12)
    sizes = {
        size: examined(settings, batch_size=size, grad_accumulation=8 // size)["predicted peak"].number
        for size in (8, 2)
    }
    assert sizes[2] < 0.9 * sizes[8]
    limited(monkeypatch, sizes[2])
    every = examined(settings)
    assert "steps per second" not in every
    found = every["predicted peak"]
    assert (found.state, found.number) == ("error", sizes[8])
    assert found.remedy.startswith("--batch-size 2 --grad-accumulation 4 is predicted")
    assert examined(settings, batch_size=2, grad_accumulation=4)["predicted peak"].state != "error"
    limited(monkeypatch, 1)
    assert "or a smaller student" in examined(settings)["predicted peak"].remedy


def test_layers_made_anew_are_told(settings, tmp_path, monkeypatch):
    demo.save(tiny_model(unigram(), 16, 6), unigram(), tmp_path / "student")
    settings = {**settings, "student": str(tmp_path / "student"), "batch_size": 8, "loss_chunk_size": 32}
    limited(monkeypatch, 10**12)
    plain, anew = (examined(settings, gradient_checkpointing=way)["predicted peak"].number for way in ("off", "on"))
    limited(monkeypatch, (plain + anew) / 2)
    found = examined(settings)["predicted peak"]
    assert (found.state, found.number) == ("warning", anew)


def test_a_teacher_with_a_card_of_its_own(settings):
    told = forecast.teacher_gpu_finding("cuda:1", used_bytes=2 * GIB, total_bytes=15 * GIB)
    assert (told.value, told.state) == ("2.0 GiB of 15.0 GiB in use on cuda:1", "ok")


@pytest.mark.parametrize("where", ["load", "step"])
def test_memory_that_runs_out_is_a_finding(settings, monkeypatch, where):
    def out(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    owner, name = (inputs, "load") if where == "load" else (loop.TrainLoop, "_gradients")
    monkeypatch.setattr(owner, name, out)
    found = examined(settings)
    assert found["available memory"].state == "error" and "smaller batch_size" in found["available memory"].remedy
    assert ("shared vocabulary" in found) == (where == "step") and "sessions" not in found


def test_a_batch_that_was_halved_is_told(settings, monkeypatch):
    real = loop.TrainLoop._gradients

    def tight(training, *given):
        if training.micro_batch > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(training, *given)

    monkeypatch.setattr(loop.TrainLoop, "_gradients", tight)
    found = examined(settings, batch_size=8)["micro-batch"]
    assert (found.value, found.state) == ("2 of 8", "warning")
    assert found.remedy.startswith("--batch-size 2 --grad-accumulation 4 ")


def step(**changes):
    record = loop.StepRecord(1, 1.0, {}, {}, 0.1, 1.0, 100, 2.0, {}, {}, None, "", 8, {})
    return dataclasses.replace(record, **changes)


def test_losses_that_are_no_numbers_are_told():
    good, scale = step(), step(skipped="gradient not finite at loss scale 65536, lowered (documents 3)")
    bad = step(skipped="kd not finite (documents 3)")
    assert forecast.numbers_finding([good, good], True).value == "2 of 2 steps"
    told = [forecast.numbers_finding([good, *more], scaled) for more, scaled in (([scale], True), ([scale, bad], True))]
    assert [(f.state, f.value) for f in told] == [("warning", "1 of 2 steps"), ("error", "1 of 3 steps")]
    assert told[1].meaning == bad.skipped
    assert forecast.numbers_finding([scale], False).state == "error"


def test_speed_is_for_a_step_of_the_texts_mean_length(settings, monkeypatch):
    """The first step does not count; time goes by tokens."""
    took = [step(num_tokens=10, step_s=50.0), step(num_tokens=40, step_s=3.0), step(num_tokens=60, step_s=2.0)]
    monkeypatch.setattr(doctor.Examination, "_timed_steps", lambda look: took)
    found = examined(settings, grad_accumulation=2)
    train_text = inputs.load(Config.from_dict(settings)).train
    mean = 4 * sum(len(w.student_ids) for w in train_text) / len(train_text)
    assert found["steps per second"].number == pytest.approx(1 / (5.0 / 100 * mean))
    assert found["steps per second"].meaning.startswith("2 steps, timed")


def test_few_steps_are_taken_where_they_are_slow(settings, monkeypatch):
    found = {}
    for seconds in (1.0, 25.0, 90.0):
        with monkeypatch.context() as patch:
            world = World(patch, step=seconds, load=0.0, evaluation=0.0)
            told = {f.name: f for f in doctor.diagnose(Config.from_dict(settings), clock=world)}
        found[seconds] = told["finite numbers"].value
    assert found == {1.0: "7 of 7 steps", 25.0: "3 of 3 steps", 90.0: "2 of 2 steps"}


def test_hours_and_sessions_by_hand():
    """Eleven hours, 100 s of them for the start: 600 steps of 100 s, 20 evaluations of 50 s, a control as long."""
    config = Config(max_steps=600, control="full", save_steps=10)
    known = time_budget.TimeBudget(11 * 3600.0, Clock(), 0.0, {"start": 100, "evaluate": 50, "test": 200}, {
        "save": 10, "export": 20, "conclude": 30
    })  # fmt: skip
    whole, sessions = forecast.plan_findings(config, 100.0, 1000.0, known)
    left = 2 * 600 * 100 * (1 + 10 / (10 * 100)) + 2 * 20 * 50 + 2 * 200 + 30
    assert whole.number == pytest.approx(left)
    assert whole.value == f"600 steps, {format_duration(left)}" and "an evaluation every 30 steps" in whole.meaning
    margin = 0.02 * 39600 + 2 * 100
    first = 39600 - 100 - 1.25 * (10 + 50 + 20) - margin
    later = 39600 - 1.25 * (100 + 10 + 50 + 20) - margin
    assert sessions.number == 1 + math.ceil((left - first) / later) == 4
    assert (sessions.state, sessions.value) == (
        "warning", "4 of 11 h 00 min each (time_budget is empty: a session has no limit)"
    )  # fmt: skip
    one = forecast.plan_findings(config.replace(max_steps=100, time_budget="11h"), 100.0, 1000.0, known)[1]
    assert (one.state, one.value) == ("ok", "1 of 11 h 00 min each")
    saving = forecast.plan_findings(config.replace(save_steps=0), 100.0, 1000.0, known)[0]
    assert saving.number == pytest.approx(left - 2 * 600 * 100 * (0.01 - 0.02))  # two in a hundred, at most
    for short, needed in ((50, 2), (-50, 1)):  # by how much the first session is too short: the start decides
        known.seconds = (left - short + 100 + 1.25 * (10 + 50 + 20) + 2 * 100) / 0.98
        assert forecast.plan_findings(config, 100.0, 1000.0, known)[1].number == needed
    known.seconds = 300.0
    none = forecast.plan_findings(config, 100.0, 1000.0, known)[1]
    assert (none.state, none.value.startswith("too short: 5 min")) == ("error", True)
    assert "off" not in (repeated := forecast.plan_findings(config.replace(repeats=3), 1.0, 1.0, known)[0]).value
    assert ", 3 times" in repeated.meaning


def by_tokens(patch):
    """A clock on which a step takes a fifth of a second for each token."""
    world, real = World(patch, step=0.0), loop.TrainLoop._gradients

    def gradients(training, taken, *given):
        world.time += 0.2 * sum(len(window.student_ids) for window in taken)
        return real(training, taken, *given)

    patch.setattr(loop.TrainLoop, "_gradients", gradients)
    return world


@pytest.mark.parametrize("more", [{}, {"control": "full", "use_curriculum": True}])
def test_what_is_foretold_is_what_the_run_says_of_itself(settings, tmp_path, monkeypatch, more):
    """By a clock on which every task takes its time."""
    settings = {**settings, "control": "off", "max_steps": 540, "eval_steps": 27, "eval_tokens": 150, **more}
    config = Config.from_dict({**settings, "time_budget": "1h"})
    monkeypatch.setattr(checkpoint, "SAVE_EVERY_S", 400.0)
    with monkeypatch.context() as patch:
        told = {f.name: f for f in doctor.diagnose(config, clock=by_tokens(patch))}
    *_, paused = session.distill(config, tmp_path / "run", clock=by_tokens(monkeypatch))
    plan = paused["plan"]
    assert told["steps per second"].number == pytest.approx(plan["steps_per_s"], rel=0.05)
    assert told["sessions"].number == plan["sessions_needed"] > 2
    done = paused["step"] / 540 / (2 if more else 1)
    assert (1 - done) * told["whole run"].number == pytest.approx(plan["left_s"], rel=0.1)


def test_a_session_without_an_end_is_told_on_kaggle():
    told = [forecast.sessions_finding(2, given, 39600.0, True) for given in ("", "11h")]
    assert [(f.state, f.remedy, f.value) for f in told] == [
        ("warning", "--time-budget 11h", "2 of 11 h 00 min each"), ("warning", "", "2 of 11 h 00 min each")
    ]  # fmt: skip
    assert forecast.sessions_finding(1, "", 39600.0, False).state == "ok"
    assert forecast.sessions_finding(None, "", 39600.0, True).state == "error"


def test_the_cost_of_reading_more_than_was_read_here(settings, monkeypatch):
    """40 tokens are read of 100 and 50 of 200; the run reads 80 and 200 of them."""
    config = Config.from_dict({**settings, "eval_tokens": 80})
    assert doctor.num_eval_tokens(config, {"validation": 100, "test": 200}) == [80, 200]
    assert doctor.num_eval_tokens(config, {"validation": 60, "test": 999}) == [60, 320]
    loaded = inputs.load(config)
    examination = doctor.Examination(config, loaded, devices.accelerator("fp32"), Clock(), 5.0, 3.0, lambda *_: None)
    loaded.held_out_tokens, loaded.validation, loaded.test = {"validation": 100, "test": 200}, 40, 50
    monkeypatch.setattr(doctor, "_num_tokens", lambda size: size)
    examination.budget.record("evaluate", 3.0)
    examination._estimate_costs(4.0)
    assert examination.budget.costs["evaluate"] == 3.0 * 2 and examination.budget.costs["test"] == 3.0 * 5
    assert examination.budget.costs["start"] == pytest.approx(5 + 3 * (280 / 90 - 1) + 5 * 4)
    changed = {}
    monkeypatch.setattr(inputs, "load", lambda config, *given: changed.update(config.to_dict()) or loaded)
    for more, eval_tokens in (({"eval_tokens": 9999}, doctor.READ_TOKENS), ({"eval_tokens": 90}, 90),
                              ({"eval_tokens": 9999, "teacher_cache": "x"}, 9999)):  # fmt: skip
        doctor._load(Config.from_dict({**settings, **more}), devices.accelerator("fp32"), Clock(), print)
        assert changed["eval_tokens"] == eval_tokens and not changed["check_teacher"]


def test_room_for_checkpoints():
    """100 + 200 bytes a checkpoint and two best students; a megabyte of all else in each."""
    sizes, meg = {"student": 100, "optimizer": 200}, 2**20
    one = 300 + 2 * 100 + meg
    states = {}
    for free in (3 * one + 200 + 50, 3 * one + 200 + 49, 2 * one + 200 + 50, 2 * one + 200 + 49):
        found = forecast.disk_finding(sizes, Config(keep_checkpoints=2), free, 50)
        assert found.number == 3 * one + 200 + 50
        states[free] = found.state
    assert list(states.values()) == ["ok", "warning", "warning", "error"]
    assert forecast.disk_finding(sizes, Config(control="off", repeats=2, keep_checkpoints=1), 10**9, 0).number == (
        2 * (300 + 200 + meg) + 200
    )


def test_a_checkpoint_is_as_large_as_was_said(settings, tmp_path):
    told = examined(settings, keep_checkpoints=1)["disk for checkpoints"]
    list(session.distill(Config.from_dict({**settings, "keep_checkpoints": 1}), tmp_path / "run"))
    (written,) = (tmp_path / "run" / "checkpoints").iterdir()
    size = sum(file.stat().st_size for file in written.iterdir())
    reserve, student = 16 * 2**20, (tmp_path / "run" / "student" / "model.safetensors").stat().st_size
    assert told.number == pytest.approx(2 * (size + 2**20) + 2 * student + reserve, rel=0.01)


def test_nothing_is_written_and_nothing_of_the_run_is_changed(settings, tmp_path, monkeypatch, pair):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in sorted(pair.rglob("*")) if path.is_file()}
    config = Config.from_dict({**settings, "control": "off", "use_ema": True, "layerwise_weight": 0.3})
    losses = [r["loss"] for r in session.distill(config, tmp_path / "one") if r["kind"] == "train"]
    state, folders = torch.get_rng_state(), sorted(tmp_path.rglob("*"))
    doctor.diagnose(config)
    assert torch.equal(torch.get_rng_state(), state) and sorted(tmp_path.rglob("*")) == folders
    assert {path: path.read_bytes() for path in sorted(pair.rglob("*")) if path.is_file()} == before
    assert [r["loss"] for r in session.distill(config, tmp_path / "two") if r["kind"] == "train"] == losses


def test_the_arithmetic_that_was_chosen_before_stays(settings):
    chosen = devices.accelerator("bf16")
    examined(settings)
    assert accelerate.state.AcceleratorState().mixed_precision == chosen.mixed_precision == "bf16"


def test_without_a_text_a_few_sentences_stand_for_it(settings):
    found = examined({**settings, "check_teacher": True}, dataset="", max_steps=0, batch_size=4)
    assert "on a sample" in found["aligned positions"].value
    assert "whole run" not in found and "steps per second" in found
    assert "uniform cross-entropy" in found["teacher's ids"].value
    assert "sessions" in examined(settings, dataset="", max_steps=9)
    train, validation, test = doctor._sentences(Config(max_length=48, batch_size=4, grad_accumulation=5))
    assert (len(train), len({d.text for d in [*train, *validation, *test]})) == (20, 22)
    assert all(len(document.text) >= 8 * 48 for document in train)


def test_a_teacher_cache_is_looked_at_in_its_place(settings, tmp_path):
    assert cli.main(["cache", *flags(settings), "--out", str(tmp_path / "cache")]) == 0
    found = examined(settings, teacher="", teacher_cache=str(tmp_path / "cache"))
    assert "teacher's head" not in found and found["predicted peak"].state == "ok"
    assert found["steps per second"].number > 0


def test_where_no_card_computes_no_model_is_loaded(settings, monkeypatch):
    monkeypatch.setattr(machine, "list_gpus", lambda: [dataclasses.replace(P100, kernels=CU128, failed=DEAD)])
    monkeypatch.setattr(inputs, "load", None)
    found = doctor.diagnose(Config.from_dict(settings))
    assert {f.group for f in found} == {"machine"} and findings.overall_state(found) == "error"


def test_stages_say_what_comes_next(settings):
    told = [(coming, len(found)) for coming, found in doctor.run_checks(Config.from_dict(settings))]
    assert [coming.split()[0] for coming, _ in told[:-1]] == ["checking", "loading", "scoring", "predicting", "timing"]
    assert told[-1][0] == "" and [count for _, count in told] == sorted(count for _, count in told)
    assert [coming for coming, _ in doctor.run_checks()] == ["checking the machine", ""]


def run(capsys, *words):
    status = cli.main(["doctor", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_looks_at_the_machine_alone(capsys):
    status, out, _ = run(capsys)
    assert status == 0 and out.startswith("Machine\n") and "\nPair" not in out
    assert "  ok       Python" in out and "with warnings" in out
    status, out, _ = run(capsys, "--accelerator", "NvidiaTeslaP100")
    if not torch.cuda.is_available():
        assert status == 1 and "requested NvidiaTeslaP100, found no GPU" in out and "Remedy: " in out


def test_the_command_says_what_it_found(capsys, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**settings, "batch_size": 99}))
    status, out, err = run(capsys, str(path), "--batch-size", "2")
    assert status == 0 and "loading" in err
    assert [line for line in out.split("\n") if line and line[0] != " "][:-1] == list(findings.GROUPS.values())
    status, out, _ = run(capsys, *flags(settings), "--json")
    told = json.loads(out)
    assert (status, told["state"]) == (0, "warning")
    assert set(told) == {"state", *findings.GROUPS} and all(told[group] for group in findings.GROUPS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"batch_size": 400}, "one optimizer step takes 400"),
        ({"check_teacher": True}, "above the unigram cross-entropy"),
        ({"time_budget": "1s"}, "too short: 1 s each"),
    ],
)
def test_what_will_not_work_ends_1_with_a_remedy(capsys, settings, changes, match):
    status, out, err = run(capsys, *flags(settings, **changes))
    assert (status, "Traceback" in err) == (1, False)
    flat = " ".join(out.split())
    assert match in flat and "Remedy: " in flat and "This will not work yet" in flat


def test_tokenizers_with_nothing_in_common_will_not_work(capsys, settings, tmp_path):
    for name, words in (("one", ["猫", "犬"]), ("two", ["cat", "dog"])):
        core = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, "<unk>")
        )
        core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", pad_token="<unk>")
        demo.save(tiny_model(made), made, tmp_path / name)
    status, out, _ = run(capsys, *flags(settings, teacher=tmp_path / "one", student=tmp_path / "two"))
    assert status == 1 and "no token in common" in " ".join(out.split())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dataset": "missing.txt"}, "no such file or folder: missing.txt"),
        ({"teacher": "nowhere"}, "teacher 'nowhere': cannot load its configuration"),
        ({"student": None}, "student is missing"),
        ({"kd_wight": 1}, "did you mean '--kd_weight'"),
        ({"out": "x"}, "unknown key 'out'"),
        ({"amp_dtype": "fp16"}, "amp_dtype fp16 needs a CUDA GPU"),
        ({"teacher_device": "cuda:7"}, "teacher_device is cuda:7, but this machine has"),
    ],
)
def test_bad_input_ends_2_with_one_line(capsys, settings, changes, match):
    if "fp16" in match and torch.cuda.is_available():
        pytest.skip("this machine has a card")
    status, out, err = run(capsys, *flags(settings, **changes))
    assert (status, out) == (2, "")
    assert match in err and "\n" not in err.strip()


def test_an_architecture_that_is_refused_ends_2_as_in_distill(capsys, settings, tmp_path):
    config = transformers.BertConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    byte_level().save_pretrained(tmp_path / "bert")
    status, _, err = run(capsys, *flags(settings, teacher=tmp_path / "bert"))
    assert status == 2 and "expected a causal language model" in err and "\n" not in err.strip()


def test_free_memory_is_what_other_programs_leave(settings, monkeypatch):
    monkeypatch.setattr(memory, "usage", lambda device: {"used_bytes": 2**20, "total_bytes": 10**15})
    monkeypatch.setattr(memory, "free", lambda device: 10 * GIB)
    plenty = examined(settings, loss_chunk_size=8)["predicted peak"]
    assert plenty.state == "ok"
    monkeypatch.setattr(memory, "free", lambda device: plenty.number - 2**20 - 1)
    found = examined(settings, loss_chunk_size=8)["predicted peak"]
    assert found.state == "error" and "other programs leave" in found.meaning
    assert found.remedy.startswith("end the other programs, or --batch-size 1 --grad-accumulation 2")
    monkeypatch.setattr(memory, "free", lambda device: plenty.number - 2**20)
    assert examined(settings, loss_chunk_size=8)["predicted peak"].state == "ok"
