"""Pictures of a recording: the probability over time with the events, and the signals around one moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stablekern.eeg.annotations import Event

__all__ = ["around", "overview", "png"]

_SHOWN = 20.0  # s of signals
_PER_ROW = 10.0  # spreads of the background between two traces
_POINTS = 4000  # of the probability's curve
_FOUND, _MARKED = "#d1495b", "#2e8b57"


def png(figure: Figure, path: Any) -> None:
    FigureCanvasAgg(figure).print_png(path)


def _probability(axes: Axes, probability: np.ndarray, rate: float, unit: float) -> None:
    step = max(probability.size // _POINTS, 1)  # the largest of each stretch: a short event stays visible
    values = np.nan_to_num(probability[: probability.size // step * step]).reshape(-1, step).max(axis=1)
    axes.plot(np.arange(values.size) * step / rate / unit, values, lw=0.8, color="#1f4e79")
    axes.set(ylabel="probability", ylim=(0, 1))


def _spans(axes: Axes, events: Sequence[Event], first: float, last: float, unit: float, colour: str) -> None:
    for event in events:
        if event.onset < last and event.end > first:
            axes.axvspan(max(event.onset, first) / unit, min(event.end, last) / unit, color=colour, alpha=0.2, lw=0)


def _signals(axes: Axes, recording: Any, first: int, last: int) -> None:
    data, _ = recording.window(first, last)
    seconds = np.arange(first, last) / recording.sample_rate
    for row, trace in enumerate(data):
        axes.plot(seconds, trace / _PER_ROW - row, lw=0.5, color="#222")
    count = len(recording.channels)
    axes.set_yticks([-row for row in range(count)], recording.channels)
    axes.set(xlabel="s", xlim=(first / recording.sample_rate, last / recording.sample_rate), ylim=(-count, 1))


def around(
    recording: Any, probability: np.ndarray, found: Sequence[Event], marked: Sequence[Event], second: float, title: str
) -> Figure:
    """20 s of all signals with `second` in the middle, the probability below; `found` in red, `marked` in green."""
    rate = recording.sample_rate
    length = min(round(_SHOWN * rate), recording.samples)
    first = max(0, min(round(second * rate) - length // 2, recording.samples - length))
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    _signals(top, recording, first, first + length)
    top.set_xlabel("")
    top.set_title(title, loc="left")
    seconds = np.arange(first, first + length) / rate
    bottom.plot(seconds, probability[first : first + length], lw=1, color="#1f4e79")
    bottom.set(xlabel="s", ylabel="probability", ylim=(0, 1))
    for axes in (top, bottom):
        _spans(axes, found, seconds[0], seconds[-1], 1.0, _FOUND)
        _spans(axes, marked, seconds[0], seconds[-1], 1.0, _MARKED)
    return figure


def overview(recording: Any, probability: np.ndarray, events: Sequence[Event], on: float, off: float) -> Figure:
    """The probability over the whole recording, and below it the signals around its most certain moment."""
    rate, whole = recording.sample_rate, recording.samples / recording.sample_rate
    figure = Figure(figsize=(11, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(1, 3))
    _probability(top, probability, rate, 60.0)
    _spans(top, events, 0.0, whole, 60.0, _FOUND)
    for level, style in ((on, "--"), (off, ":")):
        top.axhline(level, color="#777", lw=0.7, ls=style)
    top.set(xlabel="min", xlim=(0, whole / 60))
    top.set_title(f"{recording.source}: {len(events)} events", loc="left")
    length = min(round(_SHOWN * rate), recording.samples)
    peak = int(np.nanargmax(probability)) if np.isfinite(probability).any() else 0
    first = max(0, min(peak - length // 2, recording.samples - length))
    _signals(bottom, recording, first, first + length)
    _spans(bottom, events, first / rate, (first + length) / rate, 1.0, _FOUND)
    bottom.set_title(f"around the most certain moment, {_PER_ROW:g} spreads of the background per row", loc="left")
    return figure
