"""A fuzz target for the argument checks: `python tests/fuzz_arguments.py [options of libFuzzer]` (`make fuzz`).

Some bytes choose a public op, up to three of its arguments, and what to put there: tensors of other shapes, dtypes,
strides and layouts, numbers at the ends of their range, objects of other kinds. The op must return, or raise an error
of its own: ValueError, TypeError or RuntimeError that begins with "stablekern.". All else is a finding: an IndexError,
an error from the inside of torch, a crash. `tests/test_fuzz.py` runs a sample of it without the engine.
"""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

try:
    import atheris
except ImportError:  # another Python than the engine has wheels for
    atheris = None

import torch
from torch import Tensor

with atheris.instrument_imports(include=["stablekern"]) if atheris and __name__ == "__main__" else nullcontext():
    import stablekern

EXPECTED = (ValueError, TypeError, RuntimeError)
DTYPES = (
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.float16, torch.bfloat16, torch.int64,
    torch.int32, torch.uint8, torch.bool,
)  # fmt: skip
OBJECTS: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**63), 2**70, 0.0, -0.0, 0.5, 1.0, 1e-300, 1e300, math.inf,
    -math.inf, math.nan, 1j, "", "L", "auto", "cg", "mean", "silu", "lorentz", (), (0.0, 1.0), (1.0, 0.0), (-2, -1),
    (0, 0), (5, 6), [], [0.5], {}, b"L", object(), lambda x: x, lambda x: x.sum(), len,
)  # fmt: skip


def _spd(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.eye(shape[-1], dtype=dtype).expand(*shape, shape[-1]).clone()


def _ring() -> Tensor:
    return torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])


# Arguments of a call that works; all others have their defaults.
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "assemble_adjacency": lambda: {"edge_weights": torch.ones(2, 6, 3), "n_nodes": 4},
    "causal_conv1d": lambda: {"x": torch.ones(2, 3, 5), "weight": torch.ones(3, 4)},
    "cayley_step": lambda: {
        "psi": torch.ones(2, 4, dtype=torch.complex64), "edges": _ring(), "weights": torch.ones(4), "dt": 0.1,
    },
    "cg": lambda: {"A": _spd(2, 3), "b": torch.ones(2, 3)},
    "cg_ex": lambda: {"A": _spd(2, 3), "b": torch.ones(2, 3)},
    "chol_solve_safe": lambda: {"R": _spd(2, 3), "A": torch.ones(2, 3, 2)},
    "cosine_edges": lambda: {"x": torch.ones(2, 3, 4, 5)},
    "covariance_blend": lambda: {"R_pred": _spd(2, 3), "R_samp": _spd(2, 3), "beta": 0.5},
    "eigengap_hinge": lambda: {"R": _spd(2, 3), "k": 1, "margin": 0.5},
    "eigenprojector": lambda: {"A": _spd(2, 3), "k": 1},
    "eigh": lambda: {"A": _spd(2, 3)},
    "eigvalsh": lambda: {"A": _spd(2, 3)},
    "finite_stats": lambda: {"tensors": [torch.ones(3), torch.ones(2, 2)]},
    "focal_loss": lambda: {"logits": torch.ones(4), "targets": torch.ones(4)},
    "gated_rms_norm": lambda: {"y": torch.ones(2, 3, 4), "z": torch.ones(2, 3, 4), "weight": torch.ones(4)},
    "laplacian_pe": lambda: {"adjacency": torch.ones(2, 3, 4, 4), "k": 2},
    "linear_scan": lambda: {"gate": torch.ones(2, 3, 4), "token": torch.ones(2, 3, 4)},
    "mvdr_denominator": lambda: {"R": _spd(2, 3), "A": torch.ones(3, 4)},
    "normalized_laplacian": lambda: {"adjacency": torch.ones(2, 4, 4)},
    "ridge_lstsq": lambda: {"Phi": torch.ones(2, 3, 4), "y": torch.ones(2, 3), "alpha": 0.1},
    "sample_covariance": lambda: {"X": torch.ones(2, 5, 3)},
    "select_solver": lambda: {"A": _spd(2, 3)},
    "selective_scan": lambda: {
        "u": torch.ones(2, 4, 5), "delta": torch.ones(2, 4, 5), "A": -torch.ones(4, 3), "B": torch.ones(2, 3, 5),
        "C": torch.ones(2, 3, 5),
    },
    "selective_state_update": lambda: {
        "state": torch.zeros(2, 4, 3), "x": torch.ones(2, 4), "dt": torch.ones(2, 4), "A": -torch.ones(4, 3),
        "B": torch.ones(2, 3), "C": torch.ones(2, 3),
    },
    "small_cayley": lambda: {"A": torch.zeros(2, 3, 3)},
    "spectral_function": lambda: {"A": _spd(2, 3), "function": "exp"},
    "ssd_scan": lambda: {
        "x": torch.ones(2, 5, 4, 3), "dt": torch.ones(2, 5, 4), "A": -torch.ones(4), "B": torch.ones(2, 5, 2, 3),
        "C": torch.ones(2, 5, 2, 3),
    },
    "ssd_state_update": lambda: {
        "state": torch.zeros(2, 4, 3, 5), "x": torch.ones(2, 4, 3), "dt": torch.ones(2, 4), "A": -torch.ones(4),
        "B": torch.ones(2, 2, 5), "C": torch.ones(2, 2, 5),
    },
    "subspace_residual": lambda: {"R": _spd(2, 3), "A": torch.ones(2, 3, 2)},
}  # fmt: skip


class Bytes:
    """Choices from a string of bytes; 0 when it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data = iter(data)

    def below(self, count: int) -> int:
        return next(self._data, 0) % count


def made_tensor(choose: Bytes, like: Any) -> Tensor:
    """A small tensor; often of the shape of what it replaces, with one thing changed."""
    shape = list(like.shape) if isinstance(like, Tensor) and choose.below(3) else []
    kind = choose.below(4)
    if kind == 0 or not shape:
        shape = [choose.below(5) for _ in range(choose.below(6))]
    elif kind == 1:
        shape[choose.below(len(shape))] = choose.below(7)
    elif kind == 2:
        del shape[choose.below(len(shape))]
    own = like.dtype if isinstance(like, Tensor) else torch.float32
    dtype = DTYPES[choose.below(len(DTYPES))] if choose.below(2) else own
    fill = (1, 0, -1, math.nan, math.inf, 1e30, 1e-30, 255)[choose.below(8)]
    if not (dtype.is_floating_point or dtype.is_complex):
        fill = choose.below(5) - (1 if dtype.is_signed else 0)
    fill = math.inf if dtype == torch.float16 and fill == 1e30 else fill
    x = torch.full(shape, fill, dtype=dtype)
    strides = choose.below(6)
    if strides == 1 and x.dim():
        x = torch.stack((x, x), -1)[..., 0]
    elif strides == 2 and x.dim() > 1:
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif strides == 3:
        x = torch.full((), fill, dtype=dtype).expand(shape)
    elif strides == 4 and x.is_complex():
        x = x.conj()
    elif strides == 5 and (x.is_floating_point() or x.is_complex()):
        x.requires_grad_()
    return x


def one_input(data: bytes) -> None:
    """One call of the op that the first byte chooses."""
    if data:
        changed_call(sorted(CALLS)[data[0] % len(CALLS)], data[1:])


def changed_call(name: str, data: bytes) -> None:
    """One call of this op. Raises what is a finding."""
    choose, function = Bytes(data), getattr(stablekern, name)
    arguments = CALLS[name]()
    names = list(inspect.signature(function).parameters)
    for _ in range(1 + choose.below(3)):
        which = names[choose.below(len(names))]
        now = arguments.get(which)
        if choose.below(4):
            arguments[which] = made_tensor(choose, now)
        elif isinstance(now, Tensor) and choose.below(2):
            arguments[which] = [now, [now], (now, now), (now, now, now)][choose.below(4)]
        else:
            arguments[which] = OBJECTS[choose.below(len(OBJECTS))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = function(**arguments)
            for x in (found,) if isinstance(found, Tensor) else tuple(found) if isinstance(found, tuple) else ():
                if isinstance(x, Tensor) and x.requires_grad:
                    x.real.sum().backward(retain_graph=True)
        except EXPECTED as error:
            if not str(error).startswith("stablekern.") and not _of_the_caller(error):
                raise


def _of_the_caller(error: BaseException) -> bool:
    """Whether a function that was passed in, as `A` of cg or `f` of spectral_function, raised it."""
    trace, files = error.__traceback__, []
    while trace is not None:
        files.append(trace.tb_frame.f_code.co_filename)
        trace = trace.tb_next
    return __file__ in files[1:]


def main() -> None:
    if atheris is None:
        raise SystemExit("fuzz: pip install '.[fuzz]' (Python 3.11)")
    torch.set_num_threads(1)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
