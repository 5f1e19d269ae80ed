"""Compile the CUDA kernels for every GPU generation that we support, without a GPU, and say what they take.

`python tests/compile_cuda.py` writes `tests/cuda_resources.jsonl`: registers per thread, bytes of stack (spilled
registers live there) and of shared memory per block, for each kernel, type, size and architecture.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from stablekern import _build, _nvrtc
from stablekern.ops import eigh

RECORD = Path(__file__).resolve().parent / "cuda_resources.jsonl"
TARGETS = (80, 86, 89, 90, 100, 120)
DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
SIZES = (19, 32)
KERNELS = ("eigh_fwd", "eigvalsh_fwd", "eigh_bwd")


def sources() -> str:
    """A hash of what the kernels are made of, comments left out."""
    root = _build.source_root() / "cuda"
    texts = (re.sub(r"//.*", "", path.read_text()) for path in sorted(root.iterdir()))
    return hashlib.sha256("\0".join(" ".join(text.split()) for text in texts).encode()).hexdigest()[:16]


def resources(cubin: bytes) -> dict[str, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def row(kernel: str, dtype: torch.dtype, n: int, target: int) -> dict[str, Any]:
    macros = eigh.cuda_macros(dtype, n)
    case = {"kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "n": n, "target": target}
    used = resources(_nvrtc.compiled("eigh.cu", kernel, macros, f"sm_{target}"))
    return {**case, "warps": macros["SK_WARPS"], **used}


def main() -> None:
    rows = [row(*case) for case in itertools.product(KERNELS, DTYPES, SIZES, TARGETS)]
    head = {"sources": sources(), "nvrtc": _nvrtc.version()[0]}
    partial = RECORD.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in [head, *rows]))
    os.replace(partial, RECORD)


if __name__ == "__main__":
    main()
