"""A run's own teacher cache: the teacher reads the text of the whole plan once, before training, and is then let go."""

import shutil

from kdlib import files, memory
from kdlib.clock import format_duration
from kdlib.models import devices, teacher_cache
from kdlib.session import cache_writer, inputs

READINGS = 2.0
"""Times that a plan goes over its text from which on the run writes a cache (RESULTS.md)."""


def should_cache_first(config, num_windows, per_step):
    """Whether a run of `max_steps` steps of so many windows, and of `repeats`, is to write a cache of its own."""
    asked = config.teacher_cache == "auto" and config.needs_teacher and teacher_cache.holds_all(config)
    return asked and config.max_steps * per_step * config.repeats / num_windows >= READINGS


class CachedFirstPass:
    """Whether and how far the teacher has read, for the run in `folder` (a `run_folder.RunFolder`), which may go on with
    another (`resume.Found`, or None). `seconds`: what it took, over all sessions; `now_s`: in this one.
    """

    def __init__(self, config, found, folder, accelerator, clock, on_progress=lambda phase, done, total: None):
        self.folder, self.previous_run, self.accelerator, self.clock = folder, found, accelerator, clock
        self.on_progress = on_progress
        status = found.status if found else {}
        self.num_read, self.before_s, self.now_s = status.get("shards_read", 0), status.get("read_s", 0.0), 0.0
        self.read_in, self.writer, self.skipped = _learned_from(found, config), None, ""

    @property
    def seconds(self):
        return self.before_s + self.now_s

    def facts(self):
        """What `status.json` keeps of it."""
        return {"shards_read": self.num_read, "read_s": round(self.seconds, 3)}

    def inputs(self, config, loaded=None):
        """The `inputs.Inputs` of a run: from the run's own cache if the teacher has read all, else with the teacher itself.
        `loaded`: those of the teacher that has just read; nothing of them is loaded a second time.
        """
        known = config.replace(teacher_cache=str(self.read_in)) if self.read_in else config
        if loaded:
            return inputs.with_cache(loaded, known, self.on_progress)
        accelerator, away = self.accelerator, devices.teacher_device(config.teacher_device, self.accelerator)
        dtype = devices.teacher_dtype(accelerator, away)
        return inputs.load(known, accelerator.device, dtype, away, on_progress=self.on_progress)

    def plan(self, config, loaded, per_step):
        """Decide whether the teacher of `loaded` is to read first: then `writer` is there, else `skipped` may say why not.
        What the run is known by.
        """
        begun = (self.previous_run and self.previous_run.facts) or None
        lives = begun and begun["identity"]["signal"] == "live"
        if self.read_in or lives or not should_cache_first(config, len(loaded.train), per_step):
            return loaded.identity
        elsewhere = self.previous_run.source.cache if self.previous_run else self.folder.cache
        shares = cache_writer.worker_shard_ids(self.accelerator)
        self.writer = cache_writer.CacheWriter(
            config, loaded, self.folder.cache, self.clock, [], shares, self.on_progress
        )
        self.writer.others = [elsewhere] if elsewhere != self.folder.cache and self._is_ours(elsewhere) else []
        try:
            self.writer.refuse_full_disk(self.writer.plan())
        except ValueError as error:
            if not begun:
                self.writer, self.skipped = None, str(error)
                return loaded.identity
        return {**loaded.identity, "signal": self.writer.key}

    def run(self, session):
        """Records of kind `reading`, in this session (a `time_budget.TimeBudget`): those of `cache_writer.write` by
        `phase`, `told` in words; the last one's phase is `complete` or `paused`. What a run that was given up has read
        is removed.
        """
        for record in self._read(session):
            yield {**record, "kind": "reading", "phase": record["kind"], "told": _said(record)}

    def _read(self, session):
        if self.skipped:
            yield {"kind": "skipped", "reason": self.skipped}
        if not self.writer:
            return
        begun, folder = self.clock.now(), self.folder.cache
        if self.accelerator.is_main_process and folder.exists() and not self._is_ours(folder):
            shutil.rmtree(folder)
            self.before_s = 0.0
        self.accelerator.wait_for_everyone()
        stopped = False
        for record in self.writer.run(session.seconds, session.started):
            self.now_s = self.clock.now() - begun
            self.num_read = self.writer.num_shards - len(teacher_cache.missing([folder], self.writer.facts))
            stopped = stopped or record["kind"] == "paused"
            yield record
        if not devices.any_process(self.accelerator, (stopped,))[0]:
            self.read_in, self.writer = folder, None
            memory.release_memory()
        elif not stopped:
            yield {"kind": "paused", "reason": "another process was asked to stop"}

    def copy_shards(self, source=None):
        """Copies the cache that the run learns from, or the one in `source`, into its folder: files that are there are
        complete, but those of an interrupted write.
        """
        source = source or self.read_in
        if source and source != self.folder.cache:
            for path in sorted(source.rglob("*")):
                part = path.relative_to(source)
                target, complete = self.folder.cache / part, not any(name.endswith(".tmp") for name in part.parts)
                if complete and path.is_file() and not target.exists():
                    files.copy(path, target)

    def discard(self):
        """The run is over, in every process: what the teacher said goes."""
        self.accelerator.wait_for_everyone()
        if self.read_in and self.accelerator.is_main_process:
            shutil.rmtree(self.folder.cache, ignore_errors=True)

    def _is_ours(self, folder):
        try:
            return teacher_cache.read_facts(folder) == self.writer.facts
        except ValueError:
            return False


def _said(record):
    """What a record says to people, in one line."""
    if record["kind"] == "skipped":
        return f"The teacher is read live, since {record['reason']}."
    if record["kind"] == "plan":
        size = f"{record['bytes'] / 1e6:,.1f} MB in {record['shards']} shards, {record['missing']} of them to write"
        return f"The plan goes over the text more than once: the teacher reads it first ({size}), and is then let go."
    if record["kind"] == "shard":
        left = format_duration(record["left_s"])
        return f"The teacher reads the text: {record['done']} of {record['of']} shards, {left} left."
    return "The teacher has read the text." if record["kind"] == "complete" else ""


def _learned_from(found, config):
    """The cache that a run has learned from, where it is whole and the config names the same teacher; else None."""
    if config.teacher_cache != "auto" or not (found and found.facts):
        return None
    folder, then = found.source.cache, found.facts["config"]
    try:
        lacking = teacher_cache.missing([folder], teacher_cache.read_facts(folder))
    except ValueError:
        return None
    return folder if not lacking and then["teacher"] == config.teacher and then["teacher_cache"] == "auto" else None
