"""Invariants of `spectral_function`: exact gradients at repeated and close eigenvalues, the domain, extreme values."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch
from torch import Tensor

from specs.eigh import repeated
from specs.spectral_function import NAMES, SINE, SQUARE, STEP
from stablekern.ops import spectral_function as spine
from stablekern.ops.spectral_function import spectral_function

FLOATS = (torch.float32, torch.float64)
EXACT = {
    "exp": lambda A: torch.matrix_exp(torch.from_numpy(A)).numpy(),
    "sqrt": scipy.linalg.sqrtm,
    "rsqrt": lambda A: scipy.linalg.inv(scipy.linalg.sqrtm(A)),
    "log": scipy.linalg.logm,
    "inv": scipy.linalg.inv,
}


def gradient(A: Tensor, function, G: Tensor) -> Tensor:
    A = A.detach().requires_grad_()
    return torch.autograd.grad(spectral_function(A, function), A, G)[0]


def symmetric(n: int, dtype=torch.float64) -> Tensor:
    G = torch.randn(n, n, dtype=dtype)
    return (G + G.mH) / 2


def block_derivative(name: str, A: Tensor, G: Tensor) -> Tensor:
    """The Frechet derivative at A along G, its own adjoint: the corner of f([[A, G], [0, A]]), without eigenvectors."""
    n = A.shape[-1]
    block = torch.cat([torch.cat([A, G], 1), torch.cat([torch.zeros_like(A), A], 1)])
    return torch.from_numpy(EXACT[name](block.numpy()))[:n, n:].to(A.dtype)


def matrices() -> dict[str, Tensor]:
    """Definite ones with repeated and with nearly repeated eigenvalues."""
    n = 6
    found = {name: A + 3 * torch.eye(n, dtype=torch.float64) for name, A in repeated(n).items()}
    Q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    for exponent in (-4, -7, -9, -12):
        w = torch.tensor([1.0, 1.0, 1 + 10.0**exponent, 1 + 2 * 10.0**exponent, 2.0, 3.0], dtype=torch.float64)
        found[f"gap-1e{exponent}"] = (Q * w) @ Q.mT
    return {name: (A + A.mT) / 2 for name, A in found.items()}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", NAMES)
def test_exact_at_repeated_and_close_eigenvalues(name, dtype):
    for label, A in matrices().items():
        G = symmetric(6)
        exact = block_derivative(name, A, G)
        actual = gradient(A.to(dtype), name, G.to(dtype)).double()
        # Products of 6 x 6 matrices, at condition numbers below 10 (and scipy's own rounding).
        assert (actual - exact).abs().max() <= 200 * torch.finfo(dtype).eps * exact.abs().max(), label


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_at_repeated_eigenvalues(name):
    """Finite differences at graphs on 19 nodes (small matrices: the samples of the spec)."""
    for label in ("identity", "complete", "disjoint-edges", "star", "block-copies"):
        A = (repeated(19)[label] + 6 * torch.eye(19, dtype=torch.float64)).requires_grad_()
        check = torch.autograd.gradcheck(lambda A: spectral_function((A + A.mT) / 2, name), A, fast_mode=True)
        assert check, label


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_two_complex_copies(name):
    block = torch.randn(3, 3, dtype=torch.complex128)
    block = block @ block.mH + torch.eye(3)
    A = torch.block_diag(block, block).requires_grad_()
    assert torch.autograd.gradcheck(lambda A: spectral_function((A + A.mH) / 2, name), A)


@pytest.mark.parametrize("dtype", FLOATS)
def test_trace_of_square_is_exact_at_any_degeneracy(dtype):
    """tr(G A^2) has the gradient G A + A G: the loss that eigenvectors with dropped pairs get wrong."""
    for label, A in (matrices() | {"zero": torch.zeros(6, 6, dtype=torch.float64)}).items():
        G = symmetric(6)
        exact = G @ A + A @ G
        actual = gradient(A.to(dtype), SQUARE, G.to(dtype)).double()
        assert (actual - exact).abs().max() <= 200 * torch.finfo(dtype).eps * exact.abs().max(), label


@pytest.mark.parametrize("dtype", FLOATS)
def test_given_functions_agree_with_the_named_to_the_four_fifths_of_eps(dtype):
    """The quotient's rounding meets the error of Simpson's rule at eps^(4/5), the worst gap."""
    pairs = {
        "exp": (torch.exp, torch.exp),
        "log": (torch.log, torch.reciprocal),
        "inv": (torch.reciprocal, lambda w: -w.reciprocal().square()),
    }
    gaps = torch.logspace(-16, -0.5, 200, dtype=torch.float64)
    for name, (f, df) in pairs.items():
        w = torch.stack([torch.ones_like(gaps), 1 + gaps], -1).to(dtype)
        exact = spine._divided(name, w.double())
        actual = spine._divided_by_rule(w, f(w), df).double()
        assert ((actual - exact) / exact).abs().max() <= 20 * torch.finfo(dtype).eps ** 0.8, name


def test_a_step_between_eigenvalues_is_not_missed():
    """A derivative that vanishes at all three nodes of the rule, and a jump of 1: the quotient decides."""
    w = torch.tensor([[0.0, 1.5, 1.5 + 1e-3]], dtype=torch.float64)
    divided = spine._divided_by_rule(w, STEP[0](w), STEP[1])
    torch.testing.assert_close(divided[0, 0, 1], torch.tensor(1 / 1.5, dtype=torch.float64))
    period = torch.tensor([[0.0, 4 * torch.pi]], dtype=torch.float64)
    assert abs(spine._divided_by_rule(period, SINE[0](period), SINE[1])[0, 0, 1]) < 1e-15


@pytest.mark.parametrize("name", NAMES)
def test_divided_differences_for_all_gaps(name):
    """float32 against the quotient in float64, at relative gaps of 1e-7 to 1e20."""
    b = torch.tensor(1.0, dtype=torch.float32)
    ratio = 1 + torch.logspace(-6.9, 20 if name in ("log", "sqrt") else 1.5, 300)
    w = torch.stack([b.expand_as(ratio), ratio], -1)
    wide = w.double()
    f = {"inv": torch.reciprocal}.get(name) or getattr(torch, name)
    exact = (f(wide[:, 1]) - f(wide[:, 0])) / (wide[:, 1] - wide[:, 0])
    for pair in (w, w.flip(-1)):
        divided = spine._divided(name, pair)
        torch.testing.assert_close(divided, divided.mT, rtol=0, atol=0)
        # The quotient of float64 keeps eps64/gap >= 2e-9.
        torch.testing.assert_close(divided[:, 0, 1].double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_outside_the_domain_only_that_item_is_lost(name):
    good = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    outside = {
        "exp": [800.0, 1.0, 1.0],
        "sqrt": [0.0, 1.0, 2.0],
        "rsqrt": [0.0, 1.0, 2.0],
        "log": [-1.0, 1.0, 2.0],
        "inv": [0.0, 1.0, -1.0],
    }[name]
    broken = good.clone()
    broken[2, 1] = torch.nan
    A = torch.stack([good, torch.diag(torch.tensor(outside, dtype=torch.float64)), broken]).requires_grad_()
    B = spectral_function(A, name)
    assert B[1:].isnan().all()
    torch.testing.assert_close(B[0], spectral_function(good, name), rtol=0, atol=0)
    grad = torch.autograd.grad(B[0].sum(), A, retain_graph=True)[0]
    assert torch.isfinite(grad).all() and not grad[1:].any()
    assert torch.autograd.grad(B, A, torch.ones_like(B))[0][1:].isnan().all()


def test_an_indefinite_inverse_is_inside():
    A = torch.diag(torch.tensor([-2.0, 1.0, 4.0]))
    torch.testing.assert_close(spectral_function(A, "inv"), torch.diag(torch.tensor([-0.5, 1.0, 0.25])))


def test_large_exponents_do_not_overflow_early():
    A = torch.diag(torch.tensor([-1e4, 0.0, 88.0]))
    G = torch.ones(3, 3)
    grad = gradient(A, "exp", G)
    assert torch.isfinite(grad).all()
    top = torch.tensor(88.0, dtype=torch.float64).exp()
    expected = torch.stack([top, top / 88, top / 10088])
    torch.testing.assert_close(grad[[2, 2, 2], [2, 1, 0]].double(), expected, rtol=1e-5, atol=0)


def test_inverse_functions_and_identities():
    A = matrices()["block-copies"]
    for name, back in (("exp", "log"), ("sqrt", None), ("rsqrt", None)):
        B = spectral_function(A, name)
        again = spectral_function(B, back) if back else B @ B
        expected = torch.linalg.inv(A) if name == "rsqrt" else A
        torch.testing.assert_close(again, expected, rtol=1e-12, atol=1e-12)


def test_half_precision_and_no_columns():
    A = torch.eye(3, dtype=torch.bfloat16).requires_grad_()
    B = spectral_function(A, "sqrt")
    assert B.dtype == torch.float32
    assert torch.autograd.grad(B.sum(), A)[0].dtype == torch.bfloat16
    assert spectral_function(torch.zeros(2, 0, 0), "exp").shape == (2, 0, 0)
    with pytest.raises(RuntimeError, match=r"stablekern\.spectral_function: second derivatives"):
        wide = torch.eye(3).requires_grad_()
        torch.autograd.grad(spectral_function(wide, SINE).sum(), wide, create_graph=True)
