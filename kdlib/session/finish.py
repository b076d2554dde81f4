"""End of a run or of a session: the exported student, the verdict, samples and report."""

import itertools
from pathlib import Path

import transformers

from kdlib import files
from kdlib.evaluation import internals, samples, verdict
from kdlib.models import loading, lora
from kdlib.report import html
from kdlib.session.arm import CONTROL


def best_of(arms):
    """Returns the distilled arm with the best validation score so far, or None."""
    evaluated = [arm for arm in arms if arm.name != CONTROL and arm.best_weights is not None]
    return min(evaluated, key=lambda arm: arm.best, default=None)


def finish_run(config, inputs, folder, scores, pairs, read_s=0.0):
    """Returns the content of `verdict.json`, and writes student and verdict to `folder` (a `run_folder.RunFolder`, or
    None in a process that does not write).

    `scores` are the test scores before training, `pairs` the finished arms `(distilled, control or None)`, `read_s` the
    seconds of the teacher's pass over the text. `samples` and `recut` stay empty until `report_tasks` fills them.
    """
    compared = [(control.at_compare, distilled.at_compare) for distilled, control in pairs if control]
    chosen = best_of(distilled for distilled, _ in pairs)
    scores = {
        **scores,
        "ce_only": verdict.mean_score([control for control, _ in compared]) if compared else None,
        "distilled": verdict.mean_score([distilled.at_end for distilled, _ in pairs]),
    }
    result = verdict.make_verdict(config.control, scores, compared)
    result |= {"alignment": inputs.alignment, "read_s": read_s}
    result["train_s"] = {arm.name: arm.compare_s for arm in pairs[0] if arm}
    result["steps"] = {arm.name: arm.compare_step for arm in pairs[0] if arm}
    result["exported"] = {"repeat": chosen.repeat, "step": chosen.best_step, "averaged": chosen.best_averaged}
    result["samples"], result["recut"] = {}, {}
    if folder:
        write_student(config, inputs.pair, chosen, folder, model_card(config, result))
        files.write_json(folder.path / "verdict.json", result)
    return result


def weights_of(pairs, start_weights):
    """Returns the weights of all students of the verdict, by name."""
    chosen = best_of(distilled for distilled, _ in pairs)
    control = pairs[chosen.repeat][1]
    students = {"student_before": start_weights, "distilled": chosen.best_weights}
    return students | ({"ce_only": control.best_weights} if control else {})


def report_tasks(config, inputs, students, folder, result, on_progress=lambda phase, done, total: None):
    """Yields `(name, function)` for each optional part of a finished run. `result` is the verdict, to which samples are
    added. `on_progress(phase, done, total)` is called before each sample.
    """

    def write_samples():
        result.update(_generate_samples(inputs, students, on_progress))
        files.write_json(folder.path / "verdict.json", result)

    def write_internals():
        files.write_json(folder.path / "figures" / "inside.json", internals.look(config, inputs, students))

    yield "the samples", write_samples
    yield "the model analysis", write_internals
    yield "the report", lambda: draw(folder)


def draw(folder):
    """Writes the report and the figures of a run."""
    html.write_report(folder.path)


def export_best_so_far(config, experiment, folder):
    """Writes student and report of an unfinished run."""
    best = best_of(experiment.arms)
    if best:
        write_student(config, experiment.pair, best, folder, model_card(config, None))
        html.write_report(folder.path)


def write_student(config, pair, arm, folder, card):
    """Exports the best weights of an arm as `student/`, and adapters that fit the original student as `adapter/`."""
    loading.load_cpu_state_dict(pair.student, arm.best_weights)
    save_student(lora.merged(pair.student), pair.student_reader.tokenizer, folder.path / "student", card)
    if config.lora_rank and not (config.train_embeddings or config.lora_init in ("pissa", "olora")):
        with files.atomic(folder.path / "adapter") as temporary:
            temporary.mkdir()
            lora.save_adapters(pair.student, config, temporary)


def save_student(model, tokenizer, path, card=""):
    """Writes weights, tokenizer, generation config and model card. An older `path` is replaced atomically."""
    with files.atomic(path) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")


def model_card(config, result):
    """Returns a model card in Markdown: models, text, settings and scores. `result` is None for an unfinished run."""
    if result is None:
        result = {"sentence": "Training is not finished: these are the best weights so far.", "bits_per_byte": {}}
    rows = [f"| {name} | {value:.4f} |" for name, value in result["bits_per_byte"].items() if value is not None]
    table = "\n".join(["| model | bits per byte, held-out text |", "|---|---|", *rows] if rows else [])
    teacher = Path(config.teacher or config.teacher_cache).name
    return f"""---
library_name: transformers
tags: [knowledge-distillation, kdlib]
---

# Student distilled with kdlib

Teacher `{teacher}`, student `{Path(config.student).name}`, text `{Path(config.dataset).name}`;
`kd_method` {config.kd_method}, {config.kd_divergence}, temperature {config.kd_temperature}, weight {config.kd_weight};
weight of the next-token loss {config.lm_weight}. Made with transformers {transformers.__version__}.

{result["sentence"]}

{table}

Load it with `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` on this folder.
"""


def _generate_samples(inputs, students, on_progress):
    """Returns `samples`, continuations of one opening, and `recut`, each student's share of recut tokens over several."""
    pair, num_done = inputs.pair, itertools.count()
    openings = samples.openings(inputs.test, pair.student_reader.tokenizer, samples.NUM_OPENINGS)
    teacher_text = samples.continue_text_by_teacher(pair.teacher.for_split("test"), openings[0])
    texts = {"opening": openings[0], "teacher": teacher_text}
    recut = {}
    for name, weights in students.items():
        loading.load_cpu_state_dict(pair.student, weights)
        continuations = []
        for opening in openings:
            on_progress("the samples", next(num_done), len(students) * len(openings))
            continuations.append(samples.continue_text(pair.student, pair.student_reader, opening))
        texts[name], recut[name] = continuations[0].text, samples.recut_share(continuations)
    return {"samples": texts, "recut": recut}
