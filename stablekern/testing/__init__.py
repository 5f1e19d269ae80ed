"""The suite of the ops, on this machine: `python -m stablekern.testing [--op eigh,cg] [--json | --markdown]`.

Every op on every backend that can run here, on the samples of its spec: errors against float64 in units of the
tolerance, and derivatives against differences. A table, or JSON, or Markdown for a bug report; in a few minutes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

__all__ = ["all_specs"]


def all_specs() -> tuple[Any, ...]:
    """The specs that the tests are driven by: `tests/specs` of a checkout, installed as `stablekern.testing.specs`."""
    name, root = f"{__name__}.specs", Path(__file__).parents[2]
    folder = root / "tests" / "specs"
    if name not in sys.modules and (root / "pyproject.toml").is_file() and folder.is_dir():
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(sys.modules[name])  # type: ignore[union-attr]
    return importlib.import_module(name).all_specs()
