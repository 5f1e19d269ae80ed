r"""One step of the selective scan, for streaming: the state changes in place, nothing is kept for a gradient.

With $\Delta = \mathrm{softplus}(dt + bias)$ and $c$ the clamp where one is asked for (else the identity), for every
batch item and channel,

$$h \leftarrow c(e^{\Delta A} \odot h + \Delta\, x B), \qquad y = \kappa\, \mathrm{Re}\,(C \cdot h) + D x, \qquad
out = y\, \mathrm{silu}(z),$$

which is one step of `selective_scan` (its module derives clamp, complex states and $\kappa$), to rounding. There is no
adjoint: a state that is overwritten has no past to send a gradient to.

The op (`selective_state_update_fwd`) takes channels as one axis, groups as an axis of `B` and `C`; heads are channels
side by side. It moves the state once through memory, which is what a step costs.

Source: Gu & Dao 2023, arXiv:2312.00752, sec. 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check, _load, _state_clamp
from stablekern._registry import define, launcher
from stablekern._state_clamp import StateClamp
from stablekern.errors import message

__all__ = ["selective_state_update"]

_OP = "selective_state_update"


def reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    *,
    state_clamp: StateClamp = None,
) -> tuple[Tensor, Tensor]:
    """The output and the next state, in the dtype of the arguments; `state` itself stays as it is."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = torch.log1p(torch.exp(-dt.abs())) + dt.clamp_min(0)
    if B.dim() == 3:  # groups, to one row a head (or channel)
        rows = x.shape[1]
        B, C = (M.repeat_interleave(rows // M.shape[1], dim=1) for M in (B, C))
        B, C = (M[:, :, None] if x.dim() == 3 else M for M in (B, C))
    else:
        B, C = (M.reshape(M.shape[0], *(1,) * (x.dim() - 1), M.shape[1]) for M in (B, C))
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B
    if state_clamp is not None and A.is_complex():
        size = state.abs()
        state = torch.where(size > state_clamp, state * (state_clamp / torch.where(size > state_clamp, size, 1)), state)  # type: ignore[arg-type, operator]
    elif state_clamp is not None:
        state = torch.clamp(state, *_state_clamp.pair(_OP, state_clamp))  # type: ignore[arg-type]
    y = (state * C).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * (z * torch.sigmoid(z))
    return y.to(x.dtype), state


def _fake_fwd(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    return x.new_empty(x.shape)


_fwd = define(
    "selective_state_update_fwd(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? dt_bias, Tensor? lower, Tensor? upper, bool dt_softplus) -> Tensor",
    fake=_fake_fwd,
)


@launcher("selective_state_update_fwd", device="cpu", backend="native")
def _(state, x, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus):
    dtype, wide = x.dtype, A.real.dtype if A.is_complex() else A.dtype
    own = state.to(A.dtype).contiguous()
    projections = [B, C]
    rate, moving = A, own
    if A.is_complex():  # parts as neighbours, and 2 Re(C h) as the inner product of parts
        projections = [torch.view_as_real(M) for M in (B, 2 * C.conj())]
        rate, moving = torch.view_as_real(A), torch.view_as_real(own)
        upper = None if upper is None else upper.repeat_interleave(2, dim=-1)
    given = (x, dt, rate, *projections, D, z, dt_bias, lower, upper)
    tensors = [None if tensor is None else tensor.to(wide).contiguous() for tensor in given]
    y = x.new_empty(x.shape, dtype=wide)
    _load.native().selective_state_update_fwd(moving, *tensors, dt_softplus, y)
    if own is not state:
        state.copy_(own)
    return y.to(dtype)


@launcher("selective_state_update_fwd", device="cuda", backend="triton")
@launcher("selective_state_update_fwd", device="cpu", backend="triton")
def _(state, x, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus):
    from stablekern.triton_kernels.selective_state_update import state_update

    y = x.new_empty(x.shape)
    x, dt, D, z, dt_bias = (None if v is None else v.contiguous() for v in (x, dt, D, z, dt_bias))
    B, C = (M.contiguous() for M in (B, C))
    if state.is_complex():
        state, A, B, C = (torch.view_as_real(v) for v in (state, A, B, C))
    state_update(state, x, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus, y)
    return y


@launcher("selective_state_update_fwd", device="cuda", backend="torch")
@launcher("selective_state_update_fwd", device="cpu", backend="torch")
def _(state, x, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus):
    dtype, wide = x.dtype, A.real.dtype if A.is_complex() else A.dtype
    x, dt = x.to(wide), dt.to(wide)
    step = dt if dt_bias is None else dt + dt_bias
    if dt_softplus:
        step = torch.logaddexp(step, step.new_zeros(()))
    groups = B.shape[1]
    per_group = x.shape[1] // groups if groups else 1
    enter, leave = (M.to(A.dtype).repeat_interleave(per_group, dim=1) for M in (B, C))
    moved = torch.exp(step[..., None] * A) * state + (step * x)[..., None] * enter
    moved = _state_clamp.clamped(moved, lower, upper)
    state.copy_(moved)
    y = (moved * leave).sum(-1)
    y = 2 * y.real if y.is_complex() else y
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(wide))
    return y.to(dtype)


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
    *,
    state_clamp: StateClamp = None,
) -> Tensor:  # as x
    r"""One step of `selective_scan`: the output of this step; `state` becomes the next state, in place.

    $h \leftarrow \mathrm{clamp}(e^{\Delta A} h + \Delta x B,\ lo,\ hi)$ and
    $y = (C \cdot h + D x)\,\mathrm{silu}(z)$ with $\Delta = \mathrm{softplus}(dt + dt\_bias)$. Arguments and their
    order are those of mamba_ssm's `selective_state_update`.

    **Arguments:** any strides. Each tensor has the dtype of `x`, or float32 where `x` is float16 or bfloat16; compute
    is in float32 or float64, and a half-precision `state` is rounded at every step.

    - `state`: (b, d, n), changed in place; complex if `A` is.
    - `x`, `dt`, `z`: (b, d); `A`: (d, n); `D`, `dt_bias`: (d).
    - `B`, `C`: (b, n), or (b, g, n) with g a divisor of d (with heads: of h); complex if `A` is.
    - `dt_softplus`: take $\log(1 + e^{dt + dt\_bias})$; without it the sum must be >= 0.
    - `state_clamp`: as in `selective_scan`; tensors have the shape (), (d) or (d, n), with heads () alone.
    - With heads, d becomes h, d in every shape: `state` (b, h, d, n), `x` (b, h, d), `A` (h, d, n), `D` (h, d).

    **Returns:** $y$, a new contiguous tensor like `x`.

    **Raises:** `ValueError` for sizes that disagree, and, looked up for CPU tensors only, `lo > hi` or a negative step;
    `TypeError` for dtypes; `RuntimeError` if a gradient is asked for: call it under `torch.no_grad()`, or use
    `selective_scan`. Nothing is said of `A` >= 0, of which that warns.

    **Accuracy:** at most twice the error of the same step in plain torch (`tests/test_ops.py`).
    **Sources:** Gu & Dao 2023, arXiv:2312.00752.
    """
    _check.required(_OP, state=state, x=x, dt=dt, A=A, B=B, C=C)
    _check.own_memory(_OP, state=state)
    _check.flag(_OP, dt_softplus=dt_softplus)
    heads = state.dim() == 4
    row, projected = ("h d", "b g n") if heads else ("d", "b g n")
    if isinstance(B, Tensor) and B.dim() == 2:
        projected = "b n"
    sizes = _check.shapes(
        _OP,
        state=(state, f"b {row} n"),
        x=(x, f"b {row}"),
        dt=(dt, f"b {row}"),
        A=(A, f"{row} n"),
        B=(B, projected),
        C=(C, projected),
        D=(D, row),
        z=(z, f"b {row}"),
        dt_bias=(dt_bias, row),
    )
    dtype = _check.dtypes(_OP, _check.HALF + _check.REAL, x=x)
    wide = torch.promote_types(dtype, torch.float32)
    deep = torch.promote_types(wide, torch.complex64) if A.is_complex() else wide
    real, states = tuple({dtype, wide}), (deep,) if A.is_complex() else tuple({dtype, wide})
    allowed = {"state": states, "dt": real, "A": states, "B": states, "C": states, "D": real, "z": real}
    named = {"state": state, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    for name, tensor in named.items():
        if tensor is not None:
            _check.dtypes(_OP, allowed.get(name, real), **{name: tensor})
            if tensor.device != x.device:
                raise ValueError(message(_OP, f"`{name}` and `x` must be on one device", tensor.device, x.device))
    rows, groups = sizes["h"] if heads else sizes["d"], sizes.get("g", 1)
    if rows % groups if groups else rows:
        rule = f"the groups of `B` and `C` must divide the {'heads' if heads else 'channels'} of `x`"
        raise ValueError(message(_OP, rule, groups, rows))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *named.values())):
        rule = "changes `state` in place and has no gradient; call it under `torch.no_grad()`, or use `selective_scan`"
        raise RuntimeError(message(_OP, rule))
    if heads:
        state_rows = state.flatten(1, 2)
        x_rows, dt, A = x.flatten(1, 2), dt.flatten(1, 2), A.flatten(0, 1)
        z = None if z is None else z.flatten(1, 2)
        D, dt_bias = (None if v is None else v.flatten(0, 1) for v in (D, dt_bias))
    else:
        state_rows, x_rows = state, x
    if B.dim() == 2:
        B, C = B[:, None], C[:, None]
    bound = _state_clamp.radius if A.is_complex() else _state_clamp.bounds
    over = {} if heads else {"d": sizes["d"], "n": sizes["n"]}
    lower, upper = bound(_OP, state_clamp, x.new_empty((), dtype=wide), **over)
    lower, upper = (None if v is None else v.expand(A.shape) for v in (lower, upper))
    A = A.to(deep)
    D, dt_bias = (None if v is None else v.to(wide) for v in (D, dt_bias))
    if not dt_softplus and _check.readable(dt) and dt.numel():
        least = (dt if dt_bias is None else dt + dt_bias).amin()
        if bool(least < 0):
            rule = "`dt` + `dt_bias` must be >= 0 without `dt_softplus`"
            raise ValueError(message(_OP, rule, f"{least:g}"))
    y = _fwd(state_rows, x_rows, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus)
    if heads and state_rows.data_ptr() != state.data_ptr():  # heads and channels are not side by side: a copy moved
        state.copy_(state_rows.view(state.shape))
    return y.view(x.shape)
