r"""Counts of NaN and infinity, and the range of what is finite, for a list of tensors, without leaving the device.

Each tensor gives one entry of every field. For a complex tensor an entry is NaN if either part is, else infinite if
either part is, and the range is that of the modulus (inf beyond the largest float64). The values are float64 whatever
the input: sums of float32 and half-precision entries then neither overflow nor lose digits, and every such value is
represented exactly.

No derivative, so no backward; the native kernel takes all tensors in one pass, as a table of addresses.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stablekern import _check
from stablekern._load import native
from stablekern._registry import define, launcher

__all__ = ["FiniteStats", "finite_stats"]


class FiniteStats(NamedTuple):
    """One entry per tensor, on their device. `min`, `max` and `mean` of the finite entries, NaN if there are none."""

    nan: Tensor  # (K,) int64
    inf: Tensor  # (K,) int64
    min: Tensor  # (K,) float64
    max: Tensor  # (K,) float64
    mean: Tensor  # (K,) float64
    count: Tensor  # type: ignore[assignment] # (K,) int64, all entries; hides tuple.count


def _reference_of_one(x: Tensor) -> tuple[float, ...]:
    values = [complex(v) for v in x.flatten().tolist()]
    nan = sum(math.isnan(v.real) or math.isnan(v.imag) for v in values)
    finite = [
        math.hypot(v.real, v.imag) if x.is_complex() else v.real
        for v in values
        if math.isfinite(v.real) and math.isfinite(v.imag)
    ]
    span = (min(finite), max(finite), math.fsum(finite) / len(finite)) if finite else (math.nan,) * 3
    return nan, len(values) - nan - len(finite), *span, len(values)


def reference(tensors: Sequence[Tensor]) -> FiniteStats:
    """The definition, number by number in Python."""
    columns = zip(*map(_reference_of_one, tensors), strict=True) if tensors else [()] * len(FiniteStats._fields)
    whole = {"nan", "inf", "count"}
    return FiniteStats(
        *(
            torch.tensor(column, dtype=torch.int64 if name in whole else torch.float64)
            for name, column in zip(FiniteStats._fields, columns, strict=True)
        )
    )


def _outputs(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    wide = (torch.int64, torch.int64, torch.float64, torch.float64, torch.float64, torch.int64)
    return tuple(torch.empty(len(tensors), dtype=dtype, device=tensors[0].device) for dtype in wide)


# Counts of NaN and infinity; minimum, maximum (inf and -inf without any) and sum of what is finite; count of all.
_op = define("finite_stats_fwd(Tensor[] tensors) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_outputs)

# How "csrc/include/stablekern/spans.h" numbers them.
_SPAN_TYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.complex64: 4,
    torch.complex128: 5,
    torch.bool: 6,
    torch.uint8: 7,
    torch.int8: 8,
    torch.int16: 9,
    torch.int32: 10,
    torch.int64: 11,
}


def _unknown(tensors: list[Tensor]) -> str | None:
    unknown = {x.dtype for x in tensors} - _SPAN_TYPES.keys()
    return f"dtype {unknown}" if unknown else None


@launcher("finite_stats_fwd", device="cpu", backend="native", supports=_unknown)
def _(tensors):
    outputs = _outputs(tensors)
    dense = [x.contiguous() for x in tensors]  # alive until the kernel has read them
    rows = [(x.data_ptr(), x.numel(), _SPAN_TYPES[x.dtype]) for x in dense]
    native().finite_stats(torch.tensor(rows, dtype=torch.int64), *outputs)
    return outputs


@launcher("finite_stats_fwd", device="cuda", backend="triton", supports=_unknown)
@launcher("finite_stats_fwd", device="cpu", backend="triton", supports=_unknown)
def _(tensors):
    from stablekern.triton_kernels.finite_stats import finite_stats as launch

    outputs = _outputs(tensors)
    launch([x.contiguous() for x in tensors], *outputs)
    return outputs


def _of_one(x: Tensor) -> tuple[Tensor, ...]:
    if x.is_complex():
        values = x.to(torch.complex128).abs()
    elif x.dtype in _check.REAL + _check.HALF:
        values = x
    else:
        x = values = x.to(torch.float64)
    nan, finite = torch.isnan(x).sum(), torch.isfinite(x)
    number = finite.sum()
    count = torch.full_like(number, x.numel())
    if x.numel():
        low = torch.where(finite, values, torch.inf).amin().to(torch.float64)
        high = torch.where(finite, values, -torch.inf).amax().to(torch.float64)
        total = torch.where(finite, values, 0).sum(dtype=torch.float64)
    else:
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        low, high = total + torch.inf, total - torch.inf
    return nan, count - number - nan, low, high, total, count


@launcher("finite_stats_fwd", device="cuda", backend="torch")
@launcher("finite_stats_fwd", device="cpu", backend="torch")
def _(tensors):
    return tuple(torch.stack(column) for column in zip(*map(_of_one, tensors), strict=True))


@torch.no_grad()
def finite_stats(tensors: Sequence[Tensor]) -> FiniteStats:
    """Per tensor: how many NaN, how many infinities, and minimum, maximum, mean of the rest. No host synchronisation.

    **Arguments:**

    - `tensors`: K tensors on one device, of any shapes (empty ones too) and dtypes: floating, integer, bool or complex.

    **Returns:** `FiniteStats(nan, inf, min, max, mean, count)`, each (K,) on that device: int64 counts, float64 values.
    `min`, `max` and `mean` are those of the finite entries (of their modulus, if complex), NaN where there are none;
    `mean` is summed in float64. `count` is the number of entries, so `count - nan - inf` are finite. For an empty
    sequence the fields are empty, on the CPU. Not differentiable.

    **Raises:** `TypeError` for something else than tensors, `ValueError` for tensors on several devices.
    """
    if isinstance(tensors, Tensor) or not isinstance(tensors, Iterable):
        rule = "`tensors` must be a sequence of tensors"
        raise TypeError(_check.message("finite_stats", rule, type(tensors).__name__))
    tensors = list(tensors)
    for index, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(_check.message("finite_stats", f"`tensors[{index}]` must be a tensor", type(x).__name__))
        if x.device != tensors[0].device:
            rule = f"`tensors[{index}]` and `tensors[0]` must be on one device"
            raise ValueError(_check.message("finite_stats", rule, x.device, tensors[0].device))
    if not tensors:
        whole, real = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
        return FiniteStats(whole, whole.clone(), real, real.clone(), real.clone(), whole.clone())
    nan, inf, low, high, total, count = _op(tensors)
    number = count - nan - inf
    low, high, mean = (torch.where(number > 0, value, torch.nan) for value in (low, high, total / number))
    return FiniteStats(nan, inf, low, high, mean, count)
