"""What the native library reads of Python tensors in one pass: `all_finite`, `gradients_finite`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stablekern import _load
from stablekern.health.watch import _versions

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
