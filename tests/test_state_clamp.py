"""The clamp of real states wherever a kernel may leave it out, or do it by modulus: never seen in a result.

A kernel looks at a few steps at once, so each case has states that are far from their bounds, near them and beyond
them, in the same call, and is compared with the loop in float64, value by value and gradient by gradient.
"""

from __future__ import annotations

import pytest
import torch

import stablekern
from stablekern.ops import selective_scan as selective
from stablekern.ops import ssd_scan as ssd

SYMMETRIC, LOPSIDED = 0.5, (-0.3, 0.6)
CLAMPS = [SYMMETRIC, LOPSIDED, (-0.6, 0.3), 0.05, 20.0, (0.0, 0.5), (-0.5, torch.inf)]
LENGTH, CHANNELS, STATES = 83, 37, 11  # no multiple of a block of steps, of lanes or of a tile


def selective_inputs(dtype: torch.dtype, gate: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    # Sizes differ from channel to channel, and a few quiet vectors of channels lie beside loud ones.
    sizes = torch.tensor([0.1, 1.0, 30.0], dtype=dtype)[torch.arange(CHANNELS) % 3]
    sizes[:8] *= 1e-3
    u = normal(2, CHANNELS, LENGTH) * sizes[:, None]
    u[..., 20:40] *= 1e-3  # quiet in between
    delta = 0.01 + 0.2 * torch.rand(2, CHANNELS, LENGTH, generator=g, dtype=dtype)
    A = -torch.rand(CHANNELS, STATES, generator=g, dtype=dtype) * 5
    B, C = normal(2, STATES, LENGTH), normal(2, STATES, LENGTH)
    optional = {"D": normal(CHANNELS), "initial_state": normal(2, CHANNELS, STATES) * 0.4}
    return [u, delta, A, B, C], optional | ({"z": normal(2, CHANNELS, LENGTH)} if gate else {})


def ssd_inputs(dtype: torch.dtype, gate: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(12)
    heads, width = 5, 9  # of 45 lanes the last vector has 13

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=dtype)

    x = normal(2, LENGTH, heads, width) * torch.tensor([0.1, 1.0, 30.0, 0.1, 1.0], dtype=dtype)[:, None]
    x[:, 20:40] *= 1e-3
    dt = 0.01 + 0.2 * torch.rand(2, LENGTH, heads, generator=g, dtype=dtype)
    A = -torch.rand(heads, generator=g, dtype=dtype) * 5
    B, C = normal(2, LENGTH, 1, STATES), normal(2, LENGTH, 1, STATES)
    optional = {"D": normal(heads), "initial_state": normal(2, heads, width, STATES) * 0.4}
    return [x, dt, A, B, C], optional | ({"z": normal(2, LENGTH, heads, width)} if gate else {})


SCANS = {
    "selective_scan": (selective.selective_scan, selective.reference, selective_inputs),
    "ssd_scan": (ssd.ssd_scan, ssd.reference, ssd_inputs),
}


@pytest.fixture(params=["native", "torch"])
def backend(request):
    if stablekern.available_backends("ssd_scan").get(request.param, "no such backend") is not None:
        pytest.skip(f"{request.param} cannot run here")
    with stablekern.use_backend(request.param):
        yield request.param


def results(function, args, optional, **settings) -> list[torch.Tensor]:
    """Output, last state and all gradients."""
    leaves = [t.clone().requires_grad_() for t in args]
    extra = {name: t.clone().requires_grad_() for name, t in optional.items()}
    y, last = function(*leaves, **extra, **settings, return_last_state=True)
    cotangents = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in (y, last)]
    gradients = torch.autograd.grad((y, last), [*leaves, *extra.values()], cotangents)
    return [y.detach(), last.detach(), *gradients]


def assert_is_the_loop(name: str, args, optional, **settings) -> None:
    """In float64, where rounding puts no state on the other side of a bound: a wrong clamp is off by far more."""
    function, reference, _ = SCANS[name]
    exact, ours = (results(f, args, optional, **settings) for f in (reference, function))
    for k, (mine, truth) in enumerate(zip(ours, exact, strict=True)):
        assert (mine - truth).abs().amax() <= 1e-11 * truth.abs().amax(), k


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("name", SCANS)
def test_quiet_and_saturated_steps_side_by_side(backend, name, clamp, gate):
    args, optional = SCANS[name][2](torch.float64, gate)
    assert_is_the_loop(name, args, optional, state_clamp=clamp)


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("token, entering", [(1.0, 1.0), (1e-25, 1e25), (1e25, 1e-25), (1e-23, 1e18), (1e18, 1e-23)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCANS)
def test_bits_do_not_depend_on_what_the_neighbours_need(backend, name, dtype, token, entering, clamp):
    """With NaN in one lane of each vector its neighbours get the full clamp; without, often less: the same bits.

    Far from the size 1 float32 loses the squares of the tokens to 0 and those of B to infinity, or the other way round,
    or only those that go to 0.
    """
    args, optional = SCANS[name][2](dtype, False)
    size = token * entering
    args[0] *= token
    args[3] *= entering
    optional["initial_state"] *= size
    clamp = tuple(size * bound for bound in clamp) if isinstance(clamp, tuple) else size * clamp
    poisoned = optional | {"initial_state": optional["initial_state"].clone()}
    lanes = poisoned["initial_state"].flatten(1, -2)
    sick = torch.arange(lanes.shape[1]) % 4 == 0
    lanes[:, sick] = torch.nan
    function = SCANS[name][0]
    plain, mixed = (results(function, args, optional, state_clamp=clamp) for optional in (optional, poisoned))
    # Output, last state, and the gradients of the tokens and of the initial state, per channel.
    for k in (0, 1, 2, -1):
        of_channels = [t[k].flatten(2) if name == "ssd_scan" and k in (0, 2) else t[k] for t in (plain, mixed)]
        if name == "ssd_scan":
            of_channels = [t.mT if k in (0, 2) else t.flatten(1, 2) for t in of_channels]
        assert torch.equal(of_channels[0][:, ~sick], of_channels[1][:, ~sick]), k


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("name", SCANS)
def test_a_decay_that_is_nan_at_one_step_is_not_clamped_away(backend, name, clamp):
    """A rate of -inf and a step of 0, between steps of which the decay is 0, and beside tokens that are all finite."""
    function, reference, inputs = SCANS[name]
    args, optional = inputs(torch.float64, False)
    args[2][3] = -torch.inf
    args[1].select(1 if name == "ssd_scan" else 2, 7).zero_()  # of (b, l, h) or (b, d, l)
    ours, exact = (f(*args, **optional, state_clamp=clamp).isnan() for f in (function, reference))
    assert exact.any() and torch.equal(ours, exact)


@pytest.mark.parametrize("name", SCANS)
def test_states_that_grow_reach_a_bound_that_their_tokens_do_not(backend, name):
    args, optional = SCANS[name][2](torch.float64, False)
    args[0] *= 1e-3
    args[2] = args[2].abs()  # rates > 0
    optional["initial_state"] *= 0.1
    assert_is_the_loop(name, args, optional, state_clamp=0.5)


@pytest.mark.parametrize("clamp", [SYMMETRIC, LOPSIDED, 20.0, 1e30])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["token", "rate", "initial state", "entering"])
@pytest.mark.parametrize("name", SCANS)
def test_bad_numbers_do_what_they_do_to_a_loop(backend, name, where, bad, clamp):
    """NaN stays from its step on, infinity meets the bound, and no other channel notices."""
    function, reference, inputs = SCANS[name]
    args, optional = inputs(torch.float64, False)
    step = 25  # in the midst of a block of steps
    if where == "token":
        (args[0][1, 4] if name == "selective_scan" else args[0][1, :, 2, 4])[step] = bad
    elif where == "rate":
        args[2][3] = bad if bad < 0 or bad != bad else 700.0  # e^(step A) overflows
    elif where == "initial state":
        optional["initial_state"][0, 1, 2] = bad
    else:
        (args[3][1, 5] if name == "selective_scan" else args[3][1, :, 0, 5])[step] = bad
    expected, ours = (f(*args, **optional, state_clamp=clamp, return_last_state=True) for f in (reference, function))
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        torch.testing.assert_close(mine, theirs, equal_nan=True, rtol=1e-9, atol=1e-9)
