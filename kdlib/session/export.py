"""Students on disk, in Hugging Face's own format, whole or not at all."""

from pathlib import Path

import transformers

from kdlib import files


def save_student(model, tokenizer, path, card=""):
    """Writes weights, tokenizer, generation config and a model card, so that `AutoModelForCausalLM.from_pretrained(path)`
    loads it. An older `path` is replaced.
    """
    with files.atomic(path) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(beside)
        (beside / "README.md").write_text(card, encoding="utf-8")


def model_card(config, verdict):
    """A card in Markdown: what it is, from whom, on what, and what was measured. `verdict` is None before the end."""
    if verdict is None:
        verdict = {"sentence": "Training is not over: these are the best weights so far.", "bits_per_byte": {}}
    rows = [f"| {name} | {value:.4f} |" for name, value in verdict["bits_per_byte"].items() if value is not None]
    figures = "\n".join(["| model | bits per byte, held-out text |", "|---|---|", *rows] if rows else [])
    teacher = Path(config.teacher or config.teacher_cache).name
    return f"""---
library_name: transformers
tags: [knowledge-distillation, kdlib]
---

# Student distilled with kdlib

Teacher `{teacher}`, student `{Path(config.student).name}`, text `{Path(config.dataset).name}`;
`kd_method` {config.kd_method}, {config.kd_divergence}, temperature {config.kd_temperature}, weight {config.kd_weight}
beside {config.lm_weight} for the next-token loss. Made with transformers {transformers.__version__}.

{verdict["sentence"]}

{figures}

Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` on this folder.
"""
