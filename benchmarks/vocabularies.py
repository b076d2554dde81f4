"""What `byte_prefix` costs with real vocabularies, where the heads take most of a step.

    OMP_NUM_THREADS=1 python -m benchmarks.vocabularies FOLDER [--rounds 8]     (a folder with tokenizers/ and texts/)

Teacher and student have the widths of Qwen3-0.6B and SmolLM2-135M, new weights and two layers each; they read four windows
of prose of 128 student tokens. Prints the table of RESULTS.md: how long the pair's tries take to make and their nodes; the
processor seconds of loss and gradients by `first_token` and by `byte_prefix`, in turn on the same windows; which share
of the student's positions has a signal; and what a teacher cache takes of a student's token.
"""

import argparse
import copy
import statistics
import time
from pathlib import Path

import torch
import transformers

from kdlib import cli
from kdlib.align import vocab
from kdlib.config import Config
from kdlib.data import batching, tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.losses import partial_tokens
from kdlib.models import loading, teacher, teacher_cache, trie
from kdlib.models.head import Head
from kdlib.models.pair import Pair
from kdlib.session import inputs

PAIRS = (("gpt2", "cl100k"), ("cl100k", "gpt2"), ("gpt2", "mistral-v1-32k"), ("mistral-v1-32k", "cl100k"))
SHAPES = {"student": (576, 9), "teacher": (1024, 16)}
WINDOWS, LENGTH, WAYS = 4, 128, ("first_token", "byte_prefix")


def main():
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--rounds", type=int, default=8)
    options = options.parse_args()
    cli.quiet()
    torch.set_num_threads(1)
    text = Document((options.folder / "texts/standardebooks_emma.txt").read_text(encoding="utf-8")[:100_000])
    print(
        "| student | teacher | tries | nodes | first_token | byte_prefix | ratio | positions with a signal | cached |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for names in PAIRS:
        print(row(names, options.folder, text, options.rounds), flush=True)


def row(names, folder, text, rounds):
    pair, windows = made(*(loading.load_reader(str(folder / "tokenizers" / name), name) for name in names), text)
    started = time.process_time()
    tries = trie.tries_of(pair)
    tries_s = time.process_time() - started
    batch = batching.collate(windows[:WINDOWS], *pair.pads)
    objectives = {way: inputs.make_objective(pair, Config(kd_method=way), copy.deepcopy(pair.student)) for way in WAYS}
    taken = [[seconds_of(objectives[way], pair, batch) for way in WAYS] for _ in range(rounds + 1)][1:]
    before, now = map(statistics.median, zip(*taken, strict=True))
    ratio = statistics.median(b / a for a, b in taken)
    ours, theirs, common, tokens = counted(tries, windows, pair)
    settings = {"kd_top_k": teacher_cache.TOP_K, "inside_k": teacher_cache.INSIDE_K, "hidden": False}
    size = (
        teacher_cache.bytes_per_position(settings, pair.head.num_rows, 0, (ours / common, theirs / common))
        * common
        / tokens
    )
    return (
        f"| {names[0]} | {names[1]} | {tries_s:.1f} s | {sum(len(each.nodes) for each in tries):,} | {1e3 * before:.0f} ms "
        f"| {1e3 * now:.0f} ms | {ratio:.3f} | {(common + ours) / tokens:.1%} ({common / tokens:.1%}) | {size:.0f} bytes |"
    )


def made(student, other, text):
    """`(Pair, windows)` of two `tokenize.TextTokenizer`s."""
    torch.manual_seed(0)
    ours, theirs = (
        transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=reader.vocabulary.num_rows, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
                num_attention_heads=heads, bos_token_id=0, eos_token_id=0,
            )
        ).eval()
        for reader, (width, heads) in zip((student, other), SHAPES.values(), strict=True)
    )  # fmt: skip
    shared = vocab.shared_vocabulary(student.vocabulary, other.vocabulary)
    head = Head(ours, student.vocabulary)
    coded = [tokenize.encode(text, reader) for reader in (student, other)]
    windows = windowing.cut_windows(text, *coded, student, other, LENGTH)
    return Pair(teacher.Teacher(theirs, other), ours, student, head, shared, (0, 0)), windows


def seconds_of(objective, pair, batch):
    """Processor seconds of the teacher's pass, the loss and its gradients."""
    objective.zero_grad()
    counts = {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}
    started = time.process_time()
    signal = pair.teacher(batch, **objective.teacher_request(objective.weights()))
    objective(batch, signal, counts)[0].backward()
    return time.process_time() - started


def counted(tries, windows, pair):
    """The student's positions inside a teacher's token, the teacher's inside the student's, common ones, and all."""
    walks = [partial_tokens.PartialTokens.build(tries, batching.collate([window], *pair.pads)) for window in windows]
    names = "positions", "inner_positions", "num_inner"
    sums = [sum(len(getattr(walk, name)) for walk in walks) for name in names]
    return *sums, sum(window.num_positions for window in windows)


if __name__ == "__main__":
    main()
