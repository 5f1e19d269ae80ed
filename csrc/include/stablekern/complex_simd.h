// Complex numbers in SIMD lanes, and names by which one kernel is written for real and complex matrices alike.
//
// `Element<S>` is a lane's scalar S in every lane: `Vec<T>` for a real S = T, `ComplexVec<T>` for std::complex<T>. The
// functions below have both meanings; for a real argument conj is the identity and modulus is abs.
#pragma once

#include <complex>

#include "stablekern/simd.h"

namespace stablekern {

template <class T>
struct ComplexVec {
  Vec<T> re, im;
};

template <class S>
struct ScalarTypes {
  using Real = S;
  using Element = Vec<S>;
};
template <class T>
struct ScalarTypes<std::complex<T>> {
  using Real = T;
  using Element = ComplexVec<T>;
};
template <class S>
using RealOf = typename ScalarTypes<S>::Real;
template <class S>
using Element = typename ScalarTypes<S>::Element;
template <class S>
constexpr bool kIsComplex = sizeof(S) != sizeof(RealOf<S>);
template <class S>
constexpr int kParts = kIsComplex<S> ? 2 : 1;  // reals to an element

template <class T>
SK_INLINE ComplexVec<T> operator+(ComplexVec<T> a, ComplexVec<T> b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
SK_INLINE ComplexVec<T> operator-(ComplexVec<T> a, ComplexVec<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
SK_INLINE ComplexVec<T> operator-(ComplexVec<T> a) {
  return {-a.re, -a.im};
}
template <class T>
SK_INLINE ComplexVec<T> operator*(ComplexVec<T> a, Vec<T> b) {
  return {a.re * b, a.im * b};
}
template <class T>
SK_INLINE ComplexVec<T> operator/(ComplexVec<T> a, Vec<T> b) {
  return {a.re / b, a.im / b};
}
template <class T>
SK_INLINE ComplexVec<T> operator*(ComplexVec<T> a, ComplexVec<T> b) {
  return {fnma(a.im, b.im, a.re * b.re), fma(a.im, b.re, a.re * b.im)};
}
template <class T>
SK_INLINE ComplexVec<T> fma(ComplexVec<T> a, ComplexVec<T> b, ComplexVec<T> c) {
  return {fnma(a.im, b.im, fma(a.re, b.re, c.re)), fma(a.im, b.re, fma(a.re, b.im, c.im))};
}
template <class T>
SK_INLINE ComplexVec<T> fma(Vec<T> a, ComplexVec<T> b, ComplexVec<T> c) {
  return {fma(a, b.re, c.re), fma(a, b.im, c.im)};
}
template <class T>
SK_INLINE ComplexVec<T> select(Mask<T> m, ComplexVec<T> yes, ComplexVec<T> no) {
  return {select(m, yes.re, no.re), select(m, yes.im, no.im)};
}

template <class V>
SK_INLINE V conj(V a) {
  return a;
}
template <class T>
SK_INLINE ComplexVec<T> conj(ComplexVec<T> a) {
  return {a.re, -a.im};
}
// conj(a) * b + c
template <class V>
SK_INLINE V fma_conj(V a, V b, V c) {
  return fma(a, b, c);
}
template <class T>
SK_INLINE ComplexVec<T> fma_conj(ComplexVec<T> a, ComplexVec<T> b, ComplexVec<T> c) {
  return {fma(a.im, b.im, fma(a.re, b.re, c.re)), fnma(a.im, b.re, fma(a.re, b.im, c.im))};
}
template <class V>
SK_INLINE V real_part(V a) {
  return a;
}
template <class T>
SK_INLINE Vec<T> real_part(ComplexVec<T> a) {
  return a.re;
}
// The element whose real part this is.
template <class S>
SK_INLINE Element<S> element(Vec<RealOf<S>> a) {
  if constexpr (kIsComplex<S>)
    return {a, Vec<RealOf<S>>{}};
  else
    return a;
}
// |a|^2 + c
template <class V>
SK_INLINE V add_square(V a, V c) {
  return fma(a, a, c);
}
template <class T>
SK_INLINE Vec<T> add_square(ComplexVec<T> a, Vec<T> c) {
  return fma(a.im, a.im, fma(a.re, a.re, c));
}
// Right while the square is in range.
template <class V>
SK_INLINE V modulus(V a) {
  return abs(a);
}
template <class T>
SK_INLINE Vec<T> modulus(ComplexVec<T> a) {
  return sqrt(add_square(a, Vec<T>{}));
}
// The largest of the parts' moduli: a size that no square over- or underflows in.
template <class V>
SK_INLINE V part_size(V a) {
  return abs(a);
}
template <class T>
SK_INLINE Vec<T> part_size(ComplexVec<T> a) {
  return max(abs(a.re), abs(a.im));
}
// `length` times a's sign or phase; that of 0 is 1.
template <class V>
SK_INLINE V toward(V a, V length) {
  return flip_sign(length, sign_of(a));
}
template <class T>
SK_INLINE ComplexVec<T> toward(ComplexVec<T> a, Vec<T> length) {
  const Vec<T> zero{};
  a = a * power_of_two<T>(part_size(a)).down;  // the square of the modulus is in range
  const Vec<T> size = modulus(a);
  const Mask<T> none = equal(size, zero);
  return select(none, ComplexVec<T>{length, zero}, a * (length / select(none, zero + T(1), size)));
}
// `probe`, or NaN where a part of `a` is not finite.
template <class V>
SK_INLINE V probe_finite(V a, V probe) {
  return fma(a, V{}, probe);
}
template <class T>
SK_INLINE Vec<T> probe_finite(ComplexVec<T> a, Vec<T> probe) {
  return fma(a.re, Vec<T>{}, fma(a.im, Vec<T>{}, probe));
}

}  // namespace stablekern
