r"""Laplacian positional encodings of graphs that change with time, with bounded gradients and no jumping signs.

The encoding of a graph is the first `k` eigenvectors of its normalised Laplacian $L$ (`normalized_laplacian`), as
columns: one row of `k` numbers per node. Eigenvectors are defined up to a sign, and up to a rotation where an
eigenvalue repeats; three rules choose among them, and none of them leaves the eigenspace.

**Null space.** A graph of $c$ components (isolated nodes not counted, they have $L_{ii} = 1$) has the eigenvalue 0 $c$
times. For $c > 1$ and weights $\ge 0$ its basis is the natural one: $D^{1/2} 1_C / \|D^{1/2} 1_C\|$ for each component
$C$, ordered by the lowest node, with the eigenvalue exactly 0. Where the next eigenvalue is within rounding of 0 too
(components that are linked by next to nothing), the two cannot be told apart, and eigh's basis stays.

**Sign.** In each other column the component of largest modulus is positive, as in `eigh`; or, with `align="temporal"`,

**Temporal alignment.** the sign is the one nearer to the step before. Columns whose eigenvalues agree within rounding
are turned together: with $P$ the aligned columns of the step before and $V_C$ the eigenvectors of the cluster, the
columns become $V_C R$ with $R$ the orthonormal polar factor of $V_C^\top P$ (the Procrustes problem), found by the
Newton-Schulz iteration $Y \leftarrow \tfrac32 Y - \tfrac12 Y Y^\top Y$, which keeps clusters apart exactly. Where the
two subspaces hardly overlap there is no nearest rotation, and the columns keep their own basis with the nearer signs.
Columns are matched by their place: two eigenvalues that cross exchange their columns.

**Adjoint.** Signs, rotations and the choice of the null basis are constants: what flows back is the adjoint of `eigh`
at the chosen basis, then that of the Laplacian.

**Operations.** The forward gives the rows $v_f, \ldots, v_{f+k-1}$ of the encoding, and the other eigenvectors for the
backward alone: a pair of eigenvectors passes a gradient if one of the two is in the encoding. The Laplacian is not
kept; it is made again from the adjacency. Up to n = 32 each direction is one native kernel on a CPU.

Sources: Dwivedi et al. 2020, arXiv:2003.00982, sec. 4 (the encoding); Higham 2008, Functions of Matrices, sec. 8.3
(Newton-Schulz); Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from stablekern import _check, _load, numerics
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.errors import message
from stablekern.ops import eigh
from stablekern.ops.normalized_laplacian import adjoint, flattened, laplacian_of

__all__ = ["laplacian_pe", "laplacian_pe_ex"]

_OP = "laplacian_pe"
_ALIGN = ("sign", "temporal", "none")
# Newton-Schulz: singular values grow by half per step at first, so those above 1/600 reach 1 within 20 steps, and the
# last four are for the quadratic end. A smaller overlap is none.
_POLAR_STEPS = 24


class LaplacianPe(NamedTuple):
    """Encodings (..., T, N, k), their eigenvalues (..., T, k), and the status of `eigh_ex` (..., T)."""

    pe: Tensor
    eigenvalues: Tensor
    info: Tensor


def reference(adjacency: Tensor, k: int, *, skip_trivial: bool = False) -> tuple[Tensor, Tensor]:
    """The definition for connected graphs without repeated eigenvalues, differentiable: vectors and values."""
    S = (adjacency + adjacency.mT) / 2
    degree = S.sum(-1)
    root = (degree[..., :, None] * degree[..., None, :]) ** 0.5
    w, V = eigh.reference(torch.eye(S.shape[-1], dtype=S.dtype, device=S.device) - S / root)
    first = int(skip_trivial)
    return V[..., first : first + k], w[..., first : first + k]


def _fake_fwd(adjacency: Tensor, first: int, k: int, canonical: bool, cluster_gap: float) -> tuple[Tensor, ...]:
    batch, n = adjacency.shape[:2]
    shapes = ((batch, n), (batch, k, n), (batch, n - k, n), (batch, n))
    flags = (adjacency.new_empty(batch, dtype=torch.int32) for _ in range(2))
    return *(empty(shape, adjacency) for shape in shapes), *flags


def _fake_bwd(adjacency: Tensor, *rest) -> Tensor:
    return empty(adjacency.shape, adjacency)


def _fake_align(
    eigenvalues: Tensor,
    eigenvector_rows: Tensor,
    components: Tensor,
    previous: Tensor | None,
    k: int,
    first: int,
    cluster_gap: float,
    orthonormal: float,
) -> Tensor:
    batch, steps, n = eigenvalues.shape
    return empty((batch, steps, k, n), eigenvalues)


_fwd = define(
    "laplacian_pe_fwd(Tensor adjacency, int first, int k, bool canonical, float cluster_gap) -> (Tensor eigenvalues,"
    " Tensor pe_rows, Tensor other_rows, Tensor inverse_root, Tensor components, Tensor info)",
    fake=_fake_fwd,
)
_bwd = define(
    "laplacian_pe_bwd(Tensor adjacency, Tensor eigenvalues, Tensor pe_rows, Tensor other_rows, Tensor inverse_root,"
    " Tensor? grad_eigenvalues, Tensor? grad_pe_rows, int first, int mode, float gap_floor) -> Tensor grad_adjacency",
    fake=_fake_bwd,
)
_align = define(
    "laplacian_pe_align(Tensor eigenvalues, Tensor eigenvector_rows, Tensor components, Tensor? previous, int k,"
    " int first, float cluster_gap, float orthonormal) -> Tensor rotation",
    fake=_fake_align,
)


@launcher("laplacian_pe_fwd", device="cpu", backend="native", supports=lambda A, *_: eigh.lanes_reason(A))
def _(adjacency: Tensor, first: int, k: int, canonical: bool, cluster_gap: float) -> tuple[Tensor, ...]:
    outputs = _fake_fwd(adjacency, first, k, canonical, cluster_gap)
    _load.native().laplacian_pe_fwd(adjacency.contiguous(), first, canonical, cluster_gap, *outputs)
    return outputs


@launcher("laplacian_pe_bwd", device="cpu", backend="native", supports=lambda A, *_: eigh.lanes_reason(A))
def _(adjacency, values, pe_rows, other_rows, inverse_root, grad_values, grad_pe, *rule) -> Tensor:
    result = _fake_bwd(adjacency)
    # The gradient of the encoding often comes as columns, (b, n, k) in memory, the layout of what the caller sees.
    columns = grad_pe is not None and grad_pe.mT.is_contiguous()
    grads = (x if x is None or x is grad_pe and columns else x.contiguous() for x in (grad_values, grad_pe))
    saved = (x.contiguous() for x in (adjacency, values, pe_rows, other_rows, inverse_root))
    _load.native().laplacian_pe_bwd(*saved, *grads, columns, *rule, numerics.EIGH_NOISE_KAPPA.of(), result)
    return result


@launcher("laplacian_pe_fwd", device="cuda", backend="torch")
@launcher("laplacian_pe_fwd", device="cpu", backend="torch")
def _(adjacency: Tensor, first: int, k: int, canonical: bool, cluster_gap: float) -> tuple[Tensor, ...]:
    laplacian, inverse_root = laplacian_of(adjacency)
    values, rows, info = eigh.forward_of(laplacian)
    components = torch.zeros_like(info)
    if canonical and adjacency.shape[-1] > 1:
        limit = cluster_gap * values.abs().amax(-1)
        split = values[:, 1] <= limit
        # Few graphs are: on a CPU only those are looked at. On a GPU counting them would stop the host.
        chosen = split.nonzero()[:, 0] if adjacency.device.type == "cpu" else slice(None)
        if not isinstance(chosen, Tensor) or chosen.numel():
            found = _null_space(*(x[chosen] for x in (adjacency, inverse_root, values, rows, limit)))
            values[chosen], rows[chosen], components[chosen] = found
    before, pe_rows, after = rows.split([first, k, rows.shape[1] - first - k], 1)
    return values, pe_rows.contiguous(), torch.cat([before, after], 1), inverse_root, components, info


def _null_space(
    adjacency: Tensor, inverse_root: Tensor, values: Tensor, rows: Tensor, limit: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and rows with the natural null space where there is one; its dimension (0: left as it was)."""
    n = adjacency.shape[-1]
    S = adjacency / 2 + adjacency.mT / 2
    node = torch.arange(n, device=S.device)
    linked = inverse_root > 0
    # Nodes within 1, 2, 4, ... links: all of the component after the squaring that passes n - 1.
    reach = ((S > 0) & linked[:, :, None] & linked[:, None, :] | (node[:, None] == node)).to(S.dtype)
    for _ in range((n - 1).bit_length()):
        reach = (reach @ reach > 0).to(S.dtype)
    lowest = reach.argmax(-1)
    is_lowest = (lowest == node) & linked
    count = is_lowest.sum(-1)
    place = (is_lowest.cumsum(-1) - 1).gather(-1, lowest)
    member = (place[:, None, :] == node[:, None]) & linked[:, None, :]  # (b, component, node)
    root = torch.where(member, 1 / inverse_root[:, None, :], 0.0)
    root = root / root.amax(-1, keepdim=True)  # its square neither over- nor underflows to nothing
    basis = root / root.square().sum(-1, keepdim=True).sqrt()
    above = values.gather(-1, count.clamp_max(n - 1)[:, None])[:, 0]
    natural = (S >= 0).flatten(1).all(1) & (count > 1) & ((above > limit) | (count == n))
    inside = (node < count[:, None]) & natural[:, None]
    values = torch.where(inside, 0.0, values)
    rows = torch.where(inside[..., None], basis, rows)
    return values, rows, torch.where(natural, count, 0).to(torch.int32)


@launcher("laplacian_pe_bwd", device="cuda", backend="torch")
@launcher("laplacian_pe_bwd", device="cpu", backend="torch")
def _(adjacency, values, pe_rows, other_rows, inverse_root, grad_values, grad_pe, first, mode, gap_floor) -> Tensor:
    def whole(part: Tensor, others: Tensor) -> Tensor:
        return torch.cat([others[:, :first], part, others[:, first:]], 1)

    rows = whole(pe_rows, other_rows)
    grad_rows = None if grad_pe is None else whole(grad_pe, torch.zeros_like(other_rows))
    grad = eigh.backward_of(values, rows, grad_values, grad_rows, mode, gap_floor)
    return adjoint(grad, laplacian_of(adjacency)[0], inverse_root)


@launcher("laplacian_pe_align", device="cuda", backend="torch")
@launcher("laplacian_pe_align", device="cpu", backend="torch")
@launcher("laplacian_pe_align", device="cpu", backend="native")
def _(values, rows, components, previous, k, first, cluster_gap, orthonormal) -> Tensor:
    batch, steps, n = values.shape
    if not rows.numel():
        return empty((batch, steps, k, n), rows)
    window = slice(first, first + k)
    fixed = torch.arange(n, device=values.device) < components[..., None]
    apart = ~(values.diff(dim=-1) <= cluster_gap * values.abs().amax(-1, keepdim=True)) | fixed[..., :-1]
    label = torch.cat([torch.zeros_like(apart[..., :1]), apart], -1).cumsum(-1)
    same = label[..., window, None] == label[..., None, :]  # (b, t, k, n): column and eigenvector of one cluster
    fixed, ok = fixed[..., window], torch.isfinite(values).all(-1)
    clustered = (same.sum(-1) > 1).any(-1)
    signs = _signs(rows[:, :, window], ok, fixed, previous)
    rotation = signs[..., None] * torch.eye(n, dtype=rows.dtype, device=rows.device)[window]
    chosen = clustered.any(1).nonzero()[:, 0] if values.device.type == "cpu" else slice(None)
    if not isinstance(chosen, Tensor) or chosen.numel():
        earlier = None if previous is None else previous[chosen]
        inputs = (x[chosen] for x in (rows, ok, fixed, same, clustered))
        rotation[chosen] = _rotations(*inputs, earlier, window, orthonormal)  # type: ignore[arg-type, call-arg]
    return rotation


def _signs(rows: Tensor, ok: Tensor, fixed: Tensor, previous: Tensor | None) -> Tensor:
    """Signs (b, t, k) that make each of the rows (b, t, k, n) continue the last good step; 1 where they are fixed."""
    steps = torch.arange(rows.shape[1], device=rows.device)[:, None]

    def last(condition: Tensor) -> Tensor:
        """The last step, up to each, where the condition holds; -1 for none."""
        return torch.where(condition, steps, -1).cummax(1).values

    good = last(ok[..., None])
    before = torch.cat([torch.full_like(good[:, :1], -1), good[:, :-1]], 1).expand_as(fixed)
    earlier = rows.gather(1, before.clamp_min(0)[..., None].expand_as(rows))
    start = rows if previous is None else previous.mT[:, None]
    earlier = torch.where((before < 0)[..., None], start, earlier)
    # A comparison with NaN is false: what has nothing good before it keeps its sign.
    turned = torch.where((rows * earlier).sum(-1) < 0, -1.0, 1.0).to(rows.dtype).cumprod(1)
    # The sign of a fixed row is 1: those after it count from there.
    anchor = last(fixed & ok[..., None])
    return turned * torch.where(anchor < 0, 1.0, turned.gather(1, anchor.clamp_min(0)))


def _rotations(
    rows: Tensor,
    ok: Tensor,
    fixed: Tensor,
    same: Tensor,
    clustered: Tensor,
    previous: Tensor | None,
    window: slice,
    orthonormal: float,
) -> Tensor:
    """Rotations (b, t, k, n), step by step, for sequences with repeated eigenvalues."""
    on_cpu = rows.device.type == "cpu"
    own = torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)[window]
    together = same[..., window]
    target = rows[:, 0, window] if previous is None else previous.mT
    known = torch.isfinite(target).flatten(1).all(1) & (previous is not None)
    result = []
    for t, turn in enumerate(clustered.any(0).tolist() if on_cpu else [True] * rows.shape[1]):
        current = rows[:, t]
        target = torch.where(known[:, None, None], target, current[:, window])
        dots = (target * current[:, window]).sum(-1, keepdim=True)
        rotation = torch.where((dots < 0) & ~fixed[:, t, :, None], -own, own)
        if turn:
            several = (same[:, t].sum(-1, keepdim=True) > 1) & known[:, None, None]
            overlap = torch.where(several, (target @ current.mT) * same[:, t], rotation)
            polar, close = _polar(overlap, orthonormal, on_cpu)
            good = ~(together[:, t] & ~close[:, None, :]).any(-1, keepdim=True)
            rotation = torch.where(several & good, polar, rotation)
        result.append(rotation)
        target = torch.where(ok[:, t, None, None], rotation @ current, target)
        known = known | ok[:, t]
    return torch.stack(result, 1)


def _polar(Y: Tensor, orthonormal: float, on_cpu: bool) -> tuple[Tensor, Tensor]:
    """The orthonormal polar factor of matrices (b, k, n) of norm <= 1, and which of its rows are orthonormal (b, k)."""
    eye = torch.eye(Y.shape[-2], dtype=Y.dtype, device=Y.device)
    for step in range(_POLAR_STEPS + 1):
        gram = Y @ Y.mT
        close = (gram - eye).abs().amax(-1) <= orthonormal
        if step == _POLAR_STEPS or (on_cpu and bool(close.all())):
            break
        Y = 1.5 * Y - 0.5 * gram @ Y
    return Y, close


class _LaplacianPe(torch.autograd.Function):
    @staticmethod
    def forward(adjacency: Tensor, first: int, k: int, canonical: bool, cluster_gap: float, mode: int, floor: float):
        return _fwd(adjacency, first, k, canonical, cluster_gap)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        adjacency, first, _, _, _, *gap_rule = inputs
        ctx.rule = first, *gap_rule
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(adjacency, *output[:4])

    @staticmethod
    def backward(ctx, grad_values, grad_rows, *_):
        _check.first_order(_OP)
        if grad_values is None and grad_rows is None:
            return (None,) * 7
        return _bwd(*ctx.saved_tensors, grad_values, grad_rows, *ctx.rule), *(None,) * 6


def laplacian_pe_ex(
    adjacency: Tensor,  # (..., T, N, N)
    k: int,
    *,
    skip_trivial: bool = False,
    align: str = "sign",
    interval: int = 1,
    previous: Tensor | None = None,  # (..., N, k)
    grad: str = "lorentz",
) -> LaplacianPe:  # (..., T, N, k), (..., T, k), (..., T)
    """`laplacian_pe` with the eigenvalues of its columns and a status: `(pe, eigenvalues, info)`.

    `info` (int32, per step) is 0 for success; bit 0: no convergence, bit 1: a weight of the graph is not finite. The
    encoding and eigenvalues of such a step are NaN; no other step is touched. All else is as in `laplacian_pe`.
    """
    _check.required(_OP, adjacency=adjacency)
    dims = _check.shapes(_OP, adjacency=(adjacency, "... t n n"))
    interval = min(_check.integer(_OP, "interval", interval, low=1), max(dims["t"], 1))
    if not isinstance(skip_trivial, bool):
        raise TypeError(message(_OP, "`skip_trivial` must be a bool", type(skip_trivial).__name__))
    first = int(skip_trivial)
    _check.integer(_OP, "k", k, low=1, high=max(dims["n"] - first, 0))
    _check.choice(_OP, "align", align, _ALIGN)
    batch, steps = adjacency.shape[:-3], (dims["t"] + interval - 1) // interval
    flat = flattened(_OP, adjacency[..., ::interval, :, :], "... n n")
    rule = eigh.gap_rule(_OP, grad, None, flat.dtype)
    if previous is not None:
        _check_previous(previous, adjacency, k, align)
    cluster_gap = numerics.EIGH_MASK_GAP_ULPS.of(flat.dtype)
    # A rotation in time may reach for eigenvectors outside the encoding.
    window = (0, dims["n"]) if align == "temporal" else (first, k)
    values, rows, _, _, components, info = apply(_LaplacianPe, flat, *window, align != "none", cluster_gap, *rule)
    if align == "temporal":
        items, n = math.prod(batch), dims["n"]
        earlier = None if previous is None else previous.detach().to(flat.dtype).reshape(items, n, k)
        turns = _align(
            values.detach().view(items, steps, n),
            rows.detach().view(items, steps, n, n),
            components.view(items, steps),
            earlier,
            k,
            first,
            cluster_gap,
            numerics.LAPLACIAN_ROTATION_ULPS.of(flat.dtype),
        )
        with torch.autocast(flat.device.type, enabled=False):
            pe = (turns.view(-1, k, n) @ rows).mT
    else:
        pe = rows.mT
    found = tuple(x.reshape(*batch, steps, *x.shape[1:]) for x in (pe, values[:, first : first + k], info))
    if interval > 1:
        held = torch.arange(dims["t"], device=flat.device) // interval
        found = tuple(x.index_select(len(batch), held) for x in found)
    return LaplacianPe(*found)


def _check_previous(previous: Tensor, adjacency: Tensor, k: int, align: str) -> None:
    _check.dtypes(_OP, _check.REAL + _check.HALF, previous=previous)
    expected = (*adjacency.shape[:-3], adjacency.shape[-1], k)
    if tuple(previous.shape) != expected:
        raise ValueError(message(_OP, f"`previous` must have the shape {expected}", tuple(previous.shape)))
    if previous.device != adjacency.device:
        devices = previous.device, adjacency.device
        raise ValueError(message(_OP, "`previous` and `adjacency` must be on one device", *devices))
    if align != "temporal":
        raise ValueError(message(_OP, "`previous` is for align='temporal'", repr(align)))


def laplacian_pe(
    adjacency: Tensor,  # (..., T, N, N)
    k: int,
    *,
    skip_trivial: bool = False,
    align: str = "sign",
    interval: int = 1,
    previous: Tensor | None = None,  # (..., N, k)
    grad: str = "lorentz",
) -> Tensor:  # (..., T, N, k)
    r"""The first `k` eigenvectors of the normalised Laplacian of each graph of a sequence, as encodings of its nodes.

    Columns are eigenvectors of $I - D^{-1/2} A D^{-1/2}$ (`normalized_laplacian`) by ascending eigenvalue. The encoding
    is differentiable: with `grad="lorentz"` the gradient is bounded for all graphs, those with repeated eigenvalues
    too.

    **Arguments:**

    - `adjacency`: T graphs in a row on N nodes, weights >= 0 (others: see `normalized_laplacian`); float32 or float64;
        float16 and bfloat16 are computed, and returned, in float32.
    - `k`: number of columns, at most N, or N - 1 with `skip_trivial`. A `k` that cuts through a repeated eigenvalue
        takes some basis of a part of its eigenspace: stable, but not unique.
    - `skip_trivial`: leave out the first eigenvector, $D^{1/2} 1$ for a connected graph, and take the next `k`.
    - `align`: `"sign"`: the component of largest modulus of a column is positive. `"temporal"`: each step is turned
        towards the one before, by a sign, or a rotation inside a repeated eigenvalue; the first step as `"sign"`. Steps
        that are NaN are passed over. Both give a graph of several components the natural basis of its null space, one
        positive vector per component, by lowest node. `"none"`: as `eigh` gives them.
    - `interval`: decompose every `interval`-th graph only, ceil(T / interval) in all, and hold the result in between
        (the other graphs are not read, and have no gradient).
    - `previous`: with `"temporal"`, the last encoding of the window before: the first step is turned towards it, so
        that a sequence cut into windows gives what it gives in one piece. Constant.
    - `grad`: as in `eigh`. Alignment is a constant in the backward.

    **Returns:** a tensor that may be a view (not contiguous). A graph with a non-finite weight, or without convergence,
    is NaN in its own steps alone; `laplacian_pe_ex` says why.

    **Raises:** `ValueError` for shapes or options out of range, `TypeError` for dtypes, `RuntimeError` when second
    derivatives are asked for.

    **Accuracy:** $\|L v - \lambda v\|$ of a few n ulp; in an aligned cluster, at most its width (16 ulp per eigenvalue)
    more.
    **Sources:** see the module's text.
    """
    return laplacian_pe_ex(
        adjacency, k, skip_trivial=skip_trivial, align=align, interval=interval, previous=previous, grad=grad
    ).pe
