"""`stablekern detect`: the events in one recording, as a table and a picture."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from stablekern import training
from stablekern._files import replaced
from stablekern.cli.pictures import overview, png
from stablekern.eeg import Recording, WindowDataset, prepare, read_edf
from stablekern.eeg.annotations import Event
from stablekern.eeg.experiment import DetectOptions
from stablekern.eeg.scoring import find_events
from stablekern.errors import RecordingError, StablekernError, message

__all__ = ["Options", "detect", "run"]


@dataclass(frozen=True)
class Options:
    """What the command line gives; the thresholds None are those that the checkpoint was scored with."""

    edf: Path
    checkpoint: Path
    out: Path | None = None
    on: float | None = None
    off: float | None = None
    allow_truncated: bool = False


def detect(options: Options) -> tuple[Recording, np.ndarray, list[Event], dict[str, float]]:
    """(the prepared recording, the probability of each sample, the events, the thresholds used)."""
    model, facts = training.load_checkpoint(options.checkpoint)
    if "window_seconds" not in facts:
        rule = f"`{options.checkpoint}` must be a checkpoint of `stablekern train`, which knows how data was prepared"
        raise ValueError(message("detect", rule, ", ".join(sorted(facts))))
    seconds = float(facts["window_seconds"])
    recording = prepare(
        read_edf(options.edf, allow_truncated=options.allow_truncated), line_frequency=facts["line_frequency"]
    )
    if recording.seconds < seconds:
        rule = f"`{options.edf}` must last at least one window of {seconds:g} s"
        raise RecordingError(message("detect", rule, f"{recording.seconds:.1f} s"))
    windows = WindowDataset(recording, window_seconds=seconds, stride_seconds=seconds / 2, tail=True)
    (probability,) = training.predict(model, windows)
    chosen = {**asdict(DetectOptions()), **facts["detect"]}
    chosen |= {name: value for name, value in (("on", options.on), ("off", options.off)) if value is not None}
    if options.on is not None and options.off is None:
        chosen["off"] = min(chosen["off"], options.on)
    events = find_events(probability.numpy(), recording.sample_rate, **chosen)
    return recording, probability.numpy(), events, chosen


def run(options: Options, *, as_json: bool = False) -> int:
    """Write `events.tsv` and `events.png` beside the recording, or into `out`; print what was found.

    The table is that of BIDS: `onset`, `duration` in seconds, `eventType` (`sz`), `confidence` (the mean probability
    in the event), `recordingDuration`. Returns the exit code: 0; 2 for a file that cannot be used.
    """
    try:
        recording, probability, events, chosen = detect(options)
        folder = options.out or options.edf.parent
        folder.mkdir(parents=True, exist_ok=True)
        stem = options.edf.stem
        table, picture = folder / f"{stem}_events.tsv", folder / f"{stem}_events.png"
        rows = [_row(event, recording, probability) for event in events]
        with replaced(table) as partial, partial.open("w", newline="", encoding="utf-8") as file:
            names = ("onset", "duration", "eventType", "confidence", "recordingDuration")
            writer = csv.DictWriter(file, names, delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        with replaced(picture) as partial:
            png(overview(recording, probability, events, chosen["on"], chosen["off"]), partial)
    except (StablekernError, ValueError, OSError) as error:
        print(f"stablekern detect: {error}", file=sys.stderr)
        return 2
    if as_json:
        files = {"table": str(table), "picture": str(picture)}
        print(json.dumps({"events": rows, "thresholds": chosen, "notes": recording.notes, "files": files}, indent=2))
        return 0
    for note in recording.notes:
        print(f"  - {note}", file=sys.stderr)
    print(f"{len(rows)} events in {recording.seconds / 60:.1f} min of {options.edf.name}")
    for row in rows:
        print(f"  {row['onset']:>10.1f} s  {row['duration']:>7.1f} s  probability {row['confidence']:.2f}")
    print(f"{table}\n{picture}")
    return 0


def _row(event: Event, recording: Recording, probability: np.ndarray) -> dict[str, float | str]:
    first, last = (round(second * recording.sample_rate) for second in (event.onset, event.end))
    return {
        "onset": round(event.onset, 3),
        "duration": round(event.duration, 3),
        "eventType": "sz",
        "confidence": round(float(np.nanmean(probability[first:last])), 4),
        "recordingDuration": round(recording.seconds, 3),
    }
