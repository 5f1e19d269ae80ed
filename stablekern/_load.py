"""Lazy loading of what ops run on. Each attempt is made once per process; a failure is kept with its reason."""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import stat
import sys
import threading
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from stablekern import _build, _nvrtc, settings
from stablekern.errors import BackendUnavailableError, BuildError, message

# How "csrc/include/stablekern/exchange.h" numbers the types of real numbers.
NUMBER_TYPES = {
    torch.float32: 0,
    torch.complex64: 0,
    torch.float64: 1,
    torch.complex128: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
}

__all__ = ["cuda_reason", "native", "native_module", "native_reason", "triton_reason"]

_lock = threading.RLock()
_loaded: set[str] = set()  # parts of the native library


@functools.cache
def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


@functools.cache
def _attempt(cache: str | None, march: str, parts: tuple[str, ...]) -> str | None:
    """Load these parts of the native library, built now if need be; why that is impossible, or None."""
    try:
        for part, path in _build.build(cache, march, parts).items():
            if part == "core":
                loader = importlib.machinery.ExtensionFileLoader("stablekern._native", str(path))
                spec = importlib.util.spec_from_file_location("stablekern._native", path, loader=loader)
                module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
                loader.exec_module(module)
                sys.modules["stablekern._native"] = module
            elif path.name != Path(sys.modules["stablekern._native"].__file__ or "").name:  # else it holds all parts
                ctypes.CDLL(str(path))  # registers its ops with the dispatcher
            _loaded.add(part)
    except (BuildError, ImportError, OSError) as error:
        reason = str(error).removeprefix("stablekern.build: ")
        _warn(reason)
        return reason
    return None


@functools.cache
def _warn(reason: str) -> None:
    text = message("native", "the CPU kernels are not available, plain torch runs instead (slower)", reason)
    warnings.warn(text, RuntimeWarning, stacklevel=2)


@functools.cache
def _not_built(cache: str | None, march: str, parts: tuple[str, ...]) -> str | None:
    """None if the libraries are in the cache, else why not; asked once, since the compiler has to be run for it."""
    try:
        found = all(_build.find(cache, march, part) for part in parts)
    except BuildError as error:
        return str(error).removeprefix("stablekern.build: ")
    return None if found else "not built yet; the first call that wants them builds them"


def native_reason(op: str | None = None, *, build: bool = True) -> str | None:
    """None once the native kernels of `op` (None: of all ops) are loaded, else why they cannot be.

    `op` is the name of an op or of one of its kernels. The first call builds the part that holds it, if `build`.
    """
    if not settings.get("STABLEKERN_NATIVE"):
        return "switched off by STABLEKERN_NATIVE"
    if _torch_version() < (2, 10):
        return f"torch >= 2.10 is needed, found {torch.__version__}"
    parts = tuple(_build.PARTS) if op is None else _needed(_build.part_of(op))
    if _loaded.issuperset(parts):
        return None
    cache, march = settings.get("STABLEKERN_CACHE_DIR"), settings.get("STABLEKERN_MARCH")
    with _lock:
        missing = tuple(part for part in parts if part not in _loaded)
        if not build and missing and (absent := _not_built(cache, march, missing)):
            return absent
        return _attempt(cache, march, missing) if missing else None


@functools.cache
def _needed(part: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(("core", part)))


class _Kernels:
    """`torch.ops.stablekern_native`, each op with the part of the library that holds it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # what Python and inspection ask any object for
            raise AttributeError(name)
        if (reason := native_reason(name)) is not None:
            raise BackendUnavailableError(message("native", f"the CPU kernels are not available ({reason})"))
        found = getattr(torch.ops.stablekern_native, name)
        setattr(self, name, found)  # found without this function from now on
        return found


_kernels = _Kernels()


def native() -> Any:
    """The native kernels by their names; the first use of one loads what holds it, or raises."""
    return _kernels


def native_module() -> ModuleType:
    """`stablekern._native`: facts of the build, and C++ internals for tests."""
    if "stablekern._native" not in sys.modules:
        _ = native().gradient_norms  # of the same part
    return sys.modules["stablekern._native"]


def triton_reason(device: str) -> str | None:
    """None if Triton kernels can run on `device` ("cpu": in Triton's interpreter, when it is switched on)."""
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "on a CPU only under TRITON_INTERPRET=1"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return _triton_cache_reason(os.environ.get("TRITON_CACHE_DIR"), os.environ.get("TRITON_HOME"))


@functools.cache
def _triton_cache_reason(cache: str | None, home: str | None) -> str | None:
    """Triton loads libraries from its cache and makes it with the umask, so it is looked at first."""
    folder = Path(cache).expanduser() if cache else Path(home or Path.home()) / ".triton" / "cache"
    if folder.exists():
        facts = folder.stat()
        if facts.st_uid not in (os.getuid(), 0):
            return f"Triton's cache {folder} belongs to another user ({facts.st_uid}); set TRITON_CACHE_DIR"
        if facts.st_mode & stat.S_IWOTH:
            return f"anybody can write into Triton's cache {folder}; set TRITON_CACHE_DIR"
    there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
    if open_to_all := _build.open_folder(there.resolve()):
        return f"anybody may replace Triton's cache in {open_to_all}; set TRITON_CACHE_DIR"
    return None


def cuda_reason() -> str | None:
    """None if CUDA C++ kernels can be compiled (NVRTC) and run."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _nvrtc_reason()


@functools.cache
def _nvrtc_reason() -> str | None:
    return _nvrtc.version()[1]
