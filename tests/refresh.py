"""Execute the committed notebooks anew, or check that their outputs are still what comes out.

    python tests/refresh.py [--check] [NAME ...]

Every notebook runs as a batch, as Kaggle runs it, in a folder of its own and from an empty cache; all share what the first
one makes. What is written back holds outputs and no traces of their making: no widget state, no times of cells, no marks of
carriage returns. With `--check` nothing is written: words and structure of every output must be the committed ones, numbers
may differ in the last digits that another processor changes; what cells tagged `nbval-ignore-output` say of this machine
does not count. Exit status 1 where a notebook is stale.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HOUSE = Path(__file__).parent.parent
NOTEBOOKS = HOUSE / "notebooks"
METADATA = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
METADATA |= {"language_info": {"name": "python"}}
KEPT = ("tags", "jupyter", "_kg_hide-input")
TIME = re.compile(r"\d+(\.\d+)?(?= ?(s|ms|min|h|hours|minutes|seconds)\b)")
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
APART = 0.1
"""Numbers may differ by this fraction of themselves, or by as much in all where they are small."""


def main(words=None):
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--check", action="store_true")
    options.add_argument("names", nargs="*")
    options = options.parse_args(words)
    names = options.names or sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    stale = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            made = executed(name, Path(folder))
            if not options.check:
                write(NOTEBOOKS / f"{name}.ipynb", made)
                print(f"{name}: {(NOTEBOOKS / f'{name}.ipynb').stat().st_size / 1000:.0f} kB")
                continue
            told = differences(read(NOTEBOOKS / f"{name}.ipynb"), made)
            stale += [name] if told else []
            print(f"{name}: {'stale' if told else 'fresh'}", *told, sep="\n  ")
    return 1 if stale else 0


def executed(name, folder):
    """The notebook after a batch run, cleaned."""
    room = Path(folder) / name
    room.mkdir()
    write(room / f"{name}.ipynb", with_address(read(NOTEBOOKS / f"{name}.ipynb")))
    environment = {**os.environ, "KDLIB_CACHE": str(Path(folder) / "cache"), "OMP_NUM_THREADS": "1"}
    environment |= {
        "HF_DATASETS_CACHE": str(Path(folder) / "datasets"),
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(HOUSE),
    }
    command = [sys.executable, "-m", "papermill", f"{name}.ipynb", "out.ipynb", "--no-progress-bar"]
    ran = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"{name} failed:\n{ran.stderr[-3000:]}")
    return cleaned(read(room / "out.ipynb"))


def address():
    """The address that pyproject.toml states for pip."""
    return re.search(r'^Install = "(.+)"$', (HOUSE / "pyproject.toml").read_text(), re.M)[1]


def with_address(notebook):
    """The notebook with that address in its second cell."""
    for cell in notebook["cells"]:
        if "kdlib" in cell["metadata"].get("tags", ()):
            cell["source"] = [re.sub(r'(?<=^install_from = ").*?(?=")', address(), line) for line in cell["source"]]
    return notebook


def cleaned(notebook):
    """The notebook without noise, and with the hash of the cells that its outputs are of."""
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key in KEPT and value}
        cell["execution_count"] = number + 1
        cell["outputs"] = _joined(cell["outputs"])
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["metadata"] = {}
    notebook["metadata"] = {**METADATA, "kdlib": {"outputs_of": source_hash(notebook)}}
    return notebook


def source_hash(notebook):
    """Of the code cells."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\n\n".join(code).encode()).hexdigest()[:16]


def _joined(outputs):
    """Streams in one piece, as a terminal would leave them; no count of executions; errors of no cell."""
    joined = []
    for output in (output for output in outputs if output.get("name") != "stderr"):
        output.pop("execution_count", None)
        if output["output_type"] == "stream":
            output["text"] = "".join(output["text"])
            if joined and joined[-1]["output_type"] == "stream":
                joined[-1]["text"] += output["text"]
                continue
        else:
            output["metadata"] = {}
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
        joined.append(output)
    for output in joined:
        if output["output_type"] == "stream":
            lines = (line.rstrip("\r").split("\r")[-1].rstrip() for line in output["text"].split("\n"))
            output["text"] = "\n".join(lines)
    return joined


def differences(committed, made):
    """What is no longer so, a line each."""
    told = []
    if committed["metadata"].get("kdlib", {}).get("outputs_of") != source_hash(committed):
        told.append("code was changed after its outputs were made")
    pairs = zip(committed["cells"], made["cells"], strict=True)
    for old, new in pairs:
        if old["cell_type"] != "code" or "nbval-ignore-output" in old["metadata"].get("tags", ()):
            continue
        before, now = shown(old), shown(new)
        if len(before) != len(now):
            told.append(f"cell {old['id']}: {len(before)} outputs, now {len(now)}")
        told += [f"cell {old['id']}: {a!r}, now {b!r}" for a, b in zip(before, now, strict=False) if not alike(a, b)]
    return told


def shown(cell):
    """The outputs of a cell as texts; of a picture, that there is one."""
    texts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        kind = next((kind for kind in ("image/png", "text/html", "text/markdown", "text/plain") if kind in data), None)
        text = kind if kind == "image/png" else output.get("text", data.get(kind, output["output_type"]))
        texts.append("".join(text))
    return texts


def alike(before, now):
    """Whether two texts say the same, but for times and last digits."""
    before, now = TIME.sub("#", before), TIME.sub("#", now)
    if NUMBER.sub("#", before) != NUMBER.sub("#", now):
        return False
    numbers = zip(map(float, NUMBER.findall(before)), map(float, NUMBER.findall(now)), strict=True)
    return all(abs(a - b) <= APART * max(1.0, abs(a)) for a, b in numbers)


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write(path, notebook):
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
