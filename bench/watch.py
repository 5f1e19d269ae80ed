"""What `health.watch` costs while it only counts: `python -m bench.watch [--seconds 20] [--save]`.

The same training step with and without the watch, interleaved in one run: the nano detector, and a transformer encoder
of 4 layers, d = 256. A sample is ten steps, under one watch: a run has thousands. The overhead is the ratio of the
medians less 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

from bench import model as detector
from bench.store import append, stamp
from bench.timing import interleave, keep_freed_memory
from stablekern.health import watch

GATE = 0.03
_BATCH, _LENGTH, _WIDTH = 8, 128, 256
_STEPS = 10


def transformer() -> tuple[nn.Module, Callable[[], None]]:
    """An encoder of 4 layers, d = 256, trained by AdamW with clipping."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(_WIDTH, 8, 4 * _WIDTH, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(_WIDTH, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    x, y = torch.randn(_BATCH, _LENGTH, _WIDTH), torch.randint(0, 10, (_BATCH, _LENGTH))

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return model, step


def repeated(step: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(_STEPS):
            step()

    return run


def watched(model: nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    """The steps under a watch that is entered before the first and left after the last."""
    steps = repeated(step)

    def run() -> None:
        with watch(model):
            steps()

    return run


CASES = {
    f"transformer, 4 layers, d={_WIDTH}, {_BATCH}x{_LENGTH}": transformer,
    "detector, nano, B=2, L=2048": lambda: detector.trained("nano", 2, 2048),
}


def per_step(seconds: float) -> float:
    """Milliseconds."""
    return round(1e3 * seconds / _STEPS, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each case")
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    parser.add_argument("--check", action="store_true", help="exit 1 if a case costs more than the gate")
    options = parser.parse_args()
    keep_freed_memory()
    missed = 0
    for name, made in CASES.items():
        model, step = made()
        times = interleave(
            {"plain": repeated(step), "watched": watched(model, step)}, seconds=options.seconds, device="cpu"
        )
        plain, under = times["plain"], times["watched"]
        overhead = under.median / plain.median - 1
        result = {
            "op": "watch", "case": name, "direction": "training step",
            "ms": per_step(under.median), "plain_ms": per_step(plain.median),
            "ms_best": per_step(under.best), "plain_ms_best": per_step(plain.best),
            "overhead": round(overhead, 4), "overhead_best": round(under.best / plain.best - 1, 4), "gate": GATE,
            "samples": len(under.samples), "busy_samples": plain.busy + under.busy, **stamp("cpu"),
        }  # fmt: skip
        print(
            f"{name}: {result['ms']} ms under watch, {result['plain_ms']} ms without: {overhead:+.1%} "
            f"(best times {result['overhead_best']:+.1%}, gate {GATE:.0%}, {result['samples']} samples)"
        )
        missed += overhead > GATE
        if options.save:
            append(result)
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
