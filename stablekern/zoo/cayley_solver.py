"""Conjugate gradients on a matrix that is not Hermitian, with a backward that does not solve."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series, largest, spread

__all__ = ["exhibit"]

_SIZE, _TOKENS, _EDGES = 256, 64, 1536
_STEPS = (0.02, 0.1, 0.5)


def _graph(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Undirected edges, a ring and random chords, and their weights around ln 2."""
    n = torch.arange(_SIZE)
    chords = torch.randint(0, _SIZE, (2, 4 * _EDGES), generator=generator)
    pairs = torch.cat([torch.stack([n, (n + 1) % _SIZE]), chords], 1).sort(0).values
    pairs = pairs[:, pairs[0] != pairs[1]].unique(dim=1)
    keep = torch.randperm(pairs.shape[1], generator=generator)[:_EDGES]
    weights = torch.nn.functional.softplus(0.1 * torch.randn(_EDGES, generator=generator))
    return pairs[:, keep].contiguous(), weights


def _laplacian(edges: Tensor, weights: Tensor) -> Tensor:
    adjacency = torch.zeros(_SIZE, _SIZE, dtype=weights.dtype)
    adjacency = adjacency.index_put((edges[0], edges[1]), weights, accumulate=True)
    adjacency = adjacency + adjacency.mT
    return torch.diag(adjacency.sum(-1)) - adjacency


def _plain_cg(H: Tensor, psi: Tensor, a: float, iterations: int) -> Tensor:
    """The textbook recurrence on (I + i a H) x = (I - i a H) psi, rows at once; valid for Hermitian matrices only."""
    b = psi - 1j * a * (psi @ H)
    x, r = torch.zeros_like(b), b
    p, rr = r, (r.abs() ** 2).sum(-1, keepdim=True)
    for _ in range(iterations):
        Ap = p + 1j * a * (p @ H)
        alpha = rr / ((p.conj() * Ap).real.sum(-1, keepdim=True) + 1e-12)
        x, r = x + alpha * p, r - alpha * Ap
        new = (r.abs() ** 2).sum(-1, keepdim=True)
        p, rr = r + new / (rr + 1e-12) * p, new
    return x


def _residual(H: Tensor, psi: Tensor, x: Tensor, a: float) -> Tensor:
    """Of each row, relative, in complex128."""
    H, psi, x = H.to(torch.complex128), psi.to(torch.complex128), x.to(torch.complex128)
    b = psi - 1j * a * (psi @ H)
    return torch.linalg.vector_norm(b - x - 1j * a * (x @ H), dim=-1) / torch.linalg.vector_norm(b, dim=-1)


def _straight_through(H: Tensor, psi: Tensor, a: float) -> Tensor:
    """The published backward: the solution as a constant, plus one residual that is differentiated."""
    eye = torch.eye(_SIZE)
    b = psi - 1j * a * (psi @ H)
    x = torch.linalg.solve(eye + 1j * a * H.detach(), b.detach().mT).mT
    return x + (b - (x + 1j * a * (x @ H)))


def _gradient(step: Callable[[Tensor, Tensor], Tensor], psi: Tensor, weights: Tensor, cotangent: Tensor) -> Tensor:
    """Of the edge weights."""
    leaf = weights.clone().requires_grad_()
    return torch.autograd.grad((step(psi, leaf) * cotangent.conj()).real.sum(), leaf)[0].double()


def exhibit() -> Exhibit:
    generator = torch.Generator().manual_seed(0)
    edges, weights = _graph(generator)
    psi = torch.randn(_TOKENS, _SIZE, dtype=torch.complex64, generator=generator)
    cotangent = torch.randn(_TOKENS, _SIZE, dtype=torch.complex64, generator=generator)
    H = _laplacian(edges, weights)
    rows, errors = [], []
    for dt in _STEPS:
        case = f"solutions at dt = {dt:g}: relative residual above 1e-4"
        for who, name, x in (
            (STOCK, "CG, 3 iterations", _plain_cg(H + 0j, psi, dt / 2, 3)),
            (FIX, "CG, 8 iterations", _plain_cg(H + 0j, psi, dt / 2, 8)),
            (FIX, "CG, 50 iterations", _plain_cg(H + 0j, psi, dt / 2, 50)),
            (OURS, "cayley_step", stablekern.cayley_step(psi, edges, weights, dt)),
        ):
            residual = _residual(H, psi, x, dt / 2)
            rows.append(Row(who, name, case, int((~(residual <= 1e-4)).sum()), _TOKENS, largest(residual.tolist())))
    for dt in _STEPS:
        exact = _gradient(
            lambda p, w, dt=dt: (  # type: ignore[misc]
                torch.linalg.solve(
                    torch.eye(_SIZE) + 0.5j * dt * _laplacian(edges, w),
                    (p - 0.5j * dt * (p @ (_laplacian(edges, w) + 0j))).mT,
                ).mT
            ),
            psi.to(torch.complex128),
            weights.double(),
            cotangent.to(torch.complex128),
        )
        for who, name, step in (
            (
                STOCK,
                "straight-through backward",
                lambda p, w, dt=dt: _straight_through(_laplacian(edges, w) + 0j, p, dt / 2),
            ),
            (OURS, "cayley_step", lambda p, w, dt=dt: stablekern.cayley_step(p, edges, w, dt)),
        ):
            off = (_gradient(step, psi, weights, cotangent) - exact).abs() / exact.square().mean().sqrt()
            case = f"edge gradients at dt = {dt:g}: off by more than 1 % of their root mean square"
            rows.append(Row(who, name, case, int((~(off <= 0.01)).sum()), _EDGES, largest(off.tolist())))
    steps = spread(0.005, 1.0, 25)
    for who, name, solve in (
        (STOCK, "CG, 3 iterations", lambda dt: _plain_cg(H + 0j, psi, dt / 2, 3)),
        (FIX, "CG, 8 iterations", lambda dt: _plain_cg(H + 0j, psi, dt / 2, 8)),
        (FIX, "CG, 50 iterations", lambda dt: _plain_cg(H + 0j, psi, dt / 2, 50)),
        (OURS, "cayley_step", lambda dt: stablekern.cayley_step(psi, edges, weights, dt)),
    ):
        worst = tuple(float(_residual(H, psi, solve(dt), dt / 2).max()) for dt in steps)
        errors.append(Series(who, name, tuple(steps), worst))
    return Exhibit(
        name="cayley_solver",
        seen="the residual of CG stays at 1, the norm of the state grows to 1e9",
        cause="I + i a H is not Hermitian: CG diverges; its backward does not solve at all",
        published="more iterations: 8 in place of 3, later 50",
        remedy="cayley_step: a method for this matrix, and the exact adjoint",
        counted="a solution with a large residual, an edge gradient that is wrong",
        measured="largest relative residual, largest error",
        rows=tuple(rows),
        figure=Figure(
            "dt",
            "relative residual, worst of 64",
            tuple(errors),
            f"Residual of (I + i a H) x = (I - i a H) psi, a = dt / 2, on a graph of {_SIZE} nodes, complex64.",
            x_log=True,
            y_log=True,
        ),
    )
