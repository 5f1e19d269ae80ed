"""The choice of a backend: visible, forceable, loud when forced and missing."""

from __future__ import annotations

import pytest
import torch

import stablekern
from stablekern import _load, _registry
from stablekern.errors import BackendUnavailableError, SettingError


@pytest.fixture
def op(monkeypatch):
    """A throw-away op with two launchers that say who ran."""
    name = "registry_probe_fwd"
    if not hasattr(torch.ops.stablekern, name):
        _registry.define(f"{name}(Tensor x) -> Tensor", fake=lambda x: torch.empty_like(x))
    _registry._launchers[name] = {"cpu": {}, "cuda": {}}
    _registry.launcher(name, device="cpu", backend="torch")(lambda x: x + 1)
    _registry.launcher(
        name, device="cpu", backend="native", supports=lambda x: "more than 3 elements" if x.numel() > 3 else None
    )(lambda x: x + 2)
    monkeypatch.setattr(_registry, "_missing", lambda op, backend, device: None)
    yield torch.ops.stablekern.registry_probe_fwd.default
    del _registry._launchers[name]


def test_best_first_and_passed_over_when_unsupported(op):
    assert op(torch.zeros(3)).tolist() == [2, 2, 2]
    assert op(torch.zeros(4)).tolist() == [1, 1, 1, 1]
    assert _registry.backend_for("registry_probe", torch.zeros(4)) == "torch"


def test_forced_by_call_context_and_environment(op, monkeypatch, any_backend):
    with stablekern.use_backend("torch"):
        assert op(torch.zeros(1)).item() == 1
        with stablekern.use_backend("native"):
            assert op(torch.zeros(1)).item() == 2
        assert op(torch.zeros(1)).item() == 1
    assert op(torch.zeros(1)).item() == 2
    monkeypatch.setenv("STABLEKERN_BACKEND", "torch")
    assert op(torch.zeros(1)).item() == 1
    with stablekern.use_backend("native"):
        assert op(torch.zeros(1)).item() == 2
    monkeypatch.setenv("STABLEKERN_BACKEND", "cuda13")
    with pytest.raises(
        SettingError, match="`STABLEKERN_BACKEND` must be one of native, torch, triton, cuda: got 'cuda13'"
    ):
        op(torch.zeros(1))


def test_forced_and_missing_says_why(op, monkeypatch, any_backend):
    with stablekern.use_backend("native"), pytest.raises(BackendUnavailableError, match="more than 3 elements"):
        op(torch.zeros(4))
    with stablekern.use_backend("cuda"), pytest.raises(BackendUnavailableError, match="no kernel for .* on cpu"):
        op(torch.zeros(4))
    monkeypatch.setattr(
        _registry, "_missing", lambda op, backend, device: "no compiler" if backend == "native" else None
    )
    assert op(torch.zeros(1)).item() == 1
    with stablekern.use_backend("native"), pytest.raises(BackendUnavailableError, match="native: no compiler"):
        op(torch.zeros(1))


def test_a_kernel_that_raises_is_not_passed_over(op):
    @_registry.launcher("registry_probe_fwd", device="cpu", backend="native")
    def _(x):
        raise ZeroDivisionError("from the kernel")

    with pytest.raises(ZeroDivisionError, match="from the kernel"):
        op(torch.zeros(1))


def test_conjugate_views_of_launchers_survive_compilation(op):
    """A compiled graph calls ops with the dispatch key excluded that resolves them: x.conj() * x would be x * x."""
    _registry.launcher("registry_probe_fwd", device="cpu", backend="native")(lambda x: x.conj() * x + x.conj().imag)
    x = torch.tensor([3 + 4j])
    compiled = torch.compile(lambda x: op(x) + 0, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), torch.tensor([21 + 0j]))
    torch.testing.assert_close(compiled(x), op(x))


def test_direct_goes_past_the_dispatcher_unless_somebody_looks(op):
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    name, x = "registry_probe_fwd", torch.zeros(1)
    assert _registry.direct(name, x).item() == 2
    with Watch():
        assert _registry.direct(name, x).item() == 2
    assert f"stablekern.{name}.default" in seen
    assert _registry.direct(name, torch.empty(1, device="meta")).is_meta
    compiled = torch.compile(lambda x: _registry.direct(name, x) * 2, backend="eager", fullgraph=True)
    assert compiled(x).item() == 4


def test_available_backends_gives_reasons(monkeypatch):
    monkeypatch.setenv("STABLEKERN_NATIVE", "0")
    assert _load.native_reason() == "switched off by STABLEKERN_NATIVE"
    found = stablekern.available_backends("focal_loss")
    assert found["torch"] is None
    assert stablekern.available_backends("focal_loss_fwd").keys() == found.keys()
    if not torch.cuda.is_available():
        assert stablekern.available_backends("focal_loss", "cuda").keys() == {"triton", "torch"}
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert stablekern.available_backends("focal_loss")["triton"] == "on a CPU only under TRITON_INTERPRET=1"
    with pytest.raises(ValueError, match="`op` must be one of .*focal_loss_fwd.*: got 'nonesuch'"):
        stablekern.available_backends("nonesuch")
    with pytest.raises(ValueError, match="`device` must be one of 'cpu', 'cuda': got 'tpu'"):
        stablekern.available_backends("focal_loss", "tpu")
    with pytest.raises(ValueError, match="`name` must be one of"):
        stablekern.use_backend("fast")
