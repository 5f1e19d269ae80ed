"""Counts and ranges of ten million numbers, as a check after each step looks at them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.cases import Case

_NUMBERS = 10**7


def _tensors(count: int) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        return tuple(torch.randn(_NUMBERS // count, device=device) for _ in range(count))

    return make


def _ours(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(stablekern.finite_stats(tensors))


def _loop(*tensors: Tensor) -> Tensor:
    rows = []
    for x in tensors:
        finite = torch.isfinite(x)
        clean = torch.where(finite, x, 0.0)
        rows.append(torch.stack((torch.isnan(x).sum(), torch.isinf(x).sum(), clean.amin(), clean.amax(), clean.mean())))
    return torch.stack(rows)


def _case(count: int) -> Case:
    # Each number is read once; five operations for it.
    return Case(
        "finite_stats", f"1e7 in {count}", _tensors(count), _ours, "isnan, isinf, amin, amax, mean for each tensor",
        _loop, _NUMBERS * 5.0, 4.0 * _NUMBERS, 1.0, {}, directions=("fwd",),
    )  # fmt: skip


CASES = (_case(1), _case(1000))
