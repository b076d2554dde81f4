"""The loop against ten lines of plain torch; what may and may not touch what."""

import copy
import itertools

import accelerate
import pytest
import torch
import torch.nn.functional as F

from kdlib import clock
from kdlib.config import Config
from kdlib.data import batching
from kdlib.losses import divergences
from kdlib.models import trie
from kdlib.session import inputs
from kdlib.training import loop, optimizer
from kdlib.training.optimizer import Balance, learning_rate_factor, ramp

METHODS = ("shared_vocab", "first_token", "projector", "none")


@pytest.fixture
def loaded(settings):
    return inputs.load(Config.from_dict(settings))


def config_of(settings, **changes):
    return Config.from_dict({**settings, **changes})


def run(loaded, config, num_steps=2, objective=None):
    objective = objective or inputs.make_objective(loaded.pair, config)
    teacher = None if config.kd_method == "none" else loaded.pair.teacher
    machine = accelerate.Accelerator(cpu=True)
    steps = loop.TrainLoop(
        objective, teacher, loaded.train, num_steps, config, machine, clock.Clock(), loaded.pair.pads
    )
    return list(steps), objective


def kd_by_hand(loaded, config, batch, student_logits):
    """The distillation loss of a batch, position by position, from whole models' logits in float64."""
    pair = loaded.pair
    with torch.no_grad():
        logits = pair.teacher.model(batch.teacher_ids, attention_mask=batch.teacher_mask).logits.flatten(0, 1)
    if config.kd_method == "projector":
        return None
    buckets = trie.buckets_of(pair, config.kd_method)
    total = 0.0
    for row, other in zip(batch.student_rows.tolist(), batch.teacher_rows.tolist(), strict=True):
        following = batch.labels.flatten()[row], batch.teacher_labels.flatten()[other]
        if buckets.student[following[0]] != buckets.teacher[following[1]]:
            continue
        p, q = logits[other].double().softmax(-1), student_logits[row].double().softmax(-1)
        ps, qs = torch.zeros(buckets.num).double(), torch.zeros(buckets.num).double()
        ps = ps.index_add(0, torch.from_numpy(buckets.teacher), p[: len(buckets.teacher)])
        qs = qs.index_add(0, torch.from_numpy(buckets.student), q[: len(buckets.student)])
        kept = ps > 0
        total = total + (ps[kept] * (ps[kept].log() - qs[kept].log())).sum()
    return total / len(batch.student_rows)


@pytest.mark.parametrize("method", ["shared_vocab", "first_token", "none"])
def test_two_steps_equal_a_loop_in_plain_torch(loaded, settings, method):
    changes = {"kd_weight": 0.7, "lm_weight": 0.3, "batch_size": 3, "weight_decay": 10.0}
    config = config_of(settings, kd_method=method, warmup=0.5, **changes)
    model = copy.deepcopy(loaded.pair.student)
    records, objective = run(loaded, config, num_steps=2)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 10.0}, {"params": plain, "weight_decay": 0.0}], lr=1e-3, betas=(0.9, 0.95)
    )
    order = batching.batch_order(loaded.train, 3, config.seed, 0)
    model.train()
    for step, record in enumerate(records):
        batch = batching.collate([loaded.train[i] for i in order[step]], *loaded.pair.pads)
        logits = model(batch.student_ids, attention_mask=batch.student_mask).logits.flatten(0, 1)
        loss = 0.3 * F.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100)
        if method != "none":
            loss = loss + 0.7 * kd_by_hand(loaded, config, batch, logits)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * learning_rate_factor(step, 2, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert record.loss == pytest.approx(loss.item(), rel=1e-5)
        assert record.grad_norm == pytest.approx(norm.item(), rel=1e-4)
        assert record.lr == pytest.approx(optimizer.param_groups[0]["lr"])
    for (name, ours), theirs in zip(objective.student.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_splitting_a_step_changes_nothing(loaded, settings, method):
    found = []
    for batch_size, accumulation in ((8, 1), (2, 4), (1, 8)):
        changes = {"kd_method": method, "batch_size": batch_size, "grad_accumulation": accumulation, "warmup": 1.0}
        config = config_of(settings, **changes)
        found.append(run(loaded, config, num_steps=2, objective=fresh(loaded, config))[0])
    (first, second), *others = found
    for other, after in others:
        assert other.loss == pytest.approx(first.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
        assert other.num_tokens == first.num_tokens
        assert (other.lr, after.lr) == (first.lr, second.lr)


def fresh(loaded, config):
    return inputs.make_objective(loaded.pair, config, copy.deepcopy(loaded.pair.student))


@pytest.mark.parametrize("method", METHODS)
def test_chunking_the_head_changes_neither_value_nor_gradient(loaded, settings, method):
    found = []
    for chunk in (10_000, 7):
        config = config_of(settings, kd_method=method, loss_chunk_size=chunk)
        objective = fresh(loaded, config)
        batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
        signal = None if method == "none" else loaded.pair.teacher(batch)
        loss, _, _ = objective(
            batch, signal, {"labels": batch.num_labels, "aligned": batch.num_aligned, "spans": batch.num_spans}
        )
        loss.backward()
        found.append((loss.detach(), [p.grad for p in objective.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_padding_changes_nothing(loaded, settings):
    """A short window beside a long one gives the loss it gives alone."""
    config = config_of(settings, kd_method="first_token")
    objective = fresh(loaded, config).eval()
    short, long = sorted(loaded.train, key=lambda w: len(w.student_ids))[:: len(loaded.train) - 1]
    assert len(short.student_ids) < len(long.student_ids)
    counts = {"labels": 100, "aligned": 100, "spans": 100}
    total = 0.0
    for group in ([short], [long], [short, long]):
        batch = batching.collate(group, *loaded.pair.pads)
        loss, _, _ = objective(batch, loaded.pair.teacher(batch), counts)
        total += loss.item() if len(group) == 1 else -loss.item()
    assert total == pytest.approx(0.0, abs=1e-5)


def test_the_teacher_stays_in_evaluation_mode_and_gets_no_gradient(loaded, settings):
    config = config_of(settings, kd_method="projector")
    objective = fresh(loaded, config)
    before = {k: v.clone() for k, v in loaded.pair.teacher.model.state_dict().items()}
    run(loaded, config, objective=objective)
    objective.train()
    teacher = loaded.pair.teacher.model
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in objective.parameters()}
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_the_teacher_reads_its_own_ids(loaded, settings):
    batch = batching.collate(loaded.train[:2], *loaded.pair.pads)
    hidden = loaded.pair.teacher(batch).hidden
    model = loaded.pair.teacher.model
    states = model.model(batch.teacher_ids, attention_mask=batch.teacher_mask).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(hidden, states[batch.teacher_rows])
    assert not hidden.requires_grad


def gradients(loaded, config):
    """Gradients of one batch: the projector's (None without one) and the student's."""
    objective = fresh(loaded, config).eval()
    batch = batching.collate(loaded.train[:2], *loaded.pair.pads)
    loss, _, _ = objective(
        batch,
        loaded.pair.teacher(batch),
        {"labels": batch.num_labels, "aligned": batch.num_aligned, "spans": batch.num_spans},
    )
    loss.backward()
    beside = objective.adapters["projector"].weight.grad if len(objective.adapters) else None
    return beside, [p.grad for p in objective.student.parameters()]


def test_the_projector_learns_by_its_own_loss_and_the_student_is_not_touched_by_it(loaded, settings):
    by_kd, _ = gradients(loaded, config_of(settings, kd_method="projector", kd_weight=5.0, lm_weight=0.0))
    without, student = gradients(loaded, config_of(settings, kd_method="projector", kd_weight=0.0, lm_weight=1.0))
    assert by_kd.abs().sum() > 0
    torch.testing.assert_close(by_kd, without)
    _, plain = gradients(loaded, config_of(settings, kd_method="none", lm_weight=1.0))
    torch.testing.assert_close(student, plain)


def test_the_projectors_loss_is_cross_entropy_through_the_live_head(loaded, settings):
    config = config_of(settings, kd_method="projector", kd_divergence="forward_kl", kd_temperature=2.0)
    objective = fresh(loaded, config).eval()
    batch = batching.collate(loaded.train[:2], *loaded.pair.pads)
    signal = loaded.pair.teacher(batch)
    _, parts, _ = objective(
        batch, signal, {"labels": batch.num_labels, "aligned": batch.num_aligned, "spans": batch.num_spans}
    )
    head = objective.student.get_output_embeddings().weight.double()
    projected = signal.hidden.double() @ objective.adapters["projector"].weight.double().T @ head.T
    labels = batch.labels.flatten()[batch.student_rows]
    assert parts["projector"].item() == pytest.approx(F.cross_entropy(projected, labels).item(), rel=1e-5)
    states = objective.student.model(batch.student_ids, attention_mask=batch.student_mask).last_hidden_state
    student = states.flatten(0, 1)[batch.student_rows].double() @ head.T
    expected = (
        4.0
        * divergences.forward_kl(*(divergences.log_softmax(logits, 2.0) for logits in (student, projected)))
        .mean()
        .item()
    )
    assert parts["kd"].item() == pytest.approx(expected, rel=1e-4)


def test_the_projector_is_in_the_optimizer_with_its_own_rate_and_clip(loaded, settings):
    config = config_of(settings, kd_method="projector", projector_learning_rate=0.05, max_grad_norm=1e-3)
    objective = fresh(loaded, config)
    made = optimizer.make_optimizer(objective, config)
    (group,) = [g for g in made.param_groups if any(p is objective.adapters["projector"].weight for p in g["params"])]
    assert (group["lr"], len(group["params"])) == (0.05, 1)
    before = objective.adapters["projector"].weight.detach().clone()
    run(loaded, config, num_steps=1, objective=objective)
    assert (objective.adapters["projector"].weight - before).abs().max() > 1e-4
    norms = []
    for p in (objective.adapters, objective.student):
        for q in p.parameters():
            q.grad = torch.ones_like(q)
        norms.append(sum(q.numel() for q in p.parameters()) ** 0.5)
    found = loop._clip(objective, 1.0, accelerate.Accelerator(cpu=True), made)
    assert float(found) == pytest.approx(norms[1], rel=1e-5)
    assert objective.adapters["projector"].weight.grad.norm().item() == pytest.approx(1.0, rel=1e-3)


def test_what_is_kept_of_a_training_does_not_change_with_it(loaded, settings):
    """It is written to the disk while the next steps are taken."""
    config = config_of(settings, kd_method="projector", use_ema=True)
    machine, objective = accelerate.Accelerator(cpu=True), fresh(loaded, config)
    training = loop.TrainLoop(
        objective, loaded.pair.teacher, loaded.train, 3, config, machine, clock.Clock(), loaded.pair.pads
    )
    steps = iter(training)
    next(steps)
    kept = training.state_tensors()
    before = copy.deepcopy(kept)
    next(steps)
    assert set(kept) == {"student", "adapters", "optimizer", "average", "random"}
    for group, tensors in kept.items():
        assert all(torch.equal(tensor, before[group][name]) for name, tensor in tensors.items()), group
    after = training.state_tensors()
    assert all(any(not torch.equal(after[g][name], t) for name, t in kept[g].items()) for g in set(kept) - {"random"})


def test_gradients_do_not_pile_up_over_steps(loaded, settings):
    config = config_of(settings, kd_method="none", learning_rate=0.0)
    records, objective = run(loaded, config, num_steps=2)
    assert all(p.grad is None or not p.grad.any() for p in objective.parameters())
    assert records[1].grad_norm < 1.5 * records[0].grad_norm


def test_shares_add_up_and_leave_the_projectors_own_loss_out(loaded, settings):
    config = config_of(settings, kd_method="projector", kd_weight=0.25, lm_weight=1.0)
    (record, *_), _ = run(loaded, config)
    assert set(record.parts) == {"lm", "kd", "projector"}
    assert set(record.shares) == {"lm", "kd"}
    assert sum(record.shares.values()) == pytest.approx(1.0)
    assert record.loss == pytest.approx(record.parts["lm"] + 0.25 * record.parts["kd"])
    assert record.shares["kd"] == pytest.approx(0.25 * record.parts["kd"] / record.loss)


def test_the_loop_learns(loaded, settings):
    config = config_of(settings, kd_method="first_token", learning_rate=1e-2, batch_size=8)
    records, _ = run(loaded, config, num_steps=25)
    assert records[-1].parts["lm"] < 0.8 * records[0].parts["lm"]
    assert records[-1].parts["kd"] < 0.95 * records[0].parts["kd"]


def test_rate_rises_then_falls_to_a_tenth():
    factors = [learning_rate_factor(step, 100, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(factors[9:100]))
    assert factors[99] == factors[100] == pytest.approx(0.1)
    assert factors[54] == pytest.approx(0.1 + 0.45, abs=1e-9)


def test_windows_that_fill_no_step_are_refused_and_not_waited_for(loaded):
    with pytest.raises(ValueError, match="3 windows do not fill one optimizer step of 4"):
        next(loop.steps_of(loaded.train[:3], 4, seed=0))
    assert len(next(loop.steps_of(loaded.train[:4], 4, seed=0))) == 4


def test_buckets_of_a_pair_are_made_once_for_each_method(loaded):
    first = {method: trie.buckets_of(loaded.pair, method) for method in ("shared_vocab", "first_token")}
    assert first["shared_vocab"].student.tolist() != first["first_token"].student.tolist()
    assert all(trie.buckets_of(loaded.pair, method) is found for method, found in first.items())


def test_a_part_comes_in_smoothly_at_its_time():
    assert [ramp(progress, 0.0) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    assert [ramp(progress, 0.3) for progress in (0.0, 0.3, 0.35, 1.0)] == [0.0, 0.0, 1.0, 1.0]
    assert ramp(0.325, 0.3) == pytest.approx(0.5)
    rising = [ramp(0.3 + 0.0005 * i, 0.3) for i in range(101)]
    assert all(0.0 <= b - a < 0.02 for a, b in itertools.pairwise(rising))


def test_the_curriculum_has_three_phases(loaded, settings):
    config = config_of(settings, preset="documents")
    objective = fresh(loaded, config)
    on = {p: {n for n, w in objective.weights(p).items() if w > 0} for p in (0.0, 0.29, 0.31, 0.59, 0.61, 1.0)}
    features = {"layerwise", "attention", "attention_alignment", "routing_feature"}
    assert on[0.0] == on[0.29] == {"lm", "kd"}
    assert on[0.31] == on[0.59] == {"lm", "kd"} | features
    assert on[0.61] == on[1.0] == {"lm", "kd", "contrastive"} | features
    assert objective.weights(1.0) == {name: getattr(config, f"{name}_weight") for name in objective.terms}


def test_balance_gives_each_part_its_share_of_the_loss():
    balance = Balance({"kd": 0.6, "lm": 0.2, "layerwise": 0.2})
    given, whole = (
        {"lm": 0.5, "kd": 0.5, "layerwise": 0.1, "projector": 1.0},
        dict.fromkeys(("lm", "kd", "layerwise"), 1.0),
    )
    assert balance.weights(given, whole) == given
    values = {"lm": 4.0, "kd": 1.0, "layerwise": 0.25, "projector": 3.0}
    balance.update(values)
    found = balance.weights(given, whole)
    assert found["lm"] == pytest.approx(0.5)
    assert found["projector"] == 1.0
    total = sum(found[name] * values[name] for name in whole)
    assert [found[n] * values[n] / total for n in ("kd", "lm", "layerwise")] == pytest.approx([0.6, 0.2, 0.2])
    half = balance.weights({**given, "layerwise": 0.05}, {**whole, "layerwise": 0.5})
    assert half["layerwise"] == pytest.approx(found["layerwise"] / 2)
    balance.update({**values, "kd": 3.0})
    assert balance.values["kd"] == pytest.approx(0.95 * 1.0 + 0.05 * 3.0)


def test_balance_in_the_loop_holds_the_shares(loaded, settings):
    config = config_of(settings, balance="kd=0.7,lm=0.3", batch_size=4, kd_method="first_token")
    records, _ = run(loaded, config, num_steps=30)
    late = [record.shares["kd"] for record in records[10:]]
    assert sum(late) / len(late) == pytest.approx(0.7, abs=0.03)
    assert abs(records[0].shares["kd"] - 0.7) > 0.05
    assert records[-1].weights["lm"] == pytest.approx(config.lm_weight)


class Broken(torch.nn.Module):
    """An objective whose loss is no number at some steps."""

    def __init__(self, objective, steps, how):
        super().__init__()
        self.inner, self.bad, self.how, self.calls = objective, steps, how, 0

    def __getattr__(self, name):
        if name in ("inner", "bad", "how", "calls"):
            return super().__getattr__(name)
        return getattr(self.inner, name)

    def forward(self, batch, signal, counts, weights, measure):
        self.calls += 1
        loss, values, squares = self.inner(batch, signal, counts, weights, measure)
        if self.calls in self.bad and self.how == "loss":
            return loss * float("nan"), {**values, "kd": values["kd"] * float("nan")}, squares
        if self.calls in self.bad:  # the loss is fine, its gradient is not
            weight = next(self.inner.student.parameters())
            loss = loss + 0.0 * torch.sqrt((weight - weight.detach()).abs().sum())
        return loss, values, squares


@pytest.mark.parametrize(("how", "said"), [("loss", "kd not finite"), ("gradient", "gradient not finite")])
def test_a_step_that_is_no_number_changes_no_weight_and_is_told(loaded, settings, how, said):
    config = config_of(settings, kd_method="first_token", batch_size=4)
    objective = Broken(fresh(loaded, config), {2}, how)
    machine = accelerate.Accelerator(cpu=True)
    weights, records = [], []
    for record in loop.TrainLoop(
        objective, loaded.pair.teacher, loaded.train, 3, config, machine, clock.Clock(), loaded.pair.pads
    ):
        records.append(record)
        weights.append([p.detach().clone() for p in objective.inner.student.parameters()])
    assert [record.skipped.partition(" (")[0] for record in records] == ["", said, ""]
    assert "documents" in records[1].skipped
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights[1], weights[2], strict=True))
    assert all(torch.isfinite(p).all() for p in objective.inner.student.parameters())
    assert records[2].lr == pytest.approx(1e-3 * learning_rate_factor(2, 3, config.warmup))


def test_too_many_such_steps_in_a_row_stop_the_run_with_a_reason(loaded, settings):
    config = config_of(settings, non_finite_steps=3)
    objective = Broken(fresh(loaded, config), {1, 3, 4, 5}, "loss")
    machine, told = accelerate.Accelerator(cpu=True), []
    with pytest.raises(FloatingPointError, match=r"3 steps in a row .* kd not finite .*lower learning_rate"):
        for record in loop.TrainLoop(
            objective, loaded.pair.teacher, loaded.train, 9, config, machine, clock.Clock(), loaded.pair.pads
        ):
            told.append(record.step)
    assert told == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("start", [0, 1, 6, 7, 8, 13, 14, 22])
def test_the_order_of_the_text_can_be_entered_anywhere(loaded, start):
    """Within an epoch, at its last step, and right after it."""
    windows = loaded.train[:30]
    every = list(itertools.islice(loop.steps_of(windows, 4, 3), 30))
    assert len(windows) // 4 == 7
    assert list(itertools.islice(loop.steps_of(windows, 4, 3, start), 30 - start)) == every[start:]
