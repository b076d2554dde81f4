"""A run over many sessions: pushed one after another, each from what the one before left, whatever happens to any."""

import json
import subprocess
import sys
import time
from pathlib import Path

import kaggle_server
import pytest
from families import LINES, byte_level, tiny_model, unigram
from kaggle_server import CLIENTS, KaggleServer, command, files_of, pushes

from kdlib import demo, files

sys.path.append(str(kaggle_server.KAGGLE))
pytest.importorskip("kagglesdk", reason="the client needs Python 3.11")

import kernel

REF = "ann/kdlib-distill"
DIES = """
import os
plain = {what}
def dies(*given, **more):
    {before}
    plain(*given, **more)
    os._exit(9)
{what} = dies
"""
HURRY = "relay.BUSY_S.update(sessions=0.05, quota=0.05)"


def relayed(server, tmp_path, *words, more="", version="2.2.5"):
    words = ["--owner", "ann", "--param", "max_steps=7", "--out", "relay", "--poll", "0.02", *words]
    return command(server, tmp_path, "relay", words, version, HURRY + "\n" + more)


def state_of(tmp_path):
    return files.read_json(tmp_path / "relay" / "relay.json")["sessions"]


@pytest.mark.parametrize("version", sorted(CLIENTS))
def test_sessions_follow_each_other_until_the_run_is_complete(server, tmp_path, version):
    ran = relayed(server, tmp_path, version=version)
    assert ran.returncode == 0, ran.stderr
    sent = pushes(server)
    assert [request.get("kernelDataSources", []) for request in sent] == [[], [REF], [REF]]
    assert [each["state"] for each in state_of(tmp_path)] == ["paused", "paused", "complete"]
    assert "Session 2 is paused: step 2 of 3" in ran.stdout and "Distillation helped." in ran.stdout
    outputs = server.kernels[REF][2].outputs
    assert files_of(tmp_path / "relay" / "outputs") == files_of(outputs)
    assert not list((tmp_path / "relay").glob("session-*/run/student"))  # weights are fetched once, at the end


def test_a_relay_that_is_done_says_so_again_and_pushes_nothing(server, tmp_path):
    relayed(server, tmp_path)
    ran = relayed(server, tmp_path)
    assert (ran.returncode, len(pushes(server))) == (0, 3)
    assert "Distillation helped." in ran.stdout


@pytest.mark.parametrize(
    ("what", "before"),
    [
        ("client.Client.push", ""),
        ("client.Client.push", "os._exit(9)"),
        ("relay.Relay._save", ""),
        ("relay.Relay._ended", ""),
    ],
)
def test_a_killed_relay_goes_on_and_never_pushes_twice(server, tmp_path, what, before):
    dies = DIES.format(what=what, before=before or "pass")
    killed = [relayed(server, tmp_path, more=dies).returncode for _ in range(3)]
    assert killed == [9, 9, 9]
    ran = relayed(server, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [each["state"] for each in state_of(tmp_path)] == ["paused", "paused", "complete"]
    assert len(server.kernels[REF]) == 3


def test_a_complete_that_is_of_the_version_before_is_not_believed(server, tmp_path):
    server.stale = 2
    ran = relayed(server, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert len(server.kernels[REF]) == 3


def test_outputs_of_another_session_are_not_taken_for_ours(server, tmp_path, monkeypatch):
    """A COMPLETE is shown, and the files still are those of the version before."""
    plain, shown = kaggle_server.Handler.ListKernelSessionOutput, []

    def late(self, request):
        if request.get("versionLabel") == "v2" and len(shown) < 3:
            shown.append(request)
            request = {**request, "versionLabel": "v1"}
        return plain(self, request)

    monkeypatch.setattr(kaggle_server.Handler, "ListKernelSessionOutput", late)
    ran = relayed(server, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "The outputs belong to another session" in ran.stdout
    assert [each["step"] for each in state_of(tmp_path)] == [1, 2, 3]


def test_lost_sessions_are_pushed_again_from_what_there_is(server, tmp_path):
    server.fates = ["error", "complete", "cancel", "error", "complete"]
    ran = relayed(server, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert [each["state"] for each in state_of(tmp_path)] == ["lost", "paused", "lost", "lost", "complete"]
    assert [request.get("kernelDataSources", []) for request in pushes(server)] == [[], [], [REF], [REF], [REF]]
    assert ran.stdout.count("it was so decided") >= 3  # the end of each log is shown


def test_three_lost_sessions_in_a_row_are_enough(server, tmp_path):
    server.fates = ["complete", "error", "error", "cancel", "complete", "complete"]
    ran = relayed(server, tmp_path)
    assert (ran.returncode, len(pushes(server))) == (1, 4)
    assert "3 consecutive sessions have no outputs" in ran.stdout


def test_sessions_that_get_nowhere_are_enough_too(server, tmp_path):
    server.leave = leaving(state="paused", step=5, max_steps=9, reason="the start took all of the time")
    ran = relayed(server, tmp_path)
    assert (ran.returncode, len(pushes(server))) == (1, 3)
    assert "stayed at step 5: the start took all" in ran.stdout


def test_a_failed_run_is_told_and_stops(server, tmp_path):
    server.leave = leaving(
        state="failed", step=5, max_steps=9, reason="RuntimeError: the loss was no number 20 times in a row"
    )
    ran = relayed(server, tmp_path)
    assert (ran.returncode, len(pushes(server))) == (1, 1)
    assert "The run failed: RuntimeError: the loss was no number" in ran.stdout


def leaving(**told):
    def leave(version, working):
        (working / "run").mkdir()
        (working / "run" / "status.json").write_text(json.dumps(told))
        (working / "kernel.json").write_text(json.dumps(kaggle_server.stamp_of(version)))

    return leave


def test_where_kaggle_has_no_room_it_waits_and_says_how_long(server, tmp_path):
    server.errors = [
        "Maximum batch GPU session count of 2 reached.",
        "Maximum weekly GPU quota of 30.00 hours reached.",
    ]
    ran = relayed(server, tmp_path)
    assert (ran.returncode, len(server.kernels[REF])) == (0, 3), ran.stderr
    assert ran.stdout.count("No session can start: Maximum") == 2
    assert ran.stdout.count("Next attempt at 20") == 2


def test_a_session_that_quota_ends_at_once_is_no_loss(server, tmp_path, monkeypatch):
    server.fates = ["error"] * 4 + ["complete"]
    plain = KaggleServer._end
    message = "Maximum weekly GPU quota of 30.00 hours reached."
    monkeypatch.setattr(KaggleServer, "_end", staticmethod(lambda version, fate, _: plain(version, fate, message)))
    ran = relayed(server, tmp_path)
    assert (ran.returncode, len(server.kernels[REF])) == (0, 5), ran.stdout


@pytest.mark.parametrize(
    ("limit", "pushed", "says"),
    [
        (["--sessions", "2"], 2, "--sessions 2 reached"),
        (["--budget-hours", "0.033"], 2, "--budget-hours 0.033 reached"),
        (["--until", "2020-01-01"], 0, "--until 2020-01-01 reached"),
    ],
)
def test_a_limit_of_the_relay_is_a_pause(server, tmp_path, limit, pushed, says):
    ran = relayed(server, tmp_path, "--timeout", "60s", *limit)
    assert (ran.returncode, len(pushes(server))) == (0, pushed), ran.stdout + ran.stderr
    assert says in ran.stdout
    assert relayed(server, tmp_path, "--timeout", "60s").returncode == 0
    assert len(pushes(server)) == 3


def test_a_session_is_no_longer_than_what_is_left_of_the_hours(server, tmp_path):
    relayed(server, tmp_path, "--budget-hours", "2")
    parameters = kernel.parameters_of(json.loads(pushes(server)[0]["text"]))
    assert parameters["time_budget"] == "7200s"


def test_a_session_ends_itself_before_kaggle_does_whatever_is_left_of_the_hours(server, tmp_path):
    relayed(server, tmp_path, "--budget-hours", "11.9", "--sessions", "1")
    assert kernel.parameters_of(json.loads(pushes(server)[0]["text"]))["time_budget"] == "39600s"


def test_a_version_without_its_sources_is_never_adopted(server, tmp_path):
    server.invalid = {"invalidDatasetSources": ["ann/typo"]}
    ran = relayed(server, tmp_path, "--dataset", "ann/typo")
    assert (ran.returncode, len(pushes(server)), state_of(tmp_path)) == (1, 1, [])
    assert "version 1 runs without sources" in ran.stderr and "Cancel it" in ran.stderr
    server.invalid = {}
    ran = relayed(server, tmp_path, "--dataset", "ann/texts")
    assert ran.returncode == 0, ran.stderr
    assert [each["version"] for each in state_of(tmp_path)] == [2, 3]


def test_a_version_without_its_sources_is_not_adopted_after_a_kill(server, tmp_path):
    server.invalid = {"invalidDatasetSources": ["ann/typo"]}
    dies = DIES.format(what="client.Client._check_push", before="os._exit(9)")
    assert relayed(server, tmp_path, "--dataset", "ann/typo", more=dies).returncode == 9
    ran = relayed(server, tmp_path, "--dataset", "ann/typo")
    assert (ran.returncode, len(pushes(server)), state_of(tmp_path)) == (1, 1, [])
    assert "version 1 runs without sources" in ran.stderr


@pytest.mark.parametrize("name", ["losses_compared", "teacher_cache", "results"])
def test_a_notebook_that_does_not_resume_one_run_is_refused(server, tmp_path, name):
    path = kaggle_server.KAGGLE.parent / "notebooks" / f"{name}.ipynb"
    words = ["--owner", "ann", "--out", "relay", "--notebook", path]
    ran = command(server, tmp_path, "relay", words)
    assert (ran.returncode, ran.stderr.count("\n"), pushes(server)) == (2, 1, []), ran.stderr
    assert f"{name}.ipynb has no parameter `resume`" in ran.stderr and "push.py" in ran.stderr


def test_a_warning_about_the_accelerator_comes_first(server, tmp_path):
    ran = relayed(server, tmp_path, "--accelerator", "NvidiaTeslaP100")
    assert (ran.returncode, ran.stderr.count("warning: NvidiaTeslaP100: retired")) == (0, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--param", "max_stpes=3"], "did you mean"),
        (["--until", "soon"], "--until takes a date"),
        (["--poll", "0"], "take numbers above 0"),
        (["--slug", "other-one"], "holds another relay: kernel was 'ann/kdlib-distill'"),
        (["--param", "seed=3"], "parameters was ['max_steps=7']"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_pushed(server, tmp_path, words, says):
    (tmp_path / "relay").mkdir()
    begun = {"kernel": REF, "notebook": "distill.ipynb", "parameters": ["max_steps=7"], "sessions": []}
    (tmp_path / "relay" / "relay.json").write_text(json.dumps(begun))
    ran = relayed(server, tmp_path, *words)
    assert (ran.returncode, ran.stderr.count("\n"), pushes(server)) == (2, 1, []), ran.stderr
    assert says in ran.stderr


def test_two_relays_do_not_share_a_folder(server, tmp_path):
    holds = "import fcntl, os\nos.makedirs('relay')\nheld = open('relay/.lock', 'a')\nfcntl.flock(held, fcntl.LOCK_EX)"
    ran = relayed(server, tmp_path, more=holds)
    assert ran.returncode == 2 and "another relay uses" in ran.stderr


@pytest.mark.parametrize(
    "method", ["GetKernelSessionStatus", "SaveKernel", "ListKernelSessionOutput", "files", "GetKernel"]
)
def test_an_outage_of_kaggle_is_waited_for(server, tmp_path, method):
    server.faults[method] = ["500"] * 8
    ran = relayed(server, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Next attempt in" in ran.stdout
    assert [each["state"] for each in state_of(tmp_path)] == ["paused", "paused", "complete"]
    assert len(server.kernels[REF]) == 3


def test_follow_shows_the_log(server, tmp_path):
    def slowly(version, working):
        version.log = json.dumps([{"stream_name": "stdout", "time": 1.0, "data": f"line of {version.number}\n"}])
        time.sleep(0.5)
        kaggle_server.leave(version, working)

    server.leave = slowly
    ran = relayed(server, tmp_path, "--follow")
    assert ran.returncode == 0
    assert [f"  | line of {number}\n" in ran.stdout for number in (1, 2, 3)] == [True] * 3


# sessions that really run


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Python as a kernel has it: all packages but kdlib, and no way out to any network."""
    folder = tmp_path_factory.mktemp("image")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    (site / "image.pth").write_text(f"{next(Path(sys.prefix).glob('lib/python3*/site-packages'))}\n")
    (site / "sitecustomize.py").write_text(NO_NETWORK)
    python = folder / "bin" / "python"
    assert subprocess.run([python, "-c", "import kdlib"], capture_output=True, cwd=folder, env={}).returncode == 1
    return str(python)


NO_NETWORK = """
import socket
plain = socket.socket.connect
def connect(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(101, f"no network here: {address}")
    return plain(self, address)
socket.socket.connect = connect
"""


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """A data set with `teacher`, `student` and `texts`."""
    folder = tmp_path_factory.mktemp("attached")
    for name, tokenizer, width in (("teacher", byte_level(), 24), ("student", unigram(), 16)):
        demo.save(tiny_model(tokenizer, width), tokenizer, folder / name)
    (folder / "texts").mkdir()
    lines = [json.dumps({"text": f"{LINES[i % 6]} {LINES[(i + 1) % 6]} Number {i}."}) for i in range(40)]
    (folder / "texts" / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


OF_PAIR = {
    "teacher": "pair/teacher", "student": "pair/student", "dataset": "pair/texts", "max_length": 48, "batch_size": 2,
    "learning_rate": 1e-3, "check_teacher": False, "eval_tokens": 300, "control": "off",
}  # fmt: skip


def really(server, tmp_path, out, timeout, max_steps, *more, code="", **changes):
    parameters = {**OF_PAIR, "max_steps": max_steps, "eval_steps": max_steps // 4, **changes}
    words = ["--owner", "ann", "--dataset", "ann/pair", "--accelerator", "none", "--timeout", timeout, "--out", out]
    words += [f"--param={name}={value}" for name, value in parameters.items()]
    return command(server, tmp_path, "relay", [*words, "--poll", "0.5", *more], more=HURRY + "\n" + code)


def student_of(folder):
    found = files_of(folder / "outputs" / "run" / "student")
    return {name: content for name, content in found.items() if name != "README.md"}


def test_the_pushed_notebook_needs_no_kdlib_and_no_network(image, attached, tmp_path):
    server = KaggleServer(tmp_path / "kaggle", image)
    server.attach("ann/pair", attached)
    try:
        ran = really(server, tmp_path, "relay", "10m", 8)
    finally:
        server.close()
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr
    assert "it is unknown whether distillation helped" in ran.stdout  # control: off
    run = tmp_path / "relay" / "outputs" / "run"
    assert files.read_json(run / "env.json")["image"] == "gcr.io/an-image@sha256:0"
    assert files.read_json(run / "env.json")["versions"]["kdlib"]
    assert {"model.safetensors", "README.md", "tokenizer.json"} <= set(files_of(run / "student"))
    assert server.connects == []


KILLED_ONCE = """
import os, pathlib
plain = client.Client.push
def push(*given, **more):
    made = plain(*given, **more)
    if made.version == 2:
        os._exit(9)
    return made
client.Client.push = push
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "fates", "code"),
    [
        ("new", [], KILLED_ONCE),
        ("old", ["run", "run:20", "error", "run", "cancel:15"], ""),
    ],
    ids=["killed between push and poll", "lost sessions"],
)
def test_four_sessions_end_with_the_bytes_of_one(image, attached, tmp_path, layout, fates, code):
    ends, lost = {}, sum(fate != "run" for fate in fates)
    for name in ("one", "four"):
        server = KaggleServer(tmp_path / f"kaggle-{name}", image, layout, fates if name == "four" else ())
        server.attach("ann/pair", attached)
        if name == "one":
            ran = really(server, tmp_path, name, "1h", 4000)
        else:
            budget = f"time_budget={quarter(tmp_path / 'one'):.0f}s"
            ran = really(server, tmp_path, name, "5m", 4000, "--param", budget, code=code)
            if code:
                assert ran.returncode == 9
                ran = really(server, tmp_path, name, "5m", 4000, "--param", budget)
        server.close()
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr
        ends[name] = student_of(tmp_path / name)
        states = [each["state"] for each in files.read_json(tmp_path / name / "relay.json")["sessions"]]
        assert states[-1] == "complete" and states.count("lost") == (lost if name == "four" else 0), states
        assert name == "one" or len(states) - lost >= 4, states
        assert len(server.kernels[REF]) == len(states)
    assert ends["one"] == ends["four"] and "model.safetensors" in ends["one"]


@pytest.mark.slow
def test_a_reading_over_two_sessions_ends_with_the_bytes_of_one(image, tmp_path):
    """The first session ends before its first training record, and its kernel ends well: what was read is mounted next."""
    folder = tmp_path / "much"
    for name, tokenizer, width in (("teacher", byte_level(), 24), ("student", unigram(), 16)):
        demo.save(tiny_model(tokenizer, width), tokenizer, folder / name)
    (folder / "texts").mkdir()
    lines = [json.dumps({"text": f"{LINES[i % 6]} {LINES[(i + 1) % 6]} Number {i}."}) for i in range(2500)]
    (folder / "texts" / "text.jsonl").write_text("\n".join(lines) + "\n")
    ends, more = {}, []
    for name in ("one", "several"):
        server = KaggleServer(tmp_path / f"kaggle-{name}", image, "new", ())
        server.attach("ann/pair", folder)
        if name == "several":
            done = files.read_json(tmp_path / "one" / "outputs" / "run" / "status.json")
            more = ["--param", f"time_budget={done['costs']['start'] + 0.6 * done['read_s']:.0f}s"]
        ran = really(server, tmp_path, name, "10m", 80, *more, batch_size=64, max_length=128)
        server.close()
        assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr
        ends[name] = student_of(tmp_path / name)
        sessions = files.read_json(tmp_path / name / "relay.json")["sessions"]
        assert [each["state"] for each in sessions] == ["paused"] * (len(sessions) - 1) + ["complete"]
        if name == "several":
            assert len(sessions) >= 3
            steps = [each.get("step") for each in sessions]
            assert steps[0] == 0, steps  # it has read, and learned nothing yet
    assert ends["one"] == ends["several"] and "model.safetensors" in ends["one"]


def quarter(folder):
    """Seconds of a session that does between a fourth and a fifth of what the run in `folder` did."""
    status = files.read_json(folder / "outputs" / "run" / "status.json")
    costs = status["costs"]
    around = 1.25 * sum(costs[task] for task in ("start", "save", "evaluate")) + 1.25 * costs.get("export", 1.0)
    return (around + (status["session_s"] - costs["start"]) / 4.5) / 0.98
