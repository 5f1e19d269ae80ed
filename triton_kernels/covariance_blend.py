"""Blended covariances and their adjoint, memory bound: each input read once and each result written once.

A program takes two square tiles that mirror each other. What concerns a whole matrix (is it finite, how much of the
gradient lies along it) is left per tile in a small table, which a second kernel with a program per matrix adds up in a
fixed order: no atomics, the same bits every time. Complex matrices come as their real views.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import scalar

_BLOCK = 32
_WARPS = 4

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _load(base, row, column, n, PARTS: tl.constexpr, part: tl.constexpr, BLOCK: tl.constexpr):
    r = row * BLOCK + tl.arange(0, BLOCK)[:, None]
    c = column * BLOCK + tl.arange(0, BLOCK)[None, :]
    return tl.load(base + (r * n + c) * PARTS + part, mask=(r < n) & (c < n), other=0.0)


@triton.jit
def _store(base, value, row, column, n, PARTS: tl.constexpr, part: tl.constexpr, BLOCK: tl.constexpr):
    r = row * BLOCK + tl.arange(0, BLOCK)[:, None]
    c = column * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(base + (r * n + c) * PARTS + part, value, mask=(r < n) & (c < n))


@triton.jit
def _hermitian(base, i, j, n, PARTS: tl.constexpr, part: tl.constexpr, BLOCK: tl.constexpr):
    """Real (part 0) or imaginary part of the Hermitian part's tile (i, j); the halves cannot overflow."""
    here = _load(base, i, j, n, PARTS, part, BLOCK)
    there = tl.trans(_load(base, j, i, n, PARTS, part, BLOCK))
    return 0.5 * here + 0.5 * there if part == 0 else 0.5 * here - 0.5 * there


@triton.jit
def _trace(base, n, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    """The sum of the diagonal and that of its moduli, in float64."""
    k = tl.arange(0, WIDTH).to(tl.int64)
    diagonal = tl.load(base + k * (n + 1) * PARTS, mask=k < n, other=0.0).to(tl.float64)
    return tl.sum(diagonal, 0), tl.sum(tl.abs(diagonal), 0)


@triton.jit
def _status(trace, size, n, ulp, WIDE: tl.constexpr):
    narrow = trace.to(WIDE)
    finite = (narrow - narrow) == 0.0
    return tl.where(finite, tl.where(trace <= n * ulp * size, 1, 0), 2)


@triton.jit
def _inverse_root(trace, WIDE: tl.constexpr):
    """To be multiplied with twice: the reciprocal of a subnormal trace would overflow."""
    return (1.0 / tl.sqrt(tl.where(trace > 0.0, trace, 1.0))).to(WIDE)


@triton.jit
def _not_finite(x):
    return tl.max(tl.where((x - x) == 0.0, 0, 2))


@triton.jit
def covariance_blend_fwd_kernel(
    pred_ptr,
    samp_ptr,
    weights_ptr,
    out_ptr,
    traces_ptr,
    table_ptr,
    n,
    tiles,
    by_pred: tl.float64,
    by_samp: tl.float64,
    by_eye: tl.float64,
    ulp: tl.float64,
    HAS_SAMP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64)
    j = tl.program_id(2).to(tl.int64)
    if i > j:
        return
    matrix = b * n * n * PARTS
    if HAS_WEIGHTS:
        pred_weight = tl.load(weights_ptr + 3 * b)
        samp_weight = tl.load(weights_ptr + 3 * b + 1)
        eye_weight = tl.load(weights_ptr + 3 * b + 2)
    else:
        pred_weight = scalar(by_pred, WIDE)
        samp_weight = scalar(by_samp, WIDE)
        eye_weight = scalar(by_eye, WIDE)
    wide_ulp = scalar(ulp, tl.float64)
    pred_trace, pred_size = _trace(pred_ptr + matrix, n, PARTS, WIDTH)
    status = _status(pred_trace, pred_size, n, wide_ulp, WIDE)
    samp_trace = pred_trace
    if HAS_SAMP:
        samp_trace, samp_size = _trace(samp_ptr + matrix, n, PARTS, WIDTH)
        status = status | _status(samp_trace, samp_size, n, wide_ulp, WIDE)
    pred_root = _inverse_root(pred_trace, WIDE)
    samp_root = _inverse_root(samp_trace, WIDE)
    for part in tl.static_range(PARTS):
        h = _hermitian(pred_ptr + matrix, i, j, n, PARTS, part, BLOCK)
        status = status | _not_finite(h)
        blend = h * pred_root * pred_root * pred_weight
        if HAS_SAMP:
            other = _hermitian(samp_ptr + matrix, i, j, n, PARTS, part, BLOCK)
            status = status | _not_finite(other)
            blend += other * samp_root * samp_root * samp_weight
        if part == 0:
            lane = tl.arange(0, BLOCK)
            blend += tl.where((i == j) & (lane[:, None] == lane[None, :]), eye_weight, 0.0)
        _store(out_ptr + matrix, blend, i, j, n, PARTS, part, BLOCK)
        if i != j:
            _store(out_ptr + matrix, tl.trans(blend if part == 0 else -blend), j, i, n, PARTS, part, BLOCK)
    tl.store(table_ptr + (b * tiles + i) * tiles + j, status)
    if j == 0:
        tl.store(traces_ptr + 2 * b, pred_trace)
        tl.store(traces_ptr + 2 * b + 1, samp_trace)


@triton.jit
def covariance_blend_status_kernel(
    table_ptr, out_ptr, info_ptr, n, tiles, nan: tl.float64, PARTS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """`info` of a matrix, and NaN over a failed one."""
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    no_trace = 0
    not_finite = 0
    for start in range(0, tiles * tiles, BLOCK):
        k = start + lane
        status = tl.load(
            table_ptr + b * tiles * tiles + k, mask=(k // tiles <= k % tiles) & (k < tiles * tiles), other=0
        )
        no_trace = tl.maximum(no_trace, tl.max(status & 1))
        not_finite = tl.maximum(not_finite, tl.max(status & 2))
    info = no_trace | not_finite
    tl.store(info_ptr + b, info)
    if info != 0:
        entries = tl.cast(n, tl.int64) * n * PARTS
        for first in range(0, entries, BLOCK):
            entry = first + lane
            poison = tl.where(entry % PARTS == 0, scalar(nan, WIDE), 0.0)
            tl.store(out_ptr + b * entries + entry, poison, mask=entry < entries)


@triton.jit
def covariance_blend_bwd_kernel(
    grad_ptr,
    pred_ptr,
    samp_ptr,
    weights_ptr,
    traces_ptr,
    info_ptr,
    grad_pred_ptr,
    table_ptr,
    n,
    tiles,
    by_pred: tl.float64,
    BY_PRED: tl.constexpr,
    HAS_SAMP: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scaled Hermitian part of the gradient, and per pair of tiles its products with both inputs."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1).to(tl.int64)
    j = tl.program_id(2).to(tl.int64)
    if i > j:
        return
    matrix = b * n * n * PARTS
    failed = tl.load(info_ptr + b) != 0
    pred_root = _inverse_root(tl.load(traces_ptr + 2 * b), WIDE)
    samp_root = _inverse_root(tl.load(traces_ptr + 2 * b + 1), WIDE)
    weight = tl.load(weights_ptr + 3 * b) if HAS_WEIGHTS else scalar(by_pred, WIDE)
    along_pred = tl.full((), 0.0, WIDE)
    along_samp = tl.full((), 0.0, WIDE)
    twice = tl.where(i == j, 1.0, 2.0)
    for part in tl.static_range(PARTS):
        g = _hermitian(grad_ptr + matrix, i, j, n, PARTS, part, BLOCK)
        h = _hermitian(pred_ptr + matrix, i, j, n, PARTS, part, BLOCK)
        along_pred += tl.sum(g * (h * pred_root * pred_root))
        if HAS_SAMP:
            other = _hermitian(samp_ptr + matrix, i, j, n, PARTS, part, BLOCK)
            along_samp += tl.sum(g * (other * samp_root * samp_root))
        if BY_PRED:
            scaled = tl.where(failed, 0.0, g * pred_root * pred_root * weight)
            _store(grad_pred_ptr + matrix, scaled, i, j, n, PARTS, part, BLOCK)
            if i != j:
                _store(grad_pred_ptr + matrix, tl.trans(scaled if part == 0 else -scaled), j, i, n, PARTS, part, BLOCK)
    at = ((b * tiles + i) * tiles + j) * 2
    tl.store(table_ptr + at, along_pred * twice)
    tl.store(table_ptr + at + 1, along_samp * twice)


@triton.jit
def covariance_blend_diagonal_kernel(
    table_ptr,
    grad_ptr,
    weights_ptr,
    traces_ptr,
    info_ptr,
    grad_pred_ptr,
    grad_weights_ptr,
    n,
    tiles,
    by_pred: tl.float64,
    BY_PRED: tl.constexpr,
    BY_WEIGHTS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The products of a matrix added up: the gradients of its weights, and what its trace takes off the diagonal."""
    b = tl.program_id(0).to(tl.int64)
    matrix = b * n * n * PARTS
    lane = tl.arange(0, BLOCK)
    along_pred = tl.full((), 0.0, WIDE)
    along_samp = tl.full((), 0.0, WIDE)
    for start in range(0, tiles * tiles, BLOCK):
        k = start + lane
        mask = (k // tiles <= k % tiles) & (k < tiles * tiles)
        at = table_ptr + (b * tiles * tiles + k) * 2
        along_pred += tl.sum(tl.load(at, mask=mask, other=0.0))
        along_samp += tl.sum(tl.load(at + 1, mask=mask, other=0.0))
    failed = tl.load(info_ptr + b) != 0
    weight = tl.load(weights_ptr + 3 * b) if HAS_WEIGHTS else scalar(by_pred, WIDE)
    root = _inverse_root(tl.load(traces_ptr + 2 * b), WIDE)
    share = tl.where(failed, 0.0, along_pred * root * root * weight)
    trace = tl.full((), 0.0, WIDE)
    for start in range(0, n, BLOCK):
        k = (start + lane).to(tl.int64)
        place = matrix + k * (n + 1) * PARTS
        if BY_WEIGHTS:
            trace += tl.sum(tl.load(grad_ptr + place, mask=k < n, other=0.0))
        if BY_PRED:
            diagonal = tl.load(grad_pred_ptr + place, mask=k < n, other=0.0)
            tl.store(grad_pred_ptr + place, diagonal - share, mask=k < n)
    if BY_WEIGHTS:
        tl.store(grad_weights_ptr + 3 * b, tl.where(failed, 0.0, along_pred))
        tl.store(grad_weights_ptr + 3 * b + 1, tl.where(failed, 0.0, along_samp))
        tl.store(grad_weights_ptr + 3 * b + 2, tl.where(failed, 0.0, trace))


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _layout(matrices: Tensor) -> tuple[int, int, int, dict]:
    """Batch, n, tiles a side, and what every kernel is told."""
    batch, n = matrices.shape[:2]
    return batch, n, max(1, triton.cdiv(n, _BLOCK)), {
        "PARTS": 2 if matrices.is_complex() else 1,
        "WIDE": tl.float64 if matrices.real.dtype == torch.float64 else tl.float32,
        "BLOCK": _BLOCK,
        "num_warps": _WARPS,
        "enable_fp_fusion": True,  # Triton warns where this is left open; a fused multiply-add rounds once
    }  # fmt: skip


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def covariance_blend_fwd(
    pred: Tensor,
    samp: Tensor,  # empty: none
    weights: Tensor,  # empty: the constants
    constants: list[float],
    out: Tensor,
    traces: Tensor,
    info: Tensor,
) -> None:
    batch, n, tiles, common = _layout(pred)
    if batch == 0:
        return
    table = torch.empty(batch, tiles, tiles, dtype=torch.int32, device=pred.device)
    ulp = torch.finfo(pred.dtype).eps
    covariance_blend_fwd_kernel[(batch, tiles, tiles)](
        _real(pred), _real(samp), weights, _real(out), traces, table, n, tiles, *constants, ulp,
        HAS_SAMP=samp.numel() > 0, HAS_WEIGHTS=weights.numel() > 0, WIDTH=triton.next_power_of_2(max(n, 1)), **common,
    )  # fmt: skip
    covariance_blend_status_kernel[(batch,)](table, _real(out), info, n, tiles, float("nan"), **common)


def covariance_blend_bwd(
    grad: Tensor,
    pred: Tensor,
    samp: Tensor,  # empty: none
    weights: Tensor,  # empty: the constants
    by_pred: float,
    traces: Tensor,
    info: Tensor,
    grad_pred: Tensor,  # empty: not wanted
    grad_weights: Tensor,  # empty: not wanted
) -> None:
    batch, n, tiles, common = _layout(pred)
    if batch == 0:
        return
    table = torch.empty(batch, tiles, tiles, 2, dtype=pred.real.dtype, device=pred.device)
    wanted = {"BY_PRED": grad_pred.numel() > 0, "HAS_WEIGHTS": weights.numel() > 0}
    covariance_blend_bwd_kernel[(batch, tiles, tiles)](
        _real(grad), _real(pred), _real(samp), weights, traces, info, _real(grad_pred), table, n, tiles, by_pred,
        HAS_SAMP=samp.numel() > 0 and grad_weights.numel() > 0, **wanted, **common,
    )  # fmt: skip
    covariance_blend_diagonal_kernel[(batch,)](
        table, _real(grad), weights, traces, info, _real(grad_pred), grad_weights, n, tiles, by_pred,
        BY_WEIGHTS=grad_weights.numel() > 0, **wanted, **common,
    )  # fmt: skip
