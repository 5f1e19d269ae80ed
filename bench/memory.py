"""Peak memory of ops and of their baselines: `python -m bench.memory [--op selective_scan] [--save]`.

Of each call of a case, what the resident set of the process rose to above what it was before (Linux: VmHWM after
clearing the mark), inputs not counted. One call warms up; freed memory is given back to the system in between.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path

from bench.cases import Case, all_cases
from bench.run import call
from bench.store import append, stamp

_SELF = Path("/proc/self")


def _resident(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", (_SELF / "status").read_text())[1])  # type: ignore[index]


def peak(function: Callable[[], object]) -> int:
    """Bytes that a call of `function` needs at once."""
    function()
    ctypes.CDLL(None).malloc_trim(0)
    (_SELF / "clear_refs").write_text("5")  # the high-water mark starts again at the present size
    before = _resident("VmRSS")
    function()
    return max(_resident("VmHWM") - before, 0)


def measure(case: Case, direction: str) -> dict:
    inputs = case.inputs("cpu")
    backward = direction == "fwd+bwd"
    ours, theirs = (peak(call(function, inputs, case, backward=backward)) for function in (case.ours, case.baseline))
    return {
        "op": "memory", "case": f"{case.op} {case.name}", "direction": direction, "baseline": case.baseline_name,
        "peak_mib": round(ours / 2**20, 1), "baseline_peak_mib": round(theirs / 2**20, 1), **stamp("cpu"),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", help="comma-separated ops; all by default")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    options = parser.parse_args()
    for case in all_cases():
        if options.op and case.op not in options.op.split(","):
            continue
        for direction in case.directions:
            result = measure(case, direction)
            print(
                f"{case.op:<16} {case.name:<28} {direction:<8} {result['peak_mib']:8.1f} MiB,"
                f" {case.baseline_name}: {result['baseline_peak_mib']:.1f} MiB",
                flush=True,
            )
            if options.save:
                append(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
