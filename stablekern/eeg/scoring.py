r"""From a probability for every sample to events, and how well events and samples agree with what experts marked.

**Events.** A hysteresis: an event begins where the probability reaches `on` and lasts until it falls below `off` <=
`on`; events closer than `merge_gap` become one, and what is then shorter than `min_duration` is dropped. A single
threshold would cut a discharge in two wherever the probability crosses it.

**Scores** are those of the library timescoring, with its defaults, so that numbers compare with those of others:

- *samples*: at 1 Hz, $TP$, $FP$, $FN$ counted in seconds;
- *events*: a reference event is found if a predicted one overlaps it, within 30 s before and 60 s after; predicted
  events that overlap none are false alarms; events longer than 5 minutes are cut and those less than 90 s apart merged.

Over several recordings the counts are added up first: sensitivity $= TP/(TP+FN)$, precision $= TP/(TP+FP)$, $F_1$
their harmonic mean, false alarms per 24 h $= FP$ over the hours of all recordings times 24. A ratio without a
denominator is NaN.

**Source:** Dan et al., "SzCORE: seizure community open-source research evaluation framework", Epilepsia 66 (2025) S2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from stablekern._check import number
from stablekern.eeg._extra import extra
from stablekern.eeg.annotations import Event, merge
from stablekern.errors import message

__all__ = ["Scores", "find_events", "score_events"]


def find_events(
    probability: np.ndarray,  # (samples,)
    sample_rate: float,
    *,
    on: float = 0.5,
    off: float = 0.4,
    min_duration: float = 3.0,
    merge_gap: float = 2.0,
) -> list[Event]:
    """The events of one recording; the rules are in the module's text. A NaN counts as probability 0.

    `sample_rate` in Hz, `min_duration` and `merge_gap` in seconds. ValueError unless 0 <= off <= on <= 1.
    """
    where = "eeg.find_events"
    number(where, "sample_rate", sample_rate, low=0, strict=True)
    number(where, "on", on, low=0, high=1)
    number(where, "off", off, low=0, high=on)
    number(where, "min_duration", min_duration, low=0)
    number(where, "merge_gap", merge_gap, low=0)
    if probability.ndim != 1:
        raise ValueError(message(where, "`probability` must have the shape (samples,)", probability.shape))
    values = np.nan_to_num(np.asarray(probability, np.float64), nan=-1.0)
    above = np.concatenate([[False], values >= off, [False]])
    edges = np.flatnonzero(above[1:] != above[:-1])
    events = []
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        begins = np.flatnonzero(values[start:stop] >= on)
        if begins.size:
            first = start + int(begins[0])
            events.append(Event(first / sample_rate, (stop - first) / sample_rate))
    return [event for event in merge(events, gap=merge_gap) if event.duration >= min_duration]


@dataclass(frozen=True)
class Scores:
    """Agreement over `hours` of recordings; `false_alarms` are per 24 h, sensitivity, precision and F1 in [0, 1]."""

    hours: float
    sample_sensitivity: float
    sample_precision: float
    sample_f1: float
    event_sensitivity: float
    event_precision: float
    event_f1: float
    false_alarms: float
    events: int  # of the reference, as timescoring merges and cuts them
    found: int


def _ratios(true_positive: int, false_positive: int, positive: int) -> tuple[float, float, float]:
    predicted = true_positive + false_positive
    sensitivity = true_positive / positive if positive else math.nan
    precision = true_positive / predicted if predicted else math.nan
    either = predicted + positive
    return sensitivity, precision, 2 * true_positive / either if either else math.nan


def score_events(recordings: Iterable[tuple[Sequence[Event], Sequence[Event], float]]) -> Scores:
    """Scores over recordings given as (reference events, predicted events, length in seconds).

    Needs the extra `eeg` (timescoring). ValueError for a length that is not positive.
    """
    scoring = extra("eeg.score_events", "timescoring.scoring")
    annotations = extra("eeg.score_events", "timescoring.annotations")
    counts = np.zeros((2, 3), np.int64)
    total = 0.0
    for reference, predicted, seconds in recordings:
        total += number("eeg.score_events", "seconds", float(seconds), low=0, strict=True)

        def annotation(events: Sequence[Event], seconds: float = seconds) -> object:
            inside = [(e.onset, min(e.end, seconds)) for e in events if e.onset < seconds]
            return annotations.Annotation(inside, 1, max(math.ceil(seconds), 1))

        pair = annotation(reference), annotation(predicted)
        for row, score in enumerate((scoring.SampleScoring(*pair), scoring.EventScoring(*pair))):
            counts[row] += [score.tp, score.fp, score.refTrue]
    sample, event = (_ratios(*row.tolist()) for row in counts)
    alarms = float(counts[1, 1] / total * 86400) if total else math.nan
    return Scores(total / 3600, *sample, *event, alarms, int(counts[1, 2]), int(counts[1, 0]))
