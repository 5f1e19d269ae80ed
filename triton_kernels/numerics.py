"""Formulas that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def scalar(value, WIDE: tl.constexpr):
    """A parameter annotated `tl.float64`, in the type that the kernel computes in.

    Without the annotation a launch rounds Python numbers to float32, which a float64 kernel would show. The product
    serves the interpreter, where `value` is a Python number without a type.
    """
    return (value * tl.full((), 1.0, WIDE)).to(WIDE)


@triton.jit
def softplus_tail(x):
    """log(1 + exp(-|x|)), to be added to max(x, 0) for softplus(x) and to max(-x, 0) for softplus(-x).

    `log(1 + e)` alone would lose e below one ulp of 1; dividing e by the rounded (1 + e) - 1 restores it
    (Goldberg 1991, theorem 4: log1p without a log1p instruction).
    """
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))
