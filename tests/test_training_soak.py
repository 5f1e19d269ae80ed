"""One step in a hundred and sixty of the training soak, and that it goes on where it stopped."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("mne")
import training_soak


def test_the_first_steps_are_finite_and_a_stopped_soak_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(training_soak, "RESULTS", tmp_path / "training.jsonl")
    monkeypatch.setattr(training_soak, "STATE", tmp_path / "training.pt")
    monkeypatch.setattr(training_soak, "EVERY", 20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        training_soak.run(20)
        training_soak.run(40)
        whole = training_soak.Soak()
        losses = [whole.step()[0].loss for _ in range(40)]
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (tmp_path / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40]
    assert lines[1]["loss"] == pytest.approx(sum(losses[20:]) / 20, abs=1e-6)
    assert set(lines[0]["windows"]) | set(lines[1]["windows"]) == {*training_soak.FAULTS, "none"}


def test_a_value_that_is_not_finite_ends_it():
    soak = training_soak.Soak()
    with torch.no_grad():
        soak.model.detection_head.weight.view(-1)[0] = torch.nan
    with pytest.raises(AssertionError, match="step 1, faults"):
        soak.step()


@pytest.mark.parametrize("fault", training_soak.FAULTS)
def test_a_fault_is_in_its_window(fault):
    import numpy as np

    data, labels = training_soak.window(np.random.default_rng(1), fault)
    assert data.shape == (19, training_soak.LENGTH) and np.isfinite(data).all() and labels.shape == data.shape[1:]
    rows = len({row.tobytes() for row in data})
    if fault == "dead":
        assert (data == 0).all(axis=1).any()
    elif fault == "burst":
        assert np.abs(data).max() == training_soak.SIGMA
    elif fault == "constant":
        assert data.std() == 0
    elif fault in ("clusters", "identical"):
        assert rows == {"clusters": 2, "identical": 1}[fault]
    else:
        assert rows == 19
