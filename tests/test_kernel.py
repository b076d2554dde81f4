"""A notebook's kernel that is interrupted or shut down while it trains: real kernels, driven as Jupyter drives them."""

import json
import time

import jupyter_client.manager
import pytest

from kdlib import files
from kdlib.session import checkpoint

LOOP = """
from kdlib import Config, cli, distill
cli.quiet()
kinds = []
for record in distill(Config.from_dict({settings}), {out!r}):
    kinds.append(record["kind"])
print(kinds[-1])
"""


@pytest.fixture
def kernel(tmp_path):
    manager, client = jupyter_client.manager.start_new_kernel(cwd=str(tmp_path), extra_arguments=["--log-level=40"])
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.fixture
def cell(settings, tmp_path):
    """The cell, and the folder that its run goes to. The run would take minutes."""
    settings = {**settings, "control": "off", "max_steps": 20_000, "save_steps": 10_000, "eval_steps": 10_000}
    return LOOP.format(settings=json.loads(json.dumps(settings)), out=str(tmp_path / "run")), tmp_path / "run"


def wait_for_steps(out, count=3):
    begun = time.monotonic()
    while time.monotonic() - begun < 60:
        if (out / "records.jsonl").exists() and (out / "records.jsonl").read_text().count('"train"') >= count:
            return
        time.sleep(0.05)
    raise AssertionError("training did not begin")


def check_paused(out):
    status = files.read_json(out / "status.json")
    path, groups, _, broken = checkpoint.newest(out / "checkpoints")
    assert (status["state"], broken) == ("paused", {})
    assert f"resumes from {path.name}" in status["reason"]
    done = [r["step"] for r in files.read_records(out / "records.jsonl") if r["kind"] == "train"]
    assert path.name == checkpoint.folder_name(done[-1])
    assert "optimizer" in groups


def test_an_interrupted_cell_ends_as_if_it_was_through(kernel, cell):
    """No traceback; and the next cell may go on at once."""
    manager, client = kernel
    code, out = cell
    client.execute(code)
    wait_for_steps(out)
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=60)["content"]
    assert reply["status"] == "ok", reply
    check_paused(out)
    answer = client.execute_interactive("print(len(kinds))", timeout=30)
    assert answer["content"]["status"] == "ok"


def test_a_kernel_that_is_shut_down_leaves_everything_saved(kernel, cell):
    manager, client = kernel
    code, out = cell
    client.execute(code)
    wait_for_steps(out)
    manager.shutdown_kernel(now=False)
    check_paused(out)
