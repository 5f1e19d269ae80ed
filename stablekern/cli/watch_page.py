"""The page of `stablekern doctor --watch --html`: what was found, and the culprit over the steps before."""

from __future__ import annotations

import html

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import stablekern
from stablekern.cli.report import _BLUE, _ORANGE, _STYLE, _facts, _figure, _image, _legend, _table
from stablekern.cli.watch import Course, Outcome

__all__ = ["render"]

_BINS = 40
_DECADES = 1e3  # beyond this ratio of largest to typical the axis is logarithmic on both sides of 0

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>stablekern doctor --watch {target}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
<p class="lead">{lead}</p>
{sections}
<footer>stablekern {version}</footer>
</main>
</body>
</html>
"""


def _linear_width(course: Course) -> float | None:
    """Where a symmetric logarithmic axis is linear; None if the values need none.

    Of values of one sign the small ones are looked for, of both signs the large ones.
    """
    values = np.array(course.quantiles)
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return None
    small = sizes.min() if (values >= 0).all() or (values <= 0).all() else np.median(sizes)
    if sizes.max() / small < _DECADES:
        return None
    return float(max(small, sizes.max() * np.finfo(np.float32).eps))


def course_figure(course: Course, limit: float | None) -> Figure:
    """The quantiles at each step, the last being that of the report."""
    figure, (axis,) = _figure(3.3)
    least, low, middle, high, most = np.array(course.quantiles).T
    axis.fill_between(course.steps, least, most, color=_BLUE, alpha=0.15, linewidth=0, label="all")
    axis.fill_between(course.steps, low, high, color=_BLUE, alpha=0.3, linewidth=0, label="5 to 95 %")
    axis.plot(course.steps, middle, color=_BLUE, linewidth=1.6, label="median")
    axis.axvline(course.steps[-1], color=_ORANGE, linewidth=1, label="the step of the report")
    if limit is not None:
        axis.axhline(limit, color=_ORANGE, linestyle="--", linewidth=1, label=f"limit {limit:.4g}")
    width = _linear_width(course)
    if width is not None:
        axis.set_yscale("symlog", linthresh=width)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylabel(course.name)
    _legend(axis, 5)
    return figure


def histogram_figure(course: Course) -> Figure:
    """The values of the first step that is kept, and of that of the report."""
    figure, (axis,) = _figure(2.6)
    both = np.concatenate([course.first.numpy(), course.last.numpy()])
    low, high = both.min(), both.max() + (both.max() == both.min())
    width = _linear_width(course)
    if width is None:
        bins = np.linspace(low, high, _BINS)
    else:  # even on the axis: asinh is linear up to the width and logarithmic beyond
        bins = np.unique(width * np.sinh(np.linspace(np.arcsinh(low / width), np.arcsinh(high / width), _BINS)))
        axis.set_xscale("symlog", linthresh=width)
    for values, colour, step in ((course.first, _BLUE, course.steps[0]), (course.last, _ORANGE, course.steps[-1])):
        axis.hist(values.numpy(), bins=bins, histtype="step", linewidth=1.6, color=colour, label=f"step {step}")
    axis.set_yscale("log")
    axis.set_xlabel(course.name)
    axis.set_ylabel("entries")
    _legend(axis, 2)
    return figure


def render(outcome: Outcome) -> str:
    """The page: one HTML file that needs no network."""
    report, course = outcome.report, outcome.course
    if report is None:
        title = f"No non-finite tensor in {outcome.steps} steps"
        sections = [f"<p>{html.escape(outcome.error)}</p>"] if outcome.error else []
    else:
        title = f"Step {report.step}: {report.cause.kind}"
        where = f"{report.path or 'the model itself'} ({report.module})" if report.module else "outside the model"
        rows = [
            ("Phase", f"{report.phase} of step {report.step}"),
            ("Module", f"{where}{', ' + report.note if report.note else ''}"),
            ("Operation", report.op),
            ("Line", report.line),
            ("Cause", f"{report.cause.kind}: {report.cause.text}"),
            ("Remedy", report.cause.remedy),
            ("With", report.cause.op or "plain torch"),
            ("Seen at", report.seen),
            *(("Remark", remark) for remark in report.remarks),
        ]
        head = ("Tensor", "Shape", "NaN", "inf", "Entries", "Least", "Largest", "Mean")
        stats = [
            (s.name, "x".join(map(str, s.shape)) or "scalar", str(s.nan), str(s.inf), str(s.count))
            + tuple(f"{v:.4g}" if v == v else "none" for v in (s.min, s.max, s.mean))
            for s in (report.tensor, *report.inputs)
        ]
        sections = [_facts(rows), "<h2>Numbers</h2>", _table(head, stats, numbers=True)]
    if course is not None and report is not None:
        limit = report.cause.measured.get("limit")
        described = f"{course.name} over steps {course.steps[0]} to {course.steps[-1]}."
        caption = f"{course.name}, of the operation that is named above, computed again for earlier steps."
        ends = f"{course.name} at steps {course.steps[0]} and {course.steps[-1]}."
        sections += ["<h2>The steps before</h2>", _image(course_figure(course, limit), described, caption)]
        sections.append(_image(histogram_figure(course), ends, "All its entries, at the two ends of that course."))
    return _PAGE.format(
        target=html.escape(outcome.target),
        style=_STYLE,
        title=html.escape(title),
        lead=html.escape(f"{outcome.target}, {outcome.seconds:.1f} s under watch"),
        sections="\n".join(sections),
        version=stablekern.__version__,
    )
