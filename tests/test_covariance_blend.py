"""Invariants of the operations on covariances: failed items, conventions (axes, conjugation), shifts, scales."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import stablekern
from stablekern import (
    chol_solve_safe,
    covariance_blend,
    covariance_blend_ex,
    eigengap_hinge,
    mvdr_denominator,
    ridge_lstsq,
    sample_covariance,
    subspace_residual,
)
from stablekern.ops.chol_solve_safe import reference as chol_solve_safe_reference

COMPLEX = torch.complex128


def covariances(*shape: int, dtype=COMPLEX) -> Tensor:
    X = torch.randn(*shape, shape[-1], dtype=dtype)
    return X @ X.mH / shape[-1] + torch.eye(shape[-1], dtype=dtype)


def traces(R: Tensor) -> Tensor:
    return torch.einsum("...ii->...", R).real


def arrays(n: int, angles: list[float]) -> Tensor:
    """Steering vectors of a line of n elements, half a wavelength apart, as columns."""
    phase = torch.pi * torch.sin(torch.deg2rad(torch.tensor(angles, dtype=torch.float64)))
    return torch.polar(torch.ones(n, len(angles), dtype=torch.float64), phase * torch.arange(n)[:, None])


# covariance_blend


def test_a_trace_that_is_not_positive_is_reported_and_never_divided_by():
    R = covariances(6, 4)
    R[1] = 0
    R[2] = -R[2]
    R[3, 0, 1] = torch.nan
    R[4] = torch.diag(torch.tensor([1, -1, 1, -1 + 2.0**-50], dtype=COMPLEX))  # a positive rounding error of a trace
    R.requires_grad_()
    S = covariances(6, 4)
    S[5] = 0
    blend, info = covariance_blend_ex(R, S, beta=0.3, loading=0.1)
    assert info.tolist() == [0, 1, 1, 2, 1, 1]
    assert blend[1:].isnan().all()
    torch.testing.assert_close(blend[0], covariance_blend(R[0], S[0], beta=0.3, loading=0.1))
    grad = torch.autograd.grad(blend.abs().sum(), R)[0]
    assert torch.isfinite(grad).all() and grad[0].any() and not grad[1:].any()


def test_the_trace_is_the_target_and_the_result_hermitian():
    R, S = covariances(5, 12).to(torch.complex64), 1e-7 * covariances(5, 12).to(torch.complex64)
    for target in (None, 288.0):
        blend = covariance_blend(R, S, beta=0.3, shrink=0.1, loading=1.0, target_trace=target)
        expected = torch.full((5,), target or 12.0)
        torch.testing.assert_close(traces(blend), expected, rtol=12 * torch.finfo(torch.float32).eps, atol=0)
        torch.testing.assert_close(blend, blend.mH, rtol=0, atol=0)


def test_the_axes_are_named():
    """Matrices in front: a positional reading of the axes took a sub-diagonal for the trace."""
    R, S = covariances(3, 5), covariances(3, 5)
    front = covariance_blend(R.movedim(0, -1), S.movedim(0, -1), beta=0.4, dims=(0, 1))
    torch.testing.assert_close(front.movedim(-1, 0), covariance_blend(R, S, beta=0.4))
    turned = covariance_blend(R, S, beta=0.4, dims=(-1, -2))
    torch.testing.assert_close(turned, covariance_blend(R, S, beta=0.4))


def test_the_measured_covariance_gets_no_gradient_and_the_weights_do():
    R, S = covariances(2, 3), covariances(2, 3).requires_grad_()
    weights = [torch.rand(2, dtype=torch.float64).requires_grad_() for _ in range(3)]

    def blend(beta, shrink, loading):
        return covariance_blend(R, S, beta=beta, shrink=shrink, loading=loading)

    assert torch.autograd.grad(blend(*weights).abs().sum(), S, allow_unused=True)[0] is None
    assert torch.autograd.gradcheck(blend, weights)
    single = covariance_blend(R.to(torch.complex64), shrink=weights[0].detach())
    assert single.dtype == torch.complex64


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_which_traces_count_as_none(backend, dtype):
    """Up to n eps times the sum of the moduli, n = 4: 16 eps here; and what float32 cannot hold is not finite."""
    eps, largest = torch.finfo(dtype).eps, torch.finfo(dtype).max
    R = torch.diag_embed(torch.tensor([[1.0, -1.0, 1.0, -1.0]] * 4, dtype=dtype))
    R[0, 3, 3] += 15 * eps
    R[1, 3, 3] += 17 * eps
    R[2, 0, 1] = torch.nan  # and no trace
    R[3] = torch.eye(4) * (largest / 2)
    with stablekern.use_backend(backend):
        blend, info = covariance_blend_ex(R)
    assert info.tolist() == [1, 0, 3, 2]
    assert torch.isfinite(blend[1]).all() and blend[[0, 2, 3]].isnan().all()


# sample_covariance, mvdr_denominator


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("target", [None, 4.0])
def test_snapshots_that_are_not_finite_stay_alone(backend, target):
    X = torch.randn(4, 9, 4, dtype=COMPLEX)
    with stablekern.use_backend(backend):
        clean = sample_covariance(X, target_trace=target)
        X[1, 3, 2], X[2, 8, 0] = complex(0, torch.nan), torch.inf
        R = sample_covariance(X.requires_grad_(), target_trace=target)
        grad = torch.autograd.grad(R, X, torch.ones_like(R))[0]
    assert R[1:3].isnan().all() and torch.equal(R[[0, 3]], clean[[0, 3]])
    assert torch.isfinite(grad).all() and grad[[0, 3]].any() and not grad[1:3].any()


def test_a_point_source_peaks_at_itself_and_not_at_its_mirror():
    angles = [float(x) for x in range(-60, 61)]
    table, source = arrays(16, angles), arrays(16, [20.0])[:, 0]
    symbols = torch.randn(100, dtype=COMPLEX)
    R = sample_covariance(symbols[:, None] * source, target_trace=16.0)
    torch.testing.assert_close(R, source[:, None] * source.conj())
    spectrum = 1 / mvdr_denominator(R, table, 0.01)
    assert angles[int(spectrum.argmax())] == 20.0
    assert spectrum[angles.index(-20.0)] < 0.1 * spectrum.max()
    # Sherman-Morrison for a a^H + l I: 1/(a^H R^-1 a) = (n + l) / n at the source.
    torch.testing.assert_close(spectrum.max(), torch.tensor((16 + 0.01) / 16, dtype=torch.float64))


def test_snapshots_of_any_scale_give_the_same_normalised_covariance():
    X = torch.randn(3, 9, 4, dtype=torch.complex64)
    expected = sample_covariance(X, target_trace=4.0)
    for power in (-100, 100):
        scaled = sample_covariance(X * 2.0**power, target_trace=4.0)
        torch.testing.assert_close(scaled, expected)
    X[1] = 0
    X.requires_grad_()
    R = sample_covariance(X, target_trace=4.0)
    assert R[1].isnan().all() and torch.isfinite(R[[0, 2]]).all()
    grad = torch.autograd.grad(R.abs().sum(), X)[0]
    assert torch.isfinite(grad).all() and not grad[1].any()


def test_centring_and_degrees_of_freedom():
    X = torch.randn(9, 4, dtype=torch.float64) + 5
    torch.testing.assert_close(sample_covariance(X, center=True, ddof=1), X.T.cov())


def test_denominators_are_positive_where_a_computed_inverse_is_not():
    n = 32
    a = arrays(n, [5.0, 25.0]).to(torch.complex64)
    R = a @ a.mH
    table = arrays(n, [float(x) for x in range(-80, 81)]).to(torch.complex64)
    loading = 1e-6
    denominator = mvdr_denominator(R, table, loading)
    assert (denominator > 0).all()
    exact = mvdr_denominator(R.to(COMPLEX), table.to(COMPLEX), loading)
    torch.testing.assert_close(denominator[[0, 80]].double(), exact[[0, 80]], rtol=0.1, atol=0)


def test_a_covariance_that_is_not_definite_is_nan_alone():
    R = covariances(4, 5)
    R[1] = -R[1]
    R[2, 3, 3] = torch.inf
    R.requires_grad_()
    A = arrays(5, [0.0, 30.0])
    for result in (mvdr_denominator(R, A), chol_solve_safe(R, A).solution):
        assert result[1:3].isnan().all() and torch.isfinite(result[[0, 3]]).all()
        grad = torch.autograd.grad(result.abs().sum(), R)[0]
        assert torch.isfinite(grad[[0, 3]]).all() and not grad[1:3].nan_to_num(1.0).any()


# chol_solve_safe


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_only_the_matrix_that_needs_it_is_shifted(dtype):
    n = 48
    a = torch.randn(n, 2, dtype=dtype)
    R = covariances(3, n).to(dtype)
    R[1] = a @ a.mH - 4 * torch.finfo(dtype).eps * torch.eye(n)
    A = torch.randn(3, n, 2, dtype=dtype)
    X, info, jitter = chol_solve_safe(R, A)
    assert info.tolist() == [0, 1, 0]
    assert (jitter > 0).tolist() == [False, True, False]
    mean = traces(R) / n
    assert jitter[1] <= 0.01 * mean[1]
    eye = torch.eye(n, dtype=dtype)
    for i in range(3):
        H = (R[i] + jitter[i] * eye).to(COMPLEX)
        residual = torch.linalg.norm(H @ X[i].to(COMPLEX) - A[i].to(COMPLEX))
        bound = 4 * n * torch.finfo(dtype).eps * torch.linalg.matrix_norm(H, 2) * torch.linalg.norm(X[i]).double()
        assert residual <= bound
    torch.testing.assert_close(X[0], chol_solve_safe(R[0], A[0]).solution)


def test_the_first_shift_that_works_is_taken():
    eps = torch.finfo(torch.float64).eps
    for level in range(6):
        # The lowest eigenvalue lies below 0 by half of the shift number `level`.
        shift = 4 * eps * 2.0 * 10**level
        R = torch.diag(torch.tensor([-shift / 2, 1.0, 1.0], dtype=torch.float64))
        jitter = chol_solve_safe(R, torch.ones(3, 1, dtype=torch.float64)).jitter
        assert shift / 2 < jitter <= shift * (1 + 1e-10)
    for lowest, bits in ((-0.005, 1), (-0.01, 4), (torch.nan, 2)):
        R = torch.diag(torch.tensor([lowest, 1.0, 1.0], dtype=torch.float64))
        assert int(chol_solve_safe(R, torch.ones(3, 1, dtype=torch.float64)).info) == bits
    assert int(chol_solve_safe(torch.zeros(3, 3), torch.ones(3, 1)).info) == 4


def test_gradient_of_a_shifted_solution():
    R = torch.diag(torch.tensor([-1e-14, 1.0, 1.0, 2.0], dtype=torch.float64))
    A = torch.tensor([[0.0], [1.0], [2.0], [3.0]], dtype=torch.float64)
    inputs = R.requires_grad_(), A.requires_grad_()
    X, info, jitter = chol_solve_safe(*inputs)
    G = torch.tensor([[0.0], [1.0], [1.0], [1.0]], dtype=torch.float64)
    grad_R, grad_A = torch.autograd.grad(X, inputs, G)
    inverse = torch.linalg.inv(R.detach() + jitter * torch.eye(4))
    y = inverse @ G
    torch.testing.assert_close(grad_A, y)
    torch.testing.assert_close(grad_R, -(y @ X.detach().mT + X.detach() @ y.mT) / 2)
    assert int(info) == 1


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_both_backends_factor_and_report_alike(backend, dtype):
    """A good matrix, one that needs a shift, one that nothing makes definite, and one that is not finite."""
    n = 40
    a = torch.randn(n, 2, dtype=dtype)
    R = torch.randn(4, n, n, dtype=dtype)
    R = R @ R.mH / n + torch.eye(n, dtype=dtype)
    R[1] = a @ a.mH - 4 * torch.finfo(dtype).eps * torch.eye(n)
    R[2] = -R[2]
    R[3, 39, 2] = torch.nan
    R, A = R.requires_grad_(), torch.randn(4, n, 3, dtype=dtype).requires_grad_()
    with stablekern.use_backend(backend):
        X, info, jitter = chol_solve_safe(R, A)
        denominator = mvdr_denominator(R, A, 0.1)
        grads = torch.autograd.grad(X[:3:2].abs().sum() + denominator[[0, 2]].sum(), (R, A))
    assert info.tolist() == [0, 1, 4, 2] and (jitter > 0).tolist() == [False, True, False, False]
    assert X[2:].isnan().all() and denominator[2:].isnan().all()
    assert all(torch.isfinite(g[:3]).all() and g[0].any() and not g[2].any() for g in grads)
    tolerance = 100 * torch.finfo(dtype).eps
    exact = chol_solve_safe_reference(R.detach()[0].to(COMPLEX), A.detach()[0].to(COMPLEX))
    assert (X[0].to(COMPLEX) - exact).abs().max() <= tolerance * exact.abs().max()


# ridge_lstsq


def test_the_dual_form_keeps_the_digits_that_the_normal_equations_lose():
    torch.manual_seed(3)
    Phi = torch.randn(64, 16, 144, dtype=COMPLEX)
    y = torch.randn(64, 16, dtype=COMPLEX)
    for alpha in (1e-6, 1e-3):
        exact = ridge_lstsq(Phi, y, alpha)
        ours = ridge_lstsq(Phi.to(torch.complex64), y.to(torch.complex64), alpha)
        assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_wide_and_tall_agree_with_the_definition_and_a_broken_item_stays_alone():
    for m, n in ((3, 7), (7, 3), (4, 4)):
        Phi, y = torch.randn(4, m, n, dtype=COMPLEX), torch.randn(4, m, dtype=COMPLEX)
        x = ridge_lstsq(Phi, y, 0.2)
        gradient = Phi.mH @ (Phi @ x[..., None] - y[..., None]) + 0.2 * x[..., None]
        assert gradient.abs().max() <= 1e-12
        Phi[2, 0, 0] = torch.nan
        broken = ridge_lstsq(Phi.requires_grad_(), y, 0.2)
        assert broken[2].isnan().all()
        torch.testing.assert_close(broken[[0, 1, 3]], x[[0, 1, 3]])
        grad = torch.autograd.grad(broken[[0, 1, 3]].abs().sum(), Phi)[0]
        assert torch.isfinite(grad[[0, 1, 3]]).all()


# eigengap_hinge, subspace_residual


def test_the_hinge_is_finite_on_tied_eigenvalues_and_its_gradient_bounded():
    for R in (torch.eye(5).double(), torch.zeros(5, 5).double(), torch.diag(torch.tensor([2.0, 2, 1, 1, 1])).double()):
        for k in range(1, 5):
            A = R.clone().requires_grad_()
            hinge = eigengap_hinge(A, k, 1.5)
            w = torch.linalg.eigvalsh(R).flip(0)
            torch.testing.assert_close(hinge, 1.5 - (w[k - 1] - w[k]))
            grad = torch.autograd.grad(hinge, A)[0]
            assert torch.isfinite(grad).all()
            torch.testing.assert_close(torch.linalg.norm(grad), torch.tensor(2.0, dtype=torch.float64).sqrt())


def test_a_number_of_sources_out_of_range_is_nan_alone():
    R = covariances(4, 3).requires_grad_()
    hinge = eigengap_hinge(R, torch.tensor([0, 1, 2, 3]), 100.0)
    assert hinge.isnan().tolist() == [True, False, False, True]
    torch.testing.assert_close(hinge[1], eigengap_hinge(R[1], 1, 100.0))
    grad = torch.autograd.grad(hinge[1:3].sum(), R)[0]
    assert torch.isfinite(grad).all() and not grad[[0, 3]].any()


def test_the_residual_of_sources_in_and_outside_the_span():
    A = arrays(12, [-10.0, 20.0, 45.0])
    powers = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    R = (A * powers) @ A.mH
    assert subspace_residual(R, A) < 1e-7
    torch.testing.assert_close(subspace_residual(R, A, torch.zeros(3).bool()), torch.tensor(1.0).double())
    only = torch.tensor([True, True, False])
    rest = subspace_residual(R, A, only)
    torch.testing.assert_close(rest, subspace_residual(R, A[:, :2]))
    assert 1e-3 < rest < 0.5


def test_masked_zero_and_parallel_columns_have_finite_gradients():
    a = arrays(8, [10.0])
    A = torch.cat([a, a, torch.zeros_like(a), arrays(8, [40.0])], -1).requires_grad_()
    R = covariances(8).requires_grad_()
    mask = torch.tensor([True, True, True, False])
    value = subspace_residual(R, A, mask)
    grads = torch.autograd.grad(value, (R, A))
    assert all(torch.isfinite(g).all() for g in grads)
    assert not grads[1][:, 2:].any()
    nothing = torch.stack([R.detach(), torch.zeros(8, 8)]).requires_grad_()
    both = subspace_residual(nothing, a.expand(2, 8, 1))
    assert both.isnan().tolist() == [False, True]
    grad = torch.autograd.grad(both.sum(), nothing)[0]
    assert torch.isfinite(grad).all() and not grad[1].any()


def test_they_are_public():
    names = {"covariance_blend_ex", "eigengap_hinge", "subspace_residual", "mvdr_denominator", "chol_solve_safe"}
    assert names < set(stablekern.__all__)


def test_second_derivatives_of_the_solutions():
    R, A = covariances(1, 3).requires_grad_(), torch.randn(1, 3, 2, dtype=COMPLEX).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda R, A: chol_solve_safe(R, A).solution, (R, A))
    assert torch.autograd.gradgradcheck(mvdr_denominator, (R, A))


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_backends_agree_on_failed_items_and_their_gradients(backend):
    n = 34
    R, S = covariances(6, n), covariances(6, n)
    R[1] = 0
    R[2] = -R[2]
    R[3, 33, 2] = complex(0, torch.inf)
    S[4, 5, 7] = torch.nan  # not in its trace
    S[5] = torch.diag(torch.tensor([1.0, -1.0] * (n // 2)))
    weights = [torch.rand(6, dtype=torch.float64).requires_grad_() for _ in range(3)]
    R.requires_grad_()
    with stablekern.use_backend(backend):
        blend, info = covariance_blend_ex(R, S, beta=weights[0], shrink=weights[1], loading=weights[2])
        grads = torch.autograd.grad(blend.abs().sum(), [R, *weights])
    assert info.tolist() == [0, 1, 1, 2, 2, 1]
    assert blend[1:].isnan().all() and torch.isfinite(blend[0]).all()
    assert all(torch.isfinite(grad).all() and grad[0].any() and not grad[1:].any() for grad in grads)


def test_subnormal_and_huge_traces_scale_without_overflow():
    R = covariances(2, 17).to(torch.complex64)
    exact = covariance_blend(R)
    for scale in (2.0**-140, 2.0**120):
        scaled = covariance_blend((R.to(COMPLEX) * scale).to(torch.complex64))
        tolerance = 2.0**-7 if scale < 1 else 1e-6  # a subnormal entry near 2^-140 has 9 bits
        assert (scaled - exact).abs().max() <= tolerance * exact.abs().max()
