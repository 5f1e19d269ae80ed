"""Seconds of CPU per second of EEG while a detector streams, on one thread: `python -m bench.streaming [--save]`."""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from bench.store import append, stamp
from stablekern.nn import SeizureDetector

RATE = 256


def streamed(model: SeizureDetector, seconds: int, chunk: int, **window: int) -> list[float]:
    """The time of each `push` of `chunk` samples."""
    stream = model.stream(**window)
    signal = torch.randn(19, seconds * RATE)
    taken = []
    for piece in signal.split(chunk, dim=1):
        start = time.perf_counter()
        stream.push(piece)
        taken.append(time.perf_counter() - start)
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="small", choices=["nano", "small", "v3"])
    parser.add_argument("--seconds", type=int, default=240, help="of signal")
    parser.add_argument("--chunk", type=int, default=64, help="samples per push")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"causal": {}, "windows of 60 s every 10 s": {"window": 60 * RATE, "hop": 10 * RATE}}
    for kind, window in kinds.items():
        torch.manual_seed(0)
        model = SeizureDetector.from_preset(options.preset, causal=not window)
        streamed(model, 61 if window else 2, options.chunk, **window)
        times = streamed(model, options.seconds, options.chunk, **window)
        stream = model.stream(**window)
        result = {
            "op": "streaming", "case": f"{options.preset}, {kind}", "direction": "push",
            "chunk": options.chunk, "latency_s": stream.latency / RATE,
            "share_of_real_time": round(sum(times) / options.seconds, 4),
            "ms_median": round(1e3 * statistics.median(times), 3), "ms_largest": round(1e3 * max(times), 1),
            **stamp("cpu"),
        }  # fmt: skip
        print(
            f"{result['case']}: {100 * result['share_of_real_time']:.1f} % of real time, push {result['ms_median']} ms "
            f"(largest {result['ms_largest']} ms), latency {result['latency_s']:g} s"
        )
        if options.save:
            append(result)


if __name__ == "__main__":
    main()
