"""A perfect teacher is a fixed point: certain of a text in its own tokens, it teaches nothing to a student that is certain
of the text in its own.
"""

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from families import reader as family
from families import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shared import DATA
from test_shared import reader as real_reader
from test_shared import text as real_text

from kdlib import batching, data, inputs, models, objective, teacher, vocab
from kdlib.config import KD_METHODS, Config
from kdlib.corpus import Document
from kdlib.teacher import TeacherSignal

METHODS = [name for name in KD_METHODS if name != "none"]
WIDTH, SURE = 64, 2000.0
CODE = "def total(values):\n    s = 0\n    for v in values:\n        s += v  # 'sum'\n\n    return s\n\n\nclass A:\n\n    x = [1]\n"
PROSE = "The cats sat down. “Is there none?” asked Emma.\n\nShe looked, and the dogs had gone – nothing was left.\n"
JAPANESE = "東京は日本の首都です。\n\n「はい」と言った。The end 😀👩‍👩‍👧.\n"
FAMILY_PAIRS = [
    pair for pair in itertools.permutations(("byte_level", "unigram", "sentencepiece_bpe", "byte_level_lower"), 2)
]  # fmt: skip


def pair_of(ours, theirs, documents, max_length=96):
    """`(pair, windows)` of two readers and the text they are joined by; heads of random directions."""
    windows = []
    for number, document in enumerate(documents):
        coded = [data.encode(document, each) for each in (ours, theirs)]
        windows += data.cut_windows(document, *coded, ours, theirs, max_length, number)
    sides = []
    for seed, each in enumerate((ours, theirs)):
        model = tiny_model(each.tokenizer, WIDTH, 1, seed=seed)
        weight = model.get_output_embeddings().weight
        weight.data = torch.nn.functional.normalize(torch.randn_like(weight), dim=-1)
        sides.append(model)
    student, larger = sides
    shared = vocab.shared_vocabulary(ours.vocabulary, theirs.vocabulary)
    head = models.Head(student, ours.vocabulary)
    pair = inputs.Pair(teacher.Teacher(larger, theirs), student, ours, head, shared, (0, 0), text=windows)
    return pair, windows


def certain(model, labels):
    """Last hidden states that give every label a probability of 1."""
    states = SURE * model.get_output_embeddings().weight.detach()[labels.clamp_min(0)]
    return torch.where(labels[..., None] < 0, 0.0, states)


def learned(pair, windows, method, monkeypatch, **changes):
    """`(kd, largest gradient at the student's states)`, of a student and a teacher that are certain of the windows."""
    config = Config.from_dict({"kd_method": method, "lm_weight": 0.0, "kd_weight": 1.0, "max_length": 96, **changes})
    made = inputs.make_objective(pair, config)
    batch = batching.collate(windows, *pair.pads)
    states = certain(pair.student, batch.labels).requires_grad_()
    monkeypatch.setattr(objective.models, "read", lambda *_: models.Features(states, (), (), (), None))
    theirs = certain(pair.teacher.model, batch.teacher_labels).flatten(0, 1)
    spans = torch.zeros(batch.num_aligned)
    signal = TeacherSignal(theirs[batch.teacher_rows], spans, inner=theirs[batch.inner_rows])
    if method == "projector":
        ours = states.detach().flatten(0, 1)[batch.student_rows]
        signal = dataclasses.replace(signal, hidden=ours)
        made.beside["projector"] = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        made.beside["projector"].weight.data = torch.eye(WIDTH)
    counts = {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}
    loss, parts, _ = made(batch, signal, counts)
    loss.backward()
    return parts["kd"].item(), states.grad.abs().max().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("names", FAMILY_PAIRS, ids=" ".join)
def test_a_perfect_teacher_teaches_nothing(names, method, monkeypatch):
    readers = [family(name) for name in names]
    pair, windows = pair_of(*readers, [Document(each) for each in (CODE, PROSE, JAPANESE)])
    loss, gradient = learned(pair, windows, method, monkeypatch)
    assert abs(loss) < 1e-5
    assert gradient < 1e-5
