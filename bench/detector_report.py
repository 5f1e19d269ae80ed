"""The figures of docs/detector.md, from the newest committed result lines: `python -m bench.detector_report [--write]`.

Time of each part of a training step and memory per batch size (`python -m bench.model --parts --save`), the soak
(`make soak`), streaming (`python -m bench.streaming --save`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from bench.report import filled
from bench.store import RESULTS

ROOT = RESULTS.parent.parent
PAGE = ROOT / "docs" / "detector.md"
FIGURE = ROOT / "docs" / "figures" / "detector.svg"
BEGIN, END = "<!-- detector: begin (python -m bench.detector_report --write) -->", "<!-- detector: end -->"
GPU_GIB, FULL_BATCH = 24, 8  # the memory and the batch size that a full training step is meant for
MISSING = "No line of it is committed yet."


def lines(op: str) -> list[dict]:
    """The newest line of each case of an op, of the machine that measured last."""
    found: dict[str, dict] = {}
    paths = RESULTS.glob(f"*/{op}.jsonl")
    for result in sorted(
        (json.loads(text) for path in paths for text in path.read_text().splitlines()), key=lambda r: r["date"]
    ):
        found[f"{result['case']} {result.get('baseline', '')}"] = result
    last = max(((r["date"], r["device"]) for r in found.values()), default=("", ""))[1]
    return sorted((r for r in found.values() if r["device"] == last), key=lambda r: r["case"])


def soak() -> list[dict]:
    return [json.loads(text) for text in (RESULTS / "soak" / "training.jsonl").read_text().splitlines()]


def step_seconds(result: dict, backend: str = "native") -> float:
    return sum(part["forward"] + part["backward"] for part in result[f"{backend}_parts"])


def compared() -> dict | None:
    """The step that was taken on both backends."""
    return next((r for r in lines("detector_parts") if r["ratio_without_encoder"]), None)


def memory(recompute: bool) -> tuple[list[int], list[float], tuple[float, float]] | None:
    """Batch sizes, peaks in GiB, and the line through them (per window, at none); None for fewer than two sizes."""
    rows = [r for r in lines("detector_parts") if not r["ratio_without_encoder"] and r["recompute"] == recompute]
    batches, peaks = [r["batch"] for r in rows], [r["native_peak_gib"] for r in rows]
    if len(rows) < 2:
        return None
    slope, start = np.polyfit(batches, peaks, 1)
    return batches, peaks, (float(slope), float(start))


def _parts_table() -> list[str]:
    both = compared()
    if both is None:
        return [MISSING]
    rows = [
        f"| {ours['part']} | {1e3 * ours['forward']:.0f} | {1e3 * ours['backward']:.0f} "
        f"| {1e3 * theirs['forward']:.0f} | {1e3 * theirs['backward']:.0f} |"
        for ours, theirs in zip(both["native_parts"], both["torch_parts"], strict=True)
    ]
    return [
        "| Part, ms | Forward | Backward | Forward, torch | Backward, torch |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"{both['case']}, {both['threads']} threads of {both['device']}: {step_seconds(both):.2f} s a step, "
        f"{step_seconds(both, 'torch'):.1f} s with the plain torch backend of every op; without the encoder, which is "
        f"torch's convolutions in both, {both['ratio_without_encoder']:.1f} times faster.",
        "",
        *_larger_steps(),
    ]


def _larger_steps() -> list[str]:
    """The parts of the steps of larger batches, our kernels alone."""
    steps = [r for r in lines("detector_parts") if not r["ratio_without_encoder"] and not r["recompute"]]
    steps = sorted((r for r in steps if r["batch"] > 1), key=lambda r: r["batch"])
    names = [part["part"] for part in steps[0]["native_parts"]] if steps else []
    heads = [f"{way}, B = {r['batch']}" for r in steps for way in ("Forward", "Backward")]
    rows = [
        [f"{1e3 * r['native_parts'][i][way]:.0f}" for r in steps for way in ("forward", "backward")]
        for i in range(len(names))
    ]
    table = [f"| {name} | {' | '.join(row)} |" for name, row in zip(names, rows, strict=True)]
    return [f"| Part, ms | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|", *table] if steps else []


def _memory_table() -> list[str]:
    found = {recompute: memory(recompute) for recompute in (False, True)}
    if not any(found.values()):
        return [MISSING]
    steps = {(r["batch"], r["recompute"]): r for r in lines("detector_parts") if not r["ratio_without_encoder"]}

    def cell(batch: int, recompute: bool) -> str:
        r = steps.get((batch, recompute))
        return "not run | " if r is None else f"{r['native_peak_gib']:.1f} GiB | {step_seconds(r):.2f} s"

    text = [
        "| Windows a step | Largest resident set | Step | ... recomputing | Step |",
        "|---|---|---|---|---|",
        *(f"| {b} | {cell(b, False)} | {cell(b, True)} |" for b in sorted({b for b, _ in steps})),
        "",
    ]
    for recompute, name in ((False, "Everything kept"), (True, "Recomputing")):
        if found[recompute] is None:
            continue
        batches, _, (slope, start) = found[recompute]
        text.append(
            f"{name}: {slope:.2f} GiB a window and {start:.1f} GiB at none (line through B = "
            f"{', '.join(map(str, batches))}), so {start + slope * FULL_BATCH:.1f} of {GPU_GIB} GiB at "
            f"B = {FULL_BATCH}.\\"
        )
    return [*text[:-1], text[-1].removesuffix("\\")]


def body() -> str:
    rows = soak()
    faults = sum(n for row in rows for name, n in row["windows"].items() if name != "none")
    windows = sum(n for row in rows for n in row["windows"].values())
    streaming = [
        f"| {r['case']} | {100 * r['share_of_real_time']:.1f} % | {r['ms_median']:.2f} ms | {r['ms_largest']:.0f} ms "
        f"| {r['latency_s']:g} s | {r['device']} |"
        for r in lines("streaming")
    ]
    return "\n".join(
        [
            "## Time",
            "",
            *_parts_table(),
            "",
            "## Memory",
            "",
            *_memory_table(),
            "",
            "## The soak",
            "",
            f'{rows[-1]["step"]} steps of "nano", {faults} of {windows} windows with a fault: '
            f"{sum(row['not_finite'] for row in rows)} non-finite values, the largest gradient norm "
            f"{max(row['grad_norm_largest'] for row in rows):.1f}, the loss from {rows[0]['loss']:.4f} (mean of the "
            f"first {rows[0]['step']} steps) to {rows[-1]['loss']:.4f} (of the last).",
            "",
            "## Streaming",
            "",
            "| Detector | Of real time, one thread | Push, median | Push, largest | Latency at most | Machine |",
            "|---|---|---|---|---|---|",
            *streaming,
        ]
    )


def draw(path: Path) -> None:
    """Time per part, memory per batch size, the soak's curve."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    time, peak, curve = figure.subplots(1, 3)
    if (both := compared()) is not None:
        names = [part["part"] for part in both["native_parts"]]
        forward, backward = ([1e3 * part[way] for part in both["native_parts"]] for way in ("forward", "backward"))
        time.barh(names, forward, color="#2f6f9f", label="forward")
        time.barh(names, backward, left=forward, color="#9fc5e0", label="backward")
        time.invert_yaxis()
        time.set(xlabel="ms", title=both["case"])
        time.legend()
    for recompute, colour in ((False, "#c98b2b"), (True, "#2f6f9f")):
        if (found := memory(recompute)) is None:
            continue
        batches, peaks, (slope, start) = found
        peak.plot(batches, peaks, "o", color=colour, label="recomputing" if recompute else "everything kept")
        peak.plot([0, FULL_BATCH], [start, start + FULL_BATCH * slope], color=colour, lw=0.8)
    peak.axhline(GPU_GIB, color="#222", lw=0.8)
    peak.set(xlabel="windows a step", ylabel="GiB", title="largest resident set", ylim=(0, 26))
    if peak.get_legend_handles_labels()[0]:
        peak.legend()
    rows = soak()
    curve.semilogy([r["step"] for r in rows], [r["loss"] for r in rows], color="#2f6f9f", label="loss")
    norms = [r["grad_norm_median"] for r in rows]
    curve.semilogy([r["step"] for r in rows], norms, color="#c98b2b", label="gradient norm, median")
    curve.set(xlabel="step", title="soak with faults in the data")
    curve.legend()
    with rc_context({"svg.hashsalt": "detector", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/detector.md, and draw")
    options = parser.parse_args()
    text = body()
    sys.stdout.write(text + "\n")
    if options.write:
        temporary = PAGE.with_suffix(".partial")
        temporary.write_text(filled(PAGE.read_text(), text, BEGIN, END))
        temporary.replace(PAGE)
        temporary = FIGURE.with_suffix(".partial")
        draw(temporary)
        temporary.replace(FIGURE)


if __name__ == "__main__":
    main()
