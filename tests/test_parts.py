"""Each part of the objective: against values written out, and against the laws they all obey."""

import copy
import dataclasses
import itertools
import json
import math
import types

import accelerate
import numpy as np
import pytest
import torch
from families import ARCHITECTURES, byte_level, tiny_model, unigram
from host_reads import HostReads

from kdlib import clock, demo
from kdlib.align.boundaries import Alignment
from kdlib.config import Config
from kdlib.data import batching, tokenize, windowing
from kdlib.losses import divergences, partial_tokens
from kdlib.models import hooks, trie
from kdlib.models.projector import FLOOR, FeatureMap, LayerRouter, Standard
from kdlib.session import inputs
from kdlib.training import loop, terms

EVERYTHING = {
    "attention_layers": 2,
    "layerwise_weight": 0.3, "attention_weight": 0.2, "attention_alignment_weight": 0.2, "routing_feature_weight": 0.4,
    "contrastive_weight": 0.1, "kd_method": "first_token",
}  # fmt: skip
FEATURES = sorted(terms.FEATURES)


@pytest.fixture(
    scope="module", params=[("llama", "gpt2"), ("qwen3", "gpt_neox"), ("gpt2", "qwen3"), ("gpt_neox", "llama")]
)
def loaded(request, tmp_path_factory, texts):
    """A student and a teacher of different architectures, widths, depths and head counts."""
    folder = tmp_path_factory.mktemp("pair")
    for name, kind, tokenizer in zip(("student", "teacher"), request.param, (unigram(), byte_level()), strict=True):
        demo.save(ARCHITECTURES[kind](tokenizer), tokenizer, folder / name)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return inputs.load(config_of(folder))


def config_of(folder, **changes):
    values = {
        "teacher": str(folder / "teacher"), "student": str(folder / "student"), "dataset": str(folder / "text.jsonl"),
        "max_length": 48, "batch_size": 4, "max_steps": 4, "check_teacher": False, "eval_tokens": 300,
    }  # fmt: skip
    return Config.from_dict({**values, **EVERYTHING, **changes})


def made(loaded, **changes):
    torch.manual_seed(0)
    config = Config.from_dict({**EVERYTHING, "batch_size": 4, "max_length": 48, **changes})
    return inputs.make_objective(loaded.pair, config, copy.deepcopy(loaded.pair.student)).eval()


def counts_of(*batches):
    return {name: sum(getattr(batch, f"num_{name}") for batch in batches) for name in ("labels", "aligned", "spans")}


def told(loaded, made, batch, counts=None, **more):
    signal = loaded.pair.teacher(batch, **made.teacher_request(made.weights()))
    return made(batch, signal, counts or counts_of(batch), **more)


def test_every_part_is_finite_and_teaches_the_student(loaded):
    for name in FEATURES:
        objective = made(loaded, lm_weight=0.0, kd_weight=0.0, **{f"{n}_weight": 0.0 for n in FEATURES if n != name})
        batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
        loss, found, _ = told(loaded, objective, batch)
        loss.backward()
        assert math.isfinite(loss.item())
        assert loss.item() == pytest.approx(EVERYTHING[f"{name}_weight"] * found[name].item(), rel=1e-5)
        norm = sum(float(p.grad.square().sum()) for p in objective.student.parameters() if p.grad is not None)
        assert norm > 0, name
        assert all(p.grad is not None and p.grad.any() for p in objective.adapters.parameters()), name


def test_the_teachers_head_is_not_decoded_for_nothing(loaded, monkeypatch):
    batch = batching.collate(loaded.train[:2], *loaded.pair.pads)
    monkeypatch.setattr(loaded.pair.teacher.head, "decoder", lambda: pytest.fail("decoded"))
    _, found, _ = told(loaded, made(loaded, kd_weight=0.0), batch)
    assert set(found) >= {"lm", *FEATURES}
    assert "kd" not in found


def test_layers_are_mapped_by_relative_depth(loaded):
    objective = made(loaded, feature_layers=3)
    ours, theirs = (model.config.num_hidden_layers for model in (loaded.pair.student, loaded.pair.teacher.model))
    student, teacher = objective.layers
    assert (student[-1], teacher[-1]) == (ours - 1, theirs - 1)
    for a, b in zip(student, teacher, strict=True):
        assert abs((a + 1) / ours - (b + 1) / theirs) <= 0.5 / theirs + 1e-9
    last = min(2, ours, theirs)
    assert objective.attention_layers == (tuple(range(ours - last, ours)), tuple(range(theirs - last, theirs)))


def test_padding_and_the_split_of_a_batch_change_nothing(loaded):
    objective = made(loaded)
    windows = sorted(loaded.train, key=lambda w: len(w.student_ids))
    group = [windows[0], windows[-1], windows[len(windows) // 2]]
    assert len(group[0].student_ids) < len(group[1].student_ids)
    whole = batching.collate(group, *loaded.pair.pads)
    alone = [batching.collate([window], *loaded.pair.pads) for window in group]
    _, expected, _ = told(loaded, objective, whole)
    sums = {}
    for batch in alone:
        _, found, _ = told(loaded, objective, batch, counts_of(whole))
        for name, value in found.items():
            sums[name] = sums.get(name, 0.0) + value.item()
    assert set(sums) == set(expected) >= {"lm", "kd", *FEATURES}
    for name, value in expected.items():
        assert sums[name] == pytest.approx(value.item(), rel=2e-4, abs=1e-6), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_is_finite_and_near_under_autocast(loaded, dtype):
    objective = made(loaded)
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
    _, expected, _ = told(loaded, objective, batch)
    with torch.autocast("cpu", dtype=dtype):
        loss, found, _ = told(loaded, objective, batch)
    (2.0**10 * loss).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in objective.parameters())
    for name, value in found.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=0.1, abs=0.05), name


def test_features_are_fed_from_the_aligned_positions_of_both_models(loaded):
    """States and layers gathered window by window from what transformers itself returns."""
    objective = made(loaded)
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
    _, found, _ = told(loaded, objective, batch)
    sides = []
    for model, ids, mask, rows, layers in (
        (objective.student, batch.student_ids, batch.student_mask, batch.student_rows, objective.layers[0]),
        (loaded.pair.teacher.model, batch.teacher_ids, batch.teacher_mask, batch.teacher_rows, objective.layers[1]),
    ):
        with torch.no_grad(), hooks.watch(model, layers) as seen:
            last = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        places = [divmod(row, ids.shape[1]) for row in rows.tolist()]
        sides.append(
            [torch.stack([states[b, t] for b, t in places]) for states in (last, *(seen.layers[i] for i in layers))]
        )
    (state, *ours), (last, *theirs) = sides
    match = terms.FeatureBatch(
        types.SimpleNamespace(layers=ours),
        types.SimpleNamespace(layers=theirs, hidden=last),
        state,
        batch.rows_by_window,
    )
    for name in ("layerwise", "routing_feature", "contrastive"):
        expected = terms.FEATURES[name].fn(objective, match).mean().item()
        assert found[name].item() == pytest.approx(expected, rel=1e-4), name


def test_gradient_norms_are_those_of_each_part_alone(loaded):
    """Measured in one pass, against a backward pass of each part to the states where it touches the student."""
    objective = made(loaded)
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
    loss, found, squares = told(loaded, objective, batch, measure=True)
    assert set(squares) == {"lm", "kd", *FEATURES}
    plain, same, none = told(loaded, objective, batch)
    assert (plain.item(), none) == (pytest.approx(loss.item()), {})
    assert {name: value.item() for name, value in same.items()} == {name: value.item() for name, value in found.items()}
    for name in squares:
        only = made(loaded, feature_layers=1, **{f"{n}_weight": 0.0 for n in (*FEATURES, "lm", "kd") if n != name})
        layers = hooks.decoder_layers(only.student)
        lowest = only.attention_layers[0][0]
        touched = {}

        def keep(place, out, touched=touched):
            touched[place] = hooks._first(out)

        handles = [
            only.student.base_model.register_forward_hook(
                lambda _, __, out, keep=keep: keep("state", out.last_hidden_state)
            ),
            layers[-1].register_forward_hook(lambda _, __, out, keep=keep: keep("layers", out)),
            layers[lowest - 1].register_forward_hook(lambda _, __, out, keep=keep: keep("attention_input", out)),
        ]
        loss, _, squares = told(loaded, only, batch, measure=True)
        for handle in handles:
            handle.remove()
        place = only.terms[name].reads
        place = "state" if place == "logits" else place
        assert lowest > 0
        (gradient,) = torch.autograd.grad(loss, touched[place])
        assert float(gradient.square().sum()) == pytest.approx(float(squares[name]), rel=1e-3), name


def test_a_part_that_is_off_costs_nothing_and_gives_zero_gradients(loaded):
    objective = made(loaded, use_curriculum=True)
    batch = batching.collate(loaded.train[:2], *loaded.pair.pads)
    weights = objective.weights(0.1)
    assert {name for name, weight in weights.items() if weight > 0} == {"lm", "kd"}
    wanted = objective.teacher_request(weights)
    assert wanted["taps"] == parts_free_taps()
    loss, found, _ = objective(batch, loaded.pair.teacher(batch, **wanted), counts_of(batch), weights)
    assert set(found) == {"lm", "kd"}
    loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in objective.adapters.parameters())


def parts_free_taps():
    from kdlib.models.forward import Taps

    return Taps()


def test_the_loop_trains_everything_together(loaded):
    objective = made(loaded, preset="documents", share_steps=2, learning_rate=3e-3, kd_top_k=20)
    config = objective.config
    steps = list(
        loop.TrainLoop(
            objective, loaded.pair.teacher, loaded.train, 20, config, accelerate.Accelerator(cpu=True), clock.Clock(),
            loaded.pair.pads,
        )
    )  # fmt: skip
    early, late = steps[1], steps[-1]
    assert set(early.shares) == {"lm", "kd"}
    assert set(late.shares) == {"lm", "kd", *FEATURES}
    assert sum(late.shares.values()) == pytest.approx(1.0)
    assert sum(late.grad_shares.values()) == pytest.approx(1.0)
    assert steps[0].grad_shares is None
    assert 0.0 < late.figures["kd_covered"] <= 1.0
    routed = [value for name, value in late.figures.items() if name.startswith("routing_")]
    assert sum(routed) == pytest.approx(1.0, abs=1e-5)
    assert late.loss == pytest.approx(sum(late.weights[n] * late.parts[n] for n in late.shares), rel=1e-6)
    assert max(step.parts.get("layerwise", 0.0) for step in steps) <= 2.0


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_windows_that_hardly_meet_add_nothing_and_break_nothing(loaded, kept):
    """A window with that many aligned positions beside an ordinary one, and alone."""
    objective = made(loaded, kd_top_k=5)
    few = loaded.train[0]
    names = [f"{side}_{what}" for side in ("student", "teacher") for what in ("rows", "span_ends")]
    few = dataclasses.replace(few, **{name: getattr(few, name)[:kept] for name in names})
    for group in ([few, loaded.train[1]], [few]):
        batch = batching.collate(group, *loaded.pair.pads)
        loss, found, squares = told(loaded, objective, batch, measure=True)
        loss.backward()
        assert math.isfinite(loss.item())
        assert all(math.isfinite(value.item()) for value in (*found.values(), *squares.values()))
    if kept == 0:
        assert all(found[name].item() == 0.0 for name in ("kd", *FEATURES))
        assert found["lm"].item() > 1.0


def twins(tmp_path, texts, **changes):
    """Teacher and student are the same model with the same tokenizer."""
    tokenizer = byte_level()
    for name in ("teacher", "student"):
        demo.save(tiny_model(tokenizer, 16, 3), tokenizer, tmp_path / name)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return inputs.load(config_of(tmp_path, **changes))


@pytest.mark.parametrize("method", ["shared_vocab", "first_token", "chunk_likelihood"])
def test_is_zero_when_student_equals_teacher(tmp_path, texts, method):
    loaded = twins(tmp_path, texts)
    objective = made(loaded, kd_method=method)
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
    with torch.no_grad():
        for each in objective.adapters["layerwise"]:
            each.weight.copy_(torch.eye(16))
    _, found, _ = told(loaded, objective, batch)
    for name in ("kd", "attention", "attention_alignment", "layerwise"):
        assert found[name].item() == pytest.approx(0.0, abs=2e-6), name
    assert batch.num_spans > 20


def test_outlier_dimensions_of_any_size_leave_layerwise_where_it_is():
    """Two of 64 dimensions made a thousand times larger on either side."""
    student, teacher, sample = torch.randn(50, 48), torch.randn(50, 64), (torch.randn(400, 48), torch.randn(400, 64))
    values, raw = [], []
    for scale in (1.0, 1000.0):
        ours, theirs = torch.ones(48), torch.ones(64)
        ours[3] = theirs[[5, 20]] = scale
        torch.manual_seed(0)
        each = FeatureMap(48, 64)
        each.measure(sample[0] * ours, sample[1] * theirs)
        values.append(divergences.one_minus_cosine(*each(student * ours, teacher * theirs)))
        raw.append(((student @ torch.ones(48, 64) - teacher * theirs) ** 2).mean())
    torch.testing.assert_close(values[0], values[1], atol=1e-5, rtol=1e-4)
    assert raw[1] > 100 * raw[0]
    assert 0.0 <= values[0].min() <= values[0].max() <= 2.0


@pytest.mark.parametrize("length", [64, 512])
def test_layerwise_does_not_grow_with_length(length):
    torch.manual_seed(3)
    each = FeatureMap(8, 12)
    student, teacher = torch.randn(1, 8).expand(length, -1), torch.randn(1, 12).expand(length, -1)
    value = divergences.token_mean(divergences.one_minus_cosine(*each(student, teacher)), length)
    assert value.item() == pytest.approx(divergences.one_minus_cosine(*each(student[:1], teacher[:1])).item(), rel=1e-5)


def test_standard_is_measured_once_and_written_out():
    sample = 5.0 + 3.0 * torch.randn(100, 3)
    sample[:, 2] = 7.0
    standard = Standard(3)
    standard.measure(sample)
    mean = [sum(column) / 100 for column in sample.T.tolist()]
    spread = [
        math.sqrt(sum((x - m) ** 2 for x in column) / 100) for column, m in zip(sample.T.tolist(), mean, strict=True)
    ]
    found = standard(torch.tensor([[1.0, 2.0, 7.0]]))[0].tolist()
    assert found == pytest.approx([(1.0 - mean[0]) / spread[0], (2.0 - mean[1]) / spread[1], 0.0], rel=1e-4)
    assert not any(p.requires_grad for p in standard.parameters())


def test_a_feature_map_sends_no_gradient_to_the_teachers_side():
    each = FeatureMap(4, 6)
    student, teacher = torch.randn(5, 4, requires_grad=True), torch.randn(5, 6)
    divergences.one_minus_cosine(*each(student, teacher)).sum().backward()
    assert student.grad.any()
    assert each.weight.grad.any()


def test_the_router_mixes_what_the_students_state_chooses_and_shuts_no_layer_out():
    torch.manual_seed(0)
    router = LayerRouter(4, 6, 3)
    state, layers = torch.randn(7, 4), [torch.randn(7, 6) for _ in range(3)]
    with torch.no_grad():
        router.gate.copy_(50.0 * torch.randn(3, 4))
    mapped, target, weights = router(state, layers)
    free = (state @ router.gate.T).softmax(-1)
    torch.testing.assert_close(weights, 0.8 * free + 0.2 / 3)
    expected = sum(weights[:, k : k + 1] * layers[k] for k in range(3))
    torch.testing.assert_close(target, expected)
    torch.testing.assert_close(mapped, state @ router.map.weight.T)
    largest = 1.0 - FLOOR + FLOOR / 3
    lowest = -largest * math.log(largest) - 2 * (FLOOR / 3) * math.log(FLOOR / 3)
    entropy = -(weights * weights.log()).sum(-1)
    assert entropy.min() >= lowest - 1e-5
    assert entropy.min() < lowest + 0.05  # the floor is what holds it here


def test_the_router_learns_and_asks_nothing_of_the_student():
    router = LayerRouter(4, 6, 2)
    with torch.no_grad():
        router.gate.copy_(torch.randn(2, 4))
    state, layers = torch.randn(7, 4, requires_grad=True), [torch.randn(7, 6) for _ in range(2)]
    _, target, _ = router(state, layers)
    target.sum().backward()
    assert router.gate.grad.any()
    assert state.grad is None or not state.grad.any()


def test_contrastive_negatives_stay_within_their_window():
    match = terms.FeatureBatch(None, type("Signal", (), {"hidden": torch.randn(7, 6)})(), torch.randn(7, 4), (3, 4))
    beside = torch.nn.ModuleDict({"contrastive": FeatureMap(4, 6)})
    found = terms.contrastive(type("Objective", (), {"adapters": beside})(), match)
    mapped, target = beside["contrastive"](match.state, match.teacher.hidden)
    cosine = (
        torch.nn.functional.cosine_similarity(mapped[:, None], target[None], dim=-1).detach()
        / terms.CONTRASTIVE_TEMPERATURE
    )
    for row, window in itertools.chain(((i, range(3)) for i in range(3)), ((i, range(3, 7)) for i in range(3, 7))):
        whole = sum(math.exp(cosine[row, j]) for j in window)
        assert found[row].item() == pytest.approx(-math.log(math.exp(cosine[row, row]) / whole), rel=1e-4)


def small_pair(folder, texts):
    for name, tokenizer, seed in (("student", unigram(), 1), ("teacher", byte_level(), 2)):
        demo.save(tiny_model(tokenizer, 16, 2, seed=seed), tokenizer, folder / name)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return inputs.load(config_of(folder))


@pytest.mark.parametrize("method", ["shared_vocab", "first_token"])
def test_temperature_softens_buckets_and_not_tokens(tmp_path, texts, method):
    loaded = small_pair(tmp_path, texts)
    objective = made(loaded, kd_method=method, kd_temperature=3.0, kd_divergence="reverse_kl")
    batch = batching.collate(loaded.train[:2], *loaded.pair.pads)
    _, found, _ = told(loaded, objective, batch)
    buckets, told_by = trie.buckets_of(loaded.pair, method), []
    for model, ids, mask, rows, own in (
        (objective.student, batch.student_ids, batch.student_mask, batch.student_rows, buckets.student),
        (loaded.pair.teacher.model, batch.teacher_ids, batch.teacher_mask, batch.teacher_rows, buckets.teacher),
    ):
        with torch.no_grad():
            probs = model(ids, attention_mask=mask).logits.double().softmax(-1).flatten(0, 1)[rows, : len(own)]
        sums = torch.zeros(len(rows), buckets.num).double().index_add(1, torch.from_numpy(own), probs) + 1e-30
        soft = sums ** (1 / 3.0)
        told_by.append(soft / soft.sum(-1, keepdim=True))
    ours, theirs = told_by
    agree = partial_tokens.agreement_mask(buckets, batch)
    assert 0.5 < agree.float().mean() < 1.0
    expected = 9.0 * (ours * (ours / theirs).log()).sum(-1).where(agree, 0.0).mean()
    assert found["kd"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_chunk_likelihood_is_written_out_over_whole_models(tmp_path, texts):
    loaded = small_pair(tmp_path, texts)
    objective = made(loaded, kd_method="chunk_likelihood", kd_temperature=3.0, loss_chunk_size=7, label_smoothing=0.2)
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
    for stops, rows in ((batch.student_span_ends, batch.student_rows), (batch.teacher_span_ends, batch.teacher_rows)):
        stops[::5] = rows[::5]  # as if a normaliser had changed every fifth span
    assert batch.num_spans < batch.num_aligned
    _, found, _ = told(loaded, objective, batch)
    total, num, longest = 0.0, 0, 0
    logs = []
    for model, ids, mask in (
        (objective.student, batch.student_ids, batch.student_mask),
        (loaded.pair.teacher.model, batch.teacher_ids, batch.teacher_mask),
    ):
        with torch.no_grad():
            logits = model(ids, attention_mask=mask).logits.double().log_softmax(-1).flatten(0, 1)
        logs.append(logits[:-1].gather(1, ids.flatten()[1:, None]).squeeze(1))
    rows = (batch.student_rows, batch.student_span_ends), (batch.teacher_rows, batch.teacher_span_ends)
    texts_of = [
        [reader.tokenizer.decode(ids.flatten()[a + 1 : b + 1]) for a, b in zip(*pair, strict=True)]
        for reader, ids, pair in zip(
            (loaded.pair.student_reader, loaded.pair.teacher.reader),
            (batch.student_ids, batch.teacher_ids),
            rows,
            strict=True,
        )
    ]
    for i, (a, b) in enumerate(zip(*rows[0], strict=True)):
        c, d = rows[1][0][i], rows[1][1][i]
        if b > a:
            p, q = (math.exp(float(log[x:y].sum()) / 3.0) for log, x, y in ((logs[1], c, d), (logs[0], a, b)))
            total += 3.0 * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
            num, longest = num + 1, max(longest, int(b - a))
            assert texts_of[0][i].strip() == texts_of[1][i].strip()
    assert num == batch.num_spans > 20
    assert longest > 1
    assert found["kd"].item() == pytest.approx(total / num, rel=1e-3)


def test_a_span_ends_at_the_next_boundary_and_holds_no_token_that_was_changed_or_is_not_learned():
    """Boundaries after the tokens 0, 1, 3, 4, 6 of ours and 0, 2, 3, 4, 5 of theirs."""
    boundaries = Alignment(np.array([0, 1, 3, 4, 6]), np.array([0, 2, 3, 4, 5]), np.arange(5), np.ones(5, bool))

    def side(size, changed=(), marks=(), prompts=()):
        every = np.arange(size)
        off = [~np.isin(every, places) for places in (changed, marks, prompts)]
        return tokenize.Encoded(every, every, off[0], off[0], every, off[1], off[2])

    assert windowing._has_span(side(7), side(6), boundaries).tolist() == [True, True, True, True, False]
    assert windowing._has_span(side(7, changed=[2]), side(6), boundaries).tolist() == [True, False, True, True, False]
    assert windowing._has_span(side(7, marks=[4]), side(6), boundaries).tolist() == [True, True, False, True, False]
    assert windowing._has_span(side(7, prompts=[5]), side(6), boundaries).tolist() == [True, True, True, False, False]
    assert windowing._has_span(side(7), side(6, changed=[1]), boundaries).tolist() == [False, True, True, True, False]
    assert windowing._has_span(side(7), side(6, marks=[5]), boundaries).tolist() == [True, True, True, False, False]
    assert windowing._has_span(side(7), side(6, prompts=[5]), boundaries).tolist() == [True, True, True, True, False]
    assert windowing._has_span(side(7), side(6), Alignment(*(np.zeros(0, int),) * 3, np.zeros(0, bool))).tolist() == []


def test_the_plug_board_holds_every_part_of_the_mission():
    assert set(terms.FEATURES) == {"layerwise", "attention", "attention_alignment", "routing_feature", "contrastive"}
    assert set(terms.KD) == {"none", "shared_vocab", "first_token", "byte_prefix", "projector", "chunk_likelihood"}
    for part in (*terms.LM.values(), *terms.FEATURES.values(), *(p for row in terms.KD.values() for p in row.values())):
        assert part.fn.__doc__
    for part in (*terms.FEATURES.values(), *(row["kd"] for row in terms.KD.values() if row)):
        assert part.fn.__doc__.count("Cost:") == part.fn.__doc__.count("Start:") == 1


@pytest.mark.parametrize("method", sorted(terms.KD))
def test_between_forward_and_backward_the_host_waits_for_nothing(loaded, monkeypatch, method):
    """All terms at once, from a live teacher and, where it can be, from one that was truncated for a cache."""
    objective = made(loaded, kd_method=method)
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads).to("cpu")
    assert batch.host_copy is not None
    counts, weights = counts_of(batch), objective.weights()
    signal = loaded.pair.teacher(batch, **objective.teacher_request(weights))
    with HostReads(monkeypatch) as recorder:
        loss, *_ = objective(batch, signal, counts, weights)
        loss.backward()
    reads = set(recorder.reads)
    assert reads == set(), "\n".join(sorted(reads))


def test_a_batch_on_another_device_keeps_its_copy_in_host_memory(loaded):
    """`meta` tensors have no values: they stand for those of a GPU, which would have to be waited for."""
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
    moved = batch.to("meta")
    assert moved.labels.is_meta and moved.host_copy is moved.to("meta").host_copy is batch
    for side in ("student", "teacher"):
        for ours, theirs in zip(moved.spans_of(side), batch.spans_of(side), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert moved.inner_rows.is_meta
