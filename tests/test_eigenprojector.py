"""Invariants of `eigenprojector` that a comparison with eigenvectors does not reach: exact gradients at repeated
eigenvalues, closed cuts, failed matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from specs.eigh import repeated, separated
from stablekern import _load, available_backends, use_backend
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


@pytest.mark.parametrize("top", [2.0, 3.0])  # a power of two, and far from one
@pytest.mark.parametrize("n", [4, 40])
def test_the_stand_in_is_the_documented_one(n, top):
    """For one pair across the cut, whose eigenvectors are exact: g / (g^2 + d^2) over max|w|, d = 4 n^1/2 eps."""
    width = 4 * n**0.5 * torch.finfo(torch.float64).eps
    pair = torch.zeros(n, n, dtype=torch.float64)
    pair[0, 1] = pair[1, 0] = 1.0
    for gap in (0.0, width / 8, width, 8 * width, 1e3 * width, 0.5):
        w = torch.tensor([1 - gap, 1.0, *[1.5] * (n - 3), 2.0], dtype=torch.float64) * (top / 2)
        relative = (w[1] - w[0]) / top
        expected = -pair * relative / (relative**2 + width**2) / top
        assert expected.abs().max() <= 1 / (2 * width) / top
        if n == 40 and gap < 8 * width:  # rounding turns the eigenvectors of so close a pair of a large matrix
            continue
        exact_to = 1e-12 if n == 4 else 4 * torch.finfo(torch.float64).eps / float(relative)
        actual = gradient(torch.diag(w), 1, pair)
        torch.testing.assert_close(actual, expected, rtol=exact_to, atol=exact_to * float(expected.abs().max()))
        _, at_cut, info = eigenprojector_ex(torch.diag(w), 1)
        torch.testing.assert_close(at_cut, w[1] - w[0], rtol=0, atol=0 if n == 4 else 8 * torch.finfo(w.dtype).eps)
        assert int(info) == (4 if relative <= width else 0)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("n", [8, 40])
def test_the_stand_in_of_half_of_the_vectors(backend, n):
    """As above where the few are many, the largest modulus at the negative end; a diagonal matrix is solved exactly."""
    width, top = 4 * n**0.5 * torch.finfo(torch.float64).eps, 3.0
    k = n // 2
    pair = torch.zeros(n, n, dtype=torch.float64)
    pair[k - 1, k] = pair[k, k - 1] = 1.0
    low, high = torch.linspace(-1, -0.5, k - 1), torch.linspace(0.3, 0.5, n - k - 1)
    for gap in (0.0, width / 8, width / 2, 2 * width, 8 * width, 1e3 * width):
        w = top * torch.cat([low, torch.tensor([0.25 - gap, 0.25], dtype=torch.float64), high])
        relative = (w[k] - w[k - 1]) / top
        expected = -pair * relative / (relative**2 + width**2) / top
        with use_backend(backend):
            actual = gradient(torch.diag(w), k, pair)
            _, at_cut, info = eigenprojector_ex(torch.diag(w), k)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        assert at_cut == w[k] - w[k - 1] and int(info) == (4 if relative <= width else 0)


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


# ---- large matrices, of which only a few eigenvectors are computed --------------------------------------------------

ALL = (*FLOATS, torch.complex64, torch.complex128)


def turned(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A, in a complex dtype D A D^H with a diagonal of phases D: the same spectrum, and no real entries off it."""
    if not dtype.is_complex:
        return A
    phase = torch.polar(torch.ones(len(A), dtype=torch.float64), torch.arange(len(A), dtype=torch.float64) ** 2)
    return phase[:, None] * A * phase.conj()


def glued_wilkinson(copies: int) -> Tensor:
    """Pairs of eigenvalues that agree to many digits, in `copies` copies that nearly do."""
    m = 21
    A = torch.diag((torch.arange(m * copies) % m - m // 2).abs().double())
    joined = torch.ones(m * copies - 1, dtype=torch.float64)
    joined[m - 1 :: m] = 1e-8
    return A + torch.diag(joined, 1) + torch.diag(joined, -1)


def large() -> dict[str, tuple[Tensor, int]]:
    """Matrices with repeated eigenvalues and where to cut them, a third of them at most below or above."""
    n = 48
    found = repeated(n)
    eye = torch.eye(n, dtype=torch.float64)
    blocks = torch.block_diag(eye[:36, :36], 2 * eye[:12, :12])
    graded = torch.diag(10.0 ** -torch.linspace(0, 12, n, dtype=torch.float64)) + 0.25 * found["complete"]
    cuts = {"complete": n - 1, "star": 1, "rank-1": n - 1, "block-copies": 16}
    return {name: (found[name], k) for name, k in cuts.items()} | {
        "one-value": (found["star"] @ found["star"], n - 2),
        "identity-blocks": (blocks, 36),
        "wilkinson": (glued_wilkinson(2), 38),
        "graded": (graded, n - 1),
        "tridiagonal": (torch.diag(torch.ones(n - 1).double(), 1) + torch.diag(torch.ones(n - 1).double(), -1), 5),
    }


def forward(A: Tensor, k: int, largest: bool = False) -> tuple[Tensor, ...]:
    n = A.shape[-1]
    return torch.ops.stablekern.eigenprojector_fwd(A, k, largest, 4 * n**0.5 * torch.finfo(A.dtype).eps)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("name", large())
def test_large_and_exact_at_repeated_eigenvalues(name, dtype):
    A, k = large()[name]
    A, n = turned(A, dtype).to(dtype), len(A)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    w, V = torch.linalg.eigh(A.to(wide))
    G = weight(n, wide)
    exact, P = exact_gradient(A.to(wide), k, G), V[:, :k] @ V[:, :k].mH
    # As in test_exact_at_repeated_eigenvalues.
    bound = 8 * n * torch.finfo(dtype).eps * float(w.abs().max() / (w[k] - w[k - 1]))
    found, gap, info = eigenprojector_ex(A, k)
    assert int(info) == 0
    assert (found - P).abs().max() <= bound and abs(float(gap - (w[k] - w[k - 1]))) <= bound * float(w[k] - w[k - 1])
    for sign in (1, -1):
        actual = gradient(sign * A, k, G.to(dtype), largest=sign < 0)
        assert (sign * actual - exact).abs().max() <= bound * exact.abs().max()
    torch.testing.assert_close(actual, actual.mH, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("name", repeated(3))
def test_large_finite_and_bounded_where_the_cut_is_closed(name, dtype):
    n = 40
    A = turned(repeated(n)[name], dtype).to(dtype)
    w = torch.linalg.eigvalsh(A.to(torch.complex128))
    for k in (0, 1, 2, 5, 12, 20, n - 3, n):
        P, gap, info = eigenprojector_ex(A, k)
        limit = 5 * n * torch.finfo(dtype).eps
        torch.testing.assert_close(P, P.mH, rtol=0, atol=0)
        assert (P @ P - P).abs().max() <= limit and abs(float(P.diagonal().real.sum()) - k) <= n * limit
        assert torch.isfinite(gradient(A, k, weight(n, dtype))).all()
        closed = 0 < k < n and bool(w[k] - w[k - 1] <= limit * w.abs().max())
        assert int(info) == (4 if closed else 0), k


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("power", [-100, 100])
def test_large_at_extreme_scales(dtype, power):
    A = separated(torch.Generator().manual_seed(3), (2,), 44, dtype=dtype if dtype.is_complex else torch.float64)
    A, G = A.to(dtype), weight(44, dtype)
    plain, scaled = eigenprojector_ex(A, 4), eigenprojector_ex(A * 2.0**power, 4)
    torch.testing.assert_close(scaled.projector, plain.projector, rtol=0, atol=0)
    torch.testing.assert_close(scaled.gap * 2.0**-power, plain.gap, rtol=0, atol=0)
    grads = [gradient(A * 2.0**p, 4, G.expand(2, 44, 44)) * 2.0**p for p in (0, power)]
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ALL)
def test_the_backward_of_another_backend(dtype):
    """The native forward leaves large matrices as Q T Q^H; torch's backward takes them too, mixed with failed ones."""
    if (reason := available_backends("eigenprojector")["native"]) is not None:
        pytest.skip(f"no native kernels: {reason}")
    n, k = 40, 4
    A = separated(torch.Generator().manual_seed(4), (3,), n, dtype=dtype if dtype.is_complex else torch.float64)
    A = turned(A.sum(0), dtype).expand(3, n, n).to(dtype).clone()
    A[1, 0, 0] = torch.nan
    G = weight(n, dtype).expand(3, n, n)
    for largest in (False, True):
        with use_backend("native"):
            output = forward(A, k, largest)
            assert output[4].tolist() == [1, 0, 1]
            arguments = *output[2:5], G, k, largest, 4 * n**0.5 * torch.finfo(dtype).eps
            native = torch.ops.stablekern.eigenprojector_bwd(*arguments)
        with use_backend("torch"):
            other = torch.ops.stablekern.eigenprojector_bwd(*arguments)
        assert native[1].isnan().all() and other[1].isnan().all()
        bound = 8 * n * torch.finfo(dtype).eps * float(torch.linalg.norm(A[0], 2) / output[1][0])
        assert (native[::2] - other[::2]).abs().max() <= bound * other[::2].abs().max()


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("dtype", ALL)
def test_large_matrices_whose_vectors_do_not_converge_go_to_lapack(dtype, largest):
    """One round of the iteration is never enough: projector, gap and gradient then come from all eigenvectors."""
    if (reason := available_backends("eigenprojector")["native"]) is not None:
        pytest.skip(f"no native kernels: {reason}")
    n, k, wide = 40, 4, torch.complex128 if dtype.is_complex else torch.float64
    A = separated(torch.Generator().manual_seed(5), (3,), n, dtype=wide)
    A = torch.stack([turned(item, dtype) for item in A]).to(dtype)
    A[1, 2, 0] = torch.nan
    cut = k, largest, 4 * n**0.5 * torch.finfo(dtype).eps
    G = weight(n, dtype).expand(3, n, n)
    outputs = {}
    for rounds in (1, 5):
        outputs[rounds] = [
            torch.full_like(x, torch.nan) if x.is_floating_point() or x.is_complex() else torch.full_like(x, -1)
            for x in forward(A, k, largest)
        ]
        _load.native().eigenprojector_fwd(A, *cut, *outputs[rounds], rounds)
    assert outputs[5][4].tolist() == [1, 0, 1] and outputs[1][4].tolist() == [0, 0, 0]
    mixed = [torch.cat([one[:1], five[1:]]) for one, five in zip(outputs[1], outputs[5], strict=True)]
    bwd = lambda found: torch.ops.stablekern.eigenprojector_bwd(*found[2:5], G, *cut)  # noqa: E731
    with use_backend("native"):
        grads = {rounds: bwd(found) for rounds, found in outputs.items()}
        from_both = bwd(mixed)
    torch.testing.assert_close(from_both[0], grads[1][0], rtol=0, atol=0)
    torch.testing.assert_close(from_both[2], grads[5][2], rtol=0, atol=0)
    P, gap, info = outputs[1][0], outputs[1][1], outputs[1][5]
    assert info.tolist() == [0, 2, 0] and all(x[1].isnan().all() for x in (P, gap, grads[1]))
    for i in (0, 2):
        w, V = torch.linalg.eigh(A[i].to(wide))
        S, at = (V[:, n - k :], n - k) if largest else (V[:, :k], k)
        # As in test_exact_at_repeated_eigenvalues.
        bound = 8 * n * torch.finfo(dtype).eps * float(w.abs().max() / (w[at] - w[at - 1]))
        assert (P[i] - S @ S.mH).abs().max() <= bound
        assert abs(float(gap[i] - (w[at] - w[at - 1]))) <= bound * float(w[at] - w[at - 1])
        exact = exact_gradient(A[i].to(wide) * (-1 if largest else 1), k, G[i].to(wide)) * (-1 if largest else 1)
        assert (grads[1][i] - exact).abs().max() <= bound * exact.abs().max()


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
