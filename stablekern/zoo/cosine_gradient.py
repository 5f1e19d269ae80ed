"""Cosines of short vectors: a clamp of the norm leaves gradients of 1e6, a clamp of the value leaves none."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series, largest, spread

__all__ = ["exhibit"]

_SIZE, _PAIRS = 16, 64
_BOUND = 1001.0  # our bound is 1000, right to rounding


def _clamped(x: Tensor, limit: float) -> Tensor:
    """norm -> at least 1e-6 -> divide -> product -> clamp; the first two nodes of (B, 2, T, D), (B, 1, T)."""
    unit = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    return (unit[:, 0] * unit[:, 1]).sum(-1).clamp(-limit, limit)[:, None]


_METHODS: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    (STOCK, "norm >= 1e-6, value in [-1, 1]", lambda x: _clamped(x, 1.0)),
    (FIX, "norm >= 1e-6, value in [-0.99, 0.99]", lambda x: _clamped(x, 0.99)),
    (OURS, "cosine_edges", stablekern.cosine_edges),
)


def _gradient(method: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """d cos / d x_1 of each pair, (pairs, D)."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(method(leaf).sum(), leaf)[0][0, 0]


def _short() -> tuple[list[Row], list[Series]]:
    generator = torch.Generator().manual_seed(0)
    lengths = spread(1e-8, 1.0, 33)
    direction = torch.nn.functional.normalize(torch.randn(2, _PAIRS, _SIZE, generator=generator), dim=-1)
    rows, series = [], []
    for who, name, method in _METHODS:
        found = []
        for length in lengths:
            x = direction * torch.tensor([length, 1.0])[:, None, None]
            found.append(_gradient(method, x[None]).norm(dim=-1))
        bad = sum(int((~(g <= _BOUND)).sum()) for g in found)
        sizes = [float(g.max()) for g in found]
        case = "pairs with a vector of length 1e-8 to 1: gradient above 1001"
        rows.append(Row(who, name, case, bad, _PAIRS * len(lengths), largest(sizes)))
        series.append(Series(who, name, tuple(lengths), tuple(sizes)))
    return rows, series


def _parallel() -> list[Row]:
    """Pairs at angles of 1e-4 to 1e-1: the true gradient is about the angle."""
    generator = torch.Generator().manual_seed(1)
    angles = torch.tensor(spread(1e-4, 0.1, 2048), dtype=torch.float64)[:, None]
    first, other = torch.randn(2, 2048, _SIZE, generator=generator, dtype=torch.float64)
    first = torch.nn.functional.normalize(first, dim=-1)
    other = torch.nn.functional.normalize(other - (other * first).sum(-1, keepdim=True) * first, dim=-1)
    x = torch.stack([first, angles.cos() * first + angles.sin() * other]).float()[None]
    rows = []
    for who, name, method in _METHODS:
        gradient = _gradient(method, x)
        dead = int((gradient == 0).all(-1).sum())
        case = "pairs 1e-4 to 0.1 rad from parallel: gradient exactly 0"
        rows.append(Row(who, name, case, dead, len(gradient), largest([float(gradient.norm(dim=-1).max())])))
    return rows


def exhibit() -> Exhibit:
    rows, series = _short()
    return Exhibit(
        name="cosine_gradient",
        seen="edge weights from cosine similarities explode",
        cause="the gradient is 1 / |x|: with norms clamped at 1e-6 it reaches 1e6",
        published="clamp the norm; clamp the value",
        remedy="cosine_edges: divides by max(|x|, 1e-3) in the backward, clamps in the forward only",
        counted="a gradient above 1001, or none at all where there is one",
        measured="largest norm of a gradient",
        rows=(*rows, *_parallel()),
        figure=Figure(
            "length of the vector",
            "norm of the gradient, largest of 64 pairs",
            tuple(series),
            "The gradient of the cosine of a vector with a unit vector, against its length, float32.",
            x_log=True,
            y_log=True,
        ),
    )
