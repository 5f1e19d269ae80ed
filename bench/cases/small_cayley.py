"""The unitary blocks of a spinor gate: many 8 x 8 and 16 x 16 Cayley transforms."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.cases import Case
from stablekern.ops import small_cayley as spine


def _inputs(batch: int, n: int) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        A = torch.randn(batch, n, n, dtype=torch.complex64, generator=torch.Generator().manual_seed(5))
        return (((A - A.mH) / 4).to(device),)

    return make


def _case(batch: int, n: int) -> Case:
    # A complex LU factorisation and n right-hand sides: 8/3 n^3 multiply-adds of complex numbers, 4 real ones each.
    return Case(
        "small_cayley", f"{batch} x {n}x{n} c64", _inputs(batch, n), stablekern.small_cayley, "torch.linalg.solve",
        spine.reference, 8 * 4 / 3 * batch * n**3, 16.0 * batch * n**2, 2.5, {"fwd": 4.0, "fwd+bwd": 4.0},
    )  # fmt: skip


CASES = (_case(32768, 8), _case(4096, 16))
