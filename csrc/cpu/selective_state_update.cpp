// One step of the Mamba-1 scan in place; the mathematics is in stablekern/ops/selective_state_update.py, the way through
// the state in state_update.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "stablekern/state_update.h"
#include "stablekern/tensor.h"

namespace stablekern {
namespace {

using torch::stable::Tensor;

template <class T>
struct Channels {
  int64_t count, states;
  bool softplus;
  const T *dt, *A;
  const T* bias;           // (channels) or null
  const T *lower, *upper;  // (channels, states) or null; `upper` alone bounds a modulus
};

// A complex state is two, its parts, in neighbouring lanes.
template <class T, bool kClamp, bool kComplex>
struct Block {
  const Channels<T>& p;
  int64_t channel;
  Vec<T> step;  // a lane a row
  Vec<T> sign;  // with which imaginary parts meet the exchanged ones

  Block(const Channels<T>& channels, int64_t row, int rows) : p(channels), channel(row % p.count) {
    step = load_first(p.dt + row, rows);
    if (p.bias) step += load_first(p.bias + channel, rows);
    step = step_size<T>(step, p.softplus);
    for (int lane = 0; lane < kLanes<T>; ++lane) sign[lane] = lane % 2 ? T(0) : -T(0);
  }
  SK_INLINE Vec<T> of_states(const T* from, int r, int64_t i, int64_t left) const {
    return load_block(from + (channel + r) * p.states + i, 0, left);
  }
  SK_INLINE Vec<T> next(Vec<T> h, Vec<T> entering, int r, int64_t i, int64_t left) const {
    const Vec<T> exponent = splat<T>(step[r]) * of_states(p.A, r, i, left);
    if constexpr (kComplex) {
      const Vec<T> size = exp<T>(first_of_pairs<T>(exponent));
      const SineCosine<T> turn = sine_cosine<T>(second_of_pairs<T>(exponent));
      h = fma(size * turn.cosine, h, fma(flip_sign(size * turn.sine, sign), swap_pairs<T>(h), entering));
    } else {
      h = fma(exp<T>(exponent), h, entering);
    }
    return kClamp ? clamp(h, r, i, left) : h;
  }
  SK_INLINE Vec<T> clamp(Vec<T> h, int r, int64_t i, int64_t left) const {
    const Vec<T> most = of_states(p.upper, r, i, left);
    if constexpr (kComplex) {
      // By the larger part first: no square that over- or underflows. NaN compares as inside, and passes.
      const Vec<T> parts = abs(h), largest = max(parts, swap_pairs<T>(parts)), one = splat<T>(1);
      const Vec<T> scaled = h / select(equal(largest, Vec<T>{}), one, largest), square = scaled * scaled;
      const Vec<T> length = sqrt(square + swap_pairs<T>(square));
      return select(less(most, largest * length), scaled / length * most, h);
    } else {
      return min(most, max(of_states(p.lower, r, i, left), h));  // NaN, the second operand, passes
    }
  }
};

void selective_state_update_fwd(Tensor state, const Tensor x, const Tensor dt, const Tensor A, const Tensor B, const Tensor C,
                                const std::optional<Tensor> D, const std::optional<Tensor> z, const std::optional<Tensor> bias,
                                const std::optional<Tensor> lower, const std::optional<Tensor> upper, bool softplus, Tensor y) {
  for_dtype(x, [&]<class T>(T) {
    const bool is_complex = A.dim() == 3;  // (channels, states, 2)
    const Channels<T> channels{x.size(1),  A.size(1) * (is_complex ? 2 : 1), softplus,       data<T>(dt),
                               data<T>(A), data<T>(bias),                    data<T>(lower), data<T>(upper)};
    const StateUpdate<T> p{x.size(0),  channels.count, B.size(1),  channels.states, mutable_data<T>(state), data<T>(x),
                           data<T>(B), data<T>(C),     data<T>(D), data<T>(z),      mutable_data<T>(y)};
    const auto run = [&]<bool kClamp, bool kComplex>() {
      update_states(p, [&](int64_t row, int rows) { return Block<T, kClamp, kComplex>(channels, row, rows); });
    };
    if (is_complex)
      upper ? run.template operator()<true, true>() : run.template operator()<false, true>();
    else
      upper ? run.template operator()<true, false>() : run.template operator()<false, false>();
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
