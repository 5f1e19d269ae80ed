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
whatever $\kappa_{\max}$ is. As a sampler it has two biases. *Adapting v:* $s$ follows the gradients, and with it the
metric, whose drift $\Gamma$ is left out, as Li et al. do; it vanishes only with $v$ held fixed, when a quadratic
potential of curvature $k$ reaches the variance $T/k$ of its Gibbs measure (for small $\gamma$ and $\beta_1 = 0$; the
tests measure it). *The capped regime:* where $\sqrt s + \epsilon_n < 1/\kappa_{\max}$ the drift is still divided by
$s$, but the noise is held back, so that the variance reached is only $\kappa_{\max}^2 s\,T/k$. That is the price of a
bound; a larger $\kappa_{\max}$ lowers it.

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
from stablekern.optim._adamw_step import COMPLEX, FIRST, PAIR, REAL, SECOND, adamw_step, gathered, step_rows
from stablekern.optim.philox import normal

__all__ = ["ComplexAdamW"]

_WHERE = "optim.ComplexAdamW"
_LARGEST = sys.float_info.max  # of a finite number
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
_SQUARES = _MOMENTS[1:]


# ---- what is updated -------------------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """What has one v per element: a parameter, or a (re, im) pair of them."""

    members: tuple[Tensor, ...]
    stream: int  # parameter id of its noise
    lane: int | None  # for half of a pair that is not coupled: which of the two normals of an element is its own


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _check.HALF else dtype


def _scalar(value: float | Tensor, device: torch.device) -> Tensor:
    """A 0-d float64 tensor that can be used on `device` without waiting for it."""
    if isinstance(value, Tensor):
        return value.detach().to(device, torch.float64, non_blocking=True)
    return torch.full((), value, dtype=torch.float64, device=device)


def _is_coupled(saved_group: dict[str, Any]) -> bool:
    """Whether re and im shared |g|^2. Without the option: one that has a temperature, and is not ours, shares it."""
    return saved_group.get("coupled", "temperature" in saved_group)


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
    found = tuple((i, j) for i, j in indices if i is not None and j is not None)
    if len(found) < len(indices):
        raise ValueError(message(_WHERE, "the halves of a pair must be parameters of one group, and of no other pair"))
    return found


class _Lists:
    """The list arguments of one call of the kernel, filled unit by unit."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.exp_avgs: list[Tensor] = []
        self.squares: list[Tensor] = []
        self.largest: list[Tensor] = []
        self.steps: list[Tensor] = []
        self.rounded: list[Tensor] = []
        self.normals: list[Tensor | None] = []
        self.kinds: list[int] = []
        self.streams: list[int] = []
        self.offsets: list[int] = []

    def arguments(self) -> tuple[list[Any], ...]:
        normals: list[Tensor] = []
        if any(drawn is not None for drawn in self.normals):
            pairs = zip(self.normals, self.squares, strict=True)
            normals = [like.new_empty(0) if drawn is None else drawn for drawn, like in pairs]
        members = (self.values, self.grads, self.exp_avgs, self.squares, self.largest, self.steps, self.rounded)
        return *members, normals, self.kinds, self.streams, self.offsets


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
    takes a `torch.optim.AdamW` state (its two real second moments of a complex parameter are added up if `coupled`)
    and one whose moments of complex parameters are real tensors (..., 2), with a shared |g|^2 in both places; it
    never shares memory with what was loaded.

    **Skipping.** `step(found_inf=flag)`, or an attribute `optimizer.found_inf` (as `torch.amp.GradScaler` and torch's
    fused optimizers use it, or set once to `guard.found_inf`; a copy
    of the optimizer does not have it, set it again): where the 0-d tensor is not 0, parameters, moments and
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
        missing or no tensor, a complex one for a real parameter, a step that is no count, an option out of range.
        """
        if not isinstance(state_dict, dict):
            raise ValueError(message(_WHERE, "`state_dict` must be a dictionary", type(state_dict).__name__))
        incoming: dict[str, Any] = {}

        def checked(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            final = self._without_real_views(final)
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
                re: Any = self.state.get(group["params"][i])
                im: Any = self.state.get(group["params"][j])
                for key in _SQUARES if re and im else ():
                    if key in re:
                        if not _is_coupled(saved_group):
                            re[key] += im[key]
                        im[key] = re[key]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _without_real_views(self, saved: dict[str, Any]) -> dict[str, Any]:
        """The moments of complex parameters that were kept as real tensors (..., 2), in our form.

        An optimizer that works on real views and shares |g|^2 between re and im keeps it twice.
        """
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            raise ValueError(message(_WHERE, "`state_dict` must have the keys `state` and `param_groups`"))
        state = dict(saved["state"])
        for saved_group, group in zip(saved["param_groups"], self.param_groups, strict=False):
            for key, p in zip(saved_group["params"], group["params"], strict=False):
                own = state.get(key) or {}
                for name, value in own.items():
                    if (
                        name not in _MOMENTS
                        or not isinstance(value, Tensor)
                        or not p.is_complex()
                        or value.is_complex()
                    ):
                        continue
                    if tuple(value.shape) != (*p.shape, 2):
                        continue
                    if name == "exp_avg" or not _is_coupled(saved_group):
                        value = torch.view_as_complex(value.contiguous())
                    elif torch.equal(value[..., 0], value[..., 1]):
                        value = value[..., 0]
                    else:
                        rule = f"the saved `{name}` of a complex parameter must hold |g|^2 twice"
                        raise ValueError(message(_WHERE, rule, "different entries for re and im"))
                    state[key] = {**state[key], name: value}
        return {**saved, "state": state}

    def _check_saved(self, saved: dict[str, Any]) -> None:
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
                step = torch.as_tensor(state["step"]) if isinstance(state["step"], (int, float, Tensor)) else None
                if step is None or step.numel() != 1 or step.is_complex() or not 0 <= step.item() < math.inf:
                    rule = f"the saved `step` of parameter {i} must be a number >= 0"
                    raise ValueError(message(_WHERE, rule, state["step"] if step is None else step.tolist()))
                for key, value in ((key, state[key]) for key in (*_MOMENTS, "master") if key in state):
                    if not isinstance(value, Tensor):
                        rule = f"the saved `{key}` of parameter {i} must be a tensor"
                        raise ValueError(message(_WHERE, rule, type(value).__name__))
                    if value.shape != p.shape or _shards.is_sharded(value) != _shards.is_sharded(p):
                        rule = f"the saved `{key}` of parameter {i} must be {tuple(p.shape)} and sharded like it"
                        raise ValueError(message(_WHERE, rule, tuple(value.shape)))
                    if self._moment_dtype(key, p, options).is_complex and not value.is_complex():
                        rule = f"the saved `{key}` of parameter {i} must be complex"
                        raise ValueError(message(_WHERE, rule, value.dtype))
                    if value.is_complex() and not p.is_complex():
                        rule = f"the saved `{key}` of parameter {i} must be real"
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
        self._check_options(flags, scale)
        plain = self._gather()
        self._check_tensors(plain)
        first = 0
        for group, found in zip(self.param_groups, plain, strict=True):
            if found is None:
                by_device: dict[torch.device, list[_Unit]] = {}
                for unit in self._units(group, first):
                    by_device.setdefault(unit.members[0].device, []).append(unit)
                for device, units in by_device.items():
                    self._step_units(group, units, self._arguments(group, device, flags, scale))
            elif found[0]:
                stepped, _, table = found
                torch.autograd.graph.increment_version(stepped)  # before the step drives them out of the caches
                step_rows(table, *self._arguments(group, stepped[0].device, flags, scale))
            first += len(group["params"])
        return loss

    def _gather(self) -> list[tuple[list[Tensor], list[Tensor], Tensor] | None]:
        """For each group the table of its step, if all that it holds is plain (`_adamw_step.gathered`)."""
        found: list[tuple[list[Tensor], list[Tensor], Tensor] | None] = []
        first = 0
        for group in self.param_groups:
            params, options = group["params"], {"coupled": group["coupled"], "amsgrad": group["amsgrad"]}
            found.append(None if group["pairs"] else gathered(params, self.state, first, **options))
            first += len(params)
        return found

    def _check_options(self, flags: list[Any], scale: Any) -> None:
        for flag in flags:
            _check_flag("found_inf", flag)
        if scale is not None:
            _check_flag("grad_scale", scale)
        for group in self.param_groups:
            _check_options(group)
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            if not all(group["capturable"] for group in self.param_groups):
                raise RuntimeError(message(_WHERE, "capture in a CUDA graph needs `capturable=True` in every group"))

    def _check_tensors(self, plain: list[Any]) -> None:
        """Those of the groups of which `_gather` found that they are not plain."""
        for group, found in zip(self.param_groups, plain, strict=True):
            noisy = isinstance(group["temperature"], Tensor) or group["temperature"] > 0
            for p in group["params"] if found is None else ():
                if noisy:
                    _shards.box(p)  # raises for a sharding whose elements it cannot place
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise TypeError(message(_WHERE, "gradients must be dense", p.grad.layout))

    def _arguments(
        self, group: dict[str, Any], device: torch.device, flags: list[Tensor], scale: Tensor | None
    ) -> tuple[Any, ...]:
        """Those of the kernel from `lr` on."""
        temperature = group["temperature"]
        noisy = isinstance(temperature, Tensor) or temperature > 0
        skip = None
        for flag in [_scalar(flag.reshape(()), device) for flag in flags]:
            skip = flag if skip is None else torch.where(flag != 0, flag, skip)
        return (
            _scalar(group["lr"], device),
            _scalar(temperature, device) if noisy else None,
            skip,
            None if scale is None else _scalar(scale.reshape(()), device),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            group["noise_eps"],
            group["max_noise_gain"],
            group["maximize"],
            group["seed"] & 0xFFFFFFFF,
            group["seed"] >> 32,
        )

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

    def _step_units(self, group: dict[str, Any], units: list[_Unit], arguments: tuple[Any, ...]) -> None:
        """Hand the units of one device to the kernel. What is not dense in memory goes in a call of its own."""
        temperature = group["temperature"]
        noisy = isinstance(temperature, Tensor) or temperature > 0
        dense, scattered = _Lists(), _Lists()
        for unit in units:
            self._prepare(unit, group)
            if not self._add_plain(group, unit, dense):
                self._add(group, unit, noisy, dense, scattered)
        for lists in (dense, scattered):
            if lists.kinds:
                adamw_step(*lists.arguments(), *arguments)
        torch.autograd.graph.increment_version([p for unit in units for p in unit.members])

    def _add_plain(self, group: dict[str, Any], unit: _Unit, lists: _Lists) -> bool:
        """The short way for what most models hold; false, and nothing done, for all else."""
        p = unit.members[0]
        grad = p.grad
        complex_ = p.is_complex()
        if (
            grad is None
            or len(unit.members) == 2
            or unit.lane is not None
            or (complex_ and not group["coupled"])
            or _shards.is_sharded(p)
            or p.dtype in _check.HALF
            or grad.dtype != p.dtype
            or not p.is_contiguous()
            or not grad.is_contiguous()
            or grad.is_conj()
            or grad.is_neg()
        ):
            return False
        state = self.state[p]
        exp_avg, square = state["exp_avg"], state["exp_avg_sq"]
        if not exp_avg.is_contiguous() or not square.is_contiguous():
            return False
        if group["amsgrad"]:
            if not state["max_exp_avg_sq"].is_contiguous():
                return False
            lists.largest.append(state["max_exp_avg_sq"])
        lists.values.append(p)
        lists.grads.append(grad)
        lists.exp_avgs.append(exp_avg)
        lists.squares.append(square)
        lists.steps.append(state["step"])
        lists.normals.append(None)
        lists.kinds.append(COMPLEX if complex_ else REAL)
        lists.streams.append(unit.stream)
        lists.offsets.append(0)
        return True

    def _add(self, group: dict[str, Any], unit: _Unit, noisy: bool, dense: _Lists, scattered: _Lists) -> None:
        coupled, p = group["coupled"], unit.members[0]
        states = [self.state[member] for member in unit.members]
        halves = [_shards.local(member) for member in unit.members]
        is_half = p.dtype in _check.HALF
        values = [_shards.local(state["master"]) for state in states] if is_half else halves
        grads = [self._gradient(member) for member in unit.members]
        exp_avgs = [_shards.local(state["exp_avg"]) for state in states]
        squares = [_shards.local(states[0][key]) for key in (_SQUARES if group["amsgrad"] else _SQUARES[:1])]
        rounded = halves if is_half else []
        kind = REAL
        if p.is_complex() and coupled:
            kind = COMPLEX
        elif p.is_complex():
            values, grads, exp_avgs, squares = (
                [torch.view_as_real(tensor) for tensor in tensors] for tensors in (values, grads, exp_avgs, squares)
            )
        elif len(unit.members) == 2:
            kind = PAIR
        elif unit.lane is not None:
            kind = SECOND if unit.lane else FIRST
        offset, normals = self._noise(unit, group, kind, states[0]["step"]) if noisy else (0, None)

        if not values[0].is_contiguous():  # in another order of the dimensions the elements may be consecutive
            stride = values[0].stride()
            order = sorted(range(len(stride)), key=lambda dim: -stride[dim])
            if noisy and normals is None:
                normals = self._slice_of_stream(unit, group, kind, states[0]["step"])
            if normals is not None:
                normals = normals.permute(*order, *range(len(order), normals.dim())).contiguous()
            values, grads, exp_avgs, squares, rounded = (
                [tensor.permute(order) for tensor in tensors] for tensors in (values, grads, exp_avgs, squares, rounded)
            )
        written = (values, exp_avgs, squares, rounded)
        lists = dense if all(t.is_contiguous() for tensors in written for t in tensors) else scattered
        lists.values += values
        lists.grads += [grad.contiguous() for grad in grads]
        lists.exp_avgs += exp_avgs
        lists.squares.append(squares[0])
        lists.largest += squares[1:]
        lists.steps += [state["step"] for state in states]
        lists.rounded += rounded
        lists.normals.append(normals)
        lists.kinds.append(kind)
        lists.streams.append(unit.stream)
        lists.offsets.append(offset)

    def _gradient(self, p: Tensor) -> Tensor:
        if p.grad is None:  # the half of a pair that the loss does not see
            return torch.zeros_like(_shards.local(p))
        return _shards.local(_shards.like(p.grad, p)).to(p.dtype).resolve_conj()

    def _noise(self, unit: _Unit, group: dict[str, Any], kind: int, step: Tensor) -> tuple[int, Tensor | None]:
        """Where this rank's elements start in the stream, or its normals, if the elements are no run of it.

        Whole leading rows are a run (what FSDP2 shards by).
        """
        p = unit.members[0]
        sizes, offsets = _shards.box(p)
        if tuple(sizes[1:]) != tuple(p.shape[1:]):
            return 0, self._slice_of_stream(unit, group, kind, step)
        elements = offsets[0] * math.prod(p.shape[1:]) if p.dim() else 0
        return (2 * elements if p.is_complex() and kind == REAL else elements), None

    def _slice_of_stream(self, unit: _Unit, group: dict[str, Any], kind: int, step: Tensor) -> Tensor:
        """The normals of this rank's part, cut from those of the whole rows that it lies in."""
        p = unit.members[0]
        interleaved = p.is_complex() or kind != REAL
        width = 2 if interleaved else 1
        sizes, offsets = _shards.box(p)
        row = width * math.prod(p.shape[1:])
        rows, skipped = (sizes[0], offsets[0]) if p.dim() else (1, 0)
        normals = normal(
            skipped * row,
            rows * row,
            seed=group["seed"],
            step=step + 1.0,
            parameter=unit.stream,
            dtype=_compute_dtype(p.dtype).to_real(),
            device=p.device,
        ).view(*((rows, *p.shape[1:]) if p.dim() else ()), width)
        for dim in range(1, p.dim()):
            normals = normals.narrow(dim, offsets[dim], sizes[dim])
        if kind in (FIRST, SECOND):
            normals = normals[..., kind - FIRST]
        return (normals if interleaved else normals.squeeze(-1)).contiguous()
