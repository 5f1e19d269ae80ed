"""Positional encodings of a batch of windows."""

from __future__ import annotations

import stablekern
from bench import baselines
from bench.cases import Case
from bench.cases.eigh import flops, random_graphs

CASES = (
    Case(
        "laplacian_pe", "3840x19x19 top-3, k=16",
        lambda device: (random_graphs(3840, 19, 3, device).reshape(4, 960, 19, 19),),
        lambda a: stablekern.laplacian_pe(a, 16), "degree, Laplacian, torch.linalg.eigh, sign chain",
        lambda a: baselines.laplacian_pe_chain(a, 16), flops(3840, 19), 4.0 * 3840 * (361 + 19 * 16), 2.0,
        {"fwd+bwd": 15.0},
    ),
)  # fmt: skip
