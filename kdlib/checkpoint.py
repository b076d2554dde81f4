"""Students on disk, in Hugging Face's own format, whole or not at all."""

import os
import shutil
from pathlib import Path

import torch
import transformers

from kdlib import records


def save_student(model, tokenizer, path, card=""):
    """Write weights, tokenizer, generation config and a model card, so that
    `AutoModelForCausalLM.from_pretrained(path)` loads it. Made beside and renamed; an older `path` is replaced.
    """
    path = Path(path)
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(beside)
    records.write_text(beside / "README.md", card)
    if path.exists():
        old = path.with_name(path.name + ".old")
        os.replace(path, old)
        os.replace(beside, path)
        shutil.rmtree(old)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(beside, path)


def keep_last(folder, count):
    """Remove all but the newest `count` of the `step-*` folders in `folder`."""
    steps = sorted(Path(folder).glob("step-????????"))
    for old in steps[:-count]:
        shutil.rmtree(old)


def copy_of(model):
    """The model's weights on the CPU, as they are now."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}


def put_back(model, weights):
    with torch.no_grad():
        model.load_state_dict(weights)


def model_card(config, verdict):
    """A card in Markdown: what it is, from whom, on what, and what was measured."""
    figures = "\n".join(
        f"| {name} | {value:.4f} |" for name, value in verdict["bits_per_byte"].items() if value is not None
    )
    return f"""---
library_name: transformers
tags: [knowledge-distillation, kdlib]
---

# Student distilled with kdlib

Teacher `{Path(config.teacher).name}`, student `{Path(config.student).name}`, text `{Path(config.dataset).name}`;
`kd_method` {config.kd_method}, {config.kd_divergence}, temperature {config.kd_temperature}, weight {config.kd_weight}
beside {config.lm_weight} for the next-token loss. Made with transformers {transformers.__version__}.

{verdict["sentence"]}

| model | bits per byte, held-out text |
|---|---|
{figures}

Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` on this folder.
"""
