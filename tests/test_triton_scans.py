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

# Sizes, and the states of a tile. Several tiles a group each; the last one of a group is not full.
CASES = {
    "ssd-columns": (ssd_spec, ssd_scan, (1, 37, 2, 12, 1, 5), 64),
    "ssd-heads": (ssd_spec, ssd_scan, (1, 34, 6, 3, 2, 2), 16),
    "selective": (selective_spec, selective_scan, (1, 13, 34, 1, 5), 64),
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
    if name == "ssd_scan":
        optional["bidirectional"] = args[3].shape[2] == 2
    exact = with_gradients(spine.reference, args, optional)
    for few in (segments._FEW, 0) if clamp is None else (0,):
        monkeypatch.setattr(segments, "_FEW", few)
        with stablekern.use_backend("triton"):
            for a, b in zip(with_gradients(getattr(spine, name), args, optional), exact, strict=True):
                torch.testing.assert_close(a, b)
