"""The matrices and ratios by which LAPACK tests its own symmetric eigensolvers (xDRVST, xCHKST).

Types 1 to 15 are LAPACK's; added are the glued Wilkinson matrix, Hilbert's, rank 1, and the ends of the range.
"""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stablekern import eigenprojector, eigh, eigh_ex, eigvalsh, spectral_function
from stablekern.ops.eigenprojector import eigenprojector_ex

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
SIZES = (1, 2, 3, 5, 8, 16, 19, 31, 32, 33, 64, 100)
THRESHOLD = 50.0  # TESTING/sep.in of LAPACK 3.0 to 3.9; 60 since


def spectra(n: int, ulp: float, g: torch.Generator) -> dict[str, Tensor]:
    """Eigenvalues with random signs, from 1 down to an ulp: evenly spaced, geometric, clustered at the ends."""
    steps = torch.linspace(0, 1, n, dtype=torch.float64) if n > 1 else torch.zeros(1, dtype=torch.float64)
    sign = torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0).double()
    one_large, one_small = torch.full((n,), ulp).double(), torch.ones(n).double()
    one_large[0], one_small[-1] = 1.0, ulp
    return {
        "even": (1 - steps * (1 - ulp)) * sign,
        "geometric": ulp**steps * sign,
        "clustered": one_large * sign,
        "clustered-high": one_small * sign,
        "random-exponents": torch.exp(torch.rand(n, generator=g, dtype=torch.float64) * torch.log(torch.tensor(ulp))),
    }


def glued_wilkinson(n: int) -> Tensor:
    """Copies of the Wilkinson matrix of size 9, or less, joined by 1e-8."""
    size = min(n, 9)
    where = torch.arange(n)
    A = torch.diag((where % size - size // 2).abs().double())
    for i in range(n - 1):
        A[i, i + 1] = A[i + 1, i] = 1e-8 if (i + 1) % size == 0 else 1.0
    return A


def matrices(n: int, dtype: torch.dtype) -> tuple[list[str], Tensor]:
    """Names and (b, n, n), exactly Hermitian, in the dtype."""
    g = torch.Generator().manual_seed(n)
    high = torch.complex128 if dtype.is_complex else torch.float64
    info = torch.finfo(dtype)
    ulp = info.eps
    # The square roots of the ends of the range, as in LAPACK; and a graded matrix over most of it.
    large, small = (info.max * ulp) ** 0.5, (info.tiny / ulp) ** 0.5
    random = torch.rand(n, n, generator=g, dtype=torch.float64) * 2 - 1
    if dtype.is_complex:
        random = torch.complex(random, torch.rand(n, n, generator=g, dtype=torch.float64) * 2 - 1)
    random = random.tril() + random.tril(-1).mH
    random.diagonal().imag.zero_() if dtype.is_complex else None
    column = torch.randn(n, 1, generator=g, dtype=high)
    exponent = 30 if info.bits == 64 else 15
    grading = 10 ** torch.linspace(-exponent, exponent, n, dtype=torch.float64)
    found = {
        "zero": torch.zeros(n, n),
        "identity": torch.eye(n),
        "random": random,
        "random-large": random * large,
        "random-small": random * small,
        "glued-wilkinson": glued_wilkinson(n),
        "hilbert": torch.from_numpy(scipy.linalg.hilbert(n)),
        "rank-1": column @ column.mH,
        "graded": grading.sqrt()[:, None] * random * grading.sqrt(),
        "diagonally-dominant": random + n * torch.eye(n),
        "near-overflow": random * (info.max / (4 * n)),
        "near-underflow": random * (info.tiny * 4),
    }
    for name, w in spectra(n, ulp, g).items():
        Q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=high)).Q
        full = (Q * w.to(high)) @ Q.mH
        found[f"diagonal-{name}"] = torch.diag(w)
        found[f"full-{name}"] = full
        found[f"definite-{name}"] = (Q * w.abs().to(high)) @ Q.mH
        found[f"{name}-large"], found[f"{name}-small"] = full * large, full * small
    batch = torch.stack([A.to(high) for A in found.values()])
    return list(found), ((batch / 2 + batch.mH / 2).to(dtype))


def one_norm(A: Tensor) -> Tensor:
    return A.abs().sum(-2).amax(-1)


def unit_of(A: Tensor) -> Tensor:
    """A power of two near each matrix's norm (1 for 0): ratios are taken of matrices of size about 1, in float64."""
    largest = A.abs().double().amax((-2, -1), keepdim=True)
    return torch.where(largest > 0, largest / torch.frexp(largest).mantissa, 1.0)


def small_norm(A: Tensor, dtype: torch.dtype) -> Tensor:
    """The norm of the scaled matrix, not below what the smallest normal number is of it: a subnormal has fewer bits."""
    floor = torch.finfo(dtype).tiny / torch.finfo(dtype).eps / unit_of(A)[:, 0, 0]
    return torch.maximum(one_norm(high_of(A)), floor)


def high_of(A: Tensor) -> Tensor:
    """A over its unit, in float64 or complex128."""
    wide = A.to(torch.complex128 if A.is_complex() else torch.float64)
    return wide / unit_of(A)


def ratios(A: Tensor) -> dict[str, Tensor]:
    """LAPACK's: the residual, the orthogonality, and eigenvalues with vectors against those without."""
    n, dtype = A.shape[-1], A.dtype
    ulp = torch.finfo(dtype).eps
    w, V, info = eigh_ex(A)
    alone = eigvalsh(A)
    assert not info.any() and (w.diff(dim=-1) >= 0).all() and (alone.diff(dim=-1) >= 0).all()
    scaled, unit = high_of(A), unit_of(A)
    V, w, alone = V.to(scaled.dtype), w.double() / unit[:, 0], alone.double() / unit[:, 0]
    eye = torch.eye(n, dtype=scaled.dtype)
    size = small_norm(A, dtype).clamp_min(torch.finfo(torch.float64).tiny)
    return {
        "residual": one_norm(scaled - (V * w[:, None, :].to(V.dtype)) @ V.mH) / (n * ulp * size),
        "orthogonality": one_norm(eye - V @ V.mH) / (n * ulp),
        "values": (w - alone).abs().amax(-1) / (ulp * torch.maximum(w.abs().amax(-1), size / n)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_lapack_ratios(n, dtype):
    names, A = matrices(n, dtype)
    for label, ratio in ratios(A).items():
        assert (ratio <= THRESHOLD).all(), (label, names[int(ratio.argmax())], float(ratio.max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_projectors_of_lapack_matrices(n, dtype):
    """P = P^H = P^2, tr P = k, and P A = A P, in the same ratios; whether or not the cut is open."""
    names, A = matrices(n, dtype)
    k, ulp = (n + 1) // 2, torch.finfo(dtype).eps
    P, _, info = eigenprojector_ex(A, k)
    assert not (info & 3).any() and torch.equal(P, P.mH)
    wide, scaled = P.to(torch.complex128 if dtype.is_complex else torch.float64), high_of(A)
    size = small_norm(A, dtype).clamp_min(torch.finfo(torch.float64).tiny)
    found = {
        "idempotent": one_norm(wide @ wide - wide) / (n * ulp),
        "trace": (wide.diagonal(dim1=-2, dim2=-1).real.sum(-1) - k).abs() / (n * ulp),
        "commutes": one_norm(wide @ scaled - scaled @ wide) / (n * ulp * size),
    }
    for label, ratio in found.items():
        assert (ratio <= THRESHOLD).all(), (label, names[int(ratio.argmax())], float(ratio.max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", SIZES)
def test_functions_of_lapack_matrices(n, dtype):
    """With f(w) = w: A itself. And exp of each matrix over its norm against scipy's, which uses no eigenvalues."""
    names, A = matrices(n, dtype)
    ulp = torch.finfo(dtype).eps
    again = spectral_function(A, (lambda w: w, torch.ones_like))
    size = small_norm(A, dtype).clamp_min(torch.finfo(torch.float64).tiny)
    ratio = one_norm((again.to(high_of(A).dtype) / unit_of(A)) - high_of(A)) / (n * ulp * size)
    assert (ratio <= THRESHOLD).all(), (names[int(ratio.argmax())], float(ratio.max()))
    scaled = high_of(A)
    exact = torch.linalg.matrix_exp(scaled)
    ratio = one_norm(spectral_function(scaled.to(dtype), "exp").to(scaled.dtype) - exact)
    ratio = ratio / (n * ulp * one_norm(exact) * one_norm(scaled).clamp_min(1))  # the condition of exp is at most |A|
    assert (ratio <= THRESHOLD).all(), (names[int(ratio.argmax())], float(ratio.max()))


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 20),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 30),
    levels=st.integers(1, 40),
    sparsity=st.floats(0, 1),
)
def test_random_hermitian_matrices(n, batch, seed, dtype, exponent, levels, sparsity):
    """Any size, batch, scale, number of different eigenvalues and pattern of zeros; finite gradients of any loss."""
    g = torch.Generator().manual_seed(seed)
    high = torch.complex128 if dtype.is_complex else torch.float64
    Q = torch.linalg.qr(torch.randn(batch, n, n, generator=g, dtype=high)).Q
    w = torch.randint(0, levels, (batch, n), generator=g).double() / levels - 0.5
    A = (Q * w[:, None, :].to(high)) @ Q.mH
    kept = torch.rand(batch, n, n, generator=g) >= sparsity
    A = (A + A.mH) / 2 * (kept & kept.mT)
    A = (A * 10.0**exponent).to(dtype).requires_grad_()
    for label, ratio in ratios(A.detach()).items():
        assert (ratio <= THRESHOLD).all(), (label, float(ratio.max()))
    w, V = eigh(A)
    # The scale of the cotangent follows the matrix's, so that the gradient itself is representable.
    grad_V = torch.randn(V.shape, generator=g, dtype=high) * 10.0**exponent
    assert torch.isfinite(torch.autograd.grad(V, A, grad_V.to(dtype))[0]).all()
    P = eigenprojector(A, n // 2)
    assert torch.isfinite(torch.autograd.grad(P, A, grad_V.to(dtype))[0]).all()


@pytest.mark.parametrize("n", [8, 19])
def test_a_hundredth_of_a_large_batch_is_nan(n):
    """100 000 matrices, one in a hundred with a NaN or an infinity: the others have the same bits, gradients too."""
    count = 100_000
    g = torch.Generator().manual_seed(n)
    A = torch.randn(count, n, n, generator=g)
    A = A + A.mT
    bad = torch.randperm(count, generator=g)[: count // 100]
    spoiled = A.clone()
    place = torch.randint(0, n, (2, len(bad)), generator=g)
    value = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, (len(bad),), generator=g)]
    spoiled[bad, place[0], place[1]] = value
    good = torch.ones(count, dtype=torch.bool)
    good[bad] = False
    grads = torch.randn(count, n, generator=g), torch.randn(count, n, n, generator=g)

    def run(matrices: Tensor) -> tuple[Tensor, ...]:
        matrices.requires_grad_()
        w, V, info = eigh_ex(matrices)
        return (
            w.detach(),
            V.detach(),
            info,
            torch.autograd.grad((w, V), matrices, grads)[0],
            eigvalsh(matrices.detach()),
        )

    clean, found = run(A), run(spoiled)
    for a, b in zip(clean, found, strict=True):
        assert torch.equal(a[good], b[good])
    w, V, info, gradient, alone = found
    assert (info[bad] == 2).all() and not info[good].any()
    for lost in (w, V, gradient, alone):
        assert lost[bad].isnan().all() and torch.isfinite(lost[good]).all()
