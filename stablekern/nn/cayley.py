r"""Unitary mixing of the components of complex tokens: a learned Laplacian, and the step that it generates.

A layer that multiplies with a free matrix has to be kept from growing or shrinking its tokens. Here the matrix is
$(I + i \tfrac{dt}{2} H)^{-1} (I - i \tfrac{dt}{2} H)$ for a real symmetric $H$: unitary for every value of the
parameters, so nothing has to be clipped, decayed or projected, and the inverse is the same step with $-dt$.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from stablekern import _check, numerics
from stablekern.errors import message
from stablekern.ops.cayley_step import cayley_step

__all__ = ["CayleyPropagator", "GraphHamiltonian"]


def _small_world(dim: int, sparsity: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """A ring with neighbours at distances 1 to sparsity / 2 - 1 (1 at least), and random chords.

    In all dim * sparsity / 2 edges, or as many as there are.
    """
    around = ((i, (i + k) % dim) for k in range(1, max(2, sparsity // 2)) for i in range(dim))
    pairs = {(min(pair), max(pair)) for pair in around}
    pairs = {(i, j) for i, j in pairs if i != j}
    wanted = min(dim * sparsity // 2, dim * (dim - 1) // 2)
    while len(pairs) < wanted:
        i, j = torch.randint(dim, (2,), generator=generator).tolist()
        if i != j:
            pairs.add((min(i, j), max(i, j)))
    return sorted(pairs)


class GraphHamiltonian(nn.Module):
    r"""The edges and weights of a learned small-world Laplacian on `dim` nodes: `forward()` -> ((2, E), (E)).

    $H = \sum_s m_s H_s$ over `num_scales` graphs with about `sparsity`, 2 `sparsity`, 4 `sparsity`, ... edges to a
    node, rings of near neighbours with random chords. The weights of each are $\mathrm{softplus}(\theta_s)$, and $m$ is
    a softmax: $H$ is positive semidefinite and kills constants, whatever the parameters are. Edges that several scales
    share are one edge, with the sum of their weights, made without atomics.

    **Arguments:** `dim` >= 1; `sparsity` >= 2; `num_scales` >= 1; `seed` of the chords: the graph is drawn once, and is
    part of the state dict.

    **State dict:** `edge_logits.{s}`, $\theta_s$; `scale_weights`, the logits of $m$; `edges`, (2, E);
    `positions_{s}`, the edges of a scale among all.
    """

    edges: Tensor

    def __init__(self, dim: int, sparsity: int = 6, num_scales: int = 3, *, seed: int = 42) -> None:
        super().__init__()
        self.dim = _check.integer("nn.GraphHamiltonian", "dim", dim, low=1)
        self.sparsity = _check.integer("nn.GraphHamiltonian", "sparsity", sparsity, low=2)
        self.num_scales = _check.integer("nn.GraphHamiltonian", "num_scales", num_scales, low=1)
        g = torch.Generator().manual_seed(_check.integer("nn.GraphHamiltonian", "seed", seed))
        scales = [_small_world(dim, sparsity * 2**s, g) for s in range(num_scales)]
        union = sorted(set().union(*scales))
        place = {pair: number for number, pair in enumerate(union)}
        self.register_buffer("edges", torch.tensor(union, dtype=torch.int64).reshape(-1, 2).T.contiguous())
        for s, pairs in enumerate(scales):
            self.register_buffer(f"positions_{s}", torch.tensor([place[pair] for pair in pairs], dtype=torch.int64))
        self.edge_logits = nn.ParameterList(torch.randn(len(pairs)) / 10 for pairs in scales)
        self.scale_weights = nn.Parameter(torch.zeros(num_scales))

    def forward(self) -> tuple[Tensor, Tensor]:
        shares = torch.softmax(self.scale_weights, 0)
        weights = shares.new_zeros(self.edges.shape[1])
        for s, logits in enumerate(self.edge_logits):
            own = shares[s] * nn.functional.softplus(logits)
            # Within a scale every position occurs once: the copy, and the gather that is its adjoint, need no atomics.
            weights = weights + torch.zeros_like(weights).index_copy(0, getattr(self, f"positions_{s}"), own)
        return self.edges, weights

    def dense(self) -> Tensor:
        """$H$, (dim, dim)."""
        (first, second), weights = self()
        upper = weights.new_zeros(self.dim, self.dim).index_put((first, second), weights)
        return torch.diag_embed((upper + upper.mT).sum(-1)) - upper - upper.mT

    def extra_repr(self) -> str:
        return f"{self.dim}, sparsity={self.sparsity}, num_scales={self.num_scales}, edges={self.edges.shape[1]}"


class CayleyPropagator(nn.Module):
    r"""One unitary layer: every component turns by a phase that depends on its intensity, a Cayley step mixes them.

    With the relative intensity $I_k = |\psi_k|^2 / (\overline{|\psi|^2} + \epsilon)$,

    $$\psi_k \leftarrow \psi_k\, e^{i \pi (1 - e^{-\gamma I_k})}, \qquad
    \psi \leftarrow (I + i \tfrac{dt}{2} H)^{-1} (I - i \tfrac{dt}{2} H)\, \psi.$$

    Both halves keep the norm of every token, to rounding, for any parameters; a zero token stays zero and has a finite
    gradient.

    **Arguments:** `dim`; `dt`, the time step; `learn_dt`, whether it is a parameter; `gamma` >= 0, the strength of the
    phase, 0 for a linear layer; `method` as in `cayley_step`; further keywords are those of `GraphHamiltonian`.
    `forward(psi)` takes complex tokens (..., dim) and returns the same.

    **State dict:** that of `hamiltonian`, and `dt`, (), a parameter or a buffer.
    """

    def __init__(
        self,
        dim: int,
        dt: float = 0.02,
        *,
        gamma: float = 0.05,
        learn_dt: bool = False,
        method: str = "auto",
        **hamiltonian: int,
    ) -> None:
        super().__init__()
        step = torch.tensor(_check.number("nn.CayleyPropagator", "dt", dt))
        if not math.isfinite(step):
            raise ValueError(message("nn.CayleyPropagator", "`dt` must be finite", dt))
        self.gamma = _check.number("nn.CayleyPropagator", "gamma", gamma, low=0.0)
        _check.choice("nn.CayleyPropagator", "method", method, ("auto", "chebyshev", "dense", "cocg"))
        self.method = method
        self.hamiltonian = GraphHamiltonian(dim, **hamiltonian)
        if learn_dt:
            self.dt = nn.Parameter(step)
        else:
            self.register_buffer("dt", step)

    def forward(self, psi: Tensor) -> Tensor:  # (..., dim) -> (..., dim)
        _check.shapes("nn.CayleyPropagator", psi=(psi, f"... {self.hamiltonian.dim}"))
        if self.gamma:
            intensity = psi.real.square() + psi.imag.square()
            relative = intensity / (intensity.mean(-1, keepdim=True) + numerics.NORM_EPS.value)
            phase = -torch.pi * torch.expm1(-self.gamma * relative)
            psi = psi * torch.polar(torch.ones_like(phase), phase)
        edges, weights = self.hamiltonian()
        return cayley_step(psi, edges, weights, self.dt, method=self.method)

    def extra_repr(self) -> str:
        return f"dt={float(self.dt):g}, gamma={self.gamma:g}, method={self.method!r}"
