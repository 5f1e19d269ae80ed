"""One optimizer step and one look of the guard over ten million gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.cases import Case, Stepping
from stablekern.optim import ComplexAdamW, GradGuard

_REALS = 10**7


def _parameters(count: int, dtype: torch.dtype) -> Callable[[str], tuple[Tensor, ...]]:
    """`count` parameters of `_REALS` real numbers in all, with gradients."""

    def make(device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(5)
        size = _REALS // count // (2 if dtype.is_complex else 1)
        parameters = []
        for _ in range(count):
            p = nn.Parameter(torch.randn(size, dtype=dtype, generator=g).to(device))
            p.grad = torch.randn(size, dtype=dtype, generator=g).to(device)
            parameters.append(p)
        return tuple(parameters)

    return make


def _real_twins(parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """Real parameters of the same size as complex ones, for an optimizer that is compared on them."""
    twins = []
    for p in parameters:
        real = torch.view_as_real(p.detach()).flatten() if p.is_complex() else p.detach()
        grad = torch.view_as_real(p.grad).flatten() if p.is_complex() else p.grad
        twin = nn.Parameter(real.clone())
        twin.grad = grad.clone()
        twins.append(twin)
    return twins


def _fused(*parameters: Tensor) -> Callable[[], object]:
    return torch.optim.AdamW(_real_twins(parameters), fused=True).step


def _foreach_and_noise(*parameters: Tensor) -> Callable[[], object]:
    twins = _real_twins(parameters)
    optimizer = torch.optim.AdamW(twins, foreach=True)

    def step() -> None:
        optimizer.step()
        torch._foreach_add_([p.data for p in twins], [torch.randn_like(p) for p in twins], alpha=1e-4)

    return step


def _ours(*parameters: Tensor) -> Callable[[], object]:
    return ComplexAdamW(parameters, temperature=1e-5).step


def _step_case(label: str, dtype: torch.dtype, baseline_name: str, baseline, gate: float) -> Case:
    # Read and write p and m, read g; v is one number for re and im.
    numbers = _REALS * (5 + (1 if dtype.is_complex else 2))
    return Case(
        "ComplexAdamW", f"T>0, 1e7 {label} in 100", _parameters(100, dtype), Stepping(_ours), baseline_name,
        Stepping(baseline), _REALS * 60.0, 4.0 * numbers, 1.0, {"step": gate}, directions=("step",),
    )  # fmt: skip


def _looped_check(max_norm: float) -> Callable[..., Callable[[], object]]:
    def make(*parameters: Tensor) -> Callable[[], object]:
        def check() -> None:
            if all(bool(torch.isfinite(p.grad).all()) for p in parameters):
                nn.utils.clip_grad_norm_(parameters, max_norm)

        return check

    return make


def _guard_case(label: str, max_norm: float, streams: float, gate: float) -> Case:
    return Case(
        "GradGuard", f"1e7 in 1000, {label}", _parameters(1000, torch.float32),
        Stepping(lambda *parameters: GradGuard(parameters, max_norm)), "isfinite loop + clip_grad_norm_",
        Stepping(_looped_check(max_norm)), _REALS * 2.0, 4.0 * _REALS * streams, 1.0, {"step": gate},
        directions=("step",),
    )  # fmt: skip


_FUSED, _FOREACH = "torch fused real AdamW without noise", "torch foreach AdamW + randn"

CASES = (
    # 1 / 1.35: at most 1.35 times the time of an optimizer that draws nothing.
    _step_case("reals, complex", torch.complex64, _FUSED, _fused, 0.74),
    _step_case("reals, complex", torch.complex64, _FOREACH, _foreach_and_noise, 10.0),
    _step_case("reals", torch.float32, _FUSED, _fused, 0.74),
    _guard_case("no clip", 1e9, 1.0, 12.0),
    _guard_case("clipping", 1.0, 3.0, 10.0),
)
