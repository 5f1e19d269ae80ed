"""One streaming step of Mamba-1: an EEG stream's layer and a language model's."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.cases import Case


def _inputs(b: int, d: int, n: int) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(6)
        state, x, dt = (torch.randn(s, generator=g) for s in ((b, d, n), (b, d), (b, d)))
        B, C = (torch.randn(b, n, generator=g) for _ in range(2))
        A = -torch.arange(1.0, n + 1).repeat(d, 1)
        return tuple(t.to(device) for t in (state, x, dt, A, B, C))

    return make


def _expression(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As the slow path of libraries writes the step."""
    dt = torch.nn.functional.softplus(dt)
    decay = torch.exp(torch.einsum("bd,dn->bdn", dt, A))
    state.copy_(state * decay + x[..., None] * torch.einsum("bd,bn->bdn", dt, B))
    return torch.einsum("bdn,bn->bd", state, C)


def _case(b: int, d: int, n: int) -> Case:
    states, ours = float(b * d * n), functools.partial(stablekern.selective_state_update, dt_softplus=True)
    return Case(
        "selective_state_update", f"({b},{d},{n})", _inputs(b, d, n), ours, "torch expression in place", _expression,
        # The state goes out and in; an exponential (a reduction and a polynomial), entering and leaving.
        (1 + 16 + 5) * states, 4.0 * (2 * states + d * n + 3 * b * d), 1.0, {}, directions=("step",),
    )  # fmt: skip


CASES = (_case(76, 128, 16), _case(8, 5120, 16))
