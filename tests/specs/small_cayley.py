"""Spec of `small_cayley`: skew-Hermitian and general matrices, real and complex."""

from __future__ import annotations

import torch

from stablekern.ops.small_cayley import reference, small_cayley

from . import OpSpec, Sample


def skew(g: torch.Generator, *shape: int, dtype=torch.complex128) -> torch.Tensor:
    A = torch.randn(*shape, shape[-1], generator=g, dtype=dtype)
    return (A - A.mH) / 2


def samples(g: torch.Generator) -> list[Sample]:
    swap = torch.tensor([[-1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)  # a zero pivot without an exchange of rows
    sizes = torch.logspace(-12, 3, 20, dtype=torch.float64)[:, None, None]
    return [
        Sample("typical", (skew(g, 2, 3, 4),), gradcheck=True),
        Sample("real", (skew(g, 5, 3, dtype=torch.float64),), gradcheck=True),
        Sample("general", (torch.randn(7, 4, 4, generator=g, dtype=torch.complex128) / 4,), gradcheck=True),
        Sample("pivoting", (swap.expand(3, 2, 2),), gradcheck=True),
        Sample("odd", (skew(g, 37, 5),)),
        Sample("blocks-8", (skew(g, 50, 8),)),
        Sample("blocks-16", (skew(g, 21, 16),)),
        Sample("blocks-16-real", (skew(g, 21, 16, dtype=torch.float64),)),
        Sample("large", (skew(g, 2, 40),)),
        Sample("graded", (sizes * skew(g, 20, 4),), gradients=False),
        Sample("length-1", (skew(g, 1, 1),), gradcheck=True),
        Sample("zeros", (torch.zeros(3, 4, 4, dtype=torch.complex128),)),
        Sample("empty", (torch.zeros(0, 4, 4, dtype=torch.complex128),)),
        Sample("no-rows", (torch.zeros(3, 0, 0, dtype=torch.float64),)),
        Sample("permuted", (skew(g, 6, 4).mT,)),
        Sample("strided", (skew(g, 6, 8)[::2, ::2, ::2],)),
        Sample("conjugate", (skew(g, 6, 4).conj(),)),
    ]


SPECS = (
    OpSpec(
        "small_cayley",
        op=small_cayley,
        reference=reference,
        samples=samples,
        floor_ulps=16.0,  # the adjoint's two products, where the reference's is a solve
        errors=(
            (lambda: small_cayley(torch.zeros(3, 4)), ValueError, "`A` must be square in `n`: got 4 and 3"),
            (lambda: small_cayley(torch.zeros(3)), ValueError, r"`A` must have the shape \(\.\.\., n, n\): got \(3,\)"),
            (lambda: small_cayley(torch.zeros(2, 2).long()), TypeError, "`A` must be one of .*: got int64"),
        ),
    ),
)
