// What the kernels of conjugate gradients share: the codes of methods and of failures, and powers of two.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "stablekern/simd.h"

namespace stablekern {

enum : int { kHermitian, kSymmetric, kAny };  // the methods cg, cocg, cgne
constexpr int32_t kMaxiter = 1, kIndefinite = 2, kBreakdown = 4, kNonFinite = 8, kAsymmetric = 16;

template <class T>
struct Bits {
  using integer = typename VecTypes<T>::integer;
  static constexpr int kMantissa = std::numeric_limits<T>::digits - 1;
  static constexpr int kBias = std::numeric_limits<T>::max_exponent - 1;
};
// 2^k for a normal one.
template <class T>
SK_INLINE T power_of_two(int k) {
  return std::bit_cast<T>(static_cast<typename Bits<T>::integer>(k + Bits<T>::kBias) << Bits<T>::kMantissa);
}
// k with 2^k <= size < 2^(k+1), that of the least normal number for all below it, 0 for what has none.
template <class T>
SK_INLINE int exponent_of(T size) {
  if (!(size > 0) || !std::isfinite(size)) return 0;
  const int field = static_cast<int>(std::bit_cast<typename Bits<T>::integer>(size) >> Bits<T>::kMantissa);
  return std::max(field, 1) - Bits<T>::kBias;
}

// times 2^k, |k| up to twice the largest exponent, in two factors, neither out of range where the product is not.
template <class T>
struct Power {
  T first, second;
  explicit Power(int k) : first(power_of_two<T>(k / 2)), second(power_of_two<T>(k - k / 2)) {}
  template <class V>
  SK_INLINE V operator*(V v) const {
    if constexpr (std::is_same_v<V, T>)
      return v * first * second;
    else
      return v * splat(first) * splat(second);
  }
};

}  // namespace stablekern
