"""What a checkpoint costs at full size: copying the state (training waits), writing it (behind the training), reading it.

    python -m benchmarks.saving [--params 134515008] [--repeats 3] [--folder DIR]

A student of that many float32 parameters with two moments and its best weights, random numbers all; `torch.save` of the
same tensors with a flush to the disk in the same run, in turn.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kdlib.session import checkpoint

LAYER = 1_000_000


def state(num_params):
    """Groups as a run has them, in tensors of a million numbers."""
    sizes = [LAYER] * (num_params // LAYER) + [num_params % LAYER]

    def group():
        return {f"{i}": torch.randn(size) for i, size in enumerate(sizes)}

    moments = {f"{i}.{name}": t for name in ("exp_avg", "exp_avg_sq") for i, t in group().items()}
    return {"student": group(), "optimizer": moments, "best_0": group()}


def torch_save(groups, path):
    with open(path, "wb") as file:
        torch.save(groups, file)
        file.flush()
        os.fsync(file.fileno())


def once(groups, folder, step):
    """`{task: seconds}` of one round."""
    times = [time.perf_counter()]
    copies = {name: {key: tensor.clone() for key, tensor in group.items()} for name, group in groups.items()}
    times.append(time.perf_counter())
    path = checkpoint.write(folder / "ours", step, copies, {}, 1)
    times.append(time.perf_counter())
    checkpoint.read(path)
    times.append(time.perf_counter())
    torch_save(copies, folder / "theirs.pt")
    times.append(time.perf_counter())
    tasks = ("copy", "write", "read", "torch.save")
    return {task: end - begin for task, begin, end in zip(tasks, times, times[1:], strict=False)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--params", type=int, default=134_515_008)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder")
    given = parser.parse_args()
    groups = state(given.params)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rounds = [once(groups, Path(folder), number + 1) for number in range(given.repeats)]
    size = sum(checkpoint.size_of(tensors) for tensors in groups.values())
    print(f"{size / 1e9:.2f} GB, median of {given.repeats}")
    for task in rounds[0]:
        middle = statistics.median(each[task] for each in rounds)
        print(f"{task:12}{middle:8.2f} s {size / 1e6 / middle:8.0f} MB/s")


if __name__ == "__main__":
    main()
