r"""The denominator $a^H R^{-1} a$ of the minimum variance (Capon) spectrum, positive by construction.

With $H = \tfrac12(R + R^H) + \ell\,\tfrac{\mathrm{tr} R}{n} I = L L^H$ it is $\|L^{-1} a\|^2$: one triangular solve
and a sum of squares, where the quadratic form with a computed inverse can come out negative. The conjugation matters
more than the rounding: $R = \mathrm{E}\,x x^H$ (`sample_covariance`) with $x = a s$ is $|s|^2 a a^H$, and the spectrum
$1 / (a^H R^{-1} a)$ then peaks at $a$; with $a^\top R^{-1} \bar a$ it peaks at the mirror image $\bar a$, or nowhere.

Sources: Capon 1969, "High-resolution frequency-wavenumber spectrum analysis", eq. 15.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern.ops.chol_solve_safe import factor, hermitised, squared_modulus, trace_of

__all__ = ["mvdr_denominator"]

_OP = "mvdr_denominator"


def reference(R: Tensor, A: Tensor, loading: float = 0.0) -> Tensor:
    """The definition by the inverse."""
    n = R.shape[-1]
    H = (R + R.mH) / 2
    mean = torch.einsum("...ii->...", H).real / n
    inverse = torch.linalg.inv(H + loading * mean[..., None, None] * torch.eye(n, dtype=R.dtype, device=R.device))
    return (A.conj() * (inverse @ A)).sum(-2).real


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
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, R=R, A=A)
    n = _check.shapes(_OP, R=(R, "... n n"), A=(A, "... n p"))["n"]
    loading = _check.number(_OP, "loading", loading, low=0.0)
    H = hermitised(R)
    mean = trace_of(H) / max(n, 1)
    L, failed, _ = factor(H + loading * mean[..., None, None] * torch.eye(n, dtype=R.dtype, device=R.device))
    Y = torch.linalg.solve_triangular(L, A, upper=False)
    return squared_modulus(Y).sum(-2).masked_fill(failed[..., None], torch.nan)
