"""Why training goes NaN: each cause reproduced with plain PyTorch, what was published against it, and what removes it.

`stablekern zoo` on the command line. Each exhibit counts: how often it goes wrong as people write it, with the fix that
was published, and with the op of this package. All data are synthetic and made here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from stablekern.zoo import (
    cayley_solver,
    cosine_gradient,
    covariance_axis,
    degenerate_floor,
    focal_half,
    langevin_noise,
    poisoned_weights,
    repeated_eigenvalues,
    state_clamp,
)
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit

__all__ = ["EXHIBITS", "FIX", "OURS", "STOCK", "Exhibit", "run"]

EXHIBITS: dict[str, Callable[[], Exhibit]] = {
    module.__name__.rpartition(".")[2]: module.exhibit
    for module in (
        repeated_eigenvalues,
        poisoned_weights,
        cosine_gradient,
        state_clamp,
        langevin_noise,
        cayley_solver,
        covariance_axis,
        degenerate_floor,
        focal_half,
    )
}


def run(names: Iterable[str] | None = None) -> Iterator[Exhibit]:
    """The exhibits of these names, or all, one after the other. Torch's random numbers are left alone."""
    for name in EXHIBITS if names is None else names:
        start = time.perf_counter()
        found = EXHIBITS[name]()
        yield replace(found, seconds=time.perf_counter() - start)
