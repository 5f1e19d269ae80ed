r"""The first-order linear recurrence along time, real or complex, with an exact clamp of the state.

With a gate $a_t$, a token $b_t$ and $c$ the clamp (the identity where there are no bounds),

$$y_t = a_t h_{t-1} + b_t, \qquad h_t = c(y_t).$$

A real $c$ clips to [lo, hi]; a complex one shortens to the modulus $r$: $c(y) = y \min(1, r / |y|)$.

**Parallel in time.** A real step is $x \mapsto \mathrm{clip}_{l,u}(a x + b)$, and such maps are closed under
composition:

$$f_2 \circ f_1 = (a_2 a_1,\; a_2 b_1 + b_2,\; \mathrm{clip}_{l_2,u_2}(a_2 l_1 + b_2),\;
\mathrm{clip}_{l_2,u_2}(a_2 u_1 + b_2)),$$

with $l_1$ and $u_1$ exchanged where $a_2 < 0$: four numbers describe any stretch of time, exactly. In floating point
the composed map adds an error of a few ulp of $|\prod a|\,|h|$, more than a loop has where $|\prod a| > 1$, so kernels
use it only where it shrinks; elsewhere, and for complex bounds (a disc is not closed under composition), they go step
by step, many rows at a time.

**Adjoint.** Let $\bar h_t$ be the gradient of the output and $r_t$ what comes from later steps. Then
$G_t = J_t (\bar h_t + r_t)$ is the gradient of $y_t$, and

$$\bar b_t = G_t, \qquad \bar a_t = G_t \overline{h_{t-1}}, \qquad r_{t-1} = \overline{a_t}\, G_t, \qquad
\bar h_{-1} = \overline{a_0}\, G_0.$$

$J_t$ is 1, or for a real clamp $1[lo \le y_t \le hi]$ (inclusive, as in `torch.clamp`), or for a complex one with
$|y_t| > r$ the projection $J v = (r / |y|)\,(v - n \,\mathrm{Re}(\bar n v))$, $n = y / |y|$. The product needs the
true $h_{t-1}$, which the output holds: $(h_t - b_t) / a_t$ would cancel, and is wrong once a state has been clamped.
Whether it passed a real clamp shows in $h_t$: inside the bounds it did, on one it did not, unless $y_t$ itself was that
bound. Rows in which that happened are marked on the way forward. There, and for complex clamps, $y_t$ is recomputed
where $h_t$ lies on a bound, from the same numbers by the same operations.

Sources: Blelloch 1990, sec. 1.4.1 (scans of linear recurrences); Papadantonakis et al. 2005, FPT (saturated
accumulation as a prefix of clipped maps, slope 1); Martin & Cundy 2018, arXiv:1709.04057, sec. 2.2 (the adjoint).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stablekern import _check, _load, _state_clamp
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern._state_clamp import StateClamp
from stablekern.errors import message

__all__ = ["linear_scan"]

_OP = "linear_scan"


def reference(
    gate: Tensor,
    token: Tensor,
    *,
    initial_state: Tensor | None = None,
    state_clamp: StateClamp = None,
    reverse: bool = False,
    bidirectional: bool = False,
) -> Tensor:
    """The definition: a loop over time in plain torch, differentiable, in the dtype of its arguments."""
    if bidirectional:  # the loop forward over the inputs of the second half of the channels flipped, and back
        options: Any = {"initial_state": initial_state, "state_clamp": state_clamp}
        half = token.shape[1] // 2
        return _turned(reference(_turned(gate, half), _turned(token, half), **options), half)
    state = torch.zeros_like(token[..., 0]) if initial_state is None else initial_state
    bounds = None
    if state_clamp is not None:
        real: dict[str, Any] = {
            "dtype": token.real.dtype if token.is_complex() else token.dtype,
            "device": token.device,
        }
        bounds = [torch.as_tensor(bound, **real) for bound in _state_clamp.pair(_OP, state_clamp)]
    states = []
    times = range(token.shape[-1])
    for t in reversed(times) if reverse else times:
        state = gate[..., t] * state + token[..., t]
        if bounds is not None and state.is_complex():
            modulus, most = state.abs(), bounds[1]
            outside = modulus > most
            state = torch.where(outside, state * (most / torch.where(outside, modulus, 1.0)), state)
        elif bounds is not None:
            state = torch.clamp(state, *bounds)
        states.append(state)
    return torch.stack(states[::-1] if reverse else states, -1) if states else token * gate


def _turned(M: Tensor, reverse_channels: int) -> Tensor:
    """(b, d, l) with the time of the last channels flipped."""
    ahead = M.shape[1] - reverse_channels
    return torch.cat((M[:, :ahead], M[:, ahead:].flip(-1)), 1)


def _fake_fwd(
    gate: Tensor,
    token: Tensor,
    initial_state: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    reverse_channels: int,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    real = token.dtype.to_real() if token.is_complex() else token.dtype
    saturation = token.new_empty(token.shape[:2] if count else (0,), dtype=real)
    return (
        empty(token.shape, token),
        saturation,
        token.new_empty(token.shape[:2] if lower is not None else (0,), dtype=torch.bool),
    )


def _fake_bwd(
    grad_states: Tensor,
    gate: Tensor,
    token: Tensor | None,
    states: Tensor,
    initial_state: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    ties: Tensor,
    reverse_channels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return empty(gate.shape, gate), empty(gate.shape, gate), empty(gate.shape[:2], gate)


# The last `reverse_channels` go from the last step to the first. Bounds are real, (d); complex scans have `upper`, the
# largest modulus, alone. `token` goes into the backward pass only where there are bounds. With `count`, `saturation` is
# the share of a row's states that the clamp changed, (b, d). `ties`, (b, d), is true for rows in which a real state was
# on a bound before the clamp; (0) where there is no such clamp.
_fwd = define(
    "linear_scan_fwd(Tensor gate, Tensor token, Tensor? initial_state, Tensor? lower, Tensor? upper,"
    " int reverse_channels, bool count) -> (Tensor states, Tensor saturation, Tensor ties)",
    fake=_fake_fwd,
)
_bwd = define(
    "linear_scan_bwd(Tensor grad_states, Tensor gate, Tensor? token, Tensor states, Tensor? initial_state,"
    " Tensor? lower, Tensor? upper, Tensor ties, int reverse_channels)"
    " -> (Tensor grad_gate, Tensor grad_token, Tensor grad_initial_state)",
    fake=_fake_bwd,
)


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous memory that holds the values themselves, not their conjugates or negatives."""
    return [None if tensor is None else tensor.resolve_conj().resolve_neg().contiguous() for tensor in tensors]


@launcher("linear_scan_fwd", device="cpu", backend="native")
def _(*arguments):
    outputs = _fake_fwd(*arguments)
    _load.native().linear_scan_fwd(*_dense(*arguments[:-2]), *arguments[-2:], *outputs)
    return outputs


@launcher("linear_scan_bwd", device="cpu", backend="native")
def _(*arguments):
    outputs = _fake_bwd(*arguments)
    _load.native().linear_scan_bwd(*_dense(*arguments[:-1]), arguments[-1], *outputs)
    return outputs


@launcher("linear_scan_fwd", device="cuda", backend="triton")
@launcher("linear_scan_fwd", device="cpu", backend="triton")
def _(*arguments):
    from stablekern.triton_kernels.linear_scan import linear_scan_fwd

    outputs = _fake_fwd(*arguments)
    linear_scan_fwd(*_dense(*arguments[:-2]), arguments[-2], *outputs)
    return outputs


@launcher("linear_scan_bwd", device="cuda", backend="triton")
@launcher("linear_scan_bwd", device="cpu", backend="triton")
def _(*arguments):
    from stablekern.triton_kernels.linear_scan import linear_scan_bwd

    outputs = _fake_bwd(*arguments)
    linear_scan_bwd(*_dense(*arguments[:-1]), arguments[-1], *outputs)
    return outputs


@launcher("linear_scan_fwd", device="cuda", backend="torch")
@launcher("linear_scan_fwd", device="cpu", backend="torch")
def _(gate, token, initial_state, lower, upper, reverse_channels, count):
    _, saturation, ties = _fake_fwd(gate, token, initial_state, lower, upper, reverse_channels, count)
    ties.zero_()
    gate, token = _turned(gate, reverse_channels), _turned(token, reverse_channels)
    states = torch.empty_like(token)
    state = token.new_zeros(token.shape[:2]) if initial_state is None else initial_state
    changed = saturation.new_zeros(token.shape[:2])
    for t in range(token.shape[2]):
        free = gate[..., t] * state + token[..., t]
        if count:
            changed += _state_clamp.changed(free, lower, upper)
        if lower is not None:
            ties |= (free == lower) | (free == upper)
        state = _state_clamp.clamped(free, lower, upper)
        states[..., t] = state
    if count:
        torch.div(changed, max(token.shape[2], 1), out=saturation)
    return _turned(states, reverse_channels), saturation, ties


@launcher("linear_scan_bwd", device="cuda", backend="torch")
@launcher("linear_scan_bwd", device="cpu", backend="torch")
def _(grad_states, gate, token, states, initial_state, lower, upper, ties, reverse_channels):
    grad_states, gate, states = (_turned(M, reverse_channels) for M in (grad_states, gate, states))
    token = None if token is None else _turned(token, reverse_channels)
    grad_gate, grad_token = torch.empty_like(gate), torch.empty_like(gate)
    first = gate.new_zeros(gate.shape[:2]) if initial_state is None else initial_state
    carry = gate.new_zeros(gate.shape[:2])
    for t in reversed(range(gate.shape[2])):
        before = states[..., t - 1] if t else first
        grad = grad_states[..., t] + carry
        if token is not None:
            grad = _state_clamp.through_clamp(grad, gate[..., t] * before + token[..., t], lower, upper)
        grad_token[..., t] = grad
        grad_gate[..., t] = grad * before.conj()
        carry = gate[..., t].conj() * grad
    return _turned(grad_gate, reverse_channels), _turned(grad_token, reverse_channels), carry


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(gate, token, initial_state, lower, upper, reverse_channels, count):
        return _fwd(gate, token, initial_state, lower, upper, reverse_channels, count)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        gate, token, initial_state, lower, upper, ctx.reverse_channels, _ = inputs
        states, saturation, ties = output
        ctx.mark_non_differentiable(saturation, ties)
        ctx.save_for_backward(gate, None if upper is None else token, states, initial_state, lower, upper, ties)

    @staticmethod
    def backward(ctx, grad_states, *_):
        _check.first_order(_OP)
        grads = _bwd(grad_states, *ctx.saved_tensors, ctx.reverse_channels)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, None, None, None, None


def linear_scan(
    gate: Tensor,  # (b, d, l)
    token: Tensor,  # (b, d, l)
    *,
    initial_state: Tensor | None = None,  # (b, d)
    state_clamp: StateClamp = None,
    reverse: bool = False,
    bidirectional: bool = False,
    return_saturation: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:  # (b, d, l), (b, d)
    r"""The linear recurrence $h_t = \mathrm{clamp}(a_t h_{t-1} + b_t)$ along the last dimension, with gradients.

    **Arguments:** any strides; every size may be 0.

    - `gate`, `token`: $a$ and $b$, (b, d, l), of one dtype: float16, bfloat16, float32, float64, complex64 or
        complex128. The gate is not bounded: where $|a| > 1$ a state may overflow; it is then inf (complex: not finite).
    - `initial_state`: $h$ before the first step (after the last one if `reverse`), (b, d), zero if None; float32 is
        taken too beside half precision. It is not clamped.
    - `state_clamp`: bounds of every state at every step. Real: `c` for (-c, c), or (lo, hi), numbers or tensors of
        shape () or (d). Complex: one `c`, the largest modulus; a longer state keeps its direction. The result and the
        gradient are those of a loop: 0 for a real state outside the bounds and 1 on one, the projection on the tangent
        of the circle, times `c` over the length before, for a complex one. The bounds themselves get no gradient and
        must not ask for one.
    - `reverse`: from the last step to the first, $h_t = \mathrm{clamp}(a_t h_{t+1} + b_t)$; nothing is flipped.
    - `bidirectional`: both directions in one call: the first half of the channels, whose number must be even, as
        without `reverse`, the second half as with it.
    - `return_saturation`: a diagnostic, counted on the way: also return which share of a channel's states the clamp has
        changed; (b, d), in [0, 1], without a gradient. Needs `state_clamp`.

    **Returns:** all states $h$, a new contiguous tensor like `token`; the last state is `h[..., -1]` (`h[..., 0]` if
    `reverse`). Half precision is computed in float32 and rounded once.

    **Raises:** `ValueError` for sizes that disagree and, looked up for CPU tensors only, `lo > hi`; `TypeError` for
    dtypes; `RuntimeError` when second derivatives are asked for.

    **Accuracy:** output and gradients at most twice the error of the sequential loop in the same dtype
    (`tests/test_ops.py`); a state saturates where that of the loop does, unless it passes the bound by less than 4 ulp.
    The same bits for any number of threads (`tests/test_linear_scan.py`).
    **Sources:** Blelloch 1990, sec. 1.4.1; Martin & Cundy 2018, arXiv:1709.04057.
    """
    _check.required(_OP, gate=gate, token=token)
    _check.flag(_OP, reverse=reverse, bidirectional=bidirectional, return_saturation=return_saturation)
    sizes = _check.shapes(_OP, gate=(gate, "b d l"), token=(token, "b d l"), initial_state=(initial_state, "b d"))
    if reverse and bidirectional:
        raise ValueError(message(_OP, "`reverse` and `bidirectional` exclude each other", "both"))
    if bidirectional and sizes["d"] % 2:
        raise ValueError(message(_OP, "`bidirectional` needs an even number of channels", sizes["d"]))
    reverse_channels = sizes["d"] if reverse else sizes["d"] // 2 if bidirectional else 0
    dtype = _check.dtypes(_OP, _check.HALF + _check.REAL + _check.COMPLEX, gate=gate, token=token)
    wide = torch.promote_types(dtype, torch.float32)
    if initial_state is not None:
        _check.dtypes(_OP, tuple({dtype, wide}), initial_state=initial_state)
        if initial_state.device != token.device:
            raise ValueError(
                message(_OP, "`initial_state` and `token` must be on one device", initial_state.device, token.device)
            )
        initial_state = initial_state.to(wide)
    gate, token = gate.to(wide), token.to(wide)
    if not token.is_complex():
        lower, upper = _state_clamp.bounds(_OP, state_clamp, token, d=sizes["d"])
    elif isinstance(state_clamp, (tuple, list)):
        rule = "`state_clamp` of complex states must be one largest modulus"
        raise ValueError(message(_OP, rule, f"{len(state_clamp)} values"))
    else:
        lower, upper = None, _state_clamp.bounds(_OP, state_clamp, token.real, d=sizes["d"])[1]
    if return_saturation and upper is None:
        raise ValueError(message(_OP, "`return_saturation` needs a `state_clamp`", None))
    arguments = gate, token, initial_state, lower, upper, reverse_channels, return_saturation
    states, saturation, _ = apply(_LinearScan, *arguments)
    return (states.to(dtype), saturation) if return_saturation else states.to(dtype)
