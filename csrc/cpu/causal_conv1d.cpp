// The depthwise convolution in front of a scan, with bias and SiLU, and its adjoint; the mathematics is in
// stablekern/ops/causal_conv1d.py. Both directions in time are one kernel: the taps come in the order in which they meet
// the sequence, and `shift` says where the first of them stands, -(k - 1) or 0 steps from the result.
//
// Lanes are channels, which lie side by side. A task is a stretch of time of one batch item, short enough for its rows to
// stay in the cache while the blocks of channels are done one after the other; the steps that its windows share with the
// next stretch are recomputed. A window of k steps slides through registers, so every number is loaded once. Sums over
// time leave a task as one number per tap and channel, and are added up in the order of the tasks: no result depends on
// the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "stablekern/simd.h"
#include "stablekern/tensor.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kSteps = 128;              // of a task
constexpr int64_t kThreadWork = 1 << 15;     // results that are worth a thread

// Rows of channels: step t of item b starts at `data + b * item + t * row`.
template <class T>
struct Rows {
  T* data;
  int64_t item, row;

  T* at(int64_t b, int64_t t) const { return data + b * item + t * row; }
};

template <class T>
struct Problem {
  int64_t batch, length, channels;
  Rows<const T> x;
  const T *taps, *bias;  // (k, channels), (channels) or null
  int64_t shift;

  int64_t stretches() const { return (length + kSteps - 1) / kSteps; }
};

// kWidth numbers in a row, the oldest first.
template <class T, int kWidth>
struct Window {
  Vec<T> v[kWidth]{};

  SK_INLINE void push(Vec<T> next) {
#pragma GCC unroll 4
    for (int j = 0; j + 1 < kWidth; ++j) v[j] = v[j + 1];
    v[kWidth - 1] = next;
  }
  SK_INLINE Vec<T> dot(const Vec<T>* taps, Vec<T> sum) const {
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) sum = fma(taps[j], v[j], sum);
    return sum;
  }
};

// One block of channels over one stretch of time.
template <class T, int kWidth>
struct Block {
  const Problem<T>& p;
  int64_t item, channel;
  int count;  // channels, at most kLanes
  Vec<T> taps[kWidth], bias;

  Block(const Problem<T>& problem, int64_t item_, int64_t channel_)
      : p(problem), item(item_), channel(channel_),
        count(static_cast<int>(std::min<int64_t>(kLanes<T>, problem.channels - channel_))) {
    for (int j = 0; j < kWidth; ++j) taps[j] = get(p.taps + j * p.channels + channel);
    bias = p.bias ? get(p.bias + channel) : Vec<T>{};
  }
  SK_INLINE Vec<T> get(const T* from) const { return count == kLanes<T> ? load(from) : load_first(from, count); }
  SK_INLINE void put(T* to, Vec<T> v) const { count == kLanes<T> ? store(to, v) : store_first(to, v, count); }
  // A row of the sequence, 0 beyond its ends.
  SK_INLINE Vec<T> step(const Rows<const T>& rows, int64_t t) const {
    return t >= 0 && t < p.length ? get(rows.at(item, t) + channel) : Vec<T>{};
  }
  // The window that only lacks its newest number, for the result of step t.
  Window<T, kWidth> before(int64_t t) const {
    Window<T, kWidth> x;
    for (int j = 0; j + 1 < kWidth; ++j) x.push(step(p.x, t + p.shift + j));
    return x;
  }
};

template <class T, int kWidth, bool kSilu>
void forward(const Problem<T>& p, const Rows<T>& y) {
  const int64_t grain = kThreadWork / (kSteps * p.channels) + 1;
  torch::stable::parallel_for(0, p.batch * p.stretches(), grain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t item = task / p.stretches(), begin = task % p.stretches() * kSteps;
      const int64_t end = std::min(begin + kSteps, p.length);
      for (int64_t channel = 0; channel < p.channels; channel += kLanes<T>) {
        const Block<T, kWidth> block(p, item, channel);
        Window<T, kWidth> x = block.before(begin);
        for (int64_t t = begin; t < end; ++t) {
          x.push(block.step(p.x, t + p.shift + kWidth - 1));
          Vec<T> v = x.dot(block.taps, block.bias);
          if constexpr (kSilu) v = v / (splat<T>(1) + exp<T>(-v));
          block.put(y.at(item, t) + channel, v);
        }
      }
    }
  });
}

template <class T, int kWidth, bool kSilu>
void backward(const Problem<T>& p, const Rows<const T>& grad, const Rows<T>& grad_x, T* grad_taps, T* grad_bias) {
  const int64_t tasks = p.batch * p.stretches(), grain = kThreadWork / (kSteps * p.channels) + 1;
  const int64_t size = (kWidth + 1) * p.channels;
  std::vector<T> sums(tasks * size);  // per task: of the taps, then of the bias
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t item = task / p.stretches(), begin = task % p.stretches() * kSteps;
      const int64_t end = std::min(begin + kSteps, p.length);
      for (int64_t channel = 0; channel < p.channels; channel += kLanes<T>) {
        const Block<T, kWidth> block(p, item, channel);
        Vec<T> reversed[kWidth], by_taps[kWidth]{}, by_bias{};
        for (int j = 0; j < kWidth; ++j) reversed[j] = block.taps[kWidth - 1 - j];
        // The gradient of step t takes G from t - shift - (k - 1) to t - shift.
        const int64_t first = begin - p.shift - (kWidth - 1);
        Window<T, kWidth> x = block.before(first), g;
        for (int64_t t = first; t < end - p.shift; ++t) {
          x.push(block.step(p.x, t + p.shift + kWidth - 1));
          Vec<T> here = block.step(grad, t);
          if constexpr (kSilu) {
            const Vec<T> one = splat<T>(1), v = x.dot(block.taps, block.bias), s = one / (one + exp<T>(-v));
            here = here * s * fma(v, one - s, one);
          }
          g.push(here);
          if (t >= begin && t < end) {  // each G is in the sums of one task
#pragma GCC unroll 4
            for (int j = 0; j < kWidth; ++j) by_taps[j] = fma(here, x.v[j], by_taps[j]);
            by_bias += here;
          }
          if (t + p.shift >= begin) block.put(grad_x.at(item, t + p.shift) + channel, g.dot(reversed, Vec<T>{}));
        }
        T* to_sums = sums.data() + task * size + channel;
        for (int j = 0; j < kWidth; ++j) block.put(to_sums + j * p.channels, by_taps[j]);
        block.put(to_sums + kWidth * p.channels, by_bias);
      }
    }
  });
  std::vector<double> totals(size);
  for (int64_t task = 0; task < tasks; ++task)
    for (int64_t k = 0; k < size; ++k) totals[k] += sums[task * size + k];
  std::copy_n(totals.begin(), kWidth * p.channels, grad_taps);
  std::copy_n(totals.begin() + kWidth * p.channels, p.channels, grad_bias);
}

// ---- tensors ------------------------------------------------------------------------------------------------------

template <class T>
Rows<const T> rows(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1)};
}
template <class T>
Rows<T> mutable_rows(Tensor& t) {
  return {mutable_data<T>(t), t.stride(0), t.stride(1)};
}

template <class T>
Problem<T> problem(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, bool reverse) {
  return {x.size(0), x.size(1), x.size(2), rows<T>(x), data<T>(taps), data<T>(bias), reverse ? 0 : 1 - taps.size(0)};
}

// f(width as a constant, silu as a constant).
template <class F>
void for_width(int64_t width, bool silu, const F& f) {
  const auto chosen = [&]<int kWidth>(std::integral_constant<int, kWidth> w) {
    silu ? f(w, std::true_type{}) : f(w, std::false_type{});
  };
  switch (width) {
    case 1: return chosen(std::integral_constant<int, 1>{});
    case 2: return chosen(std::integral_constant<int, 2>{});
    case 3: return chosen(std::integral_constant<int, 3>{});
    default: return chosen(std::integral_constant<int, 4>{});
  }
}

void causal_conv1d_fwd(const Tensor x, const Tensor taps, const std::optional<Tensor> bias, bool silu, bool reverse,
                       Tensor y) {
  for_dtype(x, [&]<class T>(T) {
    for_width(taps.size(0), silu, [&](auto width, auto activate) {
      forward<T, width.value, activate.value>(problem<T>(x, taps, bias, reverse), mutable_rows<T>(y));
    });
  });
}

void causal_conv1d_bwd(const Tensor grad, const Tensor x, const Tensor taps, const std::optional<Tensor> bias, bool silu,
                       bool reverse, Tensor grad_x, Tensor grad_taps, Tensor grad_bias) {
  for_dtype(x, [&]<class T>(T) {
    for_width(taps.size(0), silu, [&](auto width, auto activate) {
      backward<T, width.value, activate.value>(problem<T>(x, taps, bias, reverse), rows<T>(grad), mutable_rows<T>(grad_x),
                                               mutable_data<T>(grad_taps), mutable_data<T>(grad_bias));
    });
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor taps, Tensor? bias, bool silu, bool reverse, Tensor(a!) y) -> ()");
  m.def(
      "causal_conv1d_bwd(Tensor grad, Tensor x, Tensor taps, Tensor? bias, bool silu, bool reverse, Tensor(a!) grad_x,"
      " Tensor(b!) grad_taps, Tensor(c!) grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&stablekern::causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&stablekern::causal_conv1d_bwd));
}
