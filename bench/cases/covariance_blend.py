"""Blended covariances of a 12 x 12 array, and the inputs that the other operations on them share."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case

BATCH, ELEMENTS, SOURCES = 64, 144, 5
LABEL = f"{BATCH} x {ELEMENTS}x{ELEMENTS} c64"
MATRICES = 8.0 * BATCH * ELEMENTS**2  # bytes


def normal(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(3)).to(device)


def covariances(device: str) -> Tensor:
    """A few sources in noise, from more snapshots than elements."""
    X = normal(device, BATCH, 2 * ELEMENTS, ELEMENTS)
    return X.mT @ X.conj() / X.shape[1]


def _inputs(device: str) -> tuple[Tensor, ...]:
    R = covariances(device)
    return R, R.flip(0).contiguous()


def _composite(R_pred: Tensor, R_samp: Tensor) -> Tensor:
    def scaled(R):
        R = (R + R.mH) / 2
        return R * (R.shape[-1] / R.diagonal(dim1=-2, dim2=-1).real.sum(-1))[:, None, None]

    eye = torch.eye(R_pred.shape[-1], dtype=R_pred.dtype, device=R_pred.device)
    R = scaled(0.7 * scaled(R_pred) + 0.3 * scaled(R_samp))
    return 0.9 * scaled(R + eye) + 0.1 * eye


def _ours(R_pred: Tensor, R_samp: Tensor) -> Tensor:
    return stablekern.covariance_blend(R_pred, R_samp, beta=0.3, loading=1.0, shrink=0.1)


CASES = (
    Case(
        "covariance_blend", LABEL, _inputs, _ours, "shortest composite: scale, blend, load, shrink", _composite,
        20.0 * BATCH * ELEMENTS**2, 3 * MATRICES, 2.0, {"fwd": 5.0, "fwd+bwd": 5.0}, constant=(1,),
    ),
)  # fmt: skip
