// Eigendecomposition of small symmetric matrices (n <= 32), one per SIMD lane: what the kernels built on it share.
//
// Every matrix takes the same instructions, with masks where they part ways, so no result depends on which lane, block,
// thread or batch it was computed in. All fused multiply-adds are written out as `fma` for the same reason: the
// compiler is left no choice that could differ between two instantiations.
//
// Per lane, after a kernel has loaded a matrix of about size 1 (`solve_lanes`):
//   1. Householder tridiagonalisation A = Q T Q^T (Golub & Van Loan, 8.3.1), rank-2 update fused with the next product;
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

#include "stablekern/simd.h"

namespace stablekern {

constexpr int kMaxN = 32;
constexpr int kElectrodes = 19;  // of the 10-20 system: the size that gets loops of known length
constexpr int kMaxSweeps = 30;   // per eigenvalue on average, as LAPACK's steqr; two are usual
constexpr int kBlocks = 4;       // blocks of lanes that share the QL recurrence
constexpr int32_t kNotConverged = 1, kNonFinite = 2;  // bits of `info`
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

// Everything one thread needs for `Blocks` blocks of lanes, N x N matrices (N = 0: up to kMaxN).
template <class T, int N, int Blocks>
struct alignas(64) Workspace {
  static constexpr int kN = N > 0 ? N : kMaxN;
  static constexpr int kStride = kN | 1;                   // odd: rows do not fall on the same cache sets
  static constexpr int kRotations = 3 * kN * kN / 4 + kN;  // 1.5 times n sweeps; when full they are applied early
  static constexpr int kSweeps = 4 * kN;

  Vec<T> z[Blocks][kN * kStride];       // the matrix, then Q^T, then the eigenvectors as rows
  Vec<T> staging[kN * kN];              // one block on its way in or out
  Vec<T> d[kN][Blocks], e[kN][Blocks];  // T: diagonal, and coupling of i with i + 1
  Vec<T> values[kN][Blocks], couplings[kN][Blocks];
  Vec<T> up[Blocks];  // scales back
  Mask<T> non_finite[Blocks], not_converged[Blocks];
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
void prefetch_items(const T* items, int64_t count) {
  constexpr int64_t line = 64 / sizeof(T);
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(items + i);
}

template <class T>
void copy_out(const T* from, int64_t length, bool past_caches, T* to) {
  constexpr int lanes = kLanes<T>;
  int64_t i = 0;
  if (past_caches && reinterpret_cast<std::uintptr_t>(to) % kVectorBytes == 0)
    for (; i + lanes <= length; i += lanes) stream(to + i, load(from + i));
  std::memcpy(to + i, from + i, static_cast<std::size_t>(length - i) * sizeof(T));
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

// Rows row..row+Rows of a symmetric matrix, lower triangle: a -= u q^T + q u^T if `Update`; then p += a v for what
// these rows contribute, p[row..] being set.
template <class T, int Rows, bool Update>
SK_INLINE void update_and_multiply(Vec<T>* a, int stride, int row, const Vec<T>* u, const Vec<T>* q, const Vec<T>* v,
                                   Vec<T>* p) {
  // Copies in registers: the compiler cannot know that stores to a and p leave u, q and v alone.
  Vec<T> minus_u[Rows], minus_q[Rows], vr[Rows], sum[Rows];
  Vec<T>* rows[Rows];
  for (int r = 0; r < Rows; ++r) {
    if constexpr (Update) minus_u[r] = -u[row + r], minus_q[r] = -q[row + r];
    vr[r] = v[row + r];
    sum[r] = Vec<T>{};
    rows[r] = a + (row + r) * stride;
  }
  for (int k = 0; k < row; ++k) {
    const Vec<T> vk = v[k];
    Vec<T> pk = p[k], uk, qk;
    if constexpr (Update) uk = u[k], qk = q[k];
    for (int r = 0; r < Rows; ++r) {
      Vec<T> x = rows[r][k];
      if constexpr (Update) {
        x = fma(minus_q[r], uk, fma(minus_u[r], qk, x));
        rows[r][k] = x;
      }
      sum[r] = fma(x, vk, sum[r]);
      pk = fma(x, vr[r], pk);
    }
    p[k] = pk;
  }
  for (int r = 0; r < Rows; ++r) {
    for (int c = 0; c <= r; ++c) {
      Vec<T> x = rows[r][row + c];
      if constexpr (Update) {
        x = fma(minus_q[r], -minus_u[c], fma(minus_u[r], -minus_q[c], x));
        rows[r][row + c] = x;
      }
      sum[r] = fma(x, vr[c], sum[r]);
      if (c < r) sum[c] = fma(x, vr[r], sum[c]);
    }
  }
  for (int r = 0; r < Rows; ++r) p[row + r] = sum[r];
}

template <class T, bool Update>
SK_INLINE void update_and_multiply_all(Vec<T>* a, int stride, int size, const Vec<T>* u, const Vec<T>* q,
                                       const Vec<T>* v, Vec<T>* p) {
  int row = 0;
  for (; row + 4 <= size; row += 4) update_and_multiply<T, 4, Update>(a, stride, row, u, q, v, p);
  switch (size - row) {
    case 3: return update_and_multiply<T, 3, Update>(a, stride, row, u, q, v, p);
    case 2: return update_and_multiply<T, 2, Update>(a, stride, row, u, q, v, p);
    case 1: return update_and_multiply<T, 1, Update>(a, stride, row, u, q, v, p);
  }
}

// Rows of Q^T so far, `size` - 1 long, times two reflectors: I - u w^T of length `size`, then I - u2 w2^T of length
// size + 1, `inner` = w . u2. Each row grows by the two columns in which it is still zero.
template <class T, int Rows>
SK_INLINE void reflect_rows(Vec<T>* z, int stride, int size, const Vec<T>* u, const Vec<T>* w, const Vec<T>* u2,
                            const Vec<T>* w2, Vec<T> inner) {
  Vec<T> sum[Rows], sum2[Rows];
  for (int r = 0; r < Rows; ++r) sum[r] = sum2[r] = Vec<T>{};
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

// The rows of z, whose lower triangle holds the reflectors H_i = I - inverse_h[i] u u^T, u = row i, become Q^T with
// Q = H_(n-1) ... H_2. Two reflectors at a time: one would be bound by its stores.
template <class T, int N>
void form_q(Vec<T>* z, int stride, int runtime_n, const Vec<T>* inverse_h) {
  const int n = N > 0 ? N : runtime_n;
  const Vec<T> zero{}, one = zero + T(1);
  z[0] = one;
  int size = 2;  // of the next reflector; the leading block of size - 1 is formed
  if (n % 2 == 1 && n > 1) {
    const Vec<T>* u = z + 2 * stride;
    const Vec<T> w0 = u[0] * inverse_h[2], w1 = u[1] * inverse_h[2];
    z[0] = fma(-u[0], w0, one);
    z[1] = z[stride] = -u[0] * w1;
    z[stride + 1] = fma(-u[1], w1, one);
    size = 3;
  }
  Vec<T> w[kMaxN], w2[kMaxN];
  for (; size < n - 1; size += 2) {
    Vec<T>*u = z + size * stride, *u2 = u + stride;
    for (int k = 0; k < size; ++k) w[k] = u[k] * inverse_h[size];
    for (int k = 0; k <= size; ++k) w2[k] = u2[k] * inverse_h[size + 1];
    const Vec<T> inner = dot(w, u2, size);
    int r = 0;
    for (; r + 4 <= size - 1; r += 4) reflect_rows<T, 4>(z + r * stride, stride, size, u, w, u2, w2, inner);
    switch (size - 1 - r) {
      case 3: reflect_rows<T, 3>(z + r * stride, stride, size, u, w, u2, w2, inner); break;
      case 2: reflect_rows<T, 2>(z + r * stride, stride, size, u, w, u2, w2, inner); break;
      case 1: reflect_rows<T, 1>(z + r * stride, stride, size, u, w, u2, w2, inner); break;
    }
    // Two rows that were the identity's; the second is where u was.
    Vec<T>* row = u - stride;
    const Vec<T> first = -u[size - 1], second = fma(-first, inner, -u2[size - 1]), third = -u2[size];
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

// z, lower triangle of A, becomes Q^T (rows; unless !Vectors) with A = Q T Q^T; T to column `block` of d and e.
template <class T, int N, int Blocks, bool Vectors>
void tridiagonalise(Workspace<T, N, Blocks>& w, int block, int runtime_n) {
  using W = Workspace<T, N, Blocks>;
  const int n = N > 0 ? N : runtime_n;
  constexpr int stride = W::kStride;
  Vec<T>* a = w.z[block];
  Vec<T> inverse_h[W::kN], buffer[2][W::kN];
  Vec<T>* q = buffer[0];       // of the reflector whose update is still due
  Vec<T>* p = buffer[1];
  const Vec<T> zero{}, one = zero + T(1);

  for (int i = n - 1; i > 0; --i) {
    Vec<T>* row = a + i * stride;
    if (i < n - 1) {
      const Vec<T>* u = row + stride;
      const Vec<T> minus_u = -u[i], minus_q = -q[i];
      for (int k = 0; k <= i; ++k) row[k] = fma(minus_q, u[k], fma(minus_u, q[k], row[k]));
    }
    w.d[i][block] = row[i];
    if (i == 1) {
      w.e[0][block] = row[0];
      break;
    }
    const Vec<T> rest = dot(row, row, i - 1), alpha = row[i - 1];
    const Mask<T> reduced = less(rest, splat(kSquareFloor<T>));  // nothing to eliminate
    const Vec<T> norm = sqrt(fma(alpha, alpha, rest)), size = abs(alpha);
    const Vec<T> beta = flip_sign(-norm, sign_of(alpha));
    w.e[i - 1][block] = select(reduced, alpha, beta);
    row[i - 1] = alpha - beta;
    inverse_h[i] = select(reduced, zero, one / select(reduced, one, norm * (norm + size)));

    if (i < n - 1)
      update_and_multiply_all<T, true>(a, stride, i, row + stride, q, row, p);
    else
      update_and_multiply_all<T, false>(a, stride, i, nullptr, nullptr, row, p);
    // u^T A u / h is of A's size; 1 / h^2 might overflow.
    const Vec<T> minus_half = (dot(p, row, i) * inverse_h[i]) * (inverse_h[i] * T(-0.5));
    for (int k = 0; k < i; ++k) p[k] = fma(minus_half, row[k], p[k] * inverse_h[i]);
    Vec<T>* next = q;
    q = p;
    p = next;
  }
  w.d[0][block] = n > 2 ? fma(a[2 * stride] * T(-2), q[0], a[0]) : a[0];
  w.e[n - 1][block] = zero;

  if constexpr (Vectors) form_q<T, N>(a, stride, n, inverse_h);
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

template <class T, int N, int Blocks>
void apply_recorded(Workspace<T, N, Blocks>& w, int runtime_n) {
  const int n = N > 0 ? N : runtime_n;
  constexpr int stride = Workspace<T, N, Blocks>::kStride, widest = 8;
  const int slabs = (n + widest - 1) / widest;
  for (int block = 0; block < Blocks; ++block) {
    for (int slab = 0, column = 0; slab < slabs; ++slab) {
      const int width = (n - column + slabs - slab - 1) / (slabs - slab);
      Vec<T>* z = w.z[block] + column;
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
template <class T, int N, int Blocks, bool Record>
void implicit_ql(Workspace<T, N, Blocks>& w, int runtime_n, Vec<T> (*d)[Blocks], Vec<T> (*e)[Blocks]) {
  using W = Workspace<T, N, Blocks>;
  using Integer = typename VecTypes<T>::integer;
  const int n = N > 0 ? N : runtime_n;
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
      if (round == kMaxSweeps * n) w.not_converged[b] = w.not_converged[b] | active;
    }
    if (last == 0 || round == kMaxSweeps * n) return;

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
template <class T, int N, int Blocks>
Vec<T> store_values(const Workspace<T, N, Blocks>& w, const Vec<T> (*values)[Blocks], int block, int n, int count,
                    typename VecTypes<T>::integer (*rank)[kLanes<T>], T* eigenvalues, int32_t* info) {
  constexpr int lanes = kLanes<T>;
  const Mask<T> failed = w.non_finite[block] | w.not_converged[block];
  const Vec<T> poison = select(failed, splat(std::numeric_limits<T>::quiet_NaN()), Vec<T>{});
  {
    IVec<T> ranks[Workspace<T, N, Blocks>::kN];
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

// One block's eigenvectors, signs fixed and `poison` added: n values to `place(lane, rank)` each, for all lanes.
template <class T, int N, int Blocks, class Place>
void store_vectors(const Workspace<T, N, Blocks>& w, int block, int runtime_n,
                   const typename VecTypes<T>::integer (*rank)[kLanes<T>], Vec<T> poison, const Place& place) {
  constexpr int lanes = kLanes<T>, stride = Workspace<T, N, Blocks>::kStride;
  const int n = N > 0 ? N : runtime_n;
  for (int i = 0; i < n; ++i) {
    const Vec<T>* vector = w.z[block] + i * stride;
    Vec<T> largest = abs(vector[0]), pivot = vector[0];
    for (int k = 1; k < n; ++k) {
      const Vec<T> size = abs(vector[k]);
      pivot = select(greater(size, largest), vector[k], pivot);
      largest = max(size, largest);
    }
    const Vec<T> sign = sign_of(pivot);
    // Windows of `lanes` components, the last one moved back to end with the vector.
    for (int start = 0;; start += lanes) {
      const int width = n < lanes ? n : lanes;
      if (start + lanes > n) start = n - width;
      Vec<T> tile[lanes];
      // Adding zero makes -0 a +0: its sign would tell of rotations that only neighbours needed.
      for (int k = 0; k < lanes; ++k) tile[k] = flip_sign(vector[start + (k < width ? k : width - 1)], sign) + poison;
      transpose<T>(tile);
      for (int lane = 0; lane < lanes; ++lane) {
        T* to = place(lane, static_cast<int>(rank[i][lane])) + start;
        width == lanes ? store(to, tile[lane]) : store_first(to, tile[lane], width);
      }
      if (start + width == n) break;
    }
  }
}

// ---- all of it -----------------------------------------------------------------------------------------------------

// `count` matrices from `item` on, at most Blocks * kLanes of them.
template <class T, int N, int Blocks, bool Vectors, class Load, class Store>
void solve_group(int n, int64_t item, int count, const Load& load_block, const Store& store_block) {
  constexpr int lanes = kLanes<T>;
  auto& w = workspace<Workspace<T, N, Blocks>>();
  for (int b = 0; b < Blocks; ++b) {
    const int first = b * lanes < count ? b * lanes : 0;
    load_block(w, b, item + first, std::min(count - first, lanes));
    tridiagonalise<T, N, Blocks, Vectors>(w, b, n);
    w.not_converged[b] = none_set<T>();
    w.used[b] = w.sweep_count[b] = 0;
  }
  std::memcpy(w.values, w.d, sizeof(w.d[0]) * static_cast<std::size_t>(n));
  std::memcpy(w.couplings, w.e, sizeof(w.e[0]) * static_cast<std::size_t>(n));
  implicit_ql<T, N, Blocks, false>(w, n, w.values, w.couplings);
  if constexpr (Vectors) {
    implicit_ql<T, N, Blocks, true>(w, n, w.d, w.e);
    apply_recorded(w, n);
  }
  for (int b = 0; b * lanes < count; ++b) store_block(w, b, item + b * lanes, std::min(count - b * lanes, lanes));
}

// `batch` matrices, in parallel. `load_block(workspace, block, item, count)` fills the block's lower triangles of z,
// `up` and `non_finite` from `count` <= kLanes items (it may be asked for some of them twice); `store_block`, of the
// same arguments, writes what came of them. Streamed stores are complete when this returns.
template <class T, int N, bool Vectors, class Load, class Store>
void solve_lanes(int64_t batch, int n, const Load& load_block, const Store& store_block) {
  constexpr int lanes = kLanes<T>;
  torch::stable::parallel_for(0, (batch + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * lanes, batch);
    for (int64_t item = begin * lanes; item < stop;) {
      const int count = static_cast<int>(std::min<int64_t>(stop - item, kBlocks * lanes));
      if (count > lanes)
        solve_group<T, N, kBlocks, Vectors>(n, item, count, load_block, store_block);
      else
        solve_group<T, N, 1, Vectors>(n, item, count, load_block, store_block);
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

// out[i][j] = sum_k x[i * x_row + k * x_sum] y[j * y_column + k * y_sum], Rows x Columns of them, `length` terms each.
template <class T, int Rows, int Columns>
SK_INLINE void product_tile(int length, const Vec<T>* x, int x_row, int x_sum, const Vec<T>* y, int y_column,
                            int y_sum, Vec<T> (*out)[Columns]) {
  Vec<T> sum[Rows][Columns];
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) sum[r][c] = Vec<T>{};
  for (int k = 0; k < length; ++k, x += x_sum, y += y_sum)
    for (int r = 0; r < Rows; ++r)
      for (int c = 0; c < Columns; ++c) sum[r][c] = fma(x[r * x_row], y[c * y_column], sum[r][c]);
  for (int r = 0; r < Rows; ++r)
    for (int c = 0; c < Columns; ++c) out[r][c] = sum[r][c];
}

// The whole product, height x width, to rows `out_row` apart; or, if square, its lower triangle mirrored. The last
// tiles are moved back to end with the matrix.
template <class T, bool Symmetric>
SK_INLINE void product(int height, int width, int length, const Vec<T>* x, int x_row, int x_sum, const Vec<T>* y,
                       int y_column, int y_sum, Vec<T>* out, int out_row) {
  constexpr int rows = 4, columns = kVectorBytes == 64 ? 5 : 2;
  const auto put = [&](int i, int j, Vec<T> value) {
    if (!Symmetric || j <= i) out[i * out_row + j] = value;
    if (Symmetric && j < i) out[j * out_row + i] = value;
  };
  if (height < rows || width < columns) {
    for (int i = 0; i < height; ++i) {
      for (int j = 0; j < width; ++j) {
        Vec<T> tile[1][1];
        product_tile<T, 1, 1>(length, x + i * x_row, x_row, x_sum, y + j * y_column, y_column, y_sum, tile);
        put(i, j, tile[0][0]);
      }
    }
    return;
  }
  for (int i0 = 0; i0 < height; i0 += rows) {
    const int i = i0 + rows <= height ? i0 : height - rows;
    for (int j0 = 0; j0 < width && (!Symmetric || j0 < i + rows); j0 += columns) {
      const int j = j0 + columns <= width ? j0 : width - columns;
      Vec<T> tile[rows][columns];
      product_tile<T, rows, columns>(length, x + i * x_row, x_row, x_sum, y + j * y_column, y_column, y_sum, tile);
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) put(i + r, j + c, tile[r][c]);
    }
  }
}

// The length of the longest column of a square matrix; the squares are of numbers scaled to a largest one near 1.
template <class T>
SK_INLINE Vec<T> longest_column(int n, const Vec<T>* m) {
  Vec<T> largest{}, longest{};
  for (int i = 0; i < n * n; ++i) largest = max(abs(m[i]), largest);
  const PowerOfTwo<T> unit = power_of_two<T>(largest);
  for (int j = 0; j < n; ++j) {
    Vec<T> sum{};
    for (int i = 0; i < n; ++i) {
      const Vec<T> entry = m[i * n + j] * unit.down;
      sum = fma(entry, entry, sum);
    }
    longest = max(sum, longest);
  }
  return sqrt(longest) * unit.up;
}

// M to S, in place: S_ij = num_ij F(w_j - w_i) / 2 off the diagonal, `diagonal` (zero if null) on it.
template <class T>
SK_INLINE void weigh_pairs(int n, const GapRule& rule, const Vec<T>* values, const Vec<T>* diagonal, Vec<T>* m) {
  const Vec<T> zero{}, smallest = zero + std::numeric_limits<T>::min();
  // Gaps are measured in units of a power of two near max|w|: no square of theirs over- or underflows harmfully.
  Vec<T> largest{};
  for (int i = 0; i < n; ++i) largest = max(abs(values[i]), largest);
  const PowerOfTwo<T> unit = power_of_two<T>(largest);
  const Vec<T> floor = largest * unit.down * static_cast<T>(rule.gap_floor), floor_square = floor * floor;
  const Vec<T> scale = unit.down * T(0.5);
  const T kappa = static_cast<T>(rule.noise_kappa) * std::numeric_limits<T>::epsilon();
  const Vec<T> limit = rule.mode == kAuto ? longest_column<T>(n, m) * kappa : zero;
  for (int i = 0; i < n; ++i) {
    const Vec<T> wi = values[i] * unit.down;
    for (int j = 0; j < i; ++j) {
      const Vec<T> upper = m[i * n + j], lower = m[j * n + i], gap = values[j] * unit.down - wi;
      Vec<T> numerator = upper - lower, weighed;
      if (rule.mode == kRaw) {
        weighed = numerator / gap;
      } else {
        if (rule.mode == kAuto) numerator = select(less_equal(abs(numerator), limit), zero, numerator);
        // `smallest` keeps 0/0 away: an implicit floor of its root, far below any gap that rounding leaves.
        Vec<T> inverse = gap / max(fma(gap, gap, rule.mode == kMask ? zero : floor_square), smallest);
        if (rule.mode == kMask) inverse = select(greater(abs(gap), floor), inverse, zero);
        weighed = numerator * inverse;
      }
      m[i * n + j] = m[j * n + i] = weighed * scale;
    }
    m[i * n + i] = diagonal ? diagonal[i] : zero;
  }
}

}  // namespace stablekern
