"""`stablekern demo`: train the smallest detector on a real recording, check every step, and report what happened.

The recording is real and holds no seizure; spike-and-wave discharges are added to it at known times, so there is
something to learn and a truth to score against. The first 70 % are for training. The last 30 % are held out: no window
crosses the cut, the filters run on either side by themselves, and the scale of the electrodes comes from the training
part alone.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import stablekern
from stablekern import training
from stablekern._files import replaced
from stablekern.cli import doctor
from stablekern.cli.interrupt import Interrupt
from stablekern.cli.report import Comparison, HeldOut, render
from stablekern.eeg import (
    Recording,
    WindowDataset,
    add_spike_wave,
    bandpass,
    draw_events,
    load_sample,
    read_edf,
    robust_sigma,
    split,
)
from stablekern.eeg.synthesis import SpikeWave
from stablekern.errors import NonFiniteError, RecordingError, SettingError, message
from stablekern.nn import SeizureDetector
from stablekern.nn.tcn import DOWNSAMPLING

__all__ = ["Options", "TorchLaplacianPE", "gradient_with_torch_eigh", "run"]

_PRESET = "nano"
_TRAIN_SHARE = 0.7
_COPIES = 8  # of the training part, each with its own discharges: one draw, of six, would know few places
_CROP_STRIDE = 1 / 16  # s: a window can start at any of 16 places in a second
_LONGEST = 1200.0  # s of a recording that are used
_MAX_NORM = 1.0
_CLIP = 10.0  # spreads of the background
_FLAT_MICROVOLTS = 0.1
_PLAIN_EVERY = 25  # steps between two lines where there is no terminal for a bar
_FILES = {"report": "report.html", "metrics": "metrics.jsonl", "checkpoint": "checkpoint.pt"}


@dataclass(frozen=True)
class Options:
    """What the command line gives; `edf` None is the recording of the package, `compare_every` 0 compares nothing."""

    edf: Path | None = None
    steps: int = 300
    seed: int = 0
    out: Path = Path("runs")
    window_seconds: float = 8.0
    batch_size: int = 4
    learning_rate: float = 3e-3
    compare_every: int = 5


# ---- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    """`train` holds the training part several times, each time with other discharges; `events` are those held out."""

    train: list[Recording]
    held_out: Recording
    notes: tuple[str, ...]
    events: list[SpikeWave]
    centre: np.ndarray
    spread: np.ndarray

    @property
    def cut(self) -> float:
        return self.train[0].seconds


def _load(options: Options) -> _Data:
    """Read, cut, add discharges to each part, filter each part by itself, scale all by the training part."""
    recording = load_sample() if options.edf is None else read_edf(options.edf)
    shortest = max(7.0, options.window_seconds) / (1 - _TRAIN_SHARE)
    if recording.seconds < shortest:
        rule = f"`{recording.source}` must last at least {shortest:.0f} s for windows of {options.window_seconds:g} s"
        raise RecordingError(message("demo", rule, f"{recording.seconds:.1f} s"))
    notes = recording.notes
    if recording.seconds > _LONGEST:
        notes = (*notes, f"of its {recording.seconds:.0f} s the first {_LONGEST:.0f} s are used")
        recording = recording.crop(0, round(_LONGEST * recording.sample_rate))
    seconds, background = recording.seconds, split(recording, _TRAIN_SHARE)
    cut = background[0].seconds

    def drawn(seed: int) -> list[SpikeWave]:
        return draw_events(seconds, seed=seed, boundary=_TRAIN_SHARE)

    def made(part: Recording, seed: int, events: list[SpikeWave]) -> Recording:
        added, _ = add_spike_wave(part, seed=seed, events=events)
        return replace(added, data=bandpass(added.data, added.sample_rate))

    held_events = [event for event in drawn(options.seed) if event.onset >= cut]
    shifted = [replace(event, onset=event.onset - cut) for event in held_events]
    held_out = made(background[1], options.seed, shifted)
    seeds = np.random.SeedSequence(options.seed).generate_state(_COPIES).tolist()
    train = [made(background[0], seed, [event for event in drawn(seed) if event.onset < cut]) for seed in seeds]
    together = np.concatenate([copy.data for copy in train], axis=1)
    centre = np.median(together, axis=1, keepdims=True)
    spread = np.maximum(robust_sigma(together), _FLAT_MICROVOLTS)[:, None]

    def scaled(part: Recording) -> Recording:
        return replace(part, data=np.clip((part.data - centre) / spread, -_CLIP, _CLIP), unit="sigma")

    filtered = f"band-pass 0.5 to 120 Hz, notch at 60 Hz, scaled by the training part, clipped to +-{_CLIP:g} sigma"
    return _Data([scaled(copy) for copy in train], scaled(held_out), (*notes, filtered), held_events, centre, spread)


def _description(options: Options, data: _Data) -> str:
    if options.edf is None:
        origin = (
            "The recording that comes with stablekern: EEGLAB's tutorial data, a real scalp EEG without seizures "
            "(Delorme and Makeig, J. Neurosci. Methods 134 (2004) 9-21; BSD 2-Clause licence, see ATTRIBUTION.md)."
        )
    else:
        origin = f"Your recording {options.edf.name}, as background; nothing in it is taken for a discharge."
    return (
        f"{origin} The first {data.cut:.0f} s are for training, {_COPIES} times over with synthetic spike-and-wave "
        f"discharges at ever other times and places; the last {data.held_out.seconds:.0f} s, with {len(data.events)} "
        "further ones, are held out."
    )


# ---- the other backward --------------------------------------------------------------------------------------------


class TorchLaplacianPE(nn.Module):
    """What `nn.DynamicLaplacianPE` computes, in plain torch: eigenvectors and their gradient by torch.linalg.eigh.

    The eigenvectors of the k smallest eigenvalues of I - D^-1/2 A D^-1/2, the largest component of each positive; every
    `interval`-th graph, held between. Adjacencies (b, T, N, N) with positive degrees in, (b, T, N, k) out.
    """

    def __init__(self, k: int, interval: int = 1) -> None:
        super().__init__()
        self.k, self.interval = k, interval

    def forward(self, adjacency: Tensor) -> Tensor:
        graphs = adjacency[:, :: self.interval]
        scale = graphs.sum(-1).rsqrt()
        identity = torch.eye(graphs.shape[-1], dtype=graphs.dtype, device=graphs.device)
        laplacian = identity - scale.unsqueeze(-1) * graphs * scale.unsqueeze(-2)
        vectors = torch.linalg.eigh(laplacian).eigenvectors[..., : self.k]
        largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
        encoding = vectors * largest.sign()
        return encoding.repeat_interleave(self.interval, dim=1)[:, : adjacency.shape[1]]


def gradient_with_torch_eigh(
    model: SeizureDetector, windows: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor], step: int = 1
) -> Comparison:
    """The gradient of one batch with the model's encoding by torch.linalg.eigh, forward and backward.

    Same weights, same windows, same dropout as in the step that follows: the random state is put back, and neither
    weights nor `.grad` are touched. A decomposition that torch gives up on counts as not finite.
    """
    ours = model.gnn.pe
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        model.gnn.pe = TorchLaplacianPE(ours.k, ours.interval)  # type: ignore[assignment]
        try:
            gradients = torch.autograd.grad(loss(model(windows), labels), parameters, allow_unused=True)
        except torch.linalg.LinAlgError:
            return Comparison(step, math.nan, False)
        finally:
            model.gnn.pe = ours
    flat = torch.cat([g.flatten() for g in gradients if g is not None])
    finite = bool(flat.isfinite().all())
    return Comparison(step, float(flat.double().norm()) if finite else math.nan, finite)


# ---- stopping and showing ------------------------------------------------------------------------------------------


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[training.StepResult], None]]:
    """A bar on a terminal, a line now and then elsewhere; both on stderr."""
    bad = 0

    def line(result: training.StepResult) -> str:
        nonlocal bad
        bad += not result.finite
        state = "all finite" if bad == 0 else f"{bad} not finite"
        return f"loss {result.loss:.4f}  gradient {result.grad_norm:.3g}  {state}"

    if not sys.stderr.isatty():

        def plain(result: training.StepResult) -> None:
            text = line(result)
            if result.step in (1, steps) or result.step % _PLAIN_EVERY == 0:
                print(f"step {result.step}/{steps}  {text}", file=sys.stderr, flush=True)

        yield plain
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=steps)
        yield lambda result: bar.update(task, advance=1, description=line(result))


def _own_directory(out: Path, started: datetime) -> Path:
    """A new directory named after the time; a second run in the same second gets a number."""
    stem = started.strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        path = out / (stem if attempt == 1 else f"{stem}_{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise FileExistsError(f"{out / stem} and 998 more exist")


# ---- the run -------------------------------------------------------------------------------------------------------


def _finite_or_none(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if math.isfinite(value) else None


def _record(result: training.StepResult) -> dict[str, Any]:
    return {
        "step": result.step,
        "loss": _finite_or_none(result.loss),
        "grad_norm": _finite_or_none(result.grad_norm),
        "learning_rate": result.learning_rate,
        "finite": result.finite,
        "skipped": result.skipped,
        "bad_gradient": result.bad_gradient,
        "seconds": round(result.seconds, 6),
    }


def _statistics(values: Sequence[float], suffix: str = "") -> dict[str, float | None]:
    finite = [value for value in values if math.isfinite(value)]
    return {
        f"median{suffix}": statistics.median(finite) if finite else None,
        f"largest{suffix}": max(finite) if finite else None,
    }


def _summarise(options: Options, results: list[training.StepResult], comparisons: list[Comparison]) -> dict[str, Any]:
    by_step = {result.step: result for result in results}
    pairs = [(c, by_step[c.step]) for c in comparisons if c.step in by_step]
    losses = [result.loss for result in results if math.isfinite(result.loss)]
    torch_norms = _statistics([c.grad_norm for c, _ in pairs], "_norm")
    our_norms = _statistics([r.grad_norm for _, r in pairs], "_norm")
    return {
        "steps": len(results),
        "steps_asked": options.steps,
        "loss": {
            "first": losses[0] if losses else None,
            "last": losses[-1] if losses else None,
            "last_10": statistics.mean(losses[-10:]) if losses else None,
        },
        "grad_norm": _statistics([result.grad_norm for result in results]),
        "not_finite": {
            "steps": sum(not result.finite for result in results),
            "loss": sum(not result.loss_finite for result in results),
            "gradients": sum(not result.gradients_finite for result in results),
            "parameters": sum(not result.parameters_finite for result in results),
            "skipped": sum(result.skipped for result in results),
        },
        "eigh": {
            "batches": len(pairs),
            "torch_not_finite": sum(not c.finite for c, _ in pairs),
            "stablekern_not_finite": sum(not r.gradients_finite for _, r in pairs),
            **{f"torch_{key}": value for key, value in torch_norms.items()},
            **{f"stablekern_{key}": value for key, value in our_norms.items()},
        },
        "seconds_per_step": statistics.median(result.seconds for result in results) if results else None,
    }


def _evaluate(model: SeizureDetector, data: _Data, window_seconds: float) -> tuple[HeldOut, float | None, str]:
    windows = WindowDataset(data.held_out, window_seconds=window_seconds, stride_seconds=window_seconds / 2, tail=True)
    probability = training.predict(model, windows)[0]
    labels = torch.from_numpy(data.held_out.labels)
    area = training.auroc(probability, labels)
    held = data.held_out
    shown = HeldOut(held.data, held.labels, probability.numpy(), held.sample_rate, held.channels, data.cut)  # type: ignore[arg-type]
    note = f"per sample, last {data.held_out.seconds:.0f} s"
    return shown, _finite_or_none(area), note if math.isfinite(area) else "undefined: predictions are not finite"


def _check(options: Options) -> None:
    length = options.window_seconds * 256
    if length % DOWNSAMPLING:
        rule = f"`--window-seconds` must be a multiple of {DOWNSAMPLING / 256:g}"
        raise ValueError(message("demo", rule, options.window_seconds))


def run(options: Options, *, as_json: bool = False) -> int:
    """Run the demo; `report.html`, `metrics.jsonl` and `checkpoint.pt` go to a new directory in `options.out`.

    With `as_json` stdout holds one JSON object: `version`, `started`, `seed`, `preset`, `parameters`, `interrupted`,
    `steps`, `steps_asked`, `batch_size`, `window_seconds`, `max_norm`, `loss` (`first`, `last`, `last_10`),
    `grad_norm` (`median`, `largest`), `not_finite` (how many steps: `steps`, `loss`, `gradients`, `parameters`,
    `skipped`), `eigh` (`batches`; for `torch` and `stablekern`: `_not_finite`, `_median_norm`, `_largest_norm`),
    `auroc` (None if undefined), `auroc_note`, `seconds_per_step`, `seconds`, `cpu_seconds`, `recording` (`source`,
    `description`, `notes`, `events`), `files` (`report`, `metrics`, `checkpoint`).

    Returns the exit code: 0; 2 for a recording or a value that cannot be used; 130 after Ctrl-C, with the report of
    what ran until then.
    """
    try:
        _check(options)
        return _run(options, as_json)
    except (RecordingError, SettingError, ValueError, NonFiniteError) as error:
        where, _, text = str(error).partition(": ")
        if not where.startswith("stablekern."):
            raise
        print(f"stablekern demo: {text}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteError) else 2
    except OSError as error:
        print(f"stablekern demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstablekern demo: stopped at once", file=sys.stderr)
        return 130


@contextmanager
def _one_thread() -> Iterator[None]:
    """Train on one CPU thread.

    A step of this small model is hundreds of parallel regions of microseconds each. A second thread saves little on
    an idle machine; where another process holds its core, every region waits for it, and steps take many times longer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(options: Options, as_json: bool) -> int:
    start, cpu_start, started = time.monotonic(), time.process_time(), datetime.now()
    say = functools.partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    data = _load(options)
    directory = _own_directory(options.out, started)  # before the training: a disk that cannot be written shows now
    files = {name: str(directory / file) for name, file in _FILES.items()}
    machine = doctor.summary(doctor.collect())
    for line in _opening(options, data, machine):
        say(line)

    with _one_thread(), Interrupt().watching() as interrupt:
        torch.manual_seed(options.seed)
        model = SeizureDetector.from_preset(_PRESET)
        results, comparisons = _train(options, data, model, interrupt, files["metrics"])
        held, area, note = (
            _evaluate(model, data, options.window_seconds) if results else (None, None, "no step was taken")
        )
        scale = {"centre": torch.from_numpy(data.centre), "spread": torch.from_numpy(data.spread)}
        training.save_checkpoint(
            files["checkpoint"], model, preset=_PRESET, step=len(results), seed=options.seed, auroc=area, scale=scale
        )
        summary = {
            "version": stablekern.__version__,
            "started": started.strftime("%Y-%m-%d %H:%M:%S"),
            "seed": options.seed,
            "preset": _PRESET,
            "parameters": model.count_parameters(),
            "interrupted": interrupt.seen,
            "batch_size": options.batch_size,
            "window_seconds": options.window_seconds,
            "max_norm": _MAX_NORM,
            **_summarise(options, results, comparisons),
            "auroc": area,
            "auroc_note": note,
            "seconds": time.monotonic() - start,
            "cpu_seconds": time.process_time() - cpu_start,
            "recording": {
                "source": data.held_out.source,
                "description": _description(options, data),
                "notes": list(data.notes),
                "events": [asdict(event) for event in data.events],
            },
            "files": files,
        }
        with replaced(files["report"]) as partial:
            page = render(summary, [_record(result) for result in results], comparisons, held, machine)
            partial.write_text(page, encoding="utf-8")

    for line in _closing(summary):
        say(line)
    if as_json:
        print(json.dumps(summary, indent=2))
    return 130 if summary["interrupted"] else 0


def _train(
    options: Options, data: _Data, model: SeizureDetector, interrupt: Interrupt, metrics: str
) -> tuple[list[training.StepResult], list[Comparison]]:
    """All steps, or those before Ctrl-C; each is written to `metrics` as soon as it is done."""
    crops = WindowDataset(data.train, window_seconds=options.window_seconds, stride_seconds=_CROP_STRIDE)
    batches = training.random_windows(crops, batch_size=options.batch_size, steps=options.steps, seed=options.seed)
    weight = training.positive_weight(np.concatenate([copy.labels for copy in data.train]))
    loss = functools.partial(stablekern.focal_loss, pos_weight=weight, reduction="mean")
    comparisons: list[Comparison] = []

    def compare(step: int, windows: Tensor, labels: Tensor) -> None:
        if options.compare_every and (step - 1) % options.compare_every == 0:
            comparisons.append(gradient_with_torch_eigh(model, windows, labels, loss, step))

    with _progress(options.steps) as show, open(metrics, "w", buffering=1) as log:

        def keep(result: training.StepResult) -> None:
            log.write(json.dumps(_record(result)) + "\n")
            show(result)

        results = training.fit(
            model,
            batches,
            steps=options.steps,
            loss=loss,
            learning_rate=options.learning_rate,
            max_norm=_MAX_NORM,
            before_step=compare,
            after_step=keep,
            stop=interrupt,
        )
    return results, comparisons


def _opening(options: Options, data: _Data, machine: Sequence[tuple[str, str]]) -> list[str]:
    column = max(len(name) for name, _ in machine)
    lines = [f"{name:<{column}}  {value}" for name, value in machine]
    wrapped = textwrap.wrap(_description(options, data), 100)
    notes = [textwrap.fill(note, 100, initial_indent="  - ", subsequent_indent="    ") for note in data.notes]
    return [*lines, "", *wrapped, *notes, ""]


def _closing(summary: dict[str, Any]) -> list[str]:
    bad, eigh, area = summary["not_finite"], summary["eigh"], summary["auroc"]
    first, last = summary["loss"]["first"], summary["loss"]["last_10"]
    lines = ["", "Stopped by Ctrl-C; this is what ran until then." if summary["interrupted"] else "Done."]
    lines.append(f"  steps               {summary['steps']} of {summary['steps_asked']} in {summary['seconds']:.0f} s")
    if first is not None:
        lines.append(f"  loss                {first:.4f} to {last:.4f} (mean of the last 10)")
    lines += [
        f"  steps not finite    {bad['steps']} (loss {bad['loss']}, gradients {bad['gradients']}, "
        f"parameters {bad['parameters']})",
        f"  torch.linalg.eigh   non-finite gradients in {eigh['torch_not_finite']} of {eigh['batches']} batches; "
        f"stablekern in {eigh['stablekern_not_finite']}",
        f"  AUROC, held out     {'none' if area is None else f'{area:.3f}'} ({summary['auroc_note']})",
        f"  report              {summary['files']['report']}",
        f"  checkpoint          {summary['files']['checkpoint']}",
    ]
    return lines
