"""Spec of `focal_loss`."""

from __future__ import annotations

import torch

import stablekern
from stablekern.ops import focal_loss as spine

from . import FLOATS, HALVES, OpSpec, Sample


def reference(logits, targets, *, alpha=0.5, gamma=2.0, pos_weight=None, reduction="none"):
    loss = spine.reference(
        logits, targets, alpha=alpha, gamma=gamma, pos_weight=1.0 if pos_weight is None else pos_weight
    )
    return loss if reduction == "none" else getattr(loss, reduction)()


def samples(g: torch.Generator) -> list[Sample]:
    def random(*shape: int, scale: float = 2.0):
        return scale * torch.randn(shape, generator=g, dtype=torch.float64)

    def hard(*shape: int):
        return torch.randint(0, 2, shape, generator=g).double()

    soft = torch.rand(6, 5, generator=g, dtype=torch.float64)
    mixed = hard(40, 25)  # vectors of hard targets, of soft ones, and of both
    mixed[7:11] = torch.rand(4, 25, generator=g, dtype=torch.float64)
    mixed[20, 3] = 0.7
    far = torch.tensor([0.0, -0.0, 30.0, -30.0, 80.0, -80.0], dtype=torch.float64)
    return [
        Sample("typical", (random(3, 7), hard(3, 7)), gradcheck=True),
        Sample("odd", (random(7, 333), hard(7, 333))),
        Sample("soft-targets", (random(6, 5), soft), {"pos_weight": 1.4}, gradcheck=True),
        Sample("mixed-targets", (random(40, 25), mixed), {"gamma": 1.0, "pos_weight": 0.7}),
        Sample("gamma-0", (random(17), hard(17)), {"gamma": 0.0, "alpha": 0.25}, gradcheck=True),
        Sample("gamma-half", (random(17, scale=6.0), hard(17)), {"gamma": 0.5}, gradcheck=True),
        Sample("gamma-5", (random(1025), hard(1025)), {"gamma": 5.0, "reduction": "sum"}),
        Sample("mean", (random(3, 4), hard(3, 4)), {"reduction": "mean"}, gradcheck=True),
        Sample("far-one", (far, torch.ones(6, dtype=torch.float64)), dtypes=FLOATS),
        Sample("far-zero", (far, torch.zeros(6, dtype=torch.float64)), {"gamma": 0.5}, dtypes=FLOATS),
        Sample("scalar", (random(), hard())),
        Sample("length-1", (random(1), hard(1))),
        Sample("empty", (random(0, 3), hard(0, 3))),
        Sample("permuted", (random(5, 4).t(), hard(4, 5))),
        Sample("strided", (random(12)[::3], hard(8)[::2])),
    ]


def _call(logits=None, targets=None, **kwargs):
    logits = torch.zeros(3) if logits is None else logits
    return lambda: stablekern.focal_loss(logits, torch.zeros(3) if targets is None else targets, **kwargs)


SPECS = (
    OpSpec(
        "focal_loss",
        op=stablekern.focal_loss,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        errors=(
            (
                _call(targets=torch.zeros(4)),
                ValueError,
                r"`targets` must have the shape of `logits`: got \(4,\) and \(3,\)",
            ),
            (_call(logits=torch.zeros(3, dtype=torch.int64)), TypeError, "`logits` must be one of .*: got int64"),
            (_call(targets=torch.zeros(3).double()), TypeError, "`targets` and `logits` must have one dtype"),
            (_call(logits=[0.0]), TypeError, "`logits` must be a tensor: got list"),
            (_call(gamma=-1.0), ValueError, "`gamma` must be a number >= 0: got -1"),
            (_call(gamma=float("nan")), ValueError, "`gamma` must be a number >= 0: got nan"),
            (_call(alpha=1.5), ValueError, "`alpha` must be a number >= 0 and <= 1: got 1.5"),
            (_call(pos_weight="2"), TypeError, "`pos_weight` must be a number: got str"),
            (_call(reduction="avg"), ValueError, "`reduction` must be one of 'none', 'mean', 'sum': got 'avg'"),
        ),
    ),
)
