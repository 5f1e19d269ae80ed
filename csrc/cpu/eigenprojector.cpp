// Projectors on the span of the lowest or largest eigenvectors, and the backward over pairs across the cut alone.
//
// Real matrices up to n = 32 are solved one per SIMD lane ("stablekern/eigh_lanes.h"), all others by LAPACK, one per
// thread. Both directions work with the smaller side of the cut, `few` eigenvectors: the other side's projector is the
// identity minus theirs, and a pair across the cut counts the same from either side.
#include "stablekern/eigh_large.h"
#include "stablekern/symmetric_lanes.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

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
  int32_t* info;
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

template <class T, int N, int Blocks>
void store_projectors(Workspace<T, N, Blocks>& w, int block, const Cut& cut, int64_t item, int count,
                      bool past_caches, const Projectors<T>& out) {
  constexpr int lanes = kLanes<T>;
  const int n = cut.n, size = n * n;
  alignas(64) typename VecTypes<T>::integer rank[Workspace<T, N, Blocks>::kN][lanes];
  T* values = out.values + item * n;
  const Vec<T> poison = store_values<T, N, Blocks>(w, w.d, block, n, count, rank, values, out.info + item);
  T* rows = reinterpret_cast<T*>(w.staging);
  store_vectors<T, N, Blocks>(w, block, n, rank, poison, [=](int lane, int row) { return rows + (lane * n + row) * n; });
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

template <class T, int N>
void project_lanes(const T* matrices, int64_t batch, const Cut& cut, const Projectors<T>& out) {
  const int n = cut.n;
  const int64_t size = static_cast<int64_t>(n) * n;
  const bool past_caches = batch * size * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const auto load_lanes = [&](auto& w, int block, int64_t item, int count) {
    load_triangles(w, block, matrices + item * size, n, count, false);
    // The next block comes from memory while this one is reduced.
    prefetch_items(matrices + (item + count) * size, std::min<int64_t>(batch - item - count, kLanes<T>) * size);
  };
  const auto store_lanes = [&](auto& w, int block, int64_t item, int count) {
    store_projectors(w, block, cut, item, count, past_caches, out);
  };
  solve_lanes<T, N, true>(batch, n, load_lanes, store_lanes);
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

// ---- LAPACK --------------------------------------------------------------------------------------------------------

template <class S>
void project_large(const S* matrices, int64_t batch, const Cut& cut, const Projectors<S>& out) {
  const int n = cut.n;
  const int64_t size = static_cast<int64_t>(n) * n;
  for_each_matrix<S>(batch, n, [&](HermitianSolver<S>& solver, int64_t item) {
    S *projector = out.projector + item * size, *rows = out.rows + item * size;
    Real<S>* values = out.values + item * n;
    out.info[item] = solver.solve(matrices + item * size, false);
    if (out.info[item] != 0) {
      fill_nan(projector, size);
      fill_nan(rows, size);
      fill_nan(values, n);
      fill_nan(out.gap + item, 1);
      return;
    }
    std::copy_n(solver.values.get(), n, values);
    std::copy_n(solver.matrix.get(), size, rows);
    out.gap[item] = gap_of(cut, values, out.info + item);
    const S* few = solver.matrix + cut.first_few() * int64_t{n};
    S* sum = solver.spare(size);
    multiply_hermitian(n, cut.few(), few, n, few, n, sum, n);
    write_hermitian(n, sum, projector);
    if (cut.complement())
      for (int64_t i = 0; i < size; ++i) projector[i] = S(i % (n + 1) == 0 ? 1 : 0) - projector[i];
  });
}

template <class S>
void backward_large(const Real<S>* values, const S* rows, const S* grad, int64_t batch, const Cut& cut,
                    S* grad_matrices) {
  using T = Real<S>;
  const int n = cut.n, few = cut.few(), others = n - few;
  const int64_t size = static_cast<int64_t>(n) * n, thin = static_cast<int64_t>(n) * few;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> v(size), g(size), left(2 * thin), right(2 * thin), pairs(thin);
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
      std::copy_n(rows + item * size, size, v.get());
      read_hermitian_part(n, grad + item * size, g.get());
      const S *own = v + cut.first_few() * int64_t{n}, *other = v + cut.first_other() * int64_t{n};
      multiply('N', 'N', n, few, n, g.get(), n, own, n, left.get(), n);                // G F
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
      std::copy_n(own, thin, left + thin);
      std::copy_n(own, thin, right.get());
      std::copy_n(left.get(), thin, right + thin);
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
                        Tensor eigenvalues, Tensor eigenvector_rows, Tensor info) {
  const int64_t batch = A.size(0), n = A.size(1);
  if (batch == 0 || n == 0) return;
  const Cut cut = cut_of("eigenprojector_fwd", n, k, largest, gap_floor);
  dispatch(A, [&]<class S>(S) {
    const auto data = []<class U>(const Tensor& t, U) { return static_cast<U*>(t.mutable_data_ptr()); };
    const Projectors<S> out{data(projector, S{}), data(gap, Real<S>{}), data(eigenvalues, Real<S>{}),
                            data(eigenvector_rows, S{}), data(info, int32_t{})};
    const auto* from = static_cast<const S*>(A.const_data_ptr());
    if constexpr (!kComplex<S>) {
      if (n == kElectrodes) return project_lanes<S, kElectrodes>(from, batch, cut, out);
      if (n <= kMaxN) return project_lanes<S, 0>(from, batch, cut, out);
    }
    project_large(from, batch, cut, out);
  });
}

void eigenprojector_bwd(const Tensor eigenvalues, const Tensor eigenvector_rows, const Tensor grad_projector, int64_t k,
                        bool largest, double gap_floor, Tensor grad_A) {
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
    backward_large(values, rows, grad, batch, cut, out);
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "eigenprojector_fwd(Tensor A, int k, bool largest, float gap_floor, Tensor(a!) projector, Tensor(b!) gap, "
      "Tensor(c!) eigenvalues, Tensor(d!) eigenvector_rows, Tensor(e!) info) -> ()");
  m.def(
      "eigenprojector_bwd(Tensor eigenvalues, Tensor eigenvector_rows, Tensor grad_projector, int k, bool largest, "
      "float gap_floor, Tensor(a!) grad_A) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("eigenprojector_fwd", TORCH_BOX(&stablekern::eigenprojector_fwd));
  m.impl("eigenprojector_bwd", TORCH_BOX(&stablekern::eigenprojector_bwd));
}
