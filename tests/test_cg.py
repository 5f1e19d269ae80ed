"""What `cg` promises beyond a right answer: tolerances per system, a status, honesty about what is no matrix for it."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor

import stablekern
from specs.cg import banded, dense_product, general, held, in_form, spread, symmetric
from stablekern import _registry
from stablekern.errors import BackendUnavailableError
from stablekern.ops import cg as spine
from stablekern.ops.cg import select_solver

MAXITER, INDEFINITE, BREAKDOWN, NON_FINITE, ASYMMETRIC = 1, 2, 4, 8, 16
FORMS = ("dense", "csr", "callable")
KERNELS = [b for b in _registry._ORDER["cpu"] if b in _registry._launchers["cg_fwd"]["cpu"]]
BACKENDS = [b for b in KERNELS if b != "triton"]  # whose interpreter takes seconds where iterations are many


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def skipping(function):
    """A form that a forced backend has no kernel for is a skip that says so."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))

    return call


cg, cg_ex = skipping(spine.cg), skipping(spine.cg_ex)


@pytest.fixture(params=BACKENDS)
def backend(request, any_backend):
    stablekern.use_backend(request.param)
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request, any_backend):
    case = request.node.callspec.params
    if request.param == "triton" and (case.get("form") == "callable" or case.get("dtype") == torch.float64):
        pytest.skip("the interpreter is slow: the forms that have a kernel, in one dtype")
    stablekern.use_backend(request.param)
    return request.param


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(spine, "_warned", False)


def solve(A: Tensor, b: Tensor, form: str = "dense", **options):
    operator, params = in_form(A, form)
    return cg_ex(operator, b, params=params, **options)


def true_residual(A: Tensor, x: Tensor, b: Tensor) -> Tensor:
    wide = torch.complex128 if x.is_complex() else torch.float64
    return torch.linalg.vector_norm(b.to(wide) - dense_product(x.to(wide), A.to(wide)), dim=-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_row_reaches_its_own_tolerance(form, dtype, kernel):
    """Right-hand sides and matrices of 1e-18 and 1e15 beside each other, and a tolerance for each."""
    g = generator()
    A = banded(g, (5,), 11) * torch.tensor([1.0, 1e-18, 1e15, 1e15, 1e-18]).double()[:, None, None]
    b = (
        torch.randn(5, 11, dtype=torch.float64, generator=g)
        * torch.tensor([1.0, 1e-18, 1e15, 1e-18, 1e15]).double()[:, None]
    )
    A, b = A.to(dtype), b.to(dtype)
    # The last quotient is 1e33: in range. A tolerance of the order of eps would not be reached by rounding alone.
    rtol = torch.tensor([1e-5, 1e-4, 1e-3, 1e-2, 1e-5], dtype=dtype)
    x, info, iterations, residual = solve(A, b, form, rtol=rtol)
    norm = torch.linalg.vector_norm(b.double(), dim=-1)
    assert info.tolist() == [0] * 5
    assert (true_residual(A, x, b) <= 1.01 * rtol * norm).all()
    rounding = (
        8 * torch.finfo(dtype).eps * A.double().abs().sum(-1).amax(-1) * torch.linalg.vector_norm(x.double(), dim=-1)
    )
    assert ((residual.double() - true_residual(A, x, b)).abs() <= rounding).all()
    assert iterations[3] < iterations[0], "a loose tolerance takes fewer steps"


@pytest.mark.parametrize("rtol", [1e-6, torch.tensor(1e-6)])
@pytest.mark.parametrize("shape", [(7,), (2, 7), (3, 2, 7)])
@pytest.mark.parametrize("form", FORMS)
def test_results_have_the_shape_of_the_right_hand_side(form, shape, rtol, backend):
    """A single vector too, whatever the operator and the tolerance are given as."""
    A = banded(generator(), shape[:-1], 7)
    b = torch.randn(shape, dtype=torch.float64, generator=generator()).requires_grad_()
    found = solve(A, b, form, rtol=rtol)
    assert found.x.shape == shape and torch.autograd.grad(found.x.sum(), b)[0].shape == shape
    assert [part.shape for part in found[1:]] == [shape[:-1]] * 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterations_without_a_bound(form, dtype, kernel):
    A, b = banded(generator(), (2,), 9).to(dtype), torch.ones(2, 9, dtype=dtype)
    for maxiter in (2**31, 2**32, 2**63 - 1):
        found = solve(A, b, form, maxiter=maxiter)
        assert (found.info == 0).all() and (found.iterations > 0).all()


@pytest.mark.parametrize("batch", [(), (1,), (1, 1)])
@pytest.mark.parametrize("form", ["dense", "csr"])
def test_one_matrix_and_a_tolerance_for_each_column(form, batch, kernel):
    A = banded(generator(), batch, 13)
    b = torch.randn(*batch, 13, 2, dtype=torch.float64, generator=generator())
    for loose in ({"rtol": torch.tensor([1e-12, 1e-2])}, {"rtol": 1e-12, "atol": torch.tensor([0.0, 1e-2])}):
        found = solve(A, b, form, method="cg", **loose)
        assert (found.info == 0).all() and (found.iterations[..., 1] < found.iterations[..., 0] - 2).all()


def test_absolute_tolerance(backend):
    g = generator()
    A, b = spread(g, (3,), 9), torch.randn(3, 9, dtype=torch.float64, generator=g)
    found = cg_ex(A, b, rtol=0, atol=torch.tensor([1e-1, 1e-4, 1e9], dtype=torch.float64))
    assert found.info.tolist() == [0, 0, 0]
    assert (true_residual(A, found.x, b) <= torch.tensor([1e-1, 1e-4, 1e9])).all()
    assert found.iterations[2] == 0 and (found.x[2] == 0).all()


def test_an_absolute_tolerance_is_in_the_units_of_b(kernel):
    """Powers of two before b and the tolerance change nothing but the size of x."""
    g = generator()
    A, b = spread(g, (2,), 9).float(), torch.randn(2, 9, generator=g)
    found = cg_ex(A, b, rtol=0, atol=0.1)
    for k in (-40, 40):
        scaled = cg_ex(A, b * 2.0**k, rtol=0, atol=0.1 * 2.0**k)
        assert torch.equal(scaled.iterations, found.iterations) and torch.equal(scaled.x, found.x * 2.0**k)
    assert (found.info == 0).all() and 0 < found.iterations.min() and found.iterations.max() < 9


@pytest.mark.parametrize("form", FORMS)
def test_the_true_residual_decides(form, backend):
    """Of a matrix of condition 1e4 the recurrence claims in single precision what b - A x never comes to."""
    g = generator()
    A = banded(g, (3,), 40) - (0.5 - 3e-4) * torch.eye(40, dtype=torch.float64)
    A, b = A.float(), torch.randn(3, 40, generator=g)
    found = solve(A, b, form, rtol=1e-7, maxiter=4000, method="cg")
    truth = true_residual(A, found.x, b)
    assert ((found.info & BREAKDOWN) != 0).all() and (truth > 1e-7 * torch.linalg.vector_norm(b, dim=-1)).all()
    # Both are sums of rounding errors, of which each knows its own.
    rounding = 8 * torch.finfo(torch.float32).eps * 4 * torch.linalg.vector_norm(found.x.double(), dim=-1)
    assert ((found.residual.double() - truth).abs() <= rounding).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("where", ["A", "b", "x0"])
def test_a_nan_stays_in_its_system(form, where, kernel):
    g = generator()
    A, b, x0 = banded(g, (3,), 7), torch.randn(3, 7, dtype=torch.float64, generator=g), torch.zeros(3, 7).double()
    clean = solve(A, b, form, x0=x0)
    {"A": A[1, 0], "b": b[1], "x0": x0[1]}[where][1] = torch.nan
    A.requires_grad_(), b.requires_grad_()
    found = solve(A, b, form, x0=x0)
    assert found.info.tolist() == [0, NON_FINITE, 0]
    assert found.x[1].isnan().all() and found.residual[1].isnan()
    for i in (0, 2):
        torch.testing.assert_close(found.x[i], clean.x[i], rtol=0, atol=0)
    for grad in torch.autograd.grad(found.x[[0, 2]].square().sum(), (A, b)):
        assert grad.isfinite().all()
        assert (grad[1] == 0).all() and (grad[0] != 0).any()


@pytest.mark.parametrize("form", FORMS)
def test_zero_right_hand_side(form, kernel):
    g = generator()
    A, b = banded(g, (2,), 7).requires_grad_(), torch.zeros(2, 7, dtype=torch.float64)
    b[1] = 1
    b.requires_grad_()
    found = solve(A, b, form, rtol=1e-14)
    assert found.info.tolist() == [0, 0] and found.iterations[0] == 0
    assert (found.x[0] == 0).all()
    ours = torch.autograd.grad(found.x.sum(), (A, b))
    exact = torch.autograd.grad(torch.linalg.solve(A, b).sum(), (A, b))
    torch.testing.assert_close(ours[1], exact[1])
    for ours_i, exact_i in zip(ours[0], exact[0], strict=True):
        symmetrised = exact_i if form != "dense" else (exact_i + exact_i.mT) / 2
        kept = ours_i != 0 if form == "csr" else torch.ones_like(ours_i, dtype=torch.bool)
        torch.testing.assert_close(ours_i[kept], symmetrised[kept])
    silent = torch.autograd.grad((found_x := solve(A, b, form).x), (A, b), torch.zeros_like(found_x))
    assert all((grad == 0).all() for grad in silent)


def test_status_bits(kernel):
    one = torch.ones(4, dtype=torch.float64)
    indefinite, singular = (
        torch.diag(torch.tensor([1.0, -3, 2, 5]).double()),
        torch.diag(torch.tensor([1.0, 2, 3, 0]).double()),
    )
    zero, fine = torch.zeros(4, 4).double(), torch.diag(torch.arange(1.0, 5).double())
    crooked = fine + torch.diag(one[:3], 1)
    A = torch.stack((fine, indefinite, singular, zero, crooked))
    found = cg_ex(A, one.expand(5, 4), maxiter=100)
    assert found.info[0] == 0 and found.info[1] == INDEFINITE and found.info[4] == ASYMMETRIC
    assert found.info[2] in (MAXITER, INDEFINITE, BREAKDOWN), "an inconsistent system"
    assert found.info[3] == BREAKDOWN
    assert found.x[:4].isfinite().all() and found.x[4].isnan().all()
    stopped = cg_ex(fine, one, maxiter=2)
    assert stopped.info == MAXITER and stopped.iterations == 2
    torch.testing.assert_close(stopped.residual, true_residual(fine, stopped.x, one))
    assert cg_ex(fine, one, maxiter=0).residual == 2
    ambitious = cg_ex(fine.float(), one.float(), rtol=0)
    assert ambitious.info in (0, BREAKDOWN) and ambitious.residual < 1e-6


def test_consistent_singular_systems(backend):
    """A graph's Laplacian, and a right-hand side without a constant part."""
    g = generator()
    A = banded(g, (4,), 12) - 0.5 * torch.eye(12, dtype=torch.float64)
    b = torch.randn(4, 12, dtype=torch.float64, generator=g)
    b = b - b.mean(-1, keepdim=True)
    found = cg_ex(A, b, rtol=1e-10)
    assert (found.info == 0).all()
    assert (true_residual(A, found.x, b) <= 1.01e-10 * torch.linalg.vector_norm(b, dim=-1)).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_system_does_not_notice_its_neighbours(form, backend):
    """Rows that need more or fewer iterations leave a frozen one as it is, to the bit."""
    g = generator()
    A, b = banded(g, (9,), 13), torch.randn(9, 13, dtype=torch.float64, generator=g)
    A[4:] += torch.diag_embed(torch.logspace(0, 3, 13).double())
    alone = solve(A[:1], b[:1], form)
    for backwards in (False, True):
        order = torch.arange(9).flip(0) if backwards else torch.arange(9)
        found = solve(A[order], b[order], form)
        place = int((order == 0).nonzero())
        # A product over a batch may sum in another order than one over a single matrix.
        torch.testing.assert_close(found.x[place], alone.x[0], rtol=1e-11, atol=0)
        assert found.iterations[place] == alone.iterations[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_loose_system_stays_where_it_stopped(form, backend):
    """However long its neighbours go on after it."""
    g = generator()
    A, b = banded(g, (9,), 13), torch.randn(9, 13, dtype=torch.float64, generator=g)
    rtol = torch.full((9,), 1e-12, dtype=torch.float64)
    rtol[4] = 1e-2
    found, alone = solve(A, b, form, rtol=rtol), solve(A[4:5], b[4:5], form, rtol=1e-2)
    torch.testing.assert_close(found.x[4], alone.x[0], rtol=0 if backend == "native" else 1e-11, atol=0)
    assert found.iterations[4] == alone.iterations[0] < found.iterations.max() - 2


@pytest.mark.parametrize("form", ["dense", "csr"])
@pytest.mark.parametrize("preconditioner", [None, "jacobi", 3])
def test_a_batch_is_its_systems_one_by_one(form, preconditioner, backend):
    """More matrices than are in flight at once, each with rows of its own sizes and its own preconditioner."""
    g = generator()
    sizes = 10 ** torch.rand(29, 7, dtype=torch.float64, generator=g)
    A = banded(g, (29,), 7) * sizes[:, None] * sizes[:, :, None]
    b = torch.randn(29, 7, dtype=torch.float64, generator=g)
    options = {"preconditioner": preconditioner, "method": "cg", "rtol": 1e-9}
    found = solve(A, b, form, **options)
    assert (found.info == 0).all()
    for i in range(29):
        alone = solve(A[i : i + 1], b[i : i + 1], form, **options)
        if backend == "native":
            assert torch.equal(found.x[i], alone.x[0]) and found.iterations[i] == alone.iterations[0]
        else:  # a product over a batch may sum in another order
            assert (found.iterations[i] - alone.iterations[0]).abs() <= 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_a_first_guess_is_in_the_units_of_x(form, size, kernel):
    g = generator()
    A, b = size * banded(g, (2,), 7), torch.randn(2, 7, dtype=torch.float64, generator=g)
    found = solve(A, b, form, x0=torch.linalg.solve(held(A, form), b), rtol=1e-9)
    assert (found.info == 0).all() and (found.iterations == 0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["auto", "cg", "cocg"])
def test_what_is_not_hermitian_is_refused(form, method, backend):
    """The Cayley operator I + i a H: CG makes no progress on it and says so, COCG and CGNE solve it."""
    H = banded(generator(), (2,), 11)
    eye = torch.eye(11, dtype=torch.float64)
    b = torch.randn(2, 11, dtype=torch.complex128, generator=generator())
    cayley = torch.complex(eye.expand_as(H), 0.3 * H)
    operator, params = in_form(cayley, form)
    if method == "cocg":
        crooked = cayley + 0.1 * torch.diag(torch.ones(10).double(), 1)
        crooked_operator, crooked_params = in_form(crooked, form)
        with pytest.raises(
            ValueError, match=r'`A` must be symmetric for `method` "cocg"; "cgne" takes any: got 2 of 2'
        ):
            cg(crooked_operator, b, params=crooked_params, method=method)
    else:
        with pytest.raises(
            ValueError, match=r'stablekern.cg: `A` must be Hermitian: .* "cocg" .* "cgne"; .* got 2 of 2'
        ):
            cg(operator, b, params=params, method=method)
    for right in ("cocg", "cgne"):
        found = cg_ex(operator, b, params=params, method=right)
        assert (found.info == 0).all()
        torch.testing.assert_close(found.x, torch.linalg.solve(cayley, b), rtol=1e-9, atol=1e-10)


def test_rounding_is_not_asymmetry(backend):
    X = torch.randn(3, 4000, 9, generator=generator())
    A = X.mT @ X / 4000
    A = A + 8 * torch.finfo(torch.float32).eps * torch.randn(3, 9, 9, generator=generator())
    assert (cg_ex(A, torch.ones(3, 9)).info == 0).all()


def test_a_failed_solve_is_warned_of_once_with_numbers(unwarned, backend):
    A = torch.diag(torch.logspace(0, 4, 30, dtype=torch.float64)).expand(2, 30, 30)
    b = torch.ones(2, 30, dtype=torch.float64)
    text = (
        r"stablekern.cg: 2 of 2 systems did not converge; .* = [\d.e+-]+, tolerance 5.5e-12, after 3 iterations, info 1"
    )
    with pytest.warns(RuntimeWarning, match=text):
        cg(A, b, maxiter=3, method="cg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cg(A, b, maxiter=3, method="cg")


def test_compiled_code_does_not_warn(unwarned):
    A = torch.diag(torch.logspace(0, 4, 30, dtype=torch.float64))
    torch.compile(lambda b: cg(A, b, maxiter=3), backend="eager", fullgraph=True)(torch.ones(30).double())
    assert not spine._warned


def directional_error(function, inputs: tuple[Tensor, ...]) -> float:
    """|directional derivative by autograd - by central differences| over the latter, along one random direction."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    weight = torch.randn(out.shape, dtype=out.dtype, generator=generator(1))
    grads = torch.autograd.grad(out, leaves, weight)
    steps = [torch.randn(x.shape, dtype=x.dtype, generator=generator(2)) for x in inputs]
    ours = sum(float((g.conj() * s).real.sum()) for g, s in zip(grads, steps, strict=True))
    h = 1e-5
    ends = [function(*(x + k * h * s for x, s in zip(inputs, steps, strict=True))) for k in (1, -1)]
    exact = float((weight.conj() * (ends[0] - ends[1])).real.sum()) / (2 * h)
    return abs(ours - exact) / abs(exact)


def straight_through(A: Tensor, b: Tensor) -> Tensor:
    """What is often done in place of an adjoint solve: x + (b - A x) with x constant."""
    with torch.no_grad():
        x = cg(A, b, method="cg")
    return x + (b - dense_product(x, A))


@pytest.mark.parametrize("form", FORMS)
def test_gradient_is_that_of_the_solution_and_a_straight_through_one_is_not(form):
    g = generator()
    M, b = banded(g, (3,), 8), torch.randn(3, 8, dtype=torch.float64, generator=g)

    def ours(M, b):
        operator, params = in_form((M + M.mT) / 2, form)
        return cg(operator, b, params=params)

    def exact(M, b):
        return torch.linalg.solve(held((M + M.mT) / 2, form), b)

    assert directional_error(ours, (M, b)) < 1e-7
    assert directional_error(lambda M, b: straight_through((M + M.mT) / 2, b), (M, b)) > 0.1
    inputs = [x.clone().requires_grad_() for x in (M, b)]
    for one, other in zip(
        torch.autograd.grad(ours(*inputs).square().sum(), inputs),
        torch.autograd.grad(exact(*inputs).square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_the_gradient_does_not_depend_on_the_iterations():
    """From the solution itself no iteration is taken, and the gradient is the same."""
    g = generator()
    A, b = spread(g, (), 9).requires_grad_(), torch.randn(9, dtype=torch.float64, generator=g)
    exact = torch.linalg.solve(A.detach(), b)
    found = cg_ex(A, b, x0=exact)
    assert found.iterations == 0
    cold = cg(A, b)
    warm_grad, cold_grad = (torch.autograd.grad(x.sum(), A)[0] for x in (found.x, cold))
    torch.testing.assert_close(warm_grad, cold_grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("maker", "method"), [(spread, "cg"), (symmetric, "cocg"), (general, "cgne")])
def test_callable_equals_dense(maker, method):
    """Parameters that enter in another way than entry by entry: A = exp(t) M."""
    g = generator()
    M = maker(g, (), 6)
    b = torch.randn(3, 6, dtype=M.dtype, generator=g)
    t = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b = b.requires_grad_()
    ours = cg(lambda v, t: dense_product(v, M) * torch.exp(t), b, method=method, params=(t,))
    exact = torch.linalg.solve(M * torch.exp(t), b.mT).mT
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
    loss = [(x.abs().square() * torch.arange(1.0, 7)).sum() for x in (ours, exact)]
    for one, other in zip(*(torch.autograd.grad(value, (t, b)) for value in loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_what_a_callable_holds_must_come_through_params():
    M = torch.eye(3, requires_grad=True)
    with pytest.raises(ValueError, match="through `params`: .* got a result that requires grad"):
        cg(lambda v: v @ M, torch.ones(3))


def test_preconditioners_pay(backend):
    scale = torch.logspace(0, 3, 40, dtype=torch.float64)
    A = spread(generator(), (2,), 40) * scale.sqrt()[:, None] * scale.sqrt()
    b = torch.ones(2, 40, dtype=torch.float64)
    plain, jacobi, blocks = (cg_ex(A, b, method="cg", preconditioner=p) for p in (None, "jacobi", 8))
    assert (jacobi.iterations < plain.iterations).all() and (blocks.iterations <= jacobi.iterations + 2).all()
    callable_form = cg_ex(dense_product, b, params=(A,), preconditioner=lambda r: r / A.diagonal(dim1=-2, dim2=-1))
    assert (callable_form.iterations - jacobi.iterations).abs().max() <= 2


def test_columns_are_systems_of_their_own(backend):
    g = generator()
    A, b = spread(g, (2,), 8), torch.randn(2, 8, 3, dtype=torch.float64, generator=g)
    b[0, :, 1] = 0
    found = cg_ex(A, b, rtol=torch.tensor([1e-12, 1e-12, 1e-2], dtype=torch.float64))
    assert found.info.shape == (2, 3) and (found.info == 0).all()
    assert found.iterations[0, 1] == 0 and (found.iterations[:, 2] < found.iterations[:, 0]).all()
    one_by_one = torch.stack([cg(A, b[..., k]) for k in range(2)], -1)
    torch.testing.assert_close(found.x[..., :2], one_by_one, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)])
def test_nothing_to_solve(shape, backend):
    A = torch.zeros(*shape, shape[-1], requires_grad=True)
    found = cg_ex(A, torch.zeros(shape))
    assert found.x.shape == shape and found.info.shape == shape[:1] and (found.info == 0).all()
    assert torch.autograd.grad(found.x.sum(), A)[0].shape == A.shape


def test_select_solver():
    assert select_solver(torch.zeros(400, 400)) == "cholesky"
    assert select_solver(torch.zeros(400, 400), maxiter=100) == "cg"
    assert select_solver(torch.zeros(64, 64)) == "cg"
    assert select_solver(torch.zeros(2, 64, 64), columns=64) == "cholesky"
    assert select_solver(dense_product) == "cg"
    with pytest.raises(ValueError, match=r"stablekern.select_solver: `A` must be square in `n`"):
        select_solver(torch.zeros(3, 4))


@pytest.mark.parametrize("method", ["auto", "cholesky"])
def test_cholesky_leaves_the_rest_to_cg(method, backend):
    """A matrix that does not factor, between two that do: CG solves what can be solved, the status is the same."""
    g = generator()
    A = spread(g, (3,), 220)
    A[1] = 0
    A[1].diagonal()[:] = torch.arange(220).clamp(max=3).double()
    b = torch.randn(3, 220, dtype=torch.float64, generator=g)
    b[1, 0] = 0
    found = cg_ex(A, b, method=method, rtol=1e-10)
    assert (found.info == 0).all() and found.iterations[0] <= 1 and found.iterations[1] > 0
