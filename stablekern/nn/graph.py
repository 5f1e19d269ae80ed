r"""The graph side of the detector: edge weights from cosines, a positional encoding from the Laplacian, message
passing.

N electrodes give E = N(N-1)/2 undirected pairs i < j, row-major. A graph may be computed once for every `stride` frames
and held between: the tensors then have $T_g = \lceil T / stride \rceil$ graphs, graph $\tau$ serving frames
$\tau\,stride$ to $(\tau + 1)\,stride - 1$.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stablekern import _check, numerics
from stablekern.errors import message
from stablekern.nn.mamba2 import BiMamba2
from stablekern.nn.mamba_stack import Mamba2Stack
from stablekern.nn.norms import LayerScale, wide
from stablekern.nn.stream import Memory
from stablekern.ops.cosine_edges import cosine_edges
from stablekern.ops.laplacian_pe import laplacian_pe

__all__ = ["DynamicLaplacianPE", "EdgeStream", "GraphMixer", "Pointwise", "propagation_matrix"]


class Pointwise(nn.Conv1d):
    """A convolution of width 1 with the channels last, (..., T, d_in) -> (..., T, d_out), under a convolution's names.

    It is a matrix product, and has nothing to copy where a convolution would want the channels first.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.squeeze(-1), self.bias)


class EdgeStream(nn.Module):
    r"""Edge weights over time, (b, N, T, D) electrode features -> (b, E, $T_g$) weights > 0.

    The cosine (or correlation) $s_{ij}(t)$ of every pair, averaged over `stride` frames, is lifted to `d_model`
    channels, $u_c = w_c s + b_c$, runs through a `BiMamba2` along time, one sequence per pair, and is read out as
    $\mathrm{softplus}(v^\top h + b')$; the stack ends in a norm, so no further one follows it.

    **What the lift must not do.** A lift without bias, followed by a norm over the channels, keeps the sign of $s$ and
    nothing else: the norm divides $w s$ by $|s|$. (That was so: with 164 160 edges, 67 distinct weights, correlation
    0.9998 with the sign.) Here $b$ has the size of $w$, so that $s$ turns the direction of $u$, which a norm keeps. The
    read-out starts along the centred $w$, so that a larger cosine is a larger weight before any training; and there is
    no tanh or clamp on the way.

    **Arguments:** `n_nodes`; `d_model` >= 2; `metric`, `"cosine"` or `"correlation"` over D; `stride` >= 1; `causal`, a
    `Mamba2Stack` in place of the `BiMamba2`; further keywords are those of either. Under autocast the cosines are
    computed in float32.
    """

    def __init__(
        self,
        n_nodes: int = 19,
        d_model: int = 16,
        *,
        metric: str = "cosine",
        stride: int = 1,
        causal: bool = False,
        **mamba: Any,
    ) -> None:
        super().__init__()
        _check.choice("nn.EdgeStream", "metric", metric, ("cosine", "correlation"))
        self.n_nodes = _check.integer("nn.EdgeStream", "n_nodes", n_nodes, low=2)
        self.stride = _check.integer("nn.EdgeStream", "stride", stride, low=1)
        self.metric = metric
        _check.integer("nn.EdgeStream", "d_model", d_model, low=2)  # a norm over one channel leaves nothing
        self.edge_in_proj = Pointwise(1, d_model)
        self.edge_mamba = Mamba2Stack(d_model, **mamba) if causal else BiMamba2(d_model, **mamba)
        self.edge_out_proj = Pointwise(d_model, 1)
        with torch.no_grad():
            # Between 1/2 and 1 times a random sign: no channel is blind, neither to the cosine nor to its absence.
            bias = self.edge_in_proj.get_parameter("bias")
            for parameter in (self.edge_in_proj.weight, bias):
                sign = torch.randint(0, 2, parameter.shape).to(parameter.dtype) * 2 - 1
                parameter.copy_(sign * torch.empty_like(parameter).uniform_(0.5, 1.0))
            centred = (self.edge_in_proj.weight - self.edge_in_proj.weight.mean(0, keepdim=True)).transpose(0, 1)
            readout = centred / centred.norm()
            self.edge_out_proj.weight.copy_(readout)
            self.edge_out_proj.get_parameter("bias").zero_()
            # No share of the constant part in the read-out: the weight at a cosine of 0 starts near softplus(0).
            bias.sub_((readout.flatten() @ bias) * readout.flatten())

    def forward(self, electrodes: Tensor, memory: Memory | None = None) -> Tensor:  # (b, N, T, D) -> (b, E, T_g)
        _check.shapes("nn.EdgeStream", electrodes=(electrodes, f"b {self.n_nodes} t d"))
        cosines = cosine_edges(wide(electrodes), metric=self.metric)
        if self.stride > 1:  # with ceil_mode the last window is shorter, and its mean is over what it holds
            cosines = nn.functional.avg_pool1d(cosines, self.stride, ceil_mode=True)
        batch, edges = cosines.shape[:2]
        lifted = self.edge_in_proj(cosines.flatten(0, 1).unsqueeze(-1))  # (b E, T_g, d_model), as the stack computes
        past = () if memory is None else (memory,)
        weights = nn.functional.softplus(wide(self.edge_out_proj(self.edge_mamba(lifted.mT, *past).mT)))
        return weights.view(batch, edges, -1)


class DynamicLaplacianPE(nn.Module):
    r"""Positional encoding of the nodes of changing graphs: (b, T, N, N) adjacencies -> (b, T, N, k).

    The eigenvectors of the k smallest eigenvalues of $I - D^{-1/2} A D^{-1/2}$, by `stablekern.laplacian_pe`, which
    bounds their gradient where eigenvalues repeat. No parameters and no buffers. A graph that cannot be decomposed
    (non-finite weights) gives NaN for itself alone; no other graph's encoding takes its place.

    **Arguments:** `k` in [1, N]; `interval`: decompose every `interval`-th graph only, ceil(T / interval) of them, and
    hold the result between; `align`: `"sign"`, `"temporal"` or `"none"`.
    """

    def __init__(self, k: int = 16, *, interval: int = 1, align: str = "sign") -> None:
        super().__init__()
        self.k = _check.integer("nn.DynamicLaplacianPE", "k", k, low=1)
        self.interval = _check.integer("nn.DynamicLaplacianPE", "interval", interval, low=1)
        _check.choice("nn.DynamicLaplacianPE", "align", align, ("sign", "temporal", "none"))
        self.align = align

    def forward(self, adjacency: Tensor) -> Tensor:  # (b, T, N, N) -> (b, T, N, k)
        return laplacian_pe(wide(adjacency), self.k, align=self.align, interval=self.interval)

    def extra_repr(self) -> str:
        return f"k={self.k}, interval={self.interval}, align={self.align!r}"


def propagation_matrix(adjacency: Tensor, alpha: float, hops: int) -> Tensor:
    r"""$M = \alpha I + \frac{1-\alpha}{K} \sum_{k=1}^K \hat A^k$ for adjacencies (..., N, N) with entries >= 0.

    $\hat A = D^{-1/2} A' D^{-1/2}$, where $A'$ is $A$ with a self-loop of weight 1 on every node that has none (a loop
    that is there keeps its weight) and $D$ its row sums: every degree is positive, an isolated node has $\hat A_{ii} =
    1$. That is PyTorch Geometric's `gcn_norm` with its default `add_self_loops`; $M x$ is the sum of its `SSGConv`.
    """
    loops = adjacency.diagonal(dim1=-2, dim2=-1)
    with_loops = adjacency + torch.diag_embed((loops == 0).to(adjacency.dtype))
    scale = with_loops.sum(-1).rsqrt()
    step = scale.unsqueeze(-1) * with_loops * scale.unsqueeze(-2)
    total = power = step
    for _ in range(hops - 1):
        power = power @ step
        total = total + power
    identity = torch.eye(adjacency.shape[-1], dtype=adjacency.dtype, device=adjacency.device)
    return alpha * identity + (1 - alpha) / hops * total


class _SSGConv(nn.Module):
    """lin(M x): simple spectral graph convolution, the propagation matrix made by the caller."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.lin = nn.Linear(d_in, d_out)

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:  # (..., N, s, d_in), (..., N, N) -> (..., N, s, d_out)
        mixed = matrix.to(x.dtype) @ x.flatten(-2)  # the s frames of a graph as further columns: one product per graph
        return self.lin(mixed.unflatten(-1, x.shape[-2:]))


class GraphMixer(nn.Module):
    r"""Message passing between electrodes: (b, N, T, d_model), with (b, $T_g$, N, N) adjacencies, to (b, N, T,
    d_model).

    With $M$ as in `propagation_matrix` and $P$ the Laplacian encoding of each graph, $h_0 = [x; P]$,

    $$h_1 = \mathrm{drop}(\mathrm{gelu}(\mathrm{LN}(W_0 M h_0 + b_0))), \quad
    h_{i+1} = h_i + \mathrm{drop}(\mathrm{gelu}(\mathrm{LN}(W_i M h_i + b_i))), \quad
    out = x + \gamma \odot (h_{last} - x).$$

    Dense: for 19 nodes $M$ is one small matrix per graph, made once and used by all layers, in batched products; there
    are no edge lists, no loop over graphs and no synchronisation.

    **Arguments:** `d_model`; `k` eigenvectors, `pe_interval` (in graphs) and `pe_align` as in `DynamicLaplacianPE`;
    `num_layers`; `hops` $K$ and `alpha` of the convolution; `dropout`; `layerscale`, the initial $\gamma$. `forward(x,
    adjacency, stride)`: a graph serves `stride` frames, so $T_g = \lceil T / stride \rceil$.

    **State dict:** `gnn_layers.{i}.lin.{weight,bias}`, (64, 80) and (64, 64) for 64 channels and 16 eigenvectors;
    `layer_norms.{i}`; `layerscale.gamma`. **Raises:** `ValueError` for shapes that do not fit together.
    **Source:** Zhu & Koniusz, "Simple Spectral Graph Convolution" (ICLR 2021).
    """

    def __init__(
        self,
        d_model: int = 64,
        k: int = 16,
        *,
        num_layers: int = 2,
        hops: int = 2,
        alpha: float = 0.05,
        pe_interval: int = 1,
        pe_align: str = "sign",
        dropout: float = 0.1,
        layerscale: float = 0.1,
    ) -> None:
        super().__init__()
        self.d_model = _check.integer("nn.GraphMixer", "d_model", d_model, low=1)
        _check.integer("nn.GraphMixer", "num_layers", num_layers, low=1)
        self.hops = _check.integer("nn.GraphMixer", "hops", hops, low=1)
        self.alpha = _check.number("nn.GraphMixer", "alpha", alpha, low=0.0, high=1.0)
        _check.number("nn.GraphMixer", "dropout", dropout, low=0.0, high=1.0)
        self.pe = DynamicLaplacianPE(k, interval=pe_interval, align=pe_align)
        self.gnn_layers = nn.ModuleList(_SSGConv(d_model + (0 if i else k), d_model) for i in range(num_layers))
        self.layer_norms = nn.ModuleList(nn.LayerNorm(d_model, eps=numerics.NORM_EPS.value) for _ in range(num_layers))
        self.dropout = nn.Dropout(dropout)
        self.layerscale = LayerScale(d_model, layerscale)

    def forward(self, x: Tensor, adjacency: Tensor, stride: int = 1) -> Tensor:
        sizes = _check.shapes("nn.GraphMixer", x=(x, f"b n t {self.d_model}"), adjacency=(adjacency, "b g n n"))
        frames, graphs = sizes["t"], -(-sizes["t"] // stride)
        if sizes["g"] != graphs:
            rule = f"`adjacency` must hold ceil(T / stride) = {graphs} graphs for {frames} frames"
            raise ValueError(message("nn.GraphMixer", rule, sizes["g"]))
        matrix = propagation_matrix(wide(adjacency), self.alpha, self.hops)
        encoding = self.pe(adjacency).unsqueeze(3).expand(-1, -1, -1, stride, -1)  # (b, g, n, stride, k)
        padded = nn.functional.pad(x, (0, 0, 0, graphs * stride - frames))
        nodes = padded.unflatten(2, (graphs, stride)).transpose(1, 2)  # (b, g, n, stride, d)
        hidden = torch.cat((nodes, encoding.to(nodes.dtype)), dim=-1)
        for i, (layer, norm) in enumerate(zip(self.gnn_layers, self.layer_norms, strict=True)):
            new = self.dropout(nn.functional.gelu(norm(layer(hidden, matrix))))
            hidden = hidden + new if i else new
        hidden = hidden.transpose(1, 2).flatten(2, 3)[:, :, :frames]
        return x + self.layerscale(hidden - x)
