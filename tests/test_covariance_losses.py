"""The example of the localisation losses: finite gradients, a loss that falls, and eigenvectors that have neither."""

from __future__ import annotations

import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "covariance_losses.py"


def test_the_losses_fall_with_finite_gradients():
    spec = importlib.util.spec_from_file_location("covariance_losses", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.train(10)
    assert found["non_finite_ours"] == 0
    assert found["loss_after"] < found["loss_before"]
