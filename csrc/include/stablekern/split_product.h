// Products with a matrix of float32 on a CPU's matrix unit (AMX), which multiplies bfloat16 and adds in float32.
//
// Three bfloat16 numbers hold a float32 exactly: x = x_0 + x_1 + x_2, each at most 2^-8 of the one before. Of the nine
// products of two such sums the six with i + j <= 2 are formed, exactly, and summed in float32. The others are below
// 2^-22 |a x| together, mostly far below, and of both signs: less than the roundings of a sum of products in float32.
// The unit takes subnormal numbers for 0, so every column is brought to the size of 1 first.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "stablekern/simd.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(SK_AVX512) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define SK_AMX 1
#endif

namespace stablekern {

#if defined(SK_AMX)

// Whether a matrix of this size is for the unit, which takes whole pairs of registers, and this process may use it; the
// first call asks the operating system.
inline bool uses_matrix_unit(int64_t size) {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILE_DATA
  constexpr int64_t kLeastSize = 64;                // below, padding costs what the unit gains
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted && size >= kLeastSize;
}

constexpr int kSplitParts = 3;
constexpr int kUnitRows = 16;                         // of each of the unit's registers,
constexpr int kUnitBytes = 64;                        // and bytes to a row: 16 float32,
constexpr int kUnitDepth = kUnitBytes / 2;            // or 32 bfloat16
constexpr int kUnitNumbers = kUnitRows * kUnitDepth;  // of bfloat16 in a register

// The unit's eight registers as 16 rows of 64 bytes, in the thread that holds this.
class MatrixUnit {
 public:
  MatrixUnit() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } layout;
    std::fill_n(layout.bytes, 8, kUnitBytes);
    std::fill_n(layout.rows, 8, kUnitRows);
    _tile_loadconfig(&layout);
  }
  ~MatrixUnit() { _tile_release(); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

// The parts, in the upper halves of 32 bits. The last is what is left, unrounded: it keeps a NaN whatever its payload.
SK_INLINE void split(Vec<float> x, IVec<float>* part) {
  constexpr int32_t kHalf = 0x8000, kUpper = ~0xffff;
  for (int k = 0; k < kSplitParts - 1; ++k) {
    part[k] = ((IVec<float>)x + kHalf) & kUpper;
    x -= (Vec<float>)part[k];
  }
  part[kSplitParts - 1] = (IVec<float>)x & kUpper;
}

// A square matrix in parts, as the unit takes it. Registers stand in pairs, one of them 16 rows below the other, a
// pair for each part, those for each 32 of the depth; what is missing to whole pairs is 0.
class SplitMatrix {
 public:
  SplitMatrix(const float* a, int64_t size)
      : size_(size), pairs_((size + kPairRows - 1) / kPairRows), parts_(pairs_ * pairs_ * kStep + kUnitDepth) {
    for (int64_t i = 0; i < size; ++i)
      for (int64_t k = 0; k < size; k += kLanes<float>) {
        IVec<float> part[kSplitParts];
        split(load_first(a + i * size + k, static_cast<int>(std::min<int64_t>(size - k, kLanes<float>))), part);
        uint16_t* to = parts() + (i / kPairRows * pairs_ + k / kUnitDepth) * kStep +
                       i % kPairRows * kUnitDepth + k % kUnitDepth;
        for (int p = 0; p < kSplitParts; ++p) {
          const __m256i upper = _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)part[p], 16));
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + p * kPair), upper);
        }
      }
  }

  int64_t padded() const { return pairs_ * kPairRows; }
  // Room for `blocks` vectors to a row in parts.
  int64_t scratch(int blocks) const { return blocks / 2 * pairs_ * kStep; }

  // Steps of a product of `blocks` vectors.
  int64_t steps(int blocks) const { return blocks / 2 * pairs_ * pairs_; }

  // Makes to[i * blocks + b] * size[b].up row i of the product with the vectors x[k * blocks + b]. `to` has padded()
  // rows, whatever they hold, and `scratch` is aligned to a cache line. Needs a MatrixUnit, which leaves other units
  // free: meanwhile(i) is called once a step, when the rows before i are there.
  template <int blocks, class Meanwhile>
  SK_NOINLINE void multiply(const Vec<float>* x, uint16_t* scratch, PowerOfTwo<float>* size, Vec<float>* to,
                            Meanwhile meanwhile) const {
    static_assert(blocks % 2 == 0);
    Vec<float> largest[blocks] = {};
    for (int64_t k = 0; k < size_; ++k)
      for (int b = 0; b < blocks; ++b) largest[b] = max(abs(x[k * blocks + b]), largest[b]);
    for (int b = 0; b < blocks; ++b) size[b] = power_of_two<float>(largest[b]);
    const auto row = [&](int64_t k, int b) { return k < size_ ? x[k * blocks + b] * size[b].down : Vec<float>{}; };
    for (int64_t k = 0; k < padded(); k += 2)
      for (int b = 0; b < blocks; ++b) {
        // Numbers k and k + 1 of a column beside each other.
        IVec<float> low[kSplitParts], high[kSplitParts];
        split(row(k, b), low);
        split(row(k + 1, b), high);
        uint16_t* at = scratch + (b / 2 * pairs_ + k / kUnitDepth) * kStep + b % 2 * kUnitNumbers + k % kUnitDepth * 16;
        for (int p = 0; p < kSplitParts; ++p) {
          const __m512i both = _mm512_or_si512(_mm512_srli_epi32((__m512i)low[p], 16), (__m512i)high[p]);
          _mm512_store_si512(at + p * kPair, both);
        }
      }
    for (int64_t pair = 0; pair < pairs_; ++pair)
      for (int b = 0; b < blocks; b += 2)
        multiply_pairs(parts() + pair * pairs_ * kStep, scratch + b / 2 * pairs_ * kStep, blocks,
                       to + pair * kPairRows * blocks + b, [&] { meanwhile(pair * kPairRows); });
  }

 private:
  static constexpr int kPairRows = 2 * kUnitRows, kPair = 2 * kUnitNumbers, kStep = kSplitParts * kPair;

  const uint16_t* parts() const {
    const uintptr_t first = reinterpret_cast<uintptr_t>(parts_.data());
    return parts_.data() + (kUnitBytes - first % kUnitBytes) % kUnitBytes / sizeof(uint16_t);
  }
  uint16_t* parts() { return const_cast<uint16_t*>(static_cast<const SplitMatrix*>(this)->parts()); }

  // 32 rows times 32 columns, the smallest products first. Each line loads what differs from the one before. The
  // compiler does not know which memory the unit reads and writes, hence the barriers.
  template <class Meanwhile>
  SK_INLINE void multiply_pairs(const uint16_t* a, const uint16_t* x, int blocks, Vec<float>* to,
                                Meanwhile meanwhile) const {
    const auto load_rows = [&](int part) {
      _tile_loadd(4, a + part * kPair, kUnitBytes);
      _tile_loadd(5, a + part * kPair + kUnitNumbers, kUnitBytes);
    };
    const auto load_columns = [&](int part) {
      _tile_loadd(6, x + part * kPair, kUnitBytes);
      _tile_loadd(7, x + part * kPair + kUnitNumbers, kUnitBytes);
    };
    const auto add = [] {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    };
    __asm__ volatile("" ::: "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t step = 0; step < pairs_; ++step, a += kStep, x += kStep) {
      load_rows(0), load_columns(2), add();
      load_columns(1), add();
      load_rows(1), add();
      load_columns(0), add();
      load_rows(2), add();
      load_rows(0), add();
      meanwhile();
    }
    const int64_t stride = blocks * static_cast<int64_t>(sizeof *to);
    _tile_stored(0, to, stride);
    _tile_stored(1, to + 1, stride);
    _tile_stored(2, to + kUnitRows * blocks, stride);
    _tile_stored(3, to + kUnitRows * blocks + 1, stride);
    __asm__ volatile("" ::: "memory");
  }

  int64_t size_, pairs_;
  std::vector<uint16_t> parts_;
};

#else

// Where there is none, so that callers need not be written twice.
inline bool uses_matrix_unit(int64_t) { return false; }
class MatrixUnit {};
class SplitMatrix {
 public:
  SplitMatrix(const float*, int64_t) {}
  int64_t padded() const { return 0; }
  int64_t scratch(int) const { return 0; }
  int64_t steps(int) const { return 0; }
  template <int blocks, class Meanwhile>
  void multiply(const Vec<float>*, uint16_t*, PowerOfTwo<float>*, Vec<float>*, Meanwhile) const {}
};

#endif

}  // namespace stablekern
