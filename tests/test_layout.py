"""The rooms of the house: imports run downwards only, and some words have one room."""

import ast
import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "kdlib"
FLOORS = [
    "cli kernel",
    "self_test",
    "self_checks",
    "tiny",
    "doctor",
    "foretold",
    "session",
    "reading",
    "cache",
    "course conclusion resume pairing comparison",
    "leg report inputs peak saving dashboard",
    "plots charts train verdict cockpit front",
    "inside",
    "signals",
    "evaluate objective checkpoint export identity plan ahead",
    "spelled walk",
    "teacher parts router retention samples",
    "models projector",
    "batching hooks ema seeds optimizer",
    "windows",
    "data corpus",
    "align vocab fused attention chat",
    "losses machine copies upload",
    "memory precision schedule records env alerts",
    "keys",
    "config",
    "budget findings style wishes files progress",
]
FLOOR = {room: len(FLOORS) - height for height, rooms in enumerate(FLOORS) for room in rooms.split()}
STANDARD_LIBRARY_ONLY = {
    "config",
    "budget",
    "schedule",
    "records",
    "env",
    "alerts",
    "findings",
    "keys",
    "wishes",
    "files",
}
ROOMS = [
    (r"\blog_softmax\b", {"losses"}),
    (r"\bplt\.|matplotlib", {"style"}),
    (r"-100", {"data", "losses", "models"}),
    (r"\btokenizer\(", {"data", "chat", "samples"}),
    (r"\.from_pretrained\(", {"models", "export", "report"}),
    (r"\.backward\(|optimizer\.step\(", {"train", "peak"}),
    (r"os\.replace|safetensors", {"checkpoint", "files", "env", "signals"}),
    (r"os\.environ|/kaggle/", {"env"}),
    (r"\btime\.", {"budget"}),
    (r"inference_mode\(", {"teacher"}),
    (r"Interface\.register|register_forward", {"hooks"}),
    (r"reduction=", {"losses"}),
]


def sources():
    return {path.stem: path.read_text(encoding="utf-8") for path in HOUSE.glob("*.py") if path.stem != "__init__"}


def imports_of(source):
    """`(module, depth)` of every import statement; depth 0 is the top of the file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(source):
    return {name.split(".")[1] for name in imports_of(source) if name.startswith("kdlib.")} & set(FLOOR)


def test_every_file_has_a_floor():
    assert set(sources()) == set(FLOOR)


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_imports_run_downwards_only(room):
    above = {other for other in rooms_imported(sources()[room]) if FLOOR[other] > FLOOR[room]}
    beside = {other for other in rooms_imported(sources()[room]) if FLOOR[other] == FLOOR[room]}
    assert not above
    assert not beside or room in ("cli", "data")


def test_nothing_in_the_library_imports_the_embedded_default():
    assert {room for room, source in sources().items() if "tiny" in rooms_imported(source)} == {"cli", "self_checks"}


@pytest.mark.parametrize("room", sorted(STANDARD_LIBRARY_ONLY))
def test_the_ground_floor_needs_the_standard_library_only(room):
    import sys

    outside = {name.split(".")[0] for name in imports_of(sources()[room])} - sys.stdlib_module_names - {"kdlib"}
    assert not outside
    assert rooms_imported(sources()[room]) <= STANDARD_LIBRARY_ONLY


def test_pages_and_pictures_never_see_a_model():
    for room in ("report", "plots", "charts", "style", "cockpit", "dashboard", "front"):
        assert not {"torch", "transformers"} & {name.split(".")[0] for name in imports_of(sources()[room])}


@pytest.mark.parametrize(("words", "rooms"), ROOMS, ids=[words for words, _ in ROOMS])
def test_a_word_has_its_room(words, rooms):
    found = set()
    for room, source in sources().items():
        code = re.sub(r'"""(?s:.*?)"""|#[^\n]*', "", source)
        found |= {room} if re.search(words, code) else set()
    assert found <= rooms


def test_the_kaggle_folder_does_not_shadow_the_clients_package():
    assert not (HOUSE.parent / "kaggle" / "__init__.py").exists()


def test_the_versions_that_the_machine_must_have_are_the_required_ones():
    from kdlib.machine import AT_LEAST

    wanted = (HOUSE.parent / "requirements.txt").read_text().split()
    assert {name: ".".join(map(str, least)) for name, least in AT_LEAST.items()} == dict(
        line.split(">=") for line in wanted if ">=" in line
    )


def test_the_package_needs_only_what_the_image_ships():
    allowed = {
        "torch",
        "transformers",
        "datasets",
        "accelerate",
        "safetensors",
        "numpy",
        "tqdm",
        "matplotlib",
        "ipywidgets",
    }
    wanted = (HOUSE.parent / "requirements.txt").read_text().split()
    assert {re.split(r"[<>=]", line)[0] for line in wanted} == allowed
    import sys

    come_with_them = {"tokenizers", "pyarrow", "PIL", "IPython", "psutil", "filelock"}
    shipped = allowed | come_with_them | sys.stdlib_module_names
    clients = ("kaggle", "kagglesdk", "kaggle_secrets", "requests", "huggingface_hub")
    optional = {"bitsandbytes": {"precision"}, **{name: {"copies", "upload"} for name in clients}}
    for room, source in sources().items():
        wanted = {name.split(".")[0] for name in imports_of(source)} - {"kdlib"} - shipped
        assert all(room in optional.get(name, ()) for name in wanted), room
