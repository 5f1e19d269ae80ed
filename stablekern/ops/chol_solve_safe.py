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

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablekern import _check, _load, numerics
from stablekern._registry import apply, define, launcher

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


def lapack_reason() -> str | None:
    """Why the native kernels cannot call LAPACK, or None."""
    if _load.native_reason("chol_solve_safe") is not None:
        return None  # whether the library is there at all is the registry's question
    return None if _load.native_module().lapack else "this torch exports no LAPACK"


def _fake_factor(R: Tensor, shifts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    batch, real = R.shape[0], R.dtype.to_real()
    info = torch.empty(batch, dtype=torch.int32, device=R.device)
    return torch.empty(R.shape, dtype=R.dtype, device=R.device), info, torch.empty(batch, dtype=real, device=R.device)


def _fake_solve(U: Tensor, A: Tensor, half: bool) -> Tensor:
    return torch.empty(A.shape, dtype=A.dtype, device=A.device)


# Matrices (b, n, n): U with U^H U the Hermitian part and a multiple, 0 or the first of `shifts` that serves, of its
# trace on the diagonal; the identity where none does. `info`, and the shift itself.
_factor = define(
    "chol_solve_safe_factor(Tensor R, float[] shifts) -> (Tensor U, Tensor info, Tensor jitter)", fake=_fake_factor
)
# U^-1 U^-H A, or U^-H A for `half`, with A (b, n, q).
_solve = define("chol_solve_safe_solve(Tensor U, Tensor A, bool half) -> Tensor", fake=_fake_solve)


@launcher("chol_solve_safe_factor", device="cpu", backend="native", supports=lambda *_: lapack_reason())
def _(R: Tensor, shifts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake_factor(R, shifts)
    sizes = torch.tensor(shifts, dtype=R.dtype.to_real())
    _load.native().cholesky_fwd(R.resolve_conj().contiguous(), sizes, *outputs)
    return outputs


@launcher("chol_solve_safe_solve", device="cpu", backend="native", supports=lambda *_: lapack_reason())
def _(U: Tensor, A: Tensor, half: bool) -> Tensor:
    X = _fake_solve(U, A, half)
    _load.native().cholesky_solve(U.contiguous(), A.resolve_conj().contiguous(), half, X)
    return X


def _cholesky(H: Tensor) -> tuple[Tensor, Tensor]:
    """The factors, and which of the matrices have none: whatever is not finite in a row ends on the diagonal."""
    U, code = torch.linalg.cholesky_ex(H, upper=True)
    return U, (code != 0) | ~torch.isfinite(U.diagonal(dim1=-2, dim2=-1)).all(-1)


@launcher("chol_solve_safe_factor", device="cuda", backend="torch")
@launcher("chol_solve_safe_factor", device="cpu", backend="torch")
def _(R: Tensor, shifts: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    H = hermitised(R)
    trace = trace_of(H)
    U, failed = _cholesky(H)
    jitter = torch.zeros_like(trace)
    looks = R.device.type == "cpu"  # on a GPU looking would stop the host: there all shifts are tried
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    for shift in shifts:
        if looks and not failed.any():
            break
        jitter = torch.where(failed, shift * trace, jitter)
        U, failed = _cholesky(H + jitter[:, None, None] * eye)
    finite = torch.isfinite(R).flatten(1).all(-1)
    info = _SHIFTED * (~failed & (jitter > 0)) + _NON_FINITE * ~finite + _INDEFINITE * (failed & finite)
    U = torch.where(failed[:, None, None], eye, U).contiguous()
    return U, info.to(torch.int32), jitter.masked_fill(failed, 0.0)


@launcher("chol_solve_safe_solve", device="cuda", backend="torch")
@launcher("chol_solve_safe_solve", device="cpu", backend="torch")
def _(U: Tensor, A: Tensor, half: bool) -> Tensor:
    if half:
        return torch.linalg.solve_triangular(U.mH, A, upper=False).contiguous()
    return torch.cholesky_solve(A, U, upper=True).contiguous()


class _Solve(torch.autograd.Function):
    """The Hermitian part of R, shifted, divided out of A: (b, n, n), (b, n, q), the factor, and which items have none;
    differentiable any number of times."""

    @staticmethod
    def forward(R: Tensor, A: Tensor, U: Tensor, failed: Tensor) -> Tensor:
        return _solve(U, A, False)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        R, _, U, failed = inputs
        ctx.save_for_backward(R, U, failed, output)

    @staticmethod
    def backward(ctx, grad: Tensor):
        R, U, failed, X = ctx.saved_tensors
        grad_A = apply(_Solve, R, grad, U, failed)
        if not ctx.needs_input_grad[0]:
            return None, grad_A, None, None
        return -hermitised(grad_A @ X.mH).masked_fill(failed[:, None, None], 0.0), grad_A, None, None


def solve(R: Tensor, A: Tensor, U: Tensor, failed: Tensor) -> Tensor:
    """What `Factor.solve` is made of, for one batch dimension."""
    return apply(_Solve, R, A, U, failed)


def divided_by_root(U: Tensor, A: Tensor) -> Tensor:
    """U^-H A for one batch dimension; no gradient."""
    return _solve(U, A, True)


class Factor(NamedTuple):
    """What `factor` found for matrices (..., n, n): their factors, `info` and shifts, (...)."""

    R: Tensor
    U: Tensor
    info: Tensor
    jitter: Tensor

    def failed(self) -> Tensor:
        return self.info > _SHIFTED

    def beside(self, A: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """R, A, U and `failed` with one batch dimension, and the shape of what they had."""
        batch = torch.broadcast_shapes(self.info.shape, A.shape[:-2])
        matrices = (self.R, A, self.U)
        flat = [M.expand(*batch, *M.shape[-2:]).reshape(math.prod(batch), *M.shape[-2:]) for M in matrices]
        return (*flat, self.failed().expand(batch).reshape(-1)), batch

    def solve(self, A: Tensor) -> Tensor:
        """The solutions; batch dimensions broadcast. A failed item is solved as the identity, with gradient 0."""
        flat, batch = self.beside(A)
        return solve(*flat).reshape(*batch, *A.shape[-2:])


def factor(R: Tensor, shifts: Sequence[float] = ()) -> Factor:
    """The Cholesky factors of the Hermitian parts, each plus 0 or the first multiple of its trace that serves.

    The factor is a constant: derivatives are taken where it is used.
    """
    batch, n = R.shape[:-2], R.shape[-1]
    U, info, jitter = _factor(R.detach().reshape(math.prod(batch), n, n), shifts)
    return Factor(R, U.reshape(R.shape), info.reshape(batch), jitter.reshape(batch))


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
    _check.required(_OP, R=R, A=A)
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, R=R, A=A)
    n = _check.shapes(_OP, R=(R, "... n n"), A=(A, "... n q"))["n"]
    _check.broadcast(_OP, R=R.shape[:-2], A=A.shape[:-2])
    size, limit = numerics.CHOLESKY_JITTER_ULPS.of(R.dtype) * max(n, 1), numerics.CHOLESKY_JITTER_LIMIT.of()
    sizes = []
    while size < limit:
        sizes.append(size)
        size *= 10
    found = factor(R, [size / max(n, 1) for size in (*sizes, limit)])
    solution = found.solve(A).masked_fill(found.failed()[..., None, None], torch.nan)
    return CholSolveSafe(solution, found.info, found.jitter)
