"""The end of a run, or of a session: verdict, student, report."""

import itertools

from kdlib import files
from kdlib.evaluation import internals, samples, verdict
from kdlib.models import loading
from kdlib.report import html
from kdlib.session import export
from kdlib.session.arm import CONTROL


def best_of(arms):
    """The distilled leg with the best weights so far, None where none has any."""
    ready = [arm for arm in arms if arm.name != CONTROL and arm.best_weights is not None]
    return min(ready, key=lambda arm: arm.best, default=None)


def finish_run(config, inputs, folder, scores, pairs, read_s=0.0):
    """Makes the content of `verdict.json`, from the test `scores` before training and `pairs` of finished legs `(distilled,
    control or None)`, and writes student and verdict into `folder` (a `run_folder.RunFolder`, or None for a process
    that does not write). `read_s`: seconds in which the teacher read first. `samples` and `recut` stay empty: `extras`
    adds them.
    """
    compared = [(control.at_compare, distilled.at_compare) for distilled, control in pairs if control]
    chosen = best_of(distilled for distilled, _ in pairs)
    scores = {
        **scores,
        "ce_only": verdict.mean_score([ce for ce, _ in compared]) if compared else None,
        "distilled": verdict.mean_score([distilled.at_end for distilled, _ in pairs]),
    }
    answer = verdict.make_verdict(config.control, scores, compared)
    answer |= {"alignment": inputs.alignment, "read_s": read_s}
    answer["train_s"] = {arm.name: arm.compare_s for arm in pairs[0] if arm}
    answer["steps"] = {arm.name: arm.compare_step for arm in pairs[0] if arm}
    answer["exported"] = {"repeat": chosen.repeat, "step": chosen.best_step, "averaged": chosen.best_averaged}
    answer["samples"], answer["recut"] = {}, {}
    if folder:
        write_student(inputs.pair, chosen, folder, export.model_card(config, answer))
        files.write_json(folder.path / "verdict.json", answer)
    return answer


def weights_of(pairs, start_weights):
    """The weights of all students that a verdict shows, by name."""
    chosen = best_of(distilled for distilled, _ in pairs)
    control = pairs[chosen.repeat][1]
    students = {"student_before": start_weights, "distilled": chosen.best_weights}
    return students | ({"ce_only": control.best_weights} if control else {})


def extras(config, inputs, students, folder, answer, on_progress=lambda phase, done, total: None):
    """`(name, work)` of what shows a finished run: any of it may fail without harm. `answer`: as from `finish_run`, which gets
    its `samples` and `recut`. `on_progress(phase, done, total)` is called before each sample.
    """

    def write_samples():
        answer.update(_samples(inputs, students, on_progress))
        files.write_json(folder.path / "verdict.json", answer)

    def look_inside():
        files.write_json(folder.path / "figures" / "inside.json", internals.look(config, inputs, students))

    yield "the samples", write_samples
    yield "the look inside", look_inside
    yield "the report", lambda: draw(folder)


def draw(folder):
    """Draws the report and the figures of a run."""
    html.write_report(folder.path)


def export_best_so_far(config, experiment, folder):
    """Student and report of a run that is not over."""
    best = best_of(experiment.arms)
    if best:
        write_student(experiment.pair, best, folder, export.model_card(config, None))
        html.write_report(folder.path)


def write_student(pair, arm, folder, card):
    """Export the best weights of a leg as `student/`."""
    loading.load_cpu_state_dict(pair.student, arm.best_weights)
    export.save_student(pair.student, pair.student_reader.tokenizer, folder.path / "student", card)


def _samples(inputs, students, on_progress):
    """`samples`: what teacher and students write after the same beginning of a held-out text; `recut`: the share of each
    student's tokens, over several beginnings, that its tokenizer would cut otherwise.
    """
    pair, done = inputs.pair, itertools.count()
    openings = samples.openings(inputs.test, pair.student_reader.tokenizer, samples.NUM_OPENINGS)
    texts = {"opening": openings[0], "teacher": samples.teacher_says(pair.teacher.of("test"), openings[0])}
    shares = {}
    for name, weights in students.items():
        loading.load_cpu_state_dict(pair.student, weights)
        found = []
        for opening in openings:
            on_progress("the samples", next(done), len(students) * len(openings))
            found.append(samples.continue_text(pair.student, pair.student_reader, opening))
        texts[name], shares[name] = found[0].text, samples.recut_share(found)
    return {"samples": texts, "recut": shares}
