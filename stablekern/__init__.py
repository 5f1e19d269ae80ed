"""Kernels that keep deep-learning training finite and fast, for PyTorch, on a CPU or an NVIDIA GPU.

`stablekern.<op>` is one autograd operation with a float64 reference, on the best backend that the machine has; the
first call of an op that has a native kernel compiles it. Importing the package compiles and loads nothing.

Beside the ops: `stablekern.optim` (ComplexAdamW, GradGuard, parameter_groups), `stablekern.nn` (layers and the EEG
detector), `stablekern.eeg` (recordings), `stablekern.health` (finite checks); the last three load on first use.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from stablekern import errors
from stablekern._registry import available_backends, use_backend
from stablekern.ops.assemble_adjacency import assemble_adjacency
from stablekern.ops.cosine_edges import cosine_edges
from stablekern.ops.eigenprojector import eigenprojector, eigenprojector_ex
from stablekern.ops.eigh import eigh, eigh_ex, eigvalsh
from stablekern.ops.finite_stats import finite_stats
from stablekern.ops.focal_loss import focal_loss
from stablekern.ops.laplacian_pe import laplacian_pe, laplacian_pe_ex
from stablekern.ops.normalized_laplacian import normalized_laplacian
from stablekern.ops.ssd_scan import ssd_scan

__version__ = "0.1.0"

__all__ = [
    "assemble_adjacency",
    "available_backends",
    "cosine_edges",
    "eigenprojector",
    "eigenprojector_ex",
    "eigh",
    "eigh_ex",
    "eigvalsh",
    "errors",
    "finite_stats",
    "focal_loss",
    "laplacian_pe",
    "laplacian_pe_ex",
    "normalized_laplacian",
    "ssd_scan",
    "use_backend",
]

_SUBPACKAGES = ("eeg", "health", "nn", "optim", "training")


def __getattr__(name: str) -> ModuleType:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"stablekern.{name}")
    raise AttributeError(f"module 'stablekern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBPACKAGES])
