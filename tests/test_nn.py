"""The model layer: each module against a slow definition of its own, and the detector's promises."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import Tensor, nn

import stablekern.nn as snn
from slow_mamba import compare, silu, slow_mamba2
from stablekern.errors import NonFiniteError
from stablekern.nn import mamba2, mamba_parts
from stablekern.nn.graph import propagation_matrix
from stablekern.ops.assemble_adjacency import assemble_adjacency
from stablekern.ops.cosine_edges import cosine_edges
from stablekern.ops.laplacian_pe import laplacian_pe

FALLBACK = "SEIZURE_MAMBA_FORCE_FALLBACK"
NODE = {"d_model": 64, "d_state": 16, "headdim": 8}
EDGE = {"d_model": 16, "d_state": 8, "headdim": 4}
GROUPS = {"d_model": 6, "d_state": 3, "d_conv": 3, "headdim": 2, "ngroups": 2}
SHORT = 16 * 21  # 21 frames: not a multiple of the small presets' graph strides


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (FALLBACK, "BGB_SAFE_CLAMP", "BGB_NAN_DEBUG", "BGB_DEBUG_FINITE", "BGB_SMOKE_TEST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mamba_parts, "_told_fallback", False)


# ---------------------------------------------------------------- Mamba-2


@pytest.mark.parametrize(
    ("sizes", "clamp"),
    [(NODE, None), (EDGE, None), (GROUPS, None), (EDGE, 0.02)],
    ids=["node", "edge", "groups", "clamp"],
)
def test_mamba2_is_its_recurrence(sizes, clamp):
    block = snn.Mamba2(**sizes, state_clamp=clamp).double()
    x = torch.randn(2, 6, sizes["d_model"], dtype=torch.float64)
    expected = slow_mamba2(block, x, clamp=clamp)
    compare(block, block(x), expected)
    if clamp is not None:
        assert not torch.allclose(expected, slow_mamba2(block, x))  # the clamp was reached


def test_mamba2_float32_within_twice_plain_torch():
    block = snn.Mamba2(**NODE)
    x = torch.randn(1, 12, 64)
    plain = slow_mamba2(block, x)
    exact = slow_mamba2(block.double(), x.double())
    error, allowed = (block.float()(x) - exact).abs().max(), (plain - exact).abs().max()
    assert error <= 2 * allowed + 8 * torch.finfo(torch.float32).eps * exact.abs().max()


def test_mamba2_is_causal_and_passes_any_length():
    block = snn.Mamba2(**EDGE)
    x = torch.randn(1, 40, 16)
    torch.testing.assert_close(block(x)[:, :3], block(x[:, :3]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        (NODE, {"in_proj.weight": (304, 64), "conv1d.weight": (160, 1, 4), "conv1d.bias": (160,), "norm.weight": (128,),
                "dt_bias": (16,), "A_log": (16,), "D": (16,), "out_proj.weight": (64, 128)}),
        (EDGE, {"in_proj.weight": (88, 16), "conv1d.weight": (48, 1, 4), "conv1d.bias": (48,), "norm.weight": (32,),
                "dt_bias": (8,), "A_log": (8,), "D": (8,), "out_proj.weight": (16, 32)}),
    ],
    ids=["node", "edge"],
)  # fmt: skip
def test_mamba2_state_dict(sizes, expected):
    state = snn.Mamba2(**sizes).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_mamba2_initial_values():
    block = snn.Mamba2(512, headdim=4)  # 256 heads
    steps, rates = nn.functional.softplus(block.dt_bias), block.A_log.exp()
    assert 1e-3 * (1 - 1e-3) <= steps.min() < 2e-3 and 0.05 < steps.max() <= 0.1 * (1 + 1e-3)
    assert 0.3 < (steps < 1e-2).float().mean() < 0.7  # log-uniform: half of them below the geometric mean
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert (block.D == 1).all()
    unmarked = {name for name, p in block.named_parameters() if not getattr(p, "_no_weight_decay", False)}
    assert unmarked == {"in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight"}


@pytest.mark.parametrize("forced", ["0", "1"])
def test_mamba2_reverse_is_the_flipped_block(monkeypatch, forced):
    """What a bidirectional layer did with two flipped copies."""
    monkeypatch.setenv(FALLBACK, forced)
    monkeypatch.setattr(mamba_parts, "_told_fallback", True)
    block, x = snn.Mamba2(8, 4, headdim=4, ngroups=2).double(), torch.randn(2, 70, 8, dtype=torch.float64)
    torch.testing.assert_close(block(x, reverse=True), block(x.flip(1)).flip(1))


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"d_model": 16, "headdim": 5}, "`headdim` must divide `expand . d_model`: got 5 and 32"),
        ({"d_model": 16, "headdim": 8, "ngroups": 3}, "`ngroups` must divide the heads: got 3 and 4"),
        ({"d_model": 0}, "`d_model` must be >= 1: got 0"),
    ],
)
def test_mamba2_refuses(sizes, text):
    with pytest.raises(ValueError, match=text):
        snn.Mamba2(**sizes)
    with pytest.raises(ValueError, match=r"stablekern.nn.Mamba2: `x` must have the shape \(b, l, 16\)"):
        snn.Mamba2(**EDGE)(torch.zeros(1, 5, 17))


# ---------------------------------------------------------------- the fallback


def test_fallback_is_its_formula_and_warns_once(monkeypatch):
    block = snn.Mamba2(**GROUPS).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    with_scan = block(x)
    monkeypatch.setenv(FALLBACK, "true")
    with pytest.warns(RuntimeWarning, match=FALLBACK) as caught:
        first = block(x)
    assert len(caught) == 1
    compare(block, snn.Mamba2.forward(block, x), slow_mamba2(block, x, fallback=True))  # warnings are errors here
    assert torch.equal(first, block(x)) and not torch.allclose(first, with_scan)
    assert "fallback forced" in repr(block)
    block(x).sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad is None] == ["dt_bias", "A_log"]
    monkeypatch.setenv(FALLBACK, "0")
    assert torch.equal(block(x), with_scan) and "fallback" not in repr(block)


def test_a_failing_scan_never_becomes_the_fallback(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("causal_conv1d NoneType")

    monkeypatch.setattr(mamba2, "ssd_scan", fails)
    with pytest.raises(RuntimeError, match="causal_conv1d"):
        snn.Mamba2(**EDGE)(torch.randn(1, 4, 16))


# ---------------------------------------------------------------- the bidirectional stack


@pytest.mark.parametrize("layerscale", [None, 0.5])
def test_bimamba2_is_its_formula(layerscale):
    stack = snn.BiMamba2(6, d_state=3, headdim=2, num_layers=2, layerscale=layerscale).double().eval()
    x = expected = torch.randn(2, 6, 8, dtype=torch.float64)
    for layer in stack.layers:
        rows = expected.transpose(1, 2)
        ahead = slow_mamba2(layer.forward_mamba_real, rows)
        back = slow_mamba2(layer.backward_mamba_real, rows.flip(1)).flip(1)
        new = torch.cat((ahead, back), 2) @ layer.output_proj.weight.T + layer.output_proj.bias
        total = rows + (1.0 if layerscale is None else layer.layerscale.gamma) * new
        centred = total - total.mean(2, keepdim=True)
        normed = centred / torch.sqrt((centred**2).mean(2, keepdim=True) + 1e-5)
        expected = (normed * layer.layer_norm.weight + layer.layer_norm.bias).transpose(1, 2)
    compare(stack, stack(x), expected)


@pytest.mark.parametrize("forced", ["0", "1"])
@pytest.mark.parametrize("clamp", [None, 0.01])
def test_both_directions_at_once_are_two_blocks(monkeypatch, forced, clamp):
    monkeypatch.setenv(FALLBACK, forced)
    monkeypatch.setattr(mamba_parts, "_told_fallback", True)
    sizes = {"d_state": 3, "headdim": 4, "ngroups": 2, "num_layers": 1, "dropout": 0.0, "state_clamp": clamp}
    layer = snn.BiMamba2(8, **sizes).double().layers[0]
    x = torch.randn(2, 70, 8, dtype=torch.float64, requires_grad=True)
    ahead, back = layer.forward_mamba_real(x), layer.backward_mamba_real(x, reverse=True)
    two = layer.layer_norm(x + layer.output_proj(torch.cat((ahead, back), -1)))
    inputs = [x, *(p for n, p in layer.named_parameters() if forced == "0" or not n.endswith(("A_log", "dt_bias")))]
    torch.testing.assert_close(layer(x), two)
    ours, theirs = (torch.autograd.grad(y.square().sum(), inputs) for y in (layer(x), two))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("causal", [False, True])
def test_recomputing_layers_give_the_same_gradients(causal):
    """Dropout included: the second run draws the numbers of the first. Nothing of a layer is kept but its input."""
    found, kept = [], []
    for recompute in (False, True):
        torch.manual_seed(3)
        model = snn.SeizureDetector.from_preset("nano", dropout=0.3, causal=causal, recompute=recompute)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            loss = model(torch.randn(1, 19, 16 * 24)).square().mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        kept.append(sum(saved))
    assert kept[1] < 0.7 * kept[0]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_bimamba2_sees_both_ways():
    stack = snn.BiMamba2(16, d_state=8, headdim=4, num_layers=1).eval()
    x = torch.randn(1, 16, 30)
    changed = x.clone()
    changed[..., 15] += 1.0
    moved = (stack(changed) - stack(x)).abs().amax((0, 1))
    assert moved[0] > 0 and moved[-1] > 0
    ahead, back = (getattr(stack.layers[0], f"{way}_mamba_real") for way in ("forward", "backward"))
    assert not torch.equal(ahead.in_proj.weight, back.in_proj.weight)


def bimamba_keys(prefix: str, layers: int, layerscale: bool) -> set[str]:
    block = (
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "dt_bias",
        "A_log",
        "D",
        "norm.weight",
        "out_proj.weight",
    )
    one = {f"{way}_mamba_real.{name}" for way in ("forward", "backward") for name in block}
    one |= {"output_proj.weight", "output_proj.bias", "layer_norm.weight", "layer_norm.bias"}
    one |= {"layerscale.gamma"} if layerscale else set()
    return {f"{prefix}layers.{i}.{name}" for i in range(layers) for name in one}


@pytest.mark.parametrize("layerscale", [None, 0.1])
def test_bimamba2_state_dict(layerscale):
    stack = snn.BiMamba2(16, d_state=8, headdim=4, num_layers=2, layerscale=layerscale)
    assert set(stack.state_dict()) == bimamba_keys("", 2, layerscale is not None)


def with_fallback_entries(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As an older checkpoint has them: a depthwise convolution beside every block."""
    extra = {}
    for name, value in state.items():
        if name.endswith("_mamba_real.conv1d.bias"):
            for leaf in ("weight", "bias"):
                extra[name.replace("_real.conv1d.bias", f"_fallback.{leaf}")] = torch.zeros_like(value)
    assert extra
    return {**state, **extra}


@pytest.mark.parametrize(
    "build", [lambda: snn.BiMamba2(16, headdim=4), lambda: snn.SeizureDetector.from_preset("nano")]
)
def test_fallback_entries_are_dropped_with_one_message(build):
    saved, fresh = build(), build()
    state = with_fallback_entries(saved.state_dict())
    size = len(state)
    with pytest.warns(UserWarning, match="dropped .* `.*_mamba_fallback` entries") as caught:
        fresh.load_state_dict(state)
    assert len(caught) == 1 and len(state) == size
    for name, value in saved.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name
    state["layers.0.unknown"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="unknown"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh.load_state_dict(state)


# ---------------------------------------------------------------- norms


def test_rms_norms():
    x, z = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
    norm = snn.RMSNorm(6).double()
    nn.init.normal_(norm.scale)
    torch.testing.assert_close(norm(x), nn.functional.rms_norm(x, (6,), norm.scale, 1e-5))
    gated = snn.RMSNormGated(6, groups=2).double()
    nn.init.normal_(gated.weight)
    parts = [nn.functional.rms_norm((x * silu(z))[..., s], (3,), eps=1e-5) for s in (slice(0, 3), slice(3, 6))]
    torch.testing.assert_close(gated(x, z), torch.cat(parts, -1) * gated.weight)
    with pytest.raises(ValueError, match="`groups` must divide `dim`: got 4 and 6"):
        snn.RMSNormGated(6, groups=4)


@pytest.mark.parametrize("module", [snn.RMSNorm(4), nn.Sequential(snn.LayerScale(4, 0.5), snn.RMSNorm(4))])
def test_norms_at_zero(module):
    x = torch.zeros(2, 4, requires_grad=True)
    out = module(x)
    out.sum().backward()
    assert (out == 0).all() and x.grad.isfinite().all() and (x.grad != 0).all()


def test_layer_scale():
    assert torch.equal(snn.LayerScale(3, 0.25)(torch.ones(2, 3)), torch.full((2, 3), 0.25))


# ---------------------------------------------------------------- convolutions


def test_tcn_initial_weights_hold():
    encoder = snn.TCNEncoder()
    before = [layer.weight.detach().clone() for layer in encoder.layers]
    encoder(torch.randn(1, 19, 64))
    for i, (layer, weight) in enumerate(zip(encoder.layers, before, strict=True)):
        assert torch.equal(layer.weight, weight), i
        asked = math.sqrt(2 / (weight.shape[1] * weight.shape[2]))
        assert abs(weight.std() / asked - 1) < 5 / math.sqrt(2 * weight.numel()), i  # five standard errors
        assert (layer.bias == 0).all()


def test_tcn_features_follow_the_input():
    encoder = snn.TCNEncoder().eval()
    with torch.no_grad():
        features, silence = encoder(torch.randn(2, 19, 1024)), encoder(torch.zeros(1, 19, 1024))
    assert features.shape == (2, 512, 64)
    over_time, over_items = features.std(-1).mean(), (features[0] - features[1]).std()
    assert over_time > 0.1 and over_items > 0.1
    assert over_time > silence.abs().mean() and over_time < 10


def test_tcn_receptive_field():
    encoder = snn.TCNEncoder(channels=(2,) * 8).eval()
    x = torch.randn(1, 19, 4096, requires_grad=True)
    encoder(x)[0, :, 128].sum().backward()
    seen = x.grad.abs().amax((0, 1)).nonzero().flatten()
    assert (seen[0].item(), seen[-1].item()) == (128 * 16 - 765, 128 * 16 + 765)  # 1531 samples


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: snn.TCNEncoder(channels=(8, 8, 8)), "`channels` must have 4 entries or more"),
        (lambda: snn.TCNEncoder(kernel_size=4), "`kernel_size` must be odd: got 4"),
        (lambda: snn.TCNEncoder(dropout=1.5), "`dropout` must be a number >= 0 and <= 1: got 1.5"),
        (lambda: snn.TCNEncoder(channels=(4,) * 4)(torch.zeros(1, 19, 40)), "positive multiple of 16: got 40"),
        (lambda: snn.TCNEncoder(channels=(4,) * 4)(torch.zeros(1, 18, 32)), r"`x` must have the shape \(b, 19, l\)"),
        (lambda: snn.ProjectionHead(8)(torch.zeros(1, 9, 4)), r"`x` must have the shape \(b, 8, t\)"),
    ],
)
def test_convolutions_refuse(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_projection_head():
    head = snn.ProjectionHead(8, 5)
    x = torch.randn(2, 8, 6)
    out = head(x)
    assert out.shape == (2, 5, 96)
    frames = head.proj(x)
    # Halfway between two frames lies the mean of both: samples 7.5 and 23.5 are the centres of frames 0 and 1.
    middle = (frames[..., :-1] + frames[..., 1:]) / 2
    around = [nn.functional.gelu(middle + sign * (frames[..., 1:] - frames[..., :-1]) / 32) for sign in (-1, 1)]
    torch.testing.assert_close(out[..., 15:-1:16], around[0])
    torch.testing.assert_close(out[..., 16::16], around[1])


# ---------------------------------------------------------------- graph


def rank(x: Tensor) -> Tensor:
    return x.argsort().argsort().double()


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack((x.flatten().double(), y.flatten().double())))[0, 1].item()


def test_edge_weights_carry_more_than_the_sign():
    """Among the pairs of one sign, the sign tells nothing; the rank correlation there is what the magnitude tells."""
    stream = snn.EdgeStream(19, 16, d_state=8, headdim=4, num_layers=2).eval()
    features = nn.functional.layer_norm(torch.randn(2, 19, 24, 64), (64,))
    with torch.no_grad():
        weights, cosines = stream(features), cosine_edges(features)
    assert weights.shape == cosines.shape == (2, 171, 24) and (weights > 0).all()
    for side in (cosines > 0, cosines < 0):
        assert correlation(rank(weights[side]), rank(cosines[side])) > 0.9
    assert correlation(weights, cosines) > correlation(weights, cosines.sign()) + 0.05
    assert weights.std() > 0.05
    assert len(((weights * 1e4).round()).unique()) > 1000  # on a grid of 1e-4


@pytest.mark.parametrize("metric", ["cosine", "correlation"])
def test_edge_stream_holds_means_of_frames(metric):
    stream = snn.EdgeStream(4, 8, metric=metric, stride=4, d_state=4, headdim=4, num_layers=1).eval()
    features = torch.randn(2, 4, 10, 5) + 1.0
    seen = []
    stream.edge_in_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    assert stream(features).shape == (2, 6, 3)
    cosines = cosine_edges(features, metric=metric)
    expected = torch.stack([part.mean(-1) for part in cosines.split(4, dim=-1)], -1)
    torch.testing.assert_close(seen[0].view(2, 6, 3), expected)
    with pytest.raises(ValueError, match="`metric` must be one of"):
        snn.EdgeStream(4, 8, metric="dot")


def some_graphs(graphs: int, nodes: int) -> Tensor:
    """Top-3 graphs, the first without an edge, the second with an isolated node and a self loop."""
    adjacency = assemble_adjacency(torch.rand(graphs, nodes * (nodes - 1) // 2, 1, dtype=torch.float64), nodes)[:, 0]
    adjacency[0] = 0
    adjacency[1, 2, :] = adjacency[1, :, 2] = 0
    adjacency[1, 3, 3] = 0.7
    return adjacency


def slow_ssg(x: Tensor, adjacency: Tensor, alpha: float, hops: int, weight: Tensor, bias: Tensor) -> Tensor:
    """PyTorch Geometric's SSGConv with gcn_norm for one graph, edge by edge: x (N, d)."""
    n = len(x)
    edges = {(i, j): adjacency[i, j].item() for i, j in adjacency.nonzero().tolist()}
    for i in range(n):
        edges.setdefault((i, i), 1.0)  # remaining self loops, with the fill value 1
    degree = [sum(w for (_, target), w in edges.items() if target == j) for j in range(n)]
    out, hop = alpha * x, x
    for _ in range(hops):
        new = torch.zeros_like(x)
        for (i, j), w in edges.items():
            new[j] += w / math.sqrt(degree[i] * degree[j]) * hop[i]
        hop = new
        out = out + (1 - alpha) / hops * hop
    return out @ weight.T + bias


def test_graph_mixer_is_the_sum_over_edges():
    mixer = snn.GraphMixer(4, k=3, alpha=0.05, layerscale=0.5).double().eval()
    adjacency, frames = some_graphs(3, 7)[None], 3
    x = torch.randn(1, 7, frames, 4, dtype=torch.float64)
    encoding = laplacian_pe(adjacency, 3, align="sign")
    expected = torch.empty_like(x)
    for t in range(frames):
        hidden = torch.cat((x[0, :, t], encoding[0, t]), -1)
        for i in range(2):
            lin, norm = mixer.gnn_layers[i].lin, mixer.layer_norms[i]
            new = slow_ssg(hidden, adjacency[0, t], 0.05, 2, lin.weight, lin.bias)
            new = nn.functional.gelu(nn.functional.layer_norm(new, (4,), norm.weight, norm.bias))
            hidden = hidden + new if i else new
        expected[0, :, t] = x[0, :, t] + 0.5 * (hidden - x[0, :, t])
    torch.testing.assert_close(mixer(x, adjacency), expected)
    shapes = {name: tuple(p.shape) for name, p in snn.GraphMixer().named_parameters()}
    assert shapes == {
        "gnn_layers.0.lin.weight": (64, 80), "gnn_layers.0.lin.bias": (64,), "gnn_layers.1.lin.weight": (64, 64),
        "gnn_layers.1.lin.bias": (64,), "layer_norms.0.weight": (64,), "layer_norms.0.bias": (64,),
        "layer_norms.1.weight": (64,), "layer_norms.1.bias": (64,), "layerscale.gamma": (64,),
    }  # fmt: skip
    assert set(snn.GraphMixer().state_dict()) == set(shapes)


def test_propagation_matrix_at_an_isolated_node():
    matrix = propagation_matrix(some_graphs(2, 5), 0.05, 2)
    torch.testing.assert_close(matrix[0], torch.eye(5, dtype=torch.float64))
    assert torch.equal(matrix[1, 2], torch.eye(5, dtype=torch.float64)[2])


def test_graph_mixer_holds_a_graph_for_its_frames():
    mixer = snn.GraphMixer(4, k=3).double().eval()
    adjacency = some_graphs(3, 7)[None]
    x = torch.randn(1, 7, 8, 4, dtype=torch.float64)
    held = mixer(x, adjacency.repeat_interleave(3, dim=1)[:, :8])
    torch.testing.assert_close(mixer(x, adjacency, 3), held)
    with pytest.raises(ValueError, match="must hold ceil.* = 4 graphs for 8 frames: got 3"):
        mixer(x, adjacency, 2)


def test_dynamic_laplacian_pe():
    adjacency = some_graphs(5, 7)[None]
    pe = snn.DynamicLaplacianPE(3, interval=2)
    assert not pe.state_dict() and not list(pe.parameters())
    torch.testing.assert_close(pe(adjacency), laplacian_pe(adjacency, 3, interval=2))
    with pytest.raises(ValueError, match="`align` must be one of"):
        snn.DynamicLaplacianPE(3, align="sum")


# ---------------------------------------------------------------- the detector


@pytest.mark.parametrize(("preset", "low", "high"), [("v3", 5e6, 12e6), ("small", 5e4, 2e6), ("nano", 1e4, 1e5)])
def test_presets(preset, low, high):
    model = snn.SeizureDetector.from_preset(preset).eval()
    assert low <= model.count_parameters() <= high
    assert model.count_parameters() == sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert model(torch.randn(1, 19, 48)).shape == (1, 48)


def test_v3_shapes():
    model = snn.SeizureDetector.from_preset("v3")
    state = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert bimamba_keys("node_mamba.", 6, False) | bimamba_keys("edge_stream.edge_mamba.", 2, False) <= set(state)
    expected = {
        "proj_to_electrodes.weight": (1216, 512, 1),
        "node_mamba.layers.5.forward_mamba_real.in_proj.weight": (304, 64),
        "edge_stream.edge_in_proj.weight": (16, 1, 1),
        "edge_stream.edge_mamba.layers.1.backward_mamba_real.in_proj.weight": (88, 16),
        "edge_stream.edge_out_proj.weight": (1, 16, 1),
        "gnn.gnn_layers.0.lin.weight": (64, 80),
        "proj_from_electrodes.weight": (512, 1216, 1),
        "proj_head.proj.weight": (19, 512, 1),
        "detection_head.weight": (1, 19, 1),
    }
    assert {name: state[name] for name in expected} == expected
    parameters = {name for name, _ in model.named_parameters()}
    assert parameters == set(state)  # no buffers
    spacing = [layer.dilation[0] * math.prod(before.stride[0] for before in model.tcn_encoder.layers[:i])
               for i, layer in enumerate(model.tcn_encoder.layers)]  # fmt: skip
    assert spacing == [2**i for i in range(8)]


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    logits = model(x)
    nn.functional.binary_cross_entropy_with_logits(logits, (torch.rand_like(logits) > 0.5).to(logits.dtype)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("preset", ["nano", "small"])
def test_every_parameter_learns(preset, monkeypatch):
    model = snn.SeizureDetector.from_preset(preset)
    x = torch.randn(2, 19, SHORT)
    for name, grad in gradients(model, x).items():
        assert grad is not None and grad.isfinite().all() and grad.abs().max() > 0, name
    monkeypatch.setenv(FALLBACK, "1")
    with pytest.warns(RuntimeWarning, match=FALLBACK) as caught:
        unused = {name for name, grad in gradients(model, x).items() if grad is None}
    assert len(caught) == 1
    assert unused == {name for name in model.state_dict() if name.endswith((".A_log", ".dt_bias"))}


@pytest.mark.parametrize("case", ["flat", "dead electrodes", "equal electrodes", "huge"])
def test_gradients_are_finite_for_degenerate_recordings(case):
    model = snn.SeizureDetector.from_preset("nano")
    x = torch.randn(2, 19, SHORT)
    if case == "flat":
        x.zero_()
    elif case == "dead electrodes":
        x[:, ::2] = 0
    elif case == "equal electrodes":
        x[:] = x[:, :1]
    else:
        x *= 1e6
    for name, grad in gradients(model, x).items():
        assert grad is not None and grad.isfinite().all(), name


def test_equal_edges_have_finite_gradients():
    """All weights equal: eigenvalues repeat in every graph."""
    model = snn.SeizureDetector.from_preset("nano")
    with torch.no_grad():
        model.edge_stream.edge_out_proj.weight.zero_()
    for name, grad in gradients(model, torch.randn(2, 19, SHORT)).items():
        assert grad is not None and grad.isfinite().all(), name


def test_logits_follow_the_input_and_the_seed():
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(snn.SeizureDetector.from_preset("nano"))
    x = torch.randn(2, 19, SHORT)
    outputs = []
    for model in models:
        torch.manual_seed(4)
        outputs.append(model(x))
    assert torch.equal(*outputs)
    logits = outputs[0].detach()
    assert logits.shape == (2, SHORT) and logits.std(-1).min() > 0.02 and logits.abs().max() < 20


def test_one_bad_window_leaves_the_others_alone():
    model = snn.SeizureDetector.from_preset("nano").eval()
    x = torch.randn(3, 19, SHORT)
    with torch.no_grad():
        clean = model(x)
        x[1, 4, 100] = math.nan
        dirty = model(x)
    assert dirty[1].isnan().any()
    torch.testing.assert_close(dirty[[0, 2]], clean[[0, 2]])


def test_safe_clamp_and_waypoints(monkeypatch):
    model = snn.SeizureDetector.from_preset("nano").eval()
    x = torch.randn(1, 19, SHORT)
    x[0, 0, 0] = math.inf
    monkeypatch.setenv("BGB_SAFE_CLAMP", "1")
    with torch.no_grad():
        assert model(x).isfinite().all()
        monkeypatch.setenv("BGB_NAN_DEBUG", "1")
        with pytest.raises(NonFiniteError, match="`input` must be finite"):
            model(x)


@pytest.mark.parametrize(
    ("module", "tag"),
    [
        ("tcn_encoder", "tcn"),
        ("norm_electrodes", "electrodes"),
        ("node_mamba", "nodes"),
        ("edge_stream", "edge weights"),
        ("gnn", "graph"),
        ("norm_decoded", "decoded"),
        ("detection_head", "logits"),
    ],
)
def test_the_first_bad_tensor_is_named(module, tag, monkeypatch):
    model = snn.SeizureDetector.from_preset("nano").eval()
    getattr(model, module).register_forward_hook(lambda _, __, out: out * math.nan)
    monkeypatch.setenv("BGB_DEBUG_FINITE", "1")
    with torch.no_grad(), pytest.raises(NonFiniteError, match=f"`{tag}` must be finite"):
        model(torch.randn(1, 19, SHORT))


def test_bfloat16_autocast():
    model = snn.SeizureDetector.from_preset("nano").eval()
    x = torch.randn(2, 19, SHORT)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        loss = nn.functional.binary_cross_entropy_with_logits(logits.float(), torch.ones_like(x[:, 0]))
    loss.backward()
    # About a dozen roundings to 8 bits in a row; an edge of the graph may change sides at the top-3 cut as well.
    assert (logits.float() - exact).square().mean().sqrt() < 0.2 * exact.std()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: snn.SeizureDetector.from_preset("v2"),
            ValueError,
            "`name` must be one of 'v3', 'small', 'nano': got 'v2'",
        ),
        (lambda: snn.SeizureDetector.from_preset("nano", width=3), TypeError, "fields of DetectorConfig: got width"),
        (lambda: NANO(torch.zeros(1, 18, 32)), ValueError, r"stablekern.nn.SeizureDetector: `x` must have the shape"),
        (lambda: NANO(torch.zeros(1, 19, 40)), ValueError, "must be a positive multiple of 16: got 40"),
        (lambda: NANO(torch.zeros(1, 19, 0)), ValueError, "must be a positive multiple of 16: got 0"),
        (lambda: NANO(torch.zeros(1, 19, 32, dtype=torch.int64)), TypeError, "`x` must be one of .*: got int64"),
    ],
)
def test_detector_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()


NANO = snn.SeizureDetector.from_preset("nano")

CHILD = """
import os, sys, warnings, torch
import stablekern.nn as snn
state, fallback_state, x, expected = torch.load(sys.argv[1])
model = snn.SeizureDetector.from_preset("nano").eval()
print(model.load_state_dict(state))
with torch.no_grad():
    torch.testing.assert_close(model(x), expected)
print(model.load_state_dict(fallback_state))
os.environ["SEIZURE_MAMBA_FORCE_FALLBACK"] = "on"
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    model(x)
print(model.load_state_dict(state))
"""


def test_checkpoints_load_in_a_new_process(tmp_path, monkeypatch):
    """Strictly, after use, and between the scan and the fallback both ways."""
    model = snn.SeizureDetector.from_preset("nano").eval()
    x = torch.randn(1, 19, SHORT)
    with torch.no_grad():
        expected = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setenv(FALLBACK, "yes")
    with pytest.warns(RuntimeWarning):
        model(x).sum().backward()
    torch.save((state, model.state_dict(), x, expected), tmp_path / "checkpoint.pt")
    monkeypatch.delenv(FALLBACK)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "checkpoint.pt")], capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    assert child.stdout.split("\n")[:3] == ["<All keys matched successfully>"] * 3
