"""A scalp recording on the 19 electrodes, and how signals with any labels, rates and defects become one.

Whatever comes in, a `Recording` that comes out is finite, at one rate and in one order of channels; everything that was
done to get there is a sentence in its `notes`. What cannot be repaired is a `RecordingError` that says what is wrong
and what is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stablekern._check import integer, number
from stablekern.eeg.montage import (
    CHANNELS,
    canonical_name,
    derivation,
    electrode_name,
    interpolation_weights,
    is_bipolar,
    potentials,
    split_label,
)
from stablekern.eeg.preprocess import FLAT_MICROVOLTS, resample
from stablekern.errors import RecordingError, message

# What lies beyond these is a damaged header or a wrong unit: amplifiers saturate well below 10 V, and no EEG is
# sampled more slowly or faster.
_LARGEST_MICROVOLTS = 1e7
_RATES = (1.0, 1e5)  # Hz


@dataclass(frozen=True, eq=False)
class Recording:
    """Signals of the 19 electrodes.

    - `data`: float32 (19, samples), always finite; other real types are converted.
    - `sample_rate`: Hz. `samples` and `seconds` give the length.
    - `source`: where it came from, for messages.
    - `channels`: the names of the rows.
    - `unit`: `"uV"`, or `"sigma"` after `prepare`.
    - `notes`: one sentence for each thing that was done to the data.
    - `labels`: float32 (samples,), 1 where a discharge is; None if nobody has said.

    Raises RecordingError if shapes disagree or `data` is not finite.
    """

    data: np.ndarray
    sample_rate: float
    source: str = "arrays"
    channels: tuple[str, ...] = CHANNELS
    unit: str = "uV"
    notes: tuple[str, ...] = ()
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        where = "eeg.Recording"
        number(where, "sample_rate", self.sample_rate, low=0, strict=True)
        object.__setattr__(self, "data", np.ascontiguousarray(self.data, np.float32))
        if self.data.ndim != 2 or self.data.shape[0] != len(self.channels):
            rule = f"`data` must have the shape ({len(self.channels)}, samples)"
            raise RecordingError(message(where, rule, self.data.shape))
        bad = ", ".join(name for name, row in zip(self.channels, self.data, strict=True) if not np.isfinite(row).all())
        if bad:
            raise RecordingError(message(where, "`data` must be finite", f"NaN or infinity in {bad}"))
        if self.labels is not None:
            object.__setattr__(self, "labels", np.ascontiguousarray(self.labels, np.float32))
            if self.labels.shape != (self.samples,):
                rule = f"`labels` must have the shape ({self.samples},)"
                raise RecordingError(message(where, rule, self.labels.shape))

    @property
    def samples(self) -> int:
        return self.data.shape[1]

    def window(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Copies of the samples `start` to `stop`: data float32 (channels, L), labels float32 (L,), zeros if None."""
        labels = np.zeros(stop - start, np.float32) if self.labels is None else self.labels[start:stop].copy()
        return self.data[:, start:stop].copy(), labels

    def label_mask(self) -> np.ndarray:
        """bool (samples,): where a discharge is."""
        return np.zeros(self.samples, bool) if self.labels is None else self.labels > 0

    @property
    def seconds(self) -> float:
        return self.samples / self.sample_rate

    def crop(self, start: int, stop: int) -> Recording:
        """The samples `start` to `stop` by Python's slice rules, and their labels."""
        labels = None if self.labels is None else self.labels[start:stop]
        return replace(self, data=self.data[:, start:stop], labels=labels)


@dataclass(frozen=True)
class Signal:
    """One channel as it comes: `read` gives its samples in microvolts, `fault` says why they are of no use."""

    label: str
    rate: float
    read: Callable[[], np.ndarray]
    fault: str | None = None

    def load(self) -> tuple[np.ndarray, str | None]:
        """The samples, and what is wrong with them."""
        if self.fault:
            return np.zeros(0), self.fault
        if not _RATES[0] <= self.rate <= _RATES[1]:
            return np.zeros(0), f"a rate of {self.rate:g} Hz"
        data = self.read()
        if data.size == 0:
            return data, "no samples"
        if not np.isfinite(data).all():
            return data, "NaN or infinite samples"
        if np.abs(data).max() > _LARGEST_MICROVOLTS:
            return data, f"up to {np.abs(data).max():.3g} uV, which is no EEG"
        return data, f"flat, standard deviation below {FLAT_MICROVOLTS} uV" if data.std() < FLAT_MICROVOLTS else None


def from_arrays(
    signals: Sequence[np.ndarray],
    labels: Sequence[str],
    rates: float | Sequence[float],
    *,
    sample_rate: float = 256.0,
    max_interpolated: int = 6,
    source: str = "arrays",
) -> Recording:
    """As `read_edf`, from signals in memory: an array (samples,) in microvolts per label, `rates` in Hz, one or each.

    A signal with a NaN or an infinity anywhere counts as missing.
    """
    arrays = [np.asarray(signal, np.float64) for signal in signals]
    each = [float(rate) for rate in np.broadcast_to(rates, len(arrays) if np.ndim(rates) == 0 else np.shape(rates))]
    if not len(arrays) == len(labels) == len(each):
        rule = "`signals`, `labels` and `rates` must be of one length"
        raise ValueError(message("eeg.from_arrays", rule, len(arrays), len(labels), len(each)))
    for array, rate in zip(arrays, each, strict=True):
        number("eeg.from_arrays", "rates", rate, low=0, strict=True)
        if array.ndim != 1:
            rule = "each of `signals` must have the shape (samples,)"
            raise ValueError(message("eeg.from_arrays", rule, array.shape))
    made = [
        Signal(label, rate, functools.partial(np.asarray, array))
        for label, rate, array in zip(labels, each, arrays, strict=True)
    ]
    return assemble("eeg.from_arrays", made, sample_rate, max_interpolated, source, ())


def assemble(
    where: str, signals: list[Signal], sample_rate: float, max_interpolated: int, source: str, notes: tuple[str, ...]
) -> Recording:
    """Pick the 19 electrodes, resample, and interpolate what is missing; the rules are those of `read_edf`."""
    number(where, "sample_rate", sample_rate, low=0, strict=True)
    integer(where, "max_interpolated", max_interpolated, low=0, high=len(CHANNELS) - 4)  # the spline needs 4 electrodes
    picked: dict[str, Signal] = {}
    loaded: dict[str, np.ndarray] = {}
    faults, duplicates = [], []

    def pick(name: str, signal: Signal) -> None:
        if name in picked:
            duplicates.append(f"{signal.label} (after {picked[name].label})")
            return
        data, fault = signal.load()
        if fault:
            faults.append(f"{signal.label}: {fault}")
        else:
            picked[name], loaded[name] = signal, resample(data, signal.rate, sample_rate).astype(np.float32)

    others = []
    for signal in signals:
        name = canonical_name(signal.label)
        others.append(signal) if name is None else pick(name, signal)
    found = [name for name in CHANNELS if name in picked]
    missing = [name for name in CHANNELS if name not in picked]
    derived: list[str] = []
    if len(missing) > max_interpolated:
        solved, derived, unusable = _from_derivations(others, sample_rate)
        faults += unusable
        if len(set(CHANNELS) - set(solved)) > max_interpolated:
            raise RecordingError(_too_many_missing(where, source, found, missing, others, faults, max_interpolated))
        picked, loaded = {}, solved
        found = [name for name in CHANNELS if name in solved]
        missing = [name for name in CHANNELS if name not in solved]
        others = [signal for signal in others if signal.label not in derived]
    elif missing:
        for signal in others:
            name = electrode_name(signal.label)
            if name is not None:
                pick(name, signal)

    length = min(data.size for data in loaded.values())
    sources = list(loaded)
    stacked = np.stack([data[:length] for data in loaded.values()])
    data = np.empty((len(CHANNELS), length), np.float32)
    data[[CHANNELS.index(name) for name in found]] = stacked[[sources.index(name) for name in found]]
    if missing:
        weights = interpolation_weights(sources, missing).astype(np.float32)
        data[[CHANNELS.index(name) for name in missing]] = weights @ stacked

    rates = sorted({signal.rate for signal in picked.values()} - {sample_rate})
    spelled = {name: split_label(picked[name].label) for name in found if name in picked}
    renamed = [f"{picked[name].label} to {name}" for name in spelled if spelled[name][0] != name.upper()]
    references = sorted({reference or "none" for _, reference in spelled.values()})
    said = {
        f"resampled from {', '.join(f'{rate:g}' for rate in rates)} to {sample_rate:g} Hz": rates,
        f"renamed {', '.join(renamed)}": renamed,
        f"the channels name different references: {', '.join(references)}": len(references) > 1,
        f"solved for the potentials from {len(derived)} bipolar derivations, against the mean of {len(sources)} "
        "electrodes": derived,
        f"interpolated {', '.join(missing)} by spherical splines from {len(sources)} electrodes": missing,
        f"unusable: {'; '.join(faults)}": faults,
        f"left out as duplicates: {', '.join(duplicates)}": duplicates,
        f"left out, not among the 19 electrodes: {', '.join(signal.label for signal in others)}": others,
    }
    notes = (*notes, *(note for note, happened in said.items() if happened))
    return Recording(data, float(sample_rate), source, notes=notes)


def _from_derivations(signals: list[Signal], sample_rate: float) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Potentials of the electrodes that bipolar derivations connect; the labels used, and what was wrong with others.

    The derivations are cut to the shortest. Nothing is returned if there are none.
    """
    pairs, rows, labels, faults = [], [], [], []
    for signal in signals:
        pair = derivation(signal.label)
        if pair is None:
            continue
        data, fault = signal.load()
        if fault:
            faults.append(f"{signal.label}: {fault}")
        else:
            pairs.append(pair)
            rows.append(resample(data, signal.rate, sample_rate))
            labels.append(signal.label)
    if not pairs:
        return {}, [], faults
    names, matrix = potentials(pairs)
    length = min(row.size for row in rows)
    solved = (matrix @ np.stack([row[:length] for row in rows])).astype(np.float32)
    return dict(zip(names, solved, strict=True)), labels, faults


def _too_many_missing(
    where: str,
    source: str,
    found: list[str],
    missing: list[str],
    others: list[Signal],
    faults: list[str],
    max_interpolated: int,
) -> str:
    rule = f"`{source}` lacks {len(missing)} of the 19 electrodes, {', '.join(missing)}, and `max_interpolated` is "
    rule += str(max_interpolated)
    if faults:
        rule += f"; unusable are {'; '.join(faults)}"
    bipolar = [signal.label for signal in others if is_bipolar(signal.label)]
    if bipolar:
        rule += (
            f"; {', '.join(bipolar)} are bipolar derivations, differences of two electrodes, which do not connect "
            "enough of them to solve for their potentials: export the recording against one common reference"
        )
    rest = [signal.label for signal in others if signal.label not in bipolar]
    return message(where, rule, f"{', '.join(found) or 'none of them'}; not recognised: {', '.join(rest) or 'nothing'}")
