r"""Eigendecomposition of many small Hermitian matrices, with a backward that is finite at repeated eigenvalues.

$A = V \Lambda V^H$ with ascending real $w = \mathrm{diag}(\Lambda)$. With the gradients $g_w$, $g_V$ and $M = V^H
g_V$ the gradient of $A$ is

$$\bar A = V S V^H, \qquad S_{ii} = g_{w,i}, \qquad
S_{ij} = \tfrac12\,(M_{ij} - \overline{M_{ji}})\,F(w_j - w_i), \qquad F(g) = 1/g.$$

At $w_i = w_j$ the eigenvectors of the pair are defined up to a rotation. A loss that does not see that rotation has
$M_{ij} = \overline{M_{ji}}$: the entry is 0/0 and its right value is 0. In floating point the numerator is rounding
and the gap is 0 or rounding too, so the plain formula gives NaN, infinity or noise. What stands in for it is `grad`:

- `"auto"`: the numerator is 0 if $|M_{ij} - \overline{M_{ji}}| \le \kappa\,\epsilon \max_m \|M e_m\|$, that is, if it
  is the rounding of a loss that treats the pair as one subspace, however large or small the gap; then the Lorentzian
  $F(g) = g / (g^2 + \delta^2)$ with a width of a few ulp. Exact for functions of eigenprojectors whose cut lies in a
  gap, and unbiased for separated eigenvalues.
- `"lorentz"`: the Lorentzian alone, by default a thousandth wide: $|F| \le 1/(2\delta)$. A bounded surrogate for
  heads that see raw eigenvectors, which have no derivative at a repeated eigenvalue; biased by $(\delta/g)^2$
  elsewhere.
- `"mask"`: $F = 1/g$, 0 for $|g| \le \delta$.
- `"raw"`: $F = 1/g$, as `torch.linalg.eigh`: not finite at repeated eigenvalues.

$\delta$ is `gap_floor` times $\max|w|$. None of them helps a loss that mixes eigenvalues and eigenvectors of a
repeated eigenvalue in a way that is smooth in $A$, such as $\mathrm{tr}(G h(A))$ through $V h(\Lambda) V^H$: its
factors lose the divided difference $h'(w)$. `spectral_function` has it.

**Gauge.** In each eigenvector the component of largest modulus (the first of equal ones) is real and positive. For
complex matrices the gradient belongs to that very choice, so it is right for a loss that depends on the phase too:
fixing the phase of the pivot $p$ of column $j$ adds $-i\,\mathrm{Im}(M_{jj}) / V_{pj}$ to $g_{V,pj}$, after which
$M_{jj}$ is real.

Sources: Giles 2008, "Collected matrix derivative results", sec. 3.1 (the adjoint); Liao et al. 2019,
arXiv:1903.09650, sec. III (the Lorentzian); Kasim 2020, arXiv:2011.04366 (the condition at degeneracies). The
noise-floor test is this package's.
"""

from __future__ import annotations

import inspect
import math
from ctypes import c_double, c_int, c_longlong
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stablekern import _check, _load, _nvrtc, numerics
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.errors import message

__all__ = ["eigh", "eigh_ex", "eigvalsh"]

_NOT_CONVERGED, _NON_FINITE, _WRONG = 1, 2, 4  # bits of `info`
_NATIVE_SIZE = 32  # the kernels keep whole matrices in SIMD lanes, or a column of one in each lane of a warp
_MODES = ("auto", "lorentz", "mask", "raw")  # their places are the codes of the op's `mode`
_GAP_FLOORS = {
    "auto": numerics.EIGH_AUTO_GAP_ULPS,
    "lorentz": numerics.EIGH_LORENTZ_GAP_FLOOR,
    "mask": numerics.EIGH_MASK_GAP_ULPS,
}


class Eigh(NamedTuple):
    """Ascending eigenvalues (..., n) and eigenvectors (..., n, n), one per column."""

    eigenvalues: Tensor
    eigenvectors: Tensor


class EighEx(NamedTuple):
    """`Eigh` with a status per matrix: bit 0 not converged, bit 1 a non-finite entry, bit 2 a wrong result."""

    eigenvalues: Tensor
    eigenvectors: Tensor
    info: Tensor


def reference(A: Tensor, UPLO: str = "L") -> tuple[Tensor, Tensor]:
    """The definition: LAPACK's decomposition in the gauge above, differentiable where no eigenvalue is repeated."""
    w, V = torch.linalg.eigh(A, UPLO=UPLO)
    if A.shape[-1] == 0:
        return w, V
    pivot = V.gather(-2, V.abs().argmax(-2, keepdim=True))
    return w, V * (pivot / pivot.abs()).conj()


def _fake_values(A: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
    values = empty(A.shape[:2], A, A.dtype.to_real())
    return values, torch.empty(A.shape[:1], dtype=torch.int32, device=A.device)


def _fake_fwd(A: Tensor, upper: bool) -> tuple[Tensor, Tensor, Tensor]:
    values, info = _fake_values(A, upper)
    return values, empty(A.shape, A), info


def _fake_bwd(
    eigenvalues: Tensor,
    eigenvector_rows: Tensor,
    grad_eigenvalues: Tensor | None,
    grad_eigenvector_rows: Tensor | None,
    mode: int,
    gap_floor: float,
    noise_kappa: float,
) -> Tensor:
    return empty(eigenvector_rows.shape, eigenvector_rows)


_fwd = define(
    "eigh_fwd(Tensor A, bool upper) -> (Tensor eigenvalues, Tensor eigenvector_rows, Tensor info)", fake=_fake_fwd
)
_values_fwd = define("eigvalsh_fwd(Tensor A, bool upper) -> (Tensor eigenvalues, Tensor info)", fake=_fake_values)
_bwd = define(
    "eigh_bwd(Tensor eigenvalues, Tensor eigenvector_rows, Tensor? grad_eigenvalues, Tensor? grad_eigenvector_rows,"
    " int mode, float gap_floor, float noise_kappa) -> Tensor grad_A",
    fake=_fake_bwd,
)


def lanes_reason(matrices: Tensor) -> str | None:
    """Why the kernels of small matrices, native and CUDA, cannot take these (b, n, n), or None."""
    return None if matrices.shape[-1] <= _NATIVE_SIZE else f"n > {_NATIVE_SIZE}"


def native_reason(matrices: Tensor) -> str | None:
    """Why no native kernel can decompose these (b, n, n) matrices, or None."""
    if (reason := lanes_reason(matrices)) is None or _load.native_reason("eigh") is not None:
        return None  # whether the library is there at all is the registry's question
    return None if _load.native_module().lapack else f"{reason}, and this torch exports no LAPACK"


@launcher("eigh_fwd", device="cpu", backend="native", supports=lambda A, upper: native_reason(A))
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake_fwd(A, upper)
    _load.native().eigh_fwd(A.contiguous(), upper, *outputs)
    return outputs


def _values_reason(A: Tensor) -> str | None:
    """Larger ones in double precision are torch's: QL in the same precision has several times LAPACK's error."""
    double = A.dtype in (torch.float64, torch.complex128)
    return lanes_reason(A) and f"n > {_NATIVE_SIZE} in double precision" if double else None


@launcher("eigvalsh_fwd", device="cpu", backend="native", supports=lambda A, upper: _values_reason(A))
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
    outputs = _fake_values(A, upper)
    _load.native().eigvalsh_fwd(A.contiguous(), upper, *outputs)
    return outputs


@launcher("eigh_bwd", device="cpu", backend="native", supports=lambda values, rows, *_: native_reason(rows))
def _(eigenvalues, eigenvector_rows, grad_eigenvalues, grad_eigenvector_rows, mode, *rule) -> Tensor:
    grads = [None if grad is None else grad.contiguous() for grad in (grad_eigenvalues, grad_eigenvector_rows)]
    result = _fake_bwd(eigenvalues, eigenvector_rows, *grads, mode, *rule)  # type: ignore[arg-type, call-arg]
    _load.native().eigh_bwd(eigenvalues, eigenvector_rows, *grads, mode, *rule, result)
    settle_failed(result, eigenvalues, *grads)
    return result


def cuda_macros(dtype: torch.dtype, n: int) -> dict[str, Any]:
    """How `csrc/cuda/eigh.cu` is compiled for (b, n, n) matrices: its macros."""
    lanes = max(4, 1 << (n - 1).bit_length())
    row = n * dtype.itemsize
    # As many warps as share at most 40 KiB of shared memory in a block, and four at most.
    warps = 4 if row <= 128 else 2 if row <= 256 else 1
    real = "double" if dtype.to_real() == torch.float64 else "float"
    return {"SK_REAL": real, "SK_COMPLEX": int(dtype.is_complex), "SK_N": n, "SK_LANES": lanes, "SK_WARPS": warps}


def _launch(function: str, matrices: Tensor, arguments: list) -> None:
    """Launch a kernel of `csrc/cuda/eigh.cu` for as many items as `matrices` (b, n, n) has."""
    batch, n = matrices.shape[:2]
    if matrices.numel() == 0:
        return
    macros = cuda_macros(matrices.dtype, n)
    warps = macros["SK_WARPS"]
    items = 32 // macros["SK_LANES"] * warps
    _nvrtc.launch(
        "eigh.cu", function, macros, device=matrices.device, blocks=-(-batch // items), threads=32 * warps,
        arguments=arguments,
    )  # fmt: skip


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    """As kernels read them: contiguous, and no conjugate or negative view."""
    return [None if x is None else x.resolve_conj().resolve_neg().contiguous() for x in tensors]


@launcher("eigh_fwd", device="cuda", backend="cuda", supports=lambda A, upper: lanes_reason(A))
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _fake_fwd(A, upper)
    _launch("eigh_fwd", A, [*_dense(A), c_longlong(len(A)), c_int(upper), *outputs])
    return outputs


@launcher("eigvalsh_fwd", device="cuda", backend="cuda", supports=lambda A, upper: lanes_reason(A))
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
    values, info = _fake_values(A, upper)
    _launch("eigvalsh_fwd", A, [*_dense(A), c_longlong(len(A)), c_int(upper), values, info])
    return values, info


@launcher("eigh_bwd", device="cuda", backend="cuda", supports=lambda values, rows, *_: lanes_reason(rows))
def _(eigenvalues, eigenvector_rows, grad_eigenvalues, grad_eigenvector_rows, mode, *rule) -> Tensor:
    inputs = _dense(eigenvalues, eigenvector_rows, grad_eigenvalues, grad_eigenvector_rows)
    result = empty(inputs[1].shape, inputs[1])  # type: ignore[arg-type, union-attr]
    numbers = [c_longlong(len(result)), c_int(mode), *(c_double(number) for number in rule)]
    _launch("eigh_bwd", result, [*inputs, *numbers, result])
    return result


def settle_failed(result: Tensor, output: Tensor, *grads: Tensor | None) -> None:
    """Write the gradient of the items that failed, those whose `output` (b, n) is NaN, into `result` (b, n, n).

    It is NaN; but 0 if the item's own incoming gradients are all 0, as they are when the loss leaves the item out.
    """
    failed = output[:, :1].isnan()
    if failed.device.type == "cpu" and not failed.any():
        return
    used = torch.zeros_like(failed)
    for grad in grads:
        if grad is not None:
            used = used | (grad != 0).flatten(1).any(1, keepdim=True)
    result.masked_fill_(failed[..., None], 0.0).masked_fill_((failed & used)[..., None], torch.nan)


def _readied(A: Tensor) -> tuple[Tensor, Tensor]:
    """`A` with identity matrices for the items that have a non-finite entry, and which ones those are (b)."""
    bad = ~torch.isfinite(A).flatten(1).all(1)
    return torch.where(bad[:, None, None], torch.eye(A.shape[-1], dtype=A.dtype, device=A.device), A), bad


def _item_by_item(function, A: Tensor, uplo: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """LAPACK on each matrix by itself: identity results, and True, for those it does not converge on."""
    results, failed = [], []
    for item in A.cpu():
        try:
            results.append(function(item, UPLO=uplo))
            failed.append(False)
        except torch.linalg.LinAlgError:
            results.append(function(torch.eye(item.shape[-1], dtype=item.dtype), UPLO=uplo))
            failed.append(True)
    parts = zip(*((r,) if isinstance(r, Tensor) else r for r in results), strict=True)
    return tuple(torch.stack(part).to(A.device) for part in parts), torch.tensor(failed, device=A.device)


def _lapack(function, A: Tensor, upper: bool) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """The results of a torch.linalg function, which items failed, and `info`."""
    function = inspect.unwrap(function)  # while torch.linalg is swapped, its functions lead back here
    ready, bad = _readied(A)
    uplo = "U" if upper else "L"
    try:
        found = function(ready, UPLO=uplo)
        results, lost = ((found,) if isinstance(found, Tensor) else tuple(found)), torch.zeros_like(bad)
    except torch.linalg.LinAlgError:
        results, lost = _item_by_item(function, ready, uplo)
    info = lost.to(torch.int32) * _NOT_CONVERGED + bad.to(torch.int32) * _NON_FINITE
    return results, bad | lost, info


def solver_part(n: int) -> int:
    """How many (n, n) matrices cuSOLVER is given at once.

    Its batched solvers count entries, and those of a workspace of several times the matrices, in 32 bits, and refuse
    some 32 thousand matrices or more.
    """
    return max(1, min(1 << 14, (1 << 28) // (n * n)))


def _probe(n: int, like: Tensor) -> Tensor:
    """A vector (n) with components between 1/2 and 3/2 in no order: no structured error is orthogonal to it."""
    golden = (math.sqrt(5) - 1) / 2
    return (torch.arange(1, n + 1, dtype=torch.float64, device=like.device) * golden).frac().add(0.5).to(like.dtype)


def wrong_results(A: Tensor, upper: bool, values: Tensor, vectors: Tensor | None) -> Tensor:
    r"""Which items (b) are no decomposition of `A` (b, n, n): true where rounding does not explain a deviation.

    With a fixed vector $x$: $V V^H x = x$ and $A V x = V \Lambda x$; without vectors, $\sum w = \mathrm{tr} A$ and
    $\sum w^2 = \|A\|_F^2$. That costs a few passes over the matrices instead of two products, and stays in the full
    precision of the dtype, which products of matrices need not do on a GPU (TF32).
    """
    n = A.shape[-1]
    largest = values.abs().amax(-1, keepdim=True)
    unit = torch.where(largest < torch.finfo(values.dtype).tiny, 1.0, largest)[..., None]
    triangle = (A.triu() if upper else A.tril()) / unit
    strict = triangle.triu(1) if upper else triangle.tril(-1)
    H, w = triangle + strict.mH, values / unit[..., 0]
    bound = numerics.EIGH_CHECK_ULPS.of(values.dtype) * n
    if vectors is None:
        trace = H.diagonal(dim1=-2, dim2=-1).real.sum(-1) - w.sum(-1)
        square = H.abs().square().sum((-2, -1)) - w.square().sum(-1)
        return ~((trace.abs() <= bound * n) & (square.abs() <= bound * n))
    x = _probe(n, values)
    times = lambda matrices, columns: (matrices * columns[:, None, :]).sum(-1)  # noqa: E731
    back = times(vectors, times(vectors.mH, x.expand_as(values))) - x
    residual = times(H, times(vectors, x.expand_as(values))) - times(vectors, w * x)
    limit = bound * x.norm()
    return ~((back.abs().amax(-1) <= limit) & (residual.abs().amax(-1) <= limit))


def _checked(function, A: Tensor, upper: bool) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """`_lapack` for a GPU: in parts, each item checked. Some cuSOLVER releases return wrong vectors and say nothing."""
    found = []
    for part in A.split(solver_part(A.shape[-1])):
        results, failed, info = _lapack(function, part, upper)
        wrong = ~failed & wrong_results(part, upper, results[0], results[1] if len(results) > 1 else None)
        found.append((*results, failed | wrong, info + wrong.to(torch.int32) * _WRONG))
    *values, failed, info = (torch.cat(pieces) for pieces in zip(*found, strict=True))
    return tuple(values), failed, info


def _poisoned_values(results: tuple[Tensor, ...], failed: Tensor, info: Tensor) -> tuple[Tensor, Tensor]:
    return results[0].masked_fill(failed[:, None], torch.nan), info


def _gauged(results: tuple[Tensor, ...], failed: Tensor, info: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvectors as rows in the gauge of the op, and NaN for failed items."""
    values, vectors = results
    rows = vectors.mT.contiguous()
    at = rows.abs().argmax(-1, keepdim=True)
    pivot = rows.gather(-1, at)
    if rows.is_complex():
        size = pivot.abs()
        rows = (rows * (pivot.conj() / size)).scatter_(-1, at, size.to(rows.dtype))
    else:
        rows = torch.where(pivot < 0, -rows, rows)
    nan = torch.nan
    return values.masked_fill(failed[:, None], nan), rows.masked_fill(failed[:, None, None], nan), info


@launcher("eigvalsh_fwd", device="cpu", backend="torch")
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
    return _poisoned_values(*_lapack(torch.linalg.eigvalsh, A, upper))


@launcher("eigvalsh_fwd", device="cuda", backend="torch")
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor]:
    return _poisoned_values(*_checked(torch.linalg.eigvalsh, A, upper))


@launcher("eigh_fwd", device="cpu", backend="torch")
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _gauged(*_lapack(torch.linalg.eigh, A, upper))


@launcher("eigh_fwd", device="cuda", backend="torch")
def _(A: Tensor, upper: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _gauged(*_checked(torch.linalg.eigh, A, upper))


def _phase_fixed(rows: Tensor, grad_rows: Tensor) -> Tensor:
    """The gradient of the eigenvectors with the effect of the gauge: see the module's text."""
    turn = (rows.conj() * grad_rows).sum(-1, keepdim=True).imag
    # The largest component that is real: by the moduli alone rounding could take another one for the pivot.
    at = torch.where(rows.imag == 0, rows.real, 0.0).argmax(-1, keepdim=True)
    return grad_rows.scatter_add(-1, at, torch.complex(torch.zeros_like(turn), -turn / rows.gather(-1, at).real))


@launcher("eigh_bwd", device="cuda", backend="torch")
@launcher("eigh_bwd", device="cpu", backend="torch")
def _(w, rows, grad_w, grad_rows, mode, gap_floor, noise_kappa) -> Tensor:
    if grad_rows is None:
        grad = (rows * grad_w[..., None]).mT @ rows.conj()
    else:
        M = rows.conj() @ (_phase_fixed(rows, grad_rows) if rows.is_complex() else grad_rows).mT
        S = _weighed(w, M, _MODES[mode], gap_floor, noise_kappa * torch.finfo(w.dtype).eps)
        S.diagonal(dim1=-2, dim2=-1).copy_(torch.zeros_like(w) if grad_w is None else grad_w)
        grad = rows.mT @ S @ rows.conj()
    grad = (grad / 2 + grad.mH / 2).contiguous()
    settle_failed(grad, w, grad_w, grad_rows)
    return grad


def gap_unit(values: Tensor) -> tuple[Tensor, Tensor]:
    """A power of two near max|w| (b, 1), and max|w| over it: in such units no square of a gap over- or underflows.

    Dividing by max|w| itself would round: by an ulp of max|w|, which close eigenvalues have nothing to spare for. A
    matrix of subnormals counts as 0.
    """
    largest = values.abs().amax(-1, keepdim=True)
    usable = torch.where(torch.isfinite(largest) & (largest >= torch.finfo(values.dtype).tiny), largest, 1.0)
    ratio = 2 * torch.frexp(usable).mantissa  # in [1, 2)
    return usable / ratio, ratio


def _weighed(w: Tensor, M: Tensor, mode: str, gap_floor: float, noise: float) -> Tensor:
    """S off the diagonal."""
    unit, largest = gap_unit(w)
    gap = (w / unit)[:, None, :] - (w / unit)[:, :, None]
    width = gap_floor * largest[..., None]
    numerator = M - M.mH
    if mode == "auto":
        numerator = torch.where(numerator.abs() <= noise * _longest_column(M), 0.0, numerator)
    if mode in ("auto", "lorentz"):
        # The smallest number keeps 0/0 away: an implicit floor of its root, far below any gap that rounding leaves.
        square = (gap.square() + width.square()).clamp_min(torch.finfo(w.dtype).tiny)
        weighed = numerator * (gap / square)
    elif mode == "mask":
        weighed = torch.where(gap.abs() <= width, 0.0, numerator / gap)
    else:
        weighed = numerator / gap
    return weighed / (2 * unit[..., None])


def _longest_column(M: Tensor) -> Tensor:
    """max_j of the length of column j, (b, 1, 1); the squares are of numbers scaled to a largest one of 1."""
    size = M.abs()
    largest = size.amax((-2, -1), keepdim=True)
    scaled = size / torch.where(largest == 0, 1.0, largest)
    return largest * scaled.square().sum(-2, keepdim=True).amax(-1, keepdim=True).sqrt()


class _Eigh(torch.autograd.Function):
    @staticmethod
    def forward(A: Tensor, upper: bool, mode: int, gap_floor: float) -> tuple[Tensor, Tensor, Tensor]:
        return _fwd(A, upper)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, _, ctx.mode, ctx.gap_floor = inputs
        values, rows, info = output
        ctx.mark_non_differentiable(info)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(values, rows)

    @staticmethod
    def backward(ctx, grad_values, grad_rows, _):
        _check.first_order("eigh")
        if grad_values is None and grad_rows is None:
            return None, None, None, None
        return backward_of(*ctx.saved_tensors, grad_values, grad_rows, ctx.mode, ctx.gap_floor), None, None, None  # type: ignore[call-arg]


def forward_of(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The op `eigh_fwd` on the lower triangles of (b, n, n): eigenvalues, rows of eigenvectors, info."""
    return _fwd(matrices, False)


def backward_of(
    values: Tensor, rows: Tensor, grad_values: Tensor | None, grad_rows: Tensor | None, mode: int, gap_floor: float
) -> Tensor:
    """The op `eigh_bwd` with the package's noise constant."""
    return _bwd(values, rows, grad_values, grad_rows, mode, gap_floor, numerics.EIGH_NOISE_KAPPA.of())


def gap_rule(op: str, grad: str, gap_floor: float | None, dtype: torch.dtype) -> tuple[int, float]:
    """(`mode`, `gap_floor`) of the backward op, from the public arguments."""
    _check.choice(op, "grad", grad, _MODES)
    if gap_floor is None:
        return _MODES.index(grad), _GAP_FLOORS[grad].of(dtype) if grad in _GAP_FLOORS else 0.0
    if grad == "raw":
        raise ValueError(message(op, "`gap_floor` has no meaning for grad='raw'", gap_floor))
    return _MODES.index(grad), _check.number(op, "gap_floor", gap_floor, low=0.0, strict=grad != "mask")


def _ready(op: str, A: Tensor, UPLO: str) -> tuple[Tensor, bool]:
    """`A` checked and as (b, n, n), half precision as float32; whether the upper triangle is read."""
    _check.dtypes(op, _check.REAL + _check.COMPLEX + _check.HALF, A=A)
    _check.shapes(op, A=(A, "... n n"))
    _check.choice(op, "UPLO", UPLO, ("L", "U"))
    A = A.to(torch.float32) if A.dtype in _check.HALF else A
    return A.reshape(math.prod(A.shape[:-2]), *A.shape[-2:]), UPLO == "U"


def eigh_ex(
    A: Tensor,  # (..., n, n)
    UPLO: str = "L",
    *,
    grad: str = "auto",
    gap_floor: float | None = None,
) -> EighEx:  # (..., n), (..., n, n), (...)
    """`eigh` with a status: `(eigenvalues, eigenvectors, info)`.

    `info` (int32, one per matrix) is 0 for success; bit 0: no convergence, bit 1: an entry of the matrix, in either
    triangle, is not finite, bit 2: cuSOLVER returned something else than a decomposition of the matrix. The results of
    a matrix whose `info` is not 0 are NaN; no other item is touched. All else is as in `eigh`.
    """
    flat, upper = _ready("eigh", A, UPLO)
    mode, floor = gap_rule("eigh", grad, gap_floor, flat.dtype)
    if flat.shape[-1] == 0:
        values, rows, info = flat.real.sum(-1), flat, torch.zeros(flat.shape[:1], dtype=torch.int32, device=A.device)
    else:
        values, rows, info = apply(_Eigh, flat, upper, mode, floor)
    return EighEx(values.reshape(A.shape[:-1]), rows.reshape(A.shape).mT, info.reshape(A.shape[:-2]))


def eigh(
    A: Tensor,  # (..., n, n)
    UPLO: str = "L",
    *,
    grad: str = "auto",
    gap_floor: float | None = None,
) -> Eigh:  # (..., n), (..., n, n)
    r"""Eigenvalues and eigenvectors of Hermitian matrices, as `torch.linalg.eigh`, with finite gradients.

    $A = V \mathrm{diag}(w) V^H$, $w$ ascending. Differs from torch in three things: the gradient at repeated
    eigenvalues (`grad`); the gauge, which is fixed (in each eigenvector the component of largest modulus, the first
    of equal ones, is real and positive; a convenience, not an invariance: it jumps where two components tie); and a
    matrix that cannot be decomposed, which is NaN by itself (`eigh_ex` says why) and never an exception.

    **Arguments:**

    - `A`: float32, float64, complex64 or complex128; any strides and batch dimensions. float16 and bfloat16 are
        computed, and returned, in float32. Not checked to be Hermitian: one triangle is read.
    - `UPLO`: the triangle that is read, `"L"` or `"U"`. (A non-finite entry in the other one counts all the same.)
    - `grad`: what the backward puts for 1/gap. `"auto"` is exact for losses that treat eigenvectors of one eigenvalue
        as a subspace, and finite for all; `"lorentz"` bounds the gradient of losses that see raw eigenvectors;
        `"mask"` drops pairs in the floor; `"raw"` is torch's, not finite at repeated eigenvalues. Keyword only.
    - `gap_floor`: the width of it, relative to max|w|; None is 4 eps for `"auto"`, 1e-3 for `"lorentz"`, 16 eps for
        `"mask"`. Keyword only.

    **Returns:** a named tuple `(eigenvalues, eigenvectors)`. The gradient of `A` is Hermitian, as torch's. The
    gradient of a failed matrix is NaN, or 0 if the loss leaves it out (its own incoming gradients are all 0).

    **Raises:** `ValueError` for a matrix that is not square or an option out of range, `TypeError` for other dtypes,
    `RuntimeError` when second derivatives are asked for.

    **Accuracy:** backward stable: $\|A V - V \Lambda\|$ and $\|V^H V - I\|$ at most $5 n \epsilon$ times $\|A\|$ and 1
    (`tests/test_eigh.py`). A loss that depends on the basis inside a repeated eigenvalue has no gradient there; what is
    returned is a finite stand-in. Up to n = 32 matrices run in kernels of the package's own: natively on a CPU, in
    CUDA on a GPU (compiled at the first call of a size and dtype, which cannot be captured into a CUDA graph; later
    ones can). Larger ones run in LAPACK, one matrix per thread, or cuSOLVER, which synchronises with the host; its
    results are checked.
    **Sources:** see the module's text.
    """
    return Eigh(*eigh_ex(A, UPLO, grad=grad, gap_floor=gap_floor)[:2])


def eigvalsh(
    A: Tensor,  # (..., n, n)
    UPLO: str = "L",
) -> Tensor:  # (..., n)
    r"""Ascending eigenvalues of Hermitian matrices, as `torch.linalg.eigvalsh`; NaN where a matrix has none.

    The gradient is $V \mathrm{diag}(g) V^H$: it holds no gap and is finite everywhere. Where eigenvalues coincide it
    is exact for symmetric functions of them (equal `g`), and one of the possible directional derivatives otherwise.
    Where a gradient is needed the eigenvectors are computed in the forward pass and kept.

    **Arguments:** `A`, `UPLO`: as in `eigh`.

    **Returns:** real eigenvalues; in float32 for float16 and bfloat16.

    **Raises:** as `eigh`.

    **Accuracy:** absolute error of a few ulp of max|w|.
    **Source:** Giles 2008, "Collected matrix derivative results", sec. 3.1.
    """
    flat, upper = _ready("eigvalsh", A, UPLO)
    if flat.shape[-1] == 0:
        values = flat.real.sum(-1)
    elif flat.requires_grad and torch.is_grad_enabled():
        values = apply(_Eigh, flat, upper, *gap_rule("eigvalsh", "auto", None, flat.dtype))[0]
    else:
        values = _values_fwd(flat, upper)[0]
    return values.reshape(A.shape[:-1])
