"""`stablekern train`: a detector from a folder of recordings and a configuration file."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from stablekern import training
from stablekern._files import replaced
from stablekern.cli.interrupt import Interrupt
from stablekern.cli.pictures import around, png
from stablekern.eeg import experiment
from stablekern.eeg.corpus import Item
from stablekern.errors import StablekernError

__all__ = ["Options", "run"]

_PLAIN_EVERY = 25  # steps between two lines where there is no terminal for a bar


@dataclass(frozen=True)
class Options:
    """What the command line gives; see `experiment.train`."""

    config: Path
    smoke: bool = False
    probe: int | None = None
    timing: bool = False
    fresh: bool = False


def run(options: Options, *, as_json: bool = False) -> int:
    """Train; with `as_json` stdout holds what `experiment.train` returns and nothing else.

    Returns the exit code: 0; 1 if a smoke test or a probe leaves its bands; 2 for a configuration or recordings that
    cannot be used; 130 after Ctrl-C, with a checkpoint of what ran until then.
    """
    lead = os.environ.get("RANK", "0") == "0"
    try:
        config = experiment.load_config(options.config)
        if options.timing:
            return _timing(config, as_json)
        validations = _Validations()
        with Interrupt().watching() as interrupt, _shown(config, options) as (on_data, on_step):
            summary = experiment.train(
                config,
                smoke=options.smoke,
                probe=options.probe,
                fresh=options.fresh,
                stop=interrupt,
                on_data=on_data,
                on_step=on_step,
                on_validation=validations.append,
            )
    except (StablekernError, ValueError, TypeError, OSError) as error:
        print(f"stablekern train: {str(error).removeprefix('stablekern.eeg.train: ')}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstablekern train: stopped at once", file=sys.stderr)
        return 130
    if lead:
        summary["pictures"] = validations.draw(Path(summary["out"]))
        if as_json:
            print(json.dumps({**summary, "interrupted": interrupt.seen}, indent=2))
        _report(summary, Console(stderr=as_json))
    if interrupt.seen:
        return 130
    return 0 if all(within for *_, within in summary["bands"] or ()) else 1


@contextlib.contextmanager
def _shown(
    config: experiment.TrainConfig, options: Options
) -> Iterator[tuple[Callable[..., None], Callable[..., None]]]:
    """Bars on a terminal, lines now and then elsewhere; both on stderr."""
    steps = experiment.planned_steps(config, smoke=options.smoke, probe=options.probe)
    if not sys.stderr.isatty():

        def data_line(done: int, total: int, item: Item) -> None:
            if done == total or done % _PLAIN_EVERY == 0:
                print(f"prepared {done}/{total}  {item.edf.name}", file=sys.stderr, flush=True)

        def step_line(result: training.StepResult) -> None:
            if result.step == 1 or result.step % _PLAIN_EVERY == 0:
                print(f"step {result.step}/{steps}  {_line(result)}", file=sys.stderr, flush=True)

        yield data_line, step_line
        return
    columns = (TextColumn("{task.fields[name]}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        preparing = bar.add_task("", total=None, name="preparing")
        stepping = bar.add_task("", total=steps, name="training")
        yield (
            lambda done, total, item: bar.update(preparing, completed=done, total=total, description=item.edf.name),
            lambda result: bar.update(stepping, completed=result.step, description=_line(result)),
        )


def _line(result: training.StepResult) -> str:
    state = "" if result.finite else "  not finite"
    return f"loss {result.loss:.4f}  gradient {result.grad_norm:.3g}  rate {result.learning_rate:.2e}{state}"


class _Validations:
    """Says each validation as it comes, and keeps the last one for the pictures."""

    def __init__(self) -> None:
        self.last: experiment.Validation | None = None

    def append(self, validation: experiment.Validation) -> None:
        self.last, scores = validation, validation.scores
        print(
            f"validation after step {validation.step}: AUROC {validation.auroc:.3f}, events {scores.found} of "
            f"{scores.events}, {scores.false_alarms:.1f} false alarms in 24 h",
            file=sys.stderr,
            flush=True,
        )

    def draw(self, out: Path) -> list[str]:
        """The most certain false alarm and the most certain miss of the last validation, if there are any."""
        if self.last is None:
            return []
        paths = []
        kinds = {"false_alarm": self.last.worst_false_alarm(), "miss": self.last.worst_miss()}
        for name, worst in kinds.items():
            path = out / f"worst_{name}.png"
            if worst is None:
                path.unlink(missing_ok=True)
                continue
            outcome, event = worst
            recording = outcome.recording
            title = (
                f"worst {name.replace('_', ' ')}: {Path(recording.source).name} at {event.onset:.1f} s, mean "
                f"probability {outcome.mean(event):.2f} (red: found, green: marked)"
            )
            middle = event.onset + event.duration / 2
            with replaced(path) as partial:
                png(around(recording, outcome.probability, outcome.found, recording.events, middle, title), partial)
            paths.append(str(path))
        return paths


def _report(summary: dict[str, Any], console: Console) -> None:
    console.print(
        f"{summary['steps']} steps from {summary['first']}, {summary['finite']} of them finite; "
        f"{summary['recordings']['train']} recordings to train on, {summary['recordings']['validation']} to validate; "
        f"results in {summary['out']}"
    )
    if summary["bands"]:
        table = Table("What", "Band", "Came", "")
        for name, band, value, within in summary["bands"]:
            table.add_row(name, band, value, "ok" if within else "[bold]outside[/bold]")
        console.print(table)
    if summary["failures"]:
        table = Table(f"{len(summary['failures'])} left out", "Why")
        for failure in summary["failures"]:
            table.add_row(failure["file"], failure["reason"])
        console.print(table)


def _timing(config: experiment.TrainConfig, as_json: bool) -> int:
    """Time per part of one step on random windows, for the model and the batch of `config`."""
    from stablekern.eeg.timing import parts_of_a_step
    from stablekern.nn import SeizureDetector

    torch.manual_seed(config.training.seed)
    model = SeizureDetector.from_preset(config.model.preset, **experiment.model_options(config))
    samples = round(config.data.window_seconds * 256)
    parts = parts_of_a_step(model, batch_size=config.training.batch_size, samples=samples)
    if as_json:
        print(json.dumps(parts, indent=2))
        return 0
    table = Table("Part", "Forward", "Backward", "Share")
    total = sum(part["forward"] + part["backward"] for part in parts)
    for part in parts:
        both = part["forward"] + part["backward"]
        row = (f"{1e3 * part['forward']:.1f} ms", f"{1e3 * part['backward']:.1f} ms", f"{100 * both / total:.0f} %")
        table.add_row(part["part"], *row)
    console = Console()
    console.print(table)
    console.print(f"{total:.3f} s a step, batch of {config.training.batch_size}, {samples} samples")
    return 0
