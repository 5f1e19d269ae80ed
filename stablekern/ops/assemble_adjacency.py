r"""Sparse symmetric adjacency matrices from the weights of all pairs of nodes.

Per graph: the weights fill a symmetric matrix $A$ with zero diagonal; each row keeps its `top_k` largest entries,

$$K_{ij} = [\,A_{ij} \text{ is among the } k \text{ largest of row } i\,] \cdot [\,A_{ij} > \tau\,],$$

and the result is $(K \circ A + (K \circ A)^T) / 2$. Since $A$ is symmetric, that is $c_{ij} A_{ij}$ with $c_{ij} =
(K_{ij} + K_{ji}) / 2$: 1 for an edge that both its ends pick, 1/2 for one that a single end picks, 0 otherwise. So a
row may hold more than k edges. The selection is piecewise constant: the gradient of a weight is $c_{ij}$ times that of
its two entries, and the selection itself has none. Forward and backward need only $c$, one number a pair.

*Ties* go to the lower node index, by a stable sort: equal weights (every graph at initialisation has some) give the
same graph on every run and device. The zero diagonal takes part in the sort, which changes nothing as long as $\tau \ge
0$: it can displace only entries that the threshold drops.

*Isolated nodes* keep a zero row. Other implementations give such a row a self loop, which changes the degrees and so
the spectrum; here the normalised Laplacian takes care of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern.numerics import EDGE_THRESHOLD

__all__ = ["assemble_adjacency"]


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


def _symmetric(pairs: Tensor, n: int) -> Tensor:
    """(..., E) -> (..., n, n) with zero diagonal. Each index is written once, so the backward is a plain gather."""
    first, second = torch.triu_indices(n, n, 1, device=pairs.device)
    flat = pairs.new_zeros(*pairs.shape[:-1], n * n)
    flat = flat.index_copy(-1, first * n + second, pairs).index_copy(-1, second * n + first, pairs)
    return flat.unflatten(-1, (n, n))


def _picks(pairs: Tensor, n: int, k: int) -> Tensor:
    """(..., E): how many of a pair's two ends have it among the k largest of their row."""
    best = _symmetric(pairs, n).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    chosen = torch.zeros(*pairs.shape[:-1], n, n, dtype=torch.int8, device=pairs.device).scatter(-1, best, 1)
    first, second = torch.triu_indices(n, n, 1, device=pairs.device)
    return (chosen + chosen.mT).flatten(-2).index_select(-1, first * n + second)


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
    - `threshold`: >= 0; applied after the selection, so a weak edge still uses up a place.

    **Returns:** a contiguous tensor of the dtype of `edge_weights`, exactly symmetric. A node without edges has a zero
    row (no self loop; `normalized_laplacian` handles it). Differentiable, also twice; dropped weights get a zero
    gradient.

    A NaN weight sorts above every number and is never dropped: it stays at its own two entries, takes a place in the
    rows of its two nodes, and reaches no other graph.

    **Raises:** `ValueError` for a shape that does not fit `n_nodes` or an option out of range, `TypeError` for another
    dtype.

    **Accuracy:** exact (the only arithmetic is a factor 1/2).
    """
    _check.dtypes("assemble_adjacency", _check.REAL + _check.HALF, edge_weights=edge_weights)
    sizes = _check.shapes("assemble_adjacency", edge_weights=(edge_weights, "b e t"))
    n = _check.integer("assemble_adjacency", "n_nodes", n_nodes, low=1)
    if sizes["e"] != n * (n - 1) // 2:
        rule = f"`edge_weights` must have {n * (n - 1) // 2} pairs for {n} nodes"
        raise ValueError(_check.message("assemble_adjacency", rule, tuple(edge_weights.shape)))
    k = n if top_k is None else _check.integer("assemble_adjacency", "top_k", top_k, low=1)
    threshold = _check.number("assemble_adjacency", "threshold", threshold, low=0.0)
    pairs = edge_weights.transpose(1, 2)
    with torch.no_grad():
        # Written so that a NaN, which is neither above nor below the threshold, is kept.
        share = torch.where(pairs <= threshold, 0, _picks(pairs, n, k)).to(pairs.dtype) / 2
    # Not a product alone: 0 times a dropped infinity would be NaN.
    return _symmetric(torch.where(share > 0, pairs * share, 0.0), n)
