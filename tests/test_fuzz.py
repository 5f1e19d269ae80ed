"""The fuzz target of the argument checks, without its engine: seeded inputs, and all that were findings once."""

from __future__ import annotations

import random

import pytest
import torch

import fuzz_arguments
import stablekern

# Inputs that were findings, as hexadecimal.
FOUND: tuple[str, ...] = ()


def test_every_op_is_a_target():
    functions = {name for name in stablekern.__all__ if callable(getattr(stablekern, name))}
    twins = {name for name in functions if name.endswith("_ex")} - {"cg_ex"}  # the plain form calls them
    assert functions - {"available_backends", "use_backend"} - twins == set(fuzz_arguments.CALLS)


@pytest.mark.parametrize("name", sorted(fuzz_arguments.CALLS))
def test_the_call_that_is_changed_works(name):
    getattr(stablekern, name)(**fuzz_arguments.CALLS[name]())


@pytest.mark.parametrize("number", range(len(fuzz_arguments.CALLS)))
def test_seeded_inputs(number):
    draw = random.Random(number)
    for _ in range(40):
        fuzz_arguments.one_input(bytes([number]) + draw.randbytes(40))


@pytest.mark.parametrize("data", FOUND)
def test_what_was_found_once(data):
    fuzz_arguments.one_input(bytes.fromhex(data))


def test_an_error_from_the_inside_is_a_finding(monkeypatch):
    def broken(**arguments):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(stablekern, "eigh", broken)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fuzz_arguments.one_input(bytes([sorted(fuzz_arguments.CALLS).index("eigh")]))
    assert isinstance(fuzz_arguments.made_tensor(fuzz_arguments.Bytes(b"\x01"), torch.ones(2)), torch.Tensor)
