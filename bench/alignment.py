"""How often a column of the encoding changes its sign from one step to the next: `python -m bench.alignment`.

Dense graphs on 19 nodes whose log weights wander by 0.3 about their mean, so slowly that an eigenvector stays near
itself; 16 columns. A sign flip is a column that points away from the one before, |cosine| above 0.9 (so no exchange
of close eigenvectors counts). Rules: the sign of the column sum, as usual; the largest component positive
(align="sign"); align="temporal".
"""

from __future__ import annotations

import torch
from torch import Tensor

import stablekern
from bench.store import append, stamp

OP = "alignment"
NODES, COLUMNS = 19, 16
NEAR = 0.9  # cosine between a column and the one before


def wandering(sequences: int, steps: int, seed: int = 0) -> Tensor:
    """(sequences, steps, 19, 19): log weights of standard deviation 0.3 that forget a half per 138 steps."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, sequences, NODES, NODES, generator=generator, dtype=torch.float64)
    kept = 0.995
    state, states = noise[0], []
    for entering in noise:
        state = kept * state + (1 - kept**2) ** 0.5 * entering
        states.append(state)
    exponent = 0.3 * torch.stack(states, 1) / 2**0.5
    return torch.exp(exponent + exponent.mT) * (1 - torch.eye(NODES, dtype=torch.float64))


def column_sum(adjacency: Tensor) -> Tensor:
    vectors = stablekern.laplacian_pe(adjacency, COLUMNS, align="none")
    return vectors * torch.where(vectors.sum(-2, keepdim=True) < 0, -1.0, 1.0)


RULES = {
    "column sum": column_sum,
    'align="sign"': lambda adjacency: stablekern.laplacian_pe(adjacency, COLUMNS),
    'align="temporal"': lambda adjacency: stablekern.laplacian_pe(adjacency, COLUMNS, align="temporal"),
}


def flips(adjacency: Tensor) -> dict[str, dict]:
    """Per rule: sign flips, the columns that continue the one before, and sequences x columns with a flip at all."""
    found = {}
    for name, rule in RULES.items():
        pe = rule(adjacency)
        cosine = (pe[:, 1:] * pe[:, :-1]).sum(-2)
        flipped = cosine < -NEAR
        found[name] = {
            "flips": int(flipped.sum()),
            "continued": int((cosine.abs() > NEAR).sum()),
            "columns_with_a_flip": int(flipped.any(1).sum()),
            "columns": flipped.shape[0] * flipped.shape[2],
        }
    return found


def main() -> None:
    found = flips(wandering(16, 960))
    print(f"{'rule':20}{'sign flips':>12}{'of':>10}{'columns with one':>20}{'of':>8}")
    for name, result in found.items():
        print(
            f"{name:20}{result['flips']:>12}{result['continued']:>10}{result['columns_with_a_flip']:>20}"
            f"{result['columns']:>8}"
        )
    append({"op": OP, "case": "16 sequences x 960 graphs on 19 nodes", "rules": found} | stamp("cpu"))


if __name__ == "__main__":
    main()
