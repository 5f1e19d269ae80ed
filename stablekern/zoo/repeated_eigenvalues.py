"""Graphs with repeated eigenvalues: the forward of `eigh` is finite, its backward divides by a gap of 0."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series, largest, spread

__all__ = ["exhibit"]

_NODES, _STRONGEST, _COLUMNS, _GRAPHS = 19, 3, 16, 960


def _two_groups(generator: torch.Generator) -> Tensor:
    """One window of graphs: the three strongest weights of each node, within its half of the nodes."""
    weights = torch.rand(_GRAPHS, _NODES, _NODES, generator=generator)
    group = torch.arange(_NODES) * 2 // _NODES
    weights = (weights + weights.mT) * (group[:, None] == group) * (1 - torch.eye(_NODES))
    kept = torch.zeros_like(weights).scatter(-1, weights.topk(_STRONGEST, -1).indices, 1.0) * weights
    return (kept + kept.mT) / 2


def _symmetric_graphs() -> Tensor:
    """All edges equal: complete, a ring, a star, two complete halves, three hubs."""
    n = torch.arange(_NODES)
    apart = (n[:, None] - n).abs()
    different = apart > 0
    ring = (apart == 1) | (apart == _NODES - 1)
    star = different & ((n[:, None] == 0) | (n == 0))
    halves = different & ((n[:, None] < 9) == (n < 9))
    hubs = (n[:, None] < _STRONGEST) != (n < _STRONGEST)
    return torch.stack([different, ring, star, halves, hubs]).float()


def _chain(adjacency: Tensor, *, shift: float = 0.0, guards: bool = False) -> Tensor:
    """Normalised Laplacian, torch.linalg.eigh, first columns, sign of their sum; with what was added to it."""
    root = adjacency.sum(-1).rsqrt()
    eye = torch.eye(_NODES)
    laplacian = eye - root[:, :, None] * adjacency * root[:, None, :] + shift * eye
    if guards:
        values = torch.linalg.eigvalsh(laplacian.detach()).abs()
        if float((values.amax(-1) / values.amin(-1)).max()) > 1e6:
            laplacian = laplacian + 1e-3 * eye
    values, vectors = torch.linalg.eigh(laplacian)
    if guards:
        values = values.clamp(1e-6, 2.0)  # as published; nothing downstream reads them
        vectors = vectors.nan_to_num(0.0, 1.0, -1.0)
    vectors = vectors[..., :_COLUMNS]
    return vectors * torch.where(vectors.sum(-2, keepdim=True) < 0, -1.0, 1.0)


_METHODS: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    (STOCK, "torch.linalg.eigh", _chain),
    (FIX, "L + 1e-3 I", lambda a: _chain(a, shift=1e-3)),
    (FIX, "condition check, eigenvalue clamp, nan_to_num", lambda a: _chain(a, shift=1e-4, guards=True)),
    (OURS, "laplacian_pe", lambda a: stablekern.laplacian_pe(a, _COLUMNS)),
)


def _gradient(method: Callable[[Tensor], Tensor], adjacency: Tensor, cotangent: Tensor) -> Tensor:
    leaf = adjacency.clone().requires_grad_()
    return torch.autograd.grad(method(leaf), leaf, cotangent)[0]


def _batches(count: int) -> list[Row]:
    found: list[list[Tensor]] = [[] for _ in _METHODS]
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        adjacency, cotangent = _two_groups(generator), torch.randn(_GRAPHS, _NODES, _COLUMNS, generator=generator)
        for gradients, (_, _, method) in zip(found, _METHODS, strict=True):
            gradients.append(_gradient(method, adjacency, cotangent))
    rows = []
    for gradients, (who, name, _) in zip(found, _METHODS, strict=True):
        bad = sum(not bool(g.isfinite().all()) for g in gradients)
        biggest = largest(float(g[g.isfinite()].abs().max()) for g in gradients)
        rows.append(Row(who, name, f"batches of {_GRAPHS} graphs of two groups", bad, count, biggest))
    return rows


def _symmetric() -> list[Row]:
    graphs = _symmetric_graphs()
    cotangent = torch.randn(len(graphs), _NODES, _COLUMNS, generator=torch.Generator().manual_seed(0))
    rows = []
    for who, name, method in _METHODS:
        each = [_gradient(method, graphs[i : i + 1], cotangent[i : i + 1]) for i in range(len(graphs))]
        bad = sum(not bool(g.isfinite().all()) for g in each)
        biggest = largest(float(g[g.isfinite()].abs().max()) for g in each if bool(g.isfinite().any()))
        rows.append(Row(who, name, "graphs with equal weights", bad, len(each), biggest))
    return rows


def _figure() -> Figure:
    """Two copies of one block, the second shifted by the gap: the gradient of all eigenvectors."""
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(4, 4, generator=generator)
    cotangent = torch.randn(8, 8, generator=generator)
    gaps = spread(1e-8, 1.0, 33)
    matrix = torch.block_diag(block + block.mT, block + block.mT)
    shifted = torch.diag(torch.tensor([0.0] * 4 + [1.0] * 4))
    series = []
    for who, name, solve in (
        (STOCK, "torch.linalg.eigh", lambda a: torch.linalg.eigh(a).eigenvectors),
        (FIX, "torch.linalg.eigh of A + 1e-3 I", lambda a: torch.linalg.eigh(a + 1e-3 * torch.eye(8)).eigenvectors),
        (OURS, 'eigh, grad="lorentz"', lambda a: stablekern.eigh(a, grad="lorentz").eigenvectors),
    ):
        sizes = [float(_gradient(solve, matrix + gap * shifted, cotangent).abs().max()) for gap in gaps]
        series.append(Series(who, name, tuple(gaps), tuple(sizes)))
    return Figure(
        "gap between two eigenvalues",
        "largest entry of the gradient",
        tuple(series),
        "The gradient of eigenvectors against the gap of their eigenvalues, float32. Adding a multiple of the identity "
        "shifts both eigenvalues alike.",
        x_log=True,
        y_log=True,
    )


def exhibit(batches: int = 60) -> Exhibit:
    return Exhibit(
        name="repeated_eigenvalues",
        seen="NaN logits from some batch between 7 and 140 on; the eigendecomposition is suspected",
        cause="the backward of eigh divides by the gaps of the eigenvalues; sparse graphs have repeated ones",
        published="add eps I, check the condition number, clamp the eigenvalues, replace NaN in the eigenvectors",
        remedy="laplacian_pe and eigh: a backward that is bounded where a gap closes",
        counted="the gradient of the edge weights has a NaN or an infinity",
        measured="largest finite entry of the gradient",
        rows=(*_batches(batches), *_symmetric()),
        figure=_figure(),
    )
