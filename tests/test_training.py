"""The training loop: its checks, its schedule, the variables that change it, its score, its files."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from stablekern import focal_loss, training
from stablekern._files import replaced
from stablekern.eeg import Recording, WindowDataset
from stablekern.errors import SettingError
from stablekern.nn import SeizureDetector
from stablekern.optim import GradGuard

LOSS = functools.partial(focal_loss, reduction="mean")


class Toy(nn.Module):
    """Channels to one logit per sample; `poison` makes the gradient of `scale` NaN: 0 * inf in its backward."""

    def __init__(self, poison: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 1, 5, padding=2)
        self.scale = nn.Parameter(torch.zeros(1))
        self.poison = poison

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x).squeeze(1)
        return out + 0 * self.scale.sqrt() if self.poison else out + self.scale


def batch() -> tuple[Tensor, Tensor]:
    x = torch.randn(4, 3, 64)
    return x, (x[:, 0] > 0).float()


def one_step(model: nn.Module, *, policy: str | None = None, loss=LOSS) -> training.StepResult:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = GradGuard(model, 1.0, policy=policy or training.guard_policy())
    return training.training_step(model, *batch(), loss=loss, optimizer=optimizer, guard=guard)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- one step --------------------------------------------------------------------------------------------------------


def test_a_step_reports_the_loss_and_the_norm_of_what_it_did():
    model = Toy()
    x, y = batch()
    value = LOSS(model(x), y)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(value, model.parameters())]).norm()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    result = training.training_step(model, x, y, loss=LOSS, optimizer=optimizer, guard=GradGuard(model, 1.0), step=7)
    assert result.step == 7 and result.learning_rate == 0.1 and result.finite and not result.skipped
    assert result.loss == pytest.approx(value.item()) and result.grad_norm == pytest.approx(norm.item())
    assert any((a != b).any() for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize(
    ("variables", "policy"),
    [
        ({}, "skip"),
        ({"BGB_SANITIZE_GRADS": "1"}, "zero"),
        ({"BGB_SKIP_OPT_STEP_ON_NAN": "1"}, "skip"),
        ({"BGB_SANITIZE_GRADS": "true", "BGB_SKIP_OPT_STEP_ON_NAN": "yes"}, "skip"),
    ],
)
def test_the_variables_decide_what_becomes_of_a_bad_gradient(monkeypatch, variables, policy):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert training.guard_policy() == policy
    model = Toy(poison=True)
    before = weights(model)
    result = one_step(model)
    assert not result.gradients_finite and result.bad_gradient == "scale" and result.loss_finite
    assert result.skipped == (policy == "skip") and result.parameters_finite
    moved = [bool((a != b).any()) for a, b in zip(before, weights(model), strict=True)]
    named = dict(zip((name for name, _ in model.named_parameters()), moved, strict=True))
    # "zero" drops the poisoned tensor alone; "skip" drops the step.
    assert named == dict.fromkeys(named, False) | ({"conv.weight": True, "conv.bias": True} if policy == "zero" else {})


@pytest.mark.parametrize("policy", ["skip", "zero"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(policy, value):
    model = Toy()
    before = weights(model)
    result = one_step(model, policy=policy, loss=lambda out, y: LOSS(out, y) + value)
    assert not result.loss_finite and result.skipped and not result.finite and result.gradients_finite
    assert all((a == b).all() for a, b in zip(before, weights(model), strict=True))


def test_anomaly_detection_is_on_for_the_step_alone_and_only_if_asked_for(monkeypatch):
    assert not one_step(Toy(poison=True)).gradients_finite
    monkeypatch.setenv("BGB_ANOMALY_DETECT", "1")
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="Sqrt|sqrt|Mul|mul"):
        one_step(Toy(poison=True))
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_parameters_are_checked_whatever_their_type(value):
    model = nn.Module()
    model.real, model.empty = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.empty(0))
    model.complex = nn.Parameter(torch.ones(5, dtype=torch.complex64))
    model.bf16 = nn.Parameter(torch.ones(5, dtype=torch.bfloat16))
    assert training.parameters_finite(model) and training.parameters_finite(nn.Module())
    for parameter in (model.real, model.bf16):
        with torch.no_grad():
            parameter.view(-1)[2] = value
        assert not training.parameters_finite(model)
        with torch.no_grad():
            parameter.fill_(1)
    with torch.no_grad():
        model.complex[4] = complex(0, value)
    assert not training.parameters_finite(model)


# ---- many steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.0), (2, 1.0), (10, 0.0), (200, 0.1), (37, 0.25)])
def test_the_schedule_rises_to_one_and_falls_towards_zero(steps, warmup):
    factors = [training.learning_rate_factor(s, steps, warmup) for s in range(steps)]
    rising = max(1, math.ceil(warmup * steps))
    assert factors[:rising] == pytest.approx([(s + 1) / rising for s in range(rising)])
    assert max(factors) == 1.0 and all(0 < f <= 1 for f in factors)
    assert factors[rising - 1 :] == sorted(factors[rising - 1 :], reverse=True)
    after = [0.5 * (1 + math.cos(math.pi * i / (steps - rising + 1))) for i in range(1, steps - rising + 1)]
    assert factors[rising:] == pytest.approx(after)


def test_fit_counts_steps_not_epochs_and_calls_back_in_order():
    torch.manual_seed(0)
    model, seen = Toy(), []
    results = training.fit(
        model,
        [batch(), batch(), batch()],
        steps=8,
        loss=LOSS,
        learning_rate=0.5,
        warmup=0.25,
        before_step=lambda number, x, y: seen.append(("before", number, tuple(x.shape), tuple(y.shape))),
        after_step=lambda result: seen.append(("after", result.step)),
    )
    assert [r.step for r in results] == list(range(1, 9))
    expected = [0.5 * training.learning_rate_factor(s, 8, 0.25) for s in range(8)]
    assert [r.learning_rate for r in results] == pytest.approx(expected)
    assert seen[:2] == [("before", 1, (4, 3, 64), (4, 64)), ("after", 1)] and len(seen) == 16


def test_the_course_of_the_rate_may_be_that_of_a_longer_run():
    results = training.fit(Toy(), [batch()], steps=3, rate_steps=10, loss=LOSS, learning_rate=0.5, warmup=0.2)
    expected = [0.5 * training.learning_rate_factor(s, 10, 0.2) for s in range(3)]
    assert [r.learning_rate for r in results] == pytest.approx(expected)


def test_autocast_is_for_the_model_alone():
    model, seen = nn.Sequential(nn.Conv1d(3, 1, 5, padding=2), nn.Flatten(1)), []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

    def loss(outputs: Tensor, labels: Tensor) -> Tensor:
        seen.append(outputs.dtype)
        return LOSS(outputs, labels)

    (result,) = training.fit(model, [batch()], steps=1, loss=loss, autocast=torch.bfloat16)
    assert seen == [torch.bfloat16, torch.float32] and result.finite


def test_fit_learns_and_repeats_itself_under_one_seed():
    def run(seed: int) -> list[float]:
        torch.manual_seed(seed)
        model = Toy()
        data = [batch() for _ in range(10)]
        return [r.loss for r in training.fit(model, data, steps=25, loss=LOSS, learning_rate=0.2)]

    first = run(3)
    assert np.mean(first[-5:]) < 0.6 * np.mean(first[:5])
    assert run(3) == first and run(4) != first


def test_fit_survives_steps_that_are_not_finite():
    model, good = Toy(), batch()
    bad = (torch.full_like(good[0], math.nan), good[1])
    results = training.fit(model, [good, bad, good], steps=6, loss=LOSS)
    assert [r.finite for r in results] == [True, False, True] * 2
    assert [r.skipped for r in results] == [False, True, False] * 2
    assert training.parameters_finite(model) and all(r.parameters_finite for r in results)


def test_fit_stops_when_told_and_refuses_an_empty_source():
    model, count = Toy(), iter(range(100))
    assert len(training.fit(model, [batch()], steps=50, loss=LOSS, stop=lambda: next(count) >= 4)) == 4
    assert training.fit(model, [], steps=0, loss=LOSS) == []
    with pytest.raises(ValueError, match="`batches` must give at least one batch"):
        training.fit(model, [], steps=1, loss=LOSS)
    with pytest.raises(ValueError, match="`warmup` must be a number >= 0 and <= 1: got 1.5"):
        training.fit(model, [batch()], steps=1, loss=LOSS, warmup=1.5)


# ---- what to train on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "smoke", "train", "validation"),
    [
        (None, None, 20, 9),
        ("1", None, 1, 1),
        ("7", None, 7, 1),
        ("19", None, 19, 3),
        ("99", None, 20, 9),
        (None, "1", 3, 1),
        ("10", "1", 3, 1),
        ("2", "1", 2, 1),
    ],
)
def test_the_variables_limit_the_recordings(monkeypatch, limit, smoke, train, validation):
    for name, value in (("BGB_LIMIT_FILES", limit), ("BGB_SMOKE_TEST", smoke)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert training.limit_files(range(20), range(100, 109)) == (list(range(train)), list(range(100, 100 + validation)))


def test_an_illegal_limit_says_what_is_legal(monkeypatch):
    monkeypatch.setenv("BGB_LIMIT_FILES", "0")
    with pytest.raises(SettingError, match="`BGB_LIMIT_FILES` must be a whole number >= 1: got '0'"):
        training.limit_files([1, 2])


def test_the_positive_weight_is_the_root_of_the_odds_except_in_a_smoke_test(monkeypatch):
    labels = np.array([1, 0, 0, 0, 0], np.float32)
    assert training.positive_weight(labels) == pytest.approx(2.0)
    assert training.positive_weight(np.zeros(4)) == training.positive_weight(torch.ones(4)) == 1.0
    monkeypatch.setenv("BGB_SMOKE_TEST", "1")
    assert training.positive_weight(labels) == 1.0


def recording(seconds: int = 100, marked: slice = slice(0, 160)) -> Recording:
    """16 Hz; the first channel counts the samples, so that a window tells where it came from."""
    data = np.random.default_rng(0).normal(size=(19, 16 * seconds)).astype(np.float32)
    data[0] = np.arange(16 * seconds)
    labels = np.zeros(16 * seconds, np.float32)
    labels[marked] = 1
    return Recording(data, 16.0, labels=labels)


def test_random_windows_are_balanced_and_repeat_under_one_seed(monkeypatch):
    windows = WindowDataset(recording(), window_seconds=2, stride_seconds=0.25)  # a tenth holds a discharge

    def draw(seed: int, rank: int = 0) -> tuple[list[int], list[bool]]:
        loader = training.random_windows(windows, batch_size=5, steps=80, seed=seed, rank=rank)
        starts, positive = [], []
        assert len(loader) == 80
        for data, labels in loader:
            assert data.shape == (5, 19, 32) and labels.shape == (5, 32)
            starts += data[:, 0, 0].int().tolist()
            positive += (labels.amax(1) > 0).tolist()
        return starts, positive

    starts, positive = draw(0)
    assert len(set(starts)) > 100 and all(p == (s < 160) for s, p in zip(starts, positive, strict=True))
    # 400 draws with probability 1/2 each: 4 standard deviations are 0.1.
    assert abs(np.mean(positive) - 0.5) < 0.1
    assert draw(0)[0] == starts and draw(1)[0] != starts and draw(0, rank=1)[0] != starts
    monkeypatch.setenv("BGB_SMOKE_TEST", "1")
    assert np.mean(draw(0)[1]) < 0.2


@pytest.mark.parametrize("marked", [slice(0, 0), slice(None)])
def test_random_windows_of_one_kind_only_are_drawn_all_the_same(marked):
    windows = WindowDataset(recording(marked=marked), window_seconds=2, stride_seconds=1)
    assert len(list(training.random_windows(windows, batch_size=2, steps=3, seed=0))) == 3


# ---- what came out ---------------------------------------------------------------------------------------------------


class Nodes(nn.Module):
    """The second channel as the logit, plus an offset that grows with the start of the window."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return x[:, 1] + self.offset * x[:, :1, 0] / 160


def test_predict_gives_every_sample_the_mean_logit_of_its_windows():
    source, model = recording(10), Nodes()
    windows = WindowDataset(source, window_seconds=2, stride_seconds=1.5, tail=True)
    probability = training.predict(model, windows, batch_size=3)
    assert len(probability) == 1 and probability[0].shape == (160,) and model.training
    starts = [s for _, s in windows.starts]
    for t in (0, 23, 24, 31, 32, 100, 159):
        offset = np.mean([s / 160 for s in starts if s <= t < s + 32])
        expected = torch.sigmoid(torch.tensor(source.data[1, t] + offset))
        torch.testing.assert_close(probability[0][t], expected.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("levels", [2, 5, 1000])
@pytest.mark.parametrize("share", [0.02, 0.5])
def test_auroc_is_the_statistic_of_mann_and_whitney(levels, share):
    random = np.random.default_rng(levels)
    labels = random.random(500) < share
    scores = np.round((random.normal(size=500) + labels) * levels) / levels
    result = stats.mannwhitneyu(scores[labels], scores[~labels])
    expected = result.statistic / (labels.sum() * (~labels).sum())
    got = training.auroc(torch.tensor(scores), torch.tensor(labels).float())
    assert got == pytest.approx(expected, abs=1e-12)
    assert training.auroc(-torch.tensor(scores), torch.tensor(labels).float()) == pytest.approx(1 - expected, abs=1e-12)


def test_auroc_of_special_cases():
    labels = torch.tensor([0.0, 0, 1, 1])
    assert training.auroc(torch.tensor([1.0, 2, 3, 4]), labels) == 1.0
    assert training.auroc(torch.tensor([4.0, 3, 2, 1]), labels) == 0.0
    assert training.auroc(torch.zeros(4), labels) == 0.5
    assert training.auroc(torch.tensor([-math.inf, 0, 0, math.inf]), labels) == 0.875
    assert math.isnan(training.auroc(torch.zeros(4), torch.ones(4)))
    assert math.isnan(training.auroc(torch.tensor([0, math.nan, 1, 2]), labels))
    with pytest.raises(ValueError, match=r"`labels` must have the shape of `scores`: got \(4,\) and \(3,\)"):
        training.auroc(torch.zeros(3), labels)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_the_same_logits_and_keeps_its_facts(tmp_path):
    model = SeizureDetector.from_preset("nano", pe_k=5).eval()
    path = tmp_path / "checkpoint.pt"
    training.save_checkpoint(path, model, seed=3, auroc=0.9)
    loaded, facts = training.load_checkpoint(path)
    assert facts["seed"] == 3 and facts["auroc"] == 0.9 and facts["versions"]["torch"] == str(torch.__version__)
    assert loaded.config == model.config and not loaded.training
    x = torch.randn(1, 19, 256)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_that_does_not_match_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"weights": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="must be a checkpoint written by `save_checkpoint`: got dict"):
        training.load_checkpoint(path)
    training.save_checkpoint(path, SeizureDetector.from_preset("nano"))
    content = torch.load(path, weights_only=True)
    content["state_dict"].pop("detection_head.bias")
    torch.save(content, path)
    with pytest.raises(RuntimeError, match="detection_head.bias"):
        training.load_checkpoint(path)


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replaced(path) as partial:
        partial.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
