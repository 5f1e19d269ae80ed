"""Compile and launch the CUDA C++ kernels of `csrc/cuda`: NVRTC and the driver, through cuda-bindings.

torch's CUDA builds install cuda-bindings and carry NVRTC, so a GPU machine needs no toolkit and no compiler. A kernel
is compiled for one GPU architecture and one set of macros when it is first wanted (about a second), and kept: the
binary in the cache directory of `stablekern._build`, under a hash of sources, options, architecture and compiler; the
loaded function per device and process. Compiling needs no GPU.

Launches go to torch's current stream and synchronise nothing. A kernel that is already loaded can be captured into a
CUDA graph; loading one cannot, so the first call, for each size and dtype, must be made before the capture.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stablekern import _build, settings
from stablekern.errors import BuildError, message

__all__ = ["compiled", "launch", "options", "target", "version"]

# No fast-math: NaN and infinities must keep their meaning.
FLAGS = ("-std=c++17", "--fmad=true", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")
_lock = threading.RLock()


def version() -> tuple[str | None, str | None]:
    """(NVRTC's version, None), or (None, why it cannot be used). Asking loads the library."""
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
    except ImportError:
        return None, "cuda-bindings is not installed; it comes with the CUDA builds of torch"
    try:
        error, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as cause:  # cuda-bindings raises it where it cannot load the library
        return None, f"the NVRTC library cannot be loaded: {cause}"
    if int(error) != 0:
        return None, f"the NVRTC library does not answer: {error}"
    return f"{major}.{minor}", None


def _nvrtc() -> Any:
    reason = version()[1]
    if reason is not None:
        raise BuildError(message("build", "CUDA kernels cannot be compiled", reason))
    return importlib.import_module("cuda.bindings.nvrtc")


def _done(what: str, answer: tuple[Any, ...]) -> Any:
    """What a call of cuda-bindings returns behind its error code: one value or none."""
    if int(answer[0]) != 0:
        raise BuildError(message("cuda", f"{what} failed", getattr(answer[0], "name", answer[0])))
    return answer[1] if len(answer) > 1 else None


def target(capability: tuple[int, int]) -> str:
    """The architecture to compile for on a device: its own, or what runs on it of those that this NVRTC knows.

    A binary runs on later minor versions of its generation; on a later generation only PTX does, which the driver
    compiles.
    """
    known = sorted(_done("nvrtcGetSupportedArchs", _nvrtc().nvrtcGetSupportedArchs()))
    own = 10 * capability[0] + capability[1]
    below = [arch for arch in known if arch <= own]
    if not below:
        raise BuildError(message("build", f"this NVRTC compiles for sm_{known[0]} and later", f"sm_{own}"))
    return f"{'sm' if below[-1] // 10 == capability[0] else 'compute'}_{below[-1]}"


def options(function: str, macros: Mapping[str, object], arch: str) -> list[str]:
    """NVRTC's command line for one kernel of a file. The macro of a kernel's name in capitals asks for that kernel."""
    defined = {f"SK_{function.upper()}": 1, **macros}
    return [f"--gpu-architecture={arch}", *FLAGS, *(f"-D{name}={value}" for name, value in defined.items())]


def compiled(source: str, function: str, macros: Mapping[str, object], arch: str) -> bytes:
    """The binary of kernel `function` of `csrc/cuda/<source>`, from the cache or compiled now.

    A cubin for an `arch` such as "sm_89", PTX for "compute_89". Raises `BuildError` with the compiler's log.
    """
    root = _build.source_root() / "cuda"
    arguments = options(function, macros, arch)
    digest = hashlib.sha256(f"{version()[0]}\0{source}\0".encode())
    for part in arguments:
        digest.update(part.encode() + b"\0")
    for path in (root / source, *sorted(root.glob("*.h"))):
        digest.update(path.read_bytes() + b"\0")
    directory = _build.cache_directory(settings.get("STABLEKERN_CACHE_DIR"))
    final = directory / f"cuda-{function}-{digest.hexdigest()[:20]}.bin"
    if _build.private(final):
        return final.read_bytes()
    binary = _compile(root / source, [*arguments, f"-I{root}"], cubin=arch.startswith("sm_"))
    # Whole or not at all, whoever else writes it: the same name means the same content.
    with tempfile.NamedTemporaryFile(dir=directory, prefix=f"{final.name}.", suffix=".partial", delete=False) as file:
        file.write(binary)
    os.replace(file.name, final)
    return binary


def _compile(path: Path, arguments: Sequence[str], *, cubin: bool) -> bytes:
    nvrtc = _nvrtc()
    program = _done("nvrtcCreateProgram", nvrtc.nvrtcCreateProgram(path.read_bytes(), path.name.encode(), 0, [], []))
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(arguments), [text.encode() for text in arguments])[0]
        if int(status) != 0:
            log = bytearray(_done("nvrtcGetProgramLogSize", nvrtc.nvrtcGetProgramLogSize(program)))
            nvrtc.nvrtcGetProgramLog(program, log)
            text = bytes(log).rstrip(b"\0").decode(errors="replace").strip()
            raise BuildError(message("build", f"NVRTC cannot compile {path.name} ({' '.join(arguments)})", text))
        sizes, contents = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN) if cubin else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        binary = bytearray(_done("nvrtcGetCUBINSize", sizes(program)))
        if int(contents(program, binary)[0]) != 0:
            raise BuildError(message("build", f"NVRTC gives no binary of {path.name}", status))
        return bytes(binary)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _driver() -> Any:
    return importlib.import_module("cuda.bindings.driver")


@functools.cache
def _context(device: int) -> Any:
    """The device's primary context, which torch works in."""
    driver = _driver()
    _done("cuInit", driver.cuInit(0))
    return _done(
        "cuDevicePrimaryCtxRetain", driver.cuDevicePrimaryCtxRetain(_done("cuDeviceGet", driver.cuDeviceGet(device)))
    )


_loaded: dict[tuple[Any, ...], Any] = {}


def _function(source: str, function: str, macros: tuple[tuple[str, object], ...], device: int) -> Any:
    """The loaded kernel; the device's context must be current."""
    key = (source, function, macros, device)
    if key in _loaded:
        return _loaded[key]
    with _lock:
        if key not in _loaded:
            if torch.cuda.is_current_stream_capturing():
                rule = f"`{function}` must run once, at this size and dtype, before it is captured into a CUDA graph"
                raise RuntimeError(message("cuda", rule))
            driver = _driver()
            arch = target(torch.cuda.get_device_capability(device))
            binary = compiled(source, function, dict(macros), arch)
            module = _done("cuModuleLoadData", driver.cuModuleLoadData(binary))
            found = _done("cuModuleGetFunction", driver.cuModuleGetFunction(module, function.encode()))
            _done("cuFuncLoad", driver.cuFuncLoad(found))  # lazily loaded code could not be captured
            _loaded[key] = found
    return _loaded[key]


def launch(
    source: str,
    function: str,
    macros: Mapping[str, object],
    *,
    device: torch.device,
    blocks: int,
    threads: int,
    arguments: Sequence[Any],
) -> None:
    """Launch kernel `function` of `csrc/cuda/<source>` on torch's current stream of `device`.

    `arguments` are contiguous tensors or None (pointers), and ctypes scalars of the very types of the parameters.
    """
    driver = _driver()
    values, types = [], []
    for argument in arguments:
        pointer = argument is None or isinstance(argument, Tensor)
        values.append((0 if argument is None else argument.data_ptr()) if pointer else argument.value)
        types.append(ctypes.c_void_p if pointer else type(argument))
    index = torch.cuda.current_device() if device.index is None else device.index
    # A thread that has made no CUDA call yet has no current context.
    _done("cuCtxPushCurrent", driver.cuCtxPushCurrent(_context(index)))
    try:
        kernel = _function(source, function, tuple(macros.items()), index)
        stream = torch.cuda.current_stream(device).cuda_stream
        parameters = (tuple(values), tuple(types))
        answer = driver.cuLaunchKernel(kernel, blocks, 1, 1, threads, 1, 1, 0, stream, parameters, 0)
        _done(f"the launch of {function}", answer)
    finally:
        driver.cuCtxPopCurrent()
