"""The backward of `eigh` next to repeated eigenvalues, against the bounds that `bench/eigh_sweep.py` derives.

The sweep itself runs by `python -m bench.eigh_sweep`; here a sample of it, and what its committed lines say.
"""

from __future__ import annotations

import pytest
import torch

from stablekern import numerics
from stablekern.ops import eigh as spine

sweep = pytest.importorskip("bench.eigh_sweep", reason="the benches live in the checkout")

SIZES = (2, 8, 19, 33)


def sample(loss: str, dtype: torch.dtype) -> list:
    """Every size; three cuts between halves, and one for clusters of 2 and of all."""
    found = []
    for point in sweep.points(SIZES):
        half = point.cluster == max(2, point.n // 2)
        steps = (1e-6, 1e-4, 0.1) if half else (1e-4,)
        chosen = (point.cross if loss == "tiny" else point.cut) in steps and point.cluster in (2, point.n // 2, point.n)
        if (point.loss, point.dtype) == (loss, dtype) and chosen:
            found.append(point)
    return found


@pytest.mark.parametrize(("loss", "dtype"), dict.fromkeys((loss, dtype) for loss, dtype, _ in sweep.combinations()))
def test_auto_stays_within_its_bounds(loss, dtype):
    """And the ops made for projectors and functions of a matrix within the same ones."""
    points = sample(loss, dtype)
    assert points
    for point in points:
        for result in sweep.measure(point, ("auto", "dedicated")):
            if result["mode"] == "auto":
                assert (result["own"] <= 1).all(), (point, result["own"])
            if "true" in result:
                assert (result["true"] <= 1).all(), (point, result)
            if loss == "spectral" and result["mode"] == "dedicated":
                assert (result["error"] <= 5 * point.n * torch.finfo(dtype).eps).all(), (point, result)


@pytest.mark.parametrize("mode", ["mask", "lorentz", "raw"])
def test_the_other_rules_do_not(mode):
    """What the bounds are worth: each of the others breaks them by far, somewhere in the same sample."""
    worst = 0.0
    for point in sample("projector", torch.float32):
        for result in sweep.measure(point, (mode,)):
            worst = max(worst, float(result["own"].nan_to_num(torch.inf).max()))
    assert worst > 100


def invariant_losses(V: torch.Tensor, k: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Losses that see the first k columns as a subspace, as they are written."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(V.dtype)

    n = V.shape[-1]
    S = V[:, :k]
    P = S @ S.mH
    inner = S.mH @ normal(n, n) @ S
    vector = normal(n, 1)
    return [
        (normal(n, n).conj() * P).sum().real,
        (P - normal(n, n) / n).abs().square().sum(),
        torch.tanh((P @ normal(n, 16)).abs()).square().sum(),
        (vector.mH @ P @ vector).abs().square().sum(),
        (inner @ inner.mH).diagonal().real.sum(),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64], ids=str)
def test_rounding_stays_below_half_the_threshold(dtype):
    """kappa: the numerators of a pair that the loss cannot tell apart, over eps and the longest column of M."""
    generator = torch.Generator().manual_seed(1)
    high = torch.complex128 if dtype.is_complex else torch.float64
    worst = 0.0
    for n in (2, 3, 8, 19, 64, 256):
        for k in {2, max(2, n // 2), n}:
            Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=high)).Q
            w = torch.linspace(0, 1, n, dtype=torch.float64)
            w[:k] = -1
            V = spine.eigh(((Q * w) @ Q.mH).to(dtype)).eigenvectors.detach().requires_grad_()
            for loss in invariant_losses(V, k, generator):
                M = V.detach().mH @ torch.autograd.grad(loss, V, retain_graph=True)[0]
                noise = (M - M.mH)[:k, :k].fill_diagonal_(0).abs().max()
                longest = torch.linalg.vector_norm(M, dim=0).max()
                worst = max(worst, float(noise / longest) / torch.finfo(dtype).eps)
    parts = 2**0.5 if dtype.is_complex else 1.0  # re and im round apart, each like a real number
    assert 0 < worst <= parts * numerics.EIGH_NOISE_KAPPA.value / 2


def test_a_genuine_numerator_above_the_threshold_is_kept():
    """One pair, exact vectors: dropped at kappa ulp of the longest column, kept above it; in any order of magnitude."""
    eps = torch.finfo(torch.float32).eps
    kappa = numerics.EIGH_NOISE_KAPPA.value
    values, rows = torch.tensor([[0.0, 0.25, 1.0]]), torch.eye(3)[None]
    rule = spine.gap_rule("eigh", "auto", None, torch.float32)
    for size in (1e-30, 1.0, 1e30):
        for factor, kept in ((0.9, False), (1.1, True)):
            grad = torch.zeros(1, 3, 3)
            grad[0, 2, 2] = size  # the longest column, of no effect itself
            grad[0, 1, 0] = factor * kappa * eps * size
            found = spine.backward_of(values, rows, None, grad, *rule)[0, 0, 1]
            expected = grad[0, 1, 0] / 0.25 / 2 if kept else torch.tensor(0.0)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_the_sweep_is_committed_and_within_its_bounds():
    """All lines of the figure, with every quotient of `auto` at most 1, and the page that shows it."""
    folders = [path.parent for path in sweep.RESULTS.glob(f"*/{sweep.OP}.jsonl")]
    assert folders
    for folder in folders:
        lines = sweep.stored(folder)
        for loss, dtype, n in sweep.combinations():
            name = str(dtype).removeprefix("torch.")
            modes = lines[f"{loss}, {name}, n={n}"]["modes"]
            assert {*sweep.MODES} <= {*modes}
            assert 0 <= modes["auto"]["own"] <= 1
            for mode in {"auto", "dedicated"} & {*modes}:
                assert 0 <= modes[mode].get("true", 0.0) <= 1
    assert sweep.FIGURE.read_text().rstrip().endswith("</svg>")
    page = sweep.FIGURE.parent.parent / "ops" / "eigh.md"
    assert f"(../figures/{sweep.FIGURE.name})" in page.read_text()
