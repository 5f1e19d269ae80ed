"""Every epsilon, floor and switch point of the package: its value per dtype, why it is there, where it comes from.

Ops take these as defaults or send them through their schema, so that all backends compute with the same number; a
kernel holds no such literal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = [
    "BORN_FLOOR",
    "CAYLEY_DENSE_NODES",
    "CAYLEY_FACTOR_COST",
    "CAYLEY_FACTOR_TRUNCATION",
    "CAYLEY_MOST_TERMS",
    "CAYLEY_REAL_LIMIT",
    "CAYLEY_SPARSE_COST",
    "CAYLEY_TRUNCATION_ULPS",
    "CAYLEY_UNIT_GAIN",
    "CG_ASYMMETRY_ULPS",
    "CG_FACTOR_PRODUCTS",
    "CG_RTOL",
    "CG_WARN_FACTOR",
    "CHOLESKY_JITTER_LIMIT",
    "CHOLESKY_JITTER_ULPS",
    "CLIP_NORM_OFFSET",
    "CONSTANT_LOSS_MARGIN",
    "COSINE_EPS",
    "COSINE_GRAD_FLOOR",
    "COVARIANCE_TRACE_TOLERANCE",
    "EDGE_THRESHOLD",
    "EIGENPROJECTOR_GAP_ULPS",
    "EIGH_AUTO_GAP_ULPS",
    "EIGH_CHECK_ULPS",
    "EIGH_LORENTZ_GAP_FLOOR",
    "EIGH_MASK_GAP_ULPS",
    "EIGH_NOISE_KAPPA",
    "LAPLACIAN_ROTATION_ULPS",
    "LOW_LEARNING_RATE",
    "LOW_LEARNING_RATE_SHARE",
    "LR_FACTOR_FLOOR",
    "MAMBA_DT_INIT_FLOOR",
    "MAMBA_DT_MAX",
    "MAMBA_DT_MIN",
    "NORM_EPS",
    "OVERFLOW_SHARE",
    "STILL_WEIGHTS",
    "SUBSPACE_RIDGE",
    "Constant",
]


@dataclass(frozen=True)
class Constant:
    """A number with its reason. `constant.of(dtype)` is its value; `ulps` are multiples of the dtype's epsilon."""

    value: float
    reason: str
    source: str
    ulps: bool = False

    def of(self, dtype: torch.dtype = torch.float32) -> float:
        return self.value * torch.finfo(dtype).eps if self.ulps else self.value


EIGH_AUTO_GAP_ULPS = Constant(
    4.0,
    "eigenvalues are known to a few ulp of the largest one, so a smaller gap has no sign; as the width of a Lorentzian "
    "it bounds the gradient by 1/(8 eps max|w|) and changes gaps above 1e3 ulp by less than 1e-5",
    "backward stability of tridiagonal QL: Parlett, The Symmetric Eigenvalue Problem, sec. 8.14",
    ulps=True,
)
EIGH_LORENTZ_GAP_FLOOR = Constant(
    1e-3,
    "relative width of the Lorentzian for heads that see raw eigenvectors: bounds the gradient by 500/max|w|; without "
    "it two-cluster graphs have finite gradients a thousand times those of generic graphs",
    "Liao et al. 2019, arXiv:1903.09650, sec. III (broadening of eigenvector gradients)",
)
EIGH_MASK_GAP_ULPS = Constant(
    16.0,
    "pairs closer than the accuracy of the eigenvalues count as one eigenvalue",
    "as EIGH_AUTO_GAP_ULPS, with room for the accumulated rounding of n <= 32 sweeps",
    ulps=True,
)
EIGH_CHECK_ULPS = Constant(
    64.0,
    "times n: a decomposition whose residual or loss of orthogonality is larger is wrong, not inaccurate; solvers stay "
    "below 5 n eps, a corrupted one is off by 1",
    "as EIGH_AUTO_GAP_ULPS, an order of magnitude wider",
    ulps=True,
)
EIGH_NOISE_KAPPA = Constant(
    8.0,
    "a cotangent pair |M_ij - M_ji| below this many ulp of the longest column of M is rounding of a loss that treats "
    "the pair as one subspace (at most 2 ulp were seen, n = 2 to 256); dividing it by a tiny gap would make noise the "
    "largest entry of the gradient",
    "rounding of dot products is relative to the lengths of their factors, not to the result: Higham, Accuracy and "
    "Stability, sec. 3.1; bench/eigh_sweep.py measures it",
)
COSINE_EPS = Constant(
    1e-6,
    "norms below it are taken as it, so the cosine of a vanishing vector goes to 0 continuously",
    "cosine edges of the EEG detector",
)
COSINE_GRAD_FLOOR = Constant(
    1e-3,
    "the cosine's gradient is 1/|x|: this bounds it by 1000 per pair, where dividing by a clamped norm of 1e-6 lets it "
    "reach 1e6",
    "unit-scale features: three decades below their norm",
)
EDGE_THRESHOLD = Constant(1e-4, "weaker edges are dropped after the top-k selection", "adjacency of the EEG detector")
CLIP_NORM_OFFSET = Constant(
    1e-6,
    "added to the gradient norm before dividing by it: a zero gradient is not 0/0, and clipping equals torch's",
    "torch.nn.utils.clip_grad_norm_",
)

NORM_EPS = Constant(
    1e-5,
    "added to the mean square or the variance in a norm: a silent electrode gives 0, with a finite gradient, not 0/0",
    "the default of torch.nn.LayerNorm and of mamba_ssm's gated norm; checkpoints depend on it",
)
MAMBA_DT_MIN = Constant(
    1e-3,
    "smallest initial step size of a Mamba block: memory of about 1/(dt |A|) = 60 to 1000 steps",
    "mamba_ssm, class Mamba2, argument dt_min",
)
MAMBA_DT_MAX = Constant(
    0.1,
    "largest initial step size of a Mamba block: memory of up to ten steps",
    "mamba_ssm, class Mamba2, argument dt_max",
)
MAMBA_DT_INIT_FLOOR = Constant(
    1e-4,
    "the slope of the softplus at a step dt is about dt: a head that starts much lower hardly receives a gradient",
    "mamba_ssm, class Mamba2, argument dt_init_floor",
)
LAPLACIAN_ROTATION_ULPS = Constant(
    64.0,
    "within it the rows of a rotation count as orthonormal: the iteration that makes them so is quadratic, so it has "
    "converged to a few ulp or is far from it, because the subspaces before and after hardly overlap",
    "Newton-Schulz iteration: Higham, Functions of Matrices, sec. 8.3",
    ulps=True,
)

EIGENPROJECTOR_GAP_ULPS = Constant(
    4.0,
    "times sqrt(n): twice the largest spread of a repeated eigenvalue that LAPACK computes, n = 3 to 256, measured; a "
    "smaller gap cannot be told from 0, and as the width of a Lorentzian it bounds the gradient there",
    "the statistical growth of rounding in n steps: Higham, Accuracy and Stability, sec. 2.8",
    ulps=True,
)
CHOLESKY_JITTER_ULPS = Constant(
    4.0,
    "of the trace, a bound of the norm: the least shift that outweighs the rounding which makes the factorisation of a "
    "semidefinite matrix fail",
    "Higham, Accuracy and Stability, sec. 10.1 (Cholesky runs to completion unless cond(A) is about 1/eps)",
    ulps=True,
)
CHOLESKY_JITTER_LIMIT = Constant(
    1e-2,
    "of the mean eigenvalue: a matrix that needs a larger shift is no covariance with rounding errors, and a solution "
    "with it would answer another question",
    "the usual diagonal loading of adaptive beamformers, 1e-2 of the mean power",
)
SUBSPACE_RIDGE = Constant(
    1e-4,
    "added to the Gram matrix of unit columns: nearly parallel sources stay factorable in float32 (1e-4 is 800 ulp), "
    "and a well separated column keeps (1e-4)^2 of its own power in the residual",
    "the ridge of the subspace loss of the radio-localisation pipeline",
)

COVARIANCE_TRACE_TOLERANCE = Constant(
    1e-2,
    "of the target: a normalised trace is right to n eps, so a deviation of this size is a step that was left out (a "
    "load without a new normalisation doubles it), while half-precision storage stays within",
    "the sanity check of covariances in the radio-localisation pipeline, 1 %",
)

CG_RTOL = Constant(
    1e-6,
    "of |b|, in single precision, and its square in double: what CG reaches for condition numbers of some thousand, "
    "and far below the noise of a training step",
    "the attainable residual, eps |A| |x| / |b|: Greenbaum 1997",
)
CG_ASYMMETRY_ULPS = Constant(
    64.0,
    "of the largest entry: a matrix whose mirrored entries differ by more is not Hermitian but for rounding (sums of "
    "thousands of products differ by less)",
    "the statistical growth of rounding in n steps: Higham, Accuracy and Stability, sec. 2.8",
    ulps=True,
)
CG_WARN_FACTOR = Constant(
    10.0,
    "a residual above this many tolerances is no near miss: the solve has failed, and whoever uses x must know",
    "twice the decade within which the recurrence and the true residual usually differ",
)
CG_FACTOR_PRODUCTS = Constant(
    200.0,
    "products with a matrix that take as long as its Cholesky factorisation: 170 to 340 for n = 32 to 512, since small "
    "matrices are factored at a fraction of the machine's speed",
    "measured on 2 cores in float32; bench/cases/cg.py has n = 64",
)
LOW_LEARNING_RATE = Constant(
    1e-3,
    "of the base rate: a step of Adam moves a weight by about the rate, so a thousandth of a rate that was chosen to "
    "train in one run would need a thousand runs",
    "linear warm-up over several epochs, of which published runs saw the first hundred steps",
)
LOW_LEARNING_RATE_SHARE = Constant(
    5e-2,
    "of the run: half a cosine is below a thousandth of its peak for the last 2 % of its steps, which is meant",
    "arccos(1 - 2e-3) / pi = 0.02",
)
LR_FACTOR_FLOOR = Constant(
    2.0**-10,
    "halvings stop there: what a thousandth of the rate does not mend, a smaller one hides",
    "as LOW_LEARNING_RATE",
)
STILL_WEIGHTS = Constant(
    1e-6,
    "of their norm, over many steps: eight float32 ulp, so what moved may be rounding alone; one step of Adam at the "
    "usual rates moves weights of a usual size by 1e-3 to 1e-1 of it",
    "eps of float32",
)
CONSTANT_LOSS_MARGIN = Constant(
    1e-2,
    "of the loss of the best constant prediction: a mean of a hundred losses is known to about that",
    "a hundred batches whose losses scatter by 10 %",
)
OVERFLOW_SHARE = Constant(
    1e-2,
    "of the root of the largest number: products of two such operands, summed over 1e4 terms, leave the range; an "
    "infinity that comes from smaller ones is a division by 0, a logarithm of 0 or the like",
    "a square overflows from the root on; four decades for the number of terms in a sum",
)

BORN_FLOOR = Constant(
    1e-6,
    "of the mean power, added to each before the logarithm: an amplitude that crosses 0 would have a logit of -inf and "
    "a gradient of 1/|amplitude|",
    "the collapse of the complex language model, three decades of amplitude",
)
CAYLEY_TRUNCATION_ULPS = Constant(
    2.0,
    "what is cut off the expansion, and the residual at which an iteration stops, are of the size of the rounding in "
    "the products: eight layers of it move a norm by less than 1e-6 in float32",
    "each further term is a factor |q|, 4 to 30 for usual steps: Trefethen, Approximation Theory, ch. 8",
    ulps=True,
)
CAYLEY_MOST_TERMS = Constant(
    4096.0,
    "an expansion this long belongs to a |H| of 1e5 and more, where other methods are cheaper by far; also the most "
    "iterations of COCG, which needs no more than the expansion has terms",
    "the expansion's ratio is about 1 - 1/sqrt(a |H|), so that 16 sqrt(a |H|) terms reach float32",
)
CAYLEY_DENSE_NODES = Constant(
    4096.0,
    "a dense factor is made for no more nodes: its complex128 inverse takes 256 MB and half a minute on a CPU",
    "8 n^3 multiply-adds at the 10 GFLOP/s that a core reaches in double",
)
CAYLEY_REAL_LIMIT = Constant(
    32.0,
    "the error of the real factor is about a |H| ulp, from the cancellation in psi - i a H psi; above this it would "
    "show beside that of the matrix product, and U itself is formed",
    "relative error of a sum with terms of size a |H|: Higham, Accuracy and Stability, sec. 4.2",
)
CAYLEY_SPARSE_COST = Constant(
    1.3,
    "cost of one nonzero of H in the expansion, in multiply-adds of the dense kernel",
    "bench/cases/cayley_step.py, D = 256, on Zen 4 with AVX-512",
)
CAYLEY_FACTOR_COST = Constant(
    8.0,
    "cost of the dense factor per D^3, in multiply-adds of the dense kernel",
    "as CAYLEY_SPARSE_COST",
)
CAYLEY_FACTOR_TRUNCATION = Constant(
    1 / 64,
    "what is cut off the expansion of a dense factor, of what is cut off that of a token: every token has the same "
    "error from it, so that it must vanish beside the rounding of the factor",
    "the geometric tail of CAYLEY_TRUNCATION_ULPS: one to three terms more for usual steps",
)
CAYLEY_UNIT_GAIN = Constant(
    1.8,
    "how many times as fast the dense kernel is in float32 where a matrix unit multiplies (csrc/.../split_product.h)",
    "bench/cases/cayley_step.py, D = 256, dt = 1, on a Xeon with AMX",
)
