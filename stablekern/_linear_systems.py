"""How systems of linear equations are given to `cg`: shapes, tolerances, sparse patterns, diagonal blocks.

Inside, systems are rows: (m, k, n) for k right-hand sides of n unknowns to each of m matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablekern import _check
from stablekern.errors import message

_OP = "cg"
REAL_OF = {d: d for d in _check.REAL} | dict(zip(_check.COMPLEX, _check.REAL, strict=True))


def rows_of(crow: Tensor, nnz: int) -> Tensor:
    """The row of each entry."""
    return torch.searchsorted(crow, torch.arange(nnz, device=crow.device), right=True) - 1


class Shape(NamedTuple):
    """How systems lie: `batch` of matrices and right-hand sides, of n unknowns, `columns` of them or a vector."""

    batch: tuple[int, ...]
    n: int
    columns: int | None
    shared: bool  # one matrix for all

    def systems(self) -> tuple[int, ...]:
        """The shape of `info`."""
        return self.batch if self.columns is None else (*self.batch, self.columns)

    def flat(self) -> tuple[int, int]:
        """(m, k): matrices, right-hand sides each."""
        each = 1 if self.columns is None else self.columns
        count = math.prod(self.batch)
        return (1, count * each) if self.shared else (count, each)

    def rows(self, b: Tensor) -> Tensor:
        """(m, k, n) of what has the shape of b."""
        if self.columns is None:
            return b.expand(*self.batch, self.n).reshape(*self.flat(), self.n)
        return b.expand(*self.batch, self.n, self.columns).mT.reshape(*self.flat(), self.n)

    def back(self, x: Tensor) -> Tensor:
        """The shape of b of rows (m, k, n)."""
        if self.columns is None:
            return x.reshape(*self.batch, self.n)
        return x.reshape(*self.batch, self.columns, self.n).mT

    def matrices(self, entries: Tensor, dims: int) -> Tensor:
        """(m, ...) of (..., entries), whose last `dims` dimensions are one matrix."""
        tail = entries.shape[entries.dim() - dims :]
        if self.shared:
            return entries.reshape(1, *tail)
        return entries.expand(*self.batch, *tail).reshape(math.prod(self.batch), *tail)


def arranged(batch: torch.Size, n: int, b: Tensor) -> Shape:
    """As torch.linalg.solve tells vectors from columns."""
    vector = b.dim() == 1 or b.shape == (*batch, n)
    if (b.shape[-1] if vector else b.shape[-2]) != n:
        rule = f"`b` must be ({'..., ' if b.dim() > 1 else ''}{n}) or (..., {n}, k) for this `A`"
        raise ValueError(message(_OP, rule, tuple(b.shape)))
    sides = b.shape[:-1] if vector else b.shape[:-2]
    try:
        both = batch if batch == sides else torch.broadcast_shapes(batch, sides)
    except RuntimeError:
        rule = "the batch dimensions of `A` and `b` must broadcast"
        raise ValueError(message(_OP, rule, tuple(batch), tuple(sides))) from None
    return Shape(tuple(both), n, None if vector else b.shape[-1], math.prod(batch) == 1)


def tolerance(name: str, value: float | Tensor, b: Tensor, systems: tuple[int, ...]) -> Tensor:
    """One element for a number, else one for each system."""
    dtype = REAL_OF[b.dtype]
    if not isinstance(value, Tensor):
        number = _check.number(_OP, name, value, low=0.0)
        if number > torch.finfo(dtype).max:  # what is beyond single precision is infinite there
            number = float("inf")
        return torch.full((1,), number, dtype=dtype, device=b.device)
    _check.dtypes(_OP, _check.REAL, **{name: value})
    if value.device != b.device:
        raise ValueError(message(_OP, f"`{name}` must be on the device of `b`", value.device))
    try:
        each = value.to(dtype).expand(systems)
    except RuntimeError:
        raise ValueError(message(_OP, f"`{name}` must broadcast to {tuple(systems)}", tuple(value.shape))) from None
    if _check.readable(value) and not bool((value >= 0).all()):
        raise ValueError(message(_OP, f"`{name}` must be >= 0", float(value.min())))
    return each.detach().contiguous()


def _inverse_blocks(blocks: Tensor) -> Tensor:
    """Of (m, c, s, s); the identity where there is none."""
    inverse, code = torch.linalg.inv_ex(blocks)
    usable = (code == 0) & torch.isfinite(inverse).all(-1).all(-1)
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    return torch.where(usable[..., None, None], inverse, eye).contiguous()


def _diagonal_blocks(form: str, tensors: Sequence[Tensor], n: int, size: int) -> Tensor:
    """(m, c, s, s); the last one is filled up with the identity."""
    count = -(-n // size)
    if form == "dense":
        A = torch.nn.functional.pad(tensors[0], (0, count * size - n) * 2)
        blocks = A.unflatten(-1, (count, size)).unflatten(-3, (count, size)).diagonal(dim1=-4, dim2=-2).movedim(-1, 1)
    else:
        crow, col, values = tensors
        row = rows_of(crow, len(col))
        inside = row // size == col // size
        place = row * size + col % size  # of (c, s, s)
        blocks = torch.zeros(values.shape[0], count * size * size, dtype=values.dtype, device=values.device)
        blocks = blocks.index_add(-1, torch.where(inside, place, 0), torch.where(inside, values, 0.0))
        blocks = blocks.unflatten(-1, (count, size, size))
    missing = torch.arange(count * size, device=blocks.device).view(count, size) >= n
    return blocks + torch.diag_embed(missing.to(blocks.dtype))


def diagonal_inverse(preconditioner: Any, form: str, tensors: Sequence[Tensor], n: int) -> Tensor | None:
    if preconditioner is None:
        return None
    size = 1 if preconditioner == "jacobi" else preconditioner
    if isinstance(size, bool) or not isinstance(size, int):
        rule = '`preconditioner` must be None, "jacobi", the size of its blocks, or a callable if `A` is one'
        raise TypeError(message(_OP, rule, repr(preconditioner)))
    size = min(_check.integer(_OP, "preconditioner", size, low=1), max(n, 1))
    with torch.no_grad():
        return _inverse_blocks(_diagonal_blocks(form, tensors, n, size))


def pattern_size(crow: Tensor, col: Tensor, values: Tensor) -> int:
    """n, once the pattern is one."""
    for name, index in (("crow", crow), ("col", col)):
        if not isinstance(index, Tensor) or index.dtype not in (torch.int32, torch.int64) or index.dim() != 1:
            got = f"{tuple(index.shape)} {index.dtype}" if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(message(_OP, f"`{name}` of `A` must be a vector of int32 or int64", got))
        if index.device != values.device:
            raise ValueError(message(_OP, f"`{name}` and the values of `A` must be on one device", index.device))
    n, nnz = len(crow) - 1, len(col)
    if n < 0 or values.dim() < 1 or values.shape[-1] != nnz:
        raise ValueError(message(_OP, f"`A` must have {nnz} values, as many as columns", tuple(values.shape)))
    if _check.readable(crow, col):
        if crow[0] != 0 or crow[-1] != nnz or bool((crow[1:] < crow[:-1]).any()):
            raise ValueError(message(_OP, f"`crow` of `A` must rise from 0 to {nnz}", crow.tolist()[:8]))
        if nnz and not 0 <= int(col.min()) <= int(col.max()) < n:
            raise ValueError(message(_OP, f"`col` of `A` must lie in [0, {n})", int(col.min()), int(col.max())))
    return n
