"""Sample covariances of 64 snapshots, normalised to their trace."""

from __future__ import annotations

from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.covariance_blend import BATCH, ELEMENTS, LABEL, MATRICES, normal

_SNAPSHOTS = 64


def _composite(X: Tensor) -> Tensor:
    R = X.mT @ X.conj() / X.shape[-2]
    return R * (R.shape[-1] / R.diagonal(dim1=-2, dim2=-1).real.sum(-1))[:, None, None]


CASES = (
    Case(
        "sample_covariance", LABEL, lambda device: (normal(device, BATCH, _SNAPSHOTS, ELEMENTS),),
        lambda X: stablekern.sample_covariance(X, target_trace=float(ELEMENTS)), "matmul, trace, scale", _composite,
        # Half of a Hermitian product's entries, 8 flops a term.
        4.0 * BATCH * _SNAPSHOTS * ELEMENTS**2, MATRICES * (1 + _SNAPSHOTS / ELEMENTS), 3.0,
        {"fwd": 1.0, "fwd+bwd": 1.5},
    ),
)  # fmt: skip
