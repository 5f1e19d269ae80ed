"""A folder of made-up recordings, to try `stablekern train` and `stablekern detect` before you have a corpus.

    python examples/synthetic_corpus.py corpus

Eight patients with two recordings of two minutes each: noise with the spectrum of EEG, and bursts of 3 Hz
spike-and-wave, annotated as in TUSZ (`NAME.csv_bi`). Needs `pip install 'stablekern[eeg]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import edfio
import numpy as np

from stablekern.eeg import CHANNELS, Recording, add_spike_wave, draw_events

RATE, SECONDS = 256, 120


def background(random: np.random.Generator) -> np.ndarray:
    """(19, samples) in microvolts: noise whose power falls with the frequency."""
    frequency = np.fft.rfftfreq(RATE * SECONDS, 1 / RATE)
    white = np.fft.rfft(random.normal(size=(len(CHANNELS), RATE * SECONDS)))
    noise = np.fft.irfft(white / np.sqrt(np.maximum(frequency, 1.0)), RATE * SECONDS)
    return 20 * noise / noise.std()


def write(edf: Path, seed: int) -> None:
    """One recording and its annotation."""
    events = draw_events(SECONDS, seed=seed)
    recording, _ = add_spike_wave(Recording(background(np.random.default_rng(seed)), RATE), seed=seed, events=events)
    signals = [
        edfio.EdfSignal(row, RATE, label=f"EEG {name.upper()}-REF", physical_dimension="uV", physical_range=(-800, 800))
        for name, row in zip(recording.channels, np.clip(recording.data, -800, 800), strict=True)
    ]
    edf.parent.mkdir(parents=True, exist_ok=True)
    edfio.Edf(signals).write(edf)
    rows = [f"TERM,{event.onset:.4f},{event.onset + event.duration:.4f},seiz,1.0000\n" for event in events]
    header = "channel,start_time,stop_time,label,confidence\n"
    edf.with_suffix(".csv_bi").write_text(header + "".join(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--patients", type=int, default=8)
    options = parser.parse_args()
    for patient in range(options.patients):
        for session in (1, 2):
            name = f"patient{patient:02}"
            write(options.folder / name / f"{name}_s{session:03}_t000.edf", 2 * patient + session)
    print(f"{2 * options.patients} recordings of {options.patients} patients in {options.folder}")


if __name__ == "__main__":
    main()
