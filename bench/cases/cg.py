"""256 systems of 64 unknowns that take CG about 30 iterations to 1e-6, against what solves them otherwise."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

import stablekern
from bench.cases import Case

_COUNT, _N, _STEPS = 256, 64, 30
_CONDITION = 19.0


@cache
def systems(device: str) -> tuple[Tensor, Tensor]:
    """Symmetric matrices with eigenvalues geometrically between 1 and `_CONDITION`, and random right-hand sides."""
    g = torch.Generator().manual_seed(64)
    Q = torch.linalg.qr(torch.randn(_COUNT, _N, _N, generator=g, dtype=torch.float64))[0]
    A = (Q * torch.logspace(0, float(torch.tensor(_CONDITION).log10()), _N, dtype=torch.float64)) @ Q.mT
    A = (A + A.mT) / 2
    b = torch.randn(_COUNT, _N, generator=g, dtype=torch.float64)
    return A.float().to(device), b.float().to(device)


def _ours(A: Tensor, b: Tensor) -> Tensor:
    return stablekern.cg(A, b)


def _cholesky(A: Tensor, b: Tensor) -> Tensor:
    return torch.cholesky_solve(b[..., None], torch.linalg.cholesky(A))[..., 0]


def _solve(A: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.solve(A, b)


def _linear_cg(A: Tensor, b: Tensor) -> Tensor:
    from linear_operator.utils.linear_cg import linear_cg

    return linear_cg(A.matmul, b[..., None], max_iter=_STEPS, tolerance=1e-6, stop_updating_after=1e-6)[..., 0]


def _loop(A: Tensor, b: Tensor) -> Tensor:
    """CG as it is written down, in torch, all systems in step."""
    x, r = torch.zeros_like(b), b
    p, rr = r, (r * r).sum(-1, keepdim=True)
    for _ in range(_STEPS):
        q = (A @ p[..., None])[..., 0]
        alpha = rr / (p * q).sum(-1, keepdim=True)
        x, r = x + alpha * p, r - alpha * q
        rr, before = (r * r).sum(-1, keepdim=True), rr
        p = r + rr / before * p
    return x


def _gradients(function: Callable[..., Tensor], A: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    A, b = A.detach().requires_grad_(), b.detach().requires_grad_()
    by_A, by_b = torch.autograd.grad(function(A, b).square().sum(), (A, b))
    return (by_A + by_A.mT) / 2, by_b


def _facts(A: Tensor, b: Tensor) -> dict[str, Any]:
    """What the times buy: iterations, the largest true residual over |b|, the largest error of a gradient."""
    found = stablekern.cg_ex(A, b)
    A64, b64 = A.double(), b.double()
    residual = torch.linalg.vector_norm(b64 - (A64 @ found.x.double()[..., None])[..., 0], dim=-1)
    pairs = zip(_gradients(_ours, A, b), _gradients(torch.linalg.solve, A64, b64), strict=True)
    return {
        "iterations": round(float(found.iterations.float().mean()), 1),
        "true_residual": float(f"{(residual / torch.linalg.vector_norm(b64, dim=-1)).max():.2g}"),
        "gradient_error": max(float(f"{(one - exact).abs().max() / exact.abs().max():.2g}") for one, exact in pairs),
    }


def _case(name: str, baseline: Callable[..., Tensor], gates: dict[str, float], *directions: str) -> Case:
    return Case(
        "cg", f"{_COUNT} x n={_N}, {_STEPS} iterations", systems, _ours, name, baseline,
        2.0 * _COUNT * _STEPS * _N**2, 4.0 * _COUNT * _N * (_N + 2), 2.0, gates, directions=directions, facts=_facts,
    )  # fmt: skip


CASES = (
    _case("torch Cholesky + solve", _cholesky, {"fwd": 7.0}, "fwd", "fwd+bwd"),
    _case("torch.linalg.solve", _solve, {"fwd": 5.0}, "fwd", "fwd+bwd"),
    _case("linear_operator's linear_cg", _linear_cg, {}, "fwd"),
    _case("torch loop CG", _loop, {}, "fwd", "fwd+bwd"),
)
