"""Norms of a list of gradients and their product with one factor, a launch for each dtype; both are memory bound.

Squares are summed in float64, which makes the finite check free and holds every float32 square. That takes a conversion
and a multiply-add for each number, on an RTX 4090 three quarters of the time in which the numbers arrive. float64
gradients are brought to the size of 1, block by block. Two stages in a fixed order, without atomics: the bits do not
change from run to run.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.scan import ALL_REGISTERS
from stablekern.triton_kernels.tensor_lists import (
    TYPES,
    addresses,
    aligned,
    blocks,
    column,
    load_block,
    pointer_at,
    store_block,
)

_BLOCK = 2048  # numbers of a program
_PARTS = 1024  # norms of blocks that are read at a time

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _unit_of(peak):
    """What brings numbers up to `peak` to the size of 1; 1 for a peak of 0 or of infinity."""
    return tl.where((peak > 0.0) & (peak < float("inf")), peak, 1.0)


@triton.jit
def gradient_norms_blocks_kernel(
    owners_ptr,
    starts_ptr,
    sizes_ptr,
    gradients_ptr,
    norms_ptr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    owner = tl.load(owners_ptr + tl.program_id(0))
    first = (tl.program_id(0) - tl.load(starts_ptr + owner)) * BLOCK
    x = load_block(pointer_at(gradients_ptr, owner, TYPE, ALIGNED), first, tl.load(sizes_ptr + owner), BLOCK)
    x = x.to(tl.float64)
    if TYPE == tl.float64:
        unit = _unit_of(tl.max(tl.abs(x), axis=0))
        x /= unit
        norm = tl.sqrt(tl.sum(x * x, axis=0)) * unit
    else:
        norm = tl.sqrt(tl.sum(x * x, axis=0))
    tl.store(norms_ptr + tl.program_id(0), norm)


@triton.jit
def gradient_norms_kernel(starts_ptr, rows_ptr, parts_ptr, norms_ptr, BLOCK: tl.constexpr):
    """The norm of a tensor from those of its blocks."""
    tensor = tl.program_id(0)
    first = tl.load(starts_ptr + tensor)
    last = tl.load(starts_ptr + tensor + 1)
    peaks = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        peaks = tl.maximum(peaks, tl.load(parts_ptr + at, mask=at < last, other=0.0))
    unit = _unit_of(tl.max(peaks, axis=0))
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, last, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(parts_ptr + at, mask=at < last, other=0.0) / unit
        sums += part * part
    tl.store(norms_ptr + tl.load(rows_ptr + tensor), tl.sqrt(tl.sum(sums, axis=0)) * unit)


@triton.jit
def multiply_gradients_kernel(
    owners_ptr,
    starts_ptr,
    sizes_ptr,
    gradients_ptr,
    factor_ptr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor == 1.0:  # nothing is read or written
        return
    owner = tl.load(owners_ptr + tl.program_id(0))
    size = tl.load(sizes_ptr + owner)
    first = (tl.program_id(0) - tl.load(starts_ptr + owner)) * BLOCK
    pointer = pointer_at(gradients_ptr, owner, TYPE, ALIGNED)
    x = load_block(pointer, first, size, BLOCK)
    if TYPE == tl.float64:
        x *= factor
    else:  # a factor below 6e-8 is 0 in float16, though its products need not be
        x = (x.to(tl.float32) * factor.to(tl.float32)).to(TYPE)
    store_block(pointer, x, first, size, BLOCK)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _by_dtype(gradients: list[Tensor]) -> Iterator[tuple[list[int], list[Tensor], list[int]]]:
    """Positions, gradients and their sizes in real numbers, for each type of real numbers."""
    groups: dict[torch.dtype, list[int]] = {}
    for i, gradient in enumerate(gradients):
        groups.setdefault(gradient.dtype.to_real() if gradient.is_complex() else gradient.dtype, []).append(i)
    for rows in groups.values():
        members = [gradients[i] for i in rows]
        yield rows, members, [g.numel() * (2 if g.is_complex() else 1) for g in members]


def gradient_norms(gradients: list[Tensor], norms: Tensor) -> None:
    device = norms.device
    for rows, members, sizes in _by_dtype(gradients):
        where = blocks(sizes, _BLOCK, device)
        parts = torch.empty(where.count, dtype=torch.float64, device=device)
        if where.count:
            gradient_norms_blocks_kernel[(where.count,)](
                where.owners,
                where.starts,
                column(sizes, device),
                addresses(members, device),
                parts,
                TYPE=TYPES[members[0].dtype],
                ALIGNED=aligned(members),
                BLOCK=_BLOCK,
                enable_fp_fusion=True,
                maxnreg=ALL_REGISTERS,
            )
        gradient_norms_kernel[(len(rows),)](
            where.starts,
            column(rows, device),
            parts,
            norms,
            BLOCK=_PARTS,
            enable_fp_fusion=True,
            maxnreg=ALL_REGISTERS,
        )


def multiply_gradients(gradients: list[Tensor], factor: Tensor) -> None:
    device = factor.device
    for _, members, sizes in _by_dtype(gradients):
        where = blocks(sizes, _BLOCK, device)
        if where.count:
            multiply_gradients_kernel[(where.count,)](
                where.owners,
                where.starts,
                column(sizes, device),
                addresses(members, device),
                factor,
                TYPE=TYPES[members[0].dtype],
                ALIGNED=aligned(members),
                BLOCK=_BLOCK,
                enable_fp_fusion=True,
            )
