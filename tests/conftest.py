import atexit
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import types

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network, and none waits for it to fail
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="kdlib-datasets-")  # nor finds what another run left
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import copy_servers
import kaggle_server
import pytest
import torch
from families import LINES, byte_level, tiny_model, unigram

from kdlib import cli, demo
from kdlib.models import devices
from kdlib.report import html


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    cli.quiet()
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _signals_as_before():
    """A session that a test has begun and never driven listens no longer."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _accelerate_as_it_was():
    """No test leaves its arithmetic to the next one."""
    before = devices._selected()
    yield
    devices._select(before)


@pytest.fixture(autouse=True)
def _without_pictures(request, monkeypatch):
    """A run of a test leaves no pictures, which take longer than its training, unless the test is marked `pictures`."""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(html, "_draw", lambda *_: {"light": "", "dark": ""})


@pytest.fixture(scope="session")
def texts():
    """Forty short documents, all different."""
    chance = random.Random(0)
    return [" ".join(chance.sample(LINES[:6], 3)) + f" Number {i}." for i in range(40)]


@pytest.fixture(scope="session")
def pair(tmp_path_factory, texts):
    """A folder with `teacher`, `student` (random, different tokenizers) and `text.jsonl`."""
    cli.quiet()
    folder = tmp_path_factory.mktemp("pair")
    for name, tokenizer, width in (("teacher", byte_level(), 24), ("student", unigram(), 16)):
        demo.save(tiny_model(tokenizer, width), tokenizer, folder / name)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


@pytest.fixture
def settings(pair):
    """Config values of a run on the pair that takes a second."""
    return {
        "teacher": str(pair / "teacher"), "student": str(pair / "student"), "dataset": str(pair / "text.jsonl"),
        "max_length": 48, "batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "check_teacher": False,
        "eval_tokens": 300, "control": "full",
    }  # fmt: skip


@pytest.fixture
def server(tmp_path):
    """A Kaggle whose versions are complete at once, with what `kaggle_server.leave` writes."""
    server = kaggle_server.KaggleServer(tmp_path / "kaggle", fates=["complete"] * 50, leave=kaggle_server.leave)
    yield server
    server.close()
    assert server.connects == []  # nothing tried to leave this machine


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A server, and an environment in which Kaggle is that."""
    server = copy_servers.DataSets(tmp_path / "kaggle")
    for name in [name for name in os.environ if "proxy" in name.lower() or "KAGGLE" in name]:
        monkeypatch.delenv(name)
    for name, value in server.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(kaggle_server.CLIENTS["2.2.5"]))
    yield server
    server.close()
    assert server.connects == []  # nothing tried to leave this machine


@pytest.fixture
def notebook_secrets(monkeypatch):
    """The secrets that are attached to a Kaggle notebook, to be filled."""
    attached = {}
    client = types.SimpleNamespace(get_secret=attached.__getitem__)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=lambda: client))
    return attached


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub, and an environment in which it is the only one."""
    server = copy_servers.Hub(tmp_path / "hub")
    for name in [name for name in os.environ if "proxy" in name.lower()]:
        monkeypatch.delenv(name)
    told = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_abcdefgh", "HF_HOME": str(tmp_path / "hf")}
    told |= {"HTTPS_PROXY": server.address}
    for name, value in {**told, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()
    assert server.connects == []


@pytest.fixture
def run(tmp_path, kaggle):
    """A run folder whose every checkpoint is copied to Kaggle."""
    made = copy_servers.Run(tmp_path / "run", "kaggle:ann/run-copy")
    yield made
    made.copies.close()
