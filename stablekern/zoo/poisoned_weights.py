"""One NaN in one gradient, and one step later every weight of the model is NaN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stablekern.optim import GradGuard, parameter_groups
from stablekern.zoo.exhibit import FIX, OURS, STOCK, Exhibit, Figure, Row, Series

__all__ = ["exhibit"]

_STEPS, _BAD, _RATE = 20, 8, 1e-3


class _Net(nn.Module):
    """A small model; in one batch a parameter gets the gradient 0 / 0, while the loss is finite."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.head = nn.Linear(64, 1)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, bad: bool) -> Tensor:
        out = self.head(self.body(x)).squeeze(-1)
        return out + (0 * self.scale).sqrt() if bad else out * self.scale


def _train(groups: bool, rate: float, guarded: bool) -> tuple[list[int], int, int]:
    """(Weights that are not finite after each step, losses that were not, weights in all)."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Net()
    chosen = [g for g in parameter_groups(model, 1e-2) if g["params"]] if groups else model.parameters()
    optimizer = torch.optim.AdamW(chosen, lr=rate)
    guard = GradGuard(model, 1.0)
    course, losses = [], 0
    for step in range(_STEPS):
        x = torch.randn(32, 16, generator=generator)
        loss = (model(x, step == _BAD) - x[:, 0]).square().mean()
        losses += not bool(loss.isfinite())
        loss.backward()
        if guarded:
            guard()
            guard.step(optimizer)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad()
        course.append(sum(int((~p.isfinite()).sum()) for p in model.parameters()))
    return course, losses, sum(p.numel() for p in model.parameters())


_METHODS = (
    (STOCK, "clip_grad_norm_, AdamW", False, _RATE, False),
    (FIX, "no weight decay on norms and biases", True, _RATE, False),
    (FIX, "learning rate / 1000", False, _RATE / 1000, False),
    (OURS, "GradGuard", False, _RATE, True),
)


def exhibit() -> Exhibit:
    rows, series = [], []
    for who, name, groups, rate, guarded in _METHODS:
        course, losses, count = _train(groups, rate, guarded)
        rows.append(Row(who, name, f"weights after {_STEPS} steps", course[-1], count))
        rows.append(Row(who, name, f"losses of {_STEPS} steps", losses, _STEPS))
        series.append(Series(who, name, tuple(range(1, _STEPS + 1)), tuple(float(c) for c in course)))
    return Exhibit(
        name="poisoned_weights",
        seen="every weight is NaN from one step to the next, though the loss was finite",
        cause="one NaN makes the norm in clip_grad_norm_ NaN, which multiplies every gradient",
        published="parameter groups without weight decay for norms and biases; a smaller learning rate",
        remedy="GradGuard looks first: the step is skipped, and the first bad gradient has a name",
        counted="a weight, or a loss, is not finite; one gradient of one parameter was, once",
        measured=None,
        rows=tuple(rows),
        figure=Figure(
            "step",
            "weights that are not finite",
            tuple(series),
            f"A single NaN in the gradient of a single parameter, at step {_BAD + 1} of {_STEPS}.",
        ),
    )
