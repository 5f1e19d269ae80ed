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


def _hermitian(count: int, n: int) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        A = torch.randn(count, n, n, dtype=torch.complex64, generator=torch.Generator().manual_seed(19))
        return ((A + A.mH).contiguous().to(device),)

    return make


def flops(count: int, n: int, *, complex_entries: bool = False) -> float:
    # Tridiagonalise 4/3 n^3, form Q 4/3 n^3: 4 times that if complex. n(n-1)/2 real rotations of n-vectors at 6 flops:
    # 3 n^3, twice that if complex.
    return count * ((4 if complex_entries else 1) * (4 / 3 + 4 / 3) + (2 if complex_entries else 1) * 3) * n**3


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


def _blind_to_phases(outputs: list[Tensor]) -> list[Tensor]:
    """Those of sum D |V|^2 / 2 for random D: torch refuses to differentiate a loss that sees a phase."""
    w, V = outputs[:2]
    return [torch.randn_like(w), V * torch.randn_like(V.real)]


def _complex_case(count: int, n: int, inputs: Callable[[str], tuple[Tensor, ...]], gates: dict[str, float]) -> Case:
    return Case(
        "eigh", f"{count}x{n}x{n} complex64", inputs, stablekern.eigh, "torch.linalg.eigh", torch.linalg.eigh,
        flops(count, n, complex_entries=True), 8.0 * count * 2 * n * n, 2.0, gates, cotangents=_blind_to_phases,
    )  # fmt: skip


def _double_case() -> Case:
    count, n = 15_360, 19
    return Case(
        "eigh", f"{count}x{n}x{n} float64", lambda device: (_laplacians(count, n, None)(device)[0].double(),),
        stablekern.eigh, "torch.linalg.eigh", torch.linalg.eigh, 2 * flops(count, n),
        8.0 * count * (2 * n * n + n), 2.0, {"fwd": 14.0, "fwd+bwd": 9.5},
    )  # fmt: skip


def _values_case() -> Case:
    count, n = 15_360, 19
    return Case(
        "eigvalsh", f"{count}x{n}x{n} dense Laplacians", _laplacians(count, n, None), stablekern.eigvalsh,
        "torch.linalg.eigvalsh", torch.linalg.eigvalsh, count * 4 / 3 * n**3, 4.0 * count * n * n, 4.25, {},
    )  # fmt: skip


def _lone_case() -> Case:
    n = 19
    return Case(
        "eigh", f"one {n}x{n}", _laplacians(1, n, None), stablekern.eigh, "torch.linalg.eigh", torch.linalg.eigh,
        flops(1, n), 4.0 * (2 * n * n + n), 2.0, {},
    )  # fmt: skip


CASES = (
    _eigh_case("dense Laplacians", None),
    _eigh_case("top-3 Laplacians", 3),
    _complex_case(15_360, 16, _hermitian(15_360, 16), {"fwd": 14.0, "fwd+bwd": 5.0}),
    _complex_case(64, 144, covariances(64, 144), {"fwd": 1.2}),
    _complex_case(8, 256, covariances(8, 256), {"fwd": 1.2}),
    _double_case(),
    _values_case(),
    Case(
        "eigvalsh",
        "64x144x144 complex64",
        _hermitian(64, 144),
        stablekern.eigvalsh,
        "torch.linalg.eigvalsh",
        torch.linalg.eigvalsh,
        64 * 16 / 3 * 144**3,
        8.0 * 64 * 144 * 144,
        2.0,
        {"fwd": 2.0},
        directions=("fwd",),
    ),  # fmt: skip
    _lone_case(),
)
