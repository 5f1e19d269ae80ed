"""Train a small network through the covariance losses of source localisation, and count non-finite gradients.

A planar array of 12 x 12 elements hears a few sources. The network reads spatial lags of the sample covariance and
answers with a factor F, R_pred = F F^H. Four losses act on the blended, loaded covariance: its error (NMSE), the
eigenvalue gap after the sources, the alignment of its signal subspace with the true steering vectors (from the
eigenvectors and from the residual outside their span), and the contrast of the MVDR spectrum around each source.

A loaded covariance of low rank has over a hundred equal eigenvalues. `stablekern.eigenprojector` differentiates across
the gap only; the same term through `torch.linalg.eigh` is evaluated beside it, and non-finite gradients are counted.

    python examples/covariance_losses.py [--steps 300] [--save]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

import stablekern

SIDE, SOURCES, SNAPSHOTS = 12, 3, 16
ELEMENTS = SIDE * SIDE
C_EPS = 1.0  # diagonal load over the mean eigenvalue
BETA = 0.3  # weight of the sample covariance
STENCIL = 0.1  # radians between the points around a source
NOISE = 0.1  # power per element, against sources of power 1
MARGIN = 5.0  # of the eigenvalue gap
TEMPERATURE = 0.5  # of the contrast
POOL, BATCH = 16, 4


def steering(angles: Tensor) -> Tensor:
    """Columns (..., ELEMENTS, k) of a half-wavelength array for (..., k, 2) azimuths and elevations."""
    u = torch.sin(angles[..., 0]) * torch.cos(angles[..., 1])
    v = torch.sin(angles[..., 1])
    x = torch.arange(SIDE).repeat_interleave(SIDE)[:, None]
    y = torch.arange(SIDE).repeat(SIDE)[:, None]
    phase = torch.pi * (x * u[..., None, :] + y * v[..., None, :])
    return torch.polar(torch.ones_like(phase), phase)


class Scenes(NamedTuple):
    """What is known of a batch: features and sample covariance (input), true covariance and geometry (target)."""

    features: Tensor
    measured: Tensor
    target: Tensor
    sources: Tensor  # (b, ELEMENTS, SOURCES)
    stencil: Tensor  # (b, ELEMENTS, 9 * SOURCES)

    def pick(self, index: Tensor) -> Scenes:
        return Scenes(*(field[index] for field in self))


def simulate(count: int) -> Scenes:
    limits = torch.deg2rad(torch.tensor([60.0, 30.0]))
    angles = (2 * torch.rand(count, SOURCES, 2) - 1) * limits
    A = steering(angles)
    symbols = torch.randn(count, SNAPSHOTS, SOURCES, dtype=torch.complex64)
    noise = NOISE**0.5 * torch.randn(count, SNAPSHOTS, ELEMENTS, dtype=torch.complex64)
    measured = stablekern.sample_covariance(symbols @ A.mT + noise, target_trace=float(ELEMENTS))
    eye = torch.eye(ELEMENTS, dtype=torch.complex64)
    target = stablekern.covariance_blend(A @ A.mH + NOISE * eye, loading=C_EPS)
    offsets = STENCIL * torch.cartesian_prod(*2 * [torch.arange(-1.0, 2.0)])
    around = (angles[:, :, None] + offsets).flatten(1, 2)
    features = torch.view_as_real(measured[:, :, 0].resolve_conj()).flatten(1)
    return Scenes(features, measured, target, A, steering(around))


def factor_network() -> nn.Module:
    return nn.Sequential(nn.Linear(2 * ELEMENTS, 256), nn.SiLU(), nn.Linear(256, 2 * ELEMENTS * SOURCES))


def misaligned(P: Tensor, scenes: Scenes) -> Tensor:
    """The share of the true steering vectors outside the subspace that P projects on."""
    outside = scenes.sources - P @ scenes.sources
    return torch.view_as_real(outside).square().sum((1, 2, 3)).mean() / (ELEMENTS * SOURCES)


def losses(network: nn.Module, scenes: Scenes) -> tuple[dict[str, Tensor], Tensor]:
    """The terms, and the covariance that they look at."""
    F = torch.view_as_complex(network(scenes.features).reshape(-1, ELEMENTS, SOURCES, 2))
    R = stablekern.covariance_blend(F @ F.mH, scenes.measured, beta=BETA, loading=C_EPS)
    error, size = (torch.view_as_real(M).square().sum((1, 2, 3)) for M in (R - scenes.target, scenes.target))
    denominator = stablekern.mvdr_denominator(R, scenes.stencil).reshape(-1, SOURCES, 9)
    spectrum = -torch.log(denominator) / TEMPERATURE
    return {
        "nmse": (error / size).mean(),
        "eigengap": stablekern.eigengap_hinge(R, SOURCES, MARGIN).mean() / MARGIN,
        "alignment": misaligned(stablekern.eigenprojector(R, SOURCES, largest=True), scenes),
        "residual": stablekern.subspace_residual(R, scenes.sources).mean(),
        "contrast": (torch.logsumexp(spectrum, -1) - spectrum[..., 4]).mean(),
    }, R


def alignment_by_eigh_is_finite(R: Tensor, scenes: Scenes) -> bool:
    """Whether the alignment term through the eigenvectors of torch.linalg.eigh has a finite gradient here."""
    R = R.detach().requires_grad_()
    V = torch.linalg.eigh(R).eigenvectors[..., -SOURCES:]
    gradient = torch.autograd.grad(misaligned(V @ V.mH, scenes), R)[0]
    return bool(torch.isfinite(gradient).all())


def train(steps: int, seed: int = 0) -> dict[str, float]:
    """Loss over the whole pool of scenes before and after, and the steps with non-finite gradients."""
    torch.manual_seed(seed)
    pool, network = simulate(POOL), factor_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)

    def total() -> float:
        with torch.no_grad():
            return float(sum(losses(network, pool)[0].values()))

    found = {"steps": steps, "loss_before": total(), "non_finite_ours": 0, "non_finite_eigh": 0}
    for _ in range(steps):
        scenes = pool.pick(torch.randint(POOL, (BATCH,)))
        terms, R = losses(network, scenes)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        finite = all(torch.isfinite(p.grad).all() for p in network.parameters())
        found["non_finite_ours"] += not finite
        found["non_finite_eigh"] += not alignment_by_eigh_is_finite(R, scenes)
        optimizer.step()
    found["loss_after"] = total()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--save", action="store_true", help="append to bench/results")
    options = parser.parse_args()
    found = train(options.steps)
    print(json.dumps(found))
    if options.save:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from bench.store import append, stamp

        append({"op": "covariance_losses", "case": f"12x12 array, batch {BATCH}", **found, **stamp("cpu")})
    return 0 if found["loss_after"] < found["loss_before"] and not found["non_finite_ours"] else 1


if __name__ == "__main__":
    sys.exit(main())
