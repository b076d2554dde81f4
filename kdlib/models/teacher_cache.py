"""A teacher cache on disk: one pass of a teacher over a text, and the `CachedTeacher` that reads it.

A cache folder holds `cache.json` (its inputs and plan), `teacher/` (tokenizer and configuration, no weights) and shards
`train-00000.safetensors`, ... of complete documents. A shard holds the number of aligned positions of every window. For
every position it holds the teacher's top-k shared tokens as *student* ids, their float16 log-probabilities and tail,
the float32 log-likelihood of the span that starts there, and optionally the last hidden state in float16. For
`byte_prefix` it also holds the top-k outcomes at positions inside a token of the other side (`trie.Trie.shortlist`).
Shards are memory-mapped and written atomically. Reading them cannot execute code.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from kdlib import files
from kdlib.align import vocab
from kdlib.config import BY_BUCKETS
from kdlib.data.dataset import WindowDataset
from kdlib.files import read_json
from kdlib.losses.teacher_signal import TeacherSignal, TopKLogProbs, TopKSpec
from kdlib.models import fingerprint, forward, loading

FORMAT = 2
"""Increases whenever older caches can no longer be read."""
INDEX, READER, HEAD = "cache.json", "teacher", "head.safetensors"
SPLITS = ("train", "validation", "test")
SHARD_POSITIONS = 2**13
"""Minimum of aligned positions per shard, which a kill may lose: 2 MB at 64 tokens, 100 s of a 0.5B teacher on two
cores.
"""
MAX_SHARDS = 200
"""Maximum of shards per split: Kaggle keeps about 500 files."""
TOP_K = 64
"""Tokens per position if `kd_top_k` is 0. On real text they cover nearly all the probability (RESULTS.md)."""
INSIDE_K = (64, 8)
"""Maximum of outcomes at the student's positions inside a teacher token, and at the teacher's (RESULTS.md)."""
INSIDE = ("inside_", "inner_")
"""Prefixes of the tensors for the two kinds of positions of `partial_tokens.PartialTokens`."""
NEED_TEACHER = ("layerwise", "attention", "attention_alignment", "routing_feature")


def needs_hidden(config):
    """Returns whether a run learns from last hidden states."""
    return config.kd_method == "projector" or config.contrastive_weight > 0


def holds_all(config):
    """Returns whether a cache can hold everything that a run learns from."""
    return not any(getattr(config, f"{name}_weight") > 0 for name in NEED_TEACHER)


def settings_of(config, num_shared):
    """Returns the settings of a `Config` that determine a cache's content. `num_shared`: common tokens."""
    method = config.kd_method if config.kd_method in ("shared_vocab", "byte_prefix") else "first_token"
    top_k = min(config.kd_top_k or TOP_K, num_shared)
    return {
        "max_length": config.max_length,
        "eval_tokens": config.eval_tokens,
        "kd_method": method,
        "kd_temperature": config.kd_temperature,
        "kd_top_k": top_k,
        "inside_k": [min(top_k, k) for k in INSIDE_K] if method == "byte_prefix" else [],
        "num_shared": num_shared,
        "hidden": needs_hidden(config),
    }


def check_settings(config, settings):
    """Raises ValueError if a cache with these `settings` cannot serve a run of `config`.

    Text, tokenizers and the distribution's settings must be equal. A run may use fewer tokens, and a cache for
    byte_prefix also serves first_token. Terms that no cache holds need a live teacher.
    """
    for name in NEED_TEACHER:
        if getattr(config, f"{name}_weight") > 0:
            raise ValueError(
                f"{name} needs the teacher's layers, which no cache holds; set {name}_weight to 0 or drop teacher_cache"
            )
    if needs_hidden(config) and not settings["hidden"]:
        name = "kd_method projector" if config.kd_method == "projector" else "contrastive_weight"
        raise ValueError(
            f"{name} needs the teacher's hidden states, which this cache does not hold; write a cache with it set"
        )
    by_buckets = config.kd_method in BY_BUCKETS
    for name in ("max_length", "eval_tokens", *(("kd_method", "kd_temperature") if by_buckets else ())):
        value, cached = getattr(config, name), settings[name]
        if value != cached and (value, cached) != ("first_token", "byte_prefix"):
            raise ValueError(
                f"the teacher cache was written for {name} {cached}, this run has {value}; use that, or write another"
            )
    cached = settings["kd_top_k"]
    if by_buckets and cached < min(config.kd_top_k, settings["num_shared"]):
        raise ValueError(
            f"the teacher cache holds {cached} tokens per position, kd_top_k is {config.kd_top_k}; lower it or rewrite"
        )


def bytes_per_position(settings, student_rows, teacher_width, inside=()):
    """Returns the bytes on disk per training position. `inside`: positions of either kind inside tokens, per position."""
    topk_bytes = lambda k: k * _id_type(student_rows)().nbytes + 2 * (k + 1)  # noqa: E731
    partial = sum(share * topk_bytes(k) for share, k in zip(inside, settings["inside_k"], strict=True))
    return topk_bytes(settings["kd_top_k"]) + 4 + 2 * teacher_width * settings["hidden"] + partial


def plan_shards(windows):
    """Returns at most MAX_SHARDS shards as ranges `[first, last)` of windows. They hold complete documents, and except
    for the last at least SHARD_POSITIONS aligned positions.
    """
    windows = WindowDataset.from_list(windows)
    num_rows = windows.column("student_rows")
    shards, first, count, minimum = [], 0, 0, max(SHARD_POSITIONS, -(-int(np.sum(num_rows)) // MAX_SHARDS))
    starts_document = np.diff(windows.column("document"), prepend=-1) != 0
    for index in range(len(windows)):
        if count >= minimum and starts_document[index]:
            shards.append([first, index])
            first, count = index, 0
        count += int(num_rows[index])
    return [*shards, [first, len(windows)]]


def shard_name(split, number):
    return f"{split}-{number:05d}.safetensors"


def topk_spec(pair, buckets, settings):
    """Returns the `TopKSpec` of a cache for its live teacher."""
    head = pair.teacher.head
    same = head.by_column(vocab.same_ids(pair.teacher.reader.vocabulary, pair.shared))
    ids = torch.from_numpy(buckets.student_ids)
    return TopKSpec(
        settings["kd_top_k"], settings["kd_temperature"], buckets.num, head.by_column(buckets.teacher), same, ids
    )


def write_shard(path, key, signals, student_rows, hidden=False, extra=None, writer=0):
    """Writes one shard atomically: the `TeacherSignal`s of its windows in order, and `extra`, a JSON value. `writer`
    numbers concurrent writers, so that their temporary names differ.
    """
    arrays = {"spans": torch.cat([signal.span_log_probs for signal in signals]).numpy().astype(np.float32)}
    kinds = {"": [signal.topk for signal in signals]}
    if signals[0].partial_topk is not None:
        kinds |= {kind: [signal.partial_topk[i] for signal in signals] for i, kind in enumerate(INSIDE)}
    for kind, topks in kinds.items():
        arrays[f"{kind}counts"] = np.array([len(topk.ids) for topk in topks], dtype=np.int32)
        topk = TopKLogProbs.cat(topks)
        arrays[f"{kind}ids"] = topk.ids.numpy().astype(_id_type(student_rows))
        arrays[f"{kind}log_probs"] = topk.log_probs.numpy().astype(np.float16)
    if extra is not None:
        arrays["best"] = torch.cat([signal.topk.best for signal in signals]).numpy().astype(np.int32)
    if hidden:
        arrays["hidden"] = torch.cat([signal.hidden for signal in signals]).half().numpy()
    _save(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, {"key": key, "more": extra}, writer)


def write_head(path, key, rows, writer=0):
    """Writes the teacher's head rows of the shared tokens, which initialise a projector."""
    _save(path, {"rows": rows.float().contiguous()}, {"key": key, "more": None}, writer)


def _save(path, tensors, metadata, writer):
    metadata = {**metadata, "sha256": {name: _hash(tensor.numpy()) for name, tensor in tensors.items()}}
    with files.atomic(path, writer) as temporary_path:
        safetensors.torch.save_file(tensors, temporary_path, metadata={"kdlib": json.dumps(metadata, sort_keys=True)})


def check_shard(path, key):
    """Raises ValueError if a shard cannot be read or belongs to another cache."""
    _open(path, key)


def key_of(facts):
    """Returns the key of a cache: a hash of its `cache.json`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_facts(folder):
    """Returns the content of `cache.json`. Raises ValueError if it cannot be read or has another format."""
    try:
        facts = read_json(Path(folder) / INDEX)
        version = facts["format"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(f"{folder} holds no teacher cache (no readable {INDEX}); write one with kdlib cache") from None
    if version != FORMAT:
        raise ValueError(f"the teacher cache {folder} has format {version}, this kdlib reads {FORMAT}; write it again")
    return facts


def folders_of(paths):
    """Returns the folders of `--teacher-cache A,B`."""
    return [Path(part.strip()) for part in paths.split(",") if part.strip()]


class Shards:
    """The shards of one split of a cache, in one or several folders, read by window."""

    def __init__(self, folders, facts, split):
        self.files, self.key, self.extras, self.checksums = [], key_of(facts), [], {}
        self.kinds = ("", *INSIDE) if split == "train" and facts["settings"]["inside_k"] else ("",)
        self.shard_of, self.start_of, self.counts = [], *({kind: [] for kind in self.kinds} for _ in range(2))
        for number, (first, last) in enumerate(facts["shards"][split]):
            name = shard_name(split, number)
            path = next((folder / name for folder in folders if (folder / name).exists()), None)
            if path is None:
                raise ValueError(_describe_missing(folders, facts))
            file, metadata = _open(path, self.key)
            for kind in self.kinds:
                counts = file.get_tensor(f"{kind}counts")
                if len(counts) != last - first or file.get_slice(f"{kind}ids").get_shape()[0] != counts.sum():
                    raise _damaged(path, "its tensors do not agree in size")
                self.start_of[kind].append(np.cumsum(counts) - counts)
                self.counts[kind].append(counts)
            names = [name for name in metadata["sha256"] if not name.endswith("counts")]
            self.files.append((path, file, {name: file.get_slice(name) for name in names}))
            self.checksums[number] = metadata["sha256"]
            self.extras.append(metadata["more"])
            self.shard_of.append(np.full(last - first, number))
        self.shard_of = np.concatenate(self.shard_of)
        for kind in self.kinds:
            self.start_of[kind], self.counts[kind] = map(np.concatenate, (self.start_of[kind], self.counts[kind]))

    def window(self, index):
        """Returns `{name: array}` of the positions of a window."""
        number = int(self.shard_of[index])
        path, file, slices = self.files[number]
        for name, checksum in self.checksums.pop(number, {}).items():  # verified at the first read only
            if _hash(file.get_tensor(name)) != checksum:
                raise _damaged(path, f"its {name} do not match their checksum")
        arrays = {}
        for name, tensor in slices.items():
            kind = next((kind for kind in INSIDE if name.startswith(kind)), "")
            count = int(self.counts[kind][index])
            start = int(self.start_of[kind][index]) if count else 0  # a slice must not start behind the last position
            is_empty = not tensor.get_shape()[0]  # of which safetensors gives no slice
            arrays[name] = file.get_tensor(name) if is_empty else tensor[start : start + count]
        for kind in self.kinds:
            arrays[f"{kind}log_probs"] = _renormalise(arrays[f"{kind}log_probs"].astype(np.float32))
        return arrays


def _renormalise(log_probs):
    """Returns rounded log-probabilities that sum to 1, except for rows that stand for no probability mass."""
    sums = np.exp(log_probs).sum(axis=1, keepdims=True)
    return log_probs - np.log(sums, where=sums > 0.5, out=np.zeros_like(sums))


class CachedTeacher:
    """A teacher read from disk, with the same call and result as `teacher.Teacher`.

    `folders` together hold a complete cache. `identity` is compared between runs. `model` and `head` are None. `score`
    and `sample` are the live teacher's score and text on a held-out split.
    """

    def __init__(self, folders, split="train"):
        self.folders, self.split = [Path(folder) for folder in folders], split
        facts = [read_facts(folder) for folder in self.folders]
        self.facts = facts[0]
        if others := [folder for folder, other in zip(self.folders, facts, strict=True) if other != self.facts]:
            raise ValueError(f"{others[0]} and {self.folders[0]} hold parts of different teacher caches")
        self.settings = self.facts["settings"]
        self.model = self.head = self.student_side_head = None
        self.num_columns = 0
        self.config = loading.load_config(self.folders[0] / READER, "cached teacher")
        self.reader = loading.load_reader(self.folders[0] / READER, "cached teacher", self.config)
        self.shards = Shards(self.folders, self.facts, split)
        self.identity = {name: self.facts["identity"][name] for name in ("teacher", "teacher_dtype")}
        self.identity["signal"] = key_of(self.facts)
        extra = self.shards.extras[0] or {}
        self.score = extra.get("score")
        self.sample = extra.get("says")

    def for_split(self, split):
        """Returns the same teacher on another split of the text."""
        return CachedTeacher(self.folders, split)

    def shared_rows(self, shared):
        """Returns the head's rows for the tokens of a `vocab.SharedVocabulary`, `[S, Dt]`."""
        file, _ = _open(self.folders[0] / HEAD, key_of(self.facts))
        return torch.from_numpy(file.get_tensor("rows"))

    def check_inputs(self, identity):
        """Raises ValueError if a run's text or tokenizers (`fingerprint.fingerprint_inputs`) are not the cache's."""
        for name in ("student_tokenizer", "teacher_tokenizer", "text", "windows"):
            own, cached = identity[name][:8], self.facts["identity"][name][:8]
            if own != cached:
                raise ValueError(
                    f"the teacher cache is of another run: {fingerprint.NAMES[name]} ({cached}, here {own}); rewrite it"
                )

    def __call__(self, batch, taps=forward.Taps(), spans=False, inner=False):  # noqa: B008 - frozen
        assert taps == forward.Taps()
        windows = [self.shards.window(index) for index in batch.window_ids]
        assert tuple(len(window["ids"]) for window in windows) == tuple(batch.rows_by_window)
        device = batch.student_ids.device
        tensors = {
            name: torch.from_numpy(np.concatenate([window[name] for window in windows])).to(device)
            for name in windows[0]
        }
        kinds = ("", *INSIDE) if inner else ("",)
        topks = [TopKLogProbs(tensors[f"{kind}ids"].long(), tensors[f"{kind}log_probs"]) for kind in kinds]
        if "best" in tensors:
            topks[0] = TopKLogProbs(topks[0].ids, topks[0].log_probs, tensors["best"].long())
        hidden = tensors["hidden"].float() if "hidden" in tensors else None
        partial_topk = tuple(topks[1:]) if inner else None
        return TeacherSignal(hidden, tensors["spans"] if spans else None, topks[0], partial_topk=partial_topk)


def _hash(array):
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()[:16]


def _id_type(student_rows):
    return np.uint16 if student_rows <= 2**16 else np.uint32


def _open(path, key):
    """Returns `(file, metadata)` of a shard. Raises ValueError if it cannot be read or belongs to another cache."""
    try:
        file = safetensors.safe_open(path, framework="np")
        metadata = json.loads(file.metadata()["kdlib"])
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _damaged(path, reason) from None
    if metadata["key"] != key:
        raise ValueError(f"{path} is a shard of another teacher cache ({metadata['key']}, expected {key})")
    return file, metadata


def _damaged(path, reason):
    return ValueError(
        f"shard {path} of the teacher cache is damaged ({reason}); remove it, and write it again with kdlib cache"
    )


def missing_shards(folders, facts):
    """Returns `(split, number)` of the planned shards that are in none of these folders."""
    planned = [(split, number) for split in SPLITS for number in range(len(facts["shards"][split]))]
    return [shard for shard in planned if not any((Path(folder) / shard_name(*shard)).exists() for folder in folders)]


def _describe_missing(folders, facts):
    num_planned, num_missing = sum(map(len, facts["shards"].values())), len(missing_shards(folders, facts))
    return (
        f"the teacher cache is not complete: {num_missing} of {num_planned} shards are missing; run kdlib cache again"
    )
