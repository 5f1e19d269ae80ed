"""The layers of the complex sequence model: each against a slow definition of its own, and what they promise."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import stablekern.nn as snn
from stablekern.ops.cayley_step import reference

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "sem_char_lm.py"


def normal(*shape: int, dtype=torch.complex128):
    return torch.randn(*shape, dtype=dtype)


def gradients(outputs, *inputs):
    return torch.autograd.grad(outputs.abs().square().sum(), inputs)


def wide(module: nn.Module) -> nn.Module:
    """Parameters in float64 and complex128; `Module.double` leaves complex ones alone."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                dtype = torch.complex128 if parameter.is_complex() else torch.float64
                part._parameters[name] = nn.Parameter(parameter.detach().to(dtype))
        for name, buffer in part._buffers.items():
            if buffer.is_floating_point():
                part._buffers[name] = buffer.double()
    return module


def test_complex_linear_is_a_complex_product():
    layer = wide(snn.ComplexLinear(3, 5))
    with torch.no_grad():
        layer.bias.copy_(normal(5))
    x = normal(2, 4, 3)
    torch.testing.assert_close(layer(x), torch.einsum("oi,bli->blo", layer.weight, x) + layer.bias)
    assert snn.ComplexLinear(3, 5, bias=False).state_dict().keys() == {"weight"}
    assert float(snn.ComplexLinear(400, 400).weight.detach().abs().square().mean()) == pytest.approx(1 / 400, rel=0.02)


@pytest.mark.parametrize("size", [0.0, 1e-7, 1.0, 1e15])
def test_norm_is_finite_for_tokens_of_any_size(size):
    layer = snn.ComplexRMSNorm(6)
    z = (size * normal(4, 6)).to(torch.complex64).requires_grad_()
    y = layer(z)
    assert torch.isfinite(y).all() and all(torch.isfinite(g).all() for g in gradients(y, z, layer.scale))
    assert y.abs().max() <= 6**0.5 + 1e-3
    if size >= 1:
        torch.testing.assert_close(y.abs().square().mean(-1), torch.ones(4), rtol=1e-4, atol=0)
    else:
        assert (y.abs() <= z.abs() / layer.eps**0.5 * 1.001).all()


def test_norm_gradcheck_at_zero():
    layer = wide(snn.ComplexRMSNorm(3))
    z = torch.zeros(2, 3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(layer, z)


def slow_scan(layer, x, state):
    outputs = []
    for t in range(x.shape[1]):
        steps = layer.dt_proj(torch.cat((x[:, t].real, x[:, t].imag), -1))
        size, turn = (steps.clamp(math.log(1e-4), math.log(2.0)).exp()[:, i : i + 1] for i in range(2))
        decay = torch.exp(torch.complex(-size * torch.log1p(torch.exp(layer.log_A_mag)), turn * layer.A_phase))
        state = decay * state + size * (x[:, t] @ layer.B.weight.T)
        outputs.append(state @ layer.C.weight.T + layer.D * x[:, t])
    return torch.stack(outputs, 1), state


def test_scan_is_its_recurrence_in_pieces_too():
    layer = wide(snn.ComplexSelectiveScan(4, 6, horizon=20.0))
    x, start = normal(2, 9, 4).requires_grad_(), normal(2, 6)
    expected, last = slow_scan(layer, x, start)
    y, state = layer(x, start, return_last_state=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(state, last)
    parameters = [x, *layer.parameters()]
    for a, b in zip(gradients(y, *parameters), gradients(expected, *parameters), strict=True):
        torch.testing.assert_close(a, b)
    first, state = layer(x[:, :5], start, return_last_state=True)
    torch.testing.assert_close(torch.cat((first, layer(x[:, 5:], state)), 1), y)


def test_scan_starts_with_memories_up_to_the_horizon_and_always_decays():
    layer = snn.ComplexSelectiveScan(4, 16, horizon=100.0)
    rate = nn.functional.softplus(layer.log_A_mag)
    torch.testing.assert_close(
        (1 / rate).aminmax(), torch.return_types.aminmax((torch.tensor(1.0), torch.tensor(100.0)))
    )
    with torch.no_grad():
        layer.log_A_mag.fill_(-200.0)  # no decay is left, and none grows
        layer.dt_proj.bias.fill_(1e6)
    y = layer((1e3 * normal(1, 300, 4)).to(torch.complex64))
    assert torch.isfinite(y).all()
    loss = layer(torch.zeros(2, 5, 4, dtype=torch.complex64)).abs().square().sum()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, list(layer.parameters())))


def test_hamiltonian_is_a_laplacian():
    H = wide(snn.GraphHamiltonian(40, 4, 3))
    edges, weights = H()
    assert (weights > 0).all() and (edges[0] < edges[1]).all()
    assert torch.unique(edges, dim=1).shape == edges.shape
    dense = H.dense()
    torch.testing.assert_close(dense, dense.mT)
    assert dense.sum(-1).abs().max() < 1e-13
    assert torch.linalg.eigvalsh(dense)[0] > -1e-12
    by_hand = torch.zeros_like(weights)
    for s, share in enumerate(torch.softmax(H.scale_weights, 0)):
        by_hand = by_hand.index_add(0, getattr(H, f"positions_{s}"), share * torch.log1p(torch.exp(H.edge_logits[s])))
    torch.testing.assert_close(weights, by_hand)
    assert all(
        torch.isfinite(p.grad).all() for p in H.parameters() if weights.sum().backward(retain_graph=True) is None
    )


@pytest.mark.parametrize(("dim", "sparsity"), [(1, 6), (2, 6), (3, 2), (5, 8)])
def test_hamiltonian_of_few_nodes(dim, sparsity):
    """No more edges than there are pairs."""
    H = snn.GraphHamiltonian(dim, sparsity)
    assert H.edges.shape[1] <= dim * (dim - 1) // 2
    psi = normal(3, dim, dtype=torch.complex64)
    layer = snn.CayleyPropagator(dim, sparsity=sparsity)
    torch.testing.assert_close(layer(psi).norm(dim=-1), psi.norm(dim=-1))


def test_graph_is_drawn_once_and_saved():
    first, second, other = (snn.GraphHamiltonian(30, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.edges, second.edges) and not torch.equal(first.edges, other.edges)
    if first.edges.shape == other.edges.shape:
        other.load_state_dict(first.state_dict(), strict=False)
        assert torch.equal(first.edges, other.edges)


@pytest.mark.parametrize("learn_dt", [False, True])
def test_propagator_is_a_phase_and_a_solve(learn_dt):
    layer = wide(snn.CayleyPropagator(12, 0.3, gamma=0.4, learn_dt=learn_dt, sparsity=4))
    psi = normal(2, 3, 12).requires_grad_()
    relative = psi.abs().square() / (psi.abs().square().mean(-1, keepdim=True) + 1e-5)
    turned = psi * torch.exp(1j * torch.pi * (1 - torch.exp(-0.4 * relative)))
    expected = reference(turned, *layer.hamiltonian(), layer.dt)
    torch.testing.assert_close(layer(psi), expected)
    parameters = [psi, *layer.parameters()]
    assert (layer.dt.requires_grad is learn_dt) and ("dt" in layer.state_dict())
    weight = normal(2, 3, 12)
    ours, theirs = (torch.autograd.grad((y * weight).real.sum(), parameters) for y in (layer(psi), expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e15])
def test_propagator_is_unitary_for_tokens_of_any_size(size):
    layer = snn.CayleyPropagator(64, 0.5)
    psi = (size * normal(8, 64)).to(torch.complex64).requires_grad_()
    out = layer(psi)
    before, after = (z.detach().to(torch.complex128).norm(dim=-1) for z in (psi, out))
    assert ((after - before).abs() <= 1e-6 * before).all()
    assert torch.isfinite(torch.autograd.grad(out.real.sum(), psi)[0]).all()


def test_born_head_is_born_s_rule():
    head = wide(snn.BornHead(5, 7))
    with torch.no_grad():
        head.bias.normal_()
    psi = normal(3, 5)
    power = (psi @ head.amplitude.weight.T).abs().square() * torch.exp(head.bias)
    share = torch.softmax(head(psi), -1)
    torch.testing.assert_close(share, power / power.sum(-1, keepdim=True), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(torch.softmax(head(1e-3 * psi), -1), share)  # the scale does not matter


@pytest.mark.parametrize("size", [0.0, 1e-12, 1.0, 1e12])
def test_born_head_has_finite_gradients(size):
    head = snn.BornHead(5, 7)
    psi = (size * normal(3, 5)).to(torch.complex64).requires_grad_()
    loss = nn.functional.cross_entropy(head(psi), torch.tensor([0, 3, 6]))
    assert torch.isfinite(loss)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, [psi, *head.parameters()]))


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda: snn.ComplexLinear(0, 3), ValueError, "nn.ComplexLinear: `d_in` must be >= 1: got 0"),
        (lambda: snn.ComplexRMSNorm(3, eps=0.0), ValueError, "nn.ComplexRMSNorm: `eps` must be a number > 0"),
        (lambda: snn.ComplexSelectiveScan(3, horizon=1.0), ValueError, "`horizon` must be a number > 1: got 1"),
        (lambda: snn.GraphHamiltonian(8, 1), ValueError, "nn.GraphHamiltonian: `sparsity` must be >= 2: got 1"),
        (lambda: snn.CayleyPropagator(8, math.inf), ValueError, "nn.CayleyPropagator: `dt` must be finite: got inf"),
        (lambda: snn.CayleyPropagator(8, method="cg"), ValueError, "nn.CayleyPropagator: `method` must be one of"),
        (lambda: snn.CayleyPropagator(8)(torch.zeros(2, 7) + 0j), ValueError, "`psi` must have the shape|got"),
    ],
)
def test_errors_say_what_came(make, kind, text):
    with pytest.raises(kind, match=text):
        make()


def test_the_language_model_learns_with_noise_and_stays_unitary():
    spec = importlib.util.spec_from_file_location("sem_char_lm", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.train(40)
    assert found["non_finite_steps"] == 0
    assert found["loss_after"] < found["unigram_entropy"] < found["loss_before"]
    assert 0 < found["largest_drift"] < 1e-5
