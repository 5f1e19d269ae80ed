r"""Which tensor of a training run was the first that is not finite, and why.

While nothing is wrong the watch only counts, at the places through which everything passes that matters to training:
the outputs of the model, the loss, the gradients of the parameters after `backward`, and again before the optimizer's
step if something wrote to them in between. A NaN inside the model that reaches none of these changes nothing.

On a hit it does the call again, operation by operation (`_trace.py`), with the same arguments, weights and random
numbers, backward included, from the gradients that had arrived at the outputs. What is computed between the model's
output and `backward` cannot be called again; there the watch keeps hooks on the nodes of the graph.

*When the counts are read.* On a CPU at once: the report comes before the optimizer spreads the NaN. On a GPU that
would be a wait for the device in every step, so the counts are copied to pinned memory and read when they have arrived,
a step or two later; the weights of the steps in flight are kept meanwhile (`late`).
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from stablekern import _check, _load
from stablekern.errors import NonFiniteError, message
from stablekern.health import _loss, _trace
from stablekern.health._causes import Cause, TensorStats, finite, floating, tensors_in
from stablekern.optim import grad_guard

__all__ = ["Report", "Watch", "watch"]

_WHERE = "health.watch"
_IN_FLIGHT = 3  # steps whose weights are kept until their counts have arrived
_LOOK_AGAIN = 64  # steps after which parameters that were added to the model, or put in place of others, are seen
_PENDING = 16  # calls of the model without a backward that are kept


# ---- the report ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """The first non-finite tensor of a run.

    - `step`: counts from `first_step`. `phase`: "forward", "backward", "loss", "before the step" or "weights".
    - `path`, `module`: name and class of the module; empty if it is none. `op`: the operation. `where`: the line that
        called it. `note`: other names of a shared module, which call of it.
    - `tensor`, `inputs`: statistics of the first non-finite tensor, and of what it was made from.
    - `cause`: kind, text, measured numbers; its `remedy` and `op` say what removes it.
    - `seen`: what was counted. `remarks`: what the search could not see.
    """

    step: int
    phase: str
    path: str
    module: str
    note: str
    op: str
    where: str
    tensor: TensorStats
    inputs: tuple[TensorStats, ...]
    cause: Cause
    seen: str
    remarks: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """`where` with the text of the line."""
        return _trace.with_text(self.where)

    def as_dict(self) -> dict[str, Any]:
        """JSON types; numbers that are not finite are None."""
        plain = asdict(self)
        plain["cause"] |= {"remedy": self.cause.remedy, "op": self.cause.op}
        return _jsonable(plain)

    def __str__(self) -> str:
        name = f"{self.path or '(the model itself)'} ({self.module})" if self.module else "outside the model"
        lines = [
            f"first non-finite tensor: {self.phase} of step {self.step}, {name}{', ' + self.note if self.note else ''}",
            f"  operation  {self.op}",
        ]
        lines += [f"  line       {self.line}"] if self.where else []
        lines += [f"  made       {self.tensor}", *(f"  from       {stats}" for stats in self.inputs)]
        lines += [f"  cause      {self.cause.kind}: {self.cause.text}", f"  remedy     {self.cause.remedy}"]
        lines += [f"  with       {self.cause.op}"] if self.cause.op else []
        lines += [f"  seen       {self.seen}", *(f"  remark     {remark}" for remark in self.remarks)]
        return "\n".join(lines)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


# ---- counting --------------------------------------------------------------------------------------------------------


def norms(tensors: Sequence[Tensor], *, exact: bool = False) -> Tensor:
    """For each tensor a number that is finite if all its entries are; (K,), on the first one's device. No host read.

    A 2-norm is the cheapest such number. It may also overflow: a suspicion, to be confirmed. With `exact`, and where
    that costs nothing, it is accumulated in float64, where float32 and half precision cannot overflow.
    """
    device = tensors[0].device
    if all(x.device == device for x in tensors) and (device.type == "cuda" or "stablekern._native" in sys.modules):
        return grad_guard._gradient_norms(list(tensors))
    groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for i, x in enumerate(tensors):
        groups.setdefault((x.dtype, x.device), []).append(i)
    found = torch.empty(len(tensors), dtype=torch.float64, device=device)
    for members in groups.values():
        wide = torch.float64 if exact else None
        values = torch.stack(torch._foreach_norm([tensors[i] for i in members], 2, dtype=wide))
        found[members] = values.to(device=device, dtype=torch.float64, non_blocking=True)
    return found


def _finite_at_once(tensors: list[Tensor]) -> bool:
    """Whether all are finite, by one pass of C on the CPU; False also where only a closer look can tell."""
    return "stablekern._native" in sys.modules and bool(_load.native_module().all_finite(tensors))


def _dense(x: Tensor) -> Tensor:
    """The stored values, without history; of a sharded tensor this rank's part."""
    x = x.detach() if x.requires_grad else x
    x = x if type(x) is Tensor else getattr(x, "_local_tensor", x)
    x = x.coalesce().values() if x.is_sparse else x
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


# ---- the watch -------------------------------------------------------------------------------------------------------


class _Evidence:
    """Tensors that are counted: a number of each, and later, if those say so, what is wrong with which.

    Read at once, the tensors are looked at again. Read late they are gone, for gradients and activations of past steps
    would fill the memory, and the numbers are all there is.
    """

    def __init__(self, names: list[str], tensors: list[Tensor], *, late: bool) -> None:
        self.names, self.numbers = names, norms(tensors, exact=late)
        self.tensors = None if late else tensors
        self.kinds = [(x.shape, x.dtype, x.numel()) for x in tensors] if late else []
        self.bad: list[int] = []
        self.stats: list[TensorStats] = []

    def confirm(self, numbers: Tensor) -> bool:
        """Whether a tensor is not finite, given the numbers on the host."""
        for i in (~numbers.isfinite()).nonzero().flatten().tolist():
            if self.tensors is None:
                nan = math.isnan(float(numbers[i]))
                shape, dtype, count = self.kinds[i]
                name, kind = f"{self.names[i]}, of which at least", str(dtype).removeprefix("torch.")
                self.bad.append(i)
                self.stats.append(
                    TensorStats(name, tuple(shape), kind, int(nan), int(not nan), count, *(math.nan,) * 3)
                )
            elif not finite(self.tensors[i]):
                self.bad.append(i)
                self.stats.append(TensorStats.of(self.names[i], self.tensors[i]))
        return bool(self.bad)

    @property
    def whole(self) -> int:
        """How many are NaN throughout; read late, how many hold a NaN."""
        return sum(s.nan == s.count if self.tensors is not None else s.nan > 0 for s in self.stats)


@dataclass
class _Count:
    """Evidence of a step, and the search that it gives rise to."""

    evidence: _Evidence
    step: int
    search: Callable[[_Evidence], Report | None]


@dataclass
class _Step:
    """What is kept of a step until its counts have been read."""

    counts: list[_Count] = field(default_factory=list)
    host: Tensor | None = None
    event: Any = None

    def send(self) -> None:
        """Start the copy to the host."""
        values = torch.cat([count.evidence.numbers for count in self.counts])
        if values.device.type == "cuda":
            self.host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self.host.copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.host = values

    def arrived(self) -> bool:
        return self.event is None or self.event.query()


class Watch:
    """The context manager that `watch` makes. `report` is the first finding, None while all is well."""

    _silent = False  # of all watches: one of them is searching, and what it repeats is not counted

    def __init__(
        self,
        model: nn.Module | None,
        *,
        on_hit: str,
        late: bool | None,
        scaled: bool | None,
        first_step: int,
        history: int,
    ) -> None:
        self.model, self.on_hit, self.scaled, self.history = model, on_hit, scaled, history
        self.late = late
        self.step = self._first_step = first_step
        self.report: Report | None = None
        self.past: list[_trace.Call] = []
        self._calls: deque[_trace.Call] = deque(maxlen=_PENDING)
        self._open: tuple[nn.Module, _trace.Call] | None = None
        self._depth = 0
        self._backward_depth = 0
        self._backward_done = False
        self._optimizer_seen = False
        self._optimizer = "the optimizer"
        self._gradient_versions: list[tuple[int, int]] | None = []  # None: `_seen` holds them
        self._owned: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
        self._current = _Step()
        self._flight: deque[_Step] = deque()
        self._kept_step: int | None = None
        self._trail: _loss.LossTrail | None = None
        self._trails: deque[_loss.LossTrail] = deque(maxlen=_PENDING)
        self._stack = contextlib.ExitStack()
        self._parameters: list[tuple[str, nn.Parameter]] | None = None
        self._parameters_until = 0
        self._plain: list[Tensor] = []
        self._seen = torch.empty(0)
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._intended = self._undelivered = False
        self._finding: _trace.Finding | None = None
        self._found_in: nn.Module | None = None

    # ---- entering and leaving

    def __enter__(self) -> Watch:
        self._stack = contextlib.ExitStack()
        _load.native_reason(build=False)  # counting is cheaper with the kernels, if they were built once
        if self.model is None:
            self._find_roots()
        else:
            self._attach(self.model)
        self._patch(torch.autograd, "backward", self._backward)
        self._patch(torch.autograd, "grad", self._grad)
        self._notice_scaler()
        self._stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
        self._stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.close()
        if kind is None and self.report is None:
            self._close_step()
            self._read(wait=True)
        elif self._undelivered and self.report is not None:
            self._undelivered = False
            self._hit(self.report)

    def _patch(self, owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, functools.wraps(original)(functools.partial(wrapper, original)))
        self._stack.callback(setattr, owner, name, original)

    def _notice_scaler(self) -> None:
        original = torch.amp.GradScaler.scale

        @functools.wraps(original)
        def scale(scaler: torch.amp.GradScaler, outputs: Any) -> Any:
            if self.scaled is None and scaler.is_enabled():
                self.scaled = True
            return original(scaler, outputs)

        torch.amp.GradScaler.scale = scale  # type: ignore[assignment, method-assign]
        self._stack.callback(setattr, torch.amp.GradScaler, "scale", original)

    def _attach(self, module: nn.Module) -> None:
        self._roots.add(module)
        self._parameters = None
        compiled = getattr(module, "_compiled_call_impl", None)
        if compiled is not None:  # hooks would be compiled too

            def call(*args: Any, **kwargs: Any) -> Any:
                self._before(module, args, kwargs)
                outputs = None
                try:
                    outputs = compiled(*args, **kwargs)
                    return outputs
                finally:
                    self._after(module, args, kwargs, outputs)

            module._compiled_call_impl = call
            self._stack.callback(setattr, module, "_compiled_call_impl", compiled)
            return
        before = module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        after = module.register_forward_hook(self._after, with_kwargs=True, always_call=True)
        self._stack.callback(before.remove)
        self._stack.callback(after.remove)

    def _find_roots(self) -> None:
        """Without a model: the outermost module of every call is watched from its first call on."""
        original = nn.Module.__call__

        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            inner = torch.compiler.is_compiling() or self._silent or self._open is not None or self._backward_depth
            if not inner and module not in self._roots:
                self._attach(module)
            return original(module, *args, **kwargs)

        nn.Module.__call__ = call  # type: ignore[method-assign]
        self._stack.callback(setattr, nn.Module, "__call__", original)

    # ---- the forward

    def _before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.compiler.is_compiling() or self._silent or self.report is not None:
            return
        if self._open is not None:
            self._depth += self._open[0] is module
            return
        if _transformed(tensors_in((args, kwargs))):
            return
        if self._backward_done and not self._optimizer_seen:
            self._next_step()
        call = _trace.Call.of(module, self.step, args, kwargs)
        if self.history or self._reads_late(module):
            self._keep(call)
        self._open = module, call

    def _after(self, module: nn.Module, args: Any, kwargs: Any, outputs: Any) -> None:
        if torch.compiler.is_compiling() or self._silent or self._open is None or self._open[0] is not module:
            return
        if self._depth:
            self._depth -= 1
            return
        call = self._open[1]
        self._open = None
        raised = sys.exc_info()[1]
        if outputs is None and raised is not None:
            self._search_raised(call, raised)
            return
        tensors = [x for x in tensors_in(outputs) if floating(x)]
        if not tensors or _transformed(tensors):
            return
        self._calls.append(call)
        self._hook_outputs(call, tensors)
        names = [f"output {i} of the model" for i in range(len(tensors))]
        self._counted(names, tensors, lambda evidence: self._search_forward(call, evidence))

    def _hook_outputs(self, call: _trace.Call, tensors: list[Tensor]) -> None:
        """Keep the gradients that arrive at the outputs; the hooks know the call, not the outputs."""
        graph = [x for x in tensors if x.requires_grad]
        call.nodes = frozenset(x.grad_fn._sequence_nr() for x in graph if x.grad_fn is not None)
        call.gradients = [None] * len(graph)
        for i, x in enumerate(graph):
            x.register_hook(functools.partial(_arrived, call.gradients, i))

    def _reads_late(self, module: nn.Module) -> bool:
        if self.late is None:
            self.late = any(p.device.type != "cpu" for p in module.parameters())
        return self.late

    def _keep(self, call: _trace.Call) -> None:
        """The weights as they are now: for a search after the optimizer has changed them."""
        if self._kept_step == self.step or len(self._flight) >= _IN_FLIGHT:
            return
        self._kept_step = self.step
        module = _trace.eager(call.module)
        with torch.no_grad():
            state = [*module.named_parameters(), *module.named_buffers()]
            call.weights = {name: x.detach().clone() for name, x in state}
        if self.history:
            self.past.append(call)
            if len(self.past) > self.history:  # thin out the older half: the last steps matter most
                del self.past[1 : self.history // 2 + 1 : 2]

    # ---- the backward

    def _backward(self, original: Callable[..., None], tensors: Any, *args: Any, **kwargs: Any) -> None:
        if self._backward_depth or self._silent or self.report is not None:
            return original(tensors, *args, **kwargs)
        self._before_backward(tensors)
        self._backward_depth += 1
        try:
            original(tensors, *args, **kwargs)
        except BaseException:
            if self._trail is not None:
                self._trail.close()
            raise
        finally:
            self._backward_depth -= 1
        self._after_backward([] if self._all_finite() else self._gradients())

    def _grad(self, original: Callable[..., Any], outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self._backward_depth or self._silent or self.report is not None:
            return original(outputs, inputs, *args, **kwargs)
        self._before_backward(outputs)
        self._backward_depth += 1
        try:
            found = original(outputs, inputs, *args, **kwargs)
        except BaseException:
            if self._trail is not None:
                self._trail.close()
            raise
        finally:
            self._backward_depth -= 1
        self._after_backward([(f"result {i}", g) for i, g in enumerate(found) if g is not None])
        return found

    def _before_backward(self, roots: Any) -> None:
        roots = [x for x in tensors_in(roots) if x.requires_grad]
        ends = frozenset(number for call in self._calls for number in call.nodes)
        self._trail = trail = _loss.LossTrail([x.grad_fn for x in roots], ends, where=_trace.code_line())
        losses = [x for x in roots if floating(x)]
        if losses and not self.scaled:
            self._counted(["loss"] * len(losses), losses, lambda evidence: self._search_loss(trail, evidence))

    def _after_backward(self, gradients: list[tuple[str, Tensor]]) -> None:
        trail, self._trail = self._trail, None
        if trail is None:
            return
        trail.close()
        calls = list(self._calls)
        self._backward_done = True
        if self.scaled:
            self._trails.append(trail)
        if gradients and not self.scaled:
            names, values = zip(*gradients, strict=True)
            self._counted(names, values, lambda evidence: self._search_backward(calls, trail, evidence))
            self._gradient_versions = _versions(values)
        if not self.late and not self.scaled:
            self._calls.clear()

    def _gradients(self) -> list[tuple[str, Tensor]]:
        """(name, gradient) of every parameter that has one."""
        self._look_up()
        return [(name, gradient) for name, p in self._parameters if (gradient := p.grad) is not None]  # type: ignore[union-attr]

    def _look_up(self) -> None:
        """The parameters, anew now and then."""
        if self._parameters is None or self.step >= self._parameters_until:
            roots = [self.model] if self.model is not None else list(self._roots)
            pairs = (pair for root in roots for pair in _trace.eager(root).named_parameters())
            self._parameters = list({id(p): (name, p) for name, p in pairs if p.numel()}.values())
            self._parameters_until = self.step + _LOOK_AGAIN
            self._plain = [p for _, p in self._parameters]
            self._gradient_versions = list(self._counted_gradients())
            self._seen = torch.empty((len(self._plain) + 1, 2), dtype=torch.int64)  # as `gradients_finite` fills it

    def _all_finite(self, *, unless_checked: bool = False) -> bool:
        """Whether all gradients of parameters are, in one pass of C; False too where only a closer look can tell.

        Eighty small gradients cost more to pass on one by one than to read. `unless_checked`: also True where they
        are those that were counted after the backward pass, and nothing was written to them since.
        """
        if self.late or self.scaled or torch.compiler.is_compiling() or "stablekern._native" not in sys.modules:
            return False
        self._look_up()
        unless_seen = unless_checked and self._gradient_versions is None
        if not _load.native_module().gradients_finite(self._plain, self._seen.data_ptr(), unless_seen):
            return False
        self._gradient_versions = None
        return True

    def _counted_gradients(self) -> set[tuple[int, int]]:
        """What is known by its version to have been finite after the backward pass."""
        if self._gradient_versions is not None:
            return set(self._gradient_versions)
        (number, _), *rows = self._seen.tolist()
        return {(name, version) for name, version in rows[:number]}

    # ---- the step

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._silent or self.report is not None or not self._owns(optimizer):
            return
        self._optimizer = type(optimizer).__name__
        if self._all_finite(unless_checked=True):
            return
        known = self._counted_gradients()
        changed = [(n, g) for n, g in self._gradients() if (id(g), g._version) not in known]
        if changed:
            calls, trails = list(self._calls), list(self._trails)
            names, values = zip(*changed, strict=True)
            self._counted(names, values, lambda evidence: self._search_step(calls, trails, evidence))

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._silent or not self._owns(optimizer):
            return
        if not self._optimizer_seen:  # what were taken for steps were parts of one
            self._optimizer_seen = True
            self.step = self._first_step
        self._next_step()

    def _owns(self, optimizer: Any) -> bool:
        """Whether an optimizer holds a parameter of what is watched."""
        if optimizer not in self._owned:
            modules = [self.model] if self.model is not None else list(self._roots)
            mine = {id(p) for module in modules for p in module.parameters()}
            self._owned[optimizer] = any(id(p) in mine for group in optimizer.param_groups for p in group["params"])
        return self._owned[optimizer]

    def _next_step(self) -> None:
        self._close_step()
        self.step += 1
        self._backward_done = False
        self._calls.clear()
        self._trails.clear()
        self._read()

    # ---- reading the counts

    def _counted(
        self, names: Sequence[str], tensors: Sequence[Tensor], search: Callable[[_Evidence], Report | None]
    ) -> None:
        if not self.late and _finite_at_once(list(tensors)):
            return
        evidence = _Evidence(list(names), [_dense(x) for x in tensors], late=bool(self.late))
        count = _Count(evidence, self.step, search)
        if self.late:
            self._current.counts.append(count)
        else:
            self._judge(count, evidence.numbers)

    def _close_step(self) -> None:
        if self._current.counts:
            self._current.send()
            self._flight.append(self._current)
            self._current = _Step()

    def _read(self, *, wait: bool = False) -> None:
        while self._flight and (wait or self._flight[0].arrived()) and self.report is None:
            step = self._flight.popleft()
            if step.event is not None:
                step.event.synchronize()
            start = 0
            for count in step.counts:
                stop = start + count.evidence.numbers.numel()
                self._judge(count, step.host[start:stop])  # type: ignore[index]
                start = stop

    def _judge(self, count: _Count, values: Tensor) -> None:
        if self.report is not None or bool(values.isfinite().all()):
            return
        Watch._silent = True
        try:
            report = count.search(count.evidence) if count.evidence.confirm(values) else None
        finally:
            Watch._silent = False
        if report is not None:
            self._hit(replace(report, step=count.step))

    def _hit(self, report: Report) -> None:
        self.report = report
        self._calls.clear()
        self._flight.clear()
        if self.on_hit == "raise":
            error: Any = NonFiniteError(message(_WHERE, "every tensor of a step must be finite", f"\n{report}"))
            error.report = report
            raise error
        if self.on_hit == "warn":
            warnings.warn(f"stablekern.{_WHERE}: {report}", RuntimeWarning, stacklevel=2)

    # ---- searching

    def _search_forward(self, call: _trace.Call, evidence: _Evidence) -> Report | None:
        stats = evidence.stats[0]
        if self._intended and not any(s.nan for s in evidence.stats):
            return None
        finding, remarks = self._replayed(_trace.find_forward, call)
        if call.intended:
            self._intended = True  # infinities that the model writes itself, as a mask does
            return None
        return self._report("forward", finding, remarks, evidence.names[evidence.bad[0]], stats, call)

    def _search_raised(self, call: _trace.Call, raised: BaseException) -> None:
        """The model raised: perhaps for a NaN on its way, as decompositions do. The report is delivered at the end."""
        Watch._silent = True
        try:
            finding, remarks = self._replayed(functools.partial(_trace.find_forward, raises=True), call)
        finally:
            Watch._silent = False
        if finding is not None:
            seen = f"{type(raised).__name__} in the model: {str(raised).partition(chr(10))[0]}"
            self.report = self._report("forward", finding, remarks, seen, finding.tensor, call)
            self._undelivered = True

    def _search_backward(self, calls: list[_trace.Call], trail: _loss.LossTrail, evidence: _Evidence) -> Report | None:
        bad, stats = evidence.bad, evidence.stats[0]
        first = evidence.names[bad[0]]
        seen = f"gradients of {len(bad)} of {len(evidence.names)} parameters, the first {first}"
        stats = replace(stats, name=f"gradient of {stats.name}")
        found = trail.backward()
        if found is not None:
            return self._report("loss", found, (), seen, stats, None)
        remarks: tuple[str, ...] = ()
        for call in reversed(calls):
            if not any(g is not None for g in call.gradients):
                continue
            finding, more = self._replayed(_trace.find_backward, call)
            remarks += more
            if finding is not None:
                return self._report("backward", finding, more, seen, stats, call)
            if not all(finite(g) for g in call.gradients if g is not None):
                name = type(_trace.eager(call.module)).__name__
                remarks += (f"the gradient that arrived at the output of {name} was not finite: made outside of it",)
        return self._report("backward", None, remarks, seen, stats, None)

    def _search_loss(self, trail: _loss.LossTrail, evidence: _Evidence) -> Report | None:
        stats = evidence.stats[0]
        return self._report("loss", trail.forward(stats), (), "the loss", stats, None)

    def _search_step(
        self, calls: list[_trace.Call], trails: list[_loss.LossTrail], evidence: _Evidence
    ) -> Report | None:
        names, bad = evidence.names, evidence.bad
        stats = [replace(s, name=f"gradient of {s.name}") for s in evidence.stats]
        seen = f"gradients of {len(bad)} of {len(names)} parameters before {self._optimizer}.step"
        if self.scaled:
            for trail in reversed(trails):
                if (found := trail.backward()) is not None:
                    return self._report("loss", found, (), seen, stats[0], None)
            for call in reversed(calls):
                finding, remarks = self._replayed(_trace.find_backward, call)
                if finding is not None:
                    return self._report("backward", finding, remarks, seen, stats[0], call)
        whole = evidence.whole
        measured: dict[str, float] = {"gradients": len(names), "not_finite": len(bad), "all_nan": whole}
        text = f"after backward every gradient was finite; before the step {len(bad)} of {len(names)} are not"
        kind = "gradient changed after backward"
        if len(names) > 1 and whole == len(names):
            kind, text = "NaN norm in clip", f"{text}, and each is NaN throughout: one NaN factor multiplied all"
        finding = _trace.Finding(
            "before the step", "", "", "", f"what runs between backward and {self._optimizer}.step", "", stats[0],
            tuple(stats[1:4]), Cause(kind, text, measured),
        )  # fmt: skip
        return self._report("before the step", finding, (), seen, stats[0], None)

    def _replayed(
        self, search: Callable[[_trace.Call], _trace.Finding | None], call: _trace.Call
    ) -> tuple[_trace.Finding | None, tuple[str, ...]]:
        """The finding, and what should be known about it."""
        if reason := _cannot_repeat(call, self.late):
            return None, (reason,)
        remarks: tuple[str, ...] = ()
        if call.changed:
            remarks += ("an argument of the model was written to after the call: it was repeated with other numbers",)
        if _compiled(call.module):
            remarks += ("compiled code was repeated uncompiled: what fusion or its kernels do is not seen",)
        try:
            finding = search(call)
        except Exception as error:  # the user's model: whatever it raises, the count stands
            return None, (*remarks, f"the call could not be repeated: {type(error).__name__}: {error}")
        if finding is not None and finding.others:
            remarks += (f"{finding.others} further operations made non-finite gradients independently",)
        return finding, remarks

    def _report(
        self, phase: str, finding: _trace.Finding | None, remarks: tuple[str, ...], seen: str, stats: TensorStats,
        call: _trace.Call | None,
    ) -> Report:  # fmt: skip
        if finding is None:
            text = "the operation was not found"
            if call is not None and not remarks:
                remarks = ("the repeated call was finite: random numbers, other state, or kernels that are not exact",)
            module = type(_trace.eager(call.module)).__name__ if call is not None else ""
            return Report(
                self.step, phase, "", module, "", "", "", stats, (), Cause("unknown", text), seen, remarks,
            )  # fmt: skip
        self._finding, self._found_in = finding, call.module if call is not None else None
        cause, phase = finding.cause, finding.phase if finding.phase != "forward" else phase
        if cause.kind == "weights":
            phase = "weights"
            if self._optimizer_seen:
                text = f"{cause.text}; the gradients were finite, so {self._optimizer}.step made it so"
                cause = replace(cause, text=text)
        return Report(
            self.step, phase, finding.path, finding.module, finding.note, finding.op, finding.where, finding.tensor,
            finding.inputs, cause, seen, remarks,
        )  # fmt: skip

    def distribution(self) -> tuple[str, list[tuple[int, Tensor]]] | None:
        """Over the steps that were kept (`history`): the quantity that the cause is about, and its values per step."""
        if self._finding is None:
            return None
        name, rows = "", []
        Watch._silent = True
        try:
            for call in (call for call in self.past if call.module is self._found_in):
                found = _trace.values_at(call, self._finding)
                if found is not None:
                    name, values = found
                    rows.append((call.step, values))
        finally:
            Watch._silent = False
        return (name, rows) if rows else None


def _versions(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """What a tensor is known by, once it has been looked at: no reference, which would keep it."""
    return [(id(x), x._version) for x in tensors]


def _arrived(gradients: list[Tensor | None], index: int, gradient: Tensor) -> None:
    gradient = gradient.detach()
    before = gradients[index]
    gradients[index] = gradient if before is None else before + gradient


def _transformed(tensors: Iterable[Tensor]) -> bool:
    """Whether a function transform (vmap, grad) is at work: its tensors have no numbers to read."""
    return any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))


def _compiled(module: nn.Module) -> bool:
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())


def _cannot_repeat(call: _trace.Call, late: bool | None) -> str | None:
    """Why a call cannot be done again on this process alone, or None."""
    if late and call.weights is None:
        return "the weights of that step are gone: too many steps were in flight"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if torch.distributed.get_world_size() > 1:
            for module in call.module.modules():
                if type(module).__name__.startswith("FSDP") or isinstance(module, nn.SyncBatchNorm):
                    return f"{type(module).__name__} talks to other processes: the call is not repeated on one of them"
    return None


def watch(
    model: nn.Module | None = None,
    *,
    on_hit: str = "raise",
    late: bool | None = None,
    scaled: bool | None = None,
    first_step: int = 1,
    history: int = 0,
) -> Watch:
    """Name the first non-finite tensor of a training run: module, operation, line, step, numbers, cause and remedy.

        with stablekern.health.watch(model):
            for batch in loader:
                ...  # forward, loss.backward(), optimizer.step(), as ever

    **Arguments:**

    - `model`: the module that is called; None watches the outermost module of every call. May be compiled, wrapped in
        DistributedDataParallel, checkpointed, or share modules.
    - `on_hit`: "raise" a `NonFiniteError` with the report, "warn", or "record" it in `.report` alone. The watch ends
        with its first report.
    - `late`: read the counts only when they have arrived on the host, without ever waiting for the device; None is
        True if a parameter is on a GPU. Keeps the weights of up to 3 steps, and reports a step or two later.
    - `scaled`: a `GradScaler` is in use: only steps that it lets through count, not those that it skips. None finds out
        by itself.
    - `first_step`: the number of the first step, after a checkpoint.
    - `history`: keep the weights and the batch of so many earlier steps, for `distribution`.

    Steps are counted by `step()` of an optimizer that holds a parameter of the model; without one, by its backwards.

    **Returns:** a context manager with `.report` (a `Report` or None), `.step`, and `.distribution()`.

    **Raises:** `ValueError` for an unknown `on_hit`, `TypeError` for something else than a module.

    **Limits:** `docs/watch.md` says what it cannot see.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(message(_WHERE, "`model` must be a module", type(model).__name__))
    if on_hit not in ("raise", "warn", "record"):
        raise ValueError(message(_WHERE, "`on_hit` must be raise, warn or record", repr(on_hit)))
    _check.integer(_WHERE, "first_step", first_step, low=0)
    _check.integer(_WHERE, "history", history, low=0)
    return Watch(model, on_hit=on_hit, late=late, scaled=scaled, first_step=first_step, history=history)
