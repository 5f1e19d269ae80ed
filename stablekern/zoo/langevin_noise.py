"""Preconditioned Langevin noise on a parameter that never had a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stablekern.optim import ComplexAdamW
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series

__all__ = ["exhibit"]

_PARAMETERS, _STEPS, _TEMPERATURE, _RATE, _EPS = 4096, 10, 1e-5, 1.2e-3, 1e-8


def _published(offset: float) -> list[Tensor]:
    """sqrt(2 T lr) n / (sqrt(s) + offset), s = sqrt(v_hat) + eps: the rule of the optimizer that it comes from."""
    generator = torch.Generator().manual_seed(0)
    p, v, course = torch.zeros(_PARAMETERS), torch.zeros(_PARAMETERS), []
    for step in range(1, _STEPS + 1):
        s = (v / (1 - 0.999**step)).sqrt() + _EPS
        noise = torch.randn(_PARAMETERS, generator=generator)
        p = p + math.sqrt(2 * _TEMPERATURE * _RATE) * noise / (s.sqrt() + offset)
        course.append(p)
    return course


def _ours() -> list[Tensor]:
    p = torch.nn.Parameter(torch.zeros(_PARAMETERS))
    optimizer, course = ComplexAdamW([p], lr=_RATE, weight_decay=0.0, temperature=_TEMPERATURE), []
    for _ in range(_STEPS):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        course.append(p.detach().clone())
    return course


_METHODS = (
    (STOCK, "noise / sqrt(s)", lambda: _published(0.0)),
    (FIX, "noise / (sqrt(s) + 1e-8)", lambda: _published(1e-8)),
    (OURS, "ComplexAdamW(temperature=1e-5)", _ours),
)


def exhibit() -> Exhibit:
    rows, series = [], []
    for who, name, method in _METHODS:
        course = method()
        last = course[-1].abs()
        case = f"parameters without a gradient, after {_STEPS} steps: |p| > 1"
        rows.append(Row(who, name, case, int((~(last <= 1)).sum()), _PARAMETERS, float(last.max())))
        sizes = tuple(float(p.square().mean().sqrt()) for p in course)
        series.append(Series(who, name, tuple(range(1, _STEPS + 1)), sizes))
    return Exhibit(
        name="langevin_noise",
        seen="Langevin noise kills training in its first steps",
        cause="without a gradient history 1 / sqrt(s) is 1 / sqrt(eps) = 1e4",
        published="add 1e-8 behind the square root, which is 1e-4 or more",
        remedy="ComplexAdamW: the gain of the noise is at most that of plain SGLD where there was no gradient",
        counted=f"a parameter that started at 0 is beyond 1, at T = {_TEMPERATURE:g} and lr = {_RATE:g}",
        measured="largest |p|",
        rows=tuple(rows),
        figure=Figure(
            "step",
            "root mean square of the parameters",
            tuple(series),
            f"{_PARAMETERS} parameters that start at 0 and never get a gradient. The first two curves coincide.",
            y_log=True,
        ),
    )
