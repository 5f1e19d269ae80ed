"""The command `stablekern`, also `python -m stablekern`: `doctor` on any installation, the rest with the extra `cli`.

With `--json` stdout holds JSON alone; progress and warnings always go to stderr. Exit codes: 0 done, 1 something has to
be put right before the package can run, 2 wrong arguments, a bad file or a missing extra, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from stablekern.cli import doctor

__all__ = ["EXTRAS", "main", "missing_extras"]

# The extras of each command, and the modules that stand for them.
_CLI, _EEG = ("typer", "rich", "matplotlib"), ("mne", "edfio", "timescoring")
EXTRAS = {command: {"cli": _CLI, "eeg": _EEG} for command in ("demo", "train", "detect")} | {
    command: {"cli": _CLI} for command in ("zoo", "bench")
}
_USAGE = """usage: stablekern COMMAND [--help]

  doctor [--json] [--no-build]   what this machine can run, and why not more; needs no extras
  doctor --replay FILE --model module:function [--json]
                                 do a bad step again: data, weights or op
  doctor --watch module:function [--steps N] [--html FILE] [--json]
                                 run a training function: the first non-finite tensor, and why
  zoo [--json] [--html FILE]     why training goes NaN: causes, published fixes and ours, counted
  bench [--op OP] [--plots DIR] [--compare A B] [--json]
                                 time the ops against what people use instead
  demo                           train the smallest detector on a real recording, in minutes
  train --config FILE            train a detector on a folder of recordings with annotations
  detect FILE --checkpoint FILE  find the events in a recording

python -m stablekern is the same. The usual commands need pip install 'stablekern[cli,eeg]'."""


def missing_extras(command: str) -> str | None:
    """None, or one line that says what to install before `command` can run."""
    missing = []
    for module in (name for names in EXTRAS[command].values() for name in names):
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(module)
    if not missing:
        return None
    install = f"pip install 'stablekern[{','.join(EXTRAS[command])}]'"
    return f"stablekern {command} needs the extras: {install} (missing: {', '.join(missing)})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; `sys.argv` if None) and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        importlib.import_module("typer")
    except ImportError:
        return _without_typer(given)
    from stablekern.cli.app import app

    try:
        app(given, prog_name="stablekern")
    except SystemExit as end:  # the parser's way to return
        return int(end.code or 0)
    return 0


def _without_typer(given: list[str]) -> int:
    """The base installation: `doctor`, and for the rest what is missing."""
    command, flags = (given[0], set(given[1:])) if given else ("", set())
    if command in EXTRAS:
        print(missing_extras(command), file=sys.stderr)
        return 2
    if command == "doctor" and flags & {"--replay", "--watch"}:
        module = importlib.import_module(f"stablekern.cli.{'replay' if '--replay' in flags else 'watch'}")
        return module.main(given[1:])
    if command == "doctor" and flags <= {"--json", "--no-build"}:
        return doctor.run(as_json="--json" in flags, build="--no-build" not in flags)
    wanted = bool({command, *flags} & {"--help", "-h"})
    print(_USAGE, file=sys.stdout if wanted else sys.stderr)
    return 0 if wanted else 2
