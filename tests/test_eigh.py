"""Invariants of `eigh` and `eigvalsh` that the suite's comparison with LAPACK does not reach: repeated eigenvalues,
failed matrices, extreme scales, and what the backward modes promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import stablekern
from specs.eigh import repeated, separated
from stablekern.ops import eigh as spine
from stablekern.ops.eigh import eigh, eigh_ex, eigvalsh

BACKENDS = ("native", "torch")
FINITE_MODES = ("auto", "lorentz", "mask")
FLOATS = (torch.float32, torch.float64)


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each CPU backend in turn; one that is missing here is a skip that says why."""
    reason = stablekern._registry._missing("eigh_fwd", request.param, "cpu")
    if reason is not None:
        pytest.skip(reason)
    with stablekern.use_backend(request.param):
        yield request.param


def random(*shape: int, dtype=torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def symmetric(*shape: int, dtype=torch.float64) -> Tensor:
    A = random(*shape, dtype=dtype)
    return (A + A.mH) / 2


def gradients(A: Tensor, weights: tuple[Tensor, Tensor], **options) -> Tensor:
    """The gradient of A of a fixed linear loss of eigenvalues and eigenvectors."""
    A = A.detach().requires_grad_()
    return torch.autograd.grad(tuple(eigh(A, **options)), A, weights)[0]


def hard_matrices(n: int, dtype: torch.dtype) -> Tensor:
    """Repeated, clustered, graded and wildly scaled spectra."""
    found = list(repeated(n).values())
    Q = torch.linalg.qr(random(n, n))[0]
    exponents = torch.linspace(-12, 0, n, dtype=torch.float64)
    found += [symmetric(n, n), (Q * 10**exponents) @ Q.mT, (Q * (1 + 10**exponents)) @ Q.mT]
    coupling = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    wilkinson = torch.diag((torch.arange(n, dtype=torch.float64) - n // 2).abs()) + coupling + coupling.mT
    found += [wilkinson, 1e-30 * wilkinson, 1e30 * wilkinson]
    return torch.stack(found).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [2, 3, 7, 16, 19, 32])
def test_residual_and_orthogonality(backend, n, dtype):
    """||A V - V diag(w)|| <= 5 n eps ||A|| and ||V^T V - I|| <= 5 n eps, ascending, whatever the spectrum."""
    A = hard_matrices(n, dtype)
    w, V, info = eigh_ex(A)
    assert not info.any()
    assert (w.diff(dim=-1) >= 0).all()
    A, w, V = A.double(), w.double(), V.double()
    bound = 5 * n * torch.finfo(dtype).eps
    norm = torch.linalg.matrix_norm(A, 2)
    residual = torch.linalg.matrix_norm(A @ V - V * w[:, None, :], 2)
    assert (residual <= bound * norm).all(), residual / norm
    assert (torch.linalg.matrix_norm(V.mT @ V - torch.eye(n, dtype=V.dtype), 2) <= bound).all()
    exact = torch.linalg.eigvalsh(A)
    assert ((w - exact).abs().amax(-1) <= bound * norm).all()
    assert ((eigvalsh(A.to(dtype)).double() - exact).abs().amax(-1) <= bound * norm).all()


@pytest.mark.parametrize("grad", FINITE_MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [3, 19, 32])
def test_gradients_are_finite_at_repeated_eigenvalues(backend, n, dtype, grad):
    """For any loss, in both precisions; with the same matrices torch's are not."""
    A = torch.stack(list(repeated(n).values())).to(dtype)
    weights = random(len(A), n, dtype=dtype), random(len(A), n, n, dtype=dtype)
    found = gradients(A, weights, grad=grad)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found, found.mT, rtol=0, atol=0)
    assert not torch.isfinite(gradients(A, weights, grad="raw")).all()


def test_torch_is_not_finite_there():
    """What the op is for: the derivative of torch.linalg.eigh at the same matrices."""
    A = torch.stack(list(repeated(19).values())).requires_grad_()
    found = torch.autograd.grad(torch.linalg.eigh(A).eigenvectors, A, random(*A.shape))[0]
    assert not torch.isfinite(found[0]).all()


def projector_case(n: int, inner_gap: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """A with a cluster of three lowest eigenvalues and one of two above, a loss tr(G P_3), its exact gradient.

    P_3 projects on the lowest three; only pairs across the cut move it: 2 sum_{i in, j out} (v_i^T G v_j)/(w_i - w_j).
    """
    Q = torch.linalg.qr(random(n, n))[0]
    steps = inner_gap * torch.arange(3, dtype=torch.float64)
    w = torch.cat([steps - 1, steps[:2], torch.linspace(0.3, 1, n - 5, dtype=torch.float64)])
    A = (Q * w) @ Q.mT
    A = ((A + A.mT) / 2).to(dtype)
    G = symmetric(n, n)
    across = torch.zeros(n, n, dtype=torch.float64)
    across[:3, 3:] = 1 / (w[:3, None] - w[None, 3:])
    pairs = across * (Q.mT @ G @ Q)
    return A, G.to(dtype), Q @ (pairs + pairs.mT) @ Q.mT


@pytest.mark.parametrize("grad", FINITE_MODES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inner_gap", [0.0, 1e-5])
def test_projector_gradient_is_that_across_the_cut(backend, inner_gap, dtype, grad):
    n = 19
    A, G, exact = projector_case(n, inner_gap, dtype)
    A.requires_grad_()
    V = eigh(A, grad=grad).eigenvectors[:, :3]
    found = torch.autograd.grad((G * (V @ V.mT)).sum(), A)[0]
    scale = exact.abs().max()
    # Rounding: 5 n eps in V over a gap of 1. The Lorentzian adds (1e-3 / gap)^2. `mask` divides the rounding of a
    # pair by a gap that it does not see as 0.
    bound = 5 * n * torch.finfo(dtype).eps
    bound += 1e-6 if grad == "lorentz" else 0.0
    if grad == "mask" and inner_gap:
        bound += bound / inner_gap
    assert ((found.double() - exact).abs().max() <= bound * scale).item()


@pytest.mark.parametrize("grad", FINITE_MODES)
def test_rotation_inside_a_cluster_changes_nothing(backend, grad):
    """The backward takes any basis of the repeated eigenvalue: those are all right eigenvectors."""
    n, dtype = 19, torch.float32
    A, G, _ = projector_case(n, 0.0, torch.float64)
    w, V = torch.linalg.eigh(A)
    w[:3], w[3:5] = w[:3].mean(), w[3:5].mean()
    turn = torch.eye(n, dtype=torch.float64)
    turn[:3, :3], turn[3:5, 3:5] = torch.linalg.qr(random(3, 3))[0], torch.linalg.qr(random(2, 2))[0]
    results = []
    for vectors in (V, V @ turn):
        grad_vectors = torch.zeros_like(vectors)
        grad_vectors[:, :3] = 2 * G @ vectors[:, :3]
        mode, floor = spine.gap_rule("eigh", grad, None, dtype)
        rows, grad_rows = (x.mT.contiguous().to(dtype)[None] for x in (vectors, grad_vectors))
        results.append(spine.backward_of(w.to(dtype)[None], rows, None, grad_rows, mode, floor))
    torch.testing.assert_close(*results, rtol=0, atol=1e-5 * results[0].abs().max().item())


def pairs_at_the_limits(n: int, dtype: torch.dtype, floor: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues with gaps at, above and far below the floor, the largest modulus at the negative end; and M whose
    longest column has the length 5 exactly (its longest row is longer, its largest entry smaller), with differences
    M_ij - conj(M_ji) below, above and between such limits."""
    eps = torch.finfo(dtype).eps
    width = 3 * floor
    w = torch.linspace(2.1, 2.9, n, dtype=torch.float64)
    low = [-3, -3 + width, -3 + 2 * width + 2**-10, 0.25, 0.5, 0.5 + eps / 2, 0.625, 2]
    w[:8] = torch.tensor(low, dtype=torch.float64)
    M = torch.zeros(n, n, dtype=torch.complex128)
    M[0, 0], M[1, 0], M[0, 1] = 3, 4, -4
    M[2, 3] = M[2, 6] = M[2, 7] = 4
    M[1, 2], M[4, 5] = 1, 0.5
    limit = 8 * eps * 5
    M[4, 7], M[3, 7], M[3, 6] = limit * (1 - 2**-6), limit * (1 + 2**-6), limit * 0.9
    if dtype.is_complex:
        M *= torch.where(torch.eye(n) == 1, 1, 0.6 - 0.8j)
        M[1, 1] = 2 + 1j  # its imaginary part is the phase of the vector, which the gauge fixes
    return w, M


@pytest.mark.parametrize("values_too", [False, True])
@pytest.mark.parametrize("grad", spine._MODES)
@pytest.mark.parametrize("n", [8, 40])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128])
def test_the_rule_of_each_pair_at_its_limits(backend, dtype, n, grad, values_too):
    """With V = I the gradient is S itself: every entry by the formulas of the module's text, to a few ulp."""
    floor, eps = 2.0**-4, torch.finfo(dtype).eps
    w, M = pairs_at_the_limits(n, dtype, floor)
    grad_w = torch.arange(1, n + 1, dtype=torch.float64)
    real, rows = dtype.to_real(), torch.eye(n, dtype=dtype)[None]
    M_in = M.to(dtype) if dtype.is_complex else M.real.to(dtype)
    mode = spine._MODES.index(grad)
    given = grad_w.to(real)[None] if values_too else None
    found = spine.backward_of(w.to(real)[None], rows, given, M_in.mT.contiguous()[None], mode, floor)[0]
    M = M_in.to(M.dtype)
    expected = torch.diag(grad_w * values_too).to(M.dtype)
    for i in range(n):
        for j in range(n):
            difference, gap = complex(M[i, j] - M[j, i].conj()), float(w[j] - w[i])
            if i == j or difference == 0 or (grad == "auto" and abs(difference) <= 8 * eps * 5):
                continue
            lorentzian = gap / (gap**2 + (floor * 3) ** 2)
            inverse = {"mask": 1 / gap if abs(gap) > floor * 3 else 0.0, "raw": 1 / gap}.get(grad, lorentzian)
            expected[i, j] = difference * inverse / 2
    torch.testing.assert_close(found.to(M.dtype), expected, rtol=8 * eps, atol=0)


@pytest.mark.parametrize("grad", FINITE_MODES)
@pytest.mark.parametrize("n", [4, 36])
def test_a_floor_whose_square_underflows_is_none(backend, n, grad):
    """Finite at repeated eigenvalues whatever the floor: pairs of one eigenvalue pass nothing."""
    A = torch.eye(n).expand(2, n, n) * torch.tensor([1.0, 0.0])[:, None, None]
    weights = random(2, n, dtype=torch.float32), random(2, n, n, dtype=torch.float32)
    found = gradients(A, weights, grad=grad, gap_floor=1e-30)
    diagonal = found.diagonal(dim1=-2, dim2=-1)
    assert torch.equal(found, torch.diag_embed(diagonal))
    assert torch.equal(diagonal.sort().values, weights[0].sort().values)


def test_documented_widths():
    """What `gap_floor=None` stands for, by the docstring."""
    for dtype in FLOATS:
        eps = torch.finfo(dtype).eps
        widths = [spine.gap_rule("eigh", grad, None, dtype)[1] for grad in spine._MODES]
        assert widths == [4 * eps, 1e-3, 16 * eps, 0.0]


def test_auto_keeps_the_gradient_of_close_separated_eigenvalues(backend):
    """A small gap that the loss sees is no noise: the projector of one of two eigenvalues 1e-3 apart, float32."""
    Q = torch.linalg.qr(random(8, 8))[0]
    w = torch.tensor([-1, -0.999, -0.4, 0, 0.2, 0.5, 0.8, 1], dtype=torch.float64)
    A64 = (Q * w) @ Q.mT
    A64, G = ((A64 + A64.mT) / 2).float().double(), symmetric(8, 8)
    gradient = {}
    for dtype, function in ((torch.float64, torch.linalg.eigh), (torch.float32, eigh)):
        A = A64.to(dtype).requires_grad_()
        v = function(A)[1][:, 0]
        gradient[dtype] = torch.autograd.grad(v @ G.to(dtype) @ v, A)[0].double()
    exact, found = gradient[torch.float64], gradient[torch.float32]
    bound = 5 * 8 * torch.finfo(torch.float32).eps / 1e-3
    assert (found - exact).norm() <= bound * exact.norm()


def test_lorentz_bounds_the_gradient(backend):
    """|S_ij| <= |M_ij - M_ji| / (4 delta), delta = gap_floor max|w|, for eigenvalues 1e-5 apart."""
    Q = torch.linalg.qr(random(19, 19))[0]
    w = torch.linspace(-1, 1, 19, dtype=torch.float64)
    w[4:9] = w[4] + 1e-5 * torch.arange(5)
    A = ((Q * w) @ Q.mT)[None]
    weights = torch.zeros(1, 19, dtype=torch.float64), random(1, 19, 19)
    V = eigh(A).eigenvectors
    M = V.mT @ weights[1]
    for floor in (None, 1e-2):
        found = gradients(A, weights, grad="lorentz", gap_floor=floor)
        bound = (M - M.mT).norm() / (4 * (floor or 1e-3))
        assert found.norm() <= bound
        assert found.norm() < gradients(A, weights, grad="auto").norm()


@pytest.mark.parametrize("UPLO", ["L", "U"])
def test_raw_is_torch(backend, UPLO):
    A = separated(torch.Generator().manual_seed(1), (4,), 11)
    A = A + torch.randn_like(A).triu(1) * (UPLO == "L") + torch.randn_like(A).tril(-1) * (UPLO == "U")
    weights = random(4, 11), random(4, 11, 11)
    found = gradients(A, weights, grad="raw", UPLO=UPLO)
    B = A.clone().requires_grad_()
    w, V = torch.linalg.eigh(B, UPLO=UPLO)
    signs = (eigh(A, UPLO).eigenvectors * V.detach()).sum(-2, keepdim=True).round()
    assert (signs.abs() == 1).all()
    exact = torch.autograd.grad((w, V * signs), B, weights)[0]
    torch.testing.assert_close(found, exact, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_matrix_touches_no_other(backend, dtype, bad):
    """NaN and `info` for itself; the same bits for all others, forward and backward."""
    A = symmetric(41, 19, 19, dtype=dtype)
    weights = random(41, 19, dtype=dtype), random(41, 19, 19, dtype=dtype)
    spoiled = A.clone()
    spoiled[3, 7, 2] = spoiled[18, 2, 7] = spoiled[40, 5, 5] = bad  # lower triangle, upper (not read), diagonal
    failed = torch.zeros(41, dtype=torch.bool)
    failed[[3, 18, 40]] = True
    clean, found = eigh_ex(A), eigh_ex(spoiled)
    torch.testing.assert_close(found.info, 2 * failed.to(torch.int32))
    torch.testing.assert_close(eigvalsh(spoiled).isnan(), failed[:, None].expand(41, 19))
    before, after = gradients(A, weights), gradients(spoiled, weights)
    for a, b in ((clean.eigenvalues, found.eigenvalues), (clean.eigenvectors, found.eigenvectors), (before, after)):
        assert torch.equal(a[~failed], b[~failed])
        assert b[failed].isnan().all()


def test_a_failed_matrix_that_the_loss_leaves_out_has_no_gradient(backend):
    """`where(info == 0, output, 0)` must be enough to train on: 0 for the failed item, not 0 * NaN."""
    A = symmetric(5, 6, 6)
    A[2, 1, 0] = torch.nan
    A.requires_grad_()
    w, V, info = eigh_ex(A)
    good = (info == 0)[:, None]
    loss = (torch.where(good, w, 0.0) * torch.where(good, V[:, 0], 0.0)).sum()
    found = torch.autograd.grad(loss, A)[0]
    assert torch.isfinite(found).all()
    assert (found[2] == 0).all() and (found[[0, 1, 3, 4]] != 0).any(-1).any(-1).all()


def test_lapack_failure_is_reported_per_matrix(monkeypatch):
    """LAPACK gives up on a whole batch; the op then takes its matrices one by one."""
    A = symmetric(3, 5, 5)
    clean = eigh_ex(A)
    whole = torch.linalg.eigh

    def stubborn(matrices, UPLO="L"):
        if matrices.dim() == 3 or torch.equal(matrices, A[1]):
            raise torch.linalg.LinAlgError("did not converge")
        return whole(matrices, UPLO=UPLO)

    monkeypatch.setattr(torch.linalg, "eigh", stubborn)
    with stablekern.use_backend("torch"):
        found = eigh_ex(A)
    assert found.info.tolist() == [0, 1, 0]
    assert found.eigenvectors[1].isnan().all() and found.eigenvalues[1].isnan().all()
    torch.testing.assert_close(found.eigenvalues[::2], clean.eigenvalues[::2])
    torch.testing.assert_close(found.eigenvectors[::2], clean.eigenvectors[::2])


@pytest.mark.parametrize("n", [12, 36])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64, torch.complex128])
def test_gauge(backend, dtype, n):
    """The first of the largest components of each column is real and positive, and columns are contiguous."""
    V = eigh(symmetric(7, n, n, dtype=dtype)).eigenvectors
    pivot = V.gather(-2, V.abs().argmax(-2, keepdim=True))
    assert (pivot.real > 0).all() and (pivot.is_complex() is False or (pivot.imag == 0).all())
    assert V.stride() == torch.linalg.eigh(symmetric(7, n, n, dtype=dtype)).eigenvectors.stride()


@pytest.mark.parametrize("n", [4, 34])
def test_complex_gradient_knows_the_gauge(backend, n):
    """Raw complex vectors, phase and all: finite differences see the pivot's phase, and so does the backward."""
    A = separated(torch.Generator().manual_seed(3), (2,), n, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: tuple(eigh((A + A.mH) / 2)), A, fast_mode=n > 4)


@pytest.mark.parametrize("n", [16, 36])
def test_complex_gradient_where_all_components_have_the_same_modulus(backend, n):
    """A circulant's eigenvectors are waves: rounding chooses the pivot, and the backward must take the same one."""
    shift = torch.roll(torch.eye(n, dtype=torch.complex128), 1, 0) * (0.3 + 1j)
    A = (shift + shift.mH).requires_grad_()
    w, V = eigh(A)
    G, low = symmetric(n, n, dtype=torch.complex128), slice(0, 5)
    found = torch.autograd.grad((G.conj() * (V[:, low] @ V[:, low].mH)).sum().real, A)[0]
    across = torch.zeros(n, n, dtype=torch.complex128)
    across[low, 5:] = 1 / (w.detach()[low, None] - w.detach()[None, 5:])
    V = V.detach()
    pairs = across * (V.mH @ G @ V)
    expected = V @ (pairs + pairs.mH) @ V.mH
    torch.testing.assert_close(found, expected, rtol=0, atol=5 * n * 2.3e-16 * expected.abs().max().item() * n)


def test_complex_hermitian_projector_at_repeated_eigenvalues(backend):
    n = 6
    Q = torch.linalg.qr(random(n, n, dtype=torch.complex128))[0]
    w = torch.tensor([0, 0, 0, 1, 1, 2.5], dtype=torch.float64)
    A = (Q * w) @ Q.mH
    A = ((A + A.mH) / 2).requires_grad_()
    G = symmetric(n, n, dtype=torch.complex128)
    V = eigh(A).eigenvectors[:, :3]
    found = torch.autograd.grad((G.conj() * (V @ V.mH)).sum().real, A)[0]
    across = torch.zeros(n, n, dtype=torch.complex128)
    across[:3, 3:] = 1 / (w[:3, None] - w[None, 3:])
    pairs = across * (Q.mH @ G @ Q)
    torch.testing.assert_close(found, Q @ (pairs + pairs.mH) @ Q.mH, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, found.mH, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_gradient_scales_with_the_matrix(backend, scale):
    """Eigenvectors of c A are those of A, so their gradient is 1/c of it: no square of a gap is in the way."""
    A = separated(torch.Generator().manual_seed(2), (5,), 19).float()
    weights = torch.zeros(5, 19), random(5, 19, 19, dtype=torch.float32)
    for grad in (*FINITE_MODES, "raw"):
        expected = gradients(A, weights, grad=grad)
        found = gradients(A * scale, weights, grad=grad).double() * scale
        bound = 2 * 5 * 19 * torch.finfo(torch.float32).eps * 19  # 5 n eps over a gap of 1/n, twice
        assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("dtype", FLOATS)
def test_eigenvalue_gradient_is_exact_for_symmetric_functions(backend, dtype):
    """sum(w^2) = ||A||^2 has the gradient 2 A, at repeated eigenvalues too."""
    A = torch.stack(list(repeated(19).values())).to(dtype).requires_grad_()
    for values in (eigvalsh(A), eigh(A).eigenvalues):
        found = torch.autograd.grad(values.square().sum(), A, retain_graph=True)[0]
        torch.testing.assert_close(found, 2 * A, rtol=0, atol=2 * 5 * 19 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    A = symmetric(3, 6, 6).to(dtype).requires_grad_()
    w, V = eigh(A)
    assert w.dtype == V.dtype == eigvalsh(A).dtype == torch.float32
    torch.testing.assert_close(w, eigh(A.float()).eigenvalues, rtol=0, atol=0)
    assert torch.autograd.grad(w.sum() + V[..., 0].sum(), A)[0].dtype == dtype


def test_autocast_changes_nothing(backend):
    A = symmetric(3, 6, 6, dtype=torch.float32)
    weights = random(3, 6, dtype=torch.float32), random(3, 6, 6, dtype=torch.float32)
    plain = gradients(A, weights)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(gradients(A, weights), plain, rtol=0, atol=0)


def test_sizes_without_elements():
    for shape in ((2, 0, 0), (0, 3, 3), (0, 0)):
        A = torch.zeros(shape, requires_grad=True)
        w, V, info = eigh_ex(A)
        assert w.shape == shape[:-1] and V.shape == shape and info.shape == shape[:-2]
        assert not info.any() and eigvalsh(A).shape == shape[:-1]
        (w.sum() + V.sum()).backward()
        assert A.grad.shape == shape
