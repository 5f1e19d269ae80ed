"""The causal depthwise convolution and its adjoint; the mathematics is in stablekern/ops/causal_conv1d.py.

Memory bound: 8 bytes a result forward, 12 backward, in float32. A program has a tile of channels x steps and loads it
once for every tap, shifted; all but the first of these loads come from the cache. Backward, the tile's own gradient
takes k values of G, each of which takes k values of x: 2 k - 1 different shifts, which stay in registers. Every program
writes its own part of the sums over time, and the parts are added in a fixed order.

The last channels may run the other way than the first ones: their taps come in reverse order, and the first of them
stands at the result itself instead of k - 1 steps before it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Channels x steps of a tile, by what lies side by side in memory: the channels of a step, or the steps of a channel.
_TILES = {"cuda": ((64, 8), (4, 128)), "cpu": ((64, 64), (8, 512))}

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def _place(channels, length, reverse_channels, WIDTH: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr):
    """item, part of its steps, channels, steps, and how far before the result the first tap of a channel stands."""
    blocks_c = tl.cdiv(channels, BLOCK_C)
    blocks_t = tl.cdiv(length, BLOCK_T)
    program = tl.program_id(0)
    channel = (program % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= blocks_c
    step = (program % blocks_t) * BLOCK_T + tl.arange(0, BLOCK_T)
    item = (program // blocks_t).to(tl.int64)
    reach = tl.where(channel < channels - reverse_channels, WIDTH - 1, 0)
    return item, item * blocks_t + program % blocks_t, channel, step, reach


@triton.jit
def _load(ptr, item, channel, step, channels, length, stride_item, stride_channel, stride_step):
    """Steps (BLOCK_C, BLOCK_T) of channels (BLOCK_C), 0 beyond the ends of the sequence."""
    at = item * stride_item + channel[:, None].to(tl.int64) * stride_channel + step.to(tl.int64) * stride_step
    inside = (channel < channels)[:, None] & (step >= 0) & (step < length)
    return tl.load(ptr + at, mask=inside, other=0.0)


@triton.jit
def _store(ptr, value, item, channel, step, channels, length, stride_item, stride_channel, stride_step):
    at = item * stride_item + channel[:, None].to(tl.int64) * stride_channel + step[None, :].to(tl.int64) * stride_step
    tl.store(ptr + at, value, mask=(channel < channels)[:, None] & (step < length)[None, :])


@triton.jit
def causal_conv1d_fwd_kernel(
    x_ptr,
    taps_ptr,  # (k, channel), in the order in which they meet the sequence
    bias_ptr,
    y_ptr,
    channels,
    length,
    reverse_channels,
    x_item,
    x_channel,
    x_step,
    y_item,
    y_channel,
    y_step,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    item, _, channel, step, reach = _place(channels, length, reverse_channels, WIDTH, BLOCK_C, BLOCK_T)
    real = channel < channels
    v = tl.zeros((BLOCK_C, BLOCK_T), x_ptr.dtype.element_ty)
    if HAS_BIAS:
        v += tl.load(bias_ptr + channel, mask=real, other=0.0)[:, None]
    for j in tl.static_range(WIDTH):
        x = _load(x_ptr, item, channel, step[None, :] - reach[:, None] + j, channels, length, x_item, x_channel, x_step)
        v += tl.load(taps_ptr + j * channels + channel, mask=real, other=0.0)[:, None] * x
    if SILU:
        v = v / (1.0 + tl.exp(-v))
    _store(y_ptr, v, item, channel, step, channels, length, y_item, y_channel, y_step)


@triton.jit
def causal_conv1d_bwd_kernel(
    dy_ptr,
    x_ptr,
    taps_ptr,
    bias_ptr,
    dx_ptr,
    sums_ptr,  # (item and part of its steps, k + 1, channel): of the taps, then of the bias
    channels,
    length,
    reverse_channels,
    dy_item,
    dy_channel,
    dy_step,
    x_item,
    x_channel,
    x_step,
    dx_item,
    dx_channel,
    dx_step,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    item, part, channel, step, reach = _place(channels, length, reverse_channels, WIDTH, BLOCK_C, BLOCK_T)
    real = channel < channels
    bias = tl.load(bias_ptr + channel, mask=real, other=0.0)[:, None] if HAS_BIAS else 0.0
    taps = ()
    for j in tl.static_range(WIDTH):
        taps = taps + (tl.load(taps_ptr + j * channels + channel, mask=real, other=0.0)[:, None],)
    window = ()  # x from k - 1 steps before to k - 1 steps after
    for shift in tl.static_range(1 - WIDTH, WIDTH):
        window = window + (
            _load(x_ptr, item, channel, step[None, :] + shift, channels, length, x_item, x_channel, x_step),
        )
    dx = tl.zeros((BLOCK_C, BLOCK_T), x_ptr.dtype.element_ty)
    own = tl.zeros((BLOCK_C, BLOCK_T), x_ptr.dtype.element_ty)
    sums = sums_ptr + part * (WIDTH + 1) * channels + channel
    for j in tl.static_range(WIDTH):
        # The result in which tap j meets this step.
        time = step[None, :] + reach[:, None] - j
        grad = _load(dy_ptr, item, channel, time, channels, length, dy_item, dy_channel, dy_step)
        if SILU:
            v = tl.zeros((BLOCK_C, BLOCK_T), x_ptr.dtype.element_ty) + bias
            for i in tl.static_range(WIDTH):
                v += taps[i] * window[WIDTH - 1 + i - j]
            sigmoid = 1.0 / (1.0 + tl.exp(-v))
            # Beyond the ends there is no result, whatever v is.
            slope = tl.where((time >= 0) & (time < length), sigmoid * (1.0 + v * (1.0 - sigmoid)), 0.0)
            grad *= slope
        dx += taps[j] * grad
        tl.store(sums + j * channels, tl.sum(grad * window[WIDTH - 1], 1), mask=real)
        own = tl.where(reach[:, None] == j, grad, own)
    own = tl.where((step < length)[None, :], own, 0.0)
    tl.store(sums + WIDTH * channels, tl.sum(own, 1), mask=real)
    _store(dx_ptr, dx, item, channel, step, channels, length, dx_item, dx_channel, dx_step)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _tile(x: Tensor) -> tuple[int, int]:
    channels_dense, steps_dense = _TILES[x.device.type]
    return channels_dense if x.stride(1) == 1 else steps_dense


def causal_conv1d_fwd(
    x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, reverse_channels: int, y: Tensor
) -> None:
    batch, channels, length = x.shape
    if x.numel() == 0:
        return
    BLOCK_C, BLOCK_T = _tile(x)
    causal_conv1d_fwd_kernel[(batch * triton.cdiv(channels, BLOCK_C) * triton.cdiv(length, BLOCK_T),)](
        x,
        taps,
        taps if bias is None else bias,
        y,
        channels,
        length,
        reverse_channels,
        *x.stride(),
        *y.stride(),
        HAS_BIAS=bias is not None,
        SILU=silu,
        WIDTH=taps.shape[0],
        BLOCK_C=BLOCK_C,
        BLOCK_T=BLOCK_T,
        enable_fp_fusion=True,
    )


def causal_conv1d_bwd(
    grad: Tensor,
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    silu: bool,
    reverse_channels: int,
    grad_x: Tensor,
    grad_taps: Tensor,
    grad_bias: Tensor,
) -> None:
    batch, channels, length = x.shape
    if x.numel() == 0:
        grad_taps.zero_()
        grad_bias.zero_()
        return
    BLOCK_C, BLOCK_T = _tile(x)
    width, blocks = taps.shape[0], triton.cdiv(length, BLOCK_T)
    sums = x.new_empty((batch * blocks, width + 1, channels))
    causal_conv1d_bwd_kernel[(batch * triton.cdiv(channels, BLOCK_C) * blocks,)](
        grad,
        x,
        taps,
        taps if bias is None else bias,
        grad_x,
        sums,
        channels,
        length,
        reverse_channels,
        *grad.stride(),
        *x.stride(),
        *grad_x.stride(),
        HAS_BIAS=bias is not None,
        SILU=silu,
        WIDTH=width,
        BLOCK_C=BLOCK_C,
        BLOCK_T=BLOCK_T,
        enable_fp_fusion=True,
    )
    total = sums.sum(0)
    grad_taps.copy_(total[:width])
    grad_bias.copy_(total[width])
