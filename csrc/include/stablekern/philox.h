// Philox4x32-10 and Box-Muller over whole vectors: the stream of normals that stablekern/optim/philox.py defines.
//
// The words are the same integers everywhere. Float normals start from the same float32 uniform as the definition and
// are then evaluated in float32: within 2 ulp of it but for one in 10,000, and within 3. Double normals are evaluated
// number by number as defined.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>

#include "stablekern/simd.h"

namespace stablekern {

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
constexpr int kWordLanes = kVectorBytes / 4;
constexpr double kAngle = 1.4629180792671596e-09;  // 2 pi / 2^32: of one unit of a word

// Words in the low halves of 64-bit lanes: what a 32 x 32 product needs. The high halves are ignored throughout, so that
// a product is at once the low word of the next round, and shifted the high one.
typedef uint64_t WideWords __attribute__((vector_size(kVectorBytes)));

SK_INLINE WideWords multiply_words(WideWords a, uint32_t factor) {
#if defined(SK_AVX512)
  return (WideWords)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(factor));
#elif defined(SK_AVX2)
  return (WideWords)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(factor));
#else
  return (a & 0xffffffffu) * factor;
#endif
}

// The low words of `even` and `odd`, side by side.
SK_INLINE Words merge_words(WideWords even, WideWords odd) {
#if defined(SK_AVX512)
  return (Words)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, _MM_PERM_CCAA);
#else
  return (Words)((even & 0xffffffffu) | (odd << 32));
#endif
}

// One stream: everything of the counter and the key but the number of the block.
struct Stream {
  uint32_t parameter, step, key_low, key_high;
};

// Several sets of blocks at a time, so that one's multiplications hide the latency of another's.
template <int kSets>
SK_INLINE void philox4x32(const WideWords (&block_low)[kSets], uint32_t block_high, const Stream& stream,
                          WideWords (&word)[kSets][4]) {
  for (int i = 0; i < kSets; ++i) {
    word[i][0] = block_low[i];
    word[i][1] = WideWords{} + block_high;
    word[i][2] = WideWords{} + stream.parameter;
    word[i][3] = WideWords{} + stream.step;
  }
  uint32_t k0 = stream.key_low, k1 = stream.key_high;
#pragma GCC unroll 10  // the first rounds have constant words, which then leave the loop over blocks
  for (int round = 0; round < 10; ++round) {
    for (auto& x : word) {
      const WideWords first = multiply_words(x[0], 0xd2511f53u), second = multiply_words(x[2], 0xcd9e8d57u);
      x[0] = (second >> 32) ^ x[1] ^ k0;
      x[1] = second;
      x[2] = (first >> 32) ^ x[3] ^ k1;
      x[3] = first;
    }
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
}

SK_INLINE Vec<float> unsigned_to_float(Words a) {
#if defined(SK_AVX512)
  return (Vec<float>)_mm512_cvtepu32_ps((__m512i)a);
#else
  // Both halves are exact, so their sum is rounded once.
  const Vec<float> high = __builtin_convertvector((IVec<float>)(a >> 16), Vec<float>);
  const Vec<float> low = __builtin_convertvector((IVec<float>)(a & 0xffffu), Vec<float>);
  return high * 65536.0f + low;
#endif
}

// a b - 1, rounded once on machines without a fused multiply-add too.
SK_INLINE Vec<float> product_less_one(Vec<float> a, Vec<float> b) {
#if defined(SK_AVX512) || defined(SK_AVX2)
  return fma(a, b, splat<float>(-1));
#else
  typedef double Wide __attribute__((vector_size(2 * kVectorBytes)));
  return __builtin_convertvector(__builtin_convertvector(a, Wide) * __builtin_convertvector(b, Wide) - 1.0, Vec<float>);
#endif
}

// -2 ln u for u in [2^-33, 1], within 1.8 ulp of the result for u > 0.95, within one elsewhere: u = 2^k m with m in
// [3/4, 3/2), and m = (1 + f) n / 20 with the nearest integer n. Tables give 20 / n and its logarithm: not quite, but a
// float close to 20 / n of which the logarithm, doubled, is a float but for 1e-4 ulp; next to u = 1 they are 1 and 0.
// The polynomial in f, |f| < 0.034, is minimax, of relative error 2e-8. The float next to 2 ln 2 is so close (3e-9)
// that a fused product needs no second part.
template <int kCount>
SK_INLINE void minus_twice_log(const Vec<float> (&u)[kCount], Vec<float> (&out)[kCount]) {
  alignas(kVectorBytes) static constexpr float kReciprocal[16] = {  // n = 16 to 30, then 15: by the last four bits of n
      1.2502925395965576f, 1.176939845085144f,  1.1115492582321167f, 1.0521821975708008f,
      1.0f,                0.9522200226783752f, 0.9093292355537415f, 0.8693417310714722f,
      0.8333624601364136f, 0.8001205921173096f, 0.7693384289741516f, 0.7406965494155884f,
      0.714263379573822f,  0.689561128616333f,  0.6667929291725159f, 1.3335720300674438f};
  alignas(kVectorBytes) static constexpr float kTwiceItsLog[16] = {
      0.4467551112174988f,  0.3258354365825653f,  0.21150954067707062f,  0.10173258185386658f,
      0.0f,                 -0.0979183092713356f, -0.19009611010551453f, -0.2800379693508148f,
      -0.364573210477829f,  -0.4459856450557709f, -0.5244486331939697f,  -0.6003285050392151f,
      -0.6730070114135742f, -0.7433998584747314f, -0.8105514645576477f,  0.5757221579551697f};
  Vec<float> f[kCount], power[kCount], start[kCount], r[kCount];
  for (int i = 0; i < kCount; ++i) {
    const IVec<float> bits = (IVec<float>)u[i];
    const IVec<float> k = (bits - 0x3f400000) & ~0x7fffff;  // times 2^23
    const Vec<float> m = (Vec<float>)(bits - k);
    const IVec<float> n = (IVec<float>)fma(m, splat<float>(20), splat<float>(0x1.8p23f));  // in its last bits
    f[i] = product_less_one(m, look_up(kReciprocal, n));
    start[i] = look_up(kTwiceItsLog, n);
    power[i] = __builtin_convertvector(k, Vec<float>);
  }
  for (int i = 0; i < kCount; ++i) r[i] = fma(f[i], splat<float>(0.50037813f), splat<float>(-0.66691333f));
  for (int i = 0; i < kCount; ++i) r[i] = fma(r[i], f[i], splat<float>(1.0f));
  for (int i = 0; i < kCount; ++i) r[i] = fma(r[i], f[i], splat<float>(-2.0f));
  for (int i = 0; i < kCount; ++i) r[i] = fma(r[i], f[i], start[i]);
  for (int i = 0; i < kCount; ++i) out[i] = fma(power[i], splat<float>(-1.3862943649291992f * 0x1p-23f), r[i]);
}

// Two normals per lane from two words; several sets at a time, so that their chains of dependent steps overlap.
template <int kCount>
SK_INLINE void box_muller(const Words (&first)[kCount], const Words (&second)[kCount], Vec<float> (&n0)[kCount],
                          Vec<float> (&n1)[kCount]) {
  constexpr float kEighth = 0.7853981852531433f, kEighthError = -2.1855694143368964e-08f;  // pi / 4
  Vec<float> radius[kCount], x[kCount], fine[kCount], sine[kCount], less[kCount];
  IVec<float> quarter[kCount];
  for (int i = 0; i < kCount; ++i)
    radius[i] = fma(unsigned_to_float(first[i]), splat<float>(0x1p-32f), splat<float>(0x1p-33f));
  minus_twice_log(radius, radius);
  for (int i = 0; i < kCount; ++i) radius[i] = sqrt(radius[i]);
  for (int i = 0; i < kCount; ++i) {
    // Bits 30 and 31 number the nearest quarter turn, those below them are the way from there plus an eighth of a turn.
    // What the last five of these add, for which a float has no place, is `fine`: the angle is kEighth * x + fine.
    quarter[i] = (IVec<float>)(second[i] + 0x20000010u);
    const IVec<float> way = quarter[i] << 2;
    x[i] = __builtin_convertvector((way & ~0x7f) ^ INT32_MIN, Vec<float>) * 0x1p-31f;
    const Vec<float> rest = __builtin_convertvector(way & 0x7f, Vec<float>);  // plus 64
    fine[i] = fma(rest, splat<float>(kEighth * 0x1p-31f), splat<float>(-64 * kEighth * 0x1p-31f));
  }
  for (int i = 0; i < kCount; ++i) {  // sine, and cosine less 1
    const Vec<float> z = x[i] * x[i];
    sine[i] = fma(z, splat<float>(-3.5975267e-05f), splat<float>(0.0024900441f));
    less[i] = fma(z, splat<float>(3.5303378e-06f), splat<float>(-0.00032594008f));
    sine[i] = fma(sine[i], z, splat<float>(-0.08074545f));
    less[i] = fma(less[i], z, splat<float>(0.015854327f));
    sine[i] = fma(sine[i], z, splat<float>(kEighthError));
    less[i] = fma(less[i], z, splat<float>(-0.30842513f));
    sine[i] = fma(x[i], splat<float>(kEighth), fma(sine[i], x[i], fine[i]));
    less[i] = less[i] * z;
  }
  for (int i = 0; i < kCount; ++i) {
    // Half a turn changes both signs; a quarter exchanges the two, and then the sine's sign.
    const Vec<float> r = flip_sign(radius[i], sign_of((Vec<float>)quarter[i]));
    const IVec<float> along = (IVec<float>)fma(r, less[i], r), across = (IVec<float>)(r * sine[i]);
    const Mask<float> even = equal_to<float>(quarter[i] & 0x40000000, 0);
    n0[i] = (Vec<float>)select_int<float>(even, along, across ^ INT32_MIN);
    n1[i] = (Vec<float>)select_int<float>(even, across, along);
  }
}

constexpr int kTile = 128;  // normals that are drawn together: 32 blocks

// How a tile lies in memory.
enum class Layout {
  kStream,  // in the order of the stream
  kPlanes,  // the even ones, re of complex numbers, before the odd ones
};

// Normals kTile * tile and on of a stream.
template <Layout kLayout = Layout::kStream>
SK_INLINE void draw_tile(int64_t tile, const Stream& stream, float* out) {
  constexpr int lanes = kWordLanes, blocks = lanes / 2;  // of a set: two pairs of words each
  constexpr int sets = 4;
  WideWords lane;
  for (int i = 0; i < blocks; ++i) lane[i] = static_cast<uint64_t>(i);
  const uint64_t first = static_cast<uint64_t>(tile) * (kTile / 4);  // a multiple of 32: no carry within a tile
  const auto high = static_cast<uint32_t>(first >> 32), low = static_cast<uint32_t>(first);
  for (int at = 0; at < kTile / 4; at += sets * blocks) {
    WideWords block[sets], word[sets][4];
    for (int i = 0; i < sets; ++i) block[i] = lane + static_cast<uint64_t>(low + at + i * blocks);
    philox4x32<sets>(block, high, stream, word);
    for (int i = 0; i < sets; i += 2) {
      Words radius[2], angle[2];
      for (int k = 0; k < 2; ++k) {  // lane 2 j is of words 0 and 1 of block j, lane 2 j + 1 of words 2 and 3
        radius[k] = merge_words(word[i + k][0], word[i + k][2]);
        angle[k] = merge_words(word[i + k][1], word[i + k][3]);
      }
      Vec<float> even[2], odd[2];
      box_muller<2>(radius, angle, even, odd);
      for (int k = 0; k < 2; ++k) {
        const int from = 2 * at + (i + k) * lanes;
        if constexpr (kLayout == Layout::kPlanes) {
          store(out + from, even[k]);
          store(out + kTile / 2 + from, odd[k]);
        } else {
          Vec<float> head, tail;
          interleave<float>(even[k], odd[k], head, tail);
          store(out + 2 * from, head);
          store(out + 2 * from + lanes, tail);
        }
      }
    }
  }
}

template <Layout kLayout = Layout::kStream>
SK_INLINE void draw_tile(int64_t tile, const Stream& stream, double* out) {
  constexpr int blocks = kWordLanes / 2;
  WideWords lane;
  for (int i = 0; i < blocks; ++i) lane[i] = static_cast<uint64_t>(i);
  const uint64_t first = static_cast<uint64_t>(tile) * (kTile / 4);
  const auto high = static_cast<uint32_t>(first >> 32), low = static_cast<uint32_t>(first);
  for (int at = 0; at < kTile / 4; at += blocks) {
    WideWords word[1][4];
    philox4x32<1>({lane + static_cast<uint64_t>(low + at)}, high, stream, word);
    for (int i = 0; i < blocks; ++i)
      for (int half = 0; half < 2; ++half) {
        const float scaled = static_cast<float>(static_cast<uint32_t>(word[0][2 * half][i])) * 0x1p-32f;
        const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(scaled + 0x1p-33f)));
        const auto second = static_cast<uint32_t>(word[0][2 * half + 1][i]);
        const uint32_t quarter = (second + 0x20000000u) >> 30;
        const double angle = static_cast<int32_t>(second - (quarter << 30)) * kAngle;
        double cosine = std::cos(angle), sine = std::sin(angle);
        if (quarter & 1u) std::swap(cosine, sine);
        const int pair = 2 * (at + i) + half;
        constexpr bool planes = kLayout == Layout::kPlanes;
        out[planes ? pair : 2 * pair] = radius * ((quarter + 1u) & 2u ? -cosine : cosine);
        out[planes ? kTile / 2 + pair : 2 * pair + 1] = radius * (quarter & 2u ? -sine : sine);
      }
  }
}

}  // namespace stablekern
