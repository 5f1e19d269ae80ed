// The depthwise convolution in front of a scan, with bias and SiLU, and its adjoint; the mathematics is in
// stablekern/ops/causal_conv1d.py. Both directions in time are one kernel: the taps come in the order in which they meet
// the sequence, and `shift` says where the first of them stands, -(k - 1) or 0 steps from the result. The last channels
// may run the other way than the first ones.
//
// Lanes are what lies side by side. Where that is the channels of a step, a task is a stretch of time of one batch item,
// short enough for its rows to stay in the cache while the blocks of channels are done one after the other; a window of k
// steps slides through registers, so every number is loaded once. Where it is the steps of a channel, a task is a stretch
// of time of one channel, copied to a buffer with zeros beyond the ends of the sequence, from which the k shifted vectors
// are loaded. In both, the steps that a task shares with the next stretch are recomputed. Sums over time leave a task as
// one number per tap and channel, and are added up in the order of the tasks: no result depends on the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

#include "stablekern/lanes.h"
#include "stablekern/simd.h"
#include "stablekern/tensor.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kSteps = 128;            // of a task whose lanes are channels
constexpr int64_t kRowSteps = 1024;        // of a task whose lanes are steps
constexpr int64_t kThreadWork = 1 << 15;   // results that are worth a thread

// Step t of channel c of item b is `data[b * item + c * channel + t * step]`; `channel` or `step` is 1.
template <class T>
struct Sequences {
  T* data;
  int64_t item, channel, step;

  T* at(int64_t b, int64_t c, int64_t t) const { return data + b * item + c * channel + t * step; }
};

// Channels that run the same way.
struct Side {
  int64_t begin, end, shift;
};

template <class T>
struct Problem {
  int64_t batch, channels, length;
  Sequences<const T> x;
  const T *taps, *bias;  // (k, channels), (channels) or null
  Side sides[2];         // forwards, backwards

  int64_t stretches(int64_t steps) const { return (length + steps - 1) / steps; }
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

template <class T>
SK_INLINE Vec<T> silu(Vec<T> v) {
  return v / (splat<T>(1) + exp<T>(-v));
}
// The gradient before the activation of `v` from the one after it.
template <class T>
SK_INLINE Vec<T> through_silu(Vec<T> grad, Vec<T> v) {
  const Vec<T> one = splat<T>(1), s = one / (one + exp<T>(-v));
  return grad * s * fma(v, one - s, one);
}

// ---- lanes are channels -------------------------------------------------------------------------------------------

// One block of channels over one stretch of time.
template <class T, int kWidth>
struct Block {
  const Problem<T>& p;
  int64_t item, channel, shift;
  int count;  // channels, at most kLanes
  Vec<T> taps[kWidth], bias;

  Block(const Problem<T>& problem, int64_t item_, const Side& side, int64_t channel_)
      : p(problem), item(item_), channel(channel_), shift(side.shift),
        count(static_cast<int>(std::min<int64_t>(kLanes<T>, side.end - channel_))) {
    for (int j = 0; j < kWidth; ++j) taps[j] = get(p.taps + j * p.channels + channel);
    bias = p.bias ? get(p.bias + channel) : Vec<T>{};
  }
  SK_INLINE Vec<T> get(const T* from) const { return count == kLanes<T> ? load(from) : load_first(from, count); }
  SK_INLINE void put(T* to, Vec<T> v) const { count == kLanes<T> ? store(to, v) : store_first(to, v, count); }
  // A row of the sequence, 0 beyond its ends.
  SK_INLINE Vec<T> step(const Sequences<const T>& rows, int64_t t) const {
    return t >= 0 && t < p.length ? get(rows.at(item, channel, t)) : Vec<T>{};
  }
  // The window that only lacks its newest number, for the result of step t.
  Window<T, kWidth> before(int64_t t) const {
    Window<T, kWidth> x;
    for (int j = 0; j + 1 < kWidth; ++j) x.push(step(p.x, t + shift + j));
    return x;
  }
};

// f(task, item, first step, end, side, channel) for every task and block of its channels.
template <class T, class F>
void for_blocks(const Problem<T>& p, const F& f) {
  const int64_t stretches = p.stretches(kSteps), grain = kThreadWork / std::max<int64_t>(1, kSteps * p.channels) + 1;
  torch::stable::parallel_for(0, p.batch * stretches, grain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t begin = task % stretches * kSteps, end = std::min(begin + kSteps, p.length);
      for (const Side& side : p.sides)
        for (int64_t channel = side.begin; channel < side.end; channel += kLanes<T>)
          f(task, task / stretches, begin, end, side, channel);
    }
  });
}

template <class T, int kWidth, bool kSilu>
void forward_blocks(const Problem<T>& p, const Sequences<T>& y) {
  for_blocks(p, [&](int64_t, int64_t item, int64_t begin, int64_t end, const Side& side, int64_t channel) {
    const Block<T, kWidth> block(p, item, side, channel);
    Window<T, kWidth> x = block.before(begin);
    for (int64_t t = begin; t < end; ++t) {
      x.push(block.step(p.x, t + side.shift + kWidth - 1));
      const Vec<T> v = x.dot(block.taps, block.bias);
      block.put(y.at(item, channel, t), kSilu ? silu<T>(v) : v);
    }
  });
}

// `sums`: per task, of the taps and then of the bias.
template <class T, int kWidth, bool kSilu>
void backward_blocks(const Problem<T>& p, const Sequences<const T>& grad, const Sequences<T>& grad_x, T* sums) {
  for_blocks(p, [&](int64_t task, int64_t item, int64_t begin, int64_t end, const Side& side, int64_t channel) {
    const Block<T, kWidth> block(p, item, side, channel);
    Vec<T> reversed[kWidth], by_taps[kWidth]{}, by_bias{};
    for (int j = 0; j < kWidth; ++j) reversed[j] = block.taps[kWidth - 1 - j];
    // The gradient of step t takes G from t - shift - (k - 1) to t - shift.
    const int64_t first = begin - side.shift - (kWidth - 1);
    Window<T, kWidth> x = block.before(first), g;
    for (int64_t t = first; t < end - side.shift; ++t) {
      x.push(block.step(p.x, t + side.shift + kWidth - 1));
      Vec<T> here = block.step(grad, t);
      if constexpr (kSilu) here = through_silu<T>(here, x.dot(block.taps, block.bias));
      g.push(here);
      if (t >= begin && t < end) {  // each G is in the sums of one task
#pragma GCC unroll 4
        for (int j = 0; j < kWidth; ++j) by_taps[j] = fma(here, x.v[j], by_taps[j]);
        by_bias += here;
      }
      if (t + side.shift >= begin) block.put(grad_x.at(item, channel, t + side.shift), g.dot(reversed, Vec<T>{}));
    }
    T* to_sums = sums + task * (kWidth + 1) * p.channels + channel;
    for (int j = 0; j < kWidth; ++j) block.put(to_sums + j * p.channels, by_taps[j]);
    block.put(to_sums + kWidth * p.channels, by_bias);
  });
}

// ---- lanes are steps ----------------------------------------------------------------------------------------------

// A stretch of one channel, and room for a vector loaded at its last step.
template <class T, int kWidth>
struct Buffer {
  T v[kRowSteps + 2 * (kWidth - 1) + kLanes<T>];

  // `count` steps from `first` on, 0 beyond the ends of the sequence.
  void fill(const T* row, int64_t length, int64_t first, int64_t count) {
    const int64_t begin = std::clamp<int64_t>(-first, 0, count), end = std::clamp<int64_t>(length - first, begin, count);
    std::fill(v, v + begin, T(0));
    std::copy(row + first + begin, row + first + end, v + begin);
    std::fill(v + end, v + count + kLanes<T>, T(0));
  }
  SK_INLINE Vec<T> dot(int64_t at, const Vec<T>* taps, Vec<T> sum) const {
#pragma GCC unroll 4
    for (int j = 0; j < kWidth; ++j) sum = fma(taps[j], load(v + at + j), sum);
    return sum;
  }
};

// f(task, item, channel, shift, first step, number of steps, taps, bias) for every task.
template <int kWidth, class T, class F>
void for_rows(const Problem<T>& p, const F& f) {
  const int64_t stretches = p.stretches(kRowSteps);
  const int64_t grain = kThreadWork / std::clamp<int64_t>(p.length, 1, kRowSteps) + 1;
  torch::stable::parallel_for(0, p.batch * p.channels * stretches, grain, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t channel = task / stretches % p.channels, begin = task % stretches * kRowSteps;
      Vec<T> taps[kWidth];
      for (int j = 0; j < kWidth; ++j) taps[j] = splat<T>(p.taps[j * p.channels + channel]);
      f(task, task / stretches / p.channels, channel, p.sides[channel < p.sides[0].end ? 0 : 1].shift, begin,
        std::min(kRowSteps, p.length - begin), taps, p.bias ? splat<T>(p.bias[channel]) : Vec<T>{});
    }
  });
}

template <class T, int kWidth, bool kSilu>
void forward_rows(const Problem<T>& p, const Sequences<T>& y) {
  for_rows<kWidth>(p, [&](int64_t, int64_t item, int64_t channel, int64_t shift, int64_t begin, int64_t steps,
                          const Vec<T>* taps, Vec<T> bias) {
    Buffer<T, kWidth> x;
    x.fill(p.x.at(item, channel, 0), p.length, begin + shift, steps + kWidth - 1);
    T* to = y.at(item, channel, begin);
    for (int64_t t = 0; t < steps; t += kLanes<T>) {
      const Vec<T> v = x.dot(t, taps, bias);
      store_block(to + t, kSilu ? silu<T>(v) : v, 0, steps - t);
    }
  });
}

template <class T, int kWidth, bool kSilu>
void backward_rows(const Problem<T>& p, const Sequences<const T>& grad, const Sequences<T>& grad_x, T* sums) {
  for_rows<kWidth>(p, [&](int64_t task, int64_t item, int64_t channel, int64_t shift, int64_t begin, int64_t steps,
                          const Vec<T>* taps, Vec<T> bias) {
    Vec<T> reversed[kWidth], by_taps[kWidth]{}, by_bias{};
    for (int j = 0; j < kWidth; ++j) reversed[j] = taps[kWidth - 1 - j];
    // The gradient of step t takes G from t - shift - (k - 1) to t - shift.
    const int64_t first = begin - shift - (kWidth - 1), count = steps + kWidth - 1;
    Buffer<T, kWidth> x, g;
    x.fill(p.x.at(item, channel, 0), p.length, first + shift, count + kWidth - 1);
    g.fill(grad.at(item, channel, 0), p.length, first, count);
    if constexpr (kSilu)
      for (int64_t t = 0; t < count; t += kLanes<T>) store(g.v + t, through_silu<T>(load(g.v + t), x.dot(t, taps, bias)));
    T* to = grad_x.at(item, channel, begin);
    for (int64_t t = 0; t < steps; t += kLanes<T>) {
      store_block(to + t, g.dot(t, reversed, Vec<T>{}), 0, steps - t);
      const int64_t own = begin - first + t;  // each G is in the sums of one task
      const Vec<T> here = load_block(g.v + own, 0, steps - t);
#pragma GCC unroll 4
      for (int j = 0; j < kWidth; ++j) by_taps[j] = fma(here, load_block(x.v + own + j, 0, steps - t), by_taps[j]);
      by_bias += here;
    }
    const int64_t row = task / p.stretches(kRowSteps), stretch = task % p.stretches(kRowSteps);
    T* to_sums = sums + ((row / p.channels * p.stretches(kRowSteps) + stretch) * (kWidth + 1)) * p.channels + channel;
    for (int j = 0; j < kWidth; ++j) to_sums[j * p.channels] = horizontal_sum(by_taps[j]);
    to_sums[kWidth * p.channels] = horizontal_sum(by_bias);
  });
}

// ---- either -------------------------------------------------------------------------------------------------------

template <class T, int kWidth, bool kSilu>
void forward(const Problem<T>& p, const Sequences<T>& y) {
  p.x.channel == 1 ? forward_blocks<T, kWidth, kSilu>(p, y) : forward_rows<T, kWidth, kSilu>(p, y);
}

template <class T, int kWidth, bool kSilu>
void backward(const Problem<T>& p, const Sequences<const T>& grad, const Sequences<T>& grad_x, T* grad_taps, T* grad_bias) {
  const bool blocks = p.x.channel == 1;
  const int64_t size = (kWidth + 1) * p.channels, parts = p.batch * p.stretches(blocks ? kSteps : kRowSteps);
  std::vector<T> sums(parts * size);
  const auto run = blocks ? backward_blocks<T, kWidth, kSilu> : backward_rows<T, kWidth, kSilu>;
  run(p, grad, grad_x, sums.data());
  std::vector<double> totals(size);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t k = 0; k < size; ++k) totals[k] += sums[part * size + k];
  std::copy_n(totals.begin(), kWidth * p.channels, grad_taps);
  std::copy_n(totals.begin() + kWidth * p.channels, p.channels, grad_bias);
}

// ---- tensors ------------------------------------------------------------------------------------------------------

template <class T>
Sequences<const T> sequences(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}
template <class T>
Sequences<T> mutable_sequences(Tensor& t) {
  return {mutable_data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

template <class T>
Problem<T> problem(const Tensor& x, const Tensor& taps, const std::optional<Tensor>& bias, int64_t reverse_channels) {
  const int64_t channels = x.size(1), forwards = channels - reverse_channels;
  return {x.size(0),     channels,      x.size(2),
          sequences<T>(x), data<T>(taps), data<T>(bias),
          {{0, forwards, 1 - taps.size(0)}, {forwards, channels, 0}}};
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

void causal_conv1d_fwd(const Tensor x, const Tensor taps, const std::optional<Tensor> bias, bool silu,
                       int64_t reverse_channels, Tensor y) {
  for_dtype(x, [&]<class T>(T) {
    for_width(taps.size(0), silu, [&](auto width, auto activate) {
      forward<T, width.value, activate.value>(problem<T>(x, taps, bias, reverse_channels), mutable_sequences<T>(y));
    });
  });
}

void causal_conv1d_bwd(const Tensor grad, const Tensor x, const Tensor taps, const std::optional<Tensor> bias, bool silu,
                       int64_t reverse_channels, Tensor grad_x, Tensor grad_taps, Tensor grad_bias) {
  for_dtype(x, [&]<class T>(T) {
    for_width(taps.size(0), silu, [&](auto width, auto activate) {
      backward<T, width.value, activate.value>(problem<T>(x, taps, bias, reverse_channels), sequences<T>(grad),
                                               mutable_sequences<T>(grad_x), mutable_data<T>(grad_taps),
                                               mutable_data<T>(grad_bias));
    });
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor taps, Tensor? bias, bool silu, int reverse_channels, Tensor(a!) y) -> ()");
  m.def(
      "causal_conv1d_bwd(Tensor grad, Tensor x, Tensor taps, Tensor? bias, bool silu, int reverse_channels,"
      " Tensor(a!) grad_x, Tensor(b!) grad_taps, Tensor(c!) grad_bias) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&stablekern::causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&stablekern::causal_conv1d_bwd));
}
