"""The Mamba-1 scan at the sizes of an EEG stream and of a language model, against what runs on a CPU today."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import stablekern
from bench import baselines
from bench.cases import Case
from stablekern.ops import selective_scan as spine


def _inputs(b: int, d: int, l: int, n: int) -> Callable[[str], tuple[Tensor, ...]]:  # noqa: E741 (l is length)
    def make(device: str) -> tuple[Tensor, ...]:
        g = torch.Generator().manual_seed(3)
        u = torch.randn(b, d, l, generator=g)
        delta = 1e-3 + 0.1 * torch.rand(b, d, l, generator=g)
        a = -torch.arange(1.0, n + 1).repeat(d, 1)
        bc = [torch.randn(b, n, l, generator=g) for _ in range(2)]
        return tuple(t.to(device) for t in (u, delta, a, *bc, torch.ones(d)))

    return make


def _case(
    shape: tuple[int, ...],
    baseline_name: str,
    baseline: Callable[..., Any],
    gates: dict[str, float],
    clamp: float | None = None,
) -> Case:
    b, d, length, n = shape
    state = float(b * d * length * n)
    label = f"({b},{d},{length},{n})" + ("" if clamp is None else f" clamp={clamp:g}")
    ours = (
        stablekern.selective_scan if clamp is None else functools.partial(stablekern.selective_scan, state_clamp=clamp)
    )
    return Case(
        "selective_scan", label, _inputs(*shape), ours, baseline_name, baseline,
        # delta A, its exponential (a reduction and a polynomial: 8 multiply-adds), a h + (delta u) B, C h. Backward:
        # the exponential and h again, then r + C dy, a G, and multiply-adds for dB, dC, s, q, dA and d delta.
        (1 + 16 + 5) * state, 4.0 * b * length * (3 * d + 2 * n), (22 + 20 + 14) / 22, gates,
    )  # fmt: skip


def _general_inputs(b: int, d: int, l: int, n: int, *, constant: bool) -> Callable[[str], tuple[Tensor, ...]]:  # noqa: E741
    """Complex states; with `constant`, B and C do not depend on time (S4D's)."""

    def make(device: str) -> tuple[Tensor, ...]:
        u, delta, a, *_, D = _inputs(b, d, l, n)("cpu")
        g = torch.Generator().manual_seed(4)
        shape = (d, n) if constant else (b, n, l)
        bc = [torch.randn(shape, generator=g, dtype=torch.complex64) for _ in range(2)]
        return tuple(t.to(device) for t in (u, delta, torch.complex(a, 3 * a.flip(1)), *bc, D))

    return make


def _general_case(
    shape: tuple[int, ...],
    baseline_name: str,
    baseline: Callable[..., Tensor],
    gates: dict[str, float],
    *,
    constant: bool = False,
    clamp: float | None = None,
) -> Case:
    b, d, length, n = shape
    name = f"({b},{d},{length},{n}), complex{', constant B and C' if constant else ''}"
    state = float(b * d * length * n)
    projections = 2 * d * n if constant else 2 * b * length * n
    return Case(
        "selective_scan", name if clamp is None else f"{name}, clamp={clamp:g}",
        _general_inputs(*shape, constant=constant), functools.partial(stablekern.selective_scan, state_clamp=clamp),
        baseline_name, baseline,
        # As above with an exponential, a sine and a cosine, and four real multiply-adds for each complex one.
        (2 + 16 + 20 + 16) * state, 4.0 * 3 * b * d * length + 8.0 * projections, (54 + 54 + 50) / 54, gates,
    )  # fmt: skip


def _both_ways(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    return stablekern.selective_scan(u, delta, A, B, C, D, bidirectional=True)


def _by_flips(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    ahead, back = zip(*(M.chunk(2, 1 if M.dim() > 2 else 0) for M in (u, delta, A, B, C, D)), strict=True)
    flipped = [M.flip(-1) if M.dim() > 2 else M for M in back]
    return torch.cat((stablekern.selective_scan(*ahead), stablekern.selective_scan(*flipped).flip(-1)), 1)


def _two_ways_case(shape: tuple[int, ...]) -> Case:
    b, d, length, n = shape
    one_way = _case(shape, "", _both_ways, {})

    def inputs(device: str) -> tuple[Tensor, ...]:
        u, delta, a, B, C, D = one_way.inputs(device)
        return u, delta, a, *(torch.stack((M, M.flip(0)), 1) for M in (B, C)), D

    return Case(
        "selective_scan", f"{one_way.name}, both directions", inputs, _both_ways,
        "two calls, one of them on flipped copies", _by_flips,
        one_way.flops, one_way.bytes + 8.0 * b * length * n, one_way.backward, {},
    )  # fmt: skip


_STREAM, _SMALL, _MODEL = (8, 128, 960, 16), (2, 128, 960, 16), (1, 1536, 1024, 16)
_SHORT = (8, 128, 16, 16)  # 32 steps of it compile for 40 s, and time grows with the length
_COMPILED = "torch.compile of the sequential loop"
_PSCAN = "mambapy's parallel scan (MambaBlock.selective_scan)"
_LOOP = "sequential torch loop over views unbound beforehand"
_SLOW = "transformers' mamba_selective_scan, its loop"
# The clamp's price: the same call without it is the baseline. The ratio is at least 1 / 1.12 where no state saturates
# and 1 / 1.15 anywhere. At 2 none does, though some come near; at 0.3 it is one in a hundred, at 0.1 one in ten. Of
# complex states it is 2 in 10 000 at 0.5, and one in ten at 0.1, where every other step has some to shorten: no gate.
_FREE = "itself without the clamp"
_PRICE, _PRICE_ANYWHERE = ({"fwd": 1 / price, "fwd+bwd": 1 / price} for price in (1.12, 1.15))

CASES = (
    _case(_STREAM, _PSCAN, baselines.selective_scan_pscan, {"fwd": 100.0, "fwd+bwd": 80.0}),
    _case(_STREAM, _PSCAN, baselines.selective_scan_pscan, {}, clamp=2.0),
    _case(_STREAM, _FREE, stablekern.selective_scan, _PRICE, clamp=2.0),
    _case(_STREAM, _FREE, stablekern.selective_scan, _PRICE_ANYWHERE, clamp=0.3),
    _case(_STREAM, _FREE, stablekern.selective_scan, _PRICE_ANYWHERE, clamp=0.1),
    _case(_SMALL, _PSCAN, baselines.selective_scan_pscan, {}),
    _case(_SMALL, _LOOP, spine.reference, {}),
    _case(_SHORT, _COMPILED, baselines.compiled(spine.reference), {}),
    _case(_SMALL, _SLOW, baselines.selective_scan_transformers, {}),
    _general_case(_SMALL, _LOOP, spine.reference, {}),
    _general_case(_SMALL, _LOOP, spine.reference, {}, constant=True),
    _general_case(_SMALL, _FREE, stablekern.selective_scan, _PRICE_ANYWHERE, clamp=0.5),
    _general_case(_SMALL, _FREE, stablekern.selective_scan, {}, clamp=0.1),
    _case(_MODEL, _PSCAN, baselines.selective_scan_pscan, {}),
    _two_ways_case(_STREAM),
)

if baselines.has_mamba_ssm():
    CASES += tuple(
        _case(shape, "mamba_ssm's selective_scan_fn", baselines.selective_scan_mamba_ssm, {"fwd": 1.2, "fwd+bwd": 1.2})
        for shape in (_STREAM, (8, 1536, 2048, 16))
    )
