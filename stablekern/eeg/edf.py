"""Reading EDF and EDF+ files; what is wrong with one is found from its header, before any sample is touched.

Source: Kemp and Olivan, "European data format 'plus' (EDF+)", Clin. Neurophysiol. 114 (2003) 1755-1761.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from stablekern.eeg._extra import extra
from stablekern.eeg.recording import Recording, Signal, assemble
from stablekern.errors import RecordingError, message

# A blank unit is taken as microvolts, the unit in which EDF's authors ask for EEG.
_MICROVOLTS = {"": 1.0, "uv": 1.0, "nv": 1e-3, "mv": 1e3, "v": 1e6}


def read_edf(
    path: str | os.PathLike[str],
    *,
    sample_rate: float = 256.0,
    max_interpolated: int = 6,
    allow_truncated: bool = False,
) -> Recording:
    """Read an EDF or EDF+ file, bring it to the 19 electrodes, microvolts and `sample_rate` Hz.

    - Labels are matched as `canonical_name` says. Of several channels for one electrode (T3 and T7) the first usable
      one is taken. Bipolar derivations are no electrodes. Everything else in the file is left out.
    - Volts, millivolts, microvolts and nanovolts become microvolts; a blank unit is taken as microvolts.
    - A channel is unusable, and counts as missing, if it is flat (standard deviation below 0.1 uV), goes beyond 10 V,
      has a unit that is not a voltage, a rate outside 1 Hz to 100 kHz, or a header that maps all values to one.
    - Up to `max_interpolated` (0 to 15) missing electrodes are interpolated from every usable scalp electrode of the
      file, those outside the 19 as well.
    - Channels may differ in rate; each is resampled. They are cut to the shortest, if lengths differ.
    - The start date is never read, so a malformed one does no harm.
    - A file that ends early is refused unless `allow_truncated`: then its complete data records are read.

    Needs the extra `eeg` (edfio to read, MNE to resample and interpolate): ImportError without it. Raises
    RecordingError if the file is missing, not EDF (BDF neither), truncated, discontinuous (EDF+D), without samples, or
    lacks too many electrodes; TypeError or ValueError for the other arguments.
    """
    path = Path(path).expanduser()
    notes = _check_file(path, allow_truncated)
    edfio = extra("eeg.read_edf", "edfio")
    with warnings.catch_warnings():
        # What edfio warns of, a length that is not the promised one and a header range of zero, is handled here.
        warnings.simplefilter("ignore")
        try:
            # Every byte is a Latin-1 character, so a micro sign in any encoding cannot stop the reading.
            file = edfio.read_edf(path, header_encoding="latin-1")
            signals = [_signal(signal) for signal in file.signals]
        except (ValueError, OverflowError, OSError) as cause:
            raise _error(path, "is damaged: its signal headers cannot be read", repr(str(cause))) from cause
        if not signals:
            raise _error(path, "holds no signals", f"{len(file.annotations)} annotations")
        return assemble("eeg.read_edf", signals, sample_rate, max_interpolated, path.name, notes)


def load_sample(*, sample_rate: float = 256.0) -> Recording:
    """The recording that comes with the package: 238 s of real EEG without seizures, four electrodes interpolated.

    EEGLAB's tutorial data, 30 EEG and 2 EOG channels at 128 Hz; `data/ATTRIBUTION.md` has authors and licence. Needs
    the extra `eeg`.
    """
    return read_edf(Path(__file__).parent / "data" / "eeglab_sample_32ch_128hz.edf", sample_rate=sample_rate)


def _error(path: Path, rule: str, *got: object) -> RecordingError:
    return RecordingError(message("eeg.read_edf", f"`{path}` {rule}", *got))


def _check_file(path: Path, allow_truncated: bool) -> tuple[str, ...]:
    """Hold the size of the file against what its header promises; returns the notes."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            fixed = file.read(256)
            count = int(fixed[252:256]) if fixed[252:256].strip().isdigit() else 0
            per_record = file.read(256 * count)[216 * count : 224 * count]
    except OSError as cause:
        rule = "does not exist" if isinstance(cause, FileNotFoundError) else "cannot be read"
        raise _error(path, rule, cause.strerror) from cause
    if size == 0:
        raise _error(path, "is empty", "0 bytes")
    if fixed[:8] == b"\xffBIOSEMI":
        raise _error(path, "is a BDF file, with samples of 24 bits: convert it to EDF", repr(fixed[:8]))
    if fixed[:8].strip() != b"0":
        raise _error(path, "is not an EDF file, which begins with a `0` and seven spaces", repr(fixed[:8]))
    if size < 256 * (count + 1):
        raise _error(path, f"is truncated within its header of {256 * (count + 1)} bytes", f"{size} bytes")
    try:
        header, records, duration = int(fixed[184:192]), int(fixed[236:244]), float(fixed[244:252])
        record = 2 * sum(int(per_record[i : i + 8]) for i in range(0, 8 * count, 8))  # bytes in a data record
    except ValueError as cause:
        raise _error(path, "is damaged: its header cannot be read", repr(str(cause))) from cause
    if count < 1 or header != 256 * (count + 1):
        raise _error(path, "is damaged: its header must have 256 bytes, and 256 more for each signal", header, count)
    if fixed[192:197] == b"EDF+D":
        raise _error(path, "has gaps: cut it into continuous (EDF or EDF+C) files", "EDF+D")
    if not duration > 0 or record < 1:
        raise _error(path, "holds no signals: its data records have no length", f"{duration:g} s")
    present = (size - header) // record
    if present < 1 or records == 0:
        raise _error(path, f"holds no complete data record of {record} bytes", f"{size - header} bytes of data")
    held, promised = f"{present * duration:g} s", f"{records * duration:g} s"
    if records < 0 or present == records:
        return () if records > 0 else (f"the header leaves the length open; {held} were read",)
    if present < records and not allow_truncated:
        rule = f"is truncated: its header promises {promised}; `allow_truncated=True` reads what is complete"
        raise _error(path, rule, held)
    return (f"the header promises {promised}; {held} were read",)


def _signal(signal: Any) -> Signal:
    """A signal of edfio's with its factor to microvolts, or what is wrong with it."""
    text = signal.physical_dimension.strip()
    try:
        text = text.encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        pass  # it was Latin-1, as it stands
    # The micro sign and the Greek letter are different characters.
    factor = _MICROVOLTS.get(text.lower().replace("\u00b5", "u").replace("\u03bc", "u"))
    fault = None
    if factor is None:
        fault = f"its unit `{text}` is not a voltage"
    elif signal.physical_min == signal.physical_max or signal.digital_min == signal.digital_max:
        fault = "its header maps all values to one"
    return Signal(signal.label.strip(), signal.sampling_frequency, lambda: signal.data * factor, fault)
