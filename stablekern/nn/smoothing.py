r"""A causal exponential average over time, as one scan.

$$y_t = \beta\, y_{t-1} + (1 - \beta)\, x_t, \qquad y_{-1} = x_0 \text{ unless a state is given.}$$

Written as a loop it is one small operation a step, 960 of them for a minute of graphs, each kept for the backward; as a
`linear_scan` with a constant gate it is one operation in each direction. With $y_{-1} = x_0$ the average of a constant
is that constant from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stablekern import _check
from stablekern.nn.norms import wide
from stablekern.nn.stream import Memory
from stablekern.ops.linear_scan import linear_scan

__all__ = ["TemporalEMA"]

_OP = "nn.TemporalEMA"


class TemporalEMA(nn.Module):
    r"""$y_t = \beta y_{t-1} + (1 - \beta) x_t$ along the last dimension, (..., T) -> (..., T).

    **Arguments:** `beta` in [0, 1): a step keeps this share of the average, so its memory is about $1 / (1 - \beta)$
    steps; 0 gives the input. No parameters and no buffers.

    **Forward:** `x` (..., T), real or complex, any leading dimensions; half precision is computed in float32 and
    rounded once. `state` (...): $y_{-1}$, the last step `y[..., -1]` of what came before, or None for $x_0$.
    Differentiable by both. With a `memory` instead it goes on after what that has seen, and moves it on.

    **Raises:** `ValueError` for a `beta` out of range or a state of another shape; `TypeError` for integers.
    """

    def __init__(self, beta: float = 0.9) -> None:
        super().__init__()
        self.beta = _check.number(_OP, "beta", beta, low=0.0, high=1.0)
        if self.beta == 1:
            raise ValueError(_check.message(_OP, "`beta` must be below 1, or nothing would ever enter", beta))

    def forward(self, x: Tensor, state: Tensor | None = None, *, memory: Memory | None = None) -> Tensor:
        _check.dtypes(_OP, _check.HALF + _check.REAL + _check.COMPLEX, x=x)
        _check.shapes(_OP, x=(x, "... t"))
        if state is None and memory is not None:
            state = memory.get(self)
        if state is not None and state.shape != x.shape[:-1]:
            rule = f"`state` must have the shape {tuple(x.shape[:-1])} of one step"
            raise ValueError(_check.message(_OP, rule, tuple(state.shape)))
        if not x.numel():
            return x.clone()
        rows = wide(x).reshape(1, -1, x.shape[-1])
        start = rows[..., 0] if state is None else state.to(rows.dtype).reshape(1, -1)
        gate = torch.full((), self.beta, dtype=rows.dtype, device=rows.device).expand(rows.shape)
        averages = linear_scan(gate, (1 - self.beta) * rows, initial_state=start).view(x.shape)  # type: ignore[union-attr]
        if memory is not None:
            memory[self] = averages[..., -1].detach()
        return averages.to(x.dtype)

    def extra_repr(self) -> str:
        return f"beta={self.beta:g}"
