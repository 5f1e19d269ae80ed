"""Models of transformers with their own mixers and with ours: the same weights, logits and gradients."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

import stablekern.nn as snn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of a library that we do not own, while it is imported
    transformers = pytest.importorskip("transformers", reason="`make test` installs it; the comparison needs it")

TOLERANCE = 1e-4  # of the largest entry: float32 sums in another order, through two layers


class _Mamba(snn.Mamba):
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **_):
        return super().forward(hidden_states)


class _Mamba2(snn.Mamba2):
    def forward(self, hidden_states, cache_params=None, attention_mask=None, **_):
        return super().forward(hidden_states)


SHARED = {"vocab_size": 40, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "use_cache": False}
MODELS = {
    "mamba": lambda: (
        transformers.MambaForCausalLM(transformers.MambaConfig(**SHARED, use_mambapy=False)),
        lambda: _Mamba(32, d_state=4),
    ),
    "mamba2": lambda: (
        transformers.Mamba2ForCausalLM(
            transformers.Mamba2Config(**SHARED, num_heads=8, head_dim=8, n_groups=2, chunk_size=8)
        ),
        lambda: _Mamba2(32, d_state=4, headdim=8, ngroups=2),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_our_mixers_in_their_model(name):
    theirs, mixer = MODELS[name]()
    for parameter in theirs.parameters():  # their initial values leave many of them at 0 or 1, where little shows
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 and parameter.shape[1] > 1 else None
    ours = copy.deepcopy(theirs)
    for layer in ours.backbone.layers:
        replacement = mixer()
        replacement.load_state_dict(layer.mixer.state_dict(), strict=True)
        layer.mixer = replacement
    tokens = torch.randint(0, 40, (2, 21))
    results = []
    for model in (theirs, ours):
        out = model(input_ids=tokens, labels=tokens)
        out.loss.backward()
        results.append((out.logits.detach(), {name: p.grad for name, p in model.named_parameters()}))
    (logits, grads), (our_logits, our_grads) = results
    assert our_grads.keys() == grads.keys()
    assert (our_logits - logits).abs().max() <= TOLERANCE * logits.abs().max()
    assert logits.std() > 0.05
    for key, grad in grads.items():
        assert grad.abs().max() > 0, key
        assert (our_grads[key] - grad).abs().max() <= TOLERANCE * grad.abs().max(), key
