"""What no op shows: what `import stablekern` adds to `import torch`, and what the first call of an op compiles."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

from bench.store import append, stamp

OPS = ("eigh", "selective_scan", None)  # the first use of each builds a part of the library; None: all parts


def seconds(code: str, **environment: str) -> float:
    """Wall time of a fresh interpreter that runs `code`, as measured inside it (interpreter start excluded)."""
    program = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, **environment}
    )
    return float(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    options = parser.parse_args()
    pairs = [(seconds("import torch"), seconds("import torch, stablekern")) for _ in range(7)]
    added = statistics.median(ours for _, ours in pairs) - statistics.median(torch for torch, _ in pairs)
    cold, warm = {}, 0.0
    for op in OPS:
        with tempfile.TemporaryDirectory() as folder:
            code = f"from stablekern import _load; assert _load.native_reason({op!r}) is None"
            environment = {"STABLEKERN_CACHE_DIR": os.path.join(folder, "kernels"), "STABLEKERN_NATIVE": "1"}
            cold[op or "all"] = round(seconds(code, **environment), 1)
            warm = seconds(code, **environment)
    result = {
        "op": "startup", "import_added_s": round(added, 3), "first_build_s": cold, "cached_load_s": round(warm, 2),
        **stamp("cpu"),
    }  # fmt: skip
    builds = ", ".join(f"{op} {taken:.1f} s" for op, taken in cold.items())
    print(
        f"import adds {added:.3f} s to torch's; first build: {builds}; cached load {warm:.2f} s (with torch's import)"
    )
    if options.save:
        append(result)


if __name__ == "__main__":
    main()
