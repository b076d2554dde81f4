"""Resuming a run: finds its newest valid checkpoint and checks that it belongs to the same run."""

import dataclasses
from pathlib import Path

from kdlib import files
from kdlib.files import read_json
from kdlib.models import fingerprint
from kdlib.session import checkpoint, run_folder


@dataclasses.dataclass
class PreviousRun:
    """State of a run at the start of a session. `path`, `groups` and `facts` are of the newest valid checkpoint, or
    None. `errors` describes newer, corrupt checkpoints. `verdict` is set if the run is complete.
    """

    source: run_folder.RunFolder
    status: dict
    path: Path | None = None
    groups: dict | None = None
    facts: dict | None = None
    errors: dict = dataclasses.field(default_factory=dict)
    verdict: dict | None = None

    def alerts(self, place):
        """Yields an alert per corrupt checkpoint. `place` has run, repeat and step of the resumed run."""
        for path, error in self.errors.items():
            meaning = f"checkpoint {path.name} is corrupt ({error}); resumed from {self.path.name}"
            text = {"meaning": meaning, "advice": "check the disk if this happens again"}
            yield {"kind": "alert", **place, "sign": "checkpoint", "part": path.name, **text}


def find_previous_run(folder, resume):
    """Returns the `PreviousRun` that `resume` (`auto`, `never` or a path) selects for the `run_folder.RunFolder` of a
    session, or None for a new run. Raises ValueError if the run has no valid checkpoint.
    """
    is_path = resume not in ("auto", "never")
    if not is_path and not folder.holds_run():
        return None
    chosen = Path(resume) if is_path else folder.path
    single = chosen if (chosen / checkpoint.MANIFEST).exists() else None
    source = run_folder.RunFolder(chosen.parent.parent if single else chosen)
    if is_path and not (single or source.holds_run()):
        raise ValueError(f"--resume {resume} holds no run; give a run folder or one of its checkpoints, auto or never")
    previous = PreviousRun(source, source.last_status())
    if previous.status.get("state") == "complete" and (source.path / "verdict.json").exists() and not single:
        previous.verdict = read_json(source.path / "verdict.json")
        return previous
    if single:
        try:
            previous.path, (previous.groups, previous.facts) = single, checkpoint.read(single)
        except checkpoint.CorruptCheckpoint as error:
            raise ValueError(f"--resume {resume} is corrupt: {error}") from None
    else:
        previous.path, previous.groups, previous.facts, previous.errors = checkpoint.newest(source.checkpoints)
    if previous.path is None and (previous.errors or (is_path and not source.can_resume())):
        reason = "; ".join(f"{path.name}: {error}" for path, error in previous.errors.items()) or "there is none"
        raise ValueError(f"{source.path} has no valid checkpoint to resume from ({reason}); start a new --out")
    return previous


def with_template_date(config, previous):
    """Returns a config with the date that the chat templates of a `PreviousRun` (or None) print, unless it has one."""
    path = previous and previous.source.path / "config.json"
    if config.template_date or not path or not (previous.facts or path.exists()):
        return config
    saved = previous.facts["config"] if previous.facts else read_json(path)
    return config.replace(template_date=saved.get("template_date", ""))


def check_same_run(previous, run_identity):
    """Returns notes on harmless differences between a `PreviousRun` and this session (`fingerprint.diff_runs`). Raises
    ValueError if a difference prevents resuming.
    """
    if previous.verdict is not None:
        config = read_json(previous.source.path / "config.json")
        config["max_steps"] = config["max_steps"] if run_identity["config"]["max_steps"] else 0  # stored as resolved
        unknown = {"identity": None, "windows_per_step": None, "versions": {}}
        current = {"config": run_identity["config"], **unknown}
        conflicts, notes = fingerprint.diff_runs({"config": config, **unknown}, current)
    elif previous.facts is None:
        conflicts, notes = [], []  # no step was saved: the run restarts
    else:
        conflicts, notes = fingerprint.diff_runs(previous.facts, run_identity)
    if conflicts:
        raise ValueError(
            f"{previous.source.path} holds a run that differs in {'; '.join(conflicts)}. "
            "Start a new --out, or use the settings of that run"
        )
    return notes


def adopt(previous, folder):
    """Copies a run from elsewhere, or sets its corrupt checkpoints aside, and removes records of lost steps."""
    if folder.path.resolve() != previous.source.path.resolve():
        if previous.source.records.path.exists():
            files.copy(previous.source.records.path, folder.records.path)
        if previous.path:
            checkpoint.copy_checkpoint(previous.path, folder.checkpoints)
    else:
        for path in previous.errors:
            checkpoint.set_aside(path)
        checkpoint.clean(folder.checkpoints)
    folder.records.truncate(previous.facts["records_bytes"] if previous.facts else 0)


def adopt_complete(previous, folder, writes):
    """Makes `folder` hold a complete run, in the process that `writes`, and releases it.

    A run elsewhere is copied. Of a run that is there already, the teacher cache and temporary files are removed, which
    a killed process left.
    """
    if writes and folder.path.resolve() != previous.source.path.resolve():
        for path in previous.source.path.iterdir():
            if path.name not in (".lock", "status.json", folder.cache.name):
                files.copy(path, folder.path / path.name)
        files.copy(
            previous.source.path / "status.json", folder.path / "status.json"
        )  # last: marks the copy as complete
    elif writes:
        files.remove(folder.cache)
        for temporary in list(folder.path.rglob("*.tmp")):
            files.remove(temporary)
    folder.release()
