// Sample covariances and their adjoint, one item per thread; the mathematics is in
// stablekern/ops/sample_covariance.py. Snapshots by rows are the columns of what BLAS reads.
#include "stablekern/lapack.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace stablekern {
namespace {

using torch::stable::Tensor;

struct Shape {
  int count, n;
  bool center;
  int64_t divisor;
  double target;  // trace of the result; 0: over `divisor` instead
  int64_t length() const { return static_cast<int64_t>(count) * n; }
  int64_t size() const { return static_cast<int64_t>(n) * n; }
};

// The snapshots without their mean, if asked. Those that will be normalised come times `down`, a power of two that
// brings their largest component near 1. False for an item that is not finite.
template <class S>
bool read_snapshots(const S* from, const Shape& shape, S* to, Real<S>& down) {
  using T = Real<S>;
  const int64_t length = shape.length(), count = shape.count, parts = kComplex<S> ? 2 : 1;
  if (!all_finite(from, length)) return false;
  const auto* x = reinterpret_cast<const T*>(from);
  auto* y = reinterpret_cast<T*>(to);
  down = 1;
  if (shape.target > 0) {
    Vec<T> largest{};
    for (int64_t i = 0; i < length * parts; i += kLanes<T>)
      largest = max(largest, abs(load_first(x + i, static_cast<int>(std::min<int64_t>(kLanes<T>, length * parts - i)))));
    T top = 0;
    for (int lane = 0; lane < kLanes<T>; ++lane) top = std::max(top, largest[lane]);
    down = power_of_two<T>(splat(top)).down[0];
  }
  for (int64_t i = 0; i < length * parts; ++i) y[i] = x[i] * down;
  if (!shape.center) return true;
  const int64_t width = shape.n * parts;
  const Buffer<T> mean(static_cast<std::size_t>(width));
  std::fill_n(mean.get(), width, T(0));
  for (int64_t l = 0; l < count; ++l)
    for (int64_t i = 0; i < width; ++i) mean[i] += y[l * width + i];
  for (int64_t i = 0; i < width; ++i) mean[i] /= static_cast<T>(count);
  for (int64_t l = 0; l < count; ++l)
    for (int64_t i = 0; i < width; ++i) y[l * width + i] -= mean[i];
  return true;
}

template <class S>
Real<S> energy(const S* x, int64_t length) {
  const auto* parts = reinterpret_cast<const Real<S>*>(x);
  const int64_t count = length * (kComplex<S> ? 2 : 1);
  Vec<Real<S>> sum{};
  for (int64_t i = 0; i < count; i += kLanes<Real<S>>) {
    const auto v = load_first(parts + i, static_cast<int>(std::min<int64_t>(kLanes<Real<S>>, count - i)));
    sum = fma(v, v, sum);
  }
  return horizontal_sum(sum);
}

// What the products of the snapshots are multiplied with; NaN where there is no such factor.
template <class S>
Real<S> factor(const Shape& shape, const S* x, Real<S>& trace) {
  using T = Real<S>;
  if (shape.target == 0) return T(1) / static_cast<T>(shape.divisor);
  trace = energy<S>(x, shape.length());
  return trace > 0 ? static_cast<T>(shape.target) / trace : std::numeric_limits<T>::quiet_NaN();
}

template <class S>
void forward(const S* snapshots, int64_t batch, const Shape& shape, S* out) {
  using T = Real<S>;
  const int n = shape.n;
  const int64_t length = shape.length(), size = shape.size();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> x(static_cast<std::size_t>(length)), columns(static_cast<std::size_t>(size));
    for (int64_t item = begin; item < end; ++item) {
      T down = 1, trace = 0;
      const bool finite = read_snapshots<S>(snapshots + item * length, shape, x, down);
      const T scale = finite ? factor<S>(shape, x, trace) : std::numeric_limits<T>::quiet_NaN();
      S* to = out + item * size;
      if (std::isnan(scale)) {
        std::fill_n(to, size, S(scale));
        continue;
      }
      // Each snapshot takes the root of the factor, so that the product is the result.
      const T root = std::sqrt(scale);
      for (int64_t i = 0; i < length; ++i) x[i] *= root;
      multiply_hermitian<S>(n, shape.count, x, n, x, n, columns, n);
      write_hermitian<S>(n, columns, to);
    }
  });
}

template <class S>
void backward(const S* grad, const S* snapshots, int64_t batch, const Shape& shape, S* out) {
  using T = Real<S>;
  const int n = shape.n;
  const int64_t length = shape.length(), entries = length * (kComplex<S> ? 2 : 1);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    const OneThread alone;
    const Buffer<S> x(static_cast<std::size_t>(length)), image(static_cast<std::size_t>(length));
    const Buffer<S> hermitian(static_cast<std::size_t>(shape.size()));
    for (int64_t item = begin; item < end; ++item) {
      T down = 1, trace = 0;
      const bool finite = read_snapshots<S>(snapshots + item * length, shape, x, down);
      const T scale = finite ? factor<S>(shape, x, trace) : std::numeric_limits<T>::quiet_NaN();
      S* to = out + item * length;
      if (std::isnan(scale)) {
        std::fill_n(to, length, S(0));
        continue;
      }
      read_hermitian_part<S>(n, grad + item * shape.size(), hermitian);
      multiply<S>('N', 'N', n, shape.count, n, hermitian, n, x, n, image, n);
      const auto *flat = reinterpret_cast<const T*>(x.get()), *turned = reinterpret_cast<const T*>(image.get());
      T share = 0;
      if (shape.target > 0) {
        double along = 0;
        for (int64_t i = 0; i < entries; ++i) along += static_cast<double>(flat[i]) * turned[i];
        share = static_cast<T>(along / trace);
      }
      auto* result = reinterpret_cast<T*>(to);
      for (int64_t i = 0; i < entries; ++i) result[i] = (turned[i] - share * flat[i]) * (2 * scale) * down;
    }
  });
}

Shape shape_of(const Tensor& X, bool center, int64_t divisor, double target) {
  return {static_cast<int>(X.size(1)), static_cast<int>(X.size(2)), center, divisor, target};
}

void sample_covariance_fwd(Tensor X, bool center, int64_t divisor, double target, Tensor R) {
  if (R.numel() == 0) return;
  dispatch(X, [&]<class S>(S) {
    forward(static_cast<const S*>(X.const_data_ptr()), X.size(0), shape_of(X, center, divisor, target),
            static_cast<S*>(R.mutable_data_ptr()));
  });
}

void sample_covariance_bwd(Tensor grad, Tensor X, bool center, int64_t divisor, double target, Tensor grad_X) {
  if (X.numel() == 0) return;
  dispatch(X, [&]<class S>(S) {
    backward(static_cast<const S*>(grad.const_data_ptr()), static_cast<const S*>(X.const_data_ptr()), X.size(0),
             shape_of(X, center, divisor, target), static_cast<S*>(grad_X.mutable_data_ptr()));
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def("sample_covariance_fwd(Tensor X, bool center, int divisor, float target, Tensor(a!) R) -> ()");
  m.def(
      "sample_covariance_bwd(Tensor grad, Tensor X, bool center, int divisor, float target, "
      "Tensor(a!) grad_X) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("sample_covariance_fwd", TORCH_BOX(&stablekern::sample_covariance_fwd));
  m.impl("sample_covariance_bwd", TORCH_BOX(&stablekern::sample_covariance_bwd));
}
