r"""The denominator $a^H R^{-1} a$ of the minimum variance (Capon) spectrum, positive by construction.

With $H = \tfrac12(R + R^H) + \ell\,\tfrac{\mathrm{tr} R}{n} I = L L^H$ it is $\|L^{-1} a\|^2$: one triangular solve
and a sum of squares, where the quadratic form with a computed inverse can come out negative. The conjugation matters
more than the rounding: $R = \mathrm{E}\,x x^H$ (`sample_covariance`) with $x = a s$ is $|s|^2 a a^H$, and the spectrum
$1 / (a^H R^{-1} a)$ then peaks at $a$; with $a^\top R^{-1} \bar a$ it peaks at the mirror image $\bar a$, or nowhere.

Both derivatives follow from $w = H^{-1} a$: $\bar a = 2 g w$ and $\bar H = -g\,w w^H$ for a cotangent $g$.

Sources: Capon 1969, "High-resolution frequency-wavenumber spectrum analysis", eq. 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern._registry import apply
from stablekern.ops.chol_solve_safe import divided_by_root, factor, hermitised, solve, squared_modulus, trace_of

__all__ = ["mvdr_denominator"]

_OP = "mvdr_denominator"


def reference(R: Tensor, A: Tensor, loading: float = 0.0) -> Tensor:
    """The definition by the inverse."""
    n = R.shape[-1]
    H = (R + R.mH) / 2
    mean = torch.einsum("...ii->...", H).real / n
    inverse = torch.linalg.inv(H + loading * mean[..., None, None] * torch.eye(n, dtype=R.dtype, device=R.device))
    return (A.conj() * (inverse @ A)).sum(-2).real


class _Denominator(torch.autograd.Function):
    """|U^-H a|^2 per column of A (b, n, p), R = U^H U (b, n, n); differentiable any number of times."""

    @staticmethod
    def forward(R: Tensor, A: Tensor, U: Tensor, failed: Tensor) -> Tensor:
        return squared_modulus(divided_by_root(U, A)).sum(-2)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor):
        R, A, U, failed = ctx.saved_tensors
        W = solve(R, A, U, failed)
        scaled = grad[..., None, :] * W
        grad_R = None
        if ctx.needs_input_grad[0]:
            grad_R = (-scaled @ W.mH).masked_fill(failed[:, None, None], 0.0)
        return grad_R, 2 * scaled, None, None


def mvdr_denominator(
    R: Tensor,  # (..., n, n)
    A: Tensor,  # (..., n, p)
    loading: float = 0.0,
) -> Tensor:  # (..., p), real
    r"""$a^H (R + \ell \bar\lambda I)^{-1} a$ for steering vectors $a$, $\bar\lambda$ the mean eigenvalue of $R$; > 0.

    **Arguments:**

    - `R`: covariances, $\mathrm{E}\,x x^H$; float32, float64, complex64 or complex128. Their Hermitian part is taken.
    - `A`: steering vectors as columns, not conjugated; same dtype and device. Batch dimensions broadcast with those of
        `R`, so one (n, p) table serves a batch.
    - `loading`: $\ell$ >= 0, dimensionless: the diagonal load over the mean eigenvalue $\mathrm{tr}R/n$.

    **Returns:** real denominators in the units of $|a|^2$ over those of `R`; the spectrum is their reciprocal. A matrix
    that is not positive definite after loading, or not finite, gives NaN for its own row, and a gradient of 0.
    Differentiable with respect to `R` and `A`, any order.

    **Raises:** `ValueError` for shapes that do not fit or a negative `loading`, `TypeError` for other dtypes.

    **Accuracy:** relative error of about $n \epsilon$ times the condition number of the loaded matrix at most, and
    never a wrong sign. Without loading, a covariance of fewer snapshots than elements gives NaN or rounding noise.
    **Sources:** Capon 1969, eq. 15.
    """
    _check.required(_OP, R=R, A=A)
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, R=R, A=A)
    n = _check.shapes(_OP, R=(R, "... n n"), A=(A, "... n p"))["n"]
    _check.broadcast(_OP, R=R.shape[:-2], A=A.shape[:-2])
    loading = _check.number(_OP, "loading", loading, low=0.0)
    H = hermitised(R)
    mean = trace_of(H) / max(n, 1)
    if loading:
        H = H + loading * mean[..., None, None] * torch.eye(n, dtype=R.dtype, device=R.device)
    found = factor(H)
    flat, batch = found.beside(A)
    denominator = apply(_Denominator, *flat).reshape(*batch, A.shape[-1])
    return denominator.masked_fill(found.failed()[..., None], torch.nan)
