"""The speed tables of README.md and docs/speed.md and their figure, from the newest committed result line of each case.

`python -m bench.report [--write]`
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path

from bench.store import RESULTS

ROOT = RESULTS.parent.parent
README, PAGE = ROOT / "README.md", ROOT / "docs" / "speed.md"
FIGURE = ROOT / "docs" / "figures" / "speed.svg"
DEVICE = "cpu-intel-r-xeon-r-processor-2-threads"
BEGIN, END = "<!-- speed: begin (python -m bench.report --write) -->", "<!-- speed: end -->"

# The workloads that the package is for: op, how the case begins, directions, what the baseline's name holds.
HEADLINE = (
    ("eigh", "15360x19x19 dense", ("fwd", "fwd+bwd"), "torch.linalg.eigh"),
    ("eigh", "15360x19x19 top-3", ("fwd", "fwd+bwd"), "torch.linalg.eigh"),
    ("laplacian_pe", "3840x19x19", ("fwd+bwd",), "chain"),
    ("eigh", "64x144x144", ("fwd",), "torch.linalg.eigh"),
    ("eigenprojector", "64x144x144", ("fwd+bwd",), "torch.linalg.eigh"),
    ("eigvalsh", "64x144x144", ("fwd",), "torch.linalg.eigvalsh"),
    ("selective_scan", "(8,128,960,16)", ("fwd", "fwd+bwd"), "mambapy"),
    ("ssd_scan", "(76,960,16,8) n=16", ("fwd+bwd",), "sequential torch loop"),
    ("cosine_edges", "(4,19,960,64)", ("fwd", "fwd+bwd"), "einsum"),
    ("ComplexAdamW", "T>0, 1e7 reals, complex in 100", ("step",), ""),
    ("GradGuard", "1e7 in 1000", ("step",), "clip_grad_norm_"),
    ("cg", "256 x n=64", ("fwd",), "Cholesky"),
    ("cayley_step", "", ("fwd+bwd",), "torch.linalg.solve"),
    ("focal_loss", "1e7, gamma 2", ("fwd", "fwd+bwd"), "composite"),
)


def newest(device: Path) -> dict[tuple[str, ...], dict]:
    """The last line of each (op, case, direction, baseline) in a device's folder, taken with the system's allocator."""
    found = {}
    for path in sorted(device.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            result = json.loads(line)
            if result.get("allocator", "system") == "system":
                found[tuple(result.get(name, "") for name in ("op", "case", "direction", "baseline"))] = result
    return found


def _timed(device: Path) -> list[dict]:
    """The lines that compare an op with a baseline."""
    return [r for r in newest(device).values() if "ratio" in r and "share_of_limit" in r]


def headlines(timed: list[dict]) -> list[dict]:
    """The lines of `HEADLINE`, in its order."""
    return [
        r
        for op, case, directions, baseline in HEADLINE
        for r in timed
        if r["op"] == op and r["case"].startswith(case) and r["direction"] in directions and baseline in r["baseline"]
    ]


def _row(r: dict) -> str:
    return (
        f"| `{r['op']}` {r['case']}, {r['direction']} | {r['baseline']} | {r['baseline_ms']:.1f} ms | {r['ms']:.2f} ms "
        f"| {r['ratio']:.{1 if r['ratio'] >= 1 else 2}f}x | {100 * r['share_of_limit']:.0f} % |"
    )


def _table(rows: list[dict]) -> list[str]:
    return [
        "| Op and workload | Against | Its time | Ours | Ratio of medians | Share of the limit |",
        "|---|---|---|---|---|---|",
        *(_row(r) for r in rows),
    ]


def _machine(rows: list[dict]) -> str:
    flops, copies = (statistics.median(r[name] for r in rows) for name in ("limit_gflops", "limit_gbytes_per_s"))
    return (
        f"Measured on {rows[-1]['device']}, torch {rows[-1]['torch']}: turns of at least 30 ms of either side, "
        "one after the other in one run, with glibc's default allocator. The limit is the larger of flops and bytes "
        f"over what a matrix product ({flops:.0f} GFLOP/s, the median of the runs) and a copy ({copies:.0f} GB/s) "
        "reached in that run."
    )


def _builds(taken: dict[str, float]) -> str:
    parts = ", ".join(f"{seconds:.0f} s for `{op}`" for op, seconds in taken.items() if op != "all")
    return f"{parts}; {taken['all']:.0f} s for everything at once"


def _steps(results: list[dict]) -> list[str]:
    lines = [
        f"One training step of the detector, {r['case']}: {r['ms']:.0f} ms." for r in results if r["op"] == "detector"
    ]
    lines += [
        f"{r['case']}, forward and backward: {r['ms']:.1f} ms, {r['ratio']:.0f}x {r['baseline']}."
        for r in results
        if r["op"] == "block"
    ]
    lines += [
        f"`import stablekern` adds {max(r['import_added_s'], 0.0):.2f} s to `import torch`; "
        f"the first call of an op compiles its part of the kernels: {_builds(r['first_build_s'])}."
        for r in results
        if r["op"] == "startup"
    ]
    return lines


def table(device: Path) -> str:
    """Markdown for the README: the headline rows, what the machine was, and the steps of whole models."""
    timed = _timed(device)
    rest = [f"{line}\\" for line in _steps(list(newest(device).values()))]
    return "\n".join([*_table(headlines(timed)), "", _machine(timed), "", *rest]).removesuffix("\\")


def page(device: Path) -> str:
    """Markdown for docs/speed.md: every row, an op at a time."""
    timed = _timed(device)
    return "\n".join([*_table(timed), "", _machine(timed)])


def section(names: list[str]) -> str:
    """Markdown for the page of an op: its rows, and what the machine was; empty if it was not timed."""
    rows = [r for r in _timed(RESULTS / DEVICE) if r["op"] in names]
    return "\n".join([*_table(rows), "", _machine(rows)]) if rows else ""


def draw(device: Path, path: Path) -> None:
    """Bars of the headline ratios, logarithmic, the gate of each as a line across it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = headlines(_timed(device))[::-1]
    figure = Figure(figsize=(9, 0.34 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    met = [r["gate"] is None or r["ratio"] >= r["gate"] for r in rows]
    axes.barh(range(len(rows)), [r["ratio"] for r in rows], color=["#2f6f9f" if m else "#c98b2b" for m in met])
    for i, r in enumerate(rows):
        if r["gate"] is not None:
            axes.plot([r["gate"]] * 2, [i - 0.4, i + 0.4], color="#222", lw=1.5)
        axes.text(r["ratio"] * 1.06, i, f"{r['ratio']:.1f}x", va="center", fontsize=8)
    names = [f"{r['op']} {r['case']}, {r['direction']}" for r in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.axvline(1, color="#999", lw=0.8)
    axes.set(xscale="log", xlabel="times faster than the baseline; black: the gate of the project; amber: below it")
    axes.margins(x=0.15)
    with rc_context({"svg.hashsalt": "speed", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def filled(text: str, body: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with everything between the two marks replaced."""
    before, _, tail = text.partition(begin)
    after = tail.partition(end)[2]
    return f"{before}{begin}\n{body}\n{end}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=DEVICE, help="folder of bench/results")
    parser.add_argument(
        "--write", action="store_true", help="put the tables into README.md and docs/speed.md, and draw"
    )
    options = parser.parse_args()
    device = RESULTS / options.device
    for path, body in ((README, table(device)), (PAGE, page(device))):
        if options.write:
            temporary = path.with_suffix(".partial")
            temporary.write_text(filled(path.read_text(), body))
            temporary.replace(path)
        sys.stdout.write(body + "\n\n")
    if options.write:
        temporary = FIGURE.with_suffix(".partial")
        draw(device, temporary)
        temporary.replace(FIGURE)


if __name__ == "__main__":
    main()
