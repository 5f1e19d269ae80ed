"""mamba_ssm's `Mamba` and `Mamba2` by this package's, models that hold them, and a stand-in for the whole library.

    stablekern.swap("mamba_ssm")
    from mamba_ssm import Mamba, Mamba2  # on any device, whether mamba_ssm is installed or not

    stablekern.swap(model)  # one that is made of theirs: the same parameters, the same state dict

Where mamba_ssm is installed its functions and classes are replaced where loaded modules hold them. Where it is not,
`mamba_ssm` and `causal_conv1d` become importable, with the modules and names in `_SHIM`; any other import from them
fails as it did. The functions are those of `stablekern.adapters.mamba_ssm`.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn

from stablekern._swap import SwapReport, known_version
from stablekern.adapters import mamba_ssm as functions
from stablekern.errors import message
from stablekern.nn import mamba, mamba2
from stablekern.nn.mamba_parts import MambaCache
from stablekern.nn.norms import RMSNormGated

__all__ = ["Mamba", "Mamba2"]

_VERSIONS = ("1.1", "1.2", "2.0", "2.1", "2.2", "2.3")
_SCAN, _SSD = "mamba_ssm.ops.selective_scan_interface", "mamba_ssm.ops.triton.ssd_combined"
_UPDATE, _CONV = "mamba_ssm.ops.triton.selective_state_update", "causal_conv1d.causal_conv1d_interface"


def _continued(block: Any, x: Tensor, inference_params: Any) -> MambaCache | None:
    """mamba_ssm keeps the states of a generation in its `inference_params`, by layer; at offset 0 it begins."""
    if inference_params is None:
        return None
    memory = inference_params.key_value_memory_dict
    if block.layer_idx not in memory:
        memory[block.layer_idx] = block.allocate_inference_cache(x.shape[0])
    cache = MambaCache(*memory[block.layer_idx])
    if inference_params.seqlen_offset == 0:
        cache.conv_state.zero_()
        cache.ssm_state.zero_()
    return cache


def _refuse(where: str, **wrong: Any) -> None:
    for name, value in wrong.items():
        if value:
            raise ValueError(message(f"adapters.mamba_ssm_modules.{where}", f"`{name}` is not available", value))


class Mamba(mamba.Mamba):
    """`stablekern.nn.Mamba` with the arguments of mamba_ssm's; `use_fast_path` changes nothing.

    **Raises:** `ValueError` for sizes below 1.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            dt_rank,
            dt_min=max(dt_min, dt_init_floor),
            dt_max=dt_max,
            dt_init=dt_init,
            dt_scale=dt_scale,
            conv_bias=conv_bias,
            bias=bias,
        )
        self.layer_idx, self.use_fast_path, self.activation = layer_idx, use_fast_path, "silu"
        self.to(device=device, dtype=dtype)

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        return super().forward(hidden_states, _continued(self, hidden_states, inference_params))


class Mamba2(mamba2.Mamba2):
    """`stablekern.nn.Mamba2` with the arguments of mamba_ssm's; `chunk_size` and `use_mem_eff_path` change nothing.

    **Raises:** `ValueError` for sizes that do not divide, and for what is not available: `d_ssm` other than all,
    `D_has_hdim`, no `rmsnorm`, `norm_before_gate`, `conv_init`, `bias`, no `conv_bias`, `process_group`; in `forward`
    for `seqlen`, `seq_idx` and `cu_seqlens`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        wrong = {"conv_init": conv_init, "D_has_hdim": D_has_hdim, "norm_before_gate": norm_before_gate, "bias": bias}
        part = d_ssm not in (None, expand * d_model)
        _refuse("Mamba2", **wrong, process_group=process_group, **{"d_ssm other than all": part})
        _refuse("Mamba2", **{"rmsnorm=False": not rmsnorm, "conv_bias=False": not conv_bias})
        super().__init__(
            d_model,
            d_state,
            d_conv,
            expand,
            headdim,
            ngroups,
            A_init_range=A_init_range,
            dt_min=max(dt_min, dt_init_floor),
            dt_max=dt_max,
            dt_limit=dt_limit,
        )
        self.layer_idx, self.chunk_size, self.activation = layer_idx, chunk_size, "silu"
        self.to(device=device, dtype=dtype)

    def forward(  # type: ignore[override]
        self, u: Tensor, seqlen: Any = None, seq_idx: Any = None, cu_seqlens: Any = None, inference_params: Any = None
    ) -> Tensor:
        for name, value in {"seqlen": seqlen, "seq_idx": seq_idx, "cu_seqlens": cu_seqlens}.items():
            _refuse("Mamba2", **{name: value is not None})
        return super().forward(u, _continued(self, u, inference_params))


_CLASSES = {"Mamba": Mamba, "Mamba2": Mamba2}
# What becomes importable: the module, and the names in it.
_SHIM: dict[str, dict[str, Any]] = {
    "mamba_ssm": {
        **_CLASSES,
        "mamba_inner_fn": functions.mamba_inner_fn,
        "selective_scan_fn": functions.selective_scan_fn,
    },
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": Mamba},
    "mamba_ssm.modules.mamba2": {"Mamba2": Mamba2},
    "mamba_ssm.ops": {},
    _SCAN: {"mamba_inner_fn": functions.mamba_inner_fn, "selective_scan_fn": functions.selective_scan_fn},
    "mamba_ssm.ops.triton": {},
    _SSD: {
        "mamba_chunk_scan_combined": functions.mamba_chunk_scan_combined,
        "mamba_split_conv1d_scan_combined": functions.mamba_split_conv1d_scan_combined,
    },
    _UPDATE: {"selective_state_update": functions.selective_state_update},
    "causal_conv1d": {
        "causal_conv1d_fn": functions.causal_conv1d_fn,
        "causal_conv1d_update": functions.causal_conv1d_update,
    },
    _CONV: {
        "causal_conv1d_fn": functions.causal_conv1d_fn,
        "causal_conv1d_update": functions.causal_conv1d_update,
    },
}
_INNER = (
    "xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B, C, D, "
    "delta_bias, B_proj_bias, C_proj_bias, delta_softplus"
)
_SPLIT = (
    "zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states, seq_idx, dt_limit, "
    "return_final_states, activation, rmsnorm_weight, rmsnorm_eps, outproj_weight, outproj_bias, headdim, ngroups, "
    "norm_before_gate"
)
_CHUNK = "x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx"
_SIGNATURES = {
    "selective_scan_fn": ("u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state",),
    "mamba_inner_fn": (
        _INNER,
        f"{_INNER}, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps",
    ),
    "mamba_chunk_scan_combined": (
        f"{_CHUNK}, dt_softplus, dt_limit, return_final_states",
        f"{_CHUNK}, cu_seqlens, dt_softplus, dt_limit, return_final_states, return_varlen_states",
    ),
    "mamba_split_conv1d_scan_combined": (_SPLIT,),
    "selective_state_update": (
        "state, x, dt, A, B, C, D, z, dt_bias, dt_softplus",
        "state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices",
    ),
    "causal_conv1d_fn": (
        "x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation",
    ),
    "causal_conv1d_update": (
        "x, conv_state, weight, bias, activation",
        "x, conv_state, weight, bias, activation, cache_seqlens, conv_state_indices",
    ),
    "Mamba": (
        "d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, dt_init, dt_scale, dt_init_floor, conv_bias, bias, "
        "use_fast_path, layer_idx, device, dtype",
    ),
    "Mamba2": (
        "d_model, d_state, d_conv, conv_init, expand, headdim, d_ssm, ngroups, A_init_range, D_has_hdim, rmsnorm, "
        "norm_before_gate, dt_min, dt_max, dt_init_floor, dt_limit, bias, conv_bias, chunk_size, use_mem_eff_path, "
        "layer_idx, process_group, sequence_parallel, device, dtype",
    ),
}


def _installed(library: str) -> bool:
    return library in sys.modules or importlib.util.find_spec(library) is not None


def _shim(report: SwapReport, library: str) -> None:
    made: dict[str, types.ModuleType] = {}
    for name, contents in _SHIM.items():
        if name.split(".")[0] != library:
            continue
        module = types.ModuleType(name, f"Made by stablekern.swap: {library} is not installed.")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []  # nothing further is found below it
        vars(module).update(contents)
        made[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    made[library].__version__ = "0+stablekern"  # type: ignore[attr-defined]
    for name, module in made.items():
        report.put(sys.modules, name, module)
        for attribute in _SHIM[name]:
            report.note(f"{name}.{attribute}", _SHIM[name][attribute], "importable now, not installed")


def _replace(report: SwapReport, library: str) -> None:
    version = getattr(importlib.import_module(library), "__version__", "without __version__")
    if library == "mamba_ssm":
        known_version(library, version, _VERSIONS)
    for module_name, contents in _SHIM.items():
        if module_name.split(".")[0] != library or not contents:
            continue
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            report.leave(module_name, f"it cannot be imported ({error})")
            continue
        for attribute, stand_in in contents.items():
            name, original = f"{module_name}.{attribute}", getattr(module, attribute, None)
            if original is None:
                report.leave(name, f"{library} {version} does not have it")
            elif original is stand_in:
                if not any(stand_in.__qualname__ == entry.by.rpartition(".")[2] for entry in report.swapped):
                    report.leave(name, "swapped already")
            elif report.fits(name, original, _SIGNATURES[attribute]):
                report.everywhere(name, original, stand_in)


def swap_library(report: SwapReport) -> None:
    for library in ("mamba_ssm", "causal_conv1d"):
        if not _installed(library):
            _shim(report, library)
        elif getattr(sys.modules.get(library), "__version__", "") == "0+stablekern":
            report.leave(library, "swapped already")
        else:
            _replace(report, library)


def swap_class(report: SwapReport, cls: type) -> bool:
    stand_in = _CLASSES.get(cls.__name__)
    if stand_in is None or cls.__module__.split(".")[0] != "mamba_ssm":
        return False
    name = f"{cls.__module__}.{cls.__name__}"
    if report.fits(name, cls.__init__, _SIGNATURES[cls.__name__]):  # type: ignore[misc]
        report.everywhere(name, cls, stand_in)
    return True


def swap_layer(report: SwapReport, module: nn.Module, label: str) -> bool:
    """A `Mamba` or `Mamba2` of mamba_ssm becomes ours where it is, with the parameters that it has."""
    cls = type(module)
    if isinstance(module, (Mamba, Mamba2)):
        report.leave(label, "swapped already")
        return True
    if cls.__name__ not in _CLASSES or cls.__module__.split(".")[0] != "mamba_ssm":
        return False
    if not report.fits(label, cls.__init__, _SIGNATURES[cls.__name__]):
        return True
    if cls.__name__ == "Mamba":
        report.retype(module, Mamba, state_clamp=None)
    else:
        wrong = [
            name
            for name, found in {
                "a process group": module.process_group is not None,
                "d_ssm less than all": module.d_ssm != module.d_inner,
                "D_has_hdim": module.D_has_hdim,
                "no rmsnorm": not module.rmsnorm,
                "norm_before_gate": module.norm_before_gate,
            }.items()
            if found
        ]
        if wrong:
            report.leave(label, f"it has {', '.join(wrong)}")
            return True
        report.retype(module.norm, RMSNormGated, dim=module.d_inner, groups=module.ngroups)
        report.retype(module, Mamba2, state_clamp=None, _states=module.ngroups * module.d_state)  # type: ignore[operator]
    report.note(label, _CLASSES[cls.__name__], "the same parameters")
    return True
