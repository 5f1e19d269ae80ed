// Eigendecomposition of small Hermitian matrices (n <= 32), one per SIMD lane: what the kernels built on it share.
//
// Every matrix takes the same instructions, with masks where they part ways, so no result depends on which lane, block,
// thread or batch it was computed in. All fused multiply-adds are written out as `fma` for the same reason: the
// compiler is left no choice that could differ between two instantiations.
//
// Per lane, after a kernel has loaded a matrix of about size 1 (`solve_lanes`):
//   1. Householder tridiagonalisation A = Q T Q^H (Golub & Van Loan, 8.3.1), rank-2 update fused with the next product;
//      of a complex matrix the phases of T's couplings go to Q, so that all that follows is real;
//   2. implicit QL with Wilkinson's shift for the eigenvalues alone;
//   3. implicit QL again from T with the eigenvalues now known as shifts, so that about one sweep deflates each
//      (the "ultimate shift"): the rotations are recorded
//   4. and then applied to Q, several columns at a time held in registers;
//   5. rank, fix signs, scale back, transpose out: eigenvectors leave as rows.
// Couplings |e| of the order of eps ||T|| are deflated: errors are relative to the norm of the matrix, as in LAPACK's
// syevd.
//
// Steps 2 and 3 are one scalar recurrence per lane, bound by latency, so several blocks of lanes take turns in it.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "stablekern/complex_simd.h"
#include "stablekern/simd.h"

namespace stablekern {

constexpr int kMaxN = 32;
constexpr int kMaxSweeps = 30;   // per eigenvalue on average, as LAPACK's steqr; two are usual
constexpr int kBlocks = 4;       // blocks of lanes that share the QL recurrence
constexpr int32_t kNotConverged = 1, kNonFinite = 2;  // bits of `info`
constexpr int kL1Bytes = 1 << 15;
constexpr int64_t kStreamBytes = int64_t{1} << 22;    // larger results go past the caches

// A square below this has lost relative accuracy to underflow; its root is still far below eps times a scaled matrix.
template <class T>
constexpr T kSquareFloor = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();

// Couplings up to this many eps ||T|| are deflated. One sweep with an exact shift leaves rounding of about one eps.
template <class T>
constexpr T kValueTolerance = T(0.5);
template <class T>
constexpr T kRecordTolerance = T(2);

template <class T>
struct Rotation {
  Vec<T> sine, cosine;
};
struct Sweep {
  int low, high, first;  // rows low..high, rotations from `first` on
};

// Brings what is needed next to the second-level cache, a few lines at a time between computations: all at once would
// have to wait for memory.
class Prefetcher {
 public:
  template <class T>
  void aim(const T* items, int64_t count) {
    next_ = reinterpret_cast<const char*>(items);
    left_ = (count * static_cast<int64_t>(sizeof(T)) + kLine - 1) / kLine;
  }
  SK_INLINE void advance(int lines) {
    for (; lines > 0 && left_ > 0; --lines, --left_, next_ += kLine) __builtin_prefetch(next_, 0, 2);
  }

 private:
  static constexpr int kLine = 64;
  const char* next_ = nullptr;
  int64_t left_ = 0;
};

constexpr int kStride = kMaxN | 1;  // odd: rows do not fall on the same cache sets

// Everything one thread needs for `Blocks` blocks of lanes.
template <class S, int Blocks>
struct alignas(64) Workspace {
  using T = RealOf<S>;
  static constexpr int kN = kMaxN, kStride = stablekern::kStride;
  static constexpr int kRotations = 3 * kN * kN / 4 + kN;  // 1.5 times n sweeps; when full they are applied early
  static constexpr int kSweeps = 4 * kN;

  Element<S> z[Blocks][kN * kStride];   // the matrix, then Q^T, then the eigenvectors as rows
  Element<S> staging[kN * kN];          // one block on its way in or out
  Vec<T> d[kN][Blocks], e[kN][Blocks];  // T: diagonal, and coupling of i with i + 1
  Vec<T> values[kN][Blocks], couplings[kN][Blocks];
  Vec<T> up[Blocks];    // scales back
  Prefetcher upcoming;  // may be aimed at the next block's items when one is loaded
  Mask<T> non_finite[Blocks], not_converged[Blocks];
  int max_rounds;  // of QL
  int used[Blocks], sweep_count[Blocks];
  Sweep sweeps[Blocks][kSweeps];
  Rotation<T> rotations[Blocks][kRotations];
};

// Memory that a thread keeps between calls: allocating it afresh would fault its pages in every time.
inline std::byte* scratch(std::size_t size) {
  struct Release {
    void operator()(std::byte* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  thread_local std::unique_ptr<std::byte, Release> memory;
  thread_local std::size_t capacity = 0;
  if (capacity < size) {
    memory.reset();
    capacity = 0;
    memory.reset(static_cast<std::byte*>(::operator new[](size, std::align_val_t{64})));
    capacity = size;
  }
  return memory.get();
}

template <class W>
W& workspace() {
  return *reinterpret_cast<W*>(scratch(sizeof(W)));
}

// ---- memory --------------------------------------------------------------------------------------------------------

// `length` consecutive values of each of `count` items, `pitch` apart, to one lane per item; absent lanes repeat the
// last item.
template <class T>
void gather_items(const T* items, int pitch, int length, int count, Vec<T>* out) {
  constexpr int lanes = kLanes<T>;
  const T* item[lanes];
  for (int lane = 0; lane < lanes; ++lane)
    item[lane] = items + static_cast<int64_t>(std::min(lane, count - 1)) * pitch;
  Vec<T> tile[lanes];
  int i = 0;
  for (; i + lanes <= length; i += lanes) {
    for (int lane = 0; lane < lanes; ++lane) tile[lane] = load(item[lane] + i);
    transpose<T>(tile);
    for (int k = 0; k < lanes; ++k) out[i + k] = tile[k];
  }
  if (i < length) {
    for (int lane = 0; lane < lanes; ++lane) tile[lane] = load_first(item[lane] + i, length - i);
    transpose<T>(tile);
    for (int k = 0; i + k < length; ++k) out[i + k] = tile[k];
  }
}

// The inverse: `length` values of the first `count` lanes, to items `length` apart.
template <class T>
void scatter_items(const Vec<T>* values, int length, int count, T* items) {
  constexpr int lanes = kLanes<T>;
  Vec<T> tile[lanes];
  for (int i = 0; i < length; i += lanes) {
    const int width = length - i < lanes ? length - i : lanes;
    for (int k = 0; k < lanes; ++k) tile[k] = values[i + (k < width ? k : width - 1)];
    transpose<T>(tile);
    for (int lane = 0; lane < count; ++lane) {
      T* to = items + static_cast<int64_t>(lane) * length + i;
      width == lanes ? store(to, tile[lane]) : store_first(to, tile[lane], width);
    }
  }
}

template <class T>
void copy_out(const T* from, int64_t length, bool past_caches, T* to) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  if (past_caches && reinterpret_cast<std::uintptr_t>(to) % kVectorBytes == 0)
    for (; i + lanes <= length; i += lanes) stream(to + i, load(from + i));
  if (i < length) std::memcpy(to + i, from + i, static_cast<std::size_t>(length - i) * sizeof(T));  // null if empty
}

// ---- Householder --------------------------------------------------------------------------------------------------

// sum_k x[k] y[k] in four chains, so that additions need not wait for each other.
template <class V>
SK_INLINE V dot(const V* x, const V* y, int length) {
  V sum[4] = {};
  int k = 0;
  for (; k + 4 <= length; k += 4)
    for (int chain = 0; chain < 4; ++chain) sum[chain] = fma(x[k + chain], y[k + chain], sum[chain]);
  for (int chain = 0; k < length; ++k, ++chain) sum[chain] = fma(x[k], y[k], sum[chain]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}
// Re sum_k x[k] conj(y[k]), and sum_k |x[k]|^2. The parts of complex elements follow each other in memory.
template <class S>
SK_INLINE Vec<RealOf<S>> real_dot(const Element<S>* x, const Element<S>* y, int length) {
  using V = Vec<RealOf<S>>;
  return dot(reinterpret_cast<const V*>(x), reinterpret_cast<const V*>(y), kParts<S> * length);
}
template <class S>
SK_INLINE Vec<RealOf<S>> sum_squares(const Element<S>* x, int length) {
  return real_dot<S>(x, x, length);
}

// Rows row..row+Rows of a Hermitian matrix, lower triangle: a -= u^H q + q^H u if `Update`; then p += v a for what
// these rows contribute, p[row..] being set. u, q, v and p are rows.
template <class S, int Rows, bool Update>
SK_INLINE void update_and_multiply(Element<S>* a, int stride, int row, const Element<S>* u, const Element<S>* q,
                                   const Element<S>* v, Element<S>* p) {
  // Copies in registers: the compiler cannot know that stores to a and p leave u, q and v alone.
  Element<S> minus_u[Rows], minus_q[Rows], vr[Rows], sum[Rows];
  Element<S>* rows[Rows];
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Update) minus_u[r] = -conj(u[row + r]), minus_q[r] = -conj(q[row + r]);
    vr[r] = v[row + r];
    sum[r] = Element<S>{};
    rows[r] = a + (row + r) * stride;
  }
  for (int k = 0; k < row; ++k) {
    const Element<S> vk = v[k];
    Element<S> pk = p[k], uk, qk;
    if constexpr (Update) uk = u[k], qk = q[k];
    for (int r = 0; r < Rows; ++r) {
      Element<S> x = rows[r][k];
      if constexpr (Update) {
        x = fma(minus_q[r], uk, fma(minus_u[r], qk, x));
        rows[r][k] = x;
      }
      sum[r] = fma_conj(x, vk, sum[r]);
      pk = fma(x, vr[r], pk);
    }
    p[k] = pk;
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c <= r; ++c) {
      Element<S> x = rows[r][row + c];
      if constexpr (Update) {
        x = fma(minus_q[r], -conj(minus_u[c]), fma(minus_u[r], -conj(minus_q[c]), x));
        if (c == r) x = element<S>(real_part(x));
        rows[r][row + c] = x;
      }
      sum[r] = fma_conj(x, vr[c], sum[r]);
      if (c < r) sum[c] = fma(x, vr[r], sum[c]);
    }
  }
  for (int r = 0; r < Rows; ++r) p[row + r] = sum[r];
}

template <class S, bool Update>
SK_INLINE void update_and_multiply_all(Element<S>* a, int stride, int size, const Element<S>* u, const Element<S>* q,
                                       const Element<S>* v, Element<S>* p) {
  constexpr int most = kIsComplex<S> ? 2 : 4;  // what the registers hold
  int row = 0;
  for (; row + most <= size; row += most) update_and_multiply<S, most, Update>(a, stride, row, u, q, v, p);
  switch (size - row) {
    case 3: return update_and_multiply<S, 3, Update>(a, stride, row, u, q, v, p);
    case 2: return update_and_multiply<S, 2, Update>(a, stride, row, u, q, v, p);
    case 1: return update_and_multiply<S, 1, Update>(a, stride, row, u, q, v, p);
  }
}

// Rows of Q^T so far, `size` - 1 long, times two reflectors: I - u w^T of length `size`, then I - u2 w2^T of length
// size + 1, `inner` = w . u2. Each row grows by the two columns in which it is still zero.
template <class S, int Rows>
SK_INLINE void reflect_rows(Element<S>* z, int stride, int size, const Element<S>* u, const Element<S>* w,
                            const Element<S>* u2, const Element<S>* w2, Element<S> inner) {
  Element<S> sum[Rows], sum2[Rows];
  for (int r = 0; r < Rows; ++r) sum[r] = sum2[r] = Element<S>{};
  for (int k = 0; k < size - 1; ++k) {
    for (int r = 0; r < Rows; ++r) {
      sum[r] = fma(z[r * stride + k], u[k], sum[r]);
      sum2[r] = fma(z[r * stride + k], u2[k], sum2[r]);
    }
  }
  for (int r = 0; r < Rows; ++r) {
    sum2[r] = fma(sum[r], inner, -sum2[r]);
    sum[r] = -sum[r];
  }
  for (int k = 0; k < size - 1; ++k)
    for (int r = 0; r < Rows; ++r) z[r * stride + k] = fma(sum2[r], w2[k], fma(sum[r], w[k], z[r * stride + k]));
  for (int r = 0; r < Rows; ++r) {
    z[r * stride + size - 1] = fma(sum2[r], w2[size - 1], sum[r] * w[size - 1]);
    z[r * stride + size] = sum2[r] * w2[size];
  }
}

// The rows of z, whose lower triangle holds the reflectors H_i = I - inverse_h[i] u^H u, u = row i, become Q^T with
// Q = H_(n-1) ... H_2. Two reflectors at a time: one would be bound by its stores.
template <class S>
SK_NOINLINE void form_q(Element<S>* z, int n, const Vec<RealOf<S>>* inverse_h) {
  using E = Element<S>;
  constexpr int stride = kStride;
  const Vec<RealOf<S>> unit = Vec<RealOf<S>>{} + RealOf<S>(1);
  const E zero{}, one = element<S>(unit);
  z[0] = one;
  int size = 2;  // of the next reflector; the leading block of size - 1 is formed
  if (n % 2 == 1 && n > 1) {
    const E u0 = z[2 * stride], u1 = z[2 * stride + 1], w0 = conj(u0) * inverse_h[2], w1 = conj(u1) * inverse_h[2];
    z[0] = fma(-u0, w0, one);
    z[1] = -u0 * w1;
    z[stride] = -u1 * w0;
    z[stride + 1] = fma(-u1, w1, one);
    size = 3;
  }
  constexpr int most = kIsComplex<S> ? 2 : 4;
  E w[kMaxN], w2[kMaxN];
  for (; size < n - 1; size += 2) {
    E *u = z + size * stride, *u2 = u + stride;
    for (int k = 0; k < size; ++k) w[k] = conj(u[k]) * inverse_h[size];
    for (int k = 0; k <= size; ++k) w2[k] = conj(u2[k]) * inverse_h[size + 1];
    const E inner = dot(w, u2, size);
    int r = 0;
    for (; r + most <= size - 1; r += most) reflect_rows<S, most>(z + r * stride, stride, size, u, w, u2, w2, inner);
    switch (size - 1 - r) {
      case 3: reflect_rows<S, 3>(z + r * stride, stride, size, u, w, u2, w2, inner); break;
      case 2: reflect_rows<S, 2>(z + r * stride, stride, size, u, w, u2, w2, inner); break;
      case 1: reflect_rows<S, 1>(z + r * stride, stride, size, u, w, u2, w2, inner); break;
    }
    // Two rows that were the identity's; the second is where u was.
    E* row = u - stride;
    const E first = -u[size - 1], second = fma(-first, inner, -u2[size - 1]), third = -u2[size];
    for (int k = 0; k < size; ++k) row[k] = fma(second, w2[k], k < size - 1 ? first * w[k] : fma(first, w[k], one));
    row[size] = second * w2[size];
    for (int k = 0; k < size; ++k) u[k] = third * w2[k];
    u[size] = fma(third, w2[size], one);
  }
  if (n > 1) {
    for (int k = 0; k < n - 1; ++k) z[k * stride + n - 1] = z[(n - 1) * stride + k] = zero;
    z[(n - 1) * stride + n - 1] = one;
  }
}

// T = Q^H A Q for the lower triangle a of A, which comes to hold the reflectors: see `form_q`.
template <class S>
struct Tridiagonal {
  static constexpr int kN = kMaxN;
  Vec<RealOf<S>> diagonal[kN], inverse_h[kN];
  Element<S> couplings[kN];  // T_(i+1)i
};

template <class S>
SK_NOINLINE void tridiagonalise(Element<S>* a, int n, Tridiagonal<S>& t, Prefetcher& upcoming) {
  using T = RealOf<S>;
  using E = Element<S>;
  constexpr int stride = kStride;
  E buffer[2][kMaxN];
  E* q = buffer[0];  // of the reflector whose update is still due
  E* p = buffer[1];
  const Vec<T> zero{}, one = zero + T(1);

  for (int i = n - 1; i > 0; --i) {
    upcoming.advance(2 * kParts<S> * n);  // an n-th of a block, or two if the lanes are narrow
    E* row = a + i * stride;
    if (i < n - 1) {
      const E* u = row + stride;
      const E minus_u = -conj(u[i]), minus_q = -conj(q[i]);
      for (int k = 0; k <= i; ++k) row[k] = fma(minus_q, u[k], fma(minus_u, q[k], row[k]));
    }
    t.diagonal[i] = real_part(row[i]);
    if (i == 1) {
      t.couplings[0] = row[0];
      break;
    }
    const Vec<T> rest = sum_squares<S>(row, i - 1);
    const E alpha = row[i - 1];
    const Mask<T> reduced = less(rest, splat(kSquareFloor<T>));  // nothing to eliminate
    const Vec<T> norm = sqrt(add_square(alpha, rest)), size = modulus(alpha);
    const E beta = toward(alpha, -norm);
    t.couplings[i - 1] = select(reduced, alpha, beta);
    row[i - 1] = alpha - beta;
    const Vec<T> inverse_h = select(reduced, zero, one / select(reduced, one, norm * (norm + size)));
    t.inverse_h[i] = inverse_h;

    if (i < n - 1)
      update_and_multiply_all<S, true>(a, stride, i, row + stride, q, row, p);
    else
      update_and_multiply_all<S, false>(a, stride, i, nullptr, nullptr, row, p);
    // u A u^H / h is of A's size; 1 / h^2 might overflow.
    const Vec<T> minus_half = (real_dot<S>(p, row, i) * inverse_h) * (inverse_h * T(-0.5));
    for (int k = 0; k < i; ++k) p[k] = fma(minus_half, row[k], p[k] * inverse_h);
    E* next = q;
    q = p;
    p = next;
  }
  if (n > 2) a[0] = fma(-conj(q[0]), a[2 * stride], fma(-conj(a[2 * stride]), q[0], a[0]));
  t.diagonal[0] = real_part(a[0]);
}

// The rows of z become Q^T (unless !Vectors) with A = Q T Q^H and real T, which goes to column `block` of d and e.
template <class S, int Blocks, bool Vectors>
void reduce_block(Workspace<S, Blocks>& w, int block, int n) {
  using T = RealOf<S>;
  Element<S>* z = w.z[block];
  Tridiagonal<S> t;
  tridiagonalise<S>(z, n, t, w.upcoming);
  if constexpr (Vectors) form_q<S>(z, n, t.inverse_h);
  const Vec<T> zero{};
  for (int i = 0; i < n; ++i) w.d[i][block] = t.diagonal[i];
  w.e[n - 1][block] = zero;
  if constexpr (!kIsComplex<S>) {
    for (int i = 0; i < n - 1; ++i) w.e[i][block] = t.couplings[i];
  } else {
    // T = D |T| D^H with a unitary diagonal D: Q takes D.
    const Vec<T> floor = zero + kSquareFloor<T>, half = zero + T(0.5), three_halves = zero + T(1.5);
    Element<S> phase = element<S>(zero + T(1));
    for (int i = n - 2; i >= 0; --i) {
      const Vec<T> square = add_square(t.couplings[i], zero), inverse = reciprocal_sqrt(max(square, floor));
      const Mask<T> negligible = less(square, floor);
      w.e[i][block] = select(negligible, zero, square * inverse);
      if constexpr (Vectors) {
        phase = select(negligible, phase, phase * (conj(t.couplings[i]) * inverse));
        // One of Newton's steps to modulus 1: rounding would add up over the chain.
        phase = phase * fnma(add_square(phase, zero), half, three_halves);
        for (int k = 0; k < n; ++k) z[i * kStride + k] = z[i * kStride + k] * phase;
      }
    }
  }
}

// ---- QL -----------------------------------------------------------------------------------------------------------

// Recorded rotations to Columns columns of z: rows i and i + 1 for i = high - 1 down to low, row i carried.
template <class T, int Columns>
void apply_sweeps(Vec<T>* z, int stride, const Sweep* sweeps, int count, const Rotation<T>* rotations) {
  for (int t = 0; t < count; ++t) {
    const Sweep sweep = sweeps[t];
    const Rotation<T>* rotation = rotations + sweep.first;
    Vec<T>* row = z + sweep.high * stride;
    Vec<T> carry[Columns];
    for (int k = 0; k < Columns; ++k) carry[k] = row[k];
    for (int i = sweep.high - 1; i >= sweep.low; --i, ++rotation) {
      row -= stride;
      const Vec<T> s = rotation->sine, c = rotation->cosine;
      for (int k = 0; k < Columns; ++k) {
        const Vec<T> below = row[k];
        row[stride + k] = fma(s, below, c * carry[k]);
        carry[k] = fma(c, below, -(s * carry[k]));
      }
    }
    for (int k = 0; k < Columns; ++k) row[k] = carry[k];
  }
}

template <class S, int Blocks>
void apply_recorded(Workspace<S, Blocks>& w, int n) {
  using T = RealOf<S>;
  const int columns = kParts<S> * n;  // rotations are real: parts are columns of their own
  constexpr int stride = kParts<S> * Workspace<S, Blocks>::kStride, widest = 8;
  const int slabs = (columns + widest - 1) / widest;
  for (int block = 0; block < Blocks; ++block) {
    for (int slab = 0, column = 0; slab < slabs; ++slab) {
      const int width = (columns - column + slabs - slab - 1) / (slabs - slab);
      Vec<T>* z = reinterpret_cast<Vec<T>*>(w.z[block]) + column;
      const Sweep* sweeps = w.sweeps[block];
      const Rotation<T>* rotations = w.rotations[block];
      const int count = w.sweep_count[block];
      switch (width) {
        case 1: apply_sweeps<T, 1>(z, stride, sweeps, count, rotations); break;
        case 2: apply_sweeps<T, 2>(z, stride, sweeps, count, rotations); break;
        case 3: apply_sweeps<T, 3>(z, stride, sweeps, count, rotations); break;
        case 4: apply_sweeps<T, 4>(z, stride, sweeps, count, rotations); break;
        case 5: apply_sweeps<T, 5>(z, stride, sweeps, count, rotations); break;
        case 6: apply_sweeps<T, 6>(z, stride, sweeps, count, rotations); break;
        case 7: apply_sweeps<T, 7>(z, stride, sweeps, count, rotations); break;
        case 8: apply_sweeps<T, 8>(z, stride, sweeps, count, rotations); break;
      }
      column += width;
    }
    w.used[block] = w.sweep_count[block] = 0;
  }
}

// Implicit QL on T = (d, e), in place: d becomes the eigenvalues, in no order. With `Record` the first shift at l is
// w.values[l], and the rotations are recorded; else Wilkinson's throughout.
//
// In each round a lane takes one sweep over its own lowest unreduced block l..m (e[l..m-1] are not negligible), so a
// lane that needs more sweeps for one eigenvalue does not hold up the others; the loop runs over all lanes' blocks.
template <class S, int Blocks, bool Record>
void implicit_ql(Workspace<S, Blocks>& w, int n, Vec<RealOf<S>> (*d)[Blocks], Vec<RealOf<S>> (*e)[Blocks]) {
  using W = Workspace<S, Blocks>;
  using T = RealOf<S>;
  using Integer = typename VecTypes<T>::integer;
  const Vec<T> zero{}, one = zero + T(1), floor = zero + kSquareFloor<T>;
  const auto index = [](int i) { return IVec<T>{} + static_cast<Integer>(i); };
  Vec<T> threshold[Blocks];
  IVec<T> l[Blocks], m[Blocks];
  int low[Blocks], high[Blocks];  // all lanes' unreduced blocks lie in low..high
  for (int b = 0; b < Blocks; ++b) {
    Vec<T> norm{};
    for (int i = 0; i < n; ++i) norm = max(abs(d[i][b]) + abs(e[i][b]), norm);
    threshold[b] = norm * (std::numeric_limits<T>::epsilon() * (Record ? kRecordTolerance<T> : kValueTolerance<T>));
    l[b] = index(n);
    low[b] = 0;
    high[b] = n - 1;
  }
  for (int round = 0;; ++round) {
    Vec<T> g[Blocks], s[Blocks], c[Blocks], base[Blocks];
    Mask<T> started[Blocks];
    int first = n, last = 0;
    for (int b = 0; b < Blocks; ++b) {
      const IVec<T> previous = l[b];
      IVec<T> edge = index(high[b]);
      Vec<T> edge_d = d[high[b]][b], d_m{}, d_l{}, d_next{}, e_l{}, known{};
      l[b] = index(n);
      m[b] = index(0);
      uint32_t rows = 0;  // bit i: some lane is coupled there
      Mask<T> active = none_set<T>();
      for (int i = high[b] - 1; i >= low[b]; --i) {
        const Mask<T> coupled = !less_equal(abs(e[i][b]), threshold[b]);  // a NaN never passes for converged
        edge = select_int(coupled, edge, index(i));
        edge_d = select(coupled, edge_d, d[i][b]);
        l[b] = select_int(coupled, index(i), l[b]);
        m[b] = select_int(coupled, edge, m[b]);
        d_m = select(coupled, edge_d, d_m);
        d_l = select(coupled, d[i][b], d_l);
        d_next = select(coupled, d[i + 1][b], d_next);
        e_l = select(coupled, e[i][b], e_l);
        if constexpr (Record) known = select(coupled, w.values[i][b], known);
        active = active | coupled;
        rows |= static_cast<uint32_t>(any(coupled)) << i;
      }
      low[b] = std::min(std::countr_zero(rows), n);
      high[b] = std::bit_width(rows);
      first = std::min(low[b], first);
      last = std::max(high[b], last);
      const Mask<T> repeated = equal_int<T>(l[b], previous) & active;
      Vec<T> shift = known;
      if (!Record || any(repeated)) {
        const Vec<T> half = (d_next - d_l) * T(0.5), square = e_l * e_l;
        const Vec<T> root = sqrt(fma(half, half, square));
        const Vec<T> wilkinson = d_l - square / (half + flip_sign(root, sign_of(half)));
        shift = Record ? select(repeated, wilkinson, known) : wilkinson;
      }
      g[b] = d_m - shift;
      s[b] = c[b] = one;
      started[b] = none_set<T>();
      if (round == w.max_rounds) w.not_converged[b] = w.not_converged[b] | active;
    }
    if (last == 0 || round == w.max_rounds) return;

    Rotation<T>* out[Blocks];
    if constexpr (Record) {
      const int length = last - first;
      bool full = false;
      for (int b = 0; b < Blocks; ++b) full |= w.used[b] + length > W::kRotations || w.sweep_count[b] == W::kSweeps;
      if (full) apply_recorded(w, n);
      for (int b = 0; b < Blocks; ++b) {
        out[b] = w.rotations[b] + w.used[b];
        if (high[b] == 0) continue;
        w.sweeps[b][w.sweep_count[b]++] = {low[b], high[b], w.used[b] + last - high[b]};
        w.used[b] += length;
      }
    }
    for (int b = 0; b < Blocks; ++b) base[b] = d[last][b];
    for (int i = last - 1; i >= first; --i) {
#pragma GCC unroll 8
      for (int b = 0; b < Blocks; ++b) {
        const auto row = static_cast<Integer>(i);
        const Mask<T> on = greater_than<T>(m[b], row) & !greater_than<T>(l[b], row);  // l <= i < m
        const Vec<T> ei = e[i][b], di = d[i][b];
        const Vec<T> f = s[b] * ei, h = c[b] * ei;
        const Vec<T> square = fma(f, f, g[b] * g[b]);
        const Mask<T> trivial = less(square, floor);
        const Vec<T> inverse = reciprocal_sqrt(max(square, floor));
        const Vec<T> coupling = select(on, square * inverse, g[b]);  // g where the lane's sweep ended one row above
        e[i + 1][b] = select(started[b], coupling, e[i + 1][b]);
        const Vec<T> sine = select(trivial, zero, f * inverse), cosine = select(trivial, one, g[b] * inverse);
        const Vec<T> r = fma(di - base[b], sine, (cosine + cosine) * h);
        d[i + 1][b] = select(on, fma(sine, r, base[b]), base[b]);
        base[b] = select(on, fma(-sine, r, di), di);
        g[b] = select(on, fma(cosine, r, -h), g[b]);
        s[b] = select(on, sine, s[b]);
        c[b] = select(on, cosine, c[b]);
        if constexpr (Record) {
          out[b]->sine = select(on, sine, zero);
          out[b]->cosine = select(on, cosine, one);
          ++out[b];
        }
        started[b] = on;
      }
    }
    for (int b = 0; b < Blocks; ++b) {
      d[first][b] = base[b];
      e[first][b] = select(started[b], g[b], e[first][b]);
    }
  }
}

// ---- results -------------------------------------------------------------------------------------------------------

// The place of each value in ascending order, equal values in the order they come.
template <class T, int Blocks>
void rank_values(const Vec<T> (*values)[Blocks], int block, int n, IVec<T>* rank) {
  for (int i = 0; i < n; ++i) rank[i] = IVec<T>{};
  const IVec<T> none{}, one = none + 1;
  for (int i = 1; i < n; ++i) {
    for (int j = 0; j < i; ++j) {
      const Mask<T> swapped = greater(values[j][block], values[i][block]);
      rank[j] += select_int(swapped, one, none);
      rank[i] += select_int(swapped, none, one);
    }
  }
}

// One block's eigenvalues in ascending order and its `info`; values are NaN where a lane failed. Returns what to add to
// the other results of the block (NaN for those lanes, 0 for the others), and in `rank` the place of each value.
template <class S, int Blocks, class T = RealOf<S>>
Vec<T> store_values(const Workspace<S, Blocks>& w, const Vec<T> (*values)[Blocks], int block, int n, int count,
                    typename VecTypes<T>::integer (*rank)[kLanes<T>], T* eigenvalues, int32_t* info) {
  constexpr int lanes = kLanes<T>;
  const Mask<T> failed = w.non_finite[block] | w.not_converged[block];
  const Vec<T> poison = select(failed, splat(std::numeric_limits<T>::quiet_NaN()), Vec<T>{});
  {
    IVec<T> ranks[Workspace<S, Blocks>::kN];
    rank_values<T, Blocks>(values, block, n, ranks);
    std::memcpy(rank, ranks, sizeof(ranks[0]) * static_cast<std::size_t>(n));
  }
  for (int i = 0; i < n; ++i) {
    alignas(64) T row[lanes];
    store(row, fma(values[i][block], w.up[block], poison));
    for (int lane = 0; lane < count; ++lane) eigenvalues[lane * n + rank[i][lane]] = row[lane];
  }
  const uint32_t non_finite = lane_bits(w.non_finite[block]), not_converged = lane_bits(w.not_converged[block]);
  for (int lane = 0; lane < count; ++lane)
    info[lane] = ((non_finite >> lane) & 1 ? kNonFinite : 0) | ((not_converged >> lane) & 1 ? kNotConverged : 0);
  return poison;
}

// The sign bits that make the largest of n components positive, the first of equal ones.
template <class T>
SK_INLINE Vec<T> fix_gauge(Vec<T>* vector, int n, T) {
  Vec<T> largest = abs(vector[0]), pivot = vector[0];
  for (int k = 1; k < n; ++k) {
    const Vec<T> size = abs(vector[k]);
    pivot = select(greater(size, largest), vector[k], pivot);
    largest = max(size, largest);
  }
  return sign_of(pivot);
}
// Makes the component of largest modulus real and positive, in place; no sign is left to change.
template <class T>
SK_INLINE Vec<T> fix_gauge(ComplexVec<T>* vector, int n, std::complex<T>) {
  const Vec<T> zero{};
  Vec<T> largest = add_square(vector[0], zero);
  ComplexVec<T> pivot = vector[0];
  IVec<T> at{};
  for (int k = 1; k < n; ++k) {
    const Vec<T> square = add_square(vector[k], zero);
    const Mask<T> larger = greater(square, largest);
    pivot = select(larger, vector[k], pivot);
    largest = max(square, largest);
    at = select_int(larger, IVec<T>{} + static_cast<typename VecTypes<T>::integer>(k), at);
  }
  const Vec<T> size = sqrt(largest);
  const ComplexVec<T> turn = conj(pivot) / size, fixed = {size, zero};
  for (int k = 0; k < n; ++k)
    vector[k] = select(equal_to<T>(at, static_cast<typename VecTypes<T>::integer>(k)), fixed, vector[k] * turn);
  return zero;
}

// One block's eigenvectors, gauge fixed and `poison` added: n components to `place(lane, rank)` each, for all lanes.
template <class S, int Blocks, class Place, class T = RealOf<S>>
void store_vectors(Workspace<S, Blocks>& w, int block, int n,
                   const typename VecTypes<T>::integer (*rank)[kLanes<T>], Vec<T> poison, const Place& place) {
  constexpr int lanes = kLanes<T>, stride = Workspace<S, Blocks>::kStride;
  const int length = kParts<S> * n;
  for (int i = 0; i < n; ++i) {
    const Vec<T> sign = fix_gauge<T>(w.z[block] + i * stride, n, S{});
    const Vec<T>* vector = reinterpret_cast<const Vec<T>*>(w.z[block] + i * stride);
    // Windows of `lanes` reals, the last one moved back to end with the vector.
    for (int start = 0;; start += lanes) {
      const int width = length < lanes ? length : lanes;
      if (start + lanes > length) start = length - width;
      Vec<T> tile[lanes];
      // Adding zero makes -0 a +0: its sign would tell of rotations that only neighbours needed.
      for (int k = 0; k < lanes; ++k) tile[k] = flip_sign(vector[start + (k < width ? k : width - 1)], sign) + poison;
      transpose<T>(tile);
      for (int lane = 0; lane < lanes; ++lane) {
        T* to = place(lane, static_cast<int>(rank[i][lane])) + start;
        width == lanes ? store(to, tile[lane]) : store_first(to, tile[lane], width);
      }
      if (start + width == length) break;
    }
  }
}

// ---- all of it -----------------------------------------------------------------------------------------------------

// What happens to matrices between loading and storing, which takes long to compile: those of real matrices with vectors
// that several ops need are compiled with eigh.cpp, for all.
template <class S, int Blocks, bool Vectors>
struct Solver {
  static void reduce(Workspace<S, Blocks>& w, int block, int n);
  static void diagonalise(Workspace<S, Blocks>& w, int n);
};
template <class S, int Blocks, bool Vectors>
void Solver<S, Blocks, Vectors>::reduce(Workspace<S, Blocks>& w, int block, int n) {
  reduce_block<S, Blocks, Vectors>(w, block, n);
}
template <class S, int Blocks, bool Vectors>
void Solver<S, Blocks, Vectors>::diagonalise(Workspace<S, Blocks>& w, int n) {
  std::memcpy(w.values, w.d, sizeof(w.d[0]) * static_cast<std::size_t>(n));
  std::memcpy(w.couplings, w.e, sizeof(w.e[0]) * static_cast<std::size_t>(n));
  implicit_ql<S, Blocks, false>(w, n, w.values, w.couplings);
  if constexpr (Vectors) {
    implicit_ql<S, Blocks, true>(w, n, w.d, w.e);
    apply_recorded(w, n);
  }
}
extern template struct Solver<float, kBlocks, true>;
extern template struct Solver<float, 1, true>;
extern template struct Solver<double, kBlocks, true>;
extern template struct Solver<double, 1, true>;

// `count` matrices from `item` on, at most Blocks * kLanes of them.
template <class S, int Blocks, bool Vectors, class Load, class Store>
void solve_group(int n, int64_t item, int count, int sweeps, const Load& load_block, const Store& store_block) {
  constexpr int lanes = kLanes<RealOf<S>>;
  auto& w = workspace<Workspace<S, Blocks>>();
  w.max_rounds = sweeps * n;
  for (int b = 0; b < Blocks; ++b) {
    const int first = b * lanes < count ? b * lanes : 0;
    load_block(w, b, item + first, std::min(count - first, lanes));
    Solver<S, Blocks, Vectors>::reduce(w, b, n);
    w.not_converged[b] = none_set<RealOf<S>>();
    w.used[b] = w.sweep_count[b] = 0;
  }
  Solver<S, Blocks, Vectors>::diagonalise(w, n);
  for (int b = 0; b * lanes < count; ++b) store_block(w, b, item + b * lanes, std::min(count - b * lanes, lanes));
}

// `batch` matrices, in parallel. `load_block(workspace, block, item, count)` fills the block's lower triangles of z,
// `up` and `non_finite` from `count` <= kLanes items (it may be asked for some of them twice); `store_block`, of the
// same arguments, writes what came of them. Streamed stores are complete when this returns. A matrix has not converged
// after more than `sweeps` sweeps per eigenvalue.
template <class S, bool Vectors, class Load, class Store>
void solve_lanes(int64_t batch, int n, const Load& load_block, const Store& store_block, int sweeps = kMaxSweeps) {
  constexpr int lanes = kLanes<RealOf<S>>;
  torch::stable::parallel_for(0, (batch + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * lanes, batch);
    for (int64_t item = begin * lanes; item < stop;) {
      const int count = static_cast<int>(std::min<int64_t>(stop - item, kBlocks * lanes));
      if (count > lanes)
        solve_group<S, kBlocks, Vectors>(n, item, count, sweeps, load_block, store_block);
      else
        solve_group<S, 1, Vectors>(n, item, count, sweeps, load_block, store_block);
      item += count;
    }
    stream_fence();
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

enum Mode : int64_t { kAuto = 0, kLorentz = 1, kMask = 2, kRaw = 3 };

struct GapRule {
  int64_t mode;
  double gap_floor;    // relative to max|w|
  double noise_kappa;  // num_ij is rounding up to so many eps of the longest column of M
};

enum class Conjugate { kNone, kFirst, kSecond };  // of the factors of a product

// out[i][j] = sum_k x[i * x_row + k * x_sum] y[j * y_column + k * y_sum], Rows x Columns of them, `length` terms each.
template <class S, Conjugate Which, int Rows, int Columns>
SK_INLINE void product_tile(int length, const Element<S>* x, int x_row, int x_sum, const Element<S>* y, int y_column,
                            int y_sum, Element<S> (*out)[Columns]) {
  Element<S> sum[Rows][Columns];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) sum[r][c] = Element<S>{};
  for (int k = 0; k < length; ++k, x += x_sum, y += y_sum) {
    for (int r = 0; r < Rows; ++r) {
      for (int c = 0; c < Columns; ++c) {
        const Element<S> left = x[r * x_row], right = y[c * y_column];
        if constexpr (Which == Conjugate::kNone)
          sum[r][c] = fma(left, right, sum[r][c]);
        else if constexpr (Which == Conjugate::kFirst)
          sum[r][c] = fma_conj(left, right, sum[r][c]);
        else
          sum[r][c] = fma_conj(right, left, sum[r][c]);
      }
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) out[r][c] = sum[r][c];
}

// The whole product, height x width, to rows `out_row` apart; or, if square, its lower triangle and that conjugated
// above a real diagonal. The last tiles are moved back to end with the matrix.
template <class S, bool Hermitian, Conjugate Which = Conjugate::kNone>
SK_INLINE void product(int height, int width, int length, const Element<S>* x, int x_row, int x_sum,
                       const Element<S>* y, int y_column, int y_sum, Element<S>* out, int out_row,
                       Prefetcher upcoming = {}, int lines = 0) {
  constexpr int rows = kIsComplex<S> ? (kVectorBytes == 64 ? 3 : 2) : 4;
  constexpr int columns = kVectorBytes != 64 ? (kIsComplex<S> ? 1 : 2) : kIsComplex<S> ? 4 : 5;
  const auto put = [&](int i, int j, Element<S> value) {
    if constexpr (Hermitian) {
      if (j < i) out[j * out_row + i] = conj(value);
      if (j == i) value = element<S>(real_part(value));
      if (j <= i) out[i * out_row + j] = value;
    } else {
      out[i * out_row + j] = value;
    }
  };
  if (height < rows || width < columns) {
    for (int i = 0; i < height; ++i) {
      for (int j = 0; j < width; ++j) {
        Element<S> tile[1][1];
        product_tile<S, Which, 1, 1>(length, x + i * x_row, x_row, x_sum, y + j * y_column, y_column, y_sum, tile);
        put(i, j, tile[0][0]);
      }
    }
    return;
  }
  // Panels of y that stay in the first-level cache while x passes.
  constexpr int cached = kL1Bytes / 2 / static_cast<int>(sizeof(Element<S>));
  const int panel = std::max(1, cached / (columns * std::max(length, 1))) * columns;
  for (int start = 0; start < width; start += panel) {
    const int stop = std::min(start + panel, width);
    for (int i0 = 0; i0 < height; i0 += rows) {
      const int i = i0 + rows <= height ? i0 : height - rows;
      for (int j0 = start; j0 < stop && (!Hermitian || j0 < i + rows); j0 += columns) {
        const int j = j0 + columns <= width ? j0 : width - columns;
        Element<S> tile[rows][columns];
        product_tile<S, Which, rows, columns>(length, x + i * x_row, x_row, x_sum, y + j * y_column, y_column, y_sum,
                                              tile);
        for (int r = 0; r < rows; ++r)
          for (int c = 0; c < columns; ++c) put(i + r, j + c, tile[r][c]);
        upcoming.advance(lines);
      }
    }
  }
}

// The length of the longest column of a square matrix times `shrink`, with which no square leaves the range.
template <class S, class T = RealOf<S>>
SK_INLINE Vec<T> longest_column(int n, const Element<S>* m, Vec<T> shrink) {
  Vec<T> longest{};
  for (int j = 0; j < n; ++j) {
    Vec<T> sum{};
    for (int i = 0; i < n; ++i) sum = add_square(m[i * n + j] * shrink, sum);
    longest = max(sum, longest);
  }
  return sqrt(longest);
}

// M to S, in place: S_ij = num_ij F(w_j - w_i) / 2 off the diagonal, `diagonal` (zero if null) on it.
template <class S, class T = RealOf<S>>
SK_INLINE void weigh_pairs(int n, const GapRule& rule, const Vec<T>* values, const Vec<T>* diagonal, Element<S>* m) {
  const Vec<T> zero{}, smallest = zero + std::numeric_limits<T>::min();
  // Gaps are measured in units of a power of two near max|w|: no square of theirs over- or underflows harmfully.
  Vec<T> largest{};
  for (int i = 0; i < n; ++i) largest = max(abs(values[i]), largest);
  const PowerOfTwo<T> unit = power_of_two<T>(largest);
  const Vec<T> floor = largest * unit.down * static_cast<T>(rule.gap_floor), floor_square = floor * floor;
  const Vec<T> scale = unit.down * T(0.5);
  const T kappa = static_cast<T>(rule.noise_kappa) * std::numeric_limits<T>::epsilon();
  // Sizes of complex elements are taken in units in which squares are in range.
  Vec<T> part{};
  for (int i = 0; i < n * n; ++i) part = max(part_size(m[i]), part);
  const Vec<T> shrink = power_of_two<T>(part).down, limit = longest_column<S>(n, m, shrink) * kappa;
  for (int i = 0; i < n; ++i) {
    const Vec<T> wi = values[i] * unit.down;
    for (int j = 0; j < i; ++j) {
      const Vec<T> gap = values[j] * unit.down - wi;
      const Element<S> upper = m[i * n + j], lower = conj(m[j * n + i]);
      Element<S> numerator = upper - lower, weighed;
      if (rule.mode == kRaw) {
        weighed = numerator / gap;
      } else {
        if (rule.mode == kAuto)
          numerator = select(less_equal(modulus(numerator * shrink), limit), Element<S>{}, numerator);
        // `smallest` keeps 0/0 away: an implicit floor of its root, far below any gap that rounding leaves.
        Vec<T> inverse = gap / max(fma(gap, gap, rule.mode == kMask ? zero : floor_square), smallest);
        if (rule.mode == kMask) inverse = select(greater(abs(gap), floor), inverse, zero);
        weighed = numerator * inverse;
      }
      m[i * n + j] = weighed * scale;
      m[j * n + i] = conj(m[i * n + j]);
    }
    m[i * n + i] = element<S>(diagonal ? diagonal[i] : zero);
  }
}

// Complex eigenvectors, n each: the gradient with the effect of the gauge, which makes each one's M_jj real by turning
// it until its pivot is real. The pivot is the largest of the components that are real and positive: by their moduli
// alone rounding could take another one for it.
template <class T>
SK_INLINE void fix_phase(int n, const ComplexVec<T>* vectors, ComplexVec<T>* gradient) {
  const Vec<T> zero{};
  for (int j = 0; j < n; ++j) {
    const ComplexVec<T>* v = vectors + j * n;
    ComplexVec<T> product[4] = {};
    Vec<T> pivot{};
    IVec<T> at{};
    for (int a = 0; a < n; ++a) {
      product[a % 4] = fma_conj(v[a], gradient[j * n + a], product[a % 4]);
      const Mask<T> larger = greater(v[a].re, pivot) & equal(v[a].im, zero);
      pivot = select(larger, v[a].re, pivot);
      at = select_int(larger, IVec<T>{} + static_cast<typename VecTypes<T>::integer>(a), at);
    }
    const Vec<T> moved = ((product[0] + product[1]) + (product[2] + product[3])).im;
    const Vec<T> turn = select(greater(pivot, zero), moved / pivot, zero);
    for (int a = 0; a < n; ++a) {
      const Mask<T> here = equal_to<T>(at, static_cast<typename VecTypes<T>::integer>(a));
      gradient[j * n + a].im -= select(here, turn, zero);
    }
  }
}

}  // namespace stablekern
