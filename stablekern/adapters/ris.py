"""Functions of the radio-localisation pipeline (ris_pytorch_pipeline) by this package's ops.

    stablekern.swap("ris_pytorch_pipeline.covariance_utils")  # a module of it, or its name

| name | computed by | what differs |
|---|---|---|
| `build_effective_cov_torch` | `covariance_blend` | a trace <= 0 gives NaN for its matrix, never a factor of 1e9 |
| `build_sample_covariance_from_snapshots` | `ridge_lstsq`, `sample_covariance` | M x M systems, M antennas, for the \
N x N ones; the covariance itself where theirs is its conjugate |
| `GPUMusicEstimator._compute_spectrum_mvdr_lowrank` | `mvdr_denominator` | positive by construction, also for small \
loading |
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stablekern._swap import Known
from stablekern.ops.covariance_blend import covariance_blend
from stablekern.ops.mvdr_denominator import mvdr_denominator
from stablekern.ops.ridge_lstsq import ridge_lstsq
from stablekern.ops.sample_covariance import sample_covariance

__all__ = ["FUNCTIONS", "METHODS", "build_sample_covariance_from_snapshots", "spectrum_mvdr_lowrank"]

# Their shrinkage by signal-to-noise ratio: from that many dB on.
_SHRINK = ((15.0, 0.02), (8.0, 0.04), (3.0, 0.07), (-2.0, 0.10), (-math.inf, 0.14))


def _shrinkage(snr_db: Any, like: Tensor) -> Any:
    if snr_db is None:
        return 0.0
    if not isinstance(snr_db, Tensor):
        return next(alpha for low, alpha in _SHRINK if snr_db >= low)
    alpha = torch.full_like(snr_db, _SHRINK[-1][1], dtype=like.dtype.to_real())
    for low, value in reversed(_SHRINK[:-1]):
        alpha = torch.where(snr_db >= low, value, alpha)
    return alpha


def _effective(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    load = getattr(original, "__globals__", {}).get("C_EPS", 1e-3)  # the constant of the module that is swapped

    def build_effective_cov_torch(
        R_pred: Tensor,  # (B, N, N)
        snr_db: Any = None,  # a number or (B)
        R_samp: Tensor | None = None,
        beta: float | None = None,
        diag_load: bool = True,
        apply_shrink: bool = True,
        target_trace: float | None = None,
    ) -> Tensor:
        return covariance_blend(
            R_pred,
            R_samp if beta else None,
            beta=beta if R_samp is not None and beta else 0.0,
            shrink=_shrinkage(snr_db, R_pred) if apply_shrink else 0.0,
            loading=float(load) if diag_load else 0.0,
            target_trace=target_trace,
        )

    return build_effective_cov_torch


def build_sample_covariance_from_snapshots(
    y: Any,  # (L, M)
    H: Any,  # (M, N) or (L, M, N)
    codes: Any,  # (L, N)
    cfg: Any,
    tikhonov_alpha: float = 1e-3,
) -> np.ndarray:  # (N, N)
    """Per snapshot the ridge solution of y = H diag(c) a, with alpha tr(Phi^H Phi) / N; then the covariance of the a.

    It is the mean of (a - m)(a - m)^H, so that a = v s gives v v^H.
    """
    y, H, codes = (torch.as_tensor(np.asarray(part)).to(torch.complex128) for part in (y, H, codes))
    Phi = H * codes[:, None, :]
    ridge = tikhonov_alpha * Phi.abs().square().sum((-2, -1)) / Phi.shape[-1]
    return sample_covariance(ridge_lstsq(Phi, y, ridge), center=True, ddof=1).numpy()


def spectrum_mvdr_lowrank(self: Any, A_flat: Tensor, F: Tensor, delta_scale: float = 1e-2) -> Tensor:
    """1 / a^H (F F^H + delta tr/N I)^-1 a for the rows a (P, N) of `A_flat`, F (N, k): (P)."""
    return 1.0 / mvdr_denominator(F @ F.mH, A_flat.mT, loading=float(delta_scale))


_GEOMETRY = "the geometry of the array is part of it; see stablekern.mvdr_denominator for what it computes"
FUNCTIONS: dict[str, Known] = {
    "build_effective_cov_torch": Known(
        None,
        ("R_pred, snr_db, R_samp, beta, diag_load, apply_shrink, target_trace",),
        "a trace <= 0 gives NaN for its matrix",
        _effective,
    ),
    "build_sample_covariance_from_snapshots": Known(
        build_sample_covariance_from_snapshots,
        ("y, H, codes, cfg, tikhonov_alpha", "y, H, codes, cfg, *, tikhonov_alpha"),
        "theirs is the conjugate",
    ),
    "build_effective_cov_np": Known(None, refused="NumPy, without gradients; see stablekern.covariance_blend"),
    "detect_sources_mvdr": Known(None, refused=_GEOMETRY),
    "mvdr_spectrum_max_2_5d_lowrank": Known(None, refused=_GEOMETRY),
    "music2d_from_cov_factor": Known(None, refused=_GEOMETRY),
}
METHODS: dict[str, dict[str, Known]] = {
    "GPUMusicEstimator": {
        "_compute_spectrum_mvdr_lowrank": Known(
            spectrum_mvdr_lowrank, ("A_flat, F, delta_scale",), "positive by construction"
        ),
        "_compute_spectrum_mvdr": Known(None, refused="it is given an inverse; see stablekern.mvdr_denominator"),
    }
}
