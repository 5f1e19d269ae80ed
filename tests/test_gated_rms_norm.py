"""What the suite's comparison of `gated_rms_norm` does not reach: gradients that come as a part of something larger."""

from __future__ import annotations

import pytest
import torch

from stablekern import use_backend
from stablekern.ops.gated_rms_norm import gated_rms_norm


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_the_layout_of_the_gradient_does_not_matter(backend):
    inputs = [torch.randn(5, 3, 8).requires_grad_(), torch.randn(5, 3, 8).requires_grad_(), torch.randn(8)]
    inputs[2].requires_grad_()
    weights = torch.randn(5, 3, 8)
    wider = torch.cat([weights, torch.full_like(weights, 1e30)], -1)[..., :8]
    apart = torch.stack([weights, torch.full_like(weights, 1e30)], -1)[..., 0]
    with use_backend(backend):
        out = gated_rms_norm(*inputs, groups=2)
        expected = torch.autograd.grad(out, inputs, weights, retain_graph=True)
        for given in (wider, apart):
            for found, want in zip(torch.autograd.grad(out, inputs, given, retain_graph=True), expected, strict=True):
                assert torch.equal(found, want)
