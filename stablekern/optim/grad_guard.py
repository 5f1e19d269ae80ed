r"""Between `backward` and `step`: find non-finite gradients, measure, clip, and decide; without waiting for the device.

One NaN in one gradient makes the norm of `clip_grad_norm_` NaN, the clip multiplies every gradient by it, and one step
later every weight of the model is NaN. The guard looks first.

The norm is $N = \|g\|_2$ over all gradients, after division by the loss scale, accumulated in float64: the square of a
float32 overflows float32 from 2e19 on, but never float64. (float64 gradients are divided by their largest entry first.)
A float32 gradient is finite if and only if its float64 norm is, so the check costs no pass of its own. Clipping
multiplies by $\min(1, c / (N + \delta))$, as `torch.nn.utils.clip_grad_norm_` does, with the same $\delta$.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from stablekern import _check, _load
from stablekern._registry import backend_for, define, launcher
from stablekern.errors import NonFiniteError, message
from stablekern.numerics import CLIP_NORM_OFFSET
from stablekern.optim import _shards

__all__ = ["GradGuard"]

_WHERE = "optim.GradGuard"


# ---- the arithmetic --------------------------------------------------------------------------------------------------


def _real(gradient: Tensor) -> Tensor:
    """A real view of this rank's part. Conjugation does not matter to a norm or to a real factor."""
    part = _shards.local(gradient)
    if not part.is_complex():
        return part
    return torch.view_as_real(part.conj() if part.is_conj() else part)


def _norm(values: Tensor) -> Tensor:
    """Norm of float64 numbers that neither over- nor underflows on the way; inf and NaN come through."""
    if values.numel() == 0:
        return values.new_zeros(())
    peak = torch.linalg.vector_norm(values, float("inf"))
    unit = torch.where(peak.isfinite() & (peak > 0), peak, 1.0)
    return torch.linalg.vector_norm(values / unit) * unit


def _by(key: Callable[[Tensor], Any], gradients: list[Tensor]) -> Iterator[list[int]]:
    """Positions of the gradients that agree in `key`."""
    groups: dict[Any, list[int]] = {}
    for i, gradient in enumerate(gradients):
        groups.setdefault(key(gradient), []).append(i)
    yield from groups.values()


_device, _dtype = operator.attrgetter("device"), operator.attrgetter("dtype")


_gradient_norms = define(
    "gradient_norms(Tensor[] gradients) -> Tensor",
    fake=lambda gradients: gradients[0].new_empty((len(gradients),), dtype=torch.float64),
)
_multiply_gradients = define(
    "multiply_gradients(Tensor(a!)[] gradients, Tensor factor) -> ()", fake=lambda gradients, factor: None
)
_SPAN_COLUMNS = 3


def _needs_dense(gradients: list[Tensor], *_: Tensor) -> str | None:
    if not all(map(Tensor.is_contiguous, gradients)):
        return "a gradient is not contiguous"
    unknown = set(map(_dtype, gradients)) - _load.NUMBER_TYPES.keys()
    return f"dtype {unknown}" if unknown else None


def _table(gradients: list[Tensor]) -> Tensor:
    """Address, number of real numbers and type of each: (gradients, 3). They must outlive its use."""
    rows = [(g.data_ptr(), g.numel() * (2 if g.is_complex() else 1), _load.NUMBER_TYPES[g.dtype]) for g in gradients]
    return torch.tensor(rows, dtype=torch.int64)


def room_for(gradients: int) -> Tensor:
    """Room for the table of so many gradients."""
    return torch.empty((gradients, _SPAN_COLUMNS), dtype=torch.int64)


def gathered(parameters: list[Tensor], room: Tensor) -> tuple[list[Tensor], Tensor] | None:
    """The gradients that there are and their table in `room`, in one pass of C over the parameters.

    None if any is not a plain dense tensor on the CPU. A thousand tensors pass the dispatcher in 1 ms, which is as long
    as their norm takes.
    """
    gradients = _load.native_module().gather_gradients(parameters, room.data_ptr())
    return None if gradients is None else (gradients, room[: len(gradients)])


def norms_of(table: Tensor) -> Tensor:
    """The float64 norms of the gradients of a table."""
    norms = torch.empty(len(table), dtype=torch.float64)
    _load.native().gradient_norms(table, norms)
    return norms


@launcher("gradient_norms", device="cpu", backend="native", supports=_needs_dense)
def _(gradients):
    return norms_of(_table(gradients))


@launcher("gradient_norms", device="cuda", backend="triton", supports=_needs_dense)
@launcher("gradient_norms", device="cpu", backend="triton", supports=_needs_dense)
def _(gradients):
    from stablekern.triton_kernels.grad_guard import gradient_norms

    norms = gradients[0].new_empty((len(gradients),), dtype=torch.float64)
    gradient_norms(gradients, norms)
    return norms


@launcher("gradient_norms", device="cuda", backend="torch")
@launcher("gradient_norms", device="cpu", backend="torch")
def _(gradients):
    norms: list[Tensor] = [torch.empty(0)] * len(gradients)
    for members in _by(_dtype, gradients):
        views = [_real(gradients[i]) for i in members]
        if views[0].dtype == torch.float64:
            found = [_norm(view) for view in views]
        else:
            found = list(torch._foreach_norm(views, 2, dtype=torch.float64))
        for i, value in zip(members, found, strict=True):
            norms[i] = value
    return torch.stack(norms)


@launcher("multiply_gradients", device="cpu", backend="native", supports=_needs_dense)
def _(gradients, factor):
    _load.native().multiply_gradients(_table(gradients), factor)


@launcher("multiply_gradients", device="cuda", backend="triton", supports=_needs_dense)
@launcher("multiply_gradients", device="cpu", backend="triton", supports=_needs_dense)
def _(gradients, factor):
    from stablekern.triton_kernels.grad_guard import multiply_gradients

    multiply_gradients(gradients, factor)


@launcher("multiply_gradients", device="cuda", backend="torch")
@launcher("multiply_gradients", device="cpu", backend="torch")
def _(gradients, factor):
    for members in _by(_dtype, gradients):
        views = [_real(gradients[i]) for i in members]
        if views[0].dtype in _check.HALF:  # a factor below 6e-8 is 0 in float16, though its products need not be
            for view in views:
                view.copy_(view.float().mul_(factor))
        else:
            torch._foreach_mul_(views, factor.to(views[0].dtype))


def _in_memory_order(part: Tensor) -> Tensor:
    """The same numbers; neither a norm nor a factor asks for their order, but the kernels want them consecutive."""
    if part.is_conj():
        part = part.conj()
    if part.is_contiguous():
        return part
    stride = part.stride()
    return part.permute(sorted(range(part.dim()), key=lambda dim: -stride[dim]))


def _norms(gradients: list[Tensor], parts: list[Tensor], device: torch.device) -> Tensor:
    """The float64 norm of each gradient, of the whole one if it is sharded: shape (number of gradients,)."""
    if set(map(_device, parts)) == {device}:
        norms = _gradient_norms(parts)
    else:
        norms = torch.empty(len(gradients), dtype=torch.float64, device=device)
        for members in _by(_device, parts):
            norms[members] = _gradient_norms([parts[i] for i in members]).to(device, non_blocking=True)
    for members in _sharded_like(gradients) if parts is not gradients else ():
        owner, values = gradients[members[0]], norms[members]
        peak = _shards.reduce(values, owner, "max")  # may pass over a NaN, which the sum then brings back
        unit = torch.where(peak.isfinite() & (peak > 0), peak, 1.0)
        norms[members] = _shards.reduce((values / unit).square(), owner, "sum").sqrt() * unit
    return norms


def tensor_norms(tensors: list[Tensor], device: torch.device) -> Tensor:
    """The float64 norm of each dense tensor, shape (number of tensors,) on `device`: finite if and only if all of the
    tensor is (for float64 entries above 1e154 the norm is scaled first).
    """
    return _norms(tensors, [_in_memory_order(_shards.local(tensor)) for tensor in tensors], device)


def _sharded_like(gradients: list[Any]) -> list[list[int]]:
    """Positions of sharded gradients, those together that are sharded alike."""
    groups: dict[Any, list[int]] = {}
    for i, gradient in enumerate(gradients):
        if _shards.is_sharded(gradient):
            groups.setdefault((gradient.device_mesh, gradient.placements), []).append(i)
    return list(groups.values())


def _multiply(parts: list[Tensor], factor: Tensor) -> None:
    """Multiply all by one 0-d float64 factor, in place; half precision goes through float32."""
    devices = set(map(_device, parts))
    for device in devices:
        members = parts if len(devices) == 1 else [part for part in parts if part.device == device]
        _multiply_gradients(members, factor.to(device, non_blocking=True))
    torch.autograd.graph.increment_version(parts)


# ---- the guard -------------------------------------------------------------------------------------------------------


def _named(params: Any) -> list[tuple[str, Tensor]]:
    """(name, parameter) of a module, of named parameters or of parameters; each parameter once."""
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    elif isinstance(params, Tensor):
        params = [params]
    elif not isinstance(params, Iterable):
        raise TypeError(message(_WHERE, "`params` must be a module or parameters", type(params).__name__))
    named: dict[int, tuple[str, Tensor]] = {}
    for i, entry in enumerate(params):
        name, p = entry if isinstance(entry, tuple) and len(entry) == 2 else (f"parameter {i}", entry)
        if not isinstance(p, Tensor):
            rule = f"`params[{i}]` must be a parameter or (name, parameter)"
            raise TypeError(message(_WHERE, rule, type(p).__name__))
        named.setdefault(id(p), (name, p))
    return list(named.values())


class GradGuard:
    r"""Check, unscale, measure and clip gradients in one call, and keep non-finite ones away from the weights.

        guard = GradGuard(model, max_norm=1.0)
        optimizer.found_inf = guard.found_inf            # ComplexAdamW, or torch's with fused=True
        ...
        loss.backward(); norm = guard(); optimizer.step(); optimizer.zero_grad()

    Any other optimizer: `guard.step(optimizer)` in place of `optimizer.step()`. With a `GradScaler`, which sets and
    deletes `optimizer.found_inf` itself: `norm = guard(scale=scaler); guard.step(optimizer, scaler)` in place of
    `unscale_`, clip, `step` and `update`.

    **Arguments:**

    - `params`: a module, `module.named_parameters()`, or parameters (then called "parameter 0", ...); each counts once.
        Make the guard when the model has its final device, dtype and sharding. Gradients may be float16, bfloat16,
        float32, float64 or complex, on several devices, sharded (DTensor) or None; sparse ones are a `TypeError`.
    - `max_norm`: the largest norm that passes unclipped, >= 0; `inf` only checks. The attribute may be changed.
    - `policy`: what happens if any gradient holds a NaN or an infinity. Keyword only.
        "skip": all gradients stay as they are, still scaled, for inspection; `found_inf` tells the optimizer to skip.
        "zero": every *tensor* that is not finite is set to 0 as a whole (the finite entries of a poisoned tensor come
        from the same broken backward), norm and clip are those of the rest, and the step is taken.
        "raise": `NonFiniteError` names the first bad parameter; gradients stay as they are. Reads the flag on the host.

    **Attributes:** 0-d tensors on the device of the first parameter, always the same ones. `found_inf` (float32): 1 if
    the last call left non-finite gradients and the step must be skipped, else 0 (always 0 under "zero"). `steps`,
    `skipped`, `zeroed` (int64): calls, calls that ended in a skip, calls that zeroed a tensor. Reading one waits for
    the device; the guard itself does not.

    **Accuracy:** the norm is float64 and right to 1e-12 relative for every finite float32 gradient; factors below 1e-38
    (norm / max_norm above 1e38) lose digits in float32 gradients and may clip to 0.
    """

    def __init__(self, params: Any, max_norm: float, *, policy: str = "skip") -> None:
        self._parameters = _named(params)
        self._names, self._tensors = tuple(name for name, _ in self._parameters), [p for _, p in self._parameters]
        self._room = room_for(len(self._parameters))  # of the native kernels' table
        self.max_norm = max_norm
        _check.choice(_WHERE, "policy", policy, ("skip", "zero", "raise"))
        self.policy = policy
        device = self._parameters[0][1].device if self._parameters else torch.device("cpu")
        self.found_inf = torch.zeros((), device=device)
        self.steps, self.skipped, self.zeroed = (torch.zeros((), dtype=torch.int64, device=device) for _ in range(3))
        # Of the last call: names with whether each is finite; 1 if anything was not, whatever the policy made of it;
        # whether `step` may follow; whether the guard divided by a scale.
        self._checked: tuple[tuple[str, ...], Tensor] | None = None
        self._bad = self.found_inf
        self._ready, self._unscaled = False, False

    @property
    def max_norm(self) -> float:
        return self._max_norm

    @max_norm.setter
    def max_norm(self, value: float) -> None:
        self._max_norm = _check.number(_WHERE, "max_norm", value, low=0.0)  # a negative one would turn gradients round

    def __repr__(self) -> str:
        return f"GradGuard({len(self._parameters)} parameters, max_norm={self.max_norm:g}, policy={self.policy!r})"

    @torch.no_grad()
    def __call__(self, *, scale: float | Tensor | GradScaler | None = None, veto: Tensor | None = None) -> Tensor:
        """Unscale, check and clip the gradients in place.

        **Arguments:** keyword only.

        - `scale` divides the gradients: a number, a 0-d tensor, or a `GradScaler` whose `unscale_` has not been called
            for these gradients (unlike it, this takes complex and bfloat16 ones).
        - `veto`: a 0-d bool tensor on the device of `found_inf`. Where it is true this step is skipped as if a gradient
            were not finite; only under the policy "skip".

        **Returns:** the norm before clipping, a 0-d float64 tensor on the device of the first parameter; inf or NaN if
        a gradient is, unless the policy is "zero". 0 if there are no gradients.

        **Raises:** `NonFiniteError` under "raise"; `TypeError` for sparse gradients or another veto, `ValueError` for a
        scale <= 0, for a veto under another policy, or if the parameters were moved to another device since the guard
        was made.
        """
        if veto is not None:
            self._check_veto(veto)
        inverse = self._inverse(scale)
        gathered = self._gather()
        if gathered is None:
            names, gradients = self._gradients()
            plain = all(type(g) is Tensor and g.is_contiguous() for g in gradients)
            parts = gradients if plain else [_in_memory_order(_shards.local(gradient)) for gradient in gradients]
            norms = _norms(gradients, parts, self.found_inf.device)
        else:
            names, gradients, table = gathered
            norms = norms_of(table)
        finite = norms.isfinite()
        bad = ~finite.all() if veto is None else ~finite.all() | veto
        self._checked = (names, finite)
        self.steps += 1
        if self.policy == "raise" and bool(bad):
            self.found_inf.fill_(1.0)
            self._ready = False
            rule = f"the gradient of `{self.first_bad()}` must be finite"
            raise NonFiniteError(message(_WHERE, rule, "a NaN or an infinity"))
        zeroing = self.policy == "zero"
        norm = _norm(torch.where(finite, norms, 0.0) if zeroing else norms) * inverse
        factor = (self.max_norm / (norm + CLIP_NORM_OFFSET.of())).clamp(max=1.0) * inverse
        if zeroing:
            for gradient, good in zip(gradients, finite.unbind(), strict=True):
                _real(gradient).masked_fill_(~good.to(gradient.device, non_blocking=True), 0.0)
            self.zeroed += bad
        else:
            factor = torch.where(bad, 1.0, factor)  # times 1: every value stays, NaN and infinities too
            self.found_inf.copy_(bad)
            self.skipped += bad
        if gathered is None:
            _multiply(parts, factor)
        elif _load.native().multiply_gradients(table, factor):
            torch.autograd.graph.increment_version(gradients)
        self._bad = bad.to(torch.float32)
        self._ready, self._unscaled = True, scale is not None
        return norm

    def _check_veto(self, veto: Any) -> None:
        if self.policy != "skip":
            raise ValueError(message(_WHERE, '`veto` is for the policy "skip"', repr(self.policy)))
        if not isinstance(veto, Tensor) or veto.dtype != torch.bool or veto.dim() != 0:
            got = f"{tuple(veto.shape)} {veto.dtype}" if isinstance(veto, Tensor) else type(veto).__name__
            raise TypeError(message(_WHERE, "`veto` must be a 0-d bool tensor", got))

    def _gather(self) -> tuple[tuple[str, ...], list[Tensor], Tensor] | None:
        """Names, gradients and their table; None if the usual way must be taken."""
        device = self.found_inf.device
        if device.type != "cpu" or torch.compiler.is_compiling() or backend_for("gradient_norms", []) != "native":
            return None
        if self._parameters and self._parameters[0][1].device != device:
            return None
        found = gathered(self._tensors, self._room)
        if found is None:
            return None
        gradients, table = found
        names = self._names
        if len(gradients) < len(names):
            names = tuple(name for name, p in self._parameters if p.grad is not None)
        return names, gradients, table

    def _gradients(self) -> tuple[tuple[str, ...], list[Tensor]]:
        device = self.found_inf.device
        if self._parameters and self._parameters[0][1].device != device:
            rule = f"the parameters must stay where they were when the guard was made, on {device}"
            raise ValueError(message(_WHERE, rule, self._parameters[0][1].device))
        present = [(name, p, grad) for name, p in self._parameters if (grad := p.grad) is not None]
        for name, _, grad in present:
            if grad.layout is not torch.strided:
                raise TypeError(message(_WHERE, f"the gradient of `{name}` must be dense", grad.layout))
        names, gradients = [], []
        for name, p, grad in present:
            if type(grad) is not Tensor:
                whole = _shards.like(grad, p)
                if whole is not grad:
                    p.grad = grad = whole
            names.append(name)
            gradients.append(grad)
        return tuple(names), gradients

    def _inverse(self, scale: float | Tensor | GradScaler | None) -> float | Tensor:
        if isinstance(scale, GradScaler):
            scale = scale._get_scale_async() if scale.is_enabled() else None
        if scale is None:
            return 1.0
        if isinstance(scale, Tensor):
            if scale.numel() != 1 or scale.is_complex():
                raise ValueError(message(_WHERE, "`scale` must have one real element", tuple(scale.shape)))
            if scale.device.type == "cpu":
                _check.number(_WHERE, "scale", float(scale), low=0.0, strict=True)
            return scale.detach().reshape(()).to(self.found_inf.device, torch.float64, non_blocking=True).reciprocal()
        return 1.0 / _check.number(_WHERE, "scale", scale, low=0.0, strict=True)

    def first_bad(self) -> str | None:
        """Name of the first parameter whose gradient was not finite in the last call, or None. Reads the device."""
        if self._checked is None:
            return None
        names, finite = self._checked
        return next((name for name, good in zip(names, finite.tolist(), strict=True) if not good), None)

    def step(self, optimizer: Optimizer | Iterable[Optimizer], scaler: GradScaler | None = None) -> None:
        """Step one optimizer, or all of several, as the last call of the guard found; once per call.

        Optimizers that take `found_inf` (ComplexAdamW, torch's with `fused=True`) get it and skip on the device. For
        any other, the host reads the flag: one wait.

        With an enabled `scaler` this ends in `scaler.update()`, after a skipped step too, so the next iteration starts
        clean and with a smaller scale. The scaler's record of these gradients is joined with the guard's, or made from
        it if the guard did the unscaling. Under "zero" the step is taken, and the scale still backs off.

        **Raises:** `TypeError` for what has no `step`; `RuntimeError` if the guard was not called since the last
        `step`, or if the gradients are still scaled, or were unscaled twice.
        """
        optimizers = list(optimizer) if isinstance(optimizer, Iterable) else [optimizer]
        for one in optimizers:
            if not callable(getattr(one, "step", None)):
                raise TypeError(message(_WHERE, "`optimizer` must be an optimizer or several", type(one).__name__))
        if not self._ready:
            raise RuntimeError(message(_WHERE, "call the guard before `step`: these gradients have not been checked"))
        if scaler is not None and scaler.is_enabled():
            records = [scaler._per_optimizer_states[id(one)] for one in optimizers]
            for record in records:
                if bool(record["found_inf_per_device"]) == self._unscaled:
                    state = "were unscaled twice" if self._unscaled else "are still scaled"
                    rule = f"the gradients {state}: call either `guard(scale=scaler)` or `scaler.unscale_(optimizer)`"
                    raise RuntimeError(message(_WHERE, rule))
            self._ready = False
            for one, record in zip(optimizers, records, strict=True):
                self._step_scaled(one, scaler, record)
            scaler.update()
            return
        self._ready = False
        skip: bool | None = None
        for one in optimizers:
            if getattr(one, "_step_supports_amp_scaling", False):
                before = getattr(one, "found_inf", None)
                one.found_inf = self.found_inf  # type: ignore[attr-defined]
                try:
                    one.step()
                finally:
                    if before is None:
                        del one.found_inf  # type: ignore[attr-defined]
                    else:
                        one.found_inf = before  # type: ignore[attr-defined]
            else:
                skip = bool(self.found_inf) if skip is None else skip
                if not skip:
                    one.step()

    def _step_scaled(self, optimizer: Optimizer, scaler: GradScaler, record: dict[str, Any]) -> None:
        flags = record["found_inf_per_device"]
        if not flags:
            flags[self._bad.device] = self._bad.clone()
            record["stage"] = OptState.UNSCALED
        for device, flag in flags.items():
            flag.copy_(torch.maximum(flag, self._bad.to(device, non_blocking=True)))  # 1, not 2: fused code tests == 1
        if self.policy == "zero":
            optimizer.step()
        else:
            scaler.step(optimizer)
