// Conjugate gradients for dense systems, a whole solve at a time and a few systems per thread, in turns. (Sparse ones:
// cg_csr.cpp.)
//
// A product with a dense A is the sum of A's rows, each times one entry of the vector: for a Hermitian or symmetric A
// rows serve as columns (conjugated, for a Hermitian one), so no sum runs across lanes but those of the inner products.
// A small matrix stays in the first-level cache for all iterations; up to kHeld vectors long, A p never leaves the
// registers.
#include "stablekern/cg_call.h"
#include "stablekern/krylov.h"
#include "stablekern/lanes.h"
#include "stablekern/lapack.h"
#include "stablekern/tensor.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <complex>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kPrefetched = 64 * 64, kPrefetchedPerIteration = 1024, kLine = 64;  // elements of a matrix; bytes
constexpr int64_t kMostTurns = 4, kTurnBytes = 40 * 1024;  // systems that take turns, and the size of their matrices
constexpr int kHeld = 4;  // vectors of a row in registers
// A matrix of sizes within 2^30 is used as it is: no square of what it makes of numbers around 1 leaves float's range.
constexpr int kPlainExponent = 30;

// ---- rows ---------------------------------------------------------------------------------------------------------

template <class T>
SK_INLINE Vec<T> load_part(const T* p, int64_t w, int64_t count) {
  return count > w * kLanes<T> ? load_block(p, static_cast<int>(w), count) : Vec<T>{};
}
template <class T>
SK_INLINE void store_part(T* p, Vec<T> v, int64_t w, int64_t count) {
  if (count > w * kLanes<T>) store_block(p, v, static_cast<int>(w), count);
}
// Vector w of the n elements at p, 0 beyond them.
template <class S>
SK_INLINE Element<S> load_elements(const S* p, int64_t w, int64_t n) {
  using T = RealOf<S>;
  if constexpr (kIsComplex<S>) {
    const T* parts = reinterpret_cast<const T*>(p);
    ComplexVec<T> v;
    deinterleave<T>(load_part(parts, 2 * w, 2 * n), load_part(parts, 2 * w + 1, 2 * n), v.re, v.im);
    return v;
  } else {
    return load_part(p, w, n);
  }
}
template <class S>
SK_INLINE void store_elements(S* p, Element<S> v, int64_t w, int64_t n) {
  using T = RealOf<S>;
  if constexpr (kIsComplex<S>) {
    T* parts = reinterpret_cast<T*>(p);
    Vec<T> first, second;
    interleave<T>(v.re, v.im, first, second);
    store_part(parts, first, 2 * w, 2 * n);
    store_part(parts, second, 2 * w + 1, 2 * n);
  } else {
    store_part(p, v, w, n);
  }
}
// Elements with their parts apart, as planes.
template <class S>
struct Planes {
  RealOf<S>* re;
  RealOf<S>* im;  // of complex S
  SK_INLINE Element<S> vector(int64_t at) const {
    if constexpr (kIsComplex<S>)
      return {load(re + at), load(im + at)};
    else
      return load(re + at);
  }
  SK_INLINE void set_vector(int64_t at, Element<S> v) const {
    if constexpr (kIsComplex<S>) {
      store(re + at, v.re);
      store(im + at, v.im);
    } else {
      store(re + at, v);
    }
  }
  SK_INLINE Element<S> spread(int64_t at) const {
    if constexpr (kIsComplex<S>)
      return {splat(re[at]), splat(im[at])};
    else
      return splat(re[at]);
  }
  static void reserve(Arena& arena, int64_t count) {
    arena.reserve<RealOf<S>>(count);
    if (kIsComplex<S>) arena.reserve<RealOf<S>>(count);
  }
  static Planes take(Arena& arena, int64_t count) {
    Planes planes{arena.take<RealOf<S>>(count), nullptr};
    if (kIsComplex<S>) planes.im = arena.take<RealOf<S>>(count);
    return planes;
  }
};

// ---- the matrix ---------------------------------------------------------------------------------------------------

template <class S>
struct Matrix {
  using T = RealOf<S>;
  int64_t n, vectors, stride;
  Planes<S> rows;     // of A, `stride` apart, whole vectors long
  Planes<S> columns;  // for kAny
  int exponent;       // of what A has been divided by
  T largest;          // part of an entry, after that
  int32_t info;
};

// Room for a thread's matrix.
template <class S>
struct MatrixRoom {
  Planes<S> rows, columns;
};

// The largest part, the largest difference between mirrored entries, and whether all are finite.
template <class T>
struct Survey {
  T largest, asymmetry;
  bool finite;
};

// Of lanes that are not negative: their bits are ordered like them, and NaN comes last.
template <class T>
SK_INLINE T horizontal_largest(Vec<T> v) {
  return std::bit_cast<T>(horizontal_max<T>((IVec<T>)v));
}

// `tiles` tiles a side; `sign` is what a mirrored entry is multiplied with.
template <class T>
SK_NOINLINE Survey<T> survey(const T* plane, int64_t stride, int64_t tiles, T sign) {
  constexpr int L = kLanes<T>;
  Vec<T> largest{}, asymmetry{}, probe{};
  for (int64_t i = 0; i < tiles; ++i)
    for (int64_t j = i; j < tiles; ++j) {
      Vec<T> mirrored[L];
      for (int k = 0; k < L; ++k) mirrored[k] = load(plane + (j * L + k) * stride + i * L);
      if (i != j)
        for (int k = 0; k < L; ++k) {
          largest = max(abs(mirrored[k]), largest);
          probe = fma(mirrored[k], Vec<T>{}, probe);
        }
      transpose<T>(mirrored);
      for (int k = 0; k < L; ++k) {
        const Vec<T> here = load(plane + (i * L + k) * stride + j * L);
        largest = max(abs(here), largest);
        probe = fma(here, Vec<T>{}, probe);
        asymmetry = max(abs(fnma(splat(sign), mirrored[k], here)), asymmetry);
      }
    }
  return {horizontal_largest<T>(largest), horizontal_largest<T>(asymmetry), horizontal_sum(probe) == 0};
}

template <class T>
void transpose_plane(const T* from, int64_t stride, int64_t tiles, T* to) {
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < tiles; ++i)
    for (int64_t j = 0; j < tiles; ++j) {
      Vec<T> tile[L];
      for (int k = 0; k < L; ++k) tile[k] = load(from + (i * L + k) * stride + j * L);
      transpose<T>(tile);
      for (int k = 0; k < L; ++k) store(to + (j * L + k) * stride + i * L, tile[k]);
    }
}

template <class S>
void copy_rows(const S* a, Matrix<S>& m, const Planes<S>& to) {
  const int64_t padded = m.vectors * kLanes<RealOf<S>>;
  for (int64_t i = 0; i < m.n; ++i)
    for (int64_t w = 0; w < m.vectors; ++w)
      to.set_vector(i * padded + w * kLanes<RealOf<S>>, load_elements(a + i * m.n, w, m.n));
  m.rows = to;
  m.stride = padded;  // the rows from n on are 0 since the arena was made
}

template <class S>
SK_NOINLINE Matrix<S> read_matrix(const S* a, int64_t n, int method, RealOf<S> tolerance, const MatrixRoom<S>& room) {
  using T = RealOf<S>;
  constexpr int L = kLanes<T>;
  Matrix<S> m{n, (n + L - 1) / L, n, {}, {}, 0, T(0), 0};
  const bool direct = !kIsComplex<S> && method != kAny && n % L == 0;
  if (direct)
    m.rows.re = const_cast<T*>(reinterpret_cast<const T*>(a));
  else
    copy_rows(a, m, room.rows);
  Survey<T> seen = survey<T>(m.rows.re, m.stride, m.vectors, T(1));
  if constexpr (kIsComplex<S>) {
    const Survey<T> other = survey<T>(m.rows.im, m.stride, m.vectors, T(method == kHermitian ? -1 : 1));
    seen = {std::max(seen.largest, other.largest), std::max(seen.asymmetry, other.asymmetry), seen.finite && other.finite};
  }
  if (!seen.finite)
    m.info = kNonFinite;
  else if (method != kAny && seen.asymmetry > tolerance * seen.largest)
    m.info = kAsymmetric;
  m.largest = seen.largest;
  const int exponent = exponent_of(seen.largest);
  if (exponent > kPlainExponent || exponent < -kPlainExponent) {
    if (direct) copy_rows(a, m, room.rows);
    m.exponent = exponent;
    const Power<T> down(-exponent);
    m.largest = down * m.largest;
    for (int64_t at = 0; at < n * m.stride; at += L) m.rows.set_vector(at, down * m.rows.vector(at));
  }
  if (method == kAny) {
    m.columns = room.columns;
    transpose_plane<T>(m.rows.re, m.stride, m.vectors, m.columns.re);
    if constexpr (kIsComplex<S>) transpose_plane<T>(m.rows.im, m.stride, m.vectors, m.columns.im);
  }
  return m;
}

// The sum over j of row j, or its conjugate, times p[j]: W vectors of it, from element `at` on. Zeros follow an odd
// last row and element.
template <class S, int W, bool kConjugate>
SK_INLINE void combine(const Planes<S>& rows, int64_t stride, int64_t n, const Planes<S>& p, int64_t at, Element<S>* q) {
  Element<S> even[W], odd[W];  // two chains for each vector hide the latency of the additions
  const auto row = [&](int64_t j, int w) __attribute__((always_inline)) {
    return rows.vector(j * stride + at + w * kLanes<RealOf<S>>);
  };
  const auto plus = [&](int64_t j, int w, Element<S> factor, Element<S> sum) __attribute__((always_inline)) {
    return kConjugate ? fma_conj(row(j, w), factor, sum) : fma(row(j, w), factor, sum);
  };
  const Element<S> first = p.spread(0), second = p.spread(1);
  for (int w = 0; w < W; ++w) even[w] = (kConjugate ? conj(row(0, w)) : row(0, w)) * first;
  for (int w = 0; w < W; ++w) odd[w] = (kConjugate ? conj(row(1, w)) : row(1, w)) * second;
  for (int64_t j = 2; j < n; j += 2) {
    const Element<S> factor = p.spread(j), other = p.spread(j + 1);
    for (int w = 0; w < W; ++w) even[w] = plus(j, w, factor, even[w]);
    for (int w = 0; w < W; ++w) odd[w] = plus(j + 1, w, other, odd[w]);
  }
  for (int w = 0; w < W; ++w) q[w] = even[w] + odd[w];
}

template <class S, int W, bool kConjugate>
SK_INLINE void product(const Planes<S>& rows, const Matrix<S>& m, const Planes<S>& p, Element<S>* q) {
  constexpr int L = kLanes<RealOf<S>>;
  if constexpr (W > 0) {
    combine<S, W, kConjugate>(rows, m.stride, m.n, p, 0, q);
  } else {
    int64_t w = 0;
    for (; w + 4 <= m.vectors; w += 4) combine<S, 4, kConjugate>(rows, m.stride, m.n, p, w * L, q + w);
    if (m.vectors - w >= 2) {
      combine<S, 2, kConjugate>(rows, m.stride, m.n, p, w * L, q + w);
      w += 2;
    }
    if (m.vectors > w) combine<S, 1, kConjugate>(rows, m.stride, m.n, p, w * L, q + w);
  }
}

// ---- one system ---------------------------------------------------------------------------------------------------

template <class S>
struct System {
  const S* b;
  const S* x0;      // or null
  const S* blocks;  // (c, s, s) of the preconditioner, or null
  int64_t block;    // s
  RealOf<S> rtol, atol;
  int64_t maxiter;
  S* x;
};

template <class T>
struct Outcome {
  int32_t info;
  int64_t iterations;
  T residual;
};

// Memory of a solve: what is read element by element, and vectors beyond kHeld.
template <class S>
struct Room {
  Planes<S> p, r, z;
  Element<S>* rows[6];

  static void reserve(Arena& arena, int64_t vectors) {
    for (int part = 0; part < 3; ++part) Planes<S>::reserve(arena, vectors * kLanes<RealOf<S>>);
    for (int part = 0; part < 6; ++part) arena.reserve<Element<S>>(vectors);
  }
  static Room take(Arena& arena, int64_t vectors) {
    const auto plane = [&] { return Planes<S>::take(arena, vectors * kLanes<RealOf<S>>); };
    Room room{plane(), plane(), plane(), {}};
    for (auto& row : room.rows) row = arena.take<Element<S>>(vectors);
    return room;
  }
};

// A vector of unknowns: W SIMD vectors, or, for W = 0, any number of them elsewhere.
template <class S, int W>
struct Row {
  Element<S> v[W];
  explicit Row(Element<S>*) {}
};
template <class S>
struct Row<S, 0> {
  Element<S>* v;
  explicit Row(Element<S>* memory) : v(memory) {}
};

// A solve that can be left after each iteration: `begin` it, then `advance` it until that is false.
template <class S, int W, int kMethod>
class Solver {
 public:
  using T = RealOf<S>;

  Outcome<T> out{};  // once there is nothing left to do

  explicit Solver(const Room<S>& room)
      : room(room),
        y(room.rows[0]),
        r(room.rows[1]),
        step(room.rows[2]),
        b(room.rows[3]),
        q(room.rows[4]),
        z(room.rows[5]) {}

  // Both of them: whether there is more to do.
  SK_NOINLINE bool begin(const Matrix<S>& matrix, const System<S>& given) {
    A = matrix;
    system = given;
    out = {0, 0, T(0)};
    for (int64_t w = 0; w < count(); ++w) b.v[w] = load_elements(system.b, w, A.n);
    const T size = size_of(b);
    if (size == 0) {
      std::fill_n(system.x, A.n, S(0));
      return false;
    }
    if (!std::isfinite(size)) return failed(A.info | kNonFinite);
    if (A.info != 0) return failed(A.info);
    scale = exponent_of(size);
    const Power<T> down(-scale);
    for (int64_t w = 0; w < count(); ++w) b.v[w] = down * b.v[w];
    threshold = std::max(system.rtol * std::sqrt(squared_norm(b)), down * system.atol);
    before = std::numeric_limits<T>::infinity();
    if (system.x0 == nullptr) {
      for (int64_t w = 0; w < count(); ++w) {
        y.v[w] = Element<S>{};
        r.v[w] = b.v[w];
      }
    } else {
      const Power<T> into(A.exponent - scale);
      for (int64_t w = 0; w < count(); ++w) y.v[w] = into * load_elements(system.x0, w, A.n);
      if (!std::isfinite(size_of(y))) return failed(kNonFinite);
      take_residual();
    }
    return restart();
  }
  SK_NOINLINE bool advance() {
    if (iterate() && out.iterations < system.maxiter) return true;
    const Power<T> larger(shift);
    for (int64_t w = 0; w < count(); ++w) y.v[w] = y.v[w] + larger * step.v[w];
    take_residual();
    return restart();
  }

 private:
  using R = Row<S, W>;
  using Inner = std::conditional_t<kMethod == kSymmetric, S, T>;
  static constexpr int L = kLanes<T>;
  static constexpr T kEpsilon = std::numeric_limits<T>::epsilon();

  Matrix<S> A;
  System<S> system;
  Room<S> room;
  // y is x in units of its own; the correction `step` and r are in those of the last start, 2^shift.
  R y, r, step, b, q, z;
  T threshold, before, target;
  Inner rz;
  int scale, shift;

  SK_INLINE int64_t count() const { return W > 0 ? W : A.vectors; }

  static SK_INLINE auto spread(Inner a) {
    if constexpr (kIsComplex<S> && kMethod == kSymmetric)
      return ComplexVec<T>{splat(a.real()), splat(a.imag())};
    else
      return splat(a);
  }
  SK_INLINE T squared_norm(const R& u) const {
    Vec<T> sum{};
    for (int64_t w = 0; w < count(); ++w) sum = add_square(u.v[w], sum);
    return horizontal_sum(sum);
  }
  SK_INLINE Inner inner(const R& u, const R& v) const {
    if constexpr (!kIsComplex<S>) {
      Vec<T> sum{};
      for (int64_t w = 0; w < count(); ++w) sum = fma(u.v[w], v.v[w], sum);
      return horizontal_sum(sum);
    } else if constexpr (kMethod == kSymmetric) {
      ComplexVec<T> sum{};
      for (int64_t w = 0; w < count(); ++w) sum = fma(u.v[w], v.v[w], sum);
      return {horizontal_sum(sum.re), horizontal_sum(sum.im)};
    } else {
      Vec<T> sum{};
      for (int64_t w = 0; w < count(); ++w) sum = fma(u.v[w].im, v.v[w].im, fma(u.v[w].re, v.v[w].re, sum));
      return horizontal_sum(sum);
    }
  }
  SK_INLINE void spill(const R& from, const Planes<S>& to) const {
    for (int64_t w = 0; w < count(); ++w) to.set_vector(w * L, from.v[w]);
  }
  // A p
  SK_INLINE void apply(const Planes<S>& p, R& to) const {
    product<S, W, kMethod == kHermitian>(kMethod == kAny ? A.columns : A.rows, A, p, to.v);
  }
  // r = b - A y
  SK_NOINLINE void take_residual() {
    spill(y, room.p);
    apply(room.p, q);
    for (int64_t w = 0; w < count(); ++w) r.v[w] = b.v[w] - q.v[w];
  }
  SK_NOINLINE void precondition() {
    const int64_t size = system.block;
    const Power<T> from_blocks(A.exponent);
    if (size == 1) {
      for (int64_t w = 0; w < count(); ++w) {
        const Element<S> scaled = from_blocks * load_elements(system.blocks, w, A.n);
        z.v[w] = scaled * r.v[w];
      }
      return;
    }
    const auto part = [](const Planes<S>& from, int64_t i) {
      if constexpr (kIsComplex<S>)
        return S(from.re[i], from.im[i]);
      else
        return from.re[i];
    };
    spill(r, room.r);
    for (int64_t i = 0; i < A.n; ++i) {
      const int64_t first = i / size * size, last = std::min(first + size, A.n);
      const S* row = system.blocks + i * size;
      S sum(0);
      for (int64_t j = first; j < last; ++j) sum += row[j - first] * part(room.r, j);
      room.z.re[i] = std::real(sum);
      if constexpr (kIsComplex<S>) room.z.im[i] = std::imag(sum);
    }
    for (int64_t w = 0; w < count(); ++w) z.v[w] = from_blocks * room.z.vector(w * L);
  }
  // z, along which the search goes on from r, and its inner product with r, whose own square is rr.
  SK_INLINE Inner direction(T rr) {
    if constexpr (kMethod == kAny) {
      spill(r, room.r);
      product<S, W, true>(A.rows, A, room.r, z.v);
      return rr;
    } else {
      if constexpr (W == 0) {
        if (system.blocks != nullptr) {
          precondition();
          return inner(r, z);
        }
      }
      for (int64_t w = 0; w < count(); ++w) z.v[w] = r.v[w];
      if constexpr (kMethod == kSymmetric)
        return inner(r, z);
      else
        return rr;
    }
  }
  SK_INLINE T size_of(const R& u) const {  // NaN if one is not finite
    Vec<T> size{}, probe{};
    for (int64_t w = 0; w < count(); ++w) {
      size = max(part_size(u.v[w]), size);
      probe = probe_finite(u.v[w], probe);
    }
    return horizontal_largest<T>(size) + horizontal_sum(probe);
  }

  bool failed(int32_t info) {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    std::fill_n(reinterpret_cast<T*>(system.x), A.n * kParts<S>, nan);
    out = {info, 0, nan};
    return false;
  }

  // With the true residual r: it is within the tolerance, or cannot be brought there, or the recurrence starts from it.
  SK_NOINLINE bool restart() {
    shift = exponent_of(size_of(r));
    const Power<T> smaller(-shift), larger(shift);
    for (int64_t w = 0; w < count(); ++w) r.v[w] = smaller * r.v[w];
    const T rr = squared_norm(r), norm = std::sqrt(rr);
    out.residual = larger * norm;
    const bool reached = out.residual <= threshold;
    if (reached)
      out.info = 0;
    else if (out.info == 0)
      out.info = out.iterations >= system.maxiter ? kMaxiter : out.residual <= before / 2 ? 0 : kBreakdown;
    if (reached || out.info != 0) {
      const Power<T> up(scale - A.exponent);
      for (int64_t w = 0; w < count(); ++w) store_elements(system.x, up * y.v[w], w, A.n);
      out.residual = Power<T>(scale) * out.residual;
      return false;
    }
    // A second start is there because rounding stood between the recurrence and the truth: it aims lower.
    const T aim = std::isfinite(before) ? threshold / 4 : threshold;
    before = out.residual;
    target = std::max(smaller * aim, kEpsilon * norm);
    target *= target;
    rz = direction(rr);
    spill(z, room.p);
    for (int64_t w = 0; w < count(); ++w) step.v[w] = Element<S>{};
    return true;
  }

  // One step of the recurrence from r; whether |r|^2 is above the target still.
  SK_INLINE bool iterate() {
    // Without a preconditioner |alpha| |A| is at most the condition number (CGNE: its square), here over 1/eps.
    const T longest = system.blocks == nullptr ? T(1) : std::numeric_limits<T>::max();
    R p(z.v), Ap(q.v), u(r.v);  // in registers, or for W = 0 the memory itself
    apply(room.p, Ap);
    for (int64_t w = 0; w < count(); ++w) p.v[w] = room.p.vector(w * L);
    const Inner pq = kMethod == kAny ? Inner(squared_norm(p)) : inner(p, Ap);
    [[maybe_unused]] const T qq = W > 0 ? squared_norm(Ap) : T(0);
    const Inner alpha = rz / pq;
    // A longer step leads along what A has no hold of.
    const T reach = std::abs(alpha) * A.largest * (kMethod == kAny ? A.largest * kEpsilon : T(1)) * kEpsilon;
    const bool usable = kMethod == kSymmetric || std::real(pq) > 0;
    if (!usable || !(reach < longest)) {
      out.info = kMethod == kHermitian && std::real(pq) < 0 ? kIndefinite : kBreakdown;
      return false;
    }
    const auto forward = spread(alpha), back = spread(-alpha);
    for (int64_t w = 0; w < count(); ++w) {
      step.v[w] = fma(forward, p.v[w], step.v[w]);
      u.v[w] = fma(back, Ap.v[w], r.v[w]);
      r.v[w] = u.v[w];
    }
    ++out.iterations;
    if constexpr (W > 0) {
      // What |r|^2 will be is known from |A p|^2 before r is, so that the next direction need not wait for its sum.
      // That is taken meanwhile, and is what counts (Chen and Carson 2020, arXiv:1905.01549: predict and recompute).
      const auto beta = splat(std::max(alpha * alpha * qq - rz, T(0)) / rz);
      for (int64_t w = 0; w < count(); ++w) room.p.set_vector(w * L, fma(beta, p.v[w], u.v[w]));
      rz = squared_norm(u);
      return rz > target;
    } else {
      const T rr = squared_norm(u);
      if (rr <= target) return false;
      const Inner next = direction(rr);
      const auto beta = spread(next / rz);
      rz = next;
      for (int64_t w = 0; w < count(); ++w) room.p.set_vector(w * L, fma(beta, room.p.vector(w * L), z.v[w]));
      return true;
    }
  }
};

// ---- all systems --------------------------------------------------------------------------------------------------

template <class S>
struct DenseCall : CgCall<S> {
  const S* A;
};

template <class S>
System<S> system_of(const CgCall<S>& call, int64_t at) {
  return {call.b + at * call.n,
          call.x0 == nullptr ? nullptr : call.x0 + at * call.n,
          call.blocks == nullptr ? nullptr : call.blocks + at / call.columns * call.block_count,
          call.block,
          call.rtol[at * call.each_rtol],
          call.atol[at * call.each_atol],
          call.maxiter,
          call.x + at * call.n};
}
template <class S>
void report(const CgCall<S>& call, int64_t at, const Outcome<RealOf<S>>& out) {
  call.info[at] = out.info;
  call.iterations[at] = static_cast<int32_t>(out.iterations);
  call.residual[at] = out.residual;
}

// Systems one after the other.
template <class S, int W, int kMethod>
class Queue {
 public:
  Queue(const DenseCall<S>& call, const MatrixRoom<S>& matrix_room, const Room<S>& room, int64_t first, int64_t last)
      : call(call), matrix_room(matrix_room), solver(room), at(first), last(last), running(at < last) {
    if (running) open();
  }
  // An iteration of the present system; whether there are more to do, of this or of others.
  SK_INLINE bool advance() {
    if (!running) return false;
    for (const char* end = std::min(ahead + kPrefetchedPerIteration, ahead_end); ahead < end; ahead += kLine)
      __builtin_prefetch(ahead, 0, 2);
    if (!solver.advance()) next();
    return running;
  }

 private:
  const DenseCall<S>& call;
  const MatrixRoom<S> matrix_room;
  Solver<S, W, kMethod> solver;
  Matrix<S> matrix;
  int64_t at, last, read = -1;
  bool running;
  // The next matrix, as far as it is not on its way to the second-level cache yet.
  const char *ahead = nullptr, *ahead_end = nullptr;

  SK_NOINLINE void next() {
    report(call, at, solver.out);
    running = ++at < last;
    if (running) open();
  }
  // Begins systems up to one that has something left to do.
  void open() {
    for (;;) {
      const int64_t item = at / call.columns, entries = call.n * call.n;
      if (item != read) {
        const S* here = call.A + item * entries;
        matrix = read_matrix(here, call.n, kMethod, call.asymmetry, matrix_room);
        read = item;
        if (entries <= kPrefetched && (last - 1) / call.columns > item) {
          ahead = reinterpret_cast<const char*>(here + entries);
          ahead_end = reinterpret_cast<const char*>(here + 2 * entries);
        }
      }
      if (solver.begin(matrix, system_of(call, at))) return;
      report(call, at, solver.out);
      running = ++at < last;
      if (!running) return;
    }
  }
};

// Systems take turns, an iteration each: while the inner products of one are summed up, the product of the next is
// under way.
template <class S, int W, int kMethod>
SK_NOINLINE void solve_range(const DenseCall<S>& call, int64_t begin, int64_t end) {
  using T = RealOf<S>;
  const int64_t n = call.n, vectors = (n + kLanes<T> - 1) / kLanes<T>, padded = vectors * kLanes<T>;
  const int64_t fitting = kTurnBytes / std::max<int64_t>(1, padded * padded * static_cast<int64_t>(sizeof(S)));
  const int64_t turns = std::clamp<int64_t>(std::min(fitting, end - begin), 1, kMostTurns);
  constexpr int kCopies = kMethod == kAny ? 2 : 1;
  Arena arena;
  for (int64_t turn = 0; turn < turns; ++turn) {
    for (int part = 0; part < kCopies; ++part) Planes<S>::reserve(arena, padded * padded);
    Room<S>::reserve(arena, vectors);
  }
  arena.allocate();
  std::vector<Queue<S, W, kMethod>> queues;
  queues.reserve(turns);
  for (int64_t turn = 0; turn < turns; ++turn) {
    MatrixRoom<S> matrix_room{Planes<S>::take(arena, padded * padded), {}};
    if (kMethod == kAny) matrix_room.columns = Planes<S>::take(arena, padded * padded);
    const auto border = [&](int64_t k) { return begin + (end - begin) * k / turns; };
    queues.emplace_back(call, matrix_room, Room<S>::take(arena, vectors), border(turn), border(turn + 1));
  }
  bool more = true;
  while (more) {
    more = false;
    for (auto& queue : queues) more |= queue.advance();
  }
}

template <class S>
using Solve = void (*)(const DenseCall<S>&, int64_t, int64_t);

template <class S>
Solve<S> solver_for(int64_t vectors, int method, bool preconditioned) {
  if (method == kAny) return solve_range<S, 0, kAny>;
  if constexpr (kIsComplex<S>) {
    return method == kSymmetric ? solve_range<S, 0, kSymmetric> : solve_range<S, 0, kHermitian>;
  } else {
    constexpr std::array<Solve<S>, kHeld + 1> held{solve_range<S, 0, kHermitian>, solve_range<S, 1, kHermitian>,
                                                   solve_range<S, 2, kHermitian>, solve_range<S, 3, kHermitian>,
                                                   solve_range<S, 4, kHermitian>};
    return held[vectors <= kHeld && !preconditioned ? static_cast<std::size_t>(vectors) : 0];
  }
}

void cg_fwd(Tensor A, Tensor b, std::optional<Tensor> x0, std::optional<Tensor> blocks, Tensor rtol, Tensor atol,
            int64_t maxiter, int64_t method, double asymmetry, Tensor x, Tensor info, Tensor iterations,
            Tensor residual) {
  dispatch(b, [&]<class S>(S) {
    constexpr int L = kLanes<RealOf<S>>;
    const DenseCall<S> call{{b, x0, blocks, rtol, atol, maxiter, asymmetry, x, info, iterations, residual}, data<S>(A)};
    const Solve<S> solve = solver_for<S>((call.n + L - 1) / L, static_cast<int>(method), blocks.has_value());
    torch::stable::parallel_for(0, call.systems, 1, [&](int64_t begin, int64_t end) { solve(call, begin, end); });
  });
}

// ---- the gradient of A --------------------------------------------------------------------------------------------

// Minus the sum over k of adjoint x^H, or its Hermitian or symmetric part, a row of it at a time.
template <class S, int kMethod>
void outer(const S* adjoint, const S* x, int64_t columns, int64_t n, const Planes<S>& l, const Planes<S>& c, S* grad) {
  using T = RealOf<S>;
  constexpr int L = kLanes<T>;
  const int64_t vectors = (n + L - 1) / L, padded = vectors * L;
  for (int64_t k = 0; k < columns; ++k)
    for (int64_t w = 0; w < vectors; ++w) {
      l.set_vector(k * padded + w * L, load_elements(adjoint + k * n, w, n));
      c.set_vector(k * padded + w * L, load_elements(x + k * n, w, n));
    }
  const Vec<T> weight = splat(kMethod == kAny ? T(-1) : T(-0.5));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t w = 0; w < vectors; ++w) {
      Element<S> sum{};
      for (int64_t k = 0; k < columns; ++k) {
        const int64_t row = k * padded, at = row + w * L;
        sum = fma_conj(c.vector(at), l.spread(row + i), sum);
        if constexpr (kMethod == kHermitian) {  // conj(adjoint_j) x_i
          sum = fma_conj(l.vector(at), c.spread(row + i), sum);
        } else if constexpr (kMethod == kSymmetric) {  // adjoint_j conj(x_i)
          sum = fma_conj(c.spread(row + i), l.vector(at), sum);
        }
      }
      store_elements(grad + i * n, sum * weight, w, n);
    }
}

void cg_bwd(Tensor adjoint, Tensor x, int64_t method, Tensor grad) {
  const int64_t batch = x.size(0), columns = x.size(1), n = x.size(2);
  dispatch(x, [&]<class S>(S) {
    const int64_t padded = padded_to_lanes<RealOf<S>>(n);
    torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Arena arena;
      for (int part = 0; part < 2; ++part) Planes<S>::reserve(arena, columns * padded);
      arena.allocate();
      const auto l = Planes<S>::take(arena, columns * padded), c = Planes<S>::take(arena, columns * padded);
      const auto run = method == kAny ? outer<S, kAny> : method == kSymmetric ? outer<S, kSymmetric> : outer<S, kHermitian>;
      for (int64_t item = begin; item < end; ++item) {
        const int64_t at = item * columns * n;
        run(data<S>(adjoint) + at, data<S>(x) + at, columns, n, l, c, mutable_data<S>(grad) + item * n * n);
      }
    });
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "cg_fwd(Tensor A, Tensor b, Tensor? x0, Tensor? blocks, Tensor rtol, Tensor atol, int maxiter, int method,"
      " float asymmetry, Tensor(a!) x, Tensor(b!) info, Tensor(c!) iterations, Tensor(d!) residual) -> ()");
  m.def("cg_bwd(Tensor adjoint, Tensor x, int method, Tensor(a!) grad_A) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("cg_fwd", TORCH_BOX(&stablekern::cg_fwd));
  m.impl("cg_bwd", TORCH_BOX(&stablekern::cg_bwd));
}
