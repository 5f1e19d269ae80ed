"""Residual against iteration for the Cayley operator I + i a H, a = dt/2: `python -m bench.cayley_residuals`.

H is the Laplacian of a small-world graph on 256 nodes, as in a complex-valued language model; 16 random right-hand
sides in complex64. Plain CG is what is written for Hermitian matrices, which this one is not. COCG and CGNE are
`stablekern.cg` with their names for `method`. The expansion is what `cayley_step` takes for a sparse H: cut off after k
products, x is (b + U b) / 2. Draws docs/figures/cayley_residuals.svg and prints what it shows.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

import stablekern
from stablekern.ops import cayley_step as spine

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "cayley_residuals.svg"
STEPS = (0.01, 0.02, 0.05, 0.1, 0.3, 1.0)
ITERATIONS = 40
_NODES, _NEIGHBOURS, _REWIRED, _ROWS = 256, 6, 0.1, 16


def laplacian(g: torch.Generator) -> Tensor:
    """Deg - Adj of a ring of `_NODES` with `_NEIGHBOURS` each, a tenth of the edges rewired, weights about 1."""
    W = torch.zeros(_NODES, _NODES)
    for distance in range(1, _NEIGHBOURS // 2 + 1):
        start = torch.arange(_NODES)
        far = torch.randint(_NODES, (_NODES,), generator=g)
        end = torch.where(torch.rand(_NODES, generator=g) < _REWIRED, far, (start + distance) % _NODES)
        weight = torch.nn.functional.softplus(torch.randn(_NODES, generator=g) / 2 + 0.5)
        W[start, end] = W[end, start] = weight
    W.fill_diagonal_(0)
    return torch.diag(W.sum(-1)) - W


def relative_residual(A: Tensor, x: Tensor, b: Tensor) -> float:
    """The largest of all rows, in double precision."""
    A, x, b = (t.to(torch.complex128) for t in (A, x, b))
    return float((torch.linalg.vector_norm(b - x @ A.mT, dim=-1) / torch.linalg.vector_norm(b, dim=-1)).max())


def plain_cg(A: Tensor, b: Tensor) -> list[float]:
    x, r = torch.zeros_like(b), b
    p, rr = r, r.abs().square().sum(-1, keepdim=True)
    found = [relative_residual(A, x, b)]
    for _ in range(ITERATIONS):
        q = p @ A.mT
        alpha = rr / (p.conj() * q).sum(-1, keepdim=True)
        x, r = x + alpha * p, r - alpha * q
        rr, before = r.abs().square().sum(-1, keepdim=True), rr
        p = r + rr / before * p
        found.append(relative_residual(A, x, b))
    return found


def ours(A: Tensor, b: Tensor, method: str) -> list[float]:
    """CGNE spends two products in an iteration."""
    run = lambda k: stablekern.cg_ex(A, b.mT, method=method, rtol=0, maxiter=k).x.mT  # noqa: E731
    return [relative_residual(A, run(k), b) for k in range(ITERATIONS + 1)]


def expansion(H: Tensor, A: Tensor, b: Tensor, dt: float) -> list[float]:
    """As long as `cayley_step` makes it; behind that nothing changes."""
    edges = H.triu(1).nonzero().T
    weights = -H[edges[0], edges[1]]
    low, high = spine._interval(edges, weights, _NODES).tolist()
    sparse, whole = spine._sparse_laplacian(edges, weights, _NODES), spine._expansion(dt / 2, low, high, H.dtype)
    found = []
    for k in range(ITERATIONS + 1):
        cut = whole._replace(coefficients=whole.coefficients[: k + 1])
        found.append(relative_residual(A, (b + spine._clenshaw(b, sparse, cut, conjugate=False)) / 2, b))
    return found


def measure() -> dict[float, dict[str, list[float]]]:
    g = torch.Generator().manual_seed(256)
    H = laplacian(g)
    b = torch.randn(_ROWS, _NODES, dtype=torch.complex64, generator=g)
    curves = {}
    for dt in STEPS:
        A = torch.complex(torch.eye(_NODES), dt / 2 * H)
        curves[dt] = {
            "plain CG": plain_cg(A, b),
            "COCG": ours(A, b, "cocg"),
            "CGNE": ours(A, b, "cgne"),
            "expansion": expansion(H, A, b, dt),
        }
    return curves


def draw(curves: dict[float, dict[str, list[float]]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file from the same lines, with text as text.
    matplotlib.rcParams |= {"svg.hashsalt": "cayley_residuals", "svg.fonttype": "none"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.5), sharex=True, sharey=True)
    for axis, (dt, methods) in zip(axes.flat, curves.items(), strict=True):
        for name, residuals in methods.items():
            axis.semilogy(range(len(residuals)), residuals, label=name)
        axis.axhline(1e-6, color="gray", linewidth=0.8, linestyle=":")
        axis.set(title=f"dt = {dt:g}", ylim=(1e-8, 1e3))
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("iteration")
    for axis in axes[:, 0]:
        axis.set_ylabel("|b - A x| / |b|, worst of 16")
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("I + i (dt/2) H, 256 nodes, complex64; dotted: the default tolerance")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    curves = measure()
    shown = (5, 10, 20, 40)
    print("| dt | method | " + " | ".join(f"after {k}" for k in shown) + " | iterations to 1e-6 |")
    print("|---|---|" + "---|" * (len(shown) + 1))
    for dt, methods in curves.items():
        for name, residuals in methods.items():
            reached = next((k for k, value in enumerate(residuals) if value <= 1e-6), None)
            values = " | ".join(f"{residuals[k]:.1e}" for k in shown)
            print(f"| {dt:g} | {name} | {values} | {'never' if reached is None else reached} |")
    draw(curves, FIGURE)


if __name__ == "__main__":
    main()
