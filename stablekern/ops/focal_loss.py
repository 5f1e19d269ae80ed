r"""Focal loss in softplus form, forward and backward finite for every logit and every $\gamma \ge 0$.

For a logit $x$, a target $y \in [0, 1]$ and $p = \sigma(x)$, with the class weights $\alpha_1 = \alpha$,
$\alpha_0 = 1 - \alpha$ and the positive weight $w$,

$$L = w\,\alpha\,y\,q^\gamma\,s(-x) + (1 - \alpha)(1 - y)\,p^\gamma\,s(x), \qquad s(t) = \log(1 + e^t),\; q = 1 - p.$$

For hard targets that is the usual $-\alpha_t (1 - p_t)^\gamma \log p_t$; soft targets mix the two terms linearly, as
binary cross entropy does. Since $\log q = -s(x)$ and $\log p = -s(-x)$, the powers are $e^{-\gamma s(\pm x)}$: nothing
is clamped, and nothing is a power of a probability that has rounded to 0 or 1. The derivative, with $p' = p q$,

$$\frac{dL}{dx} = -w\,\alpha\,y\,q^\gamma (\gamma p\,s(-x) + q) + (1 - \alpha)(1 - y)\,p^\gamma (\gamma q\,s(x) + p),$$

holds no division either, so $\gamma < 1$ and $\gamma = 0$ are not special. In $p\,s(-x)$ and $q\,s(x)$ an infinite
logit would give $0 \cdot \infty$; both products tend to 0, and are 0 where the first factor is. The gradient with
respect to the target, for soft labels that are learned, is the difference of the two terms without $y$ and $1 - y$.

Sources: Lin et al. 2017, arXiv:1708.02002, eq. 5; the log-space form follows from $\log\sigma(x) = -s(-x)$.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern._load import native
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher

__all__ = ["focal_loss"]


def reference(
    logits: Tensor, targets: Tensor, *, alpha: float = 0.5, gamma: float = 2.0, pos_weight: float = 1.0
) -> Tensor:
    """The definition in plain torch, differentiable; per element."""
    softplus = torch.nn.functional.softplus
    log_p, log_q = -softplus(-logits, threshold=torch.inf), -softplus(logits, threshold=torch.inf)
    positive = -pos_weight * alpha * targets * torch.exp(gamma * log_q) * log_p
    negative = -(1 - alpha) * (1 - targets) * torch.exp(gamma * log_p) * log_q
    return positive + negative


def _fake(
    logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float, by_logits: bool, by_targets: bool
) -> tuple[Tensor, ...]:
    return _outputs(logits, by_logits, by_targets)


def _fake_total(
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    pos_weight: float,
    scale: float,
    by_logits: bool,
    by_targets: bool,
) -> tuple[Tensor, ...]:
    return torch.empty((), dtype=logits.dtype, device=logits.device), *_derivatives(logits, by_logits, by_targets)


def _outputs(logits: Tensor, by_logits: bool, by_targets: bool) -> tuple[Tensor, ...]:
    """Loss, dL/dx, dL/dy."""
    loss = empty(logits.shape, logits)
    return loss, *_derivatives(logits, by_logits, by_targets)


def _derivatives(logits: Tensor, *wanted: bool) -> list[Tensor]:
    """dL/dx, dL/dy; one that is not wanted is an empty tensor."""
    shapes = (logits.shape if one else (0,) for one in wanted)
    return [empty(shape, logits) for shape in shapes]


# The derivatives leave with the loss: they share its exponential and logarithm, and the backward is one product.
_fwd = define(
    "focal_loss_fwd(Tensor logits, Tensor targets, float alpha, float gamma, float pos_weight, bool by_logits,"
    " bool by_targets) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
)
# The sum of the losses times `scale`, and the derivatives of that: a mean or a sum never stores the losses.
_total_fwd = define(
    "focal_loss_total_fwd(Tensor logits, Tensor targets, float alpha, float gamma, float pos_weight, float scale,"
    " bool by_logits, bool by_targets) -> (Tensor, Tensor, Tensor)",
    fake=_fake_total,
)
# `grad` has the shape of `slope`, or none: one number for all.
_bwd = define("focal_loss_bwd(Tensor grad, Tensor slope) -> Tensor", fake=lambda grad, slope: empty(slope.shape, slope))


def _unsupported(logits: Tensor, *others: object) -> str | None:
    return None if logits.dtype in _check.REAL else "float16 and bfloat16"


@launcher("focal_loss_fwd", device="cpu", backend="native", supports=_unsupported)
def _(
    logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float, by_logits: bool, by_targets: bool
) -> tuple[Tensor, ...]:
    results = _outputs(logits, by_logits, by_targets)
    native().focal_loss_fwd(logits.contiguous(), targets.contiguous(), alpha, gamma, pos_weight, *results)
    return results


def _unsupported_bwd(grad: Tensor, slope: Tensor) -> str | None:
    return None if slope.dtype in _check.REAL and grad.dtype == slope.dtype else "float16 and bfloat16"


@launcher("focal_loss_bwd", device="cpu", backend="native", supports=_unsupported_bwd)
def _(grad: Tensor, slope: Tensor) -> Tensor:
    out = empty(slope.shape, slope)
    native().focal_loss_bwd(grad.contiguous(), slope, out)
    return out


@launcher("focal_loss_total_fwd", device="cpu", backend="native", supports=_unsupported)
def _(
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    pos_weight: float,
    scale: float,
    by_logits: bool,
    by_targets: bool,
) -> tuple[Tensor, ...]:
    results = _fake_total(logits, targets, alpha, gamma, pos_weight, scale, by_logits, by_targets)
    native().focal_loss_total_fwd(logits.contiguous(), targets.contiguous(), alpha, gamma, pos_weight, scale, *results)
    return results


@launcher("focal_loss_bwd", device="cuda", backend="triton")
@launcher("focal_loss_bwd", device="cpu", backend="triton")
@launcher("focal_loss_bwd", device="cuda", backend="torch")
@launcher("focal_loss_bwd", device="cpu", backend="torch")
def _(grad: Tensor, slope: Tensor) -> Tensor:
    return (grad * slope).contiguous()  # one product: no kernel of our own is better


@launcher("focal_loss_fwd", device="cuda", backend="triton")
@launcher("focal_loss_fwd", device="cpu", backend="triton")
def _(
    logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float, by_logits: bool, by_targets: bool
) -> tuple[Tensor, ...]:
    from stablekern.triton_kernels.focal_loss import focal_loss_fwd

    results = _outputs(logits, by_logits, by_targets)
    focal_loss_fwd(logits.contiguous(), targets.contiguous(), alpha, gamma, pos_weight, *results)
    return results


def _vanishing(weight: Tensor, softplus: Tensor) -> Tensor:
    """weight * softplus, 0 where the weight has underflowed: the limit for an infinite logit."""
    return torch.where(weight == 0, 0.0, weight * softplus)


@launcher("focal_loss_fwd", device="cuda", backend="torch")
@launcher("focal_loss_fwd", device="cpu", backend="torch")
def _(
    logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float, by_logits: bool, by_targets: bool
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(logits.dtype, torch.float32)
    x, y = logits.to(wide), targets.to(wide)
    tail = torch.log1p(torch.exp(-x.abs()))
    up, down = x.clamp_min(0) + tail, (-x).clamp_min(0) + tail
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    # At gamma = 0 the power is 1 even where the softplus is infinite (0 * inf).
    p_power, q_power = (torch.exp(-gamma * s) if gamma else torch.ones_like(s) for s in (down, up))
    positive, negative = pos_weight * alpha * q_power, (1 - alpha) * p_power
    loss, slope, difference = _outputs(logits, by_logits, by_targets)
    loss.copy_(_vanishing(y * positive, down) + _vanishing((1 - y) * negative, up))
    if by_logits:
        toward_zero = (1 - y) * negative * (gamma * _vanishing(q, up) + p)
        slope.copy_(toward_zero - y * positive * (gamma * _vanishing(p, down) + q))
    if by_targets:
        difference.copy_(_vanishing(positive, down) - _vanishing(negative, up))
    return loss, slope, difference


@launcher("focal_loss_total_fwd", device="cuda", backend="triton")
@launcher("focal_loss_total_fwd", device="cpu", backend="triton")
@launcher("focal_loss_total_fwd", device="cuda", backend="torch")
@launcher("focal_loss_total_fwd", device="cpu", backend="torch")
def _(
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    pos_weight: float,
    scale: float,
    by_logits: bool,
    by_targets: bool,
) -> tuple[Tensor, ...]:
    loss, slope, difference = _fwd(logits, targets, alpha, gamma, pos_weight, by_logits, by_targets)
    return loss.sum().mul_(scale), slope.mul_(scale), difference.mul_(scale)


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        targets: Tensor,
        alpha: float,
        gamma: float,
        pos_weight: float,
        by_logits: bool,
        by_targets: bool,
    ) -> tuple[Tensor, ...]:
        return _fwd(logits, targets, alpha, gamma, pos_weight, by_logits, by_targets)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros for the derivatives
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_):
        _check.first_order("focal_loss")
        if grad is None:
            return (None,) * 7
        slope, difference = ctx.saved_tensors
        return (
            _bwd(grad, slope) if ctx.needs_input_grad[0] else None,
            _bwd(grad, difference) if ctx.needs_input_grad[1] else None,
            *(None,) * 5,
        )


class _FocalTotal(torch.autograd.Function):
    @staticmethod
    def forward(
        logits: Tensor,
        targets: Tensor,
        alpha: float,
        gamma: float,
        pos_weight: float,
        scale: float,
        by_logits: bool,
        by_targets: bool,
    ) -> tuple[Tensor, ...]:
        return _total_fwd(logits, targets, alpha, gamma, pos_weight, scale, by_logits, by_targets)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros for the derivatives
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_):
        _check.first_order("focal_loss")
        if grad is None:
            return (None,) * 8
        kept = _check.readable(grad) and float(grad) == 1  # the end of the graph: the derivatives are the gradients
        slopes = (s if kept else _bwd(grad, s) for s in ctx.saved_tensors)
        wanted = ctx.needs_input_grad[:2]
        return *(slope if one else None for slope, one in zip(slopes, wanted, strict=True)), *(None,) * 6


def focal_loss(
    logits: Tensor,  # (...)
    targets: Tensor,  # (...)
    *,
    alpha: float = 0.5,
    gamma: float = 2.0,
    pos_weight: float | None = None,
    reduction: str = "none",
) -> Tensor:  # (...), or 0-d
    r"""Binary focal loss with logits, finite with finite gradients for every logit.

    $L = w\,\alpha\,y\,q^\gamma\,s(-x) + (1-\alpha)(1-y)\,p^\gamma\,s(x)$ with $p = \sigma(x)$, $q = 1-p$ and the
    softplus $s(t) = \log(1+e^t)$: for hard targets the usual $-\alpha_t(1-p_t)^\gamma \log p_t$.

    **Arguments:**

    - `logits`: any shape; float16, bfloat16 (computed in float32), float32 or float64. +-inf is legal: the loss
        there is its limit, 0 or inf, and the gradient is finite.
    - `targets`: same shape, dtype and device; hard 0/1 or soft in [0, 1] (not checked). Differentiable.
    - `alpha`: weight of the positive class, $1 - \alpha$ of the negative; in [0, 1].
    - `gamma`: focusing exponent, >= 0; 0 is the $\alpha$-weighted cross entropy.
    - `pos_weight`: further factor $w$ >= 0 on the positive term; None is 1.
    - `reduction`: `"none"`, `"mean"` or `"sum"`; in single and double precision the latter two never store the
        losses, and the gradient is ready when the backward starts.

    **Returns:** a tensor like `logits`, or 0-d for a reduction.

    **Raises:** `ValueError` for shapes that differ or a parameter out of range, `TypeError` for other dtypes,
    `RuntimeError` when second derivatives are asked for.

    **Accuracy:** at most twice the error of the same formula in plain torch and the same dtype (`tests/test_ops.py`).
    **Source:** Lin et al. 2017, arXiv:1708.02002, eq. 5.
    """
    _check.required("focal_loss", logits=logits, targets=targets)
    _check.dtypes("focal_loss", _check.REAL + _check.HALF, logits=logits, targets=targets)
    if logits.shape != targets.shape:
        raise ValueError(
            _check.message(
                "focal_loss", "`targets` must have the shape of `logits`", tuple(targets.shape), tuple(logits.shape)
            )
        )
    alpha = _check.number("focal_loss", "alpha", alpha, low=0.0, high=1.0)
    gamma = _check.number("focal_loss", "gamma", gamma, low=0.0)
    weight = 1.0 if pos_weight is None else _check.number("focal_loss", "pos_weight", pos_weight, low=0.0)
    _check.choice("focal_loss", "reduction", reduction, ("none", "mean", "sum"))
    wanted = [torch.is_grad_enabled() and t.requires_grad for t in (logits, targets)]
    if reduction == "none" or logits.dtype in _check.HALF:  # in float16, 1 / count would be lost before a loss scale
        loss = apply(_FocalLoss, logits, targets, alpha, gamma, weight, *wanted)[0]
        return loss if reduction == "none" else getattr(loss, reduction)()
    count = logits.numel()
    scale = 1.0 if reduction == "sum" else 1.0 / count if count else torch.nan  # as torch's mean of nothing
    return apply(_FocalTotal, logits, targets, alpha, gamma, weight, scale, *wanted)[0]
