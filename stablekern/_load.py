"""Lazy loading of what ops run on. Each attempt is made once per process; a failure is kept with its reason."""

from __future__ import annotations

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

__all__ = ["cuda_reason", "native", "native_module", "native_reason", "triton_reason"]

_lock = threading.RLock()


@functools.cache
def _torch_version() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


@functools.cache
def _attempt(cache: str | None, march: str) -> tuple[ModuleType | None, str | None]:
    try:
        path = _build.build(cache, march)
        loader = importlib.machinery.ExtensionFileLoader("stablekern._native", str(path))
        spec = importlib.util.spec_from_file_location("stablekern._native", path, loader=loader)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        loader.exec_module(module)
        sys.modules["stablekern._native"] = module
        return module, None
    except (BuildError, ImportError, OSError) as error:
        reason = str(error).removeprefix("stablekern.build: ")
        warnings.warn(
            message("native", "the CPU kernels are not available, plain torch runs instead (slower)", reason),
            RuntimeWarning,
            stacklevel=2,
        )
        return None, reason


@functools.cache
def _not_built(cache: str | None, march: str) -> str | None:
    """None if the library is in the cache, else why it is not; asked once, since the compiler has to be run for it."""
    try:
        found = _build.find(cache, march)
    except BuildError as error:
        return str(error).removeprefix("stablekern.build: ")
    return None if found else "not built yet; the first call that wants them builds them"


def native_reason(*, build: bool = True) -> str | None:
    """None once the native kernels are loaded, else why they cannot be. The first call builds them, if `build`."""
    if not settings.get("STABLEKERN_NATIVE"):
        return "switched off by STABLEKERN_NATIVE"
    if _torch_version() < (2, 10):
        return f"torch >= 2.10 is needed, found {torch.__version__}"
    cache, march = settings.get("STABLEKERN_CACHE_DIR"), settings.get("STABLEKERN_MARCH")
    with _lock:
        if not build and "stablekern._native" not in sys.modules and (absent := _not_built(cache, march)):
            return absent
        return _attempt(cache, march)[1]


def native() -> Any:
    """The dispatcher namespace of the native kernels, `torch.ops.stablekern_native`."""
    if "stablekern._native" in sys.modules:
        return torch.ops.stablekern_native
    reason = native_reason()
    if reason is not None:
        raise BackendUnavailableError(message("native", f"the CPU kernels are not available ({reason})"))
    return torch.ops.stablekern_native


def native_module() -> ModuleType:
    """`stablekern._native`: facts of the build, and C++ internals for tests."""
    native()
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
