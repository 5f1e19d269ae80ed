"""Specs of `eigh` and `eigvalsh`."""

from __future__ import annotations

from dataclasses import replace

import torch

from stablekern.ops import eigh as spine

from . import OpSpec, Sample


def _hermitised(function):
    """A loss of one triangle alone has no derivative that agrees with a Hermitian gradient: `gradcheck` needs both."""

    def call(A, *args, hermitise=False, **kwargs):
        return function((A + A.mH) / 2 if hermitise else A, *args, **kwargs)

    return call


def _reference(A, UPLO="L", *, grad="auto", gap_floor=None):
    return spine.reference(A, UPLO)


def _view(outputs, sample):
    """Without the signs: each v v^H. Of a repeated eigenvalue no vector is defined: what they rebuild."""
    w, V = outputs
    if not sample.name.startswith("repeated"):
        return w, V[..., :, None, :] * V.conj()[..., None, :, :]
    return w, (V * w[..., None, :].to(V.dtype)) @ V.mH, V.mH @ V


def repeated(n: int) -> dict[str, torch.Tensor]:
    """Symmetric matrices with repeated eigenvalues, of size about 1."""
    complete = torch.ones(n, n, dtype=torch.float64) - torch.eye(n, dtype=torch.float64)
    edges = torch.zeros(n, n, dtype=torch.float64)
    for i in range(0, n - 1, 2):
        edges[i, i + 1] = edges[i + 1, i] = 1.0
    star = torch.zeros(n, n, dtype=torch.float64)
    star[0, 1:] = star[1:, 0] = 1.0
    block = torch.tensor([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 3.0]], dtype=torch.float64)
    copies = torch.zeros(n, n, dtype=torch.float64)
    for i in range(0, n - 2, 3):
        copies[i : i + 3, i : i + 3] = block
    ramp = torch.arange(1, n + 1, dtype=torch.float64)
    return {
        "identity": torch.eye(n, dtype=torch.float64),
        "zero": torch.zeros(n, n, dtype=torch.float64),
        "complete": complete / n,
        "disjoint-edges": edges,
        "star": star,
        "block-copies": copies,
        "rank-1": ramp[:, None] * ramp / n**3,
    }


def separated(g: torch.Generator, batch: tuple[int, ...], n: int, *, scale: float = 1.0, dtype=torch.float64):
    """Random Hermitian matrices whose eigenvalues lie between -scale and scale, at least half a mean gap apart."""
    Q = torch.linalg.qr(torch.randn(*batch, n, n, generator=g, dtype=dtype))[0]
    steps = torch.rand(*batch, n, generator=g, dtype=torch.float64) + 0.5
    w = torch.cumsum(steps, -1)
    w = 2 * w / w[..., -1:] - 1
    A = (Q * (scale * w)[..., None, :].to(dtype)) @ Q.mH
    return (A + A.mH) / 2


def samples(g: torch.Generator) -> list[Sample]:
    def normal(*shape: int, dtype=torch.float64):
        A = torch.randn(shape, generator=g, dtype=dtype)
        return A + A.mH

    small = separated(g, (2,), 4)
    found = [
        Sample("typical", (separated(g, (2, 9), 19),)),
        Sample("length-1", (normal(3, 1, 1),), {"hermitise": True}, gradcheck=True),
        Sample("odd", (separated(g, (5,), 3),)),
        Sample("hermitised", (small,), {"hermitise": True}, gradcheck=True),
        Sample("hermitised-mask", (small,), {"hermitise": True, "grad": "mask", "UPLO": "U"}, gradcheck=True),
        Sample("hermitised-raw", (small,), {"hermitise": True, "grad": "raw"}, gradcheck=True),
        Sample("n-2", (separated(g, (33,), 2),), {"grad": "mask"}),
        Sample("n-5", (separated(g, (17,), 5),), {"grad": "raw"}),
        Sample("n-16", (separated(g, (3,), 16),)),
        Sample("n-31", (separated(g, (2,), 31),)),
        Sample("n-32", (separated(g, (2,), 32),)),
        Sample("n-33", (separated(g, (2,), 33),)),
        Sample("one-matrix", (separated(g, (), 6),)),
        Sample("empty", (normal(0, 19, 19),)),
        Sample("permuted", (separated(g, (5,), 4).permute(2, 1, 0).contiguous().permute(2, 1, 0),)),
        Sample("strided", (torch.cat([separated(g, (3,), 6)] * 2, -1)[..., :6],)),
        Sample("upper-triangle", (separated(g, (3,), 7).triu(),), {"UPLO": "U"}),
        Sample("lower-triangle", (separated(g, (3,), 7).tril(),)),
        Sample("scaled-down", (separated(g, (3,), 19, scale=1e-15),)),
        Sample("scaled-up", (separated(g, (3,), 19, scale=1e15),)),
        Sample("repeated-nearly", (normal(40, 19, 19),), gradients=False),
        Sample("complex", (separated(g, (3,), 8, dtype=torch.complex128),)),
        Sample("complex-1", (normal(3, 1, 1, dtype=torch.complex128),), {"hermitise": True}),
        Sample("complex-2", (separated(g, (33,), 2, dtype=torch.complex128),), {"grad": "raw"}),
        Sample("complex-19", (separated(g, (2, 9), 19, dtype=torch.complex128).triu(),), {"UPLO": "U"}),
        Sample("complex-31", (separated(g, (), 31, dtype=torch.complex128),), {"grad": "mask"}),
        Sample("complex-32", (separated(g, (2,), 32, dtype=torch.complex128),)),
        Sample("complex-small", (separated(g, (), 3, dtype=torch.complex128),), {"hermitise": True}, gradcheck=True),
        Sample("complex-large", (separated(g, (), 48, dtype=torch.complex128),), {"grad": "mask"}),
        Sample("complex-n-70", (separated(g, (2,), 70, dtype=torch.complex128),)),
        Sample("n-70", (separated(g, (3,), 70),), {"UPLO": "U", "grad": "mask"}),
        Sample("conj-view", (separated(g, (3,), 5, dtype=torch.complex128).conj(),), {"UPLO": "U"}),
    ]
    found += [Sample(f"repeated-{n}", (torch.stack(list(repeated(n).values())),), gradients=False) for n in (3, 19, 32)]
    return found


def _call(function=spine.eigh, A=None, *args, **kwargs):
    return lambda: function(torch.eye(3) if A is None else A, *args, **kwargs)


def _misuse(function):
    return (
        (_call(function, torch.zeros(2, 3, 4)), ValueError, "`A` must be square in `n`: got 4 and 3"),
        (_call(function, torch.zeros(3)), ValueError, r"`A` must have the shape \(..., n, n\): got \(3,\)"),
        (_call(function, torch.eye(3).int()), TypeError, "`A` must be one of .*: got int32"),
        (_call(function, [[1.0]]), TypeError, "`A` must be a tensor: got list"),
        (_call(function, None, "X"), ValueError, "`UPLO` must be one of 'L', 'U': got 'X'"),
    )


# LAPACK in float64, the reference, has errors of its own: a few eps of max|w|, 5 n eps in vectors (n <= 70 here) whose
# gaps are about max|w|/n.
_FLOOR_ULPS = 5.0 * 70


def _without_grad(sample: Sample) -> Sample:
    return replace(sample, kwargs={name: value for name, value in sample.kwargs.items() if name != "grad"})


SPECS = (
    OpSpec(
        "eigh",
        op=_hermitised(spine.eigh),
        reference=_hermitised(_reference),
        samples=samples,
        view=_view,
        floor_ulps=_FLOOR_ULPS,
        errors=(
            *_misuse(spine.eigh),
            (_call(grad="exact"), ValueError, "`grad` must be one of 'auto', 'lorentz', 'mask', 'raw': got 'exact'"),
            (_call(gap_floor=0.0), ValueError, "`gap_floor` must be a number > 0: got 0"),
            (_call(grad="mask", gap_floor=-1.0), ValueError, "`gap_floor` must be a number >= 0: got -1"),
            (_call(gap_floor="wide"), TypeError, "`gap_floor` must be a number: got str"),
            (_call(grad="raw", gap_floor=0.1), ValueError, "`gap_floor` has no meaning for grad='raw': got 0.1"),
        ),
    ),
    OpSpec(
        "eigvalsh",
        op=_hermitised(spine.eigvalsh),
        reference=_hermitised(torch.linalg.eigvalsh),
        samples=lambda g: [_without_grad(sample) for sample in samples(g)],
        floor_ulps=_FLOOR_ULPS,
        errors=_misuse(spine.eigvalsh),
    ),
)
