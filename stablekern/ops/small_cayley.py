r"""The Cayley transform of small matrices, which makes unitary blocks out of free parameters.

$$U = (I + A)^{-1} (I - A) = 2 (I + A)^{-1} - I.$$

For a skew-Hermitian $A = -A^H$, $U$ is unitary (for a real one, a rotation without the eigenvalue -1), and $I + A$ has
no singular value below 1. Nothing else is assumed of $A$: rows are exchanged where a pivot is small.

**Adjoint.** With $W = U + I = 2 (I + A)^{-1}$, a change $\delta A$ moves $U$ by $-\tfrac12 W\, \delta A\, W$, so the
gradient is $-\tfrac12 W^H G W^H$: two products with what the forward pass returned, and no second factorisation.

Sources: Cayley 1846; Helfrich, Willmott & Ye 2018, arXiv:1707.09520 (as a parametrisation, and its gradient).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stablekern import _check, _load
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher

__all__ = ["small_cayley"]

_OP = "small_cayley"
# The largest matrix that fits a core's cache with one matrix to a lane.
_MOST = 32


def reference(A: Tensor) -> Tensor:
    """The definition: one solve per matrix, differentiable, in the dtype of its argument."""
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve(eye + A, eye - A)


def _fake_fwd(A: Tensor) -> Tensor:
    return empty(A.shape, A)


def _fake_bwd(grad: Tensor, U: Tensor) -> Tensor:
    return empty(U.shape, U)


_fwd = define("small_cayley_fwd(Tensor A) -> Tensor", fake=_fake_fwd)
_bwd = define("small_cayley_bwd(Tensor grad, Tensor U) -> Tensor", fake=_fake_bwd)


def _small(*tensors: Tensor) -> str | None:
    n = tensors[0].shape[-1]
    return None if n <= _MOST else f"n = {n} > {_MOST}"


def _plain(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous()


@launcher("small_cayley_fwd", device="cpu", backend="native", supports=_small)
def _(A):
    U = _fake_fwd(A)
    _load.native().small_cayley_fwd(_plain(A), U)
    return U


@launcher("small_cayley_bwd", device="cpu", backend="native", supports=_small)
def _(grad, U):
    grad_A = _fake_bwd(grad, U)
    _load.native().small_cayley_bwd(_plain(grad), _plain(U), grad_A)
    return grad_A


@launcher("small_cayley_fwd", device="cuda", backend="torch")
@launcher("small_cayley_fwd", device="cpu", backend="torch")
def _(A):
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    return torch.linalg.solve_ex(eye + A, eye - A)[0].contiguous()


@launcher("small_cayley_bwd", device="cuda", backend="torch")
@launcher("small_cayley_bwd", device="cpu", backend="torch")
def _(grad, U):
    W = (U + torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)).mH
    return ((W @ grad @ W) / -2).contiguous()


class _SmallCayley(torch.autograd.Function):
    @staticmethod
    def forward(A):
        return _fwd(A)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        _check.first_order(_OP)
        return _bwd(grad, *ctx.saved_tensors)


def small_cayley(
    A: Tensor,  # (..., n, n)
) -> Tensor:  # (..., n, n)
    r"""$(I + A)^{-1} (I - A)$ for every matrix of a batch: unitary where $A$ is skew-Hermitian.

    Made for many small blocks (8 x 8, 16 x 16): up to n = 32 the CPU kernel holds one matrix in each SIMD lane.

    **Arguments:** `A`, (..., n, n), float32, float64, complex64 or complex128, any strides; the batch and n may be 0.

    **Returns:** $U$, a new contiguous tensor like `A`. A matrix with an entry that is not finite, or a singular $I + A$
    (there is none for a skew-Hermitian $A$), gives a result that is not finite, and changes no other one.

    **Raises:** `ValueError` if the matrices are not square, `TypeError` for dtypes, `RuntimeError` when second
    derivatives are asked for.

    **Accuracy:** $U$ and the gradient at most twice the error of `torch.linalg.solve` in the same dtype, and 16 ulp
    (`tests/test_ops.py`). **Sources:** Helfrich, Willmott & Ye 2018, arXiv:1707.09520.
    """
    _check.required(_OP, A=A)
    n = _check.shapes(_OP, A=(A, "... n n"))["n"]
    _check.dtypes(_OP, _check.REAL + _check.COMPLEX, A=A)
    return apply(_SmallCayley, A.reshape(math.prod(A.shape[:-2]), n, n)).reshape(A.shape)
