"""A run from its inputs to its verdict: the distilled student, the control, their scores; every record on disk and to
whoever drives the generator.
"""

import copy
import dataclasses
import gc
import itertools
import statistics

import accelerate
import torch

from kdlib import alerts, budget, checkpoint, env, evaluate, inputs, memory, records, report, verdict
from kdlib.train import train

SHORT = 0.1
"""Fraction of the plan at which a short control is compared."""
CALIBRATION_BLOCKS, CALIBRATION_STEPS = 6, 5
DISTILLED, CONTROL = "distilled", "ce_only"


@dataclasses.dataclass
class Leg:
    """One student in training: which it is, how far it goes, and what it came to.

    `num_steps` is the plan its learning rate is fitted to, `last_step` where it stops, `compare_step` where it is set
    against the other leg. `at_compare` and `at_end` are test scores of the best weights (by validation) up to there.
    """

    name: str
    repeat: int
    num_steps: int
    last_step: int
    compare_step: int
    eval_steps: int
    best: float = float("inf")
    best_step: int = 0
    best_weights: dict | None = None
    since_best: int = 0
    train_s: float = 0.0
    compare_s: float = 0.0
    at_compare: evaluate.Score | None = None
    at_end: evaluate.Score | None = None
    watch: alerts.Watch = dataclasses.field(default_factory=alerts.Watch)


def distill(config, out, clock=None):
    """Run `config` into the folder `out`: a generator of records (dicts, as in `records.jsonl`; before them one of kind
    `start` with what was loaded, after them one of kind `verdict`).

    Raises ValueError before anything is written where the config, the models, the text or the folder won't do. Whatever
    fails later leaves `status.json` at `failed` with the reason, and is raised. The caller may break off at any record.
    """
    session = Session(config, out, clock or budget.Clock())
    yield from session.run()


class Session:
    """The state of `distill`."""

    def __init__(self, config, out, clock):
        self.folder = records.RunFolder(out)
        self.folder.refuse_foreign()
        self.config = config
        self.clock = clock
        self.started = clock.now()
        self.accelerator = _accelerator(config.amp_dtype)
        self.writes = self.accelerator.is_main_process
        self.inputs = inputs.load(config, self.accelerator.device, _teacher_dtype(self.accelerator))
        per_step = config.batch_size * config.grad_accumulation * self.accelerator.num_processes
        planned = round(config.epochs * len(self.inputs.train) / per_step)
        self.config = config.replace(max_steps=config.max_steps or max(1, planned))
        self.eval_steps = config.eval_steps or max(1, round(self.config.max_steps / 20))
        self.pair = self.inputs.pair
        self.start_weights = checkpoint.copy_of(self.pair.student)
        self.eval_s = 0.0
        self.step = 0

    def run(self):
        """All legs, then the verdict. Keeps `status.json` true whatever happens."""
        if self.writes:
            devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
            self.folder.open(self.config.to_dict(), env.describe(devices))
        self._status("running", "")
        try:
            yield from self._run()
        except GeneratorExit:
            self._status("failed", "broken off by its caller before the end")
            raise
        except BaseException as error:
            self._status("failed", f"{type(error).__name__}: {error}".splitlines()[0])
            if isinstance(error, ValueError):  # the caller's mistakes were all found before: this one is ours
                raise RuntimeError(f"the run failed: {error}") from error
            raise
        self._status("complete", "")

    def _run(self):
        config = self.config
        counts = {"num_windows": len(self.inputs.train), "max_steps": config.max_steps}
        yield {"kind": "start", **counts, "alignment": self.inputs.alignment}
        known = evaluate.evaluate_teacher(self.pair.teacher, self.inputs.validation).summary()
        yield self._record(
            {"kind": "eval", "run": "teacher", "repeat": 0, "split": "validation", "step": 0, "elapsed_s": 0.0, **known}
        )
        scores = {"teacher": evaluate.evaluate_teacher(self.pair.teacher, self.inputs.test)}
        scores["student_before"] = self._test(self.pair.student)
        for name, score in scores.items():
            facts = {"run": name, "repeat": 0, "split": "test", "step": 0, "elapsed_s": 0.0}
            yield self._record({"kind": "eval", **facts, **score.summary()})
        legs = []
        for repeat in range(config.repeats):
            steps = config.max_steps
            compare = steps if config.control != "short" else max(1, round(SHORT * steps))
            distilled = Leg(DISTILLED, repeat, steps, steps, compare, self.eval_steps)
            yield from self._train(distilled, config.replace(seed=config.seed + repeat))
            control = None
            if config.control != "off":
                control = self._control_leg(distilled)
                yield from self._train(control, config.plain().replace(seed=config.seed + repeat))
            legs.append((distilled, control))
        yield from self._conclude(scores, legs)

    def _conclude(self, scores, legs):
        """Verdict, student, report."""
        config = self.config
        pairs = [(control.at_compare, distilled.at_compare) for distilled, control in legs if control]
        chosen = min((distilled for distilled, _ in legs), key=lambda leg: leg.best)
        scores["ce_only"] = verdict.mean_score([ce for ce, _ in pairs]) if pairs else None
        scores["distilled"] = verdict.mean_score([distilled.at_end for distilled, _ in legs])
        answer = verdict.make_verdict(config.control, scores, pairs)
        answer["alignment"] = self.inputs.alignment
        answer["train_s"] = {leg.name: leg.compare_s for leg in legs[0] if leg}
        answer["steps"] = {leg.name: leg.compare_step for leg in legs[0] if leg}
        answer["exported"] = {"repeat": chosen.repeat, "step": chosen.best_step}
        checkpoint.put_back(self.pair.student, chosen.best_weights)
        answer["samples"] = self._samples(legs, chosen)
        checkpoint.put_back(self.pair.student, chosen.best_weights)
        if self.writes:
            card = checkpoint.model_card(config, answer)
            tokenizer = self.pair.student_reader.tokenizer
            checkpoint.save_student(self.pair.student, tokenizer, self.folder.path / "student", card)
            records.write_json(self.folder.path / "verdict.json", answer)
            report.write_report(self.folder.path)
        yield {"kind": "verdict", **answer}

    def _control_leg(self, distilled):
        """The control of a leg: as many plain steps as fit into the same wall-clock, by a paired measurement."""
        ratio = self._step_cost_ratio()
        steps = max(1, round(distilled.num_steps * ratio))
        compare = max(1, round(distilled.compare_step * ratio))
        return Leg(CONTROL, distilled.repeat, steps, compare, compare, max(1, round(self.eval_steps * ratio)))

    def _step_cost_ratio(self):
        """Seconds of a distilled step over seconds of a plain one, on copies that are thrown away: short blocks of both
        kinds in turn, so that a machine whose speed drifts favours neither; the first step of a block, whose caches the
        other kind has filled, does not count. The ratio of the medians. With a curriculum all parts are on: the
        control rather gets a little more time than it is due.
        """
        streams = []
        for config in (self.config.replace(use_curriculum=False), self.config.plain()):
            student = copy.deepcopy(self.pair.student)
            checkpoint.put_back(student, self.start_weights)
            streams.append(self._stream(inputs.make_objective(self.pair, config, student), config, 10**6))
        seconds = [[], []]
        for _ in range(CALIBRATION_BLOCKS):
            for kind, stream in enumerate(streams):
                block = [step.step_s for step in itertools.islice(stream, CALIBRATION_STEPS)]
                seconds[kind] += block[1:]
        self._free()
        distilled, plain = map(statistics.median, seconds)
        return accelerate.utils.broadcast_object_list([distilled / max(plain, 1e-9)])[0]

    def _stream(self, objective, config, num_steps):
        teacher = self.pair.teacher if config.needs_teacher else None
        return train(
            objective, teacher, self.inputs.train, num_steps, config, self.accelerator, self.clock, self.pair.pads
        )

    def _train(self, leg, config):
        """Train one leg from the start weights; yields its records and leaves its scores in `leg`."""
        model = self.pair.student
        checkpoint.put_back(model, self.start_weights)
        torch.manual_seed(config.seed)
        yield from self._told(leg, self._evaluate(leg, 0))
        for step in self._stream(inputs.make_objective(self.pair, config), config, leg.num_steps):
            leg.train_s += step.step_s
            self.step += leg.name == DISTILLED
            last = step.step == leg.last_step
            if step.step % config.log_steps == 0 or last or step.skipped:
                yield from self._told(leg, self._record(self._train_record(leg, step)))
            if step.step % leg.eval_steps == 0 or step.step == leg.compare_step or last:
                yield from self._told(leg, self._evaluate(leg, step.step))
            if 0 < config.early_stopping_patience <= leg.since_best:
                leg.last_step, leg.compare_step = step.step, min(step.step, leg.compare_step)
            if step.step == leg.compare_step:
                leg.at_compare, leg.compare_s = self._best_test_score(leg), leg.train_s
                yield self._test_record(leg, leg.at_compare, step.step)
            if step.step == leg.last_step:
                break
        leg.at_end = leg.at_compare if leg.compare_step == leg.last_step else self._best_test_score(leg)
        if leg.at_end is not leg.at_compare:
            yield self._test_record(leg, leg.at_end, step.step)
        self._free()

    def _told(self, leg, record):
        """The record, and the alerts it raises."""
        yield record
        for alert in leg.watch.see(record):
            yield self._record(alert)

    def _free(self):
        """Let go of a leg's objective and optimizer before the next one's come."""
        self.accelerator.free_memory()
        gc.collect()

    def _evaluate(self, leg, step):
        """The validation record of the weights as they are; keeps them where they are the best so far."""
        started = self.clock.now()
        score = evaluate.evaluate_student(
            self.pair.student, self.pair.head, self.inputs.validation, self.config.loss_chunk_size
        )
        leg.since_best += 1
        if score.bits_per_byte < leg.best:
            leg.best, leg.best_step, leg.since_best = score.bits_per_byte, step, 0
            leg.best_weights = checkpoint.copy_of(self.pair.student)
            if leg.name == DISTILLED and self.writes and step:
                self._save_best(step)
        self.eval_s += self.clock.now() - started
        facts = {"run": leg.name, "repeat": leg.repeat, "split": "validation", "step": step, "elapsed_s": leg.train_s}
        facts["progress"] = step / leg.last_step
        return self._record({"kind": "eval", **facts, **score.summary()})

    def _save_best(self, step):
        folder = self.folder.path / "checkpoints"
        checkpoint.save_student(self.pair.student, self.pair.student_reader.tokenizer, folder / f"step-{step:08d}")
        checkpoint.keep_last(folder, 1)

    def _best_test_score(self, leg):
        now = checkpoint.copy_of(self.pair.student)
        checkpoint.put_back(self.pair.student, leg.best_weights)
        score = self._test(self.pair.student)
        checkpoint.put_back(self.pair.student, now)
        return score

    def _test(self, model):
        return evaluate.evaluate_student(model, self.pair.head, self.inputs.test, self.config.loss_chunk_size)

    def _test_record(self, leg, score, step):
        facts = {"run": leg.name, "repeat": leg.repeat, "split": "test", "step": step, "elapsed_s": leg.train_s}
        return self._record({"kind": "eval", **facts, **score.summary()})

    def _samples(self, legs, chosen):
        """What teacher and students write after the same beginning of a held-out text."""
        own = self.pair.student_reader.tokenizer
        before = evaluate.opening(self.inputs.test, own)
        told = {"teacher": evaluate.continue_text(self.pair.teacher.model, self.pair.teacher.reader.tokenizer, before)}
        students = {"student_before": self.start_weights, "distilled": chosen.best_weights}
        if legs[0][1]:
            students["ce_only"] = legs[chosen.repeat][1].best_weights
        for name, weights in students.items():
            checkpoint.put_back(self.pair.student, weights)
            told[name] = evaluate.continue_text(self.pair.student, own, before)
        return {"opening": before, **told}

    def _train_record(self, leg, step):
        facts = dataclasses.asdict(step)
        seconds = facts.pop("step_s")
        return {
            "kind": "train",
            "run": leg.name,
            "repeat": leg.repeat,
            **facts,
            "last_step": leg.last_step,
            "tokens_per_s": step.num_tokens / max(seconds, 1e-9),
            "elapsed_s": leg.train_s,
            "left_s": self._left(leg, step.step),
            "memory": memory.usage(self.accelerator.device),
        }

    def _left(self, leg, step):
        """Seconds to the end of the run, as far as can be told: a control costs what it is compared with."""
        own = leg.train_s / step * (leg.last_step - step)
        control = {"full": 1.0, "short": SHORT, "off": 0.0}[self.config.control]
        if leg.name == DISTILLED:
            distilled = leg.train_s / step * leg.last_step
            own += control * distilled
        else:
            distilled = leg.train_s / step * leg.last_step / control
        rest = (self.config.repeats - 1 - leg.repeat) * distilled * (1.0 + control)
        trained = self.config.repeats * distilled * (1.0 + control) - own - rest
        return (own + rest) * (1.0 + self.eval_s / max(trained, 1e-9))

    def _record(self, record):
        if self.writes:
            self.folder.records.append(record)
            if record["kind"] == "eval":
                self._status("running", "")
        return record

    def _status(self, state, reason):
        if self.writes:
            total = self.config.max_steps * self.config.repeats
            elapsed = self.clock.now() - self.started
            self.folder.status(
                state, reason=reason, step=self.step, max_steps=total, sessions=1, elapsed_s=round(elapsed, 3)
            )


def _accelerator(amp_dtype):
    """The `Accelerator` of the machine, with the arithmetic that its card really has."""
    cuda = torch.cuda.is_available()
    if amp_dtype == "auto":
        bf16 = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        amp_dtype = "bf16" if bf16 else "fp16" if cuda else "fp32"
    if amp_dtype == "fp16" and not cuda:
        raise ValueError("amp_dtype fp16 needs a CUDA card; use auto or fp32 on a CPU")
    return accelerate.Accelerator(mixed_precision="no" if amp_dtype == "fp32" else amp_dtype)


def _teacher_dtype(accelerator):
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[accelerator.mixed_precision]
