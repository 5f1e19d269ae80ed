"""What people run today, as they write it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def has_mamba_ssm() -> bool:
    """mamba_ssm's kernels are for CUDA devices only, and installed by hand: a baseline where they are."""
    return torch.cuda.is_available() and importlib.util.find_spec("mamba_ssm") is not None


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of `function`, at its first call.

    A loop over time is unrolled, and 32 steps of the Mamba-1 scan compile for 40 s: a baseline for short sequences.
    """
    return lambda *inputs: _compiled(function)(*inputs)


def laplacian_pe_chain(adjacency: Tensor, k: int) -> Tensor:
    """Degree -> normalised Laplacian + eps I -> torch.linalg.eigh -> k vectors -> column-sum sign -> nan_to_num."""
    n = adjacency.shape[-1]
    degree = adjacency.sum(-1).clamp_min(1e-4)
    scale = degree.rsqrt()
    eye = torch.eye(n, dtype=adjacency.dtype, device=adjacency.device)
    laplacian = eye - scale[..., :, None] * adjacency * scale[..., None, :] + 1e-4 * eye
    vectors = torch.linalg.eigh(laplacian).eigenvectors[..., :k]
    sign = torch.where(vectors.sum(-2, keepdim=True) >= 0, 1.0, -1.0)
    return torch.nan_to_num(vectors * sign, nan=0.0, posinf=1.0, neginf=-1.0)


def cosine_einsum(x: Tensor) -> Tensor:
    """norm -> clamp -> divide -> clamp -> einsum Gram (B,T,N,N) -> clamp -> gather the pairs i<j -> (B,E,T)."""
    normed = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)).clamp(-10, 10)
    gram = torch.einsum("bntd,bmtd->btnm", normed, normed).clamp(-1, 1)
    i, j = torch.triu_indices(x.shape[1], x.shape[1], 1)
    return gram[:, :, i, j].permute(0, 2, 1)


def assemble_topk(edge_weights: Tensor, n: int, k: int = 3) -> Tensor:
    """Fill both triangles -> topk -> scatter -> threshold -> average with the transpose; a self loop where it is 0."""
    b, _, t = edge_weights.shape
    i, j = torch.triu_indices(n, n, 1)
    full = edge_weights.new_zeros(b, t, n, n)
    full[:, :, i, j] = full[:, :, j, i] = edge_weights.permute(0, 2, 1)
    values, index = full.topk(k, dim=-1)
    sparse = torch.zeros_like(full).scatter(-1, index, values)
    sparse = torch.where(sparse > 1e-4, sparse, 0.0)
    adjacency = (sparse + sparse.mT) / 2
    return adjacency + torch.diag_embed((adjacency.sum(-1) < 1e-4).to(adjacency.dtype))


def ema_loop(x: Tensor, beta: float) -> Tensor:
    """A running average along the last dimension, step after step, stacked."""
    steps = [x[..., 0]]
    for t in range(1, x.shape[-1]):
        steps.append(beta * steps[-1] + (1 - beta) * x[..., t])
    return torch.stack(steps, dim=-1)


def focal_composite(logits: Tensor, targets: Tensor, gamma: float = 2.0, alpha: float = 0.5) -> Tensor:
    """The shortest composite: BCE with logits times (1 - p_t)^gamma."""
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    weight = torch.where(targets > 0.5, alpha, 1 - alpha)
    return weight * (1 - torch.exp(-bce)) ** gamma * bce


def ssd_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The one-step update of Mamba-2 in a loop over time, indexing each step, as the slow paths of libraries do."""
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)
        entering = torch.einsum("bh,bhp,bn->bhpn", dt[:, t], x[:, t], B[:, t, 0])
        state = state * decay[:, :, None, None] + entering
        outputs.append(torch.einsum("bhpn,bn->bhp", state, C[:, t, 0]))
    return torch.stack(outputs, 1)


def selective_scan_pscan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """What mambapy runs between its projections, on the time-major views that its block makes."""
    from mambapy.mamba import MambaBlock

    return MambaBlock.selective_scan(None, u.mT, delta.mT, A, B.mT, C.mT, D).mT


def selective_scan_transformers(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """What transformers runs without compiled kernels: everything discretised at once, then a loop over time."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    outputs = mamba_selective_scan(u, delta, A, B, C, D)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def ssd_scan_mamba_ssm(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)  # the default of its Mamba2


def selective_scan_mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn(u, delta, A, B, C, D)
