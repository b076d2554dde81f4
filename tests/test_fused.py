"""The chunked head, in float32 and half precision, against the whole matrix of logits and autograd in float64."""

import pytest
import torch

from kdlib import fused, losses


def case(dtype=torch.float64, num_rows=23, width=5, vocabulary=11, bias=True):
    torch.manual_seed(0)
    hidden = torch.randn(num_rows, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    offset = torch.randn(vocabulary, dtype=dtype, requires_grad=True) if bias else None
    other = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (num_rows,))
    labels[::4] = -100
    teacher = torch.randn(num_rows, vocabulary, dtype=dtype)

    def losses_of(logits, start):
        rows = slice(start, start + len(logits))
        ce = losses.cross_entropy(logits, labels[rows], 0.1)
        kd = losses.forward_kl(logits, teacher[rows])
        own = (other.float() * teacher[rows].float()).square().sum(-1)
        return torch.stack([losses.token_mean(values, 17) for values in (ce, kd, own)]).float()

    return hidden, weight, offset, other, losses_of


WEIGHTS = [0.3, 0.7, 1.5]


@pytest.mark.parametrize("chunk", [1, 7, 23, 1000])
@pytest.mark.parametrize("bias", [True, False])
def test_value_and_gradients_are_those_of_the_whole_matrix(chunk, bias):
    hidden, weight, offset, other, losses_of = case(torch.float64, bias=bias)
    exact = [tensor for tensor in (hidden, weight, offset, other) if tensor is not None]
    parts = losses_of(hidden @ weight.T + (0.0 if offset is None else offset), 0)
    whole = (parts * torch.tensor(WEIGHTS)).sum()
    expected = torch.autograd.grad(3.0 * whole, exact)
    single = [
        None if tensor is None else tensor.detach().float().requires_grad_() for tensor in (hidden, weight, offset)
    ]
    total, found = fused.head_losses(*single, losses_of, WEIGHTS, chunk, (other,))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(found, parts, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(3.0 * total, [*(tensor for tensor in single if tensor is not None), other])
    for ours, theirs in zip(gradients, expected, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5


def test_a_tied_head_gets_both_its_gradients_once():
    hidden, weight, _, _, losses_of = case(torch.float32, bias=False)
    embedded = weight.square().sum() * 0.01
    total, _ = fused.head_losses(hidden, weight, None, losses_of, WEIGHTS, 5)
    (total + embedded).backward()
    both, weight.grad = weight.grad, None
    fused.head_losses(hidden, weight, None, losses_of, WEIGHTS, 5)[0].backward()
    torch.testing.assert_close(both, weight.grad + 0.02 * weight)


def test_without_gradients_only_the_value_is_made():
    hidden, weight, offset, other, losses_of = case(torch.float32)
    with torch.no_grad():
        total, parts = fused.head_losses(hidden, weight, offset, losses_of, WEIGHTS, 5, (other,))
    expected, _ = fused.head_losses(hidden, weight, offset, losses_of, WEIGHTS, 23, (other,))
    assert not total.requires_grad
    torch.testing.assert_close(total, expected.detach())
    assert not parts.requires_grad


def test_no_rows_give_zero():
    hidden, weight, offset, other, losses_of = case(torch.float32, num_rows=0)
    total, _ = fused.head_losses(hidden, weight, offset, losses_of, [1.0, 1.0, 0.0], 5, (other,))
    total.backward()
    assert total.item() == 0.0
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_survive_although_the_scaler_comes_later(dtype):
    """Gradients of 1e-9 are far below float16's smallest number (6e-8); scaled by 2^16 afterwards they must be there."""
    hidden, weight, _, _, losses_of = case(torch.float32, bias=False)
    halves = [tensor.detach().to(dtype).requires_grad_() for tensor in (hidden, weight)]
    small = [1e-9 * w for w in WEIGHTS]
    exact = torch.autograd.grad(
        2.0**16 * fused.head_losses(hidden, weight, None, losses_of, small, 7)[0], [hidden, weight]
    )
    total, _ = fused.head_losses(*halves, None, losses_of, small, 7)
    found = torch.autograd.grad(2.0**16 * total, halves)
    for half, full in zip(found, exact, strict=True):
        error = (half.float() - full).norm() / full.norm()
        assert error < (0.01 if dtype == torch.float16 else 0.03)


def test_under_autocast_the_products_run_in_its_precision_and_gradients_stay_float32():
    hidden, weight, _, _, losses_of = case(torch.float32, bias=False)
    exact = torch.autograd.grad(fused.head_losses(hidden, weight, None, losses_of, WEIGHTS, 7)[0], [hidden, weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = fused.head_losses(hidden, weight, None, losses_of, WEIGHTS, 7)
    found = torch.autograd.grad(total, [hidden, weight])
    for half, full in zip(found, exact, strict=True):
        assert half.dtype == torch.float32
        assert 1e-4 < (half - full).norm() / full.norm() < 0.03


def test_nothing_of_the_size_of_all_logits_is_kept():
    """What the graph holds after the forward pass: gradients of the inputs, and no chunk."""
    hidden, weight, _, _, _ = case(torch.float32, num_rows=64, vocabulary=50, bias=False)
    total, _ = fused.head_losses(hidden, weight, None, losses_of_free(50), [1.0], 8)
    kept = [g for g in total.grad_fn.gradients if g is not None]
    assert sorted(tuple(g.shape) for g in kept) == sorted([tuple(hidden.shape), tuple(weight.shape)])
    assert not total.grad_fn.saved_tensors


def losses_of_free(vocabulary):
    def losses_of(logits, _):
        return losses.token_mean(losses.forward_kl(logits, torch.zeros(1, vocabulary)), 64).reshape(1)

    return losses_of
