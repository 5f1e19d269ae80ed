"""Counts of NaN and infinity, range and sum of what is finite, for a list of tensors: memory bound, each read once.

Two stages in a fixed order: the blocks of all tensors of one dtype in a launch, then a program for each tensor. Sums
are float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import modulus
from stablekern.triton_kernels.tensor_lists import TYPES, addresses, aligned, blocks, column, load_block, pointer_at

_BLOCK = 2048  # elements of a program, half as many complex ones
_PARTS = 512  # blocks of a tensor that are read at a time

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def finite_stats_blocks_kernel(
    owners_ptr,
    starts_ptr,
    sizes_ptr,
    tensors_ptr,
    nan_ptr,
    inf_ptr,
    low_ptr,
    high_ptr,
    sum_ptr,
    TYPE: tl.constexpr,
    COMPLEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    owner = tl.load(owners_ptr + block)
    size = tl.load(sizes_ptr + owner)
    first = (block - tl.load(starts_ptr + owner)) * BLOCK
    pointer = pointer_at(tensors_ptr, owner, TYPE, ALIGNED)
    INFINITY: tl.constexpr = float("inf")
    if COMPLEX:
        both = load_block(pointer, 2 * first, 2 * size, 2 * BLOCK).to(tl.float64)
        re, im = tl.split(tl.reshape(both, (BLOCK, 2)))
        x = modulus(re, im)
        x = tl.where((re != re) | (im != im), float("nan"), x)
        infinite = ((tl.abs(re) == INFINITY) | (tl.abs(im) == INFINITY)) & (x == x)
    elif TYPE.is_floating():
        x = load_block(pointer, first, size, BLOCK)
        if TYPE != tl.float64:
            x = x.to(tl.float32)
        infinite = tl.abs(x) == INFINITY
    else:
        x = load_block(pointer, first, size, BLOCK).to(tl.float64)
        infinite = x != x
    inside = first + tl.arange(0, BLOCK) < size
    finite = inside & (x == x) & ~infinite
    tl.store(nan_ptr + block, tl.sum((inside & (x != x)).to(tl.int32), axis=0))
    tl.store(inf_ptr + block, tl.sum((inside & infinite).to(tl.int32), axis=0))
    tl.store(low_ptr + block, tl.min(tl.where(finite, x, INFINITY), axis=0).to(tl.float64))
    tl.store(high_ptr + block, tl.max(tl.where(finite, x, -INFINITY), axis=0).to(tl.float64))
    tl.store(sum_ptr + block, tl.sum(tl.where(finite, x, 0.0).to(tl.float64), axis=0))


@triton.jit
def finite_stats_kernel(
    starts_ptr,
    rows_ptr,
    nan_ptr,
    inf_ptr,
    low_ptr,
    high_ptr,
    sum_ptr,
    nan_out_ptr,
    inf_out_ptr,
    low_out_ptr,
    high_out_ptr,
    sum_out_ptr,
    BLOCK: tl.constexpr,
):
    """The numbers of a tensor from those of its blocks."""
    first = tl.load(starts_ptr + tl.program_id(0))
    last = tl.load(starts_ptr + tl.program_id(0) + 1)
    nan = tl.zeros((BLOCK,), tl.int64)
    inf = tl.zeros((BLOCK,), tl.int64)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < last
        nan += tl.load(nan_ptr + at, mask=inside, other=0)
        inf += tl.load(inf_ptr + at, mask=inside, other=0)
        low = tl.minimum(low, tl.load(low_ptr + at, mask=inside, other=float("inf")))
        high = tl.maximum(high, tl.load(high_ptr + at, mask=inside, other=float("-inf")))
        total += tl.load(sum_ptr + at, mask=inside, other=0.0)
    row = tl.load(rows_ptr + tl.program_id(0))
    tl.store(nan_out_ptr + row, tl.sum(nan, axis=0))
    tl.store(inf_out_ptr + row, tl.sum(inf, axis=0))
    tl.store(low_out_ptr + row, tl.min(low, axis=0))
    tl.store(high_out_ptr + row, tl.max(high, axis=0))
    tl.store(sum_out_ptr + row, tl.sum(total, axis=0))


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def finite_stats(
    tensors: list[Tensor], nan: Tensor, inf: Tensor, low: Tensor, high: Tensor, total: Tensor, count: Tensor
) -> None:
    device = nan.device
    count.copy_(column([x.numel() for x in tensors], device)[: len(tensors)])
    groups: dict[torch.dtype, list[int]] = {}
    for i, x in enumerate(tensors):
        groups.setdefault(x.dtype, []).append(i)
    for dtype, rows in groups.items():
        members = [tensors[i] for i in rows]
        sizes = [x.numel() for x in members]
        block = _BLOCK // 2 if dtype.is_complex else _BLOCK
        where = blocks(sizes, block, device)
        whole = [torch.empty(where.count, dtype=torch.int32, device=device) for _ in range(2)]
        real = [torch.empty(where.count, dtype=torch.float64, device=device) for _ in range(3)]
        if where.count:
            finite_stats_blocks_kernel[(where.count,)](
                where.owners,
                where.starts,
                column(sizes, device),
                addresses(members, device),
                *whole,
                *real,
                TYPE=TYPES[dtype],
                COMPLEX=dtype.is_complex,
                ALIGNED=aligned(members),
                BLOCK=block,
                enable_fp_fusion=True,
            )
        finite_stats_kernel[(len(rows),)](
            where.starts, column(rows, device), *whole, *real, nan, inf, low, high, total, BLOCK=_PARTS,
            enable_fp_fusion=True,
        )  # fmt: skip
