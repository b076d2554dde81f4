"""First pass of a run: the teacher writes the run's own teacher cache before training, and is then freed."""

import shutil

from kdlib import files, memory
from kdlib.clock import format_duration
from kdlib.models import devices, teacher_cache
from kdlib.session import cache_writer, inputs

MIN_EPOCHS = 2.0
"""Number of passes over the training text from which on a run writes a cache (RESULTS.md)."""


def should_cache_first(config, num_windows, per_step):
    """Returns whether a run of `max_steps` steps of `per_step` windows, and of `repeats`, writes its own cache."""
    allowed = config.teacher_cache == "auto" and config.needs_teacher and teacher_cache.holds_all(config)
    return allowed and config.max_steps * per_step * config.repeats / num_windows >= MIN_EPOCHS


class CachedFirstPass:
    """State of the first pass for the run in `folder` (a `run_folder.RunFolder`), which may resume `previous_run` (a
    `resume.PreviousRun` or None). `seconds` is its duration over all sessions, `now_s` in this one.
    """

    def __init__(self, config, previous_run, folder, accelerator, clock, on_progress=lambda phase, done, total: None):
        self.folder, self.previous_run, self.accelerator, self.clock = folder, previous_run, accelerator, clock
        self.on_progress = on_progress
        status = previous_run.status if previous_run else {}
        self.num_read, self.before_s, self.now_s = status.get("shards_read", 0), status.get("read_s", 0.0), 0.0
        self.complete_cache, self.writer, self.skip_reason = _complete_cache(previous_run, config), None, ""

    @property
    def seconds(self):
        return self.before_s + self.now_s

    def facts(self):
        """Returns its fields of `status.json`."""
        return {"shards_read": self.num_read, "read_s": round(self.seconds, 3)}

    def inputs(self, config, loaded=None):
        """Returns the `inputs.Inputs` of a run, with the run's own cache if it is complete, else with the live teacher.
        `loaded` are the inputs of the first pass, which are reused.
        """
        if self.complete_cache:
            config = config.replace(teacher_cache=str(self.complete_cache))
        if loaded:
            return inputs.with_cache(loaded, config, self.on_progress)
        device = devices.teacher_device(config.teacher_device, self.accelerator)
        dtype = devices.teacher_dtype(self.accelerator, device)
        return inputs.load(config, self.accelerator.device, dtype, device, on_progress=self.on_progress)

    def plan(self, config, loaded, per_step):
        """Sets `writer` if the first pass is to run (or `skip_reason`), and returns the identity of the run's inputs."""
        facts = (self.previous_run and self.previous_run.facts) or None
        is_live = facts and facts["identity"]["signal"] == "live"
        if self.complete_cache or is_live or not should_cache_first(config, len(loaded.train), per_step):
            return loaded.identity
        source = self.previous_run.source.cache if self.previous_run else self.folder.cache
        worker = cache_writer.worker_shard_ids(self.accelerator)
        self.writer = cache_writer.CacheWriter(
            config, loaded, self.folder.cache, self.clock, [], worker, self.on_progress
        )
        self.writer.others = [source] if source != self.folder.cache and self._is_same_cache(source) else []
        try:
            self.writer.check_disk(self.writer.plan())
        except ValueError as error:
            if not facts:
                self.writer, self.skip_reason = None, str(error)
                return loaded.identity
        return {**loaded.identity, "signal": self.writer.key}

    def run(self, budget):
        """Yields records of kind `reading` in a session with a `time_budget.TimeBudget`: those of
        `cache_writer.cache_teacher` by `phase`, described in `text`. The last one's phase is `complete` or `paused`. A
        cache of another run is removed first.
        """
        for record in self._write_cache(budget):
            yield {**record, "kind": "reading", "phase": record["kind"], "text": _describe(record)}

    def _write_cache(self, budget):
        if self.skip_reason:
            yield {"kind": "skipped", "reason": self.skip_reason}
        if not self.writer:
            return
        started, folder = self.clock.now(), self.folder.cache
        if self.accelerator.is_main_process and folder.exists() and not self._is_same_cache(folder):
            shutil.rmtree(folder)
            self.before_s = 0.0
        self.accelerator.wait_for_everyone()
        paused = False
        for record in self.writer.run(budget.seconds, budget.started):
            self.now_s = self.clock.now() - started
            self.num_read = self.writer.num_shards - len(teacher_cache.missing_shards([folder], self.writer.facts))
            paused = paused or record["kind"] == "paused"
            yield record
        if not devices.any_process(self.accelerator, (paused,))[0]:
            self.complete_cache, self.writer = folder, None
            memory.release_memory()
        elif not paused:
            yield {"kind": "paused", "reason": "another process was asked to stop"}

    def copy_shards(self, source=None):
        """Copies the complete cache, or the one in `source`, to the run folder, without temporary files."""
        source = source or self.complete_cache
        if source and source != self.folder.cache:
            for path in sorted(source.rglob("*")):
                relative = path.relative_to(source)
                target, is_complete = self.folder.cache / relative, not any(p.endswith(".tmp") for p in relative.parts)
                if is_complete and path.is_file() and not target.exists():
                    files.copy(path, target)

    def discard(self):
        """Removes the cache when all processes have finished the run."""
        self.accelerator.wait_for_everyone()
        if self.complete_cache and self.accelerator.is_main_process:
            shutil.rmtree(self.folder.cache, ignore_errors=True)

    def _is_same_cache(self, folder):
        try:
            return teacher_cache.read_facts(folder) == self.writer.facts
        except ValueError:
            return False


def _describe(record):
    if record["kind"] == "skipped":
        return f"The teacher runs during training, since {record['reason']}."
    if record["kind"] == "plan":
        size = f"{record['bytes'] / 1e6:,.1f} MB in {record['shards']} shards, {record['missing']} missing"
        return f"The run passes over the text more than once, so the teacher's outputs are cached first ({size})."
    if record["kind"] == "shard":
        left = format_duration(record["left_s"])
        return f"Caching the teacher's outputs: {record['done']} of {record['of']} shards, {left} left."
    return "The teacher cache is complete." if record["kind"] == "complete" else ""


def _complete_cache(previous_run, config):
    """Returns the cache folder of a resumed run if it is complete and the config names the same teacher, or None."""
    if config.teacher_cache != "auto" or not (previous_run and previous_run.facts):
        return None
    folder, old = previous_run.source.cache, previous_run.facts["config"]
    try:
        missing = teacher_cache.missing_shards([folder], teacher_cache.read_facts(folder))
    except ValueError:
        return None
    return folder if not missing and old["teacher"] == config.teacher and old["teacher_cache"] == "auto" else None
