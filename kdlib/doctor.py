"""Will it work here? Machine, pair, memory and speed are looked at before a run, by what the run itself uses.

Nothing is written but the tokenized text, which `windows` keeps for the run to find.
"""

import dataclasses
import math
import shutil

from kdlib import budget, checkpoint, env, inputs, machine, memory, pairing, peak, plan, precision, seeds
from kdlib.config import Config
from kdlib.corpus import Document
from kdlib.findings import Finding, markdown, plain, sentence, text, worst
from kdlib.leg import DISTILLED, Leg, Scorer
from kdlib.machine import gib
from kdlib.session import SAVE_EVERY_S, SAVE_SHARE
from kdlib.train import Training
from kdlib.windows import lengths_of

__all__ = ["Finding", "examine", "markdown", "plain", "sentence", "stages", "text", "worst"]

NUM_STEPS, PATIENCE_S = 6, 60.0
"""Optimizer steps that are timed after a first one, and seconds after which no further one is begun."""
SESSION = "11h"
"""Length of a session where `time_budget` is empty: what Kaggle's 12 hours leave."""
SENTENCES = (
    "The old lighthouse keeper wrote down the weather every evening, and nobody ever asked him to.",
    "In 1987 the city council spent 4,250,000 dollars on a bridge that was opened three years late.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n    return sum(values) / len(values)\n",
    "Photosynthesis turns carbon dioxide and water into sugar; the energy for it comes from light.",
    "“Where have you been?” she asked. “We waited for you until the café closed – at half past ten!”",
    "Elle n'a pas répondu tout de suite: elle regardait par la fenêtre, où la neige commençait à tomber.",
    "To install it, run the first command; if it fails, check that your version is at least 3.10.",
    "The theorem holds for every x > 0, because f(x) = x^2 + 1 is continuous and never reaches zero.",
)


def examine(config=None, asked="", clock=None):
    """All `Finding`s of `stages`, at once."""
    *_, (_, found) = stages(config, asked, clock)
    return found


def stages(config=None, asked="", clock=None):
    """Look at everything, one thing after the other: a generator of `(what comes next, findings so far)`; the last time
    nothing comes next.

    Without models named in `config` the machine is all there is. Without a `dataset` a few sentences stand for it. `asked`:
    the accelerator that was asked for, by Kaggle's name. It ends early where nothing further can be looked at. ValueError
    for what `distill` would not begin with: something that is not there, or that is refused.
    """
    config, clock = config or Config(), clock or budget.Clock()
    named = config.teacher or config.teacher_cache or config.student or config.dataset
    if named:
        config.replace(dataset=config.dataset or "sentences").require_inputs()
    yield "looking at the machine", []
    cards = machine.cards()
    found = machine.findings_of(machine.describe(), cards, config, asked)
    if named and not any(card.failed for card in cards):
        yield "loading teacher, student and text", found
        with precision.passing_accelerator(config.amp_dtype) as accelerator:
            look, refused = _look(config, accelerator, clock)
            found = found + refused
            if look:
                yield from _stages_of(look, found)
                return
    yield "", found


def _stages_of(look, found):
    for coming, one in (
        ("reading held-out text with both", look.pair),
        ("watching passes to foretell the memory", look.memory),
        ("taking optimizer steps, which are forgotten", look.sessions),
    ):
        yield coming, found
        try:
            found = found + one()
        except Exception as error:
            if not memory.ran_out(error):
                raise
            found = found + [_no_room(coming, look.config)]
            break
    yield "", found


def _look(config, accelerator, clock):
    """`(Look, findings)`: of what was loaded, or None and why it can't be looked at."""
    there = precision.teacher_device(config.teacher_device, accelerator)
    dtype, started = precision.teacher_dtype(accelerator, there), clock.now()
    documents = None if config.dataset else _sentences(config)
    try:
        loaded = inputs.load(config.replace(check_teacher=False), accelerator.device, dtype, there, documents)
    except inputs.Unfit as error:
        return None, [Finding("pair", "teacher, student and text", "do not fit", "wrong", error.problem, error.remedy)]
    except Exception as error:
        if not memory.ran_out(error):
            raise
        return None, [_no_room("loading teacher, student and text", config)]
    return Look(config, loaded, accelerator, clock, clock.now() - started), []


def _sentences(config):
    """Documents that fill whole windows, enough of them for a step and for held-out text."""

    def document(number):
        turn = number % len(SENTENCES)
        said = f"{number}. " + " ".join(SENTENCES[turn:] + SENTENCES[:turn]) + "\n"
        return Document(said * (1 + 8 * config.max_length // len(said)))

    train = [document(number) for number in range(max(8, config.effective_batch))]
    return train, [document(len(train))], [document(len(train) + 1)]


class Look:
    """What a run would start from, loaded; `load_s`: how long that took."""

    def __init__(self, config, loaded, accelerator, clock, load_s):
        self.loaded, self.accelerator, self.clock, self.load_s = loaded, accelerator, clock, load_s
        self.per_step = config.effective_batch * accelerator.num_processes
        self.sampled = not config.dataset
        self.planned = bool(config.dataset or config.max_steps)
        steps = plan.num_steps(config, len(loaded.train), self.per_step)
        self.config = config.replace(max_steps=steps)
        guesses = plan.guessed_costs(loaded.pair.student.num_parameters())
        self.budget = budget.Budget(budget.seconds_of(config.time_budget or SESSION), clock, clock.now(), (), guesses)

    def pair(self):
        """Both models read the validation text; what they and their tokenizers are to each other."""
        scorer = Scorer(self.loaded, self.config.loss_chunk_size, self.budget)
        started = self.clock.now()
        scores = {"teacher": scorer.teacher("validation")}
        teacher_s = self.clock.now() - started
        scores["student"] = scorer.student("validation")
        both_s = self.clock.now() - started
        longer = _num_tokens(self.loaded.test) / _num_tokens(self.loaded.validation)
        self.budget.took("test", longer * self.budget.expected("evaluate"))
        # a run begins with the teacher's score on both texts and the student's on one
        self.budget.took("start", self.load_s + teacher_s + longer * both_s)
        return pairing.findings_of(self.config, self.loaded, scores, self.sampled)

    def memory(self):
        """The height that training will reach, against what there is."""
        with seeds.untouched(self.accelerator.device):
            self.training = self._training()
        device = self.accelerator.device
        total, used = memory.usage(device)["total_bytes"], memory.usage(device)["used_bytes"] or 0
        if self.config.gradient_checkpointing == "auto":
            predicted = peak.fit(self.training, total)
        else:
            predicted = peak.predicted_bytes(self.training)
        made = [peak_finding(predicted, used + memory.free(device), total, self.training.recomputes, self.config)]
        if made[0].state == "wrong":
            made = [dataclasses.replace(made[0], remedy=remedies(self._that_fits(total), self.config))]
        apart = self.loaded.pair.teacher.model and self.loaded.pair.teacher.model.device
        if apart and apart.type == "cuda" and apart != device:
            made.append(apart_finding(apart, **memory.usage(apart)))
        return made

    def _training(self):
        """The `Training` of the distilled student, with all its parts on from the first step."""
        config, pair = self.config.replace(use_curriculum=False), self.loaded.pair
        objective = inputs.make_objective(pair, config)
        teacher = pair.teacher if config.needs_teacher else None
        return Training(
            objective, teacher, self.loaded.train, max(config.max_steps, NUM_STEPS + 2), config, self.accelerator,
            self.clock, pair.pads, pair.widest,
        )  # fmt: skip

    def _that_fits(self, total):
        """The largest micro-batch below the config's, by halves, that is foretold to fit; None where none does."""
        whole = self.training.micro_batch
        try:
            while self.training.micro_batch > 1:
                self.training.micro_batch //= 2
                if peak.predicted_bytes(self.training) <= total:
                    return self.training.micro_batch
        finally:
            self.training.micro_batch = whole

    def sessions(self):
        """Steps taken and timed; what the whole plan then takes, and its checkpoints."""
        with seeds.untouched(self.accelerator.device):
            steps = self._timed()
        counted = steps[1:]
        seconds, tokens = sum(step.step_s for step in counted), sum(step.num_tokens for step in counted)
        lengths = lengths_of(self.loaded.train)
        per_step = float(lengths.mean()) * self.per_step
        step_s = max(seconds, 1e-9) / max(1, tokens) * per_step
        made = [
            speed_finding(step_s, per_step, len(counted)),
            numbers_finding(steps, self.accelerator.scaler is not None),
        ]
        if steps[-1].micro_batch < self.config.batch_size:
            made.append(halved_finding(steps[-1].micro_batch, self.config))
        if self.planned:
            made += plan_findings(self.config, step_s, per_step, self.budget)
        sizes = {name: checkpoint.size_of(tensors) for name, tensors in self.training.tensors().items()}
        return made + [disk_finding(sizes, self.config, shutil.disk_usage(".").free, env.disk_reserve_bytes())]

    def _timed(self):
        steps, started = [], self.clock.now()
        for step in self.training:
            steps.append(step)
            late = self.clock.now() - started > PATIENCE_S
            if len(steps) > NUM_STEPS or (late and len(steps) > 1):
                break
        return steps


def _num_tokens(held_out):
    return sum(batch.num_student_tokens for batch in held_out.batches)


def _no_room(doing, config):
    return Finding("memory", "room", f"ran out while {doing}", "wrong", "", remedies(None, config))


def peak_finding(predicted, there, total, recomputes, config):
    """The peak that is `predicted` against the `total` memory and what of it other programs leave, `there`."""
    said = f"more than {gib(total)}" if math.isinf(predicted) else f"{gib(predicted)} of {gib(total)}"
    if predicted > total:
        means = (
            "a step does not fit. A run halves its batch when a card runs out; a host that runs out may end it unasked"
        )
        return Finding("memory", "peak, foretold", said, "wrong", means, remedies(None, config), predicted)
    if recomputes:
        why = "as set" if config.gradient_checkpointing == "on" else "it would not fit otherwise"
        means = f"layers are made anew in the backward pass ({why}): the same result, a step takes about a third longer"
        return Finding("memory", "peak, foretold", said, "note", means, number=predicted)
    if predicted > there:
        means = f"other programs leave {gib(there)} of it"
        return Finding("memory", "peak, foretold", said, "note", means, "end what else runs there", predicted)
    means = f"every layer keeps what its backward pass needs (gradient_checkpointing {config.gradient_checkpointing})"
    return Finding("memory", "peak, foretold", said, "ok", means, number=predicted)


def remedies(micro_batch, config):
    """What takes less memory than `config` does; `micro_batch`: windows in one pass that are foretold to fit, if any are."""
    if micro_batch:
        times = -(-config.effective_batch // micro_batch)
        return f"--batch-size {micro_batch} --grad-accumulation {times} is foretold to fit, with the same result"
    wanted = []
    if config.batch_size > 1:
        wanted.append("a smaller batch_size with a larger grad_accumulation")
    if config.gradient_checkpointing == "off":
        wanted.append("gradient_checkpointing auto")
    wanted.append(f"max_length below {config.max_length}")
    if not config.teacher_cache:
        wanted.append("a teacher cache (kdlib cache, then teacher_cache: no teacher in memory)")
        if config.teacher_quantization == "none":
            wanted.append("teacher_quantization 8bit or 4bit (needs bitsandbytes)")
    if config.optimizer == "adamw":
        wanted.append("optimizer adamw_8bit (needs bitsandbytes)")
    return f"{', '.join(wanted)}, or a smaller student"


def apart_finding(device, used_bytes, total_bytes):
    """What is in use where the teacher has a card for itself."""
    said = f"{gib(used_bytes)} of {gib(total_bytes)} in use on {device}"
    means = "read after it had scored the held-out text; what its passes take in training is not foretold"
    return Finding("memory", "teacher's card", said, "ok", means, number=used_bytes)


def speed_finding(step_s, per_step, count):
    said = f"{1 / step_s:.2f} ({per_step / step_s:,.0f} tokens a second)"
    means = f"{count} real steps, timed after a first one, for a step of {per_step:,.0f} tokens: the mean of this text"
    return Finding("sessions", "steps a second", said, "ok", means, number=1 / step_s)


def numbers_finding(steps, scaled):
    """Whether the losses and gradients that were seen are numbers; `scaled`: a loss scaler is at work."""
    bad = [step.skipped for step in steps if step.skipped]
    said = f"{len(steps) - len(bad)} of {len(steps)} steps"
    if not bad:
        return Finding("sessions", "finite numbers", said)
    if scaled and all("at loss scale" in why for why in bad):
        means = "the loss scaler is finding its scale; steps with too large a gradient are skipped meanwhile"
        return Finding("sessions", "finite numbers", said, "note", means)
    remedy = "look at these documents, or try amp_dtype fp32"
    return Finding("sessions", "finite numbers", said, "wrong", bad[-1], remedy)


def halved_finding(micro_batch, config):
    means = "memory ran out, and the step was taken in smaller parts: a run does the same, with the same result"
    times = -(-config.effective_batch // micro_batch)
    remedy = f"--batch-size {micro_batch} --grad-accumulation {times} spares the attempt"
    return Finding("memory", "windows in one pass", f"{micro_batch} of {config.batch_size}", "note", means, remedy)


def plan_findings(config, step_s, per_step, known):
    """Hours and sessions of a plan of `max_steps`, one taking `step_s`; `known`: a `Budget` that has seen what evaluations
    and the start cost.
    """
    steps = config.max_steps
    every = plan.eval_steps(config)
    leg = Leg(DISTILLED, 0, steps, steps, steps, train_s=step_s)
    save = known.expected("save")
    between = config.save_steps * step_s or max(SAVE_EVERY_S, save / SAVE_SHARE)
    costs = {**known.costs, "step": step_s}
    # a session that has just been through its start
    session = budget.Budget(
        known.seconds, known.clock, known.clock.now() - known.expected("start"), costs, known.guesses
    )
    left = plan.seconds_left(config, every, leg, session.expected, save / between)
    told = plan.outlook(left, session, 1, 1 / step_s, round(steps * per_step))
    control = {"full": "the control as long again", "short": "a tenth more for the control", "off": "no control"}
    more = f", {config.repeats} times" if config.repeats > 1 else ""
    means = f"{control[config.control]}{more}, an evaluation every {every} steps, checkpoints; loading not counted"
    made = [Finding("sessions", "the whole plan", f"{steps:,} steps, {budget.spoken(left)}", "ok", means, number=left)]
    return made + [sessions_finding(told["sessions_needed"], config.time_budget, session)]


def sessions_finding(needed, given, session):
    each = f"{budget.spoken(session.seconds)} each" + (
        "" if given else " (time_budget is empty: a run then has no end)"
    )
    if needed is None:
        means = "loading, saving, an evaluation and the margin take a whole session: none would get anything done"
        remedy = "a longer time_budget, or fewer eval_tokens"
        return Finding("sessions", "sessions", f"too short: {each}", "wrong", means, remedy)
    if needed > 1:
        means = "the same command goes on in the next one"
        return Finding("sessions", "sessions", f"{needed} of {each}", "note", means, number=needed)
    return Finding("sessions", "sessions", f"1 of {each}", number=1)


def disk_finding(sizes, config, free, reserve):
    """Room for checkpoints: `sizes` are the bytes of what is in one, by group. The best weights of the students that are
    compared are in it too, and a new one is whole before the last of the old ones goes.
    """
    student = sizes["student"]
    best = (1 if config.control == "off" else 2) * (2 if config.repeats > 1 else 1)
    one = sum(sizes.values()) + best * student + checkpoint.OVERHEAD_BYTES
    least, whole = (count * one + 2 * student + reserve for count in (2, config.keep_checkpoints + 1))
    said = f"{gib(whole)} at most, {gib(free)} free in this folder"
    means = f"{config.keep_checkpoints} checkpoints of {gib(one)}, one being written, the student twice, a reserve"
    if least > free:
        remedy = "give --out a folder on a larger disk"
        return Finding(
            "sessions", "disk for checkpoints", said, "wrong", f"{means}; at least {gib(least)}", remedy, whole
        )
    if whole > free:
        means += f"; old checkpoints will go sooner, for which {gib(least)} are enough"
        return Finding("sessions", "disk for checkpoints", said, "note", means, number=whole)
    return Finding("sessions", "disk for checkpoints", said, "ok", means, number=whole)
