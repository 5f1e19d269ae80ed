r"""The normalised Laplacian of many small weighted graphs, finite for every finite adjacency.

With $S = (A + A^\top)/2$, $d_i = \sum_j |S_{ij}|$ and $s_i = d_i^{-1/2}$, or 0 for an isolated node ($d_i = 0$),

$$L = I - N, \qquad N_{ij} = s_i S_{ij} s_j.$$

For a symmetric adjacency with weights $\ge 0$ that is $I - D^{-1/2} A D^{-1/2}$. A directed graph is symmetrised.
Negative weights enter the degrees by their size (the signed Laplacian), since with plain row sums a degree could vanish
or be negative beside large weights. So always $|N_{ij}| \le 1$ and the eigenvalues of $L$ lie in [0, 2].

**Adjoint.** With $G = (\bar L + \bar L^\top)/2$ and $q_i = s_i^2 \sum_k G_{ik} N_{ik}$,

$$\bar A_{ij} = -s_i G_{ij} s_j + \tfrac12\,\sigma_{ij}\,(q_i + q_j), \qquad
\sigma_{ij} = -1 \text{ if } S_{ij} < 0 \text{, else } 1,$$

where both nodes have a degree, and 0 in the row and column of an isolated node: there $N$ has no derivative (it grows
like a square root), and 0 is the convention. At a missing edge it is the derivative towards positive weights. The
gradient grows like one over the degree; it holds no power above that, so it overflows only where its true value does.

**Range.** $L$ does not change when $A$ is multiplied by a number, so each graph is first divided by a power of two near
its largest weight: nothing over- or underflows on the way. A node whose degree is below the smallest normal number
times the largest weight of its graph counts as isolated.

Sources: Chung 1997, Spectral Graph Theory, sec. 1.2; Kunegis et al. 2010, "Spectral analysis of signed graphs", sec. 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stablekern import _check, _load
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.ops.eigh import settle_failed

__all__ = ["normalized_laplacian"]

_OP = "normalized_laplacian"


def reference(adjacency: Tensor) -> Tensor:
    """The definition in plain torch, differentiable, without care for the range."""
    S = (adjacency + adjacency.mT) / 2
    connected = S.detach().abs().sum(-1) > 0
    S = S * (connected[..., :, None] & connected[..., None, :])
    degree = torch.where(S < 0, -S, S).sum(-1)
    s = torch.where(connected, torch.where(connected, degree, 1.0) ** -0.5, 0.0)
    return torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) - s[..., :, None] * S * s[..., None, :]


def _fake_fwd(adjacency: Tensor) -> tuple[Tensor, Tensor]:
    return empty(adjacency.shape, adjacency), empty(adjacency.shape[:2], adjacency)


def _fake_bwd(grad: Tensor, laplacian: Tensor, inverse_root: Tensor) -> Tensor:
    return empty(laplacian.shape, laplacian)


_fwd = define("normalized_laplacian_fwd(Tensor adjacency) -> (Tensor laplacian, Tensor inverse_root)", fake=_fake_fwd)
_bwd = define(
    "normalized_laplacian_bwd(Tensor grad, Tensor laplacian, Tensor inverse_root) -> Tensor grad_adjacency",
    fake=_fake_bwd,
)


@launcher("normalized_laplacian_fwd", device="cpu", backend="native")
def _(adjacency: Tensor) -> tuple[Tensor, Tensor]:
    outputs = _fake_fwd(adjacency)
    _load.native().normalized_laplacian_fwd(adjacency.contiguous(), *outputs)
    return outputs


@launcher("normalized_laplacian_bwd", device="cpu", backend="native")
def _(grad: Tensor, laplacian: Tensor, inverse_root: Tensor) -> Tensor:
    grad = grad.contiguous()
    result = _fake_bwd(grad, laplacian, inverse_root)
    _load.native().normalized_laplacian_bwd(grad, laplacian, inverse_root, result)
    settle_failed(result, inverse_root, grad)
    return result


@launcher("normalized_laplacian_fwd", device="cuda", backend="torch")
@launcher("normalized_laplacian_fwd", device="cpu", backend="torch")
def laplacian_of(adjacency: Tensor) -> tuple[Tensor, Tensor]:
    """L (b, n, n) and s (b, n) of adjacencies (b, n, n); NaN for the items with a non-finite entry."""
    tiny = torch.finfo(adjacency.dtype).tiny
    S = adjacency / 2 + adjacency.mT / 2
    largest = S.abs().amax((-2, -1), keepdim=True)
    # The mantissa over the number is a power of two, in (1/2, 1] over the number; the bound is for subnormal ones.
    power = torch.where(largest > 0, torch.frexp(largest).mantissa / largest, 1.0).clamp_max(1 / tiny)
    S = S * power
    degree = S.abs().sum(-1)
    s = torch.where(degree < tiny, 0.0, degree.rsqrt())
    failed = ~torch.isfinite(adjacency).flatten(1).all(1)
    s = s.masked_fill(failed[:, None], torch.nan)
    # The product of the two roots first (it is in range): so both triangles round alike.
    laplacian = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) - S * (s[..., :, None] * s[..., None, :])
    return laplacian.contiguous(), s * power[..., 0].sqrt()


@launcher("normalized_laplacian_bwd", device="cuda", backend="torch")
@launcher("normalized_laplacian_bwd", device="cpu", backend="torch")
def adjoint(grad: Tensor, laplacian: Tensor, inverse_root: Tensor) -> Tensor:
    """The gradient of the adjacency: see the module's text."""
    s = inverse_root
    G = grad / 2 + grad.mT / 2
    N = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device) - laplacian
    q = s * (s * (G * N).sum(-1)) / 2
    degrees = q[..., :, None] + q[..., None, :]
    both = (s[..., :, None] > 0) & (s[..., None, :] > 0)
    result = torch.where(both, torch.where(N < 0, -degrees, degrees) - s[..., :, None] * G * s[..., None, :], 0.0)
    settle_failed(result, s, grad)
    return result.contiguous()


class _NormalizedLaplacian(torch.autograd.Function):
    @staticmethod
    def forward(adjacency: Tensor) -> tuple[Tensor, Tensor]:
        return _fwd(adjacency)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx, grad: Tensor, _):
        _check.first_order(_OP)
        return _bwd(grad, *ctx.saved_tensors)


def flattened(op: str, adjacency: Tensor, pattern: str) -> Tensor:
    """`adjacency`, checked against the pattern and in float32 or float64, as (b, n, n)."""
    _check.dtypes(op, _check.REAL + _check.HALF, adjacency=adjacency)
    _check.shapes(op, adjacency=(adjacency, pattern))
    wide = adjacency.to(torch.float32) if adjacency.dtype in _check.HALF else adjacency
    return wide.reshape(math.prod(wide.shape[:-2]), *wide.shape[-2:])


def normalized_laplacian(
    adjacency: Tensor,  # (..., n, n)
) -> Tensor:  # (..., n, n)
    r"""$I - D^{-1/2} A D^{-1/2}$, finite with a finite gradient for graphs with isolated nodes.

    $L_{ij} = \delta_{ij} - S_{ij}/\sqrt{d_i d_j}$ with $S = (A + A^\top)/2$ and $d_i = \sum_j |S_{ij}|$: for a
    symmetric adjacency with weights >= 0, degrees are row sums (self-loops included). A node without edges has $L_{ii}
    = 1$, zeros elsewhere in its row and column, and a gradient of zero in the adjacency's row and column.

    **Arguments:**

    - `adjacency`: float32 or float64; float16 and bfloat16 are computed, and returned, in float32. Any batch dimensions
        and strides. Directed graphs are symmetrised; negative weights count by their size in the degrees. No scale of
        the weights over- or underflows.

    **Returns:** a new tensor of the same shape, symmetric, with eigenvalues in [0, 2]. A graph with a non-finite weight
    is NaN, itself alone; so is its gradient, unless the loss leaves it out (then 0).

    **Raises:** `ValueError` for matrices that are not square, `TypeError` for other dtypes, `RuntimeError` when second
    derivatives are asked for.

    **Accuracy:** a few ulp. The gradient grows like 1/degree: a graph without an edge below some weight (`threshold` of
    `assemble_adjacency`) bounds it.
    **Sources:** Chung 1997, Spectral Graph Theory, sec. 1.2; Kunegis et al. 2010, sec. 4 (negative weights).
    """
    flat = flattened(_OP, adjacency, "... n n")
    if flat.shape[-1] == 0:
        return flat.reshape(adjacency.shape)
    return apply(_NormalizedLaplacian, flat)[0].reshape(adjacency.shape)
