"""EEG: files that are odd or broken, the montage, filters against their formulas, windows, and labels that are true."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from stablekern import eeg
from stablekern.eeg import CHANNELS
from stablekern.errors import RecordingError

edfio = pytest.importorskip("edfio")
mne = pytest.importorskip("mne")
stats = pytest.importorskip("scipy.stats")
signal = pytest.importorskip("scipy.signal")

LSB = 2000 / 65535  # microvolts; the files below store +-1000 uV in 16 bits
# A Kaiser window with beta = 5 (SciPy's resampler) ripples by about -53 dB (Oppenheim and Schafer, eq. 7.75: A = beta /
# 0.1102 + 8.7 = 54 dB), in the pass band and in the stop band; twice that, for both images of a real wave.
RIPPLE = 2 * 10 ** (-53 / 20)
SAMPLE = Path(eeg.__file__).parent / "data" / "eeglab_sample_32ch_128hz.edf"


def noise(channels=19, samples=1024, seed=0):
    return np.random.default_rng(seed).normal(0, 20, (channels, samples))


def write(path, labels, data, rate=256, unit="uV", span=1000.0, **edf):
    """An EDF file; `rate`, `unit` and `span` (of the physical range) are one, or one per channel."""
    each = [np.broadcast_to(value, len(labels)) for value in (rate, unit, span)]
    signals = [
        edfio.EdfSignal(row, float(r), label=label, physical_dimension=str(u), physical_range=(-float(s), float(s)))
        for label, row, r, u, s in zip(labels, data, *each, strict=True)
    ]
    edfio.Edf(signals, **edf).write(path)
    return path


def patched(path, **fields):
    """Overwrite fields of the fixed header."""
    offsets = {"version": 0, "date": 168, "header": 184, "reserved": 192, "records": 236, "duration": 244, "count": 252}
    raw = bytearray(path.read_bytes())
    for name, value in fields.items():
        raw[offsets[name] : offsets[name] + len(value)] = value
    path.write_bytes(raw)
    return path


def recording(samples=2560, sample_rate=256.0, seed=0, **fields):
    return eeg.Recording(noise(samples=samples, seed=seed), sample_rate, **fields)


@pytest.fixture(scope="module")
def sample():
    return eeg.load_sample()


# ---------------------------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize(
    "label, name",
    [("Fp1", "Fp1"), ("EEG FP1-REF", "Fp1"), ("eeg fp1 - le", "Fp1"), ("EEG T7-AR", "T3"), ("T8", "T4"), ("p7", "T5"),
     ("EEG P8", "T6"), ("CZ", "Cz"), ("Fc5.", None), ("O2..", "O2"), ("C3-A2", "C3"), ("EEG_Pz", "Pz"),
     ("EEG Fpz", None), ("FP1-F7", None), ("T8-P8-0", None), ("C3-0", None), ("ECG", None), ("A1", None), ("", None),
     ("EEG", None)],
)  # fmt: skip
def test_canonical_name(label, name):
    assert eeg.canonical_name(label) == name


@pytest.mark.parametrize(
    "label, name",
    [("EEG FPZ-REF", "Fpz"), ("fc5", "FC5"), ("PO7", "PO7"), ("EEG T7", "T3"), ("M1", None), ("EOG1", None)],
)
def test_electrode_name(label, name):
    assert eeg.electrode_name(label) == name


def test_bipolar_labels():
    assert all(map(eeg.is_bipolar, ["FP1-F7", "T8-P8-0", "EEG Fz-Cz"]))
    assert not any(map(eeg.is_bipolar, ["FP1-REF", "C3-A2", "C3", "ECG-L", "C3-0"]))


def test_order_of_channels():
    assert " ".join(CHANNELS) == "Fp1 F3 C3 P3 F7 T3 T5 O1 Fz Cz Pz Fp2 F4 C4 P4 F8 T4 T6 O2"


def test_places():
    xyz = eeg.positions()
    np.testing.assert_allclose(np.linalg.norm(xyz, axis=1), 1, rtol=1e-15)
    mirror = "Fp2 F4 C4 P4 F8 T4 T6 O2 Fz Cz Pz Fp1 F3 C3 P3 F7 T3 T5 O1".split()
    np.testing.assert_allclose(eeg.positions(mirror) * [-1, 1, 1], xyz, atol=1e-15)
    flat = dict(zip(CHANNELS, eeg.layout(), strict=True))
    np.testing.assert_allclose(np.linalg.norm([flat[n] for n in ("Fp1", "T3", "O2", "F8")], axis=1), 1, rtol=1e-14)
    assert flat["Fz"][1] > 0 > flat["Pz"][1] and flat["T4"][0] > 0 > flat["T3"][0]
    np.testing.assert_allclose(np.degrees(eeg.angular_distance(["Cz", "Fz", "T4"], "Cz")), [0, 36, 72], atol=1e-5)
    with pytest.raises(ValueError, match="Oz"):
        eeg.positions(["Oz"])


@pytest.mark.skipif("spherical_1005" not in mne.channels.get_builtin_montages(), reason="this MNE has no ideal montage")
def test_places_agree_with_mne():
    theirs = mne.channels.make_standard_montage("spherical_1005").get_positions()["ch_pos"]
    modern = {old: new for new, old in eeg.SYNONYMS.items()}
    xyz = np.stack([theirs[modern.get(name, name)] for name in CHANNELS])
    cosine = (eeg.positions() * xyz / np.linalg.norm(xyz, axis=1, keepdims=True)).sum(1)
    # F3, F4, P3, P4 differ by the choice of the arc on which half way is measured.
    assert np.degrees(np.arccos(cosine.clip(-1, 1))).max() < 5


# ------------------------------------------------------------------------------------------------------------- reading


def test_reads_odd_names_in_any_order(tmp_path):
    modern = {old: new for new, old in eeg.SYNONYMS.items()}
    styles = ["EEG {}-REF", "{}", "EEG {}-LE", "eeg {} -AR"]
    shuffled = np.random.default_rng(1).permutation(19)
    data = noise()
    labels = [styles[i % 4].format(modern.get(CHANNELS[i], CHANNELS[i])) for i in shuffled]
    labels = [label.upper() if i % 2 else label.lower() for i, label in enumerate(labels)]
    got = eeg.read_edf(write(tmp_path / "a.edf", [*labels, "ECG"], [*data[shuffled], data[0]]))
    assert got.channels == CHANNELS and got.data.dtype == np.float32 and got.sample_rate == 256 and got.unit == "uV"
    np.testing.assert_allclose(got.data, data, atol=LSB)
    text = "\n".join(got.notes)
    assert "ECG" in text and "to T3" in text and "AR, LE, REF, none" in text and "interpolated" not in text


@pytest.mark.parametrize("unit, factor", [("uV", 1), ("mV", 1e3), ("V", 1e6), ("nV", 1e-3), ("", 1)])
def test_units(tmp_path, unit, factor):
    data = noise()
    path = write(tmp_path / "a.edf", CHANNELS, data / factor, unit=unit, span=max(1000 / factor, 0.001))
    got = eeg.read_edf(path)
    np.testing.assert_allclose(got.data, data, atol=LSB)


@pytest.mark.parametrize("micro", [b"\xb5V ", "\u00b5V".encode(), "\u03bcV".encode()])
def test_micro_signs(tmp_path, micro):
    path = write(tmp_path / "a.edf", CHANNELS, noise())
    path.write_bytes(path.read_bytes().replace(b"uV ", micro))
    np.testing.assert_allclose(eeg.read_edf(path).data, noise(), atol=LSB)


def test_unit_that_is_no_voltage_is_unusable(tmp_path):
    units = ["uV"] * 18 + ["mmHg"]
    got = eeg.read_edf(write(tmp_path / "a.edf", CHANNELS, noise(), unit=units))
    assert any("O2" in note and "mmHg" in note for note in got.notes)
    assert any("interpolated O2" in note for note in got.notes)


def test_rates_may_differ(tmp_path):
    time = [np.arange(8 * rate) / rate for rate in [128] * 9 + [256] * 10]
    waves = [50 * np.sin(2 * np.pi * 7 * t) for t in time]
    got = eeg.read_edf(write(tmp_path / "a.edf", CHANNELS, waves, rate=[128] * 9 + [256] * 10))
    assert got.data.shape == (19, 2048) and "resampled from 128 to 256 Hz" in got.notes
    inner = slice(256, -256)
    np.testing.assert_allclose(got.data[:, inner], np.broadcast_to(waves[-1], (19, 2048))[:, inner], atol=50 * RIPPLE)


@pytest.mark.parametrize("flat_first", [False, True])
def test_of_duplicates_the_first_usable_is_taken(flat_first):
    data = noise(20)
    if flat_first:
        data[5] = 3.0  # T3
    got = eeg.from_arrays(data, [*CHANNELS, "T7"], 256)
    np.testing.assert_allclose(got.data[5], data[19 if flat_first else 5], rtol=1e-6)
    assert any(("flat" if flat_first else "T7 (after T3)") in note for note in got.notes)


def test_malformed_date_does_not_matter(tmp_path):
    path = patched(write(tmp_path / "a.edf", CHANNELS, noise()), date=b"01:01:0x")
    np.testing.assert_allclose(eeg.read_edf(path).data, noise(), atol=LSB)


def test_edf_plus_with_annotations(tmp_path):
    notes = [edfio.EdfAnnotation(1, 0.5, "blink")]
    path = write(tmp_path / "a.edf", CHANNELS, noise(), annotations=notes)
    np.testing.assert_allclose(eeg.read_edf(str(path)).data, noise(), atol=LSB)


# -------------------------------------------------------------------------------------------------------- broken files


def test_missing_directory_and_empty(tmp_path):
    (tmp_path / "empty.edf").touch()
    for name, text in [("no.edf", "does not exist"), (".", "cannot be read"), ("empty.edf", "is empty")]:
        with pytest.raises(RecordingError, match=text) as caught:
            eeg.read_edf(tmp_path / name)
        assert str(caught.value).startswith("stablekern.eeg.read_edf: ")


@pytest.mark.parametrize(
    "content, text",
    [(b"PK\x03\x04" + bytes(5000), "not an EDF"), (b"\xffBIOSEMI" + bytes(5000), "BDF"), (b"x", "not an EDF"),
     (b"0       ", "within its header"), (b"0".ljust(8) + b"x" * 5000, "damaged")],
)  # fmt: skip
def test_not_edf(tmp_path, content, text):
    (tmp_path / "a.edf").write_bytes(content)
    with pytest.raises(RecordingError, match=text):
        eeg.read_edf(tmp_path / "a.edf")


@pytest.mark.parametrize(
    "fields, text",
    [({"reserved": b"EDF+D"}, "gaps"), ({"records": b"0"}, "no complete"), ({"duration": b"0"}, "no length"),
     ({"duration": b"nan"}, "no length"), ({"header": b"512"}, "256 bytes"), ({"count": b"0"}, "256 bytes"),
     ({"count": b"9999"}, "within its header"), ({"records": b"many"}, "damaged")],
)  # fmt: skip
def test_damaged_header(tmp_path, fields, text):
    padded = {name: value.ljust(4 if name == "count" else 8) for name, value in fields.items()}
    with pytest.raises(RecordingError, match=text):
        eeg.read_edf(patched(write(tmp_path / "a.edf", CHANNELS, noise()), **padded))


def test_only_annotations(tmp_path):
    edfio.Edf([], annotations=[edfio.EdfAnnotation(0, None, "x")]).write(tmp_path / "a.edf")
    with pytest.raises(RecordingError, match="no signals"):
        eeg.read_edf(tmp_path / "a.edf")


def test_truncated(tmp_path):
    data = noise(samples=10 * 256)
    path = write(tmp_path / "a.edf", CHANNELS, data, data_record_duration=1)
    path.write_bytes(path.read_bytes()[: 256 * 20 + 19 * 512 * 6 + 100])
    with pytest.raises(RecordingError, match=r"truncated: its header promises 10 s; .*: got 6 s"):
        eeg.read_edf(path)
    got = eeg.read_edf(path, allow_truncated=True)
    assert "the header promises 10 s; 6 s were read" in got.notes
    np.testing.assert_allclose(got.data, data[:, : 6 * 256], atol=LSB)
    got = eeg.read_edf(patched(path, records=b"-1      "))
    assert got.seconds == 6 and "the header leaves the length open; 6 s were read" in got.notes
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RecordingError, match="within its header of 5120 bytes: got 1000 bytes"):
        eeg.read_edf(path, allow_truncated=True)


def test_damage_is_refused_or_harmless(tmp_path):
    """Bytes of the header at random: either a RecordingError or a finite recording, never anything else."""
    whole = write(tmp_path / "a.edf", CHANNELS, noise(samples=512)).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        raw = bytearray(whole)
        for _ in range(random.integers(1, 4)):
            raw[random.integers(256 * 20)] = random.choice(list(b" 019.-+eE\x00\xff"))
        (tmp_path / "b.edf").write_bytes(raw)
        try:
            assert np.isfinite(eeg.read_edf(tmp_path / "b.edf").data).all()
        except RecordingError:
            refused += 1
    assert 0 < refused < 300


# --------------------------------------------------------------------------------------------- missing and bad channels


def test_interpolates_up_to_the_limit():
    kept = slice(6, None)
    got = eeg.from_arrays(noise()[kept], CHANNELS[kept], 256)
    assert np.isfinite(got.data).all()
    np.testing.assert_allclose(got.data[kept], noise()[kept], rtol=1e-6)
    assert "interpolated Fp1, F3, C3, P3, F7, T3 by spherical splines from 13 electrodes" in got.notes
    with pytest.raises(RecordingError, match="lacks 7 of the 19 .* Fp1, F3, C3, P3, F7, T3, T5, and") as caught:
        eeg.from_arrays(noise()[7:], CHANNELS[7:], 256)
    assert "got O1, Fz, Cz" in str(caught.value)
    with pytest.raises(RecordingError, match="lacks 1 of"):
        eeg.from_arrays(noise()[1:], CHANNELS[1:], 256, max_interpolated=0)
    assert np.isfinite(eeg.from_arrays(noise()[15:], CHANNELS[15:], 256, max_interpolated=15).data).all()


@pytest.mark.parametrize("value", [0.0, 37.5, np.nan, np.inf, 1e9])
def test_bad_channels_are_interpolated(value):
    data = noise()
    data[8] = value
    if not np.isfinite(value):
        data[8, 1:] = 1.0  # one such sample is enough
    got = eeg.from_arrays(data, CHANNELS, 256)
    expected = eeg.from_arrays(np.delete(noise(), 8, 0), np.delete(CHANNELS, 8), 256)
    np.testing.assert_array_equal(got.data, expected.data)
    assert any(note.startswith("unusable: Fz: ") for note in got.notes)


def test_too_many_bad_channels():
    with pytest.raises(RecordingError, match=r"lacks 19 .* Fp1: flat, standard deviation below 0.1 uV"):
        eeg.from_arrays(noise() * 1e-6, CHANNELS, 256)  # volts where microvolts belong
    with pytest.raises(RecordingError, match="Cz: NaN or infinite"):
        eeg.from_arrays(np.full((19, 100), np.nan), CHANNELS, 256)
    with pytest.raises(RecordingError, match="no samples"):
        eeg.from_arrays(np.zeros((19, 0)), CHANNELS, 256)


def test_bipolar_montage_is_explained(tmp_path):
    labels = ["FP1-F7", "F7-T7", "T7-P7", "P7-O1", "FZ-CZ", "CZ-PZ", "VNS"]
    with pytest.raises(RecordingError, match="FP1-F7, F7-T7, .* are bipolar derivations") as caught:
        eeg.read_edf(write(tmp_path / "chb.edf", labels, noise(7)))
    assert "got none of them; not recognised: VNS" in str(caught.value)


def test_bad_arguments_of_from_arrays():
    with pytest.raises(ValueError, match="one length"):
        eeg.from_arrays(noise(), CHANNELS[1:], 256)
    with pytest.raises(ValueError, match=r"\(samples,\)"):
        eeg.from_arrays([noise()], ["Fp1"], 256)
    with pytest.raises(ValueError, match="`rates`"):
        eeg.from_arrays(noise(), CHANNELS, -1)
    with pytest.raises(ValueError, match="`max_interpolated` must be between 0 and 15"):
        eeg.from_arrays(noise(), CHANNELS, 256, max_interpolated=16)


def test_a_smooth_field_is_interpolated_closely():
    """Fields x, y, z and their products on the head are nearly what the spline holds; it keeps a constant exactly."""
    x, y, z = eeg.positions().T
    fields = np.stack([x, y, z, x * y, y * z, x * z, x * x - y * y])
    time_courses = np.random.default_rng(0).normal(0, 20, (7, 1000))
    data = fields.T @ time_courses + 30
    for name in ("F3", "Cz", "P4", "Pz", "C4"):
        index = CHANNELS.index(name)
        others = np.delete(np.arange(19), index)
        got = eeg.from_arrays(data[others], [CHANNELS[i] for i in others], 256).data[index]
        nearest = others[np.argmin(eeg.angular_distance([CHANNELS[i] for i in others], name))]
        assert np.std(got - data[index]) < 0.5 * np.std(data[nearest] - data[index])
    weights = eeg.interpolation_weights(["F3", "C3", "P3", "Cz", "Fpz"], ["Fz", "T3"])
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-10)
    with pytest.raises(ValueError, match="different known electrodes: got Fx"):
        eeg.interpolation_weights(["F3", "C3", "P3", "Cz"], ["Fx"])


def test_real_channels_are_interpolated_better_than_by_their_neighbour():
    signals = [one for one in edfio.read_edf(SAMPLE).signals if one.label.startswith("EEG")]
    named = {eeg.canonical_name(one.label): one.data for one in signals}
    present = {name: data for name, data in named.items() if name is not None}
    assert len(signals) == 30 and len(present) == 15
    for name, truth in present.items():
        kept = [one for one in signals if eeg.canonical_name(one.label) != name]
        got = eeg.from_arrays([s.data for s in kept], [s.label for s in kept], 128, sample_rate=128)
        others = [other for other in present if other != name]
        neighbour = present[others[np.argmin(eeg.angular_distance(others, name))]]
        error = got.data[CHANNELS.index(name)] - truth
        assert np.std(error) < np.std(neighbour - truth), name
        assert np.corrcoef(got.data[CHANNELS.index(name)], truth)[0, 1] > np.corrcoef(neighbour, truth)[0, 1], name


def test_the_sample(sample):
    assert sample.data.shape == (19, 238 * 256) and sample.sample_rate == 256 and sample.seconds == 238
    assert np.isfinite(sample.data).all() and sample.labels is None and sample.source == SAMPLE.name
    text = "\n".join(sample.notes)
    assert "resampled from 128 to 256 Hz" in text
    assert "renamed EEG T7 to T3, EEG P7 to T5, EEG T8 to T4, EEG P8 to T6" in text
    assert "interpolated Fp1, F7, Fp2, F8 by spherical splines from 30 electrodes" in text
    assert "EOG1" in text and "EEG Oz" in text
    # Blinks are seen by both, whatever the electrode in between: Fp1 was never recorded.
    original = {one.label: one.data for one in edfio.read_edf(SAMPLE).signals}
    assert np.corrcoef(sample.data[0, ::2], original["EEG FPz"])[0, 1] > 0.9
    np.testing.assert_allclose(eeg.load_sample(sample_rate=128).data[9], original["EEG Cz"], rtol=1e-6)
    attribution = (SAMPLE.parent / "ATTRIBUTION.md").read_text()
    assert "sccn/eeglab" in attribution and "BSD 2-Clause" in attribution


# ------------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("rate", [100, 128, 200, 250, 499.5, 512, 1000])
def test_resampling_keeps_a_sine(rate):
    frequency, samples = 10.0, round(8 * rate)
    got = eeg.resample(np.sin(2 * np.pi * frequency * np.arange(samples) / rate), rate, 256)
    assert got.shape == (int(np.ceil(samples * 256 / rate)),)
    expected = np.sin(2 * np.pi * frequency * np.arange(got.size) / 256)
    np.testing.assert_allclose(got[256:-256], expected[256:-256], atol=RIPPLE)


def test_resampling_does_not_alias():
    got = eeg.resample(np.sin(2 * np.pi * 300 * np.arange(8000) / 1000), 1000, 256)
    assert np.abs(got[256:-256]).max() < RIPPLE


def test_resampling_errors():
    for rate, sample_rate in [(0, 256), (256, -1), (np.nan, 256), (1e9, 1)]:
        with pytest.raises(ValueError, match="stablekern.eeg.resample: "):
            eeg.resample(np.zeros(10), rate, sample_rate)


def butterworth_gain(frequency, low, high, line, rate=256.0):
    """Both passes of the third-order band-pass and the notch, from the bilinear transform of the analogue filters."""
    warp = np.tan(np.pi * np.array([frequency, low, high]) / rate)
    bandpass = ((warp[0] ** 2 - warp[1] * warp[2]) / (warp[0] * (warp[2] - warp[1]))) ** 6
    gain = 1 / (1 + bandpass)
    if line is not None:
        width = np.tan(np.pi * line / 30 / rate)  # Q = 30
        angle, centre = 2 * np.pi * frequency / rate, 2 * np.pi * line / rate
        away = (np.cos(angle) - np.cos(centre)) / np.sin(angle)
        gain *= away**2 / (away**2 + width**2)
    return gain


@pytest.mark.parametrize("line", [50, 60, None])
def test_filter_gains(line):
    time = np.arange(120 * 256) / 256
    frequencies = [0.05, 0.5, 1, 10, 45, 50, 59, 60, 61, 90, 120, 126]
    got = eeg.bandpass(np.sin(2 * np.pi * np.outer(frequencies, time)), 256, line_frequency=line)
    inner = slice(30 * 256, 90 * 256)
    # The amplitude at the frequency itself, over whole cycles; float32 in, float32 out.
    wave = np.exp(-2j * np.pi * np.outer(frequencies, time[inner]))
    amplitude = 2 * np.abs((got[:, inner] * wave).mean(1))
    expected = [butterworth_gain(frequency, 0.5, 120, line) for frequency in frequencies]
    np.testing.assert_allclose(amplitude, expected, atol=1e-5)
    assert amplitude[0] < 1e-5 and amplitude[3] > 0.999
    assert abs(amplitude[1] - 0.5) < 1e-3 and (line != 60 or amplitude[7] < 1e-5)


def test_filters_have_no_phase():
    pulse = np.zeros((2, 4001))
    pulse[:, 2000] = [1, -5]
    got = eeg.bandpass(pulse, 256)
    np.testing.assert_allclose(got, got[:, ::-1], atol=5 * 1e-6)
    assert np.abs(got).argmax(1).tolist() == [2000, 2000]


def test_filter_errors():
    for options in [{"low": 0}, {"low": 120}, {"high": 128}, {"line_frequency": 55}]:
        with pytest.raises(ValueError, match="stablekern.eeg.bandpass: "):
            eeg.bandpass(noise(), 256, **options)
    with pytest.raises(ValueError, match="None for no notch"):
        eeg.bandpass(noise(), 100, high=40, line_frequency=60)
    assert np.isfinite(eeg.bandpass(noise(samples=2), 256)).all()


def test_robust_scaling_does_not_see_a_burst():
    share = 0.01
    data = noise(samples=20_000)
    burst = data.copy()
    burst[:, 5000 : 5000 + int(share * 20_000)] = 121 * 20
    assert (burst.std(1) > 10 * data.std(1)).all()
    # With a share e of outliers on one side the median is the quantile 1/2 / (1 - e) of the rest, and the median
    # deviation at most its quantile (1/2 + e/2) / (1 - e) beyond that shift.
    shift = stats.norm.ppf(0.5 / (1 - share))
    bound = (stats.norm.ppf(0.5 + 0.25 * (1 + share) / (1 - share)) + shift) / stats.norm.ppf(0.75)
    ratio = eeg.robust_sigma(burst) / eeg.robust_sigma(data)
    assert (np.abs(ratio - 1) < bound - 1).all()
    scaled = eeg.robust_scale(burst)
    assert scaled.dtype == np.float32 and scaled.max() == 10 and scaled.min() > -10
    # Twenty-thousand normal samples: five standard errors of the median deviation's estimate, 1.17 / sqrt(n).
    np.testing.assert_allclose(eeg.robust_sigma(data), 20, rtol=5 * 1.17 / np.sqrt(20_000))
    np.testing.assert_allclose(np.median(eeg.robust_scale(data), axis=1), 0, atol=1e-6)


def test_scaling_of_flat_and_resting_channels():
    data = np.zeros((3, 1000))
    data[0] = 12.0
    data[1, :400] = noise(1, 400)[0]  # rests most of the time: the median deviation is 0
    data[2] = 1e-4 * noise(1)[0, :1000]
    scaled = eeg.robust_scale(data)
    assert np.isfinite(scaled).all() and (scaled[0] == 0).all()
    np.testing.assert_allclose(scaled[1], data[1] / data[1].std(), rtol=1e-5, atol=1e-6)
    assert 0 < np.abs(scaled[2]).max() < 0.1
    with pytest.raises(ValueError, match="3 NaN"):
        eeg.robust_scale(np.array([[np.nan, np.inf, -np.inf, 1.0]]))


def test_prepare(sample):
    marked, labels = eeg.add_spike_wave(sample, seed=0)
    ready = eeg.prepare(marked, line_frequency=50)
    assert ready.unit == "sigma" and ready.data.shape == sample.data.shape and np.abs(ready.data).max() <= 10
    np.testing.assert_allclose(eeg.robust_sigma(ready.data), 1, rtol=1e-3)
    assert ready.labels is labels and "notch at 50 Hz" in ready.notes[-1] and marked.unit == "uV"
    for refused in (ready, recording(samples=0)):
        with pytest.raises(RecordingError, match=r"stablekern.eeg.prepare: "):
            eeg.prepare(refused)


# ------------------------------------------------------------------------------------------------ recordings, windows


def test_recording_is_checked():
    data = noise()
    data[3, 5] = np.nan
    with pytest.raises(RecordingError, match="NaN or infinity in P3"):
        eeg.Recording(data, 256.0)
    with pytest.raises(RecordingError, match=r"\(19, samples\).*: got \(18, 1024\)"):
        eeg.Recording(noise(18), 256.0)
    with pytest.raises(RecordingError, match=r"`labels`.*: got \(3,\)"):
        eeg.Recording(noise(), 256.0, labels=np.zeros(3))
    with pytest.raises(ValueError, match="sample_rate"):
        eeg.Recording(noise(), 0.0)


@pytest.mark.parametrize("fraction, seconds, stride", [(0.7, 8, 2), (0.3, 5, 5), (0.501, 4, 0.25)])
def test_windows_never_cross_the_split(fraction, seconds, stride):
    rate, samples = 64.0, 64 * 60 + 7
    clock = np.broadcast_to(np.arange(samples, dtype=np.float32), (19, samples))  # every sample tells its own time
    whole = eeg.Recording(clock, rate, labels=(np.arange(samples) % 3 == 0))
    parts = eeg.split(whole, fraction)
    cut = round(fraction * samples)
    assert [part.samples for part in parts] == [cut, samples - cut]
    for part, (low, high) in zip(parts, [(0, cut), (cut, samples)], strict=True):
        windows = eeg.WindowDataset(part, window_seconds=seconds, stride_seconds=stride)
        assert len(windows) == (part.samples - windows.length) // round(stride * rate) + 1
        for data, labels in windows:
            assert data.shape == (19, windows.length) and labels.shape == (windows.length,)
            assert data.dtype == labels.dtype == torch.float32
            assert low <= data.min() and data.max() < high
            torch.testing.assert_close(data[0].diff(), torch.ones(windows.length - 1), rtol=0, atol=0)
            torch.testing.assert_close(labels, (data[0] % 3 == 0).float(), rtol=0, atol=0)


def test_windows_are_copies_and_collate():
    whole = recording(samples=256 * 20)
    windows = eeg.WindowDataset([whole, whole], window_seconds=8, stride_seconds=4)
    assert len(windows) == 8 and windows.starts[4] == (1, 0)
    windows[0][0].zero_()
    assert (whole.data[:, :2048] != 0).any()
    data, labels = next(iter(torch.utils.data.DataLoader(windows, batch_size=3)))
    assert data.shape == (3, 19, 2048) and labels.shape == (3, 2048) and not labels.any()
    with pytest.raises(IndexError):
        windows[8]


def test_stitching_windows_gives_the_recording_back():
    parts = [recording(samples=2560 + 77), recording(samples=2048, seed=1)]
    windows = eeg.WindowDataset(parts, window_seconds=4, stride_seconds=1.5, tail=True)
    outputs = torch.stack([data[5] for data, _ in windows])
    for part, back in zip(parts, eeg.stitch(windows, outputs), strict=True):
        torch.testing.assert_close(back, torch.from_numpy(part.data[5]))
    gaps = eeg.WindowDataset(parts[0], window_seconds=4, stride_seconds=1.5)
    back = eeg.stitch(gaps, torch.ones(len(gaps), gaps.length))[0]
    assert back[gaps.starts[-1][1] + gaps.length :].isnan().all() and back[: gaps.length].eq(1).all()
    with pytest.raises(ValueError, match="`outputs`"):
        eeg.stitch(windows, outputs[1:])


def test_window_errors():
    for bad, text in [
        (recording(samples=1000), "shorter than one window of 60 s: got 3.90625 s"),
        (recording(samples=0), "got 0 s"),
        ([], "at least one recording"),
        ([recording(), recording(sample_rate=128.0)], "one `sample_rate`: got 128.0 and 256.0"),
        ([recording(), recording(unit="sigma")], "one `unit`"),
    ]:
        with pytest.raises(RecordingError, match=text):
            eeg.WindowDataset(bad)
    for options in [{"window_seconds": 0}, {"stride_seconds": -1}, {"stride_seconds": 0.001}]:
        with pytest.raises(ValueError, match="stablekern.eeg.WindowDataset"):
            eeg.WindowDataset(recording(), **options)
    for fraction in (0, 1, 0.00001, -0.5, np.nan):
        with pytest.raises(ValueError, match="`fraction`"):
            eeg.split(recording(), fraction)


# ------------------------------------------------------------------------------------------------------------ synthesis


def test_events_are_reproducible_and_on_both_sides():
    for seed in range(50):
        events = eeg.draw_events(238, seed=seed)
        assert events == eeg.draw_events(238, seed=seed) != eeg.draw_events(238, seed=seed + 1)
        ends = [event.onset + event.duration for event in events]
        assert all(5 <= event.duration <= 20 and event.focus in eeg.FOCI for event in events)
        assert all(end + 1 < later.onset for end, later in zip(ends, events[1:], strict=False))
        cut = 0.7 * 238
        assert all(end < cut or event.onset > cut for event, end in zip(events, ends, strict=True))
        assert events[0].onset >= 1 and ends[0] < cut < events[-1].onset and ends[-1] <= 237
    assert {event.focus for seed in range(50) for event in eeg.draw_events(238, seed=seed)} == set(eeg.FOCI)
    with pytest.raises(ValueError, match=r"at least 7 s long: got 6 s"):
        eeg.draw_events(20, seed=0)


def test_labels_are_where_the_discharges_are(sample):
    events = eeg.draw_events(sample.seconds, seed=3)
    made, labels = eeg.add_spike_wave(sample, seed=3)
    again, _ = eeg.add_spike_wave(sample, seed=3, events=events)
    np.testing.assert_array_equal(made.data, again.data)
    added = made.data.astype(np.float64) - sample.data
    assert made.labels is labels and set(np.unique(labels)) == {0, 1}
    assert not added[:, labels == 0].any()
    for event in events:
        start, stop = round(event.onset * 256), round((event.onset + event.duration) * 256)
        assert labels[start:stop].all() and labels[start - 1] == 0 == labels[stop]
        inside = np.abs(added[:, start:stop]).max(0)
        assert (inside > 0).mean() > 0.95
        # Loud for all of it but the tapered ends: no half second without half of the spike's height.
        height = event.amplitude * np.median(eeg.robust_sigma(sample.data))
        halves = inside[128 : (stop - start) // 128 * 128 - 128].reshape(-1, 128).max(1)
        assert (halves > 0.25 * height).all() and halves.max() < 1.5 * height
    assert 0.2 < labels.mean() < 0.7 and 0 < labels[int(0.7 * labels.size) :].mean() < 1
    assert not np.array_equal(eeg.add_spike_wave(sample, seed=4, events=events)[0].data, made.data)


def test_shape_rate_and_spread_of_a_discharge():
    quiet = recording(samples=2048 * 20, sample_rate=2048.0)
    event = eeg.SpikeWave(onset=2, duration=15, focus="T3", rate=3.0, amplitude=40.0)
    made, _ = eeg.add_spike_wave(quiet, seed=0, events=[event])
    added = (made.data - quiet.data)[:, 2048 * 3 : 2048 * 16].astype(np.float64)
    focus = -added[CHANNELS.index("T3")]  # surface-negative
    peaks = signal.find_peaks(focus, prominence=0.2 * focus.max())[0][1:-1]  # the outermost may be cut
    widths = signal.peak_widths(focus, peaks, rel_height=0.5)[0] / 2048
    first = int(widths[0] > 0.06)
    spikes, waves = slice(first, None, 2), slice(1 - first, None, 2)
    # Squared sines have half of their base as width at half of their height: 65 ms, and the rest of the cycle.
    np.testing.assert_allclose(widths[spikes], 0.065 / 2, atol=2 / 2048)
    shortest, longest = (1 / 3.5 - 0.065) / 2, (1 / 2.5 - 0.065) / 2
    assert shortest - 2 / 2048 < widths[waves].min() and widths[waves].max() < longest + 2 / 2048
    cycles = np.diff(peaks[spikes]) / 2048
    assert 1 / 3.5 - 1e-3 < cycles.min() and cycles.max() < 1 / 2.5 + 1e-3
    # 39 cycles with a jitter of 5 %: five standard errors of the mean rate.
    assert abs(1 / cycles.mean() - 3) < 5 * 3 * 0.05 / np.sqrt(39) and len(cycles) in range(32, 45)
    assert focus[peaks[waves]].mean() < focus[peaks[spikes]].mean()
    loud = added.std(1)
    by_distance = loud[np.argsort(eeg.angular_distance(CHANNELS, "T3"), kind="stable")]
    assert loud.argmax() == CHANNELS.index("T3") and (np.diff(by_distance) <= 1e-3 * by_distance[0]).all()
    assert loud[CHANNELS.index("T4")] < 0.01 * loud.max()
    everywhere = eeg.topography(eeg.GENERALISED)
    assert everywhere.min() > 0.2 and CHANNELS[everywhere.argmax()] == "Fz"


def test_synthesis_errors(sample):
    good = eeg.SpikeWave(1, 5, "F3")
    for event, text in [
        (eeg.SpikeWave(235, 5, "F3"), "within the 238 s"), (eeg.SpikeWave(-1, 5, "F3"), "`onset`"),
        (eeg.SpikeWave(1, 0, "F3"), "`duration`"), (eeg.SpikeWave(1, 5, "Oz"), "`focus`"),
        (eeg.SpikeWave(1, 5, "F3", rate=8), "`rate`"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=text):
            eeg.add_spike_wave(sample, seed=0, events=[good, event])
    with pytest.raises(RecordingError, match="microvolts"):
        eeg.add_spike_wave(recording(unit="sigma"), seed=0)
    marked = recording(samples=2560, labels=np.arange(2560) < 10)
    _, labels = eeg.add_spike_wave(marked, seed=0, events=[good])
    assert labels[:10].all() and labels.sum() == 10 + 5 * 256


# ----------------------------------------------------------------------------------------------------------- the extra


@pytest.mark.parametrize("module, call", [
    ("edfio", eeg.load_sample),
    ("mne", lambda: eeg.from_arrays(noise()[1:], CHANNELS[1:], 256)),
    ("mne.filter", lambda: eeg.resample(np.zeros(10), 128, 256)),
    ("scipy.signal", lambda: eeg.bandpass(noise(), 256)),
])  # fmt: skip
def test_a_missing_extra_is_named(monkeypatch, module, call):
    from stablekern.eeg import montage

    montage._montage.cache_clear()
    montage._scalp_names.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs `" + module + r"`.*pip install 'stablekern\[eeg\]'"):
        call()


def test_import_is_light():
    code = "import sys, stablekern.eeg; print([m for m in ('mne', 'edfio', 'scipy', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_reading_prints_nothing(capfd):
    eeg.load_sample()
    assert capfd.readouterr() == ("", "")
