"""Spec of `gated_rms_norm`."""

from __future__ import annotations

import torch

from stablekern.ops.gated_rms_norm import gated_rms_norm, reference

from . import FLOATS, HALVES, OpSpec, Sample


def samples(g: torch.Generator) -> list[Sample]:
    def random(*shape: int, scale: float = 1.0):
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    def triple(*shape: int, scale: float = 1.0):
        return (random(*shape, scale=scale), 2 * random(*shape), random(shape[-1]))

    y, z, weight = triple(3, 5, 8)
    both = random(4, 7, 24)
    zeros = torch.zeros_like(y)
    return [
        Sample("typical", triple(2, 3, 8), {"groups": 2}, gradcheck=True),
        Sample("one-group", triple(4, 5), gradcheck=True),
        Sample("edge-stream", triple(2, 37, 64), {"groups": 2}),
        Sample("node-stream", triple(1, 9, 256), {"groups": 2}),
        Sample("odd", triple(3, 4, 57), {"groups": 3}),
        Sample("large-eps", triple(3, 8), {"eps": 2.0, "groups": 4}, gradcheck=True),
        Sample("many-rows", triple(1100, 32)),
        Sample("zeros", (zeros, z, weight)),
        Sample("closed", (y, zeros - 1e4, weight), dtypes=FLOATS),
        Sample("wide-open", (y, zeros + 50, weight)),
        Sample("large", (1e6 * y, z, weight), dtypes=FLOATS),
        Sample("minute", (1e-9 * y, z, weight), dtypes=FLOATS),
        Sample("length-1", triple(1, 6), gradcheck=True),
        # u / |u|: of its derivative only the share of eps is left.
        Sample("one-feature", triple(3, 1), gradients=False),
        Sample("empty", triple(0, 6)),
        Sample("permuted", (y.mT.contiguous().mT, z.mT.contiguous().mT, weight)),
        Sample("strided", (both[..., :8], both[..., 8:16], weight)),
        # The cube of the inverse root is 1e45: only its square and itself are in range.
        Sample("small-eps", (1e-16 * y, z, weight), {"eps": 1e-30}, dtypes=FLOATS),
    ]


def _call(y=None, z=None, weight=None, **kwargs):
    given = (torch.zeros(3, 6) if x is None else x for x in (y, z))
    arguments = (*given, torch.zeros(6) if weight is None else weight)
    return lambda: gated_rms_norm(*arguments, **kwargs)


SPECS = (
    OpSpec(
        "gated_rms_norm",
        op=gated_rms_norm,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        interpreted=(
            *("typical", "one-group", "node-stream", "odd", "large-eps", "zeros", "closed", "wide-open", "large"),
            *("minute", "length-1", "empty", "permuted", "strided", "many-rows"),
        ),
        errors=(
            (_call(z=torch.zeros(2, 6)), ValueError, r"`y` and `z` must have one shape: got \(3, 6\) and \(2, 6\)"),
            (_call(weight=torch.zeros(5)), ValueError, "`weight` and `y` disagree on `d`: got 5 and 6"),
            (_call(y=torch.zeros(3, 6).long()), TypeError, "`y` must be one of .*: got int64"),
            (_call(groups=4), ValueError, "`groups` must divide the features: got 4 and 6"),
            (_call(groups=0), ValueError, "`groups` must be >= 1: got 0"),
            (_call(eps=0.0), ValueError, "`eps` must be a number > 0: got 0.0"),
        ),
    ),
)
