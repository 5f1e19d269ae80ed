r"""A folder of recordings with their seizures, split by patient, prepared once, and read back one window at a time.

    found = scan("corpus")                                    # EDF files, patients, seizures
    parts = patient_split(found.items, (0.7, 0.15, 0.15), seed=0)
    cache = build_cache(parts["train"], "cache", workers=2)   # a killed run goes on where it was
    windows = WindowDataset(cache.recordings, window_seconds=60, stride_seconds=10)

**Cache.** A recording is a file `NAME-KEY.npy` of float16 (samples, 19), time first: a window is one contiguous read of
a memory-mapped file, and only the windows that are drawn are read. Values are what `prepare` gives, clipped to +-10
spreads, so float16 costs at most $2^{-11}$ of a value, far below the noise of an amplifier. Beside it `NAME-KEY.json`
has the length, the patient and the seizures. KEY is a hash of the file's path, size and time of change and of every
setting, so a changed recording or setting makes a new file and never reads an old one. Both are written under another
name first; the JSON comes last and means that all of it is there.

**Failures.** A recording that cannot be used (damaged, no electrodes, an annotation that makes no sense) is listed
with its reason and left out; nothing else stops.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from stablekern import _check
from stablekern._files import replaced
from stablekern.eeg.annotations import Event, event_mask, find_annotation, read_annotation
from stablekern.eeg.edf import read_edf
from stablekern.eeg.montage import CHANNELS
from stablekern.eeg.preprocess import prepare
from stablekern.errors import RecordingError, StablekernError, message

__all__ = [
    "Cache",
    "CachedRecording",
    "Failure",
    "Item",
    "PrepareOptions",
    "Scan",
    "build_cache",
    "patient_of",
    "patient_split",
    "scan",
]

_FORMAT = 1  # raise it when what is in a cached file changes
_PARTS = ("train", "validation", "test")
# The folders of a corpus that is split already, and which part they are.
_OFFICIAL = {
    "train": "train",
    "dev": "validation",
    "valid": "validation",
    "validation": "validation",
    "eval": "test",
    "test": "test",
}
# The 21st case of CHB-MIT is its first patient again, a year and a half later.
_SAME_PATIENT = {"chb21": "chb01"}


@dataclass(frozen=True)
class Item:
    """A recording on disk: its EDF file, whose it is, and its seizures."""

    edf: Path
    patient: str
    events: tuple[Event, ...]
    part: str | None = None  # where the corpus's own folders put it


@dataclass(frozen=True)
class Failure:
    """A recording that is left out, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Scan:
    """What a folder holds: `items` that can be used, and `failures`, sorted by path."""

    items: tuple[Item, ...]
    failures: tuple[Failure, ...]


# ---- what there is -------------------------------------------------------------------------------------------------


def patient_of(edf: str | os.PathLike[str]) -> str:
    """Whose recording a file is, from its name: recordings with one answer never part in a split.

    `sub-01_...` (BIDS), `chb01_03` (CHB-MIT; chb21 is chb01), `PN00-1` (Siena), `aaaaaaac_s001_t000` (TUSZ). A name of
    no known form belongs to the folder that it lies in.
    """
    edf = Path(edf)
    for form in (r"(sub-[a-z0-9]+)_", r"(chb\d+)[a-z]?_", r"(pn\d+)-", r"([a-z]{8})_s\d+_t\d+"):
        match = re.match(form, edf.stem, re.IGNORECASE)
        if match:
            name = match[1].lower()
            return _SAME_PATIENT.get(name, name)
    return str(edf.parent)


def scan(folder: str | os.PathLike[str], *, limit: int | None = None) -> Scan:
    """Find every EDF file under `folder` and its annotation; nothing but annotations is read yet.

    A recording without an annotation is a failure: nobody said that it holds no seizure. `limit` keeps the first
    ones by path. Raises RecordingError if there is no such folder or no EDF file in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise RecordingError(message("eeg.scan", f"`{folder}` must be a folder of EDF files", "no such folder"))
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".edf" and path.is_file())
    if not files:
        raise RecordingError(message("eeg.scan", f"`{folder}` must hold EDF files", "none"))
    items, failures = [], []
    for edf in files[:limit]:
        shown = str(edf.relative_to(folder))
        annotation = find_annotation(edf)
        if annotation is None:
            rule = "no annotation: neither .csv_bi, .csv, _events.tsv nor a summary that names it"
            failures.append(Failure(shown, rule))
            continue
        try:
            events = tuple(read_annotation(annotation, edf))
        except RecordingError as error:
            failures.append(Failure(shown, _reason(error)))
            continue
        folders = [part.lower() for part in edf.relative_to(folder).parts[:-1]]
        part = next((_OFFICIAL[name] for name in folders if name in _OFFICIAL), None)
        items.append(Item(edf, patient_of(edf), events, part))
    return Scan(tuple(items), tuple(failures))


def _reason(error: Exception) -> str:
    return str(error).partition(": ")[2] if isinstance(error, StablekernError) else str(error)


def patient_split(
    items: Sequence[Item], shares: Sequence[float] = (0.7, 0.15, 0.15), *, seed: int = 0
) -> dict[str, list[Item]]:
    """`{"train": ..., "validation": ..., "test": ...}`, no patient in two of them; the same seed gives the same split.

    A corpus whose folders say it (train, dev or validation, eval or test) is split as they say, if every recording has
    one. Otherwise the patients are dealt out at random: those with a seizure and those without each by `shares`
    (three numbers >= 0 whose sum is 1), so that each part has of both if there are enough. A part with a positive
    share gets at least one patient if there are as many.
    Raises RecordingError if the folders put a patient into two parts.
    """
    if len(shares) != 3 or any(not 0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        rule = "`shares` must be three numbers >= 0 whose sum is 1"
        raise ValueError(message("eeg.patient_split", rule, list(shares)))
    parts: dict[str, list[Item]] = {name: [] for name in _PARTS}
    if items and all(item.part for item in items):
        where: dict[str, str] = {}
        for item in items:
            if where.setdefault(item.patient, item.part or "") != item.part:
                rule = f"patient {item.patient} must be in one part of the corpus"
                raise RecordingError(message("eeg.patient_split", rule, where[item.patient], item.part))
            parts[item.part].append(item)
        return parts
    with_seizures = {item.patient for item in items if item.events}
    generator = np.random.default_rng(seed)
    assigned: dict[str, str] = {}
    for group in (sorted(with_seizures), sorted({item.patient for item in items} - with_seizures)):
        order = [group[i] for i in generator.permutation(len(group))]
        for patient, part in zip(order, _deal(len(order), shares), strict=True):
            assigned[patient] = part
    for item in items:
        parts[assigned[item.patient]].append(item)
    return parts


def _deal(count: int, shares: Sequence[float]) -> list[str]:
    """The part of each of `count` patients: the nearest whole numbers to the shares, none of them 0 if possible."""
    wanted = [share * count for share in shares]
    numbers = [int(w) for w in wanted]
    for index in sorted(range(3), key=lambda i: numbers[i] - wanted[i])[: count - sum(numbers)]:
        numbers[index] += 1
    for index, share in enumerate(shares):
        if share > 0 and numbers[index] == 0 and max(numbers) > 1:
            numbers[numbers.index(max(numbers))] -= 1
            numbers[index] += 1
    return [name for name, number in zip(_PARTS, numbers, strict=True) for _ in range(number)]


# ---- the cache -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrepareOptions:
    """How a recording is prepared; the arguments of `read_edf` and `prepare`."""

    sample_rate: float = 256.0
    max_interpolated: int = 6
    allow_truncated: bool = False
    low: float = 0.5
    high: float = 120.0
    line_frequency: float | None = 60.0
    clip: float = 10.0


@functools.lru_cache(maxsize=256)
def _mapped(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r")


@dataclass(frozen=True)
class CachedRecording:
    """A prepared recording in a cache; stands where a `Recording` does in a `WindowDataset`, and reads when asked."""

    path: Path  # float16 (samples, 19)
    samples: int
    sample_rate: float
    source: str
    patient: str
    events: tuple[Event, ...]
    notes: tuple[str, ...] = ()
    channels: tuple[str, ...] = CHANNELS
    unit: str = "sigma"

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Recording.window`: one contiguous read."""
        rows = _mapped(str(self.path))[start:stop]
        return rows.T.astype(np.float32, order="C"), event_mask(self.events, start, stop, self.sample_rate)

    def label_mask(self) -> np.ndarray:
        """bool (samples,): where a seizure is."""
        return event_mask(self.events, 0, self.samples, self.sample_rate) > 0

    @property
    def labels(self) -> np.ndarray:
        """float32 (samples,)."""
        return event_mask(self.events, 0, self.samples, self.sample_rate)


@dataclass(frozen=True)
class Cache:
    """`recordings` in the order of the items they came from, and the `failures`."""

    recordings: list[CachedRecording]
    failures: list[Failure]


def _key(item: Item, options: PrepareOptions) -> str:
    status = item.edf.stat()
    facts = [_FORMAT, str(item.edf.resolve()), status.st_size, status.st_mtime_ns, asdict(options), CHANNELS]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _load(described: Path, item: Item) -> CachedRecording | None:
    """A finished entry. The seizures are the item's: an annotation that changed needs no new data."""
    try:
        facts = json.loads(described.read_text(encoding="utf-8"))
        data = described.with_suffix(".npy")
        shape = (facts["samples"], len(CHANNELS))
        whole = data.stat().st_size >= 2 * shape[0] * shape[1]
    except (OSError, ValueError, KeyError):
        return None
    if not whole:
        return None
    return CachedRecording(
        data, shape[0], facts["sample_rate"], str(item.edf), item.patient, item.events, tuple(facts["notes"])
    )


def _prepare(item: Item, described: Path, options: PrepareOptions) -> str | None:
    """Write one entry; returns what is wrong with the recording, None if nothing is."""
    try:
        recording = read_edf(
            item.edf,
            sample_rate=options.sample_rate,
            max_interpolated=options.max_interpolated,
            allow_truncated=options.allow_truncated,
        )
        recording = prepare(
            recording, low=options.low, high=options.high, line_frequency=options.line_frequency, clip=options.clip
        )
    except RecordingError as error:
        return _reason(error)
    with replaced(described.with_suffix(".npy")) as partial, partial.open("wb") as file:
        np.save(file, np.ascontiguousarray(recording.data.T.astype(np.float16)))
    facts = {
        "source": str(item.edf),
        "samples": recording.samples,
        "sample_rate": recording.sample_rate,
        "notes": recording.notes,
    }
    with replaced(described) as partial:
        partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return None


def _one_thread() -> None:
    """In a worker: the workers are the parallelism."""
    import torch

    torch.set_num_threads(1)


def build_cache(
    items: Iterable[Item],
    cache: str | os.PathLike[str],
    options: PrepareOptions = PrepareOptions(),
    *,
    workers: int = 1,
    progress: Callable[[int, int, Item], None] | None = None,
) -> Cache:
    """Prepare what is not in the folder `cache` yet, `workers` recordings at a time, and open all of it.

    `progress(done, total, item)` is called after each. What was finished before a kill is not done again. With
    `workers` = 1 everything runs in this process.
    Raises ValueError for `workers` < 1, OSError if `cache` cannot be written.
    """
    _check.integer("eeg.build_cache", "workers", workers, low=1)
    cache = Path(cache).expanduser()
    cache.mkdir(parents=True, exist_ok=True)
    entries: list[tuple[Item, Path | None]] = []
    failed: dict[int, str] = {}
    for index, item in enumerate(items):
        try:
            entries.append((item, cache / f"{item.edf.stem}-{_key(item, options)}.json"))
        except OSError as error:
            entries.append((item, None))
            failed[index] = f"cannot be read: {error.strerror}"
    missing = [i for i, (item, path) in enumerate(entries) if path is not None and _load(path, item) is None]
    done = len(entries) - len(missing)

    def finished(index: int, reason: str | None) -> None:
        nonlocal done
        done += 1
        if reason is not None:
            failed[index] = reason
        if progress is not None:
            progress(done, len(entries), entries[index][0])

    if workers == 1 or len(missing) < 2:
        for index in missing:
            finished(index, _prepare(*entries[index], options))  # type: ignore[arg-type]
    else:
        # Not fork: torch's threads do not survive it.
        with ProcessPoolExecutor(
            min(workers, len(missing)), multiprocessing.get_context("spawn"), initializer=_one_thread
        ) as pool:
            jobs = {pool.submit(_prepare, *entries[index], options): index for index in missing}  # type: ignore[arg-type]
            for job in as_completed(jobs):
                finished(jobs[job], job.result())
    recordings, failures = [], []
    for index, (item, path) in enumerate(entries):
        loaded = None if index in failed or path is None else _load(path, item)
        if loaded is None:
            failures.append(Failure(str(item.edf), failed.get(index, "could not be read back from the cache")))
        else:
            recordings.append(loaded)
    return Cache(recordings, failures)
