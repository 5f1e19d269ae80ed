"""What is computed between the model's output and `backward`: no module, so nothing to call again.

Before a backward begins its graph is whole: the nodes down to the model's outputs are few, and their operands are read
from what they saved for their derivative. Hooks keep the gradients that pass; all is let go when the backward was good.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from stablekern.health._causes import Cause, TensorStats, backward_cause, finite, floating, forward_cause, tensors_in
from stablekern.health._trace import Finding, GradientTrail, graph_of, is_leaf

__all__ = ["LossTrail"]

_MOST_NODES = 256  # of a loss; beyond it is another model, and is left alone
_aten = torch.ops.aten

# A node's operation and operands, from what it saved; those that save only the result have their operand recovered.
_OPERANDS: dict[str, tuple[Any, Callable[[dict[str, Any]], list[Any]]]] = {
    "Log": (_aten.log.default, lambda s: [s["self"]]),
    "Log2": (_aten.log2.default, lambda s: [s["self"]]),
    "Log10": (_aten.log10.default, lambda s: [s["self"]]),
    "Log1P": (_aten.log1p.default, lambda s: [s["self"]]),
    "Sqrt": (_aten.sqrt.default, lambda s: [s["result"] * s["result"]]),
    "Rsqrt": (_aten.rsqrt.default, lambda s: [1 / (s["result"] * s["result"])]),
    "Reciprocal": (_aten.reciprocal.default, lambda s: [1 / s["result"]]),
    "Exp": (_aten.exp.default, lambda s: [s["result"].double().log()]),
    "Div": (_aten.div.Tensor, lambda s: [s.get("self", torch.ones(())), s["other"]]),
    "Mul": (_aten.mul.Tensor, lambda s: [s["self"], s["other"]]),
    "Pow": (_aten.pow.Tensor_Scalar, lambda s: [s["self"], s["exponent"]]),
    "Acos": (_aten.acos.default, lambda s: [s["self"]]),
    "Asin": (_aten.asin.default, lambda s: [s["self"]]),
    "Std": (_aten.std.correction, lambda s: [s["self"]]),
    "NllLoss": (
        _aten.nll_loss_forward.default,
        lambda s: [s["self"], s["target"], s.get("weight"), s["reduction"], s["ignore_index"]],
    ),
    "LogSoftmax": (_aten._log_softmax.default, lambda s: [s["result"], s["dim"], False]),
    "ToCopy": (_aten._to_copy.default, lambda s: [s["self"]]),
}
_KIND = re.compile(r"(\w+?)Backward\d*$")


def _kind(node: Any) -> str:
    return _kind_of(node.name())


@functools.cache
def _kind_of(name: str) -> str:
    found = _KIND.match(name)
    return found[1] if found else name


def _operation_name(node: Any) -> str:
    """As the operations of a replay are called; a product of a tensor with itself is a square."""
    parents = [parent for parent, _ in node.next_functions]
    same = _kind(node) == "Mul" and len(parents) == 2 and parents[0] is parents[1]
    return "square" if same else _kind(node).lower()


class LossTrail:
    """The graph of a loss down to the model's outputs, while one backward runs."""

    def __init__(self, roots: Sequence[Any], ends: frozenset[int], *, where: str) -> None:
        nodes = graph_of(roots, ends, _MOST_NODES)
        self.where = where
        self.nodes = [] if len(nodes) >= _MOST_NODES else [node for node in nodes if not is_leaf(node)]
        self.saved = {node: _saved(node) for node in self.nodes if _kind(node) in _OPERANDS}
        self.trail = GradientTrail(self.nodes, ends, deferred=True)

    def close(self) -> None:
        """The backward is over: no more hooks."""
        self.trail.remove()

    def _operation(self, node: Any) -> tuple[Any, list[Any], Any] | None:
        """The forward operation of a node, its operands and result, where they can be told."""
        if _kind(node) not in _OPERANDS:
            return None
        function, operands = _OPERANDS[_kind(node)]
        try:
            args = operands(self.saved[node])
            with torch.no_grad():
                return function, args, function(*args)
        except (KeyError, RuntimeError, TypeError):
            return None

    def _ancestors(self, node: Any) -> Callable[[Tensor], list[str]]:
        return lambda x: [_operation_name(parent) for parent in _chain(node)]

    def _finding(
        self, node: Any, tensor: TensorStats, operands: Sequence[tuple[str, Tensor]], cause: Cause, others: int = 0
    ) -> Finding:
        inputs = tuple(TensorStats.of(name, x) for name, x in operands if floating(x))
        return Finding("loss", "", "", "", node.name(), self.where, tensor, inputs, cause, others)

    def forward(self, loss: TensorStats) -> Finding:
        """The first operation of the loss whose operands are finite and whose result is not."""
        for node in sorted(self.nodes, key=lambda node: node._sequence_nr()):
            operation = self._operation(node)
            if operation is None:
                continue
            function, args, outputs = operation
            wrong = next((x for x in tensors_in(outputs) if floating(x) and not finite(x)), None)
            if wrong is None:
                continue
            if all(finite(x) for x in tensors_in(args) if floating(x)) or _kind(node) == "Exp":
                cause = forward_cause(function, args, {}, outputs, self._ancestors(node))
                operands = [(f"operand {i}", x) for i, x in enumerate(tensors_in(args))]
                return self._finding(node, TensorStats.of("result", wrong), operands, cause)
        names = ", ".join(dict.fromkeys(node.name() for node in self.nodes))
        text = f"the model's outputs are finite, the loss is not; its graph holds {names or 'nothing'}"
        return Finding("loss", "", "", "", "the loss", self.where, loss, (), Cause("loss", text))

    def backward(self) -> Finding | None:
        """The first operation of the loss that turned a finite gradient into a non-finite one."""
        self.trail.settle()
        found, others = self.trail.origin()
        if found is None:
            return None
        node = next(node for node in self.nodes if node._sequence_nr() == found.sequence)
        wrong = next(g for g in found.found if g is not None and floating(g) and not finite(g))
        operation = self._operation(node)
        cause, operands = None, [("incoming gradient", g) for g in found.incoming if g is not None]
        if operation is not None:
            function, args, outputs = operation
            operands += [(f"forward operand {i}", x) for i, x in enumerate(tensors_in(args))]
            cause = backward_cause(function, args, {}, outputs, found.incoming, found.found, self._ancestors(node))
        if cause is None:
            cause = Cause("loss", f"{node.name()} of the loss made it from a finite gradient")
        return self._finding(node, TensorStats.of("gradient", wrong), operands, cause, others)


_NAMES: dict[type, list[str]] = {}


def _saved(node: Any) -> dict[str, Any]:
    """What a node saved for its derivative, by name."""
    if type(node) not in _NAMES:
        _NAMES[type(node)] = [name for name in dir(type(node)) if name.startswith("_saved_")]
    values = {}
    for name in _NAMES[type(node)]:
        try:
            value = getattr(node, name)
        except RuntimeError:  # overwritten since
            continue
        if value is not None:
            whole = isinstance(value, int) and value > 2**63 and not math.isinf(value)
            value = value - 2**64 if whole else value  # signed numbers are given as unsigned
            values[name.removeprefix("_saved_")] = value.detach() if isinstance(value, Tensor) else value
    return values


def _chain(node: Any, length: int = 4) -> list[Any]:
    """The nodes of what made the first operand, the nearest first."""
    found: list[Any] = []
    while len(found) < length:
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
        if node is None or is_leaf(node):
            break
        found.append(node)
    return found
