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
