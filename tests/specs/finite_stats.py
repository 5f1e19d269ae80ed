"""Spec of `finite_stats`."""

from __future__ import annotations

import math

import torch

from stablekern.ops.finite_stats import finite_stats, reference

from . import FLOATS, HALVES, OpSpec, Sample


def samples(g: torch.Generator) -> list[Sample]:
    def random(*shape: int):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    nan, inf = math.nan, math.inf
    poor = random(4, 5)
    poor[0, 1], poor[2, 2], poor[3, 4], poor[3, 0] = nan, inf, -inf, nan
    bad = torch.tensor([nan, inf, -inf], dtype=torch.float64)
    falling = torch.linspace(7, 1, 40_000, dtype=torch.float64)
    falling[5], falling[20_000] = nan, inf
    complex_ = torch.complex(random(7), random(7))
    complex_[1], complex_[2], complex_[3] = complex(nan, 1.0), complex(0.0, -inf), complex(inf, nan)
    return [
        Sample("typical", ([random(3, 4), poor, random(7)],)),
        Sample("nothing-finite", ([bad, torch.full((), nan, dtype=torch.float64)],)),
        Sample("complex", ([complex_],)),
        Sample("scalar", ([random()],)),
        Sample("integers", ([torch.tensor([3, -7, 5]), torch.tensor([True, False])],)),
        Sample(
            "every-integer",
            (
                [
                    torch.tensor([low, high, 5], dtype=dtype)
                    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
                    for low, high in [(max(torch.iinfo(dtype).min, -(2**53)), min(torch.iinfo(dtype).max, 2**53))]
                ],
            ),
        ),
        Sample("length-1", ([random(1)],)),
        Sample("empty", ([random(0, 3), random(2)],)),
        # Several blocks of 16 384 numbers, with what counts in the first, in the last or in each of them.
        Sample("blocks", ([torch.cat([poor.flatten(), random(40_000).abs(), poor.flatten()]), random(16_384).abs()],)),
        Sample("falling", ([falling, -falling],)),  # a bad entry is no 0 to the minimum or maximum of the others
        Sample("complex-large", ([1e200 * torch.complex(random(7), random(7))],), dtypes=(torch.float64,)),
        # Finite parts, of a modulus that is not: no infinite entry.
        Sample(
            "complex-largest",
            ([1.7e308 * torch.ones(2, dtype=torch.complex128) * (1 + 1j), random(3)],),
            dtypes=(torch.float64,),
        ),
        Sample("permuted", ([random(4, 3).t(), poor.t()],)),
        Sample("largest", ([torch.full((3, 4), 6e4, dtype=torch.float64)],)),
    ]


SPECS = (
    OpSpec(
        "finite_stats",
        op=finite_stats,
        reference=reference,
        samples=samples,
        dtypes=FLOATS + HALVES,
        differentiable=False,
        errors=(
            (lambda: finite_stats([torch.zeros(2), 1.0]), TypeError, r"`tensors\[1\]` must be a tensor: got float"),
            (
                lambda: finite_stats([torch.zeros(2), torch.zeros(2, device="meta")]),
                ValueError,
                r"`tensors\[1\]` and `tensors\[0\]` must be on one device: got meta and cpu",
            ),
        ),
    ),
)
