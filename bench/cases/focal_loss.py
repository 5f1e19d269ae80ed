"""Focal loss over ten million logits."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench import baselines
from bench.cases import Case


def _inputs(device: str) -> tuple[Tensor, Tensor]:
    return 4 * torch.randn(10**7, device=device), torch.rand(10**7, device=device).round()


def _mean(logits: Tensor, targets: Tensor) -> Tensor:
    return stablekern.focal_loss(logits, targets, reduction="mean")


def _composite_mean(logits: Tensor, targets: Tensor) -> Tensor:
    return baselines.focal_composite(logits, targets).mean()


_GATES, _BASELINE = {"fwd": 25.0, "fwd+bwd": 35.0}, "shortest composite: BCE, exp, power"

CASES = (
    # Read logits and targets; with a backward, write the derivative.
    Case(
        "focal_loss", "1e7, gamma 2, mean", _inputs, _mean, f"{_BASELINE}, mean", _composite_mean,
        10**7 * 40.0, 8.0e7, 1.5, _GATES, constant=(1,),
    ),
    Case(
        "focal_loss", "1e7, gamma 2", _inputs, stablekern.focal_loss, _BASELINE, baselines.focal_composite,
        10**7 * 40.0, 12.0e7, 7 / 3, _GATES, constant=(1,),
    ),
)  # fmt: skip
