"""The one suite: every op, on every backend that this machine has, on every sample of its spec."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

import stablekern
from specs import all_specs
from stablekern.errors import BackendUnavailableError
from stablekern.testing import suite
from stablekern.testing.suite import backends_of, cast, compared, gradcheck, leaves, run

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SPECS = all_specs()


samples_of = functools.cache(suite.samples_of)


def cases(*, gradcheck: bool = False) -> list:
    found = []
    for spec in SPECS:
        for device in DEVICES:
            for backend in backends_of(spec, device):
                interpreted = spec.interpreted if (device, backend) == ("cpu", "triton") else None
                for sample in samples_of(spec):
                    if interpreted is not None and (gradcheck or sample.name not in interpreted):
                        continue
                    if gradcheck and not (sample.gradcheck and spec.differentiable):
                        continue
                    label = f"{spec.name}-{device}-{backend}-{sample.name}"
                    found.append(pytest.param(spec, device, backend, sample, id=label))
    return found


def supported(spec, backend: str, function):
    """The op under a forced backend; a sample that the backend does not support is a skip that says why."""

    def call(*args, **kwargs):
        if backend == "default":
            return function(*args, **kwargs)
        try:
            with stablekern.use_backend(backend):
                return function(*args, **kwargs)
        except BackendUnavailableError as reason:
            pytest.skip(str(reason))

    return call


@pytest.mark.parametrize(("spec", "device", "backend", "sample"), cases())
def test_matches_reference(spec, device, backend, sample, poisoned_empty):
    """Outputs and every gradient: at most `slack` times the error of plain torch in the same dtype, against float64."""
    for dtype in sample.dtypes or spec.dtypes:
        for found in compared(spec, supported(spec, backend, run), sample, dtype, device):
            assert found.error <= found.tolerance, f"{found.kind}: error {found.error:.2e} above {found.tolerance:.2e}"


@pytest.mark.parametrize(("spec", "device", "backend", "sample"), cases(gradcheck=True))
def test_gradcheck(spec, device, backend, sample):
    assert gradcheck(spec, sample, device, supported(spec, backend, torch.autograd.gradcheck))


@pytest.mark.parametrize(("spec", "device", "backend", "sample"), cases())
def test_same_bits_twice(spec, device, backend, sample):
    if not spec.deterministic:
        pytest.skip("documented as not reproducible")
    gradients = spec.differentiable and sample.gradients
    dtype = (sample.dtypes or spec.dtypes)[0]
    first, second = (
        supported(spec, backend, lambda: run(spec, spec.op, sample, dtype, device, gradients))() for _ in range(2)
    )
    for a, b in zip(tree_flatten(first)[0], tree_flatten(second)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class _Recorder(TorchDispatchMode):
    """Collects the calls of our dispatcher ops with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "stablekern":
            self.calls.append((function, tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, args)))
        return function(*args, **(kwargs or {}))


OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize(
    ("spec", "sample"),
    [
        pytest.param(spec, sample, id=f"{spec.name}-{sample.name}")
        for spec in SPECS
        if spec.dispatched
        for sample in samples_of(spec)
        if sample.name in ("typical", "permuted", "empty", "length-1")
    ],
)
def test_registration(spec, sample):
    """opcheck of every dispatcher op that a forward and backward call, with the very arguments they call it with."""
    for device in DEVICES:
        with _Recorder() as recorder:
            run(spec, spec.op, sample, spec.dtypes[0], device, spec.differentiable and sample.gradients)
        assert recorder.calls, "the op does not reach the dispatcher"
        for function, args in recorder.calls:
            torch.library.opcheck(function, args, test_utils=OPCHECKS)


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in SPECS])
def test_compiles_in_one_graph(spec):
    """`torch.compile(fullgraph=True)`, twice with different sizes; the same results as eager."""
    for device in DEVICES:
        torch.compiler.reset()
        compiled = torch.compile(spec.op, fullgraph=True, backend="aot_eager", dynamic=None)
        for sample in samples_of(spec):
            if sample.name not in ("typical", "length-1", "odd"):
                continue
            gradients = spec.differentiable and sample.gradients
            eager = run(spec, spec.op, sample, spec.dtypes[0], device, gradients)
            traced = run(spec, compiled, sample, spec.dtypes[0], device, gradients)
            for a, b in zip(tree_flatten(traced)[0], tree_flatten(eager)[0], strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in SPECS if s.differentiable and s.dispatched])
def test_second_derivatives_are_refused(spec):
    """A hand-written backward would silently drop the second-order terms, so it says no."""
    sample = next(s for s in samples_of(spec) if s.name == "typical")
    args, kwargs = cast((sample.args, sample.kwargs), torch.float64, "cpu", grad=True)
    outputs = [o for o in spec.view(spec.op(*args, **kwargs), sample) if o is not None and o.requires_grad]
    inputs = [leaf for leaf in leaves((args, kwargs)) if leaf.requires_grad]
    with pytest.raises(RuntimeError, match=r"stablekern\.\w+: second derivatives"):
        torch.autograd.grad(sum(o.real.sum() for o in outputs), inputs, create_graph=True, allow_unused=True)


@pytest.mark.parametrize(
    ("spec", "call", "kind", "text"),
    [
        pytest.param(spec, *case, id=f"{spec.name}-{number}")
        for spec in SPECS
        for number, case in enumerate(spec.errors)
    ],
)
def test_errors_say_what_came(spec, call, kind, text):
    with pytest.raises(kind, match=text) as caught:
        call()
    assert str(caught.value).startswith(f"stablekern.{spec.name}: ")
