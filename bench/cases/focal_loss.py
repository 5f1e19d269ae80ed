"""Focal loss over ten million logits."""

from __future__ import annotations

import torch

import stablekern
from bench import baselines
from bench.cases import Case

CASES = (
    Case(
        "focal_loss", "1e7, gamma 2",
        lambda device: (4 * torch.randn(10**7, device=device), torch.rand(10**7, device=device).round()),
        stablekern.focal_loss, "shortest composite: BCE, exp, power", baselines.focal_composite,
        10**7 * 40.0, 12.0e7, 7 / 3, {"fwd": 25.0, "fwd+bwd": 35.0}, constant=(1,),
    ),
)  # fmt: skip
