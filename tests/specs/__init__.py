"""One `OpSpec` per op. The suite (`tests/test_ops.py`) and the benches (`bench/`) are driven by these tables alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Sample:
    """One named call. Floating tensors are float64 (complex128) and are cast to the dtype under test."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    gradcheck: bool = False  # small, and smooth at this point
    gradients: bool = True  # False where the op has none there (an eigenvector of a repeated eigenvalue)
    dtypes: tuple[torch.dtype, ...] | None = None  # None: those of the spec


@dataclass(frozen=True)
class OpSpec:
    """What the suite needs to know of one op.

    `reference` takes the same arguments as `op` and shares no code with it. `view` maps (outputs, sample) to the
    tensors that are compared: the identity, or a function that removes what the op leaves open (an eigenvector's sign).
    `slack` is k in err_op <= k * err_reference + floor_ulps * eps * max|exact|; another k than 2 needs `slack_reason`.
    """

    name: str
    op: Callable[..., Any]
    reference: Callable[..., Any]
    samples: Callable[[torch.Generator], list[Sample]]
    errors: tuple[tuple[Callable[[], Any], type[Exception], str], ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    view: Callable[[Any, Sample], tuple[Tensor, ...]] = lambda outputs, sample: (
        (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    )
    slack: float = 2.0
    slack_reason: str = ""
    floor_ulps: float = 8.0
    differentiable: bool = True
    dispatched: bool = True  # False: differentiable torch code around other ops, without a dispatcher op of its own
    deterministic: bool = True
    # Names of the samples for Triton's interpreter, which takes 0.1 ms for each operation on a block; None: all. With a
    # list gradcheck is left to the other backends: the interpreted gradients are compared with the exact ones anyway.
    interpreted: tuple[str, ...] | None = None


def all_specs() -> tuple[OpSpec, ...]:
    """Every spec module of this folder, in alphabetical order."""
    import importlib
    import pkgutil

    found = (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
    return tuple(spec for module in found for spec in module.SPECS)
