r"""A plain training loop that checks every step, and what goes with it: windows to train on, a score, checkpoints.

One step is forward, loss, backward, guard (finite? norm, clip), optimizer. The loss, the gradients and the parameters
after the step are checked on the host each time; that costs one wait for the device per step, and is what a run that
must be trusted pays. A step that is not finite is counted and left out, it does not end the run.

The learning rate follows the number of *steps*, not epochs: linear from 0 over the first `warmup` of them, then half a
cosine down to 0 at the last. Step $s = 0, 1, ...$ of $S$, with $W = \max(1, \lceil warmup \cdot S \rceil)$, has

$$\gamma_s / \gamma = (s + 1) / W \;\text{for}\; s < W, \qquad
\tfrac12 \bigl(1 + \cos \pi \tfrac{s - W + 1}{S - W + 1}\bigr) \;\text{otherwise}.$$

Environment variables that act here (`stablekern.settings`): BGB_SANITIZE_GRADS and BGB_SKIP_OPT_STEP_ON_NAN
(`guard_policy`), BGB_ANOMALY_DETECT (`training_step`), BGB_LIMIT_FILES (`limit_files`), BGB_SMOKE_TEST (`limit_files`,
`positive_weight`, `balanced`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from stablekern import _check, settings
from stablekern._files import replaced
from stablekern.eeg.windows import WindowDataset, stitch
from stablekern.errors import message
from stablekern.nn.detector import DetectorConfig, SeizureDetector
from stablekern.optim import ComplexAdamW, GradGuard, parameter_groups

__all__ = [
    "StepResult",
    "auroc",
    "balanced",
    "default_optimizer",
    "fit",
    "guard_policy",
    "learning_rate_factor",
    "limit_files",
    "load_checkpoint",
    "parameters_finite",
    "positive_weight",
    "predict",
    "random_windows",
    "save_checkpoint",
    "training_step",
]

_SMOKE_FILES = 3


# ---- one step ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepResult:
    """What one step did. `grad_norm` is the norm before clipping; loss and norm may be NaN or infinite.

    `loss_finite`, `gradients_finite` and `parameters_finite` are the three checks, in the order in which they are made;
    `bad_gradient` names the first parameter whose gradient failed. `skipped` says that the weights were left as they
    were. `step` counts from 1. `seconds` is the time of the step, without loading its windows.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    loss_finite: bool
    gradients_finite: bool
    parameters_finite: bool
    skipped: bool
    bad_gradient: str | None
    seconds: float

    @property
    def finite(self) -> bool:
        return self.loss_finite and self.gradients_finite and self.parameters_finite


def guard_policy() -> str:
    """The policy for `GradGuard`: "zero" under BGB_SANITIZE_GRADS, else "skip".

    BGB_SKIP_OPT_STEP_ON_NAN asks for "skip" and wins over BGB_SANITIZE_GRADS: a step that is left out needs no repair.
    """
    sanitize, skip = settings.get("BGB_SANITIZE_GRADS"), settings.get("BGB_SKIP_OPT_STEP_ON_NAN")
    return "zero" if sanitize and not skip else "skip"


@torch.no_grad()
def parameters_finite(model: nn.Module) -> bool:
    """Whether no parameter holds a NaN or an infinity. Waits for the device.

    The largest modulus of a tensor is finite if and only if all of it is, and one call takes that of every tensor.
    """
    parts = [p.detach() for p in model.parameters() if p.numel()]
    if not parts:
        return True
    real = [torch.view_as_real(p) if p.is_complex() else p for p in parts]
    return all(
        math.isfinite(value)
        for value in torch.stack([n.double() for n in torch._foreach_norm(real, math.inf)]).tolist()
    )


def training_step(
    model: nn.Module,
    windows: Tensor,
    labels: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    guard: GradGuard,
    step: int = 1,
    autocast: torch.dtype | None = None,
) -> StepResult:
    """One checked step: `loss(model(windows), labels)`, backward, `guard`, optimizer.

    With `autocast`, torch.bfloat16 say, the model runs under `torch.autocast` of that dtype; the loss is float32. The
    gradients go through `guard`, whose policy decides what becomes of non-finite ones. If the loss itself is not
    finite the weights are left as they are under any policy. Under BGB_ANOMALY_DETECT forward and backward run in
    autograd's anomaly detection, which raises RuntimeError at the operation that made the first NaN.
    """
    start = time.perf_counter()
    anomaly = settings.get("BGB_ANOMALY_DETECT")
    with torch.autograd.set_detect_anomaly(True) if anomaly else contextlib.nullcontext():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(windows.device.type, autocast, enabled=autocast is not None):
            outputs = model(windows)
        value = loss(outputs if autocast is None else outputs.float(), labels)
        value.backward()
    norm = guard()
    bad = guard.first_bad()
    shown, loss_finite = float(value.detach()), bool(value.detach().isfinite())
    skipped = not loss_finite or bool(guard.found_inf)
    rate = float(optimizer.param_groups[0]["lr"])
    if loss_finite:
        guard.step(optimizer)
    return StepResult(
        step=step,
        loss=shown,
        grad_norm=float(norm),
        learning_rate=rate,
        loss_finite=loss_finite,
        gradients_finite=bad is None,
        parameters_finite=parameters_finite(model),
        skipped=skipped,
        bad_gradient=bad,
        seconds=time.perf_counter() - start,
    )


# ---- many steps ----------------------------------------------------------------------------------------------------


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """The learning rate of step 0 <= `step` < `steps` over its peak; the formula is in the module's text."""
    rising = max(1, math.ceil(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising + 1) / (steps - rising + 1)))


def _endless(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        count = 0
        for batch in batches:
            count += 1
            yield batch
        if count == 0:
            raise ValueError(message("training.fit", "`batches` must give at least one batch each time it is iterated"))


def default_optimizer(model: nn.Module, *, learning_rate: float = 1e-3, weight_decay: float = 1e-2) -> ComplexAdamW:
    """`ComplexAdamW` over the parameters of `model`, with weight decay where it belongs (`parameter_groups`)."""
    groups = parameter_groups(model, weight_decay)
    return ComplexAdamW([group for group in groups if group["params"]], lr=learning_rate)


def fit(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    max_norm: float = 1.0,
    warmup: float = 0.1,
    rate_steps: int | None = None,
    optimizer: Optimizer | None = None,
    first: int = 1,
    autocast: torch.dtype | None = None,
    before_step: Callable[[int, Tensor, Tensor], None] | None = None,
    after_step: Callable[[StepResult], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[StepResult]:
    """Train `model` in place for `steps` steps with `ComplexAdamW`, weight decay where it belongs, and a `GradGuard`.

    **Arguments:**

    - `batches`: pairs (windows, labels), iterated again from its start whenever it ends; moved to the model's device.
    - `steps`: >= 0. `learning_rate`: the peak; its course is in the module's text. `warmup`: its share of the steps, in
        [0, 1]. `max_norm`: gradients above are clipped to it.
    - `loss(outputs, labels)`: a 0-d tensor.
    - `optimizer`: in place of the default one, for a run that goes on; its rates are set here all the same. `first`:
        the number of the first step to take. The course of the rate is that of a run from 1 to `rate_steps`, or to
        `steps` if None.
    - `autocast`: see `training_step`.
    - `before_step(number, windows, labels)`, `after_step(result)`: called around each step; `stop()`, asked before each
        one, ends the training early if it is true.

    **Returns:** one `StepResult` per step taken. The guard's policy is `guard_policy()`; nothing non-finite ends the
    run. With the same seed (of torch, for the model, and of `batches`) the same machine gives the same numbers.
    """
    _check.integer("training.fit", "steps", steps, low=0)
    _check.number("training.fit", "warmup", warmup, low=0.0, high=1.0)
    _check.integer("training.fit", "first", first, low=1)
    if optimizer is None:
        optimizer = default_optimizer(model, learning_rate=learning_rate, weight_decay=weight_decay)
    guard = GradGuard(model, max_norm, policy=guard_policy())
    device = next(model.parameters()).device
    results: list[StepResult] = []
    source = _endless(batches)
    model.train()
    for number in range(first, steps + 1):
        if stop is not None and stop():
            break
        windows, labels = (part.to(device, non_blocking=True) for part in next(source))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_factor(number - 1, rate_steps or steps, warmup)
        if before_step is not None:
            before_step(number, windows, labels)
        result = training_step(
            model, windows, labels, loss=loss, optimizer=optimizer, guard=guard, step=number, autocast=autocast
        )
        results.append(result)
        if after_step is not None:
            after_step(result)
    return results


# ---- what to train on ----------------------------------------------------------------------------------------------


def limit_files(train: Sequence[Any], validation: Sequence[Any] = ()) -> tuple[list[Any], list[Any]]:
    """The recordings to use, of those given, in order: all, unless a variable limits them.

    BGB_LIMIT_FILES=N keeps the first N for training and max(1, N // 5) for validation; BGB_SMOKE_TEST does so with 3.
    With both the smaller number counts.
    """
    limits = [
        n for n in (settings.get("BGB_LIMIT_FILES"), _SMOKE_FILES if settings.get("BGB_SMOKE_TEST") else None) if n
    ]
    if not limits:
        return list(train), list(validation)
    count = min(limits)
    return list(train[:count]), list(validation[: max(1, count // 5)])


def balanced() -> bool:
    """Whether windows with and without discharges are drawn equally often: yes, except under BGB_SMOKE_TEST."""
    return not settings.get("BGB_SMOKE_TEST")


def positive_weight(labels: np.ndarray | Tensor) -> float:
    r"""The weight of positive samples in the loss: $\sqrt{(1 - r) / r}$ for a share $r$ of ones.

    The root lies between no correction and one that makes both classes weigh the same. 1 if a class is missing, and
    under BGB_SMOKE_TEST.
    """
    share = float(labels.mean())
    return 1.0 if settings.get("BGB_SMOKE_TEST") or not 0 < share < 1 else math.sqrt((1 - share) / share)


def _with_positives(windows: WindowDataset) -> np.ndarray:
    """For each window, whether a sample in it is labelled; (windows,) bool."""
    starts = np.array(windows.starts).reshape(-1, 2)
    found = np.zeros(len(starts), bool)
    for index, recording in enumerate(windows.recordings):
        mine = starts[:, 0] == index
        before = np.concatenate([[0], np.cumsum(recording.label_mask())])  # labelled samples before each
        found[mine] = before[starts[mine, 1] + windows.length] > before[starts[mine, 1]]
    return found


class _RandomBatches(torch.utils.data.Sampler):
    """Indices of the windows of steps `first` to `steps`. Each step's depend on its number, not on those before."""

    def __init__(self, positive: np.ndarray, batch_size: int, steps: int, key: tuple[int, ...], first: int) -> None:
        self.batch_size, self.steps, self.key, self.first = batch_size, steps, key, first
        self.kinds = [np.flatnonzero(positive), np.flatnonzero(~positive)]
        self.both = balanced() and all(kind.size for kind in self.kinds)
        self.count = len(positive)

    def __len__(self) -> int:
        return max(self.steps - self.first + 1, 0)

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first, self.steps + 1):
            generator = np.random.default_rng([*self.key, step])
            if self.both:
                kinds = generator.integers(2, size=self.batch_size)
                yield [int(self.kinds[kind][generator.integers(self.kinds[kind].size)]) for kind in kinds]
            else:
                yield generator.integers(self.count, size=self.batch_size).tolist()


def random_windows(
    windows: WindowDataset,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    first: int = 1,
    rank: int = 0,
    workers: int = 0,
) -> DataLoader:
    """The batches of steps `first` to `steps`, drawn at random with replacement: (batch, channels, L) and (batch, L).

    Where `balanced`, half of the draws are of windows that hold a labelled sample and half of those that hold none, if
    both kinds exist. Windows of a dataset with a short stride serve as random crops. A batch depends on `seed`, `rank`
    and the number of its step alone, so a run that goes on at step `first` sees what it would have seen. `workers`
    processes read ahead.
    """
    batches = _RandomBatches(_with_positives(windows), batch_size, steps, (seed, rank), first)
    generator = torch.Generator().manual_seed(seed)  # not the global one, of which the model's dropout draws
    return DataLoader(windows, batch_sampler=batches, num_workers=workers, generator=generator)


# ---- what came out -------------------------------------------------------------------------------------------------


@torch.no_grad()
def predict(model: nn.Module, windows: WindowDataset, *, batch_size: int = 8) -> list[Tensor]:
    """The model's probability for every sample of every recording, float32 (samples,) each, on the CPU.

    Where windows overlap their logits are averaged; a sample that no window covers is NaN. The model is in evaluation
    mode meanwhile, and as before afterwards.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        logits = [model(data.to(device)).float().cpu() for data, _ in DataLoader(windows, batch_size=batch_size)]
    finally:
        model.train(training)
    return [torch.sigmoid(part) for part in stitch(windows, torch.cat(logits))]


def auroc(scores: Tensor, labels: Tensor) -> float:
    r"""The area under the ROC curve: the chance that a positive sample scores above a negative one, ties counting half.

    From ranks: with $R$ the sum of the ranks of the $p$ positive samples among all, and $q$ negative ones, it is
    $(R - p(p+1)/2) / (pq)$, tied scores sharing their mean rank. `scores` and `labels` have one shape; `labels` are
    positive above 1/2. NaN if a class is missing or a score is NaN.

    **Source:** Hanley & McNeil, Radiology 143 (1982) 29-36; it is the statistic of Mann and Whitney over $pq$.
    """
    if scores.shape != labels.shape:
        rule = "`labels` must have the shape of `scores`"
        raise ValueError(message("training.auroc", rule, tuple(labels.shape), tuple(scores.shape)))
    positive = labels.flatten() > 0.5
    p, q = int(positive.sum()), int((~positive).sum())
    if p == 0 or q == 0 or bool(scores.isnan().any()):
        return math.nan
    _, inverse, counts = torch.unique(scores.flatten(), return_inverse=True, return_counts=True)
    ranks = counts.cumsum(0).double() - (counts - 1) / 2
    return float((ranks[inverse[positive]].sum() - p * (p + 1) / 2) / (p * q))


# ---- checkpoints ---------------------------------------------------------------------------------------------------


def save_checkpoint(path: str | os.PathLike[str], model: SeizureDetector, **facts: Any) -> None:
    """Write the weights and the configuration of a detector, and `facts` of the run, for `load_checkpoint`.

    The file is a dict of plain types and tensors (`torch.load(path, weights_only=True)` reads it): `format`, `config`
    (the fields of `DetectorConfig`), `state_dict`, `versions`, and the facts. It appears whole or not at all.
    """
    from stablekern import __version__

    content = {
        "format": "stablekern.SeizureDetector",
        "config": dataclasses.asdict(model.config),
        "state_dict": {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        "versions": {"stablekern": __version__, "torch": str(torch.__version__), "python": platform.python_version()},
        **facts,
    }
    with replaced(path) as partial:
        torch.save(content, partial)


def load_checkpoint(path: str | os.PathLike[str]) -> tuple[SeizureDetector, dict[str, Any]]:
    """(The detector, with every weight matched by name and shape, in evaluation mode; the rest of the file.)

    Nothing in the file is executed. FileNotFoundError if there is none; ValueError if it is not a checkpoint of a
    detector; RuntimeError if names or shapes do not match.
    """
    rule = f"`{path}` must be a checkpoint written by `save_checkpoint`"
    if not os.path.exists(path):
        raise FileNotFoundError(message("training.load_checkpoint", rule, "no such file"))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError) as cause:
        raise ValueError(message("training.load_checkpoint", rule, type(cause).__name__)) from cause
    if not isinstance(content, dict) or content.get("format") != "stablekern.SeizureDetector":
        raise ValueError(message("training.load_checkpoint", rule, type(content).__name__))
    model = SeizureDetector(DetectorConfig(**content.pop("config")))
    model.load_state_dict(content.pop("state_dict"), strict=True)
    return model.eval(), content
