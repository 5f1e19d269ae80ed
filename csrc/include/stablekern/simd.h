// SIMD in terms of one vector type per scalar type, so that a kernel is written once and runs at whatever width the
// compiler was allowed: 64 bytes with AVX-512, 32 with AVX2 and FMA, 16 elsewhere (GCC and clang lower that to the
// machine's own instructions, or to scalars).
//
// `Vec<T>` is a GCC vector: + - * / and unary - work on it. Masks are bits with AVX-512 and vectors elsewhere; kernels
// only see `Mask<T>` and the functions below. Comparisons with NaN are false, as in C.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#include <immintrin.h>
#define SK_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define SK_AVX2 1
#endif

#define SK_INLINE inline __attribute__((always_inline))
#define SK_NOINLINE __attribute__((noinline))  // of templates: one copy, and registers of its own

namespace stablekern {

#if defined(SK_AVX512)
constexpr int kVectorBytes = 64;
constexpr const char* kSimdName = "avx512";
#elif defined(SK_AVX2)
constexpr int kVectorBytes = 32;
constexpr const char* kSimdName = "avx2";
#else
constexpr int kVectorBytes = 16;
constexpr const char* kSimdName = "portable";
#endif

template <class T>
struct VecTypes;
template <>
struct VecTypes<float> {
  typedef float vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t ivec __attribute__((vector_size(kVectorBytes)));
  using integer = int32_t;
};
template <>
struct VecTypes<double> {
  typedef double vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t ivec __attribute__((vector_size(kVectorBytes)));
  using integer = int64_t;
};

template <class T>
using Vec = typename VecTypes<T>::vec;
template <class T>
using IVec = typename VecTypes<T>::ivec;  // lanes as wide as T's
template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

#if defined(SK_AVX512)
template <class T>
struct Mask {
  uint32_t bits;
};
#else
template <class T>
struct Mask {
  IVec<T> bits;  // -1 or 0 in each lane
};
#endif

template <class T>
constexpr uint32_t kAllLanes = (kLanes<T> == 32) ? 0xffffffffu : ((1u << kLanes<T>) - 1u);

// ---- memory -------------------------------------------------------------------------------------------------------

template <class T>
SK_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // unlike 0 + value, the identity for -0 too, so the compiler drops it
}
template <class T>
SK_INLINE Vec<T> load(const T* p) {  // any alignment
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
SK_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}
// The first `count` lanes; the others are 0 and no memory beyond them is touched.
template <class T>
SK_INLINE Vec<T> load_first(const T* p, int count) {
#if defined(SK_AVX512)
  const uint32_t k = count >= kLanes<T> ? kAllLanes<T> : ((1u << count) - 1u);
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_maskz_loadu_ps(static_cast<__mmask16>(k), p);
  else
    return (Vec<T>)_mm512_maskz_loadu_pd(static_cast<__mmask8>(k), p);
#else
  Vec<T> v{};
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < count) v[i] = p[i];
  return v;
#endif
}
template <class T>
SK_INLINE void store_first(T* p, Vec<T> v, int count) {
#if defined(SK_AVX512)
  const uint32_t k = count >= kLanes<T> ? kAllLanes<T> : ((1u << count) - 1u);
  if constexpr (sizeof(T) == 4)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(k), (__m512)v);
  else
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(k), (__m512d)v);
#else
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < count) p[i] = v[i];
#endif
}
// Past the caches, for results that are not read again soon; `p` is aligned to kVectorBytes.
template <class T>
SK_INLINE void stream(T* p, Vec<T> v) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    _mm512_stream_ps(p, (__m512)v);
  else
    _mm512_stream_pd(p, (__m512d)v);
#elif defined(SK_AVX2)
  if constexpr (sizeof(T) == 4)
    _mm256_stream_ps(p, (__m256)v);
  else
    _mm256_stream_pd(p, (__m256d)v);
#else
  store(p, v);
#endif
}

// Orders streamed stores before whatever other threads are told next; call it once after the last `stream`.
SK_INLINE void stream_fence() {
#if defined(SK_AVX512) || defined(SK_AVX2)
  _mm_sfence();
#endif
}

// ---- comparisons and masks ----------------------------------------------------------------------------------------

#if defined(SK_AVX512)
#define SK_COMPARE(name, op, immediate)                                                     \
  template <class V>                                                                        \
  SK_INLINE auto name(V a, V b) {                                                           \
    if constexpr (sizeof(a[0]) == 4)                                                        \
      return Mask<float>{_mm512_cmp_ps_mask((__m512)a, (__m512)b, immediate)};              \
    else                                                                                    \
      return Mask<double>{_mm512_cmp_pd_mask((__m512d)a, (__m512d)b, immediate)};           \
  }
#else
#define SK_COMPARE(name, op, immediate)                                                     \
  template <class V>                                                                        \
  SK_INLINE auto name(V a, V b) {                                                           \
    if constexpr (sizeof(a[0]) == 4)                                                        \
      return Mask<float>{(IVec<float>)(a op b)};                                            \
    else                                                                                    \
      return Mask<double>{(IVec<double>)(a op b)};                                          \
  }
#endif
SK_COMPARE(less, <, _CMP_LT_OQ)
SK_COMPARE(less_equal, <=, _CMP_LE_OQ)
SK_COMPARE(greater, >, _CMP_GT_OQ)
SK_COMPARE(greater_equal, >=, _CMP_GE_OQ)
SK_COMPARE(equal, ==, _CMP_EQ_OQ)
#undef SK_COMPARE

template <class T>
SK_INLINE Mask<T> operator&(Mask<T> a, Mask<T> b) {
  return {a.bits & b.bits};
}
template <class T>
SK_INLINE Mask<T> operator|(Mask<T> a, Mask<T> b) {
  return {a.bits | b.bits};
}
template <class T>
SK_INLINE Mask<T> operator!(Mask<T> a) {
#if defined(SK_AVX512)
  return {~a.bits & kAllLanes<T>};
#else
  return {~a.bits};
#endif
}
template <class T>
SK_INLINE Mask<T> none_set() {
  return Mask<T>{};
}
// Lane i as bit i.
template <class T>
SK_INLINE uint32_t lane_bits(Mask<T> m) {
#if defined(SK_AVX512)
  return m.bits;
#elif defined(SK_AVX2)
  if constexpr (sizeof(T) == 4)
    return static_cast<uint32_t>(_mm256_movemask_ps((__m256)m.bits));
  else
    return static_cast<uint32_t>(_mm256_movemask_pd((__m256d)m.bits));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes<T>; ++i) bits |= static_cast<uint32_t>(m.bits[i] & 1) << i;
  return bits;
#endif
}
template <class T>
SK_INLINE bool any(Mask<T> m) {
  return lane_bits(m) != 0;
}
template <class T>
SK_INLINE Vec<T> select(Mask<T> m, Vec<T> yes, Vec<T> no) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_mask_mov_ps((__m512)no, static_cast<__mmask16>(m.bits), (__m512)yes);
  else
    return (Vec<T>)_mm512_mask_mov_pd((__m512d)no, static_cast<__mmask8>(m.bits), (__m512d)yes);
#else
  return m.bits ? yes : no;
#endif
}
// Comparisons of lane integers with one integer: loop indices against per-lane bounds.
template <class T>
SK_INLINE Mask<T> greater_than(IVec<T> a, typename VecTypes<T>::integer b) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return {_mm512_cmpgt_epi32_mask((__m512i)a, _mm512_set1_epi32(b))};
  else
    return {_mm512_cmpgt_epi64_mask((__m512i)a, _mm512_set1_epi64(b))};
#else
  return {(IVec<T>)(a > b)};
#endif
}
template <class T>
SK_INLINE Mask<T> equal_to(IVec<T> a, typename VecTypes<T>::integer b) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return {_mm512_cmpeq_epi32_mask((__m512i)a, _mm512_set1_epi32(b))};
  else
    return {_mm512_cmpeq_epi64_mask((__m512i)a, _mm512_set1_epi64(b))};
#else
  return {(IVec<T>)(a == b)};
#endif
}
template <class T>
SK_INLINE Mask<T> equal_int(IVec<T> a, IVec<T> b) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return {_mm512_cmpeq_epi32_mask((__m512i)a, (__m512i)b)};
  else
    return {_mm512_cmpeq_epi64_mask((__m512i)a, (__m512i)b)};
#else
  return {(IVec<T>)(a == b)};
#endif
}
template <class T>
SK_INLINE IVec<T> select_int(Mask<T> m, IVec<T> yes, IVec<T> no) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return (IVec<T>)_mm512_mask_mov_epi32((__m512i)no, static_cast<__mmask16>(m.bits), (__m512i)yes);
  else
    return (IVec<T>)_mm512_mask_mov_epi64((__m512i)no, static_cast<__mmask8>(m.bits), (__m512i)yes);
#else
  return m.bits ? yes : no;
#endif
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

// a * b + c with one rounding (two where the machine has no fused multiply-add).
template <class V>
SK_INLINE V fma(V a, V b, V c) {
#if defined(SK_AVX512)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(SK_AVX2)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
// -(a * b) + c
template <class V>
SK_INLINE V fnma(V a, V b, V c) {
#if defined(SK_AVX512)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_fnmadd_ps((__m512)a, (__m512)b, (__m512)c);
  else
    return (V)_mm512_fnmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(SK_AVX2)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm256_fnmadd_ps((__m256)a, (__m256)b, (__m256)c);
  else
    return (V)_mm256_fnmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return fma(-a, b, c);
#endif
}
#if defined(SK_AVX512)
// p * 2^n for integral n of any size, rounded once.
template <class T>
SK_INLINE Vec<T> scale(Vec<T> p, Vec<T> n) {
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_scalef_ps((__m512)p, (__m512)n);
  else
    return (Vec<T>)_mm512_scalef_pd((__m512d)p, (__m512d)n);
}
#endif
template <class V>
SK_INLINE V sqrt(V a) {
#if defined(SK_AVX512)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_sqrt_ps((__m512)a);
  else
    return (V)_mm512_sqrt_pd((__m512d)a);
#elif defined(SK_AVX2)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm256_sqrt_ps((__m256)a);
  else
    return (V)_mm256_sqrt_pd((__m256d)a);
#else
  V r;
  for (unsigned i = 0; i < sizeof(V) / sizeof(a[0]); ++i) r[i] = __builtin_sqrt(a[i]);
  return r;
#endif
}
// 1 / a for normal a whose reciprocal is normal, to about one ulp.
template <class V>
SK_INLINE V reciprocal(V a) {
#if defined(SK_AVX512)
  constexpr int kSteps = sizeof(a[0]) == 4 ? 1 : 2;
  V estimate;
  if constexpr (sizeof(a[0]) == 4)
    estimate = (V)_mm512_rcp14_ps((__m512)a);
  else
    estimate = (V)_mm512_rcp14_pd((__m512d)a);
  for (int step = 0; step < kSteps; ++step) estimate = fma(estimate, fma(-a, estimate, V{} + 1.0f), estimate);
  return estimate;
#else
  return 1 / a;
#endif
}
// 1 / sqrt(a) for normal a > 0, to about one ulp: a 14-bit estimate and Newton's steps where the machine has one.
template <class V>
SK_INLINE V reciprocal_sqrt(V a) {
#if defined(SK_AVX512)
  constexpr int kSteps = sizeof(a[0]) == 4 ? 1 : 2;
  V estimate;
  if constexpr (sizeof(a[0]) == 4)
    estimate = (V)_mm512_rsqrt14_ps((__m512)a);
  else
    estimate = (V)_mm512_rsqrt14_pd((__m512d)a);
  for (int step = 0; step < kSteps; ++step) {
    const V error = fma(a * estimate, estimate * -0.5f, V{} + 0.5f);
    estimate = fma(estimate, error, estimate);
  }
  return estimate;
#else
  return 1 / sqrt(a);
#endif
}
template <class V>
SK_INLINE V abs(V a) {
  if constexpr (sizeof(a[0]) == 4)
    return (V)((IVec<float>)a & 0x7fffffff);
  else
    return (V)((IVec<double>)a & 0x7fffffffffffffffLL);
}
// The second operand where either is NaN, as the x86 instructions do.
template <class V>
SK_INLINE V min(V a, V b) {
#if defined(SK_AVX512)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_min_ps((__m512)a, (__m512)b);
  else
    return (V)_mm512_min_pd((__m512d)a, (__m512d)b);
#else
  return a < b ? a : b;
#endif
}
template <class V>
SK_INLINE V max(V a, V b) {
#if defined(SK_AVX512)
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
  else
    return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#else
  return a > b ? a : b;
#endif
}
// a, its modulus limited to `bound` >= 0, in one instruction where there is one; a is not NaN (which that would lose).
template <class V>
SK_INLINE V limit_modulus(V a, V bound) {
#if defined(SK_AVX512)
  constexpr int kLeastModulus = 2;  // with the sign of the first operand
  if constexpr (sizeof(a[0]) == 4)
    return (V)_mm512_range_ps((__m512)a, (__m512)bound, kLeastModulus);
  else
    return (V)_mm512_range_pd((__m512d)a, (__m512d)bound, kLeastModulus);
#else
  return min(bound, max(-bound, a));
#endif
}
// The sign bit of each lane and nothing else; `flip_sign(a, sign_of(b))` negates a where b is negative.
template <class V>
SK_INLINE V sign_of(V a) {
  if constexpr (sizeof(a[0]) == 4)
    return (V)((IVec<float>)a & INT32_MIN);
  else
    return (V)((IVec<double>)a & INT64_MIN);
}
template <class V>
SK_INLINE V flip_sign(V a, V sign) {
  using I = std::conditional_t<sizeof(a[0]) == 4, IVec<float>, IVec<double>>;
  return (V)((I)a ^ (I)sign);
}
// The powers of two with which a lane is brought to the size of 1 and back: for `a` >= 0 with exponent k, `down` =
// 2^-k and `up` = 2^k, both normal and down * up = 1 (k is held within what allows that; 0 and subnormals count as the
// smallest). Any finite a * down is below 4.
template <class T>
struct PowerOfTwo {
  Vec<T> down, up;
};
template <class T>
SK_INLINE PowerOfTwo<T> power_of_two(Vec<T> a) {
  constexpr int mantissa = std::numeric_limits<T>::digits - 1;
  constexpr typename VecTypes<T>::integer bias = std::numeric_limits<T>::max_exponent - 1;
  const IVec<T> exponent = (IVec<T>)a >> mantissa;
  const IVec<T> low = IVec<T>{} + 1, high = low + (2 * bias - 2);
  IVec<T> field = exponent < low ? low : exponent;
  field = field > high ? high : field;
  return {(Vec<T>)((2 * bias - field) << mantissa), (Vec<T>)(field << mantissa)};
}
template <class T>
SK_INLINE typename VecTypes<T>::integer horizontal_max(IVec<T> a) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return _mm512_reduce_max_epi32((__m512i)a);
  else
    return _mm512_reduce_max_epi64((__m512i)a);
#else
  auto largest = a[0];
  for (int i = 1; i < kLanes<T>; ++i) largest = a[i] > largest ? a[i] : largest;
  return largest;
#endif
}
template <class V>
SK_INLINE auto horizontal_sum(V a) {
#if defined(SK_AVX512)
  if constexpr (sizeof(a[0]) == 4)
    return _mm512_reduce_add_ps((__m512)a);
  else
    return _mm512_reduce_add_pd((__m512d)a);
#else
  auto sum = a[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(a[0]); ++i) sum += a[i];
  return sum;
#endif
}

// ---- transposes ---------------------------------------------------------------------------------------------------

// kLanes x kLanes elements in registers, rows to columns.
template <class T>
SK_INLINE void transpose(Vec<T>* r) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4) {
    __m512 t[16];
    auto* x = reinterpret_cast<__m512*>(r);
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(x[i], x[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      for (int half = 0; half < 2; ++half) {
        const auto lo = (__m512d)t[i + half], hi = (__m512d)t[i + half + 2];
        x[i + 2 * half] = (__m512)_mm512_unpacklo_pd(lo, hi);
        x[i + 2 * half + 1] = (__m512)_mm512_unpackhi_pd(lo, hi);
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 16; half += 8) {
        t[i + half] = _mm512_shuffle_f32x4(x[i + half], x[i + half + 4], 0x88);
        t[i + half + 4] = _mm512_shuffle_f32x4(x[i + half], x[i + half + 4], 0xdd);
      }
    }
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
      x[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
      x[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
      x[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
  } else {
    __m512d t[8];
    auto* x = reinterpret_cast<__m512d*>(r);
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm512_unpacklo_pd(x[i], x[i + 1]);
      t[i + 1] = _mm512_unpackhi_pd(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 8; half += 4) {
        x[i + half] = _mm512_shuffle_f64x2(t[i + half], t[i + half + 2], 0x88);
        x[i + half + 2] = _mm512_shuffle_f64x2(t[i + half], t[i + half + 2], 0xdd);
      }
    }
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_f64x2(x[i], x[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_f64x2(x[i], x[i + 4], 0xdd);
    }
    for (int i = 0; i < 8; ++i) x[i] = t[i];
  }
#else
  constexpr int n = kLanes<T>;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < i; ++j) {
      const T above = r[j][i];
      r[j][i] = r[i][j];
      r[i][j] = above;
    }
#endif
}

// ---- lanes --------------------------------------------------------------------------------------------------------

// Lane i becomes v[index[i]]; 0 <= index[i] < kLanes.
template <class T>
SK_INLINE Vec<T> permute(Vec<T> v, IVec<T> index) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_permutexvar_ps((__m512i)index, (__m512)v);
  else
    return (Vec<T>)_mm512_permutexvar_pd((__m512i)index, (__m512d)v);
#elif defined(SK_AVX2)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_permutevar8x32_ps((__m256)v, (__m256i)index);
#endif
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = v[index[i]];
  return r;
}

// Lane i becomes table[index[i] & 15].
SK_INLINE Vec<float> look_up(const float (&table)[16], IVec<float> index) {
#if defined(SK_AVX512)
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)index, _mm512_load_ps(table));
#elif defined(SK_AVX2)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(table), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(table + 8), (__m256i)index);
  return (Vec<float>)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
  Vec<float> r;
  for (int i = 0; i < kLanes<float>; ++i) r[i] = table[index[i] & 15];
  return r;
#endif
}

// Even and odd elements of two consecutive vectors, and back: planes of interleaved complex numbers.
template <class T>
SK_INLINE void deinterleave(Vec<T> first, Vec<T> second, Vec<T>& even, Vec<T>& odd) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __m512i at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    even = (Vec<T>)_mm512_permutex2var_ps((__m512)first, at, (__m512)second);
    odd = (Vec<T>)_mm512_permutex2var_ps((__m512)first, _mm512_or_si512(at, _mm512_set1_epi32(1)), (__m512)second);
  } else {
    const __m512i at = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14);
    even = (Vec<T>)_mm512_permutex2var_pd((__m512d)first, at, (__m512d)second);
    odd = (Vec<T>)_mm512_permutex2var_pd((__m512d)first, _mm512_or_si512(at, _mm512_set1_epi64(1)), (__m512d)second);
  }
#else
  constexpr int half = kLanes<T> / 2;
  for (int i = 0; i < half; ++i) {
    even[i] = first[2 * i];
    odd[i] = first[2 * i + 1];
    even[half + i] = second[2 * i];
    odd[half + i] = second[2 * i + 1];
  }
#endif
}
template <class T>
SK_INLINE void interleave(Vec<T> even, Vec<T> odd, Vec<T>& first, Vec<T>& second) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4) {
    const __m512i at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    first = (Vec<T>)_mm512_permutex2var_ps((__m512)even, at, (__m512)odd);
    second = (Vec<T>)_mm512_permutex2var_ps((__m512)even, _mm512_add_epi32(at, _mm512_set1_epi32(8)), (__m512)odd);
  } else {
    const __m512i at = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11);
    first = (Vec<T>)_mm512_permutex2var_pd((__m512d)even, at, (__m512d)odd);
    second = (Vec<T>)_mm512_permutex2var_pd((__m512d)even, _mm512_add_epi64(at, _mm512_set1_epi64(4)), (__m512d)odd);
  }
#else
  constexpr int half = kLanes<T> / 2;
  for (int i = 0; i < half; ++i) {
    first[2 * i] = even[i];
    first[2 * i + 1] = odd[i];
    second[2 * i] = even[half + i];
    second[2 * i + 1] = odd[half + i];
  }
#endif
}

// Lane i of the result is the sum over the lanes of r[i], i < kLanes: three instructions a sum instead of eight.
template <class T>
SK_INLINE Vec<T> horizontal_sums(const Vec<T>* r, int64_t apart = 1) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4) {
    __m512 quads[4];  // lane 4 i + j of quads[k]: r[4 k + j] summed over the i-th 128 bits
    for (int k = 0; k < 4; ++k) {
      const auto x = [&](int j) { return (__m512)r[(4 * k + j) * apart]; };
      const __m512d low = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(x(0), x(1)), _mm512_unpackhi_ps(x(0), x(1)));
      const __m512d high = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(x(2), x(3)), _mm512_unpackhi_ps(x(2), x(3)));
      quads[k] = _mm512_add_ps((__m512)_mm512_unpacklo_pd(low, high), (__m512)_mm512_unpackhi_pd(low, high));
    }
    const auto fold = [](__m512 a, __m512 b) {
      return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
    };
    return (Vec<T>)fold(fold(quads[0], quads[1]), fold(quads[2], quads[3]));
  } else {
    __m512d pairs[4];
    for (int k = 0; k < 4; ++k) {
      const auto x = [&](int j) { return (__m512d)r[(2 * k + j) * apart]; };
      pairs[k] = _mm512_add_pd(_mm512_unpacklo_pd(x(0), x(1)), _mm512_unpackhi_pd(x(0), x(1)));
    }
    const auto fold = [](__m512d a, __m512d b) {
      return _mm512_add_pd(_mm512_shuffle_f64x2(a, b, 0x88), _mm512_shuffle_f64x2(a, b, 0xdd));
    };
    return (Vec<T>)fold(fold(pairs[0], pairs[1]), fold(pairs[2], pairs[3]));
  }
#else
  Vec<T> sums;
  for (int i = 0; i < kLanes<T>; ++i) sums[i] = horizontal_sum(r[i * apart]);
  return sums;
#endif
}

// ---- pairs of lanes, complex numbers ------------------------------------------------------------------------------

// Lanes 2 i and 2 i + 1 exchanged; both lane 2 i; both lane 2 i + 1.
template <class T>
SK_INLINE Vec<T> swap_pairs(Vec<T> v) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_permute_ps((__m512)v, 0xb1);
  else
    return (Vec<T>)_mm512_permute_pd((__m512d)v, 0x55);
#elif defined(SK_AVX2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_permute_ps((__m256)v, 0xb1);
  else
    return (Vec<T>)_mm256_permute_pd((__m256d)v, 0x5);
#else
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = v[i ^ 1];
  return r;
#endif
}
template <class T>
SK_INLINE Vec<T> first_of_pairs(Vec<T> v) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_moveldup_ps((__m512)v);
  else
    return (Vec<T>)_mm512_movedup_pd((__m512d)v);
#elif defined(SK_AVX2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_moveldup_ps((__m256)v);
  else
    return (Vec<T>)_mm256_movedup_pd((__m256d)v);
#else
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = v[i & ~1];
  return r;
#endif
}
template <class T>
SK_INLINE Vec<T> second_of_pairs(Vec<T> v) {
#if defined(SK_AVX512)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_movehdup_ps((__m512)v);
  else
    return (Vec<T>)_mm512_permute_pd((__m512d)v, 0xff);
#elif defined(SK_AVX2)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm256_movehdup_ps((__m256)v);
  else
    return (Vec<T>)_mm256_permute_pd((__m256d)v, 0xf);
#else
  Vec<T> r;
  for (int i = 0; i < kLanes<T>; ++i) r[i] = v[i | 1];
  return r;
#endif
}
// `transpose` with pairs for elements, kLanes / 2 of them a side.
template <class T>
SK_INLINE void transpose_pairs(Vec<T>* r) {
  if constexpr (sizeof(T) == 4) {
    Vec<double> t[kLanes<double>];
    for (int i = 0; i < kLanes<double>; ++i) t[i] = (Vec<double>)r[i];
    transpose<double>(t);
    for (int i = 0; i < kLanes<double>; ++i) r[i] = (Vec<T>)t[i];
  } else {
#if defined(SK_AVX512)
    auto* x = reinterpret_cast<__m512d*>(r);
    __m512d t[4];
    for (int i = 0; i < 2; ++i) {
      t[2 * i] = _mm512_shuffle_f64x2(x[2 * i], x[2 * i + 1], 0x44);
      t[2 * i + 1] = _mm512_shuffle_f64x2(x[2 * i], x[2 * i + 1], 0xee);
    }
    for (int i = 0; i < 2; ++i) {
      x[2 * i] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0x88);
      x[2 * i + 1] = _mm512_shuffle_f64x2(t[i], t[i + 2], 0xdd);
    }
#elif defined(SK_AVX2)
    auto* x = reinterpret_cast<__m256d*>(r);
    const __m256d low = _mm256_permute2f128_pd(x[0], x[1], 0x20);
    x[1] = _mm256_permute2f128_pd(x[0], x[1], 0x31);
    x[0] = low;
#endif  // elsewhere a vector holds one pair
  }
}

}  // namespace stablekern
