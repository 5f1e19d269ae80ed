"""The product with a dense unitary matrix, and the edges' gradient, in IEEE float32 or float64.

On a GPU the dense product is the fast way: an expansion gathers every neighbour of every node from L2, five times as
many bytes as the product needs in time. What these kernels add to a library's product: no TF32, whatever the global
switch says (a step that rounds to 10 bits is not unitary), the conjugate without a copy, and sums in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS, _DEPTH = 32, 32, 16
_SHARE = 1024  # tokens whose products one program sums up

# ---- kernels ------------------------------------------------------------------------------------------------------


@triton.jit
def cayley_step_apply_kernel(
    psi_ptr,  # (tokens, nodes, 2)
    cosine_ptr,  # (nodes, nodes), symmetric: the real part
    sine_ptr,
    out_ptr,
    tokens,
    nodes,
    CONJUGATE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    real = tl.zeros((ROWS, COLUMNS), WIDE)
    imaginary = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(0, nodes, DEPTH):
        depth = start + tl.arange(0, DEPTH).to(tl.int64)
        here = (rows[:, None] < tokens) & (depth[None, :] < nodes)
        at = psi_ptr + 2 * (rows[:, None] * nodes + depth[None, :])
        x = tl.load(at, mask=here, other=0.0)
        y = tl.load(at + 1, mask=here, other=0.0)
        there = (depth[:, None] < nodes) & (columns[None, :] < nodes)
        factor = depth[:, None] * nodes + columns[None, :]
        c = tl.load(cosine_ptr + factor, mask=there, other=0.0)
        s = tl.load(sine_ptr + factor, mask=there, other=0.0)
        if CONJUGATE:
            s = -s
        real = tl.dot(x, c, real, input_precision="ieee", out_dtype=WIDE)
        real = tl.dot(-y, s, real, input_precision="ieee", out_dtype=WIDE)
        imaginary = tl.dot(x, s, imaginary, input_precision="ieee", out_dtype=WIDE)
        imaginary = tl.dot(y, c, imaginary, input_precision="ieee", out_dtype=WIDE)
    inside = (rows[:, None] < tokens) & (columns[None, :] < nodes)
    to = out_ptr + 2 * (rows[:, None] * nodes + columns[None, :])
    tl.store(to, real, mask=inside)
    tl.store(to + 1, imaginary, mask=inside)


@triton.jit
def _sum_of(first_ptr, second_ptr, at, mask):
    return tl.load(first_ptr + at, mask=mask, other=0.0) + tl.load(second_ptr + at, mask=mask, other=0.0)


@triton.jit
def cayley_step_edges_kernel(
    grad_ptr,  # (tokens, nodes, 2), like the next three
    grad_psi_ptr,
    psi_ptr,
    out_ptr,
    parts_ptr,  # (shares, nodes, nodes)
    tokens,
    nodes,
    SHARE: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The sum over a share of the tokens of Im(conj(l_i) z_j), l = grad + grad_psi and z = psi + out."""
    share = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), WIDE)
    for start in range(0, tl.minimum(tokens - share * SHARE, SHARE), DEPTH):
        token = share * SHARE + start + tl.arange(0, DEPTH)
        left = 2 * (token[None, :] * nodes + rows[:, None])
        right = 2 * (token[:, None] * nodes + columns[None, :])
        left_mask = (token[None, :] < tokens) & (rows[:, None] < nodes)
        right_mask = (token[:, None] < tokens) & (columns[None, :] < nodes)
        x = _sum_of(grad_ptr, grad_psi_ptr, left, left_mask)
        z = _sum_of(psi_ptr, out_ptr, right + 1, right_mask)
        total = tl.dot(x, z, total, input_precision="ieee", out_dtype=WIDE)
        x = _sum_of(grad_ptr, grad_psi_ptr, left + 1, left_mask)
        z = _sum_of(psi_ptr, out_ptr, right, right_mask)
        total = tl.dot(-x, z, total, input_precision="ieee", out_dtype=WIDE)
    inside = (rows[:, None] < nodes) & (columns[None, :] < nodes)
    to = parts_ptr + (share * nodes + rows[:, None]) * nodes + columns[None, :]
    tl.store(to, total, mask=inside)


# ---- kernel launchers ---------------------------------------------------------------------------------------------


def _layout(tokens: Tensor) -> dict[str, object]:
    wide = tl.float64 if tokens.dtype == torch.complex128 else tl.float32
    return {"WIDE": wide, "ROWS": _ROWS, "COLUMNS": _COLUMNS, "DEPTH": _DEPTH, "enable_fp_fusion": True}


def cayley_step_apply(psi: Tensor, unitary: Tensor, conjugate: bool, out: Tensor) -> None:
    tokens, nodes = psi.shape
    if psi.numel() == 0:
        return
    cayley_step_apply_kernel[(triton.cdiv(tokens, _ROWS), triton.cdiv(nodes, _COLUMNS))](
        torch.view_as_real(psi),
        unitary.real.contiguous(),
        unitary.imag.contiguous(),
        torch.view_as_real(out),
        tokens,
        nodes,
        CONJUGATE=conjugate,
        num_warps=8,
        **_layout(psi),
    )


def cayley_step_edges(grad: Tensor, grad_psi: Tensor, psi: Tensor, out: Tensor) -> Tensor:
    """(nodes, nodes) in float64."""
    tokens, nodes = psi.shape
    shares = triton.cdiv(tokens, _SHARE)
    parts = torch.empty(shares, nodes, nodes, dtype=psi.dtype.to_real(), device=psi.device)
    if parts.numel():
        cayley_step_edges_kernel[(triton.cdiv(nodes, _ROWS), triton.cdiv(nodes, _COLUMNS), shares)](
            *(torch.view_as_real(tensor) for tensor in (grad, grad_psi, psi, out)),
            parts,
            tokens,
            nodes,
            SHARE=_SHARE,
            **_layout(psi),
        )
    return parts.sum(0, dtype=torch.float64)
