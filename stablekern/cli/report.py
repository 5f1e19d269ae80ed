"""The report of a run: one HTML file that holds its figures, needs no network, and reads the same in ten years.

The figures are drawn by matplotlib without a display. Each has a text that says what it shows in numbers, for readers
who cannot see it. Colours are Okabe and Ito's, told apart under any colour blindness, and never the only difference.
"""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator, NullFormatter, StrMethodFormatter

__all__ = ["Comparison", "HeldOut", "render"]

_BLUE, _ORANGE, _GREEN, _GREY, _INK = "#0072B2", "#D55E00", "#009E73", "#8A8F98", "#1D2330"
_BAND = "#F6D8C4"  # the orange, light: behind curves
_DPI = 160
_SMOOTH = 15  # steps in the moving mean of the loss
_SPAN = 16.0  # seconds of the window shown
_TRACES = 8  # electrodes shown


@dataclass(frozen=True)
class Comparison:
    """One batch done again with the backward of torch.linalg.eigh; its norm is NaN where the gradient is not finite."""

    step: int
    grad_norm: float
    finite: bool


@dataclass(frozen=True)
class HeldOut:
    """The part that the model never saw: `data` (channels, samples), and `labels`, `probability` (samples,) each."""

    data: np.ndarray
    labels: np.ndarray
    probability: np.ndarray
    sample_rate: float
    channels: tuple[str, ...]
    start: float  # s into the recording


# ---- figures -------------------------------------------------------------------------------------------------------


def _figure(height: float, rows: int = 1, ratios: Sequence[float] = (1.0,)) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(9.2, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#C5C9D0")
        axis.tick_params(colors=_INK, length=3, width=0.6, labelsize=9)
        axis.grid(True, color="#ECEEF1", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.margins(x=0.01)
    return figure, list(axes)


def _legend(axis: Any, columns: int) -> None:
    """Above the plot at the right, where it covers nothing."""
    axis.legend(frameon=False, fontsize=9, ncols=columns, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _moving_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the last `width` values that are finite, NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    start = np.maximum(np.arange(len(values)) + 1 - width, 0)
    stop = np.arange(len(values)) + 1
    with np.errstate(invalid="ignore"):
        return (sums[stop] - sums[start]) / np.where(counts[stop] > counts[start], counts[stop] - counts[start], np.nan)


def loss_figure(steps: Sequence[dict[str, Any]]) -> Figure:
    """Loss against step, with a moving mean; steps that were not finite are marked at the bottom."""
    figure, (axis,) = _figure(2.9)
    number = np.array([s["step"] for s in steps])
    loss = np.array([math.nan if s["loss"] is None else s["loss"] for s in steps])
    axis.plot(number, loss, color=_BLUE, alpha=0.35, linewidth=1.0, label="each step")
    axis.plot(
        number, _moving_mean(loss, _SMOOTH), color=_BLUE, linewidth=2.0, label=f"mean of the last {_SMOOTH} steps"
    )
    axis.set_ylim(bottom=0)
    _mark(axis, [s["step"] for s in steps if not s["finite"]], "not finite")
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("focal loss")
    _legend(axis, 3)
    return figure


def gradient_figure(steps: Sequence[dict[str, Any]], comparisons: Sequence[Comparison], max_norm: float) -> Figure:
    """Gradient norm against step, and that with the backward of torch.linalg.eigh, on a logarithmic axis."""
    figure, (axis,) = _figure(3.3)
    norm = [math.nan if s["grad_norm"] is None else s["grad_norm"] for s in steps]
    axis.plot([s["step"] for s in steps], norm, color=_BLUE, linewidth=1.4, label="stablekern")
    good = [c for c in comparisons if c.finite]
    if good:
        axis.plot(
            [c.step for c in good],
            [c.grad_norm for c in good],
            "o",
            color=_ORANGE,
            markerfacecolor="none",
            markersize=5,
            label="same batch, torch.linalg.eigh",
        )
    axis.set_yscale("log")
    axis.axhline(max_norm, color=_GREY, linestyle="--", linewidth=1, label=f"clipped to {max_norm:g}")
    _mark(axis, [c.step for c in comparisons if not c.finite], "torch.linalg.eigh: not finite")
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel("gradient norm")
    _legend(axis, 4)
    return figure


def _mark(axis: Any, steps: Sequence[int], label: str) -> None:
    """Crosses along the top of a plot."""
    if steps:
        axis.plot(steps, [0.98] * len(steps), "x", color=_ORANGE, transform=axis.get_xaxis_transform(), label=label)


def _runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """(First sample, sample after the last) of each stretch of ones."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], labels > 0.5, [0]]).astype(int)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _shade(axis: Any, held: HeldOut, label: str | None = None) -> None:
    for index, (start, stop) in enumerate(_runs(held.labels)):
        span = (held.start + start / held.sample_rate, held.start + stop / held.sample_rate)
        axis.axvspan(*span, color=_BAND, linewidth=0, label=label if index == 0 else None)


def _probability(axis: Any, held: HeldOut, samples: slice) -> None:
    time = held.start + np.arange(held.labels.size)[samples] / held.sample_rate
    axis.plot(time, held.probability[samples], color=_BLUE, linewidth=1.4, label="predicted probability")
    axis.axhline(0.5, color=_GREY, linestyle="--", linewidth=1)
    axis.set_ylim(-0.03, 1.03)
    axis.set_yticks([0, 0.5, 1])
    axis.set_ylabel("probability")
    axis.set_xlabel("seconds into the recording")


def timeline_figure(held: HeldOut) -> Figure:
    """The whole held-out part: probability of every sample, discharges shaded."""
    figure, (axis,) = _figure(2.4)
    _shade(axis, held, "discharge (true)")
    _probability(axis, held, slice(None))
    axis.set_xlim(held.start, held.start + held.labels.size / held.sample_rate)
    _legend(axis, 2)
    return figure


def _shown(held: HeldOut) -> slice:
    """The samples of the window shown: around the onset of the first discharge, a third before it."""
    length = min(round(_SPAN * held.sample_rate), held.labels.size)
    runs = _runs(held.labels)
    onset = runs[0][0] if runs else 0
    start = min(max(0, onset - length // 3), held.labels.size - length)
    return slice(start, start + length)


def window_figure(held: HeldOut) -> Figure:
    """A held-out window: electrodes in order of their energy in it, the true discharge shaded, the prediction below."""
    figure, (traces, probability) = _figure(5.6, 2, (3.2, 1))
    samples = _shown(held)
    data = held.data[:, samples]
    strongest = np.sort(np.argsort(-data.std(axis=1))[:_TRACES])
    step = 2.5 * float(np.median(np.abs(data[strongest]).max(axis=1)).clip(1.0))
    time = held.start + np.arange(held.labels.size)[samples] / held.sample_rate
    for axis in (traces, probability):
        _shade(axis, held, "discharge (true)" if axis is traces else None)
    for row, channel in enumerate(strongest):
        traces.plot(time, data[channel] - row * step, color=_INK, linewidth=0.6)
    traces.set_yticks([-row * step for row in range(len(strongest))], [held.channels[c] for c in strongest])
    traces.set_ylim(-(len(strongest) - 0.4) * step, 0.6 * step)
    traces.grid(False, axis="y")
    top, bar = 0.55 * step, 10.0  # the scale stands at the left, above the first trace
    left = time[0] + 0.012 * (time[-1] - time[0])
    traces.plot([left] * 2, [top - bar, top], color=_ORANGE, linewidth=2.5, solid_capstyle="butt")
    traces.text(left, top - bar / 2, f"  {bar:g} sigma", ha="left", va="center", fontsize=8, color=_ORANGE)
    _legend(traces, 1)
    _probability(probability, held, samples)
    probability.set_xlim(time[0], time[-1])
    probability.xaxis.set_major_locator(MultipleLocator(2))
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()


# ---- the page ------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1d2330; line-height: 1.55;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; padding-top: .9rem; border-top: 1px solid #e3e6ea; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.lead, figcaption, footer { color: #4a5160; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.5rem 0 0; }
.tiles div { flex: 1 1 10rem; border: 1px solid #dfe3e8; border-radius: .5rem; padding: .7rem .9rem; }
.tiles dt { font-size: .82rem; color: #4a5160; }
.tiles dd { margin: 0; font-size: 1.55rem; font-weight: 650; font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .8rem; font-weight: 400; line-height: 1.35; color: #4a5160; }
.note { border-left: 4px solid #d55e00; background: #fdf4ee; padding: .6rem .9rem; margin: 1.2rem 0 0; }
table { border-collapse: collapse; width: 100%; margin: .6rem 0 1rem; font-size: .95rem; }
th, td { text-align: left; vertical-align: top; padding: .38rem .8rem .38rem 0; border-bottom: 1px solid #eceef1; }
tbody th { font-weight: 500; color: #4a5160; width: 15rem; }
thead th { font-weight: 650; border-bottom-color: #c5c9d0; }
.number { text-align: right; font-variant-numeric: tabular-nums; padding-right: 1.6rem; }
td { overflow-wrap: anywhere; }
figure { margin: 1rem 0 1.4rem; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; max-width: 46rem; }
ul { margin: .4rem 0 1rem; padding-left: 1.2rem; }
footer { margin-top: 3rem; font-size: .85rem; border-top: 1px solid #e3e6ea; padding-top: .9rem; }
@media (max-width: 34rem) { tbody th { width: 9rem; } }
@media print { main { padding: 0; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{heading}</h1>
<p class="lead">{lead}</p>
{stopped}
<dl class="tiles">{tiles}</dl>
{sections}
<footer>{footer}</footer>
</main>
</body>
</html>
"""

_EIGH = """The positional encoding of the graphs differentiates eigenvectors. Where an eigenvalue repeats, the
backward of torch.linalg.eigh divides by a difference that is zero. Each batch below was done twice with the same
weights, windows and dropout: as it was trained, and with torch.linalg.eigh in the forward and the backward. The counts
are those of this run: a graph with an exact repetition may or may not come up in {batches} batches. Norms are of the
finite gradients."""


def _number(value: float | None, digits: int = 4) -> str:
    return "none" if value is None else f"{value:.{digits}g}"


def _image(figure: Figure, described: str, caption: str) -> str:
    data = base64.b64encode(_png(figure)).decode()
    image = f'<img src="data:image/png;base64,{data}" alt="{html.escape(described, quote=True)}">'
    return f"<figure>{image}<figcaption>{html.escape(caption)}</figcaption></figure>"


def _facts(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and values."""
    cells = (f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>' for name, value in rows)
    return f"<table><tbody>{''.join(cells)}</tbody></table>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool) -> str:
    """A table with a head; with `numbers` all columns but the first are aligned at the right."""
    right = ' class="number"' if numbers else ""
    names = "".join(f'<th scope="col"{right if i else ""}>{html.escape(name)}</th>' for i, name in enumerate(head))
    body = ""
    for first, *rest in rows:
        cells = "".join(f"<td{right}>{html.escape(cell)}</td>" for cell in rest)
        body += f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>'
    return f"<table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table>"


def _tiles(summary: dict[str, Any]) -> str:
    bad, eigh, area, step = summary["not_finite"], summary["eigh"], summary["auroc"], summary["seconds_per_step"]
    tiles = (
        ("AUROC, held out", "none" if area is None else f"{area:.3f}", summary["auroc_note"]),
        ("Steps", str(summary["steps"]), f"of {summary['steps_asked']} asked for"),
        ("Steps not finite", str(bad["steps"]), f"{bad['skipped']} left out"),
        ("torch.linalg.eigh", f"{eigh['torch_not_finite']} of {eigh['batches']}", "batches with a non-finite gradient"),
        ("Time per step", "none" if step is None else f"{step * 1e3:.0f} ms", "median"),
    )
    return "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}<small>{html.escape(small)}</small></dd></div>"
        for name, value, small in tiles
    )


def _run(summary: dict[str, Any]) -> str:
    loss, norm, bad = summary["loss"], summary["grad_norm"], summary["not_finite"]
    course = f"{_number(loss['first'])} to {_number(loss['last'])}, mean of the last 10 {_number(loss['last_10'])}"
    counts = (
        f"not finite were the loss in {bad['loss']}, gradients in {bad['gradients']}, parameters in {bad['parameters']}"
    )
    return _facts(
        (
            ("Model", f'SeizureDetector "{summary["preset"]}", {summary["parameters"]:,} parameters'),
            ("Seed", str(summary["seed"])),
            ("Windows", f"{summary['batch_size']} of {summary['window_seconds']:g} s in a step"),
            ("Loss", course),
            ("Gradient norm", f"median {_number(norm['median'])}, largest {_number(norm['largest'])}, before clipping"),
            ("Checks", f"in {summary['steps']} steps {counts}"),
            ("Time", f"{summary['seconds']:.0f} s in all, {summary['cpu_seconds']:.0f} s of CPU time"),
            ("Checkpoint", summary["files"]["checkpoint"]),
            ("Every step", summary["files"]["metrics"]),
        )
    )


def _training(summary: dict[str, Any], steps: Sequence[dict[str, Any]], comparisons: Sequence[Comparison]) -> list[str]:
    loss, norm, eigh = summary["loss"], summary["grad_norm"], summary["eigh"]
    fall = f"Loss over {len(steps)} steps, from {_number(loss['first'])} to {_number(loss['last'])}."
    norms = (
        f"Gradient norm over {len(steps)} steps: median {_number(norm['median'])}, largest {_number(norm['largest'])}."
    )
    norms += f" With torch.linalg.eigh {eigh['torch_not_finite']} of {eigh['batches']} batches are not finite."
    return [
        "<h2>Loss</h2>",
        _image(loss_figure(steps), fall, "Focal loss of the training batch at each step."),
        "<h2>Gradient norm</h2>",
        _image(
            gradient_figure(steps, comparisons, summary["max_norm"]),
            norms,
            "The norm of the whole gradient before clipping. Circles: the same batch with torch.linalg.eigh.",
        ),
    ]


def _eigh(summary: dict[str, Any]) -> list[str]:
    eigh = summary["eigh"]
    rows = [
        (
            name,
            str(eigh["batches"]),
            str(eigh[f"{key}_not_finite"]),
            _number(eigh[f"{key}_median_norm"]),
            _number(eigh[f"{key}_largest_norm"]),
        )
        for name, key in (("stablekern.laplacian_pe", "stablekern"), ("torch.linalg.eigh", "torch"))
    ]
    head = ("Eigenvectors by", "Batches", "Gradient not finite", "Median norm", "Largest norm")
    return [
        "<h2>The same step with torch.linalg.eigh</h2>",
        f"<p>{_EIGH.format(batches=eigh['batches'])}</p>" if eigh["batches"] else "<p>No batch was compared.</p>",
        _table(head, rows, numbers=True) if eigh["batches"] else "",
    ]


def _held_out(summary: dict[str, Any], held: HeldOut) -> list[str]:
    seconds, share = held.labels.size / held.sample_rate, float((held.labels > 0.5).mean())
    whole = f"Predicted probability over {seconds:.0f} held-out seconds, {share:.0%} of them a discharge."
    return [
        "<h2>The held-out part</h2>",
        _image(
            timeline_figure(held),
            f"{whole} AUROC {_number(summary['auroc'], 3)}.",
            "The last 30 % of the recording, which no training window touches. Shaded: where a discharge was added.",
        ),
        _image(
            window_figure(held),
            f"{_TRACES} electrodes around the onset of the first held-out discharge; the predicted probability below.",
            f"One window of it: the {_TRACES} electrodes that vary most there, and the prediction.",
        ),
    ]


def _recording(recording: dict[str, Any]) -> list[str]:
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in recording["notes"])
    rows = [
        (f"{e['onset']:.1f} s", f"{e['duration']:.1f} s", e["focus"], f"{e['rate']:.2f} Hz")
        for e in recording["events"]
    ]
    return [
        "<h2>The recording</h2>",
        f"<p>{html.escape(recording['description'])}</p>",
        f"<ul>{notes}</ul>",
        _table(("Held-out discharge at", "Duration", "Focus", "Rate"), rows, numbers=False),
    ]


def render(
    summary: dict[str, Any],
    steps: Sequence[dict[str, Any]],
    comparisons: Sequence[Comparison],
    held: HeldOut | None,
    machine: Sequence[tuple[str, str]],
) -> str:
    """The page.

    **Arguments:** `summary` is what `stablekern demo --json` prints, `steps` the records of `metrics.jsonl`, `held`
    None if nothing was evaluated, `machine` the rows of `doctor.summary`.
    """
    sections = ["<h2>The run</h2>", _run(summary)]
    sections += _training(summary, steps, comparisons) if steps else []
    sections += _held_out(summary, held) if held is not None else []
    sections += [*_eigh(summary), *_recording(summary["recording"]), "<h2>The machine</h2>", _facts(machine)]
    stopped = '<p class="note">Stopped by Ctrl-C: this report covers what ran until then.</p>'
    return _PAGE.format(
        title=f"stablekern demo, seed {summary['seed']}",
        heading="Training that stays finite",
        style=_STYLE,
        lead=html.escape(f"stablekern demo on {summary['recording']['source']}, {summary['started']}"),
        stopped=stopped if summary["interrupted"] else "",
        tiles=_tiles(summary),
        sections="\n".join(section for section in sections if section),
        footer=html.escape(
            f"stablekern {summary['version']}. The discharges are synthetic, added at known times so that the result "
            "can be checked. This is not a medical device."
        ),
    )
