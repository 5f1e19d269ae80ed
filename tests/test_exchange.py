"""What the native library reads of Python tensors in one pass: `all_finite`, `gradients_finite`, `gather_adamw`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from stablekern import _load, use_backend
from stablekern.health.watch import _versions
from stablekern.optim import ComplexAdamW, _adamw_step, complex_adamw

REASON = _load.native_reason("grad_guard")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")
NAN, INF = float("nan"), float("inf")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def all_finite(tensors):
    return _load.native_module().all_finite(tensors)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_and_every_kind_is_seen(dtype):
    good = torch.full((37,), torch.finfo(dtype).max, dtype=dtype)
    good[1::3] = -torch.finfo(dtype).max
    good[2::3] = 0
    assert all_finite([good]) is True and all_finite([good, torch.empty(0, dtype=dtype), good[:0]]) is True
    for value in (NAN, -NAN, INF, -INF):
        for place in range(good.numel()):
            bad = good.clone()
            bad[place] = value
            assert all_finite([good, bad]) is False, (value, place)
    if dtype.is_complex:
        good.imag[5] = INF
        assert all_finite([good]) is False


@pytest.mark.parametrize("place", [0, 16383, 16384, 524287, 600000])
def test_large_tensors_are_read_by_all_threads(place):
    x = torch.zeros(600001)
    assert all_finite([x, torch.ones(3)]) is True
    x[place] = NAN
    assert all_finite([torch.ones(3), x]) is False and all_finite([x]) is False


def test_what_is_no_plain_tensor_is_left_to_others():
    class Own(torch.Tensor):
        pass

    plain = torch.ones(4, 4)
    subclasses = [plain.as_subclass(Own), nn.Parameter(plain)]
    for other in [plain.T[:, 1:], plain.to_sparse(), plain.int(), plain.to("meta"), *subclasses, 3]:
        assert all_finite([plain, other]) is None
    assert all_finite([plain.requires_grad_() * 2]) is True  # history does not matter
    assert all_finite([torch.full((2,), 1j * NAN).conj()]) is False


def test_gradients_are_read_again_only_if_written_to():
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(4)]
    for p in parameters[:3]:
        p.grad = torch.ones(3)
    seen = torch.zeros((5, 2), dtype=torch.int64)

    def finite(unless_seen):
        return _load.native_module().gradients_finite(parameters, seen.data_ptr(), unless_seen)

    assert finite(True) is True
    gradients = [p.grad for p in parameters[:3]]
    assert seen.tolist() == [[3, 0], *map(list, _versions(gradients)), [0, 0]]
    gradients[1].numpy()[2] = NAN  # no new version: it is not looked at
    assert finite(True) is True and finite(False) is False
    before = seen.tolist()
    gradients[1].mul_(1)
    assert finite(True) is False and seen.tolist() == before
    parameters[1].grad = None
    assert finite(True) is True and seen[0, 0] == 2
    parameters[3].grad = torch.full((3,), INF)
    assert finite(True) is False
    parameters[3].grad = torch.ones(3).to_sparse()
    assert finite(True) is None


# ---- the table of an optimizer's step --------------------------------------------------------------------------------


def stepped(options, dtypes=(torch.float32, torch.complex64, torch.float64, torch.complex128)):
    """Parameters of several shapes that have taken a step, one of them without a gradient, and their optimizer."""
    torch.manual_seed(0)
    shapes = [(3, 5), (), (0,), (1, 7), (6,)]
    params = [nn.Parameter(torch.randn(shape, dtype=dtype)) for dtype in dtypes for shape in shapes]
    optimizer = ComplexAdamW(params, lr=0.1, temperature=0.1, seed=5, **options)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    params[1].grad = None
    return params, optimizer


def gathered(params, optimizer, first=0):
    group = optimizer.param_groups[0]
    options = {"coupled": group["coupled"], "amsgrad": group["amsgrad"]}
    return _adamw_step.gathered(params, optimizer.state, first, **options)


@pytest.mark.parametrize("options", [{}, {"coupled": False}, {"amsgrad": True}, {"amsgrad": True, "coupled": False}])
def test_the_table_is_that_of_the_lists(options, monkeypatch):
    """Gathered in C, and row by row from the lists that the op takes."""
    params, optimizer = stepped(options)
    found, grads, table = gathered(params, optimizer, first=7)
    assert [id(p) for p in found] == [id(p) for p in params if p.grad is not None]
    assert [id(grad) for grad in grads] == [id(p.grad) for p in found]
    tables = []
    monkeypatch.setattr(_adamw_step, "step_rows", lambda table, *_: tables.append(table))
    monkeypatch.setattr(complex_adamw, "gathered", lambda *_, **__: None)
    optimizer.step()
    (wanted,) = tables
    assert torch.equal(table[:, 3], wanted[:, 3] + 7)  # of the streams
    assert torch.equal(table[:, :3], wanted[:, :3]) and torch.equal(table[:, 4:], wanted[:, 4:])


@pytest.mark.parametrize("options", [{}, {"coupled": False}, {"amsgrad": True, "maximize": True}])
def test_gathered_steps_are_those_of_the_op(options, monkeypatch):
    params, optimizer = stepped(options)
    both = copy.deepcopy((params, optimizer))
    for p, q in zip(params, both[0], strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    versions = [p._version for p in params]
    for _ in range(3):
        optimizer.step()
    assert [p._version - before for p, before in zip(params, versions, strict=True)] == [
        3 * (p.grad is not None) for p in params
    ]
    monkeypatch.setattr(complex_adamw, "gathered", lambda *_, **__: None)
    for _ in range(3):
        both[1].step()
    for p, q in zip(params, both[0], strict=True):
        assert torch.equal(p, q)
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, both[1].state[q][key]), key
    assert optimizer.state[params[0]]["step"] == 4 and optimizer.state[params[1]]["step"] == 1


def _with_state(key, change):
    def spoil(params, optimizer):
        state = optimizer.state[params[-1]]
        state[key] = change(state[key])

    return spoil


def _with_grad(change):
    def spoil(params, optimizer):
        params[-1].grad = change(params[-1].grad)

    return spoil


class _Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "spoil",
    [
        _with_grad(torch.conj),
        _with_grad(torch._neg_view),
        _with_grad(torch.Tensor.to_sparse),
        _with_grad(lambda grad: grad.as_subclass(_Own)),
        _with_grad(lambda grad: torch.stack((grad, grad), dim=-1)[..., 0]),
        _with_state("exp_avg", torch.real),
        _with_state("exp_avg", lambda moment: moment[:-1]),
        _with_state("exp_avg_sq", torch.Tensor.float),
        _with_state("exp_avg_sq", lambda moment: moment.to(torch.complex128)),
        _with_state("step", torch.Tensor.float),
        _with_state("step", lambda step: step.repeat(2)),
        _with_state("step", float),
        lambda params, optimizer: optimizer.state.pop(params[-1]),
        lambda params, optimizer: optimizer.state[params[-1]].pop("exp_avg"),
        lambda params, optimizer: setattr(params[-1], "data", params[-1].data.conj()),
    ],
)
def test_a_step_of_what_is_not_plain_is_left_to_the_op(spoil):
    params, optimizer = stepped({})
    assert gathered(params, optimizer) is not None
    spoil(params, optimizer)
    assert gathered(params, optimizer) is None
    assert gathered(params[:-1], optimizer) is not None


def test_half_precision_and_forced_backends_are_left_to_the_op():
    params, optimizer = stepped({}, dtypes=(torch.bfloat16,))
    assert gathered(params, optimizer) is None
    params, optimizer = stepped({})
    with use_backend("torch"):
        assert gathered(params, optimizer) is None
    assert gathered(params, optimizer) is not None and gathered([], optimizer) is None


def test_a_mode_sees_the_op():
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.name())
            return function(*args, **(kwargs or {}))

    _, optimizer = stepped({})
    with Watch():
        optimizer.step()
    assert "stablekern::complex_adamw" in seen
