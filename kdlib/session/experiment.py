"""Every student of a run in its turn: evaluations, training, tests. Left at any of its pauses, it can be gone on with."""

import itertools
import math
import statistics

import accelerate

from kdlib import memory
from kdlib.evaluation import scoring
from kdlib.models import devices, loading
from kdlib.session import inputs, plan
from kdlib.session.arm import CONTROL, DISTILLED, Arm
from kdlib.training import peak_memory
from kdlib.training.loop import TrainLoop

CALIBRATION_BLOCKS, CALIBRATION_STEPS = 6, 3
CALIBRATION_SHARE = 0.05
"""Of the distilled student's training time, what timing steps for its control may take; one block is always timed."""


class Experiment:
    """The students of a run: `arms` so far, test `scores` before training, the `training` under way.

    `run()` is a generator of lists of records, each at a point where nothing is half-done: there `groups` and `facts` are
    all that another `Experiment` needs to `restore`. `scorer` is a `arm.Scorer`, `budget` is told what everything takes;
    `read_s`: seconds in which the teacher read for the whole plan. They are part of the distilled student's wall-clock.
    """

    def __init__(self, config, loaded, accelerator, clock, budget, scorer, read_s=0.0):
        self.config, self.inputs, self.accelerator, self.clock = config, loaded, accelerator, clock
        self.pair, self.budget, self.scorer, self.read_s = loaded.pair, budget, scorer, read_s
        self.start_weights = loading.cpu_state_dict(self.pair.student)
        self.arms, self.scores, self.training, self.left_off = [], {}, None, None

    @property
    def step(self):
        """Optimizer steps taken by all students."""
        return sum(arm.step for arm in self.arms)

    @property
    def num_distilled(self):
        """Those of the distilled ones."""
        return sum(arm.step for arm in self.arms if arm.name == DISTILLED)

    def summary(self):
        """What there is to do, and where it is."""
        plan_of = {"num_windows": len(self.inputs.train), "max_steps": self.config.max_steps}
        return {**plan_of, "alignment": self.inputs.alignment, "step": self.step}

    def place(self):
        """Where it is, as records say it."""
        return {name: value for name, value in self._at(self.arms[-1]).items() if name != "elapsed_s"}

    def groups(self):
        """Tensors to keep, in groups. Every process must ask."""
        best = {f"best_{i}": arm.best_weights for i, arm in enumerate(self.arms) if arm.best_weights is not None}
        return best | self.training.tensors()

    def facts(self):
        """The same, of what is no tensor."""
        return {
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "legs": [arm.facts() for arm in self.arms],
            "training": self.training.facts(),
        }

    def restore(self, groups, facts, records):
        """Be where another course was; `records` are all of the run until then."""
        self.scores = {name: scoring.Score.from_dict(score) for name, score in facts["scores"].items()}
        for place, known in enumerate(facts["legs"]):
            self.arms.append(Arm.from_facts(known, groups.get(f"best_{place}"), records))
            if self.config.gradient_checkpointing != "auto":  # then what it once decided is no matter
                self.arms[-1].gradient_checkpointing = None
        if not self.arms[-1].done:
            self.left_off = groups, facts["training"]

    def run(self):
        """Whatever is still to be done before the verdict."""
        if not self.scores:
            yield self._before()
        for place, (name, repeat) in enumerate(self._order()):
            if place == len(self.arms):
                self.arms.append(self._new_arm(name, repeat))
            if not self.arms[place].done:
                yield from self._train(self.arms[place])
                self._drop_weights()

    def pairs(self):
        """`(distilled, control or None)` of every repeat that is over."""
        size = 1 if self.config.control == "off" else 2
        done = [self.arms[i : i + size] for i in range(0, len(self.arms) // size * size, size)]
        return [(pair[0], pair[1] if size == 2 else None) for pair in done if all(arm.done for arm in pair)]

    def _order(self):
        names = (DISTILLED,) if self.config.control == "off" else (DISTILLED, CONTROL)
        return [(name, repeat) for repeat in range(self.config.repeats) for name in names]

    def _before(self):
        """What teacher and student know before training."""
        known = self.scorer.teacher("validation")
        scores = {
            "teacher": self.scorer.teacher("test"),
            "student_before": self.scorer.student("test"),
        }
        self.scores = scores
        at = {"kind": "eval", "repeat": 0, "step": 0, "elapsed_s": 0.0}
        found = [{**at, "run": "teacher", "split": "validation", **known.summary()}]
        return found + [{**at, "run": name, "split": "test", **score.summary()} for name, score in scores.items()]

    def _new_arm(self, name, repeat):
        steps = self.config.max_steps
        compare = steps if self.config.control != "short" else max(1, round(plan.SHORT * steps))
        if name == CONTROL:  # as many plain steps as fit into the same wall-clock, by a paired measurement
            distilled, ratio = self.arms[-1], self._step_cost_ratio()
            compare = max(1, round(distilled.compare_step * ratio))
            return Arm(name, repeat, max(1, round(steps * ratio)), compare, compare)
        return Arm(name, repeat, steps, steps, compare)

    def _step_cost_ratio(self):
        """Seconds of a distilled step over seconds of a plain one, by short blocks of both kinds in turn, so that a machine
        whose speed drifts favours neither; the first step of a block, which finds the other kind's caches, does not count.
        The ratio of the medians. With a curriculum all parts are on: the control rather gets a little more time than it is
        due. No more blocks are begun once they took CALIBRATION_SHARE of the distilled student's own training.

        The pair's own student takes these steps, with one optimizer at a time: no more memory than training takes. Its
        weights are set back afterwards.
        """
        begun, seconds, distilled = self.clock.now(), [[], []], self.arms[-1]
        gradient_checkpointing = [
            distilled.gradient_checkpointing,
            distilled.gradient_checkpointing and None,
        ]  # the control may fit without
        kinds = [self.config.replace(use_curriculum=False), self.config.plain()]
        objectives = [inputs.make_objective(self.pair, config) for config in kinds]
        for block in range(CALIBRATION_BLOCKS):
            spent = self.clock.now() - begun
            if self._any_process(block and spent * (block + 1) / block > CALIBRATION_SHARE * distilled.train_s):
                break
            for kind, (objective, config) in enumerate(zip(objectives, kinds, strict=True)):
                self.scorer.on_progress("timing steps for the control, blocks", block, CALIBRATION_BLOCKS)
                inputs.watch_attention(self.pair, config)
                training = self._training(objective, config, 10**6)
                training.step = block * CALIBRATION_STEPS
                if distilled.gradient_checkpointing and gradient_checkpointing[kind] is None:
                    self._make_fit(training)
                    gradient_checkpointing[kind] = training.gradient_checkpointing
                training.gradient_checkpointing = training.gradient_checkpointing or bool(gradient_checkpointing[kind])
                seconds[kind] += [step.step_s for step in itertools.islice(training, CALIBRATION_STEPS)][1:]
                self.accelerator.unwrap_model(
                    training.prepared, keep_fp32_wrapper=False
                )  # else it is wrapped again and again
                training = None
                self._free()
        loading.load_cpu_state_dict(self.pair.student, self.start_weights)
        distilled_s, plain_s = map(statistics.median, seconds)
        ratio = (distilled_s + self._read_s(distilled)) / max(plain_s, 1e-9)
        return accelerate.utils.broadcast_object_list([ratio])[0]

    def _any_process(self, flag):
        return devices.any_process(self.accelerator, (bool(flag),))[0]

    def _training(self, objective, config, num_steps):
        teacher = self.pair.teacher if config.needs_teacher else None
        return TrainLoop(
            objective, teacher, self.inputs.train, num_steps, config, self.accelerator, self.clock, self.pair.pads,
            self.pair.widest,
        )  # fmt: skip

    def _train(self, arm):
        """Train one leg from where it is to its last step."""
        config = (self.config if arm.name == DISTILLED else self.config.plain()).replace(
            seed=self.config.seed + arm.repeat
        )
        arm.watch.micro_batch = config.batch_size if arm.step == 0 else arm.watch.micro_batch
        loading.load_cpu_state_dict(self.pair.student, self.start_weights)
        accelerate.utils.set_seed(config.seed)
        training = self._training(inputs.make_objective(self.pair, config), config, arm.num_steps)
        if self.left_off:
            training.restore(*self.left_off)
        self.training, self.left_off = training, None
        yield self._room(arm)
        yield from self._duties(arm)
        if arm.step < arm.last_step:
            for step in training:
                arm.step = step.step
                arm.train_s += step.step_s
                arm.num_tokens += step.num_tokens
                self.budget.record("step", step.step_s)
                told = step.step % config.log_steps == 0 or arm.step == arm.last_step or step.skipped
                yield self._watched(arm, self._train_record(arm, step)) if told else []
                yield from self._duties(arm)
                if arm.step == arm.last_step:
                    break

    def _room(self, arm):
        """Predict the memory that training will take, and make it fit where that was left open; the alerts of a leg that
        begins.
        """
        if arm.step and arm.predicted_bytes:  # an earlier session predicted it
            self.training.gradient_checkpointing = self.training.gradient_checkpointing or bool(
                arm.gradient_checkpointing
            )
            return []
        predicted = self._make_fit(self.training, arm.gradient_checkpointing)
        arm.predicted_bytes = predicted if math.isfinite(predicted) else None
        if self.config.gradient_checkpointing == "auto":
            arm.gradient_checkpointing = self.training.gradient_checkpointing
        total = memory.usage(self.accelerator.device)["total_bytes"]
        wanted, there = (f"{size / 2**30:.1f} GiB" for size in (predicted, total))
        wanted = f"about {wanted}" if arm.predicted_bytes else "more than that"
        if arm.step:
            return []
        if predicted > total:
            told = (
                f"there are {there} of memory, and training will take {wanted}",
                "nothing is lost: the batch is halved when memory runs out. Or lower batch_size or max_length now",
            )
        elif arm.gradient_checkpointing:
            told = (
                f"training takes {wanted} of {there} of memory because layers are made anew in the backward pass",
                "the result is the same, a step takes about a third longer; a smaller batch_size with more "
                "grad_accumulation may be faster, with gradient_checkpointing off",
            )
        else:
            return []
        return [
            {"kind": "alert", **self.place(), "sign": "memory", "part": None, "meaning": told[0], "advice": told[1]}
        ]

    def _make_fit(self, training, gradient_checkpointing=None):
        """The predicted bytes of a training; under `gradient_checkpointing auto` it recomputes as was decided before, or as
        the first process decides now.
        """
        if self.config.gradient_checkpointing != "auto" or gradient_checkpointing is not None:
            training.gradient_checkpointing = training.gradient_checkpointing or bool(gradient_checkpointing)
            return peak_memory.predicted_bytes(training, self.scorer.on_progress)
        total = memory.usage(self.accelerator.device)["total_bytes"]
        predicted = peak_memory.fit(training, total, self.scorer.on_progress)
        training.gradient_checkpointing = accelerate.utils.broadcast_object_list([training.gradient_checkpointing])[0]
        return predicted

    def _duties(self, arm):
        """What is due at the step where a leg is, and was not done yet: evaluation, early end, tests."""
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
        """Whether all that is due at the step where a leg is was done."""
        tested = (arm.step < arm.compare_step or arm.at_compare) and (arm.step < arm.last_step or arm.done)
        return bool(tested) and (arm.evaluated == arm.step or not self.evaluation_due(arm, arm.step))

    def evaluation_due(self, arm, step):
        """Whether a leg is to be scored at this step. The control is scored as often as its student, over its own steps."""
        every = max(1, round(self.eval_steps * arm.num_steps / self.config.max_steps))
        return step % every == 0 or step in (arm.compare_step, arm.last_step)

    @property
    def eval_steps(self):
        return plan.eval_steps(self.config)

    def evaluate(self, arm):
        """Validation records of the weights as they are, and of their average; the better ones are kept where they are the
        best so far.
        """
        scored = self._scored(arm)
        arm.evaluated = arm.step
        arm.since_best += 1
        found = []
        for model, record in scored:
            if arm.best_weights is None or math.isnan(arm.best) or record["bits_per_byte"] < arm.best:
                arm.best, arm.best_step, arm.since_best = record["bits_per_byte"], arm.step, 0
                arm.best_averaged, arm.best_weights = record["averaged"], loading.cpu_state_dict(model)
            found += [record] if record["averaged"] else self._watched(arm, record)
        return found

    def look(self, arm):
        """The records of `evaluate` and none of its consequences: nothing that the run decides depends on them."""
        return [{**record, "asked": True} for _, record in self._scored(arm)]

    def _scored(self, arm):
        """`(model, its validation record)` of the weights as they are, and of their average."""
        candidates = [self.pair.student]
        if self.training.average and arm.step:
            candidates.append(self.training.average.module)
        scored = []
        for model in candidates:
            score = self.scorer.student("validation", model)
            facts = {"split": "validation", "averaged": bool(scored), "progress": arm.step / arm.last_step}
            scored.append((model, {"kind": "eval", **self._at(arm), **facts, **score.summary()}))
        return scored

    def _test(self, arm):
        return self.scorer.student_with(arm.best_weights, "test")

    def _test_record(self, arm, score):
        return {"kind": "eval", **self._at(arm), "split": "test", "averaged": arm.best_averaged, **score.summary()}

    def _watched(self, arm, record):
        """The record, and the alerts it raises."""
        return [record, *arm.watch.see(record)]

    def _at(self, arm):
        return {"run": arm.name, "repeat": arm.repeat, "step": arm.step, "elapsed_s": self._wall_clock(arm)}

    def _wall_clock(self, arm):
        """Seconds that a leg's steps took so far, each with its share of the teacher's reading."""
        return arm.train_s + arm.step * self._read_s(arm)

    def _read_s(self, arm):
        return self.read_s / arm.last_step if arm.name == DISTILLED else 0.0

    def _train_record(self, arm, step):
        facts = {name: value for name, value in vars(step).items() if name not in ("step", "step_s")}
        return {
            "kind": "train",
            **self._at(arm),
            **facts,
            "last_step": arm.last_step,
            "tokens_per_s": step.num_tokens / max(step.step_s, 1e-9),
            "left_s": self.seconds_left(arm),
            "memory": {**memory.usage(self.accelerator.device), "predicted_bytes": arm.predicted_bytes},
        }

    def seconds_left(self, arm, saving=0.0):
        """Seconds to the end of the run, as far as this leg tells; `saving`: the share of the time that checkpoints take."""
        return plan.seconds_left(self.config, self.eval_steps, arm, self.budget.expected, saving)

    def outlook(self, num_sessions, saving):
        """The plan (`plan.outlook`) as it looks from session `num_sessions`."""
        arm = self.arms[-1]
        steps = arm.last_step - arm.step + (self.config.repeats - 1 - arm.repeat) * self.config.max_steps
        tokens = round(steps * arm.num_tokens / arm.step)
        speed = arm.step / max(arm.train_s, 1e-9)
        return plan.outlook(self.seconds_left(arm, saving), self.budget, num_sessions, speed, tokens)

    def _drop_weights(self):
        """Let go of the training that is over, and of weights that no verdict will ask for."""
        self.training = None
        self._free()
        pairs = self.pairs()
        chosen = min((distilled for distilled, _ in pairs), key=lambda arm: arm.best, default=None)
        for pair in pairs:
            for arm in pair if pair[0] is not chosen else ():
                if arm:
                    arm.best_weights = None

    def _free(self):
        self.accelerator.free_memory()
