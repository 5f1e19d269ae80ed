"""`torch.optim.AdamW` by `stablekern.optim.ComplexAdamW(coupled=False)`: the same steps, in one fused kernel.

    with stablekern.swap("torch.optim"):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    stablekern.swap(optimizer)  # one that runs already: its moments and step counters go on

`foreach` and `fused` are accepted and change nothing. `differentiable=True` is refused. State dicts can be exchanged in
both directions, and what holds the optimizer (schedulers, `GradScaler`) goes on holding it.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from stablekern._swap import SwapReport, signature_of
from stablekern.errors import SwapError, message
from stablekern.optim import ComplexAdamW

__all__ = ["AdamW"]

_ADAMW = torch.optim.AdamW
_SIGNATURES = (
    "params, lr, betas, eps, weight_decay, amsgrad, *, maximize, foreach, capturable, differentiable, fused",
)
_NOTE = "foreach and fused change nothing"
_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class AdamW(ComplexAdamW):
    """`ComplexAdamW` with the arguments and the rule of `torch.optim.AdamW`; complex parameters are two reals."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if differentiable:
            raise ValueError(message("adapters.torch_optim.AdamW", "`differentiable` is not available", differentiable))
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            coupled=False,
            amsgrad=amsgrad,
            maximize=maximize,
            capturable=capturable,
        )


PAIRS = ((_ADAMW, AdamW, _NOTE),)


def swap_library(report: SwapReport) -> None:
    swap_class(report, _ADAMW)
    report.leave("torch.optim.Adam and all others", "stablekern has AdamW alone")


def swap_class(report: SwapReport, cls: type) -> bool:
    if cls is AdamW or (cls is _ADAMW and torch.optim.AdamW is AdamW):
        report.leave("torch.optim.AdamW", "swapped already")
        return True
    if cls is not _ADAMW:
        return False
    if report.fits("torch.optim.AdamW", cls.__init__, _SIGNATURES):
        report.everywhere("torch.optim.AdamW", cls, AdamW, _NOTE)
    return True


def swap_object(report: SwapReport, optimizer: Any) -> bool:
    """Turn a `torch.optim.AdamW` into ours where it is; restored, it has its class back and the moments of now."""
    if not isinstance(optimizer, Optimizer):
        return False
    if isinstance(optimizer, ComplexAdamW):
        report.leave("the optimizer", "swapped already")
        return True
    if type(optimizer) is not _ADAMW:
        rule = "of torch.optim's classes only AdamW itself has a stand-in"
        raise SwapError(message("swap", rule, type(optimizer).__qualname__))
    if signature_of(_ADAMW.__init__) not in _SIGNATURES:
        raise SwapError(message("swap", "the parameters of torch.optim.AdamW are not known", signature_of(_ADAMW)))
    if any(group["differentiable"] for group in optimizer.param_groups):
        raise SwapError(message("swap", "an AdamW with `differentiable` has no stand-in"))
    options = set(inspect.signature(ComplexAdamW).parameters)
    plain = [{k: v for k, v in group.items() if k in options} for group in optimizer.param_groups]
    try:
        ours = AdamW(plain)
        ours.load_state_dict(optimizer.state_dict())
    except (TypeError, ValueError) as error:
        raise SwapError(message("swap", f"the optimizer has no stand-in ({error})")) from error
    theirs = {p: dict(state) for p, state in optimizer.state.items()}
    groups = [dict(group) for group in optimizer.param_groups]
    defaults, scheduled = optimizer.defaults, vars(optimizer).get("step")

    def undo() -> None:
        for p, state in list(optimizer.state.items()):
            kept = theirs.get(p, {})
            for key in [key for key in ("step", *_MOMENTS) if key in state]:
                like = kept.get(key)
                if like is None:
                    like = torch.zeros((), dtype=torch.float32) if key == "step" else torch.empty_like(p)
                kept[key] = like.copy_(state[key])
            optimizer.state[p] = kept
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            now = {key: group[key] for key in before}
            group.clear()
            group.update(now)
        optimizer.defaults = defaults
        if scheduled is not None:
            optimizer.step = scheduled  # type: ignore[method-assign]

    report.when_restored("the state of the optimizer", undo)
    for group, new in zip(optimizer.param_groups, ours.param_groups, strict=True):
        group.update({key: value for key, value in new.items() if key not in group})
    optimizer.state.clear()
    optimizer.state.update(ours.state)
    optimizer.defaults = ours.defaults
    report.retype(optimizer, AdamW)
    if scheduled is not None:  # a scheduler has put its own around that of the class before
        optimizer.step = _tracked(optimizer)  # type: ignore[method-assign]
    report.note("the optimizer", AdamW, "its state is kept")
    return True


def _tracked(optimizer: Optimizer) -> Any:
    """The step of the class now, under the marks by which a scheduler sees that the optimizer steps."""
    reference, step = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(step)
    def tracked(*args: Any, **kwargs: Any) -> Any:
        held = reference()
        held._opt_called = True  # type: ignore[union-attr]
        return step(held, *args, **kwargs)  # type: ignore[arg-type]

    tracked._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return tracked
