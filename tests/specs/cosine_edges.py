"""Spec of `cosine_edges`."""

from __future__ import annotations

import torch

from stablekern.ops.cosine_edges import cosine_edges, reference

from . import FLOATS, HALVES, OpSpec, Sample


def samples(g: torch.Generator) -> list[Sample]:
    def random(*shape: int, scale: float = 1.0):
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    with_zeros = random(2, 4, 18, 5)
    with_zeros[0, 1, 2] = 0.0
    with_zeros[1, :, 0] = 0.0
    # Parallel vectors at half of the steps; their gradient is 0, so the other half sets the scale of errors.
    parallel = random(1, 5, 8, 16)
    parallel[:, :, ::2] = parallel[:, :1, ::2]
    parallel *= torch.tensor([1.0, 3.0, -0.7, 1e-2, -1e2], dtype=torch.float64).view(1, 5, 1, 1)
    # Norms on both sides of the gradient floor 1e-3 and of eps 1e-6, in one tensor.
    graded = random(2, 7, 20, 8) * torch.logspace(-8, 3, 7, dtype=torch.float64).view(1, 7, 1, 1)
    faint = random(1, 4, 35, 5, scale=1e-22)  # the squares are subnormal in float32
    correlation = {"metric": "correlation"}
    return [
        Sample("typical", (random(2, 5, 7, 6),), gradcheck=True),
        Sample("correlation", (random(2, 5, 7, 6) + 2.0,), correlation, gradcheck=True),
        Sample("electrodes", (random(1, 19, 33, 64),)),
        Sample("odd", (random(1, 6, 17, 13),)),
        Sample("odd-correlation", (random(1, 7, 3, 65),), correlation),
        Sample("zeros", (with_zeros,)),
        Sample("zeros-correlation", (with_zeros,), correlation),
        Sample("parallel", (parallel,)),
        Sample("around-the-floors", (graded,), dtypes=FLOATS),
        Sample("faint", (faint,), {"eps": 1e-30, "grad_floor": 0.0}, dtypes=FLOATS),
        Sample("around-the-floors-correlation", (graded,), correlation, dtypes=FLOATS),
        Sample("large-eps", (random(1, 4, 3, 5),), {"eps": 2.0, "grad_floor": 0.5}, gradcheck=True),
        Sample("no-floor", (random(1, 4, 3, 5),), {"grad_floor": 0.0}, gradcheck=True),
        Sample("huge", (random(1, 4, 35, 5, scale=1e30),), dtypes=FLOATS),
        Sample("minute", (random(1, 4, 35, 5, scale=1e-15),), {"eps": 1e-18, "grad_floor": 0.0}, dtypes=FLOATS),
        Sample("length-1", (random(2, 3, 1, 4),)),
        Sample("one-feature", (random(2, 3, 4, 1),), gradients=False),
        Sample("two-nodes", (random(2, 2, 4, 8),)),
        Sample("one-node", (random(2, 1, 4, 8),)),
        Sample("empty", (random(0, 3, 4, 5),)),
        Sample("no-steps", (random(2, 3, 0, 5),)),
        Sample("permuted", (random(5, 7, 6, 2).permute(3, 0, 1, 2),)),
        Sample("strided", (random(2, 4, 6, 10)[:, :, ::2, ::2],)),
    ]


def _call(x=None, **kwargs):
    return lambda: cosine_edges(torch.zeros(1, 3, 4, 5) if x is None else x, **kwargs)


SPECS = (
    OpSpec(
        "cosine_edges",
        op=cosine_edges,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        interpreted=(
            *("correlation", "odd", "zeros", "around-the-floors", "faint", "large-eps", "huge", "minute"),
            *("length-1", "two-nodes", "one-node", "empty", "no-steps", "permuted", "strided"),
        ),
        errors=(
            (_call(torch.zeros(3, 4, 5)), ValueError, r"`x` must have the shape \(b, n, t, d\): got \(3, 4, 5\)"),
            (_call(torch.zeros(1, 3, 4, 0)), ValueError, r"`x` must have at least one feature: got \(1, 3, 4, 0\)"),
            (_call(torch.zeros(1, 3, 4, 5).long()), TypeError, "`x` must be one of .*: got int64"),
            (_call([0.0]), TypeError, "`x` must be a tensor: got list"),
            (_call(metric="euclidean"), ValueError, "`metric` must be one of 'cosine', 'correlation': got 'euclidean'"),
            (_call(eps=0.0), ValueError, "`eps` must be a number >= 1.17549e-38: got 0.0"),
            (_call(eps=float("nan")), ValueError, "`eps` must be a number .*: got nan"),
            (_call(grad_floor=-1.0), ValueError, "`grad_floor` must be a number >= 0: got -1"),
            (_call(grad_floor="1"), TypeError, "`grad_floor` must be a number: got str"),
        ),
    ),
)
