"""Mamba and Mamba-2 of transformers with this package's scans and convolutions (`pip install transformers`).

    stablekern.swap(model)           # a MambaForCausalLM or Mamba2ForCausalLM, or any model with their mixers inside
    stablekern.swap("transformers")  # all of them, those that are made later too

Their mixers call a handful of functions by name, for which a kernel package may stand in: here those functions are this
package's. All else (masks, caches, generation, gradient checkpointing) is theirs. What goes to the originals, counted
in the report: activations other than SiLU, and a single step of generation that asks for gradients.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from stablekern import _swap
from stablekern.adapters import mamba_ssm

__all__ = ["causal_conv1d_fn", "causal_conv1d_update", "mamba2_chunk_scan", "mamba_selective_scan", "state_update"]

_VERSIONS = ("5.23",)
_ACTIVATIONS = ("silu", "swish", None)
_ORIGINALS: dict[tuple[str, str], Callable[..., Any]] = {}


def _handed_on(module: Any, name: str, reason: str) -> Callable[..., Any]:
    _swap.fallen[f"transformers {name}: {reason}"] += 1
    return _ORIGINALS[module.__name__, name]


def causal_conv1d_fn(
    hidden_states: Tensor,  # (b, d, l)
    weight: Tensor,  # (d, k)
    bias: Tensor | None = None,
    activation: str | None = None,
    **kwargs: Any,
) -> Tensor:
    if activation not in _ACTIVATIONS:
        original = _handed_on(modeling_mamba, "causal_conv1d_fn", f"activation {activation!r}")
        return original(hidden_states, weight, bias, activation, **kwargs)
    return mamba_ssm.causal_conv1d_fn(hidden_states, weight, bias, kwargs.get("seq_idx"), activation=activation)  # type: ignore[return-value]


def causal_conv1d_update(
    hidden_states: Tensor,  # (b, d, 1)
    conv_state: Tensor,  # (b, d, k)
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    if activation not in _ACTIVATIONS:
        original = _handed_on(modeling_mamba, "causal_conv1d_update", f"activation {activation!r}")
        return original(hidden_states, conv_state, weight, bias, activation)
    return mamba_ssm.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)


def mamba_selective_scan(
    hidden_states: Tensor,  # (b, d, l)
    dt: Tensor,
    A: Tensor,
    B: Tensor,  # (b, n, l)
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    use_mambapy: bool = False,
    use_associative_scan: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    return mamba_ssm.selective_scan_fn(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)  # type: ignore[return-value]


def mamba2_chunk_scan(
    hidden_states: Tensor,  # (b, l, h, p)
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    return mamba_ssm.mamba_chunk_scan_combined(  # type: ignore[return-value]
        hidden_states,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        kwargs.get("z"),
        dt_bias,
        initial_states,
        kwargs.get("seq_idx"),
        kwargs.get("cu_seqlens"),
        dt_softplus,
        tuple(dt_limit),  # type: ignore[arg-type]
        return_final_states,
    )


def state_update(module: Any, name: str) -> Callable[..., Tensor]:
    """One step of either scan: the functions of the two modules differ in their names alone."""

    def selective_state_update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if torch.is_grad_enabled() and any(
            isinstance(t, Tensor) and t.requires_grad for t in (hidden_states, dt, A, B, C, D, dt_bias, z)
        ):
            original = _handed_on(module, name, "a step that asks for gradients")
            return original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs)
        return mamba_ssm.selective_state_update(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return selective_state_update


def no_fused_path(*args: Any, **kwargs: Any) -> None:
    """Their mixers ask for a kernel of the whole block first, and go on by parts where there is none."""


_SCAN = "hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, use_mambapy, "
_UPDATE = "state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **kwargs"
_CONV = {
    "causal_conv1d_fn": (causal_conv1d_fn, "hidden_states, weight, bias, activation, **kwargs"),
    "causal_conv1d_update": (causal_conv1d_update, "hidden_states, conv_state, weight, bias, activation"),
}
_SEAMS: dict[str, tuple[Any, tuple[str, ...], dict[str, tuple[Callable[..., Any], str | None]]]] = {
    "MambaMixer": (
        modeling_mamba,
        ("conv1d", "dt_proj"),
        {
            **_CONV,  # type: ignore[dict-item]
            "mamba_inner_fn": (no_fused_path, None),
            "mamba_selective_scan": (mamba_selective_scan, f"{_SCAN}use_associative_scan, **kwargs"),
            "mamba_selective_state_update": (state_update(modeling_mamba, "mamba_selective_state_update"), _UPDATE),
        },
    ),
    "Mamba2Mixer": (
        modeling_mamba2,
        ("conv1d",),
        {
            **_CONV,  # type: ignore[dict-item]
            "mamba2_split_conv1d_scan_combined": (no_fused_path, None),
            "mamba2_chunk_scan": (
                mamba2_chunk_scan,
                "hidden_states, dt, A, B, C, chunk_size, D, dt_bias, initial_states, dt_softplus, dt_limit, "
                "return_final_states, **kwargs",
            ),
            "mamba2_selective_state_update": (state_update(modeling_mamba2, "mamba2_selective_state_update"), _UPDATE),
        },
    ),
}
for _module, _, _functions in _SEAMS.values():
    _ORIGINALS |= {(_module.__name__, _name): getattr(_module, _name) for _name in _functions}


def _seam(report: _swap.SwapReport, mixer: str) -> dict[str, Callable[..., Any]] | None:
    """The stand-ins for what a mixer calls, if its functions and the mixer itself are as they are known."""
    _swap.known_version("transformers", transformers.__version__, _VERSIONS)
    module, _, functions = _SEAMS[mixer]
    fits = [
        report.fits(f"{module.__name__}.{name}", _ORIGINALS[module.__name__, name], (known,))
        for name, (_, known) in functions.items()
        if known is not None
    ]
    called = inspect.unwrap(getattr(module, mixer).forward).__code__.co_names
    missing = sorted(set(functions) - set(called))
    if missing:
        report.leave(f"{module.__name__}.{mixer}", f"its forward does not call {', '.join(missing)}")
    return {name: ours for name, (ours, _) in functions.items()} if all(fits) and not missing else None


def swap_library(report: _swap.SwapReport) -> None:
    for mixer, (module, _, _) in _SEAMS.items():
        for name, ours in (_seam(report, mixer) or {}).items():
            label = f"{module.__name__}.{name}"
            if getattr(module, name) is ours:
                report.leave(label, "swapped already")
            else:
                report.set(module, name, ours)
                report.note(label, ours)
    report.leave("other models", "their mixers have functions of their own; tested are Mamba and Mamba-2")


def _with(module: Any, mixer: str, stand_ins: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The forward of a mixer, compiled as it is, that finds other functions under those names."""
    inner = inspect.unwrap(getattr(module, mixer).forward)
    # Without its name the dictionary is no module's: torch.compile reads the functions from it, not from the module.
    names = {key: value for key, value in vars(module).items() if key != "__name__"} | stand_ins
    forward = types.FunctionType(inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__)
    forward.__kwdefaults__ = inner.__kwdefaults__
    hooked = force_accelerate_hooks(list(_SEAMS[mixer][1]))(forward)
    hooked.__module__ = __name__
    return hooked


def swap_layer(report: _swap.SwapReport, module: nn.Module, label: str) -> bool:
    for mixer, (home, _, _) in _SEAMS.items():
        if type(module) is not getattr(home, mixer):
            continue
        if own := vars(module).get("forward"):
            ours = own.__module__ == __name__
            report.leave(label, "swapped already" if ours else "it has a forward of its own, as hooks put there")
        elif stand_ins := _seam(report, mixer):
            report.set(module, "forward", types.MethodType(_with(home, mixer, stand_ins), module))
            report.note(label, f"{home.__name__}.{mixer} over stablekern's scan and convolution")
        return True
    return False
