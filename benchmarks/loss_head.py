"""Time and peak memory of the head with its losses, KD and CE, value and gradients, beside what it could cost at least.

    OMP_NUM_THREADS=1 python -m benchmarks.loss_head [--rows 768] [--chunks 32,64,128,256,1024] [--repeats 5]

N rows, student width 576, vocabulary 49,152 (SmolLM2-135M's shapes), float32, one core; the teacher's hidden states are
already projected, so four products are needed: student logits, teacher logits, and the gradients of hidden states and
head. `bare` is those four alone, chunk by chunk; `eager` is the plain way with everything kept. Every way runs in a process
of its own; peak memory is the process's highest resident size over what it held before, ratios are of medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F

from kdlib import fused, losses

WIDTH, VOCABULARY = 576, 49_152


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--rows", type=int, default=768)
    options.add_argument("--chunks", default="32,64,128,256,1024")
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--one", help="run one way in this process and print its figures")
    options = options.parse_args()
    if options.one:
        way, chunk = options.one.split(":")
        print(json.dumps(measure(way, int(chunk), options.rows, options.repeats)))
        return
    chunks = [int(chunk) for chunk in options.chunks.split(",")]
    ways = [f"{way}:{chunk}" for chunk in chunks for way in ("bare", "ours")] + ["eager:0"]
    base = None
    print(
        "| way | rows a chunk | seconds | to bare | peak MB above the inputs | gradient error to float64 |\n"
        "|---|---|---|---|---|---|"
    )
    for way in ways:
        words = [sys.executable, "-m", "benchmarks.loss_head", "--one", way]
        words += ["--rows", str(options.rows), "--repeats", str(options.repeats)]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        base = min(base or found["seconds"], found["seconds"]) if way.startswith("bare") else base
        error = "" if found["error"] is None else f"{found['error']:.1e}"
        name, chunk = way.split(":")
        print(
            f"| {name} | {chunk if name != 'eager' else 'all'} | {found['seconds']:.3f} | {found['seconds'] / base:.2f} "
            f"| {found['peak_mb']:.0f} | {error} |",
            flush=True,
        )


def measure(way, chunk, num_rows, repeats):
    """Median seconds, peak megabytes and the relative error of the gradients of one way."""
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, WIDTH, requires_grad=True)
    weight = (0.05 * torch.randn(VOCABULARY, WIDTH)).requires_grad_()
    teacher = torch.randn(num_rows, WIDTH)
    labels = torch.randint(0, VOCABULARY, (num_rows,))
    run = {"ours": ours, "eager": eager, "bare": bare}[way]
    seconds = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(repeats + 1):
        hidden.grad = weight.grad = None
        started = time.perf_counter()
        run(hidden, weight, teacher, labels, chunk)
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    error = None if way == "bare" else gradient_error(hidden, weight, teacher, labels)
    return {"seconds": statistics.median(seconds[1:]), "peak_mb": peak / 1024, "error": error}


def ours(hidden, weight, teacher, labels, chunk):
    def losses_of(logits, start):
        rows = slice(start, start + len(logits))
        with torch.no_grad():
            target = F.linear(teacher[rows], weight)
        values = losses.cross_entropy(logits, labels[rows]), losses.forward_kl(logits, target)
        return torch.stack([losses.token_mean(value, len(hidden)) for value in values])

    fused.head_losses(hidden, weight, None, losses_of, [0.5, 0.5], chunk)[0].backward()


def eager(hidden, weight, teacher, labels, _):
    logits = F.linear(hidden, weight)
    with torch.no_grad():
        target = F.linear(teacher, weight)
    kd = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
    (0.5 * F.cross_entropy(logits, labels) + 0.5 * kd).backward()


@torch.no_grad()
def bare(hidden, weight, teacher, labels, chunk):
    """The four products, with the logits standing in for their gradient."""
    into_hidden, into_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
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
