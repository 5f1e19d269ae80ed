"""The convolution of a Mamba-2 block at the size of the detector's node stream, in both layouts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.cases import Case

_BATCH, _CHANNELS, _LENGTH, _TAPS = 76, 160, 960, 4


def _inputs(channels_last: bool) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(5)
        x = torch.randn(_BATCH, _LENGTH, _CHANNELS, generator=g).mT
        weight, bias = torch.randn(_CHANNELS, _TAPS, generator=g), torch.randn(_CHANNELS, generator=g)
        return tuple(t.to(device) for t in (x if channels_last else x.contiguous(), weight, bias))

    return make


def _conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=_TAPS - 1, groups=x.shape[1])
    return torch.nn.functional.silu(y[..., : x.shape[2]])


def _image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As a channels-last image of height 1: torch's fastest way on a CPU."""
    image = torch.nn.functional.pad(x.mT, (0, 0, _TAPS - 1, 0)).mT.unsqueeze(2)
    y = torch.nn.functional.conv2d(image, weight[:, None, None], bias, groups=x.shape[1])
    return torch.nn.functional.silu(y.squeeze(2))


def _case(channels_last: bool, baseline_name: str, baseline: Callable[..., Tensor]) -> Case:
    elements = float(_BATCH * _CHANNELS * _LENGTH)
    layout = "(b,l,d) turned" if channels_last else "(b,d,l)"
    return Case(
        "causal_conv1d", f"{_BATCH}x{_CHANNELS}x{_LENGTH} k={_TAPS} {layout}", _inputs(channels_last),
        functools.partial(stablekern.causal_conv1d, activation="silu"), baseline_name, baseline,
        # Backward: x and the gradient in, one gradient out; the convolution three times.
        2 * _TAPS * elements, 8 * elements, 5 / 2, {},
    )  # fmt: skip


CASES = (
    _case(True, "torch conv2d of a channels-last image, silu", _image),
    _case(True, "torch conv1d(groups=d), silu", _conv1d),
    _case(False, "torch conv1d(groups=d), silu", _conv1d),
)
