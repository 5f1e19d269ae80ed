"""Every environment variable that the package reads: validated, listed in errors, read when it is used.

`get(name)` parses the variable on each call, so a change of `os.environ` takes effect at the next use. A value that
is not legal raises `SettingError` with the legal ones; an unset or empty variable has its default.

The `BGB_*` names and `SEIZURE_MAMBA_FORCE_FALLBACK` are those that users of the dual-stream EEG detector already
set; they mean here what they were documented to mean there.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stablekern.errors import SettingError, message

__all__ = ["SETTINGS", "Setting", "get"]

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")


def _flag(text: str) -> bool:
    if text.lower() in _TRUE:
        return True
    if text.lower() in _FALSE:
        return False
    raise ValueError(text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _megabytes(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _finite(text: str) -> float:
    value = float(text)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(text)
    return value


def _backend(text: str) -> str:
    if text not in ("native", "torch", "triton", "cuda"):
        raise ValueError(text)
    return text


_LEGAL: dict[Callable[[str], Any], str] = {
    _flag: f"one of {', '.join(_TRUE + _FALSE)}",
    _count: "a whole number >= 1",
    _megabytes: "a whole number >= 0",
    _finite: "a finite number",
    _backend: "one of native, torch, triton, cuda",
    str: "a text",
}


@dataclass(frozen=True)
class Setting:
    """One environment variable: how its text is read, what it is when unset, and what it does."""

    name: str
    parse: Callable[[str], Any]
    default: Any
    effect: str

    @property
    def legal(self) -> str:
        return _LEGAL[self.parse]


_ALL = (
    Setting("STABLEKERN_BACKEND", _backend, None, "force one backend for every op; a missing one raises"),
    Setting("STABLEKERN_NATIVE", _flag, True, "build and use the native CPU kernels"),
    Setting("STABLEKERN_CACHE_DIR", str, None, "where compiled kernels are kept; default ~/.cache/stablekern"),
    Setting("STABLEKERN_MARCH", str, "native", "instruction set that the native kernels are compiled for (-march)"),
    Setting("STABLEKERN_POOL_MB", _megabytes, 512, "most memory kept for the next results of CPU kernels; 0: none"),
    Setting("SEIZURE_MAMBA_FORCE_FALLBACK", _flag, False, "the Mamba layers replace their scan by D * conv1d(x)"),
    Setting(
        "BGB_NAN_DEBUG", _flag, False, "check the detector's intermediate tensors; raise at the first non-finite one"
    ),
    Setting("BGB_DEBUG_FINITE", _flag, False, "same as BGB_NAN_DEBUG"),
    Setting("BGB_ANOMALY_DETECT", _flag, False, "run training steps under autograd's anomaly detection"),
    Setting("BGB_SAFE_CLAMP", _flag, False, "replace non-finite features of the detector by 0 and clamp them"),
    Setting("BGB_SAFE_CLAMP_MIN", _finite, -10.0, "lower bound of BGB_SAFE_CLAMP"),
    Setting("BGB_SAFE_CLAMP_MAX", _finite, 10.0, "upper bound of BGB_SAFE_CLAMP"),
    Setting("BGB_SANITIZE_GRADS", _flag, False, "set gradient tensors with a non-finite entry to 0 before clipping"),
    Setting("BGB_SKIP_OPT_STEP_ON_NAN", _flag, False, "skip the optimizer step where a gradient is not finite"),
    Setting(
        "BGB_LIMIT_FILES", _count, None, "use at most so many recordings for training, a fifth of it for validation"
    ),
    Setting(
        "BGB_SMOKE_TEST", _flag, False, "3 recordings, pos_weight 1, no balancing, and the checks of BGB_NAN_DEBUG"
    ),
)
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in _ALL}


def get(name: str) -> Any:
    """The present value of a variable in `SETTINGS`, parsed."""
    setting = SETTINGS[name]
    text = os.environ.get(name, "").strip()
    if not text:
        return setting.default
    try:
        return setting.parse(text)
    except ValueError:
        raise SettingError(message("settings", f"`{name}` must be {setting.legal}", repr(text))) from None


def safe_clamp_bounds() -> tuple[float, float] | None:
    """(low, high) when BGB_SAFE_CLAMP is on, else None."""
    if not get("BGB_SAFE_CLAMP"):
        return None
    low, high = get("BGB_SAFE_CLAMP_MIN"), get("BGB_SAFE_CLAMP_MAX")
    if not low < high:
        raise SettingError(message("settings", "`BGB_SAFE_CLAMP_MIN` must be below `BGB_SAFE_CLAMP_MAX`", low, high))
    return low, high


def checks_finite() -> bool:
    """Whether any of the three variables that switch `assert_finite` on is set."""
    return get("BGB_NAN_DEBUG") or get("BGB_DEBUG_FINITE") or get("BGB_SMOKE_TEST")
