"""The live panel in a real kernel, with an editor and with a program that runs notebooks by the batch."""

import json
import queue
import time

import jupyter_client.manager
import pytest

from kdlib import environment
from kdlib.session import run_folder

CELL = """
from kdlib import Config, LivePanel, cli, distill
cli.quiet()
panel = LivePanel()
for record in distill(Config.from_dict({settings}), {out!r}, on_progress=panel.progress):
    panel.update(record)
panel.close()
print(record["kind"], panel.problem)
"""


class Talk:
    """What a kernel says, read on until something is heard."""

    def __init__(self, client, manager):
        self.client, self.manager, self.said = client, manager, []

    def until(self, heard):
        begun = time.monotonic()
        while time.monotonic() - begun < 90:
            try:
                self.said.append(self.client.get_iopub_msg(timeout=1))
            except queue.Empty:
                continue
            if heard(self.said[-1]):
                return self.said[-1]
        raise AssertionError("nothing was heard")

    def of(self, kind, parent=None):
        """Contents of all messages of a kind so far."""
        found = [m for m in self.said if m["msg_type"] == kind]
        return [m["content"] for m in found if parent is None or m["parent_header"].get("msg_id") == parent]


def is_end_of(cell):
    return lambda m: (
        m["msg_type"] == "status"
        and m["content"]["execution_state"] == "idle"
        and m["parent_header"].get("msg_id") == cell
    )


def tells(words):
    return lambda m: m["msg_type"] == "comm_msg" and words in str(m["content"]["data"].get("state", {}).get("value"))


@pytest.fixture
def talk(tmp_path):
    manager, client = jupyter_client.manager.start_new_kernel(
        cwd=str(tmp_path), env=environment.child_environment(), extra_arguments=["--log-level=40"]
    )
    yield Talk(client, manager)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_an_interrupt_pauses_and_the_next_cell_runs(settings, tmp_path, talk):
    """As the stop button of an editor does it. The panel shows where the run is, and nothing is printed."""
    plan = {**settings, "control": "off", "max_steps": 50_000, "save_steps": 40_000, "eval_steps": 40_000}
    first = talk.client.execute(CELL.format(settings=json.loads(json.dumps(plan)), out=str(tmp_path / "run")))
    second = talk.client.execute("print('second')")
    talk.until(tells("tokens/s"))
    talk.manager.interrupt_kernel()
    talk.until(tells("<b>Paused:</b>"))
    talk.until(is_end_of(second))
    assert [c["text"] for c in talk.of("stream")] == ["paused None\n", "second\n"]
    assert [c["data"].keys() & {"image/png"} for c in talk.of("display_data")] == [set()]
    ends = [m["parent_header"]["msg_id"] for m in talk.said for cell in (first, second) if is_end_of(cell)(m)]
    assert ends == [first, second]
    run = run_folder.RunFolder(tmp_path / "run")
    assert run.last_status()["state"] == "paused"
    assert len(list(run.checkpoints.glob("step-*"))) == 1


def test_with_nobody_in_front_there_is_one_plain_picture_at_the_end(settings, tmp_path, talk):
    talk.client.allow_stdin = False
    code = CELL.format(settings=json.loads(json.dumps({**settings, "control": "off"})), out=str(tmp_path / "run"))
    cell = talk.client.execute(code)
    talk.until(is_end_of(cell))
    printed = "".join(c["text"] for c in talk.of("stream", cell)).splitlines()
    assert printed[-1] == "verdict None"
    assert sum("distilled 1: 100%" in line for line in printed) == 1
    assert [set(c["data"]) for c in talk.of("display_data", cell)] == [{"image/png", "text/plain"}]
    assert talk.of("comm_open") == []
    kinds = [m["msg_type"] for m in talk.said if m["parent_header"].get("msg_id") == cell]
    assert kinds.index("display_data") > len(kinds) - 5
