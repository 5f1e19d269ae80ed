"""Spec of `eigenprojector`."""

from __future__ import annotations

import torch

from stablekern.ops import eigenprojector as spine

from . import OpSpec, Sample
from .eigh import repeated, separated


def _op(A, k, *, largest=False):
    return spine.eigenprojector_ex((A + A.mH) / 2, k, largest=largest)


def _reference(A, k, *, largest=False):
    H = (A + A.mH) / 2
    n, cut = A.shape[-1], A.shape[-1] - k if largest else k
    w = torch.linalg.eigvalsh(H).detach()
    gap = w[..., cut] - w[..., cut - 1] if 0 < cut < n else torch.full(A.shape[:-2], torch.inf, dtype=w.dtype)
    return spine.reference(H, k, largest=largest), gap, torch.zeros(A.shape[:-2], dtype=torch.int32)


# Where to cut the spectra of `repeated(6)` so that both sides hold repeated eigenvalues, as far as there are any.
CUTS = {"complete": 5, "disjoint-edges": 3, "star": 1, "block-copies": 2, "rank-1": 5}


def samples(g: torch.Generator) -> list[Sample]:
    blocks = torch.block_diag(torch.eye(3), 2 * torch.eye(2)).double()
    degenerate = {"identity-blocks": (blocks, 3), **{name: (repeated(6)[name], k) for name, k in CUTS.items()}}
    # Without pairs across a cut the gradient is exactly 0, LAPACK's is rounding: those are for gradcheck.
    return [
        Sample("typical", (separated(g, (2, 3), 19), 4)),
        Sample("length-1", (separated(g, (3,), 2)[:, :1, :1] + 2, 1)),
        Sample("odd", (separated(g, (5,), 3), 1)),
        Sample("small", (separated(g, (2,), 4), 2), gradcheck=True),
        Sample("largest", (separated(g, (2,), 5), 2), {"largest": True}, gradcheck=True),
        Sample("largest-most", (separated(g, (3,), 7), 5), {"largest": True}),
        Sample("most", (separated(g, (3,), 7), 5)),
        Sample("none", (separated(g, (2,), 4), 0), gradcheck=True, gradients=False),
        Sample("all", (separated(g, (2,), 4), 4), {"largest": True}, gradcheck=True, gradients=False),
        Sample("one-matrix", (separated(g, (), 33), 16)),
        Sample("empty", (separated(g, (0,), 19), 8)),
        Sample("permuted", (separated(g, (5,), 4).permute(2, 1, 0).contiguous().permute(2, 1, 0), 2)),
        Sample("strided", (torch.cat([separated(g, (3,), 6)] * 2, -1)[..., :6], 2)),
        Sample("scaled-down", (separated(g, (3,), 19, scale=1e-15), 4)),
        Sample("scaled-up", (separated(g, (3,), 19, scale=1e15), 4)),
        Sample("complex", (separated(g, (2,), 12, dtype=torch.complex128), 3)),
        Sample("complex-small", (separated(g, (), 3, dtype=torch.complex128), 1), gradcheck=True),
        Sample("complex-large", (separated(g, (2,), 70, dtype=torch.complex128), 3)),
        Sample("complex-large-most", (separated(g, (), 41, dtype=torch.complex128), 37), {"largest": True}),
        Sample("large", (separated(g, (3,), 70), 3), {"largest": True}),
        Sample("conj-view", (separated(g, (3,), 5, dtype=torch.complex128).conj(), 2), {"largest": True}),
        *(Sample(name, args, gradcheck=True, gradients=False) for name, args in degenerate.items()),
    ]


def _call(A=None, k=1, **kwargs):
    return lambda: spine.eigenprojector(torch.eye(3) if A is None else A, k, **kwargs)


SPECS = (
    OpSpec(
        "eigenprojector",
        op=_op,
        reference=_reference,
        samples=samples,
        # In float64 the reference has errors of its own: 5 n eps over gaps of max|w|/n at least, n <= 70, typically
        # n^1/2 each.
        floor_ulps=5.0 * 70,
        errors=(
            (_call(torch.zeros(2, 3, 4)), ValueError, "`A` must be square in `n`: got 4 and 3"),
            (_call(torch.zeros(3)), ValueError, r"`A` must have the shape \(..., n, n\): got \(3,\)"),
            (_call(torch.eye(3).int()), TypeError, "`A` must be one of .*: got int32"),
            (_call(k=4), ValueError, "`k` must be between 0 and 3: got 4"),
            (_call(k=-1), ValueError, "`k` must be between 0 and 3: got -1"),
            (_call(k=1.0), TypeError, "`k` must be an integer: got float"),
            (_call(largest=1), TypeError, "`largest` must be a bool: got int"),
        ),
    ),
)
