"""What an optimizer must know of sharded parameters (DTensor: FSDP2, tensor parallelism). Others pass through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stablekern.errors import message

__all__ = ["box", "is_sharded", "like", "local", "reduce"]

_PLAIN = (torch.nn.Parameter, Tensor)  # looking for an attribute that is missing takes longer than all else


# DTensor is not imported before there is one: parameters that are one are `Any` below.


def is_sharded(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor (asked without importing `torch.distributed.tensor`, which takes a while)."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "placements")


def local(tensor: Any) -> Tensor:
    """This rank's part, sharing memory with `tensor`."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def like(gradient: Any, parameter: Any) -> Tensor:
    """The gradient sharded as its parameter is (a partial sum, as tensor parallelism leaves, is summed here)."""
    if is_sharded(gradient) and gradient.placements != parameter.placements:
        return gradient.redistribute(placements=parameter.placements)
    return gradient


def box(tensor: Any) -> tuple[Sequence[int], Sequence[int]]:
    """Sizes of this rank's part and its offsets within the whole.

    `ValueError` if the part is no box (a strided shard, from FSDP over tensor parallelism along one dimension).
    """
    if not is_sharded(tensor):
        return tensor.shape, (0,) * tensor.dim()
    if not all(placed.is_replicate() or type(placed).__name__ == "Shard" for placed in tensor.placements):
        raise ValueError(message("optim", "noise needs parameters that are replicated or `Shard`ed", tensor.placements))
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def reduce(values: Tensor, owner: Any, operation: str) -> Tensor:
    """All-reduce `values` ("sum" or "max") over the ranks that hold different parts of the DTensor `owner`."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if placed.is_replicate() else Partial(operation) for placed in owner.placements]
    with torch.no_grad():
        return DTensor.from_local(values, owner.device_mesh, placements, run_check=False).full_tensor()
