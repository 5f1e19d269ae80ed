// Norms of a list of gradients, and their product with one factor. Both are bound by memory: the sum of squares is kept
// in double, which costs nothing beside the loads and makes the finite check free (the square of a finite float never
// overflows a double).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "stablekern/caches.h"
#include "stablekern/simd.h"
#include "stablekern/spans.h"

namespace stablekern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::Tensor;

constexpr int64_t kAheadBytes = 2048;  // of the gradients are under way
constexpr int kStrip = 256;            // half-precision numbers that are widened at a time

double sum_of_squares(const float* p, int64_t n) {
  constexpr int lanes = kLanes<float>;
  Vec<double> sums[4] = {};
  int64_t i = 0;
  const auto add = [&sums](Vec<float> v, int which) {
    Vec<double> low, high;
    widen(v, low, high);
    sums[2 * which] = fma(low, low, sums[2 * which]);
    sums[2 * which + 1] = fma(high, high, sums[2 * which + 1]);
  };
  for (; i + 2 * lanes <= n; i += 2 * lanes) {
    prefetch<2 * kVectorBytes>(p + i, kAheadBytes);
    add(load(p + i), 0);
    add(load(p + i + lanes), 1);
  }
  for (; i < n; i += lanes) add(load_first(p + i, static_cast<int>(std::min<int64_t>(lanes, n - i))), 0);
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

double sum_of_squares(const double* p, int64_t n, double unit) {
  constexpr int lanes = kLanes<double>;
  Vec<double> sums[2] = {};
  for (int64_t i = 0, odd = 0; i < n; i += lanes, odd ^= 1) {
    const Vec<double> v = load_first(p + i, static_cast<int>(std::min<int64_t>(lanes, n - i))) / splat<double>(unit);
    sums[odd] = fma(v, v, sums[odd]);
  }
  return horizontal_sum(sums[0] + sums[1]);
}

template <class S>
double sum_of_squares_half(const S* p, int64_t n) {
  alignas(kVectorBytes) float wide[kStrip];
  double sum = 0;
  for (int64_t i = 0; i < n; i += kStrip) {
    const int count = static_cast<int>(std::min<int64_t>(kStrip, n - i));
    for (int k = 0; k < count; ++k) wide[k] = static_cast<float>(p[i + k]);
    sum += sum_of_squares(wide, count);
  }
  return sum;
}

double partial(const Span& span, int64_t from, int64_t to) {
  const int64_t n = to - from;
  switch (span.type) {
    case SpanType::kFloat: return sum_of_squares(static_cast<const float*>(span.data) + from, n);
    case SpanType::kBfloat16: return sum_of_squares_half(static_cast<const BFloat16*>(span.data) + from, n);
    case SpanType::kHalf: return sum_of_squares_half(static_cast<const Half*>(span.data) + from, n);
    default: return sum_of_squares(static_cast<const double*>(span.data) + from, n, 1);
  }
}

// The norm of doubles whose squares left the range of doubles: in units of the largest of them.
double norm_in_units(const double* p, int64_t n) {
  double peak = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!(std::abs(p[i]) <= std::numeric_limits<double>::max())) return std::abs(p[i]);
    peak = std::max(peak, std::abs(p[i]));
  }
  return peak == 0 ? 0 : std::sqrt(sum_of_squares(p, n, peak)) * peak;
}

void gradient_norms(Tensor table, Tensor norms) {
  const std::vector<Span> spans = spans_of(table);
  const Blocks blocks(spans);
  std::vector<double> sums(blocks.count());
  torch::stable::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
    const auto sum = [&](int64_t block, const Span& span, int64_t from, int64_t to) {
      sums[block] = partial(span, from, to);
    };
    blocks.visit(begin, end, false, sum);
  });
  auto* out = static_cast<double*>(norms.mutable_data_ptr());
  // A sum of squares below this may have lost digits to underflow.
  const double smallest = std::numeric_limits<double>::min() / std::numeric_limits<double>::epsilon();
  for (size_t i = 0; i < spans.size(); ++i) {
    double sum = 0;
    for (int64_t block = blocks.first(i); block < blocks.last(i); ++block) sum += sums[block];
    const bool safe = sum >= smallest && sum <= std::numeric_limits<double>::max();
    out[i] = safe || spans[i].type != SpanType::kDouble
                 ? std::sqrt(sum)
                 : norm_in_units(static_cast<const double*>(spans[i].data), spans[i].size);
  }
}

template <class T>
void multiply(T* p, int64_t n, T factor) {
  constexpr int lanes = kLanes<T>;
  const Vec<T> f = splat<T>(factor);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    prefetch<kVectorBytes>(p + i, kAheadBytes);
    store(p + i, load(p + i) * f);
  }
  if (i < n) store_first(p + i, load_first(p + i, static_cast<int>(n - i)) * f, static_cast<int>(n - i));
}

template <class S>
void multiply_half(S* p, int64_t n, float factor) {
  for (int64_t i = 0; i < n; ++i) p[i] = static_cast<S>(static_cast<float>(p[i]) * factor);
}

// Whether anything was written.
bool multiply_gradients(Tensor table, Tensor factor) {
  const double f = *static_cast<const double*>(factor.const_data_ptr());
  if (f == 1) return false;
  const std::vector<Span> spans = spans_of(table);
  const Blocks blocks(spans);
  torch::stable::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
    // Backwards: what the norms read last is still in the cache.
    blocks.visit(begin, end, true, [&](int64_t, const Span& span, int64_t from, int64_t to) {
      const int64_t n = to - from;
      const auto single = static_cast<float>(f);
      switch (span.type) {
        case SpanType::kFloat: return multiply(static_cast<float*>(span.data) + from, n, single);
        case SpanType::kBfloat16: return multiply_half(static_cast<BFloat16*>(span.data) + from, n, single);
        case SpanType::kHalf: return multiply_half(static_cast<Half*>(span.data) + from, n, single);
        default: return multiply(static_cast<double*>(span.data) + from, n, f);
      }
    });
  });
  return true;
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def("gradient_norms(Tensor table, Tensor(a!) norms) -> ()");
  m.def("multiply_gradients(Tensor table, Tensor factor) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("gradient_norms", TORCH_BOX(&stablekern::gradient_norms));
  m.impl("multiply_gradients", TORCH_BOX(&stablekern::multiply_gradients));
}
