"""The commands and their options, for the parser; what they do is in the module of each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stablekern.cli import doctor as doctor_command
from stablekern.cli import missing_extras

app = typer.Typer(
    name="stablekern",
    help="Kernels that keep deep-learning training finite and fast.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _need_extras(command: str) -> None:
    missing = missing_extras(command)
    if missing:
        typer.echo(missing, err=True)
        raise typer.Exit(2)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")] = False,
    no_build: Annotated[
        bool, typer.Option("--no-build", help="Do not compile the CPU kernels if they are not built yet.")
    ] = False,
    replay: Annotated[
        Path | None,
        typer.Option(help="Do the step of a bad_batch_<step>.pt again: was it the data, the weights, an op?"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="For --replay: module:function that returns the model, or (model, loss).")
    ] = None,
    watch: Annotated[
        str | None,
        typer.Option(help="Run module:function, which trains, and name its first non-finite tensor and the cause."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="For --watch: training steps after which it is stopped.")] = 1000,
    html: Annotated[Path | None, typer.Option(help="For --watch: a page with the course of the culprit.")] = None,
) -> None:
    """What this machine can run, and why not more: versions, CPU, GPU, compilers, settings, the backend of every op.

    With --replay: why the step of a file that TrainingGuard wrote went wrong. With --watch: why a training goes wrong;
    the exit code is 1 if it does.
    """
    if watch is not None:
        from stablekern.cli import watch as watch_command

        raise typer.Exit(watch_command.run(watch, steps=steps, html=html, as_json=json))
    if replay is not None or model is not None:
        from stablekern.cli import replay as command

        raise typer.Exit(command.run(replay, model, as_json=json))
    raise typer.Exit(doctor_command.run(as_json=json, build=not no_build))


@app.command()
def zoo(
    names: Annotated[list[str] | None, typer.Argument(help="Exhibits; all if none is named.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with figures; it holds all that it needs.")] = None,
) -> None:
    """Why training goes NaN: each cause with plain PyTorch, with the fix that was published, and with ours; counted."""
    if html is not None:
        _need_extras("zoo")
    from stablekern.cli import zoo as command

    raise typer.Exit(command.run(names or (), as_json=json, html_file=html))


@app.command()
def bench(
    lines: Annotated[
        list[Path] | None, typer.Argument(help="Show and draw these files (or folders) of lines; nothing is timed.")
    ] = None,
    op: Annotated[str | None, typer.Option(help="Comma-separated ops; all by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda by default where there is one.")] = None,
    direction: Annotated[str | None, typer.Option(help="fwd, fwd+bwd or step; all by default.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Time for each line.")] = 4.0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; those of torch by default.")] = None,
    backend: Annotated[str | None, typer.Option(help="Force one.")] = None,
    allocator: Annotated[str, typer.Option(help="What becomes of freed memory: system or keep.")] = "system",
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not run an op's suite before it is timed.")] = False,
    out: Annotated[Path | None, typer.Option(help="Append the lines to this file, one JSON object each.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for time and share of the limit as PNG and SVG.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two files (or folders) of lines, the second against the first.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")] = False,
) -> None:
    """Time the ops against what people use instead: speed, share of the machine's limit, error against float64.

    The workloads are in the source checkout (`bench/`), their baselines in the extra `bench`. An op whose suite fails
    is not timed. The exit code is 1 if something could not be.
    """
    _need_extras("bench")
    from stablekern.cli import bench as command

    if compare is not None:
        raise typer.Exit(command.compare(*compare, as_json=json))
    for name, value, legal in (
        ("--device", device, ("cpu", "cuda")),
        ("--direction", direction, ("fwd", "fwd+bwd", "step")),
        ("--allocator", allocator, ("system", "keep")),
        ("--backend", backend, ("native", "torch", "triton", "cuda")),
    ):
        if value is not None and value not in legal:
            raise typer.BadParameter(f"{value} is none of {', '.join(legal)}", param_hint=name)
    options = command.Options(
        lines=tuple(lines or ()),
        op=op,
        device=device,
        direction=direction,
        seconds=seconds,
        threads=threads,
        backend=backend,
        allocator=allocator,
        check=not no_check,
        out=out,
        plots=plots,
    )
    raise typer.Exit(command.run(options, as_json=json))


@app.command()
def demo(
    edf: Annotated[
        Path | None, typer.Option(help="Your own recording (EDF or EDF+) in place of the one in the package.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 300,
    seed: Annotated[int, typer.Option(min=0, help="Of the bursts, the weights, the order of the windows.")] = 0,
    out: Annotated[Path, typer.Option(help="Each run gets a directory of its own in here.")] = Path("runs"),
    window_seconds: Annotated[float, typer.Option(min=1.0, help="Length of the training windows.")] = 8.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows in a training step.")] = 4,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="After the warm-up.")] = 3e-3,
    compare_every: Annotated[
        int, typer.Option(min=0, help="Steps between comparisons with the backward of torch.linalg.eigh; 0 for none.")
    ] = 5,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")] = False,
) -> None:
    """Train the smallest detector on a real recording with discharges of known times, and report what happened.

    In a few minutes on a CPU: the last 30 % of the recording are held out, every step is checked for NaN and
    infinities, and some are repeated with the backward of torch.linalg.eigh. Ctrl-C stops after the step and reports.
    """
    _need_extras("demo")
    from stablekern.cli import demo as command

    options = command.Options(
        edf=edf,
        steps=steps,
        seed=seed,
        out=out,
        window_seconds=window_seconds,
        batch_size=batch_size,
        learning_rate=learning_rate,
        compare_every=compare_every,
    )
    raise typer.Exit(command.run(options, as_json=json))


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="What to train on, and how: TOML, or JSON.")],
    smoke: Annotated[bool, typer.Option("--smoke", help="10 files, 20 steps, and a table of what came.")] = False,
    probe: Annotated[
        int | None, typer.Option(min=1, help="The first steps of the run, held against what a healthy run shows.")
    ] = None,
    timing: Annotated[bool, typer.Option("--timing", help="Time per part of a step, on random windows.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again, whatever checkpoint there is.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")] = False,
) -> None:
    """Train a detector on a folder of EDF recordings with annotations (TUSZ, CHB-MIT, Siena, BIDS), by patient.

    Recordings are prepared once into a cache; a run that was stopped goes on from its last checkpoint. The exit code is
    1 if `--smoke` or `--probe` leaves a band.
    """
    _need_extras("train")
    from stablekern.cli import train as command

    options = command.Options(config, smoke=smoke, probe=probe, timing=timing, fresh=fresh)
    raise typer.Exit(command.run(options, as_json=json))


@app.command()
def detect(
    edf: Annotated[Path, typer.Argument(help="The recording: EDF or EDF+.")],
    checkpoint: Annotated[Path, typer.Option(help="`best.pt` of `stablekern train`.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the table and the picture; else beside the file.")
    ] = None,
    on: Annotated[float | None, typer.Option(min=0, max=1, help="Probability at which an event begins.")] = None,
    off: Annotated[float | None, typer.Option(min=0, max=1, help="Probability below which it ends.")] = None,
    allow_truncated: Annotated[bool, typer.Option("--allow-truncated", help="Read a file that ends early.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, to stdout.")] = False,
) -> None:
    """Find the events in a recording: FILE_events.tsv and a picture."""
    _need_extras("detect")
    from stablekern.cli import detect as command

    options = command.Options(edf, checkpoint, out=out, on=on, off=off, allow_truncated=allow_truncated)
    raise typer.Exit(command.run(options, as_json=json))
