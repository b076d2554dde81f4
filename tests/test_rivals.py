"""The rivals' formulas against values written out in float64, and each of them through one step of kdlib's own loop."""

import copy
import itertools
import math

import accelerate
import numpy as np
import pytest
import torch

from benchmarks.rivals import dskd, gold, mined, uld
from benchmarks.rivals.plug import RIVALS, RivalObjective, Whole, WholeTeacher
from kdlib import clock
from kdlib.config import Config
from kdlib.data import batching
from kdlib.session import inputs
from kdlib.training.loop import TrainLoop

STUDENT = torch.tensor([[1.0, -0.5, 0.3, 0.7], [0.2, 0.1, -1.0, 2.0]], dtype=torch.float64)
TEACHER = torch.tensor([[0.4, 2.0, -1.0, 0.0, 0.6], [-0.3, 0.5, 1.5, 0.2, 0.9]], dtype=torch.float64)


def softmax(row):
    largest = max(row)
    weights = [math.exp(value - largest) for value in row]
    return [weight / sum(weights) for weight in weights]


def by_differences(loss, tensor, step=1e-6):
    """The gradient of `loss(tensor)`, a float, one entry at a time."""
    found = torch.zeros_like(tensor)
    for place in itertools.product(*map(range, tensor.shape)):
        up, down = tensor.clone(), tensor.clone()
        up[place] += step
        down[place] -= step
        found[place] = (loss(up) - loss(down)) / (2 * step)
    return found


def gradient_agrees(loss, tensor, tolerance=1e-7):
    leaf = tensor.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.allclose(leaf.grad, by_differences(lambda t: loss(t).item(), tensor), atol=tolerance)
    assert leaf.grad.abs().max() > 1e-3


# ULD


def distance_by_hand(student, teacher):
    ours, theirs = sorted(student, reverse=True), sorted(teacher, reverse=True)
    width = max(len(ours), len(theirs))
    ours, theirs = ours + [0.0] * (width - len(ours)), theirs + [0.0] * (width - len(theirs))
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_uld_is_the_distance_of_sorted_probabilities():
    found = uld.sorted_distance(STUDENT.softmax(-1), TEACHER.softmax(-1))
    rows = zip(STUDENT.tolist(), TEACHER.tolist(), strict=True)
    assert found.tolist() == pytest.approx([distance_by_hand(softmax(a), softmax(b)) for a, b in rows], abs=1e-14)
    assert uld.sorted_distance(torch.tensor([[0.5, 0.1, 0.4]]), torch.tensor([[0.3, 0.7]])).item() == pytest.approx(0.4)


def test_uld_gradient():
    gradient_agrees(lambda t: uld.sorted_distance(t.softmax(-1), TEACHER.softmax(-1)).sum(), STUDENT)


def test_uld_does_not_know_which_token_is_which():
    probabilities = TEACHER.softmax(-1)
    assert uld.sorted_distance(probabilities, probabilities[:, [3, 1, 4, 0, 2]]).abs().max() == 0


def test_uld_pairs_by_number_as_far_as_both_go():
    ours, theirs = uld.index_pairs(torch.tensor([4, 5, 6]), torch.tensor([9, 11]))
    assert ours.tolist() == [4, 5]
    assert theirs.tolist() == [9, 11]
    assert all(len(side) == 0 for side in uld.index_pairs(torch.tensor([4]), torch.tensor([], dtype=torch.long)))


def test_sorting_keeps_the_gradient_with_its_token():
    leaf = torch.tensor([[0.2, 0.5, 0.3]]).requires_grad_()
    found = uld.descending(leaf)
    assert found.tolist() == [pytest.approx([0.5, 0.3, 0.2])]
    (found * torch.tensor([[1.0, 10.0, 100.0]])).sum().backward()
    assert leaf.grad.tolist() == [[100.0, 1.0, 10.0]]


# GOLD


def jsd_by_hand(student, teacher, beta):
    total = 0.0
    for p, q in zip(student, teacher, strict=True):
        m = beta * q + (1 - beta) * p
        total += beta * q * math.log(q / m) + (1 - beta) * p * math.log(p / m)
    return total


@pytest.mark.parametrize("beta", [0.5, 0.2])
def test_gold_compares_shared_tokens_directly_and_sorts_the_rest(beta):
    ours, theirs = [0, 3], [4, 1]
    found = gold.hybrid(STUDENT.log_softmax(-1), TEACHER.log_softmax(-1), ours, theirs, beta)
    expected = []
    for student, teacher in zip(STUDENT.tolist(), TEACHER.tolist(), strict=True):
        p, q = softmax(student), softmax(teacher)
        matched = jsd_by_hand([p[0], p[3]], [q[4], q[1]], beta)
        expected.append(0.4 * matched + 0.6 * distance_by_hand([p[1], p[2]], [q[0], q[2], q[3]]))
    assert found.tolist() == pytest.approx(expected, abs=1e-14)


def test_gold_gradient():
    theirs = TEACHER.log_softmax(-1)
    gradient_agrees(lambda t: gold.hybrid(t.log_softmax(-1), theirs, [0, 3], [4, 1]).sum(), STUDENT)


def test_gold_multiplies_a_span_by_what_follows_in_it():
    log_probs = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64).log()
    rest = torch.tensor([0.25, 1.0], dtype=torch.float64).log()
    assert gold.merged(log_probs, rest).exp().flatten().tolist() == pytest.approx([0.05, 0.2, 0.5, 0.5], abs=1e-15)


def test_gold_is_zero_at_equality_and_without_shared_tokens_uld():
    both = TEACHER.log_softmax(-1)
    assert gold.hybrid(both, both, [0, 2, 3], [0, 2, 3]).abs().max() < 1e-15
    none = torch.zeros(0, dtype=torch.long)
    found = gold.hybrid(STUDENT.log_softmax(-1), both, none, none)
    torch.testing.assert_close(found, uld.sorted_distance(STUDENT.softmax(-1), TEACHER.softmax(-1)), rtol=1e-12, atol=0)


# DSKD


@pytest.fixture
def spaces():
    """Projectors, the two sides (3 student, 4 teacher positions, in two windows), logits and heads, all float64."""
    torch.manual_seed(3)
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    student = dskd.Side(make(3, 2), make(3, 2), make(3, 2), torch.tensor([1, 3, 0]), [2, 1])
    teacher = dskd.Side(make(4, 3), make(4, 3), make(4, 3), torch.tensor([0, 2, 4, 1]), [2, 2])
    heads = make(4, 2), make(5, 3)
    logits = make(3, 4), teacher.states @ heads[1].T
    return dskd.Projectors(2, 3).double(), student, teacher, *logits, *heads


def softened_by_hand(student, teacher, temperature):
    ours, theirs = (softmax([value / temperature for value in row]) for row in (student, teacher))
    return sum(q * math.log(q / p) for p, q in zip(ours, theirs, strict=True))


@torch.no_grad()
def test_dskd_is_its_three_losses_written_out(spaces):
    maps, student, teacher, student_logits, teacher_logits, student_head, teacher_head = spaces
    found = dskd.losses(*spaces, temperature=2.0)
    both = torch.cat([teacher.inputs, teacher.targets], 1)
    key, target = both / both.std(), teacher.targets / teacher.targets.std()
    scores = [[0.0] * 4 for _ in range(3)]
    for s, t in itertools.product(range(3), range(4)):
        query = maps.query(torch.cat([student.inputs[s], student.targets[s]]))
        same = (s < 2) == (t < 2)
        scores[s][t] = (query @ key[t]).item() / math.sqrt(6) if same else -1e5
    value = maps.to_student(teacher.states / teacher.states.std() + target)
    told = [sum(w * row for w, row in zip(softmax(row), value, strict=True)) @ student_head.T for row in scores]
    assert found["projector"].item() == pytest.approx(
        -sum(math.log(softmax(row.tolist())[label]) for row, label in zip(told, [1, 3, 0], strict=True)) / 3, abs=1e-12
    )
    right = [int(row.argmax()) == label for row, label in zip(told, [1, 3, 0], strict=True)]
    assert 0 < sum(right) < 3
    inside = [softened_by_hand(a.tolist(), b.tolist(), 2.0) for a, b in zip(student_logits, told, strict=True)]
    expected = sum(value * flag for value, flag in zip(inside, right, strict=True)) / 3
    assert found["student_space"].item() == pytest.approx(expected, abs=1e-12)
    states = maps.to_teacher(student.states)
    back = [sum(w * row for w, row in zip(softmax([row[t] for row in scores]), states, strict=True)) for t in range(4)]
    outside = [
        softened_by_hand((a @ teacher_head.T).tolist(), b.tolist(), 2.0)
        for a, b in zip(back, teacher_logits, strict=True)
    ]
    assert found["teacher_space"].item() == pytest.approx(sum(outside) / 4, abs=1e-12)


def test_dskd_teaches_the_student_through_its_logits_and_states_only(spaces):
    maps, student, teacher, student_logits, teacher_logits, student_head, teacher_head = spaces
    leaves = [t.clone().requires_grad_() for t in (student_logits, student.states, student_head, teacher_head)]
    moved = dskd.Side(leaves[1], student.inputs, student.targets, student.labels, student.by_window)
    sum(dskd.losses(maps, moved, teacher, leaves[0], teacher_logits, *leaves[2:], 1.0).values()).backward()
    assert leaves[0].grad.any()
    assert leaves[1].grad.any()
    assert leaves[2].grad is None and leaves[3].grad is None
    assert all(p.grad is not None and p.grad.any() for p in maps.parameters())


def test_the_divergence_in_the_students_space_does_not_teach_the_projected_teacher(spaces):
    leaf = spaces[3].clone().requires_grad_()
    found = dskd.losses(*spaces[:3], leaf, *spaces[4:], 1.0)["student_space"]
    gradients = torch.autograd.grad(found, [leaf, *spaces[0].parameters()], allow_unused=True)
    assert gradients[0].any()
    assert all(gradient is None for gradient in gradients[1:])


def test_dskd_gradient(spaces):
    maps, student, teacher, logits, *rest = spaces
    gradient_agrees(lambda t: sum(dskd.losses(maps, student, teacher, t, *rest, 2.0).values()), logits)


def test_dskd_attends_within_a_window_and_stands_one_without_a_teacher():
    query, key = torch.tensor([[9.0, 0.0], [0.0, 9.0], [1.0, 1.0]]), torch.tensor([[9.0, 0.0], [0.0, 9.0]])
    there, back = dskd.attended(
        query, key, torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0], [5.0]]), [2, 1], [2, 0]
    )
    assert there.flatten().tolist() == pytest.approx([1.0, 2.0, 0.0])
    assert back.flatten().tolist() == pytest.approx([3.0, 4.0])


# MinED


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        (b"kitten", b"sitting", 3),
        (b"", b"abc", 3),
        (b"abc", b"", 3),
        (b"same", b"same", 0),
        (b"flaw", b"lawn", 2),
        (None, b"a", 1),
    ],
)
def test_edit_distance(first, second, distance):
    assert mined.edit_distances([first, b"q"], [b"longer than both", second])[0, 1] == distance


def test_warping_takes_the_cheapest_way():
    random = np.random.default_rng(0)
    for shape in ((1, 1), (1, 4), (5, 1), (3, 5), (6, 4)):
        costs = random.random(shape)
        cheapest = np.full(shape, np.inf)
        for i, j in itertools.product(*map(range, shape)):
            ways = [cheapest[a, b] for a, b in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if a >= 0 and b >= 0]
            cheapest[i, j] = costs[i, j] + min(ways, default=0.0)
        way = [(i, j) for i, match in enumerate(mined.warp(costs)) for j in match]
        assert way[0] == (0, 0) and way[-1] == (shape[0] - 1, shape[1] - 1)
        assert all((c - a, d - b) in {(0, 1), (1, 0), (1, 1)} for (a, b), (c, d) in itertools.pairwise(way))
        assert sum(costs[place] for place in way) == pytest.approx(cheapest[-1, -1])


def test_warping_puts_equal_tokens_against_each_other():
    ours, theirs = [b"the", b"cat", b"s", b"sat"], [b"the", b"cats", b"sat"]
    assert mined.warp(mined.edit_distances(ours, theirs)) == [[0], [1], [2], [2]]


def test_the_nearest_token_is_the_same_or_the_least_changed():
    student = [None, b" a", b"a", b"walk", b"talk"]
    assert mined.nearest([b"a", b" a", b"walks", b"tall", None], student).tolist() == [2, 1, 3, 4, -1]


def test_mined_carries_the_largest_logit_of_those_that_map_to_a_token():
    found = mined.carried(torch.tensor([[1.0, 5.0, 2.0, 9.0]]), torch.tensor([2, 0, 2, -1]), 4)
    assert found.tolist() == [[5.0, mined.FAR, 2.0, mined.FAR]]


def test_mined_is_a_divergence_where_tokens_match_and_the_label_elsewhere():
    target = torch.tensor([2, 0, 2, 1, -1])
    matched, labels = torch.tensor([True, False]), torch.tensor([3, 2])
    found = mined.loss(STUDENT, TEACHER, target, matched, labels)
    ours, theirs = softmax(STUDENT[0].tolist()), softmax([2.0, 0.0, 0.4])
    by_hand = sum(q * math.log(q / p) for p, q in zip(ours[:3], [theirs[0], theirs[1], theirs[2]], strict=True))
    assert found.tolist() == pytest.approx([by_hand, -math.log(softmax(STUDENT[1].tolist())[2])], abs=1e-12)


def test_mined_gradient():
    target, matched, labels = torch.tensor([2, 0, 2, 1, -1]), torch.tensor([True, False]), torch.tensor([3, 2])
    gradient_agrees(lambda t: mined.loss(t, TEACHER, target, matched, labels).sum(), STUDENT)


# plugged in


@pytest.fixture(scope="module")
def loaded(pair):
    config = Config(
        teacher=str(pair / "teacher"), student=str(pair / "student"), dataset=str(pair / "text.jsonl"), max_length=48,
        batch_size=4, check_teacher=False, eval_tokens=300, kd_weight=0.3, lm_weight=0.7, learning_rate=1e-2,
    )  # fmt: skip
    return config, inputs.load(config)


def whole_of(loaded, objective, number=4):
    batch = batching.collate(loaded.train[:number], *loaded.pair.pads)
    hidden = objective.student.base_model(batch.student_ids, attention_mask=batch.student_mask).last_hidden_state
    hidden = hidden.flatten(0, 1)
    return Whole(batch, hidden, objective.head.decode(hidden), WholeTeacher(loaded.pair.teacher)(batch))


@pytest.mark.parametrize("name", RIVALS)
def test_a_step_of_each_rival_lowers_its_own_loss(loaded, name):
    config, found = loaded
    torch.manual_seed(0)
    objective = RivalObjective(RIVALS[name], found.pair, copy.deepcopy(found.pair.student), config)
    assert all(p.requires_grad for p in objective.adapters.parameters())
    before = objective.rival.kd(whole_of(found, objective))
    before.backward()
    assert sum(float(p.grad.abs().sum()) for p in objective.student.parameters() if p.grad is not None) > 0
    assert all(p.grad is None for p in found.pair.teacher.model.parameters())
    objective.zero_grad()
    objective.config = config.replace(kd_weight=1.0, lm_weight=0.0)
    machine = accelerate.Accelerator(cpu=True)
    teacher = WholeTeacher(found.pair.teacher)
    run = TrainLoop(objective, teacher, found.train, 12, config, machine, clock.Clock(), found.pair.pads)
    steps = list(run)
    assert all(math.isfinite(step.loss) for step in steps)
    assert objective.rival.kd(whole_of(found, objective)) < before


def test_rows_shared_by_several_windows_change_nothing(loaded):
    config, found = loaded
    for name, rival in RIVALS.items():
        torch.manual_seed(0)
        objective = RivalObjective(rival, found.pair, copy.deepcopy(found.pair.student), config).eval()
        values = []
        for max_row_width in ((0, 0), (96, 96)):
            batch = batching.collate(found.train[:4], *found.pair.pads, max_row_width)
            counts = {"labels": batch.num_labels}
            weights = objective.weights()
            loss, parts, _ = objective(batch, WholeTeacher(found.pair.teacher)(batch), counts, weights)
            assert loss.item() == pytest.approx(0.7 * parts["lm"].item() + 0.3 * parts["kd"].item())
            values.append(parts)
        assert values[0]["kd"].item() == pytest.approx(values[1]["kd"].item(), rel=1e-4), name
        assert values[0]["lm"].item() == pytest.approx(values[1]["lm"].item(), rel=1e-4)


def test_gold_and_uld_are_zero_for_a_student_that_is_the_teacher(pair, loaded):
    config, _ = loaded
    found = inputs.load(config.replace(student=str(pair / "teacher")))
    for name in ("ULD", "GOLD hybrid"):
        objective = RivalObjective(RIVALS[name], found.pair, found.pair.student, config)
        assert objective.rival.kd(whole_of(found, objective)).item() == pytest.approx(0.0, abs=1e-5)


def test_gold_multiplies_by_the_later_tokens_of_each_span(loaded):
    config, found = loaded
    objective = RivalObjective(RIVALS["GOLD hybrid"], found.pair, found.pair.student, config)
    whole = whole_of(found, objective)
    batch, labels = whole.batch, whole.batch.labels.flatten().tolist()
    firsts, stops = batch.student_rows, batch.student_span_ends
    told = objective.rival._merged(whole.student_logits, batch.labels, firsts, stops)
    log_probs = whole.student_logits.log_softmax(-1)
    longest = 0
    for row, first, stop in zip(told, firsts.tolist(), stops.tolist(), strict=True):
        rest = sum(log_probs[at, labels[at]].item() for at in range(first + 1, stop))
        longest = max(longest, stop - first)
        if stop > first:
            assert torch.allclose(row, log_probs[first] + rest, atol=1e-4)
    assert longest >= 3


def test_mined_matches_the_same_tokens_one_to_one(pair, loaded):
    config, _ = loaded
    found = inputs.load(config.replace(student=str(pair / "teacher")))
    objective = RivalObjective(RIVALS["MinED"], found.pair, found.pair.student, config)
    whole = whole_of(found, objective)
    objective.rival.kd(whole)
    for place, right in zip(whole.batch.window_ids, whole.by_window("teacher"), strict=True):
        against, fits = objective.rival.known[place]
        assert fits[: len(right)].all()
        assert against[: len(right)].tolist() == list(range(len(right)))
