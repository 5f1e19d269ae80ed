"""`stablekern zoo`: why training goes NaN, as exhibits that run here: counts, JSON, or a page with figures."""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stablekern import __version__, zoo
from stablekern._files import replaced
from stablekern.cli import _json, doctor
from stablekern.zoo import FIX, OURS, STOCK, Exhibit

__all__ = ["draw", "page", "run", "text"]

_ORDER = (STOCK, FIX, OURS)


def _measure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def text(found: Exhibit) -> str:
    """The cause, and a table of counts."""
    cells = [(row.who, row.name, f"{row.bad} of {row.of}", _measure(row.largest)) for row in found.rows]
    widths = [max(len(cell[i]) for cell in cells) for i in range(4)]
    lines = [f"{found.name} ({found.seconds:.1f} s)", f"  seen:  {found.seen}", f"  cause: {found.cause}"]
    lines.append(f"  bad:   {found.counted}" + (f"; last column: {found.measured}" if found.measured else ""))
    case = None
    for row, cell in sorted(zip(found.rows, cells, strict=True), key=lambda pair: _first(found, pair[0].case)):
        if row.case != case:
            case = row.case
            lines.append(f"  {case}")
        padded = (f"{part:<{width}}" for part, width in zip(cell[:2], widths, strict=False))
        lines.append(f"    {'  '.join(padded)}  {cell[2]:>{widths[2]}}  {cell[3]:>{widths[3]}}".rstrip())
    return "\n".join(lines)


def _first(found: Exhibit, case: str) -> int:
    """Where a case stands first; the rows of one stay together."""
    return next(i for i, row in enumerate(found.rows) if row.case == case)


def draw(found: Exhibit) -> Any:
    """The figure of an exhibit, a matplotlib `Figure`: stock in orange, published fixes dashed, ours broad and blue."""
    from stablekern.cli import report

    look = {
        STOCK: {"color": report._ORANGE, "linewidth": 2.2, "zorder": 3},
        FIX: {"color": report._INK, "linewidth": 1.3, "zorder": 4},
        OURS: {"color": report._BLUE, "linewidth": 5.0, "alpha": 0.5, "zorder": 2},  # below: it may coincide with stock
    }
    figure, (axis,) = report._figure(3.8)
    dashes = iter(("--", ":", "-."))
    for series in sorted(found.figure.series, key=lambda series: _ORDER.index(series.who)):
        style = look[series.who] | ({"linestyle": next(dashes)} if series.who == FIX else {})
        axis.plot(series.x, series.y, label=f"{series.who}: {series.name}", **style)
    axis.set_xscale("log" if found.figure.x_log else "linear")
    axis.set_yscale("log" if found.figure.y_log else "linear")
    axis.set_xlabel(found.figure.x_label)
    axis.set_ylabel(found.figure.y_label)
    axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def _described(found: Exhibit) -> str:
    counts = (f"{who} {found.total(who)[0]} of {found.total(who)[1]} bad" for who in _ORDER)
    return f"{found.figure.caption} Counts: {', '.join(counts)}."


def page(exhibits: Sequence[Exhibit]) -> str:
    """One HTML file that holds its figures."""
    from stablekern.cli import report

    sections = []
    for found in exhibits:
        rows = [
            (row.name, row.who, row.case, f"{row.bad} of {row.of}", _measure(row.largest))
            for row in sorted(found.rows, key=lambda row: _first(found, row.case))
        ]
        head = ("Done by", "Which is", "Counted in", "Bad", found.measured or "")
        facts = (
            ("Seen", found.seen),
            ("Cause", found.cause),
            ("Published fix", found.published),
            ("What removes it", found.remedy),
            ("Bad is", found.counted),
        )
        sections += [
            f"<h2>{html.escape(found.name.replace('_', ' ').capitalize())}</h2>",
            report._facts(facts),
            report._image(draw(found), _described(found), found.figure.caption),
            report._table(head, rows, numbers=False),
        ]
    sections += ["<h2>The machine</h2>", report._facts(doctor.summary(doctor.collect(build=False)))]
    seconds = sum(found.seconds for found in exhibits)
    return report._PAGE.format(
        title="stablekern zoo",
        heading="Why training goes NaN",
        style=report._STYLE,
        lead=html.escape(
            "Each cause reproduced with plain PyTorch, the fix that was published against it, and what removes it. "
            "Counts of this run; all data are synthetic."
        ),
        stopped="",
        tiles="",
        sections="\n".join(sections),
        footer=html.escape(f"stablekern {__version__}, {len(exhibits)} exhibits in {seconds:.0f} s."),
    )


def run(names: Sequence[str] = (), *, as_json: bool = False, html_file: Path | None = None) -> int:
    """Run the exhibits and print them; returns the exit code, 2 for a name that there is not."""
    unknown = [name for name in names if name not in zoo.EXHIBITS]
    if unknown:
        known = ", ".join(zoo.EXHIBITS)
        print(f"stablekern zoo: there is no exhibit `{unknown[0]}`; there are {known}", file=sys.stderr)
        return 2
    exhibits = []
    for found in zoo.run(names or None):
        exhibits.append(found)
        if as_json:
            print(f"{found.name}: {found.seconds:.1f} s", file=sys.stderr)
        else:
            print(text(found), end="\n\n", flush=True)
    if as_json:
        print(_json.dumps([asdict(found) for found in exhibits]))
    if html_file is not None:
        try:
            with replaced(html_file) as partial:
                partial.write_text(page(exhibits))
        except OSError as error:
            print(f"stablekern zoo: {error}", file=sys.stderr)
            return 2
        print(f"page: {html_file}", file=sys.stderr)
    return 0
