"""Spec of `normalized_laplacian`, and the graphs that `laplacian_pe` is tested with."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern.ops import normalized_laplacian as spine

from . import FLOATS, HALVES, OpSpec, Sample


def top_graphs(g: torch.Generator, batch: tuple[int, ...], n: int, *, degree: int = 3, clusters: int = 1) -> Tensor:
    """Random symmetric graphs: the `degree` largest weights of each row, within one of `clusters` groups of nodes."""
    weights = torch.rand(*batch, n, n, generator=g, dtype=torch.float64) + 0.1
    group = torch.arange(n) * clusters // n
    weights = (weights + weights.mT) * (group[:, None] == group) * (1 - torch.eye(n, dtype=torch.float64))
    kept = torch.zeros_like(weights).scatter(-1, weights.topk(min(degree, n - 1), -1).indices, 1.0)
    return (weights * kept + (weights * kept).mT) / 2


def dense_graphs(g: torch.Generator, batch: tuple[int, ...], n: int) -> Tensor:
    weights = torch.rand(*batch, n, n, generator=g, dtype=torch.float64) + 0.1
    return (weights + weights.mT) * (1 - torch.eye(n, dtype=torch.float64))


def samples(g: torch.Generator) -> list[Sample]:
    directed = torch.rand(2, 4, 4, generator=g, dtype=torch.float64) + 0.1
    signed = torch.randn(2, 5, 5, generator=g, dtype=torch.float64)
    isolated = dense_graphs(g, (3,), 5)
    isolated[:, 2] = isolated[:, :, 2] = 0
    loops = dense_graphs(g, (2,), 4) + torch.diag(torch.tensor([0.0, 1.0, 0.5, 0.0], dtype=torch.float64))
    return [
        Sample("typical", (top_graphs(g, (2, 7), 19),)),
        Sample("positive", (directed + directed.mT,), gradcheck=True),
        Sample("directed", (directed,), gradcheck=True),
        Sample("negative-weights", (signed,), gradcheck=True),
        Sample("isolated-node", (isolated,)),
        Sample("self-loops", (loops,)),
        Sample("no-edges", (torch.zeros(2, 6, 6, dtype=torch.float64),)),
        Sample("length-1", (torch.zeros(2, 1, 1, dtype=torch.float64),)),
        Sample("odd", (dense_graphs(g, (3,), 5),)),
        Sample("one-graph", (dense_graphs(g, (), 33),)),
        Sample("empty", (dense_graphs(g, (0,), 19),)),
        Sample("permuted", (dense_graphs(g, (5,), 4).permute(2, 1, 0).contiguous().permute(2, 1, 0),)),
        Sample("strided", (torch.cat([dense_graphs(g, (3,), 6)] * 2, -1)[..., :6],)),
        Sample("scaled-down", (1e-15 * dense_graphs(g, (3,), 6),), dtypes=FLOATS),
        Sample("scaled-up", (1e15 * dense_graphs(g, (3,), 6),), dtypes=FLOATS),
    ]


def _call(adjacency):
    return lambda: spine.normalized_laplacian(adjacency)


def _reference(adjacency):
    return spine.reference(adjacency.float() if adjacency.dtype in HALVES else adjacency)


SPECS = (
    OpSpec(
        "normalized_laplacian",
        op=spine.normalized_laplacian,
        reference=_reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        errors=(
            (_call(torch.zeros(2, 3)), ValueError, "`adjacency` must be square in `n`: got 3 and 2"),
            (_call(torch.zeros(3)), ValueError, r"`adjacency` must have the shape \(..., n, n\): got \(3,\)"),
            (_call(torch.eye(3).long()), TypeError, "`adjacency` must be one of .*: got int64"),
            (_call(torch.eye(3).cfloat()), TypeError, "`adjacency` must be one of .*: got complex64"),
            (_call([[1.0]]), TypeError, "`adjacency` must be a tensor: got list"),
        ),
    ),
)
