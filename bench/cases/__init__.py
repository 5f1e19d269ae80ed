"""The workloads: sizes of real models, the baseline named exactly, the flops and bytes that must be spent.

A module per op, named like it, with its `CASES`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case", "Stepping", "all_cases"]


def normal_cotangents(outputs: list[Tensor]) -> list[Tensor]:
    """Normal numbers; but 1 for a loss, which is the end of its graph."""
    return [torch.randn_like(o) if o.dim() else torch.ones_like(o) for o in outputs]


@dataclass(frozen=True)
class Case:
    """`ours` and `baseline` take what `inputs(device)` makes; all but `constant` get gradients in `fwd+bwd`.

    `flops` and `bytes` are the least that the forward must spend; `backward` scales both for forward and backward.
    `gates` are the ratios (direction -> factor) below which a line is a regression.
    """

    op: str
    name: str
    inputs: Callable[[str], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    baseline_name: str
    baseline: Callable[..., Any]
    flops: float
    bytes: float
    backward: float
    gates: dict[str, float]
    constant: tuple[int, ...] = ()  # inputs that get no gradient
    directions: tuple[str, ...] = ("fwd", "fwd+bwd")  # ("step",) for what changes its inputs and has no gradient
    cotangents: Callable[[list[Tensor]], list[Tensor]] = normal_cotangents  # of the outputs; made once, not timed
    facts: Callable[..., dict[str, Any]] | None = None  # of the inputs: what stands beside the times, errors for one


class Stepping:
    """A call with state: `make(*inputs)` gives, once, what every call then runs."""

    def __init__(self, make: Callable[..., Callable[[], Any]]) -> None:
        self._make, self._step = make, None

    def __call__(self, *inputs: Tensor) -> Any:
        if self._step is None:
            self._step = self._make(*inputs)
        return self._step()


def all_cases() -> tuple[Case, ...]:
    """The cases of every module here, in the order of their names."""
    modules = (importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__))
    return tuple(case for module in modules for case in getattr(module, "CASES", ()))
