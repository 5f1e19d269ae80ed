"""What `selective_scan` and `selective_state_update` promise beyond the suite."""

from __future__ import annotations

import inspect

import pytest
import torch

import stablekern
from specs.selective_scan import inputs
from stablekern.ops.selective_scan import _CHUNK, _fwd, reference, selective_scan
from stablekern.ops.selective_state_update import selective_state_update

BACKENDS = [
    b for b, reason in stablekern.available_backends("selective_scan").items() if reason is None and b != "triton"
]
FORMS = ["real", "constant", "complex", "complex-constant"]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with stablekern.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[*BACKENDS, "triton"])
def backend_or_interpreter(request):
    """For tests of a few steps: the interpreter is slow."""
    with stablekern.use_backend(request.param):
        yield request.param


def case(*sizes: int, dtype=torch.float32, is_complex: bool = False):
    args, optional = inputs(torch.Generator().manual_seed(3), *sizes, is_complex=is_complex)

    def cast(t):
        if not isinstance(t, torch.Tensor):
            return t
        return t.to(torch.promote_types(dtype, torch.complex64)) if t.is_complex() else t.to(dtype)

    return [cast(a) for a in args], {k: cast(v) for k, v in optional.items()}


def with_gradients(args, optional):
    leaves = [t.clone().requires_grad_() for t in args]
    extra = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in optional.items()}
    y, last = selective_scan(*leaves, **extra)
    (y.square().sum() + last.abs().sum()).backward()
    leaves += [v for v in extra.values() if isinstance(v, torch.Tensor)]
    return [y.detach(), last.detach(), *(t.grad for t in leaves)]


def in_form(args, form: str):
    """The arguments, or with a B and C without a time axis."""
    return (*args[:3], args[2].conj() * 0.7, args[2].flip(0).clone()) if form.endswith("constant") else args


def test_arguments_are_those_of_mamba_ssm():
    scan = "u delta A B C D z delta_bias delta_softplus return_last_state"
    step = "state x dt A B C D z dt_bias dt_softplus"
    for function, order in ((selective_scan, scan), (selective_state_update, step)):
        parameters = inspect.signature(function).parameters.values()
        assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == order.split()


@pytest.mark.parametrize("sizes", [(3, 40, 40, 2, 16), (1, 150, 35, 1, 5)], ids=["items", "slabs"])
@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_same_bits_for_any_number_of_threads(backend, sizes, clamp, form):
    """Every form: complex states, and a B and C without a time axis, whose gradients are sums over items and time."""
    args, optional = case(*sizes, is_complex=form.startswith("complex"))
    args = in_form(args, form)
    optional |= {"state_clamp": clamp, "delta_softplus": True}
    results, threads = [], torch.get_num_threads()
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
@pytest.mark.parametrize("form", FORMS)
def test_reverse_is_the_scan_of_flipped_inputs(backend, clamp, form):
    """The same bits; the gradients of parameters, sums over time, but for their rounding."""
    args, optional = case(2, 20, 70, 2, 5, is_complex=form.startswith("complex"))
    args = in_form(args, form)
    optional |= {"state_clamp": clamp, "delta_softplus": True}
    ours = with_gradients(args, optional | {"reverse": True})
    flipped = [t.flip(-1) if t.dim() > 2 else t for t in args]
    theirs = with_gradients(flipped, optional | {"z": optional["z"].flip(-1)})
    leaves = [*args, *(v for v in optional.values() if isinstance(v, torch.Tensor))]
    in_time = [True, False, *(t.dim() > 2 and t is not optional["initial_state"] for t in leaves)]
    for a, b, flips in zip(ours, theirs, in_time, strict=True):
        exactly = {} if b.dim() < 3 else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(a, b.flip(-1) if flips else b, **exactly)


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("form", FORMS)
def test_both_directions_in_one_call_are_two_calls(backend, clamp, form):
    """One call on twice the channels: a scan of the first half and a reverse one of the second, the same bits where a
    kernel makes them (activations and the loss are torch's, which rounds the ends of its vectors otherwise)."""
    dtype = torch.float32 if backend == "native" else torch.float64
    args, optional = case(2, 40, 70, 2, 5, dtype=dtype, is_complex=form.startswith("complex"))
    args = in_form(args, form)
    optional |= {"state_clamp": clamp, "delta_softplus": True}
    both = with_gradients(args, optional | {"bidirectional": True})
    tensors = dict(enumerate(args)) | {k: v for k, v in optional.items() if isinstance(v, torch.Tensor)}
    axes = {name: 1 if tensor.dim() > 2 else 0 for name, tensor in tensors.items()}
    for half in (0, 1):
        parts = {name: tensor.chunk(2, axes[name])[half] for name, tensor in tensors.items()}
        own = optional | {k: v for k, v in parts.items() if isinstance(k, str)} | {"reverse": bool(half)}
        alone = with_gradients([parts[i] for i in range(5)], own)
        for index, (a, b, axis) in enumerate(zip(both, alone, [1, 1, *axes.values()], strict=True)):
            exactly = {"rtol": 0, "atol": 0} if backend == "native" and index < 2 else {}
            torch.testing.assert_close(a.chunk(2, axis)[half], b, **exactly)


@pytest.mark.parametrize("clamp", [None, 0.5])
@pytest.mark.parametrize("cut", [1, 15, 16, 50])
def test_a_sequence_may_be_cut_anywhere(backend, cut, clamp):
    """The last state carries over: the same bits, and the same gradients, as in one piece."""
    args, optional = case(2, 20, 70, 2, 16, dtype=torch.float64)
    u, delta, A, B, C = (t.requires_grad_() for t in args)
    D, h0 = optional["D"], optional["initial_state"].requires_grad_()
    whole, last = selective_scan(u, delta, A, B, C, D, initial_state=h0, state_clamp=clamp, return_last_state=True)
    parts, state = [], h0
    for piece in (slice(0, cut), slice(cut, 70)):
        y, state = selective_scan(
            u[..., piece], delta[..., piece], A, B[..., piece], C[..., piece], D,
            initial_state=state, state_clamp=clamp, return_last_state=True,
        )  # fmt: skip
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, -1), whole, rtol=0, atol=0)
    torch.testing.assert_close(state, last, rtol=0, atol=0)
    ours = torch.autograd.grad(torch.cat(parts, -1).square().sum() + state.sum(), (u, delta, A, B, C, h0))
    for a, b in zip(ours, torch.autograd.grad(whole.square().sum() + last.sum(), (u, delta, A, B, C, h0)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_number_stays_in_its_channel_and_item(backend, value):
    args, optional = case(3, 20, 37, 2, 4)
    clean = with_gradients(args, optional)
    args[0][1, 3, 17] = value
    spoilt = with_gradients(args, optional)
    assert not torch.isfinite(spoilt[0][1, 3, 17:]).any()
    assert torch.isfinite(spoilt[0][1, 3, :17]).all(), "an earlier step cannot see it"
    others = [i for i in range(20) if i != 3]
    assert torch.isfinite(spoilt[0][1, others]).all(), "nor can another channel"
    for index in (0, 1, 2, 3, 5, 6):  # y, last state, and the gradients of u, delta, B, C
        torch.testing.assert_close(spoilt[index][[0, 2]], clean[index][[0, 2]], rtol=0, atol=0)


@pytest.mark.parametrize("states", [2, 3])
def test_nothing_leaks_out_of_unused_lanes(backend_or_interpreter, states):
    """Where B or C is infinite, lanes beyond the last channel hold 0 * inf; no result may see that."""
    args, _ = case(2, 3, 20, 1, states)
    u, delta, A, B, C = args
    u.abs_(), C.abs_()
    B[..., 11] = float("inf")
    leaves = [t.requires_grad_() for t in (u, delta, A, B, C)]
    y, last = selective_scan(*leaves, return_last_state=True)
    assert torch.isinf(y[..., 11:]).all() and torch.isfinite(y[..., :11]).all() and torch.isinf(last).all()
    _, _, _, grad_B, grad_C = torch.autograd.grad(y.sum(), leaves)
    assert torch.isfinite(grad_B).all(), "d y / d B does not depend on B"
    assert torch.isfinite(grad_C[..., :11]).all() and torch.isposinf(grad_C[..., 11:]).all()
    B.data.abs_().nan_to_num_(posinf=1.0), C.data[..., 11].fill_(float("inf"))
    _, _, _, grad_B, grad_C = torch.autograd.grad(selective_scan(*leaves).sum(), leaves)
    assert torch.isposinf(selective_scan(torch.full_like(u, torch.inf), *leaves[1:])).all(), "nor beyond the last state"
    assert torch.isfinite(grad_C).all(), "d y / d C does not depend on C"
    assert torch.isposinf(grad_B[..., :12]).all() and torch.isfinite(grad_B[..., 12:]).all()
    state, ones, huge = torch.zeros(1, 3, states), torch.ones(1, 3), torch.full((1, 3), torch.inf)
    with torch.no_grad():
        both = torch.ones(1, states)
        one_step = selective_state_update(state, huge, ones, A, both, both)
    assert torch.isposinf(one_step).all() and torch.isposinf(state).all()


def test_clamped_states_stay_inside_and_a_wide_clamp_changes_nothing(backend):
    args, _ = case(2, 18, 60, 1, 9)
    _, last = selective_scan(*args, state_clamp=(-0.25, 0.125), return_last_state=True)
    assert last.min() == -0.25 and last.max() == 0.125
    free, wide = selective_scan(*args), selective_scan(*args, state_clamp=1e30)
    torch.testing.assert_close(free, wide, rtol=0, atol=0)


@pytest.mark.parametrize("clamp", [None, 1e30])
def test_nan_passes_the_clamp(backend, clamp):
    args, _ = case(1, 2, 4, 1, 2)
    args[0][0, 0, 1] = float("nan")
    y = selective_scan(*args, state_clamp=clamp)
    assert torch.isnan(y[0, 0, 1:]).all() and torch.isfinite(y[0, 1]).all()


def test_a_saturated_step_forgets_its_past(backend_or_interpreter):
    """The gradient of a clamped state is that of `torch.clamp`: 0 outside, 1 on a bound itself, which changes none."""
    zero = torch.zeros(5, 1, 1)
    h0 = torch.tensor([2.0, 1.0, 0.5, -1.0, -2.0]).view(5, 1, 1).requires_grad_()
    named = {"initial_state": h0, "state_clamp": 1.0, "return_last_state": True, "return_saturation": True}
    _, last, share = selective_scan(zero, zero, -torch.ones(1, 1), zero, zero, **named)
    (grad,) = torch.autograd.grad(last.sum(), h0)
    torch.testing.assert_close(last.flatten(), torch.tensor([1.0, 1.0, 0.5, -1.0, -1.0]), rtol=0, atol=0)
    torch.testing.assert_close(grad.flatten(), torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0]), rtol=0, atol=0)
    torch.testing.assert_close(share.flatten(), torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0]), rtol=0, atol=0)


@pytest.mark.parametrize("direction", [{}, {"reverse": True}, {"bidirectional": True}], ids=["", "reverse", "both"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("channels", "dtype"), [(4, torch.float32), (60, torch.float64)])
def test_saturation_is_the_share_of_states_that_the_clamp_changed(
    backend_or_interpreter, channels, dtype, form, direction
):
    args, optional = case(2, channels, 37, 2, 5, dtype=dtype, is_complex=form.startswith("complex"))
    u, delta, A, B, _ = args = in_form(args, form)
    is_complex = form.startswith("complex")
    # Bounds without 0 between them: what lies beside the states, and holds 0, must not be counted.
    optional |= {"return_last_state": False, "state_clamp": 0.5 if is_complex else (0.1, 0.5)} | direction
    y, share = selective_scan(*args, **optional, return_saturation=True)
    torch.testing.assert_close(y, selective_scan(*args, **optional), rtol=0, atol=0)
    each, half = torch.arange(channels), channels // 2
    backwards = torch.tensor(["reverse" in direction] * half + [bool(direction)] * half)
    step, state, changed = delta + optional["delta_bias"][:, None], optional["initial_state"], 0
    for t in range(37):
        place = torch.where(backwards, 36 - t, t)
        enter = B if B.dim() == 2 else B.repeat_interleave(half, dim=1).mT[:, each, place]
        now, token = (M[:, each, place, None] for M in (step, step * u))
        free = torch.exp(now * A) * state + token * enter
        over = free.abs() > 0.5 if is_complex else (free < 0.1) | (free > 0.5)
        bounded = torch.where(over, 0.5 * torch.sgn(free), free) if is_complex else free.clamp(0.1, 0.5)
        state, changed = bounded, changed + over.sum(-1)
    assert share.min() < share.max() < 1
    torch.testing.assert_close(share, changed.to(dtype) / (37 * 5))
    with pytest.raises(ValueError, match=r"stablekern.selective_scan: `return_saturation` needs a `state_clamp`"):
        selective_scan(*args, return_saturation=True)


@pytest.mark.parametrize("form", FORMS)
def test_saturation_of_all_and_of_nothing(backend_or_interpreter, form):
    """Bounds that no state may pass, or any; NaN is not changed; no steps, no share."""
    args, _ = case(2, 5, 6, 1, 4, is_complex=form.startswith("complex"))
    u, *rest = args = in_form(args, form)
    shares = [selective_scan(*args, state_clamp=c, return_saturation=True)[1] for c in (0.0, torch.inf)]
    assert (shares[0] == 1).all() and (shares[1] == 0).all()
    u[0, :, 2:] = torch.nan
    share = selective_scan(u, *rest, state_clamp=0.0, return_saturation=True)[1]
    torch.testing.assert_close(share, torch.tensor([2 / 6, 1.0])[:, None].expand(2, 5))
    none = [M[..., :0] if M.dim() > 2 else M for M in args]
    empty = selective_scan(*none, state_clamp=1.0, return_saturation=True)[1]
    torch.testing.assert_close(empty, torch.zeros(2, 5), rtol=0, atol=0)


def test_a_saturated_complex_step_keeps_what_is_tangent(backend_or_interpreter):
    """(r / |v|) (I - n n^T): a state 2 i with the bound 1 passes half of a real gradient, nothing of an imaginary.
    On the bound itself, i, it passes all."""
    zero, rate = torch.zeros(2, 1, 1), -torch.ones(1, 1, dtype=torch.complex64)
    h0 = torch.tensor([2j, 1j]).view(2, 1, 1).requires_grad_()
    none = torch.zeros(2, 1, 1, dtype=torch.complex64)
    named = {"initial_state": h0, "state_clamp": 1.0, "return_last_state": True, "return_saturation": True}
    _, last, share = selective_scan(zero, zero, rate, none, none, **named)
    assert last.flatten().tolist() == [1j, 1j] and share.flatten().tolist() == [1, 0]
    assert torch.autograd.grad(last.real.sum(), h0, retain_graph=True)[0].flatten().tolist() == [0.5, 1]
    assert torch.autograd.grad(last.imag.sum(), h0)[0].flatten().tolist() == [0, 1j]


@pytest.mark.parametrize("radius", [1e-30, 0.7, 3e29, torch.inf])
def test_complex_radii_of_any_size(backend_or_interpreter, radius):
    """Of each channel alone: NaN in one changes no bit of the others."""
    g = torch.Generator().manual_seed(5)
    u = (10.0 ** torch.linspace(-30, 30, 37)).view(1, 37, 1).requires_grad_()
    A = torch.complex(-torch.ones(37, 3), torch.ones(37, 3))
    B = torch.randn(1, 3, 1, generator=g, dtype=torch.complex64)

    def states(u):
        options = {"state_clamp": radius, "return_last_state": True}
        return selective_scan(u, torch.ones_like(u), A, B, torch.ones_like(B), **options)[1]

    last = states(u)
    free, exact = u.detach().double() * B.mT.to(torch.complex128), last.detach().to(torch.complex128)
    eps = torch.finfo(torch.float32).eps
    long = free.abs() > radius * (1 + 4 * eps)
    assert long.any() == (radius < torch.inf)
    assert ((exact - free)[~long].abs() <= 4 * eps * free[~long].abs()).all()
    assert ((exact - free / free.abs() * radius)[long].abs() <= 8 * eps * radius).all()
    (grad,) = torch.autograd.grad(last.real.sum(), u)
    assert torch.isfinite(grad).all()
    unclamped = B[0, :, 0].real.sum().expand_as(grad)
    inside = ~long.any(-1, keepdim=True)
    torch.testing.assert_close(grad[inside], unclamped[inside], rtol=8 * eps, atol=8 * eps)
    assert (grad[long.all(-1, keepdim=True)].abs() <= 8 * eps).all()  # along the radius nothing passes
    spoilt = states(u.detach().index_fill(1, torch.tensor([5]), torch.nan))
    others = torch.arange(37) != 5
    assert torch.isnan(spoilt[:, 5]).all()
    torch.testing.assert_close(spoilt[:, others], last[:, others], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [None, -torch.inf])
def test_the_decay_is_an_exponential_to_two_ulp(backend, dtype, limit):
    """With nothing coming in, one step turns a state of 1 into exp(delta A): a sweep through underflow to 0.

    An infinite rate among them takes the kernel's path for extreme exponents.
    """
    smallest = -110.0 if dtype == torch.float32 else -750.0
    A = torch.linspace(smallest, -torch.finfo(dtype).eps, 4001)
    A = torch.cat([A, torch.full((1001,), -1e4 if limit is None else limit)]).to(dtype)[:, None]
    if limit is not None:
        A[::7] = limit
    rows = A.shape[0]
    nothing, step = torch.zeros(1, rows, 1, dtype=dtype), torch.ones(1, rows, 1, dtype=dtype)
    none, start = torch.zeros(1, 1, 1, dtype=dtype), torch.ones(1, rows, 1, dtype=dtype)
    _, last = selective_scan(nothing, step, A, none, none, initial_state=start, return_last_state=True)
    exact = torch.exp(A.double()).flatten()
    spacing = (torch.nextafter(exact.to(dtype), torch.tensor(torch.inf, dtype=dtype)) - exact.to(dtype)).double()
    assert ((last.flatten().double() - exact).abs() <= 2 * spacing).all()
    assert (last.flatten()[4001:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_is_a_softplus_to_a_few_ulp(backend_or_interpreter, dtype):
    """With all else 1, the output of the first step is the step: from those that vanish to those that are linear."""
    delta = torch.linspace(-80, 80, 801, dtype=dtype)[None, :, None].requires_grad_()
    one, A = torch.ones(1, 801, 1, dtype=dtype), -torch.ones(801, 1, dtype=dtype)
    y = selective_scan(one, delta, A, one[:, :1], one[:, :1], delta_softplus=True)
    (slope,) = torch.autograd.grad(y.sum(), delta)
    exact = delta.detach().double()
    vanishing = torch.exp(-exact.abs())
    steps, slopes = exact.clamp_min(0) + torch.log1p(vanishing), torch.where(exact < 0, vanishing, 1) / (1 + vanishing)
    for ours, truth in ((y.detach(), steps), (slope, slopes)):
        torch.testing.assert_close(ours.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("limit", [-1e4, -torch.inf])
def test_a_state_that_decays_at_once_leaves_no_trace(backend_or_interpreter, limit):
    """Nothing but the step's own token is read of it, and no gradient comes through its past but that of its rate."""
    args, _ = case(2, 3, 5, 1, 2, dtype=torch.float64)
    args[2][1] = limit
    leaves = [t.requires_grad_() for t in (*args, torch.randn(2, 3, 2, dtype=torch.float64))]
    u, delta, A, B, C, h0 = leaves
    delta.data += 0.1
    y, last = selective_scan(u, delta, A, B, C, initial_state=h0, return_last_state=True)
    alone = (delta * u)[:, 1] * (B * C).sum((1, 2))
    torch.testing.assert_close(y[:, 1], alone)
    torch.testing.assert_close(last[:, 1], (delta * u)[:, 1, -1:] * B[:, 0, :, -1])
    wanted = u, A, B, C, h0
    ours, exact = (torch.autograd.grad(out.sum(), wanted, allow_unused=True) for out in (y[:, 1], alone))
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_complex_decay_turns_as_it_should(dtype):
    """As above, by angles from the smallest to those whose quarter turns are beyond any short reduction."""
    angles = torch.cat([torch.linspace(-20, 20, 2001), torch.logspace(-30, 12, 500), torch.arange(400) * torch.pi / 4])
    A = torch.complex(torch.full_like(angles, -1e-3), angles).to(torch.promote_types(dtype, torch.complex64))[:, None]
    rows = A.shape[0]
    nothing, step = torch.zeros(1, rows, 1, dtype=dtype), torch.ones(1, rows, 1, dtype=dtype)
    none, start = torch.zeros(1, 1, 1, dtype=A.dtype), torch.ones(1, rows, 1, dtype=A.dtype)
    _, last = selective_scan(nothing, step, A, none, none, initial_state=start, return_last_state=True)
    error = (last.flatten() - torch.exp(A.to(torch.complex128)).flatten()).abs()
    assert error.max() <= 3 * torch.finfo(dtype).eps


def test_extreme_steps_and_inputs_stay_finite(backend):
    """|delta A| up to 1e4 and u up to 1e30, in any order of sizes: no NaN, and inf where float32 ends."""
    (u, delta, A, B, C), optional = case(2, 20, 64, 1, 6)
    u = u * torch.logspace(-30, 30, 64)
    delta = delta * torch.logspace(-4, 0, 64).flip(0)
    A = A * torch.logspace(-4, 3.6, 20)[:, None]
    optional = {"D": optional["D"], "initial_state": optional["initial_state"]}
    exact = reference(*(t.double() for t in (u, delta, A, B, C)), **{k: v.double() for k, v in optional.items()})
    leaves = [t.requires_grad_() for t in (u, delta, A, B, C)]
    y = selective_scan(*leaves, **optional)
    assert torch.isfinite(y).all()
    assert ((y.double() - exact).abs() <= 1e-5 * exact.abs().cummax(-1).values.clamp_min(1)).all()
    weight = torch.logspace(30, -30, 64)
    for grad in torch.autograd.grad((y * weight).sum(), leaves):
        assert not torch.isnan(grad).any()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_float32(backend, half):
    args, optional = case(2, 20, 40, 4, 16, dtype=half)
    wide = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in optional.items()}
    y, last = selective_scan(*args, **optional)
    wide_y, wide_last = selective_scan(*(t.float() for t in args), **wide)
    assert y.dtype == half and last.dtype == torch.float32
    torch.testing.assert_close(y, wide_y.to(half), rtol=0, atol=0)
    torch.testing.assert_close(last, wide_last, rtol=0, atol=0)
    mixed = {k: v if k == "z" else wide[k] for k, v in optional.items()}  # float32 parameters, half activations
    torch.testing.assert_close(selective_scan(*args[:2], args[2].float(), *args[3:], **mixed)[0], y, rtol=0, atol=0)


def test_growing_states_warn_and_overflow_to_inf(backend):
    (u, delta, A, B, C), _ = case(1, 3, 90, 1, 2)
    delta.fill_(1.0)
    A[0] = 2.0
    with pytest.warns(RuntimeWarning, match=r"stablekern.selective_scan: `A` >= 0 does not decay: .*: got 2"):
        y, last = selective_scan(u, delta, A, B, C, return_last_state=True)
    assert torch.isinf(last[0, 0]).all() and torch.isfinite(y[0, 1:]).all()
    assert torch.isfinite(selective_scan(u, delta, A, B, C, state_clamp=10.0)).all(), "a clamp bounds it, silently"


def test_only_what_is_asked_for_gets_a_gradient_and_is_kept(backend):
    args, optional = case(2, 6, 70, 1, 4)
    args[2].requires_grad_()
    y, _ = selective_scan(*args, **optional)
    y.sum().backward()
    assert args[2].grad is not None and all(args[i].grad is None for i in (0, 1, 3, 4))
    args = [a.detach() for a in args]
    kept = [_fwd(*args, *(None,) * 6, 0, False, chunk, False)[2] for chunk in (_CHUNK, 70)]
    assert [tuple(states.shape) for states in kept] == [(2, -(-70 // _CHUNK), 4, 6), (2, 1, 4, 6)], (
        "one every _CHUNK steps"
    )


def test_last_state_alone_can_be_differentiated(backend):
    args, _ = case(2, 6, 40, 1, 4, dtype=torch.float64)
    for t in args:
        t.requires_grad_()
    ours = torch.autograd.grad(selective_scan(*args, return_last_state=True)[1].square().sum(), args[:4])
    exact = torch.autograd.grad(reference(*args, return_last_state=True)[1].square().sum(), args[:4])
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b)


def test_agrees_with_the_slow_path_of_transformers(backend):
    """Written by others: discretised at once, looped over time."""
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    if not hasattr(modeling, "mamba_selective_scan"):
        pytest.skip("this version has no such function")
    (u, delta, A, B, C), optional = case(2, 8, 30, 1, 5)
    extra = (optional["D"], optional["z"], optional["delta_bias"], True)
    theirs = modeling.mamba_selective_scan(u, delta, A, B[:, 0], C[:, 0], *extra)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    torch.testing.assert_close(selective_scan(u, delta, A, B[:, 0], C[:, 0], *extra), theirs)


@pytest.mark.parametrize("clamp", [None, 0.4])
@pytest.mark.parametrize("is_complex", [False, True], ids=["real", "complex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_one_by_one_are_the_scan(backend, dtype, is_complex, clamp):
    args, optional = case(2, 20, 25, 2, 7, dtype=dtype, is_complex=is_complex)
    (u, delta, A, B, C), state = args, optional.pop("initial_state")
    y, last = selective_scan(
        *args, **optional, delta_softplus=True, initial_state=state, state_clamp=clamp
    )  # `return_last_state` is one of the optional
    own = state.clone()
    for t in range(25):
        step = selective_state_update(
            own, u[..., t], delta[..., t], A, B[..., t], C[..., t], optional["D"], optional["z"][..., t],
            optional["delta_bias"], True, state_clamp=clamp,
        )  # fmt: skip
        torch.testing.assert_close(step, y[..., t])
    torch.testing.assert_close(own, last)


@pytest.mark.parametrize("clamp", [None, 1.0])
@pytest.mark.parametrize("bad", [complex("nan"), complex(0, float("nan"))])
def test_a_bad_complex_state_stays_alone(backend, clamp, bad):
    """Either part of it, in the step that follows: its own next state and its channel's output, nothing else."""
    g = torch.Generator().manual_seed(0)
    x, dt, A = torch.randn(2, 5, generator=g), torch.rand(2, 5, generator=g), -torch.rand(5, 9, generator=g) + 1j
    B, C = (torch.randn(2, 9, generator=g, dtype=torch.complex64) for _ in range(2))
    state = torch.randn(2, 5, 9, generator=g, dtype=torch.complex64)
    state[1, 3, 4] = bad
    y = selective_state_update(state, x, dt, A, B, C, state_clamp=clamp)
    assert torch.nonzero(torch.isnan(state)).tolist() == [[1, 3, 4]]
    assert torch.nonzero(torch.isnan(y)).tolist() == [[1, 3]]


def test_the_state_changes_in_place_whatever_its_strides(backend):
    g = torch.Generator().manual_seed(0)
    wide = torch.randn(2, 3, 4, 10, generator=g)  # every second state, heads and channels swapped
    x, dt, A = torch.randn(2, 4, 3, generator=g), torch.rand(2, 4, 3, generator=g), -torch.rand(4, 3, 5, generator=g)
    B, C = torch.randn(2, 5, generator=g), torch.randn(2, 5, generator=g)
    strided = wide[..., ::2].transpose(1, 2)
    packed, untouched = strided.clone(memory_format=torch.contiguous_format), wide[..., 1::2].clone()
    ours = selective_state_update(strided, x, dt, A, B, C)
    torch.testing.assert_close(ours, selective_state_update(packed, x, dt, A, B, C), rtol=0, atol=0)
    torch.testing.assert_close(strided, packed, rtol=0, atol=0)
    torch.testing.assert_close(wide[..., 1::2], untouched, rtol=0, atol=0)
