r"""The functions that models import from mamba_ssm and causal_conv1d, with the same arguments in the same order.

    from stablekern.adapters.mamba_ssm import causal_conv1d_fn, mamba_chunk_scan_combined, selective_scan_fn

| name | what computes it |
|---|---|
| `selective_scan_fn` | `stablekern.selective_scan` |
| `mamba_chunk_scan_combined` | `stablekern.ssd_scan` |
| `selective_state_update` | `stablekern.selective_state_update` |
| `causal_conv1d_fn`, `causal_conv1d_update` | `stablekern.causal_conv1d` |

They run on any device, and any length, stride and size is legal. What differs is said in each docstring; what is not
there (packed sequences, slots of a paged cache) raises and is never passed over. Errors carry the name of the op
underneath. States and sums are float32 or better whatever the inputs are.

Source of the signatures: github.com/state-spaces/mamba and github.com/Dao-AILab/causal-conv1d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stablekern import _check
from stablekern.errors import message
from stablekern.ops.causal_conv1d import causal_conv1d
from stablekern.ops.selective_scan import selective_scan
from stablekern.ops.selective_state_update import selective_state_update as _selective_state_update
from stablekern.ops.ssd_scan import ssd_scan

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "mamba_chunk_scan_combined",
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
    overflow. `seq_idx`, `cu_seqlens` and `return_varlen_states`, sequences packed into one, raise `ValueError`: give
    each sequence a row of its own.
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
