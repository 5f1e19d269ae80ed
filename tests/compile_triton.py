"""Compile every Triton kernel for every GPU generation that we support, without a GPU; print the result as JSON.

A program of its own, because the tests run Triton in its interpreter, which is chosen when Triton is imported.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TARGETS = (80, 89, 90, 100, 120)
IO_TYPES = ("fp32", "fp64", "fp16", "bf16")
WIDE = "the type that is computed in: fp64 for fp64, else fp32"


@dataclass(frozen=True)
class Dtype:
    """A constant that is a type of Triton's, which is imported where it compiles."""

    name: str


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: what its source does not say.

    `types` has integers (`"n": "i32"`) and pointers to something else than the type of the case; a floating-point
    scalar must be annotated in the kernel, since Triton passes an unannotated one as float32. A tuple has one for each.
    """

    constants: dict[str, Any]
    types: dict[str, Any] = field(default_factory=dict)
    io_types: tuple[str, ...] = IO_TYPES
    warps: int = 4
    registers: int | None = None  # the launcher's `maxnreg`


ELEMENTWISE = {"WIDE": WIDE, "BLOCK": 1024}
REAL = ("fp32", "fp64")
VECTORS = {"NODES": 32, "FEATURES": 64, "WIDE": WIDE}
TILES = {"PARTS": 2, "WIDE": WIDE, "BLOCK": 32}
MATRIX = {"ROWS": 32, "COLUMNS": 32, "DEPTH": 16, "WIDE": WIDE}
TILE_TYPES = {"n": "i32", "tiles": "i32", "traces_ptr": "*fp64", "info_ptr": "*i32"}


def integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


STRIDES = integers("nodes", "features", "steps", "x_item", "x_node", "x_step", "x_feature")
# The vectors may be in half precision; what is computed from them is not.
WIDE_PAIRS = dict.fromkeys(("grad_ptr", "edges_ptr", "inverse_ptr"), "*fp32")

JOIN = integers("rows", "columns", "segments", "first_item", "first_row", "first_column")
LINEAR = integers("rows", "first_channel", "some", "channels", "length") | {"changed_ptr": "*i32", "ties_ptr": "*i1"}
SSD = integers(
    *("length", "heads", "width", "groups", "reverse_groups", "states", "chunk", "segments", "segment_length"),
    *("head_tiles", "column_tiles", "start_item", "start_segment", "start_n", "start_channel"),
    *("carry_item", "carry_segment", "carry_n", "carry_channel", "elements"),
)
SSD_STEPS = {"BLOCK": 256, "HAS_BIAS": True}

STATE_UPDATE = dict.fromkeys(("HAS_D", "HAS_Z", "HAS_BIAS", "HAS_CLAMP", "SOFTPLUS"), True)
STATE_UPDATE_TYPES = integers(
    *("rows", "width", "groups", "states", "state_item", "state_row", "state_n", "A_row", "A_n", "bound_row", "bound_n")
)
CONV = integers(
    *("channels", "length", "reverse_channels", "x_item", "x_channel", "x_step", "y_item", "y_channel", "y_step"),
    *("dy_item", "dy_channel", "dy_step", "dx_item", "dx_channel", "dx_step"),
)
SELECTIVE = integers(
    *("channels", "length", "groups", "reverse_groups", "states", "chunk", "segments", "segment_length", "tiles"),
    *("start_item", "start_segment", "start_n", "start_channel"),
    *("carry_item", "carry_segment", "carry_n", "carry_channel"),
)


def selective(io: str, K: int, N: int, R: int, *, backward: bool = False, **constants: bool) -> Launch:
    """A tile of K * R channels x N states with all optional inputs, as the launcher makes them; `io` is that of u."""
    wide = "*fp64" if io == "fp64" else "*fp32"
    names = ("A", "D", "bias", "lower", "upper", "chunk", "carry", "start", "scratch", "last", "factor", "term")
    sums = ("dA", "dB", "dC", "dD", "dbias", "dstart")
    types = SELECTIVE | {f"{name}_ptr": wide for name in names + sums} | {"changed_ptr": "*i32"}
    given = dict.fromkeys(("HAS_D", "HAS_Z", "HAS_BIAS", "HAS_START", "HAS_CARRY", "SOFTPLUS"), True)
    given |= dict.fromkeys(("COMPLEX", "CONSTANT_B", "CONSTANT_C", "HAS_BACKWARD", "COUNT"), False) | constants
    if given["COMPLEX"]:
        types |= {"B_ptr": wide, "C_ptr": wide}
    all_registers = backward or any(given[name] for name in ("COUNT", "COMPLEX", "CONSTANT_B", "CONSTANT_C"))
    return Launch({"K": K, "N": N, "R": R} | given, types, (io,), warps=1, registers=255 if all_registers else None)


def ssd(io: str, P: int, K: int, N: int, R: int, **constants: bool) -> Launch:
    """A tile of K * R channels (heads of P) x N states, as the launcher makes them."""
    tile = {"STAGES": 4, "SUB": 4, "P": P, "K": K, "N": N, "R": R}
    tile |= {"HAS_BACKWARD": False, "HAS_Z": False, "COUNT": False}
    types = SSD | {"changed_ptr": "*i32"}
    return Launch(tile | constants, types, (io,), warps=1, registers=255 if "HAS_CARRY" in constants else None)


def linear(io_types: tuple[str, ...], **constants: bool) -> Launch:
    """Rows with an initial state, as the launcher makes them."""
    given = {"STAGES": 4, "ROWS": 32, "HAS_FIRST": True, "COMPLEX": False, "COUNT": False}
    return Launch(given | constants, LINEAR, io_types, warps=1, registers=255)


GRAPHS = integers(
    *("nodes", "pairs", "steps", "top_k", "w_item", "w_pair", "w_step", "g_item", "g_step", "g_row", "g_column")
) | {"picks_ptr": "*u8"}

NORM = integers("rows", "width", "part", "rows_per_program", "grad_row", "y_row", "z_row")
CG = integers("n", "columns", "matrix_elements", "block_elements", "maxiter", "rtol_stride", "atol_stride")


def cg(io: str, N: int, ROWS: int, **constants: int) -> Launch:
    """Systems of N unknowns, read ROWS rows at a time; `io` is that of the real and imaginary parts."""
    index = {f"{of}{name}_ptr": "*i64" for of in ("", "adjoint_") for name in ("crow", "col")}
    types = CG | index | {"info_ptr": "*i32", "iterations_ptr": "*i32"}
    warps = max(1, N // 128, 1 if constants.get("SPARSE") else 4)
    return Launch({"WIDE": WIDE, "N": N, "ROWS": ROWS} | constants, types, (io,), warps=warps)


COLUMNS = dict.fromkeys(
    (f"{name}_ptr" for name in ("owners", "starts", "sizes", "rows", "gradients", "tensors", "streams", "offsets")),
    "*i64",
) | {"owners_ptr": "*i32"}  # of `tensor_lists`
COUNTS = {"nan_ptr": "*i32", "inf_ptr": "*i32"}
STATS = ("low_ptr", "high_ptr", "sum_ptr")
REALS_OF_LISTS = {"float32": True, "float64": True, "float16": True, "bfloat16": False}  # whether aligned
ADAMW_SCALARS = ("lr_ptr", "temperature_ptr", "found_inf_ptr", "grad_scale_ptr")


def lists(
    aligned: dict[str, bool], block: int, *doubles: str, registers: int | None = None, **constants: bool
) -> tuple[Launch, ...]:
    """A launch for each dtype of the listed tensors; its registers are counted as those of float64 if it is that."""
    types = COLUMNS | COUNTS | dict.fromkeys(doubles, "*fp64")
    return tuple(
        Launch(
            {"TYPE": Dtype(name), "ALIGNED": is_aligned, "BLOCK": block} | constants,
            types,
            ("fp64" if name == "float64" else "fp32",),
            registers=registers,
        )
        for name, is_aligned in aligned.items()
    )


def adamw(io: str, kind: int, **constants: bool) -> Launch:
    """Units of one kind with gradients of type `io`, as the launcher makes them."""
    given = dict.fromkeys(("GIVEN", "LARGEST", "ROUNDED", "SCALES", "MAXIMIZE", "SHIFTED"), False)
    given |= dict.fromkeys(("NOISY", "SKIPS", "ALIGNED"), True) | constants
    grad = {"fp32": "float32", "fp64": "float64", "fp16": "float16", "bf16": "bfloat16"}[io]
    members = ("values", "grads", "exp_avgs", "squares", "largest", "rounded", "normals", "steps")
    types = COLUMNS | {f"{name}_ptr": "*i64" for name in members} | dict.fromkeys(ADAMW_SCALARS, "*fp64")
    types |= {"rates_ptr": "*fp64" if io == "fp64" else "*fp32"}
    block = 512 if kind in (1, 2) else 1024
    return Launch({"GRAD": Dtype(grad), "KIND": kind, "BLOCK": block} | given, types, (io,), registers=255)


LAUNCHES = {
    "assemble_adjacency_fwd_kernel": (
        Launch({"NODES": 32, "STEPS": 2, "ALL": False, "WIDE": WIDE}, GRAPHS),
        Launch({"NODES": 64, "STEPS": 1, "ALL": False, "WIDE": WIDE}, GRAPHS, REAL, warps=16),
        Launch({"NODES": 4, "STEPS": 16, "ALL": True, "WIDE": WIDE}, GRAPHS, ("fp32",)),
    ),
    "assemble_adjacency_bwd_kernel": (
        Launch({"NODES": 32, "STEPS": 2, "WIDE": WIDE}, GRAPHS),
        Launch({"NODES": 64, "STEPS": 1, "WIDE": WIDE}, GRAPHS, REAL, warps=16),
    ),
    **{
        f"causal_conv1d_{way}_kernel": tuple(
            Launch({"HAS_BIAS": True, "SILU": True, "WIDTH": width, "BLOCK_C": c, "BLOCK_T": t}, CONV, REAL)
            for width, c, t in ((4, 64, 8), (4, 4, 128), (3, 4, 128))
        )
        for way in ("fwd", "bwd")
    },
    "cg_fwd_kernel": (
        cg("fp32", 64, 64, METHOD=0, PARTS=1, HAS_START=False, SIZE=0, SPARSE=False),
        cg("fp32", 64, 32, METHOD=1, PARTS=2, HAS_START=True, SIZE=4, SPARSE=False),
        cg("fp32", 1024, 4, METHOD=2, PARTS=1, HAS_START=True, SIZE=0, SPARSE=False),
        cg("fp64", 64, 32, METHOD=0, PARTS=1, HAS_START=True, SIZE=1, SPARSE=False),
        cg("fp32", 256, 16, METHOD=0, PARTS=1, HAS_START=False, SIZE=1, SPARSE=True),
        cg("fp32", 256, 8, METHOD=1, PARTS=2, HAS_START=False, SIZE=4, SPARSE=True),
        cg("fp32", 1024, 4, METHOD=0, PARTS=1, HAS_START=False, SIZE=0, SPARSE=True),
    ),
    "cg_bwd_kernel": (
        cg("fp32", 64, 64, METHOD=0, PARTS=1),
        cg("fp32", 64, 32, METHOD=1, PARTS=2),
        cg("fp64", 64, 32, METHOD=2, PARTS=1),
    ),
    "cg_csr_bwd_kernel": tuple(
        Launch(
            {"PARTS": parts, "WIDE": WIDE, "BLOCK": 256},
            CG | {"row_ptr": "*i64", "col_ptr": "*i64", "nnz": "i32"},
            REAL,
        )
        for parts in (1, 2)
    ),
    "covariance_blend_fwd_kernel": tuple(
        Launch(
            {**TILES, "PARTS": parts, "HAS_SAMP": full, "HAS_WEIGHTS": full, "WIDTH": 256},
            {**TILE_TYPES, "table_ptr": "*i32"},
            REAL,
        )
        for parts, full in ((2, True), (1, False))
    ),
    "covariance_blend_status_kernel": (Launch(TILES, {**TILE_TYPES, "table_ptr": "*i32"}, REAL),),
    "covariance_blend_bwd_kernel": tuple(
        Launch({**TILES, "PARTS": parts, "BY_PRED": True, "HAS_SAMP": full, "HAS_WEIGHTS": full}, TILE_TYPES, REAL)
        for parts, full in ((2, True), (1, False))
    ),
    "covariance_blend_diagonal_kernel": (
        Launch({**TILES, "BY_PRED": True, "BY_WEIGHTS": True, "HAS_WEIGHTS": True}, TILE_TYPES, REAL),
    ),
    "state_update_kernel": tuple(
        Launch({"WIDE": WIDE, "ROWS": rows, "N": 16, "COMPLEX": is_complex, **STATE_UPDATE}, STATE_UPDATE_TYPES, io)
        for rows, is_complex, io in (
            (64, False, ("fp32",)),
            (32, False, ("fp64",)),
            (32, True, ("fp32",)),
            (16, True, ("fp64",)),
        )
    ),
    "cayley_step_apply_kernel": tuple(
        Launch({**MATRIX, "CONJUGATE": conjugate}, integers("tokens", "nodes"), REAL, 8) for conjugate in (False, True)
    ),
    "cayley_step_edges_kernel": (Launch({**MATRIX, "SHARE": 1024}, integers("tokens", "nodes"), REAL),),
    "scan_join_kernel": (
        Launch({"HAS_FIRST": True, "FACTOR_PER_ROW": True, "REVERSE": False, "BLOCK": 128}, JOIN, REAL),
        Launch({"HAS_FIRST": False, "FACTOR_PER_ROW": False, "REVERSE": True, "BLOCK": 128}, JOIN, REAL),
    ),
    # The streams of the detector (16 heads of 8, 16 states; 8 heads of 4, 8 states), and a large state.
    **{
        f"ssd_scan_{name}_kernel": tuple(Launch(SSD_STEPS | {"SOFTPLUS": yes}, SSD, REAL) for yes in (True, False))
        for name in ("steps", "through_steps")
    },
    "ssd_scan_segment_kernel": (
        ssd("fp32", 8, 4, 16, 8, REVERSE=False, HAS_BACKWARD=True),
        ssd("fp64", 4, 4, 8, 8, REVERSE=True, HAS_Z=True),
    ),
    "ssd_scan_fwd_kernel": (
        ssd("fp32", 8, 4, 16, 8, HAS_D=True, HAS_CLAMP=False, HAS_START=True, FULL=True),
        ssd("fp32", 4, 4, 8, 8, HAS_D=True, HAS_CLAMP=True, HAS_START=True, FULL=True, HAS_BACKWARD=True),
        ssd("fp32", 4, 1, 128, 4, HAS_D=False, HAS_CLAMP=True, HAS_START=False, FULL=False),
        ssd("fp64", 8, 2, 16, 8, HAS_D=True, HAS_CLAMP=True, HAS_START=True, FULL=False),
        ssd("fp32", 8, 4, 16, 8, HAS_D=True, HAS_CLAMP=False, HAS_START=True, FULL=True, HAS_Z=True),
        ssd("fp32", 8, 2, 16, 8, HAS_D=True, HAS_CLAMP=True, HAS_START=True, FULL=True, HAS_Z=True, COUNT=True),
    ),
    "ssd_scan_bwd_kernel": (
        ssd("fp32", 8, 2, 16, 8, HAS_D=True, HAS_CLAMP=False, HAS_CARRY=True, FULL=True),
        ssd("fp32", 8, 1, 16, 8, HAS_D=True, HAS_CLAMP=False, HAS_CARRY=True, FULL=True, HAS_BACKWARD=True),
        ssd("fp32", 4, 2, 8, 8, HAS_D=True, HAS_CLAMP=True, HAS_CARRY=True, FULL=True, HAS_BACKWARD=True),
        ssd("fp32", 2, 1, 128, 2, HAS_D=True, HAS_CLAMP=False, HAS_CARRY=False, FULL=False),
        ssd("fp64", 4, 1, 16, 4, HAS_D=True, HAS_CLAMP=True, HAS_CARRY=True, FULL=False),
        ssd("fp32", 8, 1, 16, 8, HAS_D=True, HAS_CLAMP=True, HAS_CARRY=True, FULL=True, HAS_BACKWARD=True, HAS_Z=True),
    ),
    "selective_scan_segment_kernel": (
        selective("fp32", 2, 16, 8, REVERSE=False),
        selective("bf16", 1, 16, 8, REVERSE=True),
        selective("fp64", 1, 16, 2, REVERSE=True, HAS_BACKWARD=True),
    ),
    "selective_scan_fwd_kernel": (
        selective("fp32", 2, 16, 8, HAS_CLAMP=False, FULL=True),
        selective("bf16", 2, 16, 8, HAS_CLAMP=True, FULL=False),
        selective("fp64", 1, 16, 8, HAS_CLAMP=True, FULL=True),
        selective("fp32", 1, 16, 8, HAS_CLAMP=True, FULL=False, COMPLEX=True),
        selective("fp32", 1, 16, 8, HAS_CLAMP=False, FULL=True, CONSTANT_B=True, CONSTANT_C=True),
        selective("fp32", 2, 16, 8, HAS_CLAMP=False, FULL=True, HAS_BACKWARD=True),
        selective("fp32", 2, 16, 8, HAS_CLAMP=True, FULL=True, HAS_BACKWARD=True, COUNT=True),
        selective("fp32", 1, 16, 8, HAS_CLAMP=True, FULL=False, COMPLEX=True, HAS_BACKWARD=True, COUNT=True),
    ),
    "selective_scan_bwd_kernel": (
        selective("fp32", 1, 16, 8, backward=True, HAS_CLAMP=False, FULL=True),
        selective("bf16", 1, 16, 8, backward=True, HAS_CLAMP=True, FULL=False),
        selective("fp64", 1, 16, 1, backward=True, HAS_CLAMP=True, FULL=True),
        selective("fp32", 1, 16, 1, backward=True, HAS_CLAMP=True, FULL=False, COMPLEX=True),
        selective("fp32", 1, 16, 4, backward=True, HAS_CLAMP=False, FULL=True, CONSTANT_B=True, CONSTANT_C=True),
        selective("fp32", 1, 16, 8, backward=True, HAS_CLAMP=False, FULL=True, HAS_BACKWARD=True),
        selective("fp32", 1, 16, 8, backward=True, HAS_CLAMP=True, FULL=False, HAS_BACKWARD=True),
        selective("fp32", 1, 16, 1, backward=True, HAS_CLAMP=True, FULL=False, COMPLEX=True, HAS_BACKWARD=True),
    ),
    "linear_scan_fwd_kernel": (
        linear(("fp32",), HAS_CLAMP=False, REVERSE=False),
        linear(("fp64",), HAS_CLAMP=True, REVERSE=True),
        linear(REAL, HAS_CLAMP=True, REVERSE=True, COUNT=True),
        linear(("fp32",), HAS_CLAMP=False, REVERSE=False, COMPLEX=True),
        linear(REAL, HAS_CLAMP=True, REVERSE=True, COMPLEX=True, COUNT=True),
    ),
    "linear_scan_bwd_kernel": (
        linear(("fp32",), HAS_CLAMP=False, REVERSE=False),
        linear(REAL, HAS_CLAMP=True, REVERSE=True),
        linear(("fp32",), HAS_CLAMP=False, REVERSE=False, COMPLEX=True),
        linear(REAL, HAS_CLAMP=True, REVERSE=True, COMPLEX=True),
    ),
    **{
        f"cosine_edges_{way}_kernel": (
            Launch({**VECTORS, "CENTRE": False}, STRIDES, ("fp32",)),
            Launch({**VECTORS, "CENTRE": True}, STRIDES | WIDE_PAIRS, ("bf16",)),
            Launch({**VECTORS, "FEATURES": 32, "CENTRE": True}, STRIDES, ("fp64",)),
        )
        for way in ("fwd", "bwd")
    },
    "complex_adamw_rates_kernel": (
        Launch(
            {"MEMBERS": 2, "NOISY": True, "SKIPS": True, "BLOCK": 128},
            {"steps_ptr": "*i64", "units": "i32"} | dict.fromkeys(ADAMW_SCALARS, "*fp64"),
            REAL,
        ),
    ),
    "complex_adamw_kernel": (
        adamw("fp32", 0),
        adamw("fp32", 0, NOISY=False, SKIPS=False),
        adamw("fp32", 1),
        adamw("fp32", 1, LARGEST=True, SCALES=True, MAXIMIZE=True, ALIGNED=False, SHIFTED=True),
        adamw("fp32", 2, GIVEN=True),
        adamw("fp32", 4),
        adamw("bf16", 0, ROUNDED=True),
        adamw("fp16", 2, ROUNDED=True, LARGEST=True),
        adamw("fp64", 0),
        adamw("fp64", 1, LARGEST=True, SCALES=True),
    ),
    "gradient_norms_blocks_kernel": lists(REALS_OF_LISTS, 2048, "norms_ptr", registers=255),
    "gradient_norms_kernel": (
        Launch({"BLOCK": 1024}, COLUMNS | {"parts_ptr": "*fp64", "norms_ptr": "*fp64"}, ("fp32",), registers=255),
    ),
    "multiply_gradients_kernel": lists(REALS_OF_LISTS, 2048, "factor_ptr"),
    "finite_stats_blocks_kernel": (
        *lists(REALS_OF_LISTS | {"int64": False, "int8": False}, 2048, *STATS, COMPLEX=False),
        *lists({"float32": True, "float64": True}, 1024, *STATS, COMPLEX=True),
    ),
    "finite_stats_kernel": (
        Launch(
            {"BLOCK": 512},
            COLUMNS
            | COUNTS
            | dict.fromkeys(STATS, "*fp64")
            | {f"{name[:-4]}_out_ptr": "*fp64" for name in STATS}
            | {"nan_out_ptr": "*i64", "inf_out_ptr": "*i64"},
            ("fp32",),
        ),
    ),
    "philox_normal_kernel": (Launch({"BLOCK": 1024}, {"step_ptr": "*i64"}, REAL),),
    "tensor_lists_write_kernel": (Launch({}, {"column_ptr": "*i64", "words": ("i64",) * 64}, ("fp32",), warps=1),),
    **{
        f"gated_rms_norm_{way}_kernel": (
            Launch({"ROWS": 32, "PART": 32, "WIDE": WIDE}, NORM, REAL, 8, registers),
            Launch({"ROWS": 8, "PART": 128, "WIDE": WIDE}, NORM, ("fp32",), 8, registers),
            Launch({"ROWS": 1, "PART": 1024, "WIDE": WIDE}, NORM, REAL, 8, registers),
        )
        for way, registers in (("fwd", None), ("bwd", 255))
    },
    "focal_loss_fwd_kernel": (
        Launch({"BY_LOGITS": True, "BY_TARGETS": True, "HAS_GAMMA": True, **ELEMENTWISE}, {"n": "i32"}),
        Launch({"BY_LOGITS": False, "BY_TARGETS": False, "HAS_GAMMA": False, **ELEMENTWISE}, {"n": "i32"}),
    ),
}


def kernels() -> dict[str, Any]:
    """Everything in `stablekern.triton_kernels` whose name ends in `_kernel`."""
    import stablekern.triton_kernels as package

    modules = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}


def signature(kernel: Any, launch: Launch, io: str) -> dict[str, Any]:
    types: dict[str, Any] = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr:
            types[name] = "constexpr"
        elif kind := launch.types.get(name) or parameter.annotation_type:
            types[name] = kind
        elif name.endswith("_ptr"):
            types[name] = f"*{io}"
        else:
            raise TypeError(f"`{name}` needs an annotation in the kernel, or a type in LAUNCHES if it is an integer")
    return types


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, bytes of stack (spills live there) and of static shared memory."""
    import triton

    tool = triton.knobs.nvidia.cuobjdump.path
    path = Path(os.environ["STABLEKERN_COMPILE_SCRATCH"]) / f"{os.getpid()}.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {key.lower(): int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def compile_one(case: tuple[str, int, str, int]) -> dict[str, Any]:
    name, number, io, target = case
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget

    row: dict[str, Any] = {"kernel": name, "launch": number, "io": io, "target": target}
    kernel, launch = kernels()[name], LAUNCHES[name][number]
    wide = tl.float64 if io == "fp64" else tl.float32
    given = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    constants = {key: wide if value == WIDE else value for key, value in launch.constants.items() if key in given}
    constants |= {key: getattr(tl, value.name) for key, value in constants.items() if isinstance(value, Dtype)}
    try:
        source = triton.compiler.ASTSource(kernel, signature(kernel, launch, io), constants)
        options = {"num_warps": launch.warps, "enable_fp_fusion": True}
        options |= {} if launch.registers is None else {"maxnreg": launch.registers}
        binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        row |= {"dynamic_shared": binary.metadata.shared, **resources(binary.asm["cubin"])}
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return row


def main() -> None:
    found = kernels()
    rows: list[dict[str, Any]] = [
        {"kernel": name, "error": "not in LAUNCHES" if name in found else "in LAUNCHES, but no such kernel exists"}
        for name in sorted(found.keys() ^ LAUNCHES.keys())
    ]
    cases = [
        (name, number, io, target)
        for name in sorted(found.keys() & LAUNCHES.keys())
        for number, launch in enumerate(LAUNCHES[name])
        for io, target in itertools.product(launch.io_types, TARGETS)
    ]
    with ProcessPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        rows += pool.map(compile_one, cases, chunksize=5)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
