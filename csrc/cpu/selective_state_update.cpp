// One step of the Mamba-1 scan in place; the mathematics is in stablekern/ops/selective_state_update.py.
//
// A step is bound by the memory that the state moves through, so rows are taken as they lie: the states of one channel
// are the lanes, and as many channels as there are lanes go together, for their sums to be reduced at once.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "stablekern/lanes.h"
#include "stablekern/simd.h"
#include "stablekern/tensor.h"
#include "stablekern/vmath.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

constexpr int64_t kThreadWork = 1 << 16;  // states, some 20 microseconds; less is done by one thread

template <class T>
struct Update {
  int64_t channels, groups, states;
  bool softplus;
  T* state;
  const T *x, *dt, *A, *B, *C;
  const T *D, *z, *bias;   // or null
  const T *lower, *upper;  // (channels, states) or null
  T* y;
};

// The step sizes of `count` <= kLanes channels from `row` on (a row is a channel of one batch item).
template <class T>
Vec<T> steps(const Update<T>& p, int64_t row, int count) {
  Vec<T> step = load_first(p.dt + row, count);
  if (p.bias) step += load_first(p.bias + row % p.channels, count);
  return p.softplus ? max(Vec<T>{}, step) + log1p_unit<T>(exp<T>(-abs(step))) : step;
}

// `count` channels of one batch item and group.
template <class T, bool kClamp>
void update_rows(const Update<T>& p, int64_t row, int64_t group, int count) {
  const T *enter = p.B + group * p.states, *leave = p.C + group * p.states;
  const int64_t channel = row % p.channels;
  const Vec<T> step = steps(p, row, count), x = load_first(p.x + row, count), token = step * x;
  Vec<T> sums[kLanes<T>] = {};
  for (int r = 0; r < count; ++r) {
    T* state = p.state + (row + r) * p.states;
    const T* rate = p.A + (channel + r) * p.states;
    const Vec<T> own_step = splat<T>(step[r]), own_token = splat<T>(token[r]);
    for (int64_t i = 0; i < p.states; i += kLanes<T>) {
      const int64_t left = p.states - i;
      const Vec<T> decay = exp<T>(own_step * load_block(rate + i, 0, left));
      Vec<T> h = fma(decay, load_block(state + i, 0, left), own_token * load_block(enter + i, 0, left));
      if constexpr (kClamp) {
        const int64_t bound = (channel + r) * p.states + i;
        h = min(load_block(p.upper + bound, 0, left), max(load_block(p.lower + bound, 0, left), h));  // NaN passes
      }
      store_block(state + i, h, 0, left);
      // Lanes beyond the last state are 0 * 0, or NaN where the token is not finite: they must not be summed.
      if (left < kLanes<T>) h = load_block(state + i, 0, left);
      sums[r] = fma(h, load_block(leave + i, 0, left), sums[r]);
    }
  }
  Vec<T> y = horizontal_sums<T>(sums);
  if (p.D) y = fma(load_first(p.D + channel, count), x, y);
  if (p.z) {
    const Vec<T> z = load_first(p.z + row, count), e = exp<T>(-abs(z)), one = splat<T>(1);
    y *= z * (select(less(z, Vec<T>{}), e, one) / (one + e));
  }
  store_first(p.y + row, y, count);
}

template <class T, bool kClamp>
void update(const Update<T>& p, int64_t batch) {
  const int64_t width = p.channels / p.groups, blocks = padded_to_lanes<T>(width) / kLanes<T>;
  const int64_t grain = kThreadWork / std::max<int64_t>(1, kLanes<T> * (p.states + 1)) + 1;
  torch::stable::parallel_for(0, batch * p.groups * blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t group = k / blocks, first = k % blocks * kLanes<T>;
      update_rows<T, kClamp>(p, group * width + first, group, static_cast<int>(std::min<int64_t>(kLanes<T>, width - first)));
    }
  });
}

void selective_state_update_fwd(Tensor state, const Tensor x, const Tensor dt, const Tensor A, const Tensor B, const Tensor C,
                                const std::optional<Tensor> D, const std::optional<Tensor> z, const std::optional<Tensor> bias,
                                const std::optional<Tensor> lower, const std::optional<Tensor> upper, bool softplus, Tensor y) {
  for_dtype(x, [&]<class T>(T) {
    const Update<T> p{x.size(1),  B.size(1),  A.size(1),  softplus,   mutable_data<T>(state), data<T>(x),     data<T>(dt),
                      data<T>(A), data<T>(B), data<T>(C), data<T>(D), data<T>(z),             data<T>(bias),  data<T>(lower),
                      data<T>(upper), mutable_data<T>(y)};
    if (x.numel() == 0) return;
    p.upper ? update<T, true>(p, x.size(0)) : update<T, false>(p, x.size(0));
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "selective_state_update_fwd(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
      " Tensor? bias, Tensor? lower, Tensor? upper, bool softplus, Tensor(b!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("selective_state_update_fwd", TORCH_BOX(&stablekern::selective_state_update_fwd));
}
