"""Checks of tensors and gradients. Those switched by the environment cost nothing while off, a host read while on."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from stablekern import _check, numerics, settings
from stablekern.errors import CovarianceError, NonFiniteError, message
from stablekern.health._causes import TensorStats
from stablekern.ops.finite_stats import finite_stats

__all__ = ["assert_finite", "check_covariances", "check_gradients", "clamp_and_check"]


def assert_finite(tag: str, x: Tensor, *, force: bool = False) -> Tensor:
    """Return `x`; raise if it holds a NaN or an infinity and the checks are on.

    They are on while any of BGB_NAN_DEBUG, BGB_DEBUG_FINITE and BGB_SMOKE_TEST is set (read at each call), or with
    `force`. Off, nothing is computed. On, the host waits for `x`.

    **Arguments:**

    - `tag`: the name of the tensor in the message.
    - `x`: a tensor of any dtype and shape.
    - `force`: check whatever the environment says.

    **Raises:** `NonFiniteError` with the tag, the shape, the counts of NaN and infinity and the range of the rest.
    """
    if not (force or settings.checks_finite()):
        return x
    nan, inf, low, high, mean, count = (field.item() for field in finite_stats([x]))
    if nan or inf:
        rest = f"the others in [{low:.4g}, {high:.4g}] with mean {mean:.4g}" if nan + inf < count else "no others"
        found = f"{nan} NaN and {inf} infinite of {count} entries of shape {tuple(x.shape)}, {rest}"
        raise NonFiniteError(message("assert_finite", f"`{tag}` must be finite", found))
    return x


def clamp_and_check(x: Tensor, low: float | None = None, high: float | None = None, tag: str = "features") -> Tensor:
    """Under BGB_SAFE_CLAMP, `x` with non-finite entries replaced by 0 and the rest clamped; otherwise `x` itself.

    The clamp hides what it repairs, so `assert_finite(tag, x)` looks first: with the checks on, the cause is reported.

    **Arguments:**

    - `x`: a real floating-point tensor.
    - `low`, `high`: the bounds; one that is None is BGB_SAFE_CLAMP_MIN or BGB_SAFE_CLAMP_MAX.
    - `tag`: the name of the tensor in the message.

    **Returns:** `x`, or a new tensor like it. Replaced and clamped entries get a zero gradient.

    **Raises:** `NonFiniteError` with the checks on, `SettingError` for illegal bounds in the environment, `ValueError`
    for bounds out of order, `TypeError` for bounds that are no numbers.
    """
    assert_finite(tag, x)
    bounds = settings.safe_clamp_bounds()
    if bounds is None:
        return x
    low = bounds[0] if low is None else _check.number("clamp_and_check", "low", low)
    high = bounds[1] if high is None else _check.number("clamp_and_check", "high", high)
    if not low < high:
        raise ValueError(message("clamp_and_check", "`low` must be below `high`", low, high))
    return x.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).clamp(low, high)


def check_gradients(model: nn.Module, *, action: str | None = None) -> list[TensorStats]:
    """Statistics of the gradients that hold a NaN or an infinity, in the order of `model.named_parameters()`.

    Parameters without a gradient are passed over; of a sparse gradient the stored values count. One host read per
    device where all is well.

    **Arguments:**

    - `action`: what to do when there are any: "raise", "warn", or "return" alone. None is "raise" while any of
        BGB_NAN_DEBUG, BGB_DEBUG_FINITE and BGB_SMOKE_TEST is set, else "warn".

    **Returns:** per bad gradient its `name`, `shape`, `dtype`, counts `nan` and `inf` of `count`, and `min`, `max`,
    `mean` of its finite entries.

    **Raises:** `NonFiniteError` with all of that under "raise", `ValueError` for another action.
    """
    if action not in (None, "raise", "warn", "return"):
        raise ValueError(message("check_gradients", "`action` must be raise, warn or return", repr(action)))
    if action is None:
        action = "raise" if settings.checks_finite() else "warn"
    flags: dict[torch.device, list[tuple[str, Tensor, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            values = grad.coalesce().values() if grad.is_sparse else grad
            flags.setdefault(values.device, []).append((name, values, torch.isfinite(values).all()))
    wrong: dict[str, Tensor] = {}
    for entries in flags.values():
        finite = torch.stack([flag for _, _, flag in entries]).tolist()
        wrong |= {name: values for (name, values, _), good in zip(entries, finite, strict=True) if not good}
    bad = [TensorStats.of(name, wrong[name]) for name, _ in model.named_parameters() if name in wrong]
    if bad and action != "return":
        rule = "the gradient of every parameter must be finite"
        text = message("check_gradients", rule, "; ".join(map(str, bad)))
        if action == "raise":
            raise NonFiniteError(text)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return bad


def check_covariances(
    *, target_trace: float | None = None, dims: tuple[int, int] = (-2, -1), force: bool = False, **covariances: Tensor
) -> None:
    r"""Raise if a covariance does not have its trace, or a Frobenius norm that no covariance of that trace has.

    Of a positive semidefinite n x n matrix with trace T, $T / \sqrt n \le \|R\|_F \le T$; a deviation of 1 % is let
    pass. On and off as `assert_finite`: off, nothing is computed; on, the host waits for each tensor, CPU or GPU.

    **Arguments:**

    - `target_trace`: T > 0; None is n.
    - `dims`: the two dimensions of the matrices.
    - `force`: check whatever the environment says.
    - `covariances`: the tensors by name, in the order in which they are made, as `R_pred=..., R_samp=..., R_blend=...`:
        the first one that breaks the rule is the one that is named.

    **Raises:** `CovarianceError` with the name, the index of its first bad matrix, that one's trace and norm.
    """
    if not (force or settings.checks_finite()):
        return
    slack = numerics.COVARIANCE_TRACE_TOLERANCE.of()
    for name, R in covariances.items():
        matrices = R.detach().movedim(dims, (-2, -1))
        n = _check.shapes("check_covariances", **{name: (matrices, "... n n")})["n"]
        target = float(n) if target_trace is None else target_trace
        trace = matrices.diagonal(dim1=-2, dim2=-1).sum(-1)
        deviation = (trace - target).abs()
        norm = torch.linalg.vector_norm(matrices, dim=(-2, -1))
        low, high = (1 - slack) * target / n**0.5, (1 + slack) * target
        # Written so that a NaN is bad.
        good = (deviation <= slack * target) & (norm >= low) & (norm <= high)
        bad = (~good).nonzero()
        if len(bad):
            at = tuple(bad[0].tolist())
            rule = f"`{name}` must have the trace {target:.4g} and a norm in [{low:.4g}, {high:.4g}]"
            found = f"{len(bad)} of {good.numel()}, first {at} with trace {trace[at].item():.4g}, norm {norm[at]:.4g}"
            raise CovarianceError(message("check_covariances", rule, found))
