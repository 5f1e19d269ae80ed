"""The linear recurrence: as many rows as a layer has, and few long ones; with a clamp that acts now and then."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench import baselines
from bench.cases import Case
from stablekern.nn import TemporalEMA
from stablekern.ops import linear_scan as spine


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(4)
        gate = torch.rand(shape, generator=g)
        if dtype.is_complex:
            gate = torch.polar(gate, 6 * torch.rand(shape, generator=g))
        return gate.to(device), torch.randn(shape, dtype=dtype, generator=g).to(device)

    return make


def _pscan(gate: Tensor, token: Tensor) -> Tensor:
    from mambapy.pscan import pscan

    return pscan(gate.mT.unsqueeze(-1), token.mT.unsqueeze(-1)).squeeze(-1).mT


def _case(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    baseline_name: str,
    baseline: Callable[..., Tensor],
    clamp: float | None = None,
    gates: dict[str, float] | None = None,
) -> Case:
    elements, complex_ = float(torch.Size(shape).numel()), dtype.is_complex
    name = f"({','.join(map(str, shape))}){' complex64' if complex_ else ''}"
    return Case(
        "linear_scan", name if clamp is None else f"{name} clamp={clamp:g}", _inputs(shape, dtype),
        functools.partial(stablekern.linear_scan, state_clamp=clamp), baseline_name, baseline,
        # Bandwidth: three numbers an element forward, five more backward (the states, the gates and their gradients).
        (8 if complex_ else 2) * elements, 3 * (8 if complex_ else 4) * elements, 8 / 3, gates or {},
    )  # fmt: skip


_WIDE, _LONG = (8, 1024, 960), (2, 64, 65536)
_SHORT = (8, 1024, 16)  # 32 steps of it compile for 40 s, and time grows with the length
_LOOP = "sequential torch loop over views"
# The clamp's price: the same call without it is the baseline, and at most 1.15 times its time is asked for. Of real
# states 3 in 10 000 saturate at 5, four in ten at 1; of complex ones 5 in 1 000 at 3 and four in ten at 1, where every
# step shortens some and the way back reads most tokens again: no gate.
_FREE = "itself without the clamp"
_CLAMP_GATES = {"fwd": 1 / 1.15, "fwd+bwd": 1 / 1.15}

CASES = (
    _case(_WIDE, torch.float32, "mambapy pscan", _pscan),
    _case(_WIDE, torch.float32, _LOOP, spine.reference),
    _case(_SHORT, torch.float32, "torch.compile of the sequential loop", baselines.compiled(spine.reference)),
    _case(_WIDE, torch.float32, _FREE, stablekern.linear_scan, clamp=5.0, gates=_CLAMP_GATES),
    _case(_WIDE, torch.float32, _FREE, stablekern.linear_scan, clamp=1.0, gates=_CLAMP_GATES),
    _case(_WIDE, torch.complex64, _FREE, stablekern.linear_scan, clamp=3.0, gates=_CLAMP_GATES),
    _case(_WIDE, torch.complex64, _FREE, stablekern.linear_scan, clamp=1.0),
    _case(_WIDE, torch.complex64, "mambapy pscan", _pscan),
    _case(_LONG, torch.float32, "mambapy pscan", _pscan),
    _case(_LONG, torch.complex64, "mambapy pscan", _pscan),
    Case(
        "linear_scan", "TemporalEMA (4,171,960)", lambda device: (torch.rand(4, 171, 960, device=device),),
        TemporalEMA(0.9), "loop over time, stacked", functools.partial(baselines.ema_loop, beta=0.9),
        # The least: every number in and out, in each direction.
        3.0 * 4 * 171 * 960, 8.0 * 4 * 171 * 960, 2.0, {},
    ),
)  # fmt: skip
