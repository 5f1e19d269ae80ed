"""The functions named as in mamba_ssm and causal_conv1d, against loops written from the published recurrences."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import stablekern.nn as snn
from slow_mamba import compare, slow_mamba, slow_mamba2
from stablekern.adapters import mamba_ssm

DOUBLE = {"dtype": torch.float64}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(x))


def discrete_mamba(u, delta, A, B, C, D, z, delta_bias, softplus_on, state=None):
    """h = exp(dt A) h + dt B u; y = C h + D u; y silu(z): one item, channel and step at a time. Output, last state."""
    batch, channels, length = u.shape
    outputs, states = [], []
    for b in range(batch):
        for d in range(channels):
            h = torch.zeros(A.shape[1], dtype=torch.promote_types(A.dtype, u.dtype)) if state is None else state[b, d]
            for t in range(length):
                step = delta[b, d, t] + (0 if delta_bias is None else delta_bias[d])
                step = softplus(step) if softplus_on else step
                enter, leave = (
                    M[d] if M.dim() == 2 else M[b, :, t] if M.dim() == 3 else M[b, d * M.shape[1] // channels, :, t]
                    for M in (B, C)
                )
                h = torch.exp(step * A[d]) * h + step * u[b, d, t] * enter
                y = (h * leave).sum()
                y = 2 * y.real if y.is_complex() else y
                y = y if D is None else y + D[d] * u[b, d, t]
                outputs.append(y if z is None else y * silu(z[b, d, t]))
            states.append(h)
    return torch.stack(outputs).view(u.shape), torch.stack(states).view(batch, channels, -1)


def same_with_gradients(ours, theirs, leaves: list[Tensor]) -> None:
    """Every output, and the gradients of one random combination of them all."""
    weights = [torch.randn_like(out) for out in theirs]
    grads = []
    for outputs in (ours, theirs):
        loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
        grads.append(torch.autograd.grad(loss.real if loss.is_complex() else loss, leaves))
    torch.testing.assert_close(tuple(ours), tuple(theirs), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-10)


def test_signatures_are_theirs():
    names = {
        function: list(inspect.signature(getattr(mamba_ssm, function)).parameters) for function in mamba_ssm.__all__
    }
    assert names == {
        "selective_scan_fn": ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus",
                              "return_last_state"],
        "mamba_chunk_scan_combined": ["x", "dt", "A", "B", "C", "chunk_size", "D", "z", "dt_bias", "initial_states",
                                      "seq_idx", "cu_seqlens", "dt_softplus", "dt_limit", "return_final_states",
                                      "return_varlen_states"],
        "selective_state_update": ["state", "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus",
                                   "state_batch_indices"],
        "causal_conv1d_fn": ["x", "weight", "bias", "seq_idx", "initial_states", "return_final_states",
                             "final_states_out", "activation"],
        "causal_conv1d_update": ["x", "conv_state", "weight", "bias", "activation", "cache_seqlens",
                                 "conv_state_indices"],
        "mamba_inner_fn": ["xz", "conv1d_weight", "conv1d_bias", "x_proj_weight", "delta_proj_weight",
                           "out_proj_weight", "out_proj_bias", "A", "B", "C", "D", "delta_bias", "B_proj_bias",
                           "C_proj_bias", "delta_softplus", "checkpoint_lvl", "b_rms_weight", "c_rms_weight",
                           "dt_rms_weight", "b_c_dt_rms_eps"],
        "mamba_split_conv1d_scan_combined": ["zxbcdt", "conv1d_weight", "conv1d_bias", "dt_bias", "A", "D",
                                             "chunk_size", "initial_states", "seq_idx", "dt_limit",
                                             "return_final_states", "activation", "rmsnorm_weight", "rmsnorm_eps",
                                             "outproj_weight", "outproj_bias", "headdim", "ngroups",
                                             "norm_before_gate"],
    }  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "all", "groups", "constant", "complex"])
def test_selective_scan_fn(form):
    b, d, length, n = 2, 4, 7, 3
    real = [torch.randn(b, d, length, **DOUBLE), torch.rand(b, d, length, **DOUBLE)]
    A = -torch.rand(d, n, **DOUBLE) - 0.1
    if form == "complex":
        A = torch.complex(A, torch.randn(d, n, **DOUBLE))
    shape = {"constant": (d, n), "groups": (b, 2, n, length), "complex": (b, n, length)}.get(form, (b, n, length))
    B, C = (torch.randn(shape, dtype=A.dtype) for _ in range(2))
    more = [None] * 3
    if form != "plain":
        more = [torch.randn(d, **DOUBLE), torch.randn(b, d, length, **DOUBLE), torch.randn(d, **DOUBLE)]
    leaves = [t.requires_grad_() for t in (*real, A, B, C, *more) if t is not None]
    expected = discrete_mamba(*real, A, B, C, *more, form != "plain")
    out, state = mamba_ssm.selective_scan_fn(*real, A, B, C, *more, form != "plain", True)
    same_with_gradients((out, state), expected, leaves)
    assert torch.equal(mamba_ssm.selective_scan_fn(*real, A, B, C, *more, form != "plain"), out)


def as_mamba(x, dt, A, B, C, D, z, dt_bias, state):
    """The arguments of the Mamba-2 recurrence as those of `discrete_mamba`: every head's p channels share A and dt."""
    heads, width = x.shape[2:]

    def rows(M: Tensor) -> Tensor:  # (b, l, h, p) -> (b, h p, l)
        return M.permute(0, 2, 3, 1).flatten(1, 2)

    return (
        rows(x), rows(dt[..., None].expand_as(x)), A.repeat_interleave(width)[:, None].expand(-1, B.shape[3]),
        B.permute(0, 2, 3, 1), C.permute(0, 2, 3, 1),
        None if D is None else D.flatten() if D.dim() == 2 else D.repeat_interleave(width),
        None if z is None else rows(z), None if dt_bias is None else dt_bias.repeat_interleave(width),
        None if state is None else state.flatten(1, 2),
    )  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "all"])
def test_mamba_chunk_scan_combined(form):
    b, length, h, p, g, n = 2, 6, 4, 2, 2, 3
    x, dt = torch.randn(b, length, h, p, **DOUBLE), torch.rand(b, length, h, **DOUBLE)
    A, B, C = -torch.rand(h, **DOUBLE), *(torch.randn(b, length, g, n, **DOUBLE) for _ in range(2))
    D = z = dt_bias = state = None
    if form == "all":
        D, z = torch.randn(h, p, **DOUBLE), torch.randn(b, length, h, p, **DOUBLE)
        dt_bias, state = torch.randn(h, **DOUBLE), torch.randn(b, h, p, n, **DOUBLE)
    leaves = [t.requires_grad_() for t in (x, dt, A, B, C, D, z, dt_bias, state) if t is not None]
    *arguments, flat_state = as_mamba(x, dt, A, B, C, D, z, dt_bias, state)
    out, last = discrete_mamba(*arguments, form == "all", flat_state)
    expected = out.view(b, h, p, length).permute(0, 3, 1, 2), last.view(b, h, p, n)
    options = {"dt_softplus": form == "all", "return_final_states": True}
    ours = mamba_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, 4, D, z, dt_bias, state, **options)
    same_with_gradients(ours, expected, leaves)
    alone = mamba_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, 256, D, z, dt_bias, state, dt_softplus=form == "all")
    assert torch.equal(alone, ours[0])  # chunk_size changes no bit
    limited = mamba_ssm.mamba_chunk_scan_combined(x, dt, A, B, C, 4, dt_limit=(0.2, 0.3))
    clipped = mamba_ssm.mamba_chunk_scan_combined(x, dt.clamp(0.2, 0.3), A, B, C, 4)
    torch.testing.assert_close(limited, clipped)


def test_selective_state_update():
    b, d, n = 2, 4, 3
    state, B, C = torch.randn(b, d, n, **DOUBLE), *(torch.randn(b, n, **DOUBLE) for _ in range(2))
    x, dt, z = (torch.randn(b, d, **DOUBLE) for _ in range(3))
    A, D, dt_bias = -torch.rand(d, n, **DOUBLE), torch.randn(d, **DOUBLE), torch.randn(d, **DOUBLE)
    columns = (x[..., None], dt[..., None], A, B[..., None], C[..., None], D, z[..., None], dt_bias)
    out, last = discrete_mamba(*columns, True, state)
    ours = mamba_ssm.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, True)
    torch.testing.assert_close((ours, state), (out[..., 0], last))


def test_selective_state_update_with_heads():
    b, h, p, g, n = 2, 4, 2, 2, 3
    state, x, z = torch.randn(b, h, p, n, **DOUBLE), *(torch.randn(b, h, p, **DOUBLE) for _ in range(2))
    dt, A, dt_bias = torch.randn(b, h, **DOUBLE), -torch.rand(h, **DOUBLE), torch.randn(h, **DOUBLE)
    B, C, D = torch.randn(b, g, n, **DOUBLE), torch.randn(b, g, n, **DOUBLE), torch.randn(h, **DOUBLE)
    *arguments, flat = as_mamba(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, z[:, None], dt_bias, state)
    out, last = discrete_mamba(*arguments, True, flat)

    def over(v: Tensor, *shape: int) -> Tensor:  # as mamba_ssm's Mamba2 calls it: expanded, not copied
        return v[(..., *(None,) * len(shape))].expand(*v.shape, *shape)

    ours = mamba_ssm.selective_state_update(
        state, x, over(dt, p), over(A, p, n), B, C, over(D, p), z, over(dt_bias, p), True
    )
    torch.testing.assert_close((ours, state), (out.view(b, h, p), last.view(b, h, p, n)))


def discrete_conv(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor, activation: str | None) -> Tensor:
    taps, past = weight.shape[1], torch.cat((before, x), -1)
    steps = []
    for t in range(x.shape[2]):
        window = past[..., before.shape[2] + t - taps + 1 : before.shape[2] + t + 1]
        y = (window * weight).sum(-1) + (0 if bias is None else bias)
        steps.append(y if activation is None else silu(y))
    return torch.stack(steps, -1)


@pytest.mark.parametrize("width", [1, 3, 4, 5])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d_fn(width, activation):
    x, weight, bias = torch.randn(2, 3, 6, **DOUBLE), torch.randn(3, width, **DOUBLE), torch.randn(3, **DOUBLE)
    before = torch.randn(2, 3, width - 1, **DOUBLE)
    leaves = [t.requires_grad_() for t in (x, weight, bias, before)]
    expected = discrete_conv(x, weight, bias, before, activation), torch.cat((before, x), -1)[..., 6:]
    ours = mamba_ssm.causal_conv1d_fn(x, weight, bias, None, before, True, activation=activation)
    same_with_gradients(ours, expected, leaves)
    zeros = torch.zeros_like(before)
    out = torch.empty_like(zeros)
    with torch.no_grad():
        alone, final = mamba_ssm.causal_conv1d_fn(x[..., :2], weight, None, None, None, True, out)
    torch.testing.assert_close(alone, discrete_conv(x[..., :2], weight, None, zeros, None).detach())
    assert final is out and torch.equal(out, torch.cat((zeros, x[..., :2]), -1)[..., 2:])


@pytest.mark.parametrize("kept", [3, 4, 6])
def test_causal_conv1d_update(kept):
    """Any cut of the sequence into calls gives the whole; the state holds the last `kept` inputs."""
    x, weight, bias = torch.randn(2, 3, 9, **DOUBLE), torch.randn(3, 4, **DOUBLE), torch.randn(3, **DOUBLE)
    state = torch.zeros(2, 3, kept, **DOUBLE)
    whole = discrete_conv(x, weight, bias, state, "silu")
    outputs = [mamba_ssm.causal_conv1d_update(x[..., :5], state, weight, bias, "silu")]
    for t in range(5, 9):
        outputs.append(mamba_ssm.causal_conv1d_update(x[..., t], state, weight, bias, "silu")[..., None])
    torch.testing.assert_close(torch.cat(outputs, -1), whole)
    assert torch.equal(state, x[..., -kept:])


def test_mamba_inner_fn():
    """The block behind its first projection, against the loops over sequences, steps and channels."""
    block, x = snn.Mamba(6, d_state=3).double(), torch.randn(2, 5, 6, **DOUBLE)
    A = -torch.exp(block.A_log)
    rest = (block.conv1d.weight, block.conv1d.bias, block.x_proj.weight, block.dt_proj.weight, block.out_proj.weight)
    out = mamba_ssm.mamba_inner_fn(
        block.in_proj(x).mT, *rest, None, A, None, None, block.D, delta_bias=block.dt_proj.bias
    )
    compare(block, out, slow_mamba(block, x))
    bias = torch.randn(3, **DOUBLE)
    arguments = (block.in_proj(x).mT, *rest, None, A, None, None, block.D, block.dt_proj.bias)
    moved = mamba_ssm.mamba_inner_fn(*arguments, B_proj_bias=bias), mamba_ssm.mamba_inner_fn(*arguments, None, bias)
    assert all((other - out).abs().max() > 1e-4 for other in moved)
    with pytest.raises(ValueError, match="mamba_inner_fn: `b_rms_weight` is not available"):
        mamba_ssm.mamba_inner_fn(*arguments, b_rms_weight=bias)
    with pytest.raises(ValueError, match="`A` must be real"):
        mamba_ssm.mamba_inner_fn(*arguments[:7], torch.complex(A, A))


def test_mamba_split_conv1d_scan_combined():
    block, x = snn.Mamba2(6, d_state=3, headdim=4, ngroups=3).double(), torch.randn(2, 5, 6, **DOUBLE)
    arguments = (block.in_proj(x), block.conv1d.weight.squeeze(1), block.conv1d.bias, block.dt_bias,
                 -torch.exp(block.A_log), block.D, 256)  # fmt: skip
    more = {
        "rmsnorm_weight": block.norm.weight,
        "rmsnorm_eps": block.norm.eps,
        "outproj_weight": block.out_proj.weight,
        "headdim": 4,
        "ngroups": 3,
        "norm_before_gate": False,
    }
    combined = mamba_ssm.mamba_split_conv1d_scan_combined
    compare(block, combined(*arguments, **more), slow_mamba2(block, x))
    wide = block.D[:, None].expand(-1, 4)
    out, state = combined(*arguments[:5], wide, 256, **{**more, "headdim": None}, return_final_states=True)
    torch.testing.assert_close(out, combined(*arguments, **more))
    assert state.shape == (2, 3, 4, 3)
    gated = combined(*arguments, headdim=4, ngroups=3)  # no norm, no projection: the gate alone
    assert gated.shape == (2, 5, 12)
    for wrong, text in (
        ({"norm_before_gate": True}, "`norm_before_gate` is not available"),
        ({"headdim": None}, "`headdim` must be given"),
        ({"seq_idx": torch.zeros(2, 5)}, "`seq_idx` is not available"),
    ):
        with pytest.raises(ValueError, match=f"mamba_split_conv1d_scan_combined: {text}"):
            combined(*arguments, **{**more, **wrong})
    with pytest.raises(ValueError, match="`zxbcdt` must have"):
        combined(torch.cat((arguments[0], arguments[0]), -1), *arguments[1:], **more)


def test_what_is_absent_is_refused():
    index = torch.zeros(1, 4, dtype=torch.int32)
    x, dt, A, B = torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2), -torch.ones(2), torch.zeros(1, 4, 1, 2)
    for name, value in {"seq_idx": index, "cu_seqlens": index, "return_varlen_states": True}.items():
        with pytest.raises(
            ValueError, match=f"adapters.mamba_ssm.mamba_chunk_scan_combined: `{name}` is not available"
        ):
            mamba_ssm.mamba_chunk_scan_combined(x, dt, A, B, B, 4, **{name: value})
    with pytest.raises(ValueError, match="`chunk_size` must be >= 1: got 0"):
        mamba_ssm.mamba_chunk_scan_combined(x, dt, A, B, B, 0)
    row, weight, state = torch.zeros(1, 2, 4), torch.zeros(2, 3), torch.zeros(1, 2, 2)
    with pytest.raises(ValueError, match="causal_conv1d_fn: `seq_idx` is not available"):
        mamba_ssm.causal_conv1d_fn(row, weight, None, index)
    for name in ("cache_seqlens", "conv_state_indices"):
        with pytest.raises(ValueError, match=f"causal_conv1d_update: `{name}` is not available, leave it at None"):
            mamba_ssm.causal_conv1d_update(row, state, weight, **{name: index})
    with pytest.raises(ValueError, match="`conv_state` must hold the width of `weight` less 1, or more: got 1 and 3"):
        mamba_ssm.causal_conv1d_update(row, state[..., :1], weight)
    with pytest.raises(ValueError, match="selective_state_update: `state_batch_indices` is not available"):
        mamba_ssm.selective_state_update(*[state] * 6, state_batch_indices=index)
