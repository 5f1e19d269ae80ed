"""PyTorch Geometric's `AddLaplacianEigenvectorPE` by `stablekern.laplacian_pe` (`pip install torch-geometric`).

    with stablekern.swap("torch_geometric"):
        transform = torch_geometric.transforms.AddLaplacianEigenvectorPE(k=8)

The same eigenvectors up to their signs, decomposed in float64. What differs, on purpose: no sign is drawn at random
(the component of largest modulus is positive), and a graph with repeated eigenvalues, a disconnected one for instance,
gets the same encoding at every call. Directed graphs, more than 256 nodes (where a few vectors of a sparse matrix cost
less) and sparse tensors go to the original, and are counted in the report.
"""

from __future__ import annotations

from typing import Any

import torch
import torch_geometric
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.transforms import AddLaplacianEigenvectorPE as _Original
from torch_geometric.transforms import Compose
from torch_geometric.transforms.add_positional_encoding import add_node_attr
from torch_geometric.utils import remove_self_loops

from stablekern import _swap
from stablekern.ops.laplacian_pe import laplacian_pe

__all__ = ["AddLaplacianEigenvectorPE"]

_VERSIONS = ("2.6", "2.7", "2.8")
_SIGNATURES = ("k, attr_name, is_undirected, **kwargs",)
_NAME = "torch_geometric.transforms.AddLaplacianEigenvectorPE"
_NOTE = "signs are fixed, not drawn"
_DENSE_NODES = 256  # beyond, all eigenvectors of a dense matrix take several times as long as the lowest of a sparse


class AddLaplacianEigenvectorPE(_Original):
    """The transform under its own name and arguments; `**kwargs` (of scipy's solvers) serve where the original does."""

    def forward(self, data: Data) -> Data:
        adjacency, reason = _dense_adjacency(data)
        if reason is not None or self.k >= adjacency.shape[-1]:
            _swap.fallen[f"AddLaplacianEigenvectorPE: {reason or 'k is the number of nodes or more'}"] += 1
            return super().forward(data)
        with torch.no_grad():
            pe = laplacian_pe(adjacency[None], self.k, skip_trivial=True)[0]
        return add_node_attr(data, pe.to(_dtype(data)), attr_name=self.attr_name)


def _dtype(data: Data) -> torch.dtype:
    return torch.get_default_dtype() if data.edge_weight is None else data.edge_weight.dtype


def _dense_adjacency(data: Data) -> tuple[Tensor, str | None]:
    """The symmetric (n, n) matrix of the graph in float64, or why there is none."""
    edges, weights, n = data.edge_index, data.edge_weight, data.num_nodes
    nothing = torch.empty(0, 0)
    if not isinstance(edges, Tensor) or edges.layout != torch.strided or n is None:
        return nothing, "edges that are no dense edge_index"
    if n > _DENSE_NODES:
        return nothing, f"more than {_DENSE_NODES} nodes"
    if weights is not None and (weights.dim() != 1 or not weights.is_floating_point() or bool((weights < 0).any())):
        return nothing, "weights that are not one real number >= 0 per edge"
    edges, weights = remove_self_loops(edges, weights)
    values = torch.ones(edges.shape[1], device=edges.device) if weights is None else weights
    adjacency = torch.zeros(n, n, dtype=torch.float64, device=edges.device)
    adjacency.index_put_((edges[0], edges[1]), values.detach().double(), accumulate=True)
    # Parallel edges are summed in the order of the list, which may differ between the two directions.
    if not torch.allclose(adjacency, adjacency.mT, rtol=torch.finfo(values.dtype).eps, atol=0.0):
        return nothing, "a directed graph"
    return (adjacency + adjacency.mT) / 2, None


def swap_library(report: _swap.SwapReport) -> None:
    swap_class(report, _Original)


def _is_known(report: _swap.SwapReport) -> bool:
    _swap.known_version("torch_geometric", torch_geometric.__version__, _VERSIONS)
    return report.fits(_NAME, _Original.__init__, _SIGNATURES)


def swap_class(report: _swap.SwapReport, cls: type) -> bool:
    if cls is AddLaplacianEigenvectorPE or torch_geometric.transforms.AddLaplacianEigenvectorPE is not _Original:
        report.leave(_NAME, "swapped already")
        return True
    if cls is not _Original:
        return False
    if _is_known(report):
        report.everywhere(_NAME, _Original, AddLaplacianEigenvectorPE, _NOTE)
    return True


def swap_object(report: _swap.SwapReport, transform: Any) -> bool:
    if isinstance(transform, Compose):
        return any([swap_object(report, part) for part in transform.transforms])
    if not isinstance(transform, _Original):
        return False
    label = f"a transform, k={transform.k}"
    if isinstance(transform, AddLaplacianEigenvectorPE):
        report.leave(label, "swapped already")
    elif type(transform) is not _Original:
        report.leave(label, "a class derived from it, whose forward may be another")
    elif _is_known(report):
        report.retype(transform, AddLaplacianEigenvectorPE)
        report.note(label, AddLaplacianEigenvectorPE, _NOTE)
    return True
