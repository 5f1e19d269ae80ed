"""Formulas that several kernels share."""

import math

import triton
import triton.language as tl

HALF_PI_HIGH = tl.constexpr(math.floor(math.pi / 2 * 2**10) / 2**10)
HALF_PI_LOW = tl.constexpr(math.pi / 2 - math.floor(math.pi / 2 * 2**10) / 2**10)
HALF_PI_REST = tl.constexpr(math.sin(math.pi) / 2)  # what float64 lacks
TWO_OVER_PI = tl.constexpr(2 / math.pi)
LOG2_E = tl.constexpr(1 / math.log(2))
LN_2_HIGH = tl.constexpr(math.floor(math.log(2) * 2**15) / 2**15)
LN_2_LOW = tl.constexpr(math.log(2) - math.floor(math.log(2) * 2**15) / 2**15)


@triton.jit
def scalar(value, WIDE: tl.constexpr):
    """A parameter annotated `tl.float64`, in the type that the kernel computes in.

    Without the annotation a launch rounds Python numbers to float32, which a float64 kernel would show. The product
    serves the interpreter, where `value` is a Python number without a type.
    """
    return (value * tl.full((), 1.0, WIDE)).to(WIDE)


@triton.jit
def exponential(x):
    """exp(x) to 2 ulp, where the instruction for it is wrong by |x| ulp in float32.

    Whole powers of two are taken off in two parts of ln 2, the first of which has so few bits that its multiples are
    exact (Cody & Waite 1980), and put back by two factors, since the result may be subnormal; the rest is Taylor's
    series. Beyond the bounds everything is 0 or inf; NaN passes.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -120.0, -120.0, tl.where(x > 100.0, 100.0, x))
        power = tl.floor(x * LOG2_E + 0.5)
        r = x - power * LN_2_HIGH - power * LN_2_LOW
        series = r * 0.0 + 1.0
        for i in tl.static_range(7, 0, -1):
            series = 1.0 + r * series * (1.0 / i)
        whole = tl.where(power == power, power, 0.0).to(tl.int32)
        half = whole >> 1
        low = ((half + 127) << 23).to(tl.float32, bitcast=True)
        high = ((whole - half + 127) << 23).to(tl.float32, bitcast=True)
        return series * low * high


@triton.jit
def log_one_plus(e):
    """log(1 + e) for e >= 0.

    `log(1 + e)` alone would lose e below one ulp of 1; dividing e by the rounded (1 + e) - 1 restores it
    (Goldberg 1991, theorem 4: log1p without a log1p instruction).
    """
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def softplus_tail(x):
    """log(1 + exp(-|x|)), to be added to max(x, 0) for softplus(x) and to max(-x, 0) for softplus(-x)."""
    return log_one_plus(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def modulus(re, im):
    """sqrt(re^2 + im^2) without squares that overflow or vanish."""
    a = tl.abs(re)
    b = tl.abs(im)
    large = tl.where((a > b) | (a != a), a, b)
    small = tl.where((a > b) | (a != a), b, a)
    ratio = small / tl.where(large == 0.0, 1.0, large)
    # inf / inf
    ratio = tl.where(small == large, tl.where(large == 0.0, 0.0, 1.0), ratio)
    return large * tl.sqrt(1.0 + ratio * ratio)


@triton.jit
def cos_sin(x, rate):
    """The cosine and sine of x * rate, to a few ulp of 1 and the rounding of the product.

    Whole quadrants are taken off in three parts of pi / 2, the first of which has so few bits that its multiples are
    exact (Cody & Waite 1980); the rest is Taylor's series. The instructions for them are wrong by 2^-21, and more for
    large angles.
    """
    angle = x * rate
    quadrants = tl.floor(angle * TWO_OVER_PI + 0.5)
    r = angle - quadrants * HALF_PI_HIGH - quadrants * HALF_PI_LOW - quadrants * HALF_PI_REST
    quadrant = quadrants - 4.0 * tl.floor(0.25 * quadrants)
    square = r * r
    TERMS: tl.constexpr = 9 if x.dtype == tl.float64 else 5
    cos = square * 0.0 + 1.0
    sin = square * 0.0 + 1.0
    for i in tl.static_range(TERMS, 0, -1):
        cos = 1.0 - square * cos * (1.0 / ((2 * i - 1) * (2 * i)))
        sin = 1.0 - square * sin * (1.0 / ((2 * i) * (2 * i + 1)))
    sin *= r
    odd = (quadrant == 1.0) | (quadrant == 3.0)
    past_cos = tl.where((quadrant == 1.0) | (quadrant == 2.0), -1.0, 1.0)
    past_sin = tl.where((quadrant == 2.0) | (quadrant == 3.0), -1.0, 1.0)
    return past_cos * tl.where(odd, sin, cos), past_sin * tl.where(odd, cos, sin)
