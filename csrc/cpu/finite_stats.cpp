// Counts of NaN and infinity, and the range and sum of what is finite, of many tensors in one pass: bound by the reading.
// Blocks have a fixed size and their sums are added in order, so the result does not depend on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <complex>
#include <limits>
#include <vector>

#include "stablekern/simd.h"
#include "stablekern/spans.h"

namespace stablekern {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::Tensor;

constexpr int kStrip = 256;  // half-precision numbers that are widened at a time

struct Stats {
  int64_t nan = 0, inf = 0;
  double low = std::numeric_limits<double>::infinity(), high = -low, sum = 0;

  // `size` stands for a number with the parts `re` and `im`; of finite parts it may be infinite.
  void add(double re, double im, double size) {
    if (std::isnan(re) || std::isnan(im)) {
      ++nan;
    } else if (std::isinf(re) || std::isinf(im)) {
      ++inf;
    } else {
      low = std::min(low, size);
      high = std::max(high, size);
      sum += size;
    }
  }
  void add(double value) { add(value, 0, value); }
  void join(const Stats& other) {
    nan += other.nan;
    inf += other.inf;
    low = std::min(low, other.low);
    high = std::max(high, other.high);
    sum += other.sum;
  }
};

template <class T>
void add_sum(Vec<T> v, Vec<double>& first, Vec<double>& second) {
  if constexpr (sizeof(T) == 8) {
    first = first + v;
  } else {
    Vec<double> low, high;
    widen(v, low, high);
    first = first + low;
    second = second + high;
  }
}

// float or double
template <class T>
void add_reals(const T* p, int64_t n, Stats& stats) {
  constexpr int lanes = kLanes<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  Vec<T> low = splat<T>(infinity), high = splat<T>(-infinity);
  Vec<double> first{}, second{};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const Vec<T> v = load(p + i);
    const Mask<T> finite = less(abs(v), splat<T>(infinity));
    low = min(low, select<T>(finite, v, splat<T>(infinity)));
    high = max(high, select<T>(finite, v, splat<T>(-infinity)));
    add_sum<T>(select<T>(finite, v, Vec<T>{}), first, second);
    if (const int others = lanes - std::popcount(lane_bits(finite))) {
      const int numbers = std::popcount(lane_bits(equal(v, v)));
      stats.nan += lanes - numbers;
      stats.inf += others - (lanes - numbers);
    }
  }
  for (int lane = 0; lane < lanes; ++lane) {
    stats.low = std::min(stats.low, static_cast<double>(low[lane]));
    stats.high = std::max(stats.high, static_cast<double>(high[lane]));
  }
  stats.sum += horizontal_sum(first + second);
  for (; i < n; ++i) stats.add(p[i]);
}

template <class S>
void add_halves(const S* p, int64_t n, Stats& stats) {
  alignas(kVectorBytes) float wide[kStrip];
  for (int64_t i = 0; i < n; i += kStrip) {
    const int count = static_cast<int>(std::min<int64_t>(kStrip, n - i));
    for (int k = 0; k < count; ++k) wide[k] = static_cast<float>(p[i + k]);
    add_reals(wide, count, stats);
  }
}

template <class T>
void add_complex(const std::complex<T>* p, int64_t n, Stats& stats) {
  for (int64_t i = 0; i < n; ++i) {
    const double re = p[i].real(), im = p[i].imag();
    stats.add(re, im, std::hypot(re, im));
  }
}

template <class I>
void add_integers(const I* p, int64_t n, Stats& stats) {
  for (int64_t i = 0; i < n; ++i) stats.add(static_cast<double>(p[i]));
}

Stats of_block(const Span& span, int64_t from, int64_t to) {
  Stats stats;
  const auto with = [&](auto* tag, const auto& add) {
    add(static_cast<decltype(tag)>(span.data) + from, to - from, stats);
  };
  switch (span.type) {
    case SpanType::kFloat: with(static_cast<const float*>(nullptr), add_reals<float>); break;
    case SpanType::kDouble: with(static_cast<const double*>(nullptr), add_reals<double>); break;
    case SpanType::kBfloat16: with(static_cast<const BFloat16*>(nullptr), add_halves<BFloat16>); break;
    case SpanType::kHalf: with(static_cast<const Half*>(nullptr), add_halves<Half>); break;
    case SpanType::kComplexFloat: with(static_cast<const std::complex<float>*>(nullptr), add_complex<float>); break;
    case SpanType::kComplexDouble: with(static_cast<const std::complex<double>*>(nullptr), add_complex<double>); break;
    case SpanType::kBool: with(static_cast<const bool*>(nullptr), add_integers<bool>); break;
    case SpanType::kUint8: with(static_cast<const uint8_t*>(nullptr), add_integers<uint8_t>); break;
    case SpanType::kInt8: with(static_cast<const int8_t*>(nullptr), add_integers<int8_t>); break;
    case SpanType::kInt16: with(static_cast<const int16_t*>(nullptr), add_integers<int16_t>); break;
    case SpanType::kInt32: with(static_cast<const int32_t*>(nullptr), add_integers<int32_t>); break;
    case SpanType::kInt64: with(static_cast<const int64_t*>(nullptr), add_integers<int64_t>); break;
  }
  return stats;
}

void finite_stats(Tensor table, Tensor nan, Tensor inf, Tensor low, Tensor high, Tensor sum, Tensor count) {
  const std::vector<Span> spans = spans_of(table);
  const Blocks blocks(spans);
  std::vector<Stats> parts(blocks.count());
  torch::stable::parallel_for(0, blocks.count(), 1, [&](int64_t begin, int64_t end) {
    blocks.visit(begin, end, false, [&](int64_t block, const Span& span, int64_t from, int64_t to) {
      parts[block] = of_block(span, from, to);
    });
  });
  const auto integers = [](Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); };
  const auto reals = [](Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); };
  for (size_t i = 0; i < spans.size(); ++i) {
    Stats whole;
    for (int64_t block = blocks.first(i); block < blocks.last(i); ++block) whole.join(parts[block]);
    integers(nan)[i] = whole.nan;
    integers(inf)[i] = whole.inf;
    reals(low)[i] = whole.low;
    reals(high)[i] = whole.high;
    reals(sum)[i] = whole.sum;
    integers(count)[i] = spans[i].size;
  }
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "finite_stats(Tensor table, Tensor(a!) nan, Tensor(b!) inf, Tensor(c!) low, Tensor(d!) high, Tensor(e!) sum,"
      " Tensor(f!) count) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("finite_stats", TORCH_BOX(&stablekern::finite_stats));
}
