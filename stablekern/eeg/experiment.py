r"""Train a detector on a folder of recordings, from a configuration file, and pick it up again where it stopped.

    config = load_config("train.toml")
    summary = train(config)

What a run does: find the recordings and their seizures, split by patient, prepare them into a cache, train for a number
of steps, score the validation part every so often, and keep the last and the best checkpoint. It writes into its folder

| file | what |
|---|---|
| `last.pt` | weights, optimizer, step, random states: the run goes on from it, with the batches it would have had |
| `best.pt` | the weights with the best validation score, for `stablekern detect` |
| `metrics.jsonl` | a line per step and per validation |
| `split.json` | the patients of each part, the recordings left out and why |
| `tensorboard/` | the same numbers for TensorBoard, if it is installed |

All of them appear whole or not at all, and every `.pt` loads with `weights_only=True`.

Under torchrun each process draws its own batches and the gradients are averaged; the first process alone writes. The
guard sees the averaged gradients, which are the same everywhere, so all take the same decision to leave a step out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import resource
import statistics
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from stablekern import _check, training
from stablekern._files import replaced
from stablekern.eeg.annotations import Event
from stablekern.eeg.corpus import (
    Cache,
    CachedRecording,
    Failure,
    Item,
    PrepareOptions,
    build_cache,
    patient_split,
    scan,
)
from stablekern.eeg.scoring import Scores, find_events, score_events
from stablekern.eeg.windows import WindowDataset
from stablekern.errors import RecordingError, message
from stablekern.nn.detector import PRESETS, DetectorConfig, SeizureDetector
from stablekern.nn.tcn import DOWNSAMPLING
from stablekern.ops.focal_loss import focal_loss

__all__ = [
    "BANDS",
    "DataOptions",
    "DetectOptions",
    "ModelOptions",
    "Outcome",
    "TrainConfig",
    "TrainOptions",
    "Validation",
    "bands",
    "load_config",
    "model_options",
    "planned_steps",
    "train",
    "validate",
]

_OP = "eeg.train"
_SMOKE = {"files": 10, "steps": 20}


# ---- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataOptions:
    """`folder` with the recordings, `cache` for the prepared ones; how to split, prepare and cut them."""

    folder: str
    cache: str = "cache"
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)  # train, validation, test
    seed: int = 0
    workers: int = 1  # processes that prepare recordings, and as many that read windows ahead if more than 1
    window_seconds: float = 60.0
    stride_seconds: float = 10.0
    line_frequency: float | None = 60.0  # of the mains, 50 or 60; 0 for no notch
    max_interpolated: int = 6
    allow_truncated: bool = False


@dataclass(frozen=True)
class ModelOptions:
    """`preset` of `SeizureDetector`, and `options` of `DetectorConfig` that differ from it."""

    preset: str = "small"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainOptions:
    """The arguments of `training.fit`, and when to score and save."""

    steps: int = 10_000
    batch_size: int = 8
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    max_norm: float = 1.0
    warmup: float = 0.05
    precision: str = "float32"  # or "bfloat16": autocast
    seed: int = 0
    validate_every: int = 500
    checkpoint_every: int = 100
    tensorboard: bool = True
    threads: int = 0  # of the CPU; 0 leaves torch's number


@dataclass(frozen=True)
class DetectOptions:
    """The arguments of `find_events`."""

    on: float = 0.5
    off: float = 0.4
    min_duration: float = 3.0
    merge_gap: float = 2.0


@dataclass(frozen=True)
class TrainConfig:
    """A whole run; `out` is the folder that it writes into."""

    data: DataOptions
    model: ModelOptions = ModelOptions()
    training: TrainOptions = TrainOptions()
    detect: DetectOptions = DetectOptions()
    out: str = "runs/train"


def load_config(path: str | os.PathLike[str]) -> TrainConfig:
    """Read a TOML file (or JSON with the same structure) into a `TrainConfig`.

    The tables are the fields of `TrainConfig`, their keys those of the classes above. Relative paths are taken from
    the folder of the file. Raises ValueError, with the legal names, for a key that does not exist, a value of another
    type, or a file that is not TOML or JSON; OSError if it cannot be read.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        rule = f"the configuration `{path}` does not exist; `examples/train.toml` of the sources is one to start from"
        raise FileNotFoundError(message(_OP, rule, "no such file")) from None
    try:
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import tomllib  # Python 3.11

            content = tomllib.loads(text)
    except ModuleNotFoundError:
        raise ValueError(message(_OP, "TOML needs Python 3.11, JSON does not", path.name)) from None
    except ValueError as cause:
        raise ValueError(message(_OP, f"`{path}` cannot be read", str(cause))) from cause
    config = _built(TrainConfig, content, "")
    here = path.resolve().parent
    folder, cache, out = (
        str(here / Path(name).expanduser()) for name in (config.data.folder, config.data.cache, config.out)
    )
    data = dataclasses.replace(config.data, folder=folder, cache=cache)
    config = dataclasses.replace(config, data=data, out=out)
    _checked(config)
    return config


def _built(kind: Any, content: Any, where: str) -> Any:
    """An options class from a table: every key must be a field, every value of its type."""
    if not isinstance(content, Mapping):
        raise ValueError(message(_OP, f"`{where or 'the file'}` must be a table", type(content).__name__))
    types_ = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    unknown = sorted(set(content) - set(names))
    if unknown:
        rule = f"`{where or 'the file'}` has the keys {', '.join(names)}"
        raise ValueError(message(_OP, rule, ", ".join(unknown)))
    needed = [
        item.name
        for item in dataclasses.fields(kind)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    ]
    absent = [name for name in needed if name not in content]
    if absent:
        raise ValueError(message(_OP, f"`{where or 'the file'}` must have {', '.join(absent)}", "none"))
    return kind(**{name: _value(types_[name], value, f"{where}.{name}".lstrip(".")) for name, value in content.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _built(kind, value, where)
    if isinstance(kind, types.UnionType):  # a number or None, which TOML writes as 0
        return None if not value else _value(kind.__args__[0], value, where)
    origin = typing.get_origin(kind)
    if origin is tuple and isinstance(value, Sequence) and len(value) == len(kind.__args__):
        return tuple(_value(one, item, where) for one, item in zip(kind.__args__, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    plain = origin or kind
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        shown = f"{len(kind.__args__)} numbers" if plain is tuple else plain.__name__
        raise ValueError(message(_OP, f"`{where}` must be of the type {shown}", repr(value)))
    return value


def _checked(config: TrainConfig) -> None:
    data, options = config.data, config.training
    _check.choice(_OP, "model.preset", config.model.preset, PRESETS)
    known = {item.name for item in dataclasses.fields(DetectorConfig)}
    if unknown := sorted(set(config.model.options) - known):
        rule = f"`model.options` has the keys {', '.join(sorted(known))}"
        raise ValueError(message(_OP, rule, ", ".join(unknown)))
    _check.number(_OP, "data.window_seconds", data.window_seconds, low=0, strict=True)
    _check.number(_OP, "data.stride_seconds", data.stride_seconds, low=0, strict=True)
    _check.integer(_OP, "data.workers", data.workers, low=1)
    _check.choice(_OP, "data.line_frequency", data.line_frequency, (50.0, 60.0, None))
    samples = data.window_seconds * PrepareOptions().sample_rate
    if samples % DOWNSAMPLING:
        rule = f"`data.window_seconds` must be a multiple of {DOWNSAMPLING / PrepareOptions().sample_rate:g}"
        raise ValueError(message(_OP, rule, data.window_seconds))
    for name in ("steps", "batch_size", "validate_every", "checkpoint_every"):
        _check.integer(_OP, f"training.{name}", getattr(options, name), low=1)
    for name in ("learning_rate", "max_norm"):
        _check.number(_OP, f"training.{name}", getattr(options, name), low=0, strict=True)
    _check.number(_OP, "training.weight_decay", options.weight_decay, low=0)
    _check.number(_OP, "training.warmup", options.warmup, low=0, high=1)
    _check.choice(_OP, "training.precision", options.precision, ("float32", "bfloat16"))
    find_events(np.zeros(0), 1.0, **asdict(config.detect))


# ---- the data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Data:
    train: list[CachedRecording]
    validation: list[CachedRecording]
    failures: list[Failure]
    split: dict[str, list[Item]]


def _long_enough(cache: Cache, seconds: float) -> tuple[list[CachedRecording], list[Failure]]:
    kept = [recording for recording in cache.recordings if recording.samples >= round(seconds * recording.sample_rate)]
    short = [
        Failure(recording.source, f"{recording.seconds:.1f} s long, shorter than one window of {seconds:g} s")
        for recording in cache.recordings
        if recording not in kept
    ]
    return kept, [*cache.failures, *short]


def _load(config: TrainConfig, limit: int | None, progress: Callable[[int, int, Item], None] | None) -> _Data:
    data = config.data
    found = scan(data.folder, limit=limit)
    split = patient_split(found.items, data.split, seed=data.seed)
    options = PrepareOptions(
        line_frequency=data.line_frequency, max_interpolated=data.max_interpolated, allow_truncated=data.allow_truncated
    )
    failures = list(found.failures)
    parts = {}
    wanted = dict(zip(("train", "validation"), training.limit_files(split["train"], split["validation"]), strict=True))
    for name, items in wanted.items():
        cache = build_cache(items, data.cache, options, workers=data.workers, progress=progress)
        parts[name], left_out = _long_enough(cache, data.window_seconds)
        failures += left_out
    if not parts["train"]:
        rule = f"`{data.folder}` must hold a recording to train on"
        reasons = "; ".join(f"{failure.file}: {failure.reason}" for failure in failures[:3]) or "none"
        raise RecordingError(message(_OP, rule, f"{len(failures)} that cannot be used ({reasons})"))
    return _Data(parts["train"], parts["validation"], failures, split)


def _positive_weight(recordings: Sequence[CachedRecording]) -> float:
    """`training.positive_weight` of all labels, without holding them at once."""
    labelled = sum(int(recording.label_mask().sum()) for recording in recordings)
    share = labelled / sum(recording.samples for recording in recordings)
    return training.positive_weight(torch.tensor([share], dtype=torch.float64))


# ---- scores --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """One recording of the validation part: the probability of each sample, and the events found in it."""

    recording: CachedRecording
    probability: np.ndarray
    found: list[Event]

    def mean(self, event: Event) -> float:
        """The mean probability in an event."""
        first, last = (round(second * self.recording.sample_rate) for second in (event.onset, event.end))
        return float(np.nanmean(self.probability[first : max(last, first + 1)]))


@dataclass(frozen=True)
class Validation:
    """Scores of the validation part after `step`; `auroc` per sample, NaN if a class is missing."""

    step: int
    auroc: float
    scores: Scores
    outcomes: tuple[Outcome, ...] = field(default=(), repr=False)

    def worst_false_alarm(self) -> tuple[Outcome, Event] | None:
        """The event found with the highest mean probability that no marked one overlaps."""
        wrong = [
            (outcome, event)
            for outcome in self.outcomes
            for event in outcome.found
            if not any(_overlap(event, marked) for marked in outcome.recording.events)
        ]
        return max(wrong, key=lambda pair: pair[0].mean(pair[1]), default=None)

    def worst_miss(self) -> tuple[Outcome, Event] | None:
        """The marked event with the lowest mean probability that none found overlaps."""
        missed = [
            (outcome, event)
            for outcome in self.outcomes
            for event in outcome.recording.events
            if event.onset < outcome.recording.seconds and not any(_overlap(event, one) for one in outcome.found)
        ]
        return min(missed, key=lambda pair: pair[0].mean(pair[1]), default=None)

    @property
    def rank(self) -> float:
        """What `best.pt` is chosen by: the AUROC, and where there is none the event F1."""
        value = self.auroc if math.isfinite(self.auroc) else self.scores.event_f1
        return value if math.isfinite(value) else -math.inf


def _overlap(one: Event, other: Event) -> bool:
    return one.onset < other.end and other.onset < one.end


def validate(
    model: nn.Module,
    recordings: Sequence[CachedRecording],
    *,
    window_seconds: float,
    detect: DetectOptions = DetectOptions(),
    step: int = 0,
    batch_size: int = 8,
) -> Validation:
    """Score `model` on whole recordings: windows that overlap by half, their mean logits, events by hysteresis."""
    outcomes = []
    for recording in recordings:
        windows = WindowDataset(recording, window_seconds=window_seconds, stride_seconds=window_seconds / 2, tail=True)  # type: ignore[arg-type]
        (probability,) = training.predict(model, windows, batch_size=batch_size)
        predicted = find_events(probability.numpy(), recording.sample_rate, **asdict(detect))
        outcomes.append(Outcome(recording, probability.numpy(), predicted))
    scores = np.concatenate([outcome.probability for outcome in outcomes])
    labels = np.concatenate([outcome.recording.labels for outcome in outcomes])
    area = training.auroc(torch.from_numpy(scores), torch.from_numpy(labels))
    pairs = [(outcome.recording.events, outcome.found, outcome.recording.seconds) for outcome in outcomes]
    return Validation(step, area, score_events(pairs), tuple(outcomes))


# ---- is this run healthy -------------------------------------------------------------------------------------------

# What the first hundreds of steps of a run that is going to learn look like; `bands` holds a run against them.
BANDS = {
    "steps not finite": "0",
    "loss, last tenth over first tenth": "<= 1.05: it does not rise",
    "learning rate, largest over its peak": ">= 0.99 if the warm-up is over",
    "steps with less than 1/1000 of the peak rate": "<= 5 %",
    "gradient norm, median": "1e-6 to 1e3",
    "memory, end over a tenth into the run": "<= 1.10: nothing piles up",
}


def bands(
    results: Sequence[training.StepResult], memory: Sequence[float], options: TrainOptions
) -> list[tuple[str, str, str, bool]]:
    """(what, its band, what came, whether it lies within) for the steps of a run; `memory` in bytes, one per step."""
    tenth = max(len(results) // 10, 1)
    first, last = ([r.loss for r in part] for part in (results[:tenth], results[-tenth:]))
    ratio = statistics.mean(last) / statistics.mean(first)
    rates = [result.learning_rate / options.learning_rate for result in results]
    warm = len(results) >= math.ceil(options.warmup * options.steps)
    small = sum(rate < 1e-3 for rate in rates) / len(rates)
    norm = statistics.median(result.grad_norm for result in results)
    growth = memory[-1] / memory[min(tenth, len(memory) - 1)]
    bad = sum(not result.finite for result in results)
    values = (
        (str(bad), bad == 0),
        (f"{ratio:.3f} ({statistics.mean(first):.4g} to {statistics.mean(last):.4g})", ratio <= 1.05),
        (f"{max(rates):.3f}", max(rates) >= 0.99 or not warm),
        (f"{100 * small:.1f} %", small <= 0.05),
        (f"{norm:.3g}", 1e-6 <= norm <= 1e3),
        (f"{growth:.3f} ({memory[-1] / 2**20:.0f} MiB)", growth <= 1.10),
    )
    return [(name, band, *value) for (name, band), value in zip(BANDS.items(), values, strict=True)]


def _memory(device: torch.device) -> float:
    """Bytes in use: of the device's allocator, or the largest resident set of the process so far."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# ---- the run -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _distributed() -> Iterator[tuple[int, int]]:
    """(rank, number of processes); joins and leaves the group if torchrun started this process."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield 0, 1
        return
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    finally:
        torch.distributed.destroy_process_group()


def _device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _writer(folder: Path, wanted: bool) -> Any:
    """A TensorBoard writer, or None if it is not wanted or not installed."""
    if not wanted:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


class _Log:
    """`metrics.jsonl` and TensorBoard; nothing in the other processes."""

    def __init__(self, folder: Path, first: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.jsonl"
        kept = []
        if self.path.exists():  # what a run that stopped wrote after its last checkpoint is done again
            kept = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] < first]
            with replaced(self.path) as partial:
                partial.write_text("".join(f"{line}\n" for line in kept))
        self.file = self.path.open("a", buffering=1)
        self.writer = _writer(folder, tensorboard)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        plain = {name: _plain(value) for name, value in values.items()}
        self.file.write(json.dumps({"kind": kind, "step": step, **plain}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)) and math.isfinite(value):
                    self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _save_last(path: Path, model: SeizureDetector, optimizer: torch.optim.Optimizer, step: int, best: float) -> None:
    training.save_checkpoint(
        path,
        model,
        step=step,
        best=best,
        optimizer=optimizer.state_dict(),
        random={"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()},
    )


def _resume(path: Path, model: SeizureDetector, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Load `last.pt` into both; returns the step that it was written after, and the best rank so far."""
    saved, facts = training.load_checkpoint(path)
    if saved.config != model.config:
        rule = f"`{path}` must be of the same model: another configuration needs another `out`"
        raise ValueError(message(_OP, rule, saved.config))
    model.load_state_dict(saved.state_dict())
    optimizer.load_state_dict(facts["optimizer"])
    torch.set_rng_state(facts["random"]["cpu"])
    if len(facts["random"]["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(facts["random"]["cuda"])
    return int(facts["step"]), float(facts["best"])


def planned_steps(config: TrainConfig, *, smoke: bool = False, probe: int | None = None) -> int:
    """At which step `train` ends if nothing stops it."""
    steps = config.training.steps
    return min(steps, probe or steps, _SMOKE["steps"] if smoke else steps)


def train(
    config: TrainConfig,
    *,
    smoke: bool = False,
    probe: int | None = None,
    fresh: bool = False,
    stop: Callable[[], bool] | None = None,
    on_data: Callable[[int, int, Item], None] | None = None,
    on_step: Callable[[training.StepResult], None] | None = None,
    on_validation: Callable[[Validation], None] | None = None,
) -> dict[str, Any]:
    """Run `config`, going on from its `last.pt` unless `fresh`; the module's text says what is written where.

    **Arguments:** `smoke` uses the first 10 files and takes 20 steps; `probe` takes that many steps of the schedule
    of the whole run, and holds them against `BANDS`. Both write into a folder of their own, beside `out`, and begin
    afresh. `stop()` is asked before each step. The callbacks are called in the first process only.

    **Returns:** `steps`, `first`, `finite`, `seconds_per_step`, `loss`, `validation` (the last one's scores, or None),
    `best`, `recordings`, `patients`, `failures`, `bands` (rows of `bands` with `smoke` or `probe`, else None), `out`.

    **Raises:** RecordingError if there is nothing to train on, ValueError for a checkpoint of another model.
    """
    options = config.training
    if probe is not None:
        _check.integer(_OP, "probe", probe, low=1)
    out = Path(f"{config.out}-smoke" if smoke else f"{config.out}-probe" if probe else config.out)
    steps = planned_steps(config, smoke=smoke, probe=probe)
    schedule = dataclasses.replace(options, steps=steps if smoke else options.steps)  # of the rate
    if options.threads:
        torch.set_num_threads(options.threads)
    with _distributed() as (rank, processes):
        lead = rank == 0
        limit = _SMOKE["files"] if smoke else None
        if not lead:
            torch.distributed.barrier()  # the first process fills the cache, the others read it
        data = _load(config, limit, on_data if lead else None)
        if lead and processes > 1:
            torch.distributed.barrier()
        device = _device()
        torch.manual_seed(options.seed)
        model = SeizureDetector.from_preset(config.model.preset, **model_options(config)).to(device)
        optimizer = training.default_optimizer(
            model, learning_rate=options.learning_rate, weight_decay=options.weight_decay
        )
        done, best = 0, -math.inf
        last = out / "last.pt"
        if last.exists() and not (fresh or smoke or probe):
            done, best = _resume(last, model, optimizer)
        if lead:
            out.mkdir(parents=True, exist_ok=True)
            _write_split(out, data)
        log = _Log(out, done + 1, options.tensorboard) if lead else None
        if rank:
            torch.manual_seed(options.seed + rank)  # its own dropout
        wrapped = model if processes == 1 else nn.parallel.DistributedDataParallel(model)
        windows = WindowDataset(
            data.train,  # type: ignore[arg-type]
            window_seconds=config.data.window_seconds,
            stride_seconds=config.data.stride_seconds,
        )
        batches = training.random_windows(
            windows,
            batch_size=options.batch_size,
            steps=steps,
            seed=options.seed,
            first=done + 1,
            rank=rank,
            workers=config.data.workers if config.data.workers > 1 else 0,
        )
        memory: list[float] = []
        validations: list[Validation] = []

        def after(result: training.StepResult) -> None:
            nonlocal best
            memory.append(_memory(device))
            number = result.step
            if log is None:
                return
            log.write("step", number, {**asdict(result), "memory": memory[-1]})
            if on_step is not None:
                on_step(result)
            if data.validation and (number % options.validate_every == 0 or number == steps):
                scores = validate(
                    model,
                    data.validation,
                    window_seconds=config.data.window_seconds,
                    detect=config.detect,
                    step=number,
                    batch_size=options.batch_size,
                )
                model.train()
                validations[:] = [scores]
                log.write("validation", number, {"auroc": scores.auroc, **asdict(scores.scores)})
                if on_validation is not None:
                    on_validation(scores)
                if scores.rank > best:
                    best = scores.rank
                    training.save_checkpoint(
                        out / "best.pt", model, step=number, auroc=_plain(scores.auroc), **_facts(config)
                    )
            if number % options.checkpoint_every == 0 or number == steps:
                _save_last(last, model, optimizer, number, best)

        try:
            results = training.fit(
                wrapped,
                batches,
                steps=steps,
                first=done + 1,
                loss=functools.partial(focal_loss, pos_weight=_positive_weight(data.train), reduction="mean"),
                learning_rate=options.learning_rate,
                max_norm=options.max_norm,
                warmup=options.warmup,
                rate_steps=schedule.steps,
                optimizer=optimizer,
                autocast=torch.bfloat16 if options.precision == "bfloat16" else None,
                after_step=after,
                stop=stop,
            )
            if lead and results and results[-1].step % options.checkpoint_every and results[-1].step != steps:
                _save_last(last, model, optimizer, results[-1].step, best)
            if lead and not (out / "best.pt").exists() and results:
                training.save_checkpoint(out / "best.pt", model, step=results[-1].step, auroc=None, **_facts(config))
        finally:
            if log is not None:
                log.close()
    checked = bands(results, memory, schedule) if results and (smoke or probe) else None
    losses = [result.loss for result in results]
    shown = validations[-1] if validations else None
    return {
        "steps": len(results),
        "first": done + 1,
        "finite": sum(result.finite for result in results),
        "loss": {"first": losses[0], "last": losses[-1]} if losses else None,
        "seconds_per_step": statistics.median(result.seconds for result in results) if results else None,
        "validation": {"step": shown.step, "auroc": _plain(shown.auroc), **asdict(shown.scores)} if shown else None,
        "best": _plain(best),
        "recordings": {"train": len(data.train), "validation": len(data.validation)},
        "patients": {name: len({item.patient for item in items}) for name, items in data.split.items()},
        "failures": [asdict(failure) for failure in data.failures],
        "bands": checked,
        "out": str(out),
    }


def model_options(config: TrainConfig) -> dict[str, Any]:
    """The fields of `DetectorConfig` that a configuration changes; TOML has lists where that has tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.model.options.items()}


def _facts(config: TrainConfig) -> dict[str, Any]:
    """What `stablekern detect` needs to know besides the weights."""
    return {
        "window_seconds": config.data.window_seconds,
        "line_frequency": config.data.line_frequency,
        "detect": asdict(config.detect),
    }


def _write_split(out: Path, data: _Data) -> None:
    content = {
        "patients": {name: sorted({item.patient for item in items}) for name, items in data.split.items()},
        "left_out": [asdict(failure) for failure in data.failures],
    }
    with replaced(out / "split.json") as partial:
        partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
