"""One training step of a detector preset, forward, backward and optimizer: `python -m bench.model [--preset nano]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch

import stablekern
from bench.store import append, stamp
from bench.timing import interleave, keep_freed_memory
from stablekern.nn import SeizureDetector
from stablekern.optim import ComplexAdamW, GradGuard


def trained(preset: str, batch: int, length: int) -> tuple[SeizureDetector, Callable[[], None]]:
    """A detector, and one step of its training."""
    torch.manual_seed(0)
    model = SeizureDetector.from_preset(preset)
    optimizer = ComplexAdamW(model.parameters(), lr=1e-4)
    guard = GradGuard(model, 1.0)
    x, y = torch.randn(batch, 19, length), (torch.rand(batch, length) < 0.3).float()

    def run() -> None:
        optimizer.zero_grad()
        stablekern.focal_loss(model(x), y, reduction="mean").backward()
        guard()
        optimizer.step(found_inf=guard.found_inf)

    return model, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="nano", choices=["nano", "small", "v3"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lengths", default="2048,15360", help="samples per window at 256 Hz, comma-separated")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    options = parser.parse_args()
    keep_freed_memory()
    for length in map(int, options.lengths.split(",")):
        _, run = trained(options.preset, options.batch, length)
        times = interleave({"step": run}, seconds=options.seconds, device="cpu")["step"]
        result = {
            "op": "detector", "case": f"{options.preset}, B={options.batch}, L={length}", "direction": "training step",
            "ms": round(1e3 * times.median, 1), "ms_best": round(1e3 * times.best, 1), "samples": len(times.samples),
            "busy_samples": times.busy, **stamp("cpu"),
        }  # fmt: skip
        print(f"{result['case']}: {result['ms']} ms a step (best {result['ms_best']}), {times.busy} busy samples")
        if options.save:
            append(result)


if __name__ == "__main__":
    main()
