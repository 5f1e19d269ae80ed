"""The real linear recurrence along time and its adjoint; the mathematics is in stablekern/ops/linear_scan.py.

Memory bound: 12 bytes a state forward, 20 backward, in float32. A lane is a row and goes through time step by step, so
clamps and gates of any size cost nothing and the order of operations is that of a loop. Time is the fast axis in
memory: a row's steps are fetched, and stored, in whole sectors of several steps, several fetches at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.scan import ALL_REGISTERS, changed_by, clamped, stack8, unstack8

_ROWS = {"cuda": 32, "cpu": 1024}  # of a program, a lane each; the interpreter pays per operation, not per row
_STAGES = 4
STEPS = tl.constexpr(8)  # fetched at once: a sector of float32

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def linear_scan_fwd_kernel(
    gate_ptr,
    token_ptr,
    first_ptr,
    lower_ptr,
    upper_ptr,
    states_ptr,
    changed_ptr,
    rows,
    first_channel,
    some,
    channels,
    length,
    COUNT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = number < rows
    row = number // some * channels + first_channel + number % some
    lower = tl.load(lower_ptr + row % channels, mask=real, other=0.0) if HAS_CLAMP else 0.0
    upper = tl.load(upper_ptr + row % channels, mask=real, other=0.0) if HAS_CLAMP else 0.0
    if HAS_FIRST:
        state = tl.load(first_ptr + row, mask=real, other=0.0)
    else:
        state = tl.zeros((ROWS,), gate_ptr.dtype.element_ty)
    changed = tl.zeros((ROWS,), tl.int32)
    blocks = tl.cdiv(length, STEPS)
    for i in tl.range(0, blocks, num_stages=STAGES):
        start = (blocks - 1 - i if REVERSE else i) * STEPS
        step = start + tl.arange(0, STEPS)
        at = row[:, None] * length + step[None, :]
        inside = real[:, None] & (step < length)[None, :]
        gates = unstack8(tl.load(gate_ptr + at, mask=inside, other=1.0), ROWS)
        tokens = unstack8(tl.load(token_ptr + at, mask=inside, other=0.0), ROWS)
        states = ()
        for u in tl.static_range(STEPS - 1 if REVERSE else 0, -1 if REVERSE else STEPS, -1 if REVERSE else 1):
            free = gates[u] * state + tokens[u]
            if COUNT:
                changed += (changed_by(free, lower, upper) & (start + u < length)).to(tl.int32)
            if HAS_CLAMP:
                # In reverse, steps beyond the last come first, and the initial state is not to be clamped.
                state = tl.where(start + u < length, clamped(free, lower, upper), state)
            else:
                state = free
            states = (state,) + states if REVERSE else states + (state,)
        tl.store(states_ptr + at, stack8(states, ROWS), mask=inside)
    if COUNT:
        tl.store(changed_ptr + row, changed, mask=real)


@triton.jit
def linear_scan_bwd_kernel(
    grad_ptr,
    gate_ptr,
    token_ptr,
    states_ptr,
    first_ptr,
    lower_ptr,
    upper_ptr,
    dgate_ptr,
    dtoken_ptr,
    dfirst_ptr,
    rows,
    first_channel,
    some,
    channels,
    length,
    HAS_FIRST: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = number < rows
    row = number // some * channels + first_channel + number % some
    lower = tl.load(lower_ptr + row % channels, mask=real, other=0.0) if HAS_CLAMP else 0.0
    upper = tl.load(upper_ptr + row % channels, mask=real, other=0.0) if HAS_CLAMP else 0.0
    carry = tl.zeros((ROWS,), gate_ptr.dtype.element_ty)
    first = tl.load(first_ptr + row, mask=real, other=0.0) if HAS_FIRST else carry
    blocks = tl.cdiv(length, STEPS)
    for i in tl.range(0, blocks, num_stages=STAGES):
        start = (i if REVERSE else blocks - 1 - i) * STEPS
        step = start + tl.arange(0, STEPS)
        at = row[:, None] * length + step[None, :]
        inside = real[:, None] & (step < length)[None, :]
        gates = unstack8(tl.load(gate_ptr + at, mask=inside, other=1.0), ROWS)
        grads = unstack8(tl.load(grad_ptr + at, mask=inside, other=0.0), ROWS)
        states = unstack8(tl.load(states_ptr + at, mask=inside, other=0.0), ROWS)
        if HAS_CLAMP:
            tokens = unstack8(tl.load(token_ptr + at, mask=inside, other=0.0), ROWS)
        edge = start + STEPS if REVERSE else start - 1  # the step that the scan took before this block
        edge_exists = edge < length if REVERSE else edge >= 0
        last = tl.load(states_ptr + row * length + tl.where(edge_exists, edge, 0), mask=real, other=0.0)
        last = tl.where(edge_exists, last, first)
        dgates = ()
        dtokens = ()
        for u in tl.static_range(0 if REVERSE else STEPS - 1, STEPS if REVERSE else -1, 1 if REVERSE else -1):
            if REVERSE:
                before = last if u == STEPS - 1 else tl.where(start + u + 1 < length, states[u + 1], first)
            else:
                before = last if u == 0 else states[u - 1]
            grad = grads[u] + carry
            if HAS_CLAMP:
                free = gates[u] * before + tokens[u]
                bounded = clamped(free, lower, upper)
                grad = tl.where(bounded == free, grad, tl.where(start + u < length, 0.0, grad))
            carry = gates[u] * grad
            dgates = dgates + (grad * before,) if REVERSE else (grad * before,) + dgates
            dtokens = dtokens + (grad,) if REVERSE else (grad,) + dtokens
        tl.store(dgate_ptr + at, stack8(dgates, ROWS), mask=inside)
        tl.store(dtoken_ptr + at, stack8(dtokens, ROWS), mask=inside)
    tl.store(dfirst_ptr + row, carry, mask=real)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _launch(
    kernel: triton.JITFunction,
    *tensors: Tensor,
    first: Tensor | None,
    lower: Tensor | None,
    reverse_channels: int,
    **constants: bool,
) -> None:
    batch, channels, length = tensors[0].shape
    rows, ahead = _ROWS[tensors[0].device.type], channels - reverse_channels
    for first_channel, some in ((0, ahead), (ahead, reverse_channels)):
        if some:
            kernel[(triton.cdiv(batch * some, rows),)](
                *tensors,
                batch * some,
                first_channel,
                some,
                channels,
                length,
                HAS_FIRST=first is not None,
                HAS_CLAMP=lower is not None,
                REVERSE=first_channel == ahead,
                **constants,
                STAGES=_STAGES,
                ROWS=rows,
                num_warps=1,
                maxnreg=ALL_REGISTERS,
                enable_fp_fusion=True,
            )


def linear_scan_fwd(
    gate: Tensor,
    token: Tensor,
    initial_state: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    reverse_channels: int,
    states: Tensor,
    saturation: Tensor,
) -> None:
    """`saturation` is empty where nothing is to be counted."""
    if states.numel() == 0:
        saturation.zero_()
        return
    count = saturation.numel() > 0
    changed = gate.new_empty(gate.shape[:2] if count else (1,), dtype=torch.int32)
    optional = (gate if tensor is None else tensor for tensor in (initial_state, lower, upper))
    _launch(
        linear_scan_fwd_kernel,
        gate,
        token,
        *optional,
        states,
        changed,
        first=initial_state,
        lower=lower,
        reverse_channels=reverse_channels,
        COUNT=count,
    )
    if count:
        torch.div(changed, gate.shape[2], out=saturation)


def linear_scan_bwd(
    grad_states: Tensor,
    gate: Tensor,
    token: Tensor | None,
    states: Tensor,
    initial_state: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    reverse_channels: int,
    grad_gate: Tensor,
    grad_token: Tensor,
    grad_initial_state: Tensor,
) -> None:
    if states.numel() == 0:
        grad_initial_state.zero_()
        return
    inputs = (grad_states, gate, token, states, initial_state, lower, upper)
    inputs = (gate if tensor is None else tensor for tensor in inputs)
    outputs = (grad_gate, grad_token, grad_initial_state)
    _launch(
        linear_scan_bwd_kernel, *inputs, *outputs, first=initial_state, lower=lower, reverse_channels=reverse_channels
    )
