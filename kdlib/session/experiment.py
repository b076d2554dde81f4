"""All arms of a run: training, evaluations and tests, as a generator that can be resumed between records."""

import itertools
import math
import statistics

import accelerate

from kdlib import memory
from kdlib.evaluation import scoring
from kdlib.models import devices, loading
from kdlib.session import alerts, inputs, time_budget
from kdlib.session.arm import CONTROL, DISTILLED, Arm
from kdlib.training import peak_memory
from kdlib.training.loop import TrainLoop

CALIBRATION_BLOCKS, CALIBRATION_STEPS = 6, 3
CALIBRATION_SHARE = 0.05
"""Share of the distilled arm's training time for measuring the step cost of its control; one block is always timed."""


class Experiment:
    """The arms of a run: `arms` so far, test `scores` before training, and the `TrainLoop` in progress (`training`).

    `run()` yields lists of records, each at a point where the state is consistent: there `groups` and `facts` are the
    state that `restore` needs. Durations of all tasks are recorded in `budget`. `read_s`, the seconds of the teacher's
    pass over the text, counts as wall-clock time of the distilled arm.
    """

    def __init__(self, config, loaded, accelerator, clock, budget, scorer, read_s=0.0):
        self.config, self.inputs, self.accelerator, self.clock = config, loaded, accelerator, clock
        self.pair, self.budget, self.scorer, self.read_s = loaded.pair, budget, scorer, read_s
        self.start_weights = loading.cpu_state_dict(self.pair.student)
        self.arms, self.scores, self.training, self.resume_state = [], {}, None, None

    @property
    def step(self):
        """Number of optimizer steps of all arms."""
        return sum(arm.step for arm in self.arms)

    @property
    def num_distilled_steps(self):
        return sum(arm.step for arm in self.arms if arm.name == DISTILLED)

    def summary(self):
        """Returns the size of the run, what was read, the alignment and the current step, for the `start` record."""
        sizes = {"num_windows": len(self.inputs.train), "max_steps": self.config.max_steps}
        return {**sizes, "data": self.inputs.data_lines(), "alignment": self.inputs.alignment, "step": self.step}

    def place(self):
        """Returns run, repeat and step of the current arm, as in records."""
        return {name: value for name, value in self._place_of(self.arms[-1]).items() if name != "elapsed_s"}

    def groups(self):
        """Returns the tensors of a checkpoint, by group. Every process must call it."""
        best = {f"best_{i}": arm.best_weights for i, arm in enumerate(self.arms) if arm.best_weights is not None}
        return best | self.training.state_tensors()

    def facts(self):
        """Returns the JSON state of a checkpoint."""
        return {
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "legs": [arm.to_dict() for arm in self.arms],
            "training": self.training.state_values(),
        }

    def restore(self, groups, facts, records):
        """Restores the state of a checkpoint; `records` are all records of the run until then."""
        self.scores = {name: scoring.Score.from_dict(score) for name, score in facts["scores"].items()}
        for index, values in enumerate(facts["legs"]):
            monitor = self._monitor(values["name"])
            self.arms.append(Arm.from_dict(values, groups.get(f"best_{index}"), records, monitor))
            if self.config.gradient_checkpointing != "auto":  # the setting overrides an earlier decision
                self.arms[-1].gradient_checkpointing = None
        if not self.arms[-1].done:
            self.resume_state = groups, facts["training"]

    def run(self):
        """Yields lists of records until all arms are done."""
        if not self.scores:
            yield self._score_before_training()
        for index, (name, repeat) in enumerate(self._arm_order()):
            if index == len(self.arms):
                self.arms.append(self._new_arm(name, repeat))
            if not self.arms[index].done:
                yield from self._train(self.arms[index])
                self._drop_weights()

    def pairs(self):
        """Returns `(distilled, control or None)` of every finished repeat."""
        size = 1 if self.config.control == "off" else 2
        pairs = [self.arms[i : i + size] for i in range(0, len(self.arms) // size * size, size)]
        return [(pair[0], pair[1] if size == 2 else None) for pair in pairs if all(arm.done for arm in pair)]

    def _arm_order(self):
        names = (DISTILLED,) if self.config.control == "off" else (DISTILLED, CONTROL)
        return [(name, repeat) for repeat in range(self.config.repeats) for name in names]

    def _monitor(self, name):
        """Returns the monitor of an arm, which compares a student with its teacher."""
        teaches = name == DISTILLED and self.config.needs_teacher
        return alerts.AlertMonitor(
            None, self.scorer.teacher_score("validation").bits_per_byte if teaches else -math.inf
        )

    def _score_before_training(self):
        validation = self.scorer.teacher_score("validation")
        self.scores = {
            "teacher": self.scorer.teacher_score("test"),
            "student_before": self.scorer.score_student("test"),
        }
        fields = {"kind": "eval", "repeat": 0, "step": 0, "elapsed_s": 0.0}
        records = [{**fields, "run": "teacher", "split": "validation", **validation.summary()}]
        for name, score in self.scores.items():
            records.append({**fields, "run": name, "split": "test", **score.summary()})
        return records

    def _new_arm(self, name, repeat):
        steps = self.config.max_steps
        compare = steps
        if self.config.control == "short":
            compare = max(1, round(time_budget.SHORT_CONTROL_FRACTION * steps))
        if name == CONTROL:  # as many steps as fit into the wall-clock time of the distilled arm
            distilled, ratio = self.arms[-1], self._step_cost_ratio()
            compare = max(1, round(distilled.compare_step * ratio))
            return Arm(name, repeat, max(1, round(steps * ratio)), compare, compare, monitor=self._monitor(name))
        return Arm(name, repeat, steps, steps, compare, monitor=self._monitor(name))

    def _step_cost_ratio(self):
        """Returns the time of a distilled step over the time of a control step, as a ratio of medians.

        Short blocks of both kinds alternate, so that a drift of the machine's speed affects both. The first step of
        each block is a warm-up. With a curriculum all loss terms are on, so the control gets slightly too much time. No
        new block starts after CALIBRATION_SHARE of the distilled arm's training time.

        The steps train the pair's own student with one optimizer at a time, so peak memory is that of training. Its
        start weights are loaded afterwards.
        """
        started, step_times, distilled = self.clock.now(), [[], []], self.arms[-1]
        checkpointing = [
            distilled.gradient_checkpointing,
            distilled.gradient_checkpointing and None,  # None: the control may fit without it
        ]
        configs = [self.config.replace(use_curriculum=False), self.config.control_config()]
        objectives = [inputs.make_objective(self.pair, config) for config in configs]
        for block in range(CALIBRATION_BLOCKS):
            spent = self.clock.now() - started
            if self._any_process(block and spent * (block + 1) / block > CALIBRATION_SHARE * distilled.train_s):
                break
            for kind, (objective, config) in enumerate(zip(objectives, configs, strict=True)):
                self.scorer.on_progress("timing steps for the control, blocks", block, CALIBRATION_BLOCKS)
                inputs.watch_attention(self.pair, config)
                training = self._training(objective, config, 10**6)
                training.step = block * CALIBRATION_STEPS
                if distilled.gradient_checkpointing and checkpointing[kind] is None:
                    self._make_fit(training)
                    checkpointing[kind] = training.gradient_checkpointing
                training.gradient_checkpointing = training.gradient_checkpointing or bool(checkpointing[kind])
                step_times[kind] += [step.step_s for step in itertools.islice(training, CALIBRATION_STEPS)][1:]
                # else the next block would wrap the wrapped model
                self.accelerator.unwrap_model(training.prepared, keep_fp32_wrapper=False)
                training = None
                self.accelerator.free_memory()
        loading.load_cpu_state_dict(self.pair.student, self.start_weights)
        distilled_s, control_s = map(statistics.median, step_times)
        ratio = (distilled_s + self._read_s_per_step(distilled)) / max(control_s, 1e-9)
        return accelerate.utils.broadcast_object_list([ratio])[0]

    def _any_process(self, flag):
        return devices.any_process(self.accelerator, (bool(flag),))[0]

    def _training(self, objective, config, num_steps):
        teacher = self.pair.teacher if config.needs_teacher else None
        return TrainLoop(
            objective, teacher, self.inputs.train, num_steps, config, self.accelerator, self.clock, self.pair.pads,
            self.pair.max_row_width,
        )  # fmt: skip

    def _train(self, arm):
        """Trains one arm from its current step to its last one."""
        config = self.config if arm.name == DISTILLED else self.config.control_config()
        config = config.replace(seed=self.config.seed + arm.repeat)
        if arm.step == 0:
            arm.monitor.micro_batch = config.batch_size
        loading.load_cpu_state_dict(self.pair.student, self.start_weights)
        accelerate.utils.set_seed(config.seed)
        if config.needs_teacher:  # takes 20 s for vocabularies of 150,000 tokens
            self.scorer.on_progress("matching the vocabularies", 0, 0)
        training = self._training(inputs.make_objective(self.pair, config), config, arm.num_steps)
        if self.resume_state:
            training.load_state(*self.resume_state)
        self.training, self.resume_state = training, None
        yield self._predict_memory(arm)
        yield from self._evaluate_if_due(arm)
        if arm.step < arm.last_step:
            for step in training:
                arm.step = step.step
                arm.train_s += step.step_s
                arm.num_tokens += step.num_tokens
                self.budget.record("step", step.step_s)
                is_logged = step.step % config.log_steps == 0 or arm.step == arm.last_step or step.skipped
                yield self._with_alerts(arm, self._train_record(arm, step)) if is_logged else []
                yield from self._evaluate_if_due(arm)
                if arm.step == arm.last_step:
                    break

    def _predict_memory(self, arm):
        """Predicts peak memory, decides on gradient checkpointing under `auto`, and returns the alerts of a new arm."""
        if arm.step and arm.predicted_bytes:  # an earlier session predicted it
            self.training.gradient_checkpointing |= bool(arm.gradient_checkpointing)
            return []
        predicted = self._make_fit(self.training, arm.gradient_checkpointing)
        arm.predicted_bytes = predicted if math.isfinite(predicted) else None
        if self.config.gradient_checkpointing == "auto":
            arm.gradient_checkpointing = self.training.gradient_checkpointing
        total = memory.usage(self.accelerator.device)["total_bytes"]
        if arm.step:
            return []
        predicted_gib, total_gib = (f"{size / 2**30:.1f} GiB" for size in (predicted, total))
        if predicted > total:
            peak = f"predicted peak {predicted_gib}" if arm.predicted_bytes else "the predicted peak"
            meaning = f"{peak} exceeds the {total_gib} of memory available"
            advice = (
                "the batch is halved when memory runs out, and nothing is lost; or lower batch_size or max_length now"
            )
        elif arm.gradient_checkpointing:
            meaning = f"gradient checkpointing is on: predicted peak {predicted_gib} of {total_gib} of memory"
            advice = (
                "the result is the same, a step takes about a third longer; a smaller batch_size with more "
                "grad_accumulation may be faster, with gradient_checkpointing off"
            )
        else:
            return []
        return [{"kind": "alert", **self.place(), "sign": "memory", "part": None, "meaning": meaning, "advice": advice}]

    def _make_fit(self, training, decision=None):
        """Returns the predicted peak in bytes. Under `auto` applies `decision`, or else that of the first process."""
        if self.config.gradient_checkpointing != "auto" or decision is not None:
            training.gradient_checkpointing = training.gradient_checkpointing or bool(decision)
            return peak_memory.predicted_bytes(training, self.scorer.on_progress)
        total = memory.usage(self.accelerator.device)["total_bytes"]
        predicted = peak_memory.fit(training, total, self.scorer.on_progress)
        training.gradient_checkpointing = accelerate.utils.broadcast_object_list([training.gradient_checkpointing])[0]
        return predicted

    def _evaluate_if_due(self, arm):
        """Runs the evaluation, early stopping and tests due at the current step, unless already done."""
        if arm.evaluated < arm.step and self.evaluation_due(arm, arm.step):
            yield self.evaluate(arm)
        if 0 < self.config.early_stopping_patience <= arm.since_best and arm.step:
            arm.last_step, arm.compare_step = arm.step, min(arm.step, arm.compare_step)
        if arm.step >= arm.compare_step and arm.at_compare is None:
            arm.at_compare, arm.compare_s = self._test(arm), self._wall_clock(arm)
            yield [self._test_record(arm, arm.at_compare)]
        if arm.step >= arm.last_step and arm.at_end is None:
            arm.at_end = arm.at_compare if arm.compare_step == arm.last_step else self._test(arm)
            yield [] if arm.at_end is arm.at_compare else [self._test_record(arm, arm.at_end)]

    def evaluations_done(self, arm):
        """Returns whether all evaluations and tests due at the current step are done."""
        tested = (arm.step < arm.compare_step or arm.at_compare) and (arm.step < arm.last_step or arm.done)
        return bool(tested) and (arm.evaluated == arm.step or not self.evaluation_due(arm, arm.step))

    def evaluation_due(self, arm, step):
        """Returns whether `step` has an evaluation. The control has as many as the distilled arm."""
        interval = max(1, round(self.eval_steps * arm.num_steps / self.config.max_steps))
        return step % interval == 0 or step in (arm.compare_step, arm.last_step)

    @property
    def eval_steps(self):
        return time_budget.eval_steps(self.config)

    def evaluate(self, arm):
        """Returns validation records of the current weights and of their average, and keeps the best weights so far."""
        scored = self._score_validation(arm)
        arm.evaluated = arm.step
        arm.since_best += 1
        records = []
        for model, record in scored:
            if arm.best_weights is None or math.isnan(arm.best) or record["bits_per_byte"] < arm.best:
                arm.best, arm.best_step, arm.since_best = record["bits_per_byte"], arm.step, 0
                arm.best_averaged, arm.best_weights = record["averaged"], loading.cpu_state_dict(model)
            records += [record] if record["averaged"] else self._with_alerts(arm, record)
        return records

    def _score_validation(self, arm):
        """Returns `[(model, record)]` of the current weights and of their average."""
        models = [self.pair.student]
        if self.training.average and arm.step:
            models.append(self.training.average.module)
        scored = []
        for model in models:
            score = self.scorer.score_student("validation", model)
            fields = {"split": "validation", "averaged": bool(scored), "progress": arm.step / arm.last_step}
            scored.append((model, {"kind": "eval", **self._place_of(arm), **fields, **score.summary()}))
        return scored

    def _test(self, arm):
        return self.scorer.score_student_with(arm.best_weights, "test")

    def _test_record(self, arm, score):
        fields = {"split": "test", "averaged": arm.best_averaged}
        return {"kind": "eval", **self._place_of(arm), **fields, **score.summary()}

    def _with_alerts(self, arm, record):
        return [record, *arm.monitor.update(record)]

    def _place_of(self, arm):
        return {"run": arm.name, "repeat": arm.repeat, "step": arm.step, "elapsed_s": self._wall_clock(arm)}

    def _wall_clock(self, arm):
        """Returns the seconds of an arm's steps so far, each with its share of the teacher's pass over the text."""
        return arm.train_s + arm.step * self._read_s_per_step(arm)

    def _read_s_per_step(self, arm):
        return self.read_s / arm.last_step if arm.name == DISTILLED else 0.0

    def _train_record(self, arm, step):
        fields = {name: value for name, value in vars(step).items() if name not in ("step", "step_s")}
        return {
            "kind": "train",
            **self._place_of(arm),
            **fields,
            "last_step": arm.last_step,
            "tokens_per_s": step.num_tokens / max(step.step_s, 1e-9),
            "left_s": self.seconds_left(arm),
            "memory": {**memory.usage(self.accelerator.device), "predicted_bytes": arm.predicted_bytes},
        }

    def seconds_left(self, arm, saving_share=0.0):
        """Returns the seconds to the end of the run, extrapolated from this arm (`time_budget.seconds_left`)."""
        return time_budget.seconds_left(self.config, self.eval_steps, arm, self.budget.expected, saving_share)

    def make_plan(self, num_sessions, saving_share):
        """Returns the plan (`time_budget.make_plan`) as of session `num_sessions`."""
        arm = self.arms[-1]
        steps = arm.last_step - arm.step + (self.config.repeats - 1 - arm.repeat) * self.config.max_steps
        tokens = round(steps * arm.num_tokens / arm.step)
        steps_per_s = arm.step / max(arm.train_s, 1e-9)
        left_s = self.seconds_left(arm, saving_share)
        return time_budget.make_plan(left_s, self.budget, num_sessions, steps_per_s, tokens)

    def _drop_weights(self):
        """Frees the finished training, and the weights of all repeats except the best."""
        self.training = None
        self.accelerator.free_memory()
        pairs = self.pairs()
        best = min((distilled for distilled, _ in pairs), key=lambda arm: arm.best, default=None)
        for pair in pairs:
            for arm in pair if pair[0] is not best else ():
                if arm:
                    arm.best_weights = None
