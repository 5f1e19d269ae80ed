"""The CUDA kernels of `eigh`. Without a GPU: emulated on the CPU against LAPACK and the torch launcher, compiled for
every GPU generation with their registers recorded, and the loader with a stand-in for the driver. With one: as is."""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import sys
import types

import pytest
import test_eigh
import torch
from torch import Tensor

import compile_cuda
import emulate_cuda
import stablekern
from specs.eigh import repeated, separated
from stablekern import _load, _nvrtc, _registry, numerics
from stablekern.errors import BuildError
from stablekern.ops import eigh as spine

REAL = (torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
DTYPES = REAL + COMPLEX
OPS = ("eigh_fwd", "eigvalsh_fwd", "eigh_bwd")
# Sizes at which the lanes per matrix, the padding or the warps per block change, and the size of the 10-20 system.
SIZES = (1, 2, 4, 5, 8, 9, 16, 17, 19, 32)


def hermitian(*shape: int, dtype: torch.dtype) -> Tensor:
    A = torch.randn(shape, dtype=dtype)
    return (A + A.mH) / 2


def hard_matrices(n: int, dtype: torch.dtype) -> Tensor:
    """Degenerate, clustered, graded and random spectra; complex ones with every phase turned."""
    A = torch.ones(1, 1, 1, dtype=torch.float64) if n == 1 else test_eigh.hard_matrices(n, torch.float64)
    if dtype.is_complex:
        turn = torch.polar(torch.ones(len(A), n, dtype=torch.float64), 6 * torch.rand(len(A), n, dtype=torch.float64))
        A = A * turn[:, :, None] * turn[:, None, :].conj()
        A = torch.cat([A, hermitian(5, n, n, dtype=torch.complex128)])
        A = (A + A.mH) / 2
    return A.to(dtype)


@pytest.fixture
def emulated(monkeypatch):
    """Under it, the backend `cuda` exists on the CPU: the package's own launchers, with the emulated kernels."""
    for op in OPS:
        monkeypatch.setitem(_registry._launchers[op]["cpu"], "cuda", _registry._launchers[op]["cuda"]["cuda"])
    monkeypatch.setattr(_load, "cuda_reason", lambda: None)
    monkeypatch.setattr(_nvrtc, "launch", emulate_cuda.launch)
    with stablekern.use_backend("cuda"):
        yield "cuda"


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "dtype"),
    [(n, dtype) for dtype in DTYPES for n in (range(1, 33) if dtype == torch.float32 else SIZES)],
    ids=str,
)
def test_residual_and_orthogonality(emulated, n, dtype):
    """||A V - V diag(w)|| <= 5 n eps ||A|| and ||V^H V - I|| <= 5 n eps, ascending; from one triangle, for odd n the
    lower one."""
    A = hard_matrices(n, dtype)
    eps = torch.finfo(dtype).eps
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = torch.linalg.eigvalsh(A.to(wide))
    norm = torch.linalg.matrix_norm(A.to(wide), 2)
    UPLO, one = ("L", A.tril()) if n % 2 else ("U", A.triu())
    w, V, info = spine.eigh_ex(one, UPLO)
    assert w.dtype == dtype.to_real() and V.dtype == dtype and not info.any()
    assert (w.diff(dim=-1) >= 0).all()
    w, V = w.double(), V.to(wide)
    residual = torch.linalg.matrix_norm(A.to(wide) @ V - V * w[:, None, :], 2)
    assert (residual <= 5 * n * eps * norm).all(), residual / norm / (n * eps)
    spread = torch.linalg.matrix_norm(V.mH @ V - torch.eye(n, dtype=wide), 2)
    assert (spread <= 5 * n * eps).all(), spread / (n * eps)
    for found in (w, spine.eigvalsh(one, UPLO).double()):
        assert ((found - exact).abs().amax(-1) <= 5 * n * eps * norm).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [3, 7, 19])
def test_gauge_is_that_of_the_torch_launcher(emulated, n, dtype):
    """The first of the largest components of each vector is real and positive: the same vectors, sign and all."""
    A = separated(torch.Generator().manual_seed(n), (9,), n, dtype=torch.complex128 if dtype.is_complex else REAL[1])
    found = spine.eigh(A.to(dtype)).eigenvectors
    with stablekern.use_backend("torch"):
        expected = spine.eigh(A.to(dtype)).eigenvectors
    # Each is within 5 n eps over a gap of half a mean one, 1/n.
    torch.testing.assert_close(found, expected, rtol=0, atol=2 * 5 * n * n * torch.finfo(dtype).eps)
    pivot = found.gather(-2, found.abs().argmax(-2, keepdim=True))
    assert (pivot.real > 0).all() and (not dtype.is_complex or (pivot.imag == 0).all())
    equal = spine.eigh(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=dtype)).eigenvectors
    assert (equal[0].real > 0).all(), "of equal components the first is positive"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 3, 6, 11, 19])
def test_no_result_depends_on_lanes_or_neighbours(emulated, monkeypatch, n, dtype):
    """The same bits at any place of a batch, and in whatever order the lanes of a warp run: no barrier is missing."""
    A = hermitian(13, n, n, dtype=dtype)
    A[5] = torch.eye(n)
    A[7] = 0
    weights = torch.randn(13, n, dtype=dtype.to_real()), torch.randn(13, n, n, dtype=dtype)
    order = torch.randperm(13)
    results = []
    for lanes in emulate_cuda.ORDERS:
        monkeypatch.setattr(_nvrtc, "launch", functools.partial(emulate_cuda.launch, order=lanes))
        w, V, _ = spine.eigh_ex(A)
        results.append((w, V, test_eigh.gradients(A, weights)))
    moved = spine.eigh_ex(A[order])
    back = test_eigh.gradients(A[order], tuple(x[order] for x in weights))
    results.append(tuple(torch.empty_like(x).index_copy_(0, order, x) for x in (*moved[:2], back)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    one = spine.eigh_ex(A[-1:])
    assert torch.equal(one.eigenvectors[0], results[0][1][-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [4, 7, 13, 19])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_matrix_touches_no_other(emulated, n, dtype, bad):
    A = hermitian(11, n, n, dtype=dtype)
    weights = torch.randn(11, n, dtype=dtype.to_real()), torch.randn(11, n, n, dtype=dtype)
    spoiled = A.clone()
    where = [(2, n - 1, 0), (5, 0, n - 1), (10, 1, 1)]  # a triangle that is read, one that is not, the diagonal
    for place in where:
        spoiled[place] = complex(0, bad) if dtype.is_complex else bad
    failed = torch.zeros(11, dtype=torch.bool)
    failed[[2, 5, 10]] = True
    clean, found = spine.eigh_ex(A), spine.eigh_ex(spoiled)
    torch.testing.assert_close(found.info, 2 * failed.to(torch.int32))
    torch.testing.assert_close(spine.eigvalsh(spoiled).isnan(), failed[:, None].expand(11, n))
    before, after = test_eigh.gradients(A, weights), test_eigh.gradients(spoiled, weights)
    for a, b in ((clean.eigenvalues, found.eigenvalues), (clean.eigenvectors, found.eigenvectors), (before, after)):
        assert torch.equal(a[~failed], b[~failed])
        assert torch.view_as_real(b[failed]).isnan().all() if b.is_complex() else b[failed].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales(emulated, dtype):
    """Each matrix by a power of two of its own: near both ends of the range the same vectors, and exact multiples of
    the eigenvalues; subnormal ones are decomposed too."""
    A = hermitian(3, 6, 6, dtype=dtype)
    plain = spine.eigh(A)
    info = torch.finfo(dtype)
    for factor in (2.0 ** (122 if info.bits == 32 else 1018), info.tiny * 2.0**60):
        found = spine.eigh(A * factor)
        torch.testing.assert_close(found.eigenvectors, plain.eigenvectors, rtol=0, atol=0)
        torch.testing.assert_close(found.eigenvalues, plain.eigenvalues * factor, rtol=0, atol=0)
    tiny = torch.full((1, 2, 2), info.smallest_normal / 2**20, dtype=dtype)
    assert torch.isfinite(spine.eigh(tiny).eigenvectors).all()


# ---- backward --------------------------------------------------------------------------------------------------------


def both_backwards(A: Tensor, mode: str, grads, gap_floor=None) -> tuple[Tensor, Tensor]:
    """The gradients by the emulated kernel and by the torch launcher, of the same decomposition."""
    w, rows, _ = spine.forward_of(A)
    number, floor = spine.gap_rule("eigh", mode, gap_floor, A.dtype)
    found = spine.backward_of(w, rows, *grads, number, floor)
    with stablekern.use_backend("torch"):
        return found, spine.backward_of(w, rows, *grads, number, floor)


@pytest.mark.parametrize("mode", ["auto", "lorentz", "mask", "raw"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 8, 19, 32])
def test_backward_is_that_of_the_torch_launcher(emulated, n, dtype, mode):
    A = separated(torch.Generator().manual_seed(n), (3,), n, dtype=torch.complex128 if dtype.is_complex else REAL[1])
    A = A.to(dtype)
    grad_values, grad_vectors = torch.randn(3, n, dtype=dtype.to_real()), torch.randn(3, n, n, dtype=dtype)
    # Three dot products of n terms each, and gaps of about 1/n whose rounding is divided by them.
    bound = 4 * 3 * n * n * torch.finfo(dtype).eps
    for grads in ((grad_values, grad_vectors), (None, grad_vectors), (grad_values, None)):
        found, expected = both_backwards(A, mode, grads)
        assert (found - expected).abs().max() <= bound * expected.abs().max().clamp_min(1)
        torch.testing.assert_close(found, found.mH, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["auto", "lorentz", "mask"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_at_repeated_eigenvalues(emulated, dtype, mode):
    """Finite, Hermitian, and the noise-floor rule drops the pairs that the torch launcher drops."""
    n = 19
    A = torch.stack(list(repeated(n).values())).to(dtype)
    w, rows, _ = spine.forward_of(A)
    G = hermitian(len(A), n, n, dtype=dtype)
    invariant = torch.zeros_like(rows)  # of tr(G P), P on the eigenvectors that belong to the three lowest
    invariant[:, :3] = 2 * (rows[:, :3] @ G.mT)
    for grad_rows in (invariant, torch.randn_like(rows)):
        number, floor = spine.gap_rule("eigh", mode, None, dtype)
        found = spine.backward_of(w, rows, None, grad_rows, number, floor)
        assert torch.isfinite(torch.view_as_real(found) if dtype.is_complex else found).all()
        torch.testing.assert_close(found, found.mH, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_floor_rule(emulated, dtype):
    """On either side of kappa eps times the longest column of M, for M given by hand: the eigenvectors are those of a
    diagonal matrix. Also where the squares of its entries leave the range."""
    eps = torch.finfo(dtype).eps
    w = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=dtype.to_real())
    rows = torch.eye(4, dtype=dtype)[None]
    for size, share in itertools.product((1.0, 2.0**80, 2.0**-80), (0.9, 1.1)):
        M = torch.zeros(4, 4, dtype=dtype)
        M[0, 3], M[1, 3] = 4, 3
        M[1, 2] = share * numerics.EIGH_NOISE_KAPPA.of() * eps * 5
        M = (M * size).mT[None].contiguous()
        grad = spine.backward_of(w, rows, None, M, spine._MODES.index("auto"), 0.5)
        assert (grad[0, 1, 2].abs() > 0).item() is (share > 1)
        assert grad[0, 0, 3].abs() > 0
        with stablekern.use_backend("torch"):
            expected = spine.backward_of(w, rows, None, M, spine._MODES.index("auto"), 0.5)
        torch.testing.assert_close(grad, expected, rtol=16 * eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_failed_matrix_that_the_loss_leaves_out_has_no_gradient(emulated, dtype):
    A = hermitian(5, 6, 6, dtype=dtype)
    A[2, 1, 0] = A[3, 0, 0] = torch.nan
    w, rows, info = spine.forward_of(A)
    assert info.tolist() == [0, 0, 2, 2, 0]
    for used in (0, 1):
        grads = [torch.ones_like(w), torch.ones_like(rows)]
        for grad in grads:
            grad[2:4] = 0
        grads[used][3, 0] = 1
        found = spine.backward_of(w, rows, *grads, *spine.gap_rule("eigh", "auto", None, dtype))
        assert (found[2] == 0).all() and found[3].abs().isnan().all()
        assert torch.isfinite(torch.view_as_real(found[[0, 1, 4]]) if dtype.is_complex else found[[0, 1, 4]]).all()


def test_complex_gradient_knows_the_gauge(emulated):
    """Raw complex vectors, phase and all, against finite differences."""
    A = separated(torch.Generator().manual_seed(3), (2,), 4, dtype=torch.complex128).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: tuple(spine.eigh((A + A.mH) / 2)), A)


def test_views_and_sizes(emulated):
    """Conjugate and strided views, no items at all, and n = 33, which is left to others."""
    A = hermitian(3, 4, 4, dtype=torch.complex64)
    torch.testing.assert_close(spine.eigh(A.conj()).eigenvalues, spine.eigh(A).eigenvalues, rtol=0, atol=1e-6)
    wide = torch.stack([A, A], -1)[..., 0]
    torch.testing.assert_close(spine.eigh(wide).eigenvectors, spine.eigh(A).eigenvectors, rtol=0, atol=0)
    assert spine.eigh(torch.zeros(0, 5, 5)).eigenvectors.shape == (0, 5, 5)
    assert spine.lanes_reason(torch.zeros(1, 33, 33)) == "n > 32" and spine.lanes_reason(A) is None


# ---- compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def nvrtc():
    version, reason = _nvrtc.version()
    if version is None:
        pytest.skip(reason)
    return version


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_own_architecture_is_compiled_for(nvrtc, capability):
    assert _nvrtc.target(capability) == f"sm_{10 * capability[0] + capability[1]}"


def test_other_architectures(nvrtc):
    """A later minor version runs the binary of its generation; a later generation needs PTX; an older one cannot."""
    assert _nvrtc.target((8, 8)).startswith("sm_8")
    assert _nvrtc.target((99, 0)).startswith("compute_")
    with pytest.raises(BuildError, match="compiles for sm_.* and later: got sm_30"):
        _nvrtc.target((3, 0))


def test_binaries_are_kept(nvrtc, monkeypatch, tmp_path):
    monkeypatch.setenv("STABLEKERN_CACHE_DIR", str(tmp_path / "cache"))
    macros = spine.cuda_macros(torch.float32, 2)
    first = _nvrtc.compiled("eigh.cu", "eigh_bwd", macros, "sm_80")
    assert first[:4] == b"\x7fELF"
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.stat().st_mode & 0o077 == 0 and kept.read_bytes() == first
    monkeypatch.setattr(_nvrtc, "_compile", None)
    assert _nvrtc.compiled("eigh.cu", "eigh_bwd", macros, "sm_80") == first
    with pytest.raises(TypeError):  # all others would have to be compiled
        _nvrtc.compiled("eigh.cu", "eigh_bwd", macros, "sm_89")
    with pytest.raises(TypeError):
        _nvrtc.compiled("eigh.cu", "eigh_bwd", spine.cuda_macros(torch.float32, 3), "sm_80")


def test_the_record_of_resources_is_complete_and_without_spills():
    """Made by `python tests/compile_cuda.py`, anew whenever the kernels change. A spilled register is on the stack."""
    head, *rows = map(json.loads, compile_cuda.RECORD.read_text().splitlines())
    assert head["sources"] == compile_cuda.sources(), "run tests/compile_cuda.py"
    cases = {(r["kernel"], r["dtype"], r["n"], r["target"]) for r in rows}
    names = [str(dtype).removeprefix("torch.") for dtype in compile_cuda.DTYPES]
    assert cases == set(itertools.product(compile_cuda.KERNELS, names, compile_cuda.SIZES, compile_cuda.TARGETS))
    for row in rows:
        assert row["stack"] == row["local"] == 0 and 0 < row["reg"] <= 255, row
        assert 0 < row["shared"] <= 48 * 1024, row
        # Enough warps to take turns: 28 or more on a multiprocessor, of 65 536 registers given out in eights.
        if (row["dtype"], row["n"]) == ("float32", 19):
            assert row["reg"] <= 72, row


@pytest.mark.parametrize("target", compile_cuda.TARGETS)
def test_compiles_without_spills(nvrtc, target):
    """At the workload's size: what the record says, if this is the compiler that made it."""
    pytest.importorskip("triton", reason="its cuobjdump reads the binary")
    head, *rows = map(json.loads, compile_cuda.RECORD.read_text().splitlines())
    for kernel in compile_cuda.KERNELS:
        found = compile_cuda.row(kernel, torch.float32, 19, target)
        assert found["stack"] == found["local"] == 0 and found["reg"] <= 72
        assert found in rows or head["nvrtc"] != nvrtc


def test_ptx_for_later_generations(nvrtc, monkeypatch, tmp_path):
    monkeypatch.setenv("STABLEKERN_CACHE_DIR", str(tmp_path))
    text = _nvrtc.compiled("eigh.cu", "eigvalsh_fwd", spine.cuda_macros(torch.float32, 2), "compute_90")
    assert b".entry eigvalsh_fwd" in text


def test_a_failed_compilation_shows_the_log(nvrtc, monkeypatch, tmp_path):
    monkeypatch.setenv("STABLEKERN_CACHE_DIR", str(tmp_path))
    macros = spine.cuda_macros(torch.float32, 5) | {"SK_N": 33}
    with pytest.raises(BuildError, match=r"(?s)NVRTC cannot compile eigh.cu .*SK_N=33.*error: static assertion"):
        _nvrtc.compiled("eigh.cu", "eigh_fwd", macros, "sm_80")
    assert not list(tmp_path.iterdir())


def test_without_cuda_bindings(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    assert "cuda-bindings is not installed" in _nvrtc.version()[1]
    with pytest.raises(BuildError, match="cuda-bindings is not installed"):
        _nvrtc.target((9, 0))


# ---- launches, with a stand-in for the driver ------------------------------------------------------------------------


class Driver(types.SimpleNamespace):
    """Answers as cuda-bindings does, and remembers what it was asked."""

    def __init__(self, failing: str = ""):
        self.calls, self.failing = [], failing

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return (719,) if name == self.failing else (0, f"<{name}>")

        return call

    def named(self, name: str) -> list[tuple]:
        return [arguments for called, *arguments in self.calls if called == name]


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(_nvrtc, "_driver", lambda: found)
    monkeypatch.setattr(_nvrtc, "_context", lambda device: f"<context {device}>")
    monkeypatch.setattr(_nvrtc, "_loaded", {})
    monkeypatch.setattr(_nvrtc, "target", lambda capability: "sm_{}{}".format(*capability))
    monkeypatch.setattr(_nvrtc, "compiled", lambda *key: repr(key).encode())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: types.SimpleNamespace(cuda_stream=77))
    return found


def run(device: str = "cuda:1", n: int = 3) -> None:
    arguments = [torch.ones(2), None, ctypes.c_longlong(2**40), ctypes.c_int(1), ctypes.c_double(0.5)]
    where = torch.device(device)
    _nvrtc.launch("eigh.cu", "eigh_fwd", {"SK_N": n}, device=where, blocks=9, threads=64, arguments=arguments)


def test_launch(driver):
    """On torch's stream, in the device's context, with the parameters of the kernel; loaded once per device."""
    run()
    (launched,) = driver.named("cuLaunchKernel")
    kernel, *shape, shared, stream, (values, kinds), extra = launched
    assert kernel == "<cuModuleGetFunction>" and shape == [9, 1, 1, 64, 1, 1] and (shared, stream, extra) == (0, 77, 0)
    assert kinds == (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int, ctypes.c_double)
    assert values[0] > 0 and values[1:] == (0, 2**40, 1, 0.5)
    assert driver.named("cuCtxPushCurrent") == [["<context 1>"]] and len(driver.named("cuCtxPopCurrent")) == 1
    assert driver.named("cuModuleLoadData") == [[repr(("eigh.cu", "eigh_fwd", {"SK_N": 3}, "sm_89")).encode()]]
    run()
    assert len(driver.named("cuModuleLoadData")) == 1 and len(driver.named("cuLaunchKernel")) == 2
    run("cuda:0")
    run(n=4)
    assert len(driver.named("cuModuleLoadData")) == 3


def test_a_failed_launch_says_so_and_leaves_the_context(driver):
    driver.failing = "cuLaunchKernel"
    with pytest.raises(RuntimeError, match="stablekern.cuda: the launch of eigh_fwd failed: got 719"):
        run()
    assert len(driver.named("cuCtxPopCurrent")) == len(driver.named("cuCtxPushCurrent")) == 1


def test_capture_needs_a_loaded_kernel(driver, monkeypatch):
    run()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run()
    with pytest.raises(RuntimeError, match="`eigh_fwd` must run once, at this size and dtype, before it is captured"):
        run(n=4)
    assert len(driver.named("cuModuleLoadData")) == 1


# ---- above n = 32: cuSOLVER, checked ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 32, 144, 600, 30_000])
def test_parts_that_cusolver_can_take(n):
    """int32 sizes, of the matrices and of a workspace of several times as much; 32 thousand items are too many."""
    size = spine.solver_part(n)
    assert 1 <= size < 32_000 and (size == 1 or 4 * size * n * n < 2**31)


@pytest.mark.parametrize("upper", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 33])
def test_right_results_pass_the_check(n, dtype, upper):
    """Degenerate, graded and extreme matrices too, with whatever stands in the triangle that is not read."""
    A = torch.cat([test_eigh.hard_matrices(n, torch.float64).to(dtype), hermitian(20, n, n, dtype=dtype)])
    A = torch.cat([A, A[-3:] * 2.0**110, A[-3:] * 2.0**-120])
    one = (A.triu() if upper else A.tril()) + 7 * torch.rand(n, n).to(dtype).tril(-1 if upper else -n)
    w, V = torch.linalg.eigh(one, UPLO="U" if upper else "L")
    assert not spine.wrong_results(one, upper, w, V).any()
    assert not spine.wrong_results(one, upper, w, None).any()


def corruptions(w: Tensor, V: Tensor):
    """What a broken solver may return for item 3."""
    swapped = V.clone()
    swapped[3] = V[4]
    skewed = V.clone()
    skewed[3, :, 0] += 1e-2 * V[3, :, 1]
    exchanged = V.clone()
    exchanged[3] = V[3].flip(-1)
    lost = V.clone()
    lost[3, 5] = 0
    shifted = w.clone()
    shifted[3, 2] += 1e-2 * w[3].abs().max()
    nan = V.clone()
    nan[3, 0, 0] = torch.nan
    return [(w, swapped), (w, skewed), (w, exchanged), (w, lost), (shifted, V), (w, nan), (w * 0, V)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_results_are_marked_and_no_other(monkeypatch, dtype):
    """Never silently wrong: `info` bit 2 and NaN for that item; bit 1 goes before."""
    A = hermitian(8, 40, 40, dtype=dtype)
    A[6, 0, 0] = torch.nan
    monkeypatch.setattr(spine, "solver_part", lambda n: 3)
    launcher = _registry._launchers["eigh_fwd"]["cuda"]["torch"].function
    values_launcher = _registry._launchers["eigvalsh_fwd"]["cuda"]["torch"].function
    solve = torch.linalg.eigh
    clean = launcher(A, False)
    assert clean[2].tolist() == [0, 0, 0, 0, 0, 0, 2, 0]
    w, V = solve(torch.where(torch.isfinite(A), A, 0), UPLO="L")
    for values, vectors in corruptions(w, V):
        calls = []

        def broken(part, UPLO, values=values, vectors=vectors, calls=calls):
            calls.append(len(part))
            first = sum(calls[:-1])
            return values[first : first + len(part)], vectors[first : first + len(part)]

        monkeypatch.setattr(torch.linalg, "eigh", broken)
        found = launcher(A, False)
        assert calls == [3, 3, 2]
        bad = [3] if values is w else [i for i in range(8) if i != 6] if not values.any() else [3]
        assert found[2].tolist() == [2 if i == 6 else 4 if i in bad else 0 for i in range(8)]
        for i in range(8):
            broke = i in bad or i == 6
            assert found[0][i].isnan().all() == broke and found[1][i].abs().isnan().all() == broke
            if not broke:
                torch.testing.assert_close(found[1][i], clean[1][i], rtol=0, atol=1e4 * torch.finfo(dtype).eps)
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda part, UPLO: solve(part, UPLO=UPLO)[0] * 1.01)
    values, info = values_launcher(A, False)
    assert info.tolist() == [4, 4, 4, 4, 4, 4, 2, 4] and values.isnan().all()


def test_no_items_above_the_kernels_size():
    for name in ("eigh_fwd", "eigvalsh_fwd"):
        found = _registry._launchers[name]["cuda"]["torch"].function(torch.zeros(0, 40, 40), False)
        assert found[0].shape == (0, 40) and found[-1].shape == (0,)


# ---- on a GPU --------------------------------------------------------------------------------------------------------

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(
    ("n", "dtype"), [*((n, torch.float32) for n in (1, 4, 8, 16, 32)), *((n, d) for n in (3, 19) for d in DTYPES)]
)
def test_kernels_on_the_device(n, dtype):
    """The device gives what its emulation gives, to rounding: residual, orthogonality, and the torch launcher's
    gradient."""
    A = hard_matrices(n, dtype).cuda()
    with stablekern.use_backend("cuda"):
        w, V, info = spine.eigh_ex(A)
        w_only = spine.eigvalsh(A)
        number, floor = spine.gap_rule("eigh", "auto", None, dtype)
        grads = torch.randn_like(w), torch.randn_like(V)
        rows = V.mT.contiguous()
        found = spine.backward_of(w, rows, *grads, number, floor)
    with stablekern.use_backend("torch"):
        expected = spine.backward_of(w, rows, *grads, number, floor)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    eps, B, W = torch.finfo(dtype).eps, A.to(wide), V.to(wide)
    norm = torch.linalg.matrix_norm(B, 2)
    assert not info.any() and (w.diff(dim=-1) >= 0).all()
    assert (torch.linalg.matrix_norm(B @ W - W * w[:, None, :], 2) <= 5 * n * eps * norm).all()
    assert (torch.linalg.matrix_norm(W.mH @ W - torch.eye(n, device="cuda", dtype=wide), 2) <= 5 * n * eps).all()
    assert ((w_only - w).double().abs().amax(-1) <= 10 * n * eps * norm).all()
    # Where eigenvalues are repeated the gradient of a random loss is noise over a gap floor: only finite.
    assert torch.isfinite(torch.view_as_real(found) if dtype.is_complex else found).all()
    apart = w.diff(dim=-1).amin(-1) > 1e-3 * norm if n > 1 else torch.ones(len(A), dtype=torch.bool, device="cuda")
    scale = expected[apart].abs().amax((-2, -1), keepdim=True)
    assert ((found - expected)[apart].abs() <= 4 * 3 * n * n * eps * scale.clamp_min(1) * 1e3).all()


@pytest.mark.gpu
@gpu
def test_same_bits_twice_in_a_graph_and_without():
    A = hermitian(5000, 19, 19, dtype=torch.float32).cuda()
    with stablekern.use_backend("cuda"):
        first = spine.forward_of(A)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            second = spine.forward_of(A)
        graph.replay()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
