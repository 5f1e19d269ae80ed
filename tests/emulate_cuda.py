"""Run the kernels of `csrc/cuda` on the CPU: their very source, compiled by the host's compiler.

`launch` stands in for `stablekern._nvrtc.launch`: the launchers of the package then work on CPU tensors. See
`tests/emulation/cuda.h` for how a warp is emulated.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablekern import _build, settings

HERE = Path(__file__).resolve().parent / "emulation"
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
ORDERS = (0, 1, 2)  # in which the lanes of a warp run between two meeting points: up, down, mixed


@functools.cache
def library(source: str, macros: tuple[tuple[str, object], ...]) -> ctypes.CDLL:
    """The kernels of one file for one set of macros, compiled now (a quarter of a second) or taken from the cache."""
    folder = _build.source_root() / "cuda"
    arguments = [
        *FLAGS, "-Wno-unknown-pragmas", f"-I{folder}", f"-I{HERE}", *(f"-D{name}={value}" for name, value in macros)
    ]  # fmt: skip
    digest = hashlib.sha256("\0".join([_build.compiler(), source, *arguments]).encode())
    for path in sorted([*folder.iterdir(), *HERE.iterdir()]):
        digest.update(path.read_bytes() + b"\0")
    directory = _build.cache_directory(settings.get("STABLEKERN_CACHE_DIR"))
    final = directory / f"emulated-{Path(source).stem}-{digest.hexdigest()[:20]}.so"
    if not final.is_file():
        with tempfile.TemporaryDirectory(dir=directory, suffix=".partial") as scratch:
            made = Path(scratch) / final.name
            program = HERE / f"{Path(source).stem}.cpp"
            done = subprocess.run(
                [_build.compiler(), *arguments, str(program), "-o", str(made)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-4000:]
            os.replace(made, final)
    return ctypes.CDLL(str(final))


def launch(
    source: str,
    function: str,
    macros: Mapping[str, object],
    *,
    device: torch.device,
    blocks: int,
    threads: int,
    arguments: Sequence[Any],
    order: int = 0,
) -> None:
    """`stablekern._nvrtc.launch`, on the CPU."""
    assert device.type == "cpu"
    for argument in arguments:
        assert argument is None or not isinstance(argument, Tensor) or argument.is_contiguous()
    passed = [
        ctypes.c_void_p(x.data_ptr() if x is not None else None) if x is None or isinstance(x, Tensor) else x
        for x in arguments
    ]
    kernel = getattr(library(source, tuple(macros.items())), f"emulate_{function}")
    kernel(ctypes.c_int(order), ctypes.c_longlong(blocks), ctypes.c_int(threads), *passed)
