"""Argument checks with one wording: the op, the argument, the rule, and what came. They read no tensor values."""

from __future__ import annotations

import sys
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from stablekern.errors import message

REAL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
HALF = (torch.float16, torch.bfloat16)
_LARGEST_FLOAT = sys.float_info.max
_DENSE = torch.strided


def shapes(op: str, **arguments: tuple[Any, str]) -> dict[str, int]:
    """Match tensors against patterns such as `"b l h p"` or `"... n n"` and return the size of each letter.

    A letter that stands in several places must have one size everywhere; a number must match itself; a leading
    `...` takes any batch dimensions (they are not compared). Arguments that are None are passed over.
    """
    sizes: dict[str, int] = {}
    owner: dict[str, str] = {}
    for name, (tensor, pattern) in arguments.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(message(op, f"`{name}` must be a tensor", type(tensor).__name__))
        letters = pattern.split()
        batched = bool(letters) and letters[0] == "..."
        letters = letters[1:] if batched else letters
        if tensor.dim() < len(letters) or (not batched and tensor.dim() != len(letters)):
            raise ValueError(
                message(op, f"`{name}` must have the shape ({pattern.replace(' ', ', ')})", tuple(tensor.shape))
            )
        for letter, size in zip(letters, tensor.shape[tensor.dim() - len(letters) :], strict=True):
            if letter.isdigit():
                if size != int(letter):
                    raise ValueError(
                        message(op, f"`{name}` must have the shape ({pattern.replace(' ', ', ')})", tuple(tensor.shape))
                    )
            elif letter not in sizes:
                sizes[letter], owner[letter] = size, name
            elif sizes[letter] != size:
                both = (
                    f"`{name}` must be square in `{letter}`"
                    if owner[letter] == name
                    else (f"`{name}` and `{owner[letter]}` disagree on `{letter}`")
                )
                raise ValueError(message(op, both, size, sizes[letter]))
    return sizes


def dtypes(op: str, allowed: Collection[torch.dtype], **tensors: Any) -> torch.dtype:
    """Every tensor given must be dense and have one dtype, out of `allowed`, and one device; None is passed over."""
    first: tuple[str, Tensor] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(message(op, f"`{name}` must be a tensor", type(tensor).__name__))
        if tensor.layout is not _DENSE:
            raise TypeError(message(op, f"`{name}` must be dense", tensor.layout))
        if tensor.dtype not in allowed:
            names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            raise TypeError(message(op, f"`{name}` must be one of {names}", str(tensor.dtype).removeprefix("torch.")))
        if first is None:
            first = (name, tensor)
        elif tensor.dtype != first[1].dtype:
            raise TypeError(message(op, f"`{name}` and `{first[0]}` must have one dtype", tensor.dtype, first[1].dtype))
        elif tensor.device != first[1].device:
            raise ValueError(
                message(op, f"`{name}` and `{first[0]}` must be on one device", tensor.device, first[1].device)
            )
    if first is None:
        raise TypeError(message(op, "a tensor is needed", "none"))
    return first[1].dtype


def required(op: str, **tensors: Any) -> None:
    """None stands for an absent tensor in `shapes` and `dtypes`: these must be there, and dense."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(message(op, f"`{name}` must be a tensor", type(tensor).__name__))
        if tensor.layout is not _DENSE:
            raise TypeError(message(op, f"`{name}` must be dense", tensor.layout))


def flag(op: str, **values: Any) -> None:
    """Each must be True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(message(op, f"`{name}` must be True or False", type(value).__name__))


def own_memory(op: str, **tensors: Tensor) -> None:
    """What is changed in place must not hold one element twice, as an expanded tensor does."""
    for name, tensor in tensors.items():
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
            rule = f"`{name}` is changed in place, so its elements must not share memory (`.clone()`)"
            raise ValueError(message(op, rule, tuple(tensor.stride())))


def broadcast(op: str, **batches: torch.Size) -> None:
    """The batch dimensions of the tensors of these names must go together."""
    try:
        torch.broadcast_shapes(*batches.values())
    except RuntimeError:
        names = " and ".join(f"`{name}`" for name in batches)
        rule = f"the batch dimensions of {names} must broadcast"
        raise ValueError(message(op, rule, *(tuple(shape) for shape in batches.values()))) from None


def choice(op: str, name: str, value: Any, legal: Collection[Any]) -> None:
    """`value` must be one of `legal`."""
    if isinstance(value, Tensor) or value not in legal:
        raise ValueError(message(op, f"`{name}` must be one of {', '.join(repr(v) for v in legal)}", repr(value)))


def number(
    op: str, name: str, value: Any, *, low: float | None = None, high: float | None = None, strict: bool = False
) -> float:
    """`value` must be a real number in [low, high], or in (low, high] with `strict`; NaN never is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(message(op, f"`{name}` must be a number", type(value).__name__))
    if isinstance(value, int) and abs(value) > _LARGEST_FLOAT:
        got = f"an integer of {value.bit_length()} bits"
        raise ValueError(message(op, f"`{name}` must be a number that a float can hold", got))
    too_low = low is not None and not (value > low if strict else value >= low)
    if value != value or too_low or (high is not None and not value <= high):
        rule = f"`{name}` must be a number"
        if low is not None:
            rule += f" {'>' if strict else '>='} {low:g}"
        if high is not None:
            rule += f"{' and' if low is not None else ''} <= {high:g}"
        raise ValueError(message(op, rule, value))
    return float(value)


def integer(op: str, name: str, value: Any, *, low: int | None = None, high: int | None = None) -> int:
    """`value` must be an integer in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(message(op, f"`{name}` must be an integer", type(value).__name__))
    if (low is not None and value < low) or (high is not None and value > high):
        span = (
            f"between {low} and {high}" if None not in (low, high) else f">= {low}" if low is not None else f"<= {high}"
        )
        raise ValueError(message(op, f"`{name}` must be {span}", value))
    return value


def readable(*tensors: torch.Tensor) -> bool:
    """Whether values may be looked at: on a CPU, and not while a graph is traced."""
    return not torch.compiler.is_compiling() and all(tensor.device.type == "cpu" for tensor in tensors)


def first_order(op: str) -> None:
    """Call first in `backward`: under `create_graph=True` a hand-written backward would silently drop terms."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            message(
                op,
                "second derivatives are not available (called under `create_graph=True`); differentiate `reference`",
            )
        )
