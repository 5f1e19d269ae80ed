r"""The scan of Mamba-2 (state-space duality): one decay per head, a state of p x n numbers per head.

For every batch item and head, with $\Delta_t = \mathrm{clip}(\mathrm{softplus}(dt_t + bias), low, high)$, the decay
$a_t = e^{\Delta_t A}$, and $c = \mathrm{clamp}(\cdot, lo, hi)$ where bounds are given (else the identity),

$$v_t = a_t h_{t-1} + \Delta_t\, x_t B_t^\top, \qquad h_t = c(v_t), \qquad
y_t = h_t C_t + D x_t, \qquad out_t = y_t\, \mathrm{silu}(z_t).$$

**Adjoint.** Let $\bar y_t = \overline{out}_t\, \mathrm{silu}(z_t)$ be the gradient with respect to $y_t$ and
$\bar h_{l-1}$ that of the last state, and let $m_t = 1[lo \le v_t \le hi]$, elementwise and inclusive as in
`torch.clamp`. With $r_t$ the part of $\partial L / \partial h_t$ that comes from later steps
($r_{l-1} = \bar h_{l-1}$),

$$G_t = m_t \odot (r_t + \bar y_t C_t^\top), \qquad r_{t-1} = a_t G_t,$$
$$\bar B_t = \sum_{h, p} G_t \Delta_t x_t, \quad \bar C_t = \sum_{h, p} \bar y_t h_t, \quad
s_t = G_t B_t, \quad \bar x_t = \Delta_t s_t + D \bar y_t, \quad q_t = \sum_{p, n} a_t G_t \odot h_{t-1},$$
$$\bar\Delta_t = \sum_p s_t x_t + A q_t, \quad \bar A = \sum_t \Delta_t q_t, \quad \bar D = \sum_t \bar y_t x_t, \quad
\bar h_{-1} = a_0 G_0,$$
$$\bar z_t = \overline{out}_t\, y_t\, \mathrm{silu}'(z_t), \quad
\overline{dt}_t = \bar\Delta_t\, \sigma(dt_t + bias)\, 1[low \le \mathrm{softplus}(dt_t + bias) \le high].$$

$q_t$ needs the true $h_{t-1}$: taking $a_t h_{t-1}$ as $v_t - \Delta_t x_t B_t^\top$ cancels, and is wrong once a state
has been clamped. The forward pass keeps the state at the start of every chunk of `_CHUNK` steps, and the backward pass
recomputes the others, and $y_t$ where there is a gate, a chunk at a time: memory and time are linear in the length,
and nothing is divided by a decay, which may have underflowed to 0. For $A < 0$ the argument of every exponential is
$\le 0$.

The op (`ssd_scan_fwd`, `ssd_scan_bwd`) does all of it, in the dtype of the state, with `D` and the bounds as (h, p).
The last `reverse_groups` of its groups run backwards in time: all of them, or half of them where both directions are
scanned, in one launch. With `count` it also gives the share of a head's states that the clamp changed.

Sources: Dao & Gu 2024, arXiv:2405.21060, sec. 2 and 6 (the recurrence, and its names); the adjoint of a linear
recurrence: Martin & Cundy 2018, arXiv:1709.04057, sec. 2.2; the mask is the derivative of $c$.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from stablekern import _check, _load, _state_clamp
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern._state_clamp import StateClamp
from stablekern.errors import message

__all__ = ["ssd_scan"]

_OP = "ssd_scan"
# Steps between two saved states. They cost 1/_CHUNK of the states' size in memory; one chunk of recomputed states is
# what the native backward keeps in its cache.
_CHUNK = 32


def reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    state_clamp: StateClamp = None,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    reverse: bool = False,
    bidirectional: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition: a loop over time in plain torch, differentiable, in the dtype of its arguments."""
    heads, width = x.shape[2:]

    def turned(tensor: Tensor) -> Tensor:
        ahead, back = tensor.tensor_split(2, dim=2)
        return torch.cat((ahead, back.flip(1)), 2) if bidirectional else tensor

    x, dt, B, C = (turned(tensor) for tensor in (x, dt, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = torch.log1p(torch.exp(-dt.abs())) + dt.clamp_min(0)
    dt = dt.clamp(*dt_limit)
    bounds = [] if state_clamp is None else list(_state_clamp.pair(_OP, state_clamp))
    for i, bound in enumerate(bounds):
        bound = torch.as_tensor(bound, dtype=x.dtype, device=x.device)
        bounds[i] = bound[:, None, None] if bound.dim() == 1 else bound[..., None]
    per_head = heads // B.shape[2] if B.shape[2] else 1
    decay = torch.exp(dt * A)[..., None, None].unbind(1)
    token = (dt[..., None] * x)[..., None].unbind(1)
    enter, leave = (M.repeat_interleave(per_head, dim=2)[:, :, :, None].unbind(1) for M in (B, C))
    state = x.new_zeros(x.shape[0], heads, width, B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
        state = decay[t] * state + token[t] * enter[t]
        if bounds:
            state = torch.clamp(state, *bounds)  # type: ignore[arg-type]
        outputs.append((state * leave[t]).sum(-1))
    y = torch.stack(outputs[::-1] if reverse else outputs, 1) if outputs else x * 0
    if D is not None:
        y = y + (D[:, None] if D.dim() == 1 else D) * x
    y = turned(y)
    if z is not None:
        y = y * (z * torch.sigmoid(z))
    return (y, state) if return_last_state else y


def _fake_fwd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    reverse_groups: int,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    chunk: int,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, width = x.shape
    states = B.shape[3]
    chunks = (length + chunk - 1) // chunk
    return (
        empty(x.shape, x),
        empty((batch, heads, width, states), x),
        empty((batch, chunks, states, heads, width), x),
        x.new_empty((batch, heads) if count else (0,)),
    )


def _fake_bwd(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
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
    chunk_states: Tensor,
    reverse_groups: int,
    dt_softplus: bool,
    dt_low: float,
    dt_high: float,
    chunk: int,
) -> tuple[Tensor, ...]:
    batch, _, heads, width = x.shape
    return (
        *(empty(like.shape, like) for like in (x, dt, A, B, C)),
        x.new_empty((heads, width)),
        x.new_empty((0,)) if z is None else empty(z.shape, z),
        x.new_empty((heads,)),
        empty((batch, heads, width, B.shape[3]), x),
    )


_fwd = define(
    "ssd_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias,"
    " Tensor? initial_state, Tensor? lower, Tensor? upper, int reverse_groups, bool dt_softplus, float dt_low,"
    " float dt_high, int chunk, bool count)"
    " -> (Tensor y, Tensor last_state, Tensor chunk_states, Tensor saturation)",
    fake=_fake_fwd,
)
_bwd = define(
    "ssd_scan_bwd(Tensor grad_y, Tensor? grad_last_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
    " Tensor? z, Tensor? dt_bias, Tensor? lower, Tensor? upper, Tensor chunk_states, int reverse_groups,"
    " bool dt_softplus, float dt_low, float dt_high, int chunk) -> (Tensor grad_x, Tensor grad_dt, Tensor grad_A,"
    " Tensor grad_B, Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_dt_bias, Tensor grad_initial_state)",
    fake=_fake_bwd,
)


def _require_steps(least: float) -> None:
    if least < 0:
        raise ValueError(message(_OP, "`dt` + `dt_bias` must be >= 0 without `dt_softplus`", f"{least:g}"))


def _steps(dt: Tensor, dt_bias: Tensor | None, softplus: bool, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The step sizes, and their derivative with respect to `dt`."""
    step = dt if dt_bias is None else dt + dt_bias
    if softplus:
        step, slope = torch.logaddexp(step, step.new_zeros(())), torch.sigmoid(step)
    else:
        slope = torch.ones_like(step)
        if _check.readable(step) and step.numel():
            _require_steps(step.amin().item())
    limited = (step < low) | (step > high)
    return step.clamp(low, high), torch.where(limited, 0.0, slope)


def _through_steps(grad_step: Tensor, slope: Tensor) -> Tensor:
    """The gradient of `dt` from that of the steps; a limited step has none, whatever comes back to it."""
    return torch.where(slope == 0, 0.0, slope * grad_step)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@launcher("ssd_scan_fwd", device="cpu", backend="native")
def _(*arguments):
    outputs = _fake_fwd(*arguments)
    least_step = outputs[0].new_empty(())  # found on the way, which spares a pass over the steps
    _load.native().ssd_scan_fwd(*_contiguous(*arguments[:11]), *arguments[11:], *outputs, least_step)
    _require_steps(least_step.item())
    return outputs


@launcher("ssd_scan_bwd", device="cpu", backend="native")
def _(*arguments):
    outputs = _fake_bwd(*arguments)
    _load.native().ssd_scan_bwd(*_contiguous(*arguments[:13]), *arguments[13:], *outputs)
    return outputs


def _turned(M: Tensor, groups: int, reverse_groups: int) -> Tensor:
    """(b, l, heads or groups, ...) with those that run backwards flipped in time."""
    if not reverse_groups:
        return M
    ahead, back = M.tensor_split([M.shape[2] * (groups - reverse_groups) // groups], dim=2)
    return torch.cat((ahead, back.flip(1)), 2)


def _flipped(function, steps: tuple[int, ...], results: tuple[int, ...], way: int):
    """A launcher for both directions, by one that only knows the forward one: it gets (and returns) copies in which the
    heads or groups that run backwards are flipped.

    `steps` and `results` are the positions of the arguments and outputs that have a time axis, `way` that of the number
    of groups that run backwards.
    """

    def both(*arguments):
        groups, reverse_groups = arguments[steps[-1]].shape[2], arguments[way]

        def turned(tensors, those):
            """Those of `tensors` that are there: without a gate, its gradient has no time axis."""
            in_time = (i in those and t is not None and t.dim() > 2 for i, t in enumerate(tensors))
            return [_turned(t, groups, reverse_groups) if has else t for t, has in zip(tensors, in_time, strict=True)]

        outputs = function(*turned(arguments[:way], steps), *arguments[way + 1 :])
        return tuple(turned(outputs, results))

    return both


@launcher("ssd_scan_fwd", device="cuda", backend="triton")
@launcher("ssd_scan_fwd", device="cpu", backend="triton")
def _(*arguments):
    from stablekern.triton_kernels.ssd_scan import ssd_scan_fwd

    outputs = _fake_fwd(*arguments)
    dt, dt_bias, softplus = arguments[1], arguments[7], arguments[12]
    if _check.readable(dt) and dt.numel() and not softplus:
        _require_steps((dt if dt_bias is None else dt + dt_bias).amin().item())
    ssd_scan_fwd(*_contiguous(*arguments[:11]), *arguments[11:-1], *outputs)
    return outputs


@launcher("ssd_scan_bwd", device="cuda", backend="triton")
@launcher("ssd_scan_bwd", device="cpu", backend="triton")
def _(*arguments):
    from stablekern.triton_kernels.ssd_scan import ssd_scan_bwd

    outputs = _fake_bwd(*arguments)
    ssd_scan_bwd(*_contiguous(*arguments[:13]), *arguments[13:], *outputs)
    return outputs


def _per_head(M: Tensor, heads: int) -> Tensor:
    """(b, l, g, n) to (b, l, h, 1, n)."""
    groups = M.shape[2]
    return M.repeat_interleave(heads // groups, dim=2)[:, :, :, None] if groups else M[:, :, :, None]


def _advance(
    state: Tensor, decay: Tensor, token: Tensor, enter: Tensor, lower: Tensor | None, upper: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The next state (b, h, p, n), and what it was before the clamp."""
    free = decay[..., None, None] * state + token[..., None] * enter
    if lower is None or upper is None:
        return free, free
    return torch.clamp(free, lower[..., None], upper[..., None]), free


@launcher("ssd_scan_fwd", device="cuda", backend="torch")
@launcher("ssd_scan_fwd", device="cpu", backend="torch")
@functools.partial(_flipped, steps=(0, 1, 6, 3, 4), results=(0,), way=11)  # x, dt, z, B, C; y
def _(x, dt, A, B, C, D, z, dt_bias, initial_state, lower, upper, softplus, low, high, chunk, count):
    settings = 0, softplus, low, high, chunk, count
    outputs = _fake_fwd(x, dt, A, B, C, D, z, dt_bias, initial_state, lower, upper, *settings)
    y, last_state, chunk_states, saturation = outputs
    heads = x.shape[2]
    step, _ = _steps(dt, dt_bias, softplus, low, high)
    decay, token = torch.exp(step * A), step[..., None] * x
    enter, leave = _per_head(B, heads), _per_head(C, heads)
    state = torch.zeros_like(last_state) if initial_state is None else initial_state
    changed = x.new_zeros((x.shape[0], heads))
    for t in range(x.shape[1]):
        if t % chunk == 0:
            chunk_states[:, t // chunk] = state.permute(0, 3, 1, 2)
        state, free = _advance(state, decay[:, t], token[:, t], enter[:, t], lower, upper)
        if count:
            changed += _state_clamp.changed(free, lower[..., None], upper[..., None]).sum((2, 3))
        y[:, t] = (state * leave[:, t]).sum(-1)
    if D is not None:
        y += D * x
    if z is not None:
        y *= torch.nn.functional.silu(z)
    if count:
        torch.div(changed, max(x.shape[1] * x.shape[3] * B.shape[3], 1), out=saturation)
    last_state.copy_(state)
    return outputs


@launcher("ssd_scan_bwd", device="cuda", backend="torch")
@launcher("ssd_scan_bwd", device="cpu", backend="torch")
@functools.partial(_flipped, steps=(0, 2, 3, 8, 5, 6), results=(0, 1, 3, 4, 6), way=13)  # grad_y, x, dt, z, B, C
def _(grad_y, grad_last_state, x, dt, A, B, C, D, z, dt_bias, lower, upper, chunk_states, softplus, low, high, chunk):
    batch, length, heads, width = x.shape
    groups, states = B.shape[2:]
    step, slope = _steps(dt, dt_bias, softplus, low, high)
    decay, token = torch.exp(step * A), step[..., None] * x
    enter, leave = _per_head(B, heads), _per_head(C, heads)
    grad_out, grad_y = grad_y, grad_y if z is None else grad_y * torch.nn.functional.silu(z)
    y = torch.empty_like(x)
    grad_token, grad_rate = torch.empty_like(token), torch.empty_like(dt)
    grad_enter, grad_leave = (x.new_empty(batch, length, heads, states) for _ in range(2))
    carry = x.new_zeros(batch, heads, width, states) if grad_last_state is None else grad_last_state
    for index in reversed(range(chunk_states.shape[1])):
        start, stop = index * chunk, min((index + 1) * chunk, length)
        trail, before_clamp = [chunk_states[:, index].permute(0, 2, 3, 1)], []
        for t in range(start, stop):
            state, free = _advance(trail[-1], decay[:, t], token[:, t], enter[:, t], lower, upper)
            trail.append(state)
            before_clamp.append(free)
        for t in reversed(range(start, stop)):
            y[:, t] = (trail[t - start + 1] * leave[:, t]).sum(-1)
            grad_leave[:, t] = (grad_y[:, t, ..., None] * trail[t - start + 1]).sum(2)
            grad = carry + grad_y[:, t, ..., None] * leave[:, t]
            if lower is not None:
                free = before_clamp[t - start]
                grad = torch.where((free >= lower[..., None]) & (free <= upper[..., None]), grad, 0.0)
            grad_enter[:, t] = (grad * token[:, t, ..., None]).sum(2)
            grad_token[:, t] = (grad * enter[:, t]).sum(-1)
            carry = decay[:, t, :, None, None] * grad
            grad_rate[:, t] = (carry * trail[t - start]).sum((2, 3))
    grad_x = step[..., None] * grad_token
    if D is not None:
        grad_x, y = grad_x + D * grad_y, y + D * x
    grad_z = x.new_empty((0,))
    if z is not None:
        sigmoid = torch.sigmoid(z)
        grad_z = grad_out * y * (sigmoid * (1 + z * (1 - sigmoid)))
    grad_dt = _through_steps((grad_token * x).sum(-1) + A * grad_rate, slope)
    grouped = (batch, length, groups, heads // groups if groups else 1, states)
    grad_B, grad_C = (M.reshape(grouped).sum(3) for M in (grad_enter, grad_leave))
    return (
        grad_x,
        grad_dt,
        (grad_rate * step).sum((0, 1)),
        grad_B,
        grad_C,
        (grad_y * x).sum((0, 1)),
        grad_z,
        grad_dt.sum((0, 1)),
        carry.clone(memory_format=torch.contiguous_format),
    )


class _SsdScan(torch.autograd.Function):
    @staticmethod
    def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, lower, upper, way, softplus, low, high, chunk, count):
        tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, lower, upper)
        return _fwd(*tensors, way, softplus, low, high, chunk, count)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, _, lower, upper, way, softplus, low, high, chunk, _ = inputs
        ctx.settings = way, softplus, low, high, chunk
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, lower, upper, output[2])

    @staticmethod
    def backward(ctx, grad_y, grad_last_state, *_):
        _check.first_order(_OP)
        if grad_y is None and grad_last_state is None:
            return (None,) * 17
        if grad_y is None:
            grad_y = torch.zeros_like(ctx.saved_tensors[0])
        grads = _bwd(grad_y, grad_last_state, *ctx.saved_tensors, *ctx.settings)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, *(None,) * 8


def ssd_scan(
    x: Tensor,  # (b, l, h, p)
    dt: Tensor,  # (b, l, h)
    A: Tensor,  # (h)
    B: Tensor,  # (b, l, g, n)
    C: Tensor,  # (b, l, g, n)
    *,
    D: Tensor | None = None,  # (h) or (h, p)
    z: Tensor | None = None,  # (b, l, h, p)
    dt_bias: Tensor | None = None,  # (h)
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, torch.inf),
    state_clamp: StateClamp = None,
    initial_state: Tensor | None = None,  # (b, h, p, n)
    return_last_state: bool = False,
    reverse: bool = False,
    bidirectional: bool = False,
    return_saturation: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # (b, l, h, p), (b, h, p, n), (b, h)
    r"""The Mamba-2 scan, linear in the length, with gradients to every tensor and an optional exact state clamp.

    $h_t = \mathrm{clamp}(e^{\Delta_t A} h_{t-1} + \Delta_t x_t B_t^\top,\ lo,\ hi)$ and
    $y_t = (h_t C_t + D x_t)\,\mathrm{silu}(z_t)$ for every batch item and head, with
    $\Delta_t = \mathrm{clip}(\mathrm{softplus}(dt_t + dt\_bias))$. Head `i` uses group `i // (h / g)` of `B` and `C`.
    The function is that of mamba_ssm's `mamba_chunk_scan_combined`; there is no chunk size to choose.

    **Arguments:** any strides; every size may be 0. Each tensor has the dtype of `x`, or float32 where `x` is float16
    or bfloat16.

    - `x`: input, (b, l, h, p); float16, bfloat16, float32 or float64. `dt`: step sizes, (b, l, h).
    - `A`: decay rates, (h), meant to be negative.
    - `B`, `C`: (b, l, g, n) with g a divisor of h: what enters the state, and what is read from it.
    - `D`: skip weight per head (h) or channel (h, p). `z`: gate, like `x`.
    - `dt_bias`: added to `dt`, (h). `dt_softplus`: then take $\log(1 + e^{dt})$; without it the sum must be >= 0.
    - `dt_limit`: then clip to (lo, hi), 0 <= lo <= hi; clipped values have no gradient.
    - `state_clamp`: `c` for (-c, c), or (lo, hi); numbers or tensors of shape (), (h) or (h, p). Applied to every state
        at every step, exactly as a loop would; the gradient is that of `torch.clamp`: 0 outside, 1 on a bound. The
        bounds themselves get no gradient and must not ask for one.
    - `initial_state`: the state before the first step, (b, h, p, n); zero if None. It is not clamped.
    - `return_last_state`: also return the last state.
    - `reverse`: from the last step to the first, so that $h_t$ comes from $h_{t+1}$; the initial state stands after
        step l - 1, and the last one is that of step 0. The kernels walk backwards, without flipped copies.
    - `bidirectional`: both directions in one call: the first half of the heads (and of the groups, whose number must be
        even) as without `reverse`, the second half as with it. Two blocks that read one input, each with parameters of
        its own, lie side by side as heads.
    - `return_saturation`: a diagnostic, counted on the way: also return which share of a head's states, over all steps,
        the clamp has changed; (b, h), in [0, 1], without a gradient. Needs `state_clamp`.

    **Returns:** $y$, a new contiguous tensor like `x`; with `return_last_state` also $h_{l-1}$, (b, h, p, n), in
    float32 for half precision; differentiable like $y$. States, sums and gates are computed in float32 or float64.

    **Raises:** `ValueError` for sizes that disagree, a bad limit, and, looked up for CPU tensors only, `lo > hi` or a
    negative step; `TypeError` for dtypes; `RuntimeError` when second derivatives are asked for. An entry of `A` >= 0
    (CPU tensors) without a clamp gives a `RuntimeWarning`: such a state does not decay, and overflows to inf (or NaN,
    where the factor of a single step does).

    **Accuracy:** output and gradients at most twice the error of the sequential loop in the same dtype
    (`tests/test_ops.py`); the same bits for any number of threads (`tests/test_ssd_scan.py`).
    **Sources:** Dao & Gu 2024, arXiv:2405.21060.
    """
    _check.required(_OP, x=x, dt=dt, A=A, B=B, C=C)
    _check.flag(_OP, dt_softplus=dt_softplus, return_last_state=return_last_state, reverse=reverse)
    _check.flag(_OP, bidirectional=bidirectional, return_saturation=return_saturation)
    sizes = _check.shapes(
        _OP,
        x=(x, "b l h p"),
        dt=(dt, "b l h"),
        A=(A, "h"),
        B=(B, "b l g n"),
        C=(C, "b l g n"),
        D=(D, "h p" if isinstance(D, Tensor) and D.dim() == 2 else "h"),
        z=(z, "b l h p"),
        dt_bias=(dt_bias, "h"),
        initial_state=(initial_state, "b h p n"),
    )
    if sizes["h"] % sizes["g"] if sizes["g"] else sizes["h"]:
        raise ValueError(message(_OP, "the groups of `B` and `C` must divide the heads of `x`", sizes["g"], sizes["h"]))
    if reverse and bidirectional:
        raise ValueError(message(_OP, "`reverse` and `bidirectional` exclude each other", "both"))
    if bidirectional and sizes["g"] % 2:
        raise ValueError(message(_OP, "`bidirectional` needs an even number of groups of `B` and `C`", sizes["g"]))
    reverse_groups = sizes["g"] if reverse else sizes["g"] // 2 if bidirectional else 0
    dtype = _check.dtypes(_OP, _check.HALF + _check.REAL, x=x)
    wide = torch.promote_types(dtype, torch.float32)
    named = {"dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "initial_state": initial_state}
    for name, tensor in named.items():
        if tensor is not None:
            _check.dtypes(_OP, tuple({dtype, wide}), **{name: tensor})
            if tensor.device != x.device:
                raise ValueError(message(_OP, f"`{name}` and `x` must be on one device", tensor.device, x.device))
    if not isinstance(dt_limit, (tuple, list)) or len(dt_limit) != 2:
        raise TypeError(message(_OP, "`dt_limit` must be (low, high)", type(dt_limit).__name__))
    low = _check.number(_OP, "dt_limit", dt_limit[0], low=0.0)
    high = _check.number(_OP, "dt_limit", dt_limit[1], low=low)
    lower, upper = _state_clamp.bounds(_OP, state_clamp, x.new_empty((), dtype=wide), h=sizes["h"], p=sizes["p"])
    if return_saturation and upper is None:
        raise ValueError(message(_OP, "`return_saturation` needs a `state_clamp`", None))
    if D is not None:
        D = (D[:, None] if D.dim() == 1 else D).expand(sizes["h"], sizes["p"])
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    tracked = tuple(None if tensor is None else tensor.to(wide) for tensor in given)
    if lower is None and _check.readable(A) and A.numel() and bool(A.detach().amax() >= 0):
        rule = "`A` >= 0 does not decay: exp(dt * A) >= 1, the state grows until it overflows to inf"
        warnings.warn(message(_OP, rule, f"{A.max():g}"), RuntimeWarning, stacklevel=2)
    differentiates = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tracked)
    chunk = _CHUNK if differentiates else max(sizes["l"], 1)  # no gradient: no states are kept but the first
    settings = reverse_groups, dt_softplus, low, high, chunk, return_saturation
    y, last_state, _, saturation = apply(_SsdScan, *tracked, lower, upper, *settings)
    y = y.to(dtype)
    outputs = (y, last_state) if return_last_state else (y,)
    if return_saturation:
        outputs += (saturation,)
    return outputs if len(outputs) > 1 else y
