"""Projectors on a few eigenvectors."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.eigh import covariances, flops, random_graphs

_RANK = 3


def _through_eigenvectors(A: Tensor) -> Tensor:
    V = torch.linalg.eigh(A).eigenvectors[..., :_RANK]
    return V @ V.mH


def _laplacians(device: str) -> tuple[Tensor, ...]:
    return (stablekern.normalized_laplacian(random_graphs(15_360, 19, 3, device)),)


# The least to spend: tridiagonalise, 16/3 n^3 complex; k vectors of T, their way back and product n^2 k.
_COMPLEX = 64 * (16 / 3 * 144**3 + 3 * 8 * _RANK * 144**2)

CASES = (
    Case(
        "eigenprojector", "64x144x144 complex64, k=3", covariances(64, 144),
        lambda A: stablekern.eigenprojector(A, _RANK), "torch.linalg.eigh, V_k V_k^H", _through_eigenvectors, _COMPLEX,
        8.0 * 64 * 2 * 144**2, 1.1, {"fwd+bwd": 4.0},
    ),
    Case(
        "eigenprojector", "15360x19x19, k=3", _laplacians, lambda A: stablekern.eigenprojector(A, _RANK),
        "torch.linalg.eigh, V_k V_k^H", _through_eigenvectors, flops(15_360, 19), 4.0 * 15_360 * 2 * 19**2, 1.3,
        {"fwd+bwd": 10.0},
    ),
)  # fmt: skip
