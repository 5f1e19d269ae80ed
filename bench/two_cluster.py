"""How often a batch of graphs has a gradient that is not finite: `python -m bench.two_cluster`.

Batches of 4 x 960 graphs on 19 nodes, the three strongest weights of each row kept, float32; once among all nodes, once
within two groups of nodes, as when the hemispheres of a recording decouple. Each goes through the normalised Laplacian
and 16 eigenvectors, with the backward of `torch.linalg.eigh` and with ours. Printed: the batches whose gradient of the
weights has a NaN or an infinity, and the largest finite |gradient|.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor

import stablekern
from bench.store import append, stamp

OP = "two_cluster"
NODES, KEPT, COLUMNS = 19, 3, 16


def graphs(generator: torch.Generator, count: int, groups: int) -> Tensor:
    """(count, 19, 19) symmetric graphs of the strongest three weights per row, within each of the groups."""
    weights = torch.rand(count, NODES, NODES, generator=generator)
    group = torch.arange(NODES) * groups // NODES
    weights = (weights + weights.mT) * (group[:, None] == group) * (1 - torch.eye(NODES))
    strongest = torch.zeros_like(weights).scatter(-1, weights.topk(KEPT, -1).indices, 1.0)
    return (weights * strongest + (weights * strongest).mT) / 2


def chain(adjacency: Tensor) -> Tensor:
    """D^-1/2 A D^-1/2, torch.linalg.eigh, the sign of the column sum."""
    root = adjacency.sum(-1).rsqrt()
    laplacian = torch.eye(NODES) - root[:, :, None] * adjacency * root[:, None, :]
    vectors = torch.linalg.eigh(laplacian).eigenvectors[..., :COLUMNS]
    return vectors * torch.where(vectors.sum(-2, keepdim=True) < 0, -1.0, 1.0)


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.linalg.eigh": chain,
    "laplacian_pe": lambda adjacency: stablekern.laplacian_pe(adjacency, COLUMNS),
    'laplacian_pe, grad="auto"': lambda adjacency: stablekern.laplacian_pe(adjacency, COLUMNS, grad="auto"),
}


def compare(batches: int, size: int, groups: int, methods: tuple[str, ...] = tuple(METHODS)) -> dict[str, dict]:
    """Per method: how many batches had a gradient that is not finite, and the largest finite entry of all."""
    found = {name: {"not_finite": 0, "largest": 0.0} for name in methods}
    for batch in range(batches):
        generator = torch.Generator().manual_seed(1000 * groups + batch)
        adjacency = graphs(generator, size, groups)
        weight = torch.randn(size, NODES, COLUMNS, generator=generator)
        for name in methods:
            leaf = adjacency.clone().requires_grad_()
            gradient = torch.autograd.grad(METHODS[name](leaf), leaf, weight)[0]
            finite = torch.isfinite(gradient)
            found[name]["not_finite"] += not bool(finite.all())
            largest = float(torch.where(finite, gradient, 0.0).abs().max())
            found[name]["largest"] = max(found[name]["largest"], largest)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=200)
    options = parser.parse_args()
    print(f"{'graphs':24}{'backward':28}{'batches not finite':>20}{'largest |gradient|':>22}")
    for case, groups in (("one group", 1), ("two groups", 2)):
        found = compare(options.batches, 4 * 960, groups)
        for name, result in found.items():
            print(f"{case:24}{name:28}{result['not_finite']:>10} of {options.batches:<6}{result['largest']:>22.3g}")
        line = {"op": OP, "case": case, "batches": options.batches, "graphs": 4 * 960, "methods": found}
        append(line | stamp("cpu"))


if __name__ == "__main__":
    main()
