r"""The depthwise convolution in front of a Mamba scan: each channel with its own few taps, seeing no later step.

With k taps, a bias and an activation $\sigma$ (SiLU or none), for every channel

$$v_t = b + \sum_{j=0}^{k-1} w_j\, x_{t-(k-1)+j}, \qquad y_t = \sigma(v_t),$$

where the $x$ before step 0 are the initial state, or 0. Backwards in time the same, of the flipped sequence:
$v_t = b + \sum_j w_j\, x_{t+(k-1)-j}$, which is the first form with the taps in reverse order and moved by k - 1 steps.

**Adjoint.** With $s = 1 / (1 + e^{-v})$ and $G_t = \bar y_t\, s_t (1 + v_t (1 - s_t))$ (or $\bar y_t$),

$$\bar x_t = \sum_j w_j\, G_{t+(k-1)-j}, \qquad \bar w_j = \sum_t G_t\, x_{t-(k-1)+j}, \qquad \bar b = \sum_t G_t.$$

The op (`causal_conv1d_fwd`, `causal_conv1d_bwd`) runs the last `reverse_channels` of the channels backwards: all of
them, or half of them where both directions are wanted at once.

$v$ is recomputed: k multiplications are cheaper than keeping another tensor as large as $x$. $e^{-v}$ may overflow;
then $v / (1 + e^{-v})$ is -0, its limit.

Sources: Gu & Dao 2023, arXiv:2312.00752, sec. 3.4 (the convolution in the block).
"""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern import _check, _load
from stablekern._memory import empty
from stablekern._registry import apply, define, launcher
from stablekern.errors import message

__all__ = ["causal_conv1d"]

_OP = "causal_conv1d"
_NATIVE_WIDTH = 4  # most taps that the native kernels keep in registers


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    bidirectional: bool = False,
) -> Tensor:
    """The definition: torch's grouped convolution of the padded sequence, and its SiLU."""
    if bidirectional:
        ahead, back = (
            [
                None if part is None else part.tensor_split(2, dim=axis)[half]
                for part, axis in ((x, 1), (weight, 0), (bias, 0))
            ]
            for half in (0, 1)
        )
        both = reference(*ahead, activation=activation), reference(*back, activation=activation, reverse=True)  # type: ignore[arg-type]
        return torch.cat(both, 1)
    before = x.new_zeros(*x.shape[:2], weight.shape[1] - 1) if initial_state is None else initial_state
    padded = torch.cat((x, before) if reverse else (before, x), -1)
    taps = (weight.flip(-1) if reverse else weight)[:, None]
    if 0 in x.shape:
        return x * weight.sum() * (1 if bias is None else bias.sum())
    y = torch.nn.functional.conv1d(padded, taps, bias, groups=x.shape[1])
    return torch.nn.functional.silu(y) if activation else y


def _steps_are_dense(x: Tensor) -> bool:
    """Whether the steps of a channel lie side by side, and not the channels of a step."""
    return x.stride(1) != 1 and x.stride(2) == 1


def _like(x: Tensor) -> Tensor:
    """New memory of the shape of x, (b, d, l), dense, with side by side what is so in x."""
    batch, channels, length = x.shape
    if _steps_are_dense(x):
        return empty((batch, channels, length), x)
    return empty((batch, length, channels), x).transpose(1, 2)


def _fake_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse_channels: int) -> Tensor:
    return _like(x)


def _fake_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, reverse_channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(x), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


_fwd = define(
    "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, bool silu, int reverse_channels) -> Tensor",
    fake=_fake_fwd,
)
_bwd = define(
    "causal_conv1d_bwd(Tensor grad, Tensor x, Tensor weight, Tensor? bias, bool silu, int reverse_channels)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    fake=_fake_bwd,
)


def _sequences(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with side by side what is so in `like`; everything else may lie anywhere."""
    tensor = tensor.resolve_neg()
    if _steps_are_dense(like):
        return tensor if tensor.stride(2) == 1 else tensor.contiguous()
    return tensor if tensor.stride(1) == 1 else tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _turned(weight: Tensor, reverse_channels: int) -> Tensor:
    """(d, k), with the taps of the last channels, which run backwards, in reverse order."""
    if not reverse_channels:
        return weight
    ahead, back = weight.tensor_split([weight.shape[0] - reverse_channels])
    return torch.cat((ahead, back.flip(-1)))


def _taps(weight: Tensor, reverse_channels: int) -> Tensor:
    """(k, d), in the order in which they meet the sequence."""
    return _turned(weight, reverse_channels).resolve_neg().T.contiguous()


def _forward(kernel, x, weight, bias, silu, reverse_channels):
    """By a `kernel` that takes the taps in the order in which they meet the sequence."""
    y = _like(x)
    bias = None if bias is None else bias.resolve_neg().contiguous()
    kernel(_sequences(x, x), _taps(weight, reverse_channels), bias, silu, reverse_channels, y)
    return y


def _backward(kernel, grad, x, weight, bias, silu, reverse_channels):
    grad_x, grad_weight, grad_bias = _fake_bwd(grad, x, weight, bias, silu, reverse_channels)
    taps = _taps(weight, reverse_channels)
    grad_taps = torch.empty_like(taps)
    bias = None if bias is None else bias.resolve_neg().contiguous()
    results = grad_x, grad_taps, grad_bias
    kernel(_sequences(grad, x), _sequences(x, x), taps, bias, silu, reverse_channels, *results)
    grad_weight.copy_(_turned(grad_taps.T, reverse_channels))
    return grad_x, grad_weight, grad_bias


def _few_taps(*arguments) -> str | None:
    width = arguments[-4].shape[1]
    return None if width <= _NATIVE_WIDTH else f"{width} taps, more than {_NATIVE_WIDTH}"


@launcher("causal_conv1d_fwd", device="cpu", backend="native", supports=_few_taps)
def _(*arguments):
    return _forward(_load.native().causal_conv1d_fwd, *arguments)


@launcher("causal_conv1d_bwd", device="cpu", backend="native", supports=_few_taps)
def _(*arguments):
    return _backward(_load.native().causal_conv1d_bwd, *arguments)


@launcher("causal_conv1d_fwd", device="cuda", backend="triton")
@launcher("causal_conv1d_fwd", device="cpu", backend="triton")
def _(*arguments):
    from stablekern.triton_kernels.causal_conv1d import causal_conv1d_fwd

    return _forward(causal_conv1d_fwd, *arguments)


@launcher("causal_conv1d_bwd", device="cuda", backend="triton")
@launcher("causal_conv1d_bwd", device="cpu", backend="triton")
def _(*arguments):
    from stablekern.triton_kernels.causal_conv1d import causal_conv1d_bwd

    return _backward(causal_conv1d_bwd, *arguments)


def _one_way(function):
    """A launcher for both directions, by one that takes all channels in the same: it gets the two parts after each
    other."""

    def both(*arguments):
        *tensors, silu, reverse_channels = arguments
        channels = tensors[-2].shape[0]
        if reverse_channels in (0, channels):
            return function(*tensors, silu, reverse_channels > 0)
        parts = zip(
            *(
                (None, None) if t is None else t.tensor_split([channels - reverse_channels], dim=int(t.dim() == 3))
                for t in tensors
            ),
            strict=True,
        )
        ahead, back = (function(*part, silu, reverse) for part, reverse in zip(parts, (False, True), strict=True))
        if isinstance(ahead, Tensor):
            return _like(tensors[0]).copy_(torch.cat((ahead, back), 1))
        outputs = _fake_bwd(*arguments)
        for axis, output, *halves in zip((1, 0, 0), outputs, ahead, back, strict=True):
            output.copy_(torch.cat(halves, axis))
        return outputs

    return both


def _windows(x: Tensor, width: int, ahead: bool) -> list[Tensor]:
    """x[t - (k - 1) + j] for each j < k (x[t + j] if `ahead`), 0 beyond the ends."""
    padded = torch.nn.functional.pad(x, (0, width - 1) if ahead else (width - 1, 0))
    return [padded[..., j : j + x.shape[2]] for j in range(width)]


def _sum_of_taps(windows: list[Tensor], weight: Tensor) -> Tensor:
    total = windows[0] * weight[:, :1]
    for j in range(1, len(windows)):
        total = total + windows[j] * weight[:, j : j + 1]
    return total


@launcher("causal_conv1d_fwd", device="cuda", backend="torch")
@launcher("causal_conv1d_fwd", device="cpu", backend="torch")
@_one_way
def _(x, weight, bias, silu, reverse):
    weight = weight.flip(-1) if reverse else weight
    free = _sum_of_taps(_windows(x, weight.shape[1], reverse), weight)
    if bias is not None:
        free = free + bias[:, None]
    return _like(x).copy_(torch.nn.functional.silu(free) if silu else free)


@launcher("causal_conv1d_bwd", device="cuda", backend="torch")
@launcher("causal_conv1d_bwd", device="cpu", backend="torch")
@_one_way
def _(grad, x, weight, bias, silu, reverse):
    outputs = grad_x, grad_weight, grad_bias = _fake_bwd(grad, x, weight, bias, silu, reverse)
    width = weight.shape[1]
    weight = weight.flip(-1) if reverse else weight
    windows = _windows(x, width, reverse)
    if silu:
        free = _sum_of_taps(windows, weight)
        if bias is not None:
            free = free + bias[:, None]
        sigmoid = torch.sigmoid(free)
        grad = grad * sigmoid * (1 + free * (1 - sigmoid))
    grad_x.copy_(_sum_of_taps(_windows(grad, width, not reverse), weight.flip(-1)))
    taps = torch.stack([(grad * window).sum((0, 2)) for window in windows], -1)
    grad_weight.copy_(taps.flip(-1) if reverse else taps)
    grad_bias.copy_(grad.sum((0, 2)))
    return outputs


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, silu, reverse_channels):
        return _fwd(x, weight, bias, silu, reverse_channels)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, bias, ctx.silu, ctx.reverse_channels = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        _check.first_order(_OP)
        grads = _bwd(grad, *ctx.saved_tensors, ctx.silu, ctx.reverse_channels)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))
        return *wanted, None, None


def causal_conv1d(
    x: Tensor,  # (b, d, l)
    weight: Tensor,  # (d, k)
    bias: Tensor | None = None,  # (d)
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,  # (b, d, k - 1)
    reverse: bool = False,
    bidirectional: bool = False,
) -> Tensor:  # (b, d, l)
    r"""The causal depthwise convolution along time, with bias and SiLU in the same pass, and its gradients.

    $y_t = \sigma(b + \sum_j w_j x_{t-(k-1)+j})$ for every channel; the function of causal_conv1d's `causal_conv1d_fn`.

    **Arguments:** any strides; b, d and l may be 0. Each tensor has the dtype of `x`, or float32 where `x` is float16
    or bfloat16.

    - `x`: (b, d, l); float16, bfloat16, float32 or float64. It is read where it is if the channels of a step lie
        side by side, as in the transpose of (b, l, d), or the steps of a channel, as in a contiguous (b, d, l).
    - `weight`: (d, k), k >= 1 taps, the last one for the step itself. `bias`: (d).
    - `activation`: "silu", the same as "swish", or None.
    - `initial_state`: the k - 1 steps before the first one (after the last one if `reverse`, then in the same order in
        time), (b, d, k - 1); zeros if None.
    - `reverse`: see no earlier step instead of no later one: the convolution of the flipped sequence, flipped back.

    - `bidirectional`: both directions in one call: the first half of the channels as without `reverse`, the second half
        as with it. Without an initial state.

    **Returns:** $y$, a new dense tensor like `x`, with side by side what is so in `x`. Half precision is computed in
    float32 and rounded once.

    **Raises:** `ValueError` for sizes that disagree, an unknown activation, or `bidirectional` with an odd number of
    channels, `reverse` or an initial state; `TypeError` for dtypes; `RuntimeError`
    when second derivatives are asked for. More than 4 taps run in plain torch on a CPU.

    **Accuracy:** output and gradients at most twice the error of torch's convolution (`tests/test_ops.py`); the same
    bits for any number of threads (`tests/test_causal_conv1d.py`).
    **Sources:** Gu & Dao 2023, arXiv:2312.00752.
    """
    _check.required(_OP, x=x, weight=weight)
    _check.flag(_OP, reverse=reverse, bidirectional=bidirectional)
    sizes = _check.shapes(_OP, x=(x, "b d l"), weight=(weight, "d k"), bias=(bias, "d"))
    if sizes["k"] < 1:
        raise ValueError(message(_OP, "`weight` must have at least one tap", sizes["k"]))
    _check.shapes(_OP, initial_state=(initial_state, f"{sizes['b']} {sizes['d']} {sizes['k'] - 1}"))
    _check.choice(_OP, "activation", activation, (None, "silu", "swish"))
    if bidirectional and (reverse or initial_state is not None):
        came = "reverse" if reverse else "an initial state"
        raise ValueError(message(_OP, "`bidirectional` takes neither `reverse` nor an initial state", came))
    if bidirectional and sizes["d"] % 2:
        raise ValueError(message(_OP, "`bidirectional` needs an even number of channels", sizes["d"]))
    reverse_channels = sizes["d"] if reverse else sizes["d"] // 2 if bidirectional else 0
    dtype = _check.dtypes(_OP, _check.HALF + _check.REAL, x=x)
    wide = torch.promote_types(dtype, torch.float32)
    for name, tensor in {"weight": weight, "bias": bias, "initial_state": initial_state}.items():
        if tensor is not None:
            _check.dtypes(_OP, tuple({dtype, wide}), **{name: tensor})
            if tensor.device != x.device:
                raise ValueError(message(_OP, f"`{name}` and `x` must be on one device", tensor.device, x.device))
    x, weight = x.to(wide), weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    if initial_state is not None:
        initial_state = initial_state.to(wide)
        x = torch.cat((x, initial_state) if reverse else (initial_state, x), -1)
    y = apply(_CausalConv1d, x, weight, bias, activation is not None, reverse_channels)
    if initial_state is not None:
        y = y.narrow(-1, 0 if reverse else sizes["k"] - 1, sizes["l"])
    return y.to(dtype)
