r"""The detector on a signal that has not ended: samples in as they come, logits out as soon as they are settled.

Two kinds of model, two ways:

- *Causal* (`DetectorConfig.causal`): every layer looks back only, so each keeps what it needs of the past (the last
  inputs of a convolution, the state of a scan, the last frame of the read-out), a fixed number of bytes. The logits are
  those of one pass over the whole signal, up to rounding. Graphs are made per block of `graph_stride` frames, so a
  logit comes when its block is complete: after at most `16 * graph_stride` samples.
- *Bidirectional*: a logit depends on the whole window that it lies in. Windows of a fixed length start every `hop`
  samples; the logit of a sample is the mean over the windows that hold it, as `training.predict` gives it for the whole
  recording, and it is settled when the last of them is: after at most `window` samples.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stablekern import _check
from stablekern.errors import message

if TYPE_CHECKING:
    from stablekern.nn.detector import SeizureDetector

__all__ = ["CausalStream", "Memory", "WindowStream", "carried"]

_OP = "nn.SeizureDetector.stream"

# What each layer of a causal model keeps of the past.
Memory = MutableMapping[nn.Module, Any]


def carried(memory: Memory | None, owner: nn.Module, x: Tensor, left: int, *, hold: bool = False) -> Tensor:
    """`x`, (..., T), with the `left` steps before it in front, which `memory` keeps for `owner` and moves on.

    Before the first step there are zeros, or with `hold` the first step again. Without a memory x is the whole signal.
    """
    before = None if memory is None else memory.get(owner)
    if before is None:
        before = x[..., :1].expand(*x.shape[:-1], left) if hold else x.new_zeros(*x.shape[:-1], left)
    joined = torch.cat((before, x), dim=-1)
    if memory is not None:
        memory[owner] = joined[..., joined.shape[-1] - left :]
    return joined


class _Stream:
    """What both kinds share: `push` samples, `finish` at the end; the model stays in evaluation mode."""

    def __init__(self, model: SeizureDetector) -> None:
        self.model = model
        parameter = next(model.parameters())
        self._waiting = parameter.new_zeros(model.config.channels, 0).detach()
        self._finished = False

    def _take(self, samples: Tensor) -> None:
        if self._finished:
            raise ValueError(message(_OP, "`push` must come before `finish`", "a stream that has ended"))
        channels = self.model.config.channels
        _check.dtypes(_OP, _check.REAL + _check.HALF, samples=samples)
        _check.shapes(_OP, samples=(samples, f"{channels} l"))
        self._waiting = torch.cat((self._waiting, samples.to(self._waiting)), dim=1)

    def _run(self, samples: Tensor, memory: Memory | None = None) -> Tensor:
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                return self.model.logits(samples[None], memory)[0]
        finally:
            self.model.train(training)


class CausalStream(_Stream):
    """Of a causal model; `latency` in samples is the most that a logit waits for."""

    def __init__(self, model: SeizureDetector) -> None:
        super().__init__(model)
        from stablekern.nn.tcn import DOWNSAMPLING

        self._frame = DOWNSAMPLING
        self.latency = DOWNSAMPLING * model.config.graph_stride
        self._memory: Memory = {}

    def push(self, samples: Tensor) -> Tensor:
        """(channels, n) samples, any n >= 0; returns the logits of the samples that are settled now, (m,)."""
        self._take(samples)
        return self._advance(self.latency)

    def finish(self) -> Tensor:
        """The logits of what is left of an unfinished block; up to 15 samples that fill no frame have none."""
        self._finished = True
        return self._advance(self._frame)

    def _advance(self, block: int) -> Tensor:
        ready = self._waiting.shape[1] // block * block
        if not ready:
            return self._waiting.new_zeros(0)
        samples, self._waiting = self._waiting[:, :ready], self._waiting[:, ready:].clone()
        return self._run(samples, self._memory)


class WindowStream(_Stream):
    """Of any model, by windows of `window` samples, one every `hop`; `latency` = `window`."""

    def __init__(self, model: SeizureDetector, window: int, hop: int) -> None:
        super().__init__(model)
        self.latency, self._hop = window, hop
        self._origin = 0  # the sample at which `_waiting` begins
        self._next = 0  # where the next window starts
        self._settled = 0  # samples whose logits are out
        self._sum = self._waiting.new_zeros(0)  # of the logits of the samples from `_settled` on
        self._count = self._waiting.new_zeros(0)

    def push(self, samples: Tensor) -> Tensor:
        """(channels, n) samples, any n >= 0; returns the logits of the samples that are settled now, (m,)."""
        self._take(samples)
        out = []
        while self._origin + self._waiting.shape[1] >= self._next + self.latency:
            self._add(self._next)
            self._next += self._hop
            out.append(self._settle(self._next))
            # The last window of all may start up to a hop before the next one would.
            kept = max(self._next - self._hop, self._origin)
            self._waiting, self._origin = self._waiting[:, kept - self._origin :].clone(), kept
        return torch.cat(out) if out else self._waiting.new_zeros(0)

    def finish(self) -> Tensor:
        """The logits of the rest, with one more window that ends with the signal, for the samples that are not out.

        ValueError if the signal is shorter than a window.
        """
        self._finished = True
        total = self._origin + self._waiting.shape[1]
        if total < self.latency:
            raise ValueError(message(_OP, f"a signal must hold at least one window of {self.latency} samples", total))
        if self._settled + self._sum.shape[0] < total:
            self._add(total - self.latency)
        return self._settle(total)

    def _add(self, start: int) -> None:
        logits = self._run(self._waiting[:, start - self._origin : start - self._origin + self.latency])
        end = start + self.latency
        grow = end - self._settled - self._sum.shape[0]
        self._sum, self._count = (nn.functional.pad(part, (0, grow)) for part in (self._sum, self._count))
        first = max(start, self._settled)
        self._sum[first - self._settled : end - self._settled] += logits[first - start :]
        self._count[first - self._settled : end - self._settled] += 1

    def _settle(self, until: int) -> Tensor:
        count = until - self._settled
        out = self._sum[:count] / self._count[:count]
        self._sum, self._count, self._settled = self._sum[count:], self._count[count:], until
        return out
