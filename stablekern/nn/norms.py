r"""Root-mean-square norms and the learned scale of a residual branch: the small modules that the layers share.

All act on the last dimension, and compute in float32 or better whatever they are given, so that autocast cannot square
a half-precision feature.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stablekern import _check, numerics
from stablekern.ops.gated_rms_norm import gated_rms_norm

__all__ = ["LayerScale", "RMSNorm", "RMSNormGated", "boundary_norm", "wide"]


def _rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) along the last dimension; under the root, `eps` keeps the gradient at 0 finite."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def wide(x: Tensor) -> Tensor:
    """Half precision to float32, anything else as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    r"""$y = s \odot x / \sqrt{\overline{x^2} + \epsilon}$ over the last dimension, with a learned `scale` $s$ (dim), 1
    at first.

    **Arguments:** `dim`, the size of the last dimension; `eps` > 0, added to the mean square. Any leading dimensions;
    the result has the dtype of the input. Finite, with a finite gradient, at $x = 0$.

    **Source:** Zhang & Sennrich 2019, arXiv:1910.07467.
    """

    def __init__(self, dim: int, eps: float = numerics.NORM_EPS.value) -> None:
        super().__init__()
        self.dim = _check.integer("nn.RMSNorm", "dim", dim, low=1)
        self.eps = _check.number("nn.RMSNorm", "eps", eps, low=0.0, strict=True)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        return (_rms_normalise(wide(x), self.eps) * self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps:g}"


class RMSNormGated(nn.Module):
    r"""The norm at the end of a Mamba-2 block: gate first, then normalise within each of `groups` parts of the
    channels.

    $u = y \odot \mathrm{silu}(z)$, then $w \odot u / \sqrt{\overline{u^2} + \epsilon}$ with a learned `weight` $w$
    (dim); the mean is over the `dim / groups` channels of a part. The same function and parameter name as mamba_ssm's
    gated norm with `norm_before_gate=False`.

    **Arguments:** `dim`, `eps` > 0, `groups`, a divisor of `dim`. `forward(y, z)` takes two tensors (..., dim); the
    result has the dtype of `y`.
    """

    def __init__(self, dim: int, eps: float = numerics.NORM_EPS.value, groups: int = 1) -> None:
        super().__init__()
        self.dim = _check.integer("nn.RMSNormGated", "dim", dim, low=1)
        self.groups = _check.integer("nn.RMSNormGated", "groups", groups, low=1)
        if dim % groups:
            raise ValueError(_check.message("nn.RMSNormGated", "`groups` must divide `dim`", groups, dim))
        self.eps = _check.number("nn.RMSNormGated", "eps", eps, low=0.0, strict=True)
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:  # (..., dim), (..., dim) -> (..., dim)
        return gated_rms_norm(y, z, self.weight, eps=self.eps, groups=self.groups)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps:g}, groups={self.groups}"


class LayerScale(nn.Module):
    r"""$y = \gamma \odot x$ over the last dimension, with a learned `gamma` (dim) that starts at `init`.

    Put on the increment of a residual branch, a small start lets a deep stack begin near the identity.

    **Source:** Touvron et al. 2021, arXiv:2103.17239, sec. 2.
    """

    def __init__(self, dim: int, init: float = 0.1) -> None:
        super().__init__()
        _check.integer("nn.LayerScale", "dim", dim, low=1)
        self.gamma = nn.Parameter(torch.full((dim,), _check.number("nn.LayerScale", "init", init)))

    def forward(self, x: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        return x * self.gamma

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}"


def boundary_norm(kind: str, dim: int) -> nn.Module:
    """The norm between two parts of the detector: `"layernorm"` or `"rmsnorm"` over a last dimension of `dim`."""
    _check.choice("nn.boundary_norm", "kind", kind, ("layernorm", "rmsnorm"))
    return nn.LayerNorm(dim, eps=numerics.NORM_EPS.value) if kind == "layernorm" else RMSNorm(dim)
