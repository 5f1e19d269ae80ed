"""From microvolts as recorded to what a network takes: resample, band-pass, notch, scale, clip.

The filters run forwards and backwards, so they have no phase: a discharge stays under its label. The price is that each
output sample depends on about a second of the future, which suits windows cut from a recording, not streaming. Every
magnitude response below is that of both passes.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from stablekern._check import choice, number
from stablekern.eeg._extra import extra
from stablekern.errors import RecordingError, message

if TYPE_CHECKING:
    from stablekern.eeg.recording import Recording

# A spread below this is not a working scalp electrode: the input noise of an EEG amplifier alone is 0.2 uV RMS or more.
FLAT_MICROVOLTS = 0.1
# For a normal distribution, the standard deviation over the median absolute deviation: 1 / Phi^-1(3/4).
MAD_TO_SIGMA = 1.4826022185056018
# The ratio of two rates is taken as a fraction with a denominator up to this: exact for any rates in use, and at worst
# 1 / (2 * 100000) off, 18 ms in an hour.
_LARGEST_DENOMINATOR = 100_000


def resample(data: np.ndarray, rate: float, sample_rate: float) -> np.ndarray:
    """Change the rate of `data` (..., samples) from `rate` to `sample_rate` Hz, by a zero-phase polyphase filter.

    The filter (MNE's, a Kaiser-windowed low-pass) stops what would alias; nothing above half the lower rate survives.
    Returns float64 (..., ceil(samples * sample_rate / rate)), `data` itself when the rates agree. The ends are extended
    by reflection. Needs the extra `eeg`. ValueError for a rate that is not positive, or
    a ratio of less than 1/100 000.
    """
    rate = number("eeg.resample", "rate", float(rate), low=0, strict=True)
    sample_rate = number("eeg.resample", "sample_rate", float(sample_rate), low=0, strict=True)
    ratio = Fraction(sample_rate / rate).limit_denominator(_LARGEST_DENOMINATOR)
    if ratio == 1:
        return data
    if ratio == 0:
        rule = f"`sample_rate` must be at least `rate` / {_LARGEST_DENOMINATOR}"
        raise ValueError(message("eeg.resample", rule, sample_rate, rate))
    data = np.asarray(data, np.float64)
    mne = extra("eeg.resample", "mne.filter")
    return mne.resample(data, ratio.numerator, ratio.denominator, method="polyphase", pad="reflect", verbose="ERROR")


def bandpass(
    data: np.ndarray,  # (channels, samples)
    sample_rate: float,
    *,
    low: float = 0.5,
    high: float = 120.0,
    line_frequency: float | None = 60.0,
) -> np.ndarray:  # (channels, samples), float32
    """Zero-phase band-pass `low`..`high` Hz and a notch at `line_frequency`.

    Butterworth of order 3 at either corner, where both passes together give a gain of 1/2 (-6 dB); the notch is 2 Hz
    wide at that gain (at 60 Hz; Q = 30) and leaves the harmonics alone. `line_frequency` is 50, 60 or None for no
    notch. Computed in float64, one channel at a time. The ends are extended by odd reflection over 3/`low` seconds.

    ValueError unless 0 < low < high < sample_rate / 2. Needs the extra `eeg` (SciPy).
    """
    choice("eeg.bandpass", "line_frequency", line_frequency, (50, 60, None))
    if not 0 < low < high < sample_rate / 2:
        rule = f"0 < `low` < `high` < {sample_rate / 2:g} Hz, half the sample rate, must hold"
        raise ValueError(message("eeg.bandpass", rule, low, high))
    if line_frequency is not None and line_frequency >= sample_rate / 2:
        rule = f"`line_frequency` must be below {sample_rate / 2:g} Hz, half the sample rate; None for no notch"
        raise ValueError(message("eeg.bandpass", rule, line_frequency))
    signal = extra("eeg.bandpass", "scipy.signal")
    sections = signal.butter(3, (low, high), "bandpass", fs=sample_rate, output="sos")
    if line_frequency is not None:
        sections = np.vstack([sections, signal.tf2sos(*signal.iirnotch(line_frequency, 30.0, fs=sample_rate))])
    edge = min(data.shape[-1] - 1, round(3 * sample_rate / low))
    filtered = np.empty(data.shape, np.float32)
    for row, out in zip(data, filtered, strict=True):
        out[:] = signal.sosfiltfilt(sections, np.asarray(row, np.float64), padlen=edge)
    return filtered


def robust_sigma(data: np.ndarray) -> np.ndarray:
    """The spread of each channel that a few large bursts do not move: 1.4826 * median |x - median x|, (channels,).

    Equals the standard deviation for normal data, and stays bounded while fewer than half of the samples are outliers.
    A channel that rests exactly still more than half of the time has the value 0 here, whatever it does in the rest.
    """
    centre = np.median(data, axis=-1, keepdims=True)
    return MAD_TO_SIGMA * np.median(np.abs(data - centre), axis=-1)


def robust_scale(data: np.ndarray, *, clip: float = 10.0) -> np.ndarray:
    """(x - median) / spread per channel, clipped to +-`clip`: microvolts (channels, samples) in, float32 out.

    The spread is `robust_sigma`; where that is below 0.1 uV (a channel that rests most of the time) it is the standard
    deviation, and never less than 0.1 uV, so that a flat channel becomes zeros and noise is not blown up.
    ValueError for data that is not finite or a `clip` that is not positive.
    """
    number("eeg.robust_scale", "clip", clip, low=0, strict=True)
    bad = int((~np.isfinite(data)).sum())
    if bad:
        raise ValueError(message("eeg.robust_scale", "`data` must be finite", f"{bad} NaN or infinite samples"))
    sigma = robust_sigma(data)
    sigma = np.where(sigma < FLAT_MICROVOLTS, np.maximum(data.std(axis=-1), FLAT_MICROVOLTS), sigma)
    scaled = (data - np.median(data, axis=-1, keepdims=True)) / sigma[:, None]
    return np.clip(scaled, -clip, clip).astype(np.float32)


def prepare(
    recording: Recording,
    *,
    low: float = 0.5,
    high: float = 120.0,
    line_frequency: float | None = 60.0,
    clip: float = 10.0,
) -> Recording:
    """`bandpass`, then `robust_scale`: a recording in microvolts in, one in units of the background's spread out.

    Labels and times are unchanged. The scale is taken from the whole of what is given, so cut a recording into training
    and held-out parts (`split`) before, not after. RecordingError if it has been scaled already or is empty.
    """
    if recording.unit != "uV":
        raise RecordingError(message("eeg.prepare", "the recording must be in microvolts", repr(recording.unit)))
    if recording.samples < 2:
        raise RecordingError(message("eeg.prepare", "the recording must hold samples", recording.samples))
    data = bandpass(recording.data, recording.sample_rate, low=low, high=high, line_frequency=line_frequency)
    notch = "" if line_frequency is None else f", notch at {line_frequency:g} Hz"
    note = f"band-pass {low:g} to {high:g} Hz{notch}, robust scaling, clipped to +-{clip:g}"
    return replace(recording, data=robust_scale(data, clip=clip), unit="sigma", notes=(*recording.notes, note))
