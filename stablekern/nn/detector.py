r"""The dual-stream EEG seizure detector: (b, 19, L) samples -> (b, L) logits, L a multiple of 16.

With T = L/16 frames (16 per second at 256 Hz), N = 19 electrodes of D channels, E = 171 pairs, s = `graph_stride` and
T_g = ceil(T/s) graphs:

| step | module | shape |
|---|---|---|
| convolutions | `tcn_encoder` | (b, C, T) |
| electrode features | `proj_to_electrodes`, 1x1, and a norm | (b, N, T, D) |
| node stream | `node_mamba`, each electrode along time | (b, N, T, D) |
| edge stream, from the electrode features | `edge_stream` | (b, E, T_g) |
| graph | `assemble_adjacency`, top 3 | (b, T_g, N, N) |
| message passing with Laplacian encoding | `gnn`, and a norm | (b, N, T, D) |
| back-projection | `proj_from_electrodes`, 1x1, and a norm | (b, C, T) |
| samples | `proj_head` | (b, N, L) |
| logits | `detection_head`, 1x1 | (b, L) |

The preset `"v3"` has the sizes of the detector of that name (C = 512, D = 64, six node layers, two edge layers of 16
channels, 16 eigenvectors, a graph for every frame). What is different from it, and why:

- *No dead weights.* It carried a 512-channel Mamba stack, 22 of its 31 million parameters, that was never called. Here
  every parameter receives a gradient (under the Mamba fallback: all but `A_log` and `dt_bias`).
- *Initial values that hold, features that follow the input, a cheaper encoder*: see `stablekern.nn.tcn`.
- *Edge weights that know the cosine*, not its sign alone: see `EdgeStream`.
- *No clamp and no NaN replacement*, of which it had some thirty on this path. What made them necessary is handled where
  it arises: the gradients of the eigenvectors and of the cosines are bounded in their ops. `BGB_SAFE_CLAMP` still
  clamps after the encoder, the node stream and the graph; `BGB_NAN_DEBUG` makes nine waypoints raise on the first
  non-finite tensor.
- *One bad graph stays one bad graph.* It replaced the encodings of a whole batch by older ones, or by noise, and kept
  them in a buffer that made its checkpoints unloadable. There is no such buffer here, and a strict load works.
- *GELU between the graph layers*, which were linear but for the norm; *the norms after the two Mamba stacks are gone*,
  since each stack ends in one; *linear interpolation and GELU* before the last layer, see `ProjectionHead`.
- *Its running average of the adjacencies*, a loop over 960 steps, is `edge_ema`: one scan over the edge weights, before
  the edges are chosen; off unless asked for, since the edge stream has a memory of its own.
- *The graph may be slower than the features* (`graph_stride`): what connects electrodes changes less often than 16
  times a second. "v3" keeps 1; the small presets do not, and their graphs cost accordingly less.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from stablekern import _check
from stablekern.errors import message
from stablekern.health.checks import assert_finite, clamp_and_check
from stablekern.nn.graph import EdgeStream, GraphMixer, Pointwise
from stablekern.nn.mamba2 import BiMamba2, drop_fallback_entries
from stablekern.nn.mamba_stack import Mamba2Stack
from stablekern.nn.norms import boundary_norm
from stablekern.nn.smoothing import TemporalEMA
from stablekern.nn.stream import CausalStream, Memory, WindowStream
from stablekern.nn.tcn import DOWNSAMPLING, ProjectionHead, TCNEncoder
from stablekern.ops.assemble_adjacency import assemble_adjacency

__all__ = ["PRESETS", "DetectorConfig", "SeizureDetector"]

_OP = "nn.SeizureDetector"


@dataclass(frozen=True)
class DetectorConfig:
    """Sizes and options of a `SeizureDetector`; the defaults are the preset "v3"."""

    channels: int = 19  # electrodes
    tcn_channels: tuple[int, ...] = (
        64,
        128,
        256,
        512,
        512,
        512,
        512,
        512,
    )  # after each layer; the first four halve the rate
    tcn_kernel: int = 7
    tcn_dropout: float = 0.15
    electrode_dim: int = 64  # features per electrode and frame
    node_layers: int = 6
    node_state: int = 16
    node_headdim: int = 8
    edge_dim: int = 16
    edge_layers: int = 2
    edge_state: int = 8
    edge_headdim: int = 4
    edge_metric: str = "cosine"  # or "correlation"
    edge_ema: float = 0.0  # share of its running average that a graph's edges keep, see `TemporalEMA`; 0: no average
    top_k: int = 3  # edges kept per electrode
    graph_stride: int = 1  # frames that share a graph
    pe_k: int = 16  # eigenvectors
    pe_interval: int = 1  # graphs that share an encoding
    pe_align: str = "sign"
    gnn_layers: int = 2
    gnn_hops: int = 2
    gnn_alpha: float = 0.05
    gnn_layerscale: float = 0.1
    mamba_layerscale: float | None = None
    recompute: bool = False  # Mamba layers keep their inputs alone for the backward, and run twice: less memory
    dropout: float = 0.1  # of the Mamba stacks and the graph layers
    boundary_norm: str = "layernorm"  # or "rmsnorm"
    causal: bool = False  # every layer looks back only, but for the graph's block of `graph_stride` frames


_PRESETS = {
    "v3": DetectorConfig(),
    "small": DetectorConfig(
        tcn_channels=(32, 48, 64, 96, 96, 96, 96),
        electrode_dim=16,
        node_layers=2,
        edge_dim=8,
        edge_layers=1,
        edge_state=4,
        graph_stride=4,
        pe_k=8,
    ),
    # Too small to overfit: no dropout, whose random masks would be a tenth of a training step on a CPU.
    "nano": DetectorConfig(
        tcn_channels=(16, 24, 32, 32, 32),
        tcn_dropout=0.0,
        electrode_dim=8,
        node_layers=1,
        node_state=8,
        edge_dim=8,
        edge_layers=1,
        edge_state=4,
        graph_stride=8,
        pe_k=4,
        dropout=0.0,
        boundary_norm="rmsnorm",
    ),
}
PRESETS = tuple(_PRESETS)


class SeizureDetector(nn.Module):
    r"""EEG windows to a seizure logit for every sample, (b, 19, L) -> (b, L); build it by `from_preset`.

    The module docstring has the flow of shapes, and what differs from the detector that it descends from.

    **Arguments:** `config`, a `DetectorConfig`.

    **Forward:** `x` (b, channels, L), floating point, L a positive multiple of 16; channels in the order of the
    montage, each scaled to about unit variance. Returns logits (b, L), no sigmoid. Any b; 60 s at 256 Hz are L = 15
    360.

    **Raises:** `ValueError` for another shape, an unknown preset or sizes that do not fit; `TypeError` for integer
    input; `NonFiniteError` under BGB_NAN_DEBUG. Under autocast, scans, cosines, eigenvectors and norms compute in
    float32.
    """

    def __init__(self, config: DetectorConfig) -> None:
        super().__init__()
        if config.causal and (config.pe_interval != 1 or config.pe_align == "temporal"):
            rule = "a causal detector must have `pe_interval` = 1, and `pe_align` not temporal"
            raise ValueError(message(_OP, rule, config.pe_interval, repr(config.pe_align)))
        self.config = config
        features, nodes, dim = config.tcn_channels[-1], config.channels, config.electrode_dim
        self.tcn_encoder = TCNEncoder(nodes, config.tcn_channels, config.tcn_kernel, config.tcn_dropout, config.causal)
        self.proj_to_electrodes = Pointwise(features, nodes * dim)
        self.norm_electrodes = boundary_norm(config.boundary_norm, dim)
        shared: dict[str, Any] = {
            "dropout": config.dropout,
            "layerscale": config.mamba_layerscale,
            "recompute": config.recompute,
        }
        stack = Mamba2Stack if config.causal else BiMamba2
        self.node_mamba = stack(
            dim, d_state=config.node_state, headdim=config.node_headdim, num_layers=config.node_layers, **shared
        )
        self.edge_stream = EdgeStream(
            nodes,
            config.edge_dim,
            metric=config.edge_metric,
            stride=config.graph_stride,
            causal=config.causal,
            d_state=config.edge_state,
            headdim=config.edge_headdim,
            num_layers=config.edge_layers,
            **shared,
        )
        self.edge_average = TemporalEMA(config.edge_ema)
        self.gnn = GraphMixer(
            dim,
            config.pe_k,
            num_layers=config.gnn_layers,
            hops=config.gnn_hops,
            alpha=config.gnn_alpha,
            pe_interval=config.pe_interval,
            pe_align=config.pe_align,
            dropout=config.dropout,
            layerscale=config.gnn_layerscale,
        )
        self.norm_graph = boundary_norm(config.boundary_norm, dim)
        self.proj_from_electrodes = Pointwise(nodes * dim, features)
        self.norm_decoded = boundary_norm(config.boundary_norm, features)
        self.proj_head = ProjectionHead(features, nodes, causal=config.causal)
        self.detection_head = nn.Conv1d(nodes, 1, 1)
        # Here as well as in the stacks, so that a whole model says it once.
        self.register_load_state_dict_pre_hook(drop_fallback_entries)

    @classmethod
    def from_preset(cls, name: str = "v3", **overrides: Any) -> SeizureDetector:
        """A detector with random weights: `"v3"`, `"small"` or `"nano"`, with fields of `DetectorConfig` overridden."""
        _check.choice(_OP, "name", name, PRESETS)
        unknown = set(overrides) - {field.name for field in fields(DetectorConfig)}
        if unknown:
            raise TypeError(message(_OP, "overrides must be fields of DetectorConfig", *sorted(unknown)))
        return cls(replace(_PRESETS[name], **overrides))

    def count_parameters(self) -> int:
        """The number of trainable scalars."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def stream(self, *, window: int | None = None, hop: int | None = None) -> CausalStream | WindowStream:
        """Logits for a signal that comes in pieces: `push` each piece, `finish` at the end.

        A causal detector takes no arguments, and gives the logits of one pass over the whole signal, at most
        `16 * graph_stride` samples late. Any other one works on windows of `window` samples (60 s at 256 Hz if None),
        one every `hop` (half a window if None), at most `window` samples late. Memory does not grow with the signal.
        """
        where = f"{_OP}.stream"
        if self.config.causal:
            if window is not None or hop is not None:
                raise ValueError(message(where, "a causal detector takes no `window` and no `hop`", window, hop))
            return CausalStream(self)
        window = _check.integer(where, "window", 15_360 if window is None else window, low=DOWNSAMPLING)
        if window % DOWNSAMPLING:
            raise ValueError(message(where, f"`window` must be a multiple of {DOWNSAMPLING}", window))
        hop = _check.integer(where, "hop", window // 2 if hop is None else hop, low=1, high=window)
        return WindowStream(self, window, hop)

    def forward(self, x: Tensor) -> Tensor:  # (b, channels, L) -> (b, L)
        return self.logits(x)

    def logits(self, x: Tensor, memory: Memory | None = None) -> Tensor:  # (b, channels, L) -> (b, L)
        """As `forward`; with a memory a causal detector goes on after what it has seen."""
        past = () if memory is None else (memory,)
        _check.dtypes(_OP, _check.REAL + _check.HALF, x=x)
        nodes, length = self.config.channels, _check.shapes(_OP, x=(x, f"b {self.config.channels} l"))["l"]
        if length % DOWNSAMPLING or not length:
            raise ValueError(message(_OP, f"the length of `x` must be a positive multiple of {DOWNSAMPLING}", length))
        encoded = clamp_and_check(self.tcn_encoder(assert_finite("input", x), *past), tag="tcn")

        projected = self.proj_to_electrodes(encoded.mT).unflatten(2, (nodes, -1))
        electrodes = assert_finite("electrodes", self.norm_electrodes(projected.transpose(1, 2)))  # (b, N, T, D)
        streams = self.node_mamba(electrodes.flatten(0, 1).transpose(1, 2), *past)
        streams = streams.transpose(1, 2).unflatten(0, (-1, nodes))
        streams = clamp_and_check(streams, tag="nodes")
        weights = self.edge_stream(electrodes, *past)
        if self.config.edge_ema:
            weights = self.edge_average(weights, memory=memory)
        weights = assert_finite("edge weights", weights)
        adjacency = assert_finite("adjacency", assemble_adjacency(weights, nodes, top_k=self.config.top_k))
        mixed = clamp_and_check(self.norm_graph(self.gnn(streams, adjacency, self.config.graph_stride)), tag="graph")

        joined = self.proj_from_electrodes(mixed.transpose(1, 2).flatten(2))  # (b, T, C)
        decoded = assert_finite("decoded", self.norm_decoded(joined).mT)
        return assert_finite("logits", self.detection_head(self.proj_head(decoded, *past)).squeeze(1))
