"""Scalp EEG: read a recording, bring it to 19 electrodes, label it, cut it into windows.

    recording = load_sample()                             # or read_edf("patient.edf")
    recording, labels = add_spike_wave(recording, seed=0)
    train, held_out = split(recording, 0.7)
    windows = WindowDataset(prepare(train), window_seconds=8, stride_seconds=2)

A folder of annotated recordings goes through `scan`, `patient_split` and `build_cache`; `eeg.experiment` trains on it.

Importing this costs numpy and torch; reading, filtering and interpolating need `pip install 'stablekern[eeg]'`.
"""

from __future__ import annotations

from stablekern.eeg.annotations import Event, find_annotation, read_annotation
from stablekern.eeg.corpus import PrepareOptions, build_cache, patient_split, scan
from stablekern.eeg.edf import load_sample, read_edf
from stablekern.eeg.montage import (
    CHANNELS,
    SYNONYMS,
    angular_distance,
    canonical_name,
    electrode_name,
    interpolation_weights,
    is_bipolar,
    layout,
    positions,
)
from stablekern.eeg.preprocess import bandpass, prepare, resample, robust_scale, robust_sigma
from stablekern.eeg.recording import Recording, from_arrays
from stablekern.eeg.scoring import Scores, find_events, score_events
from stablekern.eeg.synthesis import FOCI, GENERALISED, SpikeWave, add_spike_wave, draw_events, topography
from stablekern.eeg.windows import WindowDataset, split, stitch

__all__ = [
    "CHANNELS",
    "FOCI",
    "GENERALISED",
    "SYNONYMS",
    "Event",
    "PrepareOptions",
    "Recording",
    "Scores",
    "SpikeWave",
    "WindowDataset",
    "add_spike_wave",
    "angular_distance",
    "bandpass",
    "build_cache",
    "canonical_name",
    "draw_events",
    "electrode_name",
    "find_annotation",
    "find_events",
    "from_arrays",
    "interpolation_weights",
    "is_bipolar",
    "layout",
    "load_sample",
    "patient_split",
    "positions",
    "prepare",
    "read_annotation",
    "read_edf",
    "resample",
    "robust_scale",
    "robust_sigma",
    "scan",
    "score_events",
    "split",
    "stitch",
    "topography",
]
