"""The gated norm: a program per stretch of rows and part, a row's part in registers; read and written once.

Backward adds up the gradient of the weight over its rows, in order, and writes one sum a program: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import scalar, sigmoid

LARGEST_PART = 1024
_TILE = 1024  # entries of the rows that a program holds at once

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def gated_rms_norm_fwd_kernel(
    y_ptr,
    z_ptr,
    weight_ptr,
    out_ptr,
    rows,
    width,
    part,
    y_row,
    z_row,
    eps: tl.float64,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, PART)[None, :]
    inside = (row < rows) & (k < part)
    k += tl.program_id(1) * part
    z = tl.load(z_ptr + row * z_row + k, mask=inside, other=0.0).to(WIDE)
    u = tl.load(y_ptr + row * y_row + k, mask=inside, other=0.0).to(WIDE) * (z * sigmoid(z))
    inverse = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / part + scalar(eps, WIDE))
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(WIDE)
    tl.store(out_ptr + row * width + k, u * inverse[:, None] * weight, mask=inside)


@triton.jit
def gated_rms_norm_bwd_kernel(
    grad_ptr,
    y_ptr,
    z_ptr,
    weight_ptr,
    by_y_ptr,
    by_z_ptr,
    sums_ptr,
    rows,
    width,
    part,
    rows_per_program,
    grad_row,
    y_row,
    z_row,
    eps: tl.float64,
    ROWS: tl.constexpr,
    PART: tl.constexpr,
    WIDE: tl.constexpr,
):
    features = tl.arange(0, PART)
    at = tl.program_id(1) * part + features
    weight = tl.load(weight_ptr + at, mask=features < part, other=0.0).to(WIDE)[None, :]
    total = tl.zeros((PART,), WIDE)
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    for start in range(0, rows_per_program, ROWS):
        row = first + start + tl.arange(0, ROWS)[:, None]
        inside = (row < last) & (features < part)[None, :]
        k = at[None, :]
        z = tl.load(z_ptr + row * z_row + k, mask=inside, other=0.0).to(WIDE)
        y = tl.load(y_ptr + row * y_row + k, mask=inside, other=0.0).to(WIDE)
        g = tl.load(grad_ptr + row * grad_row + k, mask=inside, other=0.0).to(WIDE)
        share = sigmoid(z)
        gate = z * share
        u = y * gate
        inverse = 1.0 / tl.sqrt(tl.sum(u * u, axis=1) / part + scalar(eps, WIDE))[:, None]
        normal = u * inverse
        pull = (tl.sum(g * weight * normal, axis=1) / part)[:, None]
        by_u = inverse * (g * weight - normal * pull)
        to = row * width + k
        tl.store(by_y_ptr + to, by_u * gate, mask=inside)
        tl.store(by_z_ptr + to, by_u * y * (share + gate * (1.0 - share)), mask=inside)
        total += tl.sum(g * normal, axis=0)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * width + at, total, mask=features < part)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _constants(y: Tensor, part: int) -> dict[str, object]:
    side = triton.next_power_of_2(part)
    wide = tl.float64 if y.dtype == torch.float64 else tl.float32
    rows = max(1, min(32, _TILE // side))
    # A fused multiply-add rounds once; Triton warns where this is left open.
    return {"ROWS": rows, "PART": side, "WIDE": wide, "num_warps": 8, "enable_fp_fusion": True}


def gated_rms_norm_fwd(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int, out: Tensor) -> None:
    rows, width = y.shape
    if rows == 0:
        return
    part = width // groups
    constants = _constants(y, part)
    gated_rms_norm_fwd_kernel[(triton.cdiv(rows, constants["ROWS"]), groups)](
        *(y, z, weight, out, rows, width, part, y.stride(0), z.stride(0), eps), **constants
    )


def gated_rms_norm_bwd(
    grad: Tensor,
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float,
    groups: int,
    rows_per_program: int,
    by_y: Tensor,
    by_z: Tensor,
    sums: Tensor,  # (programs, width)
) -> None:
    rows, width = y.shape
    if rows == 0:
        return
    part = width // groups
    gated_rms_norm_bwd_kernel[(sums.shape[0], groups)](
        *(grad, y, z, weight, by_y, by_z, sums, rows, width, part, rows_per_program),
        *(grad.stride(0), y.stride(0), z.stride(0), eps),
        **_constants(y, part),
    )
