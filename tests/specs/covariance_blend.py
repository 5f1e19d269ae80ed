"""Specs of the operations on covariances: `covariance_blend`, `sample_covariance`, `eigengap_hinge`,
`subspace_residual`, `mvdr_denominator`, `chol_solve_safe` and `ridge_lstsq`."""

from __future__ import annotations

import torch
from torch import Tensor

from stablekern.ops import (
    chol_solve_safe,
    covariance_blend,
    eigengap_hinge,
    mvdr_denominator,
    ridge_lstsq,
    sample_covariance,
    subspace_residual,
)

from . import OpSpec, Sample
from .eigh import separated

COMPLEX = torch.complex128


def normal(g: torch.Generator, *shape: int, dtype=COMPLEX) -> Tensor:
    return torch.randn(shape, generator=g, dtype=dtype)


def covariances(g: torch.Generator, *shape: int, dtype=COMPLEX) -> Tensor:
    """Definite, with condition numbers below about 10."""
    X = normal(g, *shape, shape[-1], dtype=dtype)
    return X @ X.mH / shape[-1] + torch.eye(shape[-1], dtype=dtype)


def blend_samples(g: torch.Generator) -> list[Sample]:
    per_item = {name: torch.rand(3, generator=g, dtype=torch.float64) for name in ("beta", "shrink", "loading")}
    return [
        Sample("typical", (covariances(g, 4, 12), covariances(g, 4, 12)), {"beta": 0.3, "shrink": 0.1, "loading": 1.0}),
        # One channel is always 1: the gradient is exactly 0, the reference's is rounding.
        Sample("length-1", (covariances(g, 3, 1), covariances(g, 3, 1)), {"beta": 0.5}, gradients=False),
        Sample("odd", (covariances(g, 2, 3, dtype=torch.float64),), {"shrink": 0.2}, gradcheck=True),
        Sample("not-hermitian", (normal(g, 1, 2, 2) + 4 * torch.eye(2),), {"loading": 0.1}, gradcheck=True),
        Sample("per-item", (covariances(g, 3, 2), covariances(g, 3, 2)), per_item),
        Sample(
            "tiles", (normal(g, 2, 37, 37) + 8 * torch.eye(37), covariances(g, 2, 37)), {"beta": 0.3, "loading": 0.1}
        ),
        Sample("tiles-real", (covariances(g, 2, 33, dtype=torch.float64),), {"shrink": 0.1}),
        Sample("tiles-per-item", (covariances(g, 3, 34), covariances(g, 3, 34)), per_item),
        Sample("target-trace", (covariances(g, 5),), {"target_trace": 288.0}),
        Sample("empty", (covariances(g, 0, 5),)),
        Sample("tiny", (1e-30 * covariances(g, 2, 4), 1e25 * covariances(g, 2, 4)), {"beta": 0.4}),
        Sample("permuted", (covariances(g, 4, 3).permute(0, 2, 1), covariances(g, 4, 3)), {"beta": 0.4}),
        Sample("conj-view", (covariances(g, 4, 3).conj(),)),
    ]


def snapshot_samples(g: torch.Generator) -> list[Sample]:
    return [
        Sample("typical", (normal(g, 3, 20, 6),)),
        Sample("length-1", (normal(g, 3, 1, 6),)),
        Sample("odd", (normal(g, 7, 3, dtype=torch.float64),), {"center": True, "ddof": 1}, gradcheck=True),
        Sample("target-trace", (normal(g, 2, 4, 3),), {"target_trace": 3.0}, gradcheck=True),
        Sample("empty", (normal(g, 0, 5, 3),), {"target_trace": 3.0}),
        Sample("permuted", (normal(g, 4, 3, 6).permute(2, 1, 0),), {"center": True}),
        Sample("conj-view", (normal(g, 4, 3).conj(),)),
    ]


def gap_samples(g: torch.Generator) -> list[Sample]:
    mixed = torch.tensor([1, 4, 2, 3, 1])
    return [
        Sample("typical", (separated(g, (4,), 12, dtype=COMPLEX), 3, 1.0)),
        Sample("length-1", (separated(g, (1,), 2), 1, 3.0), gradcheck=True),
        Sample("odd", (separated(g, (5,), 5), mixed, 1.0), gradcheck=True),
        Sample("inactive", (separated(g, (5,), 5), 2, 0.0)),
        Sample("not-hermitian", (separated(g, (3,), 4, dtype=COMPLEX).triu() * 2, 1, 4.0)),
        Sample("one-matrix", (separated(g, (), 33), 5, 1.0)),
        Sample("empty", (separated(g, (0,), 5), 2, 1.0)),
    ]


def residual_samples(g: torch.Generator) -> list[Sample]:
    some = torch.tensor([[True, False, True], [True, True, True]])
    return [
        Sample("typical", (covariances(g, 4, 12), normal(g, 4, 12, 3))),
        Sample("length-1", (covariances(g, 1, 2), normal(g, 1, 2, 1)), gradcheck=True),
        Sample("odd", (normal(g, 2, 5, 5), normal(g, 2, 5, 3), some), {"ridge": 0.01}, gradcheck=True),
        Sample("one-matrix", (covariances(g, 9, dtype=torch.float64), normal(g, 9, 2, dtype=torch.float64))),
        Sample("scaled", (1e25 * covariances(g, 2, 4), 1e-25 * normal(g, 2, 4, 2)), dtypes=(torch.float64,)),
        Sample("empty", (covariances(g, 0, 5), normal(g, 0, 5, 2))),
    ]


def mvdr_samples(g: torch.Generator) -> list[Sample]:
    return [
        Sample("typical", (covariances(g, 4, 12), normal(g, 12, 7), 0.01)),
        Sample("length-1", (covariances(g, 1, 1), normal(g, 1, 1, 1)), gradcheck=True),
        Sample("odd", (covariances(g, 2, 3), normal(g, 2, 3, 2), 0.1), gradcheck=True),
        Sample("real", (covariances(g, 3, 5, dtype=torch.float64), normal(g, 5, 4, dtype=torch.float64))),
        Sample("empty", (covariances(g, 0, 5), normal(g, 5, 4))),
        Sample("no-vectors", (covariances(g, 2, 5), normal(g, 5, 0))),
        Sample("conj-view", (covariances(g, 2, 5).conj(), normal(g, 5, 3).conj(), 0.5)),
    ]


def solve_samples(g: torch.Generator) -> list[Sample]:
    return [
        Sample("typical", (covariances(g, 4, 12), normal(g, 4, 12, 3))),
        Sample("length-1", (covariances(g, 1, 1), normal(g, 1, 1, 1)), gradcheck=True),
        Sample("odd", (covariances(g, 2, 3), normal(g, 2, 3, 2)), gradcheck=True),
        Sample("one-table", (covariances(g, 3, 5), normal(g, 5, 2))),
        Sample("real", (covariances(g, 5, dtype=torch.float64), normal(g, 5, 2, dtype=torch.float64)), gradcheck=True),
        Sample("empty", (covariances(g, 0, 5), normal(g, 0, 5, 2))),
    ]


def ridge_samples(g: torch.Generator) -> list[Sample]:
    alphas = torch.rand(3, generator=g, dtype=torch.float64) + 0.1
    return [
        Sample("typical", (normal(g, 4, 6, 20), normal(g, 4, 6), 0.1)),
        Sample("length-1", (normal(g, 1, 1, 1), normal(g, 1, 1), 0.5), gradcheck=True),
        Sample("odd", (normal(g, 3, 2, 3), normal(g, 3, 2), alphas), gradcheck=True),
        Sample("tall", (normal(g, 3, 4, 2), normal(g, 3, 4), alphas), gradcheck=True),
        Sample("real", (normal(g, 5, 9, dtype=torch.float64), normal(g, 5, dtype=torch.float64), 0.3)),
        Sample("empty", (normal(g, 0, 3, 5), normal(g, 0, 3), 0.5)),
    ]


def _blend_reference(*args, **kwargs):
    R = covariance_blend.reference(*args, **kwargs)
    return R, torch.zeros(R.shape[:-2], dtype=torch.int32)


def _solve_reference(R, A):
    batch = R.shape[:-2]
    zeros = torch.zeros(batch, dtype=R.dtype.to_real())
    return chol_solve_safe.reference(R, A), torch.zeros(batch, dtype=torch.int32), zeros


def _call(function, *args, **kwargs):
    return lambda: function(*args, **kwargs)


_BLEND, _COVARIANCE = covariance_blend.covariance_blend, sample_covariance.sample_covariance
_HINGE, _RESIDUAL = eigengap_hinge.eigengap_hinge, subspace_residual.subspace_residual
_MVDR, _SOLVE, _RIDGE = mvdr_denominator.mvdr_denominator, chol_solve_safe.chol_solve_safe, ridge_lstsq.ridge_lstsq
_EYE, _ONES = torch.eye(3), torch.ones(3, 2)
_SQUARE = (torch.zeros(3, 2), ValueError, "must be square in `n`: got 2 and 3")

# Condition numbers of about 10, sums of up to 20 terms: LAPACK in float64, the reference, has errors of that size.
_FLOOR_ULPS = 100.0

SPECS = (
    OpSpec(
        "covariance_blend",
        op=covariance_blend.covariance_blend_ex,
        reference=_blend_reference,
        samples=blend_samples,
        floor_ulps=_FLOOR_ULPS,
        errors=(
            (_call(_BLEND, torch.zeros(3, 2)), ValueError, "`R_pred` must be square in `n`: got 2 and 3"),
            (_call(_BLEND, _EYE.int()), TypeError, "`R_pred` must be one of .*: got int32"),
            (_call(_BLEND, _EYE, torch.eye(2), beta=0.1), ValueError, r"`R_samp` must have the shape .*: got \(2, 2\)"),
            (_call(_BLEND, _EYE, beta=0.1), ValueError, "`beta` other than 0 needs `R_samp`: got 0.1"),
            (_call(_BLEND, _EYE, _EYE, beta=1.1), ValueError, "`beta` must be a number >= 0 and <= 1: got 1.1"),
            (_call(_BLEND, _EYE, shrink=-0.1), ValueError, "`shrink` must be a number >= 0 and <= 1: got -0.1"),
            (_call(_BLEND, _EYE, loading=-0.1), ValueError, "`loading` must be a number >= 0: got -0.1"),
            (_call(_BLEND, _EYE, shrink=torch.ones(2)), ValueError, "`shrink` must be a number or have the batch"),
            (_call(_BLEND, _EYE, shrink=torch.tensor(1)), TypeError, "`shrink` must be a number or a real tensor"),
            (_call(_BLEND, _EYE, target_trace=0.0), ValueError, "`target_trace` must be a number > 0: got 0"),
            (_call(_BLEND, _EYE, dims=(0, -2)), ValueError, r"`dims` must be two different .*: got \(0, -2\)"),
            (_call(_BLEND, _EYE, dims=(0, 2)), ValueError, r"`dims` must be two different .*: got \(0, 2\)"),
            (_call(_BLEND, _EYE, dims=-1), TypeError, "`dims` must be two integers: got -1"),
        ),
    ),
    OpSpec(
        "sample_covariance",
        op=_COVARIANCE,
        reference=sample_covariance.reference,
        samples=snapshot_samples,
        floor_ulps=_FLOOR_ULPS,
        errors=(
            (_call(_COVARIANCE, torch.zeros(3)), ValueError, r"`X` must have the shape \(..., l, n\): got \(3,\)"),
            (_call(_COVARIANCE, torch.zeros(0, 3)), ValueError, r"`X` must hold at least one .*: got \(0, 3\)"),
            (_call(_COVARIANCE, _EYE, ddof=3), ValueError, "`ddof` must be between 0 and 2: got 3"),
            (_call(_COVARIANCE, _EYE, center=1), TypeError, "`center` must be a bool: got int"),
            (_call(_COVARIANCE, _EYE, target_trace=-1), ValueError, "`target_trace` must be a number > 0: got -1"),
        ),
    ),
    OpSpec(
        "eigengap_hinge",
        op=_HINGE,
        reference=eigengap_hinge.reference,
        samples=gap_samples,
        floor_ulps=5.0 * 33,
        dispatched=False,
        errors=(
            (_call(_HINGE, _SQUARE[0], 1, 1.0), *_SQUARE[1:]),
            (_call(_HINGE, _EYE, 3, 1.0), ValueError, "`k` must be between 1 and 2: got 3"),
            (_call(_HINGE, _EYE, 1.0, 1.0), TypeError, "`k` must be an integer: got float"),
            (_call(_HINGE, _EYE, torch.ones(()), 1.0), TypeError, "`k` must be an integer or .*: got torch.float32"),
            (_call(_HINGE, _EYE, torch.tensor([1]), 1.0), ValueError, r"`k` must have the batch .*: got \(1,\)"),
            (_call(_HINGE, _EYE, 1, -1.0), ValueError, "`margin` must be a number >= 0: got -1"),
        ),
    ),
    OpSpec(
        "subspace_residual",
        op=_RESIDUAL,
        reference=subspace_residual.reference,
        samples=residual_samples,
        floor_ulps=_FLOOR_ULPS,
        dispatched=False,
        errors=(
            (_call(_RESIDUAL, _SQUARE[0], _ONES), *_SQUARE[1:]),
            (_call(_RESIDUAL, torch.eye(2), _ONES), ValueError, "`A` and `R` disagree on `n`: got 3 and 2"),
            (_call(_RESIDUAL, _EYE[None], _ONES), ValueError, r"`A` must have the batch dim.*: got \(\) and \(1,\)"),
            (_call(_RESIDUAL, _EYE, _ONES, torch.ones(2)), TypeError, "`mask` must be one of bool: got float32"),
            (_call(_RESIDUAL, _EYE, _ONES, torch.ones(3).bool()), ValueError, r"`mask` must have .*: got \(3,\)"),
            (_call(_RESIDUAL, _EYE, _ONES, ridge=0.0), ValueError, "`ridge` must be a number > 0: got 0"),
        ),
    ),
    OpSpec(
        "mvdr_denominator",
        op=_MVDR,
        reference=mvdr_denominator.reference,
        samples=mvdr_samples,
        floor_ulps=_FLOOR_ULPS,
        dispatched=False,
        errors=(
            (_call(_MVDR, _SQUARE[0], _ONES), *_SQUARE[1:]),
            (_call(_MVDR, _EYE, torch.ones(2, 3)), ValueError, "`A` and `R` disagree on `n`: got 2 and 3"),
            (_call(_MVDR, _EYE, _ONES.double()), TypeError, "`A` and `R` must have one dtype"),
            (_call(_MVDR, _EYE, _ONES, -0.1), ValueError, "`loading` must be a number >= 0: got -0.1"),
        ),
    ),
    OpSpec(
        "chol_solve_safe",
        op=_SOLVE,
        reference=_solve_reference,
        samples=solve_samples,
        floor_ulps=_FLOOR_ULPS,
        dispatched=False,
        errors=(
            (_call(_SOLVE, _SQUARE[0], _ONES), *_SQUARE[1:]),
            (_call(_SOLVE, _EYE, torch.ones(2, 3)), ValueError, "`A` and `R` disagree on `n`: got 2 and 3"),
            (_call(_SOLVE, _EYE.half(), _ONES.half()), TypeError, "`R` must be one of .*: got float16"),
        ),
    ),
    OpSpec(
        "ridge_lstsq",
        op=_RIDGE,
        reference=ridge_lstsq.reference,
        samples=ridge_samples,
        # The derivative of the reference's QR holds 1 / sqrt(alpha) squared: 50 / 0.1 at most here.
        floor_ulps=500.0,
        dispatched=False,
        errors=(
            (_call(_RIDGE, _EYE, torch.ones(2), 1.0), ValueError, "`y` and `Phi` disagree on `m`: got 2 and 3"),
            (
                _call(_RIDGE, _EYE, torch.ones(1, 3), 1.0),
                ValueError,
                r"`y` must have the batch .*: got \(1,\) and \(\)",
            ),
            (_call(_RIDGE, _EYE, torch.ones(3), 0.0), ValueError, "`alpha` must be a number > 0: got 0"),
            (_call(_RIDGE, _EYE, torch.ones(3), torch.ones(2)), ValueError, r"`alpha` must be .*: got \(2,\) and \(\)"),
            (
                _call(_RIDGE, _EYE, torch.ones(3), torch.tensor(1)),
                TypeError,
                "`alpha` must be real, .*: got torch.int64",
            ),
        ),
    ),
)
