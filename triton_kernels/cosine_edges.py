"""Cosines of all pairs of nodes: one program per item and step, its N x D vectors in registers, pairs by one product.

Read: the vectors once; written: one number a pair and one a vector. Backward reads both and the gradient again, makes
the symmetric matrix of weights in registers, and applies it to the vectors: no (B, T, N, N) tensor exists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import scalar

# The vectors of a step, padded to powers of two, are a tile of at most this many numbers: 64 registers a thread.
# In float64, which is there for checks, a product of larger tiles spills on the GPUs that do it without tensor cores.
LARGEST_TILE, LARGEST_DOUBLE_TILE = 8192, 1024
_SMALLEST_SIDE = 16  # of a matrix product

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _power_of_two(largest, WIDE: tl.constexpr):
    """2^-e for largest = m 2^e, 1/2 <= m < 1, within the normal numbers; from the bits of the exponent."""
    if WIDE == tl.float64:
        exponent = (largest.to(tl.int64, bitcast=True) >> 52) & 2047
        exponent = tl.minimum(tl.maximum(2045 - exponent, 1), 2045)
        return (exponent << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(253 - exponent, 1), 253)
        return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _centred(x, inside, features, CENTRE: tl.constexpr):
    """x less its mean over the features, twice: once leaves the rounding of the mean."""
    if CENTRE:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / features)[:, None], 0.0)
        x = tl.where(inside, x - (tl.sum(x, axis=1) / features)[:, None], 0.0)
    return x


@triton.jit
def _vectors(
    x_ptr,
    item,
    step,
    nodes,
    features,
    x_item,
    x_node,
    x_step,
    x_feature,
    CENTRE: tl.constexpr,
    NODES: tl.constexpr,
    FEATURES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The vectors of a step with entries near 1, their powers of two, and which entries exist."""
    n = tl.arange(0, NODES)[:, None]
    d = tl.arange(0, FEATURES)[None, :]
    inside = (n < nodes) & (d < features)
    at = item * x_item + step * x_step + n.to(tl.int64) * x_node + d.to(tl.int64) * x_feature
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(WIDE)
    scale = _power_of_two(tl.max(tl.abs(x), axis=1), WIDE)
    return _centred(x * scale[:, None], inside, features, CENTRE), scale, inside


@triton.jit
def _pair(i, j, nodes):
    """The number of the pair i < j among those of `nodes` nodes, row by row."""
    return i * (2 * nodes - i - 1) // 2 + j - i - 1


@triton.jit
def cosine_edges_fwd_kernel(
    x_ptr,
    edges_ptr,
    inverse_ptr,
    nodes,
    features,
    steps,
    x_item,
    x_node,
    x_step,
    x_feature,
    inverse_eps: tl.float64,
    CENTRE: tl.constexpr,
    NODES: tl.constexpr,
    FEATURES: tl.constexpr,
    WIDE: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1).to(tl.int64)
    y, scale, _ = _vectors(
        x_ptr, item, step, nodes, features, x_item, x_node, x_step, x_feature, CENTRE, NODES, FEATURES, WIDE
    )
    size = tl.sqrt(tl.sum(y * y, axis=1))
    usable = (size > 0) & (size < float("inf"))
    inverse = 1.0 / tl.where(usable, size, 1.0)
    inverse = tl.where(usable, tl.minimum(inverse, scalar(inverse_eps, WIDE) / scale), 0.0)
    unit = y * inverse[:, None]
    s = tl.dot(unit, tl.trans(unit), input_precision="ieee", out_dtype=WIDE)
    s = tl.where(s > 1.0, 1.0, tl.where(s < -1.0, -1.0, s))  # written so that a NaN stays
    i = tl.arange(0, NODES)[:, None]
    j = tl.arange(0, NODES)[None, :]
    pairs = nodes * (nodes - 1) // 2
    at = (item * pairs + _pair(i, j, nodes)) * steps + step
    tl.store(edges_ptr + at, s, mask=(i < j) & (j < nodes))
    n = tl.arange(0, NODES)
    tl.store(inverse_ptr + (item * nodes + n) * steps + step, inverse * scale, mask=n < nodes)


@triton.jit
def cosine_edges_bwd_kernel(
    grad_ptr,
    x_ptr,
    edges_ptr,
    inverse_ptr,
    dx_ptr,
    nodes,
    features,
    steps,
    x_item,
    x_node,
    x_step,
    x_feature,
    inverse_eps: tl.float64,
    inverse_floor: tl.float64,
    CENTRE: tl.constexpr,
    NODES: tl.constexpr,
    FEATURES: tl.constexpr,
    WIDE: tl.constexpr,
):
    step = tl.program_id(0).to(tl.int64)
    item = tl.program_id(1).to(tl.int64)
    y, scale, inside = _vectors(
        x_ptr, item, step, nodes, features, x_item, x_node, x_step, x_feature, CENTRE, NODES, FEATURES, WIDE
    )
    n = tl.arange(0, NODES)
    inverse = tl.load(inverse_ptr + (item * nodes + n) * steps + step, mask=n < nodes, other=0.0)

    i = n[:, None]
    j = n[None, :]
    first = tl.minimum(i, j)
    second = tl.maximum(i, j)
    there = (first < second) & (second < nodes)
    pairs = nodes * (nodes - 1) // 2
    at = (item * pairs + _pair(first, second, nodes)) * steps + step
    g = tl.load(grad_ptr + at, mask=there, other=0.0)
    s = tl.load(edges_ptr + at, mask=there, other=0.0)
    # The NaN of a bad pair travels in its weight, not in y, so it acts only where there is a gradient.
    g = tl.where(g == 0.0, 0.0, g + 0.0 * s)
    radial = tl.sum(g * tl.where(s == s, s, 0.0), axis=1)
    diagonal = tl.where(inverse < scalar(inverse_eps, WIDE), -radial, 0.0)
    weights = tl.where(i == j, diagonal[:, None], g)
    slope = tl.minimum(inverse, scalar(inverse_floor, WIDE))
    weights = slope[:, None] * weights * (inverse / scale)[None, :]
    finite = tl.abs(y) < float("inf")
    dx = tl.dot(weights, tl.where(finite, y, 0.0), input_precision="ieee", out_dtype=WIDE)
    dx = _centred(dx, inside, features, CENTRE)
    d = tl.arange(0, FEATURES)[None, :]
    to = ((item * nodes + i) * steps + step) * features + d
    tl.store(dx_ptr + to, dx.to(dx_ptr.dtype.element_ty), mask=inside)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _sides(nodes: int, features: int) -> tuple[int, int]:
    return (max(triton.next_power_of_2(side), _SMALLEST_SIDE) for side in (nodes, features))


def fits(nodes: int, features: int, dtype: torch.dtype) -> bool:
    """Whether the vectors of a step, and the matrix of their pairs, fit a tile."""
    rows, columns = _sides(nodes, features)
    return rows * max(rows, columns) <= (LARGEST_DOUBLE_TILE if dtype == torch.float64 else LARGEST_TILE)


def _constants(x: Tensor, centre: bool) -> dict[str, object]:
    rows, columns = _sides(x.shape[1], x.shape[3])
    wide = tl.float64 if x.dtype == torch.float64 else tl.float32
    # A fused multiply-add rounds once; Triton warns where this is left open.
    return {"CENTRE": centre, "NODES": rows, "FEATURES": columns, "WIDE": wide, "enable_fp_fusion": True}


def cosine_edges_fwd(x: Tensor, centre: bool, eps: float, edges: Tensor, inverse_norm: Tensor) -> None:
    items, nodes, steps, features = x.shape
    if items * nodes * steps == 0:
        return
    cosine_edges_fwd_kernel[(steps, items)](
        x, edges, inverse_norm, nodes, features, steps, *x.stride(), 1 / eps, **_constants(x, centre)
    )


def cosine_edges_bwd(
    grad: Tensor,
    x: Tensor,
    edges: Tensor,
    inverse_norm: Tensor,
    centre: bool,
    eps: float,
    grad_floor: float,
    dx: Tensor,
) -> None:
    items, nodes, steps, features = x.shape
    if items * nodes * steps == 0:
        return
    floor = 1 / grad_floor if grad_floor else float("inf")
    cosine_edges_bwd_kernel[(steps, items)](
        *(grad, x, edges, inverse_norm, dx, nodes, features, steps, *x.stride(), 1 / eps, floor),
        **_constants(x, centre),
    )
