"""The kernel as it is sent: a notebook with its parameters injected and kdlib inside, and its metadata, checked.

Only `code_file` of a folder ever reaches Kaggle, so everything else must be inside the notebook: the cell tagged `kdlib` is
replaced by one that holds the package.
"""

import ast
import base64
import functools
import hashlib
import io
import json
import re
import sys
import tarfile
from pathlib import Path

HOUSE = Path(__file__).resolve().parent.parent
if str(HOUSE) not in sys.path:
    sys.path.append(str(HOUSE))  # a checkout that was not installed

import kdlib
from kdlib import config

ACCELERATORS = {
    "NvidiaTeslaT4": "two T4 of 16 GB",
    "NvidiaTeslaP100": "retired on 2026-09-15; Kaggle runs such a push on two T4 and says nothing",
    "none": "no card",
}
MARGIN_S = 3600
"""What a session's time budget leaves of its timeout, at most: files are packed and uploaded after the notebook's end."""
SESSION_S = 12 * 3600
"""Kaggle's own limit of a session with a card."""
LINE = 120
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}
"""Of a sent notebook: one without a kernelspec would fail, and widget state has no place in it."""
KEYS = [name for name, _ in config.flags()] + ["preset"]

CELL = '''\
# kdlib {version} itself, carried inside, so that this notebook needs nothing else, fork and internet off included.
import base64
import functools
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

CHECKSUM = "{checksum}"
PACKED = """
{packed}
"""
packed = base64.b85decode("".join(PACKED.split()))
if hashlib.sha256(packed).hexdigest() != CHECKSUM:
    raise SystemExit("The cell that holds kdlib was changed. Take it from the notebook that this one was copied from.")
kdlib_folder = Path(tempfile.gettempdir()) / f"kdlib-{{CHECKSUM[:16]}}"
if not kdlib_folder.exists():
    beside = Path(tempfile.mkdtemp(dir=kdlib_folder.parent))
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
        archive.extractall(beside, **({{"filter": "data"}} if hasattr(tarfile, "data_filter") else {{}}))
    beside.rename(kdlib_folder)
sys.path.insert(0, str(kdlib_folder))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(kdlib_folder), os.environ.get("PYTHONPATH")]))
Path("kernel.json").write_text(json.dumps({stamp}))
'''


@functools.cache
def package():
    """kdlib as an xz archive, the same bytes for the same source, with what `importlib.metadata` asks for."""
    about = f"Metadata-Version: 2.1\nName: kdlib\nVersion: {kdlib.__version__}\n"
    files = {f"kdlib-{kdlib.__version__}.dist-info/METADATA": about.encode()}
    sources = sorted((HOUSE / "kdlib").rglob("*.py"))
    files.update({path.relative_to(HOUSE).as_posix(): path.read_bytes() for path in sources})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def carrying_cell(stamp):
    """Source of the cell that unpacks kdlib and leaves `stamp` (a dict) as `kernel.json` among the outputs."""
    packed = package()
    text = base64.b85encode(packed).decode()  # its alphabet has neither quotes nor backslashes
    lines = "\n".join(text[start : start + LINE] for start in range(0, len(text), LINE))
    checksum = hashlib.sha256(packed).hexdigest()
    return CELL.format(version=kdlib.__version__, checksum=checksum, packed=lines, stamp=json.dumps(stamp))


def parameters_of(notebook):
    """`{name: value}` of the cell tagged `parameters`: literals only. ValueError where there is no such cell."""
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            assignments = ast.parse("".join(cell["source"])).body
            return {each.targets[0].id: ast.literal_eval(each.value) for each in assignments}
    raise ValueError("the notebook has no cell tagged `parameters`")


def typed(given, known):
    """`given` parameters (`{name: text}`) as the values that the notebook takes. What is no parameter of its own, but a key
    of kdlib, goes into its parameter `settings`. ValueError for anything else, and for values that kdlib would refuse.
    """
    values, settings = {}, {}
    for name, text in given.items():
        plain = name.replace("-", "_")
        if plain in known:
            values[plain] = _as(plain, text, known[plain])
        else:
            settings[plain] = _setting(name, plain, text, known)
    settings = {**values.get("settings", {}), **settings}
    if settings:
        values["settings"] = {**known["settings"], **settings}
    config.Config.from_dict({**{name: value for name, value in values.items() if name in KEYS}, **settings})
    return values


def _as(name, text, default):
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", dict: "{'key': value}"}
    words = {"true": True, "yes": True, "false": False, "no": False}
    try:
        if isinstance(default, bool):
            return words[text.lower()]
        if isinstance(default, (int, float)):
            return type(default)(text)
        if isinstance(default, dict):
            value = ast.literal_eval(text)
            if not isinstance(value, dict):
                raise ValueError
            return value
        return text
    except (ValueError, KeyError, SyntaxError):
        raise ValueError(f"--param {name} takes {kinds[type(default)]}, as {default!r} is; got {text!r}") from None


def _setting(name, plain, text, known):
    if "settings" not in known or plain not in KEYS:
        choices = [*known, *(KEYS if "settings" in known else ())]
        hint = config.nearest(plain, choices) or f"; have {', '.join(choices)}"
        raise ValueError(f"--param {name}: no parameter of the notebook{hint}")
    return config.parse_flag(plain, text)


def parameters_of_sent(notebook):
    """The parameters that a built notebook runs with: its own, and over them what was injected."""
    injected = [cell for cell in notebook["cells"] if "injected-parameters" in cell["metadata"].get("tags", [])]
    found = parameters_of(notebook)
    for cell in injected:
        found.update(parameters_of({"cells": [{**cell, "metadata": {"tags": ["parameters"]}}]}))
    return found


def build(path, values, stamp):
    """The notebook at `path` as it is sent: parameters injected, kdlib inside, no outputs, nothing of widgets."""
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    notebook = load_notebook_node(str(path))
    notebook.metadata.update(nbformat.from_dict(METADATA))
    if values:
        notebook = parameterize_notebook(notebook, values)
    carriers = [cell for cell in notebook.cells if "kdlib" in cell.metadata.tags]
    if len(carriers) != 1:
        raise ValueError(
            f"{path} has {len(carriers)} cells tagged `kdlib`; expected one, which is replaced by the package"
        )
    carriers[0].source = carrying_cell(stamp)
    carriers[0].metadata.update({"_kg_hide-input": True, "jupyter": {"source_hidden": True}})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("execution", None)
            cell.metadata.pop("papermill", None)
    notebook.metadata = nbformat.from_dict(METADATA)
    nbformat.validate(notebook)
    return notebook


def metadata_of(options, sources=()):
    """The metadata to send, checked: ValueError names what is wrong before anything leaves this machine. `sources`: kernels
    whose output is mounted besides `options.kernel_source`.
    """
    from slugify import slugify

    slug = options.slug or slugify(options.title or "")
    title = options.title or slug.replace("-", " ")
    shape = options.accelerator
    _want(r"[A-Za-z0-9][A-Za-z0-9_-]*", options.owner, "--owner", "your Kaggle name as in kaggle.com/NAME")
    _want(r"[a-z0-9]+(-[a-z0-9]+)*", slug, "--slug", "lower-case words joined by hyphens")
    if not 5 <= len(slug) <= 50:
        raise ValueError(f"--slug {slug!r} has {len(slug)} characters; Kaggle takes 5 to 50")
    if slugify(title) != slug:
        raise ValueError(
            f"--title {title!r} makes the slug {slugify(title)!r}, not {slug!r}: Kaggle would go by the title"
        )
    _want(r"[A-Za-z0-9]+", shape, "--accelerator", f"one of {', '.join(ACCELERATORS)}")
    if shape not in ACCELERATORS and (near := config.nearest(shape, ACCELERATORS)):
        raise ValueError(f"--accelerator {shape!r} is not known{near}")  # any other name may be one we have not met
    kernels = [*options.kernel_source, *(each for each in sources if each not in options.kernel_source)]
    for name, given, parts, example in (
        ("--dataset", options.dataset, 2, "owner/name"),
        ("--kernel-source", kernels, 2, "owner/name"),
        ("--model", options.model, 5, "owner/model/framework/variation/version"),
    ):
        for each in given:
            _want("/".join([r"[A-Za-z0-9][\w.-]*"] * parts), each, name, example)
    if options.model and not all(each.rsplit("/", 1)[1].isdigit() for each in options.model):
        raise ValueError(f"--model ends with its version, a number; got {', '.join(options.model)}")
    if options.docker_image:
        _want(r"[\w.-]+(/[\w.-]+)+(@sha256:[0-9a-f]{64}|:[\w.-]+)?", options.docker_image, "--docker-image", "an image")
    found = {
        "id": f"{options.owner}/{slug}", "title": title, "code_file": "kernel.ipynb", "language": "python",
        "kernel_type": "notebook", "is_private": not options.public, "enable_gpu": shape != "none", "enable_tpu": False,
        "enable_internet": options.internet, "dataset_sources": options.dataset, "competition_sources": [],
        "kernel_sources": kernels, "model_sources": options.model,
    }  # fmt: skip
    if shape != "none":
        found["machine_shape"] = shape
    if options.docker_image:
        found["docker_image"] = options.docker_image
    return found


def _want(pattern, text, name, example):
    if not re.fullmatch(pattern, text or ""):
        raise ValueError(f"{name} takes {example}; got {text!r}")


def time_budget(timeout_s):
    """The time budget of a session that Kaggle ends after `timeout_s`: an hour less, or a tenth where it is short."""
    whole = min(timeout_s or SESSION_S, SESSION_S)
    return f"{whole - min(MARGIN_S, whole // 10):.0f}s"


def write(folder, notebook, metadata):
    """The folder that the client sends."""
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / metadata["code_file"])
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
