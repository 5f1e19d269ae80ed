"""Normalised Laplacians of a batch of windows."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from bench.cases.eigh import random_graphs


def _chain(adjacency: Tensor) -> Tensor:
    """degree -> rsqrt, 0 for isolated nodes -> I - D^-1/2 A D^-1/2."""
    degree = adjacency.sum(-1)
    scale = torch.where(degree > 0, degree.clamp_min(torch.finfo(adjacency.dtype).tiny).rsqrt(), 0.0)
    eye = torch.eye(adjacency.shape[-1], dtype=adjacency.dtype, device=adjacency.device)
    return eye - scale[..., :, None] * adjacency * scale[..., None, :]


_ENTRIES = 15_360 * 19**2

CASES = (
    Case(
        "normalized_laplacian", "15360x19x19 top-3", lambda device: (random_graphs(15_360, 19, 3, device),),
        stablekern.normalized_laplacian, "sum, rsqrt, I - D^-1/2 A D^-1/2", _chain, 6.0 * _ENTRIES, 8.0 * _ENTRIES, 2.5,
        {"fwd+bwd": 1.1},
    ),
)  # fmt: skip
