"""The Mamba blocks once more, as slow loops written from their formulas, and the comparison with the fast ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import stablekern.nn as snn


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def slow_mamba2(block: snn.Mamba2, x: Tensor, *, fallback: bool = False, clamp: float | None = None) -> Tensor:
    """The Mamba-2 block one sequence, step and head at a time, from its parameters alone."""
    p = dict(block.named_parameters())
    heads, groups, states = p["A_log"].shape[0], block.ngroups, block.d_state
    inner = p["norm.weight"].shape[0]
    width, taps = inner // heads, p["conv1d.weight"].shape[-1]
    result = []
    for sequence in x:
        rows = sequence @ p["in_proj.weight"].T
        z, u, dt = rows[:, :inner], rows[:, inner : -heads or None], rows[:, -heads:]
        state = [x.new_zeros(width, states) for _ in range(heads)]
        outputs = []
        for t in range(len(sequence)):
            conv = p["conv1d.bias"] + sum(
                p["conv1d.weight"][:, 0, taps - 1 - lag] * u[t - lag] for lag in range(taps) if t >= lag
            )
            conv = silu(conv)
            B, C = (conv[inner:].reshape(2, groups, states)[i] for i in (0, 1))
            y = []
            for h in range(heads):
                v = conv[h * width : (h + 1) * width]
                y.append(p["D"][h] * v)
                if fallback:
                    continue
                group = h * groups // heads
                delta = torch.log(1 + torch.exp(dt[t, h] + p["dt_bias"][h]))
                decay = torch.exp(-delta * torch.exp(p["A_log"][h]))
                state[h] = decay * state[h] + delta * torch.outer(v, B[group])
                if clamp is not None:
                    state[h] = state[h].clamp(-clamp, clamp)
                y[-1] = y[-1] + state[h] @ C[group]
            gated = (torch.cat(y) * silu(z[t])).reshape(groups, -1)
            normed = gated / torch.sqrt((gated**2).mean(1, keepdim=True) + 1e-5)
            outputs.append(p["out_proj.weight"] @ (normed.flatten() * p["norm.weight"]))
        result.append(torch.stack(outputs))
    return torch.stack(result)


def slow_mamba(block: snn.Mamba, x: Tensor, *, fallback: bool = False, clamp: float | None = None) -> Tensor:
    """The Mamba-1 block one sequence, step and channel at a time, from its parameters alone."""
    p = {"in_proj.bias": 0.0, "out_proj.bias": 0.0, "conv1d.bias": 0.0, **dict(block.named_parameters())}
    inner, states = p["A_log"].shape
    rank, taps = p["dt_proj.weight"].shape[1], p["conv1d.weight"].shape[-1]
    result = []
    for sequence in x:
        rows = sequence @ p["in_proj.weight"].T + p["in_proj.bias"]
        u, z = rows[:, :inner], rows[:, inner:]
        state = [x.new_zeros(states) for _ in range(inner)]
        outputs = []
        for t in range(len(sequence)):
            conv = p["conv1d.bias"] + sum(
                p["conv1d.weight"][:, 0, taps - 1 - lag] * u[t - lag] for lag in range(taps) if t >= lag
            )
            conv = silu(conv)
            projected = p["x_proj.weight"] @ conv
            low, B, C = projected[:rank], projected[rank : rank + states], projected[rank + states :]
            delta = torch.log(1 + torch.exp(p["dt_proj.weight"] @ low + p["dt_proj.bias"]))
            y = []
            for d in range(inner):
                y.append(p["D"][d] * conv[d])
                if fallback:
                    continue
                state[d] = torch.exp(-delta[d] * torch.exp(p["A_log"][d])) * state[d] + delta[d] * conv[d] * B
                if clamp is not None:
                    state[d] = state[d].clamp(-clamp, clamp)
                y[-1] = y[-1] + state[d] @ C
            outputs.append(p["out_proj.weight"] @ (torch.stack(y) * silu(z[t])) + p["out_proj.bias"])
        result.append(torch.stack(outputs))
    return torch.stack(result)


def compare(module: nn.Module, actual: Tensor, expected: Tensor) -> None:
    """Values and the gradients of one random linear loss to every parameter, at float64 accuracy."""
    weight = torch.randn_like(expected)
    parameters = dict(module.named_parameters())
    got, wanted = (
        torch.autograd.grad((out * weight).sum(), list(parameters.values()), allow_unused=True)
        for out in (actual, expected)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    for name, a, b in zip(parameters, got, wanted, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")
