"""One step of ComplexAdamW over a list of tensors in two launches; its equations: stablekern/optim/complex_adamw.py.

Memory bound: 28 bytes a real number with noise or without (24 if it is half of a coupled complex one), in float32. The
first launch counts the step and works out, once for each unit, what float64 is needed for; the second streams through
all units that agree in kind and types, whatever their number and sizes, and draws the normals in registers on its way.
Under `found_inf` both do nothing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from stablekern.triton_kernels.numerics import scalar
from stablekern.triton_kernels.philox import four_normals, in_order, signed
from stablekern.triton_kernels.scan import ALL_REGISTERS
from stablekern.triton_kernels.tensor_lists import (
    TYPES,
    addresses,
    aligned,
    blocks,
    column,
    load_block,
    pointer_at,
    store_block,
)

_BLOCK = 1024  # numbers of a unit that a program steps
_UNITS = 128  # of a program that counts steps
# As stablekern/optim/_adamw_step.py numbers them.
REAL = tl.constexpr(0)
COMPLEX = tl.constexpr(1)
PAIR = tl.constexpr(2)
SECOND = tl.constexpr(4)
RATES = tl.constexpr(4)  # of a unit: step size, 1 / sqrt(bias correction), decay, scale of the noise

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def complex_adamw_rates_kernel(
    steps_ptr,
    rates_ptr,
    lr_ptr,
    temperature_ptr,
    found_inf_ptr,
    units,
    log2_beta1: tl.float64,
    log2_beta2: tl.float64,
    weight_decay: tl.float64,
    MEMBERS: tl.constexpr,
    NOISY: tl.constexpr,
    SKIPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = unit < units
    skip = False
    if SKIPS:
        skip = tl.load(found_inf_ptr) != 0.0
    if not skip:
        count = tl.zeros((BLOCK,), tl.float64)
        for part in tl.static_range(MEMBERS):
            at = tl.load(steps_ptr + unit * MEMBERS + part, mask=real, other=0).to(tl.pointer_type(tl.float64))
            step = tl.load(at, mask=real, other=0.0) + 1.0
            tl.store(at, step, mask=real)
            count = step if part == 0 else count
        lr = tl.load(lr_ptr)
        one = tl.full((), 1.0, tl.float64)
        to = rates_ptr + unit * RATES
        WIDE: tl.constexpr = rates_ptr.dtype.element_ty
        tl.store(to, (lr / (one - tl.exp2(count * log2_beta1))).to(WIDE), mask=real)
        tl.store(to + 1, (one / tl.sqrt(one - tl.exp2(count * log2_beta2))).to(WIDE), mask=real)
        tl.store(to + 2, (one - lr * weight_decay + count * 0.0).to(WIDE), mask=real)
        if NOISY:
            tl.store(to + 3, (tl.sqrt(2.0 * tl.load(temperature_ptr) * lr) + count * 0.0).to(WIDE), mask=real)


@triton.jit
def _root(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _load_parts(
    column_ptr, unit, first, size, TYPE: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """re and im of a block of elements; the same number twice where there is only one."""
    if KIND == COMPLEX:
        both = load_block(pointer_at(column_ptr, unit, TYPE, ALIGNED), 2 * first, 2 * size, 2 * BLOCK)
        re, im = tl.split(tl.reshape(both, (BLOCK, 2)))
    elif KIND == PAIR:
        re = load_block(pointer_at(column_ptr, 2 * unit, TYPE, ALIGNED), first, size, BLOCK)
        im = load_block(pointer_at(column_ptr, 2 * unit + 1, TYPE, ALIGNED), first, size, BLOCK)
    else:
        re = load_block(pointer_at(column_ptr, unit, TYPE, ALIGNED), first, size, BLOCK)
        im = re
    return re, im


@triton.jit
def _store_parts(
    column_ptr,
    unit,
    re,
    im,
    first,
    size,
    TYPE: tl.constexpr,
    KIND: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if KIND == COMPLEX:
        both = tl.reshape(tl.join(re, im), (2 * BLOCK,))
        store_block(pointer_at(column_ptr, unit, TYPE, ALIGNED), both, 2 * first, 2 * size, 2 * BLOCK)
    elif KIND == PAIR:
        store_block(pointer_at(column_ptr, 2 * unit, TYPE, ALIGNED), re, first, size, BLOCK)
        store_block(pointer_at(column_ptr, 2 * unit + 1, TYPE, ALIGNED), im, first, size, BLOCK)
    else:
        store_block(pointer_at(column_ptr, unit, TYPE, ALIGNED), re, first, size, BLOCK)


@triton.jit
def _followed(value, parameter):
    """A float32 value whose rounded form is no longer the parameter has been written from outside: it follows."""
    return tl.where(value.to(parameter.dtype) == parameter, value, parameter.to(tl.float32))


@triton.jit
def _quotient(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def complex_adamw_kernel(
    owners_ptr,
    starts_ptr,
    sizes_ptr,
    values_ptr,
    grads_ptr,
    exp_avgs_ptr,
    squares_ptr,
    largest_ptr,
    rounded_ptr,
    normals_ptr,
    steps_ptr,
    streams_ptr,
    offsets_ptr,
    rates_ptr,
    found_inf_ptr,
    grad_scale_ptr,
    take_first: tl.float64,
    keep_second: tl.float64,
    take_second: tl.float64,
    eps: tl.float64,
    noise_eps: tl.float64,
    max_noise_gain: tl.float64,
    seed: tl.int64,
    GRAD: tl.constexpr,
    KIND: tl.constexpr,
    NOISY: tl.constexpr,
    GIVEN: tl.constexpr,
    LARGEST: tl.constexpr,
    ROUNDED: tl.constexpr,
    SKIPS: tl.constexpr,
    SCALES: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if SKIPS:
        if tl.load(found_inf_ptr) != 0.0:
            return
    WIDE: tl.constexpr = rates_ptr.dtype.element_ty
    WIDTH: tl.constexpr = 1 if KIND == REAL else 2  # normals of an element
    TWO: tl.constexpr = (KIND == COMPLEX) | (KIND == PAIR)
    unit = tl.load(owners_ptr + tl.program_id(0)).to(tl.int64)
    size = tl.load(sizes_ptr + unit)
    first = (tl.program_id(0) - tl.load(starts_ptr + unit)) * BLOCK
    if SHIFTED:  # so that the first element takes the first normal of a block of the stream
        first -= tl.load(offsets_ptr + unit) % (4 // WIDTH)

    g_re, g_im = _load_parts(grads_ptr, unit, first, size, GRAD, KIND, ALIGNED, BLOCK)
    m_re, m_im = _load_parts(exp_avgs_ptr, unit, first, size, WIDE, KIND, ALIGNED, BLOCK)
    p_re, p_im = _load_parts(values_ptr, unit, first, size, WIDE, KIND, ALIGNED, BLOCK)
    v = load_block(pointer_at(squares_ptr, unit, WIDE, ALIGNED), first, size, BLOCK)
    if ROUNDED:
        half_re, half_im = _load_parts(rounded_ptr, unit, first, size, GRAD, KIND, ALIGNED, BLOCK)
        p_re, p_im = _followed(p_re, half_re), _followed(p_im, half_im)
    g_re, g_im = g_re.to(WIDE), g_im.to(WIDE)
    if SCALES:
        scale = tl.load(grad_scale_ptr).to(WIDE)
        g_re, g_im = _quotient(g_re, scale), _quotient(g_im, scale)
    if MAXIMIZE:
        g_re, g_im = -g_re, -g_im

    square = g_re * g_re
    if TWO:
        square += g_im * g_im
    v = scalar(take_second, WIDE) * square + scalar(keep_second, WIDE) * v
    store_block(pointer_at(squares_ptr, unit, WIDE, ALIGNED), v, first, size, BLOCK)
    if LARGEST:
        largest = pointer_at(largest_ptr, unit, WIDE, ALIGNED)
        v = tl.maximum(v, load_block(largest, first, size, BLOCK), propagate_nan=tl.PropagateNan.ALL)
        store_block(largest, v, first, size, BLOCK)
    rates = rates_ptr + unit * RATES
    s = _root(v) * tl.load(rates + 1) + scalar(eps, WIDE)
    m_re += scalar(take_first, WIDE) * (g_re - m_re)
    m_im += scalar(take_first, WIDE) * (g_im - m_im)
    step_size, decay = tl.load(rates), tl.load(rates + 2)
    p_re = p_re * decay - step_size * (m_re / s)
    p_im = p_im * decay - step_size * (m_im / s)
    if NOISY:
        cap = scalar(max_noise_gain, WIDE)
        gain = 1.0 / (_root(s) + scalar(noise_eps, WIDE))
        gain = tl.load(rates + 3) * tl.minimum(gain, tl.where(v == 0.0, tl.minimum(cap, 1.0), cap))
        if GIVEN:
            GIVEN_AS: tl.constexpr = COMPLEX if TWO else KIND  # a pair's, too, are side by side in one tensor
            n_re, n_im = _load_parts(normals_ptr, unit, first, size, WIDE, GIVEN_AS, ALIGNED, BLOCK)
        else:
            COUNT: tl.constexpr = BLOCK * WIDTH // 4
            block = (tl.load(offsets_ptr + unit) + first) * WIDTH // 4 + tl.arange(0, COUNT)
            count = tl.load(pointer_at(steps_ptr, unit * (2 if KIND == PAIR else 1), tl.float64, False))
            n0, n1, n2, n3 = four_normals(block, tl.load(streams_ptr + unit), count.to(tl.int64), seed, WIDE)
            if KIND == REAL:
                n_re = in_order(n0, n1, n2, n3, BLOCK)
                n_im = n_re
            else:
                n_re = tl.reshape(tl.join(n0, n2), (BLOCK,))
                n_im = tl.reshape(tl.join(n1, n3), (BLOCK,))
                if KIND == SECOND:
                    n_re = n_im
        p_re += gain * n_re
        p_im += gain * n_im
    _store_parts(exp_avgs_ptr, unit, m_re, m_im, first, size, WIDE, KIND, ALIGNED, BLOCK)
    _store_parts(values_ptr, unit, p_re, p_im, first, size, WIDE, KIND, ALIGNED, BLOCK)
    if ROUNDED:
        _store_parts(rounded_ptr, unit, p_re.to(GRAD), p_im.to(GRAD), first, size, GRAD, KIND, ALIGNED, BLOCK)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    values: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    steps: list[Tensor]
    rounded: list[Tensor]
    square: Tensor
    largest: Tensor | None
    normals: Tensor | None  # (elements,) or, for two parts, (elements, 2); None: drawn
    stream: int
    offset: int


def complex_adamw(
    values: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    squares: list[Tensor],
    largest: list[Tensor],
    steps: list[Tensor],
    rounded: list[Tensor],
    normals: list[Tensor],
    kinds: list[int],
    parameters: list[int],
    offsets: list[int],
    lr: Tensor,
    temperature: Tensor | None,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    noise_eps: float,
    max_noise_gain: float,
    maximize: bool,
    seed_low: int,
    seed_high: int,
) -> None:
    groups: dict[tuple[int, torch.dtype, torch.dtype, bool], list[_Unit]] = {}
    member = half = 0
    for i, kind in enumerate(kinds):
        own = slice(member, member + (2 if kind == PAIR.value else 1))
        member = own.stop
        is_half = grads[own.start].dtype in (torch.float16, torch.bfloat16)
        halves = slice(half, half + (own.stop - own.start if is_half else 0))
        half = halves.stop
        given = normals[i] if normals and normals[i].numel() else None
        if given is not None and kind > PAIR.value:
            kind = REAL.value  # a normal that the caller drew is the member's own: there is no partner's to pass over
        unit = _Unit(
            values[own],
            grads[own],
            exp_avgs[own],
            steps[own],
            rounded[halves],
            squares[i],
            largest[i] if largest else None,
            given,
            parameters[i],
            offsets[i],
        )
        key = kind, values[own.start].dtype, grads[own.start].dtype, given is not None
        groups.setdefault(key, []).append(unit)
    device = lr.device
    for (kind, _, grad_dtype, given), units in groups.items():
        _step_group(
            kind, grad_dtype, given, units, device, lr, temperature, found_inf, grad_scale, beta1, beta2, eps,
            weight_decay, noise_eps, max_noise_gain, maximize, signed(seed_low, seed_high),
        )  # fmt: skip


def _step_group(
    kind: int,
    grad_dtype: torch.dtype,
    given: bool,
    units: list[_Unit],
    device: torch.device,
    lr: Tensor,
    temperature: Tensor | None,
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    noise_eps: float,
    max_noise_gain: float,
    maximize: bool,
    seed: int,
) -> None:
    """Units of one kind and one pair of types."""

    def members(of: str) -> list[Tensor]:
        return [tensor for unit in units for tensor in getattr(unit, of)]

    wide = units[0].square.dtype
    noisy = temperature is not None
    per_program = _BLOCK // 2 if kind in (COMPLEX.value, PAIR.value) else _BLOCK
    sizes = [unit.square.numel() for unit in units]
    width = 1 if kind == REAL.value else 2
    shifts = [unit.offset * width % 4 // width if noisy and not given else 0 for unit in units]
    where = blocks([size + shift for size, shift in zip(sizes, shifts, strict=True)], per_program, device)
    steps = addresses(members("steps"), device)
    rates = torch.empty(len(units), RATES.value, dtype=wide, device=device)
    complex_adamw_rates_kernel[(triton.cdiv(len(units), _UNITS),)](
        steps,
        rates,
        lr,
        temperature if noisy else lr,
        lr if found_inf is None else found_inf,
        len(units),
        _log2(beta1),
        _log2(beta2),
        weight_decay,
        MEMBERS=2 if kind == PAIR.value else 1,
        NOISY=noisy,
        SKIPS=found_inf is not None,
        BLOCK=_UNITS,
        enable_fp_fusion=True,
    )
    if where.count == 0:
        return
    lists = {name: members(name) for name in ("values", "grads", "exp_avgs", "rounded")}
    lists["squares"] = [unit.square for unit in units]
    lists["largest"] = [unit.largest for unit in units if unit.largest is not None]
    lists["normals"] = [unit.normals for unit in units if unit.normals is not None]
    table = {name: addresses(tensors, device) if tensors else steps for name, tensors in lists.items()}
    complex_adamw_kernel[(where.count,)](
        where.owners,
        where.starts,
        column(sizes, device),
        *(table[name] for name in ("values", "grads", "exp_avgs", "squares", "largest", "rounded", "normals")),
        steps,
        column([unit.stream for unit in units], device),
        column([unit.offset for unit in units], device),
        rates,
        lr if found_inf is None else found_inf,
        lr if grad_scale is None else grad_scale,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        eps,
        noise_eps,
        max_noise_gain,
        seed,
        GRAD=TYPES[grad_dtype],
        KIND=kind,
        NOISY=noisy,
        GIVEN=given,
        LARGEST=bool(lists["largest"]),
        ROUNDED=bool(lists["rounded"]),
        SKIPS=found_inf is not None,
        SCALES=grad_scale is not None,
        MAXIMIZE=maximize,
        ALIGNED=not any(shifts) and aligned(*lists.values()),
        SHIFTED=any(shifts),
        BLOCK=per_program,
        enable_fp_fusion=True,
        maxnreg=ALL_REGISTERS,
    )


def _log2(beta: float) -> float:
    return math.log2(beta) if beta else -math.inf
