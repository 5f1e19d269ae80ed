// f(A) = V f(w) V^H of Hermitian matrices for the named functions, and its backward by divided differences.
//
// Real matrices up to n = 32 take a SIMD lane each ("stablekern/eigh_lanes.h"), all others go to LAPACK, one per thread.
#include "stablekern/eigh_large.h"
#include "stablekern/symmetric_lanes.h"
#include "stablekern/vmath.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace stablekern {
namespace {

using torch::stable::Tensor;

enum Function : int64_t { kExp = 0, kSqrt = 1, kRsqrt = 2, kLog = 3, kInv = 4 };

// f(w); not finite outside the domain.
template <class T>
Vec<T> image_of(Function function, Vec<T> w) {
  const Vec<T> one = splat(T(1)), nan = splat(std::numeric_limits<T>::quiet_NaN());
  switch (function) {
    case kExp: return exp<T>(w);
    case kSqrt: return select(greater(w, Vec<T>{}), sqrt(w), nan);
    case kRsqrt: return one / sqrt(w);
    case kInv: return one / w;
    case kLog: break;
  }
  Vec<T> result;
  for (int lane = 0; lane < kLanes<T>; ++lane) result[lane] = std::log(w[lane]);
  return result;
}

// (1 - e^-t) / t for t in [0, 1]: sum_k (-t)^k / (k + 1)!, to the rounding of 1.
template <class T>
SK_INLINE Vec<T> mean_decay(Vec<T> t) {
  constexpr int terms = sizeof(T) == 4 ? 11 : 18;
  T coefficient[terms];
  coefficient[0] = 1;
  for (int k = 1; k < terms; ++k) coefficient[k] = -coefficient[k - 1] / T(k + 1);
  Vec<T> sum = splat(coefficient[terms - 1]);
  for (int k = terms - 2; k >= 0; --k) sum = fma(sum, t, splat(coefficient[k]));
  return sum;
}

// (f(a) - f(b)) / (a - b) without cancellation, f'(a) for a = b; fa and fb are the values of f.
template <class T>
SK_INLINE Vec<T> divided_difference(Function function, Vec<T> a, Vec<T> b, Vec<T> fa, Vec<T> fb) {
  const Vec<T> one = splat(T(1));
  if (function == kSqrt) return one / (fa + fb);
  if (function == kInv) return -(fa * fb);
  if (function == kRsqrt) return -(fa * fb) / (sqrt(a) + sqrt(b));
  const Mask<T> ordered = greater_equal(a, b);
  const Vec<T> high = select(ordered, a, b), low = select(ordered, b, a), gap = high - low;
  const Vec<T> quotient = (select(ordered, fa, fb) - select(ordered, fb, fa)) / gap;
  if (function == kExp) {
    const Vec<T> near = select(ordered, fa, fb) * mean_decay<T>(min(gap, one));
    return select(greater(gap, one), quotient, near);
  }
  const Vec<T> t = gap / low, unit = min(t, one);
  const Vec<T> near = select(greater(t, Vec<T>{}), log1p_unit<T>(unit) / unit, one) / low;
  return select(greater(t, one), quotient, near);
}

template <class S>
struct Results {
  S* result;
  Real<S>* values;
  S* rows;
};

// ---- lanes ---------------------------------------------------------------------------------------------------------

template <class T, int Blocks>
void store_images(Workspace<T, Blocks>& w, int block, Function function, int n, int64_t item, int count,
                  bool past_caches, const Results<T>& out) {
  using W = Workspace<T, Blocks>;
  constexpr int lanes = kLanes<T>, stride = W::kStride;
  const int size = n * n;
  const Vec<T> zero{}, nan = splat(std::numeric_limits<T>::quiet_NaN());
  const Vec<T>* z = w.z[block];  // vector i as row i, of the eigenvalue d[i] * up
  Vec<T> probe{}, result[W::kN * W::kN];
  for (int i = 0; i < n; ++i) {
    const Vec<T> f = image_of<T>(function, w.d[i][block] * w.up[block]);
    probe = fma(f, zero, probe);
    for (int a = 0; a < n; ++a) w.staging[i * n + a] = f * z[i * stride + a];
  }
  const Mask<T> inside = equal(probe, zero) & !(w.non_finite[block] | w.not_converged[block]);
  product<T, true>(n, n, n, w.staging, 1, n, z, 1, stride, result, n);
  for (int i = 0; i < size; ++i) result[i] = select(inside, result[i], nan);
  T* staging = reinterpret_cast<T*>(w.staging);
  scatter_items(result, size, count, staging);
  copy_out(staging, static_cast<int64_t>(count) * size, past_caches, out.result + item * size);

  alignas(64) typename VecTypes<T>::integer rank[W::kN][lanes];
  int32_t info[lanes];
  T* values = out.values + item * n;
  const Vec<T> poison = store_values<T, Blocks>(w, w.d, block, n, count, rank, values, info);
  for (int lane = 0; lane < count; ++lane)
    if (!(lane_bits(inside) >> lane & 1)) fill_nan(values + lane * n, n);
  const auto place = [=](int lane, int row) { return staging + (lane * n + row) * n; };
  store_vectors<T, Blocks>(w, block, n, rank, poison, place);
  copy_out(staging, static_cast<int64_t>(count) * size, past_caches, out.rows + item * size);
}

template <class T>
void apply_lanes(const T* matrices, int64_t batch, int n, Function function, const Results<T>& out) {
  const int64_t size = static_cast<int64_t>(n) * n;
  const bool past_caches = batch * size * static_cast<int64_t>(sizeof(T)) > kStreamBytes;
  const auto load_lanes = [&](auto& w, int block, int64_t item, int count) {
    load_triangles(w, block, matrices + item * size, n, count, false);
    w.upcoming.aim(matrices + (item + count) * size, std::min<int64_t>(batch - item - count, kLanes<T>) * size);
  };
  const auto store_lanes = [&](auto& w, int block, int64_t item, int count) {
    store_images(w, block, function, n, item, count, past_caches, out);
  };
  solve_lanes<T, true>(batch, n, load_lanes, store_lanes);
}

template <class T>
struct alignas(64) AdjointWorkspace {
  static constexpr int kN = kMaxN;
  Vec<T> vectors[kN * kN], gradient[kN * kN], middle[kN * kN], values[kN], images[kN];
};

template <class T>
void adjoint_lanes(const T* values, const T* rows, const T* grad, int64_t batch, int n, Function function,
                   T* grad_matrices) {
  constexpr int lanes = kLanes<T>;
  torch::stable::parallel_for(0, (batch + lanes - 1) / lanes, 1, [&](int64_t begin, int64_t end) {
    auto& w = workspace<AdjointWorkspace<T>>();
    Vec<T>*g = w.gradient, *m = w.middle;
    const Vec<T>* v = w.vectors;  // v[j * n + a] = component a of eigenvector j
    const Vec<T> half = splat(T(0.5));
    for (int64_t item = begin * lanes; item < batch && item < end * lanes; item += lanes) {
      const int count = static_cast<int>(std::min<int64_t>(batch - item, lanes));
      const int64_t at = item * n * n;
      gather_items(rows + at, n * n, n * n, count, w.vectors);
      gather_items(grad + at, n * n, n * n, count, g);
      gather_items(values + item * n, n, n, count, w.values);
      for (int i = 0; i < n; ++i) {
        w.images[i] = image_of<T>(function, w.values[i]);
        for (int j = 0; j <= i; ++j) g[i * n + j] = g[j * n + i] = fma(g[i * n + j], half, g[j * n + i] * half);
      }
      product<T, false>(n, n, n, v, n, 1, g, n, 1, m, n);  // V^T G
      product<T, true>(n, n, n, m, n, 1, v, n, 1, g, n);   // V^T G V
      for (int i = 0; i < n; ++i)
        for (int j = 0; j <= i; ++j)
          g[i * n + j] = g[j * n + i] *=
              divided_difference<T>(function, w.values[i], w.values[j], w.images[i], w.images[j]);
      product<T, false>(n, n, n, g, n, 1, v, 1, n, m, n);  // (...) V^T
      product<T, true>(n, n, n, v, 1, n, m, 1, n, g, n);   // V (...) V^T
      scatter_items(g, n * n, count, grad_matrices + at);
    }
  });
}

// ---- LAPACK --------------------------------------------------------------------------------------------------------

// f of n numbers; whether all are finite.
template <class T>
bool images_of(Function function, const T* w, int n, T* out) {
  for (int i = 0; i < n; i += kLanes<T>) {
    const int width = std::min(kLanes<T>, n - i);
    const Vec<T> f = image_of<T>(function, load_first(w + i, width));
    store_first(out + i, f, width);
  }
  return all_finite(out, n);
}

template <class S>
void apply_large(const S* matrices, int64_t batch, int n, Function function, const Results<S>& out) {
  const int64_t size = static_cast<int64_t>(n) * n;
  for_each_matrix<S>(batch, n, [&](HermitianSolver<S>& solver, int64_t item) {
    S *result = out.result + item * size, *rows = out.rows + item * size;
    Real<S>* values = out.values + item * n;
    const bool solved = solver.solve(matrices + item * size, false) == 0;
    // The images take the place of the values in the output for a moment.
    if (!solved || !images_of(function, solver.values.get(), n, values)) {
      fill_nan(result, size);
      fill_nan(rows, size);
      fill_nan(values, n);
      return;
    }
    const S* v = solver.matrix;
    S *scaled = solver.spare(2 * size), *product = scaled + size;
    for (int j = 0; j < n; ++j)
      for (int64_t i = j * int64_t{n}; i < (j + 1) * int64_t{n}; ++i) scaled[i] = v[i] * values[j];
    multiply_hermitian(n, n, static_cast<const S*>(scaled), n, v, n, product, n);
    write_hermitian(n, product, result);
    std::copy_n(v, size, rows);
    std::copy_n(solver.values.get(), n, values);
  });
}

template <class S>
void adjoint_large(const Real<S>* values, const S* rows, const S* grad, int64_t batch, int n, Function function,
                   S* grad_matrices) {
  using T = Real<S>;
  const int64_t size = static_cast<int64_t>(n) * n;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> v(size), g(size), m(size);
    const Buffer<T> images(n), factors(n);
    for (int64_t item = begin; item < end; ++item) {
      S* out = grad_matrices + item * size;
      const T* w = values + item * n;
      if (std::isnan(w[0])) {
        fill_nan(out, size);
        continue;
      }
      images_of(function, w, n, images.get());
      std::copy_n(rows + item * size, size, v.get());
      read_hermitian_part(n, grad + item * size, g.get());
      multiply('N', 'N', n, n, n, g.get(), n, v.get(), n, m.get(), n);  // G V
      multiply('C', 'N', n, n, n, v.get(), n, m.get(), n, g.get(), n);  // V^H G V
      for (int j = 0; j < n; ++j) {
        for (int i = 0; i < n; i += kLanes<T>) {
          const int width = std::min(kLanes<T>, n - i);
          const Vec<T> wi = load_first(w + i, width), fi = load_first(images + i, width);
          store_first(factors + i, divided_difference<T>(function, wi, splat(w[j]), fi, splat(images[j])), width);
        }
        S* column = g + j * int64_t{n};
        for (int i = 0; i < n; ++i) column[i] *= factors[i];
      }
      multiply('N', 'N', n, n, n, v.get(), n, g.get(), n, m.get(), n);  // V (...)
      multiply_hermitian(n, n, m.get(), n, v.get(), n, g.get(), n);     // V (...) V^H
      write_hermitian(n, g.get(), out);
    }
  });
}

// ---- launchers -----------------------------------------------------------------------------------------------------

void spectral_function_fwd(const Tensor A, int64_t function, Tensor result, Tensor eigenvalues,
                           Tensor eigenvector_rows) {
  const int64_t batch = A.size(0);
  const int n = static_cast<int>(A.size(1));
  if (batch == 0 || n == 0) return;
  STD_TORCH_CHECK(function >= kExp && function <= kInv, "spectral_function_fwd: unknown function ", function);
  const auto named = static_cast<Function>(function);
  dispatch(A, [&]<class S>(S) {
    const auto* from = static_cast<const S*>(A.const_data_ptr());
    const Results<S> out{static_cast<S*>(result.mutable_data_ptr()),
                         static_cast<Real<S>*>(eigenvalues.mutable_data_ptr()),
                         static_cast<S*>(eigenvector_rows.mutable_data_ptr())};
    if constexpr (!kComplex<S>) {
      if (n <= kMaxN) return apply_lanes<S>(from, batch, n, named, out);
    }
    apply_large(from, batch, n, named, out);
  });
}

void spectral_function_bwd(const Tensor eigenvalues, const Tensor eigenvector_rows, const Tensor grad_result,
                           int64_t function, Tensor grad_A) {
  const int64_t batch = eigenvalues.size(0);
  const int n = static_cast<int>(eigenvalues.size(1));
  if (batch == 0 || n == 0) return;
  STD_TORCH_CHECK(function >= kExp && function <= kInv, "spectral_function_bwd: unknown function ", function);
  const auto named = static_cast<Function>(function);
  dispatch(eigenvector_rows, [&]<class S>(S) {
    const auto* values = static_cast<const Real<S>*>(eigenvalues.const_data_ptr());
    const auto* rows = static_cast<const S*>(eigenvector_rows.const_data_ptr());
    const auto* grad = static_cast<const S*>(grad_result.const_data_ptr());
    auto* out = static_cast<S*>(grad_A.mutable_data_ptr());
    if constexpr (!kComplex<S>) {
      if (n <= kMaxN) return adjoint_lanes<S>(values, rows, grad, batch, n, named, out);
    }
    adjoint_large(values, rows, grad, batch, n, named, out);
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "spectral_function_fwd(Tensor A, int function, Tensor(a!) result, Tensor(b!) eigenvalues, "
      "Tensor(c!) eigenvector_rows) -> ()");
  m.def(
      "spectral_function_bwd(Tensor eigenvalues, Tensor eigenvector_rows, Tensor grad_result, int function, "
      "Tensor(a!) grad_A) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("spectral_function_fwd", TORCH_BOX(&stablekern::spectral_function_fwd));
  m.impl("spectral_function_bwd", TORCH_BOX(&stablekern::spectral_function_bwd));
}
