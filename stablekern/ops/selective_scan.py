r"""The selective scan of Mamba-1: a state of n numbers for each channel, a decay for each channel, state and step.

For every batch item and channel, with $\Delta_t = \mathrm{softplus}(\delta_t + bias)$, $a_t = e^{\Delta_t A}$ (over the
states), and $c$ the clamp where one is asked for (else the identity),

$$v_t = a_t \odot h_{t-1} + \Delta_t u_t B_t, \qquad h_t = c(v_t), \qquad
y_t = \kappa\, \mathrm{Re}\,(C_t \cdot h_t) + D u_t, \qquad out_t = y_t\, \mathrm{silu}(z_t).$$

$\kappa = 1$ for real $A$. For complex $A$ the state is complex, every entry stands for itself and its conjugate, and
$\kappa = 2$. A real clamp is that of `torch.clamp`, a complex one scales $v$ down to the modulus $r$:
$c(v) = v \min(1, r / |v|)$.

**Adjoint.** The gradient of a complex number is $\partial L / \partial \mathrm{Re} + i\, \partial L / \partial
\mathrm{Im}$; $\bar h_{l-1}$ is that of the last state. Let $\bar y_t = \overline{out}_t\, \mathrm{silu}(z_t)$, and let
$r_t$ be the part of $\partial L / \partial h_t$ that comes from later steps ($r_{l-1} = \bar h_{l-1}$). Then

$$G_t = c'(v_t)\,[\, r_t + \kappa \bar y_t C_t^* \,], \qquad r_{t-1} = a_t^* G_t, \qquad q_t = r_{t-1} h_{t-1}^*,$$
$$\bar B_t = \sum_d G_t \Delta_t u_t, \quad \bar C_t = \sum_d \kappa \bar y_t h_t^*, \quad
s_t = \sum_n \mathrm{Re}\, G_t B_t^*, \quad \bar u_t = \Delta_t s_t + D \bar y_t, \quad
\bar A = \sum_{b, t} \Delta_t q_t,$$
$$\bar\Delta_t = u_t s_t + \sum_n \mathrm{Re}\, A^* q_t, \quad
\bar\delta_t = \bar\Delta_t\, \sigma(\delta_t + bias), \quad
\bar z_t = \overline{out}_t\, y_t\, \mathrm{silu}'(z_t), \quad \bar h_{-1} = r_{-1}.$$

$c'$ is 1 inside the bounds and on them and 0 outside for real states. Where $|v| > r$ it removes the radial part,
$c'(v) g = (r / |v|)(g - n\, \mathrm{Re}\, n^* g)$ with $n = v / |v|$. $q_t$ needs the true $h_{t-1}$: taking
$a_t h_{t-1}$ as $v_t - \Delta_t u_t B_t$ cancels, and is wrong once a state has been clamped.

The forward pass keeps the state at the start of every chunk of `_CHUNK` steps; the backward pass recomputes the others,
and $y_t$ where there is a gate, a chunk at a time. Nothing of size (b, d, l, n) ever exists, and nothing is divided by
a decay, which may have underflowed to 0. For $\mathrm{Re} A < 0$ every exponent is $\le 0$.

The op (`selective_scan_fwd`, `selective_scan_bwd`) does all of it, activations and gate included. Its `u`, `delta`,
`B`, `C` and `z` may be in half precision, all else has the dtype of the state. Complex `B` and `C` are complex tensors
there; those with a time axis have a group axis, (b, g, n, l), constant ones are (d, n). `upper` alone is a modulus.
The last `reverse_channels` run backwards in time, whole groups: all of them, or half of them where both directions are
scanned, in one launch. With `count` the op also gives the share of a channel's states that the clamp changed.

Sources: Gu & Dao 2023, arXiv:2312.00752, sec. 3.2 and algorithm 2 (the recurrence, and its names); the adjoint of a
linear recurrence: Martin & Cundy 2018, arXiv:1709.04057, sec. 2.2; the mask is the derivative of $c$.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from stablekern import _check, _load, _state_clamp
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern._state_clamp import StateClamp
from stablekern.errors import message

__all__ = ["selective_scan"]

_OP = "selective_scan"
# Steps between two saved states: they cost 1/_CHUNK of (b, d, l, n) in memory, and the recomputed states of one chunk,
# with their decays, are what the native backward keeps in its first-level cache. Half of it where states are pairs.
_CHUNK, _GENERAL_CHUNK = 32, 16


def reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    state_clamp: StateClamp = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    bidirectional: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition: a loop over time in plain torch, differentiable, in the dtype of its arguments."""
    batch, channels, length = u.shape

    def turned(M: Tensor) -> Tensor:
        """With the time of what runs backwards flipped; what has no time axis is the same both ways."""
        if M.dim() == 2 or not (reverse or bidirectional):
            return M
        ahead, back = M.tensor_split([0 if reverse else M.shape[1] // 2], dim=1)
        return torch.cat((ahead, back.flip(-1)), 1)

    u, delta, z = turned(u), turned(delta), None if z is None else turned(z)
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.log1p(torch.exp(-delta.abs())) + delta.clamp_min(0)

    def steps(M: Tensor) -> tuple[Tensor, ...]:
        """Either form of B and C as `length` tensors that broadcast to (b, d, n)."""
        if M.dim() == 2:
            return (M[None],) * length
        if A.is_complex() and not M.is_complex():
            M = torch.view_as_complex(M.to(A.real.dtype).unflatten(-1, (length, 2)).contiguous())
        if M.dim() == 3:
            M = M[:, None]
        M = turned(M)
        return M.repeat_interleave(channels // M.shape[1] if M.shape[1] else 1, dim=1).unbind(-1)

    enter, leave = steps(B), steps(C)
    low = high = radius = None
    if state_clamp is not None:
        given: Any = (state_clamp,) if A.is_complex() else _state_clamp.pair(_OP, state_clamp)
        bounds = [torch.as_tensor(bound, dtype=u.dtype, device=u.device) for bound in given]
        bounds = [bound[:, None] if bound.dim() == 1 else bound for bound in bounds]
        low, high, radius = (None, None, bounds[0]) if A.is_complex() else (*bounds, None)
    state = A.new_zeros(batch, channels, A.shape[1]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        decay = torch.exp(delta[..., t, None] * A)
        state = decay * state + (delta[..., t] * u[..., t])[..., None] * enter[t]
        if radius is not None:
            size = state.abs()
            state = torch.where(size > radius, state * (radius / torch.where(size > radius, size, 1)), state)
        elif low is not None:
            state = torch.clamp(state, low, high)
        y = (state * leave[t]).sum(-1)
        outputs.append(2 * y.real if y.is_complex() else y)
    y = torch.stack(outputs, -1) if outputs else u * 0
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * (z * torch.sigmoid(z))
    y = turned(y).to(u.dtype)  # a complex A is float32 or better where u is not
    return (y, state) if return_last_state else y


def _real(A: Tensor) -> torch.dtype:
    return A.dtype.to_real() if A.is_complex() else A.dtype


def _fake_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    reverse_channels: int,
    delta_softplus: bool,
    chunk: int,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, length = u.shape
    states = A.shape[1]
    return (
        empty(u.shape, u),
        empty((batch, channels, states), A),
        empty((batch, (length + chunk - 1) // chunk, states, channels), A),
        u.new_empty((batch, channels) if count else (0,), dtype=_real(A)),
    )


def _fake_bwd(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    chunk_states: Tensor,
    reverse_channels: int,
    delta_softplus: bool,
    chunk: int,
) -> tuple[Tensor, ...]:
    batch, channels, _ = u.shape
    real = _real(A)
    return (
        *(empty(like.shape, like) for like in (u, delta, A, B, C)),
        u.new_empty((channels,), dtype=real),
        u.new_empty((0,)) if z is None else empty(z.shape, z),
        u.new_empty((channels,), dtype=real),
        empty((batch, channels, A.shape[1]), A),
    )


_fwd = define(
    "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias,"
    " Tensor? initial_state, Tensor? lower, Tensor? upper, int reverse_channels, bool delta_softplus, int chunk,"
    " bool count) -> (Tensor y, Tensor last_state, Tensor chunk_states, Tensor saturation)",
    fake=_fake_fwd,
)
_bwd = define(
    "selective_scan_bwd(Tensor grad_y, Tensor? grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,"
    " Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? lower, Tensor? upper, Tensor chunk_states,"
    " int reverse_channels, bool delta_softplus, int chunk) -> (Tensor grad_u, Tensor grad_delta, Tensor grad_A,"
    " Tensor grad_B, Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_delta_bias, Tensor grad_initial_state)",
    fake=_fake_bwd,
)


def _widened(A: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Half precision to float32; float32, float64 and complex tensors as they are."""
    wide = _real(A)
    return [t.to(wide) if t is not None and t.is_floating_point() else t for t in tensors]


def _is_general(A: Tensor, B: Tensor, C: Tensor) -> bool:
    """Whether it takes the native kernel for complex states, or for a B or C that does not depend on time."""
    return A.is_complex() or B.dim() == 2 or C.dim() == 2


def _require_steps(least: float) -> None:
    if least < 0:
        rule = "`delta` + `delta_bias` must be >= 0 without `delta_softplus`"
        raise ValueError(message(_OP, rule, f"{least:g}"))


def _check_steps(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> None:
    """On a CPU, for launchers whose scan does not look at the steps itself."""
    if not delta_softplus and _check.readable(delta) and delta.numel():
        least = delta.amin(-1)
        _require_steps((least if delta_bias is None else least + delta_bias).amin().item())


def _contiguous(A: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """Memory of the scan's dtypes that holds the values themselves, not their conjugates or negatives."""
    ready = A.dtype, _real(A)

    def plain(M: Tensor) -> Tensor:
        if M.dtype in ready and M.is_contiguous() and not M.is_conj() and not M.is_neg():
            return M  # as nearly always: four dispatched calls spared
        return _widened(A, M)[0].resolve_conj().resolve_neg().contiguous()  # type: ignore[union-attr]

    return [None if tensor is None else plain(tensor) for tensor in tensors]


def _wide_outputs(A: Tensor, *outputs: Tensor) -> list[Tensor]:
    """`outputs`, or where those are in half precision others for the kernel to write into."""
    real = _real(A)
    return [out if out.dtype in (A.dtype, real) else out.new_empty(out.shape, dtype=real) for out in outputs]


@launcher("selective_scan_fwd", device="cpu", backend="native")
def _(*arguments):
    outputs, A = _fake_fwd(*arguments), arguments[2]
    wide, native = _wide_outputs(A, *outputs), _load.native()
    ready = *_contiguous(A, *arguments[:11]), *arguments[11:], *wide
    if _is_general(*arguments[2:5]):
        _check_steps(arguments[1], arguments[7], arguments[12])
        native.selective_scan_general_fwd(*ready)
    else:
        least_step = A.new_empty(())  # found on the way, which spares a pass over the steps
        native.selective_scan_fwd(*ready, least_step)
        _require_steps(least_step.item())
    return tuple(ours.to(out.dtype) for ours, out in zip(wide, outputs, strict=True))


@launcher("selective_scan_bwd", device="cpu", backend="native")
def _(*arguments):
    grads, A = _fake_bwd(*arguments), arguments[4]
    wide, native = _wide_outputs(A, *grads), _load.native()
    run = native.selective_scan_general_bwd if _is_general(*arguments[4:7]) else native.selective_scan_bwd
    run(*_contiguous(A, *arguments[:13]), *arguments[13:], *wide)
    return tuple(ours.to(grad.dtype) for ours, grad in zip(wide, grads, strict=True))


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


@launcher("selective_scan_fwd", device="cuda", backend="triton")
@launcher("selective_scan_fwd", device="cpu", backend="triton")
def _(*arguments):
    from stablekern.triton_kernels.selective_scan import selective_scan_fwd

    _check_steps(arguments[1], arguments[7], arguments[12])
    outputs = _fake_fwd(*arguments)
    selective_scan_fwd(*_dense(*arguments[:11]), *arguments[11:14], *outputs)
    return outputs


@launcher("selective_scan_bwd", device="cuda", backend="triton")
@launcher("selective_scan_bwd", device="cpu", backend="triton")
def _(*arguments):
    from stablekern.triton_kernels.selective_scan import selective_scan_bwd

    grads = _fake_bwd(*arguments)
    selective_scan_bwd(*_dense(*arguments[:13]), *arguments[13:], *grads)
    return grads


def _turned(M: Tensor, share: float) -> Tensor:
    """(b, d or g, ..., l) with the last `share` of its channels or groups flipped in time."""
    ahead, back = M.tensor_split([M.shape[1] - round(share * M.shape[1])], dim=1)
    return torch.cat((ahead, back.flip(-1)), 1)


def _flipped(function, steps: tuple[int, ...], results: tuple[int, ...], way: int):
    """A launcher for both directions, by one that only knows the forward one: it gets (and returns) copies in which the
    channels or groups that run backwards are flipped.

    `steps` and `results` are the positions of the arguments and outputs that may have a time axis, `u` first; `way` is
    that of the number of channels that run backwards.
    """

    def both(*arguments):
        channels, reverse_channels = arguments[steps[0]].shape[1], arguments[way]

        def turned(tensors, those):
            """Those of `tensors` that are there and have a time axis."""
            in_time = (i in those and t is not None and t.dim() > 2 for i, t in enumerate(tensors))
            share = reverse_channels / max(channels, 1)
            return [_turned(t, share) if has and share else t for t, has in zip(tensors, in_time, strict=True)]

        outputs = function(*turned(arguments[:way], steps), *arguments[way + 1 :])
        return tuple(turned(outputs, results))

    return both


def _step(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> tuple[Tensor, Tensor | None]:
    """The step sizes, and their derivative with respect to `delta` (None: 1)."""
    step = delta if delta_bias is None else delta + delta_bias[:, None]
    if not delta_softplus:
        return step, None
    return torch.logaddexp(step, step.new_zeros(())), torch.sigmoid(step)


def _at(M: Tensor, t: int, channels: int) -> Tensor:
    """Step t of B or C, broadcastable to (b, d, n)."""
    return M if M.dim() == 2 else _of_channels(M[..., t], channels)


def _of_channels(M: Tensor, channels: int) -> Tensor:
    """(b, g, ...) to (b, d, ...)."""
    groups = M.shape[1]
    return M.repeat_interleave(channels // groups if groups else 1, dim=1)


def _advance(
    state: Tensor, decay: Tensor, enter: Tensor, lower: Tensor | None, upper: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The next state, and what it was before the clamp."""
    free = decay * state + enter
    return _state_clamp.clamped(free, lower, upper), free


def _read(state: Tensor, leave: Tensor) -> Tensor:
    y = (state * leave).sum(-1)
    return 2 * y.real if y.is_complex() else y


@launcher("selective_scan_fwd", device="cuda", backend="torch")
@launcher("selective_scan_fwd", device="cpu", backend="torch")
@functools.partial(_flipped, steps=(0, 1, 3, 4, 6), results=(0,), way=11)  # u, delta, B, C, z; y
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, lower, upper, delta_softplus, chunk, count):
    _check_steps(delta, delta_bias, delta_softplus)
    settings = 0, delta_softplus, chunk, count
    outputs = _fake_fwd(u, delta, A, B, C, D, z, delta_bias, initial_state, lower, upper, *settings)
    y, last_state, chunk_states, saturation = outputs
    u, delta, B, C, z = _widened(A, u, delta, B, C, z)
    channels, length = u.shape[1:]
    step, _ = _step(delta, delta_bias, delta_softplus)
    token = step * u
    state = torch.zeros_like(last_state) if initial_state is None else initial_state
    changed = saturation.new_zeros(u.shape[:2])
    for t in range(length):
        if t % chunk == 0:
            chunk_states[:, t // chunk] = state.mT
        decay, enter = torch.exp(step[..., t, None] * A), token[..., t, None] * _at(B, t, channels)
        state, free = _advance(state, decay, enter, lower, upper)
        if count:
            changed += _state_clamp.changed(free, lower, upper).sum(-1)
        out = _read(state, _at(C, t, channels))
        if D is not None:
            out = out + D * u[..., t]
        y[..., t] = out if z is None else out * torch.nn.functional.silu(z[..., t])
    if count:
        torch.div(changed, max(length * A.shape[1], 1), out=saturation)
    last_state.copy_(state)
    return outputs


@launcher("selective_scan_bwd", device="cuda", backend="torch")
@launcher("selective_scan_bwd", device="cpu", backend="torch")
@functools.partial(_flipped, steps=(2, 0, 3, 5, 6, 8), results=(0, 1, 3, 4, 6), way=13)  # u, grad_y, delta, B, C, z
def _(
    grad_y, grad_last_state, u, delta, A, B, C, D, z, delta_bias, lower, upper, chunk_states, delta_softplus, chunk
):  # fmt: skip
    inputs = grad_y, grad_last_state, u, delta, A, B, C, D, z, delta_bias, lower, upper, chunk_states
    grads = _fake_bwd(*inputs, 0, delta_softplus, chunk)
    into_u, into_delta, grad_A, into_B, into_C, grad_D, into_z, grad_delta_bias, grad_initial_state = grads
    grad_y, u, delta, B, C, z = _widened(A, grad_y, u, delta, B, C, z)
    channels, length = u.shape[1:]
    step, slope = _step(delta, delta_bias, delta_softplus)
    token = step * u
    grad_token, grad_exponent, y = (torch.empty_like(step) for _ in range(3))
    grad_B, grad_C = torch.zeros_like(B), torch.zeros_like(C)
    grad_A.zero_()
    gate = None if z is None else torch.nn.functional.silu(z)
    grad_read = grad_y if gate is None else grad_y * gate
    factor = 2 if A.is_complex() else 1
    carry = torch.zeros_like(grad_initial_state) if grad_last_state is None else grad_last_state

    def add(into: Tensor, t: int, terms: Tensor) -> None:
        """The terms (b, d, n) of step t, summed over what `into`, the gradient of B or C, does not have."""
        if into.dim() == 2:
            into += terms.sum(0)
        else:
            groups = into.shape[1]
            into[..., t] = terms.unflatten(1, (groups, channels // groups)).sum(2) if groups else 0

    for index in reversed(range(chunk_states.shape[1])):
        start, stop = index * chunk, min((index + 1) * chunk, length)
        trail, before_clamp, decays = [chunk_states[:, index].mT], [], []
        for t in range(start, stop):
            decays.append(torch.exp(step[..., t, None] * A))
            enter = token[..., t, None] * _at(B, t, channels)
            state, free = _advance(trail[-1], decays[-1], enter, lower, upper)
            trail.append(state)
            before_clamp.append(free)
        for t in reversed(range(start, stop)):
            previous, state = trail[t - start], trail[t - start + 1]
            enter, leave = _at(B, t, channels), _at(C, t, channels)
            reading = factor * grad_read[..., t, None]
            add(grad_C, t, reading * state.conj())
            y[..., t] = _read(state, leave)
            grad = _state_clamp.through_clamp(carry + reading * leave.conj(), before_clamp[t - start], lower, upper)
            add(grad_B, t, grad * token[..., t, None])
            into_token = (grad * enter.conj()).sum(-1)
            carry = decays[t - start].conj() * grad
            by_exponent = carry * previous.conj()
            grad_A += (by_exponent * step[..., t, None]).sum(0)
            into_exponent = (by_exponent * A.conj()).sum(-1)
            if A.is_complex():
                into_token, into_exponent = into_token.real, into_exponent.real
            grad_token[..., t], grad_exponent[..., t] = into_token, into_exponent
    grad_u, grad_step = grad_token * step, grad_token * u + grad_exponent
    if D is not None:
        grad_u, y = grad_u + D[:, None] * grad_read, y + D[:, None] * u
    if z is not None:
        sigmoid = torch.sigmoid(z)
        into_z.copy_(grad_y * y * (sigmoid * (1 + z * (1 - sigmoid))))
    if slope is not None:
        grad_step = grad_step * slope
    into_u.copy_(grad_u)
    into_delta.copy_(grad_step)
    into_B.copy_(grad_B)
    into_C.copy_(grad_C)
    grad_D.copy_((grad_read * u).sum((0, 2)))
    grad_delta_bias.copy_(grad_step.sum((0, 2)))
    grad_initial_state.copy_(carry)
    return grads


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(u, delta, A, B, C, D, z, delta_bias, initial_state, lower, upper, way, delta_softplus, chunk, count):
        tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state, lower, upper)
        return _fwd(*tensors, way, delta_softplus, chunk, count)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, _, lower, upper, way, delta_softplus, chunk, _ = inputs
        ctx.settings = way, delta_softplus, chunk
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, lower, upper, output[2])

    @staticmethod
    def backward(ctx, grad_y, grad_last_state, *_):
        _check.first_order(_OP)
        if grad_y is None and grad_last_state is None:
            return (None,) * 15
        if grad_y is None:
            grad_y = torch.zeros_like(ctx.saved_tensors[0])
        grads = _bwd(grad_y, grad_last_state, *ctx.saved_tensors, *ctx.settings)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, *(None,) * 6


def _projection(name: str, M: Tensor, A: Tensor, length: int) -> tuple[Tensor, str]:
    """`B` or `C` with a group axis if it depends on time and complex if A is, and the pattern of its shape."""
    if not isinstance(M, Tensor):
        raise TypeError(message(_OP, f"`{name}` must be a tensor", type(M).__name__))
    if M.dim() == 2:
        return M, "d n"
    if M.dim() not in (3, 4):
        rule = f"`{name}` must have the shape (b, n, l), (b, g, n, l) or (d, n)"
        raise ValueError(message(_OP, rule, tuple(M.shape)))
    if A.is_complex() and not M.is_complex():
        if M.shape[-1] != 2 * length:
            rule = f"real `{name}` with complex `A` holds pairs, its last axis has the size {2 * length}"
            raise ValueError(message(_OP, rule, tuple(M.shape)))
        wide = M.to(A.real.dtype).unflatten(-1, (length, 2))
        M = torch.view_as_complex(wide.contiguous())
    return (M[:, None] if M.dim() == 3 else M), "b g n l"


def selective_scan(
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
    *,
    state_clamp: StateClamp = None,
    initial_state: Tensor | None = None,  # (b, d, n)
    reverse: bool = False,
    bidirectional: bool = False,
    return_saturation: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # (b, d, l), (b, d, n), (b, d)
    r"""The Mamba-1 scan, linear in the length, with gradients to every tensor and an optional exact state clamp.

    $h_t = \mathrm{clamp}(e^{\Delta_t A} h_{t-1} + \Delta_t u_t B_t,\ lo,\ hi)$ and
    $y_t = (C_t \cdot h_t + D u_t)\,\mathrm{silu}(z_t)$ for every batch item and channel, with
    $\Delta_t = \mathrm{softplus}(\delta_t + delta\_bias)$. Arguments and their order are those of mamba_ssm's
    `selective_scan_fn`, plus those behind the star; the last state has a gradient here.

    **Arguments:** any strides; every size may be 0. Each tensor has the dtype of `u`, or float32 where `u` is float16
    or bfloat16.

    - `u`: input, (b, d, l); float16, bfloat16, float32 or float64. `delta`: step sizes, like `u`.
    - `A`: decay rates, (d, n), meant to be negative; real, or complex with a negative real part.
    - `B`, `C`: what enters the states and what is read from them, both alike or not: (b, n, l), or (b, g, n, l) with g
        a divisor of d (channel `i` uses group `i // (d / g)`), or constant, (d, n).
    - `D`: skip weight, (d). `z`: gate, like `u`.
    - `delta_bias`: added to `delta`, (d). `delta_softplus`: then take $\log(1 + e^{\delta})$; without it the sum must
        be >= 0.
    - `return_last_state`: also return the last state.
    - `state_clamp`: `c` for (-c, c), or (lo, hi); numbers or tensors of shape (), (d) or (d, n). Applied to every state
        at every step, exactly as a loop would; the gradient is that of `torch.clamp`: 0 outside, 1 on a bound. The
        bounds themselves get no gradient and must not ask for one.
    - `initial_state`: the state before the first step, (b, d, n); zero if None. It is not clamped.
    - `reverse`: from the last step to the first, so that $h_t$ comes from $h_{t+1}$; the initial state stands after
        step l - 1, and the last one is that of step 0. The kernels walk backwards, without flipped copies.
    - `bidirectional`: both directions in one call: the first half of the channels (and of the groups of `B` and `C`,
        where they have a time axis; the numbers must be even) as without `reverse`, the second half as with it.
    - `return_saturation`: a diagnostic, counted on the way: also return which share of a channel's states, over all
        steps, the clamp has changed; (b, d), in [0, 1], without a gradient. Needs `state_clamp`.

    **Complex `A`:** the states are complex, and $y_t = 2\,\mathrm{Re}(C_t \cdot h_t) + D u_t$: each state stands for a
    conjugate pair. `B` and `C` are complex, or real with l pairs (re, im) as their last axis of size 2 l, as in
    mamba_ssm. `state_clamp` is one bound on the modulus: larger states are scaled down to it, and the gradient of such
    a step is $(c / |v|)(I - n n^\top)$, $n = v / |v|$.

    **Returns:** $y$, a new contiguous tensor like `u`; with `return_last_state` also $h_{l-1}$, (b, d, n), in float32
    (complex64) for half precision; differentiable like $y$. States and sums are float32 or float64.

    **Raises:** `ValueError` for sizes that disagree, and, looked up for CPU tensors only, `lo > hi` or a negative step;
    `TypeError` for dtypes; `RuntimeError` when second derivatives are asked for. An entry of `A` with a real part >= 0
    (CPU tensors) without a clamp gives a `RuntimeWarning`: such a state does not decay, and overflows to inf (or NaN,
    where the factor of a single step does).

    **Accuracy:** output and gradients at most twice the error of the sequential loop in the same dtype
    (`tests/test_ops.py`); the same bits for any number of threads (`tests/test_selective_scan.py`).
    **Sources:** Gu & Dao 2023, arXiv:2312.00752.
    """
    _check.required(_OP, u=u, delta=delta, A=A, B=B, C=C)
    _check.flag(_OP, delta_softplus=delta_softplus, return_last_state=return_last_state)
    _check.flag(_OP, reverse=reverse, bidirectional=bidirectional, return_saturation=return_saturation)
    _check.shapes(_OP, u=(u, "b d l"), A=(A, "d n"))
    dtype = _check.dtypes(_OP, _check.HALF + _check.REAL, u=u)
    wide = torch.promote_types(dtype, torch.float32)
    is_complex = A.is_complex()
    deep = torch.promote_types(wide, torch.complex64) if is_complex else wide
    real, either = tuple({dtype, wide}), tuple({dtype, wide, deep})
    allowed = {"delta": real, "A": (deep,) if is_complex else real, "B": either, "C": either, "D": real, "z": real}
    allowed |= {"delta_bias": real, "initial_state": either}
    named = {"delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    for name, tensor in (named | {"initial_state": initial_state}).items():
        if tensor is not None:
            _check.dtypes(_OP, allowed[name], **{name: tensor})
            if tensor.device != u.device:
                raise ValueError(message(_OP, f"`{name}` and `u` must be on one device", tensor.device, u.device))
    enter, enters = _projection("B", B, A, u.shape[2])
    leave, leaves = _projection("C", C, A, u.shape[2])
    sizes = _check.shapes(
        _OP,
        u=(u, "b d l"),
        delta=(delta, "b d l"),
        A=(A, "d n"),
        B=(enter, enters),
        C=(leave, leaves),
        D=(D, "d"),
        z=(z, "b d l"),
        delta_bias=(delta_bias, "d"),
        initial_state=(initial_state, "b d n"),
    )
    if "g" in sizes and (sizes["d"] % sizes["g"] if sizes["g"] else sizes["d"]):
        rule = "the groups of `B` and `C` must divide the channels of `u`"
        raise ValueError(message(_OP, rule, sizes["g"], sizes["d"]))
    if reverse and bidirectional:
        raise ValueError(message(_OP, "`reverse` and `bidirectional` exclude each other", "both"))
    for name, size in (("channels of `u`", sizes["d"]), ("groups of `B` and `C`", sizes.get("g", 0))):
        if bidirectional and size % 2:
            raise ValueError(message(_OP, f"`bidirectional` needs an even number of {name}", size))
    reverse_channels = sizes["d"] if reverse else sizes["d"] // 2 if bidirectional else 0
    bound = _state_clamp.radius if is_complex else _state_clamp.bounds
    lower, upper = bound(_OP, state_clamp, u.new_empty((), dtype=wide), d=sizes["d"], n=sizes["n"])

    if return_saturation and upper is None:
        raise ValueError(message(_OP, "`return_saturation` needs a `state_clamp`", None))

    A = A.to(deep)
    enter, leave = (M.to(deep) if is_complex or M.dim() == 2 else M for M in (enter, leave))
    D, delta_bias = (None if v is None else v.to(wide) for v in (D, delta_bias))
    initial_state = None if initial_state is None else initial_state.to(deep)
    if upper is None and _check.readable(A) and A.numel():
        most = (A.detach().real if is_complex else A.detach()).amax().item()
        if most >= 0:
            rule = "`A` >= 0 does not decay: exp(delta * A) >= 1, the state grows until it overflows to inf"
            warnings.warn(message(_OP, rule, f"{most:g}"), RuntimeWarning, stacklevel=2)
    tracked = (u, delta, A, enter, leave, D, z, delta_bias, initial_state)
    differentiates = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tracked)
    steps = _GENERAL_CHUNK if _is_general(A, enter, leave) else _CHUNK
    chunk = steps if differentiates else max(sizes["l"], 1)  # no gradient: no states are kept but the first
    settings = reverse_channels, delta_softplus, chunk, return_saturation
    y, last_state, _, saturation = apply(_SelectiveScan, *tracked, lower, upper, *settings)
    outputs = (y, last_state) if return_last_state else (y,)
    if return_saturation:
        outputs += (saturation,)
    return outputs if len(outputs) > 1 else y
