"""Spec of `selective_state_update`."""

from __future__ import annotations

import torch

from stablekern.ops.selective_state_update import reference, selective_state_update

from . import FLOATS, HALVES, OpSpec, Sample


def inputs(g: torch.Generator, b: int, row: tuple[int, ...], groups: int | None, n: int, *, is_complex: bool = False):
    """state, x, dt >= 0, A with a negative real part, B, C, and the optional tensors; `row` is (d,) or (h, d)."""

    def random(*shape: int, dtype=torch.float64):
        return torch.randn(shape, generator=g, dtype=dtype)

    deep = torch.complex128 if is_complex else torch.float64
    state, A = random(b, *row, n, dtype=deep), random(*row, n, dtype=deep)
    A = torch.complex(-0.1 - A.real.abs(), 3 * A.imag) if is_complex else -0.1 - A.abs()
    B, C = (random(b, *(() if groups is None else (groups,)), n, dtype=deep) for _ in range(2))
    optional = {"D": random(*row), "z": random(b, *row), "dt_bias": random(*row).abs()}
    return (state, random(b, *row), random(b, *row).abs(), A, B, C), optional


def samples(g: torch.Generator) -> list[Sample]:
    def sample(name: str, *sizes, is_complex: bool = False, only: tuple[str, ...] | None = None, **more):
        args, optional = inputs(g, *sizes, is_complex=is_complex)
        return Sample(name, args, {k: v for k, v in optional.items() if only is None or k in only} | more)

    (state, x, dt, A, B, C), optional = inputs(g, 3, (2, 5), 2, 4)
    permuted = (
        state.transpose(1, 2).contiguous().transpose(1, 2),
        x,
        dt.mT.contiguous().mT,
        A,
        B.mT.contiguous().mT,
        C,
    )
    return [
        sample("typical", 2, (40,), None, 16, dt_softplus=True),
        sample("plain", 2, (3,), None, 5, only=()),
        sample("groups", 3, (34,), 2, 7, dt_softplus=True),
        sample("heads", 2, (4, 6), 2, 5, dt_softplus=True),
        sample("odd", 3, (7,), None, 19, state_clamp=0.5),
        sample("clamped", 2, (33,), None, 16, state_clamp=(-0.3, 0.6)),
        sample("clamped-heads", 2, (2, 3), 1, 4, state_clamp=0.4),
        sample("complex", 2, (5,), None, 3, is_complex=True, dt_softplus=True),
        sample("complex-clamped", 2, (5,), 5, 3, is_complex=True, state_clamp=0.5),
        sample("complex-odd", 3, (21,), 3, 19, is_complex=True, state_clamp=0.7, dt_softplus=True),
        sample("complex-heads", 2, (4, 6), 2, 16, is_complex=True, dt_softplus=True),
        sample("length-1", 1, (1,), None, 1),
        sample("no-states", 2, (5,), None, 0),
        sample("empty", 0, (5,), None, 3),
        Sample("permuted", permuted, optional),
    ]


def _stepped(state, *args, **kwargs):
    return selective_state_update(state, *args, **kwargs), state


def _view(outputs, sample):
    y, state = outputs
    return y, state if state.is_complex() else state.to(y.dtype)


def _call(**changes):
    def call():
        args, optional = inputs(torch.Generator().manual_seed(0), 2, (4,), 2, 6)
        named = dict(zip(("state", "x", "dt", "A", "B", "C"), args, strict=True)) | optional
        named |= {key: change(named) if callable(change) else change for key, change in changes.items()}
        return selective_state_update(**named)

    return call


SPECS = (
    OpSpec(
        "selective_state_update",
        op=_stepped,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        view=_view,
        differentiable=False,
        errors=(
            (
                _call(state=lambda a: a["state"][0]),
                ValueError,
                r"`state` must have the shape \(b, d, n\): got \(4, 6\)",
            ),
            (_call(x=lambda a: a["x"][:, 1:]), ValueError, "`x` and `state` disagree on `d`: got 3 and 4"),
            (_call(C=lambda a: a["C"][:, 0]), ValueError, r"`C` must have the shape \(b, g, n\): got \(2, 6\)"),
            (
                _call(**{name: lambda a: a["B"][:, :1].expand(-1, 3, -1) for name in "BC"}),
                ValueError,
                "the groups of `B` and `C` must divide the channels of `x`: got 3 and 4",
            ),
            (_call(A=lambda a: a["A"].float()), TypeError, "`A` must be one of float64: got float32"),
            (
                _call(dt=lambda a: -9 - a["dt"]),
                ValueError,
                "`dt` \\+ `dt_bias` must be >= 0 without `dt_softplus`: got -",
            ),
            (_call(state_clamp=(1.0, 0.0)), ValueError, "`state_clamp` must have lo <= hi"),
            (_call(D=lambda a: a["D"].requires_grad_()), RuntimeError, "in place and has no gradient; call it under"),
        ),
    ),
)
