"""Spec of `ssd_scan`."""

from __future__ import annotations

import torch

from stablekern.ops.ssd_scan import reference, ssd_scan

from . import FLOATS, HALVES, OpSpec, Sample


def inputs(g: torch.Generator, b: int, l: int, h: int, p: int, groups: int, n: int):  # noqa: E741
    """x, dt >= 0, A < 0, B and C, and all optional tensors by name."""

    def random(*shape: int):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    x, dt, A, B, C = (random(*s) for s in ((b, l, h, p), (b, l, h), (h,), (b, l, groups, n), (b, l, groups, n)))
    optional = {
        "D": random(h),
        "z": random(b, l, h, p),
        "dt_bias": random(h).abs(),
        "initial_state": random(b, h, p, n),
        "return_last_state": True,
    }
    return (x, dt.abs(), -0.1 - A.abs(), B, C), optional


def samples(g: torch.Generator) -> list[Sample]:
    def sample(name: str, *sizes: int, only: tuple[str, ...] | None = None, changes=None, **kwargs):
        args, optional = inputs(g, *sizes)
        changes = {} if changes is None else {key: change(args, optional) for key, change in changes.items()}
        optional = {key: value for key, value in optional.items() if only is None or key in only} | changes
        return Sample(name, args, optional, **kwargs)

    def per_channel(args, optional):
        return torch.randn(args[0].shape[2:], generator=g, dtype=torch.float64)

    def bounds(args, optional):
        return -per_channel(args, optional).abs(), torch.linspace(0.2, 0.8, args[2].numel(), dtype=torch.float64)

    def yes(args, optional):
        return True

    softplus = {"dt_softplus": yes}
    extreme, _ = inputs(g, 2, 70, 3, 4, 1, 5)
    x, dt, A, B, C = extreme
    graded = torch.logspace(-30, 30, 70, dtype=torch.float64).view(1, -1, 1, 1)
    extreme = (x * graded, dt, A * torch.tensor([1e4, 1.0, 1e-4]), B, C)
    (x, dt, A, B, C), optional = inputs(g, 2, 6, 4, 3, 2, 5)
    permuted = (x.transpose(0, 1).contiguous().transpose(0, 1), dt.mT.contiguous().mT, A, B.mT.contiguous().mT, C)
    strided = (x[:, ::2], dt[:, ::2], A, B[:, ::2], C[:, ::2])
    return [
        sample("typical", 2, 7, 4, 3, 2, 5, changes=softplus, gradcheck=True),
        sample("plain", 2, 40, 2, 4, 1, 3, only=()),
        sample("skip-per-channel", 1, 5, 2, 3, 1, 2, changes={"D": per_channel}, gradcheck=True),
        sample("limited", 2, 6, 2, 2, 1, 2, changes={"dt_limit": lambda *_: (0.3, 1.5)}, gradcheck=True),
        sample("clamped", 2, 9, 4, 3, 2, 3, changes={"state_clamp": lambda *_: 0.6}, gradcheck=True),
        sample("clamped-odd", 2, 71, 3, 11, 1, 7, changes={"state_clamp": lambda *_: (0.1, 0.9)}),
        sample("clamped-per-channel", 2, 37, 2, 20, 1, 16, changes={"state_clamp": bounds}, gradients=False),
        sample("odd", 3, 67, 3, 7, 3, 13, changes=softplus),
        sample("one-lane", 2, 33, 1, 1, 1, 1),
        sample("node-stream", 2, 100, 16, 8, 1, 16, changes=softplus),
        sample("edge-stream", 5, 50, 8, 4, 1, 8, changes=softplus),
        sample("wide", 1, 65, 6, 64, 2, 64, changes=softplus),
        sample("length-1", 2, 1, 2, 4, 1, 3, gradcheck=True),
        sample("empty", 2, 0, 2, 4, 1, 3),
        sample("empty-batch", 0, 5, 2, 4, 1, 3),
        sample("no-states", 2, 5, 2, 4, 1, 0),
        Sample("permuted", permuted, optional),
        Sample("strided", strided, optional | {"z": optional["z"][:, ::2]}),
        Sample("extreme", extreme, dtypes=FLOATS),
        sample("reverse", 2, 6, 4, 3, 2, 5, changes=softplus | {"reverse": yes}, gradcheck=True),
        sample("reverse-clamped", 2, 71, 3, 11, 1, 7, changes={"state_clamp": lambda *_: 0.6, "reverse": yes}),
        sample("bidirectional", 2, 6, 4, 3, 2, 5, changes=softplus | {"bidirectional": yes}, gradcheck=True),
        sample("bidirectional-odd", 2, 67, 6, 7, 2, 9, changes={"state_clamp": lambda *_: 0.6, "bidirectional": yes}),
        sample("limited-odd", 2, 67, 21, 3, 1, 5, changes=softplus | {"dt_limit": lambda *_: (0.5, 2.0)}),
        sample("gated", 1, 5, 3, 3, 1, 2, only=("z",), gradcheck=True),
        sample("gated-odd", 2, 67, 3, 11, 1, 7, only=("z", "D"), changes={"state_clamp": lambda *_: 0.6}),
    ]


def _view(outputs, sample):
    """The last state of half-precision inputs is float32; it is compared in the dtype of y."""
    return (outputs,) if isinstance(outputs, torch.Tensor) else (outputs[0], outputs[1].to(outputs[0].dtype))


def _call(**changes):
    g = torch.Generator().manual_seed(0)

    def call():
        args, optional = inputs(g, 2, 5, 4, 3, 2, 6)
        named = dict(zip(("x", "dt", "A", "B", "C"), args, strict=True)) | optional
        named |= {key: change(named) if callable(change) else change for key, change in changes.items()}
        return ssd_scan(**named)

    return call


def _three(named):
    return named["B"][:, :, :1].expand(-1, -1, 3, -1)


SPECS = (
    OpSpec(
        "ssd_scan",
        op=ssd_scan,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        view=_view,
        floor_ulps=16.0,  # the gradient of A sums terms of every item and step, which cancel; as in tests/soak.py
        interpreted=(
            *("typical", "plain", "limited", "gated", "clamped", "clamped-odd", "one-lane", "length-1", "empty"),
            "empty-batch",
            *("no-states", "permuted", "reverse", "bidirectional", "bidirectional-odd"),
        ),
        errors=(
            (_call(x=lambda a: a["x"][0]), ValueError, r"`x` must have the shape \(b, l, h, p\): got \(5, 4, 3\)"),
            (_call(dt=lambda a: a["dt"][:, 1:]), ValueError, "`dt` and `x` disagree on `l`: got 4 and 5"),
            (_call(C=lambda a: a["C"][..., :2]), ValueError, "`C` and `B` disagree on `n`: got 2 and 6"),
            (_call(B=_three, C=_three), ValueError, "groups of `B` and `C` must divide the heads of `x`: got 3 and 4"),
            (_call(x=lambda a: a["x"].long()), TypeError, "`x` must be one of .*: got int64"),
            (_call(A=lambda a: a["A"].float()), TypeError, "`A` must be one of float64: got float32"),
            (_call(dt=lambda a: -a["dt"]), ValueError, "`dt` \\+ `dt_bias` must be >= 0 without `dt_softplus`: got -"),
            (_call(dt_limit=(-1.0, 2.0)), ValueError, "`dt_limit` must be a number >= 0: got -1"),
            (_call(dt_limit=(2.0, 1.0)), ValueError, "`dt_limit` must be a number >= 2: got 1"),
            (_call(state_clamp=-1.0), ValueError, "`state_clamp` must have lo <= hi: got lo up to 1 and hi from -1"),
            (_call(state_clamp=(1.0, 2.0, 3.0)), ValueError, r"`state_clamp` must be c or \(lo, hi\): got 3 values"),
            (_call(state_clamp="1"), TypeError, "`state_clamp` must be a number, a tensor or a pair of them: got str"),
            (
                _call(state_clamp=torch.ones(3)),
                ValueError,
                r"one of the shapes \(\), \(h\), \(h p\): got \(3,\)",
            ),
            (_call(state_clamp=torch.ones(4, requires_grad=True)), ValueError, "`state_clamp` is not differentiable"),
            (_call(bidirectional=True, reverse=True), ValueError, "`reverse` and `bidirectional` exclude each other"),
            (
                _call(bidirectional=True, B=lambda a: a["B"][:, :, :1], C=lambda a: a["C"][:, :, :1]),
                ValueError,
                "`bidirectional` needs an even number of groups of `B` and `C`: got 1",
            ),
            (_call(initial_state=lambda a: a["initial_state"].mT), ValueError, "`initial_state` and `x` disagree on"),
        ),
    ),
)
