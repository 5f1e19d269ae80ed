"""The Cayley step of the complex language model: 16 384 tokens of 256 components, a small-world graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from stablekern.ops import cayley_step as spine

TOKENS, NODES = 16384, 256
_KPM_TERMS = 16


def graph(nodes: int = NODES, scales: tuple[int, ...] = (6, 12, 24)) -> Tensor:
    """(2, E): rings of s / 2 neighbours and random chords up to nodes * s / 2 edges, for each scale; their union."""
    g = torch.Generator().manual_seed(42)
    pairs: set[tuple[int, int]] = set()
    for s in scales:
        own = {(min(i, (i + k) % nodes), max(i, (i + k) % nodes)) for k in range(1, s // 2) for i in range(nodes)}
        while len(own) < nodes * s // 2:
            i, j = torch.randint(nodes, (2,), generator=g).tolist()
            if i != j:
                own.add((min(i, j), max(i, j)))
        pairs |= own
    return torch.tensor(sorted(pairs)).T.contiguous()


def _inputs(device: str) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(7)
    edges = graph()
    psi = torch.randn(TOKENS, NODES, dtype=torch.complex64, generator=g)
    weights = torch.nn.functional.softplus(0.1 * torch.randn(edges.shape[1], generator=g)) / 3
    return psi.to(device), edges.to(device), weights.to(device)


def _damped_expansion(psi: Tensor, edges: Tensor, weights: Tensor, dt: float) -> Tensor:
    """The resolvent in 16 Chebyshev terms with Jackson damping, times the right-hand side, by dense real products."""
    nodes, terms, a = psi.shape[-1], _KPM_TERMS, dt / 2
    upper = weights.new_zeros(nodes, nodes).index_put((edges[0], edges[1]), weights)
    adjacency = upper + upper.mT
    H = torch.diag_embed(adjacency.sum(-1)) - adjacency
    top = 2 * float(adjacency.detach().sum(-1).max())
    points = torch.arange(128, dtype=torch.float64)
    x = torch.cos(math.pi * (points + 0.5) / 128)
    k = torch.arange(terms, dtype=torch.float64)
    waves = torch.cos(k[:, None] * torch.arccos(x))
    c = 2 / 128 * (waves / (1 + 1j * a * top / 2 * (x + 1))).sum(-1)
    c[0] /= 2
    n = terms + 1
    jackson = ((n - k) * torch.cos(math.pi * k / n) + torch.sin(math.pi * k / n) / math.tan(math.pi / n)) / n
    c = (c * jackson).tolist()
    scaled = (2 / top) * H - torch.eye(nodes, dtype=H.dtype, device=H.device)
    right = psi.reshape(-1, nodes)
    planes = torch.stack((right.real, right.imag))
    image = planes @ H
    planes = torch.stack((planes[0] + a * image[1], planes[1] - a * image[0]))  # (I - i a H) psi
    before, now = planes, planes @ scaled
    total = c[0].real * before + c[0].imag * torch.stack((-before[1], before[0]))
    for value in c[1:]:
        total = total + value.real * now + value.imag * torch.stack((-now[1], now[0]))
        before, now = now, 2 * now @ scaled - before
    return torch.complex(total[0], total[1]).reshape(psi.shape)


_SOLVE = "complex64 torch.linalg.solve per call"


def _case(dt: float, baseline_name: str, baseline: Callable[..., Tensor], gates: dict[str, float], **method) -> Case:
    # Products of the expansion, 4 and 8 of them, or one with a dense real factor: whichever is less.
    products = {0.02: 4, 0.1: 8}.get(dt)
    entries = NODES**2 if products is None else products * (2 * graph().shape[1] + NODES)
    flops = 4.0 * TOKENS * entries
    label = f"{TOKENS} tokens, D={NODES}, dt={dt:g}" + "".join(f", {value}" for value in method.values())
    return Case(
        "cayley_step", label, _inputs, functools.partial(stablekern.cayley_step, dt=dt, **method), baseline_name,
        functools.partial(baseline, dt=dt), flops, 16.0 * TOKENS * NODES, 2.5, gates, constant=(1,),
    )  # fmt: skip


_KPM = "16-term Chebyshev with Jackson damping, dense products"

CASES = (
    _case(0.02, _SOLVE, spine.reference, {"fwd": 7.0, "fwd+bwd": 8.0}),
    _case(0.1, _SOLVE, spine.reference, {"fwd": 5.0, "fwd+bwd": 5.5}),
    _case(1.0, _SOLVE, spine.reference, {}),
    _case(0.02, _KPM, _damped_expansion, {}),
)
