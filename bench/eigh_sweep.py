"""How right the gradients of `eigh` are next to repeated eigenvalues: `python -m bench.eigh_sweep`.

Spectra of two clusters and one eigenvalue far away, with a gap `inner` inside the clusters and a gap `cut` between
them; losses that see the clusters as subspaces ("projector", and "tiny": the same with small entries across the cut),
a smooth function of the matrix written with eigenvectors ("spectral"), and raw vectors ("vectors"). The error of every
`grad` is taken twice against float64: with the eigenvalues and vectors that the op computed (that is the rule's own
error, compared with the bound below), and with those of the matrix (that is what a user gets).

**Bound.** For a pair (i, j) let `gap` = |w_i - w_j|, `limit` = kappa eps times the longest column of M, `delta` = 4 eps
max|w|, and T the exact S_ij. A pair inside a subspace gives exactly 0. Any other numerator is off by rounding, less
than `limit`, or dropped, then less than `limit` itself; so S_ij is off by at most `limit` min(1/gap, 1/(2 delta)),
and by |T| delta^2/(gap^2 + delta^2) for the Lorentzian. The three products round: 4 n eps ||T||. The decomposition
belongs to a matrix 5 n eps max|w| away (tests/test_eigh.py); it moves the projector's gradient by at most 9 times that,
times ||G||/cut^2 (first order in the three places where it enters, each at most sqrt(2)||G||/cut^2, twice).

The test runs a sample; this command runs the whole sweep, appends its lines to bench/results, and draws
docs/figures/eigh_gradient_sweep.svg from them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import stablekern
from bench.store import RESULTS, append, stamp
from stablekern import numerics
from stablekern.ops import eigh as spine

FIGURE = RESULTS.parent.parent / "docs" / "figures" / "eigh_gradient_sweep.svg"
OP = "eigh_gradient_sweep"
MODES = ("auto", "mask", "lorentz", "raw")
LOSSES = ("projector", "tiny", "spectral", "vectors")
REAL = (torch.float32, torch.float64)
DTYPES = (*REAL, torch.complex64, torch.complex128)
GAPS = tuple(10.0**e for e in range(-7, 0))
INNER = (0.0, *GAPS)
SCALES = (1e-6, 1.0, 1e6)
SIZES = (2, 3, 8, 19, 32, 64)


@dataclass(frozen=True)
class Point:
    """One batch: all inner gaps at all scales. `cross` is the size of the cotangent's entries across the cut."""

    loss: str
    dtype: torch.dtype
    n: int
    cluster: int  # eigenvalues in the lower cluster; n: all, and no cut
    cut: float
    cross: float = 1.0


def points(sizes: Iterable[int] = SIZES) -> Iterator[Point]:
    """The whole sweep."""
    for n, loss, dtype in itertools.product(sizes, LOSSES, DTYPES):
        if loss == "vectors" and dtype not in REAL:
            continue  # the phase of complex vectors has its own test, by finite differences
        for cluster in sorted({min(2, n), max(2, n // 2), max(2, n - 1), n}):
            if loss == "tiny":
                if cluster < n:
                    yield from (Point(loss, dtype, n, cluster, 0.1, cross) for cross in GAPS)
            else:
                yield from (Point(loss, dtype, n, cluster, cut) for cut in GAPS)


def _generator(point: Point) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, repr(point))))


def spectra(point: Point) -> Tensor:
    """(inner, n): both clusters, and one eigenvalue of 1 that sets max|w|; float64, ascending, of size about 1."""
    inner = torch.tensor(INNER, dtype=torch.float64)[:, None]
    n, m = point.n, point.cluster
    low = -1 + inner * torch.arange(m)
    high = low[:, -1:] + point.cut + inner * torch.arange(max(n - m - 1, 0))
    top = torch.maximum(torch.ones_like(inner), high[:, -1:] + 1 if high.numel() else torch.ones_like(inner))
    return torch.cat([low, high, top], 1)[:, :n] if m < n else low


def matrices(point: Point, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (b, n, n) in the point's dtype and its scale (b)."""
    high = torch.complex128 if point.dtype.is_complex else torch.float64
    w = torch.cat([spectra(point) * scale for scale in SCALES])
    Q = torch.linalg.qr(torch.randn(len(w), point.n, point.n, generator=generator, dtype=high)).Q
    A = (Q * w[:, None, :].to(high)) @ Q.mH
    scale = torch.tensor(SCALES, dtype=torch.float64).repeat_interleave(len(INNER))
    return ((A + A.mH) / 2).to(point.dtype), scale


def weights(point: Point, A: Tensor, generator: torch.Generator) -> Tensor:
    """The Hermitian G of the loss Re <G, f(A)>; any matrix for raw vectors. For "tiny" its part across is `cross`."""
    high = torch.complex128 if point.dtype.is_complex else torch.float64
    G = torch.randn(A.shape, generator=generator, dtype=high)
    if point.loss == "vectors":
        return G.to(point.dtype)
    G = (G + G.mH) / 2
    if point.loss == "tiny":
        V = torch.linalg.eigh(A.to(high)).eigenvectors
        below = torch.arange(point.n) < point.cluster
        G = V @ torch.where(below[:, None] == below, G, point.cross * G) @ V.mH
    return ((G + G.mH) / 2).to(point.dtype)


def divided(point: Point, w: Tensor, scale: Tensor) -> Tensor:
    """f[w_i, w_j] (b, n, n) of the loss: of a step at the cut, or of exp(w / scale); exact at equal eigenvalues."""
    gap = w[:, :, None] - w[:, None, :]
    if point.loss == "spectral":
        t = gap.abs() / scale[:, None, None]
        slope = torch.where(t > 0, -torch.expm1(-t) / t, 1.0)
        return (
            slope * torch.exp(torch.maximum(w[:, :, None], w[:, None, :]) / scale[:, None, None]) / scale[:, None, None]
        )
    below = torch.arange(point.n) < point.cluster
    return torch.where(below[:, None] == below, 0.0, -1 / gap.abs())


def _cotangents(point: Point, w: Tensor, V: Tensor, G: Tensor, scale: Tensor) -> tuple[Tensor | None, Tensor]:
    """What autograd hands to the backward, for the loss as a user writes it."""
    w, V = w.clone().requires_grad_(), V.clone().requires_grad_()
    if point.loss == "vectors":
        loss = (G * V).sum()
    elif point.loss == "spectral":
        image = torch.exp(w / scale[:, None].to(w.dtype))
        loss = (G.conj() * ((V * image[:, None, :].to(V.dtype)) @ V.mH)).real.sum()
    else:
        low = V[..., : point.cluster]
        loss = (G.conj() * (low @ low.mH)).real.sum()
    return torch.autograd.grad(loss, (w, V), allow_unused=True)


def _dedicated(point: Point, A: Tensor, G: Tensor, scale: Tensor) -> Tensor:
    """The same gradient by the op that is made for the loss."""
    A = A.clone().requires_grad_()
    if point.loss == "spectral":
        image = stablekern.spectral_function(A / scale[:, None, None].to(A.real.dtype), "exp")
    else:
        image = stablekern.eigenprojector(A, point.cluster)
    return torch.autograd.grad(image, A, G)[0]


def measure(point: Point, modes: Iterable[str] = MODES) -> list[dict]:
    """Per mode: the errors of each item of the batch, and these over their bounds."""
    generator = _generator(point)
    A, scale = matrices(point, generator)
    weight = weights(point, A, generator)
    w, V = spine.eigh(A)
    grad_w, grad_V = _cotangents(point, w, V, weight, scale)
    high = torch.complex128 if point.dtype.is_complex else torch.float64
    norm, eps, n = torch.linalg.matrix_norm, torch.finfo(w.dtype).eps, point.n
    values, vectors, G = w.double(), V.to(high), weight.to(high)
    unit = values.abs().amax(-1)[:, None, None]
    gap = (values[:, :, None] - values[:, None, :]).abs()
    delta = spine.gap_rule("eigh", "auto", None, w.dtype)[1] * unit
    M = vectors.mH @ grad_V.to(high)
    invariant = torch.eye(n, dtype=torch.bool)
    if point.loss == "vectors":
        # No derivative where eigenvalues repeat: the right value of the documented stand-in is what can be asked for.
        signed = values[:, None, :] - values[:, :, None]
        T = (M - M.mT) / 2 * signed / (gap.square() + delta.square())
        bias, exact = torch.zeros_like(gap), None
    else:
        slopes = divided(point, values, scale)
        T = slopes * (vectors.mH @ G @ vectors)
        invariant = invariant | (slopes == 0)
        bias = T.abs() * delta.square() / (gap.square() + delta.square())
        true_w, true_V = torch.linalg.eigh(A.to(high))
        exact = true_V @ (divided(point, true_w, scale) * (true_V.mH @ G @ true_V)) @ true_V.mH
    own = vectors @ T @ vectors.mH
    limit = numerics.EIGH_NOISE_KAPPA.value * eps * torch.linalg.vector_norm(M, dim=-2).amax(-1)[:, None, None]
    pair = torch.where(invariant, 0.0, limit / torch.maximum(gap, 2 * delta) + bias)
    bound = norm(pair) + 4 * n * eps * norm(T)
    moved, cut = 5 * n * eps * unit[:, 0, 0], torch.full_like(unit[:, 0, 0], torch.inf)
    if point.cluster < n:
        cut = gap[:, point.cluster - 1, point.cluster]
    results = []
    for mode in modes:
        if mode == "dedicated":
            if point.loss == "vectors":
                continue
            found = _dedicated(point, A, weight, scale).to(high)
        else:
            rule = spine.gap_rule("eigh", mode, None, w.dtype)
            found = spine.backward_of(w, V.mT.contiguous(), grad_w, grad_V.mT.contiguous(), *rule).to(high)
        # Where the computed eigenvalues leave no gap at the cut there is no derivative: finite is all that is asked.
        against = torch.where(torch.isfinite(norm(own)), norm(found - own), 0 * norm(found))
        result = {"mode": mode, "error": norm(found - own) / norm(own), "own": _over(against, bound)}
        if exact is not None:
            result["error"] = norm(found - exact) / norm(exact)
        if point.loss in ("projector", "tiny"):
            # An open cut: one that the decomposition's own error leaves open.
            whole = torch.where(moved <= cut / 4, bound + 9 * moved * norm(G) / cut.square(), torch.inf)
            result["true"] = _over(norm(found - exact), whole)
        results.append(result)
    return results


def _over(error: Tensor, bound: Tensor) -> Tensor:
    """error / bound; 0 for 0/0, and NaN stays."""
    return torch.where(error == 0, 0.0, error / bound)


def _number(x: float) -> float | None:
    """Three digits for the line; None for what is not finite."""
    return float(f"{x:.3g}") if math.isfinite(x) else None


def line(loss: str, dtype: torch.dtype, n: int) -> dict:
    """One result line: per mode the worst error for each (cut or cross, inner), and the worst quotients with bounds."""
    modes: dict[str, dict] = {}
    for point in points((n,)):
        if (point.loss, point.dtype) != (loss, dtype):
            continue
        row = GAPS.index(point.cross if loss == "tiny" else point.cut)
        for result in measure(point, (*MODES, "dedicated")):
            entry = modes.setdefault(result["mode"], {"errors": torch.zeros(len(GAPS), len(INNER)).double()})
            if point.cluster < n or loss in ("spectral", "vectors"):  # without a cut a projector's gradient is 0
                errors = result["error"].view(len(SCALES), len(INNER)).amax(0)
                entry["errors"][row] = torch.maximum(entry["errors"][row], errors)
            for key in ("own", "true"):
                if key in result and not (key == "own" and result["mode"] == "dedicated"):
                    entry[key] = _larger(entry.get(key, 0.0), float(result[key].amax()))
    for entry in modes.values():
        entry["errors"] = [[_number(float(x)) for x in row] for row in entry["errors"]]
        entry |= {key: _number(entry[key]) for key in ("own", "true") if key in entry}
    name = str(dtype).removeprefix("torch.")
    return {"op": OP, "case": f"{loss}, {name}, n={n}", "loss": loss, "dtype": name, "n": n, "modes": modes}


def _larger(a: float, b: float) -> float:
    return b if not b <= a else a  # NaN is larger than all


def combinations() -> Iterator[tuple[str, torch.dtype, int]]:
    """The lines of the whole sweep."""
    return iter(dict.fromkeys((point.loss, point.dtype, point.n) for point in points()))


def stored(device: Path) -> dict[str, dict]:
    """The newest line of each case in a folder of bench/results."""
    path = device / f"{OP}.jsonl"
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else ())
    return {found["case"]: found for found in lines}


def draw(lines: dict[str, dict], target: Path) -> None:
    """Errors in float32, n = 19, over the gaps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # The same file from the same lines, with text as text.
    matplotlib.rcParams |= {"svg.hashsalt": OP, "svg.fonttype": "none"}
    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    inside = max(i for i, gap in enumerate(INNER) if gap <= 1e-4)
    panels = (
        ("projector", "Projector on a cluster, cut 0.1", "gap inside the cluster", INNER, lambda e: e[GAPS.index(0.1)]),
        (
            "projector",
            "Projector on a cluster, inner gaps 0 to 1e-4",
            "gap at the cut",
            GAPS,
            lambda e: [_worst(row[: inside + 1]) for row in e],
        ),
        (
            "tiny",
            "Projector, cotangent nearly inside the cluster",
            "size of the cotangent across the cut",
            GAPS,
            lambda e: [_worst(row[: inside + 1]) for row in e],
        ),
        ("spectral", "tr(G exp A) through eigenvectors", "gap inside the cluster", INNER, lambda e: e[-1]),
    )
    names = {"dedicated": "eigenprojector / spectral_function"}
    for axis, (loss, title, label, xs, pick) in zip(axes.flat, panels, strict=True):
        for mode, entry in lines[f"{loss}, float32, n=19"]["modes"].items():
            ys = [math.inf if y is None else y for y in pick(entry["errors"])]
            shown = [max(x, GAPS[0] / 10) for x in xs]
            axis.loglog(shown, [min(y, 1e3) for y in ys], marker="o", markersize=4, label=names.get(mode, mode))
        axis.set(title=title, xlabel=label + (" (leftmost: 0)" if xs is INNER else ""), ylabel="relative error")
        axis.set_ylim(1e-8, 2e3)
        axis.grid(alpha=0.3)
        axis.minorticks_off()
    axes[0, 0].legend(fontsize=8)
    figure.suptitle("Gradient of eigh next to repeated eigenvalues: float32, n = 19; 1e3 stands for more, and for NaN")
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, metadata={"Date": None})
    plt.close(figure)


def _worst(values: list[float | None]) -> float | None:
    return None if None in values else max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure what has a line already, too")
    parser.add_argument("--draw", action="store_true", help="only draw the figure")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small; and the lines of all runs go to one folder
    marks = stamp("cpu")
    device = RESULTS / marks["device"]
    known = {} if options.again else stored(device)
    for loss, dtype, n in () if options.draw else combinations():
        if f"{loss}, {str(dtype).removeprefix('torch.')}, n={n}" not in known:
            found = line(loss, dtype, n)
            append(found | marks)
            worst = {mode: (entry.get("own"), entry.get("true")) for mode, entry in found["modes"].items()}
            print(f"{found['case']}: error over bound {worst}", flush=True)
    draw(stored(device), FIGURE)


if __name__ == "__main__":
    main()
