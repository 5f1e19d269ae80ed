r"""A step of training that survives: looks at loss, gradients and weights before it is taken, and knows what to do.

The ladder, from the first step that cannot be taken to the last: *skip* it and write the batch to a file; *halve* the
learning rate if the next one is no better; go *back* to the last good weights, at once if the weights themselves are
not finite; *give up* with a report after so many in a row. A step that is taken starts the count anew.

Where the learning rate is changed. A factor (warm-up times halvings) multiplies `lr` of every group while
`optimizer.step()` runs, and is taken off behind it. So the scheduler reads and writes its own numbers only, and none
can undo a halving: `LambdaLR` overwrites `lr` at each step, and a rate that was halved in the group is back one step
later. The rate that acts is `TrainingGuard.learning_rates()`.

When flags are read. An optimizer that takes `found_inf` (ComplexAdamW, torch's with `fused=True`) skips on the device;
the host reads the flags of a step on a GPU at the next one, when they have long arrived, and never waits. The scheduler
then advances, if the step was taken, before the next one needs its learning rate: the course of the rates is the same.
On a CPU, and for any other optimizer, the flags are read in the step itself.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from stablekern import _check, numerics
from stablekern.errors import NonFiniteError, TrainingStoppedError, message
from stablekern.health import bad_batch
from stablekern.health._last_good import LastGood, values_of
from stablekern.optim import GradGuard
from stablekern.optim.grad_guard import tensor_norms

__all__ = ["GuardReport", "TrainingGuard", "constant_predictor_loss"]

_WHERE = "health.TrainingGuard"


@dataclass(frozen=True)
class GuardReport:
    """What a guard saw. `str(report)` is for people, `asdict(report)` for files.

    `steps` were checked, `taken` of them taken; `skipped` because of `loss`, `gradients` or `weights` that were not
    finite (the first of these that applies counts, weights before loss before gradients); `overflows` were skipped
    because the scale of a GradScaler was too large, which it repairs by itself. `first` says what the first skip was,
    `notices` are all other things said, `files` the batches written.
    """

    steps: int = 0
    taken: int = 0
    skipped: int = 0
    weights: int = 0
    loss: int = 0
    gradients: int = 0
    overflows: int = 0
    halvings: int = 0
    rollbacks: int = 0
    lr_factor: float = 1.0
    first: str | None = None
    notices: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        causes = f"weights {self.weights}, loss {self.loss}, gradients {self.gradients}"
        lines = [
            f"{self.taken} of {self.steps} steps taken, {self.skipped} skipped ({causes} not finite)",
            f"learning rate halved {self.halvings} times (factor {self.lr_factor:g}), {self.rollbacks} rollbacks",
        ]
        lines += [f"{self.overflows} steps left out while the loss scale came down"] if self.overflows else []
        lines += [f"first: {self.first}"] if self.first else []
        lines += list(self.notices)
        lines += [f"batch written: {name}" for name in self.files]
        return "\n".join(lines)


@dataclass
class _Step:
    """What is known about a step before its flags are read."""

    number: int
    batch: Any
    rng: dict[str, Tensor]
    names: list[str]
    weights_finite: Tensor
    flags: Callable[[], list[float]]
    scaled: bool
    late: bool  # whether the host has not waited for the flags
    ours: bool = True  # whether the guard steps the schedulers
    held: list[tuple[Any, dict[str, Any], list[dict[str, Any]]]] = field(default_factory=list)


def _read_later(values: Tensor) -> Callable[[], list[float]]:
    """A function that gives the numbers; on a GPU the copy starts now, and only it is waited for."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def read() -> list[float]:
        event.synchronize()
        return host.tolist()

    return read


class TrainingGuard:
    r"""Check each step before it is taken; skip it, halve the learning rate, go back, or give up.

        guard = TrainingGuard(model, optimizer, scheduler, max_norm=1.0, warmup_steps=500, total_steps=20_000)
        for batch in batches:
            loss = loss_of(model, batch)
            loss.backward()
            guard.step(loss, batch)    # in place of clipping, optimizer.step() and scheduler.step()
            optimizer.zero_grad()
        print(guard.report())

    `stablekern.adapters.lightning` and `stablekern.adapters.transformers` have it as a callback.

    **Arguments:** all behind the scheduler are keyword only.

    - `model`: its parameters and floating-point buffers (running means, too) are what is checked, kept and brought
        back. Make the guard when the model has its final device and dtype.
    - `optimizer`: one, or several that step together. The guard multiplies `lr` while they step.
    - `scheduler`: one, several or None. `step()` steps them, only behind a step that was taken: do not call theirs.
    - `max_norm`: gradients with a larger norm are clipped to it, by `GradGuard`; inf only checks.
    - `warmup_steps`: the learning rate of the n-th *taken step* of the first `warmup_steps` is multiplied by
        n / `warmup_steps`. Steps, whatever the length of an epoch.
    - `total_steps`: of the run, for one warning: that the rate that acts stayed below 1e-3 of the base rate of its
        group (`initial_lr`, else `lr` when the guard was made) for more than 5 % of them in a row.
    - `halve_after`: from so many skipped steps in a row on, each halves the learning rate, down to 2^-10 of it.
    - `rollback_after`: at so many in a row, and at each multiple, the last good weights come back; weights that are not
        finite are brought back at once. `give_up_after`: at so many in a row `TrainingStoppedError` ends the run.
    - `keep_every`: after so many taken steps the weights and the optimizer's state, if finite, are kept as the last
        good ones, in memory on their device (one more copy of both). The host reads one flag then.
    - `constant_loss`: the loss of the best constant prediction (`constant_predictor_loss`), for one warning: that the
        mean loss of `keep_every` steps behind the warm-up is not 1 % below it. None: not asked.
    - `directory`: where `bad_batch_<step>.pt` goes, None for nowhere; at most `max_files`. `save_weights`: put the
        weights in, for `stablekern doctor --replay`.

    The first skip, each halving, each rollback and each thing noticed is a `RuntimeWarning` and in `report()`. Weights
    that do not move (less than 1e-6 of their norm in `keep_every` taken steps) are noticed as well.

    **Several processes:** where `torch.distributed` is initialised the flags are combined, so all ranks skip alike.

    **Raises:** `TypeError`, `ValueError` for arguments; `NonFiniteError` from the first step if the weights are not
    finite to begin with.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer],
        scheduler: Any = None,
        *,
        max_norm: float = math.inf,
        warmup_steps: int = 0,
        total_steps: int | None = None,
        halve_after: int = 2,
        rollback_after: int = 3,
        give_up_after: int = 10,
        keep_every: int = 100,
        constant_loss: float | None = None,
        directory: str | os.PathLike[str] | None = ".",
        max_files: int = 10,
        save_weights: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(message(_WHERE, "`model` must be a module", type(model).__name__))
        self.model = model
        self.optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
        self.schedulers = [] if scheduler is None else list(scheduler) if _is_list(scheduler) else [scheduler]
        for one in self.optimizers:
            if not isinstance(one, Optimizer):
                raise TypeError(message(_WHERE, "`optimizer` must be a torch optimizer", type(one).__name__))
        self.warmup_steps = _check.integer(_WHERE, "warmup_steps", warmup_steps, low=0)
        if total_steps is not None:
            _check.integer(_WHERE, "total_steps", total_steps, low=1)
        self.total_steps = total_steps
        self.halve_after = _check.integer(_WHERE, "halve_after", halve_after, low=1)
        self.rollback_after = _check.integer(_WHERE, "rollback_after", rollback_after, low=1)
        self.give_up_after = _check.integer(_WHERE, "give_up_after", give_up_after, low=1)
        self.keep_every = _check.integer(_WHERE, "keep_every", keep_every, low=1)
        self.max_files = _check.integer(_WHERE, "max_files", max_files, low=0)
        if constant_loss is not None:
            _check.number(_WHERE, "constant_loss", constant_loss)
        self.constant_loss = constant_loss
        self.directory = None if directory is None else Path(directory)
        self.save_weights = save_weights

        self._gradients = GradGuard(model, max_norm)
        self._good = LastGood(model, self.optimizers)
        self._values = values_of(model)
        self._bases = [[float(g.get("initial_lr", g["lr"])) for g in one.param_groups] for one in self.optimizers]
        self._own: list[tuple[dict[str, Any], Any]] = []  # learning rates while a step runs
        self._handles = [h for one in self.optimizers for h in self._scale_in_steps(one)]
        self.lr_factor = 1.0
        self._counts = dict.fromkeys(("steps", "taken", "weights", "loss", "gradients", "overflows"), 0)
        self._counts |= dict.fromkeys(("halvings", "rollbacks"), 0)
        self._first: str | None = None
        self._notices: list[str] = []
        self._files: list[str] = []
        self._in_a_row = 0
        self._kept_at: int | None = None
        self._low_steps, self._noticed = 0, set[str]()
        self._losses: list[float] = []
        self._pending: _Step | None = None
        self._device = self._gradients.found_inf.device
        self.start()

    def __repr__(self) -> str:
        counts = self._counts
        return f"TrainingGuard(step {counts['steps']}, {counts['taken']} taken, lr_factor={self.lr_factor:g})"

    # ---- what the loop calls -----------------------------------------------------------------------------------------

    def start(self, batch: Any = None) -> None:
        """Note batch and random state before the forward. Needed only if random numbers are drawn between two steps."""
        self._batch, self._rng = batch, bad_batch.random_state(self._device)

    def step(self, loss: Tensor | None = None, batch: Any = None, *, scaler: GradScaler | None = None) -> None:
        """Behind `backward`: check, clip, step the optimizer and the scheduler; or skip.

        **Arguments:** `loss` (any shape; of several micro-batches: stack them); `batch`, for the file; `scaler`, whose
        `unscale_`, `step` and `update` are done here. Keyword only.

        **Raises:** `TrainingStoppedError` with the report after `give_up_after` skipped steps in a row.
        """
        self.check(loss, batch, scaler=scaler)
        self._gradients.step(self.optimizers, scaler)
        self.settle(wait=False)
        self.start()

    @torch.no_grad()
    def check(
        self,
        loss: Tensor | None = None,
        batch: Any = None,
        *,
        scaler: GradScaler | None = None,
        unscaled: bool = False,
    ) -> None:
        """The first half of `step`, for loops that step optimizer and schedulers themselves: `check` and `withhold`
        before their `optimizer.step()`, `settle(wait=False)` behind the steps of the schedulers.

        **Arguments:** as of `step`; `unscaled` says that the gradients are no longer scaled, or need not be unscaled.
        """
        self.settle()
        self._counts["steps"] += 1
        tensors = self._values
        due = self._kept_at is None or self._counts["taken"] - self._kept_at >= self.keep_every
        if due:
            tensors = [*tensors, *self._good.state_tensors()]
        norms = tensor_norms([t for _, t in tensors], self._device) if tensors else torch.zeros(0, device=self._device)
        finite = norms.isfinite()
        seen = torch.zeros((), device=self._device) if loss is None else loss.detach().double().mean().to(self._device)
        bad = torch.stack([~seen.isfinite(), ~finite.all()]).double()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        norm = self._gradients(scale=None if unscaled else scaler, veto=bad.any())
        in_use = scaler if scaler is not None and scaler.is_enabled() else None
        scaled = in_use is not None
        scale = None if in_use is None else in_use._get_scale_async()
        values = [*bad.unbind(), ~norm.isfinite(), seen, torch.ones_like(norm) if scale is None else scale]
        self._pending = _Step(
            number=self._counts["steps"],
            batch=self._batch if batch is None else batch,
            rng=self._rng,
            names=[name for name, _ in tensors],
            weights_finite=finite,
            flags=_read_later(torch.stack([v.to(self._device, torch.float64) for v in values])),
            scaled=scaled,
            late=self._late(),
        )
        if due:
            self._keep()

    def withhold(self) -> None:
        """Between `check` and an `optimizer.step()` that is not ours: make that step do nothing if it must not be.

        An optimizer that takes `found_inf` gets it; from any other the gradients are taken away. Schedulers are noted,
        for `settle` to put them back.
        """
        pending = self._pending
        if pending is None:
            raise RuntimeError(message(_WHERE, "call `check` before `withhold`"))
        pending.ours = False
        pending.held = [
            (s, copy.deepcopy(s.state_dict()), [_options(g) for one in self.optimizers for g in one.param_groups])
            for s in self.schedulers
        ]
        pending.late = pending.late and not pending.scaled  # a GradScaler puts its own flag in the place of ours
        if pending.late:
            for one in self.optimizers:
                one.found_inf = self._gradients.found_inf  # type: ignore[attr-defined]
        elif bool(self._gradients.found_inf):
            for one in self.optimizers:
                one.zero_grad(set_to_none=True)

    def settle(self, *, wait: bool = True) -> None:
        """Read the flags of the last step and act on them; nothing if that was done, or if they would be waited for and
        must not be (`wait=False`).
        """
        pending = self._pending
        if pending is None or (pending.late and not wait):
            return
        self._pending = None
        loss_bad, weights_bad, gradients_bad, loss, scale = pending.flags()
        if not (loss_bad or weights_bad or gradients_bad):
            self._taken(pending, loss)
        elif pending.scaled and scale > 1 and not loss_bad and not weights_bad:
            self._counts["overflows"] += 1
            _put_back(pending, self.optimizers)
        else:
            _put_back(pending, self.optimizers)
            self._skipped(pending, loss, "weights" if weights_bad else "loss" if loss_bad else "gradients")

    def report(self) -> GuardReport:
        """What was seen so far, the last step included."""
        self.settle()
        counts = self._counts
        skipped = counts["weights"] + counts["loss"] + counts["gradients"]
        texts: dict[str, Any] = {"first": self._first, "notices": tuple(self._notices), "files": tuple(self._files)}
        numbers: dict[str, Any] = {**counts, "skipped": skipped, "lr_factor": self.lr_factor}
        return GuardReport(**numbers, **texts)

    def learning_rates(self) -> list[float]:
        """The rate that acts in the next step, per group of all optimizers: that of the group times our factor."""
        factor = self._factor()
        return [float(group["lr"]) * factor for one in self.optimizers for group in one.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart: counts and the factor. The last good weights do not go in."""
        self.settle()
        return {"lr_factor": self.lr_factor, "in_a_row": self._in_a_row, "counts": dict(self._counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lr_factor, self._in_a_row = state["lr_factor"], state["in_a_row"]
        self._counts = dict(state["counts"])
        self._kept_at = None

    def close(self) -> None:
        """Take the hooks off the optimizers; the learning rate is the scheduler's again."""
        self.settle()
        for handle in self._handles:
            handle.remove()

    # ---- the learning rate -------------------------------------------------------------------------------------------

    def _factor(self) -> float:
        warm = min(1.0, (self._counts["taken"] + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return self.lr_factor * warm

    def _scale_in_steps(self, optimizer: Optimizer) -> list[Any]:
        def before(one: Optimizer, args: Any, kwargs: Any) -> None:
            after(one, args, kwargs)  # a step that raised has left its rates behind
            factor = self._factor()
            if factor == 1.0:
                return
            for group in one.param_groups:
                rate = group["lr"]
                if isinstance(rate, Tensor):  # a captured or compiled step reads this very tensor
                    self._own.append((group, rate.clone()))
                    rate.mul_(factor)
                else:
                    self._own.append((group, rate))
                    group["lr"] = rate * factor

        def after(one: Optimizer, args: Any, kwargs: Any) -> None:
            mine = [entry for entry in self._own if any(entry[0] is group for group in one.param_groups)]
            self._own = [entry for entry in self._own if all(entry is not done for done in mine)]
            for group, rate in mine:
                if isinstance(rate, Tensor):
                    group["lr"].copy_(rate)
                else:
                    group["lr"] = rate

        return [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def _watch_rates(self) -> None:
        """Called before the count of taken steps moves on: these are the rates of the step that was taken."""
        if self.total_steps is None:
            return
        rates = iter(self.learning_rates())
        low = any(
            next(rates) < numerics.LOW_LEARNING_RATE.of() * base for bases in self._bases for base in bases if base > 0
        )
        self._low_steps = self._low_steps + 1 if low else 0
        if self._low_steps > numerics.LOW_LEARNING_RATE_SHARE.of() * self.total_steps:
            factor = self._factor()
            self._notice(
                "rate",
                f"the learning rate that acts has stayed below {numerics.LOW_LEARNING_RATE.of():g} of its base for "
                f"{self._low_steps} steps, more than {numerics.LOW_LEARNING_RATE_SHARE.of():.0%} of the run's "
                f"{self.total_steps}: {max(self.learning_rates()):.3g} now, our factor {factor:.3g} (warm-up over "
                f"{self.warmup_steps} steps, {self._counts['halvings']} halvings), the rest the scheduler's",
            )

    # ---- the ladder --------------------------------------------------------------------------------------------------

    def _late(self) -> bool:
        able = all(getattr(one, "_step_supports_amp_scaling", False) for one in self.optimizers)
        return self._device.type != "cpu" and able

    def _taken(self, step: _Step, loss: float) -> None:
        self._in_a_row = 0
        self._losses.append(loss)
        self._watch_rates()
        self._counts["taken"] += 1
        if step.ours:
            for scheduler in self.schedulers:
                scheduler.step()

    def _skipped(self, step: _Step, loss: float, cause: str) -> None:
        self._counts[cause] += 1
        self._in_a_row += 1
        if cause == "weights":
            pairs = zip(step.names, step.weights_finite.tolist(), strict=True)
            where = next((name for name, good in pairs if not good), "the weights of another process")
            what = f"`{where}` is not finite before the step"
        elif cause == "loss":
            where, what = None, f"the loss is {loss:g}"
        else:
            where = self._gradients.first_bad()
            what = f"the gradient of `{where}` is not finite" if where else "the norm of the gradients overflows"
        written = self._write(step, cause, what, where, loss)
        if self._first is None:
            self._first = f"step {step.number}: {what}"
            warnings.warn(message(_WHERE, f"step {step.number} skipped: {what}{written}"), RuntimeWarning, stacklevel=4)
        if cause == "weights" and not self._good:
            raise NonFiniteError(message(_WHERE, "the weights must be finite at the first step", f"`{where}`"))
        if self._in_a_row >= self.give_up_after:
            rule = f"gave up after {self._in_a_row} skipped steps in a row"
            raise TrainingStoppedError(f"{message(_WHERE, rule)}\n{self.report()}")
        if self._in_a_row >= self.halve_after and self.lr_factor > numerics.LR_FACTOR_FLOOR.of():
            self.lr_factor /= 2
            self._counts["halvings"] += 1
            self._tell(f"step {step.number}: learning rate halved, factor {self.lr_factor:g}")
        if cause == "weights" or self._in_a_row % self.rollback_after == 0:
            self._good.restore()
            self._counts["rollbacks"] += 1
            self._tell(f"step {step.number}: back to the weights kept after {self._kept_at} taken steps")

    def _write(self, step: _Step, cause: str, what: str, where: str | None, loss: float) -> str:
        """Write the file; the end of a sentence about it."""
        if self.directory is None or len(self._files) >= self.max_files:
            return ""
        self.directory.mkdir(parents=True, exist_ok=True)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        path = self.directory / f"bad_batch_{step.number}{f'_rank{rank}' if rank else ''}.pt"
        model = self.model if self.save_weights else None
        facts = {"cause": cause, "what": what, "first_bad": where, "loss": loss}
        bad_batch.save_bad_batch(path, step=step.number, batch=step.batch, rng=step.rng, model=model, **facts)
        self._files.append(str(path))
        return f"; batch in {path}"

    def _keep(self) -> None:
        """Keep the weights of a good step (the very first: finite ones), and see whether they moved since the last."""
        weights, step = bool(self._pending.weights_finite.all()), not bool(self._gradients.found_inf)  # type: ignore[union-attr]
        if not weights or (self._good and not step):
            return
        taken = self._counts["taken"]
        if self._good and self._kept_at is not None:
            self._watch_progress(taken - self._kept_at)
        self._good.keep()
        self._kept_at, self._losses = taken, []

    def _watch_progress(self, taken: int) -> None:
        moved = float(self._good.moved(self._device))
        if moved < numerics.STILL_WEIGHTS.of():
            self._notice(
                "still",
                f"the weights moved by {moved:.2g} of their norm in {taken} taken steps, with finite gradients: are "
                f"they in the optimizer, and is a rate of {max(self.learning_rates()):.3g} meant?",
            )
        if self.constant_loss is None or not self._losses or self._kept_at < self.warmup_steps:  # type: ignore[operator]
            return
        mean = math.fsum(self._losses) / len(self._losses)
        margin = numerics.CONSTANT_LOSS_MARGIN.of() * abs(self.constant_loss)
        if mean > self.constant_loss - margin:
            self._notice(
                "constant",
                f"the mean loss of {taken} steps, {mean:.4g}, is that of a constant prediction, "
                f"{self.constant_loss:.4g}: finite, and nothing is learned",
            )

    def _notice(self, kind: str, text: str) -> None:
        """Say something once."""
        if kind not in self._noticed:
            self._noticed.add(kind)
            self._tell(f"step {self._counts['steps']}: {text}")

    def _tell(self, text: str) -> None:
        self._notices.append(text)
        warnings.warn(message(_WHERE, text), RuntimeWarning, stacklevel=5)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _options(group: dict[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in group.items() if key != "params"}
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in options.items()}


def _put_back(step: _Step, optimizers: list[Optimizer]) -> None:
    """Schedulers, and what they write into the groups, as they were before a step that was not taken."""
    groups = [group for one in optimizers for group in one.param_groups]
    for scheduler, state, options in step.held:
        scheduler.load_state_dict(state)
        for group, kept in zip(groups, options, strict=True):
            for key, value in kept.items():
                if isinstance(value, Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value


def constant_predictor_loss(
    loss: Callable[[Tensor, Tensor], Tensor], targets: Tensor, output_shape: tuple[int, ...]
) -> float:
    """The least mean loss that a prediction can have which is the same for every item: what a model that ignores its
    input reaches.

    **Arguments:** `loss(outputs, targets)` as in training, differentiable in `outputs`; `targets` (items, ...), enough
    of them to be typical; `output_shape` of the outputs of one item. All of one item's outputs are free, in float64.

    **Source:** minimised by L-BFGS with a line search; for a loss convex in the outputs that is the minimum.
    """
    constant = torch.zeros(output_shape, dtype=torch.float64, device=targets.device, requires_grad=True)
    search = torch.optim.LBFGS([constant], max_iter=100, line_search_fn="strong_wolfe")
    targets = targets.double() if targets.is_floating_point() else targets

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(constant.expand(len(targets), *output_shape), targets).mean()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(closure)
        return float(closure().detach())
