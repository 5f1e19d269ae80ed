"""What the suite does with one sample of one op: the exact result, that of plain torch, ours; errors and tolerances.

An op's error is the largest deviation from the float64 result of the same (rounded) inputs, over the largest exact
magnitude. Its tolerance is `slack` times that of the reference in the dtype under test, plus a few ulp: twice what
plain torch does to the same inputs, measured and not chosen. `tests/test_ops.py` and `python -m stablekern.testing`
both run on this.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from stablekern import _registry

__all__ = [
    "Comparison",
    "MismatchError",
    "backends_of",
    "cast",
    "compare",
    "compared",
    "error",
    "gradcheck",
    "leaves",
    "run",
    "samples_of",
]


class MismatchError(AssertionError):
    """A result that has no error to speak of: another shape or dtype, or other entries that are not finite."""


class Comparison(NamedTuple):
    """The error of an output or gradient, what it may be, and that of plain torch in the same dtype."""

    kind: str
    error: float
    tolerance: float
    plain: float


def samples_of(spec: Any) -> list[Any]:
    """The samples of a spec, the same ones in every run."""
    return spec.samples(torch.Generator().manual_seed(zlib.crc32(spec.name.encode())))


def backends_of(spec: Any, device: str) -> list[str]:
    """Backends for which the op, or any dispatcher op of its name, has a launcher; plain torch for composites."""
    if not spec.dispatched:
        return ["default"]
    return [b for b in _registry._ORDER[device] if b in _registry._launchers[f"{spec.name}_fwd"][device]]


def cast(value: Any, dtype: torch.dtype, device: str, *, grad: bool = False) -> Any:
    """Floating tensors to `dtype` (complex ones to its complex partner), strides kept; all tensors to `device`."""

    def one(leaf: Any) -> Any:
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


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def run(
    spec: Any, function: Callable[..., Any], sample: Any, dtype: torch.dtype, device: str, gradients: bool
) -> tuple[list[Tensor], list[Tensor]]:
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


def compare(kind: str, ours: Tensor, plain: Tensor, exact: Tensor, spec: Any) -> Comparison:
    """One tensor of ours, of plain torch in the same dtype, and the exact one in float64. NaN must meet NaN."""
    if ours.shape != exact.shape:
        raise MismatchError(f"{kind}: shape {tuple(ours.shape)} for {tuple(exact.shape)}")
    if not exact.dtype.is_floating_point and not exact.is_complex():
        return Comparison(kind, 0.0 if torch.equal(ours, exact) else float("inf"), 0.0, 0.0)
    rounded = exact.to(ours.dtype)
    finite = torch.isfinite(rounded)
    if not torch.equal(torch.isfinite(ours), finite):
        raise MismatchError(f"{kind}: non-finite entries differ from the exact result's")
    if not torch.equal(ours[~finite].nan_to_num(), rounded[~finite].nan_to_num()):
        raise MismatchError(f"{kind}: an infinity has another sign, or is a NaN")
    ours, plain, exact = ours[finite], plain[finite], exact[finite]
    floor = error(plain.nan_to_num(0.0), exact)
    bound = spec.slack * floor + spec.floor_ulps * torch.finfo(ours.dtype).eps
    return Comparison(kind, error(ours, exact), bound, floor)


def compared(spec: Any, run_ours: Callable[..., Any], sample: Any, dtype: torch.dtype, device: str) -> list[Comparison]:
    """Every output and gradient of a sample; `run_ours` is `run`, under the backend that is looked at."""
    gradients = spec.differentiable and sample.gradients
    # The exact result of the *rounded* inputs: what is measured is the computation.
    args, kwargs = cast((sample.args, sample.kwargs), dtype, "cpu")
    rounded = replace(sample, args=args, kwargs=kwargs)
    exact = run(spec, spec.reference, rounded, torch.float64, "cpu", gradients)
    plain = run(spec, spec.reference, rounded, dtype, "cpu", gradients)
    ours = run_ours(spec, spec.op, rounded, dtype, device, gradients)
    found = []
    for kind, a, b, c in zip(("output", "gradient"), ours, plain, exact, strict=True):
        if len(a) != len(c):
            raise MismatchError(f"{kind}s: {len(a)} for {len(c)}")
        for index, (x, y, z) in enumerate(zip(a, b, c, strict=True)):
            if x.dtype != y.dtype:
                raise MismatchError(f"{kind} {index}: {x.dtype} for {y.dtype}")
            found.append(compare(f"{kind} {index} in {dtype}", x.cpu(), y, z, spec))
    return found


def gradcheck(spec: Any, sample: Any, device: str, check: Callable[..., bool] = torch.autograd.gradcheck) -> bool:
    """Derivatives of a small sample in float64 against differences."""
    args, kwargs = cast((sample.args, sample.kwargs), torch.float64, device, grad=True)
    flat, tree = tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        filled = list(flat)
        for i, x in zip(where, inputs, strict=True):
            filled[i] = x
        a, k = tree_unflatten(filled, tree)
        return tuple(o for o in spec.view(spec.op(*a, **k), sample) if o is not None and o.requires_grad)

    return check(function, tuple(flat[i] for i in where), fast_mode=False, atol=1e-6, rtol=1e-4, nondet_tol=0.0)
