"""Every environment variable: its default, what it accepts, what it refuses. Effects are tested where they act."""

from __future__ import annotations

import pytest

from stablekern import settings
from stablekern.errors import SettingError

YES_NO = {"1": True, "true": True, "YES": True, "On": True, "0": False, "False": False, "no": False, "off": False}
FLAG = (YES_NO, ("2", "y", "t r u e"))
NUMBER = ({"-3": -3.0, "2.5": 2.5, "1e1": 10.0}, ("nan", "inf", "-inf", "ten", "1,5"))
TEXT = ({"a b": "a b", " padded ": "padded"}, ())
BACKEND = ({name: name for name in ("native", "torch", "triton", "cuda")}, ("Native", "cpp", "triton,torch"))

# name: (default, (legal texts with their values, illegal texts))
EXPECTED = {
    "STABLEKERN_BACKEND": (None, BACKEND),
    "STABLEKERN_NATIVE": (True, FLAG),
    "STABLEKERN_CACHE_DIR": (None, TEXT),
    "STABLEKERN_MARCH": ("native", TEXT),
    "STABLEKERN_POOL_MB": (512, ({"0": 0, "2048": 2048}, ("-1", "0.5", "all"))),
    "SEIZURE_MAMBA_FORCE_FALLBACK": (False, FLAG),
    "BGB_NAN_DEBUG": (False, FLAG),
    "BGB_DEBUG_FINITE": (False, FLAG),
    "BGB_ANOMALY_DETECT": (False, FLAG),
    "BGB_SAFE_CLAMP": (False, FLAG),
    "BGB_SAFE_CLAMP_MIN": (-10.0, NUMBER),
    "BGB_SAFE_CLAMP_MAX": (10.0, NUMBER),
    "BGB_SANITIZE_GRADS": (False, FLAG),
    "BGB_SKIP_OPT_STEP_ON_NAN": (False, FLAG),
    "BGB_LIMIT_FILES": (None, ({"1": 1, "40": 40}, ("0", "-1", "2.5", "all"))),
    "BGB_SMOKE_TEST": (False, FLAG),
}
LEGAL = [(name, text, value) for name, (_, (legal, _)) in EXPECTED.items() for text, value in legal.items()]
ILLEGAL = [(name, text) for name, (_, (_, illegal)) in EXPECTED.items() for text in illegal]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in settings.SETTINGS:
        monkeypatch.delenv(name, raising=False)


def test_every_variable_is_covered():
    assert set(settings.SETTINGS) == set(EXPECTED)
    assert all(setting.name == name and setting.effect and setting.legal for name, setting in settings.SETTINGS.items())


@pytest.mark.parametrize("name", EXPECTED)
def test_unset_or_blank_is_the_default(name, monkeypatch):
    default = EXPECTED[name][0]
    assert settings.get(name) == default and settings.SETTINGS[name].default == default
    for blank in ("", "  "):
        monkeypatch.setenv(name, blank)
        assert settings.get(name) == default


@pytest.mark.parametrize(("name", "text", "value"), LEGAL)
def test_legal_texts(name, text, value, monkeypatch):
    """Read at each use: the value follows the environment."""
    monkeypatch.setenv(name, text)
    assert settings.get(name) == value and type(settings.get(name)) is type(value)
    monkeypatch.delenv(name)
    assert settings.get(name) == EXPECTED[name][0]


@pytest.mark.parametrize(("name", "text"), ILLEGAL)
def test_illegal_texts_name_the_legal_ones(name, text, monkeypatch):
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingError) as caught:
        settings.get(name)
    assert str(caught.value) == f"stablekern.settings: `{name}` must be {settings.SETTINGS[name].legal}: got '{text}'"
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("STABLEKERN_BACKEND", "one of native, torch, triton, cuda"),
        ("BGB_NAN_DEBUG", "one of 1, true, yes, on, 0, false, no, off"),
        ("BGB_LIMIT_FILES", "a whole number >= 1"),
        ("BGB_SAFE_CLAMP_MIN", "a finite number"),
    ],
)
def test_the_rule_in_words(name, words):
    assert settings.SETTINGS[name].legal == words


def test_unknown_names_are_our_own_mistake():
    with pytest.raises(KeyError):
        settings.get("BGB_UNKNOWN")


def test_safe_clamp_bounds(monkeypatch):
    assert settings.safe_clamp_bounds() is None
    monkeypatch.setenv("BGB_SAFE_CLAMP_MAX", "3")
    assert settings.safe_clamp_bounds() is None
    monkeypatch.setenv("BGB_SAFE_CLAMP", "1")
    assert settings.safe_clamp_bounds() == (-10.0, 3.0)
    monkeypatch.setenv("BGB_SAFE_CLAMP_MIN", "3")
    with pytest.raises(SettingError, match="`BGB_SAFE_CLAMP_MIN` must be below `BGB_SAFE_CLAMP_MAX`: got 3.0 and 3.0"):
        settings.safe_clamp_bounds()


@pytest.mark.parametrize("name", ["BGB_NAN_DEBUG", "BGB_DEBUG_FINITE", "BGB_SMOKE_TEST"])
def test_checks_finite_is_any_of_three(name, monkeypatch):
    assert settings.checks_finite() is False
    monkeypatch.setenv(name, "1")
    assert settings.checks_finite() is True


def test_a_forced_backend_is_used_or_refused(monkeypatch):
    """STABLEKERN_BACKEND reaches the choice; a backend that an op does not have is an error, not a fall-back."""
    import torch

    from stablekern import _registry, focal_loss
    from stablekern.errors import BackendUnavailableError

    x = torch.zeros(3)
    monkeypatch.setenv("STABLEKERN_BACKEND", "torch")
    assert _registry.backend_for("focal_loss", x, x, 0.5, 2.0, 1.0) == "torch"
    monkeypatch.setenv("STABLEKERN_BACKEND", "cuda")
    with pytest.raises(BackendUnavailableError, match="backend `cuda` is forced and cannot run"):
        focal_loss(x, x)
    monkeypatch.setenv("STABLEKERN_BACKEND", "fastest")
    with pytest.raises(SettingError, match="`STABLEKERN_BACKEND` must be one of native, torch, triton, cuda"):
        focal_loss(x, x)
