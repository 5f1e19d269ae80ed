"""Where the time of a training step goes: the parts of the detector, forward and backward, and the optimizer.

Forward times are those between the start and the end of a module. A backward has no such brackets; what it has is an
order. Autograd runs the node that made a tensor when all gradients of that tensor are there, so a hook on a module's
output fires as the module's backward begins, and the time until the next such hook is that module's. On a GPU every
mark waits for the device first, which makes the sum a little larger than an undisturbed step.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from stablekern import _check
from stablekern.nn.detector import SeizureDetector
from stablekern.ops.focal_loss import focal_loss
from stablekern.optim import GradGuard
from stablekern.training import default_optimizer

__all__ = ["PARTS", "parts_of_a_step"]

PARTS = ("encoder", "node stream", "edge stream", "positional encoding", "graph", "projections and head", "optimizer")
_REST = PARTS[5]


def _modules(model: SeizureDetector) -> dict[str, nn.Module]:
    return {
        "encoder": model.tcn_encoder,
        "node stream": model.node_mamba,
        "edge stream": model.edge_stream,
        "positional encoding": model.gnn.pe,
        "graph": model.gnn,
    }


class _Clock:
    """Adds the time between marks to the part that was current."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.spent: dict[str, float] = defaultdict(float)
        self.current: str | None = None
        self.since = 0.0

    def mark(self, part: str | None) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if self.current is not None:
            self.spent[self.current] += now - self.since
        self.current, self.since = part, now


def _watch(modules: dict[str, nn.Module], forward: _Clock, backward: _Clock) -> list[Any]:
    """Hooks on each module; returns their handles."""
    outer: list[str] = []  # the parts being computed, the innermost last
    made: set[int] = set()  # the outputs of parts: their producer is known, and not the rest
    handles = []

    def enter(part: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            for value in inputs:
                if isinstance(value, Tensor) and value.requires_grad and id(value) not in made and not outer:
                    value.register_hook(lambda _: backward.mark(_REST))
            outer.append(part)
            forward.mark(part)

        return hook

    def leave(part: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            outer.pop()
            forward.mark(outer[-1] if outer else _REST)
            if output.requires_grad:
                made.add(id(output))
                output.register_hook(lambda _: backward.mark(part))
                if outer:  # what the inner part is made from belongs to the outer one again
                    for value in inputs:
                        if isinstance(value, Tensor) and value.requires_grad:
                            value.register_hook(lambda _, owner=outer[-1]: backward.mark(owner))

        return hook

    for part, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(part)))
        handles.append(module.register_forward_hook(leave(part)))
    return handles


def parts_of_a_step(
    model: SeizureDetector, *, batch_size: int = 1, samples: int = 15_360, steps: int = 3
) -> list[dict[str, Any]]:
    """Median seconds over `steps` training steps (after one that does not count) on random windows, per part.

    **Returns:** for each of `PARTS` a dict of `part`, `forward`, `backward`, in seconds; the optimizer (guard, step,
    zeroing) has all of its time in `forward`. The weights of `model` change, as in training.
    """
    _check.integer("eeg.parts_of_a_step", "steps", steps, low=1)
    device = next(model.parameters()).device
    optimizer, guard = default_optimizer(model, learning_rate=1e-4), GradGuard(model, 1.0)
    windows = torch.randn(batch_size, model.config.channels, samples, device=device)
    labels = (torch.rand(batch_size, samples, device=device) < 0.3).float()
    taken: list[tuple[dict[str, float], dict[str, float]]] = []
    for _ in range(steps + 1):
        forward, backward = _Clock(device), _Clock(device)
        handles = _watch(_modules(model), forward, backward)
        try:
            forward.mark(_REST)
            loss = focal_loss(model(windows), labels, reduction="mean")
            forward.mark(None)
            backward.mark(_REST)
            loss.backward()
            backward.mark(None)
        finally:
            for handle in handles:
                handle.remove()
        forward.mark("optimizer")
        guard()
        guard.step(optimizer)
        optimizer.zero_grad()
        forward.mark(None)
        taken.append((forward.spent, backward.spent))
    return [
        {
            "part": part,
            "forward": statistics.median(forward[part] for forward, _ in taken[1:]),
            "backward": statistics.median(backward[part] for _, backward in taken[1:]),
        }
        for part in PARTS
    ]
