// Batched eigendecomposition of small Hermitian matrices (n <= 32), and its backward: a warp or a part of one each.
//
// Compiled by NVRTC for one size and one type at a time:
//   SK_REAL     float or double
//   SK_COMPLEX  0, or 1 for complex matrices of it
//   SK_N        the size n, 1 to 32
//   SK_LANES    lanes per matrix: a power of two, n or more, 4 or more; a warp works on 32 / SK_LANES matrices
//   SK_WARPS    warps per block; they share nothing and never wait for each other
//   SK_EIGH_FWD, SK_EIGVALSH_FWD, SK_EIGH_BWD   defined for the kernels that are wanted
// Element (i, j) belongs to lane j.
//
//   1. The matrix is scaled by a power of two to size 1; a non-finite one is replaced by zero and reported.
//   2. Householder tridiagonalisation A = Q T Q^H (Golub & Van Loan, 8.3.1), from the last column. Each lane holds its
//      column in registers; u and q of the rank-2 update pass through shared memory, 16 bytes per load. Complex
//      couplings are made real by a diagonal of phases, which goes into Q.
//   3. Q is formed in registers, a column per lane, and laid down in shared memory, a vector per row.
//   4. Implicit QL with Wilkinson's shift. Lane i holds d_i and e_i; every lane computes the same recurrence and turns
//      its own component of two neighbouring vectors, so nothing is exchanged but d and e.
//   5. Rank, fix signs or phases, scale back: eigenvectors leave as rows.
//
// Why not Jacobi, which batched solvers of this size usually take: of a parallel two-sided one, the multiplications and
// shuffles alone are about 220 instructions of a warp per round of n / 2 rotations; a sweep has n - 1 rounds, and 6 to
// 8 sweeps converge: 29 000 at n = 19. Here 2 takes 206 instructions per column, 3 takes 70, and 4 takes 37 for each of
// 1.7 n^2 / 2 rotations (counted in the binary for sm_90, float, n = 19): 17 000 in all. The recurrence of 4 is a chain
// of some 100 cycles per rotation, hidden by other warps: at n = 19 in float a matrix needs 1.6 KB of shared memory and
// 64 to 66 registers per thread, so that 28 or 32 warps take turns on a multiprocessor. Its vectors are read and
// written once per rotation, without bank conflicts (odd row strides).
//
// Every result is a function of its own matrix alone, whichever lanes and block computed it: the sums are in a fixed
// order, there are no atomics, and where groups of one warp part ways the others are masked.
#include "warp.h"

namespace stablekern {

constexpr int kN = SK_N;
#if SK_COMPLEX
using Element = Complex<SK_REAL>;
#else
using Element = SK_REAL;
#endif
using Real = SK_REAL;
constexpr bool kComplex = SK_COMPLEX;
SK_DEVICE Element from_real(Real x) { return FromReal<Element>::real(x); }
SK_DEVICE Element splat(Real x) { return FromReal<Element>::splat(x); }

constexpr int kLanes = SK_LANES, kWarps = SK_WARPS;
constexpr int kGroups = 32 / kLanes;
constexpr int kWords = kPack<Element>;
constexpr int kPadded = (kN + kWords - 1) / kWords * kWords;
static_assert(kN >= 1 && kPadded <= kLanes && kLanes <= 32 && (kLanes & (kLanes - 1)) == 0, "SK_N, SK_LANES");

constexpr int kMaxSweeps = 30;          // per eigenvalue on average, as LAPACK's steqr; two are usual
constexpr Real kCouplingTolerance = 1;  // couplings up to this many eps ||T|| are deflated
constexpr int kNotConverged = 1, kNonFinite = 2;  // bits of `info`
enum Mode { kAuto = 0, kLorentz = 1, kMask = 2, kRaw = 3 };

// This thread's place: its lane within the group, its group's number in the block, and the item of the group. Groups
// past the end of the batch repeat its last item and do not store.
struct Place {
  int lane, group;
  long long item;
  bool past_warp, past_item;
};

SK_DEVICE Place place_of(long long batch) {
  const int thread = static_cast<int>(threadIdx.x);
  Place place;
  place.lane = thread % kLanes;
  place.group = thread / kLanes;
  const long long first = static_cast<long long>(blockIdx.x) * (kWarps * kGroups);
  place.item = first + place.group;
  place.past_warp = first + thread / 32 * kGroups >= batch;
  place.past_item = place.item >= batch;
  if (place.past_item) place.item = batch - 1;
  return place;
}

// A power of two near `size` and its inverse, both normal numbers.
struct Scale {
  Real down, up;
};
SK_DEVICE Scale scale_of(Real size) {
  const int exponent = max(-Limits<Real>::exponent, min(Limits<Real>::exponent, ilogb(size)));
  return {scalbn(Real(1), -exponent), scalbn(Real(1), exponent)};
}

// ---- forward -------------------------------------------------------------------------------------------------------

struct alignas(16) ForwardShared {
  static constexpr int kStride = kN | 1;  // odd: a column falls on different banks
  Element u[kPadded], q[kPadded];
  Element tile[kN * kStride];
};

// Column `lane` of the scaled matrix, from one triangle. Returns the power of two that scales back; 0 if an entry of
// either triangle is not finite.
SK_DEVICE Real load_matrix(const Element* matrix, bool upper, int lane, ForwardShared& s, Element* a) {
  constexpr int stride = ForwardShared::kStride;
  Real largest = 0;
  bool finite = true;
#pragma unroll
  for (int r = 0; r < kN; ++r) {
    a[r] = lane < kN ? matrix[r * kN + lane] : Element{};
    finite = finite && is_finite(a[r]);
    if (r == lane) a[r] = from_real(real_part(a[r]));
    if (upper ? r <= lane : r >= lane) largest = fmax(largest, largest_part(a[r]));
  }
  finite = group_ballot<kLanes>(!finite) == 0;
  largest = group_max<kLanes>(largest);
  const Scale scale = scale_of(finite ? largest : Real(1));
#pragma unroll
  for (int r = 0; r < kN; ++r) {
    if (lane < kN && (upper ? r <= lane : r >= lane)) {
      const Element x = finite ? scaled(a[r], scale.down) : Element{};
      s.tile[r * stride + lane] = x;
      s.tile[lane * stride + r] = conjugate(x);
    }
  }
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kN; ++r) a[r] = lane < kN ? s.tile[r * stride + lane] : Element{};
  __syncwarp();
  return finite ? scale.up : Real(0);
}

// T's diagonal d and couplings e (of i with i + 1), in lane i each; what H_i = I - inverse_h u u^H is made of,
// inverse_h in lane i, u in row i of the tile; and the phase of column i of Q that makes T real.
struct Tridiagonal {
  Real d, e, inverse_h;
  Element phase;
};

SK_DEVICE Tridiagonal tridiagonalise(int lane, ForwardShared& s, Element* a) {
  constexpr int stride = ForwardShared::kStride;
  Tridiagonal t{0, 0, 0, from_real(1)};
  Element turn = from_real(1);
#pragma unroll 1
  for (int i = kN - 1; i > 0; --i) {
    if (lane == i) {
#pragma unroll
      for (int c = 0; c < kN; ++c) s.u[c] = a[c];
    }
    __syncwarp();
    Element u = lane < i ? s.u[lane] : Element{};
    const Element alpha = s.u[i - 1];
    const Real diagonal = real_part(s.u[i]);
    const Real rest = group_sum<kLanes>(lane < i - 1 ? square_of(u) : Real(0)), square = square_of(alpha);
    const bool reduced = rest < kSquareFloor<Real>;  // nothing to eliminate
    const Real norm = sqrt(square + rest), size = sqrt(square);
    const Element phase = phase_of(alpha, square < kSquareFloor<Real> ? Real(0) : size);
    const Real inverse_h = reduced ? Real(0) : 1 / (norm * (norm + size));
    const Element side = reduced ? phase : scaled(phase, Real(-1));  // the coupling is `side` times its modulus
    const Real coupling = reduced ? size : norm;
    turn = multiply_add(turn, side, Element{});
    if (lane == i) {
      t.d = diagonal;
      t.inverse_h = inverse_h;
    }
    if (lane == i - 1) {
      t.e = kComplex ? coupling : coupling * real_part(side);
      if constexpr (kComplex) t.phase = turn;
      u = scaled(phase, size + norm);
    }
    __syncwarp();  // all have read column i
    if (lane < kPadded) s.u[lane] = u;
    if (lane < i) s.tile[i * stride + lane] = u;
    __syncwarp();

    Element p{};
#pragma unroll
    for (int c = 0; c < kPadded; c += kWords) {
      if (c < i) {
        const Pack<Element> us = load_pack(s.u + c);
#pragma unroll
        for (int k = 0; k < kWords && c + k < kN; ++k) p = conj_multiply_add(a[c + k], us.item[k], p);
      }
    }
    p = scaled(p, inverse_h);
    // u^H A u / h is of A's size; 1 / h^2 might overflow.
    const Real half = group_sum<kLanes>(real_part(conj_multiply_add(u, p, Element{}))) * (inverse_h * Real(-0.5));
    const Element q = lane < i ? scaled_add(u, half, p) : Element{};
    if (lane < kPadded) s.q[lane] = q;
    __syncwarp();
    const Element minus_u = scaled(conjugate(u), Real(-1)), minus_q = scaled(conjugate(q), Real(-1));
#pragma unroll
    for (int c = 0; c < kPadded; c += kWords) {
      if (c < i) {
        const Pack<Element> us = load_pack(s.u + c), qs = load_pack(s.q + c);
#pragma unroll
        for (int k = 0; k < kWords && c + k < kN; ++k)
          a[c + k] = multiply_add(qs.item[k], minus_u, multiply_add(us.item[k], minus_q, a[c + k]));
      }
    }
    __syncwarp();  // all have read u
  }
  if (lane == 0) t.d = real_part(a[0]);
  return t;
}

// Row i of the tile becomes column i of Q = H_(n-1) ... H_1, times its phase.
SK_DEVICE void form_q(int lane, const Tridiagonal& t, ForwardShared& s, Element* z) {
  constexpr int stride = ForwardShared::kStride;
#pragma unroll
  for (int c = 0; c < kN; ++c) z[c] = from_real(c == lane ? 1 : 0);
#pragma unroll 1
  for (int i = 1; i < kN; ++i) {
    Element* buffer = i % 2 == 0 ? s.u : s.q;  // the other one may still be read
    if (lane < kPadded) buffer[lane] = lane < i ? s.tile[i * stride + lane] : Element{};
    const Real inverse_h = from_lane<kLanes>(t.inverse_h, i);
    __syncwarp();
    Element inner{};
#pragma unroll
    for (int c = 0; c < kPadded; c += kWords) {
      if (c < i) {
        const Pack<Element> us = load_pack(buffer + c);
#pragma unroll
        for (int k = 0; k < kWords && c + k < kN; ++k) inner = conj_multiply_add(us.item[k], z[c + k], inner);
      }
    }
    inner = scaled(inner, -inverse_h);
#pragma unroll
    for (int c = 0; c < kPadded; c += kWords) {
      if (c < i) {
        const Pack<Element> us = load_pack(buffer + c);
#pragma unroll
        for (int k = 0; k < kWords && c + k < kN; ++k) z[c + k] = multiply_add(us.item[k], inner, z[c + k]);
      }
    }
  }
  __syncwarp();
  if (lane < kN) {
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      Element x = z[c];
      if constexpr (kComplex) x = multiply_add(x, t.phase, Element{});
      s.tile[lane * stride + c] = x;
    }
  }
  __syncwarp();
}

// Implicit QL: d becomes the eigenvalues, in no order; with Vectors the rows of the tile are turned along. False if
// this group's matrix did not converge.
//
// In each round a group takes one sweep over its own lowest unreduced block l..m; the loop runs over the rows of all
// groups' blocks, since the lanes of a warp stay together.
template <bool Vectors>
SK_DEVICE bool implicit_ql(int lane, Real& d, Real& e, ForwardShared& s) {
  constexpr int stride = ForwardShared::kStride;
  constexpr Real floor = kSquareFloor<Real>;
  const Real threshold = group_max<kLanes>(fabs(d) + fabs(e)) * (Limits<Real>::epsilon * kCouplingTolerance);
  const bool holds = Vectors && lane < kN;
  Element* component = s.tile + lane;
#pragma unroll 1
  for (int round = 0;; ++round) {
    const bool coupled = !(fabs(e) <= threshold);
    const unsigned rows = group_ballot<kLanes>(coupled);
    if (round == kMaxSweeps * kN) return rows == 0;
    const int l = rows == 0 ? 0 : __ffs(static_cast<int>(rows)) - 1;
    const int m = l + __ffs(static_cast<int>(~(rows >> l))) - 1;
    int first = rows == 0 ? kN : l, last = m;
    if constexpr (kGroups > 1) {
      for (int step = kLanes; step < 32; step *= 2) {
        first = min(first, __shfl_xor_sync(kWholeWarp, first, step, 32));
        last = max(last, __shfl_xor_sync(kWholeWarp, last, step, 32));
      }
    }
    if (last == 0) return true;

    const Real d_l = from_lane<kLanes>(d, l), d_next = from_lane<kLanes>(d, l + 1), e_l = from_lane<kLanes>(e, l);
    const Real half = (d_next - d_l) * Real(0.5), root = sqrt(fma(half, half, e_l * e_l));
    const Real denominator = half + copysign(root, half);
    const Real shift = d_l - (denominator == 0 ? Real(0) : e_l * e_l / denominator);
    Real g = from_lane<kLanes>(d, m) - shift, sine = 1, cosine = 1;
    Real base = from_lane<kLanes>(d, last);
    Real d_i = from_lane<kLanes>(d, last - 1), e_i = from_lane<kLanes>(e, last - 1);
    Element carry = holds ? component[last * stride] : Element{};
    // The row in which this lane's d is computed, and its e: couplings inside the block change, not the one below it.
    const bool inside = l <= lane && lane < m;
    const int d_row = lane - 1, e_row = inside ? lane - 1 : -1;
#pragma unroll 2
    for (int i = last - 1; i >= first; --i) {
      // On their way while the recurrence is computed.
      const Real d_below = from_lane<kLanes>(d, i - 1), e_below = from_lane<kLanes>(e, i - 1);  // i = 0: unused
      const Element vector = holds ? component[i * stride] : Element{};

      const bool on = kGroups == 1 || (l <= i && i < m);
      const Real f = sine * e_i, h = cosine * e_i, square = fma(f, f, g * g);
      const bool trivial = square < floor;
      const Real inverse = inverse_root(trivial ? floor : square);
      const Real coupling = on ? square * inverse : g;  // g where the group's sweep ended one row above
      if (i == e_row) e = coupling;
      if (on) {
        sine = trivial ? Real(0) : f * inverse;
        cosine = trivial ? Real(1) : g * inverse;
      }
      const Real r = fma(d_i - base, sine, (cosine + cosine) * h);
      if (i == d_row) d = on ? fma(sine, r, base) : base;
      base = on ? fma(-sine, r, d_i) : d_i;
      g = on ? fma(cosine, r, -h) : g;
      if (holds) {
        const Real turn = on ? sine : Real(0), keep = on ? cosine : Real(1);
        component[(i + 1) * stride] = scaled_add(vector, turn, scaled(carry, keep));
        carry = scaled_add(vector, keep, scaled(carry, -turn));
      }
      d_i = d_below;
      e_i = e_below;
    }
    if (lane == first) {
      d = base;
      if (inside) e = g;
    }
    if (holds) component[first * stride] = carry;
  }
}

// Row i of the tile, a vector without its sign or phase, to row rank(i) of the result; `rank` in lane i.
SK_DEVICE void store_vectors(int lane, int rank, bool store, Real poison, ForwardShared& s, Element* vectors) {
  constexpr int stride = ForwardShared::kStride;
  __syncwarp();
  // The first of the components of largest modulus, found by lane i for vector i.
  const Element* mine = s.tile + (lane < kN ? lane : 0) * stride;
  Real largest = modulus(mine[0]);
  Element pivot = mine[0];
  int at = 0;
#pragma unroll 4
  for (int c = 1; c < kN; ++c) {
    const Element x = mine[c];
    const Real size = modulus(x);
    if (size > largest) {
      largest = size;
      pivot = x;
      at = c;
    }
  }
  const Element factor = conjugate(phase_of(pivot, largest));
#pragma unroll 1
  for (int i = 0; i < kN; ++i) {
    const int row = from_lane<kLanes>(rank, i);
    const Element by = from_lane<kLanes>(factor, i);
    // Adding zero makes -0 a +0: its sign would tell of rotations that only neighbours needed.
    Element x = multiply_add(lane < kN ? s.tile[i * stride + lane] : Element{}, by, from_real(0));
    if constexpr (kComplex) {
      const int pivot_at = from_lane<kLanes>(at, i);
      const Real size = from_lane<kLanes>(largest, i);
      if (lane == pivot_at) x = from_real(size);
    }
    if (store && lane < kN) vectors[row * kN + lane] = sum(x, splat(poison));
  }
}

template <bool Vectors>
SK_DEVICE void solve(const Element* matrices, long long batch, bool upper, Real* values, Element* vectors, int* info) {
  __shared__ ForwardShared shared[kWarps * kGroups];
  const Place place = place_of(batch);
  if (place.past_warp) return;
  const int lane = place.lane;
  ForwardShared& s = shared[place.group];

  Element a[kN];
  const Real up = load_matrix(matrices + place.item * (kN * kN), upper, lane, s, a);
  Tridiagonal t = tridiagonalise(lane, s, a);
  if constexpr (Vectors) form_q(lane, t, s, a);
  const bool converged = implicit_ql<Vectors>(lane, t.d, t.e, s);

  // The place in ascending order, equal values in the order they come.
  int rank = 0;
#pragma unroll 4
  for (int j = 0; j < kN; ++j) {
    const Real other = from_lane<kLanes>(t.d, j);
    rank += other < t.d || (other == t.d && j < lane);
  }
  const bool store = !place.past_item, failed = up == 0 || !converged;
  const Real poison = failed ? Real(nan("")) : Real(0);
  if (store && lane < kN) values[place.item * kN + rank] = fma(t.d, up, poison);
  if (store && lane == 0) info[place.item] = (up == 0 ? kNonFinite : 0) | (converged ? 0 : kNotConverged);
  if constexpr (Vectors) store_vectors(lane, rank, store, poison, s, vectors + place.item * (kN * kN));
}

// ---- backward ------------------------------------------------------------------------------------------------------

struct alignas(16) BackwardShared {
  // A row starts on a 16-byte word. An odd number of words apart, so that a column takes four banks in turn at worst.
  static constexpr int kStride = (kPadded / kWords | 1) * kWords;
  Element rows[kN * kStride], work[kN * kStride];
};

// sum_c op(row[c]) mine[c], where `row` is in shared memory, the same for the whole group; op conjugates, or not.
template <bool ConjugateRow, bool ConjugateMine>
SK_DEVICE Element dot(const Element* row, const Element* mine) {
  Element chain[kWords] = {};
#pragma unroll
  for (int c = 0; c < kPadded; c += kWords) {
    const Pack<Element> pack = load_pack(row + c);
#pragma unroll
    for (int k = 0; k < kWords; ++k) {
      const Element x = ConjugateRow ? conjugate(pack.item[k]) : pack.item[k];
      chain[k] = multiply_add(x, ConjugateMine ? conjugate(mine[c + k]) : mine[c + k], chain[k]);
    }
  }
  if constexpr (kWords == 4) return sum(sum(chain[0], chain[1]), sum(chain[2], chain[3]));
  if constexpr (kWords == 2) return sum(chain[0], chain[1]);
  return chain[0];
}

// What fixing the phase of the pivot of row `lane` of the eigenvectors does to its gradient.
SK_DEVICE void fix_phase(const Element* row, Element* gradient) {
  if constexpr (kComplex) {
    Real turn = 0, largest = 0;
    int at = 0;
#pragma unroll
    for (int c = 0; c < kN; ++c) {
      const Element x = row[c];
      turn += imaginary_part(conj_multiply_add(x, gradient[c], Element{}));
      // The largest component that is real: by the moduli alone rounding could take another one for the pivot.
      const Real size = imaginary_part(x) == 0 ? real_part(x) : Real(0);
      if (size > largest) {
        largest = size;
        at = c;
      }
    }
#pragma unroll
    for (int c = 0; c < kN; ++c)
      if (c == at) gradient[c] = add_imaginary(gradient[c], -turn / largest);
  }
}

struct GapRule {
  int mode;
  Real gap_floor;  // relative to max|w|
  Real noise;      // of the rule that calls a numerator roundoff: relative to the longest column of M
};

// (M_ij - conj(M_ji)) F(w_j - w_i); `limit` is what counts as roundoff; `gap` and `floor` are in the same unit.
SK_DEVICE Element weighed(Element upper, Element lower, Real gap, int mode, Real floor, Real limit) {
  const Element numerator = difference(upper, conjugate(lower));
  if (mode == kRaw) return scaled(numerator, 1 / gap);
  if (mode == kMask) return fabs(gap) > floor ? scaled(numerator, 1 / gap) : Element{};
  if (mode == kAuto && modulus(numerator) <= limit) return Element{};
  // The smallest number keeps 0/0 away: a floor of its root, far below any gap that rounding leaves.
  return scaled(numerator, gap / fmax(fma(gap, gap, floor * floor), Limits<Real>::smallest));
}

// The length of the longest column of M in `work`, whose entries have the modulus `largest` at most.
SK_DEVICE Real longest_column(int lane, Real largest, const Element* work) {
  constexpr int stride = BackwardShared::kStride;
  const Scale scale = scale_of(largest);
  Real square = 0;
#pragma unroll 4
  for (int i = 0; i < kN; ++i) square += square_of(scaled(work[i * stride + (lane < kN ? lane : 0)], scale.down));
  return group_max<kLanes>(sqrt(square)) * scale.up;
}

// M in `work` becomes S; `slope` is its diagonal. Each pair belongs to one lane, which writes both of its entries.
SK_DEVICE void weigh_pairs(int lane, Real value, Real slope, Real limit, const GapRule& rule, Element* work) {
  constexpr int stride = BackwardShared::kStride;
  // Gaps are measured in units of a power of two near max|w|: no square of theirs over- or underflows harmfully.
  const Real size = group_max<kLanes>(lane < kN ? fabs(value) : Real(0));
  const Real usable = size >= Limits<Real>::smallest && is_finite(size) ? size : Real(1);
  const Scale unit = scale_of(usable);
  const Real relative = value * unit.down, floor = rule.gap_floor * (usable * unit.down);
#pragma unroll 1
  for (int step = 1; 2 * step <= kN; ++step) {
    const int other = lane + step < kN ? lane + step : lane + step - kN;  // lanes past the matrix: any, and unused
    const Real there = from_lane<kLanes>(relative, other & (kLanes - 1));
    if (lane < kN && (2 * step < kN || lane < other)) {
      Element &here = work[lane * stride + other], &back = work[other * stride + lane];
      here = scaled(weighed(here, back, there - relative, rule.mode, floor, limit), Real(0.5) * unit.down);
      back = conjugate(here);
    }
  }
  if (lane < kN) work[lane * stride + lane] = from_real(slope);
}

SK_DEVICE void backward(const Real* values, const Element* vectors, const Real* grad_values,
                        const Element* grad_vectors, long long batch, const GapRule& rule, Element* result) {
  constexpr int stride = BackwardShared::kStride;
  __shared__ BackwardShared shared[kWarps * kGroups];
  const Place place = place_of(batch);
  if (place.past_warp) return;
  const int lane = place.lane;
  const bool holds = lane < kN;
  BackwardShared& s = shared[place.group];
  const long long at = place.item * (kN * kN);

  bool used = false;  // some incoming gradient is not 0
  const Real value = holds ? values[place.item * kN + lane] : Real(0);
  const Real slope = grad_values && holds ? grad_values[place.item * kN + lane] : Real(0);
  used = used || slope != 0;
#pragma unroll 4
  for (int r = 0; r < kN; ++r) {
    const Element gradient = grad_vectors && holds ? grad_vectors[at + r * kN + lane] : Element{};
    used = used || largest_part(gradient) != 0 || !is_finite(gradient);
    if (lane < kPadded) {
      s.rows[r * stride + lane] = holds ? vectors[at + r * kN + lane] : Element{};
      s.work[r * stride + lane] = gradient;
    }
  }
  __syncwarp();

  Element mine[kPadded];
  Real limit = 0;
  if (grad_vectors) {  // M = V^H g
    Real largest = 0;
    const int row = (holds ? lane : 0) * stride;
#pragma unroll
    for (int c = 0; c < kPadded; ++c) mine[c] = s.work[row + c];
    fix_phase(s.rows + row, mine);
    __syncwarp();
#pragma unroll 1
    for (int i = 0; i < kN; ++i) {
      const Element x = dot<true, false>(s.rows + i * stride, mine);
      largest = fmax(largest, modulus(x));
      if (holds) s.work[i * stride + lane] = x;
    }
    __syncwarp();
    if (rule.mode == kAuto) {
      largest = group_max<kLanes>(holds ? largest : Real(0));
      limit = rule.noise * longest_column(lane, largest, s.work);
      __syncwarp();
    }
  }
  weigh_pairs(lane, value, slope, limit, rule, s.work);
#pragma unroll
  for (int c = 0; c < kPadded; ++c) mine[c] = holds && c < kN ? s.rows[c * stride + lane] : Element{};
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < kN; ++i) {  // S V^H, transposed, over the vectors
    const Element x = dot<false, true>(s.work + i * stride, mine);
    if (holds) s.rows[lane * stride + i] = x;
  }
  __syncwarp();
#pragma unroll 1
  for (int b = 0; b < kN; ++b) {  // V (S V^H), transposed
    const Element x = dot<false, false>(s.rows + b * stride, mine);
    if (holds) s.work[b * stride + lane] = x;
  }
  __syncwarp();

  const bool failed = from_lane<kLanes>(value, 0) != from_lane<kLanes>(value, 0);
  const bool poisoned = group_ballot<kLanes>(used) != 0;
  if (place.past_item || !holds) return;
#pragma unroll 4
  for (int r = 0; r < kN; ++r) {
    const Element x = scaled(s.work[lane * stride + r], Real(0.5));
    const Element y = scaled(conjugate(s.work[r * stride + lane]), Real(0.5));
    Element out = sum(x, y);
    if (failed) out = splat(poisoned ? Real(nan("")) : Real(0));
    result[at + r * kN + lane] = out;
  }
}

}  // namespace stablekern

// One block per multiprocessor is asked for, so that no register is spilled for the sake of more.
#define SK_KERNEL __global__ void __launch_bounds__(32 * stablekern::kWarps, 1)

extern "C" {

#ifdef SK_EIGH_FWD
SK_KERNEL eigh_fwd(const stablekern::Element* matrices, long long batch, int upper, stablekern::Real* values,
                   stablekern::Element* vectors, int* info) {
  stablekern::solve<true>(matrices, batch, upper != 0, values, vectors, info);
}
#endif

#ifdef SK_EIGVALSH_FWD
SK_KERNEL eigvalsh_fwd(const stablekern::Element* matrices, long long batch, int upper, stablekern::Real* values,
                       int* info) {
  stablekern::solve<false>(matrices, batch, upper != 0, values, nullptr, info);
}
#endif

#ifdef SK_EIGH_BWD
SK_KERNEL eigh_bwd(const stablekern::Real* values, const stablekern::Element* vectors,
                   const stablekern::Real* grad_values, const stablekern::Element* grad_vectors, long long batch,
                   int mode, double gap_floor, double noise_kappa, stablekern::Element* result) {
  using stablekern::Real;
  const stablekern::GapRule rule{mode, static_cast<Real>(gap_floor),
                                 static_cast<Real>(noise_kappa) * stablekern::Limits<Real>::epsilon};
  stablekern::backward(values, vectors, grad_values, grad_vectors, batch, rule, result);
}
#endif
}
