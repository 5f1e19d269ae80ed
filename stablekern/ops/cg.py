r"""Systems of linear equations by conjugate gradients: many at once, each to its own tolerance, differentiable.

For a Hermitian positive definite $A$ and $r_0 = b - A x_0$, $p_0 = z_0 = M r_0$ with a preconditioner $M$,

$$\alpha = \frac{\langle r, z\rangle}{\langle p, A p\rangle}, \quad x \mathrel{+}= \alpha p, \quad
r \mathrel{-}= \alpha A p, \quad z = M r, \quad
\beta = \frac{\langle r, z\rangle_{\rm new}}{\langle r, z\rangle}, \quad p = z + \beta p.$$

With $\langle u, v\rangle = u^H v$ this is CG; with $u^T v$, no inner product but all that the recurrence needs, it is
COCG for $A = A^T$ complex; CGNE (Craig) takes $z = A^H r$, $\langle r, r\rangle$ for $\langle r, z\rangle$ and
$\langle p, p\rangle$ for $\langle p, A p\rangle$, for any regular $A$, at two products an iteration and the square of
the condition number. CG on a matrix that is not Hermitian converges to nothing: such a matrix is refused.

**Stability.** The recurrence for $r$ drifts from $b - A x$, and after it has fallen by $1/\epsilon$ says nothing.
There, and where it claims to be done, the true residual is taken; a system above its tolerance starts again from it
while it still halves. $A$, $b$ and each start's $r$ are scaled by powers of two to the size of 1, so that no square
over- or underflows. A system that is done is left alone: 0/0 is what its recurrence would come to.

**Adjoint.** $x = A^{-1} b$ is differentiated, not the iteration: with $A^H \lambda = \bar x$, solved to the same
relative tolerance, $\bar b = \lambda$ and $\bar A = -\lambda x^H$, of which a Hermitian $A$ takes the Hermitian part
and a symmetric one the symmetric part. The values of a sparse matrix take their entries of it; the parameters
$\theta$ of a callable take the gradient of $-\mathrm{Re}\,\lambda^H A(\theta) x$ at constant $\lambda$ and $x$.
For COCG $A^H \lambda = \bar x$ is $A \bar\lambda = \overline{\bar x}$, with conjugates for bars on both sides.

Sources: Hestenes and Stiefel 1952; van der Vorst and Melissen 1990 (COCG); Saad, Iterative Methods for Sparse Linear
Systems, secs. 6.7 and 8.3 (CGNE); Greenbaum 1997 and Strakos and Tichy 2002 (attainable accuracy, true residuals).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablekern import _check, _krylov, _load, numerics
from stablekern import _linear_systems as _systems
from stablekern._krylov import ASYMMETRIC, METHODS, NON_FINITE
from stablekern._registry import apply, define, direct, launcher
from stablekern.errors import message
from stablekern.ops import chol_solve_safe

__all__ = ["CgResult", "cg", "cg_ex", "select_solver"]

_OP = "cg"
_CG, _COCG, _CGNE = range(3)
_DENSE_ROWS, _LANE_VECTORS, _LANE_ELEMENTS = 1024, 9, 2**18  # what the native kernels' memory is bounded by
_MOST = 2**63 - 1  # what a schema's int holds
_CALLABLE_LOOKS = 8  # iterations between two looks at a flag on a GPU
_warned = False


class CgResult(NamedTuple):
    """x like b; per system, with the shape of b less its dimension of n: a status and the iterations, both int32, and
    the norm of b - A x."""

    x: Tensor
    info: Tensor
    iterations: Tensor
    residual: Tensor


def reference(A: Tensor, b: Tensor) -> Tensor:
    """The definition."""
    return torch.linalg.solve(A, b)


# ---- dense matrices -----------------------------------------------------------------------------------------------


def _fake_fwd(A: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    info = torch.empty(b.shape[:2], dtype=torch.int32, device=b.device)
    residual = torch.empty_like(info, dtype=_systems.REAL_OF[b.dtype])
    return torch.empty_like(b, memory_format=torch.contiguous_format), info, torch.empty_like(info), residual


def _fake_bwd(adjoint: Tensor, x: Tensor, method: int) -> Tensor:
    batch, _, n = x.shape
    return torch.empty((batch, n, n), dtype=x.dtype, device=x.device)


# A (m, n, n); b, x0 and x (m, k, n): k right-hand sides for each matrix, as rows. `blocks` (m, c, s, s) are the
# preconditioner's, along the diagonal. Tolerances have one element, or one per system. `asymmetry`, relative to the
# largest entry, is what passes for rounding.
define(
    "cg_fwd(Tensor A, Tensor b, Tensor? x0, Tensor? blocks, Tensor rtol, Tensor atol, int maxiter, int method,"
    " float asymmetry) -> (Tensor x, Tensor info, Tensor iterations, Tensor residual)",
    fake=_fake_fwd,
)
# The sum over k of -adjoint x^H, or its Hermitian or symmetric part.
_bwd = define("cg_bwd(Tensor adjoint, Tensor x, int method) -> Tensor grad_A", fake=_fake_bwd)


def _native_reason(A: Tensor, *_: Any) -> str | None:
    n = A.shape[-1]
    return None if n <= _DENSE_ROWS else f"n = {n} is above {_DENSE_ROWS}, where a thread's matrix leaves the caches"


def _triton_reason(A: Tensor, *_: Any) -> str | None:
    n = A.shape[-1]
    return None if n <= _DENSE_ROWS else f"n = {n} is above {_DENSE_ROWS}: vectors would not stay in registers"


@launcher("cg_fwd", device="cpu", backend="native", supports=_native_reason)
def _(A: Tensor, b: Tensor, x0: Tensor | None, blocks: Tensor | None, *limits: Any) -> tuple[Tensor, ...]:
    outputs = _fake_fwd(A, b)
    inputs = (None if t is None else t.resolve_conj().contiguous() for t in (A, b, x0, blocks))
    _load.native().cg_fwd(*inputs, *limits, *outputs)
    return outputs


@launcher("cg_bwd", device="cpu", backend="native")
def _(adjoint: Tensor, x: Tensor, method: int) -> Tensor:
    grad = _fake_bwd(adjoint, x, method)
    _load.native().cg_bwd(adjoint.resolve_conj().contiguous(), x.resolve_conj().contiguous(), method, grad)
    return grad


@launcher("cg_fwd", device="cuda", backend="triton", supports=_triton_reason)
@launcher("cg_fwd", device="cpu", backend="triton", supports=_triton_reason)
def _(A: Tensor, b: Tensor, x0: Tensor | None, blocks: Tensor | None, *limits: Any) -> tuple[Tensor, ...]:
    from stablekern.triton_kernels.cg import cg_fwd

    outputs = _fake_fwd(A, b)
    inputs = (None if t is None else t.resolve_conj().contiguous() for t in (A, b, x0, blocks))
    cg_fwd(*inputs, *limits, *outputs)
    return outputs


@launcher("cg_bwd", device="cuda", backend="triton", supports=_triton_reason)
@launcher("cg_bwd", device="cpu", backend="triton", supports=_triton_reason)
def _(adjoint: Tensor, x: Tensor, method: int) -> Tensor:
    from stablekern.triton_kernels.cg import cg_bwd

    grad = _fake_bwd(adjoint, x, method)
    cg_bwd(adjoint.resolve_conj().contiguous(), x.resolve_conj().contiguous(), method, grad)
    return grad


def _column(tolerance: Tensor, b: Tensor) -> Tensor:
    """One element for each row of b (..., n), or one for all; with the dimensions of b either way."""
    return tolerance.reshape(*b.shape[:-1], 1) if tolerance.numel() > 1 else tolerance.reshape([1] * b.dim())


def _block_product(blocks: Tensor, n: int) -> Callable[[Tensor], Tensor]:
    """Rows (m, k, n) times block-diagonal matrices (m, c, s, s)."""
    count, size = blocks.shape[1:3]

    def product(r: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(r, (0, count * size - n)).unflatten(-1, (count, size, 1))
        return (blocks[:, None] @ padded).flatten(-3)[..., :n]

    return product


def _in_torch(
    entries: Tensor,  # (m, ...) of A
    forms: Callable[[Tensor], tuple[Callable, Callable | None, Tensor, Tensor | None]],
    b: Tensor,
    x0: Tensor | None,
    blocks: Tensor | None,
    rtol: Tensor,
    atol: Tensor,
    maxiter: int,
    method: int,
) -> tuple[Tensor, ...]:
    """What the torch launchers share. `forms` makes of the entries, of size 1: v to A v and to A^H v, which of the
    matrices (m, 1, 1) are not what the method needs, and how large the sign of that may be by rounding."""
    if b.numel() == 0:
        return _krylov.nothing(b)
    size = _krylov.size_of(entries.flatten(1))
    exponent = _krylov.exponent_of(size)
    product, adjoint, crooked, symmetry = forms(
        _krylov.times_power(entries, exponent.neg().view(-1, *[1] * (entries.dim() - 1)))
    )
    info = torch.where(torch.isfinite(size)[..., None], torch.where(crooked, ASYMMETRIC, 0), NON_FINITE)
    exponent = exponent[..., None]
    preconditioner = None
    if blocks is not None:
        preconditioner = _block_product(_krylov.times_power(blocks, exponent[..., None]), b.shape[-1])
    operator = _krylov.Operator(product, exponent, adjoint, preconditioner)
    control = _krylov.Control(_column(rtol, b), _column(atol, b), maxiter, int(b.device.type == "cpu"))
    return tuple(_krylov.solve(operator, b, x0, control, method, info.expand(*b.shape[:2], 1), symmetry))


@launcher("cg_fwd", device="cuda", backend="torch")
@launcher("cg_fwd", device="cpu", backend="torch")
def _(A: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *others, method, asymmetry = rest

    def forms(A: Tensor):
        gap = A - (A.mT if method == _COCG else A.mH)
        limit = asymmetry * _krylov.size_of(A.flatten(1))
        crooked = (_krylov.size_of(gap.flatten(1)) > limit)[..., None] & (method != _CGNE)
        return lambda v: v @ A.mT, lambda v: v @ A.conj(), crooked, None

    return _in_torch(A, forms, b, *others, method)  # type: ignore[call-arg]


@launcher("cg_bwd", device="cuda", backend="torch")
@launcher("cg_bwd", device="cpu", backend="torch")
def _(adjoint: Tensor, x: Tensor, method: int) -> Tensor:
    grad = -(adjoint.mT @ x.conj())
    if method == _CG:
        grad = chol_solve_safe.hermitised(grad)
    elif method == _COCG:
        grad = torch.add(grad / 2, grad.mT, alpha=0.5)
    return grad.contiguous()


# ---- sparse matrices ----------------------------------------------------------------------------------------------


def _fake_csr_fwd(crow: Tensor, col: Tensor, values: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fake_fwd(values, b)


def _fake_csr_bwd(crow: Tensor, col: Tensor, adjoint: Tensor, x: Tensor) -> Tensor:
    return torch.empty((x.shape[0], col.shape[0]), dtype=x.dtype, device=x.device)


# As cg_fwd, for one pattern crow (n + 1), col (nnz), and values (m, nnz).
define(
    "cg_csr_fwd(Tensor crow, Tensor col, Tensor values, Tensor b, Tensor? x0, Tensor? blocks, Tensor rtol, Tensor atol,"
    " int maxiter, int method, float asymmetry) -> (Tensor x, Tensor info, Tensor iterations, Tensor residual)",
    fake=_fake_csr_fwd,
)
# The entries of the sum over k of -adjoint x^H.
_csr_bwd = define(
    "cg_csr_bwd(Tensor crow, Tensor col, Tensor adjoint, Tensor x) -> Tensor grad_values", fake=_fake_csr_bwd
)


def _csr_native_reason(crow: Tensor, col: Tensor, values: Tensor, b: Tensor, *_: Any) -> str | None:
    """A system takes a lane, so that all vectors are as many times as long."""
    size = len(col) + _LANE_VECTORS * b.shape[-1]
    return None if size <= _LANE_ELEMENTS else f"a system of {size} numbers is too large to share registers with others"


@launcher("cg_csr_fwd", device="cpu", backend="native", supports=_csr_native_reason)
def _(crow: Tensor, col: Tensor, values: Tensor, b: Tensor, x0: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    outputs = _fake_fwd(values, b)
    blocks, *limits = rest
    inputs = (None if t is None else t.resolve_conj().contiguous() for t in (crow, col, values, b, x0, blocks))
    _load.native().cg_csr_fwd(*inputs, *limits, *outputs)
    return outputs


@launcher("cg_csr_fwd", device="cuda", backend="triton", supports=lambda crow, col, values, b, *_: _triton_reason(b))
@launcher("cg_csr_fwd", device="cpu", backend="triton", supports=lambda crow, col, values, b, *_: _triton_reason(b))
def _(crow: Tensor, col: Tensor, values: Tensor, b: Tensor, x0: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    from stablekern.triton_kernels.cg import cg_csr_fwd

    outputs = _fake_fwd(values, b)
    blocks, *limits = rest
    matrix = [t.resolve_conj().contiguous() for t in (crow, col, values)]
    adjoint = _csr_adjoint(*matrix) if limits[3] == _CGNE else matrix
    inputs = (None if t is None else t.resolve_conj().contiguous() for t in (b, x0, blocks))
    cg_csr_fwd(*matrix, [t.resolve_conj().contiguous() for t in adjoint], *inputs, *limits, *outputs)
    return outputs


@launcher("cg_csr_bwd", device="cpu", backend="native")
def _(crow: Tensor, col: Tensor, adjoint: Tensor, x: Tensor) -> Tensor:
    grad = _fake_csr_bwd(crow, col, adjoint, x)
    _load.native().cg_csr_bwd(*(t.resolve_conj().contiguous() for t in (crow, col, adjoint, x)), grad)
    return grad


@launcher("cg_csr_bwd", device="cuda", backend="triton")
@launcher("cg_csr_bwd", device="cpu", backend="triton")
def _(crow: Tensor, col: Tensor, adjoint: Tensor, x: Tensor) -> Tensor:
    from stablekern.triton_kernels.cg import cg_csr_bwd

    grad = _fake_csr_bwd(crow, col, adjoint, x)
    vectors = (t.resolve_conj().contiguous() for t in (adjoint, x))
    cg_csr_bwd(_systems.rows_of(crow, len(col)), col.contiguous(), *vectors, grad)
    return grad


def _row_sums(entries: Tensor, crow: Tensor) -> Tensor:
    """(..., nnz) to (..., n), in the order of the entries."""
    last = chol_solve_safe.components(entries.movedim(-1, 0).contiguous())
    sums = torch.segment_reduce(last, "sum", offsets=crow, axis=0, unsafe=True, initial=0)
    return (torch.view_as_complex(sums) if entries.is_complex() else sums).movedim(0, -1)


def _csr_product(crow: Tensor, col: Tensor, values: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: _row_sums(values[:, None] * v[..., col], crow)


def _csr_adjoint(crow: Tensor, col: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A^H of A, both in CSR."""
    order = torch.argsort(col, stable=True)
    starts = torch.arange(len(crow), device=col.device)
    return torch.searchsorted(col[order], starts), _systems.rows_of(crow, len(col))[order], values[:, order].conj()


@launcher("cg_csr_fwd", device="cuda", backend="torch")
@launcher("cg_csr_fwd", device="cpu", backend="torch")
def _(crow: Tensor, col: Tensor, values: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *others, method, asymmetry = rest

    def forms(values: Tensor):
        adjoint = _csr_product(*_csr_adjoint(crow, col, values)) if method == _CGNE else None
        longest = _row_sums(values.abs(), crow).amax(-1)[:, None, None]  # a bound of the norm
        return (
            _csr_product(crow, col, values),
            adjoint,
            torch.zeros_like(longest, dtype=torch.bool),
            asymmetry * longest,
        )

    return _in_torch(values, forms, b, *others, method)  # type: ignore[call-arg]


@launcher("cg_csr_bwd", device="cuda", backend="torch")
@launcher("cg_csr_bwd", device="cpu", backend="torch")
def _(crow: Tensor, col: Tensor, adjoint: Tensor, x: Tensor) -> Tensor:
    return -(adjoint[..., _systems.rows_of(crow, len(col))] * x[..., col].conj()).sum(1)


# ---- differentiation ----------------------------------------------------------------------------------------------


def _default_rtol(dtype: torch.dtype) -> float:
    return numerics.CG_RTOL.value ** (2 if _systems.REAL_OF[dtype] == torch.float64 else 1)


def _run(form: str, tensors: Sequence[Tensor], b: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    name = "cg_fwd" if form == "dense" else "cg_csr_fwd"
    return direct(name, *tensors, b, *rest, numerics.CG_ASYMMETRY_ULPS.of(b.dtype))


def _start(A: Tensor, U: Tensor, failed: Tensor, b: Tensor) -> Tensor:
    """The solution by Cholesky factors, with which the iteration has nothing left to do; 0 where there are none."""
    with torch.no_grad():
        return chol_solve_safe.solve(A, b.mT, U, failed).mT.masked_fill(failed[:, None, None], 0.0)


def _without_failed(v: Tensor, info: Tensor) -> Tensor:
    """0 for systems without a solution: what is asked of them has no gradient, and NaN must not spread."""
    return v.masked_fill((info >= NON_FINITE)[..., None], 0.0)


def _adjoint_tolerances(rtol: Tensor, atol: Tensor) -> tuple[Tensor, Tensor]:
    """The same relative one, the default in place of 0; an absolute one is in the units of b."""
    return torch.where(rtol > 0, rtol, _default_rtol(rtol.dtype)), torch.zeros_like(atol)


class _Cg(torch.autograd.Function):
    """`form`: "dense" for `tensors` A; "csr" for crow, col, values. U: Cholesky factors, of which some `failed`, for
    the first guess of the adjoint."""

    @staticmethod
    def forward(form, U, failed, b, x0, blocks, rtol, atol, maxiter, method, *tensors) -> tuple[Tensor, ...]:
        return _run(form, tensors, b, x0, blocks, rtol, atol, maxiter, method)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.form, U, failed, _, _, blocks, rtol, atol, *ctx.limits = inputs[:10]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(U, failed, blocks, rtol, atol, *output[:2], *inputs[10:])

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        _check.first_order(_OP)
        U, failed, blocks, rtol, atol, x, info, *tensors = ctx.saved_tensors
        maxiter, method = ctx.limits
        grad = _without_failed(grad, info)
        start = None if U is None else _start(*tensors, U, failed, grad)  # type: ignore[call-arg]
        system = tensors
        if method == _CGNE:
            system = (tensors[0].mH,) if ctx.form == "dense" else _csr_adjoint(*tensors)
        side = grad.conj() if method == _COCG else grad
        tolerances = _adjoint_tolerances(rtol, atol)
        adjoint = _run(ctx.form, system, side, start, blocks, *tolerances, maxiter, method)[0]
        adjoint = adjoint.conj() if method == _COCG else adjoint
        by_matrix = None
        if ctx.needs_input_grad[-1]:
            x = _without_failed(x, info)
            by_matrix = _bwd(adjoint, x, method) if ctx.form == "dense" else _csr_bwd(*tensors[:2], adjoint, x)
        return None, None, None, adjoint, *[None] * (5 + len(tensors)), by_matrix


class _CgCallable(torch.autograd.Function):
    """A is `form`, a function of rows and `params`: no schema, so not for the dispatcher."""

    @staticmethod
    def forward(form: _Callable, b, x0, rtol, atol, maxiter, method, *params) -> tuple[Tensor, ...]:
        return tuple(form.solve(b, x0, rtol, atol, maxiter, method, params, transposed=False))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.form, _, _, rtol, atol, *ctx.limits = inputs[:7]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(rtol, atol, *output[:2], *inputs[7:])

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        _check.first_order(_OP)
        rtol, atol, x, info, *params = ctx.saved_tensors
        maxiter, method = ctx.limits
        grad = _without_failed(grad, info)
        side = grad.conj().resolve_conj() if method == _COCG else grad
        tolerances = _adjoint_tolerances(rtol, atol)
        adjoint = ctx.form.solve(side, None, *tolerances, maxiter, method, params, transposed=True).x
        adjoint = adjoint.conj().resolve_conj() if method == _COCG else adjoint
        by_params = ctx.form.gradients(_without_failed(x, info), adjoint, params, ctx.needs_input_grad[7:])
        return None, adjoint, *[None] * 5, *by_params


class _Callable(NamedTuple):
    """A(v, *params) and M(r) on rows (..., n), and the size of A, (..., 1), as one product has shown it."""

    function: Callable[..., Tensor]
    preconditioner: Callable[[Tensor], Tensor] | None
    size: Tensor

    def solve(self, b, x0, rtol, atol, maxiter: int, method: int, params, *, transposed: bool) -> _krylov.Outcome:
        if b.numel() == 0:
            return _krylov.nothing(b)
        exponent = _krylov.exponent_of(self.size)

        def product(v: Tensor) -> Tensor:
            return _krylov.times_power(self.function(v, *params), -exponent)

        given = self.preconditioner

        def preconditioner(r: Tensor) -> Tensor:
            z = r if given is None else _like_its_argument("preconditioner", given(r), r)
            return _krylov.times_power(z, exponent)

        forward: Callable[[Tensor], Tensor] = product
        adjoint: Callable[[Tensor], Tensor] | None = None
        if method == _CGNE:
            adjoint = self._adjoint(b, params, exponent)
            if transposed:
                forward, adjoint = adjoint, forward
        operator = _krylov.Operator(forward, exponent, adjoint, given and preconditioner)
        looks = 1 if b.device.type == "cpu" else 0 if torch.cuda.is_current_stream_capturing() else _CALLABLE_LOOKS
        control = _krylov.Control(_column(rtol, b), _column(atol, b), maxiter, looks)
        info = torch.where(torch.isfinite(self.size), 0, NON_FINITE)
        # The size is that of A on one vector: |A| may be n^1/2 times that.
        symmetry = torch.full_like(self.size, numerics.CG_ASYMMETRY_ULPS.of(b.dtype) * b.shape[-1] ** 0.5)
        return _krylov.solve(operator, b, x0, control, method, info, symmetry)

    def _adjoint(self, like: Tensor, params, exponent: Tensor) -> Callable[[Tensor], Tensor]:
        with torch.enable_grad():
            v = torch.zeros_like(like, requires_grad=True)
            out = self.function(v, *params)
        return lambda w: _krylov.times_power(torch.autograd.grad(out, v, w, retain_graph=True)[0], -exponent)

    def gradients(self, x: Tensor, adjoint: Tensor, params, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Those of -Re adjoint^H A x with respect to the parameters."""
        leaves = [p.detach().requires_grad_(need) for p, need in zip(params, wanted, strict=True)]
        chosen = [leaf for leaf in leaves if leaf.requires_grad]
        if not chosen:
            return [None] * len(leaves)
        with torch.enable_grad():
            out = self.function(x, *leaves)
        found = iter(torch.autograd.grad(out, chosen, -adjoint, allow_unused=True))
        return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _like_its_argument(name: str, out: Any, v: Tensor) -> Tensor:
    """What the caller's function `name` made of `v`: a tensor of the same shape and dtype."""
    if not isinstance(out, Tensor) or out.shape != v.shape or out.dtype != v.dtype:
        got = f"{tuple(out.shape)} {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(message(_OP, f"`{name}` must map {tuple(v.shape)} {v.dtype} to its like", got))
    return out


def _probed(A: Callable[..., Tensor], b: Tensor, params: tuple[Tensor, ...]) -> Tensor:
    """|A u| / |u| (..., 1) for one vector u that no structure is likely to know."""
    index = torch.arange(b.shape[-1], device=b.device, dtype=torch.float64)
    u = torch.cos(index.square()).to(b.dtype).expand(b.shape).contiguous()
    with torch.enable_grad():
        out = A(u, *(p.detach() for p in params))
    _like_its_argument("A", out, b)
    if out.requires_grad:
        rule = "`A` must take what it is differentiated for through `params`: of what it holds itself no gradient comes"
        raise ValueError(message(_OP, rule, "a result that requires grad"))
    return _krylov.norm_of(out) / _krylov.norm_of(u)


def select_solver(A: Any, *, columns: int = 1, maxiter: int | None = None) -> str:
    r"""What `method="auto"` takes: `"cholesky"` or `"cg"`.

    A factorisation serves all right-hand sides; CG costs a product for each of them and iteration, of which `maxiter`
    are reckoned with, n if it is None. A factorisation takes as long as some 200 products, whatever n is (measured on a
    CPU): small matrices are factored at a fraction of the machine's speed, while a product runs at nearly all of it.
    Sparse matrices and callables are not factored. Nothing is read from `A` but its shape.

    **Arguments:** `A` as in `cg`; `columns`, right-hand sides for each matrix; `maxiter` as in `cg`. Both keyword only.

    **Returns:** the name, to be given as `method`.
    """
    if not isinstance(A, Tensor):
        return "cg"
    _check.required("select_solver", A=A)
    n = _check.shapes("select_solver", A=(A, "... n n"))["n"]
    _check.integer("select_solver", "columns", columns, low=0)
    steps = min(n, n if maxiter is None else _check.integer("select_solver", "maxiter", maxiter, low=0))
    return "cholesky" if numerics.CG_FACTOR_PRODUCTS.value < steps * columns else "cg"


def cg_ex(
    A: Tensor | Sequence[Tensor] | Callable[..., Tensor],  # (..., n, n)
    b: Tensor,  # (..., n) or (..., n, k)
    *,
    x0: Tensor | None = None,  # like b
    rtol: float | Tensor | None = None,
    atol: float | Tensor = 0.0,
    maxiter: int | None = None,
    preconditioner: str | int | Callable[[Tensor], Tensor] | None = None,
    method: str = "auto",
    params: Sequence[Tensor] = (),
) -> CgResult:
    r"""`cg` with a status for each system: `(x, info, iterations, residual)`; it neither warns nor raises for data.

    `info`, `iterations` (int32) and `residual` have the shape of `b` less its dimension of n. `residual` is
    $\|b - A x\|$ of the very x that is returned, not of the recurrence. `info` is 0 where that is within the
    tolerance. Else bit 0: more than `maxiter` iterations would be needed; bit 1: $\langle p, A p\rangle < 0$ was met,
    `A` is not positive definite; bit 2: breakdown, either $\langle p, A p\rangle = 0$ (singular) or the true residual
    did not halve any more, which is as far as the dtype goes; x is then the last iterate. Bit 3: a NaN or an infinity
    in what concerns this system; bit 4: `A` is not Hermitian (for `"cocg"`: not symmetric); x is then NaN, its
    gradient 0.
    """
    _check.choice(_OP, "method", method, ("auto", *METHODS, "cholesky"))
    dtype = _check.dtypes(_OP, _check.REAL + _check.COMPLEX, b=b)
    if b.dim() == 0:
        raise ValueError(message(_OP, "`b` must have the shape (..., n) or (..., n, k)", ()))
    given = isinstance(A, Tensor) or not callable(A)
    if not isinstance(params, (tuple, list)) or not all(isinstance(one, Tensor) for one in params):
        raise TypeError(message(_OP, "`params` must be a sequence of tensors", type(params).__name__))
    if isinstance(preconditioner, Tensor):
        raise TypeError(message(_OP, "`preconditioner` must be None, a name, a block size or a function", "a tensor"))
    if params and given:
        raise ValueError(message(_OP, "`params` are those of a callable `A`", type(A).__name__))
    if not given:
        form, shape = "callable", _systems.Shape(tuple(b.shape[:-1]), b.shape[-1], None, True)
    elif isinstance(A, Tensor):
        if A.layout != torch.strided:
            rule = "`A` must be dense, or (A.crow_indices(), A.col_indices(), A.values()) of a CSR matrix"
            raise TypeError(message(_OP, rule, A.layout))
        _check.dtypes(_OP, _check.REAL + _check.COMPLEX, b=b, A=A)
        form, shape = "dense", _systems.arranged(A.shape[:-2], _check.shapes(_OP, A=(A, "... n n"))["n"], b)
        tensors: tuple[Tensor, ...] = (shape.matrices(A, 2),)
    else:
        if not isinstance(A, Sequence) or len(A) != 3:
            raise TypeError(message(_OP, "`A` must be a tensor, (crow, col, values) or a callable", type(A).__name__))
        _check.dtypes(_OP, _check.REAL + _check.COMPLEX, b=b, A=A[2])
        form, shape = "csr", _systems.arranged(A[2].shape[:-1], _systems.pattern_size(*A), b)
        tensors = (A[0].long(), A[1].long(), shape.matrices(A[2], 1))
    if x0 is not None:
        _check.dtypes(_OP, _check.REAL + _check.COMPLEX, b=b, x0=x0)
        if x0.shape != b.shape:
            raise ValueError(message(_OP, "`x0` must have the shape of `b`", tuple(x0.shape), tuple(b.shape)))
    steps = 10 * shape.n if maxiter is None else _check.integer(_OP, "maxiter", maxiter, low=0, high=_MOST)
    if method == "auto":
        columns = shape.flat()[1]
        method = select_solver(A, columns=columns, maxiter=maxiter) if form == "dense" and not preconditioner else "cg"
    if method == "cholesky" and form != "dense":
        raise ValueError(message(_OP, '`method` "cholesky" needs a dense `A`', form))
    if method == "cgne" and preconditioner is not None:
        raise ValueError(message(_OP, '`method` "cgne" takes no `preconditioner`', repr(preconditioner)))
    code = METHODS.index("cg" if method == "cholesky" or (method == "cocg" and not dtype.is_complex) else method)
    rtol = _systems.tolerance("rtol", _default_rtol(dtype) if rtol is None else rtol, b, shape.systems())
    atol = _systems.tolerance("atol", atol, b, shape.systems())
    if form == "callable":
        if not (preconditioner is None or callable(preconditioner)):
            rule = "`preconditioner` of a callable `A` must be None or a callable"
            raise TypeError(message(_OP, rule, repr(preconditioner)))
        function = _Callable(A, preconditioner, _probed(A, b, tuple(params)))  # type: ignore[arg-type]
        start = None if x0 is None else x0.detach()
        return CgResult(*apply(_CgCallable, function, b, start, rtol, atol, steps, code, *params))
    rows, start = shape.rows(b), None if x0 is None else shape.rows(x0.detach())
    blocks = _systems.diagonal_inverse(preconditioner, form, tensors, shape.n)
    U = failed = None
    if method == "cholesky":
        found = chol_solve_safe.factor(tensors[0])
        U, failed = found.U, found.failed()
        start = _start(tensors[0], U, failed, rows)
    arguments = (rows, start, blocks, rtol, atol, steps, code)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *tensors)):
        x, *rest = apply(_Cg, form, U, failed, *arguments, *tensors)
    else:  # autograd's own bookkeeping takes as long as some thirty small systems
        x, *rest = _run(form, tensors, *arguments)
    return CgResult(shape.back(x), *(one.reshape(shape.systems()) for one in rest))


def _report(result: CgResult, b: Tensor, rtol: float | Tensor | None, atol: float | Tensor, method: str) -> None:
    """Refuse what is no matrix for CG; warn, once in a process, of a system that misses its tolerance by far."""
    global _warned
    if bool((result.info & ASYMMETRIC).any()):
        rule = "`A` must be symmetric for `method` \"cocg\"; \"cgne\" takes any" if method == "cocg" else (
            "`A` must be Hermitian: CG converges to nothing on other matrices, more iterations make it worse. Take "
            '`method` "cocg" if A equals its transpose, else "cgne"; (A + A.mH) / 2 if only rounding is in the way'
        )  # fmt: skip
        count = int((result.info >= ASYMMETRIC).sum())
        raise ValueError(message(_OP, rule, f"{count} of {result.info.numel()} systems that are not"))
    dim = -1 if result.info.dim() == 0 or result.x.shape[:-1] == result.info.shape else -2
    rtol = _default_rtol(b.dtype) if rtol is None else rtol
    # As floats: torch takes no integer beyond 64 bits.
    rtol, atol = (value if isinstance(value, Tensor) else float(value) for value in (rtol, atol))
    limit = torch.maximum(
        rtol * torch.linalg.vector_norm(b, dim=dim), torch.as_tensor(atol, dtype=_systems.REAL_OF[b.dtype])
    )
    missed = result.residual > numerics.CG_WARN_FACTOR.of() * limit
    if _warned or not bool(missed.any()):
        return
    _warned = True
    worst = int(torch.where(missed, result.residual / limit, 0.0).argmax())
    residual, wanted, steps, info = (
        t.broadcast_to(result.info.shape).reshape(-1)[worst].item() for t in (result.residual, limit, *result[2:0:-1])
    )
    text = (
        f"{int(missed.sum())} of {missed.numel()} systems did not converge; the worst has |b - A x| = {residual:.2g}, "
        f"tolerance {wanted:.2g}, after {steps} iterations, info {info} (`cg_ex` gives it for each; said once)"
    )
    warnings.warn(message(_OP, text), RuntimeWarning, stacklevel=3)


def cg(
    A: Tensor | Sequence[Tensor] | Callable[..., Tensor],  # (..., n, n)
    b: Tensor,  # (..., n) or (..., n, k)
    *,
    x0: Tensor | None = None,  # like b
    rtol: float | Tensor | None = None,
    atol: float | Tensor = 0.0,
    maxiter: int | None = None,
    preconditioner: str | int | Callable[[Tensor], Tensor] | None = None,
    method: str = "auto",
    params: Sequence[Tensor] = (),
) -> Tensor:  # like b
    r"""Solve $A x = b$ by conjugate gradients for many systems at once, each to its own tolerance.

    A system has converged when $\|b - A x\| \le \max(\mathrm{rtol}\,\|b\|, \mathrm{atol})$ for its true residual; it
    is then left alone while others go on. The gradient is that of $x = A^{-1} b$, by one solve with $A^H$, whatever
    number of iterations was taken.

    **Arguments:**

    - `A`: float32, float64, complex64 or complex128, Hermitian positive definite unless `method` says otherwise, in
        one of three forms. A dense tensor, whose batch dimensions broadcast with those of `b`. A CSR matrix
        `(crow, col, values)` with indices (n + 1), (nnz), and values (nnz) shared by all systems or (..., nnz) for
        each. Or a function `A(v, *params)`, linear in v (..., n), of the shape of `b`, working on each row by itself.
    - `b`: same dtype and device; vectors (..., n), or columns (..., n, k). As in torch.linalg.solve, it holds vectors
        if it has one dimension or the shape of `A` less its last one, else columns; with a callable always vectors.
    - `x0`: first guess, like `b`; not differentiated, since x does not depend on it. Default 0.
    - `rtol`, `atol`: numbers, or tensors that broadcast to one for each system. `rtol` is $10^{-6}$ in single and
        $10^{-12}$ in double precision by default.
    - `maxiter`: products with `A`, at most, for each system; 10 n by default.
    - `preconditioner`: `"jacobi"`, the inverse of the diagonal; an integer, the inverses of blocks of that size along
        it; or, for a callable `A`, a function of rows like `A`, Hermitian positive definite. Constant in the gradient.
    - `method`: `"cg"`; `"cocg"` for a complex `A` equal to its transpose; `"cgne"` for any regular `A`; `"cholesky"`
        for a dense `A`, with CG for what a factorisation leaves to do; or `"auto"`: what `select_solver` says.
    - `params`: tensors that a callable `A` is differentiated for.

    All but `A` and `b` are keyword only.

    **Returns:** x, a new tensor of the shape of `b`; 0 for a zero right-hand side. A system with a non-finite entry is
    NaN by itself, its gradient 0; one that has not converged is its last iterate. `cg_ex` says which, and a
    RuntimeWarning, once in a process, if on a CPU a residual is over ten times its tolerance; compiled code says
    nothing. Gradients: `A` gets the Hermitian part of the adjoint (symmetric for `"cocg"`), CSR values their entries.

    **Raises:** `ValueError` for shapes, tolerances or patterns that do not fit; on a CPU also for an `A` that is not
    Hermitian (dense: entry by entry; else by two products) and `method` needs it, which elsewhere makes x NaN.
    `TypeError` for other dtypes; `RuntimeError` when second derivatives are asked for.

    With tensors for `A` nothing waits for a GPU; above 1024 unknowns all `maxiter` iterations are run there, so set it.
    With a callable on a GPU the host reads a flag every 8 iterations; captured into a graph, all are recorded.

    **Accuracy:** $\|b - A x\|$ cannot fall below about $\epsilon\,\|A\|\,\|x\|$; where the tolerance asks for less,
    bit 2 of `info` says so. The relative error of x is at most the condition number times that of the residual.
    **Sources:** Hestenes and Stiefel 1952; van der Vorst and Melissen 1990; Saad 2003, secs. 6.7 and 8.3.
    """
    result = cg_ex(
        A, b, x0=x0, rtol=rtol, atol=atol, maxiter=maxiter, preconditioner=preconditioner, method=method, params=params
    )
    if _check.readable(result.info) and bool(result.info.count_nonzero()):
        _report(result, b.detach(), rtol, atol, method)
    return result.x
