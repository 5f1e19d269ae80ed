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

// -2 ln u for u in [2^-33, 1], within one ulp of the result, also next to u = 1: u = 2^k (1 + f) with 1 + f in
// [sqrt(1/2), sqrt(2)), ln(1 + f) = f - f^2 (1/2 - f r(f)), r minimax: of relative error 6e-9 in the logarithm. The
// float next to 2 ln 2 is so close (3e-9) that a fused product needs no second part.
template <int kCount>
SK_INLINE void minus_twice_log(const Vec<float> (&u)[kCount], Vec<float> (&out)[kCount]) {
  constexpr float c[] = {0.3333333134651184f,  -0.2500081956386566f,  0.20001226663589478f, -0.16623356938362122f,
                         0.14201757311820984f, -0.13160179555416107f, 0.1276158094406128f,  -0.07634507119655609f};
  Vec<float> f[kCount], exponent[kCount], r[kCount];
  for (int i = 0; i < kCount; ++i) {
    const IVec<float> bits = (IVec<float>)u[i];
    const IVec<float> k = (bits - 0x3f3504f3) >> 23;
    f[i] = (Vec<float>)(bits - (k << 23)) - 1.0f;
    exponent[i] = __builtin_convertvector(k, Vec<float>);
    r[i] = splat<float>(-2 * c[7]);
  }
  for (int n = 6; n >= 0; --n)
    for (int i = 0; i < kCount; ++i) r[i] = fma(r[i], f[i], splat<float>(-2 * c[n]));
  for (int i = 0; i < kCount; ++i) r[i] = fma(f[i], r[i], splat<float>(1.0f));
  for (int i = 0; i < kCount; ++i) r[i] = fma(f[i] * f[i], r[i], f[i] * -2.0f);
  for (int i = 0; i < kCount; ++i) out[i] = fma(exponent[i], splat<float>(-1.3862943649291992f), r[i]);
}

// Two normals per lane from two words; several sets at a time, so that their chains of dependent steps overlap.
template <int kCount>
SK_INLINE void box_muller(const Words (&first)[kCount], const Words (&second)[kCount], Vec<float> (&n0)[kCount],
                          Vec<float> (&n1)[kCount]) {
  constexpr auto kUnit = static_cast<float>(kAngle / 4), kUnitError = static_cast<float>(kAngle / 4 - kUnit);
  const Vec<float> unit = splat<float>(kUnit), minus_half = splat<float>(-0.5f), one = splat<float>(1.0f);
  Vec<float> radius[kCount], x[kCount], error[kCount], z[kCount], s[kCount], c[kCount];
  for (int i = 0; i < kCount; ++i)
    radius[i] = fma(unsigned_to_float(first[i]), splat<float>(0x1p-32f), splat<float>(0x1p-33f));
  minus_twice_log(radius, radius);
  for (int i = 0; i < kCount; ++i) radius[i] = sqrt(radius[i]);
  for (int i = 0; i < kCount; ++i) {
    // Four times the angle as a signed fraction of 2^32: from the nearest quarter turn, within half of one. Its low
    // digits, for which a float has no place, make `error`: the angle is x + error.
    const IVec<float> rest = (IVec<float>)(second[i] << 2);
    const Vec<float> turn = __builtin_convertvector(rest & ~0xff, Vec<float>);
    const Vec<float> fine = __builtin_convertvector(rest & 0xff, Vec<float>);
    x[i] = turn * unit;
    error[i] = fma(fine, unit, fma(turn, splat<float>(kUnitError), fma(turn, unit, -x[i])));
  }
  for (int i = 0; i < kCount; ++i) {
    z[i] = x[i] * x[i];
    s[i] = fma(splat<float>(-0.0001951729936990887f), z[i], splat<float>(0.008332177996635437f));
    c[i] = fma(splat<float>(2.4438451873720624e-05f), z[i], splat<float>(-0.001388736767694354f));
    s[i] = fma(s[i], z[i], splat<float>(-0.16666655242443085f));
    c[i] = fma(c[i], z[i], splat<float>(0.04166664555668831f));
  }
  for (int i = 0; i < kCount; ++i) {
    // 1 - z/2 with what its rounding lost.
    const Vec<float> head = fma(z[i], minus_half, one);
    const Vec<float> lost = fma(z[i], minus_half, one - head);
    s[i] = x[i] + fma(s[i] * z[i], x[i], error[i] * head);
    c[i] = head + fma(c[i] * z[i], z[i], fnma(s[i], error[i], lost));
  }
  for (int i = 0; i < kCount; ++i) {
    // The quarter turn: bit 30 exchanges the two, bit 31 is the sign of the sine, that of the next quarter the cosine's.
    const Words quarter = second[i] + 0x20000000u;
    const Mask<float> straight = equal_to<float>((IVec<float>)(quarter & 0x40000000u), 0);
    n0[i] = radius[i] * flip_sign(select<float>(straight, c[i], s[i]), sign_of((Vec<float>)(quarter + 0x40000000u)));
    n1[i] = radius[i] * flip_sign(select<float>(straight, s[i], c[i]), sign_of((Vec<float>)quarter));
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
