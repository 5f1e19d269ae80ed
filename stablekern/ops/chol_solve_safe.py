r"""Solutions with Hermitian positive definite matrices, each item with the least diagonal shift that lets it factor.

$X = (H + j I)^{-1} A$, $H = \tfrac12(R + R^H)$, by Cholesky. For each matrix by itself $j$ is 0 if it factors as it
is, else the first of $4 \epsilon\,\mathrm{tr} H \cdot 10^m$, $m = 0, 1, \ldots$, and last a hundredth of the mean
eigenvalue, with which it does. So a covariance that has lost its definiteness to rounding is solved with a shift of
that size, a good one beside it is not touched, and a matrix that is not a covariance at all is NaN, not an exception.

The shift and the factor are constants in the backward, which is a solve with the same factor: for a cotangent $G$ of
$X$, $\bar A = H^{-1} G$ and $\bar H = -\bar A X^H$, where the derivative of a Cholesky factorisation would cost several
products of its size. A matrix that cannot be factored stands as the identity there, since the factor that LAPACK leaves
behind has zeros and worse on its diagonal and would give NaN for an incoming 0.

Sources: Higham, Accuracy and Stability of Numerical Algorithms, secs. 10.1 and 10.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablekern import _check, numerics

__all__ = ["CholSolveSafe", "chol_solve_safe"]

_OP = "chol_solve_safe"
_SHIFTED, _NON_FINITE, _INDEFINITE = 1, 2, 4  # bits of `info`


class CholSolveSafe(NamedTuple):
    """X (..., n, q), a status per matrix (...), int32, and the shift j that each was given (...)."""

    solution: Tensor
    info: Tensor
    jitter: Tensor


def reference(R: Tensor, A: Tensor, jitter: Tensor | float = 0.0) -> Tensor:
    """The definition, for a given shift (...)."""
    H = (R + R.mH) / 2
    shift = torch.as_tensor(jitter, dtype=H.dtype)[..., None, None]
    return torch.linalg.solve(H + shift * torch.eye(R.shape[-1], dtype=R.dtype, device=R.device), A)


def hermitised(R: Tensor) -> Tensor:
    """(R + R^H) / 2 without overflow."""
    return torch.add(R / 2, R.mH, alpha=0.5)


def trace_of(H: Tensor) -> Tensor:
    """The real trace (...) of (..., n, n)."""
    return H.diagonal(dim1=-2, dim2=-1).real.sum(-1)


def squared_modulus(M: Tensor) -> Tensor:
    """|M|^2 per entry, differentiable at 0."""
    return components(M).square().sum(-1) if M.is_complex() else M.square()


def components(M: Tensor) -> Tensor:
    """Real and imaginary parts in a last dimension, for complex `M`; real `M` itself."""
    return torch.view_as_real(M.resolve_conj()) if M.is_complex() else M


class _Solve(torch.autograd.Function):
    """H^-1 A of the same batch dimensions, L the Cholesky factor of H; differentiable any number of times."""

    @staticmethod
    def forward(H: Tensor, A: Tensor, L: Tensor) -> Tensor:
        return torch.cholesky_solve(A, L)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0], inputs[2], output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        H, L, X = ctx.saved_tensors
        grad_A = _Solve.apply(H, grad, L)
        return -grad_A @ X.mH if ctx.needs_input_grad[0] else None, grad_A, None


def solve(H: Tensor, A: Tensor, L: Tensor) -> Tensor:
    """H^-1 A by the factor of `factor`; batch dimensions broadcast."""
    batch = torch.broadcast_shapes(H.shape[:-2], A.shape[:-2])
    return _Solve.apply(*(M.expand(*batch, *M.shape[-2:]) for M in (H, A, L)))


def _cholesky(H: Tensor) -> tuple[Tensor, Tensor]:
    """The factors, and which of the matrices have none: whatever is not finite in a row ends on the diagonal."""
    L, code = torch.linalg.cholesky_ex(H)
    return L, (code != 0) | ~torch.isfinite(L.diagonal(dim1=-2, dim2=-1)).all(-1)


def factor(H: Tensor, shifts: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """H + j I, its Cholesky factor, which items have none, and j (...): 0, or the first of `shifts` that does.

    The factor is a constant: derivatives are taken through `solve`. Items without one are the identity, gradient 0.
    """
    # On a GPU, or in a traced graph, looking would stop the host: there all shifts are tried.
    looks = H.device.type == "cpu" and not torch.compiler.is_compiling()
    with torch.no_grad():
        L, failed = _cholesky(H)
        jitter = torch.zeros_like(trace_of(H))
        if looks and not failed.any():
            return H, L, failed, jitter
        eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
        for shift in shifts:
            jitter = torch.where(failed, shift, jitter)
            failed = failed & _cholesky(H + jitter[..., None, None] * eye)[1]
            if looks and not failed.any():
                break
    safe = torch.where(failed[..., None, None], eye, H + jitter[..., None, None] * eye)
    return safe, torch.linalg.cholesky_ex(safe.detach()).L, failed, jitter


def chol_solve_safe(
    R: Tensor,  # (..., n, n)
    A: Tensor,  # (..., n, q)
) -> CholSolveSafe:  # (..., n, q), (...), (...)
    r"""Solve $H X = A$ for Hermitian positive definite $H = (R + R^H)/2$, with a shift where the matrix needs one.

    **Arguments:**

    - `R`: float32, float64, complex64 or complex128; any strides and batch dimensions.
    - `A`: right-hand sides as columns, same dtype and device; batch dimensions broadcast with those of `R`.

    **Returns:** `(solution, info, jitter)`. `jitter` is the shift, in the units of `R`: 0, or the first of
    $4\epsilon\,\mathrm{tr}H \cdot 10^m$, and last $\mathrm{tr}H / 100 n$, with which the matrix factors. `info` (int32,
    one per matrix of `R`) is 0 for a matrix that was solved as it is; bit 0: it was shifted; bit 1: it has a non-finite
    entry; bit 2: no such shift made it definite. With bits 1 and 2 the solution is NaN, its gradient 0, and the shift
    0. No other item is touched. Differentiable with respect to `R` and `A`, any order; the shift is a constant.

    **Raises:** `ValueError` for shapes that do not fit, `TypeError` for other dtypes.

    **Accuracy:** backward stable for $H + jI$; the solution's relative error grows with the condition number of that.
    **Sources:** Higham, Accuracy and Stability of Numerical Algorithms, secs. 10.1 and 10.3.
    """
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, R=R, A=A)
    n = _check.shapes(_OP, R=(R, "... n n"), A=(A, "... n q"))["n"]
    H = hermitised(R)
    trace = trace_of(H.detach())
    size, limit = numerics.CHOLESKY_JITTER_ULPS.of(R.dtype) * n, numerics.CHOLESKY_JITTER_LIMIT.of()
    sizes = []
    while size < limit:
        sizes.append(size)
        size *= 10
    H, L, failed, jitter = factor(H, [size / max(n, 1) * trace for size in (*sizes, limit)])
    solution = solve(H, A, L)
    # What factored is finite.
    finite = ~failed if _check.readable(R) and not failed.any() else torch.isfinite(R).flatten(R.dim() - 2).all(-1)
    info = _SHIFTED * (~failed & (jitter > 0)) + _NON_FINITE * ~finite + _INDEFINITE * (failed & finite)
    return CholSolveSafe(
        solution.masked_fill(failed[..., None, None], torch.nan), info.to(torch.int32), jitter.masked_fill(failed, 0.0)
    )
