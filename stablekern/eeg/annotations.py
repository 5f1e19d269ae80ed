"""When a recording holds a seizure, as four families of corpora write it down.

| corpus | file | what is read |
|---|---|---|
| TUSZ | `x.csv_bi`, `x.csv` beside `x.edf` | rows with `start_time`, `stop_time`, `label`; the union over channels |
| BIDS | `x_events.tsv` beside `x_eeg.edf` | the columns `onset`, `duration`, and `eventType` or `trial_type` |
| CHB-MIT | `chbNN-summary.txt` in the folder | `File Name`, and start and end times in seconds |
| Siena | `Seizures-list-PNNN.txt` in the folder | `File name`, and times of day, from the registration's start on |

All become `Event`s in seconds from the start of the recording. A row is a seizure if its label is one of
`SEIZURE_LABELS` or starts with `sz` or `seiz` (BIDS writes `sz_foc_ia`); background (`bckg`, `bckg_`), non-epileptic
seizures (`nesz`) and artefacts are none. An annotation file that cannot be understood raises `RecordingError` with its
name and line: silence would turn seizures into background.

Sources: Shah et al., Front. Neuroinform. 12 (2018) 83 (TUSZ); Shoeb, PhD thesis, MIT 2009 (CHB-MIT); Detti et al.,
Processes 8 (2020) 846 (Siena); Dan et al., Epilepsia 66 (2025) S2 (BIDS events of seizures).
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stablekern.errors import RecordingError, message

__all__ = ["SEIZURE_LABELS", "Event", "event_mask", "find_annotation", "is_seizure", "merge", "read_annotation"]

# The seizure classes of TUSZ. `nesz`, a non-epileptic seizure, is not one of the brain's and stays out.
SEIZURE_LABELS = frozenset("seiz fnsz gnsz spsz cpsz absz tnsz cnsz tcsz atsz mysz".split())

_DAY = 86400.0
_MISSING = ("", "n/a", "nan")


@dataclass(frozen=True, order=True)
class Event:
    """A stretch of a recording: `onset` and `duration` in seconds, both finite, `duration` > 0."""

    onset: float
    duration: float
    label: str = "seiz"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.onset) and np.isfinite(self.duration) and self.duration > 0):
            rule = "an event must have a finite `onset` and a finite `duration` > 0"
            raise ValueError(message("eeg.Event", rule, self.onset, self.duration))

    @property
    def end(self) -> float:
        return self.onset + self.duration


def is_seizure(label: str) -> bool:
    """Whether a corpus's label stands for an epileptic seizure."""
    name = label.strip().lower()
    return name in SEIZURE_LABELS or name.startswith(("sz", "seiz"))


def merge(events: Iterable[Event], *, gap: float = 0.0) -> list[Event]:
    """Sorted by onset; events that touch, or lie at most `gap` seconds apart, become one with the first's label."""
    merged: list[Event] = []
    for event in sorted(events):
        if merged and event.onset <= merged[-1].end + gap:
            last = merged[-1]
            merged[-1] = Event(last.onset, max(last.end, event.end) - last.onset, last.label)
        else:
            merged.append(event)
    return merged


def event_mask(events: Sequence[Event], start: int, stop: int, sample_rate: float) -> np.ndarray:
    """float32 (stop - start,): 1 where one of `events` covers the sample, the samples being `start` to `stop`."""
    mask = np.zeros(max(stop - start, 0), np.float32)
    for event in events:
        first, last = round(event.onset * sample_rate) - start, round(event.end * sample_rate) - start
        mask[max(first, 0) : max(last, 0)] = 1
    return mask


# ---- which file says it --------------------------------------------------------------------------------------------


def find_annotation(edf: str | os.PathLike[str]) -> Path | None:
    """The file that annotates the recording `edf`, or None.

    In this order: `.csv_bi`, `.csv` with its name; of a `NAME_eeg.edf` its BIDS `NAME_events.tsv`; a summary or seizure
    list in its folder that names it. What `stablekern detect` writes beside a recording is none of these.
    """
    edf = Path(edf)
    names = [f"{edf.stem}.csv_bi", f"{edf.stem}.csv"]
    names += [f"{edf.stem.removesuffix('_eeg')}_events.tsv"] if edf.stem.endswith("_eeg") else []
    for name in names:
        if (edf.parent / name).is_file():
            return edf.parent / name
    lists = sorted(
        path for path in edf.parent.glob("*.txt") if re.search(r"-summary$|^seizures-list", path.stem, re.IGNORECASE)
    )
    return next((path for path in lists if _names(path, edf.name)), None)


def _names(listing: Path, edf: str) -> bool:
    return edf.lower() in {name.lower() for name in _listed(listing)}


def _listed(listing: Path) -> dict[str, list[Event]]:
    text = listing.read_text(encoding="utf-8", errors="replace")
    return _chb_mit(listing, text) if re.search(r"-summary$", listing.stem, re.IGNORECASE) else _siena(listing, text)


def read_annotation(path: str | os.PathLike[str], edf: str | os.PathLike[str]) -> list[Event]:
    """The seizures of the recording `edf` in the annotation file `path`, sorted and merged where they overlap.

    Raises RecordingError if the file cannot be read, is not one of the four kinds, does not name the recording, or
    holds a row that makes no sense (a time that is no number, an end before its start).
    """
    path, edf = Path(path), Path(edf)
    try:
        if path.name.endswith((".csv", ".csv_bi")):
            return merge(_tusz(path))
        if path.name.endswith(".tsv"):
            return merge(_bids(path))
        if path.suffix == ".txt":
            listed = {name.lower(): events for name, events in _listed(path).items()}
            if edf.name.lower() not in listed:
                raise _error(path, f"does not name `{edf.name}`", ", ".join(sorted(listed)) or "no file")
            return merge(listed[edf.name.lower()])
    except OSError as cause:
        raise _error(path, "cannot be read", cause.strerror) from cause
    raise _error(path, "must be a .csv, .csv_bi, .tsv or .txt annotation", path.suffix)


def _error(path: Path, rule: str, *got: object) -> RecordingError:
    return RecordingError(message("eeg.read_annotation", f"`{path}` {rule}", *got))


def _event(path: Path, line: int, start: float, end: float, label: str) -> Event:
    try:
        return Event(start, end - start, label)
    except ValueError:
        raise _error(path, f"line {line}: an event must end after it starts", f"{start:g} to {end:g} s") from None


def _seconds(path: Path, line: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _error(path, f"line {line}: a time must be a number of seconds", repr(text)) from None


# ---- tables --------------------------------------------------------------------------------------------------------


def _rows(path: Path, delimiter: str, needed: Sequence[str]) -> Iterable[tuple[int, dict[str, str]]]:
    """(line, row by lower-case column name) of a table; lines that start with # are comments."""
    header: list[str] | None = None
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        for line, row in enumerate(csv.reader(file, delimiter=delimiter), 1):
            cells = [cell.strip() for cell in row]
            if not any(cells) or cells[0].startswith("#"):
                continue
            if header is None:
                header = [cell.lower() for cell in cells]
                absent = [name for name in needed if name not in header]
                if absent:
                    raise _error(path, f"lacks the columns {', '.join(absent)}", ", ".join(cells))
            elif len(cells) < len(header):
                raise _error(path, f"line {line} must have {len(header)} columns", len(cells))
            else:
                yield line, dict(zip(header, cells, strict=False))
    if header is None:
        raise _error(path, f"must have a header with {', '.join(needed)}", "an empty table")


def _tusz(path: Path) -> list[Event]:
    events = []
    for line, row in _rows(path, ",", ("start_time", "stop_time", "label")):
        if is_seizure(row["label"]):
            start, end = (_seconds(path, line, row[name]) for name in ("start_time", "stop_time"))
            events.append(_event(path, line, start, end, row["label"].lower()))
    return events


def _bids(path: Path) -> list[Event]:
    events = []
    for line, row in _rows(path, "\t", ("onset", "duration")):
        label = row.get("eventtype", row.get("trial_type"))
        if label is None:
            raise _error(path, "lacks a column eventType or trial_type", ", ".join(row))
        if is_seizure(label):
            if row["duration"].lower() in _MISSING:
                raise _error(path, f"line {line}: a seizure must have a duration", repr(row["duration"]))
            onset = _seconds(path, line, row["onset"])
            events.append(_event(path, line, onset, onset + _seconds(path, line, row["duration"]), label))
    return events


# ---- lists in prose ------------------------------------------------------------------------------------------------


def _fields(text: str) -> Iterable[tuple[int, str, str]]:
    """(line, what stands before the first colon in lower case, what stands after) of each line that has one."""
    for line, row in enumerate(text.splitlines(), 1):
        name, colon, value = row.partition(":")
        if colon:
            yield line, " ".join(name.lower().split()), value.strip()


def _chb_mit(path: Path, text: str) -> dict[str, list[Event]]:
    files: dict[str, list[Event]] = {}
    promised: dict[str, int] = {}
    current, start = None, None
    for line, name, value in _fields(text):
        if name == "file name":
            current, start = value, None
            files.setdefault(current, [])
        elif name == "number of seizures in file" and current:
            promised[current] = int(_seconds(path, line, value))
        elif re.fullmatch(r"seizure( \d+)? start time", name) and current:
            start = _seconds(path, line, value.split()[0] if value else "")
        elif re.fullmatch(r"seizure( \d+)? end time", name) and current:
            if start is None:
                raise _error(path, f"line {line}: a seizure must have a start before its end", value)
            files[current].append(_event(path, line, start, _seconds(path, line, value.split()[0]), "seiz"))
            start = None
    for file, count in promised.items():
        if len(files[file]) != count:
            raise _error(path, f"promises {count} seizures in `{file}`", len(files[file]))
    return files


def _clock(path: Path, line: int, text: str) -> float:
    """`19.58.36` or `19:58:36` as seconds of the day."""
    match = re.fullmatch(r"(\d{1,2})[.:](\d{1,2})[.:](\d{1,2})", re.sub(r"\s", "", text))
    parts = [int(part) for part in match.groups()] if match else []
    if not parts or parts[0] > 24 or parts[1] > 59 or parts[2] > 59:
        raise _error(path, f"line {line}: a time of day must have the form 19.58.36", repr(text))
    return 3600.0 * parts[0] + 60.0 * parts[1] + parts[2]


def _siena(path: Path, text: str) -> dict[str, list[Event]]:
    files: dict[str, list[Event]] = {}
    current: str | None = None
    begin: float | None = None
    start: float | None = None
    for line, name, value in _fields(text):
        if name == "file name":
            current, start = value, None
            files.setdefault(current, [])
        elif name == "registration start time":
            begin = _clock(path, line, value)
        elif name in ("seizure start time", "start time"):
            start = _clock(path, line, value)
        elif name in ("seizure end time", "end time"):
            if current is None or begin is None or start is None:
                raise _error(path, f"line {line}: a seizure must have a file, a registration and a start", value)
            # A recording may run past midnight; no registration of a night is longer than a day.
            onset = (start - begin) % _DAY
            end = onset + (_clock(path, line, value) - start) % _DAY
            files[current].append(_event(path, line, onset, end, "seiz"))
            start = None
    return files
