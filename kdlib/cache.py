"""One pass of the teacher over a run's text, kept as a teacher cache (`kdlib.signals`) that runs then learn from."""

import dataclasses
import os
import shutil
from itertools import accumulate
from pathlib import Path

from kdlib import batching, budget, env, evaluate, inputs, memory, precision, records, samples, signals, vocab, walk
from kdlib.signals import HEAD, INDEX, READER
from kdlib.windows import Windows

SAFETY = 1.25
"""Times what the slowest shard took must be left for the next one."""


def write(config, out, clock=None, others=(), writer=(0, 1)):
    """Write the teacher cache of `config` into the folder `out`, or go on with it: a generator of records.

    The first is of kind `plan` (`windows positions shards missing bytes bytes_a_position`), made before anything is written;
    then one of kind `shard` after each (`done shards positions left_s`), at the end one of kind `complete` or `paused` (with
    `reason`). A shard is whole or not there, so a pass that was cut off anywhere is gone on with by the same call, and ends
    with the same bytes.

    `others`: folders with parts of the same cache, which are taken over. `writer` `(i, n)`: this is the i-th (from 0) of n
    that share the work, in one folder or each in its own; processes of one launch share a writer's part among them.
    Raises ValueError where the config, the text or the folder won't do.
    """
    clock = clock or budget.Clock()
    started = clock.now() - env.session_age_s()
    if config.cached:
        raise ValueError("a teacher cache is written by the teacher itself; give --teacher, not --teacher-cache")
    seconds, out = budget.seconds_of(config.time_budget), Path(out)
    accelerator = precision.accelerator(config.amp_dtype)
    _refuse_folder(out)
    loaded = inputs.load(config, accelerator.device, precision.teacher_dtype(accelerator))
    yield from Pass(config, loaded, out, clock, others, shares(accelerator, *writer)).run(seconds, started)


def shares(accelerator, index=0, count=1):
    """`(which, of how many)` writers a process is, where a launch of several is the writer `index` of `count`."""
    return index * accelerator.num_processes + accelerator.process_index, count * accelerator.num_processes


class Pass:
    """The state of `write`: the live teacher of `loaded` (`inputs.Inputs`) reads where it is."""

    def __init__(self, config, loaded, out, clock, others, writer):
        self.config, self.out, self.clock, self.others = config, out, clock, [Path(folder) for folder in others]
        self.mine, self.writers = writer
        self.loaded, self.pair = loaded, loaded.pair
        self.device = self.pair.teacher.model.device
        held_out = [sorted((w for group in split.windows for w in group), key=lambda window: window.place)
                    for split in (self.loaded.validation, self.loaded.test)]  # fmt: skip
        self.windows = dict(zip(signals.SPLITS, (self.loaded.train, *held_out), strict=True))
        self.facts = self._facts()
        self.key = signals.key_of(self.facts)
        self.tries = inputs.tries_of(self.pair) if config.kd_method == "inside_tokens" else None
        self.batch_size = config.batch_size
        self.interrupts = budget.Interrupts()

    @property
    def num_shards(self):
        return sum(map(len, self.facts["shards"].values()))

    def _facts(self):
        settings = signals.settings_of(self.config, len(self.pair.shared))
        shards = {split: [[0, len(windows)]] for split, windows in self.windows.items()}
        return {
            "format": signals.FORMAT,
            "settings": {**settings, "batch_size": self.config.batch_size},
            "identity": {
                name: told for name, told in self.loaded.identity.items() if name not in ("student", "signal")
            },
            "shards": {**shards, "train": signals.plan(self.windows["train"])},
        }

    def run(self, seconds, started):
        told = self.plan()
        yield told
        self._open(told)
        lacking = signals.missing([self.out], self.facts)
        whole, slowest = self.num_shards, 0.0
        mine = [
            which for place, which in enumerate(self._every()) if place % self.writers == self.mine and which in lacking
        ]
        self.interrupts.listen()
        try:
            for place, which in enumerate(mine):
                before = self.clock.now()
                if before - started + SAFETY * slowest > seconds:
                    yield self._paused("the time budget is used up")
                    return
                if not self._write(*which):
                    yield self._paused(self.interrupts.asked)
                    return
                slowest = max(slowest, self.clock.now() - before)
                left = slowest * (len(mine) - place - 1)
                yield {"kind": "shard", "done": place + 1, "of": len(mine), "shards": whole, "left_s": left}
        finally:
            self.interrupts.ignore()
        left = len(signals.missing([self.out], self.facts))
        yield {"kind": "complete", "missing": left}

    def _every(self):
        return [(split, number) for split in signals.SPLITS for number in range(len(self.facts["shards"][split]))]

    def _paused(self, reason):
        left = len(signals.missing([self.out], self.facts))
        return {"kind": "paused", "reason": reason, "missing": left}

    def plan(self):
        """The first record of `write`: how much it will be."""
        rows, width = self.pair.student_reader.vocabulary.num_rows, self.pair.teacher.head.width
        inside = self._inside_a_position() if self.tries else ()
        a_position = signals.bytes_a_position(self.facts["settings"], rows, width, inside)
        positions = {split: Windows.of(windows).total("student_rows") for split, windows in self.windows.items()}
        size = a_position * sum(positions.values())
        there = [folder for folder in (self.out, *self.others) if (folder / INDEX).exists()]
        return {
            "kind": "plan",
            "windows": sum(map(len, self.windows.values())),
            "tokens": Windows.of(self.windows["train"]).total("student_ids"),
            "positions": sum(positions.values()),
            "shards": len(self._every()),
            "missing": len(signals.missing(there, self.facts)),
            "bytes": size,
            "bytes_a_position": a_position,
        }

    def _inside_a_position(self):
        """Positions inside tokens for each common one, of either kind, on the pair's sample."""
        walks = [walk.Walk.of(self.tries, batching.collate([window], *self.pair.pads)) for window in self.pair.sample]
        counts = [(len(each.positions), len(each.inner), len(each.more)) for each in walks]
        ours, theirs, common = map(sum, zip(*counts, strict=True))
        return ours / max(1, common), theirs / max(1, common)

    def _open(self, told):
        """The folder with everything but the shards, and the shards that others have."""
        for folder in (self.out, *self.others):
            if (folder / INDEX).exists() or folder in self.others:
                _refuse_other(folder, signals.read_facts(folder), self.facts)
        self.refuse_full_disk(told)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._save_reader()
            if signals.needs_hidden(self.config) and not (self.out / HEAD).exists():
                signals.write_head(
                    self.out / HEAD, self.key, self.pair.teacher.shared_rows(self.pair.shared).cpu(), self.mine
                )
            if not (self.out / INDEX).exists():
                beside = self.out / f"{INDEX}.{self.mine}.tmp"  # another writer may be at the same place
                records.write_json(beside, self.facts)
                os.replace(beside, self.out / INDEX)
            self._take_over()
        except OSError as error:
            raise ValueError(f"--out {self.out} can't be written: {error.strerror or error}") from None

    def refuse_full_disk(self, told):
        """Raise ValueError where the disk has no room for what the `plan` tells."""
        share = told["bytes"] * told["missing"] / max(1, told["shards"]) / self.writers
        there = next(folder for folder in [self.out, *self.out.absolute().parents] if folder.exists())
        free = env.free_bytes(there) - env.disk_reserve_bytes()
        if share > free:
            raise ValueError(
                f"the cache needs {share / 1e9:.2f} GB more and the disk of {self.out} has {free / 1e9:.2f} GB; lower "
                "kd_top_k, take less text, or share the work between several writers"
            )

    def _save_reader(self):
        """The teacher's tokenizer and configuration: all that a run needs to load of it."""
        if (self.out / READER).exists():
            return
        beside = self.out / f"{READER}.{self.mine}.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        self.pair.teacher.reader.tokenizer.save_pretrained(beside)
        self.pair.teacher.config.save_pretrained(beside)
        try:
            os.replace(beside, self.out / READER)
        except OSError:
            if not (self.out / READER).exists():
                raise
            shutil.rmtree(beside)  # another writer was faster

    def _take_over(self):
        for which in signals.missing([self.out], self.facts):
            path = self.out / signals.shard_name(*which)
            for folder in self.others:
                if (folder / path.name).exists():
                    signals.refuse_shard(folder / path.name, self.key)
                    copy_whole(folder / path.name, path, self.mine)
                    break

    def _write(self, split, number):
        """Write one shard; whether it was, or someone asked to stop."""
        first, last = self.facts["shards"][split][number]
        windows = self.windows[split][first:last]
        settings = self.facts["settings"]
        if split == "train":
            buckets, asked = inputs.buckets_of(self.pair, settings["kd_method"]), settings
        else:  # judged by the same buckets whatever was learned from
            buckets = vocab.tail_buckets(
                self.pair.student_reader.vocabulary, self.pair.teacher.reader.vocabulary, self.pair.shared
            )
            asked = {**settings, "kd_temperature": 1.0}
        wanted = signals.shortlist(self.pair, buckets, asked)
        tries = self.tries if split == "train" else None
        found, self.batch_size = memory.fitting(lambda size: self._ask(windows, wanted, tries, size), self.batch_size)
        if found is None:
            return False
        more = None if split == "train" else self._judged(split)
        path = self.out / signals.shard_name(split, number)
        rows = self.pair.student_reader.vocabulary.num_rows
        signals.write_shard(path, self.key, found, rows, settings["hidden"] and split == "train", more, self.mine)
        return True

    def _ask(self, windows, wanted, tries, size):
        """The teacher's signals by window, in order, with what it says inside tokens where there are `tries`, from batches
        of `size`; None where someone asked to stop.
        """
        order = sorted(range(len(windows)), key=lambda place: len(windows[place].teacher_ids))
        found = {}
        for i in range(0, len(order), size):
            if self.interrupts.asked:
                return None
            places = order[i : i + size]
            batch = batching.collate([windows[place] for place in places], *self.pair.pads).to(self.device)
            signal = self.pair.teacher(batch, spans=True, shortlist=wanted, inner=tries is not None)
            parts = [(signal, batch.rows_by_window)]
            if tries:
                walked = walk.Walk.of(tries, batch)
                how = self.facts["settings"]["inside_k"], self.facts["settings"]["kd_temperature"]
                said = walked.shortlists(tries, signal, self.pair.teacher.head.decode, *how)
                parts += zip(said, walked.by_window(batch.rows_by_window), strict=True)
            by_window = zip(*(_by_window(part.to("cpu"), counts) for part, counts in parts), strict=True)
            for place, (signal, *said) in zip(places, by_window, strict=True):
                found[place] = dataclasses.replace(signal, said=tuple(said) or None)
        return [found[place] for place in range(len(windows))]

    def _judged(self, split):
        """What a verdict wants of the teacher itself: its score, and how it goes on with a text."""
        held_out = getattr(self.loaded, split)
        score = evaluate.evaluate_teacher(self.pair.teacher, held_out).to_dict()
        opening = samples.openings(held_out, self.pair.student_reader.tokenizer, 1)[0]
        return {"score": score, "says": samples.teacher_says(self.pair.teacher, opening)}


def copy_whole(path, there, writer=0):
    """Copy a file: it is there whole, or not at all."""
    there.parent.mkdir(parents=True, exist_ok=True)
    beside = there.with_name(f"{there.name}.{writer}.tmp")
    shutil.copyfile(path, beside)
    os.replace(beside, there)


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
