"""Ridge solutions for 144 unknowns from 16 measurements, 16 snapshots for each of 64 samples."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.covariance_blend import BATCH, ELEMENTS, normal

_MEASUREMENTS, _SYSTEMS, _RIDGE = 16, 16 * BATCH, 0.1


def _composite(Phi: Tensor, y: Tensor) -> Tensor:
    eye = torch.eye(Phi.shape[-1], dtype=Phi.dtype, device=Phi.device)
    return torch.linalg.solve(Phi.mH @ Phi + _RIDGE * eye, (Phi.mH @ y[..., None]))[..., 0]


CASES = (
    Case(
        "ridge_lstsq", f"{_SYSTEMS} x {_MEASUREMENTS}x{ELEMENTS} c64",
        lambda device: (normal(device, _SYSTEMS, _MEASUREMENTS, ELEMENTS), normal(device, _SYSTEMS, _MEASUREMENTS)),
        lambda Phi, y: stablekern.ridge_lstsq(Phi, y, _RIDGE), "normal equations, torch.linalg.solve", _composite,
        4.0 * _SYSTEMS * _MEASUREMENTS**2 * ELEMENTS, 8.0 * _SYSTEMS * _MEASUREMENTS * ELEMENTS, 3.0,
        {"fwd": 10.0, "fwd+bwd": 7.0},
    ),
)  # fmt: skip
