// Many tensors as one piece of work: where each one's numbers lie, and blocks over all of them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "stablekern/simd.h"

namespace stablekern {

// The Python side numbers them alike. Where the order of re and im does not matter, complex numbers are passed as twice
// as many real ones.
enum class SpanType : int64_t {
  kFloat = 0,
  kDouble = 1,
  kBfloat16 = 2,
  kHalf = 3,
  kComplexFloat = 4,
  kComplexDouble = 5,
  kBool = 6,
  kUint8 = 7,
  kInt8 = 8,
  kInt16 = 9,
  kInt32 = 10,
  kInt64 = 11,
};

struct Span {
  void* data;
  int64_t size;
  SpanType type;
};

constexpr int kSpanColumns = 3;  // of the table in which spans are passed

inline Span span_of(const int64_t* row) {
  return {reinterpret_cast<void*>(row[0]), row[1], static_cast<SpanType>(row[2])};
}

// The rows of an int64 table (tensors, kSpanColumns). Whoever made it keeps the tensors alive.
inline std::vector<Span> spans_of(const torch::stable::Tensor& table) {
  const auto* row = static_cast<const int64_t*>(table.const_data_ptr());
  std::vector<Span> spans(table.numel() / kSpanColumns);
  for (Span& span : spans) {
    span = span_of(row);
    row += kSpanColumns;
  }
  return spans;
}

// Blocks over all spans, so that the number and sizes of the tensors do not matter to the balance of the threads.
class Blocks {
 public:
  static constexpr int64_t kBlock = 16384;  // numbers of one piece of work

  explicit Blocks(const std::vector<Span>& spans) : spans_(spans), ends_(spans.size()) {
    int64_t total = 0;
    for (size_t i = 0; i < spans.size(); ++i) ends_[i] = total += (spans[i].size + kBlock - 1) / kBlock;
  }
  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }
  int64_t first(size_t span) const { return span == 0 ? 0 : ends_[span - 1]; }
  int64_t last(size_t span) const { return ends_[span]; }
  // what(block, span, from, to) for [begin, end); last first if `backwards`.
  template <class F>
  void visit(int64_t begin, int64_t end, bool backwards, const F& what) const {
    size_t i = std::upper_bound(ends_.begin(), ends_.end(), backwards ? end - 1 : begin) - ends_.begin();
    for (int64_t n = 0; n < end - begin; ++n) {
      const int64_t block = backwards ? end - 1 - n : begin + n;
      while (block >= ends_[i]) ++i;
      while (block < first(i)) --i;
      const int64_t from = (block - first(i)) * kBlock;
      what(block, spans_[i], from, std::min(spans_[i].size, from + kBlock));
    }
  }

 private:
  const std::vector<Span>& spans_;
  std::vector<int64_t> ends_;
};

// The lower and upper half of a vector of floats as doubles.
SK_INLINE void widen(Vec<float> v, Vec<double>& low, Vec<double>& high) {
#if defined(SK_AVX512)
  low = (Vec<double>)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)v));
  high = (Vec<double>)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)v, 1));
#else
  constexpr int half = kLanes<double>;
  for (int i = 0; i < half; ++i) {
    low[i] = v[i];
    high[i] = v[half + i];
  }
#endif
}

}  // namespace stablekern
