"""The selective scan and its adjoint for real states; the mathematics is in stablekern/ops/selective_scan.py.

As in ssd_scan.py a program is one warp with a tile of K x N x R states: all N states of K * R channels of one group,
for which B and C are read once. Each state has a decay of its own, so the exponential is most of the work. Time is the
fast axis in memory: STEPS steps of every row are fetched, activated and gated together, and then taken one after the
other. Where there are few programs, `scan.py` cuts the time into segments.

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

from stablekern.triton_kernels.numerics import softplus_tail
from stablekern.triton_kernels.scan import clamped, join, segments_of, stack4, unstack4

_LANE_CHANNELS = 8  # R
# States of a program, by the size of their type. The interpreter pays per operation, not per state.
_FORWARD_TILE = {"cuda": {4: 256, 8: 128}, "cpu": {4: 2**15, 8: 2**14}}
_BACKWARD_TILE = {"cuda": {4: 128, 8: 32}, "cpu": {4: 2**15, 8: 2**14}}
_SHORTEST_SEGMENT = 32
STEPS = tl.constexpr(4)  # fetched at once: 16 bytes of float32

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _place(groups, channels, segments, tiles, KR: tl.constexpr):
    """item, segment, group, tile, and of each of the KR rows: channel, whether it exists."""
    program = tl.program_id(0)
    tile = program % tiles
    program //= tiles
    group = program % groups
    program //= groups
    segment = program % segments
    item = (program // segments).to(tl.int64)
    slot = tile * KR + tl.arange(0, KR)
    return item, segment, group, tile, group * (channels // groups) + slot, slot < channels // groups


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _step_size(delta, bias, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    if HAS_BIAS:
        delta += bias[:, None]
    if SOFTPLUS:
        delta = tl.where(delta > 0, delta, 0.0) + softplus_tail(delta)
    return delta


@triton.jit
def _advance(state, step, token, A, enter, lower, upper, HAS_CLAMP: tl.constexpr):
    state = tl.exp(step[:, None, :] * A) * state + token[:, None, :] * enter[None, :, None]
    if HAS_CLAMP:
        state = clamped(state, lower, upper)
    return state


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
    states,
    segments,
    segment_length,
    tiles,
    HAS_BIAS: tl.constexpr,
    HAS_Z: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, segment, group, tile, row, real = _place(groups, channels, segments, tiles, K * R)
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
        at = (item * channels + row[:, None]) * length + time[None, :]
        step = _step_size(tl.load(delta_ptr + at, mask=inside, other=0.0).to(wide), bias, HAS_BIAS, SOFTPLUS)
        step = tl.where(inside, step, 0.0)
        elapsed += step
        entering = tl.load(row_ptr + at, mask=inside, other=0.0).to(wide)
        if REVERSE:
            if HAS_Z:
                z = tl.load(z_ptr + at, mask=inside, other=0.0).to(wide)
                entering *= z * _sigmoid(z)
        else:
            entering *= step
        vector_at = ((item * groups + group) * states + n[:, None]) * length + time[None, :]
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
                state = _advance(state, step, tl.reshape(tokens[j], (K, R)), A, vectors[j], A, A, HAS_CLAMP=False)
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
    channels,
    length,
    groups,
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
    HAS_START: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    FULL: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, segment, group, tile, row, real = _place(groups, channels, segments, tiles, K * R)
    wide = A_ptr.dtype.element_ty
    n = tl.arange(0, N)
    channel = tl.reshape(row, (K, R))
    exists = tl.reshape(real, (K, R))[:, None, :] & (n < states)[None, :, None]
    by_state = channel[:, None, :] * states + n[None, :, None]
    A = tl.load(A_ptr + by_state, mask=exists, other=0.0)
    lower = tl.load(lower_ptr + by_state, mask=exists, other=0.0) if HAS_CLAMP else 0.0
    upper = tl.load(upper_ptr + by_state, mask=exists, other=0.0) if HAS_CLAMP else 0.0
    bias = tl.load(bias_ptr + row, mask=real, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(D_ptr + row, mask=real, other=0.0) if HAS_D else 0.0
    if HAS_START:
        source = start_ptr + item * start_item + segment.to(tl.int64) * start_segment
        source += n[None, :, None].to(tl.int64) * start_n + channel[:, None, :].to(tl.int64) * start_channel
        state = tl.load(source, mask=exists, other=0.0)
    else:
        state = tl.zeros((K, N, R), wide)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    # Addresses that are hoisted out of the loop would be spilled.
    for first in tl.range(begin, end, STEPS, disable_licm=True):
        time = first + tl.arange(0, STEPS)
        inside = real[:, None] & (time < end)[None, :]
        at = (item * channels + row[:, None]) * length + time[None, :]
        if first % chunk == 0:
            to = (item * tl.cdiv(length, chunk) + first // chunk) * states + n[None, :, None]
            tl.store(chunk_ptr + to * channels + channel[:, None, :], state, mask=exists)
        u = tl.load(u_ptr + at, mask=inside, other=0.0).to(wide)
        step = _step_size(tl.load(delta_ptr + at, mask=inside, other=0.0).to(wide), bias, HAS_BIAS, SOFTPLUS)
        step = tl.where(inside, step, 0.0)
        vector_at = ((item * groups + group) * states + n[:, None]) * length + time[None, :]
        some = (n < states)[:, None] & (time < end)[None, :]
        enters = unstack4(tl.load(B_ptr + vector_at, mask=some, other=0.0).to(wide), N)
        leaves = unstack4(tl.load(C_ptr + vector_at, mask=some, other=0.0).to(wide), N)
        steps = unstack4(step, K * R)
        tokens = unstack4(step * u, K * R)
        ys = ()
        for j in tl.static_range(STEPS):
            token = tl.reshape(tokens[j], (K, R))
            state = _advance(state, tl.reshape(steps[j], (K, R)), token, A, enters[j], lower, upper, HAS_CLAMP)
            read = state * leaves[j][None, :, None]
            if not FULL:
                read = tl.where(exists, read, 0.0)  # what lies beside may be 0 * inf
            ys = ys + (tl.reshape(tl.sum(read, 1), (K * R,)),)
        y = stack4(ys[0], ys[1], ys[2], ys[3], K * R)
        if HAS_D:
            y += skip[:, None] * u
        if HAS_Z:
            z = tl.load(z_ptr + at, mask=inside, other=0.0).to(wide)
            y *= z * _sigmoid(z)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    if segment == segments - 1:
        tl.store(last_ptr + item * channels * states + by_state, state, mask=exists)


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
    dB_ptr,  # (item, group, tile, state, step)
    dC_ptr,
    dD_ptr,  # (item, segment, channel)
    dz_ptr,
    dbias_ptr,  # (item, segment, channel)
    dstart_ptr,
    channels,
    length,
    groups,
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
    SOFTPLUS: tl.constexpr,
    FULL: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
):
    item, segment, group, tile, row, real = _place(groups, channels, segments, tiles, K * R)
    wide = A_ptr.dtype.element_ty
    n = tl.arange(0, N)
    channel = tl.reshape(row, (K, R))
    exists = tl.reshape(real, (K, R))[:, None, :] & (n < states)[None, :, None]
    by_state = channel[:, None, :] * states + n[None, :, None]
    A = tl.load(A_ptr + by_state, mask=exists, other=0.0)
    lower = tl.load(lower_ptr + by_state, mask=exists, other=0.0) if HAS_CLAMP else 0.0
    upper = tl.load(upper_ptr + by_state, mask=exists, other=0.0) if HAS_CLAMP else 0.0
    bias = tl.load(bias_ptr + row, mask=real, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(D_ptr + row, mask=real, other=0.0) if HAS_D else 0.0
    if HAS_CARRY:
        source = carry_ptr + item * carry_item + segment.to(tl.int64) * carry_segment
        source += n[None, :, None].to(tl.int64) * carry_n + channel[:, None, :].to(tl.int64) * carry_channel
        carry = tl.load(source, mask=exists, other=0.0)
    else:
        carry = tl.zeros((K, N, R), wide)
    by_rate = tl.zeros((K, N, R), wide)
    by_skip = tl.zeros((K * R, STEPS), wide)
    by_bias = tl.zeros((K * R, STEPS), wide)
    begin = segment * segment_length
    end = tl.minimum(begin + segment_length, length)
    scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * tl.cdiv(tl.minimum(chunk, length), STEPS) * (K * N * R)
    scratch += (tl.arange(0, K)[:, None, None] * N + n[None, :, None]) * R + tl.arange(0, R)[None, None, :]

    # Addresses that are hoisted out of these loops would be spilled.
    for back in tl.range(0, tl.cdiv(end - begin, chunk), disable_licm=True):
        chunk_begin = begin + (tl.cdiv(end - begin, chunk) - 1 - back) * chunk
        chunk_end = tl.minimum(chunk_begin + chunk, end)
        blocks = tl.cdiv(chunk_end - chunk_begin, STEPS)
        saved = (item * tl.cdiv(length, chunk) + chunk_begin // chunk) * states + n[None, :, None]
        state = tl.load(chunk_ptr + saved * channels + channel[:, None, :], mask=exists, other=0.0)
        tl.store(scratch, state)
        for i in tl.range(0, blocks - 1, disable_licm=True):
            time = chunk_begin + i * STEPS + tl.arange(0, STEPS)
            at = (item * channels + row[:, None]) * length + time[None, :]
            u = tl.load(u_ptr + at, mask=real[:, None], other=0.0).to(wide)
            delta = tl.load(delta_ptr + at, mask=real[:, None], other=0.0).to(wide)
            step = _step_size(delta, bias, HAS_BIAS, SOFTPLUS)
            vector_at = ((item * groups + group) * states + n[:, None]) * length + time[None, :]
            enters = unstack4(tl.load(B_ptr + vector_at, mask=(n < states)[:, None], other=0.0).to(wide), N)
            steps = unstack4(step, K * R)
            tokens = unstack4(step * u, K * R)
            for j in tl.static_range(STEPS):
                token = tl.reshape(tokens[j], (K, R))
                state = _advance(state, tl.reshape(steps[j], (K, R)), token, A, enters[j], lower, upper, HAS_CLAMP)
            tl.store(scratch + (i + 1) * (K * N * R), state)
        tl.debug_barrier()  # what one lane has stored another may load

        rate_of_chunk = tl.zeros((K, N, R), wide)
        for i in tl.range(0, blocks, disable_licm=True):
            block = blocks - 1 - i
            time = chunk_begin + block * STEPS + tl.arange(0, STEPS)
            inside = real[:, None] & (time < chunk_end)[None, :]
            at = (item * channels + row[:, None]) * length + time[None, :]
            u = tl.load(u_ptr + at, mask=inside, other=0.0).to(wide)
            delta = tl.load(delta_ptr + at, mask=inside, other=0.0).to(wide)
            step = tl.where(inside, _step_size(delta, bias, HAS_BIAS, SOFTPLUS), 0.0)
            dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(wide)
            reading = dy
            if HAS_Z:
                z = tl.load(z_ptr + at, mask=inside, other=0.0).to(wide)
                reading = dy * (z * _sigmoid(z))
            vector_at = ((item * groups + group) * states + n[:, None]) * length + time[None, :]
            some = (n < states)[:, None] & (time < chunk_end)[None, :]
            enters = unstack4(tl.load(B_ptr + vector_at, mask=some, other=0.0).to(wide), N)
            leaves = unstack4(tl.load(C_ptr + vector_at, mask=some, other=0.0).to(wide), N)
            steps = unstack4(step, K * R)
            tokens = unstack4(step * u, K * R)
            readings = unstack4(reading, K * R)
            # What lies beside the tile's own states may become 0 * inf, and must not get into their sums.
            state = tl.load(scratch + block * (K * N * R), mask=exists, other=0.0)
            trail = (state,)  # unclamped, but for the first
            for j in tl.static_range(STEPS):
                token = tl.reshape(tokens[j], (K, R))
                free = _advance(state, tl.reshape(steps[j], (K, R)), token, A, enters[j], A, A, HAS_CLAMP=False)
                if not FULL:
                    free = tl.where(exists, free, 0.0)
                state = clamped(free, lower, upper) if HAS_CLAMP else free
                trail = trail + (free,)
            ys = ()
            by_tokens = ()
            by_exponents = ()
            by_enters = ()
            by_leaves = ()
            for j in tl.static_range(STEPS - 1, -1, -1):
                before = trail[j]
                after = trail[j + 1]
                read = tl.reshape(readings[j], (K, R))[:, None, :]
                grad = carry + read * leaves[j][None, :, None]
                if HAS_CLAMP:
                    if j > 0:
                        before = clamped(before, lower, upper)
                    bounded = clamped(after, lower, upper)
                    grad = tl.where(bounded == after, grad, 0.0)
                    after = bounded
                if not FULL:
                    grad = tl.where(exists, grad, 0.0)
                size = tl.reshape(steps[j], (K, R))[:, None, :]
                carry = tl.exp(size * A) * grad
                exponent = carry * before
                rate_of_chunk += size * exponent
                by_token = tl.sum(grad * enters[j][None, :, None], 1)
                by_tokens = (tl.reshape(by_token, (K * R,)),) + by_tokens
                by_exponents = (tl.reshape(tl.sum(exponent * A, 1), (K * R,)),) + by_exponents
                token = tl.reshape(tokens[j], (K, R))
                by_enters = (tl.sum(tl.sum(grad * token[:, None, :], 0), 1),) + by_enters
                by_leaves = (tl.sum(tl.sum(read * after, 0), 1),) + by_leaves
                if HAS_Z:
                    y = after * leaves[j][None, :, None]
                    if not FULL:
                        y = tl.where(exists, y, 0.0)
                    ys = (tl.reshape(tl.sum(y, 1), (K * R,)),) + ys
            by_token = stack4(by_tokens[0], by_tokens[1], by_tokens[2], by_tokens[3], K * R)
            by_step = stack4(by_exponents[0], by_exponents[1], by_exponents[2], by_exponents[3], K * R) + u * by_token
            by_u = step * by_token
            if HAS_D:
                by_u += skip[:, None] * reading
            tl.store(du_ptr + at, by_u.to(du_ptr.dtype.element_ty), mask=inside)
            if HAS_Z:
                y = stack4(ys[0], ys[1], ys[2], ys[3], K * R)
                if HAS_D:
                    y += skip[:, None] * u
                sigmoid = _sigmoid(z)
                dz = dy * y * (sigmoid * (1.0 + z * (1.0 - sigmoid)))
                tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
            if SOFTPLUS:
                by_step *= _sigmoid(delta + bias[:, None]) if HAS_BIAS else _sigmoid(delta)
            by_step = tl.where(inside, by_step, 0.0)
            tl.store(ddelta_ptr + at, by_step.to(ddelta_ptr.dtype.element_ty), mask=inside)
            by_bias += by_step
            by_skip += reading * u
            parts = (((item * groups + group) * tiles + tile) * states + n[:, None]) * length + time[None, :]
            tl.store(dB_ptr + parts, stack4(by_enters[0], by_enters[1], by_enters[2], by_enters[3], N), mask=some)
            tl.store(dC_ptr + parts, stack4(by_leaves[0], by_leaves[1], by_leaves[2], by_leaves[3], N), mask=some)
        by_rate += rate_of_chunk
        tl.debug_barrier()  # the next chunk overwrites the scratch memory

    part = (item * segments + segment) * channels
    tl.store(dA_ptr + part * states + by_state, by_rate, mask=exists)
    tl.store(dD_ptr + part + row, tl.sum(by_skip, 1), mask=real)
    tl.store(dbias_ptr + part + row, tl.sum(by_bias, 1), mask=real)
    if segment == 0:
        tl.store(dstart_ptr + item * channels * states + by_state, carry, mask=exists)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Sizes of a scan, its tiles and its segments."""

    batch: int
    channels: int
    length: int
    groups: int
    states: int
    K: int
    N: int
    R: int
    tiles: int
    segments: int
    segment_length: int

    @staticmethod
    def of(u: Tensor, A: Tensor, B: Tensor, tiles: dict[str, dict[int, int]], unit: int, *, cut: bool) -> _Plan:
        """`unit`: segments are a multiple of it."""
        batch, channels, length = u.shape
        groups, states = B.shape[1], A.shape[1]
        tile = tiles[u.device.type][A.element_size()]
        N = triton.next_power_of_2(max(states, 1))
        R = max(1, min(_LANE_CHANNELS, tile // N))
        K = max(1, min(tile // (N * R), triton.next_power_of_2(triton.cdiv(channels // groups, R))))
        count = triton.cdiv(channels // groups, K * R)
        units = triton.cdiv(length, unit)
        segment_length = triton.cdiv(units, segments_of(batch * groups * count, units) if cut else 1) * unit
        segments = triton.cdiv(length, segment_length)
        return _Plan(batch, channels, length, groups, states, K, N, R, count, segments, segment_length)

    @property
    def programs(self) -> int:
        return self.batch * self.segments * self.groups * self.tiles

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.channels, self.length, self.groups, self.states

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
        return {"K": self.K, "N": self.N, "R": self.R, "num_warps": 1} | fusion

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
    return A.clamp(min=torch.finfo(A.dtype).min)


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
    delta_softplus: bool,
    chunk: int,
    y: Tensor,
    last_state: Tensor,
    chunk_states: Tensor,
) -> None:
    if u.numel() == 0:
        last_state.zero_() if initial_state is None else last_state.copy_(initial_state)
        return
    A = _finite(A)
    plan = _Plan.of(u, A, B, _FORWARD_TILE, _SHORTEST_SEGMENT, cut=lower is None)
    start = plan.boundaries(u, delta, A, B, None, delta_bias, initial_state, softplus=delta_softplus, reverse=False)
    selective_scan_fwd_kernel[(plan.programs,)](
        u,
        delta,
        A,
        B,
        C,
        A if D is None else D,
        u if z is None else z,
        A if delta_bias is None else delta_bias,
        A if lower is None else lower,
        A if upper is None else upper,
        A if start is None else start,
        y,
        last_state,
        chunk_states,
        *plan.sizes,
        chunk,
        *plan.cut,
        *((0, 0, 0, 0) if start is None else start.stride()),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=delta_bias is not None,
        HAS_CLAMP=lower is not None,
        HAS_START=start is not None,
        SOFTPLUS=delta_softplus,
        FULL=plan.full,
        **plan.constants,
    )


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
    plan = _Plan.of(u, A, B, _BACKWARD_TILE, chunk, cut=lower is None)
    carry = plan.boundaries(grad_y, delta, A, C, z, delta_bias, grad_last_state, softplus=delta_softplus, reverse=True)
    channel_parts = (plan.batch, plan.segments, plan.channels)
    vector_parts = (plan.batch, plan.groups, plan.tiles, plan.states, plan.length)
    A_parts = A.new_empty((*channel_parts, plan.states))
    B_parts, C_parts = (A.new_empty(vector_parts) for _ in range(2))
    D_parts, bias_parts = (A.new_empty(channel_parts) for _ in range(2))
    kept = triton.cdiv(min(chunk, plan.length), STEPS.value)
    selective_scan_bwd_kernel[(plan.programs,)](
        grad_y,
        u,
        delta,
        A,
        B,
        C,
        A if D is None else D,
        u if z is None else z,
        A if delta_bias is None else delta_bias,
        A if lower is None else lower,
        A if upper is None else upper,
        chunk_states,
        A if carry is None else carry,
        A.new_empty((plan.programs, kept, plan.K, plan.N, plan.R)),
        grad_u,
        grad_delta,
        A_parts,
        B_parts,
        C_parts,
        D_parts,
        grad_z,
        bias_parts,
        grad_initial_state,
        *plan.sizes,
        chunk,
        *plan.cut,
        *((0, 0, 0, 0) if carry is None else carry.stride()),
        HAS_D=D is not None,
        HAS_Z=z is not None,
        HAS_BIAS=delta_bias is not None,
        HAS_CLAMP=lower is not None,
        HAS_CARRY=carry is not None,
        SOFTPLUS=delta_softplus,
        FULL=plan.full,
        **plan.constants,
    )
    grad_A.copy_(A_parts.sum((0, 1)))
    grad_B.copy_(B_parts.sum(2))
    grad_C.copy_(C_parts.sum(2))
    grad_D.copy_(D_parts.sum((0, 1)))
    grad_delta_bias.copy_(bias_parts.sum((0, 1)))
