"""Spec of `spectral_function`."""

from __future__ import annotations

import torch

from stablekern.ops import spectral_function as spine

from . import OpSpec, Sample
from .eigh import repeated, separated

NAMES = ("exp", "sqrt", "rsqrt", "log", "inv")
SQUARE = (lambda w: w * w, lambda w: 2 * w)
SINE = (torch.sin, torch.cos)
STEP = (
    lambda w: torch.sigmoid(400 * (w - 1)),
    lambda w: 400 * torch.sigmoid(400 * (w - 1)) * torch.sigmoid(400 * (1 - w)),
)


def _op(A, function):
    return spine.spectral_function((A + A.mH) / 2, function)


def _reference(A, function):
    H = (A + A.mH) / 2
    if isinstance(function, str):
        return spine.reference(H, function)
    w, V = torch.linalg.eigh(H)
    return (V * function[0](w)[..., None, :].to(V.dtype)) @ V.mH


def definite(g: torch.Generator, batch: tuple[int, ...], n: int, dtype=torch.float64) -> torch.Tensor:
    """Eigenvalues between 0.5 and 2.5, at least half a mean gap apart."""
    return separated(g, batch, n, dtype=dtype) + 1.5 * torch.eye(n, dtype=dtype)


def samples(g: torch.Generator) -> list[Sample]:
    degenerate = torch.stack([A + 1.5 * torch.eye(4, dtype=torch.float64) for A in repeated(4).values()])
    degenerate[3:5] += torch.eye(4, dtype=torch.float64)  # the edges' and the star's lowest eigenvalues are negative
    small = definite(g, (), 3, torch.complex128)
    return [
        Sample("typical", (definite(g, (2, 3), 19), "exp")),
        Sample("length-1", (definite(g, (3,), 2)[:, :1, :1], "log"), gradcheck=True),
        Sample("odd", (definite(g, (5,), 3), "rsqrt")),
        Sample("permuted", (definite(g, (5,), 4).permute(2, 1, 0).contiguous().permute(2, 1, 0), "inv")),
        Sample("strided", (torch.cat([definite(g, (3,), 6)] * 2, -1)[..., :6], "sqrt")),
        Sample("empty", (definite(g, (0,), 19), "sqrt")),
        Sample("one-matrix", (definite(g, (), 33), "sqrt")),
        Sample("indefinite-exp", (separated(g, (2,), 5), "exp"), gradcheck=True),
        Sample("negative-inv", (-definite(g, (2,), 5), "inv"), gradcheck=True),
        Sample("scaled-down", (1e-15 * definite(g, (3,), 8), "rsqrt")),
        Sample("scaled-up", (1e15 * definite(g, (3,), 8), "log")),
        *(Sample(f"large-{name}", (definite(g, (2,), 70), name)) for name in ("exp", "log")),
        Sample("complex-large", (definite(g, (2,), 70, torch.complex128), "rsqrt")),
        Sample("conj-view", (definite(g, (3,), 5, torch.complex128).conj(), "sqrt")),
        Sample("given", (separated(g, (2, 2), 7), SINE), gradcheck=True),
        Sample("given-step", (definite(g, (3,), 8), STEP)),
        *(Sample(f"{name}", (definite(g, (2,), 6), name)) for name in NAMES),
        *(Sample(f"complex-{name}", (small, name), gradcheck=True) for name in NAMES),
        *(Sample(f"repeated-{name}", (degenerate, name), gradcheck=True, gradients=False) for name in NAMES),
        *(
            Sample(f"repeated-given-{label}", (degenerate, function), gradcheck=True, gradients=False)
            for label, function in (("square", SQUARE), ("sine", SINE))
        ),
    ]


def _call(A=None, function="exp"):
    return lambda: spine.spectral_function(torch.eye(3) if A is None else A, function)


SPECS = (
    OpSpec(
        "spectral_function",
        op=_op,
        reference=_reference,
        samples=samples,
        # In float64 the reference has errors of its own: 5 n eps in vectors, n <= 70.
        floor_ulps=5.0 * 70,
        errors=(
            (_call(torch.zeros(2, 3, 4)), ValueError, "`A` must be square in `n`: got 4 and 3"),
            (_call(torch.eye(3).int()), TypeError, "`A` must be one of .*: got int32"),
            (_call(function="tanh"), ValueError, "`function` must be one of 'exp', .*, 'inv': got 'tanh'"),
            (_call(function=torch.exp), TypeError, "`function` must be a name or a pair .*: got a builtin_function"),
            (_call(function=(torch.exp, 1.0)), TypeError, "`function` must be a name or a pair .*: got a tuple"),
            (_call(function=(torch.sum, torch.exp)), ValueError, r"`f` must keep the shape .*: got \(\) and \(1, 3\)"),
            (_call(function=(torch.Tensor.double, torch.exp)), TypeError, "`f` must keep the dtype .*float64"),
            (_call(function=(torch.Tensor.tolist, torch.exp)), TypeError, "`f` must return a tensor: got list"),
        ),
    ),
)
