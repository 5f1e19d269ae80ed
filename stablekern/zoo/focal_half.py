"""The focal loss of a saturated probability in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series, largest

__all__ = ["exhibit"]

_GAMMA, _ALPHA, _EDGE = 2.0, 0.5, 30.0


def _textbook(logits: Tensor, targets: Tensor, margin: float | None) -> Tensor:
    p = torch.sigmoid(logits)
    if margin is not None:
        p = p.clamp(margin, 1 - margin)
    p_t = torch.where(targets > 0.5, p, 1 - p)
    return -_ALPHA * (1 - p_t) ** _GAMMA * p_t.log()


_METHODS = (
    (STOCK, "(1 - p)^2 log p", lambda x, t: _textbook(x, t, None)),
    (FIX, "p clamped to [1e-6, 1 - 1e-6]", lambda x, t: _textbook(x, t, 1e-6)),
    (OURS, "focal_loss", lambda x, t: stablekern.focal_loss(x, t, alpha=_ALPHA, gamma=_GAMMA)),
)


def exhibit() -> Exhibit:
    grid = torch.linspace(-_EDGE, _EDGE, 1201)
    x = torch.cat([grid, grid]).half()
    t = torch.cat([torch.ones(1201), torch.zeros(1201)]).half()
    # The truth, in float64 from the logits as rounded: the derivative of the softplus form.
    exact = x.double().requires_grad_()
    sign = 2 * t.double() - 1
    log_p = -torch.nn.functional.softplus(-sign * exact)
    log_q = -torch.nn.functional.softplus(sign * exact)
    truth = torch.autograd.grad((-_ALPHA * (_GAMMA * log_q).exp() * log_p).sum(), exact)[0]
    steep = truth.abs() > 0.1
    rows, series = [], []
    for who, name, method in _METHODS:
        leaf = x.clone().requires_grad_()
        loss = method(leaf, t)
        gradient = torch.autograd.grad(loss.float().sum(), leaf)[0].double()
        broken = ~(gradient.isfinite() & loss.isfinite())
        finite = largest(gradient[~broken].abs().tolist())
        rows.append(
            Row(who, name, "logits in [-30, 30]: loss or gradient not finite", int(broken.sum()), len(x), finite)
        )
        dead = steep & (gradient == 0)
        case = "wrong and certain (true gradient above 0.1): gradient exactly 0"
        rows.append(Row(who, name, case, int(dead.sum()), int(steep.sum())))
        every = slice(0, 1201, 10)
        points = tuple(gradient[every].tolist())
        series.append(Series(who, name, tuple(x[every].double().tolist()), points))
    return Exhibit(
        name="focal_half",
        seen="mixed precision with the focal loss gives NaN",
        cause="in float16 the probability is 0 or 1 from a logit of 9 to 17 on; log 0 times 0 is NaN",
        published="clamp p to [1e-6, 1 - 1e-6], which float16 rounds to [1e-6, 1], and whose gradient is 0",
        remedy="focal_loss: softplus of the logit, float32 inside",
        counted="the loss or its gradient is not finite; or the gradient vanishes where it is needed most",
        measured="largest finite gradient",
        rows=tuple(rows),
        figure=Figure(
            "logit, target 1",
            "gradient of the loss",
            tuple(series),
            "Gradient of the focal loss in float16, gamma 2. Left: confident and wrong. Gaps are NaN.",
        ),
    )
