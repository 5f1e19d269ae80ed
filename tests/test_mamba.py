"""`nn.Mamba`, streaming through all Mamba blocks, and how far the bidirectional stack sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import stablekern.nn as snn
from slow_mamba import compare, slow_mamba
from stablekern.nn import mamba as mamba_module
from stablekern.nn import mamba_parts
from stablekern.optim import parameter_groups

FALLBACK = "SEIZURE_MAMBA_FORCE_FALLBACK"
SMALL = {"d_model": 6, "d_state": 3, "d_conv": 3, "dt_rank": 2}
BLOCKS = {
    "mamba": lambda **options: snn.Mamba(8, d_state=4, **options),
    "mamba-taps": lambda **options: snn.Mamba(8, d_state=4, d_conv=2, conv_bias=False, bias=True, **options),
    "mamba2": lambda **options: snn.Mamba2(8, d_state=4, headdim=4, ngroups=2, **options),
}


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv(FALLBACK, raising=False)
    monkeypatch.setattr(mamba_parts, "_told_fallback", False)


# ---------------------------------------------------------------- Mamba-1


@pytest.mark.parametrize(
    ("sizes", "clamp"),
    [
        (SMALL, None),
        ({"d_model": 20, "d_state": 2, "expand": 1}, None),
        ({**SMALL, "bias": True, "conv_bias": False}, None),
        (SMALL, 1e-3),
    ],
    ids=["small", "rank", "biases", "clamp"],
)
def test_mamba_is_its_recurrence(sizes, clamp):
    block = snn.Mamba(**sizes, state_clamp=clamp).double()
    x = torch.randn(2, 6, sizes["d_model"], dtype=torch.float64)
    expected = slow_mamba(block, x, clamp=clamp)
    compare(block, block(x), expected)
    if clamp is not None:
        assert not torch.allclose(expected, slow_mamba(block, x))  # the clamp was reached


def test_mamba_float32_within_twice_plain_torch():
    block = snn.Mamba(16)
    x = torch.randn(1, 12, 16)
    plain = slow_mamba(block, x)
    exact = slow_mamba(block.double(), x.double())
    error, allowed = (block.float()(x) - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * allowed + 8 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_mamba_state_dict_and_marks():
    block = snn.Mamba(40, d_state=8, expand=3)
    assert {name: tuple(value.shape) for name, value in block.state_dict().items()} == {
        "A_log": (120, 8), "D": (120,), "in_proj.weight": (240, 40), "conv1d.weight": (120, 1, 4),
        "conv1d.bias": (120,), "x_proj.weight": (19, 120), "dt_proj.weight": (120, 3), "dt_proj.bias": (120,),
        "out_proj.weight": (40, 120),
    }  # fmt: skip
    marked = {name for name, p in block.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "D", "dt_proj.bias"}
    decayed = {id(p) for p in parameter_groups(block, 0.1)[0]["params"]}
    names = {name for name, p in block.named_parameters() if id(p) in decayed}
    assert names == {"in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"}


def test_mamba_initial_values():
    block = snn.Mamba(256)
    steps = nn.functional.softplus(block.dt_proj.bias)
    assert 1e-3 * (1 - 1e-3) <= steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1 * (1 + 1e-3)
    assert 0.4 < (steps < 1e-2).float().mean() < 0.6  # log-uniform: half of them below the geometric mean
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert (block.D == 1).all()
    weight = block.dt_proj.weight.abs()
    assert 0.24 < weight.max() <= 0.25 and abs(weight.mean() - 0.125) < 0.005  # uniform within 1 / sqrt(16)
    constant = snn.Mamba(256, dt_init="constant", dt_scale=2.0).dt_proj.weight
    assert (constant == 0.5).all()


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"d_model": 0}, "`d_model` must be >= 1: got 0"),
        ({"d_model": 4, "dt_rank": 0}, "`dt_rank` must be >= 1: got 0"),
        ({"d_model": 4, "dt_init": "zeros"}, "`dt_init` must be one of 'random', 'constant': got 'zeros'"),
    ],
)
def test_mamba_refuses(sizes, text):
    with pytest.raises(ValueError, match=text):
        snn.Mamba(**sizes)
    with pytest.raises(ValueError, match=r"stablekern.nn.Mamba: `x` must have the shape \(b, l, 6\)"):
        snn.Mamba(6)(torch.zeros(1, 5, 7))


def test_mamba_fallback_is_its_formula_and_warns_once(monkeypatch):
    block = snn.Mamba(**SMALL).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    with_scan = block(x)
    monkeypatch.setenv(FALLBACK, "yes")
    with pytest.warns(RuntimeWarning, match=FALLBACK) as caught:
        first = block(x)
    assert len(caught) == 1
    compare(block, block(x), slow_mamba(block, x, fallback=True))  # warnings are errors here
    assert not torch.allclose(first, with_scan) and "fallback forced" in repr(block)
    block(x).sum().backward()
    unused = {name for name, p in block.named_parameters() if p.grad is None}
    assert unused == {"A_log", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"}
    monkeypatch.setenv(FALLBACK, "0")
    assert torch.equal(block(x), with_scan) and "fallback" not in repr(block)


def test_a_failing_scan_never_becomes_the_fallback(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(mamba_module, "selective_scan", fails)
    with pytest.raises(RuntimeError, match="no kernel image"):
        snn.Mamba(6)(torch.randn(1, 4, 6))


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(name, dtype):
    """The projections round to half precision, the scan does not: what is left is a few of their roundings."""
    block = BLOCKS[name]()
    x = torch.randn(2, 50, 8)
    exact = block(x)
    with torch.autocast("cpu", dtype=dtype):
        automatic = block(x)
    automatic.float().square().sum().backward()
    assert automatic.dtype == dtype
    for p in block.parameters():
        assert p.grad.dtype == torch.float32 and p.grad.isfinite().all() and p.grad.abs().max() > 0
    cast = block.to(dtype)(x.to(dtype))
    assert cast.dtype == dtype
    for half in (automatic, cast):
        assert (half.float() - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


# ---------------------------------------------------------------- streaming


def streamed(
    block: nn.Module, x: Tensor, pieces: list[int], cache: snn.MambaCache | None = None
) -> tuple[Tensor, snn.MambaCache]:
    """The outputs for pieces of the given lengths; those of length 1 by `step`."""
    cache = block.allocate_inference_cache(len(x)) if cache is None else cache
    outputs = []
    for piece in x.split(pieces, dim=1):
        if piece.shape[1] == 1:
            out, conv_state, ssm_state = block.step(piece, cache.conv_state, cache.ssm_state)
            assert conv_state is cache.conv_state and ssm_state is cache.ssm_state and not out.requires_grad
        else:
            out = block(piece, cache)
        outputs.append(out)
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("forced", [False, True], ids=["scan", "fallback"])
@pytest.mark.parametrize("clamp", [None, 1e-3])
@pytest.mark.parametrize("name", BLOCKS)
def test_pieces_are_the_whole(name, clamp, forced, monkeypatch):
    block = BLOCKS[name](state_clamp=clamp).double()
    if forced:
        monkeypatch.setenv(FALLBACK, "1")
        monkeypatch.setattr(mamba_parts, "_told_fallback", True)
    x = torch.randn(3, 17, 8, dtype=torch.float64)
    whole = block(x)
    cache = block.allocate_inference_cache(3)
    for pieces in ([1] * 17, [9] + [1] * 8, [2, 1, 0, 3, 1, 10], [17]):
        for state in cache:  # which makes it a new one
            state.zero_()
        out, _ = streamed(block, x, pieces, cache)
        torch.testing.assert_close(out, whole, rtol=1e-10, atol=1e-12)
        alone, _ = streamed(block, x[2:], pieces)
        torch.testing.assert_close(alone, whole[2:], rtol=1e-10, atol=1e-12)
        if clamp is not None and not forced:
            assert cache.ssm_state.abs().max() == clamp  # reached, and never passed
    if clamp is not None and not forced:
        free = BLOCKS[name]().double()
        free.load_state_dict(block.state_dict())
        assert not torch.allclose(free(x), whole)  # the clamp was reached


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_streaming_in_float32_and_half(name):
    """Step by step within twice the error of the whole sequence at once, with a few roundings of the output."""
    block = BLOCKS[name]()
    x = torch.randn(2, 60, 8)
    whole, exact = block(x), block.double()(x.double())
    scale = exact.abs().max()
    out, _ = streamed(block.float(), x, [30] + [1] * 30)
    error, allowed = (out - exact).abs().max(), (whole - exact).abs().max()
    assert error <= 2 * allowed + 8 * torch.finfo(torch.float32).eps * scale
    for kept in (torch.bfloat16, torch.float64):
        cache = block.allocate_inference_cache(2, dtype=kept)
        out, _ = streamed(block, x, [30] + [1] * 30, cache)
        assert cache.ssm_state.dtype == kept and out.dtype == torch.float32
        narrow = max(torch.finfo(kept).eps, torch.finfo(torch.float32).eps)
        assert (out - exact).norm() <= 8 * narrow * exact.norm()
    half = block.bfloat16()
    cache = half.allocate_inference_cache(2)
    assert cache.conv_state.dtype == torch.bfloat16 and cache.ssm_state.dtype == torch.float32
    out, _ = streamed(half, x.bfloat16(), [30] + [1] * 30)
    assert (out.float() - exact).norm() <= 8 * torch.finfo(torch.bfloat16).eps * exact.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = streamed(block.float(), x, [30] + [1] * 30)
    assert (out.float() - exact).norm() <= 8 * torch.finfo(torch.bfloat16).eps * exact.norm()


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_gradients_stop_at_the_cache(name):
    """Truncated backpropagation: a piece's gradients are those of the piece, its past a constant."""
    block = BLOCKS[name]().double()
    x = torch.randn(1, 12, 8, dtype=torch.float64, requires_grad=True)
    cache = block.allocate_inference_cache(1)
    first = block(x[:, :7], cache)
    second = block(x[:, 7:], cache)
    assert not cache.ssm_state.requires_grad and not cache.conv_state.requires_grad
    (grad,) = torch.autograd.grad(second.square().sum(), x, retain_graph=True)
    assert (grad[:, :7] == 0).all() and (grad[:, 7:] != 0).any(-1).all()
    (grad,) = torch.autograd.grad(first.sum(), x, retain_graph=True)  # the cache moved on; the graph is intact
    (alone,) = torch.autograd.grad(block(x)[:, :7].sum(), x)
    torch.testing.assert_close(grad, alone)


def test_inference_cache_shapes_and_refusals():
    mamba, mamba2 = snn.Mamba(8, d_state=5, d_conv=3), snn.Mamba2(8, d_state=4, headdim=2, ngroups=2)
    shapes = [[tuple(t.shape) for t in block.allocate_inference_cache(3, 100)] for block in (mamba, mamba2)]
    assert shapes == [[(3, 16, 3), (3, 16, 5)], [(3, 32, 4), (3, 8, 2, 4)]]
    cache = mamba.allocate_inference_cache(3, dtype=torch.float64)
    assert cache.conv_state.dtype == cache.ssm_state.dtype == torch.float64
    assert not any(t.any() for t in cache)
    with pytest.raises(ValueError, match=r"nn.Mamba: `conv_state` must have the shape \(2, 16, 3\): got \(3, 16, 3\)"):
        mamba(torch.zeros(2, 4, 8), cache)
    for block, x in ((mamba, torch.zeros(3, 4, 8)), (mamba2, torch.zeros(3, 4, 8))):
        with pytest.raises(TypeError, match=r"nn.Mamba2?: `cache` must be a MambaCache, of .*: got tuple"):
            block(x, tuple(cache))
        with pytest.raises(TypeError, match=r"nn.Mamba2?: `ssm_state` must be a tensor: got NoneType"):
            block.step(x[:, :1], block.allocate_inference_cache(3).conv_state, None)
    for block in (mamba, mamba2, snn.BiMamba2(8, headdim=4)):
        with pytest.raises(TypeError, match="`x` must be a tensor: got NoneType"):
            block(None)
    with pytest.raises(ValueError, match=r"nn.Mamba2: `hidden_states` must have the shape \(b, 1, 8\)"):
        mamba2.step(torch.zeros(3, 2, 8), *mamba2.allocate_inference_cache(3))
    with pytest.raises(ValueError, match="nn.Mamba2: `reverse` starts at the last step and cannot stream"):
        mamba2(torch.zeros(3, 2, 8), mamba2.allocate_inference_cache(3), reverse=True)
    stack = snn.BiMamba2(8, headdim=4)
    for call in (lambda: stack.allocate_inference_cache(1, 10), lambda: stack.step(torch.zeros(1, 1, 8), None, None)):
        with pytest.raises(TypeError, match="nn.BiMamba2: streaming needs blocks that look back only"):
            call()


# ---------------------------------------------------------------- how far the bidirectional stack sees


def sensitivity(stack: nn.Module, length: int) -> Tensor:
    """|d y_middle / d x_t| for every t: the norm over channels of a random projection of the middle output."""
    x = torch.randn(1, stack.d_model, length, dtype=torch.float64, requires_grad=True)
    middle = stack(x)[0, :, length // 2]
    weight = torch.randn_like(middle)
    return torch.autograd.grad(middle @ weight / weight.norm(), x)[0][0].norm(dim=0)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_middle_step_depends_on_all_before_and_after(layers):
    stack = snn.BiMamba2(16, d_state=8, headdim=4, num_layers=layers).double().eval()
    x = torch.randn(1, 16, 101, dtype=torch.float64)
    base = stack(x)[..., 50]
    for t in (0, 25, 49, 51, 75, 100):
        moved = x.clone()
        moved[..., t] += 1.0
        assert (stack(moved)[..., 50] - base).abs().max() > 1e-6, t


@pytest.mark.parametrize("sizes", [{"d_model": 64, "d_state": 16}, {"d_model": 16, "headdim": 4}], ids=["node", "edge"])
def test_size_of_gradients_over_time(sizes, monkeypatch):
    """Before any training the middle output hears its neighbours at a tenth of its own input's weight, and hundreds of
    steps, far beyond the convolutions, still at more than a millionth: neither lost nor grown, alike on both sides.
    """
    options = {"d_state": 8, "headdim": 8, "num_layers": 2} | sizes
    stack = snn.BiMamba2(**options).double().eval()
    size = sensitivity(stack, 401)
    own = size[200]
    assert 0.3 < own < 3  # the residual path carries the input through the norms
    for distance, low, high in ((1, 1e-2, 1.0), (10, 1e-5, 0.1), (100, 1e-7, 1e-2), (200, 1e-8, 1e-2)):
        near = slice(distance - 1, distance + 2) if distance > 1 else slice(1, 2)
        for side in (size[:200].flip(0), size[201:]):
            told = side[near.start - 1 : near.stop - 1].mean() / own
            assert low < told < high, (distance, told)
    assert size.sum() < 10 * own
    monkeypatch.setenv(FALLBACK, "1")
    monkeypatch.setattr(mamba_parts, "_told_fallback", True)
    size = sensitivity(stack, 401)
    reach = 2 * 3  # two layers of four taps
    assert (size[200 - reach : 201 + reach] > 0).all()
    assert (size[: 200 - reach] == 0).all() and (size[201 + reach :] == 0).all()


@pytest.mark.parametrize("forced", [False, True], ids=["scan", "fallback"])
def test_gradients_reach_the_encoder_of_the_full_detector(forced, monkeypatch):
    """Through graph, streams and projections back to the first convolution, and not by a hair."""
    if forced:
        monkeypatch.setenv(FALLBACK, "1")
        monkeypatch.setattr(mamba_parts, "_told_fallback", True)
    model = snn.SeizureDetector.from_preset("v3")
    logits = model(torch.randn(1, 19, 336))
    targets = (torch.rand_like(logits) > 0.5).to(logits.dtype)
    nn.functional.binary_cross_entropy_with_logits(logits, targets).backward()
    for name, parameter in model.tcn_encoder.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.norm() > 1e-5, name
    assert max(parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None) < 1e3


@pytest.mark.parametrize(
    "build",
    [
        lambda: snn.Mamba(8),
        lambda: snn.Mamba2(8),
        lambda: snn.BiMamba2(8, headdim=4, num_layers=1, dropout=0.0),
        lambda: snn.SeizureDetector.from_preset("nano"),
    ],
    ids=["mamba", "mamba2", "bimamba2", "detector"],
)
def test_checkpoints_move_between_scan_and_fallback(build, monkeypatch):
    """Built, saved and loaded strictly under either, a model is the same model in both."""
    monkeypatch.setattr(mamba_parts, "_told_fallback", True)
    models = []
    for value in ("0", "1"):
        monkeypatch.setenv(FALLBACK, value)
        torch.manual_seed(int(value))
        models.append(build().eval())
    scan, forced = models
    x = torch.randn({8: (2, 8, 8), 19: (1, 19, 64)}[19 if isinstance(scan, snn.SeizureDetector) else 8])
    for saved, loading in ((scan, forced), (forced, scan)):
        state = {name: value + 0.01 * torch.randn_like(value) for name, value in saved.state_dict().items()}
        for value in ("0", "1"):
            monkeypatch.setenv(FALLBACK, value)
            saved.load_state_dict(state, strict=True)
            expected = saved(x)
            monkeypatch.setenv(FALLBACK, "1" if value == "0" else "0")
            loading.load_state_dict(state, strict=True)
            assert set(loading.state_dict()) == set(state)
            other = loading(x)
            monkeypatch.setenv(FALLBACK, value)
            assert torch.equal(loading(x), expected) and not torch.equal(other, expected)
