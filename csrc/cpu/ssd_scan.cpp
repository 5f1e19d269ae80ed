// The Mamba-2 scan and its adjoint; the mathematics is in stablekern/ops/ssd_scan.py.
//
// The channels (head, column of the head) of one batch item and group lie side by side in memory and share B and C, so
// they are the lanes: every state h[n] is a vector over channels, B_t[n] and C_t[n] are broadcast, and neither the
// forward recurrence nor its adjoint needs a horizontal sum. Up to kTile states times two blocks of lanes stay in
// registers over a block of steps; time goes in blocks so that what the tiles share stays in the cache.
//
// Backward, per chunk from its saved start state: recompute and keep the states of one tile, then sweep back. The sums
// over channels for dB and dC are kept as vectors until all blocks of lanes of the chunk have been added, and reduced once.
// Step sizes are made of dt where a block of steps begins, once per head; the gate acts on rows that are in the cache, and
// what it needs on the way back, y, is recomputed with the states.
//
// One task is one batch item, group and slab of channels. The split depends on sizes alone and slabs are added in their
// order, so no result depends on the number of threads. Fused multiply-adds are written out as `fma` for the same reason.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <optional>
#include <type_traits>
#include <vector>

#include "stablekern/caches.h"
#include "stablekern/clamp.h"
#include "stablekern/lanes.h"
#include "stablekern/simd.h"
#include "stablekern/tensor.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

#if defined(SK_AVX512)
constexpr int kTile = 8;  // states held in registers, for each of two blocks of lanes: 16 of 32 registers
#else
constexpr int kTile = 4;
#endif
constexpr int kBlockSteps = 32;  // of the forward pass
constexpr int64_t kThreadWork = 1 << 16;  // updates of a state, some 20 microseconds; less is done by one thread
constexpr int64_t kSumGrain = 1 << 14;    // sums of a few numbers, likewise
constexpr int64_t kTasks = 32;   // fewer batch items and groups than this are split into slabs of channels

template <class T>
struct Problem {
  int64_t batch, length, heads, width, groups, states, chunk;
  int64_t reverse_groups;  // so many groups, the last ones, begin with the last step in memory
  const T *x, *dt, *A, *B, *C;
  const T *D, *lower, *upper;  // (heads, width) or null
  const T *z, *bias;           // like x, (heads), or null
  bool softplus;
  T least, most;  // of a step

  int64_t channels() const { return heads * width; }
  int64_t chunks() const { return (length + chunk - 1) / chunk; }
};

// Channels of a group in slabs of whole heads and whole pairs of lane blocks.
template <class T>
struct Slabs {
  int64_t group_channels, size, count;
  int64_t grain;  // tasks for which a thread is worth waking

  explicit Slabs(const Problem<T>& p) : group_channels(p.channels() / p.groups) {
    const int64_t unit = std::lcm<int64_t>(2 * kLanes<T>, p.width);
    const int64_t units = (group_channels + unit - 1) / unit, items = p.batch * p.groups;
    const int64_t wanted = std::min(units, (kTasks + items - 1) / items);
    size = (units + wanted - 1) / wanted * unit;
    count = (group_channels + size - 1) / size;
    grain = kThreadWork / std::max<int64_t>(1, p.length * size * (p.states + 1)) + 1;
  }
};

// Where a task works.
template <class T>
struct Place {
  int64_t item, group, slab;
  int64_t channel;  // first one, among all heads
  int64_t count;    // channels
  int64_t head;     // first one
  int64_t heads;
  int64_t direction;  // from one step to the next, in steps of memory
  int64_t origin;     // where step 0 lies, in steps

  Place(const Problem<T>& p, const Slabs<T>& slabs, int64_t task) {
    slab = task % slabs.count;
    group = task / slabs.count % p.groups;
    item = task / slabs.count / p.groups;
    channel = group * slabs.group_channels + slab * slabs.size;
    count = std::min(slabs.size, slabs.group_channels - slab * slabs.size);
    head = channel / p.width;
    heads = count / p.width;
    direction = group < p.groups - p.reverse_groups ? 1 : -1;
    origin = item * p.length + (direction < 0 ? p.length - 1 : 0);
  }
  int64_t place(int64_t step) const { return origin + direction * step; }
  int64_t blocks() const { return (count + kLanes<T> - 1) / kLanes<T>; }
};

// Calls f(tile size as a constant, first state) until all states are covered.
template <class F>
SK_INLINE void for_tiles(int64_t states, const F& f) {
  int64_t first = 0;
  for (; first + kTile <= states; first += kTile) f(std::integral_constant<int, kTile>{}, first);
  if constexpr (kTile > 4)
    if (states - first >= 4) f(std::integral_constant<int, 4>{}, first), first += 4;
  if (states - first >= 2) f(std::integral_constant<int, 2>{}, first), first += 2;
  if (states - first >= 1) f(std::integral_constant<int, 1>{}, first);
}

// Steps and decays of the heads of a task, for one block of steps; rows are padded so that a vector may be loaded at
// any head.
template <class T>
struct HeadSteps {
  int64_t stride;
  T *step, *decay;
  T* slope;    // of the step, or null
  T* slowest;  // [heads], the largest decay, NaN if one is, or null

  static int64_t padded(int64_t heads) { return (heads + kLanes<T> - 1) / kLanes<T> * kLanes<T> + kLanes<T>; }

  // Lowers `smallest` to the least step, before it is limited.
  void fill(const Problem<T>& p, const Place<T>& at, int64_t start, int64_t steps, Vec<T>& smallest) const {
    const Vec<T> least = splat(p.least), most = splat(p.most), one = splat<T>(1);
    if (slowest) std::fill_n(slowest, stride, T(0));
    for (int64_t t = 0; t < steps; ++t) {
      const T* row = p.dt + at.place(start + t) * p.heads + at.head;
      for (int64_t head = 0; head < at.heads; head += kLanes<T>) {
        const int here = static_cast<int>(std::min<int64_t>(kLanes<T>, at.heads - head));
        Softplus<T> of{load_first(row + head, here), one};
        if (p.bias) of.value += load_first(p.bias + at.head + head, here);
        if (p.softplus) of = softplus<T>(of.value);
        smallest = min(of.value, smallest);
        const Vec<T> limited = min(most, max(least, of.value));  // NaN, the second operand, passes
        store(step + t * stride + head, limited);
        const Vec<T> decays = exp<T>(limited * load_first(p.A + at.head + head, here));
        store(decay + t * stride + head, decays);
        if (slowest) store(slowest + head, larger_modulus<T>(load(slowest + head), decays));
        if (slope)
          store(slope + t * stride + head, select(less(of.value, least) | less(most, of.value), Vec<T>{}, of.slope));
      }
    }
  }
};

// W blocks of lanes over one block of steps: what all tiles of states share.
template <class T, int W>
struct Strip {
  int64_t steps, count;  // count: channels, at most W * kLanes
  int64_t head;          // of the first lane of each block, within the task
  Vec<T>* decay;         // [steps][W]
  Vec<T>* token;         // [steps][W], dt x
  const T *enter, *leave;  // B and C of the first step
  int64_t stride;          // from one step to the next in B and C
  Bounds<T> bounds[W];
  Reach<T> reach[W];
  Vec<T> token_norm[W];
  Mask<T> exists;  // lanes that are channels, of the only block: two go together backwards where both are full
  IVec<T> to_head[W];  // lane -> head, from the block's first head on
  int64_t heads[W];

  // `channel` counts from the first of the task.
  Strip(const Problem<T>& p, const Place<T>& at, int64_t channel, int64_t start, int64_t block_steps, Vec<T>* decay_,
        Vec<T>* token_)
      : steps(block_steps), count(std::min<int64_t>(at.count - channel, W * kLanes<T>)), decay(decay_), token(token_) {
    const int64_t row = at.place(start) * p.groups + at.group;
    enter = p.B + row * p.states;
    leave = p.C + row * p.states;
    stride = at.direction * p.groups * p.states;
    const int64_t everywhere = at.channel + channel;
    Vec<T> lanes;
    for (int lane = 0; lane < kLanes<T>; ++lane) lanes[lane] = static_cast<T>(lane);
    exists = less(lanes, splat<T>(static_cast<T>(count)));
    for (int w = 0; w < W; ++w) {
      heads[w] = (channel + w * kLanes<T>) / p.width;
      int64_t head = 0, next = (heads[w] + 1) * p.width - channel - w * kLanes<T>;
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        if (lane == next) ++head, next += p.width;
        to_head[w][lane] = static_cast<typename VecTypes<T>::integer>(head);
      }
      if (p.lower) bounds[w].lower = load_block(p.lower + everywhere, w, count);
      if (p.upper) bounds[w].upper = load_block(p.upper + everywhere, w, count);
    }
  }

  SK_INLINE Vec<T> spread(const T* of_heads, int w) const { return permute<T>(load(of_heads + heads[w]), to_head[w]); }

  // x is the row of the first step, at the strip's first channel; `row` leads to the next step. For a clamp also how far
  // the bounds reach, and `token_norm`.
  template <bool kClamp>
  SK_INLINE void prepare(const HeadSteps<T>& per_head, const T* x, int64_t row) {
    Vec<T> squares[W] = {};
    for (int64_t t = 0; t < steps; ++t)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        const Vec<T> a = spread(per_head.decay + t * per_head.stride, w);
        const Vec<T> entering = spread(per_head.step + t * per_head.stride, w) * load_block(x + t * row, w, count);
        decay[t * W + w] = a, token[t * W + w] = entering;
        if constexpr (kClamp) squares[w] = fma(entering, entering, squares[w]);
      }
    if constexpr (kClamp)
      for (int w = 0; w < W; ++w) {
        token_norm[w] = norm_bound<T>(squares[w], steps);
        reach[w].include(bounds[w], less_equal(spread(per_head.slowest, w), splat<T>(1)));
        reach[w].leave_out_from(std::max<int64_t>(0, count - w * kLanes<T>));
      }
  }

  // What a clamp needs to do to a tile of N states from `state(state, block)` on.
  template <int N, class State>
  SK_INLINE Clamp needed(const T* norms, const State& state) const {
    Clamp most = Clamp::kNone;
    for (int w = 0; w < W; ++w)
      most = std::max(most, clamp_needed<N>(token_norm[w], largest_norm<N>(norms), [&](int i) { return state(i, w); }, reach[w]));
    return most;
  }
};

// The next state. With a clamp, `note` gets to know what the state was before and after it.
template <class T, int W, Clamp kClamp, class Note>
SK_INLINE Vec<T> advance(const Strip<T, W>& s, int w, Vec<T> h, Vec<T> decay, Vec<T> token, Vec<T> enter, const Note& note) {
  h = fma(decay, h, token * enter);
  const Vec<T> clamped = s.bounds[w].template apply<kClamp>(h);
  if constexpr (kClamp != Clamp::kNone) note(h, clamped);
  return clamped;
}

// Norms of B over a block of steps.
template <class T>
void enter_norms(const Problem<T>& p, const Place<T>& at, int64_t start, int64_t steps, T* norms) {
  const T* first = p.B + (at.place(start) * p.groups + at.group) * p.states;
  column_norms(first, at.direction * p.groups * p.states, p.states, steps, norms);
}

// ---- forward ------------------------------------------------------------------------------------------------------

// Where a strip goes on in the next block of steps, or null. It takes a line or two of each row, in which the machine sees
// no sequence; fetched a step at a time they come while there is something else to do.
template <class T>
struct Ahead {
  const T *x, *y;
};

// Tile of N states: `state` [states][blocks], y += h C, the start state to `save` unless null, and to `changed` [W] how
// many states the clamp changed, if that is counted.
template <class T, int W, Clamp kClamp, int N>
SK_NOINLINE void forward_tile(const Strip<T, W>& s, int64_t first, Vec<T>* state, int64_t blocks, T* save, int64_t save_row, T* y,
                  int64_t row, const Ahead<T>& ahead, Vec<T>* changed) {
  Vec<T> h[N][W], count[W] = {};
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) h[i][w] = state[(first + i) * blocks + w];
  if (save)
    for (int i = 0; i < N; ++i)
      for (int w = 0; w < W; ++w) store_block(save + (first + i) * save_row, state[(first + i) * blocks + w], w, s.count);
  for (int64_t t = 0; t < s.steps; ++t) {
    const T *enter = s.enter + t * s.stride + first, *leave = s.leave + t * s.stride + first;
    for (const T* rows : {ahead.x, ahead.y})
      if (rows) prefetch<W * kVectorBytes, 2>(rows + t * row, 0);
    Vec<T> sum[W], other[W], decay[W], token[W];  // copies: stores might alias what the strip points to
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      sum[w] = load_block(y + t * row, w, s.count);
      decay[w] = s.decay[t * W + w], token[w] = s.token[t * W + w];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<T> b = splat(enter[i]), c = splat(leave[i]);
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        h[i][w] = advance<T, W, kClamp>(s, w, h[i][w], decay[w], token[w], b, [&](Vec<T> free, Vec<T>) {
          if constexpr (kClamp == Clamp::kCount)
            count[w] += select(s.bounds[w].changes(free), splat<T>(1), Vec<T>{});
        });
        if (i % 2)
          other[w] = i == 1 ? h[i][w] * c : fma(h[i][w], c, other[w]);
        else
          sum[w] = fma(h[i][w], c, sum[w]);
      }
    }
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) store_block(y + t * row, N > 1 ? sum[w] + other[w] : sum[w], w, s.count);
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) state[(first + i) * blocks + w] = h[i][w];
  if constexpr (kClamp == Clamp::kCount)
    for (int w = 0; w < W; ++w) changed[w] += count[w];
}

template <class T, int W, Clamp kClamp>
void forward_strip(const Problem<T>& p, const Place<T>& at, const HeadSteps<T>& per_head, int64_t channel, int64_t start,
                   int64_t steps, Vec<T>* decay, Vec<T>* token, const T* norms, Vec<T>* state, T* y, T* chunk_states,
                   double* changed) {
  Strip<T, W> s(p, at, channel, start, steps, decay, token);
  const int64_t channels = p.channels(), row = at.direction * channels, everywhere = at.channel + channel;
  const int64_t offset = at.place(start) * channels + everywhere;
  s.template prepare<kClamp != Clamp::kNone>(per_head, p.x + offset, row);
  for (int w = 0; w < W; ++w) {
    const Vec<T> skip = p.D ? load_block(p.D + everywhere, w, s.count) : Vec<T>{};
    for (int64_t t = 0; t < steps; ++t)
      store_block(y + offset + t * row, p.D ? skip * load_block(p.x + offset + t * row, w, s.count) : Vec<T>{}, w, s.count);
  }
  Ahead<T> next{};
  if (start + 2 * steps <= p.length) next = {p.x + offset + steps * row, y + offset + steps * row};
  T* save = nullptr;
  if (start % p.chunk == 0) save = chunk_states + (at.item * p.chunks() + start / p.chunk) * p.states * channels + everywhere;
  Vec<T> count[W] = {};
  for_tiles(p.states, [&](auto size, int64_t first) {
    constexpr int N = decltype(size)::value;
    Clamp needed = kClamp;
    if constexpr (kClamp != Clamp::kNone)
      needed = s.template needed<N>(norms + first, [&](int i, int w) { return state[(first + i) * at.blocks() + w]; });
    with_clamp<kClamp>(needed, [&]<Clamp kDone>() {
      const Ahead<T> ahead = {first == 0 ? next.x : nullptr, first + N == p.states ? next.y : nullptr};
      forward_tile<T, W, kDone, N>(s, first, state, at.blocks(), save, channels, y + offset, row, ahead, count);
    });
  });
  if constexpr (kClamp == Clamp::kCount)
    for (int64_t c = 0; c < s.count; ++c) changed[channel + c] += count[c / kLanes<T>][c % kLanes<T>];
  if (p.z)
    for (int64_t t = 0; t < steps; ++t)
      for (int w = 0; w < W; ++w) {
        const Vec<T> gate = load_block(p.z + offset + t * row, w, s.count);
        store_block(y + offset + t * row, load_block(y + offset + t * row, w, s.count) * gate * sigmoid<T>(gate), w, s.count);
      }
}

// Between (channels, states) at `outside` and [states][blocks] of vectors.
template <class T>
void states_in(const T* outside, int64_t count, int64_t states, int64_t blocks, Vec<T>* state) {
  T* lanes = reinterpret_cast<T*>(state);
  std::fill(lanes, lanes + states * blocks * kLanes<T>, T(0));
  if (outside)
    for (int64_t c = 0; c < count; ++c)
      for (int64_t i = 0; i < states; ++i) lanes[i * blocks * kLanes<T> + c] = outside[c * states + i];
}
template <class T>
void states_out(const Vec<T>* state, int64_t count, int64_t states, int64_t blocks, T* outside) {
  const T* lanes = reinterpret_cast<const T*>(state);
  for (int64_t c = 0; c < count; ++c)
    for (int64_t i = 0; i < states; ++i) outside[c * states + i] = lanes[i * blocks * kLanes<T> + c];
}

// The least step, or 0, goes to `least_step`; if states that the clamp changed are counted, their share to `saturation`
// (batch, heads).
template <class T, Clamp kClamp>
void forward(const Problem<T>& p, const T* initial_state, T* y, T* last_state, T* chunk_states, T* least_step,
             T* saturation) {
  const Slabs<T> slabs(p);
  const int64_t tasks = p.batch * p.groups * slabs.count;
  std::vector<T> least_of(tasks);
  torch::stable::parallel_for(0, tasks, slabs.grain, [&](int64_t begin, int64_t end) {
    const int64_t block = std::min<int64_t>(kBlockSteps, p.chunk), per_head = HeadSteps<T>::padded(slabs.size / p.width);
    T *step, *head_decay, *slowest;
    Vec<T> *decay, *token, *state;
    T* norms;         // of B, over a block of steps
    double* changed;  // how often, per channel
    Arena arena;
    const auto each = [&](const auto& visit) {
      visit(step, block * per_head), visit(head_decay, block * per_head), visit(slowest, per_head);
      visit(decay, block * 2), visit(token, block * 2);
      visit(state, p.states * (slabs.size / kLanes<T>));
      visit(norms, padded_to_lanes<T>(p.states));
      visit(changed, slabs.size);
    };
    each([&]<class V>(V*&, int64_t count) { arena.reserve<V>(count); });
    arena.allocate();
    each([&]<class V>(V*& pointer, int64_t count) { pointer = arena.take<V>(count); });
    const HeadSteps<T> head_steps{per_head, step, head_decay, nullptr, kClamp == Clamp::kNone ? nullptr : slowest};
    for (int64_t task = begin; task < end; ++task) {
      const Place<T> at(p, slabs, task);
      const int64_t boundary = (at.item * p.channels() + at.channel) * p.states;
      states_in(initial_state ? initial_state + boundary : nullptr, at.count, p.states, at.blocks(), state);
      std::fill(changed, changed + slabs.size, 0.0);
      Vec<T> least{};
      for (int64_t start = 0, steps; start < p.length; start += steps) {
        steps = std::min({block, p.length - start, p.chunk - start % p.chunk});
        head_steps.fill(p, at, start, steps, least);
        if constexpr (kClamp != Clamp::kNone) enter_norms(p, at, start, steps, norms);
        for (int64_t b = 0; b < at.blocks(); b += 2) {
          const auto strip = b + 1 < at.blocks() ? forward_strip<T, 2, kClamp> : forward_strip<T, 1, kClamp>;
          strip(p, at, head_steps, b * kLanes<T>, start, steps, decay, token, norms, state + b, y, chunk_states, changed);
        }
      }
      states_out(state, at.count, p.states, at.blocks(), last_state + boundary);
      for (int k = 0; k < kLanes<T>; ++k) least_of[task] = std::min(least_of[task], least[k]);
      const double all = static_cast<double>(std::max<int64_t>(1, p.length * p.width * p.states));
      if constexpr (kClamp == Clamp::kCount)
        for (int64_t head = 0; head < at.heads; ++head)
          saturation[at.item * p.heads + at.head + head] =
              static_cast<T>(std::accumulate(changed + head * p.width, changed + (head + 1) * p.width, 0.0) / all);
    }
  });
  *least_step = T(0);
  for (const T least : least_of) *least_step = std::min(*least_step, least);
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
struct Scratch {
  HeadSteps<T> per_head;
  Vec<T> *decay, *token, *grad_y, *y;  // [steps][W]; y before the gate, if there is one
  Vec<T> *by_token, *by_decay;         // [steps][W]: G B, and sum over states of a G h
  Vec<T>* trail;                       // [steps + 1][tile][W], the states of one tile
  Mask<T>* inside;                     // [steps][tile][W]
  Vec<T> *grad_enter, *grad_leave;     // [steps][states], to be summed over lanes
  Vec<T>* carry;                       // [states][blocks]
  T* head_sums;                        // [heads][padded steps]
  double *rate, *skip;                 // [channels]: of A and of D, over all chunks
  double* bias;                        // [heads], likewise
  T* sums;                             // [steps * states, padded]
  Vec<T>* zeros;                       // [tile], where a sum begins
  T* norms;                            // [states] of B over the chunk

  static int64_t padded(int64_t count) { return padded_to_lanes<T>(count); }

  // Reserves in a dry run, takes in the second.
  template <class Visit>
  void each(int64_t steps, int64_t states, const Slabs<T>& slabs, int64_t width, const Visit& visit) {
    const int64_t heads = slabs.size / width;
    per_head.stride = HeadSteps<T>::padded(heads);
    for (auto* row : {&per_head.step, &per_head.decay, &per_head.slope}) visit(*row, steps * per_head.stride);
    visit(per_head.slowest, per_head.stride);
    for (auto* strip : {&decay, &token, &grad_y, &y, &by_token, &by_decay}) visit(*strip, padded(steps) * 2);
    visit(trail, (steps + 1) * kTile * 2);
    visit(inside, steps * kTile * 2);
    visit(grad_enter, padded(steps * states));
    visit(grad_leave, padded(steps * states));
    visit(carry, states * (slabs.size / kLanes<T>));
    visit(head_sums, heads * padded(steps));
    visit(rate, slabs.size);
    visit(skip, slabs.size);
    visit(bias, heads);
    visit(sums, padded(steps * states));
    visit(zeros, kTile);
    visit(norms, padded(states));
  }
};

// The states of a tile from the chunk's start on, sum of grad_y h and, with a gate, of h C.
template <class T, int W, Clamp kClamp, bool kGate, int N>
SK_NOINLINE void recompute_tile(const Strip<T, W>& s, const Scratch<T>& z, int64_t first, int64_t states, const T* saved, int64_t row,
                    bool fresh) {
  Vec<T> h[N][W];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) z.trail[i * W + w] = h[i][w] = load_block(saved + (first + i) * row, w, s.count);
  for (int64_t t = 0; t < s.steps; ++t) {
    const T *enter = s.enter + t * s.stride + first, *leave = s.leave + t * s.stride + first;
    Vec<T>* trail = z.trail + (t + 1) * N * W;
    Vec<T>* grad_leave = z.grad_leave + t * states + first;
    const Vec<T>* sums = fresh ? z.zeros : grad_leave;
    Vec<T> decay[W], token[W], grad_y[W], y[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      decay[w] = s.decay[t * W + w], token[w] = s.token[t * W + w], grad_y[w] = z.grad_y[t * W + w];
      if constexpr (kGate) y[w] = z.y[t * W + w];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<T> b = splat(enter[i]);
      Vec<T> sum = sums[i];
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        h[i][w] = advance<T, W, kClamp>(s, w, h[i][w], decay[w], token[w], b, [&](Vec<T> free, Vec<T> clamped) {
          z.inside[(t * N + i) * W + w] = equal(clamped, free);  // lower <= free <= upper, with one comparison
        });
        // Lanes beyond the last channel may be 0 * inf, and must not get into sums over lanes.
        if constexpr (W == 1) h[i][w] = select(s.exists, h[i][w], Vec<T>{});
        trail[i * W + w] = h[i][w];
        sum = fma(grad_y[w], h[i][w], sum);
        if constexpr (kGate) y[w] = fma(h[i][w], splat(leave[i]), y[w]);
      }
      grad_leave[i] = sum;
    }
    if constexpr (kGate)
      for (int w = 0; w < W; ++w) z.y[t * W + w] = y[w];
  }
}

// The sweep back over the steps of a chunk.
template <class T, int W, bool kClamp, int N>
SK_NOINLINE void adjoint_tile(const Strip<T, W>& s, const Scratch<T>& z, int64_t first, int64_t states, Vec<T>* carry, int64_t blocks,
                  bool fresh) {
  Vec<T> r[N][W];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) r[i][w] = carry[(first + i) * blocks + w];
  for (int64_t t = s.steps - 1; t >= 0; --t) {
    const T *enter = s.enter + t * s.stride + first, *leave = s.leave + t * s.stride + first;
    const Vec<T>* before = z.trail + t * N * W;
    Vec<T>* grad_enter = z.grad_enter + t * states + first;
    const Vec<T>* sums = fresh ? z.zeros : grad_enter;
    Vec<T> by_token[W], by_decay[W], decay[W], token[W], grad_y[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      by_token[w] = first ? z.by_token[t * W + w] : Vec<T>{}, by_decay[w] = first ? z.by_decay[t * W + w] : Vec<T>{};
      decay[w] = s.decay[t * W + w], token[w] = s.token[t * W + w], grad_y[w] = z.grad_y[t * W + w];
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const Vec<T> b = splat(enter[i]), c = splat(leave[i]);
      Vec<T> sum = sums[i];
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        Vec<T> grad = fma(grad_y[w], c, r[i][w]);
        if constexpr (kClamp) grad = select(z.inside[(t * N + i) * W + w], grad, Vec<T>{});
        if constexpr (W == 1) grad = select(s.exists, grad, Vec<T>{});
        sum = fma(grad, token[w], sum);
        by_token[w] = fma(grad, b, by_token[w]);
        r[i][w] = decay[w] * grad;
        by_decay[w] = fma(r[i][w], before[i * W + w], by_decay[w]);
      }
      grad_enter[i] = sum;
    }
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) z.by_token[t * W + w] = by_token[w], z.by_decay[t * W + w] = by_decay[w];
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) carry[(first + i) * blocks + w] = r[i][w];
}

// Adds lane vectors v[steps][W] up per head: turned so that lanes are steps, columns of a head are added as vectors.
template <class T, int W>
void add_per_head(const Strip<T, W>& s, Vec<T>* v, int64_t channel, int64_t width, T* head_sums) {
  const int64_t padded = Scratch<T>::padded(s.steps);
  for (int w = 0; w < W; ++w)
    for (int64_t start = 0; start < s.steps; start += kLanes<T>) {
      Vec<T> r[kLanes<T>];
      for (int k = 0; k < kLanes<T>; ++k) r[k] = v[(start + k) * W + w];
      transpose<T>(r);
      const int64_t here = std::min<int64_t>(kLanes<T>, s.count - w * kLanes<T>);
      int64_t head = s.heads[w], left = (head + 1) * width - channel - w * kLanes<T>;  // columns left of this head
      for (int64_t k = 0; k < here;) {
        Vec<T> sum = r[k++];
        for (--left; left > 0 && k < here; --left) sum += r[k++];
        T* to = head_sums + head * padded + start;
        store(to, load(to) + sum);
        ++head;
        left = width;
      }
    }
}

template <class T, int W, Clamp kClamp, bool kGate>
void backward_strip(const Problem<T>& p, const Place<T>& at, const Scratch<T>& z, int64_t channel, int64_t start,
                    int64_t steps, const T* grad_out, const T* chunk_states, T* grad_x, T* grad_z) {
  Strip<T, W> s(p, at, channel, start, steps, z.decay, z.token);
  const int64_t channels = p.channels(), row = at.direction * channels, everywhere = at.channel + channel;
  const int64_t offset = at.place(start) * channels + everywhere;
  const T* saved = chunk_states + (at.item * p.chunks() + start / p.chunk) * p.states * channels + everywhere;
  s.template prepare<kClamp != Clamp::kNone>(z.per_head, p.x + offset, row);
  for (int w = 0; w < W; ++w) {
    const Vec<T> skip = p.D ? load_block(p.D + everywhere, w, s.count) : Vec<T>{};
    for (int64_t t = 0; t < steps; ++t) {
      Vec<T> grad = load_block(grad_out + offset + t * row, w, s.count);
      if constexpr (kGate) {
        const Vec<T> gate = load_block(p.z + offset + t * row, w, s.count);
        grad *= gate * sigmoid<T>(gate);
        z.y[t * W + w] = p.D ? skip * load_block(p.x + offset + t * row, w, s.count) : Vec<T>{};
      }
      z.grad_y[t * W + w] = grad;
    }
  }
  if (p.states == 0) std::fill_n(z.by_token, 2 * steps, Vec<T>{}), std::fill_n(z.by_decay, 2 * steps, Vec<T>{});
  Vec<T>* carry = z.carry + channel / kLanes<T>;
  for_tiles(p.states, [&](auto size, int64_t first) {
    constexpr int N = decltype(size)::value;
    Clamp needed = kClamp;
    if constexpr (kClamp != Clamp::kNone)
      needed = s.template needed<N>(z.norms + first,
                                    [&](int i, int w) { return load_block(saved + (first + i) * channels, w, s.count); });
    with_clamp<kClamp>(needed, [&]<Clamp kDone>() {
      recompute_tile<T, W, kDone, kGate, N>(s, z, first, p.states, saved, channels, channel == 0);
      adjoint_tile<T, W, kDone != Clamp::kNone, N>(s, z, first, p.states, carry, at.blocks(), channel == 0);
    });
  });
  for (int w = 0; w < W; ++w) {
    const Vec<T> skip = p.D ? load_block(p.D + everywhere, w, s.count) : Vec<T>{};
    Vec<T> rates, by_rate{}, by_skip{};
    for (int lane = 0; lane < kLanes<T>; ++lane)
      rates[lane] = p.A[std::min(at.head + s.heads[w] + s.to_head[w][lane], p.heads - 1)];
    for (int64_t t = 0; t < steps; ++t) {
      const Vec<T> dt = s.spread(z.per_head.step + t * z.per_head.stride, w), x = load_block(p.x + offset + t * row, w, s.count);
      const Vec<T> gy = z.grad_y[t * W + w], by_token = z.by_token[t * W + w], by_decay = z.by_decay[t * W + w];
      Vec<T> gx = dt * by_token;
      if (p.D) gx = fma(skip, gy, gx);
      store_block(grad_x + offset + t * row, gx, w, s.count);
      by_skip = fma(gy, x, by_skip);
      by_rate = fma(dt, by_decay, by_rate);
      z.by_token[t * W + w] = fma(by_token, x, rates * by_decay);  // now the lanes of the gradient of the step
      if constexpr (kGate) {
        const Vec<T> gate = load_block(p.z + offset + t * row, w, s.count), open = sigmoid<T>(gate), one = splat<T>(1);
        const Vec<T> grad = load_block(grad_out + offset + t * row, w, s.count) * (open * fma(gate, one - open, one));
        store_block(grad_z + offset + t * row, z.y[t * W + w] * grad, w, s.count);
      }
    }
    for (int lane = 0; lane < kLanes<T>; ++lane) {
      z.rate[channel + w * kLanes<T> + lane] += by_rate[lane];
      z.skip[channel + w * kLanes<T> + lane] += by_skip[lane];
    }
  }
  add_per_head(s, z.by_token, channel, p.width, z.head_sums);
}

// Lane sums of [steps][states] to rows of `out`, which lie `stride` apart.
template <class T>
void reduce_lanes(const Vec<T>* v, int64_t steps, int64_t states, T* sums, T* out, int64_t stride) {
  for (int64_t k = 0; k < steps * states; k += kLanes<T>) store(sums + k, horizontal_sums<T>(v + k));
  for (int64_t t = 0; t < steps; ++t) std::copy(sums + t * states, sums + (t + 1) * states, out + t * stride);
}

template <class T>
struct Gradients {
  T *x, *dt, *A, *B, *C, *D, *z, *bias, *initial_state;
};

template <class T, Clamp kClamp, bool kGate>
void backward(const Problem<T>& p, const T* grad_out, const T* grad_last_state, const T* chunk_states, const Gradients<T>& out) {
  const Slabs<T> slabs(p);
  const int64_t projections = p.batch * p.length * p.groups * p.states;
  // With one slab dB and dC are complete as they are; with more, the slabs' parts wait here to be added in order.
  std::vector<T> parts(slabs.count > 1 ? 2 * slabs.count * projections : 0);
  std::vector<double> rates(p.batch * p.heads), biases(p.batch * p.heads), skips(p.batch * p.channels());

  torch::stable::parallel_for(0, p.batch * p.groups * slabs.count, slabs.grain, [&](int64_t begin, int64_t end) {
    const int64_t most = std::min(p.chunk, p.length);
    Scratch<T> z;
    Arena arena;
    z.each(most, p.states, slabs, p.width,
           [&]<class V>(V*&, int64_t count) { arena.reserve<V>(count); });
    arena.allocate();
    z.each(most, p.states, slabs, p.width, [&]<class V>(V*& pointer, int64_t count) { pointer = arena.take<V>(count); });
    for (int64_t task = begin; task < end; ++task) {
      const Place<T> at(p, slabs, task);
      const int64_t boundary = (at.item * p.channels() + at.channel) * p.states;
      T* grad_B = slabs.count > 1 ? parts.data() + 2 * at.slab * projections : out.B;
      T* grad_C = slabs.count > 1 ? grad_B + projections : out.C;
      states_in(grad_last_state ? grad_last_state + boundary : nullptr, at.count, p.states, at.blocks(), z.carry);
      std::fill(z.rate, z.rate + slabs.size, 0.0);
      std::fill(z.skip, z.skip + slabs.size, 0.0);
      std::fill(z.bias, z.bias + at.heads, 0.0);
      Vec<T> least{};
      for (int64_t start = (p.chunks() - 1) * p.chunk; start >= 0; start -= p.chunk) {
        const int64_t steps = std::min(p.chunk, p.length - start), padded = Scratch<T>::padded(steps);
        std::fill(z.head_sums, z.head_sums + at.heads * padded, T(0));
        z.per_head.fill(p, at, start, steps, least);
        if constexpr (kClamp != Clamp::kNone) enter_norms(p, at, start, steps, z.norms);
        for (int64_t channel = 0, both; channel < at.count; channel += both ? 2 * kLanes<T> : kLanes<T>) {
          both = channel + 2 * kLanes<T> <= at.count;
          const auto strip = both ? backward_strip<T, 2, kClamp, kGate> : backward_strip<T, 1, kClamp, kGate>;
          strip(p, at, z, channel, start, steps, grad_out, chunk_states, out.x, out.z);
        }
        const int64_t first = at.place(start), row = first * p.groups + at.group;
        const int64_t to_next = at.direction * p.groups * p.states;
        reduce_lanes(z.grad_enter, steps, p.states, z.sums, grad_B + row * p.states, to_next);
        reduce_lanes(z.grad_leave, steps, p.states, z.sums, grad_C + row * p.states, to_next);
        T* grad_dt = out.dt + first * p.heads + at.head;
        for (int64_t t = 0; t < steps; ++t)
          for (int64_t head = 0; head < at.heads; ++head) {
            const T slope = z.per_head.slope[t * z.per_head.stride + head];
            const T grad = slope == 0 ? T(0) : slope * z.head_sums[head * padded + t];  // a limited step: not 0 * inf
            grad_dt[at.direction * t * p.heads + head] = grad;
            z.bias[head] += grad;
          }
      }
      states_out(z.carry, at.count, p.states, at.blocks(), out.initial_state + boundary);
      for (int64_t c = 0; c < at.count; ++c) rates[at.item * p.heads + at.head + c / p.width] += z.rate[c];
      std::copy(z.bias, z.bias + at.heads, biases.data() + at.item * p.heads + at.head);
      std::copy(z.skip, z.skip + at.count, skips.data() + at.item * p.channels() + at.channel);
    }
  });

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
  const auto over_batch = [&](const std::vector<double>& terms, int64_t size, T* to) {
    for (int64_t k = 0; k < size; ++k) {
      double sum = 0;
      for (int64_t item = 0; item < p.batch; ++item) sum += terms[item * size + k];
      to[k] = static_cast<T>(sum);
    }
  };
  over_batch(rates, p.heads, out.A);
  over_batch(biases, p.heads, out.bias);
  over_batch(skips, p.channels(), out.D);
}

// ---- tensors ------------------------------------------------------------------------------------------------------

template <class T>
Problem<T> problem(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
                   const std::optional<Tensor>& D, const std::optional<Tensor>& z, const std::optional<Tensor>& bias,
                   const std::optional<Tensor>& lower, const std::optional<Tensor>& upper, int64_t reverse_groups,
                   bool softplus, double least, double most, int64_t chunk) {
  return {x.size(0),  x.size(1),  x.size(2),      x.size(3),      B.size(2),  B.size(3),     chunk,    reverse_groups,
          data<T>(x), data<T>(dt), data<T>(A),    data<T>(B),     data<T>(C), data<T>(D),    data<T>(lower),
          data<T>(upper), data<T>(z), data<T>(bias), softplus, static_cast<T>(least), static_cast<T>(most)};
}

void ssd_scan_fwd(const Tensor x, const Tensor dt, const Tensor A, const Tensor B, const Tensor C,
                  const std::optional<Tensor> D, const std::optional<Tensor> z, const std::optional<Tensor> bias,
                  const std::optional<Tensor> initial_state, const std::optional<Tensor> lower,
                  const std::optional<Tensor> upper, int64_t reverse_groups, bool softplus, double least, double most,
                  int64_t chunk, bool count, Tensor y, Tensor last_state, Tensor chunk_states, Tensor saturation,
                  Tensor least_step) {
  for_dtype(x, [&]<class T>(T) {
    const auto p = problem<T>(x, dt, A, B, C, D, z, bias, lower, upper, reverse_groups, softplus, least, most, chunk);
    if (p.batch * p.channels() == 0) {
      std::fill_n(mutable_data<T>(saturation), saturation.numel(), T(0));
      *mutable_data<T>(least_step) = T(0);
      return;
    }
    const auto run = !p.lower ? forward<T, Clamp::kNone> : count ? forward<T, Clamp::kCount> : forward<T, Clamp::kApply>;
    run(p, data<T>(initial_state), mutable_data<T>(y), mutable_data<T>(last_state), mutable_data<T>(chunk_states),
        mutable_data<T>(least_step), mutable_data<T>(saturation));
  });
}

void ssd_scan_bwd(const Tensor grad_y, const std::optional<Tensor> grad_last_state, const Tensor x, const Tensor dt,
                  const Tensor A, const Tensor B, const Tensor C, const std::optional<Tensor> D,
                  const std::optional<Tensor> z, const std::optional<Tensor> bias, const std::optional<Tensor> lower,
                  const std::optional<Tensor> upper, const Tensor chunk_states, int64_t reverse_groups, bool softplus,
                  double least, double most, int64_t chunk, Tensor grad_x, Tensor grad_dt, Tensor grad_A, Tensor grad_B,
                  Tensor grad_C, Tensor grad_D, Tensor grad_z, Tensor grad_bias, Tensor grad_initial_state) {
  for_dtype(x, [&]<class T>(T) {
    const auto p = problem<T>(x, dt, A, B, C, D, z, bias, lower, upper, reverse_groups, softplus, least, most, chunk);
    if (p.batch * p.channels() == 0) {
      for (Tensor* empty_sum : {&grad_dt, &grad_A, &grad_B, &grad_C, &grad_D, &grad_bias})
        std::fill_n(mutable_data<T>(*empty_sum), empty_sum->numel(), T(0));
      return;
    }
    const auto run = p.lower ? (p.z ? backward<T, Clamp::kApply, true> : backward<T, Clamp::kApply, false>)
                             : (p.z ? backward<T, Clamp::kNone, true> : backward<T, Clamp::kNone, false>);
    run(p, data<T>(grad_y), data<T>(grad_last_state), data<T>(chunk_states),
        Gradients<T>{mutable_data<T>(grad_x), mutable_data<T>(grad_dt), mutable_data<T>(grad_A), mutable_data<T>(grad_B),
                     mutable_data<T>(grad_C), mutable_data<T>(grad_D), mutable_data<T>(grad_z), mutable_data<T>(grad_bias),
                     mutable_data<T>(grad_initial_state)});
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "ssd_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? bias, Tensor?"
      " initial_state, Tensor? lower, Tensor? upper, int reverse_groups, bool softplus, float least, float most, int chunk,"
      " bool count, Tensor(a!) y, Tensor(b!) last_state, Tensor(c!) chunk_states, Tensor(d!) saturation,"
      " Tensor(e!) least_step) -> ()");
  m.def(
      "ssd_scan_bwd(Tensor grad_y, Tensor? grad_last_state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D,"
      " Tensor? z, Tensor? bias, Tensor? lower, Tensor? upper, Tensor chunk_states, int reverse_groups, bool softplus,"
      " float least, float most, int chunk, Tensor(a!) grad_x, Tensor(b!) grad_dt, Tensor(c!) grad_A, Tensor(d!) grad_B,"
      " Tensor(e!) grad_C, Tensor(f!) grad_D, Tensor(g!) grad_z, Tensor(h!) grad_bias, Tensor(i!) grad_initial_state)"
      " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("ssd_scan_fwd", TORCH_BOX(&stablekern::ssd_scan_fwd));
  m.impl("ssd_scan_bwd", TORCH_BOX(&stablekern::ssd_scan_bwd));
}
