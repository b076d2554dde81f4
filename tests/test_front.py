"""The panel in a real kernel, spoken to as an editor speaks to it, and as a program that runs notebooks by the batch."""

import json
import queue
import time

import jupyter_client.manager
import pytest

from kdlib import environment, files
from kdlib.session import run_folder

CELL = """
from kdlib import Config, cli, distill
from kdlib.report import live_panel
cli.quiet()
panel = live_panel.LivePanel()
for record in distill(Config.from_dict({settings}), {out!r}, wishes=panel.wishes):
    panel.update(record)
panel.close()
print(record["kind"], panel.problem)
"""


class Talk:
    """What a kernel says, read on until something is heard."""

    def __init__(self, client):
        self.client, self.said = client, []

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

    def click(self, name):
        opened = [c for c in self.of("comm_open") if c["data"]["state"].get("description") == name]
        content = {"comm_id": opened[0]["comm_id"], "data": {"method": "custom", "content": {"event": "click"}}}
        self.client.shell_channel.send(self.client.session.msg("comm_msg", content))


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
    yield Talk(client)
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def test_clicks_are_heard_while_the_cell_runs_and_the_next_cell_waits(settings, tmp_path, talk):
    """Each button once; what they do is in the run folder. Nothing is printed, and no cell is lost or comes early."""
    plan = {**settings, "control": "off", "max_steps": 50_000, "save_steps": 40_000, "eval_steps": 40_000}
    first = talk.client.execute(CELL.format(settings=json.loads(json.dumps(plan)), out=str(tmp_path / "run")))
    second, third = (talk.client.execute(f"print({word!r})") for word in ("second", "third"))
    talk.until(tells("tokens/s"))
    for name, answer in (
        ("Evaluate now", "bits per byte, on request"),
        ("Save now", "saved as"),
        ("Pause and save", "<b>Paused:</b>"),
    ):
        talk.click(name)
        talk.until(tells(answer))
    talk.until(is_end_of(third))
    assert [c["text"] for c in talk.of("stream", first)] == ["paused None\n"]
    assert [c["text"] for c in talk.of("stream")] == ["paused None\n", "second\n", "third\n"]
    assert [c["data"].keys() & {"image/png"} for c in talk.of("display_data")] == [set()]
    ends = [m["parent_header"]["msg_id"] for m in talk.said for cell in (first, second, third) if is_end_of(cell)(m)]
    assert ends == [first, second, third]
    run = run_folder.RunFolder(tmp_path / "run")
    assert run.last_status()["state"] == "paused"
    assert len(list(run.checkpoints.glob("step-*"))) == 2
    assert sum(bool(r.get("asked")) for r in files.read_records(run.records.path)) == 1


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
