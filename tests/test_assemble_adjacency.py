"""`assemble_adjacency` on graphs that can be checked by eye, and on weights that are not numbers."""

from __future__ import annotations

import pytest
import torch

from stablekern.ops.assemble_adjacency import assemble_adjacency


def graph(weights: dict[tuple[int, int], float], n: int) -> torch.Tensor:
    """(1, E, 1) weights, 0 where not given."""
    first, second = torch.triu_indices(n, n, 1).tolist()
    return torch.tensor([weights.get(pair, 0.0) for pair in zip(first, second, strict=True)]).view(1, -1, 1)


def test_one_sided_picks_have_half_weight():
    """Node 3 picks node 0, which prefers node 1."""
    a = assemble_adjacency(graph({(0, 1): 4.0, (0, 3): 2.0, (1, 2): 1.0}, 4), 4, top_k=1)[0, 0]
    expected = torch.tensor([[0, 4, 0, 1], [4, 0, 0.5, 0], [0, 0.5, 0, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(a, expected, rtol=0, atol=0)


def test_ties_go_to_the_lower_index():
    """All weights equal, one pick each: every node picks node 0, which picks node 1."""
    a = assemble_adjacency(torch.ones(1, 171, 1), 19, top_k=1)[0, 0]
    expected = torch.zeros(19, 19)
    expected[0, 2:] = expected[2:, 0] = 0.5
    expected[0, 1] = expected[1, 0] = 1.0
    torch.testing.assert_close(a, expected, rtol=0, atol=0)


def test_the_threshold_comes_after_the_selection():
    """A weak edge uses up the place and is dropped; nothing takes its place."""
    a = assemble_adjacency(graph({(0, 1): 5e-5, (0, 2): 4e-5}, 3), 3, top_k=1)
    assert not a.any()
    on_the_bound = assemble_adjacency(graph({(0, 1): 0.25}, 3), 3, threshold=0.25)
    assert not on_the_bound.any()


def test_isolated_nodes_have_zero_rows():
    a = assemble_adjacency(graph({(0, 1): 1.0}, 4), 4)[0, 0]
    assert not a[2:].any() and not a[:, 2:].any()


def test_symmetric_with_zero_diagonal():
    a = assemble_adjacency(torch.randn(3, 171, 8), 19)
    assert a.is_contiguous() and torch.equal(a, a.mT) and not a.diagonal(dim1=-2, dim2=-1).any()


def test_gradient_is_the_share_of_the_edge():
    w = graph({(0, 1): 4.0, (0, 3): 2.0, (1, 2): 1.0}, 4).requires_grad_()
    (grad,) = torch.autograd.grad(assemble_adjacency(w, 4, top_k=1).sum(), w)
    assert grad.flatten().tolist() == [2.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_nan_stays_in_its_graph_and_visible():
    w = torch.rand(2, 171, 3)
    broken = w.clone()
    broken[1, 0, 2] = torch.nan
    broken.requires_grad_()
    a, b = assemble_adjacency(w, 19), assemble_adjacency(broken, 19)
    where = torch.isnan(b)
    assert where.sum() == 2 and where[1, 2, 0, 1] and where[1, 2, 1, 0]
    others = torch.ones(2, 3, dtype=torch.bool)
    others[1, 2] = False
    assert torch.equal(a[others], b[others])
    (grad,) = torch.autograd.grad(b.sum(), broken)
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
def test_infinite_weights_make_no_nan(value):
    """A dropped one contributes 0, a kept one itself."""
    w = graph({(0, 1): value, (0, 2): 3.0, (1, 2): 2.0}, 4).requires_grad_()
    a = assemble_adjacency(w, 4, top_k=1)
    assert not torch.isnan(a).any()
    assert a[0, 0, 0, 1] == max(value, 0.0)
    (grad,) = torch.autograd.grad(a[torch.isfinite(a)].sum(), w)
    assert torch.isfinite(grad).all()
