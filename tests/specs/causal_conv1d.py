"""Spec of `causal_conv1d`."""

from __future__ import annotations

import torch

from stablekern.ops.causal_conv1d import causal_conv1d, reference

from . import FLOATS, HALVES, OpSpec, Sample


def inputs(g: torch.Generator, b: int, d: int, l: int, k: int):  # noqa: E741 (l is length)
    """x, weight, bias and an initial state."""
    shapes = ((b, d, l), (d, k), (d,), (b, d, k - 1))
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def samples(g: torch.Generator) -> list[Sample]:
    def sample(name: str, *sizes: int, bias: bool = True, start: bool = False, options=None, **kwargs):
        x, weight, shift, state = inputs(g, *sizes)
        named = ({"bias": shift} if bias else {}) | ({"initial_state": state} if start else {})
        return Sample(name, (x, weight), named | (options or {}), **kwargs)

    silu, reverse = {"activation": "silu"}, {"reverse": True}
    x, weight, bias, _ = inputs(g, 2, 6, 40, 4)
    wide = torch.randn(2, 20, 16, generator=g, dtype=torch.float64)
    extreme = x * torch.logspace(-30, 30, 40, dtype=torch.float64)
    return [
        sample("typical", 2, 3, 7, 4, options=silu, gradcheck=True),
        sample("plain", 2, 3, 7, 3, bias=False, gradcheck=True),
        sample("reverse", 2, 3, 7, 4, options=silu | reverse, gradcheck=True),
        sample("state", 2, 3, 5, 4, start=True, options=silu, gradcheck=True),
        sample("state-reverse", 2, 3, 5, 4, start=True, options=reverse, gradcheck=True),
        sample("both-ways", 2, 6, 7, 4, options=silu | {"bidirectional": True}, gradcheck=True),
        sample("both-ways-wide", 2, 38, 150, 3, options={"bidirectional": True}),
        sample("odd", 3, 19, 133, 4, options=silu),
        sample("rows", 2, 3, 1060, 4, options=silu),
        sample("odd-reverse", 3, 19, 133, 4, options=silu | reverse),
        sample("long", 1, 5, 300, 2, options=silu),
        sample("many-channels", 2, 40, 50, 3, options=silu),
        sample("one-tap", 2, 5, 20, 1, options={"activation": "swish"}),
        sample("many-taps", 2, 5, 30, 7, options=silu, gradcheck=True),
        sample("many-taps-reverse", 2, 5, 30, 7, options=silu | reverse),
        sample("longer-than-the-sequence", 2, 3, 2, 4, options=silu, gradcheck=True),
        sample("length-1", 2, 3, 1, 4, options=silu),
        sample("empty", 2, 3, 0, 4),
        sample("empty-batch", 0, 3, 5, 4),
        Sample("permuted", (x.mT.contiguous().mT, weight.mT.contiguous().mT), {"bias": bias} | silu),
        Sample("strided", (x[..., ::2], weight), {"bias": bias} | silu),
        Sample("permuted-both-ways", (x.mT.contiguous().mT, weight), {"bias": bias, "bidirectional": True} | silu),
        Sample("part-of-wider-rows", (wide[..., 5:11].mT, weight), {"bias": bias} | silu),
        Sample("extreme", (extreme, weight), {"bias": bias} | silu, dtypes=FLOATS),
    ]


def _call(**changes):
    def call():
        x, weight, bias, state = inputs(torch.Generator().manual_seed(0), 2, 3, 5, 4)
        named = {"x": x, "weight": weight, "bias": bias, "initial_state": state}
        named |= {key: change(named) if callable(change) else change for key, change in changes.items()}
        return causal_conv1d(**named)

    return call


SPECS = (
    OpSpec(
        "causal_conv1d",
        op=causal_conv1d,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        interpreted=(
            *(
                "typical",
                "plain",
                "reverse",
                "both-ways",
                "both-ways-wide",
                "one-tap",
                "many-taps",
                "length-1",
                "empty",
            ),
            *("longer-than-the-sequence", "empty-batch", "permuted-both-ways", "strided", "part-of-wider-rows"),
        ),
        errors=(
            (_call(bidirectional=True), ValueError, "`bidirectional` takes neither .*: got an initial state"),
            (
                _call(bidirectional=True, reverse=True),
                ValueError,
                "neither `reverse` nor an initial state: got reverse",
            ),
            (
                _call(bidirectional=True, initial_state=None),
                ValueError,
                "`bidirectional` needs an even number of channels: got 3",
            ),
            (_call(x=lambda a: a["x"][0]), ValueError, r"`x` must have the shape \(b, d, l\): got \(3, 5\)"),
            (_call(weight=lambda a: a["weight"][:2]), ValueError, "`weight` and `x` disagree on `d`: got 2 and 3"),
            (_call(weight=lambda a: a["weight"][:, :0]), ValueError, "`weight` must have at least one tap: got 0"),
            (_call(bias=lambda a: a["bias"][1:]), ValueError, "`bias` and `x` disagree on `d`: got 2 and 3"),
            (_call(initial_state=lambda a: a["x"]), ValueError, r"`initial_state` must have the shape \(2, 3, 3\)"),
            (_call(activation="relu"), ValueError, "`activation` must be one of None, 'silu', 'swish': got 'relu'"),
            (_call(x=lambda a: a["x"].long()), TypeError, "`x` must be one of .*: got int64"),
            (_call(weight=lambda a: a["weight"].float()), TypeError, "`weight` must be one of float64: got float32"),
        ),
    ),
)
