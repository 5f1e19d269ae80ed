r"""Sample covariances with the conjugation that makes $x = a s$ give $|s|^2 a a^H$.

$R = \frac{1}{L - d} \sum_l (x_l - m)(x_l - m)^H$, $m$ the mean over the snapshots or 0. With snapshots as rows of $X$
that is $X^\top \bar X$; the product $X^H X$, which looks as right, is its conjugate, whose sources lie at mirrored
angles.

Normalised to a trace, $R$ does not depend on the scale of $X$, so each item is first multiplied by a power of two that
brings its largest component near 1: snapshots of 1e-25 do not vanish in the squares.

With $R = c \sum_l x_l x_l^H$, $c = 1/(L-d)$ or $T / \sum_l |x_l|^2$, and $G$ the Hermitian part of the cotangent,
$\bar x_l = 2 c\,(G x_l - s\,x_l)$, where $s = \sum_l x_l^H G x_l / \sum_l |x_l|^2$ if $c$ normalises the trace and
else 0. Centred snapshots have gradients that are centred already, being linear in them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stablekern import _check, _load
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.errors import message
from stablekern.ops.chol_solve_safe import components, hermitised, lapack_reason

__all__ = ["sample_covariance"]

_OP = "sample_covariance"


def reference(X: Tensor, *, center: bool = False, ddof: int = 0, target_trace: float | None = None) -> Tensor:
    """The definition, as a sum of outer products."""
    X = X - X.mean(-2, keepdim=True) if center else X
    R = torch.einsum("...li,...lj->...ij", X, X.conj()) / (X.shape[-2] - ddof)
    return R if target_trace is None else target_trace * R / torch.einsum("...ii->...", R)[..., None, None]


def _fake(X: Tensor, center: bool, divisor: int, target: float) -> Tensor:
    return empty((X.shape[0], X.shape[2], X.shape[2]), X)


def _fake_bwd(grad: Tensor, X: Tensor, center: bool, divisor: int, target: float) -> Tensor:
    return empty(X.shape, X)


# X (batch, L, n); `target` 0 stands for none.
_fwd = define("sample_covariance_fwd(Tensor X, bool center, int divisor, float target) -> Tensor", fake=_fake)
_bwd = define(
    "sample_covariance_bwd(Tensor grad, Tensor X, bool center, int divisor, float target) -> Tensor", fake=_fake_bwd
)


@launcher("sample_covariance_fwd", device="cpu", backend="native", supports=lambda *_: lapack_reason())
def _(X: Tensor, center: bool, divisor: int, target: float) -> Tensor:
    R = _fake(X, center, divisor, target)
    _load.native().sample_covariance_fwd(X.resolve_conj().contiguous(), center, divisor, target, R)
    return R


@launcher("sample_covariance_bwd", device="cpu", backend="native", supports=lambda *_: lapack_reason())
def _(grad: Tensor, X: Tensor, center: bool, divisor: int, target: float) -> Tensor:
    grad_X = _fake_bwd(grad, X, center, divisor, target)
    inputs = (M.resolve_conj().contiguous() for M in (grad, X))
    _load.native().sample_covariance_bwd(*inputs, center, divisor, target, grad_X)
    return grad_X


def _snapshots(X: Tensor, center: bool, divisor: int, target: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The snapshots, scaled near 1 if they are normalised, centred if asked, and 0 where an item has no covariance;
    that scale, the factor c of the scaled ones, and which items have none."""
    failed = ~torch.isfinite(X).flatten(1).all(-1)
    X = torch.where(failed[:, None, None], 0.0, X)
    scale = torch.ones_like(failed, dtype=X.dtype.to_real())
    if target > 0 and X.numel():
        largest = components(X).abs().flatten(1).amax(-1)
        limits = torch.finfo(scale.dtype)
        scale = torch.exp2(-torch.frexp(largest.clamp(limits.tiny, limits.max / 4)).exponent.to(scale.dtype))
    X = X * scale[:, None, None]
    X = X - X.mean(-2, keepdim=True) if center else X
    if target == 0:
        return X, scale, torch.full_like(scale, 1 / divisor), failed
    energy = components(X).square().flatten(1).sum(-1)
    failed = failed | (energy == 0)
    return X, scale, target / torch.where(failed, 1.0, energy), failed


@launcher("sample_covariance_fwd", device="cuda", backend="torch")
@launcher("sample_covariance_fwd", device="cpu", backend="torch")
def _(X: Tensor, center: bool, divisor: int, target: float) -> Tensor:
    X, _, factor, failed = _snapshots(X, center, divisor, target)
    R = hermitised(X.mT @ X.conj()) * factor[:, None, None]
    return R.masked_fill(failed[:, None, None], torch.nan).contiguous()


@launcher("sample_covariance_bwd", device="cuda", backend="torch")
@launcher("sample_covariance_bwd", device="cpu", backend="torch")
def _(grad: Tensor, X: Tensor, center: bool, divisor: int, target: float) -> Tensor:
    X, scale, factor, failed = _snapshots(X, center, divisor, target)
    image = X @ hermitised(grad).mT
    if target > 0:
        along = (components(X) * components(image)).flatten(1).sum(-1)
        image = image - (along * factor / target)[:, None, None] * X
    return (image * (2 * factor * scale)[:, None, None]).masked_fill(failed[:, None, None], 0.0).contiguous()


class _SampleCovariance(torch.autograd.Function):
    @staticmethod
    def forward(X: Tensor, center: bool, divisor: int, target: float) -> Tensor:
        return _fwd(X, center, divisor, target)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        X, *ctx.constants = inputs
        ctx.save_for_backward(X)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _check.first_order(_OP)
        return _bwd(grad, *ctx.saved_tensors, *ctx.constants), None, None, None


def sample_covariance(
    X: Tensor,  # (..., L, n)
    *,
    center: bool = False,
    ddof: int = 0,
    target_trace: float | None = None,
) -> Tensor:  # (..., n, n)
    r"""$\frac{1}{L-d} \sum_l x_l x_l^H$ over the snapshots $x_l$, the rows of `X`.

    **Arguments:**

    - `X`: snapshots by channels; float32, float64, complex64 or complex128; any batch dimensions.
    - `center`: subtract the mean over the snapshots. Not for symbols that are constant over them, since it removes the
        signal. Keyword only.
    - `ddof`: $d$, 0 to L - 1; with `center`, 1 makes the estimate unbiased. Keyword only.
    - `target_trace`: > 0: scale each matrix to this trace; None: in the units of `X` squared. Keyword only.

    **Returns:** Hermitian matrices, real for real `X`. An item with a non-finite entry is NaN by itself, with a
    gradient of 0; so is one of zeros with `target_trace`, since it has no such scaling. Differentiable once.

    **Raises:** `ValueError` for shapes or numbers out of range, `TypeError` for other dtypes, `RuntimeError` when
    second derivatives are asked for.

    **Accuracy:** a sum of L terms: at most $L \epsilon$ relative to the diagonal.
    """
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, X=X)
    L = _check.shapes(_OP, X=(X, "... l n"))["l"]
    if not isinstance(center, bool):
        raise TypeError(message(_OP, "`center` must be a bool", type(center).__name__))
    if L == 0:
        raise ValueError(message(_OP, "`X` must hold at least one snapshot", tuple(X.shape)))
    ddof = _check.integer(_OP, "ddof", ddof, low=0, high=L - 1)
    target = 0.0
    if target_trace is not None:
        target = _check.number(_OP, "target_trace", target_trace, low=0.0, strict=True)
    batch, n = X.shape[:-2], X.shape[-1]
    R = apply(_SampleCovariance, X.reshape(math.prod(batch), L, n), center, L - ddof, target)
    return R.reshape(*batch, n, n)
