"""Why an operation made a NaN or an infinity, told from its own numbers.

A cause is named when a measurement supports it: the zeros of a denominator are counted where the result is bad, an
overflow is computed again in a wider type, the gaps between eigenvalues are taken. Where no rule is met the cause is
"unknown", and the statistics of the operands are all that is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stablekern.ops.finite_stats import finite_stats

__all__ = ["REMEDIES", "Cause", "TensorStats", "backward_cause", "culprit_values", "forward_cause", "tensors_in"]


@dataclass(frozen=True)
class TensorStats:
    """Counts of NaN and infinity of a tensor; minimum, maximum and mean of its other entries, NaN if there are none."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nan: int
    inf: int
    count: int
    min: float
    max: float
    mean: float

    @classmethod
    def of(cls, name: str, x: Tensor) -> TensorStats:
        nan, inf, low, high, mean, count = (entry.item() for entry in finite_stats([x.detach()]))
        kind, counts = str(x.dtype).removeprefix("torch."), (int(nan), int(inf), int(count))
        return cls(name, tuple(x.shape), kind, *counts, low, high, mean)

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape)) or "scalar"
        bad = f"{self.nan} NaN, {self.inf} inf of {self.count}" if self.nan or self.inf else f"{self.count} finite"
        rest = f", {self.min:.4g} to {self.max:.4g}, mean {self.mean:.4g}" if self.nan + self.inf < self.count else ""
        return f"{self.name} ({shape} {self.dtype}): {bad}{rest}"


# What removes each cause: in words, and the operation of this package that does it (None where plain torch does).
REMEDIES: dict[str, tuple[str, str | None]] = {
    "repeated eigenvalues": (
        "the derivative of an eigenvector divides by the gap: use a backward that is finite there",
        "stablekern.eigh (laplacian_pe, eigenprojector, spectral_function; stablekern.eigvalsh for values alone)",
    ),
    "zero norm": ("bound the gradient near the origin", "stablekern.cosine_edges"),
    "exp overflow": (
        "keep the argument at or below 0: subtract the maximum, or use softplus, logsumexp",
        "stablekern.focal_loss for losses; stablekern.selective_scan, ssd_scan for decays",
    ),
    "sqrt at 0": (
        "the derivative of the square root is infinite at 0: keep its argument above 0",
        "stablekern.spectral_function for matrices; stablekern.normalized_laplacian for degrees",
    ),
    "sqrt of a negative number": (
        "clamp the argument at 0; of a matrix, project it on the semidefinite cone",
        "stablekern.spectral_function for matrices",
    ),
    "log at 0": ("take the logarithm of the logits, not of a saturated probability", "stablekern.focal_loss"),
    "log of a negative number": ("clamp the argument above 0", None),
    "division by zero": (
        "treat the zero before dividing by it",
        "stablekern.normalized_laplacian for degrees; stablekern.covariance_blend for traces",
    ),
    "half overflow": (
        "compute this in float32: half precision ends at 65504",
        "the ops of stablekern compute in float32 or better under any autocast",
    ),
    "overflow": (
        "bound what grows: normalise, or clamp the state of a recurrence",
        "stablekern.linear_scan, selective_scan, ssd_scan with state_clamp",
    ),
    "0 * inf in a masked branch": (
        "torch.where masks the value, not the gradient: replace the argument too, where(mask, f(where(mask, x, 1)), 0)",
        "stablekern.normalized_laplacian for degrees",
    ),
    "0 * inf": ("mask by torch.where, not by multiplying", None),
    "inf - inf": ("bound both terms before they are subtracted", None),
    "fully masked row": ("leave one entry of each row open, or set the rows to 0 after the softmax", None),
    "empty reduction": ("divide by max(count, 1)", None),
    "zero variance": ("a positive eps in the normalisation", None),
    "singular matrix": (
        "load the diagonal, or solve by a factorisation that reports the bad item",
        "stablekern.chol_solve_safe, stablekern.ridge_lstsq",
    ),
    "edge of arccos": (
        "the derivative is infinite at +-1: train on the cosine itself",
        "stablekern.cosine_edges",
    ),
    "outside the domain": ("keep the argument inside the domain of the function", None),
    "NaN norm in clip": (
        "check before clipping: a NaN norm multiplies every gradient by NaN",
        "stablekern.optim.GradGuard",
    ),
    "gradient changed after backward": ("look at what runs between backward and step", "stablekern.optim.GradGuard"),
    "weights": ("look at the optimizer and its learning rate", "stablekern.optim.GradGuard"),
    "input": ("look at the data: this batch is not finite before the model sees it", None),
    "literal": ("the code writes this value", None),
    "loss": ("the loss is computed outside the model, by operations that keep no operands", None),
    "unknown": ("no known cause fits the numbers above", None),
}


@dataclass(frozen=True)
class Cause:
    """`kind` is a key of `REMEDIES`, `text` a sentence with the numbers in `measured`, `argument` which operand it is.

    `remedy` says what to do, `op` which operation of this package does it.
    """

    kind: str
    text: str
    measured: dict[str, float] = field(default_factory=dict)
    argument: int = 0

    @property
    def remedy(self) -> str:
        return REMEDIES[self.kind][0]

    @property
    def op(self) -> str | None:
        return REMEDIES[self.kind][1]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, mappings and data classes, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict) or hasattr(value, "items"):
        for _, item in value.items():
            yield from tensors_in(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name))


def floating(x: Any) -> bool:
    """Whether `x` is a dense tensor that could hold a NaN."""
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()) and x.layout == torch.strided


def finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def plain_name(function: Any) -> str:
    """`exp` of `aten::exp_`, `linalg_eigh` of `aten::_linalg_eigh`."""
    return function.overloadpacket.__name__.strip("_")


# ---- measuring -------------------------------------------------------------------------------------------------------

_WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
_EXP = {"exp", "exp2", "expm1", "sinh", "cosh"}
_LOG = {"log", "log2", "log10", "log1p", "xlogy"}
_SINGULAR = {"linalg_inv_ex", "linalg_solve_ex", "linalg_cholesky_ex", "cholesky", "linalg_solve_triangular"}
_NORMS = {"linalg_vector_norm", "norm"}
_ROOTS = {"sqrt", "rsqrt"}
_SHIFTS = {"clamp", "clamp_min", "add", "maximum"}
_NORMALISATIONS = {"native_layer_norm", "native_group_norm", "native_batch_norm", "fused_rms_norm"}
_MEANS = {"mean", "std", "var", "std_mean", "var_mean", "nll_loss_forward", "nll_loss2d_forward"}


def _bad(outputs: Any) -> Tensor | None:
    """Where the first non-finite output is not finite."""
    for x in tensors_in(outputs):
        if floating(x) and not finite(x):
            return ~torch.isfinite(x)
    return None


def _operands(args: Sequence[Any], like: Tensor) -> list[Tensor]:
    """Tensors and numbers among the first two arguments, as tensors."""
    return [x if isinstance(x, Tensor) else torch.as_tensor(x, device=like.device) for x in args[:2]]


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def _where(mask: Tensor, condition: Tensor) -> int:
    """In how many places of `mask` a condition of broadcastable shape holds; 0 if the shapes do not fit."""
    try:
        return _count(mask & condition)
    except RuntimeError:
        return 0


def _largest(x: Tensor) -> float:
    values = x[torch.isfinite(x)]
    return float(values.abs().max()) if values.numel() else math.nan


def _widened(value: Any) -> Any:
    """The same arguments in the next wider type, detached."""
    if isinstance(value, Tensor):
        return value.detach().to(_WIDER.get(value.dtype, value.dtype))
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(item) for item in value)
    return value


def _overflow(narrow: torch.dtype, largest: float, what: str) -> Cause | None:
    """The cause if a finite number does not fit into the type."""
    if narrow not in _WIDER or not math.isfinite(largest) or largest <= (limit := torch.finfo(narrow).max):
        return None
    name = str(narrow).removeprefix("torch.")
    text = f"{what} reaches {largest:.4g}; {name} ends at {limit:.4g}"
    kind = "overflow" if narrow == torch.float32 else "half overflow"
    return Cause(kind, text, {"largest": largest, "limit": limit})


def _is_norm(ancestors: Sequence[str]) -> bool:
    """Whether a value was made as a norm: by a norm, or as the root of a sum of squares."""
    names = list(ancestors)
    while names and names[0] in _SHIFTS:
        names.pop(0)
    if names and names[0] in _NORMS:
        return True
    names = names[1:] if names and names[0] in _ROOTS else names
    return len(names) > 1 and names[0] in ("sum", "mean") and names[1] in ("pow", "square")


def _literals(args: Sequence[Any], kwargs: dict[str, Any]) -> list[float]:
    values = [*args, *kwargs.values()]
    return [v for v in values if isinstance(v, float) and not math.isfinite(v)]


# ---- forward ---------------------------------------------------------------------------------------------------------


def _exp(x: Tensor, out: Tensor) -> Cause | None:
    limit, largest = math.log(torch.finfo(out.dtype).max), float(x[torch.isfinite(x)].max())
    if largest <= limit:
        return None
    over = _count(x > limit)
    name = str(out.dtype).removeprefix("torch.")
    text = f"the largest argument of exp is {largest:.5g} ({over} above {limit:.4g}, where {name} overflows)"
    return Cause("exp overflow", text, {"largest_argument": largest, "limit": limit, "above": over})


def _log(name: str, x: Tensor, bad: Tensor) -> Cause | None:
    zero = -1.0 if name == "log1p" else 0.0
    below, at = _where(bad, x < zero), _where(bad, x == zero)
    if below:
        least = float(x[torch.isfinite(x)].min())
        text = f"{below} arguments of {name} are below {zero:g}, the least {least:.4g}"
        return Cause("log of a negative number", text, {"negative": below, "least": least})
    if at:
        return Cause("log at 0", f"{at} of {x.numel()} arguments of {name} are exactly {zero:g}", {"zeros": at})
    return None


def _root(name: str, x: Tensor, bad: Tensor, ancestors: Sequence[str]) -> Cause | None:
    below, at = _where(bad, x < 0), _where(bad, x == 0)
    if below:
        least = float(x[torch.isfinite(x)].min())
        text = f"{below} of {x.numel()} arguments of {name} are negative, the least {least:.4g}"
        return Cause("sqrt of a negative number", text, {"negative": below, "least": least})
    return _zeros(name, x, at, ancestors) if at else None


def _zeros(name: str, x: Tensor, at: int, ancestors: Sequence[str], argument: int = 0) -> Cause:
    """Zeros where an operation is singular: of a norm, of the argument of a root, or of a denominator."""
    found = {"zeros": at, "smallest": 0.0}
    if _is_norm([name, *ancestors] if name in _ROOTS else ancestors):
        return Cause("zero norm", f"{at} of {x.numel()} norms are exactly 0 where {name} needs them", found, argument)
    if name in _ROOTS:
        kind = "zero variance" if ancestors and ancestors[0] in ("var", "var_mean") else "sqrt at 0"
        return Cause(kind, f"{at} of {x.numel()} arguments of {name} are exactly 0", found, argument)
    return Cause("division by zero", f"{at} of {x.numel()} denominators are exactly 0", found, argument)


def _divide(args: Sequence[Any], out: Tensor, bad: Tensor, ancestors: Callable[[Tensor], list[str]]) -> Cause | None:
    top, bottom = _operands(args, out)
    at = _where(bad, bottom == 0)
    if not at:
        return None
    if bottom.dim() == 0 and float(bottom) == 0 and not isinstance(args[1], Tensor):
        return Cause("division by zero", "the denominator is the number 0", {"zeros": at}, 1)
    cause = _zeros("div", bottom, _count(bottom == 0), ancestors(bottom), 1)
    both = _where(bad, (top == 0) & (bottom == 0))
    return Cause(cause.kind, f"{cause.text}; {both} are 0/0", cause.measured | {"zero_over_zero": both}, 1)


def _pow(args: Sequence[Any], out: Tensor, bad: Tensor) -> Cause | None:
    base, exponent = _operands(args, out)
    at = _where(bad, (base == 0) & (exponent < 0))
    if at:
        return Cause("division by zero", f"{at} zeros to a negative power", {"zeros": at})
    below = _where(bad, (base < 0) & (exponent != exponent.round()))
    if below:
        return Cause("outside the domain", f"{below} negative numbers to a fractional power", {"negative": below})
    return None


def _products(name: str, args: Sequence[Any], out: Tensor, bad: Tensor) -> Cause | None:
    a, b = _operands(args, out)
    if name == "mul":
        both = _where(bad, ((a == 0) & b.isinf()) | (a.isinf() & (b == 0)))
        if both:
            return Cause("0 * inf", f"{both} products are 0 * inf", {"products": both})
    else:
        both = _where(bad, a.isinf() & b.isinf())
        if both:
            return Cause("inf - inf", f"{both} differences are of two infinities", {"differences": both})
    return None


def _softmax(x: Tensor, dim: int) -> Cause | None:
    rows = (x == -math.inf).all(dim)
    if not rows.any():
        return None
    masked = _count(rows)
    text = f"{masked} of {rows.numel()} rows of the softmax are -inf throughout"
    return Cause("fully masked row", text, {"rows": masked})


def _normalisation(name: str, args: Sequence[Any]) -> Cause | None:
    x = args[0].double()
    if name == "native_batch_norm":
        dims: tuple[int, ...] = (0, *range(2, x.dim()))
    elif name == "native_group_norm":
        x, dims = x.reshape(x.shape[0], int(args[6]), -1), (-1,)
    else:
        dims = tuple(range(x.dim() - len(args[1]), x.dim()))
    spread = x.square().mean(dims) if name == "fused_rms_norm" else x.var(dims, correction=0)
    zero = _count(spread == 0)
    if not zero:
        return None
    text = f"{zero} of {spread.numel()} variances are exactly 0 and eps does not lift them"
    return Cause("zero variance", text, {"zeros": zero})


def _reduction(name: str, args: Sequence[Any], outputs: Any) -> Cause | None:
    if name.startswith("nll_loss"):
        weight = float(tuple(tensors_in(outputs))[1].sum())
        if weight == 0:
            return Cause("empty reduction", "the mean is over no target: all are ignored", {"targets": 0})
        return None
    x, out = args[0], next(tensors_in(outputs))
    each = x.numel() // max(out.numel(), 1)
    least = 1 if name == "mean" else 2
    if each < least:
        return Cause("empty reduction", f"the {name} is over {each} entries", {"entries": each})
    return None


def _matrix(x: Tensor) -> Cause | None:
    if not floating(x) or x.dim() < 2 or not finite(x) or not x.numel():
        return None
    double = x.to(torch.complex128 if x.is_complex() else torch.float64)
    values = torch.linalg.svdvals(double)
    ratio = values[..., -1] / values[..., 0].clamp(min=torch.finfo(torch.float64).tiny)
    smallest = float(ratio.min())
    if smallest > torch.finfo(x.dtype).eps * x.shape[-1]:
        return None
    text = f"the smallest singular value is {smallest:.3g} of the largest"
    return Cause("singular matrix", text, {"singular_value_ratio": smallest})


def _wider_forward(function: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Tensor) -> Cause | None:
    """The same computation in the next wider type: a result that is finite there overflowed here."""
    if out.dtype not in _WIDER:
        return None
    if plain_name(function) in ("to_copy", "copy"):
        source = args[0] if plain_name(function) == "to_copy" else args[1]
        return _overflow(out.dtype, _largest(source), "the value that is cast")
    try:
        found = function(*_widened(list(args)), **_widened_kwargs(kwargs))
    except (RuntimeError, TypeError):
        return None
    wide = [x for x in tensors_in(found) if floating(x) and x.numel()]
    if not wide or not all(map(finite, wide)):
        return None
    return _overflow(out.dtype, max(float(x.abs().max()) for x in wide), "the exact result")


def _widened_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    wide = {name: _widened(value) for name, value in kwargs.items()}
    if isinstance(wide.get("dtype"), torch.dtype):
        wide["dtype"] = _WIDER.get(wide["dtype"], wide["dtype"])
    return wide


def forward_cause(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any], outputs: Any, ancestors: Callable[[Tensor], list[str]]
) -> Cause:
    """The cause of a non-finite output.

    **Arguments:** the ATen overload, its arguments as they were before, its outputs, and what made a tensor: the names
    of the operations, nearest first.
    """
    with torch.no_grad():
        bad = _bad(outputs)
        if bad is None:
            return Cause("unknown", "every output is finite")
        name, out = plain_name(function), next(x for x in tensors_in(outputs) if floating(x) and not finite(x))
        x = args[0] if args and floating(args[0]) else None
        cause = None
        if name in _EXP and x is not None:
            cause = _exp(x, out)
        elif name in _LOG and x is not None:
            cause = _log(name, args[1] if name == "xlogy" else x, bad)
        elif name in _ROOTS and x is not None:
            cause = _root(name, x, bad, ancestors(x))
        elif name == "reciprocal" and x is not None:
            cause = _divide([1.0, x], out, bad, ancestors)
        elif name in ("div", "true_divide") and x is not None:
            cause = _divide(args, out, bad, ancestors)
        elif name == "pow":
            cause = _pow(args, out, bad)
        elif name in ("mul", "add", "sub"):
            cause = _products(name, args, out, bad)
        elif name in ("softmax", "log_softmax") and x is not None:
            cause = _softmax(x, args[1])
        elif name in ("acos", "asin", "atanh", "acosh") and x is not None:
            outside = _where(bad, ~torch.isnan(x))
            cause = (
                Cause("outside the domain", f"{outside} arguments lie outside the domain of {name}")
                if outside
                else None
            )
        elif name in _NORMALISATIONS and x is not None:
            cause = _normalisation(name, args)
        elif name in _MEANS and x is not None:
            cause = _reduction(name, args, outputs)
        elif name in _SINGULAR and x is not None:
            cause = _matrix(x)
        if cause is None and (written := _literals(args, kwargs)):
            cause = Cause("literal", f"{written[0]} is an argument of {name}")
        return cause or _wider_forward(function, args, kwargs, out) or Cause("unknown", f"nothing known fits {name}")


# ---- backward --------------------------------------------------------------------------------------------------------

# Pointwise functions that are singular somewhere: where, in terms of operands and result, and what to call it.
_SINGULAR_AT: dict[str, Callable[[list[Tensor], Tensor], Tensor]] = {
    "sqrt": lambda a, y: y == 0,
    "rsqrt": lambda a, y: a[0] == 0,
    "log": lambda a, y: a[0] == 0,
    "log2": lambda a, y: a[0] == 0,
    "log10": lambda a, y: a[0] == 0,
    "log1p": lambda a, y: a[0] == -1,
    "reciprocal": lambda a, y: a[0] == 0,
    "div": lambda a, y: a[1] == 0,
    "pow": lambda a, y: a[0] == 0,
    "acos": lambda a, y: a[0].abs() >= 1,
    "asin": lambda a, y: a[0].abs() >= 1,
    "exp": lambda a, y: y.isinf(),
    "expm1": lambda a, y: y.isinf(),
    "mul": lambda a, y: a[0].isinf() | a[1].isinf(),
}


def gaps(values: Tensor) -> Tensor:
    """Differences of neighbouring eigenvalues, each matrix's by its largest modulus."""
    values = values.double().sort(-1).values
    scale = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return values.diff(dim=-1) / scale


def _spectrum(name: str, outputs: Any) -> Cause | None:
    vectors_first = "svd" in name
    values = list(tensors_in(outputs))[1 if vectors_first else 0]
    if values.is_complex() or values.shape[-1] < 2 or not finite(values):
        return None
    found = gaps(values)
    smallest, equal = float(found.min()), _count(found == 0)
    if smallest > torch.finfo(values.dtype).eps * values.shape[-1]:
        return None
    what = "singular values" if vectors_first else "eigenvalues"
    text = f"the smallest gap between neighbouring {what} is {smallest:.3g} of the largest; {equal} gaps are exactly 0"
    return Cause("repeated eigenvalues", text, {"smallest_gap": smallest, "equal_neighbours": equal})


def _derivative(
    name: str,
    args: Sequence[Any],
    output: Tensor,
    incoming: Tensor,
    bad: Tensor,
    ancestors: Callable[[Tensor], list[str]],
) -> Cause | None:
    operands = _operands([*args, 0.0][:2], output)
    singular = _SINGULAR_AT[name](operands, output)
    if singular.shape != bad.shape or incoming.shape != bad.shape:
        singular, incoming, bad = (x.expand(output.shape) if x.dim() == 0 else x for x in (singular, incoming, bad))
    try:
        at, masked = _count(bad & singular), _count(bad & singular & (incoming == 0))
    except RuntimeError:  # a broadcast operand: its gradient is a sum
        at, masked = _count(singular), _count(singular.expand(incoming.shape) & (incoming == 0))
    if not at:
        return None
    if name in _ROOTS and _is_norm([name, *ancestors(operands[0])]):
        return _zeros(name, operands[0], at, ancestors(operands[0]))
    if masked and masked >= at:
        shut, all_of = _count(incoming == 0), incoming.numel()
        text = (
            f"the derivative of {name} is infinite in {at} places whose incoming gradient is exactly 0 "
            f"({shut} of {all_of} entries are masked)"
        )
        measured: dict[str, float] = {"places": at, "masked_share": shut / max(all_of, 1)}
        if name in ("exp", "expm1"):
            measured["largest_argument"] = largest = float(operands[0].max())
            text += f"; the largest argument of exp is {largest:.5g}"
        return Cause("0 * inf in a masked branch", text, measured, 1 if name == "div" else 0)
    if name in _ROOTS:
        return _zeros(name, operands[0], at, ancestors(operands[0]))
    if name in ("div", "reciprocal"):
        argument = 1 if name == "div" else 0
        return _zeros("div", operands[argument], at, ancestors(operands[argument]), argument)
    if name.startswith("log"):
        return Cause("log at 0", f"{at} arguments of {name} are exactly 0", {"zeros": at})
    if name == "pow":
        return Cause("sqrt at 0", f"{at} zeros to a power whose derivative is infinite there", {"zeros": at})
    if name in ("acos", "asin"):
        text = f"{at} of {operands[0].numel()} arguments of {name} are at +-1"
        return Cause("edge of arccos", text, {"at_the_edge": at})
    if name in ("exp", "expm1"):
        return _exp(operands[0], output)
    return None


def _wider_backward(
    function: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    incoming: Sequence[Tensor | None],
    found: Sequence[Tensor],
) -> Cause | None:
    """The same derivative in the next wider type."""
    narrow = next(g.dtype for g in found if not finite(g))
    if plain_name(function) == "to_copy":
        return _overflow(narrow, _largest(next(g for g in incoming if g is not None)), "the gradient that is cast")
    if function.namespace != "aten":  # no formula of its own for autograd
        return None
    try:
        with torch.enable_grad():
            wide = [x.requires_grad_(floating(x)) if isinstance(x, Tensor) else x for x in map(_widened, args)]
            leaves = [x for x in wide if isinstance(x, Tensor) and x.requires_grad]
            outputs = list(tensors_in(function(*wide, **_widened_kwargs(kwargs))))
            pairs = [
                (y, _widened(g)) for y, g in zip(outputs, incoming, strict=False) if g is not None and y.requires_grad
            ]
            grads = torch.autograd.grad([y for y, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
    except (RuntimeError, TypeError, ValueError):
        return None
    reached = [g for g in grads if g is not None]
    if not reached or not all(map(finite, reached)):
        return None
    return _overflow(narrow, max(float(g.abs().max()) for g in grads if g.numel()), "the exact gradient")


def backward_cause(
    function: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    outputs: Any,
    incoming: Sequence[Tensor | None],
    found: Sequence[Tensor | None],
    ancestors: Callable[[Tensor], list[str]],
) -> Cause | None:
    """The cause of a non-finite gradient `found` from a finite `incoming`; the rest belongs to the forward operation.

    None if no rule fits.
    """
    with torch.no_grad():
        name = plain_name(function)
        gradients = [g for g in found if g is not None and floating(g)]
        wrong = next((g for g in gradients if not finite(g)), None)
        if wrong is None:
            return None
        first = next((g for g in incoming if g is not None), None)
        output = next(tensors_in(outputs), None)
        cause = None
        if "eigh" in name or "svd" in name:
            cause = _spectrum(name, outputs)
        elif name in _SINGULAR_AT and first is not None and output is not None:
            cause = _derivative(name, args, output, first, ~torch.isfinite(wrong), ancestors)
        elif name in _SINGULAR:
            cause = _matrix(args[0])
        return cause or _wider_backward(function, args, kwargs, incoming, gradients)


def culprit_values(cause: Cause, args: Sequence[Any], outputs: Any) -> tuple[str, Tensor]:
    """What to look at over time: the quantity that the cause is about, flat and float64, and its name."""
    if cause.kind == "repeated eigenvalues":
        real = [x for x in tensors_in(outputs) if not x.is_complex()]
        return "relative eigenvalue gap", gaps(min(real, key=Tensor.dim)).flatten()
    chosen = [x for x in args if floating(x)] or [x for x in tensors_in(list(args)) if floating(x)]
    given = args[cause.argument] if cause.argument < len(args) and floating(args[cause.argument]) else None
    values = given if given is not None else (chosen[0] if chosen else next(tensors_in(outputs)))
    values = values.abs() if values.is_complex() else values
    return f"operand {cause.argument}", values.detach().double().flatten()
