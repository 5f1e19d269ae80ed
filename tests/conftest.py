"""Settings of the whole suite: seeds, NaN-poisoned allocations, Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first `import triton`
sys.path.insert(0, str(Path(__file__).parent))

import pytest

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded(request):
    """The same numbers in every test, whatever ran before it."""
    torch.manual_seed(sum(map(ord, request.node.name)))


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        with torch.no_grad():
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(-77777)
        return tensor

    return wrapper


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Every element of a fresh allocation is NaN: whatever an op does not write shows up."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


@pytest.fixture
def any_backend():
    """Undo a backend that a test forced."""
    from stablekern import use_backend

    with use_backend(None):
        yield
