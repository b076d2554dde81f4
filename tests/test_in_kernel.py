"""What a run knows of the kernel it is in: mounted inputs in either layout, the session's end, an end that keeps files."""

import contextlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdlib import Config, distill, environment, kaggle
from kdlib.session import run_folder

NEW = {
    "pair": "datasets/ann/pair", "qwen": "models/q/qwen/transformers/0.6b/1", "run": "notebooks/ann/kdlib-distill/run",
}  # fmt: skip
OLD = {"pair": "pair", "qwen": "qwen/transformers/0.6b/1", "run": "kdlib-distill/run"}


@pytest.fixture(params=[NEW, OLD], ids=["new", "old"])
def mounted(request, tmp_path, monkeypatch):
    """A tree of inputs: a model, a student with texts, a finished session of a run."""
    root = tmp_path / "input"
    monkeypatch.setenv("KDLIB_KAGGLE_INPUT", str(root))
    files = {
        "qwen": {"config.json": "{}", "tokenizer.json": "{}"},
        "pair": {"student/config.json": "{}", "student/tokenizer.json": "{}", "texts/a.jsonl": "", "texts/b.jsonl": ""},
        "run": {
            "status.json": '{"state": "paused"}',
            "config.json": '{"kd_method": "none"}',
            "checkpoints/step-1/x": "",
        },
    }
    for name, inside in files.items():
        for path, text in inside.items():
            (root / request.param[name] / path).parent.mkdir(parents=True, exist_ok=True)
            (root / request.param[name] / path).write_text(text)
    return root, request.param


def test_inputs_are_found_by_their_marks_in_either_layout(mounted):
    root, layout = mounted
    assert kaggle.find_input("qwen", "model") == str(root / layout["qwen"])
    assert kaggle.find_input("qwen/transformers/0.6b/1", "model") == str(root / layout["qwen"])
    assert kaggle.find_input("/kaggle/input/pair/student", "model") == str(root / layout["pair"] / "student")
    assert kaggle.find_input("/kaggle/input/datasets/ann/pair/student", "model") == str(
        root / layout["pair"] / "student"
    )
    assert kaggle.find_input("pair/texts", "text") == str(root / layout["pair"] / "texts")
    assert kaggle.find_input("pair/texts/b.jsonl", "text") == str(root / layout["pair"] / "texts" / "b.jsonl")


def test_a_config_walks_what_is_mounted_once(mounted, monkeypatch):
    root, layout = mounted
    walks, real = [], kaggle._list_mounted
    monkeypatch.setattr(kaggle, "_list_mounted", lambda: walks.append(1) or real())
    settings = {"eval_dataset": "texts/b.jsonl", "teacher_cache": "elsewhere"}
    config = kaggle.config("qwen", "pair/student", "texts/a.jsonl, imdb", settings)
    assert config.eval_dataset == str(root / layout["pair"] / "texts" / "b.jsonl")
    assert len(walks) == 1
    kaggle.config("qwen", "pair/student", "imdb", {})
    assert len(walks) == 2  # what was attached meanwhile is seen


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.json", "a.md", "a.txt.gz", "a.parquet", "a.jsonl"])
def test_mounted_text_is_all_that_is_read_as_text(mounted, name):
    root, layout = mounted
    folder = root / layout["pair"] / "words"
    folder.mkdir()
    (folder / name).touch()
    assert kaggle.find_input("words", "text") == str(folder)
    assert kaggle.find_input("pair/words/" + name, "text") == str(folder / name)


def test_a_model_next_to_texts_is_no_text(mounted):
    root, layout = mounted
    assert kaggle.find_input("pair", "text") == str(root / layout["pair"] / "texts")


def test_what_is_not_mounted_is_left_as_it_is(mounted, tmp_path):
    for name in ("Qwen/Qwen3-0.6B", "", str(tmp_path), "0.6", "texts/c.jsonl"):
        assert kaggle.find_input(name, "model") == name


def test_several_texts_are_found_one_by_one(mounted):
    root, layout = mounted
    texts = root / layout["pair"] / "texts"
    assert kaggle.find_input("texts/a.jsonl, texts/b.jsonl", "text") == f"{texts / 'a.jsonl'},{texts / 'b.jsonl'}"


def test_two_candidates_are_refused(mounted):
    root, layout = mounted
    other = root / layout["qwen"].replace("0.6b", "1.7b")
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"'qwen' matches 2 inputs: .*0.6b/1, .*1.7b/1; give the full path"):
        kaggle.find_input("qwen", "model")
    assert kaggle.find_input("qwen/transformers/1.7b/1", "model") == str(other)


def test_the_previous_session_is_found_and_two_are_refused(mounted, tmp_path):
    root, layout = mounted
    assert kaggle.find_previous_output(tmp_path / "run") == str(root / layout["run"])
    assert kaggle.find_previous_output(tmp_path / "run", "never") == "never"
    assert kaggle.find_previous_output(tmp_path / "run", "/a/path") == "/a/path"
    begun_only = root / "elsewhere" / "run"
    begun_only.mkdir(parents=True)
    (begun_only / "status.json").write_text('{"state": "failed"}')
    (begun_only / "config.json").write_text('{"kd_method": "none"}')
    assert kaggle.find_previous_output(tmp_path / "run") == str(
        root / layout["run"]
    )  # nothing to go on with in the other
    (begun_only / "verdict.json").write_text("{}")
    with pytest.raises(ValueError, match=r"2 runs are mounted: .*; set resume to one of them, or to never"):
        kaggle.find_previous_output(tmp_path / "run")


def test_a_run_in_the_folder_goes_before_a_mounted_one(mounted, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"kd_method": "none"}')
    assert kaggle.find_previous_output(tmp_path / "run") == "auto"


def test_a_config_of_a_kernel_has_its_inputs_and_its_end(mounted, monkeypatch):
    root, layout = mounted
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    config = kaggle.config("qwen", "pair/student", "pair/texts", {"max_steps": 3})
    assert config.teacher == str(root / layout["qwen"]) and config.max_steps == 3
    assert config.time_budget == "11h"
    assert kaggle.config("a", "b", "c", {}, "40m").time_budget == "40m"
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE")
    assert kaggle.config("a", "b", "c", {}).time_budget == ""


@pytest.mark.parametrize("given", ["teacher", "student", "dataset"])
def test_a_config_of_a_kernel_takes_all_three_inputs(given):
    with pytest.raises(ValueError, match="is missing: a run takes teacher, student and dataset"):
        kaggle.config(**{**dict.fromkeys(("teacher", "student", "dataset"), ""), given: "a/b"}, settings={})
    assert kaggle.config("", "c/d", "text", {"teacher_cache": "cache"}).cached


def test_a_config_of_a_kernel_uses_the_secret_for_models(notebook_secrets, tmp_path, monkeypatch):
    import huggingface_hub

    notebook_secrets["HF_TOKEN"] = "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
    kaggle.config("a/b", "c/d", "text", {})
    assert huggingface_hub.get_token() == "hf_secret"
    monkeypatch.setenv("HF_TOKEN", "mine")
    kaggle.config("a/b", "c/d", "text", {})
    assert huggingface_hub.get_token() == "mine"


def test_the_age_of_a_session_is_that_of_its_machine(tmp_path, monkeypatch):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").write_text("1 (a (b) c) S " + " ".join(["0"] * 18 + ["500"] + ["0"] * 20))
    (tmp_path / "uptime").write_text("125.5 30.0")
    monkeypatch.setenv("KDLIB_PROC", str(tmp_path))
    assert environment.session_age_s() == 0.0
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert environment.session_age_s() == 125.5 - 500 / environment.os.sysconf("SC_CLK_TCK")


UNREADABLE = {
    "no files": {},
    "torn": {"1/stat": "1 (a) S", "uptime": ""},
    "no uptime": {"1/stat": "1 (a) S " + "1 " * 40},
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_machine_that_does_not_tell_its_age_began_now(tmp_path, monkeypatch, name):
    for path, text in UNREADABLE[name].items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.setenv("KDLIB_PROC", str(tmp_path))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert environment.session_age_s() == 0.0


def without(monkeypatch, module, name, error):
    """Make `module.name` fail, or be missing as on another system."""
    if error is None:
        monkeypatch.delattr(module, name, raising=False)
    else:
        monkeypatch.setattr(module, name, lambda *_, **__: (_ for _ in ()).throw(error), raising=False)


def test_a_system_without_sysconf_began_now(tmp_path, monkeypatch):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stat").write_text("1 (a) S " + "1 " * 40)
    (tmp_path / "uptime").write_text("125.5 30.0")
    monkeypatch.setenv("KDLIB_PROC", str(tmp_path))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    for error in (None, ValueError("unrecognized configuration name")):
        without(monkeypatch, environment.os, "sysconf", error)
        assert environment.session_age_s() == 0.0


@pytest.mark.parametrize("error", [None, OSError("not permitted")])
def test_a_system_that_does_not_tell_its_processors_has_one(monkeypatch, error):
    monkeypatch.setattr(environment.os, "cpu_count", lambda: 3)
    without(monkeypatch, environment.os, "sched_getaffinity", error)
    assert environment.num_processors() == 3
    monkeypatch.setattr(environment.os, "cpu_count", lambda: None)
    assert environment.num_processors() == environment.describe()["processors"] == 1


def test_a_disk_that_does_not_tell_is_not_full(tmp_path, monkeypatch):
    assert environment.free_bytes(tmp_path / "nowhere") == math.inf
    for error in (None, OSError("statvfs fails")):
        without(monkeypatch, environment.shutil, "disk_usage", error)
        assert environment.free_bytes(tmp_path) == math.inf
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert environment.free_bytes(tmp_path) == environment.KAGGLE_OUTPUT_BYTES
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert environment.free_bytes(tmp_path) == math.inf


def test_files_may_vanish_while_the_working_folder_is_measured(tmp_path, monkeypatch):
    """A checkpoint's thread measures while another renames: files and folders that are listed may not be there."""
    for name in ("a/first", "a/second", "b/third", "c"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * 1000)
    (tmp_path / "link").symlink_to("c")
    (tmp_path / "torn").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    links = sum((tmp_path / name).lstat().st_size for name in ("link", "torn"))
    assert environment.free_bytes("run") == environment.KAGGLE_OUTPUT_BYTES - 4000 - links
    real = environment.os.scandir

    @contextlib.contextmanager
    def vanishing(folder):
        with real(folder) as entries:
            listed = list(entries)
        if Path(folder).name == "a":
            (tmp_path / "a" / "second").unlink()
        elif (tmp_path / "b").exists():
            (tmp_path / "b" / "third").unlink()
            (tmp_path / "b").rmdir()
        yield sorted(listed, key=lambda entry: entry.name != "second")  # what is gone comes first

    monkeypatch.setattr(environment.os, "scandir", vanishing)
    assert environment.free_bytes("run") == environment.KAGGLE_OUTPUT_BYTES - 2000 - links


def test_a_complete_run_is_taken_over_whole(settings, tmp_path):
    config = Config.from_dict({**settings, "control": "off", "max_steps": 2})
    for _ in distill(config, tmp_path / "first"):
        pass
    (record,) = distill(config, tmp_path / "second", resume=str(tmp_path / "first"))
    assert record["kind"] == "verdict"
    first, second = (
        {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        for name in ("first", "second")
    )
    assert first == second


def test_a_kernel_writes_no_more_than_kaggle_keeps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").write_bytes(b"0" * 3000)
    monkeypatch.setattr(environment, "KAGGLE_OUTPUT_BYTES", 10_000)
    assert environment.free_bytes("run") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.01)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert environment.free_bytes("run") == 7000
    assert environment.free_bytes("/") == pytest.approx(shutil.disk_usage("/").free, rel=0.01)
    assert kaggle.config("a", "b", "c", {"keep_checkpoints": 90}).keep_checkpoints == 20
    assert kaggle.config("a", "b", "c", {"keep_checkpoints": 3}).keep_checkpoints == 3


CELL = "from kdlib import kaggle\nwith kaggle.guard('run'):\n    {}\nprint('not reached')"


def in_kernel(code, folder, kind):
    surroundings = {**environment.os.environ, "KAGGLE_KERNEL_RUN_TYPE": kind}
    return subprocess.run(
        [sys.executable, "-c", CELL.format(code)], cwd=folder, env=surroundings, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("code", "reason", "log"),
    [
        ("raise ValueError('no such text')", "ValueError: no such text", "kdlib: no such text\n"),
        ("1 / 0", "ZeroDivisionError: division by zero", "Traceback"),
    ],
)
def test_a_failure_in_a_batch_kernel_is_written_down_and_ends_well(tmp_path, code, reason, log):
    ran = in_kernel(code, tmp_path, "Batch")
    assert (ran.returncode, ran.stdout) == (0, "")
    assert ran.stderr.startswith(log)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("failed", reason)


def test_a_failure_before_someones_eyes_is_raised(tmp_path):
    ran = in_kernel("1 / 0", tmp_path, "Interactive")
    assert ran.returncode == 1 and "ZeroDivisionError" in ran.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("state", ["failed", "paused", "complete"])
def test_what_a_session_says_of_its_end_stays(tmp_path, state):
    run_folder.RunFolder(tmp_path / "run").path.mkdir()
    told = {"reason": "resumes from step-00000007", "step": 7, "max_steps": 9}
    run_folder.RunFolder(tmp_path / "run").status(state, **told)
    assert in_kernel("1 / 0", tmp_path, "Batch").returncode == 0
    assert json.loads((tmp_path / "run" / "status.json").read_text()) == {"state": state, **told}


def test_a_session_that_fails_while_it_runs_keeps_its_step(tmp_path):
    run_folder.RunFolder(tmp_path / "run").path.mkdir()
    run_folder.RunFolder(tmp_path / "run").status("running", reason="", step=7, max_steps=9, sessions=2)
    assert in_kernel("1 / 0", tmp_path, "Batch").returncode == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    reason = "ZeroDivisionError: division by zero"
    assert status == {"state": "failed", "reason": reason, "step": 7, "max_steps": 9, "sessions": 2}


@pytest.mark.parametrize("content", ["", '{"state": "runn', "[1]", "null"])
def test_a_torn_status_is_as_none(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text(content)
    assert in_kernel("1 / 0", tmp_path, "Batch").returncode == 0
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["max_steps"]) == ("failed", 0, 0)


def test_a_failure_that_cannot_be_written_ends_well_too(tmp_path):
    (tmp_path / "run").write_text("a file where the folder should be")
    ran = in_kernel("1 / 0", tmp_path, "Batch")
    assert ran.returncode == 0 and "ZeroDivisionError" in ran.stderr
