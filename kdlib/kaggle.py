"""A run inside a Kaggle kernel: finds what is mounted, knows when the session ends, and ends so that its files are kept.

A version that ends with an error loses its outputs, so nothing may raise in a batch kernel: `guard` writes the failure into
`status.json` and ends the notebook as if it were done. What is mounted lies in one of two layouts, so it is found by what it
holds, never by its full path; two candidates are refused.
"""

import contextlib
import functools
import sys
import traceback
from pathlib import Path

from kdlib import environment
from kdlib.config import Config
from kdlib.data import corpus
from kdlib.session import run_folder

SESSION_S, MARGIN_S = 12 * 3600, 3600
"""A session of Kaggle's, and what is left of it for packing up; the time budget of a run that was given none."""
KINDS = ("datasets", "notebooks", "models")
"""First parts of the newer layout's paths; the owner follows."""
MAX_CHECKPOINTS = 20
"""Checkpoints kept in a kernel, at most: some eight files each, of some 500 that Kaggle keeps."""
ENDS = ("paused", "complete", "failed")
"""States of a session that is over."""
MARKS = {"model": ("config.json", "tokenizer*", "*.model"), "cache": ("cache.json",)}
"""Files by which a mounted folder is known: any model has a config, and a tokenizer beside it. `corpus` knows texts."""


def time_budget(given):
    """The `time_budget` of a session: as given, or what Kaggle's own limit leaves; empty elsewhere."""
    return given or (f"{(SESSION_S - MARGIN_S) // 3600}h" if environment.on_kaggle() else "")


def config(teacher, student, dataset, settings, given_budget=""):
    """The `Config` of a kernel's parameters: inputs found where they are mounted, the session's end known."""
    named = {"teacher": teacher, "student": student, "dataset": dataset, **settings}
    kinds = {
        "teacher": "model",
        "student": "model",
        "dataset": "text",
        "eval_dataset": "text",
        "teacher_cache": "cache",
    }
    walked = functools.cache(_mounted)
    found = {name: find_input(named[name], kind, walked) for name, kind in kinds.items() if named.get(name)}
    made = Config.from_dict({"time_budget": time_budget(given_budget), **named, **found})
    return (
        made.replace(keep_checkpoints=min(made.keep_checkpoints, MAX_CHECKPOINTS)) if environment.on_kaggle() else made
    )


def find_input(name, kind, walked=None):
    """The path that `name` means: itself where it exists or where nothing mounted fits (a Hugging Face id, say); else the
    one mounted folder that holds a `kind` (`model`, `text`, `cache`) and whose path has the parts of `name` in a row.
    Several names may be separated by commas. ValueError for two candidates. `walked()`: all that is mounted.
    """
    walked = walked or functools.cache(_mounted)
    return ",".join(_located(each.strip(), kind, walked) for each in name.split(","))


def _mounted():
    """Every mounted file and folder, and its path below the root between slashes."""
    root = environment.mounts()
    return [(path, f"/{path.relative_to(root).as_posix()}/") for path in root.rglob("*")]


def _located(name, kind, walked):
    if not name or Path(name).exists() or not environment.mounts().is_dir():
        return name
    parts = (
        Path(name).relative_to(environment.MOUNTS).parts
        if Path(name).is_relative_to(environment.MOUNTS)
        else Path(name).parts
    )
    found = _below(walked(), parts)
    if not found and parts[:1] and parts[0] in KINDS:
        found = _below(walked(), parts[2:])  # the newer layout's path, in the older one
    if len(found) == 1 and found[0].is_file():
        return str(found[0])
    folders = {folder for folder in {path if path.is_dir() else path.parent for path in found} if _is(folder, kind)}
    top = sorted(path for path in folders if not any(other in path.parents for other in folders))
    if len(top) > 1:
        listed = ", ".join(str(path) for path in top)
        raise ValueError(f"{name!r} fits {len(top)} inputs: {listed}; give the full path of one")
    return str(top[0]) if top else name


def _below(paths, parts):
    """Those of the mounted `paths` in which `parts` stand in a row."""
    row = "/" + "/".join(parts) + "/"
    return [path for path, below in paths if len(row) > 2 and row in below]


def _is(folder, kind):
    """Whether a folder is of that kind. The JSON files of a model or of a cache are no text."""
    if kind == "text":
        return not (_is(folder, "model") or _is(folder, "cache")) and any(map(corpus.is_text, folder.iterdir()))
    if kind == "model":
        config, *tokenizers = MARKS["model"]
        return (folder / config).exists() and any(list(folder.glob(mark)) for mark in tokenizers)
    return any(list(folder.glob(mark)) for mark in MARKS[kind])


def find_previous_output(out, wanted="auto"):
    """What a session goes on with (`distill`'s third argument): `wanted` if that is said or `out` holds a run; else the one
    mounted run that has a checkpoint or a verdict. ValueError for two of them.
    """
    root = environment.mounts()
    if wanted != "auto" or run_folder.RunFolder(out).holds_run() or not root.is_dir():
        return wanted
    runs = [run_folder.RunFolder(path.parent) for path in root.rglob("status.json")]
    found = sorted(str(run.path) for run in runs if run.has_begun())
    if len(found) > 1:
        raise ValueError(f"{len(found)} runs are mounted: {', '.join(found)}; set resume to one of them, or to never")
    return found[0] if found else wanted


@contextlib.contextmanager
def guard(out):
    """A cell whose failure must not end a batch kernel with an error. There it is written into `status.json` of the run
    folder `out` and to the log, and the notebook's other cells are skipped. Elsewhere it is raised as ever.

    What a session said of its own end (paused, complete, failed) stays: what fails later spoils nothing that is saved.
    """
    try:
        yield
    except Exception as error:
        if not environment.in_batch_kernel():
            raise
        with contextlib.suppress(OSError):  # a full disk: the log still says it
            _write_failure(run_folder.RunFolder(out), f"{type(error).__name__}: {error}".splitlines()[0])
        if isinstance(error, ValueError):
            sys.stderr.write(f"kdlib: {error}\n")
        else:
            traceback.print_exc()
        raise SystemExit(0) from None


def _write_failure(folder, reason):
    """Write `failed` into `status.json` where no session has ended, with all else that a running one has written there."""
    known = folder.last_status()
    if known.get("state") in ENDS:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    kept = {"step": 0, "max_steps": 0, **known, "state": "failed", "reason": reason}
    folder.status(**kept)
