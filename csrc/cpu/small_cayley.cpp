// Cayley transforms of small matrices, one matrix to a lane, and their adjoint; the mathematics is in
// stablekern/ops/small_cayley.py.
#include "stablekern/complex_simd.h"
#include "stablekern/lanes.h"
#include "stablekern/lapack.h"
#include "stablekern/simd.h"
#include "stablekern/tensor.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int kReluctance = 4;               // rows change places for a pivot that is so much larger
constexpr int64_t kGrainEntries = 8 * 1024;  // entries of matrices that are worth a thread

template <class T>
SK_INLINE Vec<T> inverse(Vec<T> a) {
  return splat(T(1)) / a;
}
template <class T>
SK_INLINE ComplexVec<T> inverse(ComplexVec<T> a) {
  const auto scale = power_of_two<T>(part_size(a));  // the square of the modulus is in range
  a = a * scale.down;
  return conj(a) * (scale.down / add_square(a, Vec<T>{}));
}

// (I + A)^-1 (I - A) by Gauss-Jordan elimination of (I + A | I - A), `m` being n rows of 2 n. Each lane takes its own
// pivot: its rows change places by selections. Elimination keeps the Hermitian part of a skew-Hermitian A's I + A above
// I, so that no pivot is below 1 there and an exchange is rare.
template <class S>
SK_NOINLINE void transform(Element<S>* m, int64_t n) {
  using T = RealOf<S>;
  using E = Element<S>;
  const int64_t width = 2 * n;
  for (int64_t k = 0; k < n; ++k) {
    E* pivot = m + k * width;
    Vec<T> best = part_size(pivot[k]);
    for (int64_t i = k + 1; i < n; ++i) {
      E* row = m + i * width;
      const Vec<T> size = part_size(row[k]);
      const Mask<T> larger = greater(size, splat(T(kReluctance)) * best);
      if (!any(larger)) continue;
      best = select(larger, size, best);
      for (int64_t c = k; c < width; ++c) {
        const E upper = pivot[c], lower = row[c];
        pivot[c] = select(larger, lower, upper);
        row[c] = select(larger, upper, lower);
      }
    }
    const E down = inverse<T>(pivot[k]);
    for (int64_t c = k + 1; c < width; ++c) pivot[c] = pivot[c] * down;
    for (int64_t i = 0; i < n; ++i) {
      if (i == k) continue;
      E* row = m + i * width;
      const E factor = -row[k];
      for (int64_t c = k + 1; c < width; ++c) row[c] = fma(factor, pivot[c], row[c]);
    }
  }
}

// run(first matrix, count, scratch) for blocks of kLanes matrices; scratch: an array of elements for each of `sizes`.
template <class S, class Run>
void for_blocks(int64_t batch, int64_t n, std::initializer_list<int64_t> sizes, const Run& run) {
  using T = RealOf<S>;
  const int64_t blocks = (batch + kLanes<T> - 1) / kLanes<T>;
  const int64_t grain = std::max<int64_t>(1, kGrainEntries / (n * n * kLanes<T>));
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    Arena arena;
    for (const int64_t size : sizes) arena.reserve<Vec<T>>(padded_to_lanes<T>(size * kParts<S>));
    arena.allocate();
    Element<S>* scratch[3] = {};
    int64_t k = 0;
    for (const int64_t size : sizes)
      scratch[k++] = reinterpret_cast<Element<S>*>(arena.take<Vec<T>>(padded_to_lanes<T>(size * kParts<S>)));
    for (int64_t block = begin; block < end; ++block)
      run(block * kLanes<T>, std::min<int64_t>(kLanes<T>, batch - block * kLanes<T>), scratch);
  });
}

template <class S>
void forward(const Tensor& A, Tensor& U) {
  using T = RealOf<S>;
  using E = Element<S>;
  const int64_t batch = A.size(0), n = A.size(1), reals = n * n * kParts<S>;
  if (batch == 0 || n == 0) return;
  for_blocks<S>(batch, n, {n * n, 2 * n * n}, [&](int64_t first, int64_t here, E* const* scratch) {
    E* square = scratch[0];
    E* m = scratch[1];
    load_turned(data<T>(A) + first * reals, reals, here, reals, 0, reinterpret_cast<Vec<T>*>(square));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        const E entry = square[i * n + j], one = element<S>(splat(T(i == j)));
        m[i * 2 * n + j] = one + entry;
        m[i * 2 * n + n + j] = one - entry;
      }
    transform<S>(m, n);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) square[i * n + j] = m[i * 2 * n + n + j];
    store_turned(reinterpret_cast<const Vec<T>*>(square), here, reals, 0, mutable_data<T>(U) + first * reals, reals);
  });
}

// Calls f with the offset of every four columns, then of each one that is left, and with how many they are.
template <class F>
SK_INLINE void by_fours(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4) f(j, std::integral_constant<int, 4>{});
  for (; j < n; ++j) f(j, std::integral_constant<int, 1>{});
}

// -1/2 W^H G W^H with W = U + I.
template <class S>
void backward(const Tensor& grad, const Tensor& U, Tensor& dA) {
  using T = RealOf<S>;
  using E = Element<S>;
  const int64_t batch = U.size(0), n = U.size(1), reals = n * n * kParts<S>;
  if (batch == 0 || n == 0) return;
  for_blocks<S>(batch, n, {n * n, n * n, n * n}, [&](int64_t first, int64_t here, E* const* scratch) {
    E* g = scratch[0];
    E* w = scratch[1];
    E* product = scratch[2];
    load_turned(data<T>(grad) + first * reals, reals, here, reals, 0, reinterpret_cast<Vec<T>*>(g));
    load_turned(data<T>(U) + first * reals, reals, here, reals, 0, reinterpret_cast<Vec<T>*>(w));
    const Vec<T> factor = splat(T(-0.5));
    for (int64_t i = 0; i < n; ++i) w[i * (n + 1)] = w[i * (n + 1)] + element<S>(splat(T(1)));
    for (int64_t i = 0; i < n; ++i)
      by_fours(n, [&](int64_t j, auto width) {
        E sum[width] = {};
        for (int64_t k = 0; k < n; ++k)
          for (int q = 0; q < width; ++q) sum[q] = fma_conj(w[k * n + i], g[k * n + j + q], sum[q]);
        for (int q = 0; q < width; ++q) product[i * n + j + q] = sum[q] * factor;
      });
    for (int64_t i = 0; i < n; ++i)
      by_fours(n, [&](int64_t j, auto width) {
        E sum[width] = {};
        for (int64_t k = 0; k < n; ++k)
          for (int q = 0; q < width; ++q) sum[q] = fma_conj(w[(j + q) * n + k], product[i * n + k], sum[q]);
        for (int q = 0; q < width; ++q) g[i * n + j + q] = sum[q];
      });
    store_turned(reinterpret_cast<const Vec<T>*>(g), here, reals, 0, mutable_data<T>(dA) + first * reals, reals);
  });
}

void small_cayley_fwd(Tensor A, Tensor U) {
  dispatch(A, [&]<class S>(S) { forward<S>(A, U); });
}

void small_cayley_bwd(Tensor grad, Tensor U, Tensor dA) {
  dispatch(U, [&]<class S>(S) { backward<S>(grad, U, dA); });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def("small_cayley_fwd(Tensor A, Tensor(a!) U) -> ()");
  m.def("small_cayley_bwd(Tensor grad, Tensor U, Tensor(a!) dA) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("small_cayley_fwd", TORCH_BOX(&stablekern::small_cayley_fwd));
  m.impl("small_cayley_bwd", TORCH_BOX(&stablekern::small_cayley_bwd));
}
