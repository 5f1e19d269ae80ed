r"""Regularised least squares through the smaller of its two Gram matrices.

$x = \arg\min \|\Phi x - y\|^2 + \alpha \|x\|^2 = \Phi^H (\Phi \Phi^H + \alpha I)^{-1} y = (\Phi^H \Phi + \alpha I)^{-1}
\Phi^H y$: for $m$ measurements of $n$ unknowns an m x m system (the dual form) or an n x n one. With $m < n$ the dual
is not only smaller by $(n/m)^3$: the other Gram matrix is singular but for $\alpha$, so that its condition number is
$\sigma_1^2/\alpha$ where the dual's is at most $(\sigma_1^2 + \alpha)/(\sigma_m^2 + \alpha)$.

Sources: Saunders, Gammerman and Vovk 1998, "Ridge regression learning algorithm in dual variables"; Higham, Accuracy
and Stability of Numerical Algorithms, sec. 20.4 (normal equations).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern.errors import message
from stablekern.ops.chol_solve_safe import factor

__all__ = ["ridge_lstsq"]

_OP = "ridge_lstsq"


def reference(Phi: Tensor, y: Tensor, alpha: float | Tensor) -> Tensor:
    """The definition: least squares with the rows of sqrt(alpha) I beneath."""
    m, n = Phi.shape[-2:]
    root = torch.as_tensor(alpha, dtype=Phi.dtype.to_real()).sqrt().expand(Phi.shape[:-2])
    below = root[..., None, None] * torch.eye(n, dtype=Phi.dtype, device=Phi.device)
    Q, T = torch.linalg.qr(torch.cat([Phi, below.expand(*Phi.shape[:-2], n, n)], -2))
    return torch.linalg.solve_triangular(T, Q[..., :m, :].mH @ y[..., None], upper=True)[..., 0]


def ridge_lstsq(
    Phi: Tensor,  # (..., m, n)
    y: Tensor,  # (..., m)
    alpha: float | Tensor,  # or (...)
) -> Tensor:  # (..., n)
    r"""$\arg\min_x \|\Phi x - y\|^2 + \alpha \|x\|^2$, by an m x m system where that is the smaller one.

    **Arguments:**

    - `Phi`: float32, float64, complex64 or complex128; any batch dimensions.
    - `y`: measurements, same dtype, device and batch dimensions.
    - `alpha`: ridge > 0, in the units of $|\Phi|^2$; a number, or a real tensor of the batch's shape (not checked to be
        positive).

    **Returns:** the minimisers. An item whose system cannot be factored (`alpha` too small for the rounding of its Gram
    matrix, or a non-finite entry) is NaN by itself, with a gradient of 0. Differentiable with respect to all three, any
    order.

    **Raises:** `ValueError` for shapes that do not fit or a number `alpha` <= 0, `TypeError` for other dtypes.

    **Accuracy:** relative error of a few $\epsilon\,(\sigma_1^2 + \alpha)/(\sigma_r^2 + \alpha)$, $\sigma_r$ the
    smallest singular value: that of the normal equations.
    **Sources:** see the module's text.
    """
    _check.required(_OP, Phi=Phi, y=y)
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, Phi=Phi, y=y)
    sizes = _check.shapes(_OP, Phi=(Phi, "... m n"), y=(y, "... m"))
    m, n = sizes["m"], sizes["n"]
    if y.shape[:-1] != Phi.shape[:-2]:
        rule = "`y` must have the batch dimensions of `Phi`"
        raise ValueError(message(_OP, rule, tuple(y.shape[:-1]), tuple(Phi.shape[:-2])))
    if not isinstance(alpha, Tensor):
        alpha = _check.number(_OP, "alpha", alpha, low=0.0, strict=True)
    elif alpha.dtype != Phi.real.dtype:
        raise TypeError(message(_OP, "`alpha` must be real, in the precision of `Phi`", alpha.dtype, Phi.dtype))
    elif alpha.shape not in (Phi.shape[:-2], ()):
        rule = "`alpha` must be a number or have the batch dimensions of `Phi`"
        raise ValueError(message(_OP, rule, tuple(alpha.shape), tuple(Phi.shape[:-2])))
    else:
        alpha = alpha[..., None, None]
    ridge = alpha * torch.eye(min(m, n), dtype=Phi.dtype, device=Phi.device)
    column = y[..., None]
    if m <= n:
        found = factor(Phi @ Phi.mH + ridge)
        x = Phi.mH @ found.solve(column)
    else:
        found = factor(Phi.mH @ Phi + ridge)
        x = found.solve(Phi.mH @ column)
    return x[..., 0].masked_fill(found.failed()[..., None], torch.nan)
