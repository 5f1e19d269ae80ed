"""Edge features of a batch of windows."""

from __future__ import annotations

import torch

import stablekern
from bench import baselines
from bench.cases import Case

CASES = (
    Case(
        "cosine_edges", "(4,19,960,64)", lambda device: (torch.randn(4, 19, 960, 64, device=device),),
        stablekern.cosine_edges, "einsum chain", baselines.cosine_einsum,
        4 * 960 * 2.0 * 64 * 190, 4.0 * 4 * 960 * (19 * 64 + 171), 3.0, {"fwd": 7.0, "fwd+bwd": 11.0},
    ),
)  # fmt: skip
