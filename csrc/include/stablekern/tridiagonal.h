// A few eigenvectors of one Hermitian matrix that is too large for a SIMD lane: A = Q T Q^H with a real tridiagonal T,
// in whose basis the rest is cheap. The lanes here hold neighbouring columns of one matrix.
//
//   1. Householder reduction from the last row up (Golub & Van Loan, 8.3.1). The rank-2 update of one step and the
//      matrix-vector product of the next are one pass over the lower triangle;
//   2. the wanted eigenvalues of T by multisection with Sturm counts (Parlett, The Symmetric Eigenvalue Problem, 3.3);
//   3. eigenvectors of T by subspace iteration with Im (T - w + i h)^-1, h about the error of w: a Lorentzian at each
//      w, so nothing is singular, and equal eigenvalues get orthonormal vectors as well as any others;
//   4. reflectors to go back.
//
// Steps 2 and 3 are in double precision whatever the matrix is: they are cheap, and what is an ulp of float32 apart is
// well separated there.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "stablekern/eigh_lanes.h"
#include "stablekern/lapack.h"

namespace stablekern {

// ---- one row in lanes ----------------------------------------------------------------------------------------------

// The first `count` numbers at `from`; the other lanes are 0.
template <class S>
SK_INLINE Element<S> load_numbers(const S* from, int count) {
  using T = RealOf<S>;
  const T* p = reinterpret_cast<const T*>(from);
  if constexpr (kIsComplex<S>) {
    const int reals = 2 * count;
    const Vec<T> first = load_first(p, reals), second = load_first(p + kLanes<T>, std::max(reals - kLanes<T>, 0));
    Element<S> x;
    deinterleave<T>(first, second, x.re, x.im);
    return x;
  } else {
    return load_first(p, count);
  }
}
template <class S>
SK_INLINE void store_numbers(S* to, Element<S> x, int count) {
  using T = RealOf<S>;
  T* p = reinterpret_cast<T*>(to);
  if constexpr (kIsComplex<S>) {
    const int reals = 2 * count;
    Vec<T> first, second;
    interleave<T>(x.re, x.im, first, second);
    store_first(p, first, reals);
    store_first(p + kLanes<T>, second, std::max(reals - kLanes<T>, 0));
  } else {
    store_first(p, x, count);
  }
}
template <class S>
SK_INLINE S number(const Element<S>* x, int i) {
  using T = RealOf<S>;
  const T* p = reinterpret_cast<const T*>(x + i / kLanes<T>) + i % kLanes<T>;
  if constexpr (kIsComplex<S>)
    return {p[0], p[kLanes<T>]};
  else
    return *p;
}
template <class S>
SK_INLINE void set_number(Element<S>* x, int i, S value) {
  using T = RealOf<S>;
  T* p = reinterpret_cast<T*>(x + i / kLanes<T>) + i % kLanes<T>;
  if constexpr (kIsComplex<S>)
    p[0] = value.real(), p[kLanes<T>] = value.imag();
  else
    *p = value;
}
template <class S>
SK_INLINE Element<S> splat_number(S value) {
  if constexpr (kIsComplex<S>)
    return {splat(value.real()), splat(value.imag())};
  else
    return splat(value);
}

// ---- reduction -----------------------------------------------------------------------------------------------------

template <class S>
class Reduction {
 public:
  using T = RealOf<S>;
  using E = Element<S>;
  static constexpr int kWidth = kLanes<T>;

  explicit Reduction(int n)
      : n(n), width((n + kWidth - 1) / kWidth), rows(size_t(n) * width), diagonal(n), couplings(n), inverse_h(n),
        phases(n), work_(2 * size_t(width)), sums_(kParts<S> * size_t(width) * kWidth) {}

  const int n, width;  // of a row, in elements
  Buffer<E> rows;      // row i > 1: the reflector H_i = I - inverse_h[i] u^H u
  // T (couplings[i] joins i and i + 1), as numbers of type T; Q = H_(n-1) ... H_2 diag(phases).
  Buffer<double> diagonal, couplings;
  Buffer<T> inverse_h;
  Buffer<S> phases;

  // Of the lower triangle of a matrix of finite numbers, given by rows, over the returned power of two.
  T reduce(const S* from) {
    const T up = load(from);
    E *q = work_, *p = work_ + width;  // q: of the reflector whose update is still due
    std::fill_n(phases.get(), n, S(1));
    couplings[n - 1] = 0;
    for (int i = n - 1; i > 0; --i) {
      E* row = rows + int64_t{i} * width;
      const E* u = row + width;
      if (i < n - 1) {
        const E minus_u = splat_number(-conjugate(number<S>(u, i))), minus_q = splat_number(-conjugate(number<S>(q, i)));
        for (int c = 0; c <= i / kWidth; ++c) row[c] = fma(minus_q, u[c], fma(minus_u, q[c], row[c]));
      }
      diagonal[i] = std::real(number<S>(row, i));
      const S alpha = number<S>(row, i - 1);
      if (i == 1) {
        couple(0, alpha);
        break;
      }
      const int used = (i + kWidth - 1) / kWidth;
      for (int k = i - 1; k < used * kWidth; ++k) set_number<S>(row, k, S(0));
      const T rest = horizontal_sum(sum_squares<S>(row, used)), size = std::abs(alpha);
      if (rest < kSquareFloor<T>) {  // nothing to eliminate
        couple(i - 1, alpha);
        set_number<S>(row, i - 1, S(1));
        inverse_h[i] = 0;
      } else {
        const T norm = std::sqrt(size * size + rest);
        // A smaller one has no phase to speak of.
        const S beta = size > kSquareFloor<T> ? alpha * (-norm / size) : S(-norm);
        couple(i - 1, beta);
        set_number<S>(row, i - 1, alpha - beta);
        inverse_h[i] = 1 / (norm * (norm + size));
      }
      i < n - 1 ? pass<true>(i, u, q, row, p) : pass<false>(i, nullptr, nullptr, row, p);
      // u A u^H / h is of A's size; 1 / h^2 might overflow.
      const T h = inverse_h[i], minus_half = (horizontal_sum(real_dot<S>(p, row, used)) * h) * (h * T(-0.5));
      for (int c = 0; c < used; ++c) p[c] = fma(splat(minus_half), row[c], p[c] * splat(h));
      std::swap(p, q);
    }
    S first = number<S>(rows, 0);
    if (n > 2) {
      const S u = number<S>(rows + 2 * width, 0), v = number<S>(q, 0);
      first -= conjugate(u) * v + conjugate(v) * u;
    }
    diagonal[0] = std::real(first);
    // Phases are products of those of all couplings below.
    if constexpr (kIsComplex<S>) {
      std::complex<double> phase = 1;
      for (int i = n - 2; i >= 0; --i) {
        phase *= std::conj(std::complex<double>(phases[i]));
        phase /= std::abs(phase);
        phases[i] = S(phase);
      }
      phases[n - 1] = 1;
    } else {
      S sign = 1;
      for (int i = n - 2; i >= 0; --i) phases[i] = sign *= phases[i];
      phases[n - 1] = 1;
    }
    return up;
  }

  // H_(n-1) ... H_2 x, or its adjoint's, for `count` vectors x, one after the other.
  template <bool Adjoint>
  void reflect(E* x, int count) const {
    for (int step = 2; step < n; ++step) {
      const int i = Adjoint ? n + 1 - step : step, used = (i + kWidth - 1) / kWidth;
      const E* u = rows + int64_t{i} * width;
      for (int v = 0; v < count; ++v) {
        E *y = x + int64_t{v} * width, sum{};
        for (int c = 0; c < used; ++c) sum = fma(u[c], y[c], sum);
        const E factor = splat_number(total(sum) * -inverse_h[i]);
        for (int c = 0; c < used; ++c) y[c] = fma_conj(u[c], factor, y[c]);
      }
    }
  }

  // The reflectors to and from the lower triangle of a matrix by rows.
  void save_reflectors(S* to) const {
    for (int i = 2; i < n; ++i)
      for (int c = 0; c * kWidth < i; ++c)
        store_numbers<S>(to + int64_t{i} * n + c * kWidth, rows[int64_t{i} * width + c], std::min(i - c * kWidth, kWidth));
  }
  void load_reflectors(const S* from) {
    for (int i = 2; i < n; ++i)
      for (int c = 0; c * kWidth < i; ++c)
        rows[int64_t{i} * width + c] =
            load_numbers<S>(from + int64_t{i} * n + c * kWidth, std::min(i - c * kWidth, kWidth));
  }

 private:
  static S total(E x) {
    if constexpr (kIsComplex<S>)
      return {horizontal_sum(x.re), horizontal_sum(x.im)};
    else
      return horizontal_sum(x);
  }

  // The coupling of i and i + 1, and for now its own phase.
  void couple(int i, S value) {
    const T size = std::abs(value);
    couplings[i] = size;
    phases[i] = size > 0 ? value / size : S(1);
  }

  // The lower triangle scaled to size 1, blocks of kWidth x kWidth on the diagonal whole.
  T load(const S* from) {
    Vec<T> largest{};
    for (int i = 0; i < n; ++i) {
      for (int c = 0; c <= i / kWidth; ++c) {
        const E x = load_numbers<S>(from + int64_t{i} * n + c * kWidth, std::min(i + 1 - c * kWidth, kWidth));
        largest = max(part_size(x), largest);
        rows[int64_t{i} * width + c] = x;
      }
    }
    T top = 0;
    for (int lane = 0; lane < kWidth; ++lane) top = std::max(top, static_cast<T>(largest[lane]));
    const PowerOfTwo<T> power = power_of_two<T>(splat(top));
    for (int i = 0; i < n; ++i) {
      E* row = rows + int64_t{i} * width;
      for (int c = 0; c <= i / kWidth; ++c) row[c] = row[c] * power.down;
      set_number<S>(row, i, S(std::real(number<S>(row, i))));
      for (int j = i / kWidth * kWidth; j < i; ++j)
        set_number<S>(rows + int64_t{j} * width, i, conjugate(number<S>(row, j)));
    }
    return power.up[0];
  }

  // Rows 0..size: a -= u^H q + q^H u if `Update`, then p = v a.
  template <bool Update>
  SK_NOINLINE void pass(int size, const E* u, const E* q, const E* v, E* p) {
    const int used = (size + kWidth - 1) / kWidth;
    std::fill_n(p, width, E{});
    Vec<T>* sums = sums_;
    for (int k = size; k < used * kWidth; ++k)
      for (int part = 0; part < kParts<S>; ++part) sums[part * used * kWidth + k] = Vec<T>{};
    constexpr int most = std::min(kIsComplex<S> ? 2 : 4, kWidth);  // what the registers hold; divides kWidth
    int row = 0;
    for (; row + most <= size; row += most) pass_rows<most, Update>(row, used, u, q, v, p);
    for (; row < size; ++row) pass_rows<1, Update>(row, used, u, q, v, p);
    for (int c = 0; c < used; ++c) {
      const Vec<T>* re = sums + c * kWidth;
      if constexpr (kIsComplex<S>)
        p[c] = p[c] + E{horizontal_sums<T>(re), horizontal_sums<T>(re + used * kWidth)};
      else
        p[c] = p[c] + horizontal_sums<T>(re);
    }
  }

  // Rows row..row+Rows, which end in the same block. What p gets from their own columns is left in `sums_`.
  template <int Rows, bool Update>
  SK_INLINE void pass_rows(int row, int used, const E* u, const E* q, const E* v, E* p) {
    E minus_u[Rows], minus_q[Rows], vr[Rows], sum[Rows];
    E* a[Rows];
    for (int r = 0; r < Rows; ++r) {
      if constexpr (Update) {
        minus_u[r] = splat_number(-conjugate(number<S>(u, row + r)));
        minus_q[r] = splat_number(-conjugate(number<S>(q, row + r)));
      }
      vr[r] = splat_number(number<S>(v, row + r));
      sum[r] = E{};
      a[r] = rows + int64_t{row + r} * width;
    }
    const int last = row / kWidth;
    for (int c = 0; c < last; ++c) {
      const E vc = v[c];
      E pc = p[c], uc, qc;
      if constexpr (Update) uc = u[c], qc = q[c];
      for (int r = 0; r < Rows; ++r) {
        E x = a[r][c];
        if constexpr (Update) {
          x = fma(minus_q[r], uc, fma(minus_u[r], qc, x));
          a[r][c] = x;
        }
        sum[r] = fma_conj(x, vc, sum[r]);
        pc = fma(x, vr[r], pc);
      }
      p[c] = pc;
    }
    for (int r = 0; r < Rows; ++r) {
      E x = a[r][last];
      if constexpr (Update) {
        x = fma(minus_q[r], u[last], fma(minus_u[r], q[last], x));
        a[r][last] = x;
      }
      sum[r] = fma_conj(x, v[last], sum[r]);
      if constexpr (kIsComplex<S>) {
        sums_[row + r] = sum[r].re;
        sums_[used * kWidth + row + r] = sum[r].im;
      } else {
        sums_[row + r] = sum[r];
      }
    }
  }

  Buffer<E> work_;
  Buffer<Vec<T>> sums_;
};

// ---- T -------------------------------------------------------------------------------------------------------------

// Eigenvalues and resolvents of a real symmetric tridiagonal matrix of about size 1.
class Tridiagonal64 {
 public:
  using V = Vec<double>;
  static constexpr int kWidth = kLanes<double>;

  explicit Tridiagonal64(int n) : n_(n), eliminated_(n), work_(n) {}

  void set(const double* diagonal, const double* couplings) {
    d_ = diagonal;
    e_ = couplings;
    double reach = 0;
    low_ = std::numeric_limits<double>::infinity();
    high_ = -low_;
    for (int i = 0; i < n_; ++i) {
      const double here = e_[i];  // the last one is 0
      low_ = std::min(low_, d_[i] - reach - here);
      high_ = std::max(high_, d_[i] + reach + here);
      reach = here;
    }
    norm_ = std::max({std::abs(low_), std::abs(high_), std::numeric_limits<double>::min()});
  }
  double norm() const { return norm_; }  // at least

  // Those with the given places in ascending order, each within `tolerance` >= 4 eps norm().
  void values(const std::vector<int>& places, double tolerance, double* found) {
    const int count = static_cast<int>(places.size());
    constexpr int abreast = 4;  // vectors, to fill the time a division takes
    const int points = std::max(1, abreast * kWidth / count);
    std::vector<double> low(places.size(), low_ - tolerance), high(places.size(), high_ + tolerance);
    const int groups = (count * points + abreast * kWidth - 1) / (abreast * kWidth);
    std::vector<V> x(static_cast<size_t>(groups) * abreast);
    std::vector<IVec<double>> below(x.size());
    const double* at = reinterpret_cast<const double*>(x.data());
    const int64_t* counts = reinterpret_cast<const int64_t*>(below.data());
    for (double widest = high[0] - low[0]; widest > tolerance;) {
      for (size_t i = 0; i < x.size() * kWidth; ++i) {
        const size_t t = std::min<size_t>(i / points, places.size() - 1);
        const double part = static_cast<double>(i % points + 1) / (points + 1);
        x[i / kWidth][i % kWidth] = low[t] + (high[t] - low[t]) * part;
      }
      for (int g = 0; g < groups; ++g) count_below<abreast>(x.data() + g * abreast, below.data() + g * abreast);
      widest = 0;
      for (int t = 0; t < count; ++t) {
        for (int j = t * points; j < (t + 1) * points; ++j) {
          if (counts[j] <= places[t]) {
            low[t] = std::max(low[t], at[j]);
          } else {
            high[t] = std::min(high[t], at[j]);
          }
        }
        widest = std::max(widest, high[t] - low[t]);
      }
    }
    for (int t = 0; t < count; ++t) found[t] = low[t] + (high[t] - low[t]) / 2;
  }

  // All of them, ascending, by implicit QL (Wilkinson & Reinsch, Linear Algebra, II/3). False if it took too long.
  bool all_values(double* found) {
    const double eps = std::numeric_limits<double>::epsilon(), tiny = eps * eps * norm_;
    constexpr int most = 60;  // iterations for one value; two are usual
    double *d = found, *e = work_;
    std::copy_n(d_, n_, d);
    std::copy_n(e_, n_, e);
    for (int l = 0; l < n_; ++l) {
      for (int iteration = 0;; ++iteration) {
        int m = l;
        while (m < n_ - 1 && std::abs(e[m]) > eps * (std::abs(d[m]) + std::abs(d[m + 1])) + tiny) ++m;
        if (m == l) break;
        if (iteration == most) return false;
        const double half = (d[l + 1] - d[l]) / (2 * e[l]), root = std::sqrt(half * half + 1);
        double g = d[m] - d[l] + e[l] / (half + std::copysign(root, half)), s = 1, c = 1, p = 0;
        int i = m - 1;
        for (; i >= l; --i) {
          const double f = s * e[i], b = c * e[i], r = std::sqrt(f * f + g * g);
          e[i + 1] = r;
          if (r == 0) break;  // the matrix has come apart
          const double inverse = 1 / r;
          s = f * inverse;
          c = g * inverse;
          g = d[i + 1] - p;
          const double turn = (d[i] - g) * s + 2 * c * b;
          p = s * turn;
          d[i + 1] = g + p;
          g = c * turn - b;
        }
        e[m] = 0;
        if (i >= l) {
          d[i + 1] -= p;
          continue;
        }
        d[l] -= p;
        e[l] = g;
      }
    }
    std::sort(d, d + n_);
    return true;
  }

  // Per lane, (T - shift + i width)^-1 b: its imaginary or its real part, in place of b.
  SK_NOINLINE void resolve(V shift, V width, bool imaginary, V* b) {
    const V zero{};
    C diagonal{splat(d_[0]) - shift, width}, above{splat(e_[0]), zero}, right{b[0], zero};
    for (int i = 0; i + 1 < n_; ++i) {
      // The row with the larger first entry is eliminated with; both have up to three entries.
      const C next{splat(d_[i + 1]) - shift, width}, next_above{splat(e_[i + 1]), zero}, next_right{b[i + 1], zero};
      const C coupling{splat(e_[i]), zero}, none{zero, zero};
      const Mask<double> swap = greater(coupling.re * coupling.re, add_square(diagonal, zero));
      Eliminated& row = eliminated_[i];
      row.inverse = reciprocal(select(swap, coupling, diagonal));
      row.first = select(swap, next, above);
      row.second = select(swap, next_above, none);
      row.right = select(swap, next_right, right);
      const C minus = -(select(swap, diagonal, coupling) * row.inverse);
      diagonal = fma(minus, row.first, select(swap, above, next));
      above = fma(minus, row.second, select(swap, none, next_above));
      right = fma(minus, row.right, select(swap, right, next_right));
    }
    C x = right * reciprocal(diagonal), later{zero, zero};
    b[n_ - 1] = imaginary ? x.im : x.re;
    for (int i = n_ - 2; i >= 0; --i) {
      const Eliminated& row = eliminated_[i];
      const C here = fma(-row.second, later, fma(-row.first, x, row.right)) * row.inverse;
      later = x;
      x = here;
      b[i] = imaginary ? x.im : x.re;
    }
  }

  // max_i |(T x - w x)_i|
  double residual(double w, const double* x) const {
    double largest = 0;
    for (int i = 0; i < n_; ++i) {
      const double before = i > 0 ? e_[i - 1] * x[i - 1] : 0, after = i + 1 < n_ ? e_[i] * x[i + 1] : 0;
      largest = std::max(largest, std::abs((d_[i] - w) * x[i] + before + after));
    }
    return largest;
  }

 private:
  using C = ComplexVec<double>;
  struct Eliminated {
    C inverse, first, second, right;
  };

  static C reciprocal(C a) {
    const V square = max(add_square(a, V{}), splat(std::numeric_limits<double>::min()));
    return conj(a) / square;
  }

  // How many eigenvalues are smaller than each x: negative pivots of T - x.
  template <int Abreast>
  SK_INLINE void count_below(const V* x, IVec<double>* below) const {
    const V smallest = splat(std::numeric_limits<double>::min() / std::numeric_limits<double>::epsilon());
    V pivot[Abreast];
    IVec<double> found[Abreast];
    const IVec<double> none{}, one = none + 1;
    for (int v = 0; v < Abreast; ++v) pivot[v] = splat(1.0), found[v] = none;
    double square = 0;
    for (int i = 0; i < n_; ++i) {
      for (int v = 0; v < Abreast; ++v) {
        V next = (splat(d_[i]) - x[v]) - splat(square) / pivot[v];
        next = select(less(abs(next), smallest), -smallest, next);
        found[v] += select_int(less(next, V{}), one, none);
        pivot[v] = next;
      }
      square = e_[i] * e_[i];
    }
    for (int v = 0; v < Abreast; ++v) below[v] = found[v];
  }

  int n_;
  const double *d_ = nullptr, *e_ = nullptr;
  double low_ = 0, high_ = 0, norm_ = 0;
  Buffer<Eliminated> eliminated_;
  Buffer<double> work_;
};

// x (`count` vectors of n) becomes orthonormal, one after the other, each made orthogonal twice to those before it.
// False if one vanished.
inline bool orthonormalise(double* x, int count, int n) {
  constexpr int lanes = kLanes<double>;
  const auto inner = [n](const double* a, const double* b) {
    Vec<double> sum[2] = {};
    int i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes)
      for (int k = 0; k < 2; ++k) sum[k] = fma(load(a + i + k * lanes), load(b + i + k * lanes), sum[k]);
    for (; i < n; i += lanes) sum[0] = fma(load_first(a + i, n - i), load_first(b + i, n - i), sum[0]);
    return horizontal_sum(sum[0] + sum[1]);
  };
  for (int v = 0; v < count; ++v) {
    double* own = x + int64_t{v} * n;
    for (int turn = 0; turn < 2; ++turn) {
      double largest = 0;
      for (int i = 0; i < n; ++i) largest = std::max(largest, std::abs(own[i]));
      if (!(largest > 0 && largest < std::numeric_limits<double>::infinity())) return false;
      for (int i = 0; i < n; ++i) own[i] /= largest;
      for (int w = 0; w < v; ++w) {
        const double* other = x + int64_t{w} * n;
        const double part = inner(own, other);
        for (int i = 0; i < n; ++i) own[i] -= part * other[i];
      }
      const double norm = std::sqrt(inner(own, own));
      if (!(norm > std::numeric_limits<double>::epsilon())) return false;
      for (int i = 0; i < n; ++i) own[i] /= norm;
    }
  }
  return true;
}

constexpr int kRounds = 5;  // of subspace iteration; two are usual

// Orthonormal eigenvectors of T for `count` of its eigenvalues, known within `tolerance`, to rows of n. False if
// they do not come below the residual `limit` in `rounds` rounds.
inline bool tridiagonal_vectors(Tridiagonal64& t, int n, const double* values, int count, double tolerance,
                                double limit, int rounds, double* vectors) {
  constexpr int lanes = kLanes<double>;
  // No vector of a structured T is orthogonal to numbers in no order.
  const double golden = (std::sqrt(5.0) - 1) / 2;
  for (int64_t i = 0; i < int64_t{count} * n; ++i) {
    const double multiple = golden * static_cast<double>(i + 1);
    vectors[i] = multiple - std::floor(multiple) - 0.5;
  }
  const Buffer<Vec<double>> right(n);
  for (int round = 0; round < rounds; ++round) {
    for (int first = 0; first < count; first += lanes) {
      const int here = std::min(lanes, count - first);
      double shift[lanes];
      for (int lane = 0; lane < lanes; ++lane) shift[lane] = values[first + std::min(lane, here - 1)];
      gather_items(vectors + int64_t{first} * n, n, n, here, right.get());
      t.resolve(load(shift), splat(tolerance), true, right);
      scatter_items(right.get(), n, here, vectors + int64_t{first} * n);
    }
    if (!orthonormalise(vectors, count, n)) return false;
    double worst = 0;
    for (int v = 0; v < count; ++v) {
      const double residual = t.residual(values[v], vectors + int64_t{v} * n);
      worst = residual > worst || std::isnan(residual) ? residual : worst;
    }
    if (worst <= limit && round > 0) return true;  // the first start holds much of all the others
  }
  return false;
}

}  // namespace stablekern
