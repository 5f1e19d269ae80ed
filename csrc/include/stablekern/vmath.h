// Elementary functions of whole vectors, for float and double, at any vector width.
//
// NaN comes out where NaN goes in, infinities and underflow give their limits, and no branch depends on a lane.
#pragma once

#include <cmath>

#include "stablekern/simd.h"

namespace stablekern {

// p * 2^n for integral n of -1100 to 1100 (-150 to 150 for float), rounded once also where the result is subnormal.
template <class T>
SK_INLINE Vec<T> scale_by_power(Vec<T> p, IVec<T> n) {
  constexpr int mantissa = sizeof(T) == 4 ? 23 : 52;
  constexpr int bias = sizeof(T) == 4 ? 127 : 1023;
  const IVec<T> half = n >> 1;
  const auto power = [](IVec<T> k) { return (Vec<T>)((k + bias) << mantissa); };
  return p * power(half) * power(n - half);
}

// e^x within 1.1 ulp. Reduction x = n ln2 + r, |r| <= ln2 / 2 (Cody & Waite), then e^r = 1 + r + r^2 g(r) with g a
// minimax polynomial (Remez) for the relative error of e^r: 3e-9 for float, 4e-18 for double.
template <class T>
SK_INLINE Vec<T> exp(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  // Beyond these the result is 0 or inf; NaN passes, being the second operand.
  x = min(splat<T>(single ? 89 : 710), max(splat<T>(single ? -104 : -746), x));
  // Adding 1.5 * 2^mantissa leaves the nearest integer in the low bits.
  const Vec<T> shift = splat<T>(single ? 0x1.8p23 : 0x1.8p52);
  const Vec<T> shifted = fma(x, splat<T>(1.4426950408889634), shift);
  const Vec<T> n = shifted - shift;
  // ln2 in two parts, the first with enough trailing zeros for n times it to be exact.
  Vec<T> r = fnma(n, splat<T>(single ? 0.693359375 : 6.93145751953125e-1), x);
  r = fnma(n, splat<T>(single ? -2.12194440054690583e-4 : 1.42860682030941723212e-6), r);
  Vec<T> g;
  if constexpr (single) {
    constexpr float c[] = {0.49999993487208544f, 0.16666521212603902f, 0.04166838108592899f, 0.00836864632664682f,
                           0.0013814752835021647f};
    g = splat<T>(c[4]);
    for (int k = 3; k >= 0; --k) g = fma(g, r, splat<T>(c[k]));
  } else {
    constexpr double c[] = {0.500000000000001,     0.16666666666666416,    0.041666666666531245,  0.008333333333493162,
                            0.001388888894330313,  0.00019841269508608312, 2.480149347507451e-05, 2.755758528871779e-06,
                            2.7630102437791943e-07, 2.5000169563362424e-08};
    g = splat<T>(c[9]);
    for (int k = 8; k >= 0; --k) g = fma(g, r, splat<T>(c[k]));
  }
  const Vec<T> p = fma(g * r, r, r) + splat<T>(1);
#if defined(SK_AVX512)
  return scale<T>(p, n);
#else
  return scale_by_power<T>(p, (IVec<T>)shifted - (IVec<T>)shift);
#endif
}

// The factor b of e^(a b), for many a: b log2(e) in two parts.
template <class T>
struct Exponent {
  Vec<T> high, low;

  explicit Exponent(Vec<T> b) {
    const Vec<T> log2e = splat<T>(1.4426950408889634);
    constexpr double rest = sizeof(T) == 4 ? 1.925963033500411e-8 : 2.0355273740931033e-17;
    high = b * log2e;
    low = fma(b, splat<T>(rest), fma(b, log2e, -high));
  }
};
#if defined(SK_AVX512)
// e^(a b) within 2 ulp for |a b| < 2^16, with the product unrounded: a b log2(e) = n + f, n a multiple of 1/32 and
// |f| <= 1/64; 2^f by a polynomial with p(0) = 1 (Remez; relative error 5.4e-8), the 32 roots of 2 out of two registers.
// A table costs a shuffle, which has ports of its own, and saves three of the multiply-adds, which bound the scans.
SK_INLINE Vec<float> exp_of_product(Vec<float> a, Vec<float> high, Vec<float> low) {
  alignas(64) static constexpr float roots[32] = {
      1.0f, 1.0218972f, 1.0442737f, 1.0671405f, 1.0905077f, 1.1143868f, 1.1387886f, 1.1637249f,
      1.1892071f, 1.2152474f, 1.2418578f, 1.269051f, 1.2968396f, 1.3252367f, 1.3542556f, 1.38391f,
      1.4142135f, 1.4451808f, 1.4768262f, 1.5091645f, 1.5422108f, 1.5759809f, 1.6104903f, 1.6457555f,
      1.6817929f, 1.7186193f, 1.7562522f, 1.7947091f, 1.8340081f, 1.8741677f, 1.9152066f, 1.9571441f};
  // 1.5 * 2^18 leaves 5 bits behind the binary point: in the sum they are the root's number, the bits the shuffle reads.
  const Vec<float> shift = splat<float>(0x1.8p18), shifted = fma(a, high, shift), n = shifted - shift;
  const Vec<float> f = fma(a, low, fma(a, high, -n));
  const Vec<float> root = (Vec<float>)_mm512_permutex2var_ps(_mm512_load_ps(roots), (__m512i)shifted, _mm512_load_ps(roots + 16));
  const Vec<float> p = fma(splat<float>(0.24022649228572845f), f, splat<float>(0.6931573152542114f));
  return scale<float>(fma(root * f, p, root), n);  // which takes the floor of n
}
#endif

// log(1 + e) for e in [0, 1], within 3 ulp and without losing small e: 2 atanh(s) with s = e / (2 + e) <= 1/3, an odd
// series whose interpolation at the Chebyshev nodes of s^2 has the relative error 1e-10 for float, 2e-20 for double.
template <class T>
SK_INLINE Vec<T> log1p_unit(Vec<T> e) {
  const Vec<T> s = e / (e + splat<T>(2)), z = s * s;
  Vec<T> series;
  if constexpr (sizeof(T) == 4) {
    constexpr float c[] = {2.0f,                 0.6666667902643397f,  0.39998711246862332f,
                           0.28620207408437238f, 0.21398560506678543f, 0.24393908084023025f};
    series = splat<T>(c[5]);
    for (int k = 4; k >= 0; --k) series = fma(series, z, splat<T>(c[k]));
  } else {
    constexpr double c[] = {2.0, 0.666666666666666833, 0.399999999999928668, 0.28571428572622928, 0.222222221191036744, 0.181818234224952525, 0.153844470604599676, 0.133368768157438354, 0.117152746681104253, 0.109766166379474941, 0.0698039049833243202, 0.164882859313895686};
    series = splat<T>(c[11]);
    for (int k = 10; k >= 0; --k) series = fma(series, z, splat<T>(c[k]));
  }
  return s * series;
}

// 1 / (1 + e^-x), by an exponential that cannot overflow.
template <class T>
SK_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> e = exp<T>(-abs(x)), one = splat<T>(1);
  return select(less(x, Vec<T>{}), e, one) / (one + e);
}

template <class T>
struct Softplus {
  Vec<T> value, slope;
};
// log(1 + e^x), and its derivative.
template <class T>
SK_INLINE Softplus<T> softplus(Vec<T> x) {
  const Vec<T> e = exp<T>(-abs(x)), one = splat<T>(1);
  // NaN, the second operand of `max`, passes.
  return {max(Vec<T>{}, x) + log1p_unit<T>(e), select(less(x, Vec<T>{}), e, one) / (one + e)};
}

template <class T>
struct SineCosine {
  Vec<T> sine, cosine;
};
// Within 2 ulp of the larger one of the two. x = n pi/2 + r, |r| <= pi/4 (Cody & Waite, pi/2 in three parts), then the
// polynomials of Cephes (sinf.c, sin.c); lane by lane where n is so large that the parts do not do, or where a product and
// a sum round twice.
template <class T>
SK_INLINE SineCosine<T> sine_cosine(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
#if defined(SK_AVX512) || defined(SK_AVX2)
  const Mask<T> far = !less(abs(x), splat<T>(single ? 0x1p16 : 0x1p28));
#else
  const Mask<T> far = !none_set<T>();
#endif
  const Vec<T> shift = splat<T>(single ? 0x1.8p23 : 0x1.8p52), one = splat<T>(1);
  const Vec<T> shifted = fma(select(far, Vec<T>{}, x), splat<T>(0.6366197723675814), shift), n = shifted - shift;
  Vec<T> r = fnma(n, splat<T>(single ? 1.5707963705062866 : 1.5707963267948966), x);
  r = fnma(n, splat<T>(single ? -4.371138828673793e-08 : 6.123233995736766e-17), r);
  r = fnma(n, splat<T>(single ? -1.7151245100058819e-15 : -1.4973849048591698e-33), r);
  const Vec<T> square = r * r;
  Vec<T> s, c;
  if constexpr (single) {
    s = fma(fma(splat<T>(-1.9515295891e-4), square, splat<T>(8.3321608736e-3)), square, splat<T>(-1.6666654611e-1));
    c = fma(fma(splat<T>(2.443315711809948e-5), square, splat<T>(-1.388731625493765e-3)), square,
            splat<T>(4.166664568298827e-2));
  } else {
    constexpr double of_sine[] = {-1.66666666666666307295e-1, 8.33333333332211858878e-3,  -1.98412698295895385996e-4,
                                  2.75573136213857245213e-6,  -2.50507477628578072866e-8, 1.58962301576546568060e-10};
    constexpr double of_cosine[] = {4.16666666666665929218e-2,  -1.38888888888730564116e-3, 2.48015872888517045348e-5,
                                    -2.75573141792967388112e-7, 2.08757008419747316778e-9,  -1.13585365213876817300e-11};
    s = splat<T>(of_sine[5]), c = splat<T>(of_cosine[5]);
    for (int k = 4; k >= 0; --k) s = fma(s, square, splat<T>(of_sine[k])), c = fma(c, square, splat<T>(of_cosine[k]));
  }
  const Vec<T> sine = fma(s * square, r, r), cosine = fma(c * square, square, fma(square, splat<T>(-0.5), one));
  const IVec<T> quarter = (IVec<T>)shifted - (IVec<T>)shift;
  const Mask<T> odd = equal_to<T>(quarter & 1, 1);
  constexpr int to_sign = single ? 30 : 62;
  SineCosine<T> result{flip_sign(select(odd, cosine, sine), (Vec<T>)((quarter & 2) << to_sign)),
                       flip_sign(select(odd, sine, cosine), (Vec<T>)(((quarter + 1) & 2) << to_sign))};
  if (any(far))
    for (int k = 0; k < kLanes<T>; ++k)
      if (lane_bits(far) >> k & 1) result.sine[k] = std::sin(x[k]), result.cosine[k] = std::cos(x[k]);
  return result;
}

}  // namespace stablekern
