"""Conjugate gradients: a program solves one system from its first residual to its last.

The rows of A serve as its columns (conjugated, if A is Hermitian), so a product is a sum of rows, each times an entry
of the vector. The vector is passed from the lanes to the rows through scratch memory that stays in the first-level
cache; A comes from there too while it fits, else from the second level. Numbers are pairs of real and imaginary part;
the imaginary ones of a real system are constant zeros, which the compiler removes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import scalar

_TILE_BYTES = 16384  # of A at a time, in registers
_ENTRIES = 256  # of a sparse A's gradient to a program
_MAXITER, _INDEFINITE, _BREAKDOWN, _NON_FINITE, _ASYMMETRIC = (tl.constexpr(1 << bit) for bit in range(5))
_SYMMETRIC, _ANY = tl.constexpr(1), tl.constexpr(2)  # the methods cocg and cgne; cg is 0
# Sizes within 2^30 need no scaling: no square of what such a matrix makes of numbers around 1 leaves float32's range.
_PLAIN_EXPONENT = tl.constexpr(30)

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _exponent(size, WIDE: tl.constexpr):
    """k with 2^k <= size < 2^(k+1), that of the least normal number for all below it, 0 for what has none."""
    if WIDE == tl.float64:
        field = ((size.to(tl.int64, bitcast=True) >> 52) & 0x7FF).to(tl.int32)
        k = tl.where(field > 1, field, 1) - 1023
        usable = (size > 0) & (field < 0x7FF)
    else:
        field = (size.to(tl.int32, bitcast=True) >> 23) & 0xFF
        k = tl.where(field > 1, field, 1) - 127
        usable = (size > 0) & (field < 0xFF)
    return tl.where(usable, k, 0)


@triton.jit
def _power(k, WIDE: tl.constexpr):
    """2^k for a normal one."""
    if WIDE == tl.float64:
        power = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        power = ((k + 127) << 23).to(tl.float32, bitcast=True)
    return power


@triton.jit
def _scaled(v, k, WIDE: tl.constexpr):
    """v 2^k in two factors, neither out of range where the product is not."""
    half = k >> 1
    return v * _power(half, WIDE) * _power(k - half, WIDE)


@triton.jit
def _load(base, at, inside, PARTS: tl.constexpr):
    re = tl.load(base + at * PARTS, mask=inside, other=0.0)
    im = tl.zeros_like(re)
    if PARTS == 2:
        im = tl.load(base + at * PARTS + 1, mask=inside, other=0.0)
    return re, im


@triton.jit
def _store(base, at, re, im, inside, PARTS: tl.constexpr):
    tl.store(base + at * PARTS, re, mask=inside)
    if PARTS == 2:
        tl.store(base + at * PARTS + 1, im, mask=inside)


@triton.jit
def _size(re, im, PARTS: tl.constexpr):
    """The largest part, NaN if one is not finite."""
    size = tl.abs(re)
    probe = re - re
    if PARTS == 2:
        size = tl.maximum(size, tl.abs(im))
        probe += im - im
    return tl.max(size) + tl.sum(probe)


@triton.jit
def _squared_norm(re, im, PARTS: tl.constexpr):
    return tl.sum(re * re + im * im) if PARTS == 2 else tl.sum(re * re)


@triton.jit
def _inner(ur, ui, vr, vi, METHOD: tl.constexpr, PARTS: tl.constexpr):
    """u^H v, its real part alone, or u^T v for a symmetric A."""
    if PARTS == 1:
        re = tl.sum(ur * vr)
        return re, tl.zeros_like(re)
    if METHOD == _SYMMETRIC:
        return tl.sum(ur * vr - ui * vi), tl.sum(ur * vi + ui * vr)
    re = tl.sum(ur * vr + ui * vi)
    return re, tl.zeros_like(re)


@triton.jit
def _both(ur, ui, vr, vi, METHOD: tl.constexpr, PARTS: tl.constexpr):
    """u^H v, or u^T v for a symmetric A, real and imaginary part."""
    if PARTS == 1:
        re = tl.sum(ur * vr)
        return re, tl.zeros_like(re)
    if METHOD == _SYMMETRIC:
        return tl.sum(ur * vr - ui * vi), tl.sum(ur * vi + ui * vr)
    return tl.sum(ur * vr + ui * vi), tl.sum(ur * vi - ui * vr)


@triton.jit
def _quotient(ar, ai, br, bi, METHOD: tl.constexpr, PARTS: tl.constexpr):
    """a / b; NaN where b is 0."""
    if (METHOD == _SYMMETRIC) & (PARTS == 2):
        square = br * br + bi * bi
        return (ar * br + ai * bi) / square, (ai * br - ar * bi) / square
    return ar / br, ai


@triton.jit
def _add_product(ar, ai, ur, ui, cr, ci, METHOD: tl.constexpr, PARTS: tl.constexpr):
    """a u + c for a scalar a, which only COCG has complex."""
    re = ar * ur + cr
    im = ci
    if PARTS == 2:
        im = ar * ui + ci
        if METHOD == _SYMMETRIC:
            re -= ai * ui
            im += ai * ur
    return re, im


@triton.jit
def _row(crow, lane, n):
    """Where the row of each lane starts, and how long it is."""
    start = tl.load(crow + lane, mask=lane < n, other=0)
    return start, (tl.load(crow + lane + 1, mask=lane < n, other=0) - start).to(tl.int32)


@triton.jit
def _product(
    A, crow, col, scratch, vr, vi, exponent, n,
    TRANSPOSED: tl.constexpr, CONJUGATE: tl.constexpr, SPARSE: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Over 2^exponent: the sum over j of row j of a dense A (column, if TRANSPOSED), or its conjugate, times v[j]; the
    product itself with a sparse one."""
    lane = tl.arange(0, N).to(tl.int64)
    tl.debug_barrier()  # nobody reads the vector before this one any more
    _store(scratch, lane, vr, vi, lane < n, PARTS)
    tl.debug_barrier()
    qr = tl.zeros((N,), WIDE)
    qi = tl.zeros((N,), WIDE)
    down = -exponent
    if SPARSE:
        start, length = _row(crow, lane, n)
        for t in range(tl.max(length)):
            inside = t < length
            place = tl.load(col + start + t, mask=inside, other=0)
            sr, si = _load(scratch, place, inside, PARTS)
            ar, ai = _load(A, start + t, inside, PARTS)
            ar = _scaled(ar, down, WIDE)
            ai = _scaled(ai, down, WIDE)
            qr += ar * sr
            if PARTS == 2:
                qr -= ai * si
                qi += ar * si + ai * sr
        return qr, qi
    for first in range(0, n, ROWS):
        j = first + tl.arange(0, ROWS).to(tl.int64)
        sr, si = _load(scratch, j, j < n, PARTS)
        at = lane[None, :] * n + j[:, None] if TRANSPOSED else j[:, None] * n + lane[None, :]
        ar, ai = _load(A, at, (j < n)[:, None] & (lane < n)[None, :], PARTS)
        ar = _scaled(ar, down, WIDE)
        if PARTS == 2:
            ai = _scaled(ai, down, WIDE)
            if CONJUGATE:
                ai = -ai
            qr += tl.sum(ar * sr[:, None] - ai * si[:, None], 0)
            qi += tl.sum(ar * si[:, None] + ai * sr[:, None], 0)
        else:
            qr += tl.sum(ar * sr[:, None], 0)
    return qr, qi


@triton.jit
def _direction(
    A, crow, col, blocks, scratch, rr, ri, exponent, n,
    SIZE: tl.constexpr, METHOD: tl.constexpr, SPARSE: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """z, along which the search goes on from r, and its inner product with r. A sparse A is the adjoint here."""
    if METHOD == _ANY:
        zr, zi = _product(A, crow, col, scratch, rr, ri, exponent, n, False, True, SPARSE, PARTS, WIDE, N, ROWS)
        square = _squared_norm(rr, ri, PARTS)
        return zr, zi, square, tl.zeros_like(square)
    zr = rr
    zi = ri
    if SIZE > 0:
        lane = tl.arange(0, N).to(tl.int64)
        tl.debug_barrier()
        _store(scratch, lane, rr, ri, lane < n, PARTS)
        tl.debug_barrier()
        zr = tl.zeros((N,), WIDE)
        zi = tl.zeros((N,), WIDE)
        for k in range(SIZE):
            j = lane // SIZE * SIZE + k
            sr, si = _load(scratch, j, j < n, PARTS)
            mr, mi = _load(blocks, lane * SIZE + k, lane < n, PARTS)
            mr = _scaled(mr, exponent, WIDE)
            mi = _scaled(mi, exponent, WIDE)
            zr += mr * sr - mi * si
            zi += mr * si + mi * sr
        if PARTS == 1:
            zi = ri
    dr, di = _inner(rr, ri, zr, zi, METHOD, PARTS)
    return zr, zi, dr, di


@triton.jit
def _survey(A, n, METHOD: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr):
    """The largest part of A, NaN if one is not finite, and of what mirrored entries differ by."""
    lane = tl.arange(0, N).to(tl.int64)
    largest = tl.full((), 0.0, WIDE)
    probe = tl.full((), 0.0, WIDE)  # a sum with what is 0 or NaN keeps NaN, which the largest of numbers may drop
    asymmetry = tl.full((), 0.0, WIDE)
    for first in range(0, n, ROWS):
        j = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (j < n)[:, None] & (lane < n)[None, :]
        hr, hi = _load(A, j[:, None] * n + lane[None, :], inside, PARTS)
        size = tl.abs(hr) + (hr - hr)
        if PARTS == 2:
            size = tl.maximum(size, tl.abs(hi)) + (hi - hi)
        largest = tl.maximum(largest, tl.max(tl.max(size, 1), 0))
        probe += tl.sum(tl.sum(size - size, 1), 0)
        if METHOD != _ANY:
            tr, ti = _load(A, lane[None, :] * n + j[:, None], inside, PARTS)
            gap = tl.abs(hr - tr)
            if PARTS == 2:
                gap = tl.maximum(gap, tl.abs(hi - ti if METHOD == _SYMMETRIC else hi + ti))
            asymmetry = tl.maximum(asymmetry, tl.max(tl.max(gap, 1), 0))
    return largest + probe, asymmetry


@triton.jit
def _sparse_survey(A, crow, n, PARTS: tl.constexpr, WIDE: tl.constexpr, N: tl.constexpr):
    """The largest part of A, NaN if one is not finite, and a bound of its norm: the largest sum over a row."""
    lane = tl.arange(0, N).to(tl.int64)
    largest = tl.full((), 0.0, WIDE)
    probe = tl.full((), 0.0, WIDE)
    sums = tl.zeros((N,), WIDE)
    start, length = _row(crow, lane, n)
    for t in range(tl.max(length)):
        re, im = _load(A, start + t, t < length, PARTS)
        size = _size(re, im, PARTS)
        largest = tl.maximum(largest, size)
        probe += size - size
        sums += tl.abs(re) + tl.abs(im)
    return largest + probe, tl.max(sums)


@triton.jit
def cg_fwd_kernel(
    A_ptr,
    crow_ptr,
    col_ptr,
    adjoint_ptr,
    adjoint_crow_ptr,
    adjoint_col_ptr,
    b_ptr,
    x0_ptr,
    blocks_ptr,
    rtol_ptr,
    atol_ptr,
    x_ptr,
    info_ptr,
    iterations_ptr,
    residual_ptr,
    scratch_ptr,
    n,
    columns,
    matrix_elements,
    block_elements,
    maxiter,
    rtol_stride,
    atol_stride,
    asymmetry: tl.float64,
    epsilon: tl.float64,
    nan: tl.float64,
    infinity: tl.float64,
    METHOD: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_START: tl.constexpr,
    SIZE: tl.constexpr,  # of the preconditioner's blocks; 0: none
    SPARSE: tl.constexpr,  # A and, for CGNE, its adjoint have values, crow and col; a dense one is A alone
    WIDE: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    system = tl.program_id(0).to(tl.int64)
    item = system // columns
    lane = tl.arange(0, N).to(tl.int64)
    inside = lane < n
    vector = system * n * PARTS
    A = A_ptr + item * matrix_elements * PARTS
    adjoint = adjoint_ptr + item * matrix_elements * PARTS
    blocks = blocks_ptr + item * block_elements * PARTS
    scratch = scratch_ptr + vector
    eps = scalar(epsilon, WIDE)
    HERMITIAN: tl.constexpr = METHOD != _ANY and METHOD != _SYMMETRIC

    if SPARSE:
        largest, bound = _sparse_survey(A, crow_ptr, n, PARTS, WIDE, N)
        gap = tl.zeros_like(largest)
    else:
        largest, gap = _survey(A, n, METHOD, PARTS, WIDE, N, ROWS)
    br, bi = _load(b_ptr + vector, lane, inside, PARTS)
    size = _size(br, bi, PARTS)
    scale = _exponent(size, WIDE)
    exponent = _exponent(largest, WIDE)
    exponent = tl.where((exponent > _PLAIN_EXPONENT) | (exponent < -_PLAIN_EXPONENT), exponent, 0)
    # Without a preconditioner |alpha| |A| is at most the condition number (CGNE: its square): a step longer than that
    # leads along what A has no hold of.
    hold = _scaled(largest, -exponent, WIDE) * eps
    if METHOD == _ANY:
        hold = hold * hold
    info = tl.where((size - size) + (largest - largest) == 0.0, 0, _NON_FINITE)
    info = tl.where((info == 0) & (gap > scalar(asymmetry, WIDE) * largest), _ASYMMETRIC, info)
    br = _scaled(br, -scale, WIDE)
    bi = _scaled(bi, -scale, WIDE)
    relative = tl.load(rtol_ptr + system * rtol_stride) * tl.sqrt(_squared_norm(br, bi, PARTS))
    absolute = _scaled(tl.load(atol_ptr + system * atol_stride), -scale, WIDE)
    threshold = tl.maximum(relative, absolute)
    yr = tl.zeros((N,), WIDE)
    yi = tl.zeros((N,), WIDE)
    rr = br
    ri = bi
    if HAS_START:
        yr, yi = _load(x0_ptr + vector, lane, inside, PARTS)
        yr = _scaled(yr, exponent - scale, WIDE)
        yi = _scaled(yi, exponent - scale, WIDE)
        start = _size(yr, yi, PARTS)
        info = tl.where(start - start == 0.0, info, _NON_FINITE)
        qr, qi = _product(
            A, crow_ptr, col_ptr, scratch, yr, yi, exponent, n, METHOD == _ANY, HERMITIAN, SPARSE, PARTS, WIDE, N, ROWS
        )
        rr = br - qr
        ri = bi - qi
    if SPARSE and METHOD != _ANY:
        # <b, A A b> and <A b, A b> are one number, but for rounding, if A is what it must be.
        qr, qi = _product(
            A, crow_ptr, col_ptr, scratch, br, bi, exponent, n, False, False, SPARSE, PARTS, WIDE, N, ROWS
        )
        sr, si = _product(
            A, crow_ptr, col_ptr, scratch, qr, qi, exponent, n, False, False, SPARSE, PARTS, WIDE, N, ROWS
        )
        gr, gi = _both(br, bi, sr, si, METHOD, PARTS)
        hr, hi = _both(qr, qi, qr, qi, METHOD, PARTS)
        norm = tl.sqrt(_squared_norm(br, bi, PARTS) * _squared_norm(qr, qi, PARTS))
        limit = scalar(asymmetry, WIDE) * _scaled(bound, -exponent, WIDE) * norm
        difference = tl.maximum(tl.abs(gr - hr), tl.abs(gi - hi))
        info = tl.where((info == 0) & (difference > limit), _ASYMMETRIC, info)
    failed = (info != 0) & (size != 0.0)
    info = tl.where(size == 0.0, 0, info)
    active = (info == 0) & (size != 0.0)
    steps = tl.full((), 0, tl.int32)
    residual = tl.full((), 0.0, WIDE)
    before = scalar(infinity, WIDE)
    while active:  # from the true residual r
        shift = _exponent(_size(rr, ri, PARTS), WIDE)
        rr = _scaled(rr, -shift, WIDE)
        ri = _scaled(ri, -shift, WIDE)
        square = _squared_norm(rr, ri, PARTS)
        norm = tl.sqrt(square)
        residual = _scaled(norm, shift, WIDE)
        falls = residual <= 0.5 * before
        info = tl.where((info == 0) & (steps >= maxiter), _MAXITER, info)
        info = tl.where((info == 0) & (falls == 0), _BREAKDOWN, info)
        info = tl.where(residual <= threshold, 0, info)
        active = (info == 0) & (residual > threshold)
        if active:
            # A second start is there because rounding stood between the recurrence and the truth: it aims lower.
            aim = tl.where(before == scalar(infinity, WIDE), threshold, 0.25 * threshold)
            before = residual
            target = tl.maximum(_scaled(aim, -shift, WIDE), eps * norm)
            target = target * target
            pr, pi, dr, di = _direction(
                adjoint,
                adjoint_crow_ptr,
                adjoint_col_ptr,
                blocks,
                scratch,
                rr,
                ri,
                exponent,
                n,
                SIZE,
                METHOD,
                SPARSE,
                PARTS,
                WIDE,
                N,
                ROWS,
            )
            cr = tl.zeros((N,), WIDE)
            ci = tl.zeros((N,), WIDE)
            going = steps < maxiter
            while going:
                qr, qi = _product(
                    A,
                    crow_ptr,
                    col_ptr,
                    scratch,
                    pr,
                    pi,
                    exponent,
                    n,
                    METHOD == _ANY,
                    HERMITIAN,
                    SPARSE,
                    PARTS,
                    WIDE,
                    N,
                    ROWS,
                )
                if METHOD == _ANY:
                    er = _squared_norm(pr, pi, PARTS)
                    ei = tl.zeros_like(er)
                else:
                    er, ei = _inner(pr, pi, qr, qi, METHOD, PARTS)
                ar, ai = _quotient(dr, di, er, ei, METHOD, PARTS)
                reach = (tl.abs(ar) + tl.abs(ai)) * hold
                usable = (reach < 1.0) if SIZE == 0 else (reach - reach == 0.0)
                if METHOD != _SYMMETRIC:
                    usable = usable & (er > 0.0)
                info = tl.where(usable, info, tl.where(er < 0.0, _INDEFINITE, _BREAKDOWN) if HERMITIAN else _BREAKDOWN)
                ar = tl.where(usable, ar, 0.0)
                ai = tl.where(usable, ai, 0.0)
                cr, ci = _add_product(ar, ai, pr, pi, cr, ci, METHOD, PARTS)
                rr, ri = _add_product(-ar, -ai, qr, qi, rr, ri, METHOD, PARTS)
                steps += usable.to(tl.int32)
                square = _squared_norm(rr, ri, PARTS)
                going = usable & (steps < maxiter) & (square > target)
                if going:
                    zr, zi, fr, fi = _direction(
                        adjoint,
                        adjoint_crow_ptr,
                        adjoint_col_ptr,
                        blocks,
                        scratch,
                        rr,
                        ri,
                        exponent,
                        n,
                        SIZE,
                        METHOD,
                        SPARSE,
                        PARTS,
                        WIDE,
                        N,
                        ROWS,
                    )
                    gr, gi = _quotient(fr, fi, dr, di, METHOD, PARTS)
                    pr, pi = _add_product(gr, gi, pr, pi, zr, zi, METHOD, PARTS)
                    dr = fr
                    di = fi
            yr += _scaled(cr, shift, WIDE)
            yi += _scaled(ci, shift, WIDE)
            qr, qi = _product(
                A,
                crow_ptr,
                col_ptr,
                scratch,
                yr,
                yi,
                exponent,
                n,
                METHOD == _ANY,
                HERMITIAN,
                SPARSE,
                PARTS,
                WIDE,
                N,
                ROWS,
            )
            rr = br - qr
            ri = bi - qi
    missing = tl.where(failed, scalar(nan, WIDE), tl.full((), 0.0, WIDE))
    up = tl.where(size == 0.0, 0.0, 1.0).to(WIDE)
    yr = _scaled(yr * up, scale - exponent, WIDE)
    yi = _scaled(yi * up, scale - exponent, WIDE)
    _store(x_ptr + vector, lane, yr + missing, yi + missing, inside, PARTS)
    tl.store(info_ptr + system, info)
    tl.store(iterations_ptr + system, steps)
    tl.store(residual_ptr + system, _scaled(residual, scale, WIDE) + missing)


@triton.jit
def cg_bwd_kernel(
    adjoint_ptr,
    x_ptr,
    grad_ptr,
    n,
    columns,
    METHOD: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of minus the sum over the columns of adjoint x^H, or of its Hermitian or symmetric part."""
    item = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    j = tl.arange(0, N).to(tl.int64)
    re = tl.zeros((ROWS, N), WIDE)
    im = tl.zeros((ROWS, N), WIDE)
    for k in range(columns):
        base = (item * columns + k) * n * PARTS
        lr, li = _load(adjoint_ptr + base, i, i < n, PARTS)
        vr, vi = _load(x_ptr + base, j, j < n, PARTS)
        re += lr[:, None] * vr[None, :] + li[:, None] * vi[None, :]
        im += li[:, None] * vr[None, :] - lr[:, None] * vi[None, :]
        if METHOD != _ANY:  # and the mirrored entry, conjugated for a Hermitian part
            mr, mi = _load(adjoint_ptr + base, j, j < n, PARTS)
            ur, ui = _load(x_ptr + base, i, i < n, PARTS)
            re += mr[None, :] * ur[:, None] + mi[None, :] * ui[:, None]
            mirrored = mi[None, :] * ur[:, None] - mr[None, :] * ui[:, None]
            im += mirrored if METHOD == _SYMMETRIC else -mirrored
    weight: tl.constexpr = -1.0 if METHOD == _ANY else -0.5
    at = i[:, None] * n + j[None, :]
    _store(grad_ptr + item * n * n * PARTS, at, re * weight, im * weight, (i < n)[:, None] & (j < n)[None, :], PARTS)


@triton.jit
def cg_csr_bwd_kernel(
    row_ptr,  # (nnz), like the next
    col_ptr,
    adjoint_ptr,  # (items, columns, n), like the next
    x_ptr,
    grad_ptr,  # (items, nnz)
    n,
    columns,
    nnz,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The entries of minus the sum over the columns of adjoint x^H that the pattern has."""
    item = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    inside = t < nnz
    i = tl.load(row_ptr + t, mask=inside, other=0)
    j = tl.load(col_ptr + t, mask=inside, other=0)
    re = tl.zeros((BLOCK,), WIDE)
    im = tl.zeros((BLOCK,), WIDE)
    for k in range(columns):
        base = (item * columns + k) * n * PARTS
        lr, li = _load(adjoint_ptr + base, i, inside, PARTS)
        vr, vi = _load(x_ptr + base, j, inside, PARTS)
        re -= lr * vr + li * vi
        im += lr * vi - li * vr
    _store(grad_ptr + item * nnz * PARTS, t, re, im, inside, PARTS)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _layout(b: Tensor, method: int, *, sparse: bool = False) -> dict[str, object]:
    """Constants for systems with right-hand sides b (m, k, n): a tile of a dense A is N wide and ROWS high."""
    width = triton.next_power_of_2(max(b.shape[-1], 1))
    rows = max(1, min(width, _TILE_BYTES // (width * b.element_size())))
    return {
        "METHOD": method,
        "PARTS": 2 if b.is_complex() else 1,
        "WIDE": tl.float64 if b.dtype.to_real() == torch.float64 else tl.float32,
        "N": width,
        "ROWS": rows,
        "num_warps": max(1, width // 128, 4 if width * rows * b.element_size() == _TILE_BYTES and not sparse else 1),
        "enable_fp_fusion": True,  # Triton warns where this is left open; a fused multiply-add rounds once
    }


class _Matrix(NamedTuple):
    """Values of A, and its pattern if it is sparse."""

    values: Tensor
    crow: Tensor
    col: Tensor


def _solve(
    A: _Matrix,
    adjoint: _Matrix,
    b: Tensor,
    x0: Tensor | None,
    blocks: Tensor | None,
    rtol: Tensor,
    atol: Tensor,
    maxiter: int,
    method: int,
    asymmetry: float,
    x: Tensor,
    info: Tensor,
    iterations: Tensor,
    residual: Tensor,
    *,
    sparse: bool,
) -> None:
    batch, columns, n = b.shape
    if batch * columns == 0:
        return
    start, preconditioner = b if x0 is None else x0, b if blocks is None else blocks
    cg_fwd_kernel[(batch * columns,)](
        _real(A.values), A.crow, A.col, _real(adjoint.values), adjoint.crow, adjoint.col, _real(b), _real(start),
        _real(preconditioner), rtol, atol, _real(x), info, iterations, residual, _real(torch.empty_like(b)), n, columns,
        A.values[0].numel(), 0 if blocks is None else blocks[0].numel(), maxiter, int(rtol.numel() > 1),
        int(atol.numel() > 1), asymmetry, torch.finfo(b.dtype).eps, float("nan"), float("inf"),
        HAS_START=x0 is not None, SIZE=0 if blocks is None else blocks.shape[-1], SPARSE=sparse,
        **_layout(b, method, sparse=sparse),
    )  # fmt: skip


def cg_fwd(A: Tensor, b: Tensor, *rest: Any) -> None:
    index = torch.empty(0, dtype=torch.int64, device=b.device)
    matrix = _Matrix(A, index, index)
    _solve(matrix, matrix, b, *rest, sparse=False)


def cg_csr_fwd(crow: Tensor, col: Tensor, values: Tensor, adjoint: tuple[Tensor, ...], b: Tensor, *rest: Any) -> None:
    """`adjoint`: crow, col and values of A^H."""
    transposed = _Matrix(adjoint[2], adjoint[0], adjoint[1])
    _solve(_Matrix(values, crow, col), transposed, b, *rest, sparse=True)


def cg_bwd(adjoint: Tensor, x: Tensor, method: int, grad: Tensor) -> None:
    batch, columns, n = x.shape
    if grad.numel() == 0:
        return
    common = _layout(x, method)
    cg_bwd_kernel[(batch, triton.cdiv(n, common["ROWS"]))](_real(adjoint), _real(x), _real(grad), n, columns, **common)


def cg_csr_bwd(row: Tensor, col: Tensor, adjoint: Tensor, x: Tensor, grad: Tensor) -> None:
    """`row`: that of each entry."""
    batch, columns, n = x.shape
    if grad.numel() == 0:
        return
    constants = _layout(x, 0, sparse=True)
    cg_csr_bwd_kernel[(batch, triton.cdiv(len(col), _ENTRIES))](
        row, col, _real(adjoint), _real(x), _real(grad), n, columns, len(col), PARTS=constants["PARTS"],
        WIDE=constants["WIDE"], BLOCK=_ENTRIES, enable_fp_fusion=True,
    )  # fmt: skip
