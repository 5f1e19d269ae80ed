"""The workloads: sizes of real models, the baseline named exactly, the flops and bytes that must be spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import stablekern
from bench import baselines
from stablekern.ops import ssd_scan as ssd_spine

__all__ = ["CASES", "Case"]


@dataclass(frozen=True)
class Case:
    """`ours` and `baseline` take what `inputs(device)` makes; all but `constant` get gradients in `fwd+bwd`.

    `flops` and `bytes` are the least that the forward must spend; `backward` scales both for forward and backward.
    `gates` are the ratios (direction -> factor) below which a line is a regression.
    """

    op: str
    name: str
    inputs: Callable[[str], tuple[Tensor, ...]]
    ours: Callable[..., Any]
    baseline_name: str
    baseline: Callable[..., Any]
    flops: float
    bytes: float
    backward: float
    gates: dict[str, float]
    constant: tuple[int, ...] = ()  # inputs that get no gradient


def _random_graphs(count: int, n: int, top_k: int | None, device: str) -> Tensor:
    """Symmetric non-negative adjacencies with zero diagonal; with `top_k` only the strongest per row are kept."""
    g = torch.Generator().manual_seed(19)
    a = torch.rand(count, n, n, generator=g)
    a = torch.triu(a, 1)
    a = a + a.mT
    if top_k is not None:
        kept = torch.zeros_like(a)
        values, where = a.topk(top_k, dim=-1)
        kept.scatter_(-1, where, values)
        a = (kept + kept.mT) / 2
    return a.to(device)


def _laplacians(count: int, n: int, top_k: int | None) -> Callable[[str], tuple[Tensor, ...]]:
    return lambda device: (stablekern.normalized_laplacian(_random_graphs(count, n, top_k, device)),)


def _eigh_flops(count: int, n: int) -> float:
    # Tridiagonalise 4/3 n^3, form Q 4/3 n^3, n(n-1)/2 rotations of n-vectors at 6 flops: 3 n^3.
    return count * (4 / 3 + 4 / 3 + 3) * n**3


def _eigh_case(label: str, top_k: int | None) -> Case:
    count, n = 15_360, 19
    return Case(
        "eigh", f"{count}x{n}x{n} {label}", _laplacians(count, n, top_k), stablekern.eigh, "torch.linalg.eigh",
        torch.linalg.eigh, _eigh_flops(count, n), 4.0 * count * (2 * n * n + n), 2.0, {"fwd": 22.0, "fwd+bwd": 16.0},
    )  # fmt: skip


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
    shape: tuple[int, ...], baseline_name: str, baseline: Callable[..., Any], gates: dict[str, float]
) -> Case:
    b, length, h, p, n = shape
    state = float(b * length * h * p * n)
    return Case(
        "ssd_scan", f"({b},{length},{h},{p}) n={n}", _ssd_inputs(*shape), stablekern.ssd_scan, baseline_name, baseline,
        # a*h + u*B and C.h: 5 flops per state and step. Backward: again 3 for h, then 2 each for the five products
        # (dh, dB, dC, dx, da) and 1 for the decay of dh.
        5 * state, 4.0 * b * length * (2 * h * p + h + 2 * n), (5 + 14) / 5, gates,
    )  # fmt: skip


_NODES, _EDGES = (76, 960, 16, 8, 16), (684, 960, 8, 4, 8)  # streams of the detector at batch size 4
_UNBOUND = "sequential torch loop over views unbound beforehand"

CASES = (
    _eigh_case("dense Laplacians", None),
    _eigh_case("top-3 Laplacians", 3),
    Case(
        "laplacian_pe", "3840x19x19 top-3, k=16",
        lambda device: (_random_graphs(3840, 19, 3, device).reshape(4, 960, 19, 19),),
        lambda a: stablekern.laplacian_pe(a, 16), "degree, Laplacian, torch.linalg.eigh, sign chain",
        lambda a: baselines.laplacian_pe_chain(a, 16), _eigh_flops(3840, 19), 4.0 * 3840 * (361 + 19 * 16), 2.0,
        {"fwd+bwd": 15.0},
    ),
    _ssd_case(_NODES, "sequential torch loop", baselines.ssd_loop, {"fwd+bwd": 80.0}),
    _ssd_case(_NODES, _UNBOUND, ssd_spine.reference, {}),
    _ssd_case(_EDGES, _UNBOUND, ssd_spine.reference, {}),
    Case(
        "cosine_edges", "(4,19,960,64)", lambda device: (torch.randn(4, 19, 960, 64, device=device),),
        stablekern.cosine_edges, "einsum chain", baselines.cosine_einsum,
        4 * 960 * 2.0 * 64 * 190, 4.0 * 4 * 960 * (19 * 64 + 171), 3.0, {"fwd": 7.0, "fwd+bwd": 11.0},
    ),
    Case(
        "focal_loss", "1e7, gamma 2",
        lambda device: (4 * torch.randn(10**7, device=device), torch.rand(10**7, device=device).round()),
        stablekern.focal_loss, "shortest composite: BCE, exp, power", baselines.focal_composite,
        10**7 * 40.0, 12.0e7, 7 / 3, {"fwd": 25.0, "fwd+bwd": 35.0}, constant=(1,),
    ),
)  # fmt: skip
