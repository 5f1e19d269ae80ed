r"""One step of the Mamba-2 scan, for streaming: the state changes in place, nothing is kept for a gradient.

With $\Delta = \mathrm{softplus}(dt + bias)$ and $c$ the clamp where one is asked for (else the identity), for every
batch item and head,

$$h \leftarrow c(e^{\Delta A} h + \Delta\, x B^\top), \qquad y = h C + D x, \qquad out = y\, \mathrm{silu}(z),$$

which is one step of `ssd_scan`, to rounding. There is no adjoint: a state that is overwritten has no past to send a
gradient to. The state moves once through memory, which is what a step costs; a head needs one exponential.

The op (`ssd_state_update_fwd`) takes `D` and the bounds as (h, p).

Source: Dao & Gu 2024, arXiv:2405.21060, sec. 2 (the recurrence).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check, _load, _state_clamp
from stablekern._registry import define, launcher
from stablekern._state_clamp import StateClamp
from stablekern.errors import message

__all__ = ["ssd_state_update"]

_OP = "ssd_state_update"


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
    per_head = x.shape[1] // B.shape[1] if B.shape[1] else 1
    enter, leave = (M.repeat_interleave(per_head, dim=1)[:, :, None] for M in (B, C))
    state = torch.exp(dt * A)[..., None, None] * state + (dt[..., None] * x)[..., None] * enter
    if state_clamp is not None:
        low, high = (
            torch.as_tensor(bound, dtype=x.dtype, device=x.device) for bound in _state_clamp.pair(_OP, state_clamp)
        )
        low, high = (bound.reshape(bound.shape + (1,) * (3 - bound.dim())) for bound in (low, high))
        state = torch.clamp(state, low, high)
    y = (state * leave).sum(-1)
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D) * x
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
    "ssd_state_update_fwd(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
    " Tensor? dt_bias, Tensor? lower, Tensor? upper, bool dt_softplus) -> Tensor",
    fake=_fake_fwd,
)


@launcher("ssd_state_update_fwd", device="cpu", backend="native")
def _(state, *tensors_and_flag):
    *tensors, dt_softplus = tensors_and_flag
    tensors = [None if tensor is None else tensor.to(state.dtype).contiguous() for tensor in tensors]
    dense, y = state.contiguous(), torch.empty_like(tensors[0])
    _load.native().ssd_state_update_fwd(dense, *tensors, dt_softplus, y)
    if dense is not state:
        state.copy_(dense)
    return y.to(tensors_and_flag[0].dtype)


@launcher("ssd_state_update_fwd", device="cuda", backend="triton")
@launcher("ssd_state_update_fwd", device="cpu", backend="triton")
def _(state, x, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus):
    """As a selective scan whose rows are the columns of all heads; the states of a row have one rate and one bound."""
    from stablekern.triton_kernels.selective_state_update import state_update

    def per_state(v):
        return v.reshape(-1, 1).expand(-1, state.shape[3])

    width, y = x.shape[2], x.new_empty(x.shape)
    rows = state.flatten(1, 2)
    x, D, z = (None if v is None else v.contiguous().flatten(-2) for v in (x, D, z))
    dt, B, C, dt_bias = (None if v is None else v.contiguous() for v in (dt, B, C, dt_bias))
    A, lower, upper = (None if v is None else per_state(v) for v in (A.repeat_interleave(width), lower, upper))
    state_update(rows, x, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus, y)
    if rows.data_ptr() != state.data_ptr():  # heads and columns are not side by side: a copy moved
        state.copy_(rows.view(state.shape))
    return y


@launcher("ssd_state_update_fwd", device="cuda", backend="torch")
@launcher("ssd_state_update_fwd", device="cpu", backend="torch")
def _(state, x, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus):
    dtype, wide = x.dtype, state.dtype
    x, step = x.to(wide), dt.to(wide)
    step = step if dt_bias is None else step + dt_bias
    if dt_softplus:
        step = torch.logaddexp(step, step.new_zeros(()))
    groups = B.shape[1]
    per_group = x.shape[1] // groups if groups else 1
    enter, leave = (M.to(wide).repeat_interleave(per_group, dim=1)[:, :, None] for M in (B, C))
    state.mul_(torch.exp(step * A)[..., None, None]).add_((step[..., None] * x)[..., None] * enter)
    if lower is not None:
        torch.clamp(state, lower[..., None], upper[..., None], out=state)
    y = (state * leave).sum(-1)
    if D is not None:
        y = y + D * x
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(wide))
    return y.to(dtype)


def ssd_state_update(
    state: Tensor,  # (b, h, p, n)
    x: Tensor,  # (b, h, p)
    dt: Tensor,  # (b, h)
    A: Tensor,  # (h)
    B: Tensor,  # (b, g, n)
    C: Tensor,  # (b, g, n)
    D: Tensor | None = None,  # (h) or (h, p)
    z: Tensor | None = None,  # (b, h, p)
    dt_bias: Tensor | None = None,  # (h)
    dt_softplus: bool = False,
    *,
    state_clamp: StateClamp = None,
) -> Tensor:  # (b, h, p)
    r"""One step of `ssd_scan`: the output of this step; `state` becomes the next state, in place.

    $h \leftarrow \mathrm{clamp}(e^{\Delta A} h + \Delta x B^\top,\ lo,\ hi)$ and
    $y = (h C + D x)\,\mathrm{silu}(z)$ with $\Delta = \mathrm{softplus}(dt + dt\_bias)$, for every batch item and head.
    Head `i` uses group `i // (h / g)` of `B` and `C`. Arguments are in the order of `selective_state_update`, but each
    head has one step size and one decay rate.

    **Arguments:** any strides; every size may be 0. Each tensor has the dtype of `x`, or float32 where `x` is float16
    or bfloat16.

    - `state`: (b, h, p, n), changed in place; float32 or float64 whatever the others are: in half precision, what a
        step adds would soon be lost in rounding. The last state that `ssd_scan` returns has this form.
    - `x`: input, (b, h, p). `dt`: step sizes, (b, h). `A`: decay rates, (h). `z`: gate, like `x`.
    - `B`, `C`: (b, g, n) with g a divisor of h.
    - `D`: skip weight per head (h) or channel (h, p). `dt_bias`: added to `dt`, (h).
    - `dt_softplus`: take $\log(1 + e^{dt + dt\_bias})$; without it the sum must be >= 0.
    - `state_clamp`: as in `ssd_scan`; tensors have the shape (), (h) or (h, p).

    **Returns:** $y$, a new contiguous tensor like `x`.

    **Raises:** `ValueError` for sizes that disagree, and, looked up for CPU tensors only, `lo > hi` or a negative step;
    `TypeError` for dtypes; `RuntimeError` if a gradient is asked for: call it under `torch.no_grad()`, or use
    `ssd_scan`. Nothing is said of `A` >= 0, of which that warns.

    **Accuracy:** at most twice the error of the same step in plain torch (`tests/test_ops.py`).
    **Sources:** Dao & Gu 2024, arXiv:2405.21060.
    """
    _check.required(_OP, state=state, x=x, dt=dt, A=A, B=B, C=C)
    _check.own_memory(_OP, state=state)
    _check.flag(_OP, dt_softplus=dt_softplus)
    sizes = _check.shapes(
        _OP,
        state=(state, "b h p n"),
        x=(x, "b h p"),
        dt=(dt, "b h"),
        A=(A, "h"),
        B=(B, "b g n"),
        C=(C, "b g n"),
        D=(D, "h p" if isinstance(D, Tensor) and D.dim() == 2 else "h"),
        z=(z, "b h p"),
        dt_bias=(dt_bias, "h"),
    )
    heads, groups = sizes["h"], sizes["g"]
    if heads % groups if groups else heads:
        raise ValueError(message(_OP, "the groups of `B` and `C` must divide the heads of `x`", groups, heads))
    dtype = _check.dtypes(_OP, _check.HALF + _check.REAL, x=x)
    wide = torch.promote_types(dtype, torch.float32)
    named = {"state": state, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    for name, tensor in named.items():
        if tensor is not None:
            _check.dtypes(_OP, (wide,) if name == "state" else tuple({dtype, wide}), **{name: tensor})
            if tensor.device != x.device:
                raise ValueError(message(_OP, f"`{name}` and `x` must be on one device", tensor.device, x.device))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, *named.values())):
        rule = "changes `state` in place and has no gradient; call it under `torch.no_grad()`, or use `ssd_scan`"
        raise RuntimeError(message(_OP, rule, "requires_grad=True"))
    lower, upper = _state_clamp.bounds(_OP, state_clamp, state, h=heads, p=sizes["p"])
    A = A.to(wide)
    D, dt_bias = (None if tensor is None else tensor.to(wide) for tensor in (D, dt_bias))
    if D is not None:
        D = (D[:, None] if D.dim() == 1 else D).expand(heads, sizes["p"])
    if not dt_softplus and _check.readable(dt) and dt.numel():
        least = (dt if dt_bias is None else dt + dt_bias).amin()
        if bool(least < 0):
            rule = "`dt` + `dt_bias` must be >= 0 without `dt_softplus`"
            raise ValueError(message(_OP, rule, f"{least:g}"))
    return _fwd(state, x, dt, A, B, C, D, z, dt_bias, lower, upper, dt_softplus)
