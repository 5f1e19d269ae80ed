"""What the native eigh kernels promise below the public function: the same bits wherever a matrix lies in a batch,
every output written, one bad matrix kept to itself, and LAPACK's error bounds on spectra that break eigensolvers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stablekern import _load

FLOATS = (torch.float32, torch.float64)
SIZES = (1, 2, 3, 5, 8, 16, 17, 19, 31, 32)
NOT_CONVERGED, NON_FINITE = 1, 2


@pytest.fixture(scope="module")
def native():
    if (reason := _load.native_reason()) is not None:
        pytest.skip(f"no native kernels: {reason}")
    return _load.native()


@pytest.fixture
def run(native):
    """eigh_fwd into poisoned outputs: eigenvalues, eigenvectors as rows, info."""

    def call(A: Tensor, upper: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        w, rows = A.new_full(A.shape[:2], float("nan")), torch.full_like(A, float("nan"))
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
        native.eigh_bwd(w, rows, grad_w, grad_rows, mode, floor, 16.0, result)
        return result

    return call


def symmetric(batch: int, n: int) -> Tensor:
    A = torch.randn(batch, n, n, dtype=torch.float64)
    return A + A.mT


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal as bits: NaN equals itself, -0 is not +0."""
    integer = {4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def normalized(adjacency: Tensor) -> Tensor:
    scale = adjacency.sum(-1).clamp_min(torch.finfo(adjacency.dtype).tiny).rsqrt()
    return torch.eye(adjacency.shape[-1], dtype=adjacency.dtype) - scale[..., None] * adjacency * scale[..., None, :]


def hard_matrices(n: int, batch: int) -> dict[str, Tensor]:
    """Repeated, clustered, graded, decoupled and wildly scaled spectra, in float64."""
    f64 = torch.float64
    dense, eye, index = symmetric(batch, n), torch.eye(n, dtype=f64), torch.arange(n, dtype=f64)
    weights = torch.rand(batch, n, n, dtype=f64).triu(1)
    weights = weights + weights.mT
    top = weights.topk(min(3, n), -1)
    sparse = torch.zeros_like(weights).scatter(-1, top.indices, top.values)
    pairs, star = torch.zeros(n, n, dtype=f64), torch.zeros(n, n, dtype=f64)
    for i in range(0, n - 1, 2):
        pairs[i, i + 1] = pairs[i + 1, i] = 1
    star[0, 1:] = star[1:, 0] = 1
    vector = torch.randn(batch, n, 1, dtype=f64)
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
    return {name: A.expand(batch, n, n) for name, A in single.items()} | {
        "dense": dense,
        "dense Laplacian": normalized(weights),
        "top-3 Laplacian": normalized(torch.maximum(sparse, sparse.mT)),
        "rank 1": vector @ vector.mT,
        "graded spectrum": (Q * grade) @ Q.mT,
        "graded rows": grade.sqrt()[:, None] * dense * grade.sqrt(),
        "graded rows, reversed": grade.sqrt().flip(0)[:, None] * dense * grade.sqrt().flip(0),
        "clusters": (Q * (1 + index % 3 + grade * 1e-6)) @ Q.mT,
        "equal blocks": twice,
        **{f"scale {scale:g}": dense * scale for scale in (1e-30, 1e-15, 1e15, 1e30)},
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", SIZES)
def test_bounds_on_hard_matrices(native, run, n, dtype):
    """||A V - V diag(w)|| <= 5 n eps ||A||, ||V^T V - I|| <= 5 n eps (Frobenius), eigenvalues like LAPACK's; all
    converge, ascending, gauge fixed; and the values alone are as good."""
    eps = torch.finfo(dtype).eps
    for name, exact in hard_matrices(n, 21).items():
        A = exact.to(dtype)
        A = (A.tril() + A.tril(-1).mT).contiguous()
        w, rows, info = run(A)
        alone, flags = torch.full_like(w, float("nan")), torch.full_like(info, -77777)
        native.eigvalsh_fwd(A, False, alone, flags)
        assert (info == 0).all() and (flags == 0).all(), name
        assert (w.diff() >= 0).all() and (alone.diff() >= 0).all(), name
        A64, w64, V = A.double(), w.double(), rows.mT.double()
        size = torch.linalg.matrix_norm(A64)
        residual = torch.linalg.matrix_norm(A64 @ V - V * w64[:, None])
        defect = torch.linalg.matrix_norm(V.mT @ V - torch.eye(n, dtype=torch.float64))
        assert (residual <= 5 * n * eps * size).all(), (name, (residual / size / eps).max())
        assert (defect <= 5 * n * eps).all(), (name, (defect / eps).max())
        pivot = rows.gather(-1, rows.abs().argmax(-1, keepdim=True))
        assert (pivot > 0).all(), name
        if dtype == torch.float32:  # float64 has no better LAPACK to compare with
            truth = torch.linalg.eigvalsh(A64)
            lapack = (torch.linalg.eigvalsh(A).double() - truth).abs().amax(-1)
            bound = 2 * lapack + 8 * eps * size
            assert ((w64 - truth).abs().amax(-1) <= bound).all(), name
            assert ((alone.double() - truth).abs().amax(-1) <= bound).all(), name


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e200])
def test_any_scale_of_float64(run, scale):
    """Down to subnormal matrices, where only the eigenvectors still have full precision."""
    A = symmetric(9, 19)
    w, rows, info = run(A * scale)
    scaled_back = (A * scale).mul(2.0**600 if scale < 1 else 2.0**-600).mul(2.0**400 if scale < 1 else 1)
    expected, expected_rows, _ = run(scaled_back)
    assert (info == 0).all()
    assert same_bits(rows, expected_rows)
    ulp = torch.finfo(torch.float64).smallest_normal * torch.finfo(torch.float64).eps
    back = expected.div(2.0**600 if scale < 1 else 2.0**-600).div(2.0**400 if scale < 1 else 1)
    torch.testing.assert_close(w, back, rtol=0, atol=ulp)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", SIZES)
def test_same_bits_wherever_a_matrix_lies(run, n, dtype):
    """Batch size, position, neighbours and threads change nothing, not even the sign of a zero."""
    A = torch.cat([A[:9] for A in hard_matrices(n, 9).values()]).to(dtype)
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


@pytest.mark.parametrize("upper", [False, True])
def test_one_triangle_is_read(run, upper):
    A = symmetric(40, 19).float()
    other = torch.full_like(A, 1e30)
    kept = (A.triu() + other.tril(-1)) if upper else (A.tril() + other.triu(1))
    for found, expected in zip(run(kept, upper), run(A, upper), strict=True):
        assert same_bits(found, expected)


@pytest.mark.parametrize("n", [1, 4, 19, 32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_stays_with_its_matrix(native, run, n, value):
    A = symmetric(90, n).float()
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


def test_tied_components_make_the_first_one_positive(run):
    A = torch.tensor([[[0.0, -1.0], [-1.0, 0.0]], [[0.0, 1.0], [1.0, 0.0]]])
    _, rows, _ = run(A)
    sizes = rows.abs()
    assert (rows[sizes[..., 0] >= sizes[..., 1]][..., 0] > 0).all()
    assert (rows.gather(-1, sizes.argmax(-1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("floor", [0.0, 1e-3])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
def test_finite_gradients_at_any_scale(run, run_backward, mode, floor, scale):
    for name, A in hard_matrices(19, 5).items():
        if "scale" in name:
            continue
        w, rows, _ = run((A * scale).float())
        if floor == 0 and scale == 1e-30:
            rows = rows * 1e-20  # without a floor the gradient itself may pass the largest float
        result = run_backward(w, rows, torch.randn_like(w), torch.randn_like(rows), mode, floor)
        assert result.isfinite().all(), name
        assert same_bits(result, result.mT.contiguous()), name


@pytest.mark.parametrize("n", [2, 4, 19])
def test_failed_matrix_keeps_its_gradient_to_itself(run, run_backward, n):
    A = symmetric(70, n)
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
