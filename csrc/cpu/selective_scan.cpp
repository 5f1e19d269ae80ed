// The Mamba-1 scan and its adjoint; the mathematics is in stablekern/ops/selective_scan.py.
//
// Channels are the lanes. Every state h[n] is a vector over channels, B_t[n] and C_t[n] are broadcast, so neither the
// recurrence nor the sums over states need a horizontal sum, and any number of states is as good as 16. Rows of
// (channels, time) are turned in registers as they come and go; step sizes, gate and skip are done on the way.
//
// Forward, a segment of time is brought into place once for all blocks of lanes (B and C), and one block then passes it, a
// few steps at a time. Backward, per chunk and a group of blocks of lanes: for each tile of states, from the saved start
// on, recompute and keep states and decays, then sweep back. A few blocks go abreast and share each load and store of the
// sums over channels for dB and dC, which stay vectors until the last group has added its blocks, tile by tile. Sizes are
// such that one tile's history and sums, and what it reads of the rows, about fit a first-level cache for 32 steps: with
// fewer, the saved states and the rows of channels, a line or two at a time out of pages far apart, cost more than that.
//
// What bounds it (AVX-512, one 64-byte multiply-add a cycle, as on Zen 4): a state's step is 9 of them forward, 6 of which
// are the exponential, and 16 backward, which has to do the exponential again: keeping the decays would be 16 times the
// memory of all else. The rest of the exponential (a sum, a shuffle, a scaling) and the clamp go through other ports there,
// and through the same two on Intel's: `clamp.h` tells where a clamp costs less than two of 14. At (8, 128, 960, 16) that
// is 80 % of the time forward. Backward it is half: 4 stores of 2 cycles each a state's step, rows of 16 channels that lie
// in 16 pages each, and the sums for dB and dC, which pass between two levels of cache.
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

#include "stablekern/clamp.h"
#include "stablekern/lanes.h"
#include "stablekern/simd.h"
#include "stablekern/tensor.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

#if defined(SK_AVX512)
constexpr int kForwardTile = 8;   // states held in registers
constexpr int kBackwardTile = 2;  // with their sums for dA, of
constexpr int kAbreast = 2;       // this many blocks of lanes, which share the sums for dB and dC
#else
constexpr int kForwardTile = 8;
constexpr int kBackwardTile = 4;
constexpr int kAbreast = 1;
#endif
constexpr int64_t kGroup = 2;  // blocks of lanes that a tile of states passes before the next tile
constexpr int64_t kBlockSteps = 16;       // of the forward pass
constexpr int64_t kSegment = 256;         // steps whose B and C are kept ready, likewise
constexpr int64_t kThreadWork = 1 << 16;  // updates of a state, some 20 microseconds; less is done by one thread
constexpr int64_t kSumGrain = 1 << 14;    // sums of a few numbers, likewise
constexpr int64_t kTasks = 32;      // fewer batch items and groups than this are split into slabs of channels,
constexpr int kExtreme = 1 << 16;   // exponents from here on take the exponential that bounds its argument
constexpr int64_t kSlabBlocks = 4;  // of no less than this many blocks of lanes, which share the reductions of dB, dC

template <class T>
struct Problem {
  int64_t batch, channels, length, groups, states, chunk;
  int64_t reverse_channels;  // so many, the last ones, begin with the last step in memory
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
  bool backwards;   // in memory

  Place(const Problem<T>& p, const Slabs<T>& slabs, int64_t task) {
    slab = task % slabs.count;
    group = task / slabs.count % p.groups;
    item = task / slabs.count / p.groups;
    channel = group * slabs.group_channels + slab * slabs.size;
    count = std::min(slabs.size, slabs.group_channels - slab * slabs.size);
    backwards = channel >= p.channels - p.reverse_channels;
  }
  // Where `steps` steps of the scan, from `start` on, begin in a row of memory.
  int64_t place(const Problem<T>& p, int64_t start, int64_t steps) const {
    return backwards ? p.length - start - steps : start;
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

// What one state has of its own, in all lanes of a block. A kernel reads it through one pointer, at fixed distances.
template <class T>
struct Law {
  Vec<T> rate, high, low;  // A, and that as `Exponent`
  Bounds<T> bounds;        // of the clamp

  // e^(step A)
  template <bool kTame>
  SK_INLINE Vec<T> decay(Vec<T> step) const {
#if defined(SK_AVX512)
    if constexpr (kTame && sizeof(T) == 4) return exp_of_product(step, high, low);
#endif
    return exp<T>(step * rate);
  }
  // The next state. With a clamp, `note` gets to know what the state was before and after it.
  template <Clamp kClamp, class Note>
  SK_INLINE Vec<T> advance(Vec<T> h, Vec<T> decay, Vec<T> entering, const Note& note) const {
    h = fma(decay, h, entering);
    const Vec<T> clamped = bounds.template apply<kClamp>(h);
    if constexpr (kClamp != Clamp::kNone) note(h, clamped);
    return clamped;
  }
};

// Between rows (channels, states) in memory and vectors [blocks][states], `apart` vectors from one to the next.
template <class T>
void states_in(const T* outside, int64_t count, int64_t states, Vec<T>* inside, int64_t apart = 1) {
  T* lanes = reinterpret_cast<T*>(inside);
  for (int64_t c = 0; c < padded_to_lanes<T>(count); ++c) {
    T* to = lanes + (c / kLanes<T> * states * apart) * kLanes<T> + c % kLanes<T>;
    for (int64_t i = 0; i < states; ++i) to[i * apart * kLanes<T>] = outside && c < count ? outside[c * states + i] : T(0);
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

// The laws of a slab of channels, the fastest rate of each block, and how far its states may go.
template <class T>
void laws_in(const Problem<T>& p, const Place<T>& at, Law<T>* laws, Vec<T>* fastest, Reach<T>* reach) {
  constexpr int64_t apart = sizeof(Law<T>) / sizeof(Vec<T>);
  const int64_t own = at.channel * p.states;
  states_in(p.A + own, at.count, p.states, &laws->rate, apart);
  if (p.upper) {
    states_in(p.lower + own, at.count, p.states, &laws->bounds.lower, apart);
    states_in(p.upper + own, at.count, p.states, &laws->bounds.upper, apart);
  }
  for (int64_t b = 0; b < at.blocks(); ++b) {
    fastest[b] = Vec<T>{};
    reach[b] = Reach<T>{};
    for (Law<T>* law = laws + b * p.states; law < laws + (b + 1) * p.states; ++law) {
      const Exponent<T> exponent(law->rate);
      law->high = exponent.high, law->low = exponent.low;
      fastest[b] = max(fastest[b], abs(law->rate));
      reach[b].include(law->bounds, less_equal(law->rate, Vec<T>{}));  // steps are >= 0, or nothing comes of it
    }
    reach[b].leave_out_from(at.in_block(b));
  }
}

// B and C of one block of steps, as rows of states.
template <class T>
struct Projections {
  int64_t stride;  // states, padded
  T *enter, *leave;

  void fill(const Problem<T>& p, const Place<T>& at, int64_t start, int64_t steps) const {
    const int64_t first = (at.item * p.groups + at.group) * p.states, place = at.place(p, start, steps);
    for (int64_t i = 0; i < p.states; i += kLanes<T>) {
      const int64_t rows = std::min<int64_t>(kLanes<T>, p.states - i), from = (first + i) * p.length + place;
      turn(p.B + from, p.length, rows, steps, at.backwards, enter + i);
      turn(p.C + from, p.length, rows, steps, at.backwards, leave + i);
    }
  }

 private:
  void turn(const T* from, int64_t length, int64_t rows, int64_t steps, bool backwards, T* to) const {
    for (int64_t t = 0; t < steps; t += kLanes<T>) {
      Vec<T> turned[kLanes<T>];
      const int64_t here = std::min<int64_t>(kLanes<T>, steps - t);
      load_turned(from + t, length, rows, here, kLanes<T>, turned);
      for (int64_t k = 0; k < here; ++k) store(to + (backwards ? steps - 1 - t - k : t + k) * stride, turned[k]);
    }
  }
};

// What one step has, in all lanes of a block.
template <class T>
struct Row {
  Vec<T> u, step, token;  // token: step u
  Vec<T> y;
};

// One block of lanes, or several abreast, over one block of steps: what all tiles of states share.
template <class T, class R>
struct Strip {
  int64_t steps, lanes;    // lanes: that are channels
  int64_t states, padded;  // from one block of lanes to the next among laws, among rows
  const Law<T>* laws;      // [states]
  R* rows;                 // [steps], in the order of the scan; see `rows_for`
  bool backwards;          // in memory
  const T *enter, *leave;  // B and C of the first step,
  int64_t stride;          // which is the way to the next
};

// The rows of a strip in `memory` for padded_to_lanes(steps) of them. What is turned comes in whole vectors, which leave
// something behind the last step that they read: backwards that is before the first one of the scan.
template <class T, class R>
SK_INLINE R* rows_for(R* memory, int64_t steps, bool backwards) {
  return memory + (backwards ? padded_to_lanes<T>(steps) - steps : 0);
}

// `of`, one member of each row of a strip, out of a row of `from` for each lane; and back.
template <class T, class R>
SK_INLINE void rows_in(const Strip<T, R>& s, const T* from, int64_t length, int64_t ahead, Vec<T> R::* of) {
  constexpr int64_t apart = sizeof(R) / sizeof(Vec<T>);
  s.backwards ? load_turned(from, length, s.lanes, s.steps, -ahead, &(s.rows[s.steps - 1].*of), -apart)
              : load_turned(from, length, s.lanes, s.steps, ahead, &(s.rows->*of), apart);
}
template <class T, class R>
SK_INLINE void rows_out(const Strip<T, R>& s, Vec<T> R::* of, int64_t ahead, T* to, int64_t length) {
  constexpr int64_t apart = sizeof(R) / sizeof(Vec<T>);
  s.backwards ? store_turned(&(s.rows[s.steps - 1].*of), s.lanes, s.steps, -ahead, to, length, -apart)
              : store_turned(&(s.rows->*of), s.lanes, s.steps, ahead, to, length, apart);
}

// u, steps and tokens of a strip, and the steps' slopes where a row has them. Lowers `least` to the least step. True if no
// exponent is extreme (or NaN).
template <class T, class R>
SK_NOINLINE bool prepare(const Problem<T>& p, const Strip<T, R>& s, Vec<T> fastest, int64_t channel, int64_t offset,
                         int64_t ahead, Vec<T>& least) {
  rows_in<T, R>(s, p.u + offset, p.length, ahead, &R::u);
  rows_in<T, R>(s, p.delta + offset, p.length, ahead, &R::step);
  Vec<T> largest{}, smallest{};
  const Vec<T> bias = p.bias ? load_first(p.bias + channel, static_cast<int>(s.lanes)) : Vec<T>{};
  for (R* row = s.rows; row < s.rows + s.steps; ++row) {
    Vec<T> step = row->step + bias;
    if (p.softplus) {
      const Softplus<T> soft = softplus<T>(step);
      step = soft.value;
      if constexpr (requires { row->slope; }) row->slope = soft.slope;
    }
    row->step = step;
    row->token = step * row->u;
    largest = max(largest, step);  // is NaN if the last one is: what a NaN does later does not matter
    smallest = min(step, smallest);
  }
  least = min(least, smallest);
  return !any(!less(max(largest, -smallest) * fastest, splat<T>(kExtreme)));
}

// |token| of a strip, for `clamp_needed`.
template <class T, class R>
SK_INLINE Vec<T> token_norm(const R* rows, int64_t steps) {
  Vec<T> squares{};
  for (const R* row = rows; row < rows + steps; ++row) squares = fma(row->token, row->token, squares);
  return norm_bound<T>(squares, steps);
}

// ---- forward ------------------------------------------------------------------------------------------------------

// Tile of N states: `state` goes on by the strip's steps, y += h C, and to `changed` is added how many states the clamp
// changed, if that is counted.
template <class T, Clamp kClamp, bool kTame, int N>
SK_NOINLINE void forward_tile(const Strip<T, Row<T>>& s, int64_t first, Vec<T>* state, Vec<T>& changed) {
  const Law<T>* laws = s.laws + first;
  state += first;
  Vec<T> h[N], count{};
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) h[i] = state[i];
  const T *enter = s.enter + first, *leave = s.leave + first;
  for (Row<T>* row = s.rows; row < s.rows + s.steps; ++row, enter += s.stride, leave += s.stride) {
    const Vec<T> step = row->step, token = row->token;
    Vec<T> y = row->y;
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) {
      const Vec<T> decay = laws[i].template decay<kTame>(step), entering = token * splat(enter[i]);
      h[i] = laws[i].template advance<kClamp>(h[i], decay, entering, [&](Vec<T> free, Vec<T>) {
        if constexpr (kClamp == Clamp::kCount)
          count += select(laws[i].bounds.changes(free), splat<T>(1), Vec<T>{});
      });
      y = fma(h[i], splat(leave[i]), y);
    }
    row->y = y;
  }
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) state[i] = h[i];
  if constexpr (kClamp == Clamp::kCount) changed += count;
}

// The least step, or 0, goes to `least_step`; if states that the clamp changed are counted, their share to `saturation`
// (batch, channels).
template <class T, Clamp kClamp>
void forward(const Problem<T>& p, const T* initial_state, T* y, T* last_state, T* chunk_states, T* least_step,
             T* saturation) {
  const Slabs<T> slabs(p);
  const int64_t tasks = p.batch * p.groups * slabs.count;
  std::vector<T> least_of(tasks);
  torch::stable::parallel_for(0, tasks, slabs.grain, [&](int64_t begin, int64_t end) {
    const int64_t segment = std::min(kSegment, p.length), stride = padded_to_lanes<T>(p.states);
    Vec<T> *state, *fastest;
    Law<T>* laws;
    Reach<T>* reach;
    Row<T>* rows;
    T *enter, *leave;
    T* norms;         // of `enter`, over each strip
    double* changed;  // how often, per channel
    Arena arena;
    const auto each = [&](const auto& visit) {
      visit(state, p.states * slabs.blocks()), visit(laws, p.states * slabs.blocks()), visit(fastest, slabs.blocks());
      visit(reach, slabs.blocks());
      visit(rows, padded_to_lanes<T>(kBlockSteps));
      visit(enter, segment * stride), visit(leave, segment * stride);
      visit(norms, kClamp == Clamp::kNone ? 0 : segment * stride);
      visit(changed, slabs.size);
    };
    each([&]<class V>(V*&, int64_t count) { arena.reserve<V>(count); });
    arena.allocate();
    each([&]<class V>(V*& pointer, int64_t count) { pointer = arena.take<V>(count); });
    const Projections<T> projections{stride, enter, leave};
    for (int64_t task = begin; task < end; ++task) {
      const Place<T> at(p, slabs, task);
      const int64_t boundary = (at.item * p.channels + at.channel) * p.states;
      states_in(initial_state ? initial_state + boundary : nullptr, at.count, p.states, state);
      laws_in(p, at, laws, fastest, reach);
      std::fill(changed, changed + slabs.size, 0.0);
      Vec<T> least{};
      // A segment's B and C stay in a cache, and a block's states and laws in the first level, while its steps go by.
      for (int64_t begun = 0; begun < p.length; begun += segment) {
        const int64_t over = std::min(p.length, begun + segment);
        projections.fill(p, at, begun, over - begun);
        for (int64_t b = 0; b < at.blocks(); ++b) {
          const int64_t channel = at.channel + b * kLanes<T>, lanes = at.in_block(b);
          const Vec<T> skip = p.D ? load_first(p.D + channel, static_cast<int>(lanes)) : Vec<T>{};
          Vec<T>* own = state + b * p.states;
          for (int64_t start = begun, steps; start < over; start += steps) {
            steps = std::min({kBlockSteps, over - start, p.chunk - start % p.chunk});
            const int64_t offset = (at.item * p.channels + channel) * p.length + at.place(p, start, steps);
            const int64_t ahead = kBlockSteps, from = (start - begun) * stride;
            const Strip<T, Row<T>> s{steps,        lanes,        p.states,
                                     0,            laws + b * p.states, rows_for<T>(rows, steps, at.backwards),
                                     at.backwards, enter + from, leave + from,
                                     stride};
            Vec<T> count{};
            if (start % p.chunk == 0) {
              T* save = chunk_states + (at.item * p.chunks() + start / p.chunk) * p.states * p.channels + channel;
              const bool past_caches = lanes == kLanes<T> && reinterpret_cast<uintptr_t>(save) % kVectorBytes == 0 &&
                                       p.channels % kLanes<T> == 0;  // a line that is not read before it is written
              for (int64_t i = 0; i < p.states; ++i)
                past_caches ? stream(save + i * p.channels, own[i]) : store_block(save + i * p.channels, own[i], 0, lanes);
            }
            const bool tame = prepare(p, s, fastest[b], channel, offset, ahead, least);
            for (Row<T>* row = s.rows; row < s.rows + steps; ++row) row->y = p.D ? skip * row->u : Vec<T>{};
            Vec<T> tokens{};
            if constexpr (kClamp != Clamp::kNone) {
              if (b == 0) column_norms(s.enter, stride, p.states, steps, norms + from);
              tokens = token_norm<T>(s.rows, steps);
            }
            if (tame)
              for_tiles<kForwardTile>(p.states, [&](auto size, int64_t first) {
                constexpr int N = decltype(size)::value;
                Clamp needed = kClamp;
                if constexpr (kClamp != Clamp::kNone)
                  needed = clamp_needed<N>(tokens, largest_norm<N>(norms + from + first),
                                           [&](int i) { return own[first + i]; }, reach[b]);
                with_clamp<kClamp>(needed, [&]<Clamp kDone>() { forward_tile<T, kDone, true, N>(s, first, own, count); });
              });
            else
              for (int64_t i = 0; i < p.states; ++i) forward_tile<T, kClamp, false, 1>(s, i, own, count);
            if constexpr (kClamp == Clamp::kCount)
              for (int64_t k = 0; k < lanes; ++k) changed[b * kLanes<T> + k] += count[k];
            if (p.z) {
              rows_in<T, Row<T>>(s, p.z + offset, p.length, ahead, &Row<T>::u);
              for (Row<T>* row = s.rows; row < s.rows + steps; ++row) row->y *= row->u * sigmoid<T>(row->u);
            }
            rows_out<T, Row<T>>(s, &Row<T>::y, ahead, y + offset, p.length);
          }
        }
      }
      states_out(state, at.count, p.states, last_state + boundary);
      stream_fence();
      if constexpr (kClamp == Clamp::kCount)
        for (int64_t k = 0; k < at.count; ++k)
          saturation[at.item * p.channels + at.channel + k] =
              static_cast<T>(changed[k] / static_cast<double>(std::max<int64_t>(1, p.length * p.states)));
      for (int k = 0; k < kLanes<T>; ++k) least_of[task] = std::min(least_of[task], least[k]);
    }
  });
  *least_step = T(0);
  for (const T least : least_of) *least_step = std::min(*least_step, least);
}

// ---- backward -----------------------------------------------------------------------------------------------------

// What the way back needs of a step: the state before it, and the decay. Side by side, so that no two streams of stores
// run a multiple of 4096 bytes apart, which costs as much as the arithmetic.
template <class T>
struct Past {
  Vec<T> state, decay;
};

// And of a step in all lanes of a block.
template <class T>
struct RowBack : Row<T> {
  Vec<T> slope;             // of the step
  Vec<T> grad_y;            // before the gate
  Vec<T> by_token, by_decay;  // sums over states of G B, and of a G h A
  Vec<T> grad_out, z;       // behind the gate; the gate
};

template <class T>
struct Scratch {
  Law<T>* laws;                       // [blocks][states]
  Vec<T>* fastest;                    // [blocks]
  Reach<T>* reach;                    // [blocks]
  Vec<T> *carry, *grad_rate;          // [blocks][states]
  Vec<T> *grad_skip, *grad_bias;      // [blocks]
  RowBack<T>* rows;                   // [kGroup][steps]
  Past<T>* past;                      // [steps][tile][kAbreast], of one tile of states
  Mask<T>* inside;                    // [steps][tile][kAbreast]
  Clamp* needed;                      // [parts] of one tile of states; a part is kBlockSteps steps
  Vec<T>* tokens;                     // [parts][kGroup] norms of the tokens
  T* norms;                           // [parts][states] and of `enter`
  Vec<T> *grad_enter, *grad_leave;    // [steps][states], to be summed over lanes
  Vec<T> *rest_enter, *rest_leave;    // the same of a last, incomplete block
  T *enter, *leave;                   // [steps][states]
  int64_t padded;                     // steps

  template <class Visit>
  void each(int64_t steps, int64_t states, int64_t blocks, bool clamped, const Visit& visit) {
    padded = padded_to_lanes<T>(steps);
    visit(laws, blocks * states), visit(reach, blocks);
    for (auto* all : {&carry, &grad_rate}) visit(*all, blocks * states);
    for (auto* all : {&fastest, &grad_skip, &grad_bias}) visit(*all, blocks);
    visit(rows, kGroup * padded);
    visit(past, steps * kBackwardTile * kAbreast);
    if (clamped) {
      const int64_t parts = (steps + kBlockSteps - 1) / kBlockSteps;
      visit(inside, steps * kBackwardTile * kAbreast);
      visit(needed, parts), visit(tokens, parts * kGroup), visit(norms, parts * padded_to_lanes<T>(states));
    }
    for (auto* sum : {&grad_enter, &grad_leave, &rest_enter, &rest_leave}) visit(*sum, padded * states);
    visit(enter, steps * padded_to_lanes<T>(states)), visit(leave, steps * padded_to_lanes<T>(states));
  }
};

// The states of a tile, of W blocks abreast, in `state` [W][N], which goes on by the strip's steps, and sums of grad_y h
// and, with a gate, of h C.
template <class T, Clamp kClamp, bool kGate, bool kTame, int N, int W>
SK_NOINLINE void recompute_tile(const Strip<T, RowBack<T>>& s, int64_t first, Vec<T>* state, Past<T>* past, Mask<T>* inside,
                                Vec<T>* grad_leave) {
  Vec<T> h[N][W];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) h[i][w] = state[w * N + i];
  const Law<T>* laws = s.laws + first;
  const T *enter = s.enter + first, *leave = s.leave + first;
  Vec<T>* total = grad_leave + first;
  for (RowBack<T>* row = s.rows; row < s.rows + s.steps; ++row) {
    Vec<T> step[W], token[W], grad_y[W], y[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const RowBack<T>& own = row[w * s.padded];
      step[w] = own.step, token[w] = own.token, grad_y[w] = own.grad_y;
      if constexpr (kGate) y[w] = own.y;
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      Vec<T> sum = total[i];
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        const Law<T>& law = laws[w * s.states + i];
        const Vec<T> decay = law.template decay<kTame>(step[w]);
        past[i * W + w] = {h[i][w], decay};
        h[i][w] = law.template advance<kClamp>(h[i][w], decay, token[w] * splat(enter[i]), [&](Vec<T> free, Vec<T> clamped) {
          inside[i * W + w] = equal(clamped, free);  // lower <= free <= upper, with one comparison
        });
        sum = fma(grad_y[w], h[i][w], sum);
        if constexpr (kGate) y[w] = fma(h[i][w], splat(leave[i]), y[w]);
      }
      total[i] = sum;
    }
    if constexpr (kGate)
      for (int w = 0; w < W; ++w) row[w * s.padded].y = y[w];
    past += N * W, inside += N * W, total += s.states, enter += s.stride, leave += s.stride;
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) state[w * N + i] = h[i][w];
}

// The sweep back over the steps of a strip.
template <class T, bool kClamp, int N, int W>
SK_NOINLINE void adjoint_tile(const Strip<T, RowBack<T>>& s, int64_t first, const Past<T>* past, const Mask<T>* inside,
                              Vec<T>* carry, Vec<T>* grad_rate, Vec<T>* grad_enter) {
  Vec<T> r[N][W], by_rate[N][W];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) r[i][w] = carry[w * s.states + first + i], by_rate[i][w] = Vec<T>{};
  const Law<T>* laws = s.laws + first;
  const T *enter = s.enter + s.steps * s.stride + first, *leave = s.leave + s.steps * s.stride + first;
  Vec<T>* total = grad_enter + s.steps * s.states + first;
  past += s.steps * N * W, inside += s.steps * N * W;
  for (RowBack<T>* row = s.rows + s.steps; row-- > s.rows;) {
    past -= N * W, inside -= N * W, total -= s.states, enter -= s.stride, leave -= s.stride;
    Vec<T> step[W], token[W], grad_y[W], by_token[W], by_decay[W];
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const RowBack<T>& own = row[w * s.padded];
      step[w] = own.step, token[w] = own.token, grad_y[w] = own.grad_y;
      by_token[w] = own.by_token, by_decay[w] = own.by_decay;
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      Vec<T> sum = total[i];
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        Vec<T> grad = fma(grad_y[w], splat(leave[i]), r[i][w]);
        if constexpr (kClamp) grad = select(inside[i * W + w], grad, Vec<T>{});
        sum = fma(grad, token[w], sum);
        by_token[w] = fma(grad, splat(enter[i]), by_token[w]);
        r[i][w] = past[i * W + w].decay * grad;
        const Vec<T> by_exponent = r[i][w] * past[i * W + w].state;
        by_rate[i][w] = fma(by_exponent, step[w], by_rate[i][w]);
        by_decay[w] = fma(by_exponent, laws[w * s.states + i].rate, by_decay[w]);
      }
      total[i] = sum;
    }
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) row[w * s.padded].by_token = by_token[w], row[w * s.padded].by_decay = by_decay[w];
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
    for (int w = 0; w < W; ++w) {
      const int64_t state = w * s.states + first + i;
      carry[state] = r[i][w], grad_rate[state] += by_rate[i][w];
    }
}

template <class T>
struct Gradients {
  T *u, *delta, *A, *B, *C, *D, *z, *bias, *initial_state;
};

// Rows of one block of lanes before its states. False if an exponent is extreme.
template <class T, bool kGate>
bool backward_rows(const Problem<T>& p, const Strip<T, RowBack<T>>& s, Vec<T> fastest, int64_t channel, int64_t offset,
                   const T* grad_out) {
  using R = RowBack<T>;
  const int64_t ahead = -p.chunk;
  Vec<T> least{};
  const bool tame = prepare(p, s, fastest, channel, offset, ahead, least);
  rows_in<T, R>(s, grad_out + offset, p.length, ahead, &R::grad_y);
  if constexpr (kGate) rows_in<T, R>(s, p.z + offset, p.length, ahead, &R::z);
  const Vec<T> skip = p.D ? load_first(p.D + channel, static_cast<int>(s.lanes)) : Vec<T>{};
  for (R* row = s.rows; row < s.rows + s.steps; ++row) {
    if constexpr (kGate) {
      row->grad_out = row->grad_y;
      row->grad_y *= row->z * sigmoid<T>(row->z);
      row->y = skip * row->u;
    }
    row->by_token = row->by_decay = Vec<T>{};
  }
  return tame;
}

// And behind them: the gradients of the rows.
template <class T, bool kGate>
void row_gradients(const Problem<T>& p, const Strip<T, RowBack<T>>& s, int64_t channel, int64_t offset, Vec<T>& grad_skip,
                   Vec<T>& grad_bias, const Gradients<T>& out) {
  using R = RowBack<T>;
  const int64_t ahead = -p.chunk;
  const Vec<T> skip = p.D ? load_first(p.D + channel, static_cast<int>(s.lanes)) : Vec<T>{};
  Vec<T> by_skip{}, by_bias{};
  for (R* row = s.rows; row < s.rows + s.steps; ++row) {
    Vec<T> grad_u = row->step * row->by_token, grad_delta = fma(row->u, row->by_token, row->by_decay);
    if (p.D) grad_u = fma(skip, row->grad_y, grad_u);
    if (p.softplus) grad_delta *= row->slope;
    by_skip = fma(row->grad_y, row->u, by_skip);
    by_bias += grad_delta;
    if constexpr (kGate) {
      const Vec<T> x = row->z, open = sigmoid<T>(x), one = splat<T>(1);
      row->y *= row->grad_out * (open * fma(x, one - open, one));
    }
    row->by_token = grad_u, row->by_decay = grad_delta;
  }
  grad_skip += by_skip, grad_bias += by_bias;
  rows_out<T, R>(s, &R::by_token, ahead, out.u + offset, p.length);
  rows_out<T, R>(s, &R::by_decay, ahead, out.delta + offset, p.length);
  if constexpr (kGate) rows_out<T, R>(s, &R::y, ahead, out.z + offset, p.length);
}

// The sums over lanes of one state at kLanes steps; zeros are left behind, for the next chunk.
template <class T>
Vec<T> take_sums(Vec<T>* of, int64_t apart) {
  const Vec<T> sums = horizontal_sums<T>(of, apart);
  for (int k = 0; k < kLanes<T>; ++k) of[k * apart] = Vec<T>{};
  return sums;
}

// sums += rest, without the lanes of `rest` that are no channels; zeros are left behind.
template <class T>
void add_rest(Vec<T>* rest, Mask<T> channel, int64_t steps, int64_t apart, Vec<T>* sums) {
  for (int64_t k = 0; k < steps * apart; k += apart) sums[k] += select(channel, rest[k], Vec<T>{}), rest[k] = Vec<T>{};
}

// dB and dC of the states of a tile over one chunk, which all blocks of lanes have passed. At once, while they are near.
template <class T>
struct SumsOut {
  T *grad_B, *grad_C;  // of the first state at the first step; null before the last group
  int64_t length, steps, states;
  bool backwards;      // in memory
  int64_t rest_lanes;  // that are channels, of an incomplete last block, or 0

  void operator()(const Scratch<T>& z, int64_t first, int64_t count) const {
    if (!grad_B) return;
    IVec<T> lane;
    for (int k = 0; k < kLanes<T>; ++k) lane[k] = static_cast<typename VecTypes<T>::integer>(rest_lanes - k);
    const Mask<T> channel = greater_than<T>(lane, 0);
    for (int64_t i = first; i < first + count; ++i) {
      if (rest_lanes) {
        add_rest<T>(z.rest_enter + i, channel, steps, states, z.grad_enter + i);
        add_rest<T>(z.rest_leave + i, channel, steps, states, z.grad_leave + i);
      }
      for (int64_t t = 0; t < steps; t += kLanes<T>) {
        const int64_t from = t * states + i;
        put(take_sums<T>(z.grad_enter + from, states), t, grad_B + i * length);
        put(take_sums<T>(z.grad_leave + from, states), t, grad_C + i * length);
      }
    }
  }

 private:
  SK_INLINE void put(Vec<T> sums, int64_t t, T* row) const {
    const int64_t count = std::min<int64_t>(kLanes<T>, steps - t);
    backwards ? store_block(row + steps - t - count, reversed<T>(sums, count), 0, count) : store_block(row + t, sums, 0, count);
  }
};

// Up to kGroup blocks of lanes over one chunk, tile after tile of states.
template <class T, Clamp kClamp, bool kGate>
void backward_group(const Problem<T>& p, const Place<T>& at, const Projections<T>& shared, const Scratch<T>& z,
                    int64_t first_block, int64_t start, int64_t steps, const T* grad_out, const T* chunk_states,
                    const Gradients<T>& out, T* grad_B, T* grad_C) {
  const int64_t blocks = std::min(kGroup, at.blocks() - first_block);
  const int64_t first_channel = at.channel + first_block * kLanes<T>;
  const int64_t whole = std::min(blocks, (at.count - first_block * kLanes<T>) / kLanes<T>);
  const auto strip = [&](int64_t b) {
    return Strip<T, RowBack<T>>{steps,        at.in_block(first_block + b), p.states, z.padded, z.laws + (first_block + b) * p.states,
                                rows_for<T>(z.rows + b * z.padded, steps, at.backwards), at.backwards, shared.enter, shared.leave,
                                shared.stride};
  };
  const int64_t place = at.place(p, start, steps);
  const auto offset = [&](int64_t b) { return (at.item * p.channels + first_channel + b * kLanes<T>) * p.length + place; };
  const bool last = first_block + blocks == at.blocks();
  const SumsOut<T> sums_out{last ? grad_B : nullptr, grad_C, p.length, steps, p.states, at.backwards,
                            whole < blocks ? at.in_block(first_block + whole) : 0};
  bool tame = true;
  for (int64_t b = 0; b < blocks; ++b)
    tame &= backward_rows<T, kGate>(p, strip(b), z.fastest[first_block + b], first_channel + b * kLanes<T>, offset(b), grad_out);
  if constexpr (kClamp != Clamp::kNone)
    for (int64_t at = 0; at < steps; at += kBlockSteps) {
      const int64_t part = at / kBlockSteps, count = std::min(kBlockSteps, steps - at);
      if (first_block == 0) column_norms(shared.enter + at * shared.stride, shared.stride, p.states, count, z.norms + part * shared.stride);
      for (int64_t b = 0; b < blocks; ++b) z.tokens[part * kGroup + b] = token_norm<T>(strip(b).rows + at, count);
    }
  const T* saved = chunk_states + (at.item * p.chunks() + start / p.chunk) * p.states * p.channels + first_channel;
  const auto tile = [&]<bool kTame, int N, int W>(int64_t first, int64_t b) {
    const Strip<T, RowBack<T>> s = strip(b);
    const int64_t own = (first_block + b) * p.states;
    Vec<T>* grad_leave = b < whole ? z.grad_leave : z.rest_leave;
    Vec<T>* grad_enter = b < whole ? z.grad_enter : z.rest_enter;
    Vec<T> state[N * W];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 2
      for (int w = 0; w < W; ++w) {
        const T* from = saved + (first + i) * p.channels + (b + w) * kLanes<T>;
        state[w * N + i] = load_block(from, 0, s.lanes);
        __builtin_prefetch(from - p.states * p.channels, 0, 2);  // of the chunk that comes next
      }
    const int64_t most = kClamp == Clamp::kNone ? steps : kBlockSteps;
    const auto part = [&](int64_t at) {
      Strip<T, RowBack<T>> own = s;
      own.steps = std::min(most, steps - at), own.rows += at, own.enter += at * s.stride, own.leave += at * s.stride;
      return own;
    };
    for (int64_t at = 0, k = 0; at < steps; at += most, ++k) {
      Clamp needed = kClamp;
      if constexpr (kClamp != Clamp::kNone && kTame) {
        needed = Clamp::kNone;
        for (int w = 0; w < W; ++w)
          needed = std::max(needed, clamp_needed<N>(z.tokens[k * kGroup + b + w],
                                                    largest_norm<N>(z.norms + k * shared.stride + first),
                                                    [&](int i) { return state[w * N + i]; }, z.reach[first_block + b + w]));
      }
      if constexpr (kClamp != Clamp::kNone) z.needed[k] = needed;
      with_clamp<kClamp>(needed, [&]<Clamp kDone>() {
        recompute_tile<T, kDone, kGate, kTame, N, W>(part(at), first, state, z.past + at * N * W, z.inside + at * N * W,
                                                     grad_leave + at * p.states);
      });
    }
    for (int64_t at = (steps - 1) / most * most; at >= 0; at -= most) {
      const auto run = kClamp == Clamp::kNone || z.needed[at / most] == Clamp::kNone ? adjoint_tile<T, false, N, W>
                                                                                    : adjoint_tile<T, kClamp != Clamp::kNone, N, W>;
      run(part(at), first, z.past + at * N * W, z.inside + at * N * W, z.carry + own, z.grad_rate + own,
          grad_enter + at * p.states);
    }
  };
  const auto tiles = [&]<bool kTame, int N>(int64_t first) {
    int64_t b = 0;
    if constexpr (kTame)
      for (; b + kAbreast <= whole; b += kAbreast) tile.template operator()<true, N, kAbreast>(first, b);
    for (; b < blocks; ++b) tile.template operator()<kTame, N, 1>(first, b);
    sums_out(z, first, N);
  };
  if (tame)
    for_tiles<kBackwardTile>(p.states, [&](auto size, int64_t first) {
      tiles.template operator()<true, decltype(size)::value>(first);
    });
  else
    for (int64_t i = 0; i < p.states; ++i) tiles.template operator()<false, 1>(i);
  for (int64_t b = 0; b < blocks; ++b)
    row_gradients<T, kGate>(p, strip(b), first_channel + b * kLanes<T>, offset(b), z.grad_skip[first_block + b],
                            z.grad_bias[first_block + b], out);
}

template <class T, Clamp kClamp, bool kGate>
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
    z.each(most, p.states, slabs.blocks(), kClamp != Clamp::kNone, [&]<class V>(V*&, int64_t count) { arena.reserve<V>(count); });
    arena.allocate();
    z.each(most, p.states, slabs.blocks(), kClamp != Clamp::kNone, [&]<class V>(V*& at, int64_t count) { at = arena.take<V>(count); });
    const Projections<T> shared{stride, z.enter, z.leave};
    const Vec<T> zero{};
    for (int64_t task = begin; task < end; ++task) {
      const Place<T> at(p, slabs, task);
      const int64_t boundary = (at.item * p.channels + at.channel) * p.states;
      T* grad_B = slabs.count > 1 ? parts.data() + 2 * at.slab * projections : out.B;
      T* grad_C = slabs.count > 1 ? grad_B + projections : out.C;
      states_in(grad_last_state ? grad_last_state + boundary : nullptr, at.count, p.states, z.carry);
      laws_in(p, at, z.laws, z.fastest, z.reach);
      std::fill_n(z.grad_rate, at.blocks() * p.states, zero);
      std::fill_n(z.grad_skip, at.blocks(), zero);
      std::fill_n(z.grad_bias, at.blocks(), zero);
      for (int64_t start = (p.chunks() - 1) * p.chunk; start >= 0; start -= p.chunk) {
        const int64_t steps = std::min(p.chunk, p.length - start);
        shared.fill(p, at, start, steps);
        const int64_t to = (at.item * p.groups + at.group) * p.states * p.length + at.place(p, start, steps);
        for (int64_t first = 0; first < at.blocks(); first += kGroup)
          backward_group<T, kClamp, kGate>(p, at, shared, z, first, start, steps, grad_out, chunk_states, out, grad_B + to,
                                           grad_C + to);
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
                   const std::optional<Tensor>& lower, const std::optional<Tensor>& upper, int64_t reverse_channels,
                   bool softplus, int64_t chunk) {
  return {u.size(0),  u.size(1),      u.size(2),  B.size(1),  A.size(1),  chunk,      reverse_channels, softplus,
          data<T>(u), data<T>(delta), data<T>(A), data<T>(B), data<T>(C), data<T>(D), data<T>(z),       data<T>(bias),
          data<T>(lower), data<T>(upper)};
}

void selective_scan_fwd(const Tensor u, const Tensor delta, const Tensor A, const Tensor B, const Tensor C,
                        const std::optional<Tensor> D, const std::optional<Tensor> z, const std::optional<Tensor> bias,
                        const std::optional<Tensor> initial_state, const std::optional<Tensor> lower,
                        const std::optional<Tensor> upper, int64_t reverse_channels, bool softplus, int64_t chunk,
                        bool count, Tensor y, Tensor last_state, Tensor chunk_states, Tensor saturation, Tensor least_step) {
  for_dtype(u, [&]<class T>(T) {
    const auto p = problem<T>(u, delta, A, B, C, D, z, bias, lower, upper, reverse_channels, softplus, chunk);
    if (p.batch * p.channels == 0) {
      *mutable_data<T>(least_step) = T(0);
      return;
    }
    const auto run = !p.upper ? forward<T, Clamp::kNone> : count ? forward<T, Clamp::kCount> : forward<T, Clamp::kApply>;
    run(p, data<T>(initial_state), mutable_data<T>(y), mutable_data<T>(last_state), mutable_data<T>(chunk_states),
        mutable_data<T>(least_step), mutable_data<T>(saturation));
  });
}

void selective_scan_bwd(const Tensor grad_y, const std::optional<Tensor> grad_last_state, const Tensor u, const Tensor delta,
                        const Tensor A, const Tensor B, const Tensor C, const std::optional<Tensor> D,
                        const std::optional<Tensor> z, const std::optional<Tensor> bias, const std::optional<Tensor> lower,
                        const std::optional<Tensor> upper, const Tensor chunk_states, int64_t reverse_channels,
                        bool softplus, int64_t chunk, Tensor grad_u, Tensor grad_delta, Tensor grad_A, Tensor grad_B, Tensor grad_C, Tensor grad_D,
                        Tensor grad_z, Tensor grad_bias, Tensor grad_initial_state) {
  for_dtype(u, [&]<class T>(T) {
    const auto p = problem<T>(u, delta, A, B, C, D, z, bias, lower, upper, reverse_channels, softplus, chunk);
    if (p.batch * p.channels == 0) {
      for (Tensor* empty_sum : {&grad_A, &grad_B, &grad_C, &grad_D, &grad_bias})
        std::fill_n(mutable_data<T>(*empty_sum), empty_sum->numel(), T(0));
      return;
    }
    const auto run = p.upper ? (p.z ? backward<T, Clamp::kApply, true> : backward<T, Clamp::kApply, false>)
                             : (p.z ? backward<T, Clamp::kNone, true> : backward<T, Clamp::kNone, false>);
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
      " Tensor? initial_state, Tensor? lower, Tensor? upper, int reverse_channels, bool softplus, int chunk, bool count,"
      " Tensor(a!) y, Tensor(b!) last_state, Tensor(c!) chunk_states, Tensor(d!) saturation, Tensor(e!) least_step)"
      " -> ()");
  m.def(
      "selective_scan_bwd(Tensor grad_y, Tensor? grad_last_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C,"
      " Tensor? D, Tensor? z, Tensor? bias, Tensor? lower, Tensor? upper, Tensor chunk_states, int reverse_channels,"
      " bool softplus, int chunk,"
      " Tensor(a!) grad_u, Tensor(b!) grad_delta, Tensor(c!) grad_A, Tensor(d!) grad_B, Tensor(e!) grad_C,"
      " Tensor(f!) grad_D, Tensor(g!) grad_z, Tensor(h!) grad_bias, Tensor(i!) grad_initial_state) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&stablekern::selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&stablekern::selective_scan_bwd));
}
