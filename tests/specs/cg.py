"""Spec of `cg`: each method on each form of operator, asked for all that the dtype can give."""

from __future__ import annotations

import torch

from stablekern.ops import cg as spine

from . import OpSpec, Sample

CONDITION = 10.0


def spread(
    g: torch.Generator, batch: tuple[int, ...], n: int, dtype=torch.float64, condition=CONDITION
) -> torch.Tensor:
    """Hermitian, eigenvalues evenly between 1 and `condition`."""
    Q = torch.linalg.qr(torch.randn(*batch, n, n, dtype=dtype, generator=g))[0]
    w = torch.linspace(1, condition, n, dtype=torch.float64).to(dtype)
    return (Q * w) @ Q.mH


def symmetric(g: torch.Generator, batch: tuple[int, ...], n: int) -> torch.Tensor:
    """Complex symmetric, as positive definite as COCG likes it."""
    return torch.complex(spread(g, batch, n), spread(g, batch, n))


def general(g: torch.Generator, batch: tuple[int, ...], n: int, dtype=torch.float64) -> torch.Tensor:
    """Singular values between 1 and 3: CGNE squares the condition number."""
    U, V = (torch.linalg.qr(torch.randn(*batch, n, n, dtype=dtype, generator=g))[0] for _ in range(2))
    return (U * torch.linspace(1, 3, n, dtype=torch.float64).to(dtype)) @ V.mH


def banded(g: torch.Generator, batch: tuple[int, ...], n: int) -> torch.Tensor:
    """Tridiagonal and in the corners; strictly diagonally dominant."""
    edges = torch.rand(*batch, n, dtype=torch.float64, generator=g)
    off = torch.diag_embed(edges[..., :-1], 1)
    off[..., 0, -1] = edges[..., -1]
    off = off + off.mT
    return torch.diag_embed(off.sum(-1) + 0.5) - off


def part(A: torch.Tensor, method: str) -> torch.Tensor:
    """The part of a matrix with which a method may be called, whatever an entry of A is moved by."""
    if method == "cgne":
        return A
    return (A + (A.mT if method == "cocg" else A.mH)) / 2


def dense_product(v, A):
    return (A @ v[..., None])[..., 0]


def ring(n: int) -> torch.Tensor:
    """The pattern of `banded`."""
    above = torch.diag(torch.ones(n - 1), 1)
    above[0, -1] = 1
    return above + above.mT + torch.eye(n)


def in_form(A: torch.Tensor, form: str):
    """(the operator, its `params`)."""
    if form == "csr":
        row, col = ring(A.shape[-1]).to(A.device).nonzero(as_tuple=True)
        crow = torch.searchsorted(row, torch.arange(A.shape[-1] + 1, device=A.device))
        return (crow, col, A[..., row, col]), ()
    return (A, ()) if form == "dense" else (dense_product, (A,))


def held(A: torch.Tensor, form: str) -> torch.Tensor:
    """The matrix that the operator is."""
    return A * ring(A.shape[-1]).to(A) if form == "csr" else A


def _op(A, b, *, form="dense", method="cg", **options):
    operator, params = in_form(part(A, method), form)
    rtol = 2 * torch.finfo(b.dtype).eps
    return spine.cg_ex(operator, b, rtol=rtol, method=method, params=params, **options).x


def _reference(A, b, *, form="dense", method="cg", x0=None, **options):
    return spine.reference(held(part(A, method), form), b)


def samples(g: torch.Generator) -> list[Sample]:
    def normal(*shape: int, dtype=torch.float64):
        return torch.randn(shape, dtype=dtype, generator=g)

    c = torch.complex128
    return [
        Sample("typical", (spread(g, (2, 3), 19), normal(2, 3, 19))),
        Sample("length-1", (spread(g, (3,), 1), normal(3, 1))),
        Sample("odd", (banded(g, (3,), 5), normal(3, 5)), {"form": "csr"}),
        Sample("small", (spread(g, (2,), 4), normal(2, 4)), gradcheck=True),
        Sample("columns", (spread(g, (2,), 7), normal(2, 7, 3))),
        Sample("shared", (spread(g, (), 6), normal(4, 6, 2))),
        Sample("one-vector", (spread(g, (), 33), normal(33))),
        Sample("wide", (spread(g, (2,), 70), normal(2, 70, 2))),
        Sample("empty", (spread(g, (0,), 19), normal(0, 19))),
        Sample("permuted", (spread(g, (5,), 4).permute(2, 1, 0).contiguous().permute(2, 1, 0), normal(4, 5).mT)),
        Sample("strided", (torch.cat([spread(g, (3,), 6)] * 2, -1)[..., :6], normal(3, 12)[:, ::2])),
        Sample("scaled-down", (1e-15 * spread(g, (3,), 19), 1e5 * normal(3, 19))),
        Sample("scaled-up", (1e15 * spread(g, (3,), 19), 1e-5 * normal(3, 19))),
        Sample("warm", (spread(g, (3,), 16), normal(3, 16)), {"x0": normal(3, 16)}),
        Sample("jacobi", (spread(g, (3,), 9), normal(3, 9)), {"preconditioner": "jacobi"}),
        Sample("blocks", (spread(g, (3,), 17), normal(3, 17)), {"preconditioner": 4}),
        Sample("blocks-small", (spread(g, (2,), 5), normal(2, 5)), {"preconditioner": 2, "x0": normal(2, 5)}),
        Sample("cholesky", (spread(g, (2,), 4), normal(2, 4, 2)), {"method": "cholesky"}, gradcheck=True),
        Sample("general", (general(g, (2,), 4), normal(2, 4)), {"method": "cgne"}, gradcheck=True),
        Sample("complex", (spread(g, (2,), 20, c), normal(2, 20, 2, dtype=c))),
        Sample("complex-small", (spread(g, (2,), 3, c), normal(2, 3, dtype=c)), gradcheck=True),
        Sample("complex-blocks", (spread(g, (2,), 7, c), normal(2, 7, dtype=c)), {"preconditioner": 3}),
        Sample("conj-view", (spread(g, (2,), 4, c).conj(), normal(2, 4, dtype=c).conj())),
        Sample("symmetric", (symmetric(g, (2,), 3), normal(2, 3, 2, dtype=c)), {"method": "cocg"}, gradcheck=True),
        Sample("symmetric-wide", (symmetric(g, (2,), 37), normal(2, 37, dtype=c)), {"method": "cocg"}),
        Sample("complex-general", (general(g, (2,), 3, c), normal(2, 3, dtype=c)), {"method": "cgne"}, gradcheck=True),
        *sparse(g),
        *callables(g),
    ]


def sparse(g: torch.Generator) -> list[Sample]:
    c, csr = torch.complex128, {"form": "csr"}
    turn = torch.complex(*(torch.ones(1, dtype=torch.float64) for _ in range(2)))
    b, few = (torch.randn(shape, dtype=c, generator=g) for shape in ((3, 9, 2), (2, 4)))
    large, small = banded(g, (3,), 9), banded(g, (2,), 4)
    hermitian = small.to(c)
    hermitian[:, 0, 1] *= turn[0] / 2
    hermitian[:, 1, 0] *= turn[0].conj() / 2
    uneven = 3 * torch.eye(4, dtype=c) + torch.randn(2, 4, 4, dtype=c, generator=g) / 2
    return [
        Sample("csr", (large, b.real.clone()), csr),
        Sample("csr-small", (small, few.real.clone()), csr, gradcheck=True),
        Sample("csr-shared", (large[0], b.real.clone()), csr),
        Sample("csr-warm", (large, b.real.clone()), {**csr, "x0": b.imag.clone()}),
        Sample("csr-jacobi", (large, b.real.clone()), {**csr, "preconditioner": "jacobi"}),
        Sample("csr-blocks", (large, b.real.clone()), {**csr, "preconditioner": 4}),
        Sample("csr-complex", (hermitian, torch.stack((few, 1j * few.flip(0)), -1)), csr, gradcheck=True),
        Sample("csr-symmetric", (small * turn, few), {**csr, "method": "cocg"}, gradcheck=True),
        Sample("csr-general", (uneven, few), {**csr, "method": "cgne"}, gradcheck=True),
        Sample("csr-many", (large, torch.randn(3, 9, 11, dtype=torch.float64, generator=g)), csr),
    ]


def callables(g: torch.Generator) -> list[Sample]:
    b, c = torch.randn(2, 3, dtype=torch.complex128, generator=g), torch.complex128
    form = {"form": "callable"}
    return [
        Sample("callable", (spread(g, (2,), 3), b.real.clone()), form, gradcheck=True),
        Sample("callable-complex", (spread(g, (2,), 3, c), b), form, gradcheck=True),
        Sample("callable-symmetric", (symmetric(g, (2,), 3), b), {**form, "method": "cocg"}, gradcheck=True),
        Sample("callable-general", (general(g, (2,), 3, c), b), {**form, "method": "cgne"}, gradcheck=True),
        Sample(
            "callable-preconditioned",
            (spread(g, (2,), 3), b.real.clone()),
            {**form, "preconditioner": lambda r: r / 5},
        ),
    ]


def _call(A=None, b=None, **options):
    return lambda: spine.cg(torch.eye(3) if A is None else A, torch.ones(3) if b is None else b, **options)


PATTERN = (torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2))

SPECS = (
    OpSpec(
        "cg",
        op=_op,
        reference=_reference,
        samples=samples,
        interpreted=(
            *("length-1", "empty", "small", "blocks-small", "complex-small", "symmetric", "general"),
            *("csr-small", "csr-complex", "csr-symmetric", "csr-general"),
        ),
        # The residual ends at some 4 eps |A| |x|, 8 with the tolerance of 2 eps, of which x has `CONDITION` times.
        floor_ulps=8.0 * CONDITION,
        errors=(
            (_call(torch.zeros(2, 3, 4)), ValueError, "`A` must be square in `n`: got 4 and 3"),
            (_call(b=torch.ones(4)), ValueError, r"`b` must be \(3\) or \(..., 3, k\) for this `A`: got \(4,\)"),
            (_call(torch.eye(3).expand(2, 3, 3), torch.ones(4, 3, 1)), ValueError, "must broadcast"),
            (_call(torch.eye(3).double()), TypeError, "`A` and `b` must have one dtype"),
            (_call(b=torch.ones(3).int()), TypeError, "`b` must be one of .*: got int32"),
            (_call(b=torch.ones(())), ValueError, "`b` must have the shape"),
            (_call(method="lu"), ValueError, "`method` must be one of 'auto', 'cg', .*: got 'lu'"),
            (_call(rtol=-1.0), ValueError, "`rtol` must be a number >= 0: got -1"),
            (_call(rtol=torch.tensor([0.1, 0.2])), ValueError, r"`rtol` must broadcast to \(\): got \(2,\)"),
            (_call(atol=torch.tensor(-0.5)), ValueError, "`atol` must be >= 0: got -0.5"),
            (_call(maxiter=-1), ValueError, "`maxiter` must be between 0 and"),
            (_call(x0=torch.ones(2)), ValueError, "`x0` must have the shape of `b`"),
            (_call(preconditioner=0), ValueError, "`preconditioner` must be >= 1: got 0"),
            (_call(preconditioner="ilu"), TypeError, "`preconditioner` must be None, \"jacobi\", .*: got 'ilu'"),
            (_call(method="cgne", preconditioner=2), ValueError, '"cgne" takes no `preconditioner`'),
            (_call(PATTERN, torch.ones(2), method="cholesky"), ValueError, '"cholesky" needs a dense `A`: got csr'),
            (_call(torch.eye(3).to_sparse()), TypeError, r"A.crow_indices\(\), .* got torch.sparse_coo"),
            (
                _call((torch.eye(3), torch.eye(3))),
                TypeError,
                r"`A` must be a tensor, \(crow, col, values\) or a callable",
            ),
            (
                _call((PATTERN[0].float(), *PATTERN[1:]), torch.ones(2)),
                TypeError,
                "`crow` of `A` must be a vector of int",
            ),
            (_call((*PATTERN[:2], torch.ones(3)), torch.ones(2)), ValueError, "`A` must have 2 values"),
            (_call((PATTERN[0] + 1, *PATTERN[1:]), torch.ones(2)), ValueError, "`crow` of `A` must rise from 0 to 2"),
            (_call((PATTERN[0], PATTERN[1] + 1, PATTERN[2]), torch.ones(2)), ValueError, r"`col` .* lie in \[0, 2\)"),
            (_call(lambda v: v[..., :2]), ValueError, r"`A` must map \(3,\) torch.float32 to its like: got \(2,\)"),
            (_call(params=(torch.ones(1),)), ValueError, "`params` are those of a callable `A`: got Tensor"),
            (_call(lambda v: v, preconditioner=len), ValueError, r"`preconditioner` must map \(3,\) .*: got int"),
            (_call(lambda v: v, preconditioner="jacobi"), TypeError, "of a callable `A` must be None or a callable"),
        ),
    ),
)
