"""The graphs of a batch of windows."""

from __future__ import annotations

import functools

import torch

import stablekern
from bench import baselines
from bench.cases import Case

_NODES, _PAIRS, _STEPS = 19, 171, 4 * 960

CASES = (
    Case(
        "assemble_adjacency", "(4,171,960) top-3", lambda device: (torch.rand(4, 171, 960, device=device),),
        functools.partial(stablekern.assemble_adjacency, n_nodes=_NODES), "topk chain",
        functools.partial(baselines.assemble_topk, n=_NODES),
        # The least: the weights in, the graphs and one byte a weight out; the same again backward.
        _STEPS * 2.0 * _PAIRS, _STEPS * (4.0 * (_PAIRS + _NODES * _NODES) + _PAIRS), 2.0, {},
    ),
)  # fmt: skip
