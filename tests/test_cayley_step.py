"""What is special about `cayley_step`: unitarity, the interval, the choice of a method, tokens that stay alone."""

from __future__ import annotations

import math

import pytest
import torch

import stablekern
from specs.cayley_step import graph, tokens
from stablekern import _load, _registry
from stablekern.ops import cayley_step as spine
from stablekern.ops.cayley_step import cayley_step

METHODS = ("chebyshev", "dense", "cocg")
BACKENDS = [b for b, reason in _registry.available_backends("cayley_step").items() if reason is None and b != "triton"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with stablekern.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="module")
def model():
    """256 nodes, 12 edges to each, weights as softplus makes them."""
    g = torch.Generator().manual_seed(3)
    edges = graph(g, 256, 1280)
    weights = torch.nn.functional.softplus(0.1 * torch.randn(edges.shape[1], generator=g))
    return edges, weights, tokens(g, 64, 256).to(torch.complex64)


def norms(psi):
    return torch.linalg.vector_norm(psi.to(torch.complex128), dim=-1)


@pytest.mark.parametrize("dt", [0.01, 0.02, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_eight_layers_keep_the_norm(model, backend, method, dt):
    edges, weights, psi = model
    out = psi
    for _ in range(8):
        out = cayley_step(out, edges, weights, dt, method=method)
    assert (norms(out) / norms(psi) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dt", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("method", ["auto", *METHODS])
@pytest.mark.parametrize("nodes", [2, 5, 16])
def test_few_components_drift_by_their_rounding(backend, method, dt, nodes):
    """Of many tokens the worst: what an iteration leaves is 2 ulp a step, and so is what products and sums round."""
    g = torch.Generator().manual_seed(3)
    edges = graph(g, nodes, min(nodes, nodes * (nodes - 3) // 2) if nodes > 2 else 0)
    weights = 0.3 * torch.rand(edges.shape[1], generator=g)
    out = psi = tokens(g, 4096, nodes).to(torch.complex64)
    for _ in range(8):
        out = cayley_step(out, edges, weights, dt, method=method)
    assert (norms(out) / norms(psi) - 1).abs().max() < 8 * 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dt", [0.02, 1.0])
def test_back_and_forth_is_the_identity(model, backend, dt):
    edges, weights, psi = model
    there_and_back = cayley_step(cayley_step(psi, edges, weights, dt), edges, weights, -dt)
    assert (there_and_back - psi).abs().max() < 16 * torch.finfo(torch.float32).eps * psi.abs().max()


def test_expansion_is_short_and_known_beforehand(model):
    edges, weights, _ = model
    low, high = spine._interval(edges, weights, 256).tolist()
    assert low == 0.0
    two_ulp = 2 * torch.finfo(torch.float32).eps
    lengths = [len(spine._expansion(dt / 2, low, high, two_ulp).coefficients) for dt in (0.02, 0.1)]
    assert lengths[0] <= 6 and lengths[1] <= 11


@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_interval_holds_the_spectrum(lowest):
    """For weights of both signs too; the native one and the one in torch are the same."""
    g = torch.Generator().manual_seed(1)
    for nodes in (2, 3, 10, 60):
        edges = graph(g, nodes, nodes // 2 if nodes > 3 else 0)
        weights = lowest + 1.5 * torch.rand(edges.shape[1], generator=g, dtype=torch.float64)
        eigenvalues = torch.linalg.eigvalsh(spine._laplacian(edges, weights, nodes))
        edges = edges.contiguous()
        ours = spine._interval(edges, weights, nodes)
        rounding = 8 * torch.finfo(torch.float64).eps * eigenvalues.abs().max()
        assert ours[0] <= eigenvalues[0] + rounding and eigenvalues[-1] <= ours[1] + rounding
        gershgorin = 2 * torch.zeros(nodes, dtype=torch.float64).index_add_(0, edges.flatten(), weights.abs().repeat(2))
        assert ours[1] <= gershgorin.max() + rounding
        if "native" in BACKENDS:
            native = torch.empty(2, dtype=torch.float64)
            _load.native().cayley_step_interval(edges, weights, nodes, spine._POWER_STEPS, native)
            torch.testing.assert_close(native, ours)


def test_interval_survives_weights_of_very_different_size():
    edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
    weights = torch.tensor([1e30, 1e-30, 1.0, 0.0], dtype=torch.float64)
    found = [spine._interval(edges, weights, 6), spine._interval(edges[:, :0], weights[:0], 3)]
    if "native" in BACKENDS:
        for e, w, nodes in ((edges, weights, 6), (edges[:, :0].contiguous(), weights[:0], 3)):
            found.append(torch.empty(2, dtype=torch.float64))
            _load.native().cayley_step_interval(e, w, nodes, spine._POWER_STEPS, found[-1])
    for ends in found[::2]:
        torch.testing.assert_close(ends, torch.tensor([0.0, 2e30], dtype=torch.float64))
    for ends in found[1::2]:
        assert ends.tolist() == [0.0, 0.0]


def test_auto_takes_the_cheapest():
    interval = torch.tensor([0.0, 13.0], dtype=torch.float64)

    def choice(dt, count=16384, nodes=256, entries=24 * 256, top=interval, **kwargs):
        step = torch.tensor(dt, dtype=torch.float64)
        return spine._plan(count, nodes, entries, top, step, "auto", torch.float32, **kwargs).method

    assert choice(0.02) == "chebyshev"
    assert choice(1.0) == "dense"
    assert choice(1.0, count=1) == "chebyshev"  # a factor for one token costs more than a long expansion
    assert choice(100.0) == "unitary"
    assert choice(1.0, nodes=20000, entries=480000) == "chebyshev"
    assert choice(1e6, nodes=20000, entries=480000, count=10**9) == "cocg"
    assert choice(0.02, top=interval * math.nan) == "chebyshev"  # of NaN
    # A product that takes half the time moves the crossover.
    assert [choice(0.1, dense_gain=gain) for gain in (1.0, 2.0)] == ["chebyshev", "dense"]
    assert choice(0.02, dense_gain=2.0) == "chebyshev"


def test_shift_of_the_factor_is_exact_in_any_dtype():
    for size in (0.0, 1e-3, 0.5, 2.0, 7.0, 32.0, 1e200, math.inf):
        shift = spine._shift(size)
        assert 0 <= shift <= 2 and torch.tensor(shift, dtype=torch.float32).item() == shift
    assert spine._shift(math.nan) == 0


@pytest.mark.skipif("native" not in BACKENDS, reason="no native kernels here")
@pytest.mark.parametrize("nodes", [1, 2, 9, 64])
@pytest.mark.parametrize("dt", [-0.1, 0.02, 1.0])
def test_factor_by_expansion_is_the_inverse(nodes, dt):
    """To a part of what float32 rounds off; for an odd number of columns too, which go two to a token."""
    g = torch.Generator().manual_seed(nodes)
    edges = graph(g, nodes, nodes // 3).contiguous() if nodes > 1 else torch.zeros(2, 0, dtype=torch.int64)
    weights = 0.2 + torch.rand(edges.shape[1], generator=g)
    step, interval = torch.tensor(dt, dtype=torch.float64), spine._interval(edges, weights, nodes)
    plan = spine._plan(10, nodes, nodes + 2 * edges.shape[1], interval, step, "dense", torch.float32)
    tolerance = 2 * torch.finfo(torch.float32).eps / 64
    expanded = plan._replace(exact=spine._expansion(dt / 2, *interval.tolist(), tolerance))
    ours = spine._native_factor(edges, weights, expanded, nodes)
    exact = spine._real_factor(edges, weights.double(), plan.a, nodes, plan.shift)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=torch.finfo(torch.float32).eps / 2, atol=tolerance)


@pytest.mark.parametrize("power", [-120, -100, 100, 120])
def test_size_of_a_token_does_not_matter(model, backend, power):
    """To a dense product in parts, the smallest of which would be subnormal, and the largest infinite."""
    edges, weights, psi = model
    out = cayley_step(psi, edges, weights, 0.3, method="dense")
    scaled = cayley_step(psi * 2.0**power, edges, weights, 0.3, method="dense") * 2.0**-power
    assert (scaled - out).abs().max() < 16 * torch.finfo(torch.float32).eps * psi.abs().max()


@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_bad_token_stays_alone(model, backend, method):
    edges, weights, psi = model
    expected = cayley_step(psi, edges, weights, 0.1, method=method)
    bad = psi.clone()
    bad[3, 5], bad[40, 200] = math.nan, complex(0.0, math.inf)
    bad.requires_grad_()
    out = cayley_step(bad, edges, weights, 0.1, method=method)
    broken = torch.zeros(64, dtype=torch.bool)
    broken[[3, 40]] = True
    assert torch.equal((~torch.isfinite(out)).any(-1), broken)
    torch.testing.assert_close(out[~broken], expected[~broken], rtol=0, atol=0)
    (grad,) = torch.autograd.grad(out, bad, psi)
    assert torch.isfinite(grad).all()  # of a linear map: it does not see the token


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, -1])
def test_nan_of_any_payload_spoils_its_token(model, backend, bits):
    """In a dense product too, though the upper half of the bits may round to those of another number."""
    edges, weights, psi = model
    bad = psi.clone()
    torch.view_as_real(bad)[3, 5, 0] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    out = torch.view_as_real(cayley_step(bad, edges, weights, 1.0, method="dense"))
    assert torch.isnan(out[3, :, 0]).all() and torch.isfinite(out[:3]).all() and torch.isfinite(out[4:]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["auto", *METHODS])
def test_bad_weight_spoils_all_tokens(model, backend, method, value):
    edges, weights, psi = model
    out = cayley_step(psi, edges, weights.index_fill(0, torch.tensor([7]), value), 0.1, method=method)
    assert torch.isnan(out).any(-1).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e3, 1e6])
def test_any_size_of_weights_is_unitary(model, backend, scale):
    edges, weights, psi = model
    out = cayley_step(psi, edges, weights * scale, 0.1)
    assert (norms(out) / norms(psi) - 1).abs().max() < 1e-6
    if scale == 1e-30:
        torch.testing.assert_close(out, psi)


def test_one_token_that_plain_cocg_divides_by_zero_for(backend):
    """psi^T psi = 0: without a conjugate (1, i) is orthogonal to itself."""
    edges = torch.tensor([[0, 1], [1, 2]])
    psi = torch.tensor([[1.0, 1j, 0.0]], dtype=torch.complex128)
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    solved = cayley_step(psi, edges, weights, 0.7, method="cocg")
    torch.testing.assert_close(solved, spine.reference(psi, edges, weights, 0.7))


def test_gradient_of_tokens_alone(model, backend):
    """No weight and no step asks for a gradient: the same one for the tokens, and nothing else is kept."""
    edges, weights, psi = model
    psi = psi.clone().requires_grad_()
    out = cayley_step(psi, edges, weights, 0.1)
    assert all(saved is None or saved.numel() < psi.numel() for saved in out._base.grad_fn.saved_tensors)
    (alone,) = torch.autograd.grad(out, psi, out.detach())
    out = cayley_step(psi, edges, weights.clone().requires_grad_(), 0.1)
    (together,) = torch.autograd.grad(out, psi, out.detach())
    torch.testing.assert_close(alone, together, rtol=0, atol=0)
    # U^H U = 1
    torch.testing.assert_close(alone, psi.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif("native" not in BACKENDS, reason="no native kernels here")
@pytest.mark.parametrize("dt", [0.02, 1.0])
def test_same_bits_for_any_number_of_threads(model, dt):
    edges, weights, _ = model
    psi = tokens(torch.Generator().manual_seed(2), 3001, 256).to(torch.complex64)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = [psi.clone().requires_grad_(), weights.clone().requires_grad_(), torch.tensor(dt).requires_grad_()]
            out = cayley_step(leaves[0], edges, *leaves[1:], method="chebyshev" if dt < 0.1 else "dense")
            results.append([out, *torch.autograd.grad(out, leaves, psi.flip(0))])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_many_tokens_sum_exactly(backend, method):
    """Edge sums over more tokens than a kernel adds in float32, against float64."""
    g = torch.Generator().manual_seed(5)
    edges = graph(g, 9, 5)
    weights = (0.1 + torch.rand(edges.shape[1], generator=g)).requires_grad_()
    psi, grad = (tokens(g, 5000, 9).to(torch.complex64) for _ in range(2))
    (ours,) = torch.autograd.grad(cayley_step(psi, edges, weights, 0.3, method=method), weights, grad)
    wide = weights.detach().double().requires_grad_()
    exact = spine.reference(psi.to(torch.complex128), edges, wide, 0.3)
    (exact,) = torch.autograd.grad(exact, wide, grad.to(torch.complex128))
    assert (ours - exact).abs().max() < 16 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_learned_step_keeps_its_dtype(model):
    edges, weights, psi = model
    dt = torch.tensor(0.1, dtype=torch.bfloat16, requires_grad=True)
    (grad,) = torch.autograd.grad(cayley_step(psi, edges, weights, dt).real.sum(), dt)
    assert grad.dtype == torch.bfloat16 and torch.isfinite(grad)
