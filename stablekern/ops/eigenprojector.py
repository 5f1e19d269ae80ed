r"""The projector on the span of `k` eigenvectors: smooth in the matrix wherever the eigenvalues next to the cut differ.

With $A = V \mathrm{diag}(w) V^H$, $w$ ascending, and $S$ the `k` lowest (or largest) eigenvalues, $P = V_S V_S^H$.
The eigenvectors inside $S$, and those outside, enter as subspaces alone: no choice of a basis, sign or phase is left,
and the derivative holds only pairs across the cut,

$$dP = \sum_{i \in S,\, j \notin S} \frac{v_i^H\, dA\, v_j}{w_i - w_j}\, v_i v_j^H + \text{h.c.}, \qquad
\bar A = \sum_{i \in S,\, j \notin S} \frac{v_i^H G\, v_j}{w_i - w_j}\, v_i v_j^H + \text{h.c.}, \qquad
G = \tfrac12 (\bar P + \bar P^H).$$

Eigenvalues that repeat on one side of the cut never meet in a denominator, so the gradient is exact there: nothing is
masked and no tolerance decides. The one hard point is a closed cut, $w_k = w_{k+1}$: no projector is defined by $A$,
and the derivative is unbounded nearby. There stands $g/(g^2 + \delta^2)$ for $1/g$, $g$ the gap over max|w| and
$\delta = 4\sqrt n\,\epsilon$, the accuracy of a computed eigenvalue: at most $1/(2\delta)$, 0 for $g = 0$, and nearer
to $1/g$ than the rounding of $g$ is ($\delta^2/g^2$ against $\delta/g$) for every gap that is open.

The smaller of the two sides gives $P$, and the gradient too, since the sum over the partners $j$ of one $i$ is a
resolvent: $\sum_j v_j v_j^H G v_i / (w_i - w_j) = (w_i - A)^{-1} (1 - P) G v_i$, and with the stand-in
$\mathrm{Re}\,(w_i - A + i \delta)^{-1}$ in its place. So a large matrix need not be decomposed: the native kernel
reduces it to $Q T Q^H$, tridiagonal, and computes the few eigenvectors and the resolvents of $T$.

Sources: Kato, Perturbation Theory for Linear Operators, ch. II, sec. 2 (the derivative of an eigenprojection); Kasim
2020, arXiv:2011.04366 (what a loss must satisfy at degeneracies).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stablekern import _check, _load, numerics
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.errors import message
from stablekern.ops import eigh

__all__ = ["eigenprojector", "eigenprojector_ex"]

_OP = "eigenprojector"
_CUT_CLOSED = 4  # bit 2 of `info`, after the two of `eigh_ex`


class EigenprojectorEx(NamedTuple):
    """P (..., n, n), the gap at the cut (...), and a status (...): bits 0 and 1 as in `eigh_ex`, bit 2 closed cut."""

    projector: Tensor
    gap: Tensor
    info: Tensor


def reference(A: Tensor, k: int, *, largest: bool = False) -> Tensor:
    """The definition by LAPACK's eigenvectors, differentiable where no eigenvalue at all is repeated."""
    V = torch.linalg.eigh(A)[1]
    S = V[..., V.shape[-1] - k :] if largest else V[..., :k]
    return S @ S.mH


def _fake_fwd(A: Tensor, k: int, largest: bool, gap_floor: float) -> tuple[Tensor, ...]:
    batch, n, _ = A.shape
    real = A.dtype.to_real()
    return (
        empty(A.shape, A),
        A.new_empty(batch, dtype=real),
        empty((batch, n), A, real),
        empty(A.shape, A),
        A.new_empty(batch, dtype=torch.int32),
        A.new_empty(batch, dtype=torch.int32),
    )


def _fake_bwd(values: Tensor, rows: Tensor, reduced: Tensor, grad: Tensor, *cut) -> Tensor:
    return empty(rows.shape, rows)


_fwd = define(
    "eigenprojector_fwd(Tensor A, int k, bool largest, float gap_floor) -> (Tensor projector, Tensor gap,"
    " Tensor eigenvalues, Tensor eigenvector_rows, Tensor reduced, Tensor info)",
    fake=_fake_fwd,
)
_bwd = define(
    "eigenprojector_bwd(Tensor eigenvalues, Tensor eigenvector_rows, Tensor reduced, Tensor grad_projector, int k,"
    " bool largest, float gap_floor) -> Tensor grad_A",
    fake=_fake_bwd,
)


@launcher("eigenprojector_fwd", device="cpu", backend="native", supports=lambda A, *_: eigh.native_reason(A))
def _(A: Tensor, k: int, largest: bool, gap_floor: float) -> tuple[Tensor, ...]:
    outputs = _fake_fwd(A, k, largest, gap_floor)
    _load.native().eigenprojector_fwd(A.contiguous(), k, largest, gap_floor, *outputs)
    return outputs


@launcher("eigenprojector_bwd", device="cpu", backend="native", supports=lambda w, rows, *_: eigh.native_reason(rows))
def _(values: Tensor, rows: Tensor, reduced: Tensor, grad: Tensor, *cut) -> Tensor:
    grad = grad.contiguous()
    result = _fake_bwd(values, rows, reduced, grad, *cut)
    _load.native().eigenprojector_bwd(values, rows, reduced, grad, *cut, result)
    eigh.settle_failed(result, values, grad)
    return result


@launcher("eigenprojector_fwd", device="cuda", backend="torch")
@launcher("eigenprojector_fwd", device="cpu", backend="torch")
def _(A: Tensor, k: int, largest: bool, gap_floor: float) -> tuple[Tensor, ...]:
    n = A.shape[-1]
    values, rows, info = eigh.forward_of(A)
    cut = n - k if largest else k
    few_are_low = 2 * cut <= n
    few = rows[:, :cut] if few_are_low else rows[:, cut:]
    P = few.mT @ few.conj()
    if few_are_low == largest:
        P = torch.eye(n, dtype=P.dtype, device=P.device) - P
    P = (P + P.mH) / 2
    failed = info != 0
    if 0 < cut < n:
        gap = values[:, cut] - values[:, cut - 1]
        unit, top = (x[:, 0] for x in eigh.gap_unit(values))
        closed = values[:, cut] / unit - values[:, cut - 1] / unit <= gap_floor * top
        info = info + _CUT_CLOSED * closed.to(torch.int32)
    else:
        gap = torch.full_like(values[:, 0], torch.inf)
    return (
        P.masked_fill(failed[:, None, None], torch.nan).contiguous(),
        gap.masked_fill(failed, torch.nan),
        values,
        rows,
        torch.zeros_like(info),
        info,
    )


def _decomposed(values: Tensor, rows: Tensor, reduced: Tensor, few: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, also of the matrices that the native kernel left as Q T Q^H (its text says how)."""
    n, chosen = values.shape[-1], reduced != 0
    diagonal, rows_of = values[chosen], rows[chosen]
    above = torch.triu_indices(n, n, 1)
    kept = rows_of[:, above[0], above[1]][:, few * n :]
    numbers = torch.view_as_real(kept[:, n:]).flatten(1) if kept.is_complex() else kept[:, n:]
    couplings, inverse_h, unit = numbers[:, : n - 1], numbers[:, n : 2 * n], numbers[:, 2 * n + 2 * few + 1]
    Q = torch.diag_embed(kept[:, :n])
    for i in range(2, n):
        u = rows_of[:, None, i, :i]
        Q[:, :i] -= inverse_h[:, i, None, None] * u.mH @ (u @ Q[:, :i])
    T = torch.diag_embed(diagonal) + torch.diag_embed(couplings, -1)
    w, inner, _ = eigh.forward_of(T)
    values, rows = values.clone(), rows.clone()
    values[chosen] = w * unit[:, None]
    rows[chosen] = inner.to(rows.dtype) @ Q.mT
    return values, rows


@launcher("eigenprojector_bwd", device="cuda", backend="torch")
@launcher("eigenprojector_bwd", device="cpu", backend="torch")
def _(values: Tensor, rows: Tensor, reduced: Tensor, grad: Tensor, k: int, largest: bool, gap_floor: float) -> Tensor:
    cut = values.shape[-1] - k if largest else k
    if 0 < cut < values.shape[-1] and rows.device.type == "cpu" and reduced.any():
        values, rows = _decomposed(values, rows, reduced, min(k, values.shape[-1] - k))
    unit, top = eigh.gap_unit(values)
    w, floor = values / unit, (gap_floor * top)[..., None]
    low, high = rows[:, :cut], rows[:, cut:]
    gap = w[:, None, cut:] - w[:, :cut, None]
    pairs = low.conj() @ ((grad + grad.mH) / 2) @ high.mT * (gap / (gap.square() + floor.square())) / unit[..., None]
    half = low.mT @ pairs @ high.conj()
    result = half + half.mH
    # w_i - w_j with i in S: minus the gap if S lies below the cut.
    result = result.contiguous() if largest else result.neg().contiguous()
    eigh.settle_failed(result, values, grad)
    return result


class _Eigenprojector(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, k: int, largest: bool, gap_floor: float) -> tuple[Tensor, ...]:
        return _fwd(A, k, largest, gap_floor)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, *ctx.cut = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:5])

    @staticmethod
    def backward(ctx, grad: Tensor | None, *_):
        _check.first_order(_OP)
        if grad is None:
            return (None,) * 4
        return _bwd(*ctx.saved_tensors, grad, *ctx.cut), None, None, None


def eigenprojector_ex(
    A: Tensor,  # (..., n, n)
    k: int,
    *,
    largest: bool = False,
) -> EigenprojectorEx:  # (..., n, n), (...), (...)
    r"""`eigenprojector` with the gap at its cut and a status: `(projector, gap, info)`.

    `gap` is the distance of the two eigenvalues next to the cut, >= 0; inf where there is no cut (`k` is 0 or n). It is
    not differentiable: a loss of the gap is that of two eigenvalues of `eigvalsh`. `info` (int32, one per matrix) is 0
    for success; bit 0: no convergence, bit 1: a non-finite entry in either triangle; with these the matrix's results
    are NaN. Bit 2: the cut is closed, gap at most $4 \sqrt n \epsilon$ max|w|; the projector is then one of those that
    rounding can give, and the gradient the bounded stand-in. All else is as in `eigenprojector`.
    """
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX + _check.HALF, A=A)
    n = _check.shapes(_OP, A=(A, "... n n"))["n"]
    k = _check.integer(_OP, "k", k, low=0, high=n)
    if not isinstance(largest, bool):
        raise TypeError(message(_OP, "`largest` must be a bool", type(largest).__name__))
    A = A.to(torch.float32) if A.dtype in _check.HALF else A
    flat = A.reshape(math.prod(A.shape[:-2]), n, n)
    if n == 0:
        gap = torch.full(flat.shape[:1], torch.inf, dtype=A.real.dtype, device=A.device)
        P, info = flat, torch.zeros(flat.shape[:1], dtype=torch.int32, device=A.device)
    else:
        floor = numerics.EIGENPROJECTOR_GAP_ULPS.of(A.dtype) * n**0.5
        P, gap, *_, info = apply(_Eigenprojector, flat, k, largest, floor)
    return EigenprojectorEx(P.reshape(A.shape), gap.reshape(A.shape[:-2]), info.reshape(A.shape[:-2]))


def eigenprojector(
    A: Tensor,  # (..., n, n)
    k: int,
    *,
    largest: bool = False,
) -> Tensor:  # (..., n, n)
    r"""Orthogonal projector on the `k` lowest (or largest) eigenvectors of Hermitian matrices; exact at degeneracies.

    $P = V_k V_k^H$, with $P = P^H = P^2$ and $\mathrm{tr} P = k$ up to rounding. The gradient sums over pairs of
    eigenvalues across the cut only, so eigenvalues that repeat on either side of it (a noise floor, a graph of equal
    components) cost no accuracy, where the gradient of eigenvectors is infinite.

    **Arguments:**

    - `A`: float32, float64, complex64 or complex128; any strides and batch dimensions. float16 and bfloat16 are
        computed, and returned, in float32. Not checked to be Hermitian: the lower triangle is read.
    - `k`: the rank, 0 to n.
    - `largest`: take the largest eigenvalues in place of the lowest. Keyword only.

    **Returns:** a new tensor of the same shape, Hermitian to the last bit. A matrix with a non-finite entry, or one
    that does not converge, is NaN by itself (`eigenprojector_ex` says why); its gradient is NaN, or 0 if the loss
    leaves it out (its own incoming gradient is all 0). The gradient of `A` is Hermitian. It is finite otherwise: a pair
    is weighed by at most $1/(8 \sqrt n \epsilon)$ over max|w|, and by that next to a closed cut only. At a closed cut
    it is no derivative, since there is none.

    **Raises:** `ValueError` for a matrix that is not square or `k` out of range, `TypeError` for other dtypes,
    `RuntimeError` when second derivatives are asked for.

    **Accuracy:** error of $P$ and of its gradient, relative to the largest entry: at most $8 n \epsilon$ max|w| / gap
    on the matrices of `tests/test_eigenprojector.py`; that is the conditioning of the subspace.
    **Sources:** Kato, Perturbation Theory for Linear Operators, ch. II, sec. 2.
    """
    return eigenprojector_ex(A, k, largest=largest).projector
