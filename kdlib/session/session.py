"""One session of a run: what was begun is gone on with, every record goes to the disk and to whoever drives the generator,
and a checkpoint is whole wherever it ends.
"""

import atexit
import contextlib
import weakref

import torch

from kdlib import environment, files
from kdlib.clock import Clock, format_duration, parse_duration
from kdlib.models.devices import accelerator, any_process
from kdlib.session import backup, checkpoint, checkpoint_schedule, finish, plan, resume, run_folder, time_budget
from kdlib.session.arm import Scorer
from kdlib.session.experiment import Experiment
from kdlib.session.first_pass import CachedFirstPass
from kdlib.session.requests import Unknown, Wishes

PLAN_AFTER_S = 60.0
_ACTIVE = weakref.WeakValueDictionary()
"""Sessions of this process that are not over, by folder: one that nobody drives any more gives way to the next."""


@atexit.register
def stop_all():
    """As the process ends: save what nobody will drive any more."""
    for session in list(_ACTIVE.values()):
        session.stop("its process ended")


class Paused(Exception):
    """The session ends here, with nothing half-done; the text says why."""


def distill(config, out, clock=None, resume="auto", wishes=None, on_progress=lambda phase, done, total: None):
    """Run `config` in the folder `out`, or go on with the run that it holds: a generator of records (dicts, as in
    `records.jsonl`; besides, of kind `first_pass` while the teacher reads first, as `cache_writer.write` has them by
    `phase`; one of kind `start` with what was loaded, `plan` after the first minute, and at the end `verdict` or `paused`).

    `resume`: `auto` goes on where `out` holds this run; `never` wants a new folder; a run folder or checkpoint elsewhere is
    gone on with in `out`. Raises ValueError before anything is written where the config, the models, the text or the folder
    won't do. Whatever fails later leaves `status.json` at `failed` with the reason, and is raised. The caller may break off
    at any record, and the machine may ask to stop (SIGTERM, SIGINT): then all is saved and the state is `paused`.

    `wishes`: a set into which the caller may put words at any time, from any thread too. Each is granted as soon as nothing
    is half-done, and then taken out: `pause` ends the session as above; `save` writes a checkpoint; `evaluate` scores the
    student on the validation text, for a look only: its eval record says `asked`, and nothing depends on it. A record of
    kind `wish` tells what became of the last two. Another word is a ValueError, with all saved.

    `on_progress(phase, done, total)` is called between records, before every batch and every piece of work that takes long:
    loading, reading held-out text, evaluations, the report. A `total` of 0 is unknown.
    """
    session = Session(config, out, clock or Clock(), resume, wishes, on_progress)
    yield from session.run()


class Session:
    """The state of `distill`."""

    def __init__(self, config, out, clock, wanted="auto", wishes=None, on_progress=lambda phase, done, total: None):
        self.config, self.clock, self.wishes, self.on_progress = config, clock, Wishes(wishes), on_progress
        self.started = clock.now() - environment.session_age_s()
        self.budget = time_budget.TimeBudget(parse_duration(config.time_budget), clock, self.started)
        self.stop_signals = time_budget.StopSignals()
        self.folder = run_folder.RunFolder(out)
        if former := _ACTIVE.pop(str(self.folder.path.resolve()), None):
            former.stop("given up for a new session")
        begun_again = wanted not in ("auto", "never") and not self.folder.has_begun()  # a kill as it was brought here
        self.folder.refuse_foreign(may_hold_run=wanted == "auto" or begun_again)
        self.accelerator = accelerator(config.amp_dtype)
        self.writes = self.accelerator.is_main_process
        self.own_folder = self.folder if self.writes else None
        self.experiment, self.saving, self.ended, self.outlook = None, None, None, None
        self.trained_from, self.began_at = None, 0
        self.stopped_loading, self.phase = "", ("", 0.0)
        try:
            if self.writes and self.folder.holds_run():
                self.folder.acquire()
            self.previous_run = resume.find_previous_run(self.folder, wanted)
            self.previous_status = self.previous_run.status if self.previous_run else {}
            self.num_sessions = (self.previous_status.get("sessions") or 0) + 1
            if self.previous_run and self.previous_run.verdict is not None:
                resume.check_same_run(self.previous_run, {"config": config.to_dict()})
                return
            self.elapsed_before_s = self.previous_status.get("elapsed_s") or 0.0
            self.budget.costs = dict(self.previous_status.get("costs") or {})
            self.writer = checkpoint.BackgroundWriter(
                self.clock, backup.of_run(config, self.folder) if self.writes else None
            )
            self.first_pass = CachedFirstPass(
                config, self.previous_run, self.folder, self.accelerator, self.clock, self._progress
            )
            self.stop_signals.listen()
            self._load(config)
        except Paused as pause:
            self.stopped_loading = str(pause)
        except BaseException:
            self.stop_signals.ignore()
            self.folder.release()
            raise

    def _load(self, config):
        """The inputs, and what an earlier session left."""
        loaded, per_step = self.first_pass.inputs(config), config.effective_batch * self.accelerator.num_processes
        self.config = config.replace(max_steps=plan.num_steps(config, len(loaded.train), per_step))
        self.run_identity = {
            "config": self.config.to_dict(),
            "identity": self.first_pass.plan(self.config, loaded, per_step),
            "windows_per_step": per_step,
            "versions": environment.describe()["versions"],
        }
        self.notes = resume.check_same_run(self.previous_run, self.run_identity) if self.previous_run else []
        self.budget.guesses = plan.guessed_costs(loaded.pair.student.num_parameters())
        if not self.first_pass.writer:
            self._prepare(loaded)
        else:
            self.loaded = loaded

    def _prepare(self, loaded):
        """All that trains."""
        facts = (self.previous_run and self.previous_run.facts) or {}
        scorer = Scorer.of(loaded, self.config, self.accelerator.device, facts, self.budget, self._progress)
        machine = self.accelerator, self.clock, self.budget
        self.experiment = Experiment(self.config, loaded, *machine, scorer, self.first_pass.seconds)
        self.saving = checkpoint_schedule.CheckpointSchedule(
            self.experiment, self.run_identity, self.own_folder, self.writer, bool(facts)
        )

    def run(self):
        """All that is left of the run, or of the session's time. Keeps `status.json` true whatever happens."""
        if self.previous_run and self.previous_run.verdict is not None:
            resume.adopt_complete(self.previous_run, self.folder, self.writes)
            if self.writes and not (self.folder.path / "report.html").exists():  # the process died before it was drawn
                yield from self._attempt("the report", lambda: finish.draw(self.folder), "report")
            yield {"kind": "verdict", **self.previous_run.verdict}
            return
        self._open()
        try:
            if self.stopped_loading:
                raise Paused(self.stopped_loading)
            yield from self._read()
            yield from self._run()
        except Paused as pause:
            yield from self._pause(str(pause))
        except Unknown as wish:
            self.stop(str(wish))
            raise
        except GeneratorExit:
            self.stop("broken off by its caller")
            raise
        except KeyboardInterrupt:
            self._end("paused", f"interrupted at once; {self._kept()}")
            raise
        except BaseException as error:  # noqa: BLE001
            yield from self._fail(error)
        finally:
            self._close()

    def _open(self):
        """Lock, files and signals of a session that really begins. ValueError where the folder won't do."""
        try:
            self._take_folder()
        except BaseException:
            self.stop_signals.ignore()
            self.folder.release()
            raise
        self.accelerator.wait_for_everyone()
        self._status("running", "")

    def _take_folder(self):
        if self.writes:
            if self.folder.lock is None:
                self.folder.acquire()
                if self.folder.holds_run():  # another process was faster
                    self.folder.release()
                    self.folder.refuse_foreign()
            devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            known = (
                self.previous_run.facts["config"]
                if self.stopped_loading and self.previous_run and self.previous_run.facts
                else None
            )
            self.folder.open(known or self.config.to_dict(), environment.describe(devices))
            if self.previous_run:
                resume.adopt(self.previous_run, self.folder)
            self.first_pass.copy_shards(
                self.previous_run.source.cache if self.stopped_loading and self.previous_run else None
            )
            _ACTIVE[str(self.folder.path.resolve())] = self

    def _read(self):
        """Where it is due, the teacher reads all text and is let go; the run then learns from what it said."""
        for record in self.first_pass.run(self.budget):
            self._status("running", "the teacher reads the text")
            if record["phase"] == "paused":
                raise Paused(record["reason"])
            yield {**record, "session": self.num_sessions}
        if not self.experiment:
            loaded, self.loaded = self.loaded, None
            self._prepare(self.first_pass.inputs(self.config, loaded))

    def _run(self):
        experiment, facts = self.experiment, (self.previous_run and self.previous_run.facts) or None
        if facts:
            path = self.folder.records.path
            experiment.restore(
                self.previous_run.groups, facts["course"], files.read_records(path) if path.exists() else []
            )
            self.previous_run.groups, self.saving.step = None, experiment.step
        resumed = self.previous_run.path.name if facts else None
        told = {"session": self.num_sessions, "resumed": resumed, "notes": self.notes}
        time = {"session_s": self.budget.seconds, "session_left_s": self.budget.left()}
        yield {"kind": "start", **experiment.summary(), **told, **time}
        if facts:
            yield from self._written(self.previous_run.alerts(experiment.place()))
        for found in experiment.run():
            yield from self._written([*found, *self.writer.pop_alerts(experiment.place)])
            yield from self._look_ahead()
        self.saving.flush()
        if not self.budget.fits("conclude") and self.trained_from is not None:
            raise Paused("no time is left for the verdict in this session")
        yield from self._conclude()

    def _conclude(self):
        """The student and the verdict; then, as far as they succeed, what only shows them."""
        experiment, started = self.experiment, self.clock.now()
        self._progress("writing the student and the verdict", 0, 0)
        pairs = experiment.pairs()
        answer = finish.finish_run(
            self.config, experiment.inputs, self.own_folder, experiment.scores, pairs, round(experiment.read_s, 3)
        )
        self.budget.record("conclude", self.clock.now() - started)
        self._end("complete", "")
        if self.writes:
            students = finish.weights_of(pairs, experiment.start_weights)
            shown = finish.extras(self.config, experiment.inputs, students, self.folder, answer, self._progress)
            for name, work in shown:
                yield from self._attempt(name, work, "report")
        self.first_pass.discard()
        yield {"kind": "verdict", **answer}

    def _attempt(self, name, work, task):
        """Records of `work()`, which the state on disk does not depend on: what it raises becomes an alert."""
        found = []
        try:
            if not self.budget.fits(task):
                raise Paused("no time is left for it in this session")
            self._progress(name, 0, 0)
            started = self.clock.now()
            found = work() or []
            self.budget.record(task, self.clock.now() - started)
        except Exception as error:  # noqa: BLE001 - student and verdict, or the checkpoint, are safe on the disk
            kind = "" if isinstance(error, Paused) else f"{type(error).__name__}: "
            meaning = f"{name} failed: {kind}{(str(error).strip().splitlines() or ['no reason given'])[0][:300]}"
            advice = "the results are saved; kdlib report draws the page again"
            place = (
                self.experiment.place()
                if self.experiment and self.experiment.arms
                else {"run": "distilled", "repeat": 0, "step": 0}
            )
            alert = {"kind": "alert", **place, "sign": "report", "part": name, "meaning": meaning, "advice": advice}
            found = [] if isinstance(error, Paused) and self.ended == "paused" else [alert]
        with contextlib.suppress(OSError):
            yield from self._written(found)

    def _written(self, found):
        """Records, once they are all on the disk."""
        found = [{**record, "session": self.num_sessions} for record in found]
        if self.writes:
            for record in found:
                self.folder.records.append(record)
            if any(record["kind"] == "eval" for record in found):
                self._status("running", "")
        yield from found

    def _look_ahead(self):
        """Between two tasks of the course: save where it is time to, tell the plan, stop where the next won't fit."""
        arm = self.experiment.arms[-1] if self.experiment.arms else None
        if arm is None or self.experiment.training is None:
            return
        if self.trained_from is None:
            self.budget.record("start", self.budget.used() - self.first_pass.now_s)
            self.trained_from, self.began_at = self.clock.now(), self.experiment.step
        ahead = ["step"] + ["evaluate"] * self.experiment.evaluation_due(arm, arm.step + 1)
        last = self.budget.final_tasks() if self.experiment.step > self.began_at else ["save"]  # a step comes first
        fits = arm.done or self.budget.fits(*ahead, *last)
        in_vain = "evaluate" in self.wishes and not self.budget.fits(*ahead, "save", "evaluate", "evaluate", "export")
        here = (self.saving.is_due(arm), bool(self.stop_signals.asked), not fits, *self.wishes.all(), in_vain)
        save, asked, late, *wanted = any_process(self.accelerator, here)
        if asked:
            raise Paused(self.stop_signals.asked or "another process was asked to stop")
        if late:
            raise Paused(self._time_is_up())
        if save:
            self.saving.start()
        yield from self._grant(arm, *wanted)
        if self.outlook is None and arm.step and self.clock.now() - self.trained_from >= PLAN_AFTER_S:
            self._make_plan()
            yield {"kind": "plan", "session": self.num_sessions, **self.outlook}

    def _grant(self, arm, pause, save, look, unknown, in_vain):
        """Fulfil wishes; tell what became of them."""
        if unknown:
            self.wishes.refuse_unknown()
            raise Unknown("another process was given an unknown wish")
        if pause:
            self._pause_as_wished()
        for found, wish, answer in self.wishes.grant(self.experiment, self.saving, arm, save, look, in_vain):
            yield from self._written(found)
            self.wishes.fulfil(wish)
            place = {**self.experiment.place(), "session": self.num_sessions}
            yield {"kind": "wish", "wish": wish, "answer": answer, **place}

    def _pause_as_wished(self):
        self.wishes.fulfil("pause")
        raise Paused("asked to pause")

    def _make_plan(self):
        arm = self.experiment.arms[-1]
        between = self.config.save_steps * arm.train_s / max(1, arm.step) or self.saving.every_s()
        self.outlook = self.experiment.outlook(self.num_sessions, self.budget.expected("save") / max(between, 1e-9))

    def _time_is_up(self):
        used, whole = map(format_duration, (self.budget.used(), self.budget.seconds))
        return f"{used} of the time budget of {whole} are used, and the rest is for saving"

    def _progress(self, phase, done, total):
        """Between two batches of anything: says how far it is; stops if no time would be left to save, or if asked."""
        if self.writes:
            self.on_progress(phase, done, total)
        if self.accelerator.num_processes > 1:
            return  # processes must stop together
        if self.stop_signals.asked:
            raise Paused(self.stop_signals.asked)
        if "pause" in self.wishes:
            self._pause_as_wished()
        now, (former, at) = self.clock.now(), self.phase
        if done and phase == former and not self.experiment:  # a `Scorer` measures its own batches
            self.budget.record("batch", now - at)
        self.phase = phase, now
        reserve = self.budget.cost("batch", *["save"] * bool(self.experiment))
        if self.budget.left() < reserve + 0.5 * self.budget.reserve():
            raise Paused(self._time_is_up())

    def _pause(self, reason):
        """Save; then, where there is time, score and export what there is, so that a session ends with something to look at.
        What is told of it goes with the next session: that begins where the checkpoint stands.
        """
        reason = self._save(reason)
        self._end("paused", f"{reason}; {self._kept()}")
        if self.experiment and self.experiment.arms and not self.stop_signals.asked:
            arm = self.experiment.arms[-1] if self.experiment.training else None
            if arm and arm.evaluated < arm.step and self.budget.fits("evaluate", "export"):
                yield from self._attempt("the evaluation", lambda: self.experiment.evaluate(arm), "evaluate")
            if self.writes and finish.best_of(self.experiment.arms):
                yield from self._attempt(
                    "the export", lambda: finish.export_best_so_far(self.config, self.experiment, self.folder), "export"
                )
        yield self._paused(reason)

    def _paused(self, reason):
        """The state on disk, and the last record of the session."""
        reason = f"{reason}; {self._kept()}"
        self._end("paused", reason)
        step = self.experiment.step if self.experiment else self.previous_status.get("step") or 0
        known = {"step": step, "session": self.num_sessions, "plan": self.outlook}
        return {"kind": "paused", "reason": reason, **known}

    def _fail(self, error):
        """A full disk is no more than a pause: what was saved is whole. Anything else is told and raised."""
        if isinstance(error, OSError) and error.errno in files.FULL:
            yield self._paused(f"the disk is full ({error.strerror})")
            return
        if isinstance(error, FloatingPointError):
            self._save("")
        self._end("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        if isinstance(error, ValueError):  # the caller's mistakes were all found before: this one is ours
            raise RuntimeError(f"the run failed: {error}") from error
        raise error

    def stop(self, reason):
        """End the session from outside, between two records: all is saved. Does nothing where it is over."""
        if self.ended or (self.folder.lock is None and self.writes):
            return
        self._end("paused", f"{self._save(reason)}; {self._kept()}")
        self._close()

    def _save(self, reason):
        """Save what there is; the reason of an end, with why it could not be saved."""
        try:
            if self.saving:
                self.saving.flush()
        except Exception as error:  # noqa: BLE001 - the checkpoint of before stands, and the session ends well
            reason += f", and not saved ({getattr(error, 'strerror', None) or error})"
        return reason

    def _kept(self):
        path = checkpoint.newest_name(self.folder.checkpoints)
        read = (
            "what the teacher has read is kept" if self.first_pass.num_read else "nothing was saved yet, it begins anew"
        )
        return f"goes on from {path}" if path else read

    def _end(self, state, reason):
        """Writes the state that the session ends in. The first one stays: what fails later changes nothing of it."""
        if self.ended in (None, state):
            self._status(state, reason)
            self.ended = state

    def _close(self):
        """Give back the folder, the signals, the writing thread."""
        with contextlib.ExitStack() as stack:  # each is done whatever another raises
            stack.callback(self.folder.release)
            stack.callback(self.writer.close)
            stack.callback(self.stop_signals.ignore)
        if _ACTIVE.get(str(self.folder.path.resolve())) is self:
            del _ACTIVE[str(self.folder.path.resolve())]

    def _status(self, state, reason):
        if not self.writes:
            return
        if self.outlook is not None and self.experiment.arms[-1].step:
            self._make_plan()  # a student that has not begun yet can't tell
        used, step = (
            self.budget.used(),
            (self.experiment and self.experiment.num_distilled) or self.previous_status.get("step", 0),
        )
        self.folder.status(
            state, reason=reason, step=step,
            max_steps=self.config.max_steps * self.config.repeats or self.previous_status.get("max_steps", 0),
            sessions=self.num_sessions,
            elapsed_s=round(self.elapsed_before_s + used, 3), session_s=round(used, 3),
            saving_s=round(self.saving.took_s if self.saving else 0.0, 3), costs=self.budget.costs,
            plan=None if state == "complete" else self.outlook, **self.first_pass.facts(),
        )  # fmt: skip
