// One step of the Mamba-2 scan in place; the mathematics is in stablekern/ops/ssd_state_update.py, the way through the
// state in state_update.h. A head has one step size and one decay, so a block of rows takes one exponential.
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
struct Heads {
  int64_t count, width;
  bool softplus;
  const T *dt, *A;
  const T* bias;           // (heads) or null
  const T *lower, *upper;  // (heads, width) or null
};

template <class T, bool kClamp>
struct Block {
  Vec<T> step, decays, lower, upper;  // a lane a row

  Block(const Heads<T>& heads, int64_t row, int rows) : step{}, decays{}, lower{}, upper{} {
    Vec<T> rate{};
    for (int r = 0; r < rows; ++r) {
      const int64_t of_item = (row + r) / heads.width, head = of_item % heads.count;
      step[r] = heads.dt[of_item] + (heads.bias ? heads.bias[head] : T(0));
      rate[r] = heads.A[head];
    }
    step = step_size<T>(step, heads.softplus);
    decays = exp<T>(step * rate);
    if constexpr (kClamp) {
      const int64_t channel = row % (heads.count * heads.width);
      lower = load_first(heads.lower + channel, rows), upper = load_first(heads.upper + channel, rows);
    }
  }
  SK_INLINE Vec<T> next(Vec<T> h, Vec<T> entering, int r, int64_t, int64_t) const {
    h = fma(splat<T>(decays[r]), h, entering);
    if constexpr (kClamp) return min(splat<T>(upper[r]), max(splat<T>(lower[r]), h));  // NaN, the second operand, passes
    return h;
  }
};

void ssd_state_update_fwd(Tensor state, const Tensor x, const Tensor dt, const Tensor A, const Tensor B, const Tensor C,
                          const std::optional<Tensor> D, const std::optional<Tensor> z, const std::optional<Tensor> bias,
                          const std::optional<Tensor> lower, const std::optional<Tensor> upper, bool softplus, Tensor y) {
  for_dtype(x, [&]<class T>(T) {
    const Heads<T> heads{x.size(1),  x.size(2),     softplus,       data<T>(dt),
                         data<T>(A), data<T>(bias), data<T>(lower), data<T>(upper)};
    const StateUpdate<T> p{x.size(0),  heads.count * heads.width, B.size(1),  B.size(2),  mutable_data<T>(state), data<T>(x),
                           data<T>(B), data<T>(C),                data<T>(D), data<T>(z), mutable_data<T>(y)};
    if (upper)
      update_states(p, [&](int64_t row, int rows) { return Block<T, true>(heads, row, rows); });
    else
      update_states(p, [&](int64_t row, int rows) { return Block<T, false>(heads, row, rows); });
  });
}

}  // namespace
}  // namespace stablekern

STABLE_TORCH_LIBRARY_FRAGMENT(stablekern_native, m) {
  m.def(
      "ssd_state_update_fwd(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z,"
      " Tensor? bias, Tensor? lower, Tensor? upper, bool softplus, Tensor(b!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(stablekern_native, CPU, m) {
  m.impl("ssd_state_update_fwd", TORCH_BOX(&stablekern::ssd_state_update_fwd));
}
