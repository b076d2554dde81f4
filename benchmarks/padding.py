"""Tokens computed for each real one, by how windows are put together in batches; nothing is run, only counted.

    python -m benchmarks.padding [--batch-size 8] [--accumulation 1] [--seeds 3] [DATASET STUDENT TEACHER]

Lengths like those of instruction data (log-normal, mean 113, 90th percentile about 180, cut at 384; the teacher's windows
are 0.95 times as long, give or take 6 %), and the windows of the embedded default. Or the windows of at most
`--max-length` student tokens of a data set as kdlib reads it, with two folders of tokenizers.

*cap*: every window padded to the longest there is. *random*: batches in random order, padded to their longest. *bucketed*:
similar lengths together (`batching.batch_order`). *packed*: random order, windows share rows (`batching.pack_rows`).
*auto*: both, what kdlib does. Student and teacher each, mean over the seeds of one epoch.
"""

import argparse
import statistics
import types

import numpy as np

from kdlib import demo
from kdlib.data import batching, corpus, tokenize, windowing
from kdlib.models import loading

WAYS = ("cap", "random", "bucketed", "packed", "auto")


def like_instructions(count=4000, seed=0):
    """`(student's, teacher's)` lengths."""
    random = np.random.default_rng(seed)
    ours = np.clip(random.lognormal(np.log(113) - 0.44**2 / 2, 0.44, count).round(), 8, 384).astype(int)
    return ours, np.clip((ours * random.normal(0.95, 0.06, count)).round(), 4, None).astype(int)


def window_lengths(documents, student, teacher, max_length):
    """`(student's, teacher's)` lengths of the windows of documents, as two `tokenize.TextTokenizer`s read them."""
    windows = []
    for number, document in enumerate(documents):
        coded = [tokenize.encode(document, reader) for reader in (student, teacher)]
        windows += windowing.cut_windows(document, *coded, student, teacher, max_length, number)
    return tuple(np.array([len(getattr(w, f"{side}_ids")) for w in windows]) for side in ("student", "teacher"))


def embedded_default():
    texts, own, _ = demo.split(demo.docstrings())
    tokenizers = demo.unigram(texts, demo.STUDENT["vocab"]), demo.byte_level_bpe(texts, demo.TEACHER["vocab"])
    readers = [tokenize.wrap_tokenizer(each, loading.vocab.read_vocabulary(each)) for each in tokenizers]
    return window_lengths([corpus.Document(text) for text in own], *readers, demo.WINDOW)


def per_token(lengths, way, batch_size, accumulation, seed):
    """Tokens computed for each real one of an epoch: student's, teacher's."""
    sizes = zip(*lengths, strict=True)
    windows = [
        types.SimpleNamespace(student_ids=np.empty(ours), teacher_ids=np.empty(theirs)) for ours, theirs in sizes
    ]
    if way in ("bucketed", "auto"):
        steps = np.array(batching.batch_order(windows, batch_size * accumulation, seed, epoch=0))
    else:
        steps = np.random.default_rng(seed).permutation(len(windows))
        steps = steps[: len(steps) // batch_size * batch_size]
    found = []
    for side in lengths:
        batches, longest = side[steps.reshape(-1, batch_size)], side.max()
        computed = 0
        for batch in batches:
            rows = batching.pack_rows(batch.tolist(), 2 * longest if way in ("packed", "auto") else 0)
            width = longest if way == "cap" else max(sum(batch[i] for i in row) for row in rows)
            computed += len(rows) * width
        found.append(computed / batches.sum())
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("given", nargs="*", help="a data set, folders of the student's and the teacher's tokenizer")
    args = parser.parse_args()
    if args.given:
        dataset, *folders = args.given
        readers = [
            loading.load_reader(folder, role) for folder, role in zip(folders, ("student", "teacher"), strict=True)
        ]
        texts = {dataset: window_lengths(corpus.read_documents(dataset), *readers, args.max_length)}
    else:
        texts = {"like instructions": like_instructions(), "embedded default": embedded_default()}
    print("| text | batch | student's mean length | " + " | ".join(WAYS) + " |\n|---|---|---|" + "---|" * len(WAYS))
    for name, lengths in texts.items():
        cells = []
        for way in WAYS:
            found = [per_token(lengths, way, args.batch_size, args.accumulation, seed) for seed in range(args.seeds)]
            cells.append(", ".join(f"{statistics.mean(side):.3f}" for side in zip(*found, strict=True)))
        batch = f"{args.batch_size}" + (f" x {args.accumulation}" if args.accumulation > 1 else "")
        print(f"| {name} | {batch} | {lengths[0].mean():.0f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
