"""The packages of the extra `eeg`, imported only when a function needs them."""

from __future__ import annotations

import importlib
from types import ModuleType

from stablekern.errors import message


def extra(where: str, module: str) -> ModuleType:
    """Import `module`, or say which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as cause:
        rule = f"needs `{module}`, which comes with the extra `eeg`: pip install 'stablekern[eeg]'"
        raise ImportError(message(where, rule, repr(str(cause)))) from cause
