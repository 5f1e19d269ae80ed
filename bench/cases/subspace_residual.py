"""The share of a covariance outside the span of the true steering vectors."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.covariance_blend import BATCH, ELEMENTS, LABEL, MATRICES, SOURCES, covariances, normal
from stablekern import numerics


def _composite(R: Tensor, A: Tensor) -> Tensor:
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    P = A @ torch.linalg.solve(A.mH @ A + numerics.SUBSPACE_RIDGE.of() * eye, A.mH)
    outside = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device) - P
    rest = outside @ R @ outside
    return rest.abs().square().sum((-2, -1)) / R.abs().square().sum((-2, -1))


CASES = (
    Case(
        "subspace_residual", LABEL, lambda device: (covariances(device), normal(device, BATCH, ELEMENTS, SOURCES)),
        stablekern.subspace_residual, "the projector, two products, norms", _composite,
        4 * 8.0 * BATCH * ELEMENTS**2 * SOURCES, MATRICES, 3.0, {"fwd": 1.0, "fwd+bwd": 1.4},
    ),
)  # fmt: skip
