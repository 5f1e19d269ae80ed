"""Kernels that keep deep-learning training finite and fast, for PyTorch, on a CPU or an NVIDIA GPU.

`stablekern.<op>` is one autograd operation with a float64 reference, on the best backend that the machine has; the
first call of an op that has a native kernel compiles it. Importing the package compiles and loads nothing.

Beside the ops: `swap`, which puts them into code that exists; `stablekern.optim` (ComplexAdamW, GradGuard,
parameter_groups), `stablekern.nn` (layers and the EEG detector), `stablekern.eeg` (recordings), `stablekern.health`
(finite checks), `stablekern.testing` (the suite on this machine); all but the first two load on first use.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from stablekern import errors
from stablekern._memory import empty_cache
from stablekern._registry import available_backends, use_backend
from stablekern._swap import SwapReport, swap
from stablekern.ops.assemble_adjacency import assemble_adjacency
from stablekern.ops.causal_conv1d import causal_conv1d
from stablekern.ops.cayley_step import cayley_step
from stablekern.ops.cg import cg, cg_ex, select_solver
from stablekern.ops.chol_solve_safe import chol_solve_safe
from stablekern.ops.cosine_edges import cosine_edges
from stablekern.ops.covariance_blend import covariance_blend, covariance_blend_ex
from stablekern.ops.eigengap_hinge import eigengap_hinge
from stablekern.ops.eigenprojector import eigenprojector, eigenprojector_ex
from stablekern.ops.eigh import eigh, eigh_ex, eigvalsh
from stablekern.ops.finite_stats import finite_stats
from stablekern.ops.focal_loss import focal_loss
from stablekern.ops.gated_rms_norm import gated_rms_norm
from stablekern.ops.laplacian_pe import laplacian_pe, laplacian_pe_ex
from stablekern.ops.linear_scan import linear_scan
from stablekern.ops.mvdr_denominator import mvdr_denominator
from stablekern.ops.normalized_laplacian import normalized_laplacian
from stablekern.ops.ridge_lstsq import ridge_lstsq
from stablekern.ops.sample_covariance import sample_covariance
from stablekern.ops.selective_scan import selective_scan
from stablekern.ops.selective_state_update import selective_state_update
from stablekern.ops.small_cayley import small_cayley
from stablekern.ops.spectral_function import spectral_function
from stablekern.ops.ssd_scan import ssd_scan
from stablekern.ops.ssd_state_update import ssd_state_update
from stablekern.ops.subspace_residual import subspace_residual

__version__ = "0.1.0"

__all__ = [
    "SwapReport",
    "assemble_adjacency",
    "available_backends",
    "causal_conv1d",
    "cayley_step",
    "cg",
    "cg_ex",
    "chol_solve_safe",
    "cosine_edges",
    "covariance_blend",
    "covariance_blend_ex",
    "eigengap_hinge",
    "eigenprojector",
    "eigenprojector_ex",
    "eigh",
    "eigh_ex",
    "eigvalsh",
    "empty_cache",
    "errors",
    "finite_stats",
    "focal_loss",
    "gated_rms_norm",
    "laplacian_pe",
    "laplacian_pe_ex",
    "linear_scan",
    "mvdr_denominator",
    "normalized_laplacian",
    "ridge_lstsq",
    "sample_covariance",
    "select_solver",
    "selective_scan",
    "selective_state_update",
    "small_cayley",
    "spectral_function",
    "ssd_scan",
    "ssd_state_update",
    "subspace_residual",
    "swap",
    "use_backend",
]

_SUBPACKAGES = ("adapters", "eeg", "health", "nn", "optim", "testing", "training", "zoo")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"stablekern.{name}")
    raise AttributeError(f"module 'stablekern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
