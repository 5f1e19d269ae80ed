"""The fuzz target of the argument checks, without its engine: seeded inputs, and all that were findings once."""

from __future__ import annotations

import random

import pytest
import torch

import fuzz_arguments
import stablekern

# Inputs that were findings: the op, and the bytes behind the one that chooses it, as hexadecimal.
FOUND = (
    ("laplacian_pe", "0a0a0a"),
    ("finite_stats", "f6ed25578a09d395665ca332959b6639068f6a6e7865ffa2ccf635be26"),
    ("cg_ex", "b4743100f454851c388da193aeb88d5294c1ca64b121e10bee9e27ce8c"),
    ("select_solver", "003193fd73de5cf9aa9fd73070006fbc8971623ac3629f61ad9b40c3d2"),
    ("linear_scan", "a2d0befb712e60d8ca41cc1e43f7a6728059a865f4374dba6a786a"),
    ("finite_stats", "bab764ea76ed422859d3c9b3e33b6b3d8ab5866a977fca345d40bf11ee"),
    ("linear_scan", "4da689e464a525d415a606af4caa822e6a293d4475a7472c9f5d685c6a"),
    ("causal_conv1d", "c1a7ff1df0c9fb5f81c3c39f7326fc496a319bd3cd08e186685010923c"),
    ("selective_scan", "fcf20ac5c2784835d5c57204a1d1c66f43df5a38399859b4f1fe"),
    ("causal_conv1d", "dbd0512f2531724454b98c2a97378b3062e2c876b41de4b068035f0742"),
    ("ssd_scan", "655d290d2d61e7831fcc8ad779e73f236c6a6f0f59d2fae1a95b62d72f"),
    ("linear_scan", "889395f75e6dd253f0fb4fb63a9b5fb5f0bc81e25738d1cd411000"),
    ("selective_state_update", "4f2c18491035efcb1a29497de0f0db3a6ecb3120ad9b80ccac11153d7d"),
    ("select_solver", "1b580316dc8ed44378bfd4af18e842ba1eb23c7d3fdf4c09bb424d930c"),
    ("select_solver", "fc0ae8ce4ddeac5500d22969021d3240377e5fd3821b861d5ebca350f5"),
    ("ssd_scan", "45b952b54d6eac1f98b80eb6b3ba7d62f38e410379666564c82303712a"),
    ("chol_solve_safe", "5ab807880120b7f2376213d49e69df66b49e1da18bc66fbae6f4"),
    ("small_cayley", "446aa0c5be850175dfc2c5288012be68a02b98ac224beeaa4eb4486827"),
    ("linear_scan", "69c4104dff633f47694e3925eec8d2f7f5379d89ea180261903b3408"),
    ("select_solver", "d5bb94fb5397209612a4f6811690198b752bfde3a1608796f6ac6d72cd"),
    ("cg", "a2a7340b25013f49bcd8fa975236600e67c68fe8e356ce283c0739697f"),
    ("mvdr_denominator", "0284b5c608da9eb2369eaf732775848e21d2fa770fd2bf16df30fcd71e"),
    ("subspace_residual", "50232dc2e34a2d5534e285dc9bd94456ea21da102493ca2bb1f064462b"),
    ("cg_ex", "bb5d84e479a892047b9e731f435bc2df21de6a54ba93a9af7301490efd"),
    ("laplacian_pe", "e2075d8869fcd44c7fc2438036ebc6e597b3aa112b8da6c858c20bec72"),
    ("covariance_blend", "1fb614aa00c5871533c47959f7105af936dc92fa6b8adb96e9f2e9f878"),
    ("linear_scan", "2a8728e8371fa6895c80e8788bbb66f421867dd8c647ae16c9788e8551"),
    ("focal_loss", "5b91546cd763c1cfef828e8833fda4eb268b326c193c40e649b2d63fdd"),
    ("ssd_state_update", "5d004e8087786e5d8e35aa64fad7d88bfaa84e5b8ba8a1b5e954825539"),
    ("assemble_adjacency", "306eac6174697665271a"),
    ("cg", "fef92480000000ffff7e"),
    ("cg", "4c1b015b27463c64ff" + 83 * "8c" + "01"),
)


def test_every_op_is_a_target():
    modules = {name: getattr(getattr(stablekern, name), "__module__", "") for name in stablekern.__all__}
    functions = {name for name, module in modules.items() if module.startswith("stablekern.ops.")}
    twins = {name for name in functions if name.endswith("_ex")} - {"cg_ex"}  # the plain form calls them
    assert functions - twins == set(fuzz_arguments.CALLS)


@pytest.mark.parametrize("name", sorted(fuzz_arguments.CALLS))
def test_the_call_that_is_changed_works(name):
    getattr(stablekern, name)(**fuzz_arguments.CALLS[name]())


@pytest.mark.parametrize("number", range(len(fuzz_arguments.CALLS)))
def test_seeded_inputs(number):
    draw = random.Random(number)
    for _ in range(40):
        fuzz_arguments.one_input(bytes([number]) + draw.randbytes(40))


@pytest.mark.parametrize(("name", "data"), FOUND)
def test_what_was_found_once(name, data):
    fuzz_arguments.changed_call(name, bytes.fromhex(data))


@pytest.mark.parametrize("name", sorted(fuzz_arguments.CALLS))
def test_sparse_tensors_and_those_of_another_device_are_refused_by_name(name):
    """In place of any one tensor; where there is just one, a meta tensor is what the others have to be on."""
    tensors = {key for key, value in fuzz_arguments.CALLS[name]().items() if isinstance(value, torch.Tensor)}
    for argument in tensors:
        for change in (torch.Tensor.to_sparse, lambda x: x.to("meta")):
            arguments = fuzz_arguments.CALLS[name]()
            arguments[argument] = change(arguments[argument])
            if len(tensors) == 1 and arguments[argument].is_meta:
                continue
            with pytest.raises((ValueError, TypeError), match=f"^stablekern.*`{argument}`"):
                getattr(stablekern, name)(**arguments)


def test_a_number_that_no_float_can_hold_is_refused():
    with pytest.raises(ValueError, match="^stablekern.mvdr_denominator: `loading` .* got an integer of 1329 bits"):
        stablekern.mvdr_denominator(torch.eye(3), torch.ones(3, 2), 10**400)


def test_an_error_from_the_inside_is_a_finding(monkeypatch):
    def broken(**arguments):
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(stablekern, "eigh", broken)
    with pytest.raises(RuntimeError, match="size of tensor"):
        fuzz_arguments.one_input(bytes([sorted(fuzz_arguments.CALLS).index("eigh")]))
    assert isinstance(fuzz_arguments.made_tensor(fuzz_arguments.Bytes(b"\x01"), torch.ones(2)), torch.Tensor)
