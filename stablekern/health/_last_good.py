"""Weights to go back to, kept in memory: parameters, buffers and the optimizer's state, copied in place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stablekern.optim.grad_guard import tensor_norms

__all__ = ["LastGood", "values_of"]


def values_of(model: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, tensor) of every parameter and buffer that can hold a NaN."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [(name, t) for name, t in named if t.numel() and (t.is_floating_point() or t.is_complex())]


class LastGood:
    """One copy of a training state. `keep` overwrites it, `restore` brings it back."""

    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer]) -> None:
        self._tensors = [t for _, t in (*model.named_parameters(), *model.named_buffers())]
        self._trained = [i for i, t in enumerate(self._tensors) if t.requires_grad and t.numel()]
        self._optimizers = list(optimizers)
        self._copies: list[Tensor] = []
        self._states: list[dict[Tensor, dict[str, Any]]] = []

    def __bool__(self) -> bool:
        return bool(self._copies)

    def state_tensors(self) -> list[tuple[str, Tensor]]:
        """(name, tensor) of the optimizers' own numbers."""
        return [
            (f"the optimizer's {key}", value)
            for optimizer in self._optimizers
            for state in optimizer.state.values()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.numel() and value.is_floating_point() | value.is_complex()
        ]

    @torch.no_grad()
    def keep(self) -> None:
        if self._copies:
            for copy, tensor in zip(self._copies, self._tensors, strict=True):
                copy.copy_(tensor)
        else:
            self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._states = [
            {p: {key: _copied(value) for key, value in state.items()} for p, state in optimizer.state.items()}
            for optimizer in self._optimizers
        ]

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was kept, in the same memory; state that came into being since is dropped."""
        for copy, tensor in zip(self._copies, self._tensors, strict=True):
            tensor.copy_(copy)
        for optimizer, states in zip(self._optimizers, self._states, strict=True):
            for p in [p for p in optimizer.state if p not in states]:
                del optimizer.state[p]
            for p, kept in states.items():
                state = optimizer.state[p]
                for key in [key for key in state if key not in kept]:
                    del state[key]
                for key, value in kept.items():
                    if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
                        state[key].copy_(value)
                    else:
                        state[key] = _copied(value)

    @torch.no_grad()
    def moved(self, device: torch.device) -> Tensor:
        """How far the trained weights are from the copy, relative to their norm: 0-d float64 on `device`."""
        now = [self._tensors[i].detach() for i in self._trained]
        away = [t - self._copies[i] for t, i in zip(now, self._trained, strict=True)]
        if not now:
            return torch.zeros((), dtype=torch.float64, device=device)
        distance, length = (torch.linalg.vector_norm(tensor_norms(part, device)) for part in (away, now))
        return distance / torch.where(length > 0, length, 1.0)


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
