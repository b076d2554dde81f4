"""Span maps and relations against loops written out, and against the eager attention of real architectures."""

import itertools
import math

import pytest
import torch
from families import ARCHITECTURES, byte_level

from kdlib.losses import divergences, features
from kdlib.models import forward, hooks


def softmax(values):
    top = max(values)
    weights = [math.exp(value - top) for value in values]
    return [weight / sum(weights) for weight in weights]


def map_by_hand(query, key, ends, scaling):
    """Row by row, head by head, token by token; nested lists of probabilities."""
    heads, group = len(query), len(query) // len(key)
    rows = [[0.0] * len(ends) for _ in ends]
    for k in range(1, len(ends)):
        for head in range(heads):
            keys = key[head // group]
            tokens = list(range(ends[0] + 1, ends[k] + 1))
            scores = [scaling * sum(a * b for a, b in zip(query[head][k], keys[t], strict=True)) for t in tokens]
            for token, prob in zip(tokens, softmax(scores), strict=True):
                span = min(i for i, end in enumerate(ends) if token <= end)
                rows[k][span] += prob / heads
    return torch.tensor(rows)


def case(heads=4, kv_heads=2, width=3, length=11):
    query, key = torch.randn(heads, length, width), torch.randn(kv_heads, length, width)
    return query, key, torch.tensor([1, 2, 5, 6, 9])


def test_a_span_map_is_the_written_out_sum_over_tokens_and_heads():
    query, key, ends = case()
    found = features.span_map(query[:, ends], key, ends, 0.7)
    expected = map_by_hand(query[:, ends].tolist(), key.tolist(), ends.tolist(), 0.7)
    torch.testing.assert_close(found.exp(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found.exp().sum(-1), torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]))


def test_what_comes_before_the_first_end_or_after_the_last_changes_nothing():
    query, key, ends = case()
    found = features.span_map(query[:, ends], key, ends, 0.7)
    changed = key.clone()
    changed[:, :2] += 50.0
    changed[:, 10:] -= 50.0
    torch.testing.assert_close(features.span_map(query[:, ends], changed, ends, 0.7), found)


@pytest.mark.parametrize("count", [0, 1])
def test_a_window_with_no_span_before_another_has_an_empty_map(count):
    query, key, ends = case()
    found = features.span_map(query[:, ends[:count]], key, ends[:count], 1.0)
    assert found.shape == (count, count)
    assert found.exp().sum() < 1e-20


def test_gradient_of_a_map_divergence_passes_gradcheck():
    query, key, ends = (tensor.double() for tensor in case(2, 1, 2, 7))
    ends = ends[:3].long()
    target = features.span_map(torch.randn(3, 3, 2).double(), torch.randn(3, 7, 2).double(), ends, 1.0)

    def divergence(query, key):
        return divergences.forward_kl(features.span_map(query, key, ends, 1.0), target).sum()

    assert torch.autograd.gradcheck(divergence, (query[:, ends].requires_grad_(), key.requires_grad_()))


def test_gradient_of_a_relation_divergence_passes_gradcheck():
    ours, theirs = torch.randn(4, 6).double().requires_grad_(), features.relations(torch.randn(4, 9).double(), 3)
    assert torch.autograd.gradcheck(lambda x: divergences.forward_kl(features.relations(x, 3), theirs).sum(), ours)


def test_relations_are_written_out_softmaxes_that_look_back():
    vectors = torch.randn(4, 6)
    found = features.relations(vectors, 2).exp()
    for head in range(2):
        part = vectors[:, 3 * head : 3 * head + 3].tolist()
        for i in range(4):
            scores = [sum(a * b for a, b in zip(part[i], part[j], strict=True)) / math.sqrt(3) for j in range(i + 1)]
            assert found[head, i, : i + 1].tolist() == pytest.approx(softmax(scores), rel=1e-5)
            assert not found[head, i, i + 1 :].any()


def test_relation_heads_divide_both_widths():
    assert features.relation_heads(24, 36, 12) == 12
    assert features.relation_heads(64, 128, 12) == 8
    assert features.relation_heads(15, 14, 12) == 1


def padded_batch(size):
    torch.manual_seed(1)
    ids = torch.randint(4, size, (2, 13))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[1, 10:] = 0
    return ids, mask


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_what_is_read_off_a_model_is_what_it_computes_eagerly(kind):
    """Layers as `output_hidden_states`, maps as the eager attentions pooled by hand; padding on both sides of the second
    window, which only a mask keeps out.
    """
    tokenizer = byte_level()
    model = ARCHITECTURES[kind](tokenizer)
    ids, mask = padded_batch(len(tokenizer))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model.base_model(input_ids=ids, attention_mask=mask, output_attentions=True, output_hidden_states=True)
    hooks.watch_attention(model)
    rows, by_window = torch.tensor([1, 3, 4, 8, 13 + 3, 13 + 4, 13 + 8]), (4, 3)
    with torch.no_grad():
        found = forward.read(model, ids, mask, rows, by_window, forward.Taps((0, 1), (1, 2), (2,)))
    shown = mask.bool()
    torch.testing.assert_close(found.last[shown], eager.last_hidden_state[shown], atol=1e-5, rtol=1e-4)
    for layer, states in zip((0, 1), found.layers, strict=True):
        torch.testing.assert_close(states, eager.hidden_states[layer + 1].flatten(0, 1)[rows], atol=1e-5, rtol=1e-4)
    for layer, maps in zip((1, 2), found.maps, strict=True):
        for window, ends in enumerate(([1, 3, 4, 8], [3, 4, 8])):
            probs = eager.attentions[layer][window]
            for k in range(1, len(ends)):
                free = probs[:, ends[k], ends[0] + 1 : ends[k] + 1]
                free = (free / free.sum(-1, keepdim=True)).mean(0)
                cuts = [end - ends[0] for end in ends[: k + 1]]
                spans = [float(free[a:b].sum()) for a, b in itertools.pairwise(cuts)]
                assert maps[window][k].exp().tolist()[1 : k + 1] == pytest.approx(spans, abs=1e-5)
    assert found.attention_input.shape == found.last.shape
    torch.testing.assert_close(found.attention_input[shown], eager.hidden_states[1][shown], atol=1e-5, rtol=1e-4)
    query, key, value = found.vectors[0]
    assert len(query) == len(key) == len(value) == 7
    assert key.shape == value.shape
    head_width = query.shape[1] // model.config.num_attention_heads
    assert key.shape[1] == head_width * getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)


def test_watching_leaves_nothing_behind():
    model = ARCHITECTURES["llama"](byte_level())
    hooks.watch_attention(model)
    ids, mask = padded_batch(200)
    with hooks.watch(model, (0,), (1,)) as seen:
        model.base_model(input_ids=ids, attention_mask=mask)
    assert (set(seen.layers), set(seen.attention)) == ({0}, {1})
    seen.layers.clear(), seen.attention.clear()
    model.base_model(input_ids=ids, attention_mask=mask)
    assert not seen.layers
    assert not seen.attention
    assert not hooks._WATCHERS
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_layers_that_can_be_told_is_refused():
    model = ARCHITECTURES["llama"](byte_level())
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="no list of 7 decoder layers"):
        hooks.decoder_layers(model)
