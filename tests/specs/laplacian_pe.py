"""Spec of `laplacian_pe`."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern.ops import laplacian_pe as spine
from stablekern.ops import normalized_laplacian

from . import OpSpec, Sample
from .normalized_laplacian import dense_graphs

_GAP = 0.02


def separated_graphs(g: torch.Generator, batch: tuple[int, ...], n: int) -> Tensor:
    """Connected graphs with self-loops and weights of several decades, whose eigenvalues lie 0.02 or more apart."""
    count, found = torch.Size(batch).numel(), []
    while sum(map(len, found)) < count:
        weights = torch.exp(2 * torch.randn(256, n, n, generator=g, dtype=torch.float64))
        weights = weights + weights.mT
        w = torch.linalg.eigvalsh(normalized_laplacian.reference(weights))
        found.append(weights[(w.diff(dim=-1) >= _GAP).all(-1)])
    return torch.cat(found)[:count].reshape(*batch, n, n)


def _reference(adjacency, k, *, skip_trivial=False, align="sign", interval=1, previous=None, grad="lorentz"):
    pe, w = spine.reference(adjacency[..., ::interval, :, :], k, skip_trivial=skip_trivial)
    held = torch.arange(adjacency.shape[-3]) // interval
    return pe[..., held, :, :], w[..., held, :], torch.zeros(adjacency.shape[:-2], dtype=torch.int32)


def _view(outputs, sample):
    """Without the signs: each v v^T."""
    pe, w, info = outputs
    return pe[..., :, None, :] * pe[..., None, :, :], w, info


def samples(g: torch.Generator) -> list[Sample]:
    exact = {"grad": "auto"}
    previous = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    return [
        Sample("typical", (separated_graphs(g, (2, 3), 8), 4), exact),
        Sample("length-1", (separated_graphs(g, (2, 1), 2), 2), exact, gradcheck=True),
        Sample("odd", (separated_graphs(g, (1, 3), 5), 5), exact),
        Sample("small", (separated_graphs(g, (2,), 4), 3), exact, gradcheck=True),
        Sample("skip-trivial", (separated_graphs(g, (2, 3), 5), 4), {"skip_trivial": True, "grad": "mask"}),
        Sample("interval", (separated_graphs(g, (7,), 3), 2), {"interval": 3, "grad": "raw"}, gradcheck=True),
        Sample("temporal", (separated_graphs(g, (2, 6), 5), 3), {"align": "temporal", **exact}),
        Sample("previous", (separated_graphs(g, (2, 6), 5), 3), {"align": "temporal", "previous": previous, **exact}),
        Sample("unaligned", (separated_graphs(g, (2, 6), 5), 3), {"align": "none", **exact}),
        Sample("many-nodes", (dense_graphs(g, (1,), 33), 2), exact),
        Sample("one-sequence", (separated_graphs(g, (4,), 6), 2), exact),
        Sample("empty", (dense_graphs(g, (0, 4), 19), 8), exact),
        Sample("no-steps", (dense_graphs(g, (2, 0), 5), 3), {"align": "temporal", **exact}),
        Sample("permuted", (separated_graphs(g, (2, 3), 4).transpose(0, 1), 2), exact),
        Sample("strided", (torch.cat([separated_graphs(g, (2, 3), 6)] * 2, -1)[..., :6], 2), exact),
        Sample("scaled-down", (1e-15 * separated_graphs(g, (3,), 6), 3), exact),
        Sample("scaled-up", (1e15 * separated_graphs(g, (3,), 6), 3), exact),
    ]


def _call(adjacency=None, k=2, **kwargs):
    adjacency = torch.ones(4, 3, 3) if adjacency is None else adjacency
    return lambda: spine.laplacian_pe(adjacency, k, **kwargs)


SPECS = (
    OpSpec(
        "laplacian_pe",
        op=spine.laplacian_pe_ex,
        reference=_reference,
        samples=samples,
        view=_view,
        # In float64 the reference has errors of its own: 5 eps max|w| over the gap in each vector, max|w| <= 2.
        floor_ulps=5 * 2 / _GAP,
        errors=(
            (_call(torch.zeros(3, 3)), ValueError, r"`adjacency` must have the shape \(..., t, n, n\): got \(3, 3\)"),
            (_call(torch.zeros(4, 3, 2)), ValueError, "`adjacency` must be square in `n`: got 2 and 3"),
            (_call(torch.zeros(4, 3, 3).int()), TypeError, "`adjacency` must be one of .*: got int32"),
            (_call(k=0), ValueError, "`k` must be between 1 and 3: got 0"),
            (_call(k=3, skip_trivial=True), ValueError, "`k` must be between 1 and 2: got 3"),
            (_call(k=2.0), TypeError, "`k` must be an integer: got float"),
            (_call(skip_trivial=1), TypeError, "`skip_trivial` must be a bool: got int"),
            (_call(align="time"), ValueError, "`align` must be one of 'sign', 'temporal', 'none': got 'time'"),
            (_call(interval=0), ValueError, "`interval` must be >= 1: got 0"),
            (_call(grad="exact"), ValueError, "`grad` must be one of .*: got 'exact'"),
            (_call(previous=torch.zeros(3, 2)), ValueError, "`previous` is for align='temporal': got 'sign'"),
            (
                _call(align="temporal", previous=torch.zeros(3, 1)),
                ValueError,
                r"`previous` must have the shape \(3, 2\): got \(3, 1\)",
            ),
            (_call(align="temporal", previous=[0.0]), TypeError, "`previous` must be a tensor: got list"),
        ),
    ),
)
