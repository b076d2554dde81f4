"""A look inside a pair: formulas by hand, pieces that add up to the text, a run that has it on disk."""

import json

import numpy as np
import pytest
import torch
from families import reader, tiny_model

from kdlib import demo
from kdlib.config import Config
from kdlib.data import tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.evaluation import internals
from kdlib.models import hooks, loading
from kdlib.session import inputs
from kdlib.session.session import distill


def windows_of(text, ours, theirs, length=64):
    document = Document(text)
    return windowing.cut_windows(
        document, *(tokenize.encode(document, each) for each in (ours, theirs)), ours, theirs, length
    )


def hsic_by_hand(x, y):
    """The unbiased estimate, every sum written out over pairs, triples and quadruples of different positions."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    two = sum(k[i, j] * m[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    three = sum(
        k[i, j] * m[i, q] for i in range(n) for j in range(n) for q in range(n) if len({i, j, q}) == 3
    ) / (n * (n - 1) * (n - 2))  # fmt: skip
    four = sum(
        k[i, j] * m[q, r]
        for i in range(n) for j in range(n) for q in range(n) for r in range(n) if len({i, j, q, r}) == 4
    ) / (n * (n - 1) * (n - 2) * (n - 3))  # fmt: skip
    return two + four - 2 * three


def test_layer_similarity_is_the_unbiased_kernel_alignment():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(7, 3)), random.normal(size=(7, 5))
    y[:, :2] += 2 * x[:, :2]
    expected = hsic_by_hand(x, y) / np.sqrt(hsic_by_hand(x, x) * hsic_by_hand(y, y))
    assert internals.cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-9)


def test_similarity_does_not_see_rotation_scale_or_offset():
    random = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=random, dtype=torch.float64)
    turned = 3 * x @ torch.linalg.qr(torch.randn(6, 6, generator=random, dtype=torch.float64)).Q + 5
    assert internals.cka(x, turned) == pytest.approx(1.0)
    assert abs(internals.cka(x, torch.randn(40, 200, generator=random, dtype=torch.float64))) < 0.2  # no bias by width


def test_pieces_are_the_text_and_tokens_of_either_side():
    ours, theirs = reader("unigram"), reader("byte_level")
    text = "The cat sat on the mat, and the dog looked."
    pieces = internals.spans(windows_of(text, ours, theirs)[0], ours, theirs)
    for piece in pieces:
        assert "".join(piece["student"]).strip() == "".join(piece["teacher"]).strip()
    assert "".join("".join(piece["teacher"]) for piece in pieces) == text
    for side, used in (("student", ours), ("teacher", theirs)):
        tokens = used.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert sum(len(piece[side]) for piece in pieces) == len(tokens)
    assert len(pieces) > 5


def test_sizes_count_pieces_by_their_tokens():
    ours, theirs = reader("unigram"), reader("byte_level")
    windows = windows_of("The cat sat on the mat, and the dog looked. Return the first item.", ours, theirs)
    counts = np.zeros((4, 4))
    for window in windows:
        for row, stop, other, end in zip(
            window.student_rows, window.student_span_ends, window.teacher_rows, window.teacher_span_ends, strict=True
        ):
            if stop > row:
                counts[min(stop - row, 4) - 1, min(end - other, 4) - 1] += 1
    assert internals.sizes(windows) == pytest.approx(counts / counts.sum(), abs=1e-5)
    assert counts.sum() > 5


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_the_attention_map_is_the_models_own(side):
    """Against `output_attentions` of the eager implementation, pooled by hand."""
    ours, theirs = reader("unigram"), reader("byte_level")
    used = ours if side == "student" else theirs
    model = tiny_model(used.tokenizer, 24)
    window = windows_of("The cat sat on the mat, and the dog looked.", ours, theirs)[0]
    rows, ids = getattr(window, f"{side}_rows"), getattr(window, f"{side}_ids")
    found = internals.attention_map(model, window, side)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(torch.from_numpy(ids)[None], output_attentions=True).attentions)[:, 0].double()
    for k in range(1, len(rows)):
        # what lies before the first boundary is left out of the softmax
        seen = maps[:, :, rows[k]].clone()
        seen[..., : rows[0] + 1] = 0
        seen = (seen / seen.sum(-1, keepdim=True)).mean(dim=(0, 1))
        for j in range(1, len(rows)):
            expected = float(seen[rows[j - 1] + 1 : rows[j] + 1].sum())
            assert found[k - 1][j - 1] == pytest.approx(expected, abs=2e-4)


def test_layers_are_read_at_aligned_positions():
    ours, theirs = reader("unigram"), reader("byte_level")
    model = tiny_model(ours.tokenizer, 16)
    window = windows_of("The cat sat on the mat.", ours, theirs)[0]
    states = internals.layer_states(model, [window, window], "student")
    with torch.no_grad():
        whole = model(torch.from_numpy(window.student_ids)[None], output_hidden_states=True).hidden_states
    assert len(states) == model.config.num_hidden_layers
    expected = whole[1][0][torch.from_numpy(window.student_rows)].double()
    torch.testing.assert_close(states[0], torch.cat([expected, expected]))


def test_a_run_leaves_its_look_inside(settings, tmp_path):
    list(distill(Config.from_dict({**settings, "control": "full"}), tmp_path / "run"))
    told = json.loads((tmp_path / "run" / "figures" / "inside.json").read_text())
    assert set(told["attention"]) == {"teacher", "student_before", "distilled", "ce_only"}
    assert set(told["similarity"]) == {"student_before", "distilled", "ce_only"}
    for rows in told["attention"].values():
        assert [len(row) for row in rows] == [len(rows)] * len(rows)
        assert [sum(row) for row in rows] == pytest.approx([1.0] * len(rows), abs=2e-3)
        assert len(told["spans"]) in (len(rows) + 1, len(rows) + 2)
    assert told["similarity"]["student_before"] != told["similarity"]["distilled"]
    loaded = inputs.load(Config.from_dict(settings))
    assert sum(told["coverage"]) == len(loaded.train)
    shares = [len(window.student_rows) / max(1, window.num_positions) for window in loaded.train]
    assert told["coverage"] == np.histogram(shares, bins=20, range=(0, 1))[0].tolist()


def test_what_can_not_be_watched_is_said_not_raised(settings, tmp_path, monkeypatch):
    def refuse(model, on=True):
        if on:
            raise ValueError("Odd does not take another attention function")

    monkeypatch.setattr(hooks, "watch_attention", refuse)
    list(distill(Config.from_dict({**settings, "control": "off"}), tmp_path / "run"))
    told = json.loads((tmp_path / "run" / "figures" / "inside.json").read_text())
    assert told["without"] == "the models could not be observed: Odd does not take another attention function"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "No analysis of the models" in page
    assert "layer similarity" not in page


def test_any_other_failure_costs_the_look_alone(settings, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyError("ours")

    monkeypatch.setattr(internals, "layer_states", fail)
    found = list(distill(Config.from_dict({**settings, "control": "off"}), tmp_path / "run"))
    assert found[-1]["kind"] == "verdict"
    told = json.loads((tmp_path / "run" / "figures" / "inside.json").read_text())
    assert "KeyError: 'ours'" in told["without"]
    assert "No analysis of the models" in (tmp_path / "run" / "report.html").read_text()


def test_a_sentence_needs_tokenizers_only(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "load_model", None)
    text = "The cat sat on the mat, and the dog looked at the cat. Caf\u00e9."
    demo.write_jsonl(tmp_path / "text.jsonl", [text])
    pieces = internals.align_sentence(Config.from_dict({**settings, "dataset": str(tmp_path / "text.jsonl")}))
    shown = "".join("".join(piece["teacher"]) for piece in pieces)
    assert shown.strip() == text.replace(
        "\u00e9", "\\xc3\\xa9"
    )  # torn into its bytes by a tokenizer that has no such letter


def test_a_long_text_is_shown_up_to_a_whole_word(settings, tmp_path):
    words = " ".join(f"word{i}" for i in range(200))
    demo.write_jsonl(tmp_path / "long.jsonl", [words])
    pieces = internals.align_sentence(Config.from_dict({**settings, "dataset": str(tmp_path / "long.jsonl")}))
    shown = "".join("".join(piece["teacher"]) for piece in pieces).strip()
    assert len(shown) <= internals.SHOWN_CHARS
    assert words[len(shown)] == " "
