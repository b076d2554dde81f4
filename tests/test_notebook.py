"""The notebook as people meet it: committed clean, run by nbval, run by papermill with other parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
NOTEBOOKS = sorted((HOUSE / "notebooks").glob("*.ipynb"))


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One cache for all runs of this module, so that the embedded default is made once."""
    cache = tmp_path_factory.mktemp("cache")
    # the kernel's own packages warn about themselves; what kdlib does is under the other tests' "warnings are errors"
    return {**os.environ, "KDLIB_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_come_first_and_nothing_is_defined(path):
    code = cells(path)
    assert code[0]["metadata"]["tags"] == ["parameters"]
    assert all("=" in line for line in code[0]["source"])
    assert not any(line.lstrip().startswith(("def ", "class ")) for cell in code for line in cell["source"])
    assert len(code) <= 12


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_clean(path):
    notebook = json.loads(path.read_text())
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert "widgets" not in notebook["metadata"]
    assert path.stat().st_size < 400_000
    outputs = json.dumps([cell["outputs"] for cell in cells(path)])
    assert str(Path.home()) not in outputs
    assert "Traceback" not in outputs


def test_the_committed_notebook_shows_a_finished_run():
    shown = json.dumps([cell["outputs"] for cell in cells(HOUSE / "notebooks" / "distill.ipynb")])
    assert shown.count("image/png") == 4
    assert "bits per byte" in shown
    assert "complete [" in shown


def test_nbval(environment, tmp_path):
    """As committed, in its small form; the cells that are checked give what is committed."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "-p", "no:cacheprovider", "-q", "--nbval-cell-timeout", "500",
         "--rootdir", str(tmp_path), "-c", os.devnull, _copy(tmp_path)],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


def test_papermill_with_other_parameters(environment, tmp_path):
    """As Kaggle runs it: parameters injected, a batch run, and the run folder is there."""
    parameters = {"max_steps": 6, "kd_method": "projector", "control": "short", "batch_size": 4}
    words = ["-p", "out", "other", "-y", json.dumps({"settings": parameters})]
    ran = subprocess.run(
        [sys.executable, "-m", "papermill", _copy(tmp_path), "out.ipynb", "--no-progress-bar", *words],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads((tmp_path / "other" / "status.json").read_text())["state"] == "complete"
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    assert {name: config[name] for name in parameters} == parameters


def test_kernel_metadata_points_at_the_notebook():
    metadata = json.loads((HOUSE / "kernel-metadata.json").read_text())
    assert (HOUSE / metadata["code_file"]).exists()
    assert (metadata["kernel_type"], metadata["language"]) == ("notebook", "python")
    assert (metadata["machine_shape"], metadata["enable_gpu"], metadata["is_private"]) == ("NvidiaTeslaT4", True, True)
    owner, slug = metadata["id"].split("/")
    assert owner
    assert slug == metadata["title"].lower().replace(" ", "-")
    assert len(slug) >= 5


def _copy(folder):
    (folder / "distill.ipynb").write_text((HOUSE / "notebooks" / "distill.ipynb").read_text())
    return str(folder / "distill.ipynb")
