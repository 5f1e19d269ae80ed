"""`torch.linalg.eigh` and `eigvalsh` by the ops of the same names, with the arguments of torch.

    with stablekern.swap("torch.linalg"):
        w, V = torch.linalg.eigh(A)  # finite gradients at repeated eigenvalues

What ours does not do goes to torch as before, and is counted in the report: `out=`, tensor subclasses with functions of
their own, `torch.func` transforms and forward-mode derivatives, other devices and dtypes, and misuse, so that its
errors are torch's. What differs: a matrix that cannot be decomposed is NaN by itself where torch raises `LinAlgError`,
the largest component of each eigenvector is positive, and second derivatives raise `RuntimeError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from stablekern import _check, _swap
from stablekern.ops.eigh import eigh as _eigh
from stablekern.ops.eigh import eigvalsh as _eigvalsh

__all__ = ["eigh", "eigvalsh"]

# This module is imported before its first swap: never a stand-in.
_EIGH, _EIGVALSH = torch.linalg.eigh, torch.linalg.eigvalsh


def _not_ours(A: Any, UPLO: Any, out: Any) -> str | None:
    """Why torch must do it, or None."""
    if out is not None:
        return "`out=` is given"
    if not isinstance(A, Tensor) or torch.overrides.has_torch_function_unary(A):
        return "a tensor of another kind"
    if A.dtype not in _check.REAL + _check.COMPLEX:
        return f"dtype {A.dtype}"
    if A.device.type not in ("cpu", "cuda"):
        return f"device {A.device.type}"
    if A.dim() < 2 or A.shape[-1] != A.shape[-2] or UPLO not in ("L", "U", "l", "u"):
        return "arguments that torch refuses"
    if not torch.compiler.is_compiling():
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "a torch.func transform"
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(A).tangent is not None:
            return "a forward-mode derivative"
    return None


def _by_torch(function: Callable[..., Any], reason: str, A: Any, UPLO: Any, out: Any) -> Any:
    _swap.fallen[reason] += 1
    given = {} if UPLO == "L" else {"UPLO": UPLO}  # an implementation of a subclass need not know it
    return function(A, **given) if out is None else function(A, **given, out=out)


@functools.wraps(_EIGH)
def eigh(A: Tensor, UPLO: str = "L", *, out: Any = None) -> Any:
    if reason := _not_ours(A, UPLO, out):
        return _by_torch(_EIGH, f"torch.linalg.eigh: {reason}", A, UPLO, out)
    return _eigh(A, UPLO.upper())


@functools.wraps(_EIGVALSH)
def eigvalsh(A: Tensor, UPLO: str = "L", *, out: Any = None) -> Tensor:
    if reason := _not_ours(A, UPLO, out):
        return _by_torch(_EIGVALSH, f"torch.linalg.eigvalsh: {reason}", A, UPLO, out)
    return _eigvalsh(A, UPLO.upper())


for _function in (eigh, eigvalsh):  # `wraps` has copied torch's
    _function.__module__, _function.__qualname__ = __name__, _function.__name__.removeprefix("linalg_")

_NOTE = "no LinAlgError but NaN for that matrix; fixed signs; no second derivatives"
PAIRS = ((_EIGH, eigh, _NOTE), (_EIGVALSH, eigvalsh, _NOTE))


def swap_library(report: _swap.SwapReport) -> None:
    for name, (original, stand_in, note) in zip(("eigh", "eigvalsh"), PAIRS, strict=True):
        if getattr(torch.linalg, name) is stand_in:
            report.leave(f"torch.linalg.{name}", "swapped already")
        else:
            report.everywhere(f"torch.linalg.{name}", original, stand_in, note)
    for name, reason in {
        "eig, eigvals": "for matrices that are not Hermitian; stablekern has no such op",
        "svd, qr": "their gradients at repeated singular values are not finite; see stablekern.eigenprojector",
        "cholesky, solve, lstsq": "other functions than stablekern's; see chol_solve_safe, cg, ridge_lstsq",
    }.items():
        report.leave(f"torch.linalg.{name}", reason)
