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


def _activated_inputs(b: int, l: int, h: int, p: int, n: int) -> Callable[[str], tuple[Tensor, ...]]:  # noqa: E741
    """As Mamba-2 calls it: steps before their softplus, a skip, a gate and a bias."""

    def make(device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(3)
        x, _, *rest = _ssd_inputs(b, l, h, p, n)(device)
        extra = (torch.randn(shape, generator=g).to(device) for shape in ((b, l, h), (h,), (b, l, h, p), (h,)))
        dt, D, z, dt_bias = extra
        return x, dt - 3, *rest, D, z, dt_bias

    return make


def _activated(*inputs: Tensor) -> Tensor:
    x, dt, A, B, C, D, z, dt_bias = inputs
    return stablekern.ssd_scan(x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=True)


def _activated_by_torch(*inputs: Tensor) -> Tensor:
    x, dt, A, B, C, D, z, dt_bias = inputs
    y = stablekern.ssd_scan(x, torch.nn.functional.softplus(dt + dt_bias), A, B, C, D=D)
    return y * torch.nn.functional.silu(z)


def _activated_case(shape: tuple[int, ...]) -> Case:
    b, length, h, p, n = shape
    plain, rows = _ssd_case(shape, "", _activated, {}), float(b * length * h * p)
    return Case(
        "ssd_scan", f"{plain.name}, softplus and gate", _activated_inputs(*shape), _activated,
        "itself with softplus and gate in torch around it", _activated_by_torch,
        # An exponential and a division for each gate come on top, and the gate is read.
        plain.flops + 25 * rows, plain.bytes + 4 * rows, plain.backward, {},
    )  # fmt: skip


_NODES, _EDGES = (76, 960, 16, 8, 16), (684, 960, 8, 4, 8)  # streams of the detector at batch size 4
_SHORT = (76, 16, 16, 8, 16)  # 32 steps of it compile for 40 s, and time grows with the length
_UNBOUND = "sequential torch loop over views unbound beforehand"
# The clamp's price, with the same call without it as the baseline: at most 1.15 times its time. One state in a thousand
# saturates at 0.5.
_FREE = "itself without the clamp"
_CLAMP_GATES = {"fwd": 1 / 1.15, "fwd+bwd": 1 / 1.15}

CASES = (
    _ssd_case(_NODES, "sequential torch loop", baselines.ssd_loop, {"fwd+bwd": 80.0}),
    _ssd_case(_NODES, _UNBOUND, spine.reference, {}),
    _ssd_case(_EDGES, _UNBOUND, spine.reference, {}),
    _ssd_case(_SHORT, "torch.compile of the sequential loop", baselines.compiled(spine.reference), {}),
    _ssd_case(_NODES, _FREE, stablekern.ssd_scan, _CLAMP_GATES, clamp=0.5),
    _ssd_case(_NODES, _FREE, stablekern.ssd_scan, _CLAMP_GATES, clamp=0.1),
    _activated_case(_NODES),
    _activated_case(_EDGES),
)

if baselines.has_mamba_ssm():
    CASES += tuple(
        _ssd_case(shape, "mamba_ssm's mamba_chunk_scan_combined", baselines.ssd_scan_mamba_ssm, {"fwd+bwd": 1.2})
        for shape in (_NODES, _EDGES)
    )
