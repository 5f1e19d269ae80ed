"""MVDR denominators at 45 points: a 3 x 3 stencil around each of five sources."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.covariance_blend import BATCH, ELEMENTS, LABEL, MATRICES, SOURCES, covariances, normal

_POINTS, _LOADING = 9 * SOURCES, 1e-2


def _composite(R: Tensor, A: Tensor) -> Tensor:
    mean = R.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
    inverse = torch.linalg.inv((R + R.mH) / 2 + _LOADING * mean[:, None, None] * eye)
    return (A.conj() * (inverse @ A)).sum(-2).real


CASES = (
    Case(
        "mvdr_denominator", LABEL, lambda device: (covariances(device), normal(device, BATCH, ELEMENTS, _POINTS)),
        lambda R, A: stablekern.mvdr_denominator(R, A, _LOADING), "torch.linalg.inv, product, sum", _composite,
        # Cholesky n^3 / 3 and a triangular solve n^2 p, of 4 flops on average.
        4.0 * BATCH * (ELEMENTS**3 / 3 + ELEMENTS**2 * _POINTS), MATRICES * (1 + _POINTS / ELEMENTS), 3.0,
        {"fwd": 1.5, "fwd+bwd": 1.5},
    ),
)  # fmt: skip
