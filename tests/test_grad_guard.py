"""GradGuard: norms and clips against float64 and torch, policies, optimizers, GradScaler, a poisoned training run."""

from __future__ import annotations

import functools
import math
import os
import random

import pytest
import torch
from torch import nn
from torch.amp import GradScaler

from stablekern import use_backend
from stablekern.errors import NonFiniteError
from stablekern.optim import ComplexAdamW, GradGuard

NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True, params=["native", "torch", "triton"])
def backend(request):
    """Every test runs on both implementations of norm and product."""
    if request.param == "triton" and request.node.get_closest_marker("interpreter_is_slow"):
        pytest.skip("thousands of launches, 0.1 ms an operation: left to the other backends")
    with use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny tensors: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def leaves(*gradients):
    """Parameters that hold the given gradients (None for none)."""
    params = []
    for g in gradients:
        p = nn.Parameter(torch.zeros(3) if g is None else torch.zeros_like(g))
        p.grad = None if g is None else g.clone()
        params.append(p)
    return params


def kept(params):
    return [None if p.grad is None else p.grad.clone() for p in params]


def assert_untouched(params, before):
    """Every value as it was, infinities and NaN too."""
    for p, g in zip(params, before, strict=True):
        assert (p.grad is None) == (g is None)
        if g is not None:
            torch.testing.assert_close(p.grad, g, rtol=0, atol=0, equal_nan=True)


def exact_norm(params):
    """The norm in float64, summed by Python without rounding."""
    squares = []
    for p in params:
        if p.grad is not None:
            wide = torch.view_as_real(p.grad.resolve_conj()) if p.grad.is_complex() else p.grad
            squares += [x * x for x in wide.double().flatten().tolist()]
    return math.sqrt(math.fsum(squares))


# ---- norm and clip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e3, INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_equals_clip_grad_norm_on_healthy_gradients(dtype, max_norm):
    gradients = [torch.randn(4, 5, dtype=dtype), torch.randn((), dtype=dtype), None, torch.randn(0, dtype=dtype)]
    ours, theirs = leaves(*gradients), leaves(*gradients)
    exact = exact_norm(ours)
    norm = GradGuard(ours, max_norm)()
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm.shape == () and norm.dtype == torch.float64
    assert float(norm) == pytest.approx(exact, rel=1e-14 if dtype.to_real() == torch.float64 else 1e-13)
    for a, b in zip(ours, theirs, strict=True):
        if a.grad is not None:  # two roundings each, and torch's norm has its own
            torch.testing.assert_close(a.grad, b.grad, rtol=8 * torch.finfo(dtype).eps, atol=0)


def test_a_norm_just_above_the_bound_is_clipped():
    params = leaves(torch.randn(40, dtype=torch.float64))
    exact = exact_norm(params)
    GradGuard(params, exact * (1 - 1e-5))()
    assert exact_norm(params) == pytest.approx(exact * (1 - 1e-5) * (1 - 1e-6 / exact), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """One rounding to half precision, also where the factor itself would underflow float16."""
    gradients = [torch.full((1000,), 6e4, dtype=dtype), torch.randn(7).to(dtype), (3e4 * torch.rand(900)).to(dtype)]
    params = leaves(*gradients)
    exact = exact_norm(params)
    norm = GradGuard(params, 1e-3)()
    assert float(norm) == pytest.approx(exact, rel=1e-12)
    for p, g in zip(params, gradients, strict=True):
        want = g.double() * (1e-3 / (exact + 1e-6))
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        torch.testing.assert_close(p.grad.double(), want, rtol=torch.finfo(dtype).eps, atol=smallest)
    assert float(params[0].grad.abs().max()) > 0


@pytest.mark.parametrize("size", [1e-44, 1e-30, 1e-10, 1e19, 1e30, 3e38])
def test_norm_neither_overflows_nor_underflows(size):
    params = leaves(torch.full((100, 100), size), torch.tensor([size]))
    exact = exact_norm(params)
    guard = GradGuard(params, 2.0)
    norm = guard()
    assert float(norm) == pytest.approx(exact, rel=1e-12, abs=0) and float(guard.found_inf) == 0
    clipped = exact_norm(params)
    expected = min(exact, 2.0 * exact / (exact + 1e-6))
    assert clipped == pytest.approx(expected, rel=1e-5 if size > 1e37 else 1e-6)


@pytest.mark.parametrize("size", [1e-310, 1e-200, 1e200, 1e300])
def test_float64_norm_neither_overflows_nor_underflows(size):
    params = leaves(torch.full((3, 4), size, dtype=torch.float64), torch.tensor([2 * size], dtype=torch.complex128))
    guard = GradGuard(params, INF)
    assert float(guard()) == pytest.approx(4 * size, rel=1e-12, abs=0) and float(guard.found_inf) == 0


def test_float64_norms_of_either_sign_and_of_nan_alone():
    """Where squares leave the range each tensor is measured in units of its largest modulus."""
    params = leaves(torch.tensor([-3e200, 1.0], dtype=torch.float64), torch.full((2,), -2e-200, dtype=torch.float64))
    assert float(GradGuard(params, INF)()) == pytest.approx(3e200, rel=1e-15)
    guard = GradGuard(leaves(torch.ones(3, dtype=torch.float64), torch.full((5,), NAN, dtype=torch.float64)), INF)
    assert math.isnan(float(guard())) and guard.first_bad() == "parameter 1"


def test_squares_that_are_subnormal_keep_their_digits():
    """Each square has 30 to 40 bits, and 2^14 of them add up to a normal number."""
    for x in (1.1, 1.3, 1.7, 1.9):
        params = leaves(torch.full((2**14,), x * 2.0**-518, dtype=torch.float64))
        assert float(GradGuard(params, INF)()) == pytest.approx(x * 2.0**-511, rel=1e-13, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.bfloat16])
def test_every_block_of_a_large_tensor_counts(dtype):
    """Blocks of 16 384 numbers: the norm of all of them, and the factor for all of them."""
    for size in (16_384, 16_385, 50_000):
        params = leaves(torch.full((size,), 2.0, dtype=dtype), torch.full((3,), 2.0, dtype=dtype))
        norm = float(GradGuard(params, 1.0)())
        assert norm == pytest.approx(2 * math.sqrt(size + 3), rel=1e-12)
        each = 2 / (norm + 1e-6)
        for p in params:
            torch.testing.assert_close(p.grad.real, torch.full_like(p.grad.real, each))


def test_no_gradients():
    for params in ([], leaves(None, None)):
        guard = GradGuard(params, 1.0)
        norm = guard()
        assert float(norm) == 0 and float(guard.found_inf) == 0 and guard.first_bad() is None
        assert float(guard.steps) == 1


def test_what_params_may_be():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[1].tied = model[0].weight
    model(torch.ones(1, 2)).sum().backward()
    norm = exact_norm(list(model.parameters()))
    for params in (model, model.named_parameters(), model.parameters(), [*model.parameters(), model[0].weight]):
        assert float(GradGuard(params, INF)()) == pytest.approx(norm, rel=1e-12)
    single = model[0].weight
    assert float(GradGuard(single, INF)()) == pytest.approx(exact_norm([single]), rel=1e-12)


def test_scale():
    g = torch.tensor([3.0, 4.0])
    for scale in (64, 64.0, torch.tensor(64.0), torch.tensor([64.0])):
        params = leaves(64 * g)
        assert float(GradGuard(params, INF)(scale=scale)) == pytest.approx(5.0, rel=1e-14)
        torch.testing.assert_close(params[0].grad, g, rtol=0, atol=0)
        params = leaves(64 * g)
        GradGuard(params, 1.0)(scale=scale)
        torch.testing.assert_close(params[0].grad, g / (5 + 1e-6), rtol=1e-6, atol=0)
    wide = leaves(3 * g.double())
    assert float(GradGuard(wide, INF)(scale=torch.tensor(3.0))) == pytest.approx(5.0, rel=1e-14)


def test_views_of_gradients():
    """Conjugate and permuted gradients are clipped where they are."""
    z = torch.randn(4, 3, dtype=torch.complex64)
    conjugate, permuted = leaves(z, torch.randn(3, 4))
    conjugate.grad = z.clone().conj()
    permuted.grad = torch.randn(4, 3).t()
    before = kept([conjugate, permuted])
    exact = exact_norm([conjugate, permuted])
    assert float(GradGuard([conjugate, permuted], 1e-2)()) == pytest.approx(exact, rel=1e-12)
    for p, g in zip((conjugate, permuted), before, strict=True):
        torch.testing.assert_close(p.grad, g * (1e-2 / exact), rtol=1e-5, atol=0)


# ---- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_skip_leaves_every_gradient(dtype, bad):
    params = leaves(torch.randn(5).to(dtype), torch.randn(300).to(dtype), None, torch.randn(4).to(dtype))
    poison = params[1].grad
    (torch.view_as_real(poison)[..., 1] if dtype.is_complex else poison)[123] = bad
    before = kept(params)
    guard = GradGuard(params, 1e-3)
    flag = guard.found_inf
    norm = guard(scale=8.0)
    assert_untouched(params, before)
    assert guard.found_inf is flag and float(flag) == 1
    assert math.isnan(norm) if math.isnan(bad) else float(norm) == INF
    assert guard.first_bad() == "parameter 1"
    params[1].grad.zero_()
    guard()
    assert float(flag) == 0 and guard.first_bad() is None and (int(guard.steps), int(guard.skipped)) == (2, 1)


def test_zero_drops_whole_tensors_and_measures_the_rest():
    good = torch.randn(6)
    params = leaves(good, torch.tensor([1.0, NAN]), torch.tensor([INF, 1.0], dtype=torch.complex64))
    guard = GradGuard([("a", params[0]), ("b", params[1]), ("c", params[2])], 0.5, policy="zero")
    norm = guard()
    exact = float(good.double().norm())
    assert float(norm) == pytest.approx(exact, rel=1e-12)
    torch.testing.assert_close(params[0].grad, good * (0.5 / (exact + 1e-6)), rtol=1e-6, atol=0)
    for p in params[1:]:
        assert torch.equal(p.grad, torch.zeros_like(p.grad))
    assert guard.first_bad() == "b"
    assert (float(guard.found_inf), int(guard.zeroed), int(guard.skipped)) == (0, 1, 0)


def test_raise_names_the_first_bad_parameter_and_changes_nothing():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model(torch.ones(1, 2)).sum().backward()
    guard = GradGuard(model, 1e-3, policy="raise")
    guard()
    model[1].weight.grad[0, 0] = NAN
    model[1].bias.grad[0] = INF
    before = kept(model.parameters())
    with pytest.raises(NonFiniteError, match=r"optim\.GradGuard: the gradient of `1\.weight` must be finite"):
        guard()
    assert_untouched(list(model.parameters()), before)
    assert float(guard.found_inf) == 1 and int(guard.steps) == 2
    with pytest.raises(RuntimeError, match="call the guard before"):
        guard.step(torch.optim.SGD(model.parameters()))


@pytest.mark.parametrize("veto", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)])
def test_a_veto_skips_finite_gradients(veto, optimizer):
    p = torch.nn.Parameter(torch.ones(3))
    chosen, guard = optimizer([p], lr=0.1), GradGuard([p], 1.0)
    p.grad = torch.full((3,), 5.0)
    norm = guard(veto=torch.tensor(veto))
    guard.step(chosen)
    assert torch.equal(p.detach(), torch.ones(3)) == veto and int(guard.skipped) == bool(guard.found_inf) == veto
    assert torch.equal(p.grad, torch.full((3,), 5.0)) == veto, "nothing is clipped in a step that is not taken"
    assert norm.item() == pytest.approx(75**0.5) and guard.first_bad() is None
    with pytest.raises(ValueError, match="`veto` is for the policy \"skip\": got 'zero'"):
        GradGuard([p], 1.0, policy="zero")(veto=torch.tensor(True))


@pytest.mark.parametrize("max_norm", [1.0, 1e9])
def test_autograd_learns_of_a_clip(max_norm):
    """What was saved for a backward through the gradients (create_graph) must not silently be the clipped one."""
    params = leaves(torch.ones(5), torch.ones(3, 2))
    before = [p.grad._version for p in params]
    GradGuard(params, max_norm)()
    clipped = [p.grad.max().item() < 1 for p in params]
    assert clipped == [max_norm == 1.0] * 2
    for p, version, changed in zip(params, before, clipped, strict=True):
        assert p.grad._version > version or not changed


@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_nothing_is_read(policy):
    from test_optim import NoHostRead

    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    params = leaves(*[torch.randn(5).to(dtype) for dtype in dtypes], None)
    guard, optimizer = GradGuard(params, 1.0, policy=policy), ComplexAdamW(params)
    with NoHostRead():
        for _ in range(2):
            guard()
            guard.step(optimizer)
            params[1].grad.fill_(NAN)
    assert all(p.isfinite().all() for p in params)


# ---- stepping --------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
    "adamw fused": lambda params: torch.optim.AdamW(params, lr=0.1, fused=True),
    "complex": lambda params: ComplexAdamW(params, lr=0.1, temperature=1e-3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_skips_for_every_optimizer(name):
    params, twins = leaves(torch.ones(4), torch.ones(2)), leaves(torch.ones(4), torch.ones(2))
    guard, optimizer, plain = GradGuard(params, INF), OPTIMIZERS[name](params), OPTIMIZERS[name](twins)
    for t in range(6):
        for p in (*params, *twins):
            p.grad = torch.full_like(p, float(t + 1))
        if t % 2:
            params[0].grad[1] = INF
        else:
            plain.step()  # never called where the other must skip
        guard()
        guard.step(optimizer)
        assert not hasattr(optimizer, "found_inf")
    assert int(guard.skipped) == 3
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q) and bool((p != 0).all())


def test_one_flag_serves_optimizers_for_good():
    p, q = leaves(torch.ones(3)), leaves(torch.ones(3))
    guard = GradGuard([*p, *q], INF)
    first, second = ComplexAdamW(p), torch.optim.AdamW(q, fused=True)
    first.found_inf = second.found_inf = guard.found_inf
    for bad in (1.0, NAN, 1.0, INF):
        p[0].grad = torch.tensor([1.0, bad, 1.0])
        guard()
        first.step()
        second.step()
    assert float(first.state[p[0]]["step"]) == float(second.state[q[0]]["step"]) == 2
    guard()
    own = first.found_inf = torch.tensor(1.0)  # of somebody else
    guard.step([first, second])
    assert first.found_inf is own and second.found_inf is guard.found_inf


def test_gradient_accumulation():
    """The guard looks once, after the last micro-batch; a bad one spoils its own window only."""
    torch.manual_seed(1)
    model, twin = nn.Linear(4, 1), nn.Linear(4, 1)
    twin.load_state_dict(model.state_dict())
    guard = GradGuard(model, 1.0)
    optimizer, plain = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(twin.parameters(), lr=0.1)
    data = torch.randn(12, 3, 4)
    data[5, 1, 2] = NAN  # second window of four
    for t, x in enumerate(data):
        (model(x).square().mean() / 4).backward()
        if not 4 <= t < 8:
            (twin(x).square().mean() / 4).backward()
        if t % 4 == 3:
            guard()
            guard.step(optimizer)
            optimizer.zero_grad()
            if t != 7:
                torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
                plain.step()
                plain.zero_grad()
    assert int(guard.skipped) == 1
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-6, atol=1e-7)


# ---- GradScaler ------------------------------------------------------------------------------------------------------


def scaler(**options):
    return GradScaler("cpu", init_scale=1024.0, growth_interval=3, **options)


def backward(scaler, params, value, bad):
    for p in params:
        p.grad = None
    loss = sum((p * value).sum() for p in params)
    scaler.scale(loss).backward()
    if bad:
        params[0].grad[0] = INF


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("unscaled_by", ["scaler", "guard"])
def test_scaler_goes_on_after_a_skip(name, unscaled_by):
    """As torch's own loop: same parameters, same scale, with overflows in between."""
    params, twins = leaves(torch.ones(4), torch.ones(2)), leaves(torch.ones(4), torch.ones(2))
    ours, theirs = scaler(), scaler()
    guard, optimizer, plain = GradGuard(params, 1.0), OPTIMIZERS[name](params), OPTIMIZERS[name](twins)
    for t in range(12):
        backward(ours, params, t + 1.0, t in (2, 3, 8))
        backward(theirs, twins, t + 1.0, t in (2, 3, 8))
        if unscaled_by == "scaler":
            ours.unscale_(optimizer)
            guard()
        else:
            guard(scale=ours)
        guard.step(optimizer, ours)
        theirs.unscale_(plain)
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        theirs.step(plain)
        theirs.update()
        assert ours.get_scale() == theirs.get_scale()
        torch.testing.assert_close([*params], [*twins], rtol=1e-5, atol=1e-6)
    assert int(guard.skipped) == 3 and ours.get_scale() == 1024.0 / 8 * 4


def test_scaler_alone_steps_and_skips_complex_adamw():
    """`scaler.step` hands over grad_scale and found_inf; nothing else is needed."""
    params, twins = leaves(torch.ones(4)), leaves(torch.ones(4))
    ours = scaler()
    optimizer, plain = ComplexAdamW(params, temperature=1e-3), ComplexAdamW(twins, temperature=1e-3)
    for t in range(6):
        backward(ours, params, t + 1.0, t == 2)
        ours.step(optimizer)
        ours.update()
        if t != 2:
            twins[0].grad = torch.full((4,), t + 1.0)
            plain.step()
    assert torch.equal(params[0], twins[0])
    assert not hasattr(optimizer, "grad_scale") and float(optimizer.state[params[0]]["step"]) == 5


def test_zero_steps_although_the_scaler_saw_an_overflow():
    params = leaves(torch.ones(4), torch.ones(2))
    ours, optimizer = scaler(), torch.optim.SGD(params, lr=1.0)
    guard = GradGuard(params, INF, policy="zero")
    for t in range(2):
        backward(ours, params, 1.0, True)
        if t:
            ours.unscale_(optimizer)
            guard()
        else:
            guard(scale=ours)
        guard.step(optimizer, ours)
    assert torch.equal(params[0].detach(), torch.zeros(4)) and torch.equal(params[1].detach(), torch.full((2,), -2.0))
    assert ours.get_scale() == 256.0


def test_complex_gradients_with_a_scaler():
    """Torch's own unscaling refuses complex gradients."""
    params = leaves(torch.ones(3, dtype=torch.complex64))
    ours, optimizer, guard = scaler(), ComplexAdamW(params, lr=0.1, weight_decay=0.0), GradGuard(params, INF)
    for bad in (False, True, False):
        params[0].grad = None
        ours.scale((params[0] * (1 - 2j)).real.sum()).backward()
        params[0].grad[0] *= NAN if bad else 1.0
        guard(scale=ours)
        guard.step(optimizer, ours)
    assert ours.get_scale() == 512.0
    torch.testing.assert_close(params[0].detach(), torch.full((3,), -0.2 * (1 + 2j) / 5**0.5, dtype=torch.complex64))


def test_several_optimizers_and_a_disabled_scaler():
    p, q = leaves(torch.ones(3)), leaves(torch.ones(3))
    first, second = torch.optim.SGD(p, lr=1.0), torch.optim.SGD(q, lr=1.0)
    guard = GradGuard([*p, *q], INF)
    ours = scaler()
    backward(ours, [*p, *q], 1.0, True)  # the overflow is in the first; the second must not step either
    guard(scale=ours)
    guard.step([first, second], ours)
    assert torch.equal(q[0].detach(), torch.zeros(3)) and ours.get_scale() == 512.0
    backward(ours, [*p, *q], 1.0, True)
    ours.unscale_(first)
    ours.unscale_(second)
    guard()
    guard.step([first, second], ours)
    assert torch.equal(q[0].detach(), torch.zeros(3))
    off = scaler(enabled=False)
    backward(off, [*p, *q], 1.0, False)
    guard(scale=off)
    guard.step([first, second], off)
    assert torch.equal(p[0].detach(), -torch.ones(3)) and torch.equal(q[0].detach(), -torch.ones(3))


def test_scaler_misuse():
    params = leaves(torch.ones(3))
    ours, optimizer, guard = scaler(), torch.optim.SGD(params, lr=1.0), GradGuard(params, INF)
    backward(ours, params, 1.0, False)
    guard()
    with pytest.raises(RuntimeError, match="are still scaled"):
        guard.step(optimizer, ours)
    ours.unscale_(optimizer)
    guard(scale=ours)
    with pytest.raises(RuntimeError, match="unscaled twice"):
        guard.step(optimizer, ours)
    assert torch.equal(params[0].detach(), torch.zeros(3))
    guard()
    guard.step(optimizer, ours)
    with pytest.raises(RuntimeError, match="call the guard before `step`"):
        guard.step(optimizer, ours)


# ---- misuse ----------------------------------------------------------------------------------------------------------


def test_bad_arguments():
    p = nn.Parameter(torch.ones(2))
    for max_norm in (-1.0, NAN):
        with pytest.raises(ValueError, match=r"stablekern\.optim\.GradGuard: `max_norm`"):
            GradGuard([p], max_norm)
    with pytest.raises(TypeError, match="`max_norm`"):
        GradGuard([p], "1")
    with pytest.raises(ValueError, match="`policy` must be one of 'skip', 'zero', 'raise'"):
        GradGuard([p], 1.0, policy="clamp")
    with pytest.raises(TypeError, match="`params` must be a module or parameters: got int"):
        GradGuard(3, 1.0)
    with pytest.raises(TypeError, match=r"`params\[1\]` must be a parameter or \(name, parameter\): got dict"):
        GradGuard([p, {"params": []}], 1.0)
    p.grad = torch.ones(2)
    guard = GradGuard([p], 1.0)
    for scale in (0.0, -1.0, NAN, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="`scale`"):
            guard(scale=scale)
    with pytest.raises(ValueError, match="one real element"):
        guard(scale=torch.ones(2))
    table = nn.Parameter(torch.ones(4, 2))
    table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (4, 2), check_invariants=True)
    p.grad = torch.full((2,), 10.0)
    with pytest.raises(TypeError, match="`parameter 1` must be dense"):
        GradGuard([p, table], 1.0)()
    assert torch.equal(p.grad, torch.full((2,), 10.0))


def test_what_is_no_bound_no_veto_or_no_optimizer_changes_nothing():
    p = nn.Parameter(torch.ones(2))
    p.grad = torch.full((2,), 10.0)
    guard = GradGuard([p], 1.0)
    for bound, kind in ((-1.0, ValueError), (NAN, ValueError), ("1", TypeError), (None, TypeError)):
        with pytest.raises(kind, match=r"stablekern\.optim\.GradGuard: `max_norm`"):
            guard.max_norm = bound
    for veto, got in (
        (True, "bool"),
        (torch.tensor([True]), r"\(1,\) torch.bool"),
        (torch.tensor(1.0), r"\(\) torch.fl"),
    ):
        with pytest.raises(TypeError, match=rf"`veto` must be a 0-d bool tensor: got {got}"):
            guard(veto=veto)
    assert guard.max_norm == 1.0 and int(guard.steps) == int(guard.skipped) == 0
    assert torch.equal(p.grad, torch.full((2,), 10.0))
    guard.max_norm = 5
    guard()
    assert exact_norm([p]) == pytest.approx(5.0, rel=1e-6)
    optimizer = torch.optim.SGD([p], lr=1.0)
    for wrong in (None, "sgd", [optimizer, 3]):
        with pytest.raises(TypeError, match="`optimizer` must be an optimizer or several: got (NoneType|str|int)"):
            guard.step(wrong)
    assert torch.equal(p.detach(), torch.ones(2))
    guard.step(optimizer)  # still as ready as it was
    assert not torch.equal(p.detach(), torch.ones(2))


def test_moved_parameters_are_noticed():
    p = nn.Parameter(torch.ones(2))
    guard = GradGuard([p], 1.0)
    torch.utils.swap_tensors(p, nn.Parameter(torch.ones(2, device="meta")))  # what module.to(device) does
    with pytest.raises(ValueError, match="must stay where they were when the guard was made, on cpu: got meta"):
        guard()


# ---- all together ----------------------------------------------------------------------------------------------------


@functools.cache
def train(policy, plant, steps=500):
    """A small regression; at random steps one gradient entry becomes NaN, inf or 1e38."""
    torch.manual_seed(3)
    rng = random.Random(7)
    model, teacher = (nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(2))
    inputs = torch.randn(256, 4)
    with torch.no_grad():
        targets = teacher(inputs) + 0.1 * torch.randn(256, 1)
    optimizer = ComplexAdamW(model.parameters(), lr=1e-2)
    guard = GradGuard(model, 1.0, policy=policy)
    optimizer.found_inf = guard.found_inf
    planted = 0
    for _ in range(steps):
        loss = (model(inputs) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        poison, where = rng.choice((NAN, INF, 1e38)), rng.choice(list(model.parameters()))
        if plant and rng.random() < 0.08:
            where.grad.view(-1)[rng.randrange(where.numel())] = poison
            planted += 1
        guard()
        optimizer.step()
    with torch.no_grad():
        return float((model(inputs) - targets).square().mean()), planted, guard, model


@pytest.mark.interpreter_is_slow
@pytest.mark.parametrize("policy", ["skip", "zero"])
def test_poisoned_training_ends_like_clean_training(policy):
    clean, *_ = train("skip", plant=False)
    loss, planted, guard, model = train(policy, plant=True)
    assert planted > 25 and all(p.isfinite().all() for p in model.parameters())
    assert 0.15 * planted < int(guard.skipped if policy == "skip" else guard.zeroed) < planted
    assert loss == pytest.approx(clean, rel=0.05)


def test_without_the_guard_one_nan_is_the_end():
    """What the guard is for: torch's clip spreads one NaN to every weight."""
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    model.weight.grad[0, 0] = NAN
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert all(p.isnan().all() for p in model.parameters())


def _rank(rank, size, path):
    """Two processes: norms, verdicts and clips of sharded gradients are those of the whole ones."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (size,))
        torch.manual_seed(0)
        shapes = [((5, 4), torch.float32), ((6,), torch.complex64), ((3, 2), torch.float64), ((4,), torch.bfloat16)]
        gradients = [torch.randn(shape, dtype=dtype) for shape, dtype in shapes]
        placements = [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()]]

        def sharded(scale=1.0, poison=None):
            params = []
            for i, (g, placed) in enumerate(zip(gradients, placements, strict=True)):
                g = g * scale if g.dtype != torch.bfloat16 else g.clone()
                if i == poison:
                    g.view(-1)[0] = NAN  # on rank 0 alone
                p = nn.Parameter(distribute_tensor(torch.zeros_like(g), mesh, placed))
                p.grad = distribute_tensor(g, mesh, placed)
                params.append(p)
            plain = nn.Parameter(torch.zeros(2))
            plain.grad = torch.tensor([0.5, -0.5])
            return [*params, plain]

        for scale in (1.0, 1e30):
            params = sharded(scale)
            whole = leaves(*[p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in params])
            norm, expected = GradGuard(params, 0.5)(), GradGuard(whole, 0.5)()
            torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
            for p, q in zip(params, whole, strict=True):
                full = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(full, q.grad, rtol=1e-6 if p.dtype != torch.bfloat16 else 1e-2, atol=0)
        replicated = nn.Parameter(distribute_tensor(torch.zeros(2), mesh, [Replicate()]))
        replicated.grad = DTensor.from_local(torch.tensor([3.0, 4.0]), mesh, [Partial()])  # a sum over two ranks
        assert float(GradGuard([replicated], 1.0)()) == pytest.approx(10.0, rel=1e-12)
        torch.testing.assert_close(replicated.grad.full_tensor(), torch.tensor([0.6, 0.8]))
        for poison in range(4):
            params = sharded(poison=poison)
            guard = GradGuard(params, 0.5)
            guard()
            assert float(guard.found_inf) == 1 and guard.first_bad() == f"parameter {poison}"
        dist.barrier()
    finally:
        dist.destroy_process_group()
    os._exit(0)  # all is checked; now and then gloo's threads abort while an interpreter winds down


def test_sharded_gradients(tmp_path):
    torch.multiprocessing.start_processes(_rank, args=(2, str(tmp_path / "store")), nprocs=2, start_method="spawn")
