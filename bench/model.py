"""One training step of a detector preset, forward, backward and optimizer: `python -m bench.model [--preset nano]`.

With `--parts` the time of each part instead, with the kernels and with the torch backend of every op, and the largest
resident set.
"""

from __future__ import annotations

import argparse
import contextlib
import resource
from collections.abc import Callable

import torch

import stablekern
from bench.store import append, stamp
from bench.timing import interleave, keep_freed_memory
from stablekern.eeg.timing import parts_of_a_step
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


def parts(options: argparse.Namespace, length: int) -> None:
    """Print, and keep if asked to, the seconds of each part on both backends."""
    found = {}
    for backend in ("native", "torch"):
        torch.manual_seed(0)
        model = SeizureDetector.from_preset(options.preset)
        with stablekern.use_backend("torch") if backend == "torch" else contextlib.nullcontext():
            found[backend] = parts_of_a_step(model, batch_size=options.batch, samples=length, steps=options.steps)
        found[f"{backend}_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    sums = {
        backend: sum(p["forward"] + p["backward"] for p in found[backend] if p["part"] != "encoder")
        for backend in ("native", "torch")
    }
    result = {
        "op": "detector_parts", "case": f"{options.preset}, B={options.batch}, L={length}",
        "direction": "training step", **found, "ratio_without_encoder": round(sums["torch"] / sums["native"], 2),
        **stamp("cpu"),
    }  # fmt: skip
    print(f"{result['case']}: without the encoder {result['ratio_without_encoder']}x the torch backend")
    for ours, theirs in zip(found["native"], found["torch"], strict=True):
        row = [1e3 * part[way] for part in (ours, theirs) for way in ("forward", "backward")]
        print(f"  {ours['part']:<22}" + "".join(f"{value:>10.1f}" for value in row) + "  ms")
    print(
        f"  largest resident set {found['native_peak_gib']} GiB, "
        f"with the torch backend after it {found['torch_peak_gib']} GiB"
    )
    if options.save:
        append(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="nano", choices=["nano", "small", "v3"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lengths", default="2048,15360", help="samples per window at 256 Hz, comma-separated")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    parser.add_argument("--parts", action="store_true", help="time per part, against the torch backend")
    parser.add_argument("--steps", type=int, default=2, help="with --parts")
    options = parser.parse_args()
    keep_freed_memory()
    if options.parts:
        for length in map(int, options.lengths.split(",")):
            parts(options, length)
        return
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
