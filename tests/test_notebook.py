"""The notebooks as people meet them: committed clean and fresh, run by nbval, run by papermill with other parameters."""

import ast
import copy
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import refresh

from kdlib import distill
from kdlib.config import Config
from kdlib.session import cache_writer

HOUSE = Path(__file__).parent.parent
NOTEBOOKS = sorted((HOUSE / "notebooks").glob("*.ipynb"))
SHORT = {"max_steps": 6, "eval_steps": 3, "eval_tokens": 1500, "batch_size": 4}
ANY_PYTHON = """
[pieces of a docstring, which another Python may have otherwise]
regex: (<span [^>]*>[^<]*</span>(<wbr>)?)+
replace: PIECES
[their number]
regex: \\d+ pieces here, \\d+ of them
replace: N pieces here, M of them
[its documents]
regex: ': \\d+(?=[,}])
replace: ': N
"""
OTHERWISE = {
    "teacher_cache": {"out": "other", "settings": {"kd_top_k": 16}, "compared_steps": 0},
    "losses_compared": {"out": "other", "methods": ["shared_vocab"], "parts": {}, "settings": {**SHORT, "control": "short"}},
    "results": {},  # of the run that distill left
}  # fmt: skip


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One cache for all runs of this module, so that the embedded default is made once."""
    cache = tmp_path_factory.mktemp("cache")
    # the kernel's own packages warn about themselves; what kdlib does is under the other tests' "warnings are errors"
    return {**os.environ, "KDLIB_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def distilled(environment, tmp_path_factory):
    """The run folder of `distill.ipynb` with other parameters, as Kaggle runs it: parameters injected, a batch."""
    folder = tmp_path_factory.mktemp("distilled")
    settings = {**SHORT, "kd_method": "projector", "control": "short", "routing_feature_weight": 0.1, "share_steps": 2}
    papermill("distill", folder, environment, {"out": "other", "settings": settings})
    return folder / "other", settings


def papermill(name, folder, environment, parameters):
    (folder / f"{name}.ipynb").write_text((HOUSE / "notebooks" / f"{name}.ipynb").read_text())
    command = [
        sys.executable,
        "-m",
        "papermill",
        f"{name}.ipynb",
        "out.ipynb",
        "--no-progress-bar",
        "-y",
        json.dumps(parameters),
    ]
    ran = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return cells(folder / "out.ipynb")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_come_first_and_nothing_is_defined(path):
    code = cells(path)
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert all("=" in line for line in code[0]["source"])
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in code:
        assert not [node for node in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(node, kinds)]
    assert len(code) <= 12
    assert sum(len(cell["source"]) for cell in code if cell["metadata"].get("tags") != ["kdlib"]) <= 65


@pytest.mark.parametrize("name", ["distill", "losses_compared", "teacher_cache"])
def test_a_forgotten_teacher_is_an_error_and_not_the_embedded_default(name):
    parameters, _, pair, *_ = cells(HOUSE / "notebooks" / f"{name}.ipynb")
    with pytest.raises(ValueError, match="teacher is missing"):
        exec("".join([*parameters["source"], "\nstudent, dataset = 'a/b', 'texts'\n", *pair["source"]]), {})


def carrier_of(path):
    (cell,) = [cell for cell in cells(path) if cell["metadata"].get("tags") == ["kdlib"]]
    return "".join(cell["source"])


def run_carrier(source, folder, **changes):
    """The second cell in an interpreter without kdlib, and the path of the kdlib that it finds."""
    cwd = folder / "kaggle" / "working"
    cwd.mkdir(parents=True)
    (folder / "target").mkdir()
    source = source.replace("/kaggle/input", str(folder / "kaggle" / "input"))
    environment = {**os.environ, "PYTHONPATH": str(folder / "target"), "PIP_TARGET": str(folder / "target")}
    words = [sys.executable, "-S", "-c", f"{source}\nimport kdlib\nprint(kdlib.__file__)"]
    return subprocess.run(
        words, cwd=cwd, env={**environment, "PIP_NO_INDEX": "1", **changes}, capture_output=True, text=True
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kdlib_is_installed_from_the_address_of_the_project(path):
    assert f'install_from = "{refresh.address()}"' in carrier_of(path)


def test_the_second_cell_finds_an_attached_kdlib(tmp_path):
    attached = tmp_path / "kaggle" / "input" / "datasets" / "ann" / "repository" / "kdlib"
    attached.mkdir(parents=True)
    (attached / "__init__.py").touch()
    ran = run_carrier(carrier_of(NOTEBOOKS[0]), tmp_path)
    assert ran.stdout == f"{attached / '__init__.py'}\n", ran.stderr


def test_the_second_cell_installs_kdlib(tmp_path):
    wheel = tmp_path / "kdlib-9.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("kdlib/__init__.py", "")
        archive.writestr("kdlib-9.9.dist-info/METADATA", "Metadata-Version: 2.1\nName: kdlib\nVersion: 9.9\n")
        archive.writestr("kdlib-9.9.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("kdlib-9.9.dist-info/RECORD", "")
    ran = run_carrier(carrier_of(NOTEBOOKS[0]).replace(refresh.address(), wheel.as_uri()), tmp_path)
    assert ran.stdout == f"{tmp_path / 'target' / 'kdlib' / '__init__.py'}\n", ran.stderr


def test_the_second_cell_names_all_ways_if_there_is_no_kdlib(tmp_path):
    ran = run_carrier(carrier_of(NOTEBOOKS[0]), tmp_path, HTTPS_PROXY="http://127.0.0.1:9", PIP_RETRIES="0")
    assert ran.returncode == 1
    message = ran.stderr.splitlines()[-1]
    for way in ("kaggle/push.py", "attach", "dataset", "internet", f"pip install {refresh.address()}"):
        assert way in message


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_step_is_told_before_it_is_taken(path):
    kinds = [cell["cell_type"] for cell in json.loads(path.read_text())["cells"]]
    assert kinds[0] == "markdown"
    told = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    assert told.startswith("# ")
    assert told.count("## ") >= 3


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_clean(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    assert path.stat().st_size < 400_000
    outputs = json.dumps([cell["outputs"] for cell in cells(path)])
    assert str(Path.home()) not in outputs
    assert "Traceback" not in outputs
    assert "widget-view" not in outputs
    assert refresh.cleaned(copy.deepcopy(notebook)) == notebook


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs_are_of_the_committed_code(path):
    """The whole check, which executes them, is among the slow tests: this one sees what was edited since."""
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kdlib"]["outputs_of"] == refresh.source_hash(notebook), "make notebooks"
    assert all(cell["execution_count"] for cell in cells(path))


def test_the_committed_notebooks_show_finished_runs():
    pictures = {
        path.stem: json.dumps([cell["outputs"] for cell in cells(path)]).count("image/png") for path in NOTEBOOKS
    }
    assert pictures == {"distill": 10, "losses_compared": 2, "results": 13, "teacher_cache": 1}
    shown = json.dumps([cell["outputs"] for cell in cells(HOUSE / "notebooks" / "distill.ipynb")])
    assert "Distillation helped" in shown
    assert "complete [" in shown


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_nbval(path, environment, tmp_path):
    """As committed, in its small form; the cells that are checked give what is committed, but for the words of this Python's
    docstrings. Of the longer ones a shorter plan: nothing of that is in what is checked, and `refresh.py --check` runs all.
    """
    text = path.read_text()
    if path.stem != "teacher_cache":
        text, count = re.subn(r'max_steps\\": 1[02]0,', r'max_steps\\": 20,', text)
        assert count == 1
        text = text.replace("step 100 of 100", "step 20 of 20")
    (tmp_path / path.name).write_text(text)
    (tmp_path / "any.cfg").write_text(ANY_PYTHON)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "-q", "--nbval-cell-timeout", "500",
         "--nbval-sanitize-with", "any.cfg", "--rootdir", str(tmp_path), "-c", os.devnull, path.name],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    assert f"{len(cells(path))} passed" in ran.stdout


def test_distill_with_other_parameters(distilled):
    folder, settings = distilled
    assert json.loads((folder / "status.json").read_text())["state"] == "complete"
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in settings} == settings


@pytest.mark.parametrize("name", OTHERWISE)
def test_papermill_with_other_parameters(name, environment, distilled, tmp_path):
    parameters = OTHERWISE[name] or {"folder": str(distilled[0])}
    shown = json.dumps([cell["outputs"] for cell in papermill(name, tmp_path, environment, parameters)])
    if name == "teacher_cache":
        told = json.loads((tmp_path / "other" / "cache.json").read_text())["settings"]
        assert told["kd_top_k"] == 16
        assert not (tmp_path / "other-teacher").exists()
    elif name == "losses_compared":
        assert {path.name for path in (tmp_path / "other").iterdir()} == {"shared_vocab"}
        assert "| shared_vocab |" in shown
    else:
        assert "complete, step 6 of 6, session 1" in shown
        assert shown.count("image/png") == 14  # one more than committed: the layers that were chosen
        assert not (tmp_path / "small-run").exists()


@pytest.fixture
def kernel_of(environment, pair, tmp_path):
    """A function: the texts of a notebook's outputs after a batch run in a Kaggle kernel, on the small pair."""
    made = {**environment, "KAGGLE_KERNEL_RUN_TYPE": "Batch", "KDLIB_KAGGLE_INPUT": str(tmp_path / "input")}
    named = {name: str(pair / file) for name, file in NAMED.items()}

    def run(name, **parameters):
        given = parameters if name == "results" else {**named, **parameters}
        outputs = [output for cell in papermill(name, tmp_path, made, given) for output in cell["outputs"]]
        return json.dumps([output for output in outputs if output.get("name") != "stderr"])

    return run


NAMED = {"teacher": "teacher", "student": "student", "dataset": "text.jsonl"}
OF_A_KERNEL = {"max_length": 48, "batch_size": 2, "max_steps": 4, "check_teacher": False, "eval_tokens": 300}
SPENT = "1s"
"""A time budget that is over before anything is trained."""


def test_a_session_without_a_record_ends_its_kernel_well(kernel_of, tmp_path):
    """The budget is over while the models are scored: what there is to see is shown, by results.ipynb too."""
    shown = kernel_of("distill", out="run", settings=OF_A_KERNEL, time_budget=SPENT)
    assert (tmp_path / "run" / "records.jsonl").read_text() == ""
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "paused"
    assert "of the time budget of 1 s are used" in shown and "paused ['config.json'" in shown.replace("[\\'", "['")
    shown = kernel_of("results", folder="run")
    assert "paused, step 0 of 4, session 1, " in shown and "There is no verdict yet." in shown
    assert "run/report.html" in shown
    assert not (tmp_path / "status.json").exists()  # nothing failed


@pytest.mark.slow
@pytest.mark.parametrize("files", ["config.json", "config.json status.json"])
def test_results_of_a_run_that_has_just_begun(kernel_of, tmp_path, files):
    (tmp_path / "run").mkdir()
    for name, content in {"config.json": {"kd_method": "none"}, "status.json": {"state": "running"}}.items():
        if name in files.split():
            (tmp_path / "run" / name).write_text(json.dumps(content))
    shown = kernel_of("results", folder="run")
    assert "There is no verdict yet." in shown and shown.count("image/png") == 5
    assert ("running" if "status" in files else "started, status.json cannot be read") in shown
    assert not (tmp_path / "status.json").exists()


@pytest.mark.slow
def test_results_of_no_run_end_their_kernel_well(kernel_of, tmp_path):
    kernel_of("results", folder="nowhere")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status["reason"].startswith("ValueError: nowhere is not a run folder")


def test_ways_that_are_finished_are_shown_where_the_time_ends(kernel_of, settings, tmp_path):
    config = Config.from_dict({**settings, **OF_A_KERNEL, "control": "full"})
    list(distill(config.replace(kd_method="first_token"), tmp_path / "ways" / "first_token"))
    ways = {"methods": ["first_token", "shared_vocab", "byte_prefix"], "parts": {}, "out": "ways"}
    changes = {name: value for name, value in settings.items() if name not in ("teacher", "student", "dataset")}
    shown = kernel_of("losses_compared", **ways, settings={**changes, **OF_A_KERNEL}, time_budget=SPENT)
    assert "shared_vocab was paused: " in shown
    assert "| first_token |" in shown and "| shared_vocab |" not in shown
    assert shown.count("image/png") == 2
    assert not (tmp_path / "ways" / "byte_prefix").exists()
    assert (tmp_path / "ways" / "first_token" / "verdict.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["losses_compared", "teacher_cache"])
def test_a_notebook_whose_time_is_over_at_once_ends_its_kernel_well(kernel_of, tmp_path, name):
    shown = kernel_of(name, out="made", settings=OF_A_KERNEL, time_budget=SPENT)
    assert ("was paused: " if name == "losses_compared" else "shards are missing: run this again.") in shown
    assert not (tmp_path / "status.json").exists()


@pytest.mark.slow
def test_a_comparison_of_caches_may_pause(kernel_of, tmp_path, pair, settings):
    """The cache is whole, and no time is left to train from it."""
    named = {name: str(pair / file) for name, file in NAMED.items()}
    list(cache_writer.cache_teacher(Config.from_dict({"kd_top_k": 64, **OF_A_KERNEL, **named}), tmp_path / "made"))
    shown = kernel_of("teacher_cache", out="made", settings=OF_A_KERNEL, time_budget=SPENT)
    assert "The cache is complete." in shown and "live teacher was paused: " in shown
    assert not (tmp_path / "status.json").exists()


def test_every_cell_that_may_fail_is_guarded():
    """A batch kernel that ends with an error loses its files: what runs, reads or draws stands under `kaggle.guard`."""
    risky = re.compile(r"\b(distill|cache_teacher|diagnose|align_sentence|demo_config|Run|plot\w*|report|loads)\(")
    for path in NOTEBOOKS:
        for cell in cells(path):
            for node in ast.parse("".join(cell["source"])).body:
                guards = ["guard" in ast.unparse(node.items[0])] if isinstance(node, ast.With) else [
                    "guard" in ast.unparse(item) for item in ast.walk(node) if isinstance(item, ast.With)
                ]  # fmt: skip
                assert any(guards) or not risky.search(ast.unparse(node)), (path.stem, ast.unparse(node))


def test_every_notebook_uses_the_public_interface_alone():
    """`import kdlib` and its public names: no module of the package is imported or reached through it."""
    import kdlib

    for path in NOTEBOOKS:
        for cell in cells(path):
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                assert not (isinstance(node, ast.ImportFrom) and node.module.startswith("kdlib")), path.stem
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "kdlib":
                    assert node.attr in kdlib.__all__, (path.stem, node.attr)


def test_what_is_stale_is_seen():
    """Other words, another number, a picture more or less; not another time, nor the last digit."""
    old = {
        "metadata": {},
        "cells": [{"cell_type": "code", "id": "a", "metadata": {}, "source": ["f()"], "outputs": []}],
    }
    old["metadata"]["kdlib"] = {"outputs_of": refresh.source_hash(old)}
    old["cells"][0]["outputs"] = [
        {"output_type": "stream", "name": "stdout", "text": "gain 0.512 bits, 30 steps in 12 s"}
    ]
    assert refresh.differences(old, copy.deepcopy(old)) == []
    for text, fresh in (
        ("gain 0.514 bits, 30 steps in 99.5 s", True),
        ("gain 0.712 bits, 30 steps in 12 s", False),
        ("gain -0.512 bits, 30 steps in 12 s", False),
        ("gain 0.512 bits, 40 steps in 12 s", False),
        ("gain 0.512 bits, 30 windows in 12 s", False),
    ):
        new = copy.deepcopy(old)
        new["cells"][0]["outputs"][0]["text"] = text
        assert (refresh.differences(old, new) == []) == fresh, text
    new = copy.deepcopy(old)
    new["cells"][0]["outputs"].append({"output_type": "display_data", "data": {"image/png": "aa"}, "metadata": {}})
    assert refresh.differences(old, new) == ["cell a: 1 outputs, now 2"]
    edited = copy.deepcopy(old)
    edited["cells"][0]["source"] = ["g()"]
    assert refresh.differences(edited, old) == ["code was changed after its outputs were made"]
    ignored = copy.deepcopy(new)
    for notebook in (old, ignored):
        notebook["cells"][0]["metadata"] = {"tags": ["nbval-ignore-output"]}
    assert refresh.differences(old, ignored) == []


def test_noise_is_taken_out_of_outputs():
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": ["shard 1 of 2  \r"]},
        {"output_type": "stream", "name": "stderr", "text": "a warning of the kernel's"},
        {"output_type": "stream", "name": "stdout", "text": ["shard 2 of 2\n", "done\n"]},
        {"output_type": "execute_result", "execution_count": 3, "data": {"text/plain": "4"}, "metadata": {"x": 1}},
    ]
    cell = {
        "cell_type": "code",
        "id": "a",
        "metadata": {"papermill": {}, "tags": []},
        "source": ["f()"],
        "outputs": outputs,
    }
    made = refresh.cleaned({"metadata": {"widgets": {"state": {}}, "papermill": {}}, "cells": [cell]})
    assert set(made["metadata"]) == {"kernelspec", "language_info", "kdlib"}
    assert made["cells"][0]["metadata"] == {}
    assert made["cells"][0]["outputs"][0]["text"] == "shard 2 of 2\ndone\n"
    assert [output["output_type"] for output in made["cells"][0]["outputs"]] == ["stream", "execute_result"]


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="outputs are of the docstrings of Python 3.11")
def test_committed_outputs_are_what_comes_out():
    ran = subprocess.run([sys.executable, refresh.__file__, "--check"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-2000:]
    assert ran.stdout.count(": fresh") == len(NOTEBOOKS)


def test_kernel_metadata_points_at_the_notebook():
    metadata = json.loads((HOUSE / "kernel-metadata.json").read_text())
    assert (HOUSE / metadata["code_file"]).exists()
    assert (metadata["kernel_type"], metadata["language"]) == ("notebook", "python")
    assert (metadata["machine_shape"], metadata["enable_gpu"], metadata["is_private"]) == ("NvidiaTeslaT4", True, True)
    owner, slug = metadata["id"].split("/")
    assert owner
    assert slug == metadata["title"].lower().replace(" ", "-")
    assert len(slug) >= 5
