"""The panel's buttons in a real JupyterLab, clicked by a browser that nobody sees, while the cell runs that they are for."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from kdlib import files
from kdlib.session import run_folder

pytestmark = pytest.mark.slow
HOUSE = Path(__file__).parent.parent
LAB = Path(os.environ.get("KDLIB_LAB") or Path(sys.prefix) / "lab")
"""JupyterLab and playwright in an environment of their own, and the kernels beside the newest one (`make test-slow`)."""
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KERNELS = {"newest": "", "6.17.1": "kernels/6.17.1", "6.30.1": "kernels/6.30.1"}
"""Kaggle's image has 6.17.1; the newest one of the 6 is another piece of code; all are run with the tests' own packages."""
CELL = """
import torch
import kdlib
torch.set_num_threads(1)
kdlib.quiet()
panel = kdlib.LivePanel()
for record in kdlib.distill(kdlib.Config.from_dict({settings!r}), "run", wishes=panel.wishes):
    panel.update(record)
panel.close()
print("ended", record["kind"], panel.problem, "share under a hundredth:", panel.share < 0.01)
"""
DRIVER = HOUSE / "tests" / "lab_browser.py"


@contextlib.contextmanager
def jupyter_lab(folder, kernel):
    """A server for `folder`; its address with the token."""
    home = folder / "home"
    spec, told = home / "data" / "kernels" / "tested", home / "config/lab/user-settings/@jupyterlab/apputils-extension"
    spec.mkdir(parents=True)
    told.mkdir(parents=True, exist_ok=True)
    (told / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    path = os.pathsep.join([str(HOUSE), *([str(LAB / KERNELS[kernel])] if KERNELS[kernel] else [])])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    told = {"argv": argv, "display_name": "Python", "language": "python", "env": environment}
    (spec / "kernel.json").write_text(json.dumps(told))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    names = {"HOME": home, "JUPYTER_DATA_DIR": home / "data", "JUPYTER_CONFIG_DIR": home / "config"}
    names |= {"JUPYTER_RUNTIME_DIR": home / "runtime", "IPYTHONDIR": home / "ipython"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(
            [LAB / "bin" / "jupyter-lab", "--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--allow-root",
             f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
             "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
            env={**os.environ, **{name: str(value) for name, value in names.items()}}, stdout=log, stderr=log, cwd=folder,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "server.log").read_text()[-3000:]
                assert time.monotonic() < deadline, "JupyterLab did not start"
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/lab/tree/panel.ipynb?token={token}&reset"
    finally:
        server.terminate()
        server.wait(30)


def notebook(code):
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": code}
    kernel = {"kernelspec": {"name": "tested", "display_name": "Python", "language": "python"}}
    return json.dumps({"cells": [cell], "metadata": kernel, "nbformat": 4, "nbformat_minor": 5})


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_button_does_what_it_says(settings, tmp_path, kernel):
    """One after the other in one run: a look, a checkpoint, a pause; told on the page and there in the run folder."""
    if not (LAB / "bin" / "jupyter-lab").exists() or (KERNELS[kernel] and not (LAB / KERNELS[kernel]).exists()):
        pytest.skip(f"no JupyterLab in {LAB}; make test-slow puts it there")
    if BROWSER is None:
        pytest.skip("no chromium or google-chrome on this machine")
    plan = {**settings, "max_steps": 100_000, "eval_steps": 50_000, "control": "off", "save_steps": 90_000}
    (tmp_path / "panel.ipynb").write_text(notebook(CELL.format(settings=plan)))
    with jupyter_lab(tmp_path, kernel) as address:
        ran = subprocess.run(
            [LAB / "bin" / "python", DRIVER, BROWSER, address, tmp_path], capture_output=True, text=True, timeout=400
        )
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-3000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    run = run_folder.RunFolder(tmp_path / "run")
    looks = [r for r in files.read_records(run.records.path) if r.get("asked")]
    assert told["evaluate"] == f"step {looks[0]['step']}: {looks[0]['bits_per_byte']:.4f} bits per byte, on request"
    assert len(looks) == 1
    step, name = told["save"].split(": saved as ")
    assert name == f"step-{int(step.split()[1]):08d}"
    assert (run.checkpoints / name / "manifest.json").exists()
    status = run.last_status()
    assert (status["state"], status["reason"].split(";")[0]) == ("paused", "asked to pause")
    assert status["step"] > int(step.split()[1]) > looks[0]["step"]
    assert told["output"].splitlines()[-1] == "ended paused None share under a hundredth: True"
    assert told["resting"] == 3
    assert told["picture"] > 20_000
