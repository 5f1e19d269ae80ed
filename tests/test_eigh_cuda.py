"""The CUDA kernels of `eigh`. Without a GPU: emulated on the CPU against LAPACK and the torch launcher, compiled for
every GPU generation with their registers recorded, and the loader as far as it needs no device. With one: the kernels."""

from __future__ import annotations

import functools
import sys

import emulate_cuda
import pytest
import test_eigh
import torch
from torch import Tensor

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
SIZES = (1, 2, 3, 4, 5, 8, 9, 16, 17, 19, 31, 32)


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
    ("n", "dtype"), [(n, dtype) for dtype in DTYPES for n in (range(1, 33) if dtype == torch.float32 else SIZES)]
)
def test_residual_and_orthogonality(emulated, n, dtype):
    """||A V - V diag(w)|| <= 5 n eps ||A|| and ||V^H V - I|| <= 5 n eps, ascending, for either triangle."""
    A = hard_matrices(n, dtype)
    eps = torch.finfo(dtype).eps
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = torch.linalg.eigvalsh(A.to(wide))
    norm = torch.linalg.matrix_norm(A.to(wide), 2)
    for UPLO, one in (("L", A.tril()), ("U", A.triu())):
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
@pytest.mark.parametrize("n", [1, 2, 5, 8, 16, 19, 32])
def test_backward_is_that_of_the_torch_launcher(emulated, n, dtype, mode):
    A = separated(torch.Generator().manual_seed(n), (5,), n, dtype=torch.complex128 if dtype.is_complex else REAL[1])
    A = A.to(dtype)
    grad_values, grad_vectors = torch.randn(5, n, dtype=dtype.to_real()), torch.randn(5, n, n, dtype=dtype)
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
    """On either side of kappa eps (|M_ij| + |M_ji| + floor max|M|): by hand, from identity eigenvectors, where the
    gradient of the vectors is M itself."""
    eps = torch.finfo(dtype).eps
    w = torch.tensor([[0.0, 1.0, 1.0, 3.0]], dtype=dtype.to_real())
    rows = torch.eye(4, dtype=dtype)[None]
    kappa, floor = numerics.EIGH_NOISE_KAPPA.of(), numerics.EIGH_NOISE_FLOOR.of()
    limit = kappa * eps * (1 + 1 + floor * 4)
    for share, kept in ((0.9, False), (1.1, True)):
        M = torch.zeros(4, 4, dtype=dtype)
        M[1, 2] = M[2, 1] = 1
        M[1, 2] += share * limit
        M[0, 3] = 4
        number, gap = spine.gap_rule("eigh", "lorentz", 0.5, dtype)
        grad = spine.backward_of(w, rows, None, M.mT[None].contiguous(), spine._MODES.index("auto"), gap)
        # Between equal eigenvalues the Lorentzian is 0 all the same: look at a pair with a gap.
        w2 = torch.tensor([[0.0, 1.0, 2.0, 3.0]], dtype=dtype.to_real())
        grad = spine.backward_of(w2, rows, None, M.mT[None].contiguous(), spine._MODES.index("auto"), gap)
        assert (grad[0, 1, 2].abs() > 0).item() is kept
        assert number == spine._MODES.index("lorentz") and grad[0, 0, 3].abs() > 0


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
    assert spine.cuda_reason(torch.zeros(1, 33, 33)) == "n > 32" and spine.cuda_reason(A) is None


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
