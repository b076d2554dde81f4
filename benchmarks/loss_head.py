"""Time and peak memory of the head with its losses, KD and CE, value and gradients, beside the least it could cost and
beside other projects' released losses.

    OMP_NUM_THREADS=1 python -m benchmarks.loss_head [--rows 768] [--ways "ours;eager;..."] [--repeats 7]

N rows, student width 576, vocabulary 49,152 (SmolLM2-135M's shapes), float32, one core (or the card, where there is one);
the teacher's hidden states are already projected, so four products are needed: student logits, teacher logits, and the
gradients of hidden states and head. *bare* is those four alone, `--bare-rows` of them at a time (1,024; our own way takes 96
of these shapes on a processor, which needs a quarter of the memory).

Every way is timed in a process of its own, in turn with *bare*: the ratio is the median of the pairs' ratios. Peak memory
is the highest resident size of another process that runs only this way, over what it held before (after a run on a few
numbers, which loads what has to be loaded). Peers that are not
installed are left out (`benchmarks/peers.py` says how to install them).
"""

import argparse
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import peers
from kdlib.losses import chunked_head, divergences
from kdlib.models.head import Head

WIDTH, VOCABULARY = 576, 49_152
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=768)
    options.add_argument("--ways", help="names separated by ; (default: all but those that take minutes)")
    options.add_argument("--repeats", type=int, default=7)
    options.add_argument("--one", help="run one way in this process and print its figures")
    options.add_argument("--memory", action="store_true")
    options.add_argument("--bare-rows", type=int, default=1024)
    options = options.parse_args()
    if options.one:
        measured = memory_of if options.memory else time_of
        print(json.dumps(measured(options.one, options.rows, options.repeats, options.bare_rows)))
        return
    others = [name for name in peers.available() if "by bytes" not in name]
    ways = options.ways.split(";") if options.ways else ["bare", "ours", "ours 64", "ours 256", "eager", *others]
    print("| way | seconds | to bare | peak MB above the inputs | gradient error to float64 |\n|---|---|---|---|---|")
    for way in ways:
        told = {**in_own_process(way, options), **in_own_process(way, options, "--memory")}
        error = "" if told["error"] is None else f"{told['error']:.1e}"
        print(f"| {way} | {told['seconds']:.3f} | {told['ratio']:.3f} | {told['peak_mb']:.0f} | {error} |", flush=True)


def in_own_process(way, options, *more):
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.loss_head", "--one", way, *more]
    words += ["--rows", str(options.rows), "--repeats", str(options.repeats)]
    words += ["--bare-rows", str(options.bare_rows)]
    out = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def tensors(num_rows):
    """Hidden states, head, projected teacher states, labels; nothing larger than these is made on the way."""
    chance = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.empty(num_rows, WIDTH).normal_(generator=chance).to(DEVICE) for _ in range(2))
    weight = torch.empty(VOCABULARY, WIDTH).normal_(0.0, 0.05, generator=chance).to(DEVICE)
    labels = torch.randint(0, VOCABULARY, (num_rows,), generator=chance).to(DEVICE)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher, labels


def way_of(name):
    if name.startswith("ours"):
        size = name.partition(" ")[2]
        return lambda *given: ours(*given, int(size) if size else "auto")
    return {"bare": bare, "eager": eager, **peers.PEERS}[name]


def time_of(name, num_rows, repeats, bare_rows=1024):
    """Median seconds of one way, and of its ratios to bare, run in turn."""
    given = tensors(num_rows)
    warm(name)
    pairs = []
    for _ in range(repeats + 1):
        pairs.append((seconds(lambda *tensors: bare(*tensors, bare_rows), given), seconds(way_of(name), given)))
    ratios = [own / base for base, own in pairs[1:]]
    return {"seconds": statistics.median(own for _, own in pairs[1:]), "ratio": statistics.median(ratios)}


def memory_of(name, num_rows, *_):
    """Peak megabytes of one way over what was there before, and the relative error of its gradients to float64."""
    given = tensors(num_rows)
    warm(name)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    for _ in range(2):
        seconds(way_of(name), given)
    peak = (
        torch.cuda.max_memory_allocated()
        if DEVICE == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return {"peak_mb": (peak - before) / 1e6, "error": None if name == "bare" else gradient_error(*given)}


def warm(name):
    if name in peers.PEERS:
        peers.warm(name)
    else:
        few = torch.randn(32, 16), torch.randn(64, 16), torch.randn(32, 16), torch.arange(32)
        way_of(name)(
            few[0].to(DEVICE).requires_grad_(), few[1].to(DEVICE).requires_grad_(), *(t.to(DEVICE) for t in few[2:])
        )


def seconds(run, given):
    given[0].grad = given[1].grad = None
    started = time.perf_counter()
    run(*given)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ours(hidden, weight, teacher, labels, chunk_size="auto"):
    every = np.ones(len(hidden), dtype=bool)
    _, chunks = chunked_head.plan_blocks(every, every, *chunked_head.chunk_sizes(2 * len(weight), DEVICE, chunk_size))

    def losses_of(logits, other, block):
        made = divergences.log_softmax(logits)
        values = (
            divergences.cross_entropy(made, labels[block.rows]),
            divergences.forward_kl(made, divergences.log_softmax(other)),
        )
        return torch.stack([divergences.token_mean(value, len(hidden)) for value in values])

    decode = Head(Bare(weight), types.SimpleNamespace(num_rows=len(weight), gaps=())).decoder()
    chunked_head.chunked_head_losses(
        hidden, weight, None, chunks, losses_of, [0.5, 0.5], lambda known: decode(teacher[known])
    )[0].backward()


@dataclasses.dataclass
class Bare:
    """A model that is nothing but its head."""

    weight: torch.Tensor

    def get_output_embeddings(self):
        return self


def eager(hidden, weight, teacher, labels):
    """The plain way, with everything kept."""
    logits = F.linear(hidden, weight)
    with torch.no_grad():
        target = F.linear(teacher, weight)
    kd = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
    (0.5 * F.cross_entropy(logits, labels) + 0.5 * kd).backward()


@torch.no_grad()
def bare(hidden, weight, teacher, labels, at_once=1024):
    """The four products, with the logits standing in for their gradient."""
    into_hidden, into_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), at_once):
        rows = slice(start, start + at_once)
        logits = F.linear(hidden[rows], weight)
        F.linear(teacher[rows], weight)
        into_hidden[rows] = logits @ weight
        into_weight.addmm_(logits.T, hidden[rows])


def gradient_error(hidden, weight, teacher, labels, size=64):
    """Relative error of the gradients to the same formulas in float64, written out, chunk by chunk."""
    exact_weight, exact_hidden = torch.zeros_like(weight, dtype=torch.float64), []
    wide = weight.detach().double()
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        student = (hidden[rows].detach().double() @ wide.T).softmax(-1)
        target = (teacher[rows].double() @ wide.T).softmax(-1)
        hot = F.one_hot(labels[rows], weight.shape[0]).double()
        gradient = (0.5 * (student - hot) + 0.5 * (student - target)) / len(hidden)
        exact_hidden.append(gradient @ wide)
        exact_weight += gradient.T @ hidden[rows].detach().double()
    pairs = (hidden.grad, torch.cat(exact_hidden)), (weight.grad, exact_weight)
    return max(float((found - exact).norm() / exact.norm()) for found, exact in pairs)


if __name__ == "__main__":
    main()
