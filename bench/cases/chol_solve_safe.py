"""Solutions with 45 right-hand sides per covariance."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.covariance_blend import BATCH, ELEMENTS, LABEL, MATRICES, SOURCES, covariances, normal

_COLUMNS = 9 * SOURCES


def _composite(R: Tensor, A: Tensor) -> Tensor:
    return torch.cholesky_solve(A, torch.linalg.cholesky((R + R.mH) / 2))


CASES = (
    Case(
        "chol_solve_safe", LABEL, lambda device: (covariances(device), normal(device, BATCH, ELEMENTS, _COLUMNS)),
        lambda R, A: stablekern.chol_solve_safe(R, A).solution, "torch.linalg.cholesky, cholesky_solve", _composite,
        4.0 * BATCH * (ELEMENTS**3 / 3 + 2 * ELEMENTS**2 * _COLUMNS), MATRICES * (1 + 2 * _COLUMNS / ELEMENTS), 2.0,
        {"fwd": 1.0, "fwd+bwd": 2.3},
    ),
)  # fmt: skip
