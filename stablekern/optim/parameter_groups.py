"""Which parameters weight decay may shrink, decided by what they are and not by how they are called."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from stablekern import _check
from stablekern.errors import message

__all__ = ["parameter_groups"]

_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # batch and instance norms of any dimension, synchronised ones too
)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def _is_weight_norm_scale(module: nn.Module, name: str) -> bool:
    """The magnitude g of g v / |v|: `original0` of the parametrization, `weight_g` of the old hook."""
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return name == "original0" and isinstance(module[0], nn.utils.parametrizations._WeightNorm)
    return name.endswith("_g") and hasattr(module, f"{name[:-2]}_v")


def _exempt(module: nn.Module, name: str, parameter: nn.Parameter, decay_embeddings: bool) -> bool:
    return (
        isinstance(module, _NORMS)
        or getattr(module, "_no_weight_decay", False) is True
        or getattr(parameter, "_no_weight_decay", False) is True
        or parameter.dim() <= 1
        or name.startswith("bias")
        or name.endswith("bias")
        or name == "gamma"
        or _is_weight_norm_scale(module, name)
        or (not decay_embeddings and isinstance(module, _EMBEDDINGS))
    )


def parameter_groups(
    model: nn.Module, weight_decay: float, *, decay_embeddings: bool = True, verbose: bool = False
) -> list[dict[str, Any]]:
    """Split a model's parameters into one group with weight decay and one without.

    Decay pulls a weight towards 0; where 0 is no natural value (a norm's scale, a state-space model's log decay rate,
    a gate's bias) that is a drift, not a regularisation. A parameter is not decayed if, in any module that holds it,

    - the module is a norm of `torch.nn`, or has an attribute `_no_weight_decay = True` (for norms of your own), or
    - the parameter has an attribute `_no_weight_decay = True` (as `A_log`, `D` and `dt_bias` of Mamba do), or
    - it has at most one dimension (scales, gates, LayerScale), or is called `gamma`, whatever its shape, or
    - its name within the module begins or ends with `bias`, or
    - it is the magnitude of a weight norm (`original0` of the parametrization, `weight_g` of the old hook), or
    - it is the table of an embedding and `decay_embeddings` is false.

    Whole names are never searched for substrings: `subnet.norm_proj.weight` of a Linear is decayed.

    **Arguments:**

    - `model`: any module. Parameters with `requires_grad=False` are left out.
    - `weight_decay`: of the first group, a number >= 0.
    - `decay_embeddings`: whether embedding tables decay; one tied to an output layer counts as a table. Keyword only.
    - `verbose`: print which parameter went where, one line each, to the standard error. Keyword only.

    **Returns:** two groups for any `torch.optim` optimizer, decayed first, either may be empty: dicts with `params`,
    `weight_decay` and `names` (the parameters' names, in order). Each parameter stands in exactly one
    group, a shared one under its first name.

    **Raises:** `TypeError` if `model` is not a module; `ValueError` for a negative `weight_decay`, or a lazy module
    that has not seen an input yet.
    """
    where = "optim.parameter_groups"
    if not isinstance(model, nn.Module):
        raise TypeError(message(where, "`model` must be a torch.nn.Module", type(model).__name__))
    weight_decay = _check.number(where, "weight_decay", weight_decay, low=0.0)
    first_name: dict[nn.Parameter, str] = {}
    exempt: set[nn.Parameter] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            full_name = f"{path}.{name}" if path else name
            if is_lazy(parameter):
                raise ValueError(message(where, f"`{full_name}` has no shape yet: run the model once before grouping"))
            if parameter.requires_grad:
                first_name.setdefault(parameter, full_name)
                if _exempt(module, name, parameter, decay_embeddings):
                    exempt.add(parameter)
    groups = []
    for decay, members in (
        (weight_decay, [p for p in first_name if p not in exempt]),
        (0.0, [p for p in first_name if p in exempt]),
    ):
        groups.append({"params": members, "weight_decay": decay, "names": [first_name[p] for p in members]})
        for p in members if verbose else ():
            sys.stderr.write(f"{first_name[p]} {tuple(p.shape)}: weight decay {decay:g}\n")
    return groups
