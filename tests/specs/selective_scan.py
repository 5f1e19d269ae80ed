"""Spec of `selective_scan`."""

from __future__ import annotations

import torch

from stablekern.ops.selective_scan import reference, selective_scan

from . import FLOATS, HALVES, OpSpec, Sample


def inputs(g: torch.Generator, b: int, d: int, l: int, groups: int, n: int, *, is_complex: bool = False):  # noqa: E741
    """u, delta >= 0, A with a negative real part, B and C, and all optional tensors by name."""

    def random(*shape: int, dtype=torch.float64):
        return torch.randn(shape, generator=g, dtype=dtype)

    deep = torch.complex128 if is_complex else torch.float64
    u, delta = random(b, d, l), random(b, d, l).abs()
    A, B, C = (random(*shape, dtype=deep) for shape in ((d, n), (b, groups, n, l), (b, groups, n, l)))
    A = torch.complex(-0.1 - A.real.abs(), 3 * A.imag) if is_complex else -0.1 - A.abs()
    optional = {
        "D": random(d),
        "z": random(b, d, l),
        "delta_bias": random(d).abs(),
        "initial_state": random(b, d, n, dtype=deep),
        "return_last_state": True,
    }
    return (u, delta, A, B, C), optional


def samples(g: torch.Generator) -> list[Sample]:
    def sample(name: str, *sizes: int, only: tuple[str, ...] | None = None, changes=None, **kwargs):
        settings = {key: kwargs.pop(key) for key in ("is_complex",) if key in kwargs}
        swap = kwargs.pop("swap", lambda *args: args)
        args, optional = inputs(g, *sizes, **settings)
        changes = {} if changes is None else {key: change(args, optional) for key, change in changes.items()}
        optional = {key: value for key, value in optional.items() if only is None or key in only} | changes
        return Sample(name, swap(*args), optional, **kwargs)

    def each_state(args, optional):
        return -torch.rand(args[2].shape, generator=g, dtype=torch.float64), 0.5 * torch.ones(args[2].shape[0])

    def without_groups(u, delta, A, B, C):
        return u, delta, A, B[:, 0], C[:, 0]

    def constant(u, delta, A, B, C):
        return u, delta, A, A.conj() * 0.7, C

    def all_constant(u, delta, A, B, C):
        return u, delta, A, A.conj() * 0.7, A.flip(0)

    def packed(u, delta, A, B, C):
        return u, delta, A, *(torch.view_as_real(M[:, 0]).flatten(-2) for M in (B, C))

    softplus = {"delta_softplus": lambda *_: True}
    clamped = {"state_clamp": lambda *_: 0.6}
    reverse, both = {"reverse": lambda *_: True}, {"bidirectional": lambda *_: True}
    (u, delta, A, B, C), _ = inputs(g, 2, 3, 70, 1, 5)
    graded = torch.logspace(-30, 30, 70, dtype=torch.float64)
    extreme = (u * graded, delta, A * torch.tensor([[1e4], [1.0], [1e-4]]), B, C)
    (u, delta, A, B, C), optional = inputs(g, 2, 4, 6, 2, 5)
    permuted = (u.mT.contiguous().mT, delta.mT.contiguous().mT, A, B.transpose(1, 2).contiguous().transpose(1, 2), C)
    strided = (u[..., ::2], delta[..., ::2], A, B[..., ::2], C[..., ::2])
    return [
        sample("typical", 2, 4, 7, 2, 5, changes=softplus, gradcheck=True),
        sample("plain", 2, 3, 40, 1, 4, only=(), swap=without_groups),
        sample("gated", 2, 3, 5, 1, 2, only=("z", "D"), gradcheck=True),
        sample("clamped", 2, 4, 9, 2, 3, changes=clamped, gradcheck=True),
        sample("clamped-odd", 2, 35, 71, 1, 7, changes={"state_clamp": lambda *_: (0.1, 0.9)}),
        sample("clamped-each-state", 2, 20, 37, 1, 16, changes={"state_clamp": each_state} | softplus, gradients=False),
        sample("odd", 3, 21, 67, 3, 13, changes=softplus),
        sample("one-lane", 2, 1, 33, 1, 1),
        sample("sixteen", 2, 64, 100, 1, 16, changes=softplus),
        sample("many-states", 1, 19, 33, 1, 100, only=("D",)),
        sample("many-channels", 1, 150, 20, 1, 3, changes=clamped),
        sample("channels-of-their-own", 2, 5, 18, 5, 4),
        sample("constant-enter", 2, 3, 6, 1, 4, swap=constant, gradcheck=True),
        sample("constant", 2, 3, 6, 1, 4, swap=all_constant, changes=clamped, gradcheck=True),
        sample("complex", 2, 4, 7, 2, 3, is_complex=True, changes=softplus, gradcheck=True),
        sample("complex-pairs", 2, 3, 40, 1, 4, is_complex=True, swap=packed),
        sample("complex-constant", 2, 3, 6, 1, 2, is_complex=True, swap=all_constant, gradcheck=True),
        sample("complex-clamped", 2, 20, 37, 1, 5, is_complex=True, changes=clamped, gradcheck=False),
        sample("complex-clamped-small", 2, 3, 6, 1, 2, is_complex=True, changes=clamped, gradcheck=True),
        sample("length-1", 2, 4, 1, 1, 3, gradcheck=True),
        sample("empty", 2, 4, 0, 1, 3),
        sample("empty-batch", 0, 4, 5, 1, 3),
        sample("no-states", 2, 4, 5, 1, 0),
        sample("no-channels", 2, 0, 5, 1, 3, swap=without_groups),
        Sample("permuted", permuted, optional),
        Sample("strided", strided, optional | {"z": optional["z"][..., ::2]}),
        Sample("extreme", extreme, dtypes=FLOATS),
        sample("reverse", 2, 4, 7, 2, 5, changes=softplus | reverse, gradcheck=True),
        sample("reverse-clamped", 2, 35, 71, 1, 7, changes=clamped | reverse),
        sample("bidirectional", 2, 4, 7, 2, 5, changes=softplus | both, gradcheck=True),
        sample("bidirectional-odd", 2, 70, 67, 2, 9, changes=clamped | both),
        sample("bidirectional-constant", 2, 6, 5, 2, 4, swap=constant, changes=both, gradcheck=True),
        sample("bidirectional-all-constant", 2, 6, 37, 1, 4, swap=all_constant, changes=clamped | both),
        sample("bidirectional-complex", 2, 4, 7, 2, 3, is_complex=True, changes=softplus | both, gradcheck=True),
        sample("bidirectional-complex-clamped", 2, 38, 37, 2, 5, is_complex=True, changes=clamped | both),
    ]


def _view(outputs, sample):
    """The last state of half-precision inputs is float32; it is compared in the dtype of y."""
    if isinstance(outputs, torch.Tensor):
        return (outputs,)
    y, last = outputs
    return y, last if last.is_complex() else last.to(y.dtype)


def _call(is_complex: bool = False, **changes):
    g = torch.Generator().manual_seed(0)

    def call():
        args, optional = inputs(g, 2, 4, 5, 2, 6, is_complex=is_complex)
        named = dict(zip(("u", "delta", "A", "B", "C"), args, strict=True)) | optional
        named |= {key: change(named) if callable(change) else change for key, change in changes.items()}
        return selective_scan(**named)

    return call


def _three(named):
    return named["B"][:, :1].expand(-1, 3, -1, -1)


def _constant(channels: int):
    u, A = torch.ones(2, channels, 5), -torch.ones(channels, 4)
    return u, u, A, A, A


SPECS = (
    OpSpec(
        "selective_scan",
        op=selective_scan,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        view=_view,
        interpreted=(
            *("typical", "plain", "gated", "clamped", "clamped-odd", "one-lane", "constant"),
            *("constant-enter", "complex", "complex-constant", "complex-clamped-small", "length-1", "empty"),
            *("empty-batch", "no-states", "no-channels", "permuted", "reverse", "bidirectional", "bidirectional-odd"),
            *("bidirectional-constant", "bidirectional-all-constant", "bidirectional-complex"),
        ),
        errors=(
            (_call(u=lambda a: a["u"][0]), ValueError, r"`u` must have the shape \(b, d, l\): got \(4, 5\)"),
            (_call(delta=lambda a: a["delta"][..., 1:]), ValueError, "`delta` and `u` disagree on `l`: got 4 and 5"),
            (_call(C=lambda a: a["C"][:, :, :2]), ValueError, "`C` and `A` disagree on `n`: got 2 and 6"),
            (_call(C=lambda a: a["C"][:, 0]), ValueError, "`C` and `B` disagree on `g`: got 1 and 2"),
            (_call(B=_three, C=_three), ValueError, "groups of `B` and `C` must divide the channels of `u`: got 3 and"),
            (_call(B=lambda a: a["B"][0, 0, 0]), ValueError, r"`B` must have the shape \(b, n, l\), \(b, g, n, l\) or"),
            (_call(B=None), TypeError, "`B` must be a tensor: got NoneType"),
            (_call(u=lambda a: a["u"].long()), TypeError, "`u` must be one of .*: got int64"),
            (_call(A=lambda a: a["A"].float()), TypeError, "`A` must be one of float64: got float32"),
            (_call(B=lambda a: a["B"].to(torch.complex128)), TypeError, "`B` must be one of float64: got complex128"),
            (_call(delta=lambda a: -a["delta"]), ValueError, "`delta` \\+ `delta_bias` must be >= 0 without `delta_so"),
            (_call(z=lambda a: a["z"][:1]), ValueError, "`z` and `u` disagree on `b`: got 1 and 2"),
            (_call(state_clamp=-1.0), ValueError, "`state_clamp` must have lo <= hi: got lo up to 1 and hi from -1"),
            (_call(state_clamp=(1.0, 2.0, 3.0)), ValueError, r"`state_clamp` must be c or \(lo, hi\): got 3 values"),
            (_call(state_clamp="1"), TypeError, "`state_clamp` must be a number, a tensor or a pair of them: got str"),
            (_call(state_clamp=torch.ones(3)), ValueError, r"one of the shapes \(\), \(d\), \(d n\): got \(3,\)"),
            (_call(state_clamp=torch.ones(4, requires_grad=True)), ValueError, "`state_clamp` is not differentiable"),
            (
                _call(state_clamp=torch.ones(4, device="meta")),
                ValueError,
                "in `state_clamp` must hold values: got a meta",
            ),
            (_call(initial_state=lambda a: a["initial_state"].mT), ValueError, "`initial_state` and `u` disagree on"),
            (_call(bidirectional=True, reverse=True), ValueError, "`reverse` and `bidirectional` exclude each other"),
            (
                _call(bidirectional=True, B=lambda a: a["B"][:, :1], C=lambda a: a["C"][:, :1]),
                ValueError,
                "`bidirectional` needs an even number of groups of `B` and `C`: got 1",
            ),
            (
                lambda: selective_scan(*_constant(3), bidirectional=True),
                ValueError,
                "`bidirectional` needs an even number of channels of `u`: got 3",
            ),
            (_call(True, state_clamp=(-1.0, 1.0)), ValueError, "`state_clamp` of complex states is one bound on the m"),
            (_call(True, B=lambda a: a["B"].real), ValueError, "real `B` with complex `A` holds pairs, its last axis"),
            (_call(True, A=lambda a: a["A"].to(torch.complex64)), TypeError, "`A` must be one of complex128: got comp"),
        ),
    ),
)
