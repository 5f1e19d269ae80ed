r"""A predicted and a measured covariance, brought to one trace, blended, loaded and shrunk, in one expression.

With $\hat R = R_H / \mathrm{tr} R_H$, $R_H = \tfrac12(R + R^H)$, the target trace $T$ and the mean eigenvalue $\mu =
T/n$, the usual chain is: scale both inputs to trace $T$, blend with weight $\beta$, add $\ell \mu I$ and scale back to
$T$, shrink towards $\mu I$ by $\alpha$. Every trace on the way is known beforehand, so nothing is measured twice:

$$R = \frac{1-\alpha}{1+\ell}\,T \left[(1-\beta) \hat R_\mathrm{pred} + \beta \hat R_\mathrm{samp}\right]
+ \mu \left(\frac{(1-\alpha)\,\ell}{1+\ell} + \alpha\right) I, \qquad \mathrm{tr} R = T.$$

The only division is by the traces of the inputs. The trace of a covariance is positive; one that is not comes from an
error before this op (a wrong axis, a factor that collapsed), and a floor under it would turn that error into a scale of
1e9 or more. So it is reported for its item, and never divided by.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stablekern import _check
from stablekern.errors import message
from stablekern.ops.chol_solve_safe import hermitised, trace_of

__all__ = ["CovarianceBlendEx", "covariance_blend", "covariance_blend_ex"]

_OP = "covariance_blend"
_NO_TRACE, _NON_FINITE = 1, 2  # bits of `info`


class CovarianceBlendEx(NamedTuple):
    """The blend, shaped as `R_pred`, and a status per item: bit 0 a trace <= 0, bit 1 a non-finite entry or trace."""

    covariance: Tensor
    info: Tensor


def reference(R_pred, R_samp=None, *, beta=0.0, shrink=0.0, loading=0.0, target_trace=None) -> Tensor:
    """The chain step by step, each trace measured; matrices in the last two dimensions."""
    n = R_pred.shape[-1]
    eye = torch.eye(n, dtype=R_pred.dtype, device=R_pred.device)
    target = n if target_trace is None else target_trace
    beta, shrink, loading = (x[..., None, None] if isinstance(x, Tensor) else x for x in (beta, shrink, loading))

    def scaled(R: Tensor) -> Tensor:
        R = (R + R.mH) / 2
        return R * (target / torch.einsum("...ii->...", R).real)[..., None, None]

    R = scaled(R_pred)
    if R_samp is not None:
        R = scaled((1 - beta) * R + beta * scaled(R_samp.detach()))
    R = scaled(R + loading * target / n * eye)
    return (1 - shrink) * R + shrink * target / n * eye


def _of_unit_trace(R: Tensor) -> tuple[Tensor, Tensor]:
    """The Hermitian part over its trace, with I / n for the items that cannot be scaled, and their `info`."""
    n = R.shape[-1]
    H = hermitised(R)
    trace = trace_of(H)
    finite = torch.isfinite(H).flatten(-2).all(-1) & torch.isfinite(trace)
    # Diagonal entries of both signs can leave a positive rounding error of a trace.
    rounding = n * torch.finfo(R.dtype).eps * H.detach().diagonal(dim1=-2, dim2=-1).real.abs().sum(-1)
    info = _NO_TRACE * (trace <= rounding) + _NON_FINITE * ~finite
    failed = (info != 0)[..., None, None]
    H = torch.where(failed, torch.eye(n, dtype=R.dtype, device=R.device), H)
    return H / torch.where(failed, n, trace[..., None, None]), info


def _weight(name: str, value: float | Tensor, matrices: Tensor, high: float | None) -> float | Tensor:
    """A checked number, or a tensor of one per item, ready to multiply the matrices."""
    if not isinstance(value, Tensor):
        return _check.number(_OP, name, value, low=0.0, high=high)
    if not value.is_floating_point():
        raise TypeError(message(_OP, f"`{name}` must be a number or a real tensor", value.dtype))
    batch = matrices.shape[:-2]
    if value.shape not in (batch, ()):
        rule = f"`{name}` must be a number or have the batch dimensions of `R_pred`"
        raise ValueError(message(_OP, rule, tuple(value.shape), tuple(batch)))
    return value[..., None, None].to(matrices.real.dtype)


def covariance_blend_ex(
    R_pred: Tensor,  # (..., n, n), matrices in `dims`
    R_samp: Tensor | None = None,  # (..., n, n)
    *,
    beta: float | Tensor = 0.0,
    shrink: float | Tensor = 0.0,
    loading: float | Tensor = 0.0,
    target_trace: float | None = None,
    dims: tuple[int, int] = (-2, -1),
) -> CovarianceBlendEx:  # (..., n, n), (...)
    r"""`covariance_blend` with a status: `(covariance, info)`.

    `info` (int32, one per item) is 0 for success; bit 0: a trace of an input is negative, or 0 within its rounding
    ($n\epsilon$ times the sum of the diagonal's moduli); bit 1: an entry of an input, or its trace, is not finite. The
    result of an item whose `info` is not 0 is NaN; no other item is touched. All else is as in `covariance_blend`.
    """
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, R_pred=R_pred, R_samp=R_samp)
    rank = R_pred.dim()
    if not isinstance(dims, tuple) or len(dims) != 2 or not all(isinstance(d, int) for d in dims):
        raise TypeError(message(_OP, "`dims` must be two integers", dims))
    if len({d % rank for d in dims if -rank <= d < rank}) != 2:
        raise ValueError(message(_OP, "`dims` must be two different dimensions of `R_pred`", dims, tuple(R_pred.shape)))
    if R_samp is not None and R_samp.shape != R_pred.shape:
        rule = "`R_samp` must have the shape of `R_pred`"
        raise ValueError(message(_OP, rule, tuple(R_samp.shape), tuple(R_pred.shape)))
    if R_samp is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError(message(_OP, "`beta` other than 0 needs `R_samp`", beta))
    matrices = R_pred.movedim(dims, (-2, -1))
    n = _check.shapes(_OP, R_pred=(matrices, "... n n"))["n"]
    beta, shrink = (_weight(name, x, matrices, 1.0) for name, x in (("beta", beta), ("shrink", shrink)))
    loading = _weight("loading", loading, matrices, None)
    target = float(n)
    if target_trace is not None:
        target = _check.number(_OP, "target_trace", target_trace, low=0.0, strict=True)
    blend, info = _of_unit_trace(matrices)
    if R_samp is not None:
        measured, other = _of_unit_trace(R_samp.detach().movedim(dims, (-2, -1)))
        blend, info = (1 - beta) * blend + beta * measured, info | other
    kept = (1 - shrink) / (1 + loading)
    floor = (kept * loading + shrink) * target / max(n, 1)
    result = kept * target * blend + floor * torch.eye(n, dtype=R_pred.dtype, device=R_pred.device)
    result = result.masked_fill((info != 0)[..., None, None], torch.nan)
    return CovarianceBlendEx(result.movedim((-2, -1), dims), info.to(torch.int32))


def covariance_blend(
    R_pred: Tensor,  # (..., n, n), matrices in `dims`
    R_samp: Tensor | None = None,  # (..., n, n)
    *,
    beta: float | Tensor = 0.0,
    shrink: float | Tensor = 0.0,
    loading: float | Tensor = 0.0,
    target_trace: float | None = None,
    dims: tuple[int, int] = (-2, -1),
) -> Tensor:  # (..., n, n)
    r"""Hermitise, bring to one trace, blend, load and shrink covariances; the trace of the result is the target.

    $R = \frac{1-\alpha}{1+\ell} T [(1-\beta)\hat R_\mathrm{pred} + \beta \hat R_\mathrm{samp}] + \mu
    (\frac{(1-\alpha)\ell}{1+\ell} + \alpha) I$, with $\hat R$ the Hermitian part over its trace and $\mu = T/n$.

    **Arguments:**

    - `R_pred`: float32, float64, complex64 or complex128.
    - `R_samp`: measured covariances of the same shape, dtype and device, or None. A constant: no gradient flows to it.
    - `beta`: weight of `R_samp`, in [0, 1]. Keyword only, as all that follow.
    - `shrink`: $\alpha$ in [0, 1], towards $\mu I$.
    - `loading`: $\ell$ >= 0, dimensionless: diagonal load over the mean eigenvalue, before the trace is restored.
    - `target_trace`: $T$ > 0; None is n.
    - `dims`: the two dimensions of the matrices, named, never positional.

    `beta`, `shrink` and `loading` are numbers, or real tensors of the batch's shape (one per item, cast to the
    precision of `R_pred`; values not checked).

    **Returns:** a tensor shaped as `R_pred`. An item where an input has a trace that is 0, negative or not finite, or
    any non-finite entry, is NaN by itself (`covariance_blend_ex` says why), with a gradient of 0. Differentiable with
    respect to `R_pred` and the three weights, any order.

    **Raises:** `ValueError` for shapes or numbers out of range, `TypeError` for other dtypes.

    **Accuracy:** a few ulp of the largest entry; the trace is $T$ within about $n \epsilon$.
    """
    options = {"beta": beta, "shrink": shrink, "loading": loading, "target_trace": target_trace, "dims": dims}
    return covariance_blend_ex(R_pred, R_samp, **options).covariance
