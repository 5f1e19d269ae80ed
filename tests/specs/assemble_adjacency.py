"""Spec of `assemble_adjacency`."""

from __future__ import annotations

import torch

from stablekern.ops.assemble_adjacency import assemble_adjacency, reference

from . import FLOATS, HALVES, OpSpec, Sample


def samples(g: torch.Generator) -> list[Sample]:
    def random(*shape: int):
        return torch.rand(shape, generator=g, dtype=torch.float64)

    # Multiples of 1/8: exact in every dtype, so the order and the ties are the same in all of them.
    def coarse(*shape: int):
        return torch.randint(-2, 9, shape, generator=g).double() / 8

    near = torch.tensor([1e-4, 2e-4, 0.9e-4, 0.0, 0.5, 1.0], dtype=torch.float64).view(1, 6, 1)
    return [
        Sample("typical", (random(2, 10, 3), 5), {"top_k": 2}, gradcheck=True, dtypes=FLOATS),
        Sample("ties", (coarse(2, 15, 4), 6)),
        Sample("all-equal", (torch.ones(1, 10, 2, dtype=torch.float64), 5), {"top_k": 1}),
        Sample("electrodes", (coarse(1, 171, 2), 19)),
        Sample("keep-all", (random(1, 6, 3), 4), {"top_k": None}, gradcheck=True),
        Sample("k-above-n", (random(1, 6, 3), 4), {"top_k": 9}),
        Sample("threshold", (near, 4), dtypes=FLOATS),
        Sample("high-threshold", (coarse(2, 6, 3), 4), {"threshold": 0.5, "top_k": 2}),
        Sample("all-dropped", (-random(1, 6, 2), 4)),
        Sample("length-1", (random(2, 10, 1), 5), {"top_k": 2}),
        Sample("two-nodes", (random(1, 1, 3), 2)),
        Sample("one-node", (random(2, 0, 3), 1)),
        Sample("empty", (random(0, 6, 3), 4)),
        Sample("permuted", (coarse(4, 6, 2).permute(2, 1, 0), 4), {"top_k": 1}),
    ]


def _call(weights=None, n_nodes=4, **kwargs):
    return lambda: assemble_adjacency(torch.zeros(1, 6, 2) if weights is None else weights, n_nodes, **kwargs)


SPECS = (
    OpSpec(
        "assemble_adjacency",
        op=assemble_adjacency,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        interpreted=(
            *("typical", "ties", "all-equal", "electrodes", "keep-all", "k-above-n", "threshold", "high-threshold"),
            *("all-dropped", "length-1", "two-nodes", "one-node", "empty", "permuted"),
        ),
        errors=(
            (_call(n_nodes=5), ValueError, r"`edge_weights` must have 10 pairs for 5 nodes: got \(1, 6, 2\)"),
            (_call(torch.zeros(6, 2)), ValueError, r"`edge_weights` must have the shape \(b, e, t\): got \(6, 2\)"),
            (_call(torch.zeros(1, 6, 2).int()), TypeError, "`edge_weights` must be one of .*: got int32"),
            (_call(n_nodes=0), ValueError, "`n_nodes` must be >= 1: got 0"),
            (_call(n_nodes=4.0), TypeError, "`n_nodes` must be an integer: got float"),
            (_call(top_k=0), ValueError, "`top_k` must be >= 1: got 0"),
            (_call(threshold=-0.1), ValueError, "`threshold` must be a number >= 0: got -0.1"),
        ),
    ),
)
