"""Eigendecompositions of many small matrices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.cases import Case


def random_graphs(count: int, n: int, top_k: int | None, device: str) -> Tensor:
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
    return lambda device: (stablekern.normalized_laplacian(random_graphs(count, n, top_k, device)),)


def flops(count: int, n: int) -> float:
    # Tridiagonalise 4/3 n^3, form Q 4/3 n^3, n(n-1)/2 rotations of n-vectors at 6 flops: 3 n^3.
    return count * (4 / 3 + 4 / 3 + 3) * n**3


def _eigh_case(label: str, top_k: int | None) -> Case:
    count, n = 15_360, 19
    return Case(
        "eigh", f"{count}x{n}x{n} {label}", _laplacians(count, n, top_k), stablekern.eigh, "torch.linalg.eigh",
        torch.linalg.eigh, flops(count, n), 4.0 * count * (2 * n * n + n), 2.0, {"fwd": 22.0, "fwd+bwd": 16.0},
    )  # fmt: skip


CASES = (_eigh_case("dense Laplacians", None), _eigh_case("top-3 Laplacians", 3))
