r"""The Mamba-1 block, with the parameters of mamba_ssm.

Per sequence, with $d_i = $ `expand * d_model` inner channels of $n$ states each and step sizes of rank $r$:

$$[u, z] = W_{in} x, \quad x' = \mathrm{silu}(\mathrm{conv}(u)), \quad [\delta, B, C] = W_x x', \quad
y = \mathrm{scan}(x', \mathrm{softplus}(W_{dt} \delta + b), -e^{A_{log}}, B, C) + D x', \quad
out = W_{out}\, (y \odot \mathrm{silu}(z)).$$

Every parameter has the name, shape and initial value that mamba_ssm's `Mamba` gives it, and the mathematics is the same
on every device: a checkpoint trained on a GPU gives the same output on a CPU. The arguments of all exponentials of the
scan are <= 0. Streaming and the fallback are those of all Mamba blocks, see `stablekern.nn.mamba_parts`.

Sources: Gu & Dao 2023, arXiv:2312.00752, sec. 3.4; parameter names and initial values: the class `Mamba` of
github.com/state-spaces/mamba.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from stablekern import _check, numerics
from stablekern.nn import mamba_parts
from stablekern.nn.mamba_parts import MambaCache
from stablekern.nn.norms import wide
from stablekern.ops.selective_scan import selective_scan
from stablekern.ops.selective_state_update import selective_state_update

__all__ = ["Mamba"]

_OP = "nn.Mamba"


class Mamba(nn.Module):
    r"""One Mamba-1 block, (b, l, d_model) -> (b, l, d_model), causal; parameters as in mamba_ssm.

    **Arguments:**

    - `d_model`: channels in and out. `d_state`: states per inner channel. `d_conv`: width of the causal convolution.
    - `expand`: inner channels per channel. `dt_rank`: rank of the step sizes, "auto" for `ceil(d_model / 16)`.
    - `dt_min`, `dt_max`: step sizes start log-uniform between them. `dt_init`: the weights of `dt_proj` start
        "random", uniform in $\pm$ `dt_scale` $/ \sqrt{r}$, or "constant" at that value.
    - `conv_bias`: give the convolution a bias. `bias`: give one to `in_proj` and `out_proj`.
    - `state_clamp`: passed to `stablekern.selective_scan`; None for no clamp.

    **Parameters:** `in_proj.weight` (2 d_inner, d_model), the rows of u before those of z; `conv1d.weight`
    (d_inner, 1, d_conv), `conv1d.bias` (d_inner); `x_proj.weight` (dt_rank + 2 d_state, d_inner), rows in the order
    step, B, C; `dt_proj.weight` (d_inner, dt_rank), `dt_proj.bias` (d_inner); `A_log` (d_inner, d_state), log(1) to
    log(d_state) in every row; `D` (d_inner), ones; `out_proj.weight` (d_model, d_inner). `A_log`, `D` and
    `dt_proj.bias` are marked `_no_weight_decay`.

    **Raises:** `ValueError` for sizes below 1, or an input or a cache of another shape. Under autocast the projections
    run in half precision, the scan in float32.
    """

    d_inner: int
    d_state: int

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        *,
        dt_min: float = numerics.MAMBA_DT_MIN.value,
        dt_max: float = numerics.MAMBA_DT_MAX.value,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        conv_bias: bool = True,
        bias: bool = False,
        state_clamp: Any = None,
    ) -> None:
        super().__init__()
        sizes = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv, "expand": expand}
        for name, size in sizes.items():
            setattr(self, name, _check.integer(_OP, name, size, low=1))
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.dt_rank = _check.integer(_OP, "dt_rank", rank, low=1)
        _check.choice(_OP, "dt_init", dt_init, ("random", "constant"))
        self.d_inner, self.state_clamp = expand * d_model, state_clamp

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        spread = dt_scale / math.sqrt(self.dt_rank)  # keeps the variance of the steps for every rank
        with torch.no_grad():
            if dt_init == "random":
                self.dt_proj.weight.uniform_(-spread, spread)
            else:
                self.dt_proj.weight.fill_(spread)
            self.dt_proj.bias.copy_(mamba_parts.initial_dt_bias(self.d_inner, dt_min, dt_max))
        rates = torch.arange(1.0, d_state + 1).repeat(self.d_inner, 1)  # S4D-real: state i decays as e^{-i dt}
        self.A_log = nn.Parameter(rates.log())
        self.D = nn.Parameter(torch.ones(self.d_inner))
        for parameter in (self.dt_proj.bias, self.A_log, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, x: Tensor, cache: MambaCache | None = None) -> Tensor:  # (b, l, d_model) -> (b, l, d_model)
        """`cache`, of `allocate_inference_cache`: go on after the steps that it has seen, and move it on."""
        _check.required(_OP, x=x)
        batch = _check.shapes(_OP, x=(x, f"b l {self.d_model}"))["b"]
        if cache is not None:
            mamba_parts.check_cache(_OP, cache, batch, self.conv1d, (self.d_inner, self.d_state))
        fallback = mamba_parts.fallback_forced()
        u, z = self.in_proj(x).chunk(2, dim=-1)
        inner = mamba_parts.convolve(u, self.conv1d, cache)  # (b, d_inner, l)
        if fallback:
            y = inner * self.D[:, None] * nn.functional.silu(z.mT)
        else:
            y = self._scan(inner, z.mT, cache)
        return self.out_proj(y.mT)

    def _scan(self, inner: Tensor, z: Tensor, cache: MambaCache | None) -> Tensor:
        low, B, C = self.x_proj(inner.mT).mT.split((self.dt_rank, self.d_state, self.d_state), dim=1)
        step = self.dt_proj.weight.to(low.dtype) @ low
        A = -torch.exp(wide(self.A_log))
        deep = torch.promote_types(inner.dtype, torch.float32)
        one_step = inner.shape[2] == 1 and not torch.is_grad_enabled()
        if cache is not None and one_step and cache.ssm_state.dtype in (inner.dtype, deep):
            now, dt, enter, leave, gate = (v.squeeze(2) for v in (inner, step, B, C, z))
            bias, clamp = self.dt_proj.bias, self.state_clamp
            y = selective_state_update(
                cache.ssm_state, now, dt, A, enter, leave, self.D, gate, bias, True, state_clamp=clamp
            )
            return y[..., None]
        y = selective_scan(  # type: ignore[assignment]
            inner,
            step,
            A,
            B,
            C,
            self.D,
            z,
            self.dt_proj.bias,
            delta_softplus=True,
            return_last_state=cache is not None,
            state_clamp=self.state_clamp,
            initial_state=None if cache is None else cache.ssm_state.to(deep),
        )
        if cache is not None:
            y, last_state = y
            cache.ssm_state.copy_(last_state.detach())
        return y

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int | None = None, dtype: torch.dtype | None = None
    ) -> MambaCache:
        """The cache of a block that has seen nothing: `conv_state` (b, d_inner, d_conv), `ssm_state` (b, d_inner,
        d_state).

        `max_seqlen` is ignored: the size does not depend on the length. `dtype` is that of the parameters if None, but
        float32 at least for `ssm_state`; states of another dtype than the block's are rounded to it after every piece.
        """
        return mamba_parts.allocate(_OP, self.conv1d, (self.d_inner, self.d_state), batch_size, dtype)

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The next step alone, (b, 1, d_model), without gradient; returns its output and the two states, which change
        in place."""
        return mamba_parts.step(_OP, self, hidden_states, conv_state, ssm_state)

    def extra_repr(self) -> str:
        return mamba_parts.with_fallback(f"d_model={self.d_model}, d_state={self.d_state}, dt_rank={self.dt_rank}")
