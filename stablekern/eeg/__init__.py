"""Scalp EEG: read a recording, bring it to 19 electrodes, label it, cut it into windows.

    recording = load_sample()                             # or read_edf("patient.edf")
    recording, labels = add_spike_wave(recording, seed=0)
    train, held_out = split(recording, 0.7)
    windows = WindowDataset(prepare(train), window_seconds=8, stride_seconds=2)

Importing this costs numpy and torch; reading, filtering and interpolating need `pip install 'stablekern[eeg]'`.
"""

from __future__ import annotations

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
from stablekern.eeg.synthesis import FOCI, GENERALISED, SpikeWave, add_spike_wave, draw_events, topography
from stablekern.eeg.windows import WindowDataset, split, stitch

__all__ = [
    "CHANNELS",
    "FOCI",
    "GENERALISED",
    "SYNONYMS",
    "Recording",
    "SpikeWave",
    "WindowDataset",
    "add_spike_wave",
    "angular_distance",
    "bandpass",
    "canonical_name",
    "draw_events",
    "electrode_name",
    "from_arrays",
    "interpolation_weights",
    "is_bipolar",
    "layout",
    "load_sample",
    "positions",
    "prepare",
    "read_edf",
    "resample",
    "robust_scale",
    "robust_sigma",
    "split",
    "stitch",
    "topography",
]
