r"""One step of ComplexAdamW over a list of parameters on one device, as an op: the arithmetic behind the optimizer.

The equations are those of `stablekern.optim.complex_adamw`. A *unit* is what has one second moment per element, by its
`kind`:

| kind | members | normals of element k of the whole parameter |
| --- | --- | --- |
| `REAL` | a real tensor | k |
| `COMPLEX` | a complex tensor whose parts share v | 2k for re, 2k + 1 for im |
| `PAIR` | two real tensors, re and im, that share v | 2k for re, 2k + 1 for im |
| `FIRST`, `SECOND` | re or im of a pair, each with a v of its own | 2k, 2k + 1 |

A complex parameter that is not coupled is `REAL` with its parts as a last dimension of 2.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stablekern import _check, _load
from stablekern._registry import backend_for, define, is_watched, launcher
from stablekern.optim.philox import normal

__all__ = ["COMPLEX", "FIRST", "PAIR", "REAL", "SECOND", "adamw_step", "gathered", "normals_per_element", "step_rows"]

REAL, COMPLEX, PAIR, FIRST, SECOND = range(5)
_LISTS = 11  # arguments of the op before the scalars
_NATIVE_DTYPES = frozenset((*_check.REAL, *_check.COMPLEX))

# `values`, `grads`, `exp_avgs`, `steps` and `rounded` have one entry per member; `rounded`, the half-precision
# parameters behind float32 `values`, only for those whose gradient is in half precision. `squares`, `largest` (empty
# without amsgrad), `kinds`, `parameters` (stream ids) and `offsets` (of the first element within the whole parameter)
# have one per unit, and so has `normals`, unless it is empty: an entry with elements is used in place of the stream.
# Where `found_inf` is not 0, nothing changes.
adamw_step = define(
    "complex_adamw(Tensor(a!)[] values, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] squares,"
    " Tensor(d!)[] largest, Tensor(e!)[] steps, Tensor(f!)[] rounded, Tensor[] normals, int[] kinds, int[] parameters,"
    " int[] offsets, Tensor lr, Tensor? temperature, Tensor? found_inf, Tensor? grad_scale, float beta1, float beta2,"
    " float eps, float weight_decay, float noise_eps, float max_noise_gain, bool maximize, int seed_low, int seed_high)"
    " -> ()",
    fake=lambda *arguments: None,
)


def normals_per_element(kind: int) -> int:
    return 1 if kind == REAL else 2


def _needs_dense(values, grads, exp_avgs, squares, largest, steps, rounded, normals=(), *_) -> str | None:
    for tensors in (values, grads, exp_avgs, squares, largest, rounded, normals):
        if not all(map(Tensor.is_contiguous, tensors)):
            return "a tensor is not contiguous"
    if not {tensor.dtype for tensor in values} <= _NATIVE_DTYPES:
        return "a dtype other than float32, float64, complex64, complex128"
    return None


# ---- on a CPU: a table of addresses, whose rows "csrc/include/stablekern/adamw_rows.h" declares ----------------------

_ROW_NUMBERS = 19


def _table(
    values, grads, exp_avgs, squares, largest, steps, rounded, normals, kinds, parameters, offsets
) -> Tensor:  # (units, numbers of a row)
    """The rows of what the op is given; the tensors must outlive its use."""
    of_value, of_grad = ([_load.NUMBER_TYPES[tensor.dtype] for tensor in tensors] for tensors in (values, grads))
    members = [list(map(Tensor.data_ptr, tensors)) for tensors in (values, grads, exp_avgs, steps)]
    halves = map(Tensor.data_ptr, rounded)
    members.append([next(halves) if grad.dtype in _check.HALF else 0 for grad in grads])
    sizes = map(Tensor.numel, squares)
    units = [list(map(Tensor.data_ptr, tensors)) or [0] * len(kinds) for tensors in (squares, largest, normals)]
    numbers = array("q")  # torch.tensor takes ten times as long for a list
    at = 0
    for kind, size, offset, parameter, *own in zip(kinds, sizes, offsets, parameters, *units, strict=True):
        numbers.extend((kind, size, offset, parameter, of_value[at], of_grad[at]))
        end = at + 2 if kind == PAIR else at + 1
        for addresses in members:
            numbers.extend(addresses[at:end])
            if kind != PAIR:
                numbers.append(0)
        numbers.extend(own)
        at = end
    return torch.frombuffer(numbers, dtype=torch.int64).view(-1, _ROW_NUMBERS)


def gathered(
    parameters: list[Tensor], state: dict[Tensor, Any], first: int, *, coupled: bool, amsgrad: bool
) -> tuple[list[Tensor], list[Tensor], Tensor] | None:
    """The table of parameters on a CPU whose streams are numbered from `first`, in one pass of C over them.

    Lists of a hundred parameters with their moments take the dispatcher longer than a step over their first million
    numbers takes the kernel.

    **Returns:** those that have a gradient; the gradients, which the table needs alive; the table. None if any is not
    plain (another device, in half precision, not contiguous, a subclass of Tensor) or has no state yet, if another
    backend is to run, or if somebody is watching what ops are called.
    """
    if not parameters or parameters[0].device.type != "cpu" or is_watched():
        return None
    if backend_for("complex_adamw", *[[]] * 7) != "native":
        return None
    table = torch.empty((len(parameters), _ROW_NUMBERS), dtype=torch.int64)
    found = _load.native_module().gather_adamw(parameters, state, first, coupled, amsgrad, table.data_ptr())
    if found is None:
        return None
    stepped, owners = found
    return stepped, owners, table[: len(stepped)]


def step_rows(table: Tensor, *options) -> None:
    """`adamw_step` on a table; `options` are its arguments from `lr` on."""
    _load.native().complex_adamw(table, *options)


@launcher("complex_adamw", device="cpu", backend="native", supports=_needs_dense)
def _(*arguments):
    lists = arguments[:_LISTS]
    step_rows(_table(*lists), *arguments[_LISTS:])


# ---- by Triton -------------------------------------------------------------------------------------------------------


@launcher("complex_adamw", device="cuda", backend="triton", supports=_needs_dense)
@launcher("complex_adamw", device="cpu", backend="triton", supports=_needs_dense)
def _(*arguments):
    from stablekern.triton_kernels.complex_adamw import complex_adamw

    complex_adamw(*arguments)


# ---- in torch, every scalar that may change from step to step a 0-d tensor -------------------------------------------


def _update_moments(
    grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sq: Tensor, beta1: float, beta2: float
) -> None:
    """m and v, in place. Several parts with one v are one complex number per element."""
    exp_avg_sq.mul_(beta2)
    for grad, exp_avg in zip(grads, exp_avgs, strict=True):
        exp_avg.lerp_(grad, 1.0 - beta1)
        exp_avg_sq.addcmul_(grad, grad, value=1.0 - beta2)


def _noise_gain(second_moment: Tensor, denominator: Tensor, noise_eps: float, max_noise_gain: float) -> Tensor:
    """min(1 / (sqrt(s) + noise_eps), max_noise_gain), and at most 1 where v = 0."""
    gain = denominator.sqrt().add_(noise_eps).reciprocal_().clamp_(max=max_noise_gain)
    return torch.where(second_moment == 0, gain.clamp(max=1.0), gain)


def _parts(tensors: Sequence[Tensor], kind: int) -> list[Tensor]:
    """Real views of a unit's members: re and im of a complex tensor."""
    return list(torch.view_as_real(tensors[0]).unbind(-1)) if kind == COMPLEX else list(tensors)


def _normals(kind: int, like: Tensor, given: Tensor | None, offset: int, **stream) -> list[Tensor]:
    """Standard normals for each part of a unit whose second moment is `like`."""
    width = normals_per_element(kind)
    if given is not None:
        drawn = given.clone()
        own = kind in (COMPLEX, PAIR)
        return list(drawn.unbind(-1)) if own else [drawn]
    drawn = normal(offset * width, like.numel() * width, dtype=like.dtype, device=like.device, **stream)
    if kind == REAL:
        return [drawn.view(like.shape)]
    lanes = drawn.view(*like.shape, 2).unbind(-1)
    return [lanes[kind - FIRST]] if kind in (FIRST, SECOND) else list(lanes)


@launcher("complex_adamw", device="cuda", backend="torch")
@launcher("complex_adamw", device="cpu", backend="torch")
def _(
    values,
    grads,
    exp_avgs,
    squares,
    largest,
    steps,
    rounded,
    normals,
    kinds,
    parameters,
    offsets,
    lr,
    temperature,
    found_inf,
    grad_scale,
    beta1,
    beta2,
    eps,
    weight_decay,
    noise_eps,
    max_noise_gain,
    maximize,
    seed_low,
    seed_high,
):
    skip = None if found_inf is None else found_inf != 0
    decay = 1.0 - lr * weight_decay
    rounded = iter(rounded)
    member = 0
    for i, kind in enumerate(kinds):
        own = slice(member, member + (2 if kind == PAIR else 1))
        member = own.stop
        count = steps[own.start] + 1.0
        bias1, bias2_root = 1.0 - beta1**count, (1.0 - beta2**count).sqrt()
        halves = [next(rounded) if grad.dtype in _check.HALF else None for grad in grads[own]]
        for value, half in zip(values[own], halves, strict=True):
            if half is not None:  # where it was written from outside, the float32 copy follows
                value.copy_(torch.where(value.to(half.dtype) == half, value, half.float()))
        wide = [grad.to(value.dtype) for grad, value in zip(grads[own], values[own], strict=True)]
        if grad_scale is not None:
            wide = [grad / grad_scale for grad in wide]
        if maximize:
            wide = [-grad for grad in wide]
        kept = [*_parts(values[own], kind), *_parts(exp_avgs[own], kind), squares[i], *largest[i : i + 1]]
        work = kept if skip is None else [tensor.clone() for tensor in kept]  # then choose on the device
        gradients = _parts(wide, kind)
        parts = len(gradients)
        targets, moments, (square, *maximum) = work[:parts], work[parts : 2 * parts], work[2 * parts :]

        _update_moments(gradients, moments, square, beta1, beta2)
        if maximum:
            square = torch.maximum(maximum[0], square, out=maximum[0])
        denominator = square.sqrt().div_(bias2_root).add_(eps)
        for target, moment in zip(targets, moments, strict=True):
            target.mul_(decay).sub_((moment / denominator).mul_(lr / bias1))
        if temperature is not None:
            gain = _noise_gain(square, denominator, noise_eps, max_noise_gain)
            gain.mul_((2.0 * temperature * lr) ** 0.5)
            given = normals[i] if normals and normals[i].numel() else None
            stream = {"seed": seed_low | seed_high << 32, "step": count, "parameter": parameters[i]}
            for target, drawn in zip(targets, _normals(kind, square, given, offsets[i], **stream), strict=True):
                target.add_(drawn.mul_(gain))

        if skip is not None:
            for old, new in zip(kept, work, strict=True):
                old.copy_(torch.where(skip, old, new))
        for value, half in zip(values[own], halves, strict=True):
            if half is not None:
                half.copy_(value)
    taken = torch.ones_like(steps[0]) if skip is None else (~skip).to(steps[0].dtype)
    torch._foreach_add_(list(steps), [taken] * len(steps))  # a list: a single tensor would be read by the host
