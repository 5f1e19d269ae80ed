r"""One Cayley step of a Schrödinger equation on a weighted graph: unitary, for a sparse real Laplacian.

With edges $(j_e, k_e)$ of weight $w_e$, $H = \mathrm{Deg} - \mathrm{Adj} = \sum_e w_e (e_j - e_k)(e_j - e_k)^\top$ real
symmetric, and $a = dt / 2$, every token $\psi$ becomes

$$x = U \psi, \qquad U = (I + i a H)^{-1} (I - i a H) = 2 R - I, \qquad R = (I + i a H)^{-1}.$$

$U$ is symmetric, and unitary because $H$ is Hermitian: $\|x\| = \|\psi\|$ for every $dt$, if the system is solved.
Plain conjugate gradients do not solve it: $I + i a H$ is not Hermitian, $v^H (I + i a H) v$ has the real part $\|v\|^2$
whatever $H$ is, so the step lengths carry no curvature, and beyond $a \|H\| \approx 1/2$ more iterations are worse.

**Chebyshev.** On an interval $[m - h, m + h]$ that holds the eigenvalues, with $\lambda = m + h x$,
$w = -i a h / (1 + i a m)$ and $q = w / (1 + \sqrt{1 - w^2})$,

$$\frac{1}{1 + i a \lambda} = \frac{1}{(1 + i a m) \sqrt{1 - w^2}} \Bigl(1 + 2 \sum_{k \ge 1} q^k T_k(x)\Bigr),$$

geometric, so the number of terms for an error of two ulp is known before the first product, and the coefficients
belong to the interval that is used. There are no damping factors: they would hold the expansion of a smooth function
back at their own, slow rate. The interval is Gershgorin's below (exactly 0 for weights >= 0); above, for the matrix of
absolute values and any positive vector, $\max_i (|H| y)_i / y_i$ bounds the spectrum (Collatz, Wielandt), and a few
steps of a power iteration bring it near the largest eigenvalue.

**Dense.** Where the expansion is long, $U \psi = 2 M y - \psi$ with $y = \psi - i a H \psi$ and the *real*
$M = (I + a^2 H^2)^{-1}$: half the work of a product with $U$. It is formed as $F y + (s y - \psi)$ with $F = 2 M - s I$
and a number $s$ amid the eigenvalues of $2 M$, which leaves less to round. On a CPU with a matrix unit for bfloat16
(AMX), $F$ and $y$ in complex64 go through it in three parts each, which hold all bits of a float32. The error grows
like $a \|H\|$ ulp, so from `CAYLEY_REAL_LIMIT` on $U$ itself is formed, from an inverse in complex128.

**COCG.** Where $H$ is too large for a dense factor and the expansion too long: conjugate gradients with the bilinear
form $r^\top r$, for the real and the imaginary part of a token as two right-hand sides. A real start makes every
residual a multiple of a real Lanczos vector of $H$, and no leading minor of $I + i a T$ is 0, so it cannot break down.

**Adjoint.** Let $g$ be the gradient of $x$. Then with $\lambda = (I - i a H)^{-1} g$, $\bar\psi = U^H g$ is
$2 \lambda - g$: the same step with conjugate coefficients. A change $\delta(a H)$ moves $x$ by
$-i R\, \delta(a H)\, (x + \psi)$, so with $z = x + \psi$

$$Q_e = \sum_{tokens} \mathrm{Im}\, \overline{(\lambda_j - \lambda_k)} (z_j - z_k), \qquad \bar w_e = a\, Q_e, \qquad
\overline{dt} = \tfrac12 \sum_e w_e Q_e.$$

Nothing but $\psi$ and $x$ is kept, however many terms there are, and no edge needs a matrix of gradients.

Sources: Crank & Nicolson 1947 (the step); Trefethen, Approximation Theory and Approximation Practice, ch. 3 and 8 (the
coefficients of a simple pole); Horn & Johnson, Matrix Analysis, sec. 8.1 (the bound); van der Vorst & Melissen 1990,
IEEE Trans. Magn. 26 (COCG); Freund 1992, SIAM J. Sci. Stat. Comput. 13 (shifted real matrices).
"""

from __future__ import annotations

import cmath
import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from stablekern import _check, _load, numerics
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.errors import message

__all__ = ["cayley_step"]

_OP = "cayley_step"
_METHODS = ("auto", "chebyshev", "dense", "cocg")
# Steps of the power iteration that tightens the interval: each costs one product with H for one vector.
_POWER_STEPS = 12
# Complex numbers that the torch backend holds at once for the differences along edges.
_EDGE_CHUNK = 1 << 22


def reference(psi: Tensor, edges: Tensor, weights: Tensor, dt: float | Tensor, *, method: str = "auto") -> Tensor:
    """The definition: a dense solve in plain torch, differentiable, in the dtype of its arguments."""
    nodes = psi.shape[-1]
    upper = weights.new_zeros(nodes, nodes).index_put((edges[0], edges[1]), weights)
    adjacency = upper + upper.mT
    step = (dt / 2) * (torch.diag_embed(adjacency.sum(-1)) - adjacency)
    identity = torch.eye(nodes, dtype=psi.dtype, device=psi.device)
    tokens = psi.reshape(math.prod(psi.shape[:-1]), nodes).mT
    return torch.linalg.solve(identity + 1j * step, tokens - 1j * (step.to(psi.dtype) @ tokens)).mT.reshape(psi.shape)


def _fake_fwd(psi: Tensor, edges: Tensor, weights: Tensor, dt: Tensor, method: str) -> Tensor:
    return empty(psi.shape, psi)


def _fake_bwd(
    grad: Tensor,
    psi: Tensor | None,
    out: Tensor | None,
    edges: Tensor,
    weights: Tensor,
    dt: Tensor,
    method: str,
) -> tuple[Tensor, Tensor]:
    return empty(grad.shape, grad), weights.new_empty(0 if psi is None else edges.shape[1], dtype=torch.float64)


# Tokens are (n, D), `dt` is a 0-d float64. The backward pass gets psi and out only if it shall return the sums Q.
_fwd = define(
    "cayley_step_fwd(Tensor psi, Tensor edges, Tensor weights, Tensor dt, str method) -> Tensor", fake=_fake_fwd
)
_bwd = define(
    "cayley_step_bwd(Tensor grad, Tensor? psi, Tensor? out, Tensor edges, Tensor weights, Tensor dt, str method)"
    " -> (Tensor grad_psi, Tensor edge_sums)",
    fake=_fake_bwd,
)


def _plain(tensor: Tensor) -> Tensor:
    """Contiguous memory that holds the values themselves, not their conjugates or negatives."""
    return tensor.resolve_conj().resolve_neg().contiguous()


# ---- the expansion, and which method it leads to ------------------------------------------------------------------


class _Expansion(NamedTuple):
    """$U \\approx \\sum_k c_k T_k((H - mid) / half)$."""

    coefficients: list[complex]
    mid: float
    half: float


def _length(ratio: float, first: float, tolerance: float) -> int:
    """Terms of a geometric expansion with the tail 4 |c_0| |q|^K / (1 - |q|) below the tolerance."""
    if ratio == 0.0:
        return 1
    if ratio >= 1.0:
        return sys.maxsize
    return max(1, math.ceil(math.log(tolerance * (1 - ratio) / (4 * first)) / math.log(ratio)))


def _expansion(a: float, low: float, high: float, tolerance: float) -> _Expansion | None:
    """The expansion to this error; None if it is longer than CAYLEY_MOST_TERMS."""
    mid, half = (low + high) / 2, (high - low) / 2
    if not math.isfinite(a * mid) or not math.isfinite(a * half):
        unusable = math.isnan(a) or math.isnan(mid)
        return _Expansion([complex(math.nan, math.nan)], 0.0, 1.0) if unusable else None
    w = -1j * a * half / (1 + 1j * a * mid)
    root = cmath.sqrt(1 - w * w)
    q, first = w / (1 + root), 1 / ((1 + 1j * a * mid) * root)
    terms = _length(abs(q), abs(first), tolerance)
    if terms > numerics.CAYLEY_MOST_TERMS.value:
        return None
    return _Expansion([2 * first - 1, *(4 * first * q**k for k in range(1, terms))], mid, half or 1.0)


def _shift(size: float) -> float:
    """2 M at the mean of (a l)^2 for eigenvalues spread evenly up to `size`; of few digits, exact in any dtype.

    Around a number amid the spectrum of 2 M the product and its roundings are small where a |H| is, and no larger
    elsewhere.
    """
    return 0.0 if math.isnan(size) else round(2**9 / (1 + size * size / 3)) / 2**8


class _Plan(NamedTuple):
    method: str  # "chebyshev", "dense" (the real factor), "unitary" (U itself) or "cocg"
    expansion: _Expansion | None
    exact: _Expansion | None  # what the real factor is made by where that is cheaper than to invert a matrix
    a: float
    shift: float  # of the real factor, the multiple of the identity that it lacks


def _plan(
    tokens: int, nodes: int, entries: int, interval: Tensor, dt: Tensor, method: str, dtype, *, dense_gain: float = 1.0
) -> _Plan:
    """What to run for `tokens` tokens and `entries` nonzeros of H: the cheapest by the measured costs, or as asked.

    `dense_gain` is how many times as fast as usual the product with the dense factor is.
    """
    a = dt.item() / 2
    low, high = interval.tolist()
    tolerance = numerics.CAYLEY_TRUNCATION_ULPS.of(dtype)
    expansion = _expansion(a, low, high, tolerance)
    exact = _expansion(a, low, high, tolerance * numerics.CAYLEY_FACTOR_TRUNCATION.value)
    size = abs(a) * max(abs(low), abs(high))
    factor = nodes**2 * numerics.CAYLEY_FACTOR_COST.value  # per row, as is what the expansion costs
    if exact is not None:
        expanded = (len(exact.coefficients) - 1) * entries * numerics.CAYLEY_SPARSE_COST.value
        factor, exact = (expanded, exact) if expanded < factor else (factor, None)
    if method == "auto":
        sparse = math.inf if expansion is None else (len(expansion.coefficients) - 1) * entries
        dense = (nodes**2 / dense_gain + factor * nodes / max(tokens, 1)) / numerics.CAYLEY_SPARSE_COST.value + entries
        if sparse <= dense:
            method = "chebyshev"
        else:
            method = "dense" if nodes <= numerics.CAYLEY_DENSE_NODES.value else "chebyshev" if expansion else "cocg"
    if method == "dense" and not size <= numerics.CAYLEY_REAL_LIMIT.value:
        method = "unitary"
    return _Plan(method, expansion, exact, a, _shift(size))


def _laplacian(edges: Tensor, weights: Tensor, nodes: int) -> Tensor:
    """H, dense, in float64."""
    values = weights.to(torch.float64)
    H = values.new_zeros(nodes, nodes)
    H[edges[0], edges[1]] = -values
    H[edges[1], edges[0]] = -values
    H.diagonal().copy_(-H.sum(-1))
    return H


def _resolvent(H: Tensor, a: Tensor | float) -> Tensor:
    """R = (I + i a H)^-1 in complex128: normal, with |1 + i a l| >= 1, so the inverse exists for every finite H."""
    identity = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    return torch.linalg.inv_ex(torch.complex(identity, a * H))[0]


def _unitary(edges: Tensor, weights: Tensor, a: Tensor | float, nodes: int, dtype: torch.dtype) -> Tensor:
    R = _resolvent(_laplacian(edges, weights, nodes), a)
    return (2 * R - torch.eye(nodes, dtype=R.dtype, device=R.device)).to(dtype)


def _real_factor(edges: Tensor, weights: Tensor, a: float, nodes: int, shift: float) -> Tensor:
    """2 M - shift I, M = (I + a^2 H^2)^-1, in the dtype of the weights.

    For float32 by a Cholesky factor in float64: the error of the square, (a |H|)^2 times 1e-16, stays below float32's.
    """
    H = _laplacian(edges, weights, nodes)
    if weights.dtype == torch.float64:
        return 2 * _resolvent(H, a).real - shift * torch.eye(nodes, dtype=H.dtype, device=H.device)
    H *= a
    square = torch.addmm(torch.eye(nodes, dtype=H.dtype, device=H.device), H, H)
    doubled = torch.cholesky_inverse(torch.linalg.cholesky_ex(square)[0]).mul_(2)
    doubled.diagonal().sub_(shift)
    return doubled.to(weights.dtype)


def _table(coefficients: list[complex]) -> Tensor:
    return torch.tensor([[c.real, c.imag] for c in coefficients], dtype=torch.float64).reshape(-1, 2)


# ---- native -------------------------------------------------------------------------------------------------------


def _native_factor(edges: Tensor, weights: Tensor, plan: _Plan, nodes: int) -> Tensor:
    """`_real_factor`, from the expansion of its columns in float64 if that is short: 2 M = Re U + I."""
    if plan.exact is None or weights.dtype == torch.float64:
        return _real_factor(edges, weights, plan.a, nodes, plan.shift)
    first, *others = (c.real for c in plan.exact.coefficients)
    values = weights.to(torch.float64)
    columns = torch.eye(nodes + nodes % 2, nodes, dtype=torch.float64)
    pairs = torch.complex(columns[::2], columns[1::2])  # two columns to a token
    image = torch.empty_like(pairs)
    expansion = _table([first + 1.0 - plan.shift, *others]), plan.exact.mid, plan.exact.half
    _load.native().cayley_step_fwd(pairs, edges, values, *expansion, values.new_empty(0), 0.0, False, image)
    return torch.stack((image.real, image.imag), 1).flatten(0, 1)[:nodes].to(weights.dtype)


def _native_operator(psi: Tensor, edges: Tensor, weights: Tensor, dt: Tensor, method: str) -> tuple[_Plan, tuple]:
    """The plan, and the operator as the kernels take it: coefficients, mid, half, dense factor, its shift.

    Empty for what they cannot apply.
    """
    nodes, interval = psi.shape[1], torch.empty(2, dtype=torch.float64)
    _load.native().cayley_step_interval(edges, weights, nodes, _POWER_STEPS, interval)
    unit = weights.dtype == torch.float32 and _load.native_module().uses_matrix_unit(nodes)
    gain = numerics.CAYLEY_UNIT_GAIN.value if unit else 1.0
    entries = nodes + 2 * edges.shape[1]
    plan = _plan(psi.shape[0], nodes, entries, interval, dt, method, weights.dtype, dense_gain=gain)
    nothing = weights.new_empty(0)
    if plan.method == "chebyshev":
        expansion = plan.expansion or _Expansion([complex(math.nan, math.nan)], 0.0, 1.0)
        return plan, (_table(expansion.coefficients), expansion.mid, expansion.half, nothing, 0.0)
    if plan.method == "dense":
        factor = _native_factor(edges, weights, plan, nodes)
        return plan, (_table([1.0, -1j * plan.a]), 0.0, 1.0, factor, plan.shift)
    return plan, (_table([]), 0.0, 1.0, nothing, 0.0)


def _applied(psi: Tensor, edges: Tensor, weights: Tensor, plan: _Plan, *, conjugate: bool) -> Tensor:
    """U psi (or its conjugate) by plain torch."""
    a = -plan.a if conjugate else plan.a
    if plan.method == "unitary":
        return psi @ _unitary(edges, weights, a, psi.shape[1], psi.dtype)
    if plan.method == "dense":
        H = _laplacian(edges, weights, psi.shape[1])
        tilted = psi - 1j * a * _product(H.to(weights.dtype), psi)
        factor = _real_factor(edges, weights, a, psi.shape[1], plan.shift)
        return _product(factor, tilted) + (plan.shift * tilted - psi)
    H = _sparse_laplacian(edges, weights, psi.shape[1])
    if plan.method == "cocg":
        return _cocg(psi, H, a)
    if plan.expansion is None:
        return torch.full_like(psi, math.nan)
    return _clenshaw(psi, H, plan.expansion, conjugate=conjugate)


@launcher("cayley_step_fwd", device="cpu", backend="native")
def _(psi, edges, weights, dt, method):
    psi, edges, weights = _plain(psi), edges.contiguous(), weights.contiguous()
    plan, operator = _native_operator(psi, edges, weights, dt, method)
    if not operator[0].numel():
        return _applied(psi, edges, weights, plan, conjugate=False)
    out = empty(psi.shape, psi)
    _load.native().cayley_step_fwd(psi, edges, weights, *operator, False, out)
    return out


@launcher("cayley_step_bwd", device="cpu", backend="native")
def _(grad, psi, out, edges, weights, dt, method):
    grad, edges, weights = _plain(grad), edges.contiguous(), weights.contiguous()
    plan, operator = _native_operator(grad, edges, weights, dt, method)
    grad_psi, edge_sums = outputs = _fake_bwd(grad, psi, out, edges, weights, dt, method)
    if not operator[0].numel():
        grad_psi.copy_(_applied(grad, edges, weights, plan, conjugate=True))
    if psi is not None:
        _load.native().cayley_step_bwd(grad, _plain(psi), _plain(out), edges, weights, *operator, grad_psi, edge_sums)
    elif operator[0].numel():
        _load.native().cayley_step_fwd(grad, edges, weights, *operator, True, grad_psi)
    return outputs


# ---- triton -------------------------------------------------------------------------------------------------------


def _dense_reason(tokens: Tensor, method: str) -> str | None:
    if method not in ("auto", "dense"):
        return f"the method {method!r}"
    return None if tokens.shape[1] <= numerics.CAYLEY_DENSE_NODES.value else f"{tokens.shape[1]} nodes"


def _supports_fwd(psi, edges, weights, dt, method):
    return _dense_reason(psi, method)


def _supports_bwd(grad, psi, out, edges, weights, dt, method):
    return _dense_reason(grad, method)


@launcher("cayley_step_fwd", device="cuda", backend="triton", supports=_supports_fwd)
@launcher("cayley_step_fwd", device="cpu", backend="triton", supports=_supports_fwd)
def _(psi, edges, weights, dt, method):
    from stablekern.triton_kernels.cayley_step import cayley_step_apply

    psi, out = _plain(psi), empty(psi.shape, psi)
    cayley_step_apply(psi, _unitary(edges, weights, dt / 2, psi.shape[1], psi.dtype), False, out)
    return out


@launcher("cayley_step_bwd", device="cuda", backend="triton", supports=_supports_bwd)
@launcher("cayley_step_bwd", device="cpu", backend="triton", supports=_supports_bwd)
def _(grad, psi, out, edges, weights, dt, method):
    from stablekern.triton_kernels.cayley_step import cayley_step_apply, cayley_step_edges

    grad, grad_psi = _plain(grad), empty(grad.shape, grad)
    cayley_step_apply(grad, _unitary(edges, weights, dt / 2, grad.shape[1], grad.dtype), True, grad_psi)
    if psi is None:
        return grad_psi, weights.new_empty(0, dtype=torch.float64)
    return grad_psi, _along_edges(cayley_step_edges(grad, grad_psi, _plain(psi), _plain(out)), edges)


# ---- torch --------------------------------------------------------------------------------------------------------


def _turned(psi: Tensor) -> Tensor:
    return psi.mT.contiguous()


def _product(H: Tensor, psi: Tensor) -> Tensor:
    """H psi for every token (n, D); H real, dense or sparse, one product for real and imaginary parts together."""
    turned = torch.view_as_real(_turned(psi))
    return torch.view_as_complex((H @ turned.flatten(1)).view(turned.shape)).mT


def _sparse_laplacian(edges: Tensor, weights: Tensor, nodes: int) -> Tensor:
    degree = weights.new_zeros(nodes, dtype=torch.float64)
    for end in edges:
        degree.index_add_(0, end, weights.to(torch.float64))
    diagonal = torch.arange(nodes, device=edges.device).expand(2, nodes)
    where = torch.cat((edges, edges.flip(0), diagonal), 1)
    values = torch.cat((-weights, -weights, degree.to(weights.dtype)))
    return torch.sparse_coo_tensor(where, values, (nodes, nodes), check_invariants=False).coalesce()


def _interval(edges: Tensor, weights: Tensor, nodes: int) -> Tensor:
    """(low, high), as the native kernel finds it."""
    values = weights.to(torch.float64)

    def summed(along: Tensor, x: Tensor | None = None) -> Tensor:
        total = along.new_zeros(nodes)
        for near, far in ((edges[0], edges[1]), (edges[1], edges[0])):
            total.index_add_(0, near, along if x is None else along * x[far])
        return total

    degree, radius = summed(values), summed(values.abs())
    x, zero = torch.ones_like(degree), degree.new_zeros(())
    best = (degree.abs() + radius).amax() if nodes else zero
    for _ in range(_POWER_STEPS):
        image = degree.abs() * x + summed(values.abs(), x)
        best, previous = torch.minimum(best, (image / x).amax() if nodes else zero), best
        x = (image / torch.where(previous > 0, previous, 1.0)).clamp_min(torch.finfo(torch.float32).tiny)
    low = torch.minimum((degree - radius).amin(), zero) if nodes else zero
    high = torch.maximum((degree + radius).amax(), zero) if nodes else zero
    found = torch.stack((torch.maximum(low, -best), torch.minimum(high, best)))
    return torch.where(torch.isfinite(radius).all(), found, math.nan)


def _clenshaw(psi: Tensor, H: Tensor, expansion: _Expansion, *, conjugate: bool) -> Tensor:
    coefficients = [c.conjugate() if conjugate else c for c in expansion.coefficients]
    later = latest = torch.zeros_like(psi)
    for k in reversed(range(1, len(coefficients))):
        image = (_product(H, latest) - expansion.mid * latest) * (2 / expansion.half)
        later, latest = latest, coefficients[k] * psi + image - later
    image = (_product(H, latest) - expansion.mid * latest) / expansion.half
    return coefficients[0] * psi + image - later


def _cocg(psi: Tensor, H: Tensor, a: float) -> Tensor:
    """2 (I + i a H)^-1 psi - psi. A token that is not finite, or did not converge, is NaN, and no other one."""
    planes = torch.cat((psi.real, psi.imag))
    size = planes.abs().amax(-1, keepdim=True) if psi.shape[1] else planes.sum(-1, keepdim=True)
    scale = torch.where(size > 0, size, 1.0)
    start = planes / scale
    residual = direction = start.to(psi.dtype)
    x = torch.zeros_like(residual)
    limit = numerics.CAYLEY_TRUNCATION_ULPS.of(planes.dtype) * torch.linalg.vector_norm(start, dim=-1, keepdim=True)
    form = (residual * residual).sum(-1, keepdim=True)
    active = torch.linalg.vector_norm(residual, dim=-1, keepdim=True) > limit
    for iteration in range(int(numerics.CAYLEY_MOST_TERMS.value)):
        # The flag is read back: every time on a CPU, where that is free, now and then on a GPU.
        if (psi.device.type == "cpu" or iteration % 8 == 0) and not bool(active.any()):
            break
        image = direction + 1j * a * _product(H, direction)
        length = torch.where(active, form / (direction * image).sum(-1, keepdim=True), 0.0)
        x = x + length * direction
        residual = residual - length * image
        previous, form = form, (residual * residual).sum(-1, keepdim=True)
        active = active & (torch.linalg.vector_norm(residual, dim=-1, keepdim=True) > limit)
        direction = residual + torch.where(active, form / previous, 0.0) * direction
    solved = torch.where(active | ~torch.isfinite(size), math.nan, x * scale)
    real, imaginary = solved.tensor_split(2)
    return 2 * (real + 1j * imaginary) - psi


def _along_edges(G: Tensor, edges: Tensor) -> Tensor:
    """Q from G_jk, the sums of Im conj(2 lambda_j) z_k."""
    diagonal = G.diagonal()
    sums = diagonal[edges[0]] + diagonal[edges[1]] - G[edges[0], edges[1]] - G[edges[1], edges[0]]
    return sums.to(torch.float64) / 2


def _edge_sums(grad: Tensor, grad_psi: Tensor, psi: Tensor, out: Tensor, edges: Tensor) -> Tensor:
    """Q: from a D x D matrix where that is affordable, which is deterministic on a GPU too, else edge by edge."""
    twice, z = grad + grad_psi, psi + out
    if psi.shape[1] <= numerics.CAYLEY_DENSE_NODES.value:
        return _along_edges(twice.real.mT @ z.imag - twice.imag.mT @ z.real, edges)
    parts = []
    for j, k in (part for part in edges.split(max(1, _EDGE_CHUNK // max(1, psi.shape[0])), dim=1)):
        parts.append((((twice[:, j] - twice[:, k]).conj() * (z[:, j] - z[:, k])).imag).sum(0).to(torch.float64) / 2)
    return torch.cat(parts) if parts else edges.new_zeros(0, dtype=torch.float64)


def _torch_plan(psi: Tensor, edges: Tensor, weights: Tensor, dt: Tensor, method: str) -> _Plan | None:
    """None where U is formed on a GPU, for which nothing is read back."""
    if psi.is_cuda and method in ("auto", "dense") and psi.shape[1] <= numerics.CAYLEY_DENSE_NODES.value:
        return None
    entries = psi.shape[1] + 2 * edges.shape[1]
    interval = _interval(edges, weights, psi.shape[1])
    return _plan(psi.shape[0], psi.shape[1], entries, interval, dt, method, weights.dtype)


def _torch_step(psi: Tensor, edges: Tensor, weights: Tensor, dt: Tensor, method: str, *, conjugate: bool) -> Tensor:
    plan = _torch_plan(psi, edges, weights, dt, method)
    if plan is None:
        return psi @ _unitary(edges, weights, (-dt if conjugate else dt) / 2, psi.shape[1], psi.dtype)
    return _applied(psi, edges, weights, plan, conjugate=conjugate).contiguous()


@launcher("cayley_step_fwd", device="cuda", backend="torch")
@launcher("cayley_step_fwd", device="cpu", backend="torch")
def _(psi, edges, weights, dt, method):
    return _torch_step(psi, edges, weights, dt, method, conjugate=False)


@launcher("cayley_step_bwd", device="cuda", backend="torch")
@launcher("cayley_step_bwd", device="cpu", backend="torch")
def _(grad, psi, out, edges, weights, dt, method):
    grad_psi = _torch_step(grad, edges, weights, dt, method, conjugate=True)
    if psi is None:
        return grad_psi, weights.new_empty(0, dtype=torch.float64)
    return grad_psi, _edge_sums(grad, grad_psi, psi, out, edges)


class _CayleyStep(torch.autograd.Function):
    @staticmethod
    def forward(psi, edges, weights, dt, method):
        return _fwd(psi, edges, weights, dt, method)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        psi, edges, weights, dt, ctx.method = inputs
        ctx.sums = weights.requires_grad or dt.requires_grad
        ctx.save_for_backward(edges, weights, dt, *((psi, output) if ctx.sums else (None, None)))

    @staticmethod
    def backward(ctx, grad):
        _check.first_order(_OP)
        edges, weights, dt, psi, out = ctx.saved_tensors
        grad_psi, edge_sums = _bwd(grad, psi, out, edges, weights, dt, ctx.method)
        grad_weights = grad_dt = None
        if ctx.sums:
            grad_weights = (dt / 2 * edge_sums).to(weights.dtype)
            grad_dt = (weights.to(torch.float64) * edge_sums).sum() / 2
        return grad_psi, None, grad_weights, grad_dt, None


def _check_edges(edges: Tensor, nodes: int) -> None:
    """Raises for an end outside the nodes, a loop or a repeated edge."""
    if not edges.shape[1]:
        return
    least, most = edges.aminmax()
    if least < 0 or most >= nodes:
        raise ValueError(message(_OP, f"`edges` must lie in [0, {nodes})", int(least if least < 0 else most)))
    low, high = torch.minimum(edges[0], edges[1]), torch.maximum(edges[0], edges[1])
    if bool((low == high).any()):
        raise ValueError(message(_OP, "`edges` must join two nodes", f"a loop at {int(low[low == high][0])}"))
    keys = (low * nodes + high).sort().values
    again = keys[1:] == keys[:-1]
    if bool(again.any()):
        pair = divmod(int(keys[1:][again][0]), nodes)
        raise ValueError(message(_OP, "`edges` must hold each undirected edge once", f"{pair} again"))


def cayley_step(
    psi: Tensor,  # (..., D)
    edges: Tensor,  # (2, E)
    weights: Tensor,  # (E)
    dt: float | Tensor,
    *,
    method: str = "auto",
) -> Tensor:  # (..., D)
    r"""$(I + i a H)^{-1} (I - i a H) \psi$ for every token, $a = dt / 2$, with exact gradients to everything.

    $H = \mathrm{Deg} - \mathrm{Adj}$ is the real Laplacian of the weighted graph. The step is unitary: the norm of
    every token stays, for any $dt$ and any weights; a negative $dt$ is the way back.

    **Arguments:**

    - `psi`: tokens, (..., D), complex64 or complex128, any strides; no token may be 0-dimensional, any size may be 0.
    - `edges`: (2, E), int64: each undirected edge once, as (j, k) or (k, j); no loops. A node may have none.
    - `weights`: (E), float32 for complex64, float64 for complex128, used as they are: a positive parametrisation
        (softplus) is the caller's. They may be negative or 0. One that is not finite makes every token NaN.
    - `dt`: the time step, a finite number or a real 0-d tensor, which gets a gradient.
    - `method`: `"auto"` takes the cheapest by a measured cost model; `"chebyshev"`, an expansion whose length follows
        from $a \|H\|$ (NaN if it would take more than 4096 terms); `"dense"`, one product with a precomputed factor;
        `"cocg"`, iterations to a relative residual of 2 ulp, a token that needs more than 4096 being NaN.

    On a GPU nothing is read back from the device, except by `"cocg"`, by `"chebyshev"` where plain torch has to run it,
    and by `"auto"` there for more than 4096 nodes.

    **Returns:** a new contiguous tensor like `psi`. A token that is not finite stays alone: no other one changes.

    **Raises:** `ValueError` for shapes, and, looked up for CPU tensors only, for an edge that is out of range, a loop
    or there twice; `TypeError` for dtypes; `RuntimeError` when second derivatives are asked for.

    **Accuracy:** output and gradients at most twice the error of `torch.linalg.solve` in the same dtype
    (`tests/test_ops.py`); the norm of a token drifts by less than 1e-6 in eight steps in float32, `dt` from 0.01 to 1,
    for D from 64 on, and by at most 4 ulp a step for fewer components, whose rounding errors do not average out;
    results have the same bits for any number of threads (`tests/test_cayley_step.py`).
    **Sources:** Crank & Nicolson 1947; Trefethen, Approximation Theory and Approximation Practice, ch. 3.
    """
    sizes = _check.shapes(_OP, psi=(psi, "... D"), edges=(edges, "2 E"), weights=(weights, "E"))
    dtype = _check.dtypes(_OP, _check.COMPLEX, psi=psi)
    _check.dtypes(_OP, (torch.float32 if dtype == torch.complex64 else torch.float64,), weights=weights)
    _check.dtypes(_OP, (torch.int64,), edges=edges)
    for name, tensor in (("edges", edges), ("weights", weights)):
        if tensor.device != psi.device:
            raise ValueError(message(_OP, f"`{name}` and `psi` must be on one device", tensor.device, psi.device))
    _check.choice(_OP, "method", method, _METHODS)
    if isinstance(dt, Tensor):
        _check.dtypes(_OP, _check.HALF + _check.REAL, dt=dt)
        _check.shapes(_OP, dt=(dt, ""))
        step = dt.to(device=psi.device, dtype=torch.float64)
    else:
        number = _check.number(_OP, "dt", dt)
        if math.isinf(number):
            raise ValueError(message(_OP, "`dt` must be finite", number))
        step = torch.full((), number, dtype=torch.float64, device=psi.device)
    if _check.readable(edges):
        _check_edges(edges, sizes["D"])
    tokens = psi.reshape(math.prod(psi.shape[:-1]), sizes["D"])
    return apply(_CayleyStep, tokens, edges, weights, step, method).reshape(psi.shape)
