"""Triton's scans on tiles as small as on a GPU, with time cut into segments and not; the suite takes large tiles."""

from __future__ import annotations

import importlib

import pytest
import torch

import stablekern
from specs import selective_scan as selective_spec
from specs import ssd_scan as ssd_spec
from stablekern.ops import selective_scan, ssd_scan

pytest.importorskip("triton")

# Sizes, and the states of a tile. Several tiles a group each; the last one of a group is not full. Neither is the last
# segment, but it has several blocks of steps, whose order matters backwards too.
CASES = {
    "ssd-columns": (ssd_spec, ssd_scan, (1, 37, 2, 12, 1, 5), 64),
    "ssd-heads": (ssd_spec, ssd_scan, (1, 34, 6, 3, 2, 2), 16),
    "selective": (selective_spec, selective_scan, (1, 13, 41, 1, 5), 64),
    "selective-groups": (selective_spec, selective_scan, (1, 6, 34, 2, 2), 4),
}


def with_gradients(function, args, optional):
    leaves = [t.clone().requires_grad_() for t in args]
    named = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in optional.items()}
    y, last = function(*leaves, **named)
    leaves += [v for v in named.values() if isinstance(v, torch.Tensor)]
    return [y.detach(), last.detach(), *torch.autograd.grad(y.square().sum() + last.sum(), leaves)]


@pytest.mark.parametrize("clamp", [None, 0.5], ids=["free", "clamped"])
@pytest.mark.parametrize(("spec", "spine", "sizes", "tile"), CASES.values(), ids=CASES)
def test_small_tiles_and_segments(monkeypatch, spec, spine, sizes, tile, clamp):
    name = spine.__name__.rpartition(".")[2]
    kernels = importlib.import_module(f"stablekern.triton_kernels.{name}")
    segments = importlib.import_module("stablekern.triton_kernels.scan")
    for limit in (n for n in vars(kernels) if n.endswith("_TILE")):
        monkeypatch.setattr(kernels, limit, {"cpu": {8: tile}})
    args, optional = spec.inputs(torch.Generator().manual_seed(3), *sizes)
    optional["state_clamp"] = clamp
    optional["bidirectional"] = args[3].shape[2 if name == "ssd_scan" else 1] == 2
    optional["dt_softplus" if name == "ssd_scan" else "delta_softplus"] = not optional["bidirectional"]
    exact = with_gradients(spine.reference, args, optional)
    for few in (segments._FEW, 0) if clamp is None else (0,):
        monkeypatch.setattr(segments, "_FEW", few)
        with stablekern.use_backend("triton"):
            for a, b in zip(with_gradients(getattr(spine, name), args, optional), exact, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_turning_states(dtype):
    """With nothing coming in, one step turns a state of 1 into exp(delta A): angles of many turns, all quadrants."""
    angles = torch.cat([torch.linspace(-7, 7, 57), torch.linspace(-3e3, 3e3, 91)]).to(dtype.to_real())
    A = torch.complex(torch.full_like(angles, -0.5), angles)[:, None]
    u = torch.zeros(1, angles.numel(), 1, dtype=angles.dtype)
    nothing, start = torch.zeros(1, 1, 1, dtype=dtype), torch.ones(1, angles.numel(), 1, dtype=dtype)
    with stablekern.use_backend("triton"):
        _, last = selective_scan.selective_scan(
            u, u + 1, A, nothing, nothing, initial_state=start, return_last_state=True
        )
    eps = torch.finfo(dtype).eps
    off = (last[0, :, 0].to(torch.complex128) - torch.exp(A[:, 0].to(torch.complex128))).abs()
    assert (off <= eps * (4 + angles.abs())).all()


@pytest.mark.parametrize("bound", [2.5, 1e-25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_the_modulus_neither_overflows_nor_vanishes(backend, dtype, bound):
    """A clamp of complex states far from 1, and at 0: the bound, though the ratio to it may vanish, or the state."""
    big, small = torch.finfo(dtype).max / 2, 8 * torch.finfo(dtype).smallest_normal
    starts = torch.tensor([complex(big, big), complex(small, -small), 0j, complex(3, 4)], dtype=torch.complex128)
    scale = torch.tensor([2**-0.5 / big, 1 / bound, 1 / bound, 1 / 5], dtype=torch.float64)
    expected = (starts * scale * bound).to(dtype.to_complex())
    starts = starts.to(dtype.to_complex())
    n = starts.numel()
    A = torch.full((n, 1), -1.0, dtype=dtype).to(starts.dtype)
    u, nothing = torch.zeros(1, n, 1, dtype=dtype), torch.zeros(1, 1, 1, dtype=starts.dtype)
    named = {"initial_state": starts[None, :, None], "state_clamp": bound, "return_last_state": True}
    streamed = starts[None, :, None].clone()
    with stablekern.use_backend(backend):
        _, last = selective_scan.selective_scan(u, u, A, nothing, nothing, **named)
        stablekern.selective_state_update(
            streamed, u[..., 0], u[..., 0], A, nothing[..., 0], nothing[..., 0], state_clamp=bound
        )
    for state in (last, streamed):
        torch.testing.assert_close(state[0, :, 0], expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.filterwarnings("ignore:.*does not decay", "ignore:overflow encountered")  # ours, and the interpreter's
@pytest.mark.parametrize("spine", [ssd_scan, selective_scan], ids=["ssd", "selective"])
def test_nothing_stays_nothing_where_a_segment_would_overflow(spine):
    """States that double 185 times in a segment, cut along time: all zero until the last step comes."""
    length = 96
    step, one = torch.full((1, 1, length), 4.0), torch.ones(1, 1, 1, length)
    x = torch.zeros(1, 1, length)
    x[..., -1] = 3.0
    with stablekern.use_backend("triton"):
        if spine is selective_scan:
            A = torch.ones(1, 1)
            y, last = selective_scan.selective_scan(x, step, A, one, one, return_last_state=True)
        else:
            args = x.mT[..., None], step.mT, torch.ones(1), one.permute(0, 3, 1, 2), one.permute(0, 3, 1, 2)
            y, last = ssd_scan.ssd_scan(*args, return_last_state=True)
    torch.testing.assert_close(y.flatten(), 4 * x.flatten(), rtol=0, atol=0)
    assert last.item() == 12
