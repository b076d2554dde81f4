"""Runs inside Kaggle kernels: mounted inputs, the session's time limit, and failures that keep the outputs.

Kaggle discards the outputs of a version that ends with an error. Therefore `guard` writes a failure to `status.json`
and ends the notebook normally. Kaggle has two layouts of mounted inputs, so inputs are found by their contents.
"""

import contextlib
import functools
import sys
import traceback
from pathlib import Path

from kdlib import environment
from kdlib.config import Config
from kdlib.data import corpus
from kdlib.session import backup, run_folder

SESSION_S, MARGIN_S = 12 * 3600, 3600
"""Kaggle's session limit, and the reserve for uploading the outputs. The default time budget is their difference."""
KINDS = ("datasets", "notebooks", "models")
"""First path components of the newer layout, before the owner."""
MAX_CHECKPOINTS = 20
"""Maximum number of checkpoints in a kernel: about 8 files each, and Kaggle keeps about 500 files."""
FINAL_STATES = ("paused", "complete", "failed")
"""States of a session that has ended."""
MARKS = {"model": ("config.json", "tokenizer*", "*.model"), "cache": ("cache.json",)}
"""File patterns that identify a mounted folder: a model has a config and a tokenizer. See `corpus` for texts."""


def time_budget(value):
    """Returns the given `time_budget`, or on Kaggle a default below the session limit, otherwise an empty string."""
    return value or (f"{(SESSION_S - MARGIN_S) // 3600}h" if environment.on_kaggle() else "")


def config(teacher, student, dataset, settings, session_budget=""):
    """Returns the `Config` of a kernel's parameters, with paths of mounted inputs and a time budget.

    The secret `HF_TOKEN` is exported, so that models and texts that need it load. Raises ValueError if teacher, student or
    dataset is missing.
    """
    environment.set_if_unset("HF_TOKEN", backup.secret("HF_TOKEN"))
    values = {"teacher": teacher, "student": student, "dataset": dataset, **settings}
    kinds = {
        "teacher": "model", "student": "model", "dataset": "text", "eval_dataset": "text", "teacher_cache": "cache",
    }  # fmt: skip
    list_mounted = functools.cache(_list_mounted)
    paths = {key: find_input(values[key], kind, list_mounted) for key, kind in kinds.items() if values.get(key)}
    result = Config.from_dict({"time_budget": time_budget(session_budget), **values, **paths})
    result.require_inputs()
    if not environment.on_kaggle():
        return result
    return result.replace(keep_checkpoints=min(result.keep_checkpoints, MAX_CHECKPOINTS))


def find_input(name, kind, list_mounted=None):
    """Returns the mounted path that matches `name`: a folder of this `kind` (`model`, `text`, `cache`), or a file.

    The path must contain the components of `name` consecutively. Existing paths and names without a match (such as a
    Hugging Face id) are returned unchanged. `name` may list several inputs, separated by commas. Raises ValueError if
    two inputs match. `list_mounted()` returns all mounted paths.
    """
    list_mounted = list_mounted or functools.cache(_list_mounted)
    return ",".join(_find_one(entry.strip(), kind, list_mounted) for entry in name.split(","))


def _list_mounted():
    """Returns all mounted files and folders, each with its path below the root between slashes."""
    root = environment.mounts()
    return [(path, f"/{path.relative_to(root).as_posix()}/") for path in root.rglob("*")]


def _find_one(name, kind, list_mounted):
    if not name or Path(name).exists() or not environment.mounts().is_dir():
        return name
    is_mount = Path(name).is_relative_to(environment.MOUNTS)
    parts = (Path(name).relative_to(environment.MOUNTS) if is_mount else Path(name)).parts
    matches = _containing(list_mounted(), parts)
    if not matches and parts[:1] and parts[0] in KINDS:
        matches = _containing(list_mounted(), parts[2:])  # a path of the newer layout, mounted in the older one
    if len(matches) == 1 and matches[0].is_file():
        return str(matches[0])
    folders = {folder for folder in {path if path.is_dir() else path.parent for path in matches} if _is(folder, kind)}
    top = sorted(path for path in folders if not any(other in path.parents for other in folders))
    if len(top) > 1:
        listed = ", ".join(str(path) for path in top)
        raise ValueError(f"{name!r} matches {len(top)} inputs: {listed}; give the full path of one")
    return str(top[0]) if top else name


def _containing(mounted, parts):
    """Returns the mounted paths that contain `parts` consecutively."""
    sequence = "/" + "/".join(parts) + "/"
    return [path for path, components in mounted if len(sequence) > 2 and sequence in components]


def _is(folder, kind):
    """Whether a folder is of a kind. JSON files of a model or cache do not count as text."""
    if kind == "text":
        return not (_is(folder, "model") or _is(folder, "cache")) and any(map(corpus.is_text, folder.iterdir()))
    if kind == "model":
        config, *tokenizers = MARKS["model"]
        return (folder / config).exists() and any(list(folder.glob(pattern)) for pattern in tokenizers)
    return any(list(folder.glob(pattern)) for pattern in MARKS[kind])


def find_previous_output(out, resume="auto"):
    """Returns the `resume` argument of `distill`: the mounted run with a checkpoint or verdict, if there is one.

    `resume` is returned unchanged unless it is `auto` and `out` holds no run. Raises ValueError for two mounted runs.
    """
    root = environment.mounts()
    if resume != "auto" or run_folder.RunFolder(out).holds_run() or not root.is_dir():
        return resume
    runs = [run_folder.RunFolder(path.parent) for path in root.rglob("status.json")]
    paths = sorted(str(run.path) for run in runs if run.can_resume())
    if len(paths) > 1:
        raise ValueError(f"{len(paths)} runs are mounted: {', '.join(paths)}; set resume to one of them, or to never")
    return paths[0] if paths else resume


@contextlib.contextmanager
def guard(out):
    """Prevents an exception from ending a batch kernel with an error, which would discard its outputs.

    Writes the failure to the log and to `status.json` in the run folder `out`, unless a session has already ended there.
    Skips the remaining cells. Outside batch kernels, the exception propagates.
    """
    try:
        yield
    except Exception as error:
        if not environment.in_batch_kernel():
            raise
        with contextlib.suppress(OSError):  # a full disk; the log still has the error
            _write_failure(run_folder.RunFolder(out), f"{type(error).__name__}: {error}".splitlines()[0])
        if isinstance(error, ValueError):
            sys.stderr.write(f"kdlib: {error}\n")
        else:
            traceback.print_exc()
        raise SystemExit(0) from None


def _write_failure(folder, reason):
    """Writes the state `failed` to `status.json` and keeps its other values, unless the session has ended."""
    status = folder.last_status()
    if status.get("state") in FINAL_STATES:
        return
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.status(**{"step": 0, "max_steps": 0, **status, "state": "failed", "reason": reason})
