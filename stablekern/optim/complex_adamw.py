r"""AdamW for real and complex parameters, with optional Langevin noise whose gain is bounded by construction.

One step, for a parameter $p$ with gradient $g$ (its own sign flipped under `maximize`), step number $t$ and
$\gamma$ = `lr`, $\lambda$ = `weight_decay`, $T$ = `temperature`:

$$ \begin{aligned}
m &\leftarrow \beta_1 m + (1-\beta_1) g, \qquad v \leftarrow \beta_2 v + (1-\beta_2) |g|^2, \\
s &= \sqrt{v/(1-\beta_2^t)} + \epsilon, \\
p &\leftarrow (1-\gamma\lambda) p - \frac{\gamma}{1-\beta_1^t} \frac{m}{s} + \sqrt{2 T \gamma}\; \kappa\, n, \qquad
\kappa = \min\Bigl(\frac{1}{\sqrt s + \epsilon_n},\; c\Bigr), \qquad
c = \begin{cases} \kappa_{\max} & v > 0 \\ \min(\kappa_{\max}, 1) & v = 0. \end{cases}
\end{aligned} $$

**Complex parameters.** Coupled, $|g|^2 = g_r^2 + g_i^2$ is one number for both parts, so a rotation of all gradients
rotates the step; torch's own rule takes the parts as two reals, and the step depends on the phase.

**Noise.** Preconditioned Langevin dynamics pairs the drift $\gamma g/s$ with noise of variance $2T\gamma/s$. With the
usual $\epsilon$ of 1e-8 and no gradient yet, $1/\sqrt s$ is 1e4: a dead parameter is thrown about, and adding another
1e-8 behind the square root changes that by 0.01 %. Here $\kappa \le \kappa_{\max}$ always: at the default 1 the noise
is never more than that of plain SGLD; its variance is $2T\gamma/s$ (up to $\epsilon_n$) where
$\sqrt s + \epsilon_n \ge 1/\kappa_{\max}$; and an element without a gradient history gets a gain of at most 1
whatever $\kappa_{\max}$ is. (The drift $\Gamma$ of a position-dependent metric is left out, as Li et al. do.)

**Sources:** Loshchilov & Hutter, arXiv:1711.05101 (AdamW); Reddi et al., arXiv:1904.09237 (AMSGrad); Welling & Teh 2011
(SGLD); Li et al., arXiv:1512.07666 (preconditioned SGLD).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from stablekern import _check
from stablekern.errors import message
from stablekern.optim import _shards
from stablekern.optim.philox import normal

__all__ = ["ComplexAdamW"]

_WHERE = "optim.ComplexAdamW"
_LARGEST = sys.float_info.max  # of a finite number
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_SQUARES = _MOMENTS[1:]


# ---- the arithmetic, on real tensors; every argument that varies from step to step may be a 0-d tensor ---------------


def _update_moments(
    grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sq: Tensor, beta1: float, beta2: float
) -> None:
    """m and v, in place. Several parts with one v are one complex number per element."""
    exp_avg_sq.mul_(beta2)
    for grad, exp_avg in zip(grads, exp_avgs, strict=True):
        exp_avg.lerp_(grad, 1.0 - beta1)
        exp_avg_sq.addcmul_(grad, grad, value=1.0 - beta2)


def _denominator(second_moment: Tensor, bias2_root: Tensor, eps: float) -> Tensor:
    """s = sqrt(v / (1 - beta2^t)) + eps."""
    return second_moment.sqrt().div_(bias2_root).add_(eps)


def _noise_gain(second_moment: Tensor, denominator: Tensor, noise_eps: float, max_noise_gain: float) -> Tensor:
    """min(1 / (sqrt(s) + noise_eps), max_noise_gain), and at most 1 where v = 0."""
    gain = denominator.sqrt().add_(noise_eps).reciprocal_().clamp_(max=max_noise_gain)
    return torch.where(second_moment == 0, gain.clamp(max=1.0), gain)


def _update_values(
    values: list[Tensor],
    exp_avgs: list[Tensor],
    denominator: Tensor,
    noise: list[Tensor] | None,  # already scaled
    step_size: float | Tensor,
    decay: float | Tensor,
) -> None:
    """Weight decay, drift and noise, in place."""
    for i, (value, exp_avg) in enumerate(zip(values, exp_avgs, strict=True)):
        value.mul_(decay).sub_((exp_avg / denominator).mul_(step_size))
        if noise is not None:
            value.add_(noise[i])


# ---- what is updated -------------------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """What has one v per element: a parameter, or a (re, im) pair of them."""

    members: tuple[Tensor, ...]
    stream: int  # parameter id of its noise
    lane: int | None  # for half of a pair that is not coupled: which of the two normals of an element is its own


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _check.HALF else dtype


def _parts(tensor: Tensor, coupled: bool) -> list[Tensor]:
    """Real views: re and im of a complex tensor if they share a v, else one view (with a last dimension of 2)."""
    if not tensor.is_complex():
        return [tensor]
    real = torch.view_as_real(tensor)
    return list(real.unbind(-1)) if coupled else [real]


def _on(value: float | Tensor, device: torch.device) -> float | Tensor:
    """A scalar where it can be used on `device`: CPU tensors can everywhere."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value.to(device, non_blocking=True)
    return value


def _check_scalar(name: str, value: Any) -> None:
    """A finite number >= 0, or a 0-d real tensor; tensors on a GPU are not read."""
    if isinstance(value, Tensor):
        if value.dim() != 0 or not value.is_floating_point():
            got = f"shape {tuple(value.shape)}, {value.dtype}"
            raise ValueError(message(_WHERE, f"`{name}` must be a number or a 0-d floating-point tensor", got))
        if value.device.type != "cpu":
            return
        value = value.item()
    _check.number(_WHERE, name, value, low=0.0, high=_LARGEST)


def _check_options(group: dict[str, Any]) -> None:
    """The options of one parameter group."""
    _check_scalar("lr", group["lr"])
    _check_scalar("temperature", group["temperature"])
    betas = group["betas"]
    if (
        not isinstance(betas, (tuple, list))
        or len(betas) != 2
        or not all(isinstance(beta, (int, float)) and 0.0 <= beta < 1.0 for beta in betas)
    ):
        raise ValueError(message(_WHERE, "`betas` must be two numbers in [0, 1)", betas))
    # Below the smallest normal float32, eps would vanish and an element without a gradient would become 0/0.
    _check.number(_WHERE, "eps", group["eps"], low=torch.finfo(torch.float32).tiny, high=_LARGEST)
    _check.number(_WHERE, "weight_decay", group["weight_decay"], low=0.0, high=_LARGEST)
    _check.number(_WHERE, "noise_eps", group["noise_eps"], low=0.0, high=_LARGEST)
    _check.number(_WHERE, "max_noise_gain", group["max_noise_gain"], low=0.0)
    _check.integer(_WHERE, "seed", group["seed"], low=0, high=2**64 - 1)
    for name in ("coupled", "amsgrad", "maximize", "capturable"):
        _check.choice(_WHERE, name, group[name], (False, True))


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(message(_WHERE, f"`{name}` must be a real tensor with one element", got))


def _check_pairs(pairs: Iterable[Any]) -> list[tuple[Tensor, Tensor]]:
    """Each of `pairs` must be two real tensors that agree."""
    checked = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(p, Tensor) for p in pair):
            raise TypeError(message(_WHERE, "each of `pairs` must be two tensors (re, im)", type(pair).__name__))
        re, im = pair
        if re.is_complex() or re.shape != im.shape or re.dtype != im.dtype or re.device != im.device:
            got = [f"{tuple(p.shape)} {p.dtype} on {p.device}" for p in pair]
            rule = "the halves of a pair must be real and agree in shape, dtype and device"
            raise ValueError(message(_WHERE, rule, *got))
        checked.append((re, im))
    return checked


def _pair_indices(pairs: Iterable[Any], params: list[Tensor]) -> tuple[tuple[int, int], ...]:
    """Positions within `params` of each (re, im) pair of tensors; every parameter in at most one pair."""
    position = {id(p): i for i, p in enumerate(params)}
    indices = [(position.pop(id(re), None), position.pop(id(im), None)) for re, im in _check_pairs(pairs)]
    if any(i is None for pair in indices for i in pair):
        raise ValueError(message(_WHERE, "the halves of a pair must be parameters of one group, and of no other pair"))
    return tuple(indices)


class ComplexAdamW(Optimizer):
    r"""AdamW with a rotation-equivariant rule for complex parameters and bounded Langevin noise.

    For real parameters at `temperature=0` it is `torch.optim.AdamW`, and its `state_dict` can be exchanged with it. The
    equations are in the docstring of this module.

    **Arguments:**

    - `params`: parameters, (name, parameter) tuples or groups, as in every torch optimizer: float16, bfloat16, float32,
        float64, complex64 or complex128, plain or sharded (DTensor, as FSDP2 makes them).
    - `lr`, `betas`, `eps`, `weight_decay`, `amsgrad`, `maximize`: as in `torch.optim.AdamW`. `lr` is a number or a 0-d
        tensor; `eps` is at least 1.2e-38, so that an element without a gradient is never 0/0.
    - `temperature`: T >= 0 of the Langevin noise, a number or a 0-d tensor; 0 draws none (a tensor always draws). A
        complex parameter gets independent noise on re and im, each with the gain $\kappa$. Keyword only, as all below.
    - `coupled`: re and im of a complex parameter share $|g|^2$. If false, they are two reals, step for step as in
        `torch.optim.AdamW`.
    - `seed`: integer in [0, 2^64). The noise is a function of (`seed`, step, parameter id, element of the whole
        parameter) alone (see `stablekern.optim.philox`): it neither reads nor moves torch's generators, is the same
        however the parameter is sharded or laid out in memory, and goes on after a resume as if nothing had happened.
        The parameter id is the position over all groups; complex element k takes the normals 2k and 2k+1.
    - `noise_eps`, `max_noise_gain`: $\epsilon_n \ge 0$ and $\kappa_{\max} \ge 0$. Where $v$ is exactly 0 (with
        `amsgrad`, where its maximum is) the cap is `min(max_noise_gain, 1)`. That holds per element, so the rows of a
        table that never had a gradient get at most plain SGLD noise. A gradient whose square underflows counts as 0.
    - `capturable`: permits capture in a CUDA graph. Counters and moments are on the parameter's device in any case; a
        captured step keeps the numbers it was captured with, so `lr` and `temperature` that change must be device
        tensors. Run one step before capturing: it allocates the state.
    - `pairs`: list of (re, im) tensors out of one group of `params`, each pair one complex parameter kept in two real
        ones. Treated as a complex parameter with the id of `re`; if only one half has a gradient, the other's is 0.

    A group may set any option for itself, and `pairs` too.

    **State:** `step` (0-d float64, so that it counts beyond 2^24), `exp_avg` like the parameter, `exp_avg_sq` and
    (`amsgrad`) `max_exp_avg_sq`: real for coupled complex parameters, else like the parameter; a pair shares one. For
    float16 and bfloat16, where one step is often less than half an ulp, all are float32 and `master` is a float32 copy
    that takes the steps; where the parameter is no longer its rounded copy (it was written from outside), the copy
    follows it. `seed`, `temperature` and all other options are in `state_dict`, and loading restores them. Loading also
    takes a `torch.optim.AdamW` state (its two real second moments of a complex parameter are added up if `coupled`) and
    never shares memory with what was loaded.

    **Skipping.** `step(found_inf=flag)`, or an attribute `optimizer.found_inf` (as `torch.amp.GradScaler` and torch's
    fused optimizers use it, or set once to `guard.found_inf`): where the 0-d tensor is not 0, parameters, moments and
    step counters stay as they are, bit for bit, decided on the device. An attribute `optimizer.grad_scale` divides the
    gradients (`.grad` itself is left as it is). Without a flag a non-finite gradient poisons its parameter, as in
    torch, and one above the square root of the largest float makes v infinite and stops its element: put `GradGuard` in
    front.

    **Raises:** `ValueError` for an option out of range, mismatched pairs, repeated parameters or a state that does not
    fit, `TypeError` for parameters of another dtype or sparse gradients, `RuntimeError` for capture without
    `capturable`; all before anything is written.

    **Accuracy:** moments and values within a few ulp of `torch.optim.AdamW` per step (`tests/test_optim.py`). Nothing
    reads the device from the host.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over `grad_scale` and `found_inf` and does not wait for them

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        temperature: float | Tensor = 0.0,
        coupled: bool = True,
        seed: int = 0,
        noise_eps: float = 1e-8,
        max_noise_gain: float = 1.0,
        amsgrad: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        pairs: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "temperature": temperature,
            "coupled": coupled,
            "seed": seed,
            "noise_eps": noise_eps,
            "max_noise_gain": max_noise_gain,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "capturable": capturable,
            "pairs": (),
        }
        _check_options(defaults)
        super().__init__(params, defaults)
        home = {id(p): group for group in self.param_groups for p in group["params"]}
        for pair in _check_pairs(pairs or ()):
            group = home.get(id(pair[0]))
            if group is None:
                raise ValueError(message(_WHERE, "the halves of a pair must be parameters of one group"))
            known = [(group["params"][re], group["params"][im]) for re, im in group["pairs"]]
            group["pairs"] = _pair_indices([*known, pair], group["params"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; ids of earlier parameters, and so their noise, stay the same."""
        group = {**self.defaults, **param_group}
        listed = group["params"]
        if isinstance(listed, set):
            raise TypeError(message(_WHERE, "parameters must come in an order, which their ids follow", "a set"))
        group["params"] = [listed] if isinstance(listed, Tensor) else list(listed)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]
        _check_options(group)
        for p in tensors:
            if isinstance(p, Tensor) and p.dtype not in (*_check.HALF, *_check.REAL, *_check.COMPLEX):
                raise TypeError(message(_WHERE, "parameters must be floating point or complex", p.dtype))
        if len({id(p) for p in tensors}) != len(tensors):
            raise ValueError(message(_WHERE, "a parameter is listed twice in one group"))
        group["pairs"] = _pair_indices(group["pairs"], tensors)
        super().add_param_group(group)

    # ---- state -------------------------------------------------------------------------------------------------------

    def _moment_dtype(self, key: str, p: Tensor, group: dict[str, Any]) -> torch.dtype:
        dtype = _compute_dtype(p.dtype)
        return dtype.to_real() if key in _SQUARES and group["coupled"] else dtype

    def _prepare(self, unit: _Unit, group: dict[str, Any]) -> None:
        """Give each member of a unit its state, the first time that it is stepped."""
        squares = _SQUARES if group["amsgrad"] else _SQUARES[:1]
        for p in unit.members:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float64, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, dtype=self._moment_dtype("exp_avg", p, group))
            for key in squares:
                if key not in state:
                    first = self.state[unit.members[0]]
                    state[key] = (
                        first[key]
                        if state is not first
                        else torch.zeros_like(p, dtype=self._moment_dtype(key, p, group))
                    )
            if p.dtype in _check.HALF and "master" not in state:
                state["master"] = p.detach().float()

    def state_dict(self) -> dict[str, Any]:
        """As in every torch optimizer; the second moment that a pair shares is copied, so that each half owns one."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            for _, im in group["pairs"] if group["coupled"] else ():
                key = group["params"][im]
                if key in packed["state"]:
                    own = packed["state"][key]
                    packed["state"][key] = {k: v.clone() if k in _SQUARES else v for k, v in own.items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict` of this optimizer or of `torch.optim.AdamW`: moments, steps, seed and all options.

        `ValueError`, before anything is written, if it does not fit: other groups or shapes, other pairs, a moment
        missing, an option out of range.
        """
        incoming: dict[str, Any] = {}

        def checked(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            self._check_saved(final)
            incoming.update(final)
            return {
                **final,  # a foreign state keeps the options that it does not know
                "param_groups": [
                    {**{k: v for k, v in own.items() if k != "params"}, **saved, "pairs": own["pairs"]}
                    for saved, own in zip(final["param_groups"], self.param_groups, strict=True)
                ],
            }

        handle = self.register_load_state_dict_pre_hook(checked)  # the last of the hooks: it sees what torch will load
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # Torch casts moments to the parameter's dtype, loses the difference between real and complex ones, and may
        # share memory with the dictionary: take them again from the source.
        for saved_group, group in zip(incoming["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved_group["params"], group["params"], strict=True):
                if incoming["state"].get(key):
                    self.state[p] = self._adopt(p, incoming["state"][key], group)
            for i, j in group["pairs"] if group["coupled"] else ():
                re, im = (self.state.get(group["params"][k]) for k in (i, j))
                for key in _SQUARES if re else ():
                    if key in re:
                        if not saved_group.get("coupled", False):
                            re[key] += im[key]
                        im[key] = re[key]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _check_saved(self, saved: dict[str, Any]) -> None:
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            raise ValueError(message(_WHERE, "`state_dict` must have the keys `state` and `param_groups`"))
        sizes = [len(group["params"]) for group in saved["param_groups"]]
        own_sizes = [len(group["params"]) for group in self.param_groups]
        if sizes != own_sizes:
            raise ValueError(message(_WHERE, f"`state_dict` must have groups of {own_sizes} parameters", sizes))
        for saved_group, group in zip(saved["param_groups"], self.param_groups, strict=True):
            options = {**group, **saved_group}
            _check_options(options)
            pairs = tuple(tuple(pair) for pair in options["pairs"])
            if pairs != group["pairs"]:
                raise ValueError(message(_WHERE, f"`state_dict` must have the pairs {group['pairs']}", pairs))
            states = [saved["state"].get(key) for key in saved_group["params"]]
            for i, j in pairs if options["coupled"] else ():
                if bool(states[i]) != bool(states[j]):
                    raise ValueError(message(_WHERE, f"`state_dict` must have both halves of the pair ({i}, {j})"))
            required = ("step", *(_MOMENTS if options["amsgrad"] else _MOMENTS[:2]))
            for i, (p, state) in enumerate(zip(group["params"], states, strict=True)):
                if not state:
                    continue
                if not set(required) <= state.keys():
                    rule = f"the saved state of parameter {i} must have the keys {', '.join(required)}"
                    raise ValueError(message(_WHERE, rule, ", ".join(sorted(state))))
                for key, value in ((key, state[key]) for key in (*_MOMENTS, "master") if key in state):
                    if value.shape != p.shape or _shards.is_sharded(value) != _shards.is_sharded(p):
                        rule = f"the saved `{key}` of parameter {i} must be {tuple(p.shape)} and sharded like it"
                        raise ValueError(message(_WHERE, rule, tuple(value.shape)))
                    if self._moment_dtype(key, p, options).is_complex and not value.is_complex():
                        rule = f"the saved `{key}` of parameter {i} must be complex"
                        raise ValueError(message(_WHERE, rule, value.dtype))

    def _adopt(self, p: Tensor, saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
        """A saved state with our dtypes, on the parameter's device, in memory of its own."""
        state = dict(saved)
        state["step"] = torch.as_tensor(saved["step"]).to(p.device, torch.float64, copy=True).reshape(())
        for key in (*_MOMENTS, "master"):
            if key not in saved:
                continue
            value, dtype = saved[key], self._moment_dtype(key, p, group)
            if value.is_complex() and not dtype.is_complex:
                value = value.real + value.imag  # torch keeps |g_r|^2 and |g_i|^2 apart
            state[key] = value.to(p.device, dtype, copy=True)
        return state

    # ---- step --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, found_inf: Tensor | None = None) -> Any:
        """One step over all parameters that have a gradient.

        **Arguments:** `closure` re-evaluates the model and returns the loss. `found_inf` is a 0-d tensor: not 0, and
        nothing changes; it is joined with an attribute of that name. Keyword only.

        **Returns:** the closure's value, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flags = [flag for flag in (found_inf, getattr(self, "found_inf", None)) if flag is not None]
        scale = getattr(self, "grad_scale", None)
        self._check_step(flags, scale)
        first = 0
        for group in self.param_groups:
            by_device: dict[torch.device, list[_Unit]] = {}
            for unit in self._units(group, first):
                by_device.setdefault(unit.members[0].device, []).append(unit)
            for device, units in by_device.items():
                skip = None
                for flag in flags:
                    bad = flag.detach().reshape(()).to(device, non_blocking=True) != 0
                    skip = bad if skip is None else skip | bad
                here = None if scale is None else scale.detach().reshape(()).to(device, non_blocking=True)
                self._step_units(group, units, skip, here)
            first += len(group["params"])
        return loss

    def _check_step(self, flags: list[Any], scale: Any) -> None:
        for flag in flags:
            _check_flag("found_inf", flag)
        if scale is not None:
            _check_flag("grad_scale", scale)
        for group in self.param_groups:
            _check_options(group)
            noisy = isinstance(group["temperature"], Tensor) or group["temperature"] > 0
            for p in group["params"]:
                if noisy:
                    _shards.box(p)  # raises for a sharding whose elements it cannot place
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise TypeError(message(_WHERE, "gradients must be dense", p.grad.layout))
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            if not all(group["capturable"] for group in self.param_groups):
                raise RuntimeError(message(_WHERE, "capture in a CUDA graph needs `capturable=True` in every group"))

    def _units(self, group: dict[str, Any], first: int) -> list[_Unit]:
        """The units of a group that have a gradient; `first` is the id of the group's first parameter."""
        params = group["params"]
        partners = dict(group["pairs"])
        owners = {im: re for re, im in group["pairs"]}
        units = []
        for i, p in enumerate(params):
            if i in partners and group["coupled"]:
                units.append(_Unit((p, params[partners[i]]), first + i, None))
            elif i in owners and group["coupled"]:
                continue
            else:
                lane = 0 if i in partners else 1 if i in owners else None
                units.append(_Unit((p,), first + owners.get(i, i), lane))
        return [unit for unit in units if any(p.grad is not None for p in unit.members)]

    def _step_units(
        self, group: dict[str, Any], units: list[_Unit], skip: Tensor | None, grad_scale: Tensor | None
    ) -> None:
        """Step counters and bias corrections of the units on one device, as device tensors; then each unit."""
        beta1, beta2 = group["betas"]
        for unit in units:
            self._prepare(unit, group)
        count = torch.stack([self.state[unit.members[0]]["step"] for unit in units]) + 1.0
        bias1, bias2_root = 1.0 - beta1**count, (1.0 - beta2**count).sqrt()
        for unit, *scalars in zip(units, count.unbind(), bias1.unbind(), bias2_root.unbind(), strict=True):
            self._step_unit(group, unit, *scalars, skip, grad_scale)
        counters = [self.state[p]["step"] for unit in units for p in unit.members]
        taken = torch.ones_like(count[0]) if skip is None else (~skip).to(count.dtype)
        torch._foreach_add_(counters, [taken] * len(counters))  # a list: a single tensor would be read by the host

    def _step_unit(
        self,
        group: dict[str, Any],
        unit: _Unit,
        count: Tensor,
        bias1: Tensor,
        bias2_root: Tensor,
        skip: Tensor | None,
        grad_scale: Tensor | None,
    ) -> None:
        coupled = group["coupled"]
        lr, temperature = (_on(group[name], unit.members[0].device) for name in ("lr", "temperature"))
        states = [self.state[p] for p in unit.members]
        targets = [self._target(p) for p in unit.members]
        grads = [part for p in unit.members for part in self._gradient_parts(p, group, grad_scale)]
        values = [part for target in targets for part in _parts(target, coupled)]
        exp_avgs = [part for state in states for part in _parts(_shards.local(state["exp_avg"]), coupled)]
        keys = _SQUARES if group["amsgrad"] else _SQUARES[:1]
        squares = [_parts(_shards.local(states[0][key]), coupled)[0] for key in keys]
        kept = [*values, *exp_avgs, *squares]
        if skip is not None:  # work on copies, and choose on the device
            values, exp_avgs, squares = ([t.clone() for t in tensors] for tensors in (values, exp_avgs, squares))

        _update_moments(grads, exp_avgs, squares[0], *group["betas"])
        if group["amsgrad"]:
            torch.maximum(squares[1], squares[0], out=squares[1])
        denominator = _denominator(squares[-1], bias2_root, group["eps"])
        noise = None
        if isinstance(temperature, Tensor) or temperature > 0:
            gain = _noise_gain(squares[-1], denominator, group["noise_eps"], group["max_noise_gain"])
            gain.mul_((2.0 * temperature * lr) ** 0.5)
            noise = [normals.mul_(gain) for normals in self._normals(unit, group, count)]
        _update_values(values, exp_avgs, denominator, noise, lr / bias1, 1.0 - lr * group["weight_decay"])

        if skip is not None:
            for old, new in zip(kept, [*values, *exp_avgs, *squares], strict=True):
                old.copy_(torch.where(skip, old, new))
        for p, target in zip(unit.members, targets, strict=True):
            if p.dtype in _check.HALF:
                _shards.local(p).copy_(target)

    def _target(self, p: Tensor) -> Tensor:
        """What takes the step: the parameter, or its float32 copy after following what was written from outside."""
        value = _shards.local(p)
        if p.dtype not in _check.HALF:
            return value
        master = _shards.local(self.state[p]["master"])
        return master.copy_(torch.where(master.to(p.dtype) == value, master, value.float()))

    def _gradient_parts(self, p: Tensor, group: dict[str, Any], grad_scale: Tensor | None) -> list[Tensor]:
        dtype = _compute_dtype(p.dtype)
        if p.grad is None:  # the half of a pair that the loss does not see
            return _parts(torch.zeros_like(_shards.local(p), dtype=dtype), group["coupled"])
        grad = _shards.local(_shards.like(p.grad, p)).to(dtype).resolve_conj()
        if grad_scale is not None:
            grad = grad / grad_scale
        return _parts(-grad if group["maximize"] else grad, group["coupled"])

    def _normals(self, unit: _Unit, group: dict[str, Any], count: Tensor) -> list[Tensor]:
        """Standard normals for each part of a unit: the slice of the whole parameter's stream that is stored here.

        Whole leading rows are a run of the stream (what FSDP2 shards by). A rank that holds part of each row draws
        whole rows and keeps its columns.
        """
        p = unit.members[0]
        width = 2 if p.is_complex() or len(unit.members) == 2 or unit.lane is not None else 1
        sizes, offsets = _shards.box(p)
        row = width * math.prod(p.shape[1:])
        rows, skipped = (sizes[0], offsets[0]) if p.dim() else (1, 0)
        normals = normal(
            skipped * row,
            rows * row,
            seed=group["seed"],
            step=count,
            parameter=unit.stream,
            dtype=_compute_dtype(p.dtype).to_real(),
            device=p.device,
        ).view(*((rows, *p.shape[1:]) if p.dim() else ()), width)
        for dim in range(1, p.dim()):
            normals = normals.narrow(dim, offsets[dim], sizes[dim])
        if width == 2 and p.is_complex() and not group["coupled"]:
            return [normals]
        lanes = normals.unbind(-1)
        return [lanes[unit.lane]] if unit.lane is not None else list(lanes)
