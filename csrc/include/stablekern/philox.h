// Philox4x32-10 and Box-Muller over whole vectors: the stream of normals that stablekern/optim/philox.py defines.
//
// The words are the same integers everywhere. Float normals start from the same float32 uniform as the definition and
// are then evaluated in float32: within 2 ulp of it. Double normals are evaluated number by number as defined.
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

// One stream: everything of the counter and the key but the number of the block.
struct Stream {
  uint32_t parameter, step, key_low, key_high;
};

// Several sets of blocks at a time, so that one's multiplications hide the latency of another's.
template <int kSets>
SK_INLINE void philox4x32(const Words (&block_low)[kSets], uint32_t block_high, const Stream& stream,
                          Words (&word)[kSets][4]) {
  WideWords x[2 * kSets][4];  // the even lanes of a set, and the odd ones
  for (int i = 0; i < 2 * kSets; ++i) {
    const WideWords both = (WideWords)block_low[i / 2];
    x[i][0] = i % 2 == 0 ? both : both >> 32;
    x[i][1] = WideWords{} + block_high;
    x[i][2] = WideWords{} + stream.parameter;
    x[i][3] = WideWords{} + stream.step;
  }
  uint32_t k0 = stream.key_low, k1 = stream.key_high;
  for (int round = 0; round < 10; ++round) {
    for (auto& lanes : x) {
      const WideWords first = multiply_words(lanes[0], 0xd2511f53u), second = multiply_words(lanes[2], 0xcd9e8d57u);
      lanes[0] = (second >> 32) ^ lanes[1] ^ k0;
      lanes[1] = second;
      lanes[2] = (first >> 32) ^ lanes[3] ^ k1;
      lanes[3] = first;
    }
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  for (int i = 0; i < kSets; ++i)
    for (int k = 0; k < 4; ++k) word[i][k] = (Words)((x[2 * i][k] & 0xffffffffu) | (x[2 * i + 1][k] << 32));
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

// ln u for u in [2^-33, 1], within one ulp of the result, also next to u = 1: u = 2^k (1 + f) with 1 + f in
// [sqrt(1/2), sqrt(2)), ln(1 + f) = f - f^2/2 + f^3 r(f), r a minimax polynomial of relative error 7.5e-10.
SK_INLINE Vec<float> log_uniform(Vec<float> u) {
  const IVec<float> bits = (IVec<float>)u;
  const IVec<float> k = (bits - 0x3f3504f3) >> 23;
  const Vec<float> f = (Vec<float>)(bits - (k << 23)) - 1.0f;
  const Vec<float> exponent = __builtin_convertvector(k, Vec<float>);
  constexpr float c[] = {0.3333331346511841f,  -0.25000008940696716f, 0.2000211924314499f,
                         -0.1666799634695053f, 0.14219552278518677f,  -0.1240558847784996f,
                         0.11888162046670914f, -0.11675652116537094f, 0.06746642291545868f};
  Vec<float> r = splat<float>(c[8]);
  for (int i = 7; i >= 0; --i) r = fma(r, f, splat<float>(c[i]));
  const Vec<float> square = f * f;
  // ln 2 in two parts: the first times k is exact.
  Vec<float> tail = fma(square * f, r, exponent * -2.12194440054690583e-4f);
  tail = fma(square, splat<float>(-0.5f), tail);
  return fma(exponent, splat<float>(0.693359375f), f + tail);
}

// Two normals per lane from two words.
SK_INLINE void box_muller(Words first, Words second, Vec<float>& n0, Vec<float>& n1) {
  const Vec<float> uniform = fma(unsigned_to_float(first), splat<float>(0x1p-32f), splat<float>(0x1p-33f));
  const Vec<float> radius = sqrt(log_uniform(uniform) * -2.0f);
  const Words quarter = (second + 0x20000000u) >> 30;
  // The angle, within an eighth of a turn, is x + error: a float has too few digits for the 30 bits behind it.
  const IVec<float> rest = (IVec<float>)(second - (quarter << 30));
  const IVec<float> coarse = ((rest + 128) >> 8) << 8;
  const Vec<float> turn = __builtin_convertvector(coarse, Vec<float>);
  const Vec<float> fine = __builtin_convertvector(rest - coarse, Vec<float>);
  constexpr auto kUnit = static_cast<float>(kAngle), kUnitError = static_cast<float>(kAngle - kUnit);
  const Vec<float> unit = splat<float>(kUnit), unit_error = splat<float>(kUnitError);
  const Vec<float> x = turn * unit;
  const Vec<float> error = fma(fine, unit, fma(turn, unit_error, fma(turn, unit, -x)));
  const Vec<float> z = x * x;
  Vec<float> s = fma(splat<float>(-0.0001951729936990887f), z, splat<float>(0.008332177996635437f));
  s = fma(s, z, splat<float>(-0.16666655242443085f));
  Vec<float> c = fma(splat<float>(2.4438451873720624e-05f), z, splat<float>(-0.001388736767694354f));
  c = fma(c, z, splat<float>(0.04166664555668831f));
  // 1 - z/2 with what its rounding and that of z = x^2 lost.
  const Vec<float> one = splat<float>(1.0f), minus_half = splat<float>(-0.5f);
  const Vec<float> head = fma(z, minus_half, one);
  const Vec<float> lost = fma(fma(x, x, -z), minus_half, fma(z, minus_half, one - head));
  const Vec<float> level = head + fma(c * z, z, lost);
  const Vec<float> sine = x + fma(s * z, x, error * level), cosine = head + fma(c * z, z, fnma(sine, error, lost));
  const Mask<float> swapped = equal_to<float>((IVec<float>)(quarter & 1u), 1);
  const Vec<float> cosine_sign = (Vec<float>)(((quarter + 1u) & 2u) << 30), sine_sign = (Vec<float>)((quarter & 2u) << 30);
  n0 = radius * flip_sign(select<float>(swapped, sine, cosine), cosine_sign);
  n1 = radius * flip_sign(select<float>(swapped, cosine, sine), sine_sign);
}

// Four vectors as the columns of 4 x 4 blocks, one block per 128 bits: rows to columns within each.
SK_INLINE void transpose_quads(Vec<float> v[4]) {
#if defined(SK_AVX512)
  auto* x = reinterpret_cast<__m512*>(v);
  const __m512d a = (__m512d)_mm512_unpacklo_ps(x[0], x[1]), b = (__m512d)_mm512_unpackhi_ps(x[0], x[1]);
  const __m512d c = (__m512d)_mm512_unpacklo_ps(x[2], x[3]), d = (__m512d)_mm512_unpackhi_ps(x[2], x[3]);
  x[0] = (__m512)_mm512_unpacklo_pd(a, c);
  x[1] = (__m512)_mm512_unpackhi_pd(a, c);
  x[2] = (__m512)_mm512_unpacklo_pd(b, d);
  x[3] = (__m512)_mm512_unpackhi_pd(b, d);
#else
  for (int quad = 0; quad < kWordLanes; quad += 4)
    for (int i = 0; i < 4; ++i)
      for (int j = 0; j < i; ++j) {
        const float other = v[j][quad + i];
        v[j][quad + i] = v[i][quad + j];
        v[i][quad + j] = other;
      }
#endif
}

constexpr int kTile = 128;  // normals that are drawn together: 32 blocks

// Normals kTile * tile and on of a stream.
SK_INLINE void draw_tile(int64_t tile, const Stream& stream, float* out) {
  constexpr int quads = kWordLanes / 4;
  // Lane 4 i + k takes block quads * k + i: then the transposed vectors are consecutive.
  Words lane;
  for (int i = 0; i < quads; ++i)
    for (int k = 0; k < 4; ++k) lane[4 * i + k] = static_cast<uint32_t>(quads * k + i);
  const uint64_t first = static_cast<uint64_t>(tile) * (kTile / 4);  // a multiple of 32: no carry within a tile
  const auto high = static_cast<uint32_t>(first >> 32);
  constexpr int sets = kWordLanes >= 8 ? 2 : 1;
  for (int at = 0; at < kTile / 4; at += sets * kWordLanes) {
    Words block[sets], word[sets][4];
    for (int i = 0; i < sets; ++i) block[i] = lane + static_cast<uint32_t>(first + at + i * kWordLanes);
    philox4x32<sets>(block, high, stream, word);
    for (int i = 0; i < sets; ++i) {
      Vec<float> normal[4];
      box_muller(word[i][0], word[i][1], normal[0], normal[1]);
      box_muller(word[i][2], word[i][3], normal[2], normal[3]);
      transpose_quads(normal);
      for (int k = 0; k < 4; ++k) store(out + 4 * (at + i * kWordLanes) + k * kWordLanes, normal[k]);
    }
  }
}

SK_INLINE void draw_tile(int64_t tile, const Stream& stream, double* out) {
  Words lane;
  for (int i = 0; i < kWordLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  const uint64_t first = static_cast<uint64_t>(tile) * (kTile / 4);
  const auto high = static_cast<uint32_t>(first >> 32);
  for (int at = 0; at < kTile / 4; at += kWordLanes) {
    Words word[1][4];
    philox4x32<1>({lane + static_cast<uint32_t>(first + at)}, high, stream, word);
    for (int i = 0; i < kWordLanes; ++i)
      for (int half = 0; half < 2; ++half) {
        const float scaled = static_cast<float>(word[0][2 * half][i]) * 0x1p-32f;
        const double radius = std::sqrt(-2.0 * std::log(static_cast<double>(scaled + 0x1p-33f)));
        const uint32_t second = word[0][2 * half + 1][i], quarter = (second + 0x20000000u) >> 30;
        const double angle = static_cast<int32_t>(second - (quarter << 30)) * kAngle;
        double cosine = std::cos(angle), sine = std::sin(angle);
        if (quarter & 1u) std::swap(cosine, sine);
        double* to = out + 4 * (at + i) + 2 * half;
        to[0] = radius * ((quarter + 1u) & 2u ? -cosine : cosine);
        to[1] = radius * (quarter & 2u ? -sine : sine);
      }
  }
}

}  // namespace stablekern
