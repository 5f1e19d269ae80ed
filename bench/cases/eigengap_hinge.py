"""The hinge on the eigenvalue gap after the number of sources."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.covariance_blend import BATCH, ELEMENTS, LABEL, MATRICES, SOURCES, covariances

_MARGIN = 10.0  # active everywhere


def _composite(R: Tensor) -> Tensor:
    w = torch.linalg.eigh((R + R.mH) / 2).eigenvalues
    return torch.relu(_MARGIN - (w[:, -SOURCES] - w[:, -SOURCES - 1]))


CASES = (
    Case(
        "eigengap_hinge", LABEL, lambda device: (covariances(device),),
        lambda R: stablekern.eigengap_hinge(R, SOURCES, _MARGIN), "torch.linalg.eigh, difference, relu", _composite,
        # Tridiagonal form: 4/3 n^3 complex operations, of 4 flops on average.
        16 / 3 * BATCH * ELEMENTS**3, MATRICES, 2.0, {"fwd": 1.1, "fwd+bwd": 1.0},
    ),
)  # fmt: skip
