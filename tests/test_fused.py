"""The chunked head, in float32 and half precision, against the whole matrix of logits and autograd in float64."""

import math

import numpy as np
import pytest
import torch

from kdlib.losses import chunked_head, divergences
from kdlib.models.head import LogitsTransform


def case(dtype=torch.float64, num_rows=23, width=5, vocabulary=11, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    offset = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None
    other = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (num_rows,))
    labels[::4] = -100
    teacher = torch.randn(num_rows, vocabulary, dtype=dtype)

    def block_losses(logits, teacher_logits, block):
        ce = divergences.cross_entropy(divergences.log_softmax(logits), labels[block.rows], 0.1)
        kd = divergences.forward_kl(divergences.log_softmax(logits), divergences.log_softmax(teacher[block.rows]))
        own = divergences.cross_entropy(divergences.log_softmax(teacher_logits), labels[block.rows])
        return torch.stack([divergences.token_mean(values, 17) for values in (ce, kd, own)]).float()

    def teacher_logits(known):
        return teacher[known].to(other.dtype) * other

    return hidden, weight, offset, other, block_losses, teacher_logits


def blocks(num_rows, chunk, block=3):
    """Chunks of blocks over rows that may be cut anywhere, all of them known."""
    every = np.ones(num_rows, dtype=bool)
    return chunked_head.plan_blocks(every, every, chunk, min(chunk, block))[1]


WEIGHTS = [0.3, 0.7, 1.5]


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_whole_matrix(chunk, bias):
    hidden, weight, offset, other, block_losses, teacher_logits = case(torch.float64, bias=bias)
    exact = [tensor for tensor in (hidden, weight, offset, other) if tensor is not None]
    everything = chunked_head.Block(slice(0, 23), slice(0, 23))
    parts = block_losses(
        hidden @ weight.T + (0.0 if offset is None else offset), teacher_logits(everything.aligned), everything
    )
    whole = (parts * torch.tensor(WEIGHTS)).sum()
    expected = torch.autograd.grad(3.0 * whole, exact)
    single = [
        None if tensor is None else tensor.detach().float().requires_grad_() for tensor in (hidden, weight, offset)
    ]
    total, found = chunked_head.chunked_head_losses(
        *single, blocks(23, chunk), block_losses, WEIGHTS, teacher_logits, (other,)
    )
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found, parts, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(3.0 * total, [*(tensor for tensor in single if tensor is not None), other])
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


@pytest.mark.parametrize("chunk", [7, 1000])
def test_scaled_and_capped_logits_have_the_gradients_of_their_formula(chunk):
    hidden, weight, offset, other, block_losses, teacher_logits = case(torch.float64)
    whole_block = chunked_head.Block(slice(0, 23), slice(0, 23))
    logits = 1.5 * torch.tanh((hidden @ weight.T + offset) * 0.7 / 1.5)
    parts = block_losses(logits, teacher_logits(whole_block.aligned), whole_block)
    expected = torch.autograd.grad((parts * torch.tensor(WEIGHTS)).sum(), [hidden, weight, offset])
    single = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight, offset)]
    settings = *single, blocks(23, chunk), block_losses, WEIGHTS, teacher_logits, (other,), LogitsTransform(0.7, 1.5)
    total, found = chunked_head.chunked_head_losses(*settings)
    torch.testing.assert_close(found, parts, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(total, single), expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
    with torch.no_grad():
        torch.testing.assert_close(chunked_head.chunked_head_losses(*settings)[1], parts, rtol=1e-5, atol=1e-6)


def test_a_tied_head_gets_both_its_gradients_once():
    hidden, weight, _, _, block_losses, teacher_logits = case(torch.float32, bias=False)
    embedded = weight.square().sum() * 0.01
    total, _ = chunked_head.chunked_head_losses(
        hidden, weight, None, blocks(23, 5), block_losses, WEIGHTS, teacher_logits
    )
    (total + embedded).backward()
    both, weight.grad = weight.grad, None
    chunked_head.chunked_head_losses(hidden, weight, None, blocks(23, 5), block_losses, WEIGHTS, teacher_logits)[
        0
    ].backward()
    torch.testing.assert_close(both, weight.grad + 0.02 * weight)


def test_without_gradients_only_the_value_is_made():
    hidden, weight, offset, other, block_losses, teacher_logits = case(torch.float32)
    with torch.no_grad():
        total, parts = chunked_head.chunked_head_losses(
            hidden, weight, offset, blocks(23, 5), block_losses, WEIGHTS, teacher_logits, (other,)
        )
    expected, _ = chunked_head.chunked_head_losses(
        hidden, weight, offset, blocks(23, 23), block_losses, WEIGHTS, teacher_logits, (other,)
    )
    assert not total.requires_grad
    torch.testing.assert_close(total, expected.detach())
    assert not parts.requires_grad


def test_no_rows_give_zero():
    hidden, weight, offset, other, block_losses, teacher_logits = case(torch.float32, num_rows=0)
    total, _ = chunked_head.chunked_head_losses(
        hidden, weight, offset, blocks(0, 5), block_losses, WEIGHTS, teacher_logits, (other,)
    )
    total.backward()
    assert total.item() == 0.0
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_survive_although_the_scaler_comes_later(dtype):
    """Gradients of 1e-9 are far below float16's smallest number (6e-8); scaled by 2^16 afterwards they must be there."""
    hidden, weight, _, other, block_losses, teacher_logits = case(torch.float32, bias=False)
    halves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    small = [1e-9 * w for w in WEIGHTS]
    whole, _ = chunked_head.chunked_head_losses(
        hidden, weight, None, blocks(23, 7), block_losses, small, teacher_logits, (other,)
    )
    exact = torch.autograd.grad(2.0**16 * whole, [hidden, weight, other])
    half = other.detach().to(dtype).requires_grad_()
    teacher = (teacher_logits(slice(0, 23)) / other).detach().to(dtype)
    total, _ = chunked_head.chunked_head_losses(
        *halves, None, blocks(23, 7), block_losses, small, lambda known: teacher[known] * half, (half,)
    )
    found = torch.autograd.grad(2.0**16 * total, [*halves, half])
    for half, full in zip(found, exact, strict=True):
        assert half.dtype == dtype
        error = (half.float() - full).norm() / full.norm()
        assert error < (0.01 if dtype == torch.float16 else 0.03)


def test_under_autocast_the_products_run_in_its_precision_and_gradients_stay_float32():
    hidden, weight, _, _, block_losses, teacher_logits = case(torch.float32, bias=False)
    whole, _ = chunked_head.chunked_head_losses(
        hidden, weight, None, blocks(23, 7), block_losses, WEIGHTS, teacher_logits
    )
    exact = torch.autograd.grad(whole, [hidden, weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = chunked_head.chunked_head_losses(
            hidden, weight, None, blocks(23, 7), block_losses, WEIGHTS, teacher_logits
        )
    found = torch.autograd.grad(total, [hidden, weight])
    for half, full in zip(found, exact, strict=True):
        assert half.dtype == torch.float32
        assert 1e-4 < (half - full).norm() / full.norm() < 0.03


def test_nothing_of_the_size_of_all_logits_is_kept():
    """What the graph holds after the forward pass: gradients of the inputs, and no chunk."""
    hidden, weight, *_ = case(torch.float32, num_rows=64, vocabulary=50, bias=False)
    total, _ = chunked_head.chunked_head_losses(hidden, weight, None, blocks(64, 8), losses_of_free(50), [1.0])
    kept = [g for g in total.grad_fn.gradients if g is not None]
    assert sorted(tuple(g.shape) for g in kept) == sorted([tuple(hidden.shape), tuple(weight.shape)])
    assert not total.grad_fn.saved_tensors


def losses_of_free(vocabulary):
    def block_losses(logits, _, __):
        even = torch.full((1, vocabulary), -math.log(vocabulary))
        return divergences.token_mean(divergences.forward_kl(divergences.log_softmax(logits), even), 64).reshape(1)

    return block_losses


def test_blocks_take_known_rows_first_and_never_cut_a_span():
    """Twelve rows; spans of 1, 3, 1, 4 rows begin at the known ones, three rows belong to none."""
    known = np.isin(np.arange(12), [1, 2, 5, 6])
    inside = np.isin(np.arange(12), [3, 4, 7, 8, 9])
    order, chunks = chunked_head.plan_blocks(~inside, known, chunk_size=6, block_size=3)
    blocks = [block for chunk in chunks for block in chunk]
    assert [(block.rows.start, block.rows.stop) for block in blocks] == [(0, 2), (2, 5), (5, 6), (6, 10), (10, 12)]
    assert [(block.aligned.start, block.aligned.stop) for block in blocks] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4)]
    assert order.tolist() == [1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert [len(chunk) for chunk in chunks] == [3, 2]


def test_auto_takes_what_free_memory_allows(monkeypatch):
    monkeypatch.setattr(chunked_head.memory, "free", lambda device: 10**12)
    assert chunked_head.chunk_sizes(2 * 49_152, "cpu") == (96, 4)
    assert chunked_head.chunk_sizes(49_152 + 151_936, "cpu") == (96, 1)
    assert chunked_head.chunk_sizes(2 * 49_152, "cuda") == (1365, 1365)
    monkeypatch.setattr(chunked_head.memory, "free", lambda device: 10**8)
    assert chunked_head.chunk_sizes(2 * 49_152, "cpu") == (25, 4)
    monkeypatch.setattr(chunked_head.memory, "free", lambda device: 0)
    assert chunked_head.chunk_sizes(2 * 49_152, "cuda") == (chunked_head.MIN_ROWS, chunked_head.MIN_ROWS)
    assert chunked_head.chunk_sizes(3072, "cpu", 64) == (64, 64)


def test_a_loss_scaler_changes_nothing_but_the_way_there():
    """torch's own GradScaler around float16 products: unscaled, the gradients are those without it."""
    hidden, weight, _, _, block_losses, teacher_logits = case(torch.float32, bias=False)
    small = [1e-6 * w for w in WEIGHTS]
    total, _ = chunked_head.chunked_head_losses(
        hidden, weight, None, blocks(23, 7), block_losses, small, teacher_logits
    )
    exact = torch.autograd.grad(total, [hidden, weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer = torch.optim.SGD([hidden, weight], lr=0.0)
    with torch.autocast("cpu", dtype=torch.float16):
        total, _ = chunked_head.chunked_head_losses(
            hidden, weight, None, blocks(23, 7), block_losses, small, teacher_logits
        )
    scaler.scale(total).backward()
    scaler.unscale_(optimizer)
    for found, expected in zip((hidden.grad, weight.grad), exact, strict=True):
        assert 1e-6 < (found - expected).norm() / expected.norm() < 0.01
