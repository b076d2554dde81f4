"""Builds a kernel to push: a notebook with its parameters and the kdlib package, and validated metadata.

Kaggle receives only the `code_file` of a folder. Therefore the cell tagged `kdlib` is replaced by one with the package.
Parameters are written into the cell tagged `parameters`, so that a fork has one place to change them.
"""

import ast
import base64
import functools
import hashlib
import io
import json
import posixpath
import re
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # a checkout without an installation

import kdlib
from kdlib import config

RETIRED_TPU = "retired; Kaggle silently uses a TpuV5E8 instead"
TPU = "a TPU, which kdlib does not use: the run would train on the CPU"
SPECIAL = "not for every account"
ACCELERATORS = {
    "NvidiaTeslaT4": "two T4 of 16 GB", "none": "no GPU", "NvidiaTeslaT4Highmem": SPECIAL, "NvidiaL4": SPECIAL,
    "NvidiaL4X1": SPECIAL, "NvidiaTeslaA100": SPECIAL, "NvidiaH100": SPECIAL, "NvidiaRtxPro6000": SPECIAL,
}  # fmt: skip
"""The accelerators that kdlib can use, of those that the original client lists as of September 2026."""
USELESS = {
    "NvidiaTeslaP100": "retired on 2026-09-15; Kaggle silently uses two T4 instead", "TpuV5E8": TPU, "TpuV6E8": TPU,
    "TpuV38": RETIRED_TPU, "Tpu1VmV38": RETIRED_TPU,
}  # fmt: skip
WORKING = "/kaggle/working"
"""The folder whose files Kaggle keeps."""
MARGIN_S = 3600
"""Maximum reserve between time budget and session timeout, for uploading the outputs."""
SESSION_S = 12 * 3600
"""Kaggle's limit of a GPU session."""
LINE_LENGTH = 120
METADATA = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
    "language_info": {"name": "python"},
}
"""Metadata of a pushed notebook: a kernelspec is required, and widget state is dropped."""
KEYS = [name for name, _ in config.flags()] + ["preset"]

CELL = '''\
# The kdlib {version} package, embedded so that this notebook and its copies run without internet access.
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
    raise SystemExit("The cell with the kdlib package was changed. Restore it from the original notebook.")
kdlib_folder = Path(tempfile.gettempdir()) / f"kdlib-{{CHECKSUM[:16]}}"
if not kdlib_folder.exists():
    unpacked = Path(tempfile.mkdtemp(dir=kdlib_folder.parent))
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
        archive.extractall(unpacked, **({{"filter": "data"}} if hasattr(tarfile, "data_filter") else {{}}))
    unpacked.rename(kdlib_folder)
sys.path.insert(0, str(kdlib_folder))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(kdlib_folder), os.environ.get("PYTHONPATH")]))
Path("kernel.json").write_text(json.dumps({stamp}))
'''


@functools.cache
def package():
    """Returns the kdlib package as a reproducible xz archive, with metadata for `importlib.metadata`."""
    metadata = f"Metadata-Version: 2.1\nName: kdlib\nVersion: {kdlib.__version__}\n"
    files = {f"kdlib-{kdlib.__version__}.dist-info/METADATA": metadata.encode()}
    sources = sorted(path for ending in ("*.py", "*.html.j2") for path in (ROOT / "kdlib").rglob(ending))
    files.update({path.relative_to(ROOT).as_posix(): path.read_bytes() for path in sources})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:xz", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def carrying_cell(stamp):
    """Returns the source of the cell that unpacks kdlib and writes `stamp` (a dict) to the output `kernel.json`."""
    packed = package()
    text = base64.b85encode(packed).decode()  # its alphabet has neither quotes nor backslashes
    lines = "\n".join(text[start : start + LINE_LENGTH] for start in range(0, len(text), LINE_LENGTH))
    checksum = hashlib.sha256(packed).hexdigest()
    return CELL.format(version=kdlib.__version__, checksum=checksum, packed=lines, stamp=json.dumps(stamp))


def parameters_of(notebook):
    """Returns `{name: value}` of the literals in the cell tagged `parameters`. Raises ValueError if there is none."""
    assignments = ast.parse("".join(_parameters_cell(notebook)["source"])).body
    return {node.targets[0].id: ast.literal_eval(node.value) for node in assignments}


def _parameters_cell(notebook):
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            return cell
    raise ValueError("the notebook has no cell tagged `parameters`")


def with_parameters(source, values):
    """Returns the source of a parameters cell with new `values`. Comments and the other lines are kept."""
    lines = source.encode().splitlines(keepends=True)  # the positions of `ast` count bytes
    for node in reversed(ast.parse(source).body):
        old, name = node.value, node.targets[0].id
        if name in values:
            before, after = lines[old.lineno - 1][: old.col_offset], lines[old.end_lineno - 1][old.end_col_offset :]
            lines[old.lineno - 1 : old.end_lineno] = [before + repr(values[name]).encode() + after]
    return b"".join(lines).decode()


def typed(texts, defaults):
    """Converts `{name: text}` to the types of the notebook's parameters (`defaults`).

    Config keys that are no parameters are stored in the parameter `settings`. Raises ValueError for other names, for
    values that kdlib refuses, and if some but not all of teacher, student and dataset are given.
    """
    values, settings = {}, {}
    for name, text in texts.items():
        key = name.replace("-", "_")
        if key in defaults:
            values[key] = _convert(key, text, defaults[key])
        else:
            settings[key] = _setting(name, key, text, defaults)
    settings = {**values.get("settings", {}), **settings}
    if settings:
        values["settings"] = {**defaults["settings"], **settings}
    given = {**defaults, **values}
    checked = {name: value for name, value in given.items() if name in KEYS}
    config.Config.from_dict({**checked, **given.get("settings", {})}).require_all_or_no_inputs()
    return values


def _convert(name, text, default):
    kinds = {
        bool: "true or false", int: "a whole number", float: "a number", str: "a string", dict: "{'key': value}",
        list: "a list", tuple: "a tuple",
    }  # fmt: skip
    booleans = {"true": True, "yes": True, "false": False, "no": False}
    try:
        if isinstance(default, bool):
            return booleans[text.lower()]
        if isinstance(default, (int, float)):
            return type(default)(text)
        if isinstance(default, str):
            return text
        value = ast.literal_eval(text)
        if not _is_like(value, default):
            raise ValueError
        return value
    except (ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"--param {name} takes {kinds[type(default)]}, such as {default!r}; got {text!r}") from None


def _is_like(value, default):
    """Whether a literal has the type of `default`: a tuple also its length, and both sequences its types of elements."""
    if type(value) is not type(default) or isinstance(default, dict):
        return type(value) is type(default)
    if isinstance(default, tuple) and len(value) != len(default):
        return False
    return not default or {type(element) for element in value} <= {type(element) for element in default}


def _setting(name, key, text, defaults):
    if "settings" not in defaults or key not in KEYS:
        choices = [*defaults, *(KEYS if "settings" in defaults else ())]
        hint = config.nearest(key, choices) or f"; have {', '.join(choices)}"
        raise ValueError(f"--param {name}: the notebook has no such parameter{hint}")
    return config.parse_flag(key, text)


def build(path, values, stamp):
    """Returns the notebook at `path` with new parameters and kdlib, without outputs and widget state."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    cell = _parameters_cell(notebook)
    cell.source = with_parameters(cell.source, values)
    carriers = [cell for cell in notebook.cells if "kdlib" in cell.metadata.get("tags", [])]
    if len(carriers) != 1:
        raise ValueError(f"{path} has {len(carriers)} cells tagged `kdlib`; expected 1, to be replaced by the package")
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
    """Returns the validated metadata of a kernel. Raises ValueError for invalid options.

    `sources`: kernels whose output is mounted in addition to `options.kernel_source`.
    """
    from slugify import slugify

    slug = options.slug or slugify(options.title or "")
    title = options.title or slug.replace("-", " ")
    shape = options.accelerator
    _require(r"[A-Za-z0-9][A-Za-z0-9_-]*", options.owner, "--owner", "your Kaggle user name, as in kaggle.com/NAME")
    _require(r"[a-z0-9]+(-[a-z0-9]+)*", slug, "--slug", "lower-case words separated by hyphens")
    if not 5 <= len(slug) <= 50:
        raise ValueError(f"--slug {slug!r} has {len(slug)} characters; Kaggle takes 5 to 50")
    if slugify(title) != slug:
        raise ValueError(
            f"--title {title!r} gives slug {slugify(title)!r}, but --slug is {slug!r}; Kaggle uses the title"
        )
    _require(r"[A-Za-z0-9]+", shape, "--accelerator", f"one of {', '.join(ACCELERATORS)}")
    kernels = [*options.kernel_source, *(source for source in sources if source not in options.kernel_source)]
    for name, references, parts, example in (
        ("--dataset", options.dataset, 2, "owner/name"),
        ("--kernel-source", kernels, 2, "owner/name"),
        ("--model", options.model, 5, "owner/model/framework/variation/version"),
    ):
        for reference in references:
            _require("/".join([r"[A-Za-z0-9][\w.-]*"] * parts), reference, name, example)
    if options.model and not all(reference.rsplit("/", 1)[1].isdigit() for reference in options.model):
        raise ValueError(f"--model must end with a version number; got {', '.join(options.model)}")
    if options.docker_image:
        _require(
            r"[\w.-]+(/[\w.-]+)+(@sha256:[0-9a-f]{64}|:[\w.-]+)?", options.docker_image, "--docker-image", "an image"
        )
    metadata = {
        "id": f"{options.owner}/{slug}", "title": title, "code_file": "kernel.ipynb", "language": "python",
        "kernel_type": "notebook", "is_private": not options.public,
        "enable_gpu": shape != "none" and not shape.startswith("Tpu"), "enable_tpu": shape.startswith("Tpu"),
        "enable_internet": options.internet, "dataset_sources": options.dataset, "competition_sources": [],
        "kernel_sources": kernels, "model_sources": options.model,
    }  # fmt: skip
    if shape != "none":
        metadata["machine_shape"] = shape
    if options.docker_image:
        metadata["docker_image"] = options.docker_image
    return metadata


def _require(pattern, text, name, example):
    if not re.fullmatch(pattern, text or ""):
        raise ValueError(f"{name} takes {example}; got {text!r}")


def accelerator_warning(name):
    """Returns why an accelerator is not what kdlib needs, or an empty string. Unknown names may be new ones of Kaggle."""
    if name in ACCELERATORS:
        return ""
    choices = config.nearest(name, ACCELERATORS) or f", which has {', '.join(ACCELERATORS)}"
    return f"{name}: " + USELESS.get(name, f"not in Kaggle's list{choices}")


def max_budget_s(timeout_s):
    """Returns the longest time budget of a session: its timeout less one hour, or less 10 % if it is short."""
    limit = timeout_s or SESSION_S
    return limit - min(MARGIN_S, limit // 10)


def require_kept(out):
    """Raises ValueError if Kaggle does not keep the folder `out`."""
    path = posixpath.normpath(posixpath.join(WORKING, out))
    if not f"{path}/".startswith(f"{WORKING}/"):
        raise ValueError(
            f"out {out!r} is outside {WORKING}, and Kaggle keeps no other folder; give a path in it, such as 'run'"
        )


def write(folder, notebook, metadata):
    """Writes the folder that the client pushes."""
    import nbformat

    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, folder / metadata["code_file"])
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
