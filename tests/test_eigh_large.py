"""What the kernels on top of LAPACK promise: the same bits wherever a matrix lies in a batch and for any number of
threads, one bad matrix kept to itself, cotangents of any size, and torch's own path where LAPACK is missing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from test_eigh_native import same_bits
from torch import Tensor

import stablekern
from stablekern import _load, _registry

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


@pytest.fixture(autouse=True)
def native():
    if (reason := _load.native_reason()) is not None:
        pytest.skip(f"no native kernels: {reason}")
    if not _load.native_module().lapack:
        pytest.skip("this torch exports no LAPACK")
    with stablekern.use_backend("native"):
        yield


def hermitian(batch: int, n: int, dtype: torch.dtype) -> Tensor:
    A = torch.randn(batch, n, n, dtype=dtype)
    return A + A.mH


def eigh(A: Tensor) -> tuple[Tensor, ...]:
    return stablekern.eigh(A)


def eigenprojector(A: Tensor) -> tuple[Tensor, ...]:
    return (stablekern.eigenprojector(A, 3),)


def spectral_function(A: Tensor) -> tuple[Tensor, ...]:
    return (stablekern.spectral_function(A / 8, "exp"),)


OPS = (eigh, eigenprojector, spectral_function)


def parts(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


def results(op, A: Tensor, weights: tuple[Tensor, ...] | None = None) -> list[Tensor]:
    """The outputs and the gradient, in real parts."""
    A = A.detach().requires_grad_()
    outputs = op(A)
    if weights is None:
        weights = tuple(torch.ones_like(output) for output in outputs)
    return [parts(output.detach()) for output in outputs] + [parts(torch.autograd.grad(outputs, A, weights)[0])]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_wherever_a_matrix_lies(op, dtype):
    A = hermitian(5, 37, dtype)
    whole = results(op, A)
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        try:
            for piece in (slice(0, 1), slice(1, 4), slice(4, 5), slice(None)):
                for found, expected in zip(results(op, A[piece]), whole, strict=True):
                    assert same_bits(found, expected[piece])
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_matrix_stays_alone(op, dtype):
    A = hermitian(6, 35, dtype)
    clean = results(op, A)
    A[1, 34, 0], A[2, 3, 30], A[5, 7, 7] = torch.nan, torch.inf, -torch.inf  # either triangle and the diagonal
    bad = torch.tensor([False, True, True, False, False, True])
    for found, expected in zip(results(op, A), clean, strict=True):
        assert found[bad].isnan().any(-1).all()  # either part of a complex number
        assert same_bits(found[~bad], expected[~bad])
    info = stablekern.eigh_ex(A).info
    assert torch.equal(info, torch.where(bad, 2, 0).int())
    assert torch.equal(stablekern.eigenprojector_ex(A, 3).info, info)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("UPLO", ["L", "U"])
def test_one_triangle_is_read(dtype, UPLO):
    A = hermitian(3, 40, dtype)
    kept = (A.triu() if UPLO == "U" else A.tril()) + (torch.full_like(A, 7).tril(-1) if UPLO == "U" else 0)
    for found, expected in zip(stablekern.eigh(kept, UPLO), stablekern.eigh(A, UPLO), strict=True):
        assert same_bits(parts(found), parts(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", ["auto", "lorentz", "mask", "raw"])
def test_the_gradient_is_linear_in_the_cotangents_at_any_size(dtype, grad):
    """Squares of cotangents of 2^-100 underflow, and those of 2^100 overflow, in float32."""
    A = hermitian(2, 34, dtype)

    def op(A):
        return stablekern.eigh(A, grad=grad)

    weights = tuple(torch.randn_like(output) for output in op(A))
    *_, plain = results(op, A, weights)
    for power in (-100, 100):
        *_, scaled = results(op, A, tuple(weight * 2.0**power for weight in weights))
        assert same_bits(scaled * 2.0**-power, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_scales(dtype):
    A = hermitian(2, 36, dtype)
    plain = stablekern.eigh(A)
    top = plain.eigenvalues.abs().max()
    for power in (-100, 100):
        w, V = stablekern.eigh(A * 2.0**power)
        eps = torch.finfo(dtype).eps
        assert (w * 2.0**-power - plain.eigenvalues).abs().max() <= 5 * 36 * eps * top
        assert ((A @ V - V * (w * 2.0**-power)[:, None]).abs() <= 5 * 36 * eps * top).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_components_the_first_is_positive(dtype):
    """Pairs of nodes: the vectors are (1, 1) and (1, -1) on a pair, components of one modulus to the last bit."""
    A = torch.zeros(1, 36, 36, dtype=dtype)
    even = torch.arange(0, 36, 2)
    A[0, even, even + 1] = A[0, even + 1, even] = 1 + torch.arange(18).to(dtype)
    V = stablekern.eigh(A).eigenvectors[0]
    largest = V.abs().amax(0)
    tied = (V.abs() == largest).sum(0) > 1
    first = (V.abs() == largest).int().argmax(0)
    assert tied.sum() > 9
    pivot = V[first, torch.arange(36)]
    assert (pivot.real > 0).all() and not (dtype.is_complex and pivot.imag.any())


def test_a_torch_without_lapack_takes_its_own_path(monkeypatch):
    monkeypatch.setattr(_load, "native_module", lambda: SimpleNamespace(lapack=False))
    A = hermitian(2, 33, torch.float32)
    with stablekern.use_backend(None):
        for op, arguments in (("eigh", (False,)), ("eigenprojector", (3, False, 1e-6)), ("spectral_function", (0,))):
            assert _registry.backend_for(op, A, *arguments) == "torch"
            assert _registry.backend_for(op, A[:, :8, :8], *arguments) == "native"
    with pytest.raises(stablekern.errors.BackendUnavailableError, match="this torch exports no LAPACK"):
        stablekern.eigh(A)


def family(name: str, n: int, dtype: torch.dtype) -> Tensor:
    """(3, n, n): spectra that a reduction or QL may stumble over."""
    q = torch.linalg.qr(torch.randn(3, n, n, dtype=dtype)).Q
    if name == "dense":
        return hermitian(3, n, dtype)
    if name == "positive":
        return q @ (torch.linspace(1, n, n).to(dtype)[:, None] * q.mH)
    if name == "two values":
        return q @ ((1 + (torch.arange(n) < n // 2)).to(dtype)[:, None] * q.mH)
    if name == "graded":
        return q @ (torch.logspace(0, -12, n).to(dtype)[:, None] * q.mH)
    if name == "rank one":
        return q[..., :1] @ q[..., :1].mH
    if name == "blocks":
        return torch.block_diag(*[torch.ones(4, 4, dtype=dtype)] * (n // 4)).expand(3, -1, -1).contiguous()
    return {"identity": torch.eye(n, dtype=dtype), "zero": torch.zeros(n, n, dtype=dtype)}[name].repeat(3, 1, 1)


FAMILIES = ("dense", "positive", "two values", "graded", "rank one", "blocks", "identity", "zero")


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("n, UPLO, scale", [(36, "L", 1.0), (144, "U", 1.0), (100, "L", 1e30), (40, "U", 1e-30)])
def test_eigenvalues_alone_are_as_close_as_those_of_lapack(dtype, name, n, UPLO, scale):
    torch.manual_seed(0)
    A = family(name, n, dtype) * scale
    other = A.triu(1) if UPLO == "L" else A.tril(-1)
    A = A - other + 3 * other  # the triangle that is not named is not read
    wide = A.to(torch.complex128 if dtype.is_complex else torch.float64)
    exact, plain = torch.linalg.eigvalsh(wide, UPLO=UPLO), torch.linalg.eigvalsh(A, UPLO=UPLO)
    w = stablekern.eigvalsh(A, UPLO=UPLO)
    floor = 4 * torch.finfo(dtype).eps * exact.abs().amax()
    assert (w.diff(dim=-1) >= 0).all()
    assert (w - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + floor


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_matrix_has_no_eigenvalues_alone(bad):
    A = hermitian(4, 48, torch.float32)
    whole = stablekern.eigvalsh(A)
    A[2, 40, 3] = bad
    w = stablekern.eigvalsh(A)
    assert w[2].isnan().all() and torch.equal(w[[0, 1, 3]], whole[[0, 1, 3]])
    assert torch.equal(stablekern.eigvalsh(A[:2]), whole[:2])


def test_double_precision_is_left_to_lapack():
    A = hermitian(2, 40, torch.float64)
    with pytest.raises(stablekern.errors.BackendUnavailableError, match="n > 32 in double precision"):
        stablekern.eigvalsh(A)
