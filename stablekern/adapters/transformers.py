"""`TrainingGuard` as a callback of the Trainer of transformers (`pip install transformers accelerate`).

    from stablekern.adapters.transformers import TrainingGuardCallback
    trainer = transformers.Trainer(model=model, args=args, callbacks=[TrainingGuardCallback(warmup_steps=500)])

The Trainer clips, steps the optimizer and the scheduler; the guard looks in between, makes an optimizer step do nothing
that must not be taken, and puts the scheduler back behind such a step. Clipping comes first there, so one NaN has
spread over all gradients by then: the skip is the same, but `first_bad` names the first parameter of the model;
`max_grad_norm=0` leaves them as they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from stablekern.errors import message
from stablekern.health import TrainingGuard

__all__ = ["TrainingGuardCallback"]


class TrainingGuardCallback(TrainerCallback):
    """A `TrainingGuard` for the run; `callback.guard` is the guard, from the start of training on.

    **Arguments:** those of `TrainingGuard` behind the scheduler, without `max_norm` (the Trainer clips, by
    `max_grad_norm`). `total_steps` is the Trainer's unless given; files go to `directory`, by default its `output_dir`.
    Batch and loss are what the model's forward takes and returns (`loss`, or the first of a tuple).

    **Raises:** `TypeError` for options that `TrainingGuard` does not know, `TrainingStoppedError` when the guard gives
    up.
    """

    def __init__(self, **options: Any) -> None:
        if "max_norm" in options:
            rule = "`max_norm` is the Trainer's `max_grad_norm`"
            raise TypeError(message("adapters.transformers.TrainingGuardCallback", rule))
        self._options = options
        self._losses: list[Tensor] = []
        self._batches: list[Any] = []
        self._hooks: list[Any] = []
        self._scaler: Any = None
        self.guard: Any = None  # a TrainingGuard once the training has begun

    def on_train_begin(self, args, state, control, *, model, optimizer, lr_scheduler, **rest):  # type: ignore[override]
        options = {"directory": args.output_dir, "total_steps": state.max_steps, **self._options}
        self._scaler = getattr(optimizer, "scaler", None)
        self.guard = TrainingGuard(model, getattr(optimizer, "optimizer", optimizer), lr_scheduler, **options)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if model.training:
            if not self._batches:
                self.guard.start()
            self._batches.append(inputs or args)

    def _after_forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if model.training:
            loss = output.get("loss") if isinstance(output, Mapping) else output[0]
            if isinstance(loss, Tensor) and loss.dim() == 0:
                self._losses.append(loss.detach())

    def on_pre_optimizer_step(self, args, state, control, **rest):
        batch = self._batches[0] if len(self._batches) == 1 else self._batches
        loss = torch.stack(self._losses) if self._losses else None
        self.guard.check(loss, batch, scaler=self._scaler, unscaled=True)
        self.guard.withhold()
        self._losses, self._batches = [], []

    def on_step_end(self, args, state, control, **rest):
        self.guard.settle(wait=False)

    def on_train_end(self, args, state, control, **rest):
        for hook in self._hooks:
            hook.remove()
        self.guard.close()
