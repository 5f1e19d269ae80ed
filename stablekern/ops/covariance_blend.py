r"""A predicted and a measured covariance, brought to one trace, blended, loaded and shrunk, in one pass.

With $\hat R = R_H / \mathrm{tr} R_H$, $R_H = \tfrac12(R + R^H)$, the target trace $T$ and the mean eigenvalue $\mu =
T/n$, the usual chain is: scale both inputs to trace $T$, blend with weight $\beta$, add $\ell \mu I$ and scale back to
$T$, shrink towards $\mu I$ by $\alpha$. Every trace on the way is known beforehand, so nothing is measured twice:

$$R = \frac{1-\alpha}{1+\ell}\,T \left[(1-\beta) \hat R_\mathrm{pred} + \beta \hat R_\mathrm{samp}\right]
+ \mu \left(\frac{(1-\alpha)\,\ell}{1+\ell} + \alpha\right) I, \qquad \mathrm{tr} R = T.$$

The only division is by the traces of the inputs. The trace of a covariance is positive; one that is not comes from an
error before this op (a wrong axis, a factor that collapsed), and a floor under it would turn that error into a scale of
1e9 or more. So it is reported for its item, and never divided by.

The weights are folded into three factors, $R = c_1 \hat R_\mathrm{pred} + c_2 \hat R_\mathrm{samp} + c_3 I$. With
$\langle X, Y \rangle = \mathrm{Re}\,\mathrm{tr}\,X^H Y$ and $t = \mathrm{tr} R_H$, the adjoint of a cotangent $G$ is

$$\bar R_\mathrm{pred} = \frac{c_1}{t} \left( G_H - \langle G_H, \hat R_\mathrm{pred} \rangle I \right), \qquad
\bar c = \left( \langle G, \hat R_\mathrm{pred} \rangle, \langle G, \hat R_\mathrm{samp} \rangle,
\mathrm{Re}\,\mathrm{tr}\,G \right).$$

A diagonal entry of a rounding error is not a trace: one below $n\epsilon$ times the sum of the diagonal's moduli counts
as 0. Traces are added up in float64, so that all backends report the same items.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablekern import _check, _load
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.errors import message

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


def _fake(
    pred: Tensor, samp: Tensor | None, weights: Tensor | None, constants: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(pred)


def _outputs(pred: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The blend, the traces of both inputs (float64; 1 for one that is not there) and `info`."""
    batch, device = pred.shape[0], pred.device
    blend = empty(pred.shape, pred)
    traces = torch.empty(batch, 2, dtype=torch.float64, device=device)
    return blend, traces, torch.empty(batch, dtype=torch.int32, device=device)


def _fake_bwd(grad, pred, samp, weights, constants, traces, info, by_pred, by_weights) -> tuple[Tensor, Tensor]:
    return _grads(pred, by_pred, by_weights)


def _grads(pred: Tensor, by_pred: bool, by_weights: bool) -> tuple[Tensor, Tensor]:
    """Those of `pred` and of the three weights of each item; one that is not wanted is an empty tensor."""
    grad_pred = empty(pred.shape if by_pred else (0,), pred)
    shape = (pred.shape[0], 3) if by_weights else (0,)
    return grad_pred, empty(shape, pred, pred.dtype.to_real())


# Matrices (batch, n, n). The factors c are `constants`, or one row of `weights` (batch, 3) per item.
_fwd = define(
    "covariance_blend_fwd(Tensor pred, Tensor? samp, Tensor? weights, float[] constants) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)
_bwd = define(
    "covariance_blend_bwd(Tensor grad, Tensor pred, Tensor? samp, Tensor? weights, float[] constants, Tensor traces,"
    " Tensor info, bool by_pred, bool by_weights) -> (Tensor, Tensor)",
    fake=_fake_bwd,
)


def _dense(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Contiguous, conjugates written out; an empty tensor for None."""
    return [
        like.new_empty(0, dtype=like.dtype.to_real()) if t is None else t.resolve_conj().contiguous() for t in tensors
    ]


@launcher("covariance_blend_fwd", device="cpu", backend="native")
def _(
    pred: Tensor, samp: Tensor | None, weights: Tensor | None, constants: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _outputs(pred)
    _load.native().covariance_blend_fwd(*_dense(pred, pred, samp, weights), *constants, *outputs)
    return outputs


@launcher("covariance_blend_bwd", device="cpu", backend="native")
def _(
    grad: Tensor,
    pred: Tensor,
    samp: Tensor | None,
    weights: Tensor | None,
    constants: list[float],
    traces: Tensor,
    info: Tensor,
    by_pred: bool,
    by_weights: bool,
) -> tuple[Tensor, Tensor]:
    grads = _grads(pred, by_pred, by_weights)
    inputs = _dense(pred, grad, pred, samp, weights)
    _load.native().covariance_blend_bwd(*inputs, constants[0], traces, info, *grads)
    return grads


@launcher("covariance_blend_fwd", device="cuda", backend="triton")
@launcher("covariance_blend_fwd", device="cpu", backend="triton")
def _(
    pred: Tensor, samp: Tensor | None, weights: Tensor | None, constants: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    from stablekern.triton_kernels.covariance_blend import covariance_blend_fwd

    outputs = _outputs(pred)
    covariance_blend_fwd(*_dense(pred, pred, samp, weights), constants, *outputs)
    return outputs


@launcher("covariance_blend_bwd", device="cuda", backend="triton")
@launcher("covariance_blend_bwd", device="cpu", backend="triton")
def _(
    grad: Tensor,
    pred: Tensor,
    samp: Tensor | None,
    weights: Tensor | None,
    constants: list[float],
    traces: Tensor,
    info: Tensor,
    by_pred: bool,
    by_weights: bool,
) -> tuple[Tensor, Tensor]:
    from stablekern.triton_kernels.covariance_blend import covariance_blend_bwd

    grads = _grads(pred, by_pred, by_weights)
    inputs = _dense(pred, grad, pred, samp, weights)
    covariance_blend_bwd(*inputs, constants[0], traces, info, *grads)
    return grads


def _hermitian(R: Tensor) -> Tensor:
    """The Hermitian part; the halves cannot overflow."""
    return R / 2 + R.mH / 2


def _on_diagonal(R: Tensor, values: Tensor | float) -> Tensor:
    """`values` (batch, or one number) times the identity."""
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    return values[:, None, None] * eye if isinstance(values, Tensor) else values * eye


def _of_unit_trace(R: Tensor, trace: Tensor, failed: Tensor) -> Tensor:
    """The Hermitian part over its trace, and 0 for the failed items."""
    divisor = torch.where(failed, 1.0, trace).to(R.dtype.to_real())[:, None, None]
    return torch.where(failed[:, None, None], 0.0, _hermitian(R)) / divisor


@launcher("covariance_blend_fwd", device="cuda", backend="torch")
@launcher("covariance_blend_fwd", device="cpu", backend="torch")
def _(
    pred: Tensor, samp: Tensor | None, weights: Tensor | None, constants: list[float]
) -> tuple[Tensor, Tensor, Tensor]:
    blend, traces, info = _outputs(pred)
    real, n = pred.dtype.to_real(), pred.shape[-1]
    traces.fill_(1)
    info.fill_(0)
    inputs = [pred] if samp is None else [pred, samp]
    for R, trace in zip(inputs, traces.unbind(-1), strict=False):
        diagonal = R.diagonal(dim1=-2, dim2=-1).real.double()
        trace.copy_(diagonal.sum(-1))
        unreal = ~torch.isfinite(trace.to(real))
        lost = trace <= n * torch.finfo(real).eps * diagonal.abs().sum(-1)
        broken = unreal | ~torch.isfinite(R).flatten(-2).all(-1)
        info |= (_NO_TRACE * (lost & ~unreal) + _NON_FINITE * broken).to(torch.int32)
    factors = constants if weights is None else weights.unbind(-1)
    total = _on_diagonal(pred, factors[2])
    for R, trace, factor in zip(inputs, traces.unbind(-1), factors, strict=False):
        each: Any = factor[:, None, None] if isinstance(factor, Tensor) else factor
        total = total + each * _of_unit_trace(R, trace, info != 0)
    blend.copy_(total.masked_fill((info != 0)[:, None, None], torch.nan))
    return blend, traces, info


@launcher("covariance_blend_bwd", device="cuda", backend="torch")
@launcher("covariance_blend_bwd", device="cpu", backend="torch")
def _(
    grad: Tensor,
    pred: Tensor,
    samp: Tensor | None,
    weights: Tensor | None,
    constants: list[float],
    traces: Tensor,
    info: Tensor,
    by_pred: bool,
    by_weights: bool,
) -> tuple[Tensor, Tensor]:
    grad_pred, grad_weights = _grads(pred, by_pred, by_weights)
    failed = info != 0
    G = torch.where(failed[:, None, None], 0.0, _hermitian(grad))

    def along(R: Tensor, trace: Tensor) -> Tensor:
        return (G.conj() * _of_unit_trace(R, trace, failed)).real.sum((-2, -1))

    share = along(pred, traces[:, 0])
    if by_pred:
        factor = constants[0] if weights is None else weights[:, 0]
        divisor = torch.where(failed, 1.0, traces[:, 0]).to(pred.dtype.to_real())
        scaled = (G - _on_diagonal(G, share)) / divisor[:, None, None]
        grad_pred.copy_((factor[:, None, None] if isinstance(factor, Tensor) else factor) * scaled)
    if by_weights:
        other = torch.zeros_like(share) if samp is None else along(samp, traces[:, 1])
        trace = G.diagonal(dim1=-2, dim2=-1).real.sum(-1)
        grad_weights.copy_(torch.stack([share, other, trace], -1))
    return grad_pred, grad_weights


class _CovarianceBlend(torch.autograd.Function):
    @staticmethod
    def forward(
        pred: Tensor, samp: Tensor | None, weights: Tensor | None, constants: list[float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _fwd(pred, samp, weights, constants)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.constants = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor, *_):
        _check.first_order(_OP)
        pred, samp, weights, traces, info = ctx.saved_tensors
        by_pred, by_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grads = _bwd(grad, pred, samp, weights, ctx.constants, traces, info, by_pred, by_weights)
        return grads[0] if by_pred else None, None, grads[1] if by_weights else None, None


def _weight(name: str, value: float | Tensor, matrices: Tensor, high: float | None) -> float | Tensor:
    """A checked number, or a tensor of one per item in the precision of the matrices."""
    if not isinstance(value, Tensor):
        return _check.number(_OP, name, value, low=0.0, high=high)
    if not value.is_floating_point():
        raise TypeError(message(_OP, f"`{name}` must be a number or a real tensor", value.dtype))
    batch = matrices.shape[:-2]
    if value.shape not in (batch, ()):
        rule = f"`{name}` must be a number or have the batch dimensions of `R_pred`"
        raise ValueError(message(_OP, rule, tuple(value.shape), tuple(batch)))
    return value.to(matrices.dtype.to_real())


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
    _check.required(_OP, R_pred=R_pred)
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
    measured = None if R_samp is None else R_samp.detach().movedim(dims, (-2, -1))
    n = _check.shapes(_OP, R_pred=(matrices, "... n n"))["n"]
    beta, shrink = (_weight(name, x, matrices, 1.0) for name, x in (("beta", beta), ("shrink", shrink)))
    loading = _weight("loading", loading, matrices, None)
    target = float(n)
    if target_trace is not None:
        target = _check.number(_OP, "target_trace", target_trace, low=0.0, strict=True)
    kept = (1 - shrink) / (1 + loading)
    factors = kept * target * (1 - beta), kept * target * beta, (kept * loading + shrink) * target / max(n, 1)
    batch, weights, constants = matrices.shape[:-2], None, [0.0, 0.0, 0.0]
    if any(isinstance(factor, Tensor) for factor in factors):
        full: dict[str, Any] = {"dtype": matrices.dtype.to_real(), "device": matrices.device}
        each = [f.expand(batch) if isinstance(f, Tensor) else torch.full(batch, f, **full) for f in factors]
        weights = torch.stack(each, -1).reshape(-1, 3)
    else:
        constants = [float(factor) for factor in factors]
    count = math.prod(batch)
    flat = [R if R is None else R.reshape(count, n, n) for R in (matrices, measured)]
    blend, _, info = apply(_CovarianceBlend, *flat, weights, constants)
    return CovarianceBlendEx(blend.reshape(matrices.shape).movedim((-2, -1), dims), info.reshape(batch))


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
    respect to `R_pred` and the three weights.

    **Raises:** `ValueError` for shapes or numbers out of range, `TypeError` for other dtypes, `RuntimeError` when
    second derivatives are asked for.

    **Accuracy:** a few ulp of the largest entry; the trace is $T$ within about $n \epsilon$.
    """
    options: dict[str, Any] = {
        "beta": beta,
        "shrink": shrink,
        "loading": loading,
        "target_trace": target_trace,
        "dims": dims,
    }
    return covariance_blend_ex(R_pred, R_samp, **options).covariance
