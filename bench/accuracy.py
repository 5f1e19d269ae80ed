"""Errors of every op and of plain torch in float32 against float64: `python -m bench.accuracy [--op eigh] [--save]`.

`--draw` draws the saved lines for the documentation. Both get the same float32 inputs. The error is the largest
deviation from what the reference of the op gives for these inputs in float64, over the largest entry of that;
"gradients" is the worst of all gradients of one random linear loss. Plain torch is the reference itself in float32.
Inputs are those of the op's spec (tests/specs).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.store import RESULTS, append, stamp

DEVICE = "cpu-intel-r-xeon-r-processor-1-threads"  # whose lines the pages show
FIGURES = RESULTS.parent.parent / "docs" / "figures" / "accuracy"
TESTS = RESULTS.parent.parent / "tests"
NOT_FINITE = "not finite"


def _studies() -> dict[str, tuple[str, tuple[int, ...], Callable[[torch.Generator, int], Any]]]:
    """op: (what grows, its sizes, arguments or (arguments, keywords) of a size)."""
    import specs.causal_conv1d
    import specs.cayley_step
    import specs.cg
    import specs.covariance_blend as cov
    import specs.eigh
    import specs.laplacian_pe
    import specs.linear_scan
    import specs.normalized_laplacian
    import specs.selective_scan
    import specs.selective_state_update
    import specs.small_cayley
    import specs.spectral_function
    import specs.ssd_scan
    import specs.ssd_state_update

    n = (4, 8, 16, 32, 64)
    length = (16, 64, 256, 1024)

    def real(g: torch.Generator, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def conv(g: torch.Generator, size: int) -> Any:
        x, weight, bias, _ = specs.causal_conv1d.inputs(g, 2, 16, size, 4)
        return (x, weight, bias), {"activation": "silu"}

    def cayley(g: torch.Generator, size: int) -> Any:
        edges = specs.cayley_step.graph(g, size, size // 2)
        weights = 0.2 + torch.rand(edges.shape[1], generator=g, dtype=torch.float64)
        return specs.cayley_step.tokens(g, 16, size), edges, weights, torch.tensor(0.1, dtype=torch.float64)

    def scan(g: torch.Generator, size: int) -> Any:
        args, state = specs.linear_scan.inputs(g, 2, 16, size)
        return args, {"initial_state": state}

    def focal(g: torch.Generator, size: int) -> Any:
        return size * real(g, 4096), torch.randint(0, 2, (4096,), generator=g).double()

    def pairs(g: torch.Generator, size: int) -> torch.Tensor:
        return torch.rand(2, size * (size - 1) // 2, 8, generator=g, dtype=torch.float64)

    return {
        "assemble_adjacency": ("nodes", n, lambda g, s: ((pairs(g, s), s), {})),
        "causal_conv1d": ("steps", length, conv),
        "cayley_step": ("nodes", (*n, 128), cayley),
        "cg": ("unknowns", n, lambda g, s: (specs.cg.spread(g, (8,), s), real(g, 8, s))),
        "chol_solve_safe": ("channels", n, lambda g, s: (cov.covariances(g, 8, s), cov.normal(g, 8, s, 4))),
        "cosine_edges": ("features", n, lambda g, s: (real(g, 2, 19, 16, s),)),
        "covariance_blend": ("channels", n, lambda g, s: (
            (cov.covariances(g, 8, s), cov.covariances(g, 8, s)), {"beta": 0.3, "shrink": 0.1, "loading": 1.0},
        )),
        "eigengap_hinge": ("channels", n, lambda g, s: (specs.eigh.separated(g, (8,), s, dtype=cov.COMPLEX), 3, 1.0)),
        "eigenprojector": ("n", n, lambda g, s: (specs.eigh.separated(g, (8,), s), 3)),
        "eigh": ("n", n[:-1], lambda g, s: (specs.eigh.separated(g, (16,), s),)),
        "eigvalsh": ("n", n, lambda g, s: (specs.eigh.separated(g, (16,), s),)),
        "finite_stats": ("entries", (64, 1024, 16384), lambda g, s: ([real(g, s)],)),
        "focal_loss": ("spread of the logits", (1, 4, 16, 64), focal),
        "gated_rms_norm": ("features", n, lambda g, s: (real(g, 64, s), real(g, 64, s), real(g, s))),
        "laplacian_pe": ("nodes", (4, 6, 8), lambda g, s: (
            (specs.laplacian_pe.separated_graphs(g, (8, 2), s), 3), {"grad": "auto"},
        )),
        "linear_scan": ("steps", length, scan),
        "mvdr_denominator": ("channels", n, lambda g, s: (cov.covariances(g, 8, s), cov.normal(g, s, 16), 0.01)),
        "normalized_laplacian": ("nodes", n, lambda g, s: (specs.normalized_laplacian.dense_graphs(g, (16,), s),)),
        "ridge_lstsq": ("unknowns", n, lambda g, s: (cov.normal(g, 8, 6, s), cov.normal(g, 8, 6), 0.1)),
        "sample_covariance": ("snapshots", length, lambda g, s: (cov.normal(g, 4, s, 12),)),
        "selective_scan": ("steps", length, lambda g, s: specs.selective_scan.inputs(g, 2, 8, s, 1, 16)),
        "selective_state_update": ("states", n, lambda g, s: (
            specs.selective_state_update.inputs(g, 2, (40,), None, s)
        )),
        "small_cayley": ("n", n[:-1], lambda g, s: (specs.small_cayley.skew(g, 16, s),)),
        "spectral_function": ("n", n, lambda g, s: (specs.spectral_function.definite(g, (16,), s), "exp")),
        "ssd_scan": ("steps", length, lambda g, s: specs.ssd_scan.inputs(g, 2, s, 2, 8, 1, 16)),
        "ssd_state_update": ("states", n, lambda g, s: specs.ssd_state_update.inputs(g, 2, 4, 8, 1, s)),
        "subspace_residual": ("channels", n, lambda g, s: (cov.covariances(g, 8, s), cov.normal(g, 8, s, 3))),
    }  # fmt: skip


def measure(op: str, backend: str = "native") -> list[dict]:
    """One line for each size."""
    sys.path[:0] = [] if str(TESTS) in sys.path else [str(TESTS)]
    import specs
    import stablekern
    from stablekern.testing import suite

    axis, sizes, make = _studies()[op]
    (spec,) = (spec for spec in specs.all_specs() if spec.name == op)
    lines = []
    for size in sizes:
        made = make(torch.Generator().manual_seed(zlib.crc32(f"{op} {size}".encode())), size)
        args, keywords = made if len(made) == 2 and isinstance(made[1], dict) else (made, {})
        args, keywords = suite.cast((tuple(args), keywords), torch.float32, "cpu")
        sample = specs.Sample("random", args, keywords)
        exact, plain = (
            suite.run(spec, spec.reference, sample, dtype, "cpu", spec.differentiable)
            for dtype in (torch.float64, torch.float32)
        )
        with stablekern.use_backend(backend if spec.dispatched and native(op) else None):
            ours = suite.run(spec, spec.op, sample, torch.float32, "cpu", spec.differentiable)
        line: dict[str, Any] = {"op": "accuracy", "case": op, "direction": axis, "size": size, "dtype": "float32"}
        for index, kind in enumerate(("outputs", "gradients")):
            for who, values in (("ours", ours), ("plain", plain)):
                errors = [
                    suite.error(a, e)
                    for a, e in zip(values[index], exact[index], strict=True)
                    if e.is_floating_point() or e.is_complex()
                ]
                line[f"{who}_{kind}"] = _kept(errors)
        lines.append(line)
    return lines


def _kept(errors: list[float]) -> float | str | None:
    """The largest, to three digits; JSON has no NaN."""
    if not errors:
        return None
    return float(f"{max(errors):.3g}") if all(map(math.isfinite, errors)) else NOT_FINITE


def native(op: str) -> bool:
    """Whether the op has a native kernel; a composite of others runs on theirs."""
    from stablekern import _registry

    return "native" in _registry._launchers.get(f"{op}_fwd", {}).get("cpu", {})


def saved(device: Path) -> dict[str, list[dict]]:
    """The newest line of each op and size, by op."""
    found: dict[str, dict[int, dict]] = {}
    path = device / "accuracy.jsonl"
    if path.is_file():
        for line in map(json.loads, path.read_text().splitlines()):
            found.setdefault(line["case"], {})[line["size"]] = line
    return {op: [lines[size] for size in sorted(lines)] for op, lines in sorted(found.items())}


def _number(value: float | str | None) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else "0" if value == 0 else f"{value:.1e}"


def _rows(lines: list[dict]) -> list[str]:
    return [
        f"| {line['direction']} {line['size']} | {_number(line['ours_outputs'])} | {_number(line['plain_outputs'])} "
        f"| {_number(line['ours_gradients'])} | {_number(line['plain_gradients'])} |"
        for line in lines
    ]


_HEAD = ["| | Ours | Plain torch | Gradients: ours | Plain torch |", "|---|---|---|---|---|"]
_WHAT = (
    "Largest error in float32 over the largest exact entry, against the reference in float64 on the same inputs; plain "
    "torch is the reference in float32 (`python -m bench.accuracy`). The grey line of a figure is float32's eps."
)


def section(names: list[str], up: str) -> str:
    """Markdown for the page of an op: the figure and the table of each of its functions that was measured."""
    parts = []
    for op, lines in saved(RESULTS / DEVICE).items():
        if op in names:
            parts += [f"![Error of {op} in float32]({up}figures/accuracy/{op}.svg)", "\n".join(_HEAD + _rows(lines))]
    return "\n\n".join([*parts, _WHAT]) if parts else ""


def table() -> str:
    """Markdown: the largest size of every op."""
    rows = []
    for op, lines in saved(RESULTS / DEVICE).items():
        (row,) = _rows(lines[-1:])
        rows.append(f"| `{op}`, {row.removeprefix('| ')}")
    return "\n".join([*_HEAD, *rows, "", _WHAT])


def draw(op: str, lines: list[dict], path: Path) -> None:
    """Error against size, logarithmic both; a line ends where the error is exactly 0."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    kinds = [kind for kind in ("outputs", "gradients") if lines[0][f"ours_{kind}"] is not None]
    figure = Figure(figsize=(4 * len(kinds) + 0.5, 2.8), layout="constrained")
    eps = torch.finfo(torch.float32).eps
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for who, label, style in (("ours", "stablekern", "o-"), ("plain", "plain torch", "s--")):
            points = [(line["size"], line[f"{who}_{kind}"]) for line in lines]
            color = "#2f6f9f" if who == "ours" else "#c98b2b"
            axes.plot(
                *zip(*((x, math.nan if y in (0, NOT_FINITE) else y) for x, y in points), strict=True),
                style,
                label=label,
                color=color,
            )
        axes.axhline(eps, color="#999", lw=0.8)
        axes.set(xscale="log", yscale="log", xlabel=lines[0]["direction"], title=f"error of the {kind}")
        axes.set_xticks([line["size"] for line in lines], [str(line["size"]) for line in lines])
        axes.minorticks_off()
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": op, "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def main() -> None:
    sys.path[:0] = [str(TESTS)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="comma-separated ops; all by default")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    parser.add_argument("--draw", action="store_true", help="draw the saved lines; measures nothing")
    options = parser.parse_args()
    if options.draw:
        for op, lines in saved(RESULTS / DEVICE).items():
            draw(op, lines, FIGURES / f"{op}.svg")
        return
    known = _studies()
    wanted = options.op.split(",") if options.op else list(known)
    if unknown := set(wanted) - set(known):
        parser.error(f"--op: unknown {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    for op in wanted:
        for line in measure(op):
            print(f"{op:<24}", _rows([line])[0], flush=True)
            if options.save:
                append({**line, **stamp("cpu")})


if __name__ == "__main__":
    main()
