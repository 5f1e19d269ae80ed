"""`stablekern doctor --watch module:function`: run a training function, name its first non-finite tensor, say why."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from stablekern.cli import _json
from stablekern.cli.replay import load_function
from stablekern.errors import NonFiniteError
from stablekern.health.watch import Report, Watch

__all__ = ["Course", "Outcome", "main", "observe", "run", "text"]

_HISTORY = 32  # steps before the hit whose weights and batch are kept
_SHARES = (0.0, 0.05, 0.5, 0.95, 1.0)
_MOST = 2**20  # values of a step that the quantiles are taken from


@dataclass(frozen=True)
class Course:
    """The culprit over the steps before: its name, and per step the quantiles 0, 5, 50, 95, 100 % of its finite values.

    `first` and `last` are the values of the first step that is kept and of the step of the report.
    """

    name: str
    steps: list[int]
    quantiles: list[list[float]]
    first: Tensor
    last: Tensor


@dataclass(frozen=True)
class Outcome:
    """What a training function did under watch; `report` None: nothing was found. `error`: what it raised itself."""

    target: str
    steps: int
    seconds: float
    report: Report | None
    course: Course | None
    error: str | None

    def as_dict(self) -> dict[str, Any]:
        course = self.course and {
            "name": self.course.name,
            "steps": self.course.steps,
            "shares": list(_SHARES),
            "quantiles": self.course.quantiles,
        }
        return {
            "target": self.target,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "finite": self.report is None,
            "report": self.report.as_dict() if self.report else None,
            "course": course,
            "error": self.error,
        }


class _EnoughError(BaseException):
    """Ends the user's function; not an Exception, so that no loop of his takes it for a bad step."""


class _Limited(Watch):
    """A watch that ends the run after so many steps."""

    limit = 0

    def _next_step(self) -> None:
        super()._next_step()
        if self.step > self.limit:
            raise _EnoughError


def _course(watcher: Watch) -> Course | None:
    found = watcher.distribution()
    if found is None:
        return None
    name, rows = found
    kept = []
    for step, values in rows:
        values = values[values.isfinite()]
        values = values[:: max(1, values.numel() // _MOST)]
        if values.numel():
            kept.append((step, values))
    if not kept:
        return None
    shares = kept[0][1].new_tensor(_SHARES)
    return Course(name, [s for s, _ in kept], [v.quantile(shares).tolist() for _, v in kept], kept[0][1], kept[-1][1])


def observe(target: str, *, steps: int) -> Outcome:
    """Call the function without arguments under `health.watch` until it ends, something is found, or `steps` are done.

    **Raises:** `ValueError` if there is no such function. What the function raises is in the outcome.
    """
    function = load_function(target)
    watcher = _Limited(None, on_hit="raise", late=False, scaled=False, first_step=1, history=_HISTORY)
    watcher.limit = steps
    start, error = time.perf_counter(), None
    try:
        with watcher:
            function()
    except (_EnoughError, NonFiniteError) as end:
        error = None if isinstance(end, _EnoughError) or watcher.report else f"{type(end).__name__}: {end}"
    except Exception as raised:  # the user's function: what it raises is told, not passed on
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.perf_counter() - start
    done = watcher.report.step if watcher.report else watcher.step - 1
    return Outcome(target, done, seconds, watcher.report, _course(watcher), error)


def text(outcome: Outcome) -> str:
    """The report for people."""
    if outcome.report is None:
        lines = [f"no non-finite tensor in {outcome.steps} steps of {outcome.target} ({outcome.seconds:.1f} s)"]
    else:
        lines = [str(outcome.report)]
    if outcome.error:
        lines.append(f"{outcome.target} raised {outcome.error}")
    if outcome.course:
        lines += ["", f"{outcome.course.name}, over the steps before:"]
        lines.append(f"  {'step':>6} {'least':>11} {'median':>11} {'largest':>11}")
        shown = list(zip(outcome.course.steps, outcome.course.quantiles, strict=True))
        for step, values in shown[:2] + shown[2:][-6:]:
            lines.append(f"  {step:>6} {values[0]:>11.4g} {values[2]:>11.4g} {values[4]:>11.4g}")
    return "\n".join(lines)


def run(target: str, *, steps: int, html: Path | None, as_json: bool = False) -> int:
    """Run, print, write the page; returns the exit code: 0 nothing found, 1 found, 2 if it could not be run."""
    if html is not None and importlib.util.find_spec("matplotlib") is None:
        print("stablekern doctor --html needs the extra: pip install 'stablekern[cli]'", file=sys.stderr)
        return 2
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the function prints
            outcome = observe(target, steps=steps)
        if html is not None:
            from stablekern.cli.watch_page import render

            html.write_text(render(outcome))
    except (ValueError, OSError) as error:
        print(f"stablekern doctor: {error}", file=sys.stderr)
        return 2
    print(_json.dumps(outcome.as_dict()) if as_json else text(outcome))
    if outcome.report is not None:
        return 1
    return 2 if outcome.error else 0


def main(arguments: Sequence[str]) -> int:
    """The same from arguments behind `doctor`, where the parser of the extra `cli` is not installed."""
    parser = argparse.ArgumentParser(prog="stablekern doctor", allow_abbrev=False)
    parser.add_argument("--watch", required=True, metavar="MODULE:FUNCTION")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--html", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as end:  # it has printed what was wrong
        return int(end.code or 0)
    return run(given.watch, steps=given.steps, html=given.html, as_json=given.json)
