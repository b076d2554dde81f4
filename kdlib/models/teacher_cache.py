"""A teacher cache: what a teacher said of a text once, on the disk, and the `CachedTeacher` that reads it out.

A cache folder holds `cache.json` (what it was made of, and its plan), `teacher/` (tokenizer and configuration, no weights)
and shards `train-00000.safetensors`, ..., each of whole documents: for every window how many aligned positions it has, and
for every position the teacher's likeliest shared tokens as *student* ids with log-probabilities in float16, their tail, the
log-likelihood of the span that starts there in float32 and, where asked for, the last hidden state in float16; for every
position inside a token of the other side, where `inside_tokens` asks for it, its likeliest outcomes and a tail
(`trie.Trie.shortlist`). Shards are memory-mapped; one that is there is whole. Nothing here can run code while it is read.
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
from kdlib.models import fingerprint, loading

FORMAT = 2
"""Goes up when a cache of before can no longer be read."""
INDEX, READER, HEAD = "cache.json", "teacher", "head.safetensors"
SPLITS = ("train", "validation", "test")
SHARD_POSITIONS = 2**13
"""Aligned positions in a shard, at least: what a kill can cost. 2 MB at 64 tokens; 100 s of a 0.5B teacher on two cores."""
MAX_SHARDS = 200
"""Shards of one text, at most: Kaggle keeps some 500 files."""
TOP_K = 64
"""Tokens kept of a position where `kd_top_k` is 0. Of real text they hold nearly all the probability (RESULTS.md)."""
INSIDE_K = (64, 8)
"""Outcomes kept of the student's positions inside a teacher's token, at most, and of the teacher's (RESULTS.md)."""
INSIDE = ("inside_", "inner_")
"""What stands before the names of what is kept of the two kinds of `partial_tokens.PartialTokens`'s positions."""
NEED_TEACHER = ("layerwise", "attention", "attention_alignment", "routing_feature")
NEED_HIDDEN = ("projector", "contrastive")


def needs_hidden(config):
    """Whether a run learns from last hidden states."""
    return config.kd_method == "projector" or config.contrastive_weight > 0


def holds_all(config):
    """Whether a cache can hold all that a run learns from."""
    return not any(getattr(config, f"{name}_weight") > 0 for name in NEED_TEACHER)


def settings_of(config, num_shared):
    """What of a `Config` decides what is in a cache. `num_shared`: tokens in both vocabularies."""
    method = config.kd_method if config.kd_method in ("shared_vocab", "inside_tokens") else "shared_prefix"
    top_k = min(config.kd_top_k or TOP_K, num_shared)
    return {
        "max_length": config.max_length,
        "eval_tokens": config.eval_tokens,
        "kd_method": method,
        "kd_temperature": config.kd_temperature,
        "kd_top_k": top_k,
        "inside_k": [min(top_k, k) for k in INSIDE_K] if method == "inside_tokens" else [],
        "num_shared": num_shared,
        "hidden": needs_hidden(config),
    }


def refuse_settings(config, settings):
    """Raise ValueError where a cache with these `settings` can't serve a run of `config`. The rule: text, tokenizers and how
    a distribution is made must be the cache's; the tokens kept may be fewer; what no cache holds needs a live teacher. One
    for inside_tokens holds all of shared_prefix.
    """
    for name in NEED_TEACHER:
        if getattr(config, f"{name}_weight") > 0:
            raise ValueError(
                f"{name} reads inside the teacher, which no cache holds; set {name}_weight to 0 or drop teacher_cache"
            )
    if needs_hidden(config) and not settings["hidden"]:
        name = "kd_method projector" if config.kd_method == "projector" else "contrastive_weight"
        raise ValueError(
            f"{name} needs the teacher's hidden states, which this cache does not hold; write one with it set"
        )
    shared = config.kd_method in BY_BUCKETS
    for name in ("max_length", "eval_tokens", *(("kd_method", "kd_temperature") if shared else ())):
        ours, held = getattr(config, name), settings[name]
        if ours != held and (ours, held) != ("shared_prefix", "inside_tokens"):
            raise ValueError(
                f"the teacher cache was written for {name} {held}, this run has {ours}; take that, or write another"
            )
    held = settings["kd_top_k"]
    if shared and held < min(config.kd_top_k, settings["num_shared"]):
        raise ValueError(
            f"the teacher cache holds {held} tokens a position, kd_top_k is {config.kd_top_k}; lower it, or write another"
        )


def bytes_a_position(settings, student_rows, teacher_width, inside=()):
    """Bytes of a training position on the disk. `student_rows`: rows of the student's vocabulary; `inside`: positions inside
    tokens for each, of either kind.
    """
    of = lambda k: k * _id_type(student_rows)().nbytes + 2 * (k + 1)  # noqa: E731
    more = sum(share * of(k) for share, k in zip(inside, settings["inside_k"], strict=True))
    return of(settings["kd_top_k"]) + 4 + 2 * teacher_width * settings["hidden"] + more


def plan(windows):
    """Shards `[first, last)` of windows: whole documents, at least SHARD_POSITIONS aligned positions but for the last, and
    no more than MAX_SHARDS of them.
    """
    shards, first, count, whole = [], 0, 0, WindowDataset.from_list(windows)
    least = max(SHARD_POSITIONS, -(-int(np.sum(whole.column("student_rows"))) // MAX_SHARDS))
    begins = np.diff(whole.column("document"), prepend=-1) != 0
    for index, (num_rows, begins_document) in enumerate(zip(whole.column("student_rows"), begins, strict=True)):
        if count >= least and begins_document:
            shards.append([first, index])
            first, count = index, 0
        count += int(num_rows)
    return [*shards, [first, len(windows)]]


def shard_name(split, number):
    return f"{split}-{number:05d}.safetensors"


def shortlist(pair, buckets, settings):
    """The `TopKSpec` that a cache asks a live teacher for."""
    head = pair.teacher.head
    same = head.by_column(vocab.same_ids(pair.teacher.reader.vocabulary, pair.shared))
    ids = torch.from_numpy(buckets.student_ids)
    return TopKSpec(
        settings["kd_top_k"], settings["kd_temperature"], buckets.num, head.by_column(buckets.teacher), same, ids
    )


def write_shard(path, key, by_window, student_rows, hidden=False, more=None, writer=0):
    """Write one shard, whole or not at all: `by_window` are the `TeacherSignal`s of its windows in order; `more` is a plain
    value kept with it; `writer` numbers who writes, so that no two use the same name beside.
    """
    arrays = {"spans": torch.cat([each.span_log_probs for each in by_window]).numpy().astype(np.float32)}
    kinds = {"": [each.topk for each in by_window]}
    if by_window[0].partial_topk is not None:
        kinds |= {name: [each.partial_topk[i] for each in by_window] for i, name in enumerate(INSIDE)}
    for kind, tops in kinds.items():
        arrays[f"{kind}counts"] = np.array([len(each.ids) for each in tops], dtype=np.int32)
        top = TopKLogProbs.cat(tops)
        arrays[f"{kind}ids"] = top.ids.numpy().astype(_id_type(student_rows))
        arrays[f"{kind}log_probs"] = top.log_probs.numpy().astype(np.float16)
    if more is not None:
        arrays["best"] = torch.cat([each.topk.best for each in by_window]).numpy().astype(np.int32)
    if hidden:
        arrays["hidden"] = torch.cat([each.hidden for each in by_window]).half().numpy()
    _save(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, {"key": key, "more": more}, writer)


def write_head(path, key, rows, writer=0):
    """Keep the teacher's head rows of the shared tokens, which a projector starts from."""
    _save(path, {"rows": rows.float().contiguous()}, {"key": key, "more": None}, writer)


def _save(path, tensors, facts, writer):
    facts = {**facts, "sha256": {name: _hash(tensor.numpy()) for name, tensor in tensors.items()}}
    with files.atomic(path, writer) as beside:
        safetensors.torch.save_file(tensors, beside, metadata={"kdlib": json.dumps(facts, sort_keys=True)})


def refuse_shard(path, key):
    """Raise ValueError where a shard can't be read or is another cache's."""
    _opened(path, key)


def key_of(facts):
    """The name of a cache: a hash of all that it was made of."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_facts(folder):
    """What `cache.json` says; ValueError where there is none that can be read."""
    try:
        facts = read_json(Path(folder) / INDEX)
        found = facts["format"]
    except (OSError, ValueError, TypeError, KeyError):
        raise ValueError(
            f"{folder} holds no teacher cache (no {INDEX} that can be read); make one with kdlib cache"
        ) from None
    if found != FORMAT:
        raise ValueError(f"the teacher cache {folder} has format {found}, this kdlib reads {FORMAT}; write it again")
    return facts


def folders_of(named):
    """The folders of `--teacher-cache A,B`."""
    return [Path(part.strip()) for part in named.split(",") if part.strip()]


class Shards:
    """The shards of one split of a cache, in one folder or several: what a position holds, by window."""

    def __init__(self, folders, facts, split):
        self.files, self.key, self.more, self.unread = [], key_of(facts), [], {}
        self.kinds = ("", *INSIDE) if split == "train" and facts["settings"]["inside_k"] else ("",)
        self.shard_of, self.start_of, self.counts = [], *({kind: [] for kind in self.kinds} for _ in range(2))
        for number, (first, last) in enumerate(facts["shards"][split]):
            name = shard_name(split, number)
            path = next((folder / name for folder in folders if (folder / name).exists()), None)
            if path is None:
                raise ValueError(_incomplete(folders, facts))
            file, told = _opened(path, self.key)
            for kind in self.kinds:
                counts = file.get_tensor(f"{kind}counts")
                if len(counts) != last - first or file.get_slice(f"{kind}ids").get_shape()[0] != counts.sum():
                    raise _damaged(path, "its parts do not agree")
                self.start_of[kind].append(np.cumsum(counts) - counts)
                self.counts[kind].append(counts)
            wanted = [name for name in told["sha256"] if not name.endswith("counts")]
            self.files.append((path, file, {name: file.get_slice(name) for name in wanted}))
            self.unread[number] = told["sha256"]
            self.more.append(told["more"])
            self.shard_of.append(np.full(last - first, number))
        self.shard_of = np.concatenate(self.shard_of)
        for kind in self.kinds:
            self.start_of[kind], self.counts[kind] = map(np.concatenate, (self.start_of[kind], self.counts[kind]))

    def window(self, place):
        """`{name: array}` of the positions of a window."""
        number = int(self.shard_of[place])
        path, file, slices = self.files[number]
        for name, told in self.unread.pop(number, {}).items():  # once, as it is first read
            if _hash(file.get_tensor(name)) != told:
                raise _damaged(path, f"its {name} were changed after they were written")
        found = {}
        for name, part in slices.items():
            kind = next((each for each in INSIDE if name.startswith(each)), "")
            count = int(self.counts[kind][place])
            start = int(self.start_of[kind][place]) if count else 0  # a slice may not begin behind the last position
            found[name] = part[start : start + count]
        for kind in self.kinds:
            found[f"{kind}log_probs"] = _distributions(found[f"{kind}log_probs"].astype(np.float32))
        return found


def _distributions(log_probs):
    """Rounded numbers as distributions again, but for those that stand for nothing said."""
    sums = np.exp(log_probs).sum(axis=1, keepdims=True)
    return log_probs - np.log(sums, where=sums > 0.5, out=np.zeros_like(sums))


class CachedTeacher:
    """A teacher that has spoken before: the same call and the same type as `teacher.Teacher`, from the disk.

    `folders` together hold a whole cache. `identity` is what a run is compared by; there is no `model` and no `head`.
    """

    def __init__(self, folders, split="train"):
        self.folders, self.split = [Path(folder) for folder in folders], split
        every = [read_facts(folder) for folder in self.folders]
        self.facts = every[0]
        if other := [folder for folder, facts in zip(self.folders, every, strict=True) if facts != self.facts]:
            raise ValueError(f"{other[0]} and {self.folders[0]} hold parts of different teacher caches")
        self.settings = self.facts["settings"]
        self.model = self.head = self.student_side_head = None
        self.num_columns = 0
        self.config = loading.load_config(self.folders[0] / READER, "cached teacher")
        self.reader = loading.load_reader(self.folders[0] / READER, "cached teacher", self.config)
        self.shards = Shards(self.folders, self.facts, split)
        self.identity = {name: self.facts["identity"][name] for name in ("teacher", "teacher_dtype")}
        self.identity["signal"] = key_of(self.facts)
        more = self.shards.more[0] or {}
        self.known = more.get("score")
        self.says = more.get("says")

    def of(self, split):
        """The same teacher on another split of the text."""
        return CachedTeacher(self.folders, split)

    def shared_rows(self, shared):
        """The head's rows for the tokens of a `vocab.SharedVocabulary`, `[S, Dt]`."""
        file, _ = _opened(self.folders[0] / HEAD, key_of(self.facts))
        return torch.from_numpy(file.get_tensor("rows"))

    def refuse_other(self, known):
        """Raise ValueError where the text or a tokenizer of a run (`fingerprint.fingerprint_inputs`) is not the cache's."""
        for name in ("student_tokenizer", "teacher_tokenizer", "text", "windows"):
            ours, held = known[name][:8], self.facts["identity"][name][:8]
            if ours != held:
                raise ValueError(
                    f"the teacher cache is of another run: {fingerprint.NAMES[name]} ({held}, here {ours}); write a new one"
                )

    def __call__(self, batch, taps=loading.Taps(), spans=False, inner=False):  # noqa: B008 - frozen
        assert taps == loading.Taps()
        found = [self.shards.window(place) for place in batch.places]
        assert tuple(len(each["ids"]) for each in found) == tuple(batch.rows_by_window)
        device = batch.student_ids.device
        joined = {
            name: torch.from_numpy(np.concatenate([each[name] for each in found])).to(device) for name in found[0]
        }
        top = TopKLogProbs(
            joined["ids"].long(), joined["log_probs"], joined["best"].long() if "best" in joined else None
        )
        hidden = joined["hidden"].float() if "hidden" in joined else None
        said = (
            tuple(TopKLogProbs(joined[f"{kind}ids"].long(), joined[f"{kind}log_probs"]) for kind in INSIDE)
            if inner
            else None
        )
        return TeacherSignal(hidden, joined["spans"] if spans else None, top, partial_topk=said)


def _hash(array):
    return hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()[:16]


def _id_type(student_rows):
    return np.uint16 if student_rows <= 2**16 else np.uint32


def _opened(path, key):
    """`(file, facts)` of a shard; ValueError where it can't be read or is of another cache."""
    try:
        file = safetensors.safe_open(path, framework="np")
        told = json.loads(file.metadata()["kdlib"])
    except (OSError, ValueError, TypeError, KeyError, safetensors.SafetensorError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _damaged(path, reason) from None
    if told["key"] != key:
        raise ValueError(f"{path} is a shard of another teacher cache ({told['key']}, expected {key})")
    return file, told


def _damaged(path, reason):
    return ValueError(
        f"shard {path} of the teacher cache is damaged ({reason}); remove it, and write it again with kdlib cache"
    )


def missing(folders, facts):
    """`(split, number)` of the shards that are in none of these folders."""
    planned = [(split, number) for split in SPLITS for number in range(len(facts["shards"][split]))]
    return [which for which in planned if not any((Path(folder) / shard_name(*which)).exists() for folder in folders)]


def _incomplete(folders, facts):
    planned, left = sum(map(len, facts["shards"].values())), len(missing(folders, facts))
    return f"the teacher cache is not complete: {left} of {planned} shards are missing; go on with it by kdlib cache"
