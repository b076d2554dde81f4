"""Windows in rows: which layout is taken, what it holds, and that nothing that is computed can tell it from padding."""

import copy
import json
import types

import accelerate
import numpy as np
import pytest
import torch
import transformers
from families import ARCHITECTURES, LINES, byte_level, tiny_model, unigram

from kdlib import clock, demo
from kdlib.config import Config
from kdlib.data import batching, windowing
from kdlib.evaluation import scoring
from kdlib.losses import chunked_head
from kdlib.losses import features as attention
from kdlib.models import forward, hooks
from kdlib.session import inputs
from kdlib.training import loop, terms

FREE = 10**6
EVERYTHING = {
    **{f"{name}_weight": 0.3 for name in terms.FEATURES}, "attention_layers": 2, "label_smoothing": 0.1,
}  # fmt: skip


def opt(tokenizer):
    torch.manual_seed(4)
    return transformers.OPTForCausalLM(transformers.OPTConfig(
        vocab_size=len(tokenizer), hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2, init_std=0.2,
        num_attention_heads=2, max_position_embeddings=256, dropout=0.0, pad_token_id=0,
    )).eval()  # fmt: skip


PACKING = {**ARCHITECTURES, "opt": opt}


def width(lengths, rows):
    return max(sum(lengths[i] for i in row) for row in rows)


def cost(num_rows, row_width):
    """By hand: attention takes as long as all else at 2,048 tokens."""
    return num_rows * row_width * (1 + row_width / 2048)


def test_windows_share_rows_that_are_as_full_as_can_be():
    assert batching.pack_rows([8, 3, 5], FREE) == [[0], [2, 1]]
    assert batching.pack_rows([4, 9, 5, 6, 3], FREE) == [[1], [3, 4], [2, 0]]


def test_windows_of_one_length_have_a_row_each():
    assert batching.pack_rows([7, 7, 7], FREE) == [[0], [1], [2]]
    assert batching.pack_rows([100, 99, 99], FREE) == [[0], [1], [2]]  # 0.7 % of padding is not worth it
    assert batching.pack_rows([5], FREE) == [[0]]


def test_rows_are_no_wider_than_was_told():
    assert batching.pack_rows([8, 3, 5], 0) == batching.pack_rows([8, 3, 5], 7) == [[0], [1], [2]]
    assert width([5, 5, 4, 3, 3], batching._fill_rows([5, 5, 4, 3, 3], 2)[0]) == 11
    assert width([5, 5, 4, 3, 3], batching.pack_rows([5, 5, 4, 3, 3], 10)) <= 10
    for max_row_width in (100, 130, 200):
        assert width([90, 60, 40, 30, 20], batching.pack_rows([90, 60, 40, 30, 20], max_row_width)) <= max_row_width


def test_the_layout_is_the_cheapest_of_all_numbers_of_rows():
    chance = np.random.default_rng(0)
    for _ in range(50):
        lengths = chance.integers(10, 384, chance.integers(1, 12)).tolist()
        rows = batching.pack_rows(lengths, FREE)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        others = [batching._fill_rows(lengths, count)[0] for count in range(1, len(lengths))]
        least = min([cost(len(other), width(lengths, other)) for other in others], default=float("inf"))
        alone = cost(len(lengths), max(lengths))
        assert cost(len(rows), width(lengths, rows)) == pytest.approx(
            min(alone, least) if alone > 1.02 * least else alone
        )


def test_wide_rows_are_paid_for():
    """One row would hold two windows of 2,000 and 1,600 tokens without padding, and take 1.4 times as long."""
    assert batching.pack_rows([2000, 1600], FREE) == [[0], [1]]
    assert batching.pack_rows([200, 160], FREE) == [[0, 1]]


def made(folder):
    """`Inputs` over a Llama and a GPT-2 in float64."""
    chance = np.random.default_rng(1)
    words = [word for line in (LINES[0], LINES[3]) for word in line.split()]
    texts = [" ".join(chance.choice(words, size)) + f" {i}." for i, size in enumerate(chance.integers(2, 40, 40))]
    for name, kind, tokenizer in (("student", "llama", unigram()), ("teacher", "gpt2", byte_level())):
        demo.save(PACKING[kind](tokenizer), tokenizer, folder / name)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values = {
        "teacher": str(folder / "teacher"), "student": str(folder / "student"), "dataset": str(folder / "text.jsonl"),
        "max_length": 60, "batch_size": 8, "max_steps": 3, "check_teacher": False, "eval_tokens": 300,
    }  # fmt: skip
    loaded = inputs.load(Config.from_dict(values))
    loaded.pair.sample = loaded.train[:4]
    loaded.pair.teacher.model.double()
    loaded.pair.student.double()
    return loaded


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return made(tmp_path_factory.mktemp("pair"))


def both(loaded, windows):
    """The same windows with rows of their own, and packed on both sides."""
    padded = batching.collate(windows, *loaded.pair.pads)
    packed = batching.collate(windows, *loaded.pair.pads, loaded.pair.max_row_width)
    assert packed.student_packed
    assert packed.teacher_packed
    assert not padded.student_packed
    assert not padded.teacher_packed
    return padded, packed


def test_every_window_lies_whole_in_its_spot(loaded):
    windows = loaded.train[:9]
    batch = batching.collate(windows, 7, 9, loaded.pair.max_row_width)
    assert sorted(batch.order) == list(range(9)) != list(batch.order)
    firsts = np.append(0, np.cumsum(batch.rows_by_window))
    for side, pad in (("student", 7), ("teacher", 9)):
        ids, of, scored = (getattr(batch, f"{side}_{name}") for name in ("ids", "windows", "scored"))
        labels = batch.labels if side == "student" else batch.teacher_labels
        spots, seen = getattr(batch, f"{side}_row_slices"), 0
        for k, given in enumerate(batch.order):
            window, (row, start, stop) = windows[given], spots[k]
            assert ids[row, start:stop].tolist() == getattr(window, f"{side}_ids").tolist()
            assert labels[row, start:stop].tolist() == getattr(window, f"{side}_labels").tolist()
            assert scored[row, start:stop].tolist() == getattr(window, f"{side}_scored").tolist()
            assert (of[row, start:stop] == k + 1).all()
            for name in ("rows", "span_ends"):
                flat = getattr(batch, f"{side}_{name}")[firsts[k] : firsts[k + 1]] - row * ids.shape[1] - start
                assert flat.tolist() == getattr(window, f"{side}_{name}").tolist()
            seen += stop - start
        free = of == 0
        assert seen == int((~free).sum()) == int(getattr(batch, f"{side}_mask").sum())
        assert (ids[free] == pad).all()
        assert (labels[free] == windowing.IGNORE).all()
        assert not scored[free].any()
    assert (batch.student_rows.diff() > 0).all()
    assert (batch.num_student_tokens, batch.num_student_computed) == (
        sum(len(w.student_ids) for w in windows), batch.student_ids.shape[0] * batch.student_ids.shape[1])  # fmt: skip
    assert (batch.num_teacher_tokens, batch.num_teacher_computed) == (
        sum(len(w.teacher_ids) for w in windows), batch.teacher_ids.shape[0] * batch.teacher_ids.shape[1])  # fmt: skip


def test_a_position_sees_its_own_window_up_to_itself():
    windows = torch.tensor([[1, 1, 3, 3, 3], [2, 2, 2, 0, 0]])
    mask = attention.block_diagonal(windows)
    assert mask.shape == (2, 1, 5, 5)
    for row, of in enumerate(windows.tolist()):
        for i in range(5):
            assert mask[row, 0, i].tolist() == [j <= i and of[i] == of[j] for j in range(5)]
    assert attention.restart_positions(windows).tolist() == [[0, 1, 0, 1, 2], [0, 1, 2, 0, 0]]


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("kind", sorted(PACKING))
def test_what_is_read_off_a_packed_row_is_what_each_window_gives_alone(loaded, kind, watched):
    """States, layers, maps and vectors in float64, under torch's attention and the watched one."""
    model = PACKING[kind](unigram()).double()
    hooks.watch_attention(model, watched)
    assert forward.packs(model, 60)
    taps = forward.Taps((0, 1), (0, 1), (1,)) if watched else forward.Taps((0, 1))
    found = []
    for batch in both(loaded, loaded.train[:9]):
        with torch.no_grad():
            found.append(forward.read(
                model, batch.student_ids, batch.student_windows, batch.student_rows, batch.rows_by_window, taps,
                batch.student_row_slices,
            ))  # fmt: skip
        rows, order = batch.student_rows, by_given(batch)
        last = found[-1].last.flatten(0, 1)[rows][order]
        layers = [layer[order] for layer in found[-1].layers]
        vectors = [part[order] for parts_of_layer in found[-1].vectors for part in parts_of_layer]
        maps = [each[k].exp() for each in found[-1].maps for k in np.argsort(batch.order)]
        found[-1] = [last, *layers, *vectors, *maps]
    for ours, theirs in zip(*found, strict=True):
        close(ours, theirs)


def by_given(batch):
    """The order of a batch's aligned positions that puts them as they lie in the windows that were given, one by one."""
    pieces = torch.arange(batch.num_aligned).split(batch.rows_by_window)
    return torch.cat([pieces[k] for k in np.argsort(batch.order)])


def close(ours, theirs, rel=1e-12):
    """Equal to `rel` of the largest value."""
    assert ours.dtype == theirs.dtype
    scale = float(theirs.abs().max()) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, atol=rel * max(scale, 1e-6), rtol=0.0)


def plain_head(hidden, weight, bias, chunks, losses_of, weights, compared=None, extra=(), transform=lambda z: z):
    """`chunked_head.chunked_head_losses` by autograd in float64, where the library's own keeps its sums in float32."""
    found = 0.0
    for block in (block for chunk in chunks for block in chunk):
        logits = torch.nn.functional.linear(hidden[block.rows], weight, bias)
        found = found + losses_of(transform(logits), None if compared is None else compared(block.teacher_rows), block)
    return (found * found.new_tensor(weights)).sum(), found.detach()


def told(loaded, batch, config):
    """`(loss, parts, gradients)` of a batch."""
    torch.manual_seed(0)
    objective = inputs.make_objective(loaded.pair, config, copy.deepcopy(loaded.pair.student)).double().eval()
    counts = {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}
    signal = loaded.pair.teacher(batch, **objective.teacher_request(objective.weights()))
    loss, values, squares = objective(batch, signal, counts, measure=True)
    loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return loss.detach(), values, squares, gradients


@pytest.mark.parametrize("method", ["shared_vocab", "first_token", "byte_prefix", "projector", "chunk_likelihood"])
def test_loss_parts_and_gradients_are_those_of_the_padded_batch(loaded, monkeypatch, method):
    """Every way to distil, and with one of them every feature part; float64 throughout."""
    monkeypatch.setattr(chunked_head, "chunked_head_losses", plain_head)
    features = EVERYTHING if method == "first_token" else {}
    config = Config(kd_method=method, batch_size=8, max_length=60, **features)
    padded, packed = both(loaded, loaded.train[:9])
    loss, values, squares, gradients = told(loaded, padded, config)
    same_loss, same_values, same_squares, same_gradients = told(loaded, packed, config)
    assert same_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert set(values) >= {"lm", "kd", *(terms.FEATURES if features else ())}
    for name, value in values.items():
        assert same_values[name].item() == pytest.approx(value.item(), rel=1e-12), name
        if name in squares:  # kept in float32
            assert same_squares[name].item() == pytest.approx(squares[name].item(), rel=1e-5), name
    assert len(gradients) == len(same_gradients) > 10
    for name, gradient in gradients.items():
        close(same_gradients[name], gradient, 1e-11)


def test_the_teachers_signal_is_the_same_but_for_the_order_of_the_windows(loaded):
    windows = loaded.train[:9]
    taps = forward.Taps((0, 1), (), ())
    batches = both(loaded, windows)
    padded, packed = (loaded.pair.teacher(batch, taps, spans=True) for batch in batches)
    order = by_given(batches[1])
    told = [(signal.hidden, signal.span_log_probs, *signal.layers) for signal in (packed, padded)]
    for ours, theirs in zip(*told, strict=True):
        close(ours[order], theirs)


def test_evaluation_scores_are_those_of_padded_batches_halved_or_not(loaded):
    pair, windows, found = loaded.pair, loaded.train[:11], []
    for max_row_width in ((0, 0), pair.max_row_width):
        held_out = scoring.prepare_held_out(windows, pair.teacher, pair.head, pair.shared, 11, pair.pads, max_row_width)
        for text in (held_out, held_out.halved()):
            assert any(batch.student_packed and batch.teacher_packed for batch in text.batches) == bool(
                max_row_width[0]
            )
            ours = scoring.evaluate_student(pair.student, pair.head, text)
            found.append((ours, text.teacher_score))
    for scores in found[1:]:
        for score, expected in zip(scores, found[0], strict=True):
            for name, value in score.summary().items():
                assert value == pytest.approx(expected.summary()[name], rel=1e-12, abs=1e-14), name
            assert score.bits.tolist() == pytest.approx(expected.bits.tolist(), rel=1e-12)
            assert score.num_bytes.tolist() == expected.num_bytes.tolist()


def causal(kind, **changes):
    """A fresh model that is no friend of shared rows, or one beside it that is."""
    torch.manual_seed(0)
    common = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"mistral": {**common, "intermediate_size": 24, "num_key_value_heads": 2}, "falcon": common}
    sizes["bloom"] = {"vocab_size": 99, "hidden_size": 16, "n_layer": 2, "n_head": 2}
    sizes["mamba"] = {"vocab_size": 99, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    sizes["gpt_neo"] = {
        "vocab_size": 99, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 24,
        "attention_types": [[["global", "local"], 1]],
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **{**sizes[kind], **changes})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "changes", "fits"),
    [
        ("mistral", {"sliding_window": None}, True),
        ("mistral", {"sliding_window": 40}, True),
        ("mistral", {"sliding_window": 24}, False),
        ("falcon", {"alibi": False}, True),
        ("falcon", {"alibi": True}, False),
        ("bloom", {}, False),
        ("mamba", {}, False),
        ("gpt_neo", {}, False),
    ],
)
def test_a_model_that_can_not_share_rows_is_found_out(kind, changes, fits):
    """Windows of 30 tokens: narrower sight, positions counted over the row, a state carried on, a mask not taken."""
    assert forward.packs(causal(kind, **changes), 30) is fits


def test_positions_counted_over_the_whole_row_are_found_out(monkeypatch):
    monkeypatch.setattr(attention, "restart_positions", lambda windows: torch.arange(windows.shape[1])[None])
    assert forward.packs(tiny_model(byte_level()), 30)  # rotary: only distances count
    assert not forward.packs(ARCHITECTURES["gpt2"](byte_level()), 30)
    monkeypatch.undo()
    monkeypatch.setattr(
        attention, "block_diagonal", lambda windows: torch.ones(60, 60, dtype=torch.bool).tril()[None, None]
    )
    assert not forward.packs(tiny_model(byte_level()), 30)


def test_auto_falls_back_for_one_side_and_on_refuses(settings, monkeypatch):
    assert min(inputs.load(Config.from_dict(settings)).pair.max_row_width) > 0
    assert inputs.load(Config.from_dict({**settings, "packing": "off"})).pair.max_row_width == (0, 0)
    asked = []

    def only_the_teacher(model, length):
        asked.append(length)
        return len(asked) % 2 == 0

    monkeypatch.setattr(forward, "packs", only_the_teacher)
    loaded = inputs.load(Config.from_dict(settings))
    longest = [max(len(getattr(w, f"{side}_ids")) for w in loaded.train) for side in ("student", "teacher")]
    assert asked[0] >= longest[0]
    assert asked[1] >= longest[1]
    assert loaded.pair.max_row_width == (0, 2 * asked[1])
    with pytest.raises(
        ValueError, match=r"packing is on, but the student \(LlamaForCausalLM\) .* set packing auto or off"
    ):
        inputs.load(Config.from_dict({**settings, "packing": "on"}))


def like_instructions(count):
    """Windows with lengths like those of instruction data: mean 113, 90th percentile 175, 384 at most."""
    chance = np.random.default_rng(0)
    ours = np.clip(chance.lognormal(np.log(113) - 0.43**2 / 2, 0.43, count).round(), 8, 384).astype(int)
    theirs = np.clip((ours * chance.normal(0.95, 0.06, count)).round(), 4, None).astype(int)
    sizes = zip(ours, theirs, strict=True)
    return [types.SimpleNamespace(student_ids=np.zeros(a), teacher_ids=np.zeros(b)) for a, b in sizes]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (4, 4), (8, 3)])
def test_at_most_a_twentieth_is_computed_for_nothing(batch_size, accumulation):
    windows = like_instructions(2000)
    order = np.array(batching.batch_order(windows, batch_size * accumulation, seed=1, epoch=0))
    for side in ("student", "teacher"):
        lengths = np.array([len(getattr(window, f"{side}_ids")) for window in windows])
        assert side == "teacher" or abs(lengths.mean() - 113) + abs(np.percentile(lengths, 90) - 175) < 5
        computed = 0
        for batch in order.reshape(-1, batch_size):
            rows = batching.pack_rows(lengths[batch].tolist(), 2 * 384)
            computed += len(rows) * width(lengths[batch], rows)
        assert 1.0 <= computed / lengths[order].sum() <= 1.05


@pytest.mark.parametrize("varied", [0, 1])
def test_steps_are_alike_on_the_side_that_varies(varied):
    chance = np.random.default_rng(0)
    lengths = np.full((2, 512), 50)
    lengths[varied] = chance.integers(20, 200, 512)
    windows = [types.SimpleNamespace(student_ids=np.zeros(a), teacher_ids=np.zeros(b)) for a, b in lengths.T]
    steps = np.array(batching.batch_order(windows, 8, seed=0, epoch=0))
    assert 8 * lengths[varied][steps].max(axis=1).sum() < 1.1 * lengths[varied].sum()


def test_every_window_has_its_turn_and_each_epoch_its_own_steps():
    windows = like_instructions(83)
    seen = [batching.batch_order(windows, 4, 0, epoch) for epoch in range(12)]
    left_out = [set(range(83)) - {i for step in order for i in step} for order in seen]
    assert all(len(out) == 3 for out in left_out)
    assert len(set().union(*left_out)) > 20
    first, second = ({frozenset(step) for step in order} for order in seen[:2])
    assert len(first & second) <= 2


def test_steps_tell_what_was_computed_and_the_control_its_own_side_only(loaded, settings):
    """Two micro-batches of a step, padded to their longest or packed, over a model that is never run."""
    counts = {}
    windows = sorted(loaded.train, key=lambda window: len(window.student_ids))[::9][:6]
    for max_row_width in ((0, 0), loaded.pair.max_row_width):
        machine = accelerate.Accelerator(cpu=True)
        batches = loop._own_share(windows, 3, 3, machine, (*loaded.pair.pads, max_row_width))
        counts[max_row_width] = loop._counts(batches, machine)
    padded, packed = (batching.computed_per_token(found, teacher=True) for found in counts.values())
    for side in ("student", "teacher"):
        sizes = [len(getattr(window, f"{side}_ids")) for window in windows]
        assert padded[side] == pytest.approx((3 * max(sizes[:3]) + 3 * max(sizes[3:])) / sum(sizes))
        assert 1.0 <= packed[side] < padded[side]
    assert set(batching.computed_per_token(counts[0, 0], teacher=None)) == {"student"}


def test_a_packed_run_is_the_padded_run(settings):
    """Records of three steps with every default, and with packing off."""
    found = []
    for packing in ("off", "on"):
        config = Config.from_dict({**settings, "packing": packing, "batch_size": 8})
        loaded = inputs.load(config)
        short = [window for window in loaded.train if len(window.student_ids) < 40]
        training = loop.TrainLoop(
            inputs.make_objective(loaded.pair, config), loaded.pair.teacher, [*loaded.train, *short], 3, config,
            accelerate.Accelerator(cpu=True), clock.Clock(), loaded.pair.pads, loaded.pair.max_row_width,
        )  # fmt: skip
        found.append(list(training))
    for padded, packed in zip(*found, strict=True):
        assert packed.loss == pytest.approx(padded.loss, rel=1e-5)
        assert packed.grad_norm == pytest.approx(padded.grad_norm, rel=1e-4)
        assert packed.num_tokens == padded.num_tokens
    assert any(packed.computed_per_token != padded.computed_per_token for padded, packed in zip(*found, strict=True))
