"""`assemble_adjacency` on graphs that can be checked by eye, and on weights that are not numbers."""

from __future__ import annotations

import pytest
import torch

import stablekern
from stablekern.ops.assemble_adjacency import assemble_adjacency

BACKENDS = ("native", "torch", "triton")


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


def before_the_selection(weights: torch.Tensor, n: int, top_k: int, threshold: float) -> torch.Tensor:
    """The same with the threshold first."""
    return assemble_adjacency(torch.where(weights <= threshold, 0, weights), n, top_k=top_k, threshold=0.0)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 2.0])
def test_the_threshold_may_come_before_or_after(threshold):
    """A weak edge is dropped; nothing could take its place."""
    w = torch.randint(-2, 9, (2, 66, 50)) / 8  # ties, and weights on the threshold
    for top_k in (1, 3, 7):
        after = assemble_adjacency(w, 12, top_k=top_k, threshold=threshold)
        assert torch.equal(after, before_the_selection(w, 12, top_k, threshold))
    on_the_bound = assemble_adjacency(graph({(0, 1): 0.25}, 3), 3, threshold=0.25)
    assert not on_the_bound.any()


def test_half_weights_are_not_compared_with_the_threshold():
    """Nodes 1 and 2 both pick node 0, which picks node 1 alone."""
    a = assemble_adjacency(graph({(0, 1): 1.0, (0, 2): 0.375}, 3), 3, top_k=1, threshold=0.25)[0, 0]
    assert a[0, 1] == 1.0 and a[0, 2] == 0.1875


def awkward(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Ties, zeros of both signs, negative weights, now and then a NaN or an infinity, whole graphs of either."""
    w = (torch.randint(-3, 12, shape) / 8).to(dtype) * torch.where(torch.rand(shape) < 0.5, 1.0, 1.01)
    w = torch.where(torch.rand(shape) < 0.02, torch.nan, w)
    w = torch.where(torch.rand(shape) < 0.02, torch.inf, w)
    w = torch.where(torch.rand(shape) < 0.02, -torch.inf, w)
    if shape[2] > 2:
        w[0, :, 0], w[0, :, 1], w[0, :, 2] = torch.nan, 1.0, -0.0
    return w.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("nodes", "steps"), [(19, 37), (2, 5), (5, 16), (33, 3), (1, 4)])
def test_backends_agree_bit_for_bit(nodes, steps, dtype):
    """Graphs, and gradients of a loss that has NaN where nothing was kept."""
    w = awkward((2, nodes * (nodes - 1) // 2, steps), dtype)
    for top_k in (1, 2, 3, 5, nodes, None):
        found = []
        # Triton's interpreter cuts a sum off to bfloat16, where everything else rounds.
        for backend in BACKENDS[: 2 if dtype == torch.bfloat16 else 3]:
            leaf = w.clone().requires_grad_()
            with stablekern.use_backend(backend):
                a = assemble_adjacency(leaf, nodes, top_k=top_k)
                weights = torch.linspace(-2, 3, a.numel(), dtype=torch.float64).to(dtype).view(a.shape)
                (grad,) = torch.autograd.grad(a, leaf, torch.where(a == 0, torch.nan, weights))
            found.append((a.detach(), grad))
        for other in found[1:]:
            for ours, theirs in zip(other, found[0], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
        assert torch.isfinite(found[0][1]).all()


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


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_graph_and_visible(backend):
    with stablekern.use_backend(backend):
        nan_stays_in_its_graph_and_visible()


def nan_stays_in_its_graph_and_visible():
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
