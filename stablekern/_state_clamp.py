"""The argument `state_clamp` of the scans: what it may be, and the two tensors of bounds that it stands for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stablekern import _check
from stablekern.errors import message

Bound = float | Tensor
StateClamp = Bound | Sequence[Bound] | None


def pair(op: str, state_clamp: Bound | Sequence[Bound]) -> tuple[Bound, Bound]:
    """(lo, hi) of either form: `c` stands for (-c, c)."""
    if isinstance(state_clamp, (tuple, list)):
        if len(state_clamp) != 2:
            raise ValueError(message(op, "`state_clamp` must be c or (lo, hi)", f"{len(state_clamp)} values"))
        for bound in state_clamp:
            if isinstance(bound, Tensor):
                _check.dtypes(op, _check.HALF + _check.REAL, state_clamp=bound)
        return state_clamp[0], state_clamp[1]
    if isinstance(state_clamp, bool) or not isinstance(state_clamp, (int, float, Tensor)):
        rule = "`state_clamp` must be a number, a tensor or a pair of them"
        raise TypeError(message(op, rule, type(state_clamp).__name__))
    if isinstance(state_clamp, Tensor):
        _check.dtypes(op, _check.HALF + _check.REAL, state_clamp=state_clamp)
    return -state_clamp, state_clamp


def radius(op: str, state_clamp: StateClamp, like: Tensor, **sizes: int) -> tuple[None, Tensor | None]:
    """The clamp of complex states, as `bounds` gives that of real ones: no lower bound, and the largest modulus."""
    if isinstance(state_clamp, (tuple, list)):
        raise ValueError(message(op, "`state_clamp` of complex states is one bound on the modulus", "a pair"))
    return None, bounds(op, state_clamp, like, **sizes)[1]


def bounds(op: str, state_clamp: StateClamp, like: Tensor, **sizes: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Lower and upper bound with the dtype and device of `like`, expanded to the named `sizes`, outermost first.

    A bound may be a number, or a tensor over the first few of these axes; any of its axes may have size 1.
    """
    if state_clamp is None:
        return None, None
    names, full = tuple(sizes), tuple(sizes.values())
    both = []
    low, high = pair(op, state_clamp)
    for bound in (low, high):
        if isinstance(bound, Tensor):
            if bound.requires_grad:
                raise ValueError(message(op, "`state_clamp` is not differentiable, detach it", "requires_grad=True"))
            shape = tuple(bound.shape)
            if len(shape) > len(full) or any(n not in (1, size) for n, size in zip(shape, full, strict=False)):
                forms = ", ".join(f"({' '.join(names[:i])})" for i in range(len(names) + 1))
                rule = f"a tensor in `state_clamp` must have one of the shapes {forms}"
                raise ValueError(message(op, rule, shape))
            if bound.is_meta and not like.is_meta:
                raise ValueError(message(op, "a tensor in `state_clamp` must hold values", "a meta tensor"))
            bound = bound.to(device=like.device, dtype=like.dtype)
            both.append(bound.reshape(shape + (1,) * (len(full) - len(shape))).expand(full))
        else:
            # What is beyond the dtype is infinite there, and clamps nothing.
            value = _check.number(op, "state_clamp", bound)
            fits = abs(value) <= torch.finfo(like.dtype).max
            both.append(like.new_full(full, value if fits else math.copysign(math.inf, value)))
    lower, upper = both
    rule = "`state_clamp` must have lo <= hi"
    if not isinstance(low, Tensor) and not isinstance(high, Tensor):  # spares two passes, longer than a short scan
        if low > high:
            raise ValueError(message(op, rule, f"lo up to {low:g}", f"hi from {high:g}"))
    elif _check.readable(lower, upper) and not bool((lower <= upper).all()):
        raise ValueError(message(op, rule, f"lo up to {lower.max():g}", f"hi from {upper.min():g}"))
    return lower, upper


def changed(free: Tensor, lower: Tensor | None, upper: Tensor) -> Tensor:
    """Where a clamp changes `free`, the states before it; `upper` alone is a modulus."""
    return free.abs() > upper if lower is None else (free < lower) | (free > upper)


def clamped(free: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
    """The states after a clamp; `upper` alone is a modulus, and without it there is no clamp."""
    if upper is None:
        return free
    if lower is not None:
        return torch.clamp(free, lower, upper)
    modulus = free.abs()
    outside = modulus > upper
    # The unit vector first: it cannot overflow.
    return torch.where(outside, free / torch.where(outside, modulus, 1.0) * upper, free)


def through_clamp(grad: Tensor, free: Tensor, lower: Tensor | None, upper: Tensor | None) -> Tensor:
    """The gradient before the clamp, of what came out as `clamped(free)`."""
    if upper is None:
        return grad
    if lower is not None:
        return torch.where((free >= lower) & (free <= upper), grad, 0.0)
    modulus = free.abs()
    outside = modulus > upper
    modulus = torch.where(outside, modulus, 1.0)
    unit = free / modulus
    along = unit.real * grad.real + unit.imag * grad.imag
    return torch.where(outside, (upper / modulus) * (grad - unit * along), grad)
