"""Functions and methods of the dual-stream EEG detector (brain-go-brr-v2, "V3") by this package's ops.

    stablekern.swap("src.brain_brr.models.detector")  # a module of it, or its name
    stablekern.swap(model)                            # a model made of its classes, in place

| name | computed by | what differs |
|---|---|---|
| `edge_scalar_series` | `cosine_edges` | the gradient is bounded, and not 0 at a cosine of +-1 |
| `assemble_adjacency` | `assemble_adjacency` | ties go to the lower index on every device |
| `compute_stable_laplacian` | `normalized_laplacian` | an isolated node has a zero gradient |
| `TemporalEMA.forward` | `linear_scan` | no loop over time |
| `GraphChannelMixerPyG._compute_dynamic_pe_vectorized` | `laplacian_pe` | finite gradients; one bad graph is NaN by \
itself and never replaced by another's encoding; `ceil(T / interval)` decompositions |
| `FocalLoss.forward` | `focal_loss` | no clamps: a gradient where theirs is cut off |

The Mamba-2 blocks in its `BiMamba2Layer`s are mamba_ssm's, and are swapped as those.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from stablekern import _swap
from stablekern._swap import Known
from stablekern.ops import assemble_adjacency as assembling
from stablekern.ops.cosine_edges import cosine_edges
from stablekern.ops.focal_loss import focal_loss as _focal_loss
from stablekern.ops.laplacian_pe import laplacian_pe
from stablekern.ops.linear_scan import linear_scan
from stablekern.ops.normalized_laplacian import normalized_laplacian

__all__ = ["FUNCTIONS", "METHODS", "edge_scalar_series"]


def edge_scalar_series(
    elec: Tensor,  # (B, N, T, D)
    *,
    metric: str = "cosine",
    pairs: list[tuple[int, int]] | None = None,
) -> Tensor:  # (B, E, T, 1)
    if metric not in ("cosine", "correlation"):
        raise ValueError(f"Unknown metric: {metric}")
    edges = cosine_edges(elec, metric=metric)
    if pairs is not None:
        place = {pair: e for e, pair in enumerate(combinations(range(elec.shape[1]), 2))}
        edges = edges[:, [place[min(pair), max(pair)] for pair in pairs]]
    return edges[..., None]


def _assembling(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def assemble_adjacency(
        edge_weights: Tensor,  # (B, E, T)
        *,
        n_nodes: int = 19,
        top_k: int = 3,
        threshold: float = 1e-4,
        symmetric: bool = True,
        identity_fallback: bool = True,
        pairs: list[tuple[int, int]] | None = None,
    ) -> Tensor:  # (B, T, N, N)
        usual = pairs is None or [tuple(pair) for pair in pairs] == list(combinations(range(n_nodes), 2))
        if not symmetric or not usual:
            _swap.fallen["assemble_adjacency: rows that are not made symmetric, or other pairs"] += 1
            return original(
                edge_weights,
                n_nodes=n_nodes,
                top_k=top_k,
                threshold=threshold,
                symmetric=symmetric,
                identity_fallback=identity_fallback,
                pairs=pairs,
            )
        adjacency = assembling.assemble_adjacency(edge_weights, n_nodes, top_k=top_k, threshold=threshold)
        if identity_fallback:
            alone = adjacency.sum(-1) < 1e-4
            adjacency = adjacency + torch.diag_embed(alone.to(adjacency.dtype))
        return adjacency

    return assemble_adjacency


def _laplacian(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def compute_stable_laplacian(adjacency: Tensor, normalize: bool = True, eps: float = 1e-4) -> Tensor:
        if not normalize:
            _swap.fallen["compute_stable_laplacian: normalize=False"] += 1
            return original(adjacency, normalize, eps)
        eye = torch.eye(adjacency.shape[-1], dtype=adjacency.dtype, device=adjacency.device)
        return normalized_laplacian(adjacency) + eps * eye

    return compute_stable_laplacian


def _ema(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, adjacency: Tensor) -> Tensor:  # (B, T, N, N)
        if getattr(self, "persistent", False):
            _swap.fallen["TemporalEMA: persistent=True"] += 1
            return original(self, adjacency)
        flat = adjacency.flatten(2).mT  # (B, N N, T)
        token = torch.cat((flat[..., :1], (1 - self.beta) * flat[..., 1:]), -1)
        return linear_scan(torch.full_like(token, self.beta), token).mT.unflatten(2, adjacency.shape[2:])  # type: ignore[union-attr]

    return forward


def compute_dynamic_pe(self: Any, adjacency: Tensor) -> Tensor:  # (B, T, N, N) -> (B, T, N, k)
    interval = getattr(self, "semi_dynamic_interval", 1)
    pe = laplacian_pe(adjacency.to(torch.promote_types(adjacency.dtype, torch.float32)), self.k_eigenvectors,
                      align="none", interval=interval)  # fmt: skip
    if getattr(self, "pe_sign_consistency", True):  # their rule: no column has a negative sum
        with torch.no_grad():
            sign = torch.where(pe.sum(-2, keepdim=True) < 0, -1.0, 1.0)
        pe = pe * sign
    return pe.to(adjacency.dtype)


def focal_loss(self: Any, logits: Tensor, targets: Tensor, *, pos_weight: Any = None) -> Tensor:
    weight = None if pos_weight is None else float(pos_weight)
    return _focal_loss(logits, targets, alpha=float(self.alpha), gamma=float(self.gamma), pos_weight=weight)


_CHECK = "a check, not a computation; stablekern.health has one of that name"
FUNCTIONS: dict[str, Known] = {
    "edge_scalar_series": Known(
        edge_scalar_series, ("elec, *, metric, pairs", "elec_feats, *, metric, pairs"), "bounded gradient"
    ),
    "assemble_adjacency": Known(
        None,
        ("edge_weights, *, n_nodes, top_k, threshold, symmetric, identity_fallback, pairs",),
        "ties go to the lower index",
        _assembling,
    ),
    "compute_stable_laplacian": Known(
        None, ("A, normalize, eps", "adjacency, normalize, eps"), "degrees are not clamped", _laplacian
    ),
    "condition_adjacency": Known(
        None, refused="a chain of small torch operations; its moving average is TemporalEMA, which is swapped"
    ),
    "pair_indices_undirected": Known(None, refused="a list of pairs, nothing to compute"),
    "create_optimizer": Known(None, refused="it builds torch.optim.AdamW: swap that, or the optimizer it returns"),
    "assert_finite": Known(None, refused=_CHECK),
    "clamp_and_check": Known(None, refused=_CHECK),
    "check_gradients": Known(None, refused=_CHECK),
    "monitored_clamp": Known(None, refused="a clamp hides what it repairs; see stablekern.health.watch"),
    "monitored_nan_to_num": Known(None, refused="it hides what it repairs; see stablekern.health.watch"),
}
METHODS: dict[str, dict[str, Known]] = {
    "TemporalEMA": {"forward": Known(None, ("x", "A", "adjacency"), "a scan in place of a loop", _ema)},
    "FocalLoss": {"forward": Known(focal_loss, ("logits, targets, *, pos_weight",), "no clamps")},
    "GraphChannelMixerPyG": {
        "_compute_dynamic_pe_vectorized": Known(
            compute_dynamic_pe, ("adjacency", "A"), "finite gradients; no fall-back to the encoding of another graph"
        )
    },
}
