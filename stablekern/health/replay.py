r"""A bad batch done again, on fresh weights and on those of the hit: was it the data, the weights, or an operation?

Three facts decide, in this order:

1. the batch holds a NaN or an infinity: **data**;
2. the weights of the hit do, and fresh weights take the batch without one: **weights**, poisoned before this step;
3. both are finite, so some operation made the first NaN or infinity out of finite numbers. If it *overflowed* (its
   operands are so large that the right result is beyond the dtype), the numbers are to blame: **data** if fresh weights
   overflow too, else **weights**, which have grown. If not, its derivative or value does not exist there (0/0, the
   gradient of eigenvectors at a repeated eigenvalue): **op**, whichever weights led there.

The repetition runs on the CPU under a `TorchDispatchMode`, which sees every operation with its operands, also those of
the backward; the random numbers of the forward are those of the hit.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablekern import numerics
from stablekern.errors import message
from stablekern.health.bad_batch import load_bad_batch, restore_random_state

__all__ = ["Fault", "Replay", "Run", "replay"]

_CPU = torch.device("cpu")
# They write what they are told to, or nothing at all: an infinity in their result is meant, or is not read.
_GIVEN = ("empty", "new_empty", "full", "new_full", "fill", "masked_fill", "where", "scalar_tensor", "lift", "detach")
_EXPONENTIALS = ("exp", "exp2", "expm1", "cosh", "sinh", "pow", "logcumsumexp")


@dataclass(frozen=True)
class Fault:
    """The first operation that made a NaN or an infinity out of finite numbers.

    `op` as ATen or `stablekern` names it; `phase` "forward" or "backward"; `node` the autograd node that ran it, in the
    backward; `largest` the largest modulus among its operands; `made` "NaN" or "infinity"; `overflow` as in the text of
    the module.
    """

    op: str
    phase: str
    node: str | None
    largest: float
    made: str
    overflow: bool

    def __str__(self) -> str:
        where = f"{self.op}, in the {self.phase}" + (f" ({self.node})" if self.node else "")
        why = "beyond the range of its type" if self.overflow else "a point where it, or its derivative, does not exist"
        return f"{where}: {self.made} from finite operands up to {self.largest:.3g}, {why}"


@dataclass(frozen=True)
class Run:
    """One repetition: the loss, the parameters with a gradient that is not finite, the first fault, if any, and what
    an operation that refuses its operands said (some raise where others give NaN).
    """

    loss: float
    bad_gradients: tuple[str, ...]
    fault: Fault | None
    error: str | None = None

    @property
    def finite(self) -> bool:
        return self.error is None and not self.bad_gradients and abs(self.loss) < math.inf


@dataclass(frozen=True)
class Replay:
    """`verdict`: "data", "weights", "op" or "not reproduced"; `reason` in one sentence; the rest is the evidence."""

    verdict: str
    reason: str
    step: int
    bad_inputs: tuple[str, ...]
    bad_weights: tuple[str, ...]
    fresh: Run
    current: Run | None


class _Watcher(TorchDispatchMode):
    """Keeps the first operation that makes a NaN out of none, and the first that makes an infinity out of none."""

    def __init__(self) -> None:
        super().__init__()
        self.phase = "forward"
        self._nan: tuple[Fault, bool] | None = None
        self._inf: Fault | None = None

    def fault(self) -> Fault | None:
        """The NaN's, unless that came from an infinity which an operation had made before; else the infinity's."""
        if self._nan is None:
            return self._inf
        fault, from_infinity = self._nan
        return self._inf if from_infinity and self._inf is not None else fault

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = [t for t in tree_leaves((args, kwargs)) if _counts(t)]
        before = None
        if func._schema.is_mutable:  # look at them before they are overwritten
            before = _extremes(operands)
        out = func(*args, **kwargs)
        if self._nan is None and not func._opname.lstrip("_").startswith(_GIVEN):
            results = [t for t in tree_leaves(out) if _counts(t)]
            nan, inf, _ = _extremes(results)
            if nan or inf:
                had_nan, had_inf, largest = before if before is not None else _extremes(operands)
                if nan and not had_nan:
                    self._nan = (self._describe(func, operands, largest, "NaN"), had_inf)
                elif inf and not had_inf and not had_nan and self._inf is None:
                    self._inf = self._describe(func, operands, largest, "infinity")
        return out

    def _describe(self, func: Any, operands: list[Tensor], largest: float, made: str) -> Fault:
        node = torch._C._current_autograd_node() if self.phase == "backward" else None
        dtypes = [t.dtype.to_real() for t in operands] or [torch.float32]
        limit = min(torch.finfo(dtype).max for dtype in dtypes) ** 0.5
        name = func._opname.lstrip("_")
        if name.startswith(_EXPONENTIALS):
            limit = float(torch.tensor(limit, dtype=torch.float64).log())
        overflow = made == "infinity" and largest > limit * numerics.OVERFLOW_SHARE.of()
        return Fault(func.name(), self.phase, None if node is None else node.name(), largest, made, overflow)


def _counts(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0 and (value.is_floating_point() or value.is_complex())


def _extremes(tensors: list[Tensor]) -> tuple[bool, bool, float]:
    """Whether any holds a NaN, an infinity, and the largest modulus of what is finite."""
    nan = inf = False
    largest = 0.0
    for t in tensors:
        t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
        modulus = t.detach().abs()
        nan = nan or bool(modulus.isnan().any())
        inf = inf or bool(modulus.isinf().any())
        largest = max(largest, float(modulus.nan_to_num(nan=0.0, posinf=0.0).max()))
    return nan, inf, largest


def _bad(value: Any, name: str = "batch") -> Iterator[str]:
    """Names of the tensors and numbers in a batch, or a state_dict, that are not finite."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _bad(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _bad(item, f"{name}[{index}]")
    elif isinstance(value, Tensor):
        if not bool(value.isfinite().all()):
            wrong = int((~value.isfinite()).sum())
            yield f"{name} ({wrong} of {value.numel()} entries)"
    elif isinstance(value, (float, complex)) and not abs(value) < math.inf:
        yield name


def _loss_of(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a model that computes it itself: Lightning's `training_step`, or a forward that returns it."""
    own: Any = getattr(model, "training_step", None)
    if callable(own):
        out = own(batch, 0)
    elif isinstance(batch, Mapping):
        out = model(**batch)
    elif isinstance(batch, (list, tuple)):
        out = model(*batch)
    else:
        out = model(batch)
    loss = out.get("loss") if isinstance(out, Mapping) else out[0] if isinstance(out, tuple) else out
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        rule = "without a loss function the model must return its loss: let the function return (model, loss)"
        raise TypeError(message("health.replay", rule, type(out).__name__))
    return loss


def _run(model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], batches: list[Any], rng: Any) -> Run:
    model.train()
    model.zero_grad(set_to_none=True)
    restore_random_state(rng, _CPU)
    watcher, total, error = _Watcher(), 0.0, None
    with torch.enable_grad():
        for batch in batches:
            watcher.phase = "forward"
            try:
                with watcher:
                    loss = loss_of(model, batch)
                    watcher.phase = "backward"
                    if loss.requires_grad:
                        loss.backward()
            except torch.linalg.LinAlgError as refused:
                total, error = math.nan, str(refused)
                break
            total += float(loss.detach())
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    return Run(total / len(batches), tuple(bad), watcher.fault(), error)


def replay(path: str | os.PathLike[str], build: Callable[[], Any]) -> Replay:
    """Do the step of a `bad_batch_<step>.pt` again, and say what was to blame.

    **Arguments:**

    - `path`: a file of `TrainingGuard`. One without weights (`save_weights=False`) can be tried on fresh weights only.
    - `build()`: returns the model, freshly initialised, or `(model, loss)` with `loss(model, batch)`; without `loss`
        the model is called as a `training_step` of Lightning, or with the batch, and must return its loss. It is called
        twice; the weights of the hit must fit.

    **Raises:** `ValueError` if the file or the weights do not fit, `TypeError` if there is no loss.
    """
    content = load_bad_batch(path)
    batch, weights, rng = content["batch"], content["weights"], content["rng"]
    several = isinstance(batch, list) and batch and all(isinstance(item, (dict, list, tuple)) for item in batch)
    batches = batch if several else [batch]
    (model, loss_of), state = _built(build), torch.get_rng_state()
    try:
        fresh = _run(model, loss_of, batches, rng)
        current = None
        if weights is not None:
            model, loss_of = _built(build)
            try:
                model.load_state_dict(weights)
            except RuntimeError as error:
                rule = "the model must have the parameters of the file"
                raise ValueError(message("health.replay", rule, error)) from error
            current = _run(model, loss_of, batches, rng)
    finally:
        torch.set_rng_state(state)
    bad_inputs = tuple(_bad(batch))
    bad_weights = tuple(name for name in _bad(weights or {}, "weights"))
    verdict, reason = _judge(bad_inputs, bad_weights, fresh, current)
    return Replay(verdict, reason, content["step"], bad_inputs, bad_weights, fresh, current)


def _built(build: Callable[[], Any]) -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor]]:
    built = build()
    model, loss_of = built if isinstance(built, tuple) and len(built) == 2 else (built, _loss_of)
    if not isinstance(model, nn.Module) or not callable(loss_of):
        rule = "`build` must return a model, or (model, loss)"
        raise TypeError(message("health.replay", rule, type(built).__name__))
    return model.to(_CPU), loss_of


def _judge(inputs: tuple[str, ...], weights: tuple[str, ...], fresh: Run, current: Run | None) -> tuple[str, str]:
    if inputs:
        return "data", f"the batch itself is not finite: {inputs[0]}"
    if weights and fresh.finite:
        more = f" and {len(weights) - 1} more tensors" if len(weights) > 1 else ""
        return "weights", f"{weights[0]}{more} not finite before this step; fresh weights take the same batch"
    run = fresh if weights or current is None else current
    if run.finite:
        also = "" if fresh.finite else f"; fresh weights do not take it: {fresh.fault}"
        return "not reproduced", f"the step is finite when it is done again on the CPU{also}"
    if run.error is not None and run.fault is None:
        return "op", f"an operation refuses finite operands: {run.error}"
    if run.fault is None:
        return "op", "the loss is finite and a gradient is not, though every operation seen made finite numbers"
    if not run.fault.overflow:
        also = "on fresh weights too" if not fresh.finite else "at these weights; fresh ones do not get there"
        return "op", f"{run.fault}; {also}"
    if fresh.finite:
        return "weights", f"{run.fault}; fresh weights take the same batch, so these have grown too large"
    return "data", f"{run.fault}; on fresh weights too, so the batch is too large"
