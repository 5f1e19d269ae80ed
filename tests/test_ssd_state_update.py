"""What `ssd_state_update` promises beyond the suite: the steps of `ssd_scan`, in place, each row by itself."""

from __future__ import annotations

import pytest
import torch

import stablekern
from specs.ssd_scan import inputs as sequence
from specs.ssd_state_update import inputs
from stablekern.ops.ssd_state_update import ssd_state_update

BACKENDS = [b for b, reason in stablekern.available_backends("ssd_state_update").items() if reason is None]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with stablekern.use_backend(request.param):
        yield request.param


def case(*sizes: int, dtype=torch.float32):
    args, optional = inputs(torch.Generator().manual_seed(3), *sizes)
    return [a.to(dtype) for a in args], {k: v.to(dtype) for k, v in optional.items()}


@pytest.mark.parametrize("clamp", [None, 0.6, (-0.2, 0.9)])
@pytest.mark.parametrize("half", [False, True])
def test_many_steps_are_the_scan(backend, clamp, half):
    """Outputs and last state to the rounding of the dtype; prefill by `ssd_scan`, then one step after the other."""
    dtype = torch.bfloat16 if half else torch.float64
    (x, dt, A, B, C), optional = sequence(torch.Generator().manual_seed(7), 2, 40, 6, 5, 2, 19)
    x, dt, A, B, C, z = (t.to(dtype) for t in (x, dt, A, B, C, optional["z"]))
    fixed = {"D": optional["D"].to(dtype), "dt_bias": optional["dt_bias"].to(dtype)}
    fixed |= {"dt_softplus": True, "state_clamp": clamp}
    whole, last = stablekern.ssd_scan(x, dt, A, B, C, z=z, return_last_state=True, **fixed)
    cut = 12
    _, state = stablekern.ssd_scan(
        x[:, :cut], dt[:, :cut], A, B[:, :cut], C[:, :cut], return_last_state=True, **fixed
    )  # fmt: skip
    before = state.data_ptr()
    for t in range(cut, 40):
        y = ssd_state_update(state, x[:, t], dt[:, t], A, B[:, t], C[:, t], z=z[:, t], **fixed)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, last)
    assert state.data_ptr() == before


def test_a_strided_state_changes_in_place(backend):
    args, optional = case(2, 4, 3, 2, 6)
    room = torch.full((2, 4, 3, 12), 7.0)
    state = room[..., ::2]
    state.copy_(args[0])
    dense = args[0].clone()
    y = ssd_state_update(state, *args[1:], **optional)
    torch.testing.assert_close(y, ssd_state_update(dense, *args[1:], **optional), rtol=0, atol=0)
    torch.testing.assert_close(state, dense, rtol=0, atol=0)
    assert not torch.equal(dense, args[0]) and bool((room[..., 1::2] == 7).all()), "what lies between is not touched"


def test_same_bits_for_any_number_of_threads(backend):
    args, optional = case(64, 16, 16, 2, 32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            state = args[0].clone()
            results.append((ssd_state_update(state, *args[1:], state_clamp=0.5, **optional), state))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_channel_stays_alone(backend, value):
    args, optional = case(2, 3, 5, 1, 7)
    clean = ssd_state_update(args[0].clone(), *args[1:], **optional)
    args[1][1, 2, 3] = value
    state = args[0].clone()
    y = ssd_state_update(state, *args[1:], **optional)
    bad = torch.zeros_like(y, dtype=torch.bool)
    bad[1, 2, 3] = True
    assert not torch.isfinite(state[bad]).any() and torch.isfinite(state[~bad]).all()
    assert not torch.isfinite(y[bad]).any()
    torch.testing.assert_close(y[~bad], clean[~bad], rtol=0, atol=0)


def test_nan_passes_the_clamp_and_what_saturates_stands_on_the_bound(backend):
    args, _ = case(1, 2, 3, 1, 4)
    args[0][0, 0, 0, 0] = float("nan")
    args[0][0, 1] = 1e9
    args[2].zero_()
    ssd_state_update(*args, state_clamp=(-0.5, 0.25))
    assert torch.isnan(args[0][0, 0, 0, 0]) and bool((args[0][0, 1] == 0.25).all())
    assert float(args[0].nan_to_num().max()) == 0.25 and float(args[0].nan_to_num().min()) >= -0.5


def test_nothing_leaks_out_of_unused_lanes(backend):
    """Infinite inputs make lanes beyond the last state 0 * inf; no output may see that."""
    args, _ = case(2, 1, 3, 1, 2)
    args[1].abs_(), args[5].abs_()
    args[4][:] = float("inf")
    assert torch.isinf(ssd_state_update(*args)).all() and torch.isinf(args[0]).all()


def test_gradients_are_refused_only_where_they_are_recorded(backend):
    args, optional = case(2, 4, 3, 2, 6)
    optional["D"].requires_grad_()
    with pytest.raises(RuntimeError, match="call it under `torch.no_grad"):
        ssd_state_update(*args, **optional)
    with torch.no_grad():
        assert not ssd_state_update(*args, **optional).requires_grad
