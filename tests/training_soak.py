"""Train the smallest detector for 10 000 steps on data with faults: `python tests/training_soak.py [--steps 10000]`.

Every window is cut from the recording of the package with discharges of known times, and half of them carry a fault
that real recordings have. Nothing is clamped, no environment variable is set. After every step the logits, the loss,
the gradients and the weights are checked; one value that is not finite ends the run with an error.

| fault | what the window gets |
|---|---|
| dead | 1 to 10 electrodes that are exactly zero |
| burst | half a second of 121 spreads on 1 to 19 electrodes |
| constant | every sample of the window the same |
| clusters | two groups of electrodes, the members of each identical: a disconnected graph, repeated eigenvalues |
| identical | all electrodes the same signal: every edge ties |
| nan | NaN samples in 1 to 5 raw channels, which the reader must replace by interpolation |

Step number i draws its windows from (seed, i) alone, and the state is kept in runs/soak every 100 steps, so a run that
was stopped goes on. What came is in bench/results/soak/training.jsonl, a line per 100 steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from stablekern import focal_loss, training
from stablekern._files import replaced
from stablekern.eeg import CHANNELS, add_spike_wave, draw_events, from_arrays, load_sample, prepare
from stablekern.nn import SeizureDetector
from stablekern.optim import GradGuard

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "soak" / "training.jsonl"
STATE = ROOT / "runs" / "soak" / "training.pt"
FAULTS = ("dead", "burst", "constant", "clusters", "identical", "nan")
SIGMA, LENGTH, BATCH, EVERY = 121.0, 1024, 4, 100


@functools.cache
def _recordings():
    """The raw recording with discharges, and the prepared one."""
    raw = load_sample()
    raw, _ = add_spike_wave(raw, seed=0, events=draw_events(raw.seconds, seed=0))
    return raw, prepare(raw)


def window(generator: np.random.Generator, fault: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(19, LENGTH) and (LENGTH,): a window with one fault, or none."""
    raw, ready = _recordings()
    start = int(generator.integers(ready.samples - LENGTH))
    data, labels = ready.window(start, start + LENGTH)
    some = generator.permutation(19)[: int(generator.integers(1, 11))]
    if fault == "dead":
        data[some] = 0
    elif fault == "burst":
        at = int(generator.integers(LENGTH - 128))
        data[some, at : at + 128] = SIGMA * generator.choice([-1, 1])
    elif fault == "constant":
        data[:] = generator.choice([0.0, 1.0, -10.0])
    elif fault == "clusters":
        data[some], data[np.setdiff1d(np.arange(19), some)] = data[some[0]], data[np.setdiff1d(np.arange(19), some)[0]]
    elif fault == "identical":
        data[:] = data[0]
    elif fault == "nan":
        broken = raw.data[:, start : start + LENGTH].astype(np.float64)
        broken[some[:5], :: int(generator.integers(1, 200))] = np.nan
        data = prepare(from_arrays(list(broken), CHANNELS, raw.sample_rate)).data
    return data, labels


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    generator = np.random.default_rng([2027, step])
    faults = [str(generator.choice(FAULTS)) if generator.random() < 0.5 else None for _ in range(BATCH)]
    pairs = [window(generator, fault) for fault in faults]
    data, labels = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    return data, labels, [fault or "none" for fault in faults]


class Soak:
    """A model on its way through the steps."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = SeizureDetector.from_preset("nano")
        self.optimizer = training.default_optimizer(self.model, learning_rate=1e-3)
        self.guard = GradGuard(self.model, 1.0)
        self.done = 0
        self.bad_logits = 0

    def step(self) -> tuple[training.StepResult, list[str]]:
        data, labels, faults = batch(self.done + 1)

        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            self.bad_logits += int((~logits.detach().isfinite()).sum())
            return focal_loss(logits, labels, reduction="mean")

        result = training.training_step(
            self.model, data, labels, loss=loss, optimizer=self.optimizer, guard=self.guard, step=self.done + 1
        )
        if not result.finite or self.bad_logits:
            raise AssertionError(f"step {self.done + 1}, faults {faults}: {result}, {self.bad_logits} logits")
        self.done += 1
        return result, faults

    def save(self) -> None:
        STATE.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "done": self.done,
            "random": torch.get_rng_state(),
        }
        with replaced(STATE) as partial:
            torch.save(state, partial)

    def load(self) -> None:
        state = torch.load(STATE, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]
        torch.set_rng_state(state["random"])


def run(steps: int) -> None:
    """Go on to `steps`; what stands in the results beyond the saved state is done again."""
    soak = Soak()
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    if STATE.exists() and lines:
        soak.load()
    lines = [line for line in lines if line["step"] <= soak.done]
    while soak.done < steps:
        start, losses, norms, faults = time.monotonic(), [], [], Counter()
        for _ in range(min(EVERY, steps - soak.done)):
            result, seen = soak.step()
            losses.append(result.loss)
            norms.append(result.grad_norm)
            faults.update(seen)
        lines.append(
            {
                "step": soak.done,
                "loss": round(float(np.mean(losses)), 6),
                "grad_norm_median": round(float(np.median(norms)), 6),
                "grad_norm_largest": round(float(np.max(norms)), 6),
                "not_finite": 0,  # anything else has raised
                "windows": dict(sorted(faults.items())),
                "seconds": round(time.monotonic() - start, 2),
            }
        )
        with replaced(RESULTS) as partial:
            partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        soak.save()
        sys.stderr.write(f"\rtraining: {soak.done}/{steps} loss {lines[-1]['loss']:.4f}")
    sys.stderr.write("\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    torch.set_num_threads(1)
    run(parser.parse_args().steps)
