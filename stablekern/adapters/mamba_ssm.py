r"""The functions that models import from mamba_ssm and causal_conv1d, with the same arguments in the same order.

    from stablekern.adapters.mamba_ssm import causal_conv1d_fn, mamba_chunk_scan_combined, selective_scan_fn

| name | what computes it |
|---|---|
| `selective_scan_fn` | `stablekern.selective_scan` |
| `mamba_chunk_scan_combined` | `stablekern.ssd_scan` |
| `selective_state_update` | `stablekern.selective_state_update` |
| `causal_conv1d_fn`, `causal_conv1d_update` | `stablekern.causal_conv1d` |
| `mamba_inner_fn`, `mamba_split_conv1d_scan_combined` | the above and the projections around them |

They run on any device, and any length, stride and size is legal. What differs is said in each docstring; what is not
there (packed sequences, slots of a paged cache) raises and is never passed over. Errors carry the name of the op
underneath. States and sums are float32 or better whatever the inputs are.

Source of the signatures: github.com/state-spaces/mamba and github.com/Dao-AILab/causal-conv1d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from stablekern import _check
from stablekern.errors import message
from stablekern.nn.norms import gated_rms_norm, wide
from stablekern.ops.causal_conv1d import causal_conv1d
from stablekern.ops.selective_scan import selective_scan
from stablekern.ops.selective_state_update import selective_state_update as _selective_state_update
from stablekern.ops.ssd_scan import ssd_scan

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
    "mamba_inner_fn",
    "mamba_split_conv1d_scan_combined",
    "selective_scan_fn",
    "selective_state_update",
]


def _absent(function: str, **arguments: Any) -> None:
    """Each of these must be None or False: what it asks for is not available."""
    for name, value in arguments.items():
        if value is not None and value is not False:
            rule = f"`{name}` is not available, leave it at {'False' if value is True else 'None'}"
            raise ValueError(message(f"adapters.mamba_ssm.{function}", rule, type(value).__name__))


def selective_scan_fn(
    u: Tensor,  # (b, d, l)
    delta: Tensor,  # (b, d, l)
    A: Tensor,  # (d, n)
    B: Tensor,  # (b, n, l), (b, g, n, l) or (d, n)
    C: Tensor,  # (b, n, l), (b, g, n, l) or (d, n)
    D: Tensor | None = None,  # (d)
    z: Tensor | None = None,  # (b, d, l)
    delta_bias: Tensor | None = None,  # (d)
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r"""The Mamba-1 scan: `stablekern.selective_scan` without its further options.

    **Returns:** the output (b, d, l) in the dtype of `u`, with `return_last_state` a pair with the last state
    (b, d, n). **Different:** the last state is differentiable (mamba_ssm drops its gradient), and float32 for half
    precision.
    """
    return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def mamba_chunk_scan_combined(
    x: Tensor,  # (b, l, h, p)
    dt: Tensor,  # (b, l, h)
    A: Tensor,  # (h)
    B: Tensor,  # (b, l, g, n)
    C: Tensor,  # (b, l, g, n)
    chunk_size: int,
    D: Tensor | None = None,  # (h, p) or (h)
    z: Tensor | None = None,  # (b, l, h, p)
    dt_bias: Tensor | None = None,  # (h)
    initial_states: Tensor | None = None,  # (b, h, p, n)
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    r"""The Mamba-2 scan: `stablekern.ssd_scan`, exact recurrence.

    **Returns:** the output (b, l, h, p) in the dtype of `x`, with `return_final_states` a pair with the last state
    (b, h, p, n), float32 for half precision, differentiable.

    **Different:** `chunk_size` changes nothing, since the recurrence is computed step by step and not by products of
    chunks whose length decides about the rounding. No exponent is positive, so no difference of cumulative sums can
    overflow. A negative step without `dt_softplus`, which mamba_ssm clips to `dt_limit`, raises `ValueError` on a CPU.
    `seq_idx`, `cu_seqlens` and `return_varlen_states`, sequences packed into one, raise it too: give each sequence a
    row of its own.
    """
    name = "mamba_chunk_scan_combined"
    _check.integer(f"adapters.mamba_ssm.{name}", "chunk_size", chunk_size, low=1)
    _absent(name, seq_idx=seq_idx, cu_seqlens=cu_seqlens, return_varlen_states=return_varlen_states)
    return ssd_scan(
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        initial_state=initial_states,
        return_last_state=return_final_states,
    )


def selective_state_update(
    state: Tensor,  # (b, d, n) or (b, h, d, n)
    x: Tensor,  # (b, d) or (b, h, d)
    dt: Tensor,  # as x
    A: Tensor,  # (d, n) or (h, d, n)
    B: Tensor,  # (b, n) or (b, g, n)
    C: Tensor,  # as B
    D: Tensor | None = None,  # (d) or (h, d)
    z: Tensor | None = None,  # as x
    dt_bias: Tensor | None = None,  # (d) or (h, d)
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    r"""One step of either scan, `state` changed in place: `stablekern.selective_state_update`.

    **Returns:** the output, like `x`. **Different:** arguments that ask for a gradient raise, where mamba_ssm returns
    an output without one: call it under `torch.no_grad()`. `state_batch_indices`, rows of a larger cache, raises
    `ValueError`.
    """
    _absent("selective_state_update", state_batch_indices=state_batch_indices)
    return _selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


def causal_conv1d_fn(
    x: Tensor,  # (b, d, l)
    weight: Tensor,  # (d, k)
    bias: Tensor | None = None,  # (d)
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,  # (b, d, k - 1)
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,  # (b, d, k - 1)
    activation: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    r"""The causal depthwise convolution with bias and SiLU: `stablekern.causal_conv1d`.

    **Returns:** the output (b, d, l), with `return_final_states` a pair with the last k - 1 inputs (b, d, k - 1), which
    are written into `final_states_out` if it is given. `activation` is None, "silu" or "swish".

    **Different:** `seq_idx` raises `ValueError`. Any width k; on a CPU those above 4 run in plain torch.
    """
    _absent("causal_conv1d_fn", seq_idx=seq_idx)
    y = causal_conv1d(x, weight, bias, activation=activation, initial_state=initial_states)
    if not return_final_states:
        return y
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if initial_states is None else initial_states.to(x.dtype)
    final_states = torch.cat((before, x), -1)[..., x.shape[2] :]
    return y, final_states if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update(
    x: Tensor,  # (b, d) or (b, d, l)
    conv_state: Tensor,  # (b, d, s), s >= k - 1
    weight: Tensor,  # (d, k)
    bias: Tensor | None = None,  # (d)
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    r"""The next steps of a convolution: `conv_state`, the last s inputs, goes into it and moves on in place.

    **Returns:** the output, like `x`. **Different:** no gradient reaches `conv_state`. `cache_seqlens` (a ring buffer)
    and `conv_state_indices` (rows of a larger cache) raise `ValueError`.
    """
    name = "causal_conv1d_update"
    _absent(name, cache_seqlens=cache_seqlens, conv_state_indices=conv_state_indices)
    steps = x[..., None] if x.dim() == 2 else x
    known, width = conv_state.shape[-1], weight.shape[1]
    if known < width - 1:
        rule = "`conv_state` must hold the width of `weight` less 1, or more"
        raise ValueError(message(f"adapters.mamba_ssm.{name}", rule, known, width))
    before = conv_state.detach()
    y = causal_conv1d(
        steps, weight, bias, activation=activation, initial_state=before[..., known - (width - 1) :].to(x.dtype)
    )
    conv_state.detach().copy_(torch.cat((before, steps.detach()), -1)[..., steps.shape[-1] :])
    return y[..., 0] if x.dim() == 2 else y


def mamba_inner_fn(
    xz: Tensor,  # (b, 2 d, l)
    conv1d_weight: Tensor,  # (d, 1, k)
    conv1d_bias: Tensor | None,  # (d)
    x_proj_weight: Tensor,  # (r + 2 n, d)
    delta_proj_weight: Tensor,  # (d, r)
    out_proj_weight: Tensor,  # (m, d)
    out_proj_bias: Tensor | None,  # (m)
    A: Tensor,  # (d, n)
    B: Tensor | None = None,  # (b, n, l), or (d, n)
    C: Tensor | None = None,  # as B
    D: Tensor | None = None,  # (d)
    delta_bias: Tensor | None = None,  # (d)
    B_proj_bias: Tensor | None = None,  # (n)
    C_proj_bias: Tensor | None = None,  # (n)
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:  # (b, l, m)
    r"""A Mamba-1 block behind its first projection: convolution, projections, scan, gate, last projection.

    `B` and `C` that are None come from the input through `x_proj_weight`. **Different:** `checkpoint_lvl` changes
    nothing, the scan recomputes its states in any case. The norms of `B`, `C` and the steps (`*_rms_weight`) raise
    `ValueError`, as does a complex `A`.
    """
    name = "mamba_inner_fn"
    _absent(name, b_rms_weight=b_rms_weight, c_rms_weight=c_rms_weight, dt_rms_weight=dt_rms_weight)
    if A.is_complex():
        raise ValueError(message(f"adapters.mamba_ssm.{name}", "`A` must be real", A.dtype))
    x, z = xz.chunk(2, dim=1)
    inner = causal_conv1d(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    low, enter, leave = linear(inner.mT, x_proj_weight).mT.split((rank, states, states), dim=1)
    enter = enter if B_proj_bias is None else enter + B_proj_bias[:, None]
    leave = leave if C_proj_bias is None else leave + C_proj_bias[:, None]
    B, C = enter if B is None else B, leave if C is None else C
    y = selective_scan(inner, delta_proj_weight @ low, A, B, C, D, z, delta_bias, delta_softplus)
    return linear(y.mT, out_proj_weight, out_proj_bias)  # type: ignore[union-attr]


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,  # (b, l, 2 h p + 2 g n + h), or wider by two gated halves in front
    conv1d_weight: Tensor,  # (h p + 2 g n, k)
    conv1d_bias: Tensor | None,  # (h p + 2 g n)
    dt_bias: Tensor,  # (h)
    A: Tensor,  # (h)
    D: Tensor,  # (h), or (h, p)
    chunk_size: int,
    initial_states: Tensor | None = None,  # (b, h, p, n)
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,  # (h p)
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,  # (m, h p)
    outproj_bias: Tensor | None = None,  # (m)
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:  # (b, l, m)
    r"""A Mamba-2 block behind its first projection: convolution, scan, gate with norm, last projection.

    **Returns:** the output, with `return_final_states` a pair with the last state (b, h, p, n). **Different:**
    `chunk_size` changes nothing. `seq_idx`, a norm before the gate, and gated halves besides the scan (`d_ssm` of
    mamba_ssm's module) raise `ValueError`.
    """
    name = "mamba_split_conv1d_scan_combined"
    _absent(name, seq_idx=seq_idx)
    if norm_before_gate and rmsnorm_weight is not None:
        rule = "`norm_before_gate` is not available, set it to False as mamba_ssm's Mamba2 does"
        raise ValueError(message(f"adapters.mamba_ssm.{name}", rule, norm_before_gate))
    heads, width = (D.shape[0], headdim) if D.dim() == 1 else D.shape
    if width is None:
        raise ValueError(message(f"adapters.mamba_ssm.{name}", "`headdim` must be given for D (h)", None))
    channels = conv1d_weight.shape[0]
    inner = heads * width
    if zxbcdt.shape[-1] != inner + channels + heads:
        rule = f"`zxbcdt` must have {inner + channels + heads} columns; gated halves in front are not available"
        raise ValueError(message(f"adapters.mamba_ssm.{name}", rule, zxbcdt.shape[-1]))
    z, mixed, dt = zxbcdt.split((inner, channels, heads), dim=-1)
    mixed = causal_conv1d(mixed.mT, conv1d_weight, conv1d_bias, activation=activation).mT
    x, B, C = mixed.split((inner, (channels - inner) // 2, (channels - inner) // 2), dim=-1)
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, width)),
        dt.to(x.dtype),
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        dt_bias=dt_bias,
        initial_states=initial_states,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
    y, *last = y if return_final_states else (y,)
    y = y.flatten(-2)  # type: ignore[union-attr]
    if rmsnorm_weight is None:
        y = (wide(y) * silu(wide(z))).to(y.dtype)
    else:
        y = gated_rms_norm(y, z, rmsnorm_weight, eps=rmsnorm_eps, groups=ngroups)
    if outproj_weight is not None:
        y = linear(y, outproj_weight, outproj_bias)
    return (y, *last) if return_final_states else y
