"""Sparse symmetric adjacency matrices: one program per item and a few steps, their N x N graphs in registers.

A matrix of keys is symmetric, so what the second node of a pair picks is the same search along the other axis, and
nothing is transposed. A key is 0 where the threshold drops the weight, else the bits of the weight: positive numbers
keep their order, NaN stands above infinity. Read: the weights, twice each, from one cache line; written: the graphs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import scalar

LARGEST_GRAPH = 64
_TILE = 2048  # entries of the graphs of a program: 16 registers a thread for each of the arrays that live at once

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _pair(i, j, nodes):
    """The number of the pair i < j among those of `nodes` nodes, row by row."""
    return i * (2 * nodes - i - 1) // 2 + j - i - 1


@triton.jit
def _places(nodes, steps, NODES: tl.constexpr, STEPS: tl.constexpr):
    """Step, row and column of each entry of the tile, and which entries exist: those off the diagonal."""
    t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)[:, None, None]
    i = tl.arange(0, NODES)[None, :, None]
    j = tl.arange(0, NODES)[None, None, :]
    return t, i, j, (t < steps) & (i < nodes) & (j < nodes)


@triton.jit
def _keys(w, threshold, dropped, WIDE: tl.constexpr):
    integer: tl.constexpr = tl.int64 if WIDE == tl.float64 else tl.int32
    nan: tl.constexpr = 0x7FF8000000000000 if WIDE == tl.float64 else 0x7FC00000
    key = tl.where(w == w, w.to(integer, bitcast=True), nan)
    return tl.where(dropped | (w <= threshold), 0, key)


@triton.jit
def _largest(keys, node, top_k, nodes, AXIS: tl.constexpr):
    """The `top_k` largest keys along an axis, among equal ones the lowest node; a key of 0 is none."""
    picked = keys < 0
    for _ in range(top_k):
        left = tl.where(picked, 0, keys)
        highest = tl.expand_dims(tl.max(left, axis=AXIS), AXIS)
        candidate = tl.where((left == highest) & (left > 0), node, nodes)
        picked |= (candidate < nodes) & (node == tl.expand_dims(tl.min(candidate, axis=AXIS), AXIS))
    return picked


@triton.jit
def assemble_adjacency_fwd_kernel(
    weights_ptr,
    adjacency_ptr,
    picks_ptr,
    nodes,
    pairs,
    steps,
    top_k,
    w_item,
    w_pair,
    w_step,
    threshold: tl.float64,
    NODES: tl.constexpr,
    STEPS: tl.constexpr,
    ALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    item = tl.program_id(1).to(tl.int64)
    t, i, j, inside = _places(nodes, steps, NODES, STEPS)
    pair = _pair(tl.minimum(i, j), tl.maximum(i, j), nodes).to(tl.int64)
    there = inside & (i != j)
    at = item * w_item + pair * w_pair + t.to(tl.int64) * w_step
    w = tl.load(weights_ptr + at, mask=there, other=0.0).to(WIDE)
    keys = _keys(w, scalar(threshold, WIDE), ~there, WIDE)
    if ALL:
        first = keys > 0
        second = first
    else:
        first = _largest(keys, j, top_k, nodes, 2)
        second = _largest(keys, i, top_k, nodes, 1)
    ends = first.to(tl.int32) + second.to(tl.int32)
    entry = tl.where(ends > 0, tl.where(ends == 2, w, w * 0.5), 0.0)
    to = ((item * steps + t) * nodes + i) * nodes + j
    tl.store(adjacency_ptr + to, entry.to(adjacency_ptr.dtype.element_ty), mask=inside)
    tl.store(picks_ptr + (item * pairs + pair) * steps + t, ends.to(tl.uint8), mask=inside & (i < j))


@triton.jit
def assemble_adjacency_bwd_kernel(
    grad_ptr,
    picks_ptr,
    out_ptr,
    nodes,
    pairs,
    steps,
    g_item,
    g_step,
    g_row,
    g_column,
    NODES: tl.constexpr,
    STEPS: tl.constexpr,
    WIDE: tl.constexpr,
):
    item = tl.program_id(1).to(tl.int64)
    t, i, j, inside = _places(nodes, steps, NODES, STEPS)
    there = inside & (i < j)
    at = grad_ptr + item * g_item + t.to(tl.int64) * g_step
    above = tl.load(at + i.to(tl.int64) * g_row + j.to(tl.int64) * g_column, mask=there, other=0.0).to(WIDE)
    below = tl.load(at + j.to(tl.int64) * g_row + i.to(tl.int64) * g_column, mask=there, other=0.0).to(WIDE)
    to = (item * pairs + _pair(i, j, nodes).to(tl.int64)) * steps + t
    ends = tl.load(picks_ptr + to, mask=there, other=0)
    both = above + below
    both = tl.where(ends > 0, tl.where(ends == 2, both, both * 0.5), 0.0)
    tl.store(out_ptr + to, both.to(out_ptr.dtype.element_ty), mask=there)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _constants(nodes: int, dtype: torch.dtype) -> dict[str, object]:
    side = triton.next_power_of_2(nodes)
    steps = max(1, min(16, _TILE // (side * side)))
    wide = tl.float64 if dtype == torch.float64 else tl.float32
    # A fused multiply-add rounds once; Triton warns where this is left open.
    return {
        "NODES": side,
        "STEPS": steps,
        "WIDE": wide,
        "num_warps": 4 if side * side * steps <= _TILE else 16,
        "enable_fp_fusion": True,
    }


def assemble_adjacency_fwd(weights: Tensor, top_k: int, threshold: float, adjacency: Tensor, picks: Tensor) -> None:
    items, steps, nodes, _ = adjacency.shape
    if items * steps == 0:
        return
    constants = _constants(nodes, weights.dtype)
    assemble_adjacency_fwd_kernel[(triton.cdiv(steps, constants["STEPS"]), items)](
        *(weights, adjacency, picks, nodes, picks.shape[1], steps, top_k, *weights.stride(), threshold),
        ALL=top_k >= nodes - 1,
        **constants,
    )


def assemble_adjacency_bwd(grad: Tensor, picks: Tensor, grad_weights: Tensor) -> None:
    items, steps, nodes, _ = grad.shape
    if items * steps == 0:
        return
    constants = _constants(nodes, grad.dtype)
    assemble_adjacency_bwd_kernel[(triton.cdiv(steps, constants["STEPS"]), items)](
        *(grad, picks, grad_weights, nodes, picks.shape[1], steps, *grad.stride()), **constants
    )
