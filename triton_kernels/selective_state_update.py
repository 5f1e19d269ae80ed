"""One step of a scan in place; the mathematics is in stablekern/ops/selective_state_update.py and ssd_state_update.py.

Memory bound: a state is read and written once. A program has a tile of rows (channels of one batch item) x states. What
a row shares with others is found by strides: 0 where all states of a row decay alike. The imaginary parts of complex
states lie beside the real ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import cos_sin, sigmoid, softplus_tail
from stablekern.triton_kernels.scan import bounded, clamped

# Bytes of a tile's states; the interpreter pays per operation.
_TILE = {"cuda": 2**12, "cpu": 2**17}

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def state_update_kernel(
    state_ptr,  # (item, row, state) by strides
    x_ptr,  # (item, row)
    dt_ptr,  # (item, row // width)
    A_ptr,  # (row, state) by strides
    B_ptr,  # (item, group, state)
    C_ptr,
    D_ptr,  # (row)
    z_ptr,
    bias_ptr,  # (row // width)
    lower_ptr,  # (row, state) by strides
    upper_ptr,
    y_ptr,
    rows,
    width,
    groups,
    states,
    state_item,
    state_row,
    state_n,
    A_row,
    A_n,
    bound_row,
    bound_n,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    COMPLEX: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
):
    tiles = tl.cdiv(rows, ROWS)
    item = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * ROWS + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    real = row < rows
    exists = real[:, None] & (n < states)[None, :]
    own = item * rows + row
    by_head = row // width
    x = tl.load(x_ptr + own, mask=real, other=0.0).to(WIDE)
    step = tl.load(dt_ptr + item * (rows // width) + by_head, mask=real, other=0.0).to(WIDE)
    if HAS_BIAS:
        step += tl.load(bias_ptr + by_head, mask=real, other=0.0)
    if SOFTPLUS:
        step = tl.where(step > 0, step, 0.0) + softplus_tail(step)
    state_at = state_ptr + item * state_item + row[:, None].to(tl.int64) * state_row + n[None, :].to(tl.int64) * state_n
    A_at = A_ptr + row[:, None] * A_row + n[None, :] * A_n
    vector = ((item * groups + row // (rows // groups))[:, None] * states + n[None, :]) * (2 if COMPLEX else 1)
    bound = row[:, None] * bound_row + n[None, :] * bound_n
    token = (step * x)[:, None]
    decay = tl.exp(step[:, None] * tl.load(A_at, mask=exists, other=0.0))
    state = tl.load(state_at, mask=exists, other=0.0).to(WIDE)
    enter = tl.load(B_ptr + vector, mask=exists, other=0.0).to(WIDE)
    leave = tl.load(C_ptr + vector, mask=exists, other=0.0).to(WIDE)
    if COMPLEX:
        cos, sin = cos_sin(step[:, None], tl.load(A_at + 1, mask=exists, other=0.0))
        other = tl.load(state_at + 1, mask=exists, other=0.0)
        cos *= decay
        sin *= decay
        moved = cos * state - sin * other + token * enter
        other = cos * other + sin * state + token * tl.load(B_ptr + vector + 1, mask=exists, other=0.0)
        state = moved
        if HAS_CLAMP:
            upper = tl.load(upper_ptr + bound, mask=exists, other=0.0)
            state, other = bounded(state, other, upper, upper, HAS_CLAMP, COMPLEX)
        tl.store(state_at + 1, other, mask=exists)
        read = 2.0 * (state * leave - other * tl.load(C_ptr + vector + 1, mask=exists, other=0.0))
    else:
        state = decay * state + token * enter
        if HAS_CLAMP:
            lower = tl.load(lower_ptr + bound, mask=exists, other=0.0)
            state = clamped(state, lower, tl.load(upper_ptr + bound, mask=exists, other=0.0))
        read = state * leave
    tl.store(state_at, state.to(state_ptr.dtype.element_ty), mask=exists)
    y = tl.sum(tl.where(exists, read, 0.0), 1)  # what lies beside may be 0 * inf
    if HAS_D:
        y += tl.load(D_ptr + row, mask=real, other=0.0) * x
    if HAS_Z:
        z = tl.load(z_ptr + own, mask=real, other=0.0).to(WIDE)
        y *= z * sigmoid(z)
    tl.store(y_ptr + own, y.to(y_ptr.dtype.element_ty), mask=real)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def state_update(
    state: Tensor,  # (b, r, n), real, or (b, r, n, 2) with real and imaginary parts
    x: Tensor,  # (b, r)
    dt: Tensor,  # (b, r / w), one for w rows
    A: Tensor,  # (r, n), or (r, n, 2); any strides but the last
    B: Tensor,  # (b, g, n), or (b, g, n, 2)
    C: Tensor,  # as B
    D: Tensor | None,  # (r)
    z: Tensor | None,  # (b, r)
    dt_bias: Tensor | None,  # (r / w)
    lower: Tensor | None,  # (r, n), any strides
    upper: Tensor | None,  # like lower
    dt_softplus: bool,
    y: Tensor,
) -> None:
    """Moves `state`, whatever its strides; all others dense unless said."""
    batch, rows = x.shape
    if x.numel() == 0:
        return
    states = A.shape[1]
    N = triton.next_power_of_2(max(states, 1))
    bytes_of_state = state.element_size() * (2 if state.dim() == 4 else 1)
    ROWS = max(1, min(_TILE[x.device.type] // (N * bytes_of_state), triton.next_power_of_2(rows)))
    state_update_kernel[(batch * triton.cdiv(rows, ROWS),)](
        state,
        x,
        dt,
        A,
        B,
        C,
        A if D is None else D,
        x if z is None else z,
        A if dt_bias is None else dt_bias,
        A if lower is None else lower,
        A if upper is None else upper,
        y,
        rows,
        rows // dt.shape[1],
        B.shape[1],
        states,
        *state.stride()[:3],
        *A.stride()[:2],
        *((0, 0) if upper is None else upper.stride()),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=dt_bias is not None,
        HAS_CLAMP=upper is not None,
        SOFTPLUS=dt_softplus,
        COMPLEX=state.dim() == 4,
        WIDE=tl.float64 if A.dtype == torch.float64 else tl.float32,
        ROWS=ROWS,
        N=N,
        enable_fp_fusion=True,
    )
