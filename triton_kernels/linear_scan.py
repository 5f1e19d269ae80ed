"""The linear recurrence along time and its adjoint; the mathematics is in stablekern/ops/linear_scan.py.

Memory bound: 12 bytes a state forward, 20 backward, in float32. A lane is a row and goes through time step by step, so
clamps and gates of any size cost nothing and the order of operations is that of a loop. Time is the fast axis in
memory: a row's steps are fetched, and stored, in whole sectors of several steps, several fetches at a time.

A complex number is a pair here, (re, im), and two neighbours in memory; of a real one both parts are the same value,
and nothing reads the second.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.scan import ALL_REGISTERS, bounded, get, outside, put, stack8, through_clamp, unstack8

_ROWS = {"cuda": 32, "cpu": 1024}  # of a program, a lane each; the interpreter pays per operation, not per row
_STAGES = 4
FETCHED = tl.constexpr(8)  # numbers at once: a sector of float32

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _fetch(ptr, at, inside, other, ROWS: tl.constexpr, COMPLEX: tl.constexpr):
    """The real and the imaginary parts of a block, step by step."""
    s = unstack8(tl.load(ptr + at, mask=inside, other=other), ROWS)
    if COMPLEX:
        return (s[0], s[2], s[4], s[6]), (s[1], s[3], s[5], s[7])
    else:
        return s, s


@triton.jit
def _keep(ptr, at, re, im, inside, ROWS: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:
        re = (re[0], im[0], re[1], im[1], re[2], im[2], re[3], im[3])
    tl.store(ptr + at, stack8(re, ROWS), mask=inside)


@triton.jit
def _advance(gate, gate_im, state, state_im, token, token_im, COMPLEX: tl.constexpr):
    """The next state before the clamp."""
    if COMPLEX:
        return gate * state - gate_im * state_im + token, gate * state_im + gate_im * state + token_im
    else:
        free = gate * state + token
        return free, free


@triton.jit
def _by_conjugate(a, a_im, b, b_im, COMPLEX: tl.constexpr):
    """a b*"""
    if COMPLEX:
        return a * b + a_im * b_im, a_im * b - a * b_im
    else:
        product = a * b
        return product, product


@triton.jit
def linear_scan_fwd_kernel(
    gate_ptr,
    token_ptr,
    first_ptr,
    lower_ptr,
    upper_ptr,
    states_ptr,
    changed_ptr,
    ties_ptr,
    rows,
    first_channel,
    some,
    channels,
    length,
    COUNT: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    COMPLEX: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = number < rows
    row = number // some * channels + first_channel + number % some
    lower = tl.load(lower_ptr + row % channels, mask=real, other=0.0) if HAS_CLAMP and not COMPLEX else 0.0
    upper = tl.load(upper_ptr + row % channels, mask=real, other=0.0) if HAS_CLAMP else 0.0
    if HAS_FIRST:
        state, state_im = get(first_ptr, row, real, COMPLEX)
    else:
        state = tl.zeros((ROWS,), gate_ptr.dtype.element_ty)
        state_im = state
    changed = tl.zeros((ROWS,), tl.int32)
    tie = tl.zeros((ROWS,), tl.int1)
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    STEPS: tl.constexpr = FETCHED // PARTS
    place = tl.arange(0, FETCHED)
    one = tl.where(place % PARTS == 0, 1.0, 0.0)[None, :]  # the gate of steps beyond the last
    blocks = tl.cdiv(length, STEPS)
    for i in tl.range(0, blocks, num_stages=STAGES):
        start = (blocks - 1 - i if REVERSE else i) * STEPS
        at = (row[:, None] * length + start) * PARTS + place[None, :]
        inside = real[:, None] & (start + place // PARTS < length)[None, :]
        gates, gates_im = _fetch(gate_ptr, at, inside, one, ROWS, COMPLEX)
        tokens, tokens_im = _fetch(token_ptr, at, inside, 0.0, ROWS, COMPLEX)
        states = ()
        states_im = ()
        for u in tl.static_range(STEPS - 1 if REVERSE else 0, -1 if REVERSE else STEPS, -1 if REVERSE else 1):
            free, free_im = _advance(gates[u], gates_im[u], state, state_im, tokens[u], tokens_im[u], COMPLEX)
            if COUNT:
                changed += (outside(free, free_im, lower, upper, COMPLEX) & (start + u < length)).to(tl.int32)
            if HAS_CLAMP and not COMPLEX:
                tie = tie | (((free == lower) | (free == upper)) & (start + u < length))
            if HAS_CLAMP:
                # In reverse, steps beyond the last come first, and the initial state is not to be clamped.
                within, within_im = bounded(free, free_im, lower, upper, HAS_CLAMP, COMPLEX)
                state = tl.where(start + u < length, within, state)
                state_im = tl.where(start + u < length, within_im, state_im)
            else:
                state = free
                state_im = free_im
            states = (state,) + states if REVERSE else states + (state,)
            states_im = (state_im,) + states_im if REVERSE else states_im + (state_im,)
        _keep(states_ptr, at, states, states_im, inside, ROWS, COMPLEX)
    if COUNT:
        tl.store(changed_ptr + row, changed, mask=real)
    if HAS_CLAMP and not COMPLEX:
        tl.store(ties_ptr + row, tie, mask=real)


@triton.jit
def linear_scan_bwd_kernel(
    grad_ptr,
    gate_ptr,
    token_ptr,
    states_ptr,
    first_ptr,
    lower_ptr,
    upper_ptr,
    ties_ptr,
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
    COMPLEX: tl.constexpr,
    REVERSE: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = number < rows
    row = number // some * channels + first_channel + number % some
    lower = tl.load(lower_ptr + row % channels, mask=real, other=0.0) if HAS_CLAMP and not COMPLEX else 0.0
    upper = tl.load(upper_ptr + row % channels, mask=real, other=0.0) if HAS_CLAMP else 0.0
    # Rows whose tokens are to be read: elsewhere a real state tells whether it was clamped.
    unsure = real
    if HAS_CLAMP and not COMPLEX:
        unsure = tl.load(ties_ptr + row, mask=real, other=0) != 0
    carry = tl.zeros((ROWS,), gate_ptr.dtype.element_ty)
    carry_im = carry
    if HAS_FIRST:
        first, first_im = get(first_ptr, row, real, COMPLEX)
    else:
        first = carry
        first_im = carry
    PARTS: tl.constexpr = 2 if COMPLEX else 1
    STEPS: tl.constexpr = FETCHED // PARTS
    place = tl.arange(0, FETCHED)
    one = tl.where(place % PARTS == 0, 1.0, 0.0)[None, :]
    blocks = tl.cdiv(length, STEPS)
    for i in tl.range(0, blocks, num_stages=STAGES):
        start = (i if REVERSE else blocks - 1 - i) * STEPS
        at = (row[:, None] * length + start) * PARTS + place[None, :]
        inside = real[:, None] & (start + place // PARTS < length)[None, :]
        gates, gates_im = _fetch(gate_ptr, at, inside, one, ROWS, COMPLEX)
        grads, grads_im = _fetch(grad_ptr, at, inside, 0.0, ROWS, COMPLEX)
        states, states_im = _fetch(states_ptr, at, inside, 0.0, ROWS, COMPLEX)
        if HAS_CLAMP:
            tokens, tokens_im = _fetch(token_ptr, at, inside & unsure[:, None], 0.0, ROWS, COMPLEX)
        edge = start + STEPS if REVERSE else start - 1  # the step that the scan took before this block
        edge_exists = edge < length if REVERSE else edge >= 0
        last, last_im = get(states_ptr, row * length + tl.where(edge_exists, edge, 0), real, COMPLEX)
        last = tl.where(edge_exists, last, first)
        last_im = tl.where(edge_exists, last_im, first_im)
        dgates = ()
        dgates_im = ()
        dtokens = ()
        dtokens_im = ()
        for u in tl.static_range(0 if REVERSE else STEPS - 1, STEPS if REVERSE else -1, 1 if REVERSE else -1):
            if u == (STEPS - 1 if REVERSE else 0):
                before = last
                before_im = last_im
            elif REVERSE:
                before = tl.where(start + u + 1 < length, states[u + 1], first)
                before_im = tl.where(start + u + 1 < length, states_im[u + 1], first_im)
            else:
                before = states[u - 1]
                before_im = states_im[u - 1]
            grad = grads[u] + carry
            grad_im = grads_im[u] + carry_im
            if HAS_CLAMP:
                free, free_im = _advance(gates[u], gates_im[u], before, before_im, tokens[u], tokens_im[u], COMPLEX)
                if not COMPLEX:  # the state itself where it was not clamped, and NaN, which does not pass, where it was
                    settled = tl.where((lower < states[u]) & (states[u] < upper), states[u], float("nan"))
                    free = tl.where(unsure, free, settled)
                through, through_im = through_clamp(grad, grad_im, free, free_im, lower, upper, COMPLEX)
                grad = tl.where(start + u < length, through, grad)
                grad_im = tl.where(start + u < length, through_im, grad_im)
            carry, carry_im = _by_conjugate(grad, grad_im, gates[u], gates_im[u], COMPLEX)
            dgate, dgate_im = _by_conjugate(grad, grad_im, before, before_im, COMPLEX)
            dgates = dgates + (dgate,) if REVERSE else (dgate,) + dgates
            dgates_im = dgates_im + (dgate_im,) if REVERSE else (dgate_im,) + dgates_im
            dtokens = dtokens + (grad,) if REVERSE else (grad,) + dtokens
            dtokens_im = dtokens_im + (grad_im,) if REVERSE else (grad_im,) + dtokens_im
        _keep(dgate_ptr, at, dgates, dgates_im, inside, ROWS, COMPLEX)
        _keep(dtoken_ptr, at, dtokens, dtokens_im, inside, ROWS, COMPLEX)
    put(dfirst_ptr, row, carry, carry_im, real, COMPLEX)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _launch(
    kernel: triton.JITFunction,
    *tensors: Tensor,
    first: Tensor | None,
    upper: Tensor | None,
    reverse_channels: int,
    **constants: bool,
) -> None:
    batch, channels, length = tensors[0].shape
    is_complex = tensors[0].is_complex()
    tensors = tuple(torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors)
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
                HAS_CLAMP=upper is not None,
                COMPLEX=is_complex,
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
    ties: Tensor,
) -> None:
    """`saturation` is empty where nothing is to be counted, and `ties` where there is no real clamp."""
    if states.numel() == 0:
        saturation.zero_()
        ties.zero_()
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
        ties,
        first=initial_state,
        upper=upper,
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
    ties: Tensor,
    reverse_channels: int,
    grad_gate: Tensor,
    grad_token: Tensor,
    grad_initial_state: Tensor,
) -> None:
    if states.numel() == 0:
        grad_initial_state.zero_()
        return
    inputs = (grad_states, gate, token, states, initial_state, lower, upper, ties)
    inputs = (gate if tensor is None else tensor for tensor in inputs)
    outputs = (grad_gate, grad_token, grad_initial_state)
    _launch(
        linear_scan_bwd_kernel, *inputs, *outputs, first=initial_state, upper=upper, reverse_channels=reverse_channels
    )
