"""The norms of the detector's two Mamba stacks, both directions side by side."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from stablekern.ops import gated_rms_norm as spine


def _inputs(rows: int, width: int) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        return *torch.randn(2, rows, width, device=device).unbind(), torch.ones(width, device=device)

    return make


def _case(rows: int, width: int) -> Case:
    return Case(
        "gated_rms_norm", f"({rows},{width}) in 2 parts", _inputs(rows, width),
        functools.partial(stablekern.gated_rms_norm, groups=2), "silu, square, mean, rsqrt chain",
        functools.partial(spine.reference, groups=2),
        # The least: two rows in and one out; backward three in and two out.
        20.0 * rows * width, 12.0 * rows * width, 8 / 3, {},
    )  # fmt: skip


CASES = (_case(171 * 960, 64), _case(19 * 960, 256))
