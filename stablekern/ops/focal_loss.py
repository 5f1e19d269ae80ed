r"""Focal loss in softplus form, forward and backward finite for every logit and every $\gamma \ge 0$.

For a logit $x$, a target $y \in [0, 1]$ and $p = \sigma(x)$, with the class weights $\alpha_1 = \alpha$,
$\alpha_0 = 1 - \alpha$ and the positive weight $w$,

$$L = w\,\alpha\,y\,q^\gamma\,s(-x) + (1 - \alpha)(1 - y)\,p^\gamma\,s(x), \qquad s(t) = \log(1 + e^t),\; q = 1 - p.$$

For hard targets that is the usual $-\alpha_t (1 - p_t)^\gamma \log p_t$; soft targets mix the two terms linearly, as
binary cross entropy does. Since $\log q = -s(x)$ and $\log p = -s(-x)$, the powers are $e^{-\gamma s(\pm x)}$: nothing is
clamped, and nothing is a power of a probability that has rounded to 0 or 1. The derivative, with $p' = p q$,

$$\frac{dL}{dx} = -w\,\alpha\,y\,q^\gamma (\gamma p\,s(-x) + q) + (1 - \alpha)(1 - y)\,p^\gamma (\gamma q\,s(x) + p),$$

holds no division either, so $\gamma < 1$ and $\gamma = 0$ are not special. In $p\,s(-x)$ and $q\,s(x)$ an infinite logit
would give $0 \cdot \infty$; both products tend to 0, and the code takes them from finite logits only. The gradient with
respect to the target, needed for soft labels that are learned, is the difference of the two unweighted terms.

Sources: Lin et al. 2017, arXiv:1708.02002, eq. 5; the log-space form follows from $\log\sigma(x) = -s(-x)$.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern._registry import define, launcher

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


def _fake(logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _fake_bwd(
    grad: Tensor, logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float
) -> tuple[Tensor, Tensor]:
    return _fake(logits, targets, alpha, gamma, pos_weight), _fake(logits, targets, alpha, gamma, pos_weight)


_fwd = define(
    "focal_loss_fwd(Tensor logits, Tensor targets, float alpha, float gamma, float pos_weight) -> Tensor", fake=_fake
)
_bwd = define(
    "focal_loss_bwd(Tensor grad, Tensor logits, Tensor targets, float alpha, float gamma, float pos_weight)"
    " -> (Tensor, Tensor)",
    fake=_fake_bwd,
)


@launcher("focal_loss_fwd", device="cuda", backend="triton")
@launcher("focal_loss_fwd", device="cpu", backend="triton")
def _(logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float) -> Tensor:
    from stablekern.triton_kernels.focal_loss import focal_loss_fwd

    return focal_loss_fwd(logits.contiguous(), targets.contiguous(), alpha, gamma, pos_weight)


@launcher("focal_loss_bwd", device="cuda", backend="triton")
@launcher("focal_loss_bwd", device="cpu", backend="triton")
def _(
    grad: Tensor, logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float
) -> tuple[Tensor, Tensor]:
    from stablekern.triton_kernels.focal_loss import focal_loss_bwd

    return focal_loss_bwd(grad.contiguous(), logits.contiguous(), targets.contiguous(), alpha, gamma, pos_weight)


def _terms(logits: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """p, q, p^gamma, q^gamma, s(x), s(-x) in at least float32."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    tail = torch.log1p(torch.exp(-x.abs()))
    up, down = x.clamp_min(0) + tail, (-x).clamp_min(0) + tail
    # At gamma = 0 the power is 1 even where the softplus is infinite (0 * inf).
    p_power, q_power = (torch.exp(-gamma * s) if gamma else torch.ones_like(s) for s in (down, up))
    return torch.sigmoid(x), torch.sigmoid(-x), p_power, q_power, up, down


def _vanishing(weight: Tensor, softplus: Tensor) -> Tensor:
    """weight * softplus, 0 where the weight has underflowed: the limit for an infinite logit."""
    return torch.where(weight == 0, 0.0, weight * softplus)


@launcher("focal_loss_fwd", device="cuda", backend="torch")
@launcher("focal_loss_fwd", device="cpu", backend="torch")
def _(logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float) -> Tensor:
    _, _, p_power, q_power, up, down = _terms(logits, gamma)
    y = targets.to(up.dtype)
    positive = _vanishing(pos_weight * alpha * y * q_power, down)
    negative = _vanishing((1 - alpha) * (1 - y) * p_power, up)
    return (positive + negative).to(logits.dtype).contiguous()


@launcher("focal_loss_bwd", device="cuda", backend="torch")
@launcher("focal_loss_bwd", device="cpu", backend="torch")
def _(
    grad: Tensor, logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float
) -> tuple[Tensor, Tensor]:
    p, q, p_power, q_power, up, down = _terms(logits, gamma)
    y, g = targets.to(up.dtype), grad.to(up.dtype)
    positive = pos_weight * alpha * q_power
    negative = (1 - alpha) * p_power
    slope = (1 - y) * negative * (gamma * _vanishing(q, up) + p) - y * positive * (gamma * _vanishing(p, down) + q)
    by_target = _vanishing(positive, down) - _vanishing(negative, up)
    return (g * slope).to(logits.dtype).contiguous(), (g * by_target).to(targets.dtype).contiguous()


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(logits: Tensor, targets: Tensor, alpha: float, gamma: float, pos_weight: float) -> Tensor:
        return _fwd(logits, targets, alpha, gamma, pos_weight)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, targets, *ctx.weights = inputs
        ctx.save_for_backward(logits, targets)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _check.first_order("focal_loss")
        by_logits, by_targets = _bwd(grad, *ctx.saved_tensors, *ctx.weights)
        return by_logits, by_targets if ctx.needs_input_grad[1] else None, None, None, None


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

    $L = w\,\alpha\,y\,q^\gamma\,s(-x) + (1-\alpha)(1-y)\,p^\gamma\,s(x)$ with $p = \sigma(x)$, $q = 1-p$ and the softplus
    $s(t) = \log(1+e^t)$: for hard targets the usual $-\alpha_t(1-p_t)^\gamma \log p_t$.

    **Arguments:**

    - `logits`: any shape; float16, bfloat16 (computed in float32), float32 or float64. +-inf is legal: the loss there is
        its limit, 0 or inf, and the gradient is finite.
    - `targets`: same shape, dtype and device; hard 0/1 or soft in [0, 1] (not checked). Differentiable.
    - `alpha`: weight of the positive class, $1 - \alpha$ of the negative; in [0, 1].
    - `gamma`: focusing exponent, >= 0; 0 is the $\alpha$-weighted cross entropy.
    - `pos_weight`: further factor $w$ >= 0 on the positive term; None is 1.
    - `reduction`: `"none"`, `"mean"` or `"sum"`.

    **Returns:** a tensor like `logits`, or 0-d for a reduction.

    **Raises:** `ValueError` for shapes that differ or a parameter out of range, `TypeError` for other dtypes,
    `RuntimeError` when second derivatives are asked for.

    **Accuracy:** at most twice the error of the same formula in plain torch and the same dtype (`tests/test_ops.py`).
    **Source:** Lin et al. 2017, arXiv:1708.02002, eq. 5.
    """
    _check.dtypes("focal_loss", _check.REAL + _check.HALF, logits=logits, targets=targets)
    if logits.shape != targets.shape:
        raise ValueError(
            _check.message("focal_loss", "`targets` must have the shape of `logits`", tuple(targets.shape), tuple(logits.shape))
        )
    alpha = _check.number("focal_loss", "alpha", alpha, low=0.0, high=1.0)
    gamma = _check.number("focal_loss", "gamma", gamma, low=0.0)
    weight = 1.0 if pos_weight is None else _check.number("focal_loss", "pos_weight", pos_weight, low=0.0)
    _check.choice("focal_loss", "reduction", reduction, ("none", "mean", "sum"))
    loss = _FocalLoss.apply(logits, targets, alpha, gamma, weight)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()
