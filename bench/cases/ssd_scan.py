"""The Mamba-2 scan at the sizes of the detector's streams."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import stablekern
from bench import baselines
from bench.cases import Case
from stablekern.ops import ssd_scan as spine


def _ssd_inputs(b: int, l: int, h: int, p: int, n: int) -> Callable[[str], tuple[Tensor, ...]]:  # noqa: E741 (l is length)
    def make(device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(2)
        x = torch.randn(b, l, h, p, generator=g)
        dt = 1e-3 + 0.1 * torch.rand(b, l, h, generator=g)
        a = -1 - 15 * torch.rand(h, generator=g)
        bc = [torch.randn(b, l, 1, n, generator=g) for _ in range(2)]
        return tuple(t.to(device) for t in (x, dt, a, *bc))

    return make


def _ssd_case(
    shape: tuple[int, ...],
    baseline_name: str,
    baseline: Callable[..., Any],
    gates: dict[str, float],
    clamp: float | None = None,
) -> Case:
    b, length, h, p, n = shape
    state = float(b * length * h * p * n)
    name = f"({b},{length},{h},{p}) n={n}" + ("" if clamp is None else f" clamp={clamp:g}")
    ours = stablekern.ssd_scan if clamp is None else functools.partial(stablekern.ssd_scan, state_clamp=clamp)
    return Case(
        "ssd_scan", name, _ssd_inputs(*shape), ours, baseline_name, baseline,
        # a*h + u*B and C.h: 5 flops per state and step. Backward: again 3 for h, then 2 each for the five products
        # (dh, dB, dC, dx, da) and 1 for the decay of dh.
        5 * state, 4.0 * b * length * (2 * h * p + h + 2 * n), (5 + 14) / 5, gates,
    )  # fmt: skip


_NODES, _EDGES = (76, 960, 16, 8, 16), (684, 960, 8, 4, 8)  # streams of the detector at batch size 4
_SHORT = (76, 16, 16, 8, 16)  # 32 steps of it compile for 40 s, and time grows with the length
_UNBOUND = "sequential torch loop over views unbound beforehand"
# The clamp's price, with the same call without it as the baseline: one state in a thousand saturates at 0.5.
_FREE = "itself without the clamp"
_CLAMP_GATES = {"fwd": 1 / 1.12, "fwd+bwd": 1 / 1.12}

CASES = (
    _ssd_case(_NODES, "sequential torch loop", baselines.ssd_loop, {"fwd+bwd": 80.0}),
    _ssd_case(_NODES, _UNBOUND, spine.reference, {}),
    _ssd_case(_EDGES, _UNBOUND, spine.reference, {}),
    _ssd_case(_SHORT, "torch.compile of the sequential loop", baselines.compiled(spine.reference), {}),
    _ssd_case(_NODES, _FREE, stablekern.ssd_scan, _CLAMP_GATES, clamp=0.5),
    _ssd_case(_NODES, _FREE, stablekern.ssd_scan, {}, clamp=0.1),
)

if baselines.has_mamba_ssm():
    CASES += tuple(
        _ssd_case(shape, "mamba_ssm's mamba_chunk_scan_combined", baselines.ssd_scan_mamba_ssm, {"fwd+bwd": 1.2})
        for shape in (_NODES, _EDGES)
    )
