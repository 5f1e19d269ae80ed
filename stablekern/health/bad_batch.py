"""The evidence of a step that went wrong, in a file: batch, random state, weights, step. Nothing in it is executed."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stablekern._files import replaced
from stablekern.errors import message

__all__ = ["load_bad_batch", "plain", "random_state", "restore_random_state", "save_bad_batch"]

_FORMAT = "stablekern.bad_batch"


def plain(value: Any) -> Any:
    """`value` as tensors on the CPU and plain types, which `torch.load(weights_only=True)` takes; its own memory.

    Mappings become dicts, sequences lists or tuples, NumPy arrays tensors; what has no such form becomes its `repr`.
    """
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return plain(value.item())
    if value is None or type(value) in (bool, int, float, complex, str):
        return value
    if isinstance(value, Mapping):
        return {key if type(key) in (str, int) else str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, list):
        return [plain(item) for item in value]
    return repr(value)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators that a model on `device` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo what was drawn since `random_state`; the part of a device that is not `device` is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def save_bad_batch(
    path: str | os.PathLike[str],
    *,
    step: int,
    batch: Any,
    rng: Mapping[str, Tensor],
    model: nn.Module | None,
    **facts: Any,
) -> None:
    """Write one file, whole or not at all.

    **Arguments:** `batch` is anything (see `plain`); `rng` from `random_state`, taken before the forward; the weights
    are those of `model`, left out if it is None; `facts` are plain values.
    """
    content = {
        "format": _FORMAT,
        "step": step,
        "batch": plain(batch),
        "rng": plain(dict(rng)),
        "weights": None if model is None else plain(dict(model.state_dict())),
        "versions": {"torch": str(torch.__version__), "python": platform.python_version()},
        **plain(facts),
    }
    with replaced(path) as partial:
        torch.save(content, partial)


def load_bad_batch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What `save_bad_batch` wrote, on the CPU. `ValueError` if the file is something else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        rule = f"`{os.fspath(path)}` must be a file written by `TrainingGuard`"
        raise ValueError(message("health.load_bad_batch", rule, str(error).partition("\n")[0])) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        rule = f"`{os.fspath(path)}` must be a file written by `TrainingGuard`"
        raise ValueError(message("health.load_bad_batch", rule, type(content).__name__))
    return content
