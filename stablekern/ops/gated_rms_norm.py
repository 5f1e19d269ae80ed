r"""The norm at the end of a Mamba-2 block, gate and root mean square in one pass, with nothing kept but its arguments.

Within each of `groups` parts of the features, of $w$ features each, with $\sigma$ the logistic function,

$$u = y \odot z\,\sigma(z), \qquad r = \Bigl( \tfrac1w \sum_k u_k^2 + \epsilon \Bigr)^{-1/2}, \qquad
out = r\, u \odot s.$$

Written as separate operations it reads and writes the features a dozen times, and keeps five copies of them for the
backward. All of it follows from $y$, $z$ and $s$: with $g$ the gradient that comes in,

$$\bar u = r\,\Bigl( s \odot g - r u\, \tfrac{r}{w} \sum_k s_k g_k u_k \Bigr), \quad
\bar y = \bar u \odot z\,\sigma(z), \quad
\bar z = \bar u \odot y \odot \bigl( \sigma(z) + z\,\sigma(z)\,(1 - \sigma(z)) \bigr), \quad
\bar s = \sum_{rows} g \odot r u.$$

$r$ is at most $\epsilon^{-1/2}$, so every factor is bounded at $u = 0$.

Source: Dao & Gu 2024, arXiv:2405.21060, sec. 7 (the norm before the output projection).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check
from stablekern._load import native
from stablekern._registry import define, launcher
from stablekern.numerics import NORM_EPS

__all__ = ["gated_rms_norm"]

_OP = "gated_rms_norm"
_ENTRIES_PER_SUM = 1 << 15  # rows of this many entries share a partial sum of the weight's gradient


def reference(y: Tensor, z: Tensor, weight: Tensor, *, eps: float = NORM_EPS.value, groups: int = 1) -> Tensor:
    """The definition in plain torch, differentiable."""
    gated = (y * torch.nn.functional.silu(z)).unflatten(-1, (groups, weight.shape[0] // groups))
    return (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight


def _fake_fwd(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    return y.new_empty(y.shape)


def _fake_bwd(
    grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), y.new_empty(y.shape), weight.new_empty(weight.shape)


# y and z (rows, width) of one dtype, float32 or float64, as is the weight (width).
_fwd = define("gated_rms_norm_fwd(Tensor y, Tensor z, Tensor weight, float eps, int groups) -> Tensor", fake=_fake_fwd)
_bwd = define(
    "gated_rms_norm_bwd(Tensor grad, Tensor y, Tensor z, Tensor weight, float eps, int groups)"
    " -> (Tensor by_y, Tensor by_z, Tensor by_weight)",
    fake=_fake_bwd,
)


def _dense_rows(*tensors: Tensor) -> list[Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _partial_sums(y: Tensor) -> tuple[int, Tensor]:
    """How many rows share a partial sum, and room for the sums of all rows."""
    rows = max(_ENTRIES_PER_SUM // max(y.shape[1], 1), 1)
    return rows, y.new_empty(-(-y.shape[0] // rows), y.shape[1])


@launcher("gated_rms_norm_fwd", device="cpu", backend="native")
def _(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    out = _fake_fwd(y, z, weight, eps, groups)
    native().gated_rms_norm_fwd(*_dense_rows(y, z, weight), eps, groups, out)
    return out


@launcher("gated_rms_norm_bwd", device="cpu", backend="native")
def _(grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    by_y, by_z, _ = _fake_bwd(grad, y, z, weight, eps, groups)
    rows, sums = _partial_sums(y)
    native().gated_rms_norm_bwd(*_dense_rows(grad, y, z, weight), eps, groups, rows, by_y, by_z, sums)
    return by_y, by_z, sums.sum(0)


def _too_wide(y: Tensor, groups: int) -> str | None:
    from stablekern.triton_kernels.gated_rms_norm import LARGEST_PART

    part = y.shape[1] // groups
    return None if part <= LARGEST_PART else f"{part} features in a part, more than {LARGEST_PART}"


@launcher("gated_rms_norm_fwd", device="cuda", backend="triton", supports=lambda y, *rest: _too_wide(y, rest[-1]))
@launcher("gated_rms_norm_fwd", device="cpu", backend="triton", supports=lambda y, *rest: _too_wide(y, rest[-1]))
def _(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    from stablekern.triton_kernels.gated_rms_norm import gated_rms_norm_fwd

    out = _fake_fwd(y, z, weight, eps, groups)
    gated_rms_norm_fwd(*_dense_rows(y, z, weight), eps, groups, out)
    return out


@launcher("gated_rms_norm_bwd", device="cuda", backend="triton", supports=lambda _, y, *rest: _too_wide(y, rest[-1]))
@launcher("gated_rms_norm_bwd", device="cpu", backend="triton", supports=lambda _, y, *rest: _too_wide(y, rest[-1]))
def _(grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    from stablekern.triton_kernels.gated_rms_norm import gated_rms_norm_bwd

    by_y, by_z, _ = _fake_bwd(grad, y, z, weight, eps, groups)
    rows, sums = _partial_sums(y)
    gated_rms_norm_bwd(*_dense_rows(grad, y, z, weight), eps, groups, rows, by_y, by_z, sums)
    return by_y, by_z, sums.sum(0)


def _normal(y: Tensor, gate: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor]:
    """r u and r, in parts, (rows, groups, width / groups) and (rows, groups, 1)."""
    gated = (y * gate).unflatten(-1, (groups, y.shape[1] // groups))
    inverse = (gated.square().mean(-1, keepdim=True) + eps).rsqrt()
    return gated * inverse, inverse


@launcher("gated_rms_norm_fwd", device="cuda", backend="torch")
@launcher("gated_rms_norm_fwd", device="cpu", backend="torch")
def _(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
    return _normal(y, torch.nn.functional.silu(z), eps, groups)[0].flatten(-2) * weight


@launcher("gated_rms_norm_bwd", device="cuda", backend="torch")
@launcher("gated_rms_norm_bwd", device="cpu", backend="torch")
def _(grad: Tensor, y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    share = torch.sigmoid(z)
    gate = z * share
    normal, inverse = _normal(y, gate, eps, groups)
    weighted = (grad * weight).view_as(normal)
    by_u = (inverse * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))).flatten(-2)
    return by_u * gate, by_u * y * (share + gate * (1 - share)), (grad * normal.flatten(-2)).sum(0)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, groups: int) -> Tensor:
        return _fwd(y, z, weight, eps, groups)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.eps, ctx.groups = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _check.first_order(_OP)
        return *_bwd(grad, *ctx.saved_tensors, ctx.eps, ctx.groups), None, None


def gated_rms_norm(
    y: Tensor,  # (..., d)
    z: Tensor,  # (..., d)
    weight: Tensor,  # (d)
    *,
    eps: float = NORM_EPS.value,
    groups: int = 1,
) -> Tensor:  # (..., d)
    r"""Gate, then normalise: $u = y \odot \mathrm{silu}(z)$, $out = s \odot u / \sqrt{\overline{u^2} + \epsilon}$.

    The mean is over the d / `groups` features of a part. The function of `nn.RMSNormGated`, and of mamba_ssm's gated
    norm with `norm_before_gate=False`.

    **Arguments:**

    - `y`, `z`: (..., d), float16, bfloat16, float32 or float64, which need not be the same; any strides, the last one 1
        without a copy. Half precision is computed in float32 and rounded once.
    - `weight`: $s$, (d).
    - `eps`: > 0, added to the mean square. `groups`: a divisor of d.

    **Returns:** a contiguous tensor of the shape and dtype of `y`. A row with a non-finite entry is NaN in that part,
    and reaches no other row, except through the gradient of `weight`.

    **Raises:** `ValueError` for sizes that disagree or an option out of range, `TypeError` for another dtype,
    `RuntimeError` when second derivatives are asked for.

    **Accuracy:** at most twice the error of the same formula in plain torch and the same dtype (`tests/test_ops.py`).
    Squares are not scaled: entries of u above 1e19 in float32 overflow.
    **Source:** Dao & Gu 2024, arXiv:2405.21060, sec. 7.
    """
    sizes = _check.shapes(_OP, y=(y, "... d"), z=(z, "... d"), weight=(weight, "d"))
    for name, tensor in (("y", y), ("z", z), ("weight", weight)):
        _check.dtypes(_OP, _check.REAL + _check.HALF, **{name: tensor})
        if tensor.device != y.device:
            raise ValueError(_check.message(_OP, f"`{name}` and `y` must be on one device", tensor.device, y.device))
    if y.shape != z.shape:
        raise ValueError(_check.message(_OP, "`y` and `z` must have one shape", tuple(y.shape), tuple(z.shape)))
    if sizes["d"] % _check.integer(_OP, "groups", groups, low=1) or not sizes["d"]:
        raise ValueError(_check.message(_OP, "`groups` must divide the features", groups, sizes["d"]))
    eps = _check.number(_OP, "eps", eps, low=0.0, strict=True)
    wide = torch.promote_types(torch.promote_types(y.dtype, z.dtype), torch.float32)
    rows = (x.to(wide).reshape(-1, sizes["d"]) for x in (y, z))
    return _GatedRMSNorm.apply(*rows, weight.to(wide), eps, groups).view(y.shape).to(y.dtype)
