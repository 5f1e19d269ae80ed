"""Run the suite within a time, and show what it found as a table, as Markdown or as JSON."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from stablekern import _registry, use_backend
from stablekern.cli import _json, doctor
from stablekern.errors import BackendUnavailableError
from stablekern.testing import all_specs, suite

__all__ = ["Row", "found", "main", "markdown", "text"]

_HEAD = ("op", "device", "backend", "dtype", "samples", "error / tolerance", "worst", "gradcheck")


@dataclass
class Row:
    """An op on a backend in a dtype; good if `worst`, in units of the tolerance, is <= 1, and without `problems`."""

    op: str
    device: str
    backend: str
    dtype: str
    samples: int = 0
    worst: float = 0.0
    error: float = 0.0  # relative to float64, of the worst sample
    sample: str = ""
    gradchecks: int = 0  # passed; in the row of float64
    problems: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def good(self) -> bool:
        return self.worst <= 1.0 and not self.problems

    def take(self, sample: str, comparisons: Iterable[suite.Comparison]) -> None:
        self.samples += 1
        for one in comparisons:
            units = one.error / one.tolerance if one.tolerance else (math.inf if one.error else 0.0)
            if not units <= self.worst:  # a NaN is worse than anything
                self.worst, self.error = math.inf if math.isnan(units) else units, one.error
                self.sample = f"{sample}, {one.kind.split(' in ')[0]}"


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _backends(spec: Any, device: str, interpreter: bool) -> Iterator[tuple[str, str]]:
    """Each backend of an op, with the reason why it cannot run here, or ""."""
    for backend in suite.backends_of(spec, device):
        if backend == "triton" and device == "cpu" and not interpreter:
            continue  # an interpreter for tests, which nobody computes with
        reason = None if backend in ("default", "torch") else _registry._missing(f"{spec.name}_fwd", backend, device)
        yield backend, reason or ""


def _try(row: Row, name: str, step: Callable[[], Any]) -> Any:
    """The result of a step; what it raises is the row's problem, except that a backend cannot run a sample."""
    try:
        if row.backend == "default":
            return step()
        with use_backend(row.backend):
            return step()
    except BackendUnavailableError:
        return None
    except Exception as problem:
        row.problems.append(f"{name}: {str(problem).splitlines()[0][:200] or type(problem).__name__}")
        return None


def found(ops: Sequence[str] = (), *, seconds: float = 240.0, interpreter: bool = False) -> Iterator[Row]:
    """One row for each op, device, backend and dtype as it is done. Out of time, a row says what it skipped."""
    end = time.monotonic() + seconds
    for spec in all_specs():
        if ops and spec.name not in ops:
            continue
        samples = suite.samples_of(spec)
        for device in _devices():
            for backend, reason in _backends(spec, device, interpreter):
                names = [str(dtype).removeprefix("torch.") for dtype in spec.dtypes]
                rows = {
                    dtype: Row(spec.name, device, backend, name) for dtype, name in zip(spec.dtypes, names, strict=True)
                }
                for row in rows.values():
                    row.skipped = reason
                if not reason:
                    interpreted = spec.interpreted if (device, backend) == ("cpu", "triton") else None
                    chosen = [s for s in samples if interpreted is None or s.name in interpreted]
                    _fill(spec, chosen, rows, device, end)
                yield from (row for row in rows.values() if row.samples or row.problems or row.skipped)


def _fill(spec: Any, samples: list[Any], rows: dict[torch.dtype, Row], device: str, end: float) -> None:
    for sample in samples:
        for dtype in sample.dtypes or spec.dtypes:
            row = rows.setdefault(dtype, Row(spec.name, device, next(iter(rows.values())).backend, str(dtype)[6:]))
            if time.monotonic() > end:
                row.skipped = "out of time after some samples"
                continue
            comparisons = _try(
                row,
                sample.name,
                lambda s=sample, d=dtype: suite.compared(spec, suite.run, s, d, device),  # type: ignore[misc]
            )
            if comparisons is not None:
                row.take(sample.name, comparisons)
    row = rows.get(torch.float64)  # type: ignore[assignment]
    if row is None or not spec.differentiable:
        return
    for sample in (s for s in samples if s.gradcheck):
        if time.monotonic() > end:
            row.skipped = "out of time before the last gradcheck"
            return
        done = _try(row, f"gradcheck of {sample.name}", lambda s=sample: suite.gradcheck(spec, s, device))  # type: ignore[misc]
        row.gradchecks += bool(done)


def _cells(row: Row) -> tuple[str, ...]:
    if row.skipped and not row.samples:
        return (
            row.op,
            row.device,
            row.backend,
            row.dtype,
            "-",
            "-",
            f"cannot run: {row.skipped.splitlines()[0][:60]}",
            "-",
        )
    checked = [problem for problem in row.problems if problem.startswith("gradcheck")]
    gradcheck = "NO" if checked else f"yes ({row.gradchecks})" if row.gradchecks else "-"
    worst = f"{row.worst:.2f}" + ("" if row.worst <= 1 else "  TOO LARGE")
    return row.op, row.device, row.backend, row.dtype, str(row.samples), worst, row.sample, gradcheck


def _verdict(rows: Sequence[Row], seconds: float) -> str:
    bad = [row for row in rows if not row.good]
    count = f"{sum(row.samples for row in rows)} samples and {sum(row.gradchecks for row in rows)} gradchecks"
    if not bad:
        return f"All errors are within their tolerance: {count} in {seconds:.0f} s."
    return f"{len(bad)} of {len(rows)} rows are not good: {count} in {seconds:.0f} s."


def _problems(rows: Sequence[Row]) -> list[str]:
    return [f"{row.op} {row.device} {row.backend} {row.dtype}: {problem}" for row in rows for problem in row.problems]


_WIDTHS = (24, 6, 8, 9, 7, 17, 34, 9)


def _line(cells: Sequence[str]) -> str:
    return "  ".join(f"{cell:<{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)).rstrip()


def text(rows: Sequence[Row], seconds: float) -> str:
    """The table that is printed, whole."""
    return "\n".join([_line(_HEAD), *(_line(_cells(row)) for row in rows), *_tail(rows, seconds)])


def _tail(rows: Sequence[Row], seconds: float) -> list[str]:
    problems = [f"  {problem}" for problem in _problems(rows)]
    return ["", *(["Problems:", *problems, ""] if problems else []), _verdict(rows, seconds)]


def markdown(rows: Sequence[Row], seconds: float, facts: Sequence[tuple[str, str]]) -> str:
    """The same for a bug report: what failed first, the machine, all rows folded away."""
    table = lambda chosen: [  # noqa: E731
        f"| {' | '.join(_HEAD)} |",
        "|" + "---|" * len(_HEAD),
        *(f"| {' | '.join(cell.replace('|', '/') for cell in _cells(row))} |" for row in chosen),
    ]
    bad = [row for row in rows if not row.good]
    lines = [f"**{_verdict(rows, seconds)}**", ""]
    lines += [*table(bad), ""] if bad else []
    lines += [*(f"- {problem}" for problem in _problems(rows)), ""] if _problems(rows) else []
    lines += ["| machine | |", "|---|---|", *(f"| {name} | {value.replace('|', '/')} |" for name, value in facts), ""]
    return "\n".join([*lines, "<details><summary>all rows</summary>", "", *table(rows), "", "</details>"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 if all is within its tolerance, 1 if not, 2 for an op that there is not."""
    import argparse

    from stablekern import testing

    parser = argparse.ArgumentParser(
        prog="python -m stablekern.testing",
        description=testing.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", help="comma-separated ops; all by default")
    parser.add_argument("--seconds", type=float, default=240.0, help="time for all of it")
    parser.add_argument("--interpreter", action="store_true", help="Triton's interpreter on the CPU too (slow)")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON, and nothing else, to stdout")
    shape.add_argument("--markdown", action="store_true", help="print Markdown for a bug report to stdout")
    options = parser.parse_args(arguments)
    ops, known = (options.op.split(",") if options.op else []), [spec.name for spec in all_specs()]
    if unknown := [op for op in ops if op not in known]:
        print(f"stablekern.testing: there is no op `{unknown[0]}`; there are {', '.join(known)}", file=sys.stderr)
        return 2
    start, rows = time.monotonic(), []
    plain = not (options.json or options.markdown)
    if plain:
        print(_line(_HEAD))
    for row in found(ops, seconds=options.seconds, interpreter=options.interpreter):
        rows.append(row)
        print(_line(_cells(row)), file=sys.stdout if plain else sys.stderr, flush=True)
    seconds = time.monotonic() - start
    facts = doctor.collect(build=False)
    if options.json:
        plain_rows = [{**asdict(row), "good": row.good} for row in rows]
        print(_json.dumps({"rows": plain_rows, "seconds": round(seconds, 1), "machine": facts}))
    elif options.markdown:
        print(markdown(rows, seconds, doctor.summary(facts)))
    else:
        print("\n".join(_tail(rows, seconds)))
    return 0 if all(row.good for row in rows) else 1
