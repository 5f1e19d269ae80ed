r"""The share of a covariance outside the span of given steering vectors, without an eigenvector and in factored form.

With unit columns $U = A\,\mathrm{diag}(1/\|a_k\|)$ and the ridge projector $P = U (U^H U + \rho I)^{-1} U^H$,

$$r = \frac{\|(I - P)\,R\,(I - P)\|_F^2}{\|R\|_F^2} \in [0, 1].$$

The subspace comes from known steering vectors, not from the eigenvectors of $R$, so no gap stands in a denominator;
the ridge bounds the gradient where two sources are nearly parallel. $P = U V$ with $V = (U^H U + \rho I)^{-1} U^H$, a
K x K system, so $(I - P) R (I - P)$ costs four products of n x n by n x K, and no n x n projector is built.
$r$ does not depend on the scale of $R$, which is divided by its largest modulus first.

Source: Krim and Viberg 1996, "Two decades of array signal processing research", sec. on subspace fitting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check, numerics
from stablekern.errors import message
from stablekern.ops.chol_solve_safe import components, factor, squared_modulus

__all__ = ["subspace_residual"]

_OP = "subspace_residual"


def reference(R: Tensor, A: Tensor, mask: Tensor | None = None, *, ridge: float | None = None) -> Tensor:
    """The definition, with the projector itself."""
    ridge = numerics.SUBSPACE_RIDGE.of() if ridge is None else ridge
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    kept = torch.ones(A.shape[:-2] + A.shape[-1:], dtype=torch.bool) if mask is None else mask
    U = torch.where(kept[..., None, :], A / torch.linalg.vector_norm(A, dim=-2, keepdim=True), 0.0)
    gram = U.mH @ U + ridge * torch.eye(A.shape[-1], dtype=R.dtype, device=R.device)
    outside = eye - U @ torch.linalg.solve(gram, U.mH)
    return ((outside @ R @ outside).abs().square().sum((-2, -1))) / R.abs().square().sum((-2, -1))


def subspace_residual(
    R: Tensor,  # (..., n, n)
    A: Tensor,  # (..., n, K)
    mask: Tensor | None = None,  # (..., K) bool
    *,
    ridge: float | None = None,
) -> Tensor:  # (...), real
    r"""$\|(I - P) R (I - P)\|_F^2 / \|R\|_F^2$, $P$ the ridge projector on the columns of `A`; per item, in [0, 1].

    **Arguments:**

    - `R`: matrices, float32, float64, complex64 or complex128; taken as they are, Hermitian or not.
    - `A`: steering vectors as columns, of any length; same dtype, device and batch dimensions. A zero column counts as
        masked.
    - `mask`: which columns are there; None is all. A masked column gets no gradient, and may hold anything finite.
    - `ridge`: $\rho$ > 0, relative to the unit columns; None is 1e-4. Keyword only.

    **Returns:** one real number per item: 0 for $R$ inside the span (up to $\rho^2$ to $\rho^4$), 1 if no column is
    there. An item where `R` is zero or not finite is NaN by itself, with a gradient of 0. Differentiable with respect
    to `R` and `A`, any order; the gradient of `A` goes like $1/\|a_k\|$.

    **Raises:** `ValueError` for shapes that do not fit or `ridge` <= 0, `TypeError` for other dtypes.

    **Accuracy:** absolute error of about $n \epsilon$, and $\epsilon / \rho$ for parallel columns.
    **Source:** see the module's text.
    """
    _check.required(_OP, R=R, A=A)
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, R=R, A=A)
    sizes = _check.shapes(_OP, R=(R, "... n n"), A=(A, "... n k"))
    if A.shape[:-2] != R.shape[:-2]:
        rule = "`A` must have the batch dimensions of `R`"
        raise ValueError(message(_OP, rule, tuple(A.shape[:-2]), tuple(R.shape[:-2])))
    if mask is not None:
        _check.dtypes(_OP, (torch.bool,), mask=mask)
        if mask.shape != (*A.shape[:-2], sizes["k"]):
            rule = "`mask` must have one entry per column of `A`"
            raise ValueError(message(_OP, rule, tuple(mask.shape), tuple(A.shape)))
    ridge = numerics.SUBSPACE_RIDGE.of() if ridge is None else _check.number(_OP, "ridge", ridge, low=0.0, strict=True)
    if sizes["n"] == 0:
        return squared_modulus(R).sum((-2, -1)) * torch.nan
    longest = A.detach().abs().amax(-2, keepdim=True)
    kept = longest > 0 if mask is None else (longest > 0) & mask[..., None, :]
    U = torch.where(kept, A, 1.0) / torch.where(kept, longest, 1.0)
    U = torch.where(kept, U / squared_modulus(U).sum(-2, keepdim=True).sqrt(), 0.0)
    eye = torch.eye(sizes["k"], dtype=A.dtype, device=A.device)
    found = factor(U.mH @ U + ridge * eye)
    V, unusable = found.solve(U.mH), found.failed()
    # Held constant: the result does not depend on it.
    largest = components(R.detach()).abs().flatten(R.dim() - 2).amax(-1)[..., None, None]
    lost = ~(largest > 0) | ~torch.isfinite(largest)
    S = torch.where(lost, 1.0, R) / torch.where(lost, 1.0, largest)
    half = S - U @ (V @ S)
    rest = half - (half @ U) @ V
    share = squared_modulus(rest).sum((-2, -1)) / squared_modulus(S).sum((-2, -1))
    return share.masked_fill(lost[..., 0, 0] | unusable, torch.nan)
