"""JSON that every parser takes: what is not finite is null."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["dumps"]


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def dumps(value: Any) -> str:
    return json.dumps(_strict(value), indent=2, allow_nan=False)
