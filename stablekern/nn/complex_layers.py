r"""Layers of a complex-valued sequence model: linear maps, a norm, a selective scan, and probabilities by Born's rule.

Parameters of the linear maps are complex tensors, so that an optimizer can treat a number as one (`ComplexAdamW` shares
one denominator between its parts). Everything is finite, with finite gradients, for tokens that are zero.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from stablekern import _check, numerics
from stablekern.ops.linear_scan import linear_scan

__all__ = ["BornHead", "ComplexLinear", "ComplexRMSNorm", "ComplexSelectiveScan"]


class ComplexLinear(nn.Module):
    r"""$y = W x + b$ over the last dimension, all of it complex; $W$ starts with $E |w|^2 = 1 / d_{in}$, $b$ at 0.

    **State dict:** `weight`, (d_out, d_in), and `bias`, (d_out), complex64.
    """

    def __init__(self, d_in: int, d_out: int, bias: bool = True) -> None:
        super().__init__()
        self.d_in = _check.integer("nn.ComplexLinear", "d_in", d_in, low=1)
        self.d_out = _check.integer("nn.ComplexLinear", "d_out", d_out, low=1)
        self.weight = nn.Parameter(torch.randn(d_out, d_in, dtype=torch.complex64) / math.sqrt(d_in))
        self.bias = nn.Parameter(torch.zeros(d_out, dtype=torch.complex64)) if bias else None

    def forward(self, x: Tensor) -> Tensor:  # (..., d_in) -> (..., d_out)
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.d_in}, {self.d_out}, bias={self.bias is not None}"


class ComplexRMSNorm(nn.Module):
    r"""$y = s \odot z / \sqrt{\overline{|z|^2} + \epsilon}$ over the last dimension, with a learned real `scale` $s$, 1
    at first.

    $\epsilon$ stands under the root: at $z = 0$ value and gradient are finite, and no token is amplified by more than
    $1 / \sqrt\epsilon$. Added after the root it would leave $0/0$ in the gradient.

    **Arguments:** `dim`; `eps` > 0. **State dict:** `scale`, (dim).
    """

    def __init__(self, dim: int, eps: float = numerics.NORM_EPS.value) -> None:
        super().__init__()
        self.dim = _check.integer("nn.ComplexRMSNorm", "dim", dim, low=1)
        self.eps = _check.number("nn.ComplexRMSNorm", "eps", eps, low=0.0, strict=True)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, z: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        power = (z.real.square() + z.imag.square()).mean(-1, keepdim=True)
        return z * (torch.rsqrt(power + self.eps) * self.scale)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps:g}"


class ComplexSelectiveScan(nn.Module):
    r"""A recurrence of `d_state` complex modes along time, whose step sizes depend on the token: (b, l, dim) to the
    same.

    $$h_t = e^{-\delta_t\, \mathrm{softplus}(\alpha) + i \phi_t \omega} \odot h_{t-1} + \delta_t\, B x_t, \qquad
    y_t = C h_t + D \odot x_t,$$

    with $(\log \delta_t, \log \phi_t)$ a real linear map of $[\mathrm{Re}\, x_t, \mathrm{Im}\, x_t]$, clipped to
    [`dt_min`, `dt_max`] before the exponential, whose gradient then is 0 beyond and never inf * 0. The decay is kept as
    the logarithm of its modulus, which cannot be positive: $|a| < 1$ for all parameters, and nothing is ever divided by
    a product of decays.

    **Arguments:** `dim`; `d_state`; `horizon` > 1: the modes start with memories of 1 to `horizon` steps,
    logarithmically spaced; 0 < `dt_min` < 1 < `dt_max`. `forward(x, initial_state=None, return_last_state=False)`:
    states are (b, d_state), so that a sequence may come in pieces.

    **State dict:** `log_A_mag`, `A_phase`, (d_state); `D`, (dim); `dt_proj.{weight,bias}`; `B.weight`, `C.weight`.
    """

    def __init__(
        self, dim: int, d_state: int = 64, *, horizon: float = 256.0, dt_min: float = 1e-4, dt_max: float = 2.0
    ) -> None:
        super().__init__()
        self.dim = _check.integer("nn.ComplexSelectiveScan", "dim", dim, low=1)
        _check.integer("nn.ComplexSelectiveScan", "d_state", d_state, low=1)
        _check.number("nn.ComplexSelectiveScan", "horizon", horizon, low=1.0, strict=True)
        low = _check.number("nn.ComplexSelectiveScan", "dt_min", dt_min, low=0.0, high=1.0, strict=True)
        high = _check.number("nn.ComplexSelectiveScan", "dt_max", dt_max, low=1.0)
        self.limits = (math.log(low), math.log(high))
        rate = torch.logspace(0.0, -math.log10(horizon), d_state)
        self.log_A_mag = nn.Parameter(torch.log(torch.expm1(rate)))  # softplus gives the rate back
        self.A_phase = nn.Parameter(torch.pi * (2 * torch.rand(d_state) - 1))
        self.D = nn.Parameter(torch.ones(dim))
        self.dt_proj = nn.Linear(2 * dim, 2)
        nn.init.zeros_(self.dt_proj.bias)
        self.B = ComplexLinear(dim, d_state, bias=False)
        self.C = ComplexLinear(d_state, dim, bias=False)

    def forward(
        self, x: Tensor, initial_state: Tensor | None = None, return_last_state: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        _check.shapes("nn.ComplexSelectiveScan", x=(x, f"b l {self.dim}"))
        steps = self.dt_proj(torch.cat((x.real, x.imag), -1)).clamp(*self.limits).exp()
        modulus, turn = steps.unsqueeze(-1).unbind(-2)  # (b, l, 1) each
        gate = torch.polar(torch.exp(-modulus * nn.functional.softplus(self.log_A_mag)), turn * self.A_phase)
        scanned = linear_scan(gate.mT, (modulus * self.B(x)).mT, initial_state=initial_state)
        states = cast(Tensor, scanned)  # without the saturation
        y = self.C(states.mT) + self.D * x
        return (y, states[..., -1]) if return_last_state else y


class BornHead(nn.Module):
    r"""Logits of a distribution over `vocab` by Born's rule: $p_v \propto |(W \psi)_v|^2\, e^{b_v}$.

    $\log(|W \psi|_v^2 + \epsilon\, \overline{|W \psi|^2} + tiny) + b_v$ for (..., dim) complex tokens: real, (...,
    vocab). The floor is relative, so an amplitude that crosses 0 has a bounded logit and a bounded gradient, and the
    scale of $\psi$ does not matter; a token of zeros gives equal logits up to the bias.

    **State dict:** `amplitude.weight`, (vocab, dim), complex; `bias`, (vocab).
    """

    def __init__(self, dim: int, vocab: int) -> None:
        super().__init__()
        self.amplitude = ComplexLinear(dim, vocab, bias=False)
        self.bias = nn.Parameter(torch.zeros(vocab))

    def forward(self, psi: Tensor) -> Tensor:  # (..., dim) -> (..., vocab)
        amplitude = self.amplitude(psi)
        power = amplitude.real.square() + amplitude.imag.square()
        floor = numerics.BORN_FLOOR.value * power.mean(-1, keepdim=True) + torch.finfo(power.dtype).tiny
        return torch.log(power + floor) + self.bias
