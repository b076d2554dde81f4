"""The quality study: what is made with which budget, what is chosen, what is said; and its mixtures of kdlib's own parts."""

import json
import math
import types

import numpy as np
import pytest
import torch

from benchmarks import inside, methods, quality, quality_table, spelled, variants
from benchmarks.methods import DEFAULT, EQUAL_STEPS, METHODS, PLAIN
from benchmarks.rivals import plug
from kdlib import batching, data, inputs, records
from kdlib.config import Config


class Setting:
    name, text, about = "default", "abc", "some text"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study whose runs are made up: bits by method, the second rate better in validation than the first."""
    made = []
    ratios = {DEFAULT: 2.0, "ULD": 4.0}

    def train(setting, kind, name, cell, seed, num_steps):
        made.append((name, cell, seed, num_steps))
        level = {PLAIN: 2.4, EQUAL_STEPS: 2.45, DEFAULT: 2.3}.get(name, 2.35) + 0.01 * (seed == 1)
        record = {
            "what": "run", "setting": "default", "text": "abc", "kind": kind, "method": name, "cell": cell, "seed": seed,
            "steps": num_steps, "best_step": num_steps, "cpu_s": 1.0, "validation": 2.0 - cell["learning_rate"],
            "bits_per_byte": level,
        }  # fmt: skip
        bits = [100 * level + 0.1 * seed, 50 * level]
        return record if seed == quality.TUNING else {**record, "bits": bits}

    monkeypatch.setattr(quality, "train", train)
    monkeypatch.setattr(quality, "cost", lambda setting, name: {"ratio": ratios.get(name, 3.0), "step_s": 0.1})
    found = quality.Study(tmp_path / "runs.jsonl", None)
    found.made = {"default": Setting()}
    found.note({
        "what": "setting", "setting": "default", "text": "abc", "about": "some text", "teacher": 1.9, "trained_before": 2.5,
        "coverage": 0.7, "shared_tokens": 600, "num_bytes": [100, 50],
    })  # fmt: skip
    found.trained = made
    return found


def test_every_method_gets_the_time_of_the_default(study):
    study.run([("default", "pretrained", name) for name in (PLAIN, EQUAL_STEPS, DEFAULT, "ULD")])
    steps = {name: num for name, _, _, num in study.trained}
    assert steps == {PLAIN: 600, EQUAL_STEPS: 300, DEFAULT: 300, "ULD": 150}


def test_the_cell_that_is_best_in_validation_is_taken_to_fresh_seeds(study):
    study.run([("default", "pretrained", DEFAULT)])
    tuned = [cell for _, cell, seed, _ in study.trained if seed == quality.TUNING]
    assert tuned == METHODS[DEFAULT].cells()
    assert len(tuned) == 4
    later = [(cell["learning_rate"], seed) for _, cell, seed, _ in study.trained if seed != quality.TUNING]
    assert later == [(max(methods.RATES), seed) for seed in quality.SEEDS]


def test_plain_training_is_tuned_over_as_many_cells(study):
    assert len(METHODS[PLAIN].cells()) == len(METHODS[DEFAULT].cells()) == len(METHODS["ULD"].cells())
    assert {cell["learning_rate"] for cell in METHODS[PLAIN].cells()} >= {max(methods.RATES)}


def test_a_part_starts_from_the_cell_of_the_default(study):
    study.run([("default", "scratch", "+ contrastive")])
    names = [name for name, *_ in study.trained]
    assert names == [DEFAULT] * 7 + ["+ contrastive"] * 5
    assert study.trained[-1][1] == {
        "learning_rate": 0.01,
        "kd_weight": 0.3,
        "lm_weight": 0.7,
        "contrastive_weight": 0.05,
    }


def test_a_run_that_is_there_is_not_made_again(study):
    jobs = [("default", "pretrained", name) for name in (PLAIN, DEFAULT, "+ contrastive")]
    study.run(jobs)
    made = len(study.trained)
    again = quality.Study(study.path, None)
    again.made = study.made
    again.run(jobs)
    assert len(study.trained) == made
    assert sum(again.num_missing(*job) for job in jobs) == 0


def test_runs_on_another_text_do_not_count(study):
    study.run([("default", "pretrained", PLAIN)])
    study.made["default"].text = "xyz"
    try:
        assert study.num_missing("default", "pretrained", PLAIN) == 7
        assert study.best_cell(study.made["default"], "pretrained", PLAIN) is None
    finally:
        study.made["default"].text = "abc"


def test_the_table_says_the_gain_over_each_control(study, tmp_path):
    study.run([("default", "pretrained", name) for name in (PLAIN, EQUAL_STEPS, DEFAULT, "ULD")])
    told = quality_table.table(study.known)
    row = next(line for line in told.splitlines() if line.startswith(f"| {DEFAULT} |"))
    assert "| 2.00 | 300 | 300 | lr 0.01, kd 0.3, lm 0.7 | 3 | 2.3033 | +0.1000 (" in row
    assert "| +0.1500 (" in row
    assert "teacher at 1.9000 bits per byte, 2.5000 before" in told
    quality_table.draw(study.known, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_an_empty_study_has_an_empty_table(tmp_path):
    assert quality_table.table([]).strip() == ""
    quality_table.draw([], tmp_path / "figure.png")
    assert not (tmp_path / "figure.png").exists()


def test_what_is_asked_for_by_name():
    jobs = quality.chosen([])
    assert len(set(jobs)) == len(jobs)
    assert {name for _, _, name in jobs} == set(METHODS)
    assert quality.chosen(["default", "ULD"]) == [("default", "pretrained", "ULD"), ("default", "scratch", "ULD")]
    with pytest.raises(SystemExit, match="ULT"):
        quality.chosen(["ULT"])


def test_the_committed_results_are_whole():
    if not quality.RESULTS.exists():
        pytest.skip("no results yet")
    known = records.read_records(quality.RESULTS)
    assert quality.RESULTS.stat().st_size < 1_000_000
    for record in known:
        json.dumps(record, allow_nan=False)
        assert record["what"] in ("setting", "cost", "run")
    sizes = {(r["setting"], r["text"]): len(r["num_bytes"]) for r in known if r["what"] == "setting"}
    runs = [r for r in known if r["what"] == "run"]
    assert all(len(r["bits"]) == sizes[r["setting"], r["text"]] for r in runs if "bits" in r)
    keys = [(r["setting"], r["text"], r["kind"], r["method"], json.dumps(r["cell"]), r["seed"]) for r in runs]
    assert len(set(keys)) == len(keys)


# mixtures


@pytest.fixture(scope="module")
def loaded(pair):
    names = {"teacher": "teacher", "student": "student", "dataset": "text.jsonl"}
    paths = {key: str(pair / name) for key, name in names.items()}
    return inputs.load(Config(**paths, max_length=48, batch_size=4, check_teacher=False, eval_tokens=300))


@pytest.mark.parametrize(
    ("make", "other"), [(variants.with_chunks, "chunk_likelihood"), (variants.with_projector, "projector")]
)
def test_a_mixture_is_half_of_each(loaded, make, other):
    found, batch = {}, batching.collate(loaded.train[:4], *loaded.pair.pads)
    counts = {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}
    for key, method, way in (("mixed", DEFAULT, make), ("one", DEFAULT, methods.ours), ("other", other, methods.ours)):
        config = Config(kd_method=method, kd_weight=0.6, lm_weight=0.4)
        objective, teacher = way(types.SimpleNamespace(inputs=loaded, kept={}), config, loaded.pair.student)
        objective.zero_grad()
        weights = objective.weights()
        loss, parts, _ = objective(batch, teacher(batch, **objective.wants(weights)), counts, weights)
        loss.backward()
        found[key] = objective.total({n: float(v) for n, v in parts.items()}, weights)[0]
        gradient = torch.cat([p.grad.flatten() for p in loaded.pair.student.parameters()])
        found[key + " gradient"] = gradient.clone()
        found[key + " projector"] = {n: p.grad.clone() for n, p in objective.beside.named_parameters()}
    assert found["mixed"] == pytest.approx(0.5 * (found["one"] + found["other"]), rel=1e-5)
    middle = 0.5 * (found["one gradient"] + found["other gradient"])
    assert np.allclose(found["mixed gradient"], middle, atol=1e-5)
    for name, gradient in found["other projector"].items():
        assert torch.allclose(found["mixed projector"][name], gradient, atol=1e-5)


# inside a teacher's tokens


SPELLED = [(1,), (1, 2), (1, 2, 3), (1, 4), (5,), (), (1, 2, 1)]
"""Seven teacher tokens, in student tokens."""


def test_a_node_holds_what_may_follow():
    nodes = inside.trie(SPELLED)
    assert sorted(nodes) == [(1,), (1, 2)]
    assert nodes[1,].following.tolist() == [2, 4]
    assert nodes[1,].columns.tolist() == [0, 1, 2, 3, 6]
    assert nodes[1,].places.tolist() == [2, 0, 0, 1, 0]
    assert nodes[1, 2].following.tolist() == [1, 3]
    assert nodes[1, 2].places.tolist() == [2, 1, 0]


def test_the_divergence_inside_written_out():
    nodes = inside.trie(SPELLED)
    student = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.25, 0.05], [0.1, 0.6, 0.1, 0.1, 0.05, 0.05]], dtype=torch.float64)
    teacher = torch.tensor(
        [[0.1, 0.2, 0.1, 0.05, 0.3, 0.2, 0.05], [0.0, 0.5, 0.1, 0.0, 0.1, 0.1, 0.2]], dtype=torch.float64
    )
    found = inside.divergence(student.log(), teacher, [nodes[1,], nodes[1, 2]], [0, 1])
    first = [(0.35 / 0.5, 0.3), (0.05 / 0.5, 0.25), (0.1 / 0.5, 0.45)]  # then 2, then 4, or the token ends
    second = [(0.2 / 0.8, 0.6), (0.1 / 0.8, 0.1), (0.5 / 0.8, 0.3)]
    by_hand = [sum(q * math.log(q / p) for q, p in pairs) for pairs in (first, second)]
    assert found.tolist() == pytest.approx(by_hand, abs=1e-12)


def test_inside_is_zero_for_a_student_that_says_the_same_and_where_the_teacher_says_nothing():
    node = inside.trie(SPELLED)[1,]
    student = torch.tensor([[0.05, 0.05, 0.7, 0.05, 0.1, 0.05]], dtype=torch.float64)
    teacher = torch.tensor([[0.1, 0.2, 0.1, 0.05, 0.3, 0.2, 0.05]], dtype=torch.float64)
    assert inside.divergence(student.log(), teacher, [node], [0]).abs().item() < 1e-12
    nothing = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.5, 0.5, 0.0]], dtype=torch.float64)
    assert inside.divergence(student.log(), nothing, [node], [0]).item() == 0.0


def test_the_turned_divergence_written_out():
    nodes = inside.trie(SPELLED)  # of the student's tokens, in the teacher's
    student = torch.tensor([[0.1, 0.2, 0.1, 0.05, 0.3, 0.2, 0.05]], dtype=torch.float64)
    teacher = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.25, 0.05]], dtype=torch.float64)
    found = inside.divergence_turned(student, teacher.log(), [nodes[1,]], [0])
    pairs = [(0.3, 0.35 / 0.5), (0.25, 0.05 / 0.5), (0.45, 0.1 / 0.5)]
    assert found.item() == pytest.approx(sum(q * math.log(q / p) for q, p in pairs), abs=1e-12)
    never_ends = inside.trie([(1, 2), (1, 4)])[1,]
    found = inside.divergence_turned(torch.tensor([[0.3, 0.6]]).double(), teacher.log(), [never_ends], [0])
    pairs = [(0.3 / 0.55, 0.3 / 0.9), (0.25 / 0.55, 0.6 / 0.9)]
    assert found.item() == pytest.approx(sum(q * math.log(q / p) for q, p in pairs), abs=1e-12)
    logits = torch.tensor([[0.3, -0.2, 0.7, 1.0, 0.1, 0.5, 0.2]], dtype=torch.float64, requires_grad=True)
    loss = lambda x: inside.divergence_turned(x.softmax(-1), teacher.log(), [nodes[1,]], [0])  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)


def test_inside_gradient():
    node = inside.trie(SPELLED)[1,]
    teacher = torch.tensor([[0.1, 0.2, 0.1, 0.05, 0.3, 0.2, 0.05]], dtype=torch.float64)
    logits = torch.tensor([[0.3, -0.2, 0.7, 1.0, 0.1, 0.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: inside.divergence(x.log_softmax(-1), teacher, [node], [0]), logits)


def test_a_teachers_token_is_spelled_as_the_student_reads_it_in_a_text(loaded):
    reader, tokens = loaded.pair.student_reader, loaded.pair.teacher.reader.vocabulary.tokens
    spelled = inside.spelled(reader, tokens)
    first = data.first_tokens(reader, tokens)
    said = [(token, ids) for token, ids in zip(tokens, spelled, strict=True) if ids]
    assert len(said) > 0.4 * len(tokens)
    assert all(b"".join(reader.vocabulary.tokens[i] for i in ids) == token for token, ids in said)
    assert all(ids[0] == begin for ids, begin in zip(spelled, first.tolist(), strict=True) if ids and begin >= 0)


def test_positions_inside_know_what_was_read_since_the_boundary(loaded):
    part = inside.Inside(loaded.pair)
    objective, _ = variants.with_inside(
        types.SimpleNamespace(inputs=loaded, kept={"inside": part}), Config(), loaded.pair.student
    )
    asked, batch = [], batching.collate(loaded.train[:4], *loaded.pair.pads)
    places = part.places

    def watched(rows):
        found = places(rows)
        asked.extend((rows.labels, rows.span_of, *each) for each in zip(*found, strict=True))
        return found

    part.places = watched
    counts = {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}
    weights = objective.weights()
    _, parts, _ = objective(batch, loaded.pair.teacher(batch, **objective.wants(weights)), counts, weights)
    assert weights["inside"] == weights["kd"] == 0.5
    assert asked and parts["inside"] > 0
    for labels, span_of, position, span, node in asked:
        before = [int(labels[i]) for i in range(len(labels)) if span_of[i] == span and i < position]
        assert node is part.nodes[tuple(before)]
        assert span_of[position] == span


def test_whole_and_in_chunks_the_signal_inside_is_the_same(loaded):
    setting = types.SimpleNamespace(inputs=loaded, kept={})
    batch = batching.collate(loaded.train[:4], *loaded.pair.pads)
    counts = {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}
    found = []
    for make in (variants.with_inside, methods.rival(spelled.Spelled)):
        objective, teacher = make(setting, Config(), loaded.pair.student)
        objective.eval()
        if hasattr(objective, "rival"):
            objective.rival.turned = False
        weights = objective.weights()
        found.append(objective(batch, teacher(batch, **objective.wants(weights)), counts, weights)[0].item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    objective.rival.turned = True
    more = objective(batch, teacher(batch), counts, weights)[0]
    assert more.item() > found[1]
    more.backward()
    assert all(p.grad.isfinite().all() for p in loaded.pair.student.parameters())


def test_a_remembering_teacher_says_what_it_said(loaded):
    live, memory = plug.WholeTeacher(loaded.pair.teacher), {}
    first = batching.collate(loaded.train[:4], *loaded.pair.pads)
    teacher = spelled.Remembering(loaded.pair.teacher, memory)
    assert torch.equal(teacher(first), live(first))
    assert sorted(memory) == [0, 1, 2, 3]
    again = batching.collate([loaded.train[i] for i in (3, 1, 0)], *loaded.pair.pads, (96, 96))
    asked = spelled.Remembering(loaded.pair.teacher, memory)
    asked.model = None
    kept = again.teacher_windows.flatten() > 0
    assert torch.allclose(asked(again)[kept], live(again)[kept], atol=1e-4)


def test_contrastive_comes_on_top(loaded):
    setting = types.SimpleNamespace(inputs=loaded, kept={})
    batch = batching.collate(loaded.train[:4], *loaded.pair.pads)
    counts, found = {"labels": batch.num_labels}, {}
    for kind in (spelled.Spelled, spelled.SpelledContrastive):
        objective, teacher = methods.rival(kind)(setting, Config(contrastive_weight=0.1), loaded.pair.student)
        found[kind] = objective(batch, teacher(batch), counts, objective.weights())[1]["kd"].item()
    more = (found[spelled.SpelledContrastive] - found[spelled.Spelled]) / 0.2
    assert 0.5 * math.log(min(batch.rows_by_window)) < more < 2.0 * math.log(max(batch.rows_by_window))
    assert [p.shape for p in objective.beside.parameters()] == [(24, 16)]
