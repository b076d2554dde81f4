"""The rooms of the house: imports run downwards only, and some words have one room."""

import ast
import re
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "kdlib"
SMALL = {"clock", "config", "environment", "files", "memory", "progress"}
PACKAGES = {
    "align": set(),
    "report": set(),
    "losses": {"align"},
    "data": {"align"},
    "models": {"align", "data", "losses"},
    "training": {"align", "data", "losses", "models"},
    "evaluation": {"align", "data", "losses", "models", "report"},
    "session": {"align", "data", "losses", "models", "training", "evaluation", "report", "machine"},
}
"""What each package may import, beside the small modules."""
STANDARD_LIBRARY_ONLY = {
    "clock", "config", "environment", "files", "session.alerts",
    "session.run_folder", "session.time_budget", "report.findings", "report.spans",
}  # fmt: skip
ROOMS = [
    (r"(?<!divergences\.)\blog_softmax\b", {"losses.divergences"}),
    (r"\bplt\.|matplotlib", {"report.figures"}),
    (r"-100", {"data.windowing", "losses.divergences", "models.head"}),
    (r"\btokenizer\(", {"data.tokenize", "data.chat", "evaluation.samples"}),
    (r"\.from_pretrained\(", {"models.loading", "models.lora", "session.finish", "report.html"}),
    (r"\.backward\(|optimizer\.step\(", {"training.loop", "training.peak_memory"}),
    (r"os\.replace|safetensors", {"session.checkpoint", "files", "environment", "models.teacher_cache", "models.lora"}),
    (r"os\.environ|/kaggle/", {"environment"}),
    (r"\btime\.\w", {"clock"}),
    (r"inference_mode\(", {"models.teacher"}),
    (r"Interface\.register|register_forward", {"models.hooks", "models.head"}),
    (r"reduction=", {"losses.divergences"}),
]


def sources():
    """The source of every module, by its name without `kdlib`."""
    paths = [path for path in HOUSE.rglob("*.py") if path.stem != "__init__"]
    return {".".join(path.relative_to(HOUSE).with_suffix("").parts): path.read_text(encoding="utf-8") for path in paths}


def imports_of(source):
    """The dotted name of everything that is imported."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported(source):
    """Names of the modules of kdlib that are imported, without `kdlib`."""
    return {name.removeprefix("kdlib.") for name in imports_of(source) if name.startswith("kdlib.")} & set(sources())


@pytest.mark.parametrize("module", sorted(sources()))
def test_a_package_imports_only_what_it_may(module):
    room = module.partition(".")[0]
    wanted = {name.partition(".")[0] for name in modules_imported(sources()[module])} - {room}
    assert room not in SMALL or wanted <= SMALL
    assert room not in PACKAGES or wanted <= PACKAGES[room] | SMALL


def test_every_package_has_its_rule():
    assert {path.parent.name for path in HOUSE.glob("*/__init__.py")} == set(PACKAGES)


def test_the_map_in_contributing_names_every_module():
    text = (HOUSE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*`.*) \|$", text, re.M)
    named = {f"{package}.{module}" for package, line in rows for module in re.findall(r"`(\w+)`", line)}
    top = text[text.index("At the top of `kdlib`") : text.index("One step:")]
    named |= set(re.findall(r"`(\w+)`", top)) - {"kdlib"}
    assert named == set(sources())


def test_modules_of_a_package_import_each_other_without_a_circle():
    graph = {module: modules_imported(source) for module, source in sources().items()}
    while leaves := {module for module, wanted in graph.items() if not wanted}:
        graph = {module: wanted - leaves for module, wanted in graph.items() if module not in leaves}
    assert not graph


def test_nothing_in_the_library_imports_the_embedded_default():
    assert {name for name, source in sources().items() if "demo" in modules_imported(source)} == {"cli", "self_test"}


@pytest.mark.parametrize("room", sorted(STANDARD_LIBRARY_ONLY))
def test_the_ground_floor_needs_the_standard_library_only(room):
    import sys

    outside = {name.split(".")[0] for name in imports_of(sources()[room])} - sys.stdlib_module_names - {"kdlib"}
    assert not outside
    assert modules_imported(sources()[room]) <= STANDARD_LIBRARY_ONLY


def test_pages_and_pictures_never_see_a_model():
    for room in (name for name in sources() if name.startswith("report.")):
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

    come_with_them = {"tokenizers", "pyarrow", "PIL", "IPython", "psutil", "filelock", "pandas", "jinja2"}
    shipped = allowed | come_with_them | sys.stdlib_module_names
    clients = ("kaggle", "kagglesdk", "kaggle_secrets", "requests", "huggingface_hub")
    optional = {
        "bitsandbytes": {"models.devices"},
        "peft": {"models.lora"},
        **{name: {"session.backup", "session.upload"} for name in clients},
    }
    for room, source in sources().items():
        wanted = {name.split(".")[0] for name in imports_of(source)} - {"kdlib"} - shipped
        assert all(room in optional.get(name, ()) for name in wanted), room
