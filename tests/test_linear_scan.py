"""What `linear_scan` promises beyond the suite: bits, saturation, extremes, isolation, memory."""

from __future__ import annotations

import pytest
import torch

import stablekern
from specs.linear_scan import inputs
from stablekern.ops.linear_scan import linear_scan, reference

BACKENDS = [b for b, reason in stablekern.available_backends("linear_scan").items() if reason is None and b != "triton"]
# Rows and lengths that go in groups of rows, with a rest that is looped or composed, and all composed.
SHAPES = {"groups": (2, 37, 70), "rest": (1, 65, 1300), "few": (1, 3, 2600)}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with stablekern.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[*BACKENDS, "triton"])
def backend_or_interpreter(request):
    """For tests of a few steps: the interpreter is slow."""
    with stablekern.use_backend(request.param):
        yield request.param


def case(*sizes: int, dtype=torch.float32):
    args, state = inputs(torch.Generator().manual_seed(3), *sizes, complex=dtype.is_complex)
    return [a.to(dtype) for a in args], state.to(dtype)


def with_gradients(function, gate, token, state, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (gate, token, state)]
    states = function(leaves[0], leaves[1], initial_state=leaves[2], **options)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return [states.detach(), *torch.autograd.grad(states, leaves, weight.to(states.dtype))]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_same_bits_for_any_number_of_threads(shape, clamp, dtype):
    (gate, token), state = case(*shape, dtype=dtype)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(linear_scan, gate, token, state, state_clamp=clamp))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.5, 30.0])
def test_saturates_where_the_loop_does(backend, shape, reverse, scale):
    """Outside the bounds and on them at the same steps, from rare to almost always, also for gates above 1 and below 0.

    The exception of 4 ulp next to a bound is not met by these inputs: a float64 loop saturates at the same places.
    """
    (gate, token), state = case(*shape)
    gate, token = gate * 1.3, token * scale
    bounds = (-0.75, 2.0)
    ours = linear_scan(gate, token, initial_state=state, state_clamp=bounds, reverse=reverse)
    exact = reference(gate.double(), token.double(), initial_state=state.double(), state_clamp=bounds, reverse=reverse)
    for bound in bounds:
        assert torch.equal(ours == bound, exact == bound)
        assert (ours == bound).any()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_reverse_is_the_scan_of_flipped_inputs(backend, shape, dtype):
    (gate, token), state = case(*shape, dtype=dtype)
    for clamp in (None, 0.8):
        ours = linear_scan(gate, token, initial_state=state, state_clamp=clamp, reverse=True)
        flipped = linear_scan(gate.flip(-1), token.flip(-1), initial_state=state, state_clamp=clamp).flip(-1)
        torch.testing.assert_close(ours, flipped, rtol=1e-5, atol=1e-5 * float(flipped.abs().max()))


@pytest.mark.parametrize("shape", [(3, 10, 67), (1, 2, 1500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_bidirectional_is_a_scan_forward_beside_one_in_reverse(backend, shape, dtype):
    (gate, token), state = case(*shape, dtype=dtype)
    half, bounds = shape[1] // 2, torch.linspace(0.5, 1.0, shape[1])
    both = linear_scan(gate, token, initial_state=state, state_clamp=bounds, bidirectional=True, return_saturation=True)
    parts = [
        linear_scan(
            *(M[:, channels] for M in (gate, token)),
            initial_state=state[:, channels],
            state_clamp=bounds[channels],
            reverse=reverse,
            return_saturation=True,
        )
        for channels, reverse in ((slice(0, half), False), (slice(half, None), True))
    ]
    for ours, *apart in zip(both, *parts, strict=True):
        torch.testing.assert_close(ours, torch.cat(apart, 1))


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("cut", [1, 15, 16, 1100])
def test_a_sequence_may_be_cut_anywhere(backend, cut, clamp):
    """The last state is the last element: it carries over, and so does its gradient."""
    (gate, token), state = case(1, 19, 1300, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (gate, token, state)]
    whole = linear_scan(gate, token, initial_state=state, state_clamp=clamp)
    head = linear_scan(gate[..., :cut], token[..., :cut], initial_state=state, state_clamp=clamp)
    tail = linear_scan(gate[..., cut:], token[..., cut:], initial_state=head[..., -1], state_clamp=clamp)
    both = torch.cat((head, tail), -1)
    torch.testing.assert_close(both, whole)
    ours, theirs = (torch.autograd.grad(x.square().sum(), leaves) for x in (both, whole))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(2, 20, 50), (1, 2, 2600)])
@pytest.mark.parametrize("clamp", [None, 1.0, (0.0, torch.inf)])
def test_huge_inputs_never_make_nan(backend, shape, clamp):
    """Gates up to 1e4, tokens up to 1e30: inf exactly where a state leaves the range of float32, NaN nowhere."""
    g = torch.Generator().manual_seed(8)
    gate = torch.randn(shape, generator=g).sign() * 10.0 ** (-4 + 8 * torch.rand(shape, generator=g))
    token = torch.randn(shape, generator=g).sign() * 10.0 ** (-30 + 60 * torch.rand(shape, generator=g))
    ours = linear_scan(gate, token, state_clamp=clamp)
    # Each step from our own state before it: once a state has overflowed, the exact one says nothing about the others.
    before = torch.nn.functional.pad(ours, (1, 0))[..., :-1].double()
    exact = gate.double() * before + token.double()
    if clamp is not None:
        exact = exact.clamp(-1.0, 1.0) if clamp == 1.0 else exact.clamp(*clamp)
    assert not torch.isnan(ours).any()
    representable = exact.float()
    assert torch.equal(torch.isinf(ours), torch.isinf(representable))
    finite = torch.isfinite(representable)
    torch.testing.assert_close(ours[finite], representable[finite], rtol=1e-4, atol=0)


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("shape", [(2, 20, 50), (1, 2, 2600)])
def test_a_nan_stays_in_its_row_and_its_future(backend, shape, clamp, dtype):
    (gate, token), state = case(*shape, dtype=dtype)
    clean = with_gradients(linear_scan, gate, token, state, state_clamp=clamp)
    token[0, 1, 30] = float("nan")
    spoilt = with_gradients(linear_scan, gate, token, state, state_clamp=clamp)
    assert torch.isnan(spoilt[0][0, 1, 30:]).all() and torch.isfinite(spoilt[0][0, 1, :30]).all()
    others = torch.ones(shape[:2], dtype=torch.bool)
    others[0, 1] = False
    for a, b in zip(spoilt, clean, strict=True):
        torch.testing.assert_close(a[others], b[others], rtol=0, atol=0)


def test_the_gradient_at_a_bound_is_that_of_clamp(backend_or_interpreter):
    """0 outside, 1 on the bound itself, 1 inside."""
    zero = torch.zeros(1, 3, 1)
    token = torch.tensor([[[2.0], [1.0], [0.5]]], requires_grad=True)
    (grad,) = torch.autograd.grad(linear_scan(zero, token, state_clamp=1.0).sum(), token)
    torch.testing.assert_close(grad.flatten(), torch.tensor([0.0, 1.0, 1.0]), rtol=0, atol=0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 37, 83), (1, 1, 2100)], ids=["rows", "one-row"])
@pytest.mark.parametrize("clamp", [1.0, (-0.5, 1.5), (0.0, torch.inf)])
def test_states_that_are_on_a_bound_by_themselves_pass_the_gradient(backend_or_interpreter, clamp, shape, reverse):
    """Beside others that the clamp brought there, in the same row; and rows without any of the former."""
    g = torch.Generator().manual_seed(6)
    gate = torch.randint(0, 3, shape, generator=g) / 2
    token = torch.randint(-4, 5, shape, generator=g) / 2
    token[:, 5::6] += 0.0137  # never on a bound, nor at the next steps
    gate[:, 5::6] *= 0.99
    gate[:, 4:5], token[:, 4:5] = 0, 0  # where 0 is a bound, on it at every step, and never beyond
    state = torch.randint(-1, 2, shape[:2], generator=g).float()
    results = with_gradients(linear_scan, gate, token, state, state_clamp=clamp, reverse=reverse)
    exact = with_gradients(reference, gate.double(), token.double(), state.double(), state_clamp=clamp, reverse=reverse)
    lower, upper = clamp if isinstance(clamp, tuple) else (-clamp, clamp)
    before = (
        torch.cat((results[0][..., 1:], state[..., None]), -1)
        if reverse
        else torch.cat((state[..., None], results[0][..., :-1]), -1)
    )
    free = gate * before + token
    bounds = [bound for bound in (lower, upper) if bound < torch.inf]
    assert all(0.02 < (free[:, :5] == bound).float().mean() < 0.3 for bound in bounds)
    for ours, theirs in zip(results, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_clamped_complex_state_keeps_its_direction_and_its_tangent(backend_or_interpreter):
    """3 + 4i at the radius 1: 0.6 + 0.8i; of a gradient, the fifth of its part along the circle is left."""
    token = torch.tensor([[[3 + 4j]]], requires_grad=True)
    states = linear_scan(torch.zeros(1, 1, 1, dtype=token.dtype), token, state_clamp=1.0)
    torch.testing.assert_close(states.detach(), torch.tensor([[[0.6 + 0.8j]]]))
    (along,) = torch.autograd.grad(states, token, torch.tensor([[[0.6 + 0.8j]]]), retain_graph=True)
    (across,) = torch.autograd.grad(states, token, torch.tensor([[[-0.8 + 0.6j]]]))
    torch.testing.assert_close(along, torch.tensor([[[0j]]]))
    torch.testing.assert_close(across, torch.tensor([[[-0.16 + 0.12j]]]))


@pytest.mark.parametrize("radius", [0.0, 1e-30, 3e29, torch.inf])
def test_radii_of_any_size(backend_or_interpreter, radius):
    (gate, token), state = case(1, 9, 20, dtype=torch.complex64)
    token = token * 10.0 ** torch.linspace(-30, 30, 20)
    results = with_gradients(linear_scan, gate, token, state, state_clamp=radius)
    assert all(torch.isfinite(torch.view_as_real(x)).all() for x in results)
    states = results[0].to(torch.complex128)
    before = torch.cat((state[..., None], results[0][..., :-1]), -1).to(torch.complex128)
    free = gate.to(torch.complex128) * before + token.to(torch.complex128)
    eps = torch.finfo(torch.float32).eps
    assert states.abs().max() <= radius * (1 + 4 * eps)
    # Even where the moduli are too far apart for their ratio, a longer state keeps its direction and gets the bound.
    long = free.abs() > radius * (1 + 4 * eps)
    assert long.any() == (radius < torch.inf)
    bounded = free[long] / free[long].abs() * radius
    assert ((states[long] - bounded).abs() <= 8 * eps * radius).all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_float32(backend, half):
    (gate, token), state = case(2, 5, 40, dtype=half)
    wide = linear_scan(gate.float(), token.float(), initial_state=state.float(), state_clamp=1.5)
    ours = linear_scan(gate, token, initial_state=state, state_clamp=1.5)
    torch.testing.assert_close(ours, wide.to(half), rtol=0, atol=0)
    torch.testing.assert_close(linear_scan(gate, token, initial_state=state.float(), state_clamp=1.5), ours)


def test_tokens_are_kept_only_for_a_clamp(backend):
    (gate, token), _ = case(1, 2, 5)
    gate.requires_grad_()
    assert linear_scan(gate, token).grad_fn.saved_tensors[1] is None
    assert linear_scan(gate, token, state_clamp=1.0).grad_fn.saved_tensors[1] is not None


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_saturation_is_the_share_of_states_that_the_clamp_changed(backend_or_interpreter, dtype, reverse):
    (gate, token), state = case(2, 5, 37, dtype=dtype)
    bounds = {"initial_state": state, "state_clamp": torch.linspace(0.5, 2.0, 5), "reverse": reverse}
    states, share = linear_scan(gate, token, **bounds, return_saturation=True)
    torch.testing.assert_close(states, linear_scan(gate, token, **bounds), rtol=0, atol=0)
    changed = 0
    for t in reversed(range(37)) if reverse else range(37):
        free = gate[..., t] * state + token[..., t]
        over = free.abs() > bounds["state_clamp"]
        state, changed = torch.where(over, bounds["state_clamp"] * torch.sgn(free), free), changed + over
    assert 0 < share.min() < share.max() < 1
    torch.testing.assert_close(share, changed / 37)
    with pytest.raises(ValueError, match=r"stablekern.linear_scan: `return_saturation` needs a `state_clamp`"):
        linear_scan(gate, token, return_saturation=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_saturation_is_counted_wherever_a_row_goes(shape, dtype):
    """In groups of rows, by itself, in composed stretches: as a loop counts, but for states next to the bound."""
    (gate, token), state = case(*shape, dtype=dtype)
    named = {"initial_state": state, "state_clamp": 1.0, "return_saturation": True, "bidirectional": shape[1] % 2 == 0}
    _, share = linear_scan(gate, token, **named)
    with stablekern.use_backend("torch"):
        _, exact = linear_scan(gate, token, **named)
    assert 0.05 < exact.mean() < 0.95
    assert ((share - exact).abs() * shape[2] <= 1e-4 * shape[2] + 1e-3).all()


def test_saturation_of_all_and_of_nothing(backend_or_interpreter):
    """Bounds that no state may pass, or any; NaN is not changed; no steps, no share."""
    (gate, token), _ = case(2, 3, 20)
    shares = [linear_scan(gate, token, state_clamp=c, return_saturation=True)[1] for c in (0.0, torch.inf)]
    assert (shares[0] == 1).all() and (shares[1] == 0).all()
    token[0, :, 5:] = torch.nan
    share = linear_scan(gate, token, state_clamp=0.0, return_saturation=True)[1]
    torch.testing.assert_close(share, torch.tensor([0.25, 1.0])[:, None].expand(2, 3))
    empty = linear_scan(gate[..., :0], token[..., :0], state_clamp=1.0, return_saturation=True)[1]
    torch.testing.assert_close(empty, torch.zeros(2, 3), rtol=0, atol=0)
