// One step of a scan in place, for kernels whose state is (batch, channels, states).
//
// A step is bound by the memory that the state moves through, so rows are taken as they lie: the states of one channel
// are the lanes, and as many channels as there are lanes go together, for their sums to be reduced at once.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "stablekern/lanes.h"
#include "stablekern/simd.h"
#include "stablekern/vmath.h"

namespace stablekern {

constexpr int64_t kUpdateThreadWork = 1 << 16;  // states, some 20 microseconds; less is done by one thread

template <class T>
struct StateUpdate {
  int64_t batch, channels, groups, states;
  T* state;
  const T *x, *B, *C;
  const T *D, *z;  // (channels) and like x, or null
  T* y;
};

// dt, or log(1 + e^dt).
template <class T>
SK_INLINE Vec<T> step_size(Vec<T> dt, bool with_softplus) {
  return with_softplus ? softplus<T>(dt).value : dt;
}

// `count` channels of one batch item and group, from `row` on (a row is a channel of one batch item). `block` knows what
// differs between scans: `step`, a lane a row, and what the states i, i + 1, ... (`left` in number) of row r become: the
// `next` ones, by their decay, by what enters and by a clamp.
template <class T, class Block>
SK_INLINE void update_rows(const StateUpdate<T>& p, int64_t row, int64_t group, int count, const Block& block) {
  const T *enter = p.B + group * p.states, *leave = p.C + group * p.states;
  const Vec<T> x = load_first(p.x + row, count), token = block.step * x;
  Vec<T> sums[kLanes<T>] = {};
  for (int r = 0; r < count; ++r) {
    T* state = p.state + (row + r) * p.states;
    const Vec<T> own_token = splat<T>(token[r]);
    for (int64_t i = 0; i < p.states; i += kLanes<T>) {
      const int64_t left = p.states - i;
      Vec<T> h = block.next(load_block(state + i, 0, left), own_token * load_block(enter + i, 0, left), r, i, left);
      store_block(state + i, h, 0, left);
      // Lanes beyond the last state are 0 * 0, or NaN where the token is not finite: they must not be summed.
      if (left < kLanes<T>) h = load_block(state + i, 0, left);
      sums[r] = fma(h, load_block(leave + i, 0, left), sums[r]);
    }
  }
  Vec<T> y = horizontal_sums<T>(sums);
  if (p.D) y = fma(load_first(p.D + row % p.channels, count), x, y);
  if (p.z) {
    const Vec<T> z = load_first(p.z + row, count);
    y *= z * sigmoid<T>(z);
  }
  store_first(p.y + row, y, count);
}

// All rows; `block(row, count)` makes what `update_rows` wants to know of them.
template <class T, class MakeBlock>
void update_states(const StateUpdate<T>& p, const MakeBlock& block) {
  if (p.batch * p.channels == 0) return;
  const int64_t width = p.channels / p.groups, blocks = padded_to_lanes<T>(width) / kLanes<T>;
  const int64_t grain = kUpdateThreadWork / std::max<int64_t>(1, kLanes<T> * (p.states + 1)) + 1;
  torch::stable::parallel_for(0, p.batch * p.groups * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t group = k / blocks, first = k % blocks * kLanes<T>, row = group * width + first;
      const int count = static_cast<int>(std::min<int64_t>(kLanes<T>, width - first));
      update_rows(p, row, group, count, block(row, count));
    }
  });
}

}  // namespace stablekern
