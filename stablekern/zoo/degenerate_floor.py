"""Losses of eigenvalues are always finite; those of eigenvectors on a degenerate noise floor are not."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series, largest, spread

__all__ = ["exhibit"]

_COUNT, _N, _SOURCES = 32, 48, 3


def _covariances(spread_of_floor: float, count: int) -> Tensor:
    """Three strong sources on a floor of ones whose eigenvalues lie within `spread_of_floor`; 0: all equal."""
    generator = torch.Generator().manual_seed(0)
    powers = torch.ones(count, _N, dtype=torch.float64)
    powers[:, _SOURCES:] += spread_of_floor * torch.rand(count, _N - _SOURCES, generator=generator, dtype=torch.float64)
    powers[:, :_SOURCES] = torch.tensor([40.0, 25.0, 15.0], dtype=torch.float64)
    # An axis-aligned floor keeps its eigenvalues exactly equal in float32 too; the sources mix the first axes only.
    mixed = torch.linalg.qr(torch.randn(count, 8, 8, generator=generator, dtype=torch.complex128)).Q
    basis = torch.eye(_N, dtype=torch.complex128).repeat(count, 1, 1)
    basis[:, :8, :8] = mixed
    return (basis * powers[:, None, :]) @ basis.mH


def _cotangent(count: int) -> Tensor:
    G = torch.randn(count, _N, _N, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))
    return G + G.mH


def _exact(R: Tensor, G: Tensor) -> Tensor:
    """The gradient of Re tr(G P) in float64, from pairs across the cut alone."""
    w, V = torch.linalg.eigh(R)
    noise, signal = V[..., :-_SOURCES], V[..., -_SOURCES:]
    gaps = w[..., -_SOURCES:, None] - w[..., None, :-_SOURCES]
    half = signal @ ((signal.mH @ G @ noise) / gaps) @ noise.mH
    return half + half.mH


def _by_eigh(R: Tensor) -> Tensor:
    V = torch.linalg.eigh(R).eigenvectors[..., -_SOURCES:]
    return V @ V.mH


def _by_svd(R: Tensor) -> Tensor:
    U = torch.linalg.svd(R).U[..., :_SOURCES]
    return U @ U.mH


_METHODS = (
    (STOCK, "torch.linalg.eigh, V V^H", _by_eigh),
    (FIX, "torch.linalg.svd, U U^H", _by_svd),
    (OURS, "eigenprojector", lambda R: stablekern.eigenprojector(R, _SOURCES, largest=True)),
)


def _gradient(method, R: Tensor, G: Tensor) -> Tensor:
    leaf = R.to(torch.complex64).requires_grad_()
    value = (method(leaf) * G.to(torch.complex64).conj()).real.sum()
    gradient = torch.autograd.grad(value, leaf)[0].to(torch.complex128)
    return (gradient + gradient.mH) / 2


def _error(method, R: Tensor, G: Tensor) -> Tensor:
    """The relative error of each gradient; NaN where it is not finite."""
    exact = _exact(R, G)
    return torch.linalg.matrix_norm(_gradient(method, R, G) - exact) / torch.linalg.matrix_norm(exact)


def _eigenvalue_loss(R: Tensor) -> int:
    """How many gradients of the gap between the third and the fourth eigenvalue are not finite."""
    leaf = R.to(torch.complex64).requires_grad_()
    w = torch.linalg.eigvalsh(leaf)
    gradient = torch.autograd.grad((w[:, -_SOURCES] - w[:, -_SOURCES - 1]).sum(), leaf)[0]
    return sum(not bool(g.isfinite().all()) for g in torch.view_as_real(gradient))


def exhibit() -> Exhibit:
    R, G = _covariances(0.0, _COUNT), _cotangent(_COUNT)
    rows = [
        Row(STOCK, "torch.linalg.eigvalsh", "the gap loss that was blamed, equal floor", _eigenvalue_loss(R), _COUNT)
    ]
    for who, name, method in _METHODS:
        error = _error(method, R, G)
        bad = int((~(error <= 1)).sum())
        rows.append(Row(who, name, "signal projector, equal floor", bad, _COUNT, largest(error.tolist())))
        if who == STOCK:
            rows.append(Row(FIX, "the gap loss switched off", "signal projector, equal floor", bad, _COUNT, None))
    widths = spread(1e-8, 0.1, 22)
    series = []
    for who, name, method in _METHODS:
        errors = (_error(method, _covariances(width, 8), _cotangent(8)) for width in widths)
        series.append(Series(who, name, tuple(widths), tuple(float((~(error <= 1)).sum()) for error in errors)))
    return Exhibit(
        name="degenerate_floor",
        seen="the loss is finite, the gradients are NaN; a loss of eigenvalue gaps is blamed",
        cause="the eigenvectors: noise eigenvalues are equal, and 1 / gap is infinite; eigenvalues have no such term",
        published="switch the gap loss off; take the SVD instead of eigh",
        remedy="eigenprojector: only pairs across the cut enter the gradient",
        counted="the gradient is not finite, or off by more than its own size against float64",
        measured="largest finite relative error",
        rows=tuple(rows),
        figure=Figure(
            "width of the noise floor's eigenvalues",
            "gradients not finite or off, of 8",
            tuple(series),
            f"Projector on {_SOURCES} sources of {_N} x {_N} covariances in complex64: gradients not finite, or "
            "off by more than their own size, against the formula in complex128.",
            x_log=True,
        ),
    )
