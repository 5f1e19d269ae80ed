"""Many tensors in one launch: their addresses and sizes as columns in device memory, and which block works on which.

A column is a function of its numbers alone, so it is made once for a set of tensors and found again at the next step.
Nothing waits for the device: new columns come from pinned memory, and under capture, when a copy would be replayed
from host memory that is gone by then, as arguments of a kernel, which the graph keeps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 64  # of a column, as arguments of one launch
_KEPT = 256  # columns; gradients that move with each step would fill the memory
BIAS = tl.constexpr(1 << 62)  # Triton types an integer argument by its size: this makes all of them 64 bits wide

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.complex64: tl.float32,
    torch.complex128: tl.float64,
    torch.bool: tl.int8,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
}

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["words"])
def tensor_lists_write_kernel(column_ptr, words):
    for i in tl.static_range(len(words)):
        tl.store(column_ptr + i, words[i] - BIAS)


@triton.jit
def pointer_at(column_ptr, row, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a row of a column, as a pointer; `ALIGNED`: to 16 bytes, so that loads may be as wide."""
    pointer = tl.load(column_ptr + row).to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def load_block(pointer, first, size, BLOCK: tl.constexpr):
    """Elements `first` to `first + BLOCK` of `size`, 0 beyond. A mask would cost the wide loads: only where needed."""
    at = first + tl.arange(0, BLOCK)
    if (first >= 0) & (first + BLOCK <= size):
        x = tl.load(pointer + at)
    else:
        x = tl.load(pointer + at, mask=(at >= 0) & (at < size), other=0)
    return x


@triton.jit
def store_block(pointer, x, first, size, BLOCK: tl.constexpr):
    at = first + tl.arange(0, BLOCK)
    if (first >= 0) & (first + BLOCK <= size):
        tl.store(pointer + at, x)
    else:
        tl.store(pointer + at, x, mask=(at >= 0) & (at < size))


# ---- kernel launchers ---------------------------------------------------------------------------------------------


class _Kept(NamedTuple):
    tensor: Tensor
    stream: Any  # on which it was made; None on a CPU
    ready: Any


class Blocks(NamedTuple):
    """`owners[b]` is the tensor that block b works on, as its block number `b - starts[owners[b]]`."""

    owners: Tensor  # (blocks,) int32
    starts: Tensor  # (tensors + 1,) int64
    count: int


_columns: OrderedDict[Hashable, _Kept] = OrderedDict()
_in_graphs: dict[Hashable, _Kept] = {}  # what a captured graph reads must outlive it


def _kept(key: Hashable, device: torch.device, make: Callable[[bool], Tensor]) -> Tensor:
    """What `make(capturing)` made for this key before, or makes now."""
    gpu = device.type == "cuda"
    capturing = gpu and torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device) if gpu else None
    found = _in_graphs.get(key) or _columns.get(key)
    if found is not None:
        if capturing:  # all that was made before is there: a capture begins by waiting for the device
            _in_graphs[key] = found
            return found.tensor
        if stream != found.stream:
            stream.wait_event(found.ready)
            found.tensor.record_stream(stream)
        if key in _columns:
            _columns.move_to_end(key)
        return found.tensor
    tensor = make(capturing)
    if not capturing:  # a temporary of the graph is written when the graph runs: nobody else may read it
        _columns[key] = _Kept(tensor, stream, stream.record_event() if gpu else None)
        while len(_columns) > _KEPT:
            _columns.popitem(last=False)
    return tensor


def column(numbers: Sequence[int], device: torch.device) -> Tensor:  # int64, at least (len(numbers),)
    """Integers below 2^62 in absolute value, in device memory."""
    numbers = tuple(numbers)

    def make(capturing: bool) -> Tensor:
        if not capturing:
            gpu = device.type == "cuda"
            host = torch.tensor(numbers, dtype=torch.int64, pin_memory=gpu)
            return host.to(device, non_blocking=True) if gpu else host
        return written_by_launches(numbers, device)

    return _kept((device, numbers), device, make)


def written_by_launches(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """A column, whole launches long, whose numbers are arguments of the launches."""
    padded = numbers + (0,) * (-len(numbers) % _WORDS)
    out = torch.empty(len(padded), dtype=torch.int64, device=device)
    for first in range(0, len(padded), _WORDS):
        words = tuple(number + BIAS.value for number in padded[first : first + _WORDS])
        tensor_lists_write_kernel[(1,)](out[first:], words, num_warps=1, enable_fp_fusion=True)
    return out


def addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    return column([tensor.data_ptr() for tensor in tensors], device)


def aligned(*lists: Sequence[Tensor]) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes."""
    return all(tensor.data_ptr() % 16 == 0 for tensors in lists for tensor in tensors)


def blocks(sizes: Sequence[int], block: int, device: torch.device) -> Blocks:
    """Blocks of `block` elements over tensors of these sizes; an empty tensor has none."""
    counts = [triton.cdiv(size, block) for size in sizes]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    total = starts[-1]

    def make(capturing: bool) -> Tensor:
        repeats = column(counts, device)[: len(counts)]
        return torch.arange(len(counts), dtype=torch.int32, device=device).repeat_interleave(repeats, output_size=total)

    return Blocks(_kept(("owners", device, *counts), device, make), column(starts, device), total)
