r"""A hinge on the gap after the `k` largest eigenvalues, by eigenvalues alone: its gradient is always finite.

$\max(0, \mu - (\lambda_k - \lambda_{k+1}))$ with $\lambda_1 \ge \ldots \ge \lambda_n$ of $H = \tfrac12(R + R^H)$.
The gradient $-(v_k v_k^H - v_{k+1} v_{k+1}^H)$ where the hinge is active holds no gap in a denominator, so its norm is
$\sqrt 2$ whatever the spectrum; only gradients of eigen*vectors* are infinite at repeated eigenvalues. Where
$\lambda_k$ or $\lambda_{k+1}$ is repeated it is one of the directional derivatives of its group.

Source: Giles 2008, "Collected matrix derivative results", sec. 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern.errors import message
from stablekern.ops.chol_solve_safe import hermitised
from stablekern.ops.eigh import eigvalsh

__all__ = ["eigengap_hinge"]

_OP = "eigengap_hinge"


def reference(R: Tensor, k: int | Tensor, margin: float) -> Tensor:
    """The definition, by sorting."""
    falling = torch.linalg.eigvalsh((R + R.mH) / 2).sort(-1, descending=True).values
    k = torch.as_tensor(k).expand(R.shape[:-2])[..., None]
    gap = falling.gather(-1, k - 1) - falling.gather(-1, k)
    return torch.relu(margin - gap[..., 0])


def eigengap_hinge(
    R: Tensor,  # (..., n, n)
    k: int | Tensor,  # or (...)
    margin: float,
) -> Tensor:  # (...), real
    r"""$\max(0, \mu - (\lambda_k - \lambda_{k+1}))$ of Hermitian matrices, eigenvalues falling; finite gradients.

    **Arguments:**

    - `R`: float32, float64, complex64 or complex128; its Hermitian part is taken.
    - `k`: how many eigenvalues lie above the gap, 1 to n - 1: a number, or an integer tensor of the batch's shape, one
        per matrix. An entry of the tensor outside that range gives NaN for its matrix.
    - `margin`: $\mu$ >= 0, in the units of `R`.

    **Returns:** one real number per matrix, not reduced. A matrix that is not finite is NaN by itself; its gradient is
    0, as is that of an inactive hinge.

    **Raises:** `ValueError` for shapes that do not fit or numbers out of range, `TypeError` for other dtypes,
    `RuntimeError` when second derivatives are asked for.

    **Accuracy:** absolute error of a few ulp of max|lambda|; a smaller gap is rounding.
    **Source:** Giles 2008, "Collected matrix derivative results", sec. 3.1.
    """
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, R=R)
    n = _check.shapes(_OP, R=(R, "... n n"))["n"]
    margin = _check.number(_OP, "margin", margin, low=0.0)
    if not isinstance(k, Tensor):
        _check.integer(_OP, "k", k, low=1, high=n - 1)
    elif k.dtype not in (torch.int32, torch.int64):
        raise TypeError(message(_OP, "`k` must be an integer or an integer tensor", k.dtype))
    elif k.shape != R.shape[:-2]:
        raise ValueError(message(_OP, "`k` must have the batch dimensions of `R`", tuple(k.shape), tuple(R.shape[:-2])))
    gaps = eigvalsh(hermitised(R)).diff(dim=-1)  # the i-th has i + 1 eigenvalues below it
    if isinstance(k, Tensor):
        legal = (k >= 1) & (k < n)
        at = torch.where(legal, n - 1 - k, 0).to(torch.int64)
        gap = gaps.gather(-1, at[..., None])[..., 0].masked_fill(~legal, torch.nan)
    else:
        gap = gaps[..., n - 1 - k]
    return torch.relu(margin - gap)
