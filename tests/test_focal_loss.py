"""Focal loss: the limits at infinite logits, and what its backward allocates."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stablekern import focal_loss, use_backend

INF = math.inf


@pytest.fixture(autouse=True, params=["native", "torch", "triton"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha, pos_weight", [(0.25, 1.5), (0.0, 1.0), (1.0, 1.0), (0.5, 0.0)])
@pytest.mark.parametrize("copies", [1, 17])  # of a few numbers, and of several vectors with a rest
def test_infinite_logits(alpha, pos_weight, gamma, copies):
    """The loss of a wrong infinite logit is infinite unless its weight is 0; every gradient is finite."""
    logits = torch.tensor([INF, -INF, INF, -INF]).repeat(copies).requires_grad_()
    targets = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(copies)
    loss = focal_loss(logits, targets, alpha=alpha, gamma=gamma, pos_weight=pos_weight)
    loss.backward(torch.ones_like(loss))
    positive, negative = pos_weight * alpha, 1 - alpha
    right = [0.0, INF if positive else 0.0, INF if negative else 0.0, 0.0]
    torch.testing.assert_close(loss, torch.tensor(right).repeat(copies), rtol=0, atol=0)
    slopes = torch.tensor([0.0, -positive, negative, 0.0]).repeat(copies)
    torch.testing.assert_close(logits.grad, slopes, rtol=1e-6, atol=0)


def test_nan_stays_in_its_place():
    """A NaN among the logits or the targets is one in the loss and the gradient there, and nowhere else."""
    logits, targets = torch.linspace(-5.0, 5.0, 70), torch.arange(70).remainder(2).float()
    logits[[3, 40]], targets[[20, 69]] = math.nan, math.nan
    logits.requires_grad_()
    loss = focal_loss(logits, targets)
    loss.backward(torch.ones_like(loss))
    expected = torch.zeros(70, dtype=torch.bool).index_fill_(0, torch.tensor([3, 20, 40, 69]), True)
    assert torch.equal(loss.isnan(), expected) and torch.equal(logits.grad.isnan(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("learned_targets", [False, True])
def test_large_results_are_those_of_their_pieces(learned_targets, dtype, backend):
    """Above the size from which results go past the caches, in many pieces of work, with a rest at the end."""
    if backend != "native":
        pytest.skip("the size of a tensor decides nothing here")
    n, generator = 2**19 + 8191, torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(n, generator=generator, dtype=dtype)).requires_grad_()
    targets = torch.rand(n, generator=generator, dtype=dtype).round().requires_grad_(learned_targets)
    weight = torch.randn(n, generator=generator, dtype=dtype)
    inputs = (logits, targets) if learned_targets else (logits,)

    def results(part: slice) -> list[torch.Tensor]:
        loss = focal_loss(logits[part], targets[part], gamma=1.5, pos_weight=3.0)
        return [loss.detach(), *torch.autograd.grad(loss, inputs, weight[part])]

    whole, cuts = results(slice(None)), range(0, n, 50_000)
    for i, found in enumerate(whole):
        pieces = [results(slice(cut, cut + 50_000))[i] for cut in cuts]
        expected = torch.cat(pieces) if i == 0 else torch.stack(pieces).sum(0)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for reduction, factor in (("mean", 1 / n), ("sum", 1.0)):
        total = focal_loss(logits, targets, gamma=1.5, pos_weight=3.0, reduction=reduction)
        # Strips of 32 numbers to a lane are added up in the dtype, all else in float64.
        expected = factor * whole[0].double().sum()
        torch.testing.assert_close(total.double(), expected, rtol=32 * torch.finfo(dtype).eps, atol=0)
        ones = torch.autograd.grad(focal_loss(logits, targets, gamma=1.5, pos_weight=3.0).sum(), inputs)
        for scale in (1.0, -3.0):  # ready when the backward starts, or one product away
            found = torch.autograd.grad(scale * total, inputs, retain_graph=True)
            for one, other in zip(found, ones, strict=True):
                torch.testing.assert_close(one, factor * scale * other, rtol=2 * torch.finfo(dtype).eps, atol=0)


class _Zeros(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "zeros" in str(function):
            self.sizes.append(result.numel())
        return result


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_backward_makes_no_zeros(reduction):
    """The derivatives leave the forward with the loss; as outputs they would get gradients of zeros of their size."""
    logits = torch.randn(100, requires_grad=True)
    loss = focal_loss(logits, torch.ones(100), reduction=reduction)
    with _Zeros() as seen:
        (grad,) = torch.autograd.grad(loss, logits, torch.full_like(loss, 2.0))
    assert seen.sizes == [] and bool(grad.isfinite().all())
