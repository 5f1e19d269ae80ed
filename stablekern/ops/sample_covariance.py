r"""Sample covariances with the conjugation that makes $x = a s$ give $|s|^2 a a^H$.

$R = \frac{1}{L - d} \sum_l (x_l - m)(x_l - m)^H$, $m$ the mean over the snapshots or 0. With snapshots as rows of $X$
that is $X^\top \bar X$; the product $X^H X$, which looks as right, is its conjugate, whose sources lie at mirrored
angles.

Normalised to a trace, $R$ does not depend on the scale of $X$, so each item is first divided by its largest modulus:
snapshots of 1e-25 do not vanish in the squares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern.errors import message
from stablekern.ops.chol_solve_safe import components, hermitised
from stablekern.ops.covariance_blend import covariance_blend

__all__ = ["sample_covariance"]

_OP = "sample_covariance"


def reference(X: Tensor, *, center: bool = False, ddof: int = 0, target_trace: float | None = None) -> Tensor:
    """The definition, as a sum of outer products."""
    X = X - X.mean(-2, keepdim=True) if center else X
    R = torch.einsum("...li,...lj->...ij", X, X.conj()) / (X.shape[-2] - ddof)
    return R if target_trace is None else target_trace * R / torch.einsum("...ii->...", R)[..., None, None]


def sample_covariance(
    X: Tensor,  # (..., L, n)
    *,
    center: bool = False,
    ddof: int = 0,
    target_trace: float | None = None,
) -> Tensor:  # (..., n, n)
    r"""$\frac{1}{L-d} \sum_l x_l x_l^H$ over the snapshots $x_l$, the rows of `X`.

    **Arguments:**

    - `X`: snapshots by channels; float32, float64, complex64 or complex128; any batch dimensions.
    - `center`: subtract the mean over the snapshots. Not for symbols that are constant over them, since it removes the
        signal. Keyword only.
    - `ddof`: $d$, 0 to L - 1; with `center`, 1 makes the estimate unbiased. Keyword only.
    - `target_trace`: > 0: scale each matrix to this trace; None: in the units of `X` squared. Keyword only.

    **Returns:** Hermitian matrices, real for real `X`. With `target_trace`, an item of zeros has no such scaling and is
    NaN by itself, with a gradient of 0. Differentiable, any order without `target_trace`.

    **Raises:** `ValueError` for shapes or numbers out of range, `TypeError` for other dtypes, `RuntimeError` when
    second derivatives with `target_trace` are asked for.

    **Accuracy:** a sum of L terms: at most $L \epsilon$ relative to the diagonal.
    """
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, X=X)
    L = _check.shapes(_OP, X=(X, "... l n"))["l"]
    if not isinstance(center, bool):
        raise TypeError(message(_OP, "`center` must be a bool", type(center).__name__))
    if L == 0:
        raise ValueError(message(_OP, "`X` must hold at least one snapshot", tuple(X.shape)))
    ddof = _check.integer(_OP, "ddof", ddof, low=0, high=L - 1)
    X = X - X.mean(-2, keepdim=True) if center else X
    if target_trace is None:
        return hermitised(X.mT @ X.conj()) / (L - ddof)
    target_trace = _check.number(_OP, "target_trace", target_trace, low=0.0, strict=True)
    # Held constant: the result does not depend on it.
    if X.numel():
        largest = components(X.detach()).abs().flatten(X.dim() - 2).amax(-1)[..., None, None]
        lost = ~(largest > 0) | ~torch.isfinite(largest)
        X = torch.where(lost, 0.0, X) / torch.where(lost, 1.0, largest)
    return covariance_blend(X.mT @ X.conj(), target_trace=target_trace)
