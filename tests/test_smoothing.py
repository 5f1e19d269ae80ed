"""The running average over time: the loop it replaces, in any dtype, in pieces, and in the detector."""

from __future__ import annotations

import pytest
import torch

from stablekern.nn import SeizureDetector, TemporalEMA


def loop(x: torch.Tensor, beta: float, state: torch.Tensor | None = None) -> torch.Tensor:
    steps, last = [], x[..., 0] if state is None else state
    for step in x.unbind(-1):
        last = beta * last + (1 - beta) * step
        steps.append(last)
    return torch.stack(steps, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("given", [False, True])
def test_it_is_the_loop_with_its_gradients(dtype, given):
    x = torch.randn(2, 3, 4, 41, dtype=dtype).transpose(0, 1).requires_grad_()
    state = torch.randn(3, 2, 4, dtype=dtype).requires_grad_() if given else None
    leaves = [x, state] if given else [x]
    ours, theirs = TemporalEMA(0.9)(x, state), loop(x, 0.9, state)
    # Sums of terms below 1 whose weights add up to 1: a few ulp of the largest.
    tolerance = {"rtol": 0, "atol": 40 * torch.finfo(dtype).eps}
    torch.testing.assert_close(ours, theirs, **tolerance)
    weights = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(y, leaves, weights) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    x = torch.randn(5, 300).to(dtype)
    assert torch.equal(TemporalEMA(0.99)(x), TemporalEMA(0.99)(x.float()).to(dtype))


def test_a_constant_is_its_own_average_and_zero_beta_changes_nothing():
    x = torch.full((3, 50), 0.7, dtype=torch.float64)
    torch.testing.assert_close(TemporalEMA(0.9)(x), x, rtol=1e-15, atol=0)
    y = torch.randn(3, 50)
    assert torch.equal(TemporalEMA(0.0)(y), y)


def test_pieces_are_the_whole():
    x, average = torch.randn(4, 100, dtype=torch.float64), TemporalEMA(0.8)
    whole, memory, state, by_memory, by_state = average(x), {}, None, [], []
    for piece in x.split([1, 30, 7, 62], dim=-1):
        by_memory.append(average(piece, memory=memory))
        by_state.append(average(piece, state))
        state = by_state[-1][..., -1]
    for parts in (by_memory, by_state):
        torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=1e-15)


def test_empty():
    assert TemporalEMA()(torch.zeros(3, 0)).shape == (3, 0)
    assert TemporalEMA()(torch.zeros(0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: TemporalEMA(1.0), ValueError, "`beta` must be below 1"),
        (lambda: TemporalEMA(-0.1), ValueError, "`beta` must be a number >= 0 and <= 1: got -0.1"),
        (lambda: TemporalEMA()(torch.zeros(3, 4).long()), TypeError, "`x` must be one of .*: got int64"),
        (lambda: TemporalEMA()(torch.zeros(3, 4), torch.zeros(4)), ValueError, r"the shape \(3,\) .*: got \(4,\)"),
    ],
)
def test_misuse(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_the_detector_averages_its_edges():
    """The first graph is that of the edges themselves; later ones are not."""
    torch.manual_seed(0)
    plain = SeizureDetector.from_preset("nano").eval()
    smooth = SeizureDetector.from_preset("nano", edge_ema=0.9).eval()
    smooth.load_state_dict(plain.state_dict())
    seen = {}

    def keep(name, value):
        seen[name] = value

    for name, model in (("plain", plain), ("smooth", smooth)):
        model.edge_stream.register_forward_hook(lambda m, i, o, name=name: keep(name, o))
        model.gnn.register_forward_pre_hook(lambda m, i, name=name: keep(f"{name} graph", i[1]))
    x = torch.randn(1, 19, 16 * 64)
    with torch.no_grad():
        plain(x), smooth(x)
    assert torch.equal(seen["plain"], seen["smooth"])
    assert not torch.equal(seen["plain graph"], seen["smooth graph"])
    torch.testing.assert_close(seen["plain graph"][:, 0], seen["smooth graph"][:, 0])
