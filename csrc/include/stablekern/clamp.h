// The clamp of a scan's states h' = a h + token B, and when it need not be done.
//
// To clamp a state by two bounds takes as long as two multiply-adds, and to keep where it acted, for the way back, as long
// as two more. Over a few steps it can mostly be shown that it does not act: as long as it does not, and every |a| <= 1,
// |h| <= |h_0| + sum_t |token_t B_t| <= |h_0| + |token| |B|, with Euclidean norms over time. Where that is within the
// bounds, steps without a clamp give the same bits; where it is finite, no state on the way can be NaN.
#pragma once

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
  Vec<T> reach;  // the modulus within both, -inf where nothing is known of a state: where |a| <= 1 may not hold

  SK_INLINE void reach_where(Mask<T> decays) {
    reach = select(decays, min(upper, -lower), splat(-std::numeric_limits<T>::infinity()));
  }
  // Lanes from `lanes` on stand for no state, and hinder nothing.
  void reach_beyond(int64_t lanes) {
    for (int64_t k = lanes; k < kLanes<T>; ++k) upper[k] = reach[k] = std::numeric_limits<T>::infinity(), lower[k] = -upper[k];
  }
  template <Clamp kClamp>
  SK_INLINE Vec<T> apply(Vec<T> h) const {
    if constexpr (kClamp == Clamp::kNone) return h;
    else if constexpr (kClamp == Clamp::kModulus) return limit_modulus(h, upper);
    else return min(upper, max(lower, h));  // NaN, the second operand, passes
  }
  SK_INLINE Mask<T> changes(Vec<T> h) const { return less(h, lower) | less(upper, h); }
};

// A bound of a norm by the sum of its `count` squares, of which none counts less than what it may have underflowed from.
template <class T>
SK_INLINE Vec<T> norm_bound(Vec<T> squares, int64_t count) {
  return sqrt(squares + splat(static_cast<T>(count) * std::numeric_limits<T>::min()));
}

// For each of `states` columns its norm over `steps` rows, which lie `stride` apart. `norms` holds whole vectors.
template <class T>
void column_norms(const T* rows, int64_t stride, int64_t states, int64_t steps, T* norms) {
  for (int64_t i = 0; i < states; i += kLanes<T>) {
    Vec<T> squares{};
    for (int64_t t = 0; t < steps; ++t) {
      const Vec<T> row = load_block(rows + t * stride + i, 0, states - i);
      squares = fma(row, row, squares);
    }
    store(norms + i, norm_bound<T>(squares, steps));
  }
}

// What needs to be done to N states from `state(i)` on, with `bounds(i)`, by the norms of their tokens and B. Where any of
// it is NaN: kApply.
template <int N, class T, class State, class BoundsOf>
SK_INLINE Clamp clamp_needed(Vec<T> tokens, const T* norms, const State& state, const BoundsOf& bounds) {
  constexpr T kRounding = T(1.001);  // far more than that of the steps and norms
  Vec<T> most[N];
  Mask<T> free = !none_set<T>();
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) {
    most[i] = fma(tokens, splat(norms[i]), abs(state(i))) * splat(kRounding);
    free = free & less(most[i], bounds(i).reach);
  }
  if (!any(!free)) return Clamp::kNone;
  Mask<T> calm = !none_set<T>();
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i)  // a reach of -inf is not the upper bound
    calm = calm & less(most[i], splat(std::numeric_limits<T>::max())) & equal(bounds(i).upper, bounds(i).reach) &
           equal(-bounds(i).lower, bounds(i).reach);
  return any(!calm) ? Clamp::kApply : Clamp::kModulus;
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
