"""Inputs of a run, loaded and checked before anything is written: models, tokenizers and windows of text."""

import dataclasses
import functools

import numpy as np
import torch

from kdlib import memory
from kdlib.config import BY_BUCKETS, FEATURES
from kdlib.data import batching, chat, corpus
from kdlib.data.dataset import WindowDataset, build_windows, sample_windows, window_lengths
from kdlib.evaluation import scoring
from kdlib.models import devices, fingerprint, forward, hooks, lora, trie
from kdlib.models.head import Head
from kdlib.models.pair import IncompatiblePairError, Pair, load_pair, load_teacher
from kdlib.models.projector import FeatureMap, LayerRouter, TeacherToStudentProjector
from kdlib.training.objective import Objective

MIN_COVERAGE = 0.01
LONG_SHARE = 0.99
"""Share of the documents that the advised `max_length` holds."""
TEST_FACTOR = 4
HELD_OUT = ("validation", "test")
MEASURED_TOKENS = 4096
"""Student tokens on which the norms of features are measured before training."""


@dataclasses.dataclass
class Inputs:
    """Inputs of a run: the pair, training windows, and `scoring.HeldOut` text for validation and test.

    `alignment` reports how well the tokenizers align on this text, as fractions in [0, 1]. `identity` fingerprints the
    inputs (`fingerprint.fingerprint_inputs`). `held_out_tokens` counts the student's tokens, by split.
    `reports` are the `records.Report`s of what was read, by config key.
    """

    pair: Pair
    train: WindowDataset
    validation: scoring.HeldOut
    test: scoring.HeldOut
    alignment: dict
    identity: dict
    held_out_tokens: dict = dataclasses.field(default_factory=dict)
    reports: dict = dataclasses.field(default_factory=dict)

    @property
    def prints_date(self):
        """Whether a chat template prints the current date."""
        return any(
            chat.prints_date(reader.tokenizer) for reader in (self.pair.student_reader, self.pair.teacher.reader)
        )

    def data_lines(self):
        """Returns what was read and skipped, as one line of text per config key."""
        return [f"{key}: {' '.join(report.lines())}" for key, report in self.reports.items()]


def load(
    config, device="cpu", teacher_dtype=torch.float32, teacher_device=None, documents=None,
    on_progress=lambda phase, done, total: None,
):  # fmt: skip
    """Returns the `Inputs` of a run. Devices are as in `load_pair`. `documents` (training, validation, test) replace
    the config's. Raises ValueError, with one line, for an invalid input. `on_progress(phase, done, total)` is called
    before every task, and may raise; a `total` of 0 is unknown.
    """
    if documents is None:
        config.require_inputs()
    if config.optimizer == "adamw_8bit":
        devices.bitsandbytes("optimizer", config.optimizer, "adamw")
    lora.check_adapters(config)
    on_progress("reading the text", 0, 0)
    reports = {}
    if documents is None:
        documents, reports = _read_documents(config)
    pair = load_pair(config, device, teacher_dtype, teacher_device, on_progress)
    if config.gradient_checkpointing == "on" and not memory.can_recompute(pair.student):
        raise ValueError(
            f"gradient_checkpointing on: {type(pair.student).__name__} has no support for it; set it to auto or off"
        )
    _check_context(pair, config)
    _check_layers(pair, config)
    on_progress("tokenizing the text", 0, 0)
    train, validation, test = (_build_windows(split, pair, config) for split in documents)
    _report_unused(reports, config, zip(documents, (train, validation, test), strict=True))
    _check_train_size(train, config)
    pair.max_row_width = _max_row_width(pair, config, (train, validation, test))
    pair.sample, pair.text = list(sample_windows(train, MEASURED_TOKENS)), train
    _check_not_empty({"validation": validation, "test": test})
    alignment = _alignment(train, pair)
    if alignment["coverage"] < MIN_COVERAGE:
        raise IncompatiblePairError(
            f"only {alignment['coverage']:.1%} of the student's tokens have a comparable teacher position; "
            "these two tokenizers can't be aligned on this text",
            "use a student or a teacher with another tokenizer",
        )
    on_progress("fingerprinting the models", 0, 0)
    teacher = pair.teacher.identity if config.cached else fingerprint.fingerprint_teacher(pair.teacher.model)
    readers = pair.teacher.reader, pair.student_reader
    identity = fingerprint.fingerprint_inputs(teacher, pair.student, *readers, documents, (train, validation, test))
    if config.lora_rank:
        lora.add_adapters(pair.student, config)
    if config.cached:
        pair.teacher.check_inputs(identity)
    budgets = config.eval_tokens, TEST_FACTOR * config.eval_tokens
    samples = [
        [dataclasses.replace(window, window_id=i) for i, window in enumerate(sample_windows(split, num_tokens))]
        for split, num_tokens in zip((validation, test), budgets, strict=True)
    ]
    held_out = _prepare_both(samples, pair, config, train, on_progress)
    if config.check_teacher:
        scoring.check_teacher(pair.teacher, train, held_out[0])
    sizes = {name: int(window_lengths(split).sum()) for name, split in zip(HELD_OUT, (validation, test), strict=True)}
    return Inputs(pair, train, *held_out, alignment, identity, sizes, reports)


def with_cache(loaded, config, on_progress=lambda phase, done, total: None):
    """Returns the `Inputs` of a `config` with a teacher cache, and reuses everything else of `loaded`."""
    teacher = load_teacher(config, None, None, None)
    teacher.check_inputs(loaded.identity)
    buckets = {
        name: value for name, value in loaded.pair.buckets.items() if name != "tries"
    }  # tries hold the live head
    max_row_width = loaded.pair.max_row_width[0], 0
    pair = dataclasses.replace(loaded.pair, teacher=teacher, max_row_width=max_row_width, buckets=buckets)
    samples = [windows_of(split) for split in (loaded.validation, loaded.test)]
    held_out = _prepare_both(samples, pair, config, loaded.train, on_progress)
    identity = {**loaded.identity, **teacher.identity}
    return Inputs(pair, loaded.train, *held_out, loaded.alignment, identity, loaded.held_out_tokens, loaded.reports)


def windows_of(held_out):
    """Returns the windows of a `scoring.HeldOut` in document order."""
    return sorted((window for group in held_out.windows for window in group), key=lambda window: window.window_id)


def load_for_evaluation(
    config, device="cpu", teacher_dtype=torch.float32, teacher_device=None,
    on_progress=lambda phase, done, total: None,
):  # fmt: skip
    """Returns `Inputs` without training text: all of `dataset` is both `validation` and `test`. Devices as in
    `load_pair`; `on_progress` as in `load`.
    """
    config.require_inputs()
    if config.cached:
        raise ValueError("evaluate needs the teacher itself; give --teacher, not --teacher-cache")
    on_progress("reading the text", 0, 0)
    documents = corpus.documents_of(config)
    pair = load_pair(config, device, teacher_dtype, teacher_device, on_progress)
    on_progress("tokenizing the text", 0, 0)
    windows, reports = _build_windows(documents, pair, config), {"dataset": documents.report}
    _report_unused(reports, config.replace(eval_dataset=""), [(documents, windows)])
    _check_not_empty({"given": windows})
    pair.max_row_width = _max_row_width(pair, config, [windows])
    counts = torch.from_numpy(scoring.times_seen(pair.student_reader.vocabulary, windows))
    held_out = _prepare_held_out(windows, pair, config, "held-out", counts, on_progress)
    return Inputs(pair, windows, held_out, held_out, _alignment(windows, pair), {}, reports=reports)


def make_objective(pair, config, student=None):
    """Returns the `Objective` of `config` for a student (default: the pair's), with the modules of its loss terms.
    Raises ValueError if a loss term needs layers or attention maps that a model does not expose.
    """
    student = pair.student if student is None else student
    watch_attention(pair, config, student)
    head = Head(student, pair.student_reader.vocabulary)
    if not config.needs_teacher:
        return Objective(student, head, config)
    modules, options = {}, {}
    if config.kd_method == "projector":
        teacher_rows = pair.teacher.shared_rows(pair.shared).cpu()
        modules["projector"] = TeacherToStudentProjector(teacher_rows.shape[1], head.width)
        modules["projector"].start_from(head.rows(torch.from_numpy(pair.shared.student_ids)).cpu(), teacher_rows)
    elif config.kd_method in BY_BUCKETS:
        options = {"teacher_head": pair.teacher.student_side_head, "buckets": trie.buckets_of(pair, config.kd_method)}
        if config.kd_method == "byte_prefix":
            options["tries"] = trie.tries_of(pair)
    layers, attention = _choose_layers(student.config.get_text_config(), pair.teacher.config, config)
    modules |= _feature_modules(pair, config, student, layers)
    objective = Objective(student, head, config, modules, layers=layers, attention_layers=attention, **options)
    return objective.to(student.device)


def watch_attention(pair, config, student=None):
    """Turns hooks on the attention of student and live teacher on or off, as the loss terms of `config` require."""
    enabled = config.attention_weight > 0 or config.attention_alignment_weight > 0
    hooks.watch_attention(pair.student if student is None else student, enabled)
    if config.needs_teacher and pair.teacher.model is not None:
        hooks.watch_attention(pair.teacher.model, enabled)


def _choose_layers(student_config, teacher_config, config):
    """Returns layers for feature losses and layers for attention losses, each as `(student's, teacher's)`."""
    ours, theirs = student_config.num_hidden_layers, teacher_config.num_hidden_layers
    layers = sorted({round((i + 1) * ours / config.feature_layers) - 1 for i in range(config.feature_layers)} - {-1})
    last = min(config.attention_layers, ours, theirs)
    return (
        (tuple(layers), tuple(max(0, round((i + 1) * theirs / ours) - 1) for i in layers)),
        (tuple(range(ours - last, ours)), tuple(range(theirs - last, theirs))),
    )


def _feature_modules(pair, config, student, layers):
    """Returns the trained maps and the router of the loss terms, with feature norms measured on the pair's sample."""
    width, teacher_width = student.config.get_text_config().hidden_size, pair.teacher.config.hidden_size
    modules = {}
    if config.layerwise_weight > 0:
        modules["layerwise"] = torch.nn.ModuleList(FeatureMap(width, teacher_width) for _ in layers[0])
    if config.routing_feature_weight > 0:
        modules["routing_feature"] = LayerRouter(width, teacher_width, len(layers[1]))
    if config.contrastive_weight > 0:
        modules["contrastive"] = FeatureMap(width, teacher_width)
    if not modules:
        return modules
    state, student_layers, teacher_state, teacher_layers = _sample_features(pair, config, student, layers)
    for feature_map, ours, theirs in zip(modules.get("layerwise", ()), student_layers, teacher_layers, strict=False):
        feature_map.measure(ours, theirs)
    if "routing_feature" in modules:
        modules["routing_feature"].measure(state, teacher_layers)
    if "contrastive" in modules:
        modules["contrastive"].measure(state, teacher_state)
    return modules


@torch.no_grad()
def _sample_features(pair, config, student, layers):
    """Returns last hidden states and layers of student and teacher at the sample's aligned positions, on the CPU."""
    if not (config.layerwise_weight > 0 or config.routing_feature_weight > 0):
        layers = (), ()
    was_training = student.training
    student.eval()
    features = []
    for i in range(0, len(pair.sample), config.batch_size):
        batch = batching.collate(pair.sample[i : i + config.batch_size], *pair.pads, pair.max_row_width).to(
            student.device
        )
        rows = batch.student_ids, batch.student_windows, batch.student_rows, batch.rows_by_window
        ours = forward.read(student, *rows, forward.Taps(layers[0]), batch.student_row_slices)
        theirs = pair.teacher(batch, forward.Taps(layers[1]))
        state = ours.last.flatten(0, 1)[batch.student_rows]
        features.append([part.float().cpu() for part in (state, *ours.layers, theirs.hidden, *theirs.layers)])
    student.train(was_training)
    state, *rest = (torch.cat(parts) for parts in zip(*features, strict=True))
    num = len(layers[0])
    return state, rest[:num], rest[num], rest[num + 1 :]


@torch.no_grad()
def _check_layers(pair, config):
    """Raises ValueError if a model lacks layers or attention that a loss term of `config` reads."""
    if config.cached or not any(getattr(config, f"{name}_weight") > 0 for name in FEATURES):
        return
    watch_attention(pair, config)
    models = pair.student, pair.teacher.model
    layers, attention = _choose_layers(*(model.config.get_text_config() for model in models), config)
    maps, vectors = config.attention_weight > 0, config.attention_alignment_weight > 0
    for model, own_layers, own_attention in zip(models, layers, attention, strict=True):
        ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
        rows = torch.arange(4, device=model.device)
        taps = forward.Taps(own_layers, own_attention if maps else (), own_attention if vectors else ())
        forward.read(model, ids, torch.ones_like(ids), rows, (4,), taps)


@torch.no_grad()
def _check_context(pair, config):
    """Raises ValueError if the student has no positions for windows of `max_length` tokens."""
    context = pair.student_reader.context
    if context and config.max_length > context:
        ids = torch.zeros(1, config.max_length, dtype=torch.long, device=pair.student.device)
        try:
            forward.last_hidden(pair.student, ids, torch.ones_like(ids))
        except Exception as error:  # a table of positions that is too short raises various errors
            if memory.is_out_of_memory(error):
                raise
            raise ValueError(
                f"max_length {config.max_length} is more than the {context} positions that the student {config.student} "
                f"has; set it to {context} at most"
            ) from None


def _read_documents(config):
    """Returns `((train, validation, test), {config key: records.Report})`."""
    documents = corpus.documents_of(config)
    if config.eval_dataset:
        held_out = corpus.documents_of(config, "eval_dataset")
        return (documents, *corpus.halve(held_out)), {"dataset": documents.report, "eval_dataset": held_out.report}
    return corpus.split_documents(documents), {"dataset": documents.report}


def _report_unused(reports, config, splits):
    """Adds documents without windows, and targets beyond windows, to the reports of their sources. Raises ValueError if
    too many records are not used.
    """
    for index, (documents, windows) in enumerate(splits):
        key = "eval_dataset" if index and config.eval_dataset else "dataset"
        for number, problem in windows.problems.items():
            if key in reports:
                reports[key].reject(problem, documents[number].source)
        for number, parts in windows.left_out.items():
            for part in parts if key in reports else ():
                reports[key].leave_out(part, documents[number].source)
        if not index and key in reports:
            reports[key].cut = _cut_note(windows, config)
    for key, report in reports.items():
        report.check(getattr(config, key), config.max_bad_records)


def _cut_note(windows, config):
    """Returns a sentence about the targets of conversations beyond their windows, or an empty string."""
    num_cut = windows.total("cut_targets")
    if not num_cut:
        return ""
    lengths = np.append(windows.column("document_tokens"), windows.problem_lengths)
    enough = int(np.quantile(lengths[lengths > 0], LONG_SHARE, method="higher"))
    share = num_cut / (num_cut + sum(map(len, windows.labels("student"))))
    return (
        f"{share:.1%} of the targets lie beyond max_length {config.max_length}, in "
        f"{np.count_nonzero(windows.column('cut_targets')):,} conversations, and are not trained on; --max-length "
        f"{enough} holds {LONG_SHARE:.0%} of the documents."
    )


def _build_windows(documents, pair, config):
    readers = pair.student_reader, pair.teacher.reader
    return build_windows(documents, *readers, config.max_length, chat.Rendering.of(config))


def _prepare_both(samples, pair, config, train, on_progress):
    """Returns the `scoring.HeldOut` of validation and test; only the test scores are broken down by token frequency."""
    counts = None, torch.from_numpy(scoring.times_seen(pair.student_reader.vocabulary, train))
    return [
        _prepare_held_out(windows, pair, config, split, token_counts, on_progress)
        for windows, split, token_counts in zip(samples, HELD_OUT, counts, strict=True)
    ]


def _prepare_held_out(windows, pair, config, split, token_counts, on_progress):
    teacher = pair.teacher.for_split(split)
    on_batch = functools.partial(on_progress, f"the teacher reads {split} text")
    held_out, _ = memory.retry_with_smaller_batch(
        lambda size: scoring.prepare_held_out(
            windows, teacher, pair.head, pair.shared, size, pair.pads, pair.max_row_width, token_counts,
            config.loss_chunk_size, on_batch,
        ),
        config.batch_size,
    )  # fmt: skip
    return held_out


def _max_row_width(pair, config, splits):
    """Returns `Pair.max_row_width`: twice the longest window, or 0 without packing. Raises ValueError if `packing` is
    on and a model does not support it.
    """
    widths = []
    for side, model in (("student", pair.student), ("teacher", pair.teacher.model)):
        longest = max(int(window_lengths(windows, side).max(initial=0)) for windows in splits)
        if model is not None:
            forward.check_padding(model, longest)
        packs = config.packing != "off" and model is not None and forward.packs(model, longest)
        if config.packing == "on" and model is not None and not packs:
            raise ValueError(
                f"packing is on, but the {side} ({type(model).__name__}) gives other results for packed windows of "
                f"{longest} tokens; set packing auto or off"
            )
        widths.append(2 * longest if packs else 0)
    return tuple(widths)


def _alignment(windows, pair):
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


def _check_train_size(windows, config):
    per_step = config.batch_size * config.grad_accumulation
    if len(windows) < per_step:
        raise IncompatiblePairError(
            f"the training text makes {len(windows)} windows of {config.max_length} tokens, one optimizer step takes "
            f"{per_step}",
            "use more text, or lower --batch-size, --grad-accumulation or --max-length",
        )


def _check_not_empty(splits):
    for name, windows in splits.items():
        if not windows.total("num_bytes"):
            raise IncompatiblePairError(f"the {name} text is too short to score", "use more text")
