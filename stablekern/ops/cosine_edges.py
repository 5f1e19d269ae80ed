r"""Cosine (or correlation) of every pair of nodes at every time step, with a gradient that is bounded everywhere.

For the vectors $x_i$ of one item and one step, with $n_i = \max(|x_i|, \epsilon)$ and $\hat x_i = x_i / n_i$,

$$s_{ij} = \min(1, \max(-1, \hat x_i \cdot \hat x_j)), \qquad i < j \text{ in row-major order.}$$

The clamp removes the rounding above 1 and nothing else, so it belongs to the value only. Taken into the derivative it
would set to 0 the gradient of every parallel pair whose cosine happened to round above 1 (15 % of them in float32).
With $N_i = \max(n_i, \phi)$ for the floor $\phi$ = `grad_floor`, the gradient is

$$dx_i = \frac{1}{N_i} \sum_{j \ne i} g_{ij} \bigl( \hat x_j - s_{ij}\, \hat x_i\, [\,|x_i| > \epsilon\,] \bigr),
\qquad dx_i = 0 \text{ where } x_i = 0.$$

For $|x_i| > \phi$ that is the derivative. The true one grows as $1/|x_i|$; here $|\partial s_{ij} / \partial x_i| \le
1/\phi$ for each pair. A vector that is exactly 0 has no direction: its cosines are 0 and neither it nor (through it)
its partners get a gradient. Over the nodes the sum is one symmetric matrix, $W_{ij} = g_{ij}$ with the diagonal
$-\sum_j g_{ij} s_{ij}\,[\,|x_i| > \epsilon\,]$, applied to the $\hat x$: only $x$, $s$ and one number a vector are
kept.

*Correlation* is the same of $x_i$ less its mean over the features; its adjoint takes the mean off $dx_i$ likewise. The
mean is taken off twice: once would leave the rounding of the mean, which for a constant vector is all there is left, so
that two dead channels would correlate perfectly.

*Range.* Each vector is first multiplied by a power of two that brings its largest entry near 1, which is exact; the
squares can then neither overflow nor vanish. A non-finite entry makes the pairs of its node at its step NaN, and no
other. Backward, a pair whose gradient is 0 contributes nothing, NaN or not, so bad pairs may be masked by
`torch.where` downstream; other gradients of such pairs are NaN.

Sources: the derivative of $u \cdot v / (|u||v|)$; for the two clamps, pytorch/pytorch issue 78064 (cosines above 1) and
pull request 29513 (a clamp kills the gradient).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stablekern import _check
from stablekern._load import native
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.numerics import COSINE_EPS, COSINE_GRAD_FLOOR

__all__ = ["cosine_edges"]

# The native kernel keeps a matrix of vectors per thread, 1 MB in float32 at this size.
_NATIVE_NODES = 128


def reference(
    x: Tensor, *, metric: str = "cosine", eps: float = COSINE_EPS.value, grad_floor: float = COSINE_GRAD_FLOOR.value
) -> Tensor:
    """The definition in plain torch; autograd gives the stated gradient, floor and clamp convention included."""
    if metric == "correlation":
        x = x - x.mean(-1, keepdim=True)
    largest = x.detach().abs().amax(-1, keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    size = torch.linalg.vector_norm(x.detach() / largest, dim=-1, keepdim=True)
    length = (size * largest).clamp_min(eps)
    share = torch.where(length < grad_floor, length / grad_floor, 1.0)
    share = torch.where(size > 0, share, 0.0)
    # The value of x, `share` times its gradient.
    x = x.detach() + share * (x - x.detach())
    y = x / largest
    unit = y / torch.maximum(torch.linalg.vector_norm(y, dim=-1, keepdim=True), eps / largest)
    first, second = torch.triu_indices(x.shape[1], x.shape[1], 1, device=x.device)
    cosine = (unit[:, first] * unit[:, second]).sum(-1)
    return cosine + (cosine.clamp(-1, 1) - cosine).detach()


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _fake(x: Tensor, centre: bool, eps: float) -> tuple[Tensor, Tensor]:
    b, n, t, _ = x.shape
    return empty((b, n * (n - 1) // 2, t), x, _wide(x)), empty((b, n, t), x, _wide(x))


def _fake_bwd(
    grad: Tensor, x: Tensor, edges: Tensor, inverse_norm: Tensor, centre: bool, eps: float, grad_floor: float
) -> Tensor:
    return empty(x.shape, x)


# `edges` and `inverse_norm` are float32 or float64; the latter is 1 / max(|x|, eps), and 0 where x is 0 or not finite.
_fwd = define("cosine_edges_fwd(Tensor x, bool centre, float eps) -> (Tensor, Tensor)", fake=_fake)
_bwd = define(
    "cosine_edges_bwd(Tensor grad, Tensor x, Tensor edges, Tensor inverse_norm, bool centre, float eps,"
    " float grad_floor) -> Tensor",
    fake=_fake_bwd,
)


def _centred(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x - x.mean(-1, keepdim=True)


def _scaled(x: Tensor, centre: bool) -> tuple[Tensor, Tensor]:
    """(B,T,N,D) vectors with entries near 1, and the powers of two (B,T,N,1) that they were multiplied by."""
    x = x.transpose(1, 2).to(_wide(x))
    # A power of two whose inverse is normal too: enough for subnormal entries, whose squares are then normal.
    limit = -round(math.log2(torch.finfo(x.dtype).tiny))
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent.clamp(-limit, limit)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=x.dtype), -exponent)
    x = x * scale
    return (_centred(x) if centre else x), scale


def _pairs(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    first, second = torch.triu_indices(n, n, 1, device=device)
    return first, second


def _unsupported(x: Tensor) -> str | None:
    return None if x.shape[1] <= _NATIVE_NODES else f"more than {_NATIVE_NODES} nodes"


def _dense_features(x: Tensor) -> Tensor:
    x = x.to(_wide(x))
    return x if x.stride(-1) == 1 else x.contiguous()


@launcher("cosine_edges_fwd", device="cpu", backend="native", supports=lambda x, *_: _unsupported(x))
def _(x: Tensor, centre: bool, eps: float) -> tuple[Tensor, Tensor]:
    edges, inverse_norm = _fake(x, centre, eps)
    native().cosine_edges_fwd(_dense_features(x), centre, eps, edges, inverse_norm)
    return edges, inverse_norm


@launcher("cosine_edges_bwd", device="cpu", backend="native", supports=lambda grad, x, *_: _unsupported(x))
def _(
    grad: Tensor, x: Tensor, edges: Tensor, inverse_norm: Tensor, centre: bool, eps: float, grad_floor: float
) -> Tensor:
    dx = empty(x.shape, x, _wide(x))
    native().cosine_edges_bwd(grad.contiguous(), _dense_features(x), edges, inverse_norm, centre, eps, grad_floor, dx)
    return dx.to(x.dtype)


def _too_large(x: Tensor) -> str | None:
    from stablekern.triton_kernels.cosine_edges import fits

    rule = f"{x.shape[1]} nodes of {x.shape[3]} features exceed a tile of {x.dtype}"
    return None if fits(x.shape[1], x.shape[3], x.dtype) else rule


@launcher("cosine_edges_fwd", device="cuda", backend="triton", supports=lambda x, *_: _too_large(x))
@launcher("cosine_edges_fwd", device="cpu", backend="triton", supports=lambda x, *_: _too_large(x))
def _(x: Tensor, centre: bool, eps: float) -> tuple[Tensor, Tensor]:
    from stablekern.triton_kernels.cosine_edges import cosine_edges_fwd

    edges, inverse_norm = _fake(x, centre, eps)
    cosine_edges_fwd(x, centre, eps, edges, inverse_norm)
    return edges, inverse_norm


@launcher("cosine_edges_bwd", device="cuda", backend="triton", supports=lambda grad, x, *_: _too_large(x))
@launcher("cosine_edges_bwd", device="cpu", backend="triton", supports=lambda grad, x, *_: _too_large(x))
def _(
    grad: Tensor, x: Tensor, edges: Tensor, inverse_norm: Tensor, centre: bool, eps: float, grad_floor: float
) -> Tensor:
    from stablekern.triton_kernels.cosine_edges import cosine_edges_bwd

    dx = empty(x.shape, x)
    cosine_edges_bwd(grad.contiguous(), x, edges, inverse_norm, centre, eps, grad_floor, dx)
    return dx


@launcher("cosine_edges_fwd", device="cuda", backend="torch")
@launcher("cosine_edges_fwd", device="cpu", backend="torch")
def _(x: Tensor, centre: bool, eps: float) -> tuple[Tensor, Tensor]:
    y, scale = _scaled(x, centre)
    size = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    inverse = torch.where((size > 0) & (size < torch.inf), (1 / size).minimum((1 / eps) / scale), 0.0)
    unit = y * inverse
    first, second = _pairs(x.shape[1], x.device)
    edges = (unit @ unit.mT)[..., first, second].clamp(-1, 1)
    return edges.transpose(1, 2).contiguous(), (inverse * scale).squeeze(-1).transpose(1, 2).contiguous()


@launcher("cosine_edges_bwd", device="cuda", backend="torch")
@launcher("cosine_edges_bwd", device="cpu", backend="torch")
def _(
    grad: Tensor, x: Tensor, edges: Tensor, inverse_norm: Tensor, centre: bool, eps: float, grad_floor: float
) -> Tensor:
    y, scale = _scaled(x, centre)
    b, t, n, _ = y.shape
    first, second = _pairs(n, x.device)
    inverse = inverse_norm.transpose(1, 2).unsqueeze(-1)
    # The NaN of a bad pair travels in its weight, not in y, so it acts only where there is a gradient.
    g = torch.where(grad == 0, 0.0, grad + 0.0 * edges).transpose(1, 2)
    radial = g * edges.transpose(1, 2).nan_to_num(nan=0.0)
    weights = torch.zeros(b, t, n, n, dtype=y.dtype, device=x.device)
    weights[..., first, second] = radial
    weights[..., second, first] = radial
    diagonal = torch.where(inverse.squeeze(-1) < 1 / eps, -weights.sum(-1), 0.0)
    weights[..., first, second] = g
    weights[..., second, first] = g
    weights.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
    slope = inverse.clamp_max(1 / grad_floor if grad_floor else torch.inf)
    weights = slope * weights * (inverse / scale).mT
    dx = weights @ y.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    dx = _centred(dx) if centre else dx
    return dx.transpose(1, 2).to(x.dtype).contiguous()


class _CosineEdges(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, centre: bool, eps: float, grad_floor: float) -> tuple[Tensor, Tensor]:
        return _fwd(x, centre, eps)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, *ctx.options = inputs
        edges, inverse_norm = output
        ctx.mark_non_differentiable(inverse_norm)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, edges, inverse_norm)

    @staticmethod
    def backward(ctx, grad: Tensor | None, _):
        _check.first_order("cosine_edges")
        if grad is None:
            return (None,) * 4
        return _bwd(grad, *ctx.saved_tensors, *ctx.options), None, None, None


def cosine_edges(
    x: Tensor,  # (B, N, T, D)
    *,
    metric: str = "cosine",
    eps: float = COSINE_EPS.value,
    grad_floor: float = COSINE_GRAD_FLOOR.value,
) -> Tensor:  # (B, E, T), E = N (N - 1) / 2
    r"""Similarity of all pairs of nodes at each step, in [-1, 1], with a gradient of at most `1 / grad_floor` a pair.

    $s_{ij} = x_i \cdot x_j / (n_i n_j)$ with $n_i = \max(|x_i|, \epsilon)$, clamped to +-1 in the value only. Backward,
    with $\hat x = x / n$ and $\phi$ = `grad_floor`, $dx_i = \sum_j g_{ij} (\hat x_j - s_{ij} \hat x_i [\,|x_i| >
    \epsilon\,]) / \max(n_i, \phi)$: the derivative wherever $|x_i| > \phi$, smaller below it, and 0 by convention at
    $x_i = 0$.

    **Arguments:**

    - `x`: features of N nodes at T steps, D >= 1 of them; float16, bfloat16 (computed in float32), float32 or float64.
        Any finite magnitude: no square over- or underflows.
    - `metric`: `"cosine"`, or `"correlation"`, the cosine after the mean over D is taken off (a constant vector counts
        as 0).
    - `eps`: norm below which a vector counts as this long, so its cosines go to 0 with it; at least the smallest normal
        number of the dtype that is computed in.
    - `grad_floor`: norm below which the gradient stops growing; 0 for the derivative itself, which reaches 1/eps.

    **Returns:** a contiguous tensor of the dtype of `x`; the pairs i < j in row-major order, as
    `torch.triu_indices(N, N, 1)`.

    A non-finite entry makes NaN of the N - 1 pairs of its node at its step, and of nothing else; the gradient there is
    NaN for the nodes of pairs with a non-zero gradient.

    **Raises:** `ValueError` for another shape or an option out of range, `TypeError` for another dtype, `RuntimeError`
    when second derivatives are asked for.

    **Accuracy:** at most twice the error of the same formula in plain torch and the same dtype (`tests/test_ops.py`).
    """
    _check.dtypes("cosine_edges", _check.REAL + _check.HALF, x=x)
    sizes = _check.shapes("cosine_edges", x=(x, "b n t d"))
    if sizes["d"] < 1:
        raise ValueError(_check.message("cosine_edges", "`x` must have at least one feature", tuple(x.shape)))
    _check.choice("cosine_edges", "metric", metric, ("cosine", "correlation"))
    eps = _check.number("cosine_edges", "eps", eps, low=torch.finfo(_wide(x)).tiny)
    grad_floor = _check.number("cosine_edges", "grad_floor", grad_floor, low=0.0)
    edges, _ = apply(_CosineEdges, x, metric == "correlation", eps, grad_floor)
    return edges.to(x.dtype)
