"""256 systems of 64 unknowns that take CG about 30 iterations to 1e-6, against what solves them otherwise; and 1024
sparse ones on a ring of 256 nodes, each with values of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


_SPARSE_COUNT, _NODES, _SPARSE_STEPS = 1024, 256, 22  # as many as the slowest system takes


@cache
def ring_systems(device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, b, crow, col): I/2 plus the Laplacian of a ring with random weights below 1."""
    g = torch.Generator().manual_seed(256)
    node = torch.arange(_NODES)
    col = torch.stack((node, (node + 1) % _NODES, (node - 1) % _NODES), 1)
    right = torch.rand(_SPARSE_COUNT, _NODES, generator=g)
    left = right.roll(1, -1)
    values = torch.stack((0.5 + left + right, -right, -left), -1)
    b = torch.randn(_SPARSE_COUNT, _NODES, generator=g)
    made = values.flatten(1), b, 3 * torch.arange(_NODES + 1), col.flatten()
    return made[0].to(device), made[1].to(device), made[2].to(device), made[3].to(device)


def _ours_sparse(values: Tensor, b: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    return stablekern.cg((crow, col, values), b)


def _sparse_loop(values: Tensor, b: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """`_loop` with products of gathered columns; the rows are equally long."""
    return _iterated(lambda p: _sparse_product(values, col, p), b, _SPARSE_STEPS)


def _sparse_product(values: Tensor, col: Tensor, v: Tensor) -> Tensor:
    return (values * v[:, col]).unflatten(-1, (_NODES, -1)).sum(-1)


def _sparse_solve(values: Tensor, b: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    row = torch.arange(_NODES, device=b.device).repeat_interleave(3)
    item = torch.arange(len(b), device=b.device)[:, None]
    dense = values.new_zeros(len(b), _NODES, _NODES).index_put((item, row, col), values)
    return torch.linalg.solve(dense, b)


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
    return _iterated(lambda p: (A @ p[..., None])[..., 0], b, _STEPS)


def _iterated(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """CG as it is written down, in torch, all systems in step."""
    x, r = torch.zeros_like(b), b
    p, rr = r, (r * r).sum(-1, keepdim=True)
    for _ in range(steps):
        q = product(p)
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
    residual = b64 - (A64 @ found.x.double()[..., None])[..., 0]
    pairs = zip(_gradients(_ours, A, b), _gradients(torch.linalg.solve, A64, b64), strict=True)
    return _quality(found.iterations, residual, b64, pairs)


def _sparse_facts(values: Tensor, b: Tensor, crow: Tensor, col: Tensor) -> dict[str, Any]:
    """The same; the gradients are those of a few systems, compared with those of dense matrices."""
    found = stablekern.cg_ex((crow, col, values), b)
    residual = b.double() - _sparse_product(values.double(), col, found.x.double())

    def gradients(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t[:16].detach().to(dtype).requires_grad_() for t in (values, b)]
        return torch.autograd.grad(function(*leaves, crow, col).square().sum(), leaves)

    pairs = zip(gradients(_ours_sparse, b.dtype), gradients(_sparse_solve, torch.float64), strict=True)
    return _quality(found.iterations, residual, b.double(), pairs)


def _quality(
    iterations: Tensor, residual: Tensor, b: Tensor, gradients: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    norms = [torch.linalg.vector_norm(rows, dim=-1) for rows in (residual, b)]
    errors = [(one - exact).abs().max() / exact.abs().max() for one, exact in gradients]
    return {
        "iterations": round(float(iterations.float().mean()), 1),
        "true_residual": float(f"{(norms[0] / norms[1]).max():.2g}"),
        "gradient_error": max(float(f"{error:.2g}") for error in errors),
    }


def _case(name: str, baseline: Callable[..., Tensor], gates: dict[str, float], *directions: str) -> Case:
    return Case(
        "cg", f"{_COUNT} x n={_N}, {_STEPS} iterations", systems, _ours, name, baseline,
        2.0 * _COUNT * _STEPS * _N**2, 4.0 * _COUNT * _N * (_N + 2), 2.0, gates, directions=directions, facts=_facts,
    )  # fmt: skip


def _sparse_case(name: str, baseline: Callable[..., Tensor], *directions: str) -> Case:
    entries = 3 * _NODES
    return Case(
        "cg", f"{_SPARSE_COUNT} x n={_NODES}, ring in CSR", ring_systems, _ours_sparse, name, baseline,
        2.0 * _SPARSE_COUNT * _SPARSE_STEPS * entries, 4.0 * _SPARSE_COUNT * (entries + 2 * _NODES), 2.0, {},
        constant=(2, 3), directions=directions, facts=_sparse_facts,
    )  # fmt: skip


CASES = (
    _case("torch Cholesky + solve", _cholesky, {"fwd": 7.0}, "fwd", "fwd+bwd"),
    _case("torch.linalg.solve", _solve, {"fwd": 5.0}, "fwd", "fwd+bwd"),
    _case("linear_operator's linear_cg", _linear_cg, {}, "fwd"),
    _case("torch loop CG", _loop, {}, "fwd", "fwd+bwd"),
    _sparse_case("torch loop CG, gathered columns", _sparse_loop, "fwd", "fwd+bwd"),
    _sparse_case("dense matrices, torch.linalg.solve", _sparse_solve, "fwd", "fwd+bwd"),
)
