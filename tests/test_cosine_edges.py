"""Invariants of `cosine_edges` that a comparison with the reference does not state."""

from __future__ import annotations

import pytest
import torch

from stablekern import _registry, use_backend
from stablekern.errors import BackendUnavailableError
from stablekern.numerics import COSINE_EPS, COSINE_GRAD_FLOOR
from stablekern.ops.cosine_edges import cosine_edges

PAIRS = torch.triu_indices(6, 6, 1)


@pytest.fixture(params=list(_registry._launchers["cosine_edges_fwd"]["cpu"]), autouse=True)
def backend(request):
    """Every test on every backend of the op."""
    with use_backend(request.param):
        try:
            cosine_edges(torch.zeros(1, 2, 1, 1))
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))
        yield request.param


def vectors(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def gradient(x: torch.Tensor, weights: torch.Tensor, **options) -> torch.Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(cosine_edges(x, **options), x, weights)[0]


@pytest.mark.parametrize("metric", ["cosine", "correlation"])
@pytest.mark.parametrize("floor", [COSINE_GRAD_FLOOR.value, 0.25])
def test_gradient_of_a_pair_is_bounded(metric, floor):
    """|ds_ij/dx_i| <= 1/grad_floor for norms from 1e-12 to 1, where the derivative itself reaches 1e6."""
    x = vectors(1, 2, 60, 8) * torch.logspace(-12, 0, 60).view(1, 1, 60, 1)
    sizes = torch.linalg.vector_norm(gradient(x, torch.ones(1, 1, 60), metric=metric, grad_floor=floor), dim=-1)
    assert sizes.max() <= (1 + 1e-6) / floor
    assert sizes.max() > 0.3 / floor
    without = torch.linalg.vector_norm(gradient(x, torch.ones(1, 1, 60), metric=metric, grad_floor=0.0), dim=-1)
    assert without.max() > 0.1 / COSINE_EPS.value


@pytest.mark.parametrize("metric", ["cosine", "correlation"])
def test_zero_vectors_have_no_direction(metric):
    x = vectors(1, 6, 3, 5)
    x[0, 2, 1] = 0.0
    touched = (PAIRS == 2).any(0)
    s = cosine_edges(x, metric=metric)
    assert (s[0, touched, 1] == 0).all() and (s[0, ~touched] != 0).all()
    only_its_pairs = torch.zeros_like(s)
    only_its_pairs[0, touched, 1] = 1.0
    assert (gradient(x, only_its_pairs, metric=metric) == 0).all()
    assert (gradient(x, torch.ones_like(s), metric=metric)[0, [0, 1, 3, 4, 5], 1] != 0).all()


@pytest.mark.parametrize("dead", [0.1, 100.3, 3e7, 2e38])
def test_constant_vectors_do_not_correlate(dead):
    """Rounding of the mean is no signal, however far above eps it lies."""
    x = vectors(1, 6, 40, 77)
    x[0, 1], x[0, 4] = dead * torch.rand(40, 1), -dead * torch.rand(40, 1)
    s = cosine_edges(x, metric="correlation")
    both = ((PAIRS == 1) | (PAIRS == 4)).all(0)
    limit = 1e-3 if dead < 1e30 else 1.0
    assert s[0, both].abs().max() <= limit and torch.isfinite(s).all()


def test_parallel_vectors_stay_in_range_and_keep_their_gradient():
    """Many float32 cosines of nearly parallel vectors round to 1 or above: their gradient is still the derivative."""
    x = vectors(1, 1, 500, 16).expand(1, 6, 500, 16) + 1e-4 * vectors(1, 6, 500, 16)
    s = cosine_edges(x)
    assert s.max() == 1.0
    sign = torch.where(torch.arange(6) % 2 == 0, 1.0, -1.0).view(1, 6, 1, 1)
    assert cosine_edges(sign * x).min() == -1.0
    weights = vectors(1, 15, 500) * (s == 1.0)
    exact = gradient(x.double(), weights.double())
    # The tangent part is of size 1e-4: the rounding of unit vectors shows in it as 1e-7.
    torch.testing.assert_close(gradient(x, weights), exact.float(), rtol=0, atol=4e-6)
    assert exact.abs().max() > 1e-4


@pytest.mark.parametrize("metric", ["cosine", "correlation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_of_two_change_nothing(metric, dtype):
    """Rescaling single vectors over the range of the dtype gives the same bits, and the gradient scaled inversely."""
    x, weights = vectors(2, 6, 40, 16, dtype=dtype), vectors(2, 15, 40, dtype=dtype)
    reach = 120 if dtype == torch.float32 else 1000
    options = {"metric": metric, "eps": torch.finfo(dtype).tiny, "grad_floor": 0.0}
    factor = 2.0 ** torch.tensor([reach, -reach, 0, reach // 2, -reach // 2, 1], dtype=dtype).view(1, 6, 1, 1)
    assert torch.equal(cosine_edges(x * factor, **options), cosine_edges(x, **options))
    moderate = factor.sqrt()
    torch.testing.assert_close(gradient(x * moderate, weights, **options) * moderate, gradient(x, weights, **options))


def test_largest_numbers_do_not_overflow():
    """The norm itself may exceed the largest float32."""
    x = torch.full((1, 3, 16, 64), 3e38)
    x[0, 1, :, 32:] *= -1
    x[0, 2] = 1.0
    expected = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1).expand(1, 3, 16)
    torch.testing.assert_close(cosine_edges(x), expected, rtol=0, atol=1e-6)
    assert torch.isfinite(gradient(x, torch.ones(1, 3, 16))).all()


@pytest.mark.parametrize("metric", ["cosine", "correlation"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_spoils_its_pairs_only(metric, bad):
    x = vectors(2, 6, 20, 40)
    broken = x.clone()
    broken[1, 3, 13, 2] = bad
    s, t = cosine_edges(x, metric=metric), cosine_edges(broken, metric=metric)
    hit = torch.zeros_like(s, dtype=torch.bool)
    hit[1, (PAIRS == 3).any(0), 13] = True
    assert torch.isnan(t[hit]).all()
    assert torch.equal(t[~hit], s[~hit])

    weights = vectors(2, 15, 20)
    masked = torch.where(hit, 0.0, weights)
    broken.requires_grad_()
    (masked_grad,) = torch.autograd.grad(torch.where(hit, 0.0, cosine_edges(broken, metric=metric)), broken, weights)
    expected = gradient(x, masked, metric=metric)
    expected[1, 3, 13] = 0.0
    assert torch.isfinite(masked_grad).all()
    torch.testing.assert_close(masked_grad, expected)

    spread = torch.isnan(gradient(broken, weights, metric=metric))
    assert spread[1, :, 13].all() and spread.sum() == spread[1, :, 13].numel()


def test_autocast_does_not_lower_the_precision():
    x = vectors(1, 6, 4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = cosine_edges(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, cosine_edges(x))


def test_only_the_needed_gradient_of_half_precision_is_rounded():
    """bfloat16 in and out, float32 between: values within half an ulp of the exact ones of the rounded input."""
    x = vectors(1, 6, 9, 33, dtype=torch.bfloat16)
    exact = cosine_edges(x.double())
    torch.testing.assert_close(cosine_edges(x), exact.to(torch.bfloat16), rtol=2**-8, atol=1e-6)
