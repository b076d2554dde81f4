"""The checkpoints of a session: when one is due, and what writing them takes of its time."""

from kdlib import environment
from kdlib.session import checkpoint

SAVE_EVERY_S, SAVE_SHARE = 120.0, 0.02
"""Seconds between checkpoints where `save_steps` is 0, and the share of the time they may take."""


class CheckpointSchedule:
    """Writes a `experiment` into `folder` (a `run_folder.RunFolder`, None in a process that does not write) by a
    `checkpoint.BackgroundWriter`; `run_identity` says of which run. `step` is the last one that was saved, `took_s` what all took so far.
    """

    def __init__(self, experiment, run_identity, folder, writer, has_checkpoint):
        self.experiment, self.run_identity, self.folder, self.writer = experiment, run_identity, folder, writer
        self.config, self.clock, self.budget = experiment.config, experiment.clock, experiment.budget
        self.was_saved, self.step, self.saved_at, self.took_s = has_checkpoint, None, self.clock.now(), 0.0

    def is_due(self, arm):
        """Whether it is time for a checkpoint, where the leg stands."""
        if not arm.step or arm.done or not self.experiment.evaluations_done(arm):
            return arm.done
        if self.config.save_steps:
            return arm.step % self.config.save_steps == 0
        return not self.was_saved or self.clock.now() - self.saved_at >= self.every_s()

    def every_s(self):
        return max(SAVE_EVERY_S, self.budget.expected("save") / SAVE_SHARE)

    def start(self):
        """Begin a checkpoint: the state is copied now and written behind the training. The first one is waited for: it shows
        that the disk takes it, and what it costs. So is every one under `save_steps`: no more steps than that may be lost.
        """
        started = self.clock.now()
        self.writer.wait()
        experiment = self.experiment
        if experiment.training is None or self.step == experiment.step:
            return
        if not experiment.training.is_finite():
            return  # weights that are no numbers would be no help
        groups = experiment.groups()
        if self.folder:
            facts = {
                **self.run_identity, "course": experiment.facts(), "chunk": experiment.scorer.chunk, "halvings": experiment.scorer.halvings,
                "records_bytes": self.folder.records.position(),
            }  # fmt: skip
            copied_s = self.clock.now() - started
            keep, reserve = self.config.keep_checkpoints, environment.disk_reserve_bytes()
            self.writer.start(self.folder.checkpoints, experiment.step, groups, facts, keep, reserve)
            if not self.was_saved or self.config.save_steps:
                self.writer.wait()
            self.budget.record("save", copied_s + self.writer.write_s)
        self.was_saved, self.step, self.saved_at = True, experiment.step, self.clock.now()
        self.took_s += self.saved_at - started

    def flush(self):
        """A checkpoint of now, and nothing being written any more. Its folder's name, empty where there is none."""
        self.start()
        self.writer.wait()
        return checkpoint.folder_name(self.step) if self.step == self.experiment.step else ""
