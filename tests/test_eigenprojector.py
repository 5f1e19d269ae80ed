"""Invariants of `eigenprojector` that a comparison with eigenvectors does not reach: exact gradients at repeated
eigenvalues, closed cuts, failed matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specs.eigh import repeated, separated
from stablekern.ops.eigenprojector import eigenprojector, eigenprojector_ex

FLOATS = (torch.float32, torch.float64)


def contour(A: Tensor, low: float, high: float, nodes: int = 400) -> Tensor:
    """The projector on the eigenvalues between `low` and `high`: the resolvent, integrated round a circle."""
    angle = 2 * math.pi * (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    turn = torch.polar(torch.ones_like(angle), angle)[:, None, None]
    radius = (high - low) / 2
    eye = torch.eye(A.shape[-1], dtype=torch.complex128)
    P = (radius * turn * torch.linalg.inv(((low + high) / 2 + radius * turn) * eye - A)).mean(0)
    return P if A.is_complex() else P.real


def weight(n: int, dtype=torch.float64) -> Tensor:
    return torch.randn(n, n, dtype=dtype)


def gradient(A: Tensor, k: int, G: Tensor, **options) -> Tensor:
    A = A.detach().requires_grad_()
    return torch.autograd.grad(eigenprojector(A, k, **options), A, G)[0]


def exact_gradient(A: Tensor, k: int, G: Tensor) -> Tensor:
    w = torch.linalg.eigvalsh(A.detach())
    middle = float(w[k - 1] + w[k]) / 2
    A = A.detach().requires_grad_()
    grad = torch.autograd.grad(contour(A, float(w[0]) - (middle - float(w[k - 1])), middle), A, G)[0]
    return (grad + grad.mH) / 2


def complete_graph() -> Tensor:
    """The normalised Laplacian of K19: eigenvalues 0 once and 19/18 eighteen times."""
    return (19 * torch.eye(19, dtype=torch.float64) - torch.ones(19, 19, dtype=torch.float64)) / 18


DEGENERATE = {
    "complete-graph": (complete_graph(), 1),
    "star": (repeated(19)["star"], 1),
    "disjoint-edges": (repeated(19)["disjoint-edges"], 9),
    "rank-1": (repeated(19)["rank-1"], 18),
    "block-copies": (repeated(18)["block-copies"], 6),
    "identity-blocks": (torch.block_diag(torch.eye(12), 2 * torch.eye(7)).double(), 12),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", DEGENERATE)
def test_exact_at_repeated_eigenvalues(name, dtype):
    A, k = DEGENERATE[name]
    n = A.shape[-1]
    w = torch.linalg.eigvalsh(A)
    G = weight(n)
    actual = gradient(A.to(dtype), k, G.to(dtype)).double()
    exact = exact_gradient(A, k, G)
    # Rounding of n-term products, and of the gap and the subspaces by the conditioning of the cut.
    bound = 8 * n * torch.finfo(dtype).eps * float(w.abs().max() / (w[k] - w[k - 1]))
    assert (actual - exact).abs().max() <= bound * exact.abs().max()
    other = gradient(-A.to(dtype), k, G.to(dtype), largest=True).double()
    assert (other + exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("name", ["complete-graph", "identity-blocks", "complex-copies"])
def test_gradcheck_at_repeated_eigenvalues(name):
    """Finite differences at size 19, and for two copies of a complex matrix (smaller ones: the spec's samples)."""
    if name == "complex-copies":
        block = separated(torch.Generator().manual_seed(3), (), 3, dtype=torch.complex128)
        A, k = torch.block_diag(block, block), 2
    else:
        A, k = DEGENERATE[name]
    A = A.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda A: eigenprojector((A + A.mH) / 2, k), A, fast_mode=name != "complex-copies")


@pytest.mark.parametrize("dtype", (torch.complex64, torch.complex128))
def test_exact_at_a_degenerate_noise_floor(dtype):
    """A few sources over a floor of equal eigenvalues, complex: the noise projector of direction finding."""
    n, sources = 48, 3
    a = torch.randn(n, sources, dtype=torch.complex128)
    R = a @ a.mH / n + 0.5 * torch.eye(n)
    G = weight(n, torch.complex128)
    exact = exact_gradient(R, n - sources, G)
    actual = gradient(R.to(dtype), n - sources, G.to(dtype)).to(torch.complex128)
    w = torch.linalg.eigvalsh(R)
    bound = 8 * n * torch.finfo(dtype).eps * float(w[-1] / (w[n - sources] - w[n - sources - 1]))
    assert (actual - exact).abs().max() <= bound * exact.abs().max()
    torch.testing.assert_close(actual, actual.mH)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", repeated(3))
def test_finite_and_bounded_where_the_cut_is_closed(name, dtype):
    n = 19
    A = repeated(n)[name].to(dtype)
    for k in range(n + 1):
        P, gap, info = eigenprojector_ex(A, k)
        assert torch.isfinite(P).all()
        torch.testing.assert_close(P, P.mT, rtol=0, atol=0)
        limit = 5 * n * torch.finfo(dtype).eps
        assert (P @ P - P).abs().max() <= limit and abs(float(P.trace()) - k) <= n * limit
        grad = gradient(A, k, weight(n, dtype))
        assert torch.isfinite(grad).all()
        w = torch.linalg.eigvalsh(A.double())
        closed = 0 < k < n and bool(w[k] - w[k - 1] <= limit * w.abs().max())
        assert int(info) == (4 if closed else 0), k
        if k in (0, n):
            assert gap == torch.inf and not grad.any()
        else:
            torch.testing.assert_close(gap.double(), w[k] - w[k - 1], rtol=0, atol=limit)


def test_the_stand_in_is_the_documented_one():
    """For one pair across the cut, whose eigenvectors are exact: g / (g^2 + d^2) over max|w|, d = 4 n^1/2 eps."""
    n = 4
    width = 4 * n**0.5 * torch.finfo(torch.float64).eps
    pair = torch.zeros(n, n, dtype=torch.float64)
    pair[0, 1] = pair[1, 0] = 1.0
    for gap in (0.0, width / 8, width, 8 * width, 1e3 * width, 0.5):
        w = torch.tensor([1 - gap, 1.0, 1.5, 2.0], dtype=torch.float64)
        relative = (w[1] - w[0]) / 2
        expected = -pair * relative / (relative**2 + width**2) / 2
        assert expected.abs().max() <= 1 / (2 * width) / 2
        torch.testing.assert_close(gradient(torch.diag(w), 1, pair), expected, rtol=1e-12, atol=0)
        _, at_cut, info = eigenprojector_ex(torch.diag(w), 1)
        assert at_cut == w[1] - w[0] and int(info) == (4 if relative <= width else 0)


def test_a_failed_matrix_stays_alone():
    A = separated(torch.Generator().manual_seed(1), (4,), 5).requires_grad_()
    broken = A.detach().clone()
    broken[1, 2, 0], broken[2, 0, 3] = torch.nan, torch.inf
    broken.requires_grad_()
    P, gap, info = eigenprojector_ex(broken, 2)
    assert info.tolist() == [0, 2, 2, 0]
    assert P[1:3].isnan().all() and gap[1:3].isnan().all()
    good = torch.tensor([0, 3])
    torch.testing.assert_close(P[good], eigenprojector(A, 2)[good], rtol=0, atol=0)
    G = weight(5)
    grad = torch.autograd.grad((P[good] * G).sum(), broken, retain_graph=True)[0]
    assert torch.isfinite(grad).all() and not grad[1:3].any()
    assert torch.autograd.grad(P, broken, G.expand(4, 5, 5))[0][1:3].isnan().all()
    for k in (0, 5):
        assert eigenprojector(broken, k)[1:3].isnan().all()


def test_half_precision_and_no_columns():
    A = torch.eye(3, dtype=torch.float16).requires_grad_()
    P = eigenprojector(A, 1)
    assert P.dtype == torch.float32
    assert torch.autograd.grad(P.sum(), A)[0].dtype == torch.float16
    assert eigenprojector(torch.zeros(2, 0, 0), 0).shape == (2, 0, 0)
    assert eigenprojector_ex(torch.zeros(2, 0, 0), 0).gap.tolist() == [torch.inf] * 2


def test_extreme_scales():
    """Gradients scale as 1/|A| and nothing over- or underflows on the way."""
    A = separated(torch.Generator().manual_seed(2), (), 6).float()
    G = weight(6).float()
    plain = gradient(A, 2, G)
    for power in (-100, 100):
        scaled = gradient(A * 2.0**power, 2, G)
        torch.testing.assert_close(scaled * 2.0**power, plain, rtol=1e-5, atol=0)
