"""Two lines that no op shows: what `import stablekern` adds to `import torch`, and the first native build."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile

from bench.store import append, stamp


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
    with tempfile.TemporaryDirectory() as cache:
        build = seconds(
            "from stablekern import _load; _load.native()", STABLEKERN_CACHE_DIR=os.path.join(cache, "kernels")
        )
        again = seconds(
            "from stablekern import _load; _load.native()", STABLEKERN_CACHE_DIR=os.path.join(cache, "kernels")
        )
    result = {
        "op": "startup", "import_added_s": round(added, 3), "first_build_s": round(build, 1),
        "cached_load_s": round(again, 2),
        **stamp("cpu"),
    }  # fmt: skip
    print(
        f"import adds {added:.3f} s to torch's; first build {build:.1f} s; cached load {again:.2f} s"
        " (both with torch's import)"
    )
    if options.save:
        append(result)


if __name__ == "__main__":
    main()
