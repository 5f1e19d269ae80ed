"""`swap`: put the ops of this package into code that exists, say what was done, and take it out again exactly.

What a library calls what, and which of its versions is known, is in `stablekern.adapters`, a module per library. Each
has the functions that stand in, and one or more of

- `swap_library(report)`: its functions and classes, wherever loaded modules hold them;
- `swap_class(report, cls)`, `swap_object(report, obj)`, `swap_layer(report, module, label)`: a class of it, an object,
  an `nn.Module` inside a model; True if it was one;
- `FUNCTIONS`, `METHODS`: stand-ins by the names that a codebase gives its functions and the methods of its classes.

They change nothing themselves: every change goes through the methods of `SwapReport`, which remembers what was there.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

from torch import nn

from stablekern.errors import SwapError, message

__all__ = ["Known", "SwapReport", "fallen", "known_version", "signature_of", "swap"]

_LIBRARIES = {
    "causal_conv1d": "mamba_ssm_modules",
    "mamba_ssm": "mamba_ssm_modules",
    "torch.linalg": "torch_linalg",
    "torch.optim": "torch_optim",
    "torch_geometric": "torch_geometric",
    "transformers": "transformers_mamba",
}
_CODEBASES = ("eeg_v3", "ris", "sem")
_ABSENT = object()
_ALREADY = "swapped already"
# Calls that a stand-in handed on to what it stands in for, by "name: reason", over the process.
fallen: Counter[str] = Counter()


class Swapped(NamedTuple):
    """`name` now is `by`; `note`: what differs, if anything does."""

    name: str
    by: str
    note: str


class Left(NamedTuple):
    """`name` is as it was, because of `reason`."""

    name: str
    reason: str


class Known(NamedTuple):
    """What stands in for a function, or a method, of a codebase, under its name and any of these parameter lists.

    With `make` the stand-in is made from the original, which it may need: `make(original)`. With `refused` there is
    none, for that reason.
    """

    stand_in: Callable[..., Any] | None
    signatures: tuple[str, ...] = ()
    note: str = ""
    make: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    refused: str | None = None


class _Change(NamedTuple):
    name: str
    in_place: Callable[[], bool]  # whether what was put there is there now
    undo: Callable[[], None]


class SwapReport:
    """What one call of `swap` did: `swapped`, `left`, and `restore()`; as a context manager it restores at the end.

    `print(report)` shows it as a table, `report.as_dict()` gives it as plain data. `report.fell_through` counts the
    calls since then that a stand-in handed on to the original, with the reason for each.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.swapped: list[Swapped] = []
        self.left: list[Left] = []
        self._changes: list[_Change] = []
        self._fallen_before = fallen.copy()

    # ---- for the adapters --------------------------------------------------------------------------------------------

    def leave(self, name: str, reason: str) -> None:
        self.left.append(Left(name, reason))

    def note(self, name: str, by: Any, note: str = "") -> None:
        by = by if isinstance(by, str) else f"{by.__module__}.{by.__qualname__}".replace("<locals>.", "")
        self.swapped.append(Swapped(name, by, note))

    def set(self, owner: Any, attribute: str, value: Any) -> None:
        """`owner.attribute = value`, for a module, a class or an object; a class may have inherited it before."""
        before = vars(owner).get(attribute, _ABSENT)
        setattr(owner, attribute, value)
        self._changes.append(
            _Change(
                f"{_called(owner)}.{attribute}",
                lambda: vars(owner).get(attribute, _ABSENT) is value,
                lambda: delattr(owner, attribute) if before is _ABSENT else setattr(owner, attribute, before),
            )
        )

    def put(self, mapping: MutableMapping[str, Any], key: str, value: Any) -> None:
        """`mapping[key] = value` for a key that is not there yet."""
        mapping[key] = value
        self._changes.append(_Change(key, lambda: mapping.get(key) is value, lambda: mapping.pop(key)))

    def retype(self, obj: Any, cls: type, **attributes: Any) -> None:
        """Make `obj`, with all that it holds, a `cls`; attributes that `cls` needs are added."""
        before = type(obj)
        obj.__class__ = cls

        def undo() -> None:
            obj.__class__ = before

        self._changes.append(_Change(f"the class of a {before.__qualname__}", lambda: type(obj) is cls, undo))
        for name, value in attributes.items():
            self.set(obj, name, value)

    def when_restored(self, name: str, undo: Callable[[], None]) -> None:
        """Something else to be undone, in its turn."""
        self._changes.append(_Change(name, lambda: True, undo))

    def everywhere(self, name: str, original: Any, stand_in: Any, note: str = "") -> None:
        """`original` under its own name in every loaded module, as imports leave it; an alias somebody gave it stays.

        This package, and torch outside the module that `name` says, are left alone.
        """
        home, _, own = name.rpartition(".")
        holders = []
        for module_name, module in list(sys.modules.items()):
            top = module_name.split(".")[0]
            inside = top == "stablekern" or (top == "torch" and not module_name.startswith(home))
            if inside or not isinstance(module, types.ModuleType):
                continue
            if vars(module).get(own) is original:
                self.set(module, own, stand_in)
                holders.append(f"{module_name}.{own}")
        others = [holder for holder in holders if holder != name]
        if others:
            note = f"{note}; " * bool(note) + f"also {', '.join(others)}"
        self.note(name, stand_in, note)

    def fits(self, name: str, original: Callable[..., Any], signatures: tuple[str, ...]) -> bool:
        """Whether `original` has one of the known lists of parameters; else it is left, and the report says so."""
        found = signature_of(original)
        if found in signatures:
            return True
        self.leave(name, f"its parameters ({found}) are not those that are known: ({') or ('.join(signatures)})")
        return False

    # ---- for users ---------------------------------------------------------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether there is something that `restore` would put back."""
        return bool(self._changes)

    @property
    def fell_through(self) -> dict[str, int]:
        """Calls, since the swap, that a stand-in handed on to the original: "name: reason" and how many."""
        return dict(fallen - self._fallen_before)

    def restore(self) -> None:
        """Put back what was there, the very objects; what is not active does nothing.

        **Raises:** `RuntimeError`, and changes nothing, if something else has been put in one of the places meanwhile:
        swaps that overlap are restored in the opposite order.
        """
        later = [change.name for change in self._changes if not change.in_place()]
        if later:
            rule = "a later change is in the way, restore that one first"
            raise RuntimeError(message("swap", rule, ", ".join(dict.fromkeys(later))))
        while self._changes:
            self._changes.pop().undo()

    def __enter__(self) -> SwapReport:
        return self

    def __exit__(self, *exc: object) -> None:
        self.restore()

    def as_dict(self) -> dict[str, Any]:
        """Plain data: target, active, swapped, left, fell_through."""
        return {
            "target": self.target,
            "active": self.active,
            "swapped": [entry._asdict() for entry in self.swapped],
            "left": [entry._asdict() for entry in self.left],
            "fell_through": self.fell_through,
        }

    def __str__(self) -> str:
        state = "" if self.active else " (restored)" if self.swapped else " (nothing changed)"
        lines = [f"stablekern.swap({self.target}){state}"]
        if self.swapped:
            width = max(len(entry.name) for entry in self.swapped)
            lines.append("  swapped:")
            lines += [
                f"    {entry.name:<{width}}  ->  {entry.by}" + f"  [{entry.note}]" * bool(entry.note)
                for entry in self.swapped
            ]
        if self.left:
            lines.append("  left as it was:")
            lines += [f"    {entry.name}: {entry.reason}" for entry in self.left]
        if self.fell_through:
            lines.append("  calls handed on to the original:")
            lines += [f"    {count} x {reason}" for reason, count in sorted(self.fell_through.items())]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<SwapReport {self.target}: {len(self.swapped)} swapped, {len(self.left)} left>"


def signature_of(function: Callable[..., Any]) -> str:
    """The names of the parameters, without `self`; "*" before those that are keyword only."""
    names, star = [], False
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some of those that are written in C
        return "not to be read"
    for parameter in parameters:
        if parameter.kind == parameter.KEYWORD_ONLY and not star:
            names.append("*")
            star = True
        prefix = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")  # type: ignore[call-overload]
        star = star or prefix == "*"
        names.append(prefix + parameter.name)
    return ", ".join(names[1:] if names[:1] == ["self"] else names)


def known_version(library: str, found: str, known: tuple[str, ...]) -> None:
    """Refuse a version whose first two numbers are not in `known`."""
    if ".".join(found.split(".")[:2]) not in known:
        raise SwapError(message("swap", f"of {library} the versions {', '.join(known)} are known", found))


def _called(owner: Any) -> str:
    return getattr(owner, "__name__", type(owner).__qualname__)


def _adapter(name: str) -> types.ModuleType:
    return importlib.import_module(f"stablekern.adapters.{name}")


def _adapters_with(function: str, cls: type) -> list[Callable[..., bool]]:
    """That function of the adapters of the libraries that a class is made of, and of those that have been used."""
    tops = {base.__module__.split(".")[0] for base in cls.__mro__}
    names = [
        name
        for library, name in _LIBRARIES.items()
        if library.split(".")[0] in tops or f"stablekern.adapters.{name}" in sys.modules
    ]
    return [getattr(_adapter(name), function) for name in dict.fromkeys(names) if hasattr(_adapter(name), function)]


def _resolved(name: str) -> Any:
    """The module, or the class or function in a module, of a dotted name."""
    head, _, tail = name.rpartition(".")
    try:
        if name in sys.modules or importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
        if head:
            return getattr(importlib.import_module(head), tail)
    except (ImportError, AttributeError) as error:
        raise SwapError(_unknown(repr(name))) from error
    raise SwapError(_unknown(repr(name)))


def _unknown(got: str) -> str:
    rule = (
        f"`target` must be one of {', '.join(repr(name) for name in _LIBRARIES)}, a module or class or its name, or an "
        "object that holds something of theirs"
    )
    return message("swap", rule, got)


def _swap_module(report: SwapReport, module: types.ModuleType) -> None:
    """Names of a user's module: what it has imported from a library, and functions under the names of a codebase."""
    for library in ("torch.linalg", "torch.optim"):
        for original, stand_in, note in _adapter(_LIBRARIES[library]).PAIRS:
            for attribute in [key for key, value in vars(module).items() if value is original]:
                report.set(module, attribute, stand_in)
                report.note(f"{module.__name__}.{attribute}", stand_in, note)
    for codebase in _CODEBASES:
        adapter = _adapter(codebase)
        for name, known in adapter.FUNCTIONS.items():
            if callable(found := vars(module).get(name)):
                _swap_known(report, adapter, known, module, name, found, f"{module.__name__}.{name}")
        for owner in [value for value in vars(module).values() if isinstance(value, type)]:
            if owner.__module__.split(".")[0] not in ("stablekern", "torch"):
                _swap_methods(report, adapter, owner, owner, f"{module.__name__}.{owner.__name__}")


def _swap_methods(report: SwapReport, adapter: types.ModuleType, owner: Any, cls: type, label: str) -> None:
    """Methods of a class under the names of a codebase, on the class or, if `owner` is an instance, on that alone."""
    for method, known in adapter.METHODS.get(cls.__name__, {}).items():
        if (found := getattr(owner, method, None)) is not None:
            _swap_known(report, adapter, known, owner, method, found, f"{label}.{method}")


def _swap_known(
    report: SwapReport, adapter: types.ModuleType, known: Known, owner: Any, name: str, found: Any, label: str
) -> None:
    if getattr(found, "__module__", "") == adapter.__name__:
        report.leave(label, _ALREADY)
    elif known.refused is not None:
        report.leave(label, known.refused)
    elif report.fits(label, found, known.signatures):
        original = getattr(found, "__func__", found)
        stand_in = known.stand_in if known.make is None else known.make(original)
        bound = types.MethodType(stand_in, owner) if isinstance(found, types.MethodType) else stand_in  # type: ignore[arg-type]
        report.set(owner, name, bound)
        report.note(label, stand_in, known.note)


def _swap_object(report: SwapReport, obj: Any) -> None:
    if isinstance(obj, nn.Module):
        for name, module in obj.named_modules():
            label = f"{type(obj).__name__}.{name}" if name else type(obj).__name__
            if not any(taken(report, module, label) for taken in _adapters_with("swap_layer", type(module))):
                for codebase in _CODEBASES:
                    _swap_methods(report, _adapter(codebase), module, type(module), label)
    else:
        any(taken(report, obj) for taken in _adapters_with("swap_object", type(obj)))


def swap(target: Any) -> SwapReport:
    """Let code that exists compute with this package, without a change to it, until `restore()`.

        with stablekern.swap("torch.linalg") as report:  # or without `with`, for the rest of the process
            train()
        print(report)

    | target | what is swapped |
    |---|---|
    | `"torch.linalg"` | `eigh`, `eigvalsh` |
    | `"mamba_ssm"` | its functions and modules; where it is not installed, imports of it find this package's |
    | `"transformers"`, or a model | the scans and convolutions of Mamba and Mamba-2 |
    | `"torch_geometric"`, or a transform | `AddLaplacianEigenvectorPE`, also inside `Compose` |
    | `"torch.optim"`, or an optimizer | `AdamW`; an instance keeps its state |
    | an `nn.Module` | what it holds of the above, in place: the same parameters, the same state dict |
    | a module (of yours) or its name | names imported from torch.linalg and torch.optim, and functions and methods \
with the names and parameters of the codebases in `docs/migrate/codebases.md` |

    A library's functions and classes are swapped in every loaded module that holds them by name, so the order of the
    imports does not matter. Swaps may be nested; each restores what it found.

    **Returns:** a `SwapReport`: what was swapped, what was left and why.

    **Raises:** `SwapError` (a `ValueError`) for a target in which there is nothing to swap, and for a version of a
    library, or parameters of a function, other than those that are known; then nothing has changed.
    """
    found = _resolved(target) if isinstance(target, str) and target not in _LIBRARIES else target
    if isinstance(found, types.ModuleType) and found.__name__ in _LIBRARIES:
        found = found.__name__
    if isinstance(found, str):
        label = repr(found)
    else:
        label = found.__name__ if isinstance(found, (types.ModuleType, type)) else f"a {type(found).__name__}"
    report = SwapReport(label)
    try:
        _swap_into(report, found)
        if not report.swapped and all(entry.reason != _ALREADY for entry in report.left):
            if report.left:
                reasons = "; ".join(f"{entry.name}: {entry.reason}" for entry in report.left)
                raise SwapError(message("swap", f"nothing of {label} can be swapped", reasons))
            raise SwapError(_unknown(f"{label}, which holds nothing that is known"))
    except BaseException:
        report.restore()
        raise
    return report


def _swap_into(report: SwapReport, target: Any) -> None:
    if isinstance(target, str):
        try:
            adapter = _adapter(_LIBRARIES[target])
        except ImportError as error:
            rule = f"{target} must be installed, in a version that is known"
            raise SwapError(message("swap", rule, str(error))) from error
        adapter.swap_library(report)
    elif isinstance(target, types.ModuleType):
        _swap_module(report, target)
    elif isinstance(target, type):
        any(taken(report, target) for taken in _adapters_with("swap_class", target))
    else:
        _swap_object(report, target)
