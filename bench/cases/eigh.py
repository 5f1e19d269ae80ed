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


def covariances(count: int, n: int) -> Callable[[str], tuple[Tensor, ...]]:
    """Sample covariances of n channels from 2 n complex snapshots."""

    def make(device: str) -> tuple[Tensor, ...]:
        x = torch.randn(count, 2 * n, n, dtype=torch.complex64, generator=torch.Generator().manual_seed(144))
        return ((x.mT @ x.conj() / (2 * n)).to(device),)

    return make


def complex_flops(count: int, n: int) -> float:
    # Tridiagonalise 16/3 n^3; the real eigenvectors of T 3 n^3; complex reflectors on them 4 n^3.
    return count * (16 / 3 + 3 + 4) * n**3


def _complex_case(count: int, n: int, gates: dict[str, float]) -> Case:
    return Case(
        "eigh", f"{count}x{n}x{n} complex64", covariances(count, n), stablekern.eigh, "torch.linalg.eigh",
        torch.linalg.eigh, complex_flops(count, n), 8.0 * count * 2 * n * n, 2.5, gates,
    )  # fmt: skip


CASES = (
    _eigh_case("dense Laplacians", None),
    _eigh_case("top-3 Laplacians", 3),
    _complex_case(64, 144, {"fwd": 1.2}),
    _complex_case(8, 256, {"fwd": 1.2}),
)
