r"""The temporal ends of the detector: electrodes to features at 1/16 of the rate, and back to samples.

**Encoder.** Layer $i$ is a weight-normed convolution of width 7 with taps $2^i$ input samples apart, GELU and dropout.
The first four halve the rate; from the fifth on, at 16 frames per second for 256 Hz, each is added to its input where
the widths agree, and the sum scaled by $\sqrt{1/2}$, which keeps its variance:

(b, 19, L) -> (b, c_0, L/2) -> (b, c_1, L/4) -> (b, c_2, L/8) -> (b, c_3, L/16) -> ... -> (b, c_last, L/16).

Both sides are padded alike, and frame t is centred on sample 16 t; a causal encoder is padded at the start only, and
frame t, like every layer's step, depends on nothing after its own last sample, 16 t + 15.

Departures from the encoder that this shape comes from (8 layers, 64 to 512 channels, 7.4 M parameters):

- It ran all eight layers at the full rate, 105 GFLOP a minute of EEG, and only then took every 16th frame by a further
  convolution. Here a tap spacing of $2^i$ samples is reached by halving the rate four times and dilating after that:
  the same receptive field of 1531 samples, 17 GFLOP, no separate down-sampling layer, no pair of linear 1x1
  convolutions in a row.
- Its channels fell back from 512 to 64 half-way; here they stay, and the deep layers are residual.
- Its initial weights were written over the result of the weight norm, which recomputed the old ones at the first
  forward, and its last layers were scaled until the features hardly depended on the input (standard deviation 1.7e-5
  over time). Here the initial weights go through the parametrization, with the gain that keeps the variance (He), and
  biases start at 0.
- It clamped its input and replaced NaN in it, unconditionally. Here data stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from stablekern import _check
from stablekern.errors import message
from stablekern.nn.stream import Memory, carried

__all__ = ["DOWNSAMPLING", "ProjectionHead", "TCNEncoder"]

_HALVINGS = 4
DOWNSAMPLING = 2**_HALVINGS


def _he(conv: nn.Conv1d) -> nn.Conv1d:
    """He's initial weights, normal of variance 2 / fan-in, and zero biases; a weight norm put on later keeps them."""
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class TCNEncoder(nn.Module):
    r"""Electrodes to features, (b, in_channels, L) -> (b, channels[-1], L / 16), L a multiple of 16.

    **Arguments:** `in_channels`; `channels`, the width after each layer, four or more; `kernel_size`, odd; `dropout` in
    [0, 1]; `causal`. `forward(x, memory)`: a causal encoder with a memory goes on after what that has seen.

    **Raises:** `ValueError` for sizes outside these rules and for inputs of another shape.
    """

    def __init__(
        self,
        in_channels: int = 19,
        channels: Sequence[int] = (64, 128, 256, 512, 512, 512, 512, 512),
        kernel_size: int = 7,
        dropout: float = 0.15,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels = _check.integer("nn.TCNEncoder", "in_channels", in_channels, low=1)
        if len(channels) < _HALVINGS:
            raise ValueError(
                message("nn.TCNEncoder", f"`channels` must have {_HALVINGS} entries or more", tuple(channels))
            )
        if _check.integer("nn.TCNEncoder", "kernel_size", kernel_size, low=1) % 2 == 0:
            raise ValueError(message("nn.TCNEncoder", "`kernel_size` must be odd", kernel_size))
        _check.number("nn.TCNEncoder", "dropout", dropout, low=0.0, high=1.0)
        self.causal = causal
        self.layers = nn.ModuleList()
        for i, (width_in, width) in enumerate(zip((in_channels, *channels[:-1]), channels, strict=True)):
            stride, dilation = (2, 1) if i < _HALVINGS else (1, 2 ** (i - _HALVINGS))
            padding = 0 if causal else dilation * (kernel_size // 2)
            conv = nn.Conv1d(width_in, width, kernel_size, stride=stride, padding=padding, dilation=dilation)
            self.layers.append(weight_norm(_he(conv)))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, memory: Memory | None = None
    ) -> Tensor:  # (b, in_channels, L) -> (b, channels[-1], L/16)
        length = _check.shapes("nn.TCNEncoder", x=(x, f"b {self.in_channels} l"))["l"]
        if length % DOWNSAMPLING or not length:
            raise ValueError(
                message("nn.TCNEncoder", f"the length of `x` must be a positive multiple of {DOWNSAMPLING}", length)
            )
        for layer in self.layers:
            new = self.dropout(nn.functional.gelu(layer(self._padded(layer, x, memory))))
            x = (x + new) * math.sqrt(0.5) if new.shape == x.shape else new
        return x

    def _padded(self, layer: Any, x: Tensor, memory: Memory | None) -> Tensor:
        if not self.causal:
            return x
        left = layer.dilation[0] * (layer.kernel_size[0] - 1) - (layer.stride[0] - 1)
        return carried(memory, layer, x, left)


class ProjectionHead(nn.Module):
    r"""Features back to samples, (b, in_channels, T) -> (b, out_channels, 16 T).

    A 1x1 convolution, linear interpolation between the frames, GELU. The head that this comes from repeated each frame
    16 times, a staircase of 62.5 ms, and led straight into a second linear 1x1 convolution, which made the two of them
    one. Interpolation and the non-linearity in between remove both.

    A causal head interpolates between the frame before and its own, and reaches that at the last of its 16 samples.

    **Arguments:** `in_channels`, `out_channels`, `causal`. **Raises:** `ValueError` for inputs of another width.
    """

    def __init__(self, in_channels: int, out_channels: int = 19, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.in_channels = _check.integer("nn.ProjectionHead", "in_channels", in_channels, low=1)
        self.proj = nn.Conv1d(in_channels, _check.integer("nn.ProjectionHead", "out_channels", out_channels, low=1), 1)

    def forward(
        self, x: Tensor, memory: Memory | None = None
    ) -> Tensor:  # (b, in_channels, T) -> (b, out_channels, 16 T)
        _check.shapes("nn.ProjectionHead", x=(x, f"b {self.in_channels} t"))
        if self.causal:
            frames = carried(memory, self, self.proj(x), 1, hold=True)
            share = torch.arange(1, DOWNSAMPLING + 1, dtype=frames.dtype, device=frames.device) / DOWNSAMPLING
            samples = torch.lerp(frames[..., :-1, None], frames[..., 1:, None], share).flatten(-2)
            return nn.functional.gelu(samples)
        samples = nn.functional.interpolate(self.proj(x), scale_factor=DOWNSAMPLING, mode="linear", align_corners=False)
        return nn.functional.gelu(samples)
