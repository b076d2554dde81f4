"""One pass of the teacher over a run's text, kept as a teacher cache (`models.teacher_cache`) that runs then learn from."""

import dataclasses
from itertools import accumulate
from pathlib import Path

from kdlib import environment, files, memory
from kdlib.align import vocab
from kdlib.clock import Clock, parse_duration
from kdlib.data import batching
from kdlib.data.dataset import WindowDataset
from kdlib.evaluation import samples
from kdlib.files import write_json
from kdlib.losses import partial_tokens
from kdlib.models import devices, teacher_cache, trie
from kdlib.models.teacher_cache import HEAD, INDEX, READER
from kdlib.session import inputs, time_budget


def write(config, out, clock=None, others=(), writer=(0, 1), on_progress=lambda phase, done, total: None):
    """Write the teacher cache of `config` into the folder `out`, or go on with it: a generator of records.

    The first is of kind `plan` (`windows positions shards missing bytes bytes_a_position`), made before anything is written;
    then one of kind `shard` after each (`done shards positions left_s`), at the end one of kind `complete` or `paused` (with
    `reason`). A shard is whole or not there, so a pass that was cut off anywhere is gone on with by the same call, and ends
    with the same bytes.

    `others`: folders with parts of the same cache, which are taken over. `writer` `(i, n)`: this is the i-th (from 0) of n
    that share the work, in one folder or each in its own; processes of one launch share a writer's part among them.
    Raises ValueError where the config, the text or the folder won't do.
    """
    clock = clock or Clock()
    started = clock.now() - environment.session_age_s()
    if config.cached:
        raise ValueError("a teacher cache is written by the teacher itself; give --teacher, not --teacher-cache")
    seconds, out = parse_duration(config.time_budget), Path(out)
    accelerator = devices.accelerator(config.amp_dtype)
    _refuse_folder(out)
    dtype = devices.teacher_dtype(accelerator)
    loaded = inputs.load(config, accelerator.device, dtype, on_progress=on_progress)
    writing = CacheWriter(config, loaded, out, clock, others, worker_shard_ids(accelerator, *writer), on_progress)
    yield from writing.run(seconds, started)


def worker_shard_ids(accelerator, index=0, count=1):
    """`(which, of how many)` writers a process is, where a launch of several is the writer `index` of `count`."""
    return index * accelerator.num_processes + accelerator.process_index, count * accelerator.num_processes


class CacheWriter:
    """The state of `write`: the live teacher of `loaded` (`inputs.Inputs`) reads where it is."""

    def __init__(self, config, loaded, out, clock, others, writer, on_progress=lambda phase, done, total: None):
        self.on_progress, self.num_done, self.num_planned = on_progress, 0, 0
        self.batch_s, self.batch_at = 0.0, None
        self.config, self.out, self.clock, self.others = config, out, clock, [Path(folder) for folder in others]
        self.own_shards, self.writers = writer
        self.loaded, self.pair = loaded, loaded.pair
        self.device = self.pair.teacher.model.device
        held_out = [sorted((w for group in split.windows for w in group), key=lambda window: window.place)
                    for split in (self.loaded.validation, self.loaded.test)]  # fmt: skip
        self.windows = dict(zip(teacher_cache.SPLITS, (self.loaded.train, *held_out), strict=True))
        self.facts = self._facts()
        self.key = teacher_cache.key_of(self.facts)
        self.tries = trie.tries_of(self.pair) if config.kd_method == "inside_tokens" else None
        self.batch_size = config.batch_size
        self.stop_signals = time_budget.StopSignals()

    @property
    def num_shards(self):
        return sum(map(len, self.facts["shards"].values()))

    def _facts(self):
        settings = teacher_cache.settings_of(self.config, len(self.pair.shared))
        return {
            "format": teacher_cache.FORMAT,
            "settings": {**settings, "batch_size": self.config.batch_size},
            "identity": {
                name: told for name, told in self.loaded.identity.items() if name not in ("student", "signal")
            },
            "shards": {split: teacher_cache.plan(windows) for split, windows in self.windows.items()},
        }

    def run(self, seconds, started):
        """The records of `write`, in a session of so many `seconds` since `started`."""
        self.ends = started + seconds
        first = self.plan()
        yield first
        self._open(first)
        lacking = set(teacher_cache.missing([self.out], self.facts))
        own = [which for place, which in enumerate(self._every()) if place % self.writers == self.own_shards]
        own = [which for which in own if which in lacking]
        positions = [self._num_positions(*which) for which in own]
        self.num_done, self.num_planned = 0, sum(positions)
        self.stop_signals.listen()
        try:
            begun = self.clock.now()
            for place, which in enumerate(own):
                ahead = (self.clock.now() - begun) / max(1, self.num_done) * positions[place]
                late = place and self.clock.now() + ahead > self.ends  # one of them may always try
                if reason := "the time budget has no room for another shard" if late else self._write(*which):
                    yield self._paused(reason)
                    return
                self.num_done = sum(positions[: place + 1])
                left = (self.clock.now() - begun) * (self.num_planned / max(1, self.num_done) - 1.0)
                yield {"kind": "shard", "done": place + 1, "of": len(own), "shards": self.num_shards, "left_s": left}
        finally:
            self.stop_signals.ignore()
        left = len(teacher_cache.missing([self.out], self.facts))
        yield {"kind": "complete", "missing": left}

    def _num_positions(self, split, number):
        first, last = self.facts["shards"][split][number]
        return sum(len(window.student_rows) for window in self.windows[split][first:last])

    def _stop_reason(self):
        """Why no further batch may begin; empty if one as long as the longest before may."""
        now = self.clock.now()
        self.batch_s, self.batch_at = max(self.batch_s, now - (self.batch_at or now)), now
        if self.stop_signals.asked:
            return self.stop_signals.asked
        return "the time budget is used up" if now + self.batch_s > self.ends else ""

    def _every(self):
        return [(split, number) for split in teacher_cache.SPLITS for number in range(len(self.facts["shards"][split]))]

    def _paused(self, reason):
        left = len(teacher_cache.missing([self.out], self.facts))
        return {"kind": "paused", "reason": reason, "missing": left}

    def plan(self):
        """The first record of `write`: how much it will be."""
        rows, width = self.pair.student_reader.vocabulary.num_rows, self.pair.teacher.head.width
        inside = self._inside_a_position() if self.tries else ()
        a_position = teacher_cache.bytes_a_position(self.facts["settings"], rows, width, inside)
        positions = {
            split: WindowDataset.from_list(windows).total("student_rows") for split, windows in self.windows.items()
        }
        size = a_position * sum(positions.values())
        there = [folder for folder in (self.out, *self.others) if (folder / INDEX).exists()]
        return {
            "kind": "plan",
            "windows": sum(map(len, self.windows.values())),
            "tokens": WindowDataset.from_list(self.windows["train"]).total("student_ids"),
            "positions": sum(positions.values()),
            "shards": len(self._every()),
            "missing": len(teacher_cache.missing(there, self.facts)),
            "bytes": size,
            "bytes_a_position": a_position,
        }

    def _inside_a_position(self):
        """Positions inside tokens for each common one, of either kind, on the pair's sample."""
        walks = [
            partial_tokens.PartialTokens.build(self.tries, batching.collate([window], *self.pair.pads))
            for window in self.pair.sample
        ]
        counts = [(len(each.positions), len(each.inner), len(each.more)) for each in walks]
        ours, theirs, common = map(sum, zip(*counts, strict=True))
        return ours / max(1, common), theirs / max(1, common)

    def _open(self, told):
        """The folder with everything but the shards, and the shards that others have."""
        for folder in (self.out, *self.others):
            if (folder / INDEX).exists() or folder in self.others:
                _refuse_other(folder, teacher_cache.read_facts(folder), self.facts)
        self.refuse_full_disk(told)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._save_reader()
            if teacher_cache.needs_hidden(self.config) and not (self.out / HEAD).exists():
                teacher_cache.write_head(
                    self.out / HEAD, self.key, self.pair.teacher.shared_rows(self.pair.shared).cpu(), self.own_shards
                )
            if not (self.out / INDEX).exists():
                write_json(self.out / INDEX, self.facts, self.own_shards)
            self._take_over()
        except OSError as error:
            raise ValueError(f"--out {self.out} can't be written: {error.strerror or error}") from None

    def refuse_full_disk(self, told):
        """Raise ValueError where the disk has no room for what the `plan` tells."""
        share = told["bytes"] * told["missing"] / max(1, told["shards"]) / self.writers
        there = next(folder for folder in [self.out, *self.out.absolute().parents] if folder.exists())
        free = environment.free_bytes(there) - environment.disk_reserve_bytes()
        if share > free:
            raise ValueError(
                f"the cache needs {share / 1e9:.2f} GB more and the disk of {self.out} has {free / 1e9:.2f} GB; lower "
                "kd_top_k, take less text, or share the work between several writers"
            )

    def _save_reader(self):
        """The teacher's tokenizer and configuration: all that a run needs to load of it."""
        if (self.out / READER).exists():
            return
        try:
            with files.atomic(self.out / READER, self.own_shards, replace=False) as beside:
                self.pair.teacher.reader.tokenizer.save_pretrained(beside)
                self.pair.teacher.config.save_pretrained(beside)
        except OSError:
            if not (self.out / READER).exists():
                raise  # else another writer was faster

    def _take_over(self):
        for which in teacher_cache.missing([self.out], self.facts):
            path = self.out / teacher_cache.shard_name(*which)
            for folder in self.others:
                if (folder / path.name).exists():
                    teacher_cache.refuse_shard(folder / path.name, self.key)
                    files.copy(folder / path.name, path, self.own_shards)
                    break

    def _write(self, split, number):
        """Writes one shard; the reason if the session ended before that, else empty."""
        first, last = self.facts["shards"][split][number]
        windows = self.windows[split][first:last]
        settings = self.facts["settings"]
        if split == "train":
            buckets, wanted = trie.buckets_of(self.pair, settings["kd_method"]), settings
        else:  # judged by the same buckets whatever was learned from
            buckets = vocab.tail_buckets(
                self.pair.student_reader.vocabulary, self.pair.teacher.reader.vocabulary, self.pair.shared
            )
            wanted = {**settings, "kd_temperature": 1.0}
        spec = teacher_cache.shortlist(self.pair, buckets, wanted)
        tries = self.tries if split == "train" else None
        found, self.batch_size = memory.retry_with_smaller_batch(
            lambda size: self._ask(windows, spec, tries, size), self.batch_size
        )
        if isinstance(found, str):
            return found
        more = None
        if split != "train":  # the first shard of a split keeps what a verdict needs
            more = {} if number else self._judged(split)
        path = self.out / teacher_cache.shard_name(split, number)
        rows = self.pair.student_reader.vocabulary.num_rows
        teacher_cache.write_shard(
            path, self.key, found, rows, settings["hidden"] and split == "train", more, self.own_shards
        )
        return ""

    def _ask(self, windows, spec, tries, size):
        """The teacher's signals by window, in order, with its outcomes inside tokens if there are `tries`, from batches of
        `size`; the reason instead if the session ends before that.
        """
        order = sorted(range(len(windows)), key=lambda place: len(windows[place].teacher_ids))
        found, num_done, self.batch_at, head = {}, self.num_done, None, self.pair.teacher.head
        bucket_of = head.by_column(trie.buckets_of(self.pair, "inside_tokens").teacher) if tries else None
        for i in range(0, len(order), size):
            if reason := self._stop_reason():
                return reason
            self.on_progress("the teacher reads the text, positions", num_done, self.num_planned)
            places = order[i : i + size]
            batch = batching.collate([windows[place] for place in places], *self.pair.pads).to(self.device)
            signal = self.pair.teacher(batch, spans=True, shortlist=spec, inner=tries is not None)
            parts = [(signal, batch.rows_by_window)]
            if tries:
                walked = partial_tokens.PartialTokens.build(tries, batch)
                how = self.facts["settings"]["inside_k"], self.facts["settings"]["kd_temperature"]
                said = walked.shortlists(tries, signal, head.decode, bucket_of, *how)
                parts += zip(said, walked.by_window(batch.rows_by_window), strict=True)
            by_window = zip(*(_by_window(part.to("cpu"), counts) for part, counts in parts), strict=True)
            for place, (signal, *said) in zip(places, by_window, strict=True):
                found[place] = dataclasses.replace(signal, said=tuple(said) or None)
            num_done += batch.num_aligned
        return [found[place] for place in range(len(windows))]

    def _judged(self, split):
        """What a verdict wants of the teacher itself: its score, and how it goes on with a text."""
        held_out = getattr(self.loaded, split)
        score = held_out.teacher_score.to_dict()
        opening = samples.openings(held_out, self.pair.student_reader.tokenizer, 1)[0]
        return {"score": score, "says": samples.teacher_says(self.pair.teacher, opening)}


def _by_window(part, counts):
    """A part of a signal cut into as many rows as each window has."""
    return [part.rows(slice(end - count, end)) for count, end in zip(counts, accumulate(counts), strict=True)]


def _refuse_folder(out):
    """Raise ValueError where a folder can't take a cache."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / INDEX).exists():
        left = {path.name for path in out.iterdir() if not path.name.endswith(".tmp")} - {READER, HEAD}
        if left:
            raise ValueError(f"--out {out} holds other files; give a new folder (nothing was changed)")


def _refuse_other(folder, held, wanted):
    """Raise ValueError where a folder's cache is another one, saying in what."""
    if held == wanted:
        return
    ours, theirs = ({**facts["settings"], **facts["identity"], "plan": facts["shards"]} for facts in (wanted, held))
    odd = [name for name in ours if ours[name] != theirs.get(name)]
    told = "; ".join(
        f"{name} was {theirs.get(name)}, is {ours[name]}" if name != "plan" else "its plan" for name in odd
    )
    raise ValueError(f"{folder} holds another teacher cache ({told}); give a new --out, or go on as it was begun")
