// The Mamba-1 scan and its adjoint; the mathematics is in stablekern/ops/selective_scan.py.
//
// Channels are the lanes. Every state h[n] is a vector over channels, B_t[n] and C_t[n] are broadcast, so neither the
// recurrence nor the sums over states need a horizontal sum, and any number of states is as good as 16. Rows of
// (channels, time) are turned in registers as they come and go; step sizes, gate and skip are done on the way.
//
// Time goes in blocks of a few steps, and inside of those all blocks of lanes, so what they share (B and C) is brought
// into place once. Backward, per chunk and a group of blocks of lanes: for each tile of states, from the saved start on,
// recompute and keep states and decays, then sweep back. A few blocks go abreast and share each load and store of the
// sums over channels for dB and dC, which stay vectors until all blocks of lanes of the chunk have been added. Sizes are
// such that one tile's history, its sums and the group's rows stay in a first-level cache of 32 KB for 16 steps.
//
// One task is one batch item, group and slab of channels. The split depends on sizes alone and slabs are added in their
// order, so no result depends on the number of threads. Fused multiply-adds are written out as `fma` for the same reason.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
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

#if defined(SK_AVX512)
constexpr int kForwardTile = 8;   // states held in registers
constexpr int kBackwardTile = 4;  // with their sums for dA, of
constexpr int kAbreast = 2;       // this many blocks of lanes, which share the sums for dB and dC
#else
constexpr int kForwardTile = 8;
constexpr int kBackwardTile = 4;
constexpr int kAbreast = 1;
#endif
constexpr int64_t kGroup = 2;  // blocks of lanes that a tile of states passes before the next tile
constexpr int kBlockSteps = 16;           // of the forward pass
constexpr int64_t kThreadWork = 1 << 16;  // updates of a state, some 20 microseconds; less is done by one thread
constexpr int64_t kSumGrain = 1 << 14;    // sums of a few numbers, likewise
constexpr int64_t kTasks = 32;      // fewer batch items and groups than this are split into slabs of channels,
constexpr int kExtreme = 1 << 20;   // exponents from here on take the exponential that bounds its argument
constexpr int64_t kSlabBlocks = 4;  // of no less than this many blocks of lanes, which share the reductions of dB, dC

template <class T>
struct Problem {
  int64_t batch, channels, length, groups, states, chunk;
  bool softplus;
  const T *u, *delta, *A, *B, *C;
  const T *D, *z, *bias;      // or null
  const T *lower, *upper;     // (channels, states) or null

  int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

template <class T>
struct Slabs {
  int64_t group_channels, size, count;
  int64_t grain;  // tasks for which a thread is worth waking

  explicit Slabs(const Problem<T>& p) : group_channels(p.channels / p.groups) {
    const int64_t blocks = padded_to_lanes<T>(group_channels) / kLanes<T>, items = p.batch * p.groups;
    const int64_t wanted = std::clamp<int64_t>((kTasks + items - 1) / items, 1, (blocks + kSlabBlocks - 1) / kSlabBlocks);
    size = (blocks + wanted - 1) / wanted * kLanes<T>;
    count = (group_channels + size - 1) / size;
    grain = kThreadWork / std::max<int64_t>(1, p.length * size * (p.states + 1)) + 1;
  }
  int64_t blocks() const { return size / kLanes<T>; }
};

// Where a task works.
template <class T>
struct Place {
  int64_t item, group, slab;
  int64_t channel;  // first one, among all groups
  int64_t count;    // channels

  Place(const Problem<T>& p, const Slabs<T>& slabs, int64_t task) {
    slab = task % slabs.count;
    group = task / slabs.count % p.groups;
    item = task / slabs.count / p.groups;
    channel = group * slabs.group_channels + slab * slabs.size;
    count = std::min(slabs.size, slabs.group_channels - slab * slabs.size);
  }
  int64_t blocks() const { return padded_to_lanes<T>(count) / kLanes<T>; }
  int64_t in_block(int64_t block) const { return std::min<int64_t>(kLanes<T>, count - block * kLanes<T>); }
};

// Calls f(tile size as a constant, first state) until all states are covered.
template <int kTile, class F>
SK_INLINE void for_tiles(int64_t states, const F& f) {
  int64_t first = 0;
  for (; first + kTile <= states; first += kTile) f(std::integral_constant<int, kTile>{}, first);
  if constexpr (kTile > 4)
    if (states - first >= 4) f(std::integral_constant<int, 4>{}, first), first += 4;
  if (states - first >= 2) f(std::integral_constant<int, 2>{}, first), first += 2;
  if (states - first >= 1) f(std::integral_constant<int, 1>{}, first);
}

// Between rows (channels, states) in memory and vectors [blocks][states].
template <class T>
void states_in(const T* outside, int64_t count, int64_t states, Vec<T>* inside) {
  T* lanes = reinterpret_cast<T*>(inside);
  std::fill(lanes, lanes + padded_to_lanes<T>(count) * states, T(0));
  if (outside)
    for (int64_t c = 0; c < count; ++c) {
      T* to = lanes + c / kLanes<T> * kLanes<T> * states + c % kLanes<T>;
      for (int64_t i = 0; i < states; ++i) to[i * kLanes<T>] = outside[c * states + i];
    }
}
template <class T>
void states_out(const Vec<T>* inside, int64_t count, int64_t states, T* outside) {
  const T* lanes = reinterpret_cast<const T*>(inside);
  for (int64_t c = 0; c < count; ++c) {
    const T* from = lanes + c / kLanes<T> * kLanes<T> * states + c % kLanes<T>;
    for (int64_t i = 0; i < states; ++i) outside[c * states + i] = from[i * kLanes<T>];
  }
}

template <class T>
void split_rates(const Vec<T>* rate, int64_t count, Vec<T>* high, Vec<T>* low) {
  for (int64_t k = 0; k < count; ++k) {
    const Exponent<T> exponent(rate[k]);
    high[k] = exponent.high, low[k] = exponent.low;
  }
}

// B and C of one block of steps, as rows of states.
template <class T>
struct Projections {
  int64_t stride;  // states, padded
  T *enter, *leave;

  void fill(const Problem<T>& p, const Place<T>& at, int64_t start, int64_t steps) const {
    const int64_t first = (at.item * p.groups + at.group) * p.states;
    for (int64_t i = 0; i < p.states; i += kLanes<T>) {
      const int64_t rows = std::min<int64_t>(kLanes<T>, p.states - i);
      turn(p.B + (first + i) * p.length + start, p.length, rows, steps, enter + i);
      turn(p.C + (first + i) * p.length + start, p.length, rows, steps, leave + i);
    }
  }

 private:
  void turn(const T* from, int64_t length, int64_t rows, int64_t steps, T* to) const {
    for (int64_t t = 0; t < steps; t += kLanes<T>) {
      Vec<T> turned[kLanes<T>];
      const int64_t here = std::min<int64_t>(kLanes<T>, steps - t);
      load_turned(from + t, length, rows, here, kLanes<T>, turned);
      for (int64_t k = 0; k < here; ++k) store(to + (t + k) * stride, turned[k]);
    }
  }
};

// One block of lanes, or several abreast, over one block of steps: what all tiles of states share.
template <class T>
struct Strip {
  int64_t steps;
  int64_t states, row;              // from one block of lanes to the next: in what has states, in what has steps
  int64_t lanes;                    // that are channels
  const Vec<T> *rate, *lower, *upper;  // [states]
  const Vec<T> *high, *low;         // [states], the rates as `Exponent`
  Vec<T>* step;                     // [steps]
  Vec<T>* token;                    // [steps], step u
  const T *enter, *leave;           // B and C of the first step
  int64_t stride;                   // from one step to the next in B and C
};

template <class T>
SK_INLINE Vec<T> sigmoid(Vec<T> x) {
  // 1 / (1 + e^-x) with an exponential that cannot overflow.
  const Vec<T> e = exp<T>(-abs(x)), one = splat<T>(1);
  return select(less(x, Vec<T>{}), e, one) / (one + e);
}

// Step sizes and tokens of a strip; `slope`, unless null, becomes the derivative of the steps. u is left in `u`. True if
// no exponent is extreme (or NaN).
template <class T>
SK_NOINLINE bool prepare(const Problem<T>& p, const Strip<T>& s, int64_t channel, int64_t offset, int64_t ahead, Vec<T>* u,
                         Vec<T>* slope) {
  load_turned(p.u + offset, p.length, s.lanes, s.steps, ahead, u);
  load_turned(p.delta + offset, p.length, s.lanes, s.steps, ahead, s.step);
  Vec<T> most_step{}, most_rate{};
  for (int64_t i = 0; i < p.states; ++i) most_rate = max(most_rate, abs(s.rate[i]));
  const Vec<T> bias = p.bias ? load_first(p.bias + channel, static_cast<int>(s.lanes)) : Vec<T>{};
  for (int64_t t = 0; t < s.steps; ++t) {
    Vec<T> step = s.step[t] + bias;
    if (p.softplus) {
      const Vec<T> e = exp<T>(-abs(step));
      if (slope) slope[t] = select(less(step, Vec<T>{}), e, splat<T>(1)) / (splat<T>(1) + e);
      step = max(Vec<T>{}, step) + log1p_unit<T>(e);  // NaN, the second operand, passes
    }
    s.step[t] = step;
    s.token[t] = step * u[t];
    most_step = max(most_step, abs(step));
  }
  return !any(!less(most_step * most_rate, splat<T>(kExtreme)));
}

// e^(step A) of one state.
template <bool kTame, class T>
SK_INLINE Vec<T> decay_of(const Strip<T>& s, Vec<T> step, int64_t state) {
#if defined(SK_AVX512)
  if constexpr (kTame && sizeof(T) == 4) return exp_of_product(step, s.high[state], s.low[state]);
#endif
  return exp<T>(step * s.rate[state]);
}

template <class T, bool kClamp>
SK_INLINE Vec<T> advance(const Strip<T>& s, int64_t state, Vec<T> h, Vec<T> decay, Vec<T> entering, Mask<T>* inside) {
  h = fma(decay, h, entering);
  if constexpr (kClamp) {
    const Vec<T> clamped = min(s.upper[state], max(s.lower[state], h));  // NaN, the second operand, passes
    if (inside) *inside = equal(clamped, h);                              // lower <= h <= upper
    h = clamped;
  }
  return h;
}

// ---- forward ------------------------------------------------------------------------------------------------------

// Tile of N states: `state` goes on by the strip's steps, y += h C.
template <class T, bool kClamp, bool kTame, int N>
SK_NOINLINE void forward_tile(const Strip<T>& s, int64_t first, Vec<T>* state, Vec<T>* y) {
  Vec<T> h[N];
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) h[i] = state[first + i];
  for (int64_t t = 0; t < s.steps; ++t) {
    const T *enter = s.enter + t * s.stride + first, *leave = s.leave + t * s.stride + first;
    const Vec<T> step = s.step[t], token = s.token[t];
    Vec<T> sum = y[t];
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const Vec<T> decay = decay_of<kTame>(s, step, first + i);
      h[i] = advance<T, kClamp>(s, first + i, h[i], decay, token * splat(enter[i]), nullptr);
      sum = fma(h[i], splat(leave[i]), sum);
    }
    y[t] = sum;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) state[first + i] = h[i];
}

template <class T, bool kClamp>
void forward(const Problem<T>& p, const T* initial_state, T* y, T* last_state, T* chunk_states) {
  const Slabs<T> slabs(p);
  torch::stable::parallel_for(0, p.batch * p.groups * slabs.count, slabs.grain, [&](int64_t begin, int64_t end) {
    const int64_t block_steps = std::min<int64_t>(kBlockSteps, p.chunk), padded = padded_to_lanes<T>(block_steps);
    const int64_t stride = padded_to_lanes<T>(p.states), all_states = p.states * slabs.blocks();
    Vec<T> *state, *rate, *high, *low, *lower = nullptr, *upper = nullptr, *step, *token, *u, *out;
    T *enter, *leave;
    Arena arena;
    const auto each = [&](const auto& visit) {
      visit(state, all_states);
      for (auto* rates : {&rate, &high, &low}) visit(*rates, all_states);
      if (kClamp) visit(lower, all_states), visit(upper, all_states);
      for (auto* row : {&step, &token, &u, &out}) visit(*row, padded);
      visit(enter, block_steps * stride);
      visit(leave, block_steps * stride);
    };
    each([&]<class V>(V*&, int64_t count) { arena.reserve<V>(count); });
    arena.allocate();
    each([&]<class V>(V*& pointer, int64_t count) { pointer = arena.take<V>(count); });
    const Projections<T> projections{stride, enter, leave};
    for (int64_t task = begin; task < end; ++task) {
      const Place<T> at(p, slabs, task);
      const int64_t boundary = (at.item * p.channels + at.channel) * p.states;
      states_in(initial_state ? initial_state + boundary : nullptr, at.count, p.states, state);
      states_in(p.A + at.channel * p.states, at.count, p.states, rate);
      split_rates<T>(rate, at.blocks() * p.states, high, low);
      if (kClamp) {
        states_in(p.lower + at.channel * p.states, at.count, p.states, lower);
        states_in(p.upper + at.channel * p.states, at.count, p.states, upper);
      }
      for (int64_t start = 0, steps; start < p.length; start += steps) {
        steps = std::min({block_steps, p.length - start, p.chunk - start % p.chunk});
        projections.fill(p, at, start, steps);
        for (int64_t b = 0; b < at.blocks(); ++b) {
          const int64_t here = b * p.states, channel = at.channel + b * kLanes<T>, lanes = at.in_block(b);
          const int64_t offset = (at.item * p.channels + channel) * p.length + start;
          const Strip<T> s{steps,       p.states,   padded, lanes, rate + here, lower + here, upper + here,
                           high + here, low + here, step, token, enter, leave, stride};
          if (start % p.chunk == 0) {
            T* save = chunk_states + (at.item * p.chunks() + start / p.chunk) * p.states * p.channels + channel;
            for (int64_t i = 0; i < p.states; ++i) store_block(save + i * p.channels, state[here + i], 0, lanes);
          }
          const bool tame = prepare(p, s, channel, offset, kBlockSteps, u, static_cast<Vec<T>*>(nullptr));
          const Vec<T> skip = p.D ? load_first(p.D + channel, static_cast<int>(lanes)) : Vec<T>{};
          for (int64_t t = 0; t < steps; ++t) out[t] = p.D ? skip * u[t] : Vec<T>{};
          if (tame)
            for_tiles<kForwardTile>(p.states, [&](auto size, int64_t first) {
              forward_tile<T, kClamp, true, decltype(size)::value>(s, first, state + here, out);
            });
          else
            for (int64_t i = 0; i < p.states; ++i) forward_tile<T, kClamp, false, 1>(s, i, state + here, out);
          if (p.z) {
            load_turned(p.z + offset, p.length, lanes, steps, kBlockSteps, u);
            for (int64_t t = 0; t < steps; ++t) out[t] *= u[t] * sigmoid<T>(u[t]);
          }
          store_turned(out, lanes, steps, kBlockSteps, y + offset, p.length);
        }
      }
      states_out(state, at.count, p.states, last_state + boundary);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------------------------

// What the way back needs of a step: the state before it, and the decay. Side by side, so that no two streams of stores
// run a multiple of 4096 bytes apart, which costs as much as the arithmetic.
template <class T>
struct Past {
  Vec<T> state, decay;
};

template <class T>
struct Scratch {
  Vec<T> *rate, *high, *low;           // [blocks][states]
  Vec<T> *lower, *upper;               // [blocks][states]
  Vec<T> *carry, *grad_rate;           // [blocks][states]
  Vec<T> *grad_skip, *grad_bias;       // [blocks]
  Vec<T> *u, *step, *token, *slope;    // [kGroup][steps]
  Vec<T> *grad_y, *grad_out, *z;       // [kGroup][steps]: before the gate, behind it, the gate
  Vec<T> *y, *by_token, *by_decay;     // [kGroup][steps]: sums over states of h C, G B, and a G h A
  Past<T>* past;                       // [steps][tile][kAbreast], of one tile of states
  Mask<T>* inside;                     // [steps][tile][kAbreast]
  Vec<T> *grad_enter, *grad_leave;     // [states][steps], to be summed over lanes
  Vec<T> *rest_enter, *rest_leave;     // the same of a last, incomplete block
  T *enter, *leave;                    // [steps][states]
  int64_t padded;                      // steps

  template <class Visit>
  void each(int64_t steps, int64_t states, int64_t blocks, bool clamped, const Visit& visit) {
    padded = padded_to_lanes<T>(steps);
    for (auto* all : {&rate, &high, &low, &carry, &grad_rate}) visit(*all, blocks * states);
    if (clamped) visit(lower, blocks * states), visit(upper, blocks * states), visit(inside, steps * kBackwardTile * kAbreast);
    visit(grad_skip, blocks), visit(grad_bias, blocks);
    for (auto* row : rows()) visit(*row, kGroup * padded);
    visit(past, steps * kBackwardTile * kAbreast);
    for (auto* sum : {&grad_enter, &grad_leave, &rest_enter, &rest_leave}) visit(*sum, padded * states);
    visit(enter, steps * padded_to_lanes<T>(states)), visit(leave, steps * padded_to_lanes<T>(states));
  }
  std::array<Vec<T>**, 10> rows() {
    return {&u, &step, &token, &slope, &grad_y, &grad_out, &z, &y, &by_token, &by_decay};
  }
  // As that block of a group sees it, the first one of which is block `first` of the slab.
  Scratch of(int64_t first, int64_t block) const {
    Scratch one = *this;
    for (auto* row : one.rows()) *row += block * padded;
    one.grad_skip += first + block, one.grad_bias += first + block;
    return one;
  }
};

// The states of a tile, of W blocks abreast, from the chunk's start on, and sums of grad_y h and, with a gate, of h C.
template <class T, bool kClamp, bool kGate, bool kTame, int N, int W>
SK_NOINLINE void recompute_tile(const Strip<T>& s, const Scratch<T>& z, int64_t block, int64_t first, const T* saved,
                                int64_t channels, Vec<T>* grad_leave) {
  const int64_t rows = block * s.row;
  Vec<T> h[N][W];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const T* from = saved + (first + i) * channels + w * kLanes<T>;
      h[i][w] = load_block(from, 0, s.lanes);
      __builtin_prefetch(from - s.states * channels, 0, 2);  // of the chunk that comes next
    }
  for (int64_t t = 0; t < s.steps; ++t) {
    const T *enter = s.enter + t * s.stride + first, *leave = s.leave + t * s.stride + first;
    Vec<T> step[W], token[W], grad_y[W], y[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const int64_t at = rows + w * s.row + t;
      step[w] = s.step[at], token[w] = s.token[at], grad_y[w] = z.grad_y[at];
      if constexpr (kGate) y[w] = z.y[at];
    }
    Past<T>* past = z.past + t * N * W;
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      Vec<T>& total = grad_leave[(first + i) * z.padded + t];
      Vec<T> sum = total;
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        const int64_t state = (block + w) * s.states + first + i;
        const Vec<T> decay = decay_of<kTame>(s, step[w], state);
        Mask<T>* inside = kClamp ? z.inside + (t * N + i) * W + w : nullptr;
        past[i * W + w] = {h[i][w], decay};
        h[i][w] = advance<T, kClamp>(s, state, h[i][w], decay, token[w] * splat(enter[i]), inside);
        sum = fma(grad_y[w], h[i][w], sum);
        if constexpr (kGate) y[w] = fma(h[i][w], splat(leave[i]), y[w]);
      }
      total = sum;
    }
    if constexpr (kGate)
      for (int w = 0; w < W; ++w) z.y[rows + w * s.row + t] = y[w];
  }
}

// The sweep back over the steps of a chunk.
template <class T, bool kClamp, int N, int W>
SK_NOINLINE void adjoint_tile(const Strip<T>& s, const Scratch<T>& z, int64_t block, int64_t first, Vec<T>* carry,
                              Vec<T>* grad_rate, Vec<T>* grad_enter) {
  const int64_t rows = block * s.row;
  Vec<T> r[N][W], by_rate[N][W];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) r[i][w] = carry[(block + w) * s.states + first + i], by_rate[i][w] = Vec<T>{};
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    const T *enter = s.enter + t * s.stride + first, *leave = s.leave + t * s.stride + first;
    const Past<T>* past = z.past + t * N * W;
    Vec<T> step[W], token[W], grad_y[W], by_token[W], by_decay[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const int64_t at = rows + w * s.row + t;
      step[w] = s.step[at], token[w] = s.token[at], grad_y[w] = z.grad_y[at];
      by_token[w] = z.by_token[at], by_decay[w] = z.by_decay[at];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      Vec<T>& total = grad_enter[(first + i) * z.padded + t];
      Vec<T> sum = total;
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        Vec<T> grad = fma(grad_y[w], splat(leave[i]), r[i][w]);
        if constexpr (kClamp) grad = select(z.inside[(t * N + i) * W + w], grad, Vec<T>{});
        sum = fma(grad, token[w], sum);
        by_token[w] = fma(grad, splat(enter[i]), by_token[w]);
        r[i][w] = past[i * W + w].decay * grad;
        const Vec<T> by_exponent = r[i][w] * past[i * W + w].state;
        by_rate[i][w] = fma(by_exponent, step[w], by_rate[i][w]);
        by_decay[w] = fma(by_exponent, s.rate[(block + w) * s.states + first + i], by_decay[w]);
      }
      total = sum;
    }
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const int64_t at = rows + w * s.row + t;
      z.by_token[at] = by_token[w], z.by_decay[at] = by_decay[w];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const int64_t state = (block + w) * s.states + first + i;
      carry[state] = r[i][w], grad_rate[state] += by_rate[i][w];
    }
}

template <class T>
struct Gradients {
  T *u, *delta, *A, *B, *C, *D, *z, *bias, *initial_state;
};

// Rows of one block of lanes before its states, `s` and `z` being that block's. False if an exponent is extreme.
template <class T, bool kGate>
bool backward_rows(const Problem<T>& p, const Strip<T>& s, const Scratch<T>& z, int64_t channel, int64_t offset,
                   const T* grad_out) {
  const int64_t ahead = -p.chunk;
  const bool tame = prepare(p, s, channel, offset, ahead, z.u, z.slope);
  load_turned(grad_out + offset, p.length, s.lanes, s.steps, ahead, z.grad_y);
  if constexpr (kGate) {
    const Vec<T> skip = p.D ? load_first(p.D + channel, static_cast<int>(s.lanes)) : Vec<T>{};
    load_turned(p.z + offset, p.length, s.lanes, s.steps, ahead, z.z);
    for (int64_t t = 0; t < s.steps; ++t) {
      z.grad_out[t] = z.grad_y[t];
      z.grad_y[t] *= z.z[t] * sigmoid<T>(z.z[t]);
      z.y[t] = skip * z.u[t];
    }
  }
  std::fill_n(z.by_token, s.steps, Vec<T>{});
  std::fill_n(z.by_decay, s.steps, Vec<T>{});
  return tame;
}

// And behind them: the gradients of the rows.
template <class T, bool kGate>
void row_gradients(const Problem<T>& p, const Strip<T>& s, const Scratch<T>& z, int64_t channel, int64_t offset,
                   const Gradients<T>& out) {
  const int64_t ahead = -p.chunk;
  const Vec<T> skip = p.D ? load_first(p.D + channel, static_cast<int>(s.lanes)) : Vec<T>{};
  Vec<T> by_skip{}, by_bias{};
  for (int64_t t = 0; t < s.steps; ++t) {
    const Vec<T> grad_y = z.grad_y[t], u = z.u[t], by_token = z.by_token[t];
    Vec<T> grad_u = s.step[t] * by_token;
    if (p.D) grad_u = fma(skip, grad_y, grad_u);
    Vec<T> grad_delta = fma(u, by_token, z.by_decay[t]);
    if (p.softplus) grad_delta *= z.slope[t];
    by_skip = fma(grad_y, u, by_skip);
    by_bias += grad_delta;
    if constexpr (kGate) {
      const Vec<T> x = z.z[t], open = sigmoid<T>(x), one = splat<T>(1);
      z.y[t] *= z.grad_out[t] * (open * fma(x, one - open, one));
    }
    z.by_token[t] = grad_u, z.by_decay[t] = grad_delta;
  }
  *z.grad_skip += by_skip, *z.grad_bias += by_bias;
  store_turned(z.by_token, s.lanes, s.steps, ahead, out.u + offset, p.length);
  store_turned(z.by_decay, s.lanes, s.steps, ahead, out.delta + offset, p.length);
  if constexpr (kGate) store_turned(z.y, s.lanes, s.steps, ahead, out.z + offset, p.length);
}

// sums += rest, without the lanes of `rest` that are no channels.
template <class T>
void add_rest(const Vec<T>* rest, int64_t lanes, int64_t count, Vec<T>* sums) {
  IVec<T> lane;
  for (int k = 0; k < kLanes<T>; ++k) lane[k] = static_cast<typename VecTypes<T>::integer>(lanes - k);
  const Mask<T> channel = greater_than<T>(lane, 0);
  for (int64_t k = 0; k < count; ++k) sums[k] += select(channel, rest[k], Vec<T>{});
}

// Up to kGroup blocks of lanes over one chunk, tile after tile of states.
template <class T, bool kClamp, bool kGate>
void backward_group(const Problem<T>& p, const Place<T>& at, const Projections<T>& shared, const Scratch<T>& z,
                    int64_t first_block, int64_t start, int64_t steps, const T* grad_out, const T* chunk_states,
                    const Gradients<T>& out) {
  const int64_t blocks = std::min(kGroup, at.blocks() - first_block), here = first_block * p.states;
  const int64_t first_channel = at.channel + first_block * kLanes<T>;
  const int64_t whole = std::min(blocks, (at.count - first_block * kLanes<T>) / kLanes<T>);
  const auto strip = [&](int64_t block, int64_t lanes) {
    const int64_t own = here + block * p.states, row = block * z.padded;
    return Strip<T>{steps,        p.states,    z.padded,     lanes,          z.rate + own,  z.lower + own, z.upper + own,
                    z.high + own, z.low + own, z.step + row, z.token + row, shared.enter, shared.leave, shared.stride};
  };
  const auto each_block = [&](const auto& visit) {
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t channel = first_channel + b * kLanes<T>;
      const int64_t offset = (at.item * p.channels + channel) * p.length + start;
      visit(strip(b, at.in_block(first_block + b)), z.of(first_block, b), channel, offset);
    }
  };
  bool tame = true;
  each_block([&](const Strip<T>& s, const Scratch<T>& own, int64_t channel, int64_t offset) {
    tame &= backward_rows<T, kGate>(p, s, own, channel, offset, grad_out);
  });
  const T* saved = chunk_states + (at.item * p.chunks() + start / p.chunk) * p.states * p.channels + first_channel;
  Vec<T>*carry = z.carry + here, *grad_rate = z.grad_rate + here;
  const auto tile = [&]<bool kTame, int N, int W>(int64_t first, int64_t b) {
    const bool rest = b >= whole;
    const Strip<T> s = strip(0, rest ? at.in_block(first_block + b) : kLanes<T>);
    recompute_tile<T, kClamp, kGate, kTame, N, W>(s, z, b, first, saved + b * kLanes<T>, p.channels,
                                                  rest ? z.rest_leave : z.grad_leave);
    adjoint_tile<T, kClamp, N, W>(s, z, b, first, carry, grad_rate, rest ? z.rest_enter : z.grad_enter);
  };
  const auto tiles = [&]<bool kTame, int N>(int64_t first) {
    int64_t b = 0;
    if constexpr (kTame)
      for (; b + kAbreast <= whole; b += kAbreast) tile.template operator()<true, N, kAbreast>(first, b);
    for (; b < blocks; ++b) tile.template operator()<kTame, N, 1>(first, b);
  };
  if (tame)
    for_tiles<kBackwardTile>(p.states, [&](auto size, int64_t first) {
      tiles.template operator()<true, decltype(size)::value>(first);
    });
  else
    for (int64_t i = 0; i < p.states; ++i) tiles.template operator()<false, 1>(i);
  each_block([&](const Strip<T>& s, const Scratch<T>& own, int64_t channel, int64_t offset) {
    row_gradients<T, kGate>(p, s, own, channel, offset, out);
  });
  if (whole < blocks) {
    const int64_t lanes = at.in_block(first_block + whole);
    add_rest<T>(z.rest_enter, lanes, z.padded * p.states, z.grad_enter);
    add_rest<T>(z.rest_leave, lanes, z.padded * p.states, z.grad_leave);
  }
}

template <class T, bool kClamp, bool kGate>
void backward(const Problem<T>& p, const T* grad_out, const T* grad_last_state, const T* chunk_states,
              const Gradients<T>& out) {
  const Slabs<T> slabs(p);
  const int64_t projections = p.batch * p.groups * p.states * p.length, all_states = p.channels * p.states;
  // With one slab dB and dC are complete as they are; with more, the slabs' parts wait here to be added in order.
  std::vector<T> parts(slabs.count > 1 ? 2 * slabs.count * projections : 0);
  std::vector<T> rates(p.batch * all_states), skips(p.batch * p.channels), biases(p.batch * p.channels);

  torch::stable::parallel_for(0, p.batch * p.groups * slabs.count, slabs.grain, [&](int64_t begin, int64_t end) {
    const int64_t most = std::min(p.chunk, p.length), stride = padded_to_lanes<T>(p.states);
    Scratch<T> z{};
    Arena arena;
    z.each(most, p.states, slabs.blocks(), kClamp, [&]<class V>(V*&, int64_t count) { arena.reserve<V>(count); });
    arena.allocate();
    z.each(most, p.states, slabs.blocks(), kClamp, [&]<class V>(V*& at, int64_t count) { at = arena.take<V>(count); });
    const Projections<T> shared{stride, z.enter, z.leave};
    const Vec<T> zero{};
    for (int64_t task = begin; task < end; ++task) {
      const Place<T> at(p, slabs, task);
      const int64_t boundary = (at.item * p.channels + at.channel) * p.states, own = at.channel * p.states;
      T* grad_B = slabs.count > 1 ? parts.data() + 2 * at.slab * projections : out.B;
      T* grad_C = slabs.count > 1 ? grad_B + projections : out.C;
      states_in(grad_last_state ? grad_last_state + boundary : nullptr, at.count, p.states, z.carry);
      states_in(p.A + own, at.count, p.states, z.rate);
      split_rates<T>(z.rate, at.blocks() * p.states, z.high, z.low);
      if (kClamp) states_in(p.lower + own, at.count, p.states, z.lower), states_in(p.upper + own, at.count, p.states, z.upper);
      std::fill_n(z.grad_rate, at.blocks() * p.states, zero);
      std::fill_n(z.grad_skip, at.blocks(), zero);
      std::fill_n(z.grad_bias, at.blocks(), zero);
      for (int64_t start = (p.chunks() - 1) * p.chunk; start >= 0; start -= p.chunk) {
        const int64_t steps = std::min(p.chunk, p.length - start);
        shared.fill(p, at, start, steps);
        for (auto* sums : {z.grad_enter, z.grad_leave}) std::fill_n(sums, z.padded * p.states, zero);
        if (at.count % kLanes<T>)
          for (auto* sums : {z.rest_enter, z.rest_leave}) std::fill_n(sums, z.padded * p.states, zero);
        for (int64_t first = 0; first < at.blocks(); first += kGroup)
          backward_group<T, kClamp, kGate>(p, at, shared, z, first, start, steps, grad_out, chunk_states, out);
        const int64_t to = (at.item * p.groups + at.group) * p.states * p.length + start;
        for (int64_t i = 0; i < p.states; ++i)
          for (int64_t t = 0; t < steps; t += kLanes<T>) {
            const int64_t from = i * z.padded + t, into = to + i * p.length + t;
            store_block(grad_B + into, horizontal_sums<T>(z.grad_enter + from), 0, steps - t);
            store_block(grad_C + into, horizontal_sums<T>(z.grad_leave + from), 0, steps - t);
          }
      }
      states_out(z.carry, at.count, p.states, out.initial_state + boundary);
      states_out(z.grad_rate, at.count, p.states, rates.data() + boundary);
      const int64_t first = at.item * p.channels + at.channel;
      states_out(z.grad_skip, at.count, 1, skips.data() + first);
      states_out(z.grad_bias, at.count, 1, biases.data() + first);
    }
  });

  const auto over_batch = [&](const std::vector<T>& terms, int64_t size, T* to) {
    torch::stable::parallel_for(0, size, kSumGrain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        double sum = 0;
        for (int64_t item = 0; item < p.batch; ++item) sum += terms[item * size + k];
        to[k] = static_cast<T>(sum);
      }
    });
  };
  over_batch(rates, all_states, out.A);
  over_batch(skips, p.channels, out.D);
  over_batch(biases, p.channels, out.bias);
  if (slabs.count > 1)
    torch::stable::parallel_for(0, projections, kSumGrain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        T sum_B = 0, sum_C = 0;
        for (int64_t slab = 0; slab < slabs.count; ++slab) {
          sum_B += parts[2 * slab * projections + k];
          sum_C += parts[(2 * slab + 1) * projections + k];
        }
        out.B[k] = sum_B;
        out.C[k] = sum_C;
      }
    });
}

// ---- tensors ------------------------------------------------------------------------------------------------------

template <class T>
Problem<T> problem(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                   const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& lower, const std::optional<Tensor>& upper, bool softplus, int64_t chunk) {
  return {u.size(0),  u.size(1),  u.size(2),  B.size(1), A.size(1),  chunk,         softplus,      data<T>(u), data<T>(delta),
          data<T>(A), data<T>(B), data<T>(C), data<T>(D), data<T>(z), data<T>(bias), data<T>(lower), data<T>(upper)};
}

void selective_scan_fwd(const Tensor u, const Tensor delta, const Tensor A, const Tensor B, const Tensor C,
                        const std::optional<Tensor> D, const std::optional<Tensor> z, const std::optional<Tensor> bias,
                        const std::optional<Tensor> initial_state, const std::optional<Tensor> lower,
                        const std::optional<Tensor> upper, bool softplus, int64_t chunk, Tensor y, Tensor last_state,
                        Tensor chunk_states) {
  for_dtype(u, [&]<class T>(T) {
    const auto p = problem<T>(u, delta, A, B, C, D, z, bias, lower, upper, softplus, chunk);
    if (p.batch * p.channels == 0) return;
    const auto run = p.upper ? forward<T, true> : forward<T, false>;
    run(p, data<T>(initial_state), mutable_data<T>(y), mutable_data<T>(last_state), mutable_data<T>(chunk_states));
  });
}

void selective_scan_bwd(const Tensor grad_y, const std::optional<Tensor> grad_last_state, const Tensor u, const Tensor delta,
                        const Tensor A, const Tensor B, const Tensor C, const std::optional<Tensor> D,
                        const std::optional<Tensor> z, const std::optional<Tensor> bias, const std::optional<Tensor> lower,
                        const std::optional<Tensor> upper, const Tensor chunk_states, bool softplus, int64_t chunk,
                        Tensor grad_u, Tensor grad_delta, Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D,
                        Tensor grad_z, Tensor grad_bias, Tensor grad_initial_state) {
  for_dtype(u, [&]<class T>(T) {
    const auto p = problem<T>(u, delta, A, B, C, D, z, bias, lower, upper, softplus, chunk);
    if (p.batch * p.channels == 0) {
      for (Tensor* empty_sum : {&grad_A, &grad_B, &grad_C, &grad_D, &grad_bias})
        std::fill_n(mutable_data<T>(*empty_sum), empty_sum->numel(), T(0));
      return;
    }
    const auto run = p.upper ? (p.z ? backward<T, true, true> : backward<T, true, false>)
                             : (p.z ? backward<T, false, true> : backward<T, false, false>);
    run(p, data<T>(grad_y), data<T>(grad_last_state), data<T>(chunk_states),
        Gradients<T>{mutable_data<T>(grad_u), mutable_data<T>(grad_delta), mutable_data<T>(grad_A),
                     mutable_data<T>(grad_B), mutable_data<T>(grad_C), mutable_data<T>(grad_D), mutable_data<T>(grad_z),
                     mutable_data<T>(grad_bias), mutable_data<T>(grad_initial_state)});
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias,"
      " Tensor? initial_state, Tensor? lower, Tensor? upper, bool softplus, int chunk, Tensor(a!) y,"
      " Tensor(b!) last_state, Tensor(c!) chunk_states) -> ()");
  m.def(
      "selective_scan_bwd(Tensor grad_y, Tensor? grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,"
      " Tensor? D, Tensor? z, Tensor? bias, Tensor? lower, Tensor? upper, Tensor chunk_states, bool softplus, int chunk,"
      " Tensor(a!) grad_u, Tensor(b!) grad_delta, Tensor(c!) grad_A, Tensor(d!) grad_B, Tensor(e!) grad_C,"
      " Tensor(f!) grad_D, Tensor(g!) grad_z, Tensor(h!) grad_bias, Tensor(i!) grad_initial_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&stablekern::selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&stablekern::selective_scan_bwd));
}
