"""`stablekern bench`: time the ops against what people use instead, keep the lines, draw them, compare two of them.

The workloads and baselines are those of `bench/` in the source checkout; drawing and comparing kept lines needs only
the package. Before an op is timed the suite of `stablekern.testing` runs on it: what is wrong is not timed, and every
line holds its error against float64.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import stablekern
from stablekern._files import replaced
from stablekern.cli import _json

__all__ = ["Options", "compare", "draw", "read", "run", "show"]

_MISSING = (
    "stablekern bench: the workloads are in the source checkout, not in the installed package: clone it, run "
    "pip install -e '.[cli,bench]' there, and stablekern bench again (kept lines can be shown and compared anywhere)"
)
_KEY = ("op", "case", "direction", "dtype", "baseline", "allocator")
_CHECK_SECONDS = 60.0  # for the suite on one op
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8A8F98"


@dataclass(frozen=True)
class Options:
    """`lines`: files or folders of kept lines, to be shown in place of a run. `out`: where the lines of a run go."""

    lines: tuple[Path, ...] = ()
    op: str | None = None
    device: str | None = None
    direction: str | None = None
    seconds: float = 4.0
    threads: int | None = None
    backend: str | None = None
    allocator: str = "system"
    check: bool = True
    out: Path | None = None
    plots: Path | None = None


def read(source: Path) -> list[dict[str, Any]]:
    """The newest line of each case in a file of JSON lines, or in all files of a folder."""
    files = sorted(source.rglob("*.jsonl")) if source.is_dir() else [source]
    found = {}
    for file in files:
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not a JSON line ({error})") from error
            if isinstance(line, dict) and {"op", "case", "direction", "dtype", "ms", "baseline_ms"} <= set(line):
                found[_key(line)] = line
    return list(found.values())


def _key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple({"allocator": "system", "device": "", **line}[name] for name in (*_KEY, "device"))


def _benches() -> ModuleType | None:
    """`bench.run` of the checkout that this package is imported from, if it is one."""
    root = Path(stablekern.__file__).resolve().parents[1]
    if not (root / "bench" / "run.py").is_file():
        return None
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.run")


def _checked(op: str, options: Options) -> tuple[dict[str, Any], list[str]]:
    """Errors of an op by (backend, dtype), and what is wrong with it; nothing for what has no spec."""
    from stablekern.testing import all_specs
    from stablekern.testing.report import found

    if op not in {spec.name for spec in all_specs()}:
        return {}, []
    errors, wrong = {}, []
    for row in found([op], seconds=_CHECK_SECONDS):
        if row.device != options.device:
            continue
        errors[row.backend, row.dtype] = {"relative": row.error, "tolerances": round(row.worst, 3), "of": row.sample}
        if not row.good:
            wrong.append(f"{op} {row.backend} {row.dtype}: {row.problems or f'{row.worst:.2f} tolerances'}")
    return errors, wrong  # type: ignore[return-value]


def _real(dtype: str) -> str:
    return {"complex64": "float32", "complex128": "float64"}.get(dtype, dtype)


def _measured(bench: ModuleType, options: Options) -> tuple[list[dict[str, Any]], list[str]]:
    """The lines of a run and what could not be timed, with a progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    wanted = None if options.op is None else set(options.op.split(","))
    cases = [case for case in bench.all_cases() if wanted is None or case.op in wanted]
    steps = [(case, d) for case in cases for d in case.directions if options.direction in (None, d)]
    lines, failed, errors = [], [], {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("limits of the machine", total=len(steps))
        top = bench.ceilings(options.device)
        for case, direction in steps:
            progress.update(task, description=f"{case.op} {case.name} {direction}")
            if options.check and case.op not in errors:
                errors[case.op], wrong = _checked(case.op, options)
                failed += wrong
                if wrong:
                    errors[case.op] = None  # type: ignore[assignment]
            if errors.get(case.op, {}) is None:
                progress.advance(task)
                continue
            try:
                line = bench.measure(case, direction, options.device, options.seconds, top)
            except Exception as error:  # a baseline that is not installed, or not enough memory: the others go on
                failed.append(
                    f"{case.op} {case.name} {direction}: {type(error).__name__}: {str(error).splitlines()[:1]}"
                )
            else:
                line |= {"allocator": options.allocator, "machine": platform.platform()}
                line["stablekern"] = stablekern.__version__
                found = errors.get(case.op) or {}
                line["error_float64"] = found.get((line["backend"], _real(line["dtype"]))) or found.get(  # type: ignore[call-overload]
                    ("default", _real(line["dtype"]))
                )
                lines.append(line)
                if options.out is not None:
                    with open(options.out, "a") as file:
                        file.write(json.dumps(line) + "\n")
            progress.advance(task)
    return lines, failed


def show(lines: Sequence[dict[str, Any]]) -> None:
    """The table, on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("op", "case", "direction", "backend", "against"):
        table.add_column(name, overflow="fold")
    for name in ("ms", "theirs", "times faster", "of the limit", "error / tolerance"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        error, gate = line.get("error_float64"), line.get("gate")
        missed = gate is not None and line["ratio"] < gate
        table.add_row(
            line["op"], line["case"], line["direction"], line.get("backend", ""), line["baseline"],
            f"{line['ms']:.3g}", f"{line['baseline_ms']:.4g}",
            f"[bold red]{line['ratio']:.2f} (gate {gate:g})[/]" if missed else f"{line['ratio']:.2f}",
            f"{100 * line['share_of_limit']:.0f} %", f"{error['tolerances']:.2f}" if error else "-",
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = 180
    console.print(table)


def _grid(count: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, min(3, count))
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def _times(lines: Sequence[dict[str, Any]]) -> Any:
    """Time against the bytes that a case must move at least, an axis per op; ours, the baselines, a copy."""
    from matplotlib.ticker import FuncFormatter

    sized = [line for line in lines if line.get("gbytes_per_s")]
    ops = list(dict.fromkeys(line["op"] for line in sized))
    figure, axes = _grid(len(ops), 4.6, 3.2)
    size = lambda line: line["gbytes_per_s"] * line["ms"]  # noqa: E731  GB/s times ms is MB
    for op, axis in zip(ops, axes, strict=True):
        here = [line for line in sized if line["op"] == op]
        for direction in dict.fromkeys(line["direction"] for line in here):
            chosen = sorted((line for line in here if line["direction"] == direction), key=size)
            fill = direction != "fwd+bwd"
            for key, color, marker in (("baseline_ms", _ORANGE, "s"), ("ms", _BLUE, "o")):
                axis.plot(
                    [size(line) for line in chosen],
                    [line[key] for line in chosen],
                    marker,
                    color=color,
                    markersize=6,
                    markerfacecolor=color if fill else "white",
                    label=f"{'stablekern' if key == 'ms' else 'baseline'}, {direction}",
                )
            for line in chosen:
                axis.plot([size(line)] * 2, [line["ms"], line["baseline_ms"]], color=_GREY, lw=0.6, zorder=0)
        x = sorted(size(line) for line in here)
        limit = max(line.get("limit_gbytes_per_s", 0) for line in here)
        if limit:
            ends = [x[0] / 1.5, x[-1] * 1.5]
            axis.plot(ends, [end / limit for end in ends], color=_GREY, lw=1, ls="--", label="a copy of as much")
        axis.set(xscale="log", yscale="log")
        for ruler in (axis.xaxis, axis.yaxis):
            ruler.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ruler.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
            ruler.set_tick_params(which="minor", labelsize=6)
        axis.set_title(op, fontsize=10, loc="left")
        axis.set_xlabel("MB that it must move at least", fontsize=8)
        axis.set_ylabel("ms", fontsize=8)
        axis.legend(frameon=False, fontsize=6)
    return figure


def _limits(lines: Sequence[dict[str, Any]]) -> Any:
    """Bars: the share of the machine's limit that each line reaches; the larger of flops and bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.2, 1.0 + 0.2 * len(lines)), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    rows = list(reversed(lines))
    shares = [100 * line["share_of_limit"] for line in rows]
    colors = [_ORANGE if line["direction"] == "fwd+bwd" else _BLUE for line in rows]
    axis.barh(range(len(rows)), shares, color=colors, height=0.7)
    for i, share in enumerate(shares):
        axis.text(share + 1, i, f"{share:.0f}", va="center", fontsize=6)
    names = [f"{line['op']} {line['case']}, {line['direction']}" for line in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=6)
    axis.axvline(100, color=_GREY, lw=0.8)
    axis.set_xlabel("% of what a matrix product or a copy reached in the same run (orange: forward and backward)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(y=0.01)
    return figure


def draw(lines: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """`time` and `limit`, each as PNG and SVG, into `folder`."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (("time", _times(lines)), ("limit", _limits(lines))):
        for kind in ("png", "svg"):
            path = folder / f"{name}.{kind}"
            with replaced(path) as partial, rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
                figure.savefig(partial, format=kind, metadata={"Date": None} if kind == "svg" else None)
            written.append(path)
    return written


def compare(first: Path, second: Path, *, as_json: bool = False) -> int:
    """Two files (or folders) of lines, case by case: `second` against `first`. Exit code 2 if they share no case."""
    try:
        before, after = ({_key(line)[:-1]: line for line in read(path)} for path in (first, second))
    except (OSError, ValueError) as error:
        print(f"stablekern bench: {error}", file=sys.stderr)
        return 2
    shared = [key for key in before if key in after]
    if not shared:
        print(f"stablekern bench: {first} and {second} have no case in common", file=sys.stderr)
        return 2
    rows = []
    for key in shared:
        a, b = before[key], after[key]
        # Neither's middle 60 % of samples reaches into the other's: more than the noise of the machine.
        apart = a.get("ms_p80", a["ms"]) < b.get("ms_p20", b["ms"]) or b.get("ms_p80", b["ms"]) < a.get(
            "ms_p20", a["ms"]
        )
        verdict = ("slower" if b["ms"] > a["ms"] else "faster") if apart else "same"
        row = dict(zip(_KEY, key, strict=True)) | {"before_ms": a["ms"], "after_ms": b["ms"], "verdict": verdict}
        row["speedup"] = round(a["ms"] / b["ms"], 3) if b["ms"] else None
        # Both sides of one line were timed in turn: their ratio does not see a busier or another machine.
        row["speedup_against_baseline"] = round(b["ratio"] / a["ratio"], 3) if a["ratio"] else None
        rows.append(row)
    machines = {line.get("device") for found in (before, after) for line in found.values()}
    if as_json:
        print(_json.dumps({"rows": rows, "machines": sorted(map(str, machines))}))
        return 0
    _show_comparison(rows)
    if len(machines) > 1:
        print(
            f"of different machines: {', '.join(sorted(map(str, machines)))}; compare the last column", file=sys.stderr
        )
    alone = len(before) + len(after) - 2 * len(shared)
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("faster", "same", "slower")}
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()) + f"; {alone} in one of the two only")
    return 0


def _show_comparison(rows: Iterable[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("op", "case", "direction", "against"):
        table.add_column(name, overflow="fold")
    for name in ("before ms", "after ms", "speed-up", "", "of the ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    colors = {"faster": "green", "slower": "red", "same": "dim"}
    for row in rows:
        table.add_row(
            row["op"], row["case"], row["direction"], row["baseline"], f"{row['before_ms']:.3g}",
            f"{row['after_ms']:.3g}", f"{row['speedup']:.2f}", f"[{colors[row['verdict']]}]{row['verdict']}[/]",
            f"{row['speedup_against_baseline']:.2f}",
        )  # fmt: skip
    console = Console()
    if not console.is_terminal:
        console.width = 160
    console.print(table)


def run(options: Options, *, as_json: bool = False) -> int:
    """Time, or show kept lines; exit code 1 if something could not be timed, 2 for what there is not."""
    import torch

    failed: list[str] = []
    if options.lines:
        try:
            lines = [line for source in options.lines for line in read(source)]
        except (OSError, ValueError) as error:
            print(f"stablekern bench: {error}", file=sys.stderr)
            return 2
        wanted = None if options.op is None else set(options.op.split(","))
        lines = [line for line in lines if wanted is None or line["op"] in wanted]
        if not lines:
            print(f"stablekern bench: no lines in {', '.join(map(str, options.lines))}", file=sys.stderr)
            return 2
    else:
        bench = _benches()
        if bench is None:
            print(_MISSING, file=sys.stderr)
            return 2
        known = {case.op for case in bench.all_cases()}
        unknown = set(options.op.split(",")) - known if options.op else set()
        if unknown:
            names = ", ".join(sorted(known))
            print(f"stablekern bench: there is no op `{sorted(unknown)[0]}`; there are {names}", file=sys.stderr)
            return 2
        device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = Options(**{**vars(options), "device": device})
        if options.threads:
            torch.set_num_threads(options.threads)
        if options.allocator == "keep":
            bench.keep_freed_memory()
        start = time.monotonic()
        with stablekern.use_backend(options.backend):
            lines, failed = _measured(bench, options)
        print(f"{len(lines)} lines in {time.monotonic() - start:.0f} s", file=sys.stderr)
    if as_json:
        print(_json.dumps(lines))
    elif lines:
        show(lines)
    for text in failed:
        print(f"not timed: {text}", file=sys.stderr)
    if options.plots is not None and lines:
        for path in draw(lines, options.plots):
            print(f"plot: {path}", file=sys.stderr)
    return 1 if failed else 0
