// Normalised Laplacians of weighted graphs of any size, and the way back; one graph after the other in each thread,
// vectorised along rows. Per graph the arithmetic is the same wherever it lies in the batch.
#include "stablekern/lapack.h"
#include "stablekern/simd.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kEntriesPerTask = 1 << 14;  // fewer are not worth a thread

// `graph(i, scratch)` for each of `batch` graphs, in parallel; `scratch` holds n^2 + n numbers.
template <class T, class Graph>
void for_each_graph(int64_t batch, int n, const Graph& graph) {
  const int64_t size = static_cast<int64_t>(n) * n;
  torch::stable::parallel_for(0, batch, std::max<int64_t>(kEntriesPerTask / size, 1), [&](int64_t begin, int64_t end) {
    const Buffer<T> scratch(size + n);
    for (int64_t i = begin; i < end; ++i) graph(i, scratch.get());
  });
}

// `step(start, width)` over a row in whole vectors, the last one shorter.
template <class T, class Step>
SK_INLINE void along_row(int n, const Step& step) {
  int start = 0;
  for (; start + kLanes<T> <= n; start += kLanes<T>) step(start, kLanes<T>);
  if (start < n) step(start, n - start);
}

template <class T>
void normalise(const T* adjacency, int n, T* symmetric, T* laplacian, T* inverse_root) {
  read_hermitian_part(n, adjacency, symmetric);
  Vec<T> largest{}, probe{};  // probe: NaN once a weight is not finite
  const int64_t size = static_cast<int64_t>(n) * n;
  for (int64_t i = 0; i < size; i += kLanes<T>) {
    const int width = static_cast<int>(std::min<int64_t>(kLanes<T>, size - i));
    largest = max(abs(load_first(symmetric + i, width)), largest);
    probe = fma(load_first(adjacency + i, width), Vec<T>{}, probe);
  }
  T top = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) top = std::max(top, largest[lane]);
  const T down = power_of_two<T>(splat(top)).down[0];
  const T poison = horizontal_sum(probe);  // NaN or 0

  T* root = inverse_root;
  for (int i = 0; i < n; ++i) {
    T* row = symmetric + static_cast<int64_t>(i) * n;
    Vec<T> sum{};
    along_row<T>(n, [&](int start, int width) {
      const Vec<T> weights = load_first(row + start, width) * down;
      store_first(row + start, weights, width);
      sum += abs(weights);
    });
    const T degree = horizontal_sum(sum);
    root[i] = degree < std::numeric_limits<T>::min() ? T(0) : 1 / std::sqrt(degree);
  }
  for (int i = 0; i < n; ++i) {
    const int64_t at = static_cast<int64_t>(i) * n;
    // The product of the two roots first (it is in range): so both triangles round alike.
    along_row<T>(n, [&](int start, int width) {
      const Vec<T> roots = load_first(root + start, width) * root[i];
      store_first(laplacian + at + start, fnma(load_first(symmetric + at + start, width), roots, splat(poison)), width);
    });
    laplacian[at + i] = 1 - symmetric[at + i] * (root[i] * root[i]) + poison;
  }
  for (int i = 0; i < n; ++i) root[i] = root[i] * std::sqrt(down) + poison;
}

template <class T>
void adjoint(const T* grad, const T* laplacian, const T* s, int n, T* symmetric, T* half_slope, T* out) {
  read_hermitian_part(n, grad, symmetric);
  const Vec<T> zero{};
  for (int i = 0; i < n; ++i) {
    const int64_t at = static_cast<int64_t>(i) * n;
    Vec<T> sum{};
    along_row<T>(n, [&](int start, int width) {
      sum = fnma(load_first(symmetric + at + start, width), load_first(laplacian + at + start, width), sum);
    });
    half_slope[i] = s[i] * (s[i] * (horizontal_sum(sum) + symmetric[at + i])) / 2;
  }
  for (int i = 0; i < n; ++i) {
    const int64_t at = static_cast<int64_t>(i) * n;
    const Vec<T> si = splat(s[i]);
    along_row<T>(n, [&](int start, int width) {
      const Vec<T> sj = load_first(s + start, width), degrees = load_first(half_slope + start, width) + half_slope[i];
      const Vec<T> g = load_first(symmetric + at + start, width), entry = load_first(laplacian + at + start, width);
      const Vec<T> turned = select(greater(entry, zero), -degrees, degrees);
      const Mask<T> both = greater(si, zero) & greater(sj, zero);
      store_first(out + at + start, select(both, fnma(si * g, sj, turned), zero), width);
    });
    // On the diagonal the weight of a self-loop has the sign of 1 - L_ii.
    const T slope = laplacian[at + i] > 1 ? -2 * half_slope[i] : 2 * half_slope[i];
    out[at + i] = s[i] > 0 ? slope - s[i] * symmetric[at + i] * s[i] : T(0);
  }
}

// ---- launchers -----------------------------------------------------------------------------------------------------

void normalized_laplacian_fwd(const Tensor adjacency, Tensor laplacian, Tensor inverse_root) {
  const int64_t batch = adjacency.size(0);
  const int n = static_cast<int>(adjacency.size(1));
  if (batch == 0 || n == 0) return;
  const auto run = [&]<class T>(T) {
    const auto* from = static_cast<const T*>(adjacency.const_data_ptr());
    auto *to = static_cast<T*>(laplacian.mutable_data_ptr()), *root = static_cast<T*>(inverse_root.mutable_data_ptr());
    for_each_graph<T>(batch, n, [&](int64_t i, T* scratch) {
      normalise(from + i * n * n, n, scratch, to + i * n * n, root + i * n);
    });
  };
  adjacency.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

void normalized_laplacian_bwd(const Tensor grad, const Tensor laplacian, const Tensor inverse_root,
                              Tensor grad_adjacency) {
  const int64_t batch = laplacian.size(0);
  const int n = static_cast<int>(laplacian.size(1));
  if (batch == 0 || n == 0) return;
  const auto run = [&]<class T>(T) {
    const auto data = [](const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); };
    const T *g = data(grad), *values = data(laplacian), *roots = data(inverse_root);
    auto* out = static_cast<T*>(grad_adjacency.mutable_data_ptr());
    for_each_graph<T>(batch, n, [&](int64_t i, T* scratch) {
      const int64_t at = i * n * n;
      adjoint(g + at, values + at, roots + i * n, n, scratch, scratch + int64_t{n} * n, out + at);
    });
  };
  laplacian.scalar_type() == torch::headeronly::ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def("normalized_laplacian_fwd(Tensor adjacency, Tensor(a!) laplacian, Tensor(b!) inverse_root) -> ()");
  m.def(
      "normalized_laplacian_bwd(Tensor grad, Tensor laplacian, Tensor inverse_root, Tensor(a!) grad_adjacency) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("normalized_laplacian_fwd", TORCH_BOX(&stablekern::normalized_laplacian_fwd));
  m.impl("normalized_laplacian_bwd", TORCH_BOX(&stablekern::normalized_laplacian_bwd));
}
