"""Which code runs an op: schemas, launchers, and the choice between them.

An op is defined once (`define`), with a schema and a fake implementation, in the dispatcher namespace `stablekern`.
Launchers for it are registered per device and backend (`launcher`). The choice is made inside the op, on real
tensors, so traced graphs do not depend on it:

- forced (`use_backend`, or STABLEKERN_BACKEND): that backend or `BackendUnavailableError` with the reason;
- otherwise the best one that is present and supports the arguments. Absence is passed over; an exception raised by a
  kernel never is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from stablekern import _check, _load, settings
from stablekern.errors import BackendUnavailableError, message

__all__ = [
    "apply",
    "available_backends",
    "backend_for",
    "define",
    "direct",
    "explain",
    "is_watched",
    "launcher",
    "ops",
    "use_backend",
]

# Best first. Triton on a CPU is its interpreter: only for tests, never chosen by itself.
_ORDER = {"cpu": ("native", "torch", "triton"), "cuda": ("cuda", "triton", "torch")}
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
_library = torch.library.Library("stablekern", "DEF")


class _Launcher(NamedTuple):
    function: Callable[..., Any]
    supports: Callable[..., str | None] | None


_launchers: dict[str, dict[str, dict[str, _Launcher]]] = {}
_forced: str | None = None


def define(schema: str, *, fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define `stablekern::<schema>` and return the callable op. Nothing runs until launchers are registered."""
    name = schema.partition("(")[0]
    _library.define(schema)
    _launchers[name] = {device: {} for device in _ORDER}
    for device, key in _KEYS.items():
        _library.impl(name, functools.partial(_run, name, device), key)
    torch.library.register_fake(f"stablekern::{name}", fake, lib=_library)
    return getattr(torch.ops.stablekern, name).default


def launcher(
    op: str, *, device: str, backend: str, supports: Callable[..., str | None] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function to run `op` on `device` by `backend`.

    `supports(*arguments)` returns None if it can run them, else the reason why not.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _launchers[op][device][backend] = _Launcher(function, supports)
        return function

    return register


def _missing(op: str, backend: str, device: str, *, build: bool = True) -> str | None:
    """Why a backend cannot run `op` at all on this machine, or None."""
    if backend == "native":
        return _load.native_reason(op, build=build)
    if backend == "triton":
        return _load.triton_reason(device)
    if backend == "cuda":
        return _load.cuda_reason()
    return None


def _choose(name: str, device: str, arguments: tuple[Any, ...]) -> tuple[str, Callable[..., Any]]:
    here = _launchers[name][device]
    wanted = _forced or settings.get("STABLEKERN_BACKEND")
    reasons = []
    for backend in (wanted,) if wanted else _ORDER[device]:
        if backend not in here:
            reasons.append(f"{backend}: no kernel for `{name}` on {device}")
            continue
        if not wanted and backend == "triton" and device == "cpu":
            continue
        supports = here[backend].supports
        reason = None if supports is None else supports(*arguments)
        reason = reason or _missing(name, backend, device)
        if reason is None:
            return backend, here[backend].function
        reasons.append(f"{backend}: {reason}")
    rule = f"backend `{wanted}` is forced and cannot run" if wanted else f"no backend can run on {device}"
    raise BackendUnavailableError(message(name, f"{rule} ({'; '.join(reasons)})"))


def _lazy_views() -> Any:
    """A context in which conjugate and negative views mean what they say.

    A compiled graph calls an op with the dispatch keys excluded that resolve them: a launcher's `x.conj() * y` would
    silently be `x * y`.
    """
    lazy = torch._C.DispatchKeySet(torch._C.DispatchKey.Conjugate).add(torch._C.DispatchKey.Negative)
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(include, exclude - lazy)


def _gpu_of(arguments: tuple[Any, ...]) -> Any:
    """A context in which the GPU that holds the arguments is the current one, on which kernels are launched."""
    flat = (t for x in arguments for t in (x if isinstance(x, (list, tuple)) else (x,)))
    return torch.cuda.device(next(t.device for t in flat if isinstance(t, torch.Tensor) and t.is_cuda))


def _run(name: str, device: str, *arguments: Any) -> Any:
    function = _choose(name, device, arguments)[1]
    if device == "cuda":
        with _gpu_of(arguments):
            return _run_on(function, device, *arguments)
    return _run_on(function, device, *arguments)


def _run_on(function: Callable[..., Any], device: str, *arguments: Any) -> Any:
    if torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Conjugate):
        with _lazy_views():
            return _without_autocast(function, device, *arguments)
    return _without_autocast(function, device, *arguments)


def _without_autocast(function: Callable[..., Any], device: str, *arguments: Any) -> Any:
    if not torch.is_autocast_enabled(device):
        return function(*arguments)
    # Autocast reaches into the implementation: it would take the matrix products of a torch launcher in half precision.
    with torch.autocast(device, enabled=False):
        return function(*arguments)


def is_watched() -> bool:
    """Whether a compiler, a transform or a mode wants to see what ops are called."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
    )


def direct(name: str, *arguments: Any) -> Any:
    """The op of this dispatcher name by its launcher, where nobody wants to see the op itself.

    Past the dispatcher, which takes as long as some twenty small systems, go plain tensors that no autograd graph
    follows, outside of compilers, transforms and modes.
    """
    tensors = [x for x in arguments if isinstance(x, torch.Tensor)]
    seen = (
        is_watched()
        or any(type(x) is not torch.Tensor and type(x) is not torch.nn.Parameter for x in tensors)
        or (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        or tensors[0].device.type not in _KEYS
    )
    if seen:
        return getattr(torch.ops.stablekern, name).default(*arguments)
    return _run(name, tensors[0].device.type, *arguments)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """`function.apply(*arguments)`, where `forward` has no defaults.

    That binds the arguments to the signature of `forward`, found anew at each call, which takes 20 us: longer than a
    small problem. Where no transform of torch.func and no compiler is at work nothing but the call is left of it.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def ops() -> tuple[str, ...]:
    """The dispatcher names of all defined ops."""
    return tuple(sorted(_launchers))


def _dispatcher_name(op: str) -> str:
    name = op if op in _launchers else f"{op}_fwd"
    if name not in _launchers:
        raise ValueError(message("available_backends", f"`op` must be one of {', '.join(ops())}", repr(op)))
    return name


def available_backends(op: str, device: str = "cpu") -> dict[str, str | None]:
    """The backends of an op, best first, each with None if it can run here, else the reason why it cannot.

    `op` is a public name (`"eigh"`) or that of one dispatcher op (`"eigh_bwd"`). Asking may build the native kernels.
    """
    _check.choice("available_backends", "device", device, tuple(_ORDER))
    name = _dispatcher_name(op)
    here = _launchers[name][device]
    return {backend: _missing(name, backend, device) for backend in _ORDER[device] if backend in here}


def explain(op: str, device: str, *, build: bool = True) -> tuple[str | None, dict[str, str]]:
    """(The backend that a dispatcher op would run on, None if none can; for each better or forced one, why not it.)

    What a launcher says of particular arguments (`supports`) is left out. `build=False` compiles nothing: native
    kernels that are not built yet count as missing.
    """
    here, wanted = _launchers[op][device], _forced or settings.get("STABLEKERN_BACKEND")
    reasons: dict[str, str] = {}
    for backend in (wanted,) if wanted else _ORDER[device]:
        if backend not in here:
            reason: str | None = f"the op has no {backend} kernel"
        elif not wanted and backend == "triton" and device == "cpu":
            reason = "on a CPU for tests only"
        else:
            reason = _missing(op, backend, device, build=build)
        if reason is None:
            return backend, reasons
        reasons[backend] = reason
    return None, reasons


def backend_for(op: str, *arguments: Any, device: str = "cpu") -> str:
    """The name of the backend that would run the dispatcher op on these arguments."""
    return _choose(_dispatcher_name(op), device, arguments)[0]


class use_backend:
    """Force one backend for every op of the process, from this call on, or inside a `with` block.

    `use_backend("torch")` holds until `use_backend(None)`; `with use_backend("torch"): ...` restores what held before.
    The choice is global, not per thread: autograd runs CUDA backwards on threads of its own. It takes precedence over
    STABLEKERN_BACKEND.

    **Raises:** `ValueError` for a name that is no backend. An op that does not have the backend, or cannot run it on
    this machine, raises `BackendUnavailableError` with the reason when it is called.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        if name is not None:
            _check.choice("use_backend", "name", name, ("native", "torch", "triton", "cuda"))
        self._before, _forced = _forced, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        global _forced
        _forced = self._before
