"""What the native eigh kernels promise below the public function: the same bits wherever a matrix lies in a batch,
every output written, one bad matrix kept to itself, and LAPACK's error bounds on spectra that break eigensolvers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stablekern import _load, numerics

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
DOUBLES = (torch.float64, torch.complex128)
SIZES = (1, 2, 3, 5, 8, 16, 17, 19, 31, 32)
NOT_CONVERGED, NON_FINITE = 1, 2
KAPPA = numerics.EIGH_NOISE_KAPPA.of()


@pytest.fixture(scope="module")
def native():
    if (reason := _load.native_reason()) is not None:
        pytest.skip(f"no native kernels: {reason}")
    return _load.native()


@pytest.fixture
def run(native):
    """eigh_fwd into poisoned outputs: eigenvalues, eigenvectors as rows, info."""

    def call(A: Tensor, upper: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        w, rows = A.real.new_full(A.shape[:2], float("nan")), torch.full_like(A, float("nan"))
        info = torch.full(A.shape[:1], -77777, dtype=torch.int32)
        native.eigh_fwd(A.contiguous(), upper, w, rows, info)
        return w, rows, info

    return call


@pytest.fixture
def run_backward(native):
    def call(
        w: Tensor, rows: Tensor, grad_w: Tensor | None, grad_rows: Tensor | None, mode: int, floor: float
    ) -> Tensor:
        result = torch.full_like(rows, float("nan"))
        native.eigh_bwd(w, rows, grad_w, grad_rows, mode, floor, KAPPA, result)
        return result

    return call


def hermitian(batch: int, n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    A = torch.randn(batch, n, n, dtype=dtype)
    return A + A.mH


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits: NaN equals itself, -0 is not +0."""
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.resolve_conj())
    integer = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def normalized(adjacency: Tensor) -> Tensor:
    scale = adjacency.sum(-1).clamp_min(torch.finfo(adjacency.dtype).tiny).rsqrt()
    return torch.eye(adjacency.shape[-1], dtype=adjacency.dtype) - scale[..., None] * adjacency * scale[..., None, :]


def hard_matrices(n: int, batch: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Repeated, clustered, graded, decoupled and wildly scaled spectra, in float64 or complex128."""
    f64 = torch.float64
    dense, eye, index = hermitian(batch, n, dtype), torch.eye(n, dtype=f64), torch.arange(n, dtype=f64)
    weights = torch.rand(batch, n, n, dtype=f64).triu(1)
    weights = weights + weights.mT
    top = weights.topk(min(3, n), -1)
    sparse = torch.zeros_like(weights).scatter(-1, top.indices, top.values)
    pairs, star = torch.zeros(n, n, dtype=f64), torch.zeros(n, n, dtype=f64)
    for i in range(0, n - 1, 2):
        pairs[i, i + 1] = pairs[i + 1, i] = 1
    star[0, 1:] = star[1:, 0] = 1
    vector = torch.randn(batch, n, 1, dtype=dtype)
    Q = torch.linalg.qr(dense)[0]
    grade = torch.logspace(-6, 0, n, dtype=f64)
    coupling = torch.diag(torch.ones(n - 1, dtype=f64), 1)
    twice = torch.zeros_like(dense)
    half = n // 2
    twice[:, :half, :half] = twice[:, half : 2 * half, half : 2 * half] = dense[:, :half, :half]
    single = {
        "zero": torch.zeros(n, n, dtype=f64),
        "identity": eye,
        "complete graph": normalized(1 - eye),
        "disjoint edges": normalized(pairs),
        "star": normalized(star),
        "Wilkinson": torch.diag((index - (n - 1) / 2).abs()) + coupling + coupling.mT,
    }
    found = {name: A.expand(batch, n, n) for name, A in single.items()} | {
        "dense": dense,
        "dense Laplacian": normalized(weights),
        "top-3 Laplacian": normalized(torch.maximum(sparse, sparse.mT)),
        "rank 1": vector @ vector.mH,
        "graded spectrum": (Q * grade) @ Q.mH,
        "graded rows": grade.sqrt()[:, None] * dense * grade.sqrt(),
        "graded rows, reversed": grade.sqrt().flip(0)[:, None] * dense * grade.sqrt().flip(0),
        "clusters": (Q * (1 + index % 3 + grade * 1e-6)) @ Q.mH,
        "equal blocks": twice,
        "tiny couplings": dense * torch.where(eye > 0, 1.0, 1e-21),
        **{f"scale {scale:g}": dense * scale for scale in (1e-30, 1e-15, 1e15, 1e30)},
    }
    if not dtype.is_complex:
        return found
    phase = torch.exp(2j * torch.pi * torch.rand(n, dtype=f64))
    shift = torch.roll(eye, 1, 0) * (0.3 + 1j)
    circulant = {"circulant": (shift + shift.mH).expand(batch, n, n)}  # all components have the same modulus
    return {name: phase[:, None] * A * phase.conj() for name, A in found.items()} | circulant


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_bounds_on_hard_matrices(native, run, n, dtype):
    """||A V - V diag(w)|| <= 5 n eps ||A||, ||V^H V - I|| <= 5 n eps (Frobenius), eigenvalues like LAPACK's; all
    converge, ascending, gauge fixed; and the values alone are as good."""
    eps = torch.finfo(dtype).eps
    exact_dtype = torch.complex128 if dtype.is_complex else torch.float64
    for name, exact in hard_matrices(n, 21, exact_dtype).items():
        A = exact.to(dtype)
        A = (A.tril() + A.tril(-1).mH).contiguous()
        w, rows, info = run(A)
        alone, flags = torch.full_like(w, float("nan")), torch.full_like(info, -77777)
        native.eigvalsh_fwd(A, False, alone, flags)
        assert (info == 0).all() and (flags == 0).all(), name
        assert (w.diff() >= 0).all() and (alone.diff() >= 0).all(), name
        A64, w64, V = A.to(exact_dtype), w.double(), rows.mT.to(exact_dtype)
        size = torch.linalg.matrix_norm(A64)
        residual = torch.linalg.matrix_norm(A64 @ V - V * w64[:, None])
        defect = torch.linalg.matrix_norm(V.mH @ V - torch.eye(n, dtype=torch.float64))
        assert (residual <= 5 * n * eps * size).all(), (name, (residual / size / eps).max())
        assert (defect <= 5 * n * eps).all(), (name, (defect / eps).max())
        pivot = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        if dtype.is_complex:  # of components of the same modulus any may have been the largest before rounding
            pivot = torch.where(rows.imag == 0, rows.real, 0.0).amax(-1, keepdim=True)
            assert (pivot >= rows.abs().amax(-1, keepdim=True) * (1 - 4 * eps)).all(), name
        assert (pivot > 0).all(), name
        if eps > 1e-10:  # float64 has no better LAPACK to compare with
            truth = torch.linalg.eigvalsh(A64)
            lapack = (torch.linalg.eigvalsh(A).double() - truth).abs().amax(-1)
            bound = 2 * lapack + 8 * eps * size
            assert ((w64 - truth).abs().amax(-1) <= bound).all(), name
            assert ((alone.double() - truth).abs().amax(-1) <= bound).all(), name


@pytest.mark.parametrize("dtype", DOUBLES)
@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e200])
def test_any_scale_of_float64(run, scale, dtype):
    """Down to subnormal matrices, where only the eigenvectors still have full precision."""
    A = hermitian(9, 19, dtype)
    w, rows, info = run(A * scale)
    scaled_back = (A * scale).mul(2.0**600 if scale < 1 else 2.0**-600).mul(2.0**400 if scale < 1 else 1)
    expected, expected_rows, _ = run(scaled_back)
    assert (info == 0).all()
    assert same_bits(rows, expected_rows)
    ulp = torch.finfo(torch.float64).smallest_normal * torch.finfo(torch.float64).eps
    back = expected.div(2.0**600 if scale < 1 else 2.0**-600).div(2.0**400 if scale < 1 else 1)
    torch.testing.assert_close(w, back, rtol=0, atol=ulp)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def test_same_bits_wherever_a_matrix_lies(run, n, dtype):
    """Batch size, position, neighbours and threads change nothing, not even the sign of a zero."""
    kinds = hard_matrices(n, 9, torch.complex128 if dtype.is_complex else torch.float64)
    A = torch.cat(list(kinds.values())).to(dtype)
    A = A[torch.randperm(len(A))].contiguous()
    whole = run(A)
    for piece in (slice(0, 1), slice(5, 6), slice(3, 20), slice(40, 107), slice(1, None), slice(16, 80)):
        for found, expected in zip(run(A[piece]), whole, strict=True):
            assert same_bits(found, expected[piece])
    flipped = run(A.flip(0))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = run(A)
    finally:
        torch.set_num_threads(threads)
    for found, turned, expected in zip(alone, flipped, whole, strict=True):
        assert same_bits(found, expected) and same_bits(turned.flip(0), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("upper", [False, True])
def test_one_triangle_is_read(run, upper, dtype):
    """And of the diagonal its real part."""
    A = hermitian(40, 19, dtype)
    other = torch.full_like(A, 1e30)
    kept = (A.triu() + other.tril(-1)) if upper else (A.tril() + other.triu(1))
    if dtype.is_complex:
        kept = kept + 1e30j * torch.eye(19)
    for found, expected in zip(run(kept, upper), run(A, upper), strict=True):
        assert same_bits(found, expected)


@pytest.mark.parametrize("upper", [False, True])
def test_both_triangles_hold_the_same_matrix(run, upper):
    """A v = w v for the Hermitian matrix that the triangle means, not for its conjugate."""
    A = hermitian(5, 7, torch.complex128)
    w, rows, _ = run(A.triu() if upper else A.tril(), upper)
    torch.testing.assert_close(A @ rows.mT, rows.mT * w[:, None].to(A.dtype), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 4, 19, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), complex(0, float("nan"))])
def test_non_finite_stays_with_its_matrix(native, run, n, value):
    A = hermitian(90, n, torch.complex64 if isinstance(value, complex) else torch.float32)
    clean = run(A)
    bad = torch.zeros(90, dtype=torch.bool)
    bad[[0, 17, 63, 64, 89]] = True
    A[0, 0, 0] = A[17, n - 1, 0] = A[63, 0, n - 1] = A[64, n // 2, n // 2] = A[89, n - 1, n - 1] = value
    w, rows, info = run(A)
    assert torch.equal(info, torch.where(bad, NON_FINITE, 0).int())
    assert w[bad].isnan().all() and rows[bad].isnan().all()
    for found, expected in zip((w, rows), clean, strict=False):
        assert same_bits(found[~bad], expected[~bad])
    alone = torch.empty_like(w)
    native.eigvalsh_fwd(A, False, alone, info.fill_(-77777))
    assert alone[bad].isnan().all() and alone[~bad].isfinite().all()
    assert torch.equal(info, torch.where(bad, NON_FINITE, 0).int())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 19])
def test_no_convergence_stays_with_its_matrix(native, n, dtype):
    """Without any sweep only diagonal matrices are done."""
    A = hermitian(70, n, dtype)
    diagonal = torch.arange(70) % 3 == 0
    A[diagonal] = torch.diag_embed(torch.rand(70, n))[diagonal].to(dtype)
    w, rows = A.real.new_empty(70, n), torch.empty_like(A)
    info = torch.full((70,), -77777, dtype=torch.int32)
    native.eigh_fwd(A, False, w, rows, info, 0)
    assert torch.equal(info, torch.where(diagonal, 0, NOT_CONVERGED).int())
    assert w[~diagonal].isnan().all() and rows[~diagonal].isnan().all()
    assert torch.equal(w[diagonal], A[diagonal].diagonal(dim1=1, dim2=2).real.sort(-1).values)
    assert rows[diagonal].isfinite().all()
    native.eigh_fwd(A, False, w, rows, info)
    assert not info.any() and w.isfinite().all()
    with pytest.raises(RuntimeError, match="sweeps must be 0 to 30"):
        native.eigh_fwd(A, False, w, rows, info, 31)


def test_tied_components_make_the_first_one_positive(run):
    A = torch.tensor([[[0.0, -1.0], [-1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    _, rows, _ = run(A)
    sizes = rows.abs()
    assert (rows[sizes[..., 0] >= sizes[..., 1]][..., 0] > 0).all()
    assert (rows.gather(-1, sizes.argmax(-1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("dtype", DOUBLES)
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_finite_gradients_at_any_scale(run, run_backward, mode, floor, scale, dtype):
    for name, A in hard_matrices(19, 5, dtype).items():
        if "scale" in name:
            continue
        w, rows, _ = run((A * scale).to(torch.complex64 if dtype.is_complex else torch.float32))
        if floor == 0 and scale == 1e-30:
            rows = rows * 1e-20  # without a floor the gradient itself may pass the largest float
        result = run_backward(w, rows, torch.randn_like(w), torch.randn_like(rows), mode, floor)
        assert result.isfinite().all(), name
        assert torch.equal(result, result.mH), name


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_rounding_is_told_from_a_gradient_of_any_size(run, run_backward, size):
    """The noise floor is relative to max|M|, also where squares of M leave the range."""
    for dtype in (torch.float32, torch.complex64):
        w, rows, _ = run(torch.eye(6, dtype=dtype)[None])
        rotated = torch.linalg.qr(torch.randn(1, 6, 6, dtype=dtype))[0].contiguous()
        loss = hermitian(1, 6, dtype) * size
        grad_rows = (loss @ rotated.mT).mT.contiguous()  # M = V^H G V up to rounding
        largest = (rotated.conj() @ grad_rows.mT).abs().max()
        w *= torch.arange(1, 7)
        assert (run_backward(w, rotated, None, grad_rows, 0, 1e-6).abs() == 0).all(), dtype
        skew = torch.randn(1, 6, 6, dtype=dtype) * size
        assert run_backward(w, rotated, None, skew, 0, 1e-6).abs().max() > 1e-3 * largest


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 3, 16, 19, 32])
def test_complex_backward_is_the_definition(run, run_backward, n, mode):
    """Against the formulas of the op's page, written out in complex128 from the same eigenvectors."""
    w, rows, _ = run(hermitian(19, n, torch.complex64))
    grad_w, grad_rows = torch.randn_like(w), torch.randn_like(rows)
    found = run_backward(w, rows, grad_w, grad_rows, mode, 1e-3 if mode < 3 else 0.0)
    w64, V, grad_V = w.double(), rows.mT.to(torch.complex128), grad_rows.mT.to(torch.complex128)
    at = torch.where(V.imag == 0, V.real, 0.0).argmax(-2, keepdim=True)
    turn = (V.conj() * grad_V).sum(-2, keepdim=True).imag
    M = V.mH @ grad_V.scatter_add(-2, at, -1j * turn / V.gather(-2, at))
    gap = (w64[:, None, :] - w64[:, :, None]) + torch.eye(n)
    floor = 1e-3 * w64.abs().amax(-1)[:, None, None]
    inverse = gap / (gap**2 + floor**2) if mode < 2 else 1 / gap
    if mode == 2:
        inverse = torch.where(gap.abs() > floor, inverse, 0.0)
    numerator = M - M.mH
    if mode == 0:
        limit = KAPPA * torch.finfo(torch.float32).eps * M.norm(dim=1).amax(-1)[:, None, None]
        numerator = torch.where(numerator.abs() <= limit, 0.0, numerator)
    S = numerator * inverse / 2
    S.diagonal(dim1=1, dim2=2).copy_(grad_w)
    expected = V @ S @ V.mH
    size = (S.abs().amax((1, 2)) * n)[:, None, None]
    # Rounding of M, n terms, over the gap; of the products; and the phase, an error of M_jj over a pivot >= n^-1/2.
    bound = 5 * n * torch.finfo(torch.float32).eps * (size + n * (1 / gap.abs()).amax((1, 2))[:, None, None])
    assert ((found - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DOUBLES)
@pytest.mark.parametrize("n", [2, 4, 19])
def test_failed_matrix_keeps_its_gradient_to_itself(run, run_backward, n, dtype):
    A = hermitian(70, n, dtype)
    w, rows, _ = run(A)
    grads = torch.randn_like(w), torch.randn_like(rows)
    clean = run_backward(w, rows, *grads, 0, 1e-15)
    w[33] = rows[33] = float("nan")
    bad = torch.arange(70) == 33
    for given in (grads, (grads[0], None), (None, grads[1])):
        found = run_backward(w, rows, *given, 0, 1e-15)
        assert found[bad].isnan().all() and found[~bad].isfinite().all()
        if None not in given:
            assert same_bits(found[~bad], clean[~bad])
    assert same_bits(run_backward(w, rows, None, None, 0, 1e-15), torch.zeros_like(rows))


@pytest.mark.parametrize("shape", [(0, 19), (3, 0), (0, 0)])
def test_empty(run, run_backward, shape):
    batch, n = shape
    w, rows, _ = run(torch.zeros(batch, n, n))
    assert run_backward(w, rows, w, rows, 0, 0.0).shape == (batch, n, n)
