"""The checks of `stablekern.health`, and the environment variables that switch them."""

from __future__ import annotations

import pytest
import torch

from stablekern import sample_covariance, settings
from stablekern.errors import CovarianceError, NonFiniteError, SettingError
from stablekern.health import assert_finite, check_covariances, check_gradients, clamp_and_check
from stablekern.ops.finite_stats import finite_stats

SWITCHES = ("BGB_NAN_DEBUG", "BGB_DEBUG_FINITE", "BGB_SMOKE_TEST")
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in settings.SETTINGS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def broken():
    return torch.tensor([[1.0, NAN, -3.0], [INF, -INF, 5.0]])


def test_assert_finite_is_off_by_default(broken):
    assert assert_finite("tcn", broken) is broken


@pytest.mark.parametrize("name", SWITCHES)
def test_each_variable_switches_assert_finite_on(name, broken, monkeypatch):
    """Read at each call: no import or object has to be made anew."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(NonFiniteError, match="`tcn` must be finite"):
        assert_finite("tcn", broken)
    monkeypatch.setenv(name, "0")
    assert assert_finite("tcn", broken) is broken


def test_message_of_assert_finite(broken):
    with pytest.raises(FloatingPointError) as caught:
        assert_finite("gnn", broken, force=True)
    assert str(caught.value) == (
        "stablekern.assert_finite: `gnn` must be finite: got 1 NaN and 2 infinite of 6 entries of shape (2, 3), "
        "the others in [-3, 5] with mean 1"
    )
    with pytest.raises(NonFiniteError, match=r"got 1 NaN and 0 infinite of 1 entries of shape \(\), no others$"):
        assert_finite("loss", torch.tensor(NAN), force=True)


@pytest.mark.parametrize("x", [torch.zeros(0, 3), torch.ones(2), torch.arange(3), torch.ones(2, dtype=torch.complex64)])
def test_finite_tensors_pass(x):
    assert assert_finite("x", x, force=True) is x


@pytest.mark.parametrize("name", SWITCHES)
def test_an_illegal_value_is_not_taken_for_off(name, monkeypatch):
    monkeypatch.setenv(name, "maybe")
    with pytest.raises(SettingError, match=f"`{name}` must be one of 1, true, yes, on, 0, false, no, off: got 'maybe'"):
        assert_finite("x", torch.ones(2))


def test_clamp_is_off_by_default(broken):
    assert clamp_and_check(broken, -1.0, 1.0) is broken


def test_safe_clamp_repairs_and_bounds(monkeypatch):
    monkeypatch.setenv("BGB_SAFE_CLAMP", "true")
    x = torch.tensor([NAN, INF, -INF, 100.0, -100.0, 2.5], requires_grad=True)
    y = clamp_and_check(x)
    torch.testing.assert_close(y.detach(), torch.tensor([0.0, 0.0, 0.0, 10.0, -10.0, 2.5]), rtol=0, atol=0)
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


def test_safe_clamp_bounds_come_from_the_environment_unless_given(monkeypatch):
    monkeypatch.setenv("BGB_SAFE_CLAMP", "1")
    monkeypatch.setenv("BGB_SAFE_CLAMP_MIN", "-2.5")
    monkeypatch.setenv("BGB_SAFE_CLAMP_MAX", "1e1")
    x = torch.tensor([-60.0, 60.0])
    assert clamp_and_check(x).tolist() == [-2.5, 10.0]
    assert clamp_and_check(x, high=50.0).tolist() == [-2.5, 50.0]
    assert clamp_and_check(x, -50.0, 50.0).tolist() == [-50.0, 50.0]
    with pytest.raises(ValueError, match="`low` must be below `high`: got 3.0 and 3.0"):
        clamp_and_check(x, 3.0, 3.0)
    with pytest.raises(TypeError, match="`low` must be a number: got str"):
        clamp_and_check(x, "0")


@pytest.mark.parametrize("name", SWITCHES)
def test_the_check_sees_what_the_clamp_would_hide(name, broken, monkeypatch):
    monkeypatch.setenv("BGB_SAFE_CLAMP", "1")
    monkeypatch.setenv(name, "1")
    with pytest.raises(NonFiniteError, match="`temporal` must be finite"):
        clamp_and_check(broken, tag="temporal")


def test_off_costs_no_graph_break():
    compiled = torch.compile(lambda x: clamp_and_check(assert_finite("a", x) * 2), fullgraph=True, backend="aot_eager")
    assert compiled(torch.ones(3)).tolist() == [2.0, 2.0, 2.0]


def test_check_gradients_names_the_bad_ones(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Embedding(4, 3, sparse=True), torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    assert check_gradients(model) == []
    model[1](model[0](torch.tensor([1, 1, 3]))).sum().backward()
    assert check_gradients(model, action="raise") == []
    model[1].bias.grad = torch.tensor([NAN, -2.0])
    model[0].weight.grad = model[0].weight.grad * INF
    first, second = check_gradients(model, action="return")
    assert (first.name, first.nan + first.inf) == ("0.weight", first.count)
    assert (second.name, second.shape, second.nan, second.inf, second.count) == ("1.bias", (2,), 1, 0, 2)
    assert second.min == second.max == second.mean == -2.0
    said = r"parameter must be finite: got 0\.weight .*; 1\.bias \(2 float32\): 1 NaN, 0 inf of 2, -2 to -2, mean -2$"
    with pytest.raises(NonFiniteError, match=said):
        check_gradients(model, action="raise")
    with pytest.warns(RuntimeWarning, match=said):
        check_gradients(model)
    monkeypatch.setenv("BGB_NAN_DEBUG", "1")
    with pytest.raises(NonFiniteError, match=said):
        check_gradients(model)
    with pytest.raises(ValueError, match="`action` must be raise, warn or return: got 'stop'"):
        check_gradients(model, action="stop")


def test_finite_stats_of_mixed_tensors():
    """The range of half and single precision sums does not limit the mean."""
    tensors = [
        torch.full((1000,), 6e4, dtype=torch.float16),
        torch.full((10,), 3e38),
        torch.tensor([3 + 4j, complex(NAN, 0)]),
        torch.empty(0, dtype=torch.bfloat16),
        torch.tensor([True, False]),
    ]
    stats = finite_stats(tensors)
    assert stats.nan.tolist() == [0, 0, 1, 0, 0]
    assert stats.inf.tolist() == [0, 0, 0, 0, 0]
    assert stats.count.tolist() == [1000, 10, 2, 0, 2]
    single = torch.tensor(3e38).item()
    expected = torch.tensor([6e4, single, 5.0, NAN, 0.5], dtype=torch.float64)
    torch.testing.assert_close(stats.mean, expected, rtol=1e-15, atol=0, equal_nan=True)
    assert stats.max[1] == single and stats.min[2] == 5.0
    assert all(field.shape == (0,) for field in finite_stats([]))


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_check_covariances_names_the_one_that_broke(device, monkeypatch):
    n = 4
    X = torch.randn(3, 9, n, dtype=torch.complex64, device=device)
    good = sample_covariance(X, target_trace=float(n))
    check_covariances(R_pred=good, R_blend=good * 1.005, force=True)
    check_covariances(R_pred=2 * good, target_trace=2.0 * n, force=True)
    check_covariances(R_pred=good.movedim(0, -1), dims=(0, 1), force=True)
    loaded = good + torch.eye(n, device=device)  # loaded, and not normalised again
    check_covariances(R_blend=loaded)  # off
    for wrong in (loaded, 1.02 * good, -good, 1j * good, good * float("nan")):
        broken = torch.stack([good[0], wrong[1]])
        with pytest.raises(CovarianceError, match=r"`R_samp` must have the trace 4 .*: got 1 of 2, first \(1,\) with"):
            check_covariances(R_pred=good, R_samp=broken, R_blend=wrong, force=True)
    indefinite = torch.diag(torch.tensor([6.0, -4.0, 1.0, 1.0])).to(device)  # the trace alone would pass
    monkeypatch.setenv("BGB_NAN_DEBUG", "1")
    with pytest.raises(CovarianceError, match=r"`R_blend` must .*first \(\) with trace 4, norm 7.348"):
        check_covariances(R_blend=indefinite)
