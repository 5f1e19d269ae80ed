"""Memory for the large results of native kernels: kept when a tensor dies, and used again for the next one.

The system's allocator gives large blocks back at once and gets them again page by page, which takes several times as
long as a kernel that reaches the bandwidth of memory needs to fill them. CUDA tensors have had a caching allocator for
the same reason; this is that for the results of our CPU kernels (csrc/include/stablekern/pool.h). The tensors are plain
ones; only their storage cannot be resized.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from stablekern import settings

__all__ = ["empty", "empty_cache"]

_LEAST_BYTES = 1 << 20  # below it the allocator of torch keeps memory by itself
_FLOAT, _BFLOAT, _COMPLEX = 2, 4, 5  # DLPack's codes
_TYPES = {
    torch.float32: (_FLOAT, 32),
    torch.float64: (_FLOAT, 64),
    torch.float16: (_FLOAT, 16),
    torch.bfloat16: (_BFLOAT, 16),
    torch.complex64: (_COMPLEX, 64),
    torch.complex128: (_COMPLEX, 128),
}
# What a fake or functional tensor is not.
_REAL_TENSORS = (Tensor, torch.nn.Parameter)


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty(shape, dtype=dtype)`, out of the pool where it is a large tensor in the memory of the CPU."""
    dtype = dtype or like.dtype
    if type(like) in _REAL_TENSORS and dtype in _TYPES and like.device.type == "cpu":
        code, bits = _TYPES[dtype]
        native = sys.modules.get("stablekern._native")
        if native is not None and math.prod(shape) * bits >= 8 * _LEAST_BYTES:
            limit = settings.get("STABLEKERN_POOL_MB") << 20
            if limit:
                return torch.from_dlpack(native.pooled_empty(tuple(shape), code, bits, limit))
    return torch.empty(shape, dtype=dtype, device=like.device)


def empty_cache() -> int:
    """Give the memory that is kept for results of CPU kernels back to the system.

    Ops on a CPU keep the memory of large results that have died, up to `STABLEKERN_POOL_MB` (512 by default; 0 keeps
    nothing), and write the next result into it. Tensors that live are not touched. CUDA memory is torch's:
    `torch.cuda.empty_cache()`.

    **Returns** the number of bytes given back.
    """
    native = sys.modules.get("stablekern._native")
    if native is None:
        return 0
    held: int = native.pool_bytes()[0]
    native.pool_clear()
    return held
