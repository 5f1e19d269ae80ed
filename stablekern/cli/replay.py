"""`stablekern doctor --replay FILE --model module:function`: data, weights or op."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stablekern.cli import _json
from stablekern.health import Replay
from stablekern.health import replay as do_again

__all__ = ["load_function", "main", "run", "text"]


def load_function(target: str) -> Callable[..., Any]:
    """The function `name` of `module:name`; modules of the working directory are found. `ValueError` if there is none.

    What the import itself raises comes through.
    """
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise ValueError(f"`{target}` must be module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0] and error.name != module_name:
            raise
        raise ValueError(f"there is no module `{module_name}`") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(f"`{module_name}` has no function `{name}`")
    return found


def text(found: Replay) -> str:
    """The verdict and what it rests on, for people."""

    def outcome(run: Any) -> str:
        if run is None:
            return "not tried: the file holds no weights"
        if run.finite:
            return f"finite, loss {run.loss:.4g}"
        if run.error is not None:
            return f"raised: {run.error}"
        bad = f", gradients not finite: {', '.join(run.bad_gradients)}" if run.bad_gradients else ""
        return f"loss {run.loss:.4g}{bad}" + (f"\n{'':18}first: {run.fault}" if run.fault else "")

    lines = [
        f"step {found.step}: {found.verdict}",
        f"  {found.reason}",
        "",
        f"  fresh weights   {outcome(found.fresh)}",
        f"  weights then    {outcome(found.current)}",
        f"  batch           {'not finite: ' + '; '.join(found.bad_inputs) if found.bad_inputs else 'finite'}",
    ]
    if found.current is not None:
        state = f"not finite: {len(found.bad_weights)} tensors" if found.bad_weights else "finite"
        lines.append(f"  weights         {state}")
    return "\n".join(lines)


def run(path: Path | None, target: str | None, *, as_json: bool = False) -> int:
    """Print the verdict; returns the exit code: 0 if the step was done again, whatever came out, 2 if it could not."""
    try:
        if path is None or target is None:
            raise ValueError("--replay FILE and --model module:function go together")
        found = do_again(path, load_function(target))
    except (ValueError, TypeError, OSError) as error:
        print(f"stablekern doctor: {error}", file=sys.stderr)
        return 2
    print(_json.dumps(asdict(found)) if as_json else text(found))
    return 0


def main(arguments: Sequence[str]) -> int:
    """The same from arguments behind `doctor`, where the parser of the extra `cli` is not installed."""
    parser = argparse.ArgumentParser(prog="stablekern doctor", allow_abbrev=False)
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--model", metavar="MODULE:FUNCTION")
    parser.add_argument("--json", action="store_true")
    try:
        given = parser.parse_args(arguments)
    except SystemExit as end:  # it has printed what was wrong
        return int(end.code or 0)
    return run(given.replay, given.model, as_json=given.json)
