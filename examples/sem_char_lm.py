"""Train a small complex-valued language model on seven sonnets, character by character, with Langevin noise.

A token is a complex vector. Each layer adds what a selective scan remembers of the past and then turns the token
unitarily (a Cayley step of a learned graph Laplacian); the next character's probabilities are squared amplitudes (Born
rule). `ComplexAdamW` runs with a temperature, so every step adds noise. Printed: the loss beside the unigram entropy
of the text (what a model without context can reach), whether every loss and gradient was finite, and by how much the
unitary part changed a norm at most.

    python examples/sem_char_lm.py [--steps 300] [--sample 200]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import stablekern.nn as snn
from stablekern.optim import ComplexAdamW, GradGuard, parameter_groups

TEXT = Path(__file__).resolve().parent / "sonnets.txt"
DIM, STATES, LAYERS, DT = 128, 64, 2, 0.1
BATCH, LENGTH = 16, 64
LEARNING_RATE, TEMPERATURE = 5e-3, 1e-7


class CharacterModel(nn.Module):
    """(b, l) characters -> (b, l, vocab) logits of the next one; notes how far the unitary layers are from it."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(vocab, DIM, dtype=torch.complex64))
        self.norms = nn.ModuleList(snn.ComplexRMSNorm(DIM) for _ in range(LAYERS))
        self.scans = nn.ModuleList(snn.ComplexSelectiveScan(DIM, STATES, horizon=float(LENGTH)) for _ in range(LAYERS))
        self.propagators = nn.ModuleList(snn.CayleyPropagator(DIM, DT) for _ in range(LAYERS))
        self.last_norm = snn.ComplexRMSNorm(DIM)
        self.head = snn.BornHead(DIM, vocab)
        self.drift = 0.0

    def forward(self, characters: Tensor) -> Tensor:
        psi = self.embedding[characters]
        for norm, scan, propagator in zip(self.norms, self.scans, self.propagators, strict=True):
            psi = psi + scan(norm(psi))
            before, psi = psi, propagator(psi)
            self.drift = max(self.drift, drift(before, psi))
        return self.head(self.last_norm(psi))


@torch.no_grad()
def drift(before: Tensor, after: Tensor) -> float:
    """The largest relative change of a token's norm."""
    old, new = (torch.linalg.vector_norm(psi.to(torch.complex128), dim=-1) for psi in (before, after))
    return float((new / old - 1).abs().max())


def entropy(characters: Tensor) -> float:
    """Of single characters, in nats."""
    share = torch.bincount(characters).double() / characters.numel()
    return float(torch.special.entr(share).sum())


def loss_of(model: CharacterModel, characters: Tensor, starts: Tensor) -> Tensor:
    windows = characters[starts[:, None] + torch.arange(LENGTH + 1)]
    logits = model(windows[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def write(model: CharacterModel, alphabet: str, start: str, count: int) -> str:
    """The model's most likely continuation, a character at a time."""
    text = start
    with torch.no_grad():
        for _ in range(count):
            seen = torch.tensor([[alphabet.index(c) for c in text[-LENGTH:]]])
            text += alphabet[int(model(seen)[0, -1].argmax())]
    return text


def train(steps: int, seed: int = 0, sample: int = 0, report: int = 0) -> dict[str, float | int | str]:
    """What came of `steps` steps; `report` > 0 prints a line every so many to stderr."""
    torch.manual_seed(seed)
    text = TEXT.read_text()
    alphabet = "".join(sorted(set(text)))
    characters = torch.tensor([alphabet.index(c) for c in text])
    model = CharacterModel(len(alphabet))
    groups = parameter_groups(model, 0.01)
    optimizer = ComplexAdamW(groups, lr=LEARNING_RATE, temperature=TEMPERATURE, seed=seed)
    guard = GradGuard(model.parameters(), max_norm=1.0, policy="skip")
    grid = torch.arange(0, len(text) - LENGTH - 1, LENGTH)

    def total() -> float:
        with torch.no_grad():
            return float(loss_of(model, characters, grid))

    began = time.perf_counter()
    found: dict[str, float | int | str] = {"steps": steps, "unigram_entropy": entropy(characters)}
    found |= {"loss_before": total(), "non_finite_steps": 0}
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:  # warm up, then down to 0
            group["lr"] = LEARNING_RATE * min(step / 20, 1.0) * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
        loss = loss_of(model, characters, torch.randint(len(text) - LENGTH - 1, (BATCH,)))
        optimizer.zero_grad()
        loss.backward()
        norm = guard()
        optimizer.step()
        finite = bool(torch.isfinite(loss) & torch.isfinite(norm))
        found["non_finite_steps"] += not finite
        if report and step % report == 0:
            print(f"step {step:4d}  loss {loss:.3f}  gradient norm {norm:.3f}", file=sys.stderr)
    found |= {"loss_after": total(), "largest_drift": model.drift, "seconds": time.perf_counter() - began}
    if sample:
        found["sample"] = write(model, alphabet, text[:16], sample)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sample", type=int, default=200, help="characters to write at the end")
    options = parser.parse_args()
    found = train(options.steps, sample=options.sample, report=20)
    print(json.dumps(found))
    learned = found["loss_after"] < 0.75 * found["unigram_entropy"]
    return 0 if learned and not found["non_finite_steps"] and found["largest_drift"] < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
