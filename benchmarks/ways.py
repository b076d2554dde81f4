"""Ways to take one optimizer step on the same windows with the same two models, for `benchmarks.step`.

A `World` is made of a few plain numbers; a way makes of it `step(windows)`, which takes one whole optimizer step (teacher,
student, loss, gradients, clipping, AdamW) and gives its loss. `floor`, `ce-only` and `ours` go through kdlib's own loop, the
others through `by_hand`.
"""

import dataclasses
import functools
import statistics
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from benchmarks import peers
from kdlib import clock
from kdlib.align import vocab
from kdlib.config import Config
from kdlib.data import tokenize, windowing
from kdlib.losses import teacher_signal
from kdlib.models import devices, forward, projector, teacher, teacher_cache
from kdlib.models.head import Head
from kdlib.training import loop
from kdlib.training.objective import Objective

TEACHER = {
    "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
STUDENT = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
LOG_MEDIAN, LOG_SPREAD, LONGEST = 4.645, 0.405, 384
"""Student tokens of an instruction with its answer: lognormal, mean 113, nine tenths up to 175, none over 384."""
TEACHER_TOKENS, ALIGNED, SHARED = 0.95, 0.85, 0.84
"""Teacher tokens for one of the student; student tokens that end where one of the teacher's does; student tokens that the
teacher's vocabulary has too.
"""


@dataclasses.dataclass(frozen=True)
class World:
    """Two random models and the windows of one step. `num_windows` windows, their lengths in the middles of equal shares of
    the distribution above, or all `length`; the last `answer` of each is learned. `teacher` and `student` change the
    shapes of SmolLM2-135M and Qwen3-0.6B.
    """

    num_windows: int = 8
    length: int = 0
    answer: float = 1.0
    teacher: dict = dataclasses.field(default_factory=dict)
    student: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def accelerator(self):
        return devices.accelerator("auto")

    @property
    def configs(self):
        """Of student and teacher."""
        ours, theirs = {**STUDENT, **self.student}, {**TEACHER, **self.teacher}
        return transformers.LlamaConfig(**ours), transformers.Qwen3Config(**theirs)

    @functools.cached_property
    def student_model(self):
        return _random(self.configs[0]).to(self.accelerator.device)

    @functools.cached_property
    def teacher_model(self):
        return _random(self.configs[1]).to(self.accelerator.device, devices.teacher_dtype(self.accelerator))

    @functools.cached_property
    def live_teacher(self):
        return teacher.Teacher(
            self.teacher_model, tokenize.TextTokenizer(None, _vocabulary(self.teacher_model.config), [], [])
        )

    @functools.cached_property
    def windows(self):
        chance = np.random.default_rng(0)
        lengths = [self.length] * self.num_windows if self.length else spread_lengths(self.num_windows)
        sizes = [config.vocab_size for config in self.configs]
        made = [_window(int(length), *sizes, self.answer, chance) for length in chance.permutation(lengths)]
        return [dataclasses.replace(window, window_id=place) for place, window in enumerate(made)]

    @functools.cached_property
    def brief(self):
        """As many windows of eight tokens: a first step on them does whatever is done only once."""
        short = dataclasses.replace(self, length=8).windows
        return [dataclasses.replace(window, window_id=self.num_windows + window.window_id) for window in short]


def _random(config):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def _vocabulary(config):
    return vocab.Vocabulary((b"",) * config.vocab_size, (), False)


def spread_lengths(num):
    """Student tokens of `num` windows that stand for the whole distribution."""
    places = [statistics.NormalDist().inv_cdf((i + 0.5) / num) for i in range(num)]
    return [min(LONGEST, round(float(np.exp(LOG_MEDIAN + LOG_SPREAD * place)))) for place in places]


def _window(length, vocabulary, teacher_vocabulary, answer, chance):
    """A text of random tokens that both tokenizers cut into the same pieces, each into one token or several."""
    lengths = length, max(2, round(length * TEACHER_TOKENS * chance.uniform(0.95, 1.05)))
    pieces = min(lengths[1], max(2, round(length * ALIGNED)))
    first = round((1.0 - answer) * pieces)  # piece that is learned
    sides, rows, stops = [], [], []
    for num, size in zip(lengths, (vocabulary, teacher_vocabulary), strict=True):
        ids, sizes = chance.integers(0, size, num), 1 + chance.multinomial(num - pieces, np.full(pieces, 1.0 / pieces))
        learned, ends = np.repeat(np.arange(pieces), sizes) >= first, np.cumsum(sizes) - 1
        labels = np.append(np.where(learned[1:], ids[1:], windowing.IGNORE), windowing.IGNORE)
        sides += [ids, labels, np.zeros(num, dtype=bool)]
        rows.append(ends[max(0, first - 1) : -1])
        stops.append(ends[max(1, first) :])
    return windowing.Window(*sides, *rows, *stops, num_bytes=0, num_positions=int((sides[1] >= 0).sum()), document=0)


def ours(world, teacher_of=None, kd_method="none", **changes):
    """kdlib's own loop. `teacher_of(world)` gives what it asks for its signal."""
    changes = {"kd_weight": 0.5, "lm_weight": 0.5, **changes}  # as the other ways have them
    config = Config(batch_size=world.num_windows, max_length=LONGEST, kd_method=kd_method, **changes)
    told = teacher_of(world) if teacher_of else None
    beside, more = {}, {}
    if kd_method == "projector":
        beside["projector"] = _projector(world)
    elif kd_method == "first_token":
        more = {"teacher_head": told.student_side_head, "buckets": _buckets(world)}
    head = Head(world.student_model, _vocabulary(world.student_model.config))
    objective = Objective(world.student_model, head, config, beside, **more).to(world.accelerator.device)
    training = loop.TrainLoop(
        objective, told, [], 10**6, config, world.accelerator, clock.Clock(), max_row_width=(2 * LONGEST,) * 2
    )

    def step(windows):
        training.windows = windows
        return next(iter(training)).loss

    return step


def _projector(world):
    ours, theirs = (config.hidden_size for config in world.configs)
    made = projector.TeacherToStudentProjector(theirs, ours)
    torch.nn.init.normal_(made.weight, 0.0, 0.02, torch.Generator().manual_seed(0))
    return made.to(world.accelerator.device)


def _buckets(world):
    """Shared tokens with a bucket each, and any of these for the others."""
    chance, sizes = np.random.default_rng(0), [config.vocab_size for config in world.configs]
    num = int(SHARED * sizes[0])
    buckets = [chance.permutation(np.append(np.arange(num), chance.integers(0, num + 1, size - num))) for size in sizes]
    return vocab.Buckets(*buckets, np.arange(num))


def floor(world):
    """The least that a live step could cost: the teacher's last hidden states, which nobody looks at, and plain training."""
    return ours(world, lambda _: _Unheard(world.teacher_model, world.live_teacher.reader), lm_weight=1.0)


class _Unheard(teacher.Teacher):
    def __call__(self, batch, **asked):
        super().__call__(batch, **asked)


def ce_only(world):
    """Plain training, no teacher."""
    return ours(world, lm_weight=1.0)


def live(world, kd_method):
    """Distillation with the teacher beside."""
    return ours(world, lambda _: world.live_teacher, kd_method)


def cached(world, kd_method):
    """Distillation from a cache on the disk: the likeliest tokens, and hidden states where the method is of these."""
    return ours(world, functools.partial(_Spoken, hidden=kd_method == "projector"), kd_method)


class _Spoken(teacher_cache.CachedTeacher):
    """kdlib's cached teacher on a shard of random numbers, for the windows and the brief ones."""

    def __init__(self, world, hidden):
        windows, (student, teacher_config) = [*world.windows, *world.brief], world.configs
        self.model, self.student_side_head, self.num_columns = None, None, 0
        facts = {"shards": {"train": [[0, len(windows)]]}, "settings": {"inside_k": []}}
        told = [_signal(len(window.student_rows), student.vocab_size, teacher_config.hidden_size) for window in windows]
        with tempfile.TemporaryDirectory() as folder:  # a file that is mapped outlives its name
            path = Path(folder) / teacher_cache.shard_name("train", 0)
            teacher_cache.write_shard(path, teacher_cache.key_of(facts), told, student.vocab_size, hidden)
            self.shards = teacher_cache.Shards([path.parent], facts, "train")


def _signal(num, num_tokens, width):
    k = min(teacher_cache.TOP_K, num_tokens)
    ids = torch.rand(num, num_tokens).topk(k, dim=-1).indices
    top = teacher_signal.TopKLogProbs(ids, torch.randn(num, k + 1).log_softmax(-1), ids[:, 0])
    return teacher_signal.TeacherSignal(torch.randn(num, width), torch.zeros(num), top)


def by_hand(world, loss_of, at_once=None, beside=None):
    """The step around `loss_of(windows)`, `at_once` windows at a time; `beside` is trained too."""
    accelerator = world.accelerator
    trained = torch.nn.ModuleDict({"student": world.student_model, **(beside or {})}).train()
    optimizer = accelerator.prepare(torch.optim.AdamW(trained.parameters(), lr=1e-10, betas=(0.9, 0.95)))

    def step(windows):
        total, size = 0.0, at_once or len(windows)
        for start in range(0, len(windows), size):
            group = windows[start : start + size]
            with accelerator.autocast():
                loss = loss_of(group) * len(group) / len(windows)
            accelerator.backward(loss)
            total += float(loss.detach())
        accelerator.unscale_gradients(optimizer)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def padded(world, windows, side="right", length=0):
    """`(student, teacher)`, each with `ids`, `mask`, `labels` (shifted) and `rows`, `[B, L]`, padded as asked."""
    found = []
    for name in ("student", "teacher"):
        ids, labels = ([getattr(window, f"{name}_{what}") for window in windows] for what in ("ids", "labels"))
        width = max(length, *map(len, ids))
        gaps = [(width - len(row), 0) if side == "left" else (0, width - len(row)) for row in ids]
        rows = [np.pad(row, gap) for row, gap in zip(ids, gaps, strict=True)]
        masks = [np.pad(np.ones_like(row), gap) for row, gap in zip(ids, gaps, strict=True)]
        labels = [np.pad(row, gap, constant_values=windowing.IGNORE) for row, gap in zip(labels, gaps, strict=True)]
        firsts = [i * width + gap[0] for i, gap in enumerate(gaps)]
        places = [getattr(window, f"{name}_rows") + first for window, first in zip(windows, firsts, strict=True)]
        arrays = [np.stack(rows), np.stack(masks), np.stack(labels), np.concatenate(places)]
        found.append([torch.from_numpy(array).to(world.accelerator.device) for array in arrays])
    return found


def eager(world):
    """What `live(world, "projector")` computes, with everything kept: student logits, projected logits, log-softmaxes."""
    made = _projector(world)

    def loss_of(windows):
        (ids, mask, labels, rows), (teacher_ids, teacher_mask, _, teacher_rows) = padded(world, windows)
        with torch.no_grad():
            hidden = forward.last_hidden(world.teacher_model, teacher_ids, teacher_mask).flatten(0, 1)[teacher_rows]
        logits, labels = world.student_model(input_ids=ids, attention_mask=mask).logits.flatten(0, 1), labels.flatten()
        projected = F.linear(made(hidden), world.student_model.get_output_embeddings().weight.detach()).float()
        ours, theirs = logits[rows].float().log_softmax(-1), projected.detach().log_softmax(-1)
        kd = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
        loss = 0.5 * F.cross_entropy(logits.float(), labels) + 0.5 * kd
        alone = F.cross_entropy(projected, labels[rows])
        return loss + alone - alone.detach()  # the projector learns by it, the student's loss does not count it

    return by_hand(world, loss_of, beside={"projector": made})


def naive(world):
    """What kdlib's forerunner did, two windows at a time: everything padded to 384, eager attention with all maps and hidden
    states of both models, both heads in full, the teacher's softmax times its embedding, projected to the student's width
    and decoded again, positions paired by index, KL over the student's whole vocabulary.
    """
    made = _projector(world)
    watch = {"output_attentions": True, "output_hidden_states": True, "use_cache": False}

    def loss_of(windows):
        (ids, mask, labels, _), (teacher_ids, teacher_mask, _, _) = padded(world, windows, length=LONGEST)
        with torch.no_grad():
            taught = world.teacher_model(input_ids=teacher_ids, attention_mask=teacher_mask, **watch)
            expected = taught.logits.float().softmax(-1) @ world.teacher_model.get_input_embeddings().weight.float()
        learned = world.student_model(input_ids=ids, attention_mask=mask, **watch)
        theirs = world.student_model.get_output_embeddings()(made(expected)).log_softmax(-1)
        kd = F.kl_div(learned.logits.log_softmax(-1), theirs, reduction="none", log_target=True).sum(-1)
        ce = F.cross_entropy(learned.logits.flatten(0, 1), labels.flatten())
        return 0.5 * ce + 0.5 * (kd * mask).sum() / mask.sum()

    step = by_hand(world, loss_of, at_once=2, beside={"projector": made})

    def with_eager_attention(windows):
        both = world.student_model, world.teacher_model
        try:
            for model in both:
                model.set_attn_implementation("eager")
            return step(windows)
        finally:
            for model in both:
                model.set_attn_implementation("sdpa")

    return with_eager_attention


def gold(world, hybrid=False, by_bytes=True):
    """TRL's GOLD: `GOLDTrainer.compute_loss` on batches as its collators pad them (student left, teacher right, to the
    longest), both models' whole logits, a teacher that also fills its cache of keys; then `ULDLoss`, 0.5 of it and 0.5
    cross entropy. Without the recomputation in the backward pass that its config asks for.
    """
    sizes = [config.vocab_size for config in world.configs]
    alone = int((1.0 - SHARED) * sizes[0])  # tokens of the student that the teacher has not
    loss_fn = peers.gold_loss(range(sizes[0]), range(alone, alone + sizes[1]), hybrid, by_bytes)

    def loss_of(windows):
        (ids, mask, labels, _), _ = padded(world, windows, side="left")
        _, (teacher_ids, teacher_mask, teacher_labels, _) = padded(world, windows)
        learned = world.student_model(input_ids=ids, attention_mask=mask, use_cache=False)
        with torch.no_grad():
            taught = world.teacher_model(input_ids=teacher_ids, attention_mask=teacher_mask.bool())
        labels, teacher_labels = (
            F.pad(each[:, :-1], (1, 0), value=windowing.IGNORE) for each in (labels, teacher_labels)
        )
        ends = [_byte_ends(window) for window in windows]
        ends = (
            [F.pad(one, (ids.shape[1] - len(one), 0)) for one, _ in ends],
            [F.pad(other, (0, teacher_ids.shape[1] - len(other))) for _, other in ends],
        )
        offsets = [torch.stack([torch.stack(side)] * 2, dim=-1) for side in ends]  # where a token begins is not read
        return loss_fn(learned.logits, taught.logits, labels, teacher_labels, ids, teacher_ids, *offsets)

    return by_hand(world, loss_of)


def _byte_ends(window):
    """Where each side's tokens end, in a text in which nothing but the aligned ones end at the same byte."""
    found, far = [], 4 * (len(window.student_ids) + len(window.teacher_ids))
    for side, odd in (("student", 1), ("teacher", 0)):
        places = np.arange(len(getattr(window, f"{side}_ids")))
        common = np.append(getattr(window, f"{side}_rows"), places[-1])
        piece = np.searchsorted(common, places)
        ends = np.where(places == common[piece], far * (piece + 1), far * piece + 2 * places + odd)
        found.append(torch.from_numpy(ends))
    return found


WAYS = {
    "floor": floor,
    "ce-only": ce_only,
    "ours live, projector": functools.partial(live, kd_method="projector"),
    "ours live, first_token": functools.partial(live, kd_method="first_token"),
    "ours cached": functools.partial(cached, kd_method="first_token"),
    "ours cached, projector": functools.partial(cached, kd_method="projector"),
    "eager, projector": eager,
    "TRL GOLD ULD": gold,
    "TRL GOLD hybrid": functools.partial(gold, hybrid=True),
    "TRL GOLD ULD, by position": functools.partial(gold, by_bytes=False),
    "naive original": naive,
}
"""By name; those that are not kdlib's cost what they cost on the same windows."""
