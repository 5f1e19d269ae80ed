"""A recurrence that grows: clamps now and then, or behind it, leave what is in between."""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series, largest

__all__ = ["exhibit"]

_CHANNELS, _STEPS, _BOUND, _EVERY = 64, 1024, 100.0, 256


def _scan(gate: Tensor, token: Tensor, every: int | None) -> Tensor:
    """h_t = a_t h_(t-1) + b_t step by step; the state is clamped behind each `every` of them."""
    state, states = torch.zeros(_CHANNELS, dtype=gate.dtype), []
    for t, (a, b) in enumerate(zip(gate.unbind(-1), token.unbind(-1), strict=True), 1):
        state = a * state + b
        if every is not None and t % every == 0:
            state = state.clamp(-_BOUND, _BOUND)
        states.append(state)
    return torch.stack(states, -1)


def _ours(gate: Tensor, token: Tensor) -> Tensor:
    return stablekern.linear_scan(gate[None], token[None], state_clamp=_BOUND)[0]


_METHODS = (
    (STOCK, "no clamp", lambda a, b: _scan(a, b, None)),
    (FIX, f"state clamped every {_EVERY} steps", lambda a, b: _scan(a, b, _EVERY)),
    (FIX, "outputs clamped", lambda a, b: _scan(a, b, None)),
    (OURS, "linear_scan(state_clamp=100)", _ours),
)


def exhibit() -> Exhibit:
    generator = torch.Generator().manual_seed(0)
    decay = torch.linspace(0.95, 1.1, _CHANNELS)[:, None].expand(_CHANNELS, _STEPS).contiguous()
    token = torch.randn(_CHANNELS, _STEPS, generator=generator)
    weight = torch.randn(_CHANNELS, _STEPS, generator=generator)
    rows, series = [], []
    exact = _scan(decay.double(), token.double(), 1)
    for who, name, method in _METHODS:
        gate, inputs = decay.clone().requires_grad_(), token.clone().requires_grad_()
        states = method(gate, inputs)
        out = states.clamp(-_BOUND, _BOUND) if name == "outputs clamped" else states
        gradients = torch.autograd.grad((out * weight).sum(), (gate, inputs))
        seen = states.detach()
        above = int((~(seen.abs() <= _BOUND)).sum())
        bad = sum(int((~g.isfinite()).sum()) for g in gradients)
        biggest = largest(seen.abs().flatten().tolist())
        rows.append(Row(who, name, f"states: |h| above {_BOUND:g} or not finite", above, seen.numel(), biggest))
        entries = sum(g.numel() for g in gradients)
        finite = largest(float(g[g.isfinite()].abs().max()) for g in gradients)
        rows.append(Row(who, name, "entries of the gradient: not finite", bad, entries, finite))
        channel = seen[-4].abs().clamp_min(1e-3)[:: _STEPS // 256]
        series.append(Series(who, name, tuple(range(1, _STEPS + 1, _STEPS // 256)), tuple(channel.tolist())))
        if who == OURS:
            off, usual = ((h.double() - exact).abs() for h in (seen, _scan(decay, token, 1)))
            unlike = int((~(off <= 2 * usual.max())).sum())
            case = "states: twice the error of a float32 loop with a clamp at every step, against float64"
            rows.append(Row(who, name, case, unlike, off.numel(), float(off.max())))
    return Exhibit(
        name="state_clamp",
        seen="the states of a state-space layer blow up",
        cause="a decay above 1, or many large inputs: the state leaves every range between two clamps",
        published=f"clamp the state every {_EVERY} steps; clamp the outputs",
        remedy="linear_scan, selective_scan, ssd_scan with state_clamp: each step clamped, and still parallel in time",
        counted="a state beyond the bound, a gradient that is not finite",
        measured="largest finite |h|, largest finite gradient, largest difference",
        rows=tuple(rows),
        figure=Figure(
            "step",
            "|h| of one channel",
            tuple(series[:2] + series[3:]),
            f"One channel with a decay of {float(decay[-4, 0]):.3f}, bound {_BOUND:g}.",
            y_log=True,
        ),
    )
