"""What `ssd_scan` promises beyond the suite: bits, boundaries, isolation, the exponential, what is kept."""

from __future__ import annotations

import pytest
import torch

import stablekern
from specs.ssd_scan import inputs
from stablekern.ops.ssd_scan import _CHUNK, _fwd, reference, ssd_scan

BACKENDS = [b for b, reason in stablekern.available_backends("ssd_scan").items() if reason is None and b != "triton"]


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
    args, optional = inputs(torch.Generator().manual_seed(3), *sizes)
    optional = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in optional.items()}
    return [a.to(dtype) for a in args], optional


def with_gradients(args, optional):
    leaves = [t.clone().requires_grad_() for t in args]
    extra = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in optional.items()}
    y, last = ssd_scan(*leaves, **extra)
    (y.square().sum() + last.sum()).backward()
    leaves += [v for v in extra.values() if isinstance(v, torch.Tensor)]
    return [y.detach(), last.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("sizes", [(3, 40, 4, 8, 1, 16), (1, 70, 12, 16, 2, 5)], ids=["items", "slabs"])
@pytest.mark.parametrize("clamp", [None, 0.5])
def test_same_bits_for_any_number_of_threads(backend, sizes, clamp):
    args, optional = case(*sizes)
    optional["state_clamp"] = clamp
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(with_gradients(args, optional))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_reverse_is_the_scan_of_flipped_inputs(backend, clamp):
    """The same bits; the gradients of parameters, sums over time, but for their rounding."""
    (x, dt, A, B, C), optional = case(2, 70, 4, 8, 2, 16)
    optional["state_clamp"] = clamp
    ours = with_gradients((x, dt, A, B, C), optional | {"reverse": True})
    flipped = [t.flip(1) for t in (x, dt)] + [A] + [t.flip(1) for t in (B, C)]
    theirs = with_gradients(flipped, optional | {"z": optional["z"].flip(1)})
    in_time = (0, 2, 3, 5, 6, 8)  # y, and the gradients of x, dt, B, C and z
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if index in in_time:
            torch.testing.assert_close(a, b.flip(1), rtol=0, atol=0)
        else:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("clamp", [None, 0.5])
def test_both_directions_in_one_call_are_two_calls(backend, clamp):
    """One call on twice the heads: the bits of a scan of the first half and a reverse one of the second; the gradients
    of parameters, sums over time, but for their rounding."""
    args, optional = case(2, 70, 8, 8, 2, 16)
    optional |= {"dt_softplus": True, "state_clamp": clamp}
    both = with_gradients(args, optional | {"bidirectional": True})
    axes = {"x": 2, "dt": 2, "A": 0, "B": 2, "C": 2, "D": 0, "z": 2, "dt_bias": 0, "initial_state": 1}
    result_axes = [2, 1, *axes.values()]
    for half in (0, 1):
        parts = [t.chunk(2, axis)[half] for t, axis in zip(args, axes.values(), strict=False)]
        own = {k: v.chunk(2, axes[k])[half] if k in axes else v for k, v in optional.items()}
        alone = with_gradients(parts, own | {"reverse": bool(half)})
        for a, b, axis in zip(both, alone, result_axes, strict=True):
            exactly = {} if b.dim() == 1 else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(a.chunk(2, axis)[half], b, **exactly)


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("cut", [1, 31, 32, 50])
def test_a_sequence_may_be_cut_anywhere(backend, cut, clamp):
    """The last state carries over: the same bits, and the same gradients, as in one piece."""
    args, optional = case(2, 70, 4, 8, 2, 16, dtype=torch.float64)
    x, dt, A, B, C = (t.requires_grad_() for t in args)
    D, h0 = optional["D"], optional["initial_state"].requires_grad_()
    whole, last = ssd_scan(x, dt, A, B, C, D=D, initial_state=h0, state_clamp=clamp, return_last_state=True)
    parts, state = [], h0
    for piece in (slice(0, cut), slice(cut, 70)):
        y, state = ssd_scan(
            x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece],
            D=D, initial_state=state, state_clamp=clamp, return_last_state=True,
        )  # fmt: skip
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=0)
    torch.testing.assert_close(state, last, rtol=0, atol=0)
    ours = torch.autograd.grad(torch.cat(parts, 1).square().sum() + state.sum(), (x, dt, A, B, C, h0))
    for a, b in zip(ours, torch.autograd.grad(whole.square().sum() + last.sum(), (x, dt, A, B, C, h0)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_item_stays_alone(backend, value):
    args, optional = case(3, 40, 3, 5, 1, 7)
    clean = with_gradients(args, optional)
    args[0][1, 17, 2, 3] = value
    spoilt = with_gradients(args, optional)
    assert not torch.isfinite(spoilt[0][1, 17:, 2, 3]).any()
    assert torch.isfinite(spoilt[0][1, :17]).all(), "an earlier step cannot see it"
    assert torch.isfinite(spoilt[0][1, :, :2]).all(), "nor can another head"
    per_item = (0, 1, 2, 3, 5, 6)  # y, last state, and the gradients of x, dt, B, C
    for index in per_item:
        torch.testing.assert_close(spoilt[index][[0, 2]], clean[index][[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("states", [2, 3])
@pytest.mark.parametrize("infinite", [0, 3], ids=["x", "B"])
def test_nothing_leaks_out_of_unused_lanes(backend_or_interpreter, infinite, states):
    """Infinite inputs make lanes beyond the last channel, or state, 0 * inf; no output may see that."""
    args, optional = case(2, 5, 1, 3, 1, states)
    args[0].abs_(), args[3].abs_(), args[4].abs_()
    args[infinite][:] = float("inf")
    y, last = ssd_scan(*args, return_last_state=True)
    assert torch.isinf(y).all() and torch.isinf(last).all()


@pytest.mark.parametrize("clamp", [None, (-1e30, torch.inf)])
@pytest.mark.parametrize(("width", "states"), [(3, 2), (4, 3)])
@pytest.mark.parametrize("infinite", ["B", "C"])
def test_nothing_leaks_into_gradients(backend_or_interpreter, infinite, width, states, clamp):
    """An infinite number in a step, all others positive: gradients are infinite or finite, and nowhere 0 * inf."""
    args, optional = case(2, 7, 3, width, 1, states)
    x, dt, A, B, C = args
    for tensor in (x, dt, B, C, start := optional["initial_state"]):
        tensor.abs_()
    (B if infinite == "B" else C)[:, 4] = float("inf")
    leaves = {"x": x, "dt": dt, "B": B, "C": C, "initial_state": start}
    leaves = {name: tensor.requires_grad_() for name, tensor in leaves.items()}
    y = ssd_scan(**leaves, A=A, state_clamp=clamp)
    grads = dict(zip(leaves, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True))
    after = torch.arange(7) >= 4
    if infinite == "B":
        assert torch.isfinite(grads["B"]).all() and torch.isfinite(grads["initial_state"]).all()
        assert torch.isposinf(grads["C"][:, after]).all() and torch.isfinite(grads["C"][:, ~after]).all()
    else:
        assert torch.isfinite(grads["C"]).all() and torch.isposinf(grads["initial_state"]).all()
        later = torch.arange(7) > 4
        assert torch.isposinf(grads["B"][:, ~later]).all() and torch.isfinite(grads["B"][:, later]).all()
        assert torch.isposinf(grads["x"][:, ~later]).all() and torch.isfinite(grads["x"][:, later]).all()


def test_clamped_states_stay_inside_and_a_wide_clamp_changes_nothing(backend):
    args, _ = case(2, 60, 3, 6, 1, 9)
    _, last = ssd_scan(*args, state_clamp=(-0.25, 0.125), return_last_state=True)
    assert last.min() == -0.25 and last.max() == 0.125
    free, wide = ssd_scan(*args), ssd_scan(*args, state_clamp=1e30)
    torch.testing.assert_close(free, wide, rtol=0, atol=0)


@pytest.mark.parametrize("clamp", [None, 1e30])
def test_nan_passes_the_clamp(backend_or_interpreter, clamp):
    args, _ = case(1, 4, 1, 2, 1, 2)
    args[0][0, 1, 0, 0] = float("nan")
    y = ssd_scan(*args, state_clamp=clamp)
    assert torch.isnan(y[0, 1:, 0, 0]).all() and torch.isfinite(y[0, :, 0, 1]).all()


def test_a_saturated_step_forgets_its_past(backend_or_interpreter):
    """The gradient of a clamped state is that of `torch.clamp`: 0 outside, 1 on the bound itself."""
    zero, one = torch.zeros(3, 1, 1, 1), torch.ones(3, 1, 1, 1)
    h0 = torch.tensor([[[[2.0]]], [[[1.0]]], [[[0.5]]]], requires_grad=True)
    _, last = ssd_scan(
        zero, zero[..., 0], -torch.ones(1), one, zero, initial_state=h0, state_clamp=1.0, return_last_state=True
    )
    (grad,) = torch.autograd.grad(last.sum(), h0)
    torch.testing.assert_close(last.flatten(), torch.tensor([1.0, 1.0, 0.5]), rtol=0, atol=0)
    torch.testing.assert_close(grad.flatten(), torch.tensor([0.0, 1.0, 1.0]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*does not decay", "ignore:overflow encountered")  # ours, and the interpreter's
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_growth_is_an_exponential_to_two_ulp(backend_or_interpreter, dtype):
    """As below, up to where the numbers end; beyond, inf."""
    largest = 88.7 if dtype == torch.float32 else 709.7
    A = torch.cat([torch.linspace(0, largest, 2001), torch.tensor([largest + 0.1, 1e4, torch.inf])]).to(dtype)
    x, nothing = torch.zeros(1, 1, A.numel(), 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype)
    start = torch.ones(1, A.numel(), 1, 1, dtype=dtype)
    _, last = ssd_scan(x, start[..., 0].mT, A, nothing, nothing, initial_state=start, return_last_state=True)
    exact = torch.exp(A.double())[:-3]
    spacing = (torch.nextafter(exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)) - exact.to(dtype)).double()
    assert ((last.flatten()[:-3].double() - exact).abs() <= 2 * spacing).all()
    assert torch.isposinf(last.flatten()[-3:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_decay_is_an_exponential_to_two_ulp(backend_or_interpreter, dtype):
    """With nothing coming in, one step turns a state of 1 into exp(dt A): a sweep of `exp` through underflow to 0."""
    smallest = -110.0 if dtype == torch.float32 else -750.0
    A = torch.cat([torch.linspace(smallest, -torch.finfo(dtype).eps, 4001), torch.tensor([-1e4, -torch.inf])]).to(dtype)
    heads = A.numel()
    x, nothing = torch.zeros(1, 1, heads, 1, dtype=dtype), torch.zeros(1, 1, 1, 1, dtype=dtype)
    start = torch.ones(1, heads, 1, 1, dtype=dtype)
    _, last = ssd_scan(x, start[..., 0].mT, A, nothing, nothing, initial_state=start, return_last_state=True)
    exact = torch.exp(A.double())
    spacing = (torch.nextafter(exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)) - exact.to(dtype)).double()
    assert ((last.flatten().double() - exact).abs() <= 2 * spacing).all()
    assert (last.flatten()[-2:] == 0).all()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_float32(backend, half):
    args, optional = case(2, 40, 4, 8, 1, 16, dtype=half)
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in optional.items()}
    y, last = ssd_scan(*args, **optional)
    wide_y, wide_last = ssd_scan(*(t.float() for t in args), **wide)
    assert y.dtype == half and last.dtype == torch.float32
    torch.testing.assert_close(y, wide_y.to(half), rtol=0, atol=0)
    torch.testing.assert_close(last, wide_last, rtol=0, atol=0)
    mixed = {k: v if k == "z" else wide[k] for k, v in optional.items()}  # float32 parameters, half activations
    torch.testing.assert_close(ssd_scan(args[0], args[1], args[2].float(), *args[3:], **mixed)[0], y, rtol=0, atol=0)


def test_growing_states_warn_and_overflow_to_inf(backend):
    args, _ = case(1, 90, 2, 3, 1, 2)
    args[1].fill_(1.0)
    args[2][0] = 2.0
    with pytest.warns(RuntimeWarning, match=r"stablekern.ssd_scan: `A` >= 0 does not decay: .*: got 2"):
        y, last = ssd_scan(*args, return_last_state=True)
    assert torch.isinf(last[0, 0]).all() and torch.isfinite(y[0, :, 1]).all()
    assert torch.isfinite(ssd_scan(*args, state_clamp=10.0)).all(), "a clamp bounds it, and nothing is said"


def test_only_what_is_asked_for_gets_a_gradient_and_is_kept(backend):
    args, optional = case(2, 70, 2, 3, 1, 4)
    args[2].requires_grad_()
    y, _ = ssd_scan(*args, **optional)
    y.sum().backward()
    assert args[2].grad is not None and all(args[i].grad is None for i in (0, 1, 3, 4))
    args = [a.detach() for a in args]
    kept = [_fwd(*args, *(None,) * 6, 0, False, 0.0, torch.inf, chunk, False)[2] for chunk in (_CHUNK, 70)]
    assert [tuple(states.shape) for states in kept] == [(2, 3, 4, 2, 3), (2, 1, 4, 2, 3)], "one every _CHUNK steps"


def test_last_state_alone_can_be_differentiated(backend):
    args, _ = case(2, 40, 2, 3, 1, 4, dtype=torch.float64)
    for t in args:
        t.requires_grad_()
    ours = torch.autograd.grad(ssd_scan(*args, return_last_state=True)[1].square().sum(), args[:4])
    exact = torch.autograd.grad(reference(*args, return_last_state=True)[1].square().sum(), args[:4])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_a_limited_step_has_no_gradient_whatever_comes_back(backend_or_interpreter):
    """Clipped at either end, even where an infinite gradient meets it; on a limit and between them it has one."""
    dt = torch.tensor([[[0.05, 0.1, 0.5, 2.0, 3.0]]], requires_grad=True)
    one = torch.ones(1, 1, 1, 1)
    for softplus, limits in ((False, (0.1, 2.0)), (True, (0.74, 2.5))):  # softplus(0.05) = 0.719, of 0.1 0.744
        y = ssd_scan(torch.ones(1, 1, 5, 1), dt, -torch.ones(5), one, one, dt_softplus=softplus, dt_limit=limits)
        (grad,) = torch.autograd.grad(y.sum(), dt, retain_graph=True)
        slope = torch.sigmoid(dt.detach())[0, 0] if softplus else torch.ones(5)
        torch.testing.assert_close(grad[0, 0], torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]) * slope)
        (grad,) = torch.autograd.grad(y, dt, torch.full_like(y, torch.inf))
        assert (grad[0, 0, [0, 4]] == 0).all()


@pytest.mark.parametrize("head", range(3))
@pytest.mark.parametrize("step", [0, 40])
def test_one_negative_step_is_found(backend, head, step):
    (x, dt, A, B, C), _ = case(2, 41, 3, 20, 1, 2)
    dt[0, step, head] = -0.25
    with pytest.raises(ValueError, match="got -0.25"):
        ssd_scan(x, dt, A, B, C)
    dt[0, step, head] = torch.nan
    y = ssd_scan(x, dt, A, B, C, dt_limit=(0.1, 2.0), state_clamp=1.0)
    assert torch.isnan(y[0, step:, head]).all(), "NaN passes the limits and the clamp"
    y[0, step:, head] = 0
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("bias", [None, 0.5])
def test_a_negative_step_is_refused(backend_or_interpreter, bias):
    """Whatever the limits would make of it; a bias that lifts it, or softplus, makes it a step."""
    x, dt, one = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), -0.5 if bias is None else -1.0), torch.ones(1, 1, 1, 1)
    named = {"dt_bias": None if bias is None else torch.full((1,), bias), "dt_limit": (0.1, 2.0)}
    with pytest.raises(ValueError, match=r"ssd_scan: `dt` \+ `dt_bias` must be >= 0 without `dt_softplus`: got -0.5"):
        ssd_scan(x, dt, -torch.ones(1), one, one, **named)
    for fine in (named | {"dt_bias": torch.ones(1)}, named | {"dt_softplus": True}):
        assert torch.isfinite(ssd_scan(x, dt, -torch.ones(1), one, one, **fine)).all()


@pytest.mark.parametrize("value", [-200.0, -30.0, 0.0, 30.0, 1e30])
def test_softplus_and_gate_take_any_number(backend_or_interpreter, value):
    """Very negative steps and gates go to 0, very large ones to themselves; no gradient is NaN."""
    x, step, gate = (torch.full(shape, value) for shape in ((1, 2, 3, 2), (1, 2, 3), (1, 2, 3, 2)))
    x = torch.ones_like(x)
    nothing, one = torch.zeros(1, 2, 1, 1), torch.ones(1, 2, 1, 1)
    leaves = [t.requires_grad_() for t in (x, step, gate)]
    _, last = ssd_scan(
        x, step, -torch.full((3,), 1e-37), one, nothing, z=gate, D=torch.ones(3), dt_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    exact = 2 * torch.nn.functional.softplus(torch.tensor(value, dtype=torch.float64))
    torch.testing.assert_close(last, torch.full_like(last, exact.item()), atol=0, rtol=1e-6)
    y = ssd_scan(*leaves[:2], -torch.ones(3), nothing, one, z=leaves[2], D=torch.ones(3), dt_softplus=True)
    torch.testing.assert_close(y, torch.nn.functional.silu(gate.double()).float(), atol=1e-37, rtol=1e-6)
    for grad in torch.autograd.grad(y.sum(), leaves):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("direction", [{}, {"reverse": True}, {"bidirectional": True}], ids=["", "reverse", "both"])
@pytest.mark.parametrize(("width", "dtype"), [(3, torch.float32), (20, torch.float64)])
def test_saturation_is_the_share_of_states_that_the_clamp_changed(backend_or_interpreter, width, dtype, direction):
    (x, dt, A, B, C), optional = case(2, 37, 4, width, 2, 5, dtype=dtype)
    # Bounds without 0 between them: what lies beside the states, and holds 0, must not be counted.
    state, bounds = optional["initial_state"], {"state_clamp": (0.1, 0.5), "initial_state": optional["initial_state"]}
    y, share = ssd_scan(x, dt, A, B, C, **bounds, **direction, return_saturation=True)
    torch.testing.assert_close(y, ssd_scan(x, dt, A, B, C, **bounds, **direction), rtol=0, atol=0)
    backwards = torch.tensor(["reverse" in direction] * 2 + [bool(direction)] * 2)
    changed = 0
    for t in range(37):
        place = torch.where(backwards, 36 - t, t)
        token, step, enter = ((M[:, place, [0, 1, 2, 3]]) for M in (x, dt, B.repeat_interleave(2, dim=2)))
        free = torch.exp(step * A)[..., None, None] * state + (step[..., None] * token)[..., None] * enter[..., None, :]
        state = free.clamp(0.1, 0.5)
        changed = changed + (state != free).sum((2, 3))
    assert 0 < share.min() < share.max() < 1
    torch.testing.assert_close(share, changed.to(dtype) / (37 * width * 5))
    with pytest.raises(ValueError, match=r"stablekern.ssd_scan: `return_saturation` needs a `state_clamp`"):
        ssd_scan(x, dt, A, B, C, return_saturation=True)


def test_saturation_of_all_and_of_nothing(backend_or_interpreter):
    """Bounds that no state may pass, or any, in every column of a head; NaN is not changed; no steps, no share."""
    (x, dt, A, B, C), _ = case(2, 6, 3, 5, 1, 4)
    shares = [ssd_scan(x, dt, A, B, C, state_clamp=c, return_saturation=True)[1] for c in (0.0, torch.inf)]
    assert (shares[0] == 1).all() and (shares[1] == 0).all()
    x[0, 2:] = torch.nan
    share = ssd_scan(x, dt, A, B, C, state_clamp=0.0, return_saturation=True)[1]
    torch.testing.assert_close(share, torch.tensor([2 / 6, 1.0])[:, None].expand(2, 3))
    empty = ssd_scan(x[:, :0], dt[:, :0], A, B[:, :0], C[:, :0], state_clamp=1.0, return_saturation=True)[1]
    torch.testing.assert_close(empty, torch.zeros(2, 3), rtol=0, atol=0)
