"""`TrainingGuard` as a callback of Lightning (`pip install lightning`).

    from stablekern.adapters.lightning import TrainingGuardCallback
    trainer = lightning.Trainer(callbacks=[TrainingGuardCallback(warmup_steps=500)])

For automatic optimization. Lightning clips, steps the optimizers and the schedulers; the guard looks in between, makes
an optimizer step do nothing that must not be taken, and puts schedulers that step with it back behind such a step.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from stablekern.errors import message
from stablekern.health import TrainingGuard

__all__ = ["TrainingGuardCallback"]


class TrainingGuardCallback(Callback):
    """A `TrainingGuard` for the run; `callback.guard` is the guard, from the start of training on.

    **Arguments:** those of `TrainingGuard` behind the scheduler, without `max_norm` (Lightning clips, by
    `gradient_clip_val`). `total_steps` is what the trainer estimates unless given; files go to `directory`, by default
    the trainer's `default_root_dir`.

    **Raises:** `TypeError` for options that `TrainingGuard` does not know, `RuntimeError` at the start of a run with
    manual optimization or several optimizers, `TrainingStoppedError` when the guard gives up.
    """

    def __init__(self, **options: Any) -> None:
        if "max_norm" in options:
            rule = "`max_norm` is Lightning's `gradient_clip_val`"
            raise TypeError(message("adapters.lightning.TrainingGuardCallback", rule))
        self._options = options
        self._losses: list[Tensor] = []
        self._batches: list[Any] = []
        self._restored: dict[str, Any] | None = None
        self.guard: Any = None  # a TrainingGuard once the training has begun

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            rule = "the model must use automatic optimization with one optimizer"
            raise RuntimeError(message("adapters.lightning.TrainingGuardCallback", rule, len(trainer.optimizers)))
        options = {"directory": trainer.default_root_dir, **self._options}
        if "total_steps" not in options and trainer.estimated_stepping_batches != float("inf"):
            options["total_steps"] = int(trainer.estimated_stepping_batches)
        stepping = [
            c.scheduler for c in trainer.lr_scheduler_configs if c.interval == "step" and not c.reduce_on_plateau
        ]
        self.guard = TrainingGuard(pl_module, trainer.optimizers[0], stepping, **options)
        if self._restored is not None:
            self.guard.load_state_dict(self._restored)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if not self._batches:
            self.guard.start()
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        batch = self._batches[0] if len(self._batches) == 1 else self._batches
        self.guard.check(torch.stack(self._losses), batch, scaler=scaler, unscaled=True)
        self.guard.withhold()
        self._losses, self._batches = [], []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        self.guard.settle(wait=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.guard.close()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.guard is None else self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
