"""The pool of large results: memory is used again, never while a tensor holds it, and given back on demand."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import stablekern
from stablekern import _load, _memory, errors

MB = 1 << 20
LIKE = torch.zeros(1)


@pytest.fixture(autouse=True)
def native(monkeypatch):
    if reason := _load.native_reason():
        pytest.skip(reason)
    monkeypatch.delenv("STABLEKERN_POOL_MB", raising=False)
    gc.collect()
    stablekern.empty_cache()
    yield _load.native_module()
    stablekern.empty_cache()


def held(native) -> int:
    return native.pool_bytes()[0]


def test_the_next_result_of_that_size_has_the_memory_of_the_last(native):
    x = _memory.empty((1000, 1000), LIKE)
    address = x.data_ptr()
    assert address % 64 == 0 and held(native) == 0
    del x
    assert held(native) >= 4 * 10**6
    assert _memory.empty((1000, 1000), LIKE).data_ptr() == address
    assert _memory.empty((999, 998), LIKE, torch.int32).data_ptr() != address  # no type that results have


@pytest.mark.parametrize("dtype", [*_memory._TYPES], ids=str)
def test_a_pooled_tensor_is_a_plain_one(dtype, tmp_path):
    x = _memory.empty((3, 700, 500), LIKE, dtype)
    assert type(x) is torch.Tensor and x.is_contiguous() and x.shape == (3, 700, 500) and x.dtype == dtype
    assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
    values = torch.arange(x.numel(), dtype=torch.float64).remainder(7).reshape(x.shape).to(dtype)
    x.copy_(values)
    torch.save(x, tmp_path / "x.pt")
    for other in (x.clone(), copy.deepcopy(x), torch.load(tmp_path / "x.pt"), x.share_memory_()):
        assert torch.equal(other, values)


def test_live_tensors_and_their_views_share_no_memory(native):
    torch.manual_seed(0)
    alive: list[tuple[torch.Tensor, float]] = []
    for number in range(60):
        x = _memory.empty((int(torch.randint(2**18, 2**21, ())),), LIKE)
        x.fill_(number)
        alive.append((x[7::3], number) if number % 2 else (x, number))
        if len(alive) > 6:
            alive.pop(int(torch.randint(len(alive), ())))
        del x
        for tensor, value in alive:
            assert bool((tensor == value).all())


def test_at_most_the_limit_is_kept(native, monkeypatch):
    monkeypatch.setenv("STABLEKERN_POOL_MB", "16")
    tensors = [_memory.empty((2 * MB,), LIKE) for _ in range(6)]  # 8 MiB each
    tensors.clear()
    assert 0 < held(native) <= 16 * MB
    monkeypatch.setenv("STABLEKERN_POOL_MB", "0")
    before = native.pool_bytes()[1]
    x = _memory.empty((2 * MB,), LIKE)
    assert native.pool_bytes()[1] == before, "not from the pool"
    del x
    monkeypatch.setenv("STABLEKERN_POOL_MB", "-1")
    with pytest.raises(errors.SettingError, match="STABLEKERN_POOL_MB"):
        _memory.empty((2 * MB,), LIKE)


def test_a_small_request_does_not_take_a_large_block(native):
    x = _memory.empty((16 * MB,), LIKE)
    del x
    small = _memory.empty((MB // 2,), LIKE)
    assert held(native) >= 64 * MB and small.numel() == MB // 2


def test_empty_cache_gives_back_what_no_tensor_holds(native):
    x, y = (_memory.empty((MB,), LIKE).fill_(1) for _ in range(2))
    del x
    assert stablekern.empty_cache() == 4 * MB
    assert held(native) == 0 and bool((y == 1).all()) and stablekern.empty_cache() == 0


def test_threads(native):
    wrong = []

    def work(number: int) -> None:
        for i in range(200):
            x = _memory.empty((MB // 2 + 1000 * (i % 5),), LIKE).fill_(number)
            if not bool((x == number).all()):
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_the_system_cannot_give_is_a_memory_error_and_changes_nothing(native):
    before = native.pool_bytes()
    with pytest.raises(MemoryError):
        _memory.empty((2**55,), LIKE)
    assert native.pool_bytes() == before


def test_fake_and_meta_tensors_stay_fake():
    with FakeTensorMode():
        assert type(_memory.empty((MB,), torch.zeros(1))) is not torch.Tensor
    assert _memory.empty((MB,), torch.zeros(1, device="meta")).is_meta


def test_ops_give_the_same_bits_with_and_without(monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 19, 960, 16, requires_grad=True)
    results = []
    for limit in ("512", "512", "0"):
        monkeypatch.setenv("STABLEKERN_POOL_MB", limit)
        edges = stablekern.cosine_edges(x)
        results.append((edges.detach().clone(), torch.autograd.grad(edges.square().sum(), x)[0]))
    for edges, grad in results[1:]:
        assert torch.equal(edges, results[0][0]) and torch.equal(grad, results[0][1])
