"""Everything a run starts from, loaded and checked before anything is written: models, tokenizers, windows of text."""

import dataclasses
import functools

import torch

from kdlib import memory
from kdlib.config import BY_BUCKETS
from kdlib.data import batching, corpus
from kdlib.data.dataset import WindowDataset, build_windows, spread, window_lengths
from kdlib.evaluation import scoring
from kdlib.models import devices, fingerprint, hooks, loading, trie
from kdlib.models.pair import IncompatiblePairError, Pair, load_pair, load_teacher
from kdlib.models.projector import FeatureMap, TeacherToStudentProjector
from kdlib.models.router import LayerRouter
from kdlib.training.objective import Objective

MIN_COVERAGE = 0.01
TEST_FACTOR = 4
HELD_OUT = ("validation", "test")
MEASURED_TOKENS = 4096
"""Student tokens on which the size of each feature is measured before training."""


@dataclasses.dataclass
class Inputs:
    """What a run starts from: the pair, windows to train on, `scoring.HeldOut` text to choose and to judge by.

    `alignment` reports how the pair of tokenizers fits this text: fractions in [0, 1]. `identity` names what a run starts
    from (`fingerprint.fingerprint_inputs`). `held_out_tokens`: the student's, of all validation and test text, by name.
    """

    pair: Pair
    train: WindowDataset
    validation: scoring.HeldOut
    test: scoring.HeldOut
    alignment: dict
    identity: dict
    held_out_tokens: dict = dataclasses.field(default_factory=dict)


def load(
    config, device="cpu", teacher_dtype=torch.float32, teacher_device=None, documents=None,
    on_progress=lambda phase, done, total: None,
):  # fmt: skip
    """The `Inputs` of a run; devices as in `load_pair`; `documents`: for training, validation and test, in place of the
    config's. Every mistake a user can make raises ValueError with one line. `on_progress(phase, done, total)` is called
    before every piece of work; a `total` of 0 is unknown. What it raises ends the loading.
    """
    if documents is None:
        config.require_inputs()
    if config.optimizer == "adamw_8bit":
        devices.bitsandbytes("optimizer", config.optimizer, "adamw")
    on_progress("reading the text", 0, 0)
    documents = documents or _documents(config)
    pair = load_pair(config, device, teacher_dtype, teacher_device, on_progress)
    if config.gradient_checkpointing == "on" and not memory.can_recompute(pair.student):
        raise ValueError(
            f"gradient_checkpointing on: {type(pair.student).__name__} has no support for it; set it to auto or off"
        )
    on_progress("tokenizing the text", 0, 0)
    train, validation, test = (_windows(part, pair, config) for part in documents)
    _check_amount(train, config)
    pair.widest = _widest(pair, config, (train, validation, test))
    pair.sample, pair.text = list(spread(train, MEASURED_TOKENS)), train
    _check_scored({"validation": validation, "test": test})
    alignment = _report(train, pair)
    if alignment["coverage"] < MIN_COVERAGE:
        raise IncompatiblePairError(
            f"only {alignment['coverage']:.1%} of the student's tokens have a comparable teacher position; "
            "these two tokenizers can't be aligned on this text",
            "take a student or a teacher with another tokenizer",
        )
    on_progress("fingerprinting the models", 0, 0)
    teacher = pair.teacher.identity if config.cached else fingerprint.fingerprint_teacher(pair.teacher.model)
    readers = pair.teacher.reader, pair.student_reader
    known = fingerprint.fingerprint_inputs(teacher, pair.student, *readers, documents, (train, validation, test))
    if config.cached:
        pair.teacher.refuse_other(known)
    samples = list(spread(validation, config.eval_tokens)), list(spread(test, TEST_FACTOR * config.eval_tokens))
    held_out = _both_held_out([_numbered(part) for part in samples], pair, config, train, on_progress)
    if config.check_teacher:
        scoring.check_teacher(pair.teacher, train, held_out[0])
    sizes = {name: int(window_lengths(part).sum()) for name, part in zip(HELD_OUT, (validation, test), strict=True)}
    return Inputs(pair, train, *held_out, alignment, known, sizes)


def with_cache(loaded, config, on_progress=lambda phase, done, total: None):
    """The same `Inputs` as `load` gives for a `config` with a teacher cache, from those of its live teacher: nothing but the
    cache is loaded.
    """
    teacher = load_teacher(config, None, None, None)
    teacher.refuse_other(loaded.identity)
    buckets = {name: made for name, made in loaded.pair.buckets.items() if name != "tries"}  # these hold the live head
    pair = dataclasses.replace(loaded.pair, teacher=teacher, widest=(loaded.pair.widest[0], 0), buckets=buckets)
    samples = [
        sorted((window for group in text.windows for window in group), key=lambda window: window.place)
        for text in (loaded.validation, loaded.test)
    ]
    held_out = _both_held_out(samples, pair, config, loaded.train, on_progress)
    known = {**loaded.identity, **teacher.identity}
    return Inputs(pair, loaded.train, *held_out, loaded.alignment, known, loaded.held_out_tokens)


def _both_held_out(samples, pair, config, train, on_progress):
    """The `scoring.HeldOut`s of validation and test; the latter's scores tell more."""
    seen = None, torch.from_numpy(scoring.times_seen(pair.student_reader.vocabulary, train))
    return [
        _hold_out(part, pair, config, name, times, on_progress)
        for part, name, times in zip(samples, HELD_OUT, seen, strict=True)
    ]


def load_for_evaluation(
    config, device="cpu", teacher_dtype=torch.float32, teacher_device=None,
    on_progress=lambda phase, done, total: None,
):  # fmt: skip
    """The `Inputs` of no run: all of `dataset` is held-out text, `validation` and `test` alike. Devices as in `load_pair`;
    `on_progress` as in `load`.
    """
    config.require_inputs()
    if config.cached:
        raise ValueError("evaluate reads the teacher itself; give --teacher, not --teacher-cache")
    on_progress("reading the text", 0, 0)
    documents = corpus.read_documents(config.dataset, config.text_field)
    pair = load_pair(config, device, teacher_dtype, teacher_device, on_progress)
    on_progress("tokenizing the text", 0, 0)
    windows = _windows(documents, pair, config)
    _check_scored({"given": windows})
    pair.widest = _widest(pair, config, [windows])
    seen = torch.from_numpy(scoring.times_seen(pair.student_reader.vocabulary, windows))
    held_out = _hold_out(windows, pair, config, "held-out", seen, on_progress)
    return Inputs(pair, windows, held_out, held_out, _report(windows, pair), {})


def make_objective(pair, config, student=None):
    """The `Objective` of `config` over a student (default: the pair's own), with what its parts need. ValueError where a
    model can't be watched for a part that needs it.
    """
    student = pair.student if student is None else student
    watch_attention(pair, config, student)
    head = loading.Head(student, pair.student_reader.vocabulary)
    if not config.needs_teacher:
        return Objective(student, head, config)
    beside, more = {}, {}
    if config.kd_method == "projector":
        theirs = pair.teacher.shared_rows(pair.shared).cpu()
        beside["projector"] = TeacherToStudentProjector(theirs.shape[1], head.width)
        beside["projector"].start_from(head.rows(torch.from_numpy(pair.shared.student_ids)).cpu(), theirs)
    elif config.kd_method in BY_BUCKETS:
        more = {"teacher_head": pair.teacher.student_side_head, "buckets": trie.buckets_of(pair, config.kd_method)}
        if config.kd_method == "inside_tokens":
            more["tries"] = trie.tries_of(pair)
    layers, attention = _tapped(student.config, pair.teacher.config, config)
    beside |= _feature_modules(pair, config, student, layers)
    objective = Objective(student, head, config, beside, layers=layers, attention_layers=attention, **more)
    return objective.to(student.device)


def watch_attention(pair, config, student=None):
    """Sets the attentions of student and live teacher to be watched or not, as the parts of `config` need it."""
    watched = config.attention_weight > 0 or config.attention_alignment_weight > 0
    hooks.watch_attention(pair.student if student is None else student, watched)
    if config.needs_teacher and pair.teacher.model is not None:
        hooks.watch_attention(pair.teacher.model, watched)


def _tapped(student_config, teacher_config, config):
    """`(student's, teacher's)` layers that features compare, and those whose attention is: two pairs of ascending tuples."""
    ours, theirs = (each.num_hidden_layers for each in (student_config, teacher_config))
    layers = sorted({round((i + 1) * ours / config.feature_layers) - 1 for i in range(config.feature_layers)} - {-1})
    last = min(config.attention_layers, ours, theirs)
    return (
        (tuple(layers), tuple(max(0, round((i + 1) * theirs / ours) - 1) for i in layers)),
        (tuple(range(ours - last, ours)), tuple(range(theirs - last, theirs))),
    )


def _feature_modules(pair, config, student, layers):
    """The maps and the router that the config's parts train, with the sizes of the features on the pair's sample."""
    width, teacher_width = student.config.hidden_size, pair.teacher.config.hidden_size
    made = {}
    if config.layerwise_weight > 0:
        made["layerwise"] = torch.nn.ModuleList(FeatureMap(width, teacher_width) for _ in layers[0])
    if config.routing_feature_weight > 0:
        made["routing_feature"] = LayerRouter(width, teacher_width, len(layers[1]))
    if config.contrastive_weight > 0:
        made["contrastive"] = FeatureMap(width, teacher_width)
    if not made:
        return made
    state, ours, last, theirs = _sampled_features(pair, config, student, layers)
    for each, a, b in zip(made.get("layerwise", ()), ours, theirs, strict=False):
        each.measure(a, b)
    if "routing_feature" in made:
        made["routing_feature"].measure(state, theirs)
    if "contrastive" in made:
        made["contrastive"].measure(state, last)
    return made


@torch.no_grad()
def _sampled_features(pair, config, student, layers):
    """Student's last states and layers, teacher's last states and layers, at the sample's aligned positions, on the CPU."""
    if not (config.layerwise_weight > 0 or config.routing_feature_weight > 0):
        layers = (), ()
    was_training = student.training
    student.eval()
    found = []
    for i in range(0, len(pair.sample), config.batch_size):
        batch = batching.collate(pair.sample[i : i + config.batch_size], *pair.pads, pair.widest).to(student.device)
        at = batch.student_ids, batch.student_windows, batch.student_rows, batch.rows_by_window
        ours = loading.read(student, *at, loading.Taps(layers[0]), batch.student_positions)
        theirs = pair.teacher(batch, loading.Taps(layers[1]))
        state = ours.last.flatten(0, 1)[batch.student_rows]
        found.append([part.float().cpu() for part in (state, *ours.layers, theirs.hidden, *theirs.layers)])
    student.train(was_training)
    state, *rest = (torch.cat(parts) for parts in zip(*found, strict=True))
    num = len(layers[0])
    return state, rest[:num], rest[num], rest[num + 1 :]


def _documents(config):
    documents = corpus.read_documents(config.dataset, config.text_field)
    if config.eval_dataset:
        return documents, *corpus.halve(corpus.read_documents(config.eval_dataset, config.text_field))
    return corpus.split_documents(documents)


def _windows(documents, pair, config):
    return build_windows(documents, pair.student_reader, pair.teacher.reader, config.max_length)


def _numbered(windows):
    return [dataclasses.replace(window, place=place) for place, window in enumerate(windows)]


def _hold_out(windows, pair, config, split, times, on_progress):
    """The `scoring.HeldOut` of some windows; `split`: what a teacher cache knows them as; `times`: its `times_seen`."""
    teacher = pair.teacher.of(split)
    on_batch = functools.partial(on_progress, f"the teacher reads {split} text")
    made, _ = memory.retry_with_smaller_batch(
        lambda size: scoring.prepare_held_out(
            windows,
            teacher,
            pair.head,
            pair.shared,
            size,
            pair.pads,
            pair.widest,
            times,
            config.loss_chunk_size,
            on_batch,
        ),
        config.batch_size,
    )
    return made


def _widest(pair, config, splits):
    """`Pair.widest` for the windows of these splits: twice the longest, as wide as was tried; a teacher cache reads none.
    ValueError where `packing` is on and a model can't.
    """
    found = []
    for side, model in (("student", pair.student), ("teacher", pair.teacher.model)):
        longest = max(int(window_lengths(windows, side).max(initial=0)) for windows in splits)
        fits = config.packing != "off" and model is not None and loading.packs(model, longest)
        if config.packing == "on" and model is not None and not fits:
            raise ValueError(
                f"packing is on, but the {side} ({type(model).__name__}) does not read windows of {longest} tokens in one "
                "row as it reads each alone; set packing auto or off"
            )
        found.append(2 * longest if fits else 0)
    return tuple(found)


def _report(windows, pair):
    """How the pair of tokenizers fits this text."""
    total = windows.total
    return {
        "coverage": total("student_rows") / max(1, total("num_positions")),
        "shared_student": pair.shared.student_share,
        "shared_teacher": pair.shared.teacher_share,
        **{
            f"faithful_{side}": total(f"{side}_faithful") / max(1, total(f"{side}_text"))
            for side in ("student", "teacher")
        },
    }


def _check_amount(windows, config):
    per_step = config.batch_size * config.grad_accumulation
    if len(windows) < per_step:
        raise IncompatiblePairError(
            f"the training text makes {len(windows)} windows of {config.max_length} tokens, one optimizer step takes "
            f"{per_step}",
            "give more text, or lower --batch-size, --grad-accumulation or --max-length",
        )


def _check_scored(parts):
    for name, windows in parts.items():
        if not windows.total("num_bytes"):
            raise IncompatiblePairError(f"the {name} text is too short to score", "give more text")
