"""The Mamba-2 scan and its adjoint; the mathematics is in stablekern/ops/ssd_scan.py.

A program is one warp. It holds a tile of K x N x R states in registers: all N states of K R channels of one group,
which share B and C. The R channels and some of the N states lie across the lanes, so that a sum over states and one
over channels both take two or three shuffles and otherwise stay within a lane. It steps through time; the rows of x, B
and C are fetched several steps ahead. Where there are few programs, `scan.py` cuts the time into segments.

Backward, per chunk from its saved start state: run forward once, keeping every SUB-th state in scratch memory, then go
back over blocks of SUB steps whose states are recomputed and stay in registers. Every program writes its own part of
dB, dC, dA and dD; the parts are added in a fixed order.

A step size and its decay belong to a head: all its columns read them, in each of its tiles, forward and backward. So
they are made once, by a kernel of their own, with an exponential that is exact to 2 ulp; another one leads their
gradient back to `dt`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import exponential, log_one_plus, scalar, sigmoid
from stablekern.triton_kernels.scan import ALL_REGISTERS, changed_by, clamped, join, segments_of

_LANE_CHANNELS = 8  # R
# States of a program, by the size of their type: 16 registers of a lane forward; the backward pass holds more of each.
# Bounds and counts take registers of their own, and so does a direction for each group. The interpreter pays per
# operation, not per state.
_FORWARD_TILE = {"cuda": {4: 512, 8: 256}, "cpu": {4: 2**15, 8: 2**14}}
_COUNTING_TILE = {"cuda": {4: 256, 8: 128}, "cpu": {4: 2**15, 8: 2**14}}
_BACKWARD_TILE = {"cuda": {4: 256, 8: 64}, "cpu": {4: 2**15, 8: 2**14}}
_SMALL_BACKWARD_TILE = {"cuda": {4: 128, 8: 64}, "cpu": {4: 2**15, 8: 2**14}}
_SUB = 4
_SHORTEST_SEGMENT = 32
_STAGES = 4
_STEPS_BLOCK = 256  # step sizes of a program

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _place(
    length,
    groups,
    reverse_groups,
    heads,
    width,
    segments,
    head_tiles,
    column_tiles,
    P: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
):
    """item, whether it goes backwards, segment, group, tile, and of each of the K x R channels: head, channel, whether
    it exists.

    A tile is K * R / P heads of P columns each.
    """
    program = tl.program_id(0)
    tile = program % (head_tiles * column_tiles)
    program //= head_tiles * column_tiles
    group = program % groups
    program //= groups
    segment = program % segments
    item = (program // segments).to(tl.int64)
    slot = tl.arange(0, K)[:, None] * R + tl.arange(0, R)[None, :]
    head = tile // column_tiles * (K * R // P) + slot // P
    column = tile % column_tiles * P + slot % P
    real = (head < heads // groups) & (column < width)
    head += group * (heads // groups)
    return item, group >= groups - reverse_groups, segment, group, tile, head, head * width + column, real


@triton.jit
def _time(item, step, length, backward, HAS_BACKWARD: tl.constexpr):
    """Where a step lies in memory, in steps."""
    if HAS_BACKWARD:
        step = tl.where(backward, length - 1 - step, step)
    return item * length + step


@triton.jit
def _states_at(n, channel, stride_n, stride_channel):
    return n[None, :, None].to(tl.int64) * stride_n + channel[:, None, :].to(tl.int64) * stride_channel


@triton.jit
def _advance(state, decay, token, enter, lower, upper, HAS_CLAMP: tl.constexpr):
    state = decay[:, None, :] * state + token[:, None, :] * enter[None, :, None]
    if HAS_CLAMP:
        state = clamped(state, lower[:, None, :], upper[:, None, :])
    return state


@triton.jit
def _raw_step(dt_ptr, bias_ptr, at, real, heads, HAS_BIAS: tl.constexpr):
    raw = tl.load(dt_ptr + at, mask=real, other=0.0)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + at % heads, mask=real, other=0.0)
    return raw


@triton.jit
def _unlimited_step(raw, e, SOFTPLUS: tl.constexpr):
    """`e` is exp(-|raw|)."""
    return tl.where(raw > 0, raw, 0.0) + log_one_plus(e) if SOFTPLUS else raw


@triton.jit
def ssd_scan_steps_kernel(
    dt_ptr,  # (item, step, head)
    bias_ptr,
    A_ptr,
    step_ptr,  # like dt
    decay_ptr,
    elements,
    heads,
    low: tl.float64,
    high: tl.float64,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < elements
    wide = dt_ptr.dtype.element_ty
    raw = _raw_step(dt_ptr, bias_ptr, at, real, heads, HAS_BIAS)
    step = _unlimited_step(raw, exponential(-tl.abs(raw)), SOFTPLUS)
    step = clamped(step, scalar(low, wide), scalar(high, wide))
    rate = tl.load(A_ptr + at % heads, mask=real, other=0.0)
    tl.store(step_ptr + at, step, mask=real)
    tl.store(decay_ptr + at, exponential(step * rate), mask=real)


@triton.jit
def ssd_scan_through_steps_kernel(
    dstep_ptr,  # (item, step, head, column tile)
    dt_ptr,  # (item, step, head)
    bias_ptr,
    ddt_ptr,
    elements,
    heads,
    column_tiles,
    low: tl.float64,
    high: tl.float64,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = at < elements
    wide = dt_ptr.dtype.element_ty
    raw = _raw_step(dt_ptr, bias_ptr, at, real, heads, HAS_BIAS)
    grad = tl.zeros((BLOCK,), wide)
    for tile in range(column_tiles):
        grad += tl.load(dstep_ptr + at * column_tiles + tile, mask=real, other=0.0)
    e = exponential(-tl.abs(raw))
    slope = tl.where(raw >= 0, 1.0, e) / (1.0 + e) if SOFTPLUS else tl.full((BLOCK,), 1.0, wide)
    limited = changed_by(_unlimited_step(raw, e, SOFTPLUS), scalar(low, wide), scalar(high, wide))
    slope = tl.where(limited, 0.0, slope)
    # A limited step has no gradient, whatever comes back to it.
    tl.store(ddt_ptr + at, tl.where(slope == 0.0, 0.0, slope * grad), mask=real)


@triton.jit
def ssd_scan_segment_kernel(
    row_ptr,  # x, or grad_y in reverse
    scale_ptr,  # dt; unused in reverse
    decay_ptr,
    vector_ptr,  # B, or C in reverse
    z_ptr,
    factor_ptr,  # (item, segment, channel)
    term_ptr,  # (item, segment, state, channel)
    length,
    heads,
    width,
    groups,
    reverse_groups,
    states,
    segments,
    segment_length,
    head_tiles,
    column_tiles,
    HAS_Z: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    STAGES: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, backward, segment, group, tile, head, channel, real = _place(
        length, groups, reverse_groups, heads, width, segments, head_tiles, column_tiles, P, K, R
    )
    n = tl.arange(0, N)
    begin = segment * segment_length
    steps = tl.minimum(segment_length, length - begin)
    state = tl.zeros((K, N, R), row_ptr.dtype.element_ty)
    factor = tl.full((K, R), 1.0, row_ptr.dtype.element_ty)
    for i in tl.range(0, steps, num_stages=STAGES):
        t = _time(item, begin + (steps - 1 - i if REVERSE else i), length, backward, HAS_BACKWARD)
        decay = tl.load(decay_ptr + t * heads + head, mask=real, other=0.0)
        row = tl.load(row_ptr + t * heads * width + channel, mask=real, other=0.0)
        vector = tl.load(vector_ptr + (t * groups + group) * states + n, mask=n < states, other=0.0)
        if REVERSE:
            if HAS_Z:
                z = tl.load(z_ptr + t * heads * width + channel, mask=real, other=0.0)
                row *= z * sigmoid(z)
            state = decay[:, None, :] * (state + row[:, None, :] * vector[None, :, None])
        else:
            token = tl.load(scale_ptr + t * heads + head, mask=real, other=0.0) * row
            state = _advance(state, decay, token, vector, token, token, HAS_CLAMP=False)
        factor = decay * factor
    at = item * segments + segment
    tl.store(factor_ptr + at * heads * width + channel, factor, mask=real)
    exists = real[:, None, :] & (n < states)[None, :, None]
    tl.store(term_ptr + at * states * heads * width + _states_at(n, channel, heads * width, 1), state, mask=exists)


@triton.jit
def ssd_scan_fwd_kernel(
    x_ptr,
    dt_ptr,
    decay_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    lower_ptr,
    upper_ptr,
    start_ptr,  # (item, segment, state, channel) by strides
    y_ptr,
    last_ptr,
    chunk_ptr,
    changed_ptr,  # (item, channel)
    length,
    heads,
    width,
    groups,
    reverse_groups,
    states,
    chunk,
    segments,
    segment_length,
    head_tiles,
    column_tiles,
    start_item,
    start_segment,
    start_n,
    start_channel,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, backward, segment, group, tile, head, channel, real = _place(
        length, groups, reverse_groups, heads, width, segments, head_tiles, column_tiles, P, K, R
    )
    n = tl.arange(0, N)
    exists = real[:, None, :] & (n < states)[None, :, None]
    by_channel = _states_at(n, channel, heads * width, 1)
    skip = tl.load(D_ptr + channel, mask=real, other=0.0) if HAS_D else 0.0
    lower = tl.load(lower_ptr + channel, mask=real, other=0.0) if HAS_CLAMP else 0.0
    upper = tl.load(upper_ptr + channel, mask=real, other=0.0) if HAS_CLAMP else 0.0
    if HAS_START:
        source = start_ptr + item * start_item + segment.to(tl.int64) * start_segment
        state = tl.load(source + _states_at(n, channel, start_n, start_channel), mask=exists, other=0.0)
    else:
        state = tl.zeros((K, N, R), x_ptr.dtype.element_ty)
    changed = tl.zeros((K, R), tl.int32)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    for step in tl.range(begin, end, num_stages=STAGES):
        t = _time(item, step, length, backward, HAS_BACKWARD)
        decay = tl.load(decay_ptr + t * heads + head, mask=real, other=0.0)
        dt = tl.load(dt_ptr + t * heads + head, mask=real, other=0.0)
        x = tl.load(x_ptr + t * heads * width + channel, mask=real, other=0.0)
        enter = tl.load(B_ptr + (t * groups + group) * states + n, mask=n < states, other=0.0)
        leave = tl.load(C_ptr + (t * groups + group) * states + n, mask=n < states, other=0.0)
        if step % chunk == 0:
            at = item * tl.cdiv(length, chunk) + step // chunk
            tl.store(chunk_ptr + at * states * heads * width + by_channel, state, mask=exists)
        state = _advance(state, decay, dt * x, enter, lower, upper, HAS_CLAMP and not COUNT)
        if COUNT:
            outside = changed_by(state, lower[:, None, :], upper[:, None, :]) & exists
            changed += tl.sum(outside.to(tl.int32), 1)
            state = clamped(state, lower[:, None, :], upper[:, None, :])
        read = state * leave[None, :, None]
        if not FULL:
            read = tl.where(exists, read, 0.0)  # what lies beside may be 0 * inf
        y = tl.sum(read, 1)
        if HAS_D:
            y += skip * x
        if HAS_Z:
            z = tl.load(z_ptr + t * heads * width + channel, mask=real, other=0.0)
            y *= z * sigmoid(z)
        tl.store(y_ptr + t * heads * width + channel, y, mask=real)
    if segment == segments - 1:
        last = last_ptr + item * heads * width * states + _states_at(n, channel, 1, states)
        tl.store(last, state, mask=exists)
    if COUNT:
        tl.store(changed_ptr + item * heads * width + channel, changed, mask=real)  # a clamped scan is not cut


@triton.jit
def ssd_scan_bwd_kernel(
    gy_ptr,
    x_ptr,
    dt_ptr,
    decay_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    lower_ptr,
    upper_ptr,
    chunk_ptr,
    carry_ptr,  # (item, segment, state, channel) by strides: the adjoint of the state after the segment
    scratch_ptr,  # (program, block of SUB steps, K, N, R)
    dx_ptr,
    ddt_ptr,  # (item, step, head, column tile)
    dA_ptr,  # (item, segment, channel)
    dB_ptr,  # (item, step, group, tile, state)
    dC_ptr,
    dD_ptr,  # (item, segment, channel)
    dz_ptr,
    dstart_ptr,
    length,
    heads,
    width,
    groups,
    reverse_groups,
    states,
    chunk,
    segments,
    segment_length,
    head_tiles,
    column_tiles,
    carry_item,
    carry_segment,
    carry_n,
    carry_channel,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    FULL: tl.constexpr,
    STAGES: tl.constexpr,
    SUB: tl.constexpr,
    P: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, backward, segment, group, tile, head, channel, real = _place(
        length, groups, reverse_groups, heads, width, segments, head_tiles, column_tiles, P, K, R
    )
    n = tl.arange(0, N)
    exists = real[:, None, :] & (n < states)[None, :, None]
    by_channel = _states_at(n, channel, heads * width, 1)
    wide = x_ptr.dtype.element_ty
    skip = tl.load(D_ptr + channel, mask=real, other=0.0) if HAS_D else 0.0
    lower = tl.load(lower_ptr + channel, mask=real, other=0.0) if HAS_CLAMP else 0.0
    upper = tl.load(upper_ptr + channel, mask=real, other=0.0) if HAS_CLAMP else 0.0
    rate = tl.load(A_ptr + head, mask=real, other=0.0)
    if HAS_CARRY:
        source = carry_ptr + item * carry_item + segment.to(tl.int64) * carry_segment
        carry = tl.load(source + _states_at(n, channel, carry_n, carry_channel), mask=exists, other=0.0)
    else:
        carry = tl.zeros((K, N, R), wide)
    by_rate = tl.zeros((K, R), wide)
    by_skip = tl.zeros((K, R), wide)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    blocks_of_chunk = tl.cdiv(tl.minimum(chunk, length), SUB)
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * blocks_of_chunk * (K * N * R)
    scratch += (tl.arange(0, K)[:, None, None] * N + n[None, :, None]) * R + tl.arange(0, R)[None, None, :]
    P_HEADS: tl.constexpr = K * R // P
    head_of_sum = tile // column_tiles * P_HEADS + tl.arange(0, P_HEADS)
    # Steps beyond the last are masked by one comparison each: what exists needs more than 0 steps to be left.
    channel_needs = tl.where(real, 0, length)
    n_needs = tl.where(n < states, 0, length)
    head_needs = tl.where(head_of_sum < heads // groups, 0, length)

    # Addresses that are hoisted out of these loops would be spilled.
    for back in tl.range(0, tl.cdiv(end - begin, chunk), disable_licm=True):
        chunk_begin = begin + (tl.cdiv(end - begin, chunk) - 1 - back) * chunk
        chunk_end = tl.minimum(chunk_begin + chunk, end)
        blocks = tl.cdiv(chunk_end - chunk_begin, SUB)
        at = item * tl.cdiv(length, chunk) + chunk_begin // chunk
        state = tl.load(chunk_ptr + at * states * heads * width + by_channel, mask=exists, other=0.0)
        for step in tl.range(chunk_begin, chunk_begin + (blocks - 1) * SUB, num_stages=STAGES):
            t = _time(item, step, length, backward, HAS_BACKWARD)
            decay = tl.load(decay_ptr + t * heads + head, mask=real, other=0.0)
            dt = tl.load(dt_ptr + t * heads + head, mask=real, other=0.0)
            x = tl.load(x_ptr + t * heads * width + channel, mask=real, other=0.0)
            enter = tl.load(B_ptr + (t * groups + group) * states + n, mask=n < states, other=0.0)
            if (step - chunk_begin) % SUB == 0:
                tl.store(scratch + (step - chunk_begin) // SUB * (K * N * R), state)
            state = _advance(state, decay, dt * x, enter, lower, upper, HAS_CLAMP)
        tl.store(scratch + (blocks - 1) * (K * N * R), state)
        tl.debug_barrier()  # what one lane has stored another may load

        rate_of_chunk = tl.zeros((K, R), wide)
        skip_of_chunk = tl.zeros((K, R), wide)
        for i in tl.range(0, blocks, disable_licm=True):
            block = blocks - 1 - i
            first = chunk_begin + block * SUB
            # What lies beside the tile's own states may become 0 * inf, and must not get into their sums.
            state = tl.load(scratch + block * (K * N * R), mask=exists, other=0.0)
            trail = (state,)  # unclamped, but for the first
            for u in tl.static_range(SUB):
                left = chunk_end - first - u
                here = channel_needs < left
                some = n_needs < left
                t = _time(item, first + u, length, backward, HAS_BACKWARD)
                decay = tl.load(decay_ptr + t * heads + head, mask=here, other=1.0)
                dt = tl.load(dt_ptr + t * heads + head, mask=here, other=0.0)
                x = tl.load(x_ptr + t * heads * width + channel, mask=here, other=0.0)
                enter = tl.load(B_ptr + (t * groups + group) * states + n, mask=some, other=0.0)
                free = _advance(state, decay, dt * x, enter, lower, upper, HAS_CLAMP=False)
                if not FULL:
                    free = tl.where(exists, free, 0.0)
                state = clamped(free, lower[:, None, :], upper[:, None, :]) if HAS_CLAMP else free
                trail = trail + (free,)
                if u == SUB // 2 - 1:
                    tl.debug_barrier()  # or all steps are loaded at once, into more registers than there are
            for u in tl.static_range(SUB - 1, -1, -1):
                left = chunk_end - first - u
                here = channel_needs < left
                some = n_needs < left
                t = _time(item, first + u, length, backward, HAS_BACKWARD)
                decay = tl.load(decay_ptr + t * heads + head, mask=here, other=1.0)
                dt = tl.load(dt_ptr + t * heads + head, mask=here, other=0.0)
                x = tl.load(x_ptr + t * heads * width + channel, mask=here, other=0.0)
                gy = tl.load(gy_ptr + t * heads * width + channel, mask=here, other=0.0)
                if HAS_Z:
                    z = tl.load(z_ptr + t * heads * width + channel, mask=here, other=0.0)
                    open_share = sigmoid(z)
                    by_gate = gy * (open_share * (1.0 + z * (1.0 - open_share)))
                    gy *= z * open_share
                vector = (t * groups + group) * states + n
                enter = tl.load(B_ptr + vector, mask=some, other=0.0)
                leave = tl.load(C_ptr + vector, mask=some, other=0.0)
                before = trail[u]
                after = trail[u + 1]
                grad = carry + gy[:, None, :] * leave[None, :, None]
                if HAS_CLAMP:
                    if u > 0:
                        before = clamped(before, lower[:, None, :], upper[:, None, :])
                    bounded = clamped(after, lower[:, None, :], upper[:, None, :])
                    grad = tl.where(bounded == after, grad, 0.0)
                    after = bounded
                if not FULL:
                    grad = tl.where(exists, grad, 0.0)
                carry = decay[:, None, :] * grad
                by_token = tl.sum(grad * enter[None, :, None], 1)
                by_decay = tl.sum(carry * before, 1)
                by_enter = tl.sum(tl.sum(grad * (dt * x)[:, None, :], 0), 1)
                by_leave = tl.sum(tl.sum(gy[:, None, :] * after, 0), 1)
                dx = dt * by_token
                if HAS_D:
                    dx += skip * gy
                if HAS_Z:
                    y = tl.sum(after * leave[None, :, None], 1)
                    if HAS_D:
                        y += skip * x
                    tl.store(dz_ptr + t * heads * width + channel, y * by_gate, mask=here)
                ddt = tl.where(real, by_token * x + rate * by_decay, 0.0)
                rate_of_chunk += dt * by_decay
                skip_of_chunk += gy * x
                tl.store(dx_ptr + t * heads * width + channel, dx, mask=here)
                sums = (t * heads + group * (heads // groups) + head_of_sum) * column_tiles + tile % column_tiles
                tl.store(
                    ddt_ptr + sums,
                    tl.sum(tl.reshape(ddt, (P_HEADS, P)), 1),
                    mask=head_needs < left,
                )
                parts = ((t * groups + group) * head_tiles * column_tiles + tile) * states + n
                tl.store(dB_ptr + parts, by_enter, mask=some)
                tl.store(dC_ptr + parts, by_leave, mask=some)
        by_rate += rate_of_chunk
        by_skip += skip_of_chunk
        tl.debug_barrier()  # the next chunk overwrites the scratch memory

    at = (item * segments + segment) * heads * width + channel
    tl.store(dA_ptr + at, by_rate, mask=real)
    tl.store(dD_ptr + at, by_skip, mask=real)
    if segment == 0:
        dstart = dstart_ptr + item * heads * width * states + _states_at(n, channel, 1, states)
        tl.store(dstart, carry, mask=exists)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Sizes of a scan, its tiles and its segments."""

    batch: int
    length: int
    heads: int
    width: int
    groups: int
    reverse_groups: int
    states: int
    P: int
    K: int
    N: int
    R: int
    segments: int
    segment_length: int

    @staticmethod
    def of(
        x: Tensor, B: Tensor, reverse_groups: int, tiles: dict[str, dict[int, int]], unit: int, *, cut: bool
    ) -> _Plan:
        """`unit`: segments are a multiple of it. A head is padded to a power of two of columns P, or cut into such."""
        batch, length, heads, width = x.shape
        groups, states = B.shape[2:]
        tile = tiles[x.device.type][x.element_size()]
        N = triton.next_power_of_2(max(states, 1))
        R = max(1, min(_LANE_CHANNELS, tile // N))
        columns = triton.next_power_of_2(width)
        K = max(1, min(tile // (N * R), triton.next_power_of_2(triton.cdiv(heads // groups * columns, R))))
        P = min(K * R, columns)
        programs = batch * groups * triton.cdiv(heads // groups, K * R // P) * triton.cdiv(width, P)
        units = triton.cdiv(length, unit)
        segment_length = triton.cdiv(units, segments_of(programs, units) if cut else 1) * unit
        segments = triton.cdiv(length, segment_length)
        return _Plan(batch, length, heads, width, groups, reverse_groups, states, P, K, N, R, segments, segment_length)

    @property
    def head_tiles(self) -> int:
        return triton.cdiv(self.heads // self.groups, self.K * self.R // self.P)

    @property
    def column_tiles(self) -> int:
        return triton.cdiv(self.width, self.P)

    @property
    def programs(self) -> int:
        return self.batch * self.segments * self.groups * self.head_tiles * self.column_tiles

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.length, self.heads, self.width, self.groups, self.reverse_groups, self.states

    @property
    def cut(self) -> tuple[int, ...]:
        return self.segments, self.segment_length, self.head_tiles, self.column_tiles

    @property
    def full(self) -> bool:
        """Every state of every tile exists."""
        whole_heads = self.heads // self.groups % (self.K * self.R // self.P) == 0
        return whole_heads and self.width % self.P == 0 and self.states == self.N

    @property
    def constants(self) -> dict[str, int | bool]:
        fusion = {"enable_fp_fusion": True}  # Triton warns where this is left open; a fused multiply-add rounds once
        ways = {"HAS_BACKWARD": self.reverse_groups > 0}
        return ways | {"STAGES": _STAGES, "P": self.P, "K": self.K, "N": self.N, "R": self.R, "num_warps": 1} | fusion

    def boundaries(
        self,
        row: Tensor,
        dt: Tensor,
        decay: Tensor,
        vector: Tensor,
        z: Tensor | None,
        first: Tensor | None,
        *,
        reverse: bool,
    ) -> Tensor | None:
        """What each segment starts from, (item, segment, state, channel); None for zeros."""
        channels = self.heads * self.width
        if first is not None:  # (item, head, column, state)
            first = first.view(self.batch, channels, self.states).mT
        if self.segments == 1:
            return None if first is None else first[:, None]
        factor = row.new_empty((self.batch, self.segments, 1, channels))
        term, start = (row.new_empty((self.batch, self.segments, self.states, channels)) for _ in range(2))
        ssd_scan_segment_kernel[(self.programs,)](
            row,
            dt,
            decay,
            vector,
            row if z is None else z,
            factor,
            term,
            *self.sizes,
            *self.cut,
            HAS_Z=z is not None,
            REVERSE=reverse,
            **self.constants,
        )
        join(first, factor, term, start, reverse=reverse)
        return start


@dataclass(frozen=True)
class _Steps:
    """How `dt` becomes step sizes."""

    dt: Tensor
    bias: Tensor | None
    softplus: bool
    low: float
    high: float

    def _launch(self, kernel: triton.JITFunction, *arguments: Tensor | int) -> None:
        kernel[(triton.cdiv(self.dt.numel(), _STEPS_BLOCK),)](
            *arguments,
            self.low,
            self.high,
            HAS_BIAS=self.bias is not None,
            SOFTPLUS=self.softplus,
            BLOCK=_STEPS_BLOCK,
            enable_fp_fusion=True,
        )

    @property
    def _read(self) -> tuple[Tensor, Tensor]:
        return self.dt, self.dt if self.bias is None else self.bias

    def with_decays(self, A: Tensor) -> tuple[Tensor, Tensor]:
        step, decay = self.dt.new_empty(self.dt.shape), self.dt.new_empty(self.dt.shape)
        self._launch(ssd_scan_steps_kernel, *self._read, A, step, decay, self.dt.numel(), self.dt.shape[2])
        return step, decay

    def backward(self, parts: Tensor, grad_dt: Tensor) -> None:
        """`parts`: the gradients of the steps, (item, step, head, parts of a head), which are added."""
        sizes = self.dt.numel(), self.dt.shape[2], parts.shape[3]
        self._launch(ssd_scan_through_steps_kernel, parts, *self._read, grad_dt, *sizes)


def ssd_scan_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    reverse_groups: int,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    chunk: int,
    y: Tensor,
    last_state: Tensor,
    chunk_states: Tensor,
    saturation: Tensor,
) -> None:
    """`saturation` is empty where nothing is to be counted."""
    if x.numel() == 0:
        saturation.zero_()
        last_state.zero_() if initial_state is None else last_state.copy_(initial_state)
        return
    count = saturation.numel() > 0
    tiles = _COUNTING_TILE if count else _FORWARD_TILE
    plan = _Plan.of(x, B, reverse_groups, tiles, min(chunk, _SHORTEST_SEGMENT), cut=lower is None)
    step, decay = _Steps(dt, dt_bias, dt_softplus, dt_low, dt_high).with_decays(A)
    start = plan.boundaries(x, step, decay, B, None, initial_state, reverse=False)
    changed = dt.new_empty(x.shape[:1] + x.shape[2:] if count else (1,), dtype=torch.int32)
    ssd_scan_fwd_kernel[(plan.programs,)](
        x,
        step,
        decay,
        B,
        C,
        x if D is None else D,
        x if z is None else z,
        x if lower is None else lower,
        x if upper is None else upper,
        x if start is None else start,
        y,
        last_state,
        chunk_states,
        changed,
        *plan.sizes,
        chunk,
        *plan.cut,
        *((0, 0, 0, 0) if start is None else start.stride()),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_CLAMP=lower is not None,
        COUNT=count,
        HAS_START=start is not None,
        FULL=plan.full,
        **plan.constants,
    )
    if count:
        torch.div(changed.sum(2), max(plan.length * plan.width * plan.states, 1), out=saturation)


def ssd_scan_bwd(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    chunk_states: Tensor,
    reverse_groups: int,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    chunk: int,
    grad_x: Tensor,
    grad_dt: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    grad_C: Tensor,
    grad_D: Tensor,
    grad_z: Tensor,
    grad_dt_bias: Tensor,
    grad_initial_state: Tensor,
) -> None:
    if x.numel() == 0:
        for grad in (grad_dt, grad_A, grad_B, grad_C, grad_D, grad_dt_bias):
            grad.zero_()
        grad_initial_state.zero_() if grad_last_state is None else grad_initial_state.copy_(grad_last_state)
        return
    tiles = _BACKWARD_TILE if lower is None and not reverse_groups else _SMALL_BACKWARD_TILE
    plan = _Plan.of(x, B, reverse_groups, tiles, chunk, cut=lower is None)
    steps = _Steps(dt, dt_bias, dt_softplus, dt_low, dt_high)
    step, decay = steps.with_decays(A)
    carry = plan.boundaries(grad_y, step, decay, C, z, grad_last_state, reverse=True)
    tiles_of_group = plan.head_tiles * plan.column_tiles
    parts = {
        "dt": x.new_empty((*dt.shape, plan.column_tiles)),
        "A": x.new_empty((plan.batch, plan.segments, plan.heads, plan.width)),
        "B": x.new_empty((*B.shape[:3], tiles_of_group, plan.states)),
        "C": x.new_empty((*B.shape[:3], tiles_of_group, plan.states)),
        "D": x.new_empty((plan.batch, plan.segments, plan.heads, plan.width)),
    }
    kept = triton.cdiv(min(chunk, plan.length), _SUB)
    scratch = x.new_empty((plan.programs, kept, plan.K, plan.N, plan.R))
    ssd_scan_bwd_kernel[(plan.programs,)](
        grad_y,
        x,
        step,
        decay,
        A,
        B,
        C,
        x if D is None else D,
        x if z is None else z,
        x if lower is None else lower,
        x if upper is None else upper,
        chunk_states,
        x if carry is None else carry,
        scratch,
        grad_x,
        *parts.values(),
        grad_z,
        grad_initial_state,
        *plan.sizes,
        chunk,
        *plan.cut,
        *((0, 0, 0, 0) if carry is None else carry.stride()),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_CLAMP=lower is not None,
        HAS_CARRY=carry is not None,
        FULL=plan.full,
        SUB=_SUB,
        maxnreg=ALL_REGISTERS,
        **plan.constants,
    )
    steps.backward(parts["dt"], grad_dt)
    torch.sum(grad_dt, (0, 1), out=grad_dt_bias)
    torch.sum(parts["A"], (0, 1, 3), out=grad_A)
    torch.sum(parts["B"], 3, out=grad_B)
    torch.sum(parts["C"], 3, out=grad_C)
    torch.sum(parts["D"], (0, 1), out=grad_D)
