"""Functions and classes of the complex-valued language model SEM by this package's ops.

    stablekern.swap("sem.propagator.cg_solver")  # a module of it, or its name

| name | computed by | what differs |
|---|---|---|
| `ComplexAdamW` | `optim.ComplexAdamW` | the gain of the Langevin noise is bounded; a counter-based stream |
| `cg_solve`, `cg_solve_sparse` | `cg`, `method="cgne"` | right for operators that are not Hermitian; exact \
adjoint (also of what `matvec_fn` holds) in place of a straight-through one; each row to its own tolerance |
| `complex_parallel_scan`, `complex_parallel_scan_chunked` | `linear_scan` | any length; nothing is divided by \
products of decays |
| `small_cayley` | `small_cayley` | no explicit inverse |
| `ComplexRMSNorm` | `nn.ComplexRMSNorm` | eps under the root: a zero token has a finite gradient |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from stablekern import optim
from stablekern._swap import Known
from stablekern.nn.complex_layers import ComplexRMSNorm
from stablekern.ops.cg import cg
from stablekern.ops.linear_scan import linear_scan
from stablekern.ops.small_cayley import small_cayley as _small_cayley

__all__ = ["FUNCTIONS", "METHODS", "ComplexAdamW", "cg_solve", "cg_solve_sparse", "complex_parallel_scan"]


class ComplexAdamW(optim.ComplexAdamW):
    """`stablekern.optim.ComplexAdamW` with SEM's arguments and defaults.

    Two real parameters that its layers have tagged as one complex parameter (`_complex_partner`, `_is_complex_real`)
    are a pair, if both are in one group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        temperature: float = 1e-4,
    ) -> None:
        params = [
            {**entry, "params": _listed(entry["params"])} if isinstance(entry, dict) else entry for entry in params
        ]
        flat = [p for entry in params for p in (entry["params"] if isinstance(entry, dict) else [entry])]
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in flat]
        pairs = [(p, p._complex_partner) for p in tensors if getattr(p, "_is_complex_real", False)]
        super().__init__(params, lr, betas, eps, weight_decay, temperature=temperature, pairs=pairs)


def _listed(params: Any) -> list[Any]:
    return [params] if isinstance(params, Tensor) else list(params)


def cg_solve(A: Tensor, b: Tensor, max_iter: int = 20, tol: float = 1e-6) -> Tensor:  # (D, D), (..., D)
    columns = b.reshape(-1, A.shape[-1]).mT
    return cg(A, columns, method="cgne", rtol=tol, maxiter=max_iter).mT.reshape(b.shape)


class _Implicit(torch.autograd.Function):
    """0, with the gradient of A^-1 r: added to a solution, it carries the gradient of the solution."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, solve_transposed: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solve = solve_transposed
        return torch.zeros_like(residual)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.solve(grad), None


def cg_solve_sparse(
    matvec_fn: Callable[[Tensor], Tensor],  # (..., D, 2) -> (..., D, 2), linear
    b: Tensor,  # (..., D, 2), real and imaginary parts
    max_iter: int = 20,
    tol: float = 1e-6,
    precond: Callable[[Tensor], Tensor] | None = None,
    x0: Tensor | None = None,
) -> Tensor:
    r"""Solve with any regular operator; the gradients of `b` and of all that `matvec_fn` is computed from are exact.

    With $x$ the solution and $r = b - A x$ written out at that $x$, $x + A^{-1} r$ has the value of $x$ and, by one
    solve with $A^T$, its gradient. `precond` is not used: squared, the operator needs none.
    """
    pair = b.shape[-2:]

    def product(v: Tensor) -> Tensor:
        out = matvec_fn(v.unflatten(-1, pair)).flatten(-2)
        return out if v.requires_grad else out.detach()

    def transposed(w: Tensor) -> Tensor:
        with torch.enable_grad():
            v = torch.zeros_like(w, requires_grad=True)
            out = matvec_fn(v.unflatten(-1, pair)).flatten(-2)
            (found,) = torch.autograd.grad(out, v, w, create_graph=w.requires_grad)
        return found if w.requires_grad else found.detach()

    def solve(operator: Callable[[Tensor], Tensor], side: Tensor, start: Tensor | None = None) -> Tensor:
        return cg(operator, side, x0=start, method="cgne", rtol=tol, maxiter=max_iter)

    with torch.no_grad():
        x = solve(product, b.flatten(-2), None if x0 is None else x0.flatten(-2)).unflatten(-1, pair)
    if not torch.is_grad_enabled():
        return x
    residual = (b - matvec_fn(x)).flatten(-2)
    return x + _Implicit.apply(residual, lambda g: solve(transposed, g.contiguous())).unflatten(-1, pair)


def complex_parallel_scan(
    A_r: Tensor, A_i: Tensor, X_r: Tensor, X_i: Tensor, chunk_size: int | None = None, strategy: str | None = None
) -> tuple[Tensor, Tensor]:  # (B, S, D) each
    """`chunk_size` and `strategy` change nothing."""
    h = linear_scan(torch.complex(A_r.float(), A_i.float()).mT, torch.complex(X_r.float(), X_i.float()).mT).mT  # type: ignore[union-attr]
    return h.real.to(X_r.dtype), h.imag.to(X_i.dtype)


def small_cayley(A_r: Tensor, A_i: Tensor, eye: Tensor | None = None) -> tuple[Tensor, Tensor]:  # (n, b, b) each
    U = _small_cayley(torch.complex(A_r, A_i))
    return U.real, U.imag


_SCAN = "A_r, A_i, X_r, X_i"
FUNCTIONS: dict[str, Known] = {
    "ComplexAdamW": Known(
        ComplexAdamW, ("params, lr, betas, eps, weight_decay, temperature",), "the noise gain is bounded"
    ),
    "cg_solve": Known(cg_solve, ("A, b, max_iter, tol",), "CGNE: right for I + iaH too"),
    "cg_solve_sparse": Known(
        cg_solve_sparse,
        ("matvec_fn, b, max_iter, tol, precond, x0",),
        "CGNE and the exact adjoint; no preconditioner",
    ),
    "complex_parallel_scan": Known(complex_parallel_scan, (_SCAN, f"{_SCAN}, chunk_size, strategy")),
    "complex_parallel_scan_chunked": Known(
        complex_parallel_scan, (f"{_SCAN}, chunk_size", f"{_SCAN}, chunk_size, strategy"), "not in chunks"
    ),
    "small_cayley": Known(small_cayley, ("A_r, A_i, eye",)),
    "ComplexRMSNorm": Known(ComplexRMSNorm, ("dim, eps",), "its parameter is called `scale`"),
    "chebyshev_kpm_solve": Known(
        None, refused="its coefficients are made elsewhere, for one interval; see stablekern.cayley_step"
    ),
    "CayleySolitonPropagator": Known(None, refused="see stablekern.nn.CayleyPropagator, which has other parameters"),
}
METHODS: dict[str, dict[str, Known]] = {}
