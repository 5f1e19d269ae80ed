// The clamp of a scan's states h' = a h + token B, and when it need not be done.
//
// To clamp a state by two bounds takes as long as two multiply-adds, and to keep where it acted, for the way back, as long
// as two more. Over a few steps it can mostly be shown that it does not act: as long as it does not, and every |a| <= 1,
// |h| <= |h_0| + sum_t |token_t B_t| <= |h_0| + |token| |B|, with Euclidean norms over time. Where that is within the
// bounds, steps without a clamp give the same bits; where it is finite, no state on the way can be NaN.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "stablekern/lanes.h"
#include "stablekern/simd.h"

namespace stablekern {

// What is done to states, the more the later. kModulus: as kApply, where the bounds are -c and c and no state can be NaN.
// kCount: and tell how often it changed one.
enum class Clamp { kNone, kModulus, kApply, kCount };

template <class T>
struct Bounds {
  Vec<T> lower, upper;

  template <Clamp kClamp>
  SK_INLINE Vec<T> apply(Vec<T> h) const {
    if constexpr (kClamp == Clamp::kNone) return h;
    else if constexpr (kClamp == Clamp::kModulus) return limit_modulus(h, upper);
    else return min(upper, max(lower, h));  // NaN, the second operand, passes
  }
  SK_INLINE Mask<T> changes(Vec<T> h) const { return less(h, lower) | less(upper, h); }
};

// Of some states together: moduli below `free` are within all their bounds, below `calm` kModulus does for them.
template <class T>
struct Reach {
  Vec<T> free = splat(std::numeric_limits<T>::infinity()), calm = splat(std::numeric_limits<T>::max());

  // `decays`: where |a| <= 1 holds, without which nothing is known of a state.
  SK_INLINE void include(const Bounds<T>& bounds, Mask<T> decays) {
    const Vec<T> none = splat(-std::numeric_limits<T>::infinity()), below = -bounds.lower;
    free = min(free, select(decays, min(bounds.upper, below), none));
    calm = min(calm, select(decays & equal(bounds.upper, below), calm, none));
  }
  // Lanes from `lanes` on stand for no state.
  void leave_out_from(int64_t lanes) {
    for (int64_t k = lanes; k < kLanes<T>; ++k) free[k] = Reach{}.free[k], calm[k] = Reach{}.calm[k];
  }
};

// A bound of a norm by the sum of its `count` squares, of which none counts less than what it may have underflowed from.
template <class T>
SK_INLINE Vec<T> norm_bound(Vec<T> squares, int64_t count) {
  return sqrt(squares + splat(static_cast<T>(count) * std::numeric_limits<T>::min()));
}

// For each of `states` columns its norm over `steps` rows, which lie `stride` apart; infinite where one is NaN. `norms`
// holds whole vectors.
template <class T>
void column_norms(const T* rows, int64_t stride, int64_t states, int64_t steps, T* norms) {
  for (int64_t i = 0; i < states; i += kLanes<T>) {
    Vec<T> squares{};
    for (int64_t t = 0; t < steps; ++t) {
      const Vec<T> row = load_block(rows + t * stride + i, 0, states - i);
      squares = fma(row, row, squares);
    }
    const Vec<T> norm = norm_bound<T>(squares, steps), infinity = splat(std::numeric_limits<T>::infinity());
    store(norms + i, select(less(norm, infinity), norm, infinity));
  }
}

// The largest of the norms of N columns, for `clamp_needed`.
template <int N, class T>
SK_INLINE T largest_norm(const T* norms) {
  T largest = norms[0];
  for (int i = 1; i < N; ++i) largest = std::max(largest, norms[i]);
  return largest;
}

// The larger of the modulus `most` and that of v; NaN, once met, stays: moduli are ordered as their bits are, and it comes
// last.
template <class T>
SK_INLINE Vec<T> larger_modulus(Vec<T> most, Vec<T> v) {
  const IVec<T> bits = (IVec<T>)most, own = (IVec<T>)abs(v);
  return (Vec<T>)(own > bits ? own : bits);
}

// What needs to be done to N states from `state(i)` on, by the norms of their tokens and B. Where any of it is NaN: kApply.
template <int N, class T, class State>
SK_INLINE Clamp clamp_needed(Vec<T> tokens, T norm, const State& state, const Reach<T>& reach) {
  constexpr T kRounding = T(1.001);  // far more than that of the steps and norms
  Vec<T> largest = abs(state(0));
#pragma GCC unroll 16
  for (int i = 1; i < N; ++i) largest = larger_modulus<T>(largest, state(i));
  const Vec<T> most = fma(tokens, splat(norm), largest) * splat(kRounding);
  if (!any(!less(most, reach.free))) return Clamp::kNone;
  return any(!less(most, reach.calm)) ? Clamp::kApply : Clamp::kModulus;
}

// f.operator()<what is done>(), where `kMost` is all that could be asked for and `needed` suffices.
template <Clamp kMost, class F>
SK_INLINE void with_clamp(Clamp needed, const F& f) {
  if (kMost == Clamp::kNone || needed == Clamp::kNone)
    f.template operator()<Clamp::kNone>();
  else if (kMost == Clamp::kApply && needed == Clamp::kModulus)
    f.template operator()<kMost == Clamp::kApply ? Clamp::kModulus : kMost>();
  else
    f.template operator()<kMost>();
}

}  // namespace stablekern
