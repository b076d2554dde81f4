"""Writer of a teacher cache (`models.teacher_cache`) in one pass of the teacher over a run's text."""

import dataclasses
import warnings
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


def cache_teacher(config, out, clock=None, others=(), writer=(0, 1), on_progress=lambda phase, done, total: None):
    """Writes or resumes the teacher cache of `config` in the folder `out`, and yields records.

    The first record is `plan` (`windows positions shards missing bytes bytes_a_position`), before anything is written.
    Each `shard` has `done of shards left_s`. The last one is `complete` or `paused` (with `reason`). Shards are written
    atomically, so an interrupted pass is resumed by the same call, with the same bytes in the end.

    `others`: folders with parts of the same cache, whose shards are copied. `writer` `(i, n)`: this is writer i (from
    0) of n that share the work, in one folder or several. Processes of one launch divide their writer's part. Raises
    ValueError if the config, the text or the folder is unsuitable.
    """
    clock = clock or Clock()
    started = clock.now() - environment.session_age_s()
    if config.cached:
        raise ValueError("writing a teacher cache requires the teacher itself; give --teacher, not --teacher-cache")
    seconds, out = parse_duration(config.time_budget), Path(out)
    accelerator = devices.accelerator(config.amp_dtype)
    _check_folder(out)
    dtype = devices.teacher_dtype(accelerator)
    loaded = inputs.load(config, accelerator.device, dtype, on_progress=on_progress)
    if loaded.prints_date and not config.template_date:
        warnings.warn(
            "a chat template prints the current date, so this cache serves only runs that start today; set template_date "
            "here and in the run to use it later",
            stacklevel=2,
        )
    worker = worker_shard_ids(accelerator, *writer)
    yield from CacheWriter(config, loaded, out, clock, others, worker, on_progress).run(seconds, started)


def worker_shard_ids(accelerator, index=0, count=1):
    """Returns `(index, count)` of this process among all workers, if a launch is writer `index` of `count`."""
    return index * accelerator.num_processes + accelerator.process_index, count * accelerator.num_processes


class CacheWriter:
    """State of `cache_teacher`. `loaded` has a live teacher; worker i of n writes every n-th shard."""

    def __init__(self, config, loaded, out, clock, others, worker, on_progress=lambda phase, done, total: None):
        self.on_progress, self.num_done, self.num_planned = on_progress, 0, 0
        self.longest_batch_s, self.batch_started = 0.0, None
        self.config, self.out, self.clock, self.others = config, out, clock, [Path(folder) for folder in others]
        self.worker, self.num_workers = worker
        self.loaded, self.pair = loaded, loaded.pair
        self.device = self.pair.teacher.model.device
        held_out = [inputs.windows_of(split) for split in (self.loaded.validation, self.loaded.test)]
        self.data_lines = loaded.data_lines()
        self.windows = dict(zip(teacher_cache.SPLITS, (self.loaded.train, *held_out), strict=True))
        self.facts = {
            "format": teacher_cache.FORMAT,
            "settings": {
                **teacher_cache.settings_of(config, len(self.pair.shared)),
                "batch_size": config.batch_size,
            },
            "identity": {k: v for k, v in loaded.identity.items() if k not in ("student", "signal")},
            "shards": {split: teacher_cache.plan_shards(windows) for split, windows in self.windows.items()},
        }
        self.key = teacher_cache.key_of(self.facts)
        self.tries = trie.tries_of(self.pair) if config.kd_method == "byte_prefix" else None
        self.batch_size = config.batch_size
        self.stop_signals = time_budget.StopSignals()

    @property
    def num_shards(self):
        return sum(map(len, self.facts["shards"].values()))

    def run(self, seconds, started):
        """Yields the records of `cache_teacher`, in a session of `seconds` since `started`."""
        self.deadline = started + seconds
        plan = self.plan()
        yield plan
        self._open(plan)
        missing = set(teacher_cache.missing_shards([self.out], self.facts))
        own = [shard for i, shard in enumerate(self._shard_ids()) if i % self.num_workers == self.worker]
        own = [shard for shard in own if shard in missing]
        positions = [self._num_positions(*shard) for shard in own]
        self.num_done, self.num_planned = 0, sum(positions)
        self.stop_signals.listen()
        try:
            write_started = self.clock.now()
            for i, shard in enumerate(own):
                expected_s = (self.clock.now() - write_started) / max(1, self.num_done) * positions[i]
                late = i and self.clock.now() + expected_s > self.deadline  # the first shard is always tried
                if reason := "the time budget has no room for another shard" if late else self._write(*shard):
                    yield {"kind": "paused", "reason": reason, "missing": self._num_missing()}
                    return
                self.num_done = sum(positions[: i + 1])
                left = (self.clock.now() - write_started) * (self.num_planned / max(1, self.num_done) - 1.0)
                yield {"kind": "shard", "done": i + 1, "of": len(own), "shards": self.num_shards, "left_s": left}
        finally:
            self.stop_signals.ignore()
        yield {"kind": "complete", "missing": self._num_missing()}

    def _num_positions(self, split, number):
        first, last = self.facts["shards"][split][number]
        return sum(len(window.student_rows) for window in self.windows[split][first:last])

    def _stop_reason(self):
        """Returns why no further batch may start, or "". It may take as long as the longest batch so far."""
        now = self.clock.now()
        self.longest_batch_s = max(self.longest_batch_s, now - (self.batch_started or now))
        self.batch_started = now
        if self.stop_signals.reason:
            return self.stop_signals.reason
        return "the time budget is used up" if now + self.longest_batch_s > self.deadline else ""

    def _shard_ids(self):
        return [(split, number) for split in teacher_cache.SPLITS for number in range(len(self.facts["shards"][split]))]

    def _num_missing(self):
        return len(teacher_cache.missing_shards([self.out], self.facts))

    def plan(self):
        """Returns the `plan` record, with the size of the cache."""
        rows, width = self.pair.student_reader.vocabulary.num_rows, self.pair.teacher.head.width
        partial = self._partial_per_position() if self.tries else ()
        bytes_per_position = teacher_cache.bytes_per_position(self.facts["settings"], rows, width, partial)
        num_positions = sum(WindowDataset.from_list(split).total("student_rows") for split in self.windows.values())
        folders = [folder for folder in (self.out, *self.others) if (folder / INDEX).exists()]
        return {
            "kind": "plan",
            "data": self.data_lines,
            "windows": sum(map(len, self.windows.values())),
            "tokens": WindowDataset.from_list(self.windows["train"]).total("student_ids"),
            "positions": num_positions,
            "shards": self.num_shards,
            "missing": len(teacher_cache.missing_shards(folders, self.facts)),
            "bytes": bytes_per_position * num_positions,
            "bytes_a_position": bytes_per_position,
        }

    def _partial_per_position(self):
        """Returns partial-token positions of either kind per aligned position, measured on the pair's sample."""
        matches = [
            partial_tokens.PartialTokens.build(self.tries, batching.collate([window], *self.pair.pads))
            for window in self.pair.sample
        ]
        counts = [(len(each.positions), len(each.inner_positions), len(each.num_inner)) for each in matches]
        outer, inner, aligned = map(sum, zip(*counts, strict=True))
        return outer / max(1, aligned), inner / max(1, aligned)

    def _open(self, plan):
        """Writes everything but the shards, and copies the shards of other folders."""
        for folder in (self.out, *self.others):
            if (folder / INDEX).exists() or folder in self.others:
                _check_same_cache(folder, teacher_cache.read_facts(folder), self.facts)
        self.check_disk(plan)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self._save_reader()
            if teacher_cache.needs_hidden(self.config) and not (self.out / HEAD).exists():
                rows = self.pair.teacher.shared_rows(self.pair.shared).cpu()
                teacher_cache.write_head(self.out / HEAD, self.key, rows, self.worker)
            if not (self.out / INDEX).exists():
                write_json(self.out / INDEX, self.facts, self.worker)
            self._copy_shards()
        except OSError as error:
            raise ValueError(f"--out {self.out} can't be written: {error.strerror or error}") from None

    def check_disk(self, plan):
        """Raises ValueError if the disk has no room for this worker's part of the missing shards."""
        needed = plan["bytes"] * plan["missing"] / max(1, plan["shards"]) / self.num_workers
        existing = next(folder for folder in [self.out, *self.out.absolute().parents] if folder.exists())
        free = environment.free_bytes(existing) - environment.disk_reserve_bytes()
        if needed > free:
            raise ValueError(
                f"the cache needs {needed / 1e9:.2f} GB more, but the disk of {self.out} has {free / 1e9:.2f} GB free; "
                "lower kd_top_k, use less text, or divide the work between several writers"
            )

    def _save_reader(self):
        """Saves the teacher's tokenizer and configuration, all that a run loads of it."""
        if (self.out / READER).exists():
            return
        try:
            with files.atomic(self.out / READER, self.worker, replace=False) as temporary:
                self.pair.teacher.reader.tokenizer.save_pretrained(temporary)
                self.pair.teacher.config.save_pretrained(temporary)
        except OSError:
            if not (self.out / READER).exists():
                raise  # else another worker has just written it

    def _copy_shards(self):
        for shard in teacher_cache.missing_shards([self.out], self.facts):
            path = self.out / teacher_cache.shard_name(*shard)
            for folder in self.others:
                if (folder / path.name).exists():
                    teacher_cache.check_shard(folder / path.name, self.key)
                    files.copy(folder / path.name, path, self.worker)
                    break

    def _write(self, split, number):
        """Writes one shard. Returns "", or the reason if the session ends before that."""
        first, last = self.facts["shards"][split][number]
        windows = self.windows[split][first:last]
        settings = self.facts["settings"]
        is_train = split == "train"
        if is_train:
            buckets, spec_settings = trie.buckets_of(self.pair, settings["kd_method"]), settings
        else:  # evaluation uses the same buckets for every kd_method
            buckets = vocab.tail_buckets(
                self.pair.student_reader.vocabulary, self.pair.teacher.reader.vocabulary, self.pair.shared
            )
            spec_settings = {**settings, "kd_temperature": 1.0}
        spec = teacher_cache.topk_spec(self.pair, buckets, spec_settings)
        tries = self.tries if is_train else None
        signals, self.batch_size = memory.retry_with_smaller_batch(
            lambda size: self._compute_signals(windows, spec, tries, size), self.batch_size
        )
        if isinstance(signals, str):
            return signals
        extra = None
        if not is_train:  # the first shard of a split has the teacher's results for the verdict
            extra = {} if number else self._teacher_results(split)
        path = self.out / teacher_cache.shard_name(split, number)
        rows = self.pair.student_reader.vocabulary.num_rows
        hidden = settings["hidden"] and is_train
        teacher_cache.write_shard(path, self.key, signals, rows, hidden, extra, self.worker)
        return ""

    def _compute_signals(self, windows, spec, tries, size):
        """Returns the teacher's signal of each window, from batches of `size` sorted by length. With `tries` each
        includes the outcomes inside tokens. Returns the reason (str) if the session ends before that.
        """
        order = sorted(range(len(windows)), key=lambda index: len(windows[index].teacher_ids))
        signals, num_done, self.batch_started, head = {}, self.num_done, None, self.pair.teacher.head
        bucket_of = head.by_column(trie.buckets_of(self.pair, "byte_prefix").teacher) if tries else None
        for i in range(0, len(order), size):
            if reason := self._stop_reason():
                return reason
            self.on_progress("the teacher reads the text, positions", num_done, self.num_planned)
            indices = order[i : i + size]
            batch = batching.collate([windows[index] for index in indices], *self.pair.pads).to(self.device)
            signal = self.pair.teacher(batch, spans=True, shortlist=spec, inner=tries is not None)
            parts = [(signal, batch.rows_by_window)]
            if tries:
                partial = partial_tokens.PartialTokens.build(tries, batch)
                settings = self.facts["settings"]["inside_k"], self.facts["settings"]["kd_temperature"]
                outcomes = partial.top_k_outcomes(tries, signal, head.decode, bucket_of, *settings)
                parts += zip(outcomes, partial.count_by_window(batch.rows_by_window), strict=True)
            by_window = zip(*(_split_rows(part.to("cpu"), counts) for part, counts in parts), strict=True)
            for index, (signal, *outcomes) in zip(indices, by_window, strict=True):
                signals[index] = dataclasses.replace(signal, partial_topk=tuple(outcomes) or None)
            num_done += batch.num_aligned
        return [signals[index] for index in range(len(windows))]

    def _teacher_results(self, split):
        """Returns the teacher's score on a split and its sample text."""
        held_out = getattr(self.loaded, split)
        score = held_out.teacher_score.to_dict()
        opening = samples.openings(held_out, self.pair.student_reader.tokenizer, 1)[0]
        return {"score": score, "says": samples.continue_text_by_teacher(self.pair.teacher, opening)}


def _split_rows(part, counts):
    """Splits part of a signal by window; `counts` are the rows of each window."""
    return [part.rows(slice(end - count, end)) for count, end in zip(counts, accumulate(counts), strict=True)]


def _check_folder(out):
    """Raises ValueError if `out` is a file, or holds anything but a teacher cache."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / INDEX).exists():
        foreign = {path.name for path in out.iterdir() if not path.name.endswith(".tmp")} - {READER, HEAD}
        if foreign:
            raise ValueError(f"--out {out} holds other files; give a new folder (nothing was changed)")


def _check_same_cache(folder, found, expected):
    """Raises ValueError, with the differences, if a folder holds another cache."""
    if found == expected:
        return
    ours, theirs = ({**facts["settings"], **facts["identity"], "plan": facts["shards"]} for facts in (expected, found))
    names = [name for name in ours if ours[name] != theirs.get(name)]
    differences = "; ".join(
        "its plan" if name == "plan" else f"{name} was {theirs.get(name)}, is {ours[name]}" for name in names
    )
    raise ValueError(f"{folder} holds another teacher cache ({differences}); give a new --out, or restore the settings")
