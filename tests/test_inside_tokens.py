"""kd inside tokens: against vocabularies read through by brute force, and the laws that every way to distil obeys."""

import copy
import itertools
import json
import math

import accelerate
import numpy as np
import pytest
import torch
from families import FAMILIES, LOSSLESS, reader, tiny_model

from kdlib import clock, demo, doctor
from kdlib.config import Config
from kdlib.data import batching, tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.losses import partial_tokens
from kdlib.losses.teacher_signal import TopKLogProbs
from kdlib.models import teacher_cache, trie
from kdlib.models.trie import NO_MASS, Trie
from kdlib.session import inputs, session
from kdlib.training import loop

PAIRS = [("unigram", "byte_level"), ("byte_level", "sentencepiece_bpe"), ("unigram_nfkc", "byte_level_lower")]
SPELLINGS = [(1,), (1, 2), (1, 2, 3), (1, 4), (5,), (), (1, 2, 1), (6, 1), (6, 2), (1, 2, 3, 3)]
"""Ten wholes in pieces 0 to 6; none ends after 6, and nothing follows 5 or is spelled like the one without pieces."""
NODES = [(1,), (1, 2), (6,), (1, 2, 3)]
APART, JOINED, TAIL = np.arange(7), np.array([0, 1, 2, 6, 2, 1, 7]), 7
"""The bucket of each piece: one for each, or 2 with 4, 1 with 5, and piece 6 in the tail."""


def trie_of(student, bucket_of=APART, **columns):
    return Trie.build(SPELLINGS, student, bucket_of, TAIL, **columns)


def in_buckets(piece_U, bucket_of=APART):
    """Probabilities of the pieces as those of the buckets, the tail last."""
    sums = piece_U.new_zeros(*piece_U.shape[:-1], TAIL + 1)
    return sums.index_add(-1, torch.from_numpy(bucket_of), piece_U)


def saved(folder, texts, student, teacher):
    for seed, (side, name) in enumerate((("student", student), ("teacher", teacher))):
        tokenizer = FAMILIES[name]()
        demo.save(tiny_model(tokenizer, 16, 2, seed=seed), tokenizer, folder / side)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "teacher": str(folder / "teacher"), "student": str(folder / "student"), "dataset": str(folder / "text.jsonl"),
        "max_length": 48, "batch_size": 4, "max_steps": 4, "check_teacher": False, "eval_tokens": 300,
        "kd_method": "byte_prefix",
    }  # fmt: skip


@pytest.fixture(scope="module", params=PAIRS, ids=" ".join)
def loaded(request, tmp_path_factory, texts):
    return inputs.load(Config.from_dict(saved(tmp_path_factory.mktemp("pair"), texts, *request.param)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory, texts):
    """The values of a config, and what it loads."""
    values = saved(tmp_path_factory.mktemp("pair"), texts, *PAIRS[0])
    return values, inputs.load(Config.from_dict(values))


def made(loaded, **changes):
    config = Config.from_dict({"kd_method": "byte_prefix", "batch_size": 4, "max_length": 48, **changes})
    return inputs.make_objective(loaded.pair, config, copy.deepcopy(loaded.pair.student)).eval()


def counts_of(batch):
    return {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}


def told(loaded, objective, batch, counts=None):
    """`(loss, parts, gradients)`."""
    signal = loaded.pair.teacher(batch, **objective.teacher_request(objective.weights()))
    loss, found, _ = objective(batch, signal, counts or counts_of(batch))
    objective.zero_grad()
    loss.backward()
    return loss.item(), {name: value.item() for name, value in found.items()}, gradients(objective.student)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(ours, theirs, rtol=1e-4):
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= rtol * theirs[name].norm() + 1e-8, name


# the oracle: every token of a vocabulary looked at for every position


def outcomes(spellings, read, bucket_of, tail):
    """`{bucket that may follow, or None for the end and the tail: wholes}` of all wholes that begin with `read`; None where
    all of them end there.
    """
    found = {}
    for whole, pieces in enumerate(spellings):
        if pieces[: len(read)] == read and pieces:
            following = int(bucket_of[pieces[len(read)]]) if len(pieces) > len(read) else None
            found.setdefault(None if following == tail else following, []).append(whole)
    goes_on = any(pieces[: len(read)] == read and len(pieces) > len(read) for pieces in spellings)
    return found if goes_on else None


def compared(spellings, read, whole_V, piece_U, student, bucket_of=APART, tail=TAIL):
    """`(ours, theirs)`: what may come next after `read`, from probabilities `[V]` of wholes and `[B]` of buckets; None where
    nothing may.
    """
    found = outcomes(spellings, read, bucket_of, tail)
    if found is None:
        return None
    names = sorted(set(found) - {None})
    wholes = [whole_V[found[name]].sum() for name in names] + [whole_V[found.get(None, [])].sum()]
    pieces = [piece_U[name] for name in names] + [1.0 - piece_U[names].sum()]
    if student == "outer" and None not in found:
        wholes, pieces = wholes[:-1], pieces[:-1]
    wholes, pieces = (torch.stack(side) / sum(side) for side in (wholes, pieces))
    if student == "inner":  # an end that no token has, or hardly any
        wholes = torch.cat([wholes[:-1], wholes[-1:].clamp_min(1e-6)])
    return (wholes, pieces) if student == "outer" else (pieces, wholes)


def distance(ours, theirs, divergence="forward_kl", temperature=1.0):
    p, q = ours, theirs
    if temperature != 1.0:
        p, q = (side ** (1 / temperature) / (side ** (1 / temperature)).sum() for side in (p, q))
    m = 0.5 * (p + q)
    return (
        temperature**2
        * {
            "forward_kl": lambda: (q * (q / p).log()).sum(),
            "reverse_kl": lambda: (p * (p / q).log()).sum(),
            "jsd": lambda: 0.5 * ((q * (q / m).log()).sum() + (p * (p / m).log()).sum()),
        }[divergence]()
    )


def agree(spellings, read, whole, piece, student, bucket_of, tail):
    """Whether a text's own whole and the piece that follows `read` in it are one outcome."""
    found = outcomes(spellings, read, bucket_of, tail) or {}
    following = bucket_of[piece] if bucket_of[piece] in found else None
    return whole in found.get(following, []) and (student == "inner" or following in found)


def by_hand(loaded, batch, student):
    """`(kd, positions)`: kd as a mean over common boundaries, and how many of the student's positions have a signal."""
    pair, readers = loaded.pair, (loaded.pair.student_reader, loaded.pair.teacher.reader)
    buckets, teacher = trie.buckets_of(pair, "byte_prefix"), copy.deepcopy(pair.teacher.model).double()
    ours = student(batch.student_ids, attention_mask=batch.student_mask).logits.flatten(0, 1).softmax(-1)
    theirs = teacher(batch.teacher_ids, attention_mask=batch.teacher_mask).logits.flatten(0, 1).softmax(-1).detach()
    in_pieces = [tokenize.spellings(a, b.vocabulary.tokens) for a, b in itertools.permutations(readers)]
    labels = batch.labels.flatten().tolist(), batch.teacher_labels.flatten().tolist()
    total, positions = 0.0, 0
    spans = batch.student_rows, batch.student_span_ends, batch.teacher_rows, batch.teacher_span_ends

    def bucketed(probs, of):
        return torch.zeros(buckets.num).double().index_add(0, torch.from_numpy(of), probs) + 1e-30

    for s0, s1, t0, t1 in zip(*(each.tolist() for each in spans), strict=True):
        following = labels[0][s0], labels[1][t0]
        if buckets.student[following[0]] == buckets.teacher[following[1]]:
            total = total + distance(bucketed(ours[s0], buckets.student), bucketed(theirs[t0], buckets.teacher))
            positions += 1
        how = buckets.student, buckets.tail
        for at in range(s0 + 1, s1):
            read = tuple(labels[0][s0:at])
            if agree(in_pieces[0], read, following[1], labels[0][at], "inner", *how):
                pieces = bucketed(ours[at], buckets.student)
                total = total + distance(*compared(in_pieces[0], read, theirs[t0], pieces, "inner", *how))
                positions += 1
        how = buckets.teacher, buckets.tail
        for at in range(t0 + 1, t1):
            read = tuple(labels[1][t0:at])
            if agree(in_pieces[1], read, following[0], labels[1][at], "outer", *how):
                pieces = bucketed(theirs[at], buckets.teacher)
                total = total + distance(*compared(in_pieces[1], read, ours[s0], pieces, "outer", *how))
    return total / len(batch.student_rows), positions


def test_the_loss_and_its_gradient_are_those_of_the_oracle(loaded):
    objective = made(loaded, lm_weight=0.0, kd_weight=1.0)
    batch = batching.collate(loaded.train[:5], *loaded.pair.pads)
    student = copy.deepcopy(loaded.pair.student).double()
    expected, positions = by_hand(loaded, batch, student)
    expected.backward()
    loss, found, ours = told(loaded, objective, batch)
    assert loss == pytest.approx(expected.item(), rel=1e-4)
    assert found["kd_positions"] == pytest.approx(positions / batch.num_labels, rel=1e-6)
    assert 0.9 * batch.num_aligned < positions <= batch.num_labels
    assert_close(ours, gradients(student), 1e-3)


@pytest.mark.parametrize("student", ["inner", "outer"])
@pytest.mark.parametrize("bucket_of", [APART, JOINED], ids=["apart", "joined"])
@pytest.mark.parametrize(
    "how",
    [("forward_kl", 1.0), ("forward_kl", 3.0), ("reverse_kl", 1.0), ("jsd", 0.5)],
    ids=lambda how: f"{how[0]} {how[1]}",
)
def test_the_divergence_is_the_oracles_in_float64(student, bucket_of, how):
    """Every node at several rows, heads whose columns are not the ids; value, and gradient by autograd of the oracle."""
    generator = torch.Generator().manual_seed(1)
    wholes = torch.randn(3, len(SPELLINGS), generator=generator, dtype=torch.float64, requires_grad=True)
    pieces = torch.randn(4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    whole_order = torch.randperm(len(SPELLINGS), generator=generator)
    trie = trie_of(student, bucket_of, outer_columns=whole_order.__getitem__)
    asked = [(0, 3, (1,)), (2, 1, (1, 2)), (0, 0, (6,)), (1, 2, (1, 2, 3)), (1, 2, (6,)), (0, 3, (1,))]
    nodes = np.array([node_of(trie, read) for _, _, read in asked])
    rows, at = np.array([row for row, _, _ in asked]), np.array([at for _, at, _ in asked])
    told = in_buckets(pieces.softmax(-1), bucket_of).log()
    found = trie.divergence((wholes.log_softmax(-1), rows), (told, at), nodes, *how)
    expected = []
    for row, other, read in asked:
        sides = wholes.softmax(-1)[row][whole_order], told.exp()[other]
        expected.append(distance(*compared(SPELLINGS, read, *sides, student, bucket_of), *how))
    assert found.tolist() == pytest.approx([value.item() for value in expected], rel=1e-9)
    assert min(found.tolist()) > 0.0
    learns = wholes if student == "outer" else pieces
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    (ours,) = torch.autograd.grad((found * weights).sum(), learns, retain_graph=True)
    (theirs,) = torch.autograd.grad((torch.stack(expected) * weights).sum(), learns)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def node_of(trie, read):
    """The node after these pieces, by a walk over a text of one span; 0 for none."""
    walked = trie.match(np.array([*read, 0]), np.array([0]), np.array([len(read) + 1]))
    return int(walked[2][-1]) if len(walked[0]) and walked[0][-1] == len(read) else 0


@pytest.mark.parametrize("student", ["inner", "outer"])
@pytest.mark.parametrize("bucket_of", [APART, JOINED], ids=["apart", "joined"])
def test_a_place_agrees_where_the_texts_own_tokens_are_one_outcome(student, bucket_of):
    trie, seen = trie_of(student, bucket_of), set()
    for read, whole, piece in itertools.product(NODES, range(len(SPELLINGS)), range(7)):
        given = np.array([node_of(trie, read)]), np.array([whole]), np.array([piece])
        expected = agree(SPELLINGS, read, whole, piece, student, bucket_of, TAIL)
        assert trie.agrees(*given).tolist() == [expected], (read, whole, piece)
        seen.add(expected)
    assert seen == {True, False}


def test_a_walk_knows_what_was_read_since_the_boundary():
    trie = trie_of("outer")
    labels = np.array([9, 1, 2, 3, 9, 5, 1, 9, 1, 2, windowing.IGNORE, 2, 6, 7])
    firsts, stops = np.array([1, 5, 8, 12, 12]), np.array([5, 8, 11, 12, 14])
    positions, spans, nodes = trie.match(labels, firsts, stops)
    assert positions.tolist() == [2, 3, 4, 9, 10, 13]
    assert spans.tolist() == [0, 0, 0, 2, 2, 4]
    read = [(1,), (1, 2), (1, 2, 3), (1,), (1, 2), (6,)]
    assert nodes.tolist() == [node_of(trie, each) for each in read]
    assert sorted(set(nodes.tolist())) == [1, 2, 3, 4]
    assert node_of(trie, (5,)) == node_of(trie, (2,)) == node_of(trie, (1, 2, 3, 3)) == node_of(trie, (1, 100)) == 0
    assert trie.ends[nodes].tolist() == [True, True, True, True, True, False]
    assert trie_of("inner").ends.tolist() == [False, True, True, True, True]
    assert trie.match(labels, firsts[:0], stops[:0]).shape == (3, 0)
    nothing = Trie.build([(), (1,), (2,)], "inner", APART, TAIL)
    assert nothing.match(labels, firsts, stops).shape == (3, 0)


def test_is_zero_where_both_say_the_same_and_where_nothing_is_said():
    tries = {student: trie_of(student) for student in ("inner", "outer")}
    wholes = torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.2, 0.1, 0.0, 0.05, 0.15, 0.0]], dtype=torch.float64)
    same = torch.tensor([[0.02, 0.1, 0.6, 0.0, 0.2, 0.04, 0.04], [0.7, 0.25, 0.75, 0.1, 0.1, 0.1, 0.1]]).double()
    nodes, rows = np.array([node_of(tries["outer"], read) for read in ((1,), (6,))]), np.zeros(2, dtype=np.int64)
    for tree in tries.values():
        found = tree.divergence((wholes.log(), rows[:1]), (same.log(), rows[:1]), nodes[:1])
        assert found.abs().item() < 1e-12
        nothing = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.5, 0.3, 0.0, 0.1, 0.1, 0.0]]).double().log().requires_grad_()
        given = nothing.clone(), rows[:1]
        found = tree.divergence(given, (same.log().requires_grad_(), rows[:1]), nodes[:1], "jsd")
        assert found.item() == 0.0
        assert not torch.autograd.grad(found, nothing, allow_unused=True)[0].any()
    after_6 = tries["outer"].divergence((wholes.log(), rows), (same.log(), np.array([0, 1])), nodes)
    assert after_6.abs().max().item() < 1e-12  # there come 1 and 2 as 1 to 3, whatever else a teacher says


def test_is_zero_for_a_student_that_is_its_teacher(tmp_path, texts):
    values = saved(tmp_path, texts, "byte_level", "byte_level")
    loaded = inputs.load(Config.from_dict({**values, "student": values["teacher"]}))
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
    loss, found, ours = told(loaded, made(loaded, lm_weight=0.0, kd_weight=1.0), batch)
    assert (loss, found["kd"]) == (pytest.approx(0.0, abs=2e-6), pytest.approx(0.0, abs=2e-6))
    assert found["kd_positions"] == pytest.approx(batch.num_aligned / batch.num_labels)
    assert max(gradient.abs().max().item() for gradient in ours.values()) < 1e-5


@pytest.mark.parametrize(
    "changes", [{}, {"kd_temperature": 2.0, "kd_divergence": "skew_reverse_kl", "label_smoothing": 0.1}]
)
def test_neither_chunks_nor_micro_batches_change_value_or_gradient(plain, changes):
    _, loaded = plain
    windows = loaded.train[:6]
    whole = batching.collate(windows, *loaded.pair.pads)
    expected = told(loaded, made(loaded, **changes), whole)
    assert expected[1]["kd"] > 0.5
    for chunk in (1, 7, 100_000):
        found = told(loaded, made(loaded, loss_chunk_size=chunk, **changes), whole)
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found[1] == pytest.approx(expected[1], rel=1e-5)
        assert_close(found[2], expected[2])
    sums, total = {}, 0.0
    for some in (windows[:1], windows[1:4], windows[4:]):
        loss, values, one = told(
            loaded, made(loaded, **changes), batching.collate(some, *loaded.pair.pads), counts_of(whole)
        )
        total += loss
        sums = {name: sums.get(name, 0.0) + value for name, value in (values | one).items()}
    assert total == pytest.approx(expected[0], rel=1e-5)
    assert {name: sums.pop(name) for name in expected[1]} == pytest.approx(expected[1], rel=1e-5)
    assert_close(sums, expected[2])


def test_a_teachers_token_is_spelled_as_the_student_reads_it_in_a_text(plain):
    _, loaded = plain
    reader, tokens = loaded.pair.student_reader, loaded.pair.teacher.reader.vocabulary.tokens
    spellings, first = tokenize.spellings(reader, tokens), tokenize.first_tokens(reader, tokens)
    assert sum(map(bool, spellings)) > 0.4 * len(tokens)
    assert all(ids[0] == begin for ids, begin in zip(spellings, first.tolist(), strict=True) if ids and begin >= 0)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_spellings_are_the_bytes_of_whole_characters(name):
    used = reader(name)
    asked = [None, b"", b" the", "東".encode(), "東".encode()[:2], b"\xff", b" was", "é".encode(), b"cat"]
    asked += reader("byte_level").vocabulary.tokens
    found = tokenize.spellings(used, asked)
    assert [found[i] for i in (0, 1, 4, 5)] == [()] * 4
    for token, ids in zip(asked, found, strict=True):
        assert not ids or b"".join(used.vocabulary.tokens[i] for i in ids) == token
    assert found[6] or name == "word_piece"
    if name in LOSSLESS:
        assert sum(map(bool, found)) > 0.25 * len(asked)


@pytest.mark.parametrize("name", LOSSLESS)
def test_line_breaks_and_blanks_are_spelled_too(name):
    """As they are read behind a word: behind a line break they would be one token with it."""
    used, asked = reader(name), [b"\n", b"\n\n", b"\n    ", b"    ", b"   \n", b"\n\n    ", b" the", b"\n        "]
    found, first = tokenize.spellings(used, asked), tokenize.first_tokens(used, asked).tolist()
    for token, ids, begin in zip(asked, found, first, strict=True):
        assert ids, token
        assert b"".join(used.vocabulary.tokens[i] for i in ids) == token
        assert ids[0] == begin
        assert list(ids) == used.tokenizer("x" + token.decode(), add_special_tokens=False)["input_ids"][-len(ids) :]


def test_a_text_that_a_normaliser_changed_or_that_is_not_learned_has_no_signal_inside():
    """Upper-case letters that one side reads in lower case, a torn character, a prompt."""
    ours, theirs = reader("byte_level_lower"), reader("sentencepiece_bpe")
    tries = [
        Trie.build(
            tokenize.spellings(a, b.vocabulary.tokens), student, np.arange(a.vocabulary.num_rows), a.vocabulary.num_rows
        )
        for student, (a, b) in zip(("inner", "outer"), itertools.permutations((ours, theirs)), strict=True)
    ]
    document = Document("The first item, THE QUICK BROWN FOX, the list 東京 and a dog.")
    windows = windowing.cut_windows(
        document, *(tokenize.encode(document, each) for each in (ours, theirs)), ours, theirs, 400
    )
    batch = batching.collate(windows)
    changed = set(b"TQUICKBROWNFXHE")
    walked, seen = partial_tokens.PartialTokens.build(tries, batch), 0
    for side, used in (("student", ours), ("teacher", theirs)):
        labels, firsts, stops = batch.spans_of(side)
        for first, stop in zip(firsts, stops, strict=True):
            said = b"".join(used.vocabulary.tokens[i] for i in labels[first:stop])
            assert not set(said) & changed
            assert said in document.text.encode()
            if side == "student":
                seen += int(np.isin(np.arange(first + 1, stop), walked.positions).sum())
    assert seen == len(walked.positions)
    assert seen + len(walked.inner_positions) > 0


def test_half_precision_is_finite_and_near(plain):
    _, loaded = plain
    batch, objective = batching.collate(loaded.train[:3], *loaded.pair.pads), made(loaded)
    expected = told(loaded, objective, batch)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            found = told(loaded, objective, batch)
        assert found[1] == pytest.approx(expected[1], rel=0.05)
        assert all(gradient.isfinite().all() for gradient in found[2].values())


def test_nothing_is_asked_or_walked_where_kd_is_off(plain, monkeypatch):
    _, loaded = plain
    assert made(loaded, kd_weight=0.0, layerwise_weight=0.1).teacher_request({"lm": 1.0})["inner"] is False
    assert made(loaded).teacher_request({"lm": 1.0, "kd": 1.0})["inner"] is True
    monkeypatch.setattr(partial_tokens.PartialTokens, "build", lambda *_: pytest.fail("walked"))
    objective = made(loaded, kd_weight=0.0, layerwise_weight=0.1)
    _, found, _ = told(loaded, objective, batching.collate(loaded.train[:2], *loaded.pair.pads))
    assert set(found) == {"lm", "layerwise"}


@pytest.mark.parametrize("student", ["inner", "outer"])
@pytest.mark.parametrize("bucket_of", [APART, JOINED], ids=["apart", "joined"])
@pytest.mark.parametrize("k", [1, 2, 9])
@pytest.mark.parametrize("how", [("forward_kl", 1.0), ("jsd", 2.0)], ids=lambda how: f"{how[0]} {how[1]}")
def test_what_a_teacher_says_in_short_is_the_oracles_in_float64(student, bucket_of, k, how):
    """The likeliest outcomes and all else; then the divergence over these, value and gradient."""
    generator = torch.Generator().manual_seed(3)
    wholes = torch.randn(3, len(SPELLINGS), generator=generator, dtype=torch.float64, requires_grad=True)
    pieces = torch.randn(4, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    trie = trie_of(student, bucket_of)
    asked = [(0, 3, (1,)), (2, 1, (1, 2)), (0, 0, (6,)), (1, 2, (1, 2, 3))]
    nodes = np.array([node_of(trie, read) for _, _, read in asked])
    at = {"outer": np.array([row for row, _, _ in asked]), "inner": np.array([row for _, row, _ in asked])}
    by_bucket = in_buckets(pieces.softmax(-1), bucket_of).log()
    sides = {"outer": wholes.log_softmax(-1), "inner": by_bucket}
    teacher = "outer" if student == "inner" else "inner"
    short = trie.shortlist(sides[teacher], at[teacher], nodes, k, how[1])
    found = trie.divergence_from_shortlist(short, sides[student], at[student], nodes, *how)
    expected = []
    for place, (row, other, read) in enumerate(asked):
        ours, theirs = compared(SPELLINGS, read, wholes.softmax(-1)[row], by_bucket.exp()[other], student, bucket_of)
        if how[1] != 1.0:
            ours, theirs = (side ** (1 / how[1]) / (side ** (1 / how[1])).sum() for side in (ours, theirs))
        names = len(set(outcomes(SPELLINGS, read, bucket_of, TAIL)) - {None})
        kept = sorted(range(names), key=lambda i: -theirs[i].item())[:k]
        assert short.ids[place, : len(kept)].tolist() == kept
        ours, theirs = (torch.stack([*side[kept], side.sum() - side[kept].sum()]) for side in (ours, theirs))
        told = torch.cat([short.log_probs[place, : len(kept)], short.log_probs[place, -1:]]).exp()
        torch.testing.assert_close(told, theirs, rtol=1e-9, atol=1e-12)
        assert short.log_probs[place, len(kept) : -1].tolist() == [pytest.approx(math.log(1e-30))] * (k - len(kept))
        there = theirs > 1e-12
        expected.append(how[1] ** 2 * distance(ours[there], theirs.detach()[there], how[0]))
    assert found.tolist() == pytest.approx([value.item() for value in expected], rel=1e-7)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    learns = {"outer": wholes, "inner": pieces}[student]
    (ours,) = torch.autograd.grad((found * weights).sum(), learns, retain_graph=True)
    (theirs,) = torch.autograd.grad((torch.stack(expected) * weights).sum(), learns)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)


def test_a_teacher_that_says_nothing_is_kept_as_such():
    trie = trie_of("inner")
    wholes = torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.5, 0.3, 0.0, 0.1, 0.1, 0.0]]).log()
    nodes, row = np.array([node_of(trie, (1,))]), np.zeros(1, dtype=np.int64)
    silent = trie.shortlist(wholes, row, nodes, 3)
    assert (silent.log_probs < NO_MASS).all()
    read = teacher_cache._renormalise(silent.log_probs.numpy().astype(np.float16).astype(np.float32))
    silent = TopKLogProbs(silent.ids, torch.from_numpy(read))
    ours = torch.full((1, 7), 1 / 7).log().requires_grad_()
    found = trie.divergence_from_shortlist(silent, ours, row, nodes)
    assert found.item() == 0.0
    assert not torch.autograd.grad(found.sum(), ours)[0].any()


def test_buckets_may_be_cut(plain):
    _, loaded = plain
    batch = batching.collate(loaded.train[:3], *loaded.pair.pads)
    whole, few = (told(loaded, made(loaded, kd_top_k=k), batch)[1] for k in (0, 4))
    assert few["kd"] < whole["kd"]
    assert 0.0 < few["kd_covered"] < 1.0


def test_the_doctor_tells_the_share_of_positions_with_a_signal(plain):
    values, loaded = plain
    found = {each.name: each for each in doctor.diagnose(Config.from_dict(values))}["kd byte_prefix, chosen"]
    objective, known, inside_ours, inside_theirs = made(loaded), 0, 0, 0
    for window in loaded.pair.sample:
        batch = batching.collate([window])
        walked = partial_tokens.PartialTokens.build(objective.tries, batch)
        inside_ours, inside_theirs = inside_ours + len(walked.positions), inside_theirs + len(walked.inner_positions)
        known += int(partial_tokens.agreement_mask(objective.buckets, batch).sum())
    positions = sum(window.num_positions for window in loaded.pair.sample)
    assert found.number == (known + inside_ours) / positions
    assert found.value.startswith(f"{found.number:.1%} of the student's positions have a signal, ")
    assert f"{inside_ours / positions:.1%} inside a teacher token; {inside_theirs / positions:.1%} more" in found.value
    assert min(inside_ours, inside_theirs) > 0


def steps_of(config, device=None):
    loaded = inputs.load(config, "cpu", torch.float32, device)
    objective = inputs.make_objective(loaded.pair, config)
    torch.manual_seed(0)
    machine, layout = accelerate.Accelerator(cpu=True), (loaded.pair.pads, loaded.pair.max_row_width)
    training = loop.TrainLoop(objective, loaded.pair.teacher, loaded.train, 4, config, machine, clock.Clock(), *layout)
    records = [{name: value for name, value in vars(record).items() if name != "step_s"} for record in training]
    return records, objective


def test_a_teacher_that_works_ahead_makes_no_difference(plain):
    config = Config.from_dict({**plain[0], "grad_accumulation": 2})
    wanted, ours = steps_of(config)
    found, theirs = steps_of(config, "cpu:0")
    assert found == wanted
    assert 0.5 < wanted[0]["figures"]["kd_positions"] <= 1.0
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_a_run_cut_off_ends_as_if_it_never_was(plain, tmp_path):
    config = Config.from_dict({**plain[0], "max_steps": 6, "eval_steps": 3, "control": "off", "grad_accumulation": 2})
    whole = list(session.distill(config, tmp_path / "whole"))
    run = session.distill(config, tmp_path / "cut")
    for record in run:
        if record["kind"] == "train" and record["step"] == 2:
            run.close()
            break
    rest = list(session.distill(config, tmp_path / "cut"))
    wanted, found = (
        {r["step"]: (r["loss"], r["parts"], r["grad_norm"], r["figures"]) for r in records if r["kind"] == "train"}
        for records in (whole, rest)
    )
    assert set(found) == {3, 4, 5, 6}
    assert all(found[step] == wanted[step] for step in found)
    assert all(0.5 < figures["kd_positions"] <= 1.0 for *_, figures in wanted.values())
    mean = np.mean([figures["kd_positions"] for *_, figures in wanted.values()])
    assert (
        f"; {mean:.0%} had a teacher signal, including positions inside tokens"
        in (tmp_path / "whole" / "report.html").read_text()
    )
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]
