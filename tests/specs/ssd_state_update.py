"""Spec of `ssd_state_update`."""

from __future__ import annotations

import torch

from stablekern.ops.ssd_state_update import reference, ssd_state_update

from . import FLOATS, HALVES, OpSpec, Sample


def inputs(g: torch.Generator, b: int, h: int, p: int, groups: int, n: int):
    """state, x, dt >= 0, A < 0, B and C, and all optional tensors by name."""

    def random(*shape: int):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    args = (
        random(b, h, p, n), random(b, h, p), random(b, h).abs(), -0.1 - random(h).abs(),
        random(b, groups, n), random(b, groups, n),
    )  # fmt: skip
    return args, {"D": random(h), "z": random(b, h, p), "dt_bias": random(h).abs()}


def samples(g: torch.Generator) -> list[Sample]:
    def sample(name: str, *sizes: int, only: tuple[str, ...] | None = None, **more):
        args, optional = inputs(g, *sizes)
        return Sample(name, args, {k: v for k, v in optional.items() if only is None or k in only} | more)

    def per_channel(*shape: int):
        return torch.randn(shape, generator=g, dtype=torch.float64).abs()

    (state, x, dt, A, B, C), optional = inputs(g, 3, 4, 5, 2, 6)
    permuted = (state.transpose(1, 3).contiguous().transpose(1, 3), x.mT.contiguous().mT, dt.mT.contiguous().mT)
    (wide_state, wide_x, wide_dt, wide_A, wide_B, wide_C), wide = inputs(g, 4, 4, 6, 2, 10)
    strided = (wide_state[::2, ..., ::2], wide_x[::2], wide_dt[::2], wide_A, wide_B[::2, :, ::2], wide_C[::2, :, ::2])
    extreme, _ = inputs(g, 2, 3, 4, 1, 5)
    graded = torch.logspace(-30, 30, 12, dtype=torch.float64).view(3, 4)
    extreme = (extreme[0], extreme[1] * graded, extreme[2], extreme[3] * torch.tensor([1e4, 1.0, 1e-4]), *extreme[4:])
    return [
        sample("typical", 2, 4, 8, 2, 16, dt_softplus=True),
        sample("plain", 2, 3, 4, 1, 5, only=()),
        sample("skip-per-channel", 2, 2, 3, 1, 4, D=per_channel(2, 3)),
        sample("node-stream", 5, 16, 8, 1, 16, dt_softplus=True),
        sample("odd", 3, 9, 7, 3, 19, dt_softplus=True),
        sample("wide", 1, 4, 64, 2, 128, dt_softplus=True),
        sample("clamped", 2, 3, 11, 1, 17, state_clamp=(-0.3, 0.6)),
        sample("clamped-per-head", 2, 4, 3, 2, 4, state_clamp=(-per_channel(4), per_channel(4))),
        sample("clamped-per-channel", 2, 4, 9, 1, 16, state_clamp=per_channel(4, 9)),
        sample("length-1", 1, 1, 1, 1, 1),
        sample("no-states", 2, 4, 3, 1, 0),
        sample("no-channels", 2, 4, 0, 1, 3),
        sample("empty", 0, 4, 3, 1, 3),
        Sample("permuted", (*permuted, A, B, C), optional),
        Sample("strided", strided, wide | {"z": wide["z"][::2]}),
        Sample("extreme", extreme, dtypes=FLOATS),
    ]


def _stepped(state, x, *args, **kwargs):
    """(y, the next state); the state of half-precision inputs is float32."""
    state = state.to(torch.promote_types(x.dtype, torch.float32))
    return ssd_state_update(state, x, *args, **kwargs), state


def _view(outputs, sample):
    y, state = outputs
    return y, state.to(y.dtype)


def _call(**changes):
    def call():
        args, optional = inputs(torch.Generator().manual_seed(0), 2, 4, 3, 2, 6)
        named = dict(zip(("state", "x", "dt", "A", "B", "C"), args, strict=True)) | optional
        named |= {key: change(named) if callable(change) else change for key, change in changes.items()}
        return ssd_state_update(**named)

    return call


SPECS = (
    OpSpec(
        "ssd_state_update",
        op=_stepped,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        view=_view,
        differentiable=False,
        errors=(
            (_call(state=lambda a: a["state"][0]), ValueError, r"`state` must have the shape \(b, h, p, n\): got \(4,"),
            (_call(x=lambda a: a["x"][:, 1:]), ValueError, "`x` and `state` disagree on `h`: got 3 and 4"),
            (_call(C=lambda a: a["C"][:, :, 1:]), ValueError, "`C` and `state` disagree on `n`: got 5 and 6"),
            (
                _call(**{name: lambda a: a["B"][:, :1].expand(-1, 3, -1) for name in "BC"}),
                ValueError,
                "the groups of `B` and `C` must divide the heads of `x`: got 3 and 4",
            ),
            (_call(x=lambda a: a["x"].long()), TypeError, "`x` must be one of .*: got int64"),
            (_call(A=lambda a: a["A"].float()), TypeError, "`A` must be one of float64: got float32"),
            (_call(state=lambda a: a["state"].half()), TypeError, "`state` must be one of float64: got float16"),
            (_call(dt=lambda a: -9 - a["dt"]), ValueError, "`dt_bias` must be >= 0 without `dt_softplus`: got -"),
            (_call(state_clamp=(1.0, 0.0)), ValueError, "`state_clamp` must have lo <= hi"),
            (_call(state_clamp=torch.ones(3)), ValueError, r"one of the shapes \(\), \(h\), \(h p\): got \(3,\)"),
            (_call(D=lambda a: a["D"].requires_grad_()), RuntimeError, "in place and has no gradient; call it under"),
            (_call(state=lambda a: a["state"].requires_grad_()), RuntimeError, "or use `ssd_scan`: got requires_grad"),
        ),
    ),
)
