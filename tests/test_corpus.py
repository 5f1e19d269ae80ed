"""Folders of recordings: annotations of four corpora, splits, the cache, training from a configuration, detection."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stablekern import training
from stablekern.cli import main
from stablekern.cli import train as cli_train
from stablekern.eeg import CHANNELS, WindowDataset, annotations, corpus, experiment, montage, prepare, read_edf, scoring
from stablekern.eeg.annotations import Event
from stablekern.errors import RecordingError
from stablekern.nn import SeizureDetector

edfio = pytest.importorskip("edfio")
tomllib = pytest.importorskip("tomllib")
pytest.importorskip("mne")
pytest.importorskip("timescoring")

RATE = 256
TUSZ = """# version = csv_v1.0.0
# bname = aaaaaaac_s001_t000
channel,start_time,stop_time,label,confidence
FP1-F7,0.0000,4.0000,bckg,1.0000
FP1-F7,4.0000,10.5000,fnsz,1.0000
F7-T3,5.0000,12.0000,fnsz,1.0000
F7-T3,12.0000,13.0000,nesz,1.0000
T3-C3,20.0000,22.0000,mysz,1.0000
"""
CSV_BI = """# version = csv_v1.0.0

channel,start_time,stop_time,label,confidence
TERM,0.0000,3.0000,bckg,1.0000
TERM,3.0000,9.2500,seiz,1.0000
"""
CHB = """Data Sampling Rate: 256 Hz
*************************

Channels in EDF Files:
**********************
Channel 1: FP1-F7

File Name: chb01_02.edf
File Start Time: 12:42:57
Number of Seizures in File: 0

File Name: chb01_03.edf
Number of Seizures in File: 2
Seizure 1 Start Time: 2996 seconds
Seizure 1 End Time: 3036 seconds
Seizure 2 Start Time: 10 seconds
Seizure 2 End Time: 20 seconds
"""
SIENA = """Sampling rate: 512 Hz

Seizure n 1
File name: PN00-1.edf
Registration start time: 23.39.33
Registration end time: 00.22.58
Seizure start time: 00.08.36
Seizure end time: 00.09.46

Seizure n 2
File name: PN00-2.edf
Registration start time: 02:18:17
Registration end time: 02:56:19
Start time: 02:38:37
End time: 02:39:31
"""
BIDS = (
    "onset\tduration\teventType\tconfidence\tchannels\tdateTime\trecordingDuration\n"
    "0.0\t100.0\tbckg\tn/a\tn/a\t2020-01-01 00:00:00\t200\n"
    "12.5\t30.0\tsz_foc_ia\tn/a\tn/a\t2020-01-01 00:00:00\t200\n"
)


def write_edf(path, *, seconds=20, rate=RATE, labels=CHANNELS, seed=0, events=()):
    """Background noise with a slow rhythm in the events, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    data = generator.normal(0, 20, (len(labels), seconds * rate))
    time = np.arange(seconds * rate) / rate
    for onset, duration in events:
        inside = (time >= onset) & (time < onset + duration)
        data[:, inside] += 150 * np.sin(2 * np.pi * 3 * time[inside])
    signals = [
        edfio.EdfSignal(row, rate, label=label, physical_dimension="uV", physical_range=(-1000, 1000))
        for row, label in zip(data, labels, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    edfio.Edf(signals).write(path)
    return path


def annotate(edf, events):
    rows = "".join(f"TERM,{onset},{onset + duration},seiz,1.0\n" for onset, duration in events)
    edf.with_suffix(".csv_bi").write_text(f"channel,start_time,stop_time,label,confidence\n{rows}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight patients, two recordings each, and three files that cannot be used."""
    root = tmp_path_factory.mktemp("corpus")
    for patient in range(8):
        for session in range(2):
            events = [(4, 6)] if patient % 2 == 0 else []
            edf = root / f"p{patient}" / f"aaaaaaa{'abcdefgh'[patient]}_s00{session}_t000.edf"
            write_edf(edf, seed=10 * patient + session, events=events)
            annotate(edf, events)
    (root / "p0" / "aaaaaaaa_s009_t000.edf").write_bytes(b"no EDF at all")
    annotate(root / "p0" / "aaaaaaaa_s009_t000.edf", [])
    write_edf(root / "p1" / "unlabelled.edf")
    short = write_edf(root / "p2" / "aaaaaaac_s009_t000.edf", seconds=3)
    annotate(short, [])
    return root


# ---- annotations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edf, name, text, expected",
    [
        ("a.edf", "a.csv", TUSZ, [Event(4, 8, "fnsz"), Event(20, 2, "mysz")]),
        ("a.edf", "a.csv_bi", CSV_BI, [Event(3, 6.25)]),
        ("chb01_02.edf", "chb01-summary.txt", CHB, []),
        ("chb01_03.edf", "chb01-summary.txt", CHB, [Event(10, 10), Event(2996, 40)]),
        ("PN00-1.edf", "Seizures-list-PN00.txt", SIENA, [Event(1743, 70)]),  # past midnight
        ("PN00-2.edf", "Seizures-list-PN00.txt", SIENA, [Event(1220, 54)]),
        ("sub-01_run-1_eeg.edf", "sub-01_run-1_events.tsv", BIDS, [Event(12.5, 30, "sz_foc_ia")]),
    ],
    ids=["tusz", "tusz-binary", "chb-none", "chb", "siena-midnight", "siena", "bids"],
)
def test_annotations_of_four_corpora(tmp_path, edf, name, text, expected):
    (tmp_path / name).write_text(text)
    found = annotations.find_annotation(tmp_path / edf)
    assert found == tmp_path / name
    assert annotations.read_annotation(found, tmp_path / edf) == expected


def test_the_binary_table_wins_over_the_channels_and_a_foreign_summary_is_none(tmp_path):
    (tmp_path / "a.csv").write_text(TUSZ)
    (tmp_path / "a.csv_bi").write_text(CSV_BI)
    (tmp_path / "chb01-summary.txt").write_text(CHB)
    assert annotations.find_annotation(tmp_path / "a.edf").name == "a.csv_bi"
    assert annotations.find_annotation(tmp_path / "b.edf") is None


@pytest.mark.parametrize("name", ["chb01_03", "sub-01_eeg"])
def test_what_detect_writes_is_no_annotation(tmp_path, name):
    """Else the next training would learn from what the last model found."""
    (tmp_path / f"{name}_events.tsv").write_text(BIDS)
    assert annotations.find_annotation(tmp_path / f"{name}.edf") is None
    (tmp_path / "chb01-summary.txt").write_text(CHB)
    assert name != "chb01_03" or annotations.find_annotation(tmp_path / f"{name}.edf").name == "chb01-summary.txt"


@pytest.mark.parametrize(
    "name, text, error",
    [
        ("a.csv", "channel,start_time,label\n", "lacks the columns stop_time"),
        ("a.csv", "", "must have a header"),
        ("a.csv", "start_time,stop_time,label\n1,x,seiz\n", "line 2: a time must be a number of seconds: got 'x'"),
        ("a.csv", "start_time,stop_time,label\n5,5,seiz\n", "line 2: an event must end after it starts: got 5 to 5 s"),
        ("a.csv", "start_time,stop_time,label\n5,nan,seiz\n", "must end after it starts"),
        ("a.csv", "start_time,stop_time,label\n5,6\n", "line 2 must have 3 columns: got 2"),
        ("a_events.tsv", "onset\tduration\n1\t2\n", "lacks a column eventType or trial_type"),
        ("a_events.tsv", "onset\tduration\teventType\n1\tn/a\tsz\n", "a seizure must have a duration"),
        ("x-summary.txt", CHB.replace("in File: 2", "in File: 3"), "promises 3 seizures in `chb01_03.edf`: got 2"),
        ("x-summary.txt", CHB.replace("Seizure 2 Start Time: 10 seconds\n", ""), "must have a start before its end"),
        ("seizures-list-x.txt", SIENA.replace("00.08.36", "8h36"), "a time of day must have the form"),
        ("x-summary.txt", "File Name: other.edf\n", "does not name `a.edf`: got other.edf"),
        ("a.json", "{}", "must be a .csv, .csv_bi, .tsv or .txt annotation"),
    ],
)
def test_an_annotation_that_makes_no_sense_says_where(tmp_path, name, text, error):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordingError) as caught:
        annotations.read_annotation(tmp_path / name, tmp_path / "a.edf")
    assert error in str(caught.value) and name in str(caught.value)


def test_masks_and_merging():
    events = annotations.merge([Event(5, 1), Event(1, 2), Event(2.5, 1)], gap=0.0)
    assert events == [Event(1, 2.5), Event(5, 1)]
    assert annotations.merge(events, gap=1.5) == [Event(1, 5)]
    mask = annotations.event_mask(events, 8, 24, 4.0)  # seconds 2 to 6
    assert mask.tolist() == [1] * 6 + [0] * 6 + [1] * 4


# ---- bipolar derivations -------------------------------------------------------------------------------------------

BANANA = (
    "FP1-F7 F7-T7 T7-P7 P7-O1 FP1-F3 F3-C3 C3-P3 P3-O1 FP2-F4 F4-C4 C4-P4 P4-O2 FP2-F8 F8-T8 T8-P8 P8-O2 FZ-CZ CZ-PZ "
    "P7-T7 T7-FT9 FT9-FT10 FT10-T8 T8-P8"
).split()


def test_potentials_from_the_derivations_of_chb_mit(tmp_path):
    """Differences of known potentials give the potentials back, against the mean of what is connected."""
    pairs = [montage.derivation(label) for label in BANANA]
    names, matrix = montage.potentials(pairs)
    assert set(CHANNELS) - set(names) == {"Fz", "Cz", "Pz"} and {"FT9", "FT10"} < set(names)
    truth = np.random.default_rng(0).normal(0, 30, (len(names) + 3, 5120))
    every = dict(zip([*names, "Fz", "Cz", "Pz"], truth, strict=True))
    differences = np.stack([every[one] - every[other] for one, other in pairs])
    expected = truth[: len(names)] - truth[: len(names)].mean(0)
    np.testing.assert_allclose(matrix @ differences, expected, atol=1e-10)

    signals = [
        edfio.EdfSignal(row, RATE, label=label, physical_dimension="uV", physical_range=(-1000, 1000))
        for row, label in zip(differences, BANANA, strict=True)
    ]
    edfio.Edf(signals).write(tmp_path / "chb01_01.edf")
    recording = read_edf(tmp_path / "chb01_01.edf")
    step = 2000 / 65535  # of the file; a potential is a sum of at most 22 rows of the pseudoinverse
    for name in set(CHANNELS) & set(names):
        bound = step * np.abs(matrix[names.index(name)]).sum()
        off = np.abs(recording.data[CHANNELS.index(name)] - expected[names.index(name)]).max()
        assert off < bound + 1e-4
    assert any("solved for the potentials from 23 bipolar derivations" in note for note in recording.notes)
    assert any("interpolated Fz, Cz, Pz" in note for note in recording.notes)


@pytest.mark.parametrize("label, pair", [("EEG T8-P8-0", ("T4", "T6")), ("FP1-REF", None), ("FP1-FP1", None)])
def test_derivation(label, pair):
    assert montage.derivation(label) == pair


# ---- the folder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, patient",
    [
        ("x/sub-012_ses-1_eeg.edf", "sub-012"),
        ("chb21/chb21_03.edf", "chb01"),
        ("chb17/chb17a_03.edf", "chb17"),
        ("PN00/PN00-1.edf", "pn00"),
        ("01_tcp_ar/aaaaaaac_s001_t000.edf", "aaaaaaac"),
        ("somewhere/night.edf", "somewhere"),
    ],
)
def test_patient_of(path, patient):
    assert corpus.patient_of(path) == patient


def test_scan_lists_what_cannot_be_used(folder):
    found = corpus.scan(folder)
    assert len(found.items) == 18 and [failure.file for failure in found.failures] == ["p1/unlabelled.edf"]
    assert "no annotation" in found.failures[0].reason
    assert {item.patient for item in found.items} == {f"aaaaaaa{letter}" for letter in "abcdefgh"}
    with pytest.raises(RecordingError, match="must be a folder"):
        corpus.scan(folder / "nowhere")


@pytest.mark.parametrize("seed", range(5))
def test_no_patient_is_in_two_parts(folder, seed):
    items = corpus.scan(folder).items
    split = corpus.patient_split(items, (0.5, 0.25, 0.25), seed=seed)
    patients = [{item.patient for item in part} for part in split.values()]
    assert sum(map(len, split.values())) == len(items)
    assert sum(map(len, patients)) == 8 == len(set.union(*patients))
    assert all(any(item.events for item in part) for part in split.values())
    again = corpus.patient_split(items[::-1], (0.5, 0.25, 0.25), seed=seed)
    assert patients == [{item.patient for item in part} for part in again.values()]  # whatever the order


def test_the_corpus_decides_where_its_folders_do(folder):
    items = [replace(item, part="test" if item.patient < "aaaaaaac" else "train") for item in corpus.scan(folder).items]
    split = corpus.patient_split(items, (1, 0, 0))
    assert {item.patient for item in split["test"]} == {"aaaaaaaa", "aaaaaaab"} and not split["validation"]
    with pytest.raises(RecordingError, match="must be in one part of the corpus: got test and train"):
        corpus.patient_split([*items, replace(items[0], part="train")], (1, 0, 0))


def test_bad_shares(folder):
    for shares in ((0.5, 0.5), (0.5, 0.4, 0.2), (1.2, -0.2, 0), (float("nan"), 0.5, 0.5)):
        with pytest.raises(ValueError, match="`shares` must be three numbers"):
            corpus.patient_split((), shares)


def test_the_cache_holds_what_prepare_gives_and_one_window_is_one_slice(folder, tmp_path):
    items = [item for item in corpus.scan(folder).items if item.patient == "aaaaaaaa"]
    done = []
    cache = corpus.build_cache(items, tmp_path, progress=lambda *args: done.append(args[:2]))
    assert [failure.file for failure in cache.failures] == [str(folder / "p0" / "aaaaaaaa_s009_t000.edf")]
    assert "is not an EDF file" in cache.failures[0].reason or "truncated" in cache.failures[0].reason
    assert done == [(1, 3), (2, 3), (3, 3)]
    exact = prepare(read_edf(items[0].edf))
    data, labels = cache.recordings[0].window(700, 1724)
    assert data.shape == (19, 1024) and data.dtype == np.float32 and data.flags.c_contiguous
    # float16 has 11 significant bits; below its normal range, an absolute step
    assert (np.abs(data - exact.data[:, 700:1724]) <= 2**-11 * np.abs(exact.data[:, 700:1724]) + 2**-25).all()
    assert labels.tolist() == annotations.event_mask([Event(4, 6)], 700, 1724, RATE).tolist()
    assert corpus._mapped(str(cache.recordings[0].path)).flags.c_contiguous  # time first: consecutive bytes
    windows = WindowDataset(cache.recordings, window_seconds=4, stride_seconds=2)
    torch.testing.assert_close(windows[0][0], torch.from_numpy(cache.recordings[0].window(0, 1024)[0]))


def test_a_killed_build_goes_on_and_a_changed_file_is_made_again(folder, tmp_path, monkeypatch):
    items = [item for item in corpus.scan(folder).items if item.patient in ("aaaaaaab", "aaaaaaad")]
    calls = []

    def killed(item, described, options):
        calls.append(item)
        if len(calls) == 3:
            described.with_suffix(".npy").write_bytes(b"half of it")  # and no JSON
            raise KeyboardInterrupt
        return original(item, described, options)

    original = corpus._prepare
    monkeypatch.setattr(corpus, "_prepare", killed)
    with pytest.raises(KeyboardInterrupt):
        corpus.build_cache(items, tmp_path)
    monkeypatch.setattr(corpus, "_prepare", lambda *args: calls.append(args[0]) or original(*args))
    del calls[:]
    cache = corpus.build_cache(items, tmp_path)
    assert calls == items[2:] and len(cache.recordings) == 4 and not cache.failures
    del calls[:]
    os.utime(items[0].edf)
    corpus.build_cache(items, tmp_path)
    assert calls == items[:1]
    del calls[:]
    corpus.build_cache(items[:1], tmp_path, corpus.PrepareOptions(line_frequency=50.0))
    assert calls == items[:1]  # another setting is another file


def test_processes_prepare_the_same(folder, tmp_path):
    items = [item for item in corpus.scan(folder).items if item.patient in ("aaaaaaaf", "aaaaaaaa")]
    one = corpus.build_cache(items, tmp_path / "one")
    two = corpus.build_cache(items, tmp_path / "two", workers=2)
    assert len(one.failures) == len(two.failures) == 1
    for a, b in zip(one.recordings, two.recordings, strict=True):
        assert a.source == b.source and a.path.read_bytes() == b.path.read_bytes()


# ---- events --------------------------------------------------------------------------------------------------------


def test_hysteresis():
    probability = np.zeros(100)
    probability[10:20] = 0.6
    probability[20:30] = 0.45  # below `on`, above `off`: still the same event
    probability[40:50] = 0.45  # never reaches `on`
    probability[60:62] = 0.9  # too short
    probability[80:90] = [0.45, 0.7, 0.7, 0.7, 0.1, 0.7, 0.7, 0.7, 0.7, np.nan]
    rules = {"on": 0.5, "off": 0.4, "min_duration": 0.3, "merge_gap": 0.15}
    found = scoring.find_events(probability, 10.0, **rules)
    assert [(event.onset, round(event.duration, 6)) for event in found] == [(1.0, 2.0), (8.1, 0.8)]
    assert scoring.find_events(np.zeros(0), 10.0) == [] == scoring.find_events(np.full(5, np.nan), 10.0)
    with pytest.raises(ValueError, match="`off` must be a number >= 0 and <= 0.5"):
        scoring.find_events(probability, 10.0, off=0.6)


def test_scores_by_hand():
    """One seizure found, one missed, one false alarm; a second recording adds a false alarm and no seizure."""
    first = ([Event(100, 50), Event(1000, 100)], [Event(110, 40), Event(2000, 30)], 3600.0)
    second = ([], [Event(500, 60)], 3600.0)
    scores = scoring.score_events([first, second])
    assert (scores.events, scores.found, scores.hours) == (2, 1, 2.0)
    assert scores.event_sensitivity == 0.5 and scores.event_precision == pytest.approx(1 / 3)
    assert scores.event_f1 == pytest.approx(0.4) and scores.false_alarms == pytest.approx(2 * 12)
    assert scores.sample_sensitivity == pytest.approx(40 / 150) and scores.sample_precision == pytest.approx(40 / 130)
    nothing = scoring.score_events([([], [], 10.0)])
    assert np.isnan(nothing.event_sensitivity) and np.isnan(nothing.event_f1) and nothing.false_alarms == 0


# ---- training ------------------------------------------------------------------------------------------------------

TOML = """
out = "runs"
[data]
folder = "{folder}"
cache = "cache"
split = [0.5, 0.25, 0.25]
window_seconds = 4
stride_seconds = 1
[model]
preset = "nano"
options = {{ tcn_channels = [8, 8, 8, 8], electrode_dim = 8 }}
[training]
steps = 6
threads = 1
batch_size = 2
validate_every = 4
checkpoint_every = 2
learning_rate = 3e-3
tensorboard = false
"""


@pytest.fixture
def config(folder, tmp_path):
    path = tmp_path / "train.toml"
    path.write_text(TOML.format(folder=folder))
    return path


def test_load_config(config, tmp_path):
    loaded = experiment.load_config(config)
    assert loaded.data.cache == str(tmp_path / "cache") and loaded.out == str(tmp_path / "runs")
    assert loaded.training.learning_rate == 3e-3 and loaded.data.window_seconds == 4.0
    (tmp_path / "train.json").write_text(json.dumps(tomllib.loads(config.read_text())))
    assert experiment.load_config(tmp_path / "train.json") == loaded


@pytest.mark.parametrize(
    "old, new, error",
    [
        ("steps = 6", "step = 6", "`training` has the keys steps, .*: got step"),
        ("steps = 6", 'steps = "6"', "`training.steps` must be of the type int: got '6'"),
        ("steps = 6", "steps = 0", "`training.steps` must be >= 1: got 0"),
        ("window_seconds = 4", "window_seconds = 4.03", "must be a multiple of 0.0625: got 4.03"),
        ("split = [0.5, 0.25, 0.25]", "split = [0.5, 0.5]", "`data.split` must be of the type 3 numbers"),
        ("[data]", "[daten]", "`the file` has the keys data, .*: got daten"),
        ('preset = "nano"', "preset = nano", "cannot be read"),
        ('preset = "nano"', 'preset = "tiny"', "`model.preset` must be one of 'v3', 'small', 'nano': got 'tiny'"),
        ("options = {", "options = { pe = 3, ", "`model.options` has the keys boundary_norm, .*: got pe"),
        ("batch_size = 2", 'batch_size = 2\nprecision = "fp8"', "must be one of 'float32', 'bfloat16'"),
        ("[model]", "line_frequency = 55\n[model]", "`data.line_frequency` must be one of 50.0, 60.0, None"),
    ],
)
def test_a_wrong_configuration_says_what_is_legal(config, old, new, error):
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ValueError, match=error):
        experiment.load_config(config)


def test_what_is_not_there_is_said(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "no.toml")]) == 2
    assert "no.toml` does not exist; `examples/train.toml`" in capsys.readouterr().err
    edf = write_edf(tmp_path / "new.edf")
    assert main(["detect", str(edf), "--checkpoint", str(tmp_path / "no.pt")]) == 2
    assert "no.pt` must be a checkpoint written by `save_checkpoint`: got no such file" in capsys.readouterr().err


def test_paths_of_a_configuration_may_start_at_home(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    config.write_text(re.sub(r"folder = .*", 'folder = "~/eeg"', config.read_text()))
    assert experiment.load_config(config).data.folder == str(tmp_path / "home" / "eeg")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_was_stopped_ends_where_an_unbroken_one_does(config, tmp_path):
    loaded = experiment.load_config(config)
    whole = experiment.train(loaded)
    assert whole["steps"] == whole["finite"] == 6 and whole["first"] == 1
    assert sorted(Path(failure["file"]).stem for failure in whole["failures"])[-1] == "unlabelled"
    taken = []
    broken = replace(loaded, out=str(tmp_path / "broken"))
    experiment.train(broken, stop=lambda: len(taken) == 3, on_step=taken.append)
    rest = experiment.train(broken)
    assert rest["first"] == 4 and rest["steps"] == 3
    ours, theirs = (training.load_checkpoint(tmp_path / name / "last.pt") for name in ("broken", "runs"))
    for (name, a), b in zip(ours[0].state_dict().items(), theirs[0].state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    steps = [
        [line for line in lines(tmp_path / name / "metrics.jsonl") if line["kind"] == "step"]
        for name in ("broken", "runs")
    ]
    assert [line["step"] for line in steps[0]] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in steps[0]] == [line["loss"] for line in steps[1]]
    kinds = [line["step"] for line in lines(tmp_path / "runs" / "metrics.jsonl") if line["kind"] == "validation"]
    assert kinds == [4, 6]
    split = json.loads((tmp_path / "runs" / "split.json").read_text())
    assert not set(split["patients"]["train"]) & set(split["patients"]["validation"] + split["patients"]["test"])
    assert not list((tmp_path / "runs").glob(".*partial"))


def test_another_model_is_not_resumed(config):
    loaded = experiment.load_config(config)
    experiment.train(replace(loaded, training=replace(loaded.training, steps=1)))
    other = replace(loaded, model=replace(loaded.model, options={**loaded.model.options, "pe_k": 3}))
    with pytest.raises(ValueError, match="must be of the same model"):
        experiment.train(other)


def test_bands_fail_where_they_should():
    healthy = [
        training.StepResult(n, 1.0 - 0.001 * n, 0.5, 1e-3 * min(1, n / 10), True, True, True, False, None, 0.1)
        for n in range(1, 201)
    ]
    options = experiment.TrainOptions(steps=200)
    memory = [1e9] * 200

    def outside(results, memory=memory):
        return [name for name, _, _, within in experiment.bands(results, memory, options) if not within]

    assert outside(healthy) == []
    names = list(experiment.BANDS)
    assert outside([*healthy[:-1], replace(healthy[-1], gradients_finite=False)]) == names[:1]
    assert outside([replace(r, loss=1 + 0.01 * r.step) for r in healthy]) == names[1:2]
    assert names[1] in outside([replace(r, loss=float("nan")) if r.step == 200 else r for r in healthy])
    assert outside([replace(r, learning_rate=1e-7) for r in healthy]) == names[2:4]
    assert outside([replace(r, grad_norm=0.0) for r in healthy]) == names[4:5]
    assert outside(healthy, [1e9] * 100 + [1.2e9] * 100) == names[5:]


def test_train_and_detect_from_the_command_line(config, folder, tmp_path, capsys):
    """Folder to checkpoint to events, as a user goes: the discharges are strong, and 60 steps find them."""
    text = config.read_text().replace("steps = 6", "steps = 60").replace("validate_every = 4", "validate_every = 60")
    config.write_text(text)
    assert main(["train", "--config", str(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["finite"] == 60 and summary["validation"]["auroc"] > 0.9
    edf = write_edf(tmp_path / "new.edf", seed=99, events=[(8, 6)])
    checkpoint = str(tmp_path / "runs" / "best.pt")
    torch.load(checkpoint, weights_only=True)
    probability = 0.5 * summary["validation"]["auroc"]
    assert main(["detect", str(edf), "--checkpoint", checkpoint, "--on", f"{probability:.2f}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert any(event["onset"] < 14 and event["onset"] + event["duration"] > 8 for event in found["events"])
    table = (tmp_path / "new_events.tsv").read_text().splitlines()
    assert table[0].split("\t")[:3] == ["onset", "duration", "eventType"] and len(table) == 1 + len(found["events"])
    assert annotations.read_annotation(tmp_path / "new_events.tsv", edf)  # what we write, we read
    assert (tmp_path / "new_events.png").read_bytes()[:4] == b"\x89PNG"


def test_smoke_probe_and_timing_from_the_command_line(config, capsys):
    assert main(["train", "--config", str(config), "--smoke", "--json"]) in (0, 1)
    shown = capsys.readouterr()
    summary = json.loads(shown.out)
    assert "step 1/6 " in shown.err  # 20, but the run has 6
    assert summary["steps"] == 6 and [row[0] for row in summary["bands"]] == list(experiment.BANDS)
    assert main(["train", "--config", str(config), "--probe", "2"]) in (0, 1)
    shown = capsys.readouterr()
    assert "steps not finite" in shown.out and "step 1/2 " in shown.err
    assert main(["train", "--config", str(config), "--timing", "--json"]) == 0
    parts = json.loads(capsys.readouterr().out)
    assert all(part["forward"] > 0 for part in parts)
    assert all(part["backward"] > 0 for part in parts if part["part"] != "optimizer")


def test_the_worst_false_alarm_and_the_worst_miss(folder, tmp_path):
    items = [item for item in corpus.scan(folder).items if item.patient == "aaaaaaaa"]
    (recording, _) = corpus.build_cache(items[:2], tmp_path).recordings  # 20 s, marked from 4 to 10
    probability = np.full(recording.samples, 0.1)
    probability[15 * RATE : 16 * RATE] = 0.7
    probability[18 * RATE : 19 * RATE] = 0.9
    quiet = experiment.Outcome(recording, probability, [Event(15, 1), Event(18, 1)])
    right = experiment.Outcome(recording, np.full(recording.samples, 0.99), [Event(5, 2)])
    validation = experiment.Validation(1, 0.5, scoring.score_events([([], [], 1.0)]), (right, quiet))
    assert validation.worst_false_alarm() == (quiet, Event(18, 1))
    assert validation.worst_miss() == (quiet, Event(4, 6, "seiz"))
    nothing = replace(validation, outcomes=(right,))
    assert nothing.worst_false_alarm() is None and nothing.worst_miss() is None
    drawn = cli_train._Validations()
    drawn.append(validation)
    assert [Path(path).name for path in drawn.draw(tmp_path)] == ["worst_false_alarm.png", "worst_miss.png"]
    assert all((tmp_path / f"worst_{name}.png").read_bytes()[:4] == b"\x89PNG" for name in ("false_alarm", "miss"))
    drawn.append(nothing)
    assert drawn.draw(tmp_path) == [] and not list(tmp_path.glob("worst_*"))  # no picture of an earlier run stays


def test_wrong_files_are_told_in_one_line(config, tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.toml")]) == 2
    assert main(["detect", str(tmp_path / "none.edf"), "--checkpoint", str(config)]) == 2
    model = SeizureDetector.from_preset("nano")
    training.save_checkpoint(tmp_path / "plain.pt", model)
    assert main(["detect", str(tmp_path / "none.edf"), "--checkpoint", str(tmp_path / "plain.pt")]) == 2
    text = capsys.readouterr().err
    assert "must be a checkpoint of `stablekern train`" in text and "Traceback" not in text


def test_two_processes_train_one_model(config, tmp_path):
    """torchrun with two processes: both end with the same weights, one writes."""
    text = config.read_text().replace("steps = 6", "steps = 2")
    config.write_text(text)
    script = tmp_path / "run.py"
    script.write_text(
        "import json, os, torch\n"
        "from stablekern.eeg import experiment\n"
        f"summary = experiment.train(experiment.load_config({str(config)!r}))\n"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'] + '.json', 'w').write(json.dumps(summary['steps']))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "0.json").read_text() == (tmp_path / "1.json").read_text() == "2"
    assert [line["step"] for line in lines(tmp_path / "runs" / "metrics.jsonl") if line["kind"] == "step"] == [1, 2]


def test_bfloat16_autocast_trains(config):
    loaded = experiment.load_config(config)
    options = replace(loaded.training, precision="bfloat16", steps=3)
    summary = experiment.train(replace(loaded, training=options), fresh=True)
    assert summary["finite"] == 3 and asdict(options)["precision"] == "bfloat16"


def test_tensorboard_gets_the_same_numbers(config, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loaded = experiment.load_config(config)
    experiment.train(replace(loaded, training=replace(loaded.training, tensorboard=True, steps=3)))
    events = event_accumulator.EventAccumulator(str(tmp_path / "runs" / "tensorboard"))
    events.Reload()
    shown = [scalar.value for scalar in events.Scalars("step/loss")]
    assert shown == pytest.approx([line["loss"] for line in lines(tmp_path / "runs" / "metrics.jsonl")[:3]])


def test_the_example_configuration_holds_the_defaults():
    loaded = experiment.load_config(Path(__file__).parents[1] / "examples" / "train.toml")
    default = experiment.TrainConfig(data=replace(loaded.data, folder=loaded.data.folder))
    plain = experiment.DataOptions(folder=loaded.data.folder, cache=loaded.data.cache)
    assert loaded == replace(default, data=plain, out=loaded.out)


def test_the_synthetic_corpus_can_be_trained_on(tmp_path):
    """What the example writes is found, read, dealt out by patient and labelled as its annotations say."""
    example = Path(__file__).resolve().parent.parent / "examples" / "synthetic_corpus.py"
    subprocess.run([sys.executable, example, tmp_path, "--patients", "2"], check=True, timeout=120)
    found = corpus.scan(tmp_path)
    assert len(found.items) == 4 and not found.failures and len({item.patient for item in found.items}) == 2
    for item in found.items:
        recording = prepare(read_edf(item.edf))
        inside = np.zeros(recording.samples, bool)
        for event in item.events:
            assert 0 < event.onset < event.end < recording.seconds
            inside[round(event.onset * RATE) : round(event.end * RATE)] = True
        ratio = recording.data[:, inside].std(1) / recording.data[:, ~inside].std(1)
        assert ratio.max() > 1.2  # at the electrodes near a focus
