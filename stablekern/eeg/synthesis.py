"""Labelled training data: rhythmic spike-and-wave discharges, with known times, added to a real background.

One complex lasts 1/rate, about a third of a second: a spike 65 ms wide at its base, then a slow wave over the rest of
the cycle, both surface-negative. With t counted from the start of a cycle of length p, and s = 65 ms,

    w(t) = sin^2(pi t / s)                          for 0 <= t < s
    w(t) = 0.7 sin^2(pi (t - s) / (p - s))          for s <= t < p

so that the wave is continuous with its slope from cycle to cycle, whatever their lengths. An event repeats it with a
jitter of 5 % in rate (kept within 2.5 to 3.5 Hz) and 15 % in amplitude from cycle to cycle, less its mean, under a
raised-cosine taper at both ends, on each electrode with the weight exp(-(angle to the focus / spread)^2 / 2).

It is a stand-in with a known truth for showing that a model learns, not a model of epilepsy: real discharges evolve,
and are not this regular. Source for the shape: Niedermeyer's Electroencephalography, 7th ed. (2018), on 3 Hz
spike-wave complexes; a spike lasts 20 to 70 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from stablekern._check import choice, number
from stablekern.eeg.montage import CHANNELS, angular_distance
from stablekern.eeg.preprocess import robust_sigma
from stablekern.eeg.recording import Recording
from stablekern.errors import RecordingError, message

GENERALISED = "generalised"
FOCI = ("F3", "F4", "T3", "T4", "P3", "P4", "Fz", GENERALISED)
RATES = (2.5, 3.5)  # Hz
DURATIONS = (5.0, 20.0)  # s

_SPIKE = 0.065  # s
_WAVE = 0.7  # the height of the slow wave over that of the spike
_TAPER = 0.5  # s
_FOCAL_SPREAD = np.radians(35)  # about one electrode's distance: the neighbours have 60 %, the other side nothing
_GENERALISED_SPREAD = np.radians(90)  # everywhere, strongest over the frontal midline
_SLOT = 30.0  # s, one event in each: about two fifths of the time is a discharge


@dataclass(frozen=True)
class SpikeWave:
    """One discharge: `onset` and `duration` in seconds, `focus` an electrode or `"generalised"`, mean `rate` in Hz.

    `amplitude` is the height of the spike at the focus over the spread of the background (`robust_sigma`, the median of
    the channels).
    """

    onset: float
    duration: float
    focus: str
    rate: float = 3.0
    amplitude: float = 5.0


def draw_events(seconds: float, *, seed: int, amplitude: float = 5.0, boundary: float = 0.7) -> list[SpikeWave]:
    """Random discharges for a recording of `seconds`: one in about 30 s, each 5 to 20 s long, in order of time.

    None crosses `boundary` (a fraction of the time, between 0 and 1), and at least one lies on either side, so that a
    cut there (`split`) leaves events to learn from and to be tested on. Foci are drawn from `FOCI`, rates from 2.5 to
    3.5 Hz, amplitudes within 20 % of `amplitude`. The same arguments give the same events. ValueError if a side is
    shorter than 7 s.
    """
    boundary = number("eeg.draw_events", "boundary", boundary, low=0, high=1)
    number("eeg.draw_events", "amplitude", amplitude, low=0, strict=True)
    random = np.random.default_rng(seed)
    cut = boundary * seconds
    events = []
    for start, stop in ((0.0, cut), (cut, seconds)):
        shortest, longest = DURATIONS
        if stop - start < shortest + 2:
            rule = f"both sides of `boundary` must be at least {shortest + 2:g} s long"
            raise ValueError(message("eeg.draw_events", rule, f"{stop - start:g} s"))
        edges = np.linspace(start, stop, max(1, round((stop - start) / _SLOT)) + 1)
        for left, right in zip(edges[:-1] + 1, edges[1:] - 1, strict=True):  # a second of peace at either end
            duration = random.uniform(shortest, min(longest, right - left))
            events.append(
                SpikeWave(
                    onset=random.uniform(left, right - duration),
                    duration=duration,
                    focus=str(random.choice(FOCI)),
                    rate=random.uniform(*RATES),
                    amplitude=amplitude * random.uniform(0.8, 1.2),
                )
            )
    return events


def add_spike_wave(
    recording: Recording, *, seed: int, events: Sequence[SpikeWave] | None = None
) -> tuple[Recording, np.ndarray]:
    """Add discharges to a recording in microvolts, and say at which samples they are.

    `events` are those of `draw_events(recording.seconds, seed=seed)` unless given. Returns a new recording and its
    labels, float32 (samples,): 1 from round(onset * sample_rate) to round((onset + duration) * sample_rate), the latter
    not included, and wherever the recording was labelled 1 before. The labels are in the recording, too. The same
    arguments give the same samples; the k-th event depends on `seed`, k and itself alone.

    RecordingError for a recording that is not in microvolts; ValueError for an event outside the recording, of an
    unknown focus, or of a rate outside 2.5 to 3.5 Hz.
    """
    where = "eeg.add_spike_wave"
    if recording.unit != "uV":
        raise RecordingError(message(where, "the recording must be in microvolts", repr(recording.unit)))
    events = draw_events(recording.seconds, seed=seed) if events is None else events
    scale = float(np.median(robust_sigma(recording.data)))
    data = recording.data.copy()
    labels = np.zeros(recording.samples, np.float32) if recording.labels is None else recording.labels.copy()
    for index, event in enumerate(events):
        choice(where, "focus", event.focus, (*CHANNELS, GENERALISED))
        number(where, "rate", event.rate, low=RATES[0], high=RATES[1])
        number(where, "onset", event.onset, low=0)
        number(where, "duration", event.duration, low=0, strict=True)
        end = event.onset + event.duration
        start, stop = round(event.onset * recording.sample_rate), round(end * recording.sample_rate)
        if not start < stop <= recording.samples:
            rule = f"each of `events` must lie within the {recording.seconds:g} s of the recording"
            raise ValueError(message(where, rule, f"{event.onset:g} to {end:g} s"))
        wave = _discharge(event, stop - start, recording.sample_rate, np.random.default_rng([seed, index]))
        data[:, start:stop] -= scale * event.amplitude * topography(event.focus, recording.channels)[:, None] * wave
        labels[start:stop] = 1
    note = f"added {len(events)} spike-and-wave discharges, {labels.mean():.0%} of the time"
    made = replace(recording, data=data, labels=labels, notes=(*recording.notes, note))
    return made, labels


def topography(focus: str, channels: Sequence[str] = CHANNELS) -> np.ndarray:
    """The share of a discharge that each electrode sees, 1 at the focus: float64 (channels,)."""
    generalised = focus == GENERALISED
    angle = angular_distance(channels, "Fz" if generalised else focus)
    return np.exp(-0.5 * (angle / (_GENERALISED_SPREAD if generalised else _FOCAL_SPREAD)) ** 2)


def _discharge(event: SpikeWave, samples: int, sample_rate: float, random: np.random.Generator) -> np.ndarray:
    """The wave of one event, (samples,): spikes of height about 1, zero mean before the taper."""
    time = np.arange(samples) / sample_rate
    cycles = int(np.ceil(event.duration * RATES[1])) + 1
    periods = 1 / np.clip(event.rate * random.normal(1, 0.05, cycles), *RATES)
    heights = np.clip(random.normal(1, 0.15, cycles), 0.5, 1.5)
    onsets = np.concatenate([[0.0], np.cumsum(periods)])
    cycle = np.searchsorted(onsets, time, side="right") - 1
    since, period = time - onsets[cycle], periods[cycle]
    spike = np.sin(np.pi * since / _SPIKE) ** 2
    slow = _WAVE * np.sin(np.pi * (since - _SPIKE) / (period - _SPIKE)) ** 2
    wave = heights[cycle] * np.where(since < _SPIKE, spike, slow)
    ends = np.minimum(time, event.duration - time) / min(_TAPER, event.duration / 4)
    return (wave - wave.mean()) * np.sin(np.pi / 2 * np.clip(ends, 0, 1)) ** 2
