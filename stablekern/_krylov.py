"""Conjugate gradients in plain torch, for many systems at once: what runs where no kernel holds a whole solve.

Every system is a row of the last dimension and stops by itself. A recurrence is followed only as far as it can be
trusted: where it claims to be done, or has used up the digits that it started with, the row's true residual is taken,
and the row starts again from there while that still halves. At each start it is scaled to the size of 1 by a power of
two, so that no square leaves the range of the dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Bits of `info`. From NON_FINITE on there is no solution.
MAXITER, INDEFINITE, BREAKDOWN, NON_FINITE, ASYMMETRIC = 1, 2, 4, 8, 16
# What the matrix is: Hermitian, complex symmetric, any. The places are the codes in schemas and kernels.
METHODS = ("cg", "cocg", "cgne")
_COCG, _CGNE = 1, 2
_BLIND_STEPS = 32  # between true residuals, where the host may not look whether one is due
Product = Callable[[Tensor], Tensor]


class Outcome(NamedTuple):
    """x (..., n); for each system its status, its iterations (both int32) and the norm of b - A x."""

    x: Tensor
    info: Tensor
    iterations: Tensor
    residual: Tensor


class Operator(NamedTuple):
    """A over the power of two `exponent` (..., 1), so that its size is about 1; its adjoint only for CGNE."""

    product: Product
    exponent: Tensor
    adjoint: Product | None = None
    preconditioner: Product | None = None


class Control(NamedTuple):
    """Tolerances, relative to |b| and absolute, (..., 1); how many products; and how often the host looks, 0: never."""

    rtol: Tensor
    atol: Tensor
    maxiter: int
    looks: int = 1


def size_of(v: Tensor) -> Tensor:
    """The largest modulus of a real or imaginary part in each row (..., 1); NaN where one is."""
    parts = torch.view_as_real(v.resolve_conj()).flatten(-2) if v.is_complex() else v
    return parts.abs().amax(-1, keepdim=True)


def exponent_of(size: Tensor) -> Tensor:
    """k with 2^k <= size < 2^(k+1), int32; 0 for what has none."""
    k = torch.frexp(size).exponent - 1
    return torch.where((size > 0) & torch.isfinite(size), k, 0)


def times_power(v: Tensor, k: Tensor) -> Tensor:
    """v 2^k in two factors, neither of which is out of range where the product is not."""
    half = torch.div(k, 2, rounding_mode="floor")
    one = torch.ones_like(k, dtype=v.dtype.to_real())
    return v * torch.ldexp(one, half) * torch.ldexp(one, k - half)


def norm_of(v: Tensor) -> Tensor:
    return torch.linalg.vector_norm(v, dim=-1, keepdim=True)


def hermitian_dot(u: Tensor, v: Tensor) -> Tensor:
    """u^H v in each row (..., 1)."""
    return (u.conj() * v).sum(-1, keepdim=True)


def bilinear_dot(u: Tensor, v: Tensor) -> Tensor:
    """u^T v in each row (..., 1)."""
    return (u * v).sum(-1, keepdim=True)


class _Rows:
    """The state of all systems. `running` ones iterate, `waiting` ones are due for their true residual."""

    def __init__(self, A: Operator, b: Tensor, x0: Tensor | None, control: Control, method: int, info: Tensor) -> None:
        self.A, self.method = A, method
        size = size_of(b)
        self.scale = exponent_of(size)  # of b; all is in its units from here on
        self.b = times_power(b, -self.scale)
        absolute = times_power(control.atol, -self.scale)
        self.threshold = torch.maximum(control.rtol * norm_of(self.b), absolute)
        self.at_zero = x0 is None
        self.x = torch.zeros_like(self.b) if x0 is None else times_power(x0, A.exponent - self.scale)
        zero, readable = size == 0, torch.isfinite(size) & torch.isfinite(size_of(self.x))
        self.x = torch.where(zero, 0.0, self.x)
        self.info = torch.where(zero, 0, torch.where(readable, info, info | NON_FINITE))
        self.iterations = torch.zeros_like(self.info)
        self.waiting, self.running = ~zero & (self.info == 0), torch.zeros_like(zero)
        self.residual = torch.zeros_like(self.threshold)
        self.before = torch.full_like(self.threshold, torch.inf)  # the true residual at the row's last start
        self.r = self.p = self.b
        self.rz, self.shift, self.target = self.inner(self.b, self.b), torch.zeros_like(self.scale), self.threshold
        self.pair: tuple[Tensor, Tensor] | None = None

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """The inner product in which the method's directions are conjugate."""
        return bilinear_dot(u, v) if self.method == _COCG else hermitian_dot(u, v).real

    def direction(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """z, along which the search goes on from r, and its product with r."""
        if self.A.adjoint is not None and self.method == _CGNE:
            return self.A.adjoint(r), norm_of(r).square()
        z = r if self.A.preconditioner is None else self.A.preconditioner(r)
        return z, self.inner(r, z)

    def settle(self, rows: Tensor, *, last: bool = False) -> None:
        """Take the true residual of `rows`: they are done, stuck, or start again; none starts at the `last` call."""
        r = self.b if self.at_zero else self.b - self.A.product(self.x)
        self.at_zero = False
        shift = exponent_of(size_of(r))
        r = times_power(r, -shift)
        norm = norm_of(r)
        residual = times_power(norm, shift)
        self.residual = torch.where(rows, residual, self.residual)
        done = residual <= self.threshold
        self.info = torch.where(rows & done, 0, self.info)
        open_rows = rows & ~done & (self.info == 0)
        self.waiting = self.waiting & ~rows
        if last:
            self.info = torch.where(open_rows, MAXITER, self.info)
            return
        falls = residual <= self.before / 2
        self.info = torch.where(open_rows & ~falls, BREAKDOWN, self.info)
        start = open_rows & falls
        z, rz = self.direction(r)
        # A second start is there because rounding stood between the recurrence and the truth: it aims lower.
        aim = torch.where(torch.isfinite(self.before), self.threshold / 4, self.threshold)
        target = torch.maximum(times_power(aim, -shift), torch.finfo(r.dtype).eps * norm)
        for name, value in (("r", r), ("p", z), ("rz", rz), ("shift", shift), ("target", target), ("before", residual)):
            setattr(self, name, torch.where(start, value, getattr(self, name)))
        self.running = self.running | start

    def advance(self) -> None:
        """One iteration of the running rows."""
        p, q = self.p, self.A.product(self.p)
        pq = hermitian_dot(p, p).real if self.method == _CGNE else self.inner(p, q)
        alpha = self.rz / pq
        # Without a preconditioner |alpha| |A| is at most the condition number (CGNE: its square), and |A| about 1: a
        # longer step leads along what A has no hold of.
        eps = torch.finfo(p.dtype).eps ** (2 if self.method == _CGNE else 1)
        usable = alpha.abs() * eps < (1.0 if self.A.preconditioner is None else torch.inf)
        if self.method != _COCG:
            usable = usable & (pq > 0)
        failed = self.running & ~usable
        cause = torch.where(torch.isfinite(pq), BREAKDOWN, NON_FINITE)
        cause = cause if self.method == _COCG else torch.where(pq < 0, INDEFINITE, cause)
        self.info = torch.where(failed, self.info | cause, self.info)
        running = self.running & usable
        self.x = torch.where(running, self.x + times_power(alpha * p, self.shift), self.x)
        self.r = torch.where(running, self.r - alpha * q, self.r)
        self.iterations = self.iterations + running
        close = running & (norm_of(self.r) <= self.target)
        self.waiting, self.running = self.waiting | failed | close, running & ~close
        z, rz = self.direction(self.r)
        self.p = torch.where(self.running, z + rz / self.rz * p, p)
        self.rz = torch.where(self.running, rz, self.rz)
        self.previous = (p, q)

    def refuse_asymmetry(self, limit: Tensor) -> None:
        """After the first step: <p, A p'> and <A p, p'> are one number, but for `limit` |p| |p'|, if A is what it must
        be. Both vectors are there anyway, and the second one lies where an asymmetry shows."""
        dot = bilinear_dot if self.method == _COCG else hermitian_dot
        p, q = self.previous
        gap = (dot(p, self.A.product(self.p)) - dot(q, self.p)).abs()
        crooked = self.running & (gap > limit * norm_of(p) * norm_of(self.p))
        self.info = torch.where(crooked, self.info | ASYMMETRIC, self.info)
        self.running = self.running & ~crooked

    def outcome(self) -> Outcome:
        failed = self.info >= NON_FINITE
        x = torch.where(failed, torch.nan, times_power(self.x, self.scale - self.A.exponent))
        residual = torch.where(failed, torch.nan, times_power(self.residual, self.scale))
        return Outcome(x, self.info[..., 0].to(torch.int32), self.iterations[..., 0].to(torch.int32), residual[..., 0])


def solve(
    A: Operator,
    b: Tensor,  # (..., n)
    x0: Tensor | None,
    control: Control,
    method: int,
    info: Tensor,  # (..., 1): what is known of the systems before
    symmetry: Tensor | None = None,  # (..., 1): what a Hermitian (or symmetric) A may seem to lack, by rounding
) -> Outcome:
    """A x = b in each row."""
    rows = _Rows(A, b, x0, control, method, info)
    rows.settle(rows.waiting)
    every = control.looks or _BLIND_STEPS
    for step in range(control.maxiter):
        if step % every == 0:
            if control.looks:
                due, running = torch.stack((rows.waiting.any(), rows.running.any())).tolist()
                if due:
                    rows.settle(rows.waiting)
                    running = bool(rows.running.any())
                if not running:
                    break
            elif step:
                rows.settle(rows.waiting)
        rows.advance()
        if step == 0 and symmetry is not None and method != _CGNE:
            rows.refuse_asymmetry(symmetry)
    rows.settle(rows.waiting | rows.running, last=True)
    return rows.outcome()


def nothing(b: Tensor) -> Outcome:
    """The outcome of systems without unknowns, or of none."""
    info, iterations = (torch.zeros(b.shape[:-1], dtype=torch.int32, device=b.device) for _ in range(2))
    return Outcome(torch.empty_like(b), info, iterations, torch.zeros_like(info, dtype=b.dtype.to_real()))
