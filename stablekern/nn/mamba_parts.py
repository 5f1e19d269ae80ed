r"""What the Mamba blocks share: the state that streaming keeps, the convolution, the fallback, the first step sizes.

**Streaming.** A block needs two things of the past: the last inputs of its convolution and the state of its scan. Both
have a fixed size, so a sequence can come in pieces of any lengths, and the pieces' outputs are those of the whole
sequence, to rounding:

    cache = block.allocate_inference_cache(batch)
    first = block(x[:, :100], cache)  # fills the cache
    for t in range(100, length):
        out, *_ = block.step(x[:, t : t + 1], *cache)

The tensors of the cache are changed in place and are constants for autograd: with gradients enabled, a piece's
gradients reach to its first step and no further (truncated backpropagation through time). `step` is mamba_ssm's
`step`, and the two tensors have its shapes.

**The fallback.** While `SEIZURE_MAMBA_FORCE_FALLBACK` is on, a block leaves its scan out and computes `D * conv1d(x)`
in its place. It has no parameters of its own: checkpoints move both ways between the two modes, the parameters of the
recurrence just stay unused (and without gradient). One warning per process says so, `repr` shows it, and nothing else
ever enters it: a kernel that fails raises.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stablekern import _check, numerics, settings
from stablekern.errors import message
from stablekern.ops.causal_conv1d import causal_conv1d

__all__ = [
    "MambaCache",
    "allocate",
    "check_cache",
    "convolve",
    "fallback_forced",
    "initial_dt_bias",
    "step",
    "with_fallback",
]

_FALLBACK = "SEIZURE_MAMBA_FORCE_FALLBACK"
_told_fallback = False


class MambaCache(NamedTuple):
    """What a block keeps of the steps so far, zeros before the first one; changed in place."""

    conv_state: Tensor  # (b, channels, d_conv): the last inputs of the convolution, the newest one last
    ssm_state: Tensor  # (b, channels, d_state), or (b, heads, headdim, d_state) for Mamba-2


def fallback_forced() -> bool:
    """Whether the variable is on now; the first time that it is, one warning for the whole process."""
    global _told_fallback
    if not settings.get(_FALLBACK):
        return False
    if not _told_fallback:
        _told_fallback = True
        warnings.warn(
            message("nn", f"{_FALLBACK} is on, Mamba blocks compute D * conv1d(x), no recurrence"),
            RuntimeWarning,
            stacklevel=3,
        )
    return True


def with_fallback(text: str) -> str:
    """The `extra_repr` of a block, and whether the fallback is forced."""
    return f"{text}, fallback forced" if settings.get(_FALLBACK) else text


def initial_dt_bias(steps: int, dt_min: float, dt_max: float) -> Tensor:
    """Biases whose softplus, the step sizes, are log-uniform in [dt_min, dt_max]."""
    step = torch.empty(steps).uniform_(math.log(dt_min), math.log(dt_max)).exp()
    step = step.clamp_min(numerics.MAMBA_DT_INIT_FLOOR.value)
    return step + torch.log(-torch.expm1(-step))  # the inverse softplus, log(e^step - 1)


def through(layer: nn.Module, recompute: bool, *inputs: Any) -> Tensor:
    """The layer's output; with `recompute` only its inputs are kept, and it runs again in the backward."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


def convolve(x: Tensor, conv: nn.Conv1d, cache: MambaCache | None, reverse: bool = False) -> Tensor:
    """SiLU of the block's convolution of x, (b, l, channels), as a transposed (b, channels, l); moves the cache on."""
    x, before = x.mT, None
    if cache is not None:
        before = cache.conv_state[..., 1:].to(x.dtype)
    y = causal_conv1d(x, conv.weight.squeeze(1), conv.bias, activation="silu", initial_state=before, reverse=reverse)
    if cache is not None:
        with torch.no_grad():
            width = cache.conv_state.shape[-1]
            cache.conv_state.copy_(torch.cat((cache.conv_state, x[..., -width:]), -1)[..., -width:])
    return y


def allocate(
    op: str, conv: nn.Conv1d, state: tuple[int, ...], batch_size: int, dtype: torch.dtype | None
) -> MambaCache:
    """A cache of zeros; `state` is the shape of one sequence's scan state."""
    _check.integer(op, "batch_size", batch_size, low=0)
    weight = conv.weight
    conv_state = weight.new_zeros(batch_size, weight.shape[0], weight.shape[2], dtype=dtype)
    # The state sums over thousands of steps: in half precision every one of them would round it.
    own = torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype
    return MambaCache(conv_state.detach(), weight.new_zeros(batch_size, *state, dtype=own).detach())


def check_cache(op: str, cache: MambaCache, batch: int, conv: nn.Conv1d, state: tuple[int, ...]) -> None:
    """The two states must have the shapes that `allocate` gives them."""
    if not isinstance(cache, MambaCache):
        raise TypeError(
            message(op, "`cache` must be a MambaCache, of `allocate_inference_cache`", type(cache).__name__)
        )
    _check.required(op, conv_state=cache.conv_state, ssm_state=cache.ssm_state)
    weight = conv.weight
    shapes = {"conv_state": (batch, weight.shape[0], weight.shape[2]), "ssm_state": (batch, *state)}
    for name, shape in shapes.items():
        _check.shapes(op, **{name: (getattr(cache, name), " ".join(map(str, shape)))})


def step(
    op: str, block: nn.Module, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of `block`, without gradient."""
    _check.required(op, hidden_states=hidden_states)
    _check.shapes(op, hidden_states=(hidden_states, f"b 1 {block.d_model}"))
    with torch.no_grad():
        return block(hidden_states, MambaCache(conv_state, ssm_state)), conv_state, ssm_state
