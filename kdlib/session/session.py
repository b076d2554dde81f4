"""One session of a distillation run: resumes if possible, writes every record to disk before yielding it, and leaves a
valid checkpoint however it ends.
"""

import atexit
import contextlib
import weakref

import torch

from kdlib import environment, files
from kdlib.clock import Clock, format_duration, parse_duration, today
from kdlib.models.devices import accelerator, any_process
from kdlib.session import backup, checkpoint, finish, resume, run_folder, time_budget
from kdlib.session.arm import Scorer
from kdlib.session.experiment import Experiment
from kdlib.session.first_pass import CachedFirstPass

PLAN_AFTER_S = 60.0
_ACTIVE = weakref.WeakValueDictionary()
"""Unfinished sessions of this process, by folder. A new session in the same folder stops the old one."""


@atexit.register
def stop_all():
    """Saves all unfinished sessions when the process ends."""
    for session in list(_ACTIVE.values()):
        session.stop("its process ended")


class Paused(Exception):
    """The session ends at a safe point; the message is the reason."""


def distill(config, out, clock=None, resume="auto", on_progress=lambda phase, done, total: None):
    """Runs or resumes `config` in the folder `out`, and yields records (dicts).

    Records are those of `records.jsonl`, and also: `start` (what was loaded), `reading` (progress of the teacher's pass
    over the text), `plan` (after the first minute), and `verdict` or `paused` at the end.

    `resume`: `auto` resumes the run in `out`, if any; `never` requires a new folder; the path of a run folder or
    checkpoint elsewhere is resumed in `out`. Raises ValueError before anything is written if the config, the models,
    the text or the folder are unsuitable. A later error sets the state in `status.json` to `failed`, with the reason,
    and is raised. The caller may stop the generator at any record, and SIGTERM or SIGINT stop it too: then the state is
    saved as `paused`.

    `on_progress(phase, done, total)` is called between records, before every batch and every long task: loading,
    scoring held-out text, evaluations, the report. A `total` of 0 is unknown.
    """
    session = Session(config, out, clock or Clock(), resume, on_progress)
    yield from session.run()


class Session:
    """State of `distill`."""

    def __init__(self, config, out, clock, resume_from="auto", on_progress=lambda phase, done, total: None):
        self.config, self.clock, self.on_progress = config, clock, on_progress
        self.started = clock.now() - environment.session_age_s()
        self.budget = time_budget.TimeBudget(parse_duration(config.time_budget), clock, self.started)
        self.stop_signals = time_budget.StopSignals()
        self.folder = run_folder.RunFolder(out)
        if previous_session := _ACTIVE.pop(str(self.folder.path.resolve()), None):
            previous_session.stop("replaced by a new session")
        was_killed_in_copy = resume_from not in ("auto", "never") and not self.folder.can_resume()
        self.folder.check_usable(may_hold_run=resume_from == "auto" or was_killed_in_copy)
        self.accelerator = accelerator(config.amp_dtype)
        self.is_main = self.accelerator.is_main_process
        self.own_folder = self.folder if self.is_main else None
        self.experiment, self.schedule, self.final_state, self.plan = None, None, None, None
        self.train_started, self.first_step = None, 0
        self.load_pause, self.last_progress, self.data = "", ("", 0.0), {}
        try:
            if self.is_main and self.folder.holds_run():
                self.folder.acquire()
            self.previous_run = resume.find_previous_run(self.folder, resume_from)
            self.config = config = resume.with_template_date(config, self.previous_run)
            self.previous_status = self.previous_run.status if self.previous_run else {}
            self.num_sessions = (self.previous_status.get("sessions") or 0) + 1
            if self.previous_run and self.previous_run.verdict is not None:
                resume.check_same_run(self.previous_run, {"config": config.to_dict()})
                return
            self.elapsed_before_s = self.previous_status.get("elapsed_s") or 0.0
            self.budget.costs = dict(self.previous_status.get("costs") or {})
            uploader = backup.for_run(config, self.folder) if self.is_main else None
            self.writer = checkpoint.BackgroundWriter(self.clock, uploader)
            self.first_pass = CachedFirstPass(
                config, self.previous_run, self.folder, self.accelerator, self.clock, self._progress
            )
            self.stop_signals.listen()
            self._load(config)
        except Paused as pause:
            self.load_pause = str(pause)
        except BaseException:
            self.stop_signals.ignore()
            self.folder.release()
            raise

    def _load(self, config):
        per_step = config.effective_batch * self.accelerator.num_processes
        dated = config.replace(template_date=config.template_date or today())
        loaded = self.first_pass.inputs(dated)
        if loaded.prints_date:
            config = dated  # stored, so that later sessions read the same tokens
        self.data = {key: report.to_dict() for key, report in loaded.reports.items()}
        self.config = config.replace(max_steps=time_budget.num_steps(config, len(loaded.train), per_step))
        self.run_identity = {
            "config": self.config.to_dict(),
            "identity": self.first_pass.plan(self.config, loaded, per_step),
            "windows_per_step": per_step,
            "versions": environment.describe()["versions"],
        }
        self.notes = resume.check_same_run(self.previous_run, self.run_identity) if self.previous_run else []
        self.budget.guesses = time_budget.guessed_costs(loaded.pair.student.num_parameters())
        if not self.first_pass.writer:
            self._prepare(loaded)
        else:
            self.loaded = loaded

    def _prepare(self, loaded):
        """Creates the experiment and its checkpoint schedule."""
        facts = (self.previous_run and self.previous_run.facts) or {}
        scorer = Scorer.for_run(loaded, self.config, self.accelerator.device, facts, self.budget, self._progress)
        machine = self.accelerator, self.clock, self.budget
        self.experiment = Experiment(self.config, loaded, *machine, scorer, self.first_pass.seconds)
        self.schedule = checkpoint.CheckpointSchedule(
            self.experiment, self.run_identity, self.own_folder, self.writer, bool(facts)
        )

    def run(self):
        """Yields the records of the session, and keeps `status.json` valid however it ends."""
        if self.previous_run and self.previous_run.verdict is not None:
            resume.adopt_complete(self.previous_run, self.folder, self.is_main)
            if (
                self.is_main and not (self.folder.path / "report.html").exists()
            ):  # the process ended before it was drawn
                yield from self._run_optional("the report", lambda: finish.draw(self.folder), "report")
            yield {"kind": "verdict", **self.previous_run.verdict}
            return
        self._open()
        try:
            if self.load_pause:
                raise Paused(self.load_pause)
            yield from self._run_first_pass()
            yield from self._run_experiment()
        except Paused as pause:
            yield from self._pause(str(pause))
        except GeneratorExit:
            self.stop("stopped by the caller")
            raise
        except KeyboardInterrupt:
            self._end("paused", f"interrupted immediately; {self._describe_saved()}")
            raise
        except BaseException as error:  # noqa: BLE001
            yield from self._fail(error)
        finally:
            self._close()

    def _open(self):
        """Locks the folder and writes its first files. Raises ValueError if it is not usable."""
        try:
            if self.is_main:
                self._open_folder()
        except BaseException:
            self.stop_signals.ignore()
            self.folder.release()
            raise
        self.accelerator.wait_for_everyone()
        self._write_status("running", "")

    def _open_folder(self):
        if self.folder.lock is None:
            self.folder.acquire()
            if self.folder.holds_run():  # another process created a run in the meantime
                self.folder.release()
                self.folder.check_usable()
        config, cache = self.config.to_dict(), None
        if self.load_pause and self.previous_run:
            cache = self.previous_run.source.cache
            config = self.previous_run.facts["config"] if self.previous_run.facts else config
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        self.folder.open(config, environment.describe(devices), self.data)
        if self.previous_run:
            resume.adopt(self.previous_run, self.folder)
        self.first_pass.copy_shards(cache)
        _ACTIVE[str(self.folder.path.resolve())] = self

    def _run_first_pass(self):
        """Writes the teacher cache if one is planned, frees the teacher, and loads the cache for training."""
        for record in self.first_pass.run(self.budget):
            self._write_status("running", "the teacher reads the text")
            if record["phase"] == "paused":
                raise Paused(record["reason"])
            yield {**record, "session": self.num_sessions}
        if not self.experiment:
            loaded, self.loaded = self.loaded, None
            self._prepare(self.first_pass.inputs(self.config, loaded))

    def _run_experiment(self):
        experiment, facts = self.experiment, (self.previous_run and self.previous_run.facts) or None
        if facts:
            path = self.folder.records.path
            records = files.read_records(path) if path.exists() else []
            experiment.restore(self.previous_run.groups, facts["course"], records)
            self.previous_run.groups, self.schedule.step = None, experiment.step
        resumed = self.previous_run.path.name if facts else None
        fields = {"session": self.num_sessions, "resumed": resumed, "notes": self.notes}
        times = {"session_s": self.budget.seconds, "session_left_s": self.budget.left()}
        yield {"kind": "start", **experiment.summary(), **fields, **times}
        if facts:
            yield from self._write_records(self.previous_run.alerts(experiment.place()))
        for records in experiment.run():
            yield from self._write_records([*records, *self.writer.pop_alerts(experiment.place)])
            yield from self._between_tasks()
        self.schedule.flush()
        if not self.budget.fits("conclude") and self.train_started is not None:
            raise Paused("no time is left for the verdict in this session")
        yield from self._finish()

    def _finish(self):
        """Writes student and verdict, and then the optional parts of the report."""
        experiment, started = self.experiment, self.clock.now()
        self._progress("writing the student and the verdict", 0, 0)
        pairs = experiment.pairs()
        verdict = finish.finish_run(
            self.config, experiment.inputs, self.own_folder, experiment.scores, pairs, round(experiment.read_s, 3)
        )
        self.budget.record("conclude", self.clock.now() - started)
        self._end("complete", "")
        if self.is_main:
            students = finish.weights_of(pairs, experiment.start_weights)
            inputs = experiment.inputs
            tasks = finish.report_tasks(self.config, inputs, students, self.folder, verdict, self._progress)
            for name, work in tasks:
                yield from self._run_optional(name, work, "report")
        self.first_pass.discard()
        yield {"kind": "verdict", **verdict}

    def _run_optional(self, name, work, task):
        """Yields the records of `work()`. The state on disk does not depend on it, so an error becomes an alert."""
        records = []
        try:
            if not self.budget.fits(task):
                raise Paused("no time is left for it in this session")
            self._progress(name, 0, 0)
            started = self.clock.now()
            records = work() or []
            self.budget.record(task, self.clock.now() - started)
        except Exception as error:  # noqa: BLE001 - student and verdict, or the checkpoint, are saved
            kind = "" if isinstance(error, Paused) else f"{type(error).__name__}: "
            meaning = f"{name} failed: {kind}{(str(error).strip().splitlines() or ['no reason given'])[0][:300]}"
            advice = "the results are saved; kdlib report draws the report again"
            has_arm = self.experiment and self.experiment.arms
            place = self.experiment.place() if has_arm else {"run": "distilled", "repeat": 0, "step": 0}
            alert = {"kind": "alert", **place, "sign": "report", "part": name, "meaning": meaning, "advice": advice}
            records = [] if isinstance(error, Paused) and self.final_state == "paused" else [alert]
        with contextlib.suppress(OSError):
            yield from self._write_records(records)

    def _write_records(self, records):
        """Writes records to disk, and then yields them."""
        records = [{**record, "session": self.num_sessions} for record in records]
        if self.is_main:
            for record in records:
                self.folder.records.append(record)
            if any(record["kind"] == "eval" for record in records):
                self._write_status("running", "")
        yield from records

    def _between_tasks(self):
        """Saves if due, yields the plan, and raises `Paused` if the next task does not fit."""
        arm = self.experiment.arms[-1] if self.experiment.arms else None
        if arm is None or self.experiment.training is None:
            return
        if self.train_started is None:
            self.budget.record("start", self.budget.used() - self.first_pass.now_s)
            self.train_started, self.first_step = self.clock.now(), self.experiment.step
        tasks = ["step"] + ["evaluate"] * self.experiment.evaluation_due(arm, arm.step + 1)
        # every session takes at least one step
        final_tasks = self.budget.final_tasks() if self.experiment.step > self.first_step else ["save"]
        fits = arm.done or self.budget.fits(*tasks, *final_tasks)
        flags = self.schedule.is_due(arm), bool(self.stop_signals.reason), not fits
        save, stop, late = any_process(self.accelerator, flags)
        if stop:
            raise Paused(self.stop_signals.reason or "another process was asked to stop")
        if late:
            raise Paused(self._describe_time())
        if save:
            self.schedule.start()
        if self.plan is None and arm.step and self.clock.now() - self.train_started >= PLAN_AFTER_S:
            self._update_plan()
            yield {"kind": "plan", "session": self.num_sessions, **self.plan}

    def _update_plan(self):
        arm = self.experiment.arms[-1]
        interval_s = self.config.save_steps * arm.train_s / max(1, arm.step) or self.schedule.interval_s()
        saving_share = self.budget.expected("save") / max(interval_s, 1e-9)
        self.plan = self.experiment.make_plan(self.num_sessions, saving_share)

    def _describe_time(self):
        used, total = map(format_duration, (self.budget.used(), self.budget.seconds))
        return f"{used} of the time budget of {total} are used, and the rest is reserved for saving"

    def _progress(self, phase, done, total):
        """Reports progress between batches. Raises `Paused` on a signal, or if no time would be left to save."""
        if self.is_main:
            self.on_progress(phase, done, total)
        if self.accelerator.num_processes > 1:
            return  # processes must stop together
        if self.stop_signals.reason:
            raise Paused(self.stop_signals.reason)
        now, (last_phase, last_time) = self.clock.now(), self.last_progress
        if done and phase == last_phase and not self.experiment:  # a `Scorer` measures its own batches
            self.budget.record("batch", now - last_time)
        self.last_progress = phase, now
        reserve = self.budget.cost("batch", *["save"] * bool(self.experiment))
        if self.budget.left() < reserve + 0.5 * self.budget.reserve():
            raise Paused(self._describe_time())

    def _pause(self, reason):
        """Saves; then evaluates and exports the student if time allows. The next session repeats that evaluation."""
        reason = self._save(reason)
        self._end("paused", f"{reason}; {self._describe_saved()}")
        if self.experiment and self.experiment.arms and not self.stop_signals.reason:
            arm = self.experiment.arms[-1] if self.experiment.training else None
            if arm and arm.evaluated < arm.step and self.budget.fits("evaluate", "export"):
                yield from self._run_optional("the evaluation", lambda: self.experiment.evaluate(arm), "evaluate")
            if self.is_main and finish.best_of(self.experiment.arms):
                yield from self._run_optional(
                    "the export", lambda: finish.export_best_so_far(self.config, self.experiment, self.folder), "export"
                )
        yield self._end_paused(reason)

    def _end_paused(self, reason):
        """Writes the final state, and returns the last record of the session."""
        reason = f"{reason}; {self._describe_saved()}"
        self._end("paused", reason)
        step = self.experiment.step if self.experiment else self.previous_status.get("step") or 0
        fields = {"step": step, "session": self.num_sessions, "plan": self.plan}
        return {"kind": "paused", "reason": reason, **fields}

    def _fail(self, error):
        """Pauses if the disk is full: the last checkpoint is valid. Otherwise writes the state `failed` and raises."""
        if isinstance(error, OSError) and error.errno in files.DISK_FULL:
            yield self._end_paused(f"the disk is full ({error.strerror})")
            return
        if isinstance(error, FloatingPointError):
            self._save("")
        self._end("failed", f"{type(error).__name__}: {error}".splitlines()[0])
        if isinstance(error, ValueError):  # the caller's mistakes were found before: this one is a bug
            raise RuntimeError(f"the run failed: {error}") from error
        raise error

    def stop(self, reason):
        """Saves and ends an unfinished session from outside, between two records."""
        if self.final_state or (self.folder.lock is None and self.is_main):
            return
        self._end("paused", f"{self._save(reason)}; {self._describe_saved()}")
        self._close()

    def _save(self, reason):
        """Saves, and returns the reason of the end, with the error if saving failed."""
        try:
            if self.schedule:
                self.schedule.flush()
        except Exception as error:  # noqa: BLE001 - the previous checkpoint is valid, so the session can still end
            reason += f", and not saved ({getattr(error, 'strerror', None) or error})"
        return reason

    def _describe_saved(self):
        if path := checkpoint.newest_name(self.folder.checkpoints):
            return f"resumes from {path}"
        if self.first_pass.num_read:
            return "the teacher cache written so far is kept"
        return "nothing was saved yet: the next session starts from the beginning"

    def _end(self, state, reason):
        """Writes the final state. Once set, it is not changed by later errors."""
        if self.final_state in (None, state):
            self._write_status(state, reason)
            self.final_state = state

    def _close(self):
        """Releases the folder, the writer thread and the signal handlers."""
        with contextlib.ExitStack() as stack:  # all callbacks run even if one raises
            stack.callback(self.folder.release)
            stack.callback(self.writer.close)
            stack.callback(self.stop_signals.ignore)
        if _ACTIVE.get(str(self.folder.path.resolve())) is self:
            del _ACTIVE[str(self.folder.path.resolve())]

    def _write_status(self, state, reason):
        if not self.is_main:
            return
        if self.plan is not None and self.experiment.arms[-1].step:  # a new arm has no step time yet
            self._update_plan()
        used = self.budget.used()
        step = (self.experiment and self.experiment.num_distilled_steps) or self.previous_status.get("step", 0)
        self.folder.status(
            state, reason=reason, step=step,
            max_steps=self.config.max_steps * self.config.repeats or self.previous_status.get("max_steps", 0),
            sessions=self.num_sessions,
            elapsed_s=round(self.elapsed_before_s + used, 3), session_s=round(used, 3),
            saving_s=round(self.schedule.total_s if self.schedule else 0.0, 3), costs=self.budget.costs,
            plan=None if state == "complete" else self.plan, **self.first_pass.facts(),
        )  # fmt: skip
