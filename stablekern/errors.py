"""The exceptions of the package, and the one form that their texts take.

Misuse (a wrong shape, type or option) raises `ValueError` or `TypeError`. Data that cannot be worked with does not
raise: an `*_ex` op reports it per item. What is left, and needs a name of its own, is here.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailableError",
    "BuildError",
    "CovarianceError",
    "NonFiniteError",
    "RecordingError",
    "SettingError",
    "StablekernError",
    "SwapError",
    "TrainingStoppedError",
    "message",
]


class StablekernError(Exception):
    """Base of every exception that only this package raises."""


class BackendUnavailableError(StablekernError, RuntimeError):
    """A backend was asked for by name and cannot run; the text says why."""


class BuildError(StablekernError, RuntimeError):
    """The native extension could not be compiled or loaded; the text holds the compiler's last lines."""


class CovarianceError(StablekernError, ArithmeticError):
    """A covariance without its trace, or with a norm that none has, where the caller asked for a check."""


class NonFiniteError(StablekernError, FloatingPointError):
    """A NaN or an infinity where the caller asked for an exception (`policy="raise"`, `assert_finite`)."""


class SettingError(StablekernError, ValueError):
    """An environment variable holds a value outside its legal ones; the text lists them."""


class SwapError(StablekernError, ValueError):
    """`swap` does not know the target, or not in this version; the text says what it knows."""


class TrainingStoppedError(StablekernError, RuntimeError):
    """`TrainingGuard` gave up; the text is its report."""


class RecordingError(StablekernError, ValueError):
    """A recording cannot be used: missing, truncated, not EDF, or without the channels that are needed."""


def message(where: str, rule: str, *got: object) -> str:
    """`stablekern.<where>: <rule>: got <what came>`, the form of every error text in the package."""
    text = f"stablekern.{where}: {rule}"
    return f"{text}: got {' and '.join(str(item) for item in got)}" if got else text
