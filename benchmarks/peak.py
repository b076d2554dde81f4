"""How well peak memory is foretold: what `peak_memory.predicted_bytes` says before the first step, and what was used.

    OMP_NUM_THREADS=1 python -m benchmarks.peak [--steps 2] [--cuda] [WORD ...]     (all shapes, or those named with a word)

Every shape runs in a process of its own on a CPU, with `--cuda` on a card: random Llama models of full width, windows of
random tokens, all of the given length. Told: what the process holds before training and the prediction. Taken: the highest
resident set of the process over real steps of `loop.TrainLoop` (VmHWM, reset before the first one; Linux only), the
optimizer's state included from the second step on. On a card both leave out what CUDA holds itself: taken is the most
that tensors took, and `reserved` the most that torch's allocator held. Prints a table in Markdown; exit status 1 where a
prediction is off by over 15 %.
"""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "base": {},
    "half the batch": {"batch_size": 4},
    "one window": {"batch_size": 1},
    "short": {"length": 128},
    "large vocabulary": {"rows": 49152},
    "chunks of 512 rows": {"rows": 49152, "loss_chunk_size": 512},
    "chunks of 32 rows": {"loss_chunk_size": 32},
    "accumulation": {"batch_size": 2, "grad_accumulation": 4},
    "average": {"use_ema": True},
    "projector": {"kd_method": "projector"},
    "no teacher": {"kd_method": "none"},
    "all parts": {"preset": "documents", "kd_method": "projector", "use_curriculum": False},
    "wide and short": {"width": 768, "layers": 4, "length": 64},
    "untied head": {"tied": False},
    "checkpointing": {"gradient_checkpointing": "on"},
    "adapters": {"lora_rank": 16},
    "adapters, wide head": {"lora_rank": 16, "rows": 49152},
    "adapters on 4 bits": {"lora_rank": 16, "student_quantization": "4bit"},
    "adapters on 8 bits": {"lora_rank": 16, "student_quantization": "8bit"},
    "checkpointing, accumulation": {"gradient_checkpointing": "on", "batch_size": 4, "grad_accumulation": 2},
}
OFF = 0.15


def models_of(shape):
    """`(student, teacher)`, random, and the rows of their vocabularies."""
    import transformers

    rows, width, layers = shape.get("rows", 16384), shape.get("width", 512), shape.get("layers", 8)

    def llama(rows, width, layers, heads, tied):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=rows, hidden_size=width, intermediate_size=8 * width // 3, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, tie_word_embeddings=tied,
        ))  # fmt: skip

    return llama(rows, width, layers, 8, shape.get("tied", True)), llama(2 * rows, 640, 6, 10, True)


def training_of(shape, cuda=False):
    """The `TrainLoop` of a shape, over windows of random tokens that match one to one."""
    import numpy as np
    import torch

    from kdlib import clock
    from kdlib.align import vocab
    from kdlib.config import Config
    from kdlib.data import tokenize, windowing
    from kdlib.models import devices, lora, teacher
    from kdlib.models.head import Head
    from kdlib.models.pair import Pair
    from kdlib.session import inputs
    from kdlib.training import loop

    torch.manual_seed(0)
    length = shape.get("length", 256)
    names = {field.name for field in dataclasses.fields(Config)} | {"preset"}
    config = Config.from_dict(
        {"batch_size": 8, "kd_method": "first_token", **{k: v for k, v in shape.items() if k in names}}
    )
    machine = devices.accelerator("fp32", cpu=not cuda)
    student, larger = (model.to(machine.device) for model in models_of(shape))
    if config.student_quantization != "none":
        student = quantised(student, config.student_quantization, machine.device)
    if config.lora_rank:
        lora.add_adapters(student, config)
    readers = [
        tokenize.TextTokenizer(
            None, vocab.Vocabulary(tuple(b"%d" % i for i in range(model.config.vocab_size)), (), False), [], [], 0
        )
        for model in (student, larger)
    ]
    both = [reader.vocabulary for reader in readers]
    ids = np.arange(both[0].num_rows)
    shared = vocab.SharedVocabulary(ids, ids, 1.0, 0.5)
    chance, at = np.random.default_rng(0), np.arange(length - 1)

    def window(number):
        text = [chance.integers(0, vocabulary.num_rows, length) for vocabulary in both]
        labels = [np.append(ids[1:], windowing.IGNORE) for ids in text]
        none = np.zeros(length, dtype=bool)
        rows = (at, at, at + 1, at + 1)
        return windowing.Window(text[0], labels[0], none, text[1], labels[1], none, *rows, length, length, number)

    windows = [window(number) for number in range(2 * config.effective_batch)]
    head = Head(student, both[0])
    pair = Pair(teacher.Teacher(larger, readers[1]), student, readers[0], head, shared, (0, 0))
    pair.buckets["first_token"] = vocab.tail_buckets(*both, shared)
    pair.sample = windows[:2]
    objective = inputs.make_objective(pair, config)
    needed = pair.teacher if config.needs_teacher else None
    return loop.TrainLoop(objective, needed, windows, 10**4, config, machine, clock.Clock())


def quantised(model, bits, device):
    """The model as it is loaded in `8bit` or `4bit`."""
    from kdlib.models import loading

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return loading.load_model(folder, "student", device=device, quantization=bits)


def resident():
    """`(now, most)`: bytes of this process in memory."""
    status = Path("/proc/self/status").read_text()
    return tuple(1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1]) for name in ("VmRSS", "VmHWM"))


def allocated():
    """`(now, most)`: bytes of tensors on the card."""
    import torch

    return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()


def measure(shape, num_steps, cuda=False):
    """`{"used", "predicted", "peak"}`, bytes; on a card `reserved` too."""
    import time

    import torch

    from kdlib import memory
    from kdlib.training import peak_memory

    training, in_use = training_of(shape, cuda), allocated if cuda else resident
    started = time.process_time()
    memory.release_memory()
    used, _ = in_use()
    others = memory.usage("cuda")["used_bytes"] - used if cuda else 0
    told = peak_memory.predicted_bytes(training) - others
    told_s = time.process_time() - started
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    started = time.process_time()
    for record in training:
        if record.step == num_steps:
            break
    step_s = (time.process_time() - started) / num_steps
    reserved = {"reserved": torch.cuda.max_memory_reserved()} if cuda else {}
    return {"used": used, "predicted": told, "peak": in_use()[1], **reserved, "told_s": told_s, "step_s": step_s}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--cuda", action="store_true")
    parser.add_argument("--shape")
    given = parser.parse_args()
    if given.shape:
        print(json.dumps(measure(json.loads(given.shape), given.steps, given.cuda)))
        return
    off = []
    print("| shape | before, MB | told, MB | taken, MB | told / taken | CPU seconds to tell | of a step |")
    print("|---|---|---|---|---|---|---|")
    for name, shape in SHAPES.items():
        if given.words and not any(word in name for word in given.words):
            continue
        command = [sys.executable, "-m", "benchmarks.peak", "--steps", str(given.steps), "--shape", json.dumps(shape)]
        command += ["--cuda"] if given.cuda else []
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        ratio = found["predicted"] / found["peak"]
        off += [name] if abs(ratio - 1) > OFF else []
        told = " | ".join(f"{found[key] / 2**20:.0f}" for key in ("used", "predicted", "peak"))
        print(f"| {name} | {told} | {ratio:.3f} | {found['told_s']:.1f} | {found['step_s']:.1f} |", flush=True)
    sys.exit(bool(off))


if __name__ == "__main__":
    main()
