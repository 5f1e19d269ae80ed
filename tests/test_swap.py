"""`swap`: the libraries themselves and small modules with the codebases' names compute the same before and after."""

from __future__ import annotations

import copy
import importlib
import sys
import types
import warnings

import pytest
import torch
from torch import Tensor, nn

import stablekern
import stablekern.nn as snn
from slow_mamba import slow_mamba, slow_mamba2
from stablekern import _swap
from stablekern.errors import SwapError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of libraries that we do not own, while they are imported
    transformers = pytest.importorskip("transformers", reason="`make test` installs it")
    pyg = pytest.importorskip("torch_geometric.transforms", reason="`make test` installs it")
    linear_operator = pytest.importorskip("linear_operator", reason="`make test` installs it")
    from torch_geometric.data import Data

MODELING = tuple(f"transformers.models.{name}.modeling_{name}" for name in ("mamba", "mamba2"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in MODELING:
        importlib.import_module(_name)
DOUBLE = {"dtype": torch.float64}
# Under other names than their own, so that no swap reaches them.
THEIRS = {"eigh": torch.linalg.eigh, "eigvalsh": torch.linalg.eigvalsh, "AdamW": torch.optim.AdamW}
AGREE = 1e-4  # of the largest entry: float32 sums in another order, through two layers


def identities() -> dict[str, object]:
    """Every global of every loaded module of the libraries that are swapped here, by object identity."""
    tops = ("torch.linalg", "torch.optim", "torch_geometric.transforms", *MODELING, __name__)
    return {
        f"{name}.{key}": id(value)
        for name, module in list(sys.modules.items())
        if name.startswith(tops)
        for key, value in vars(module).items()
    }


# ---- torch.linalg ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@pytest.mark.parametrize("n", [3, 19, 40])
def test_torch_linalg(dtype, n):
    A = torch.randn(4, n, n, dtype=dtype)
    A = A + A.mH + torch.diag(4.0 * torch.arange(n)).to(dtype)
    before = identities()
    with stablekern.swap("torch.linalg") as report:
        assert torch.linalg.eigh is not THEIRS["eigh"]
        results = []
        for module, eigh, eigvalsh in (
            ("ours", torch.linalg.eigh, torch.linalg.eigvalsh), ("torch", THEIRS["eigh"], THEIRS["eigvalsh"])
        ):  # fmt: skip
            leaf = A.clone().requires_grad_()
            w, V = eigh(leaf, "U")
            P = V[..., :2] @ V[..., :2].mH  # as every loss with a gradient, it does not see the phases
            loss = (P.abs().square() * torch.arange(n)).sum() + w.square().sum() + eigvalsh(leaf).pow(3).sum()
            results.append((w.detach(), P.detach(), torch.autograd.grad(loss, leaf)[0]))
            assert w.shape == (4, n), module
        triangles = torch.randn(4, n, n, dtype=dtype)  # the two hold different matrices
        for uplo in ("L", "U", "l", "u"):
            both = THEIRS["eigvalsh"](triangles, uplo), THEIRS["eigh"](triangles, UPLO=uplo)[0]
            ours = torch.linalg.eigvalsh(triangles, uplo), torch.linalg.eigh(triangles, UPLO=uplo)[0]
            tolerance = 20 * n * torch.finfo(dtype).eps * float(both[0].abs().max())
            torch.testing.assert_close(ours, both, rtol=0, atol=tolerance)
    for ours, theirs in zip(*results, strict=True):
        eps = torch.finfo(dtype).eps
        assert (ours - theirs).abs().max() <= 200 * n * eps * theirs.abs().max()
    assert identities() == before and not report.active
    assert {entry.name for entry in report.swapped} == {"torch.linalg.eigh", "torch.linalg.eigvalsh"}
    assert report.fell_through == {}


def test_torch_linalg_stays_finite_where_torch_does_not():
    A = torch.eye(4, **DOUBLE).requires_grad_()
    loss = lambda: (torch.linalg.eigh(A).eigenvectors * torch.arange(16.0).view(4, 4)).sum()  # noqa: E731
    assert not torch.isfinite(torch.autograd.grad(loss(), A)[0]).all()
    with stablekern.swap("torch.linalg"):
        assert torch.isfinite(torch.autograd.grad(loss(), A)[0]).all()


def test_what_falls_through_is_torch_and_counted():
    A = torch.randn(3, 5, 5)
    A = A + A.mT
    expected = THEIRS["eigh"](A)
    with stablekern.swap("torch.linalg") as report:
        out = torch.empty(3, 5), torch.empty(3, 5, 5)
        torch.linalg.eigh(A, out=out)
        assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
        torch.testing.assert_close(torch.func.vmap(torch.linalg.eigvalsh)(A), expected[0])
        tangent = torch.func.jvp(torch.linalg.eigvalsh, (A,), (torch.eye(5).expand(3, 5, 5),))[1]
        torch.testing.assert_close(tangent, torch.ones(3, 5))
        with pytest.raises(RuntimeError, match="must be batches of square matrices"):
            torch.linalg.eigh(A[:, :4])
        with pytest.raises(RuntimeError, match="[Hh]alf"):
            torch.linalg.eigvalsh(A.half())
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(A, torch.ones_like(A))
            assert torch.autograd.forward_ad.unpack_dual(torch.linalg.eigvalsh(dual)).tangent is not None
        counts = report.fell_through
    assert counts["torch.linalg.eigh: `out=` is given"] == 1
    assert sum(counts.values()) == 6, counts
    assert "1 x torch.linalg.eigh: `out=` is given" in str(report)


def test_torch_linalg_compiles_and_does_not_call_itself():
    A = torch.randn(3, 5, 5)
    A = A + A.mT
    with stablekern.swap("torch.linalg"):
        torch.compiler.reset()
        compiled = torch.compile(lambda A: torch.linalg.eigh(A), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(A)[0], THEIRS["eigvalsh"](A))
        with stablekern.use_backend("torch"):
            torch.testing.assert_close(torch.linalg.eigh(A)[0], THEIRS["eigvalsh"](A))
    torch.compiler.reset()


def test_linear_operator_decomposes_with_ours(monkeypatch):
    A = torch.randn(6, 6)
    operator = linear_operator.to_linear_operator(A @ A.mT + 6 * torch.eye(6))
    calls = []
    real = stablekern.adapters.torch_linalg._eigh
    monkeypatch.setattr(stablekern.adapters.torch_linalg, "_eigh", lambda *a: calls.append(a) or real(*a))
    root = operator.root_decomposition(method="symeig").to_dense()
    with stablekern.swap("torch.linalg"):
        fresh = linear_operator.to_linear_operator(operator.to_dense())
        ours = fresh.root_decomposition(method="symeig").to_dense()
        values = torch.linalg.eigh(fresh)[0]  # an object of their class: it goes to their implementation
    assert len(calls) >= 1
    torch.testing.assert_close(ours, root, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, THEIRS["eigvalsh"](operator.to_dense()), rtol=1e-4, atol=1e-4)


def test_names_that_were_imported_before_are_swapped_too():
    user = types.ModuleType("a_users_module")
    user.eigh, user.kept = THEIRS["eigh"], THEIRS["eigh"]
    sys.modules["a_users_module"] = user
    try:
        with stablekern.swap("torch.linalg") as report:
            assert user.eigh is torch.linalg.eigh and user.kept is THEIRS["eigh"]
            assert "also a_users_module.eigh" in str(report)
        assert user.eigh is THEIRS["eigh"]
        with stablekern.swap("a_users_module") as report:
            assert user.eigh is user.kept is stablekern.adapters.torch_linalg.eigh
            assert torch.linalg.eigh is THEIRS["eigh"]
        assert user.eigh is user.kept is THEIRS["eigh"]
    finally:
        del sys.modules["a_users_module"]


# ---- the report ------------------------------------------------------------------------------------------------------


def test_nested_swaps_restore_what_they_found():
    before = identities()
    with stablekern.swap("torch.linalg") as outer:
        inside = identities()
        with stablekern.swap("torch.linalg") as inner, stablekern.swap("torch.optim"):
            assert not inner.swapped and [entry.reason for entry in inner.left][:2] == ["swapped already"] * 2
        assert identities() == inside and outer.active
    assert identities() == before
    outer.restore()  # twice is once
    assert identities() == before


def test_swaps_that_overlap_are_restored_in_the_opposite_order(monkeypatch):
    first = stablekern.swap("torch.linalg")
    stand_in = torch.linalg.eigh
    torch.linalg.eigh = THEIRS["eigh"]
    with pytest.raises(RuntimeError, match=r"a later change is in the way, .* got torch.linalg.eigh$"):
        first.restore()
    assert torch.linalg.eigvalsh is not THEIRS["eigvalsh"]  # nothing was half restored
    torch.linalg.eigh = stand_in
    first.restore()
    assert torch.linalg.eigvalsh is THEIRS["eigvalsh"]


def test_a_report_says_what_and_why():
    with stablekern.swap("torch.linalg") as report:
        plain = report.as_dict()
    assert plain["active"] and plain["target"] == "'torch.linalg'"
    assert plain["swapped"][0]["by"] == "stablekern.adapters.torch_linalg.eigh"
    assert any("svd" in entry["name"] and entry["reason"] for entry in plain["left"])
    text = str(report)
    assert "(restored)" in text and "torch.linalg.eigh" in text and "left as it was" in text
    assert repr(report) == "<SwapReport 'torch.linalg': 2 swapped, 3 left>"


@pytest.mark.parametrize("target", ["no.such.library", "torch.linalg.no_such", 3, nn.Linear(2, 2), nn.Linear, "json"])
def test_a_bad_target_is_refused(target):
    before = identities()
    with pytest.raises(SwapError, match=r"stablekern.swap: `target` must be one of .*'torch.linalg'"):
        stablekern.swap(target)
    assert identities() == before


def test_other_versions_and_signatures_are_refused(monkeypatch):
    monkeypatch.setattr("torch_geometric.__version__", "9.1.0")
    with pytest.raises(SwapError, match=r"of torch_geometric the versions 2.6, 2.7, 2.8 are known: got 9.1.0"):
        stablekern.swap("torch_geometric")
    adapter = importlib.import_module("stablekern.adapters.transformers_mamba")
    monkeypatch.setattr(adapter.transformers, "__version__", "6.0.0")
    before = identities()
    with pytest.raises(SwapError, match=r"of transformers the versions 5.23 are known: got 6.0.0"):
        stablekern.swap("transformers")
    assert identities() == before
    monkeypatch.setitem(sys.modules, "stablekern.adapters.transformers_mamba", None)  # as if it were not installed
    with pytest.raises(SwapError, match="transformers must be installed, in a version that is known: got "):
        stablekern.swap("transformers")
    other = types.ModuleType("other")
    other.small_cayley = min
    with pytest.raises(SwapError, match=r"its parameters \(not to be read\)"):
        stablekern.swap(other)
    del other.small_cayley
    other.cg_solve = lambda matrix, rhs: rhs
    with pytest.raises(SwapError, match=r"its parameters \(matrix, rhs\) are not those .* \(A, b, max_iter, tol\)"):
        stablekern.swap(other)


# ---- transformers ----------------------------------------------------------------------------------------------------

SHARED = {"vocab_size": 40, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}
MODELS = {
    "mamba": lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SHARED)),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(**SHARED, num_heads=8, head_dim=8, n_groups=2, chunk_size=8)
    ),
}


def healthy(make) -> nn.Module:
    model = make()
    for parameter in model.parameters():  # the initial values leave many of them at 0 or 1, where little shows
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 and parameter.shape[1] > 1 else None
    return model


def computed(model: nn.Module, tokens: Tensor, **inputs: Tensor):
    model.zero_grad()
    out = model(input_ids=tokens, labels=tokens, **inputs)
    out.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        generated = model.generate(
            tokens[:, :7], max_new_tokens=9, do_sample=False, use_cache=True,
            attention_mask=torch.ones_like(tokens[:, :7]),
        )  # fmt: skip
    return out.logits.detach(), grads, generated


def agree(ours, theirs) -> None:
    assert (ours[0] - theirs[0]).abs().max() <= AGREE * theirs[0].abs().max()
    for name, grad in theirs[1].items():
        assert grad.abs().max() > 0, name
        assert (ours[1][name] - grad).abs().max() <= AGREE * grad.abs().max(), name
    assert torch.equal(ours[2], theirs[2])  # the very tokens


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, train, monkeypatch):
    model, tokens = healthy(MODELS[name]).train(train), torch.randint(1, 40, (2, 21))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    theirs = computed(model, tokens, attention_mask=mask)
    names, objects = list(model.state_dict()), [id(p) for p in model.parameters()]
    calls = []
    op = {"mamba": "selective_scan", "mamba2": "ssd_scan"}[name]
    adapter = importlib.import_module("stablekern.adapters.mamba_ssm")
    real = getattr(adapter, op)
    monkeypatch.setattr(adapter, op, lambda *a, **k: calls.append(op) or real(*a, **k))
    with stablekern.swap(model) as report:
        assert list(model.state_dict()) == names and [id(p) for p in model.parameters()] == objects
        agree(computed(model, tokens, attention_mask=mask), theirs)
        with stablekern.swap(model) as second:
            assert not second.swapped and [entry.reason for entry in second.left] == ["swapped already"] * 2
    assert len(calls) == 4 and len(report.swapped) == 2  # 2 layers, a forward and a prefill
    assert not any("forward" in vars(module) for module in model.modules())
    again = computed(model, tokens, attention_mask=mask)
    assert torch.equal(again[0], theirs[0]) and len(calls) == 4


@pytest.mark.parametrize("name", MODELS)
def test_all_models_of_transformers(name):
    model, tokens = healthy(MODELS[name]), torch.randint(1, 40, (2, 13))
    theirs = computed(model, tokens)
    before = identities()
    with stablekern.swap("transformers") as report:
        agree(computed(model, tokens), theirs)
        with stablekern.swap("transformers") as second:
            assert not second.swapped
    assert identities() == before
    assert len(report.swapped) == 10


def test_a_mixer_with_a_forward_of_its_own_is_left():
    model = MODELS["mamba"]()
    first = model.backbone.layers[0].mixer
    first.forward = types.MethodType(type(first).forward, first)  # as accelerate's hooks do
    with stablekern.swap(model) as report:
        assert len(report.swapped) == 1 and "it has a forward of its own" in str(report)


def test_what_transformers_keeps_is_counted():
    model = healthy(lambda: transformers.MambaForCausalLM(transformers.MambaConfig(**SHARED, hidden_act="gelu")))
    tokens = torch.randint(1, 40, (2, 9))
    theirs = computed(model, tokens)
    with stablekern.swap(model) as report:
        agree(computed(model, tokens), theirs)
    assert report.fell_through["transformers causal_conv1d_fn: activation 'gelu'"] == 4


def test_a_swapped_model_compiles():
    model, tokens = healthy(MODELS["mamba"]).eval(), torch.randint(1, 40, (2, 9))
    mixer, x = model.backbone.layers[0].mixer, torch.randn(2, 9, 32)
    theirs = mixer(x)
    with stablekern.swap(model), torch.no_grad():
        torch.compiler.reset()
        graphs: list[torch.fx.GraphModule] = []
        compiled = torch.compile(mixer.forward, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
        torch.testing.assert_close(compiled(x), theirs.detach(), rtol=1e-4, atol=1e-5)
        nodes = [n for graph in graphs for m in graph.modules() if hasattr(m, "graph") for n in m.graph.nodes]
        assert any("stablekern.selective_scan_fwd" in str(node.target) for node in nodes)  # not their loop
        agree(computed_without_grad(model, tokens), computed_without_grad(model, tokens))
    torch.compiler.reset()


def computed_without_grad(model: nn.Module, tokens: Tensor):
    return model(input_ids=tokens).logits, {}, tokens


# ---- mamba_ssm -------------------------------------------------------------------------------------------------------


def test_mamba_ssm_is_importable_where_it_is_not_installed():
    if importlib.util.find_spec("mamba_ssm") is not None:
        pytest.skip("mamba_ssm is installed")
    with stablekern.swap("mamba_ssm") as report:
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm import Mamba, Mamba2
        from mamba_ssm.modules.mamba2 import Mamba2 as same
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        assert same is Mamba2 and importlib.util.find_spec("mamba_ssm") is not None
        assert selective_scan_fn is stablekern.adapters.mamba_ssm.selective_scan_fn
        assert {causal_conv1d_fn, selective_state_update, mamba_chunk_scan_combined}
        with pytest.raises(ImportError):
            from mamba_ssm.utils.generation import GenerationMixin  # noqa: F401
        one, two = Mamba(8, d_state=4, layer_idx=0).double(), Mamba2(8, d_state=4, headdim=4, layer_idx=1).double()
        x = torch.randn(2, 6, 8, **DOUBLE)
        torch.testing.assert_close(one(x), slow_mamba(one, x))
        torch.testing.assert_close(two(x), slow_mamba2(two, x))
        params = types.SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0)
        for block in (one, two):  # prefill, then step by step
            with torch.no_grad():
                for _ in range(2):  # a second generation starts afresh
                    params.seqlen_offset = 0
                    parts = [block(x[:, :3], inference_params=params)]
                    for t in range(3, 6):
                        params.seqlen_offset = t
                        parts.append(block(x[:, t : t + 1], inference_params=params))
                    torch.testing.assert_close(torch.cat(parts, 1), block(x))
        with pytest.raises(ValueError, match="`norm_before_gate` is not available"):
            Mamba2(8, headdim=4, norm_before_gate=True)
        with stablekern.swap("mamba_ssm") as second:
            assert not second.swapped
        assert "importable now, not installed" in str(report)
    assert not [name for name in sys.modules if name.split(".")[0] in ("mamba_ssm", "causal_conv1d")]
    assert importlib.util.find_spec("mamba_ssm") is None


class _Norm(nn.Module):  # mamba_ssm's gated norm, as far as it is used
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(size) + 0.5), 1e-5


def _installed(name: str) -> types.ModuleType:
    """A small mamba_ssm with its names and signatures, and the mathematics of the slow loops."""

    class Mamba(nn.Module):
        def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank="auto", dt_min=0.001, dt_max=0.1,
                     dt_init="random", dt_scale=1.0, dt_init_floor=1e-4, conv_bias=True, bias=False,
                     use_fast_path=True, layer_idx=None, device=None, dtype=None):  # fmt: skip
            super().__init__()
            like = snn.Mamba(d_model, d_state)
            for key, value in vars(like).items():
                vars(self)[key] = value
            del self.state_clamp
            self.layer_idx, self.activation = layer_idx, "silu"

        def forward(self, hidden_states, inference_params=None):
            return slow_mamba(self, hidden_states)

    class Mamba2(nn.Module):
        def __init__(self, d_model, d_state=128, d_conv=4, conv_init=None, expand=2, headdim=64, d_ssm=None,
                     ngroups=1, A_init_range=(1, 16), D_has_hdim=False, rmsnorm=True, norm_before_gate=False,
                     dt_min=0.001, dt_max=0.1, dt_init_floor=1e-4, dt_limit=(0.0, float("inf")), bias=False,
                     conv_bias=True, chunk_size=256, use_mem_eff_path=True, layer_idx=None, process_group=None,
                     sequence_parallel=True, device=None, dtype=None):  # fmt: skip
            super().__init__()
            like = snn.Mamba2(d_model, d_state, d_conv, expand, headdim, ngroups)
            for key, value in vars(like).items():
                vars(self)[key] = value
            del self.state_clamp, self._states
            self.norm, self.d_ssm, self.D_has_hdim = _Norm(self.d_inner), d_ssm or self.d_inner, D_has_hdim
            self.rmsnorm, self.norm_before_gate, self.process_group = rmsnorm, norm_before_gate, process_group
            self.layer_idx, self.activation = layer_idx, "silu"

        def forward(self, u, seqlen=None, seq_idx=None, cu_seqlens=None, inference_params=None):
            return slow_mamba2(self, u)

    for cls in (Mamba, Mamba2):
        cls.__module__, cls.__qualname__ = f"{name}.modules", cls.__name__
    library = types.ModuleType(name)
    library.__version__, library.__path__ = "2.2.4", []
    library.Mamba, library.Mamba2 = Mamba, Mamba2
    library.selective_scan_fn = lambda u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, \
        return_last_state=False: "theirs"  # fmt: skip
    library.mamba_inner_fn = lambda xz, weights: "a version that nobody knows"
    return library


@pytest.fixture
def installed(monkeypatch):
    library = _installed("mamba_ssm")
    monkeypatch.setitem(sys.modules, "mamba_ssm", library)
    return library


def test_a_model_of_mamba_ssm_is_converted_in_place(installed):
    model = nn.Sequential(installed.Mamba(8, d_state=4), installed.Mamba2(8, d_state=4, headdim=4, ngroups=2)).double()
    x = torch.randn(2, 5, 8, **DOUBLE)
    theirs = model(x)
    grads = torch.autograd.grad(theirs.square().sum(), list(model.parameters()))
    objects, keys = [id(p) for p in model.parameters()], list(model.state_dict())
    classes, attributes = [type(m) for m in model.modules()], [set(vars(m)) for m in model.modules()]
    with stablekern.swap(model) as report:
        assert isinstance(model[0], snn.Mamba) and isinstance(model[1], snn.Mamba2)
        assert [id(p) for p in model.parameters()] == objects and list(model.state_dict()) == keys
        ours = model(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        again = torch.autograd.grad(ours.square().sum(), list(model.parameters()))
        torch.testing.assert_close(again, grads, rtol=1e-8, atol=1e-10)
        assert copy.deepcopy(model)(x).equal(ours)
    assert [type(m) for m in model.modules()] == classes and [set(vars(m)) for m in model.modules()] == attributes
    assert len(report.swapped) == 2
    odd = nn.Sequential(installed.Mamba(8), installed.Mamba2(8, headdim=4, rmsnorm=False))
    with stablekern.swap(odd) as report:
        assert [entry.name for entry in report.swapped] == ["Sequential.0"]
        assert "Sequential.1: it has no rmsnorm" in str(report)


def test_an_installed_mamba_ssm_is_replaced_name_by_name(installed):
    theirs = installed.Mamba, installed.selective_scan_fn
    with stablekern.swap("mamba_ssm") as report:
        assert issubclass(installed.Mamba, snn.Mamba)
        assert installed.selective_scan_fn is stablekern.adapters.mamba_ssm.selective_scan_fn
        reasons = {entry.name: entry.reason for entry in report.left}
        assert "its parameters (xz, weights) are not those" in reasons["mamba_ssm.mamba_inner_fn"]
    assert (installed.Mamba, installed.selective_scan_fn) == theirs
    with stablekern.swap(installed.Mamba2):
        assert issubclass(installed.Mamba2, snn.Mamba2)
    installed.__version__ = "3.0.0"
    with pytest.raises(SwapError, match=r"of mamba_ssm the versions 1.1, .*, 2.3 are known: got 3.0.0"):
        stablekern.swap("mamba_ssm")


# ---- PyTorch Geometric -----------------------------------------------------------------------------------------------


def graph(n: int, weighted: bool, seed: int = 0) -> Data:
    g = torch.Generator().manual_seed(seed)
    upper = (torch.rand(n, n, generator=g) < 0.5).triu(1)
    weights = torch.rand(n, n, generator=g).triu(1) * upper
    weights, both = weights + weights.mT, upper | upper.mT
    weights[0, 0], both[0, 0] = 0.7, True  # a self-loop, which the encoding leaves out
    index = both.nonzero().mT
    return Data(edge_index=index, edge_weight=weights[index[0], index[1]] if weighted else None, num_nodes=n)


def gap(data: Data) -> float:
    """The least distance between the six lowest eigenvalues of the graph."""
    dense = torch.zeros(data.num_nodes, data.num_nodes, **DOUBLE)
    dense[data.edge_index[0], data.edge_index[1]] = 1.0 if data.edge_weight is None else data.edge_weight.double()
    dense.fill_diagonal_(0.0)
    return float(THEIRS["eigvalsh"](stablekern.normalized_laplacian(dense))[:6].diff().min())


@pytest.mark.parametrize("undirected", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_positional_encodings_of_pyg(weighted, undirected):
    transform = pyg.AddLaplacianEigenvectorPE(4, is_undirected=undirected)
    both = pyg.Compose([transform, pyg.AddLaplacianEigenvectorPE(2, attr_name="second")])
    before = identities()
    for seed, n in enumerate((7, 19, 120)):
        data = graph(n, weighted, seed)
        theirs = transform(data).laplacian_eigenvector_pe
        with stablekern.swap(both) as report:
            result = both(data)
            assert len(report.swapped) == 2 and not report.fell_through
        ours = result.laplacian_eigenvector_pe
        assert ours.dtype == theirs.dtype and result.second.shape == (n, 2)
        sign = torch.where((ours * theirs).sum(0) < 0, -1.0, 1.0)
        # An eigenvector turns by the error of the matrix, some n eps, over the gap to the nearest eigenvalue.
        torch.testing.assert_close(ours * sign, theirs, rtol=0, atol=n * torch.finfo(ours.dtype).eps / gap(data))
        with stablekern.swap("torch_geometric"):
            made = pyg.AddLaplacianEigenvectorPE(4, is_undirected=undirected)
        assert torch.equal(made(data).laplacian_eigenvector_pe, ours)
    assert identities() == before and type(transform) is pyg.AddLaplacianEigenvectorPE


def test_encodings_of_degenerate_graphs_are_deterministic():
    ring = torch.arange(6)
    index = torch.stack((torch.cat((ring, ring.roll(1))), torch.cat((ring.roll(1), ring))))
    two_rings = torch.cat((index, index + 6), 1)
    for data in (Data(edge_index=index, num_nodes=6), Data(edge_index=two_rings, num_nodes=13)):
        transform = pyg.AddLaplacianEigenvectorPE(4, is_undirected=True)
        with stablekern.swap(transform):
            first, second = (transform(data).laplacian_eigenvector_pe for _ in range(2))
        assert torch.equal(first, second) and torch.isfinite(first).all()
        dense = torch.zeros(data.num_nodes, data.num_nodes, **DOUBLE)
        dense[data.edge_index[0], data.edge_index[1]] = 1.0
        L = stablekern.normalized_laplacian(dense)
        values = THEIRS["eigvalsh"](L)[1:5]
        torch.testing.assert_close(L @ first.double(), first.double() * values, rtol=0, atol=1e-6)
        torch.testing.assert_close(first.mT @ first, torch.eye(4), rtol=0, atol=1e-6)


def test_what_pyg_keeps_is_counted():
    directed = Data(edge_index=torch.tensor([[0, 1, 2, 0, 3, 1], [1, 2, 0, 3, 2, 3]]), num_nodes=4)
    transform = pyg.AddLaplacianEigenvectorPE(2)
    with stablekern.swap(transform) as report:
        theirs = transform(directed)
    assert theirs.laplacian_eigenvector_pe.shape == (4, 2)
    assert report.fell_through == {"AddLaplacianEigenvectorPE: a directed graph": 1}

    class Derived(pyg.AddLaplacianEigenvectorPE):
        pass

    with pytest.raises(SwapError, match="a class derived from it"):
        stablekern.swap(Derived(2))


# ---- torch.optim -----------------------------------------------------------------------------------------------------


def stepped(make, *, swap_at: int | None = None, restore_at: int | None = None) -> list[Tensor]:
    """Twelve steps of a small model whose gradients depend on its weights, under a scheduler."""
    torch.manual_seed(3)
    parameters = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, dtype=torch.complex64))]
    optimizer = make([{"params": parameters[:1], "lr": 0.02}, {"params": parameters[1:], "weight_decay": 0.3}])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    report = None
    for step in range(12):
        if step == swap_at:
            report = stablekern.swap(optimizer)
            assert isinstance(optimizer, stablekern.optim.ComplexAdamW)
        if step == restore_at:
            report.restore()
            assert type(optimizer) is THEIRS["AdamW"] and "coupled" not in optimizer.param_groups[0]
        optimizer.zero_grad()
        sum((p.abs().square() * torch.arange(p.shape[-1])).sum() for p in parameters).backward()
        optimizer.step()
        scheduler.step()
    return [p.detach().clone() for p in parameters]


def options(**more):
    return lambda params: torch.optim.AdamW(params, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1, **more)


@pytest.mark.parametrize("more", [{}, {"amsgrad": True}, {"maximize": True}, {"foreach": True}], ids=str)
def test_adamw_takes_the_same_steps(more):
    theirs = stepped(options(**more))
    with stablekern.swap("torch.optim") as report:
        ours = stepped(options(**more))
        assert issubclass(torch.optim.AdamW, stablekern.optim.ComplexAdamW)
        assert sys.modules["torch.optim.adamw"].AdamW is torch.optim.AdamW
    assert torch.optim.AdamW is sys.modules["torch.optim.adamw"].AdamW is THEIRS["AdamW"]
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)
    assert report.swapped[0].name == "torch.optim.AdamW"
    with stablekern.swap(torch.optim.AdamW):
        assert torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=True).defaults["lr"] == 1e-3
        torch.testing.assert_close(stepped(options(**more)), theirs, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(("swap_at", "restore_at"), [(0, None), (5, None), (0, 7), (4, 9), (4, 4)])
def test_an_optimizer_goes_on_with_its_state(swap_at, restore_at):
    make = options(amsgrad=True)
    theirs, ours = stepped(make), stepped(make, swap_at=swap_at, restore_at=restore_at)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-6)


def test_a_restored_optimizer_is_what_it_was():
    p = nn.Parameter(torch.randn(4))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.randn(4)
    optimizer.step()
    before, group = copy.deepcopy(optimizer.state_dict()), optimizer.param_groups[0]
    moments = optimizer.state[p]["exp_avg"]
    with stablekern.swap(optimizer):
        pass
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"] and optimizer.param_groups[0] is group
    assert optimizer.state[p]["exp_avg"] is moments and type(optimizer) is THEIRS["AdamW"]
    for key, value in before["state"][0].items():
        assert torch.equal(after["state"][0][key], value) and after["state"][0][key].dtype == value.dtype


def test_optimizers_without_a_stand_in_are_refused():
    p = nn.Parameter(torch.randn(4))
    with pytest.raises(SwapError, match="only AdamW itself has a stand-in: got Adam"):
        stablekern.swap(torch.optim.Adam([p]))
    for wrong in ({"differentiable": True}, {"eps": 0.0}):
        optimizer = torch.optim.AdamW([p], **wrong)
        with pytest.raises(SwapError, match="stand-in"):
            stablekern.swap(optimizer)
        assert type(optimizer) is THEIRS["AdamW"] and "coupled" not in optimizer.param_groups[0]
    with stablekern.swap("torch.optim"), pytest.raises(ValueError, match="`differentiable` is not available"):
        torch.optim.AdamW([p], differentiable=True)


# ---- the codebases: small modules with their names and signatures ----------------------------------------------------


def eeg_v3() -> types.ModuleType:
    def edge_scalar_series(elec, *, metric="cosine", pairs=None):
        x = elec - elec.mean(-1, keepdim=True) if metric == "correlation" else elec
        x = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)
        gram = torch.einsum("bntd,bmtd->btnm", x, x).clamp(-1, 1)
        i, j = torch.tensor(pairs).mT if pairs else torch.triu_indices(x.shape[1], x.shape[1], 1)
        return gram[:, :, i, j].permute(0, 2, 1)[..., None]

    def assemble_adjacency(edge_weights, *, n_nodes=19, top_k=3, threshold=1e-4, symmetric=True,
                           identity_fallback=True, pairs=None):  # fmt: skip
        i, j = torch.triu_indices(n_nodes, n_nodes, 1)
        A = edge_weights.new_zeros(edge_weights.shape[0], edge_weights.shape[2], n_nodes, n_nodes)
        A[..., i, j] = A[..., j, i] = edge_weights.permute(0, 2, 1)
        values, at = A.topk(top_k, -1)
        A = torch.zeros_like(A).scatter(-1, at, torch.where(values > threshold, values, 0.0))
        A = (A + A.mT) / 2 if symmetric else A
        return A + torch.diag_embed((A.sum(-1) < 1e-4).to(A.dtype)) if identity_fallback else A

    def compute_stable_laplacian(A, normalize=True, eps=1e-4):
        degree = A.sum(-1).clamp_min(eps)
        eye = torch.eye(A.shape[-1], dtype=A.dtype)
        if not normalize:
            return torch.diag_embed(degree) - A + eps * eye
        scale = degree.rsqrt()
        return eye - scale[..., None] * A * scale[..., None, :] + eps * eye

    class TemporalEMA(nn.Module):
        def __init__(self, beta=0.9, persistent=False):
            super().__init__()
            self.beta, self.persistent = beta, persistent

        def forward(self, adjacency):
            steps = [adjacency[:, 0]]
            for t in range(1, adjacency.shape[1]):
                steps.append(self.beta * steps[-1] + (1 - self.beta) * adjacency[:, t])
            return torch.stack(steps, 1)

    class FocalLoss(nn.Module):
        def __init__(self, alpha=0.5, gamma=2.0):
            super().__init__()
            self.alpha, self.gamma = alpha, gamma

        def forward(self, logits, targets, *, pos_weight=None):
            weight = None if pos_weight is None else torch.as_tensor(pos_weight, dtype=torch.float64)
            loss = nn.functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weight, reduction="none")
            p = logits.sigmoid()
            p_t = targets * p + (1 - targets) * (1 - p)
            alpha_t = targets * self.alpha + (1 - targets) * (1 - self.alpha)
            return alpha_t * (1 - p_t).pow(self.gamma) * loss

    class GraphChannelMixerPyG(nn.Module):
        def __init__(self, k_eigenvectors=4, semi_dynamic_interval=1):
            super().__init__()
            self.k_eigenvectors, self.semi_dynamic_interval = k_eigenvectors, semi_dynamic_interval
            self.pe_sign_consistency = True

        def _compute_dynamic_pe_vectorized(self, adjacency):
            L = compute_stable_laplacian(adjacency)
            V = torch.linalg.eigh(L).eigenvectors[..., : self.k_eigenvectors]
            V = V * torch.where(V.sum(-2, keepdim=True) < 0, -1.0, 1.0)
            V = V[:, :: self.semi_dynamic_interval].repeat_interleave(self.semi_dynamic_interval, 1)
            return V[:, : adjacency.shape[1]]

    def check_gradients(model, max_norm):
        raise AssertionError

    return module("eeg_v3", locals())


def module(name: str, contents: dict) -> types.ModuleType:
    made = types.ModuleType(f"a_module_of_{name}")
    for key, value in contents.items():
        value.__module__ = made.__name__
        setattr(made, key, value)
    return made


def compared(call, target, report_of=None, **tolerance) -> stablekern.SwapReport:
    """`call()` gives outputs and leaves; the same outputs and gradients with `target` swapped; and once more after."""

    def run():
        outputs, leaves = call()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weights = [
            torch.randn(o.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) for o in outputs
        ]
        loss = sum((o.real * w).sum() for o, w in zip(outputs, weights, strict=True))
        grads = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
        return [o.detach() for o in outputs], list(grads)

    theirs = run()
    with stablekern.swap(target) as report:
        torch.testing.assert_close(run(), theirs, **tolerance)
    torch.testing.assert_close(run(), theirs, rtol=0, atol=0)
    return report


def leaf(*shape: int, dtype=torch.float64, positive: bool = False) -> Tensor:
    x = torch.rand(shape, dtype=dtype) + 0.1 if positive else torch.randn(shape, dtype=dtype)
    return x.requires_grad_()


def test_functions_of_the_eeg_detector():
    v3, close = eeg_v3(), {"rtol": 1e-8, "atol": 1e-10}
    x, edges = leaf(2, 5, 6, 8), leaf(2, 10, 6, positive=True)
    for metric in ("cosine", "correlation"):
        compared(lambda metric=metric: (v3.edge_scalar_series(x, metric=metric), [x]), v3, **close)
    compared(lambda: (v3.edge_scalar_series(x, pairs=[(0, 3), (1, 2)]), [x]), v3, **close)
    compared(lambda: (v3.assemble_adjacency(edges, n_nodes=5), [edges]), v3, **close)
    compared(lambda: (v3.assemble_adjacency(edges * 1e-5, n_nodes=5), [edges]), v3, **close)
    report = compared(lambda: (v3.assemble_adjacency(edges, n_nodes=5, symmetric=False), [edges]), v3, **close)
    assert list(report.fell_through) == ["assemble_adjacency: rows that are not made symmetric, or other pairs"]
    dense = leaf(3, 5, 5, positive=True)
    for normalize in (True, False):
        compared(lambda on=normalize: (v3.compute_stable_laplacian(dense + dense.mT, on), [dense]), v3, **close)
    logits, targets = leaf(4, 9), (torch.rand(4, 9, **DOUBLE) > 0.5).double()
    compared(lambda: (v3.FocalLoss(0.3, 2.0)(logits, targets), [logits]), v3, **close)
    compared(lambda: (v3.FocalLoss(0.5)(logits, targets, pos_weight=1.4), [logits]), v3, **close)
    with stablekern.swap(v3), pytest.raises(ValueError, match="Unknown metric"):
        v3.edge_scalar_series(x, metric="euclid")
    assert {entry.name: entry.reason for entry in report.left}["a_module_of_eeg_v3.check_gradients"].startswith(
        "a check"
    )


def test_methods_of_the_eeg_detector_on_classes_and_in_a_model():
    v3, close = eeg_v3(), {"rtol": 1e-6, "atol": 1e-8}
    graphs = leaf(2, 7, 6, 6, positive=True)
    model = nn.ModuleDict({"ema": v3.TemporalEMA(0.9), "gnn": v3.GraphChannelMixerPyG(4, 3), "loss": v3.FocalLoss()})
    symmetric = lambda: graphs + graphs.mT  # noqa: E731
    for target in (v3, model):
        compared(lambda: (model["ema"](symmetric()), [graphs]), target, **close)
        # The bound on the gradient of `lorentz` shows where gaps are small: values here, gradients in its own tests.
        compared(lambda: (model["gnn"]._compute_dynamic_pe_vectorized(symmetric()), []), target, **close)
    with stablekern.swap(model) as report:
        assert (
            len(report.swapped) == 3 and "forward" in vars(model["ema"]) and "forward" not in vars(v3.TemporalEMA(0.9))
        )
        with stablekern.swap(model) as second:
            assert {entry.reason for entry in second.left} == {"swapped already"} and not second.swapped
    assert not {"forward", "_compute_dynamic_pe_vectorized"} & {key for m in model.modules() for key in vars(m)}
    same = torch.full((1, 2, 6, 6), 1.0, **DOUBLE).requires_grad_()  # every eigenvalue but one repeated
    with stablekern.swap(model):
        out = model["gnn"]._compute_dynamic_pe_vectorized(same)
        assert torch.isfinite(torch.autograd.grad((out * torch.randn_like(out)).sum(), same)[0]).all()


def sem() -> types.ModuleType:
    class ComplexAdamW(torch.optim.Optimizer):
        def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, temperature=1e-4):
            super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

        def step(self, closure=None):
            for group in self.param_groups:
                lr, (b1, b2) = group["lr"], group["betas"]
                for p in group["params"]:
                    s = self.state[p]
                    if not s:
                        s |= {"t": 0, "m": torch.zeros_like(p), "v": torch.zeros_like(p.abs())}
                    s["t"] += 1
                    p.data.mul_(1 - lr * group["weight_decay"])
                    s["m"].mul_(b1).add_(p.grad, alpha=1 - b1)
                    s["v"].mul_(b2).add_(p.grad.abs().square(), alpha=1 - b2)
                    scale = s["v"].sqrt() / (1 - b2 ** s["t"]) ** 0.5 + group["eps"]
                    p.data.add_(s["m"] / scale, alpha=-lr / (1 - b1 ** s["t"]))

    def cg_solve(A, b, max_iter=20, tol=1e-6):
        return torch.linalg.solve(A, b.reshape(-1, A.shape[0]).mT).mT.reshape(b.shape)

    def cg_solve_sparse(matvec_fn, b, max_iter=20, tol=1e-6, precond=None, x0=None):
        size = b.shape[-2] * 2  # the exact solution by the dense matrix of the operator
        A = matvec_fn(torch.eye(size, dtype=b.dtype).unflatten(-1, (-1, 2))).flatten(-2).mT
        return torch.linalg.solve(A, b.flatten(-2).reshape(-1, size).mT).mT.reshape(b.shape)

    def complex_parallel_scan(A_r, A_i, X_r, X_i):
        A, X = torch.complex(A_r, A_i), torch.complex(X_r, X_i)
        h, states = torch.zeros_like(X[:, 0]), []
        for t in range(X.shape[1]):
            h = A[:, t] * h + X[:, t]
            states.append(h)
        H = torch.stack(states, 1)
        return H.real, H.imag

    def complex_parallel_scan_chunked(A_r, A_i, X_r, X_i, chunk_size=64, strategy="auto"):
        return complex_parallel_scan(A_r, A_i, X_r, X_i)

    def small_cayley(A_r, A_i, eye):
        A = torch.complex(A_r, A_i)
        U = torch.linalg.solve(eye + A, eye - A)
        return U.real, U.imag

    def chebyshev_kpm_solve(matvec_fn, rhs_r, rhs_i, coeffs, lambda_max):
        raise AssertionError

    return module("sem", locals())


def cayley(weights: Tensor, dt: float):
    """v -> (I + i a H) v in the real-block layout, H the Laplacian of a ring with these weights."""
    n = len(weights)
    nodes = torch.arange(n)
    A = torch.zeros(n, n, dtype=weights.dtype).index_put((nodes, nodes.roll(-1)), weights)
    H = torch.diag((A + A.mT).sum(-1)) - A - A.mT
    turn = lambda v: torch.stack((-(v[..., 1] @ H), v[..., 0] @ H), -1)  # noqa: E731
    return (lambda v: v + dt / 2 * turn(v)), torch.eye(n) + 0.5j * dt * H


def test_functions_of_sem():
    s, close = sem(), {"rtol": 1e-7, "atol": 1e-9}
    weights, b = leaf(12, positive=True), leaf(3, 4, 12, 2)
    product, A = cayley(weights, 0.5)
    report = compared(
        lambda: (s.cg_solve_sparse(cayley(weights, 0.5)[0], b, max_iter=200, tol=1e-12), [b, weights]), s, **close
    )
    assert "chebyshev_kpm_solve" in str(report) and len(report.swapped) == 6
    with stablekern.swap(s), torch.no_grad():
        x = s.cg_solve_sparse(product, b.detach(), 200, 1e-12, x0=torch.zeros_like(b))
    torch.testing.assert_close(product(x), b, **close)
    dense, rows = A.detach().to(torch.complex128).requires_grad_(), leaf(3, 12, dtype=torch.complex128)
    compared(lambda: (s.cg_solve(dense, rows, 200, 1e-12), [rows]), s, **close)
    gates = [leaf(2, 9, 3) for _ in range(4)]
    scaled = lambda: (0.5 * gates[0].tanh(), 0.5 * gates[1].tanh(), *gates[2:])  # noqa: E731
    # The layer computes in float32, as its callers do.
    loose = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    compared(lambda: (s.complex_parallel_scan(*scaled()), gates), s, **loose)
    compared(lambda: (s.complex_parallel_scan_chunked(*scaled(), chunk_size=4), gates), s, **loose)
    skew = [leaf(5, 4, 4) for _ in range(2)]
    half = lambda: (skew[0] - skew[0].mT, skew[1] + skew[1].mT, torch.eye(4, dtype=torch.complex128))  # noqa: E731
    compared(lambda: (s.small_cayley(*half()), skew), s, **close)


def test_the_optimizer_of_sem():
    def run(make):
        torch.manual_seed(2)
        z, x = nn.Parameter(torch.randn(6, dtype=torch.complex128)), nn.Parameter(torch.randn(6, **DOUBLE))
        optimizer = make([z, x], lr=0.01, temperature=0.0)
        for _ in range(20):
            optimizer.zero_grad()
            ((z.abs().square() * torch.arange(6)).sum() + x.pow(4).sum()).backward()
            optimizer.step()
        return [z.detach(), x.detach()]

    s = sem()
    theirs = run(s.ComplexAdamW)
    with stablekern.swap(s):
        torch.testing.assert_close(run(s.ComplexAdamW), theirs, rtol=1e-6, atol=1e-9)
        re, im = (nn.Parameter(torch.ones(3)) for _ in range(2))
        re._is_complex_real, re._complex_partner, im._is_complex_imag, im._complex_partner = True, im, True, re
        optimizer = s.ComplexAdamW([{"params": iter([re, im])}])
        assert optimizer.param_groups[0]["pairs"] == ((0, 1),) and optimizer.defaults["temperature"] == 1e-4


C_EPS = 0.5


def ris() -> types.ModuleType:
    def build_effective_cov_torch(R_pred, snr_db=None, R_samp=None, beta=None, diag_load=True, apply_shrink=True,
                                  target_trace=None):  # fmt: skip
        n = R_pred.shape[-1]
        eye = torch.eye(n, dtype=R_pred.dtype)

        def normal(R):
            R = (R + R.mH) / 2
            return R * (target_trace or n) / R.diagonal(dim1=-2, dim2=-1).sum(-1).real[..., None, None]

        R = normal(R_pred)
        if beta and R_samp is not None:
            R = normal((1 - beta) * R + beta * normal(R_samp))
        if diag_load:
            R = normal(R + C_EPS * (target_trace or n) / n * eye)
        if apply_shrink and snr_db is not None:
            steps = [(15, 0.02), (8, 0.04), (3, 0.07), (-2, 0.1), (-1e9, 0.14)]
            alpha = torch.tensor([next(a for low, a in steps if float(snr) >= low) for snr in snr_db], **DOUBLE)
            R = (1 - alpha)[:, None, None] * R + (alpha * (target_trace or n) / n)[:, None, None] * eye
        return R

    def build_sample_covariance_from_snapshots(y, H, codes, cfg, tikhonov_alpha=1e-3):
        n, rows = H.shape[-1], []
        for y_l, c_l in zip(torch.as_tensor(y), torch.as_tensor(codes), strict=True):
            Phi = torch.as_tensor(H) * c_l
            gram = Phi.mH @ Phi
            alpha = tikhonov_alpha * gram.diagonal().sum().real / n
            rows.append(torch.linalg.solve(gram + alpha * torch.eye(n), Phi.mH @ y_l))
        X = torch.stack(rows)
        X = X - X.mean(0)
        return (X.mH @ X / (len(X) - 1)).numpy()  # the conjugate of the covariance of the rows

    class GPUMusicEstimator:
        def _compute_spectrum_mvdr(self, R_inv, A):
            raise AssertionError

        def _compute_spectrum_mvdr_lowrank(self, A_flat, F, delta_scale=1e-2):
            n, k = F.shape
            delta = delta_scale * F.abs().square().sum() / n
            inner = torch.linalg.inv(delta * torch.eye(k) + F.mH @ F)
            a = A_flat.mT
            projected = F.mH @ a
            return 1 / ((a.abs().square().sum(0) - (projected.conj() * (inner @ projected)).sum(0).real) / delta)

    return module("ris", locals())


def test_functions_of_ris():
    r, close = ris(), {"rtol": 1e-8, "atol": 1e-10}
    factor, samples = leaf(4, 8, 3, dtype=torch.complex128), torch.randn(4, 8, 9, dtype=torch.complex128)
    snr = torch.tensor([20.0, 5.0, 0.0, -7.0], **DOUBLE)
    covariance = lambda: factor @ factor.mH  # noqa: E731
    for more in ({}, {"beta": 0.3, "R_samp": samples @ samples.mH}, {"target_trace": 3.0}, {"diag_load": False},
                 {"apply_shrink": False}):  # fmt: skip
        call = lambda more=more: (r.build_effective_cov_torch(covariance(), snr, **more), [factor])  # noqa: E731
        report = compared(call, r, **close)
    assert "build_effective_cov_torch" in report.swapped[0].name
    with stablekern.swap(r):  # a negative trace is no factor of 1e9
        bad = r.build_effective_cov_torch(torch.stack((-torch.eye(3), torch.eye(3))).to(torch.complex64))
        assert torch.isnan(bad[0]).all() and torch.isfinite(bad[1]).all()
    y, H, codes = (torch.randn(*s, dtype=torch.complex128).numpy() for s in ((6, 4), (4, 9), (6, 9)))
    theirs = r.build_sample_covariance_from_snapshots(y, H, codes, None)
    with stablekern.swap(r):
        ours = r.build_sample_covariance_from_snapshots(y, H, codes, None)
    torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(theirs).conj(), **close)
    estimator, steering = r.GPUMusicEstimator(), torch.randn(20, 8, dtype=torch.complex128)
    compared(lambda: (estimator._compute_spectrum_mvdr_lowrank(steering, factor[0].detach()), []), r, **close)
    assert "it is given an inverse" in str(report)


def test_every_stand_in_says_what_it_stands_for():
    """The tables of the codebases hold stand-ins or reasons, never both, and no name twice."""
    names = []
    for codebase in _swap._CODEBASES:
        adapter = importlib.import_module(f"stablekern.adapters.{codebase}")
        tables = [adapter.FUNCTIONS, *adapter.METHODS.values()]
        names += list(adapter.FUNCTIONS)
        for known in (entry for table in tables for entry in table.values()):
            has = known.stand_in is not None or known.make is not None
            assert has is (known.refused is None) and has is bool(known.signatures)
    assert len(set(names)) == len(names)
