"""`torch.diagonal(R, -2, -1)` takes an offset and an axis, not two axes: a trace with a random sign."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import stablekern
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series, largest

__all__ = ["exhibit"]

_COUNT, _N, _BETA = 64, 144, 0.3


def _normalised(R: Tensor) -> Tensor:
    """To a trace of n, as it was written: the sum is that of a lower diagonal, floored at 1e-9."""
    trace = torch.diagonal(R, -2, -1).real.sum(-1).clamp_min(1e-9)
    return R * (_N / trace)[:, None, None]


def _hermitian(R: Tensor) -> Tensor:
    return (R + R.mH) / 2


def _stock(R_pred: Tensor, R_samp: Tensor) -> Tensor:
    return _normalised((1 - _BETA) * _normalised(_hermitian(R_pred)) + _BETA * _hermitian(R_samp))


def _without_the_last(R_pred: Tensor, R_samp: Tensor) -> Tensor:
    return (1 - _BETA) * _normalised(_hermitian(R_pred)) + _BETA * _normalised(_hermitian(R_samp))


_METHODS = (
    (STOCK, "three normalisations, trace over (-2, -1) by position", _stock),
    (FIX, "the blend is not normalised, the sample covariance is", _without_the_last),
    (OURS, "covariance_blend", lambda p, s: stablekern.covariance_blend(p, s, beta=_BETA)),
)


def _covariances(rank: int, scale: float, generator: torch.Generator) -> Tensor:
    factor = torch.randn(_COUNT, _N, rank, dtype=torch.complex64, generator=generator)
    return scale * factor @ factor.mH


def exhibit() -> Exhibit:
    generator = torch.Generator().manual_seed(0)
    R_pred, R_samp = _covariances(5, 1.0, generator), _covariances(16, 1e-7, generator)
    low, high = 0.99 * math.sqrt(_N), 1.01 * _N
    rows, series = [], []
    for who, name, method in _METHODS:
        norms = torch.linalg.matrix_norm(method(R_pred, R_samp).to(torch.complex128))
        bad = int((~((norms >= low) & (norms <= high))).sum())
        case = f"covariances: norm outside [sqrt(n), n], n = {_N}"
        rows.append(Row(who, name, case, bad, _COUNT, largest(norms.tolist())))
        series.append(Series(who, name, tuple(range(1, _COUNT + 1)), tuple(norms.sort().values.tolist())))
    broken = R_pred.clone()
    broken[3], broken[5] = -broken[3], 0.0
    covariance, info = stablekern.covariance_blend_ex(broken, R_samp, beta=_BETA)
    others = [i for i in range(_COUNT) if i not in (3, 5)]
    whole = stablekern.covariance_blend(R_pred, R_samp, beta=_BETA)
    missed = int((info[[3, 5]] == 0).sum()) + int((info[others] != 0).sum())
    rows.append(
        Row(OURS, "covariance_blend_ex", "a negative and a zero trace: not reported, or a good one is", missed, _COUNT)
    )
    touched = sum(not torch.equal(covariance[i], whole[i]) for i in others)
    rows.append(Row(OURS, "covariance_blend_ex", "their neighbours in the batch: changed", touched, len(others)))
    return Exhibit(
        name="covariance_axis",
        seen="a blended covariance has the norm 3e12",
        cause="torch.diagonal(R, -2, -1) is (offset, dim1): a sub-diagonal sum of random sign, floored at 1e-9",
        published="leave out the normalisation of the blend, normalise the sample covariance instead",
        remedy="covariance_blend: the axes have names, a trace that is not positive is reported and never scaled",
        counted="a norm that no positive semidefinite matrix with the trace n has (1 % let pass)",
        measured="largest norm",
        rows=tuple(rows),
        figure=Figure(
            "covariance, sorted by norm",
            "Frobenius norm",
            tuple(series),
            f"Norms of {_COUNT} blended covariances of size {_N} that should have the trace {_N}: between 12 and 144.",
            y_log=True,
        ),
    )
