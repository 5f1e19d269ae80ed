// What the CUDA kernels share: real and complex elements, and reductions over groups of lanes of one warp.
//
// Device code for NVRTC, without any header of the toolkit. The tests compile it for the host too, with definitions of
// the built-in names that run the lanes of a warp one after another between their meeting points.
#pragma once

#define SK_DEVICE __device__ __forceinline__

namespace stablekern {

constexpr unsigned kWholeWarp = 0xffffffffu;

template <class T>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float epsilon = 0x1p-23f, smallest = 0x1p-126f;
  static constexpr int exponent = 126;  // powers of two up to it have an inverse, both normal
};
template <>
struct Limits<double> {
  static constexpr double epsilon = 0x1p-52, smallest = 0x1p-1022;
  static constexpr int exponent = 1022;
};

// A square below this has lost relative accuracy to underflow; its root is still far below eps times a scaled matrix.
template <class T>
constexpr T kSquareFloor = Limits<T>::smallest / Limits<T>::epsilon;

// ---- elements ------------------------------------------------------------------------------------------------------

template <class T>
struct alignas(2 * sizeof(T)) Complex {
  T re, im;
};

template <class T>
SK_DEVICE T conjugate(T x) {
  return x;
}
template <class T>
SK_DEVICE Complex<T> conjugate(Complex<T> x) {
  return {x.re, -x.im};
}
template <class T>
SK_DEVICE T real_part(T x) {
  return x;
}
template <class T>
SK_DEVICE T real_part(Complex<T> x) {
  return x.re;
}
template <class T>
SK_DEVICE T imaginary_part(T) {
  return T(0);
}
template <class T>
SK_DEVICE T imaginary_part(Complex<T> x) {
  return x.im;
}
template <class T>
SK_DEVICE T add_imaginary(T x, T) {
  return x;
}
template <class T>
SK_DEVICE Complex<T> add_imaginary(Complex<T> x, T y) {
  return {x.re, x.im + y};
}
template <class T>
SK_DEVICE T square_of(T x) {
  return x * x;
}
template <class T>
SK_DEVICE T square_of(Complex<T> x) {
  return fma(x.re, x.re, x.im * x.im);
}
SK_DEVICE float modulus(float x) { return fabs(x); }
SK_DEVICE double modulus(double x) { return fabs(x); }
SK_DEVICE float modulus(Complex<float> x) { return hypot(x.re, x.im); }
SK_DEVICE double modulus(Complex<double> x) { return hypot(x.re, x.im); }
// Of the real and the imaginary part: within sqrt(2) of the modulus.
template <class T>
SK_DEVICE T largest_part(T x) {
  return fabs(x);
}
template <class T>
SK_DEVICE T largest_part(Complex<T> x) {
  return fmax(fabs(x.re), fabs(x.im));
}

template <class T>
SK_DEVICE T scaled(T x, T by) {
  return x * by;
}
template <class T>
SK_DEVICE Complex<T> scaled(Complex<T> x, T by) {
  return {x.re * by, x.im * by};
}
// x by + c for a real `by`.
template <class T>
SK_DEVICE T scaled_add(T x, T by, T c) {
  return fma(x, by, c);
}
template <class T>
SK_DEVICE Complex<T> scaled_add(Complex<T> x, T by, Complex<T> c) {
  return {fma(x.re, by, c.re), fma(x.im, by, c.im)};
}
template <class T>
SK_DEVICE T multiply_add(T a, T b, T c) {
  return fma(a, b, c);
}
template <class T>
SK_DEVICE Complex<T> multiply_add(Complex<T> a, Complex<T> b, Complex<T> c) {
  return {fma(a.re, b.re, fma(-a.im, b.im, c.re)), fma(a.re, b.im, fma(a.im, b.re, c.im))};
}
// conj(a) b + c.
template <class E>
SK_DEVICE E conj_multiply_add(E a, E b, E c) {
  return multiply_add(conjugate(a), b, c);
}
template <class T>
SK_DEVICE T difference(T a, T b) {
  return a - b;
}
template <class T>
SK_DEVICE Complex<T> difference(Complex<T> a, Complex<T> b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
SK_DEVICE T sum(T a, T b) {
  return a + b;
}
template <class T>
SK_DEVICE Complex<T> sum(Complex<T> a, Complex<T> b) {
  return {a.re + b.re, a.im + b.im};
}

// Elements from real numbers: x, and x in each part.
template <class E>
struct FromReal {
  static SK_DEVICE E real(E x) { return x; }
  static SK_DEVICE E splat(E x) { return x; }
};
template <class T>
struct FromReal<Complex<T>> {
  static SK_DEVICE Complex<T> real(T x) { return {x, T(0)}; }
  static SK_DEVICE Complex<T> splat(T x) { return {x, x}; }
};

// x / |x|, `size` being |x|; 1 where it is 0. Of a real number: its sign.
template <class T>
SK_DEVICE T phase_of(T x, T) {
  return copysign(T(1), x);
}
template <class T>
SK_DEVICE Complex<T> phase_of(Complex<T> x, T size) {
  return size == 0 ? Complex<T>{T(1), T(0)} : Complex<T>{x.re / size, x.im / size};
}

template <class T>
SK_DEVICE bool is_finite(T x) {
  return x - x == 0;  // NaN for infinities and NaN
}
template <class T>
SK_DEVICE bool is_finite(Complex<T> x) {
  return is_finite(x.re) && is_finite(x.im);
}

#ifdef __CUDA_ARCH__
// 1 / sqrt(x) to two ulp, x normal: `rsqrtf` would spend four instructions on subnormal numbers.
SK_DEVICE float rsqrt_estimate(float x) {
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

// 1 / sqrt(x) to about an ulp, x normal: an estimate, improved by a step of Newton's iteration.
SK_DEVICE float inverse_root(float x) {
  const float y = rsqrt_estimate(x);
  return fma(y * 0.5f, fma(-x * y, y, 1.0f), y);
}
SK_DEVICE double inverse_root(double x) {
  const double y = rsqrt(x);
  return fma(y * 0.5, fma(-x * y, y, 1.0), y);
}

// ---- shared memory in words of 16 bytes -----------------------------------------------------------------------------

template <class E>
constexpr int kPack = sizeof(E) < 16 ? 16 / static_cast<int>(sizeof(E)) : 1;

template <class E>
struct alignas(16) Pack {
  E item[kPack<E>];
};

template <class E>
SK_DEVICE Pack<E> load_pack(const E* aligned) {
  return *reinterpret_cast<const Pack<E>*>(aligned);
}

// ---- groups of `Lanes` neighbouring lanes, one problem each ---------------------------------------------------------

template <int Lanes, class T>
SK_DEVICE T from_lane(T value, int lane) {
  return __shfl_sync(kWholeWarp, value, lane, Lanes);
}
template <int Lanes, class T>
SK_DEVICE Complex<T> from_lane(Complex<T> value, int lane) {
  return {from_lane<Lanes>(value.re, lane), from_lane<Lanes>(value.im, lane)};
}
template <int Lanes, class T>
SK_DEVICE T group_sum(T value) {
  for (int step = Lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kWholeWarp, value, step, 32);
  return value;
}
template <int Lanes, class T>
SK_DEVICE T group_max(T value) {
  for (int step = Lanes / 2; step > 0; step /= 2) value = fmax(value, __shfl_xor_sync(kWholeWarp, value, step, 32));
  return value;
}
// Bit k: `flag` of the k-th lane of this lane's group.
template <int Lanes>
SK_DEVICE unsigned group_ballot(bool flag) {
  const unsigned all = __ballot_sync(kWholeWarp, flag);
  if constexpr (Lanes == 32) return all;
  return (all >> (threadIdx.x % 32 / Lanes * Lanes)) & ((1u << (Lanes % 32)) - 1u);
}

}  // namespace stablekern
