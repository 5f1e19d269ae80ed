"""What is special about `small_cayley`: unitarity, and matrices that stay alone."""

from __future__ import annotations

import math

import pytest
import torch

import stablekern
from specs.small_cayley import skew
from stablekern import _registry
from stablekern.ops.small_cayley import small_cayley

BACKENDS = [b for b, reason in _registry.available_backends("small_cayley").items() if reason is None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [8, 16])
@pytest.mark.parametrize("size", [0.1, 1.0, 30.0])
def test_skew_hermitian_blocks_become_unitary(backend, n, size):
    A = (size * skew(torch.Generator().manual_seed(n), 100, n)).to(torch.complex64)
    with stablekern.use_backend(backend):
        U = small_cayley(A)
    gram = U.mH @ U
    assert (gram - torch.eye(n)).abs().max() < 4 * n * torch.finfo(torch.float32).eps * max(1.0, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_matrix_stays_alone(backend, bad):
    A = skew(torch.Generator().manual_seed(1), 40, 5)
    with stablekern.use_backend(backend):
        expected = small_cayley(A)
        A[17, 2, 3] = bad
        A[30] = -torch.eye(5)  # I + A is 0
        U = small_cayley(A)
    good = torch.ones(40, dtype=torch.bool)
    good[[17, 30]] = False
    torch.testing.assert_close(U[good], expected[good], rtol=0, atol=0)
    assert not torch.isfinite(U[17]).all() and not torch.isfinite(U[30]).all()
