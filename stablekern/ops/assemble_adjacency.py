r"""Sparse symmetric adjacency matrices from the weights of all pairs of nodes.

Per graph: the weights fill a symmetric matrix $A$ with zero diagonal; each row keeps its `top_k` largest entries,

$$K_{ij} = [\,A_{ij} \text{ is among the } k \text{ largest of row } i\,] \cdot [\,A_{ij} > \tau\,],$$

and the result is $(K \circ A + (K \circ A)^T) / 2$. Since $A$ is symmetric, that is $c_{ij} A_{ij}$ with $c_{ij} =
(K_{ij} + K_{ji}) / 2$: 1 for an edge that both its ends pick, 1/2 for one that a single end picks, 0 otherwise. So a
row may hold more than k edges. The selection is piecewise constant: the gradient of a weight is $c_{ij}$ times that of
its two entries, and the selection itself has none. Forward and backward need only $c$, one number a pair.

*Ties* go to the lower node index: equal weights (every graph at initialisation has some) give the same graph on every
run and device. The zero diagonal takes no place.

*Threshold and selection commute.* With $m$ entries of a row above $\tau \ge 0$, the k largest above $\tau$ are the
$\min(k, m)$ largest of the row, whichever is asked for first. (They do not commute with the average: an edge of weight
$w \in (\tau, 2\tau]$ that one end picks has the entry $w/2 \le \tau$, and stays.) So kernels may take the threshold
first, and compare what is left, all positive, by its bits.

*Isolated nodes* keep a zero row. Other implementations give such a row a self loop, which changes the degrees and so
the spectrum; here the normalised Laplacian takes care of them.

*Kept for the backward:* how many ends pick each pair, one byte a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern._load import native
from stablekern._registry import apply, define, launcher
from stablekern.numerics import EDGE_THRESHOLD

__all__ = ["assemble_adjacency"]

_OP = "assemble_adjacency"


def reference(
    edge_weights: Tensor, n_nodes: int, *, top_k: int | None = 3, threshold: float = EDGE_THRESHOLD.value
) -> Tensor:
    """The definition entry by entry, differentiable: each row sorted by (-weight, index) in Python. No NaN."""
    b, _, t = edge_weights.shape
    nodes = range(n_nodes)
    number = {pair: e for e, pair in enumerate((i, j) for i in nodes for j in nodes if i < j)}
    zero = 0 * edge_weights.sum()

    def graph(weights: Tensor) -> Tensor:
        matrix = [[zero if i == j else weights[number[min(i, j), max(i, j)]] for j in nodes] for i in nodes]
        kept = []
        for row in matrix:
            values = [float(w.detach()) for w in row]
            order = [j for _, j in sorted((-value, j) for j, value in enumerate(values))]
            kept.append([j in order[:top_k] and values[j] > threshold for j in nodes])
        entries = [(kept[i][j] * matrix[i][j] + kept[j][i] * matrix[j][i]) / 2 for i in nodes for j in nodes]
        return torch.stack(entries).view(n_nodes, n_nodes)

    graphs = [graph(edge_weights[item, :, step]) for item in range(b) for step in range(t)]
    return (torch.stack(graphs) if graphs else zero.new_zeros(0) + zero).view(b, t, n_nodes, n_nodes)


def _fake_fwd(weights: Tensor, n_nodes: int, top_k: int, threshold: float) -> tuple[Tensor, Tensor]:
    b, e, t = weights.shape
    return weights.new_empty(b, t, n_nodes, n_nodes), weights.new_empty(b, e, t, dtype=torch.uint8)


def _fake_bwd(grad: Tensor, picks: Tensor) -> Tensor:
    return grad.new_empty(picks.shape)


# `picks` (b, e, t): how many of a pair's two ends have it among their `top_k` largest above the threshold.
_fwd = define(
    "assemble_adjacency_fwd(Tensor weights, int n_nodes, int top_k, float threshold)"
    " -> (Tensor adjacency, Tensor picks)",
    fake=_fake_fwd,
)
_bwd = define("assemble_adjacency_bwd(Tensor grad, Tensor picks) -> Tensor grad_weights", fake=_fake_bwd)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


@launcher("assemble_adjacency_fwd", device="cpu", backend="native")
def _(weights: Tensor, n_nodes: int, top_k: int, threshold: float) -> tuple[Tensor, Tensor]:
    wide = _wide(weights)
    adjacency, picks = _fake_fwd(wide, n_nodes, top_k, threshold)
    native().assemble_adjacency_fwd(wide, top_k, threshold, adjacency, picks)
    return adjacency.to(weights.dtype), picks


@launcher("assemble_adjacency_bwd", device="cpu", backend="native")
def _(grad: Tensor, picks: Tensor) -> Tensor:
    wide = _wide(grad)
    result = _fake_bwd(wide, picks)
    native().assemble_adjacency_bwd(wide, picks, result)
    return result.to(grad.dtype)


def _too_many(nodes: int) -> str | None:
    from stablekern.triton_kernels.assemble_adjacency import LARGEST_GRAPH

    return None if nodes <= LARGEST_GRAPH else f"more than {LARGEST_GRAPH} nodes"


@launcher("assemble_adjacency_fwd", device="cuda", backend="triton", supports=lambda _, nodes, *__: _too_many(nodes))
@launcher("assemble_adjacency_fwd", device="cpu", backend="triton", supports=lambda _, nodes, *__: _too_many(nodes))
def _(weights: Tensor, n_nodes: int, top_k: int, threshold: float) -> tuple[Tensor, Tensor]:
    from stablekern.triton_kernels.assemble_adjacency import assemble_adjacency_fwd

    adjacency, picks = _fake_fwd(weights, n_nodes, top_k, threshold)
    assemble_adjacency_fwd(weights, top_k, threshold, adjacency, picks)
    return adjacency, picks


@launcher("assemble_adjacency_bwd", device="cuda", backend="triton", supports=lambda g, _: _too_many(g.shape[-1]))
@launcher("assemble_adjacency_bwd", device="cpu", backend="triton", supports=lambda g, _: _too_many(g.shape[-1]))
def _(grad: Tensor, picks: Tensor) -> Tensor:
    from stablekern.triton_kernels.assemble_adjacency import assemble_adjacency_bwd

    result = _fake_bwd(grad, picks)
    assemble_adjacency_bwd(grad, picks, result)
    return result


def _places(n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the pairs stand in a flattened matrix, above and below the diagonal."""
    first, second = torch.triu_indices(n, n, 1, device=device)
    return first * n + second, second * n + first


def _symmetric(pairs: Tensor, n: int) -> Tensor:
    """(..., E) -> (..., n, n) with zero diagonal."""
    above, below = _places(n, pairs.device)
    flat = pairs.new_zeros(*pairs.shape[:-1], n * n)
    flat[..., above] = pairs
    flat[..., below] = pairs
    return flat.unflatten(-1, (n, n))


@launcher("assemble_adjacency_fwd", device="cuda", backend="torch")
@launcher("assemble_adjacency_fwd", device="cpu", backend="torch")
def _(weights: Tensor, n_nodes: int, top_k: int, threshold: float) -> tuple[Tensor, Tensor]:
    pairs = weights.transpose(1, 2)
    best = _symmetric(pairs, n_nodes).sort(dim=-1, descending=True, stable=True).indices[..., :top_k]
    chosen = torch.zeros(*pairs.shape[:-1], n_nodes, n_nodes, dtype=torch.uint8, device=pairs.device)
    chosen = chosen.scatter_(-1, best, 1)
    ends = (chosen + chosen.mT).flatten(-2)[..., _places(n_nodes, pairs.device)[0]]
    # Written so that a NaN, which is neither above nor below the threshold, is kept; a bfloat16 weight is not to be
    # compared with a rounded threshold.
    ends = torch.where(pairs.to(torch.promote_types(pairs.dtype, torch.float32)) <= threshold, 0, ends)
    # Not a product alone: 0 times a dropped infinity would be NaN.
    adjacency = _symmetric(torch.where(ends > 0, pairs * (ends.to(pairs.dtype) / 2), 0.0), n_nodes)
    return adjacency, ends.to(torch.uint8).transpose(1, 2).contiguous()


@launcher("assemble_adjacency_bwd", device="cuda", backend="torch")
@launcher("assemble_adjacency_bwd", device="cpu", backend="torch")
def _(grad: Tensor, picks: Tensor) -> Tensor:
    wide = grad.to(torch.promote_types(grad.dtype, torch.float32)).flatten(-2)
    above, below = _places(grad.shape[-1], grad.device)
    both = (wide[..., above] + wide[..., below]).transpose(1, 2)
    return torch.where(picks > 0, both * (picks.to(wide.dtype) / 2), 0.0).to(grad.dtype).contiguous()


class _AssembleAdjacency(torch.autograd.Function):
    @staticmethod
    def forward(weights: Tensor, n_nodes: int, top_k: int, threshold: float) -> tuple[Tensor, Tensor]:
        return _fwd(weights, n_nodes, top_k, threshold)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad: Tensor | None, _):
        _check.first_order(_OP)
        if grad is None:
            return (None,) * 4
        return _bwd(grad, *ctx.saved_tensors), None, None, None


def assemble_adjacency(
    edge_weights: Tensor,  # (B, E, T), E = n_nodes (n_nodes - 1) / 2
    n_nodes: int,
    *,
    top_k: int | None = 3,
    threshold: float = EDGE_THRESHOLD.value,
) -> Tensor:  # (B, T, n_nodes, n_nodes)
    r"""Symmetric top-k adjacency matrices, one per item and step, from pair weights.

    Fill a symmetric matrix with zero diagonal, keep the `top_k` largest entries of each row, drop what is not above
    `threshold`, then average with the transpose: an edge picked by one end only has half its weight.

    **Arguments:**

    - `edge_weights`: weights of the pairs i < j in row-major order, as `cosine_edges` returns them; float16, bfloat16,
        float32 or float64. Negative ones are dropped.
    - `n_nodes`: N >= 1, with N (N - 1) / 2 = E.
    - `top_k`: entries kept per row, >= 1, or None for all. Among equal weights the lower node index wins.
    - `threshold`: >= 0; applied to the weights. Before or after the selection is the same (see the module's text); the
        half weight of an edge that one end picks may lie below it.

    **Returns:** a contiguous tensor of the dtype of `edge_weights`, exactly symmetric. A node without edges has a zero
    row (no self loop; `normalized_laplacian` handles it). Dropped weights get a zero gradient, whatever comes in.

    A NaN weight sorts above every number and no threshold drops it: it stays at its own two entries, takes a place in
    the rows of its two nodes, and reaches no other graph.

    **Raises:** `ValueError` for a shape that does not fit `n_nodes` or an option out of range, `TypeError` for another
    dtype, `RuntimeError` when second derivatives are asked for.

    **Accuracy:** exact (the only arithmetic is a factor 1/2); the gradient rounds one sum.
    """
    _check.dtypes(_OP, _check.REAL + _check.HALF, edge_weights=edge_weights)
    sizes = _check.shapes(_OP, edge_weights=(edge_weights, "b e t"))
    n = _check.integer(_OP, "n_nodes", n_nodes, low=1)
    if sizes["e"] != n * (n - 1) // 2:
        rule = f"`edge_weights` must have {n * (n - 1) // 2} pairs for {n} nodes"
        raise ValueError(_check.message(_OP, rule, tuple(edge_weights.shape)))
    k = n if top_k is None else min(_check.integer(_OP, "top_k", top_k, low=1), n)
    threshold = _check.number(_OP, "threshold", threshold, low=0.0)
    return apply(_AssembleAdjacency, edge_weights, n, k, threshold)[0]
