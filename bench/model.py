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
    """Print, and keep if asked to, the seconds of each part on each backend, and the largest resident set of each."""
    backends, found = options.backends.split(","), {}
    for backend in backends:
        torch.manual_seed(0)
        model = SeizureDetector.from_preset(options.preset, recompute=options.recompute)
        with stablekern.use_backend("torch") if backend == "torch" else contextlib.nullcontext():
            found[f"{backend}_parts"] = parts_of_a_step(
                model, batch_size=options.batch, samples=length, steps=options.steps
            )
        # Of the process so far: a backend that needs less than the one before it shows that one's.
        found[f"{backend}_peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    sums = {
        backend: sum(p["forward"] + p["backward"] for p in found[f"{backend}_parts"] if p["part"] != "encoder")
        for backend in backends
    }
    ratio = round(sums["torch"] / sums["native"], 2) if len(sums) == 2 else None
    result = {
        "op": "detector_parts",
        "case": f"{options.preset}, B={options.batch}, L={length}{', recomputing' if options.recompute else ''}",
        "direction": "training step", "baseline": "torch" if ratio else "", **found, "batch": options.batch,
        "recompute": options.recompute, "ratio_without_encoder": ratio, **stamp("cpu"),
    }  # fmt: skip
    print(f"{result['case']}: without the encoder {ratio or '(not run)'}x the torch backend")
    for rows in zip(*(found[f"{backend}_parts"] for backend in backends), strict=True):
        values = [1e3 * part[way] for part in rows for way in ("forward", "backward")]
        print(f"  {rows[0]['part']:<22}" + "".join(f"{value:>10.1f}" for value in values) + "  ms")
    peaks = ", ".join(f"{found[f'{backend}_peak_gib']} GiB ({backend})" for backend in backends)
    print(f"  largest resident set, one backend after the other: {peaks}")
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
    parser.add_argument(
        "--backends", default="native,torch", choices=["native", "torch", "native,torch"], help="with --parts"
    )
    parser.add_argument("--recompute", action="store_true", help="with --parts: the Mamba layers run twice")
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
