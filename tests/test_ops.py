"""The one suite: every op, on every backend that this machine has, on every sample of its spec."""

from __future__ import annotations

import functools
import zlib
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import stablekern
from specs import OpSpec, Sample, all_specs
from stablekern import _registry
from stablekern.errors import BackendUnavailableError

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SPECS = all_specs()


@functools.cache
def samples_of(spec: OpSpec) -> list[Sample]:
    return spec.samples(torch.Generator().manual_seed(zlib.crc32(spec.name.encode())))


def backends_of(spec: OpSpec, device: str) -> list[str]:
    """Backends for which the op, or any dispatcher op of its name, has a launcher; plain torch for composites."""
    if not spec.dispatched:
        return ["default"]
    return [b for b in _registry._ORDER[device] if b in _registry._launchers[f"{spec.name}_fwd"][device]]


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


def cast(value, dtype: torch.dtype, device: str, *, grad: bool = False):
    """Floating tensors to `dtype` (complex ones to its complex partner), strides kept; all tensors to `device`."""

    def one(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_complex():
            target = torch.complex128 if dtype == torch.float64 else torch.complex64
        else:
            target = dtype if leaf.is_floating_point() else leaf.dtype
        # `clone` after `to` keeps permuted strides; a strided view is rebuilt as one by `as_strided` on its storage.
        moved = leaf.to(device)
        dense = moved.to(target) if moved.dtype != target else moved.clone()
        if not leaf.is_contiguous() and dense.is_contiguous() and leaf.numel() > 1:
            wide = torch.zeros(*leaf.shape, 2, dtype=target, device=device)
            wide[..., 0] = dense
            dense = wide[..., 0].detach()
        return dense.detach().requires_grad_(grad and (target.is_floating_point or target.is_complex))

    return tree_map(one, value)


def leaves(value) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def run(spec: OpSpec, function, sample: Sample, dtype, device, gradients: bool):
    """Compared outputs, then the gradients of one fixed random linear loss of them."""
    args, kwargs = cast((sample.args, sample.kwargs), dtype, device, grad=gradients)
    outputs = [o for o in spec.view(function(*args, **kwargs), sample) if o is not None]
    if not gradients:
        return [o.detach() for o in outputs], []
    inputs = [leaf for leaf in leaves((args, kwargs)) if leaf.requires_grad]
    smooth = [o for o in outputs if o.requires_grad]
    g = torch.Generator().manual_seed(5)
    weights = [torch.randn(o.shape, generator=g, dtype=torch.float64).to(o.device) for o in smooth]
    weights = [
        w.to(o.dtype) if not o.is_complex() else torch.complex(w, w.flip(-1)).to(o.dtype)
        for w, o in zip(weights, smooth, strict=True)
    ]
    grads = torch.autograd.grad(smooth, inputs, weights, allow_unused=True, materialize_grads=True) if smooth else []
    return [o.detach() for o in outputs], list(grads)


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest deviation over the largest exact magnitude."""
    if not exact.numel():
        return 0.0
    scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual.to(exact.dtype) - exact).abs().max() / scale)


def check_close(label: str, ours: Tensor, plain: Tensor, exact: Tensor, spec: OpSpec) -> None:
    assert ours.shape == exact.shape, f"{label}: shape {tuple(ours.shape)} for {tuple(exact.shape)}"
    if not exact.dtype.is_floating_point and not exact.is_complex():
        torch.testing.assert_close(ours, exact, rtol=0, atol=0)
        return
    rounded = exact.to(ours.dtype)
    finite = torch.isfinite(rounded)
    assert torch.equal(torch.isfinite(ours), finite), f"{label}: non-finite entries differ from the exact result's"
    torch.testing.assert_close(ours[~finite], rounded[~finite], equal_nan=True)
    ours, plain, exact = ours[finite], plain[finite], exact[finite]
    eps = torch.finfo(ours.dtype).eps
    bound = spec.slack * error(plain.nan_to_num(0.0), exact) + spec.floor_ulps * eps
    measured = error(ours, exact)
    assert measured <= bound, f"{label}: error {measured:.2e} above {bound:.2e}"


def supported(spec: OpSpec, backend: str, function):
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
    gradients = spec.differentiable and sample.gradients
    for dtype in sample.dtypes or spec.dtypes:
        # The exact result of the *rounded* inputs: what is measured is the computation.
        args, kwargs = cast((sample.args, sample.kwargs), dtype, "cpu")
        rounded = replace(sample, args=args, kwargs=kwargs)
        exact = run(spec, spec.reference, rounded, torch.float64, "cpu", gradients)
        plain = run(spec, spec.reference, rounded, dtype, "cpu", gradients)

        ours = supported(spec, backend, run)(spec, spec.op, rounded, dtype, device, gradients)
        for kind, a, b, c in zip(("output", "gradient"), ours, plain, exact, strict=True):
            assert len(a) == len(c), f"{kind}s: {len(a)} for {len(c)}"
            for index, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
                assert x.dtype == y.dtype, f"{kind} {index}: {x.dtype} for {y.dtype}"
                check_close(f"{kind} {index} in {dtype}", x.cpu(), y, z, spec)


@pytest.mark.parametrize(("spec", "device", "backend", "sample"), cases(gradcheck=True))
def test_gradcheck(spec, device, backend, sample):
    args, kwargs = cast((sample.args, sample.kwargs), torch.float64, device, grad=True)
    flat, tree = tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def function(*inputs):
        filled = list(flat)
        for i, x in zip(where, inputs, strict=True):
            filled[i] = x
        a, k = tree_unflatten(filled, tree)
        return tuple(o for o in spec.view(spec.op(*a, **k), sample) if o is not None and o.requires_grad)

    check = supported(spec, backend, torch.autograd.gradcheck)
    assert check(function, tuple(flat[i] for i in where), fast_mode=False, atol=1e-6, rtol=1e-4, nondet_tol=0.0)


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
