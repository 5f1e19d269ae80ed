// Projectors on the span of the lowest or largest eigenvectors, and the backward over pairs across the cut alone.
//
// Both directions work with the smaller side of the cut, `few` eigenvectors: the other side's projector is the identity
// minus theirs, and a pair across the cut counts the same from either side. Real matrices up to n = 32 are solved one
// per SIMD lane ("stablekern/eigh_lanes.h"), all others one per thread: the few by themselves
// ("stablekern/tridiagonal.h"), or all by LAPACK where the few are many or do not converge.
//
// The backward needs no other eigenvector either: with a selected v of eigenvalue w, the sum over its partners is
//   x = Re (T - w + i d)^-1 (1 - P) G v,
// which has (u - w) / ((u - w)^2 + d^2) at each eigenvalue u, the definition of the op; and dA = -+(x v^H + v x^H).
#include "stablekern/eigh_large.h"
#include "stablekern/symmetric_lanes.h"
#include "stablekern/tridiagonal.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int32_t kCutClosed = 4;  // bit of `info`

struct Cut {
  int n, below;      // eigenvalues in all, and below the cut
  bool largest;      // the projector is on those above it
  double gap_floor;  // relative to max|w|

  bool few_are_low() const { return 2 * below <= n; }
  bool complement() const { return few_are_low() == largest; }  // the few are not what the projector is on
  int few() const { return std::min(below, n - below); }
  int first_few() const { return few_are_low() ? 0 : below; }
  int first_other() const { return few_are_low() ? below : 0; }
};

template <class S>
struct Projectors {
  S* projector;
  Real<S>*gap, *values;
  S* rows;
  int32_t *info, *reduced;
};

// The gap at the cut, and its bit of `info`, of ascending eigenvalues.
template <class T>
T gap_of(const Cut& cut, const T* values, int32_t* info) {
  if (cut.below == 0 || cut.below == cut.n) return std::numeric_limits<T>::infinity();
  const T largest = std::max(std::abs(values[0]), std::abs(values[cut.n - 1]));
  const T down = power_of_two<T>(splat(largest)).down[0];
  const T floor = largest * down * static_cast<T>(cut.gap_floor);
  if (values[cut.below] * down - values[cut.below - 1] * down <= floor) *info |= kCutClosed;
  return values[cut.below] - values[cut.below - 1];
}

// ---- lanes ---------------------------------------------------------------------------------------------------------

// sum_s v_s v_s^T of `count` rows, or the identity minus it.
template <class T>
void outer_products(const T* rows, int count, int n, bool complement, T* out) {
  constexpr int lanes = kLanes<T>;
  const T sign = complement ? T(-1) : T(1);
  for (int start = 0; start < n; start += lanes) {
    const int width = std::min(lanes, n - start);
    for (int i = 0; i < n; ++i) {
      Vec<T> sum{};
      for (int s = 0; s < count; ++s) {
        const T* row = rows + s * n;
        sum = fma(splat(row[i]), load_first(row + start, width), sum);
      }
      store_first(out + i * n + start, sum * sign, width);
    }
  }
  if (complement)
    for (int i = 0; i < n; ++i) out[i * n + i] += 1;
}

template <class T, int Blocks>
void store_projectors(Workspace<T, Blocks>& w, int block, const Cut& cut, int64_t item, int count,
                      bool past_caches, const Projectors<T>& out) {
  constexpr int lanes = kLanes<T>;
  const int n = cut.n, size = n * n;
  alignas(64) typename VecTypes<T>::integer rank[Workspace<T, Blocks>::kN][lanes];
  T* values = out.values + item * n;
  const Vec<T> poison = store_values<T, Blocks>(w, w.d, block, n, count, rank, values, out.info + item);
  std::fill_n(out.reduced + item, count, 0);
  T* rows = reinterpret_cast<T*>(w.staging);
  store_vectors<T, Blocks>(w, block, n, rank, poison, [=](int lane, int row) { return rows + (lane * n + row) * n; });
  for (int lane = 0; lane < count; ++lane) {
    out.gap[item + lane] = values[lane * n];  // NaN for the items that failed
    T* projector = out.projector + (item + lane) * size;
    outer_products(rows + lane * size + cut.first_few() * n, cut.few(), n, cut.complement(), projector);
    if (out.info[item + lane] == 0)
      out.gap[item + lane] = gap_of(cut, values + lane * n, out.info + item + lane);
    else
      fill_nan(projector, size);
  }
  copy_out(rows, static_cast<int64_t>(count) * size, past_caches, out.rows + item * size);
}

template <class T>
void project_lanes(const T* matrices, int64_t batch, const Cut& cut, const Projectors<T>& out) {
  const int n = cut.n;
  const int64_t size = static_cast<int64_t>(n) * n;
  const bool past_caches = batch * size * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const auto load_lanes = [&](auto& w, int block, int64_t item, int count) {
    load_triangles(w, block, matrices + item * size, n, count, false);
    w.upcoming.aim(matrices + (item + count) * size, std::min<int64_t>(batch - item - count, kLanes<T>) * size);
  };
  const auto store_lanes = [&](auto& w, int block, int64_t item, int count) {
    store_projectors(w, block, cut, item, count, past_caches, out);
  };
  solve_lanes<T, true>(batch, n, load_lanes, store_lanes);
}

template <class T>
struct alignas(64) PairWorkspace {
  Vec<T> vectors[kMaxN * kMaxN], gradient[kMaxN * kMaxN], result[kMaxN * kMaxN];
  Vec<T> images[kMaxN * kMaxN / 2], pairs[kMaxN * kMaxN / 2], values[kMaxN];
};

template <class T>
void backward_lanes(const T* values, const T* rows, const T* grad, int64_t batch, const Cut& cut, T* grad_matrices) {
  constexpr int lanes = kLanes<T>;
  const int n = cut.n, few = cut.few(), others = n - few;
  torch::stable::parallel_for(0, (batch + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    auto& w = workspace<PairWorkspace<T>>();
    const Vec<T> half = splat(T(0.5)), smallest = splat(std::numeric_limits<T>::min());
    for (int64_t item = begin * lanes; item < batch && item < end * lanes; item += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(batch - item, lanes));
      const int64_t at = item * n * n;
      gather_items(rows + at, n * n, n * n, count, w.vectors);
      gather_items(grad + at, n * n, n * n, count, w.gradient);
      gather_items(values + item * n, n, n, count, w.values);
      for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j)
          w.gradient[i * n + j] = w.gradient[j * n + i] = fma(w.gradient[i * n + j], half, w.gradient[j * n + i] * half);
      const Vec<T>*own = w.vectors + cut.first_few() * n, *other = w.vectors + cut.first_other() * n;
      product<T, false>(few, n, n, own, n, 1, w.gradient, 1, n, w.images, n);              // F G
      product<T, false>(few, others, n, w.images, n, 1, other, n, 1, w.pairs, others);     // (F G) O^T
      // Gaps in units of a power of two near max|w|: no square of theirs over- or underflows harmfully.
      const Vec<T> largest = max(abs(w.values[0]), abs(w.values[n - 1]));
      const Vec<T> down = power_of_two<T>(largest).down, floor = largest * down * static_cast<T>(cut.gap_floor);
      for (int s = 0; s < few; ++s) {
        for (int j = 0; j < others; ++j) {
          Vec<T> gap = (w.values[cut.first_other() + j] - w.values[cut.first_few() + s]) * down;
          gap = cut.complement() ? gap : -gap;  // w_i - w_j, i on the projector's side
          w.pairs[s * others + j] *= gap / max(fma(gap, gap, floor * floor), smallest) * down;
        }
      }
      product<T, false>(few, n, others, w.pairs, others, 1, other, 1, n, w.images, n);     // X^T
      product<T, false>(n, n, few, own, 1, n, w.images, 1, n, w.result, n);                // F^T X^T
      for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j)
          w.gradient[i * n + j] = w.gradient[j * n + i] = w.result[i * n + j] + w.result[j * n + i];
      scatter_items(w.gradient, n * n, count, grad_matrices + at);
    }
  });
}

// ---- a few vectors by themselves -----------------------------------------------------------------------------------

// One matrix after the other, reduced to T. What the backward needs of it is kept in the op's results: T's diagonal in
// the place of the eigenvalues; in that of the eigenvectors the reflectors, in the lower triangle, and row by row in the
// strict upper one the few eigenvectors, the phases, and as reals the couplings, inverse_h, the few eigenvalues (each in
// two parts: rounded, and what is left), max|w| and the power of two that the matrix was divided by.
template <class S>
class Reduced {
 public:
  using T = Real<S>;

  static constexpr int kLeast = 3;  // n over the vectors that are wanted; nearer to n LAPACK is as fast

  static bool suits(int n, int few) {
    return few > 0 && kLeast * few <= n && length(n, few) <= int64_t{n} * (n - 1) / 2;
  }

  Reduced(int n, int few)
      : n_(n), few_(few), reduction_(n), tridiagonal_(n), numbers_(static_cast<std::size_t>(length(n, few))),
        lanes_(static_cast<std::size_t>(few) * reduction_.width), basis_(static_cast<std::size_t>(kParts<S>) * few * n),
        right_(n), small_(static_cast<std::size_t>(few) * few), spare_(static_cast<std::size_t>(few) * n) {}

  S* vectors() const { return numbers_; }  // few x n

  // The few eigenvectors of a matrix of finite numbers, and what is at the cut. False if they do not converge.
  bool solve(const S* matrix, const Cut& cut, int rounds, T* gap, int32_t* info) {
    const T up = reduction_.reduce(matrix);
    tridiagonal_.set(reduction_.diagonal, reduction_.couplings);
    // The few, the one on the other side of the cut, and the other end of the spectrum.
    const bool low = cut.few_are_low();
    std::vector<int> places;
    if (!low) places.push_back(0);
    for (int place = low ? 0 : cut.below - 1; place < (low ? few_ + 1 : n_); ++place) places.push_back(place);
    if (low) places.push_back(n_ - 1);
    std::vector<double> values(places.size());
    const double ulp = std::numeric_limits<T>::epsilon(), ulp64 = std::numeric_limits<double>::epsilon();
    const double tolerance = std::max(ulp / kPart, 4 * ulp64) * tridiagonal_.norm();
    tridiagonal_.values(places, tolerance, values.data());
    const double* few = values.data() + (low ? 0 : 2);
    if (!tridiagonal_vectors(tridiagonal_, n_, few, few_, tolerance, n_ * tolerance, rounds, basis_)) return false;
    const double top = std::max(std::abs(values.front()), std::abs(values.back()));
    const double distance = low ? few[few_] - few[few_ - 1] : few[0] - few[-1];
    *gap = static_cast<T>(distance) * up;
    if (distance <= top * cut.gap_floor) *info |= kCutClosed;
    largest() = static_cast<T>(top);
    unit() = up;
    for (int v = 0; v < few_; ++v) {
      const T rounded = static_cast<T>(few[v]);
      this->values()[2 * v] = rounded;
      this->values()[2 * v + 1] = static_cast<T>(few[v] - rounded);
    }
    leave(basis_, 1, vectors());
    return true;
  }

  // X for the Hermitian gradient g of the projector on the few, n x few by columns: dA = -(X F^H + F X^H).
  void partners(const S* g, double gap_floor, S* x) {
    multiply('N', 'N', n_, few_, n_, g, n_, vectors(), n_, x, n_);
    leave_out_few(x);
    enter(x);
    constexpr int lanes = kLanes<double>, parts = kParts<S>;
    const double width = largest() * gap_floor;
    for (int first = 0; first < few_ * parts; first += lanes) {
      const int here = std::min(lanes, few_ * parts - first);
      double shift[lanes];
      for (int lane = 0; lane < lanes; ++lane) {
        const int v = (first + std::min(lane, here - 1)) / parts;
        shift[lane] = static_cast<double>(values()[2 * v]) + values()[2 * v + 1];
      }
      double* rows = basis_ + int64_t{first} * n_;
      gather_items(rows, n_, n_, here, right_.get());
      tridiagonal_.resolve(load(shift), splat(width), false, right_);
      scatter_items(right_.get(), n_, here, rows);
    }
    leave(basis_, parts, x);
    const T down = 1 / unit();
    for (int64_t i = 0; i < int64_t{few_} * n_; ++i) x[i] *= down;
    leave_out_few(x);
  }

  void save(T* diagonal, S* matrix) {
    for (int i = 0; i < n_; ++i) {
      diagonal[i] = static_cast<T>(reduction_.diagonal[i]);
      couplings()[i] = static_cast<T>(reduction_.couplings[i]);
    }
    std::copy_n(reduction_.phases.get(), n_, phases());
    std::copy_n(reduction_.inverse_h.get(), n_, inverse_h());
    std::fill_n(matrix, int64_t{n_} * n_, S(0));
    reduction_.save_reflectors(matrix);
    for_each_part([=, this](int64_t at, int64_t place, int count) { std::copy_n(numbers_ + at, count, matrix + place); });
  }
  void restore(const T* diagonal, const S* matrix) {
    for_each_part([=, this](int64_t at, int64_t place, int count) { std::copy_n(matrix + place, count, numbers_ + at); });
    reduction_.load_reflectors(matrix);
    std::copy_n(phases(), n_, reduction_.phases.get());
    std::copy_n(inverse_h(), n_, reduction_.inverse_h.get());
    for (int i = 0; i < n_; ++i) {
      reduction_.diagonal[i] = diagonal[i];
      reduction_.couplings[i] = couplings()[i];
    }
    tridiagonal_.set(reduction_.diagonal, reduction_.couplings);
  }

 private:
  static constexpr int kPart = 1 << 10;  // of an ulp: as near as eigenvalues of T are sought, in double precision

  // Numbers kept in the upper triangle.
  static int64_t length(int n, int few) {
    const int64_t reals = int64_t{2} * n + 2 * few + 2;
    return (int64_t{few} + 1) * n + (reals + kParts<S> - 1) / kParts<S>;
  }
  S* phases() const { return numbers_ + int64_t{few_} * n_; }
  T* couplings() const { return reinterpret_cast<T*>(phases() + n_); }
  T* inverse_h() const { return couplings() + n_; }
  T* values() const { return inverse_h() + n_; }
  T& largest() const { return values()[2 * few_]; }
  T& unit() const { return values()[2 * few_ + 1]; }

  template <class Part>
  void for_each_part(const Part& part) const {
    const int64_t total = length(n_, few_);
    for (int64_t at = 0, row = 0; at < total; ++row) {
      const int64_t count = std::min(n_ - 1 - row, total - at);
      part(at, row * n_ + row + 1, static_cast<int>(count));
      at += count;
    }
  }

  // Vectors from the basis of T, each as `parts` rows of reals, to that of A, and back to kParts<S> rows of `basis_`.
  void leave(const double* from, int parts, S* to) {
    for (int v = 0; v < few_; ++v) {
      const double* re = from + int64_t{v} * parts * n_;
      S* vector = to + int64_t{v} * n_;
      for (int i = 0; i < n_; ++i) {
        S x(static_cast<T>(re[i]));
        if constexpr (kComplex<S>)
          if (parts == 2) x.imag(static_cast<T>(re[n_ + i]));
        vector[i] = times(reduction_.phases[i], x);
      }
    }
    reflect<false>(to);
  }
  void enter(S* from) {
    reflect<true>(from);
    for (int v = 0; v < few_; ++v) {
      const S* vector = from + int64_t{v} * n_;
      double* re = basis_ + int64_t{v} * kParts<S> * n_;
      for (int i = 0; i < n_; ++i) {
        const S x = times(conjugate(reduction_.phases[i]), vector[i]);
        re[i] = std::real(x);
        if constexpr (kComplex<S>) re[n_ + i] = x.imag();
      }
    }
  }
  template <bool Adjoint>
  void reflect(S* x) {
    constexpr int lanes = kLanes<T>;
    const int width = reduction_.width;
    for (int v = 0; v < few_; ++v)
      for (int c = 0; c < width; ++c)
        lanes_[v * int64_t{width} + c] = load_numbers<S>(x + int64_t{v} * n_ + c * lanes, std::min(lanes, n_ - c * lanes));
    reduction_.template reflect<Adjoint>(lanes_, few_);
    for (int v = 0; v < few_; ++v)
      for (int c = 0; c < width; ++c)
        store_numbers<S>(x + int64_t{v} * n_ + c * lanes, lanes_[v * int64_t{width} + c], std::min(lanes, n_ - c * lanes));
  }
  // Without the detour by which std::complex's product looks for infinities.
  static S times(S a, S b) {
    if constexpr (kComplex<S>)
      return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
    else
      return a * b;
  }
  // x - F F^H x
  void leave_out_few(S* x) {
    multiply('C', 'N', few_, few_, n_, vectors(), n_, x, n_, small_.get(), few_);
    multiply('N', 'N', n_, few_, few_, vectors(), n_, small_.get(), few_, spare_.get(), n_);
    for (int64_t i = 0; i < int64_t{few_} * n_; ++i) x[i] -= spare_[i];
  }

  const int n_, few_;
  Reduction<S> reduction_;
  Tridiagonal64 tridiagonal_;
  Buffer<S> numbers_;
  Buffer<Element<S>> lanes_;
  Buffer<double> basis_;
  Buffer<Vec<double>> right_;
  Buffer<S> small_, spare_;
};

// ---- one matrix a thread -------------------------------------------------------------------------------------------

template <class S>
void project_large(const S* matrices, int64_t batch, const Cut& cut, int rounds, const Projectors<S>& out) {
  const int n = cut.n, count = cut.few();
  const int64_t size = static_cast<int64_t>(n) * n;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> sum(size);
    std::optional<Reduced<S>> thin;
    std::optional<HermitianSolver<S>> lapack;  // where needed: its memory is several times the matrix
    if (Reduced<S>::suits(n, count)) thin.emplace(n, count);
    for (int64_t item = begin; item < end; ++item) {
      const S* matrix = matrices + item * size;
      S *projector = out.projector + item * size, *rows = out.rows + item * size;
      Real<S>*values = out.values + item * n, *gap = out.gap + item;
      out.info[item] = 0;
      const S* few;
      out.reduced[item] = thin && all_finite(matrix, size) && thin->solve(matrix, cut, rounds, gap, out.info + item);
      if (out.reduced[item]) {
        thin->save(values, rows);
        few = thin->vectors();
      } else {
        if (!lapack) lapack.emplace(n);
        out.info[item] = lapack->solve(matrix, false);
        if (out.info[item] != 0) {
          fill_nan(projector, size);
          fill_nan(rows, size);
          fill_nan(values, n);
          fill_nan(gap, 1);
          continue;
        }
        std::copy_n(lapack->values.get(), n, values);
        std::copy_n(lapack->matrix.get(), size, rows);
        *gap = gap_of(cut, values, out.info + item);
        few = lapack->matrix + cut.first_few() * int64_t{n};
      }
      multiply_hermitian(n, count, few, n, few, n, sum.get(), n);
      write_hermitian(n, sum.get(), projector);
      if (cut.complement())
        for (int64_t i = 0; i < size; ++i) projector[i] = S(i % (n + 1) == 0 ? 1 : 0) - projector[i];
    }
  });
}

template <class S>
void backward_large(const Real<S>* values, const S* rows, const int32_t* reduced, const S* grad, int64_t batch,
                    const Cut& cut, S* grad_matrices) {
  using T = Real<S>;
  const int n = cut.n, few = cut.few(), others = n - few;
  const int64_t size = static_cast<int64_t>(n) * n, thin_size = static_cast<int64_t>(n) * few;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> v(size), g(size), left(2 * thin_size), right(2 * thin_size), pairs(thin_size);
    std::optional<Reduced<S>> thin;
    if (Reduced<S>::suits(n, few)) thin.emplace(n, few);
    for (int64_t item = begin; item < end; ++item) {
      S* out = grad_matrices + item * size;
      const T* w = values + item * n;
      if (few == 0) {
        std::fill(out, out + size, S(0));
        continue;
      }
      if (std::isnan(w[0])) {
        fill_nan(out, size);
        continue;
      }
      read_hermitian_part(n, grad + item * size, g.get());
      const S* own;
      if (reduced[item]) {
        STD_TORCH_CHECK(thin, "eigenprojector_bwd: a reduced matrix for another cut");
        thin->restore(w, rows + item * size);
        own = thin->vectors();
        thin->partners(g, cut.gap_floor, left);
        const T sign(cut.complement() ? 1 : -1);
        for (int64_t i = 0; i < thin_size; ++i) left[i] *= sign;
      } else {
        std::copy_n(rows + item * size, size, v.get());
        own = v + cut.first_few() * int64_t{n};
        const S* other = v + cut.first_other() * int64_t{n};
        multiply('N', 'N', n, few, n, g.get(), n, own, n, left.get(), n);                  // G F
        multiply('C', 'N', others, few, n, other, n, left.get(), n, pairs.get(), others);  // O^H (G F)
        // Gaps in units of a power of two near max|w|: no square of theirs over- or underflows harmfully.
        const T largest = std::max(std::abs(w[0]), std::abs(w[n - 1]));
        const T down = power_of_two<T>(splat(largest)).down[0], floor = largest * down * static_cast<T>(cut.gap_floor);
        for (int s = 0; s < few; ++s) {
          for (int j = 0; j < others; ++j) {
            T gap = (w[cut.first_other() + j] - w[cut.first_few() + s]) * down;
            gap = cut.complement() ? gap : -gap;  // w_i - w_j, i on the projector's side
            const T factor = gap / std::max(gap * gap + floor * floor, std::numeric_limits<T>::min());
            pairs[static_cast<int64_t>(s) * others + j] *= factor * down;
          }
        }
        multiply('N', 'N', n, few, others, other, n, pairs.get(), others, left.get(), n);  // X
      }
      std::copy_n(own, thin_size, left + thin_size);
      std::copy_n(own, thin_size, right.get());
      std::copy_n(left.get(), thin_size, right + thin_size);
      multiply_hermitian(n, 2 * few, left.get(), n, right.get(), n, g.get(), n);  // X F^H + F X^H
      write_hermitian(n, g.get(), out);
    }
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

Cut cut_of(const char* op, int64_t n, int64_t k, bool largest, double gap_floor) {
  STD_TORCH_CHECK(k >= 0 && k <= n, op, ": ", k, " of ", n, " eigenvectors");
  return {static_cast<int>(n), static_cast<int>(largest ? n - k : k), largest, gap_floor};
}

void eigenprojector_fwd(const Tensor A, int64_t k, bool largest, double gap_floor, Tensor projector, Tensor gap,
                        Tensor eigenvalues, Tensor eigenvector_rows, Tensor reduced, Tensor info, int64_t rounds) {
  const int64_t batch = A.size(0), n = A.size(1);
  if (batch == 0 || n == 0) return;
  const Cut cut = cut_of("eigenprojector_fwd", n, k, largest, gap_floor);
  dispatch(A, [&]<class S>(S) {
    const auto data = []<class U>(const Tensor& t, U) { return static_cast<U*>(t.mutable_data_ptr()); };
    const Projectors<S> out{data(projector, S{}), data(gap, Real<S>{}), data(eigenvalues, Real<S>{}),
                            data(eigenvector_rows, S{}), data(info, int32_t{}), data(reduced, int32_t{})};
    const auto* from = static_cast<const S*>(A.const_data_ptr());
    if constexpr (!kComplex<S>) {
      if (n <= kMaxN) return project_lanes<S>(from, batch, cut, out);
    }
    project_large(from, batch, cut, static_cast<int>(rounds), out);
  });
}

void eigenprojector_bwd(const Tensor eigenvalues, const Tensor eigenvector_rows, const Tensor reduced,
                        const Tensor grad_projector, int64_t k, bool largest, double gap_floor, Tensor grad_A) {
  const int64_t batch = eigenvalues.size(0), n = eigenvalues.size(1);
  if (batch == 0 || n == 0) return;
  const Cut cut = cut_of("eigenprojector_bwd", n, k, largest, gap_floor);
  dispatch(eigenvector_rows, [&]<class S>(S) {
    const auto* values = static_cast<const Real<S>*>(eigenvalues.const_data_ptr());
    const auto* rows = static_cast<const S*>(eigenvector_rows.const_data_ptr());
    const auto* grad = static_cast<const S*>(grad_projector.const_data_ptr());
    auto* out = static_cast<S*>(grad_A.mutable_data_ptr());
    if constexpr (!kComplex<S>)
      if (n <= kMaxN) return backward_lanes(values, rows, grad, batch, cut, out);
    backward_large(values, rows, static_cast<const int32_t*>(reduced.const_data_ptr()), grad, batch, cut, out);
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  // A smaller number of rounds is for tests.
  const std::string rounds = std::to_string(stablekern::kRounds);
  m.def(("eigenprojector_fwd(Tensor A, int k, bool largest, float gap_floor, Tensor(a!) projector, Tensor(b!) gap, "
         "Tensor(c!) eigenvalues, Tensor(d!) eigenvector_rows, Tensor(e!) reduced, Tensor(f!) info, int rounds=" +
         rounds + ") -> ()").c_str());
  m.def(
      "eigenprojector_bwd(Tensor eigenvalues, Tensor eigenvector_rows, Tensor reduced, Tensor grad_projector, int k, "
      "bool largest, float gap_floor, Tensor(a!) grad_A) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("eigenprojector_fwd", TORCH_BOX(&stablekern::eigenprojector_fwd));
  m.impl("eigenprojector_bwd", TORCH_BOX(&stablekern::eigenprojector_bwd));
}
