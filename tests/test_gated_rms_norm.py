"""What the suite's comparison of `gated_rms_norm` does not reach: inputs and gradients that are parts of
something larger."""

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


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_the_layouts_of_both_inputs_do_not_matter(backend):
    """Rows of one of them, and then of the other, lie apart."""
    wide, weight = torch.randn(2, 5, 3, 24), torch.randn(8)
    y, z = wide[0, ..., :8], wide[1, ..., 8:16]
    with use_backend(backend):
        expected = gated_rms_norm(y.contiguous(), z.contiguous(), weight)
        for pair in ((y, z.contiguous()), (y.contiguous(), z)):
            # torch takes its sigmoid of scattered numbers by other code: each result is right to a few ulp.
            eps = torch.finfo(weight.dtype).eps
            torch.testing.assert_close(gated_rms_norm(*pair, weight), expected, rtol=16 * eps, atol=0)
