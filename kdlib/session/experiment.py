"""Every student of a run in its turn: evaluations, training, tests. Left at any of its pauses, it can be gone on with."""

import itertools
import math
import statistics

import accelerate

from kdlib import memory
from kdlib.evaluation import scoring
from kdlib.models import devices, loading
from kdlib.session import inputs, plan
from kdlib.session.arm import CONTROL, DISTILLED, Leg
from kdlib.training import peak_memory
from kdlib.training.loop import Training

CALIBRATION_BLOCKS, CALIBRATION_STEPS = 6, 3
CALIBRATION_SHARE = 0.05
"""Of the distilled student's training time, what timing steps for its control may take; one block is always timed."""


class Course:
    """The students of a run: `legs` so far, test `scores` before training, the `training` under way.

    `run()` is a generator of lists of records, each at a point where nothing is half-done: there `groups` and `facts` are
    all that another `Course` needs to `restore`. `scorer` is a `arm.Scorer`, `budget` is told what everything takes;
    `read_s`: seconds in which the teacher read for the whole plan. They are part of the distilled student's wall-clock.
    """

    def __init__(self, config, loaded, accelerator, clock, budget, scorer, read_s=0.0):
        self.config, self.inputs, self.accelerator, self.clock = config, loaded, accelerator, clock
        self.pair, self.budget, self.scorer, self.read_s = loaded.pair, budget, scorer, read_s
        self.start_weights = loading.copy_of(self.pair.student)
        self.legs, self.scores, self.training, self.left_off = [], {}, None, None

    @property
    def step(self):
        """Optimizer steps taken by all students."""
        return sum(leg.step for leg in self.legs)

    @property
    def num_distilled(self):
        """Those of the distilled ones."""
        return sum(leg.step for leg in self.legs if leg.name == DISTILLED)

    def summary(self):
        """What there is to do, and where it is."""
        plan_of = {"num_windows": len(self.inputs.train), "max_steps": self.config.max_steps}
        return {**plan_of, "alignment": self.inputs.alignment, "step": self.step}

    def place(self):
        """Where it is, as records say it."""
        return {name: value for name, value in self._at(self.legs[-1]).items() if name != "elapsed_s"}

    def groups(self):
        """Tensors to keep, in groups. Every process must ask."""
        best = {f"best_{i}": leg.best_weights for i, leg in enumerate(self.legs) if leg.best_weights is not None}
        return best | self.training.tensors()

    def facts(self):
        """The same, of what is no tensor."""
        return {
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "legs": [leg.facts() for leg in self.legs],
            "training": self.training.facts(),
        }

    def restore(self, groups, facts, records):
        """Be where another course was; `records` are all of the run until then."""
        self.scores = {name: scoring.Score.from_dict(score) for name, score in facts["scores"].items()}
        for place, known in enumerate(facts["legs"]):
            self.legs.append(Leg.from_facts(known, groups.get(f"best_{place}"), records))
            if self.config.gradient_checkpointing != "auto":  # then what it once decided is no matter
                self.legs[-1].recomputes = None
        if not self.legs[-1].done:
            self.left_off = groups, facts["training"]

    def run(self):
        """Whatever is still to be done before the verdict."""
        if not self.scores:
            yield self._before()
        for place, (name, repeat) in enumerate(self._order()):
            if place == len(self.legs):
                self.legs.append(self._new_leg(name, repeat))
            if not self.legs[place].done:
                yield from self._train(self.legs[place])
                self._drop_weights()

    def pairs(self):
        """`(distilled, control or None)` of every repeat that is over."""
        size = 1 if self.config.control == "off" else 2
        done = [self.legs[i : i + size] for i in range(0, len(self.legs) // size * size, size)]
        return [(pair[0], pair[1] if size == 2 else None) for pair in done if all(leg.done for leg in pair)]

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

    def _new_leg(self, name, repeat):
        steps = self.config.max_steps
        compare = steps if self.config.control != "short" else max(1, round(plan.SHORT * steps))
        if name == CONTROL:  # as many plain steps as fit into the same wall-clock, by a paired measurement
            distilled, ratio = self.legs[-1], self._step_cost_ratio()
            compare = max(1, round(distilled.compare_step * ratio))
            return Leg(name, repeat, max(1, round(steps * ratio)), compare, compare)
        return Leg(name, repeat, steps, steps, compare)

    def _step_cost_ratio(self):
        """Seconds of a distilled step over seconds of a plain one, by short blocks of both kinds in turn, so that a machine
        whose speed drifts favours neither; the first step of a block, which finds the other kind's caches, does not count.
        The ratio of the medians. With a curriculum all parts are on: the control rather gets a little more time than it is
        due. No more blocks are begun once they took CALIBRATION_SHARE of the distilled student's own training.

        The pair's own student takes these steps, with one optimizer at a time: no more memory than training takes. Its
        weights are set back afterwards.
        """
        begun, seconds, distilled = self.clock.now(), [[], []], self.legs[-1]
        recomputes = [distilled.recomputes, distilled.recomputes and None]  # the control may fit without
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
                if distilled.recomputes and recomputes[kind] is None:
                    self._make_fit(training)
                    recomputes[kind] = training.recomputes
                training.recomputes = training.recomputes or bool(recomputes[kind])
                seconds[kind] += [step.step_s for step in itertools.islice(training, CALIBRATION_STEPS)][1:]
                self.accelerator.unwrap_model(
                    training.prepared, keep_fp32_wrapper=False
                )  # else it is wrapped again and again
                training = None
                self._free()
        loading.put_back(self.pair.student, self.start_weights)
        distilled_s, plain_s = map(statistics.median, seconds)
        ratio = (distilled_s + self._read_s(distilled)) / max(plain_s, 1e-9)
        return accelerate.utils.broadcast_object_list([ratio])[0]

    def _any_process(self, flag):
        return devices.agreed(self.accelerator, (bool(flag),))[0]

    def _training(self, objective, config, num_steps):
        teacher = self.pair.teacher if config.needs_teacher else None
        return Training(
            objective, teacher, self.inputs.train, num_steps, config, self.accelerator, self.clock, self.pair.pads,
            self.pair.widest,
        )  # fmt: skip

    def _train(self, leg):
        """Train one leg from where it is to its last step."""
        config = (self.config if leg.name == DISTILLED else self.config.plain()).replace(
            seed=self.config.seed + leg.repeat
        )
        leg.watch.micro_batch = config.batch_size if leg.step == 0 else leg.watch.micro_batch
        loading.put_back(self.pair.student, self.start_weights)
        accelerate.utils.set_seed(config.seed)
        training = self._training(inputs.make_objective(self.pair, config), config, leg.num_steps)
        if self.left_off:
            training.restore(*self.left_off)
        self.training, self.left_off = training, None
        yield self._room(leg)
        yield from self._duties(leg)
        if leg.step < leg.last_step:
            for step in training:
                leg.step = step.step
                leg.train_s += step.step_s
                leg.num_tokens += step.num_tokens
                self.budget.took("step", step.step_s)
                told = step.step % config.log_steps == 0 or leg.step == leg.last_step or step.skipped
                yield self._watched(leg, self._train_record(leg, step)) if told else []
                yield from self._duties(leg)
                if leg.step == leg.last_step:
                    break

    def _room(self, leg):
        """Predict the memory that training will take, and make it fit where that was left open; the alerts of a leg that
        begins.
        """
        if leg.step and leg.predicted_bytes:  # an earlier session predicted it
            self.training.recomputes = self.training.recomputes or bool(leg.recomputes)
            return []
        predicted = self._make_fit(self.training, leg.recomputes)
        leg.predicted_bytes = predicted if math.isfinite(predicted) else None
        if self.config.gradient_checkpointing == "auto":
            leg.recomputes = self.training.recomputes
        total = memory.usage(self.accelerator.device)["total_bytes"]
        wanted, there = (f"{size / 2**30:.1f} GiB" for size in (predicted, total))
        wanted = f"about {wanted}" if leg.predicted_bytes else "more than that"
        if leg.step:
            return []
        if predicted > total:
            told = (
                f"there are {there} of memory, and training will take {wanted}",
                "nothing is lost: the batch is halved when memory runs out. Or lower batch_size or max_length now",
            )
        elif leg.recomputes:
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

    def _make_fit(self, training, recomputes=None):
        """The predicted bytes of a training; under `gradient_checkpointing auto` it recomputes as was decided before, or as
        the first process decides now.
        """
        if self.config.gradient_checkpointing != "auto" or recomputes is not None:
            training.recomputes = training.recomputes or bool(recomputes)
            return peak_memory.predicted_bytes(training, self.scorer.on_progress)
        total = memory.usage(self.accelerator.device)["total_bytes"]
        predicted = peak_memory.fit(training, total, self.scorer.on_progress)
        training.recomputes = accelerate.utils.broadcast_object_list([training.recomputes])[0]
        return predicted

    def _duties(self, leg):
        """What is due at the step where a leg is, and was not done yet: evaluation, early end, tests."""
        if leg.evaluated < leg.step and self.evaluation_due(leg, leg.step):
            yield self.evaluate(leg)
        if 0 < self.config.early_stopping_patience <= leg.since_best and leg.step:
            leg.last_step, leg.compare_step = leg.step, min(leg.step, leg.compare_step)
        if leg.step >= leg.compare_step and leg.at_compare is None:
            leg.at_compare, leg.compare_s = self._test(leg), self._wall_clock(leg)
            yield [self._test_record(leg, leg.at_compare)]
        if leg.step >= leg.last_step and leg.at_end is None:
            leg.at_end = leg.at_compare if leg.compare_step == leg.last_step else self._test(leg)
            yield [] if leg.at_end is leg.at_compare else [self._test_record(leg, leg.at_end)]

    def settled(self, leg):
        """Whether all that is due at the step where a leg is was done."""
        tested = (leg.step < leg.compare_step or leg.at_compare) and (leg.step < leg.last_step or leg.done)
        return bool(tested) and (leg.evaluated == leg.step or not self.evaluation_due(leg, leg.step))

    def evaluation_due(self, leg, step):
        """Whether a leg is to be scored at this step. The control is scored as often as its student, over its own steps."""
        every = max(1, round(self.eval_steps * leg.num_steps / self.config.max_steps))
        return step % every == 0 or step in (leg.compare_step, leg.last_step)

    @property
    def eval_steps(self):
        return plan.eval_steps(self.config)

    def evaluate(self, leg):
        """Validation records of the weights as they are, and of their average; the better ones are kept where they are the
        best so far.
        """
        scored = self._scored(leg)
        leg.evaluated = leg.step
        leg.since_best += 1
        found = []
        for model, record in scored:
            if leg.best_weights is None or math.isnan(leg.best) or record["bits_per_byte"] < leg.best:
                leg.best, leg.best_step, leg.since_best = record["bits_per_byte"], leg.step, 0
                leg.best_averaged, leg.best_weights = record["averaged"], loading.copy_of(model)
            found += [record] if record["averaged"] else self._watched(leg, record)
        return found

    def look(self, leg):
        """The records of `evaluate` and none of its consequences: nothing that the run decides depends on them."""
        return [{**record, "asked": True} for _, record in self._scored(leg)]

    def _scored(self, leg):
        """`(model, its validation record)` of the weights as they are, and of their average."""
        candidates = [self.pair.student]
        if self.training.average and leg.step:
            candidates.append(self.training.average.module)
        scored = []
        for model in candidates:
            score = self.scorer.student("validation", model)
            facts = {"split": "validation", "averaged": bool(scored), "progress": leg.step / leg.last_step}
            scored.append((model, {"kind": "eval", **self._at(leg), **facts, **score.summary()}))
        return scored

    def _test(self, leg):
        return self.scorer.student_with(leg.best_weights, "test")

    def _test_record(self, leg, score):
        return {"kind": "eval", **self._at(leg), "split": "test", "averaged": leg.best_averaged, **score.summary()}

    def _watched(self, leg, record):
        """The record, and the alerts it raises."""
        return [record, *leg.watch.see(record)]

    def _at(self, leg):
        return {"run": leg.name, "repeat": leg.repeat, "step": leg.step, "elapsed_s": self._wall_clock(leg)}

    def _wall_clock(self, leg):
        """Seconds that a leg's steps took so far, each with its share of the teacher's reading."""
        return leg.train_s + leg.step * self._read_s(leg)

    def _read_s(self, leg):
        return self.read_s / leg.last_step if leg.name == DISTILLED else 0.0

    def _train_record(self, leg, step):
        facts = {name: value for name, value in vars(step).items() if name not in ("step", "step_s")}
        return {
            "kind": "train",
            **self._at(leg),
            **facts,
            "last_step": leg.last_step,
            "tokens_per_s": step.num_tokens / max(step.step_s, 1e-9),
            "left_s": self.seconds_left(leg),
            "memory": {**memory.usage(self.accelerator.device), "predicted_bytes": leg.predicted_bytes},
        }

    def seconds_left(self, leg, saving=0.0):
        """Seconds to the end of the run, as far as this leg tells; `saving`: the share of the time that checkpoints take."""
        return plan.seconds_left(self.config, self.eval_steps, leg, self.budget.expected, saving)

    def outlook(self, num_sessions, saving):
        """The plan (`plan.outlook`) as it looks from session `num_sessions`."""
        leg = self.legs[-1]
        steps = leg.last_step - leg.step + (self.config.repeats - 1 - leg.repeat) * self.config.max_steps
        tokens = round(steps * leg.num_tokens / leg.step)
        speed = leg.step / max(leg.train_s, 1e-9)
        return plan.outlook(self.seconds_left(leg, saving), self.budget, num_sessions, speed, tokens)

    def _drop_weights(self):
        """Let go of the training that is over, and of weights that no verdict will ask for."""
        self.training = None
        self._free()
        pairs = self.pairs()
        chosen = min((distilled for distilled, _ in pairs), key=lambda leg: leg.best, default=None)
        for pair in pairs:
            for leg in pair if pair[0] is not chosen else ():
                if leg:
                    leg.best_weights = None

    def _free(self):
        self.accelerator.free_memory()
