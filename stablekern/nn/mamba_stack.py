"""A stack of Mamba-2 layers that look back only, in the shape of `BiMamba2`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from stablekern import _check, numerics
from stablekern.nn import mamba_parts
from stablekern.nn.mamba2 import Mamba2
from stablekern.nn.norms import LayerScale
from stablekern.nn.stream import Memory

__all__ = ["Mamba2Stack"]


class Mamba2Stack(nn.Module):
    r"""Causal Mamba-2 layers, (b, d_model, l) -> (b, d_model, l): $x \leftarrow \mathrm{LN}(x + \mathrm{dropout}(\gamma
    \odot f(x)))$.

    **Arguments:** `d_model`; `num_layers`; `dropout` in [0, 1]; `layerscale`, the initial $\gamma$, or None for none;
    `recompute` as in `BiMamba2`; further keywords are those of `Mamba2`. `forward(x, memory)`: with a memory, go on
    after what it has seen.

    **State dict:** `layers.{i}.mamba.*`, `layers.{i}.layer_norm.*`, and `layers.{i}.layerscale.gamma` if asked for.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_layers: int = 1,
        dropout: float = 0.0,
        layerscale: float | None = None,
        recompute: bool = False,
        **mamba: Any,
    ) -> None:
        super().__init__()
        self.d_model, self.recompute = d_model, recompute
        _check.integer("nn.Mamba2Stack", "num_layers", num_layers, low=1)
        _check.number("nn.Mamba2Stack", "dropout", dropout, low=0.0, high=1.0)
        self.layers = nn.ModuleList(_Layer(d_model, dropout, layerscale, **mamba) for _ in range(num_layers))

    def forward(self, x: Tensor, memory: Memory | None = None) -> Tensor:  # (b, d_model, l) -> (b, d_model, l)
        _check.shapes("nn.Mamba2Stack", x=(x, f"b {self.d_model} l"))
        x = x.transpose(1, 2)
        for layer in self.layers:
            x = mamba_parts.through(layer, self.recompute and memory is None, x, memory)
        return x.transpose(1, 2)


class _Layer(nn.Module):
    """(b, l, d) -> (b, l, d)."""

    def __init__(self, d_model: int, dropout: float, layerscale: float | None, **mamba: Any) -> None:
        super().__init__()
        self.mamba = Mamba2(d_model, **mamba)
        self.layerscale = nn.Identity() if layerscale is None else LayerScale(d_model, layerscale)
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(d_model, eps=numerics.NORM_EPS.value)

    def forward(self, x: Tensor, memory: Memory | None) -> Tensor:
        cache = None
        if memory is not None:
            if self.mamba not in memory:
                memory[self.mamba] = self.mamba.allocate_inference_cache(x.shape[0])
            cache = memory[self.mamba]
        return self.layer_norm(x + self.dropout(self.layerscale(self.mamba(x, cache))))
