"""The demo's outcome on three seeds, one result line each: `python -m bench.demo`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile

from bench.store import append, stamp

KEPT = (
    "seed",
    "steps",
    "auroc",
    "loss",
    "grad_norm",
    "not_finite",
    "eigh",
    "seconds",
    "cpu_seconds",
    "seconds_per_step",
)


def main() -> None:
    for seed in range(3):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-m", "stablekern", "demo", "--json", "--seed", str(seed), "--out", out]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        summary = json.loads(run.stdout)
        result = {"op": "demo", "case": f"seed {seed}", **{key: summary[key] for key in KEPT}, **stamp("cpu")}
        sys.stdout.write(f"seed {seed}: AUROC {result['auroc']:.3f} in {result['seconds']:.0f} s\n")
        append(result)


if __name__ == "__main__":
    main()
