"""One streaming step of Mamba-2: the node stream of the detector and a language model's layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.cases import Case


def _inputs(b: int, h: int, p: int, n: int) -> Callable[[str], tuple[Tensor, ...]]:
    def make(device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(6)
        state, x, dt = (torch.randn(s, generator=g) for s in ((b, h, p, n), (b, h, p), (b, h)))
        B, C = (torch.randn(b, 1, n, generator=g) for _ in range(2))
        return tuple(t.to(device) for t in (state, x, dt, -1 - 15 * torch.rand(h, generator=g), B, C))

    return make


def _expression(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As the slow path of libraries writes the step, for one group."""
    dt = torch.nn.functional.softplus(dt)
    entering = torch.einsum("bh,bhp,bn->bhpn", dt, x, B[:, 0])
    state.copy_(state * torch.exp(dt * A)[..., None, None] + entering)
    return torch.einsum("bhpn,bn->bhp", state, C[:, 0])


def _case(b: int, h: int, p: int, n: int, gates: dict[str, float]) -> Case:
    states = float(b * h * p * n)
    return Case(
        "ssd_state_update", f"({b},{h},{p},{n})", _inputs(b, h, p, n),
        functools.partial(stablekern.ssd_state_update, dt_softplus=True), "torch expression in place", _expression,
        # The state goes out and in; decay, entering and leaving are 5 flops each.
        5 * states, 4.0 * (2 * states + 2 * b * h * p), 1.0, gates, directions=("step",),
    )  # fmt: skip


CASES = (_case(76, 16, 8, 16, {}), _case(8, 80, 64, 128, {}))
