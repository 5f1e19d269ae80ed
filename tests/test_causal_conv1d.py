"""What `causal_conv1d` promises beyond the suite: bits, causality, cuts, layout."""

from __future__ import annotations

import pytest
import torch

import stablekern
from specs.causal_conv1d import inputs
from stablekern.ops.causal_conv1d import causal_conv1d

BACKENDS = [b for b, reason in stablekern.available_backends("causal_conv1d").items() if reason is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with stablekern.use_backend(request.param):
        yield request.param


def case(*sizes: int, dtype=torch.float32):
    return [t.to(dtype) for t in inputs(torch.Generator().manual_seed(3), *sizes)]


@pytest.mark.parametrize("channels_last", [False, True])
def test_same_bits_for_any_number_of_threads(channels_last):
    x, weight, bias, _ = case(3, 37, 1500, 4)
    x = x.mT.contiguous().mT if channels_last else x
    x, weight, bias = (t.requires_grad_() for t in (x, weight, bias))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            y = causal_conv1d(x, weight, bias, activation="silu")
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, bias))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
def test_no_result_sees_the_other_side(backend, reverse):
    x, weight, bias, _ = case(2, 5, 300, 4)
    clean = causal_conv1d(x, weight, bias, activation="silu", reverse=reverse)
    x[0, 1, 128] = float("nan")
    spoilt = causal_conv1d(x, weight, bias, activation="silu", reverse=reverse)
    reach = torch.zeros(300, dtype=torch.bool)
    reach[125 : 129 if reverse else 128] = reverse
    reach[128:132] = not reverse
    reach[128] = True
    assert torch.equal(torch.isnan(spoilt[0, 1]), reach)
    spoilt[0, 1, reach] = clean[0, 1, reach]
    torch.testing.assert_close(spoilt, clean, rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cut", [3, 128, 200])
def test_a_sequence_may_be_cut(backend, reverse, cut):
    """Each piece takes the 3 steps next to it, on the side that it sees, as its initial state."""
    x, weight, bias, _ = case(2, 5, 260, 4, dtype=torch.float64)
    whole = causal_conv1d(x, weight, bias, activation="silu", reverse=reverse)
    head, tail = x[..., :cut], x[..., cut:]
    starts = (tail[..., :3], None) if reverse else (None, head[..., -3:])
    parts = [
        causal_conv1d(part, weight, bias, activation="silu", initial_state=start, reverse=reverse)
        for part, start in zip((head, tail), starts, strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts, -1), whole)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_float32(backend, half):
    x, weight, bias, _ = case(2, 5, 40, 4, dtype=half)
    wide = causal_conv1d(x.float(), weight.float(), bias.float(), activation="silu")
    torch.testing.assert_close(causal_conv1d(x, weight, bias, activation="silu"), wide.to(half), rtol=0, atol=0)
    mixed = causal_conv1d(x, weight.float(), bias.float(), activation="silu")  # parameters kept in float32
    torch.testing.assert_close(mixed, wide.to(half), rtol=0, atol=0)


def test_what_is_side_by_side_stays_so(backend):
    x, weight, _, _ = case(2, 5, 40, 4)
    for axis, layout in ((2, x), (1, x.mT.contiguous().mT)):
        leaf = layout.detach().requires_grad_()
        y = causal_conv1d(leaf, weight)
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert y.stride(axis) == grad.stride(axis) == 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_nothing_is_copied(channels_last, monkeypatch):
    """Both layouts are read where they are, parts of wider rows too."""
    x, weight, bias, _ = case(2, 6, 40, 4)
    x = x[:, :4] if not channels_last else x.mT.contiguous()[..., :4].mT
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda t: t if t.dim() < 3 else pytest.fail("a copy"))
    with stablekern.use_backend("native"):
        leaf = x.detach().requires_grad_()
        y = causal_conv1d(leaf, weight[:4], bias[:4], activation="silu")
        torch.autograd.grad(y, leaf, y.detach())


@pytest.mark.parametrize("channels_last", [False, True])
def test_both_directions_in_one_call_are_two_calls(backend, channels_last):
    x, weight, bias, _ = case(2, 38, 300, 4)
    x = x.mT.contiguous().mT if channels_last else x

    def run(part, **direction):
        leaves = [t.detach().requires_grad_() for t in (x[:, part], weight[part], bias[part])]
        y = causal_conv1d(*leaves, activation="silu", **direction)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    both = run(slice(None), bidirectional=True)
    for half, part in enumerate((slice(0, 19), slice(19, 38))):
        alone = run(part, reverse=bool(half))
        for a, b in zip(both, alone, strict=True):
            torch.testing.assert_close(a[:, part] if a.dim() == 3 else a[part], b)
