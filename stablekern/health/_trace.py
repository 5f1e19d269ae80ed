"""A module's call done again, operation by operation, to find the one that made the first NaN or infinity.

`Call` keeps what a call needs to be repeated: arguments, random state, modes, and (if asked for) the weights. The
repetition runs under a `TorchDispatchMode`, so it sees every ATen operation with its operands, whatever Python wrote
them; it leaves weights, buffers, `.grad` and the random state as they were.

*Forward.* Every output is checked. From the non-finite output of the module the search goes back through non-finite
operands to the operation whose operands are good. Infinities that the code writes on purpose (a mask of -inf) are no
fault, unless an operation turns them into a NaN.

*Backward.* Every node of the graph is hooked. The origin is the first one that turns a finite incoming gradient into a
non-finite one, and whose gradient arrives at a leaf through non-finite gradients. A node is matched with the forward
operation that made it by autograd's sequence number; its operands come from a further forward.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from stablekern.health._causes import (
    Cause,
    TensorStats,
    backward_cause,
    culprit_values,
    finite,
    floating,
    forward_cause,
    plain_name,
    tensors_in,
)

__all__ = [
    "Call",
    "Finding",
    "GradientTrail",
    "Site",
    "code_line",
    "eager",
    "find_backward",
    "find_forward",
    "graph_of",
    "is_leaf",
    "values_at",
    "with_text",
]

_AUTOCAST = ("cpu", "cuda")
_ATOMS = {type(None), bool, int, float, str}
_SEARCHED = 10_000  # steps of a search back through operations
_MOST_ORIGINS = 32  # each keeps its gradients
_UNWRITTEN = {"empty", "empty_like", "empty_strided", "new_empty", "empty_permuted", "new_empty_strided", "resize"}
_FILLS = {"full", "full_like", "new_full", "fill", "scalar_tensor", "masked_fill", "where", "constant_pad_nd"}
_HERE = os.path.dirname(os.path.abspath(__file__))
_INTERNAL = (os.path.dirname(os.path.abspath(torch.__file__)), _HERE, os.path.join(os.path.dirname(_HERE), "ops"))


# ---- a call, and its repetition --------------------------------------------------------------------------------------


def random_state() -> dict[str, Any]:
    """The state of the generators of torch (each device in use), NumPy and Python. Reads no device."""
    cpu = torch.default_generator.get_state()
    state: dict[str, Any] = {"cpu": cpu, "numpy": np.random.get_state(), "python": random.getstate()}
    if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])


def _detached(value: Any) -> Any:
    """The same containers with tensors that have no history. The common ones without pytree, which takes 50 us cold."""
    kind = type(value)
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() if value.requires_grad else value.detach()
    if kind is tuple or kind is list:
        return kind(map(_detached, value))
    if kind is dict:
        return {name: _detached(item) for name, item in value.items()}
    return value if kind in _ATOMS else tree_map(lambda x: _detached(x) if isinstance(x, Tensor) else x, value)


def _versions(args: Any, kwargs: Any) -> list[int]:
    return [0 if x.is_inference() else x._version for x in tensors_in((args, kwargs))]


@dataclass
class Call:
    """One call of a module, and the gradients that arrived at its outputs."""

    module: nn.Module
    step: int
    args: Any
    kwargs: Any
    rng: dict[str, Any]
    grad_enabled: bool
    autocast: list[tuple[str, torch.dtype]]
    versions: list[int]
    weights: dict[str, Tensor] | None = None
    nodes: frozenset[int] = frozenset()
    gradients: list[Tensor | None] = field(default_factory=list)
    intended: bool = False
    leaves: list[Tensor] = field(default_factory=list, repr=False)
    outside: dict[int, str] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, module: nn.Module, step: int, args: Any, kwargs: Any) -> Call:
        return cls(
            module,
            step,
            _detached(args),
            _detached(kwargs),
            random_state(),
            torch.is_grad_enabled(),
            [(kind, torch.get_autocast_dtype(kind)) for kind in _AUTOCAST if torch.is_autocast_enabled(kind)],
            _versions(args, kwargs),
        )

    @property
    def changed(self) -> bool:
        """Whether an argument was written to after the call began: the repetition sees other numbers."""
        return self.versions != _versions(self.args, self.kwargs)

    @contextlib.contextmanager
    def _restored(self) -> Iterator[Callable[[Callable[[Callable[[], Any]], Any]], Any]]:
        """`run(body)` gives `body` a function that does the call again, on leaves of its own; all is put back after."""
        module = eager(self.module)
        before, stashed = random_state(), [(p, p.grad) for p in module.parameters()]
        apply = checkpoint.CheckpointFunction.apply
        weights = self.weights or {}
        parameters = {name: (weights.get(name, p).detach(), p.requires_grad) for name, p in module.named_parameters()}
        buffers = {name: weights.get(name, b) for name, b in module.named_buffers()}

        def run(body: Callable[[Callable[[], Any]], Any]) -> Any:
            leaves = {name: x.detach().requires_grad_(needs) for name, (x, needs) in parameters.items()}
            state = {name: b.clone() for name, b in buffers.items()}
            args, kwargs = _detached(self.args), _detached(self.kwargs)
            self.leaves = [x for x in tensors_in((list(leaves.values()), args, kwargs)) if x.requires_grad]
            self.outside = _outside(leaves, state, args, kwargs)
            set_random_state(self.rng)
            named = {f"module.{name}": x for name, x in (leaves | state).items()}
            return torch.func.functional_call(_Scope(module), named, (body, args, kwargs))

        try:
            for p, _ in stashed:
                p.grad = None
            # Reentrant checkpoints hide their graph; a repetition has no need of them.
            checkpoint.CheckpointFunction.apply = staticmethod(  # type: ignore[method-assign]
                lambda function, preserve, *args: function(*args)
            )
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.set_grad_enabled(self.grad_enabled))
                stack.enter_context(torch.compiler.set_stance("force_eager"))
                for kind in _AUTOCAST if torch.cuda.is_available() else _AUTOCAST[:1]:
                    chosen = dict(self.autocast).get(kind)
                    stack.enter_context(torch.autocast(kind, dtype=chosen, enabled=chosen is not None))
                yield run
        finally:
            checkpoint.CheckpointFunction.apply = apply  # type: ignore[method-assign]
            for p, grad in stashed:
                p.grad = grad
            set_random_state(before)


class _Scope(nn.Module):
    """Holds a module while its parameters are replaced: recomputed parts of a backward need the same ones."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, body: Callable[[Callable[[], Any]], Any], args: Any, kwargs: Any) -> Any:
        return body(lambda: self.module(*args, **kwargs))


def _outside(leaves: dict[str, Tensor], state: dict[str, Tensor], args: Any, kwargs: Any) -> dict[int, str]:
    """Names of the tensors that a call starts from, by their storage."""
    named = [(f"buffer {name}", b) for name, b in state.items()]
    named += [(f"parameter {name}", p) for name, p in leaves.items()]
    for position, value in [*enumerate(args), *kwargs.items()]:
        named += [(f"argument {position} of the model", x) for x in tensors_in(value)]
    return {_key(x): name for name, x in named if floating(x)}


def eager(module: nn.Module) -> nn.Module:
    """The module behind torch.compile and DistributedDataParallel."""
    for name in ("_orig_mod", "module"):
        if isinstance(module, nn.parallel.DistributedDataParallel) or name == "_orig_mod":
            module = getattr(module, name, module)
    return module


# ---- where in the model, where in the code ---------------------------------------------------------------------------


class _Paths:
    """Names of the modules being called. A module that several names share goes by the one under its caller."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        self.names: dict[nn.Module, list[str]] = {}
        for name, module in root.named_modules(remove_duplicate=False):
            self.names.setdefault(module, []).append(name)
        self.stack: list[tuple[str, nn.Module]] = []
        self.calls: Counter[nn.Module] = Counter()

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        handles = []
        for module in self.names:
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        self.stack.clear()
        self.calls.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        above = self.stack[-1][0] if self.stack else ""
        names = self.names[module]
        under = [name for name in names if above == "" or name.startswith(above + ".")]
        self.stack.append(((under or names)[0], module))
        self.calls[module] += 1

    def _leave(self, *_: Any) -> None:
        if self.stack:
            self.stack.pop()

    def here(self) -> tuple[str, str, str]:
        """Path, class, and a note if the module is shared or called more than once."""
        path, module = self.stack[-1] if self.stack else ("", self.root)
        shared = [name for name in self.names[module] if name != path]
        note = f"shared with {', '.join(shared)}" if shared else ""
        if self.calls[module] > 1:
            note = ", ".join(part for part in (note, f"call {self.calls[module]}") if part)
        return path, type(module).__name__, note


def code_line() -> str:
    """File and line of the innermost frame that is neither torch's nor one of ours, with its text."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((*_INTERNAL, "<")):
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def with_text(where: str) -> str:
    name, _, line = where.rpartition(":")
    text = linecache.getline(name, int(line)).strip() if name else ""
    return f"{where}: {text}" if text else where


# ---- what is found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """An operation of a call: module path, operation, and its number among those of that name there."""

    path: str
    op: str
    number: int


@dataclass(frozen=True)
class Finding:
    """The first non-finite tensor of a call."""

    phase: str
    path: str
    module: str
    note: str
    op: str
    where: str
    tensor: TensorStats
    inputs: tuple[TensorStats, ...]
    cause: Cause
    others: int = 0
    site: Site | None = None


@dataclass
class _Op:
    """An operation of the repeated forward. `bad`: non-finite outputs; `sources`: what made its non-finite operands."""

    index: int
    name: str
    path: str
    module: str
    note: str
    where: str
    site: Site
    parents: list[_Op]
    sequence: int
    nan: bool = False
    inf: bool = False
    innocent: bool = False
    sources: list[_Source] = field(default_factory=list)
    finding: Finding | None = None


@dataclass
class _Source:
    """A non-finite operand: the operation that made it, or the name of what came from outside."""

    maker: _Op | str
    stats: TensorStats
    nan: bool
    innocent: bool


def _key(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _labels(args: Sequence[Any], kwargs: dict[str, Any]) -> list[tuple[str, Tensor]]:
    pairs = [(f"operand {i}", x) for i, value in enumerate(args) for x in tensors_in(value)]
    return pairs + [(name, x) for name, value in kwargs.items() for x in tensors_in(value)]


class _Recorder(TorchDispatchMode):
    """Follows the operations of a forward: which made what, in which module, at which line."""

    def __init__(self, call: Call, paths: _Paths, *, check: bool) -> None:
        super().__init__()
        self.call, self.paths, self.check = call, paths, check
        self.makers: dict[int, _Op] = {}
        self.by_sequence: dict[int, _Op] = {}
        self.numbers: Counter[tuple[str, str]] = Counter()
        self.wrong: list[_Op] = []
        self.count = 0
        self.at: Callable[[_Op, Any, Sequence[Any], dict[str, Any], Any], None] | None = None
        self.first = torch.autograd._get_sequence_nr()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        sequence = torch.autograd._get_sequence_nr() - 1 - self.first
        inputs = _labels(args, kwargs)
        if function._schema.is_mutable and (self.check or self.at is not None):
            kept = tree_map(lambda x: x.clone() if floating(x) else x, (args, kwargs))
        else:
            kept = (args, kwargs)
        outputs = function(*args, **kwargs)
        made = [x for x in tensors_in(outputs) if x.layout == torch.strided]
        sources = {_key(x) for _, x in inputs if x.layout == torch.strided}
        if made and all(_key(x) in sources for x in made) and not function._schema.is_mutable:
            return outputs  # a view: what made it is what made its base
        op = self._record(function, inputs, sequence)
        if self.check and op.name not in _UNWRITTEN:
            self._judge(op, function, kept, inputs, made, outputs)
        if self.at is not None:
            self.at(op, function, *kept, outputs)  # type: ignore[call-arg]
        for x in made:
            self.makers[_key(x)] = op
        return outputs

    def _record(self, function: Any, inputs: list[tuple[str, Tensor]], sequence: int) -> _Op:
        path, module, note = self.paths.here()
        name = plain_name(function)
        number = self.numbers[path, name]
        self.numbers[path, name] += 1
        parents = [self.makers[_key(x)] for _, x in inputs if x.layout == torch.strided and _key(x) in self.makers]
        op = _Op(self.count, name, path, module, note, code_line(), Site(path, name, number), parents, sequence)
        self.count += 1
        self.by_sequence.setdefault(sequence, op)
        return op

    def ancestors(self, x: Tensor) -> list[str]:
        """The operations that made a tensor, the nearest first."""
        names: list[str] = []
        op = self.makers.get(_key(x))
        while op is not None and len(names) < 5:
            same = op.name == "mul" and len(op.parents) == 2 and op.parents[0] is op.parents[1]
            names.append("square" if same else op.name)
            op = op.parents[0] if op.parents else None
        return names

    def _judge(
        self, op: _Op, function: Any, kept: Any, inputs: list[tuple[str, Tensor]], made: list[Tensor], outputs: Any
    ) -> None:
        wrong = [x for x in made if floating(x) and not finite(x)]
        if not wrong:
            return
        op.nan, op.inf = any(bool(x.isnan().any()) for x in wrong), any(bool(x.isinf().any()) for x in wrong)
        operands = _labels(*kept)
        for (label, x), (_, original) in zip(operands, inputs, strict=True):
            if floating(x) and not finite(x):
                maker = self.makers.get(_key(original))
                nan = bool(x.isnan().any())
                if maker is None:
                    outside = self.call.outside.get(_key(original), "a tensor that no recorded operation made")
                    mask = not nan and not bool((x == torch.inf).any())
                    op.sources.append(_Source(outside, TensorStats.of(outside, x), nan, mask))
                else:
                    op.sources.append(_Source(maker, TensorStats.of(label, x), nan, maker.innocent))
        literal = op.name in _FILLS and any(
            isinstance(v, float) and v in (torch.inf, -torch.inf) for v in (*kept[0], *kept[1].values())
        )
        self.wrong.append(op)
        op.innocent = not op.nan and (literal or any(source.innocent for source in op.sources))
        if not op.innocent and (not op.sources or (op.nan and not any(source.nan for source in op.sources))):
            cause = forward_cause(function, *kept, outputs, self.ancestors)  # type: ignore[call-arg]
            stats = tuple(TensorStats.of(label, x) for label, x in operands if floating(x))
            op.finding = Finding(
                "forward", op.path, op.module, op.note, op.name, op.where,
                TensorStats.of("result", wrong[0]), stats, cause, site=op.site,
            )  # fmt: skip


# ---- forward ---------------------------------------------------------------------------------------------------------


def _from_outside(label: str, op: _Op, stats: TensorStats) -> Finding:
    kind = {"parameter": "weights", "buffer": "weights", "argument": "input"}.get(label.split()[0], "unknown")
    text = f"{label} is not finite before the model uses it"
    return Finding("forward", op.path, op.module, op.note, op.name, op.where, stats, (stats,), Cause(kind, text))


def _origin(op: _Op) -> Finding | None:
    """From a bad result back to the operation whose operands were good; None if all of it was written on purpose."""
    for _ in range(_SEARCHED):
        if op.innocent:
            return None
        if op.finding is not None and op.finding.cause.kind == "fully masked row":
            return op.finding
        onward = [s for s in op.sources if s.nan] or [s for s in op.sources if not s.innocent]
        if not onward:
            return op.finding
        if isinstance(onward[0].maker, str):
            return _from_outside(onward[0].maker, op, onward[0].stats)
        op = onward[0].maker
    return None


def find_forward(call: Call, *, raises: bool = False) -> Finding | None:
    """The operation that made the first non-finite tensor on the way to a non-finite output; None if there is none.

    `call.intended` says whether the non-finite outputs are all written on purpose. With `raises` the call is one that
    raised an exception, and the way is that to the last bad tensor before it.
    """
    module = eager(call.module)
    paths = _Paths(module)
    with call._restored() as run:
        recorder = _Recorder(call, paths, check=True)
        outputs = None
        with paths.following(), recorder, contextlib.suppress(Exception) if raises else contextlib.nullcontext():
            outputs = run(lambda forward: forward())
        if raises:
            return _origin(recorder.wrong[-1]) if recorder.wrong else None
        bad = [recorder.makers.get(_key(x)) for x in tensors_in(outputs) if floating(x) and not finite(x)]
        findings = [_origin(maker) for maker in bad if maker is not None]
        call.intended = bool(findings) and not any(findings)
        return next((finding for finding in findings if finding is not None), None)


# ---- backward --------------------------------------------------------------------------------------------------------


class _Inside(TorchDispatchMode):
    """Operations of a backward that turn finite operands into a non-finite result, by the node that runs them."""

    def __init__(self) -> None:
        super().__init__()
        self.causes: dict[int, tuple[str, Cause]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kept = tree_map(lambda x: x.clone() if floating(x) else x, args) if function._schema.is_mutable else args
        outputs = function(*args, **kwargs)
        node, name = torch._C._current_autograd_node(), plain_name(function)
        if node is None or name in _UNWRITTEN or node._sequence_nr() in self.causes:
            return outputs
        if any(floating(x) and not finite(x) for x in tensors_in(outputs)) and all(
            finite(x) for _, x in _labels(kept, kwargs) if floating(x)
        ):
            cause = forward_cause(function, kept, kwargs, outputs, lambda x: [])
            if cause.kind != "literal":
                self.causes[node._sequence_nr()] = name, cause
        return outputs


@dataclass
class _Node:
    """A node of the graph that gave a non-finite gradient."""

    name: str
    sequence: int
    incoming: tuple[Tensor | None, ...]
    found: tuple[Tensor | None, ...]


def graph_of(roots: Sequence[Any], stop: frozenset[int] = frozenset(), most: int | None = None) -> list[Any]:
    """The nodes behind `roots`, without those numbered in `stop`; at most so many."""
    seen: dict[Any, None] = {}
    waiting = [node for node in roots if node is not None]
    while waiting and (most is None or len(seen) < most):
        node = waiting.pop()
        if node in seen or node._sequence_nr() in stop:
            continue
        seen[node] = None
        waiting += [parent for parent, _ in node.next_functions if parent is not None]
    return list(seen)


def is_leaf(node: Any) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"


def _all_finite(gradients: Sequence[Tensor | None]) -> bool:
    return all(finite(g) for g in gradients if g is not None and floating(g))


class GradientTrail:
    """Hooks on nodes: which of them turned finite gradients into non-finite ones, and which of those reach a leaf.

    A gradient that enters a node numbered in `stop` has arrived too. With `deferred` the hooks only keep what they see,
    and read nothing, until `settle`.
    """

    def __init__(self, nodes: Sequence[Any], stop: frozenset[int] = frozenset(), *, deferred: bool = False) -> None:
        self.stop = stop
        self.origins: dict[int, _Node] = {}
        self.arrived: set[int] = set()
        self.tainted: dict[Any, set[int]] = {}
        self.kept: list[tuple[Any, Any, Any]] = []
        see = self._keep if deferred else self._see
        self.handles = [node.register_hook(functools.partial(see, node)) for node in nodes if not is_leaf(node)]

    def _keep(self, node: Any, found: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]) -> None:
        self.kept.append((node, found, incoming))

    def settle(self) -> None:
        """Judge what was kept, in its order."""
        for entry in self.kept:
            self._see(*entry)
        self.kept.clear()

    def _see(self, node: Any, found: tuple[Tensor | None, ...], incoming: tuple[Tensor | None, ...]) -> None:
        if _all_finite(found):
            return
        sequence = node._sequence_nr()
        marks = set(self.tainted.get(node, ()))
        if _all_finite(incoming):
            marks = {sequence}
            if len(self.origins) < _MOST_ORIGINS:
                self.origins[sequence] = _Node(node.name(), sequence, incoming, found)
        for (parent, _), gradient in zip(node.next_functions, found, strict=False):
            if parent is None or gradient is None or not floating(gradient) or finite(gradient):
                continue
            self.tainted.setdefault(parent, set()).update(marks)
            if is_leaf(parent) or parent._sequence_nr() in self.stop:
                self.arrived |= marks

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.tainted.clear()

    def origin(self) -> tuple[_Node | None, int]:
        """The first origin whose gradient arrived, and how many others did."""
        real = [node for sequence, node in self.origins.items() if sequence in self.arrived]
        return (real[0], len(real) - 1) if real else (None, 0)


def _graph_outputs(outputs: Any, gradients: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor]]:
    alive = [x for x in tensors_in(outputs) if x.requires_grad]
    return [(x, g) for x, g in zip(alive, gradients, strict=False) if g is not None]


def find_backward(call: Call) -> Finding | None:
    """The node that made the first non-finite gradient from the gradients at the outputs; None if there is none."""
    module = eager(call.module)
    paths = _Paths(module)
    recorder, inside = _Recorder(call, paths, check=False), _Inside()

    def search(forward: Callable[[], Any]) -> tuple[_Node | None, int]:
        with paths.following(), recorder:
            outputs = forward()
        pairs = _graph_outputs(outputs, call.gradients)
        if not pairs or not call.leaves:
            return None, 0
        trail = GradientTrail(graph_of([x.grad_fn for x, _ in pairs]))
        with inside:
            torch.autograd.grad([x for x, _ in pairs], call.leaves, [g for _, g in pairs], allow_unused=True)
        trail.remove()
        return trail.origin()

    with call._restored() as run:
        node, others = run(search)
        if node is None:
            return None
        made_by = recorder.by_sequence.get(node.sequence - recorder.first)
        kept = _capture(call, paths, run, made_by.site) if made_by is not None else {}
    return _backward_finding(node, others, made_by, kept, inside.causes.get(node.sequence))


def _capture(call: Call, paths: _Paths, run: Callable[..., Any], site: Site) -> dict[str, Any]:
    """Do the call once more and keep the operands and the result of one operation; empty if it does not come up."""
    kept: dict[str, Any] = {}
    again = _Recorder(call, paths, check=False)

    def at(op: _Op, function: Any, args: Any, kwargs: Any, outputs: Any) -> None:
        if op.site == site and not kept:
            kept.update(function=function, args=args, kwargs=kwargs, outputs=outputs)
            kept["ancestors"] = {id(x): again.ancestors(x) for x in tensors_in(list(args))}

    again.at = at
    with paths.following(), again:
        run(lambda forward: forward())
    return kept


def _backward_finding(
    node: _Node, others: int, made_by: _Op | None, kept: dict[str, Any], inside: tuple[str, Cause] | None
) -> Finding:
    cause = None
    inputs = tuple(TensorStats.of(f"incoming gradient {i}", g) for i, g in enumerate(node.incoming) if g is not None)
    # Inside a Python Function the operations are those of its forward, not the one that is differentiated.
    own = made_by is not None and made_by.name.replace("_", "") in node.name.lower()
    if kept:
        named = [(f"forward {label}", x) for label, x in _labels(kept["args"], kept["kwargs"]) if floating(x)]
        inputs += tuple(TensorStats.of(label, x) for label, x in named)
        ancestors = kept["ancestors"]
        cause = backward_cause(
            kept["function"], kept["args"], kept["kwargs"], kept["outputs"], node.incoming, node.found,
            lambda x: ancestors.get(id(x), []),
        )  # fmt: skip
    if cause is None and inside is not None:
        op, found = inside
        cause = Cause(found.kind, f"in its backward, {op}: {found.text}", found.measured, found.argument)
    wrong = next(g for g in node.found if g is not None and floating(g) and not finite(g))
    op = f"{node.name}" + (f", the backward of {made_by.name}" if made_by is not None and own else "")
    place = made_by or _Op(0, node.name, "", "", "", "", Site("", node.name, 0), [], node.sequence)
    return Finding(
        "backward", place.path, place.module, place.note, op, place.where, TensorStats.of("gradient", wrong), inputs,
        cause or Cause("unknown", f"nothing known fits {node.name}"), others, made_by.site if made_by else None,
    )  # fmt: skip


def values_at(call: Call, finding: Finding) -> tuple[str, Tensor] | None:
    """The quantity that the cause of a finding is about, in another call of the same model; None if it is not there."""
    if finding.site is None:
        return None
    with call._restored() as run, torch.no_grad():
        kept = _capture(call, _Paths(eager(call.module)), run, finding.site)
    return culprit_values(finding.cause, kept["args"], kept["outputs"]) if kept else None
