"""Normals of a stream in registers; words, uniforms and normals are defined in stablekern/optim/philox.py.

The words come from Triton's own Philox4x32-10. Everything after them is evaluated as in
csrc/include/stablekern/philox.h, with the same polynomials: the machine's logarithm, sine and cosine are wrong in their
last ten bits where the logarithm is small and in the last three elsewhere.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # normals of a program
ROOT_HALF = tl.constexpr(0x3F3504F3)  # the bits of sqrt(1/2)
TO_UNIT = tl.constexpr(2.0**-32)
HALF_UNIT = tl.constexpr(2.0**-33)
# 2 ln 2: its first 17 bits, so that products with an exponent are exact, and the rest
TWICE_LOG2 = tl.constexpr(math.floor(2 * math.log(2) * 2**16) / 2**16)
TWICE_LOG2_REST = tl.constexpr(2 * math.log(2) - math.floor(2 * math.log(2) * 2**16) / 2**16)
# ln(1 + f) = f - f^2 (1/2 - f r(f)): the coefficients of r
LOG = tl.constexpr(
    (
        0.3333333134651184,
        -0.2500081956386566,
        0.20001226663589478,
        -0.16623356938362122,
        0.14201757311820984,
        -0.13160179555416107,
        0.1276158094406128,
        -0.07634507119655609,
    )
)
# Taylor's, from x^3 and x^4 on; |x| <= pi / 4
SINE = tl.constexpr((-1 / 6, 1 / 120, -1 / 5040, 1 / 362880))
COSINE = tl.constexpr((1 / 24, -1 / 720, 1 / 40320, -1 / 3628800))
# 2 pi / 2^34, of one unit of four times the second word, as the sum of two float32
ANGLE = tl.constexpr(2 * math.pi * 2.0**-34)
ANGLE_HIGH = tl.constexpr(math.floor(math.pi * 2**22) * 2.0**-55)
ANGLE_LOW = tl.constexpr(2 * math.pi * 2.0**-34 - math.floor(math.pi * 2**22) * 2.0**-55)

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def minus_twice_log(u):
    """-2 ln u for a float32 u in [2^-33, 1], to one ulp, also next to 1."""
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - ROOT_HALF) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    exponent = k.to(tl.float32)
    r = -2.0 * LOG[7]
    for n in tl.static_range(6, -1, -1):
        r = tl.fma(r, f, -2.0 * LOG[n])
    r = tl.fma(f, r, 1.0)
    r = tl.fma(f * f, r, f * -2.0)
    return tl.fma(exponent, -TWICE_LOG2, tl.fma(exponent, -TWICE_LOG2_REST, r))


@triton.jit
def cos_sin_of_rest(rest):
    """Cosine and sine of `rest` * 2 pi / 2^34, `rest` a signed word: within an eighth of a turn, in float32."""
    size = tl.abs(rest).to(tl.uint32, bitcast=True)  # so that the two parts never cancel, and -2^31 has one too
    turn = (size & 0xFFFFFF00).to(tl.float32)  # what a float32 has room for
    fine = (size & 0xFF).to(tl.float32)
    x = turn * ANGLE_HIGH
    error = tl.fma(fine, ANGLE_HIGH, tl.fma(turn, ANGLE_LOW, tl.fma(turn, ANGLE_HIGH, -x)))
    z = x * x
    s = tl.fma(z, SINE[3], SINE[2])
    c = tl.fma(z, COSINE[3], COSINE[2])
    for n in tl.static_range(1, -1, -1):
        s = tl.fma(s, z, SINE[n])
        c = tl.fma(c, z, COSINE[n])
    # 1 - z / 2 with what its rounding lost
    head = tl.fma(z, -0.5, 1.0)
    lost = tl.fma(z, -0.5, 1.0 - head)
    sine = x + tl.fma(s * z, x, error * head)
    cosine = head + tl.fma(c * z, z, tl.fma(-sine, error, lost))
    return cosine, tl.where(rest < 0, -sine, sine)


@triton.jit
def box_muller(first, second, WIDE: tl.constexpr):
    """Two normals from two words."""
    uniform = first.to(tl.float32) * TO_UNIT + HALF_UNIT
    quarter = (second + 0x20000000) >> 30
    rest = (second << 2).to(tl.int32, bitcast=True)
    if WIDE == tl.float64:
        radius = tl.sqrt(-2.0 * tl.log(uniform.to(tl.float64)))
        angle = rest.to(tl.float64) * ANGLE
        cosine, sine = tl.cos(angle), tl.sin(angle)
    else:
        radius = tl.sqrt_rn(minus_twice_log(uniform))
        cosine, sine = cos_sin_of_rest(rest)
    swapped = (quarter & 1) != 0
    past_cosine = tl.where(((quarter + 1) & 2) != 0, -radius, radius)
    past_sine = tl.where((quarter & 2) != 0, -radius, radius)
    return past_cosine * tl.where(swapped, sine, cosine), past_sine * tl.where(swapped, cosine, sine)


@triton.jit
def words(block, parameter, step, seed):
    """The four words of each `block` (int64) of a stream; of `parameter` and `step` the low 32 bits count."""
    low = block.to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    return tl.philox(seed, low, high, zero + parameter.to(tl.uint32), zero + step.to(tl.uint32))


@triton.jit
def four_normals(block, parameter, step, seed, WIDE: tl.constexpr):
    """Normals 4 b to 4 b + 3 of a stream for each `block` b."""
    w0, w1, w2, w3 = words(block, parameter, step, seed)
    n0, n1 = box_muller(w0, w1, WIDE)
    n2, n3 = box_muller(w2, w3, WIDE)
    return n0, n1, n2, n3


@triton.jit
def in_order(n0, n1, n2, n3, BLOCK: tl.constexpr):
    """The normals of consecutive blocks, BLOCK in all, as consecutive elements: no element leaves its thread."""
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def philox_normal_kernel(
    step_ptr,
    out_ptr,
    start: tl.int64,
    count: tl.int64,
    parameter: tl.int64,
    seed: tl.int64,
    BLOCK: tl.constexpr,
):
    block = start // 4 + tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    WIDE: tl.constexpr = out_ptr.dtype.element_ty
    step = tl.load(step_ptr)
    parameter = parameter + step * 0  # a number in the interpreter
    n0, n1, n2, n3 = four_normals(block, parameter, step, seed, WIDE)
    at = (start // 4) * 4 - start + tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + at, in_order(n0, n1, n2, n3, BLOCK), mask=(at >= 0) & (at < count))


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def signed(seed_low: int, seed_high: int) -> int:
    """The seed as the 64-bit integer that a kernel takes."""
    return seed_low | (seed_high - (seed_high >> 31 << 32)) << 32


def philox_normal(start: int, seed_low: int, seed_high: int, step: Tensor, parameter: int, out: Tensor) -> None:
    count = out.numel()
    if count == 0:
        return
    programs = triton.cdiv(start % 4 + count, _BLOCK)
    philox_normal_kernel[(programs,)](
        step, out, start, count, parameter, signed(seed_low, seed_high), BLOCK=_BLOCK, enable_fp_fusion=True
    )
