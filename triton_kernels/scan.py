"""What the scans share: the clamp, and how a scan of few rows is cut along time.

A linear scan of too few rows to fill a GPU is cut into segments that run at the same time. A first pass gives each
segment's map from the state before it to the state after it, `factor * h + term`; the maps are applied in their order,
which gives the state before every segment; a last pass runs all segments from there. The adjoint goes the same way,
backwards. Clamped scans are not cut: with bounds as well, the map would still be known exactly for factors <= 1, but
its `term` overflows where a state grows and only the clamp holds it.

The cut depends on sizes alone, so the bits of a result do not depend on the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import modulus

_JOIN_BLOCK = 128
# Programs of one warp; a GPU has 300 to 600 warp schedulers, and each hides latency with several.
_FEW, _ENOUGH = 1024, 2048
# As many as a thread can have. Left to itself, the assembler stops at 168, for twelve warps at a time, and spills.
ALL_REGISTERS = 255

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def clamped(value, lower, upper):
    """NaN passes, as in `torch.clamp`."""
    raised = tl.maximum(value, lower, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, upper, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def changed_by(value, lower, upper):
    """Whether `clamped` changes it. NaN stays."""
    return (value < lower) | (value > upper)


@triton.jit
def get(ptr, at, mask, COMPLEX: tl.constexpr):
    """A number as a pair, (re, im), two neighbours in memory; of a real one both are the same value."""
    if COMPLEX:
        return tl.load(ptr + 2 * at, mask=mask, other=0.0), tl.load(ptr + 2 * at + 1, mask=mask, other=0.0)
    else:
        value = tl.load(ptr + at, mask=mask, other=0.0)
        return value, value


@triton.jit
def put(ptr, at, re, im, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(ptr + 2 * at, re, mask=mask)
        tl.store(ptr + 2 * at + 1, im, mask=mask)
    else:
        tl.store(ptr + at, re, mask=mask)


@triton.jit
def outside(free, free_im, lower, upper, COMPLEX: tl.constexpr):
    """Where `bounded` changes a state. NaN stays."""
    if COMPLEX:
        return modulus(free, free_im) > upper
    else:
        return changed_by(free, lower, upper)


@triton.jit
def bounded(free, free_im, lower, upper, HAS_CLAMP: tl.constexpr, COMPLEX: tl.constexpr):
    """A state after the clamp. A complex one is scaled down to the modulus `upper`; NaN passes."""
    if not HAS_CLAMP:
        return free, free_im
    elif COMPLEX:
        size = modulus(free, free_im)
        long = size > upper
        size = tl.where(long, size, 1.0)
        share = tl.where(long, upper, 1.0)
        # The unit vector first: the ratio of the moduli may vanish.
        return free / size * share, free_im / size * share
    else:
        state = clamped(free, lower, upper)
        return state, state


@triton.jit
def through_clamp(grad, grad_im, free, free_im, lower, upper, COMPLEX: tl.constexpr):
    """The gradient before the clamp of `free` from that after it."""
    if COMPLEX:
        size = modulus(free, free_im)
        long = size > upper
        size = tl.where(long, size, 1.0)
        normal = free / size
        normal_im = free_im / size
        radial = normal * grad + normal_im * grad_im
        share = upper / size
        tangent = (grad - normal * radial) * share
        tangent_im = (grad_im - normal_im * radial) * share
        return tl.where(long, tangent, grad), tl.where(long, tangent_im, grad_im)
    else:
        grad = tl.where(clamped(free, lower, upper) == free, grad, 0.0)
        return grad, grad


# A row's steps are fetched together, since they lie together in memory, but a recurrence takes one after the other.


@triton.jit
def unstack4(block, ROWS: tl.constexpr):
    """The columns of (ROWS, 4)."""
    even, odd = tl.split(tl.reshape(block, (ROWS, 2, 2)))
    s0, s2 = tl.split(even)
    s1, s3 = tl.split(odd)
    return s0, s1, s2, s3


@triton.jit
def stack4(s0, s1, s2, s3, ROWS: tl.constexpr):
    return tl.reshape(tl.join(tl.join(s0, s2), tl.join(s1, s3)), (ROWS, 4))


@triton.jit
def unstack8(block, ROWS: tl.constexpr):
    even, odd = tl.split(tl.reshape(block, (ROWS, 4, 2)))
    s0, s2, s4, s6 = unstack4(even, ROWS)
    s1, s3, s5, s7 = unstack4(odd, ROWS)
    return s0, s1, s2, s3, s4, s5, s6, s7


@triton.jit
def stack8(s, ROWS: tl.constexpr):
    even = stack4(s[0], s[2], s[4], s[6], ROWS)
    odd = stack4(s[1], s[3], s[5], s[7], ROWS)
    return tl.reshape(tl.join(even, odd), (ROWS, 8))


@triton.jit
def scan_join_kernel(
    first_ptr,  # (item, row, column) by strides
    factor_ptr,  # (item, segment, row or 1, column)
    term_ptr,  # (item, segment, row, column)
    start_ptr,  # like term: the state before each segment, in the order of the scan
    rows,
    columns,
    segments,
    first_item,
    first_row,
    first_column,
    HAS_FIRST: tl.constexpr,
    FACTOR_PER_ROW: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(rows * columns, BLOCK)
    item = (tl.program_id(0) // blocks).to(tl.int64)
    at = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < rows * columns
    if HAS_FIRST:
        source = first_ptr + item * first_item + at // columns * first_row + at % columns * first_column
        state = tl.load(source, mask=real, other=0.0)
    else:
        state = tl.zeros((BLOCK,), start_ptr.dtype.element_ty)
    for i in range(segments):
        segment = item * segments + (segments - 1 - i if REVERSE else i)
        here = segment * rows * columns + at
        tl.store(start_ptr + here, state, mask=real)
        factors = factor_ptr + (here if FACTOR_PER_ROW else segment * columns + at % columns)
        term = tl.load(term_ptr + here, mask=real, other=0.0)
        # A factor may have overflowed to inf; a state of 0 stays 0 all the same.
        state = tl.where(state == 0.0, term, tl.load(factors, mask=real, other=0.0) * state + term)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def segments_of(programs: int, chunks: int) -> int:
    """Into how many segments of whole chunks the time is cut, if each needs so many programs."""
    return 1 if programs >= _FEW else min(chunks, triton.cdiv(_ENOUGH, programs))


def join(first: Tensor | None, factor: Tensor, term: Tensor, start: Tensor, *, reverse: bool) -> None:
    """first (item, row, column), any strides; factor (item, segment, row or 1, column); term, start with all rows."""
    items, segments, rows, columns = term.shape
    if term.numel() == 0:
        return
    scan_join_kernel[(items * triton.cdiv(rows * columns, _JOIN_BLOCK),)](
        term if first is None else first,
        factor,
        term,
        start,
        rows,
        columns,
        segments,
        *((0, 0, 0) if first is None else first.stride()),
        HAS_FIRST=first is not None,
        FACTOR_PER_ROW=factor.shape[2] == rows,
        REVERSE=reverse,
        BLOCK=_JOIN_BLOCK,
        enable_fp_fusion=True,
    )
