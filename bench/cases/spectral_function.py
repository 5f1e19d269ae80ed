"""Functions of many small Hermitian matrices."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.eigh import covariances, flops, random_graphs


def _laplacians(device: str) -> tuple[Tensor, ...]:
    return (stablekern.normalized_laplacian(random_graphs(15_360, 19, 3, device)),)


def _inverse_root(A: Tensor) -> Tensor:
    w, V = torch.linalg.eigh(A)
    return (V * w.rsqrt()[..., None, :]) @ V.mH


def _exponential(A: Tensor) -> Tensor:
    w, V = torch.linalg.eigh(A)
    return (V * w.exp()[..., None, :]) @ V.mH


# The product V f(w) V^H: half of 2 n^3 real, 8 n^3 complex flops. The backward: four products, two of them Hermitian.
_SMALL = flops(15_360, 19) + 15_360 * 19**3
_LARGE = flops(64, 144, complex_entries=True) + 64 * 4 * 144**3
_BYTES = 4.0 * 15_360 * 2 * 19**2

CASES = (
    Case(
        "spectral_function", "15360x19x19 exp", _laplacians, lambda A: stablekern.spectral_function(A, "exp"),
        "torch.matrix_exp", torch.matrix_exp, _SMALL, _BYTES, 1.9, {"fwd": 3.0, "fwd+bwd": 3.0},
    ),
    Case(
        "spectral_function", "15360x19x19 exp", _laplacians, lambda A: stablekern.spectral_function(A, "exp"),
        "torch.linalg.eigh, V exp(w) V^T", _exponential, _SMALL, _BYTES, 1.9, {"fwd": 10.0, "fwd+bwd": 10.0},
    ),
    Case(
        "spectral_function", "64x144x144 complex64 rsqrt", covariances(64, 144),
        lambda A: stablekern.spectral_function(A, "rsqrt"), "torch.linalg.eigh, V w^-1/2 V^H", _inverse_root, _LARGE,
        8.0 * 64 * 2 * 144**2, 2.5, {"fwd": 1.2, "fwd+bwd": 1.2},
    ),
)  # fmt: skip
