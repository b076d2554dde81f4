"""Where a session goes on: the newest whole checkpoint of a run folder, if it is of the same run."""

import dataclasses
from pathlib import Path

from kdlib import files
from kdlib.files import read_json
from kdlib.models import fingerprint
from kdlib.session import checkpoint, run_folder


@dataclasses.dataclass
class PreviousRun:
    """A run that was begun before. `path`, `groups` and `facts` are those of its newest whole checkpoint (None where it was
    cut off before its first), `broken` tells of newer ones that are not whole, `verdict` is there where it is complete.
    """

    source: run_folder.RunFolder
    status: dict
    path: Path | None = None
    groups: dict | None = None
    facts: dict | None = None
    broken: dict = dataclasses.field(default_factory=dict)
    verdict: dict | None = None

    def alerts(self, place):
        """Records of the checkpoints that were passed over; `place`: where the run goes on."""
        for path, what in self.broken.items():
            meaning = f"checkpoint {path.name} is not whole ({what}); went on with {self.path.name}"
            told = {"meaning": meaning, "advice": "look at the disk, if it happens again"}
            yield {"kind": "alert", **place, "sign": "checkpoint", "part": path.name, **told}


def find_previous_run(folder, wanted):
    """The `PreviousRun` that `wanted` (`auto`, `never` or a folder) means for the `run_folder.RunFolder` of a session; None
    for a new run. ValueError where a run is there, but nothing whole of it.
    """
    named = wanted not in ("auto", "never")
    if not named and not folder.holds_run():
        return None
    chosen = Path(wanted) if named else folder.path
    single = chosen if (chosen / checkpoint.MANIFEST).exists() else None
    source = run_folder.RunFolder(chosen.parent.parent if single else chosen)
    if named and not (single or source.holds_run()):
        raise ValueError(f"--resume {wanted} holds no run; give a run folder or one of its checkpoints, auto or never")
    found = PreviousRun(source, source.last_status())
    if found.status.get("state") == "complete" and (source.path / "verdict.json").exists() and not single:
        found.verdict = read_json(source.path / "verdict.json")
        return found
    if single:
        try:
            found.path, (found.groups, found.facts) = single, checkpoint.read(single)
        except checkpoint.Broken as error:
            raise ValueError(f"--resume {wanted} is not whole: {error}") from None
    else:
        found.path, found.groups, found.facts, found.broken = checkpoint.newest(source.checkpoints)
    if found.path is None and (found.broken or (named and not source.has_begun())):
        why = "; ".join(f"{path.name}: {what}" for path, what in found.broken.items()) or "there is none"
        raise ValueError(f"{source.path} has no whole checkpoint to go on with ({why}); start a new --out")
    return found


def check_same_run(found, now):
    """What is only to be told of the differences between a `PreviousRun` and this session (`fingerprint.diff_runs`); ValueError
    where they keep it from going on.
    """
    if found.verdict is not None:
        config = read_json(found.source.path / "config.json")
        config["max_steps"] = config["max_steps"] if now["config"]["max_steps"] else 0  # the plan as it was resolved
        nothing = {"identity": None, "windows_per_step": None, "versions": {}}
        refused, told = fingerprint.diff_runs({"config": config, **nothing}, {"config": now["config"], **nothing})
    elif found.facts is None:
        refused, told = [], []  # nothing was learned: it begins anew
    else:
        refused, told = fingerprint.diff_runs(found.facts, now)
    if refused:
        raise ValueError(
            f"{found.source.path} holds a run that differs in {'; '.join(refused)}. Start a new --out, or go on as it was"
        )
    return told


def adopt(found, folder):
    """Make `folder` hold the run up to its checkpoint: a copy where it came from elsewhere, without records of lost steps,
    broken checkpoints set aside.
    """
    if folder.path.resolve() != found.source.path.resolve():
        if found.source.records.path.exists():
            files.copy(found.source.records.path, folder.records.path)
        if found.path:
            checkpoint.copy_checkpoint(found.path, folder.checkpoints)
    else:
        for path in found.broken:
            checkpoint.set_aside(path)
        checkpoint.clean(folder.checkpoints)
    folder.records.cut(found.facts["records_bytes"] if found.facts else 0)


def adopt_complete(found, folder, writes):
    """Releases `folder`, which holds the complete run: a copy if that came from elsewhere and this process writes. What a
    kill at the end left of its teacher cache, or half-written, goes.
    """
    if writes and folder.path.resolve() != found.source.path.resolve():
        for path in found.source.path.iterdir():
            if path.name not in (".lock", "status.json", folder.cache.name):
                files.copy(path, folder.path / path.name)
        files.copy(found.source.path / "status.json", folder.path / "status.json")  # last: it says that all is there
    elif writes:
        files.remove(folder.cache)
        for left in list(folder.path.rglob("*.tmp")):
            files.remove(left)
    folder.release()
