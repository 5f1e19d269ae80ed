"""Spec of `linear_scan`: real samples in all real dtypes, complex ones in both complex dtypes."""

from __future__ import annotations

import torch

from stablekern.ops.linear_scan import linear_scan, reference

from . import FLOATS, HALVES, OpSpec, Sample


def inputs(g: torch.Generator, *sizes: int, complex: bool = False):
    """Gates of modulus up to 1.1, tokens and an initial state of size 1."""
    dtype = torch.complex128 if complex else torch.float64
    gate, token, state = (torch.randn(s, generator=g, dtype=dtype) for s in (sizes, sizes, sizes[:2]))
    return [gate / gate.abs() * 1.1 * torch.rand(sizes, generator=g, dtype=torch.float64), token], state


def samples(g: torch.Generator) -> list[Sample]:
    def sample(name: str, *sizes: int, complex: bool = False, start: bool = True, options=None, **kwargs):
        args, state = inputs(g, *sizes, complex=complex)
        named = {"initial_state": state} if start else {}
        dtypes = FLOATS if complex else kwargs.pop("dtypes", None)
        return Sample(name, args, named | (options or {}), dtypes=dtypes, **kwargs)

    backwards, both = {"reverse": True}, {"bidirectional": True}
    per_channel = (-torch.rand(5, generator=g, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64))
    (gate, token), state = inputs(g, 3, 6, 40)
    (gate_c, token_c), state_c = inputs(g, 3, 6, 40, complex=True)
    graded = torch.logspace(-30, 30, 40, dtype=torch.float64)
    return [
        sample("typical", 2, 3, 7, gradcheck=True),
        sample("no-state", 2, 3, 7, start=False, gradcheck=True),
        sample("reverse", 2, 3, 6, options=backwards, gradcheck=True),
        sample("clamped", 2, 5, 9, options={"state_clamp": 0.7}, gradcheck=True),
        sample("clamped-reverse", 2, 5, 9, options=backwards | {"state_clamp": (-0.5, 0.8)}, gradcheck=True),
        sample("clamped-per-channel", 2, 5, 300, options={"state_clamp": per_channel}, gradients=False),
        sample("bidirectional", 2, 4, 6, options=both, gradcheck=True),
        sample("bidirectional-clamped", 3, 18, 67, options=both | {"state_clamp": (-0.5, 0.8)}),
        sample("bidirectional-rows", 1, 2, 1500, options=both | {"state_clamp": 1.5}),
        sample("bidirectional-empty", 2, 0, 5, options=both),
        sample("odd", 3, 7, 67),
        sample("odd-reverse", 3, 7, 67, options=backwards),
        sample("rows", 2, 19, 100, options={"state_clamp": 1.5}),
        sample("one-row", 1, 1, 1500, options={"state_clamp": 1.5}),
        sample("one-row-reverse", 1, 1, 1500, options=backwards | {"state_clamp": (-0.1, 2.0)}),
        sample("few-rows", 1, 3, 2345),
        sample("length-1", 2, 3, 1, gradcheck=True),
        sample("empty", 2, 3, 0),
        sample("empty-batch", 0, 3, 5),
        sample("complex", 2, 3, 7, complex=True, gradcheck=True),
        sample("complex-reverse", 2, 3, 6, complex=True, options=backwards, gradcheck=True),
        sample("complex-bidirectional", 3, 10, 37, complex=True, options=both | {"state_clamp": 0.5}),
        sample("complex-clamped", 2, 5, 9, complex=True, options={"state_clamp": 0.7}, gradcheck=True),
        sample("complex-clamped-reverse", 2, 9, 37, complex=True, options=backwards | {"state_clamp": 0.5}),
        sample(
            "complex-clamped-per-channel",
            2,
            5,
            70,
            complex=True,
            options={"state_clamp": -per_channel[0]},
            gradients=False,
        ),
        sample("complex-odd", 3, 7, 67, complex=True),
        sample("complex-one-row", 1, 1, 1500, complex=True),
        sample("complex-length-1", 2, 3, 1, complex=True),
        sample("complex-empty", 2, 3, 0, complex=True),
        Sample("conjugated", [gate_c.conj(), token_c.conj()], {"initial_state": state_c.conj()}, dtypes=FLOATS),
        Sample("permuted", [gate.mT.contiguous().mT, token.mT.contiguous().mT], {"initial_state": state}),
        Sample("strided", [gate[..., ::2], token[..., ::2]], {"initial_state": state}),
        Sample("strided-complex", [gate_c[..., ::2], token_c[..., ::2]], {"initial_state": state_c}, dtypes=FLOATS),
        Sample("extreme", [gate, token * graded], dtypes=FLOATS),
        Sample("extreme-clamped", [gate * 1e4, token * graded], {"state_clamp": 1.0}, dtypes=FLOATS),
        # Each saturated step keeps the error of the direction and adds its own: float32 alone has a more exact oracle.
        Sample("extreme-complex-clamped", [gate_c * 1e4, token_c * graded], {"state_clamp": 1.0}, dtypes=FLOATS[:1]),
    ]


def _call(complex: bool = False, **changes):
    args, state = inputs(torch.Generator().manual_seed(0), 2, 3, 5, complex=complex)

    def call():
        named = {"gate": args[0], "token": args[1], "initial_state": state}
        named |= {key: change(named) if callable(change) else change for key, change in changes.items()}
        return linear_scan(**named)

    return call


SPECS = (
    OpSpec(
        "linear_scan",
        op=linear_scan,
        reference=reference,
        samples=samples,
        interpreted=(
            *("typical", "no-state", "reverse", "clamped", "clamped-reverse", "odd", "odd-reverse", "rows", "length-1"),
            *("bidirectional", "bidirectional-clamped", "bidirectional-empty"),
            *("empty", "empty-batch", "permuted", "strided", "extreme", "extreme-clamped"),
            *("complex", "complex-reverse", "complex-bidirectional", "complex-length-1", "complex-empty"),
            *("complex-clamped", "complex-clamped-reverse", "complex-clamped-per-channel", "complex-odd"),
            *("conjugated", "strided-complex", "extreme-complex-clamped"),
        ),
        dtypes=FLOATS + HALVES,
        errors=(
            (_call(gate=lambda a: a["gate"][0]), ValueError, r"`gate` must have the shape \(b, d, l\): got \(3, 5\)"),
            (_call(token=lambda a: a["token"][..., 1:]), ValueError, "`token` and `gate` disagree on `l`: got 4 and 5"),
            (_call(initial_state=lambda a: a["initial_state"].mT), ValueError, "`initial_state` and `gate` disagree"),
            (_call(gate=lambda a: a["gate"].long()), TypeError, "`gate` must be one of .*: got int64"),
            (_call(token=lambda a: a["token"].float()), TypeError, "`token` and `gate` must have one dtype: got"),
            (_call(gate=lambda a: a["gate"] + 0j), TypeError, "`token` and `gate` must have one dtype: got"),
            (_call(initial_state=lambda a: a["initial_state"].half()), TypeError, "`initial_state` must be one of"),
            (_call(state_clamp=(1.0, -1.0)), ValueError, "`state_clamp` must have lo <= hi: got lo up to 1 and hi"),
            (_call(state_clamp=torch.ones(2)), ValueError, r"one of the shapes \(\), \(d\): got \(2,\)"),
            (_call(reverse=True, bidirectional=True), ValueError, "`reverse` and `bidirectional` exclude each other"),
            (_call(bidirectional=True), ValueError, "`bidirectional` needs an even number of channels: got 3"),
            (_call(True, state_clamp=-1.0), ValueError, "`state_clamp` must have lo <= hi"),
            (_call(True, state_clamp=(-1.0, 1.0)), ValueError, "complex states must be one largest modulus: got 2"),
        ),
    ),
)
