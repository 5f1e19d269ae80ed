"""The selective scan and its adjoint; the mathematics is in stablekern/ops/selective_scan.py.

As in ssd_scan.py a program is one warp with a tile of K x N x R states: all N states of K * R channels of one group,
for which B and C are read once. Each state has a decay of its own, so the exponential is most of the work. Time is the
fast axis in memory: STEPS steps of every row are fetched, activated and gated together, and then taken one after the
other. Where there are few programs, `scan.py` cuts the time into segments, if states are real and B and C depend on
time.

A complex number is a pair here, (re, im), and two neighbours in memory; of a real one both parts are the same value,
and nothing reads the second. `COMPLEX` decides, in the few functions that know the difference.

Backward, per chunk from its saved start state: run forward once, keeping every STEPS-th state in scratch memory, then
go back over blocks of STEPS steps whose states are recomputed and stay in registers. Every program writes its own part
of dB, dC, dA, dD and the gradient of the bias; the parts are added in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import cos_sin, sigmoid, softplus_tail
from stablekern.triton_kernels.scan import (
    ALL_REGISTERS,
    bounded,
    get,
    join,
    outside,
    put,
    segments_of,
    stack4,
    through_clamp,
    unstack4,
)

_LANE_CHANNELS = 8  # R
# States of a program, by the size of their type. The interpreter pays per operation, not per state.
_FORWARD_TILE = {"cuda": {4: 256, 8: 128, 16: 64}, "cpu": {4: 2**15, 8: 2**14, 16: 2**14}}
_BACKWARD_TILE = {"cuda": {4: 128, 8: 16, 16: 16}, "cpu": {4: 2**15, 8: 2**14, 16: 2**14}}
_SHORTEST_SEGMENT = 32
STEPS = tl.constexpr(4)  # fetched at once: 16 bytes of float32

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _place(groups, reverse_groups, channels, segments, tiles, KR: tl.constexpr):
    """item, whether it goes backwards, segment, group, tile, and of each of the KR rows: channel, whether it exists."""
    program = tl.program_id(0)
    tile = program % tiles
    program //= tiles
    group = program % groups
    program //= groups
    segment = program % segments
    item = (program // segments).to(tl.int64)
    slot = tile * KR + tl.arange(0, KR)
    backward = group >= groups - reverse_groups
    return item, backward, segment, group, tile, group * (channels // groups) + slot, slot < channels // groups


@triton.jit
def _in_row(time, length, backward, HAS_BACKWARD: tl.constexpr):
    """Where steps lie in a row of memory."""
    if HAS_BACKWARD:
        return tl.where(backward, length - 1 - time, time)
    else:
        return time


@triton.jit
def _step_size(delta, bias, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    if HAS_BIAS:
        delta += bias[:, None]
    if SOFTPLUS:
        delta = tl.where(delta > 0, delta, 0.0) + softplus_tail(delta)
    return delta


@triton.jit
def _decay(step, A, A_im, COMPLEX: tl.constexpr):
    size = tl.exp(step * A)
    if COMPLEX:
        cos, sin = cos_sin(step, A_im)
        return size * cos, size * sin
    else:
        return size, size


@triton.jit
def _advance(state, state_im, step, token, A, A_im, enter, enter_im, COMPLEX: tl.constexpr):
    """The next state before the clamp; steps and tokens (K, R)."""
    decay, decay_im = _decay(step[:, None, :], A, A_im, COMPLEX)
    token = token[:, None, :]
    if COMPLEX:
        free = decay * state - decay_im * state_im + token * enter
        return free, decay * state_im + decay_im * state + token * enter_im
    else:
        free = decay * state + token * enter
        return free, free


@triton.jit
def _masked(re, im, exists, FULL: tl.constexpr, COMPLEX: tl.constexpr):
    """What lies beside the tile's own states may be 0 * inf, and must not get into their sums."""
    if FULL:
        return re, im
    elif COMPLEX:
        return tl.where(exists, re, 0.0), tl.where(exists, im, 0.0)
    else:
        re = tl.where(exists, re, 0.0)
        return re, re


@triton.jit
def _inner(a, a_im, b, b_im, COMPLEX: tl.constexpr):
    """Re(a b*)."""
    return a * b + a_im * b_im if COMPLEX else a * b


@triton.jit
def selective_scan_segment_kernel(
    row_ptr,  # u, or grad_y in reverse
    delta_ptr,
    A_ptr,
    vector_ptr,  # B, or C in reverse
    z_ptr,
    bias_ptr,
    factor_ptr,  # (item, segment, state, channel)
    term_ptr,  # like factor
    channels,
    length,
    groups,
    reverse_groups,
    states,
    segments,
    segment_length,
    tiles,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, backward, segment, group, tile, row, real = _place(groups, reverse_groups, channels, segments, tiles, K * R)
    wide = A_ptr.dtype.element_ty
    n = tl.arange(0, N)
    channel = tl.reshape(row, (K, R))
    exists = tl.reshape(real, (K, R))[:, None, :] & (n < states)[None, :, None]
    by_state = channel[:, None, :] * states + n[None, :, None]
    A = tl.load(A_ptr + by_state, mask=exists, other=0.0)
    bias = tl.load(bias_ptr + row, mask=real, other=0.0) if HAS_BIAS else 0.0
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    state = tl.zeros((K, N, R), wide)
    elapsed = tl.zeros((K * R, STEPS), wide)
    blocks = tl.cdiv(end - begin, STEPS)
    for i in range(blocks):
        time = begin + (blocks - 1 - i if REVERSE else i) * STEPS + tl.arange(0, STEPS)
        inside = real[:, None] & (time < end)[None, :]
        place_in_row = _in_row(time, length, backward, HAS_BACKWARD)
        at = (item * channels + row[:, None]) * length + place_in_row[None, :]
        step = _step_size(tl.load(delta_ptr + at, mask=inside, other=0.0).to(wide), bias, HAS_BIAS, SOFTPLUS)
        step = tl.where(inside, step, 0.0)
        elapsed += step
        entering = tl.load(row_ptr + at, mask=inside, other=0.0).to(wide)
        if REVERSE:
            if HAS_Z:
                z = tl.load(z_ptr + at, mask=inside, other=0.0).to(wide)
                entering *= z * sigmoid(z)
        else:
            entering *= step
        vector_at = ((item * groups + group) * states + n[:, None]) * length + place_in_row[None, :]
        some = (n < states)[:, None] & (time < end)[None, :]
        vectors = unstack4(tl.load(vector_ptr + vector_at, mask=some, other=0.0).to(wide), N)
        steps = unstack4(step, K * R)
        tokens = unstack4(entering, K * R)
        for j in tl.static_range(STEPS):
            if REVERSE:
                token = tl.reshape(tokens[STEPS - 1 - j], (K, R))
                state += token[:, None, :] * vectors[STEPS - 1 - j][None, :, None]
                state *= tl.exp(tl.reshape(steps[STEPS - 1 - j], (K, R))[:, None, :] * A)
            else:
                step = tl.reshape(steps[j], (K, R))
                token = tl.reshape(tokens[j], (K, R))
                vector = vectors[j][None, :, None]
                state, _ = _advance(state, state, step, token, A, A, vector, vector, COMPLEX=False)
    factor = tl.exp(tl.reshape(tl.sum(elapsed, 1), (K, R))[:, None, :] * A)
    to = ((item * segments + segment) * states + n[None, :, None]) * channels + channel[:, None, :]
    tl.store(factor_ptr + to, factor, mask=exists)
    tl.store(term_ptr + to, state, mask=exists)


@triton.jit
def selective_scan_fwd_kernel(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    lower_ptr,
    upper_ptr,
    start_ptr,  # (item, segment, state, channel) by strides
    y_ptr,
    last_ptr,
    chunk_ptr,
    changed_ptr,  # (item, channel)
    channels,
    length,
    groups,
    reverse_groups,
    states,
    chunk,
    segments,
    segment_length,
    tiles,
    start_item,
    start_segment,
    start_n,
    start_channel,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    COUNT: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    COMPLEX: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    FULL: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, backward, segment, group, tile, row, real = _place(groups, reverse_groups, channels, segments, tiles, K * R)
    wide = A_ptr.dtype.element_ty
    n = tl.arange(0, N)
    channel = tl.reshape(row, (K, R))
    exists = tl.reshape(real, (K, R))[:, None, :] & (n < states)[None, :, None]
    by_state = channel[:, None, :] * states + n[None, :, None]
    A, A_im = get(A_ptr, by_state, exists, COMPLEX)
    if CONSTANT_B:
        always_enter, always_enter_im = get(B_ptr, by_state, exists, COMPLEX)
    if CONSTANT_C:
        always_leave, always_leave_im = get(C_ptr, by_state, exists, COMPLEX)
    lower = tl.load(lower_ptr + by_state, mask=exists, other=0.0) if HAS_CLAMP and not COMPLEX else 0.0
    upper = tl.load(upper_ptr + by_state, mask=exists, other=0.0) if HAS_CLAMP else 0.0
    bias = tl.load(bias_ptr + row, mask=real, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(D_ptr + row, mask=real, other=0.0) if HAS_D else 0.0
    if HAS_START:
        source = item * start_item + segment.to(tl.int64) * start_segment
        source += n[None, :, None].to(tl.int64) * start_n + channel[:, None, :].to(tl.int64) * start_channel
        state, state_im = get(start_ptr, source, exists, COMPLEX)
    else:
        state = tl.zeros((K, N, R), wide)
        state_im = tl.zeros((K, N, R), wide)
    changed = tl.zeros((K, R), tl.int32)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    # Addresses that are hoisted out of the loop would be spilled.
    for first in tl.range(begin, end, STEPS, disable_licm=True):
        time = first + tl.arange(0, STEPS)
        inside = real[:, None] & (time < end)[None, :]
        place_in_row = _in_row(time, length, backward, HAS_BACKWARD)
        at = (item * channels + row[:, None]) * length + place_in_row[None, :]
        if first % chunk == 0:
            to = (item * tl.cdiv(length, chunk) + first // chunk) * states + n[None, :, None]
            put(chunk_ptr, to * channels + channel[:, None, :], state, state_im, exists, COMPLEX)
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(wide)
        step = _step_size(tl.load(delta_ptr + at, mask=inside, other=0.0).to(wide), bias, HAS_BIAS, SOFTPLUS)
        step = tl.where(inside, step, 0.0)
        vector_at = ((item * groups + group) * states + n[:, None]) * length + place_in_row[None, :]
        some = (n < states)[:, None] & (time < end)[None, :]
        if not CONSTANT_B:
            enters_re, enters_at_once = get(B_ptr, vector_at, some, COMPLEX)
            enters = unstack4(enters_re.to(wide), N)
            enters_im = unstack4(enters_at_once.to(wide), N)
        if not CONSTANT_C:
            leaves_re, leaves_at_once = get(C_ptr, vector_at, some, COMPLEX)
            leaves = unstack4(leaves_re.to(wide), N)
            leaves_im = unstack4(leaves_at_once.to(wide), N)
        steps = unstack4(step, K * R)
        tokens = unstack4(step * u, K * R)
        ys = ()
        for j in tl.static_range(STEPS):
            token = tl.reshape(tokens[j], (K, R))
            enter = always_enter if CONSTANT_B else enters[j][None, :, None]
            enter_im = always_enter_im if CONSTANT_B else enters_im[j][None, :, None]
            leave = always_leave if CONSTANT_C else leaves[j][None, :, None]
            leave_im = always_leave_im if CONSTANT_C else leaves_im[j][None, :, None]
            step_here = tl.reshape(steps[j], (K, R))
            free, free_im = _advance(state, state_im, step_here, token, A, A_im, enter, enter_im, COMPLEX)
            state, state_im = bounded(free, free_im, lower, upper, HAS_CLAMP, COMPLEX)
            if COUNT:
                outer = outside(free, free_im, lower, upper, COMPLEX)
                changed += tl.sum((outer & exists & (first + j < end)).to(tl.int32), 1)
            # The real part of a product, not of one with a conjugate.
            read = _inner(state, -state_im, leave, leave_im, COMPLEX)
            read, _ = _masked(read, read, exists, FULL, COMPLEX)
            ys = ys + (tl.reshape(tl.sum(read, 1), (K * R,)),)
        y = stack4(ys[0], ys[1], ys[2], ys[3], K * R)
        if COMPLEX:
            y *= 2.0
        if HAS_D:
            y += skip[:, None] * u
        if HAS_Z:
            z = tl.load(z_ptr + at, mask=inside, other=0.0).to(wide)
            y *= z * sigmoid(z)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if COUNT:
        at_channel = item * channels + channel
        tl.store(changed_ptr + at_channel, changed, mask=tl.reshape(real, (K, R)))  # a clamped scan is not cut
    if segment == segments - 1:
        put(last_ptr, item * channels * states + by_state, state, state_im, exists, COMPLEX)


@triton.jit
def selective_scan_bwd_kernel(
    dy_ptr,
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    lower_ptr,
    upper_ptr,
    chunk_ptr,
    carry_ptr,  # (item, segment, state, channel) by strides: the adjoint of the state after the segment
    scratch_ptr,  # (program, block of STEPS steps, K, N, R)
    du_ptr,
    ddelta_ptr,
    dA_ptr,  # (item, segment, channel, state)
    dB_ptr,  # (item, group, tile, state, step); like dA if B is constant
    dC_ptr,
    dD_ptr,  # (item, segment, channel)
    dz_ptr,
    dbias_ptr,  # (item, segment, channel)
    dstart_ptr,
    channels,
    length,
    groups,
    reverse_groups,
    states,
    chunk,
    segments,
    segment_length,
    tiles,
    carry_item,
    carry_segment,
    carry_n,
    carry_channel,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CLAMP: tl.constexpr,
    HAS_CARRY: tl.constexpr,
    HAS_BACKWARD: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    COMPLEX: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    FULL: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, backward, segment, group, tile, row, real = _place(groups, reverse_groups, channels, segments, tiles, K * R)
    wide = A_ptr.dtype.element_ty
    n = tl.arange(0, N)
    channel = tl.reshape(row, (K, R))
    exists = tl.reshape(real, (K, R))[:, None, :] & (n < states)[None, :, None]
    by_state = channel[:, None, :] * states + n[None, :, None]
    A, A_im = get(A_ptr, by_state, exists, COMPLEX)
    if CONSTANT_B:
        always_enter, always_enter_im = get(B_ptr, by_state, exists, COMPLEX)
    if CONSTANT_C:
        always_leave, always_leave_im = get(C_ptr, by_state, exists, COMPLEX)
    lower = tl.load(lower_ptr + by_state, mask=exists, other=0.0) if HAS_CLAMP and not COMPLEX else 0.0
    upper = tl.load(upper_ptr + by_state, mask=exists, other=0.0) if HAS_CLAMP else 0.0
    bias = tl.load(bias_ptr + row, mask=real, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(D_ptr + row, mask=real, other=0.0) if HAS_D else 0.0
    if HAS_CARRY:
        source = item * carry_item + segment.to(tl.int64) * carry_segment
        source += n[None, :, None].to(tl.int64) * carry_n + channel[:, None, :].to(tl.int64) * carry_channel
        carry, carry_im = get(carry_ptr, source, exists, COMPLEX)
    else:
        carry = tl.zeros((K, N, R), wide)
        carry_im = tl.zeros((K, N, R), wide)
    by_rate = tl.zeros((K, N, R), wide)
    by_rate_im = tl.zeros((K, N, R), wide)
    by_enter = tl.zeros((K, N, R), wide)
    by_enter_im = tl.zeros((K, N, R), wide)
    by_leave = tl.zeros((K, N, R), wide)
    by_leave_im = tl.zeros((K, N, R), wide)
    by_skip = tl.zeros((K * R, STEPS), wide)
    by_bias = tl.zeros((K * R, STEPS), wide)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    TILE: tl.constexpr = K * N * R * (2 if COMPLEX else 1)
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * tl.cdiv(tl.minimum(chunk, length), STEPS) * TILE
    place = (tl.arange(0, K)[:, None, None] * N + n[None, :, None]) * R + tl.arange(0, R)[None, None, :]
    everywhere = place >= 0

    # Addresses that are hoisted out of these loops would be spilled.
    for back in tl.range(0, tl.cdiv(end - begin, chunk), disable_licm=True):
        chunk_begin = begin + (tl.cdiv(end - begin, chunk) - 1 - back) * chunk
        chunk_end = tl.minimum(chunk_begin + chunk, end)
        blocks = tl.cdiv(chunk_end - chunk_begin, STEPS)
        saved = (item * tl.cdiv(length, chunk) + chunk_begin // chunk) * states + n[None, :, None]
        state, state_im = get(chunk_ptr, saved * channels + channel[:, None, :], exists, COMPLEX)
        put(scratch, place, state, state_im, everywhere, COMPLEX)
        for i in tl.range(0, blocks - 1, disable_licm=True):
            time = chunk_begin + i * STEPS + tl.arange(0, STEPS)
            place_in_row = _in_row(time, length, backward, HAS_BACKWARD)
            at = (item * channels + row[:, None]) * length + place_in_row[None, :]
            u = tl.load(u_ptr + at, mask=real[:, None], other=0.0).to(wide)
            delta = tl.load(delta_ptr + at, mask=real[:, None], other=0.0).to(wide)
            step = _step_size(delta, bias, HAS_BIAS, SOFTPLUS)
            vector_at = ((item * groups + group) * states + n[:, None]) * length + place_in_row[None, :]
            some = (n < states)[:, None] & (time < length)[None, :]
            if not CONSTANT_B:
                enters_re, enters_at_once = get(B_ptr, vector_at, some, COMPLEX)
                enters = unstack4(enters_re.to(wide), N)
                enters_im = unstack4(enters_at_once.to(wide), N)
            steps = unstack4(step, K * R)
            tokens = unstack4(step * u, K * R)
            for j in tl.static_range(STEPS):
                token = tl.reshape(tokens[j], (K, R))
                enter = always_enter if CONSTANT_B else enters[j][None, :, None]
                enter_im = always_enter_im if CONSTANT_B else enters_im[j][None, :, None]
                step_here = tl.reshape(steps[j], (K, R))
                free, free_im = _advance(state, state_im, step_here, token, A, A_im, enter, enter_im, COMPLEX)
                state, state_im = bounded(free, free_im, lower, upper, HAS_CLAMP, COMPLEX)
            put(scratch + (i + 1) * TILE, place, state, state_im, everywhere, COMPLEX)
        tl.debug_barrier()  # what one lane has stored another may load

        rate_of_chunk = tl.zeros((K, N, R), wide)
        rate_of_chunk_im = tl.zeros((K, N, R), wide)
        for i in tl.range(0, blocks, disable_licm=True):
            block = blocks - 1 - i
            time = chunk_begin + block * STEPS + tl.arange(0, STEPS)
            inside = real[:, None] & (time < chunk_end)[None, :]
            place_in_row = _in_row(time, length, backward, HAS_BACKWARD)
            at = (item * channels + row[:, None]) * length + place_in_row[None, :]
            u = tl.load(u_ptr + at, mask=inside, other=0.0).to(wide)
            delta = tl.load(delta_ptr + at, mask=inside, other=0.0).to(wide)
            step = tl.where(inside, _step_size(delta, bias, HAS_BIAS, SOFTPLUS), 0.0)
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(wide)
            reading = dy
            if HAS_Z:
                z = tl.load(z_ptr + at, mask=inside, other=0.0).to(wide)
                reading = dy * (z * sigmoid(z))
            vector_at = ((item * groups + group) * states + n[:, None]) * length + place_in_row[None, :]
            some = (n < states)[:, None] & (time < chunk_end)[None, :]
            if not CONSTANT_B:
                enters_re, enters_at_once = get(B_ptr, vector_at, some, COMPLEX)
                enters = unstack4(enters_re.to(wide), N)
                enters_im = unstack4(enters_at_once.to(wide), N)
            if not CONSTANT_C:
                leaves_re, leaves_at_once = get(C_ptr, vector_at, some, COMPLEX)
                leaves = unstack4(leaves_re.to(wide), N)
                leaves_im = unstack4(leaves_at_once.to(wide), N)
            steps = unstack4(step, K * R)
            tokens = unstack4(step * u, K * R)
            readings = unstack4(reading, K * R)
            state, state_im = get(scratch + block * TILE, place, exists, COMPLEX)
            trail = (state,)  # unclamped, but for the first
            trail_im = (state_im,)
            for j in tl.static_range(STEPS):
                token = tl.reshape(tokens[j], (K, R))
                enter = always_enter if CONSTANT_B else enters[j][None, :, None]
                enter_im = always_enter_im if CONSTANT_B else enters_im[j][None, :, None]
                step_here = tl.reshape(steps[j], (K, R))
                free, free_im = _advance(state, state_im, step_here, token, A, A_im, enter, enter_im, COMPLEX)
                free, free_im = _masked(free, free_im, exists, FULL, COMPLEX)
                state, state_im = bounded(free, free_im, lower, upper, HAS_CLAMP, COMPLEX)
                trail = trail + (free,)
                trail_im = trail_im + (free_im,)
            ys = ()
            by_tokens = ()
            by_exponents = ()
            by_enters = ()
            by_enters_im = ()
            by_leaves = ()
            by_leaves_im = ()
            for j in tl.static_range(STEPS - 1, -1, -1):
                enter = always_enter if CONSTANT_B else enters[j][None, :, None]
                enter_im = always_enter_im if CONSTANT_B else enters_im[j][None, :, None]
                leave = always_leave if CONSTANT_C else leaves[j][None, :, None]
                leave_im = always_leave_im if CONSTANT_C else leaves_im[j][None, :, None]
                before = trail[j]
                before_im = trail_im[j]
                after, after_im = bounded(trail[j + 1], trail_im[j + 1], lower, upper, HAS_CLAMP, COMPLEX)
                read = tl.reshape(readings[j], (K, R))[:, None, :]
                if COMPLEX:
                    read *= 2.0
                grad = carry + read * leave
                grad_im = carry_im - read * leave_im
                if HAS_CLAMP:
                    if j > 0:
                        before, before_im = bounded(before, before_im, lower, upper, HAS_CLAMP, COMPLEX)
                    grad, grad_im = through_clamp(grad, grad_im, trail[j + 1], trail_im[j + 1], lower, upper, COMPLEX)
                grad, grad_im = _masked(grad, grad_im, exists, FULL, COMPLEX)
                size = tl.reshape(steps[j], (K, R))[:, None, :]
                decay, decay_im = _decay(size, A, A_im, COMPLEX)
                carry = _inner(grad, grad_im, decay, decay_im, COMPLEX)
                if COMPLEX:
                    carry_im = decay * grad_im - decay_im * grad
                    exponent_im = carry_im * before - carry * before_im
                    rate_of_chunk_im += size * exponent_im
                else:
                    exponent_im = carry
                exponent = _inner(carry, carry_im, before, before_im, COMPLEX)
                rate_of_chunk += size * exponent
                by_token = tl.sum(_inner(grad, grad_im, enter, enter_im, COMPLEX), 1)
                by_tokens = (tl.reshape(by_token, (K * R,)),) + by_tokens
                by_exponent = tl.sum(_inner(exponent, exponent_im, A, A_im, COMPLEX), 1)
                by_exponents = (tl.reshape(by_exponent, (K * R,)),) + by_exponents
                token = tl.reshape(tokens[j], (K, R))[:, None, :]
                if CONSTANT_B:
                    by_enter += grad * token
                    by_enter_im += grad_im * token
                else:
                    by_enters = (tl.sum(tl.sum(grad * token, 0), 1),) + by_enters
                    by_enters_im = (tl.sum(tl.sum(grad_im * token, 0), 1),) + by_enters_im
                if CONSTANT_C:
                    by_leave += read * after
                    by_leave_im -= read * after_im
                else:
                    by_leaves = (tl.sum(tl.sum(read * after, 0), 1),) + by_leaves
                    by_leaves_im = (-tl.sum(tl.sum(read * after_im, 0), 1),) + by_leaves_im
                if HAS_Z:
                    y = _inner(after, -after_im, leave, leave_im, COMPLEX)
                    y, _ = _masked(y, y, exists, FULL, COMPLEX)
                    ys = (tl.reshape(tl.sum(y, 1), (K * R,)),) + ys
            by_token = stack4(by_tokens[0], by_tokens[1], by_tokens[2], by_tokens[3], K * R)
            by_step = stack4(by_exponents[0], by_exponents[1], by_exponents[2], by_exponents[3], K * R) + u * by_token
            by_u = step * by_token
            if HAS_D:
                by_u += skip[:, None] * reading
            tl.store(du_ptr + at, by_u.to(du_ptr.dtype.element_ty), mask=inside)
            if HAS_Z:
                y = stack4(ys[0], ys[1], ys[2], ys[3], K * R)
                if COMPLEX:
                    y *= 2.0
                if HAS_D:
                    y += skip[:, None] * u
                open_share = sigmoid(z)
                dz = dy * y * (open_share * (1.0 + z * (1.0 - open_share)))
                tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
            if SOFTPLUS:
                by_step *= sigmoid(delta + bias[:, None]) if HAS_BIAS else sigmoid(delta)
            by_step = tl.where(inside, by_step, 0.0)
            tl.store(ddelta_ptr + at, by_step.to(ddelta_ptr.dtype.element_ty), mask=inside)
            by_bias += by_step
            by_skip += reading * u
            parts = (((item * groups + group) * tiles + tile) * states + n[:, None]) * length + place_in_row[None, :]
            if not CONSTANT_B:
                by_B = stack4(by_enters[0], by_enters[1], by_enters[2], by_enters[3], N)
                by_B_im = stack4(by_enters_im[0], by_enters_im[1], by_enters_im[2], by_enters_im[3], N)
                put(dB_ptr, parts, by_B, by_B_im, some, COMPLEX)
            if not CONSTANT_C:
                by_C = stack4(by_leaves[0], by_leaves[1], by_leaves[2], by_leaves[3], N)
                by_C_im = stack4(by_leaves_im[0], by_leaves_im[1], by_leaves_im[2], by_leaves_im[3], N)
                put(dC_ptr, parts, by_C, by_C_im, some, COMPLEX)
        by_rate += rate_of_chunk
        by_rate_im += rate_of_chunk_im
        tl.debug_barrier()  # the next chunk overwrites the scratch memory

    part = (item * segments + segment) * channels
    put(dA_ptr, part * states + by_state, by_rate, by_rate_im, exists, COMPLEX)
    if CONSTANT_B:
        put(dB_ptr, part * states + by_state, by_enter, by_enter_im, exists, COMPLEX)
    if CONSTANT_C:
        put(dC_ptr, part * states + by_state, by_leave, by_leave_im, exists, COMPLEX)
    tl.store(dD_ptr + part + row, tl.sum(by_skip, 1), mask=real)
    tl.store(dbias_ptr + part + row, tl.sum(by_bias, 1), mask=real)
    if segment == 0:
        put(dstart_ptr, item * channels * states + by_state, carry, carry_im, exists, COMPLEX)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Sizes of a scan, its tiles and its segments."""

    batch: int
    channels: int
    length: int
    groups: int
    reverse_groups: int
    states: int
    K: int
    N: int
    R: int
    tiles: int
    segments: int
    segment_length: int

    @staticmethod
    def of(
        u: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        upper: Tensor | None,
        reverse_channels: int,
        tiles: dict[str, dict[int, int]],
        unit: int,
    ) -> _Plan:
        """`unit`: segments are a multiple of it."""
        batch, channels, length = u.shape
        # Where B and C are constant, the channels of one direction are a group.
        directions = 2 if 0 < reverse_channels < channels else 1
        groups = next((M.shape[1] for M in (B, C) if M.dim() == 4), directions)
        states = A.shape[1]
        tile = tiles[u.device.type][A.element_size()]
        cut = upper is None and not A.is_complex() and B.dim() == C.dim() == 4
        N = triton.next_power_of_2(max(states, 1))
        R = max(1, min(_LANE_CHANNELS, tile // N))
        K = max(1, min(tile // (N * R), triton.next_power_of_2(triton.cdiv(channels // groups, R))))
        count = triton.cdiv(channels // groups, K * R)
        units = triton.cdiv(length, unit)
        segment_length = triton.cdiv(units, segments_of(batch * groups * count, units) if cut else 1) * unit
        segments = triton.cdiv(length, segment_length)
        reverse_groups = reverse_channels * groups // channels
        return _Plan(batch, channels, length, groups, reverse_groups, states, K, N, R, count, segments, segment_length)

    @property
    def programs(self) -> int:
        return self.batch * self.segments * self.groups * self.tiles

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.channels, self.length, self.groups, self.reverse_groups, self.states

    @property
    def cut(self) -> tuple[int, ...]:
        return self.segments, self.segment_length, self.tiles

    @property
    def full(self) -> bool:
        """Every state of every tile exists."""
        return self.channels // self.groups % (self.K * self.R) == 0 and self.states == self.N

    @property
    def constants(self) -> dict[str, int | bool]:
        fusion = {"enable_fp_fusion": True}  # Triton warns where this is left open; a fused multiply-add rounds once
        ways = {"HAS_BACKWARD": self.reverse_groups > 0}
        return ways | {"K": self.K, "N": self.N, "R": self.R, "num_warps": 1} | fusion

    def boundaries(
        self,
        row: Tensor,
        delta: Tensor,
        A: Tensor,
        vector: Tensor,
        z: Tensor | None,
        delta_bias: Tensor | None,
        first: Tensor | None,
        *,
        softplus: bool,
        reverse: bool,
    ) -> Tensor | None:
        """What each segment starts from, (item, segment, state, channel); None for zeros."""
        if first is not None:  # (item, channel, state)
            first = first.mT
        if self.segments == 1:
            return None if first is None else first[:, None]
        shape = (self.batch, self.segments, self.states, self.channels)
        factor, term, start = (A.new_empty(shape) for _ in range(3))
        selective_scan_segment_kernel[(self.programs,)](
            row,
            delta,
            A,
            vector,
            row if z is None else z,
            A if delta_bias is None else delta_bias,
            factor,
            term,
            *self.sizes,
            *self.cut,
            HAS_BIAS=delta_bias is not None,
            HAS_Z=z is not None,
            SOFTPLUS=softplus,
            REVERSE=reverse,
            **self.constants,
        )
        join(first, factor, term, start, reverse=reverse)
        return start


def _finite(A: Tensor) -> Tensor:
    """-inf becomes the least finite rate, whose decay is 0 too: the steps beyond the end are 0, and 0 * -inf is NaN."""
    if A.is_complex():
        return torch.complex(_finite(A.real), A.imag)
    return A.clamp(min=torch.finfo(A.dtype).min)


def _parts(tensor: Tensor) -> Tensor:
    """Complex numbers as two neighbours."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def selective_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    reverse_channels: int,
    delta_softplus: bool,
    chunk: int,
    y: Tensor,
    last_state: Tensor,
    chunk_states: Tensor,
    saturation: Tensor,
) -> None:
    """`saturation` is empty where nothing is to be counted."""
    if u.numel() == 0:
        saturation.zero_()
        last_state.zero_() if initial_state is None else last_state.copy_(initial_state)
        return
    A = _finite(A)
    plan = _Plan.of(u, A, B, C, upper, reverse_channels, _FORWARD_TILE, _SHORTEST_SEGMENT)
    count = saturation.numel() > 0
    changed = u.new_empty(u.shape[:2] if count else (1,), dtype=torch.int32)
    start = plan.boundaries(u, delta, A, B, None, delta_bias, initial_state, softplus=delta_softplus, reverse=False)
    selective_scan_fwd_kernel[(plan.programs,)](
        u,
        delta,
        *(_parts(tensor) for tensor in (A, B, C)),
        *(u if tensor is None else tensor for tensor in (D, z, delta_bias, lower, upper)),
        _parts(A if start is None else start),
        y,
        _parts(last_state),
        _parts(chunk_states),
        changed,
        *plan.sizes,
        chunk,
        *plan.cut,
        *((0, 0, 0, 0) if start is None else start.stride()),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=delta_bias is not None,
        HAS_CLAMP=upper is not None,
        COUNT=count,
        HAS_START=start is not None,
        SOFTPLUS=delta_softplus,
        COMPLEX=A.is_complex(),
        CONSTANT_B=B.dim() == 2,
        CONSTANT_C=C.dim() == 2,
        FULL=plan.full,
        # Without it the assembler spills a few bytes of what these cases need more.
        maxnreg=ALL_REGISTERS if count or A.is_complex() or B.dim() == 2 or C.dim() == 2 else None,
        **plan.constants,
    )
    if count:
        torch.div(changed, max(plan.length * plan.states, 1), out=saturation)


def selective_scan_bwd(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    chunk_states: Tensor,
    reverse_channels: int,
    delta_softplus: bool,
    chunk: int,
    grad_u: Tensor,
    grad_delta: Tensor,
    grad_A: Tensor,
    grad_B: Tensor,
    grad_C: Tensor,
    grad_D: Tensor,
    grad_z: Tensor,
    grad_delta_bias: Tensor,
    grad_initial_state: Tensor,
) -> None:
    if u.numel() == 0:
        for grad in (grad_A, grad_B, grad_C, grad_D, grad_delta_bias):
            grad.zero_()
        grad_initial_state.zero_() if grad_last_state is None else grad_initial_state.copy_(grad_last_state)
        return
    A = _finite(A)
    plan = _Plan.of(u, A, B, C, upper, reverse_channels, _BACKWARD_TILE, chunk)
    carry = plan.boundaries(grad_y, delta, A, C, z, delta_bias, grad_last_state, softplus=delta_softplus, reverse=True)
    channel_parts = (plan.batch, plan.segments, plan.channels)
    state_parts = (*channel_parts, plan.states)
    vector_parts = (plan.batch, plan.groups, plan.tiles, plan.states, plan.length)
    A_parts = A.new_empty(state_parts)
    B_parts, C_parts = (A.new_empty(state_parts if M.dim() == 2 else vector_parts) for M in (B, C))
    D_parts, bias_parts = (grad_D.new_empty(channel_parts) for _ in range(2))
    kept = triton.cdiv(min(chunk, plan.length), STEPS.value)
    selective_scan_bwd_kernel[(plan.programs,)](
        grad_y,
        u,
        delta,
        *(_parts(tensor) for tensor in (A, B, C)),
        *(u if tensor is None else tensor for tensor in (D, z, delta_bias, lower, upper)),
        _parts(chunk_states),
        _parts(A if carry is None else carry),
        _parts(A.new_empty((plan.programs, kept, plan.K, plan.N, plan.R))),
        grad_u,
        grad_delta,
        *(_parts(tensor) for tensor in (A_parts, B_parts, C_parts)),
        D_parts,
        grad_z,
        bias_parts,
        _parts(grad_initial_state),
        *plan.sizes,
        chunk,
        *plan.cut,
        *((0, 0, 0, 0) if carry is None else carry.stride()),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=delta_bias is not None,
        HAS_CLAMP=upper is not None,
        HAS_CARRY=carry is not None,
        SOFTPLUS=delta_softplus,
        COMPLEX=A.is_complex(),
        CONSTANT_B=B.dim() == 2,
        CONSTANT_C=C.dim() == 2,
        FULL=plan.full,
        maxnreg=ALL_REGISTERS,
        **plan.constants,
    )
    grad_A.copy_(A_parts.sum((0, 1)))
    for grad, parts in ((grad_B, B_parts), (grad_C, C_parts)):
        grad.copy_(parts.sum((0, 1) if grad.dim() == 2 else 2))
    grad_D.copy_(D_parts.sum((0, 1)))
    grad_delta_bias.copy_(bias_parts.sum((0, 1)))
