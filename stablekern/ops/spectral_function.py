r"""Functions of Hermitian matrices, with a gradient that is exact whether or not eigenvalues repeat.

With $A = V \mathrm{diag}(w) V^H$ and a real function $f$, $f(A) = V \mathrm{diag}(f(w)) V^H$. It is smooth in $A$
wherever $f$ is smooth: eigenvalues that meet are no event. But the gradient through $V$ and $w$ is: each goes through
$1/(w_i - w_j)$, and what they lose together is the divided difference (Daleckii and Krein; Loewner)

$$\bar A = V\,(f^{[1]} \circ (V^H G V))\,V^H, \quad G = \tfrac12(\bar B + \bar B^H), \quad
f^{[1]}_{ij} = \frac{f(w_i) - f(w_j)}{w_i - w_j}, \quad f^{[1]}_{ii} = f'(w_i).$$

It is computed without cancellation, for $a \ge b$ out of $w$:

- exp: $e^a\,(1 - e^{-t})/t$, $t = a - b$, by expm1; it overflows only where $e^a$ does.
- sqrt: $1/(\sqrt a + \sqrt b)$. rsqrt: $-1/(\sqrt a \sqrt b\,(\sqrt a + \sqrt b))$. inv: $-1/(ab)$.
- log: $\mathrm{log1p}(t)/(t b)$, $t = (a - b)/b$; for $t > 1$ the quotient itself, which has nothing to lose there.
- $(f, f')$ given: $\int_0^1 f'(b + s(a - b))\,ds$ by Simpson's rule (exact for cubic $f'$) where it agrees with the
    quotient within the rounding of the latter, $4\epsilon(|f(a)| + |f(b)|)/(a - b)$; else the quotient. So neither a
    tolerance nor a scale is chosen: for close eigenvalues no quotient says more than the integral, for distant ones
    the integral must earn its place.

**Domain.** sqrt, rsqrt and log need $w > 0$, inv $w \ne 0$; nowhere may $f(w)$ overflow. A matrix outside is NaN, by
itself. The domain is that of the computed eigenvalues: those of a singular matrix are rounding, of either sign, so it
is NaN or enormous; load the diagonal first. (The square root of 0 is 0, but its derivative is infinite, and whether
the computed eigenvalue is just 0 is chance: it counts as outside.)

Sources: Daleckii and Krein 1965; Bhatia, Matrix Analysis, sec. V.3; Higham, Functions of Matrices, secs. 3.2 and 10.2;
Ionescu et al. 2015, arXiv:1509.07838 (the adjoint through an eigendecomposition, and its poles).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stablekern import _check, _load
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.errors import message
from stablekern.ops import eigh

__all__ = ["spectral_function"]

_OP = "spectral_function"
_NAMES = ("exp", "sqrt", "rsqrt", "log", "inv")  # their places are the codes of the op's `function`


def reference(A: Tensor, function: str) -> Tensor:
    """The definition by LAPACK's eigenvectors, differentiable where no eigenvalue is repeated."""
    w, V = torch.linalg.eigh(A)
    f = {"inv": torch.reciprocal}.get(function) or getattr(torch, function)
    return (V * f(w)[..., None, :].to(V.dtype)) @ V.mH


def _fake_fwd(A: Tensor, function: int) -> tuple[Tensor, Tensor, Tensor]:
    values = empty(A.shape[:2], A, A.dtype.to_real())
    return empty(A.shape, A), values, empty(A.shape, A)


def _fake_bwd(values: Tensor, rows: Tensor, grad: Tensor, function: int) -> Tensor:
    return empty(rows.shape, rows)


_fwd = define(
    "spectral_function_fwd(Tensor A, int function) -> (Tensor result, Tensor eigenvalues, Tensor eigenvector_rows)",
    fake=_fake_fwd,
)
_bwd = define(
    "spectral_function_bwd(Tensor eigenvalues, Tensor eigenvector_rows, Tensor grad_result, int function)"
    " -> Tensor grad_A",
    fake=_fake_bwd,
)


@launcher("spectral_function_fwd", device="cpu", backend="native", supports=lambda A, _: eigh.native_reason(A))
def _(A: Tensor, function: int) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake_fwd(A, function)
    _load.native().spectral_function_fwd(A.contiguous(), function, *outputs)
    return outputs


@launcher("spectral_function_bwd", device="cpu", backend="native", supports=lambda w, V, *_: eigh.native_reason(V))
def _(values: Tensor, rows: Tensor, grad: Tensor, function: int) -> Tensor:
    grad = grad.contiguous()
    result = _fake_bwd(values, rows, grad, function)
    _load.native().spectral_function_bwd(values, rows, grad, function, result)
    eigh.settle_failed(result, values, grad)
    return result


def _values_of(name: str, w: Tensor) -> Tensor:
    """f(w), not finite outside the domain."""
    if name == "sqrt":
        return torch.where(w > 0, w.sqrt(), torch.nan)
    return w.reciprocal() if name == "inv" else getattr(torch, name)(w)


def _divided(name: str, w: Tensor) -> Tensor:
    """The divided differences (b, n, n) of a named function: see the module's text."""
    a, b = torch.maximum(w[:, :, None], w[:, None, :]), torch.minimum(w[:, :, None], w[:, None, :])
    if name == "exp":
        t = a - b
        return torch.exp(a) * torch.where(t > 0, -torch.expm1(-t) / t, 1.0)
    if name == "sqrt":
        return 1 / (a.sqrt() + b.sqrt())
    if name == "rsqrt":
        return -(a.rsqrt() * b.rsqrt()) / (a.sqrt() + b.sqrt())
    if name == "inv":
        return -a.reciprocal() * b.reciprocal()
    t = (a - b) / b
    near = torch.where(t > 0, torch.log1p(t) / t, 1.0) / b
    return torch.where(t > 1, (a.log() - b.log()) / (a - b), near)


def _divided_by_rule(w: Tensor, f: Tensor, df: Callable[[Tensor], Tensor]) -> Tensor:
    """The same of a function given by f(w) and its derivative."""
    a, b = w[:, :, None], w[:, None, :]
    slope = _evaluated("df", df, w)
    middle = _evaluated("df", df, a / 2 + b / 2)
    integral = slope[:, :, None] / 6 + slope[:, None, :] / 6 + middle * (2 / 3)
    gap = a - b
    quotient = (f[:, :, None] - f[:, None, :]) / gap
    rounding = 4 * torch.finfo(w.dtype).eps * (f.abs()[:, :, None] + f.abs()[:, None, :]) / gap.abs()
    # On the diagonal, 0/0, the rounding is infinite or NaN: there the integral is the derivative.
    return torch.where(((integral - quotient).abs() <= rounding) | (gap == 0), integral, quotient)


def _assembled(values: Tensor, rows: Tensor, f: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """V f V^H, with NaN, in the eigenvalues too, for the items where some f is not finite."""
    outside = ~torch.isfinite(f).all(-1)
    half = (rows.mT * torch.where(outside[:, None], 1.0, f)[:, None, :]) @ rows.conj() / 2
    result = (half + half.mH).masked_fill(outside[:, None, None], torch.nan)
    return result.contiguous(), values.masked_fill(outside[:, None], torch.nan), rows


def _adjoint(values: Tensor, rows: Tensor, grad: Tensor, divided: Tensor) -> Tensor:
    inner = divided * (rows.conj() @ ((grad + grad.mH) / 2) @ rows.mT)
    half = rows.mT @ inner @ rows.conj() / 2
    result = (half + half.mH).contiguous()
    eigh.settle_failed(result, values, grad)
    return result


@launcher("spectral_function_fwd", device="cuda", backend="torch")
@launcher("spectral_function_fwd", device="cpu", backend="torch")
def _(A: Tensor, function: int) -> tuple[Tensor, Tensor, Tensor]:
    values, rows, _ = eigh.forward_of(A)
    return _assembled(values, rows, _values_of(_NAMES[function], values))


@launcher("spectral_function_bwd", device="cuda", backend="torch")
@launcher("spectral_function_bwd", device="cpu", backend="torch")
def _(values: Tensor, rows: Tensor, grad: Tensor, function: int) -> Tensor:
    return _adjoint(values, rows, grad, _divided(_NAMES[function], values))


class _Named(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, function: int) -> tuple[Tensor, Tensor, Tensor]:
        return _fwd(A, function)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.function = inputs[1]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_):
        _check.first_order(_OP)
        if grad is None:
            return None, None
        return _bwd(*ctx.saved_tensors, grad, ctx.function), None


class _Given(torch.autograd.Function):
    """A pair of Python functions cannot stand in a schema: this one is not an op of the dispatcher."""

    @staticmethod
    def forward(A: Tensor, f: Callable[[Tensor], Tensor], df: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        values, rows, _ = eigh.forward_of(A)
        image = _evaluated("f", f, values)
        return *_assembled(values, rows, image), image

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.df = inputs[2]
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_):
        _check.first_order(_OP)
        if grad is None:
            return None, None, None
        values, rows, image = ctx.saved_tensors
        return _adjoint(values, rows, grad, _divided_by_rule(values, image, ctx.df)), None, None


def _evaluated(name: str, function: Callable[[Tensor], Tensor], w: Tensor) -> Tensor:
    """function(w), checked to be elementwise as far as its shape and dtype tell."""
    result = function(w)
    if not isinstance(result, Tensor):
        raise TypeError(message(_OP, f"`{name}` must return a tensor", type(result).__name__))
    if result.dtype != w.dtype:
        raise TypeError(message(_OP, f"`{name}` must keep the dtype of the eigenvalues", result.dtype, w.dtype))
    if result.shape != w.shape:
        rule = f"`{name}` must keep the shape of the eigenvalues"
        raise ValueError(message(_OP, rule, tuple(result.shape), tuple(w.shape)))
    return result


def spectral_function(
    A: Tensor,  # (..., n, n)
    function: str | tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
) -> Tensor:  # (..., n, n)
    r"""$f(A) = V f(w) V^H$ of Hermitian matrices $A = V \mathrm{diag}(w) V^H$, with an exact gradient at degeneracies.

    **Arguments:**

    - `A`: float32, float64, complex64 or complex128; any strides and batch dimensions. float16 and bfloat16 are
        computed, and returned, in float32. Not checked to be Hermitian: the lower triangle is read.
    - `function`: `"exp"`, `"sqrt"`, `"rsqrt"` ($A^{-1/2}$), `"log"` or `"inv"`; or a pair `(f, df)` of a function of
        the eigenvalues and its derivative, both elementwise from a real tensor to one of the same shape and dtype. `df`
        is called on points between eigenvalues too, in the backward. No gradient flows to what `f` and `df` hold.

    **Returns:** a new tensor of the same shape, Hermitian to the last bit. A matrix whose computed eigenvalues leave
    the domain ($w \le 0$ for sqrt, rsqrt and log, 0 for inv, $f(w)$ not finite for all) is NaN by itself, and so is one
    with a non-finite entry. Its gradient is NaN, or 0 if the loss leaves it out (its own incoming gradient is all 0).
    The gradient of `A` is Hermitian.

    **Raises:** `ValueError` for a matrix that is not square, an unknown name or a function that changes the shape,
    `TypeError` for other dtypes or something that is no function, `RuntimeError` when second derivatives are asked for.

    **Accuracy:** error of $f(A)$: that of $f$ at eigenvalues off by a few ulp of max|w|, so small eigenvalues of a
    badly conditioned matrix give sqrt, rsqrt, log and inv a relative error of up to about $n \epsilon \kappa$. The
    divided differences add a few ulp for the names; for `(f, df)` at most the rounding of the quotient, and about
    $\epsilon^{4/5}$ for smooth $f$ (`tests/test_spectral_function.py`).
    **Sources:** Bhatia, Matrix Analysis, sec. V.3; Higham, Functions of Matrices, sec. 3.2.
    """
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX + _check.HALF, A=A)
    n = _check.shapes(_OP, A=(A, "... n n"))["n"]
    named = isinstance(function, str)
    if named:
        _check.choice(_OP, "function", function, _NAMES)
    elif not (isinstance(function, tuple) and len(function) == 2 and all(map(callable, function))):
        got = f"a {type(function).__name__}"
        raise TypeError(message(_OP, "`function` must be a name or a pair of functions (f, df)", got))
    A = A.to(torch.float32) if A.dtype in _check.HALF else A
    flat = A.reshape(math.prod(A.shape[:-2]), n, n)
    if n == 0:
        return flat.reshape(A.shape)
    result = apply(_Named, flat, _NAMES.index(function)) if named else apply(_Given, flat, *function)
    return result[0].reshape(A.shape)
