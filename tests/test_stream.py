"""The detector on a signal in pieces: the logits of the whole signal, whatever the pieces."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stablekern import training
from stablekern.eeg import Recording, WindowDataset
from stablekern.nn import SeizureDetector
from stablekern.nn.detector import DetectorConfig
from stablekern.nn.tcn import ProjectionHead, TCNEncoder

SIZES = {"tcn_channels": (8, 8, 8, 8, 8, 8), "electrode_dim": 8, "node_headdim": 4, "graph_stride": 3}


def detector(causal, **options):
    torch.manual_seed(0)
    model = SeizureDetector.from_preset("nano", causal=causal, **{**SIZES, **options}).double().eval()
    with torch.no_grad():  # the initial weights hardly use the graph; these do
        model.gnn.layerscale.gamma.fill_(0.7)
    return model


def pieces(total, seed):
    """Lengths of 0 to 200 that add up to `total`."""
    generator, lengths = np.random.default_rng(seed), []
    while sum(lengths) < total:
        lengths.append(min(int(generator.integers(0, 200)), total - sum(lengths)))
    return lengths


def streamed(stream, signal, seed):
    out = [stream.push(piece) for piece in signal.split(pieces(signal.shape[1], seed), dim=1)]
    return torch.cat([*out, stream.finish()]), out


@pytest.mark.parametrize("edge_ema", [0.0, 0.9])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [16 * 53, 48 * 20, 16, 16 * 53 + 7])
def test_a_causal_stream_gives_the_offline_logits(length, seed, edge_ema):
    model = detector(causal=True, edge_ema=edge_ema)
    signal = torch.randn(19, length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole = length // 16 * 16
    with torch.no_grad():
        offline = model(signal[None, :, :whole])[0]
    online, _ = streamed(model.stream(), signal, seed)
    # Float64, and sums in another order: convolutions and scans over pieces.
    torch.testing.assert_close(online, offline, rtol=0, atol=1e-11)


def test_a_causal_model_does_not_look_ahead_of_its_block():
    model = detector(causal=True)
    signal = torch.randn(1, 19, 48 * 8, dtype=torch.float64)
    changed = signal.clone()
    changed[:, :, 48 * 5 :] += torch.randn(1, 19, 48 * 3, dtype=torch.float64)
    with torch.no_grad():
        before, after = model(signal), model(changed)
    assert torch.equal(before[:, : 48 * 5], after[:, : 48 * 5]) and not torch.equal(before, after)
    other = detector(causal=False)
    with torch.no_grad():
        assert not torch.equal(other(signal)[:, :16], other(changed)[:, :16])


def test_what_comes_late_comes_within_the_latency():
    model = detector(causal=True)
    stream, given, got = model.stream(), 0, 0
    assert stream.latency == 48
    for _ in range(40):
        got += stream.push(torch.randn(19, 7, dtype=torch.float64)).shape[0]
        given += 7
        assert 0 <= given - got < stream.latency
    window = detector(causal=False).stream(window=160, hop=48)
    given = got = 0
    for _ in range(80):
        got += window.push(torch.randn(19, 7, dtype=torch.float64)).shape[0]
        given += 7
        assert 0 <= given - got <= window.latency
    assert got > 0


@pytest.mark.parametrize("hop", [80, 48, 160])
def test_a_window_stream_gives_what_predict_gives(hop):
    model = detector(causal=False).float()
    signal = torch.randn(19, 160 + 5 * hop + 33)
    recording = Recording(signal.numpy(), 256.0, unit="sigma")
    windows = WindowDataset(recording, window_seconds=160 / 256, stride_seconds=hop / 256, tail=True)
    (offline,) = training.predict(model, windows)
    online, out = streamed(model.stream(window=160, hop=hop), signal, 3)
    assert online.shape == offline.shape
    settled = sum(part.shape[0] for part in out)  # from here on the last window joins in, for samples not out yet
    untouched = min(settled, signal.shape[1] - 160)
    torch.testing.assert_close(torch.sigmoid(online[:untouched]), offline[:untouched], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.sigmoid(online[settled:]), offline[settled:], rtol=0, atol=1e-6)


def test_memory_does_not_grow():
    stream = detector(causal=True).stream()

    def kept():
        tensors = [
            part for value in stream._memory.values() for part in (value if isinstance(value, tuple) else (value,))
        ]
        return sum(part.numel() for part in tensors)

    stream.push(torch.randn(19, 480, dtype=torch.float64))
    first = kept()
    for _ in range(5):
        stream.push(torch.randn(19, 480, dtype=torch.float64))
    assert kept() == first


def test_training_mode_and_gradients_are_left_alone():
    model = detector(causal=True).train()
    logits = model.stream().push(torch.randn(19, 96, dtype=torch.float64))
    assert model.training and not logits.requires_grad and logits.shape == (96,)
    model(torch.randn(2, 19, 96, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "act, error",
    [
        (lambda: detector(True).stream(window=160), "takes no `window`"),
        (lambda: detector(False).stream(window=150), "must be a multiple of 16: got 150"),
        (lambda: detector(False).stream(window=160, hop=161), "`hop` must be between 1 and 160: got 161"),
        (lambda: detector(False).stream(window=160).finish(), "at least one window of 160 samples: got 0"),
        (lambda: detector(True).stream().push(torch.zeros(18, 5)), r"`samples` must have the shape \(19, l\)"),
        (lambda: detector(True, pe_interval=2), "must have `pe_interval` = 1"),
    ],
)
def test_misuse(act, error):
    with pytest.raises(ValueError, match=error):
        act()


def test_a_stream_that_has_ended_takes_nothing():
    stream = detector(True).stream()
    stream.finish()
    with pytest.raises(ValueError, match="must come before `finish`"):
        stream.push(torch.zeros(19, 5))


def test_causal_parts_by_hand():
    """A frame of the encoder ends with its own last sample; the head reaches its frame at its last sample."""
    torch.manual_seed(0)
    encoder = TCNEncoder(2, (3, 3, 3, 3, 3), 3, 0.0, causal=True).double()
    x = torch.randn(1, 2, 160, dtype=torch.float64, requires_grad=True)
    y = encoder(x)
    assert y.shape == (1, 3, 10)
    (gradient,) = torch.autograd.grad(y[0, :, 4].sum(), x)
    used = gradient[0].abs().sum(0).nonzero().flatten()
    assert int(used.max()) == 79
    head = ProjectionHead(1, 1, causal=True).double()
    with torch.no_grad():
        head.proj.weight.fill_(1.0)
        head.proj.bias.zero_()
    frames = torch.tensor([[[2.0, 10.0, 6.0]]], dtype=torch.float64)
    line = torch.cat([torch.full((16,), 2.0), 2 + torch.arange(1, 17) / 2, 10 - torch.arange(1, 17) / 4]).double()
    torch.testing.assert_close(head(frames)[0, 0], torch.nn.functional.gelu(line))


def test_the_config_of_a_checkpoint_without_the_field_loads(tmp_path):
    model = SeizureDetector.from_preset("nano")
    training.save_checkpoint(tmp_path / "c.pt", model)
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    del content["config"]["causal"]
    torch.save(content, tmp_path / "c.pt")
    loaded, _ = training.load_checkpoint(tmp_path / "c.pt")
    assert loaded.config == DetectorConfig(**{**content["config"], "causal": False})
