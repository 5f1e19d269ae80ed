r"""Mamba-2 blocks: one direction with the parameters of mamba_ssm, and the bidirectional stack of the EEG detector.

**One block** (`Mamba2`), per sequence, with $d_i = $ `expand * d_model` inner channels in $H = d_i /$ `headdim` heads
and $g$ groups of $n$ states:

$$[z, u, \delta] = W_{in} x, \quad [x', B, C] = \mathrm{silu}(\mathrm{conv}(u)), \quad
y = \mathrm{scan}(x', \mathrm{softplus}(\delta + b), -e^{A_{log}}, B, C) + D x', \quad
out = W_{out}\, \mathrm{norm}(y \odot \mathrm{silu}(z)).$$

Every parameter has the name and shape that mamba_ssm's `Mamba2` gives it, and the mathematics is the same on every
device, so a checkpoint trained on a GPU gives the same output on a CPU. The arguments of all exponentials of the scan
are <= 0.

Streaming and the fallback are those of all Mamba blocks, see `stablekern.nn.mamba_parts`.

Sources: Dao & Gu 2024, arXiv:2405.21060; parameter names and initial values: the class `Mamba2` of
github.com/state-spaces/mamba.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from stablekern import _check, numerics
from stablekern.errors import message
from stablekern.nn import mamba_parts
from stablekern.nn.mamba_parts import MambaCache
from stablekern.nn.norms import LayerScale, RMSNormGated, wide
from stablekern.ops.causal_conv1d import causal_conv1d
from stablekern.ops.gated_rms_norm import gated_rms_norm
from stablekern.ops.ssd_scan import ssd_scan
from stablekern.ops.ssd_state_update import ssd_state_update

__all__ = ["BiMamba2", "Mamba2", "drop_fallback_entries"]

_OP = "nn.Mamba2"
_FALLBACK_ENTRY = re.compile(r"(^|\.)layers\.\d+\.(forward|backward)_mamba_fallback\.")


class Mamba2(nn.Module):
    r"""One Mamba-2 block, (b, l, d_model) -> (b, l, d_model), causal; parameters as in mamba_ssm.

    **Arguments:**

    - `d_model`: channels in and out. `d_state`: states per channel. `d_conv`: width of the causal convolution.
    - `expand`: inner channels per channel. `headdim`: inner channels per head, a divisor of `expand * d_model`.
        `ngroups`: sets of `B` and `C`, a divisor of the heads. Any such sizes are legal; there are no stride rules.
    - `A_init_range`: decay rates start uniform in it. `dt_min`, `dt_max`: step sizes start log-uniform between them.
    - `dt_limit`: limits of the step size after the softplus.
    - `state_clamp`: passed to `stablekern.ssd_scan`; None for no clamp.

    **Parameters:** `in_proj.weight` (2 d_inner + 2 ngroups d_state + heads, d_model), rows in the order z, x, B, C, dt;
    `conv1d.weight` (d_inner + 2 ngroups d_state, 1, d_conv), `conv1d.bias`; `dt_bias`, `A_log`, `D` (heads), marked
    `_no_weight_decay`; `norm.weight` (d_inner); `out_proj.weight` (d_model, d_inner).

    **Raises:** `ValueError` for sizes that do not divide, or an input of another width. Under autocast the projections
    run in half precision, the scan and the norm in float32.
    """

    d_model: int
    d_state: int
    d_conv: int
    expand: int
    headdim: int
    ngroups: int

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 8,
        ngroups: int = 1,
        *,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = numerics.MAMBA_DT_MIN.value,
        dt_max: float = numerics.MAMBA_DT_MAX.value,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        state_clamp: Any = None,
    ) -> None:
        super().__init__()
        sizes = {
            "d_model": d_model,
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "headdim": headdim,
            "ngroups": ngroups,
        }
        for name, size in sizes.items():
            setattr(self, name, _check.integer(_OP, name, size, low=1))
        self.d_inner = expand * d_model
        if self.d_inner % headdim:
            raise ValueError(message(_OP, "`headdim` must divide `expand * d_model`", headdim, self.d_inner))
        self.nheads = self.d_inner // headdim
        if self.nheads % ngroups:
            raise ValueError(message(_OP, "`ngroups` must divide the heads", ngroups, self.nheads))
        self.dt_limit, self.state_clamp = dt_limit, state_clamp
        self._states = ngroups * d_state

        width = self.d_inner + 2 * self._states
        self.in_proj = nn.Linear(d_model, self.d_inner + width + self.nheads, bias=False)
        self.conv1d = nn.Conv1d(width, width, d_conv, groups=width, padding=d_conv - 1)
        self.dt_bias = nn.Parameter(mamba_parts.initial_dt_bias(self.nheads, dt_min, dt_max))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_init_range).log())
        self.D = nn.Parameter(torch.ones(self.nheads))
        for parameter in (self.dt_bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = RMSNormGated(self.d_inner, groups=ngroups)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def forward(
        self, x: Tensor, cache: MambaCache | None = None, *, reverse: bool = False
    ) -> Tensor:  # (b, l, d_model) -> (b, l, d_model)
        """`cache`, of `allocate_inference_cache`: go on after the steps that it has seen, and move it on. `reverse`
        runs the block backwards in time: the same as flipping its input and output."""
        _check.required(_OP, x=x)
        batch = _check.shapes(_OP, x=(x, f"b l {self.d_model}"))["b"]
        if cache is not None:
            if reverse:
                raise ValueError(message(_OP, "`reverse` starts at the last step and cannot stream", "a cache"))
            mamba_parts.check_cache(_OP, cache, batch, self.conv1d, (self.nheads, self.headdim, self.d_state))
        fallback = mamba_parts.fallback_forced()
        z, channels, dt = self.in_proj(x).split((self.d_inner, self.d_inner + 2 * self._states, self.nheads), dim=-1)
        channels = mamba_parts.convolve(channels, self.conv1d, cache, reverse).mT
        inner, B, C = channels.split((self.d_inner, self._states, self._states), dim=-1)
        inner = inner.unflatten(-1, (self.nheads, self.headdim))
        if fallback:
            y = inner * self.D[:, None]
        else:
            B, C = (M.unflatten(-1, (self.ngroups, self.d_state)) for M in (B, C))
            y = self._scan(inner, dt.to(inner.dtype), B, C, cache, reverse)
        return self.out_proj(self.norm(y.flatten(-2), z))

    def _scan(self, inner: Tensor, dt: Tensor, B: Tensor, C: Tensor, cache: MambaCache | None, reverse: bool) -> Tensor:
        A = -torch.exp(wide(self.A_log))
        one_step = inner.shape[1] == 1 and not torch.is_grad_enabled() and tuple(self.dt_limit) == (0.0, math.inf)
        deep = torch.promote_types(inner.dtype, torch.float32)
        if cache is not None and one_step and cache.ssm_state.dtype == deep:
            x, dt, enter, leave = (tensor.squeeze(1) for tensor in (inner, dt, B, C))
            y = ssd_state_update(
                cache.ssm_state, x, dt, A, enter, leave, self.D, None, self.dt_bias, True, state_clamp=self.state_clamp
            )
            return y[:, None]
        y = ssd_scan(  # type: ignore[assignment]
            inner,
            dt,
            A,
            B,
            C,
            D=self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
            state_clamp=self.state_clamp,
            initial_state=None if cache is None else cache.ssm_state.to(deep),
            return_last_state=cache is not None,
            reverse=reverse,
        )
        if cache is not None:
            y, last_state = y
            cache.ssm_state.copy_(last_state.detach())
        return y

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> MambaCache:
        """The cache of a block that has seen nothing: `conv_state` (b, d_inner + 2 ngroups d_state, d_conv),
        `ssm_state` (b, heads, headdim, d_state).

        `max_seqlen` is ignored: the size does not depend on the length. `dtype` is that of the parameters if None, but
        float32 at least for `ssm_state`; states of another dtype than the block's are rounded to it after every piece.
        """
        return mamba_parts.allocate(_OP, self.conv1d, (self.nheads, self.headdim, self.d_state), batch_size, dtype)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next step alone, (b, 1, d_model), without gradient; returns its output and the two states, which change
        in place."""
        return mamba_parts.step(_OP, self, hidden_states, conv_state, ssm_state)

    def extra_repr(self) -> str:
        heads = f"heads={self.nheads}x{self.headdim}, ngroups={self.ngroups}"
        return mamba_parts.with_fallback(f"d_model={self.d_model}, d_state={self.d_state}, {heads}")


def _side_by_side(blocks: tuple[Mamba2, Mamba2], name: str, sizes: tuple[int, ...] | None = None) -> Tensor:
    """A parameter of both blocks along its first axis; its parts of `sizes` alternate between the blocks."""
    both: list[Tensor] = [block.get_parameter(name) for block in blocks]
    if sizes is None:
        return torch.cat(both)
    return torch.cat([part for pair in zip(*(p.split(sizes) for p in both), strict=True) for part in pair])


def _both_ways(x: Tensor, ahead: Mamba2, back: Mamba2) -> Tensor:
    """What the `out_proj` of `ahead(x)` and of `back(x, reverse=True)` get, side by side, for two blocks of the same
    sizes: one projection, one convolution, one scan and one norm over the heads of both."""
    blocks = ahead, back
    fallback = mamba_parts.fallback_forced()
    width = ahead.d_inner + 2 * ahead._states
    rows = (ahead.d_inner, width, ahead.nheads)
    # A product for each part: the backward of a split one would copy the gradients of its parts together.
    parts = _side_by_side(blocks, "in_proj.weight", rows).split([2 * size for size in rows])
    z, channels, dt = (nn.functional.linear(x, part) for part in parts)
    taps, shift = _side_by_side(blocks, "conv1d.weight").squeeze(1), _side_by_side(blocks, "conv1d.bias")
    channels = causal_conv1d(channels.mT, taps, shift, activation="silu", bidirectional=True).mT
    inner, B, C = channels.unflatten(-1, (2, width)).split((ahead.d_inner, ahead._states, ahead._states), dim=-1)
    inner = inner.unflatten(-1, (ahead.nheads, ahead.headdim)).flatten(2, 3)
    D = _side_by_side(blocks, "D")
    if fallback:
        y = inner * D[:, None]
    else:
        B, C = (M.unflatten(-1, (ahead.ngroups, ahead.d_state)).flatten(2, 3) for M in (B, C))
        y = ssd_scan(
            inner,
            dt.to(inner.dtype),
            -torch.exp(wide(_side_by_side(blocks, "A_log"))),
            B,
            C,
            D=D,
            dt_bias=_side_by_side(blocks, "dt_bias"),
            dt_softplus=True,
            dt_limit=ahead.dt_limit,
            state_clamp=ahead.state_clamp,
            bidirectional=True,
        )
    weight = _side_by_side(blocks, "norm.weight")
    return gated_rms_norm(y.flatten(-2), z, weight, eps=ahead.norm.eps, groups=2 * ahead.ngroups)


def drop_fallback_entries(module: nn.Module, state_dict: dict[str, Any], *_: Any) -> None:
    """A `load_state_dict` pre-hook: removes the `*_mamba_fallback.*` entries of V3 checkpoints, with one message."""
    entries = [key for key in state_dict if _FALLBACK_ENTRY.search(key)]
    for key in entries:
        del state_dict[key]
    if entries:
        warnings.warn(
            f"stablekern.nn.{type(module).__name__}: dropped {len(entries)} `*_mamba_fallback` entries of the"
            " checkpoint: the fallback has no parameters of its own",
            UserWarning,
            stacklevel=2,
        )


class _BiMamba2Layer(nn.Module):
    """(b, l, d) -> (b, l, d): norm(x + dropout(layerscale(W [f(x); g(x)] + b))), g backwards in time."""

    def __init__(self, d_model: int, dropout: float, layerscale: float | None, **mamba: Any) -> None:
        super().__init__()
        self.forward_mamba_real = Mamba2(d_model, **mamba)
        self.backward_mamba_real = Mamba2(d_model, **mamba)
        self.output_proj = nn.Linear(2 * d_model, d_model)
        self.layerscale = nn.Identity() if layerscale is None else LayerScale(d_model, layerscale)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(d_model, eps=numerics.NORM_EPS.value)

    def forward(self, x: Tensor) -> Tensor:
        ahead, back = self.forward_mamba_real, self.backward_mamba_real
        # W [V y; V' y'] = [W V, W' V'] [y; y']: a product of weights in place of two over all steps.
        weights = zip(
            self.output_proj.weight.chunk(2, dim=1), (ahead.out_proj.weight, back.out_proj.weight), strict=True
        )
        mix = torch.cat([outer @ inner for outer, inner in weights], dim=1)
        mixed = nn.functional.linear(_both_ways(x, ahead, back), mix, self.output_proj.bias)
        return self.layer_norm(x + self.dropout(self.layerscale(mixed)))


class BiMamba2(nn.Module):
    r"""A stack of bidirectional Mamba-2 layers, (b, d_model, l) -> (b, d_model, l).

    Each layer runs one block forward and another, with its own weights, backward in time, joins both by a linear map
    and adds them to its input under a post-norm: $x \leftarrow \mathrm{LN}(x + \mathrm{dropout}(\gamma \odot (W[f(x);
    g(x)] + b)))$. Nothing is clamped or replaced on the way: the values are bounded by the norm. Both directions are
    one projection, one convolution and one scan over heads that lie side by side; no flipped copy is made.

    **Arguments:** `d_model`, `d_state`, `d_conv`, `expand`, `headdim`, `ngroups`, `state_clamp` as in `Mamba2`;
    `num_layers`; `dropout` in [0, 1]; `layerscale`: the initial $\gamma$ of every layer, or None for none; `recompute`:
    for the backward each layer keeps its input alone, and runs a second time there (the same gradients, less memory).

    **State dict:** `layers.{i}.{forward,backward}_mamba_real.*`, `layers.{i}.output_proj.*`, `layers.{i}.layer_norm.*`
    and, if asked for, `layers.{i}.layerscale.gamma`. Entries `layers.{i}.{forward,backward}_mamba_fallback.*` of older
    checkpoints are dropped on load with one warning.
    """

    def __init__(
        self,
        d_model: int = 512,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        num_layers: int = 6,
        dropout: float = 0.1,
        layerscale: float | None = None,
        *,
        ngroups: int = 1,
        state_clamp: Any = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.d_model, self.recompute = d_model, recompute
        _check.integer("nn.BiMamba2", "num_layers", num_layers, low=1)
        _check.number("nn.BiMamba2", "dropout", dropout, low=0.0, high=1.0)
        mamba = {
            "d_state": d_state,
            "d_conv": d_conv,
            "expand": expand,
            "headdim": headdim,
            "ngroups": ngroups,
            "state_clamp": state_clamp,
        }
        self.layers = nn.ModuleList(_BiMamba2Layer(d_model, dropout, layerscale, **mamba) for _ in range(num_layers))
        self.register_load_state_dict_pre_hook(drop_fallback_entries)

    def allocate_inference_cache(self, *_: Any, **__: Any) -> None:
        """Raises: half of every layer starts at the last step of the sequence, so there is nothing to stream."""
        rule = "streaming needs blocks that look back only"
        raise TypeError(message("nn.BiMamba2", rule, "backward blocks, which start at the last step"))

    step = allocate_inference_cache

    def forward(self, x: Tensor) -> Tensor:  # (b, d_model, l) -> (b, d_model, l)
        _check.required("nn.BiMamba2", x=x)
        _check.shapes("nn.BiMamba2", x=(x, f"b {self.d_model} l"))
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = mamba_parts.through(layer, self.recompute, x)
        return x.transpose(1, 2)
