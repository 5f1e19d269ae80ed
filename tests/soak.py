"""Long randomised runs against float64: `python tests/soak.py [names of soaks] [--cases 10000]`, or `make soak`.

Case number i of a soak is a pure function of (name, i), so a run can stop anywhere and go on: what is done stands in
bench/results/soak/<name>.json. `tests/test_soak.py` runs the first one per cent.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

import stablekern
from stablekern.ops import linear_scan as linear_spine
from stablekern.ops import selective_scan as selective_spine
from stablekern.ops import ssd_scan as ssd_spine

RESULTS = Path(__file__).resolve().parent.parent / "bench" / "results" / "soak"


def _generator(name: str, case: int) -> torch.Generator:
    return torch.Generator().manual_seed(1_000_003 * case + sum(map(ord, name)))


def _integer(g: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=g))


def symmetric(g: torch.Generator, n: int, family: int) -> torch.Tensor:
    """(5, n, n) float64 symmetric matrices: dense, given spectra (clusters, graded, rank 1), graphs, at any scale."""
    q = torch.linalg.qr(torch.randn(5, n, n, generator=g, dtype=torch.float64)).Q
    if family == 0:
        a = q + q.mT
    elif family == 1:
        a = q @ torch.diag_embed(torch.randint(0, 3, (5, n), generator=g).double()) @ q.mT
    elif family == 2:
        a = q @ torch.diag_embed(10.0 ** (-6 * torch.rand(5, n, generator=g, dtype=torch.float64))) @ q.mT
    elif family == 3:
        a = q[..., :1] @ q[..., :1].mT
    elif family == 4:
        close = 1 + 1e-6 * torch.randn(5, n, generator=g, dtype=torch.float64)
        a = q @ torch.diag_embed(close) @ q.mT
    else:
        graph = (torch.rand(5, n, n, generator=g, dtype=torch.float64) < 2.5 / n).double().triu(1)
        a = stablekern.normalized_laplacian(graph + graph.mT)
    exponent = torch.tensor([0.0, 0.0, 20.0, -20.0, -30.0], dtype=torch.float64)
    return (a + a.mT) / 2 * (10.0**exponent)[:, None, None]


def eigh_case(case: int) -> dict[str, float]:
    """Residual and orthogonality over n eps (bound 5), order, and a finite `auto` gradient, float32 and float64."""
    g = _generator("eigh", case)
    n, family = _integer(g, 1, 32), _integer(g, 0, 5)
    exact = symmetric(g, n, family)
    worst = {"residual": 0.0, "orthogonality": 0.0}
    for dtype in (torch.float32, torch.float64):
        a = exact.to(dtype).requires_grad_()
        w, v, info = stablekern.eigh_ex(a)
        if info.any() or not bool((w.diff() >= 0).all()):
            raise AssertionError(f"eigh case {case}: n={n} family={family} info={info.tolist()}")
        unit = n * torch.finfo(dtype).eps
        ad, wd, vd = a.detach().double(), w.detach().double(), v.detach().double()
        norm = torch.linalg.matrix_norm(ad).clamp_min(torch.finfo(torch.float64).tiny)
        residual = torch.linalg.matrix_norm(ad @ vd - vd * wd[:, None, :]) / norm
        orthogonality = torch.linalg.matrix_norm(vd.mT @ vd - torch.eye(n, dtype=torch.float64))
        worst["residual"] = max(worst["residual"], float(residual.max()) / unit)
        worst["orthogonality"] = max(worst["orthogonality"], float(orthogonality.max()) / unit)
        # The scale of the cotangent follows the matrix's, so that the gradient itself is representable.
        weight = torch.randn(v.shape, generator=g, dtype=torch.float64) * norm[:, None, None]
        (gradient,) = torch.autograd.grad((v.double() * weight).sum(), a)
        if not bool(torch.isfinite(gradient).all()):
            raise AssertionError(f"eigh case {case}: n={n} family={family} {dtype}: non-finite gradient")
    if not max(worst.values()) <= 5:
        raise AssertionError(f"eigh case {case}: n={n} family={family}: {worst}")
    return worst


def _ssd_scan_sizes(inputs: dict, weights: tuple[torch.Tensor, torch.Tensor], options: dict) -> dict[str, torch.Tensor]:
    """For the gradients of steps and rates, the largest sum of the sizes of their terms, one of each state and step.

    They may cancel to a thousandth, and what rounds is their size. Every state is a head here, with a rate, a step and
    a bias of its own at every step, so that the terms are gradients.
    """
    named = {name: tensor.double() for name, tensor in inputs.items()}
    (b, length, h, p), n = named["x"].shape, named["B"].shape[3]
    shape = b, length, h, p, n

    def each(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(shape).reshape(b, length, h * p * n)

    def projection(M: torch.Tensor) -> torch.Tensor:
        return each(M.repeat_interleave(h // M.shape[2], dim=2)[:, :, :, None])[..., None]

    by_head = {name: each(named[name][..., None, None]) for name in ("dt", "A", "dt_bias") if name in named}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in by_head.items()}
    rest = {"x": each(named["x"][..., None])[..., None], "B": projection(named["B"]), "C": projection(named["C"])}
    if "initial_state" in named:
        rest["initial_state"] = named["initial_state"].reshape(b, h * p * n, 1, 1)
    weight = weights[0].double() * (torch.nn.functional.silu(named["z"]) if "z" in named else 1)
    y, last = ssd_spine.reference(**leaves, **rest, **options)
    loss = (y[..., 0] * each(weight[..., None])).sum() + (last.flatten(1) * weights[1].double().flatten(1)).sum()
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    found = {name: terms.abs().view(shape).sum((3, 4)) for name, terms in found.items()}
    return {name: (sizes if name == "dt" else sizes.sum((0, 1))).max() for name, sizes in found.items()}


def ssd_scan_case(case: int) -> dict[str, float]:
    """Outputs and gradients in float32 against float64, over the error of the sequential loop in float32 (bound 2).

    Each optional input in half of the cases, softplus and limits of the steps, either direction or both. Where rounding
    decides whether the clamp changes a state, gradients, which jump there, are not compared.
    """
    g = _generator("ssd_scan", case)
    b, length, h = _integer(g, 1, 3), _integer(g, 1, 70), _integer(g, 1, 5)
    p, n, groups = _integer(g, 1, 9), _integer(g, 1, 20), 1
    if h % 2 == 0 and _integer(g, 0, 1):
        groups = 2
    spread = 10.0 ** _integer(g, -2, 2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).float()

    inputs = {
        "x": normal(b, length, h, p), "dt": normal(b, length, h).abs() * 0.1 * spread, "A": -normal(h).abs() - 0.01,
        "B": normal(b, length, groups, n), "C": normal(b, length, groups, n),
    }  # fmt: skip
    clamp = (None, None, None, None, 0.5, (-0.3, 0.6), 4.0)[_integer(g, 0, 6)]
    weights = normal(b, length, h, p), normal(b, h, p, n)
    optional = {
        "D": normal(h, p) if _integer(g, 0, 1) else normal(h), "z": normal(b, length, h, p),
        "dt_bias": normal(h).abs() * 0.1 * spread, "initial_state": normal(b, h, p, n),
    }  # fmt: skip
    inputs |= {name: tensor for name, tensor in optional.items() if _integer(g, 0, 1)}
    options = {"dt_softplus": bool(_integer(g, 0, 1)), "state_clamp": clamp, "return_last_state": True}
    if way := (None, None, "reverse", "bidirectional" if groups == 2 else None)[_integer(g, 0, 3)]:
        options[way] = True
    raw = inputs["dt"].double() + inputs.get("dt_bias", torch.zeros(())).double()
    step = torch.nn.functional.softplus(raw) if options["dt_softplus"] else raw
    limits = tuple(step.flatten().quantile(torch.tensor([0.1, 0.8], dtype=torch.float64)).tolist())
    if _integer(g, 0, 2) == 0 and all(((step / limit - 1).abs() > 1e-5).all() for limit in limits):
        options["dt_limit"] = limits  # not where rounding decides whether a step is limited

    def run(function: Callable, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in inputs.items()}
        outputs = function(**leaves, **options)
        loss = sum((o * weight.to(dtype)).sum() for o, weight in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(("y", "last state", *leaves), (*(o.detach() for o in outputs), *grads), strict=True))

    plain, ours = run(ssd_spine.reference, torch.float32), run(stablekern.ssd_scan, torch.float32)
    exact, sizes = run(ssd_spine.reference, torch.float64), _ssd_scan_sizes(inputs, weights, options)
    if "D" in inputs:
        gate = torch.nn.functional.silu(inputs["z"]) if "z" in inputs else 1
        terms = (weights[0] * gate * inputs["x"]).abs().sum((0, 1) if inputs["D"].dim() == 2 else (0, 1, 3))
        sizes["D"] = terms.max()
    if clamp is not None:
        counts = [
            stablekern.ssd_scan(**{k: x.to(dtype) for k, x in inputs.items()}, **options, return_saturation=True)[-1]
            for dtype in (torch.float32, torch.float64)
        ]
        if (counts[0] != counts[1].float()).any():
            exact = {name: exact[name] for name in ("y", "last state")}
    worst = 0.0
    for name, truth in exact.items():
        scale = sizes.get(name, truth.abs().max()).clamp_min(1e-30)
        floor = 16 * torch.finfo(torch.float32).eps
        error = float((ours[name].double() - truth).abs().max() / scale)
        allowed = float((plain[name].double() - truth).abs().max() / scale) + floor
        if not error <= 2 * allowed:
            drawn = f"b={b} l={length} h={h} p={p} n={n} g={groups} {options} {list(inputs)}"
            raise AssertionError(f"ssd_scan case {case}: {drawn}, {name}: {error} for {allowed}")
        worst = max(worst, error / allowed)
    return {"error over that of the loop": worst}


def linear_scan_case(case: int) -> dict[str, float]:
    """As `ssd_scan_case`; real or complex, in either direction, gates up to 1.2, clamps from rare to constant."""
    g = _generator("linear_scan", case)
    shape = _integer(g, 1, 3), _integer(g, 1, 24), _integer(g, 1, 90)
    if _integer(g, 0, 3) == 0:  # a few long rows, which are composed
        shape = 1, _integer(g, 1, 5), _integer(g, 1000, 1500)
    complex_ = bool(_integer(g, 0, 1))
    dtypes = (torch.complex64, torch.complex128) if complex_ else (torch.float32, torch.float64)
    options = {"reverse": bool(_integer(g, 0, 1)), "state_clamp": (None, 0.5, 3.0)[_integer(g, 0, 2)]}

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=g, dtype=dtypes[1])

    gate = normal(*shape)
    gate = gate / gate.abs() * 1.2 * torch.rand(shape, generator=g, dtype=torch.float64)
    inputs = [t.to(dtypes[0]) for t in (gate, normal(*shape), normal(*shape[:2]))]
    weight = normal(*shape)

    def run(function: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        states = function(leaves[0], leaves[1], initial_state=leaves[2], **options)
        return [states.detach(), *torch.autograd.grad(states, leaves, weight.to(dtype))]

    plain, ours = run(linear_spine.reference, dtypes[0]), run(stablekern.linear_scan, dtypes[0])
    exact = run(linear_spine.reference, dtypes[1])
    worst = 0.0
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        scale, floor = truth.abs().max().clamp_min(1e-30), 16 * torch.finfo(torch.float32).eps
        error = float((mine.to(dtypes[1]) - truth).abs().max() / scale)
        allowed = float((theirs.to(dtypes[1]) - truth).abs().max() / scale) + floor
        if not error <= 2 * allowed:
            raise AssertionError(f"linear_scan case {case}: {shape} {dtypes[0]} {options}: {error} for {allowed}")
        worst = max(worst, error / allowed)
    return {"error over that of the loop": worst}


_Bounds = tuple[torch.Tensor, torch.Tensor]


def _bounds(clamp: Any) -> _Bounds | None:
    """The bounds of each state, to be broadcast to (d, n)."""
    if clamp is None:
        return None
    low, high = (torch.as_tensor(c) for c in (clamp if isinstance(clamp, tuple) else (-clamp, clamp)))
    return low[:, None] if low.dim() == 1 else low, high[:, None] if high.dim() == 1 else high


def _clamped(free: torch.Tensor, bounds: _Bounds | None) -> torch.Tensor:
    """The states after the clamp of a step; of complex ones the upper bound is that of the modulus."""
    if bounds is None:
        return free
    low, high = (bound.to(free.real.dtype) for bound in bounds)
    if not free.is_complex():
        return torch.clamp(free, low, high)
    outside = free.abs() > high
    return torch.where(outside, free * (high / torch.where(outside, free.abs(), 1.0)), free)


def _recurrence(
    exponent: torch.Tensor, entering: torch.Tensor, start: torch.Tensor, bounds: _Bounds | None, off: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """All states of a selective scan before and after the clamp, (l, b, d, n)."""
    # Moduli and angles of the complex decays are wrong, each by the same.
    wrong = complex(1 + off, off) if exponent.is_complex() else 1 + off
    free, states = [], [start]
    for decay, new in zip((exponent.exp() * wrong).unbind(0), entering.unbind(0), strict=True):
        free.append(decay * states[-1] + new)
        states.append(_clamped(free[-1], bounds))
    return torch.stack(free), torch.stack(states[1:])


class _Exact(NamedTuple):
    """A selective scan in float64: outputs and gradients, and what the clamp did."""

    results: dict[str, torch.Tensor]
    sizes: dict[str, torch.Tensor]  # the largest sum of the sizes of the terms that a result is a sum of
    changed: torch.Tensor  # which states the clamp changes, (l, b, d, n)
    undecided: torch.Tensor  # which are so near to a bound that rounding to float32 may decide


def _selective_scan_exact(
    inputs: dict[str, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor],
    options: dict[str, Any],
    off: float = 0.0,
) -> _Exact:
    """Everything that does not depend on the state is done for all steps at once, (l, b, d, n); only the recurrence is
    a loop. Its gradients with respect to exponents, tokens and readers are the terms of the others, or a factor away
    from them. All exponentials are wrong by the factor 1 + `off`, of complex ones the modulus and the angle.
    """
    named = {name: tensor.to(torch.promote_types(tensor.dtype, torch.float64)) for name, tensor in inputs.items()}
    A, D, start = named["A"], named.get("D"), named.get("initial_state")
    ahead = 0.0 if options["reverse"] else 0.5 if options["bidirectional"] else 1.0
    kappa = 2.0 if A.is_complex() else 1.0

    def turned(M: torch.Tensor) -> torch.Tensor:
        """With the time of what runs backwards flipped, where there is time."""
        if M.dim() == 2:
            return M
        first, back = M.tensor_split([round(ahead * M.shape[1])], dim=1)
        return torch.cat((first, back.flip(-1)), 1)

    u, delta, B, C = (turned(named[name]) for name in ("u", "delta", "B", "C"))
    weight, z = turned(weights[0].double()), turned(named["z"]) if "z" in named else None
    gate = torch.ones_like(u) if z is None else torch.nn.functional.silu(z)
    raw = delta + named["delta_bias"][:, None] if "delta_bias" in named else delta
    step = torch.nn.functional.softplus(raw) if options["delta_softplus"] else raw
    slope = torch.sigmoid(raw) if options["delta_softplus"] else torch.ones_like(raw)
    (b, channels, length), n = u.shape, A.shape[1]

    def steps(M: torch.Tensor) -> torch.Tensor:
        """(b, d, l) to (l, b, d, 1), (b, g, n, l) and (d, n) to (l, b, d, n)."""
        if M.dim() == 3:
            return M.permute(2, 0, 1)[..., None]
        if M.dim() == 2:
            return M.expand(length, b, channels, n)
        return M.repeat_interleave(channels // M.shape[1], 1).permute(3, 0, 1, 2)

    def back(M: torch.Tensor) -> torch.Tensor:
        return M.permute(1, 2, 0)

    def real(M: torch.Tensor) -> torch.Tensor:
        return M.real if M.is_complex() else M

    enter, leave, now, token = steps(B), steps(C).clone().requires_grad_(), steps(step), steps(step * u)
    exponent, entering = (now * A).requires_grad_(), (token * enter).requires_grad_()
    start = (A.new_zeros(b, channels, n) if start is None else start).requires_grad_()
    bounds = _bounds(options["state_clamp"])
    free, states = _recurrence(exponent, entering, start, bounds, off)
    read = states * leave
    grad_y = weight * gate
    q, G, by_leave, by_start = torch.autograd.grad(
        [kappa * real(read.sum(-1)), states[-1]],
        [exponent, entering, leave, start],
        [steps(grad_y)[..., 0], weights[1].to(A.dtype)],
    )
    free, read, last = free.detach(), read.detach(), states[-1].detach()

    def summed(terms: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
        """(l, b, d, n) to the shape of B or C."""
        return terms.sum((0, 1)) if M.dim() == 2 else terms.permute(1, 2, 3, 0).unflatten(1, (M.shape[1], -1)).sum(2)

    def results(of: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        """With `abs` for `of`, the sizes."""
        skipped, by_skip = (0.0, 0.0) if D is None else (of(D[:, None] * u), of(D[:, None] * grad_y))
        y = kappa * back(real(of(read)).sum(-1)) + skipped
        by_token = back(real(of(G * enter.conj())).sum(-1))
        by_step = (of(u) * by_token + back(real(of(q * A.conj())).sum(-1))) * slope
        found = {
            "y": turned(y * of(gate)), "last state": of(last),
            "u": turned(step * by_token + by_skip), "delta": turned(by_step), "A": of(q * now).sum((0, 1)),
            "B": turned(summed(of(G * token), B)), "C": turned(summed(of(by_leave), C)),
            "D": of(grad_y * u).sum((0, 2)), "delta_bias": by_step.sum((0, 2)), "initial_state": of(by_start),
        }  # fmt: skip
        if z is not None:
            sigmoid = torch.sigmoid(z)
            found["z"] = turned(of(weight * sigmoid * (1 + z * (1 - sigmoid))) * y)
        return {name: value for name, value in found.items() if name in {"y", "last state", *named}}

    changed = undecided = torch.zeros_like(free, dtype=torch.bool)
    if bounds is not None:
        low, high = bounds
        single = torch.complex64 if A.is_complex() else torch.float32
        rounded, _ = _recurrence(*(M.detach().to(single) for M in (exponent, entering, start)), bounds)
        bound = torch.maximum(low.abs(), high.abs())
        doubt = 2 * (rounded - free).abs().amax((0, 1)) + torch.finfo(torch.float32).eps * bound
        size = free.abs() if A.is_complex() else free
        changed = (size > high) | (size < low)
        undecided = ((size - high).abs() <= doubt) | ((size - low).abs() <= doubt)
    sizes = {name: value.max() for name, value in results(torch.abs).items()}
    return _Exact(results(lambda terms: terms), sizes, changed, undecided)


def selective_scan_case(case: int) -> dict[str, float]:
    """Outputs and gradients in float32 against float64, over the error of the sequential loop in float32 (bound 2).

    Every option: real and complex states, B and C of every form, optional inputs in half of the cases, softplus, either
    direction or both, bounds of every form. To twice the error of the loop comes what exponentials that are 2 ulp too
    large at every step would do (of complex ones 3, in modulus and angle), and the rounding of a result. Errors count
    relative to the largest sum of sizes of terms. Where rounding decides whether the clamp changes a state, gradients,
    which jump there, are not compared.
    """
    g = _generator("selective_scan", case)
    b, length, d, n = _integer(g, 1, 2), _integer(g, 1, 70), _integer(g, 1, 35), _integer(g, 1, 18)
    groups = 2 if d % 2 == 0 and _integer(g, 0, 1) else 1
    spread = 10.0 ** _integer(g, -2, 2)
    complex_ = _integer(g, 0, 2) == 0

    def normal(*shape: int, complex_: bool = False) -> torch.Tensor:
        dtypes = (torch.complex128, torch.complex64) if complex_ else (torch.float64, torch.float32)
        return torch.randn(shape, generator=g, dtype=dtypes[0]).to(dtypes[1])

    A = -normal(d, n).abs() - 0.01
    inputs = {
        "u": normal(b, d, length), "delta": normal(b, d, length) * 0.1 * spread,
        "A": torch.complex(A, 3 * normal(d, n)) if complex_ else A,
    }  # fmt: skip
    for name in "BC":
        constant = _integer(g, 0, 3) == 0
        inputs[name] = normal(*((d, n) if constant else (b, groups, n, length)), complex_=complex_)
    optional = {
        "D": normal(d), "z": normal(b, d, length), "delta_bias": normal(d).abs() * 0.1 * spread,
        "initial_state": normal(b, d, n, complex_=complex_),
    }  # fmt: skip
    inputs |= {name: tensor for name, tensor in optional.items() if _integer(g, 0, 1)}
    options: dict[str, Any] = {"delta_softplus": bool(_integer(g, 0, 1)), "state_clamp": None}
    if not options["delta_softplus"]:
        inputs["delta"] = inputs["delta"].abs()
    if _integer(g, 0, 1):
        each = normal(*((), (d,), (d, n))[_integer(g, 0, 2)]).abs()
        high, low = (0.5, each + 0.05)[_integer(g, 0, 1)], (-0.4, 0.04 - each)[_integer(g, 0, 1)]
        options["state_clamp"] = high if complex_ or _integer(g, 0, 1) else (low, high)
    two = d % 2 == 0 and (groups == 2 or inputs["B"].dim() == inputs["C"].dim() == 2)
    way = _integer(g, 0, 3)
    options |= {"reverse": way == 2, "bidirectional": way == 3 and two}
    packed = [name for name in "BC" if complex_ and inputs[name].dim() == 4 and _integer(g, 0, 1)]
    weights = normal(b, d, length), normal(b, d, n, complex_=complex_)
    shares = options["state_clamp"] is not None and bool(_integer(g, 0, 1))

    def run(function: Callable, more: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        given = inputs | {name: torch.view_as_real(inputs[name]).flatten(-2) for name in packed}
        leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
        y, last, *share = function(**leaves, **options, **more, return_last_state=True)
        grads = dict(zip(leaves, torch.autograd.grad([y, last], list(leaves.values()), weights), strict=True))
        for name in packed:
            grads[name] = torch.view_as_complex(grads[name].unflatten(-1, (length, 2)).contiguous())
        return {"y": y.detach(), "last state": last.detach()} | grads, share

    plain, _ = run(selective_spine.reference, {})
    ours, share = run(stablekern.selective_scan, {"return_saturation": shares})
    exact = _selective_scan_exact(inputs, weights, options)
    eps = torch.finfo(torch.float32).eps
    shifted = _selective_scan_exact(inputs, weights, options, (3 if complex_ else 2) * eps)
    drawn = f"selective_scan case {case}: b={b} l={length} d={d} n={n} g={groups} {options} {packed} {list(inputs)}"
    if shares:
        least = (exact.changed & ~exact.undecided).sum((0, 3))
        most = (exact.changed | exact.undecided).sum((0, 3))
        counted = (share[0] * length * n).round()
        if not bool(((least <= counted) & (counted <= most)).all()):
            raise AssertionError(f"{drawn}: saturation")
    names = ("y", "last state") if bool(exact.undecided.any()) else exact.results
    worst = 0.0
    for name in names:
        truth, scale = exact.results[name], exact.sizes[name].clamp_min(1e-30)
        error = float((ours[name] - truth).abs().max() / scale)
        exponentials = float((shifted.results[name] - truth).abs().max() / scale)
        allowed = float((plain[name] - truth).abs().max() / scale) + exponentials / 2 + eps
        if not error <= 2 * allowed:
            raise AssertionError(f"{drawn}, {name}: {error} for {allowed}")
        worst = max(worst, error / allowed)
    return {"error over that of the loop": worst}


SOAKS: dict[str, Callable[[int], dict[str, float]]] = {
    "eigh": eigh_case,
    "linear_scan": linear_scan_case,
    "selective_scan": selective_scan_case,
    "ssd_scan": ssd_scan_case,
}


def _write(path: Path, state: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(state, file, indent=1)
    os.replace(file.name, path)


def run(name: str, cases: int) -> dict:
    """Go on from where the last run stopped, to `cases`; the state is written every 200 cases and at the end."""
    path = RESULTS / f"{name}.json"
    state = json.loads(path.read_text()) if path.exists() else {"soak": name, "done": 0, "seconds": 0.0, "worst": {}}
    start, before = time.monotonic(), state["seconds"]
    for case in range(state["done"], cases):
        for key, value in SOAKS[name](case).items():
            state["worst"][key] = max(state["worst"].get(key, 0.0), value)
        state["done"] = case + 1
        if state["done"] % 200 == 0 or state["done"] == cases:
            state["seconds"] = round(before + time.monotonic() - start, 1)
            state["torch"] = torch.__version__
            _write(path, state)
            sys.stderr.write(f"\r{name}: {state['done']}/{cases} {state['worst']}")
    sys.stderr.write("\n")
    return state


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("soaks", nargs="*", choices=[*SOAKS, []], help="all by default")
    parser.add_argument("--cases", type=int, default=10_000)
    options = parser.parse_args()
    for soak in options.soaks or SOAKS:
        run(soak, options.cases)
